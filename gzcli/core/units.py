"""Numbers as people read them: shapes, bytes, durations, points in time."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime


def by_sides(shape: Iterable[int]) -> str:
    """A shape: (1, 16, 16) as 1×16×16."""
    return "×".join(map(str, shape))


def figure(value: float) -> str:
    """A measured value in four digits, without powers of ten where that is possible: 12,509, 0.4933."""
    return f"{value:,.0f}" if 10_000 <= abs(value) < 1e15 else f"{value:.4g}"


def size(count: float) -> str:
    """A number of bytes: 1.7 GB, 12 MB."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:,.0f} MB" if count >= 1e6 else f"{count / 1e3:,.0f} kB"


def duration(seconds: float) -> str:
    """12s · 3m40s · 5h02m."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def moment(seconds: float) -> str:
    """A time of `time.time()` in the local zone: 2026-01-31T14:25:01+01:00."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


def about(seconds: float) -> str:
    """A long time in one number, for people: 40 seconds · 41 minutes · 8 hours · 94 days · 3 years."""
    steps = (("second", 1), ("minute", 60), ("hour", 3600), ("day", 86_400), ("year", 365 * 86_400))
    name, unit = [(name, unit) for name, unit in steps if seconds >= 2 * unit or unit == 1][-1]
    count = round(seconds / unit)
    return f"{count:,} {name}{'s' if count != 1 else ''}"


def count(number: float) -> str:
    """A number in three digits: 950 · 1.20K · 35.7M · 1.06B."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= unit:
            value = number / unit
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}{letter}"
    return f"{number:.0f}"


def counted(n: int, what: str) -> str:
    """A number with its noun: `1 file`, `2,000 files`."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"
