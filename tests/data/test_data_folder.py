"""The user's own images, good and bad: layouts, captions, arrays, dataset folders, archives that lie."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tarfile
import time
import zipfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from pictures import (
    BLUE,
    COLOURS,
    GREEN,
    LAYOUTS,
    RED,
    SPLITS,
    as_deflated,
    as_tar,
    as_zip,
    nothing_half_written,
    png,
    write,
)
from PIL import EpsImagePlugin, features
from refused import refused

from gzcli.core.errors import DeviceError, MissingError, UsageError
from gzcli.data.library import import_set
from gzcli.data.packs import build, stream
from gzcli.data.packs.open import crops_of, facts_of, open_pack
from gzcli.data.readers import archive
from gzcli.data.readers.folder import open_path, read_pictures
from gzcli.data.readers.images import PILLOW_FORMATS, Block, walk
from gzcli.data.readers.pictures import Decoding, decode
from gzcli.data.sets.registry import Form, OwnSet, locate

pytestmark = pytest.mark.usefixtures("home")
FORMS = ["folder", "zip", "tar", "tar.gz", "wrapped zip"]  # a form for each layout, and all for class folders


@pytest.mark.parametrize(
    ("layout", "form"), [*zip(LAYOUTS, FORMS, strict=True), *(("classes", form) for form in FORMS)]
)
def test_layouts(tmp_path, layout, form):
    files, classes = LAYOUTS[layout]
    files = {**files, "readme.txt": b"x", "__MACOSX/._a.png": b"x", ".hidden/a.png": b"x"}
    if form == "wrapped zip":
        files = {f"outer/{name}": data for name, data in files.items()}
    path = tmp_path / f"set.{form.split()[-1]}"
    path = write(path, files) if form == "folder" else (as_tar if "tar" in form else as_zip)(path, files)
    opened = open_pack(str(path))
    assert opened.meta.classes == classes and opened.meta.shape == (3, 8, 8) and not opened.meta.resized
    assert sum(opened.meta.counts.values()) == len(LAYOUTS[layout][0])
    colour = {**COLOURS, "A": RED, "B": BLUE, "flat": RED, "flat splits": BLUE}
    for split in SPLITS:
        for i, image in enumerate(opened.images(split)):
            kind = classes[opened.labels(split)[i]] if classes else layout
            assert image[:, 3, 5].tolist() == list(colour[kind])
    if layout == "splits":
        assert opened.meta.counts["test"] == 18
    if layout == "flat splits":
        assert opened.meta.counts == {"train": 6, "val": 6, "test": 6} and opened.labels("train") is None


GOOD = {f"{i}.png": png(RED) for i in range(9)}
BAD_FOLDERS = [
    ({}, MissingError, "contains no images"),
    ({"notes.txt": b"x"}, MissingError, "contains no images"),
    ({"a.png": png(RED), "cats/b.png": png(RED)}, UsageError, "beside its class folders, such as `a.png`"),
    ({"train/a.png": png(RED), "extra/b.png": png(RED)}, UsageError, "images outside its splits"),
    ({"test/a.png": png(RED), "val/b.png": png(RED)}, UsageError, "splits but no `train`"),
    (GOOD | {"zz.png": png(RED)[:40]}, MissingError, "`zz.png` cannot be decoded"),
    (GOOD | {"zz.jpg": b"hello"}, MissingError, "`zz.jpg` cannot be decoded"),
    (GOOD | {"2.png": png(RED, (9, 8))}, UsageError, "mixed sizes: `2.png` is 9×8"),
    ({f"{i}.png": png(RED, (600, 600)) for i in range(3)}, UsageError, "are too large"),
]


def test_bad_folders(tmp_path):
    for i, (files, error, named) in enumerate(BAD_FOLDERS):
        (tmp_path / f"{i}").mkdir()
        with pytest.raises(error, match=named) as e:
            open_pack(write(tmp_path / f"{i}", files))
        assert e.value.hint and nothing_half_written(), named


def test_colour_that_comes_late_is_not_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr("gzcli.data.readers.images.PROBED_IMAGES", 2)
    folder = write(tmp_path / "p", {f"{i}.png": png(90, mode="L") for i in range(9)} | {"7.png": png(RED)})
    with pytest.raises(UsageError, match=r"`7.png` has colours") as e:
        open_pack(folder)
    assert "data.channels=3" in e.value.hint
    assert open_pack(folder, channels=3).meta.shape == (3, 8, 8)
    assert open_pack(folder, channels=1).meta.shape == (1, 8, 8)


def test_pictures_for_a_method(tmp_path):
    files = {"b.png": png(RED, (20, 9)), "a.png": png(BLUE), "c/d.png": png(GREEN), "x.txt": b""}
    folder = write(tmp_path / "p", files)
    got = read_pictures(folder, size=8, channels=3, limit=2)
    assert got.shape == (2, 3, 8, 8) and got[:, :, 4, 4].tolist() == [list(BLUE), list(RED)]
    assert read_pictures(folder / "c" / "d.png", size=4, channels=1, limit=9).shape == (1, 1, 4, 4)
    for i, bad in enumerate(({}, {"a.png": b"x"}, {"a.txt": b"x"})):
        with pytest.raises(MissingError):
            read_pictures(write(tmp_path / f"{i}", bad), size=8, channels=3, limit=2)


def test_captions(tmp_path):
    lines = "".join(f'{{"file_name": "{i}.png", "text": "picture {i}"}}\n' for i in range(10))
    files = {f"train/{i}.png": png((i, 0, 9)) for i in range(10)} | {"train/metadata.jsonl": lines.encode()}
    files |= {f"test/{i}.png": png((i, 0, 7)) for i in range(4)}
    files |= {f"test/{i}.txt": f"beside {i}\n".encode() for i in range(3)}
    for make, name in ((write, "folder"), (as_zip, "a.zip"), (as_tar, "a.tar")):
        opened = open_pack(make(tmp_path / name, files))
        for split in ("train", "val"):
            assert opened.captions(split) == [f"picture {image[0, 0, 0]}" for image in opened.images(split)]
        assert opened.captions("test") == ["beside 0", "beside 1", "beside 2", ""], name
        assert opened.meta.classes == ()


BAD_LINES = [
    ('{"file_name": "0.png"}', "line 2 of `metadata.jsonl`.*lacks `file_name` or `text`"),
    ("0.png a red door", "line 2 of `metadata.jsonl`"),
    ("[1]", "line 2 of `metadata.jsonl`"),
    ('{"file_name": "none.png", "caption": "x"}', "names `none.png`"),
    ('{"file_name": "0.png", "text": "\xff"}', "not UTF-8"),
]


def test_bad_captions(tmp_path):
    for i, (line, named) in enumerate(BAD_LINES):
        text = '{"file_name": "0.png", "text": "a"}\n' + line
        with pytest.raises((MissingError, UsageError), match=named):
            open_pack(write(tmp_path / f"{i}", GOOD | {"metadata.jsonl": text.encode("latin-1")}))


SAVED = {  # form → its counts, and how many texts are missing
    "saved": ({"train": 16, "val": 2, "test": 2}, 1),
    "saved dict": ({"train": 20, "val": 5, "test": 6}, 3),
    "parquet": ({"train": 18, "val": 2, "test": 6}, 2),
    "parquet in data": ({"train": 18, "val": 2, "test": 6}, 2),
}


def test_dataset_folders(tmp_path):
    datasets = pytest.importorskip("datasets")
    names = datasets.ClassLabel(names=["red", "blue"])
    features = {"image": datasets.Image(), "label": names, "text": datasets.Value("string")}

    def made(n):
        rows = {
            "image": [{"bytes": png((RED, BLUE)[i % 2]), "path": None} for i in range(n)],
            "label": [i % 2 for i in range(n)],
            "text": [f"image {i}" if i else None for i in range(n)],
        }
        return datasets.Dataset.from_dict(rows, features=datasets.Features(features))

    made(20).save_to_disk(tmp_path / "saved")
    parts = {"train": made(20), "validation": made(5), "test": made(6)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved dict")
    for root in (tmp_path / "parquet", tmp_path / "parquet in data" / "data"):
        root.mkdir(parents=True)
        for split in ("train", "test"):
            parts[split].to_parquet(root / f"{split}-00000-of-00001.parquet")
    for form, (counts, untold) in SAVED.items():
        opened = open_pack(tmp_path / form)
        assert opened.meta.classes == ("red", "blue") and opened.meta.shape == (3, 8, 8)
        assert opened.meta.counts == counts, form
        texts = []
        for split in SPLITS:
            rows = (opened.images(split), opened.labels(split), opened.captions(split))
            for image, label, text in zip(*rows, strict=True):
                assert image[:, 0, 0].tolist() == list((RED, BLUE)[label])
                assert text == "" or int(text.split()[1]) % 2 == label
                texts.append(text)
        assert texts.count("") == untold, form


def test_a_dataset_folder_without_the_package_or_images(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(str(tmp_path / "text"))
    with pytest.raises(UsageError, match="no column of images") as e:
        open_pack(tmp_path / "text")
    assert "`text`" in e.value.hint
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingError, match="requires the package `pyarrow`") as e:
        open_pack(tmp_path / "text")
    assert "pip install 'gzcli[datasets]'" in e.value.hint


def bad_set(path: Path, n: int = 30) -> Path:
    """Pictures 0 … n − 1 of brightness i in two classes and two splits, four of them not readable."""
    files = {f"{s}/{c}/{i:03}.png": png((i, i, 9)) for s, c, i in places(n)}
    for i, (s, c, k) in enumerate(places(n)):
        if i in (0, 7, n - 1, n // 2):
            files[f"{s}/{c}/{k:03}.png"] = b"" if i == 7 else png(RED)[:50]
    return write(path, files)


def places(n):
    return [("test" if i % 5 == 4 else "train", "ab"[i % 2], i) for i in range(n)]


def test_unreadable_pictures_are_listed_and_left_out_only_if_asked(tmp_path):
    folder = bad_set(tmp_path / "p")
    with pytest.raises(MissingError, match=r"4 images of .* cannot be decoded") as e:
        open_pack(folder)
    for name in ("train/a/000.png", "train/b/007.png", "test/b/029.png", "train/b/015.png"):
        assert f"`{name}`" in e.value.message
    assert e.value.hint.endswith(f": gz data import {folder} --name p --skip-bad") and nothing_half_written()
    with pytest.raises(MissingError) as e:
        open_pack(folder, size=8)
    assert e.value.hint.endswith(f": gz data import {folder} --name p --size 8 --skip-bad")
    import_set(folder, "good", Form(skip_bad=True))
    opened = open_pack("good")
    assert len(opened.meta.skipped) == 4 and sum(opened.meta.counts.values()) == 26
    assert facts_of(locate("good")).n == opened.meta.counts["train"], "one number wherever it is said"
    seen = []
    for split in SPLITS:
        images, labels = opened.images(split), opened.labels(split)
        assert len(images) == len(labels) == opened.meta.counts[split]
        for image, label in zip(images, labels, strict=True):
            i = int(image[0, 0, 0])
            assert label == i % 2 and (split == "test") == (i % 5 == 4) and (image[2] == 9).all()
            seen.append(i)
    assert sorted(seen) == sorted(set(range(30)) - {0, 7, 15, 29})
    import_set(write(tmp_path / "q", {f"{i}.png": b"x" for i in range(9)}), "bad", Form(skip_bad=True))
    with pytest.raises(MissingError, match="none of the sampled images"):
        open_pack("bad")
    import_set(folder, "good")  # without the flag: refused again
    with pytest.raises(MissingError, match="4 images"):
        open_pack("good")


UNREADABLE = Path("/proc/self/mem")  # a regular file that even root cannot read at its beginning


@pytest.mark.skipif(not UNREADABLE.exists(), reason="it is a file of Linux")
@pytest.mark.parametrize("kind", ["png", "npy"])
def test_a_file_that_cannot_be_read_is_left_out_as_one_that_does_not_decode(tmp_path, kind):
    folder = write(tmp_path / "p", {f"{i}.png": png((i, 0, 9)) for i in range(9)} if kind == "png" else {})
    folder.mkdir(exist_ok=True)
    for i in range(9) if kind == "npy" else ():
        np.save(folder / f"{i}.npy", np.full((8, 8), i, np.float32))
    (folder / f"00.{kind}").symlink_to(UNREADABLE)
    unread = f"`{folder}/00.{kind}` cannot be read: Input/output error"
    assert "--skip-bad" in refused(unread, open_pack, folder, error=MissingError).hint
    assert nothing_half_written()
    scored = open_pack(OwnSet(folder, form=Form(skip_bad=True, layout="flat")), foreign=True)
    assert scored.meta.skipped == (unread,) and scored.names("test") == [f"{i}.{kind}" for i in range(9)]
    if kind == "png":
        assert [image[0, 0, 0] for image in scored.images("test")] == list(range(9))
        assert crops_of(OwnSet(folder), None) == []
        refused(unread, read_pictures, folder, size=8, channels=3, limit=None, error=MissingError)
    (folder / "metadata.jsonl").symlink_to(UNREADABLE)
    refused("metadata.jsonl` cannot be read: Input/output error", open_path, folder, error=MissingError)


def test_mixed_sizes_and_unreadable_pictures_are_one_error(tmp_path, monkeypatch):
    files = {f"{i}.png": png(RED, (16 + 8 * (i == 3), 16)) for i in range(9)}
    bad = {"0.png": b"x", "5.png": files["5.png"][:-30], "7.png": b"\0\0\0\x18ftypheic"}
    folder, mixed = write(tmp_path / "p", files | bad), "mixed sizes: `3.png` is 24×16.* Also, "
    for read in (open_pack, lambda path: crops_of(OwnSet(path), None)):
        e = refused(f"{mixed}3 images .*`0.png` .*`5.png` .*`7.png` .* HEIC", read, folder)
        assert "data.size=16" in e.hint and "replace or remove" in e.hint
    with monkeypatch.context() as patch:  # in a large set, headers only
        patch.setattr(build, "MAX_DECODED_BYTES", 0)
        refused(f"{mixed}2 images .*`0.png` .*`7.png` .* HEIC", open_pack, folder)
    import_set(folder, "readable", Form(skip_bad=True))
    assert "Also" not in refused("mixed sizes", open_pack, "readable").message
    photo = write(tmp_path / "q", {"a.heic": files["1.png"]}) / "a.heic"
    assert refused("is not a set of images", open_pack, photo).hint == "convert it to JPEG or PNG"


def test_worker_processes_pack_the_same(tmp_path, monkeypatch):
    folder = bad_set(tmp_path / "p", 300)
    import_set(folder, "one", Form(skip_bad=True))
    import_set(folder, "many", Form(skip_bad=True))
    one = open_pack("one")
    monkeypatch.setattr(stream, "MAX_IMAGES_IN_PROCESS", 10)
    monkeypatch.setattr(stream, "cores", lambda: 2)
    started = []

    def pool(*args, **options):
        started.append(args)
        return ProcessPoolExecutor(*args, **options)

    monkeypatch.setattr(stream, "ProcessPoolExecutor", pool)
    many = open_pack("many")
    assert started and many.meta.digest == one.meta.digest and many.meta.skipped == one.meta.skipped
    with pytest.raises(UsageError, match="mixed sizes"):  # an error in a worker is the same error
        open_pack(write(tmp_path / "q", {f"{i}.png": png(RED, (8 + (i == 40), 8)) for i in range(60)}))


def die(block):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed(monkeypatch):
    monkeypatch.setattr(stream, "cores", lambda: 2)
    with pytest.raises(DeviceError, match="worker process was killed"):
        list(stream.map_blocks(die, [Block("train", 0, b"x", "a")] * 200, 10_000))


def test_arrays_follow_the_same_rules(tmp_path):
    images = np.zeros((10, 16, 16, 3), np.uint8) + np.array(RED, np.uint8)
    np.savez(tmp_path / "a.npz", images=images)
    one = open_pack(tmp_path / "a.npz", size=8, channels=1)
    assert one.meta.shape == (1, 8, 8) and one.meta.resized and one.meta.classes == ()
    assert (one.images("train") == round(0.299 * RED[0] + 0.587 * RED[1] + 0.114 * RED[2])).all()
    white = np.full((10, 8, 8), 65535, np.uint16)
    np.savez(tmp_path / "b.npz", images=white, labels=np.arange(10)[:, None] % 2)
    two = open_pack(tmp_path / "b.npz")
    assert two.meta.notes == ("10 images of 16 bits, read as 0 … 65,535",) and one.meta.notes == ()
    assert (two.images("train") == 255).all() and two.labels("train").ndim == 1
    assert two.meta.classes == ("0", "1")
    assert open_pack("digits", size=8).meta.shape == (1, 8, 8) and open_pack("digits", size=8).meta.resized
    assert open_pack("digits", channels=3).meta.shape == (3, 16, 16)
    assert open_pack("digits", size=16).folder == open_pack("digits").folder


X = np.zeros((4, 8, 8), np.uint8)
BAD_ARRAYS = [
    ({"embedding": np.zeros(3)}, "has no images"),
    ({"images": np.zeros((4, 8, 8), complex)}, "complex128 of shape"),
    ({"images": np.zeros((4, 8, 8, 8), np.uint8)}, "of shape"),
    ({"images": X, "labels": np.zeros(3, int)}, "of 4 images"),
    ({"images": X, "labels": np.full(4, -1)}, "has labels from -1 to -1"),
    ({"images": np.array([{}] * 4)}, "Python objects"),
    ({"train_images": X, "train_labels": np.zeros(4, int), "test_images": X}, "some splits only"),
]


def test_bad_npz(tmp_path):
    for arrays, named in BAD_ARRAYS:
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises((UsageError, MissingError), match=named) as e:
            open_pack(tmp_path / "a.npz")
        assert nothing_half_written() and ("complex" not in named or "numbers" in e.value.hint)


def evil_tar(path: Path, **fields) -> Path:
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo(fields.pop("name", "a.png"))
        for key, value in fields.items():
            setattr(info, key, value)
        archive.addfile(info)
    return path


def evil_link_zip(path: Path) -> Path:
    info = zipfile.ZipInfo("a.png")
    info.external_attr = 0o120777 << 16
    return as_zip(path, {info: b"/etc/passwd"})


BOMB = {"a.bmp": bytes(20_000_000)}
ESCAPES = [
    (lambda p: as_zip(p / "a.zip", {"../evil.png": png(RED)}), "`../evil.png` points outside"),
    (lambda p: as_zip(p / "a.zip", {"x/../../evil.png": png(RED)}), "points outside"),
    (lambda p: as_zip(p / "a.zip", {"/etc/evil.png": png(RED)}), "points outside"),
    (lambda p: evil_link_zip(p / "a.zip"), "is a link"),
    (lambda p: as_deflated(p / "a.zip", BOMB), "200 times"),
    (lambda p: as_tar(p / "a.tar", {"../evil.png": png(RED)}), "points outside"),
    (lambda p: evil_tar(p / "a.tar", name="/abs.png"), "points outside"),
    (lambda p: evil_tar(p / "a.tar", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "is a link"),
    (lambda p: evil_tar(p / "a.tar", type=tarfile.LNKTYPE, linkname="b.png"), "is a link"),
    (lambda p: evil_tar(p / "a.tar", type=tarfile.CHRTYPE), "is a device"),
    (lambda p: as_tar(p / "a.tar.gz", BOMB), "200 times"),
]


def test_archives_that_escape_or_explode(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MAX_DENSE_BYTES", 10_000_000)
    for i, (make, named) in enumerate(ESCAPES):
        folder = tmp_path / f"{i}"
        folder.mkdir()
        path = make(folder)
        with pytest.raises(MissingError, match=named) as e:
            open_pack(path)
        assert str(path) in e.value.message and e.value.hint, named
        assert nothing_half_written() and list(folder.iterdir()) == [path]
    assert not list(tmp_path.rglob("*evil*"))


def test_images_of_one_colour_are_no_bomb(tmp_path, monkeypatch):
    """As a collapsed sampler makes them: an npz, and a zip of pictures that is packed or streamed."""
    np.savez_compressed(tmp_path / "a.npz", samples=np.full((400, 64, 64, 3), 77, np.uint8))
    assert (tmp_path / "a.npz").stat().st_size * 900 < 400 * 64 * 64 * 3, "nearly all that deflate can do"
    assert open_pack(tmp_path / "a.npz").meta.counts["train"] == 320
    pictures = {f"{i}.bmp": png(RED, (256, 256), format="BMP") for i in range(12)}
    for streamed, name in enumerate(("a.zip", "b.zip")):
        if streamed:
            monkeypatch.setenv("GZ_PACK_LIMIT", "1000000")
        pack = open_pack(as_deflated(tmp_path / name, pictures))
        assert bool(pack.meta.streamed) == streamed and pack.images("train")[0][:, 9, 9].tolist() == list(RED)


def test_limit_on_unpacked_bytes(tmp_path, monkeypatch):
    path = as_zip(tmp_path / "a.zip", LAYOUTS["flat"][0])
    monkeypatch.setenv("GZ_MAX_ARCHIVE", "1000")
    with pytest.raises(MissingError, match="unpacks to more than") as e:
        open_pack(path)
    monkeypatch.setenv("GZ_MAX_ARCHIVE", e.value.hint.split("=")[1].split("`")[0])
    open_pack(path)


def images(*folders: str, n: int = 4) -> dict[str, bytes]:
    return {f"{folder}/{i}.png": png(RED) for folder in folders for i in range(n)}


def read(root: Path, files: dict[str, bytes], form: str | None = None):
    """(classes, split → how many of each class, notes)"""
    source = open_path(write(root / "set", files), Form(layout=form))
    counts = {split: Counter({None: n}) for split, n in source.counts.items()}
    if source.labels:
        counts = {split: Counter(source.classes[y] for y in source.labels[split]) for split in counts}
    return source.classes, counts, source.notes


CATS = Counter(cat=4, dog=4)


def test_splits_by_their_usual_names(tmp_path):
    names = ("training testing", "Train Test", "train_images test-images", "training_set test_set")
    for train, test in map(str.split, names):
        files = images(f"{train}/cat", f"{train}/dog", f"{test}/cat", f"{test}/dog")
        classes, counts, _ = read(tmp_path / train, files)
        assert classes == ("cat", "dog") and counts == {"train": CATS, "test": CATS}, train
    below = images("cat/train", "cat/test", "dog/train", "dog/test", "dog/valid")
    classes, counts, _ = read(tmp_path / "below", below)
    assert classes == ("cat", "dog") and counts == {"train": CATS, "test": CATS, "val": Counter(dog=4)}
    # a lone folder in each split means nothing
    classes, counts, _ = read(tmp_path / "lone", images("train/images", "test/images"))
    assert classes == () and counts == {"train": Counter({None: 4}), "test": Counter({None: 4})}
    kaggle = ("training_set/training_set/cat", "training_set/training_set/dog", "test_set/test_set/cat")
    assert read(tmp_path / "twice", images(*kaggle))[1] == {"train": CATS, "test": Counter(cat=4)}


def test_tiny_imagenet_by_path(tmp_path):
    files = images("train/n01/images", "train/n02/images", "val/images", "test/images")
    lines = "".join(f"{i}.png\t{'n01' if i else 'n02'}\t0\t0\t62\t62\n" for i in range(4))
    files |= {"val/val_annotations.txt": lines.encode(), "wnids.txt": b"n01\nn02\n"}
    classes, counts, notes = read(tmp_path, files)
    assert classes == ("n01", "n02")
    assert counts == {"train": Counter(n01=4, n02=4), "val": Counter(n02=1, n01=3)}
    assert notes == ["4 images of `test` skipped: they have no labels"]


@pytest.mark.parametrize(
    "table",
    [
        "file,label\nimg/0.png,cat\nimg/1.png,dog\nimg/2.png,cat\nimg/3.png,dog\n",
        "id;breed\r\n0;cat\r\n1;dog\r\n2;cat\r\n3;dog\r\n",
        "\ufeffn\tpath\tClass\n0\tx\\0.png\tcat\n1\tx\\1.png\tdog\n2\tx\\2.png\tcat\n3\tx\\3.png\tdog",
        "y,id\n0,0\n1,1\n0,2\n1,3\n",
        '0.png,"cat"\n1.png,dog\n2.png,cat\n3.png,dog\n',
    ],
    ids=["head", "stems", "paths", "numbers", "bare"],
)
def test_a_table_gives_labels(tmp_path, table):
    files = {f"img/{i}.png": png((i, 0, 9)) for i in range(4)} | {"list.csv": table.encode()}
    classes, counts, notes = read(tmp_path, files)
    cat, dog = ("0", "1") if table.startswith("y") else ("cat", "dog")
    assert classes == (cat, dog) and counts == {"train": Counter({cat: 2, dog: 2})}
    assert notes == ["labels from `list.csv`"]


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ("file,label\n0.png,cat\n1.png,dog\n", "it has no label for 2 images, such as `img/2.png`"),
        ("a,label\nx,cat\n", "it has no column of image files"),
        ("file,x,z\n0.png,1,2\n", "it has no column `label`"),
        ("file,text\n0.png,a door\n", "it has no column `label`"),
        ("file,age\n0.png,1\n1.png,2\n2.png,3\n3.png,4\n", "its labels do not repeat"),
        ("file,label\n0.png,cat\n0.png,dog\n", "it has several labels for `img/0.png`"),
        ("", "it has no column of image files"),
    ],
)
def test_a_table_without_labels_is_skipped_with_a_reason(tmp_path, table, why):
    files = {f"img/{i}.png": png((i, 0, 9)) for i in range(4)} | {"list.csv": table.encode()}
    classes, _, notes = read(tmp_path, files)
    assert classes == () and notes == [f"`list.csv` skipped: {why}"]


CATS_TABLE = "file,label\n0.png,cat\n1.png,Kätzchen\n2.png,cat\n3.png,Kätzchen\n"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (CATS_TABLE.encode("latin-1"), "probably LATIN1: byte 0xE4 in line 3"),
        (CATS_TABLE.replace("ä", "€").encode("cp1252"), "probably WINDOWS-1252: byte 0x80 in line 3"),
        (CATS_TABLE.encode("utf-16"), "probably UTF-16: byte 0xFF in line 1"),
        ("file,label\n0.png,cat\n".encode("utf-16-le"), "probably UTF-16LE: byte 0x00 in line 1"),
        (CATS_TABLE.encode("utf-32"), "probably UTF-32: byte 0xFF in line 1"),
        (png(RED), "is not UTF-8 text: byte 0x89 in line 1"),
    ],
    ids=["latin-1", "windows", "utf-16", "no mark", "utf-32", "binary"],
)
def test_texts_in_another_encoding_are_refused_with_its_name(tmp_path, content, named):
    for i, name in enumerate(
        ("list.csv", "list.tsv", "0.cls", "0.txt", "metadata.jsonl", "val/val_annotations.txt")
    ):
        folder = write(tmp_path / f"{i}", images("train", "val") | {name: content})
        if "/" not in name:
            folder = write(tmp_path / f"{i}", {"0.png": png(RED)})
        e = refused(f"`{name}` in `{folder}` is not UTF-8 text.*{named.split('text')[-1]}", open_path, folder)
        encoding = named.partition("probably ")[2].partition(":")[0]
        assert (f"`iconv -f {encoding} -t UTF-8 {Path(name).name} > " in e.hint) == bool(encoding)
    files = {f"{i}.png": png(RED) for i in range(4)} | {"list.csv": CATS_TABLE.encode("utf-8-sig")}
    assert read(tmp_path / "good", files)[0] == ("Kätzchen", "cat")


def test_tables_of_many_columns_and_of_long_fields(tmp_path):
    files = {f"{i}.png": png(RED) for i in range(12)}
    cells = [
        f"{i}.png,{'ab'[i % 2]}," + ",".join(str(i * j % 256) for j in range(100_000)) for i in range(12)
    ]
    heads = "file,label," + ",".join(f"c{j}" for j in range(100_000))
    since = time.process_time()
    assert read(tmp_path / "wide", files | {"list.csv": "\n".join([heads, *cells]).encode()})[0] == ("a", "b")
    assert time.process_time() - since < 3
    _, _, notes = read(tmp_path / "long", files | {"list.csv": b"file,label\n0.png," + b"x" * 200_000})
    assert notes == ["`list.csv` is not a table: field larger than field limit (131072) in line 2; skipped"]
    lines = (f'{{"file_name": "{i}.png", "text": "a\u2028b\x85c"}}\r\n' for i in range(12))
    captions = open_path(
        write(tmp_path / "lines", files | {"metadata.jsonl": "".join(lines).encode()})
    ).captions
    assert set(captions["train"]) == {"a\u2028b\x85c"}


def test_a_class_of_a_handful_of_images_is_reported(tmp_path):
    files = images("rare", n=3) | images("usual", n=90)
    assert open_pack(write(tmp_path / "set", files)).meta.notes == (
        "too few images for validation and test: `rare`",
        "`rare` has 3 training images, `usual` has 72",
    )
    files = images("rare", n=5) | images("usual", n=20)
    assert open_pack(write(tmp_path / "even", files)).meta.notes == ()


def test_mvtec(tmp_path):
    marks = ("ground_truth/cut", "ground_truth/hole")
    files = images("train/good", "test/good", "test/cut", "test/hole", *marks)
    classes, counts, notes = read(tmp_path, files | {"license.txt": b"x", "readme.md": b"x"})
    assert classes == () and counts == {"train": Counter({None: 4}), "test": Counter({None: 4})}
    assert notes == [
        "8 images of `ground_truth` kept for `gz ood`, as masks of defects",
        "8 images of `test/cut` and 1 other folder kept for `gz ood`, as images with defects",
        "1 file of unknown kind skipped (.md)",
    ]


def test_masks_of_a_set_that_is_not_inspected_are_skipped(tmp_path):
    _, counts, notes = read(tmp_path, images("train/cat", "train/dog", "masks/cat"))
    assert counts == {"train": CATS} and notes == ["4 images of `masks` skipped: they annotate other images"]


@pytest.mark.parametrize(
    ("folders", "loose", "layout", "classes"),
    [
        ("cat dog", "a.png", "classes", ("cat", "dog")),
        ("set/cat set/dog", "set/a.png", "classes", ("cat", "dog")),
        ("train/cat train/dog", "a.png", "splits", ("cat", "dog")),
        ("train/cat train/dog", "train/a.png", "splits", ("cat", "dog")),
        ("cat/train dog/train", "a.png", "class-splits", ("cat", "dog")),
    ],
)
def test_images_outside_folders_are_skipped_if_the_layout_is_chosen(
    tmp_path, folders, loose, layout, classes
):
    """The error without a layout shows the command that chooses one."""
    files = images(*folders.split()) | {loose: png(RED), f"{loose[:-5]}b.png": png(RED)}
    e = refused("", open_path, write(tmp_path / "set", files))
    assert loose in e.message and f"{layout}" in e.hint
    found, counts, notes = read(tmp_path, files, layout)
    assert found == classes and counts == {"train": CATS}
    assert notes == [f"2 images outside folders skipped (`{loose}`)"]
    alone = write(tmp_path / "alone", {"a.png": png(RED)})
    e = refused(f"has no folders for the layout `{layout}`", open_path, alone, Form(layout=layout))
    assert layout not in e.hint.partition("(")[2].partition(")")[0].replace(" or", ",").split(", ")


AMBIGUOUS = {
    "train/cat train/dog test/cat test/zebra": "`test/zebra` of .* is a class that `train` lacks",
    "train/cat valid/cat validation/cat": "`valid` and `validation`, which are the same split",
    "train car plane": "`train` is a split, or a class like `car`",
    "images masks": "`masks` beside its images",
    "cat/train cat/test dog": "a split `cat/train`, but `dog/0.png` is outside|a split `cat/test`",
    "train test/cat test/dog": "`test/cat` of .* is a class that `train` lacks",
}


def test_what_is_ambiguous_is_named(tmp_path):
    for i, (folders, named) in enumerate(AMBIGUOUS.items()):
        with pytest.raises(UsageError, match=named) as e:
            read(tmp_path / f"{i}", images(*folders.split()))
        assert e.value.hint and nothing_half_written()
    in_splits = images("train/train", "train/bus", "test/train", "test/bus")
    assert read(tmp_path / "told", in_splits)[0] == ("bus", "train")


def test_a_class_called_train(tmp_path):
    files = images("train", "car", "plane")
    classes, counts, _ = read(tmp_path, files, "classes")
    assert classes == ("car", "plane", "train") and set(counts) == {"train"}
    path = tmp_path / "set"
    import_set(path, "vehicles", Form(layout="classes"))
    assert open_pack("vehicles").meta.classes == ("car", "plane", "train")
    import_set(path, "vehicles", Form(layout="flat"))  # said otherwise: packed anew
    assert open_pack("vehicles").meta.classes == ()
    with pytest.raises(UsageError, match="in a class but not in a split"):
        open_path(path, Form(layout="class-splits"))


def test_skipped_files_are_told_when_a_set_is_opened_first(tmp_path):
    files = {f"train/{c}/{i}.png": png(RED) for c in ("airplane", "bird", "cat", "truck") for i in range(10)}
    files |= {f"test/cat/{i}.png": png(BLUE) for i in range(3)}
    unknown = ("train/cat/a.heic", "train/cat/b.heic", "index.rst")
    files |= dict.fromkeys((*unknown, ".DS_Store", "Thumbs.db"), b"x")
    said: list[str] = []
    path = write(tmp_path / "set", files)
    opened, note = open_pack(path, say=said.append), "3 files of unknown kinds skipped (.heic .rst)"
    assert said[1].endswith(f": 36 train, 4 val, 3 test; 4 classes airplane to truck; {note}")
    assert opened.meta.notes == (note,)
    said.clear()
    open_pack(path, say=said.append)
    assert said == []
    with pytest.raises(MissingError, match=r"contains archives \(\.tar\)") as e:
        open_path(write(tmp_path / "tars", {"train-000.tar": b"x", "train-001.tar": b"x"}))
    assert "one of them" in e.value.hint


def test_pictures_of_further_kinds(tmp_path):
    files = {f"{i}.png": png(RED) for i in range(4)}
    kinds = {"jfif": "JPEG", "jp2": "JPEG2000", "tga": "TGA"}
    if features.check("avif"):
        kinds["avif"] = "AVIF"
    files |= {f"a.{ending}": png(RED, format=kind) for ending, kind in kinds.items()}
    assert sum(open_pack(write(tmp_path / "set", files)).meta.counts.values()) == len(files)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n0 0 8 8 rectfill\nshowpage\n%%EOF\n"


def test_no_reader_starts_another_program(tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript is started"))
    monkeypatch.setattr(EpsImagePlugin.EpsImageFile, "load", lambda *_: pytest.fail("an EPS is opened"))
    assert "EPS" not in PILLOW_FORMATS
    for name in ("a.png", "a.eps"):
        with pytest.raises(MissingError, match="cannot be decoded: not a readable image"):
            decode(EPS, name, Decoding(8, 3))
    files = {f"{i}.png": png(RED) for i in range(9)} | {"zz.png": EPS, "zz.eps": EPS}
    with pytest.raises(MissingError, match=r"`zz\.png` cannot be decoded"):
        open_pack(write(tmp_path / "set", files))


def test_pipes_devices_and_dead_links_are_left_out_and_told(tmp_path):
    folder = write(tmp_path / "set", {f"{i}.png": png(RED) for i in range(9)})
    os.mkfifo(folder / "pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "dead.png").symlink_to("nowhere.png")
    (folder / "self.png").symlink_to("self.png")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(folder / "s.png"))
    source = open_path(folder)
    assert source.counts == {"train": 9}
    assert source.notes == [
        "2 broken links skipped (`dead.png`)",
        "3 pipe or device files skipped (`pipe.png`)",
    ]
    assert sum(open_pack(folder).meta.counts.values()) == 9
    assert len(read_pictures(folder, size=8, channels=3, limit=None)) == 9
    for path in (folder / "pipe.png", Path("/dev/zero"), folder / "zero.png"):
        with pytest.raises((UsageError, MissingError), match="is not a regular file"):
            open_path(path)
        with pytest.raises((UsageError, MissingError), match="is not a regular file"):
            read_pictures(path, size=8, channels=3, limit=1)


def test_links_to_folders_are_followed_and_their_circles_end(tmp_path):
    for name in "abcdefgh":  # each leads to all the others: 8! ways
        write(tmp_path / "set" / name, {"x.png": png(RED)})
    for name in "abcdefgh":
        for target in "abcdefgh":
            (tmp_path / "set" / name / f"to_{target}").symlink_to(tmp_path / "set" / target)
    files, odd = walk(tmp_path / "set")
    assert len(files) == 8 and len(odd["repeated"]) == 64
    assert sum(open_pack(tmp_path / "set").meta.counts.values()) == 8
    write(tmp_path / "store" / "cats", {f"{i}.png": png(RED) for i in range(4)})
    folder = write(tmp_path / "pets", images("dogs"))
    (folder / "cats").symlink_to(tmp_path / "store" / "cats")
    assert open_path(folder).classes == ("cats", "dogs")


def test_a_file_that_grows_without_end_is_not_read(tmp_path):
    folder = write(tmp_path / "set", {f"{i}.png": png(RED) for i in range(4)})
    with (folder / "huge.png").open("wb") as file:
        file.truncate(1 << 40)  # a terabyte of holes
    with pytest.raises(MissingError, match=r"`.*huge\.png` is too large for an image"):
        open_pack(folder)


def test_backslashes_in_a_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for c, colour in (("cats", RED), ("dogs", BLUE)):
            for i in range(5):
                info = zipfile.ZipInfo("x")
                info.filename = f"set\\{c}\\{i}.png"  # as programs of Windows write it
                archive.writestr(info, png(colour))
    opened = open_pack(tmp_path / "a.zip")
    assert opened.meta.classes == ("cats", "dogs")
    for image, label in zip(opened.images("train"), opened.labels("train"), strict=True):
        assert image[:, 0, 0].tolist() == list((RED, BLUE)[label])
    assert len(open_path(tmp_path / "a.zip").spans()["train"]) == 10


def test_labels_of_webdataset(tmp_path):
    files = {f"{i:04}.jpg": png((RED, GREEN, BLUE)[i % 3], format="PNG") for i in range(12)}
    files |= {f"{i:04}.cls": str((0, 3, 7)[i % 3]).encode() for i in range(12)}
    files |= {f"{i:04}.json": b"{}" for i in range(12)}
    for make, name in ((write, "folder"), (as_tar, "a.tar"), (as_zip, "a.zip")):
        opened = open_pack(make(tmp_path / name, files))
        assert opened.meta.classes == tuple("01234567")
        for image, label in zip(opened.images("train"), opened.labels("train"), strict=True):
            assert image[:, 0, 0].tolist() == list({0: RED, 3: GREEN, 7: BLUE}[int(label)])
    half = {f"{i}.png": png(RED) for i in range(3)} | {"0.cls": b"a", "1.cls": b"b"}
    with pytest.raises(UsageError, match=r"no label file \(`\.cls`\) for `2\.png`"):
        open_path(write(tmp_path / "half", half))


def test_archives_of_other_kinds(tmp_path):
    for mark, kind in ((b"\x28\xb5\x2f\xfd", "zstd"), (b"7z\xbc\xaf\x27\x1c", "7z"), (b"Rar!\x1a", "rar")):
        path = tmp_path / {"zstd": "a.tar.zst"}.get(kind, f"a.{kind}")
        path.write_bytes(mark + bytes(99))
        with pytest.raises(UsageError, match=f"compressed with {kind}, which gz cannot read") as e:
            open_path(path)
        assert "tar.gz" in e.value.hint


def arrays(tmp_path, **members) -> Path:
    np.savez(tmp_path / "a.npz", **members)
    return tmp_path / "a.npz"


PIXELS = np.random.default_rng(0).integers(0, 256, (12, 8, 9, 3), np.uint8)


def test_keras_names_and_class_names(tmp_path):
    lower = "x_train y_train x_test y_test"
    for names in (lower, "X_train Y_train X_test Y_test", "train_x train_y test_x test_y"):
        x, y, x1, y1 = names.split()
        members = {x: PIXELS, y: np.arange(12) % 3, x1: PIXELS[:6], y1: np.arange(6) % 3}
        source = open_path(arrays(tmp_path, **members))
        assert source.counts == {"train": 12, "test": 6} and source.classes == ("0", "1", "2"), names
        assert source.labels["test"].tolist() == [0, 1, 2, 0, 1, 2]
    members = {"images": PIXELS, "labels": np.arange(12) % 3}
    source = open_path(arrays(tmp_path, **members, class_names=np.array(["ant", "bee", "cow"])))
    assert source.classes == ("ant", "bee", "cow") and source.notes == []
    names = np.array(["ä", "b", "c"])
    coded = [np.char.encode(names, code) for code in ("utf-8", "latin-1")]
    assert open_path(arrays(tmp_path, **members, class_names=coded[0])).classes == ("ä", "b", "c")
    refused("must be a list of names", open_path, arrays(tmp_path, **members, class_names=coded[1]))
    with pytest.raises(UsageError, match=r"`class_names` .* names 2 classes, but its labels have 3"):
        open_path(arrays(tmp_path, **members, class_names=np.array(["ant", "bee"])))


def test_channels_first_or_last_and_what_is_not_clear(tmp_path):
    first = PIXELS.transpose(0, 3, 1, 2)
    for x in (PIXELS, first, np.asfortranarray(PIXELS), np.asfortranarray(first)):
        source = open_path(arrays(tmp_path, images=x))
        got = np.concatenate([block for _, _, block, _ in source.blocks()])
        assert source.shape == (3, 8, 9) and (got == first).all()
    with pytest.raises(UsageError, match="channels may be first or last"):
        open_path(arrays(tmp_path, images=np.zeros((4, 3, 8, 3), np.uint8)))
    source = open_path(arrays(tmp_path, images=PIXELS, embedding=np.zeros((12, 2))))
    assert source.notes == ["1 array skipped (`embedding`)"]


def parquet(path: Path, n: int, label: str = "int64") -> None:
    """Pictures, red and blue in turns, with labels 0 and 1, or their names."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cells = [{"bytes": png((RED, BLUE)[i % 2]), "path": None} for i in range(n)]
    y = [i % 2 if label == "int64" else ("red", "blue")[i % 2] for i in range(n)]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": cells, "label": pa.array(y, label)}), path, row_group_size=7)


