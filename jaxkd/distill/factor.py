"""Factor transfer: the student learns a compact code of the teacher's last stage."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer

from jaxkd import losses
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
from jaxkd.distill.taps import last_stage
from jaxkd.layers import BatchNorm, NetworkSpec, bias_uniform, fan_in_uniform
from jaxkd.layers.blocks import Maps, NewMaps
from jaxkd.layers.convolution import Conv
from jaxkd.losses.checks import check_positive, mean_per_example
from jaxkd.losses.factor import Variant

_fan_out_uniform: Initializer = nn.initializers.variance_scaling(
    1 / 3, "fan_out", "uniform"
)


class Paraphraser(nn.Module):
    """Convolutional autoencoder of the teacher's features; its code is the factor.

    Three 3x3 convolutions and three that undo them, all with LeakyReLU (0.1).

    Attributes:
      features: channels of the factor.
    """

    features: int

    @nn.compact
    def __call__(self, x: Maps, train: bool) -> tuple[NewMaps, Maps]:
        """Returns the factor `[b, h, w, features]` and the rebuilt `x`."""
        del train
        channels = x.shape[-1]
        for i, features in enumerate((channels, self.features, self.features)):
            bias_init = bias_uniform(9 * x.shape[-1])
            x = _leaky(_conv(x, features, name=f"encoder{i}", bias_init=bias_init))
        factor = x
        for i, features in enumerate((self.features, channels, channels)):
            # The published decoder's transposed convolutions have stride 1: the same
            # functions, with other names for the kernel's axes, hence fan_out.
            x = _leaky(
                _conv(
                    x,
                    features,
                    name=f"decoder{i}",
                    kernel_init=_fan_out_uniform,
                    bias_init=bias_uniform(9 * features),
                )
            )
        return factor, x


class Translator(nn.Module):
    """Three 3x3 convolutions with batch norm and LeakyReLU (0.1): a student's factor.

    The convolutions have no bias: the batch norms would take it out again.

    Attributes:
      features: channels of the factor.
    """

    features: int

    @nn.compact
    def __call__(self, x: Maps, train: bool) -> NewMaps:
        """Maps `[b, h, w, c]` to `[b, h, w, features]`."""
        for i, features in enumerate((x.shape[-1], self.features, self.features)):
            x = _conv(x, features, name=f"conv{i}")
            x = _leaky(BatchNorm(dtype=x.dtype, name=f"norm{i}")(x, train))
        return x


@register()
def ft(
    *,
    k: float = 0.5,
    p1: int = 2,
    p2: int = 1,
    variant: Variant = "repdistiller",
    warmup_epochs: int = 0,
    factor: Scheduled = 200.0,
    reconstruction: Scheduled = 1.0,
    student_tap: str | None = None,
    teacher_tap: str | None = None,
) -> Method:
    """A compact code of the teacher's last stage (factor transfer; Kim et al., 2018).

    A paraphraser, an autoencoder of the teacher's features, makes the teacher's factor;
    a translator on the student's features makes the student's. Terms:

        ft              factor * mean |F(student's factor) - F(teacher's factor)|^p2
        reconstruction  mean (decoder(encoder(t)) - t)^2

    The paraphraser learns from `reconstruction` only, the student and its translator
    from `ft` only.

    Needs: the map at the end of the last stage of both networks; sizes and channels are
    free. The paraphraser's code has `k` times the teacher's channels.

    Cost: six 3x3 convolutions on the teacher's map and three on the student's, forward
    and backward.

    Pitfalls: until the paraphraser has learnt something, its code is a random
    projection of the features: give it `warmup_epochs` (30 in the published recipe;
    the default of 0 leaves the choice to you). The published code starts residual
    networks' paraphrasers at a fifth of the learning rate. A weight decay of the run
    also shrinks a paraphraser that no longer learns.

    Paper and code: the paraphraser is trained first (30 epochs) and then frozen. Here
    `warmup_epochs` holds the term `ft` at zero for that long, while other parts of the
    loss (the labels) already train the student; a schedule for `reconstruction` that
    falls to zero then stops the paraphraser. The benchmark's code (default) compares
    attention maps of the factors, the paper (`variant="paper"`) the factors themselves,
    scaled to unit length.

    Published: CIFAR-100, 30 + 240 epochs: 69.84 for ResNet-20 from ResNet-56 (alone
    69.06, teacher 72.34), 73.25 for WRN-16-2 from WRN-40-2 (alone 73.26, teacher
    75.61); table of the CRD authors' benchmark.

    Args:
      k: channels of the factor over those of the teacher, in (0, 1].
      p1: power of the factors' attention maps, for the default variant.
      p2: power of the difference.
      variant: `"repdistiller"` or `"paper"`.
      warmup_epochs: epochs at the start in which only `reconstruction` counts.
      factor: of the term `ft`; a number or a schedule.
      reconstruction: factor of the term `reconstruction`; a number or a schedule.
      student_tap: tap of the student; its last stage by default.
      teacher_tap: tap of the teacher; its last stage by default.

    Raises:
      ValueError: an option is impossible.

    Reference:
      Kim, Park, Kwak, "Paraphrasing Complex Network: Network Compression via Factor
      Transfer", NeurIPS 2018.
    """
    if not 0 < k <= 1:
        raise ValueError(f"k must be above 0 and at most 1, got {k}")
    check_positive("p1", p1)
    check_positive("p2", p2)
    if warmup_epochs < 0:
        raise ValueError(f"warmup_epochs must be >= 0, got {warmup_epochs}")

    def taps(student: NetworkSpec, teacher: NetworkSpec) -> tuple[str, str]:
        return (
            last_stage(student, student_tap, option="student_tap"),
            last_stage(teacher, teacher_tap, option="teacher_tap"),
        )

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        student_name, teacher_name = taps(specs.student, specs.teacher)
        student = feature_map(specs.student, student_name)
        teacher = feature_map(specs.teacher, teacher_name)
        width = int(teacher[-1] * k)
        if width < 1:
            raise ValueError(
                f"k={k} leaves no channel of the {teacher[-1]} of tap "
                f"{teacher_name!r} of network {specs.teacher.name!r}"
            )
        if warmup_epochs >= specs.data.epochs:
            raise ValueError(
                f"warmup_epochs is {warmup_epochs}, but the stage has "
                f"{specs.data.epochs} epochs: the term 'ft' would never count"
            )
        first, second = jax.random.split(key)
        paraphraser, _ = init_module(Paraphraser(width), first, teacher)
        translator, memory = init_module(Translator(width), second, student)
        return {"paraphraser": paraphraser, "translator": translator}, memory

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        student_name, teacher_name = taps(
            NetworkSpec.from_outputs("student", inputs.student),
            NetworkSpec.from_outputs("teacher", inputs.teacher),
        )
        teacher = jax.lax.stop_gradient(inputs.teacher.taps[teacher_name])
        width = int(teacher.shape[-1] * k)
        (teacher_factor, rebuilt), _ = apply_module(
            Paraphraser(width), params["paraphraser"], {}, teacher, train=True
        )
        student_factor, memory = apply_module(
            Translator(width),
            params["translator"],
            memory,
            inputs.student.taps[student_name],
            train=True,
        )
        value = losses.ft(student_factor, teacher_factor, p1=p1, p2=p2, variant=variant)
        counts = inputs.progress.epoch >= warmup_epochs
        error = rebuilt.astype(jnp.float32) - teacher.astype(jnp.float32)
        return {
            "ft": jnp.where(counts, value, 0.0),
            "reconstruction": mean_per_example(jnp.square(error)),
        }, memory

    return Method(
        init=init,
        terms=terms,
        weights={"ft": factor, "reconstruction": reconstruction},
        num_teachers=1,
    )


def _conv(
    x: jax.Array,
    features: int,
    *,
    name: str,
    kernel_init: Initializer = fan_in_uniform,
    bias_init: Initializer | None = None,
) -> jax.Array:
    """A padded 3x3 convolution, without a bias if its initialiser is None."""
    return Conv(
        features,
        (3, 3),
        padding=((1, 1), (1, 1)),
        use_bias=bias_init is not None,
        kernel_init=kernel_init,
        bias_init=bias_init or nn.initializers.zeros,
        dtype=x.dtype,
        name=name,
    )(x)


def _leaky(x: jax.Array) -> jax.Array:
    return nn.leaky_relu(x, 0.1)
