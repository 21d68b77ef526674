"""Contrastive losses between the embeddings of a student and those of a teacher.

Two embeddings of one record are to be close, those of records of other classes apart.
`crd` scores them against banks that remember an embedding of every record and is fed
with the records to compare; `crd_in_batch` compares the records of the batch. Both
sides' embeddings are trained, so gradients reach both: stop them at the teacher's
features, before its head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from jaxkd.losses.checks import Scalar, check_fraction, check_positive, without_classes
from jaxkd.numerics import l2_normalize

_PRECISION = jax.lax.Precision.HIGHEST


def crd(
    student: Float[Array, "b k"],
    embedding: Float[Array, "..."],
    student_bank: Float[Array, "n _"],
    bank: Float[Array, "..."],
    records: Int[Array, "_ m"],
    *,
    normalizers: tuple[Scalar, Scalar] | None = None,
    temperature: Scalar = 0.07,
    eps: float = 1e-7,
) -> Float32[Array, "b"]:
    """Contrastive representation distillation (Tian et al., 2020, section 3).

        l_i = nce(student_i, bank, Z_s) + nce(embedding_i, student_bank, Z_t)
        nce(v, M, Z) = -log(o_0 / (o_0 + c)) - sum_(k=1..K) log(K/n / (o_k + c))
        o_k = exp(M[records_ik] . v / temperature) / Z,    c = K/n + eps

    with `v` brought to unit length, `n` rows in a bank and K = m - 1 negatives: a
    binary classifier tells the record from K records drawn from noise.

    Args:
      student: embeddings `[batch, dim]`, of any length.
      embedding: those of the teacher, same shape; gradients reach them too.
      student_bank: remembered embeddings `[records, dim]` of the student, unit length.
      bank: remembered embeddings of the teacher, same shape.
      records: per example a positive and then the negatives, `[batch, 1 + K]`, as rows
        of the banks.
      normalizers: `(Z_s, Z_t)`; None takes `crd_normalizers` of this batch, which is
        what the first step of a run does. Later steps keep those.
      temperature: divides the products.
      eps: added to the noise.

    Returns:
      One float32 value per example. No gradient reaches banks or normalisers.

    Raises:
      ValueError: shapes differ, there is no negative, or `temperature` or `eps` is not
        positive.

    Reference:
      Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020.
    """
    check_positive("eps", eps)
    scores = _crd_scores(
        student, embedding, student_bank, bank, records, temperature=temperature
    )
    if normalizers is None:
        normalizers = _normalizers(scores, len(bank))
    noise = (records.shape[1] - 1) / len(bank)
    total = jnp.zeros(len(student), jnp.float32)
    for score, normalizer in zip(scores, normalizers, strict=True):
        constant = jax.lax.stop_gradient(jnp.asarray(normalizer, jnp.float32))
        # Both logarithms in terms of log o: no exp() overflows, and thousands of
        # negatives near zero are summed without cancellation.
        log_o = score - jnp.log(constant)
        positive = jax.nn.softplus(jnp.log(noise + eps) - log_o[:, 0])
        odds = log_o[:, 1:] - jnp.log(noise)
        negative = jax.nn.softplus(odds)
        negative += jnp.log1p(eps / noise * jax.nn.sigmoid(-odds))
        total += positive + jnp.sum(negative, axis=1)
    return total


def crd_normalizers(
    student: Float[Array, "b k"],
    embedding: Float[Array, "..."],
    student_bank: Float[Array, "n _"],
    bank: Float[Array, "..."],
    records: Int[Array, "_ m"],
    *,
    temperature: Scalar = 0.07,
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """The constants Z of `crd`, estimated from one batch.

        Z = n * mean_(i,k) exp(M[records_ik] . v_i / temperature)

    Args:
      student: as for `crd`.
      embedding: as for `crd`.
      student_bank: as for `crd`.
      bank: as for `crd`.
      records: as for `crd`.
      temperature: as for `crd`.

    Returns:
      `(Z_s, Z_t)`, float32 scalars without gradient.

    Raises:
      ValueError: as `crd`.
    """
    scores = _crd_scores(
        student, embedding, student_bank, bank, records, temperature=temperature
    )
    return _normalizers(scores, len(bank))


def update_bank(
    bank: Float[Array, "n k"],
    embeddings: Float[Array, "b k"],
    records: Int[Array, "b"],
    *,
    momentum: float = 0.5,
) -> Float32[Array, "n k"]:
    """Blends new embeddings into a bank.

        M[records_i] <- l2(momentum * M[records_i] + (1 - momentum) * l2(embeddings_i))

    Args:
      bank: embeddings `[records, dim]`.
      embeddings: of this batch `[batch, dim]`; no gradient is kept.
      records: their rows in the bank, each at most once.
      momentum: share of the old embedding.

    Returns:
      The new bank, float32.

    Raises:
      ValueError: `momentum` is not between 0 and 1.
    """
    check_fraction("momentum", momentum)
    bank = bank.astype(jnp.float32)
    new = l2_normalize(jax.lax.stop_gradient(embeddings).astype(jnp.float32))
    blended = momentum * bank[records] + (1 - momentum) * new
    return bank.at[records].set(l2_normalize(blended))


def crd_in_batch(
    student: Float[Array, "b k"],
    embedding: Float[Array, "..."],
    labels: Int[Array, "b"],
    *,
    temperature: Scalar = 0.07,
) -> Float32[Array, "b"]:
    """Contrast with the other classes of the batch, in place of banks.

        l_i = log sum_(j in N_i) exp(a_ij - a_ii) + log sum_(j in N_i) exp(a_ji - a_ii)
        a_ij = v_i . e_j / temperature,    N_i = {i} and all j of another class

    with the embeddings v and e brought to unit length: the InfoNCE counterpart of
    `crd`. It needs no memory and no normaliser and both members of a negative pair
    get a gradient, but it has only as many negatives as the batch has records of other
    classes; it is not a published method.

    Args:
      student: embeddings `[batch, dim]`, of any length.
      embedding: those of the teacher, same shape; gradients reach them too.
      labels: class indices `[batch]`. Records of one class are no negatives.
      temperature: divides the products.

    Returns:
      One float32 value per example; 0 for an example without negatives.

    Raises:
      ValueError: shapes differ, or `temperature` is not positive.
    """
    check_positive("temperature", temperature)
    _check_embeddings(student, embedding)
    scores = _cosines(student, embedding) / temperature
    compared = (labels[:, None] != labels[None, :]) | jnp.eye(len(labels), dtype=bool)
    scores = without_classes(scores, compared)
    own = jnp.diagonal(scores)
    rows = jax.nn.logsumexp(scores, axis=1)
    columns = jax.nn.logsumexp(scores, axis=0)
    return (rows - own) + (columns - own)


def _crd_scores(
    student: Array,
    embedding: Array,
    student_bank: Array,
    bank: Array,
    records: Array,
    *,
    temperature: Scalar,
) -> tuple[Float32[Array, "b m"], Float32[Array, "b m"]]:
    """Log-scores of the student against the teacher's bank, and the reverse."""
    check_positive("temperature", temperature)
    _check_embeddings(student, embedding)
    if student_bank.shape != bank.shape or bank.shape[1:] != student.shape[1:]:
        raise ValueError(
            f"banks must be [records, {student.shape[1]}], as embeddings are "
            f"{student.shape}; got {student_bank.shape} and {bank.shape}"
        )
    if len(records) != len(student) or records.shape[1] < 2:
        raise ValueError(
            f"records must be [{len(student)}, 1 + negatives] with a negative at "
            f"least, got shape {records.shape}"
        )

    def scores(queries: Array, bank: Array) -> Array:
        # A product with the whole bank reads it once; a gather of K rows per example
        # would copy much more, since K rows of k numbers outweigh n products.
        products = _cosines(queries, jax.lax.stop_gradient(bank), unit=False)
        return jnp.take_along_axis(products, records, axis=1) / temperature

    return scores(student, bank), scores(embedding, student_bank)


def _cosines(
    queries: Float[Array, "b k"], others: Float[Array, "n k"], *, unit: bool = True
) -> Float32[Array, "b n"]:
    queries = l2_normalize(queries.astype(jnp.float32))
    others = others.astype(jnp.float32)
    others = l2_normalize(others) if unit else others
    return jnp.matmul(queries, others.T, precision=_PRECISION)


def _normalizers(
    scores: tuple[Array, Array], records: int
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    student, teacher = (
        records * jnp.mean(jnp.exp(jax.lax.stop_gradient(score))) for score in scores
    )
    return student, teacher


def _check_embeddings(student: Array, embedding: Array) -> None:
    if student.shape != embedding.shape:
        raise ValueError(
            f"embeddings must have one shape, got student {student.shape} and teacher "
            f"{embedding.shape}"
        )
