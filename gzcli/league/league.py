"""A league: models that are trained for the same time on one set, with several seeds, and evaluated in the
same way. Runs are identified by their request, so an interrupted league resumes, and leagues share runs. This
module has the terms, the trainings and the jobs that judge them; `loop.py` runs them.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from gzcli.core.errors import DamagedError, UsageError, choose
from gzcli.core.hints import Option, advice, gz
from gzcli.core.sections import LaunchSection, tuples
from gzcli.core.types import Report, Say, silent, unreported
from gzcli.core.units import BUDGET_FORMS, seconds_of
from gzcli.data.sets.registry import locate
from gzcli.launch import comparing, forecast, launcher, needs
from gzcli.launch import plan as planning
from gzcli.launch.launcher import Plan
from gzcli.launch.plan import Request
from gzcli.launch.slurm import CORES_OF_A_PROCESS
from gzcli.league.training import Training, digest
from gzcli.metrics.selection import choose as choose_metrics
from gzcli.models import catalog
from gzcli.store import files, jobs
from gzcli.store.code import DRAWING, JUDGING, code_hash
from gzcli.store.jobs import BenchJob
from gzcli.store.paths import recipe_names, spelling
from gzcli.store.run_folder import commit_in
from gzcli.store.runs import Run

CURVE_CALLS = (1, 2, 4, 8, 16, 32)  # numbers of network calls, for the curve of quality over them
CURVE_SHARES = (1 / 8, 1 / 4, 1 / 2, 1)  # shares of the training, for the curve of quality over time
CURVE_CHECKPOINTS = 100  # checkpoints kept for that curve, instead of the trainer's ten
CALLS = 20  # network calls per image at which samplers are also compared
LEAGUE_SAMPLES = 10_000  # of each run
MIN_ENTRY_SECONDS = 3.0  # least seconds, as for `gz train --minutes`
SAMPLE_SOURCES = {
    "caption": "captions",
    "before": "pictures",
    "second_domain": "pictures",
}  # what samples start from


@dataclass(frozen=True)
class Terms:
    """What all models of a league have in common."""

    data: str  # name or path of the data set
    budget: float  # seconds of training for each model and seed, all stages together
    models: tuple[str, ...] | None
    seeds: tuple[int, ...]
    job: BenchJob  # the job that judges a run, without its `run`
    calls: int  # network calls per image at which samplers with `steps` are also compared; 0: none
    curves: tuple[str, ...] = ()  # "steps", "time", or both: x axes of the curves of quality

    @property
    def key(self) -> str:
        """A short hash: leagues of the same terms have one folder."""
        return digest(asdict(self), 6)

    def of(self, entry: str) -> Terms:
        """The terms of a single entry, by its key."""
        model, _, seed = entry.rpartition(":")
        if not model or not seed.isdecimal():
            raise UsageError(f"`--entry {entry}` is not an entry of a league", hint=Option("entry", "vae:0"))
        return replace(self, models=(model,), seeds=(int(seed),))

    def write(self, folder: Path) -> None:
        """Writes the terms into the folder on which the process of a single entry is started."""
        Run(folder).status_file.unlink(missing_ok=True)
        files.write_json(Run(folder).job_file, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Terms:
        tree = files.read_object(Run(folder).job_file)
        return cls(**tuples({**tree, "job": None}) | {"job": BenchJob.of(tree["job"])})


@dataclass(frozen=True)
class Entry(Training):
    """One training of a league."""

    model: str  # name of the model, or of the recipe's file
    seed: int

    @property
    def key(self) -> str:
        """Key under which `Terms.of` looks it up."""
        return f"{self.request.what}:{self.seed}"

    @property
    def command(self) -> str:
        """The command for this training."""
        flags = {key: value for key, value in self.request.flags.items() if value is not None}
        settings = [*self.request.sets, *(f"{key}={value}" for key, value in flags.items() if key != "seed")]
        words = ["gz", "train", self.request.what, "--seed", str(self.seed)]
        words += ["--data", self.request.data] if self.request.data else []
        return shlex.join([*words, *(word for setting in settings for word in ("--set", setting))])


def ask(
    models: Iterable[str] | None,
    budget: str | None,
    job: BenchJob,
    *,
    seeds: int = 1,
    calls: int = CALLS,
    curves: Iterable[str] = (),
    at_once: int | None = None,
) -> Terms:
    """The terms of a league. Raises UsageError without a data set or a budget that suffices.

    models: names of models, or paths of recipes; none, or `all`, are all that fit the data set.
    budget: the time of each training, such as `8m`, `1.5h` or `90s`.
    job: the job that judges a run, with the data set and the first seed.
    seeds: trainings of each model.
    at_once: number of parallel trainings, each on one core or GPU; None: one at a time, on all of them.
    """
    job = replace(job, launch=beside_others(job.launch)) if at_once else job
    if not job.data:
        hint = gz("league", budget=budget or "8m", data="mnist")
        raise UsageError("a league needs `--data`, the data set to train on", hint=hint)
    if budget is None:
        raise UsageError("a league needs `--budget`, the training time per model", hint=BUDGET_FORMS)
    seconds = seconds_of(budget)
    if seconds < MIN_ENTRY_SECONDS:
        raise UsageError(f"`--budget {budget}` is too short to train a model", hint=BUDGET_FORMS)
    job = replace(job, data=locate(job.data).reference)
    axes = tuple(choose("curve", name, ("steps", "time")) for name in curves)
    names = tuple(dict.fromkeys(models or ()))
    numbers = tuple(range(job.seed, job.seed + seeds))
    return Terms(job.data, seconds, None if names in ((), ("all",)) else names, numbers, job, calls, axes)


def columns_of(terms: Terms) -> list[str]:
    """The metrics that the models of a league may have."""
    cards: Iterable[catalog.ModelCard] = catalog.cards().values()
    if terms.models is not None:
        recipes = (planning.ask(name, terms.data, (), {}).recipe for name in terms.models)
        cards = [catalog.card(recipe.parts[-1].model) for recipe in recipes]
    return comparing.columns_of(terms.job, cards)


def tasks_of(terms: Terms) -> list[str]:
    """The keys of the entries of a league whose data set need not be here. Raises UsageError for a model or a
    metric that does not exist."""
    for model in terms.models or ():
        planning.ask(model, terms.data, (), {})
    choose_metrics(terms.job.metrics, locate(terms.data), terms.job.split)
    return [f"{model}:{seed}" for seed in terms.seeds for model in terms.models or recipe_names()]


def entries_of(
    terms: Terms, *, say: Say = silent, progress: Report = unreported
) -> tuple[list[Entry], dict[str, str]]:
    """The trainings of a league, seed by seed, and the reason for each omitted model, by name."""
    names, lines = terms.models or recipe_names(), set[str]()
    labels = {name: Path(name).stem if Path(name).suffix else spelling(name) for name in names}
    entries, left_out = [], {}

    def say_once(text: str) -> None:  # notes on the data set are those of every model
        if text not in lines:
            lines.add(text)
            say(text)

    for seed in terms.seeds:
        for name, label in labels.items():
            if label in left_out:
                continue
            try:
                entries.append(entry_of(name, label, seed, terms, say=say_once, progress=progress))
            except UsageError as error:
                if terms.models:
                    raise
                left_out[label] = error.message
    return entries, left_out


def least_budget(budget: float, first: float) -> str:
    """A budget that gives each model `SHORTEST` in the first round, if this one gives it `first` seconds."""
    return f"{math.ceil(budget * MIN_ENTRY_SECONDS / first)}s"


def entry_of(name: str, label: str, seed: int, terms: Terms, *, say: Say, progress: Report) -> Entry:
    """One training. The budget is split over its stages. Raises UsageError if that leaves a stage too little,
    or if the model does not fit the set."""
    section = terms.job.launch
    flags: dict[str, Any] = {"seed": seed, "launch.gpus": section.gpus, "launch.cpu": section.cpu or None}
    flags |= {"launch.processes": section.processes, "launch.threads": section.threads}
    flags["train.keep"] = CURVE_CHECKPOINTS if "time" in terms.curves else None
    parts = planning.ask(name, terms.data, (), flags).recipe.parts

    def minutes(seconds: float) -> float:
        if seconds < MIN_ENTRY_SECONDS:
            whose = f"`{label}`" if len(parts) == 1 else f"one of the {len(parts)} stages of `{label}`"
            raise UsageError(f"the budget is too short: {whose} gets less than {MIN_ENTRY_SECONDS:g} s")
        return seconds / 60

    if needs := [need for part in parts for need in catalog.card(part.model).needs if need in SAMPLE_SOURCES]:
        raise UsageError(
            f"`{label}` needs {SAMPLE_SOURCES[needs[0]]} as input, so its samples are not compared"
        )
    flags["train.clock"] = "cpu"  # CPU time, because the machine may be busy
    flags["train.minutes"] = minutes(terms.budget / len(parts))
    request = planning.ask(name, terms.data, (), flags)
    if request.earlier:
        raise UsageError(f"`{name}` is a run, but a league needs models", hint=gz("bench", name))
    plan = launcher.plan(request.recipe.launch, every_gpu=True)
    if len(parts) > 1:
        budgets = [minutes(share * terms.budget) for share in shares_of(request, plan, say)]
        pairs = zip(parts, budgets, strict=True)
        sets = [f"stages.{part.stage}.train.minutes={budget:.4g}" for part, budget in pairs]
        request = planning.ask(name, terms.data, sets, flags)
    return Entry.of(request, say, progress, model=label, seed=seed)


def beside_others(launch: LaunchSection) -> LaunchSection:
    """The devices of a training that runs in parallel with others: one GPU or one core. The number of threads
    does not depend on the machine, because it is part of a run's identity."""
    if (launch.gpus or 1) != 1 or launch.processes:
        message = "`--jobs` gives each training one GPU, or one core"
        raise UsageError(message, hint=advice("omit {}", Option("gpus")))
    on_cpu = launch.cpu or launch.gpus == 0
    if launch.gpus or (not on_cpu and launcher.usable_gpus().usable):
        return replace(launch, gpus=1, threads=CORES_OF_A_PROCESS)
    return replace(launch, threads=1)


