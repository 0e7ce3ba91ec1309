"""Methods called with their options flat, as a recipe and the command line have them."""

from collections.abc import Callable
from typing import Any

from gzcli.models.base import grouped


def flat(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, whose dataclasses of options are given by their fields."""
    return lambda *args, **options: method(*args, **grouped(method, options))
