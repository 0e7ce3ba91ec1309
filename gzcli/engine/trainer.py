"""The only training loop: for step, for phase, for micro-batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Set
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gzcli.core import devices, ranks, streams
from gzcli.core.errors import Interrupted, UsageError
from gzcli.core.hints import gz
from gzcli.core.sections import Part
from gzcli.core.types import Batch, BatchNoise, mix
from gzcli.core.units import duration
from gzcli.data.packs.batches import TrainBatches
from gzcli.data.packs.pack import Pack, values_of
from gzcli.data.sets.labels import in_turns
from gzcli.engine import checkpoint, guidance, sampler, sheets
from gzcli.engine.averages import Snapshots
from gzcli.engine.cadence import PAUSE_KINDS, PAUSE_SHARE, Cadence, Pauses, Stop, listening
from gzcli.engine.ema import CALIBRATION_IMAGES, EMA, LENGTHS, QUICK_CALIBRATION_IMAGES, random_images
from gzcli.engine.forecast import sample_seconds, speed_of
from gzcli.engine.history import History, Trackers
from gzcli.engine.log import Log, TrainBar
from gzcli.engine.pictures import loss_curve
from gzcli.engine.prepared import PREPARATION_SHARE, count_in_time, prepare, train_images
from gzcli.engine.step import is_shared_out, precision, twin, wrap_step
from gzcli.engine.trained import Trained, build_model, built_on, init_from, stages_for, to_device
from gzcli.engine.updates import Updates
from gzcli.engine.validate import (
    EVAL_BATCH,
    best_metric,
    chosen_by,
    judge_of,
    mean_count,
    validate,
    validation_seconds,
)
from gzcli.metrics import collapse
from gzcli.metrics.classifier import NetFeatures
from gzcli.metrics.pretrained import Features
from gzcli.models.catalog import OUTSIDE, card_of
from gzcli.models.nn import spread_labels
from gzcli.recipe.recipe import write_chosen
from gzcli.store import files
from gzcli.store.png import save_png
from gzcli.store.run_folder import Best
from gzcli.store.runs import Run

if TYPE_CHECKING:
    from accelerate import Accelerator

GRID_SAMPLES, LAST_GRID = 36, 64  # samples per grid during training, and at its end
CHECK_STEPS = (
    50  # steps between two checks whether the loss is finite, if a check waits for other ranks or a GPU
)


class Trainer(Updates):
    """Trains a model. `judge`: the network of `fd` and the metric that an earlier trainer of the run got."""

    def __init__(
        self,
        run: Run,
        part: Part,
        pack: Pack,
        accelerator: Accelerator,
        log: Log,
        judge: tuple[NetFeatures | Features | None, str | None] | None = None,
    ):
        self.run, self.part, self.pack, self.log = run, part, pack, log
        self.accelerator, self.device = accelerator, accelerator.device
        self.rank, self.world = ranks.rank(), ranks.world()
        self.train, self.steps = part.train, part.train.steps
        self.images, self.info, self.space = train_images(part, pack, self.device, run, log)
        self.values = values_of(pack, part.data.levels)
        card = card_of(run, part.model)
        model = build_model(part, self.info, stages_for(run, card, self.device), card)
        self.model = to_device(model, self.device).train()
        self.batches = self.batches_of(part.data.n)
        if self.train.minutes:
            part = self.part = self.shortened(self.train.minutes)
        self.batches.prepared = prepare(self.model, self.images, self.batches.positions(), run, log)
        unsharded = twin(self.model) if is_shared_out(part) else None
        # a third-party model may leave out parameters at later steps that its first batch does not reveal
        first = self.batches.at(0) if card.family != OUTSIDE and self.world > 1 else None
        wrapped = wrap_step(accelerator, self.model, part, log, first=first)
        super().__init__(self.model, part, accelerator, wrapped)
        lengths = LENGTHS if self.train.ema_snapshots else ()
        self.ema = EMA(self.model, self.train.ema, self.some_images, unsharded, lengths)
        self.snapshots = Snapshots(run, self.ema, self.train)
        self.history = History(run, log, self.device)
        self.trained = Trained(
            run, unsharded or self.model, self.info, part, self.device, 0, self.space, self.values
        )
        self.built_on = built_on(run, card)  # sha256 of the weights of each stage below this one
        chosen = chosen_by(run, self.train).removesuffix("_lite")
        self.metric = ranks.agree(best_metric(self.model, chosen, pack, self.train.minutes))
        if self.train.patience and not self.metric:
            if self.train.best == "none":
                hint = "omit `train.patience`, or set `train.best`"
                message = "`train.patience` needs validation, but `train.best` is `none`"
                raise UsageError(message, hint=hint)
            log.warn("`train.patience` has no effect: there are no validation images")
        # rank 0's network, whose features the metric `fd` compares
        self.net: NetFeatures | Features | None = None
        self.has_judge = self.metric != "fd"
        if judge and not self.has_judge:
            self.net, self.metric = judge
            self.has_judge = True
        self.start = self.done = 0  # steps done before this process, and so far
        # the last step; with `train.patience`, earlier than the length used in schedules
        self.end = self.steps
        self.saved = 0  # step of the newest checkpoint
        self.has_risen = False  # whether the rise of validation was reported
        self.has_collapsed = False  # whether the last validation found that the generator may have collapsed

    def batches_of(self, n: int | None) -> TrainBatches:
        """The batches of `n` training images; None: of all."""
        ranks_of: dict[str, int] = {"rank": self.rank, "world": self.world}
        return TrainBatches(self.images, self.train.batch_size, n=n, needs=self.model.needs, **ranks_of)

    def shortened(self, minutes: float) -> Part:
        """The part with as many training images as the model can prepare within its share of the time."""
        positions, clock = self.batches.positions(), partial(devices.clock, self.device, self.train.clock)
        n = count_in_time(self.model, self.images, positions, 60 * minutes, clock)
        if n >= len(positions):
            return self.part
        why = f"preparation takes at most {100 * PREPARATION_SHARE:.0f} % of the time"
        self.log.warn(f"{n:,} of {len(positions):,} training images are used, because {why}")
        if self.rank == 0:  # before it is prepared: a second attempt finds the rows of these images
            write_chosen(self.run, {"data": {"n": n}})
        self.batches = self.batches_of(n)
        return replace(self.part, data=replace(self.part.data, n=n))

    def fit(self) -> None:
        """Trains from the newest checkpoint, or from the start, to the end. If it is stopped, it saves a
        checkpoint."""
        self.start = self.done = self.resume()
        self.snapshots.trim(self.start)
        launch = self.part.launch
        names = tuple(dict.fromkeys(launch.track))
        if names and self.rank == 0:
            space = asdict(self.space.record) if self.space else None
            config = self.part.tree() | {"built_on": self.built_on, "space": space}
            self.history.trackers = Trackers(names, self.run, config, self.log, start=self.start)
        train = self.train if self.metric else replace(self.train, eval_every=0)
        clock = partial(devices.clock, self.device)
        self.cadence = Cadence(train, self.steps, agree=ranks.agree, clock=clock)
        if self.start and ranks.agree(self.run.status().get("ended_by_patience")) == self.start:
            self.end = self.start
        if self.start >= self.end:  # stopped between its last checkpoint and its final image
            validated = ranks.agree(self.history.validated(self.end))
            self.pause(self.end, PAUSE_KINDS - {"eval"} if validated else PAUSE_KINDS)
            return
        stop = Stop(self.run.owner.path, world=self.world, device=self.device)
        streams.change_spinner("preparing the model with training images")
        self.begin()
        self.catch_up()
        streams.change_spinner("measuring a step")
        self.log.event("start", run=self.run.id, path=str(self.run.path), step=self.start, steps=self.steps)
        first = self.batches.at(self.start)
        speed = speed_of(self.trained.model, first, self.part, self.accelerator, self.log)
        stages = len(self.run.owner.stages) or 1
        with listening(self.run), self.log.training(self.start, self.steps, stages=stages) as bar:
            bar.speed = speed
            for step in range(self.start, self.steps):
                self.record(self.step(step), step + 1, bar)
                self.snapshots.take(step + 1)
                if signum := stop.signal(step + 1):
                    self.save(step + 1)
                    message = f"stopped at step {step + 1} of {self.steps}, checkpoint saved"
                    raise Interrupted(
                        message, signum=signum, hint=gz("train", self.run.owner.id, resume=True)
                    )
                if due := self.cadence.due(step + 1) | (PAUSE_KINDS if step + 1 == self.steps else set()):
                    self.pause(step + 1, due)
                if step + 1 == self.end:
                    return

    def record(self, losses: dict[str, Tensor], done: int, bar: TrainBar) -> None:
        """Records the losses of a step, checks them and shows their means when due."""
        alone, last = not devices.device_kind(self.device).queued and self.world == 1, done == self.end
        self.history.add(losses)
        bar.advance(done)
        if done % (1 if alone else min(CHECK_STEPS, self.train.log_every)) == 0 or last:
            self.history.check_finite(done, self.steps)
        if done % self.train.log_every == 0 or last:
            first, *rest = self.optimizers.values()
            lr = None if rest else first.param_groups[0]["lr"]
            self.history.show(done, self.model, bar, lr)

    def step(self, step: int) -> dict[str, Tensor]:
        """Trains on one batch, which all due phases share. Returns the losses by name, detached."""
        self.seed_global(step)
        batch = self.batches.at(step)
        self.extend(batch, step)
        losses: dict[str, Tensor] = {}
        for phase in self.phases:
            if phase.due(step):
                self.only(phase)
                values = self.backward(batch, step, phase)
                norm = self.update(step, phase)
                if self.accelerator.scaler is None:
                    self.history.gradient(norm)
                if self.train.clip or self.train.skip:
                    values["grad_norm"] = norm
                prefix = "" if len(self.phases) == 1 else f"{phase.name}."
                losses |= {prefix + key: value for key, value in values.items()}
        self.ema.update()
        self.done = step + 1
        self.model.on_step(step)
        return losses

    def noise(self, step: int, key: str, start: int) -> BatchNoise:
        """The noise for the rows of the global batch from `start` on."""
        total = self.train.batch_size
        return BatchNoise(self.part.seed, step, key, total=total, start=start, device=self.device)

    def seed_global(self, step: int) -> None:
        """Seeds the global generators by seed, rank and step, so that a resume repeats dropout."""
        devices.seed(self.device, mix(self.part.seed, self.rank, step))

    def begin(self) -> None:
        """Initialises the model with the first batch; after a resume, sets annealed values to the current
        step."""
        # equal on all ranks, as weights must be
        devices.seed(self.device, mix(self.part.seed, 0, self.start))
        with torch.no_grad():
            if not self.start:
                self.model.fit(self.some_images())
            self.model.on_start(self.batches.at(self.start))
        for text in self.model.warnings:
            self.log.warn(text)
        if self.start:
            self.model.on_step(self.start - 1)
        elif self.ema.decay:
            self.ema.restart()  # the average starts from the initialised model

    def pause(self, done: int, due: Set[str]) -> None:
        """Runs the pauses that are due after `done` steps: validation, checkpoint, samples. Each is timed."""
        before = self.cadence.intervals()
        # before the validation, which would save the best one in its own time: that of a checkpoint decides
        # how often there is one. Nor is a step lost if the run is killed while it validates or draws
        if "checkpoint" in due or self.cadence.slow(due & {"eval", "sample"}):
            self.save_timed(done)
        if "eval" in due and self.metric:
            with self.cadence.timed():
                self.get_net()
            if self.metric:
                with self.cadence.timed("eval"):
                    self.evaluate(done, self.metric)
            else:  # its judge has not learned its classes
                self.cadence.every["eval"] = 0
        if last := done == self.end:
            due = due | PAUSE_KINDS
            self.snapshots.take(done, last=True)
            self.save_timed(done)  # also where patience has just ended the training
            self.finish()
        if "sample" in due:
            with self.cadence.timed("sample"):
                self.picture(done, LAST_GRID if last else GRID_SAMPLES)
        if self.rank == 0 and (every := self.cadence.intervals()) != before:
            write_chosen(self.run, {"train": every})
        if "sample" in due and self.rank == 0 and self.run.metrics_file.exists():
            loss_curve(self.run.path)

    def save_timed(self, done: int) -> None:
        """Saves a checkpoint and times it, unless it exists or the last step harmed the weights."""
        if done != self.saved and not self.history.is_harmed():
            with self.cadence.timed("checkpoint"):
                self.save(done)

    def finish(self) -> None:
        """Makes the averaged weights of the last checkpoint the run's weights. The best checkpoint replaces
        it if `train.patience` ended the training, or if the validation metric has been rising."""
        best = self.run.best
        if self.rank == 0:
            chosen = best and (self.end < self.steps or self.risen_since(best))
            served = best.step if best and chosen else self.end
            if checkpoint.finish(self.run, self.train.keep, served) < self.end:
                self.log.info(f"using the weights of step {served}, the best by validation")
        if guidance.is_wanted(self.trained):
            scale = None
            if self.rank == 0:
                with ranks.alone():
                    scale = guidance.write(self.run, self.pack, self.device, self.log)
            if (scale := ranks.agree(scale)) is not None:
                self.trained.part = replace(self.part, sample={**self.part.sample, "guidance": scale})

    def catch_up(self) -> None:
        """Runs the validation and the samples that were due at the resumed checkpoint but are missing."""
        every, start = self.cadence.every, self.start
        due = {kind for kind, steps in every.items() if start and steps and start % steps == 0}
        results = self.history.validated(start), self.run.samples_picture(start).exists()
        validated, has_picture = ranks.agree(results)
        self.pause(start, due - ({"eval"} if validated else set()) - ({"sample"} if has_picture else set()))

    def save(self, step: int) -> None:
        """Saves a checkpoint of `step` steps, unless it exists. Every rank must call it; rank 0 writes."""
        if step == self.saved:
            return
        self.saved, folder, scaler = step, self.run.checkpoints_folder, self.accelerator.scaler
        statistics = self.ema.statistics()
        values = ranks.gathered(self.model.state_dict())
        averages, powers = ranks.gathered(self.ema.state_dict()), ranks.gathered(self.ema.power_state())
        optimizers = ranks.gathered({name: o.state_dict() for name, o in self.optimizers.items()})
        of_ranks = ranks.everyone((checkpoint.extra_of(values), self.history.pending()))
        weights = checkpoint.weights_of(values) if ranks.rank() == 0 else {}
        trained_names = [name for name, _ in self.model.named_parameters() if name in weights]
        broken = [name for name in trained_names if not torch.isfinite(weights[name]).all()]
        if broken := ranks.agree(broken):
            raise self.history.diverged(f"the weights `{broken[0]}` are not finite", step)
        if ranks.rank() == 0:
            train = {
                "optimizers": optimizers,
                "scaler": scaler.state_dict() if scaler is not None else None,
                "ema_updates": self.ema.updates,
                "powers": powers,
                "extra": [extra for extra, _ in of_ranks],
                "pending": [pending for _, pending in of_ranks],
            }
            averaged = weights | checkpoint.weights_of(averages | statistics)
            space = self.space.record if self.space else None
            facts = (self.info, step, self.built_on, space, self.values)
            saved = checkpoint.Saved(averaged, self.part, *facts)
            checkpoint.write(folder, step, checkpoint.Checkpoint(weights, saved, train, self.machine()))
            checkpoint.prune(folder, self.train.keep or checkpoint.NEWEST)
            self.run.save_step(step)
            self.log.event("checkpoint", step=step)
        ranks.wait()

    def save_best(self, step: int, metric: str, value: float) -> None:
        """Saves a checkpoint of `step` steps as the best one if `value` is less than all earlier values.
        Every rank must call it; rank 0's value counts."""
        best = self.run.best
        if ranks.agree(best is None or best.metric != metric or value < best.value):
            self.save(step)
            if ranks.rank() == 0:
                files.write_json(self.run.best_file, {"step": step, "metric": metric, "value": value})
                checkpoint.prune(self.run.checkpoints_folder, self.train.keep or checkpoint.NEWEST)

    def resume(self) -> int:
        """Restores the newest undamaged checkpoint and returns its step. Without one, returns 0 and loads
        `train.init` if the recipe has it."""
        path = checkpoint.newest(self.run.checkpoints_folder, self.log.warn)
        if path is None:
            self.history.resume(0, None, self.train.log_every)
            if self.train.init:
                init_from(self.model, self.part, self.run, self.log)
            return 0
        saved = checkpoint.read(path)
        train, meta, rank = saved.train, saved.meta, ranks.rank()
        # a rank that did not exist when the checkpoint was saved takes the extra state of rank 0
        checkpoint.load(self.model, saved.weights | train["extra"][rank if rank < len(train["extra"]) else 0])
        self.ema.load_state_dict(saved.averaged.weights, train["ema_updates"], train.get("powers"))
        for name, values in train["optimizers"].items():
            checkpoint.restore(self.optimizers[name], values)
        if train["scaler"] and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(train["scaler"])
        pending = train.get("pending") or [None]  # older checkpoints have none
        sums = pending[rank if len(pending) == ranks.world() else 0]
        self.history.resume(meta["step"], sums, self.train.log_every)
        self.saved = meta["step"]
        # older checkpoints have fewer
        here = {key: value for key, value in self.machine().items() if key in meta}
        if changed := [f"{key} {meta[key]} → {value}" for key, value in here.items() if meta[key] != value]:
            self.log.warn(f"the resumed run will not be bit-identical: {', '.join(changed)}")
        self.log.info(f"resumed at step {meta['step']}")
        return meta["step"]

    def evaluate(self, done: int, metric: str) -> None:
        """Validates, saves a checkpoint if it is the best so far, and then records the metrics. They come
        last, so that a resumed run validates again if they are missing."""
        with self.ema.evaluating():
            packs: dict[str, Pack] = {"pack": self.pack, "data": self.images.pack}
            values = validate(self.trained, metric, **packs, net=self.net, warn=self.log.warn)
        spread_out = "distance" in values and 4 * done >= self.steps  # not at the first steps
        collapsed = collapse.warning(values["distance"], values.get("classes")) if spread_out else None
        if collapsed and not self.has_collapsed:
            self.log.warn(f"step {done}: {collapsed}")
        self.has_collapsed = bool(collapsed)
        if ranks.agree(math.isfinite(values[metric])):
            self.save_best(done, metric, values[metric])
        else:
            self.log.warn(f"the validation `{metric}` of step {done} is not finite")
        self.history.record("eval", done, {f"val_{name}": value for name, value in values.items()})
        patience, best = self.train.patience, self.run.best
        if best and not self.has_risen and (since := self.risen_since(best)):
            self.has_risen = True
            self.log.warn(
                f"validation has worsened since step {since}; if it does not recover, gz uses the best step"
            )
        if patience and ranks.agree(bool(best and self.history.validations(best.step) > patience)):
            self.log.info(f"stopped early at step {done}: no improvement in {patience} validations")
            self.end = done
            if self.rank == 0:
                self.run.update(ended_by_patience=done)
        self.log.validated = "validation " + "  ".join(f"{k} {v:.4g}" for k, v in values.items())
        unfinished = done < self.end
        of_stage = f"{self.log.stage}: " if self.log.stage else ""
        self.log.info(f"{of_stage}step {done}  {self.log.validated}", sparse=unfinished)
        if not unfinished and (reference := self.history.reference(self.part, done, metric)):
            self.log.info(reference)

    def risen_since(self, best: Best) -> int | None:
        """The step since which the validation loss, or the metric that selects the best checkpoint, has been
        rising."""
        return self.history.risen(self.model.watched or best.metric, self.steps)

    def get_net(self) -> None:
        """Loads the network of `fd`, or trains it if this is its first use for a data set. If it fails to
        learn its classes, another metric is used. Every rank must call it."""
        if not self.has_judge:
            self.has_judge = True
            if self.rank == 0:
                self.net, self.metric = judge_of(
                    self.model, self.pack, self.device, self.log, chosen_by(self.run, self.train)
                )
            self.metric = ranks.agree(self.metric)

    def pauses(self, length: float, clock: Callable[[], float]) -> Pauses:
        """The pauses of a run of `length` seconds, from the times of a few images. If samples take too long
        to be validated, the metric becomes the loss. If this takes too long, it is a mean over fewer images.
        Every rank must call it."""
        trained, train, took = self.trained, self.train, dict[str, float]()
        packs: dict[str, Pack] = {"pack": self.pack, "data": self.images.pack}
        since = clock()
        with self.ema.evaluating():
            averaging = clock() - since  # statistics of batch norm for the averaged weights take seconds
            each = sample_seconds(trained, clock)
            cheaper = self.model.watched if self.metric and train.best == "auto" else None
            for metric in filter(None, (self.metric, cheaper)):
                self.metric = metric
                took["eval"] = validation_seconds(
                    trained, metric, **packs, net=self.net, each=each, clock=clock
                )
                if ranks.agree(took["eval"] <= 2 * PAUSE_SHARE * length):
                    break
            else:
                took = self.validate_fewer(ranks.agree(took), 2 * PAUSE_SHARE * length)
        took["sample"] = (train.samples or LAST_GRID) * each
        if self.ema.calibrate:  # each pause recomputes them; a checkpoint takes little else
            took = {kind: averaging + took.get(kind, 0.0) for kind in (*took, "checkpoint")}

        def end(steps: int) -> float:
            return guidance.choice_seconds(trained, replace(train, steps=steps), each)

        return Pauses(train, length, ranks.agree(took), end)  # all ranks pause at the same steps

    def validate_fewer(self, took: dict[str, float], limit: float) -> dict[str, float]:
        """Limits the validation images of a mean to the batches that take so many seconds, but to one at
        least. Returns the time of each pause."""
        if not self.metric or self.metric.startswith("fd") or self.train.eval_images:
            return took
        every = mean_count(self.trained, len(self.pack.images("val")))
        batches = max(1, int(every * limit / took["eval"]) // EVAL_BATCH)
        n = min(every, EVAL_BATCH * batches)
        self.train = replace(self.train, eval_images=n)
        return took | {"eval": took["eval"] * n / every}

    def picture(self, done: int, n: int) -> None:
        """Writes samples/<done>.png with `train.samples` samples, or about n. Each class has equally many,
        and the noise is always the same. Every rank draws its share. If no sample is finite, it warns; at the
        end of the training it raises NoneFinite."""
        trained = self.trained
        classes = trained.info.classes if trained.model.conditional else ()
        n = self.train.samples or in_turns(n, len(classes))
        labels = spread_labels(None, n, trained.info, torch.device("cpu")) if classes else None
        since = devices.clock(self.device, self.train.clock)
        try:
            with self.ema.evaluating():
                images = sampler.draw(trained, n, labels=labels, warn=self.log.warn)
        except sampler.NoneFinite as e:
            if done == self.end:
                raise
            return self.log.warn(e.message)
        if self.rank == 0:
            if done == self.end:
                seconds = 1000 * (devices.clock(self.device, self.train.clock) - since) / n
                self.run.update(sample_seconds=round(seconds, 2))
                time = duration(seconds) if seconds >= 1 else "less than a second"
                of = " of CPU time" if devices.clock_of(self.device, self.train.clock) == "cpu" else ""
                self.log.info(f"1,000 samples take {time}{of} on this machine")
            caption = sheets.caption_of(trained, None, 0, {}, done)
            path = self.run.samples_picture(done)
            picture = sheets.of_samples(images, labels, classes, caption)
            save_png(path, picture, {"step": done, "n": n, "seed": 0})
            if self.history.trackers:
                self.history.trackers.picture(done, path)

    def some_images(self) -> Iterator[Batch]:
        n = QUICK_CALIBRATION_IMAGES if 0 < self.done < self.end else CALIBRATION_IMAGES
        return random_images(self.images, self.batches.positions(), n)

    def machine(self) -> dict[str, Any]:
        """The facts of the machine, and the choices based on it, that must stay the same for a bit-exact
        resume."""
        threads, version, device = torch.get_num_threads(), torch.__version__, self.device.type
        facts = {"world": ranks.world(), "threads": threads, "torch": version, "device": device}
        return facts | {"precision": precision(self.part)}
