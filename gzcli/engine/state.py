"""The state of a training: it is saved in checkpoints, restored by a resume, or begun from other weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gzcli.core import ranks
from gzcli.core.errors import DamagedError, MissingError, UsageError
from gzcli.engine import checkpoint as checkpoints
from gzcli.engine.checkpoint import Checkpoint, Saved, SpaceRecord
from gzcli.engine.ema import EMA
from gzcli.engine.history import History
from gzcli.engine.log import Log
from gzcli.engine.optim import restore
from gzcli.engine.trained import Trained
from gzcli.recipe.yaml import dump
from gzcli.store import arrays, files, runs
from gzcli.store.leftovers import beside
from gzcli.store.runs import Run


@dataclass
class State:
    """Everything of a training that is not a function of its recipe, its data and the step.

    trained: the model with its run, recipe and latent space.
    ema: its averaged weights.
    optimizers: the optimizer of each phase.
    scaler: scaler of the losses under fp16; None: it is not used.
    history: holds the losses that are not logged yet.
    built_on: sha256 of the weights of each stage that the model is built on.
    saved: step of the newest checkpoint; 0: there is none.
    """

    trained: Trained
    ema: EMA
    optimizers: Mapping[str, Optimizer]
    scaler: torch.amp.GradScaler | None
    history: History
    built_on: Mapping[str, str]
    saved: int = 0

    @property
    def folder(self) -> Path:
        """The folder of the checkpoints."""
        return self.trained.run.path / "checkpoints"

    @property
    def log(self) -> Log:
        """Where lines and events go."""
        return self.history.log

    @property
    def space(self) -> SpaceRecord | None:
        """The latent space that the model lives in; None: pixels."""
        return self.trained.space.record() if self.trained.space else None

    @property
    def machine(self) -> dict[str, Any]:
        """What must be the same at a resume, so that it goes on bit for bit."""
        return {
            "world": ranks.world(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "device": self.trained.device.type,
        }


def save(state: State, step: int) -> None:
    """Saves a checkpoint of `step` steps, unless there is one. A call of every rank; rank 0 writes.

    Raises DivergedError where a weight is not finite: what a run goes back to must be good.
    """
    if step == state.saved:
        return
    state.saved, trained = step, state.trained
    statistics = state.ema.statistics()
    values = ranks.gathered(state.ema.model.state_dict())
    averages = ranks.gathered(state.ema.state_dict())
    optimizers = ranks.gathered({name: o.state_dict() for name, o in state.optimizers.items()})
    own = ranks.everyone((checkpoints.extra_of(values), state.history.pending()))
    weights = checkpoints.weights_of(values) if ranks.rank() == 0 else {}
    named = [name for name, _ in state.ema.model.named_parameters() if name in weights]
    broken = [name for name in named if not torch.isfinite(weights[name]).all()]
    if broken := ranks.agree(broken):
        raise state.history.diverged(f"the weights `{broken[0]}` are not finite", step)
    if ranks.rank() == 0:
        averaged = weights | checkpoints.weights_of(averages | statistics)
        train = {
            "optimizers": optimizers,
            "scaler": state.scaler.state_dict() if state.scaler is not None else None,
            "ema_updates": state.ema.updates,
            "extra": [extra for extra, _ in own],
            "pending": [pending for _, pending in own],
        }
        saved = Saved(averaged, trained.part, trained.info, step, state.built_on, state.space)
        checkpoints.save(state.folder, step, Checkpoint(weights, saved, train, state.machine))
        checkpoints.prune(state.folder, trained.part.train.keep or checkpoints.KEPT)
        trained.run.update(step=step)
        state.log.event("checkpoint", step=step)
    ranks.wait()


def save_best(state: State, step: int, metric: str, value: float) -> None:
    """Saves a checkpoint of `step` steps as the best, where `value` is less than at all earlier ones.

    A call of every rank; the value of rank 0 counts.

    metric: name of the figure.
    value: the figure at this step.
    """
    path = state.folder / "best.json"
    best = state.trained.run.best
    if ranks.agree(best is None or value < best.value):
        save(state, step)
        if ranks.rank() == 0:
            files.write_json(path, {"step": step, "metric": metric, "value": value})
            checkpoints.prune(state.folder, state.trained.part.train.keep or checkpoints.KEPT)


def resume(state: State) -> int:
    """Restores the newest whole checkpoint and returns its step. Without one the training begins, from
    `train.init` if the recipe has it, and 0 is returned.

    Raises MissingError or UsageError of `init_from`.
    """
    run, part, model = state.trained.run, state.trained.part, state.ema.model
    path = checkpoints.newest(state.folder, state.log.warn)
    if path is None:
        state.history.resume(0, None)
        if part.train.init:
            init_from(model, part.train.init, run, state.log)
        return 0
    found = checkpoints.load(path)
    train, meta = found.train, found.meta
    # a rank that did not exist when the checkpoint was saved takes the extra state of rank 0
    extra = train["extra"]
    load(model, found.weights | extra[ranks.rank() if ranks.rank() < len(extra) else 0])
    averages = {name: value.to(state.trained.device) for name, value in found.averaged.weights.items()}
    state.ema.load_state_dict(averages, train["ema_updates"])
    for name, values in train["optimizers"].items():
        optimizer = state.optimizers[name]
        restore(optimizer, values | {"state": parts_of(values["state"], optimizer)})
    if train["scaler"] and state.scaler is not None:
        state.scaler.load_state_dict(train["scaler"])
    pending = train.get("pending") or [None]  # older checkpoints have none
    same_world = len(pending) == ranks.world()
    state.history.resume(meta["step"], pending[ranks.rank() if same_world else 0])
    state.saved = meta["step"]
    if changed := [f"{k} {meta[k]} → {v}" for k, v in state.machine.items() if meta[k] != v]:
        state.log.warn(f"not bit for bit the run that was broken off: {', '.join(changed)}")
    state.log.info(f"resumed at step {meta['step']}")
    return meta["step"]


def load(model: nn.Module, values: Mapping[str, Any]) -> None:
    """Gives a model its whole state, of which each rank takes its part. Raises RuntimeError if it does not
    fit."""
    own = model.state_dict()
    model.load_state_dict({name: ranks.part_like(value, own.get(name)) for name, value in values.items()})


def parts_of(values: Mapping[int, Mapping[str, Any]], optimizer: Optimizer) -> dict[int, dict[str, Any]]:
    """What an optimizer keeps of each parameter, by its number, shared out as the parameter is.

    values: the same, whole on every rank.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]

    def part(value: Any, p: Any) -> Any:
        return ranks.part_like(value, p) if isinstance(value, Tensor) and value.shape == p.shape else value

    return {i: {key: part(value, params[i]) for key, value in kept.items()} for i, kept in values.items()}


