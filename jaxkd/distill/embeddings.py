"""Linear heads that bring features to the common width of an embedding.

Methods that compare vectors of student and teacher train one for each side, because
their features differ in width. Heads are initialised as PyTorch's linear layers are.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jaxkd.distill.method import Params, Specs
from jaxkd.distill.taps import pooled
from jaxkd.layers import Outputs, bias_uniform, fan_in_uniform


def init_heads(
    key: jax.Array,
    specs: Specs,
    dim: int,
    *,
    student_tap: str | None = None,
    teacher_tap: str | None = None,
) -> dict[str, Params]:
    """Makes the heads `embed_s` and `embed_t`, each `{"kernel", "bias"}`.

    Args:
      key: random key.
      specs: the networks.
      dim: width of the embedding.
      student_tap: a vector of the student; None takes "pooled".
      teacher_tap: a vector of the teacher; None takes "pooled".

    Raises:
      KeyError: a network has no such tap.
      ValueError: a tap is no vector.
    """
    student_tap = pooled(specs.student, student_tap, option="student_tap")
    teacher_tap = pooled(specs.teacher, teacher_tap, option="teacher_tap")
    student, teacher = jax.random.split(key)
    return {
        "embed_s": _init_head(student, specs.student.tap(student_tap)[0], dim),
        "embed_t": _init_head(teacher, specs.teacher.tap(teacher_tap)[0], dim),
    }


def embed_both(
    params: Params,
    student: Outputs,
    teacher: Outputs,
    *,
    student_tap: str | None = None,
    teacher_tap: str | None = None,
) -> tuple[Float32[Array, "b dim"], Float32[Array, "b dim"]]:
    """Embeds the taps that `init_heads` was told; no gradient reaches the teacher's."""
    return (
        _embed(params["embed_s"], student.taps[student_tap or "pooled"]),
        _embed(
            params["embed_t"],
            jax.lax.stop_gradient(teacher.taps[teacher_tap or "pooled"]),
        ),
    )


def _init_head(key: jax.Array, width: int, dim: int) -> Params:
    kernel, bias = jax.random.split(key)
    return {
        "kernel": fan_in_uniform(kernel, (width, dim), jnp.float32),
        "bias": bias_uniform(width)(bias, (dim,)),
    }


def _embed(
    head: dict[str, jax.Array], features: Float[Array, "b width"]
) -> Float32[Array, "b dim"]:
    return features.astype(jnp.float32) @ head["kernel"] + head["bias"][None, :]
