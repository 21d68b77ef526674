"""Vector-quantised kernels: parts, clustering, gradients, and the compression."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd import compression, distill, models
from jaxkd.compression import After, flatten
from jaxkd.distill.method import DataSpec
from jaxkd.sparsity import vq
from jaxkd.sparsity.vq import Quantizer
from jaxkd.training.compressed import COMPRESSION, compressed, split
from jaxkd.training.network import from_linen
from jaxkd.training.start import init_state
from jaxkd.training.step import make_train_step

KEY = jax.random.key(0)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


# ------------------------------------------------------------------- kernels and parts


def test_sub_vectors_are_consecutive_inputs_of_one_output_with_their_taps():
    kernel = normal(0, 3, 3, 4, 5)
    vectors = vq.to_vectors(kernel, 18)
    assert vectors.shape == (10, 18)
    # The second sub-vector has inputs 2 and 3 of output 0.
    want = [kernel[i, j, c, 0] for c in (2, 3) for i in range(3) for j in range(3)]
    np.testing.assert_array_equal(vectors[1], want)
    np.testing.assert_array_equal(vq.from_vectors(vectors, kernel.shape), kernel)


@pytest.mark.parametrize("shape", [(3, 3, 4, 5), (7, 5), (3, 4, 5)])
def test_padding_is_dropped_again(shape):
    kernel = normal(0, *shape)
    vectors = vq.to_vectors(kernel, 11)
    assert vectors.size % 11 == 0 and vectors.size >= kernel.size
    assert (vectors.reshape(-1)[kernel.size :] == 0).all()
    np.testing.assert_array_equal(vq.from_vectors(vectors, shape), kernel)


def test_factors_are_the_best_of_their_rank():
    kernel, quantizer = normal(0, 20, 12), Quantizer(size=6, dim=2, clusters=None)
    parts = vq.factors(kernel, quantizer, KEY)
    assert parts["z"].shape == (40, 2) and parts["projection"].shape == (2, 6)
    vectors = np.asarray(vq.to_vectors(kernel, 6))
    tail = np.linalg.svd(vectors, compute_uv=False)[2:]
    error = np.linalg.norm(vectors - parts["z"] @ parts["projection"])
    np.testing.assert_allclose(error, np.sqrt(np.sum(tail**2)), rtol=1e-4)


def test_plain_vector_quantisation_has_no_projection():
    kernel, quantizer = normal(0, 20, 12), Quantizer(size=3, dim=3, clusters=4)
    parts = vq.factors(kernel, quantizer, KEY)
    assert set(parts) == {"z", "codebook"}
    np.testing.assert_array_equal(parts["z"], vq.to_vectors(kernel, 3))


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        # 72 sub-vectors of 3 * 3 * 9 * 16 = 1296 numbers in 18 each; 5 bits for 17
        # codewords, and 16 for each number of codebook and projection.
        (dict(size=18, dim=4, clusters=17), 72 * 5 + 16 * (17 * 4 + 4 * 18)),
        (dict(size=18, dim=18, clusters=16), 72 * 4 + 16 * 16 * 18),
        (dict(size=18, dim=4, clusters=None), 16 * (72 * 4 + 4 * 18)),
        # 185 sub-vectors, the last one padded.
        (dict(size=7, dim=2, clusters=2), 186 + 16 * (2 * 2 + 2 * 7)),
    ],
)
def test_bits_are_those_counted_by_hand(options, bits):
    assert Quantizer(**options).bits((3, 3, 9, 16)) == bits


def test_kernels_that_would_not_get_smaller_stay():
    quantizer = Quantizer(size=4, dim=2, clusters=16)
    assert quantizer.fits((16, 16)) and not quantizer.fits((8, 8))
    # 16 sub-vectors are as many as codewords.
    assert not Quantizer(size=16, dim=1, clusters=16).fits((16, 16))


# --------------------------------------------------------------------------- clustering


def test_the_nearest_codeword_and_of_ties_the_first():
    z = jnp.asarray([[0.0, 0], [2, 0], [0.9, 0]])
    codebook = jnp.asarray([[1.0, 0], [-1, 0], [1, 0]])
    np.testing.assert_array_equal(vq.nearest(z, codebook), [0, 0, 0])
    np.testing.assert_allclose(
        vq.squared_distances(z, codebook),
        [[1, 1, 1], [1, 9, 1], [0.01, 3.61, 0.01]],
        atol=1e-6,
    )


def test_codewords_move_to_their_means_and_empty_ones_stay():
    z = jnp.asarray([[1.0, 2], [3, 4], [5, 5]])
    codebook = jnp.asarray([[0.0, 0], [5, 5], [-9, -9]])
    moved = vq.moved(z, jnp.asarray([0, 0, 1]), codebook)
    np.testing.assert_array_equal(moved, [[2, 3], [5, 5], [-9, -9]])


def test_kmeans_finds_clusters_that_are_far_apart():
    centres = jnp.asarray([[0.0, 0], [10, 0], [0, 10]])
    z = jnp.repeat(centres, 20, 0) + 0.1 * normal(1, 60, 2)
    found = vq.kmeans(z, 3, jax.random.key(3))
    found = found[jnp.lexsort((found[:, 1], found[:, 0]))]
    want = jnp.stack([z[:20].mean(0), z[40:].mean(0), z[20:40].mean(0)])
    order = jnp.lexsort((want[:, 1], want[:, 0]))
    np.testing.assert_allclose(found, want[order], atol=1e-5)


def test_more_clusters_never_fit_worse_and_more_rounds_neither():
    z = normal(2, 200, 4)

    def error(clusters, rounds):
        codebook = vq.kmeans(z, clusters, KEY, rounds=rounds)
        return float(vq.squared_distances(z, codebook).min(1).sum())

    assert error(8, 25) < error(8, 3) < error(8, 0)
    assert error(32, 25) < error(8, 25)


def test_attention_turns_hard_at_low_temperature_and_even_at_high():
    z, codebook = normal(0, 9, 3), normal(1, 5, 3)
    hard = vq.attention(z, codebook, 1e-4)
    np.testing.assert_array_equal(hard.argmax(1), vq.nearest(z, codebook))
    np.testing.assert_allclose(hard.max(1), 1, atol=1e-6)
    np.testing.assert_allclose(vq.attention(z, codebook, 1e6), 0.2, atol=1e-5)


def test_gradients_are_finite_where_representations_are_codewords():
    z = normal(0, 6, 2)

    def loss(z, codebook):
        quantizer = Quantizer(size=2, dim=2, clusters=2, temperature=0.01)
        return jnp.sum(vq.refined(z, codebook, quantizer) ** 2)

    gradients = jax.grad(loss, (0, 1))(z, z[:2])
    assert all(jnp.isfinite(g).all() for g in gradients)
    far = jnp.concatenate([z[:1], jnp.full((1, 2), 1e3)])
    assert (vq.softly_moved(z, far, 0.01)[1] == 1e3).all()


def test_gradients_of_soft_rounds_are_those_of_finite_differences():
    z, codebook = normal(0, 7, 2), normal(1, 3, 2)

    def loss(z, codebook):
        moved = vq.softly_moved(z, codebook, 0.5)
        return jnp.sum(jnp.sin(vq.attention(z, moved, 0.5) @ moved))

    gradient = jax.grad(loss, (0, 1))(z, codebook)
    for argument in (0, 1):
        place = (2, 1)

        def shifted(by, argument=argument, place=place):
            arrays = [z, codebook]
            arrays[argument] = arrays[argument].at[place].add(by)
            return float(loss(*arrays))

        slope = (shifted(1e-2) - shifted(-1e-2)) / 2e-2
        np.testing.assert_allclose(gradient[argument][place], slope, rtol=2e-2)


# ---------------------------------------------------------------------- the compression

OPTIONS = dict(size=4, dim=2, clusters=8, temperature=0.05)


def params():
    return {
        "stem/kernel": normal(0, 3, 3, 3, 8),
        "block/kernel": normal(1, 3, 3, 8, 8),
        "block/bias": normal(2, 8),
        "head/kernel": normal(3, 8, 5),
    }


def made(hard_from=0.5, **changes):
    method = compression.create("lr2vq", **{**OPTIONS, **changes}, hard_from=hard_from)
    own = params()
    learned, state = method.init(KEY, own)
    return method, learned, state, own


def after(own, step, total):
    return After(
        params=own,
        gradients=own,
        key=KEY,
        step=jnp.int32(step),
        steps_per_epoch=2,
        total_steps=total,
    )


def test_stem_and_classifier_stay_and_the_parts_have_their_shapes():
    method, learned, state, own = made()
    assert {p: x.shape for p, x in learned.items()} == {
        "block/kernel/z": (144, 2),
        "block/kernel/projection": (2, 4),
        "block/kernel/codebook": (8, 2),
    }
    new = method.effective(learned, state, own)
    assert all((new[p] == own[p]).all() for p in own if p != "block/kernel")
    assert new["block/kernel"].shape == own["block/kernel"].shape
    assert (new["block/kernel"] != own["block/kernel"]).any()


def test_hard_kernels_have_as_many_sub_vectors_as_codewords():
    method, learned, state, own = made(hard_from=0.0)
    kernel = method.effective(learned, state, own)["block/kernel"]
    vectors = np.unique(np.asarray(vq.to_vectors(kernel, 4)), axis=0)
    assert len(vectors) <= 8
    soft, stored = vq.kernels(
        vq.by_kernel(learned)["block/kernel"],
        Quantizer(**OPTIONS),
        own["block/kernel"].shape,
    )
    np.testing.assert_array_equal(kernel, stored)
    facts = method.facts(learned, state, own)
    gap = np.linalg.norm(soft - stored) / np.linalg.norm(stored)
    np.testing.assert_allclose(facts["gap"], gap, rtol=1e-5)
    assert facts["bits_per_number"] == (144 * 3 + 16 * (8 * 2 + 2 * 4)) / 576


@pytest.mark.parametrize("hard_from", [0.0, 1.0])
def test_gradients_are_those_of_the_soft_kernels(hard_from):
    method, learned, state, own = made(hard_from)
    weights = normal(7, 3, 3, 8, 8)

    def loss(learned):
        return jnp.sum(weights * method.effective(learned, state, own)["block/kernel"])

    def soft(learned):
        parts = vq.by_kernel(learned)["block/kernel"]
        kernel, _ = vq.kernels(parts, Quantizer(**OPTIONS), (3, 3, 8, 8))
        return jnp.sum(weights * kernel)

    gradients, want = jax.grad(loss)(learned), jax.grad(soft)(learned)
    for path, gradient in gradients.items():
        np.testing.assert_allclose(gradient, want[path], rtol=1e-4, atol=1e-5)
        assert (gradient != 0).any()


def test_kernels_turn_hard_when_the_share_of_the_stage_is_over():
    method, learned, state, own = made(hard_from=0.5)
    new, state = method.update(learned, state, after(own, 3, 10))
    assert not state["hard"]
    soft = new["block/kernel"]
    new, state = method.update(learned, state, after(own, 4, 10))
    assert state["hard"] and (new["block/kernel"] != soft).any()
    # The parameters hold what the network computes with.
    np.testing.assert_array_equal(
        new["block/kernel"], method.effective(learned, state, own)["block/kernel"]
    )


def test_low_rank_alone_keeps_the_representation():
    method, learned, state, own = made(clusters=None, hard_from=1.0)
    kernel = method.effective(learned, state, own)["block/kernel"]
    vectors = np.asarray(vq.to_vectors(kernel, 4))
    assert np.linalg.matrix_rank(vectors, tol=1e-4) == 2
    # What starts from it finds the same factors.
    next_one = compression.create("lr2vq", **OPTIONS)
    again, _ = next_one.init(KEY, {**own, "block/kernel": kernel})
    z, projection = (again[f"block/kernel/{name}"] for name in ("z", "projection"))
    np.testing.assert_allclose(z @ projection, vectors, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be >= 1, got 0"),
        ({"dim": 5}, "dim must be from 1 to size 4, got 5"),
        ({"clusters": 1}, "clusters must be >= 2 or None, got 1"),
        ({"temperature": 0.0}, "temperature must be > 0 and finite, got 0.0"),
        ({"iterations": -1}, "iterations must be >= 0, got -1"),
        ({"hard_from": 1.5}, r"hard_from must be in \[0, 1\], got 1.5"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        compression.create("lr2vq", **{**OPTIONS, **options})


def test_a_network_without_a_kernel_that_gets_smaller_is_refused():
    method = compression.create("lr2vq", **{**OPTIONS, "clusters": 256})
    with pytest.raises(ValueError, match="the largest has 576 numbers; take fewer"):
        method.init(KEY, params())


# ------------------------------------------------------------------------- in the step


class Plain:
    """No augmentation."""

    def train(self, batch, *, key, epoch, num_classes):
        return dict(batch)


@pytest.fixture(scope="module")
def trained():
    """Two steps of a small network in the real step, the second with hard kernels."""
    shape = (8, 8, 3)
    net = models.create("resnet8", num_classes=3, width_factor=0.5)
    method = compression.create("lr2vq", size=9, dim=3, clusters=8)
    student = compressed(from_linen("student", net, shape), method, shape)
    loss = distill.create("ce")
    tx = optax.sgd(0.1, momentum=0.9)
    data = DataSpec(records=8, num_classes=3, steps_per_epoch=2, epochs=2, batch_size=8)
    state = init_state(KEY, student=student, method=loss, teachers=(), tx=tx, data=data)
    step = jax.jit(
        make_train_step(
            student=student.apply,
            teachers=(),
            method=loss,
            tx=tx,
            schedule=lambda step: jnp.float32(0.1),
            augmentation=Plain(),
            num_classes=3,
            steps_per_epoch=2,
            epochs=1,
            upkeep=student.upkeep,
        )
    )
    batch = {
        "image": normal(5, 8, *shape),
        "label": jnp.arange(8) % 3,
        "index": jnp.arange(8),
    }
    states = [state]
    for _ in range(2):
        state, metrics = step(state, batch, ())
        states.append(state)
    return states, metrics, student, batch


def test_every_part_is_trained_in_the_real_step(trained):
    (first, _, last), metrics, _, _ = trained
    assert jax.tree.structure(first) == jax.tree.structure(last)
    before, after = (s.params["network"][COMPRESSION] for s in (first, last))
    assert all((before[p] != after[p]).any() for p in before)
    assert np.isfinite(metrics["loss"]) and metrics["facts"]["bits_per_number"] < 16


def test_what_is_evaluated_is_what_is_stored(trained):
    (_, _, last), _, student, batch = trained
    own, learned, state = split(last.variables())
    assert state["hard"]
    own = flatten(own["params"])
    for path, parts in vq.by_kernel(learned).items():
        _, stored = vq.kernels(
            parts, Quantizer(size=9, dim=3, clusters=8), own[path].shape
        )
        np.testing.assert_allclose(own[path], stored, rtol=1e-5, atol=1e-6)
    outputs, _ = student.apply(last.variables(), batch["image"], train=False, key=None)
    assert jnp.isfinite(outputs.logits).all()


def test_two_seeds_at_once_are_two_seeds_one_by_one():
    method, own = compression.create("lr2vq", **OPTIONS), params()
    keys = jax.random.split(KEY, 2)
    both, _ = jax.vmap(lambda key: method.init(key, own))(keys)
    for i, key in enumerate(keys):
        one, _ = method.init(key, own)
        for path, x in one.items():
            np.testing.assert_allclose(both[path][i], x, rtol=1e-4, atol=1e-5)
