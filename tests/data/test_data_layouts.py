"""Layouts of the user's own images: what is common is read, what is ambiguous is refused by name."""

from __future__ import annotations

import os
import socket
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pictures import BLUE, GREEN, RED, as_tar, as_zip, nothing_half_written, png, write
from PIL import EpsImagePlugin, features

from gzcli.core.errors import MissingError, UsageError
from gzcli.data.packs.open import open_pack
from gzcli.data.readers.folder import open_path, read_pictures
from gzcli.data.readers.images import FORMATS, walk
from gzcli.data.readers.pictures import Decoding, decode
from gzcli.data.sets.library import import_set
from gzcli.data.sets.registry import Form

pytestmark = pytest.mark.usefixtures("home")


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
    classes, found, notes = read(tmp_path, files)
    assert classes == ("n01", "n02")
    assert found == {"train": Counter(n01=4, n02=4), "val": Counter(n02=1, n01=3)}
    assert notes == ["4 pictures of `test` skipped: they have no labels"]


def test_mvtec(tmp_path):
    marks = ("ground_truth/cut", "ground_truth/hole")
    files = images("train/good", "test/good", "test/cut", "test/hole", *marks)
    classes, found, notes = read(tmp_path, files | {"license.txt": b"x", "readme.md": b"x"})
    assert classes == () and found == {"train": Counter({None: 4}), "test": Counter({None: 4})}
    assert notes == [
        "8 pictures of `ground_truth` skipped: they mark others",
        "8 pictures of `test/cut` and 1 others skipped: `train` has only `good`",
        "1 file of unknown kind skipped (.md)",
    ]


