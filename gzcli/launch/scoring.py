"""The forecast of `gz ood`: how many images are scored, and for how long. Nothing is scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gzcli.core.sections import part_of
from gzcli.core.types import Say
from gzcli.core.units import MOST, about, affordable, counted, short
from gzcli.data.packs.open import counts_of
from gzcli.data.readers.inspection import open_inspection
from gzcli.data.sets.registry import DataSet, Form, OwnSet, local, locate
from gzcli.launch import forecast, launcher
from gzcli.store.jobs import AlarmJob, OodJob
from gzcli.store.run_folder import Run

SEEDS, FITTED = 4, 500  # most draws of noise of an alarm, and most images on which scores are fitted
MOST_FITTED = 2000  # most images to which a method is fitted


@dataclass(frozen=True)
class Scoring:
    """A forecast: the number of images and the time in words, and both as JSON."""

    images: str
    time: str
    facts: dict[str, Any]


# ---------------------------------------------------------------------------- the scores of a run


@dataclass(frozen=True)
class Cost:
    """The cost of the scores of a run. Seconds and network calls are None if unknown.

    n: number of images of each set that the user chose; None: all, or as many as the budget allows.
    is_free: whether the budget decides.
    budget: seconds.
    passes: how often an image is scored: by each run, with each draw of noise.
    each, calls: seconds and network calls of an image.
    fit: seconds to fit the scores once.
    """

    n: int | None
    is_free: bool
    budget: float
    passes: int
    each: float | None
    calls: float | None
    fit: float | None

    @classmethod
    def of(
        cls, run: Run, job: OodJob | AlarmJob, names: Sequence[str], fitted: int, maps: int, say: Say
    ) -> Cost:
        """The cost of these scores on this machine, measured on an untrained copy of the run.
        fitted, maps: number of images on which they are fitted, and of maps to which `local` is fitted."""
        plan = launcher.plan(job.launch, every_gpu=False)
        drawer = forecast.drawer_of_run(run, plan, score_options=job.options)
        measure = partial(forecast.measured, say=say)
        one = forecast.scored(drawer, names, measure) if names and drawer else forecast.Scored()
        seeds = job.seeds or (SEEDS if isinstance(job, AlarmJob) else 1)
        n, passes = None if job.full else job.n, seeds * (1 + len(job.others))
        budget = part_of(run.serving.tree()).ood.budget
        counts = counts_of(locate(job.ins))
        fit = one.fitting(fitted, min(MOST, counts["train"] if counts else MOST), maps)
        return cls(n, not (job.n or job.full), budget, passes, one.each, one.calls, fit)

    def limit(self, sets: int) -> int | None:
        """The most images of a set that are scored; None: all, or unknown."""
        if not self.is_free or self.each is None or self.fit is None:
            return self.n
        return affordable(self.each, self.budget - self.fit, self.passes * sets)

    def of_images(
        self,
        sizes: Sequence[int | None],
        n: int | None,
        images: str,
        *,
        choosing: int = 0,
        most: str = "about",
    ) -> Scoring:
        """The forecast of scoring sets of these sizes, at most n images of each, which `images` describes.
        choosing: number of further scores, by which an alarm chooses one."""
        every = forecast.together(sizes)
        scored = None if every is None else self.passes * int(every) + choosing
        facts = {"n": n, "scored": scored, "seconds": None, "calls": self.calls}
        if self.each is None or self.fit is None:
            by_budget = self.is_free and not choosing
            time = f"at most {about(self.budget)}, the recipe's `ood.budget`" if by_budget else "unknown"
        elif scored is None:
            time = f"{short(self.passes * len(sizes) * self.each, 2)} s for an image of each data set"
        else:
            fit = self.passes * self.fit
            facts["seconds"] = seconds = forecast.STARTING_UP + fit + scored * self.each
            calls = f" × {counted(round(self.calls), 'network call')}" if self.calls else ""
            fits = f"; {about(fit)} of it to fit the scores" if fit >= 1 else ""
            time = f"{most} {about(seconds)} for {counted(scored, 'image')}{calls}{fits}"
        return Scoring(images, time, facts)


def of_sets(job: OodJob, cost: Cost) -> Scoring:
    """The forecast of the scores of data sets."""
    counts = counts_of_sets(job)
    n = cost.limit(len(counts))
    whole = n is None or all(size is not None and size <= n for size in counts)
    images = "all" if whole else f"{'up to ' * cost.is_free}{n:,} per data set"
    return cost.of_images([at_most(n, size) for size in counts], n, images)


def of_alarm(job: AlarmJob, cost: Cost, held_out: int | None, choosing: int) -> Scoring:
    """The forecast of an alarm, which scores every image of its input and compares it with held-out ones."""
    n, checked = cost.limit(2), (inspected if job.verb == "inspect" else inputs)(job.input)
    compared = at_most(n, held_out)
    images = f"{in_words(checked)}, compared with {in_words(compared)} held-out images"
    return cost.of_images([compared, checked], n, images, choosing=choosing, most="up to about")


# ---------------------------------------------------------------------------- a method without training


def of_method(
    method: str, home: DataSet, n: int | None, *, outs: Sequence[str] | None, input_: str | None, path: str
) -> Scoring:
    """The forecast of a method that is fitted to good images. It judges the sets `outs`, at most n images of
    each, or the images of `input_`, or the test images of the inspection set at `path`."""
    good, official = counts_of(home) or {}, official_test(home)
    if outs:
        fitted = good.get("train")
        tests = [good, *(counts_of(locate(name), foreign=True) or {} for name in outs)]
        checked = forecast.together([min(one["test"], n or MOST) if one else None for one in tests])
        images = f"{n:,} per data set" if n else "all"
    else:
        fitted = sum(good.values()) - (official or 0) if good else None
        checked = inputs(input_) if input_ else inspected(path)
        images = f"{in_words(checked)}, compared with {in_words(fitted)} good images"
    of_all = forecast.together([fitted and min(fitted, MOST_FITTED if outs else MOST), checked])
    seconds = of_all and forecast.STARTING_UP + forecast.checking(int(of_all), method)
    time = f"about {about(seconds)}" if seconds else "unknown"
    return Scoring(images, time, {"n": n, "seconds": seconds, "calls": None})


# -------------------------------------------------------------------------- numbers of images; None: unknown


def in_words(n: int | None) -> str:
    return "all" if n is None else f"{n:,}"


def at_most(n: int | None, size: int | None) -> int | None:
    """The number of images of a set of this size if at most n are scored."""
    return n if size is None else min(size, n or size)


def official_test(data: DataSet) -> int | None:
    """The number of images of the user's own folder `test`, which may show anything."""
    from gzcli.data.readers.folder import open_path

    if not isinstance(data, OwnSet) or not data.path.exists():
        return None
    return open_path(data.path, data.form).counts.get("test")


