"""Runs commands of gz that are killed just before or after their n-th change of the store, and looks at what
they leave: see `zygote`, and `forks`, by which they are run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml

LEFT = (".part", ".part1", ".part2", ".part3", ".link")


def unreadable(home: Path) -> list[str]:
    """The files of a store that are no whole files of their kind, but those on their way."""
    found = []
    for file in sorted(path for path in home.rglob("*") if path.is_file()):
        if any(name.endswith(LEFT) for name in file.relative_to(home).parts) or file.match(".index-*"):
            continue  # an index that is not whole is made again
        try:
            read(file)
        except Exception as e:
            found.append(f"{file.relative_to(home)}: {type(e).__name__} {e}")
    return found


def read(file: Path) -> object:
    """Reads a file by the reader of its kind. Raises any error."""
    if file.suffix == ".json":
        return json.loads(file.read_text())
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in file.read_text().splitlines()]
    if file.suffix == ".yaml":
        return yaml.safe_load(file.read_text())
    if file.suffix == ".npy":
        return np.load(file)
    if file.suffix == ".png":
        from PIL import Image

        return Image.open(file).load()
    if file.suffix == ".safetensors":
        from safetensors.numpy import load_file

        return load_file(file)
    if file.suffix == ".pt":
        import torch

        return torch.load(file, weights_only=True)
    return None


def left_over(home: Path) -> list[str]:
    """What is on its way in a store."""
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.name.endswith(LEFT))


def outside(home: Path) -> list[str]:
    """What lies beside the store, and in the working folder."""
    beside = {path.name for path in home.parent.iterdir()} - {home.name, "here"}
    return sorted(beside | {path.name for path in (home.parent / "here").iterdir()})


def weights(run: Path) -> dict[str, bytes]:
    """The tensors of a run's weights, to the bit."""
    from safetensors.numpy import load_file

    return {name: value.tobytes() for name, value in load_file(run / "model.safetensors").items()}


def arrays(folder: Path) -> dict[str, bytes]:
    """The arrays of a pack."""
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.npy"))}
