"""Times as ratios against a baseline of the same run: interleaved blocks, medians. How often something is
done goes through `times`, so that a test can do all of it once."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

ROWS: list[tuple[str, str, str, str]] = []
MOST = 1_000_000  # how often anything is done


def times(n: int) -> int:
    """How often is done what is to be done n times."""
    return min(n, MOST)


def timed(f: Callable[[], object]) -> float:
    since = time.perf_counter()
    f()
    return time.perf_counter() - since


def median(f: Callable[[], object], n: int) -> float:
    """The median of the seconds of n calls."""
    return statistics.median(timed(f) for _ in range(times(n)))


def interleaved(
    ours: Callable[[], object], theirs: Callable[[], object], blocks: int
) -> tuple[float, float, float]:
    """(median of ours, median of theirs, median of the ratios ours / theirs), the two in turn."""
    ours(), theirs()
    pairs = [(timed(ours), timed(theirs)) for _ in range(times(blocks))]
    a, b = zip(*pairs, strict=True)
    return statistics.median(a), statistics.median(b), statistics.median(x / y for x, y in pairs)


def row(what: str, measured: str, bar: str, ok: bool) -> None:
    ROWS.append((what, measured, bar, "ok" if ok else "MISSED"))
    print(f"{what:<44} {measured:<44} {bar:<22} {'ok' if ok else 'MISSED'}", flush=True)


def compare(what: str, ours: Callable[[], None], theirs: Callable[[], None]) -> None:
    """A row on a step of ours against one of theirs."""
    steps = times(5)

    def block(step: Callable[[], None]) -> Callable[[], None]:
        return lambda: [step() for _ in range(steps)]

    a, b, ratio = interleaved(block(ours), block(theirs), 9)
    row(
        what,
        f"{1e3 * a / steps:.0f} ms a step, theirs {1e3 * b / steps:.0f}: {1 / ratio:.2f} ×",
        "≥ .97 ×",
        1 / ratio >= 0.97,
    )