def inspected(path: str) -> int | None:
    """The number of test images of an inspection set: defective ones, and good ones."""
    layout, good = open_inspection(Path(path)), official_test(OwnSet(Path(path)))
    return len(layout.kinds) + (good or 0) if layout else None


def inputs(path: str) -> int | None:
    """The number of images to check one by one."""
    form = Form(skip_bad=True, layout="flat")
    counts = counts_of(OwnSet(local(path), form=form), foreign=True)
    return counts["test"] if counts else None


def fitted_for_sets(job: OodJob) -> int:
    """The number of images on which scores of data sets are fitted."""
    counts = counts_of(locate(job.ins))
    return min(FITTED, counts["val"] or counts["train"]) if counts else FITTED


def counts_of_sets(job: OodJob) -> list[int | None]:
    """The test images of each set that is scored."""
    if job.imglists:
        return [None] * (1 + len(job.outs))
    sets = [counts_of(locate(job.ins)), *(counts_of(locate(name), foreign=True) for name in job.outs)]
    return [counts["test"] if counts else None for counts in sets]


def held_out(job: AlarmJob, needed: int) -> tuple[int | None, int | None, int]:
    """The held-out images of an alarm that needs so many, those that are left to compare with, and the number
    of images on which scores are fitted."""
    home = locate(job.ins)
    counts = counts_of(home)
    total = counts["val"] + (0 if official_test(home) else counts["test"]) if counts else None
    fitted = FITTED if total is None else min(FITTED, total // 4)
    left = total and total - fitted
    if counts and total and total - fitted < needed <= total:  # then scores are fitted on training images
        left, fitted = total, min(FITTED, counts["train"])
    if job.calibrate:
        more = counts_of(locate(job.calibrate), foreign=True)
        fitted, total = max(fitted, min(FITTED, total or 0)), more["test"] if more else None
        left = total
    return total, left, fitted