def shares_of(request: Request, plan: Plan, say: Say) -> list[float]:
    info, measure = needs.of_data(request.recipe)[0].info(), partial(forecast.measured, say=say)
    return forecast.shares(forecast.expect(request.recipe, plan, info, measure=measure, timed=False)[0])


# ---------------------------------------------------------------------------- how a run is judged


def jobs_of(run: Run, terms: Terms) -> dict[str, tuple[BenchJob, list[dict[str, Any]]]]:
    """The jobs that judge a run, by kind, each with descriptions of its rows in order. "main" judges the
    run's sampler; if that has `steps`, also at `terms.calls` network calls. "steps" and "time" are the
    curves."""
    rows: dict[str, list[dict[str, Any]]] = {"main": [{"setting": "default", "variant": {}}]}
    if "steps" in catalog.card_of(run, run.serving.tree()["model"]["name"]).sample:
        if terms.calls:
            variant = {"calls": terms.calls, "quick": True}
            rows["main"].append({"setting": f"{terms.calls} calls", "variant": variant})
        if "steps" in terms.curves:
            variants = {n: {"sample": {"steps": n}, "quick": True} for n in CURVE_CALLS}
            rows["steps"] = [{"setting": "steps", "steps": n, "variant": v} for n, v in variants.items()]
    if "time" in terms.curves:
        saved = ((seconds, {"checkpoint": str(step), "quick": True}) for step, seconds in kept_steps(run))
        rows["time"] = [{"setting": "time", "seconds": seconds, "variant": v} for seconds, v in saved]
    patience = run.training_seconds if terms.job.patience is None else terms.job.patience
    judged, job = {}, replace(terms.job, patience=patience, drawing=code_of(run))
    for kind, settings in rows.items():
        if settings:
            of_each = tuple(row["variant"] for row in settings)
            judged[kind] = replace(job, runs=(str(run.path),) * len(settings), variants=of_each), settings
    return judged


