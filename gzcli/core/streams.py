"""Standard streams that may be closed, full or without a reader, and a spinner on stderr for waiting times
such as the import of torch."""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

# control characters except tab and newline; characters that change the direction of text or are invisible;
# surrogates
CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ufdd0-\ufdef\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
LONG_WAIT_SECONDS = 1.5  # seconds of one wait, after which a line is printed if there is no terminal
ERASE = "\r\033[K"  # clears the line of a spinner

_spinners: list[Any] = []  # what is currently shown: rich's status, or the timer of a line
_shows = False  # whether this process shows what it waits for


def printable(text: str) -> str:
    """The text with control characters escaped as in JSON, `\\u0007`: a file's name must not move a
    terminal's cursor, change its title, or look like another name."""
    return CONTROL.sub(lambda match: json.dumps(match[0])[1:-1], text)


def in_a_line(text: str) -> str:
    return printable(" ".join(text.split("\n")))


def room(stream: TextIO) -> int | None:
    """The columns of a terminal, or `COLUMNS`; None for any other stream, whose lines are not limited."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns):
        return int(columns)
    if not stream.isatty():
        return None
    try:
        return os.get_terminal_size(stream.fileno()).columns or None
    except OSError:
        return None


def wrapped(text: str, head: str = "", width: int = 80) -> list[str]:
    """The text in lines of `width` columns, broken at spaces and indented as `head` is wide."""
    indent = " " * len(head)
    wrapper = textwrap.TextWrapper(width, head, indent, break_on_hyphens=False, break_long_words=False)
    return wrapper.wrap(text) or [head.rstrip()]


def broken(text: str, columns: int | None) -> str:
    """The text with long lines broken at spaces, so that a terminal of this width does not break them within
    a word, or within a command between backticks. A line that is mostly a path stays whole."""
    if columns is None:
        return text
    lines = list[str]()
    for line in text.split("\n"):
        if len(line) <= columns or max(map(len, line.split())) > columns / 2:
            lines.append(line)
        else:
            glued = re.sub("`[^`]*`", lambda quoted: quoted[0].replace(" ", "\0"), line)
            lines += [part.replace("\0", " ") for part in wrapped(glued, width=columns)]
    return "\n".join(lines)


def hold_open() -> None:
    """Opens the null device for closed standard streams. Otherwise a file that is opened later gets the
    number of such a stream, and a library's output to stderr ends up in that file."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed when Python started
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def mute(stream: Any) -> None:
    """Discards the stream's buffer and everything written to it from now on."""
    try:
        number = stream.fileno()
    except (OSError, ValueError, AttributeError):  # closed, or no file behind it, as in a test
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)


class Tolerant:
    """A text stream that is muted if its reader (EPIPE), terminal (EIO) or disk (ENOSPC) fails."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            mute(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            mute(self._stream)


def tolerate() -> None:
    """Makes stdout and stderr of this process `Tolerant`."""
    hold_open()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, Tolerant):
            setattr(sys, name, Tolerant(stream))


def start_spinner(text: str, stream: TextIO | None = None) -> None:
    """Shows a task on a terminal until `stop_spinner`; elsewhere prints it as a line if it takes long."""
    global _shows
    stop_spinner()
    _shows, stream = True, stream or sys.stderr
    if stream.isatty() and "CI" not in os.environ and os.environ.get("TERM") != "dumb":
        from rich.console import Console
        from rich.status import Status
        from rich.text import Text

        status = Status(Text(printable(text)), console=Console(file=stream))
        status.start()
        _spinners.append(status)
        return
    timer = threading.Timer(
        LONG_WAIT_SECONDS, print, [f"{printable(text)} …"], {"file": stream, "flush": True}
    )
    timer.daemon = True
    timer.start()
    _spinners.append(timer)


def change_spinner(text: str) -> None:
    """Changes the text of the spinner, if one is shown."""
    if _shows:
        start_spinner(text)


def stop_spinner() -> None:
    while _spinners:
        spinner = _spinners.pop()
        spinner.cancel() if isinstance(spinner, threading.Timer) else spinner.stop()


@contextmanager
def spinner(text: str, *, shown: bool = True) -> Iterator[None]:
    """Shows a task on the spinner while the block runs."""
    global _shows
    if shown:
        start_spinner(text)
    try:
        yield
    finally:
        stop_spinner()
        _shows = False
