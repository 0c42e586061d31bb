import io

import pytest
from PIL import Image


pytest.importorskip("gradio")

import images
from app import sweep
from checks import Refused
from images import open_image


def as_bytes(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def test_large_image_is_reduced():
    image = open_image(as_bytes(Image.new("RGBA", (3000, 1500), "red")))
    assert image.size == (1024, 512) and image.mode == "RGB"


@pytest.mark.parametrize(
    "content",
    [b"", b"no image", as_bytes(Image.new("RGB", (64, 64)))[:60], as_bytes(Image.new("RGB", (64, 64)), "EPS")],
)
def test_file_that_is_not_an_image_gets_a_plain_message(content):
    with pytest.raises(Refused, match="not an image, or damaged"):
        open_image(content)


def test_bytes_and_pixels_are_limited(monkeypatch):
    content = as_bytes(Image.new("1", (6000, 5000)))
    with pytest.raises(Refused, match="6000×5000 pixels; the limit is 25 million"):
        open_image(content)
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    with pytest.raises(Refused, match="MB"):
        open_image(content)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_documented_formats_are_accepted(kind):
    assert open_image(as_bytes(Image.new("RGB", (64, 48), "red"), kind)).size == (64, 48)


def test_only_old_unused_uploads_are_deleted(tmp_path):
    import os

    for name, age in (("old", 500), ("new", 0)):
        file = tmp_path / name / "image.png"
        file.parent.mkdir()
        file.write_bytes(b"x")
        time = file.stat().st_mtime - age
        os.utime(file, (time, time))
    spared = tmp_path / "needed.png"
    spared.write_bytes(b"x")
    os.utime(spared, (1, 1))
    (tmp_path / "link").symlink_to(spared)
    os.utime(tmp_path / "link", (1, 1), follow_symlinks=False)
    sweep(tmp_path, 120, spare={str(spared)})
    assert {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()} == {
        "new/image.png",
        "needed.png",
    }