def judgement(run: Run, job: BenchJob) -> tuple[str, dict[str, Any] | None]:
    """The name of the job's folder in the run's `bench`, and its result by the current code; None without a
    complete result."""
    key = digest([_without(asdict(job), "launch", "runs"), code_hash(*JUDGING)], 12)
    results = sorted((run.path / "bench").glob(f"{key}-*/{Run.result_file}"), reverse=True)
    return key, next(filter(None, (_whole(path.parent, len(job.variants)) for path in results)), None)


def _whole(folder: Path, n: int) -> dict[str, Any] | None:
    """The result in a folder, if it has n rows; None if it is damaged."""
    with suppress(DamagedError):
        result = jobs.result_of(folder, BenchJob.verb)
        rows = [row for row in result["rows"] if isinstance(row, dict) and "sample" in row]
        figures = [row for row in rows if isinstance(row.get("metrics"), dict)]
        if len(result["rows"]) == len(figures) == n and "shape" in result["provenance"]:
            return result
    return None


def is_outdated(run: Run, job: BenchJob, key: str) -> bool:
    """Whether a run has a result of the same job, but by other code or of other weights. key: that of the
    current ones, from `judgement`."""
    others = ("launch", "runs", "drawing")
    folders = {path.parent for path in (run.path / "bench").glob(f"*/{Run.result_file}")}
    trees = [files.whole_object(Run(x).job_file) for x in folders if not x.name.startswith(key)]
    same = digest(_without(asdict(job), *others), 12)
    return any(digest(_without(tree, *others), 12) == same for tree in trees)


