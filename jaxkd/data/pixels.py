"""Decoding image and mask files, and resizing.

Files are converted on purpose, never by accident of the decoder:

* EXIF orientation is applied, so pixels lie as a viewer shows them.
* Images: a palette becomes its colours; transparency is dropped (the stored colours
  stay); 16 bits become 8 by dividing by 257, so that white stays white; bilevel becomes
  0 and 255. 32-bit and float images are refused. One wanted channel is the luma of
  colours (ITU-R 601), three are the grey value three times.
* Masks: the stored number is what counts: grey value (8 or 16 bits), bit, or palette
  index. A palette of nothing but greys stands for its grey values, because encoders
  renumber palettes; for that reason colour palettes in GIF are refused, as are colour
  masks whose channels differ, and 16 bits in several channels, of which Pillow keeps 8.
* Files of several frames or pages are refused. The previews that cameras append to a
  JPEG do not count.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, TiffImagePlugin

from jaxkd.data.source import DamagedFileError

EXTENSIONS = frozenset(
    ".png .jpg .jpeg .bmp .gif .tif .tiff .webp .pbm .pgm .ppm".split()
)


def read_image(path: str | Path, channels: int) -> np.ndarray:
    """Decodes an image file.

    Args:
      path: the file.
      channels: 1 or 3.

    Returns:
      uint8 `[h, w, channels]`.

    Raises:
      DamagedFileError: the file cannot be decoded or has an unsupported pixel type.
    """
    with _decoded(path) as (image, _):
        if image.mode.startswith("I;16") or image.mode == "I":
            pixels = np.asarray(image).astype(np.int64)
            if pixels.min() < 0 or pixels.max() > 65535:
                raise DamagedFileError(path, "32-bit images are not supported")
            grey = Image.fromarray(np.rint(pixels / 257).astype(np.uint8))
        elif image.mode == "F":
            raise DamagedFileError(
                path, "float images are not supported here (use npz or nifti)"
            )
        elif image.mode in ("P", "PA"):
            # By way of RGBA, because palettes may carry transparency.
            grey = image.convert("RGBA").convert("RGB")
        else:
            grey = image
        return _with_channels(grey, channels)


def read_mask(path: str | Path, *, white: int = 1) -> np.ndarray:
    """Decodes a mask file.

    Args:
      path: the file.
      white: the number of the set bits in a file of one bit per pixel.

    Returns:
      The stored numbers, int32 `[h, w]`.

    Raises:
      DamagedFileError: the file cannot be decoded, or is a colour or float image.
    """
    with _decoded(path) as (image, is_deep):
        if is_deep and not image.mode.startswith(("I", "F")):
            raise DamagedFileError(
                path, "masks of 16 bits must have one channel, this one has several"
            )
        if image.mode == "1":
            return white * np.asarray(image).astype(np.int32)
        if image.mode == "F":
            raise DamagedFileError(path, "masks must hold integers, this one floats")
        if image.mode == "LA":
            image = image.getchannel(0)
        elif image.mode in ("RGB", "RGBA", "P", "PA"):
            colours = np.asarray(image.convert("RGBA"))[..., :3]
            if (colours == colours[..., :1]).all():
                return colours[..., 0].astype(np.int32)
            if image.mode != "P" or image.format == "GIF":
                raise DamagedFileError(
                    path,
                    "this mask has colours; store the class of each pixel as its "
                    "grey value, or as a palette index in PNG",
                )
        elif image.mode != "L" and not image.mode.startswith("I"):
            raise DamagedFileError(path, f"masks of mode {image.mode} are not known")
        return np.asarray(image).astype(np.int32)


def resize_image(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes `[h, w, c]` to `[size, size, c]`, bilinear, antialiased when smaller.

    The aspect ratio is not kept.

    Returns:
      The image in its own dtype, uint8 or float32.
    """
    if image.shape[:2] == (size, size):
        return image
    if image.dtype == np.uint8 and image.shape[2] == 3:
        # As below, in one call.
        colours = Image.fromarray(np.ascontiguousarray(image))
        return np.asarray(colours.resize((size, size), Image.Resampling.BILINEAR))
    channels = [
        Image.fromarray(np.ascontiguousarray(image[..., i])).resize(
            (size, size), Image.Resampling.BILINEAR
        )
        for i in range(image.shape[2])
    ]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1)


def resize_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """Resizes integer labels `[h, w]` to `[size, size]` by the nearest pixel centre."""
    height, width = mask.shape
    rows = ((np.arange(size) + 0.5) * height / size).astype(int)
    columns = ((np.arange(size) + 0.5) * width / size).astype(int)
    return mask[rows[:, None], columns[None, :]]


def _with_channels(image: Image.Image, channels: int) -> np.ndarray:
    if channels == 1:
        return np.asarray(image.convert("L"))[..., None]
    return np.asarray(image.convert("RGB"))


@contextmanager
def _decoded(path: str | Path) -> Iterator[tuple[Image.Image, bool]]:
    """Opens and decodes a file; whatever goes wrong names the file.

    Yields:
      The image, and whether the file has more than 8 bits per channel.
    """
    try:
        with Image.open(path) as file:
            frames = getattr(file, "n_frames", 1)
            is_deep = _is_deep(file)
            file.load()
            image = ImageOps.exif_transpose(file)
            image.format = file.format
    except FileNotFoundError as error:
        raise DamagedFileError(path, "there is no such file") from error
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        MemoryError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        reason = str(error).replace(str(path), "the file")
        raise DamagedFileError(path, f"it cannot be decoded ({reason})") from error
    if frames > 1 and image.format != "MPO":
        raise DamagedFileError(
            path, f"it has {frames} frames or pages; save each as a file of its own"
        )
    yield image, is_deep


def _is_deep(file: ImageFile.ImageFile) -> bool:
    """Whether a file that is not yet decoded stores more than 8 bits per channel."""
    # The mode does not tell: colours of 16 bits are "RGB" as those of 8 bits.
    if isinstance(file, TiffImagePlugin.TiffImageFile):
        bits_per_sample = file.tag_v2.get(258, (1,))
        return max(bits_per_sample) > 8
    for tile in file.tile:
        args = tile.args if isinstance(tile.args, tuple) else (tile.args,)
        # PNG names the layout ("RGB;16B"), PPM the largest value.
        if file.format == "PNG" and ";16" in str(args[0]):
            return True
        if file.format == "PPM" and isinstance(args[-1], int) and args[-1] > 255:
            return True
    return False
