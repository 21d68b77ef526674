"""Methods that compare where the stages of two networks respond."""

from __future__ import annotations

from typing import Literal

import jax

from jaxkd import losses
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
from jaxkd.distill.stages import StageTaps, total


@register()
def at(
    *,
    exponent: int = 2,
    norm: Literal["code", "paper"] = "code",
    factor: Scheduled = 1000.0,
    student_taps: tuple[str, ...] | None = None,
    teacher_taps: tuple[str, ...] | None = None,
) -> Method:
    """Where each stage looks: its spatial attention (Zagoruyko and Komodakis, 2017).

    A map's attention is the unit vector of its mean squares over channels, one number
    per pixel. Stage by stage, the student's is brought to the teacher's:

        factor * sum over stages of mean over pixels of (A_s - A_t)^2
        A(x) = a / ||a||,    a = mean over channels of x^p

    Needs: the map at the end of each stage of both networks, in equal number. Sizes and
    channels are free: the larger map of a pair is averaged down to the smaller one, and
    there is nothing to learn.

    Cost: reads each map once; no matrix product.

    Pitfalls: the mean over pixels makes the value small, hence the large factor; choose
    a much smaller one with `norm="paper"`. Networks that differ much in their receptive
    fields have attentions that need not agree.

    Paper and code: the paper sums norms, the published code (default) averages squares;
    `norm` chooses. For segmentation, `seg_at` and `hlfd` use the variant with exponent
    4 that sums over pixels and resizes bilinearly.

    Published: CIFAR-100, 240 epochs: 70.55 for ResNet-20 from ResNet-56 (alone 69.06,
    teacher 72.34), 74.08 for WRN-16-2 from WRN-40-2 (alone 73.26, teacher 75.61), but
    59.40 for MobileNetV2 from VGG-13 (alone 64.60); table of the CRD authors'
    benchmark.

    Args:
      exponent: the power p.
      norm: `"code"` or `"paper"`.
      factor: of the loss; a number or a schedule.
      student_taps: taps of the student; the ends of its stages by default.
      teacher_taps: taps of the teacher; likewise.

    Raises:
      ValueError: `exponent` is below 1.

    Reference:
      Zagoruyko, Komodakis, "Paying More Attention to Attention: Improving the
      Performance of Convolutional Neural Networks via Attention Transfer", ICLR 2017.
    """
    if exponent < 1:
        raise ValueError(f"exponent must be an integer above 0, got {exponent}")
    taps = StageTaps(student=student_taps, teacher=teacher_taps)

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        taps.pairs(specs)
        return no_state(key, specs)

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        del params
        values = [
            losses.attention_transfer(s, t, exponent=exponent, norm=norm)
            for s, t in taps.maps(inputs)
        ]
        return {"at": total(values)}, memory

    return Method(init=init, terms=terms, weights={"at": factor}, num_teachers=1)


@register()
def nst(
    *,
    factor: Scheduled = 50.0,
    student_taps: tuple[str, ...] | None = None,
    teacher_taps: tuple[str, ...] | None = None,
) -> Method:
    """What each stage's channels select, as a set of patterns (Huang and Wang, 2017).

    Each channel is a pattern over the pixels, scaled to unit length. The two sets of
    patterns are compared by their maximum mean discrepancy under the kernel
    `k(a, b) = (a . b)^2`:

        factor * sum over stages of mean k(t, t) + mean k(s, s) - 2 mean k(s, t)

    Needs: the map at the end of each stage of both networks, in equal number. Channels
    are free, there is nothing to learn; the larger map of a pair is averaged down to
    the smaller one.

    Cost: matrix products within each example: of the channels (`c^2 h w`) or of the
    pixels (`(h w)^2 c`), whichever gives the smaller matrices.

    Pitfalls: behind a ReLU no product is negative, so that all channels look somewhat
    alike. A channel of zeros contributes nothing and gets no gradient.

    Published: CIFAR-100, 240 epochs: 73.30 for ResNet-8x4 from ResNet-32x4 (alone
    72.50, teacher 79.42), 74.89 for ShuffleNetV1 from WRN-40-2 (alone 70.50, teacher
    75.61), but 58.16 for MobileNetV2 from VGG-13 (alone 64.60); table of the CRD
    authors' benchmark.

    Args:
      factor: of the loss; a number or a schedule.
      student_taps: taps of the student; the ends of its stages by default.
      teacher_taps: taps of the teacher; likewise.

    Reference:
      Huang, Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity
      Transfer", 2017.
    """
    taps = StageTaps(student=student_taps, teacher=teacher_taps)

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        taps.pairs(specs)
        return no_state(key, specs)

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        del params
        values = [
            losses.neuron_selectivity_transfer(s, t) for s, t in taps.maps(inputs)
        ]
        return {"nst": total(values)}, memory

    return Method(init=init, terms=terms, weights={"nst": factor}, num_teachers=1)
