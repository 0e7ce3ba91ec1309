"""The losses and metrics of a run. They go to `metrics.jsonl`, to JSON events and to accelerate's
trackers."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gzcli.core import ranks
from gzcli.core.errors import DivergedError, MissingError, first_line, install_line
from gzcli.core.measured import ReferenceRun
from gzcli.core.sections import Part, leaves
from gzcli.core.trackers import TRACKERS, Logged
from gzcli.engine.log import Log, TrainBar
from gzcli.store import files
from gzcli.store.metrics import every_line, metric_lines
from gzcli.store.paths import user_dir
from gzcli.store.runs import Run, has_shipped_loss

MAX_BAD_STEPS = 5  # consecutive bad steps after which the run is stopped
RISEN_VALIDATIONS, RISEN_SHARE = (
    3,
    0.1,
)  # validations, and share of the gain, that count as a rise of a metric
EXPLODED_FACTOR = 1e6  # factor of the first loss (at least 1) beyond which a step is bad
WATCHED_METRICS = ("loss", "grad_norm")  # metrics that must be finite


class History:
    """The losses of a run, summed on the device until they are logged, and its other metrics."""

    trackers: Trackers | None = None
    warned = False  # whether a warning on dropped gradients was shown

    def __init__(self, run: Run, log: Log, device: torch.device):
        self.run, self.log = run, log
        self.sums: dict[str, Tensor] = {}  # sum of each loss since the last log
        self.counts: dict[str, int] = {}  # number of terms of each sum
        self.first: dict[str, Tensor] = {}  # absolute value of each loss at the first step, at least 1
        # steps in a row whose loss or gradient was bad, and those of them that changed weights
        self.bad = torch.zeros(2, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)  # whether this step's gradients are
        # number of steps since the last log whose gradients were not, and so changed no weights
        self.dropped = torch.zeros((), device=device)

    def gradient(self, norm: Tensor) -> None:
        """Records the gradient norm of a phase in this step."""
        self.finite = self.finite & norm.isfinite()

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Adds the losses of one step. The sums stay on the device, so the host does not wait."""
        good, dropped = self.finite, ~self.finite
        self.dropped, self.finite = self.dropped + dropped, torch.ones_like(good)
        for name, value in losses.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
            self.counts[name] = self.counts.get(name, 0) + 1
            if name.rpartition(".")[2] in WATCHED_METRICS:
                if name not in self.first:
                    self.first[name] = value.abs().nan_to_num(nan=1.0, posinf=1.0).clamp(min=1)
                good &= torch.isfinite(value) & (value.abs() < EXPLODED_FACTOR * self.first[name])
        self.bad = torch.where(torch.stack([good, good | dropped]), 0.0, self.bad + 1)

    def bad_steps(self) -> tuple[int, int]:
        """The number of consecutive bad steps so far, and the number of those that changed weights, on the
        worst rank. Every rank must call it."""
        bad, harmful = ranks.maximum(self.bad.clone()).tolist()
        return int(bad), int(harmful)

    def is_harmed(self) -> bool:
        """Whether the last step changed weights with a bad gradient. Every rank must call it."""
        return self.bad_steps()[1] > 0

    def check_finite(self, step: int, steps: int) -> None:
        """Raises DivergedError if each of the last `PATIENCE` steps was bad: its loss or gradient was not
        finite, or had exploded. At the final step, a single bad one that changed weights suffices. Every rank
        must call it."""
        bad, harmful = self.bad_steps()
        if bad >= min(MAX_BAD_STEPS, steps) or (step == steps and harmful):
            reason = "the loss or its gradient is not finite, or grew a millionfold"
            raise self.diverged(reason, step)

    def diverged(self, reason: str, step: int) -> DivergedError:
        """The error of a run that cannot continue."""
        have = self.run.saved_steps
        good = f"the last good checkpoint is at step {have[-1]}" if have else "there is no checkpoint yet"
        message = f"{reason} at step {step}; {good}"
        hint = "lower `optim.lr`, raise `optim.warmup`, set `train.clip`, or `train.precision=fp32`"
        return DivergedError(message, hint=hint)

    def show(self, step: int, model: nn.Module, bar: TrainBar, lr: float | None) -> None:
        """Logs the mean of each loss since the last call, over all ranks. Every rank must call it."""
        means = torch.stack([total / self.counts[name] for name, total in self.sums.items()])
        values = dict(zip(self.sums, ranks.mean_over_ranks(means, model).tolist(), strict=True))
        self.sums, self.counts = {}, {}
        values |= {} if lr is None else {"lr": lr}
        if dropped := int(self.dropped):
            values["dropped"] = dropped
            self.dropped.zero_()
            if not self.warned:
                self.log.warn("steps with non-finite gradients are skipped and counted as `dropped`")
            self.warned = True
        self.record("step", step, values | bar.show(step, values))

    def record(self, event: str, step: int, values: Mapping[str, float]) -> None:
        """Records metrics of a step in `metrics.jsonl`, as an event, and in the trackers."""
        self.log.metrics(step, **values)
        self.log.event(event, step=step, **values)
        if self.trackers:
            self.trackers.figures(step, values)

    def validated(self, step: int) -> bool:
        """Whether `metrics.jsonl` has a validation metric at this step."""
        return any(line["step"] == step for line in self._validations())

    def validations(self, start: int) -> int:
        """The number of validations from the step `start` on."""
        return sum(line["step"] >= start for line in self._validations())

    def _validations(self) -> Iterator[dict[str, Any]]:
        lines = metric_lines(self.run.path)
        return filter(_is_validation, lines)

    def risen(self, metric: str, steps: int) -> int | None:
        """The step since which a validation metric has been rising, if that is at least a fifth of `steps`
        ago; otherwise None. Rising means that each of the last three validations is worse than the best, by
        more than a tenth of the gain from the first to the best."""
        name = f"val_{metric}"
        points = [(line["step"], line[name]) for line in self._validations() if name in line]
        points = [(step, value) for step, value in points if math.isfinite(value)]
        lowest, least = min(points, key=lambda point: point[1], default=(0, 0.0))
        later = [value for step, value in points if step > lowest]
        if len(later) < RISEN_VALIDATIONS or 5 * (points[-1][0] - lowest) < steps:
            return None
        bound = least + RISEN_SHARE * (points[0][1] - least)
        return lowest if all(value > bound for value in later[-RISEN_VALIDATIONS:]) else None

    def reference(self, part: Part, step: int, metric: str) -> str | None:
        """A sentence with the metric of this recipe's reference run at a step. None if there is no reference
        run, or if this run's loss may differ from that run's."""
        owner = self.run.owner
        if part.scale is None or not has_shipped_loss(owner):
            return None
        return ReferenceRun(owner.model, owner.data, part.scale, part.stage).stood_at(step, metric)

    def pending(self) -> dict[str, Any]:
        """The sums for the next line of losses, which a checkpoint must save."""
        sums = {name: value.cpu() for name, value in self.sums.items()}
        first = {name: value.cpu() for name, value in self.first.items()}
        dropped = self.dropped.cpu()
        return {"sums": sums, "first": first, "counts": dict(self.counts), "dropped": dropped}

    def resume(self, step: int, pending: Mapping[str, Any] | None, every: int) -> None:
        """Resumes from the checkpoint of `step`: restores its sums and drops later lines. Warns if lines of
        losses are missing, one being due after each `every` steps."""
        if pending:
            device = self.bad.device
            self.sums = {name: total.to(device) for name, total in pending["sums"].items()}
            # older checkpoints have none
            self.first = {name: size.to(device) for name, size in pending.get("first", {}).items()}
            self.counts = dict(pending["counts"])
            self.dropped = pending.get("dropped", self.dropped).to(device)
        path = self.run.metrics_file
        if ranks.rank() == 0 and (step or path.exists()):
            lines = [line for line in every_line(self.run.path) if line["step"] <= step]
            logged = {n for line in lines if (n := line["step"]) % every == 0 and not _is_validation(line)}
            if lost := step // every - len(logged):
                text = f"`{path}` was truncated: {lost:,} of {step // every:,} loss lines are missing"
                self.log.warn(f"{text}; the weights are not affected")
            files.write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines))


