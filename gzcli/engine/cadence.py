"""The timing of a training: the steps that fit in `--minutes`, the steps between two pauses, and stopping.

Each validation, checkpoint and grid of samples is a pause. If the recipe does not set the interval of a kind,
the duration of the first pause determines it. The interval is written into the recipe, for a resume. It is
rounded to the coarse series 1, 2, 5, 10 …, because durations vary from run to run and the best checkpoint
depends on the interval.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from gzcli.core import ranks, signals
from gzcli.core.sections import TrainSection
from gzcli.models.base import Phase
from gzcli.store.run_folder import Run

FIRST_PAUSE_SECONDS = 60.0  # seconds until the first pause, which then comes at the next step of the series
MAX_PAUSE_GAP = 600.0  # seconds between two pauses, if their share of the time allows
PAUSE_SHARE = 0.05  # share of the time for pauses of one kind
QUICK_SECONDS = 10.0  # longest pause in seconds after which a signal is still answered in time
UNTIMED_STEPS = 2  # first steps, which are not timed because they compile and choose kernels
SERIES = (1, 2, 5)  # times powers of ten
FIRST_CLOCK_STEP = 10  # step before which the clock is not read
# kind → key of `train`
PAUSE_KEYS = {"eval": "eval_every", "checkpoint": "checkpoint_every", "sample": "sample_every"}
PAUSE_KINDS = frozenset(PAUSE_KEYS)
WARM_UP, TIMED_STEPS = 5, 50  # steps; the first ones choose kernels and compile
RESERVE_SHARE = 0.02  # share of the time for checkpoints, logs and errors of the plan
MIN_TRAINING_SHARE = 0.5  # least share of the time for training, however long the preparation took
AGREE_EVERY = 10  # steps between two agreements of the ranks, which cost a collective; 1 where steps are slow
SLOW_SECONDS = 0.1  # seconds
CLOCK_SECONDS = 1.0  # seconds between looks at the parent
_heard: list[int] = []  # signals that this process has received


class Cadence:
    """The number of steps between two pauses of each kind; 0 means never."""

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
        # None: not known yet
        self.every: dict[str, int | None] = {kind: getattr(train, key) for kind, key in PAUSE_KEYS.items()}
        self.agree, self.clock, self.began = agree, clock, clock()
        self.took: dict[str, float] = {}  # seconds of the last pause of each kind
        self.steps, self.paused = 0, 0.0  # steps of this process; seconds of all its pauses
        self.mark = (0, self.began, 0.0)  # steps, clock and pauses when the timing of steps began

    def due(self, step: int) -> set[str]:
        """The kinds that are due after `step` steps. Every rank must call it after every step."""
        self.steps += 1
        kinds = {kind for kind, every in self.every.items() if every and step % every == 0}
        if unknown := [kind for kind, every in self.every.items() if every is None]:
            # only at steps of the series, since it costs a collective too
            late = in_series(step) and self.agree([self.clock() - self.began])[0] >= FIRST_PAUSE_SECONDS
            kinds |= {kind for kind in unknown if late or step >= self.usual[kind]}
        if (
            self.steps <= UNTIMED_STEPS and not kinds
        ):  # a pause after them needs the time of one step at least
            self.mark = (self.steps, self.clock(), self.paused)
        return kinds

    @contextlib.contextmanager
    def timed(self, kind: str | None = None) -> Iterator[None]:
        """Times a pause. The first pause of a kind determines the kind's interval. One-time work has no kind;
        its time also does not count as time of steps."""
        since, (step, start, paused) = self.clock(), self.mark
        step_seconds = (since - start - (self.paused - paused)) / max(self.steps - step, 1)
        yield
        took = self.clock() - since
        self.paused += took
        if kind is None:
            return
        step_seconds, self.took[kind] = self.agree([max(step_seconds, 1e-4), took])
        if self.every[kind] is None:
            least = self.took[kind] / (PAUSE_SHARE * step_seconds)
            interval = max(min(self.usual[kind], MAX_PAUSE_GAP / step_seconds), least)
            self.every[kind] = in_proportion(self.usual[kind], interval)

    def slow(self, kinds: Set[str]) -> bool:
        """Whether pauses of these kinds may take longer than schedulers wait between SIGTERM and SIGKILL."""
        return any(self.took.get(kind, math.inf) > QUICK_SECONDS for kind in kinds)

    def intervals(self) -> dict[str, int]:
        """The intervals in steps measured so far, as keys of a recipe's `train` section."""
        return {PAUSE_KEYS[kind]: every for kind, every in self.every.items() if every is not None}


def in_series(step: int) -> bool:
    """Whether a step is in the series 10, 20, 50, 100 …."""
    return step >= FIRST_CLOCK_STEP and int(str(step).rstrip("0")) in SERIES


