"""A sweep: settings of a model that share a budget. All are trained for a short time, then the better half
for twice as many steps, and so on (successive halving, Jamieson and Talwalkar 2016, arXiv:1502.07943). Draws
depend only on the seed, trials are named runs, and `sweep.json` records their values. The same call therefore
resumes an interrupted sweep.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate, pairwise, product
from pathlib import Path
from typing import Any, Literal

from gzcli.core import signals
from gzcli.core.errors import DamagedError, DivergedError, GzError, Interrupted, MissingError, UsageError
from gzcli.core.hints import Option, advice, setting
from gzcli.core.sections import Part
from gzcli.core.types import Report, Say, silent, unreported
from gzcli.data.packs.augment import patch_of
from gzcli.data.packs.open import facts_of, pack_options, peek
from gzcli.data.sets.registry import locate
from gzcli.launch.cost import Cost, judge_networks
from gzcli.launch.plan import Request, ask, trained
from gzcli.league.league import MIN_ENTRY_SECONDS, least_budget
from gzcli.league.loop import Point, draw_curves
from gzcli.league.training import RESUME_HINT, Training, digest, stopped, train_judges
from gzcli.metrics import networks
from gzcli.recipe import schema
from gzcli.recipe.yaml import flow
from gzcli.store import files, runs
from gzcli.store.metrics import curves, metric_lines
from gzcli.store.paths import user_dir
from gzcli.store.runs import Run

DEFAULT_TRIALS = 8  # settings drawn from a range
MAX_SETTINGS = 1000  # most settings of a sweep
MAX_DRAWS_PER_SETTING = 100  # draws tried for each setting until it differs from the others
_NUMBER = r"(\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+)"
_RANGE = re.compile(rf"{_NUMBER}\.\.{_NUMBER}")
_LENGTH = ("train.steps", "train.minutes")  # keys set by the budget
Setting = tuple[str, ...]  # `key=value` of each swept key
State = Literal["best", "stopped", "diverged", "failed"]


@dataclass(frozen=True)
class Sweep:
    """The settings to try: `key=value` for all trials, values by key, and ends of a range by key."""

    model: str
    data: str
    budget: float  # seconds of training of all trials together
    trials: int
    flags: Mapping[str, Any]
    fixed: list[str]
    lists: Mapping[str, list[str]]
    ranges: Mapping[str, tuple[float, float]]
    settings: tuple[Setting, ...] = ()  # of the trials

    @property
    def name(self) -> str:
        """A name that is equal for equal terms. Without ranges, it is derived from the other terms alone, as
        in earlier versions."""
        terms = {key: value for key, value in asdict(self).items() if key != "settings" or self.ranges}
        return f"{Path(self.model).stem}-sweep-{digest(terms, 6)}"

    @property
    def folder(self) -> Path:
        return user_dir("sweeps") / self.name

    @property
    def rungs(self) -> list[int]:
        """The number of trials trained to each length; lengths double."""
        return [self.trials >> rung for rung in range(self.trials.bit_length())]

    @property
    def first(self) -> float:
        """Seconds of the first, short training of each trial."""
        return self.budget / sum(n * max(1, 2**rung // 2) for rung, n in enumerate(self.rungs))

    def request(self, trial: int, steps: int | None = None) -> Request:
        """The training of a trial, for this number of steps or, by default, for its first share of the
        budget."""
        length = {"train.steps": steps} if steps else {"train.minutes": self.first / 60}
        sets = [*self.fixed, *self.settings[trial]]
        return ask(self.model, self.data, sets, {**self.flags, **length, "train.clock": "cpu"})

    def alias(self, trial: int) -> str:
        return f"{self.name}-{trial}"


@dataclass(frozen=True)
class Trial:
    """The outcome of a setting.

    setting: `key=value` for each swept key.
    state: "best", "stopped" at a shorter length than the best, "diverged", or "failed" with an `error`.
    value: the best validation metric, or None.
    run: id of its run; None if the run was removed.
    """

    setting: Setting
    state: State
    value: float | None
    run: str | None = None
    steps: int | None = None
    seconds: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep: its trials, the best first, by a validation metric (lower is better)."""

    model: str
    data: str
    budget: float  # seconds of training of all trials together
    metric: str
    picture: str  # path of the curves of all trials
    trials: tuple[Trial, ...]
    fixed: tuple[str, ...]  # `key=value` of all trials

    @property
    def best(self) -> Trial:
        return self.trials[0]


# ---------------------------------------------------------------------------- which settings


