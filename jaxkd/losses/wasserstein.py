"""The penalty that keeps a Wasserstein critic smooth (WGAN-GP)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jaxkd.losses.checks import sum_per_example


def gradient_penalty(gradients: Float[Array, "b ..."]) -> Float32[Array, "b"]:
    """Squared distance of gradient norms from one (Gulrajani et al., 2017, Eq. 3).

        (||g|| - 1)^2

    Args:
      gradients: of the critic's value by its input, at points between real and made-up
        examples.

    Returns:
      float32 `[batch]`. The gradient at `g = 0` is zero.

    Example:
      >>> import jax.numpy as jnp
      >>> print(gradient_penalty(jnp.array([[3.0, 4.0], [0.0, 0.0]])))
      [16.  1.]

    Reference:
      Gulrajani et al., "Improved Training of Wasserstein GANs", NeurIPS 2017.
    """
    squares = sum_per_example(jnp.square(gradients.astype(jnp.float32)))
    positive = squares > 0
    norm = jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)
    return jnp.square(norm - 1.0)
