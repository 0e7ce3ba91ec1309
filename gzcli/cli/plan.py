"""`gz train --dry-run`: prints everything that would happen, with the origin of each value.

Nothing is created, and torch is not loaded. The memory plan is printed by a real start too.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from gzcli.cli import out
from gzcli.units import size

if TYPE_CHECKING:
    from gzcli.launch import Plan
    from gzcli.recipe.recipe import Recipe
    from gzcli.recipe.resolve import Resolved
    from gzcli.requirements import Memory
    from gzcli.store.runs import Run


def show_plan(recipe: Resolved, plan: Plan, run: Run | None) -> None:
    """Prints the resolved recipe with origins, the data set, what is missing, memory, the run's folder and
    the launch line.

    recipe: the recipe.
    plan: the processes.
    run: the run that goes on; None: a new one would be made.

    Raises UsageError where the set, as far as it is known, lacks what a model needs.
    """
    from gzcli import requirements
    from gzcli.launch import count_gpus, show
    from gzcli.store.paths import user_dir

    data, needs = requirements.of_data(recipe)
    # a real start fills these in from the data set
    now = {key: getattr(data, key) for key in ("size", "channels", "levels")}
    found = {key: v for key, v in now.items() if getattr(recipe.data, key) is None and v is not None}
    tree = recipe.on(replace(recipe.data, **found)).tree()
    origin = {**recipe.origin, **{f"data.{key}": "the set" for key in found}}
    memory = requirements.of_memory(recipe, plan)
    needs += [*memory.lacking, *requirements.absent_weights(recipe), *requirements.absent_runs(recipe)]
    if plan.gpus > count_gpus():
        needs.append(f"{plan.gpus} GPUs (here: {count_gpus()})")
    path = run.path if run else user_dir("runs") / f"{recipe.card.name}-{data.key}-<time>-<id>"
    line = show(path, plan)
    out.table(
        ["key", "value", "from"],
        [
            (key, "null" if value is None else str(value), origin.get(key, ""))
            for key, value in leaves(tree)
            if (key.rpartition(".")[2], value) != ("params", None)
        ],
    )
    out.text("")
    download = f", {data.download / 1e6:,.0f} MB to fetch" if data.download and not data.cached else ""
    state = "packed" if data.packed else "here, to be packed" if data.cached else f"not here{download}"
    out.text(f"data       {data.title} ({state})")
    out.text(f"needs      {', '.join(needs) or 'nothing that is not here'}")
    out.text(f"run        {'resumes ' if run else ''}{path}")
    out.text(
        f"processes  {plan.processes} × {plan.threads} threads, {plan.gpus or 'no'} "
        f"GPU{'s' if plan.gpus != 1 else ''}"
    )
    for row in memory.models:
        out.text(f"{'memory':<10} {in_words(row)}")
    out.text(f"launch     {line}")
    if memory.hint:
        out.hint(memory.hint)
    out.data(
        {
            "recipe": tree,
            "origin": origin,
            "data": asdict(data),
            "needs": needs,
            "run": path,
            "resume": run is not None,
            "processes": plan.processes,
            "gpus": plan.gpus,
            "memory": [
                {
                    "model": row.model,
                    "bytes": row.bytes,
                    "parts": [{"what": what, "bytes": count} for what, count in row.parts],
                }
                for row in memory.models
            ],
            "launch": line,
        }
    )


def show_memory(recipe: Recipe, plan: Plan) -> None:
    """Prints the memory plan of a run that starts, on stderr."""
    from gzcli import requirements

    memory = requirements.of_memory(recipe, plan)
    for row in memory.models:
        out.info(f"memory: {in_words(row)}")
    if memory.hint:
        out.hint(memory.hint)


def in_words(row: Memory) -> str:
    """The memory of a model and of its parts, as a line."""
    parts = " + ".join(f"{what} {size(count)}" for what, count in row.parts)
    return f"{row.model}: {size(row.bytes)} a process = {parts}"


def leaves(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of everything in the tree that is not a map."""
    found = []
    for key, value in tree.items():
        is_map = isinstance(value, dict) and value
        found += leaves(value, f"{prefix}{key}.") if is_map else [(prefix + key, value)]
    return found
