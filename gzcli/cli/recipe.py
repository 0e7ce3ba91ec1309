"""`gz recipe`: read, copy and check recipes; their schema for editors."""

from __future__ import annotations

import sys
from pathlib import Path
from time import monotonic
from typing import Annotated

import typer

from gzcli.cli import out
from gzcli.cli.jobs import end, quoted, took
from gzcli.cli.list import alone, list_recipes
from gzcli.cli.model_options import Sets
from gzcli.cli.options import Json, Quiet, Scale, complete_data, complete_model
from gzcli.core.errors import UsageError
from gzcli.core.units import counted

app = typer.Typer(
    help="Show, copy and check recipes; a schema of them for editors.",
    callback=alone("recipe", list_recipes),
    invoke_without_command=True,
)

_WHAT = {"metavar": "NAME|FILE", "autocompletion": complete_model}
_What = Annotated[str, typer.Argument(help="A shipped recipe, or a file.", **_WHAT)]
_Data = Annotated[
    str | None, typer.Option(metavar="NAME", help="Resolve it for a data set.", autocompletion=complete_data)
]


@app.command()
def show(
    recipe: _What,
    data: _Data = None,
    scale: Scale = None,
    sets: Sets = None,
    resolved: Annotated[bool, typer.Option("--resolved", help="Show every key, not the file.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Print a recipe: its file, or every key with `--data`, `--set` or `--resolved`; and what keys mean."""
    from gzcli.launch.launcher import usable_gpus
    from gzcli.recipe.describe import WIDTH, annotated, texts
    from gzcli.recipe.files import show as text_of
    from gzcli.recipe.resolve import resolve

    as_file = not (data or scale or sets or resolved or out.is_json())
    if as_file:
        out.text(text_of(recipe).rstrip())
    there = usable_gpus().usable
    try:
        result = resolve(recipe, data=data, sets=sets or (), flags={"scale": scale}, gpus=there)
    except UsageError:
        if as_file:  # `gz recipe check` tells what is wrong with it
            return
        raise
    tree, docs = result.tree(), texts(result)
    width = min(WIDTH, out.room(sys.stdout) or WIDTH)
    if as_file:
        every = annotated(tree, docs, width - len("# ")).splitlines()
        out.text("\n".join(["", "# Every key, as it resolves, and what it means:", "#"]))
        out.text("\n".join(f"# {line}" for line in every))
    else:
        out.text(annotated(tree, docs, width))
    shown = {"recipe": result.card.name, "path": result.source, "tree": tree, "origin": result.origin}
    out.data({**shown, "docs": {key: docs[key] for key in result.origin if key in docs}})


@app.command()
def copy(
    recipe: _What,
    to: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="The new file; NAME.yaml without it.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Copy a recipe, to make it your own."""
    from gzcli.recipe.files import show as text_of
    from gzcli.store.files import write_atomic

    text = text_of(recipe)
    name = f"{Path(recipe).name.removesuffix('.yaml')}.yaml"
    target = to or Path(name)
    target = target / name if target.is_dir() else target
    if target.exists() and not force:
        raise UsageError(
            f"`{target}` is there already", hint="`--force` writes over it, or name another file"
        )
    write_atomic(target, text)
    out.text(str(target))
    file = quoted(target if "/" in str(target) else f"./{target}")
    check_it = (f"gz recipe check {file}", "after each change")
    end([f"{len(text.splitlines())} lines"], [check_it, (f"gz train {file}", "a run by it")])
    out.data({"recipe": recipe, "path": target})


@app.command()
def check(
    recipes: Annotated[
        list[str] | None, typer.Argument(help="Recipes or files; every shipped recipe without any.", **_WHAT)
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check recipes, for every data set that they name; all mistakes at once."""
    began = monotonic()
    from gzcli.recipe.resolve import check as problems_of
    from gzcli.store.paths import recipe_names

    names = list(recipes or recipe_names())
    problems = [problem for name in names for problem in problems_of(name)]
    if len(problems) == 1:
        raise UsageError(problems[0])
    if problems:
        raise UsageError("\n  ".join([f"{len(problems)} mistakes", *problems]))
    out.text(f"{counted(len(names), 'recipe')}, no mistake")
    if recipes:
        name = quoted(recipes[0])
        plan = (f"gz train {name} --dry-run", "what it would do, and what that takes here")
        end([took(began)], [plan, (f"gz train {name}", "a run by it")])
    out.data({"recipes": names, "ok": True})


@app.command("schema")
def schema_(json: Json = False, quiet: Quiet = False) -> None:
    """Print the JSON schema of recipes, by which editors complete and check them."""
    from json import dumps

    from gzcli.recipe.describe import recipe_schema

    tree = recipe_schema()
    out.text(dumps(tree, indent=1, ensure_ascii=False))
    out.data({"recipe_schema": tree})
