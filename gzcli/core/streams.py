"""Standard streams that may be closed, full or without a reader: the process that writes to them goes on."""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any

# control characters but tab and newline; what turns the order of letters or is not seen; half characters
CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ufdd0-\ufdef\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    """The text with control characters in JSON's form, `\\u0007`: a file's name must not move the cursor of a
    terminal, change its title, or look like another."""
    return CONTROL.sub(lambda found: json.dumps(found[0])[1:-1], text)


def in_a_line(text: str) -> str:
    """A name or a title as it stands in a picture: printable, in one line."""
    return printable(" ".join(text.split("\n")))


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
