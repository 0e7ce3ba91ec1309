"""The manual as text: the pages in order, the help of every command, and all of it at once for `gz --llm`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from gzcli.docs.page import ROOT, as_markdown, page_of
from gzcli.store.paths import recipe_names

TUTORIALS = ("first-model", "own-pictures", "ood-alarm", "compare")
GUIDES = (
    *("use", "data", "scale", "gpus", "ood", "bench", "recipes", "what_we_tried"),
    *("latents", "stable-diffusion", "share", "demo", "adding", "python", "questions"),
)
ORDER = (*TUTORIALS, *GUIDES)


def texts() -> dict[str, str]:
    """The Markdown of each page by its name, in order."""
    return {name: (ROOT / "pages" / f"{name}.md").read_text(encoding="utf-8") for name in ORDER}


PICTURE = re.compile(r"^ *!\[.*\]\(.*\)\n+", re.MULTILINE)  # which a text does not show


def commands(root: Any) -> str:
    """Every command of the command line with its arguments and options."""
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


def manual(root: Any) -> str:
    """Pages, commands and models in one Markdown text.

    root: the command line with all of its verbs.
    """
    pages = (PICTURE.sub("", text).strip() for text in texts().values())
    models = (as_markdown(page_of(name)).strip() for name in recipe_names())
    return "\n\n".join([*pages, commands(root).strip(), *models])
