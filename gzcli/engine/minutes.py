"""`--minutes`: how many training steps fit in a given time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from gzcli.models.base import Phase


def count_steps(step: Callable[[int], object], phases: Sequence[Phase], minutes: float, began: float) -> int:
    """How many steps fit in the time, of which a tenth is kept for pictures and validation.

    5 steps warm up, then 50 are timed, for a tenth of the time at most. Where a phase starts at a later step,
    as many are timed from there on too.

    step: does the step of a number; what it trains is lost.
    phases: the phases of the model.
    minutes: the time in minutes.
    began: when the time began, in seconds as of `time.time`.
    """
    late = max(phase.start for phase in phases)
    cycle = math.lcm(*(phase.every for phase in phases))
    limit = 6 * minutes / (1 + bool(late))
    each = [_seconds(step, first, limit, cycle) for first in sorted({0, late})]
    left = 60 * minutes - (time.time() - began) - 0.1 * 60 * minutes
    early = min(late, int(left / each[0]))
    return max(1, early + int((left - early * each[0]) / each[-1]))


def _seconds(step: Callable[[int], object], first: int, limit: float, cycle: int) -> float:
    """The seconds of one step, as an average.

    first: number of the first step.
    limit: seconds after which no step is timed any more.
    cycle: number of steps after which every phase has run.
    """
    until, times = time.monotonic() + limit, []
    for i in range(first, first + 55):
        since = time.monotonic()
        step(i)
        times.append(time.monotonic() - since)
        if time.monotonic() > until and len(times) > 5:
            break
    timed = times[5:] if len(times) > 5 + cycle else times
    return sum(timed) / len(timed)
