"""The files below a folder, and what else is there: broken links, pipes, devices. No pipe is waited for, no
circle of links is followed."""

from __future__ import annotations

import os
import stat
from collections import deque
from pathlib import Path

from gzcli.core.errors import MissingError

LARGEST_FILE = 1 << 30  # bytes: no picture is larger


def walk(root: Path) -> tuple[list[str], dict[str, list[str]]]:
    """Names of the regular files below a folder (POSIX, relative, sorted), and names of everything else, by
    what it is: "broken" links, "special" files (pipes, devices, sockets), links to folders that are read
    already ("repeated").

    Links to files and folders are followed. Each folder is read once, by its own name rather than a link's,
    so that a circle of links has an end. Names that begin with a dot are left out.

    Raises MissingError for a folder that cannot be read.
    """
    files: list[str] = []
    odd: dict[str, list[str]] = {}
    seen: set[tuple[int, int]] = set()
    # Folders that are yet to be read: plain ones, and links to folders.
    own, linked = deque([""]), deque[str]()
    while own or linked:
        at = own.popleft() if own else linked.popleft()
        where = os.path.join(root, at)
        try:
            known = os.stat(where)
            entries = sorted(os.scandir(where), key=lambda entry: entry.name)
        except OSError as e:
            raise MissingError(
                f"`{where}` cannot be read: {e.strerror}", hint="look at its owner and mode"
            ) from e
        if (known.st_dev, known.st_ino) in seen:
            odd.setdefault("repeated", []).append(at)
            continue
        seen.add((known.st_dev, known.st_ino))
        for entry in entries:
            name = f"{at}/{entry.name}" if at else entry.name
            if not entry.name.startswith("."):
                kind = kind_of(entry)
                if kind == "folder":
                    (linked if entry.is_symlink() else own).append(name)
                elif kind == "file":
                    files.append(name)
                else:
                    odd.setdefault(kind, []).append(name)
    return sorted(files), odd


def kind_of(entry: os.DirEntry) -> str:
    """What an entry of a folder is or leads to: "file", "folder", "broken" or "special"."""
    try:
        if entry.is_file():
            return "file"
        if entry.is_dir():
            return "folder"
        entry.stat()  # fails where a link leads nowhere, or in a circle
    except OSError:
        return "broken"
    return "special"


def is_regular(path: Path) -> bool:
    """Whether a path leads to a regular file or a folder; of a pipe or a device nothing should be read."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def read_regular(path: Path) -> bytes:
    """The bytes of a regular file. Raises MissingError for anything else, and for one that is larger than any
    picture."""
    try:
        with open(
            os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb"
        ) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise MissingError(f"`{path}` is no regular file", hint="take it out")
            refuse_large(str(path), found.st_size)
            return file.read(LARGEST_FILE)
    except OSError as e:
        raise MissingError(f"`{path}` cannot be read: {e.strerror}") from e


def refuse_large(name: str, size: int) -> None:
    """Raises MissingError for a file of more bytes than any picture has."""
    if size > LARGEST_FILE:
        raise MissingError(f"`{name}` is larger than any picture: {size:,} bytes", hint="take it out")