def _without(tree: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if key not in keys}


def is_judged(run: Run | None, terms: Terms) -> bool:
    """Whether nothing is left to do for a run."""
    if run is None or run.state != "finished":
        return False
    return all(judgement(run, job)[1] for job, _ in jobs_of(run, terms).values())


def code_of(run: Run) -> str:
    """A hash of a run's weights and of the code that draws from them."""
    weights = run.serving.model_file
    changed = weights.stat().st_mtime_ns if weights.exists() else 0
    return digest([changed, code_hash(*DRAWING, beside=run.owner.programs_folder)], 12)


def kept_steps(run: Run) -> list[tuple[int, float]]:
    """The steps of the checkpoints that are closest to the CURVE_SHARES of a training, within a factor of √2.
    Each has the seconds of training until then, including earlier stages."""
    last = run.serving
    steps = int(last.status()["step"])
    checkpoints = [int(folder.name) for folder in last.checkpoints]
    seconds = run.training_seconds
    seconds_of_last = seconds if last is run else last.training_seconds
    chosen = {}
    for share in CURVE_SHARES:
        near = min(checkpoints, key=lambda step: abs(math.log(step / (share * steps))), default=0)
        if near and abs(math.log2(near / (share * steps))) <= 0.5:
            chosen[near] = seconds - seconds_of_last + seconds_of_last * near / steps
    return sorted(chosen.items())


def judged_by() -> dict[str, str | None]:
    """The commit of gz's code and a hash of the part that judges. Both hold for cached results too, because
    results of another hash are not used."""
    commit = commit_in({"code": planning.code_state()})
    return {"judge_commit": commit, "judge_code": code_hash(*JUDGING)}


def run_facts(run: Run) -> dict[str, Any]:
    """The id, title and training of a run, and its parameters over all stages."""
    params = sum(part.status().get("params") or 0 for part in run.stages or [run])
    return {"run": run.id, "title": run.title, "params": params, **run.training}