def test_labels_that_are_plain_numbers_or_texts(tmp_path, home, capfd):
    """And nothing else is written or said: no cache of another package, no bars."""
    for label, classes in (("int64", ("0", "1")), ("string", ("blue", "red"))):
        parquet(tmp_path / f"{label}.parquet", 20, label)
        opened = open_pack(tmp_path / f"{label}.parquet")
        assert opened.meta.classes == classes
        colours = (RED, BLUE) if label == "int64" else (BLUE, RED)
        for image, y in zip(opened.images("train"), opened.labels("train"), strict=True):
            assert image[:, 0, 0].tolist() == list(colours[y])
    assert capfd.readouterr() == ("", "") and not (home / "datasets").exists()


def naming(folder: Path, name: str) -> Path:
    """A parquet of nine images, each a file below the folder, and of one with this name."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    write(folder, {f"a/{i}.png": png(RED) for i in range(9)})
    names = [*(f"a/{i}.png" for i in range(9)), name]
    pq.write_table(
        pa.table({"image": [{"bytes": None, "path": name} for name in names]}), folder / "x.parquet"
    )
    return folder


@pytest.mark.parametrize(
    "name", ["{}/private.png", "../private.png", "a/../../private.png", "link.png", "no.png"]
)
def test_a_parquet_names_files_of_its_own_set_only(tmp_path, name):
    write(tmp_path, {"private.png": png(BLUE)})
    folder, name = tmp_path / "set", name.format(tmp_path)
    naming(folder, name)
    (folder / "link.png").symlink_to(tmp_path / "private.png")
    for path in (folder, folder / "x.parquet"):
        refused(f"row 9 of `.*x.parquet` names `{name}`, which is not", open_pack, path, error=MissingError)
        assert nothing_half_written()


def test_a_parquet_names_files_in_folders_and_in_the_cache_of_the_hub(tmp_path):
    assert sum(open_pack(naming(tmp_path / "set", "a/0.png")).meta.counts.values()) == 10
    blobs, snapshot = naming(tmp_path / "blobs", "b.png"), tmp_path / "snapshot"
    for name in ("x.parquet", "b.png", *(f"a/{i}.png" for i in range(9))):
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blobs / name.replace("b.png", "a/0.png"))
    assert sum(open_pack(snapshot).meta.counts.values()) == 10


@pytest.mark.parametrize(
    "about",
    [b"[1]", b"{", b"\xff", b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": 5}}}}'],
)
def test_what_a_parquet_says_of_its_columns_may_be_anything(tmp_path, about):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet(tmp_path / "x.parquet", 9)
    table = pq.read_table(tmp_path / "x.parquet")
    pq.write_table(table.replace_schema_metadata({b"huggingface": about}), tmp_path / "x.parquet")
    refused(r"x.parquet` cannot be read", open_pack, tmp_path, error=MissingError)
    pq.write_table(pa.table({"image": table["image"]}), tmp_path / "y.parquet")
    parquet(tmp_path / "x.parquet", 9)
    refused(r"y.parquet` cannot be read: it has no column `label`", open_pack, tmp_path, error=MissingError)


def test_layouts_of_parquet(tmp_path):
    names = (
        "default/{}/0000.parquet",  # as the hub converts
        "default/partial-{}/0000.parquet",
        "mnist/{}-00000-of-00001.parquet",
        "data/{}-00000-of-00001-a1b2c3.parquet",
        "{}.parquet",
    )
    for i, name in enumerate(names):
        parquet(tmp_path / f"{i}" / name.format("train"), 20)
        parquet(tmp_path / f"{i}" / name.format("test"), 6)
        assert open_path(tmp_path / f"{i}").counts == {"train": 20, "test": 6}, name
    for name in ("large", "small"):
        parquet(tmp_path / "set" / name / "train" / "0000.parquet", 4)
    with pytest.raises(UsageError, match="contains several sets: `large`, `small`"):
        open_path(tmp_path / "set")
