"""What a process waits for, as torch loads for seconds: a spinner on a terminal; elsewhere a plain line,
where that takes long.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from gzcli.core.streams import printable

FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
DELAY, EVERY = 0.3, 0.1  # seconds before it is shown, and between two frames
PLAIN = 1.5  # seconds of one thing, after which a line is printed where there is no terminal
ERASE = "\r\033[K"

_running: list[tuple[threading.Thread, threading.Event]] = []
_text: list[str] = []  # what is waited for; empty before the first `begin` of this process


def begin(text: str, stream: TextIO | None = None) -> None:
    """Tells what is waited for, in a thread of its own, until `end`.

    text: what is waited for.
    stream: where; stderr unless given.
    """
    _text[:] = [text]
    if _running:
        return
    stream = stream or sys.stderr
    fancy = stream.isatty() and "CI" not in os.environ and os.environ.get("TERM") != "dumb"
    stop = threading.Event()
    thread = threading.Thread(target=_spin if fancy else _print, args=(stream, stop), daemon=True)
    _running.append((thread, stop))
    thread.start()


def now(text: str) -> None:
    """Tells that something else is waited for, in a process that tells it at all."""
    if _text:
        begin(text)


def end() -> None:
    """Removes the spinner; whatever is printed next stands in its place."""
    while _running:
        thread, stop = _running.pop()
        stop.set()
        thread.join()


@contextmanager
def spinner(text: str, *, shown: bool = True) -> Iterator[None]:
    """Tells what is waited for while the block runs.

    shown: whether it is told at all.
    """
    if shown:
        begin(text)
    try:
        yield
    finally:
        end()
        _text.clear()


def _spin(stream: TextIO, stop: threading.Event) -> None:
    if stop.wait(DELAY):
        return
    for frame in itertools.cycle(FRAMES):
        stream.write(f"{ERASE}{frame} {printable(_text[0])}")
        stream.flush()
        if stop.wait(EVERY):
            break
    stream.write(ERASE)
    stream.flush()


def _print(stream: TextIO, stop: threading.Event) -> None:
    """A line for each thing that takes longer than PLAIN."""
    told, before, waited = "", "", 0.0
    while not stop.wait(EVERY):
        waited = waited + EVERY if _text[0] == before else 0.0
        before = _text[0]
        if waited > PLAIN and before != told:
            told = before
            stream.write(f"{told} …\n")
            stream.flush()
