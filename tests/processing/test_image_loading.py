"""Images of all kinds are opened as upright RGB, or refused with an error that names them."""

import base64
import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_prismer.processing import load_image, load_images


@pytest.fixture
def rgb():
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(image):
    assert image.mode == "RGB"
    return np.asarray(image)


# ---- kinds of sources ----


def test_path_can_be_a_string_or_a_path_object(tmp_path, rgb):
    Image.fromarray(rgb).save(tmp_path / "a.png")
    assert (pixels(load_image(tmp_path / "a.png")) == rgb).all()
    assert (pixels(load_image(str(tmp_path / "a.png"))) == rgb).all()


def test_bytes_data_uris_and_dataset_cells_are_opened(tmp_path, rgb):
    content = encoded(Image.fromarray(rgb))
    (tmp_path / "a.png").write_bytes(content)
    uri = "data:image/png;base64," + base64.b64encode(content).decode()
    rows = [{"bytes": content, "path": None}, {"bytes": None, "path": str(tmp_path / "a.png")}]
    for source in (content, uri, *rows):
        assert (pixels(load_image(source)) == rgb).all()


def test_url_is_refused_when_offline():
    with pytest.raises(OSError, match="'https://example.com/cat.png' cannot be fetched: HF_HUB_OFFLINE is set"):
        load_image("https://example.com/cat.png")


# ---- modes ----


@pytest.mark.parametrize(
    "mode",
    "1 L LA La P PA RGB RGBA RGBa RGBX CMYK YCbCr LAB HSV I F I;16 I;16B I;16L I;16N".split(),
)
def test_every_mode_of_pillow_is_opened(mode):
    assert load_image(Image.new(mode, (3, 2))).mode == "RGB"
    assert load_image(Image.new(mode, (3, 2))).size == (3, 2)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_conversion_keeps_the_color(mode):
    gray = Image.new("RGB", (3, 2), (128, 128, 128))
    gray = gray.quantize() if mode == "P" else gray.convert(mode)
    assert np.abs(pixels(load_image(gray)).astype(int) - 128).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_pixels_become_white(mode):
    clear = Image.new("RGBA", (3, 2), (255, 0, 0, 0)).convert(mode)
    assert (pixels(load_image(clear)) == 255).all()


def test_half_transparent_pixels_are_mixed_with_white():
    assert pixels(load_image(Image.new("RGBA", (1, 1), (255, 0, 0, 128))))[0, 0].tolist() == [255, 127, 127]


@pytest.mark.parametrize("mode, key", [("P", 0), ("RGB", (255, 0, 0)), ("L", 76)])
def test_transparent_color_of_a_png_becomes_white(mode, key):
    red = Image.new("RGB", (3, 2), (255, 0, 0)).convert(mode)
    if mode == "P":
        key = red.getpixel((0, 0))
    assert (pixels(load_image(encoded(red, transparency=key))) == 255).all()


def test_sixteen_bits_are_scaled_to_eight():
    deep = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    expected = [0, 1, 128, 255]
    for image in (Image.fromarray(deep), Image.fromarray(deep.astype(np.int32)), deep, deep.astype(np.int64)):
        assert pixels(load_image(image))[0, :, 0].tolist() == expected
    assert pixels(load_image(encoded(Image.fromarray(deep))))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("scale", [1, 255])
def test_floats_from_bytes_give_the_bytes(rgb, scale):
    floats = rgb.astype(np.float32) / 255 * scale
    assert (pixels(load_image(floats)) == rgb).all()
    assert (pixels(load_image(Image.fromarray(floats[..., 0], mode="F")))[..., 0] == rgb[..., 0]).all()


def test_floats_are_rounded_to_the_nearest_byte():
    assert pixels(load_image(np.array([[0.0, 0.4999, 0.999, 1.0]])))[0, :, 0].tolist() == [0, 127, 255, 255]


