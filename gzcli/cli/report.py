"""`gz report`: the results of a `gz bench` or `gz ood` as a page, as Markdown and as tables for LaTeX."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import typer

from gzcli.cli import out
from gzcli.cli.jobs import bytes_of, end, quoted, took
from gzcli.cli.options import Json, Quiet

_Folder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="Of a `gz bench` or `gz ood`: the one it calls `files`.")
]
_Out = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Where to write; into FOLDER/report without it.")
]


def report(folder: _Folder, to: _Out = None, json: Json = False, quiet: Quiet = False) -> None:
    """Write the results of a `gz bench` or `gz ood` as a page of HTML, as Markdown and as LaTeX tables.

    The page needs no other file and no network.
    """
    began = monotonic()
    from gzcli.report.write import write

    made = write(folder, to)
    out.text(made["html"])
    page = Path(made["html"])
    look = (f"python -m webbrowser {quoted(page)}", "the page in a browser")
    end(
        [bytes_of(page), took(began)],
        [look, (f"ls {quoted(page.parent)}", "its Markdown, LaTeX tables, figures")],
    )
    out.data(made)


def check_report(to: Path | None) -> None:
    """Raises UsageError before the work where `--report DIR` names a folder that holds anything else."""
    if to:
        from gzcli.report.write import check

        check(to)


def with_report(result: Mapping[str, Any], folder: Path, to: Path | None) -> dict[str, Any]:
    """The result of a verb; where `--report DIR` was given, with the report's paths, once it is written."""
    if not to:
        return dict(result)
    from gzcli.report.write import write

    made = write(folder, to)
    out.info(f"report: {made['html']}")
    return {**result, "report": made}
