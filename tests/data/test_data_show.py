"""`gz data show` and `gz data import`: what a set holds is told and drawn; hints can be followed."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from pictures import BLUE, COLOURS, LAYOUTS, RED, png, write
from PIL import Image

from gzcli.cli.app import run
from gzcli.data.sets.registry import SPECS


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
    told = json.loads(gz("show", str(folder), "--json")[1])
    assert told["counts"] == {"train": 17, "val": 1, "test": 18} and told["sheet"] == path
    counted = [(c["name"], c["train"] + c["val"], c["test"]) for c in told["classes"]]
    assert counted == [("blue", 6, 6), ("green", 6, 6), ("red", 6, 6)]
    assert told["notes"] == ["1 file of unknown kind skipped (.heic)"]


@pytest.mark.parametrize("name", ["mnist", "celeba", "imagenet", "chestmnist"])
def test_a_set_that_is_not_here_is_described_and_not_fetched(name, gz, home, monkeypatch):
    monkeypatch.delenv("GZ_OFFLINE")
    monkeypatch.setattr("gzcli.data.download.fetch.fetch", lambda *a, **k: pytest.fail("it was fetched"))
    spec = SPECS[name]
    code, stdout, stderr = gz("show", name)
    assert code == 0 and stdout.splitlines()[-1].split()[:2] == [name, str(spec.n_train)]
    size, classes = f"{spec.size}×{spec.size} pixels", f"{spec.n_classes:,} "
    assert not [told for told in (size, classes, spec.licence, "their settings for") if told not in stderr]
    assert f"`gz data download {name}" in stderr and not (home / "packs" / name).exists()
    row = json.loads(gz("show", name, "--size", "100", "--json")[1])
    assert row["shape"] == [spec.channels, 100, 100] and len(row["classes"]) == spec.n_classes
    assert row["sheet"] is None and row["counts"]["test"] == spec.n_test and row["download"]


def test_sets_without_classes_with_many_attributes_or_further_pictures(gz, tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (40, 8, 8), np.uint8), rng.integers(0, 2, (40, 3))
    np.savez(tmp_path / "many.npz", images=images, labels=labels, class_names=list("xyz"))
    told = json.loads(gz("show", str(tmp_path / "many.npz"), "--json")[1])
    assert told["multilabel"] and [c["name"] for c in told["classes"]] == list("xyz")
    assert sum(c["train"] + c["val"] + c["test"] for c in told["classes"]) == labels.sum()
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
    assert "gz train fm --data wide --set data.size=64  a" in stderr
    flag = re.search(r"`--size (\d+)`", stderr)[1]
    assert gz("import", str(wide), "--name", "wide", "--size", flag)[0] == 0
    assert run(["train", "vae", "--data", "wide", "--set", "data.size=64", "--dry-run"]) == 0
    files = {f"{c}/{i}.png": png(RED) for c in ("bus", "train") for i in range(4)}
    words = ("import", str(write(tmp_path / "vehicles", files)), "--name", "vehicles")
    code, _, stderr = gz(*words)
    assert code == 2 and "--layout flat|classes|splits|class-splits" in stderr
    assert gz(*words, "--layout", "classes")[0] == 0
    code, _, stderr = gz(*words, "--layout", "class")
    assert code == 2 and "did you mean `classes`?" in stderr
    assert gz(*words, "--layout", "flat", "--channels", "2")[0] == 2
