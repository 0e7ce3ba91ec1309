"""How many steps lie between two validations, two checkpoints and two grids of samples.

Each of these is a pause of the training. Where the recipe leaves the number open, it follows from how long
the first pause of the kind takes; then it is written into the recipe, so that a resume keeps to it.

Times differ from machine to machine, and from run to run on one. The steps of validations must not, as the
best checkpoint is one of them: what follows from a time is rounded to a coarse series, 1, 2, 5, 10, 20, 50 …
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager

from gzcli.core.sections import TrainSection

FIRST = 60.0  # seconds until the first pause, which then comes at the next step of the series
LONGEST = 600.0  # seconds from one pause to the next, as far as its share of the time allows
SHARE = 0.05  # share of the time for pauses of one kind
QUICK = 10.0  # seconds that a pause may take before a signal to end is heard
UNTIMED = 2  # first steps that are not timed: they compile and choose kernels
SERIES = (1, 2, 5)  # times powers of ten
EARLIEST = 10  # step before which no clock is read

# kind → key of `train`
KEYS = {"eval": "eval_every", "checkpoint": "checkpoint_every", "sample": "sample_every"}
KINDS = frozenset(KEYS)


class Cadence:
    """The steps between two pauses of each kind, 0 for never.

    train: section of the recipe; a None in it is chosen here.
    steps: number of steps of the whole run.
    agree: returns rank 0's numbers on every rank.
    clock: returns seconds, after the device has finished its queued work.
    """

    def __init__(
        self,
        train: TrainSection,
        steps: int,
        *,
        agree: Callable[[list[float]], list[float]],
        clock: Callable[[], float] = time.monotonic,
    ):
        tenth = max(steps // 10, 1)
        self.usual = {"eval": tenth, "checkpoint": min(tenth, 5000), "sample": 2 * tenth}
        self.every: dict[str, int | None] = {  # None: not known yet
            "eval": train.eval_every,
            "checkpoint": train.checkpoint_every,
            "sample": train.sample_every,
        }
        self.agree, self.clock = agree, clock
        self.began = clock()
        self.took: dict[str, float] = {}  # seconds of the last pause of each kind
        self.steps, self.paused = 0, 0.0  # steps of this process; seconds of all its pauses
        self.mark = (0, self.began, 0.0)  # steps, clock and pauses when the timing of steps began

    def due(self, step: int) -> set[str]:
        """The kinds that are due after `step` steps; asked by every rank after every step."""
        self.steps += 1
        if self.steps <= UNTIMED:
            self.mark = (self.steps, self.clock(), self.paused)
        kinds = {kind for kind, every in self.every.items() if every and step % every == 0}
        unknown = [kind for kind, every in self.every.items() if every is None]
        if not unknown:
            return kinds
        # only at steps of the series, since it costs a collective too
        late = in_series(step) and self.agree([self.clock() - self.began])[0] >= FIRST
        return kinds | {kind for kind in unknown if late or step >= self.usual[kind]}

    @contextmanager
    def timed(self, kind: str | None = None) -> Iterator[None]:
        """Times the pause inside; the first one of a kind decides how often that kind comes.

        kind: kind of the pause; None for work done once, whose time counts neither for a kind nor for steps.
        """
        since, (step, start, paused) = self.clock(), self.mark
        each = (since - start - (self.paused - paused)) / max(self.steps - step, 1)  # seconds a step
        yield
        took = self.clock() - since
        self.paused += took
        if kind is None:
            return
        each, self.took[kind] = self.agree([max(each, 1e-4), took])
        if self.every[kind] is None:
            wanted = max(min(self.usual[kind], LONGEST / each), self.took[kind] / (SHARE * each))
            self.every[kind] = in_proportion(self.usual[kind], wanted)

    def slow(self, kinds: Set[str]) -> bool:
        """Whether pauses of these kinds may take longer than schedulers wait between SIGTERM and SIGKILL."""
        return any(self.took.get(kind, math.inf) > QUICK for kind in kinds)

    def found(self) -> dict[str, int]:
        """The numbers of steps known so far, as keys of a recipe's `train` section."""
        return {KEYS[kind]: every for kind, every in self.every.items() if every is not None}


def in_series(step: int) -> bool:
    """Whether a step is 10, 20, 50, 100 and so on."""
    return step >= EARLIEST and int(str(step).rstrip("0")) in SERIES


def in_proportion(usual: int, wanted: float) -> int:
    """`usual`, multiplied or divided by the number of the series that brings it nearest to `wanted`."""
    ratio = max(wanted, 1) / usual
    large = max(ratio, 1 / ratio)
    power = 10 ** int(math.log10(large))
    by = min((number * power for number in (*SERIES, 10)), key=lambda n: abs(math.log(large / n)))
    return usual * by if ratio > 1 else max(usual // by, 1)