# ---- orientation and frames ----


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_exif_rotation_is_applied(format):
    image = Image.new("RGB", (4, 2))
    image.paste((255, 255, 255), (0, 0, 2, 2))  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    upright = load_image(encoded(image, format, exif=exif))
    assert upright.size == (2, 4)
    assert pixels(upright)[0].min() > 200 and pixels(upright)[-1].max() < 50
    assert load_image(upright).size == (2, 4), "and only once"


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (3, 2), color) for color in ("red", "blue")]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(load_image(content))[0, 0].tolist() == [255, 0, 0]


# ---- arrays ----


def as_tensor(array):
    return torch.from_numpy(array.copy())


@pytest.mark.parametrize("convert", [np.asarray, as_tensor])
def test_channels_can_come_first_or_last(rgb, convert):
    for array in (rgb, rgb.transpose(2, 0, 1)):
        assert (pixels(load_image(convert(array))) == rgb).all()


@pytest.mark.parametrize("convert", [np.asarray, as_tensor])
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (1, 5, 7)])
def test_gray_arrays_are_opened(rgb, convert, shape):
    gray = rgb[..., 0]
    assert (pixels(load_image(convert(gray.reshape(shape))))[..., 1] == gray).all()


def test_alpha_channel_of_an_array_becomes_white():
    assert (pixels(load_image(np.zeros((2, 2, 4), np.uint8))) == 255).all()


@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 1, 1), (5, 1, 3), (3, 1, 5), (3, 5, 4)])
def test_three_channels_are_preferred_to_one_or_four(shape):
    image = load_image(np.zeros(shape, np.uint8))
    assert sorted(image.size) == sorted(side for side in shape if side != 3)


def test_ambiguous_channels_are_last_in_arrays_first_in_tensors():
    array = np.arange(3 * 5 * 3, dtype=np.uint8).reshape(3, 5, 3)
    assert load_image(array).size == (5, 3)
    assert load_image(as_tensor(array)).size == (3, 5)
    assert load_image(array, input_data_format="channels_first").size == (3, 5)
    assert load_image(torch.zeros(1, 4, 4)).size == (4, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.bool, torch.int64])
def test_tensors_of_other_types_are_opened(dtype):
    assert pixels(load_image(torch.ones(3, 2, 2, dtype=torch.float32).to(dtype))).max() == (
        1 if dtype == torch.int64 else 255
    )


# ---- batches ----


def test_batch_can_mix_sizes_and_types(rgb):
    images = [rgb, Image.new("L", (3, 2)), torch.zeros(3, 4, 6), [encoded(Image.new("1", (1, 1)))]]
    assert [image.size for image in load_images(images)] == [(7, 5), (3, 2), (6, 4), (1, 1)]


