"""Handlers for the signals that ask a process to end; Windows has fewer of them."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))


def hear(handler: Callable[[int, Any], Any]) -> dict[int, Any]:
    """Installs handler(number, frame) for each signal of ENDING; returns the previous ones, for `restore`.

    A signal that is ignored stays ignored, as `nohup` and a shell's `&` want it.
    """
    heard = {signum: signal.getsignal(signum) for signum in ENDING}
    heard = {signum: before for signum, before in heard.items() if before is not signal.SIG_IGN}
    for signum in heard:
        signal.signal(signum, handler)
    return heard


def restore(heard: dict[int, Any]) -> None:
    """Installs the handlers that `hear` returned."""
    for signum, before in heard.items():
        signal.signal(signum, before)


def name_of(signum: int) -> str:
    """`SIGKILL` for 9; `signal 70` where the system has no name for it."""
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"
