"""What a trainer keeps of itself: checkpoints, the way back from them, the weights that it starts from and
ends with.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from gzcli import ranks
from gzcli.engine import checkpoint as checkpoints
from gzcli.errors import MissingError, UsageError
from gzcli.recipe.parts import part_of
from gzcli.store import files, runs
from gzcli.store.runs import Run

if TYPE_CHECKING:
    from gzcli.engine.trainer import Trainer


def save(t: Trainer, step: int) -> None:
    """A checkpoint of `step` steps; every rank calls it, rank 0 writes."""
    if step == t.saved:
        return
    t.saved = step
    statistics = t.ema.statistics()
    folder = t.run.path / "checkpoints"
    state = t.model.state_dict()
    own = ranks.everyone((checkpoints.extra_of(state), t.watch.pending()))
    if t.rank == 0:
        scaler = t.accelerator.scaler
        weights = checkpoints.weights_of(state)
        train = {
            "optimizers": {name: o.state_dict() for name, o in t.optimizers.items()},
            "scaler": scaler.state_dict() if scaler is not None else None,
            "ema_updates": t.ema.updates,
            "extra": [extra for extra, _ in own],
            "pending": [pending for _, pending in own],
        }
        meta = {
            "world": t.world,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "device": t.device.type,
        }
        averaged = weights | checkpoints.weights_of(t.ema.state_dict() | statistics)
        saved = checkpoints.Saved(
            averaged, part_of(t.tree), t.info, step, t.tree["built_on"], t.tree.get("space")
        )
        checkpoints.save(folder, step, model=weights, ema=saved, train=train, meta=meta)
        checkpoints.prune(folder, t.train["keep"])
        t.run.update(step=step)
        t.log.event("checkpoint", step=step)
    t.accelerator.wait_for_everyone()


def resume(t: Trainer) -> None:
    """Enters the newest whole checkpoint, if there is one; else `train.init`, if it is set."""
    path = checkpoints.newest(t.run.path / "checkpoints", t.log.warn)
    if path is None:
        if t.train["init"]:
            init_from(t, t.train["init"])
        return
    weights, ema, train, meta = checkpoints.load(path)
    # a rank that was not there keeps what it begins with
    extra = (
        train["extra"][t.rank] if t.rank < len(train["extra"]) else checkpoints.extra_of(t.model.state_dict())
    )
    t.model.load_state_dict({**weights, **extra})
    t.ema.load_state_dict({k: v.to(t.device) for k, v in ema.items()}, train["ema_updates"])
    for name, state in train["optimizers"].items():
        t.optimizers[name].load_state_dict(state)
    if train["scaler"] and t.accelerator.scaler is not None:
        t.accelerator.scaler.load_state_dict(train["scaler"])
    if pending := train.get("pending"):  # older checkpoints have none
        t.pending = pending[t.rank if len(pending) == t.world else 0]
    t.start = t.saved = t.done = meta["step"]
    now = {
        "world": t.world,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": t.device.type,
    }
    if changed := [f"{k} {meta[k]} → {v}" for k, v in now.items() if meta[k] != v]:
        t.log.warn(f"not bit for bit the run that was broken off: {', '.join(changed)}")
    t.log.info(f"resumed at step {t.start}")


def init_from(t: Trainer, source: str) -> None:
    """Starts from the weights of an earlier stage, a run or a safetensors file.

    Raises MissingError, or UsageError where they do not fit.
    """
    file = Path(source).expanduser()
    if not file.is_file():
        stage = next((stage for stage in t.run.owner.stages if stage.path.name == source), None)
        found = stage or runs.find(source).serving
        file = found.path / "model.safetensors"
    if not file.exists():
        raise MissingError(f"`train.init`: no weights at `{file}`", hint="gz runs list")
    own = t.model.state_dict()
    weights, widened = checkpoints.widened(load_file(file), own)
    if widened:
        t.log.info(f"`train.init`: inputs that those weights do not know start at zero: {', '.join(widened)}")
    try:
        t.model.load_state_dict(weights | checkpoints.extra_of(own))
    except RuntimeError as e:
        raise UsageError(
            f"`train.init`: the weights of `{file}` do not fit this model",
            hint=str(e).splitlines()[-1].strip(),
        ) from e


def finish(t: Trainer) -> None:
    """The run's `model.safetensors`: the averaged weights of its last checkpoint."""
    if t.rank == 0:
        folder = t.run.path / "checkpoints"
        last = folder / f"{checkpoints.steps_of(folder)[-1]:08d}" / "ema.safetensors"
        part = t.run.path / ".model.part"
        shutil.copyfile(last, part)
        part.replace(t.run.path / "model.safetensors")


def write_train(run: Run, changes: dict[str, Any]) -> None:
    """Keys of `train` that the engine has found, into the recipe of the run and of that which it is a stage
    of."""
    from gzcli.recipe.resolve import dump

    tree = run.tree()
    files.write_atomic(run.path / "run.yaml", dump(tree | {"train": tree["train"] | changes}))
    if run.owner is not run:
        whole = run.owner.tree()
        stage = whole["stages"][run.path.name]
        stage["train"] = stage["train"] | changes
        files.write_atomic(run.owner.path / "run.yaml", dump(whole))
