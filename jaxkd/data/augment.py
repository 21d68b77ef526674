"""Augmentation on the device, inside the jitted step.

`Augmentation` turns a batch as the pipeline delivers it (uint8 or float32 images) into
what networks read. Every record draws its random numbers from `(key, epoch, index)`, so
that what happens to a record depends neither on its neighbours, nor on the number of
devices or processes, nor on where a run was resumed. Mixup and CutMix alone look at the
whole batch. Order: flips, quarter turns, shifted crop, rotation, contrast, brightness,
mean and standard deviation, crop box, mixing.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array, Float, Integer, Shaped

from jaxkd.data.randaugment import rand_augment

Batch = Mapping[str, jax.Array]
Box = tuple[int, int, int, int]

# Each record draws one row of uniform numbers and each operation has its column in it,
# so that switching one on leaves the draws of the others as they were.
_FLIP_ROWS, _FLIP_COLUMNS, _QUARTERS, _SHIFT_ROWS, _SHIFT_COLUMNS = range(5)
_ANGLE, _CONTRAST, _BRIGHTNESS, _DRAWS = range(5, 9)
# Batch-wide draws are those of a record with this index, which none has; other images
# of a batch draw as if the epoch were one of these.
_WHOLE_BATCH, _STRONG, _UNLABELLED = 2**32 - 1, 2**32 - 2, 2**32 - 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class StrongView:
    """A second, strongly augmented view of every training image (RandAugment).

    Attributes:
      ops: operations applied to each image one after the other.
      magnitude: their strength; 10 is that of the full ranges.
    """

    ops: int = 2
    magnitude: float = 10.0

    def __post_init__(self) -> None:
        if self.ops < 1:
            raise ValueError(f"ops must be >= 1, got {self.ops}")
        if not 0 <= self.magnitude <= 10:
            raise ValueError(f"magnitude must be in [0, 10], got {self.magnitude}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What happens to a batch between the pipeline and the networks.

    Images of type uint8 are scaled to [0, 1]; float images pass unscaled. Values that
    come from outside the image (padding, rotation) are `fill`, and background (0) in
    dense labels. Only `mean`, `std` and `crop_box` act in evaluation.

    Attributes:
      flip: mirror with probability 1/2: "horizontal" (left-right), "vertical"
        (up-down), or "both" (each on its own coin).
      rot90: turn by k quarter turns counter-clockwise, k uniform in {0, 1, 2, 3};
        images must be square.
      pad_crop: pad by this many pixels on each side and crop the original size at a
        uniform position (the CIFAR protocol uses 4).
      rotate: turn by an angle uniform in [-rotate, rotate] degrees about the centre;
        images bilinear, dense labels nearest.
      contrast: scale the distance of each value from the image's mean by a factor
        uniform in [1 - contrast, 1 + contrast].
      brightness: add a value uniform in [-brightness, brightness]. After contrast and
        brightness, images that came as uint8 are clipped to [0, 1]; float images are
        not, because their range is their source's own.
      fill: what lies outside the image, in the units before `mean` and `std`.
      mean: subtracted from each channel; one value, or one per channel.
      std: divides each channel after `mean`; given together with it.
      crop_box: `(top, bottom, left, right)` rows and columns kept, as in
        `image[top:bottom, left:right]`; in training it is cut from the already
        flipped and turned image.
      mixup: alpha of Beta(alpha, alpha) of mixup (Zhang et al., "mixup: Beyond
        Empirical Risk Minimization", ICLR 2018); 0 is off. Classification only.
      cutmix: the same for CutMix (Yun et al., "CutMix", ICCV 2019). With both on, a
        fair coin picks one for each batch.
      strong: makes a second view of every image, `image_strong`: the same operations
        with draws of their own, and RandAugment. Classification only, without mixing;
        float images must lie in [0, 1].

    Raises:
      ValueError: an option is out of range.
    """

    flip: Literal["none", "horizontal", "vertical", "both"] = "none"
    rot90: bool = False
    pad_crop: int = 0
    rotate: float = 0.0
    contrast: float = 0.0
    brightness: float = 0.0
    fill: float = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_box: Box | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    strong: StrongView | None = None

    def __post_init__(self) -> None:
        if self.flip not in ("none", "horizontal", "vertical", "both"):
            raise ValueError(
                "flip must be 'none', 'horizontal', 'vertical' or 'both', "
                f"got {self.flip!r}"
            )
        for name in ("pad_crop", "brightness", "mixup", "cutmix"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if not 0 <= self.rotate <= 180:
            raise ValueError(f"rotate must be in [0, 180] degrees, got {self.rotate}")
        if not 0 <= self.contrast <= 1:
            raise ValueError(f"contrast must be in [0, 1], got {self.contrast}")
        for name in ("mean", "std", "crop_box"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check_normalisation()
        if self.strong is not None and (self.mixup or self.cutmix):
            raise ValueError(
                "strong excludes mixup and cutmix: they would mix one view only"
            )
        if self.crop_box is not None:
            if len(self.crop_box) != 4:
                raise ValueError(
                    "crop_box must be (top, bottom, left, right), "
                    f"got {len(self.crop_box)} values"
                )
            top, bottom, left, right = self.crop_box
            if not (0 <= top < bottom and 0 <= left < right):
                raise ValueError(
                    "crop_box must have 0 <= top < bottom and 0 <= left < right, "
                    f"got {self.crop_box}"
                )

    def _check_normalisation(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std must be given together")
        if self.mean is None or self.std is None:
            return
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(
                f"mean has {len(self.mean)} values and std {len(self.std)}; "
                "give one per channel to both"
            )
        if not all(0 < s < math.inf for s in self.std):
            raise ValueError(f"std must be > 0, got {self.std}")

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """`(mean, std)`, or None if images are not normalised."""
        if self.mean is None or self.std is None:
            return None
        return self.mean, self.std

    @property
    def views(self) -> tuple[str, ...]:
        """Further views of every training image, as `image_<view>` in the batch."""
        return () if self.strong is None else ("strong",)

    def output_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """The shape of one image after augmentation.

        Args:
          image_shape: `(height, width, channels)` as the source delivers it.

        Raises:
          ValueError: the options do not fit images of this shape.
        """
        height, width, channels = image_shape
        if self.rot90 and height != width:
            raise ValueError(
                f"rot90 needs square images, got {height}x{width}; "
                "set image_size on the data source or rot90=False"
            )
        if self.mean is not None and len(self.mean) not in (1, channels):
            raise ValueError(
                f"mean and std have {len(self.mean)} values but images have "
                f"{channels} channels"
            )
        if self.crop_box is None:
            return image_shape
        top, bottom, left, right = self.crop_box
        if bottom > height or right > width:
            raise ValueError(
                f"crop_box {self.crop_box} reaches outside images of {height}x{width}"
            )
        return bottom - top, right - left, channels

    def train(
        self,
        batch: Batch,
        *,
        key: jax.Array,
        epoch: int | jax.Array,
        num_classes: int,
    ) -> dict[str, jax.Array]:
        """Augments a training batch; pure, to be called under jit.

        Args:
          batch: `image` uint8 or float `[b, h, w, c]`, `label` integer `[b]` or
            `[b, h, w]`, `index` integer `[b]`; other entries pass unchanged, but
            `unlabelled_image` with `unlabelled_index` is augmented as `image` is.
          key: the run's key; the same at every step.
          epoch: number of the epoch.
          num_classes: length of the soft labels that mixing makes.

        Returns:
          The batch with `image` float32 and `label` int32; with mixing on, `target`
          float32 `[b, num_classes]`, where `label` keeps the record's own class; with
          a strong view, `image_strong` like `image`.

        Raises:
          ValueError: images do not fit the options, or mixing with dense labels.
          TypeError: images are neither uint8 nor floating point.
        """
        epoch_key = jax.random.fold_in(key, epoch)
        randaugment_key = jax.random.fold_in(key, _STRONG)
        if "unlabelled_image" in batch:
            # Either set may go round several times in an epoch: the draws must differ
            # between steps.
            first = batch["unlabelled_index"][0]
            epoch_key = jax.random.fold_in(epoch_key, first)
            randaugment_key = jax.random.fold_in(randaugment_key, first)
        keys = _record_keys(epoch_key, batch["index"])
        labels = batch["label"].astype(jnp.int32)
        dense = labels.ndim == 3
        # Dense labels travel as one-channel images through the same geometry.
        masks = labels[..., None] if dense else None
        images, masks = self._view(batch["image"], masks, keys)
        if masks is not None:
            labels = masks[..., 0]

        output = {**batch, "image": images, "label": labels}
        if self.strong is not None:
            if dense:
                raise ValueError(
                    "a strong view needs one label per image; leave strong out for "
                    "segmentation"
                )
            strong_key = jax.random.fold_in(epoch_key, _STRONG)
            output["image_strong"], _ = self._view(
                batch["image"],
                None,
                _record_keys(strong_key, batch["index"]),
                strong=functools.partial(
                    rand_augment,
                    key=randaugment_key,
                    epoch=epoch,
                    index=batch["index"],
                    num_ops=self.strong.ops,
                    magnitude=self.strong.magnitude,
                    fill=self.fill,
                ),
            )
        if "unlabelled_image" in batch:
            other_keys = _record_keys(
                jax.random.fold_in(epoch_key, _UNLABELLED), batch["unlabelled_index"]
            )
            output["unlabelled_image"], _ = self._view(
                batch["unlabelled_image"], None, other_keys
            )
        if self.mixup or self.cutmix:
            if dense:
                raise ValueError(
                    "mixup and cutmix need one label per image; "
                    "set both to 0 for segmentation"
                )
            batch_key = jax.random.fold_in(epoch_key, _WHOLE_BATCH)
            batch_key = jax.random.fold_in(batch_key, batch["index"][0])
            targets = batch.get("target")
            if targets is None:
                targets = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
            output["image"], output["target"] = self._mix(images, targets, batch_key)
        return output

    def evaluate(self, batch: Batch) -> dict[str, jax.Array]:
        """Prepares an evaluation batch: scale, mean and std, crop box.

        Args:
          batch: as for `train`; `index` is not read.

        Returns:
          The batch with `image` float32 and `label` int32.

        Raises:
          ValueError: images do not fit the options.
          TypeError: images are neither uint8 nor floating point.
        """
        images, _ = self._prepare(batch["image"])
        labels = batch["label"].astype(jnp.int32)
        images = crop(self._normalise(images), self.crop_box)
        if labels.ndim == 3:
            labels = crop(labels[..., None], self.crop_box)[..., 0]
        return {**batch, "image": images, "label": labels}

    def _view(
        self,
        images: jax.Array,
        masks: jax.Array | None,
        keys: jax.Array,
        strong: Callable[[jax.Array], jax.Array] | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """One augmented view of images and their dense labels."""
        images, was_uint8 = self._prepare(images)
        draws = jax.vmap(lambda key: jax.random.uniform(key, (_DRAWS,)))(keys)
        images, masks = self._geometry(images, masks, draws)
        images = self._intensity(images, draws, was_uint8)
        if strong is not None:
            images = strong(images)
        images = crop(self._normalise(images), self.crop_box)
        return images, None if masks is None else crop(masks, self.crop_box)

    def _prepare(self, images: jax.Array) -> tuple[jax.Array, bool]:
        _, height, width, channels = images.shape
        self.output_shape((height, width, channels))
        if images.dtype == jnp.uint8:
            return images.astype(jnp.float32) / 255, True
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise TypeError(f"images must be uint8 or float, got {images.dtype}")
        return images.astype(jnp.float32), False

    def _geometry(
        self, images: jax.Array, masks: jax.Array | None, draws: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        height, width = images.shape[1:3]
        both = [(images, self.fill)]
        if masks is not None:
            both.append((masks, 0.0))

        for axis, column, wanted in (
            (1, _FLIP_ROWS, ("vertical", "both")),
            (2, _FLIP_COLUMNS, ("horizontal", "both")),
        ):
            if self.flip in wanted:
                flags = draws[:, column] < 0.5
                both = [(_flip_where(x, flags, axis), fill) for x, fill in both]
        if self.rot90:
            quarters = (4 * draws[:, _QUARTERS]).astype(int)
            both = [(_turn(x, quarters), fill) for x, fill in both]
        if self.pad_crop:
            pad = self.pad_crop
            corners = draws[:, _SHIFT_ROWS : _SHIFT_COLUMNS + 1] * (2 * pad + 1)
            corners = corners.astype(int)
            both = [(_shift_crop(x, corners, pad, fill), fill) for x, fill in both]
        if self.rotate:
            angles = _symmetric(draws[:, _ANGLE], math.radians(self.rotate))
            rows, columns = _rotated_grid(angles, height, width)
            samplers = (_sample_bilinear, _sample_nearest)
            both = [
                (sample(x, rows, columns, fill), fill)
                for sample, (x, fill) in zip(samplers, both, strict=False)
            ]
        return both[0][0], (both[1][0] if masks is not None else None)

    def _intensity(self, images: jax.Array, draws: jax.Array, clip: bool) -> jax.Array:
        per_image = draws[:, :, None, None, None]
        if self.contrast:
            centre = jnp.mean(images, axis=(1, 2, 3), keepdims=True)
            factor = 1 + _symmetric(per_image[:, _CONTRAST], self.contrast)
            images = centre + (images - centre) * factor
        if self.brightness:
            images = images + _symmetric(per_image[:, _BRIGHTNESS], self.brightness)
        if clip and (self.contrast or self.brightness):
            images = jnp.clip(images, 0, 1)
        return images

    def _normalise(self, images: jax.Array) -> jax.Array:
        if self.mean is None or self.std is None:
            return images
        mean = jnp.asarray(self.mean, jnp.float32).reshape(1, 1, 1, -1)
        std = jnp.asarray(self.std, jnp.float32).reshape(1, 1, 1, -1)
        return (images - mean) / std

    def _mix(
        self, images: jax.Array, targets: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        pair_key, mixup_key, cutmix_key, box_key, coin_key = jax.random.split(key, 5)
        partners = jax.random.permutation(pair_key, images.shape[0])
        height, width = images.shape[1:3]

        # `keep` is the weight of the record itself, per pixel and for its label.
        keep_pixels, keep = jnp.ones((height, width), jnp.float32), jnp.float32(1)
        if self.mixup:
            keep = _draw_beta(mixup_key, self.mixup)
            keep_pixels = keep_pixels * keep
        if self.cutmix:
            area = 1 - _draw_beta(cutmix_key, self.cutmix)
            outside = 1 - _random_box(box_key, height, width, area)
            cut = jax.random.bernoulli(coin_key) if self.mixup else jnp.bool_(True)
            keep_pixels = jnp.where(cut, outside, keep_pixels)
            keep = jnp.where(cut, jnp.mean(outside), keep)
        keep_pixels = keep_pixels[None, :, :, None]
        # In this form a record that is its own partner stays exactly itself.
        images = images[partners] + keep_pixels * (images - images[partners])
        targets = targets[partners] + keep * (targets - targets[partners])
        return images, targets


def _record_keys(key: jax.Array, index: jax.Array) -> jax.Array:
    """A key for each record."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


def flip_image(
    image: Shaped[Array, "h w *c"], rows: int, columns: int
) -> Shaped[Array, "h w *c"]:
    """Mirrors one image: `image[::rows, ::columns]` with steps of 1 or -1.

    Raises:
      ValueError: a step is neither 1 nor -1.
    """
    if rows not in (1, -1) or columns not in (1, -1):
        raise ValueError(f"flip steps must be 1 or -1, got {rows} and {columns}")
    return image[::rows, ::columns]


def rotate_quarter(
    image: Shaped[Array, "h w *c"], quarters: int
) -> Shaped[Array, "h2 w2 *c"]:
    """Turns one image counter-clockwise by `quarters` times 90 degrees."""
    return jnp.rot90(image, quarters, axes=(0, 1))


def crop(
    images: Shaped[Array, "*b h w c"], box: Box | None
) -> Shaped[Array, "*b h2 w2 c"]:
    """Keeps rows and columns `(top, bottom, left, right)`; None keeps everything."""
    if box is None:
        return images
    top, bottom, left, right = box
    return images[..., top:bottom, left:right, :]


def _symmetric(draws: jax.Array, limit: float) -> jax.Array:
    """Uniform numbers in [0, 1) brought to [-limit, limit)."""
    return (2 * draws - 1) * limit


def _flip_where(images: jax.Array, flags: jax.Array, axis: int) -> jax.Array:
    return jnp.where(flags[:, None, None, None], jnp.flip(images, axis), images)


def _turn(
    images: Shaped[Array, "b n n c"], quarters: Integer[Array, " b"]
) -> Shaped[Array, "b n n c"]:
    """Turns each image; a half and a quarter turn chosen apart make all four."""
    half = (quarters >= 2)[:, None, None, None]
    odd = (quarters % 2 == 1)[:, None, None, None]
    images = jnp.where(half, images[:, ::-1, ::-1], images)
    return jnp.where(odd, jnp.rot90(images, axes=(1, 2)), images)


def _shift_crop(
    images: Shaped[Array, "b h w c"],
    corners: Integer[Array, "b 2"],
    pad: int,
    fill: float,
) -> Shaped[Array, "b h w c"]:
    """Pads by `fill` and cuts the window whose corner is given for each image."""
    padded = jnp.pad(
        images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), constant_values=fill
    )

    def cut(image: jax.Array, corner: jax.Array) -> jax.Array:
        start = (corner[0], corner[1], jnp.zeros_like(corner[0]))
        return jax.lax.dynamic_slice(image, start, images.shape[1:])

    return jax.vmap(cut)(padded, corners)


def _rotated_grid(
    angles: Float[Array, " b"], height: int, width: int
) -> tuple[Float[Array, "b h w"], Float[Array, "b h w"]]:
    """Where each output pixel comes from when images turn counter-clockwise."""
    rows = (jnp.arange(height) - (height - 1) / 2)[None, :, None]
    columns = (jnp.arange(width) - (width - 1) / 2)[None, None, :]
    cos, sin = jnp.cos(angles)[:, None, None], jnp.sin(angles)[:, None, None]
    return (
        cos * rows + sin * columns + (height - 1) / 2,
        cos * columns - sin * rows + (width - 1) / 2,
    )


def _sample_nearest(
    images: Shaped[Array, "b h w c"],
    rows: jax.Array,
    columns: jax.Array,
    fill: float,
) -> Shaped[Array, "b h w c"]:
    return _gather(
        images, jnp.round(rows).astype(int), jnp.round(columns).astype(int), fill
    )


def _sample_bilinear(
    images: Float[Array, "b h w c"],
    rows: jax.Array,
    columns: jax.Array,
    fill: float,
) -> Float[Array, "b h w c"]:
    top, left = jnp.floor(rows), jnp.floor(columns)
    down, right = (rows - top)[..., None], (columns - left)[..., None]
    top, left = top.astype(int), left.astype(int)
    upper = (1 - right) * _gather(images, top, left, fill)
    upper += right * _gather(images, top, left + 1, fill)
    lower = (1 - right) * _gather(images, top + 1, left, fill)
    lower += right * _gather(images, top + 1, left + 1, fill)
    return (1 - down) * upper + down * lower


def _gather(
    images: jax.Array, rows: jax.Array, columns: jax.Array, fill: float
) -> jax.Array:
    height, width = images.shape[1:3]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    rows, columns = jnp.clip(rows, 0, height - 1), jnp.clip(columns, 0, width - 1)
    values = jax.vmap(lambda image, r, c: image[r, c])(images, rows, columns)
    return jnp.where(inside[..., None], values, jnp.asarray(fill, values.dtype))


def _draw_beta(key: jax.Array, alpha: float) -> Float[Array, ""]:
    """Draws from Beta(alpha, alpha) through a table of quantiles.

    `jax.random.beta` loops over rejections and takes more than a second to compile.
    """
    levels = np.linspace(0, 1, 2049)
    quantiles = scipy.special.betaincinv(alpha, alpha, levels)
    return jnp.interp(
        jax.random.uniform(key),
        jnp.asarray(levels, jnp.float32),
        jnp.asarray(quantiles, jnp.float32),
    )


def _random_box(
    key: jax.Array, height: int, width: int, area: jax.Array
) -> Float[Array, "h w"]:
    """1 inside a box of `area` (a share) about a uniform centre, cut at the border."""
    row_key, column_key = jax.random.split(key)
    side = jnp.sqrt(area)

    def span(key: jax.Array, size: int) -> jax.Array:
        centre = jax.random.randint(key, (), 0, size)
        half = (size * side / 2).astype(jnp.int32)
        position = jnp.arange(size)
        return (position >= centre - half) & (position < centre + half)

    rows, columns = span(row_key, height), span(column_key, width)
    return (rows[:, None] & columns[None, :]).astype(jnp.float32)