def init_from(model: nn.Module, source: str, run: Run, log: Log) -> None:
    """Gives a model the weights of an earlier stage of `run`, of another run, or of a safetensors file.

    source: name of the stage or of the run, or path of the file.

    Raises MissingError where there are no weights, UsageError where they do not fit.
    """
    file = Path(source).expanduser()
    if not file.is_file():
        stage = next((stage for stage in run.owner.stages if stage.path.name == source), None)
        found = stage or runs.find(source).serving
        file = found.path / "model.safetensors"
    if not file.exists():
        raise MissingError(f"`train.init`: no weights at `{file}`", hint="gz runs list")
    own = model.state_dict()
    try:
        values, _ = arrays.tensors(file)
    except DamagedError as e:
        hint = "the name of a run or a stage, or a `model.safetensors`"
        raise UsageError(f"`train.init`: {e.message}", hint=hint) from e
    weights, wider = checkpoints.with_zero_inputs(values, own)
    if wider:
        log.info(f"`train.init`: inputs that those weights do not know start at zero: {', '.join(wider)}")
    try:
        load(model, weights | checkpoints.extra_of(own))
    except RuntimeError as e:
        raise UsageError(
            f"`train.init`: the weights of `{file}` do not fit this model",
            hint=str(e).splitlines()[-1].strip(),
        ) from e


def finish(run: Run, keep: int | None) -> None:
    """Makes the averaged weights of the last checkpoint the run's `model.safetensors`, on rank 0: one file by
    two names where the disk can.

    keep: number of checkpoints that stay, as `train.keep`.
    """
    if ranks.rank() == 0:
        folder = run.path / "checkpoints"
        last = folder / f"{checkpoints.steps_of(folder)[-1]:08d}" / "ema.safetensors"
        place = run.path / "model.safetensors"
        if not (place.exists() and place.samefile(last)):  # a name cannot replace another of the same file
            part = beside(place)
            files.link_or_copy(last, part)
            files.fsync(part)
            part.replace(place)
        checkpoints.prune(folder, keep or checkpoints.KEPT_AT_THE_END, finished=True)


def write_train(run: Run, changes: Mapping[str, Any]) -> None:
    """Writes keys of `train` that the engine chose into `run.yaml`; of a stage into that of its run too."""
    tree = run.tree()
    files.write_atomic(run.path / "run.yaml", dump(tree | {"train": {**tree["train"], **changes}}))
    if run.owner is not run:
        whole = run.owner.tree()
        stage = whole["stages"][run.path.name]
        stage["train"] = {**stage["train"], **changes}
        files.write_atomic(run.owner.path / "run.yaml", dump(whole))
