import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import sklearn.metrics

from jaxkd import losses


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def scores(rng):
    """Logits of five classes and their labels."""
    logits = rng.standard_normal((6, 5)).astype(np.float32) * 2
    return jnp.asarray(logits), jnp.asarray(rng.integers(0, 5, 6), jnp.int32)


@pytest.fixture
def slices(rng):
    """Logits of a three-class segmentation and their labels."""
    logits = rng.standard_normal((4, 5, 6, 3)).astype(np.float32)
    return jnp.asarray(logits), jnp.asarray(rng.integers(0, 3, (4, 5, 6)), jnp.int32)


def probability_logits(p):
    """Two-class logits whose foreground probability is `p`."""
    p = jnp.asarray(p)
    return jnp.stack([jnp.log1p(-p), jnp.log(p)], axis=-1)


class TestCrossEntropy:
    def test_by_hand(self):
        logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
        value = losses.cross_entropy(logits, jnp.array([0, 1]))
        np.testing.assert_allclose(value, [math.log(2), math.log(10)], rtol=1e-6)

    def test_mean_agrees_with_sklearn(self, scores):
        logits, labels = scores
        probabilities = scipy.special.softmax(np.float64(logits), axis=-1)
        expected = sklearn.metrics.log_loss(labels, probabilities, labels=range(5))
        value = losses.cross_entropy(logits, labels).mean()
        np.testing.assert_allclose(value, expected, rtol=1e-5)

    def test_one_hot_targets_equal_integer_labels(self, scores):
        logits, labels = scores
        value = losses.cross_entropy(logits, jax.nn.one_hot(labels, 5))
        expected = losses.cross_entropy(logits, labels)
        np.testing.assert_allclose(value, expected, rtol=1e-6)

    def test_soft_targets_mix_the_values_of_their_classes(self, scores):
        logits, labels = scores
        other = (labels + 1) % 5
        target = 0.3 * jax.nn.one_hot(labels, 5) + 0.7 * jax.nn.one_hot(other, 5)
        a, b = losses.cross_entropy(logits, labels), losses.cross_entropy(logits, other)
        value = losses.cross_entropy(logits, target)
        np.testing.assert_allclose(value, 0.3 * a + 0.7 * b, rtol=1e-5)

    @pytest.mark.parametrize("soft", [False, True])
    def test_smoothing_mixes_in_the_uniform_distribution(self, scores, soft):
        logits, labels = scores
        given = jax.nn.one_hot(labels, 5) if soft else labels
        value = losses.cross_entropy(logits, given, label_smoothing=0.2)
        log_p = scipy.special.log_softmax(np.float64(logits), axis=-1)
        plain = -log_p[np.arange(6), labels]
        expected = 0.8 * plain - 0.2 * log_p.mean(-1)
        np.testing.assert_allclose(value, expected, rtol=1e-5)

    def test_one_class_costs_nothing(self):
        value = losses.cross_entropy(jnp.array([[7.0]]), jnp.array([0]))
        np.testing.assert_array_equal(value, 0)

    def test_rejects_labels_of_another_shape(self, scores):
        with pytest.raises(ValueError, match=r"integer labels have shape \(3,\)"):
            losses.cross_entropy(scores[0], scores[1][:3])
        with pytest.raises(ValueError, match=r"soft labels have shape \(6, 4\)"):
            losses.cross_entropy(scores[0], jnp.zeros((6, 4)))

    def test_rejects_impossible_smoothing(self, scores):
        with pytest.raises(ValueError, match="label_smoothing must be between 0 and 1"):
            losses.cross_entropy(*scores, label_smoothing=1.5)


class TestFocal:
    def test_by_hand(self):
        logits = probability_logits(jnp.array([0.5, 0.9]))
        value = losses.focal(logits, jnp.array([1, 1]))
        expected = [0.25 * math.log(2), 0.01 * -math.log(0.9)]
        np.testing.assert_allclose(value, expected, rtol=1e-5)

    def test_without_gamma_is_cross_entropy(self, scores):
        np.testing.assert_allclose(
            losses.focal(*scores, gamma=0.0),
            losses.cross_entropy(*scores),
            rtol=1e-5,
        )

    def test_gradient_is_that_of_a_weighted_cross_entropy(self, scores):
        logits, labels = scores
        gradient = jax.grad(lambda z: losses.focal(z, labels).sum())(logits)
        p = jax.nn.softmax(logits)[jnp.arange(6), labels]
        plain = jax.grad(lambda z: losses.cross_entropy(z, labels).sum())(logits)
        expected = (1 - p[:, None]) ** 2 * plain
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)

    def test_one_hot_targets_equal_integer_labels(self, scores):
        logits, labels = scores
        value = losses.focal(logits, jax.nn.one_hot(labels, 5))
        np.testing.assert_allclose(value, losses.focal(logits, labels), rtol=1e-5)

    def test_fractional_gamma_is_finite_at_certainty(self):
        logits, labels = jnp.array([[90.0, 0.0]]), jnp.array([0])
        value, gradient = jax.value_and_grad(
            lambda z: losses.focal(z, labels, gamma=0.5).sum()
        )(logits)
        assert value == 0
        np.testing.assert_array_equal(gradient, 0)

    def test_rejects_a_negative_gamma(self, scores):
        with pytest.raises(ValueError, match="gamma must be >= 0, got -1"):
            losses.focal(*scores, gamma=-1)


