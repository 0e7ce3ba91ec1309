"""What is expected of a training before it starts: the size of its models, and the memory and time of a step
as they were measured on this machine. What is not in the cache is found by the engine's `forecast`, in a
process of its own: torch is not loaded here.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gzcli.core import jobs, signals
from gzcli.core.devices import PEAKS, cpu_name, gpu_name
from gzcli.core.errors import DamagedError, GzError, Interrupted, UsageError
from gzcli.core.jobs import TrialJob
from gzcli.core.sections import LaunchSection, Part, part_of
from gzcli.core.types import Say
from gzcli.launch import launcher
from gzcli.launch.launcher import Plan, usable_gpus
from gzcli.models import catalog
from gzcli.recipe.recipe import Recipe
from gzcli.store import files, runs
from gzcli.store.paths import cache_dir
from gzcli.store.run_folder import Run
from gzcli.version import __version__

WEEK = 7 * 86_400  # seconds after which a plan asks before it starts
PAUSES = 0.1  # share of the time that pictures, validation and checkpoints take; `--minutes` counts so too
# The share of an H100's peak that a net of this zoo is taken to reach.
SHARE, H100 = 0.2, 1e12 * PEAKS["H100"]["bf16"]
# Keys of a recipe, and of its `train` section, on which neither the cost nor the time of a step depends.
APART = ("seed", "about", "scale", "sample", "ood", "bench", "params")
PAUSING = ("log_every", "sample_every", "samples", "eval_every", "checkpoint_every", "keep", "best", "init")

Measure = Callable[[TrialJob], Sequence[Mapping[str, Any]]]  # does a job and returns its rows


@dataclass(frozen=True)
class Forecast:
    """What is expected of the training of one model; None where it is not known."""

    part: Part  # its recipe, with the processes that train it
    params: int | None = None  # parameters of the model
    flops: float | None = None  # floating-point operations of a step of the global batch
    step: float | None = None  # seconds of a step on this machine
    bytes: int | None = None  # the most that a process took in a step here, scaled to the recipe's batch
    lacking: str | None = None  # why something is not known
    refused: UsageError | None = None  # the mistake in the recipe by which the model cannot be built

    @property
    def seconds(self) -> float | None:
        """Seconds of the training here, with its pauses."""
        if self.part.train.minutes:
            return 60 * self.part.train.minutes
        return None if self.step is None else self.part.train.steps * self.step / (1 - PAUSES)

    @property
    def gpus(self) -> int:
        """The GPUs for which the time on H100s is given: those of all machines, or one where none is used."""
        return (self.part.launch.processes or 1) if self.part.launch.gpus else 1

    def on_h100s(self, gpus: int) -> float | None:
        """Seconds of the training on so many H100s, at a fifth of their peak."""
        return self.flops and self.part.train.steps * self.flops / (gpus * H100 * SHARE) / (1 - PAUSES)

    def steps_in(self, minutes: float) -> int | None:
        """About how many steps `--minutes` would choose."""
        return None if self.step is None else max(1, int(60 * minutes * (1 - PAUSES) / self.step))


def together(values: Sequence[float | None]) -> float | None:
    """The sum; None where one is not known, or there are none."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) if numbers and len(numbers) == len(values) else None


def shares(stages: Sequence[Forecast]) -> list[float]:
    """How a common time is split over stages: one half in equal parts, as a tokenizer of few steps would draw
    badly under any prior, the other by the operations of each in a training of its own length, in steps of
    1/20. Equally where these are not known."""
    equal = 1 / len(stages)
    work = [(one.flops or 0.0) * one.part.train.steps for one in stages]
    if not all(work):
        return [equal] * len(stages)
    rounded = [round(20 * each / sum(work)) / 20 for each in work]
    return [(equal + share / sum(rounded)) / 2 for share in rounded]


