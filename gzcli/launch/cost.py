"""The cost of a job on this machine: its seconds and its network calls, in numbers and in words. Also the
costs that gz takes from earlier jobs, without a trial.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from gzcli.core import measured
from gzcli.core.devices import cpu_name, gpu_name
from gzcli.core.errors import GzError
from gzcli.core.units import about, counted, short
from gzcli.data.packs.pack import PackMeta
from gzcli.data.sets.registry import DataSet
from gzcli.metrics import networks
from gzcli.store import cache_files, files
from gzcli.store.paths import cache_dir
from gzcli.store.run_folder import Run

START_UP = 10.0  # seconds of a call besides its images, such as for loading torch in each process
EVALUATED_SECONDS = (
    5.4e-3  # seconds to compare an image on a core of 90 GFLOP/s, with 2,000 images in a league
)
INTERVAL_IMAGES = (
    600  # images that take as long to compare as the part of an evaluation that is independent of n
)
CHECKED_SECONDS = (
    5e-2  # seconds to fit a method without training to an image, or to check one, on such a core
)
OF_TRAINING, OF_SAMPLING, OF_EVALUATION = "of training", "of sampling", "of evaluation"
OF_LIKELIHOODS = "of test likelihoods"
TO_FIT, TO_TRAIN_JUDGES = "to fit the scores", "to train judge networks of the data set"


def together(values: Sequence[float | None]) -> float | None:
    """The sum; None if a value is unknown or if there are no values."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) if numbers and len(numbers) == len(values) else None


@dataclass(frozen=True)
class Cost:
    """The cost of a job; numbers are None if unknown. Costs can be added, and multiplied by a number.

    fixed: seconds that arise once.
    each: seconds for an image, or for a step of a training.
    calls: network calls for an image.
    why: known parts of `fixed`, in seconds, by their reason, such as "to fit the scores".
    """

    fixed: float | None = 0.0
    each: float | None = 0.0
    calls: float | None = 0  # not 0.0, so that a whole number stays one
    why: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def once(cls, seconds: float | None, why: str) -> Cost:
        """The cost of something that is done once, whatever the number of images."""
        return cls(seconds, why={why: seconds} if seconds else {})

    def __add__(self, other: Cost) -> Cost:
        why = {key: self.why.get(key, 0.0) + other.why.get(key, 0.0) for key in {**self.why, **other.why}}
        fixed, each, calls = map(together, zip(self._numbers, other._numbers, strict=True))
        return Cost(fixed, each, calls, why)

    def __rmul__(self, times: float) -> Cost:
        """The cost of the same, done so many times."""
        fixed, each, calls = (None if value is None else times * value for value in self._numbers)
        return Cost(fixed, each, calls, {key: times * value for key, value in self.why.items()})

    @property
    def _numbers(self) -> tuple[float | None, float | None, float | None]:
        return self.fixed, self.each, self.calls

    def seconds(self, n: int | None = 0) -> float | None:
        """The seconds for n images. None: unknown, such as for an unknown number of images."""
        if n == 0 or self.each == 0:
            return self.fixed
        return together([self.fixed, None if n is None or self.each is None else n * self.each])

    def or_else(self, other: Cost) -> Cost:
        """This cost, with the numbers of another one for those that are unknown."""
        pairs = zip(self._numbers, other._numbers, strict=True)
        fixed, each, calls = (theirs if ours is None else ours for ours, theirs in pairs)
        return Cost(fixed, each, calls, self.why or other.why)

    # ---------------------------------------------------------------------------------------- in words

    def in_words(self, n: int, *, roughly: str = "about") -> str:
        """Such as "about 3 minutes for 500 images × 20 network calls; 40 seconds of it to fit the
        scores"."""
        if (seconds := self.seconds(n)) is None:
            return "unknown"
        calls = f" × {counted(round(self.calls), 'network call')}" if self.calls else ""
        parts = ", ".join(f"{about(part)} of it {why}" for why, part in self.why.items() if part >= 1)
        return f"{roughly} {about(seconds)} for {counted(n, 'image')}{calls}{parts and f'; {parts}'}"

    def of_samples(self, n: int | None) -> str:
        """Such as "about 3 minutes, 20 calls per image". For n = None, the seconds of an image."""
        calls = f", {counted(round(self.calls), 'call')} per image" if self.calls else ""
        if self.each is None:
            return f"an unknown time{calls}"
        return (f"about {about(n * self.each)}" if n else f"{short(self.each, 2)} s per image") + calls

    @property
    def parts(self) -> list[str]:
        """Such as ["about 3 minutes of training", "about 40 seconds of evaluation"]."""
        return [f"about {about(seconds)} {why}" for why, seconds in self.why.items() if seconds]


