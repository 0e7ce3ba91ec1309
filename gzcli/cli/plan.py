"""What `gz train` tells of a run before it starts: scale, set, size, memory and time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from gzcli.cli import out, tables
from gzcli.core.errors import GzError, UsageError
from gzcli.core.units import about, count, size
from gzcli.launch import forecast, requirements
from gzcli.launch.forecast import Forecast
from gzcli.launch.requirements import DataFacts

if TYPE_CHECKING:
    from gzcli.launch.launcher import Plan
    from gzcli.recipe.recipe import Recipe
    from gzcli.recipe.resolve import Resolved

WIDTH = 80  # columns of a terminal that a plan is written for
MINUTES = 60  # of which it is told what `--minutes` would choose


@dataclass(frozen=True)
class Expected:
    """What is expected of a run.

    own: of its models, in order.
    paper: of the same models at the scale `paper`; [] where that is the run's own, or is not known.
    """

    own: Sequence[Forecast]
    paper: Sequence[Forecast] = ()


def at_paper(
    what: str, data: str | None, sets: Iterable[str], flags: Mapping[str, Any], chosen: Resolved
) -> Resolved | None:
    """The recipe at the scale `paper`, beside which the time of what was chosen is told; None where it is
    that already or has none, or where the length of the run was typed.

    what, data, sets, flags: as `ask` was given them.
    chosen: the recipe that was asked for.
    """
    from gzcli.launch.plan import ask

    if chosen.choice.scale in (None, "paper") or length_is_typed(chosen):
        return None
    try:
        return ask(what, data, sets, {**flags, "scale": "paper"}).recipe
    except GzError:
        return None


def length_is_typed(recipe: Resolved) -> bool:
    """Whether the command line says how long to train, so that nobody waits for an estimate of it."""
    typed = (key for key, origin in recipe.origin.items() if origin.startswith("--"))
    return any(key.endswith(("train.steps", "train.minutes")) for key in typed)


def expected(
    recipe: Resolved, plan: Plan, facts: DataFacts, paper: Resolved | None, *, measured: bool, timed: bool
) -> Expected:
    """What is expected of a recipe.

    facts: what is known of its data set.
    paper: the recipe at the scale `paper`.
    measured: whether what is not in the cache is found out now.
    timed: whether a step is tried for it.
    """
    measure = partial(forecast.measured, say=out.info) if measured else None
    rows = forecast.expect(recipe, plan, facts.info(), measure=measure, timed=timed, other=paper)
    return Expected(*rows)


# ---------------------------------------------------------------------------- in words


def in_short(recipe: Resolved, facts: DataFacts, expect: Expected) -> list[str]:
    """One or two lines on what is about to be trained."""
    scale = f"scale {recipe.choice.scale} ({recipe.choice.why}): " if recipe.choice.scale else ""
    first = scale + _set_in_words(recipe, facts)
    steps = sum(one.part.train.steps for one in expect.own)
    second = [_params(expect.own), f"{steps:,} steps"] if _timed(recipe) else [_params(expect.own)]
    here, there = total(expect.own), total(expect.paper)
    times = f"about {about(here)} here" if here else ""
    if here and there:
        times += f"; --scale paper: {about(there)} here{on_h100s(expect.paper)}"
    line = ", ".join(filter(None, second))
    lines = [first, *wrapped(f"{line}: {times}" if times and line else line or times)]
    return [line for line in lines if line]


def five_lines(
    recipe: Resolved, plan: Plan, facts: DataFacts, expect: Expected, there: int | None
) -> list[str]:
    """Scale, set, model, memory and time; of stages the memory of the largest, and the time of all.

    there: bytes that a process may take; None: not known.
    """
    choice = recipe.choice
    scale = f"{choice.scale} ({choice.why})" if choice.scale else "the recipe has no scales"
    rows = [("scale", scale), ("set", _set_in_words(recipe, facts) + _not_packed(facts))]
    where = f"; {'the GPU' if plan.gpus else 'this machine'} has {size(there)}" if there else ""
    staged = len(expect.own) > 1
    for one in expect.own:
        rows.append(("model", _named(one, staged) + _model(one)))
    largest = max(expect.own, key=lambda one: one.bytes or 0)
    rows.append(("memory", _memory(largest, where)))
    if not staged:
        rows.append(("time", _time(expect.own[0])))
    elif here := total(expect.own):
        each = ", ".join(_named(one, staged) + about(one.seconds or 0) for one in expect.own)
        rows.append(("in all", f"about {about(here)} here{on_h100s(expect.own)} ({each})"))
    else:
        rows.append(("time", "here: not known"))
    if in_paper := total(expect.paper):
        rows.append(("paper", f"--scale paper: {about(in_paper)} here{on_h100s(expect.paper)}"))
    return [line for label, text in rows for line in wrapped(text, f"{label:<8}")]


def wrapped(text: str, head: str = "") -> list[str]:
    """The text in lines that fit the terminal, broken at spaces, below a heading."""
    return tables.wrapped(text, head, out.width(WIDTH))


def _set_in_words(recipe: Resolved, facts: DataFacts) -> str:
    from gzcli.core.units import sides

    known = recipe.choice.facts
    if known is None or facts.size is None:
        return facts.title
    height, width = sides(facts.size)
    taken = replace(known, height=height, width=width, channels=facts.channels or known.channels)
    return f"{recipe.data.name.rpartition('/')[2]}: {taken.words}"


def _not_packed(facts: DataFacts) -> str:
    """Where a set is, in brackets; nothing where it is ready."""
    if facts.packed:
        return ""
    download = f", {facts.download / 1e6:,.0f} MB to fetch" if facts.download else ""
    return " (here, to be packed)" if facts.cached else f" (not here{download})"


def _named(one: Forecast, staged: bool) -> str:
    return f"{one.part.stage}: " if staged else ""


def _timed(recipe: Resolved) -> bool:
    return not any(part.train.minutes for part in recipe.parts)


def _params(forecasts: Sequence[Forecast]) -> str:
    params = total_params(forecasts)
    return f"{count(params)} parameters" if params else ""


def total_params(forecasts: Sequence[Forecast]) -> int | None:
    """The parameters of all models; None: not known."""
    params = forecast.together([one.params for one in forecasts])
    return None if params is None else int(params)


def _model(one: Forecast) -> str:
    train = one.part.train
    if one.params is None:
        return f"{one.part.model}: not known: {one.lacking or 'no step is tried here (GZ_TRIAL=0)'}"
    steps = f"--minutes {train.minutes:g}" if train.minutes else f"{train.steps:,} steps"
    cost = f" at {gflop(one.flops)} GFLOP" if one.flops else ""
    return f"{one.part.model}, {count(one.params)} parameters, {steps} of {train.batch_size}{cost}"


def gflop(flops: float) -> str:
    """Operations in 10⁹, in three digits."""
    return f"{flops / 1e9:,.0f}" if flops >= 1e11 else f"{flops / 1e9:.3g}"


def _memory(one: Forecast, where: str) -> str:
    if one.bytes is None:
        return f"here: not known{where}"
    return f"{size(one.bytes)} a process, as a step took here{where}"


def _time(one: Forecast) -> str:
    if one.part.train.minutes:
        return about(60 * one.part.train.minutes)
    here = one.seconds
    text = f"about {about(here)} here" if here else "here: not known"
    text += on_h100s([one])
    if steps := one.steps_in(MINUTES):
        text += f"; --minutes {MINUTES}: {steps:,} steps"
    return text


def total(forecasts: Sequence[Forecast]) -> float | None:
    """Seconds of all here; None: not known."""
    return forecast.together([one.seconds for one in forecasts])


def on_h100s(forecasts: Sequence[Forecast]) -> str:
    """The time of all on as many H100s as there are GPUs asked for, in words; "" where it is not known."""
    gpus = forecasts[0].gpus
    seconds = total_on_h100s(forecasts, gpus)
    where = "an H100" if gpus == 1 else f"{gpus} H100s"
    return f", {about(seconds)} on {where} at {forecast.SHARE:.0%} of peak" if seconds else ""


def total_on_h100s(forecasts: Sequence[Forecast], gpus: int) -> float | None:
    """Seconds of all on so many H100s; None: not known."""
    return forecast.together([one.on_h100s(gpus) for one in forecasts])


def start_or_not(seconds: float | None, *, most: float, span: str, ways: str, yes: bool) -> None:
    """Asks on a terminal whether to start what takes long here; in a script it says so.

    seconds: that it takes; None: not known.
    most: seconds up to which nobody is asked.
    span: these in words.
    ways: what takes less.
    yes: whether `--yes` was given.

    Raises UsageError where the answer is no.
    """
    if seconds is None or seconds <= most or yes:
        return
    long, ways = f"about {about(seconds)} on this machine", f"`--yes` starts it; {ways}"
    if not out.on_terminal():
        out.warn(f"{long}: more than {span}; {ways}")
    elif not out.confirmed(f"{long}: start?"):
        raise UsageError(f"not started: it would take {long}", hint=ways)


def before_start(asked: Resolved, recipe: Recipe, plan: Plan, paper: Resolved | None, *, yes: bool) -> None:
    """Prints in short what is about to be trained.

    A step is tried to tell the time, but not for the embedded sets, demonstrations that take a minute, nor
    where the length was typed.

    asked: the recipe as it was asked for.
    recipe: what is trained, with what its data set decides.
    paper: the recipe at the scale `paper`; None: it has none, or is it.
    yes: whether `--yes` was given.

    Raises UsageError where it would take more than a week, and the user does not want that.
    """
    facts, _ = requirements.of_data(asked)
    embedded = getattr(asked.found, "embedded", False)
    timed = not (embedded or length_is_typed(asked))
    whole = replace(asked, parts=recipe.parts, data=recipe.data)
    expect = expected(whole, plan, facts, paper if timed else None, measured=timed, timed=timed)
    for line in in_short(whole, facts, expect):
        out.info(line)
    if hint := requirements.memory_hint(expect.own, plan, requirements.memory_of(plan)):
        out.hint(hint)
    less = "`--scale small`, `--minutes 60` or a GPU take less"
    start_or_not(total(expect.own), most=forecast.WEEK, span="a week", ways=less, yes=yes)
