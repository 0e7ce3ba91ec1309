"""`gz recipe`: read, copy and check recipes; their schema for editors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from gzcli.cli import options as opt
from gzcli.cli import out
from gzcli.cli.jobs import end, quoted, took
from gzcli.cli.list import group, list_recipes
from gzcli.cli.options import a_model, a_set, argument, option
from gzcli.core.errors import UsageError
from gzcli.core.hints import Option, advice
from gzcli.core.units import counted
from gzcli.store.files import write_atomic
from gzcli.store.paths import recipe_names

app = group("recipe", list_recipes)

_What = Annotated[str, argument("NAME|FILE", "A shipped recipe, or a file.", a_model)]
_SOME_HELP = "Recipes or files. Default: every shipped recipe."
_Some = Annotated[list[str] | None, argument("NAME|FILE", _SOME_HELP, a_model)]
_Data = Annotated[str | None, option("--data NAME", "Resolve the recipe for a data set.", complete=a_set)]
_Resolved = Annotated[bool, option("--resolved", "Print every resolved key instead of the file.")]
_To = Annotated[Path | None, argument("FILE", "The new file. Default: NAME.yaml.")]


@app.command()
def show(
    recipe: _What,
    data: _Data = None,
    scale: opt.Scale = None,
    sets: opt.Sets = None,
    resolved: _Resolved = False,
) -> None:
    """Print a recipe and the meaning of its keys. `--data`, `--set` and `--resolved` print every key."""
    from gzcli.launch.launcher import usable_gpus
    from gzcli.recipe.describe import PAGE_COLUMNS, annotated, key_texts
    from gzcli.recipe.files import show as text_of
    from gzcli.recipe.resolve import resolve

    as_file = not (data or scale or sets or resolved or out.is_json())
    if as_file:
        out.text(text_of(recipe).rstrip())
    gpus = usable_gpus().usable
    try:
        result = resolve(recipe, data=data, sets=sets or (), flags={"scale": scale}, gpus=gpus)
    except UsageError:
        if as_file:  # `gz recipe check` reports its mistakes
            return
        raise
    tree, docs = result.tree(), key_texts(result)
    width = min(PAGE_COLUMNS, out.room(sys.stdout) or PAGE_COLUMNS)
    if as_file:
        every = annotated(tree, docs, width - len("# ")).splitlines()
        out.text("\n".join(["", "# Every key with its resolved value and its meaning:", "#"]))
        out.text("\n".join(f"# {line}" for line in every))
    else:
        out.text(annotated(tree, docs, width))
    shown = {"recipe": result.card.name, "path": result.source, "tree": tree, "origin": result.origin}
    out.data({**shown, "docs": {key: docs[key] for key in result.origin if key in docs}})


@app.command()
def copy(recipe: _What, to: _To = None, force: opt.Force = False) -> None:
    """Copy a recipe so that you can change it."""
    from gzcli.recipe.files import show as text_of

    text = text_of(recipe)
    name = f"{Path(recipe).name.removesuffix('.yaml')}.yaml"
    target = to or Path(name)
    target = target / name if target.is_dir() else target
    if target.exists() and not force:
        hint = advice("overwrite it with {}, or name another file", Option("force"))
        raise UsageError(f"`{target}` already exists", hint=hint)
    write_atomic(target, text)
    out.text(str(target))
    file = quoted(target if "/" in str(target) else f"./{target}")
    check_it = (f"gz recipe check {file}", "check it after each change")
    end([f"{len(text.splitlines())} lines"], [check_it, (f"gz train {file}", "train it")])
    out.data({"recipe": recipe, "path": target})


@app.command()
def check(recipes: _Some = None) -> None:
    """Check recipes for every data set that they name, and print all mistakes at once."""
    from gzcli.recipe.resolve import check as problems_of

    names = list(recipes or recipe_names())
    problems = [problem for name in names for problem in problems_of(name)]
    if len(problems) == 1:
        raise UsageError(problems[0])
    if problems:
        raise UsageError("\n  ".join([f"{len(problems)} mistakes", *problems]))
    out.text(f"{counted(len(names), 'recipe')}, no mistakes")
    if recipes:
        name = quoted(recipes[0])
        plan = (f"gz train {name} --dry-run", "show the plan and the estimated time")
        end([took()], [plan, (f"gz train {name}", "train it")])
    out.data({"recipes": names, "ok": True})


@app.command("schema")
def schema_() -> None:
    """Print the JSON schema of recipes, for completion and checks in editors."""
    from json import dumps

    from gzcli.recipe.describe import recipe_schema

    tree = recipe_schema()
    out.text(dumps(tree, indent=1, ensure_ascii=False))
    out.data({"recipe_schema": tree})
