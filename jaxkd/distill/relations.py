"""Methods that compare how the examples of a batch lie to each other.

All of them read the whole global batch, whatever the number of devices; with gradient
accumulation each micro-batch is a batch of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Literal

import jax

from jaxkd import losses
from jaxkd.distill.embeddings import embed_both, init_heads
from jaxkd.distill.method import (
    Inputs,
    Memory,
    Method,
    Params,
    Scheduled,
    Specs,
    Terms,
    no_state,
)
from jaxkd.distill.registry import register
from jaxkd.distill.taps import last_stage, pooled
from jaxkd.layers import NetworkSpec
from jaxkd.losses.checks import check_positive

Relation = Callable[[jax.Array, jax.Array], jax.Array]


def check_batch(method: str, specs: Specs) -> None:
    """Checks that a step has examples to relate.

    Raises:
      ValueError: the batch has one.
    """
    if specs.data.batch_size < 2:
        raise ValueError(
            f"method {method!r} relates the examples of a batch; batch_size must be "
            f">= 2, got {specs.data.batch_size}"
        )


@register()
def sp(
    *,
    factor: Scheduled = 3000.0,
    student_tap: str | None = None,
    teacher_tap: str | None = None,
) -> Method:
    """Which examples of a batch look alike (Tung and Mori, 2019).

    The similarity matrices of the batch, with rows of unit length, are brought
    together:

        factor * sum (G_t - G_s)^2 / b^2,    G = l2(F F^T) row by row

    Needs: the last stage's map of both networks, flattened; sizes and channels may
    differ, so there is no adapter. The batch must have two examples.

    Cost: a product `[b, d] x [d, b]` on each side.

    Pitfalls: the similarity of maps whose values are all positive (behind a ReLU) is
    high for every pair, which leaves small differences; the large factor belongs to it.

    Paper and code: the benchmarks' code normalises rows, as here; an earlier form in
    the literature divides by the norm of the whole matrix.

    Published: CIFAR-100, 240 epochs: 72.94 for ResNet-8x4 from ResNet-32x4 (alone
    72.50, teacher 79.42), 69.67 for ResNet-20 from ResNet-56 (alone 69.06, teacher
    72.34); table of the CRD authors' benchmark.

    Args:
      factor: of the loss; a number or a schedule.
      student_tap: tap of the student; its last stage by default.
      teacher_tap: tap of the teacher; its last stage by default.

    Raises:
      ValueError: `factor` is not positive.

    Reference:
      Tung, Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019.
    """
    check_positive("factor", factor)

    return _relating(
        "sp",
        {"sp": losses.sp},
        {"sp": factor},
        place=last_stage,
        student_tap=student_tap,
        teacher_tap=teacher_tap,
    )


@register()
def cc(
    *,
    factor: Scheduled | None = None,
    variant: Literal["consecutive", "rbf"] = "consecutive",
    dim: int = 128,
    gamma: float = 0.4,
    student_tap: str | None = None,
    teacher_tap: str | None = None,
) -> Method:
    """How examples of a batch correlate (Peng et al., 2019).

    Two losses go by this name. "consecutive" multiplies the embedding errors of
    neighbours in the batch, "rbf" compares the correlations of all pairs under a
    Gaussian kernel (its Taylor series up to the second order):

        consecutive:  factor * mean_i sum_k |s - e|_ik |s - e|_(i+1)k
        rbf:          factor * mean_ij (C_t - C_s)_ij^2

    Needs: the pooled vector of both networks. "consecutive" trains a dense layer of
    `dim` outputs on each side, "rbf" compares the vectors themselves. The batch must
    have two examples.

    Cost: two small dense layers, or a product `[b, d] x [d, b]` on each side.

    Pitfalls: both heads of "consecutive" are trained, so the loss can also fall because
    the embeddings shrink; it depends on the order of the batch.

    Paper and code: the paper describes "rbf"; the loss behind the published tables is
    "consecutive", which the default follows.

    Published: CIFAR-100, 240 epochs, "consecutive": 72.97 for ResNet-8x4 from
    ResNet-32x4 (alone 72.50, teacher 79.42), 69.63 for ResNet-20 from ResNet-56 (alone
    69.06, teacher 72.34); table of the CRD authors' benchmark.

    Args:
      factor: of the loss; a number or a schedule. 0.02 for "consecutive"; "rbf", whose
        values are much smaller, has no published one.
      variant: which of the two.
      dim: width of the embeddings of "consecutive".
      gamma: inverse squared width of the kernel of "rbf".
      student_tap: a vector of the student; "pooled" by default.
      teacher_tap: a vector of the teacher; "pooled" by default.

    Raises:
      ValueError: an option is not positive, or "rbf" has no `factor`.

    Reference:
      Peng et al., "Correlation Congruence for Knowledge Distillation", ICCV 2019.
    """
    check_positive("dim", dim)
    check_positive("gamma", gamma)
    if factor is None:
        if variant == "rbf":
            raise ValueError("set factor for variant 'rbf': no value is published")
        factor = 0.02
    check_positive("factor", factor)
    taps = {"student_tap": student_tap, "teacher_tap": teacher_tap}
    if variant == "rbf":
        loss = functools.partial(losses.cc_rbf, gamma=gamma)
        return _relating("cc", {"cc": loss}, {"cc": factor}, place=pooled, **taps)

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        check_batch("cc", specs)
        return init_heads(key, specs, dim, **taps), {}

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        embeddings = embed_both(params, inputs.student, inputs.teacher, **taps)
        return {"cc": losses.cc(*embeddings)}, memory

    return Method(init=init, terms=terms, weights={"cc": factor}, num_teachers=1)


@register()
def rkd(
    *,
    distance: Scheduled = 25.0,
    angle: Scheduled = 50.0,
    eps: float = 1e-12,
    student_tap: str | None = None,
    teacher_tap: str | None = None,
) -> Method:
    """Distances and angles between the examples of a batch (Park et al., 2019).

    Distances are measured in units of their mean, angles by their cosines, and errors
    by the Huber loss:

        distance * mean_ij huber(d_s - d_t) + angle * mean_ijk huber(cos_s - cos_t)

    Needs: the pooled vector of both networks, of any widths; no adapter. The batch must
    have two examples, and three for an angle to say anything.

    Cost: `b^2 (b + d)` numbers on each side, so it grows with the cube of the batch:
    small at 64, gigabytes at 1024.

    Pitfalls: a student that maps two examples to one point gets no gradient from their
    distance.

    Published: CIFAR-100, 240 epochs: 71.90 for ResNet-8x4 from ResNet-32x4 (alone
    72.50, teacher 79.42), 69.61 for ResNet-20 from ResNet-56 (alone 69.06, teacher
    72.34); table of the CRD authors' benchmark.

    Args:
      distance: factor of the distances; a number or a schedule.
      angle: factor of the angles; a number or a schedule.
      eps: lower bound of squared distances.
      student_tap: a vector of the student; "pooled" by default.
      teacher_tap: a vector of the teacher; "pooled" by default.

    Raises:
      ValueError: `eps` is not positive.

    Reference:
      Park et al., "Relational Knowledge Distillation", CVPR 2019.
    """
    check_positive("eps", eps)
    return _relating(
        "rkd",
        {
            "distance": functools.partial(losses.rkd_distance, eps=eps),
            "angle": losses.rkd_angle,
        },
        {"distance": distance, "angle": angle},
        place=pooled,
        student_tap=student_tap,
        teacher_tap=teacher_tap,
    )


@register()
def pkt(
    *,
    factor: Scheduled = 30000.0,
    eps: float = 1e-7,
    student_tap: str | None = None,
    teacher_tap: str | None = None,
) -> Method:
    """Which neighbours an example would choose in the batch (Passalis and Tefas, 2018).

    Cosines with the batch, brought to a probability over neighbours, are compared as
    distributions:

        factor * mean_ij p_t log(p_t / p_s),    p_ij = (1 + cos_ij) / sum_k (1 + cos_ik)

    Needs: the pooled vector of both networks, of any widths; no adapter. The batch must
    have two examples.

    Cost: a product `[b, d] x [d, b]` on each side.

    Pitfalls: the mean is over all pairs, so the value falls with the square of the
    batch; the factor is for batches of 64.

    Published: CIFAR-100, 240 epochs: 73.64 for ResNet-8x4 from ResNet-32x4 (alone
    72.50, teacher 79.42), 70.34 for ResNet-20 from ResNet-56 (alone 69.06, teacher
    72.34); table of the CRD authors' benchmark.

    Args:
      factor: of the loss; a number or a schedule.
      eps: added to probabilities and norms.
      student_tap: a vector of the student; "pooled" by default.
      teacher_tap: a vector of the teacher; "pooled" by default.

    Raises:
      ValueError: `factor` or `eps` is not positive.

    Reference:
      Passalis, Tefas, "Learning Deep Representations with Probabilistic Knowledge
      Transfer", ECCV 2018.
    """
    check_positive("factor", factor)
    check_positive("eps", eps)
    return _relating(
        "pkt",
        {"pkt": functools.partial(losses.pkt, eps=eps)},
        {"pkt": factor},
        place=pooled,
        student_tap=student_tap,
        teacher_tap=teacher_tap,
    )


def _relating(
    method: str,
    relations: Mapping[str, Relation],
    weights: Mapping[str, Scheduled],
    *,
    place: Callable[..., str],
    student_tap: str | None,
    teacher_tap: str | None,
) -> Method:
    """A method without state that relates one tap of each network."""

    def taps(student: NetworkSpec, teacher: NetworkSpec) -> tuple[str, str]:
        return (
            place(student, student_tap, option="student_tap"),
            place(teacher, teacher_tap, option="teacher_tap"),
        )

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        check_batch(method, specs)
        taps(specs.student, specs.teacher)
        return no_state(key, specs)

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        del params
        student_name, teacher_name = taps(
            NetworkSpec.from_outputs("student", inputs.student),
            NetworkSpec.from_outputs("teacher", inputs.teacher),
        )
        student = inputs.student.taps[student_name]
        teacher = inputs.teacher.taps[teacher_name]
        return {k: loss(student, teacher) for k, loss in relations.items()}, memory

    return Method(init=init, terms=terms, weights=dict(weights), num_teachers=1)
