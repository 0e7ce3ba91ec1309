"""The only module that writes to the terminal: data to stdout, everything else to stderr. It stores the
switches `--json` and `-q`. Tables and texts fit the terminal: the least important columns are omitted first,
and texts are wrapped between words.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from gzcli.core import streams
from gzcli.core.errors import GzError
from gzcli.core.streams import in_a_line, room, wrapped

_mode = {"json": False, "quiet": False, "lenient": False, "lost": False}
HIDDEN_COLUMNS_NOTE = "see `--wide` or `--json`"  # the columns that did not fit
COLUMN_GAP, MIN_COLUMN_WIDTH = "  ", 24
BROKEN_PIPE_CODE = 128 + 13  # the exit code if nobody reads stdout any longer, as after `| head`
_STYLES = {"red": "31", "yellow": "33", "cyan": "36", "bold": "1", "dim": "2"}
# Marks of the beginning of each style and of the end of any in a text before it is written. They are no
# characters, so that only gz itself can colour a text, and no sequence in a name reaches a terminal.
_MARKS = {name: chr(0xFDD0 + i) for i, name in enumerate(_STYLES)}
_END = "\ufdef"
_SEQUENCES = {_MARKS[name]: f"\033[{code}m" for name, code in _STYLES.items()} | {_END: "\033[0m"}


def configure(**switches: bool | None) -> None:
    """Sets the switches `json`, `quiet`, `lenient` and `lost`; None leaves one unchanged. `lenient`: a closed
    or full stdout does not end the verb. `lost`: stdout has failed, so errors go to stderr."""
    _mode.update({key: value for key, value in switches.items() if value is not None})


def is_json() -> bool:
    return _mode["json"]


def is_quiet() -> bool:
    return _mode["quiet"]


def mode() -> str:
    """How an engine process prints: as "human", "quiet" or "json" lines."""
    return "json" if is_json() else "quiet" if is_quiet() else "human"


# --- stdout: data ---


def data(obj: Mapping[str, Any]) -> None:
    """JSON mode: prints one line, `"schema": 1` first, NaN and infinity as null. Human mode: nothing."""
    if is_json():
        _write(sys.stdout, json.dumps({"schema": 1, **_plain(obj)}, ensure_ascii=False), styled=False)


def text(string: str) -> None:
    """Human mode: prints a line or a document. JSON mode: nothing."""
    if not is_json():
        _write(sys.stdout, string)


def picture(path: Path, *, opened: bool = False) -> None:
    """Human mode: prints the path of an image, preceded by the image itself if the terminal can show it.
    opened: whether the desktop's viewer shows it too.
    """
    from gzcli.report import preview

    way = preview.protocol() if mode() == "human" and colourful(sys.stderr) else None
    if way and (drawn := preview.drawn(path, way)):
        _put(sys.stderr, drawn)
    if mode() == "human" and colourful(sys.stdout) and (link := preview.link(path)):
        _put(sys.stdout, link)
    else:
        text(str(path))
    if opened:
        import typer

        typer.launch(str(path))


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    spare: Sequence[str] | Mapping[str, str] = (),
    wrap: Sequence[str] = (),
    narrow: int = MIN_COLUMN_WIDTH,
    wide: bool = False,
    to_stderr: bool = False,
    elsewhere: str = HIDDEN_COLUMNS_NOTE,
) -> None:
    """Human mode: prints the lines of a table that fit the terminal, under a bold head. JSON mode: nothing.

    spare: headings of the columns that may be omitted, in order of omission; a mapping also gives their names
      in the note on omitted columns.
    to_stderr: whether it is printed like a line of `info`.
    elsewhere: command that shows the columns that did not fit.
    """
    if is_quiet() if to_stderr else is_json():
        return
    stream = sys.stderr if to_stderr else sys.stdout
    columns_of_stream = None if wide else room(stream)
    (head, *rest), hidden = table_lines(columns, rows, list(spare), wrap, narrow, columns_of_stream)
    _write(stream, "\n".join([style(head, "bold", stream), *rest]))
    if hidden:
        names = " ".join(spare[name] if isinstance(spare, Mapping) else name for name in hidden)
        info(f"omitted to save space: {names} ({elsewhere})")


def width() -> int:
    """The width for texts on stderr, at most 80 columns."""
    return min(80, room(sys.stderr) or 80)


def wrapped_text(text: str, head: str = "") -> list[str]:
    """The text, wrapped to fit stderr, below a heading."""
    return wrapped(text, head, width())


# --- stderr: everything else ---


def info(string: str) -> None:
    """Prints a line unless `-q` is set. It is broken at spaces if the terminal would break it within a
    word."""
    line(streams.broken(string, room(sys.stderr)))


def line(string: str) -> None:
    """Prints a line unless `-q` is set, unbroken: a command to copy."""
    if not is_quiet():
        _write(sys.stderr, string)


def warn(string: str) -> None:
    line(_titled("warning:", "yellow", string))


def hint(string: str) -> None:
    line(_titled("hint:", "cyan", string))


def _titled(title: str, colour: str, string: str) -> str:
    """The text after a coloured title, broken as by `info`; a command to copy stays whole."""
    text = f"{title} {string}"
    if not string.startswith("gz "):
        text = streams.broken(text, room(sys.stderr))
    return style(title, colour) + text.removeprefix(title)


def on_terminal() -> bool:
    """Whether a user can see a question and answer it."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def confirmed(question: str) -> bool:
    """The answer to a yes-or-no question on the terminal; no answer means no."""
    sys.stderr.write(f"{streams.printable(question)} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


@contextmanager
def progress(title: str, unit: str = "bytes") -> Iterator[Callable[[int, int], None]]:
    """Yields report(done, total), which draws a bar on a terminal. Bytes are shown with their rate."""
    if is_quiet() or is_json() or not colourful(sys.stderr):
        yield lambda done, total: None
        return
    from rich import progress as bars
    from rich.console import Console

    measures: tuple[bars.ProgressColumn | str, ...] = (bars.MofNCompleteColumn(), unit)
    if unit == "bytes":
        measures = (bars.DownloadColumn(), bars.TransferSpeedColumn())
    described = bars.TextColumn("{task.description}", markup=False)
    columns = (described, bars.BarColumn(), *measures, bars.TimeRemainingColumn())
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(streams.printable(title), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def error(problem: GzError) -> None:
    """Prints `error: …` and `hint: …` on stderr, also with `-q`; in JSON mode `{"error": {…}}` on stdout,
    unless stdout itself fails."""
    if is_json() and not _mode["lost"]:
        shown = {"code": problem.code, "kind": problem.kind, "message": problem.message, "hint": problem.hint}
        data({"event": problem.event, "error": shown} if problem.event else {"error": shown})
        return
    title = "internal error:" if problem.kind == "bug" else "error:"
    _write(sys.stderr, _titled(title, "red", problem.message))
    if problem.hint:
        _write(sys.stderr, "\n" + _titled("hint:", "cyan", problem.hint))


# --- tables ---


def table_lines(
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    spare: Sequence[str] = (),
    wrap: Sequence[str] = (),
    narrow: int = MIN_COLUMN_WIDTH,
    room: int | None = None,
) -> tuple[list[str], list[str]]:
    """The lines of a table that fit `room` columns (None for any width), and the headings of the omitted
    columns.

    spare: as in `table`. Of columns with equal names, the last is dropped first. Columns without values are
      always dropped.
    wrap: headings of the columns whose texts may take several lines.
    narrow: minimum width of such a text as long as a spare column can be omitted instead.
    """
    cells = [["-" if cell is None or cell == "" else in_a_line(str(cell)) for cell in row] for row in rows]
    grid = list(zip(columns, *cells, strict=False))
    widths = [max(map(len, column)) for column in grid]
    # the longest word of each column that may be wrapped
    words = {i: max(map(len, " ".join(column).split())) for i, column in enumerate(grid) if column[0] in wrap}
    shown, hidden = list(range(len(grid))), []
    if room is not None:
        if _total(widths, shown) > room:
            empty = {i for i, column in enumerate(grid) if cells and set(column[1:]) == {"-"}}
            shown = [i for i in shown if i not in empty or columns[i] not in spare]
        while (narrowed := _narrowed(widths, words, shown, room, narrow)) is None:
            leaving = next((i for name in spare for i in shown[::-1] if columns[i] == name), None)
            if leaving is None:
                narrowed = _narrowed(widths, words, shown, room, 0) or words
                break
            shown.remove(leaving)
            hidden.append(columns[leaving])
        widths = [narrowed.get(i, width) for i, width in enumerate(widths)]
    right = {i for i in shown if cells and all(map(_is_number, grid[i][1:]))}
    lines = []
    for row in (columns, *cells):
        parts = {i: wrapped(row[i], "", widths[i]) if len(row[i]) > widths[i] else [row[i]] for i in shown}
        for n in range(max(map(len, parts.values()))):
            texts = {i: "".join(part[n : n + 1]) for i, part in parts.items()}
            fitted = (t.rjust(widths[i]) if i in right else t.ljust(widths[i]) for i, t in texts.items())
            lines.append(COLUMN_GAP.join(fitted).rstrip())
    return lines, hidden


def _narrowed(
    widths: Sequence[int], words: Mapping[int, int], shown: Sequence[int], room: int, least: int
) -> dict[int, int] | None:
    """The widths, at least `least`, to which the wrapped columns shrink so that the table fits; None if it
    cannot."""
    narrowed = {i: widths[i] for i in shown if i in words}
    floors = {i: max(words[i], min(width, least)) for i, width in narrowed.items()}
    for _ in range(_total(widths, shown) - room):  # the widest shrinks first
        able = [i for i in narrowed if narrowed[i] > floors[i]]
        if not able:
            return None
        narrowed[max(able, key=lambda i: narrowed[i])] -= 1
    return narrowed


def _is_number(cell: str) -> bool:
    """Whether a cell is a number or a placeholder for a missing number."""
    digits = cell.lstrip("-").replace(",", "").replace(".", "")
    return cell in ("-", "nan", "inf", "-inf") or digits.isdecimal()


def _total(widths: Sequence[int], shown: Sequence[int]) -> int:
    return sum(widths[i] for i in shown) + len(COLUMN_GAP) * (len(shown) - 1)


# --- colour, and what reaches a stream ---


def colourful(stream: TextIO) -> bool:
    """Whether to use colour: the stream is a terminal, and none of `NO_COLOR`, `CI` and `TERM=dumb` forbids
    it."""
    env = os.environ
    return stream.isatty() and not env.get("NO_COLOR") and not env.get("CI") and env.get("TERM") != "dumb"


def trace(problem: BaseException) -> None:
    import traceback

    _write(sys.stderr, "".join(traceback.format_exception(problem)))


def style(string: str, name: str, stream: TextIO | None = None) -> str:
    """The string in a colour or weight, if the stream (default: stderr) supports it."""
    return f"{_MARKS[name]}{string}{_END}" if colourful(stream or sys.stderr) else string


def _write(stream: TextIO, string: str, *, styled: bool = True) -> None:
    """Writes a line; a `styled` line may contain the escape codes of `style`."""
    if styled and colourful(stream):
        parts = re.split(f"([{''.join(_SEQUENCES)}])", string)
        string = "".join(_SEQUENCES.get(part) or streams.printable(part) for part in parts)
    else:
        string = streams.printable(string)
    _put(stream, string)


def _put(stream: TextIO, string: str) -> None:
    """Writes a line unchanged; any foreign text in it must already be printable."""
    try:
        stream.write(f"{string}\n")
        stream.flush()
    except OSError as e:  # the reader has closed the pipe (`head`), a closed terminal, a full disk
        streams.mute(stream)
        if stream is sys.stderr or _mode["lenient"]:
            return
        configure(lost=True)
        if isinstance(e, BrokenPipeError):
            raise SystemExit(BROKEN_PIPE_CODE) from None
        raise


def _plain(value: Any) -> Any:
    """The value in JSON's types: paths as strings, array scalars as numbers, NaN and infinity as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return _plain(value.item()) if hasattr(value, "item") else str(value)
