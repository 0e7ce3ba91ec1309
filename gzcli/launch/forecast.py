"""The forecast of a training, of images and of scores: the size of models, and the memory and time of a step
or an image on this machine. torch is not loaded. Values that are not in the cache come from the engine's
`forecast`, in a separate process.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gzcli.core import signals
from gzcli.core.devices import PEAKS, cpu_name, gpu_memory, gpu_name, host_memory
from gzcli.core.errors import GzError, Interrupted, UsageError
from gzcli.core.sections import LaunchSection, Part, part_of
from gzcli.core.types import Say
from gzcli.core.units import counted, likelihoods, size
from gzcli.launch import launcher
from gzcli.launch.cost import OF_LIKELIHOODS, TO_FIT, Cost, read_numbers, together
from gzcli.launch.from_file import metadata
from gzcli.launch.launcher import Plan, usable_gpus
from gzcli.launch.needs import of_data
from gzcli.models import catalog
from gzcli.recipe.recipe import Recipe
from gzcli.recipe.resolve import Resolved
from gzcli.store import cache_files, files, jobs, model_files, runs
from gzcli.store.code import code_hash
from gzcli.store.jobs import IMAGE_COSTS, SCORE_COSTS, TrialJob
from gzcli.store.paths import cache_dir
from gzcli.store.run_folder import Run
from gzcli.version import __version__

LONG_PLAN_SECONDS = 7 * 86_400  # seconds above which a plan asks before it starts
PAUSES_SHARE = 0.1  # share of the time for images, validation and checkpoints, as with `--minutes`
# The share of an H100's peak that a net of this zoo is taken to reach, the seconds that each of its kernels
# takes at least, and those of compiling a model, or of getting ready at all.
SHARE, H100 = 0.2, 1e12 * PEAKS["H100"]["bf16"]
KERNEL, COMPILING = 4e-6, 60.0
# Keys of a recipe, and of its `train` section, on which neither the cost nor the time of a step depends.
FREE_SECTIONS = ("seed", "about", "scale", "sample", "ood", "bench", "params")
PAUSING: tuple[str, ...] = ("log_every", "sample_every", "samples", "eval_every", "eval_images")
PAUSING += ("checkpoint_every", "keep", "best")
INIT_KEYS = ("init", "parent")

NUMBERS = ("params", "flops", "kernels", "seconds", "bytes")  # keys of a part's result
DRAWING = ("model", "data", "sample")  # sections of a recipe that affect the time of an image
SCORING = ("model", "data", "ood")  # and of its scores

Measure = Callable[[TrialJob], Sequence[Mapping[str, Any]]]  # runs a job and returns its rows


# ---------------------------------------------------------------------------- size, memory and time of a step


@dataclass(frozen=True)
class Forecast:
    """The forecast of the training of one model; values are None if unknown."""

    part: Part  # its recipe, with the processes of its training
    params: int | None = None  # parameters of the model
    flops: float | None = None  # floating-point operations of a step of the global batch
    kernels: float | None = None  # kernels that a process launches in a step
    step: float | None = None  # seconds of a step on this machine
    bytes: int | None = None  # peak memory of a process in a step here, scaled to the recipe's batch
    lacking: str | None = None  # why something is unknown
    refused: UsageError | None = None  # the mistake in the recipe that prevents building the model

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Forecast:
        """The forecast of a part, from a row of a `TrialJob` with its result."""
        result, part = row["result"], part_of(row["tree"], row["stage"])
        params, flops, kernels, step, took = map(result.get, NUMBERS)
        lacking = result.get("error")
        refused = UsageError(lacking, hint=result["refused"] or None) if "refused" in result else None
        return cls(part, params, flops, kernels, step, took, lacking, refused)

    @property
    def seconds(self) -> float | None:
        """The seconds of the training on this machine, including its pauses."""
        if self.part.train.minutes:
            return 60 * self.part.train.minutes
        return None if self.step is None else self.part.train.steps * self.step / (1 - PAUSES_SHARE)

    @property
    def gpus(self) -> int:
        """The number of GPUs for the estimate on H100s: those of all machines, or one if no GPU is used."""
        return (self.part.launch.processes or 1) if self.part.launch.gpus else 1

    def on_h100s(self, gpus: int) -> float | None:
        """The seconds of the training on this number of H100s. It assumes a fifth of their peak, but no more
        than kernel launches allow, and adds a minute of compilation."""
        if not self.flops:
            return None
        step = max(self.flops / (gpus * H100 * SHARE), KERNEL * (self.kernels or 0))
        return COMPILING + self.part.train.steps * step / (1 - PAUSES_SHARE)

    def steps_in(self, minutes: float) -> int | None:
        """The approximate number of steps that `--minutes` would choose."""
        return None if self.step is None else max(1, int(60 * minutes * (1 - PAUSES_SHARE) / self.step))


def h100_seconds(forecasts: Sequence[Forecast], gpus: int) -> float | None:
    """The seconds of trainings on this number of H100s; None if unknown. Also None if compilation would
    dominate, because the time of short, uncompiled runs on a GPU has not been measured."""
    seconds = together([one.on_h100s(gpus) for one in forecasts])
    return seconds if seconds and seconds >= 2 * COMPILING * len(forecasts) else None


def shares(stages: Sequence[Forecast]) -> list[float]:
    """How a common time is split over stages, in steps of 1/20. One half is split equally, because an
    undertrained tokenizer is bad under any prior. The other half is proportional to the operations of each
    stage's own training. If these are unknown, all parts are equal."""
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
    paper: Recipe | None = None,
) -> tuple[list[Forecast], list[Forecast]]:
    """The forecasts of a recipe's parts and of the paper's recipe, whose time is extrapolated."""
    if shape is None:
        return [Forecast(part, lacking="the data set is not on this machine") for part in recipe.parts], []
    here = plan.gpus <= (usable_gpus().usable if plan.gpus else 0)
    stages = stages_of(recipe)
    rows = [row_of(part, stages, plan, shape, timed=timed and here) for part in recipe.parts]
    if paper:
        stages = stages_of(paper)
        rows += [row_of(part, stages, plan, shape, timed=False) for part in paper.parts]
    unknown = [row for row in rows if not row["result"] or (row["timed"] and not row["result"]["timed"])]
    if measure:
        gpus = min(1, plan.gpus) if here else 0
        fill(unknown, shape, LaunchSection(gpus=gpus or None, cpu=not gpus, threads=plan.threads), measure)
    forecasts = [Forecast.of(row) for row in rows]
    ours, of_paper = forecasts[: len(recipe.parts)], forecasts[len(recipe.parts) :]
    if ours[-1].step and ours[-1].flops:
        speed = ours[-1].step / ours[-1].flops
        of_paper = [replace(x, step=speed * x.flops) if x.flops and x.step is None else x for x in of_paper]
    return ours, of_paper


