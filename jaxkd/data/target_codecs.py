"""How a teacher's answers are packed for storage, and unpacked inside the step.

A codec turns an array `[b, ...]` of numbers into a few arrays of fixed dtypes and
shapes, and back. Both directions are pure and run under jit, so that only the packed
arrays travel. `deviation` says how far a stored answer is from a fresh one, and how far
the format allows it to be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Integer

Packed = Mapping[str, jax.Array]
FloatDtype = Literal["float32", "float16"]
Deviation = tuple[np.ndarray, np.ndarray]


class Field(NamedTuple):
    """One packed array, for one record."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=int))


@runtime_checkable
class Codec(Protocol):
    """See the module docstring."""

    @property
    def fields(self) -> dict[str, Field]:
        """What one record is packed into."""
        ...

    def encode(self, values: Float[Array, "b ..."]) -> dict[str, jax.Array]:
        """Packs the answers of a batch."""
        ...

    def decode(self, packed: Packed) -> Float32[Array, "b ..."]:
        """Unpacks them."""
        ...

    def deviation(
        self, packed: Mapping[str, np.ndarray], values: np.ndarray
    ) -> Deviation:
        """Compares what is stored with fresh answers, on the host.

        Args:
          packed: the stored answers of a batch.
          values: fresh ones, float32 `[b, ...]`.

        Returns:
          The largest absolute difference of each record, and how large packing alone
          may make it, both `[b]`. Differences are those of the numbers (top-k: of
          log-probabilities).
        """
        ...


@dataclasses.dataclass(frozen=True)
class Full:
    """Every number, in the given dtype.

    Attributes:
      shape: of the numbers of one record.
      dtype: float32 is exact; float16 keeps 11 significant bits.
    """

    shape: tuple[int, ...]
    dtype: FloatDtype = "float32"

    @property
    def fields(self) -> dict[str, Field]:
        """The values."""
        return {"values": Field(self.dtype, self.shape)}

    def encode(self, values: Float[Array, "b ..."]) -> dict[str, jax.Array]:
        """Rounds; what float16 cannot hold becomes infinite."""
        return {"values": values.astype(self.dtype)}

    def decode(self, packed: Packed) -> Float32[Array, "b ..."]:
        """The values in float32."""
        return packed["values"].astype(jnp.float32)

    def deviation(
        self, packed: Mapping[str, np.ndarray], values: np.ndarray
    ) -> Deviation:
        """See `Codec`."""
        error = _largest(packed["values"].astype(np.float32) - values)
        return error, _rounding(self.dtype, _largest(values))


@dataclasses.dataclass(frozen=True)
class Codes:
    """One byte per number, between the least and the greatest of each record.

        codes = round((values - offset) / scale),   scale = (max - min) / 255

    `jaxkd.numerics.affine_quantize` has a whole zero point instead of the offset: it
    clips records whose numbers all have one sign, as logits may.

    Attributes:
      shape: of the numbers of one record.
    """

    shape: tuple[int, ...]

    @property
    def fields(self) -> dict[str, Field]:
        """Codes, and scale and offset of the record."""
        return {
            "codes": Field("uint8", self.shape),
            "scale": Field("float32", ()),
            "offset": Field("float32", ()),
        }

    def encode(self, values: Float[Array, "b ..."]) -> dict[str, jax.Array]:
        """Rounds to 256 levels; a record of equal numbers has scale 0."""
        wide = values.astype(jnp.float32)
        axes = tuple(range(1, wide.ndim))
        low, high = jnp.min(wide, axes), jnp.max(wide, axes)
        scale = (high - low) / 255
        divisor = _like(jnp.where(scale > 0, scale, 1.0), wide)
        codes = jnp.clip(jnp.round((wide - _like(low, wide)) / divisor), 0, 255)
        return {"codes": codes.astype(jnp.uint8), "scale": scale, "offset": low}

    def decode(self, packed: Packed) -> Float32[Array, "b ..."]:
        """`offset + scale * codes`."""
        codes = packed["codes"].astype(jnp.float32)
        return _like(packed["offset"], codes) + _like(packed["scale"], codes) * codes

    def deviation(
        self, packed: Mapping[str, np.ndarray], values: np.ndarray
    ) -> Deviation:
        """See `Codec`."""
        ones = (1,) * (values.ndim - 1)
        scale, offset = (packed[n].reshape(-1, *ones) for n in ("scale", "offset"))
        stored = offset + scale * packed["codes"].astype(np.float32)
        level = packed["scale"] / 2 + _rounding("float32", _largest(values))
        return _largest(stored - values), level


