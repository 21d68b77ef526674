"""A method from a plain loss function, yours or one of `jaxkd.losses`.

A config names it as `{"loss": "package.module:function"}`; nothing of jaxkd has to know
it. For adapters, memory or several terms write a function that returns a `Method`
instead, and name it as `{"name": "package.module:function"}`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxkd.distill.checks import check_same_logits
from jaxkd.distill.method import Inputs, Memory, Method, Params, Specs, Terms, no_state
from jaxkd.layers import Outputs
from jaxkd.registry import check_options, load_reference

_SIDES = ("student", "teacher", "labels", "targets")


def from_loss(
    part: str,
    *,
    loss: str | Callable[..., Any],
    student_tap: str | None = None,
    teacher_tap: str | None = None,
    **options: Any,
) -> Method:
    """Makes a method of a loss function.

    The function's parameters say what it reads: `student`, `teacher` (the logits, or
    the taps named here), `labels` (class indices) and `targets` (soft labels where
    images are mixed, else class indices). It returns one value per example (or pixel);
    the train step averages them.

    Args:
      part: name of the part, and of its term.
      loss: the function, or `"package.module:function"`.
      student_tap: the student's tap instead of its logits.
      teacher_tap: the teacher's.
      **options: keyword arguments of the function; numbers may be schedules.

    Raises:
      ImportError: the module cannot be imported.
      TypeError: a parameter that is none of these, or an option that does not fit.
      ValueError: the module has no such function.

    >>> method = from_loss("soft", loss="jaxkd.losses:kd", temperature=2.0)
    >>> method.num_teachers
    1
    """
    function = load_reference(loss) if isinstance(loss, str) else loss
    reads = _reads(function, options)
    fixed = {k: v for k, v in options.items() if not callable(v)}
    scheduled: dict[str, Any] = {k: v for k, v in options.items() if callable(v)}
    name = loss if isinstance(loss, str) else getattr(loss, "__name__", part)
    check_options(function, fixed, f"{name!r}", elsewhere=[*reads, *scheduled])
    sides = {"student": student_tap, "teacher": teacher_tap}
    for side, tap in sides.items():
        if tap is not None and side not in reads:
            raise TypeError(f"{name!r} does not read the {side}; leave {side}_tap out")

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        if student_tap is not None:
            specs.student.tap(student_tap)
        if "teacher" in reads:
            if teacher_tap is not None:
                specs.teacher.tap(teacher_tap)
            if student_tap is None and teacher_tap is None:
                check_same_logits(specs.student, specs.teacher)
        return no_state(key, specs)

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        del params
        arrays = {
            "student": lambda: _read(inputs.student, student_tap),
            "teacher": lambda: jax.lax.stop_gradient(
                _read(inputs.teacher, teacher_tap)
            ),
            "labels": lambda: inputs.labels,
            "targets": lambda: inputs.targets,
        }
        now = {k: inputs.at(v) for k, v in scheduled.items()}
        given = {name: arrays[name]() for name in reads}
        value = function(**given, **fixed, **now)
        return {part: jnp.asarray(value, jnp.float32)}, memory

    return Method(
        init=init,
        terms=terms,
        weights={part: 1.0},
        num_teachers=int("teacher" in reads),
    )


def _reads(function: Callable[..., Any], options: dict[str, Any]) -> list[str]:
    """The arrays that a loss reads, in the order of its parameters."""
    reads = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name in options or parameter.kind == parameter.VAR_KEYWORD:
            continue
        by_name = parameter.kind not in (
            parameter.POSITIONAL_ONLY,
            parameter.VAR_POSITIONAL,
        )
        if name in _SIDES and by_name:
            reads.append(name)
        elif parameter.default is parameter.empty:
            raise TypeError(
                f"parameter {name!r} of {getattr(function, '__name__', function)!r} is "
                f"neither an option nor one of {', '.join(_SIDES)}, given by name"
            )
    if "student" not in reads:
        raise TypeError(
            f"{getattr(function, '__name__', function)!r} must have a parameter "
            "'student'"
        )
    return reads


def _read(outputs: Outputs, tap: str | None) -> jax.Array:
    return outputs.logits if tap is None else outputs.taps[tap]
