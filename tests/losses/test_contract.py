"""What every loss promises. A new loss is one row in a file of contracts/."""

import dataclasses
import functools
import runpy
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

BATCH = 8


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss, the names of its inputs (the first is the student's), and its traits.

    Traits: `identity`: zero loss and zero gradient when the teacher equals the student.
    `coupled`: a value depends on the whole batch. `ordered`: and on its order.
    `pixels`: one value per pixel.
    `where`: takes a mask of the shape of its values. `shift`: adding a constant to all
    of the student's channels changes nothing. `all_classes`: gives every
    class a share, so that none may be impossible. `detached`: part of the formula is
    held constant, so that finite differences don't apply.
    """

    name: str
    function: Callable
    inputs: str
    traits: str = ""

    def has(self, trait):
        return trait in self.traits.split()

    def teachers(self):
        names = self.inputs.split()
        return [i for i, name in enumerate(names) if name.startswith("teacher")]

    def arrays(self):
        rng = np.random.default_rng(0)
        return [jnp.asarray(INPUTS[name](rng, BATCH)) for name in self.inputs.split()]


def _load_contracts():
    """The rows and inputs of every file in contracts/."""
    rows, inputs = [], {}
    for path in sorted((Path(__file__).parent / "contracts").glob("*.py")):
        contract = runpy.run_path(str(path))
        rows += [Loss(*row) for row in contract["LOSSES"]]
        clash = inputs.keys() & contract["INPUTS"].keys()
        assert not clash, f"{path.name} defines {clash} again"
        inputs |= contract["INPUTS"]
    names = [loss.name for loss in rows]
    assert len(set(names)) == len(names), "two losses have one name"
    return rows, inputs


LOSSES, INPUTS = _load_contracts()


def every_loss(trait="", *, without=""):
    picked = [
        loss
        for loss in LOSSES
        if (not trait or loss.has(trait)) and not loss.has(without)
    ]
    return pytest.mark.parametrize("loss", picked, ids=lambda loss: loss.name)


def cotangent(values):
    """A different factor for each value, so that mixed-up gradients show."""
    return jnp.linspace(0.5, 1.5, values.size).reshape(values.shape)


@functools.cache
def value_and_gradients(loss):
    """Jitted: (values, gradients of their weighted sum by every float input)."""

    def run(*arrays):
        floats = [
            i for i, x in enumerate(arrays) if jnp.issubdtype(x.dtype, jnp.floating)
        ]

        def total(*chosen):
            full = list(arrays)
            for i, x in zip(floats, chosen, strict=True):
                full[i] = x
            values = loss.function(*full)
            return jnp.sum(cotangent(values) * values), values

        gradient = jax.grad(total, tuple(range(len(floats))), has_aux=True)
        grads, values = gradient(*(arrays[i] for i in floats))
        return values, dict(zip(floats, grads, strict=True))

    return jax.jit(run)


@every_loss()
def test_value_is_float32_per_example_or_pixel(loss):
    arrays = loss.arrays()
    values, _ = value_and_gradients(loss)(*arrays)
    shape = arrays[0].shape[:-1] if loss.has("pixels") else (BATCH,)
    assert values.shape == shape
    assert values.dtype == jnp.float32


@every_loss(without="detached")
def test_gradient_agrees_with_finite_differences(loss):
    run, arrays = value_and_gradients(loss), loss.arrays()
    weights = cotangent(run(*arrays)[0])
    gradient = run(*arrays)[1][0]
    direction = np.random.default_rng(1).standard_normal(arrays[0].shape)
    direction = jnp.asarray(direction / np.linalg.norm(direction), jnp.float32)

    def along(step):
        values, _ = run(arrays[0] + step * direction, *arrays[1:])
        return float(np.sum(np.float64(weights * values)))

    # Fourth order, so that a step large against float32 rounding is still exact.
    h = 0.05
    numeric = (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)
    analytic = float(jnp.vdot(gradient, direction))
    assert analytic == pytest.approx(numeric, rel=5e-3, abs=2e-4)


@every_loss()
def test_no_gradient_reaches_the_teacher(loss):
    _, grads = value_and_gradients(loss)(*loss.arrays())
    assert jnp.any(grads[0] != 0)
    for position in loss.teachers():
        np.testing.assert_array_equal(grads[position], 0)


@every_loss("identity")
def test_student_equal_to_teacher_has_no_loss_and_no_gradient(loss):
    arrays = loss.arrays()
    for position in loss.teachers():
        arrays[position] = arrays[0]
    values, grads = value_and_gradients(loss)(*arrays)
    np.testing.assert_allclose(values, 0, atol=1e-14)
    np.testing.assert_allclose(grads[0], 0, atol=1e-6)


@every_loss("shift")
def test_adding_a_constant_to_all_channels_changes_nothing(loss):
    student, *others = loss.arrays()
    values, _ = value_and_gradients(loss)(student, *others)
    shifted, _ = value_and_gradients(loss)(student + 3.0, *others)
    np.testing.assert_allclose(shifted, values, rtol=1e-4, atol=1e-5)


@every_loss(without="ordered")
def test_order_of_the_batch_does_not_matter(loss):
    arrays = loss.arrays()
    order = np.random.default_rng(2).permutation(BATCH)
    expected, _ = value_and_gradients(loss)(*arrays)
    values, _ = value_and_gradients(loss)(*(x[order] for x in arrays))
    np.testing.assert_allclose(values, expected[order], rtol=1e-5, atol=1e-6)


@every_loss("where")
def test_masked_values_are_zero_and_get_no_gradient(loss):
    arrays = loss.arrays()
    values, _ = value_and_gradients(loss)(*arrays)
    where = jnp.asarray(np.random.default_rng(3).random(values.shape) < 0.5)

    def total(student):
        masked = loss.function(student, *arrays[1:], where=where)
        return jnp.sum(masked), masked

    gradient, masked = jax.jit(jax.grad(total, has_aux=True))(arrays[0])
    np.testing.assert_array_equal(masked, jnp.where(where, masked, 0.0))
    np.testing.assert_allclose(masked[where], values[where], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(gradient[~where], 0)


@every_loss("where")
def test_empty_mask_gives_zero(loss):
    arrays = loss.arrays()
    nothing = jnp.zeros(value_and_gradients(loss)(*arrays)[0].shape, bool)
    np.testing.assert_array_equal(loss.function(*arrays, where=nothing), 0)


@every_loss()
def test_bfloat16_is_close_to_float32(loss):
    def rounded(x, dtype):
        return x.astype(jnp.bfloat16).astype(dtype) if x.dtype == jnp.float32 else x

    arrays = loss.arrays()
    values = jax.jit(loss.function)(*(rounded(x, jnp.bfloat16) for x in arrays))
    expected, _ = value_and_gradients(loss)(*(rounded(x, jnp.float32) for x in arrays))
    assert values.dtype == jnp.float32
    # Only a resized map is rounded again.
    np.testing.assert_allclose(values, expected, rtol=0.02, atol=0.01)


@every_loss()
@pytest.mark.parametrize("scale", [1e4, 0.0])
def test_extreme_inputs_give_finite_values_and_gradients(loss, scale):
    arrays = [
        jnp.sign(x) * scale if x.dtype == jnp.float32 else x for x in loss.arrays()
    ]
    values, grads = value_and_gradients(loss)(*arrays)
    assert jnp.all(jnp.isfinite(values))
    assert jnp.all(jnp.isfinite(grads[0]))


CLASS_LOGITS = ("logits", "teacher")


@pytest.mark.parametrize(
    "loss",
    [
        loss
        for loss in LOSSES
        if loss.inputs.split()[0] == "logits" and not loss.has("all_classes")
    ],
    ids=lambda loss: loss.name,
)
def test_a_class_masked_by_minus_infinity_gives_finite_values_and_gradients(loss):
    """The last class is impossible for student and teachers, and no label."""
    arrays = []
    for name, x in zip(loss.inputs.split(), loss.arrays(), strict=True):
        if name.startswith(CLASS_LOGITS) and x.dtype == jnp.float32 and x.ndim == 2:
            x = x.at[:, -1].set(-jnp.inf)
        elif x.dtype == jnp.int32:
            x = jnp.minimum(x, 3)
        arrays.append(x)
    values, grads = value_and_gradients(loss)(*arrays)
    assert jnp.all(jnp.isfinite(values))
    assert jnp.all(jnp.isfinite(grads[0][:, :-1]))
    assert not jnp.any(jnp.isnan(grads[0]))


@every_loss()
def test_batch_of_one_is_the_first_of_many(loss):
    arrays = loss.arrays()
    one = jax.jit(loss.function)(*(x[:1] for x in arrays))
    assert jnp.all(jnp.isfinite(one))
    if not loss.has("coupled"):
        values, _ = value_and_gradients(loss)(*arrays)
        np.testing.assert_allclose(one, values[:1], rtol=1e-5, atol=1e-6)


@every_loss()
def test_jit_equals_no_jit(loss):
    arrays = loss.arrays()
    expected, _ = value_and_gradients(loss)(*arrays)
    values = loss.function(*arrays)
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)


@every_loss()
def test_eight_devices_equal_one(loss):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    arrays = loss.arrays()
    expected = value_and_gradients(loss)(*arrays)
    got = value_and_gradients(loss)(*jax.device_put(arrays, sharding))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        got,
        expected,
    )
