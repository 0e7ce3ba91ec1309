"""`gz train --dry-run`: prints what would happen, and with `--keys` every value with its origin.

Nothing is created but what is found out about the cost of a step, in the cache; torch is loaded in another
process alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from gzcli.cli import out
from gzcli.cli.plan import Expected, expected, five_lines, total, total_on_h100s, total_params, wrapped
from gzcli.launch import requirements
from gzcli.launch.forecast import Forecast, together
from gzcli.launch.launcher import Plan, show, usable_gpus
from gzcli.launch.plan import check_batches, shared_out
from gzcli.launch.requirements import DataFacts
from gzcli.recipe.recipe import recipe_of
from gzcli.store.paths import user_dir

if TYPE_CHECKING:
    from gzcli.recipe.resolve import Resolved
    from gzcli.store.runs import Run


def show_plan(recipe: Resolved, plan: Plan, run: Run | None, paper: Resolved | None, *, keys: bool) -> None:
    """Prints the plan in five lines, what is missing, the run's folder and the launch line.

    recipe: the recipe.
    plan: the processes.
    run: the run that goes on; None: a new one would be made.
    paper: the recipe at the scale `paper`; None: it has none, or is it.
    keys: whether every key of the resolved recipe is printed too, with its origin.

    Raises UsageError where the set, as far as it is known, lacks what a model needs, where a model cannot be
    built by its options, or where the user's batch does not divide into the processes.
    """
    rounded: list[str] = []
    if run:
        check_batches(recipe_of(run.tree()), plan.processes, goes_on=True)
    else:
        recipe, rounded = shared_out(recipe, plan.processes)
    facts, needs = requirements.of_data(recipe)
    expect = expected(recipe, plan, facts, paper, measured=True, timed=True)
    for own in expect.own:
        if own.refused:
            raise own.refused
    needs += [*lacking(recipe, facts, expect, plan)]
    there = requirements.memory_of(plan)
    tree, origin = resolved_tree(recipe, facts, expect)
    path = run.path if run else user_dir("runs") / f"{recipe.card.name}-{facts.key}-<time>-<id>"
    line = show(path, plan)
    for text in five_lines(recipe, plan, facts, expect, there):
        out.text(text)
    for text in wrapped(", ".join(needs) or "nothing that is not here", "needs   "):
        out.text(text)
    gpus = f"{plan.gpus or 'no'} GPU{'s' if plan.gpus != 1 else ''}"
    out.text(f"run     {'resumes ' if run else ''}{path}")
    out.text(f"launch  {plan.processes} × {plan.threads} threads, {gpus}: {line}")
    if keys:
        out.text("")
        show_keys(tree, origin)
    for text in rounded:
        out.info(text)
    if hint := requirements.memory_hint(expect.own, plan, there):
        out.hint(hint)
    out.data(
        {
            **figures(recipe, expect),
            "recipe": tree,
            "origin": origin,
            "data": asdict(facts),
            "needs": needs,
            "run": path,
            "resume": run is not None,
            "processes": plan.processes,
            "gpus": plan.gpus,
            "launch": line,
        }
    )


def lacking(recipe: Resolved, facts: DataFacts, expect: Expected, plan: Plan) -> Iterator[str]:
    """What is not here beside the data: weights, runs and GPUs, and why something is not known."""
    if facts.info():
        yield from dict.fromkeys(one.lacking for one in expect.own if one.lacking)
    yield from requirements.absent_weights(recipe)
    yield from requirements.absent_runs(recipe)
    if plan.gpus and plan.gpus > (gpus := usable_gpus()).usable:
        count = f"{plan.gpus} GPU{'s' if plan.gpus > 1 else ''}"
        yield f"{count} ({gpus.lack or f'here: {gpus.there}'})"


def resolved_tree(
    recipe: Resolved, facts: DataFacts, expect: Expected
) -> tuple[dict[str, Any], dict[str, str]]:
    """The recipe as a tree, and the origin of each value, with what a real start finds out."""
    now = {key: getattr(facts, key) for key in ("size", "channels", "levels")}
    found = {key: v for key, v in now.items() if getattr(recipe.data, key) is None and v is not None}
    tree = recipe.on(replace(recipe.data, **found)).tree()
    origin = {**recipe.origin, **{f"data.{key}": "the set" for key in found}}
    for one in expect.own:
        part = tree["stages"][one.part.stage] if recipe.stages else tree
        if one.params is not None:
            part["params"] = one.params
            origin[f"stages.{one.part.stage}.params" if recipe.stages else "params"] = "the model"
    return tree, origin


def show_keys(tree: dict[str, Any], origin: Mapping[str, str]) -> None:
    """Prints every key with its value and origin."""
    rows = [
        (key, "null" if value is None else str(value), origin.get(key, ""))
        for key, value in leaves(tree)
        if (key.rpartition(".")[2], value) != ("params", None)
    ]
    out.table(
        ("key", "value", "from"),
        rows,
        spare=("from",),
        wrap=("value", "from"),
        narrow=12,
        elsewhere="`--json` has them",
    )


def figures(recipe: Resolved, expect: Expected) -> dict[str, Any]:
    """What is expected, for scripts: of all models together, and of each."""
    flops = together([one.flops for one in expect.own])
    sizes = [one.bytes for one in expect.own if one.bytes is not None]
    return {
        "scale": recipe.choice.scale,
        "params": total_params(expect.own),
        "gflop_per_step": flops and flops / 1e9,
        "bytes": max(sizes, default=None),
        "seconds": total(expect.own),
        "seconds_on_h100": total_on_h100s(expect.own, 1),
        "seconds_on_gpus": total_on_h100s(expect.own, expect.own[0].gpus),
        "memory": [row_of(one) for one in expect.own if one.params is not None],
    }


def row_of(one: Forecast) -> dict[str, Any]:
    """What is expected of one model, for scripts."""
    return {
        "model": one.part.model,
        "stage": one.part.stage or None,
        "params": one.params,
        "gflop_per_step": one.flops and one.flops / 1e9,
        "bytes": one.bytes,
        "steps": one.part.train.steps,
        "seconds_per_step": one.step,
        "seconds": one.seconds,
        "seconds_on_h100": one.on_h100s(1),
        "seconds_on_gpus": one.on_h100s(one.gpus),
    }


def leaves(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of everything in the tree that is not a map."""
    found = []
    for key, value in tree.items():
        is_map = isinstance(value, dict) and value
        found += leaves(value, f"{prefix}{key}.") if is_map else [(prefix + key, value)]
    return found
