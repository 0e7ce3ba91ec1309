"""The request of `gz data audit`: a search for faults in a data set. Nothing is read here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gzcli.data.sets.registry import DataSet, locate
from gzcli.store import claims
from gzcli.store.jobs import AuditJob
from gzcli.store.paths import user_dir


@dataclass(frozen=True)
class Request:
    """An audit that can start."""

    job: AuditJob
    data: DataSet

    def new_folder(self) -> Path:
        """A new folder for the job."""
        return claims.new_folder(user_dir("audit"), self.data.key)


def ask(name: str, n: int | None = None) -> Request:
    """The audit of the set of a name or path, or of n of its images. Raises UsageError or MissingError if
    there is no such set."""
    data = locate(name)
    return Request(AuditJob(data=data.reference, n=n), data)
