"""Ranges of numbers in recipes, by their text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gzcli.recipe.kinds import numbers

RANGES: dict[str, Callable[[float], bool]] = {
    "greater than 0": lambda v: v > 0,
    "0 or more": lambda v: v >= 0,
    "1 or more": lambda v: v >= 1,
    "in [0, 1]": lambda v: 0 <= v <= 1,
    "in [0, 1)": lambda v: 0 <= v < 1,
}


def bounds(range: str) -> tuple[int, int]:
    """The least and the largest number of a range such as `2 … 256`."""
    low, high = (int(text.replace(",", "")) for text in range.split(" … "))
    return low, high


def within(range: str) -> Callable[[float], bool]:
    """Whether a number lies in a range: one of RANGES, or one that `bounds` reads."""
    if range in RANGES:
        return RANGES[range]
    low, high = bounds(range)
    return lambda v: low <= v <= high


def in_range(value: Any, range: str | None) -> bool:
    """Whether all numbers of a value lie in a range; None: any."""
    return range is None or all(map(within(range), numbers(value)))