def fill(
    rows: Sequence[dict[str, Any]], shape: Mapping[str, Any], launch: LaunchSection, measure: Measure
) -> None:
    """Measures rows in one process and stores the results. Rows with one cache key are measured once."""
    if not rows or os.environ.get("GZ_TRIAL") == "0":
        return
    alike: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        alike.setdefault(row["key"], []).append(row)
    job = TrialJob(tuple(same[0] for same in alike.values()), shape, launch=launch)
    for (key, same), result in zip(alike.items(), measure(job), strict=True):
        for row in same:
            row["result"] = dict(result)
        has_size = result.get("params") is not None
        if not result.get("missing") and (has_size or not result.get("error")):
            cache_files.write(cached(key), files.write_json, dict(result))


def row_of(
    part: Part, stages: Mapping[str, Part], plan: Plan, shape: Mapping[str, Any], *, timed: bool
) -> dict[str, Any]:
    """A part in the form of `TrialJob.parts`, its cache key, and its cached values. stages: the recipe's
    parts by name."""
    card = catalog.card(part.model)
    built_on = {name: stages[name].tree() for name in card.stages if name in stages}
    launch = replace(part.launch, processes=plan.processes, gpus=plan.gpus, threads=plan.threads)
    tree = replace(part, launch=replace(launch, cpu=not plan.gpus, machines=None).alone()).tree()
    counting = {key: value for key, value in tree.items() if key not in FREE_SECTIONS}
    counting["train"] = {
        key: value for key, value in tree["train"].items() if key not in (*PAUSING, *INIT_KEYS)
    }
    key = key_of(card.path, plan, counting, *built_on.values(), shape)
    row = {"stage": part.stage, "tree": tree, "stages": built_on, "timed": timed, "draws": ()}
    return row | {"key": key, "result": recall(key)}


def key_of(program: Path, plan: Plan, *facts: Any) -> str:
    """The cache key for the cost of a model's file on this machine."""
    everything = (*facts, machine_of(plan), code_hash(beside=program), __version__, version("torch"))
    return hashlib.sha256(repr(everything).encode()).hexdigest()[:20]


def stages_of(recipe: Recipe) -> dict[str, Part]:
    """The parts of a recipe by name; for reused parts, the recipes of their runs."""
    parts = {stage.stage: stage for stage in recipe.parts}
    reused = {name: runs.by_name(word) for name, word in recipe.reused.items()}
    return parts | {name: part_of(run.serving.tree(), name) for name, run in reused.items() if run}


