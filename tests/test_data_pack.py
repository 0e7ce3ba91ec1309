"""Packs: embedded sets, official layouts, and every form of the user's own images, good and bad."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gzcli.data import build, pack, parsers
from gzcli.data.folder import read_pictures
from gzcli.data.library import data_path, import_set, listing, names, remove, verify
from gzcli.data.pack import data_key, open_pack, peek
from gzcli.data.specs import SPECS, find
from gzcli.errors import MissingError, UsageError
from gzcli.store.paths import cache_dir

SPLITS = ("train", "val", "test")
RED, GREEN, BLUE = (200, 30, 40), (20, 180, 60), (10, 40, 220)


@pytest.fixture(autouse=True)
def _fresh(home):
    pass


def png(colour, size=(8, 8), mode="RGB", **options) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, colour).save(out, options.pop("format", "PNG"), **options)
    return out.getvalue()


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def as_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def as_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def nothing_half_written() -> bool:
    packs = cache_dir("packs")
    return not packs.exists() or not [p for p in packs.rglob("*") if not p.name.endswith(".lock") and p.is_file()]


# --- embedded and official sets ---


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.embedded])
def test_embedded(name):
    spec, opened = SPECS[name], open_pack(name)
    meta = opened.meta
    assert (meta.shape, meta.classes, meta.levels) == (spec.shape, spec.classes, spec.levels)
    assert (meta.counts["train"] + meta.counts["val"], meta.counts["test"]) == (spec.n_train, spec.n_test)
    for split, n in meta.counts.items():
        assert opened.images(split).shape == (n, *spec.shape) and opened.images(split).dtype == np.uint8
        assert set(opened.labels(split)) == set(range(len(spec.classes)))
    info = opened.info(steps=7)
    assert (info.shape, info.levels, info.n, info.steps) == (spec.shape, spec.levels, meta.counts["train"], 7)


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    opened, truth = open_pack("digits"), load_digits()
    found = {}
    for split in SPLITS:
        levels = opened.images(split)[:, 0, ::2, ::2].astype(int) * 17 >> 8
        assert (opened.images(split)[:, 0, 1::2, 1::2] == opened.images(split)[:, 0, ::2, ::2]).all()
        for image, label in zip(levels, opened.labels(split), strict=True):
            found.setdefault((image.tobytes(), label), []).append(split)
    assert sum(map(len, found.values())) == 1797
    assert all((image.astype(int).tobytes(), label) in found for image, label in zip(truth.images, truth.target, strict=True))


def test_digits_captioned_and_ab():
    captioned, ab = open_pack("digits-captioned"), open_pack("digits_ab")
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    for split in SPLITS:
        assert captioned.captions(split) == [f"a handwritten {words[y]}" for y in captioned.labels(split)]
    dark = ab.images("train").mean((1, 2, 3)) < 128
    assert (dark == (ab.labels("train") == 0)).mean() > 0.99


def test_patches_share_no_pixel_between_splits():
    opened = open_pack("patches")
    rows = {split: {row.tobytes() for image in opened.images(split) for row in image[0]} for split in ("train", "test")}
    assert len(rows["train"] & rows["test"]) < 0.01 * len(rows["test"])


def idx_files(folder: Path, n=40, m=10):
    random = np.random.default_rng(0)
    arrays = {}
    for stem, count in (("train", n), ("t10k", m)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = random.integers(0, 10, count, dtype=np.uint8)
        arrays[stem] = images, labels
        head = struct.pack(">HBBIII", 0, 8, 3, count, 28, 28)
        (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + images.tobytes()))
        (folder / f"{stem}-labels-idx1-ubyte.gz").write_bytes(
            gzip.compress(struct.pack(">HBBI", 0, 8, 1, count) + labels.tobytes())
        )
    return arrays


def read_all(source: build.Source) -> dict[str, np.ndarray]:
    parts: dict[str, list] = {}
    for split, start, images, _ in source.blocks():
        assert start == sum(map(len, parts.get(split, [])))
        parts.setdefault(split, []).append(images)
    return {split: np.concatenate(p) for split, p in parts.items()}


def test_idx(tmp_path, monkeypatch):
    monkeypatch.setattr(parsers, "BLOCK", 16)
    arrays = idx_files(tmp_path)
    source = parsers.idx(SPECS["mnist"], tmp_path)
    for split, stem in (("train", "train"), ("test", "t10k")):
        assert (read_all(source)[split][:, 0] == arrays[stem][0]).all() and (source.labels[split] == arrays[stem][1]).all()
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x0d\x03"))
    with pytest.raises(MissingError, match="not an IDX file"):
        read_all(parsers.idx(SPECS["mnist"], tmp_path))


@pytest.mark.parametrize("protocol", [2, 4])
def test_cifar(tmp_path, protocol):
    random = np.random.default_rng(0)
    files, truth = {}, {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        truth[name] = random.integers(0, 256, (6, 3072), dtype=np.uint8), random.integers(0, 10, 6).tolist()
        batch = {b"data": truth[name][0], b"labels": truth[name][1]}
        files[f"cifar-10-batches-py/{name}"] = pickle.dumps(batch, protocol=protocol)
    as_tar(tmp_path / "cifar-10-python.tar.gz", files)
    source = parsers.cifar(SPECS["cifar10"], tmp_path)
    assert (read_all(source)["test"].reshape(6, -1) == truth["test_batch"][0]).all()
    assert (read_all(source)["train"][6:12].reshape(6, -1) == truth["data_batch_2"][0]).all()
    assert source.labels["train"].tolist() == [y for i in range(1, 6) for y in truth[f"data_batch_{i}"][1]]


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    as_tar(tmp_path / "cifar-10-python.tar.gz", {"cifar-10-batches-py/data_batch_1": pickle.dumps(Evil())})
    with pytest.raises(MissingError, match="refused"):
        parsers.cifar(SPECS["cifar10"], tmp_path)
    assert not (tmp_path / "ran").exists()


def test_every_downloaded_set_has_a_parser_and_checksums():
    for spec in SPECS.values():
        assert spec.embedded == (spec.name not in parsers.PARSERS)
        assert all((file.md5 or file.sha256) and file.size and file.urls for file in spec.files)


def test_not_fetched_when_it_must_not_be(monkeypatch):
    with pytest.raises(MissingError, match="GZ_OFFLINE") as e:
        open_pack("mnist")
    assert e.value.hint.startswith("`gz data download mnist`")
    monkeypatch.delenv("GZ_OFFLINE")
    with pytest.raises(MissingError, match="not in the cache"):
        open_pack("mnist", fetch=False)
    monkeypatch.setattr(pack, "FETCHED_UNASKED", 1000)
    with pytest.raises(MissingError, match="large"):
        open_pack("mnist")


@pytest.mark.slow
def test_mnist_from_the_official_files(shared_data, monkeypatch):
    from torchvision.datasets import MNIST  # its parser, for the same files

    monkeypatch.setenv("GZ_MIRROR", f"{shared_data}/mirror")
    opened = open_pack("mnist")
    assert opened.meta.counts == {"train": 58000, "val": 2000, "test": 10000}
    raw = cache_dir("raw", "mnist")
    folder = raw.parent / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for file in raw.glob("*.gz"):
        (folder / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    test = MNIST(str(raw.parent), train=False)
    assert (opened.images("test")[:, 0] == test.data.numpy()).all() and (opened.labels("test") == test.targets.numpy()).all()


# --- splits ---


def test_validation_is_carved_from_train_by_a_fixed_seed(tmp_path):
    images = np.arange(50, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(50) % 5)
    opened = open_pack(tmp_path / "a.npz")
    assert opened.meta.counts == {"train": 40, "val": 5, "test": 5}
    ids = {split: opened.images(split)[:, 0, 0, 0].tolist() for split in SPLITS}
    assert sorted(i for rows in ids.values() for i in rows) == list(range(50)) and all(i == sorted(i) for i in ids.values())
    for split, rows in ids.items():
        assert opened.labels(split).tolist() == [i % 5 for i in rows]
    assert ids["test"] == [2, 10, 11, 28, 41]  # the carving must never change: scores would not compare


def test_splits_given_are_kept(tmp_path):
    data = {f"{s}_images": np.full((n, 8, 8, 3), n, np.uint8) for s, n in (("train", 9), ("val", 4), ("test", 5))}
    data |= {f"{s}_labels": np.eye(3, dtype=np.uint8)[np.arange(n) % 3] for s, n in (("train", 9), ("val", 4), ("test", 5))}
    np.savez_compressed(tmp_path / "m.npz", **data)
    opened = open_pack(tmp_path / "m.npz")
    assert opened.meta.counts == {"train": 9, "val": 4, "test": 5} and opened.meta.multilabel
    assert opened.labels("val").shape == (4, 3) and opened.labels("val").dtype == np.uint8
    assert (opened.images("test") == 5).all()


@pytest.mark.parametrize("n", [1, 2])
def test_too_few_images(tmp_path, n):
    with pytest.raises(MissingError, match="too few images"):
        open_pack(write(tmp_path / "p", {f"{i}.png": png(RED) for i in range(n)}))
    assert nothing_half_written()


# --- layouts ---

COLOURS = {"red": RED, "green": GREEN, "blue": BLUE}
LAYOUTS = {
    "flat": ({f"{i:02}.png": png(RED) for i in range(20)}, ()),
    "classes": ({f"{c}/{i}.png": png(v) for c, v in COLOURS.items() for i in range(8)}, ("blue", "green", "red")),
    "splits": (
        {f"{s}/{c}/{i}.png": png(v) for s in ("train", "test") for c, v in COLOURS.items() for i in range(6)},
        ("blue", "green", "red"),
    ),
    "flat splits": ({f"{s}/{i}.png": png(BLUE) for s in ("train", "validation", "test") for i in range(6)}, ()),
    "pairs": (
        {f"{s}{d}/{i}.png": png(v) for s in ("train", "test") for d, v in (("A", RED), ("B", BLUE)) for i in range(5)},
        ("A", "B"),
    ),
}


@pytest.mark.parametrize("form", ["folder", "zip", "tar", "tar.gz", "wrapped zip"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout, form):
    files, classes = LAYOUTS[layout]
    files = {**files, "readme.txt": b"x", "__MACOSX/._a.png": b"x", ".hidden/a.png": b"x"}
    if form == "wrapped zip":
        files = {f"outer/{name}": data for name, data in files.items()}
    path = tmp_path / f"set.{form.split()[-1]}"
    path = write(path, files) if form == "folder" else (as_tar if "tar" in form else as_zip)(path, files)
    opened = open_pack(str(path))
    assert opened.meta.classes == classes and opened.meta.shape == (3, 8, 8) and not opened.meta.resized
    n = sum(name.endswith(".png") and "/." not in name and not name.startswith(".") for name in files)
    assert sum(opened.meta.counts.values()) == n
    colour = {**COLOURS, "A": RED, "B": BLUE}
    for split in SPLITS:
        for i, image in enumerate(opened.images(split)):
            want = colour[classes[opened.labels(split)[i]]] if classes else files_colour(layout)
            assert image[:, 3, 5].tolist() == list(want)
    if layout == "splits":
        assert opened.meta.counts["test"] == 18
    if layout == "flat splits":
        assert opened.meta.counts == {"train": 6, "val": 6, "test": 6} and opened.labels("train") is None


def files_colour(layout):
    return RED if layout == "flat" else BLUE


@pytest.mark.parametrize(
    ("files", "error", "named"),
    [
        ({}, MissingError, "holds no images"),
        ({"notes.txt": b"x"}, MissingError, "holds no images"),
        ({"a.png": png(RED), "cats/b.png": png(RED)}, UsageError, "beside its class folders, as `a.png`"),
        ({"train/a.png": png(RED), "extra/b.png": png(RED)}, UsageError, "mixes splits"),
        ({"test/a.png": png(RED), "val/b.png": png(RED)}, UsageError, "no `train` folder"),
        (
            {f"{i}.png": png(RED) for i in range(9)} | {"zz.png": png(RED)[:40]},
            MissingError,
            "`zz.png` does not decode",
        ),
        ({f"{i}.png": png(RED) for i in range(9)} | {"zz.jpg": b"hello"}, MissingError, "`zz.jpg` does not decode"),
        ({"a.png": png(RED), "b.png": png(RED, (9, 8)), "c.png": png(RED)}, UsageError, "mixed sizes: `b.png` is 9×8"),
        ({f"{i}.png": png(RED, (9, 8)) for i in range(3)}, UsageError, "not square"),
        ({f"{i}.png": png(RED, (600, 600)) for i in range(3)}, UsageError, "are large"),
    ],
)
def test_bad_folders(tmp_path, files, error, named):
    (tmp_path / "p").mkdir()
    with pytest.raises(error, match=named) as e:
        open_pack(write(tmp_path / "p", files))
    assert e.value.hint and nothing_half_written()


def test_colour_that_comes_late_is_not_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr("gzcli.data.folder.PROBES", 2)
    folder = write(tmp_path / "p", {f"{i}.png": png(90, mode="L") for i in range(9)} | {"7.png": png(RED)})
    with pytest.raises(UsageError, match=r"`7.png` has colour") as e:
        open_pack(folder)
    assert "data.channels=3" in e.value.hint
    assert open_pack(folder, channels=3).meta.shape == (3, 8, 8)
    assert open_pack(folder, channels=1).meta.shape == (1, 8, 8)


# --- pictures ---


def test_every_kind_of_picture():
    def decoded(data, channels=3, size=None):
        return build.decode(data, "a", size, channels)[0]

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


def test_exif_rotation():
    image = Image.new("RGB", (16, 16), BLUE)
    image.paste(RED, (0, 0, 16, 8))  # red on top
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90° clockwise: red to the right
    out = io.BytesIO()
    image.save(out, "PNG", exif=exif)
    pixels, _ = build.decode(out.getvalue(), "a", None, 3)
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
    mixed = open_pack(write(tmp_path / "q", {"a.png": png(RED), "b.png": png(RED, (20, 9)), "c.png": png(RED)}), size=8)
    assert mixed.meta.resized and mixed.meta.shape == (3, 8, 8)


def test_pictures_for_a_method(tmp_path):
    folder = write(tmp_path / "p", {"b.png": png(RED, (20, 9)), "a.png": png(BLUE), "c/d.png": png(GREEN), "x.txt": b""})
    got = read_pictures(folder, size=8, channels=3, limit=2)
    assert got.shape == (2, 3, 8, 8) and got[:, :, 4, 4].tolist() == [list(BLUE), list(RED)]
    assert read_pictures(folder / "c" / "d.png", size=4, channels=1, limit=9).shape == (1, 1, 4, 4)
    for bad in (tmp_path / "none", write(tmp_path / "q", {"a.png": b"x"}), write(tmp_path / "r", {"a.txt": b"x"})):
        with pytest.raises(MissingError):
            read_pictures(bad, size=8, channels=3, limit=2)


def test_arrays_follow_the_same_rules(tmp_path):
    images = np.zeros((10, 16, 16, 3), np.uint8) + np.array(RED, np.uint8)
    np.savez(tmp_path / "a.npz", images=images)
    one = open_pack(tmp_path / "a.npz", size=8, channels=1)
    assert one.meta.shape == (1, 8, 8) and one.meta.resized and one.meta.classes == ()
    assert (one.images("train") == round(0.299 * RED[0] + 0.587 * RED[1] + 0.114 * RED[2])).all()
    np.savez(tmp_path / "b.npz", images=np.full((10, 8, 8), 65535, np.uint16), labels=np.arange(10)[:, None] % 2)
    two = open_pack(tmp_path / "b.npz")
    assert (two.images("train") == 255).all() and two.labels("train").ndim == 1 and two.meta.classes == ("0", "1")
    assert open_pack("digits", size=8).meta.shape == (1, 8, 8) and open_pack("digits", size=8).meta.resized
    assert open_pack("digits", channels=3).meta.shape == (3, 16, 16)
    assert open_pack("digits", size=16).folder == open_pack("digits").folder


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({"x": np.zeros(3)}, "has no images"),
        ({"images": np.zeros((4, 8, 8))}, "float64 of shape"),
        ({"images": np.zeros((4, 8, 8, 5), np.uint8)}, "of shape"),
        ({"images": np.zeros((4, 8, 8), np.uint8), "labels": np.zeros(3, int)}, "for 4 images"),
        ({"images": np.zeros((4, 8, 8), np.uint8), "labels": np.full(4, -1)}, "for 4 images"),
        ({"images": np.array([{}] * 4)}, "Python objects"),
        ({"train_images": np.zeros((4, 8, 8), np.uint8), "train_labels": np.zeros(4, int),
          "test_images": np.zeros((4, 8, 8), np.uint8)}, "some splits only"),
    ],
)  # fmt: skip
def test_bad_npz(tmp_path, arrays, named):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises((UsageError, MissingError), match=named):
        open_pack(tmp_path / "a.npz")
    assert nothing_half_written()


# --- archives that escape, explode or are damaged ---


def evil_tar(path: Path, **fields) -> Path:
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo(fields.pop("name", "a.png"))
        for key, value in fields.items():
            setattr(info, key, value)
        archive.addfile(info)
    return path


def evil_link_zip(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("a.png")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    return path


def bomb(path: Path) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.bmp", bytes(20_000_000))
        return path
    return as_tar(path, {"a.bmp": bytes(20_000_000)})


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda p: as_zip(p / "a.zip", {"../evil.png": png(RED)}), "`../evil.png` points outside"),
        (lambda p: as_zip(p / "a.zip", {"x/../../evil.png": png(RED)}), "points outside"),
        (lambda p: as_zip(p / "a.zip", {"/etc/evil.png": png(RED)}), "points outside"),
        (lambda p: evil_link_zip(p / "a.zip"), "is a link"),
        (lambda p: bomb(p / "a.zip"), "200 times"),
        (lambda p: as_tar(p / "a.tar", {"../evil.png": png(RED)}), "points outside"),
        (lambda p: evil_tar(p / "a.tar", name="/abs.png"), "points outside"),
        (lambda p: evil_tar(p / "a.tar", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "is a link"),
        (lambda p: evil_tar(p / "a.tar", type=tarfile.LNKTYPE, linkname="b.png"), "is a link"),
        (lambda p: evil_tar(p / "a.tar", type=tarfile.CHRTYPE), "is a device"),
        (lambda p: bomb(p / "a.tar.gz"), "200 times"),
    ],
)
def test_archives_that_escape_or_explode(tmp_path, make, named):
    path = make(tmp_path)
    with pytest.raises(MissingError, match=named) as e:
        open_pack(path)
    assert str(path) in e.value.message and e.value.hint
    assert nothing_half_written() and {p.name for p in tmp_path.iterdir()} <= {path.name, "home"}


def test_limit_on_unpacked_bytes(tmp_path, monkeypatch):
    path = as_zip(tmp_path / "a.zip", LAYOUTS["flat"][0])
    monkeypatch.setenv("GZ_MAX_ARCHIVE", "1000")
    with pytest.raises(MissingError, match="unpacks to more than") as e:
        open_pack(path)
    monkeypatch.setenv("GZ_MAX_ARCHIVE", e.value.hint.split("=")[1].split("`")[0])
    open_pack(path)


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.tar", "a.npz"])
def test_damaged_archives(tmp_path, name):
    random = np.random.default_rng(0).integers(0, 256, (30, 16, 16, 3), dtype=np.uint8)
    if name == "a.npz":
        np.savez_compressed(tmp_path / name, images=random)
    else:
        files = {f"{i}.png": png(RED) for i in range(30)}
        (as_zip if name == "a.zip" else as_tar)(tmp_path / name, files)
    whole = (tmp_path / name).read_bytes()
    for data in (whole[: len(whole) // 2], b"<html>not here</html>", whole[:300] + b"\xff" * 40 + whole[340:]):
        (tmp_path / name).write_bytes(data)
        with pytest.raises((MissingError, UsageError)):
            open_pack(tmp_path / name)
        assert nothing_half_written()


# --- the cache ---


def test_repacked_when_the_files_change(tmp_path):
    folder = write(tmp_path / "p", LAYOUTS["flat"][0])
    said = []
    first = open_pack(folder, say=said.append)
    assert len(said) == 1 and open_pack(folder, say=said.append).meta == first.meta and len(said) == 1
    write(folder, {"new.png": png(BLUE)})
    assert peek(folder) is None
    assert sum(open_pack(folder).meta.counts.values()) == 21
    assert open_pack(folder).meta.digest != first.meta.digest
    write(folder, {name: png(BLUE, (4, 4)) for name in [*LAYOUTS["flat"][0], "new.png"]})
    assert open_pack(folder, size=8).meta.resized and open_pack(folder).meta.shape == (3, 4, 4)


def test_keys(tmp_path, monkeypatch):
    for parent in ("a", "b"):
        write(tmp_path / parent / "My Photos", LAYOUTS["flat"][0])
    opened = open_pack(tmp_path / "a" / "My Photos")  # asked for by what it is, it is not packed again
    assert open_pack(tmp_path / "a" / "My Photos", size=8, channels=3).folder == opened.folder
    keys = {data_key(tmp_path / parent / "My Photos") for parent in "ab"}
    assert len(keys) == 2 and all(key.startswith("my-photos-") for key in keys)
    monkeypatch.chdir(tmp_path / "a")
    assert data_key("./My Photos") in keys and data_key("MNIST") == "mnist" and data_key("digits_ab") == "digits-ab"


def test_names_that_are_not_there():
    with pytest.raises(UsageError, match="no data set `mnits`") as e:
        open_pack("mnits")
    assert "`mnist`" in e.value.hint
    with pytest.raises(UsageError):
        find("mnits")
    with pytest.raises(MissingError, match="there is no"):
        open_pack("./nowhere/photos.zip")
    with pytest.raises(UsageError, match="between 4 and 1024"):
        open_pack("digits", size=2)
    with pytest.raises(UsageError, match=r"1 \(grey\) or 3"):
        open_pack("digits", channels=2)


def test_import_list_verify_remove(tmp_path):
    path = as_zip(tmp_path / "a.zip", LAYOUTS["classes"][0])
    assert import_set(path, "my-set")["classes"] == ["blue", "green", "red"]
    row = next(row for row in listing() if row["name"] == "my-set")
    assert row["classes"] == 3 and not row["cached"] and "my-set" in names()
    opened = open_pack("my_set")
    assert opened.meta.name == data_key("my-set") == "my-set" and data_path("my-set") == opened.folder
    row = next(row for row in listing() if row["name"] == "my-set")
    assert (row["cached"], row["size"], row["channels"], row["n_train"] + row["n_test"]) == (True, 8, 3, 24)
    assert verify("my-set")["packs"] == [str(opened.folder)]
    with open(opened.folder / "train.npy", "r+b") as f:
        f.seek(-5, 2)
        f.write(b"?")
    with pytest.raises(MissingError, match=r"train.npy` is damaged"):
        verify("my-set")
    for name, why in (("mnist", "already"), ("a b", "cannot be"), ("my_set", "taken")):
        with pytest.raises(UsageError, match=why):
            import_set(path, name)
    with pytest.raises(MissingError):
        import_set(tmp_path / "none", "other")
    remove("my-set")
    assert "my-set" not in names() and not opened.folder.exists() and path.exists()


def test_an_imported_set_outlives_its_files(tmp_path):
    path = as_zip(tmp_path / "a.zip", LAYOUTS["classes"][0])
    import_set(path, "kept")
    import_set(path, "lost")
    open_pack("kept")
    path.unlink()
    assert open_pack("kept").meta.counts["train"] and listing()
    with pytest.raises(MissingError, match="is gone"):
        open_pack("lost")


def test_read_only_cache(tmp_path, monkeypatch):
    folder = write(tmp_path / "p", LAYOUTS["flat"][0])

    def refused(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", refused)
    with pytest.raises(MissingError, match="No space left"):
        open_pack(folder)
    assert nothing_half_written()


def test_two_processes_pack_once(tmp_path):
    path = as_zip(tmp_path / "a.zip", LAYOUTS["classes"][0])
    code = f"from gzcli.data.pack import open_pack; open_pack({str(path)!r}, say=print)"
    two = [
        subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = "".join(process.communicate(timeout=30)[0] for process in two)
    assert [process.returncode for process in two] == [0, 0] and said.count("packing") - said.count("waiting") in (0, 1)
    assert said.count("images") == 1


def test_looking_at_metadata_imports_nothing_heavy():
    open_pack("digits")
    code = (
        "import sys; from gzcli.data.library import listing; from gzcli.data.pack import peek, data_key; "
        "from gzcli.data.augment import parse_augment; listing(); assert peek('digits').levels == 17; "
        "print([m for m in ('torch', 'numpy', 'PIL', 'sklearn', 'urllib.request') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stdout + out.stderr


def test_memory_is_bounded(tmp_path):
    """A source of 60 MB is packed within 12 MB of Python and numpy memory."""
    spec = replace(SPECS["cifar10"], size=64)

    def blocks():
        for start in range(0, 5000, 50):
            yield "train", start, np.full((50, 3, 64, 64), start // 50, np.uint8), "a"

    source = build.Source("big", (), {"train": 5000}, {}, blocks, shape=spec.shape)
    (tmp_path / "out").mkdir()
    tracemalloc.start()
    build.build(source, tmp_path / "out", size=None, channels=None, extra={})
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert np.load(tmp_path / "out" / "train.npy", mmap_mode="r")[-1].max() == 99


@pytest.mark.slow
@pytest.mark.parametrize("name", ["faces64", "imagenette64", "textures64", "orange2lemon32", "pneumoniamnist"])
def test_real_sets(shared_data, name):
    path = next((shared_data / "sets").glob(f"{name}.*"))
    opened = open_pack(path)
    assert opened.images("train").std() > 20 and len(opened.meta.classes) in (2, 10)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            first = sorted(n for n in archive.namelist() if "test" in n and n.endswith("png"))[0]
            pixels = np.asarray(Image.open(io.BytesIO(archive.read(first))).convert("RGB")).transpose(2, 0, 1)
        assert (opened.images("test")[0] == pixels).all()
