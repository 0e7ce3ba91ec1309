"""Errors of the Python API: they name calls and keywords instead of commands and flags."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from gzcli.core.errors import GzError
from gzcli.core.hints import Option

P = ParamSpec("P")
T = TypeVar("T")

_FLAG = re.compile(r"`--?([a-z][a-z-]*)`")


def spoken(call: Callable[P, T]) -> Callable[P, T]:
    """Decorates a function of the Python API: the text of an error that it raises includes the hint, written
    as Python."""

    @wraps(call)
    def speaking(*words: P.args, **options: P.kwargs) -> T:
        try:
            return call(*words, **options)
        except GzError as e:
            message = _FLAG.sub(lambda flag: f"`{Option(flag[1]).keyword}`", e.message)
            e.args = (f"{message}\nhint: {e.hint.python}" if e.hint else message,)
            raise

    return speaking
