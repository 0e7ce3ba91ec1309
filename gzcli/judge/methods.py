"""Alarms by methods that need no training, fitted only to good images."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gzcli.core.errors import UsageError
from gzcli.core.types import Say
from gzcli.core.units import as_size, counted, percent
from gzcli.data.packs.open import PackOptions, facts_of, open_pack
from gzcli.data.packs.pack import SPLITS, Pack
from gzcli.data.readers.folder import open_path
from gzcli.data.sets.registry import DataSet, OwnSet, locate
from gzcli.judge.images import Pick
from gzcli.metrics import conformal
from gzcli.metrics.alarms import copies
from gzcli.metrics.alarms.alarm import MAX_FITTED_IMAGES, Alarm, calibrate
from gzcli.metrics.alarms.choice import MIN_IMAGES_TO_CHOOSE, Choice, choose, detection, set_aside
from gzcli.metrics.alarms.fitted import Fitted
from gzcli.metrics.alarms.methods import DEFAULT_METHOD, METHODS, reduced_size
from gzcli.metrics.alarms.stored import stored
from gzcli.metrics.interval import subset
from gzcli.store.jobs import AlarmJob, ScoreJob


@dataclass(frozen=True)
class Good:
    """The good images of an alarm.

    pack: the pack of the set.
    form: the options of packs of the same form.
    splits: splits of the images. `test` is among them only if gz has split it off itself, because it may
      otherwise contain anything. In an inspection set, the test images are judged instead.
    images: the images, without copies.
    calibrating: the pack of further good images. None: the good images calibrate, by cross-validation.
    held_out: the images of `calibrating`, without copies of each other and of images for fitting.
    notes: notes on copies.
    """

    pack: Pack
    form: PackOptions
    splits: tuple[str, ...]
    images: np.ndarray
    calibrating: Pack | None
    held_out: np.ndarray | None
    notes: tuple[str, ...]

    @property
    def split(self) -> str:
        return self.calibrating.meta.title if self.calibrating else "+".join(self.splits)


def open_good(job: AlarmJob, say: Say) -> Good:
    """The good images of a job. Raises UsageError if there are too few for the rate."""
    data = locate(job.ins)
    pack, form = open_home(job, say)
    own_test = isinstance(data, OwnSet) and is_good_test(data, job.verb)
    splits = SPLITS if own_test else SPLITS[:2]
    images = np.concatenate([np.asarray(pack.images(split)) for split in splits if pack.meta.counts[split]])
    images, keys, notes = without_copies(images, pack.meta.title)
    calibrating, held_out, why = None, None, notes
    if job.calibrate:
        calibrating = open_pack(job.calibrate, **form, foreign=True, say=say)
        used = keys if METHODS[job.method or DEFAULT_METHOD].fits else []
        further = np.asarray(calibrating.images("test"))
        held_out, _, why = without_copies(further, calibrating.meta.title, used)
        notes = [*notes, *why]
    good = Good(pack, form, splits, images, calibrating, held_out, tuple(notes))
    check_good_images(good, job, why)
    return good


def without_copies(
    images: np.ndarray, title: str, used: Sequence[bytes] = ()
) -> tuple[np.ndarray, list[bytes], list[str]]:
    """The images of a set without copies of each other and of the images for fitting with these hashes. Also
    their hashes, and a note if any image is left out."""
    keys = copies.hashes(images)
    rows = copies.originals(keys, set(used))
    if len(rows) == len(keys):
        return images, keys, []
    note = copies.in_words(len(keys) - len(rows), title, fitting=bool(used))
    return images[rows], [keys[i] for i in rows], [note]


def open_home(job: ScoreJob, say: Say) -> tuple[Pack, PackOptions]:
    """The in-distribution set at the image size of the method, and the options of packs of the same form."""
    data = locate(job.ins)
    form = PackOptions(size=job.size or reduced_size(facts_of(data)), channels=None, fit="crop", patch=None)
    pack = open_pack(data, **form, say=say)
    channels, height, width = pack.meta.shape
    return pack, PackOptions(size=as_size(height, width), channels=channels, fit="crop", patch=None)


def fit_chosen(method: str, images: np.ndarray) -> tuple[Choice, Fitted]:
    """A method fitted to images, with the settings that detect the most synthetic defects."""
    choice = choose(images[: set_aside(len(images), method)], method)
    return choice, METHODS[method].fit(images, **choice.settings)


def is_good_test(data: DataSet, verb: str) -> bool:
    """Whether the test images of a set are known to be good and may calibrate. This is so for data sets known
    by name, and for test images that gz has split off itself. A `test` folder may contain anything, and an
    inspection judges its images."""
    if verb == "inspect":
        return False
    return not isinstance(data, OwnSet) or not open_path(data.path, data.form).counts.get("test")


def check_good_images(good: Good, job: AlarmJob, why: Sequence[str]) -> None:
    """Raises UsageError if there are too few good images for the false-alarm rate. The message ends with
    `why`; the hint is a command that reaches the rate."""
    needed = conformal.fewest(job.fpr)
    further = good.held_out is not None
    n = len(good.images if good.held_out is None else good.held_out)
    if n >= needed:
        return
    of = "further good images" if further else "good images"
    rate = f"a false-alarm rate of {percent(job.fpr)}"
    least = conformal.lowest_rate(n)
    more = f"give {needed:,} images"
    more += " that are not in `--in`" if further else ", or more good ones with `--calibrate DIR`"
    line = line_of(job, job.method or DEFAULT_METHOD, least / 100)
    message = f"{rate} needs {needed:,} {of}, but there are only {n:,}"
    message = ": ".join([message, *why])
    if least >= 100:
        raise UsageError(message, hint=more)
    raise UsageError(message, hint=f"use `--fpr {least:g}%` or more, as in `{line}`; or {more}")


def line_of(job: AlarmJob, method: str, fpr: float) -> str:
    """The command line of an alarm by a method without training at a rate."""
    words = ["gz", "ood", *([method] if method != DEFAULT_METHOD else []), "--in", job.ins]
    if job.verb != "inspect":
        words += ["--input", job.input or "./today"]
    size = ["--set", f"data.size={job.size}"] if job.size else []
    return shlex.join([*words, "--fpr", f"{100 * fpr:.3g}%", *size])


def line_that_reaches(job: AlarmJob, home: Pack) -> str | None:
    """The command line for an alarm at this rate on the run's set, without the run's model; None if the set
    has too few images."""
    splits = SPLITS if is_good_test(locate(job.ins), job.verb) else SPLITS[:2]
    total = sum(home.meta.counts[split] for split in splits)
    return line_of(job, DEFAULT_METHOD, job.fpr) if total >= conformal.fewest(job.fpr) else None


def alarm_of(good: Good, job: AlarmJob, say: Say) -> Alarm:
    """The alarm of a job, from the cache if it was fitted before."""
    name, held_out = job.method or DEFAULT_METHOD, good.held_out

    def make() -> Alarm:
        return calibrate(good.images, name, held_out=held_out, needed=needed)

    needed = conformal.fewest(job.fpr)
    aside = set_aside(len(good.images), name, needed if held_out is None else 0)
    key = {"images": good.pack.meta.digest, "splits": good.splits, "method": name, "aside": aside}
    return stored(key | {"held_out": good.calibrating and good.calibrating.meta.digest}, make, say)


def without_model(good: Pick, bad: Pick) -> dict[str, float]:
    """The share of the defective images that the method `DEFAULT`, fitted to the set's other training images,
    detects; {} if too few others remain."""
    train = good.pack.images("train")
    index = np.setdiff1d(np.arange(len(train)), good.index if good.split == "train" else [])
    if len(index) < MIN_IMAGES_TO_CHOOSE:
        return {}
    _, fitted = fit_chosen(
        DEFAULT_METHOD, np.asarray(train[index[subset(len(index), MAX_FITTED_IMAGES // 2)]])
    )
    return {DEFAULT_METHOD: detection(fitted.score(good.images()), fitted.score(bad.images()))}


def facts(good: Good, alarm: Alarm, job: AlarmJob) -> dict[str, Any]:
    """The facts about the method and its images, for the result."""
    return facts_in(alarm.choice, alarm.calibrated.models[0], good.pack, alarm.fitted_on, job)


def facts_in(choice: Choice, fitted: Fitted, pack: Pack, fitted_on: int, job: ScoreJob) -> dict[str, Any]:
    return {
        "run": None,
        "name": choice.method,
        "runs": [],
        "in": job.ins,
        "seed": job.seed,
        "seeds": 1,
        "method": choice.method,
        "settings": dict(fitted.settings),
        "choice": {} if choice.detected is None else {choice.method: choice.detected},
        "shape": list(pack.meta.shape),
        "hash": fitted.hash,
        "fitted_on": fitted_on,
    }


def notes(good: Good, alarm: Alarm, fpr: float) -> list[str]:
    """Notes on how the method was chosen and on what its calibration guarantees."""
    calibrated = alarm.calibrated
    lines = [*good.notes, *choice_in_words(alarm.choice, calibrated.models[0])]
    if len(calibrated.models) == 1:
        lines.append(f"calibrated on images not used for fitting: at most {percent(fpr)} are flagged")
    else:
        folds, bound = len(calibrated.models), calibrated.bound(fpr)
        lines.append(
            f"calibrated by {counted(folds, 'fold')} (CV+): about {percent(fpr)} of good images are "
            f"flagged; the bound for any distribution is {percent(bound)}"
        )
    return lines


def choice_in_words(choice: Choice, fitted: Fitted) -> list[str]:
    """How a method was chosen."""
    lines, words = [], in_words(fitted.settings)
    if choice.detected is not None:
        lines.append(f"synthetic defects detected on good images set aside: {100 * choice.detected:.0f} %")
    return [*lines, f"method: `{choice.method}`" + (f" with {words}" if words else "")]


def in_words(parameters: Mapping[str, Any]) -> str:
    """Settings as text for the user, such as `components 300, scales 3`."""

    def shown(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)

    return ", ".join(f"{key} {shown(value)}" for key, value in parameters.items())
