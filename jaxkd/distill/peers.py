"""Classifiers that learn together: inside one network (BYOT), or side by side (DML)."""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkd import losses
from jaxkd.distill.checks import check_same_logits, feature_map
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
from jaxkd.distill.modules import apply_module, init_module
from jaxkd.distill.registry import register
from jaxkd.distill.self_distillation import check_classifier, complement
from jaxkd.distill.taps import pooled
from jaxkd.layers import (
    BatchNorm,
    NetworkSpec,
    bias_uniform,
    fan_in_uniform,
    kaiming_normal,
)
from jaxkd.layers.convolution import Conv
from jaxkd.losses.checks import check_fraction, check_positive


class EarlyClassifier(nn.Module):
    """A shallow classifier on the map of an early stage.

    A bottleneck (1x1, then `window` with stride `window`, then 1x1 convolution, each
    with batch norm and ReLU) brings the map to the size and width of the network's
    last stage; its spatial average are the features, a dense layer gives the logits.

    Attributes:
      features: channels of the features.
      classes: number of logits.
      window: height and width of the middle convolution, its stride too.
    """

    features: int
    classes: int
    window: tuple[int, int]

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool
    ) -> tuple[Float[Array, "b classes"], Float[Array, "b features"]]:
        """Returns `(logits, features)`."""
        narrow = max(self.features // 4, 1)
        for i, (width, size) in enumerate(
            ((narrow, (1, 1)), (narrow, self.window), (self.features, (1, 1)))
        ):
            x = Conv(
                width,
                size,
                strides=size,
                padding="VALID",
                use_bias=False,
                kernel_init=kaiming_normal,
                dtype=x.dtype,
                name=f"conv{i}",
            )(x)
            x = nn.relu(BatchNorm(dtype=x.dtype, name=f"norm{i}")(x, train))
        features = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        logits = nn.Dense(
            self.classes,
            kernel_init=fan_in_uniform,
            bias_init=bias_uniform(self.features),
            name="classifier",
        )(features)
        return logits, features


@register()
def byot(
    *,
    alpha: Scheduled = 0.1,
    beta: Scheduled = 1e-6,
    temperature: Scheduled = 3.0,
    student_taps: tuple[str, ...] | None = None,
    final_tap: str | None = None,
) -> Method:
    """The deepest classifier teaches shallow ones of its network (Zhang et al., 2019).

    Every stage but the last gets a classifier of its own, which learns from the
    labels, from the logits of the network itself, and from its pooled features:

        (1 - alpha) sum_all CE + alpha T^2 sum_early softCE(final, early)
          + beta sum_early sum of squared feature differences

    Terms `ce`, `kd` and `feature`. `ce` holds the cross-entropy of the network's own
    logits too, since the published weights share 1: use the method without `ce`.

    Needs: no teacher; maps of the early stages and the pooled features. Each early
    classifier is a bottleneck of three convolutions and a dense layer, with batch
    norms; it trains with the student and is dropped afterwards.

    Cost: the forward and backward pass of the early classifiers.

    Pitfalls: the feature term is a sum over the batch and all features, hence the
    small beta; it grows with the batch. The final classifier is a constant for the
    early ones.

    Paper and code: the authors published no code. Form, reductions and weights are
    those of the widely used re-implementation luanyunteng/pytorch-be-your-own-teacher:
    soft cross-entropy with T^2, features compared where either is positive.

    Published: CIFAR-100 top-1 of that re-implementation's final classifier: ResNet-18
    78.64, ResNet-50 80.56.

    Args:
      alpha: weight of the soft labels; 1 - alpha that of the labels.
      beta: weight of the features.
      temperature: softens both distributions of the soft labels.
      student_taps: the early maps; None takes every stage but the last.
      final_tap: the deepest features, a vector; None takes `pooled`.

    Raises:
      KeyError: the student lacks a tap.
      ValueError: an option is out of range, there is no early stage, or a tap is not
        of the kind needed.

    Reference:
      Zhang, Song, Gao, Chen, Bao, Ma, "Be Your Own Teacher: Improve the Performance of
      Convolutional Neural Networks via Self Distillation", ICCV 2019.
    """
    check_fraction("alpha", alpha)
    check_positive("temperature", temperature)

    def classifiers(student: NetworkSpec) -> dict[str, EarlyClassifier]:
        taps = student.stages[:-1] if student_taps is None else student_taps
        if not taps:
            raise ValueError(
                f"method 'byot' needs stages before the last one; network "
                f"{student.name!r} has {', '.join(student.stages) or 'none'}, set "
                f"student_taps"
            )
        (width,) = student.tap(pooled(student, final_tap, option="final_tap"))
        # The size to come down to: the last stage's, or without stages one pixel.
        last = student.stages[-1:]
        height, breadth = feature_map(student, last[0])[:2] if last else (1, 1)
        modules = {}
        for tap in taps:
            h, w, _ = feature_map(student, tap)
            modules[tap] = EarlyClassifier(
                features=width,
                classes=student.num_classes,
                window=(max(h // height, 1), max(w // breadth, 1)),
            )
        return modules

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        check_classifier("byot", specs.student)
        params, memory = {}, {}
        for i, (tap, module) in enumerate(classifiers(specs.student).items()):
            params[tap], memory[tap] = init_module(
                module, jax.random.fold_in(key, i), specs.student.tap(tap)
            )
        return params, memory

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        student, labels = inputs.student, inputs.targets
        spec = NetworkSpec.from_outputs("student", student)
        final = student.taps[pooled(spec, final_tap, option="final_tap")]
        new_memory = {}
        ce = losses.cross_entropy(student.logits, labels)
        kd = feature = jnp.zeros_like(ce)
        for tap, module in classifiers(spec).items():
            (logits, features), new_memory[tap] = apply_module(
                module, params[tap], memory[tap], student.taps[tap], train=True
            )
            ce += losses.cross_entropy(logits, labels)
            kd += losses.kd_cross_entropy(
                logits, student.logits, temperature=inputs.at(temperature)
            )
            feature += losses.byot_feature(features, final)
        return {"ce": ce, "kd": kd, "feature": feature}, new_memory

    weights = {"ce": complement(alpha), "kd": alpha, "feature": beta}
    return Method(init=init, terms=terms, weights=weights)


@register()
def dml(
    *,
    students: int = 2,
    reduction: Literal["mean", "sum"] = "sum",
    eps: float = 1e-8,
) -> Method:
    """Several students learn from each other and from the labels (Zhang et al., 2018).

        sum_i [ CE_i + sum_{j != i} KL(p_j || p_i) ]

    In KL(p_j || p_i) only student i learns, so that each student's gradient is that of
    its own loss. Terms `ce` and `kl`, both summed over the students; the labels are
    inside: use the method without `ce`.

    Needs: no teacher; two or more students of one stage with equal logits.

    Cost: each further student costs a whole forward and backward pass.

    Pitfalls: students that start equal stay equal, so they must be initialised from
    different keys. All of them see the same images.

    Paper and code: the code sums over the peers and adds 1e-8 inside the logarithm, as
    the default does; the paper averages (`reduction="mean"`, `eps=0.0`; the same sum
    for two students). The code also updates the students one after the other, where
    here all step at once.

    Args:
      students: how many learn together.
      reduction: over the peers of each student.
      eps: see `losses.dml`.

    Raises:
      ValueError: fewer than two students, a negative `eps`, another number of
        networks, or logits of different shapes.

    Reference:
      Zhang, Xiang, Hospedales, Lu, "Deep Mutual Learning", CVPR 2018.
    """
    if students < 2:
        raise ValueError(f"students must be >= 2, got {students}")
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    divisor = students - 1 if reduction == "mean" else 1

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        found = 1 + len(specs.student.peers)
        if found != students:
            raise ValueError(
                f"method 'dml' has students={students} but the stage has {found} "
                f"learning networks; set students to their number"
            )
        for peer in specs.student.peers:
            check_same_logits(specs.student, peer)
        check_classifier("dml", specs.student)
        return no_state(key, specs)

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        del params
        logits = [o.logits for o in (inputs.student, *inputs.student.peers)]
        ce = sum(losses.cross_entropy(z, inputs.targets) for z in logits)
        kl = sum(
            losses.dml(student, peer, eps=eps)
            for i, student in enumerate(logits)
            for j, peer in enumerate(logits)
            if i != j
        )
        return {"ce": jnp.asarray(ce), "kl": jnp.asarray(kl) / divisor}, memory

    weights = {"ce": 1.0, "kl": 1.0}
    return Method(init=init, terms=terms, weights=weights, num_students=students)