def in_proportion(usual: int, interval: float) -> int:
    """`usual`, multiplied or divided by the number of the series 1, 2, 5, 10 … that brings it closest to
    `interval`."""
    ratio = max(interval, 1) / usual
    large = max(ratio, 1 / ratio)
    power = 10 ** int(math.log10(large))
    by = min((number * power for number in (*SERIES, 10)), key=lambda n: abs(math.log(large / n)))
    return usual * by if ratio > 1 else max(usual // by, 1)


# ---------------------------------------------------------------------------- how many steps


@dataclass(frozen=True)
class Pauses:
    """The pauses of a run of `length` seconds.

    took: seconds of a pause of each kind.
    end: seconds of further work at the end of a run of so many steps.
    """

    train: TrainSection
    length: float
    took: Mapping[str, float]
    end: Callable[[int], float] = lambda steps: 0.0

    @property
    def last_only(self) -> list[str]:
        """The kinds whose share of the time allows fewer than two pauses. They pause only at the end."""
        return [
            kind
            for kind, took in self.took.items()
            if getattr(self.train, PAUSE_KEYS[kind]) is None
            and not self.train.patience
            and 2 * took > PAUSE_SHARE * self.length
        ]

    def seconds(self, steps: int) -> float:
        """The time that a run of so many steps spends outside of them."""
        total = self.end(steps)
        for kind, took in self.took.items():
            every = getattr(self.train, PAUSE_KEYS[kind])
            if every:
                total += took * (steps // every)
            elif every is None and kind not in self.last_only:
                total += min(9 * took, max(took, PAUSE_SHARE * self.length))
            total += took
        return total


def count_steps(
    step: Callable[[int], object],
    phases: Sequence[Phase],
    pauses: Pauses,
    began: float,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """The largest number of steps that fit in the time together with the pauses. Steps get at least half of
    the time, even if less remains. 50 steps are timed at the start, and 50 at the start of late phases, for
    at most a tenth of the time in total. Every rank must call it."""
    late = max(phase.start for phase in phases)
    cycle = math.lcm(*(phase.every for phase in phases))
    limit = pauses.length / 10 / (1 + bool(late))
    each = [_seconds(step, first, limit, cycle, clock) for first in sorted({0, late})]
    available = (1 - RESERVE_SHARE) * pauses.length - (clock() - began)
    counts = range(1, int(pauses.length / min(each)) + 2)

    def late_by(steps: int) -> bool:
        seconds = min(steps, late) * each[0] + max(0, steps - late) * each[-1]
        return seconds > MIN_TRAINING_SHARE * pauses.length and seconds + pauses.seconds(steps) > available

    return max(1, bisect_left(counts, True, key=late_by))


def _seconds(
    step: Callable[[int], object], first: int, limit: float, cycle: int, clock: Callable[[], float]
) -> float:
    """The mean seconds of a step."""
    began, until = clock(), time.monotonic() + limit
    for i in range(WARM_UP):
        step(first + i)
    since, count = clock(), 0
    # the ranks agree: one that took fewer steps would leave the others waiting
    while count < TIMED_STEPS and (count == 0 or ranks.agree(time.monotonic() < until)):
        step(first + WARM_UP + count)
        count += 1
    if count < cycle:  # with the first steps, otherwise a phase might be missing
        since, count = began, count + WARM_UP
    return (clock() - since) / count


# ---------------------------------------------------------------------------- when it is stopped


@contextlib.contextmanager
def listening(run: Run) -> Iterator[None]:
    """Within the block, a signal does not end the process but is noted for the next step. The run's status
    records it too, so that `gz` waits for a checkpoint instead of ending the process at once."""
    owner, main = run.owner, ranks.rank() == 0
    if main:
        owner.update(stepping=True)
    heard = signals.hear(lambda number, frame: _heard.append(number))
    try:
        yield
    finally:
        signals.restore(heard)
        if main:
            owner.update(stepping=False)


class Stop:
    """Decides after each step whether to stop. Every rank gets the same answer at the same step."""

    def __init__(self, folder: Path, *, world: int, device: torch.device):
        self.file, self.world, self.device = Run(folder).stop_file, world, device
        # the step of the ranks' next agreement; step and time of the last one
        self.next, self.last = 0, (0, time.monotonic())
        self.looked = 0.0  # time of the last look at the parent
        self.parent: psutil.Process | None = None
        if pid := int(os.environ.get("GZ_PARENT", "0")):
            with contextlib.suppress(psutil.NoSuchProcess):  # it is dead already
                self.parent = psutil.Process(pid)

    def signal(self, step: int) -> int:
        """The number of the signal to stop for, or 0."""
        if self.world == 1:
            return self._local_signal()
        if step < self.next:
            return 0
        since, now = self.last, time.monotonic()
        slow = now - since[1] > SLOW_SECONDS * (step - since[0])
        flags = torch.tensor([self._local_signal(), int(slow)], device=self.device)
        signum, slow = ranks.maximum(flags).tolist()
        self.next, self.last = step + (1 if slow else AGREE_EVERY), (step, now)
        return signum

    def _local_signal(self) -> int:
        if _heard:
            return _heard[0]
        if self.file.exists():
            return int(self.file.read_text() or signal.SIGTERM)
        return int(signal.SIGTERM) if self._orphaned() else 0

    def _orphaned(self) -> bool:
        """Whether the `gz` that started this process has ended, even if it is still a zombie."""
        if "GZ_PARENT" not in os.environ or time.monotonic() - self.looked < CLOCK_SECONDS:
            return False
        self.looked = time.monotonic()
        with contextlib.suppress(psutil.NoSuchProcess):
            if self.parent and self.parent.is_running():
                return self.parent.status() == psutil.STATUS_ZOMBIE
        return True
