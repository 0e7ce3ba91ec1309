"""What the parts of a recipe cost, and how long a step of each takes on this machine, before it is trained.

Nothing is read of the data set: the images of a trial are noise.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gzcli.core import devices
from gzcli.core.errors import GzError, MissingError, UsageError, first_line
from gzcli.core.jobs import TrialJob
from gzcli.core.parts import Part, part_of
from gzcli.core.types import DataInfo
from gzcli.engine import optim
from gzcli.engine.accelerator import precision, prepare_torch
from gzcli.engine.cost import Seen, Stages, batch_of, build, cost_of, noise
from gzcli.engine.ema import EMA
from gzcli.engine.latent_shape import on_latents
from gzcli.engine.log import Log
from gzcli.engine.prepared import with_prepared
from gzcli.launch.costs import Cost
from gzcli.models import catalog
from gzcli.models.base import Model, Phase, named_losses

# Operations of a step of a trial, at most, by device: about a second of a core, and of a small GPU.
ENOUGH = 1.0  # seconds after which no further step is timed
TIMED, MOST = 2, 12  # steps that are timed: at least, and where they are short
LARGE = 100_000_000  # parameters of a net that is not built on a CPU, where that alone takes long
WIDTH, SIDE, BATCH = 128, 32, 8  # channels, pixels a side and images of the block that stands in for it
REPEATS = 3  # groups of steps of the block; the fastest counts: other programs can only slow a group down


def run(job: TrialJob, folder: Path, device: torch.device, log: Log) -> dict[str, Any]:
    """{"parts": […]} with, for each part that is asked for, its `stage`, and its `cost` and `seconds` of a
    step, or the `error` that keeps them from being found; where that is a mistake in the recipe, its hint is
    in `refused`."""
    seen: dict[str, Seen] = {}
    rows = []
    for row in job.parts:
        part = part_of(row["tree"], row["stage"])
        found: dict[str, Any] = {"stage": part.stage, "cost": None, "seconds": None, "error": None}
        try:
            absent = [name for name in catalog.card(part.model).stages if name not in seen]
            if absent:
                raise MissingError(f"stage `{absent[0]}` is not known")
            info = on_latents(part, data_info(job.info, part))
            seen[part.stage] = Seen(part, info)
            if row["asked"]:
                cost = cost_of(part, info, seen)
                found["cost"] = asdict(cost)
                if row["timed"]:
                    found["seconds"] = seconds_of(part, info, seen, cost, device)
        except GzError as e:
            found["error"] = e.message
            if isinstance(e, UsageError):
                found["refused"] = e.hint or ""
        except Exception as e:  # a model of others may do anything, and a net may not fit the memory
            found["error"] = f"{type(e).__name__}: {first_line(e)}"
        if row["asked"]:
            rows.append(found)
    return {"parts": rows}


def data_info(tree: Mapping[str, Any], part: Part) -> DataInfo:
    """The description of the data set for a part."""
    levels = part.data.levels or tree["levels"]
    return DataInfo(
        tuple(tree["shape"]), levels, tuple(tree["classes"]), tree["multilabel"], tree["n"], part.train.steps
    )


def seconds_of(part: Part, info: DataInfo, stages: Stages, cost: Cost, device: torch.device) -> float:
    """The seconds of a step of the global batch.

    One step warms up, two or more are timed. They have fewer images where a step would be long; what then
    depends on the images is scaled. A large net is not built on a CPU: its time is that of its operations at
    the rate of a wide residual block.
    """
    prepare_torch(part)
    if not devices.kind_of(device).queued and cost.params > LARGE:
        return cost.flops / cost.processes / block_rate(ENOUGH)
    each = cost.flops / (cost.images * cost.pieces * cost.processes)
    images = max(1, min(cost.images, math.ceil(devices.kind_of(device).flops / max(each, 1.0))))
    model = build(part, info, stages)[0].to(device)
    trial = Trial(model, part, images, device)
    trial.step()
    trial.times.clear()
    since = devices.clock(device)
    for count in range(1, MOST + 1):
        trial.step()
        if count >= TIMED and devices.clock(device) - since > ENOUGH:
            break
    scale = cost.images * cost.pieces / images
    return sum(trial.least(key) * (scale if key[0] == "loss" else 1) * share for key, share in trial.shares())


class Trial:
    """Steps of a model, part by part timed: `times` by ("loss" or "update", name of the phase).

    model: the model on its device.
    part: its recipe.
    images: images of a batch.
    device: the device.
    """

    def __init__(self, model: Model, part: Part, images: int, device: torch.device):
        self.model, self.part, self.images, self.device = model, part, images, device
        self.phases: list[Phase] = model.phases()
        self.params = {id(p): p for phase in self.phases for p in phase.parameters()}
        settings = optim.settings(part.optim, self.phases)
        self.optimizers = {p.name: optim.build(p, settings[p.name], model) for p in self.phases}
        self.ema = EMA(model, part.train.ema)
        self.times: dict[tuple[str, str], list[float]] = {}
        self.half = devices.half(precision(part))
        with torch.no_grad():
            batch = batch_of(part, model.data, images, device)
            batch.x.uniform_(-1, 1)
            self.batch = with_prepared(model, batch)
            model.on_start(self.batch)

    def step(self) -> None:
        """Every phase once, as the trainer runs it."""
        for phase in self.phases:
            for p in self.params.values():
                p.requires_grad_(False)
            for p in phase.parameters():
                p.requires_grad_(True)
            with self.timed("loss", phase.name):
                batch = self.batch.rows(slice(None), noise(self.part, phase.name, self.images, self.device))
                if hasattr(self.model, "on_batch"):
                    batch.extra |= self.model.on_batch(batch)
                with torch.autocast(self.device.type, self.half, enabled=self.half is not None):
                    losses = named_losses(self.model, batch, phase.name)
                losses["loss"].backward()
                del losses
            with self.timed("update", phase.name):
                optim.clip(phase.parameters(), self.part.train.clip)
                self.optimizers[phase.name].step()
            for p in self.params.values():
                p.grad = None
        with self.timed("update", ""):
            self.ema.update()

    @contextlib.contextmanager
    def timed(self, *key: str) -> Iterator[None]:
        """Notes how long the block takes."""
        since = self.clock()
        yield
        self.times.setdefault((key[0], key[1]), []).append(self.clock() - since)

    def clock(self) -> float:
        """Seconds. Of one thread on a CPU they are those of the processor, so that other programs on the
        machine do not count."""
        if not devices.kind_of(self.device).queued and torch.get_num_threads() == 1:
            return time.process_time()
        return devices.clock(self.device)

    def least(self, key: tuple[str, str]) -> float:
        """Seconds of the fastest of the steps: what else delays one is not the model's."""
        return min(self.times[key])

    def shares(self) -> Iterator[tuple[tuple[str, str], float]]:
        """What was timed, with the share of the run's steps at which it runs."""
        steps = self.part.train.steps
        share = {p.name: max(0, steps - p.start) / steps / p.every for p in self.phases}
        for key in self.times:
            yield key, share.get(key[1], 1.0)


