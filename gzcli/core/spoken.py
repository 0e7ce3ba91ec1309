"""Errors of the Python API: they name calls and keywords instead of commands and flags."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import ParamSpec, TypeVar

from gzcli.core.errors import GzError
from gzcli.core.hints import Option

P = ParamSpec("P")
T = TypeVar("T")

_OPTION = re.compile(r"`--?([a-z][a-z-]*)(?: ([^`]+))?`")


def spoken(call: Callable[P, T]) -> Callable[P, T]:
    """Decorates a function of the Python API: the text of an error that it raises includes the hint, written
    as Python."""

    @wraps(call)
    def speaking(*words: P.args, **options: P.kwargs) -> T:
        try:
            return call(*words, **options)
        except GzError as e:
            message = _OPTION.sub(_keyword, e.message)
            e.args = (f"{message}\nhint: {e.hint.python}" if e.hint else message,)
            raise

    return speaking


def _keyword(option: re.Match[str]) -> str:
    """A quoted option of a message as a keyword: "`--steps 9`" becomes "`steps=9`"."""
    name, text = option.groups()
    if text is None:
        return f"`{Option(name).keyword}=…`"
    key, is_setting, value = text.partition("=") if name == "set" else ("", "", text)
    with suppress(ValueError):
        value = json.loads(value)
    return f"`{Option(name, {key: value} if is_setting else value).python}`"
