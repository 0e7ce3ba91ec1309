"""The state of a training: it is saved in checkpoints, restored by a resume, or begun from other weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gzcli.core import ranks
from gzcli.core.errors import DamagedError, MissingError, UsageError
from gzcli.engine import checkpoint as checkpoints
from gzcli.engine.checkpoint import Checkpoint, Saved
from gzcli.engine.log import Log
from gzcli.engine.optim import restore
from gzcli.store import files, runs
from gzcli.store.runs import Run

if TYPE_CHECKING:
    from gzcli.engine.trainer import Trainer


def machine(device: torch.device) -> dict[str, Any]:
    """What must be the same at a resume, so that it goes on bit for bit."""
    threads, version = torch.get_num_threads(), torch.__version__
    return {"world": ranks.world(), "threads": threads, "torch": version, "device": device.type}


def save(t: Trainer, step: int) -> None:
    """Saves a checkpoint of `step` steps, unless there is one. A call of every rank; rank 0 writes."""
    if step == t.saved:
        return
    t.saved, folder, scaler = step, t.run.checkpoints_folder, t.accelerator.scaler
    statistics = t.ema.statistics()
    values = ranks.gathered(t.model.state_dict())
    averages = ranks.gathered(t.ema.state_dict())
    optimizers = ranks.gathered({name: o.state_dict() for name, o in t.optimizers.items()})
    of_ranks = ranks.everyone((checkpoints.extra_of(values), t.history.pending()))
    weights = checkpoints.weights_of(values) if ranks.rank() == 0 else {}
    named = [name for name, _ in t.model.named_parameters() if name in weights]
    broken = [name for name in named if not torch.isfinite(weights[name]).all()]
    if broken := ranks.agree(broken):
        raise t.history.diverged(f"the weights `{broken[0]}` are not finite", step)
    if ranks.rank() == 0:
        train = {
            "optimizers": optimizers,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "ema_updates": t.ema.updates,
            "extra": [extra for extra, _ in of_ranks],
            "pending": [pending for _, pending in of_ranks],
        }
        averaged = weights | checkpoints.weights_of(averages | statistics)
        space = t.space.record() if t.space else None
        saved = Saved(averaged, t.part, t.info, step, t.built_on, space)
        checkpoints.save(folder, step, Checkpoint(weights, saved, train, machine(t.device)))
        checkpoints.prune(folder, t.train.keep or checkpoints.KEPT)
        t.run.update(step=step)
        t.log.event("checkpoint", step=step)
    ranks.wait()


def save_best(t: Trainer, step: int, metric: str, value: float) -> None:
    """Saves a checkpoint of `step` steps as the best, where `value` is less than at all earlier ones.

    A call of every rank; the value of rank 0 counts.
    """
    best = t.run.best
    if ranks.agree(best is None or value < best.value):
        save(t, step)
        if ranks.rank() == 0:
            files.write_json(t.run.best_file, {"step": step, "metric": metric, "value": value})
            checkpoints.prune(t.run.checkpoints_folder, t.train.keep or checkpoints.KEPT)


def resume(t: Trainer) -> int:
    """Restores the newest whole checkpoint and returns its step. Without one the training begins, from
    `train.init` if the recipe has it, and 0 is returned."""
    path = checkpoints.newest(t.run.checkpoints_folder, t.log.warn)
    if path is None:
        t.history.resume(0, None)
        if t.train.init:
            init_from(t.model, t.train.init, t.run, t.log)
        return 0
    saved = checkpoints.load(path)
    train, meta, rank = saved.train, saved.meta, ranks.rank()
    # a rank that did not exist when the checkpoint was saved takes the extra state of rank 0
    load(t.model, saved.weights | train["extra"][rank if rank < len(train["extra"]) else 0])
    averages = {name: value.to(t.device) for name, value in saved.averaged.weights.items()}
    t.ema.load_state_dict(averages, train["ema_updates"])
    for name, values in train["optimizers"].items():
        optimizer = t.optimizers[name]
        restore(optimizer, values | {"state": parts_of(values["state"], optimizer)})
    if train["scaler"] and t.accelerator.scaler is not None:
        t.accelerator.scaler.load_state_dict(train["scaler"])
    pending = train.get("pending") or [None]  # older checkpoints have none
    t.history.resume(meta["step"], pending[rank if len(pending) == ranks.world() else 0])
    t.saved = meta["step"]
    if changed := [f"{k} {meta[k]} → {v}" for k, v in machine(t.device).items() if meta[k] != v]:
        t.log.warn(f"not bit for bit the run that was broken off: {', '.join(changed)}")
    t.log.info(f"resumed at step {meta['step']}")
    return meta["step"]


def load(model: nn.Module, values: Mapping[str, Any]) -> None:
    """Gives a model its whole state, of which each rank takes its part. Raises RuntimeError if it does not
    fit."""
    present = model.state_dict()
    model.load_state_dict({name: ranks.part_like(v, present.get(name)) for name, v in values.items()})


def parts_of(values: Mapping[int, Mapping[str, Any]], optimizer: Optimizer) -> dict[int, dict[str, Any]]:
    """What an optimizer keeps of each parameter, by its number, shared out as the parameter is."""
    params = [p for group in optimizer.param_groups for p in group["params"]]

    def part(value: Any, p: Any) -> Any:
        return ranks.part_like(value, p) if isinstance(value, Tensor) and value.shape == p.shape else value

    return {i: {key: part(value, params[i]) for key, value in state.items()} for i, state in values.items()}


def init_from(model: nn.Module, source: str, run: Run, log: Log) -> None:
    """Gives a model the weights of an earlier stage of `run`, of another run, or of a safetensors file."""
    file = Path(source).expanduser()
    if not file.is_file():
        stage = next((stage for stage in run.owner.stages if stage.path.name == source), None)
        file = (stage or runs.find(source).serving).model_file
    if not file.exists():
        raise MissingError(f"`train.init`: no weights at `{file}`", hint="gz runs list")
    present = model.state_dict()
    try:
        values, _ = files.read_tensors(file)
    except DamagedError as e:
        hint = "the name of a run or a stage, or a `model.safetensors`"
        raise UsageError(f"`train.init`: {e.message}", hint=hint) from e
    weights, wider = checkpoints.with_zero_inputs(values, present)
    if wider:
        log.info(f"`train.init`: inputs that those weights do not know start at zero: {', '.join(wider)}")
    try:
        load(model, weights | checkpoints.extra_of(present))
    except RuntimeError as e:
        message = f"`train.init`: the weights of `{file}` do not fit this model"
        raise UsageError(message, hint=str(e).splitlines()[-1].strip()) from e


def finish(run: Run, keep: int | None) -> None:
    """Makes the averaged weights of the last checkpoint the run's `model.safetensors`, on rank 0: one file by
    two names where the disk can."""
    if ranks.rank() == 0:
        last, place = run.checkpoint(run.saved_steps[-1]).averaged, run.model_file
        if not (place.exists() and place.samefile(last)):  # a name cannot replace another of the same file
            part = files.part_path(place)
            files.link_or_copy(last, part)
            files.fsync(part)
            part.replace(place)
        checkpoints.prune(run.checkpoints_folder, keep or checkpoints.KEPT_AT_THE_END, finished=True)
