"""Errors that a user can cause. Each has a message (what is wrong, and where) and a hint (what to do
next)."""

from __future__ import annotations

import difflib
import errno
import os
import re
import shlex
import sys
from collections.abc import Container, Iterable
from importlib.util import find_spec

from gzcli.core.hints import Hint, HintPart, advice

# the exit code of `gz ood --input --fail` if an image is flagged or unreadable, and of `gz data audit --fail`
# if there is a fault; not an error
FLAGGED_CODE = 6

_URL = re.compile(r"(?<![A-Za-z0-9+.-])(?!file:)([A-Za-z][A-Za-z0-9+.-]+:/+)([^\s`'\"<>]+)")


def redacted(text: str) -> str:
    """The text with the user-info, query and fragment of every URL replaced by `…`, because they may contain
    passwords and tokens. User-info is everything before an `@`, including a slash, which an unquoted password
    may contain."""

    def hide(match: re.Match[str]) -> str:
        path = re.split("[?#]", match[2], maxsplit=1)[0]
        mark = match[2][len(path) : len(path) + 1]
        _, at, rest = path.rpartition("@")
        return f"{match[1]}{'…@' if at else ''}{rest}{f'{mark}…' if mark else ''}"

    return _URL.sub(hide, text)


class GzError(Exception):
    """An error that is shown as a message (what is wrong and where) and a hint (what to do next), without a
    traceback. Secrets in both are hidden."""

    code = 1  # the exit code of `gz`
    kind = "bug"  # the name of the class in JSON
    # the key `event` of the error's line, for a verb that prints a line of JSON for each event
    event: str | None = None

    def __init__(self, message: str, *, hint: str | HintPart | None = None):
        self.message = redacted(message)
        self.advise(hint)
        super().__init__(self.message)

    def advise(self, hint: str | HintPart | None) -> None:
        """Replaces the hint."""
        self.hint: Hint | None = advice(hint).mapped(redacted) if hint else None

    @property
    def record(self) -> dict[str, str | None]:
        """The error as JSON for another process."""
        python = self.hint and self.hint.python
        return {"kind": self.kind, "message": self.message, "hint": self.hint, "python": python}


class UsageError(GzError):
    """A wrong word on the command line or in a recipe."""

    code, kind = 2, "usage"


class MissingError(GzError):
    """Data, a run, a checkpoint, weights, the network or an optional package is missing."""

    code, kind = 3, "missing"


class DamagedError(MissingError):
    """A file that gz wrote is unreadable or no longer contains what gz wrote."""


class DeviceError(GzError):
    """No such GPU, or out of memory."""

    code, kind = 4, "device"


class DivergedError(GzError):
    """The loss is no longer finite."""

    code, kind = 5, "diverged"


class Interrupted(GzError):
    """Stopped by a signal. `code` is 128 + the number of the signal."""

    kind = "interrupted"

    def __init__(self, message: str, *, signum: int, hint: str | HintPart | None = None):
        super().__init__(message, hint=hint)
        self.code = 128 + signum


PLACE_HINT = "use another path, or set `GZ_HOME` to a folder"
SPACE_HINT = "free some space, or write to a larger disk; `GZ_HOME` moves the folders of gz"
# full or not writable
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
# of the process or the machine: no other file could be opened either
EXHAUSTED_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_OPEN_FILES = "close other programs, or allow more open files, as by `ulimit -n 4096`"
_RIGHTS = "use another path, or change its permissions; `GZ_HOME` moves the folders of gz"
_SYSTEM = {  # error of a file or folder → what to do
    errno.ENOSPC: SPACE_HINT,
    errno.EDQUOT: SPACE_HINT,
    errno.EFBIG: f"{SPACE_HINT}; `ulimit -f` shows the largest file that you may write",
    errno.EMFILE: _OPEN_FILES,
    errno.ENFILE: _OPEN_FILES,
    errno.ENOMEM: "free some memory, for example by closing other programs",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.EIO: "check that the disk or the terminal is still connected",
    errno.EROFS: "use another path, or set `GZ_HOME` to a writable folder",
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.ENOTDIR: f"a file has the name of a folder that gz needs: {PLACE_HINT}",
    errno.EEXIST: f"the path is already in use: {PLACE_HINT}",
    errno.EISDIR: "a folder has the name of a file that gz needs: use another path",
    errno.ELOOP: f"a link leads back to itself: {PLACE_HINT}",
}
# how libraries in Rust, such as safetensors, end the text of an error of the system
_RUST = re.compile(r"\(os error (\d+)\)")


