"""Similarities of pixels across images (CIRKD).

Each pixel has a distribution of similarity over other pixels: those of another image
of the batch, or embeddings that the teacher gave earlier and that a bank holds. The
student's distribution is compared with the teacher's; the features themselves may have
different numbers of channels where both sides compare within themselves.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Float32

from jaxkd.losses.checks import (
    Scalar,
    check_maps,
    check_mask,
    check_positive,
    keep,
)
from jaxkd.losses.unit_vectors import unit_vectors


def cirkd_minibatch(
    student: Float[Array, "b h w c"],
    teacher: Float[Array, "..."],
    *,
    temperature: Scalar = 0.1,
) -> Float32[Array, "b"]:
    """Pixel-to-pixel similarity of all pairs of images (Yang et al., 2022).

        1/B sum_j 1/(h w) sum_p KL(q_ijp || p_ijp)
        p_ijp = softmax_n(<s_ip, s_jn> / T),    q_ijp = softmax_n(<t_ip, t_jn> / T)

    with unit features `s` and `t`, for all images `j` of the whole batch including `i`
    itself. There is no factor `T^2`. Time grows with `(B h w)^2`; images `j` are taken
    one after the other and computed again for the gradient, so that memory grows with
    `B (h w)^2`.

    Args:
      student: feature map.
      teacher: feature map of the same size; channels may differ. No gradient reaches
        it.
      temperature: of both softmaxes.

    Returns:
      float32 `[batch]`, per image `i`.

    Raises:
      ValueError: an array is not a map, sizes differ, or `temperature` is not positive.

    Reference:
      Yang et al., "Cross-Image Relational Knowledge Distillation for Semantic
      Segmentation", CVPR 2022.
    """
    check_positive("temperature", temperature)
    check_maps(student, teacher, what="cross-image features")
    _check_size(student, teacher)
    pixels_s = _unit_pixels(student)
    pixels_t = _unit_pixels(jax.lax.stop_gradient(teacher))

    def log_similarity(
        anchors: Float32[Array, "b p c"], others: Float32[Array, "n c"]
    ) -> Float32[Array, "b p n"]:
        products = jnp.einsum("bpc,nc->bpn", anchors, others, precision="highest")
        return jax.nn.log_softmax(products / temperature, axis=-1)

    @jax.checkpoint
    def add_image(
        total: Float32[Array, "b"],
        image: tuple[Float32[Array, "n c"], Float32[Array, "n k"]],
    ) -> tuple[Float32[Array, "b"], None]:
        log_p = log_similarity(pixels_s, image[0])
        log_q = log_similarity(pixels_t, image[1])
        divergence = optax.losses.kl_divergence_with_log_targets(log_p, log_q)
        return total + jnp.mean(divergence, axis=-1), None

    batch = student.shape[0]
    zero = jnp.zeros(batch, jnp.float32)
    total, _ = jax.lax.scan(add_image, zero, (pixels_s, pixels_t))
    return total / batch


def cirkd_memory(
    student: Float[Array, "b h w c"],
    teacher: Float[Array, "..."],
    bank: Float[Array, "entries _"],
    *,
    contrast_temperature: Scalar = 0.1,
    temperature: Scalar = 1.0,
    where: Bool[Array, "..."] | None = None,
) -> Float32[Array, "b h w"]:
    """Similarity of every pixel to a bank of embeddings (Yang et al., 2022).

        T^2 KL(softmax(a_t / T) || softmax(a_s / T)),    a_n = <x, bank_n> / T_contrast

    with unit features `x`. The bank holds unit embeddings of the teacher, of single
    pixels or of regions.

    Args:
      student: embeddings with the teacher's number of channels.
      teacher: embeddings of the same shape; no gradient reaches them.
      bank: unit vectors; no gradient reaches them.
      contrast_temperature: of the similarities.
      temperature: softens both distributions.
      where: which pixels count; the others get 0.

    Returns:
      float32 `[batch, height, width]`.

    Raises:
      ValueError: shapes disagree, or a temperature is not positive.

    Reference:
      Yang et al., "Cross-Image Relational Knowledge Distillation for Semantic
      Segmentation", CVPR 2022.
    """
    check_positive("contrast_temperature", contrast_temperature)
    check_positive("temperature", temperature)
    check_maps(student, teacher, what="embeddings")
    if student.shape != teacher.shape or student.shape[-1] != bank.shape[-1]:
        raise ValueError(
            f"student embeddings {student.shape}, teacher embeddings {teacher.shape} "
            f"and bank {bank.shape} must agree in size and channels"
        )
    if where is not None:
        check_mask(where, student.shape[:-1], of="these embeddings")
    bank = jax.lax.stop_gradient(bank).astype(jnp.float32)

    teacher = jax.lax.stop_gradient(teacher).astype(jnp.float32)
    # Both in one product, so that equal embeddings give exactly zero.
    unit = unit_vectors(jnp.stack([student.astype(jnp.float32), teacher]))
    products = jnp.einsum("sbhwc,nc->sbhwn", unit, bank, precision="highest")
    softened = products / contrast_temperature / temperature
    log_p, log_q = jax.nn.log_softmax(softened, axis=-1)
    divergence = optax.losses.kl_divergence_with_log_targets(log_p, log_q)
    return keep(temperature**2 * divergence, where)


def _unit_pixels(x: Float[Array, "b h w c"]) -> Float32[Array, "b pixels c"]:
    batch, height, width, channels = x.shape
    return unit_vectors(x).reshape(batch, height * width, channels)


def _check_size(student: Float[Array, "..."], teacher: Float[Array, "..."]) -> None:
    if student.shape[1:3] != teacher.shape[1:3]:
        raise ValueError(
            f"student features have size {student.shape[1:3]} and teacher features "
            f"{teacher.shape[1:3]}; resize one of them first"
        )