def test_array_of_four_dimensions_is_a_batch(rgb):
    batch = np.stack([rgb, rgb // 2])
    for images in (batch, torch.from_numpy(batch).permute(0, 3, 1, 2), list(batch), [batch]):
        loaded = load_images(images)
        assert len(loaded) == 2 and (pixels(loaded[1]) == rgb // 2).all()


def test_one_image_is_a_batch_of_one(rgb):
    assert len(load_images(rgb)) == 1


# ---- extreme sizes ----


@pytest.mark.parametrize("size", [(1, 1), (20000, 20), (20, 20000)])
def test_extreme_shapes_are_opened(size):
    assert load_image(encoded(Image.new("L", size))).size == size


def png_header(width, height):
    """A PNG file with a header and no pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    ihdr = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + ihdr + chunk(b"IDAT", b"")


def test_decompression_bomb_is_refused_by_its_header(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png_header(100_000, 100_000))
    with pytest.raises(ValueError, match="bomb.png' is refused as too large .*max_pixels=178,956,970"):
        load_image(tmp_path / "bomb.png")


def test_limit_of_pixels_is_checked_before_decoding(tmp_path):
    (tmp_path / "large.png").write_bytes(png_header(101, 100))
    with pytest.raises(ValueError, match="large.png' has 101×100 pixels; the limit is max_pixels=10,000"):
        load_image(tmp_path / "large.png", max_pixels=10_000)
    with pytest.raises(ValueError, match="truncated or damaged"):
        load_image(tmp_path / "large.png", max_pixels=10_100)


# ---- what is refused ----


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", r"broken.png' is empty \(0 bytes\); accepted are the formats that Pillow reads, such as PNG"),
        (b"hello, I am a text", "broken.png' is not an image, or damaged at its beginning; accepted are"),
        (encoded(Image.effect_noise((64, 64), 50))[:1000], "broken.png' is truncated or damaged"),
        (encoded(Image.effect_noise((64, 64), 50), "JPEG")[:1000], "broken.png' is truncated or damaged"),
        (b"\x89PNG\r\n\x1a\n", "broken.png' is not an image, or damaged at its beginning"),
    ],
    ids=["empty", "text", "truncated PNG", "truncated JPEG", "signature only"],
)
def test_broken_file_is_named(tmp_path, content, message):
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_image(tmp_path / "broken.png")
    with pytest.raises(ValueError, match=message):
        load_images([Image.new("L", (1, 1)), str(tmp_path / "broken.png")])


def test_truncated_lazy_image_is_named(tmp_path):
    (tmp_path / "cut.png").write_bytes(encoded(Image.effect_noise((64, 64), 50))[:1000])
    with pytest.raises(ValueError, match="cut.png' is truncated or damaged"):
        load_image(Image.open(tmp_path / "cut.png"))


def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file 'cat.png'; accepted are a path"):
        load_image("cat.png")
    with pytest.raises(ValueError, match="is a folder, not an image file"):
        load_image(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_pipe_is_refused_before_it_is_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for endless in (tmp_path / "pipe.png", "/dev/zero"):
        with pytest.raises(ValueError, match="is not a regular file"):
            load_image(endless)


def test_postscript_is_not_run(tmp_path):
    """Pillow would run the file with Ghostscript."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")
    for source in (tmp_path / "a.eps", (tmp_path / "a.eps").read_bytes()):
        with pytest.raises(ValueError, match="is PostScript, which is not opened"):
            load_image(source)


@pytest.mark.parametrize("uri", ["data:image/png,abc", "data:image/png;base64,%%%"])
def test_data_uri_that_is_not_base64_is_refused(uri):
    with pytest.raises(ValueError, match="base64"):
        load_image(uri)


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((0, 4, 3), np.uint8), r"array of shape \(0, 4, 3\) has no pixels"),
        (np.zeros((6, 6, 5), np.uint8), r"array of shape \(6, 6, 5\) .*with 1, 3 or 4 channels"),
        (np.zeros(4, np.uint8), "has 1 dimensions"),
        (np.full((4, 4, 3), np.nan), "float64 values from nan to nan; accepted are uint8"),
        (np.full((4, 4, 3), -0.5), "float64 values from -0.5 to -0.5; accepted are"),
        (np.full((4, 4, 3), 300.0), "accepted are .* floats from 0 to 1 or from 0 to 255"),
        (np.full((4, 4, 3), 70000), "int64 values from 70000 to 70000; accepted are"),
        (np.full((4, 4, 3), 1j), "complex128 values"),
        (torch.randn(3, 4, 4), "tensor of shape .* values from -"),
    ],
)
def test_array_that_is_not_an_image_is_refused(array, message):
    with pytest.raises(ValueError, match=message):
        load_image(array)


def test_image_without_pixels_is_refused():
    with pytest.raises(ValueError, match="has no pixels: it is 0×3"):
        load_image(Image.new("RGB", (0, 3)))


def test_error_for_other_types_lists_accepted_types():
    with pytest.raises(TypeError, match="image is a int; accepted are a path, an http"):
        load_image(3)


def test_error_names_the_position_in_the_batch():
    with pytest.raises(ValueError, match=r"images\[1\] has no pixels"):
        load_images([np.zeros((2, 2), np.uint8), np.zeros((0, 2), np.uint8)])
    with pytest.raises(TypeError, match=r"images\[1\] is a NoneType"):
        load_images([np.zeros((2, 2), np.uint8), None])
    with pytest.raises(ValueError, match="images is empty"):
        load_images([])