AMBIGUOUS = {
    "train/cat train/dog test/cat test/zebra": "`test/zebra` of .* is a class that `train` has not",
    "train/cat valid/cat validation/cat": "`valid` and `validation`, which are one split",
    "train car plane": "is `train` a split, or a class as `car`?",
    "images masks": "`masks` beside its pictures",
    "cat/train cat/test dog": "cat/train`, a split by its name, and `dog/0.png`|cat/test`, a split",
    "train test/cat test/dog": "`test/cat` of .* is a class that `train` has not",
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
    classes, found, _ = read(tmp_path, files, "classes")
    assert classes == ("car", "plane", "train") and set(found) == {"train"}
    path = tmp_path / "set"
    import_set(path, "vehicles", Form(layout="classes"))
    assert open_pack("vehicles").meta.classes == ("car", "plane", "train")
    import_set(path, "vehicles", Form(layout="flat"))  # said otherwise: packed anew
    assert open_pack("vehicles").meta.classes == ()
    with pytest.raises(UsageError, match="in no split of a class"):
        open_path(path, Form(layout="class-splits"))


def test_skipped_files_are_told_when_a_set_is_opened_first(tmp_path):
    files = {f"train/{c}/{i}.png": png(RED) for c in ("airplane", "bird", "cat", "truck") for i in range(10)}
    files |= {f"test/cat/{i}.png": png(BLUE) for i in range(3)}
    unknown = ("train/cat/a.heic", "train/cat/b.heic", "index.csv")
    files |= dict.fromkeys((*unknown, ".DS_Store", "Thumbs.db"), b"x")
    said: list[str] = []
    path = write(tmp_path / "set", files)
    opened, note = open_pack(path, say=said.append), "3 files of unknown kinds skipped (.heic .csv)"
    assert said[1].endswith(f": 36 train, 4 val, 3 test; 4 classes airplane to truck; {note}")
    assert opened.meta.notes == (note,)
    said.clear()
    open_pack(path, say=said.append)
    assert said == []
    with pytest.raises(MissingError, match=r"holds archives \(\.tar\)") as e:
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
    assert "EPS" not in FORMATS
    for name in ("a.png", "a.eps"):
        with pytest.raises(MissingError, match="does not decode: not a picture"):
            decode(EPS, name, Decoding(8, 3))
    files = {f"{i}.png": png(RED) for i in range(9)} | {"zz.png": EPS, "zz.eps": EPS}
    with pytest.raises(MissingError, match=r"`zz\.png` does not decode"):
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
        with pytest.raises((UsageError, MissingError), match="is no regular file"):
            open_path(path)
        with pytest.raises((UsageError, MissingError), match="is no regular file"):
            read_pictures(path, size=8, channels=3, limit=1)


def test_links_to_folders_are_followed_and_their_circles_end(tmp_path):
    for name in "abcdefgh":  # each leads to all the others: 8! ways
        write(tmp_path / "set" / name, {"x.png": png(RED)})
    for name in "abcdefgh":
        for other in "abcdefgh":
            (tmp_path / "set" / name / f"to_{other}").symlink_to(tmp_path / "set" / other)
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
    with pytest.raises(MissingError, match=r"`.*huge\.png` is larger than any picture"):
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
    with pytest.raises(UsageError, match=r"no label `\.cls` beside `2\.png`"):
        open_path(write(tmp_path / "half", half))


def test_archives_of_other_kinds(tmp_path):
    for mark, kind in ((b"\x28\xb5\x2f\xfd", "zstd"), (b"7z\xbc\xaf\x27\x1c", "7z"), (b"Rar!\x1a", "rar")):
        path = tmp_path / {"zstd": "a.tar.zst"}.get(kind, f"a.{kind}")
        path.write_bytes(mark + bytes(99))
        with pytest.raises(UsageError, match=f"compressed by {kind}, which gz does not read") as e:
            open_path(path)
        assert "tar.gz" in e.value.hint


def arrays(tmp_path, **given) -> Path:
    np.savez(tmp_path / "a.npz", **given)
    return tmp_path / "a.npz"


X = np.random.default_rng(0).integers(0, 256, (12, 8, 9, 3), np.uint8)


def test_keras_names(tmp_path):
    lower = "x_train y_train x_test y_test"
    for names in (lower, "X_train Y_train X_test Y_test", "train_x train_y test_x test_y"):
        x, y, x1, y1 = names.split()
        given = {x: X, y: np.arange(12) % 3, x1: X[:6], y1: np.arange(6) % 3}
        source = open_path(arrays(tmp_path, **given))
        assert source.counts == {"train": 12, "test": 6} and source.classes == ("0", "1", "2"), names
        assert source.labels["test"].tolist() == [0, 1, 2, 0, 1, 2]


def test_class_names(tmp_path):
    given = {"images": X, "labels": np.arange(12) % 3}
    source = open_path(arrays(tmp_path, **given, class_names=np.array(["ant", "bee", "cow"])))
    assert source.classes == ("ant", "bee", "cow") and source.notes == []
    with pytest.raises(UsageError, match="`class_names` names 2 classes, its labels have 3"):
        open_path(arrays(tmp_path, **given, class_names=np.array(["ant", "bee"])))


def test_channels_first_or_last_and_what_is_not_clear(tmp_path):
    first = X.transpose(0, 3, 1, 2)
    for x in (X, first, np.asfortranarray(X), np.asfortranarray(first)):
        source = open_path(arrays(tmp_path, images=x))
        got = np.concatenate([block for _, _, block, _ in source.blocks()])
        assert source.shape == (3, 8, 9) and (got == first).all()
    with pytest.raises(UsageError, match="channels first or last"):
        open_path(arrays(tmp_path, images=np.zeros((4, 3, 8, 3), np.uint8)))
    with pytest.raises(UsageError, match="float32 of shape") as e:
        open_path(arrays(tmp_path, images=np.zeros((4, 8, 8), np.float32)))
    assert "uint8" in e.value.hint
    source = open_path(arrays(tmp_path, images=X, embedding=np.zeros((12, 2))))
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
    with pytest.raises(UsageError, match="holds several sets: `large`, `small`"):
        open_path(tmp_path / "set")