class TestDice:
    def test_by_hand(self):
        # sum P = 2, sum Y = 2, sum P Y = 1.2
        p = jnp.array([[[0.8, 0.4], [0.2, 0.6]]])
        labels = jnp.array([[[1, 1], [0, 0]]])
        value = losses.dice(probability_logits(p), labels)
        np.testing.assert_allclose(value, [1 - (2.4 + 1) / (4 + 1)], rtol=1e-5)

    def test_of_the_batch_by_hand(self):
        # Second example: no foreground, sum P = 0.4.
        p = jnp.array([[[0.8, 0.4], [0.2, 0.6]], [[0.1, 0.1], [0.1, 0.1]]])
        labels = jnp.array([[[1, 1], [0, 0]], [[0, 0], [0, 0]]])
        value = losses.batch_dice(probability_logits(p), labels)
        expected = 1 - (2.4 + 1) / (2.4 + 2 + 1)
        np.testing.assert_allclose(value, [expected, expected], rtol=1e-5)

    def test_without_foreground_is_finite(self):
        p = jnp.full((1, 2, 2), 0.25)
        value = losses.dice(probability_logits(p), jnp.zeros((1, 2, 2), jnp.int32))
        np.testing.assert_allclose(value, [1 - 1 / (1 + 1)], rtol=1e-5)

    def test_sums_over_foreground_classes_together(self, slices):
        logits, labels = slices
        p = scipy.special.softmax(np.float64(logits), axis=-1)[..., 1:]
        y = np.eye(3)[np.asarray(labels)][..., 1:]
        axes = (1, 2, 3)
        expected = 1 - (2 * (p * y).sum(axes) + 0.5) / ((p + y).sum(axes) + 0.5)
        value = losses.dice(logits, labels, smooth=0.5)
        np.testing.assert_allclose(value, expected, rtol=1e-5)

    def test_of_a_batch_of_one_is_dice_of_the_example(self, slices):
        one = [x[:1] for x in slices]
        np.testing.assert_allclose(
            losses.batch_dice(*one), losses.dice(*one), rtol=1e-6
        )

    def test_perfect_prediction_costs_nothing(self, slices):
        _, labels = slices
        logits = 100.0 * jax.nn.one_hot(labels, 3)
        np.testing.assert_allclose(losses.dice(logits, labels), 0, atol=1e-6)

    def test_one_hot_targets_equal_integer_labels(self, slices):
        logits, labels = slices
        value = losses.batch_dice(logits, jax.nn.one_hot(labels, 3))
        np.testing.assert_allclose(value, losses.batch_dice(logits, labels), rtol=1e-6)

    @pytest.mark.parametrize("loss", [losses.dice, losses.batch_dice])
    def test_masked_pixels_are_as_if_cropped(self, slices, loss):
        logits, labels = slices
        where = jnp.zeros(labels.shape, bool).at[:, 1:4, 2:5].set(True)
        value = loss(logits, labels, where=where)
        expected = loss(logits[:, 1:4, 2:5], labels[:, 1:4, 2:5])
        np.testing.assert_allclose(value, expected, rtol=1e-5)

    def test_masked_examples_leave_the_batch_ratio_alone(self, slices):
        logits, labels = slices
        where = jnp.zeros(labels.shape, bool).at[:2].set(True)
        value = losses.batch_dice(logits, labels, where=where)
        expected = losses.batch_dice(logits[:2], labels[:2])
        np.testing.assert_allclose(value, expected[0].repeat(4), rtol=1e-5)

    @pytest.mark.parametrize("loss", [losses.dice, losses.batch_dice])
    def test_empty_mask_gives_zero_and_no_gradient(self, slices, loss):
        logits, labels = slices
        where = jnp.zeros(labels.shape, bool)
        np.testing.assert_array_equal(loss(logits, labels, where=where), 0)
        gradient = jax.grad(lambda z: loss(z, labels, where=where).sum())(logits)
        np.testing.assert_array_equal(gradient, 0)

    @pytest.mark.parametrize("loss", [losses.dice, losses.batch_dice])
    def test_rejects_what_cannot_be(self, slices, loss):
        logits, labels = slices
        with pytest.raises(ValueError, match="smooth must be > 0, got 0"):
            loss(logits, labels, smooth=0)
        with pytest.raises(ValueError, match="got 1 class"):
            loss(logits[..., :1], labels)
        with pytest.raises(ValueError, match="these logits need"):
            loss(logits, labels, where=jnp.ones((4,), bool))