def _is_validation(line: Mapping[str, Any]) -> bool:
    return any(key.startswith("val_") for key in line)


# ---------------------------------------------------------------------------- trackers


class Trackers:
    """The trackers of a run. One that fails is dropped with a warning, and does not stop the training."""

    def __init__(self, names: Sequence[str], run: Run, config: Mapping[str, Any], log: Log, *, start: int):
        self.log = log
        self.open = {name: start_tracker(name, run, config, start) for name in names}

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        """Logs metrics of a step."""
        self._each(lambda name, tracker: tracker.log(dict(values), step=step))

    def picture(self, step: int, path: Path) -> None:
        """Logs the sample grid of a step."""
        self._each(lambda name, tracker: TRACKERS[name].show(tracker, path, step))

    def close(self) -> None:
        """Ends the trackers' runs, which sends pending metrics."""
        self._each(lambda name, tracker: tracker.finish())
        self.open = {}

    def _each(self, do: Callable[[str, Any], None]) -> None:
        for name, tracker in list(self.open.items()):
            try:
                with redirect_stdout(sys.stderr):
                    do(name, tracker)
            except Exception as e:  # a server that is gone, a full disk: the training continues
                del self.open[name]
                self.log.warn(f"`{name}` stopped tracking: {first_line(e)}")


def start_tracker(name: str, run: Run, config: Mapping[str, Any], start: int) -> Any:
    """Starts accelerate's tracker of this name and stores the recipe in it."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    if name not in LOGGER_TYPE_TO_CLASS:
        raise MissingError(
            f"this version of accelerate does not support the tracker `{name}`",
            hint=install_line("-U", "accelerate"),
        )
    kind = TRACKERS[name]
    stored = files.read_json(run.tracker_file) if start and kind.to_store else None
    logged = Logged(name, run.id, run.path, user_dir(name), config, start, stored or {})
    try:
        tracker = kind.make(LOGGER_TYPE_TO_CLASS[name], logged)
        with redirect_stdout(sys.stderr):  # messages of packages are not data
            tracker.start()
        if kind.to_store:
            files.write_json(run.tracker_file, kind.to_store(tracker))
        if kind.recipe == "each" or (kind.recipe and not start):
            tracker.store_init_configuration(flat(config))
    except ImportError as e:
        raise MissingError(f"`--track {name}` needs the package `{name}`", hint=install_line(name)) from e
    except Exception as e:  # no key, a wrong key, no network, no server: each package has its own errors
        raise MissingError(f"`--track {name}`: {first_line(e)}", hint=kind.hint) from e
    return tracker


def flat(tree: Mapping[str, Any]) -> dict[str, int | float | str | bool]:
    """The values of a tree by dotted key, in types that all trackers accept, without None."""
    values = {key: value for key, value in leaves(tree) if value is not None and value != {}}
    return {key: v if isinstance(v, int | float | str) else str(v) for key, v in values.items()}
