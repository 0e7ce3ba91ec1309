"""`--minutes`: how many steps of a training fit in some minutes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from gzcli.models.base import Phase


def count_steps(step: Callable[[int], object], phases: Sequence[Phase], minutes: float, began: float) -> int:
    """How many steps fit in `minutes` from `began`, of which a tenth is kept for pictures and validation.

    50 steps are timed after 5, for a tenth of the time at most. Where phases start later, as many are timed
    from there on too.

    step: does one; what it trains is lost.
    phases: of the model.
    began: seconds, as of `time.time`.
    """
    late = max(phase.start for phase in phases)
    cycle = math.lcm(*(phase.every for phase in phases))
    limit = 6 * minutes / (1 + bool(late))
    each = [_seconds(step, first, limit, cycle) for first in sorted({0, late})]
    left = 60 * minutes - (time.time() - began) - 0.1 * 60 * minutes
    early = min(late, int(left / each[0]))
    return max(1, early + int((left - early * each[0]) / each[-1]))


def _seconds(step: Callable[[int], object], first: int, limit: float, cycle: int) -> float:
    """Of a step from step `first` on, timed for `limit` seconds at most.

    cycle: steps after which every phase has run.
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
