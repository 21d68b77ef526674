import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import distill, losses
from jaxkd.distill.generation import random_mask, token_mask
from jaxkd.distill.modules import apply_module
from jaxkd.layers import Outputs
from jaxkd.layers.connectors import MaskedGenerator, tokens_to_map

STUDENT = {"stage1": (4, 4, 3), "stage2": (2, 2, 4)}
TEACHER = {"stage1": (4, 4, 5), "stage2": (2, 2, 6)}
VIT = ("block1", "block2", "tokens")


def outputs(shapes, seed):
    rng = np.random.default_rng(seed)
    taps = {
        tap: jnp.asarray(rng.standard_normal((2, *shape)), jnp.float32)
        for tap, shape in shapes.items()
    }
    return Outputs(logits=jnp.zeros((2, 5)), taps=taps)


@pytest.fixture
def run(classification):
    return dataclasses.replace(
        classification,
        student=outputs(STUDENT, 0),
        teachers=(outputs(TEACHER, 1),),
    )


@pytest.fixture
def transformers(classification):
    """Nine patches each; the student has two class tokens and the teacher one."""
    return dataclasses.replace(
        classification,
        student=outputs(dict.fromkeys(VIT, (11, 3)), 0),
        teachers=(outputs(dict.fromkeys(VIT, (10, 4)), 1),),
    )


def start(run, method):
    """State of the method's shapes; compiling its own `init` takes seconds."""
    params, memory = jax.eval_shape(lambda: run.init(method))
    rng = np.random.default_rng(3)
    return (
        jax.tree.map(lambda x: jnp.float32(rng.uniform(-0.5, 0.5, x.shape)), params),
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), memory),
    )


def step(run, method, state, **inputs):
    return jax.jit(method.terms)(*state, run.inputs(**inputs))


@pytest.mark.parametrize("unit", ["channels", "pixels"])
def test_mgd_rebuilds_the_teacher_from_what_the_mask_keeps(run, unit):
    method = distill.create("mgd_masked", mask_unit=unit, lambda_mgd=0.4)
    params, memory = start(run, method)
    assert memory == {}
    values, _ = step(run, method, (params, memory), seed=5)
    keep = random_mask(jax.random.key(5), (2, 2, 2, 6), 0.4, unit)
    assert 0 < jnp.mean(keep) < 1
    generated, _ = apply_module(
        MaskedGenerator(6), params, {}, run.student.taps["stage2"], keep, train=True
    )
    np.testing.assert_allclose(
        values["mgd_masked"],
        losses.reconstruction(generated, run.teacher.taps["stage2"]),
        rtol=1e-5,
    )


