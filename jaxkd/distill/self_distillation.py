"""Methods in which a network teaches itself: USKD, PS-KD, Tf-KD."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from jaxkd import losses
from jaxkd.distill.checks import check_same_logits
from jaxkd.distill.method import (
    Inputs,
    Memory,
    Method,
    Params,
    Scheduled,
    Specs,
    Terms,
    Weight,
    multiply,
    no_state,
    weight_at,
)
from jaxkd.distill.registry import register
from jaxkd.layers import NetworkSpec, bias_uniform, fan_in_uniform
from jaxkd.losses.checks import check_fraction, check_positive


@register()
def uskd(
    *,
    alpha: Scheduled = 1.0,
    beta: Scheduled = 0.1,
    mu: Scheduled = 0.005,
    rank: Literal["logprob", "prob"] = "logprob",
    student_tap: str | None = None,
) -> Method:
    """The student makes its own soft labels, ranked by a weak head (Yang et al., 2023).

    The label is smoothed by the student's confidence; the other classes share one
    more soft label by Zipf's law over their ranks, which the student and a linear head
    on an earlier stage give together.

        alpha * target + beta * nontarget + mu * weak

    Terms `target`, `nontarget` and `weak`, see the losses `uskd_target`,
    `uskd_nontarget` and `uskd_weak`; add the cross-entropy:
    `{"ce": {"weight": 1.0}, "uskd": {"weight": 1.0}}`.

    Needs: no teacher; a tap of the student for the weak head. A map is averaged over
    space, of tokens the class token (the first) is taken.

    Cost: one dense layer from the tap's channels to the classes, and two sorts over
    the classes per example.

    Pitfalls: the target part subtracts the mean over the batch, so its value depends
    on the batch; with small batches it is noisy. The weak head's loss reaches the
    student through the tap.

    Paper and code: the code ranks by the head's probabilities plus the student's
    log-probabilities, the paper by the sum of two probabilities. The default is the
    code; `rank="prob"` is the paper.

    Published: ImageNet top-1 of the authors' repository: ResNet-18 69.90 -> 70.79,
    ResNet-50 76.55 -> 77.07, MobileNetV1 69.21 -> 70.38, Swin-T 81.18 -> 81.49,
    DeiT-T 74.42 -> 74.97, all with alpha 1, beta 0.1, mu 0.005. Their CIFAR-100
    configuration of ResNet-18 has 0.1 for all three.

    Args:
      alpha: weight of the target part.
      beta: weight of the non-target part.
      mu: weight of the weak head's cross-entropy.
      rank: how the student enters the ranking.
      student_tap: where the weak head sits; None takes the last stage but one, or in a
        network whose stages are tokens, the one at half the depth.

    Raises:
      ValueError: the student has no such stage, or labels pixels.

    Reference:
      Yang, Zeng, Li, Zhang, Yuan, Li, "From Knowledge Distillation to Self-Knowledge
      Distillation: A Unified Approach with Normalized Loss and Customized Soft
      Labels", ICCV 2023.
    """

    def tap_of(student: NetworkSpec) -> str:
        if student_tap is not None:
            return student_tap
        stages = student.stages
        if len(stages) < 2:
            raise ValueError(
                f"method 'uskd' needs a stage before the last one; network "
                f"{student.name!r} has {', '.join(stages) or 'no stages'}, set "
                f"student_tap"
            )
        tokens = len(student.tap(stages[-2])) == 2
        return stages[len(stages) // 2 - 1] if tokens else stages[-2]

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        student = specs.student
        check_classifier("uskd", student)
        tap = tap_of(student)
        channels = student.tap(tap)[-1]
        kernel_key, bias_key = jax.random.split(key)
        weak = {
            "kernel": fan_in_uniform(kernel_key, (channels, student.num_classes)),
            "bias": bias_uniform(channels)(bias_key, (student.num_classes,)),
        }
        return {"weak": weak}, {}

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        student, labels = inputs.student, inputs.targets
        tap = tap_of(NetworkSpec.from_outputs("student", student))
        head = params["weak"]
        weak = _vector(student.taps[tap]) @ head["kernel"] + head["bias"][None]
        return {
            "target": losses.uskd_target(student.logits, labels),
            "nontarget": losses.uskd_nontarget(student.logits, weak, labels, rank=rank),
            "weak": losses.uskd_weak(weak, labels),
        }, memory

    weights = {"target": alpha, "nontarget": beta, "weak": mu}
    return Method(init=init, terms=terms, weights=weights)


@register()
def pskd(*, alpha: float = 0.8, records: int | None = None) -> Method:
    """Labels softened by the student's own past predictions (Kim et al., 2021).

    The student's probabilities for every training record are kept from the epoch
    before, and trusted more and more:

        CE((1 - a) y + a p_past, student),    a = alpha (epoch + 1) / epochs

    The cross-entropy with the label is inside: use it without `ce`.

    Needs: no teacher; memory for `records x classes` float32 (CIFAR-100: 20 MB,
    ImageNet: 5 GB over all devices) and `batch["index"]`.

    Cost: one row of the memory read and one written per example.

    Pitfalls: the past prediction is of that epoch's augmented view. With mixed images
    it is of the mixed image, which is not what the record shows now. A record that
    was not seen yet (the first epoch, or left out of it because it filled no batch)
    has its label instead.

    Published: CIFAR-100 error of the authors' repository: PreAct-ResNet-18 24.18 ->
    20.82, PreAct-ResNet-101 20.75 -> 19.43, DenseNet-121 20.05 -> 18.73, ResNeXt-29
    18.65 -> 17.28; ImageNet ResNet-152 22.19 -> 21.41. Recipe: 300 epochs, SGD with
    Nesterov momentum, learning rate 0.1, divided by 10 after 150 and 225 epochs,
    weight decay 5e-4, batch 128.

    Args:
      alpha: trust in the past at the end of the training.
      records: rows of the memory; None takes the number of training records.

    Raises:
      ValueError: `alpha` is outside [0, 1], there are fewer rows than training
        records, or the student labels pixels.

    Reference:
      Kim, Ji, Yoon, Hwang, "Self-Knowledge Distillation with Progressive Refinement of
      Targets", ICCV 2021.
    """
    check_fraction("alpha", alpha)

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        del key
        check_classifier("pskd", specs.student)
        rows = specs.data.records if records is None else records
        if rows < specs.data.records:
            raise ValueError(
                f"records is {rows} but there are {specs.data.records} training "
                f"records; method 'pskd' needs a row for each"
            )
        shape = (rows, specs.student.num_classes)
        return {}, {
            "probabilities": jnp.zeros(shape, jnp.float32),
            "seen": jnp.zeros(rows, bool),
        }

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        del params
        logits, index = inputs.student.logits, inputs.batch["index"]
        progress = inputs.progress
        trust = alpha * (progress.epoch + 1) / progress.epochs
        # Trust 0 where there is no past leaves the label itself.
        trust = jnp.where(memory["seen"][index], trust, 0.0)[:, None]
        past = memory["probabilities"][index]
        value = losses.pskd(logits, past, inputs.targets, alpha=trust)
        now = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        return {"pskd": value}, {
            "probabilities": memory["probabilities"]
            .at[index]
            .set(jax.lax.stop_gradient(now)),
            "seen": memory["seen"].at[index].set(True),
        }

    return Method(init=init, terms=terms, weights={"pskd": 1.0})


@register()
def tfkd_reg(
    *,
    alpha: Scheduled = 0.1,
    temperature: Scheduled = 20.0,
    multiplier: float = 100.0,
    correct_probability: float = 0.99,
) -> Method:
    """A virtual teacher, sure of the label and of nothing else (Yuan et al., 2020).

        (1 - alpha) CE + alpha * multiplier * 1/K KL(softmax(v / T) || student)
        v = correct_probability on the label, the rest shared by the others

    Terms `ce` and `tfkd_reg`. The published weights share 1 between them, so the
    cross-entropy is inside: use it without `ce`.

    Needs: no teacher, nothing beyond the logits.

    Cost: none to speak of.

    Pitfalls: close to label smoothing: the softened virtual teacher is almost uniform.

    Paper and code: the paper softens the virtual teacher's logits. The code, followed
    here, divides its probabilities by T before a further softmax, leaves the student
    unsoftened and averages over classes, for which `multiplier` makes up.

    Recipes: the authors' options (alpha, temperature, multiplier): ResNet-18 0.1,
    20, 100 (the default); GoogLeNet 0.1, 40, 50; MobileNetV2 0.95, 40, 1;
    ShuffleNetV2 0.95, 10, 1.

    Args:
      alpha: weight of the virtual teacher, 1 - alpha that of the labels.
      temperature: divides the virtual teacher's probabilities.
      multiplier: further factor of the virtual teacher's term.
      correct_probability: of the label.

    Raises:
      ValueError: an option is out of range, or the student labels pixels.

    Reference:
      Yuan, Tay, Li, Wang, Feng, "Revisiting Knowledge Distillation via Label Smoothing
      Regularization", CVPR 2020.
    """
    check_fraction("alpha", alpha)
    check_positive("temperature", temperature)
    check_positive("multiplier", multiplier)
    check_fraction("correct_probability", correct_probability)

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        check_classifier("tfkd_reg", specs.student)
        return no_state(key, specs)

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        del params
        logits = inputs.student.logits
        return {
            "ce": losses.cross_entropy(logits, inputs.targets),
            "tfkd_reg": losses.tfkd_regularization(
                logits,
                inputs.targets,
                correct_probability=correct_probability,
                temperature=inputs.at(temperature),
            ),
        }, memory

    weights = {"ce": complement(alpha), "tfkd_reg": multiply(alpha, multiplier)}
    return Method(init=init, terms=terms, weights=weights)


@register()
def tfkd_self(
    *,
    alpha: Scheduled = 0.95,
    temperature: Scheduled = 6.0,
    multiplier: float = 50.0,
) -> Method:
    """A trained copy of the student's own network is the teacher (Yuan et al., 2020).

        (1 - alpha) CE + alpha * multiplier * T^2 / K KL(teacher / T || student / T)

    Terms `ce` and `tfkd_self`. The published weights share 1 between them, so the
    cross-entropy is inside: use it without `ce`.

    Needs: one teacher with the student's classes; usually a network of the same
    architecture, which an earlier stage trained.

    Cost: the teacher's forward pass, as in `kd`.

    Pitfalls: the divergence is a mean over the K classes and thus K times smaller than
    in `kd`; `multiplier` makes up for it.

    Recipes: the authors' options (alpha, temperature, multiplier): ResNet-18 0.95,
    6, 50 (the default); ResNeXt-29 0.9, 20, 100.

    Args:
      alpha: weight of the teacher, 1 - alpha that of the labels.
      temperature: softens both distributions.
      multiplier: further factor of the teacher's term.

    Raises:
      ValueError: an option is out of range, or logits have other shapes.

    Reference:
      Yuan, Tay, Li, Wang, Feng, "Revisiting Knowledge Distillation via Label Smoothing
      Regularization", CVPR 2020.
    """
    check_fraction("alpha", alpha)
    check_positive("temperature", temperature)
    check_positive("multiplier", multiplier)

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        check_classifier("tfkd_self", specs.student)
        check_same_logits(specs.student, specs.teacher)
        return no_state(key, specs)

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        del params
        logits = inputs.student.logits
        return {
            "ce": losses.cross_entropy(logits, inputs.targets),
            "tfkd_self": losses.tfkd_self(
                logits, inputs.teacher.logits, temperature=inputs.at(temperature)
            ),
        }, memory

    weights = {"ce": complement(alpha), "tfkd_self": multiply(alpha, multiplier)}
    return Method(init=init, terms=terms, weights=weights, num_teachers=1)


def check_classifier(method: str, student: NetworkSpec) -> None:
    """Checks that a network gives one distribution over classes per image.

    Raises:
      ValueError: it labels pixels.
    """
    if len(student.logits) != 1:
        raise ValueError(
            f"method {method!r} needs logits [classes], one label per image; network "
            f"{student.name!r} has {student.logits}"
        )


def complement(alpha: Weight) -> Weight:
    """The weight `1 - alpha`, a schedule if `alpha` is one."""
    if not callable(alpha):
        return 1.0 - alpha
    return lambda step: 1.0 - weight_at(alpha, step)


def _vector(tap: jax.Array) -> jax.Array:
    """A map averaged over space, the first of several tokens, or the vector itself."""
    tap = tap.astype(jnp.float32)
    if tap.ndim == 4:
        return jnp.mean(tap, axis=(1, 2))
    return tap[:, 0] if tap.ndim == 3 else tap
