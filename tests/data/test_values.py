"""Images that are no pictures of 8 bits: how they are read, packed and shown. Nothing is read wrongly in
silence."""

import io
import struct

import numpy as np
import pytest
from PIL import Image
from refused import refused

import gzcli
from gzcli.core.errors import MissingError
from gzcli.data.packs.batches import TrainImages
from gzcli.data.packs.open import facts_of, open_pack
from gzcli.data.readers.values import Values, decoded
from gzcli.data.sets.registry import Form, OwnSet

RNG = np.random.default_rng(0)
N = 40
ARRAYS = {
    "2 channels": RNG.integers(0, 256, (N, 10, 8, 2), dtype=np.uint8),
    "4 channels": RNG.integers(0, 256, (N, 10, 8, 4), dtype=np.uint8),
    "5 channels": RNG.integers(0, 256, (N, 10, 8, 5), dtype=np.uint8),
    "12 bands": RNG.integers(0, 65536, (N, 16, 14, 12), dtype=np.uint16),
    "16 bits": RNG.integers(0, 65536, (N, 10, 8), dtype=np.uint16),
    "floats": RNG.normal(size=(N, 10, 8, 5)).astype(np.float32),
    "grey floats": RNG.normal(3, 9, size=(N, 10, 8)),
    "negative": RNG.integers(-1000, 3000, (N, 10, 8), dtype=np.int16),
}


@pytest.fixture(autouse=True)
def _home(home):
    yield


def bands_first(array: np.ndarray) -> np.ndarray:
    return array[:, None] if array.ndim == 3 else array.transpose(0, 3, 1, 2)


def seen(pack, levels=None) -> tuple[np.ndarray, Values]:
    """All values of a set as a model sees them, x in [-1, 1], in the order of their packed splits."""
    values = Values.of(pack.meta.values)
    images = [pack.seen(levels).images(split) for split in ("train", "val", "test")]
    x = np.concatenate([np.asarray(part) for part in images])
    return (x if x.dtype != np.uint8 else x / 127.5 - 1), values


def order(array: np.ndarray) -> np.ndarray:
    return array[np.lexsort(array.reshape(len(array), -1).T[:3])]


@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.parametrize("form", ["npz", "npy", "memory", "folder"])
def test_values_come_back_as_they_were(kind, form, tmp_path):
    """What a model sees, brought back to the numbers of the set, is what the file has."""
    array, place = ARRAYS[kind], tmp_path / f"set.{form}"
    if form == "npz":
        np.savez(place, images=array)
    elif form == "npy":
        np.save(place, array)
    elif form == "folder":
        place.mkdir()
        for i, image in enumerate(array):
            np.save(place / f"{i:03d}.npy", image)
    pack = gzcli.open_data(array if form == "memory" else place)
    x, values = seen(pack)
    assert x.min() >= -1 and x.max() <= 1 and values.channels == bands_first(array).shape[1]
    assert values.levels == {np.uint8: 256, np.uint16: 65536}.get(array.dtype.type)
    back = order(values.restored(x))
    np.testing.assert_allclose(back, order(bands_first(array)), rtol=1e-5, atol=1e-4)
    if array.dtype.kind == "u":
        assert back.dtype == array.dtype and np.array_equal(back, order(bands_first(array)))
    assert any("bits" in note or "real numbers" in note for note in pack.meta.notes), "and a line says so"


@pytest.mark.parametrize("kind", ARRAYS)
def test_pictures_show_three_bands(kind, tmp_path):
    array = ARRAYS[kind]
    pack = gzcli.open_data(array)
    values, x = Values.of(pack.meta.values), pack.seen(None).images("test")
    pictures = np.asarray(pack.images("test"))
    assert pictures.dtype == np.uint8 and pictures.shape[1] == (1 if values.channels == 1 else 3)
    bands = x[:, list(values.bands)].astype(float)
    shown = bands if x.dtype == np.uint8 else (bands + 1) * 127.5
    assert np.abs(shown - pictures).max() <= 0.51
    info = pack.seen(None).info()
    assert info.shape == (values.channels, *array.shape[1:3]) and info.levels == values.levels


