"""What a training step of a recipe costs, before it is trained: parameters, floating-point operations, and
the time and memory of a real step on this machine.

Models are built without values (`shapes.py`): no weights are read, and a net of a billion parameters takes no
memory. Nothing is read of the data set: the images of a step that is tried are noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gzcli.core import devices
from gzcli.core.errors import GzError, UsageError, first_line
from gzcli.core.jobs import TrialJob
from gzcli.core.parts import Part, part_of
from gzcli.core.types import Batch, BatchNoise, DataInfo
from gzcli.data.packs.open import open_pack, pack_options
from gzcli.engine import optim
from gzcli.engine.accelerator import precision, prepare_torch
from gzcli.engine.ema import EMA
from gzcli.engine.log import Log
from gzcli.engine.prepared import on_latents, with_prepared
from gzcli.engine.shapes import Flops, RecordedNoise, shapes_only
from gzcli.engine.trained import build_model
from gzcli.models import catalog
from gzcli.models.base import Model, Phase, named_losses
from gzcli.store.runs import Run

CPU = torch.device("cpu")
PREPARING = ("pair_steps",)  # options of `prepare` that a step does not depend on, so that it is short here
# Operations of a step that is tried, at most, by device: about a second of a core, and of a small GPU.
FEW = 4  # images of a step whose operations are not known
ENOUGH = 1.0  # seconds after which no further step is timed
TIMED, MOST = 2, 12  # steps that are timed: at least, and where they are short
LARGE = 100_000_000  # parameters of a net that is not tried on a CPU, where that takes long


class PartOnData(NamedTuple):
    """A part of a recipe, and the description of what its model sees: of latents where it is trained on
    these."""

    part: Part
    info: DataInfo


Stages = Mapping[str, PartOnData]  # earlier stages by their names


def run(job: TrialJob, folder: Path, device: torch.device, log: Log) -> dict[str, Any]:
    """{"parts": […]}: for each part `params`, `flops` of a step, and where a step is tried its `seconds` and
    `bytes`, or the `error` that keeps them from being known; where that is a mistake in the recipe, its hint
    is in `refused`."""
    return {"parts": [result_of(row, job.info, device) for row in job.parts]}


def result_of(row: Mapping[str, Any], tree: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """What is found of one part."""
    result: dict[str, Any] = {"params": None, "flops": None, "seconds": None, "bytes": None, "error": None}
    result["timed"] = row["timed"]
    try:
        stages = {name: on_data(part_of(stage, name), tree) for name, stage in row["stages"].items()}
        part, info = on_data(part_of(row["tree"], row["stage"]), tree)
        result["params"] = params_of(part, info, stages)
        result["flops"] = flops_of(part, info, stages)
        if row["timed"] and not (device.type == "cpu" and result["params"] > LARGE):
            result |= tried(part, info, stages, result["flops"], device)
    except GzError as e:
        result["error"] = e.message
        if isinstance(e, UsageError):
            result["refused"] = e.hint or ""
    except Exception as e:  # a model of others may do anything, and a net may not fit the memory
        result["error"] = f"{type(e).__name__}: {first_line(e)}"
    return result


def on_data(part: Part, tree: Mapping[str, Any]) -> PartOnData:
    """A part, and what its model sees of the data set that `TrialJob.info` describes."""
    shape, levels = tuple(tree["shape"]), part.data.levels or tree["levels"]
    info = DataInfo(shape, levels, tuple(tree["classes"]), tree["multilabel"], tree["n"], part.train.steps)
    return PartOnData(part, on_latents(part, info))


def build(part: Part, info: DataInfo, stages: Stages) -> Model:
    """The model, in training mode, on earlier stages as they begin."""
    names = catalog.card(part.model).stages
    earlier = {name: build(*stages[name], stages).eval().requires_grad_(False) for name in names}
    few = {key: 1 for key in PREPARING if key in part.options}
    return build_model(replace(part, options={**part.options, **few}), info, earlier).train()


def check_stages(run: Run) -> None:
    """Builds the models of all stages of a run, so that a wrong option is told before an earlier stage is
    trained. Nothing is said of a stage that cannot be built for another reason, nor of those after it."""
    stages: dict[str, PartOnData] = {}
    for stage in run.stages:
        part = part_of(stage.tree())
        try:
            pack = open_pack(part.data.name, **pack_options(part.data))
            info = on_latents(part, pack.info(levels=part.data.levels, steps=part.train.steps))
            with shapes_only():
                build(part, info, stages)
        except UsageError:
            raise
        except Exception:  # a model of others may do anything with a net that has no values
            return
        stages[stage.path.name] = PartOnData(part, info)


def params_of(part: Part, info: DataInfo, stages: Stages) -> int:
    """The number of parameters of a model, which is built on the meta device. Raises what the model raises
    for options that do not fit."""
    with torch.device("meta"):
        return sum(p.numel() for p in build(part, info, stages).parameters())


# ---------------------------------------------------------------------------- operations


def flops_of(part: Part, info: DataInfo, stages: Stages | None = None) -> float | None:
    """The floating-point operations of a step of the global batch; None where the model needs values."""
    try:
        with shapes_only():
            model = build(part, info, stages or {})
            with torch.no_grad():
                batch = with_prepared(model, batch_of(part, info, micro_batch(part), CPU))
            return operations(model, batch, part)
    except Exception:  # what a model, or a library of its own, does with tensors without values
        return None


def operations(model: Model, batch: Batch, part: Part) -> float:
    """The floating-point operations of a step of the global batch, of model and batch without values: forward
    and backward of a micro-batch as often as there are, and of Muon. A phase counts by the share of the steps
    at which it runs."""
    total, pieces = 0.0, processes_of(part) * part.train.accumulate
    phases = model.phases()
    settings = optim.settings(part.optim, phases)
    if hasattr(model, "on_batch"):
        with torch.no_grad():
            batch.extra |= model.on_batch(batch)
    for phase, share in alone(phases, part):
        noise = RecordedNoise(len(batch) * pieces, torch.zeros((), dtype=torch.int64, device=batch.x.device))
        with Flops() as step:
            named_losses(model, batch.rows(slice(None), noise), phase.name)["loss"].backward()
        with Flops() as update:
            if settings[phase.name].name == "muon":
                optim.build(phase, settings[phase.name], model).step()
        total += share * (step.total * pieces + update.total)
    return total


def alone(phases: list[Phase], part: Part) -> Iterator[tuple[Phase, float]]:
    """Each phase while its parameters alone require grad, with the share of the run's steps at which it runs;
    then the gradients are dropped."""
    params = {id(p): p for phase in phases for p in phase.parameters()}.values()
    steps = part.train.steps
    for phase in phases:
        own = {id(p) for p in phase.parameters()}
        for p in params:
            p.requires_grad_(id(p) in own)
        yield phase, max(0, steps - phase.start) / steps / phase.every
        for p in params:
            p.grad = None


def processes_of(part: Part) -> int:
    """The processes that share a batch."""
    gpus = part.launch.gpus if isinstance(part.launch.gpus, int) else None
    return max(1, part.launch.processes or gpus or 1)


def micro_batch(part: Part) -> int:
    """Images that a process computes at once."""
    return max(1, part.train.batch_size // (processes_of(part) * part.train.accumulate))


def batch_of(part: Part, info: DataInfo, images: int, device: torch.device) -> Batch:
    """A batch of noise, with what the model needs beside the images."""
    x = torch.rand(images, *info.shape, device=device) * 2 - 1
    many = (images, len(info.classes)) if info.multilabel else (images,)
    y = torch.zeros(many, dtype=torch.int64, device=device) if info.classes else None
    needs = catalog.card(part.model).needs
    extra = {key: ["a picture"] * images if key == "caption" else x.clone() for key in needs}
    index = torch.arange(images, device=device)
    return Batch(x, y, index, BatchNoise(part.seed, 0, "batch", total=images, device=device), extra)


# ---------------------------------------------------------------------------- a real step


def tried(
    part: Part, info: DataInfo, stages: Stages, flops: float | None, device: torch.device
) -> dict[str, Any]:
    """`seconds` and `bytes` of a step of the global batch, as a step of few images shows them: what depends
    on the images is scaled. A step that runs out of a GPU's memory is tried with half the images."""
    prepare_torch(part)
    share, pieces = micro_batch(part), processes_of(part) * part.train.accumulate
    images = min(share, math.ceil(devices.kind_of(device).flops * share * pieces / flops) if flops else FEW)
    while True:
        try:
            trial = Trial(build(part, info, stages).to(device), part, max(1, images), device)
            return trial.result(share, part.train.accumulate)
        except torch.OutOfMemoryError:
            if images <= 1:
                raise
            images //= 2


