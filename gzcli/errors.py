"""The errors a user can cause. Each says what and where, and hints what to do next; its `code` is the exit
code."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_URL = re.compile(r"(?<![A-Za-z0-9+.-])(?!file:)([A-Za-z][A-Za-z0-9+.-]+:/+)([^\s`'\"<>]+)")


def redacted(text: str) -> str:
    """The text with user-info, query and fragment of every URL in it as `…`: there stand passwords and
    tokens.

    What precedes an `@` counts as user-info even behind a slash, as in a password that was not quoted.
    """

    def hide(found: re.Match[str]) -> str:
        path, mark, _ = re.fullmatch(r"([^?#]*)([?#]?)(.*)", found[2]).groups()
        _, at, rest = path.rpartition("@")
        return f"{found[1]}{'…@' if at else ''}{rest}{f'{mark}…' if mark else ''}"

    return _URL.sub(hide, text)


class GzError(Exception):
    """A mistake or a lack that is not a bug: shown as a message with a hint, never as a traceback. Neither
    holds a secret."""

    code = 1
    kind = "bug"

    def __init__(self, message: str, *, hint: str | None = None):
        self.message = redacted(message)
        self.hint = hint and redacted(hint)
        super().__init__(self.message)


class UsageError(GzError):
    """A wrong word on the command line or in a recipe."""

    code, kind = 2, "usage"


class MissingError(GzError):
    """Data, a run, a checkpoint, weights, the network or an optional package is not there."""

    code, kind = 3, "missing"


class DeviceError(GzError):
    """No such GPU, or out of memory."""

    code, kind = 4, "device"


class DivergedError(GzError):
    """The loss is not finite any more."""

    code, kind = 5, "diverged"


class Interrupted(GzError):
    """Stopped by a signal; a checkpoint was saved. `code` is 128 + the signal's number."""

    kind = "interrupted"

    def __init__(self, message: str, *, signum: int, hint: str | None = None):
        super().__init__(message, hint=hint)
        self.code = 128 + signum


def canonical(name: str) -> str:
    """The form in which names are compared: `SD-LoRA` and `sd_lora` are one name."""
    return name.strip().lower().replace("-", "_")


def did_you_mean(name: str, options: Iterable[str]) -> str | None:
    """The hint `did you mean `vae`?`, or None where nothing is near."""
    by_form = {canonical(option): option for option in options}
    near = difflib.get_close_matches(canonical(name), by_form, n=1, cutoff=0.5)
    return f"did you mean `{by_form[near[0]]}`?" if near else None
