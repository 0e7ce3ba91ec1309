"""The plan that `gz train` prints before a training: scale, set, size, memory and time. With `--dry-run` it
also lists everything that is missing, and with `--keys` every value with its origin. Other verbs' dry runs
use this module for the cost of samples.

A dry run creates nothing except, in the cache, the cost of a step. torch is loaded only in another process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from gzcli.cli import out
from gzcli.core.errors import UsageError
from gzcli.core.sections import additions, leaves
from gzcli.core.units import about, count, counted, sides, size
from gzcli.launch import forecast, needs
from gzcli.launch.cost import Cost, together
from gzcli.launch.forecast import Forecast, h100_seconds
from gzcli.launch.launcher import Plan, show, usable_gpus
from gzcli.launch.needs import DataFacts
from gzcli.launch.plan import Request, Start, check_batches, previous_words, shared_out
from gzcli.recipe.recipe import Recipe, recipe_of
from gzcli.recipe.resolve import Resolved, large_limits
from gzcli.recipe.yaml import flow
from gzcli.store.paths import user_dir
from gzcli.store.run_folder import Run

PLAN_MINUTES = 60  # minutes for which the plan prints the steps


@dataclass(frozen=True)
class Outlook:
    """The forecast of a training."""

    recipe: Resolved
    plan: Plan
    facts: DataFacts
    models: Sequence[Forecast]  # in order
    paper: Sequence[Forecast]  # at the scale `paper`; () if that is the same, or unknown

    @classmethod
    def of(
        cls, recipe: Resolved, plan: Plan, facts: DataFacts, paper: Resolved | None, *, timed: bool
    ) -> Outlook:
        """The outlook of a recipe, including that at the scale `paper`. `timed`: whether a step may be
        tried."""
        measure = partial(forecast.measured, say=out.info) if timed else None
        rows = forecast.expect(recipe, plan, facts.info(), measure=measure, timed=timed, paper=paper)
        return cls(recipe, plan, facts, *rows)

    @property
    def seconds(self) -> float | None:
        """Seconds for all models on this machine; None if unknown."""
        return together([one.seconds for one in self.models])

    @property
    def params(self) -> float | None:
        return together([one.params for one in self.models])


def before_start(start: Start, recipe: Recipe, *, yes: bool) -> None:
    """Prints a summary of the training. Asks for confirmation if it takes more than a week.

    For the estimate, a step is timed, unless the user set the length or the set is embedded, whose trainings
    take a minute. With several machines, only the first prints.
    """
    request, plan = start.request, start.plan
    if start.run:
        if words := previous_words(start.run):
            out.info(f"note: resuming does not repeat `-- {' '.join(words)}`; pass it again if you need it")
        return
    if plan.machine_rank:
        return
    facts, _ = needs.of_data(request.recipe)
    timed = not (getattr(request.recipe.dataset, "embedded", False) or request.length_is_typed)
    whole = replace(request.recipe, parts=recipe.parts, data=recipe.data)
    outlook = Outlook.of(whole, plan, facts, request.at_paper if timed else None, timed=timed)
    for line in (*starts(request), *in_short(outlook)):
        out.info(line)
    if hint := forecast.memory_hint(outlook.models, plan, forecast.memory_of(plan)):
        out.hint(hint)
    less = "to save time, use `--scale small`, `--minutes 60` or a GPU"
    start_or_not(outlook.seconds, most=forecast.LONG_PLAN_SECONDS, span="a week", ways=less, yes=yes)


def start_or_not(seconds: float | None, *, most: float, span: str, ways: str, yes: bool) -> None:
    """On a terminal, asks whether to start a job of more than `most` seconds. A script only gets a note."""
    if seconds is None or seconds <= most or yes:
        return
    long = f"about {about(seconds)} on this machine"
    if not out.on_terminal():
        out.warn(f"this takes {long}, more than {span}; with `--yes`, gz does not warn; {ways}")
    elif not out.confirmed(f"This takes {long}. Start?"):
        raise UsageError(f"not started: it would take {long}", hint=f"to start anyway, pass `--yes`; {ways}")


# ---------------------------------------------------------------------------- a dry run


def show_plan(start: Start, *, keys: bool) -> None:
    """Prints the plan, what is missing, the run's folder and the launch command; with `keys`, also every
    key."""
    recipe, plan, run = start.request.recipe, start.plan, start.run
    rounded: list[str] = []
    if run:
        check_batches(recipe_of(run.tree()), plan.processes, goes_on=True)
    else:
        recipe, rounded = shared_out(recipe, plan.processes)
        rounded += large_limits(recipe)
    facts, lacking = needs.of_data(recipe)
    outlook = Outlook.of(recipe, plan, facts, None if run else start.request.at_paper, timed=True)
    if refused := next((one.refused for one in outlook.models if one.refused), None):
        raise refused
    if facts.info():
        lacking += dict.fromkeys(one.lacking for one in outlook.models if one.lacking)
    lacking += [*needs.absent_weights(recipe), *needs.absent_runs(recipe)]
    if plan.gpus and plan.gpus > (gpus := usable_gpus()).usable:
        lacking.append(f"{counted(plan.gpus, 'GPU')} ({gpus.lack or f'here: {gpus.there}'})")
    memory, (tree, origin) = forecast.memory_of(plan), resolved_tree(outlook)
    path = run.path if run else user_dir("runs") / f"{recipe.card.name}-{facts.key}-<time>-<id>"
    launch = show(path, plan)
    lines = [*in_lines(outlook, memory), ("needs", ", ".join(lacking) or "no downloads")]
    for label, text in (*(("start", line) for line in starts(start.request)), *lines):
        out.text("\n".join(out.wrapped_text(text, f"{label:<8}")))
    on = counted(plan.gpus, "GPU") if plan.gpus else "no GPUs"
    out.text(f"run     {'resumes ' if run else ''}{path}")
    processes = f"{plan.processes} process{'' if plan.processes == 1 else 'es'}"
    threads = f"{counted(plan.threads, 'thread')}{'' if plan.processes == 1 else ' each'}"
    out.text(f"launch  {processes}, {threads}, {on}: {launch}")
    if keys:
        rows = [
            (key, value if isinstance(value, str) else flow(value), origin.get(key, ""))
            for key, value in leaves(tree)
            if (key.rpartition(".")[2], value) != ("params", None)
        ]
        wrap = ("value", "from")
        out.text("")
        out.table(("key", *wrap), rows, spare=("from",), wrap=wrap, narrow=12, elsewhere="see `--json`")
    for text in rounded:
        out.info(text)
    if hint := forecast.memory_hint(outlook.models, plan, memory):
        out.hint(hint)
    of_recipe = {"recipe": tree, "origin": origin, "data": asdict(facts), "needs": lacking}
    of_start = {"run": path, "resume": run is not None, "processes": plan.processes, "gpus": plan.gpus}
    out.data({**plan_figures(outlook), **of_recipe, **of_start, "launch": launch})


def resolved_tree(outlook: Outlook) -> tuple[dict[str, Any], dict[str, str]]:
    """The recipe as a tree and the origin of each value, including values that only a real start
    determines."""
    recipe = outlook.recipe
    of_set = {key: getattr(outlook.facts, key) for key in ("size", "channels", "levels")}
    of_set = {key: v for key, v in of_set.items() if getattr(recipe.data, key) is None and v is not None}
    tree = recipe.on(replace(recipe.data, **of_set)).tree()
    origin = {**recipe.origin, **{f"data.{key}": "the set" for key in of_set}}
    for one in outlook.models:
        if one.params is not None:
            (tree["stages"][one.part.stage] if recipe.stages else tree)["params"] = one.params
            origin[f"{one.part.in_recipe}params"] = "the model"
    return tree, origin


def plan_figures(outlook: Outlook) -> dict[str, Any]:
    """The forecast for scripts, in total and for each model."""
    models = outlook.models
    flops = together([one.flops for one in models])
    each = [
        {
            "model": one.part.model,
            "stage": one.part.stage or None,
            "params": one.params,
            "gflop_per_step": one.flops and one.flops / 1e9,
            "bytes": one.bytes,
            "steps": one.part.train.steps,
            "seconds_per_step": one.step,
            "seconds": one.seconds,
            "seconds_on_h100": h100_seconds([one], 1),
            "seconds_on_gpus": h100_seconds([one], one.gpus),
        }
        for one in models
        if one.params is not None
    ]
    return {
        "scale": outlook.recipe.choice.scale,
        "params": outlook.params,
        "gflop_per_step": flops and flops / 1e9,
        "bytes": max((one.bytes for one in models if one.bytes is not None), default=None),
        "seconds": outlook.seconds,
        "seconds_on_h100": h100_seconds(models, 1),
        "seconds_on_gpus": h100_seconds(models, models[0].gpus),
        "memory": each,
    }


# ---------------------------------------------------------------------------- samples of a model


def show_sampling(
    rows: Sequence[tuple[Run, int | None, Cost]], further: Sequence[str], evaluation: Cost, **facts: Any
) -> None:
    """Prints the cost of sampling runs, further lines, and the total with the cost of an evaluation. The JSON
    also has the facts. rows: a run, the number of its images (None: one for each input image), and the cost
    of one."""
    for run, n, cost in rows:
        images = counted(n, "image") if n else "one image per input image"
        for line in out.wrapped_text(f"{run.id}: {images}, {cost.of_samples(n)}"):
            out.text(line)
    seconds = together([cost.seconds(n) if n else None for _, n, cost in rows])
    for text in further:
        out.text(text)
    if seconds and (evaluation.fixed or len(rows) > 1):
        out.text(f"total: about {about(seconds + (evaluation.fixed or 0.0))}")
    values = [{"run": run.id, "n": n, "seconds": cost.each, "calls": cost.calls} for run, n, cost in rows]
    out.data({"rows": values, "seconds": seconds, **facts})


# ---------------------------------------------------------------------------- in words


def starts(request: Request) -> list[str]:
    """A line on the weights from which a training starts."""
    if request.parent is None or request.recipe.parts[-1].train.parent is None:
        return []
    part, run = request.recipe.parts[-1], request.parent
    name, _, digest = str(part.train.parent).partition(" sha256:")
    step, title = run.serving.status().get("step", 0), run.title
    less = run.serving.tree()["model"].get("conditional") and not part.options.get("conditional")
    without = ", without its labels" if less else ""
    trained = f"{title}, {counted(step, 'step')} on {run.data}{without}"
    return [f"the weights of {name}: {trained} (sha256 {digest[:12]})"]


def in_short(outlook: Outlook) -> list[str]:
    """One or two lines that summarise the training."""
    choice, params, here = outlook.recipe.choice, outlook.params, outlook.seconds
    scale = f"scale {choice.scale} ({choice.why}): " if choice.scale else ""
    model = [f"{count(params)} parameters"] if params else []
    if not any(part.train.minutes for part in outlook.recipe.parts):
        model.append(counted(sum(one.part.train.steps for one in outlook.models), "step"))
    times = [f"about {about(here)} here", *_in_paper(outlook)] if here else []
    words = ": ".join(filter(None, [", ".join(model), "; ".join(times)]))
    added = [
        f"{part.model} {text}: `--set {part.in_recipe}model.{key}=0` turns this off"
        for part in outlook.recipe.parts
        for key, text in additions(part.options).items()
    ]
    return [scale + _set(outlook), *(line for line in out.wrapped_text(words) if line), *added]


def in_lines(outlook: Outlook, there: int | None) -> Iterator[tuple[str, str]]:
    """Scale, set, model, memory and time with their labels; `there`: bytes available to a process."""
    choice, models, facts, here = outlook.recipe.choice, outlook.models, outlook.facts, outlook.seconds
    yield "scale", f"{choice.scale} ({choice.why})" if choice.scale else "the recipe has no scales"
    lacking = f" ({size(facts.download)} to download)" if facts.download else " (not cached)"
    packed = " (cached, not packed yet)" if facts.cached else lacking
    yield "set", _set(outlook) + ("" if facts.packed else packed)
    stages = [f"{one.part.stage}: " if len(models) > 1 else "" for one in models]
    for stage, one in zip(stages, models, strict=True):
        yield "model", stage + _model(one)
    most = max(one.bytes or 0 for one in models)
    where = f"; {'the GPU' if outlook.plan.gpus else 'this machine'} has {size(there)}" if there else ""
    yield "memory", (f"{size(most)} per process, measured for one step here" if most else "unknown") + where
    if len(models) == 1:
        yield "time", _time(models[0])
    elif here:
        each = ", ".join(stage + about(one.seconds or 0) for stage, one in zip(stages, models, strict=True))
        yield "total", f"about {about(here)} here{_on_h100s(models)} ({each})"
    else:
        yield "time", "unknown"
    yield from (("paper", text) for text in _in_paper(outlook))


def _in_paper(outlook: Outlook) -> list[str]:
    there = together([one.seconds for one in outlook.paper])
    return [f"--scale paper: {about(there)} here{_on_h100s(outlook.paper)}"] if there else []


def _set(outlook: Outlook) -> str:
    facts, described = outlook.facts, outlook.recipe.choice.facts
    if described is None or facts.size is None:
        return facts.title
    height, width = sides(facts.size)
    seen = replace(described, height=height, width=width, channels=facts.channels or described.channels)
    return f"{outlook.recipe.data.name.rpartition('/')[2]}: {seen.words}"


def _model(one: Forecast) -> str:
    train = one.part.train
    if one.params is None:
        return f"{one.part.title}: size unknown: {one.lacking or 'no trial step was run (GZ_TRIAL=0)'}"
    steps = "batches" if train.minutes else counted(train.steps, "step")
    giga = (one.flops or 0) / 1e9
    cost = f"; {giga:{',.0f' if giga >= 100 else '.3g'}} GFLOP per step" if giga else ""
    return f"{one.part.title}, {count(one.params)} parameters, {steps} of {train.batch_size} images{cost}"


def _time(one: Forecast) -> str:
    if one.part.train.minutes:
        return f"{about(60 * one.part.train.minutes)}; gz measures at the start how many steps fit"
    here = f"about {about(one.seconds)} here" if one.seconds else "unknown here"
    steps = one.steps_in(PLAN_MINUTES)
    return here + _on_h100s([one]) + (f"; `--minutes {PLAN_MINUTES}` makes {steps:,} steps" if steps else "")


def _on_h100s(forecasts: Sequence[Forecast]) -> str:
    """The total time on as many H100s as GPUs were requested; "" if gz has no estimate."""
    gpus = forecasts[0].gpus
    seconds = h100_seconds(forecasts, gpus)
    where = "an H100" if gpus == 1 else f"{gpus} H100s"
    return f", {about(seconds)} on {where}" if seconds else ""