@dataclasses.dataclass(frozen=True)
class TopK:
    """The log-probabilities of the `k` largest classes, and of all others together.

    Unpacked, the others have equal shares of their mass, as in the format
    `marginal_smoothing` of `jaxkd.numerics.compressed_labels`; it is kept as a
    logarithm, because what rounded probabilities leave of 1 is mostly rounding. What
    comes back are log-probabilities: logits less a constant.

    Attributes:
      shape: of the logits of one record, classes last.
      k: classes kept.
      dtype: of the log-probabilities.

    Raises:
      ValueError: `k` leaves no other class.
    """

    shape: tuple[int, ...]
    k: int
    dtype: FloatDtype = "float32"

    def __post_init__(self) -> None:
        if not 1 <= self.k < self.shape[-1]:
            raise ValueError(
                f"top_k must be from 1 to {self.shape[-1] - 1} for {self.shape[-1]} "
                f"classes, got {self.k}"
            )

    @property
    def fields(self) -> dict[str, Field]:
        """Classes, their log-probabilities, and that of the rest."""
        *lead, classes = self.shape
        return {
            "index": Field(_index_dtype(classes), (*lead, self.k)),
            "log_probability": Field(self.dtype, (*lead, self.k)),
            "log_rest": Field(self.dtype, tuple(lead)),
        }

    def encode(self, values: Float[Array, "b ... c"]) -> dict[str, jax.Array]:
        """Keeps the largest classes, largest first; of equal ones the lower class."""
        log_probability = jax.nn.log_softmax(values.astype(jnp.float32), axis=-1)
        kept, index = jax.lax.top_k(log_probability, self.k)
        chosen = jnp.any(self._matches(index), axis=-2)
        # Not 1 minus the sum of what is kept, which would be rounding alone.
        rest = jax.scipy.special.logsumexp(log_probability, axis=-1, where=~chosen)
        least = float(jnp.finfo(self.dtype).min)
        return {
            "index": index.astype(_index_dtype(self.shape[-1])),
            "log_probability": jnp.maximum(kept, least).astype(self.dtype),
            "log_rest": jnp.maximum(rest, least).astype(self.dtype),
        }

    def decode(self, packed: Packed) -> Float32[Array, "b ... c"]:
        """Log-probabilities of all classes."""
        # Compared with every class instead of scattered: this stays on its device.
        matches = self._matches(packed["index"].astype(jnp.int32))
        kept = packed["log_probability"].astype(jnp.float32)
        values = jnp.sum(jnp.where(matches, kept[..., None], 0.0), axis=-2)
        others = self.shape[-1] - self.k
        share = packed["log_rest"].astype(jnp.float32) - float(np.log(others))
        return jnp.where(jnp.any(matches, axis=-2), values, share[..., None])

    def deviation(
        self, packed: Mapping[str, np.ndarray], values: np.ndarray
    ) -> Deviation:
        """See `Codec`.

        A class left out that is larger than one that was kept counts with the
        difference; of a rest below one millionth, the share is not compared.
        """
        index = packed["index"].astype(np.int64)
        stored = packed["log_probability"].astype(np.float32)
        fresh = values - np.max(values, axis=-1, keepdims=True)
        fresh = fresh - np.log(np.sum(np.exp(fresh), axis=-1, keepdims=True))
        at_index = np.take_along_axis(fresh, index, axis=-1)
        others = fresh.copy()
        np.put_along_axis(others, index, -np.inf, axis=-1)
        missed = np.max(others, axis=-1) - np.min(at_index, axis=-1)
        rest = np.log(np.maximum(np.sum(np.exp(others), axis=-1), 1e-30))
        log_rest = packed["log_rest"].astype(np.float32)
        error = np.maximum(_largest(stored - at_index), _largest(np.maximum(missed, 0)))
        unequal = np.where(rest > np.log(1e-6), log_rest - rest, 0.0)
        size = np.maximum(_largest(at_index), _largest(rest))
        return np.maximum(error, _largest(unequal)), _rounding(self.dtype, size)

    def _matches(self, index: Integer[Array, "b ... k"]) -> Bool[Array, "b ... k c"]:
        classes = jax.lax.broadcasted_iota(
            jnp.int32, (*index.shape, self.shape[-1]), index.ndim
        )
        return index[..., None] == classes


def _index_dtype(classes: int) -> str:
    """The narrowest unsigned integers that count the classes."""
    return next(d for d in ("uint8", "uint16", "uint32") if classes - 1 <= _top(d))


def _top(dtype: str) -> int:
    return int(np.iinfo(dtype).max)


def _like(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Shapes `[b]` so that it broadcasts against `x` without promotion."""
    return vector.reshape(vector.shape + (1,) * (x.ndim - 1))


def _largest(values: np.ndarray) -> np.ndarray:
    """The largest absolute value of each record."""
    return np.max(np.abs(values).reshape(len(values), -1), axis=-1)


def _rounding(dtype: FloatDtype, size: np.ndarray) -> np.ndarray:
    """How far numbers up to `size` may move when they are stored."""
    if dtype == "float32":
        # Nothing is lost; what is compared was rounded on the way.
        return 1e-6 * size
    # 11 significant bits, and steps of 2**-24 close to zero.
    return 2.0**-11 * size + 2.0**-25
