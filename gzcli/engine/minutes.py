"""`--minutes`: how many training steps fit in a given time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from gzcli.core import ranks
from gzcli.models.base import Phase

WARM_UP, TIMED = 5, 50  # steps; the first ones choose kernels and compile
KEPT = 0.1  # share of the time for pictures and validation
LEAST = 0.5  # share that is trained in, however long it took to get ready: a model of a step draws nothing


def count_steps(
    step: Callable[[int], object],
    phases: Sequence[Phase],
    minutes: float,
    began: float,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """How many steps fit in the time, of which a tenth is kept for pictures and validation; in half of it
    where less is left.

    5 steps warm up, then 50 are timed, for a tenth of the time at most. Where a phase starts at a later step,
    as many are timed from there on too.

    A call of every rank.

    step: does the step of a number; what it trains is lost.
    phases: the phases of the model.
    minutes: the time in minutes.
    began: when the time began, in seconds of the clock.
    clock: seconds of time or of work, read after the device has finished its queued work.
    """
    late = max(phase.start for phase in phases)
    cycle = math.lcm(*(phase.every for phase in phases))
    limit = 6 * minutes / (1 + bool(late))
    each = [_seconds(step, first, limit, cycle, clock) for first in sorted({0, late})]
    left = max(LEAST * 60 * minutes, (1 - KEPT) * 60 * minutes - (clock() - began))
    early = min(late, int(left / each[0]))
    return max(1, early + int((left - early * each[0]) / each[-1]))


def _seconds(
    step: Callable[[int], object], first: int, limit: float, cycle: int, clock: Callable[[], float]
) -> float:
    """The seconds of one step, as an average.

    The host waits for the device before and after the timed steps, not between them: in a run it does not.

    first: number of the first step.
    limit: seconds after which no step is timed any more.
    cycle: number of steps after which every phase has run.
    """
    began, until = clock(), time.monotonic() + limit
    for i in range(WARM_UP):
        step(first + i)
    since, done = clock(), 0
    # of one mind: a rank that did a step less than another would leave it waiting
    while done < TIMED and (done == 0 or ranks.agree(time.monotonic() < until)):
        step(first + WARM_UP + done)
        done += 1
    if done < cycle:  # with the first steps, or a phase might be left out
        since, done = began, done + WARM_UP
    return (clock() - since) / done
