"""`gz train --dry-run`: everything that would happen, with the origin of each value; nothing is created, no
torch. And the memory plan, which a real start shows too."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gzcli.cli import out
from gzcli.errors import GzError

if TYPE_CHECKING:
    from gzcli.launch import Plan
    from gzcli.recipe.resolve import Recipe
    from gzcli.store.runs import Run


def show_plan(recipe: Recipe, plan: Plan, run: Run | None) -> None:
    """The resolved recipe with origins, the data set, what is needed, memory, the run directory, the launch
    line.

    Raises UsageError where the set, as far as it is known, lacks what the model needs.
    """
    from gzcli.launch import count_gpus, show
    from gzcli.store.paths import user_dir

    check_packed(recipe)
    data, needs = data_facts(recipe.tree["data"])
    for key in ("size", "channels", "levels"):  # as the start will have them
        if recipe.tree["data"][key] is None and data[key] is not None:
            recipe.tree["data"][key], recipe.origin[f"data.{key}"] = data[key], "the set"
    memory, hint, lacking = memory_facts(recipe, plan)
    needs += [*lacking, *absent_weights(recipe), *absent_runs(recipe)]
    if plan.gpus > count_gpus():
        needs.append(f"{plan.gpus} GPUs (here: {count_gpus()})")
    path = run.path if run else user_dir("runs") / f"{recipe.card.name}-{data['key']}-<time>-<id>"
    line = show(path, plan)
    known = [
        (key, value)
        for key, value in leaves(recipe.tree)
        if (key.rpartition(".")[2], value) != ("params", None)
    ]
    values = [(key, value, recipe.origin.get(key, "")) for key, value in known]
    out.table(
        ["key", "value", "from"],
        [(key, "null" if value is None else str(value), origin) for key, value, origin in values],
    )
    out.text("")
    size = f", {data['download'] / 1e6:,.0f} MB to fetch" if data["download"] and not data["cached"] else ""
    state = "packed" if data["packed"] else "here, to be packed" if data["cached"] else f"not here{size}"
    out.text(f"data       {data['title']} ({state})")
    out.text(f"needs      {', '.join(needs) or 'nothing that is not here'}")
    out.text(f"run        {'resumes ' if run else ''}{path}")
    out.text(
        f"processes  {plan.processes} × {plan.threads} threads, {plan.gpus or 'no'} "
        f"GPU{'s' if plan.gpus != 1 else ''}"
    )
    for row in memory:
        out.text(f"{'memory':<10} {in_words(row)}")
    out.text(f"launch     {line}")
    if hint:
        out.hint(hint)
    out.data(
        {
            "recipe": recipe.tree,
            "origin": recipe.origin,
            "data": data,
            "needs": needs,
            "run": path,
            "resume": run is not None,
            "processes": plan.processes,
            "gpus": plan.gpus,
            "memory": memory,
            "launch": line,
        }
    )


def show_memory(recipe: Recipe, plan: Plan) -> None:
    """The memory plan of a run that starts, on stderr."""
    memory, hint, _ = memory_facts(recipe, plan)
    for row in memory:
        out.info(f"memory: {in_words(row)}")
    if hint:
        out.hint(hint)


def in_words(row: dict[str, Any]) -> str:
    parts = " + ".join(f"{part['what']} {size(part['bytes'])}" for part in row["parts"])
    return f"{row['model']}: {size(row['bytes'])} a process = {parts}"


def size(count: float) -> str:
    """Bytes for people: 1.7 GB, 12 MB."""
    return (
        f"{count / 1e9:.1f} GB"
        if count >= 1e9
        else f"{count / 1e6:,.0f} MB"
        if count >= 1e6
        else f"{count / 1e3:,.0f} kB"
    )


def memory_facts(recipe: Recipe, plan: Plan) -> tuple[list[dict[str, Any]], str | None, list[str]]:
    """For each model that is trained and whose family can tell: {model, bytes, parts: [{what, bytes}]} of one
    process; what to do where that is more than there is; and what is not at hand that it would take to
    tell."""
    from gzcli import launch
    from gzcli.cli.train import whole_trees
    from gzcli.models.catalog import card, memory_plan

    rows, lacking, hint = [], [], None
    for tree in whole_trees(recipe.tree):
        model = card(tree["model"]["name"])
        try:
            planned = memory_plan(
                model, tree | {"launch": tree["launch"] | {"processes": plan.processes, "gpus": plan.gpus}}
            )
        except GzError as error:
            lacking.append(error.message)
            continue
        if not planned:
            continue
        *parts, (_, total) = planned
        rows.append(
            {
                "model": model.name,
                "bytes": total,
                "parts": [{"what": what, "bytes": count} for what, count in parts],
            }
        )
        there = (
            launch.gpu_memory()
            if plan.gpus
            else launch.host_memory() // max(1, plan.processes // plan.machines)
        )
        if there and total > there:
            ways = ", ".join(ways_to_save(tree, plan)) or "a smaller `train.batch_size`"
            device = "the GPU" if plan.gpus else "this machine"
            hint = (
                f"`{model.name}` may not fit: {device} has {size(there)} for each process; what saves "
                f"memory: {ways}"
            )
    return rows, hint, lacking


def absent_weights(recipe: Recipe) -> list[str]:
    """How to fetch what is not here of the models that this one begins with: `model.base` and `data.latent`,
    ids of the hub."""
    from gzcli.cli.train import whole_trees
    from gzcli.store import runs
    from gzcli.store.weights import at_hand, is_id

    trees = whole_trees(recipe.tree)
    named = {
        name
        for tree in trees
        for name in (tree["model"].get("base"), tree["data"].get("latent"))
        if isinstance(name, str)
    }
    return [
        f"`hf download {name}`"
        for name in sorted(filter(is_id, named))
        if not at_hand(name) and not runs.by_name(name)
    ]


def absent_runs(recipe: Recipe) -> list[str]:
    """What is not here of the runs and files that this recipe is built on, by key."""
    from gzcli.cli.train import whole_trees
    from gzcli.store import runs
    from gzcli.store.weights import is_id

    found = []
    for tree in whole_trees(recipe.tree):
        named = {
            "data.latent": tree["data"].get("latent"),
            "train.init": tree["train"].get("init"),
            "ood.background": (tree.get("ood") or {}).get("background"),
        }
        for key, name in named.items():
            here = not name or name in recipe.tree.get("stages", ()) or Path(name).exists()
            if here or (
                key == "data.latent" and is_id(name)
            ):  # an id of the hub, of which `absent_weights` tells
                continue
            try:
                runs.find(name)
            except GzError as error:
                found.append(f"`{key}`: {error.message}" + (f" ({error.hint})" if error.hint else ""))
    return list(dict.fromkeys(found))


def ways_to_save(tree: dict[str, Any], plan: Plan) -> list[str]:
    """The keys of this recipe that make a training step smaller, as they would be typed, those that cost the
    least first."""
    model, train = tree["model"], tree["train"]
    cheaper = {"cache": (False, "true"), "checkpointing": (False, "true"), "dtype": ("fp32", "bf16")}
    ways = [f"`--set model.{key}={to}`" for key, (now, to) in cheaper.items() if model.get(key) == now]
    if plan.gpus and tree["optim"]["name"] in ("adam", "adamw"):
        ways.append("`--set optim.name=adamw8bit`")
    each = train["batch_size"] // plan.processes
    if parts := next((k for k in range(train["accumulate"] + 1, each + 1) if each % k == 0), None):
        ways.append(f"`--set train.accumulate={parts}`")
    return ways


def check_packed(recipe: Recipe) -> None:
    """Holds the model against a set of the user's own, as far as its pack tells. Raises UsageError."""
    from gzcli.cli.train import whole_trees
    from gzcli.data.open import peek
    from gzcli.models.catalog import card
    from gzcli.recipe.resolve import check_data

    data = recipe.tree["data"]
    try:
        meta = peek(data["name"], size=data["size"], channels=data["channels"])
    except GzError:  # `data_facts` tells of it
        return
    for tree in whole_trees(recipe.tree) if meta else ():
        check_data(tree, card(tree["model"]["name"]), meta.classes, meta.name, meta.extras)


