"""Reports of `gz bench` and `gz ood` as files: one self-contained page, the same as Markdown, its tables for
LaTeX, and its charts as SVG."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from gzcli.core.errors import UsageError
from gzcli.report import bench, cited, ood
from gzcli.report.document import Chart, Document, Dots, Picture
from gzcli.report.results import ANEW, Results, rows_of
from gzcli.store import claims, files
from gzcli.store.run_folder import Run
from gzcli.version import __version__

FORMS = {"html": "report.html", "markdown": "report.md", "latex": "report.tex"}
FIGURES_FOLDER = "figures"  # folder of the images in Markdown
# delimiters of a LaTeX template, whose text contains braces
TEX: dict[str, Any] = {"variable_start_string": "<<", "variable_end_string": ">>"}
TEX |= {"comment_start_string": "<#", "comment_end_string": "#>"}
ARROWS = {"down": "↓", "up": "↑", None: ""}
_LATEX = {character: f"\\{character}" for character in "&%_#${}"}
_LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--"}
_LATEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "`": r"\textasciigrave{}"}
_LATEX |= {'"': "''", "…": r"\ldots{}"}
_SIGNS = {
    "·": "cdot",
    "×": "times",
    "→": "rightarrow",
    "↓": "downarrow",
    "↑": "uparrow",
    "±": "pm",
    "†": "dagger",
}
_SIGNS |= {"≤": "leq", "≥": "geq", "Σ": "Sigma", "σ": "sigma", "β": "beta", "½": "frac12"}
_LATEX |= {"−": "$-$"} | {sign: f"$\\{name}$" for sign, name in _SIGNS.items()}

# height in inches of a drawing, and of a line of its legend or of an estimate
DRAWING_INCHES, HEIGHT, LINE = 5.3, 3.2, 0.3
MAX_NAME_LETTERS, MAX_LEGEND_LETTERS = (
    22,
    44,
)  # most characters of a name beside an estimate, and in the legend
LINE_COLOURS = ("#1f5fbf", "#c2500c", "#0a7a5c", "#8a3fa8", "#9a7500", "#0f7f95", "#b52a62", "#5b6472")
INK_COLOUR, SOFT_COLOUR, FLOOR_COLOUR = "#1b202a", "#5a6372", "#b3261e"
# text stays text, names are not formulas, and the same results give the same file
STYLE: dict[Any, Any] = {"svg.fonttype": "none", "text.parse_math": False, "svg.hashsalt": "gz"}
STYLE |= {
    "font.size": 11,
    "text.color": INK_COLOUR,
    "axes.labelcolor": SOFT_COLOUR,
    "axes.edgecolor": SOFT_COLOUR,
}
STYLE |= {
    "xtick.color": INK_COLOUR,
    "ytick.color": INK_COLOUR,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
STYLE |= {"axes.grid": True, "grid.color": "#e3e5e8"}


def check(folder: Path) -> None:
    """Raises UsageError unless the folder is new, empty, or contains a report, OSError if it is not
    writable."""
    if Run(folder).is_marked("report"):
        claims.check_writable(folder)
    else:
        claims.check_empty(folder)


def check_columns(results: Results, columns: Sequence[str]) -> None:
    """Raises UsageError for columns that the results lack."""
    if results.verb == "ood":
        raise UsageError("`--columns` chooses metrics of `gz bench`, but these are results of `gz ood`")
    with files.reading(results.file, ANEW):
        cited.check(columns, cited.figures_of(rows_of(results.result)))


def write(results: Results, folder: Path | None = None, columns: Sequence[str] = ()) -> dict[str, str]:
    """Writes the report of results. Returns the paths of its `html`, `markdown` and `latex`.

    columns: columns of the table to cite; empty: the usual ones.
    """
    folder = (folder or results.folder / "report").absolute()
    check(folder)
    report = document_of(results, columns)
    files.make_folder(folder)
    if not Run(folder).is_marked("report"):
        Run(folder).mark("report")
    if (folder / FIGURES_FOLDER).is_symlink():
        (folder / FIGURES_FOLDER).unlink()
    shutil.rmtree(folder / FIGURES_FOLDER, ignore_errors=True)  # files of the earlier report
    images = {
        id(item): (path, item.png if isinstance(item, Picture) else svg(item))
        for item, path in with_paths(report)
    }
    for path, content in images.values():
        files.write_atomic(folder / path, content)
    for name in FORMS.values():
        files.write_atomic(folder / name, rendered(report, name, images))
    return {form: str(folder / name) for form, name in FORMS.items()}


def document_of(results: Results, columns: Sequence[str] = ()) -> Document:
    """The report. Raises DamagedError for values of wrong types, which results from elsewhere may contain."""
    with files.reading(results.file, ANEW):
        return bench.document(results, columns) if results.verb == "bench" else ood.document(results)


def with_paths(report: Document) -> Iterator[tuple[Chart | Dots | Picture, str]]:
    """Every drawing and image, with its path below the report's folder."""
    used: set[str] = set()
    for item in chain.from_iterable(section.items for section in report.sections):
        if isinstance(item, Chart | Dots | Picture):
            stem = re.sub(r"[^A-Za-z0-9.-]+", "-", item.name).strip("-.")[:80] or "figure"
            stems = chain([stem], (f"{stem}-{n}" for n in count(2)))
            stem = next(stem for stem in stems if stem not in used)
            used.add(stem)
            yield item, f"{FIGURES_FOLDER}/{stem}.{'png' if isinstance(item, Picture) else 'svg'}"


