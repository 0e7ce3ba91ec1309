"""Numbers in the form in which people read and write them: sizes of images, shapes, bytes, durations,
environment variables. The size of an image is its side in pixels, `64`, or width and height, `48x32`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from datetime import datetime
from typing import TypeAlias

from gzcli.core.errors import UsageError
from gzcli.core.hints import advice, setting

Size: TypeAlias = int | str  # in the form of `as_size`

MIN_SCORED_IMAGES, MAX_SCORED_IMAGES = (
    500,
    10_000,
)  # minimum and maximum number of images of a split that fit into a budget
BY_ODE = 500  # most test images of a likelihood by an ODE, which takes hundreds of network calls for each
PACKED_SIDES = range(4, 1025)  # pixels a side of images that are packed
BUDGET_FORMS = "a number with its unit, at least 3s: `--budget 8m`, `--budget 1.5h`"
SIZE_FORMS = "a number of pixels, or width and height such as `48x32`"


def by_sides(shape: Iterable[int]) -> str:
    """A shape: (1, 16, 16) as 1×16×16."""
    return "×".join(map(str, shape))


def figure(value: float) -> str:
    """A measured value in four digits, without powers of ten if that is possible: 12,509, 0.4933."""
    return f"{value:,.0f}" if 10_000 <= abs(value) < 1e15 else f"{value:.4g}"


def short(value: float | None, digits: int = 3) -> str:
    """A number in a few digits, without a power of ten if it is large; `-` for None."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def size(count: float) -> str:
    """A number of bytes in two digits or more: 1.7 GB, 12 MB, 1.3 MB, 730 kB, 300 bytes."""
    if count < 1000:
        return f"{count:.0f} bytes"
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    if count >= 999_500:
        return f"{count / 1e6:.{1 if count < 1e7 else 0}f} MB"
    return f"{count / 1e3:.0f} kB"


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
    """A long duration in one unit: 40 seconds · 41 minutes · 8 hours · 94 days · 3 years."""
    steps = (("second", 1), ("minute", 60), ("hour", 3600), ("day", 86_400), ("year", 365 * 86_400))
    name, unit = [(name, unit) for name, unit in steps if seconds >= 2 * unit or unit == 1][-1]
    count = max(1, round(seconds / unit))
    return f"{count:,} {name}{'s' if count != 1 else ''}"


def affordable(seconds: float, budget: float, sets: int) -> int:
    """The number of images of each split that a budget pays for: 500 … 10,000, in steps of 100."""
    return int(
        min(max(budget / max(seconds * sets, 1e-9) // 100 * 100, MIN_SCORED_IMAGES), MAX_SCORED_IMAGES)
    )


def likelihoods(seconds: float, budget: float, most: int, classes: int) -> tuple[int, int]:
    """The number of test images whose likelihood fits into a budget, and how often it is computed for each.
    It is computed for the image's label, and also for each class in turn if the budget allows."""
    n = min(affordable(seconds, budget, 1), most)
    return n, 1 + classes if seconds * n * (1 + classes) <= budget else 1


def count(number: float) -> str:
    """A number in three digits: 950 · 1.20K · 35.7M · 1.06B."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= unit:
            value = number / unit
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}{letter}"
    return f"{number:.0f}"


def sides(size: Size) -> tuple[int, int]:
    """Height and width in pixels of a size. Raises UsageError for another text."""
    if isinstance(size, int):
        return size, size
    digits = re.fullmatch(r"([1-9]\d*)(?:[xX]([1-9]\d*))?", size, re.ASCII)
    if not digits:
        raise UsageError(
            f"`data.size` must be {SIZE_FORMS}, not `{size}`",
            hint=advice("use {}", setting("data.size", nearest(size))),
        )
    return int(digits[2] or digits[1]), int(digits[1])


def nearest(text: str) -> Size:
    """The size that a text probably means, judged by its numbers."""
    numbers = [int(digits) for digits in re.findall(r"\d+", text) if int(digits)]
    return as_size(*reversed(numbers)) if len(numbers) == 2 else numbers[0] if len(numbers) == 1 else "48x32"


def as_size(height: int, width: int) -> Size:
    """The size with these sides; the inverse of `sides`."""
    return height if height == width else f"{width}x{height}"


def canonical_size(size: Size) -> Size:
    """A size in the form of `as_size`: `64` for `64x64`. Raises UsageError."""
    return as_size(*sides(size))


def packable(size: Size) -> Size:
    """The size, in the form of `as_size`, of images that may be packed. Raises UsageError."""
    if not all(side in PACKED_SIDES for side in sides(size)):
        message = f"`data.size` must be {PACKED_SIDES[0]} to {PACKED_SIDES[-1]} pixels per side, not {size}"
        raise UsageError(message, hint=advice("use {}", setting("data.size", 64)))
    return canonical_size(size)


def middle(side: int, patch: int) -> slice:
    """The middle `patch` pixels of a side."""
    start = (side - patch) // 2
    return slice(start, start + patch)


def number_in(variable: str, unit: str) -> int | None:
    """The number in an environment variable; None if it is not set. Raises UsageError."""
    text = os.environ.get(variable, "").strip()
    if text and not (text.isascii() and text.isdigit()):
        raise UsageError(f"`{variable}` must be a number of {unit}, not `{text}`")
    return int(text) if text else None


def threads_wanted() -> int | None:
    """The threads per process that `OMP_NUM_THREADS` sets, or None. In a list with one number per level of
    nested regions (OpenMP 5.2, §21.2), the first one counts."""
    text = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(text) or None if text.isascii() and text.isdigit() else None


def counted(n: int, what: str) -> str:
    """A number with its noun: `1 file`, `2,000 files`."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def percent(share: float) -> str:
    """A share as `2 %` or `0.14 %`."""
    return f"{100 * share:.3g} %"


def seconds_of(budget: str) -> float:
    """The seconds of a budget. Raises UsageError for a text that is not a duration, and for none."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d*)?|\.\d+)([smhd])", budget.strip())
    if not match:
        raise UsageError(f"`--budget {budget}` is not a time", hint=BUDGET_FORMS)
    seconds = float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[match[2]]
    if not seconds:
        raise UsageError(f"`--budget {budget}` must be more than 0", hint=BUDGET_FORMS)
    return seconds
