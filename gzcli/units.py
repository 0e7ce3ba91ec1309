"""Numbers as people read them: shapes, bytes, durations, points in time."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime


def sides(shape: Iterable[int]) -> str:
    """A shape: (1, 16, 16) as 1×16×16."""
    return "×".join(map(str, shape))


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
