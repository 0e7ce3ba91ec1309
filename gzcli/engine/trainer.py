"""THE training loop: for step, for phase, for micro-batch. There is no other."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gzcli.data.batches import TrainBatches
from gzcli.engine import checkpoint as checkpoints
from gzcli.engine import optim, state
from gzcli.engine.ema import EMA, training_images
from gzcli.engine.latent import open_space, packed
from gzcli.engine.log import Log
from gzcli.engine.prepare import prepare
from gzcli.engine.stop import Stop
from gzcli.engine.trained import build_model, built_on, stages_for
from gzcli.engine.watch import Watch
from gzcli.errors import DivergedError, Interrupted
from gzcli.models.base import Phase
from gzcli.recipe.parts import part_of
from gzcli.store.runs import Run
from gzcli.types import BatchNoise, mix

PATIENCE = 5  # steps in a row with a loss that is not finite, before the run is stopped


class Step(nn.Module):
    """What is wrapped for several processes: its forward is the model's loss, so that DDP and FSDP see every
    forward."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch, phase: str) -> dict[str, Tensor]:
        out = self.model.loss(batch, phase)
        return out if isinstance(out, dict) else {"loss": out}


class Trainer:
    """Trains the model of `tree` on `pack`, in the processes of `accelerator`, into `run`."""

    def __init__(self, run: Run, tree: dict[str, Any], pack, accelerator, log: Log):
        name = tree["model"]["name"]
        self.run, self.tree, self.pack, self.log = run, tree | {"built_on": built_on(run, name)}, pack, log
        self.accelerator, self.device = accelerator, accelerator.device
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.train: Mapping[str, Any] = tree["train"]
        self.steps: int = self.train["steps"]
        self.info = pack.info(levels=tree["data"]["levels"], steps=self.steps)
        self.data, self.augment = pack, tuple(tree["data"]["augment"] or ())
        self.space = None
        if latent := tree["data"].get("latent"):
            self.space = open_space(latent, self.device, pack=pack, levels=self.info.levels)
            self.tree["space"] = self.space.record()
            self.info = self.space.info(self.info)
            self.data, self.augment = packed(self, pack), ()
        self.model = (
            build_model(part_of(tree), self.info, stages_for(run, name, self.device)).to(self.device).train()
        )
        self.batches = TrainBatches(
            self.data,
            seed=tree["seed"],
            batch_size=self.train["batch_size"],
            levels=self.info.levels,
            device=self.device,
            augment=self.augment,
            rank=self.rank,
            world=self.world,
            n=tree["data"]["n"],
            prepared=prepare(self),
            needs=self.model.needs,
        )
        self.phases: list[Phase] = self.model.phases()
        self.params = {phase.name: phase.parameters() for phase in self.phases}
        self.trainable = list({id(p): p for params in self.params.values() for p in params}.values())
        self.confs = optim.settings(tree["optim"], self.phases)
        self.optimizers = {
            phase.name: optim.build(phase, self.confs[phase.name], self.model) for phase in self.phases
        }
        step_module: nn.Module = Step(self.model)
        if self.train["compile"]:
            step_module = torch.compile(step_module)
        self.wrapped = accelerator.prepare(step_module)
        self.ema = EMA(self.model, self.train["ema"], lambda: training_images(self))
        self.start = self.saved = self.done = 0
        self.pending: dict[str, Any] | None = None  # of a resumed run: what it has not logged yet

    # --- the loop
    # -----------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Trains from the newest checkpoint, or from the start, to `train.steps`; saves what it has when
        stopped.

        Raises DivergedError, or Interrupted after a checkpoint.
        """
        state.resume(self)
        watch = self.watch = Watch(self)
        if self.start >= self.steps:  # stopped between its last checkpoint and its final picture
            watch.turn(self.steps)
            return
        stop = Stop(self.run.owner.path, world=self.world, device=self.device)
        self.begin()
        watch.catch_up()
        self.log.event("start", run=self.run.id, path=str(self.run.path), step=self.start, steps=self.steps)
        with self.log.training(self.start, self.steps) as bar:
            for step in range(self.start, self.steps):
                losses = self.step(step)
                done = step + 1
                watch.add(losses)
                bar.advance(done)
                if done % self.train["log_every"] == 0 or done == self.steps:
                    self.check_finite(watch, done)
                    watch.show(done, bar)
                if signum := stop.asked(done):
                    state.save(self, done)
                    raise Interrupted(
                        f"stopped at step {done} of {self.steps}, checkpoint saved",
                        signum=signum,
                        hint=f"gz train {self.run.owner.id} --resume",
                    )
                watch.turn(done)

    def step(self, step: int) -> dict[str, Tensor]:
        """One fresh batch, shared by the phases that are due. Returns what is to be logged, detached."""
        self.seed_global(step)
        batch = self.batches.at(step)
        if hasattr(self.model, "on_batch"):
            whole = batch.rows(slice(None), self.noise(step, "batch", self.rank * len(batch)))
            batch.extra |= self.model.on_batch(whole)
        losses: dict[str, Tensor] = {}
        for phase in self.phases:
            if phase.due(step):
                self.only(phase)
                found = self.backward(batch, step, phase)
                found |= self.update(step, phase)
                prefix = "" if len(self.phases) == 1 else f"{phase.name}."
                losses |= {prefix + key: value for key, value in found.items()}
        self.ema.update()
        self.done = step + 1
        self.model.on_step(step)
        return losses

    def backward(self, batch, step: int, phase: Phase) -> dict[str, Tensor]:
        """The gradient of the phase's mean loss over the global batch, in `accumulate` parts."""
        parts = self.train["accumulate"]
        micro = len(batch) // parts
        first = self.rank * len(batch)
        losses: dict[str, Tensor] = {}
        for i in range(parts):
            noise = self.noise(step, phase.name, first + i * micro)
            part = batch.rows(slice(i * micro, (i + 1) * micro), noise)
            last = i + 1 == parts
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                out = self.wrapped(part, phase.name)
                self.accelerator.backward(out["loss"] if parts == 1 else out["loss"] / parts)
            for name, value in out.items():
                value = value.detach() if parts == 1 else value.detach() / parts
                losses[name] = losses[name] + value if name in losses else value
        return losses

    def noise(self, step: int, key: str, start: int) -> BatchNoise:
        """The global batch's draws for `step` and `key`, from its row `start` on."""
        total = self.train["batch_size"]
        return BatchNoise(self.tree["seed"], step, key, total=total, start=start, device=self.device)

    def update(self, step: int, phase: Phase) -> dict[str, Tensor]:
        """One optimizer step; afterwards no gradient is left anywhere."""
        optimizer, scaler = self.optimizers[phase.name], self.accelerator.scaler
        optim.set_lr(optimizer, self.confs[phase.name], step, self.steps)
        if scaler is not None:
            scaler.unscale_(optimizer)
        norm = optim.clip(self.params[phase.name], self.train["clip"])
        if scaler is not None:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        for p in self.trainable:
            p.grad = None
        return {} if norm is None else {"grad_norm": norm}

    def only(self, phase: Phase) -> None:
        """Exactly the phase's parameters require grad."""
        if len(self.phases) > 1:
            for p in self.trainable:
                p.requires_grad_(False)
            for p in self.params[phase.name]:
                p.requires_grad_(True)

    def seed_global(self, step: int) -> None:
        """For what cannot use the batch's noise (dropout): a function of (seed, rank, step), so that a resume
        repeats it."""
        seed = mix(self.tree["seed"], self.rank, step)
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index or 0].manual_seed(seed)
        elif self.device.type == "mps":
            torch.mps.manual_seed(seed)

    def begin(self) -> None:
        """Data-dependent initialisation, with the first batch; after a resume the annealing is brought to its
        step."""
        self.seed_global(self.start)
        with torch.no_grad():
            self.model.on_start(self.batches.at(self.start))
        for text in self.model.warnings:
            self.log.warn(text)
        if self.start:
            self.model.on_step(self.start - 1)
        elif self.ema.decay:
            self.ema.restart()  # the average starts from the initialised model

    def check_finite(self, watch: Watch, step: int) -> None:
        if watch.bad() < (1 if step == self.steps else PATIENCE):
            return
        have = checkpoints.steps_of(self.run.path / "checkpoints")
        good = f"the last good checkpoint is of step {have[-1]}" if have else "there is no checkpoint yet"
        raise DivergedError(
            f"the loss is not finite at step {step}; {good}",
            hint="lower `optim.lr`, raise `optim.warmup`, set `train.clip`, or `train.precision=fp32`",
        )

    # --- --minutes
    # ----------------------------------------------------------------------------------------------

    def count_steps(self, minutes: float, began: float) -> int:
        """How many steps fit in `minutes` from `began` (time.time()): 50 steps are timed after 5, 10 % of the
        time at most.

        Phases that start later are timed at a step when they have, as many times.
        """
        self.begin()
        late = max(phase.start for phase in self.phases)
        each = [self._seconds(first, 6 * minutes / (1 + bool(late))) for first in sorted({0, late})]
        reserve = 0.1 * 60 * minutes  # grids, validation, checkpoints
        left = 60 * minutes - (time.time() - began) - reserve
        early = min(late, int(left / each[0]))
        return max(1, early + int((left - early * each[0]) / each[-1]))

    def _seconds(self, first: int, limit: float) -> float:
        """Of a step from step `first` on; what they train is lost."""
        until, times = time.monotonic() + limit, []
        for step in range(first, first + 55):
            since = time.monotonic()
            self.step(step)
            times.append(time.monotonic() - since)
            if time.monotonic() > until and len(times) > 5:
                break
        cycle = math.lcm(*(phase.every for phase in self.phases))
        timed = times[5:] if len(times) > 5 + cycle else times
        return sum(timed) / len(timed)
