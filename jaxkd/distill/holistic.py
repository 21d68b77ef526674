"""Holistic distillation: a critic tells the teacher's maps from the student's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxkd import losses
from jaxkd.distill.checks import check_same_logits, check_segmentation
from jaxkd.distill.method import (
    Batch,
    Inputs,
    Memory,
    Method,
    Params,
    Scheduled,
    Specs,
    Terms,
    Weight,
    multiply,
    weight_at,
)
from jaxkd.distill.modules import apply_module, init_module
from jaxkd.distill.registry import register
from jaxkd.layers.critics import Critic
from jaxkd.losses.checks import check_positive
from jaxkd.numerics import resize_bilinear


@register()
def skd_holistic(
    *,
    factor: Weight = 0.1,
    critic_factor: Weight = 0.1,
    penalty: float = 10.0,
    learning_rate: Scheduled = 4e-4,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    width: int = 64,
    image_channels: int = 0,
) -> Method:
    """Maps that a critic cannot tell from the teacher's (Liu et al., 2019).

    A Wasserstein critic D learns to score the teacher's logits above the student's,
    held smooth by a penalty on its gradient; the student learns to be scored high:

        student:  -D(student)
        critic:    D(student) - D(teacher)
        penalty:  (||grad D(u teacher + (1 - u) student)|| - 1)^2,   u ~ U(0, 1)

    The term `student` reaches only the student, the other two only the critic: one
    step updates both, each with the other as it was before the step.

    Needs: logits of one shape, at least 8x8. The critic (up to four 4x4 convolutions of
    stride 2 with spectral normalisation, self-attention after the last two) is trained
    by an optimiser of its own.

    Cost: four passes of the critic, and a gradient of its gradient. On logits of full
    resolution that is comparable to the student itself; self-attention grows with the
    fourth power of the image's side.

    Pitfalls: the terms measure a game, not progress; their values may go anywhere.

    Paper and code: in the paper the critic also sees the image, in the code only the
    logits. The default follows the code; `image_channels` gives the paper's.

    Args:
      factor: weight of the term `student`; a number or a schedule.
      critic_factor: weight of the critic's own terms, which scales its learning rate.
      penalty: weight of the gradient penalty beside the critic's term.
      learning_rate: of the critic's SGD; a number or a schedule of the step.
      momentum: of the critic's SGD.
      weight_decay: of the critic's SGD.
      width: channels of the critic's first layer.
      image_channels: channels of the images if the critic sees them, else 0.

    Raises:
      ValueError: `learning_rate` or `width` is not positive, or `penalty`, `momentum`,
        `weight_decay` or `image_channels` is negative.

    Reference:
      Liu et al., "Structured Knowledge Distillation for Semantic Segmentation", CVPR
      2019.
    """
    check_positive("learning_rate", learning_rate)
    check_positive("width", width)
    for name, value in {
        "penalty": penalty,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "image_channels": image_channels,
    }.items():
        if not value >= 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
    critic = Critic(width=width)

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        student = specs.student
        check_segmentation("skd_holistic", student)
        check_same_logits(student, specs.teacher)
        height, length, classes = student.logits
        if not Critic.depth(height, length):
            raise ValueError(
                f"method 'skd_holistic' needs logits of at least 8x8 pixels; student "
                f"{student.name!r} has {height}x{length}"
            )
        shape = (height, length, classes + image_channels)
        params, memory = init_module(critic, key, shape)
        return {"critic": params}, memory

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        student = inputs.student.logits.astype(jnp.float32)
        fake = jax.lax.stop_gradient(student)
        real = jax.lax.stop_gradient(inputs.teacher.logits).astype(jnp.float32)
        images = _images(inputs.batch, fake.shape, image_channels)

        def score(weights: Params, logits: jax.Array) -> jax.Array:
            maps = jnp.concatenate([logits, images], axis=-1)
            return apply_module(critic, weights, memory, maps, train=False)[0]

        weights = params["critic"]
        share = jax.random.uniform(inputs.key, (fake.shape[0], 1, 1, 1))
        between = share * real + (1.0 - share) * fake
        slopes = jax.grad(lambda x: jnp.sum(score(weights, x)))(between)
        values = {
            "student": -score(jax.lax.stop_gradient(weights), student),
            "critic": score(weights, fake) - score(weights, real),
            "penalty": losses.gradient_penalty(slopes),
        }
        # One step of power iteration per training step, so that all scores of a step
        # come from the same critic.
        maps = jnp.concatenate([fake, images], axis=-1)
        _, moved = apply_module(critic, weights, memory, maps, train=True)
        return values, jax.lax.stop_gradient(moved)

    def rate(count: Any) -> Any:
        return weight_at(learning_rate, count)

    decayed = optax.add_decayed_weights(weight_decay)
    tx = optax.chain(decayed, optax.sgd(rate, momentum=momentum or None))
    return Method(
        init=init,
        terms=terms,
        weights={
            "student": factor,
            "critic": critic_factor,
            "penalty": multiply(critic_factor, penalty),
        },
        num_teachers=1,
        optimizers={"critic": tx},
    )


def _images(batch: Batch, shape: tuple[int, ...], channels: int) -> jax.Array:
    """The images at the size of the logits, or no channels."""
    if channels == 0:
        return jnp.zeros((*shape[:3], 0), jnp.float32)
    images = jax.lax.stop_gradient(batch["image"]).astype(jnp.float32)
    if images.shape[-1] != channels:
        raise ValueError(
            f"images have {images.shape[-1]} channels and image_channels is {channels}"
        )
    return resize_bilinear(images, shape[1:3])
