"""`gz show`: a page on a model."""

from __future__ import annotations

import shutil
from typing import Annotated

import typer

from gzcli.cli import out
from gzcli.cli.options import Json, Quiet, complete_model

NARROWEST, WIDEST = 40, 100  # columns of a page


def show(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A model, as `gz list` names it.", autocompletion=complete_model
        ),
    ],
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Explain a model: the idea, the equation, options, commands, figures, limits."""
    from dataclasses import asdict

    from gzcli.docs.page import as_markdown, as_text, page_of

    page = page_of(model)
    columns = max(NARROWEST, min(WIDEST, shutil.get_terminal_size().columns))
    out.text(as_text(as_markdown(page), columns))
    out.data(asdict(page))
