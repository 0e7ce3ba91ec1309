"""Numbers in environment variables, which a user or a scheduler has set."""

from __future__ import annotations

import os

from gzcli.core.errors import UsageError


def number(variable: str, unit: str) -> int | None:
    """The whole number in an environment variable; None where it is not set. Raises UsageError for a text.

    unit: of the number, for the message.
    """
    text = os.environ.get(variable, "").strip()
    if text and not (text.isascii() and text.isdigit()):
        raise UsageError(f"`{variable}` is a number of {unit}, not `{text}`")
    return int(text) if text else None


def threads() -> int | None:
    """The threads of a process that `OMP_NUM_THREADS` asks for; None where it does not.

    Of a list, which is one number a level of nested regions (OpenMP 5.2, §21.2), the first counts.
    """
    text = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(text) or None if text.isascii() and text.isdigit() else None
