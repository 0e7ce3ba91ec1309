"""Checkpoints: written under a temporary name and renamed, with sizes and sha256. The last few and the best
are kept. A finished run can resume from its last checkpoint. Its best one is only sampled, so it keeps
nothing but the averaged weights. `checkpoints/00001000/` contains
  model.safetensors   the weights that are trained
  ema.safetensors     the averaged weights, which are sampled, with recipe and data's description as metadata
  train.pt            optimizers, scaler, counters, each rank's extra state and losses not yet logged
  meta.json           step, processes, threads, version of torch, device, precision, and checksums of these
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gzcli.core import ranks
from gzcli.core.errors import DamagedError, MissingError
from gzcli.core.hints import Option, advice, gz
from gzcli.core.sections import Part, part_of
from gzcli.core.types import DataInfo
from gzcli.data.readers.values import Values
from gzcli.models.nn import with_rows
from gzcli.store import files
from gzcli.store.run_folder import CheckpointFolder, Run, steps_of
from gzcli.version import __version__

NEWEST, NEWEST_AT_THE_END = 2, 1  # default number of newest checkpoints of a training and of a finished run
AVERAGED_FILE = CheckpointFolder.averaged.name  # the file that the best checkpoint of a finished run keeps
HASHED_FILES = (
    CheckpointFolder.weights.name,
    AVERAGED_FILE,
    CheckpointFolder.training.name,
)  # with checksums in `meta`
EARLIER_HINT = "remove the folder to resume from the checkpoint before it"
ALONE_NOTE = "it contains only the averaged weights"
EXTRA_STATE = "_extra_state"  # nn.Module.get_extra_state: per-rank state


def weights_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict, on the CPU and without shared storage, as safetensors requires."""
    return {
        k: v.detach().to("cpu", copy=True).contiguous()
        for k, v in state.items()
        if not k.endswith(EXTRA_STATE)
    }


def extra_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a state dict that differ between ranks."""
    return {k: v for k, v in state.items() if k.endswith(EXTRA_STATE)}


@dataclass(frozen=True)
class SpaceRecord:
    """The latent space in which a run was trained, as JSON values."""

    digest: str  # sha256 of the autoencoder's weights
    shape: list[int]  # shape of the images, [C, H, W]
    levels: int | None  # grey levels of the images
    shift: list[float]  # subtracted from each of the c channels of a latent
    scale: list[float]  # factor of each channel after that


@dataclass
class Saved:
    """Weights and everything needed to sample from them: the content of one safetensors file."""

    weights: dict[str, Tensor]  # tensors of the model's state dict
    part: Part  # the recipe of their training
    info: DataInfo  # description of the data for which the model was built
    step: int  # number of steps of their training
    # sha256 of the weights of each stage that the model is built on, by the stage's name
    built_on: Mapping[str, str] = field(default_factory=dict)
    space: SpaceRecord | None = None  # latent space of the model; None: pixels
    values: Values | None = None  # values of its images, if these are not 8-bit images


def save_weights(path: Path, saved: Saved) -> None:
    """Writes a safetensors file; everything but the weights is JSON in its metadata."""
    files.write_tensors(path, saved.weights, metadata_of(saved))


def metadata_of(saved: Saved) -> dict[str, str]:
    """Everything but the weights, as metadata for a safetensors file."""
    return {
        "gz": __version__,
        "recipe": json.dumps(saved.part.tree()),
        "data": json.dumps(asdict(saved.info)),
        "step": str(saved.step),
        "built_on": json.dumps(saved.built_on),
        "space": json.dumps(saved.space and asdict(saved.space)),
        **({"values": json.dumps(asdict(saved.values))} if saved.values else {}),
    }


def read_weights(path: Path) -> Saved:
    """What `save_weights` wrote. Raises MissingError if the file is missing or damaged."""
    hint = advice("use another checkpoint: {}", Option("checkpoint", "best"))
    if not path.exists():
        raise MissingError(f"no weights at `{path}`", hint=gz("runs list"))
    weights, metadata = files.read_tensors(path, hint)
    with files.reading(path, hint):
        info, tree = DataInfo.of(json.loads(metadata["data"])), json.loads(metadata["recipe"])
        # version 0.1 kept these two in the recipe
        built_on, space = (
            json.loads(metadata[key]) if key in metadata else tree.get(key) for key in ("built_on", "space")
        )
        record, step = SpaceRecord(**space) if space else None, int(metadata["step"])
        values = Values.of(json.loads(metadata["values"])) if "values" in metadata else None
        return Saved(weights, part_of(tree), info, step, built_on or {}, record, values)


@dataclass
class Checkpoint:
    """The state that a training resumes from."""

    weights: dict[str, Tensor]  # that are trained
    averaged: Saved  # averaged weights, which are sampled
    train: dict[str, Any]  # optimizers, scaler, counters, and each rank's extra state
    meta: dict[str, Any]  # step, ranks, threads, version of torch and device that it was made with


def write(folder: Path, step: int, checkpoint: Checkpoint) -> Path:
    """Writes `folder/<step>/` completely or not at all. Raises MissingError if the disk is full."""
    path = CheckpointFolder.of(folder, step).path
    tensors = [*checkpoint.weights.values(), *checkpoint.averaged.weights.values()]
    files.need_space(folder, 2 * sum(t.numel() * t.element_size() for t in tensors))
    with files.new_dir(path) as part:
        files.write_tensors(part / CheckpointFolder.weights, checkpoint.weights)
        save_weights(part / CheckpointFolder.averaged, checkpoint.averaged)
        files.write_state(part / CheckpointFolder.training, checkpoint.train)
        written = sorted(part.iterdir())
        sums = {f.name: {"size": f.stat().st_size, "sha256": files.checksum(f)} for f in written}
        meta = {"step": step, **checkpoint.meta, "files": sums}
        files.write_json(part / CheckpointFolder.meta, meta)
    return path


def read(path: Path) -> Checkpoint:
    """The checkpoint in a folder, which must be undamaged (see `damage`). Raises DamagedError if gz did not
    write it."""
    averaged = read_weights(path / CheckpointFolder.averaged)
    try:
        train = torch.load(path / CheckpointFolder.training, map_location="cpu", weights_only=True)
        missing = {"optimizers", "scaler", "ema_updates", "extra"} - set(train)
    except Exception as e:  # errors of pickle, zip and torch, which advises to load it unsafely
        raise DamagedError(f"`{path / 'train.pt'}` is not a training state from gz", hint=EARLIER_HINT) from e
    if missing:
        raise DamagedError(f"`{path / 'train.pt'}` has no {', '.join(sorted(missing))}", hint=EARLIER_HINT)
    meta = files.read_object(path / CheckpointFolder.meta)
    weights, _ = files.read_tensors(path / CheckpointFolder.weights, EARLIER_HINT)
    return Checkpoint(weights, averaged, train, meta)


def damage(path: Path) -> str | None:
    """What is damaged in a checkpoint; None if nothing is."""
    if not (path / CheckpointFolder.meta).exists():
        return "`meta.json` is missing"
    try:
        meta = files.read_object(path / CheckpointFolder.meta)
        if set(meta["files"]) == {AVERAGED_FILE}:
            return ALONE_NOTE
        sums = {name: (meta["files"][name]["size"], meta["files"][name]["sha256"]) for name in HASHED_FILES}
        if not isinstance(meta["step"], int):
            raise TypeError
    except DamagedError as e:
        return e.message
    except (KeyError, TypeError):
        return "`meta.json` is not from gz"
    for name, (size, digest) in sums.items():
        file = path / name
        if not file.exists():
            return f"`{name}` is missing"
        if file.stat().st_size != size or files.checksum(file) != digest:
            return f"`{name}` does not match its checksum"
    return None


def newest(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest undamaged checkpoint; `warn` gets a line about each damaged one."""
    for step in reversed(steps_of(folder)):
        path = CheckpointFolder.of(folder, step).path
        if (fault := damage(path)) is None:
            return path
        if fault != ALONE_NOTE:
            warn(f"checkpoint `{path}` is damaged ({fault}); trying the one before it")
    return None


