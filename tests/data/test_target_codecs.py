"""How teachers' answers are packed: round trips, bounds, and what a verifier sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.data.target_codecs import Codes, Field, Full, TopK
from jaxkd.numerics import compress_labels, recover_labels


def logits(*shape, scale=3.0, seed=0):
    return scale * np.random.default_rng(seed).standard_normal(shape, np.float32)


def there_and_back(codec, values):
    packed = jax.jit(codec.encode)(jnp.asarray(values))
    return packed, np.asarray(jax.jit(codec.decode)(packed))


CODECS = [
    Full((10,), "float32"),
    Full((10,), "float16"),
    Codes((10,)),
    TopK((10,), 4, "float32"),
    TopK((10,), 4, "float16"),
    Full((2, 3, 10), "float16"),
    Codes((2, 3, 10)),
    TopK((2, 3, 10), 4, "float16"),
]


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_fields_are_what_encode_returns(codec):
    packed, values = there_and_back(codec, logits(5, *codec.shape))
    assert values.shape == (5, *codec.shape) and values.dtype == np.float32
    found = {k: Field(v.dtype.name, v.shape[1:]) for k, v in packed.items()}
    assert found == codec.fields


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_a_fresh_answer_deviates_as_little_as_the_format_says(codec):
    values = logits(64, *codec.shape)
    packed, _ = there_and_back(codec, values)
    packed = {k: np.asarray(v) for k, v in packed.items()}
    error, allowed = codec.deviation(packed, values)
    assert error.shape == allowed.shape == (64,)
    assert (error <= allowed).all()


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_another_answer_deviates_more(codec):
    packed, _ = there_and_back(codec, logits(8, *codec.shape))
    packed = {k: np.asarray(v) for k, v in packed.items()}
    error, allowed = codec.deviation(packed, logits(8, *codec.shape, seed=1))
    assert (error > 10 * allowed).all()


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_records_do_not_depend_on_each_other(codec):
    values = logits(4, *codec.shape)
    _, together = there_and_back(codec, values)
    _, alone = there_and_back(codec, values[2:3])
    np.testing.assert_array_equal(together[2:3], alone)


def test_float32_is_exact():
    values = logits(32, 7, scale=1e4)
    np.testing.assert_array_equal(there_and_back(Full((7,)), values)[1], values)


def test_float16_keeps_eleven_bits():
    values = logits(1000, 7)
    back = there_and_back(Full((7,), "float16"), values)[1]
    assert np.abs(back / values - 1).max() <= 2.0**-11
    assert np.abs(back - values).max() > 1e-4  # it does round


def test_codes_round_to_half_a_level():
    values = logits(1000, 7) + 20.0  # all positive
    back = there_and_back(Codes((7,)), values)[1]
    level = np.ptp(values, axis=1, keepdims=True) / 255
    error = np.abs(back - values) / level
    assert 0.45 < error.max() < 0.501


def test_codes_give_back_the_extremes_and_constants():
    values = np.array([[-4.0, 0.3, 9.0], [2.5, 2.5, 2.5]], np.float32)
    packed, back = there_and_back(Codes((3,)), values)
    np.testing.assert_allclose(back[0, [0, 2]], [-4.0, 9.0], rtol=1e-6)
    np.testing.assert_array_equal(back[1], values[1])
    assert packed["codes"][0].tolist() == [0, round(4.3 / 13 * 255), 255]


def test_top_k_of_a_label_by_hand():
    probabilities = np.array([[0.5, 0.05, 0.3, 0.05, 0.1]])
    packed, back = there_and_back(TopK((5,), 2), np.log(probabilities) + 7.0)
    assert packed["index"].dtype == jnp.uint8
    assert packed["index"].tolist() == [[0, 2]]
    np.testing.assert_allclose(np.exp(packed["log_rest"]), [0.2], rtol=1e-5)
    np.testing.assert_allclose(
        np.exp(back), [[0.5, 0.2 / 3, 0.3, 0.2 / 3, 0.2 / 3]], rtol=1e-5
    )


@pytest.mark.parametrize("shape", [(12,), (3, 2, 12)])
def test_top_k_is_marginal_smoothing(shape):
    values = logits(16, *shape)
    _, back = there_and_back(TopK(shape, 5), values)
    name = "marginal_smoothing_k5"
    kept = compress_labels(jax.nn.softmax(values), label_format=name)
    expected = recover_labels(*kept, label_format=name, num_classes=12)
    np.testing.assert_allclose(np.exp(back), expected, atol=1e-6)


def test_a_sure_teacher_keeps_its_rest():
    # In half precision 1 - p is 0 or 5e-4; its logarithm is kept to 11 bits.
    values = np.array([[16.0, 2.0, 1.0, 0.0]], np.float32)
    _, back = there_and_back(TopK((4,), 1, "float16"), values)
    exact = jax.nn.log_softmax(values)
    rest = jax.scipy.special.logsumexp(exact[0, 1:])
    np.testing.assert_allclose(
        jax.scipy.special.logsumexp(back[0, 1:]), rest, rtol=1e-3
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_top_k_of_huge_logits_is_finite(dtype):
    values = np.array([[1e6, 0.0, -1e6]], np.float32)
    packed, back = there_and_back(TopK((3,), 1, dtype), values)
    assert all(np.isfinite(v).all() for v in packed.values())
    assert np.isfinite(back).all() and back[0, 0] == 0.0


def test_a_class_that_was_missed_is_seen():
    codec, values = TopK((6,), 2), logits(1, 6)
    packed = {k: np.asarray(v) for k, v in codec.encode(jnp.asarray(values)).items()}
    order = np.argsort(-values[0])
    swapped = values.copy()
    # The class after the kept ones becomes the largest, and nothing else changes.
    swapped[0, order[2]] = values[0, order[0]] + 4.0
    error, allowed = codec.deviation(packed, swapped)
    assert error[0] > 1.0 > allowed[0]


@pytest.mark.parametrize(
    ("classes", "dtype"),
    [(2, "uint8"), (256, "uint8"), (257, "uint16"), (70000, "uint32")],
)
def test_indices_are_as_narrow_as_the_classes_allow(classes, dtype):
    assert TopK((classes,), 1).fields["index"].dtype == dtype


@pytest.mark.parametrize("k", [0, 5, 9])
def test_top_k_must_leave_a_class(k):
    with pytest.raises(ValueError, match=f"from 1 to 4 for 5 classes, got {k}"):
        TopK((5,), k)


def test_fields_know_their_size():
    assert Field("float16", (3, 4)).nbytes == 24
    assert Field("float32", ()).nbytes == 4
    assert sum(f.nbytes for f in TopK((1000,), 10, "float16").fields.values()) == 42


def test_decoding_stays_on_its_device():
    """Top-k labels of a sharded batch are unpacked without any communication."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    codec, values = TopK((10,), 3), jnp.asarray(logits(16, 10))
    packed = jax.device_put(codec.encode(values), rows)
    compiled = jax.jit(codec.decode, out_shardings=rows).lower(packed).compile()
    text = compiled.as_text()
    assert not any(word in text for word in ("all-gather", "all-reduce", "all-to-all"))
    np.testing.assert_array_equal(compiled(packed), codec.decode(codec.encode(values)))