START = Cost.once(START_UP, OF_EVALUATION)
UNKNOWN = Cost(None, None, None)
UNKNOWN_IMAGE = Cost(0.0, None, None)  # the cost of an image of an unknown model


# ---------------------------------------------------------------------------- from earlier jobs


def sampling(model: str, data: str, run: Run | None = None, steps: int | None = None) -> Cost:
    """The cost of an image that a run measured at its end and in its benches. Without a run, that of a
    shipped league, preferably on the same set.

    steps: sampler steps, to which both numbers are proportional. Default: the model's own.
    """
    if run:
        usual = (run.serving.tree().get("sample") or {}).get("steps")
        if steps and not usual:
            return UNKNOWN_IMAGE
        of_thousand = run.status().get("sample_seconds") or None
        each = Cost(0.0, of_thousand and of_thousand / 1000, calls_of(run))
        return steps / usual * each if steps and usual else each
    places = sorted(measured.places(), key=lambda place: place[0] != data)
    rows = (row for place in places for row in measured.standings(*place) if row["model"] == model)
    row = next((row for row in rows if row["sample_seconds"]), {})
    seconds, calls = (float(row.get(key) or 0.0) for key in ("sample_seconds", "calls"))
    return Cost(0.0, seconds or None, calls or None)


def calls_of(run: Run) -> float | None:
    """The network calls per image, as counted by the newest bench of the run."""
    for path in sorted(run.path.glob(f"bench/*/{Run.result_file}"), reverse=True):
        with suppress(GzError), files.reading(path):  # a damaged result counts as none
            for row in files.read_object(path).get("rows") or []:
                if isinstance(row, dict) and row.get("run") == run.id and row.get("calls"):
                    return float(row["calls"])
    return None


def judge_networks(metrics: Iterable[str], data: DataSet, meta: PackMeta | None) -> Cost:
    """The cost of training the judges that these metrics use and that a set with this pack lacks."""
    return Cost.once(networks.TRAINING * len(networks.untrained(metrics, data, meta)), TO_TRAIN_JUDGES)


def evaluation(n: int, gpus: int) -> Cost:
    """The cost of comparing n images of a contestant with real ones, without likelihoods and start-up. It
    comes from the last bench on this machine, otherwise from a core of 90 GFLOP/s."""
    return Cost.once((n + INTERVAL_IMAGES) * noted("judged", gpus, EVALUATED_SECONDS), OF_EVALUATION)


def note_evaluation(result: Mapping[str, Any], gpus: int) -> None:
    """Stores the values that `evaluation` needs from the result of a bench."""
    each = [
        (row["seconds"] - row["n"] / row["metrics"]["samples_per_s"]) / (row["n"] + INTERVAL_IMAGES)
        for row in result["rows"]
        if row.get("seconds") and row["metrics"].get("samples_per_s") and "likelihood" not in row
    ]
    if each:
        note("judged", gpus, max(0.0, *each))


def checking(method: str) -> Cost:
    """The cost of an alarm by a method without training; its images are both the good and the checked ones.
    It comes from its last alarm on this machine, otherwise from a core of 90 GFLOP/s."""
    return Cost(START_UP, noted(f"checked-{method}", 0, CHECKED_SECONDS))


def note_checking(result: Mapping[str, Any]) -> None:
    """Stores the values that `checking` needs from the result of an alarm."""
    if n := result["compared"]["n"] + len(result["files"]):
        note(f"checked-{result['method']}", 0, result["seconds"] / n)


def noted(what: str, gpus: int, usual: float) -> float:
    """The seconds of an image that `note` has stored on this machine, or the usual ones."""
    row = cache_files.read(noted_file(what, gpus), partial(read_numbers, names=("seconds",)))
    return row["seconds"] if row and row["seconds"] is not None else usual


def note(what: str, gpus: int, seconds: float) -> None:
    cache_files.write(noted_file(what, gpus), files.write_json, {"seconds": seconds})


def noted_file(what: str, gpus: int) -> Path:
    name = gpu_name() if gpus else cpu_name()
    return cache_dir("costs", f"{what}-{hashlib.sha256(name.encode()).hexdigest()[:16]}.json")


def read_numbers(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """The object of a file. Raises an error unless each of these keys is null, or a finite number of at least
    0."""
    row = files.read_object(path)
    numbers = all(row[name] is None or 0 <= row[name] < math.inf for name in names)
    if not numbers or not all(isinstance(row.get(key) or "", str) for key in ("error", "refused")):
        raise ValueError("a value has another type, or is not finite")
    return row