def test_mgd_draws_another_mask_at_each_step(run):
    method = distill.create("mgd_masked", lambda_mgd=0.5)
    state = start(run, method)
    first, again, other = (
        step(run, method, state, seed=seed)[0]["mgd_masked"] for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert jnp.any(first != other)


def test_mgd_aligns_only_channels_that_differ(run):
    params, _ = jax.eval_shape(lambda: run.init(distill.create("mgd_masked")))
    assert set(params) == {"align", "conv0", "conv1"}
    same = dataclasses.replace(run, teachers=(run.student,))
    params, _ = jax.eval_shape(lambda: same.init(distill.create("mgd_masked")))
    assert set(params) == {"conv0", "conv1"}


def test_mgd_masks_are_of_one_unit_and_one_share():
    shape = (50, 6, 7, 40)
    channels = random_mask(jax.random.key(0), shape, 0.15, "channels")
    pixels = random_mask(jax.random.key(0), shape, 0.75, "pixels")
    assert channels.shape == (50, 1, 1, 40)
    assert pixels.shape == (50, 6, 7, 1)
    # 2,000 draws: four standard deviations are 0.03 and 0.04.
    assert jnp.mean(channels) == pytest.approx(0.85, abs=0.04)
    assert jnp.mean(pixels) == pytest.approx(0.25, abs=0.04)
    assert set(np.unique(channels)) == {0.0, 1.0}


def test_mgd_needs_maps_of_one_size(run):
    message = r"\(4, 4, 3\) and tap 'stage2' of network 'teacher' \(2, 2, 6\)"
    with pytest.raises(ValueError, match=message):
        run.init(distill.create("mgd_masked", student_tap="stage1"))


def test_mgd_checks_its_options():
    with pytest.raises(ValueError, match=r"lambda_mgd must be in \[0, 1\)"):
        distill.create("mgd_masked", lambda_mgd=1.0)
    assert distill.create("mgd_masked").weights == {"mgd_masked": 7e-5}


def test_vitkd_imitates_early_tokens(transformers):
    method = distill.create("vitkd")
    params, memory = start(transformers, method)
    values, _ = step(transformers, method, (params, memory))
    expected = 0.0
    for i, tap in enumerate(("block1", "block2")):
        layer = jax.tree.map(np.float64, params[f"early{i}"]["project"])
        tokens = np.float64(transformers.student.taps[tap])[:, 2:]
        matched = tokens @ layer["kernel"] + layer["bias"]
        target = np.float64(transformers.teacher.taps[tap])[:, 1:]
        expected += ((matched - target) ** 2).sum((1, 2))
    np.testing.assert_allclose(values["mimicking"], expected, rtol=1e-4)


def test_vitkd_generates_the_masked_tokens_of_the_last_block(transformers):
    method = distill.create("vitkd", lambda_vitkd=0.4)
    params, memory = start(transformers, method)
    values, _ = step(transformers, method, (params, memory), seed=5)
    keep = token_mask(jax.random.key(5), (2, 3, 3, 4), 0.4)
    generated, _ = apply_module(
        MaskedGenerator(4, learned_fill=True),
        params["late"],
        {},
        tokens_to_map(transformers.student.taps["tokens"]),
        keep,
        train=True,
    )
    teacher = tokens_to_map(transformers.teacher.taps["tokens"])
    squares = np.float64(generated - teacher) ** 2
    masked = np.float64(1 - keep)
    np.testing.assert_allclose(
        values["generation"], (squares * masked).sum((1, 2, 3)), rtol=1e-5
    )


@pytest.mark.parametrize(("share", "kept"), [(0.5, 4), (0.4, 5), (1.0, 0), (0.01, 8)])
def test_vitkd_keeps_a_fixed_number_of_random_tokens(share, kept):
    keep = token_mask(jax.random.key(0), (20, 3, 3, 4), share)
    assert keep.shape == (20, 3, 3, 1)
    np.testing.assert_array_equal(keep.sum((1, 2, 3)), kept)
    if 0 < kept < 8:
        assert len(np.unique(keep.reshape(20, 9), axis=0)) > 10


def test_vitkd_weights_are_those_of_the_paper():
    weights = distill.create("vitkd", lambda_vitkd=0.25).weights
    assert weights == {"mimicking": 3e-5, "generation": pytest.approx(1.2e-5)}
    scheduled = distill.create("vitkd", beta=lambda step: 2.0 * step).weights
    assert distill.weight_at(scheduled["generation"], jnp.float32(3)) == pytest.approx(
        12.0
    )


def test_vitkd_needs_no_layers_between_equal_widths(transformers):
    same = dataclasses.replace(transformers, teachers=(transformers.student,))
    params, _ = jax.eval_shape(lambda: same.init(distill.create("vitkd")))
    assert params["early0"] == params["early1"] == {}
    assert set(params["late"]) == {"fill", "conv0", "conv1"}


def test_vitkd_needs_one_grid_of_tokens(transformers, run):
    method = distill.create("vitkd")
    other = outputs(dict.fromkeys(VIT, (17, 4)), 1)
    with pytest.raises(ValueError, match="3x3 tokens and tap .* of network .* 4x4"):
        dataclasses.replace(transformers, teachers=(other,)).init(method)
    odd = outputs(dict.fromkeys(VIT, (12, 4)), 1)
    with pytest.raises(ValueError, match=r"'teacher' has shape \(12, 4\).* square"):
        dataclasses.replace(transformers, teachers=(odd,)).init(method)
    with pytest.raises(KeyError, match="'student' has no tap 'block1'; it has stage1"):
        run.init(method)
    with pytest.raises(ValueError, match=r"lambda_vitkd must be in \(0, 1\]"):
        distill.create("vitkd", lambda_vitkd=0.0)
