"""Errors that a user can cause. Each says what is wrong and where, and hints at what to do next."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_URL = re.compile(r"(?<![A-Za-z0-9+.-])(?!file:)([A-Za-z][A-Za-z0-9+.-]+:/+)([^\s`'\"<>]+)")


def redacted(text: str) -> str:
    """The text with user-info, query and fragment of every URL in it replaced by `…`.

    These parts may hold passwords and tokens. Everything before an `@` counts as user-info, even a slash,
    because a password may hold one that was not quoted.
    """

    def hide(found: re.Match[str]) -> str:
        path = re.split("[?#]", found[2], maxsplit=1)[0]
        mark = found[2][len(path) : len(path) + 1]
        _, at, rest = path.rpartition("@")
        return f"{found[1]}{'…@' if at else ''}{rest}{f'{mark}…' if mark else ''}"

    return _URL.sub(hide, text)


class GzError(Exception):
    """An error that is shown as a message and a hint, without a traceback; secrets in them are hidden.

    message: what is wrong and where.
    hint: what to do next.
    """

    code = 1  # the exit code of `gz`
    kind = "bug"  # the name of the class in JSON
    # the key `event` of the error's line, for a verb that prints a line of JSON for each event
    event: str | None = None

    def __init__(self, message: str, *, hint: str | None = None):
        self.message = redacted(message)
        self.hint = hint and redacted(hint)
        super().__init__(self.message)


class UsageError(GzError):
    """A wrong word on the command line or in a recipe."""

    code, kind = 2, "usage"


class MissingError(GzError):
    """Data, a run, a checkpoint, weights, the network or an optional package is missing."""

    code, kind = 3, "missing"


class DamagedError(MissingError):
    """A file that gz wrote cannot be read any more, or holds something else."""


class DeviceError(GzError):
    """No such GPU, or out of memory."""

    code, kind = 4, "device"


class DivergedError(GzError):
    """The loss is not finite any more."""

    code, kind = 5, "diverged"


class Interrupted(GzError):
    """Stopped by a signal. `code` is 128 + the number of the signal."""

    kind = "interrupted"

    def __init__(self, message: str, *, signum: int, hint: str | None = None):
        super().__init__(message, hint=hint)
        self.code = 128 + signum


def first_line(error: BaseException) -> str:
    """What an error says, in one line without a full stop; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def canonical(name: str) -> str:
    """The form in which names are compared: `SD-LoRA` and `sd_lora` are one name."""
    return name.strip().lower().replace("-", "_")


def matching(text: str, names: Iterable[str]) -> str | None:
    """The first of the names that equals the text in its canonical form; None where there is none."""
    return next((name for name in names if canonical(name) == canonical(text)), None)


def did_you_mean(name: str, options: Iterable[str]) -> str | None:
    """The hint `did you mean `vae`?`; None where no option resembles the name."""
    by_form = {canonical(option): option for option in options}
    near = difflib.get_close_matches(canonical(name), by_form, n=1, cutoff=0.5)
    return f"did you mean `{by_form[near[0]]}`?" if near else None
