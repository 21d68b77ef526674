"""Row-wise losses in blocks: the same numbers and derivatives as at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxkd import losses
from jaxkd.losses import blocks
from jaxkd.losses.blocks import rowwise


@pytest.fixture
def always(monkeypatch):
    """Evaluates logits of any size in blocks."""
    monkeypatch.setattr(blocks, "MIN_SIZE", 0)


def array(seed, shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * 2, dtype)


def labels(shape, classes):
    return jnp.asarray(np.random.default_rng(9).integers(0, classes, shape[:-1]))


LOSSES = {
    "soft_cross_entropy": (losses.soft_cross_entropy, "probabilities"),
    "smoothed": (functools.partial(losses.cross_entropy, label_smoothing=0.1), "label"),
    "softened_kl": (losses.softened_kl, "teacher"),
    "kd": (losses.kd, "teacher"),
    "kd_cross_entropy": (losses.kd_cross_entropy, "teacher"),
    "wsld": (losses.wsld, "teacher label"),
    "dkd": (losses.dkd, "teacher label"),
    "dkd_target": (losses.dkd_target, "teacher label"),
    "dkd_nontarget": (losses.dkd_nontarget, "teacher label"),
    "nkd": (losses.nkd, "teacher label"),
    "nkd_target": (losses.nkd_target, "teacher label"),
    "nkd_nontarget": (losses.nkd_nontarget, "teacher label"),
    "dist_inter": (losses.dist_inter, "teacher"),
    "tfkd_regularization": (losses.tfkd_regularization, "label"),
    "uskd_nontarget": (losses.uskd_nontarget, "teacher label"),
    "pskd": (functools.partial(losses.pskd, alpha=0.3), "probabilities label"),
}
ONLY_EXAMPLES = ("tfkd_regularization", "uskd_nontarget", "pskd")
SHAPES = {"examples": (32, 5), "pixels": (2, 16, 3, 4)}


def inputs(kinds, shape, dtype=jnp.float32):
    makers = {
        "teacher": lambda: array(1, shape, dtype),
        "probabilities": lambda: jax.nn.softmax(array(1, shape, dtype)),
        "label": lambda: labels(shape, shape[-1]),
    }
    return (array(0, shape, dtype), *(makers[kind]() for kind in kinds.split()))


def value_and_gradient(loss):
    """Jitted anew: what is traced depends on the size from which there are blocks."""

    def total(student, *others):
        values = loss(student, *others)
        weights = jnp.linspace(0.5, 1.5, values.size).reshape(values.shape)
        return jnp.sum(weights * values), values

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def loops(function, *args):
    return str(jax.make_jaxpr(function)(*args)).count("scan[")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in LOSSES
        for kind in SHAPES
        if kind == "examples" or name not in ONLY_EXAMPLES
    ],
)
def test_blocks_give_the_values_and_gradients_of_the_whole(name, kind, monkeypatch):
    loss, kinds = LOSSES[name]
    arrays = inputs(kinds, SHAPES[kind])
    (_, expected), gradient = value_and_gradient(loss)(*arrays)
    monkeypatch.setattr(blocks, "MIN_SIZE", 0)
    run = value_and_gradient(lambda *x: loss(*x))
    assert loops(run, *arrays) >= 1  # losses inside of losses are divided again
    (_, values), blocked = run(*arrays)
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(blocked, gradient, rtol=1e-4, atol=1e-6)


def cubes(logits, teacher, *, factor=1.0, where=None):
    """A loss with derivatives of every order in every argument."""
    values = factor * jnp.sum(jnp.tanh(logits) ** 3 * teacher**2, axis=-1)
    return values if where is None else jnp.where(where, values, 0.0)


def test_forward_mode_gives_what_it_gives_without_blocks(always):
    x, t = inputs("teacher", (32, 5))
    dx, dt = array(3, x.shape), array(4, t.shape)
    expected = jax.jvp(cubes, (x, t), (dx, dt))
    got = jax.jit(lambda *a: jax.jvp(rowwise(cubes), a[:2], a[2:]))(x, t, dx, dt)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
def test_second_derivatives_are_exact(outer, always):
    x, t = inputs("teacher", (8, 3))

    def total(loss):
        return lambda a, b: jnp.sum(loss(a, b) ** 2)

    expected = outer(jax.grad(total(cubes), (0, 1)), (0, 1))(x, t)
    got = jax.jit(outer(jax.grad(total(rowwise(cubes)), (0, 1)), (0, 1)))(x, t)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        got,
        expected,
    )


def test_third_derivatives_are_exact(always):
    x, t = inputs("teacher", (8, 3))

    def along(loss):
        def at(s):
            return jnp.sum(loss(x + s * t, t))

        return jax.grad(jax.grad(jax.grad(at)))(0.3)

    assert float(jax.jit(lambda: along(rowwise(cubes)))()) == pytest.approx(
        float(along(cubes)), rel=1e-3
    )


def test_scalars_may_be_traced_and_differentiated(always):
    x, t = inputs("teacher", (32, 5))

    def total(loss):
        return lambda factor, a: jnp.sum(loss(a, t, factor=factor))

    expected = jax.value_and_grad(total(cubes), (0, 1))(0.7, x)
    got = jax.jit(jax.value_and_grad(total(rowwise(cubes)), (0, 1)))(0.7, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, expected
    )
    # Where only the logits are differentiated, a traced scalar keeps the blocks.
    assert loops(jax.grad(total(rowwise(cubes)), 1), 0.7, x) == 1


@pytest.mark.parametrize("kind", ["rows", "classes"])
def test_masks_are_divided_with_the_rows(kind, always):
    x, t = inputs("teacher", (32, 5))
    shape = x.shape[: 1 if kind == "rows" else 2]
    where = jnp.asarray(np.random.default_rng(5).random(shape) < 0.6)
    where = where if kind == "rows" else where.at[:, 0].set(True)
    expected = losses.kd(x, t, where=where)
    got = jax.jit(lambda x, t, w: losses.kd(x, t, where=w))(x, t, where)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_arguments_may_come_by_name_and_none_may_be_left_out(always):
    x, t = inputs("teacher", (32, 5))
    named = jax.jit(lambda x, t: losses.kd(teacher=t, student=x, temperature=2.0))
    assert loops(named, x, t) == 1
    np.testing.assert_allclose(
        named(x, t), losses.kd(x, t, temperature=2.0), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(TypeError, match="teacher"):
        jax.jit(losses.softened_kl)(x)


def test_the_loss_itself_says_what_does_not_fit(always):
    x, _ = inputs("teacher", (32, 5))
    with pytest.raises(ValueError, match="4 classes and student logits"):
        jax.jit(losses.kd)(x, jnp.zeros((32, 4)))
    with pytest.raises(ValueError, match="shape"):
        jax.jit(losses.kd)(x, jnp.zeros((16, 5)))
    with pytest.raises(ValueError, match="temperature must be > 0"):
        jax.jit(lambda x: losses.kd(x, x, temperature=-1.0))(x)


def test_arguments_that_are_no_arrays_leave_the_loss_whole(always):
    @rowwise
    def several(logits, teachers):
        return jnp.sum(logits - sum(teachers), axis=-1)

    x, t = inputs("teacher", (32, 5))
    run = jax.jit(lambda x, t: several(x, [t, t]))
    assert loops(run, x, t) == 0
    np.testing.assert_allclose(run(x, t), jnp.sum(x - 2 * t, -1), rtol=1e-5)


def test_narrow_logits_keep_their_dtype_and_float32_values(always):
    x, t = inputs("teacher", (32, 5), jnp.bfloat16)
    (_, values), gradient = value_and_gradient(lambda *a: losses.kd(*a))(x, t)
    assert values.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16
    wide = x.astype(jnp.float32), t.astype(jnp.float32)
    (_, expected), exact = value_and_gradient(
        lambda s, q: losses.softened_kl.__wrapped__(s, q, temperature=4.0)
    )(*wide)
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        gradient.astype(jnp.float32), exact, rtol=0.02, atol=0.002
    )


def test_only_narrow_logits_of_an_entropy_go_in_blocks(always):
    arrays = inputs("label", (32, 5))
    assert loops(jax.jit(losses.cross_entropy), *arrays) == 0
    narrow = arrays[0].astype(jnp.bfloat16), arrays[1]
    assert loops(jax.jit(losses.cross_entropy), *narrow) == 1


def test_several_seeds_go_in_blocks_together(always):
    x, t = inputs("teacher", (3, 32, 5))

    def total(x, t):
        return jnp.sum(losses.kd(x, t))

    got = jax.jit(jax.vmap(jax.value_and_grad(total)))(x, t)
    expected = [jax.value_and_grad(total)(*pair) for pair in zip(x, t, strict=True)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        got,
        stacked,
    )


@pytest.mark.parametrize("shape", [(32, 5), (8, 16, 3, 4)])
def test_eight_simulated_devices_exchange_nothing(shape, always):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    x, t = inputs("teacher", shape)

    def gradient(x, t):
        return jax.grad(lambda x: jnp.sum(losses.kd(x, t)))(x)

    spread = jax.device_put((x, t), rows)
    compiled = jax.jit(gradient, out_shardings=rows).lower(*spread).compile()
    program = compiled.as_text()
    assert "while" in program
    assert not any(word in program for word in ("all-", "collective-", "reduce-sc"))
    np.testing.assert_allclose(
        compiled(*spread), jax.jit(gradient)(x, t), rtol=1e-5, atol=1e-6
    )


def test_small_logits_and_calls_outside_of_jit_are_evaluated_at_once():
    x, t = inputs("teacher", (32, 5))
    assert loops(jax.grad(lambda x: jnp.sum(losses.kd(x, t))), x) == 0
    assert blocks._blocks(x) is None
    large = jax.ShapeDtypeStruct((8 * 2048, 2048), jnp.float32)
    assert loops(jax.grad(lambda x: jnp.sum(losses.kd(x, x))), large) == 1


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        # Eight simulated devices: as many rows of each device in every block.
        ((128, 1), 16),
        ((256, 1), 16),
        ((144, 1), 18),
        ((24, 1), 3),
        ((8, 1), 1),
        # No even share for each device, so no rows to keep apart.
        ((100, 1), 20),
        ((257, 1), 1),
        # Stripes of maps.
        ((2, 48, 3, 4), 16),
        ((2, 10, 3, 4), 10),
        ((2, 1, 3, 4), 1),
        ((2, 197, 4), 1),
    ],
)
def test_number_of_blocks(shape, count, always):
    found = []

    def look(x):
        found.append(blocks._blocks(x))
        return x

    jax.eval_shape(look, jax.ShapeDtypeStruct(shape, jnp.float32))
    assert found[0].count == count
    assert found[0].stripes == (len(shape) > 2)
