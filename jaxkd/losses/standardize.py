"""Logit standardisation: what a distillation loss may see before its softmax."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from jaxkd.losses.checks import Scalar, check_mask, check_positive


def standardize_logits(
    logits: Float[Array, "*batch k"],
    *,
    eps: Scalar = 1e-7,
    where: Bool[Array, "..."] | None = None,
) -> Float32[Array, "*batch k"]:
    """Z-scores over the classes (Sun et al., 2024).

        (z - mean(z)) / (std(z) + eps),    std with divisor K - 1

    Student and teacher both pass through it before `kd` or `dkd`: the student then need
    not match the range of the teacher's logits, only their relations. Logits that are
    all equal, or a single class, give zeros and get no gradient.

    Args:
      logits: `[batch, classes]` or `[batch, height, width, classes]`.
      eps: added to the standard deviation, as in the authors' code.
      where: which classes count, in the shape of the logits. The others, and classes
        whose logit is -inf, become -inf and take no part in mean and deviation.

    Returns:
      float32 of the shape of `logits`.

    Raises:
      ValueError: `where` has another shape, or `eps` is not positive.

    Example:
      >>> print(standardize_logits(jnp.array([[1.0, 2.0, 3.0]])).round(4))
      [[-1.  0.  1.]]

    Reference:
      Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024.
    """
    check_positive("eps", eps)
    z = logits.astype(jnp.float32)
    kept = ~jnp.isneginf(z)
    if where is not None:
        check_mask(where, logits.shape, of="classes of these logits")
        kept &= where
    z = jnp.where(kept, z, 0.0)
    count = jnp.sum(kept, axis=-1, keepdims=True)
    mean = jnp.sum(z, axis=-1, keepdims=True) / jnp.maximum(count, 1)
    centred = jnp.where(kept, z - mean, 0.0)
    squares = jnp.sum(jnp.square(centred), axis=-1, keepdims=True)
    variance = squares / jnp.maximum(count - 1, 1)
    # At equal logits the slope would be 1 / eps: a step of 1e7 for a head that starts
    # at zero.
    varies = variance > 0
    deviation = jnp.sqrt(jnp.where(varies, variance, 1.0))
    scores = jnp.where(varies, centred / (deviation + eps), 0.0)
    return jnp.where(kept, scores, -jnp.inf)
