"""Reports of `gz bench` and `gz ood`: one page that needs nothing beside it, the same as Markdown, and its
tables for LaTeX."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gzcli.report import escapes, of_bench, of_ood
from gzcli.report.document import Chart, Column, Document, Dots, Picture
from gzcli.report.results import read
from gzcli.report.svg import svg
from gzcli.store import files, owned
from gzcli.version import __version__

FIGURES = "figures"  # folder of the pictures that Markdown names
# the marks of a template of LaTeX, where braces are the text's own
TEX: dict[str, Any] = {"variable_start_string": "<<", "variable_end_string": ">>"}
TEX |= {"comment_start_string": "<#", "comment_end_string": "#>"}
Drawn = Chart | Dots | Picture


def check(folder: Path) -> None:
    """Raises UsageError unless a report may be written into the folder: it is new, empty, or of a report."""
    if not owned.is_marked(folder, "report"):
        owned.check_empty(folder)


def write(results: Path, folder: Path | None = None) -> dict[str, str]:
    """Writes the report of the results in a folder. Returns the paths of its `html`, `markdown` and `latex`.

    Raises MissingError and UsageError where there are no results, UsageError where the folder holds anything
    else.
    """
    found = read(results)
    folder = (folder or found.folder / "report").absolute()
    check(folder)
    report = (of_bench if found.verb == "bench" else of_ood).document(found)
    folder.mkdir(parents=True, exist_ok=True)
    if not owned.is_marked(folder, "report"):
        owned.mark(folder, "report")
    shutil.rmtree(folder / FIGURES, ignore_errors=True)  # of the earlier report
    images = {id(item): (place, image(item)) for item, place in with_places(report)}
    for place, content in images.values():
        files.write_atomic(folder / place, content)
    made = {}
    for kind, name in (("html", "report.html"), ("markdown", "report.md"), ("latex", "report.tex")):
        files.write_atomic(folder / name, rendered(report, name, images))
        made[kind] = str(folder / name)
    return made


def with_places(report: Document) -> Iterator[tuple[Drawn, str]]:
    """Every drawing and picture with its path below the report's folder."""
    seen: set[str] = set()
    for section in report.sections:
        for item in section.items:
            if isinstance(item, Drawn):
                stem = re.sub(r"[^A-Za-z0-9.-]+", "-", item.name).strip("-.")[:80] or "figure"
                number = next(n for n in range(1, 10**6) if (f"{stem}-{n}" if n > 1 else stem) not in seen)
                stem = f"{stem}-{number}" if number > 1 else stem
                seen.add(stem)
                yield item, f"{FIGURES}/{stem}.{'png' if isinstance(item, Picture) else 'svg'}"


def image(item: Drawn) -> bytes:
    """The file of a drawing or picture."""
    return item.png if isinstance(item, Picture) else svg(item)


def rendered(report: Document, name: str, images: dict[int, tuple[str, bytes]]) -> str:
    """The report in the form that a file's name says."""
    env = Environment(
        loader=PackageLoader("gzcli.report"),
        autoescape=name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **(TEX if name.endswith(".tex") else {}),
    )
    env.filters |= {
        "code": escapes.html,
        "uri": lambda item: data_uri(*images[id(item)]),
        "md": escapes.markdown,
        "fenced": escapes.fenced,
    }
    env.filters |= {"md_code": escapes.markdown_sentence, "tex": escapes.latex}
    env.globals |= {"place": lambda item: images[id(item)][0], "arrow": arrow}
    env.globals |= {"version": __version__, "hash": csp_hash}
    env.globals["asset"] = lambda asset: Markup(env.loader and env.loader.get_source(env, asset)[0])
    return env.get_template(f"{name}.j2").render(report=report)


def arrow(column: Column) -> str:
    """The direction of better values as an arrow."""
    return {"down": "↓", "up": "↑", None: ""}[column.direction]


def csp_hash(text: str) -> str:
    """The hash by which the page's content security policy knows a script or style sheet of its own."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def data_uri(place: str, content: bytes) -> str:
    """An image within an address; the ending of its path says its format."""
    kind = "png" if place.endswith(".png") else "svg+xml"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
