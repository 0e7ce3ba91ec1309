"""The help of every command as Markdown, and the whole manual as one text for `gz --llm`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import typer

from gzcli.docs.as_text import as_text
from gzcli.docs.page import page_of
from gzcli.docs.pages import ORDER, composed
from gzcli.store.paths import recipe_names

PICTURE = re.compile(r"^ *!\[.*\]\(.*\)\n+", re.MULTILINE)  # which a text does not show


def commands(app: typer.Typer) -> str:
    """Every command with its arguments and options."""
    root = typer.main.get_command(app)
    return "\n".join(["# Commands", "", *_group(root, ("gz",))]).rstrip() + "\n"


def _group(command: Any, path: tuple[str, ...]) -> Iterator[str]:
    children = getattr(command, "commands", {})
    if not children:
        yield from _command(command, path)
    for name, child in children.items():
        yield from _group(child, (*path, name))


def _command(command: Any, path: tuple[str, ...]) -> Iterator[str]:
    """A command: its help, and a line for each argument and option that is its own."""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not getattr(p, "hidden", False)]
    usage = [p.metavar or p.name.upper() for p in arguments if not (p.metavar or "").startswith("--")]
    yield from (f"## `{' '.join(path)}`", "", (command.help or "").strip(), "")
    yield from (f"    {' '.join([*path, *usage])} [OPTIONS]", "")
    for param in arguments:
        yield f"- `{param.metavar or param.name}` {param.help or ''}".rstrip()
    for param in options:
        names = ", ".join([*param.opts, *param.secondary_opts])
        value = "" if getattr(param, "is_flag", False) else f" {param.metavar or param.name.upper()}"
        yield f"- `{names}{value}` {param.help or ''}".rstrip()
    yield ""


def manual(app: typer.Typer) -> str:
    """Pages, commands and models in one plain text.

    app: gz with all of its verbs.
    """
    pages = composed()
    models = (as_text(page_of(name), 120) for name in recipe_names())
    written = (PICTURE.sub("", pages[name]).strip() for name in ORDER if name in pages)
    return "\n\n".join([*written, commands(app).strip(), *models])
