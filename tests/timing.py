"""Times as ratios against a baseline of the same run: interleaved blocks, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

ROWS: list[tuple[str, str, str, str]] = []


def timed(f: Callable[[], object]) -> float:
    since = time.perf_counter()
    f()
    return time.perf_counter() - since


def interleaved(
    ours: Callable[[], object], theirs: Callable[[], object], blocks: int
) -> tuple[float, float, float]:
    """(median of ours, median of theirs, median of the ratios ours / theirs), the two in turn."""
    ours(), theirs()
    pairs = [(timed(ours), timed(theirs)) for _ in range(blocks)]
    a, b = zip(*pairs, strict=True)
    return statistics.median(a), statistics.median(b), statistics.median(x / y for x, y in pairs)


def row(what: str, measured: str, bar: str, ok: bool) -> None:
    ROWS.append((what, measured, bar, "ok" if ok else "MISSED"))
    print(f"{what:<44} {measured:<44} {bar:<22} {'ok' if ok else 'MISSED'}", flush=True)


def compare(what: str, ours: Callable[[], None], theirs: Callable[[], None]) -> None:
    def block(step: Callable[[], None]) -> Callable[[], None]:
        return lambda: [step() for _ in range(5)]

    a, b, ratio = interleaved(block(ours), block(theirs), 9)
    row(
        what,
        f"{200 * a:.0f} ms a step, theirs {200 * b:.0f}: {1 / ratio:.2f} ×",
        "≥ .97 ×",
        1 / ratio >= 0.97,
    )
