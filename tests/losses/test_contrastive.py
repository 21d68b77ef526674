import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import losses

BATCH, RECORDS, DIM, NEGATIVES = 3, 8, 4, 5
TEMPERATURE, EPS = 0.2, 1e-7


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture
def drawn():
    """Student, teacher, their banks, and the records to compare."""
    rng = np.random.default_rng(0)
    return (
        rng.standard_normal((BATCH, DIM)),
        rng.standard_normal((BATCH, DIM)),
        unit(rng.standard_normal((RECORDS, DIM))),
        unit(rng.standard_normal((RECORDS, DIM))),
        rng.integers(0, RECORDS, (BATCH, 1 + NEGATIVES)),
    )


def as_jax(arrays):
    return [
        jnp.asarray(x, "float32" if x.dtype.kind == "f" else "int32") for x in arrays
    ]


def exponentials(queries, bank, records):
    return np.exp(np.einsum("bmk,bk->bm", bank[records], unit(queries)) / TEMPERATURE)


def nce(scores, z):
    """The published formula, with the plain logarithms."""
    o, noise = scores / z, NEGATIVES / RECORDS
    positive = np.log(o[:, 0] / (o[:, 0] + noise + EPS))
    negative = np.log(noise / (o[:, 1:] + noise + EPS))
    return -positive - negative.sum(axis=1)


def test_crd_is_the_published_formula(drawn):
    student, teacher, student_bank, bank, records = drawn
    scores = (
        exponentials(student, bank, records),
        exponentials(teacher, student_bank, records),
    )
    z = [RECORDS * x.mean() for x in scores]
    got = losses.crd_normalizers(*as_jax(drawn), temperature=TEMPERATURE)
    np.testing.assert_allclose(got, z, rtol=1e-5)
    values = losses.crd(*as_jax(drawn), temperature=TEMPERATURE)
    np.testing.assert_allclose(
        values, nce(scores[0], z[0]) + nce(scores[1], z[1]), rtol=1e-5
    )


def test_crd_with_the_normalizers_of_an_earlier_batch(drawn):
    student, teacher, student_bank, bank, records = drawn
    expected = nce(exponentials(student, bank, records), 20.0)
    expected += nce(exponentials(teacher, student_bank, records), 50.0)
    values = losses.crd(
        *as_jax(drawn), normalizers=(20.0, 50.0), temperature=TEMPERATURE
    )
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_crd_trains_embeddings_but_neither_banks_nor_normalizers(drawn):
    *floats, records = as_jax(drawn)

    def total(student, teacher, student_bank, bank, z):
        values = losses.crd(
            student, teacher, student_bank, bank, records, normalizers=(z, z)
        )
        return values.sum()

    gradients = jax.grad(total, range(5))(*floats, jnp.float32(20.0))
    assert all(jnp.any(gradient != 0) for gradient in gradients[:2])
    for gradient in gradients[2:]:
        np.testing.assert_array_equal(gradient, 0)


def test_crd_sums_thousands_of_small_negatives_exactly():
    """Each is a logarithm near one, where 1 + x loses half of its digits."""
    count, records = 4096, 5000
    rng = np.random.default_rng(0)
    bank = unit(rng.standard_normal((records, DIM)))
    query = unit(rng.standard_normal((1, DIM)))
    compared = rng.integers(0, records, (1, 1 + count))
    o = np.einsum("bmk,bk->bm", bank[compared], query) / 0.07
    o, noise = np.exp(o) / 1e9, count / records
    expected = -np.log(o[0, 0] / (o[0, 0] + noise + EPS))
    expected += np.sum(np.log1p((o[0, 1:] + EPS) / noise))
    arrays = as_jax((query, query, bank, bank, compared))
    value = losses.crd(*arrays, normalizers=(1e9, 1e9))
    np.testing.assert_allclose(value, [2 * expected], rtol=1e-6)


def test_update_blends_the_rows_of_the_batch():
    bank = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    new = losses.update_bank(
        bank, jnp.array([[0.0, 5.0], [2.0, 0.0]]), jnp.array([2, 1]), momentum=0.25
    )
    expected = [[1.0, 0.0], unit(np.array([0.75, 0.25])), unit(np.array([0.15, 0.95]))]
    np.testing.assert_allclose(new, expected, rtol=1e-6)


def test_updates_carry_no_gradient():
    def total(embeddings):
        return losses.update_bank(jnp.eye(2), embeddings, jnp.array([0, 1])).sum()

    np.testing.assert_array_equal(jax.grad(total)(jnp.array([[1.0, 2.0]] * 2)), 0)


def test_in_batch_contrast_is_cross_entropy_over_other_classes(drawn):
    student, teacher = (unit(x) for x in drawn[:2])
    labels = np.array([1, 0, 1])
    scores = student @ teacher.T / TEMPERATURE
    expected = []
    for i in range(BATCH):
        rivals = [i, *np.flatnonzero(labels != labels[i])]
        row = np.log(np.exp(scores[i, rivals]).sum()) - scores[i, i]
        column = np.log(np.exp(scores[rivals, i]).sum()) - scores[i, i]
        expected.append(row + column)
    values = losses.crd_in_batch(
        *as_jax(drawn[:2]), jnp.asarray(labels), temperature=TEMPERATURE
    )
    np.testing.assert_allclose(values, expected, rtol=1e-5)


@pytest.mark.parametrize("count", [1, BATCH])
def test_in_batch_contrast_without_other_classes_is_zero(drawn, count):
    student, teacher = (x[:count] for x in as_jax(drawn[:2]))
    labels = jnp.zeros(count, jnp.int32)

    def total(student):
        return losses.crd_in_batch(student, teacher, labels).sum()

    value, gradient = jax.value_and_grad(total)(student)
    assert value == 0
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: (BATCH, DIM + 1)}, "embeddings must have one shape"),
        ({3: (RECORDS, DIM + 1)}, rf"banks must be \[records, {DIM}\]"),
        ({4: (BATCH, 1)}, r"must be \[3, 1 \+ negatives\]"),
        ({4: (BATCH + 1, 6)}, r"must be \[3, 1 \+ negatives\]"),
    ],
)
def test_crd_names_shapes_that_do_not_fit(drawn, change, message):
    arrays = as_jax(drawn)
    for position, shape in change.items():
        arrays[position] = jnp.zeros(shape, arrays[position].dtype)
    with pytest.raises(ValueError, match=message):
        losses.crd(*arrays)


def test_impossible_options_are_errors(drawn):
    arrays = as_jax(drawn)
    with pytest.raises(ValueError, match="temperature must be > 0"):
        losses.crd(*arrays, temperature=0.0)
    with pytest.raises(ValueError, match="eps must be > 0"):
        losses.crd(*arrays, eps=0.0)
    with pytest.raises(ValueError, match="momentum must be between 0 and 1"):
        losses.update_bank(jnp.eye(2), jnp.eye(2), jnp.arange(2), momentum=2.0)
    with pytest.raises(ValueError, match="temperature must be > 0"):
        losses.crd_in_batch(*arrays[:2], jnp.arange(BATCH), temperature=-1.0)
