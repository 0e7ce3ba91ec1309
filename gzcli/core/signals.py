"""Handlers for the signals that ask a process to end; Windows has fewer of them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

ENDING_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
)
_noting: list[list[int]] = []  # the signals that each running block of `noted` got


def hear(handler: Callable[[int, Any], Any]) -> dict[int, Any]:
    """Installs handler(number, frame) for each signal of ENDING_SIGNALS, and returns the previous handlers
    for `restore`. A signal that is ignored, as under `nohup` or a shell's `&`, stays ignored."""
    heard = {signum: signal.getsignal(signum) for signum in ENDING_SIGNALS}
    heard = {signum: before for signum, before in heard.items() if before is not signal.SIG_IGN}
    for signum in heard:
        signal.signal(signum, handler)
    return heard


def restore(heard: dict[int, Any]) -> None:
    for signum, before in heard.items():
        signal.signal(signum, before)


@contextmanager
def noted() -> Iterator[list[int]]:
    """Collects the signals of ENDING_SIGNALS that arrive during the block. They do not end the block, which
    checks them between its parts. If it waits for an engine, the engine is ended, and `launch.run` notes the
    signal."""
    got: list[int] = []
    _noting.append(got)
    heard = hear(lambda signum, frame: note(signum))
    try:
        yield got
    finally:
        restore(heard)
        _noting.pop()


def heard() -> int | None:
    """The first signal that the innermost running block of `noted` got; None if there is none."""
    return next(iter(_noting[-1]), None) if _noting else None


def note(signum: int) -> None:
    """Notes a signal for the blocks that run in `noted`."""
    for got in _noting:
        got.append(signum)


def signal_name(signum: int) -> str:
    """`SIGKILL` for 9; `signal 70` if the system has no name for it."""
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"
