"""`gz train --dry-run`: everything that would happen, with the origin of each value; nothing is created, no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gzcli.cli import out
from gzcli.errors import GzError

if TYPE_CHECKING:
    from gzcli.launch import Plan
    from gzcli.recipe.resolve import Recipe
    from gzcli.store.runs import Run


def show_plan(recipe: Recipe, plan: Plan, run: Run | None) -> None:
    """The resolved recipe with origins, the data set, what is needed, the run directory, the launch line."""
    from gzcli.launch import count_gpus, show
    from gzcli.store.paths import user_dir

    data, needs = data_facts(recipe.tree["data"])
    if plan.gpus > count_gpus():
        needs.append(f"{plan.gpus} GPUs (here: {count_gpus()})")
    path = run.path if run else user_dir("runs") / f"{recipe.card.name}-{data['key']}-<time>-<id>"
    line = show(path, plan)
    values = [(key, value, recipe.origin.get(key, "")) for key, value in leaves(recipe.tree)]
    out.table(["key", "value", "from"], [(key, "null" if value is None else str(value), origin) for key, value, origin in values])
    out.text("")
    size = f", {data['download'] / 1e6:,.0f} MB to fetch" if data["download"] and not data["cached"] else ""
    out.text(f"data       {data['title']} ({'cached' if data['cached'] else 'not cached'}{size})")
    out.text(f"needs      {', '.join(needs) or 'nothing that is not here'}")
    out.text(f"run        {'resumes ' if run else ''}{path}")
    out.text(f"processes  {plan.processes} × {plan.threads} threads, {plan.gpus or 'no'} GPU{'s' if plan.gpus != 1 else ''}")
    out.text(f"launch     {line}")
    out.data({"recipe": recipe.tree, "origin": recipe.origin, "data": data, "needs": needs, "run": path, "resume": run is not None,
              "processes": plan.processes, "gpus": plan.gpus, "launch": line})  # fmt: skip


def data_facts(section: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The set as far as it can be known without opening it, and what of it is missing."""
    from gzcli.data.library import data_key, listing, locate
    from gzcli.data.specs import DataSpec

    facts = {
        "name": section["name"],
        "key": data_key(section["name"]),
        "title": section["name"],
        "cached": False,
        "download": 0,
    }
    try:
        found = locate(section["name"])
    except GzError as error:
        return facts, [error.message]
    row = next((row for row in listing() if row["name"] == found.name), None)
    if row is None:
        return facts | {"title": str(found.path), "cached": True}, []
    download = found.sized(section["size"]).download_size if isinstance(found, DataSpec) else 0
    facts |= {"title": f"{row['name']}: {row['title']}", "cached": row["cached"], "download": download}
    return facts, [] if row["cached"] else [f"`gz data download {row['name']}`"]


def leaves(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of everything in the tree that is not a map."""
    found = []
    for key, value in tree.items():
        found += leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [(prefix + key, value)]
    return found
