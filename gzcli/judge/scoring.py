"""Scores of chosen images by one run or several, each with one seed or several: what the comparison of sets
and the alarm for single pictures have in common.

Several runs together give

  waic        mean of −log p + variance of log p over the runs, minus the WAIC of Choi, Jang & Alemi 2018,
              arXiv:1810.01392, eq. 1
  any other   mean over the runs of (score − mean) / deviation, both of held-out images

Runs are made comparable by means and deviations: their ranks among held-out images would be equal for all
images that are stranger than every held-out one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gzcli.core import devices, ranks
from gzcli.core.errors import DivergedError, MissingError, UsageError
from gzcli.core.jobs import AlarmJob, OodJob
from gzcli.core.types import Batch
from gzcli.data.packs.pack import Pack
from gzcli.engine.log import Log
from gzcli.engine.trained import Trained, load_trained
from gzcli.judge.images import FIT, Images, affordable, fitting_images, held_out_split, timed
from gzcli.judge.likelihood import SolverGap, solver_gap
from gzcli.judge.scores import Scorer, choose
from gzcli.metrics import conformal
from gzcli.metrics.features import lenet
from gzcli.metrics.interval import subset
from gzcli.metrics.likelihood_scores import read
from gzcli.models.nn.perceptual import LPIPS
from gzcli.store.runs import Run, find

BATCH_SIZE = 128  # images that are scored together, of the usual device
DRAWS = 4  # of the noise, whose mean is the score of a picture
TRIAL = 16  # held-out images on which the scores are timed
REFERENCE = "held-out"  # the pick of the images by which the runs of an ensemble are made comparable
WAIC = "waic"

Table = dict[str, np.ndarray]  # float64 [N] of each score


@dataclass(frozen=True)
class Pick:
    """Images that are scored."""

    pack: Pack
    split: str
    index: np.ndarray  # positions in the split, [N]
    by_content: bool = False  # whether an image's noise goes by its pixels, not by its position
    unbounded: bool = False

    def images(self, trained: Trained, seed: int) -> Images:
        """The images in batches, as a model takes them."""
        size = devices.batch_of(BATCH_SIZE, trained.device)
        return Images.of(
            trained, self.pack, self.split, self.index, size=size, seed=seed, by_content=self.by_content
        )


@dataclass
class Scored:
    """What the runs and seeds have found."""

    names: list[str]
    seeds: list[dict[str, Table]] = field(default_factory=list)
    perceptual: str | None = None
    background: str | None = None  # id of the run that `ratio` divides by
    gap: SolverGap | None = None

    def mean(self, pick: str) -> Table:
        """The scores of a pick, their mean over the seeds."""
        return mean_over_seeds([tables[pick] for tables in self.seeds])[0]

    def spread(self, pick: str) -> Table:
        """The deviations of a pick's scores between the seeds; {} of one seed."""
        return mean_over_seeds([tables[pick] for tables in self.seeds])[1]

    def facts(self, trained: Trained, job: OodJob | AlarmJob) -> dict[str, Any]:
        """What both kinds of results say of their making, for JSON."""
        return {
            "run": trained.run.owner.id,
            "runs": [Run(Path(path)).id for path in (job.run, *job.others)],
            "in": job.ins,
            "seed": job.seed,
            "seeds": len(self.seeds),
            "checkpoint": job.checkpoint,
            "precision": job.precision or "fp32",
            "step": trained.step,
            "perceptual": self.perceptual,
            "background": self.background,
            "processes": ranks.world(),
        }


