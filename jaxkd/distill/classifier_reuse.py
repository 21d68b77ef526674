"""Methods that judge the student's features by the teacher's own classifier."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

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
)
from jaxkd.distill.modules import apply_module, init_module
from jaxkd.distill.registry import register
from jaxkd.distill.taps import last_stage, networks
from jaxkd.layers import NetworkSpec, Outputs
from jaxkd.layers.connectors import ConvNorm, Projector, shrink_to
from jaxkd.losses.features import classify


@register()
def srrl(
    *,
    student_tap: str | None = None,
    alpha: Scheduled = 1.0,
    beta: Scheduled = 1.0,
) -> Method:
    """The teacher's classifier reads the student's feature (Yang et al., 2021).

    The student's last map is led to the teacher's width and pooled. The resulting
    vector `f` shall equal the teacher's, and the teacher's frozen last layer shall give
    the teacher's logits on it.

        alpha * mean (f - teacher)^2 + beta * mean (f @ kernel + bias - logits)^2
        f = pool(relu(norm(conv1x1(student))))

    The usual recipe is `weighted({"ce": 1.0, "srrl": 1.0})`.

    Needs: a map of the student, and a teacher with a last linear layer on its tap
    "pooled". The networks may differ in map size and in classes.

    Cost: one 1x1 convolution and norm on the student's map.

    Pitfalls: the regressed logits have the scale of the teacher's, unsoftened; a very
    confident teacher makes the second term large.

    Published: CIFAR-100, from ResNet-32x4 (table of the SimKD authors): ResNet-8x4
    75.39 (alone 73.09, KD 74.42), VGG-8 73.23 (70.46, 72.73), ShuffleNetV2 x1.5 77.55
    (74.15, 76.82).

    Args:
      student_tap: map of the student; None takes its last stage.
      alpha: weight of the term "feature".
      beta: weight of the term "regression".

    Reference:
      Yang et al., "Knowledge Distillation via Softmax Regression Representation
      Learning", ICLR 2021.
    """

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        source = last_stage(specs.student, student_tap)
        width = _head_width("srrl", specs.teacher)
        return init_module(
            ConvNorm(width, relu=True), key, feature_map(specs.student, source)
        )

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        teacher = inputs.teacher
        source = last_stage(networks(inputs).student, student_tap)
        connected, memory = apply_module(
            ConvNorm(teacher.taps["pooled"].shape[-1], relu=True),
            params,
            memory,
            inputs.student.taps[source],
            train=True,
        )
        feature = _pool(connected)
        values = {
            "feature": losses.hint(feature, teacher.taps["pooled"]),
            "regression": losses.softmax_regression(
                feature, teacher.logits, teacher.head["kernel"], teacher.head["bias"]
            ),
        }
        return values, memory

    weights = {"feature": alpha, "regression": beta}
    return Method(init=init, terms=terms, weights=weights, num_teachers=1)


@register()
def simkd(
    *,
    student_tap: str | None = None,
    teacher_tap: str | None = None,
    factor: int = 2,
) -> Method:
    """The student takes over the teacher's classifier (Chen et al., 2022).

    A projector `P` of 1x1, 3x3 and 1x1 convolutions, each with norm and ReLU, leads the
    student's last map to the teacher's. That is the only loss: no labels, no logits.

        mean (P(student) - teacher)^2

    At test time the student is its body, the projector and the teacher's last layer on
    the pooled result, which is this method's readout: evaluation uses it, and the
    projector's parameters belong to the student's cost. The student's own last layer
    is neither trained nor used.

    Needs: a map of each network, and a teacher with a last linear layer that reads the
    pooled map, of the student's classes. The larger of the two maps is average-pooled
    to the size of the smaller.

    Cost: the projector on the student's map, in training and at test time.

    Pitfalls: don't add cross-entropy; it would train the unused last layer. Before the
    first step the readout is zero, since the teacher's layer is copied from the
    teacher's outputs at each step.

    Published: CIFAR-100, from ResNet-32x4 with factor 2 (authors' table): ResNet-8x4
    78.08 (alone 73.09, KD 74.42), VGG-8 75.76 (70.46, 72.73), ShuffleNetV2 x1.5 79.54
    (74.15, 76.82).

    Args:
      student_tap: map of the student; None takes its last stage.
      teacher_tap: map of the teacher whose pooled value its last layer reads; None
        takes its last stage, after the ReLU that precedes the pooling.
      factor: how many times narrower the projector is inside.

    Raises:
      ValueError: `factor` is below 1.

    Reference:
      Chen et al., "Knowledge Distillation with the Reused Teacher Classifier", CVPR
      2022.
    """
    if factor < 1:
        raise ValueError(f"factor must be >= 1, got {factor}")

    def projector(size: tuple[int, ...], features: int) -> Projector:
        return Projector(features, factor, (size[0], size[1]))

    def project(
        params: Params, memory: Memory, student: Outputs, *, train: bool
    ) -> tuple[jax.Array, Memory]:
        # Only the shape of "size" is used: an array is what memory can hold.
        module = projector(memory["size"].shape, memory["head"]["kernel"].shape[0])
        spec = NetworkSpec.from_outputs("student", student)
        x = student.taps[last_stage(spec, student_tap)]
        return apply_module(module, params, memory["projector"], x, train=train)

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        student, teacher = specs.student, specs.teacher
        check_same_logits(student, teacher)
        width = _head_width("simkd", teacher)
        source = last_stage(student, student_tap)
        goal = last_stage(teacher, teacher_tap, option="teacher_tap")
        *size, channels = feature_map(teacher, goal)
        if channels != width:
            raise ValueError(
                f"tap {goal!r} of network {teacher.name!r} has {channels} channels but "
                f"its last layer reads {width}; set teacher_tap to the map that is "
                f"pooled"
            )
        if width < factor:
            raise ValueError(
                f"factor {factor} leaves no channel of the {width} of network "
                f"{teacher.name!r}"
            )
        params, statistics = init_module(
            projector(tuple(size), width), key, feature_map(student, source)
        )
        classes = teacher.num_classes
        head = {"kernel": jnp.zeros((width, classes)), "bias": jnp.zeros(classes)}
        memory = {"projector": statistics, "head": head, "size": jnp.zeros(size)}
        return params, memory

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        projected, statistics = project(params, memory, inputs.student, train=True)
        teacher = _last_map(inputs.teacher, networks(inputs).teacher, teacher_tap)
        value = losses.hint(projected, shrink_to(teacher, projected.shape[1:3]))
        head = {
            name: jax.lax.stop_gradient(inputs.teacher.head[name]).astype(jnp.float32)
            for name in ("kernel", "bias")
        }
        return {"simkd": value}, {**memory, "projector": statistics, "head": head}

    def readout(params: Params, memory: Memory, student: Outputs) -> jax.Array:
        projected, _ = project(params, memory, student, train=False)
        return classify(_pool(projected), **memory["head"])

    return Method(
        init=init,
        terms=terms,
        weights={"simkd": 1.0},
        num_teachers=1,
        readout=readout,
    )


def _pool(x: jax.Array) -> jax.Array:
    return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)


def _head_width(method: str, teacher: NetworkSpec) -> int:
    """Channels that the teacher's last linear layer reads."""
    if not teacher.has_head:
        raise ValueError(
            f"{method} reuses the teacher's last linear layer, but network "
            f"{teacher.name!r} has none; choose a teacher with a single linear head"
        )
    return teacher.tap("pooled")[0]


def _last_map(
    teacher: Outputs, spec: NetworkSpec, teacher_tap: str | None
) -> jax.Array:
    """The map whose mean the teacher's last layer reads.

    In pre-activation networks the last stage is a raw sum; norm and ReLU come between
    it and the pooling. The ReLU of the tap before it is right in all networks.
    """
    tap = last_stage(spec, teacher_tap, option="teacher_tap")
    before = f"{tap}_pre"
    if teacher_tap is None and before in teacher.taps:
        return nn.relu(teacher.taps[before])
    return teacher.taps[tap]