def sweep_of(
    model: str,
    data: str | None,
    sets: Iterable[str],
    *,
    budget: float,
    trials: int | None = None,
    flags: Mapping[str, Any],
    progress: Report = unreported,
    dry_run: bool = False,
) -> Sweep:
    """The sweep of settings such as `key=1,2,3` (all combinations), `key=1e-4..1e-2` (`trials` values are
    drawn) and `key=value`. Raises UsageError for every mistake that is detectable before a training. With
    `dry_run` no images are fetched, so they are not checked."""
    fixed, lists, ranges = parsed(sets)
    recipe = ask(model, data, fixed, flags).recipe
    if len(recipe.parts) > 1:
        raise UsageError(f"a sweep cannot train recipes with stages, such as `{model}`")
    size = math.prod(map(len, lists.values()))
    n = trials or max(DEFAULT_TRIALS, size) if ranges else size
    if n > MAX_SETTINGS:
        message = f"there are {n:,} settings, but a sweep tries at most {MAX_SETTINGS:,}"
        raise UsageError(message, hint=advice("use fewer values, or ranges with {}", Option("trials", "N")))
    integers = {key for key in ranges if schema.takes_integers(schema.schema(recipe.card), key)}
    settings = drawn(lists, ranges, integers, n, flags["seed"])
    if trials and len(settings) < n:
        message = f"`--trials {n}`: these ranges have only {len(settings)} different settings"
        raise UsageError(message, hint=Option("trials", len(settings)))
    if len(settings) < 2:
        raise UsageError(
            "a sweep needs at least two settings",
            hint=advice("{}, or {}", setting("optim.lr", "1e-3,3e-3"), setting("optim.lr", "1e-4..1e-2")),
        )
    sweep = Sweep(model, recipe.data.name, budget, len(settings), flags, fixed, lists, ranges, settings)
    if sweep.first < MIN_ENTRY_SECONDS:
        message = (
            f"the budget gives each of {sweep.trials} trials only {sweep.first:.1g} s in the first round"
        )
        hint = advice("use {} or more, or fewer values", Option("budget", least_budget(budget, sweep.first)))
        raise UsageError(message, hint=hint)
    check(sweep, progress, dry_run)
    return sweep


def parsed(
    sets: Iterable[str],
) -> tuple[list[str], dict[str, list[str]], dict[str, tuple[float, float]]]:
    """The settings of all trials, the values by key and the ends of ranges by key."""
    fixed, lists, ranges = list[str](), dict[str, list[str]](), dict[str, tuple[float, float]]()
    typed = dict[str, str]()
    for text in sets:
        key, _, value = text.partition("=")
        key = key.strip()
        if key in typed:
            both = f"{typed[key]},{value.strip()}"
            hint = "omit one of them" if _RANGE.search(both) else setting(key, both)
            raise UsageError(f"`--set {text}`: `{key}` is set twice", hint=hint)
        typed[key] = value.strip()
        if key in _LENGTH:
            raise UsageError(f"`--set {text}`: the length of a trial follows from `--budget`")
        if match := _RANGE.fullmatch(value.strip()):
            ranges[key] = low, high = float(match[1]), float(match[2])
            if not 0 < low < high < math.inf:
                message = f"`--set {text}` is not a range of numbers above 0"
                raise UsageError(message, hint=setting(key, "1e-4..1e-2"))
        elif len(values := listed_values(value)) > 1:
            lists[key] = values
        else:
            fixed.append(text)
    return fixed, lists, ranges


def listed_values(text: str) -> list[str]:
    """The values that commas outside brackets separate."""
    depths = accumulate((char == "[") - (char == "]") for char in text)
    cuts = [i for i, (char, depth) in enumerate(zip(text, depths, strict=True)) if char == "," and depth <= 0]
    return [text[i + 1 : j].strip() for i, j in pairwise([-1, *cuts, len(text)])]


def drawn(
    lists: Mapping[str, list[str]],
    ranges: Mapping[str, tuple[float, float]],
    integers: set[str],
    n: int,
    seed: int,
) -> tuple[Setting, ...]:
    """n different settings, or fewer if there are no more. They cycle through the combinations of the lists;
    values of ranges are drawn log-uniformly."""
    grid = [tuple(map("=".join, zip(lists, values, strict=True))) for values in product(*lists.values())]
    if not ranges:
        return tuple(grid)
    draw, settings, tries = random.Random(seed), dict[Setting, None](), MAX_DRAWS_PER_SETTING * n
    while len(settings) < n and (tries := tries - 1):
        setting = [*grid[len(settings) % len(grid)]]
        for key, (low, high) in ranges.items():
            value = math.exp(draw.uniform(math.log(low), math.log(high)))
            setting.append(f"{key}={round(value)}" if key in integers else f"{key}={value:.3g}")
        settings[tuple(setting)] = None
    return tuple(settings)


