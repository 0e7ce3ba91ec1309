"""The only writer: data on stdout, everything else on stderr; it holds the `--json` and `-q` switches."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from gzcli.cli.tables import NARROW, Table, wrapped
from gzcli.core import streams
from gzcli.core.errors import GzError

_mode = {"json": False, "quiet": False, "lenient": False, "lost": False}
ELSEWHERE = "`--wide` prints them, `--json` too"  # the columns that did not fit
UNREAD = 128 + 13  # the exit code where nobody reads stdout any longer, as after `| head`
_STYLES = {"red": "31", "yellow": "33", "cyan": "36", "bold": "1", "dim": "2"}
# Marks of the beginning of each style and of the end of any in a text before it is written. They are no
# characters, so that only gz itself can colour a text, and no sequence in a name reaches a terminal.
_MARKS = {name: chr(0xFDD0 + i) for i, name in enumerate(_STYLES)}
_END = "\ufdef"
_SEQUENCES = {_MARKS[name]: f"\033[{code}m" for name, code in _STYLES.items()} | {_END: "\033[0m"}


def configure(**switches: bool | None) -> None:
    """Sets `json`, `quiet`, `lenient` (a closed or full stdout does not end the verb) or `lost` (that has
    happened, so that an error goes to stderr); None leaves a switch as it is."""
    _mode.update({key: value for key, value in switches.items() if value is not None})


def is_json() -> bool:
    return _mode["json"]


def is_quiet() -> bool:
    return _mode["quiet"]


# --- stdout: data ---


def data(obj: Mapping[str, Any]) -> None:
    """JSON mode: prints one line, `"schema": 1` first, NaN and infinity as null. Human mode: nothing."""
    if is_json():
        import json

        _write(sys.stdout, json.dumps({"schema": 1, **_plain(obj)}, ensure_ascii=False), styled=False)


def text(string: str) -> None:
    """Human mode: prints a line or a document. JSON mode: nothing."""
    if not is_json():
        _write(sys.stdout, string)


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    spare: Sequence[str] = (),
    wrap: Sequence[str] = (),
    narrow: int = NARROW,
    wide: bool = False,
    to_stderr: bool = False,
    elsewhere: str = ELSEWHERE,
) -> None:
    """Human mode: prints the columns of a `Table` with a bold head, as far as they fit the terminal. JSON
    mode: nothing. With `to_stderr` it is what `info` would print; `elsewhere` says where to see the columns
    that did not fit."""
    if is_quiet() if to_stderr else is_json():
        return
    stream = sys.stderr if to_stderr else sys.stdout
    lines, hidden = Table(columns, rows, spare, wrap, narrow).lines(None if wide else room(stream))
    head, *rest = lines
    _write(stream, "\n".join([style(head, "bold", stream), *rest]))
    left_out(hidden, elsewhere)


def left_out(names: Sequence[str], elsewhere: str = ELSEWHERE) -> None:
    """Names on stderr the columns that did not fit."""
    if names:
        info(f"left out for want of room: {' '.join(names)} ({elsewhere})")


def aligned(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table as text, its head first."""
    return "\n".join(Table(columns, rows).lines()[0])


