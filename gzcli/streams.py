"""Standard streams that may be closed, full or without a reader: the process that writes to them goes on."""

from __future__ import annotations

import os
import re
import sys
from typing import Any

# control characters but tab, newline and the sequences that colour a text
CONTROL = re.compile(r"\x1b(?!\[[0-9;]*m)|[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """The text with control characters in JSON's form, `\\u0007`: a file's name must not move the cursor of a
    terminal, or change its title."""
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def hold_open() -> None:
    """Opens the null device for those of the descriptors 0, 1 and 2 that are closed.

    Otherwise a file that is opened later would get such a number, and with it what a library writes to
    stderr.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed when Python started
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def mute(stream: Any) -> None:
    """Discards what is written to the stream from now on, and what is left in its buffer."""
    try:
        number = stream.fileno()
    except (OSError, ValueError, AttributeError):  # closed, or no file behind it, as in a test
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)


class Tolerant:
    """A text stream that is muted where its reader (EPIPE), terminal (EIO) or disk (ENOSPC) fails."""

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
    """Makes stdout and stderr of this process tolerate lost readers, closed terminals and full disks."""
    hold_open()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, Tolerant):
            setattr(sys, name, Tolerant(stream))