def score_all(
    first: Trained,
    job: OodJob | AlarmJob,
    home: Pack,
    picks: Callable[[int | None], Mapping[str, Pick]],
    log: Log,
    *,
    load: Callable[[str], Trained],
    sets: int,
    held_out: np.ndarray | None = None,
) -> Scored:
    """The scores of picked images by every run of a job, with every seed; each process scores its share."""
    models = [first, *(same_images(first, load(path)) for path in job.others)]
    names = scores_of(first, job)
    of_each = list(dict.fromkeys("nll" if name == WAIC else name for name in names))  # what a run computes
    scored, n = Scored(names), job.n

    def scorer_of(trained: Trained, seed: int) -> Scorer:
        scorer = make_scorer(trained, of_each, job, seed)
        compares = set(trained.model.perceptual_scores) & set(scorer.model_scores())
        if compares and seed == job.seed and not scorer.options.get("pixels"):
            distance = perceive(trained, home, log)
            scored.perceptual = scored.perceptual or distance
        return scorer

    scorer = scorer_of(first, job.seed)
    scored.background = scorer.background.run.owner.id if scorer.background else None
    since = time.perf_counter()
    fit(scorer, home, log, held_out)
    left = first.part.ood.budget - (time.perf_counter() - since)
    trial = trial_batch(first, home, job.seed)
    seeds = job.seeds or draws(scorer, trial)
    if n is None and not job.full:
        n = ranks.agree(afford(scorer, trial, left, sets * len(models) * seeds, log))
    scored.gap = solver_gap(first, trial) if read(scorer.names, "nll") else None
    if scored.gap:
        log.info(str(scored.gap))
    shown = picks(n)
    if len(models) > 1:
        index = held_out_index(home) if held_out is None else held_out  # those that scores are fitted on
        shown = {REFERENCE: Pick(home, held_out_split(home), index), **shown}
    tables: list[list[dict[str, Table]]] = [[] for _ in range(seeds)]
    for k, trained in enumerate(models):
        for i in range(seeds):
            if k or i:
                scorer = scorer_of(trained, job.seed + i)
                fit(scorer, home, log, held_out)
            tables[i].append({name: score_pick(scorer, pick, log) for name, pick in shown.items()})
    scored.seeds = [combined(members, names, REFERENCE) for members in tables]
    return scored


def scores_of(trained: Trained, job: OodJob | AlarmJob) -> list[str]:
    """The names of the scores of a job: those asked for, `all` that the model has, else the recipe's."""
    if job.scores == ("all",):
        background = job.background or trained.part.ood.background
        names = choose(trained, None, every=True, background=background is not None)
        return [*names, WAIC] if job.others and "nll" in names else names
    names = choose(trained, [name for name in job.scores or () if name != WAIC] or None)
    if WAIC not in (job.scores or ()):
        return names
    if not job.others:
        raise UsageError(f"`{WAIC}` is a score of several runs", hint="gz ood RUN RUN2 RUN3 --score waic")
    choose(trained, ["nll"])
    return list(job.scores or ())


def same_images(first: Trained, other: Trained) -> Trained:
    """The other model. Raises UsageError where it is for other images than the first one."""
    one, two = first.images, other.images
    if (one.shape, one.levels) != (two.shape, two.levels):
        raise UsageError(
            f"`{other.run.owner.id}` has images of {two.shape} and {two.levels} levels, "
            f"`{first.run.owner.id}` of {one.shape} and {one.levels}",
            hint="an ensemble is of runs of the same images",
        )
    return other


def make_scorer(trained: Trained, names: Sequence[str], job: OodJob | AlarmJob, seed: int) -> Scorer:
    """The scorer of some scores. Raises UsageError for an option of the job that no score takes."""
    section = trained.part.ood
    reference = job.background or section.background
    background = None
    if reference and read(names, "background_nll"):
        background = load_trained(find(reference), trained.device)
    options = {**section.options, **job.options}
    scorer = Scorer(trained, choose(trained, names), background=background, options=options, seed=seed)
    if wrong := sorted(set(job.options) & set(scorer.unused)):
        raise UsageError(f"none of the scores {', '.join(names)} takes `{wrong[0]}`")
    return scorer


def perceive(trained: Trained, home: Pack, log: Log) -> str | None:
    """Gives a model whose scores compare images a perceptual distance, and returns its name, else None.

    It is LPIPS where its weights are at hand, else the distance between features of the set's LeNet.
    """
    if not trained.model.perceptual_scores or trained.space is not None:
        return None
    try:
        trained.model.perceptual = LPIPS.from_files().to(trained.device).forward
        return "lpips"
    except MissingError:
        net = lenet(home, device=trained.device, say=log.info)
        trained.model.perceptual = net.distance
        return f"lenet {net.hash}"


