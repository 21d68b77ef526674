"""MEAL and MEAL V2: several strong teachers and a discriminator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from jaxkd import losses
from jaxkd.distill.checks import check_same_logits
from jaxkd.distill.method import (
    Inputs,
    Memory,
    Method,
    Params,
    Specs,
    Terms,
)
from jaxkd.distill.region_labels import stored_target
from jaxkd.distill.registry import register
from jaxkd.distill.self_distillation import check_classifier
from jaxkd.layers import NetworkSpec, bias_uniform, fan_in_uniform
from jaxkd.losses.checks import check_positive
from jaxkd.numerics import adaptive_average_pool

T = TypeVar("T")
Adversarial = Literal["none", "grl"]
# The name under which the network's logits stand beside its taps.
_LOGITS = "logits"
# The example weights of MEAL's code, deepest last.
_GAMMA = (0.001, 0.01, 0.05, 0.1, 1.0)


@register()
def meal_v2(
    *,
    reduction: int = 8,
    adversarial: Adversarial = "none",
    labels: Literal["teachers", "stored"] = "teachers",
    discriminator_inputs: Literal["logits", "probabilities"] = "logits",
    discriminator_learning_rate: float | None = None,
) -> Method:
    """A trained student matches the mean of strong teachers (Shen and Savvides, 2020).

        -sum_k q_k log softmax(student)_k + L_dis,    q = mean_i softmax(teacher_i)

    L_dis is the cross-entropy of a small discriminator, which tells the student's
    logits from the mean of the teachers' logits: dense layers of width K / 8, K / 64
    and 2, with a ReLU after each, the last too. Labels take no part: use the method
    without `ce`, from a stage that trains a network that an earlier stage trained.

    Terms `similarity`, `discriminator`, and with weight 0, to be watched,
    `dead_outputs`: the share of the discriminator's outputs that are 0. If it is 1,
    the discriminator has stopped learning.

    Needs: one or more teachers with the student's classes, or stored labels.

    Cost: the forward passes of all teachers; the discriminator is small.

    Pitfalls: the published recipe starts from a trained student: SGD with momentum 0.9,
    weight decay 0, 180 epochs, learning rate 0.01, then 0.001 from epoch 101 on.

    Paper and code: there is no adversary in the code: student and discriminator
    minimise the same sum, so that the student is pulled to be recognised.
    `adversarial="grl"` reverses the gradient into the student. The code's separate
    learning rate of the discriminator is overwritten at every epoch by the student's;
    so by default the stage's optimiser trains it too, and
    `discriminator_learning_rate` gives it one of its own. The combination with FKD
    shows the discriminator softmaxes on both sides: `labels="stored"` with
    `discriminator_inputs="probabilities"`.

    Published: ImageNet top-1 of the authors' repository: ResNet-50 80.67 with
    gluon_senet154 and gluon_resnet152_v1s as teachers, ResNet-18 73.19,
    MobileNetV3-Large 76.92, EfficientNet-B0 78.29, all at 224 pixels.

    Args:
      reduction: how much narrower each layer of the discriminator is.
      adversarial: `"grl"` reverses the discriminator's gradient into the student.
      labels: where q comes from: the teachers, or `batch["target"]`, the labels that
        a teacher gave to this very crop before (see `fkd`).
      discriminator_inputs: what the discriminator sees: the student's logits and the
        mean of the teachers' logits, or the student's softmax and q.
      discriminator_learning_rate: of SGD with momentum 0.9 for the discriminator
        alone; None leaves it to the stage's optimiser.

    Raises:
      ValueError: an option is out of range, logits have other shapes, or stored
        labels are to be compared as logits.

    Reference:
      Shen, Savvides, "MEAL V2: Boosting Vanilla ResNet-50 to 80%+ Top-1 Accuracy on
      ImageNet without Tricks", 2020.
    """
    check_positive("reduction", reduction)
    if labels == "stored" and discriminator_inputs == "logits":
        raise ValueError(
            "stored labels are probabilities; set discriminator_inputs='probabilities'"
        )

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        check_classifier("meal_v2", specs.student)
        if labels == "teachers":
            check_same_logits(specs.student, specs.teacher)
        for teacher in specs.teachers:
            check_same_logits(specs.student, teacher)
        width = specs.student.num_classes
        return {"discriminator": init_discriminator(key, width, reduction)}, {}

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        student = inputs.student.logits
        teachers = [teacher.logits for teacher in inputs.teachers]
        if labels == "stored":
            q = stored_target("meal_v2", inputs)
        else:
            q = losses.mean_probabilities(teachers)
        if discriminator_inputs == "logits":
            shown = student, losses.mean_logits(teachers)
        else:
            shown = jax.nn.softmax(student.astype(jnp.float32), axis=-1), q
        d_student, d_teacher = _judge(params["discriminator"], *shown, adversarial)
        dead = (jnp.concatenate([d_student, d_teacher], axis=-1) == 0).astype(float)
        return {
            "similarity": losses.soft_cross_entropy(student, q),
            "discriminator": losses.discriminator_loss(d_student, d_teacher),
            "dead_outputs": jnp.mean(dead, axis=-1),
        }, memory

    return Method(
        init=init,
        terms=terms,
        weights={"similarity": 1.0, "discriminator": 1.0, "dead_outputs": 0.0},
        num_teachers="many" if labels == "teachers" else 0,
        optimizers=_own_optimizer(discriminator_learning_rate),
    )


@register()
def meal(
    *,
    gamma: tuple[float, ...] | None = None,
    eta: tuple[float, ...] | None = None,
    similarity: Literal["ce", "l1", "l2", "l1_soft", "l2_soft"] = "ce",
    reduction: int = 2,
    adversarial: Adversarial = "none",
    teacher_mode: Literal["train", "eval"] = "train",
    student_taps: tuple[str, ...] | None = None,
    teacher_taps: tuple[str, ...] | None = None,
    widths: tuple[int, ...] | None = None,
    discriminator_learning_rate: float | None = None,
) -> Method:
    """One of several teachers, drawn at each step, at many depths (Shen et al., 2019).

        sum_i gamma_i sim(s_i, t_i) + sum_i eta_i BCE(D_i(s_i), D_i(t_i))

    over the stages, pooled to a common width, and over the logits, which come last.
    Each depth has a discriminator D_i, which tells student from teacher. Labels take
    no part: use the method without `ce`.

    Terms `similarity` and `discriminator`, gamma and eta included.

    Needs: one or more teachers with the student's classes and as many stages. A map
    is laid out channel by channel and averaged adaptively to the common width (where
    that is the number of channels, this is the average over space).

    Cost: the forward passes of all teachers, also of those not drawn; a discriminator
    has about `width^2 / reduction` parameters per depth.

    Pitfalls: widths far above the channels, as published, give discriminators with
    tens of millions of parameters.

    Paper and code: the code lets the teachers normalise by the batch, which
    `teacher_mode="train"` does too (their stored statistics stay as they are);
    `"eval"` is usual elsewhere. Gradient reversal is a flag of the code and off,
    although the paper's discriminators are adversaries; `adversarial="grl"` is on.

    Published: ImageNet errors of ResNet-50 21.79 top-1 and 5.99 top-5 (23.85 and 7.13
    without the method).

    Args:
      gamma: weight of the similarity per depth, the logits last; None takes the last
        ones of 0.001, 0.01, 0.05, 0.1, 1.
      eta: weight of the discriminator per depth, the logits last; None takes 1.
      similarity: `"ce"` for soft cross-entropy, `"l1"` and `"l2"` for mean absolute
        and squared differences, `"l1_soft"` and `"l2_soft"` for those of softmaxes.
      reduction: how much narrower each layer of a discriminator is.
      adversarial: `"grl"` reverses the discriminators' gradient into the student.
      teacher_mode: which statistics the teachers' batch norms use.
      student_taps: taps of the student; None takes its stages.
      teacher_taps: taps of every teacher; None takes each one's stages.
      widths: common width per tap, without the logits; None takes the smallest number
        of channels that a network has there.
      discriminator_learning_rate: of SGD with momentum 0.9 for the discriminators
        alone; None leaves them to the stage's optimiser.

    Raises:
      KeyError: a network lacks a tap.
      ValueError: an option is out of range or of another length than the taps, or
        logits have other shapes.

    Reference:
      Shen, He, Xue, "MEAL: Multi-Model Ensemble via Adversarial Learning", AAAI 2019.
    """
    check_positive("reduction", reduction)

    def depths_of(
        student: NetworkSpec, teachers: Sequence[NetworkSpec]
    ) -> tuple[_Depth, ...]:
        taps = [_taps_of(student, student_taps)]
        taps += [_taps_of(teacher, teacher_taps) for teacher in teachers]
        for teacher, found in zip(teachers, taps[1:], strict=True):
            if len(found) != len(taps[0]):
                raise ValueError(
                    f"student {student.name!r} has {len(taps[0])} taps "
                    f"({', '.join(taps[0])}) and teacher {teacher.name!r} has "
                    f"{len(found)} ({', '.join(found)}); set student_taps and "
                    f"teacher_taps to lists of one length"
                )
        networks = (student, *teachers)
        channels = [
            min(n.tap(tap)[-1] for n, tap in zip(networks, row, strict=True))
            for row in zip(*taps, strict=True)
        ]
        count = len(channels) + 1
        if gamma is None and count > len(_GAMMA):
            raise ValueError(
                f"gamma has no default for {len(channels)} taps and the logits; set it"
            )
        columns = (
            [*zip(*taps, strict=True), (_LOGITS,) * len(networks)],
            [*_per_depth("widths", widths, channels), student.num_classes],
            _per_depth("gamma", gamma, _GAMMA[-count:]),
            _per_depth("eta", eta, (1.0,) * count),
        )
        return tuple(_Depth(*row) for row in zip(*columns, strict=True))

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        check_classifier("meal", specs.student)
        check_same_logits(specs.student, specs.teacher)
        for teacher in specs.teachers:
            check_same_logits(specs.student, teacher)
        discriminators = {
            depth.taps[0]: init_discriminator(
                jax.random.fold_in(key, i), depth.width, reduction
            )
            for i, depth in enumerate(depths_of(specs.student, specs.teachers))
        }
        return {"discriminator": discriminators}, {}

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        outputs = (inputs.student, *inputs.teachers)
        specs = [NetworkSpec.from_outputs("network", o) for o in outputs]
        drawn = jax.random.randint(inputs.key, (), 0, len(inputs.teachers))
        batch = inputs.student.logits.shape[0]
        similar = told_apart = jnp.zeros(batch, jnp.float32)
        for depth in depths_of(specs[0], specs[1:]):
            student, *teachers = (
                _pooled(o.logits if tap == _LOGITS else o.taps[tap], depth.width)
                for o, tap in zip(outputs, depth.taps, strict=True)
            )
            teacher = jax.lax.stop_gradient(jnp.stack(teachers)[drawn])
            value = losses.meal_similarity(student, teacher, kind=similarity)
            similar += depth.gamma * value
            discriminator = params["discriminator"][depth.taps[0]]
            judged = _judge(discriminator, student, teacher, adversarial)
            told_apart += depth.eta * losses.discriminator_loss(*judged)
        return {"similarity": similar, "discriminator": told_apart}, memory

    return Method(
        init=init,
        terms=terms,
        weights={"similarity": 1.0, "discriminator": 1.0},
        num_teachers="many",
        teacher_mode=teacher_mode,
        optimizers=_own_optimizer(discriminator_learning_rate),
    )


class _Depth(NamedTuple):
    """One of MEAL's places of comparison.

    Attributes:
      taps: the student's tap and each teacher's.
      width: to which all of them are pooled.
      gamma: weight of the similarity.
      eta: weight of the discriminator.
    """

    taps: tuple[str, ...]
    width: int
    gamma: float
    eta: float


def init_discriminator(key: jax.Array, width: int, reduction: int) -> Params:
    """Makes MEAL's discriminator of `width` inputs.

    Args:
      key: random key.
      width: channels of what it sees.
      reduction: how much narrower each of its first two layers is, at least 1 wide.

    Returns:
      `{"dense0", "dense1", "dense2"}`, each `{"kernel", "bias"}`; two outputs.
    """
    sizes = [width, max(width // reduction, 1), max(width // reduction**2, 1), 2]
    params = {}
    for i, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False)):
        kernel_key, bias_key = jax.random.split(jax.random.fold_in(key, i))
        params[f"dense{i}"] = {
            "kernel": fan_in_uniform(kernel_key, (inputs, outputs)),
            "bias": bias_uniform(inputs)(bias_key, (outputs,)),
        }
    return params


def _judge(
    discriminator: Params, student: jax.Array, teacher: jax.Array, mode: Adversarial
) -> tuple[jax.Array, jax.Array]:
    """What a discriminator says of the student's rows and of the teacher's."""
    if mode == "grl":
        student = losses.reverse_gradient(student)
    layers = [
        (discriminator[name]["kernel"], discriminator[name]["bias"])
        for name in sorted(discriminator)
    ]
    judged = losses.discriminate(
        jnp.concatenate([student.astype(jnp.float32), teacher]), layers
    )
    return judged[: len(student)], judged[len(student) :]


def _own_optimizer(
    learning_rate: float | None,
) -> dict[str, optax.GradientTransformation]:
    if learning_rate is None:
        return {}
    check_positive("discriminator_learning_rate", learning_rate)
    return {"discriminator": optax.sgd(learning_rate, momentum=0.9)}


def _taps_of(network: NetworkSpec, taps: tuple[str, ...] | None) -> tuple[str, ...]:
    chosen = network.stages if taps is None else tuple(taps)
    for tap in chosen:
        network.tap(tap)
    return chosen


def _per_depth(
    name: str, values: Sequence[T] | None, default: Sequence[T]
) -> Sequence[T]:
    if values is not None and len(values) != len(default):
        raise ValueError(
            f"{name} has {len(values)} values; this method needs {len(default)} here"
        )
    return default if values is None else values


def _pooled(tap: jax.Array, width: int) -> jax.Array:
    """A tap as float32 `[batch, width]`: laid out by channel, adaptively averaged."""
    rows = jnp.moveaxis(tap, -1, 1).reshape(1, len(tap), -1, 1).astype(jnp.float32)
    return adaptive_average_pool(rows, (len(tap), width))[0, :, :, 0]
