"""How many steps lie between two validations, two checkpoints and two grids of samples.

Each of these is a pause of the training. Where the recipe leaves the number open, it follows from how long
the first pause of the kind takes; then it is written into the recipe, so that a resume keeps to it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager

from gzcli.recipe.parts import TrainSection

FIRST = 60.0  # seconds until the first pause at the latest
LONGEST = 600.0  # seconds from one pause to the next, as far as its share of the time allows
SHARE = 0.05  # of the time, for pauses of one kind
QUICK = 10.0  # seconds of a pause that a signal to end waits for
UNTIMED = 2  # the first steps compile, and choose kernels
AGREE_EVERY = 10  # steps between readings of rank 0's clock, which cost a collective

# kind → key of `train`
KEYS = {"eval": "eval_every", "checkpoint": "checkpoint_every", "sample": "sample_every"}
KINDS = frozenset(KEYS)


class Cadence:
    """The steps between two pauses of each kind, 0 for never.

    train: what the recipe says; None: to be found.
    steps: of the whole run.
    agree: gives rank 0's numbers to every rank.
    clock: seconds, after the device has done what it was asked for.
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
        late = step % AGREE_EVERY == 0 and self.agree([self.clock() - self.began])[0] >= FIRST
        return kinds | {kind for kind in unknown if late or step >= self.usual[kind]}

    @contextmanager
    def timed(self, kind: str | None = None) -> Iterator[None]:
        """Times the pause inside; the first one of a kind tells how often it can be.

        kind: None for what is made ready once, whose time counts neither for a kind nor for steps.
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
            wanted = max(min(self.usual[kind], int(LONGEST / each)), 1)
            self.every[kind] = max(wanted, math.ceil(self.took[kind] / (SHARE * each)))

    def slow(self, kinds: Set[str]) -> bool:
        """Whether pauses of these kinds may take longer than who sends SIGTERM waits before SIGKILL."""
        return any(self.took.get(kind, math.inf) > QUICK for kind in kinds)

    def found(self) -> dict[str, int]:
        """What is known so far, as keys of a recipe's `train` section."""
        return {KEYS[kind]: every for kind, every in self.every.items() if every is not None}
