"""Ids of runs: MODEL-DATA-TIME-xxxx."""

from __future__ import annotations

import re
import time
from datetime import datetime, timedelta
from pathlib import Path

_ID = re.compile(r"(.+)-(\d{8}-\d{6})-([0-9a-f]{4})")
_STAMP = "%Y%m%d-%H%M%S"


def time_of_id(root: Path) -> str:
    """The time in the id of a new run: later than in all others, also where the clock was set back.

    root: folder of the runs.

    What lies more than a day ahead was made under a wrong clock, and does not count.
    """
    now = datetime.fromtimestamp(int(time.time()))
    found = (_ID.fullmatch(path.name) for path in root.iterdir())
    known = [at for id in found if id and (at := _time_of(id[2])) and at - now < timedelta(days=1)]
    return f"{max([now, *(last + timedelta(seconds=1) for last in known)]):{_STAMP}}"


def _time_of(stamp: str) -> datetime | None:
    """The time in a run's id; None where it is none."""
    try:
        return datetime.strptime(stamp, _STAMP)
    except ValueError:
        return None


def short_name(id: str) -> str:
    """A run's id without its time, `glow-celeba-ab12`, which means the run where no other has the same."""
    found = _ID.fullmatch(id)
    return f"{found[1]}-{found[3]}" if found else id