def data_facts(section: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The set as far as it can be known without opening it, and what of it is missing."""
    from gzcli.data.library import listing
    from gzcli.data.names import data_key, locate
    from gzcli.data.open import peek
    from gzcli.data.specs import DataSpec

    name, size = section["name"], section["size"]
    facts = {
        "name": name,
        "key": data_key(name),
        "title": name,
        "cached": False,
        "packed": False,
        "download": 0,
        "size": size,
        "channels": section["channels"],
        "levels": section["levels"],
    }
    try:
        found = locate(name)
        meta = peek(name, size=size, channels=section["channels"])
    except GzError as error:
        return facts, [error.message]
    if meta:
        facts |= {
            "packed": True,
            "channels": meta.shape[0],
            "size": meta.shape[1],
            "levels": section["levels"] or meta.levels,
        }
    elif isinstance(found, DataSpec):
        own = {"size": found.sized(size).size, "channels": found.channels, "levels": found.levels}
        facts |= {key: facts[key] or value for key, value in own.items()}
    row = next((row for row in listing() if row["name"] == found.name), None)
    if row is None:
        return facts | {"title": str(found.path), "cached": True}, []
    here = row["cached"] or (row["path"] is not None and Path(row["path"]).exists())
    download = found.sized(size).download_size if isinstance(found, DataSpec) else 0
    facts |= {"title": f"{row['name']}: {row['title']}", "cached": here, "download": download}
    return facts, [] if here else [f"`gz data download {row['name']}`"]


def leaves(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of everything in the tree that is not a map."""
    found = []
    for key, value in tree.items():
        found += (
            leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [(prefix + key, value)]
        )
    return found
