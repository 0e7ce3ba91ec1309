"""A sweep: settings of a model that share a budget. All are trained for a short while, then the better half
goes on to twice as many steps, and so on (successive halving, Jamieson and Talwalkar 2016, arXiv:1502.07943).
Optuna draws the settings and keeps the record, by which a killed sweep goes on."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gzcli.core.errors import DivergedError, MissingError, UsageError
from gzcli.core.types import Say
from gzcli.data.packs.open import open_pack, pack_options
from gzcli.launch import launcher
from gzcli.launch.plan import Start, ask
from gzcli.league.loop import draw_curves
from gzcli.store import runs
from gzcli.store.metrics import curves, metric_lines

USUAL = 8  # settings that are drawn of a range
_NUMBER = r"(\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+)"
_RANGE = re.compile(rf"{_NUMBER}\.\.{_NUMBER}")
_BETWEEN = re.compile(r",(?![^\[]*\])")  # commas outside brackets


@dataclass(frozen=True)
class Sweep:
    """Which settings are tried: `key=value` for all, values by key, and ends of a range by key."""

    model: str
    data: str
    budget: float  # seconds of training of all trials together
    trials: int
    flags: Mapping[str, Any]
    fixed: list[str]
    lists: Mapping[str, list[str]]
    ranges: Mapping[str, tuple[float, float]]

    @property
    def name(self) -> str:
        """Sweeps of the same terms are one."""
        terms = json.dumps(asdict(self), sort_keys=True, default=str)
        return f"{Path(self.model).stem}-sweep-{hashlib.sha256(terms.encode()).hexdigest()[:6]}"

    @property
    def rungs(self) -> list[int]:
        """The number of trials that are trained to each length, which doubles."""
        return [self.trials >> rung for rung in range(self.trials.bit_length())]

    @property
    def first(self) -> float:
        """Seconds of the first, short training of each trial."""
        return self.budget / sum(n * max(1, 2**rung // 2) for rung, n in enumerate(self.rungs))


def sweep_of(sets: Iterable[str], trials: int | None, **terms: Any) -> Sweep:
    """The sweep of `key=1,2,3`, all combinations, of `key=1e-4..1e-2`, of which `trials` are drawn, and of
    `key=value`."""
    fixed, lists, ranges = list[str](), dict[str, list[str]](), dict[str, tuple[float, float]]()
    for text in sets:
        key, _, value = text.partition("=")
        if match := _RANGE.fullmatch(value):
            ranges[key] = low, high = float(match[1]), float(match[2])
            if not 0 < low < high:
                raise UsageError(f"`--set {text}` is no range above 0", hint=f"--set {key}=1e-4..1e-2")
        elif len(values := _BETWEEN.split(value)) > 1:
            lists[key] = values
        else:
            fixed.append(text)
    size = math.prod(map(len, lists.values()))
    n = trials or max(USUAL, size) if ranges else size
    if n < 2:
        raise UsageError("there is nothing to try", hint="--set optim.lr=1e-3,3e-3 or optim.lr=1e-4..1e-2")
    return Sweep(fixed=fixed, lists=lists, ranges=ranges, trials=n, **terms)


def play(sweep: Sweep, folder: Path, say: Say) -> dict[str, Any]:
    """Trains the trials. Returns the JSON of `gz sweep`."""
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError as e:
        raise MissingError("`gz sweep` needs the package `optuna`", hint="pip install 'gzcli[sweep]'") from e
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    train_judge(sweep, say)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / "study.journal")))
    sampler = optuna.samplers.RandomSampler(sweep.flags["seed"])
    how: dict[str, Any] = {"storage": storage, "sampler": sampler, "load_if_exists": True}
    study, state = optuna.create_study(study_name=sweep.name, **how), optuna.trial.TrialState
    grid = list(itertools.product(*sweep.lists.values()))
    for i in range(len(study.trials), sweep.trials):
        study.enqueue_trial(dict(zip(sweep.lists, grid[i % len(grid)], strict=True)))
    while study.get_trials(states=[state.WAITING]):
        study.ask()
    trials = [optuna.trial.Trial(study, trial._trial_id) for trial in study.trials]
    settings = [setting_of(trial, sweep) for trial in trials]
    values, alive = dict[int, float](), list(range(sweep.trials))
    for rung, n in enumerate(sweep.rungs):
        for i in alive[n:]:
            study.tell(i, state=state.PRUNED, skip_if_finished=True)
        for i in alive[:n]:
            if (value := study.trials[i].intermediate_values.get(rung)) is None:
                value = figure_after(sweep, i, settings[i], rung, say)
                trials[i].report(value, rung)
                say(f"{i + 1}/{sweep.trials} {' '.join(settings[i])}: {value:.4g}")
            values[i] = value
        alive = sorted(alive[:n], key=lambda i: values[i])
    study.tell(alive[0], values[alive[0]], skip_if_finished=True)
    return result_of(sweep, folder, settings, values, alive[0])


def train_judge(sweep: Sweep, say: Say) -> None:
    """Trains the judge of the data set if the trials are compared by their samples: the first trial would
    train it in its own time, or all would go by the loss."""
    from gzcli.metrics.features import lenet

    recipe = ask(sweep.model, sweep.data, sweep.fixed, sweep.flags).recipe
    (part,) = recipe.parts
    chosen = part.train.best if part.train.best != "auto" else recipe.card.best
    if chosen == "fd" and not part.data.latent:
        lenet(open_pack(part.data.name, **pack_options(part.data), say=say), say=say)


def setting_of(trial: Any, sweep: Sweep) -> list[str]:
    """What a trial sets, `key=value`; it is drawn at the first call."""
    chosen = [f"{key}={trial.suggest_categorical(key, values)}" for key, values in sweep.lists.items()]
    drawn = ((key, trial.suggest_float(key, *ends, log=True)) for key, ends in sweep.ranges.items())
    return [*chosen, *(f"{key}={value:.3g}" for key, value in drawn)]


def figure_after(sweep: Sweep, trial: int, setting: list[str], rung: int, say: Say) -> float:
    """The best validation figure of a trial that is trained for 2^rung times its first length; infinite where
    it diverges."""
    alias, steps = f"{sweep.name}-{trial}", 0
    if run := runs.by_name(alias):
        steps = run.status().get("first_steps", 0) << rung
        request = ask(run.id, None, (), {"train.steps": steps or None})
    else:
        flags = {**sweep.flags, "train.minutes": sweep.first / 60, "train.clock": "cpu"}
        request = ask(sweep.model, sweep.data, [*sweep.fixed, *setting], flags)
    start = Start(request, launcher.plan(request.recipe.launch, every_gpu=True), run, alias)
    try:
        if run is None or run.state != "finished" or run.tree()["train"]["steps"] < steps:
            run = start.train(start.recipe(say=say), say=say)
    except DivergedError:
        return math.inf
    if rung == 0:
        run.update(first_steps=run.status()["step"])
    if run.best is None:
        raise UsageError("no validation figure chooses among the settings", hint="--set train.best=loss")
    return run.best.value


def result_of(
    sweep: Sweep, folder: Path, settings: list[list[str]], values: Mapping[int, float], best: int
) -> dict[str, Any]:
    rows, lines, metric, picture = list[dict[str, Any]](), dict[str, Any](), "", folder / "sweep.png"
    for i, setting in enumerate(settings):
        state = "diverged" if math.isinf(values[i]) else "best" if i == best else "stopped"
        row: dict[str, Any] = {"setting": setting, "value": values[i], "state": state}
        if run := runs.by_name(f"{sweep.name}-{i}"):  # else it was removed since
            row |= {"run": run.id, "steps": run.status()["step"], "seconds": run.training_seconds}
            metric = run.best.metric if run.best else metric
            points = curves(metric_lines(run.path)).get(f"val_{metric}", [])
            lines[" ".join(setting)] = [(row["seconds"] * step / row["steps"], y, None) for step, y in points]
        rows.append(row)
    shown, title = {key: line for key, line in lines.items() if line}, f"{sweep.model} on {sweep.data}"
    draw_curves(picture, shown, x="seconds of training", y=f"validation {metric}", floor=None, title=title)
    rows.sort(key=lambda row: (row["state"] != "best", -row.get("steps", 0), row["value"]))
    facts = {"model": sweep.model, "data": sweep.data, "budget": sweep.budget, "metric": metric}
    return facts | {"picture": str(picture), "trials": rows}