def check(sweep: Sweep, progress: Report, dry_run: bool) -> None:
    """Raises UsageError for a setting that cannot be trained, for two equal ones, and for settings whose
    validation metrics cannot be compared."""
    requests = [sweep.request(i) for i in range(sweep.trials)]
    shared: dict[str, Any] = {}
    for request in requests:
        for name, value in validation(request.recipe.parts[0]).items():
            if shared.setdefault(name, value) != value:
                message = f"`{name}` {flow(shared[name])} and {flow(value)} have no common validation metric"
                raise UsageError(message, hint=f"run a sweep for each `{name}`")
    seen: dict[str, Setting] = {}
    for request, words in zip(requests, sweep.settings, strict=True):
        recipe = request.recipe if dry_run else Training.of(request, progress=progress).recipe
        if recipe.parts[0].train.best == "none":
            raise UsageError(
                "the sweep needs a validation metric to compare settings", hint=setting("train.best", "loss")
            )
        key = json.dumps(trained(recipe.tree()), sort_keys=True)
        if key in seen:
            raise UsageError(f"`{' '.join(seen[key])}` and `{' '.join(words)}` are the same setting")
        seen[key] = words


def validation(part: Part) -> dict[str, Any]:
    """The keys of a recipe that decide what its validation metric measures, with their values."""
    form = {**asdict(part.data), "augment": patch_of(part.data.augment)}
    del form["n"]  # number of training images
    return {f"data.{key}": value for key, value in form.items()} | {
        "train.best": part.train.best,
        "train.eval_images": part.train.eval_images,
    }


# ---------------------------------------------------------------------------- the record


@dataclass
class Record:
    """The record of a trial.

    steps: of its first, short training; None before that.
    values: its best validation metric at each length; infinite if it diverged.
    """

    steps: int | None = None
    values: list[float] = field(default_factory=list)
    error: GzError | None = None  # it failed in this process; the next one tries it again

    @property
    def last(self) -> float:
        return self.values[-1] if self.values else math.inf


def read(sweep: Sweep, path: Path, say: Say) -> list[Record]:
    """The records of the trials. A damaged file is rebuilt from the runs."""
    fresh = [Record() for _ in sweep.settings]
    try:
        tree = files.read_json(path)
        if tree is None:
            return fresh
        if [tuple(row["setting"]) for row in tree["trials"]] != list(sweep.settings):
            raise DamagedError(f"`{path}` is damaged: its settings differ")
        rows = [Record(row["steps"], [*map(_value, row["values"])]) for row in tree["trials"]]
        if all(isinstance(row.steps, int | None) for row in rows):
            return rows
    except DamagedError as error:
        say(f"{error.message}; gz rebuilds it from the runs of the trials")
        return fresh
    except (TypeError, ValueError, KeyError, AttributeError):
        pass
    say(f"`{path}` is damaged; gz rebuilds it from the runs of the trials")
    return fresh


def _value(value: Any) -> float:
    if value is not None and not math.isfinite(value):
        raise ValueError("a metric is not finite")
    return math.inf if value is None else float(value)


def write(sweep: Sweep, path: Path, records: Iterable[Record]) -> None:
    trials = [
        {
            "setting": setting,
            "steps": record.steps,
            "values": [None if math.isinf(value) else value for value in record.values],
        }
        for setting, record in zip(sweep.settings, records, strict=True)
    ]
    files.write_json(path, {"schema": 1, "sweep": sweep.name, "trials": trials})


# ---------------------------------------------------------------------------- the trainings


def run_sweep(sweep: Sweep, say: Say = silent) -> SweepResult:
    """Trains the trials. A trial that diverges or fails does not stop the others. Raises the error of the
    first trial if none has a value, and MissingError for a fault that affects all trials, such as a full
    disk."""
    folder = sweep.folder
    with files.lock(folder / ".lock", wait=False) as locked, signals.noted() as heard:
        if not locked:
            raise UsageError(
                "another `gz` is running this sweep", hint=f"wait for it to finish; it writes to `{folder}`"
            )
        path = folder / "sweep.json"
        records = read(sweep, path, say)
        if not all(record.values for record in records):
            train_judge(sweep, say)
        alive = list(range(sweep.trials))
        for rung, n in enumerate(sweep.rungs):
            alive = alive[:n]
            for i in alive:
                if len(records[i].values) > rung:
                    continue
                if heard:
                    raise stopped(heard[0])
                extend(sweep, i, rung, records[i], say)
                write(sweep, path, records)
            reached = [i for i in alive if len(records[i].values) > rung]
            alive = sorted(
                (i for i in reached if math.isfinite(records[i].values[rung])),
                key=lambda i: records[i].values[rung],
            )
        return result_of(sweep, records)


def judged_part(sweep: Sweep) -> Part | None:
    """The part to train if the trials are compared by their samples, otherwise None."""
    recipe = ask(sweep.model, sweep.data, sweep.fixed, sweep.flags).recipe
    (part,) = recipe.parts
    chosen = part.train.best if part.train.best != "auto" else recipe.card.best
    return part if chosen == "fd" and not part.data.latent else None


