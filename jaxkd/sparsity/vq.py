"""Vector-quantised kernels: low-rank sub-vectors, a codebook, and codes.

A kernel is cut into sub-vectors of `size` numbers, row by row of `[outputs, inputs,
height, width]`. Each of them is `z P` with a low-rank representation `z` of `dim`
numbers and a projection `P` of the layer; the `z` are replaced by the nearest of
`clusters` codewords. What is kept is one code per sub-vector, the codebook and `P`
(`jaxkd.sparsity.vq_file` writes them). Zhu, Zhou and Zhong, LR^2VQ, 2022; it comes
without code, and what its abstract leaves open follows differentiable k-means (Cho,
Alizadeh-Vahid, Adya and Rastegari, DKM, ICLR 2022).

It makes files small, not computation fast: networks compute with the dense kernels that
the codes stand for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxkd.compression import After, Arrays, Compression, State, register
from jaxkd.registry import check_options
from jaxkd.sparsity.masks import Scope

_KMEANS_ROUNDS = 25
_STORED = jnp.float16
_STORED_BITS = 16
_FLOAT_BITS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantizer:
    """How sub-vectors become codewords.

    Attributes:
      size: numbers in a sub-vector (`m`).
      dim: numbers in its low-rank representation; `size` is plain vector quantisation,
        without a projection.
      clusters: codewords in each codebook (`k`); None leaves the representation as it
        is, which trains it before it is quantised.
      temperature: of the attention of representations to codewords, relative to their
        root mean square norm, so that layers of every scale are alike.
      iterations: rounds of differentiable k-means from the learned codebook on.

    Raises:
      ValueError: an impossible value.
    """

    size: int = 8
    dim: int = 4
    clusters: int | None = 256
    temperature: float = 0.05
    iterations: int = 1

    def __post_init__(self) -> None:
        """Checks the options."""
        if self.size < 1:
            raise ValueError(f"size must be >= 1, got {self.size}")
        if not 1 <= self.dim <= self.size:
            raise ValueError(f"dim must be from 1 to size {self.size}, got {self.dim}")
        if self.clusters is not None and self.clusters < 2:
            raise ValueError(f"clusters must be >= 2 or None, got {self.clusters}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature must be > 0 and finite, got {self.temperature}"
            )
        if self.iterations < 0:
            raise ValueError(f"iterations must be >= 0, got {self.iterations}")

    def bits(self, shape: Sequence[int]) -> int:
        """Bits that a kernel of a shape takes.

        `n ceil(log2 k)` of codes, `16 k dim` of the codebook and `16 dim size` of the
        projection; without clusters, 16 for each number of the factors.
        """
        count = -(-math.prod(shape) // self.size)
        projection = _STORED_BITS * self.dim * self.size * (self.dim < self.size)
        if self.clusters is None:
            return _STORED_BITS * count * self.dim + projection
        codebook = _STORED_BITS * self.clusters * self.dim
        return count * code_bits(self.clusters) + codebook + projection

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a kernel gets smaller, and has more sub-vectors than codewords."""
        count = -(-math.prod(shape) // self.size)
        if self.bits(shape) >= _FLOAT_BITS * math.prod(shape) or count < self.dim:
            return False
        return self.clusters is None or count > self.clusters


@register()
def lr2vq(
    *,
    size: int = 8,
    dim: int = 4,
    clusters: int | None = 256,
    temperature: float = 0.05,
    iterations: int = 1,
    hard_from: float = 0.5,
    scope: Mapping[str, Any] | None = None,
) -> Compression:
    """Low-rank representations with vector quantisation, trained end to end.

    Representations, projection and codebook are learned. They begin with the kernel:
    its best low-rank factors, and k-means. At first the network computes with soft
    assignments, so that all of them get gradients; from `hard_from` on it computes with
    the kernels that are stored, rounded to 16 bits, and the gradients are still those
    of the soft ones. The network's own kernel gets no gradient; it holds what the
    network computes with, so that other networks and stages can start from it.

    To train the representation before it is quantised, as the paper does, let one
    network with `clusters=None` start from the float one, and another from that.

    Facts in the log: `bits_per_number` of the quantised kernels as they are stored, and
    `gap`, how far the soft kernels are from the stored ones, relative to their norm.

    Args:
      size: see `Quantizer`.
      dim: see `Quantizer`.
      clusters: see `Quantizer`.
      temperature: see `Quantizer`.
      iterations: see `Quantizer`.
      hard_from: the share of the stage after which it computes with stored kernels.
      scope: which kernels; options of `jaxkd.sparsity.masks.Scope`. Of these, kernels
        stay as they are that would not get smaller, or have no more sub-vectors than
        there are codewords.

    Raises:
      ValueError: an impossible value.
    """
    if not 0 <= hard_from <= 1:
        raise ValueError(f"hard_from must be in [0, 1], got {hard_from}")
    quantizer = Quantizer(
        size=size,
        dim=dim,
        clusters=clusters,
        temperature=temperature,
        iterations=iterations,
    )
    options = dict(scope or {})
    check_options(Scope, options, "scope")
    chosen = Scope(**options)

    def init(key: jax.Array, params: Arrays) -> tuple[Arrays, State]:
        shapes = chosen.select(params)
        fitting = {path: s for path, s in shapes.items() if quantizer.fits(s)}
        if not fitting:
            largest = max(math.prod(shape) for shape in shapes.values())
            raise ValueError(
                f"no kernel gets smaller with size {size}, dim {dim} and clusters "
                f"{clusters}: the largest has {largest} numbers; take fewer clusters"
            )
        learned: Arrays = {}
        for i, path in enumerate(fitting):
            parts = factors(params[path], quantizer, jax.random.fold_in(key, i))
            learned.update({f"{path}/{name}": x for name, x in parts.items()})
        return learned, {"hard": jnp.asarray(hard_from == 0)}

    def effective(learned: Arrays, state: State, params: Arrays) -> Arrays:
        new = dict(params)
        for path, parts in by_kernel(learned).items():
            soft, stored = kernels(parts, quantizer, params[path].shape)
            new[path] = _straight_through(soft, jnp.where(state["hard"], stored, soft))
        return new

    def update(learned: Arrays, state: State, after: After) -> tuple[Arrays, State]:
        hard = after.step + 1 >= hard_from * after.total_steps
        state = {"hard": state["hard"] | hard}
        return effective(learned, state, after.params), state

    def facts(learned: Arrays, state: State, params: Arrays) -> Arrays:
        del state
        bits, numbers, gap, norm = 0, 0, jnp.zeros(()), jnp.zeros(())
        for path, parts in by_kernel(learned).items():
            shape = params[path].shape
            soft, stored = kernels(parts, quantizer, shape)
            bits, numbers = bits + quantizer.bits(shape), numbers + math.prod(shape)
            gap = gap + jnp.sum(jnp.square(soft - stored))
            norm = norm + jnp.sum(jnp.square(stored))
        tiny = jnp.finfo(jnp.float32).tiny
        return {
            "bits_per_number": jnp.float32(bits / numbers),
            "gap": jnp.sqrt(gap / jnp.maximum(norm, tiny)),
        }

    return Compression(init=init, effective=effective, update=update, facts=facts)


# ------------------------------------------------------------------- kernels and parts


def to_vectors(kernel: jax.Array, size: int) -> jax.Array:
    """The sub-vectors `[n, size]` of a kernel `[..., inputs, outputs]`.

    Row by row of `[outputs, inputs, ...]`, so that a sub-vector has consecutive inputs
    of one output, each with all its taps; padded with zeros.
    """
    first = jnp.transpose(kernel, _outputs_first(kernel.ndim)).reshape(-1)
    return jnp.pad(first, (0, -first.size % size)).reshape(-1, size)


def from_vectors(vectors: jax.Array, shape: Sequence[int]) -> jax.Array:
    """The kernel of a shape from its sub-vectors, without padding."""
    order = _outputs_first(len(shape))
    flat = vectors.reshape(-1)[: math.prod(shape)]
    back = sorted(range(len(shape)), key=lambda axis: order[axis])
    return jnp.transpose(flat.reshape([shape[axis] for axis in order]), back)


def _outputs_first(ndim: int) -> tuple[int, ...]:
    return (ndim - 1, ndim - 2, *range(ndim - 2))


def factors(kernel: jax.Array, quantizer: Quantizer, key: jax.Array) -> Arrays:
    """What is learned of a kernel, from the kernel.

    Args:
      kernel: `[..., inputs, outputs]`.
      quantizer: how it is cut.
      key: of k-means.

    Returns:
      `z` `[n, dim]`; `projection` `[dim, size]` unless `dim` is `size`; `codebook`
      `[clusters, dim]` if there are clusters.
    """
    parts: Arrays = {"z": to_vectors(kernel, quantizer.size)}
    if quantizer.dim < quantizer.size:
        _, _, rows = jnp.linalg.svd(parts["z"], full_matrices=False)
        parts["projection"] = rows[: quantizer.dim]
        parts["z"] = parts["z"] @ parts["projection"].T
    if quantizer.clusters is not None:
        parts["codebook"] = kmeans(parts["z"], quantizer.clusters, key)
    return parts


def by_kernel(learned: Arrays) -> dict[str, Arrays]:
    """The parts of each kernel, by the kernel's path."""
    found: dict[str, Arrays] = {}
    for path, x in learned.items():
        kernel, _, part = path.rpartition("/")
        found.setdefault(kernel, {})[part] = x
    return found


def kernels(
    parts: Arrays, quantizer: Quantizer, shape: Sequence[int]
) -> tuple[jax.Array, jax.Array]:
    """The kernel by soft assignments, and the one that is stored.

    Args:
      parts: see `factors`.
      quantizer: how it is cut.
      shape: of the kernel.
    """
    z, projection = parts["z"], parts.get("projection")
    if "codebook" not in parts:
        return decode(z, projection, shape), decode(_half(z), _half(projection), shape)
    codebook = refined(z, parts["codebook"], quantizer)
    soft = attention(z, codebook, _scaled(z, quantizer)) @ codebook
    stored = _half(codebook)
    codes = nearest(z, stored)
    return (
        decode(soft, projection, shape),
        decode(stored[codes], _half(projection), shape),
    )


def decode(
    vectors: jax.Array, projection: jax.Array | None, shape: Sequence[int]
) -> jax.Array:
    """The kernel of representations `[n, dim]`."""
    if projection is not None:
        vectors = vectors @ projection
    return from_vectors(vectors, shape)


def _half(x: Any) -> Any:
    """The numbers as they are stored, in 16 bits."""
    return None if x is None else x.astype(_STORED).astype(x.dtype)


@jax.custom_vjp
def _straight_through(soft: jax.Array, value: jax.Array) -> jax.Array:
    """`value`, with the gradient of `soft`."""
    del soft
    return value


_straight_through.defvjp(
    lambda soft, value: (value, None), lambda _, g: (g, jnp.zeros_like(g))
)


# --------------------------------------------------------------------------- clustering


def code_bits(clusters: int) -> int:
    """Bits of one code: `ceil(log2 k)`."""
    return max((clusters - 1).bit_length(), 1)


def squared_distances(z: jax.Array, codebook: jax.Array) -> jax.Array:
    """`||z - c||^2`, `[n, k]`, of `[n, dim]` and `[k, dim]`; never below 0."""
    products = jnp.matmul(z, codebook.T, precision="highest")
    norms = jnp.sum(jnp.square(z), 1)[:, None] + jnp.sum(jnp.square(codebook), 1)[None]
    return jnp.maximum(norms - 2 * products, 0)


def nearest(z: jax.Array, codebook: jax.Array) -> jax.Array:
    """The nearest codeword of each representation, of ties the first: int32 `[n]`."""
    return jnp.argmin(squared_distances(z, codebook), axis=1).astype(jnp.int32)


def moved(z: jax.Array, codes: jax.Array, codebook: jax.Array) -> jax.Array:
    """The codebook of the means of what has each code; one without any stays.

    Args:
      z: `[n, dim]`.
      codes: `[n]`.
      codebook: `[k, dim]`.
    """
    sums = jnp.zeros_like(codebook).at[codes].add(z)
    counts = jnp.zeros(len(codebook), z.dtype).at[codes].add(1)[:, None]
    return jnp.where(counts > 0, sums / jnp.maximum(counts, 1), codebook)


def kmeans(
    z: jax.Array, clusters: int, key: jax.Array, *, rounds: int = _KMEANS_ROUNDS
) -> jax.Array:
    """Lloyd's algorithm from representations drawn far from each other (k-means++).

    Args:
      z: `[n, dim]`.
      clusters: how many.
      key: of the draws.
      rounds: how many.

    Returns:
      The codebook, `[clusters, dim]`.
    """
    first, rest = jax.random.split(key)
    start = jnp.zeros((clusters, z.shape[1]), z.dtype)
    start = start.at[0].set(z[jax.random.randint(first, (), 0, len(z))])

    def draw(i: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        found, squares = carry
        last = jnp.sum(jnp.square(z - found[i - 1][None]), axis=1)
        squares = jnp.minimum(squares, last)
        # Where everything is a codeword already the logits are all equal.
        logits = jnp.log(jnp.maximum(squares, jnp.finfo(z.dtype).tiny))
        new = jax.random.categorical(jax.random.fold_in(rest, i), logits)
        return found.at[i].set(z[new]), squares

    far = jnp.full(len(z), jnp.inf, z.dtype)
    start, _ = jax.lax.fori_loop(1, clusters, draw, (start, far))
    return jax.lax.fori_loop(0, rounds, lambda _, c: moved(z, nearest(z, c), c), start)


def attention(
    z: jax.Array, codebook: jax.Array, temperature: float | jax.Array
) -> jax.Array:
    """`softmax(-||z - c|| / temperature)` over codewords, `[n, k]`."""
    squares = squared_distances(z, codebook)
    # The root has no derivative at 0, where a representation is a codeword.
    tiny = jnp.finfo(squares.dtype).tiny
    inside = squares > tiny
    distances = jnp.where(inside, jnp.sqrt(jnp.where(inside, squares, 1)), 0)
    return jax.nn.softmax(-distances / temperature, axis=1)


def softly_moved(
    z: jax.Array, codebook: jax.Array, temperature: float | jax.Array
) -> jax.Array:
    """One round of differentiable k-means: `(A^T z) / column sums of A`.

    A codeword that nothing attends to stays.
    """
    shares = attention(z, codebook, temperature)
    sums = jnp.sum(shares, axis=0)[:, None]
    attended = sums > jnp.finfo(sums.dtype).eps
    return jnp.where(attended, shares.T @ z / jnp.where(attended, sums, 1), codebook)


def refined(z: jax.Array, codebook: jax.Array, quantizer: Quantizer) -> jax.Array:
    """The codebook after the rounds of differentiable k-means."""
    for _ in range(quantizer.iterations):
        codebook = softly_moved(z, codebook, _scaled(z, quantizer))
    return codebook


def _scaled(z: jax.Array, quantizer: Quantizer) -> jax.Array:
    """The temperature in the units of the representations; no gradient goes here."""
    square = jnp.mean(jnp.sum(jnp.square(jax.lax.stop_gradient(z)), axis=1))
    tiny = jnp.finfo(z.dtype).tiny
    return quantizer.temperature * jnp.sqrt(jnp.maximum(square, tiny))
