import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.distill.box_masks import box_masks


def test_one_box_is_a_rectangle_of_the_right_area():
    masks = box_masks(jax.random.key(0), 200, (40, 60), boxes=1, area=(0.3, 0.4))
    assert masks.shape == (200, 40, 60, 1)
    assert masks.dtype == jnp.float32
    rows, columns = masks.any((2, 3)), masks.any((1, 3))
    np.testing.assert_array_equal(masks[..., 0], rows[:, :, None] & columns[:, None, :])
    share = np.asarray(masks.mean((1, 2, 3)))
    # Sides are rounded to pixels.
    assert np.all((share > 0.27) & (share < 0.43))
    assert np.ptp(share) > 0.08
    # From flat to narrow: heights are spread between the area and the whole side.
    heights = np.asarray(rows.sum(1)) / 40
    assert heights.min() < 0.45
    assert heights.max() > 0.9


def test_three_boxes_cover_the_share_together_or_cancel():
    masks = box_masks(jax.random.key(1), 300, (64, 64))
    share = np.asarray(masks.mean((1, 2, 3)))
    assert set(np.unique(masks)) == {0.0, 1.0}
    assert share.max() <= 0.53
    assert 0.2 < share.mean() < 0.375


def test_masks_differ_within_a_batch_and_by_key():
    first = box_masks(jax.random.key(0), 2, (16, 16))
    second = box_masks(jax.random.key(1), 2, (16, 16))
    assert jnp.any(first[0] != first[1])
    assert jnp.any(first != second)


def test_impossible_options_are_named():
    with pytest.raises(ValueError, match="boxes must be >= 1, got 0"):
        box_masks(jax.random.key(0), 1, (4, 4), boxes=0)
    with pytest.raises(ValueError, match=r"area must be a range within \(0, 1\]"):
        box_masks(jax.random.key(0), 1, (4, 4), area=(0.5, 0.25))