def train_judge(sweep: Sweep, say: Say) -> None:
    """Trains the judge of the data set if the trials are compared by their samples. Otherwise the first trial
    would train it in its own time, or all trials would be compared by the loss."""
    if part := judged_part(sweep):
        train_judges([part], say)


def judge_cost(sweep: Sweep) -> Cost:
    """The cost of `train_judge`."""
    if not (part := judged_part(sweep)):
        return Cost()
    data = part.data
    data_set = locate(data.name)
    facts = facts_of(data_set, size=data.size, channels=data.channels)
    if facts and networks.published_judges(facts) and part.train.best != "fd":
        return Cost()
    return judge_networks(("fd",), data_set, peek(data_set, **pack_options(data)))


def extend(sweep: Sweep, i: int, rung: int, record: Record, say: Say) -> None:
    """Trains a trial for 2^rung times its first length, and records its value."""
    words = f"{i + 1}/{sweep.trials} {' '.join(sweep.settings[i])}"
    try:
        value = value_at(sweep, i, rung, record, lambda text: say(f"{words}: {text}"))
    except Interrupted as error:
        error.advise(RESUME_HINT)
        raise
    except DivergedError:
        record.values.append(math.inf)
        say(f"{words}: diverged")
    except MissingError:
        raise
    except GzError as error:
        if number := signals.heard():  # the signal that ended its command
            raise stopped(number) from error
        record.error = error
        say(f"{words}: failed: {error.message}")
    else:
        record.values.append(value)
        say(f"{words}: {value:.4g}")


def value_at(sweep: Sweep, i: int, rung: int, record: Record, say: Say) -> float:
    """The best validation metric of a trial at this length. If its run was removed, the trial is trained to
    this length again."""
    steps = (record.steps or 0) << rung if rung else 0
    run = Training.of(sweep.request(i, steps), say, alias=sweep.alias(i)).train(say)
    if not record.steps:
        # of a run trained further, for example by a sweep whose record is lost
        record.steps = run.status().get("first_steps") or run.status()["step"]
    run.update(first_steps=record.steps)
    if (best := run.best) is None:
        raise UsageError(
            "the sweep needs a validation metric to compare settings", hint=setting("train.best", "loss")
        )
    last = record.steps << rung
    if best.step <= last:
        return best.value
    points = curves(metric_lines(run.path)).get(f"val_{best.metric}", [])
    return min((value for step, value in points if step <= last), default=best.value)


# ---------------------------------------------------------------------------- what came out


def result_of(sweep: Sweep, records: list[Record]) -> SweepResult:
    """The trials, those with the longest training first and then by their last values, and an image of their
    curves. Raises the first trial's error if none has a value."""
    order = sorted(range(sweep.trials), key=lambda i: (-len(records[i].values), records[i].last))
    able = [i for i in order if math.isfinite(records[i].last) and not records[i].error]
    if not able:
        failed = next((record.error for record in records if record.error), None)
        message = f"none of the {sweep.trials} trials has a result"
        if failed:
            raise type(failed)(f"{message}: {failed.message}", hint=failed.hint)
        hint = "use smaller learning rates, or another `train.precision`"
        raise DivergedError(f"{message}: all diverged", hint=hint)
    rows, lines, metric = list[Trial](), dict[str, list[Point]](), ""
    for i in (*able, *(i for i in order if i not in able)):
        setting, record = sweep.settings[i], records[i]
        state: State = "best" if i == able[0] else "stopped"
        row = Trial(setting, state, record.last if i in able else None)
        if record.error:
            row = replace(row, state="failed", error=record.error.message)
        elif i not in able:
            row = replace(row, state="diverged")
        if run := runs.by_name(sweep.alias(i)):
            row, metric = with_run(row, run), run.best.metric if run.best else metric
            points = curves(metric_lines(run.path)).get(f"val_{metric}", [])
            a_step = (row.seconds or 0) / (row.steps or 1)
            lines[" ".join(setting)] = [(a_step * step, value, 0.0) for step, value in points]
        rows.append(row)
    picture, title = sweep.folder / "sweep.png", f"{sweep.model} on {sweep.data}"
    shown = {key: line for key, line in lines.items() if line}
    draw_curves(picture, shown, x="seconds of training", y=f"validation {metric}", floor=None, title=title)
    facts = (sweep.model, sweep.data, sweep.budget, metric, str(picture), tuple(rows), tuple(sweep.fixed))
    return SweepResult(*facts)


def with_run(row: Trial, run: Run) -> Trial:
    status = run.status()
    return replace(row, run=run.id, steps=status.get("step"), seconds=run.training_seconds)
