"""Packs: embedded sets, splits, the cache, memory, and what `gz data show` and `import` tell of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from functools import cache
from shutil import rmtree as remove_tree

import numpy as np
import pytest
from helpers import ROOT
from pictures import BLUE, COLOURS, LAYOUTS, RED, SPLITS, as_zip, nothing_half_written, png, write
from PIL import Image

from gzcli.cli.app import run
from gzcli.core.errors import MissingError, UsageError
from gzcli.core.types import DataInfo, unreported
from gzcli.data.library import data_path, import_set, listing, remove, verify
from gzcli.data.packs import build, source
from gzcli.data.packs.build import covering, rows_of, split_plan
from gzcli.data.packs.open import facts_of, open_pack, peek
from gzcli.data.packs.pack import record_data
from gzcli.data.readers import embedded
from gzcli.data.readers.embedded import DRAWING_SIDE, MAKERS, distance, matrices, pictures
from gzcli.data.readers.images import Block, RawImages
from gzcli.data.sets.labels import class_numbers
from gzcli.data.sets.registry import SPECS, Form, data_key, find, names
from gzcli.engine.sampler import parse_labels
from gzcli.store import runs

pytestmark = pytest.mark.usefixtures("home")


def test_embedded(monkeypatch):
    for spec in [spec for spec in SPECS.values() if spec.embedded and not spec.multilabel]:
        if spec.n_train > 7_200:  # it is made in any number
            spec = replace(spec, n_train=7_200, n_test=720)
            monkeypatch.setitem(SPECS, spec.name, spec)
        opened = open_pack(spec.name)
        meta, info = opened.meta, opened.info(steps=7)
        assert (meta.shape, meta.classes, meta.levels) == (spec.shape, spec.classes, spec.levels), spec.name
        trained = spec.n_train + spec.n_val
        assert (meta.counts["train"] + meta.counts["val"], meta.counts["test"]) == (trained, spec.n_test)
        for split, n in meta.counts.items():
            assert opened.images(split).shape == (n, *spec.shape) and opened.images(split).dtype == np.uint8
            assert set(opened.labels(split)) == set(range(len(spec.classes))), spec.name
        assert (info.shape, info.levels, info.steps) == (spec.shape, spec.levels, 7)
        assert info.n == meta.counts["train"]
        # plans count the images to train on, whether the set is packed or not
        assert facts_of(spec).n == spec.trained_on == info.n, spec.name


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    opened, truth = open_pack("digits"), load_digits()
    places = {}
    for split in SPLITS:
        levels = opened.images(split)[:, 0, ::2, ::2].astype(int) * 17 >> 8
        assert (opened.images(split)[:, 0, 1::2, 1::2] == opened.images(split)[:, 0, ::2, ::2]).all()
        for image, label in zip(levels, opened.labels(split), strict=True):
            places.setdefault((image.tobytes(), label), []).append(split)
    assert sum(map(len, places.values())) == 1797
    for image, label in zip(truth.images, truth.target, strict=True):
        assert (image.astype(int).tobytes(), label) in places


def test_captions_domains_and_patches():
    captioned, ab, patches = open_pack("digits-captioned"), open_pack("digits_ab"), open_pack("patches")
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    for split in SPLITS:
        assert captioned.captions(split) == [f"a handwritten {words[y]}" for y in captioned.labels(split)]
    dark = ab.images("train").mean((1, 2, 3)) < 128
    assert (dark == (ab.labels("train") == 0)).mean() > 0.99
    train, test = ({row.tobytes() for x in patches.images(s) for row in x[0]} for s in ("train", "test"))
    assert len(train & test) < 0.01 * len(test), "no pixel is in two splits"


def test_not_fetched_when_it_must_not_be(monkeypatch):
    with pytest.raises(MissingError, match="GZ_OFFLINE") as e:
        open_pack("mnist")
    assert e.value.hint.startswith("run `gz data download mnist`")
    monkeypatch.delenv("GZ_OFFLINE")
    with pytest.raises(MissingError, match="not in the cache"):
        open_pack("places365")
    monkeypatch.setattr(source, "FETCHED_UNASKED", 1000)
    with pytest.raises(MissingError, match="large"):
        open_pack("mnist")


def test_validation_is_carved_from_train_by_a_fixed_seed(tmp_path):
    images = np.arange(50, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(50) % 5)
    opened = open_pack(tmp_path / "a.npz")
    assert opened.meta.counts == {"train": 40, "val": 5, "test": 5}
    ids = {split: opened.images(split)[:, 0, 0, 0].tolist() for split in SPLITS}
    assert sorted(i for rows in ids.values() for i in rows) == list(range(50))
    assert all(i == sorted(i) for i in ids.values())
    for split, rows in ids.items():
        assert opened.labels(split).tolist() == [i % 5 for i in rows]
    # the carving must never change, as scores would not compare; 4 is the class that it left out
    plan = split_plan("a", {"train": 50})["train"]
    assert np.flatnonzero(plan == 2).tolist() == [2, 10, 11, 28, 41] and ids["test"] == [2, 9, 10, 11, 28]
    for spec in SPECS.values():  # what is left to train on is known before packing
        if spec.n_train < 100_000:
            counts = {"train": spec.n_train, "val": spec.n_val, "test": spec.n_test}
            assert rows_of(split_plan(spec.name, counts))["train"] == spec.trained_on, spec.name


def test_validation_and_test_share_a_class_of_more_than_three_images(tmp_path):
    """Of a pack that is made again, an earlier run would resume on other images."""
    colours = {f"b/{i}.png": png((i, 0, 0)) for i in range(60)}
    folder = write(tmp_path / "own", colours | {f"a/{i}.png": png((0, i, 0)) for i in range(5)})
    opened = open_pack(folder)
    assert opened.meta.counts == {"train": 53, "val": 6, "test": 6} and opened.meta.covered
    assert [opened.labels(split).tolist().count(0) for split in SPLITS] == [3, 1, 1]
    plain, labels = split_plan("own", {"train": 65})["train"], np.repeat([0, 1], [5, 60])
    assert np.bincount(plain[labels == 0]).tolist() != [3, 1, 1]
    run = runs.create("vae", opened.meta.name)
    record_data(run.path, replace(opened.meta, covered=False))
    remove_tree(opened.folder)
    earlier = open_pack(folder)
    assert earlier.labels("test").tolist() == labels[plain == 2].tolist() and not earlier.meta.covered
    assert earlier.meta.counts == opened.meta.counts and earlier.meta.digest != opened.meta.digest


@pytest.mark.parametrize(
    "n, splits", [(1, [1, 0, 0]), (2, [2, 0, 0]), (3, [3, 0, 0]), (4, [3, 0, 1]), (5, [3, 1, 1])]
)
def test_at_least_three_images_of_a_class_are_trained_on(n, splits):
    plain = split_plan("own", {"train": 60})["train"]
    for seed in range(50):
        labels = np.random.RandomState(seed).permutation(np.repeat([0, 1], [n, 60 - n]))
        covered = covering(plain, labels)
        assert np.bincount(covered[labels == 0], minlength=3).tolist() == splits
        assert np.bincount(covered).tolist() == [48, 6, 6]
        assert covering(covered, labels).tolist() == covered.tolist(), "such a plan is not changed"
    labels = np.arange(60) % 30
    assert np.bincount(labels[covering(plain, labels) == 0]).min() == 1, (
        "each of 30 classes of two is trained on"
    )


def test_splits_given_are_kept(tmp_path):
    for n in (1, 2):
        with pytest.raises(MissingError, match="too few images"):
            open_pack(write(tmp_path / f"{n}", {f"{i}.png": png(RED) for i in range(n)}))
    assert nothing_half_written()
    data = {}
    for split, n in (("train", 9), ("val", 4), ("test", 5)):
        data[f"{split}_images"] = np.full((n, 8, 8, 3), n, np.uint8)
        data[f"{split}_labels"] = np.eye(3, dtype=np.uint8)[np.arange(n) % 3]
    np.savez_compressed(tmp_path / "m.npz", **data)
    opened = open_pack(tmp_path / "m.npz")
    assert opened.meta.counts == {"train": 9, "val": 4, "test": 5} and opened.meta.multilabel
    assert opened.labels("val").shape == (4, 3) and opened.labels("val").dtype == np.uint8
    assert (opened.images("test") == 5).all()


def test_repacked_when_the_files_change(tmp_path, monkeypatch):
    def refused(*args):
        raise OSError(28, "No space left on device")

    folder, said = write(tmp_path / "p", LAYOUTS["flat"][0]), []
    with monkeypatch.context() as patch, pytest.raises(MissingError, match="no space left"):
        patch.setattr(os, "pwrite", refused)
        open_pack(folder)
    assert nothing_half_written()
    first = open_pack(folder, say=said.append)
    assert len(said) == 2 and open_pack(folder, say=said.append).meta == first.meta and len(said) == 2
    os.truncate(first.folder / "train.npy", 900)
    assert open_pack(folder).meta.digest == first.meta.digest and len(open_pack(folder).images("train")) == 16
    write(folder, {"new.png": png(BLUE)})
    assert peek(folder) is None
    assert sum(open_pack(folder).meta.counts.values()) == 21
    assert open_pack(folder).meta.digest != first.meta.digest
    write(folder, {name: png(BLUE, (4, 4)) for name in [*LAYOUTS["flat"][0], "new.png"]})
    assert open_pack(folder, size=8).meta.resized and open_pack(folder).meta.shape == (3, 4, 4)


def test_names_and_keys(tmp_path, monkeypatch):
    for parent in ("a", "b"):
        write(tmp_path / parent / "My Photos", LAYOUTS["flat"][0])
    opened = open_pack(tmp_path / "a" / "My Photos")  # asked for by what it is, it is not packed again
    assert open_pack(tmp_path / "a" / "My Photos", size=8, channels=3).folder == opened.folder
    keys = {data_key(tmp_path / parent / "My Photos") for parent in "ab"}
    assert len(keys) == 2 and all(key.startswith("my-photos-") for key in keys)
    monkeypatch.chdir(tmp_path / "a")
    assert {data_key("./My Photos"), data_key("../b/My Photos")} == keys and data_key("MNIST") == "mnist"
    assert data_key("digits_ab") == "digits-ab"
    for look in (open_pack, find):
        with pytest.raises(UsageError, match="no data set `mnits`") as e:
            look("mnits")
        assert "`mnist`" in e.value.hint
    with pytest.raises(MissingError, match="does not exist"):
        open_pack("./nowhere/photos.zip")
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
    for name, why in (("mnist", "gz has a"), ("a b", "not a valid name"), ("my_set", "already used")):
        with pytest.raises(UsageError, match=why):
            import_set(path, name)
    with pytest.raises(MissingError):
        import_set(tmp_path / "none", "other")
    assert import_set(path, "my-set")["replaced"] == {}, "nothing has changed"
    assert import_set(path, "my-set", Form(fit="pad"))["replaced"] == {"fit": ["crop", "pad"]}
    remove("my-set")
    assert "my-set" not in names() and not opened.folder.exists() and path.exists()


def test_a_size_is_packed_once_whether_channels_are_asked_for_or_told(tmp_path):
    """`gz train` asks for the size alone, its engine for what came of it."""
    grey = {f"{i}.png": png(90 + i, mode="L", size=(9, 9)) for i in range(20)}
    for files, channels in ((LAYOUTS["flat"][0], 3), (grey, 1)):
        folder = write(tmp_path / f"{channels}", files)
        first = open_pack(folder, size=6)
        assert open_pack(folder, size=6, channels=channels).folder == first.folder
        assert peek(folder, size=6, channels=channels)
        second = open_pack(folder, size=6, channels=4 - channels)
        assert second.folder != first.folder and open_pack(folder, size=6).meta.shape[0] == channels
        assert peek(folder) is None and peek(folder, size=7) is None
        assert len(list(first.folder.parent.glob("*/meta.json"))) == 2


def test_sets_that_died_are_shown_and_harm_none(tmp_path, monkeypatch, capsys):
    folder = write(tmp_path / "p", LAYOUTS["classes"][0])
    (folder / "red" / "dead.png").symlink_to(tmp_path / "nowhere.png")
    for name in ("kept", "lost"):
        assert run(["data", "import", str(folder), "--name", name, "-q"]) == 0
    remove_tree(open_pack("lost").folder)
    capsys.readouterr()
    monkeypatch.setattr("gzcli.data.packs.open.walk", lambda *_: pytest.fail("a set's files are looked at"))
    assert run(["data", "list"]) == run(["data", "verify"]) == run(["train", "vae", "--dry-run"]) == 0
    folder.rename(tmp_path / "elsewhere")
    assert open_pack("kept").meta.counts["train"], "an imported set outlives its files"
    with pytest.raises(MissingError, match="no longer exists"):
        open_pack("lost")
    capsys.readouterr()
    assert run(["data", "list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["data"]}
    facts_of = {"kept": (True, True, 8), "lost": (True, False, None), "digits": (False, True, 16)}
    for name, facts in facts_of.items():
        assert tuple(rows[name][of] for of in ("lost", "cached", "size")) == facts, name
    assert run(["data", "list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["lost"].split()[-2] == "gone" and "yes" in lines["kept"].split()
    assert run(["data", "verify"]) == 0 and run(["data", "verify", "lost"]) == 3
    assert "no longer exists" in capsys.readouterr().err


def test_two_processes_pack_once(tmp_path):
    path = as_zip(tmp_path / "a.zip", LAYOUTS["classes"][0])
    code = f"from gzcli.data.packs.open import open_pack; open_pack({str(path)!r}, say=print)"
    words = [sys.executable, "-c", code]
    two = [subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = "".join(process.communicate(timeout=240)[0] for process in two)
    assert [process.returncode for process in two] == [0, 0]
    assert said.count("packing") - said.count("waiting") in (0, 1)
    assert said.count(" images\n") == 1


def test_looking_at_metadata_imports_nothing_heavy():
    open_pack("digits")
    code = """import sys