def block_rate(seconds: float) -> float:
    """The operations per second of a residual block, forward and backward, on this CPU.

    seconds: time of the measurement.
    """
    block = Block(WIDTH)
    x = torch.randn(BATCH, WIDTH, SIDE, SIDE)
    return block.operations(BATCH) / fastest(lambda: block.step(x), seconds)


def fastest(call: Callable[[], object], seconds: float) -> float:
    """Seconds of a call, of the fastest of some groups of calls that take about `seconds` together."""
    call()
    began = time.perf_counter()
    call()
    once = max(time.perf_counter() - began, 1e-7)
    n = max(1, int(seconds / REPEATS / once))
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        for _ in range(n):
            call()
        times.append((time.perf_counter() - began) / n)
    return min(times)


class Block(nn.Module):
    """A residual block of a U-Net, in the precision that training has on the CPU.

    width: number of channels.
    """

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        layers = [
            (nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)) for _ in range(2)
        ]
        self.layers = nn.Sequential(*(module for group in layers for module in group))

    def step(self, x: Tensor) -> None:
        """Forward and backward."""
        with torch.autocast("cpu", torch.bfloat16, enabled=devices.fast_bf16()):
            loss = (x + self.layers(x)).float().mean()
        loss.backward()

    def operations(self, batch: int) -> int:
        """Of both convolutions in a step on images of 32×32; backward has twice those of forward."""
        return 3 * 2 * 2 * 9 * self.width**2 * SIDE**2 * batch
