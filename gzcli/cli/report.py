"""`gz report`: the results of `gz bench` or `gz ood` as a page, as Markdown and as LaTeX tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from gzcli.cli import out
from gzcli.cli.jobs import bytes_of, end, quoted, took
from gzcli.cli.options import Columns, argument, option, split

_Folder = Annotated[Path, argument("FOLDER", "Output folder of `gz bench` or `gz ood` (printed as `files`).")]
_Out = Annotated[Path | None, option("--out DIR", "Output folder. Default: FOLDER/report.")]


def report(folder: _Folder, to: _Out = None, columns: Columns = None) -> None:
    """Write the results of `gz bench` or `gz ood` as HTML, Markdown and LaTeX.

    The HTML page is self-contained. LaTeX contains the table to cite.
    """
    from gzcli.report.results import read
    from gzcli.report.write import check_columns, write

    results = read(folder)
    if columns:
        check_columns(results, split(columns))
    paths = write(results, to, split(columns))
    page = Path(paths["html"])
    out.text(str(page))
    look = (f"python -m webbrowser {quoted(page)}", "open the page in a browser")
    more = (f"ls {quoted(page.parent)}", "list its Markdown, LaTeX and figures")
    end([bytes_of(page), took()], [look, more])
    out.data(paths)


def check_report(to: Path | None) -> None:
    """Raises UsageError, before any work is done, if the folder of `--report` contains anything but a
    report."""
    if to:
        from gzcli.report.write import check

        check(to)


def with_report(
    result: Mapping[str, Any], folder: Path, to: Path | None, columns: str | None = None
) -> dict[str, Any]:
    """The result of a verb. With `--report DIR`, writes the report and adds its paths."""
    if not to:
        return dict(result)
    from gzcli.report.results import read
    from gzcli.report.write import write

    paths = write(read(folder), to, split(columns))
    out.info(f"report: {paths['html']}")
    return {**result, "report": paths}


def page_of(result: Mapping[str, Any], folder: Path | str) -> list[tuple[str, str]]:
    """The next command that makes a page of a verb's result; none if `--report` has already written one."""
    return [] if "report" in result else [(f"gz report {quoted(folder)}", "make a page of the results")]
