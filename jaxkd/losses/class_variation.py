"""How far pixels lie from the centre of their class (IFVD)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Integer

from jaxkd.losses.checks import check_maps
from jaxkd.losses.unit_vectors import unit_vectors
from jaxkd.numerics import resize_nearest


def ifvd(
    student: Float[Array, "b h w c"],
    teacher: Float[Array, "..."],
    labels: Integer[Array, "_ height width"],
    *,
    num_classes: int,
) -> Float32[Array, "b h w"]:
    """Squared difference of intra-class feature variation (Wang et al., 2020).

        (M(student) - M(teacher))^2,    M(x)_p = cos(x_p, centre(class of p))

    A centre is the mean feature of a class within one image, and carries gradient.
    Labels outside `0..num_classes - 1`, such as 255, have no centre: such a pixel is
    compared with itself, in both networks, and gives 0 (unless one feature is zero).

    Args:
      student: feature map.
      teacher: feature map of the same size; channels may differ. No gradient reaches
        it.
      labels: at any resolution; resized to the maps by copying pixels.
      num_classes: classes that have centres.

    Returns:
      float32 `[batch, height, width]`, between 0 and 4.

    Raises:
      ValueError: an array is not a map, or sizes or batches differ.

    Reference:
      Wang et al., "Intra-class Feature Variation Distillation for Semantic
      Segmentation", ECCV 2020.
    """
    check_maps(student, teacher, labels[..., None], what="class variation inputs")
    if student.shape[1:3] != teacher.shape[1:3]:
        raise ValueError(
            f"student features have size {student.shape[1:3]} and teacher features "
            f"{teacher.shape[1:3]}; resize one of them first"
        )
    labels = resize_nearest(labels[..., None], student.shape[1:3])[..., 0]
    members = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    cosine_s = _cosine_with_centre(student, members)
    cosine_t = _cosine_with_centre(jax.lax.stop_gradient(teacher), members)
    return jnp.square(cosine_s - cosine_t)


def _cosine_with_centre(
    x: Float[Array, "b h w c"], members: Float32[Array, "b h w k"]
) -> Float32[Array, "b h w"]:
    x = x.astype(jnp.float32)
    count = jnp.sum(members, axis=(1, 2))[..., None] + 1e-6
    sums = jnp.einsum("bhwk,bhwc->bkc", members, x, precision="highest")
    centres = jnp.einsum("bhwk,bkc->bhwc", members, sums / count, precision="highest")
    labelled = jnp.any(members > 0, axis=-1, keepdims=True)
    centres = jnp.where(labelled, centres, x)
    return jnp.sum(unit_vectors(x, eps=1e-8) * unit_vectors(centres, eps=1e-8), axis=-1)