from gzcli.data.packs.augment import parse_augment
from gzcli.data.packs.open import peek
from gzcli.data.library import listing
from gzcli.data.sets.registry import data_key
listing(), peek("digits").levels
print([m for m in ("torch", "numpy", "PIL", "sklearn", "urllib.request") if m in sys.modules])"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stdout + out.stderr


def test_memory_is_bounded(tmp_path):
    """A source of 60 MB is packed within 12 MB of Python and numpy memory."""
    spec = replace(SPECS["cifar10"], size=64)

    def blocks():
        for start in range(0, 5000, 50):
            yield Block("train", start, np.full((50, 3, 64, 64), start // 50, np.uint8), "a")

    images = RawImages("big", (), {"train": 5000}, {}, blocks, shape=spec.shape)
    (tmp_path / "out").mkdir()
    tracemalloc.start()
    build.build(images, tmp_path / "out", Form(), extra={}, limit=None, progress=unreported)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert np.load(tmp_path / "out" / "train.npy", mmap_mode="r")[-1].max() == 99


FEW = {name: replace(SPECS[name], n_train=144, n_test=72) for name in ("glyphs", "shapes", "shapes-factors")}


@cache
def made(name):
    """The few images of a set, uint8 [216, C, H, W], and what was read."""
    raw = MAKERS[name](FEW[name])
    return np.concatenate([block.data for block in raw.blocks()]), raw


def test_they_are_made_alike_each_time():
    for name in FEW:
        images, raw = made(name)
        again = np.concatenate([block.data for block in MAKERS[name](FEW[name]).blocks()])
        assert images.shape == (216, *SPECS[name].shape) and (images == again).all(), name
        assert raw.counts == {"train": 144, "test": 72} and raw.classes == SPECS[name].class_names, name


def test_glyphs_are_told_apart_by_their_class():
    """Each class has as many images in each split; the mean glyph of its class is nearest to most of them, in
    pixels."""
    images, raw = made("glyphs")
    labels = np.concatenate(list(raw.labels.values()))
    counts = {split: set(np.bincount(y, minlength=36)) for split, y in raw.labels.items()}
    assert counts == {"train": {4}, "test": {2}}
    ink = images.reshape(len(images), -1) / 255
    assert 0.08 < ink.mean() < 0.25 and (ink.max(1) > 0.9).all() and (images[:, :, [0, -1]] < 60).all()
    means = np.stack([ink[labels == k].mean(0) for k in range(36)])
    nearest = ((ink[:, None] - means) ** 2).sum(2).argmin(1)
    assert (nearest == labels).mean() > 0.7


def test_shapes_are_what_their_factors_say():
    """The form has its colour, its middle lies where it should, its area is as large as its radius says."""
    images, raw = made("shapes")
    truth = embedded.factors(216)
    ink = np.array(list(embedded.FORM_COLOURS.values()))[truth.colour]
    inside = np.abs(images.astype(int) - ink[:, :, None, None]).max(1) < 12
    assert inside.reshape(216, -1).any(1).all() and raw.labels["train"].tolist() == truth.kind[:144].tolist()
    at = np.arange(32) - 15.5
    area = inside.sum((1, 2))
    center = np.stack([(inside * at).sum((1, 2)), (inside * at[:, None]).sum((1, 2))], 1) / area[:, None]
    symmetric = ("circle", "square", "cross", "star")
    whole = np.isin(truth.kind, [embedded.FORM_KINDS.index(kind) for kind in symmetric])
    assert np.abs(center - truth.center)[whole].max() < 0.5
    round_ = truth.kind == embedded.FORM_KINDS.index("circle")
    assert np.abs(np.sqrt(area[round_] / np.pi) - truth.radius[round_]).max() < 1.0
    assert set(raw.captions["train"][0].split()) >= {"red", "circle"}


def test_emoji_are_what_unicode_says():
    """Each picture is once there, in one split, before white, in the class and with the name of its text."""
    raw = MAKERS["emoji"](SPECS["emoji"])
    rows = [line.split("\t") for line in embedded.EMOJI_TABLE.read_text("utf-8").splitlines()]
    texts = [text for _, text, _ in rows]
    assert len(set(texts)) == len(texts) == sum(raw.counts.values()) > 1_850
    assert not any(0x1F3FB <= ord(letter) <= 0x1F3FF for letter in "".join(texts)), "a skin tone"
    images = np.concatenate([block.data for block in raw.blocks()])
    assert images.shape == (len(texts), 3, 32, 32) and images.mean() > 127
    ink = (images < 250).any(1).reshape(len(texts), -1).mean(1)
    assert ink.min() > 0.02, "an empty image"
    names = [name for split in SPLITS for name in raw.captions[split]]
    labels = np.concatenate([raw.labels[split] for split in SPLITS])
    facts = {name: (raw.classes[k], images[i]) for i, (name, k) in enumerate(zip(names, labels, strict=True))}
    wanted = {"grinning face": "smileys", "dog face": "animals", "pizza": "food", "flag: Japan": "flags"}
    assert {name: facts[name][0] for name in wanted} == wanted
    red, green, blue = facts["red heart"][1][:, 12, 16].astype(int)
    assert red > 180 and max(green, blue) < 90
    japan = facts["flag: Japan"][1]
    assert (japan[:, 8, 4] > 200).all() and japan[0, 16, 16] > 150 and japan[1:, 16, 16].max() < 90
    for split in ("val", "test"):
        share = np.bincount(raw.labels[split]) / np.bincount(labels)
        assert share.min() > 0.1 and share.max() < 0.12, split


def test_emoji_are_drawn_larger_where_the_font_is(monkeypatch):
    from matplotlib import font_manager

    assert [spec.size for spec in SPECS["emoji"].versions] == [32, 64, 128]
    if any(path.endswith(embedded.EMOJI_FONT) for path in font_manager.findSystemFonts()):
        drawn = embedded.draw_emoji(["\N{SNOWMAN}", "\N{DOG FACE}"], 64, embedded.emoji_font())
        assert drawn.shape == (2, 3, 64, 64) and (drawn < 200).any((1, 2, 3)).all()
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: ["/fonts/Other.ttf"])
    with pytest.raises(MissingError, match="is drawn with `NotoColorEmoji") as e:
        open_pack("emoji", size=64)
    assert "data.size=32" in e.value.hint and peek("emoji", size=64) is None


def test_factors_are_labels_of_the_same_images():
    images, raw = made("shapes-factors")
    assert (images == made("shapes")[0]).all()
    truth, labels = embedded.factors(216), np.concatenate(list(raw.labels.values()))
    assert labels.shape == (216, len(embedded.FACTORS))
    assert SPECS["shapes-factors"].class_names == embedded.FACTORS
    kinds, colours = len(embedded.FORM_KINDS), len(embedded.FORM_COLOURS)
    assert (labels[:, :kinds].argmax(1) == truth.kind).all()
    assert (labels[:, kinds : kinds + colours].argmax(1) == truth.colour).all()
    left = labels[:, embedded.FACTORS.index("left")] == 1
    assert (truth.center[left, 0] < 0).all() and left.any()


def test_a_form_is_turned_enlarged_and_made_bolder():
    """A bar 10 pixels wide and 2 high: turned by a quarter it stands; a pixel bolder it is 12 by 4."""
    drawing = np.zeros((DRAWING_SIDE, DRAWING_SIDE), bool)
    drawing[
        DRAWING_SIDE // 2 - 8 : DRAWING_SIDE // 2 + 8, DRAWING_SIDE // 2 - 40 : DRAWING_SIDE // 2 + 40
    ] = True
    turns, size = np.array([0.0, np.pi / 2, 0.0]), np.full((3, 2), 8.0)
    forms = matrices(turns, np.zeros(3), size)
    drawings = pictures(distance(drawing), forms, np.zeros((3, 2)), np.array([0.0, 0, 1]), 20)
    assert drawings.sum((1, 2)) == pytest.approx([20, 20, 48], rel=0.06)
    assert np.abs(drawings[1] - drawings[0].T).max() < 0.02
    assert (drawings[0, :8].max(), drawings[0, 9:11, 6:14].min()) == (0, 1)


@pytest.fixture
def gz(home, capsys):
    def call(*words: str) -> tuple[int, str, str]:
        code = run(["data", *words])
        return code, *capsys.readouterr()

    return call


def test_classes_are_counted_and_drawn_under_their_names(gz, tmp_path):
    folder = write(tmp_path / "p", LAYOUTS["splits"][0] | {"a.heic": b"x"})
    code, stdout, stderr = gz("show", str(folder))
    *rows, path = stdout.splitlines()
    assert code == 0 and [row.split()[0] for row in rows] == ["class", "blue", "green", "red", "images"]
    assert rows[-1].split()[1:] == ["17", "1", "18"] and "1 file of unknown kind skipped (.heic)" in stderr
    assert "8×8 pixels, RGB, 256 levels" in stderr
    sheet = np.asarray(Image.open(path))
    bottom = len(sheet)
    rows = [set(map(tuple, sheet[bottom - 67 * (2 - i) - 40])) for i in range(3)]
    seen = [row & set(COLOURS.values()) for row in rows]
    # a row for each class, in the table's order, with its name
    assert seen == [{COLOURS[name]} for name in ("blue", "green", "red")]
    assert all((sheet[bottom - 67 * (3 - i) : bottom - 67 * (2 - i), :40] < 128).any() for i in range(3))
    result = json.loads(gz("show", str(folder), "--json")[1])
    assert result["counts"] == {"train": 17, "val": 1, "test": 18} and result["sheet"] == path
    counted = [(c["name"], c["train"] + c["val"], c["test"]) for c in result["classes"]]
    assert counted == [("blue", 6, 6), ("green", 6, 6), ("red", 6, 6)]
    assert result["notes"] == ["1 file of unknown kind skipped (.heic)"]


@pytest.mark.parametrize("name", ["mnist", "celeba", "imagenet", "chestmnist"])
def test_a_set_that_is_not_here_is_described_and_not_fetched(name, gz, home, monkeypatch):
    monkeypatch.delenv("GZ_OFFLINE")
    monkeypatch.setattr("gzcli.data.download.fetch.fetch", lambda *a, **k: pytest.fail("it was fetched"))
    spec = SPECS[name]
    code, stdout, stderr = gz("show", name)
    assert code == 0 and stdout.splitlines()[-1].split()[:2] == [name, str(spec.trained_on)]
    size, classes = f"{spec.size}×{spec.size} pixels", f"{spec.n_classes:,} "
    assert not [text for text in (size, classes, spec.licence, "their settings for") if text not in stderr]
    assert f"`gz data download {name}" in stderr and not (home / "packs" / name).exists()
    row = json.loads(gz("show", name, "--size", "100", "--json")[1])
    assert row["shape"] == [spec.channels, 100, 100] and len(row["classes"]) == spec.n_classes
    assert row["sheet"] is None and row["counts"]["test"] == spec.n_test and row["download"]


def test_sets_without_classes_with_many_attributes_or_further_pictures(gz, tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (40, 8, 8), np.uint8), rng.integers(0, 2, (40, 3))
    np.savez(tmp_path / "many.npz", images=images, labels=labels, class_names=list("xyz"))
    result = json.loads(gz("show", str(tmp_path / "many.npz"), "--json")[1])
    assert result["multilabel"] and [c["name"] for c in result["classes"]] == list("xyz")
    assert sum(c["train"] + c["val"] + c["test"] for c in result["classes"]) == labels.sum()
    flat = write(tmp_path / "flat", {f"{i}.png": png(RED) for i in range(9)})
    code, stdout, _ = gz("show", str(flat))
    assert code == 0 and len(stdout.splitlines()) == 3
    code, stdout, _ = gz("show", "digits-edited", "-q")
    assert code == 0 and min(Image.open(stdout.splitlines()[-1]).size) > 300


def test_hints_can_be_followed(gz, tmp_path):
    sizes = {f"{i}.png": png(BLUE, (90 + i, 80)) for i in range(9)}
    wide = write(tmp_path / "wide", sizes)
    code, _, stderr = gz("show", str(wide))
    assert code == 2 and "`--size 64`" in stderr and "--set" not in stderr
    code, stdout, stderr = gz("import", str(wide), "--name", "wide")
    assert code == 0 and stdout == "wide\n"
    assert "import it again with `--size 64`" in stderr
    assert "gz train fm --data wide --set data.size=64  train" in stderr
    flag = re.search(r"`--size (\d+)`", stderr)[1]
    assert gz("import", str(wide), "--name", "wide", "--size", flag)[0] == 0
    assert run(["train", "vae", "--data", "wide", "--set", "data.size=64", "--dry-run"]) == 0
    files = {f"{c}/{i}.png": png(RED) for c in ("bus", "train") for i in range(4)}
    words = ("import", str(write(tmp_path / "vehicles", files)), "--name", "vehicles")
    code, _, stderr = gz(*words)
    assert code == 2 and "--layout flat" in stderr and "classes, splits or class-splits" in stderr
    assert gz(*words, "--layout", "classes")[0] == 0
    code, _, stderr = gz(*words, "--layout", "class")
    assert code == 2 and "did you mean `classes`?" in stderr
    assert gz(*words, "--layout", "flat", "--channels", "2")[0] == 2


SPELLINGS = [
    ("A", ("a", "A"), [1]),
    ("a", ("A", "a"), [1]),
    ("B", ("a", "b"), [1]),
    ("sea-lion", ("sea_lion", "seal"), [0]),
    ("1", ("7", "1"), [1]),  # a name before a number
    ("0", ("7", "1"), [0]),
    ("x,y", ("x", "x,y"), [1]),  # the whole text is a name
    ("x,y", ("x", "y"), [0, 1]),
    ('"x,y",x', ("x", "x,y"), [1, 0]),
    ('x, "x,y"', ("x", "x,y"), [0, 1]),
    ('"x,y"', ("x", "x,y"), [1]),
]


def test_names_as_they_are_spelt_come_first():
    for text, classes, numbers in SPELLINGS:
        assert class_numbers(text, classes) == numbers, text
        labels = parse_labels(text, 2 * len(numbers), DataInfo((1, 8, 8), 256, classes))
        assert labels.tolist() == numbers * 2, text


REFUSED = [
    ("Á", ("a", "A"), "no label `Á`", "labels: a, A"),
    ("sea lion", ("sea-lion", "sea_lion"), "no label", "sea"),
    (
        "SEA-lion",
        ("sea-lion", "sea_lion"),
        "is ambiguous: `sea-lion` or `sea_lion`",
        "spell the label exactly",
    ),
    ("x", ("x,y", "z,w"), "no label `x`", """`--label '"x,y"'`"""),
    ("X", ("x,y", "z,w"), "no label `X`", """`--label '"x,y"'`"""),
    ("2", ("a", "b"), "no label `2` among the 2 classes", "a, b"),
    ("", ("a",), "no label ``", "a"),
    ("cat", (), "needs a data set with classes", ""),
    ("c" * 200_000, ("cat",), "is not a list of labels", "cat,dog"),
]


def test_labels_that_are_none_or_two():
    for text, classes, named, hint in REFUSED:
        with pytest.raises(UsageError, match=named) as e:
            class_numbers(text, classes)
        assert hint in (e.value.hint or ""), text
