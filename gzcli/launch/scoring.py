"""The forecast of `gz ood`: how many images are scored, and for how long. Nothing is scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gzcli.core.sections import part_of
from gzcli.core.types import Say
from gzcli.core.units import MOST, Size, about, affordable, as_size, counted, short
from gzcli.data.packs.open import counts_of, crops_of, facts_of
from gzcli.data.readers.layouts import DEFECTS
from gzcli.data.sets.registry import DataSet, Form, OwnSet, locate
from gzcli.launch import forecast, launcher
from gzcli.store.jobs import AlarmJob, OodJob
from gzcli.store.run_folder import Run

SEEDS, FITTED = 4, 500  # most draws of noise of an alarm, and most images on which scores are fitted
MOST_FITTED = 2000  # most images to which a method is fitted


@dataclass(frozen=True)
class Scoring:
    """A forecast: the number of images and the time in words, both as JSON, and notes on the images."""

    images: str
    time: str
    facts: dict[str, Any]
    notes: Sequence[str] = ()


# ---------------------------------------------------------------------------- the scores of a run


@dataclass(frozen=True)
class Cost:
    """The cost of the scores of runs. Seconds and network calls are None if unknown.

    n: number of images of each set that the user chose; None: all, or as many as the budget allows.
    is_free: whether the budget decides.
    budget: seconds; the smallest of the runs.
    passes: how often an image is scored: by each run, with each draw of noise.
    each, calls: seconds and network calls of an image; the mean over the runs.
    fit: seconds to fit the scores once; the mean over the runs.
    of_runs: for each run, seconds of an image, seconds to fit, and seconds of its budget.
    judges: seconds to train the judge networks by which the scores compare images.
    """

    n: int | None
    is_free: bool
    budget: float
    passes: int
    each: float | None
    calls: float | None
    fit: float | None
    of_runs: Sequence[tuple[float | None, float | None, float]]
    judges: float

    @classmethod
    def of(
        cls,
        run: Run,
        job: OodJob | AlarmJob,
        names: Sequence[str],
        fitted: int,
        maps: int,
        judges: float,
        say: Say,
    ) -> Cost:
        """The cost of these scores on this machine, measured on untrained copies of the runs.
        fitted, maps: number of images on which they are fitted, and of maps to which `local` is fitted."""
        plan = launcher.plan(job.launch, every_gpu=False)
        names = list(dict.fromkeys("nll" if name == "waic" else name for name in names))  # its statistic
        runs, measure = [run, *(Run(Path(path)) for path in job.others)], partial(forecast.measured, say=say)
        drawers = [forecast.drawer_of_run(one, plan, score_options=job.options) for one in runs]
        costs = [
            forecast.scored(drawer, names, measure) if names and drawer else forecast.Scored()
            for drawer in drawers
        ]
        seeds = job.seeds or (SEEDS if isinstance(job, AlarmJob) else 1)
        n, budgets = None if job.full else job.n, [part_of(one.serving.tree()).ood.budget for one in runs]
        counts = counts_of(locate(job.ins))
        train = min(MOST, counts["train"] if counts else MOST)
        fits = [cost.fitting(fitted, train, maps) for cost in costs]
        each, calls, fit = map(mean_of, ([c.each for c in costs], [c.calls for c in costs], fits))
        of_runs = list(zip((cost.each for cost in costs), fits, budgets, strict=True))
        is_free = not (job.n or job.full)
        return cls(n, is_free, min(budgets), seeds * len(runs), each, calls, fit, of_runs, judges)

    def limit(self, sets: int) -> int | None:
        """The most images of a set that are scored, so few that they suit every run; None: all, or
        unknown."""
        timed = [
            (each, fit, budget) for each, fit, budget in self.of_runs if each is not None and fit is not None
        ]
        if not self.is_free or len(timed) < len(self.of_runs):
            return self.n
        return min(affordable(each, budget - fit, self.passes * sets) for each, fit, budget in timed)

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
            facts["seconds"] = seconds = forecast.STARTING_UP + fit + self.judges + scored * self.each
            calls = f" × {counted(round(self.calls), 'network call')}" if self.calls else ""
            parts = ((fit, "to fit the scores"), (self.judges, forecast.JUDGES_TRAINED))
            words = ", ".join(f"{about(cost)} of it {what}" for cost, what in parts if cost >= 1)
            time = f"{most} {about(seconds)} for {counted(scored, 'image')}{calls}{words and f'; {words}'}"
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
    n, checked = cost.limit(2), checked_images(job)
    compared = at_most(n, held_out)
    images = f"{in_words(checked)}, compared with {in_words(compared)} held-out images"
    return cost.of_images([compared, checked], n, images, choosing=choosing, most="up to about")


# ---------------------------------------------------------------------------- a method without training


def of_method(job: OodJob | AlarmJob, size: Size | None) -> Scoring:
    """The forecast of a method that is fitted to good images, all of them resized to a size if it is not
    None. Raises UsageError for images that need one."""
    home, good = locate(job.ins), good_images(job)
    if isinstance(job, OodJob):
        sets = [locate(name) for name in job.outs]
        fitted = min(good["train"], MOST_FITTED) if good else None
        tests = [good, *(counts_of(one, foreign=True) for one in sets)]
        n = None if job.full else job.n or MOST
        checked = forecast.together([at_most(n, one["test"]) if one else None for one in tests])
        images = f"{job.n:,} per data set" if job.n else "all"
    else:
        sets, checked = [judged(job)] if job.input else [], checked_images(job)
        total = sum(good.values()) if good else None
        fitted = total and min(total, MOST)
        images = f"{in_words(checked)}, compared with {in_words(total)} good images"
    of_all = forecast.together([fitted, checked])
    seconds = of_all and forecast.STARTING_UP + forecast.checking(int(of_all), job.method or "")
    time = f"about {about(seconds)}" if seconds else "unknown"
    notes = crops(home, sets, size)
    return Scoring(images, time, {"n": job.n, "seconds": seconds, "calls": None}, notes)


def crops(home: DataSet, sets: Sequence[DataSet], size: Size | None) -> list[str]:
    """The notes on the images of each set that are cropped to the size of the good ones."""
    facts, notes = facts_of(home), [(home, note) for note in crops_of(home, size)]
    if facts:
        size = size or as_size(facts.height, facts.width)
        notes += [(one, note) for one in sets for note in crops_of(one, size, foreign=True)]
    return [f"`{one.shown}`: {note}" for one, note in notes]


# -------------------------------------------------------------------------- numbers of images; None: unknown


def mean_of(values: Sequence[float | None]) -> float | None:
    total = forecast.together(values)
    return None if total is None else total / len(values)


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


def good_images(job: OodJob | AlarmJob) -> dict[str, int] | None:
    """The good images of each split to which a method is fitted, or against which sets are compared."""
    home = locate(job.ins)
    counts = counts_of(home)
    if counts and isinstance(job, AlarmJob):
        return counts | ({"test": 0} if job.verb == "inspect" or official_test(home) else {})
    return counts


def judged(job: AlarmJob) -> OwnSet:
    """The images that an alarm checks one by one, or those of an inspection set that have defects."""
    layout = DEFECTS if job.verb == "inspect" else "flat"
    return OwnSet(Path(job.input), form=Form(skip_bad=True, layout=layout))


def checked_images(job: AlarmJob) -> int | None:
    """The number of images that an alarm checks; of an inspection set also the good test images."""
    if not job.input:
        return None
    counts = counts_of(judged(job), foreign=True)
    good = official_test(OwnSet(Path(job.input))) if job.verb == "inspect" else 0
    return counts["test"] + (good or 0) if counts else None


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