def rendered(report: Document, name: str, images: dict[int, tuple[str, bytes]]) -> str:
    """The report in the format of a file name."""
    env = Environment(
        loader=PackageLoader("gzcli.report"),
        autoescape=name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **(TEX if name.endswith(".tex") else {}),
    )
    env.filters |= {"code": html, "md": markdown, "md_code": markdown_sentence, "fenced": fenced}
    env.filters |= {"tex": latex, "uri": lambda item: data_uri(*images[id(item)])}
    env.globals |= {
        "version": __version__,
        "hash": csp_hash,
        "place": lambda item: images[id(item)][0],
        "arrow": lambda column: ARROWS[column.direction],
        "asset": lambda asset: Markup(env.loader and env.loader.get_source(env, asset)[0]),
    }
    return env.get_template(f"{name}.j2").render(report=report)


def csp_hash(text: str) -> str:
    """The hash of a script or style sheet in the page's content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def data_uri(path: str, content: bytes) -> str:
    """An image as a data URI; its format is the suffix of the path."""
    kind = "png" if path.endswith(".png") else "svg+xml"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


# ---------------------------------------------------------------------------- texts as they are, in each form


def html(text: str) -> Markup:
    """A sentence in which `…` marks code."""
    parts = (Markup("<code>{}</code>").format(part) if code else escape(part) for code, part in pieces(text))
    return Markup("").join(parts)


def markdown(text: str) -> str:
    return _escaped(text).strip()


def markdown_sentence(text: str) -> str:
    """A sentence in which `…` marks code."""
    return "".join(f"`{part}`" if code else _escaped(part) for code, part in pieces(text))


def _escaped(text: object) -> str:
    line = re.sub(r"([\\`*_{}\[\]#|~$])", r"\\\1", re.sub(r"\s+", " ", str(text)))
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def fenced(text: str) -> str:
    """A Markdown code block whose fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text.rstrip()}\n{fence}"


def latex(text: str) -> str:
    """A text for LaTeX without packages, which stops at most characters outside Latin-1: those are written as
    code points."""
    return "".join(map(_in_latex, " ".join(str(text).split())))


def _in_latex(character: str) -> str:
    readable = character < "\u0100" and character.isprintable() and character not in "«»ÐÞðþ"
    return _LATEX.get(character) or (character if readable else f"U+{ord(character):04X}")


def pieces(text: str) -> list[tuple[bool, str]]:
    """(is code, text) for the parts of a sentence. A sentence with an unclosed backtick is a single part."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return [(False, text)]
    return [(i % 2 == 1, part) for i, part in enumerate(parts) if part]


# ---------------------------------------------------------------------------- charts, by matplotlib


def svg(drawing: Chart | Dots) -> bytes:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    columns, content = 1, io.BytesIO()
    if isinstance(drawing, Chart):
        columns = max(
            1,
            64 // (8 + max((len(cut(line.name, MAX_LEGEND_LETTERS)) for line in drawing.series), default=0)),
        )
        height = HEIGHT + 0.7 * LINE * -(-len(drawing.series) // columns)
    else:
        height = 0.8 + LINE * len(drawing.rows)
    with rc_context(STYLE), warnings.catch_warnings():
        # only measured, because the browser's fonts draw it
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure = Figure((DRAWING_INCHES, height), layout="constrained")
        axes = figure.add_subplot()
        draw_chart(axes, drawing, columns) if isinstance(drawing, Chart) else draw_dots(axes, drawing)
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    return content.getvalue()


def draw_chart(axes: Any, drawing: Chart, columns: int) -> None:
    """Lines over one axis, with a legend of the given number of columns below."""
    lines = []
    for i, line in enumerate(drawing.series):
        colour, points = LINE_COLOURS[i % len(LINE_COLOURS)], list(zip(*line.points, strict=True)) or [(), ()]
        lines += axes.plot(*points, color=colour, linestyle="--" if line.dashed else "-", linewidth=1.5)
        if drawing.filled:
            axes.fill(*points, color=colour, alpha=0.16, linewidth=0)
    axes.set_xlabel(drawing.x, loc="right")
    axes.set_ylabel(drawing.y)
    axes.grid(visible=False, axis="x")
    axes.xaxis.set_major_formatter(short)
    axes.yaxis.set_major_formatter(short)
    if drawing.ticks:
        axes.set_xticks(*zip(*drawing.ticks, strict=True))
    # a label that starts with `_` would be left out, so names are inserted afterwards
    place = {"loc": "outside lower left", "ncols": columns, "frameon": False}
    legend = axes.figure.legend(lines, ["x"] * len(lines), **place)
    for text, line in zip(legend.get_texts(), drawing.series, strict=True):
        text.set_text(cut(line.name, MAX_LEGEND_LETTERS))


def draw_dots(axes: Any, drawing: Dots) -> None:
    for y, row in enumerate(drawing.rows):
        if row.low is not None and row.high is not None:
            axes.plot((row.low, row.high), (y, y), color=LINE_COLOURS[0], alpha=0.45, linewidth=3)
        axes.plot(row.value, y, "o", color=LINE_COLOURS[0], markersize=8 if row.best else 5.5)
    axes.axvline(drawing.floor, color=FLOOR_COLOUR, linestyle="--", linewidth=1)
    names = axes.set_yticks(
        range(len(drawing.rows)), [cut(row.name, MAX_NAME_LETTERS) for row in drawing.rows]
    )
    for tick, row in zip(names, drawing.rows, strict=True):
        tick.label1.set_fontweight("bold" if row.best else "normal")
    axes.set_ylim(len(drawing.rows) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_formatter(short)
    way = {"down": "lower is better · ", "up": "higher is better · ", None: ""}[drawing.direction]
    axes.set_xlabel(f"{way}dashed: floor", loc="right")


def cut(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def short(value: float, place: object = None) -> str:
    """A tick label such as 20k or 0.25; called by Matplotlib."""
    return f"{value / 1000:.4g}k" if abs(value) >= 10_000 else f"{value:.4g}"
