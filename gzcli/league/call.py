"""Leagues, races and sweeps from Python: `gzcli.league`, `gzcli.which` and `gzcli.sweep`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from gzcli.core import streams
from gzcli.core.sections import LaunchSection
from gzcli.core.spoken import spoken
from gzcli.core.types import Say, silent
from gzcli.core.units import seconds_of
from gzcli.launch import comparing
from gzcli.launch.comparing import Split
from gzcli.league import loop
from gzcli.league.league import CALLS, LEAGUE_SAMPLES, ask
from gzcli.league.sweep import SweepResult, run_sweep, sweep_of
from gzcli.league.which import Outcome
from gzcli.league.which import ask as ask_race
from gzcli.league.which import run as run_race


@dataclass(frozen=True)
class LeagueRow:
    """A model of a league.

    model: name of the model.
    place: rank, "1", or "1–2" if the intervals do not separate it from another model; None without a value.
    metrics: the mean of each metric over the seeds.
    failed: number of failed trainings.
    """

    model: str
    place: str | None
    metrics: Mapping[str, float]
    failed: int


@dataclass(frozen=True)
class Trained:
    """A training of a league: its model, seed, run id and metrics, and the error if it failed."""

    model: str
    seed: int
    run: str | None
    metrics: Mapping[str, float]
    error: str | None


@dataclass(frozen=True)
class LeagueResult:
    """A league.

    metric: metric of the ranking; None if nothing could be ranked.
    rows: the models, the best first.
    trainings: one for each model and seed.
    floor: the metrics of real images instead of samples.
    left_out: the reason for each model that cannot be trained on the set.
    folder: folder with the tables, for `gz report`.
    """

    data: str
    metric: str | None
    rows: tuple[LeagueRow, ...]
    trainings: tuple[Trained, ...]
    floor: Mapping[str, float]
    notes: tuple[str, ...]
    left_out: Mapping[str, str]
    folder: Path


def _place(data: Any) -> Any:
    """The name or path of a data set, or of images in memory."""
    from gzcli.data.readers.memory import reference_of  # which loads numpy

    return reference_of(data)


@spoken
def league(
    models: Iterable[str] | None = None,
    *,
    data: Any,
    budget: str = "8m",
    seeds: int = 1,
    at_once: int | None = None,
    curve: Iterable[str] = (),
    calls: int = CALLS,
    split: Split = "test",
    metrics: Iterable[str] = (),
    n: int | None = None,
    weights: str | Path | None = None,
    real_stats: str | Path | None = None,
    export_stats: str | Path | None = None,
    checkpoint: str = "last",
    gpus: int | None = None,
    cpu: bool = False,
    processes: int | None = None,
    precision: str | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> LeagueResult:
    """Trains models for equal times on one data set, evaluates and ranks them, as `gz league` does. The same
    call resumes an interrupted league.

    models: names of models, or paths of recipes; None: all that fit the set.
    data: name or path of the data set, or images in memory, as in `gzcli.train`.
    budget: time of each training, such as "90s", "8m" or "1.5h": CPU time, or wall-clock time on GPUs.
    seeds: trainings of each model, with the seeds from `seed` on.
    at_once: number of parallel trainings, each on one core or GPU. None: one at a time, on all of them.
    curve: "steps", "time", or both: also plots quality against sampler steps or training time.
    calls: network calls per image at which samplers are also compared; 0: none.
    n: number of samples of each run, and maximum number of images for the likelihood. None: 10,000 samples,
      and as many likelihoods as the recipe's budget allows.
    split, metrics, weights, real_stats, export_stats, checkpoint, precision: as in `gzcli.bench`.
    gpus: number of GPUs of each training; None: all of them.
    cpu: whether to use the CPU even if there are GPUs.
    processes: number of CPU processes.
    seed: first seed.
    quiet: whether to print nothing.

    Raises UsageError for a model that does not fit the set, or the error of the first training if all fail.
    """
    from gzcli.data.download.fetch import fetch_weights  # which loads urllib

    facts: dict[str, Any] = {"split": split, "metrics": metrics, "weights": weights, "precision": precision}
    facts |= {"real_stats": real_stats, "export_stats": export_stats, "checkpoint": checkpoint, "seed": seed}
    launch = LaunchSection(gpus, cpu, processes)
    job = comparing.job_of(n, LEAGUE_SAMPLES, data=str(_place(data)), launch=launch, **facts)
    how: dict[str, Any] = {"seeds": seeds, "calls": calls, "curves": curve, "at_once": at_once}
    terms, say = ask(map(str, models or ()), budget, job, **how), speaking(quiet)
    for network in comparing.downloads(job):
        fetch_weights(network, say=say)
    prepared = loop.League.of(terms, budget, say=say)
    mode = "quiet" if quiet else "human"
    return _league_result(loop.run_league(prepared, at_once=at_once, say=say, mode=mode), prepared.folder)


def _league_result(result: Mapping[str, Any], folder: Path) -> LeagueResult:
    keys = [field.name for field in fields(LeagueRow)]
    rows = [LeagueRow(**{key: row[key] for key in keys}) for row in result["summary"]]
    trainings = [
        Trained(row["model"], row["seed"], row.get("run"), row["metrics"], row.get("error"))
        for row in result["rows"]
    ]
    return LeagueResult(
        result["data"],
        result["metric"],
        tuple(rows),
        tuple(trainings),
        result["floor"],
        tuple(result["notes"]),
        result["left_out"],
        folder,
    )


@spoken
def which(
    data: Any,
    budget: str,
    *,
    need: Iterable[str] = (),
    models: Iterable[str] = (),
    at_once: int | None = None,
    seed: int = 0,
    gpus: int | None = None,
    cpu: bool = False,
    quiet: bool = False,
) -> Outcome:
    """Finds the model that suits a data set by a race, as `gz which` does. The same call resumes an
    interrupted race.

    data: name or path of the data set, or images in memory, as in `gzcli.train`.
    budget: total time of all trainings, such as "20m": CPU time, or wall-clock time on GPUs.
    need: capabilities that the model needs: "likelihood", "one-call", "labels" or "ood".
    models: names of the models that race; (): a shortlist from the shipped leagues.
    at_once: number of parallel trainings, each on one core or GPU. None: one at a time, on all of them.
    seed: seed of the weights and of the noise.
    gpus: number of GPUs of each training; None: all of them.
    cpu: whether to use the CPU even if there are GPUs.
    quiet: whether to print nothing.

    Returns the models in `order`, the best first, and the best model's longest training as `winner`. Raises
    UsageError if no model fits the set, MissingError if no judge can compare models on it.
    """
    say, mode = speaking(quiet), "quiet" if quiet else "human"
    how: dict[str, Any] = {"seed": seed, "launch": LaunchSection(gpus, cpu), "at_once": at_once}
    race = ask_race(str(_place(data)), budget, map(str, models), need, **how)
    return run_race(race, at_once=at_once, say=say, mode=mode)


@spoken
def sweep(
    what: str,
    *,
    set: Mapping[str, Any] | Iterable[str],
    budget: str,
    data: Any = None,
    trials: int | None = None,
    scale: str | None = None,
    seed: int = 0,
    gpus: int | None = None,
    cpu: bool = False,
    quiet: bool = False,
) -> SweepResult:
    """Tries settings of a model within a time budget, and ranks them by validation, as `gz sweep` does. The
    same call resumes an interrupted sweep.

    what: name of a model, or path of a recipe.
    set: keys of the recipe with a list of values to try ({"optim.lr": [1e-3, 3e-3]}), a range ("1e-4..1e-2"),
      or one value for all trials; or strings as in `--set`.
    budget: total time of all trainings, such as "20m": CPU time, or wall-clock time on GPUs.
    data: name or path of the data set, or images in memory; None: the set of the recipe.
    trials: number of settings drawn from ranges; None: 8.
    scale: size of the model and training; None: the one that suits the set and the machine.
    seed: seed of the draws, weights and noise.
    gpus: number of GPUs of each training; None: all of them.
    cpu: whether to use the CPU even if there are GPUs.
    quiet: whether to print nothing.

    Raises UsageError before the first training for a setting that cannot be trained; DivergedError if all
    trials diverge.
    """
    sets = (
        [f"{key}={as_text(value)}" for key, value in set.items()] if isinstance(set, Mapping) else list(set)
    )
    flags = {"scale": scale, "launch.gpus": gpus, "launch.cpu": cpu or None, "seed": seed}
    reference = None if data is None else str(_place(data))
    plan = sweep_of(what, reference, sets, budget=seconds_of(budget), trials=trials, flags=flags)
    return run_sweep(plan, speaking(quiet))


def as_text(value: Any) -> str:
    """Values in the form of `--set`. The values of a list are the values to try."""
    if isinstance(value, list | tuple):
        return ",".join(one if isinstance(one, str) else json.dumps(one) for one in value)
    return value if isinstance(value, str) else json.dumps(value)


def speaking(quiet: bool) -> Say:
    """Prints lines on stderr, or nothing."""
    return silent if quiet else lambda text: print(streams.printable(text), file=sys.stderr, flush=True)
