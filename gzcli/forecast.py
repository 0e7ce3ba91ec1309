"""What is expected of a training before it starts: size, memory and time of each of its models. No heavy
import: what is not in the cache is found by the engine, in a process of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from gzcli.core.errors import UsageError
from gzcli.core.jobs import TrialJob
from gzcli.core.parts import Part, part_of
from gzcli.core.sections import LaunchSection
from gzcli.launch import costs
from gzcli.launch.costs import PAUSES, Cost
from gzcli.launch.launcher import Plan, usable_gpus
from gzcli.models import catalog
from gzcli.recipe.recipe import Recipe
from gzcli.store import runs

WEEK = 7 * 86_400  # seconds after which a plan asks before it starts
FREE = 0.9  # share of a GPU's memory that a step may take: the rest is for its libraries, and for gaps

R = TypeVar("R", bound=Recipe)
Measure = Callable[[TrialJob], Mapping[str, Any]]  # does a job and returns its result


@dataclass(frozen=True)
class Forecast:
    """What is expected of the training of one model.

    part: its recipe, with the processes that train it.
    cost: what a step costs; None: not known.
    step: seconds of a step on this machine; None: not known.
    lacking: why something is not known; None: all is.
    refused: the mistake in the recipe by which the model cannot be built; None: there is none.
    """

    part: Part
    cost: Cost | None = None
    step: float | None = None
    lacking: str | None = None
    refused: UsageError | None = None

    @property
    def seconds(self) -> float | None:
        """Seconds of the training here, with its pauses; None: not known."""
        if self.part.train.minutes:
            return 60 * self.part.train.minutes
        return None if self.step is None else self.part.train.steps * self.step / (1 - PAUSES)

    @property
    def gpus(self) -> int:
        """The GPUs that the time on H100s is told of: those of all machines, or one where none is used."""
        return (self.part.launch.processes or 1) if self.part.launch.gpus else 1

    def on_h100s(self, gpus: int) -> float | None:
        """About how many seconds the training takes on so many H100s; None: not known."""
        return None if self.cost is None else self.part.train.steps * self.cost.on_h100s(gpus) / (1 - PAUSES)

    def steps_in(self, minutes: float) -> int | None:
        """About how many steps `--minutes` would choose; None: not known."""
        return None if self.step is None else max(1, int(60 * minutes * (1 - PAUSES) / self.step))


def together(values: list[float | None]) -> float | None:
    """The sum; None where one is not known, or there are none."""
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def shares(stages: Sequence[Forecast]) -> list[float]:
    """How a common time is split over stages: one half in equal parts, as a tokenizer of few steps would draw
    badly under any prior, the other by the operations of each in a training of its own length, in steps of
    1/20. Equally where these are not known.
    """
    equal = 1 / len(stages)
    work = [one.cost.flops * one.part.train.steps if one.cost else 0.0 for one in stages]
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
    """What is expected of a recipe's parts, and of those of another one, whose time is estimated from it.

    plan: the processes.
    shape: description of the data set, as `TrialJob.info` has it; None: not known.
    measure: finds what is not in the cache; None: that is left out.
    timed: whether a step is tried where its time is not known.
    other: the same model at another scale.
    """
    if shape is None:
        return [Forecast(part, lacking="the data set is not here") for part in recipe.parts], []
    if os.environ.get("GZ_TRIAL") == "0":
        measure = None
    inquiry = Inquiry(shape, plan, timed and plan.gpus <= _usable(plan))
    for part in recipe.parts:
        inquiry.add(part, recipe, tried=True)
    own_times = [inquiry.forecast(i).step for i in range(len(recipe.parts))]
    if other and (inquiry.timed or None not in own_times):  # else there is no time to tell of it
        for part in other.parts:
            inquiry.add(part, other, tried=False)
    if measure and inquiry.open:
        inquiry.take(measure(inquiry.job()))
    found = [inquiry.forecast(i) for i in range(len(inquiry.parts))]
    own, others = found[: len(recipe.parts)], found[len(recipe.parts) :]
    return own, [scaled(forecast, own[-1]) for forecast in others]


def scaled(forecast: Forecast, by: Forecast) -> Forecast:
    """The forecast with the time of a step that another one's speed gives."""
    if forecast.step is not None or not (forecast.cost and by.cost and by.step):
        return forecast
    return replace(forecast, step=by.step * forecast.cost.flops / max(1.0, by.cost.flops))