def prune(folder: Path, keep: int, *, finished: bool = False) -> None:
    """Removes all but the last `keep` checkpoints and the best one. The best checkpoint of a finished run
    keeps only its averaged weights."""
    try:
        best = files.read_object(folder.parent / Run.best_file).get("step")
    except DamagedError:
        best = None
    for step in steps_of(folder)[:-keep]:
        path = CheckpointFolder.of(folder, step).path
        if step != best:
            files.remove_tree(path)
        elif finished:
            strip(path)


def strip(path: Path) -> None:
    """Reduces a checkpoint to its averaged weights. A damaged checkpoint is not changed."""
    if damage(path) is None:
        meta = files.read_object(path / CheckpointFolder.meta)
        files.write_json(
            path / CheckpointFolder.meta, meta | {"files": {AVERAGED_FILE: meta["files"][AVERAGED_FILE]}}
        )
    elif damage(path) != ALONE_NOTE:
        return
    for name in set(HASHED_FILES) - {AVERAGED_FILE}:
        (path / name).unlink(missing_ok=True)


# ---------------------------------------------------------------------------- the state of a training


def load(model: nn.Module, values: Mapping[str, Any]) -> None:
    """Loads an unsharded state dict into a model; each rank takes its part. Raises RuntimeError if names or
    shapes differ."""
    present = model.state_dict()
    model.load_state_dict({name: ranks.part_like(v, present.get(name)) for name, v in values.items()})


def finish(run: Run, keep: int | None, step: int) -> int:
    """Makes the averaged weights of a checkpoint the run's `model.safetensors`, as a hard link if the disk
    supports it. The checkpoint is that of `step`, or the last one if that is missing. Returns its step. Only
    rank 0 calls it."""
    step = step if run.checkpoint(step).averaged.exists() else run.saved_steps[-1]
    weights, place = run.checkpoint(step).averaged, run.model_file
    # a link cannot replace another link to the same file
    if not (place.exists() and place.samefile(weights)):
        with files.replacing(place) as part:
            files.link_or_copy(weights, part)
        run.update(ema_length=None)  # from a shorter training, by `gz runs ema`
    run.update(served=step)
    prune(run.checkpoints_folder, keep or NEWEST_AT_THE_END, finished=True)
    return step


def restore(optimizer: Optimizer, values: dict[str, Any]) -> None:
    """Loads the state of an optimizer. A tensor with a parameter's shape is sharded like the parameter. It
    also gets the parameter's memory format, which fused kernels require, and which may differ on the
    checkpoint's device."""
    params = [p for group in optimizer.param_groups for p in group["params"]]

    def part(value: Any, p: Tensor) -> Any:
        value = with_rows(value, p) if isinstance(value, Tensor) else value
        return ranks.part_like(value, p) if isinstance(value, Tensor) and value.shape == p.shape else value

    state = {
        i: {key: part(value, params[i]) for key, value in entries.items()}
        for i, entries in values["state"].items()
    }
    optimizer.load_state_dict(values | {"state": state})
    for p, entries in optimizer.state.items():
        for key, value in entries.items():
            if isinstance(value, Tensor) and value.shape == p.shape and value.stride() != p.stride():
                entries[key] = torch.empty_like(p, dtype=value.dtype).copy_(value)