def expect(
    recipe: Recipe,
    plan: Plan,
    shape: Mapping[str, Any] | None,
    *,
    measure: Measure | None,
    timed: bool,
    other: Recipe | None = None,
) -> tuple[list[Forecast], list[Forecast]]:
    """What is expected of a recipe's parts, and of those of another one, whose time is estimated from it."""
    if shape is None:
        return [Forecast(part, lacking="the data set is not here") for part in recipe.parts], []
    here = plan.gpus <= (usable_gpus().usable if plan.gpus else 0)
    rows = [row_of(part, recipe, plan, shape, timed=timed and here) for part in recipe.parts]
    if other:
        rows += [row_of(part, other, plan, shape, timed=False) for part in other.parts]
    unknown = [row for row in rows if not row["result"] or (row["timed"] and not row["result"]["timed"])]
    if unknown and measure and os.environ.get("GZ_TRIAL") != "0":
        gpus = min(1, plan.gpus) if here else 0
        launch = LaunchSection(gpus=gpus or None, cpu=not gpus, threads=plan.threads)
        for row, result in zip(unknown, measure(TrialJob(tuple(unknown), shape, launch=launch)), strict=True):
            row["result"] = dict(result)
            if result["params"] is not None:
                cache_dir("costs").mkdir(parents=True, exist_ok=True)
                files.write_json(cached(row["key"]), row["result"])
    forecasts = [forecast_of(row) for row in rows]
    ours, others = forecasts[: len(recipe.parts)], forecasts[len(recipe.parts) :]
    speed = ours[-1].step / ours[-1].flops if ours[-1].step and ours[-1].flops else None
    estimated = [
        replace(one, step=speed * one.flops) if speed and one.flops and one.step is None else one
        for one in others
    ]
    return ours, estimated


def row_of(
    part: Part, recipe: Recipe, plan: Plan, shape: Mapping[str, Any], *, timed: bool
) -> dict[str, Any]:
    """A part as `TrialJob.parts` has it, with its name in the cache and what is there."""
    parts = {stage.stage: stage for stage in recipe.parts}
    for name, reused in recipe.reused.items():
        if run := runs.by_name(reused):
            parts[name] = part_of(run.serving.tree(), name)
    card = catalog.card(part.model)
    stages = {name: parts[name].tree() for name in card.stages if name in parts}
    launch = replace(part.launch, processes=plan.processes, gpus=plan.gpus, threads=plan.threads)
    part = replace(part, launch=replace(launch, cpu=not plan.gpus, machines=None).alone())
    tree = {key: value for key, value in part.tree().items() if key not in APART}
    tree["train"] = {key: value for key, value in tree["train"].items() if key not in PAUSING}
    program = hashlib.sha256(card.path.read_bytes()).hexdigest()
    facts = (tree, *stages.values(), shape, machine_of(plan), program, __version__, version("torch"))
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:20]
    row = {"stage": part.stage, "tree": part.tree(), "stages": stages, "timed": timed}
    return row | {"key": key, "result": recall(key)}


def forecast_of(row: Mapping[str, Any]) -> Forecast:
    """What is known of a part."""
    result = row["result"]
    return Forecast(
        part_of(row["tree"], row["stage"]),
        params=result.get("params"),
        flops=result.get("flops"),
        step=result.get("seconds"),
        bytes=result.get("bytes"),
        lacking=result.get("error"),
        refused=UsageError(result["error"], hint=result["refused"] or None) if "refused" in result else None,
    )


def measured(job: TrialJob, say: Say) -> Sequence[Mapping[str, Any]]:
    """The rows of a job that is done in a process of its own. What keeps it from being done is the `error` of
    each: a plan is no reason not to start."""
    costs = cache_dir("costs")
    folder = files.part_path(costs / "job")
    try:
        costs.mkdir(parents=True, exist_ok=True)
        files.sweep(costs)
        folder.mkdir()
        tried = any(row["timed"] for row in job.parts)
        say("planning: " + ("a step is tried on this machine" if tried else "finding what a step costs"))
        jobs.write(folder, job)
        with signals.noted() as received:
            try:
                launcher.run(folder, launcher.plan(job.launch, every_gpu=False), launcher=False, mode="quiet")
            finally:
                if received:  # whatever the engine made of it: what is planned must not start
                    number = received[0]
                    raise Interrupted(f"stopped by {signals.name_of(number)}", signum=number)
        return files.read_json(Run(folder).result_file)["parts"]
    except Interrupted:
        raise
    except GzError as e:
        why = e.message
    except OSError as e:
        why = f"`{costs}` cannot be written ({os.strerror(e.errno or 0).lower()})"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return [{"params": None, "error": why} for _ in job.parts]


def cached(key: str) -> Path:
    """The file of a forecast in the cache."""
    return cache_dir("costs", f"{key}.json")


def recall(key: str) -> dict[str, Any]:
    """What the cache has under a key; {} where that is nothing, or damaged."""
    try:
        row = files.read_object(cached(key))
    except DamagedError:
        return {}
    numbers = (row.get(name) for name in ("params", "flops", "seconds", "bytes"))
    whole = "timed" in row and all(value is None or isinstance(value, int | float) for value in numbers)
    return row if whole else {}


def machine_of(plan: Plan) -> str:
    """This machine, as far as the time of a step depends on it: its GPU, or its CPU and the threads."""
    return gpu_name() if plan.gpus else f"{cpu_name()}, {plan.threads} threads"
