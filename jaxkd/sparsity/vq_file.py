"""Vector-quantised kernels on disk: packed codes, codebooks and projections.

One `.npz` file holds for every kernel `<path>/codes` (as many bits each as the codebook
needs, packed into bytes), `<path>/codebook` and `<path>/projection` (float16), and
`<path>/shape`. Read back, it gives the kernels that the network computed with.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd.compression import Arrays
from jaxkd.sparsity import vq


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coded:
    """A kernel as it is stored.

    Attributes:
      codes: of each sub-vector, int32 `[n]`.
      codebook: float16 `[clusters, dim]`.
      projection: float16 `[dim, size]`; None in plain vector quantisation.
      shape: of the kernel.
    """

    codes: np.ndarray
    codebook: np.ndarray
    projection: np.ndarray | None
    shape: tuple[int, ...]

    def kernel(self) -> jax.Array:
        """The kernel, float32."""
        codebook = jnp.asarray(self.codebook, jnp.float32)
        projection = None
        if self.projection is not None:
            projection = jnp.asarray(self.projection, jnp.float32)
        return vq.decode(codebook[self.codes], projection, self.shape)


def coded(
    learned: Arrays, quantizer: vq.Quantizer, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Coded]:
    """What is stored of every kernel, by path.

    Args:
      learned: what `lr2vq` learned, `"<path>/z"` and so on.
      quantizer: its options.
      shapes: of the kernels, by path.

    Raises:
      ValueError: the representation is not quantised.
    """
    found = {}
    for path, parts in vq.by_kernel(learned).items():
        if "codebook" not in parts:
            raise ValueError(f"{path} has no codebook; train it with clusters first")
        codebook = vq.refined(parts["z"], parts["codebook"], quantizer)
        stored = np.asarray(codebook, np.float16)
        projection = parts.get("projection")
        codes = vq.nearest(parts["z"], jnp.asarray(stored, jnp.float32))
        found[path] = Coded(
            codes=np.asarray(codes),
            codebook=stored,
            projection=None
            if projection is None
            else np.asarray(projection, np.float16),
            shape=tuple(shapes[path]),
        )
    return found


def save(path: Path, kernels: Mapping[str, Coded]) -> int:
    """Writes kernels to an `.npz` file.

    Args:
      path: of the file.
      kernels: by their paths.

    Returns:
      Bytes of codes, codebooks and projections; the file has names, shapes and
      headers besides.
    """
    arrays, size = {}, 0
    for name, one in kernels.items():
        parts = {
            "codes": pack(one.codes, vq.code_bits(len(one.codebook))),
            "codebook": one.codebook,
        }
        if one.projection is not None:
            parts["projection"] = one.projection
        size += sum(x.nbytes for x in parts.values())
        parts["shape"] = np.asarray(one.shape, np.int32)
        arrays.update({f"{name}/{part}": x for part, x in parts.items()})
    with open(path, "wb") as file:
        np.savez(file, **arrays)
    return size


def load(path: Path) -> dict[str, Coded]:
    """Reads kernels from a file that `save` wrote.

    Raises:
      ValueError: it holds something else.
    """
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    names = [n.removesuffix("/codes") for n in arrays if n.endswith("/codes")]
    if not names:
        raise ValueError(f"{path} holds no vector-quantised kernels")
    found = {}
    for name in names:
        codebook = arrays[f"{name}/codebook"]
        shape = tuple(int(n) for n in arrays[f"{name}/shape"])
        projection = arrays.get(f"{name}/projection")
        size = (codebook if projection is None else projection).shape[1]
        count = -(-math.prod(shape) // size)
        bits = vq.code_bits(len(codebook))
        found[name] = Coded(
            codes=unpack(arrays[f"{name}/codes"], bits, count),
            codebook=codebook,
            projection=projection,
            shape=shape,
        )
    return found


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes in `bits` bits each, the highest first, in bytes; zeros at the end.

    Args:
      codes: integers >= 0 and below `2 ** bits`, `[n]`.
      bits: of each.
    """
    places = np.arange(bits - 1, -1, -1)
    return np.packbits((codes[:, None] >> places & 1).astype(np.uint8))


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first `count` codes of `pack`, int32."""
    single = np.unpackbits(packed, count=bits * count).reshape(count, bits)
    return single.astype(np.int32) @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int32))
