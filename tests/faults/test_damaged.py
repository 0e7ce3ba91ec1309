"""Runs of which one file is damaged: every verb names the file, lists go on, and nothing is a bug in gz."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from generated import generated
from helpers import recipe, trainer
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from zoo import CASES

from gzcli.cli import app, out
from gzcli.core.errors import DamagedError, GzError, MissingError
from gzcli.engine import checkpoint as checkpoints
from gzcli.engine import prepared
from gzcli.engine.log import Log
from gzcli.engine.trained import init_from, load_trained, restore_model
from gzcli.launch import forecast, launcher
from gzcli.launch.from_file import run_of
from gzcli.store import runs
from gzcli.store.runs import Run

VAE = next(c for c in CASES if c.model == "vae")
RECORDS = ("status.json", "run.yaml", "env.json", "metrics.jsonl", ".gz", "checkpoints/best.json")
DAMAGES = {
    "gone": None,
    "empty": b"",
    "zeros": bytes(4096),
    "noise": bytes(range(256)) * 4,
    "a list": b"[]",
    "null": b"null",
    "a number": b"5",
    "other keys": b'{"a": 1}',
    "deep": b"[" * 100_000,
    "a tag": b"!!python/object/apply:os.system [exit]",
}
LINES = """runs list; list runs --json; runs show RUN; runs path RUN; runs prune --unfinished --yes;
sample RUN; sample vae; ood RUN --out patches; bench RUN; train RUN --resume --steps 9; train RUN --dry-run"""
VERBS = [tuple(line.split()) for line in LINES.split(";")]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Iterator[Run]:
    """A finished run of four steps, in a store of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GZ_HOME", str(tmp_path_factory.mktemp("damaged")))
        sets = ("train.checkpoint_every=2", "train.keep=2", "train.best=loss")
        t = trainer(recipe(VAE, steps=4, sets=sets))
        t.fit()
        finished_run = t.run
        finished_run.update(state="finished", steps=4, error=None)
        (finished_run.path / "env.json").write_text("{}")
        patch.setattr(launcher, "run", refuse)
        yield finished_run


def refuse(folder: Path, *args: object, **more: object) -> None:
    raise MissingError("no engine is started here")


@contextlib.contextmanager
def damaged(file: Path, content: bytes | None) -> Iterator[None]:
    """A file that is gone, or has another content, inside the block."""
    whole = file.read_bytes()
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(whole)


