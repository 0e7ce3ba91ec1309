"""The executable `gz` (and `gzcli`, `python -m gzcli`)."""

from __future__ import annotations

import os
import sys


def main(argv: list[str] | None = None) -> int:
    """Runs one command line and returns its exit code.

    argv: the words after the program's name; None: those of this process.
    """
    try:
        from gzcli.cli.app import run

        return run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:  # while the program itself loads, or tells of an earlier one
        return 130


if __name__ == "__main__":
    # `python -m` puts the working folder first, which may contain a `random.py`; it stays if it is the clone
    # itself, which may not be installed
    clone = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    try:
        here = os.getcwd()
    except FileNotFoundError:  # it was removed, so nothing is imported from it
        here = clone
    sys.path[:] = [
        entry for entry in sys.path if entry and (here == clone or os.path.realpath(entry) != here)
    ]
    sys.exit(main())
