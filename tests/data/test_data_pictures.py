"""How pictures of every kind become bytes."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from pictures import BLUE, GREEN, RED, encoded, png, write
from PIL import Image

from gzcli.core.errors import MissingError
from gzcli.data.packs.open import open_pack
from gzcli.data.readers.folder import read_pictures
from gzcli.data.readers.images import FORMATS
from gzcli.data.readers.pictures import Decoding, decode, look

pytestmark = pytest.mark.usefixtures("home")


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
    Image.new("RGB", (8, 8), GREEN).quantize(4).save(out := io.BytesIO(), "PNG")  # a palette
    assert decoded(out.getvalue())[:, 0, 0].tolist() == list(GREEN)
    for value, byte in ((0, 0), (257, 1), (32896, 128), (65535, 255)):
        assert decoded(encoded(np.full((8, 8), value, np.uint16)), 1)[0, 0, 0] == byte
    assert decoded(png(RED), 1)[0, 0, 0] == round(0.299 * RED[0] + 0.587 * RED[1] + 0.114 * RED[2])
    assert decoded(png(77, mode="L"))[:, 0, 0].tolist() == [77, 77, 77]


def deep(values, sbit: int | None = None) -> bytes:
    """A grey PNG of 16 bits, with a chunk sBIT if asked."""
    data = encoded(np.asarray(values, np.uint16))
    if sbit is None:
        return data
    chunk = b"sBIT" + bytes([sbit])
    return data[:33] + struct.pack(">I", 1) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]


def tiff_of_12_bits(values) -> bytes:
    """A grey TIFF of rows of an even number of values, two of which lie in three bytes."""
    rows = np.asarray(values)
    a, b = rows[:, ::2].astype(int), rows[:, 1::2].astype(int)
    body = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1).astype(np.uint8).tobytes()
    tags = {256: rows.shape[1], 257: len(rows), 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: len(rows)}
    tags[279] = len(body)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    head = b"II*\0" + struct.pack("<I", 8 + len(body))
    return head + body + struct.pack("<H", len(tags)) + entries + bytes(4)


RAMP = np.linspace(0, 4095, 64).astype(int).reshape(8, 8)  # 12 bits
TWELVE, SIXTEEN = "of 12 bits, read as 0 … 4,095", "of 16 bits, read as 0 … 65,535"
DARK = f"{SIXTEEN}: nearly black, as none has a value"
DEPTHS = {
    "tiff": (tiff_of_12_bits(RAMP), 4095, TWELVE),
    "low bits": (deep(RAMP, 12), 4095, TWELVE),
    "scaled bits": (deep(RAMP << 4 | RAMP >> 8, 12), 65535 / 16, SIXTEEN),
    "dark": (deep(RAMP >> 4 << 4, 12), 65535, DARK),
    "untold": (deep(RAMP), 65535, f"{DARK} above 4,095"),
    "whole range": (deep(RAMP * 16), 65535 / 16, SIXTEEN),
}


def test_more_bits_than_eight_are_read_as_the_file_says():
    """And never by what values a picture happens to have: a dark one of a set would be made bright."""
    for name, (data, white, told) in DEPTHS.items():
        notes = []
        pixels, _ = decode(data, "a", Decoding(None, 1), notes.append)
        assert np.abs(pixels[0] - RAMP / white * 255).max() <= 1, name
        (note,) = notes
        assert note.startswith(told) and ("nearly black" in told) == ("nearly" in note), name


def inked(colour) -> bytes:
    """A stroke of soft edges on a transparent picture."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., :3] = colour
    pixels[1:7, 2:6, 3] = (80, 255, 255, 80)
    return encoded(pixels)


def test_ink_on_transparency_is_seen():
    over_white = "with transparency, laid over white"
    over_black = "of white ink on transparency, laid over black"
    dark, light = ((0, 0, 0), RED), ((255, 255, 255), (250, 250, 245))
    for colour in (*dark, *light):
        notes, told = [], over_white if colour in dark else over_black
        pixels, _ = decode(inked(colour), "a", Decoding(None, 1), notes.append)
        assert notes == [told] and (pixels[0, 0, 0] == 0) == (told == over_black)
        assert int(pixels.max()) - int(pixels.min()) > 100, "the stroke"
    for colour, told in (((9, 9, 9, 255), []), ((255, 255, 255, 255), []), ((0, 0, 0, 0), [over_white])):
        notes = []
        decode(png(colour, mode="RGBA"), "a", Decoding(None, 1), notes.append)
        assert notes == told


