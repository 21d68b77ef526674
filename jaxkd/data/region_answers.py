"""What a teacher says of random crops of images, for labels that are stored once.

`draw_regions` draws the crops of a record, `region_probabilities` shows them to a
teacher, and `store_regions` does both for a whole data set in memory. The command's
`--mode=label` does it record by record (`jaxkd.training.region_labelling`).

Reference: Shen, Xing, "A Fast Knowledge Distillation Framework for Visual Recognition",
ECCV 2022.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Integer, Key, Num

from jaxkd.data.crops import crop_one, draw_crops
from jaxkd.data.regions import Regions
from jaxkd.data.source import Source
from jaxkd.numerics import compress_labels, kept_classes


def draw_regions(
    key: Key[Array, ""],
    record: Integer[Array, ""],
    *,
    regions: int,
    image_shape: Sequence[int],
) -> tuple[Float32[Array, "r 4"], Bool[Array, "r"]]:
    """The crops of one record, which depend on `(key, record)` alone.

    Args:
      key: random key.
      record: number of the record.
      regions: crops.
      image_shape: `(height, width, channels)`.

    Returns:
      Boxes as fractions (see `draw_crops`), float32 `[regions, 4]`, and which of them
      are mirrored, bool `[regions]`.
    """
    height, width, *_ = image_shape
    crop_key, flip_key = jax.random.split(jax.random.fold_in(key, record))
    coords = draw_crops(crop_key, 1, regions, aspect=width / height)[0]
    return coords, jax.random.bernoulli(flip_key, shape=(regions,))


def region_probabilities(
    predict: Callable[[jax.Array], jax.Array],
    images: Num[Array, "b h w c"],
    coords: Float[Array, "b r 4"],
    flip: Bool[Array, "b r"],
    *,
    size: tuple[int, int],
    chunk: int,
) -> Float32[Array, "b r classes"]:
    """The probabilities that a teacher gives to crops; pure, to be called under jit.

    Args:
      predict: from crops `[b * chunk, *size, channels]` in the dtype of the images to
        logits `[b * chunk, classes]`; the crops of one image are neighbours, so that a
        batch split over devices stays split.
      images: `[b, height, width, channels]`.
      coords: boxes of each image, as fractions.
      flip: which crops are mirrored.
      size: the teacher's input size.
      chunk: crops of each image at a time.

    Returns:
      float32 `[b, regions, classes]`.
    """
    count, regions = flip.shape
    # The last chunk is filled up, so that one program serves all.
    padded = -(-regions // chunk) * chunk
    chunks = jnp.minimum(jnp.arange(padded), regions - 1).reshape(-1, chunk)

    def cut(image: jax.Array, coords: jax.Array, flip: jax.Array) -> jax.Array:
        return jax.vmap(functools.partial(crop_one, image, size=size))(coords, flip)

    def answer(rows: jax.Array) -> jax.Array:
        crops = jax.vmap(cut)(images, coords[:, rows], flip[:, rows])
        logits = predict(crops.reshape(-1, *crops.shape[2:]))
        probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        return probabilities.reshape(count, chunk, -1)

    answers = jnp.moveaxis(jax.lax.map(answer, chunks), 0, 1)
    return answers.reshape(count, padded, -1)[:, :regions]


def store_regions(
    source: Source,
    predict: Callable[[jax.Array], jax.Array],
    *,
    regions: int,
    key: jax.Array,
    image_size: tuple[int, int],
    label_format: str = "marginal_smoothing_k5",
    batch_size: int = 50,
    records: Sequence[int] | None = None,
) -> Regions:
    """Shows random crops of every image to a teacher and keeps its soft labels.

    The crops of record i depend on `(key, i)` alone. Everything is held in memory.

    Args:
      source: images of one shape.
      predict: from crops `[batch_size, *image_size, channels]` in the dtype of the
        source to logits `[batch_size, classes]`, normalisation included; jitted here.
      regions: crops per image.
      key: random key.
      image_size: the teacher's input size.
      label_format: see `jaxkd.numerics.compressed_labels`.
      batch_size: crops per call of `predict`.
      records: the records to show; None for all.

    Returns:
      The regions, to be written by `write_regions`.

    Raises:
      ValueError: an impossible number or format, or the teacher has other classes.
    """
    for name, value in (("regions", regions), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    info = source.info
    kept_classes(label_format, info.num_classes)

    def checked(crops: jax.Array) -> jax.Array:
        logits = predict(crops)
        if logits.shape != (batch_size, info.num_classes):
            raise ValueError(
                f"predict returned logits of shape {logits.shape} for {batch_size} "
                f"crops; {info.name} has {info.num_classes} classes"
            )
        return logits

    # A program of its own: fused with what follows, a box might be rounded otherwise
    # where it is used than where it is stored.
    draw = jax.jit(
        functools.partial(
            draw_regions, key, regions=regions, image_shape=info.image_shape
        )
    )

    @jax.jit
    def label(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        (probabilities,) = region_probabilities(
            checked, *(a[None] for a in arrays), size=image_size, chunk=batch_size
        )
        return compress_labels(probabilities, label_format=label_format)

    stored = []
    for record in range(len(source)) if records is None else records:
        crops = draw(jnp.asarray(record))
        answers = label(jnp.asarray(source[record]["image"]), *crops)
        stored.append([np.asarray(a) for a in (*crops, *answers)])
    coords, flip, index, probability = (np.stack(a) for a in zip(*stored, strict=True))
    return Regions(
        coords=coords,
        flip=flip,
        index=index,
        probability=probability,
        label_format=label_format,
        num_classes=info.num_classes,
        image_shape=info.image_shape,
    )
