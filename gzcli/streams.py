"""Standard streams that may be closed, full or without a reader: whoever writes to them goes on."""

from __future__ import annotations

import os
import sys
from typing import Any


def hold_open() -> None:
    """Opens what of descriptors 0, 1 and 2 is closed on nothing: a file opened later would get its number,
    and with it whatever a library writes to "stderr".
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # Python found it closed
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def mute(stream: Any) -> None:
    """What goes to the stream from now on, what it still holds included, goes nowhere."""
    try:
        number = stream.fileno()
    except (OSError, ValueError, AttributeError):  # a stream of a test, or closed
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)


class Tolerant:
    """A text stream whose reader may go away (EPIPE), whose terminal may close (EIO) and whose disk may be
    full (ENOSPC).
    """

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
    """Makes stdout and stderr of this process tolerant."""
    hold_open()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, Tolerant):
            setattr(sys, name, Tolerant(stream))