# ---------------------------------------------------------------------------- time of an image and its scores


@dataclass(frozen=True)
class Drawer:
    """A model whose images, or their scores, are timed untrained."""

    part: Part
    stages: Mapping[str, Part]
    plan: Plan
    shape: Mapping[str, Any] | None  # as `TrialJob.info`; None: not known

    @classmethod
    def of(cls, recipe: Resolved, plan: Plan) -> Drawer:
        return cls(recipe.parts[-1], stages_of(recipe), plan, of_data(recipe)[0].info())

    def row(self, kinds: Sequence[str]) -> dict[str, Any]:
        """Like `row_of`, for images and for likelihoods of these kinds."""
        return self._row(DRAWING, IMAGE_COSTS, draws=("samples", *kinds))

    def score_row(self, names: Sequence[str]) -> dict[str, Any]:
        """Like `row_of`, for these scores."""
        return self._row(SCORING, SCORE_COSTS, scores=tuple(names))

    def _row(self, sections: Sequence[str], costs: Sequence[str], **timed: Any) -> dict[str, Any]:
        row = row_of(self.part, self.stages, self.plan, self.shape or {}, timed=False)
        trees = [{key: tree[key] for key in sections} for tree in (row["tree"], *row["stages"].values())]
        precision = row["tree"]["train"]["precision"]
        what = tuple(timed.values())
        key = key_of(catalog.card(self.part.model).path, self.plan, trees, precision, self.shape, *what)
        return row | timed | {"key": key, "result": recall(key, costs)}


def drawer_of_run(
    run: Run,
    plan: Plan,
    options: Mapping[str, Any] | None = None,
    score_options: Mapping[str, Any] | None = None,
) -> Drawer | None:
    """The drawer of a run's recipe with these options of its sampler and of its scores; None if its weights
    do not record the training data, or if it draws latents."""
    model_files.add_copies(run.owner.path)
    with suppress(GzError, KeyError, ValueError):
        stages = {part.path.name: part_of(part.tree(), part.path.name) for part in run.stages}
        part, shape = part_of(run.serving.tree()), json.loads(metadata(run.serving.model_file)["data"])
        ood = replace(part.ood, options={**part.ood.options, **(score_options or {})})
        part = replace(part, sample={**part.sample, **(options or {})}, ood=ood)
        return None if part.data.latent else Drawer(part, stages, plan, shape)
    return None


def image_costs(
    drawers: Sequence[Drawer], measure: Measure, kinds: Sequence[str] = (), n: int = 0
) -> list[tuple[Cost, Cost]]:
    """For each model, the cost of its images on this machine, and that of the likelihoods of these kinds of
    at most n test images, within the budget of its recipe. Times that are not in the cache are measured
    together, in one process for each description of a set."""
    rows = [one.row(kinds) for one in drawers]
    measure_rows(drawers, rows, measure)
    costs = []
    for drawer, row in zip(drawers, rows, strict=True):
        seconds, calls, log_prob, classes = (row["result"].get(name) for name in IMAGE_COSTS)
        of_likelihoods = likelihood_cost(log_prob, classes or 0, n, drawer.part.ood.budget)
        costs.append((Cost(0.0, seconds, calls), of_likelihoods))
    return costs


def likelihood_cost(log_prob: float | None, classes: int, n: int, budget: float) -> Cost:
    """The cost of the likelihoods of at most n test images within a budget. log_prob: seconds of one; None if
    the model has no such likelihood. classes: number of those for which it may be computed too."""
    if log_prob is None:
        return Cost()
    n, passes = likelihoods(log_prob, budget, n, classes)
    return Cost.once(n * passes * log_prob, OF_LIKELIHOODS)


def score_cost(
    drawer: Drawer, names: Sequence[str], measure: Measure, *, held_out: int, train: int, maps: int
) -> Cost:
    """The cost of these scores of a model's images on this machine, fitted once to these numbers of images
    and of maps."""
    row = drawer.score_row(names)
    measure_rows([drawer], [row], measure)
    each, calls, *fits = (row["result"].get(name) for name in SCORE_COSTS)
    numbers = zip((held_out, train, maps), fits, strict=True)
    seconds = together([None if fit is None else n * fit for n, fit in numbers])
    return Cost.once(seconds, TO_FIT) + Cost(0.0, each, calls)


