"""A call that ends with an error in words."""

from collections.abc import Callable
from typing import Any

import pytest

from gzcli.core.errors import UsageError


def refused(words: str, call: Callable, *args: Any, error: type = UsageError, hint: str = "", **how: Any):
    """The error by which a call ends: `words` are a pattern of its message, `hint` stands in its hint."""
    with pytest.raises(error, match=words or None) as e:
        call(*args, **how)
    assert hint in (getattr(e.value, "hint", None) or "")
    return e.value
