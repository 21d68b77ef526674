"""Methods that carry student features to the teacher's shape and compare them there."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxkd import losses
from jaxkd.distill.adapters import Adapter, adapter
from jaxkd.distill.checks import feature_map
from jaxkd.distill.method import (
    Inputs,
    Memory,
    Method,
    Params,
    Scheduled,
    Specs,
    Terms,
)
from jaxkd.distill.modules import apply_module, init_module
from jaxkd.distill.registry import register
from jaxkd.distill.taps import Networks, last_stage, networks, stage_pairs
from jaxkd.layers.connectors import HintRegressor, VariationalRegressor, shrink_to
from jaxkd.losses.checks import check_positive


@register()
def hint(
    *,
    student_tap: str | None = None,
    teacher_tap: str | None = None,
    factor: Scheduled = 1.0,
    always_project: bool = False,
) -> Method:
    """A tap of the student imitates a tap of the teacher, whatever their shapes.

    The plain form of feature distillation: what is needed to make the two comparable
    is chosen from their shapes, and the rest is a mean squared difference.

        mean (A(student) - teacher)^2

    Needs: two taps that are both vectors, or each a map or a sequence of tokens. `A` is
    a dense layer (vectors) or a 1x1 convolution where channels differ, with average
    pooling where the student's map is larger and bilinear resizing where it is smaller;
    class tokens are dropped and the other tokens laid on their square grid.

    Cost: one matrix product per example or pixel.

    Pitfalls: `A` is linear and has no norm, so the scale of the teacher's features sets
    that of the loss; choose `factor` with it in mind.

    Args:
      student_tap: tap of the student; None takes its last stage.
      teacher_tap: tap of the teacher; None takes its last stage.
      factor: weight of the term.
      always_project: learn `A` even where the channels agree.

    Reference:
      Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015.
    """

    def plan(found: Specs | Networks) -> tuple[str, str, Adapter]:
        source = last_stage(found.student, student_tap, option="student_tap")
        goal = last_stage(found.teacher, teacher_tap, option="teacher_tap")
        return (
            source,
            goal,
            adapter(
                found.student,
                source,
                found.teacher,
                goal,
                always_project=always_project,
            ),
        )

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        source, _, chosen = plan(specs)
        return init_module(chosen.module, key, specs.student.tap(source))

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        source, goal, chosen = plan(networks(inputs))
        matched, memory = apply_module(
            chosen.module, params, memory, inputs.student.taps[source], train=True
        )
        target = chosen.target(inputs.teacher.taps[goal])
        return {"hint": losses.hint(matched, target)}, memory

    return Method(init=init, terms=terms, weights={"hint": factor}, num_teachers=1)


@register()
def fitnet(
    *,
    student_tap: str = "stage2",
    teacher_tap: str = "stage2",
    factor: Scheduled = 100.0,
) -> Method:
    """A middle layer of the student regresses one of the teacher (Romero et al., 2015).

    A regressor `R`, trained with the student, leads from the student's map to the
    teacher's channels and size.

        mean (R(student) - teacher)^2        R = convolution, batch norm, ReLU

    The usual recipe is `weighted({"ce": 1.0, "fitnet": 1.0})`.

    Needs: one map of each network. The convolution of `R` is 1x1 for equal sizes, 3x3
    with stride 2 where the student's map is twice as large, transposed 4x4 with stride
    2 where it is half as large, and otherwise unpadded with a kernel of
    `1 + student - teacher` pixels; a student's map that is smaller in another ratio is
    an error.

    Cost: one convolution and norm on the student's map. For sizes far apart the
    unpadded kernel is large: 25x25 from 32 to 8 pixels.

    Pitfalls: `R` ends in a ReLU, so the teacher's tap should follow one.

    Paper and code: the paper trains the student up to the hint first and then the whole
    network with KD; reference code, and this method, add the hint to one training. For
    the paper's order use two stages.

    Published: CIFAR-100, 240 epochs: 69.21 for ResNet-20 from ResNet-56 (alone 69.06,
    teacher 72.34), 73.50 for ResNet-8x4 from ResNet-32x4 (alone 72.50, teacher 79.42);
    table of the CRD authors' benchmark.

    Args:
      student_tap: tap of the student.
      teacher_tap: tap of the teacher.
      factor: weight of the term.

    Reference:
      Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015.
    """

    def regressor(found: Specs | Networks) -> HintRegressor:
        height, width, channels = feature_map(found.teacher, teacher_tap)
        return HintRegressor(channels, (height, width))

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        shape = feature_map(specs.student, student_tap)
        module = regressor(specs)
        if not module.fits(shape[:2], module.size):
            raise ValueError(
                f"tap {student_tap!r} of network {specs.student.name!r} has shape "
                f"{shape} and tap {teacher_tap!r} of network {specs.teacher.name!r} "
                f"{specs.teacher.tap(teacher_tap)}: the regressor enlarges maps by two "
                f"only; choose other taps, or the method 'hint'"
            )
        return init_module(module, key, shape)

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        regressed, memory = apply_module(
            regressor(networks(inputs)),
            params,
            memory,
            inputs.student.taps[student_tap],
            train=True,
        )
        value = losses.hint(regressed, inputs.teacher.taps[teacher_tap])
        return {"fitnet": value}, memory

    return Method(init=init, terms=terms, weights={"fitnet": factor}, num_teachers=1)


@register()
def vid(
    *,
    student_taps: tuple[str, ...] | None = None,
    teacher_taps: tuple[str, ...] | None = None,
    factor: Scheduled = 1.0,
    initial_variance: float = 5.0,
    epsilon: float = 1e-5,
    train_variance: bool = True,
) -> Method:
    """The student predicts the distribution of teacher features (Ahn et al., 2019).

    Maximises a variational lower bound on the mutual information of the two networks'
    features: a Gaussian whose mean `m` is computed from the student's map by three 1x1
    convolutions and whose variance `v` is learned per channel.

        sum over stages of mean 1/2 * ((m - teacher)^2 / v + log v)

    The usual recipe is `weighted({"ce": 1.0, "vid": 1.0})`.

    Needs: as many maps of the student as of the teacher, by default all stages. Where
    sizes differ the larger map is average-pooled.

    Cost: three 1x1 convolutions in the teacher's width per stage.

    Pitfalls: the loss is a log-likelihood and may be negative; its constant is left
    out. As variances fall the gradient grows, which acts like a rising weight.

    Paper and code: the paper trains the variances, and so does this method. A widely
    used re-implementation, and hence some published tables, keeps them at their initial
    value because the optimiser never sees them; `train_variance=False` repeats that.

    Published: CIFAR-100, 240 epochs: 70.38 for ResNet-20 from ResNet-56 (alone 69.06,
    teacher 72.34), 73.09 for ResNet-8x4 from ResNet-32x4 (alone 72.50, teacher 79.42);
    table of the CRD authors' benchmark.

    Args:
      student_taps: taps of the student; None takes its stages.
      teacher_taps: taps of the teacher; None takes its stages.
      factor: weight of the term.
      initial_variance: of every channel.
      epsilon: lower bound of the variances.
      train_variance: whether variances are trained.

    Raises:
      ValueError: `epsilon` is not positive or `initial_variance` not above it.

    Reference:
      Ahn et al., "Variational Information Distillation for Knowledge Transfer", CVPR
      2019.
    """
    check_positive("epsilon", epsilon)
    if not initial_variance > epsilon:
        raise ValueError(
            f"initial_variance must be above epsilon {epsilon}, got {initial_variance}"
        )

    def regressor(features: int) -> VariationalRegressor:
        return VariationalRegressor(features, initial_variance, epsilon, train_variance)

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        params, memory = {}, {}
        pairs = stage_pairs(specs, student_taps, teacher_taps)
        for i, (source, goal) in enumerate(pairs):
            shape = feature_map(specs.student, source)
            channels = feature_map(specs.teacher, goal)[-1]
            params[f"pair{i}"], memory[f"pair{i}"] = init_module(
                regressor(channels), jax.random.fold_in(key, i), shape
            )
        return params, memory

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        values, new_memory = [], {}
        pairs = stage_pairs(networks(inputs), student_taps, teacher_taps)
        for i, (source, goal) in enumerate(pairs):
            student, teacher = inputs.student.taps[source], inputs.teacher.taps[goal]
            student, teacher = _common_size(student, teacher)
            (mean, log_scale), new_memory[f"pair{i}"] = apply_module(
                regressor(teacher.shape[-1]),
                params[f"pair{i}"],
                memory[f"pair{i}"],
                student,
                train=True,
            )
            values.append(losses.vid(mean, teacher, log_scale, epsilon=epsilon))
        return {"vid": jnp.sum(jnp.stack(values), axis=0)}, new_memory

    return Method(init=init, terms=terms, weights={"vid": factor}, num_teachers=1)


def _common_size(student: jax.Array, teacher: jax.Array) -> tuple[jax.Array, jax.Array]:
    return (
        shrink_to(student, teacher.shape[1:3]),
        shrink_to(teacher, student.shape[1:3]),
    )