def measure_rows(drawers: Sequence[Drawer], rows: Sequence[dict[str, Any]], measure: Measure) -> None:
    """Measures the rows of drawers that are not in the cache."""
    unknown: dict[str, list[tuple[Drawer, dict[str, Any]]]] = {}
    for one, row in zip(drawers, rows, strict=True):
        if not row["result"] and one.shape:
            unknown.setdefault(repr((one.shape, one.plan)), []).append((one, row))
    for pairs in unknown.values():
        one = pairs[0][0]
        launch = LaunchSection(gpus=1 if one.plan.gpus else None, cpu=not one.plan.gpus)
        fill([row for _, row in pairs], one.shape or {}, replace(launch, threads=one.plan.threads), measure)


def measured(job: TrialJob, say: Say) -> Sequence[Mapping[str, Any]]:
    """The rows of a job that runs in its own process. If it fails, each row has an `error`, because a failed
    plan must not prevent a start."""
    costs = cache_dir("costs")
    folder = files.part_path(costs / "job")
    try:
        files.make_folder(costs)
        files.remove_leftovers(costs)
        folder.mkdir()
        say(f"planning: {what_is_done(job)}")
        jobs.write(folder, job)
        trees = [tree for row in job.parts for tree in (row["tree"], *row["stages"].values())]
        catalog.keep(folder, (tree["model"]["name"] for tree in trees))
        with signals.noted() as received:
            try:
                launcher.run(folder, launcher.plan(job.launch, every_gpu=False), launcher=False, mode="quiet")
            finally:
                if received:  # a plan stopped by a signal is not a failed plan, whatever the engine did
                    number = received[0]
                    raise Interrupted(f"stopped by {signals.signal_name(number)}", signum=number)
        return jobs.result_of(folder, job.verb)["parts"]
    except Interrupted:
        raise
    except GzError as e:
        why = e.message
    except OSError as e:
        why = f"`{costs}` cannot be written ({os.strerror(e.errno or 0).lower()})"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return [{"params": None, "error": why} for _ in job.parts]


def what_is_done(job: TrialJob) -> str:
    """A sentence on the work of a trial."""
    if any(row.get("scores") for row in job.parts):
        return "timing scores on this machine"
    if drawing := sum(bool(row.get("draws")) for row in job.parts):
        return f"timing samples of {counted(drawing, 'model')} on this machine"
    tried = any(row["timed"] for row in job.parts)
    return "timing a step on this machine" if tried else "measuring the cost of a step"


def cached(key: str) -> Path:
    """The file of a forecast in the cache."""
    return cache_dir("costs", f"{key}.json")


def recall(key: str, names: Sequence[str] = NUMBERS) -> dict[str, Any]:
    """The numbers with these names that the cache has under a key; {} if they are missing or damaged."""
    return cache_files.read(cached(key), partial(read_numbers, names=("timed", *names))) or {}


def machine_of(plan: Plan) -> str:
    """A description of everything on this machine that affects the time of a step: its GPU, or its CPU and
    the threads."""
    return gpu_name() if plan.gpus else f"{cpu_name()}, {plan.threads} threads"


# ---------------------------------------------------------------------------- memory


def memory_of(plan: Plan) -> int | None:
    """The bytes available to a process: those of the smallest GPU, or its share of this machine's memory.
    None if unknown."""
    return gpu_memory() if plan.gpus else host_memory() // (plan.processes // plan.machines)


def memory_hint(forecasts: Sequence[Forecast], plan: Plan, there: int | None) -> str | None:
    """The hint for a model that needs more memory than a process has. On a GPU, the training splits its
    batch."""
    for forecast in forecasts:
        if there and not plan.gpus and forecast.bytes and forecast.bytes > there:
            ways = ", ".join(ways_to_save(forecast.part, plan)) or "a smaller `train.batch_size`"
            machine = f"this machine has {size(there)} per process"
            return f"`{forecast.part.model}` may not fit: {machine}; to save memory, use {ways}"
    return None


def ways_to_save(part: Part, plan: Plan) -> list[str]:
    """The options that reduce the memory of a training step of this recipe, the cheapest first."""
    cheaper = {"cache": (False, "true"), "checkpointing": (False, "true"), "dtype": ("fp32", "bf16")}
    ways = [f"`--set model.{key}={to}`" for key, (now, to) in cheaper.items() if part.options.get(key) == now]
    if plan.gpus and part.optim.name in ("adam", "adamw"):
        ways.append("`--set optim.name=adamw8bit`")
    each = part.train.batch_size // plan.processes
    if pieces := next((k for k in range(part.train.accumulate + 1, each + 1) if each % k == 0), None):
        ways.append(f"`--set train.accumulate={pieces}`")
    return ways
