"""How pictures of every kind become bytes."""

from __future__ import annotations

import io

import numpy as np
import pytest
from pictures import BLUE, GREEN, RED, png, write
from PIL import Image

from gzcli.data.forms import Decoding
from gzcli.data.kinds import FORMATS
from gzcli.data.open import open_pack
from gzcli.data.pictures import decode, look
from gzcli.errors import MissingError


@pytest.fixture(autouse=True)
def _fresh(home):
    pass


def test_every_kind_of_picture():
    def decoded(data, channels=3, size=None):
        return decode(data, "a", Decoding(size, channels))[0]

    assert decoded(png(RED))[:, 0, 0].tolist() == list(RED)
    assert decoded(png(RED, format="WEBP", lossless=True))[:, 0, 0].tolist() == list(RED)
    assert decoded(png(RED, format="TIFF"))[:, 0, 0].tolist() == list(RED)
    assert decoded(png((*RED, 0), mode="RGBA"))[:, 0, 0].tolist() == [255, 255, 255]  # transparent: white
    assert decoded(png((0, 0, 0, 128), mode="RGBA"))[:, 0, 0].tolist() == [127, 127, 127]
    assert decoded(png((0, 128), mode="LA"), 1)[:, 0, 0].tolist() == [127]
    assert decoded(png(1, mode="1"), 1)[:, 0, 0].tolist() == [255]
    palette = Image.new("RGB", (8, 8), GREEN).quantize(4)
    out = io.BytesIO()
    palette.save(out, "PNG")
    assert decoded(out.getvalue())[:, 0, 0].tolist() == list(GREEN)
    for deep, byte in ((0, 0), (257, 1), (32896, 128), (65535, 255)):
        out = io.BytesIO()
        Image.fromarray(np.full((8, 8), deep, np.uint16)).save(out, "PNG")
        assert decoded(out.getvalue(), 1)[0, 0, 0] == byte
    assert decoded(png(RED), 1)[0, 0, 0] == round(0.299 * RED[0] + 0.587 * RED[1] + 0.114 * RED[2])
    assert decoded(png(77, mode="L"))[:, 0, 0].tolist() == [77, 77, 77]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(kind, monkeypatch):
    """By its header, whatever its format: one of a few bytes may claim any size."""
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip("this Pillow does not write it")
    out = io.BytesIO()
    Image.new("RGB", (64, 64), RED).save(out, kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2 - 1)  # Pillow refuses twice that
    monkeypatch.setattr(Image.Image, "convert", lambda *given: pytest.fail("it was decoded"))
    for read in (lambda data: decode(data, "a", Decoding(8, 3)), lambda data: look(data, "a")):
        with pytest.raises(MissingError, match="exceeds limit"):
            read(out.getvalue())


def test_exif_rotation():
    image = Image.new("RGB", (16, 16), BLUE)
    image.paste(RED, (0, 0, 16, 8))  # red on top
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90° clockwise: red to the right
    out = io.BytesIO()
    image.save(out, "PNG", exif=exif)
    pixels, _ = decode(out.getvalue(), "a", Decoding(None, 3))
    assert pixels[:, 8, 14].tolist() == list(RED) and pixels[:, 8, 1].tolist() == list(BLUE)


def test_resize_is_antialiased_and_cropped_to_the_centre(tmp_path):
    stripes = np.zeros((64, 96, 3), np.uint8)
    stripes[:, ::2] = 255  # averaged by an antialiased filter, black or white by any other
    stripes[:, :14] = stripes[:, -14:] = (255, 0, 0)  # cropped off
    files = {}
    for i in range(4):
        out = io.BytesIO()
        Image.fromarray(stripes).save(out, "PNG")
        files[f"{i}.png"] = out.getvalue()
    opened = open_pack(write(tmp_path / "p", files), size=16)
    assert opened.meta.shape == (3, 16, 16) and opened.meta.resized
    assert np.abs(opened.images("train").astype(int) - 127).max() < 12
    mixed = open_pack(
        write(tmp_path / "q", {"a.png": png(RED), "b.png": png(RED, (20, 9)), "c.png": png(RED)}), size=8
    )
    assert mixed.meta.resized and mixed.meta.shape == (3, 8, 8)
