"""A spinner on a terminal while something loads, as torch does for seconds; elsewhere nothing is shown."""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
DELAY, EVERY = 0.3, 0.1  # seconds before it is shown, and between two frames
ERASE = "\r\033[K"

_running: list[tuple[threading.Thread, threading.Event]] = []


def begin(text: str, stream: TextIO | None = None) -> None:
    """Shows the spinner, in a thread of its own, until `end`.

    text: what is waited for.
    stream: where; stderr unless given.
    """
    stream = stream or sys.stderr
    if not stream.isatty() or "CI" in os.environ or os.environ.get("TERM") == "dumb":
        return
    stop = threading.Event()
    thread = threading.Thread(target=_spin, args=(text, stream, stop), daemon=True)
    _running.append((thread, stop))
    thread.start()


def end() -> None:
    """Removes the spinner; whatever is printed next stands in its place."""
    while _running:
        thread, stop = _running.pop()
        stop.set()
        thread.join()


@contextmanager
def spinner(text: str, *, shown: bool = True) -> Iterator[None]:
    """Shows the spinner while the block runs.

    shown: whether it is shown at all.
    """
    if shown:
        begin(text)
    try:
        yield
    finally:
        end()


def _spin(text: str, stream: TextIO, stop: threading.Event) -> None:
    if stop.wait(DELAY):
        return
    for frame in itertools.cycle(FRAMES):
        stream.write(f"{ERASE}{frame} {text}")
        stream.flush()
        if stop.wait(EVERY):
            break
    stream.write(ERASE)
    stream.flush()
