"""Commands that are killed at any change of the store: nothing is unreadable then, the same command ends
well, to the bit as one that was not killed, and nothing is left on its way."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from digests import of_array, sha
from PIL import Image
from safetensors.numpy import load_file
from server import serve

SMALL = ("model.net=mlp", "model.hidden=[8]", "model.latent=2", "train.batch_size=8", "train.keep=1")
SMALL += ("train.checkpoint_every=2", "train.eval_every=2", "train.best=loss", "train.sample_every=0")
TRAIN = ("train", "vae", "--data", "digits", "--steps", "4", "--cpu", "--name", "a", "--requeue")
TRAIN += tuple(word for key in SMALL for word in ("--set", key))
CONTENT = random.Random(0).randbytes(300_000)


LEFT = (".part", ".link")


def unreadable(home: Path) -> list[str]:
    """The files of a store that are no whole files of their kind, but those on their way."""
    faults = []
    for file in sorted(path for path in home.rglob("*") if path.is_file()):
        if any(name.endswith(LEFT) for name in file.relative_to(home).parts) or file.match(".index-*"):
            continue  # an index that is not whole is made again
        try:
            READERS.get(file.suffix, lambda file: None)(file)
        except Exception as e:
            faults.append(f"{file.relative_to(home)}: {type(e).__name__} {e}")
    return faults


READERS = {
    ".json": lambda file: json.loads(file.read_text()),
    ".jsonl": lambda file: [json.loads(line) for line in file.read_text().splitlines()],
    ".yaml": lambda file: yaml.safe_load(file.read_text()),
    ".npy": np.load,
    ".png": lambda file: Image.open(file).load(),
    ".safetensors": load_file,
    ".pt": lambda file: torch.load(file, weights_only=True),
}


def left_over(home: Path) -> list[str]:
    """What is on its way in a store."""
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.name.endswith(LEFT))


def outside(home: Path) -> list[str]:
    """What lies beside the store, and in the working folder."""
    beside = {path.name for path in home.parent.iterdir()} - {home.name, "here"}
    return sorted(beside | {path.name for path in (home.parent / "here").iterdir()})


def weights(run: Path) -> dict[str, str]:
    """The digests of the tensors of a run's weights."""
    return {name: of_array(value) for name, value in load_file(run / "model.safetensors").items()}


def arrays(folder: Path) -> dict[str, str]:
    """The digests of the arrays of a pack."""
    return {file.name: sha(file.read_bytes()) for file in sorted(folder.glob("*.npy"))}


@pytest.fixture(scope="module")
def trained(forks, tmp_path_factory) -> Path:
    """A store with a run `a`, and the digits packed."""
    home = tmp_path_factory.mktemp("trained") / "home"
    assert forks.do(*TRAIN, home=home) == 0, forks.said()
    return home


def run_a(home: Path) -> Path:
    """The folder of the run `a`, the only one."""
    (run,) = (path.parent for path in home.glob("runs/*/status.json"))
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    return run


# A case: the store that the command finds, its words, and what must not depend on its being killed.
Case = tuple[Path, tuple[str, ...], Callable[[Path], object]]


def training(trained: Path, folder: Path, few: int | None) -> Case:
    """From packing its data to its last picture; the run that goes on is the unbroken one, bit by bit."""

    def made(home: Path) -> object:
        run = run_a(home)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        figures = [{k: v for k, v in x.items() if k in ("step", "loss", "val_loss")} for x in lines]
        steps = sorted(folder.name for folder in (run / "checkpoints").iterdir() if folder.is_dir())
        return weights(run), figures, steps, arrays(home / "packs" / "digits" / "16x1")

    if few:  # a pack that is there saves the time of making one
        shutil.copytree(trained / "packs", folder / "packs")
    return folder, TRAIN, made


def packing(trained: Path, folder: Path, few: int | None) -> Case:
    pictures = folder.with_name("pictures")
    pictures.mkdir()
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(pixels).save(pictures / f"{i}.png")

    def made(home: Path) -> object:
        return arrays(next(home.glob("packs/mine/*/meta.json")).parent), (home / "data.json").read_text()

    return folder, ("data", "import", str(pictures), "--name", "mine"), made