class TestSigmoid:
    def test_bce_agrees_with_sklearn(self, rng):
        logits = rng.standard_normal((3, 8)).astype(np.float32) * 3
        targets = rng.integers(0, 2, (3, 8))
        value = losses.binary_bce(jnp.asarray(logits), jnp.asarray(targets))
        p = scipy.special.expit(np.float64(logits))
        expected = [
            sklearn.metrics.log_loss(t, q, labels=[0, 1])
            for t, q in zip(targets, p, strict=True)
        ]
        np.testing.assert_allclose(value, expected, rtol=1e-5)

    def test_bce_of_saturated_logits_is_that_of_the_clipped_probability(self):
        logits, targets = jnp.array([[1e4], [-1e4]]), jnp.array([[0], [1]])
        value, gradient = jax.value_and_grad(
            lambda z: losses.binary_bce(z, targets).sum()
        )(logits)
        np.testing.assert_allclose(value, 2 * -math.log(1e-7), rtol=1e-6)
        np.testing.assert_array_equal(gradient, 0)

    @pytest.mark.parametrize(
        "denominator, size", [("squared", 2 + 0.36 + 0.16 + 0.01), ("plain", 2 + 1.1)]
    )
    def test_dice_by_hand(self, denominator, size):
        p = jnp.array([[0.6, 0.4, 0.1]])
        logits = jnp.log(p) - jnp.log1p(-p)
        targets = jnp.array([[1, 1, 0]])
        value = losses.binary_dice(logits, targets, denominator=denominator)
        np.testing.assert_allclose(value, [1 - 2.0 / size], rtol=1e-5)

    def test_bce_dice_is_the_sum_of_both(self, rng):
        logits = jnp.asarray(rng.standard_normal((3, 4, 4, 1)), jnp.float32)
        targets = jnp.asarray(rng.integers(0, 2, (3, 4, 4, 1)))
        value = losses.bce_dice(logits, targets, denominator="plain")
        expected = losses.binary_bce(logits, targets) + losses.binary_dice(
            logits, targets, denominator="plain"
        )
        np.testing.assert_allclose(value, expected, rtol=1e-6)

    def test_masked_entries_are_as_if_cropped(self, rng):
        logits = jnp.asarray(rng.standard_normal((3, 4, 4)), jnp.float32)
        targets = jnp.asarray(rng.integers(0, 2, (3, 4, 4)))
        where = jnp.zeros(logits.shape, bool).at[:, 1:3].set(True)
        value = losses.bce_dice(logits, targets, where=where)
        expected = losses.bce_dice(logits[:, 1:3], targets[:, 1:3])
        np.testing.assert_allclose(value, expected, rtol=1e-5)

    def test_empty_mask_gives_zero(self):
        logits, nothing = jnp.ones((2, 3)), jnp.zeros((2, 3), bool)
        value = losses.bce_dice(logits, jnp.ones((2, 3)), where=nothing)
        np.testing.assert_array_equal(value, 0)

    def test_rejects_what_cannot_be(self):
        logits, targets = jnp.zeros((2, 3)), jnp.zeros((2, 3))
        with pytest.raises(ValueError, match="one target per logit"):
            losses.bce_dice(logits, targets[:, :2])
        with pytest.raises(ValueError, match="smooth must be > 0"):
            losses.bce_dice(logits, targets, smooth=0.0)
        with pytest.raises(ValueError, match="these logits need"):
            losses.bce_dice(logits, targets, where=jnp.ones((2,), bool))


class TestForegroundLogits:
    def test_their_sigmoid_is_the_softmax(self, slices):
        logits, _ = slices
        value = jax.nn.sigmoid(losses.foreground_logits(logits))
        expected = jax.nn.softmax(logits, axis=-1)[..., 1:]
        np.testing.assert_allclose(value, expected, rtol=1e-5)

    def test_of_two_classes_are_the_difference(self):
        value = losses.foreground_logits(jnp.array([[1.0, 4.0], [1e4, -1e4]]))
        np.testing.assert_array_equal(value, [[3.0], [-2e4]])

    def test_one_class_is_an_error(self):
        with pytest.raises(ValueError, match="got 1 class"):
            losses.foreground_logits(jnp.zeros((2, 1)))