def test_bands_can_be_named(tmp_path):
    np.savez(tmp_path / "a.npz", images=ARRAYS["5 channels"], bands=[4, 2, 0])
    pack = gzcli.open_data(tmp_path / "a.npz")
    assert np.array_equal(pack.images("test"), pack.seen(None).images("test")[:, [4, 2, 0]])
    np.savez(tmp_path / "b.npz", images=ARRAYS["5 channels"], bands=[4, 5, 0])
    refused(
        "`bands` must be 1 or 3 of the channels 0 … 4, not .4, 5, 0.", gzcli.open_data, tmp_path / "b.npz"
    )


def test_eight_bits_of_sixteen_are_those_of_before(tmp_path):
    """`data.levels=256` trains on the pictures, which are the values over 257, rounded."""
    array = ARRAYS["16 bits"]
    pack = gzcli.open_data(array)
    assert pack.seen(256) is pack and pack.seen(None) is not pack
    pixels = np.concatenate([np.asarray(pack.images(split)) for split in ("train", "val", "test")])
    assert np.array_equal(
        order(pixels), order(((array.astype(np.uint32) + 128) // 257).astype(np.uint8)[:, None])
    )
    refused("whose values have 65,536 levels", pack.seen, 4096)
    refused("are real numbers", gzcli.open_data(ARRAYS["floats"]).seen, 256)


def test_values_are_resized_as_pictures_are(tmp_path):
    pack = gzcli.open_data(ARRAYS["floats"], size="4x6")
    x = pack.seen(None).images("train")
    assert x.shape[1:] == (5, 6, 4) and pack.shape == (3, 6, 4) and pack.meta.resized
    bands = np.clip(np.rint((x[:, :3] + 1) * 127.5), 0, 255)
    assert np.abs(bands - pack.images("train")).max() <= 2, "resized before it was rounded, and after"
    refused(
        "cannot be packed, as `data.fit` requires grey or RGB images",
        gzcli.open_data,
        ARRAYS["floats"],
        size=4,
        fit="pad",
    )
    refused("cannot be packed, as `data.channels`", gzcli.open_data, ARRAYS["floats"], channels=1)
    grey = gzcli.open_data(ARRAYS["grey floats"], channels=3)
    assert grey.meta.values is None and "packed with 8 bits" in grey.meta.notes[-1]


def test_a_batch_has_them_in_the_range_of_pixels(tmp_path):
    for kind, levels in (("floats", None), ("16 bits", 65536), ("5 channels", 256), ("5 channels", 32)):
        pack = gzcli.open_data(ARRAYS[kind])
        images = TrainImages(pack.seen(levels), levels, "cpu", 0, ("hflip", "crop=1"))
        (batch, *_) = images.scan(np.arange(8), purpose="test", batch_size=8)
        assert batch.x.shape[1] == pack.meta.values["channels"] and batch.x.abs().max() <= 1
        if levels:
            k = (batch.x.double() + 1) / 2 * (levels - 1)
            assert (k - k.round()).abs().max() < 0.01, "on the grid of its levels"


def test_what_a_float_cannot_be(tmp_path):
    for bad in (np.nan, np.inf):
        array = ARRAYS["floats"].copy()
        array[7, 0, 0, 0] = bad
        refused("values that are not finite: image 7 of train", gzcli.open_data, array)
    np.save(tmp_path / "c.npy", np.zeros((4, 8, 8), complex))
    refused("complex128 of shape", gzcli.open_data, tmp_path / "c.npy")
    np.save(tmp_path / "o.npy", np.array([{}], object), allow_pickle=True)
    refused("is not a numpy array", gzcli.open_data, tmp_path / "o.npy", error=MissingError)
    np.save(tmp_path / "q.npy", np.zeros((4, 8, 8, 8), np.uint8))
    refused("channels may be first or last", gzcli.open_data, tmp_path / "q.npy")
    (tmp_path / "t.npy").write_bytes(b"\x93NUMPY\x01")
    refused("is not a numpy array", gzcli.open_data, tmp_path / "t.npy", error=MissingError)


def tiff(*pages: np.ndarray, bits: int | None = None) -> bytes:
    buffer = io.BytesIO()
    first, *rest = [Image.fromarray(page) for page in pages]
    first.save(buffer, "TIFF", save_all=True, append_images=rest, tiffinfo={258: bits} if bits else {})
    return buffer.getvalue()


def test_a_tiff_of_many_pages_floats_or_sixteen_bits(tmp_path):
    byte, wide = ARRAYS["4 channels"][0, :, :, 0], ARRAYS["16 bits"][0]
    assert decoded(tiff(byte), "a.tif") is None, "a picture"
    values, levels = decoded(tiff(byte, byte[::-1], byte), "a.tif")
    assert values.shape == (3, 10, 8) and levels == 256 and np.array_equal(values[1], byte[::-1])
    values, levels = decoded(tiff(wide), "a.tif")
    assert levels == 65536 and np.array_equal(values[0], wide)
    real = ARRAYS["floats"][0, :, :, 0]
    values, levels = decoded(tiff(real, real * 2), "a.tif")
    assert levels is None and np.array_equal(values[1], real * 2)
    refused("cannot be decoded", decoded, b"II*\0", "a.tif", error=MissingError)


def test_a_tiff_of_many_values_a_pixel(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    for array, levels in ((ARRAYS["12 bands"][0], 65536), (ARRAYS["floats"][0], None)):
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, array.transpose(2, 0, 1), photometric="minisblack")
        values, depth = decoded(buffer.getvalue(), "a.tif")
        assert depth == levels and np.array_equal(values, array.transpose(2, 0, 1))


def test_a_tiff_of_no_pixels_is_left_out(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    (folder := tmp_path / "set").mkdir()
    for i, image in enumerate(ARRAYS["16 bits"][:9]):
        tifffile.imwrite(folder / f"{i}.tif", image)
    data = (folder / "0.tif").read_bytes()
    sides = [struct.pack("<HHII", tag, 4, 1, side) for tag, side in ((256, 8), (257, 10))]
    assert all(data.count(side) == 1 for side in sides)
    for side in sides:
        (folder / "0.tif").write_bytes(data.replace(side, side[:8] + bytes(4)))
        refused("`0.tif` cannot be decoded: it has no pixels", open_pack, folder, error=MissingError)
    pack = open_pack(OwnSet(folder, form=Form(skip_bad=True, layout="flat")), foreign=True)
    assert pack.meta.counts["test"] == 8 and pack.meta.skipped == (
        "`0.tif` cannot be decoded: it has no pixels",
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_of_many_bits_is_turned_upright(orientation):
    """Pillow turns a grey TIFF; gz turns one that Pillow does not read."""
    tifffile = pytest.importorskip("tifffile")
    stored, turned = RNG.integers(0, 65536, (10, 8), dtype=np.uint16), []
    for array, kind in ((stored, "minisblack"), (np.stack([stored] * 3, 2), "rgb")):
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, array, photometric=kind, extratags=[(274, "H", 1, orientation, False)])
        turned.append(decoded(buffer.getvalue(), "a.tif")[0])
    assert np.array_equal(turned[0].repeat(3, 0), turned[1])
    assert turned[0].shape == ((1, 10, 8) if orientation < 5 else (1, 8, 10))


def test_a_folder_of_tiffs_is_of_one_kind(tmp_path):
    place = tmp_path / "tiffs"
    place.mkdir()
    for i in range(6):
        (place / f"{i}.tif").write_bytes(tiff(*(ARRAYS["16 bits"][i + k] for k in range(4))))
    pack = gzcli.open_data(place)
    assert pack.meta.values["channels"] == 4 and pack.seen(None).images("train").shape[1:] == (4, 10, 8)
    (place / "9.tif").write_bytes(tiff(ARRAYS["4 channels"][0, :, :, 0]))
    refused("`9.tif` of .* is an image of 8 bits", gzcli.open_data, place)
    (place / "9.tif").write_bytes(tiff(*(ARRAYS["16 bits"][k][:4] for k in range(4))))
    refused("mixed sizes", gzcli.open_data, place)
    assert open_pack(place, size=4).meta.shape == (3, 4, 4)


def test_settings_go_by_all_channels(tmp_path):
    np.save(tmp_path / "a.npy", ARRAYS["floats"])
    facts = facts_of(OwnSet(tmp_path / "a.npy"))
    assert (
        facts.shape == (5, 10, 8) and facts.levels is None and facts.valued and facts.shape_class == "colour"
    )
    open_pack(tmp_path / "a.npy")
    assert facts_of(OwnSet(tmp_path / "a.npy"), channels=3) == facts
