"""How much memory losses of large logits take, by the compiler's own account.

Programs are compiled for the CPU and never run, so the shapes may be large; they are
multiplied by the number of simulated devices, over which blocks take a batch to be
spread. XLA for GPUs and TPUs fuses more than XLA for CPUs.
"""

import functools
import math

import jax
import jax.numpy as jnp
import pytest

from jaxkd import losses

EXAMPLES = (8 * 256, 21841)
PIXELS = (8 * 4, 512, 512, 21)


def temporary(function, *args):
    """Bytes that the compiled program needs beside its arguments and results."""
    compiled = jax.jit(function).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def logits(shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def in_units_of_logits(loss, kinds, shape, dtype):
    """Temporary memory of a loss and its gradient, in units of the logits."""
    others = {
        "teacher": logits(shape, dtype),
        "label": jax.ShapeDtypeStruct(shape[:-1], jnp.int32),
    }

    def total(student, *rest):
        return jnp.mean(loss(student, *rest))

    args = logits(shape, dtype), *(others[kind] for kind in kinds.split())
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    return temporary(jax.value_and_grad(total), *args) / size


smoothed = functools.partial(losses.cross_entropy, label_smoothing=0.1)


@pytest.mark.parametrize("shape", [EXAMPLES, PIXELS], ids=["examples", "pixels"])
@pytest.mark.parametrize(
    ("loss", "kinds", "bound"),
    [
        # What differentiation would keep is given beside: it takes up to 6 of them.
        pytest.param(losses.cross_entropy, "label", 0.3, id="cross_entropy"),
        pytest.param(losses.focal, "label", 0.4, id="focal"),  # 2.5
        pytest.param(smoothed, "label", 1.4, id="smoothed"),  # 3
        pytest.param(losses.kd, "teacher", 1.4, id="kd"),  # 4
        pytest.param(losses.kd_cross_entropy, "teacher", 1.4, id="kd_ce"),  # 3
        pytest.param(losses.dkd, "teacher label", 1.7, id="dkd"),  # 6
        pytest.param(losses.nkd, "teacher label", 1.6, id="nkd"),  # 6
        pytest.param(losses.wsld, "teacher label", 1.5, id="wsld"),  # 5
    ],
)
def test_a_loss_takes_little_more_than_its_gradient(loss, kinds, bound, shape):
    assert in_units_of_logits(loss, kinds, shape, jnp.float32) < bound


@pytest.mark.parametrize("shape", [EXAMPLES, PIXELS], ids=["examples", "pixels"])
@pytest.mark.parametrize(
    ("loss", "kinds", "bound"),
    [
        # In units of bfloat16: plain, 4.7 and 8.
        pytest.param(losses.cross_entropy, "label", 1.6, id="cross_entropy"),
        pytest.param(losses.kd, "teacher", 2.8, id="kd"),
    ],
)
def test_narrow_logits_are_not_widened_as_a_whole(loss, kinds, bound, shape):
    assert in_units_of_logits(loss, kinds, shape, jnp.bfloat16) < bound


@pytest.mark.parametrize(
    ("loss", "bound"),
    [
        pytest.param(losses.dice, 1.4, id="dice"),  # plain 3
        pytest.param(losses.prediction_map_distillation, 1.4, id="pmd"),  # plain 3
    ],
)
def test_dense_losses_take_little_more_than_their_gradient(loss, bound):
    kinds = "label" if loss is losses.dice else "teacher"
    assert in_units_of_logits(loss, kinds, PIXELS, jnp.float32) < bound


def test_distillation_adds_little_to_a_step():
    """Logits of student and teacher must exist, and the gradient of the student's."""
    batch, classes = EXAMPLES
    width = 64
    whole = losses.softened_kl.__wrapped__

    def used(loss):
        def total(kernel, features, teacher_kernel):
            teacher = jax.lax.stop_gradient(features @ teacher_kernel)
            return jnp.mean(loss(features @ kernel, teacher))

        kernel = logits((width, classes))
        args = kernel, logits((batch, width)), kernel
        return temporary(jax.value_and_grad(total, (0, 1)), *args)

    unit = 4 * batch * classes
    assert used(losses.kd) < 3.5 * unit < 4.9 * unit < used(whole)


def test_evaluating_a_loss_keeps_no_array_of_the_size_of_the_logits():
    student = teacher = logits(EXAMPLES)
    used = temporary(lambda s, t: jnp.mean(losses.kd(s, t)), student, teacher)
    assert used < 0.4 * 4 * math.prod(EXAMPLES)