def room(stream: TextIO) -> int | None:
    """The columns of a stream: `COLUMNS` if it is set, else those of its terminal; None for any other stream,
    which holds lines of any length."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns):
        return int(columns)
    if not stream.isatty():
        return None
    try:
        return os.get_terminal_size(stream.fileno()).columns or None
    except OSError:
        return None


def width(most: int = 80) -> int:
    """The columns that texts on stderr may take."""
    return min(most, room(sys.stderr) or most)


# --- stderr: everything else ---


def info(string: str) -> None:
    """Prints a line unless `-q` is set. A long line is broken at spaces where the terminal would break it
    within a word; a line that is mostly a path stays whole."""
    columns = room(sys.stderr) or math.inf
    for text in string.split("\n"):
        whole = len(text) <= columns or max(map(len, text.split())) > columns / 2
        line(text if whole else "\n".join(wrapped(text, width=int(columns))))


def line(string: str) -> None:
    """Prints a line unless `-q` is set, unbroken: a command to copy."""
    if not is_quiet():
        _write(sys.stderr, string)


def warn(string: str) -> None:
    if not is_quiet():
        _write(sys.stderr, f"{style('warning:', 'yellow')} {string}")


def hint(string: str) -> None:
    if not is_quiet():
        _write(sys.stderr, f"{style('hint:', 'cyan')} {string}")


def on_terminal() -> bool:
    """Whether somebody reads a question and can answer it."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def confirmed(question: str) -> bool:
    """The answer to a question on the terminal; none means no."""
    sys.stderr.write(f"{streams.printable(question)} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


@contextmanager
def progress(title: str, unit: str = "bytes") -> Iterator[Callable[[int, int], None]]:
    """Yields report(done, total), which draws a progress bar on a terminal; bytes are shown with their
    rate."""
    if is_quiet() or is_json() or not colourful(sys.stderr):
        yield lambda done, total: None
        return
    from rich import progress as rich_progress
    from rich.console import Console

    counted: tuple[rich_progress.ProgressColumn | str, ...] = (rich_progress.MofNCompleteColumn(), unit)
    if unit == "bytes":
        counted = (rich_progress.DownloadColumn(), rich_progress.TransferSpeedColumn())
    described = rich_progress.TextColumn("{task.description}", markup=False)
    columns = (described, rich_progress.BarColumn(), *counted, rich_progress.TimeRemainingColumn())
    with rich_progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(streams.printable(title), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def error(problem: GzError) -> None:
    """Prints `error: …` and `hint: …` on stderr, also with `-q`; in JSON mode `{"error": {…}}` on stdout,
    unless stdout is what fails."""
    if is_json() and not _mode["lost"]:
        shown = {"code": problem.code, "kind": problem.kind, "message": problem.message, "hint": problem.hint}
        data({"event": problem.event, "error": shown} if problem.event else {"error": shown})
        return
    title = "internal error:" if problem.kind == "bug" else "error:"
    _write(sys.stderr, f"{style(title, 'red')} {problem.message}")
    if problem.hint:
        _write(sys.stderr, f"\n{style('hint:', 'cyan')} {problem.hint}")


# --- how it looks ---


def colourful(stream: TextIO) -> bool:
    """Whether the stream is a terminal that shows colour; `NO_COLOR`, `CI` and `TERM=dumb` forbid it."""
    env = os.environ
    return stream.isatty() and not env.get("NO_COLOR") and not env.get("CI") and env.get("TERM") != "dumb"


def trace(problem: BaseException) -> None:
    import traceback

    _write(sys.stderr, "".join(traceback.format_exception(problem)))


def style(string: str, name: str, stream: TextIO | None = None) -> str:
    """The string in a colour or weight, where the stream (stderr by default) shows it."""
    return f"{_MARKS[name]}{string}{_END}" if colourful(stream or sys.stderr) else string


def _write(stream: TextIO, string: str, *, styled: bool = True) -> None:
    """Writes a line, which may hold what `style` made if it is `styled`."""
    if styled and colourful(stream):
        parts = re.split(f"([{''.join(_SEQUENCES)}])", string)
        string = "".join(_SEQUENCES.get(part) or streams.printable(part) for part in parts)
    else:
        string = streams.printable(string)
    try:
        stream.write(f"{string}\n")
        stream.flush()
    except OSError as e:  # the reader has closed the pipe (`head`), a closed terminal, a full disk
        streams.mute(stream)
        if stream is sys.stderr or _mode["lenient"]:
            return
        configure(lost=True)
        if isinstance(e, BrokenPipeError):
            raise SystemExit(UNREAD) from None
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
