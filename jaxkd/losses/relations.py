"""Losses between the relations of the examples of a batch.

What is compared is how examples lie to each other: similarities, distances, angles.
Student and teacher may therefore differ in shape; only the batch is common. All but
`cc` have one value per anchor, the example whose relations to the others it sums up. A
batch of one has no relations: its loss is 0.

Products are taken at the highest precision: these losses are differences of nearly
equal similarities, which the short mantissas of fast matrix units would drown.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Float32

from jaxkd.losses.checks import check_positive
from jaxkd.numerics import l2_normalize

_PRECISION = jax.lax.Precision.HIGHEST


def sp(
    student: Float[Array, "b ..."], teacher: Float[Array, "..."]
) -> Float32[Array, "b"]:
    """Similarity-preserving loss (Tung and Mori, 2019).

        l_i = sum_j (G_t - G_s)_ij^2 / b,    G = l2(F F^T) row by row

    with the examples, flattened, as rows of F.

    Args:
      student: features `[batch, ...]` of any shape.
      teacher: features `[batch, ...]` of any other shape; no gradient reaches them.

    Returns:
      One float32 value per anchor.

    Raises:
      ValueError: the batches differ.

    Example:
      >>> import jax.numpy as jnp
      >>> student = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> teacher = jnp.array([[1.0], [1.0]])
      >>> print(sp(student, teacher).round(4))
      [0.2929 0.2929]

    Reference:
      Tung, Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019.
    """
    student, teacher = _examples(student, teacher)
    if len(student) < 2:
        return _nothing(student)
    difference = l2_normalize(_products(teacher)) - l2_normalize(_products(student))
    return jnp.mean(jnp.square(difference), axis=1)


def cc(
    student: Float[Array, "b k"], embedding: Float[Array, "..."]
) -> Float32[Array, "b"]:
    """Correlation congruence of consecutive examples (Peng et al., 2019, code).

        l_i = b / (b - 1) * sum_k |s - e|_ik |s - e|_(i+1)k,    l_b = 0

    This is what the published tables were computed with. It multiplies the errors of
    neighbours in the batch, so it depends on the order of the examples, and it does not
    compare correlations; `cc_rbf` does.

    Args:
      student: embeddings `[batch, dim]`.
      embedding: those of the teacher, same shape. Gradients reach both: the teacher's
        embedding is trained too, and the caller stops them at its input.

    Returns:
      One float32 value per example; the last is 0.

    Raises:
      ValueError: the shapes differ.

    Reference:
      Peng et al., "Correlation Congruence for Knowledge Distillation", ICCV 2019 (loss
      of the CRD authors' benchmark).
    """
    _check_same_width(student, embedding)
    student, embedding = student.astype(jnp.float32), embedding.astype(jnp.float32)
    count = len(student)
    if count < 2:
        return _nothing(student)
    errors = jnp.abs(student - embedding)
    pairs = jnp.sum(errors[:-1] * errors[1:], axis=1)
    return jnp.pad(pairs * (count / (count - 1)), (0, 1))


def cc_rbf(
    student: Float[Array, "b ..."],
    teacher: Float[Array, "..."],
    *,
    gamma: float = 0.4,
    order: int = 2,
) -> Float32[Array, "b"]:
    """Correlation congruence under a Gaussian kernel (Peng et al., 2019).

        l_i = mean_j (C_t - C_s)_ij^2
        C_ij = exp(-2 gamma) sum_(p <= order) (2 gamma)^p / p! (u_i . u_j)^p

    with examples u of unit length: the Taylor series of `exp(-gamma |u_i - u_j|^2)`.

    Args:
      student: features `[batch, ...]` of any shape.
      teacher: features `[batch, ...]` of any other shape; no gradient reaches them.
      gamma: inverse squared width of the kernel.
      order: the last term of the series.

    Returns:
      One float32 value per anchor.

    Raises:
      ValueError: the batches differ, `gamma` is not positive or `order` below 1.

    Reference:
      Peng et al., "Correlation Congruence for Knowledge Distillation", ICCV 2019.
    """
    check_positive("gamma", gamma)
    check_positive("order", order)
    student, teacher = _examples(student, teacher)
    if len(student) < 2:
        return _nothing(student)

    def correlations(x: Float32[Array, "b d"]) -> Float32[Array, "b b"]:
        cosines = _products(l2_normalize(x))
        series = [(2 * gamma) ** p / math.factorial(p) for p in range(order, -1, -1)]
        return math.exp(-2 * gamma) * jnp.polyval(jnp.array(series), cosines)

    difference = correlations(teacher) - correlations(student)
    return jnp.mean(jnp.square(difference), axis=1)


def rkd_distance(
    student: Float[Array, "b ..."], teacher: Float[Array, "..."], *, eps: float = 1e-12
) -> Float32[Array, "b"]:
    """Distance-wise relational distillation (Park et al., 2019).

        l_i = mean_j huber(d_s,ij - d_t,ij)
        d_ij = max(|x_i - x_j|^2, eps)^1/2 / mean of all d_ij with i != j,  d_ii = 0

    The mean over the student's distances carries a gradient, and the mean over `j`
    includes `i`.

    Args:
      student: features `[batch, ...]` of any shape.
      teacher: features `[batch, ...]` of any other shape; no gradient reaches them.
      eps: lower bound of the squared distance of two examples. Equal ones get no
        gradient.

    Returns:
      One float32 value per anchor.

    Raises:
      ValueError: the batches differ, or `eps` is not positive.

    Reference:
      Park et al., "Relational Knowledge Distillation", CVPR 2019.
    """
    check_positive("eps", eps)
    student, teacher = _examples(student, teacher)
    count = len(student)
    if count < 2:
        return _nothing(student)

    def distances(x: Float32[Array, "b d"]) -> Float32[Array, "b b"]:
        squares = jnp.sum(jnp.square(_differences(x)), axis=-1)
        apart = jnp.sqrt(jnp.maximum(squares, eps)) * (1.0 - jnp.eye(count))
        return apart / (jnp.sum(apart) / (count * (count - 1)))

    errors = optax.losses.huber_loss(distances(student), distances(teacher))
    return jnp.mean(errors, axis=1)


def rkd_angle(
    student: Float[Array, "b ..."], teacher: Float[Array, "..."]
) -> Float32[Array, "b"]:
    """Angle-wise relational distillation (Park et al., 2019).

        l_i = mean_jk huber(cos_s,ijk - cos_t,ijk)
        cos_ijk = u_ij . u_ik,    u_ij = l2(x_j - x_i)

    over all triples, those with equal members included (their cosine is 0 or 1).

    Args:
      student: features `[batch, ...]` of any shape.
      teacher: features `[batch, ...]` of any other shape; no gradient reaches them.

    Returns:
      One float32 value per anchor. Each side takes `batch^2 (batch + features)`
      numbers on the way.

    Raises:
      ValueError: the batches differ.

    Reference:
      Park et al., "Relational Knowledge Distillation", CVPR 2019.
    """
    student, teacher = _examples(student, teacher)
    if len(student) < 2:
        return _nothing(student)

    def cosines(x: Float32[Array, "b d"]) -> Float32[Array, "b b b"]:
        units = l2_normalize(_differences(x))
        return jnp.einsum("ijd,ikd->ijk", units, units, precision=_PRECISION)

    errors = optax.losses.huber_loss(cosines(student), cosines(teacher))
    return jnp.mean(errors, axis=(1, 2))


def pkt(
    student: Float[Array, "b ..."], teacher: Float[Array, "..."], *, eps: float = 1e-7
) -> Float32[Array, "b"]:
    """Probabilistic knowledge transfer (Passalis and Tefas, 2018).

        l_i = mean_j p_t,ij log((p_t,ij + eps) / (p_s,ij + eps))
        p_ij = (1 + cos_ij) / sum_k (1 + cos_ik)

    The mean over `j` makes it `batch` times smaller than a divergence, which the usual
    factor of 30000 makes up for.

    Args:
      student: features `[batch, ...]` of any shape.
      teacher: features `[batch, ...]` of any other shape; no gradient reaches them.
      eps: added to probabilities, and to the norms that divide in the cosine.

    Returns:
      One float32 value per anchor.

    Raises:
      ValueError: the batches differ, or `eps` is not positive.

    Reference:
      Passalis, Tefas, "Learning Deep Representations with Probabilistic Knowledge
      Transfer", ECCV 2018.
    """
    check_positive("eps", eps)
    student, teacher = _examples(student, teacher)
    if len(student) < 2:
        return _nothing(student)

    def probabilities(x: Float32[Array, "b d"]) -> Float32[Array, "b b"]:
        squares = jnp.sum(jnp.square(x), axis=1, keepdims=True)
        norms = jnp.sqrt(jnp.where(squares > 0, squares, 1.0))
        unit = x / (jnp.where(squares > 0, norms, 0.0) + eps)
        # Rounding brings opposed vectors below a cosine of -1, and log to NaN.
        similar = jnp.maximum(_products(unit) + 1.0, 0.0)
        return similar / jnp.sum(similar, axis=1, keepdims=True)

    p, q = probabilities(student), probabilities(teacher)
    return jnp.mean(q * (jnp.log(q + eps) - jnp.log(p + eps)), axis=1)


def _examples(
    student: Float[Array, "b ..."], teacher: Float[Array, "..."]
) -> tuple[Float32[Array, "b ds"], Float32[Array, "b dt"]]:
    """Both sides as float32 rows, the teacher's behind a stop-gradient."""
    if student.ndim < 2 or teacher.ndim < 2 or len(student) != len(teacher):
        raise ValueError(
            f"features must be [batch, ...] with one batch size, got student "
            f"{student.shape} and teacher {teacher.shape}"
        )
    teacher = jax.lax.stop_gradient(teacher)
    count = len(student)
    return (
        student.reshape(count, -1).astype(jnp.float32),
        teacher.reshape(count, -1).astype(jnp.float32),
    )


def _check_same_width(student: Array, embedding: Array) -> None:
    if student.shape != embedding.shape:
        raise ValueError(
            f"embeddings must have one shape, got student {student.shape} and teacher "
            f"{embedding.shape}; bring both to one width first"
        )


def _nothing(student: Float32[Array, "b d"]) -> Float32[Array, "b"]:
    return jnp.zeros(len(student), jnp.float32)


def _products(x: Float32[Array, "b d"]) -> Float32[Array, "b b"]:
    return jnp.matmul(x, x.T, precision=_PRECISION)


def _differences(x: Float32[Array, "b d"]) -> Float32[Array, "b b d"]:
    """`x_j - x_i` at `[i, j]`."""
    return x[None, :, :] - x[:, None, :]
