"""`python -m gzcli.league FOLDER`: trains and judges one entry of a league that another process runs. The
folder contains its terms and, afterwards, the outcome in `status.json`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from gzcli.core import streams
from gzcli.core.errors import GzError, first_line, system_error
from gzcli.launch.launcher import end_with_parent
from gzcli.league.league import Terms
from gzcli.league.loop import run_entry
from gzcli.store.run_folder import Run


def main(folder: Path) -> int:
    """Trains and judges the entry in a folder. Returns the exit code."""
    end_with_parent()
    error = None
    try:
        run_entry(Terms.read(folder), say)
    except Exception as problem:
        text = f"{type(problem).__name__}: {first_line(problem)}"
        error = problem if isinstance(problem, GzError) else system_error(problem) or GzError(text)
    if error is None:
        Run(folder).update(state="finished", code=0)
        return 0
    record = {"kind": error.kind, "message": error.message, "hint": error.hint}
    Run(folder).update(state="failed", code=error.code, error=record)
    return error.code


def say(text: str) -> None:
    if os.environ.get("GZ_OUTPUT") != "quiet":
        print(streams.printable(text), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