class Inquiry:
    """The parts whose cost is asked for, and what of it is in the cache.

    shape: description of the data set.
    plan: the processes.
    timed: whether steps are tried.
    """

    def __init__(self, shape: Mapping[str, Any], plan: Plan, timed: bool):
        self.shape, self.plan, self.timed = shape, plan, timed
        self.machine = costs.machine_of(plan.threads, plan.gpus)
        self.parts: list[Part] = []
        self.keys: list[str] = []
        self.rows: list[dict[str, Any]] = []  # of the job
        self.errors: dict[int, str] = {}  # by the index of a part
        self.refused: dict[int, UsageError] = {}

    def add(self, part: Part, recipe: Recipe, *, tried: bool) -> None:
        """Asks for the cost of a part, and where a step is to be tried for its time.

        recipe: the recipe of the part.
        tried: whether a step is tried, if its time is not known.
        """
        stages = {name: self.here(built) for name, built in built_on(part, recipe).items()}
        part = self.here(part)
        key = costs.key_of(part, self.shape, stages)
        timed = tried and self.timed and costs.kept_seconds(key, self.machine) is None
        for name, built in stages.items():
            self.rows.append(row_of(name, built, own=False, asked=False, timed=False))
        asked = costs.kept(key) is None or timed
        self.rows.append(row_of(part.stage, part, own=True, asked=asked, timed=timed))
        self.parts.append(part)
        self.keys.append(key)

    def here(self, part: Part) -> Part:
        """The part with the processes of the plan."""
        plan = self.plan
        launch = replace(part.launch, processes=plan.processes, gpus=plan.gpus, threads=plan.threads)
        return replace(part, launch=replace(launch, cpu=not plan.gpus, machines=None).alone())

    @property
    def open(self) -> bool:
        """Whether anything is not in the cache."""
        return any(row["asked"] for row in self.rows)

    def job(self) -> TrialJob:
        """The job that finds what is not in the cache."""
        launch = LaunchSection(gpus=min(1, self.plan.gpus), cpu=not self.plan.gpus, threads=self.plan.threads)
        there = launch if self.plan.gpus <= _usable(self.plan) else replace(launch, gpus=None, cpu=True)
        return TrialJob(tuple(self.rows), self.shape, there)

    def take(self, result: Mapping[str, Any]) -> None:
        """Keeps what the job has found."""
        asked = (i for i, row in enumerate(r for r in self.rows if r["own"]) if row["asked"])
        for i, row in zip(asked, result["parts"], strict=True):
            if row["error"]:
                self.errors[i] = row["error"]
            if "refused" in row:
                self.refused[i] = UsageError(row["error"], hint=row["refused"] or None)
            if row["cost"]:
                costs.keep(self.keys[i], costs.cost_from(row["cost"]), self.machine, row["seconds"])

    def forecast(self, i: int) -> Forecast:
        """What is known of the part that was added as number i."""
        key = self.keys[i]
        seconds = costs.kept_seconds(key, self.machine)
        return Forecast(self.parts[i], costs.kept(key), seconds, self.errors.get(i), self.refused.get(i))


def _usable(plan: Plan) -> int:
    """GPUs that are here, as far as the plan has any."""
    return usable_gpus().usable if plan.gpus else 0


def row_of(stage: str, part: Part, **flags: bool) -> dict[str, Any]:
    """A part in a job."""
    return {"stage": stage, "tree": part.tree(), **flags}


def built_on(part: Part, recipe: Recipe) -> dict[str, Part]:
    """The parts that the model of a part is built on, by stage: of the recipe, or of the run that is used in
    a stage's place."""
    found = {}
    for name in catalog.card(part.model).stages:
        if name in recipe.reused:
            run = runs.by_name(recipe.reused[name])
            if run:
                found[name] = part_of(run.serving.tree(), name)
        else:
            found[name] = next(own for own in recipe.parts if own.stage == name)
    return found


# ---------------------------------------------------------------------------- memory


def split_to_fit(recipe: R, forecasts: Sequence[Forecast], there: int | None) -> tuple[R, list[str]]:
    """The recipe with its batches in as many parts (`train.accumulate`) as fit in a GPU's memory, and what
    was changed, for people.

    there: bytes of the GPU; None: not known, and nothing is changed.
    """
    parts, said = [], []
    for part, forecast in zip(recipe.parts, forecasts, strict=True):
        cost = forecast.cost
        pieces = cost.pieces_for(int(FREE * there)) if cost and there else None
        if pieces and pieces > part.train.accumulate:
            share = part.train.batch_size // pieces
            said.append(f"a batch of {part.train.batch_size} does not fit the GPU: {pieces} parts of {share}")
            part = replace(part, train=replace(part.train, accumulate=pieces))
        parts.append(part)
    return replace(recipe, parts=tuple(parts)), said