class Trial:
    """Steps of a model, as the trainer takes them."""

    def __init__(self, model: Model, part: Part, images: int, device: torch.device):
        self.model, self.part, self.images, self.device = model, part, images, device
        self.phases = model.phases()
        settings = optim.settings(part.optim, self.phases)
        self.optimizers = {p.name: optim.build(p, settings[p.name], model) for p in self.phases}
        self.ema = EMA(model, part.train.ema)
        self.half = devices.half(precision(part))
        # of one thread on a CPU its work is timed, so that other programs on the machine do not count
        self.kind = "cpu" if torch.get_num_threads() == 1 else "wall"
        with torch.no_grad():
            self.batch = with_prepared(model, batch_of(part, model.data, images, device))
            model.on_start(self.batch)

    def result(self, share: int, pieces: int) -> dict[str, Any]:
        """`seconds` and `bytes` of a step in so many pieces of `share` images; the fastest of some steps
        counts: what else delays one is not the model's."""
        before = devices.memory_now(self.device)
        self.step()
        state = sum(
            t.nbytes
            for optimizer in self.optimizers.values()
            for p, values in optimizer.state.items()
            for t in (p, *values.values())  # the gradient is as large as p
            if isinstance(t, torch.Tensor)
        )
        peak = devices.peak_memory(self.device)
        steps: list[tuple[float, float]] = []
        since = devices.clock(self.device)
        while len(steps) < TIMED or (len(steps) < MOST and devices.clock(self.device) - since < ENOUGH):
            steps.append(self.step())
        times = share / self.images
        loss, update = (min(values) for values in zip(*steps, strict=True))
        size = None if peak is None else round(before + state + max(0, peak - before - state) * times)
        return {"seconds": loss * times * pieces + update, "bytes": size}

    def step(self) -> tuple[float, float]:
        """Every phase once. Returns the seconds of losses with their gradients, and of updates, each phase by
        the share of the steps at which it runs."""
        loss = update = 0.0
        for phase, share in alone(self.phases, self.part):
            loss += share * self.timed(partial(self.backward, phase))
            update += share * self.timed(partial(self.update, phase))
        return loss, update + self.timed(self.ema.update)

    def backward(self, phase: Phase) -> None:
        noise = BatchNoise(self.part.seed, 0, phase.name, total=self.images, device=self.device)
        batch = self.batch.rows(slice(None), noise)
        if hasattr(self.model, "on_batch"):
            batch.extra |= self.model.on_batch(batch)
        with torch.autocast(self.device.type, self.half, enabled=self.half is not None):
            losses = named_losses(self.model, batch, phase.name)
        losses["loss"].backward()

    def update(self, phase: Phase) -> None:
        optim.clip(phase.parameters(), self.part.train.clip)
        self.optimizers[phase.name].step()

    def timed(self, do: Callable[[], None]) -> float:
        """The seconds of a call."""
        since = devices.clock(self.device, self.kind)
        do()
        return devices.clock(self.device, self.kind) - since