def download(trained: Path, folder: Path, few: int | None) -> Case:
    return folder, (), lambda home: (home / "raw" / "toy" / "a.bin").read_bytes() == CONTENT


def pruning(trained: Path, folder: Path, few: int | None) -> Case:
    """A run that is being removed is whole, or is not there."""
    shutil.copytree(trained, folder)
    first = run_a(folder)
    for i in range(2):
        copy = first.with_name(f"{first.name[:-4]}000{i}")
        shutil.copytree(first, copy)
        status = json.loads((copy / "status.json").read_text())
        (copy / "status.json").write_text(json.dumps(status | {"state": "interrupted", "alias": None}))

    def made(home: Path) -> object:
        listed = sorted(name for name in os.listdir(home / "runs") if not name.startswith(".index-"))
        return sorted(file.name for file in run_a(home).rglob("*")), listed  # an index is of runs 2 s old

    return folder, ("runs", "prune", "--unfinished", "--yes"), made


def export(trained: Path, folder: Path, few: int | None) -> Case:
    def made(home: Path) -> object:
        (file,) = (run_a(home) / "export").glob("*.safetensors")
        return sha(file.read_bytes())

    return trained, ("runs", "export", "a"), made


FEW = {training: 3, packing: 1, download: 3, pruning: 2, export: 1}  # changes of each in the fast suite
CASES = [pytest.param(*item, id=f"{item[0].__name__} few") for item in FEW.items()]
CASES += [pytest.param(case, None, id=f"{case.__name__} all", marks=pytest.mark.slow) for case in FEW]


@pytest.mark.parametrize(("case", "few"), CASES)
def test_killed_at_any_change(case, few, forks, trained, tmp_path):
    source, words, made = case(trained, tmp_path / "source", few)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "a.bin").write_bytes(CONTENT)

    def store(n: int) -> Path:
        home = tmp_path / str(n) / "home"
        shutil.copytree(source, home, symlinks=True) if source.exists() else home.mkdir(parents=True)
        return home

    with serve(tmp_path / "site") as server:
        file, env = str(tmp_path / "site" / "a.bin"), {"GZ_OFFLINE": "0", "no_proxy": "*"}
        job = {"fetch": server.url, "content": file, "env": env} if case is download else {}
        changes = forks.changes(*words, home=store(0), **job)
        wanted = made(tmp_path / "0" / "home")
        places = [(n, when) for n in range(1, len(changes) + 1) for when in ("before", "after")]
        if few:
            places = [places[(2 * i + 1) * len(places) // (2 * few)] for i in range(few)]
        for i, (n, when) in enumerate(places, 1):
            where, home, how = f"{when} {n}: {changes[n - 1]}", store(i), "exit" if i % 2 else "SIGKILL"
            assert forks.do(*words, home=home, at=n, when=when, how=how, **job) in (99, -9), where
            assert unreadable(home) == [], where
            assert forks.do("runs", "list", home=home) == 0, (where, forks.said())
            assert forks.do(*words, home=home, **job) == 0, (where, forks.said())
            assert made(home) == wanted, where
            assert unreadable(home) == left_over(home) == outside(home) == [], where
            shutil.rmtree(home.parent)


def test_a_file_that_a_killed_job_was_writing_is_removed_by_the_next_one(forks, trained, tmp_path):
    """A job writes its images and maps into folders of its own."""
    packing(trained, tmp_path / "store", 1)
    alarm = ("ood", "pca_local", "--in", "digits", "--input", str(tmp_path / "pictures"))
    for words, place in ((("sample", "a", "-n", "2"), "images/.000001.png"), (alarm, "maps/.000001.png")):
        home = tmp_path / words[0] / "home"
        shutil.copytree(trained, home, symlinks=True)
        assert forks.do(*words, home=home, at=place, when="after", how="SIGKILL") == -9
        assert any(place in part for part in left_over(home))
        assert forks.do(*words, home=home) == 0, forks.said()
        assert left_over(home) == [] == unreadable(home)
