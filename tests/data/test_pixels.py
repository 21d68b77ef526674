"""How image and mask files of every kind become numbers."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from jaxkd.data import DamagedFileError
from jaxkd.data.pixels import read_image, read_mask, resize_image, resize_mask

GREY = np.arange(0, 240, 20, dtype=np.uint8).reshape(3, 4)


def save(path, image, **options):
    image.save(path, **options)
    return path


def test_grey_files_give_one_or_three_equal_channels(tmp_path):
    path = save(tmp_path / "a.png", Image.fromarray(GREY))
    np.testing.assert_array_equal(read_image(path, 1)[..., 0], GREY)
    np.testing.assert_array_equal(
        read_image(path, 3), np.repeat(GREY[..., None], 3, axis=-1)
    )


def test_colours_become_luma_when_one_channel_is_wanted(tmp_path):
    colours = np.zeros((1, 3, 3), np.uint8)
    colours[0, 0, 0] = colours[0, 1, 1] = colours[0, 2, 2] = 255
    path = save(tmp_path / "a.png", Image.fromarray(colours))
    np.testing.assert_array_equal(read_image(path, 3), colours)
    # ITU-R 601: 0.299 R + 0.587 G + 0.114 B.
    np.testing.assert_allclose(read_image(path, 1)[0, :, 0], [76, 150, 29], atol=1)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    deep = np.array([[0, 257, 32896, 65535]], np.uint16)
    path = save(tmp_path / "a.png", Image.fromarray(deep))
    np.testing.assert_array_equal(read_image(path, 1)[0, :, 0], [0, 1, 128, 255])


def test_thirty_two_bits_and_floats_are_refused(tmp_path):
    wide = save(tmp_path / "a.tif", Image.fromarray(np.array([[1 << 20]], np.int32)))
    with pytest.raises(DamagedFileError, match="a.tif: 32-bit"):
        read_image(wide, 1)
    real = save(tmp_path / "b.tif", Image.fromarray(np.array([[0.5]], np.float32)))
    with pytest.raises(DamagedFileError, match="b.tif: float images"):
        read_image(real, 1)
    with pytest.raises(DamagedFileError, match="b.tif: masks must hold integers"):
        read_mask(real)


def write_deep_png(path, pixels):
    """A PNG of 16 bits per channel, which Pillow writes for grey only."""
    height, width, channels = pixels.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, body in (
        (b"IHDR", header),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ):
        check = zlib.crc32(kind + body)
        content += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)
    path.write_bytes(content)
    return path


def write_deep_tiff(path, pixels):
    """A TIFF of three channels of 16 bits."""
    height, width, _ = pixels.shape
    body = pixels.astype("<u2").tobytes()
    bits_at = 8 + 2 + 9 * 12 + 4
    entries = [
        (256, 1, width),
        (257, 1, height),
        (258, 3, bits_at),  # bits per sample
        (259, 1, 1),  # not compressed
        (262, 1, 2),  # RGB
        (273, 1, bits_at + 6),  # where the pixels are
        (277, 1, 3),  # channels
        (278, 1, height),
        (279, 1, len(body)),
    ]
    content = b"II*\0" + struct.pack("<IH", 8, len(entries))
    for tag, count, value in entries:
        content += struct.pack("<HHII", tag, 3, count, value)
    path.write_bytes(content + bytes(4) + struct.pack("<3H", 16, 16, 16) + body)
    return path


def test_deep_masks_of_several_channels_are_refused(tmp_path):
    # Pillow keeps the high byte, which is 0 for all classes.
    refused = "16 bits must have one channel"
    for channels in (2, 3, 4):
        path = tmp_path / f"{channels}.png"
        write_deep_png(path, np.ones((2, 3, channels), int))
        with pytest.raises(DamagedFileError, match=f"{channels}.png: .*{refused}"):
            read_mask(path)
    path = write_deep_tiff(tmp_path / "a.tif", np.ones((2, 3, 3), int))
    with pytest.raises(DamagedFileError, match=f"a.tif: .*{refused}"):
        read_mask(path)
    (tmp_path / "a.ppm").write_bytes(b"P6 1 1 65535\n" + b"\0\1" * 3)
    with pytest.raises(DamagedFileError, match=f"a.ppm: .*{refused}"):
        read_mask(tmp_path / "a.ppm")
    grey = write_deep_png(tmp_path / "grey.png", np.full((2, 3, 1), 300))
    np.testing.assert_array_equal(read_mask(grey), np.full((2, 3), 300))
    # Images keep 8 of the 16 bits on purpose.
    assert read_image(path, 3).shape == (2, 3, 3)


@pytest.mark.parametrize("name", ["a.tif", "a.gif", "a.png"])
def test_files_of_several_frames_are_refused(tmp_path, name):
    frames = [Image.fromarray(GREY), Image.fromarray(GREY[::-1].copy())]
    path = save(tmp_path / name, frames[0], save_all=True, append_images=frames[1:])
    for read in (read_mask, lambda path: read_image(path, 1)):
        with pytest.raises(DamagedFileError, match=f"{name}: it has 2 frames"):
            read(path)


def test_the_preview_in_a_photo_is_no_second_frame(tmp_path):
    photo = Image.fromarray(np.full((8, 8), 200, np.uint8))
    preview = Image.fromarray(np.full((4, 4), 10, np.uint8))
    path = tmp_path / "a.jpg"
    photo.save(path, format="MPO", save_all=True, append_images=[preview])
    np.testing.assert_allclose(read_image(path, 1), np.full((8, 8, 1), 200), atol=1)


def test_bombs_are_damaged_files(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", Image.fromarray(GREY))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2)
    with pytest.raises(DamagedFileError, match="a.png: it cannot be decoded"):
        read_image(path, 1)


def make_palette(indices):
    image = Image.fromarray(indices)
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    return image


@pytest.mark.parametrize("transparency", [None, 1, bytes([0, 128, 255])])
def test_a_palette_is_colours_for_images_and_classes_for_masks(tmp_path, transparency):
    indices = np.array([[0, 1, 2]], np.uint8)
    options = {} if transparency is None else {"transparency": transparency}
    path = save(tmp_path / "a.png", make_palette(indices), **options)
    with Image.open(path) as file:
        assert file.mode == "P"
    np.testing.assert_array_equal(read_image(path, 3)[0], 255 * np.eye(3))
    np.testing.assert_array_equal(read_mask(path), indices)


@pytest.mark.parametrize("name", ["a.gif", "a.png"])
def test_a_palette_of_greys_is_its_grey_values_however_it_is_numbered(tmp_path, name):
    # Pillow numbers the greys of a GIF by its own choice.
    grey = np.array([[255, 0, 0, 7]], np.uint8)
    image = Image.fromarray(np.array([[0, 1, 1, 2]], np.uint8))
    image.putpalette([255] * 3 + [0] * 3 + [7] * 3)
    np.testing.assert_array_equal(read_mask(save(tmp_path / name, image)), grey)
    path = save(tmp_path / f"b_{name}", Image.fromarray(grey))
    np.testing.assert_array_equal(read_mask(path), grey)


def test_colour_palettes_in_gif_are_no_masks(tmp_path):
    path = save(tmp_path / "a.gif", make_palette(np.array([[0, 1, 2]], np.uint8)))
    with pytest.raises(DamagedFileError, match="a.gif: this mask has colours"):
        read_mask(path)


def test_transparency_is_dropped_and_colours_stay(tmp_path):
    pixels = np.full((2, 2, 4), 200, np.uint8)
    pixels[..., 3] = [[0, 128], [255, 1]]
    path = save(tmp_path / "a.png", Image.fromarray(pixels))
    np.testing.assert_array_equal(read_image(path, 3), pixels[..., :3])
    grey = save(tmp_path / "b.png", Image.fromarray(pixels[..., 2:]))
    np.testing.assert_array_equal(read_image(grey, 1), pixels[..., :1])


def test_bilevel_is_black_and_white_for_images_and_bits_for_masks(tmp_path):
    bits = np.array([[True, False, True]])
    path = save(tmp_path / "a.png", Image.fromarray(bits))
    np.testing.assert_array_equal(read_image(path, 1)[..., 0], 255 * bits)
    np.testing.assert_array_equal(read_mask(path), bits.astype(int))
    np.testing.assert_array_equal(read_mask(path, white=255), 255 * bits)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone_for_images_and_masks(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.png", Image.fromarray(GREY), exif=exif)
    # What the EXIF standard says must be done to show the stored pixels upright.
    upright = {
        1: GREY,
        2: GREY[:, ::-1],
        3: GREY[::-1, ::-1],
        4: GREY[::-1],
        5: GREY.T,
        6: np.rot90(GREY, -1),
        7: GREY[::-1, ::-1].T,
        8: np.rot90(GREY),
    }[orientation]
    np.testing.assert_array_equal(read_image(path, 1)[..., 0], upright)
    np.testing.assert_array_equal(read_mask(path), upright)


def test_masks_keep_their_numbers(tmp_path):
    classes = np.array([[0, 1, 300]], np.uint16)
    np.testing.assert_array_equal(
        read_mask(save(tmp_path / "a.png", Image.fromarray(classes))), classes
    )
    mask = read_mask(save(tmp_path / "b.png", Image.fromarray(GREY)))
    np.testing.assert_array_equal(mask, GREY)
    assert mask.dtype == np.int32


def test_colour_masks_are_refused_unless_they_are_grey(tmp_path):
    grey = np.repeat(GREY[..., None], 3, axis=-1)
    path = save(tmp_path / "a.png", Image.fromarray(grey))
    np.testing.assert_array_equal(read_mask(path), GREY)
    grey[0, 0, 1] = 9
    path = save(tmp_path / "b.png", Image.fromarray(grey))
    with pytest.raises(DamagedFileError, match="b.png: this mask has colours"):
        read_mask(path)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.webp", "a.tif"])
def test_truncated_files_are_named(tmp_path, name):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (64, 64), dtype=np.uint8)
    path = save(tmp_path / name, Image.fromarray(noise))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DamagedFileError, match=f"{name}: it cannot be decoded") as e:
        read_image(path, 3)
    assert "on_error='skip'" in str(e.value)
    assert e.value.path == str(path)


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(DamagedFileError, match="a.png: there is no such file"):
        read_image(tmp_path / "a.png", 1)
    (tmp_path / "b.png").write_text("not an image")
    with pytest.raises(DamagedFileError, match="b.png: it cannot be decoded"):
        read_mask(tmp_path / "b.png")


def test_resizing_keeps_constants_dtype_and_channels():
    for dtype in (np.uint8, np.float32):
        image = np.full((6, 9, 2), 7, dtype)
        resized = resize_image(image, 4)
        assert resized.dtype == dtype
        np.testing.assert_array_equal(resized, np.full((4, 4, 2), 7))


def test_images_are_averaged_when_they_shrink():
    # A checkerboard of single pixels is grey from afar; picking pixels would alias.
    board = (np.indices((32, 32)).sum(0) % 2).astype(np.float32)[..., None]
    assert np.abs(resize_image(board, 8)[1:-1, 1:-1] - 0.5).max() < 0.05


def test_masks_take_the_nearest_pixel_and_no_new_values():
    mask = np.arange(16, dtype=np.int32).reshape(4, 4)
    np.testing.assert_array_equal(resize_mask(mask, 8), np.kron(mask, np.ones((2, 2))))
    np.testing.assert_array_equal(resize_mask(mask, 2), mask[1::2, 1::2])
    np.testing.assert_array_equal(resize_mask(mask, 4), mask)
    assert set(np.unique(resize_mask(mask * 10, 7))) <= set(range(0, 160, 10))


def test_colours_are_resized_as_their_channels_are():
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    for size in (4, 12):
        resized = resize_image(image, size)
        alone = [resize_image(image[..., i : i + 1], size) for i in range(3)]
        np.testing.assert_array_equal(resized, np.concatenate(alone, axis=-1))