def system_error(problem: BaseException) -> MissingError | None:
    """The error to show for a full disk or an unreadable or unwritable path; None for any other exception."""
    if not isinstance(problem, OSError):
        match = _RUST.search(str(problem))
        problem = OSError(int(match[1]) if match else 0, "")
    if problem.errno == errno.ENOENT and not _has_working_folder():
        return MissingError("the working folder was removed", hint="`cd` into a folder that exists")
    if (hint := _SYSTEM.get(problem.errno or 0)) is None:
        return None
    what = f"`{problem.filename}`: " if problem.filename else ""
    return MissingError(f"{what}{os.strerror(problem.errno or 0).lower()}", hint=hint)


def _has_working_folder() -> bool:
    try:
        return bool(os.getcwd())
    except FileNotFoundError:
        return False


def first_line(error: BaseException) -> str:
    """The first line of an error without its full stop; the name of its class if it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def canonical(name: str) -> str:
    """The form in which names are compared: `SD-LoRA` and `sd_lora` are one name."""
    return name.strip().lower().replace("-", "_")


def matching(text: str, names: Iterable[str]) -> str | None:
    """The name that equals the text in canonical form; None if there is none."""
    return next((name for name in names if canonical(name) == canonical(text)), None)


def did_you_mean(name: str, options: Iterable[str], *, risky: Container[str] = ()) -> str | None:
    """A hint such as `did you mean `vae`?`; None if no option resembles the name. A risky option must be at
    most a typo away."""
    by_form, form = {canonical(option).strip("_"): option for option in options}, canonical(name).strip("_")
    distances = {option: edits(form, option) for option in by_form}
    distances = {option: n for option, n in distances.items() if n <= 1 or by_form[option] not in risky}
    near = min(distances, key=lambda option: distances[option], default=None)
    if near is None or distances[near] > len(form) / 3:
        near = next(iter(difflib.get_close_matches(form, distances, n=1, cutoff=0.6)), None)
    return f"did you mean `{by_form[near]}`?" if near else None


def choose(what: str, name: str, options: Iterable[str]) -> str:
    """The option with this name; `-` and `_` are equivalent. The message calls the options `what`."""
    options = list(options)
    if match := matching(name, options):
        return match
    every = "choose one of " + ", ".join(f"`{option}`" for option in options)
    raise UsageError(f"no {what} is called `{name}`", hint=did_you_mean(name, options) or every)


def install_line(*words: str) -> str:
    """The command that installs packages beside gz, for hints. It names this Python, because the `pip` of a
    shell may be another's, for example if pipx installed gz. Environments of uv have no pip."""
    here = sys.executable
    pip = [here, "-m", "pip", "install"] if find_spec("pip") else ["uv", "pip", "install", "--python", here]
    return shlex.join([*pip, *words])


def edits(a: str, b: str) -> int:
    """The edit distance from a to b: insertions, deletions, substitutions and swaps of neighbours (Damerau
    1964)."""
    rows = [list(range(len(b) + 1))]
    for i, letter in enumerate(a, 1):
        row = [i]
        for j, letter_b in enumerate(b, 1):
            least = min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (letter != letter_b))
            if min(i, j) > 1 and (letter, a[i - 2]) == (b[j - 2], letter_b):
                least = min(least, rows[-2][j - 2] + 1)
            row.append(least)
        rows.append(row)
    return rows[-1][-1]