def fit(scorer: Scorer, home: Pack, log: Log, held_out: np.ndarray | None = None) -> None:
    """Fits the scores on fixed numbers of held-out images and, where a score says so, of training images."""
    trained = scorer.trained
    size = devices.batch_of(BATCH_SIZE, trained.device)
    held_out_images, train = fitting_images(trained, home, size=size, seed=scorer.seed, held_out=held_out)
    if scorer.is_fitted():
        on_train = set(trained.model.fitted_on_train)
        kinds = [train if name in on_train else held_out_images for name in scorer.fits()] or [
            held_out_images
        ]
        many = max(len(images.index) for images in kinds)
        log.info(f"fitting the scores on {many:,} images of `{home.meta.name}`")
    scorer.fit(held_out_images, train)


def held_out_index(home: Pack) -> np.ndarray:
    """Positions of the held-out images that scores are fitted on."""
    return subset(home.meta.counts[held_out_split(home)], FIT)


def trial_batch(trained: Trained, home: Pack, seed: int) -> Batch:
    """The first held-out images, on which scores are timed and the likelihood by an ODE is checked."""
    index = held_out_index(home)[:TRIAL]
    return next(iter(Images.of(trained, home, held_out_split(home), index, size=TRIAL, seed=seed)))


def draws(scorer: Scorer, trial: Batch) -> int:
    """Over how many seeds the scores of a picture are averaged: one where they do not depend on noise."""
    again = copy(scorer)
    again.seed += 1
    one, two = scorer(trial), again(trial)
    same = all(np.allclose(one[name], two[name], rtol=conformal.TIE) for name in one)
    return ranks.agree(1 if same else DRAWS)


def afford(scorer: Scorer, trial: Batch, budget: float, sets: int, log: Log) -> int:
    """How many images of each set can be scored within a budget, by all processes together."""
    seconds = timed(lambda: scorer(trial), trial.x.device) / len(trial) / ranks.world()
    n = affordable(seconds, budget, sets)
    if (expected := seconds * sets * n) > 1.5 * budget:
        log.warn(
            f"the scores need about {expected / 60:.0f} minutes even for {n} images a set; `-n` takes fewer"
        )
    return n


def score_pick(scorer: Scorer, pick: Pick, log: Log) -> Table:
    """The scores of picked images. Where they may be unbounded, one that is not finite is NaN, which every
    mean over seeds and runs keeps; else it raises DivergedError."""
    images = pick.images(scorer.trained, scorer.seed)
    done, share = 0, math.ceil(len(images.index) / ranks.world())
    with log.bar(f"score {pick.pack.meta.name}") as progress:

        def work(batch: Batch) -> Table:
            nonlocal done
            try:
                scores = scorer.values(batch) if pick.unbounded else scorer(batch)
            except DivergedError as e:
                raise DivergedError(f"{e.message} of `{pick.pack.meta.name}`", hint=e.hint) from e
            done += len(batch)
            progress(done, share)
            return {name: np.where(np.isfinite(v), v, np.nan) for name, v in scores.items()}

        return ranks.over(images, work)


def combined(
    members: Sequence[Mapping[str, Table]], names: Sequence[str], reference: str
) -> dict[str, Table]:
    """The scores of every pick by all runs together, without the reference; of a single run its own."""
    picks = [pick for pick in members[0] if pick != reference]
    if len(members) == 1:
        return {pick: dict(members[0][pick]) for pick in picks}
    return {pick: {name: _one(members, pick, name, reference) for name in names} for pick in picks}


def mean_over_seeds(tables: Sequence[Table]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The mean of each score over the seeds and its deviation, [N] each; no deviations of one seed."""
    stacked = {name: np.stack([table[name] for table in tables]) for name in tables[0]}
    means = {name: values.mean(0) for name, values in stacked.items()}
    several = stacked if len(tables) > 1 else {}
    return means, {name: values.std(0, ddof=1) for name, values in several.items()}


def _one(members: Sequence[Mapping[str, Table]], pick: str, name: str, reference: str) -> np.ndarray:
    if name == WAIC:
        nll = np.stack([member[pick]["nll"] for member in members])
        return nll.mean(0) + nll.var(0)
    return np.mean([_standard(member[pick][name], member[reference][name]) for member in members], 0)


def _standard(scores: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Scores in deviations from the mean of held-out ones; 0 where these are all alike."""
    return (scores - held_out.mean()) / (held_out.std() or np.inf)
