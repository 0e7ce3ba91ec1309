"""Faults of a data set from Python: `gzcli.audit`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gzcli.api.compare import done, row_of
from gzcli.core.spoken import spoken
from gzcli.data.readers.memory import reference_of
from gzcli.launch import auditing


@dataclass(frozen=True)
class AuditRow:
    """A fault of an image.

    kind: "unreadable", "blank", "size", "split-copy", "copy", "foreign" or "label".
    score: of a copy, the correlation of its details with the original's; of a foreign image, its p-value; of
      a wrong label, its probability against the suggested one. None for other kinds.
    of: the image that a copy shows.
    label, suggested: its class, and the class that it seems to show.
    note: reason or fact in words.
    """

    file: str
    split: str
    kind: str
    score: float | None
    of: str | None
    label: str | None
    suggested: str | None
    note: str


@dataclass(frozen=True)
class AuditResult:
    """The faults of a data set by kind, the clearest first.

    images: number of images that were searched.
    counts: number of faults of each kind.
    folder: folder with the table `audit.csv` and the sheet `audit.png`.
    """

    images: int
    rows: tuple[AuditRow, ...]
    counts: Mapping[str, int]
    notes: tuple[str, ...]
    folder: Path

    def files(self, kind: str) -> list[str]:
        """The files with a fault of this kind, the clearest first."""
        return [row.file for row in self.rows if row.kind == kind]


@spoken
def audit(data: Any, *, n: int | None = None, quiet: bool = False) -> AuditResult:
    """Searches a data set for copies, wrong labels, foreign images and unusable files, as `gz data audit`
    does. It changes nothing.

    data: name or path of the data set, or images in memory as in `gzcli.train`.
    n: number of images, drawn at random; None: all.
    quiet: whether to print nothing.

    Raises UsageError for an unknown name, MissingError if the images or the network's weights are missing.
    """
    request = auditing.ask(str(reference_of(data)), n)
    folder = request.new_folder()
    result = done(folder, request.job, quiet)
    rows = tuple(row_of(AuditRow, row) for row in result["faults"])
    return AuditResult(result["images"], rows, result["counts"], tuple(result["notes"]), folder)