def outcome(run: Run, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code of a command line, and what it says. What it leaves in the store is removed."""
    before = set(run.path.parent.iterdir())
    try:
        code = app.run([run.id if word == "RUN" else word for word in words])
    finally:
        out.configure(json=False, quiet=False, lenient=False)
        for new in set(run.path.parent.iterdir()) - before:
            shutil.rmtree(new, ignore_errors=True)
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def halves(file: Path) -> bytes:
    return file.read_bytes()[: file.stat().st_size // 2]


@pytest.mark.parametrize("name", RECORDS)
def test_a_damaged_record_is_named(run, name, capsys):
    file, status_file = run.path / name, run.path / "status.json"
    of_run = [words for words in VERBS if "RUN" in words[-1:] or "--resume" in words]
    for how, content in {**DAMAGES, "half": halves(file)}.items():
        for words in VERBS if name in RECORDS[:2] else of_run:
            status = status_file.read_bytes()
            with damaged(file, content):
                code, text = outcome(run, words, capsys)
            status_file.write_bytes(status)
            assert code != 1 and "internal error" not in text, (name, how, words, text)
            if words[1] in ("list", "runs"):
                assert code == 0 and run.id in text, (name, how, words, text)


def test_a_recipe_that_lacks_keys_is_refused(run, capsys):
    """It would be trained with other settings. That of an earlier version may lack newer keys."""
    file, resume = run.recipe_file, ("train", "RUN", "--resume", "--steps", "9")
    lines = file.read_text().splitlines(keepends=True)
    sections = [i for i, line in enumerate(lines) if line[0] not in " #"]
    for i in sections:
        with damaged(file, "".join(lines[:i]).encode()):
            code, text = outcome(run, resume, capsys)
            assert code in (2, 3) and "no engine is started" not in text, lines[i]
    half = "".join(lines[: lines.index("  clip: null\n")])
    with damaged(file, half.encode()):
        code, text = outcome(run, resume, capsys)
        assert code == 2 and "it lacks `train.clip`, `train.skip`" in text and "`params`" in text
        assert "gz runs remove" in text
    for name in ("optim", "sample"):
        first = lines.index(f"{name}:\n")
        rest = next(i for i in sections if i > first)
        with damaged(file, "".join(lines[:first] + lines[rest:]).encode()):
            assert f"it lacks `{name}`" in outcome(run, resume, capsys)[1]
    status = run.status_file.read_bytes()
    with damaged(file, half.partition("\n")[2].encode()), damaged(run.status_file, status):
        assert "no engine is started" in outcome(run, resume, capsys)[1]


@pytest.mark.parametrize("how", ["half", "empty", "noise", "a list", "deep", "other types", "other data"])
def test_a_record_of_the_machine_does_not_stop_a_training(run, how, capsys):
    """Nothing is trained by `env.json`."""
    garbage: dict[str, Any] = {"packages": 3, "training": [], "data": "x", "command": {}, "models": 1}
    metadata = {"data": {"name": "digits", "digest": "x", "counts": 5}, "training": {"recipe": 5}}
    content = {**DAMAGES, "half": b'{"packages": {', "other types": json.dumps(garbage).encode()}
    content["other data"] = json.dumps(metadata).encode()
    status = run.status_file.read_bytes()
    with damaged(run.path / "env.json", content[how]), damaged(run.status_file, status):
        code, text = outcome(run, ("train", "RUN", "--resume", "--steps", "9"), capsys)
        assert code == 3 and "no engine is started here" in text
        assert ("was damaged; gz rewrote it" in text) == (how != "other data")
        assert json.loads((run.path / "env.json").read_text())["packages"]["torch"]


def test_a_cut_record_of_losses_is_said(run, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(Log, "warn", lambda self, text: said.append(text))
    whole = run.metrics_file.read_bytes()

    def resumed(content: bytes | None) -> list[str]:
        said.clear()
        with damaged(run.metrics_file, content):
            assert trainer(run.tree(), run).resume() == 4
        return list(said)

    assert resumed(whole) == [] and resumed(whole + b'{"step": 5, "lo') == []
    cut = (
        f"`{run.metrics_file}` was truncated: {{}} of 4 loss lines are missing; the weights are not affected"
    )
    assert resumed(whole[: whole.index(b"\n") + 20]) == [cut.format(3)]
    assert resumed(b"") == resumed(None) == [cut.format(4)]


def test_what_is_wrong_is_said_and_the_run_can_be_removed(run, capsys, tmp_path):
    for name in ("status.json", "run.yaml"):
        with damaged(run.path / name, b"{"):
            code, text = outcome(run, ("sample", "RUN"), capsys)
            assert code == 3 and f"{name}` is damaged" in text and "gz runs remove" in text
            backup = shutil.copytree(run.path, tmp_path / name)
            assert outcome(run, ("runs", "remove", "RUN", "--yes"), capsys)[0] == 0 and not run.path.exists()
            shutil.copytree(backup, run.path)


def test_a_damaged_checkpoint_is_passed_over(run):
    """The one before it is taken; a file that is whole by its checksum but no work of gz is named."""
    folder, warned = run.path / "checkpoints", []
    for name in ("model.safetensors", "train.pt", "ema.safetensors", "meta.json"):
        file = folder / "00000004" / name
        half = halves(file)
        for content in (*DAMAGES.values(), half):
            with damaged(file, content):
                assert checkpoints.newest(folder, warned.append) == folder / "00000002"
                if content not in (None, half) and name in ("train.pt", "ema.safetensors"):
                    with pytest.raises(MissingError, match=name) as e:
                        checkpoints.read(folder / "00000004")
                    assert "weights_only" not in e.value.message
            assert name in warned.pop() and not warned
    assert checkpoints.newest(folder, warned.append) == folder / "00000004"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def changed(tree: dict, place: int, value: object) -> dict:
    """A copy of a tree in which one value, counted over all depths, is another."""
    tree = copy.deepcopy(tree)
    leaves: list[tuple[dict, str]] = []

    def walk(node: object) -> None:
        if isinstance(node, dict):
            for key, below in node.items():
                leaves.append((node, key))
                walk(below)

    walk(tree)
    node, key = leaves[place % len(leaves)]
    node[key] = value
    return tree


@generated(15)
@given(place=st.integers(0, 200), value=VALUES, name=st.sampled_from(["status.json", "run.yaml"]))
def test_any_value_in_a_record_is_met(run, capsys, place, value, name):
    file = run.path / name
    tree = changed(yaml.safe_load(file.read_text()), place, value)
    text = json.dumps(tree) if name.endswith("json") else yaml.safe_dump(tree)
    status = (run.path / "status.json").read_bytes()
    for words in (("runs", "list"), ("runs", "show", "RUN"), ("sample", "RUN"), ("train", "RUN", "--resume")):
        with damaged(file, text.encode()):
            code, said = outcome(run, words, capsys)
        (run.path / "status.json").write_bytes(status)
        assert code != 1 and "internal error" not in said, (words, said)


@generated(30)
@given(place=st.integers(0, 200), value=VALUES)
def test_any_value_in_the_recipe_of_a_weights_file_is_met(run, place, value):
    """The model is built from it, or an error says why not; numbers without sense are refused at once."""
    whole, file = checkpoints.read_weights(run.path / "model.safetensors"), run.path / "other.safetensors"
    tree = changed({key: whole.part.tree()[key] for key in ("model", "data")}, place, value)
    texts = {"gz": "1", "recipe": json.dumps({**whole.part.tree(), **tree}), "step": "4"}
    save_file(whole.weights, file, metadata=texts | {"data": json.dumps(vars(whole.info))})
    with contextlib.suppress(GzError):
        restore_model(checkpoints.read_weights(file))
    file.unlink()


def test_weights_that_are_not_the_models_are_not_taken(run, tmp_path):
    """A layer without its weights would be one of random numbers, without a word."""
    whole = checkpoints.read_weights(run.path / "model.safetensors")
    first, file = next(iter(whole.weights)), tmp_path / "model.safetensors"
    lacking = {k: v for k, v in whole.weights.items() if k != first}
    unknown = {**whole.weights, "of_another_version": torch.zeros(1)}
    for weights, name in ((lacking, first), (unknown, "of_another_version")):
        with pytest.raises(GzError, match=re.escape(name)):
            restore_model(replace(whole, weights=weights))
    for number in ("inf", "nan"):
        broken = replace(whole, weights={**whole.weights, first: whole.weights[first] * float(number)})
        with pytest.raises(DamagedError, match=f"`{re.escape(first)}`.*not finite"):
            restore_model(broken)
        checkpoints.save_weights(file, broken)
    with pytest.raises(DamagedError, match=f"`{re.escape(first)}` contains NaN"):
        checkpoints.read_weights(file)


def test_a_file_that_fails_on_loading_is_named_as_the_user_typed_it(run, tmp_path):
    """And not by its copy in the cache; a copy of the file is named by its own path."""
    whole = checkpoints.read_weights(run.path / "model.safetensors")
    first = next(iter(whole.weights))
    wrong = replace(whole.part, options=dict(whole.part.options) | {"latent": 3})
    changes: dict[str, dict[str, Any]] = {
        "nan": {"weights": {**whole.weights, first: whole.weights[first] * float("nan")}},
        "inf": {"weights": {**whole.weights, first: whole.weights[first] + float("inf")}},
        "lacks": {"weights": {k: v for k, v in whole.weights.items() if k != first}},
        "other": {"part": wrong},
    }
    for how, change in changes.items():
        file = tmp_path / f"{how}.safetensors"
        checkpoints.save_weights(file, replace(whole, **change))
        for place in (file, shutil.copy(file, tmp_path / f"{how}-2.safetensors")):
            with pytest.raises(DamagedError) as e:
                load_trained(run_of(Path(place)), "cpu")
            assert f"`{place}`" in e.value.message and "files/" not in e.value.message, how
            assert e.value.hint.startswith("get a new copy of the file")


def test_metadata_that_are_no_texts_are_damage(run, tmp_path):
    content = (run.path / "model.safetensors").read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    for texts in (None, [], "x", {"recipe": None, "data": None}, {"recipe": {}, "data": {}}):
        text = json.dumps(header | {"__metadata__": texts}).encode()
        file = tmp_path / "own.safetensors"
        file.write_bytes(len(text).to_bytes(8, "little") + text + content[begin:])
        for read in (checkpoints.read_weights, run_of):
            with pytest.raises(MissingError) as e:
                read(file)
            assert str(file) in e.value.message, texts


NOT_IMAGES = {
    "shape": [[1, -16, -16], [1, 0, 16], [16, 16], [1, 16.5, 16], ["a", 1, 2], [True, 8, 8], 5, None, "abc"],
    "levels": [-3, 0, "x", 2.5],
    "classes": [5, [{}]],
}


def test_a_weights_file_that_describes_no_images_is_refused(run, tmp_path):
    whole, file = checkpoints.read_weights(run.path / "model.safetensors"), tmp_path / "own.safetensors"
    for key, values in NOT_IMAGES.items():
        for value in values:
            texts = checkpoints.metadata_of(whole) | {"data": json.dumps(asdict(whole.info) | {key: value})}
            save_file(whole.weights, file, metadata=texts)
            for read in (checkpoints.read_weights, run_of):
                with pytest.raises(MissingError, match="damaged"):
                    read(file)


def test_train_init_of_a_file_of_something_else_is_told(run, tmp_path):
    weights = run.path / "model.safetensors"
    whole = checkpoints.read_weights(weights)
    nan = {name: value * float("nan") for name, value in whole.weights.items()}
    checkpoints.save_weights(tmp_path / "nan", replace(whole, weights=nan))
    contents = DAMAGES | {"half": halves(weights), "nan": (tmp_path / "nan").read_bytes()}
    for how, content in contents.items():
        file = tmp_path / f"{how}.safetensors"
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(GzError, match=r"train\.init|no model or run|does not exist") as e:
            part = replace(whole.part, train=replace(whole.part.train, init=str(file)))
            init_from(restore_model(whole), part, run, Log(tmp_path, rank=0))
        assert e.value.code in (2, 3), how


ARRAYS = {"empty": b"", "text": b"text\n" * 99, "zeros": bytes(4096), "zip": b"PK\x03\x04" + bytes(99)}


def test_damaged_maps_of_what_a_model_prepares_are_made_again(tmp_path, capsys):
    log, folder = Log(tmp_path, mode="human"), tmp_path / "prepared"
    for how, content in ARRAYS.items():
        folder.mkdir()
        np.save(folder / "codes.npy", np.zeros((4, 3)))
        assert prepared.is_whole(folder, {"train": 4}, log)
        (folder / "codes.npy").write_bytes(content)
        assert not prepared.is_whole(folder, {"train": 4}, log) and not folder.exists()
        assert f"`{folder}` is damaged" in capsys.readouterr().err, how
    folder.write_text("a file in place of the folder")
    assert not prepared.is_whole(folder, {"train": 4}, log) and not folder.exists()
    folder.mkdir()
    os.mkfifo(folder / "codes.npy")
    assert not prepared.is_whole(folder, {"train": 4}, log)
    folder.mkdir()
    np.save(folder / "train.npy", np.zeros((5, 3)))
    assert prepared.is_whole(folder, {"train": 5, "val": 2}, log, ["train"])
    for counts, names in (({"train": 4}, ["train"]), ({"train": 5, "val": 2}, ["train", "val"])):
        folder.mkdir(exist_ok=True)
        np.save(folder / "train.npy", np.zeros((5, 3)))
        assert not prepared.is_whole(folder, counts, log, names)


def test_a_damaged_cost_is_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("GZ_HOME", str(tmp_path))
    file = forecast.cached("key")
    file.parent.mkdir(parents=True)
    more = {"text": b'{"timed": true, "params": "3"}', "old": b'{"cost": {}, "seconds": 3}'}
    assert forecast.recall("key") == {}
    for how, content in (DAMAGES | more).items():
        file.write_bytes(content or b"")
        assert forecast.recall("key") == {}, how


def test_the_store_is_as_it_was(run):
    assert runs.find(run.id).state == "finished"
    assert checkpoints.damage(run.path / "checkpoints" / "00000004") is None
