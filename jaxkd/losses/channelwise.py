"""Where each channel of a map looks: distributions over space, channel by channel.

The opposite of pixel-wise distillation, whose distributions run over the classes of
one pixel. Works on logits and on feature maps.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Float32

from jaxkd.losses.checks import Scalar, check_logits, check_maps, check_positive
from jaxkd.losses.logits import finite_logits


def cwd(
    student: Float[Array, "b h w c"],
    teacher: Float[Array, "..."],
    *,
    temperature: Scalar = 4.0,
) -> Float32[Array, "b"]:
    """Channel-wise divergence of softened spatial distributions (Shu et al., 2021).

        T^2 / C * sum_c KL(softmax_hw(teacher_c / T) || softmax_hw(student_c / T))

    A constant added to a channel changes nothing. A channel of -inf (an excluded
    class) counts as uniform.

    Args:
      student: logits or features.
      teacher: maps of the same shape; no gradient reaches them.
      temperature: softens both distributions.

    Returns:
      float32 `[batch]`.

    Raises:
      ValueError: shapes differ or are no maps, or `temperature` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> student = jnp.zeros((1, 1, 2, 1))
      >>> teacher = jnp.array([2.0, 0.0]).reshape(1, 1, 2, 1)
      >>> print(cwd(student, teacher, temperature=2.0).round(4))
      [0.4438]

    Reference:
      Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021.
    """
    check_positive("temperature", temperature)
    check_maps(student, teacher, what="channel-wise maps")
    check_logits(student, teacher)
    log_p = _log_over_space(student, temperature)
    log_q = _log_over_space(jax.lax.stop_gradient(teacher), temperature)
    divergence = optax.losses.kl_divergence_with_log_targets(log_p, log_q)
    return temperature**2 * jnp.mean(divergence, axis=-1)


def _log_over_space(
    x: Float[Array, "b h w c"], temperature: Scalar
) -> Float32[Array, "b c pixels"]:
    channels_first = jnp.moveaxis(x, -1, 1)
    rows = channels_first.reshape(*channels_first.shape[:2], -1)
    return jax.nn.log_softmax(finite_logits(rows) / temperature, axis=-1)
