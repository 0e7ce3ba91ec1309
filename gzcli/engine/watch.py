"""What a run shows of itself: losses, grids, validation, the best checkpoint, the loss curve, the final
picture."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gzcli import ranks
from gzcli.data.batches import scan
from gzcli.engine import checkpoint as checkpoints
from gzcli.engine import pictures, sampler, state
from gzcli.engine.cadence import Cadence
from gzcli.engine.devices import synchronise
from gzcli.engine.prepare import with_prepared
from gzcli.engine.report import loss_curve, metric_lines
from gzcli.engine.trained import Trained
from gzcli.errors import MissingError
from gzcli.models.nn import double
from gzcli.recipe.parts import part_of
from gzcli.store import files

if TYPE_CHECKING:
    from gzcli.engine.trainer import Trainer

GRID = 36  # images of a grid during training
VALIDATION = 2000  # images
EVAL_BATCH = 100


class Watch:
    """Called by the trainer: `add` after every step, `show` every `log_every`, `turn` for all that is
    rarer."""

    def __init__(self, trainer: Trainer):
        self.t = trainer
        self.log, self.run, self.steps = trainer.log, trainer.run, trainer.steps
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.streak = torch.zeros((), device=trainer.device)
        if trainer.pending:
            self.sums = {name: total.to(trainer.device) for name, total in trainer.pending["sums"].items()}
            self.counts = dict(trainer.pending["counts"])
        self.metric, self.net = best_metric(trainer), None
        train = trainer.train if self.metric else trainer.train | {"eval_every": 0}
        self.cadence = Cadence(train, self.steps, agree=ranks.agree, clock=self._clock)
        self.wandb = self._wandb() if trainer.tree["launch"].get("wandb") and trainer.rank == 0 else None
        self._forget_after(trainer.start)

    # --- losses
    # -------------------------------------------------------------------------------------------------

    def add(self, losses: dict[str, Tensor]) -> None:
        """Sums on the device; nothing is moved to the host."""
        for name, value in losses.items():
            if name in self.sums:
                self.sums[name] += value
            else:
                self.sums[name] = value.clone()
            self.counts[name] = self.counts.get(name, 0) + 1
            if name == "loss" or name.endswith(".loss"):
                self.streak = torch.where(torch.isfinite(value), 0.0, self.streak + 1)

    def bad(self) -> int:
        """Steps in a row whose loss was not finite, on the worst rank; a collective."""
        return int(ranks.maximum(self.streak))

    def show(self, step: int, bar: Any) -> None:
        own = torch.stack([total / self.counts[name] for name, total in self.sums.items()])
        means = ranks.mean(own, self.t.model)
        values = dict(zip(self.sums, means.tolist(), strict=True))
        self.sums, self.counts = {}, {}
        if len(self.t.phases) == 1:
            values["lr"] = self.t.optimizers[self.t.phases[0].name].param_groups[0]["lr"]
        rate = bar.show(step, values)
        self._record("step", step, values | {"it_s": round(rate, 3)})

    def pending(self) -> dict[str, Any]:
        """What is summed up for the next line, for a checkpoint between two lines."""
        return {"sums": {name: total.cpu() for name, total in self.sums.items()}, "counts": dict(self.counts)}

    # --- the rarer things
    # ---------------------------------------------------------------------------------------

    def turn(self, step: int) -> None:
        """Grid, validation and checkpoint where they are due; all of them at the end."""
        last, known = step == self.steps, self.cadence.found()
        due = self.cadence.due(step)
        looks = due & {"eval", "sample"} | ({"eval", "sample"} if last else set())
        if looks and self.cadence.dear(looks) and not self.bad():
            state.save(self.t, step)  # were it killed as it looks, no step would be lost
        if "eval" in due or (last and self.metric):
            with self.cadence.look():
                self._make_ready()
            with self.cadence.look("eval"):
                self.evaluate(step)
        if ("checkpoint" in due or last) and not self.bad():
            with self.cadence.look("checkpoint"):
                state.save(self.t, step)
        if "sample" in due or last:
            with self.cadence.look("sample"):
                self.picture(step, self.t.train.get("samples") or (64 if last else GRID))
        if self.t.rank == 0 and (found := self.cadence.found()) != known:
            state.write_train(self.run, found)
        if last:
            state.finish(self.t)
        if (last or "sample" in due) and self.t.rank == 0 and (self.run.path / "metrics.jsonl").exists():
            loss_curve(self.run.path)

    def catch_up(self) -> None:
        """What was due at the step that a run was stopped at, which did not wait for it."""
        start = self.t.start
        due = {kind for kind, every in self.cadence.every.items() if start and every and start % every == 0}
        done = [True, True]
        if self.t.rank == 0:
            lines = metric_lines(self.run.path)
            done[0] = any(
                line["step"] == start and any(key.startswith("val_") for key in line) for line in lines
            )
            done[1] = self._picture(start).exists()
        validated, drawn = ranks.agree(done)
        if "eval" in due and not validated:
            self._make_ready()
            self.evaluate(start)
        if "sample" in due and not drawn:
            self.picture(start, self.t.train.get("samples") or GRID)

    def picture(self, step: int, n: int) -> None:
        """samples/<step>.png: the same noise each time, averaged weights; every rank draws its share."""
        images = self.draw(n)
        if self.t.rank == 0:
            path = self._picture(step)
            pictures.save_png(path, pictures.grid(images))
            if self.wandb:
                import wandb

                self.wandb.log({"samples": wandb.Image(str(path))}, step=step)

    def _picture(self, step: int) -> Path:
        return self.run.path / "samples" / f"{step:08d}.png"

    def draw(self, n: int):
        """n images uint8 [n, C, H, W] of the averaged model, seed 0."""
        t = self.t
        with self._evaluating():
            return sampler.draw(Trained(self.run, t.model, t.info, part_of(t.tree), t.device, 0, t.space), n)

    def evaluate(self, step: int) -> None:
        """The metric of the best checkpoint on validation images; a better one is saved and remembered."""
        if not self.metric:
            return
        values = self._fd(step) if self.metric == "fd" else {self.metric: self._likelihood()}
        value = values[self.metric]
        self._record("eval", step, {f"val_{name}": each for name, each in values.items()})
        self.log.info(
            f"step {step}  validation " + "  ".join(f"{name} {each:.4g}" for name, each in values.items())
        )
        path = self.run.path / "checkpoints" / "best.json"
        best = files.read_json(path)
        if ranks.agree(best is None or value < best["value"]):
            state.save(self.t, step)
            if self.t.rank == 0:
                files.write_json(path, {"step": step, "metric": self.metric, "value": value})
                checkpoints.prune(path.parent, self.t.train["keep"])

    def _clock(self) -> float:
        """Seconds, after the device has done what it was asked for."""
        synchronise(self.t.device)
        return time.monotonic()

    def _make_ready(self) -> None:
        """The net whose features `fd` compares; it is trained once a set, and takes longer than the rest."""
        from gzcli.metrics.features import lenet

        if self.metric == "fd" and self.net is None and self.t.rank == 0:
            self.net = lenet(self.t.pack, device=self.t.device, say=self.log.info)

    def _fd(self, step: int) -> dict[str, float]:
        """The Fréchet distance to validation images, and the shares of their diversity, with a warning where
        they are low."""
        from gzcli.metrics import collapse
        from gzcli.metrics.frechet import frechet_distance

        real = self.t.pack.images("val")[:VALIDATION]
        images = self.draw(len(real))
        if self.t.rank:
            return {"fd": 0.0}
        net = self.net
        made, true = net.features(images), net.features(real)
        seen, known = (
            np.zeros(len(x), int) if self.t.info.multilabel else net.predict(x) for x in (images, real)
        )
        found = {
            "fd": float(frechet_distance(true, made)),
            "distance": collapse.diversity(made, seen, true, known),
        }
        if not net.rotations and not self.t.info.multilabel:
            found["classes"] = collapse.coverage(seen, known)
        text = collapse.warning(found["distance"], found.get("classes"))
        if text and 4 * step >= self.steps:  # before that it has not spread out yet
            self.log.warn(text)
        return found

    def _likelihood(self) -> float:
        """Mean validation loss, or bits per dimension, over every rank's share of the batches: the same ones,
        and so the same figure, however many ranks there are."""
        t = self.t
        n = min(VALIDATION, len(t.pack.images("val")))
        firsts = range(t.rank * EVAL_BATCH, n, t.world * EVAL_BATCH)
        index = [i for first in firsts for i in range(first, min(first + EVAL_BATCH, n))]
        total = double(torch.zeros((), device=t.device))
        dims = torch.Size(t.info.shape).numel()
        with self._evaluating():
            own = {"batch_size": EVAL_BATCH, "levels": t.info.levels, "device": t.device, "index": index}
            for batch in scan(t.data, "val", **own) if index else ():
                if self.metric == "bpd":
                    labels = batch.y if t.model.conditional else None
                    value = -double(t.model.log_prob(batch.x, labels, noise=batch.noise)).sum() / (
                        dims * 0.6931471805599453
                    )
                else:
                    out = t.model.loss(with_prepared(t.model, batch), t.phases[0].name)
                    value = double(out["loss"] if isinstance(out, dict) else out) * len(batch)
                total += value
        return float(ranks.total(total)) / n

    def _evaluating(self):
        """Averaged weights, eval mode, no gradients, full precision."""
        return _Evaluating(self.t)

    # --- records
    # ------------------------------------------------------------------------------------------------

    def _record(self, event: str, step: int, values: dict[str, float]) -> None:
        self.log.metrics(step, **values)
        self.log.event(event, step=step, **values)
        if self.wandb:
            self.wandb.log(values, step=step)

    def _forget_after(self, step: int) -> None:
        """Drops the lines of `metrics.jsonl` past the checkpoint that was resumed."""
        path = self.run.path / "metrics.jsonl"
        if self.t.rank == 0 and path.exists():
            kept = [line for line in metric_lines(self.run.path) if line["step"] <= step]
            files.write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))

    def _wandb(self) -> Any:
        """The W&B run, by its own variables (WANDB_MODE=offline, WANDB_PROJECT …). Raises MissingError."""
        try:
            import wandb
        except ImportError as e:
            raise MissingError("`--wandb` needs the package `wandb`", hint="pip install wandb") from e
        name = self.run.id
        id_ = name.replace("/", "-")
        try:
            return wandb.init(
                project="gz", name=name, id=id_, resume="allow", dir=self.run.path, config=self.t.tree
            )
        except wandb.Error as e:  # no key, a wrong one, no network
            said = (str(e).splitlines() or [type(e).__name__])[0].rstrip(".")
            raise MissingError(
                f"`--wandb`: {said}",
                hint="`wandb login` once, or `WANDB_MODE=offline`, and `wandb sync` later",
            ) from e


class _Evaluating:
    def __init__(self, trainer: Trainer):
        self.t = trainer

    def __enter__(self):
        self.swap, self.mode = self.t.ema.swapped(), torch.inference_mode()
        self.swap.__enter__()
        self.t.model.eval()
        self.mode.__enter__()

    def __exit__(self, *error):
        self.mode.__exit__(*error)
        self.swap.__exit__(*error)
        self.t.model.train()


def best_metric(trainer: Trainer) -> str | None:
    """bpd where `log_prob` is exact or a bound, fd where the model says so (GANs), validation loss else."""
    asked, model = trainer.train["best"], trainer.model
    if asked == "none" or len(trainer.pack.images("val")) == 0:
        return None
    if asked != "auto":
        return asked
    if model.best != "auto":
        return model.best
    return "bpd" if model.likelihood in ("exact", "bound") else "loss"