def test_how_pictures_were_read_is_said_in_one_line(tmp_path, monkeypatch):
    files = {f"{i:02}.png": deep(RAMP, 12) for i in range(12)} | {"x.png": inked((255, 255, 255))}
    folder, lines = write(tmp_path / "p", files), []
    told = (
        "12 pictures of 12 bits, read as 0 … 4,095; 1 picture of white ink on transparency, laid over black"
    )
    opened = open_pack(folder, channels=1, say=lines.append)
    assert [line for line in lines if "12 bits" in line] == [f"`{folder}`: {opened.meta.words}"]
    assert opened.meta.words.endswith(told)
    for again in range(2):
        lines.clear()
        open_pack(folder, channels=1, foreign=True, say=lines.append)
        assert [told in line for line in lines] == [False] * (1 - again) + [True], "each time"
    lines.clear()
    read_pictures(folder, size=8, channels=1, limit=None, say=lines.append)
    assert lines == [f"`{folder}`: {told}"]
    lines.clear()
    plain = write(tmp_path / "q", {"a.png": png(RED)})
    read_pictures(plain, size=8, channels=1, limit=None, say=lines.append)
    assert lines == []
    monkeypatch.setenv("GZ_PACK_LIMIT", "100")
    seen = open_pack(write(tmp_path / "s", {f"{i}.png": deep(RAMP) for i in range(4)}), channels=1).meta
    assert seen.streamed and seen.notes[-1].startswith("of a few that were looked at, 4 pictures of 16 bits")


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(monkeypatch):
    """By its header, whatever its format: one of a few bytes may claim any size."""
    Image.init()
    small, files = Image.new("RGB", (64, 64), RED), {}
    for kind in (kind for kind in FORMATS if kind in Image.SAVE):  # this Pillow may not write all
        small.save(out := io.BytesIO(), kind)
        files[kind] = out.getvalue()
    assert len(files) > 4
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2 - 1)  # Pillow refuses twice that
    monkeypatch.setattr(Image.Image, "convert", lambda *given: pytest.fail("it was decoded"))
    for kind, data in files.items():
        for read in (lambda data: decode(data, "a", Decoding(8, 3)), lambda data: look(data, "a")):
            with pytest.raises(MissingError, match="exceeds limit"):
                read(data)
                pytest.fail(kind)


def test_rotation_by_exif_and_a_resize_that_is_antialiased_and_cropped_to_the_centre(tmp_path):
    image = Image.new("RGB", (16, 16), BLUE)
    image.paste(RED, (0, 0, 16, 8))  # red on top
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # shown turned by 90° clockwise: red to the right
    image.save(out, "PNG", exif=exif)
    pixels, _ = decode(out.getvalue(), "a", Decoding(None, 3))
    assert pixels[:, 8, 14].tolist() == list(RED) and pixels[:, 8, 1].tolist() == list(BLUE)
    stripes = np.zeros((64, 96, 3), np.uint8)
    stripes[:, ::2] = 255  # averaged by an antialiased filter, black or white by any other
    stripes[:, :14] = stripes[:, -14:] = (255, 0, 0)  # cropped off
    opened = open_pack(write(tmp_path / "p", {f"{i}.png": encoded(stripes) for i in range(4)}), size=16)
    assert opened.meta.shape == (3, 16, 16) and opened.meta.resized
    assert np.abs(opened.images("train").astype(int) - 127).max() < 12
    mixed = write(tmp_path / "q", {"a.png": png(RED), "b.png": png(RED, (20, 9)), "c.png": png(RED)})
    assert open_pack(mixed, size=8).meta.resized and open_pack(mixed, size=8).meta.shape == (3, 8, 8)
