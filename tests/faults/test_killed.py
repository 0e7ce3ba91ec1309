"""Commands that are killed at any change of the store: nothing is unreadable then, the same command ends
well, what it makes is that of a command that was not killed, to the bit, and nothing is left on its way.

A few of the changes are in the fast suite, all of them in the slow one. What is made now and then in a real
process of its own is in `test_processes`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from forks import Zygote
from PIL import Image
from safetensors.numpy import load_file
from server import serve

SMALL = ("model.net=mlp", "model.hidden=[8]", "model.latent=2", "train.batch_size=8", "train.keep=1")
SMALL += ("train.checkpoint_every=2", "train.eval_every=2", "train.best=loss", "train.sample_every=0")
TRAIN = ("train", "vae", "--data", "digits", "--steps", "4", "--cpu", "--name", "a", "--requeue")
TRAIN += tuple(word for key in SMALL for word in ("--set", key))
FEW = {"train": 3, "pack": 1, "download": 1, "prune": 2, "export": 1}  # changes of each in the fast suite
CONTENT = random.Random(0).randbytes(300_000)


LEFT = (".part", ".part1", ".part2", ".part3", ".link")


def unreadable(home: Path) -> list[str]:
    """The files of a store that are no whole files of their kind, but those on their way."""
    found = []
    for file in sorted(path for path in home.rglob("*") if path.is_file()):
        if any(name.endswith(LEFT) for name in file.relative_to(home).parts) or file.match(".index-*"):
            continue  # an index that is not whole is made again
        try:
            READERS.get(file.suffix, lambda file: None)(file)
        except Exception as e:
            found.append(f"{file.relative_to(home)}: {type(e).__name__} {e}")
    return found


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


def weights(run: Path) -> dict[str, bytes]:
    """The tensors of a run's weights, to the bit."""
    return {name: value.tobytes() for name, value in load_file(run / "model.safetensors").items()}


def arrays(folder: Path) -> dict[str, bytes]:
    """The arrays of a pack."""
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.npy"))}


@pytest.fixture(scope="module")
def trained(forks, tmp_path_factory) -> Path:
    """A store with a run `a`, and the digits packed."""
    home = tmp_path_factory.mktemp("trained") / "home"
    assert forks.do(*TRAIN, home=home) == 0, forks.said()
    return home


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("site")
    (folder / "a.bin").write_bytes(CONTENT)
    with serve(folder) as server:
        yield server.url, folder / "a.bin"


def run_a(home: Path) -> Path:
    """The folder of the run `a`, the only one."""
    (found,) = (path.parent for path in home.glob("runs/*/status.json"))
    assert json.loads((found / "status.json").read_text())["state"] == "finished"
    return found


def copies(source: Path, tmp_path: Path) -> Callable[[int], Path]:
    """home(n): a store like another one, in a folder of its own."""

    def home(n: int) -> Path:
        target = tmp_path / str(n) / "home"
        if source.exists():
            shutil.copytree(source, target, symlinks=True)
        else:
            target.mkdir(parents=True)
        return target

    return home


def all_changes(kind: str) -> list[pytest.param]:
    few = pytest.param(True, id=f"{kind} few")
    return [few, pytest.param(False, id=f"{kind} all", marks=[pytest.mark.slow])]


def killed_everywhere(
    forks: Zygote,
    home: Callable[[int], Path],
    words: tuple[str, ...],
    few: int | None,
    check: Callable[[Path], object],
    **job: object,
) -> int:
    """Kills a command at each of its changes, or at a few of them. Returns at how many."""
    whole = home(0)
    changes = forks.changes(*words, home=whole, **job)
    wanted = check(whole)
    places = [(n, when) for n in range(1, len(changes) + 1) for when in ("before", "after")]
    if few is not None:
        places = [places[(2 * i + 1) * len(places) // (2 * few)] for i in range(few)]
    for i, (n, when) in enumerate(places, 1):
        where, store = f"{when} {n}: {changes[n - 1]}", home(i)
        how = "exit" if i % 2 else "SIGKILL"
        assert forks.do(*words, home=store, at=n, when=when, how=how, **job) in (99, -9), where
        assert unreadable(store) == [], where
        assert forks.do("runs", "list", home=store) == 0, (where, forks.said())
        assert forks.do(*words, home=store, **job) == 0, (where, forks.said())
        assert check(store) == wanted, where
        assert unreadable(store) == left_over(store) == outside(store) == [], where
        shutil.rmtree(store.parent)
    print(f"{words[:2]}: killed at {len(places)} of {2 * len(changes)} places")
    return len(places)


@pytest.mark.parametrize("few", all_changes("train"))
def test_a_training(forks, trained, tmp_path, few):
    """From packing its data to its last picture; the run that goes on is the unbroken one, bit by bit."""

    def check(home: Path) -> object:
        run = run_a(home)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        figures = [{k: v for k, v in x.items() if k in ("step", "loss", "val_loss")} for x in lines]
        steps = sorted(folder.name for folder in (run / "checkpoints").iterdir() if folder.is_dir())
        return weights(run), figures, steps, arrays(home / "packs" / "digits" / "16x1")

    packed = tmp_path / "packed"
    if few:  # a pack that is there saves the time of making one
        shutil.copytree(trained / "packs", packed / "packs")
    killed_everywhere(forks, copies(packed, tmp_path), TRAIN, FEW["train"] if few else None, check)


@pytest.mark.parametrize("few", all_changes("pack"))
def test_packing(forks, pictures, tmp_path, few):
    words = ("data", "import", str(pictures), "--name", "mine")

    def check(home: Path) -> object:
        return arrays(next(home.glob("packs/mine/*/meta.json")).parent), (home / "data.json").read_text()

    killed_everywhere(forks, copies(tmp_path / "none", tmp_path), words, FEW["pack"] if few else None, check)


@pytest.mark.parametrize("few", all_changes("download"))
def test_a_download(forks, site, tmp_path, few):
    url, content = site
    job = {"fetch": url, "content": str(content), "env": {"GZ_OFFLINE": "0", "no_proxy": "*"}}

    def check(home: Path) -> object:
        return (home / "raw" / "toy" / "a.bin").read_bytes() == CONTENT

    killed_everywhere(
        forks, copies(tmp_path / "none", tmp_path), (), FEW["download"] if few else None, check, **job
    )


@pytest.mark.parametrize("few", all_changes("prune"))
def test_pruning(forks, trained, tmp_path, few):
    """A run that is being removed is whole, or is not there."""
    source = tmp_path / "several"
    shutil.copytree(trained, source)
    first = run_a(source)
    for i in range(2):
        other = first.with_name(f"{first.name[:-4]}000{i}")
        shutil.copytree(first, other)
        status = json.loads((other / "status.json").read_text())
        (other / "status.json").write_text(json.dumps(status | {"state": "interrupted", "alias": None}))
    words = ("runs", "prune", "--unfinished", "--yes")

    def check(home: Path) -> object:
        listed = sorted(name for name in os.listdir(home / "runs") if not name.startswith(".index-"))
        return sorted(file.name for file in run_a(home).rglob("*")), listed  # an index is of runs 2 s old

    killed_everywhere(forks, copies(source, tmp_path), words, FEW["prune"] if few else None, check)


@pytest.mark.parametrize("few", all_changes("export"))
def test_an_export(forks, trained, tmp_path, few):
    words = ("runs", "export", "a")

    def check(home: Path) -> object:
        (file,) = (run_a(home) / "export").glob("*.safetensors")
        return file.read_bytes()

    killed_everywhere(forks, copies(trained, tmp_path), words, FEW["export"] if few else None, check)
