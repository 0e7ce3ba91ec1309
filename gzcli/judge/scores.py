"""Out-of-distribution scores of images, by one or several runs and seeds. They are the model's own
`score_<name>`, scores from its likelihood, and the score of its map.

A higher score is more out-of-distribution. It depends only on (model, image, seed, index), not on the batch.
A model without a density of pixels may define `score_nll`, for example as the likelihood of its tokenizer's
codes.

Several runs together give

  waic        mean of −log p + variance of log p over the runs, minus the WAIC of Choi, Jang & Alemi 2018,
              arXiv:1810.01392, eq. 1
  any other   mean over the runs of (score − mean) / deviation, with those of held-out images

Scores of runs are not replaced by ranks among the held-out images: these would be equal for all images that
score higher than every held-out one.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gzcli.core import devices, ranks
from gzcli.core.errors import DivergedError, MissingError, UsageError, did_you_mean
from gzcli.core.hints import Option, advice, gz
from gzcli.core.types import Batch, ImageNoise, Say
from gzcli.core.units import affordable
from gzcli.data.packs.batches import to_uint8
from gzcli.data.packs.open import open_pack
from gzcli.data.packs.pack import Pack, check_unchanged
from gzcli.engine.log import Log
from gzcli.engine.trained import Trained, load_trained
from gzcli.judge.images import Pick, fitting_images, fitting_pick, timed
from gzcli.judge.likelihood import SolverGap, solver_gap
from gzcli.judge.local import RunLocal, few, fit_run_local, with_defects
from gzcli.judge.methods import without_model
from gzcli.metrics import conformal
from gzcli.metrics.alarms.choice import MIN_IMAGES_TO_CHOOSE, detection
from gzcli.metrics.alarms.methods import LOCAL
from gzcli.metrics.alarms.stored import stored
from gzcli.metrics.baselines import code_length
from gzcli.metrics.features import lenet
from gzcli.metrics.likelihood_scores import SCORES, Fact, read, tails_of
from gzcli.models.base import Model, flat_defaults, group_options
from gzcli.models.catalog import scores_made
from gzcli.models.nn import double, full_fp32
from gzcli.models.nn.perceptual import LPIPS
from gzcli.store import files
from gzcli.store.code import DRAWING, code_hash
from gzcli.store.jobs import ScoreJob
from gzcli.store.runs import Run, find

BATCH_SIZE = 128  # images scored together on a usual device
NOISE_DRAWS = 4  # draws of noise over which an image's score is averaged
TRIAL_IMAGES = 16  # held-out images on which scores are timed, and the likelihood by an ODE is checked
REFERENCE = "held-out"  # name of the pick on which the runs of an ensemble are standardised
WAIC = "waic"
TIE_SHARE = 0.06  # difference of detected shares that counts as equal; the first such score is chosen

Table = dict[str, np.ndarray]  # each score, float64 [N]
Picks = Callable[[int | None], dict[str, Pick]]  # at most n images of each set


def model_scores(model: Model) -> list[str]:
    return sorted(name.removeprefix("score_") for name in dir(type(model)) if name.startswith("score_"))


def cheap_scores(model: Model) -> list[str]:
    return [score for score in model_scores(model) if score not in model.costly]


def available(trained: Trained) -> list[str]:
    """Every score that the model has."""
    of_model = model_scores(trained.model)
    has_density = hasattr(trained.model, "log_prob") and trained.has_levels
    of_engine = scores_made(log_prob=has_density, names=of_model, maps=bool(model_maps(trained.model)))
    return list(dict.fromkeys((*of_model, *of_engine)))


def model_maps(model: Model) -> list[str]:
    return sorted(name.removeprefix("map_") for name in dir(type(model)) if name.startswith("map_"))


def map_of(model: Model, scores: Sequence[str], name: str) -> str:
    """The map of the first score that has one, otherwise the first map. Likelihood scores share the map of
    `nll`; `local` has the first map."""
    if not (maps := model_maps(model)):
        hint = gz("list", "models", can="map")
        raise UsageError(f"`{name}` has no anomaly maps", hint=hint)
    preferred = ["nll" if score in SCORES or score == WAIC else score for score in scores]
    return next((score for score in preferred if score in maps), maps[0])


def computable(trained: Trained, *, background: bool) -> list[str]:
    """Every score that can be computed, with or without a background model."""
    lacking: list[Fact] = ["gradient_norm"] if trained.model.likelihood == "ode" else []
    lacking += [] if background else ["background_nll"]
    return [score for score in available(trained) if not any(read([score], fact) for fact in lacking)]


def choose(trained: Trained, names: Sequence[str] | None) -> list[str]:
    """The scores to compute. Named scores must all exist for the model. If none is named, they are the
    recipe's or the cheap ones, and `local` unless its map is expensive."""
    model, options = trained.model, available(trained)
    chosen = list(names or trained.part.ood.scores or ())
    if not chosen:
        cheap = trained.has_levels and model.likelihood in ("exact", "bound")
        of_likelihood = [name for name, score in SCORES.items() if score.default and cheap]
        chosen = [*of_likelihood, *cheap_scores(model)] or model_scores(model)[:1]
    if not names and set(model_maps(model)[:1]).difference(model.costly):
        chosen.append(LOCAL)
    if not chosen:
        message = f"`{trained.name}` has no score for out-of-distribution images"
        raise UsageError(message, hint=gz("list", "models", can="ood"))
    for score in chosen:
        if score not in options and score in SCORES:
            message = f"`{trained.name}` has no likelihood, which the score `{score}` needs"
            raise UsageError(message, hint=f"choose from {', '.join(model_scores(model))}")
        if score not in options:
            hint = did_you_mean(score, options) or f"choose from {', '.join(options)}"
            raise UsageError(f"`{trained.name}` has no score `{score}`", hint=hint)
        if score == "gradnorm" and model.likelihood == "ode":
            raise no_gradient(trained)
    return list(dict.fromkeys(chosen))


def no_gradient(trained: Trained) -> UsageError:
    """The error for a likelihood without a gradient, such as one by an ODE."""
    return UsageError(f"`gradnorm` needs a gradient, which the likelihood of `{trained.name}` does not have")


class Scorer:
    """Computes scores of batches. Call `fit` first, on every rank, with all in-distribution batches."""

    def __init__(
        self,
        trained: Trained,
        names: Sequence[str],
        *,
        background: Trained | None = None,
        options: Mapping[str, Any] | None = None,
        seed: int = 0,
    ):
        self.trained, self.model, self.names, self.seed = trained, trained.model, list(names), seed
        self.background, self.options = background, dict(options or {})
        self.fitted: dict[str, Any] = {}  # what the fit of a likelihood score returned, by its name
        if read(self.names, "background_nll"):
            check_background(trained, background)
        # the model's own scores to compute: the named ones, and the cheap ones as statistics
        self.statistics = cheap_scores(self.model) if read(self.names, "statistics") else []
        every = dict.fromkeys((*self.names, *self.statistics))
        self.of_model = [name for name in every if hasattr(self.model, f"score_{name}")]
        self.fits = [name for name in self.of_model if hasattr(self.model, f"fit_{name}")]
        self.local: RunLocal | None = None
        self.map_name = map_of(self.model, (), trained.name) if LOCAL in self.names else None
        keys = [self._parameters(f"{kind}_{name}") for name in names for kind in ("score", "fit")]
        keys.append(self._parameters(f"map_{self.map_name}"))
        self.unused = sorted(set(self.options).difference(*keys))

    def is_fitted(self) -> bool:
        fitted = [name for name in self.names if name == LOCAL or (name in SCORES and SCORES[name].fit)]
        return bool(self.fits or fitted)

    def fit(self, held_out: ranks.Sliceable[Batch], train: Iterable[Batch]) -> None:
        """held_out: a `Pick` to which the score `local` is fitted."""
        self.take(self.learn(held_out, train))

    def learn(self, held_out: ranks.Sliceable[Batch], train: Iterable[Batch]) -> dict[str, Any]:
        """Fits the scores and returns what `take` needs: the tensors that the model's fits set, statistics of
        held-out images for each likelihood score with a fit, and the local score."""
        attributes: dict[str, Tensor] = {}
        for name in self.fits:
            batches = train if name in self.model.fitted_on_train else held_out
            fit, before = getattr(self.model, f"fit_{name}"), tensors_of(self.model)
            with self.trained.scoring():
                fit(SeenBatches(self.trained, batches), **self._keywords(f"fit_{name}"))
            after = tensors_of(self.model)
            attributes |= {key: value for key, value in after.items() if value is not before.get(key)}
        tables = {}
        for name in self.names:
            if (score := SCORES.get(name)) and score.fit:

                def facts(batch: Batch, name: str = name) -> Table:
                    return self.facts(self.trained.encode(batch), [name])

                tables[name] = ranks.over(held_out, facts)
        local = None
        if self.map_name:
            assert isinstance(held_out, Pick)
            local = fit_run_local(held_out, lambda batch: self.map(self.trained.encode(batch)))
        parts = {"local": local.local, "detected": local.detected} if local else {}
        return {"attributes": attributes, "tables": tables, **parts}

    def take(self, learned: Mapping[str, Any]) -> None:
        """Sets the fitted state that `learn` returned."""
        for key, value in learned["attributes"].items():
            setattr(self.model, key, value)
        for name, table in learned["tables"].items():
            fit = SCORES[name].fit
            assert fit is not None
            self.fitted[name] = fit(table)
        if "local" in learned:
            self.local = RunLocal(learned["local"], learned["detected"])

    def take_stored(self, key: Mapping[str, Any], learn: Callable[[], dict[str, Any]], say: Say) -> None:
        """Takes the fitted state from the cache. If the key is missing there, `learn` computes and stores
        it."""

        def make() -> dict[str, Any]:
            fresh = learn()
            return fresh | {"attributes": {k: v.cpu().numpy() for k, v in fresh["attributes"].items()}}

        learned = stored(key, make, say, "fits")
        device = self.trained.device
        tensors = {name: torch.from_numpy(value).to(device) for name, value in learned["attributes"].items()}
        self.take({**learned, "attributes": tensors})

    def values(self, batch: Batch) -> Table:
        """Each score as float64 [B], finite or not."""
        batch, values = self.trained.encode(batch), {}
        facts = self.facts(batch, self.names)
        for name in self.names:
            score, fit = SCORES.get(name), self.fitted.get(name)
            if name == LOCAL:
                assert self.local is not None
                values[name] = self.local.score(self.map(batch))
            else:
                values[name] = score.compute(facts, fit) if score else self.model_score(name, batch)
        return values

    def __call__(self, batch: Batch) -> Table:
        """Each score as float64 [B]. Raises DivergedError for a value that is not finite."""
        values = self.values(batch)
        for name, value in values.items():
            if bad := int((~np.isfinite(value)).sum()):
                message = f"the score `{name}` is not finite for {bad} of {len(value)} images"
                raise DivergedError(message, hint="look at the run's `loss.png`: the model may have diverged")
        return values

    def facts(self, batch: Batch, names: Sequence[str]) -> Table:
        """The inputs of these likelihood scores for a batch. `statistics` are the NLL, the compressed size
        and the cheap scores of the model."""
        facts, statistics = {}, read(names, "statistics")
        if read(names, "nll"):
            facts["nll"] = self._nll(self.model, batch)
        if self.background and read(names, "background_nll"):
            facts["background_nll"] = self._nll(self.background.model, batch)
        if statistics or read(names, "code_length"):
            facts["code_length"] = code_length(to_uint8(batch.x).cpu().numpy())
        if statistics:
            facts |= {name: self.model_score(name, batch) for name in self.statistics if name != "nll"}
        if read(names, "gradient_norm"):
            facts["gradient_norm"] = self._gradient_norms(batch)
        return facts

    def model_score(self, name: str, batch: Batch) -> np.ndarray:
        method, noise = f"score_{name}", fresh_noise(self.seed, batch)
        with self.trained.scoring():
            score = getattr(self.model, method)(batch.x, noise=noise, **self._keywords(method))
        return score.detach().cpu().double().numpy()

    def map(self, batch: Batch, name: str | None = None) -> np.ndarray:
        """The model's map of this name, or that of `local`, float32 [B, h, w]. Every image has the same
        noise. Maps therefore differ only by their images, and an exported graph contains the noise as
        constants."""
        method = f"map_{name or self.map_name}"
        noise = ImageNoise(self.seed, torch.zeros_like(batch.index), batch.x.device)
        with self.trained.scoring(), torch.no_grad():
            maps = getattr(self.model, method)(batch.x, noise=noise, **self._keywords(method))
        return maps.float().cpu().numpy()

    def _nll(self, model: Model, batch: Batch) -> np.ndarray:
        with torch.no_grad():
            return -log_prob(model, batch, self.seed).cpu().double().numpy()

    def _gradient_norms(self, batch: Batch) -> np.ndarray:
        required = [p.requires_grad for p in self.model.parameters()]
        self.model.requires_grad_(True)
        try:
            rows = (batch.rows(slice(i, i + 1), batch.noise) for i in range(len(batch)))
            return torch.stack([self._log_norm(image) for image in rows]).cpu().double().numpy()
        finally:
            for p, requires in zip(self.model.parameters(), required, strict=True):
                p.requires_grad_(requires)

    def _log_norm(self, image: Batch) -> Tensor:
        with torch.enable_grad():
            value = log_prob(self.model, image, self.seed).sum()
            if not value.requires_grad:
                raise no_gradient(self.trained)
            gradients = torch.autograd.grad(value, list(self.model.parameters()), allow_unused=True)
        squares = (double(g).square().sum() for g in gradients if g is not None)
        return sum(squares, start=value.new_zeros(())).sqrt().log()

    def _parameters(self, method: str) -> set[str]:
        function = getattr(self.model, method, None)
        return set(flat_defaults(function)) - {"x", "noise", "batches"} if function else set()

    def _keywords(self, method: str) -> dict[str, Any]:
        """The options that a method of the model takes, as its keywords."""
        accepted = {key: self.options[key] for key in self._parameters(method) & set(self.options)}
        return group_options(getattr(self.model, method), accepted)


def tensors_of(model: Model) -> dict[str, Tensor]:
    """The model's own attributes that are tensors, and its buffers."""
    values = {**vars(model), **dict(model.named_buffers(recurse=False))}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class SeenBatches:
    """Batches in the form that the model reads. A fit may read them several times."""

    trained: Trained
    batches: Iterable[Batch]

    def __iter__(self) -> Iterator[Batch]:
        return map(self.trained.encode, self.batches)


def log_prob(model: Model, batch: Batch, seed: int) -> Tensor:
    """The log-likelihood of each image, [B] nats, in fp32; for a model of codes, of the image's codes."""
    noise = fresh_noise(seed, batch)
    with full_fp32(batch.x.device):
        if hasattr(model, "log_prob"):
            return model.log_prob(batch.x, noise=noise)
        return -model.score_nll(batch.x, noise=noise)


def fresh_noise(seed: int, batch: Batch) -> ImageNoise:
    """The noise of a batch's images, restarted at its first draw so that no score depends on another
    score."""
    return ImageNoise(seed, batch.index, batch.x.device)


def check_background(trained: Trained, background: Trained | None) -> None:
    """Raises MissingError if there is no background model, UsageError if it models images of another form."""
    if background is None:
        run, data = trained.run, trained.part.data.name
        stages = (f"stages.{stage.path.name}={run.owner.id}" for stage in run.owner.stages[:-1])
        sets = " ".join(f"--set {option}" for option in (f"{run.in_owner}data.augment=[mutate]", *stages))
        train = f"`gz train {trained.name} --data {data} {sets} --name background`"
        hint = advice(f"run {train}, then add {{}}", Option("background", "background"))
        raise MissingError("the score `ratio` needs a background run", hint=hint)
    form, background_form = ((run.info.shape, run.info.levels) for run in (trained, background))
    if form != background_form:
        shapes = (
            f"{background_form[0]} and {background_form[1]} levels, but this run of {form[0]} and {form[1]}"
        )
        raise UsageError(f"the background run has images of {shapes}")


# ---------------------------------------------------------------------------- several runs and seeds


class FittedRun(NamedTuple):
    """A run whose scores are fitted."""

    scorer: Scorer
    trial: Batch  # a batch that is timed
    budget: float  # seconds that are left of its budget


class Scoring:
    """A job's runs and in-distribution set, and the scores that the runs give to images. Each process scores
    a share."""

    def __init__(self, job: ScoreJob, device: torch.device, log: Log):
        self.job, self.device, self.log = job, device, log
        self.trained = self._load(job.run)
        self.home = open_pack(job.ins, **self.trained.form, say=log.info)
        check_unchanged(self.trained.run.owner.path, self.home.meta)
        self.names = scores_of(self.trained, job)
        self.picks: dict[str, Pick] = {}
        self.tables: list[dict[str, Table]] = []  # tables of each seed, by the names of the picks
        self.perceptual: str | None = None  # the distance by which scores compare images
        self.background: str | None = None  # id of the run that `ratio` divides by
        self.gap: SolverGap | None = None
        self.scorers: list[Scorer] = []  # scorers of the first run, one per seed
        self.choice: dict[str, float] = {}  # the share of synthetic defects that each score detects

    @property
    def is_free(self) -> bool:
        """Whether gz chooses the score: an alarm by one run that names none."""
        job = self.job
        return job.verb in ("alarm", "inspect") and not job.scores and not job.others

    def choose(self, held_out: Pick) -> None:
        """Fits all scores. With enough images, it selects the score that detects the most synthetic defects
        on them; otherwise the first one. Residuals of principal components of the training images are
        compared for the record."""
        scorer = self._scorer(self.trained, self.job.seed)
        self._fit(scorer, held_out)
        good = replace(few(held_out), unbounded=True)
        self.names = self.names[-1:] if LOCAL in self.names else self.names[:1]
        if len(good.index) >= MIN_IMAGES_TO_CHOOSE:
            bad, _ = with_defects(good)
            tables = [score_pick(scorer, pick, self.log) for pick in (good, bad)]
            for name in sorted(scorer.names, key=lambda name: name != LOCAL):
                of_good, of_bad = (np.where(np.isnan(table[name]), np.inf, table[name]) for table in tables)
                self.choice[name] = detection(of_good, of_bad, tails=tails_of(name))
            if scorer.local and scorer.local.detected is not None:
                self.choice[LOCAL] = scorer.local.detected
            least = max(self.choice.values()) - TIE_SHARE
            self.names = [next(name for name, detected in self.choice.items() if detected >= least)]
            self.choice |= without_model(good, bad)
        scorer.names = self.names
        self.scorers = [scorer]

    def score(self, picks: Picks, held_out: Pick | None = None) -> None:
        """Scores images by every run, with every seed. `picks(n)` returns at most n images of each set.
        Scores are fitted and standardised on `held_out`."""
        job, home, first, log = self.job, self.home, self.trained, self.log
        models = [first, *map(self._further, job.others)]
        fitted_on = held_out or fitting_pick(home)
        fitted = [self._fitted(trained, fitted_on) for trained in models]
        scorer, trial, _ = fitted[0]
        self.background = scorer.background.run.owner.id if scorer.background else None
        seeds, n = job.seeds or max(draws(one.scorer, one.trial) for one in fitted), job.n
        if n is None and not job.full:
            n = ranks.agree(afford(fitted, picks, seeds, log))
        self.gap = solver_gap(first, trial) if read(scorer.names, "nll") else None
        if self.gap:
            log.info(str(self.gap))
        self.picks = picks(n)
        chosen = dict(self.picks)
        if len(models) > 1:
            chosen = {REFERENCE: fitted_on, **chosen}
        members: list[list[dict[str, Table]]] = [[] for _ in range(seeds)]
        self.scorers = []
        for k, trained in enumerate(models):
            scorer, *_ = fitted[k]
            for i in range(seeds):
                if i:
                    scorer = self._scorer(trained, job.seed + i)
                    self._fit(scorer, fitted_on)
                self.scorers += [scorer] if not k else []
                members[i].append({name: score_pick(scorer, pick, log) for name, pick in chosen.items()})
        self.tables = [combined(of_runs, self.names, REFERENCE) for of_runs in members]

    def _load(self, path: str) -> Trained:
        return load_trained(Run(Path(path)), self.device, self.job.checkpoint, self.job.precision)

    def _further(self, path: str) -> Trained:
        """Loads a further run. Raises UsageError if its images have another form."""
        first, run = self.trained, self._load(path)
        form, run_form = ((each.images.shape, each.images.levels) for each in (first, run))
        if form != run_form:
            detail = f"`{run.run.owner.id}` has images of {run_form[0]} and {run_form[1]} levels"
            message = f"{detail}, but `{first.run.owner.id}` of {form[0]} and {form[1]}"
            raise UsageError(message, hint="choose runs whose images have the same shape and levels")
        return run

    def _fitted(self, trained: Trained, held_out: Pick) -> FittedRun:
        since = time.perf_counter()
        if self.scorers:  # that of `choose`
            scorer = self.scorers[0]
        else:
            scorer = self._scorer(trained, self.job.seed)
            self._fit(scorer, held_out)
        left, some = trained.part.ood.budget - (time.perf_counter() - since), fitting_pick(self.home)
        some = replace(some, index=some.index[:TRIAL_IMAGES])
        return FittedRun(
            scorer, next(iter(some.batches(trained, size=TRIAL_IMAGES, seed=self.job.seed))), left
        )

    def _scorer(self, trained: Trained, seed: int) -> Scorer:
        job, section, background = self.job, trained.part.ood, None
        names = list(dict.fromkeys("nll" if name == WAIC else name for name in self.names))
        reference = job.background or section.background
        if reference and read(names, "background_nll"):
            background = load_trained(find(reference), trained.device)
        options = {**section.options, **job.options}
        scorer = Scorer(trained, choose(trained, names), background=background, options=options, seed=seed)
        if not self.choice and (wrong := sorted(set(job.options) & set(scorer.unused))):
            raise UsageError(f"none of the scores {', '.join(names)} has the option `{wrong[0]}`")
        compares = set(trained.model.perceptual_scores) & set(scorer.of_model)
        if compares and seed == job.seed and not options.get("pixels"):
            distance = perceive(trained, self.home, self.log)
            self.perceptual = self.perceptual or distance
        return scorer

    def _fit(self, scorer: Scorer, held_out: Pick) -> None:
        """Fits the scores on fixed numbers of held-out images or, if a score requires it, of training
        images."""
        size = devices.batch_of(BATCH_SIZE, self.device)
        picks = fitting_images(scorer.trained, held_out, size=size, seed=scorer.seed)
        if scorer.is_fitted():
            on_train = [name in scorer.model.fitted_on_train for name in scorer.fits] or [False]
            most = max(len(picks[i].index) for i in on_train)
            self.log.info(f"fitting the scores on {most:,} images of `{self.home.meta.reference}`")
        key = self._key_of(scorer, held_out) if scorer.is_fitted() else None
        if key is None:
            return scorer.fit(*picks)
        scorer.take_stored(key, lambda: scorer.learn(*picks), self.log.info)

    def _key_of(self, scorer: Scorer, held_out: Pick) -> dict[str, Any] | None:
        """A cache key of everything that fits depend on; None if they are not stored. That applies to outside
        models, which may keep anything, to several processes, and to runs without a weights file."""
        trained, index = scorer.trained, hashlib.sha256(held_out.index.tobytes()).hexdigest()
        runs = [one.run for one in (trained, scorer.background) if one]
        ours = type(trained.model).__module__.startswith("gzcli.models.")
        stats = [run.model_file.stat() for run in runs if run.model_file.exists()]
        if ranks.world() > 1 or not ours or len(stats) < len(runs):
            return None
        return {
            "drawing": [code_hash(*DRAWING), torch.__version__, str(self.device)],
            "runs": [str(run.path) for run in runs],
            "weights": [[one.st_mtime_ns, one.st_size] for one in stats],
            "step": [trained.step, trained.requested_precision],
            "images": [held_out.pack.meta.digest, trained.form, held_out.split, held_out.by_content, index],
            "scores": [scorer.names, scorer.map_name, self.perceptual, scorer.options, scorer.seed],
        }

    def over_seeds(self, pick: str) -> tuple[Table, Table]:
        """The means of a pick's scores over the seeds, and their standard deviations ({} for a single
        seed)."""
        tables = [tables[pick] for tables in self.tables]
        stacked = {name: np.stack([table[name] for table in tables]) for name in tables[0]}
        spread = {name: values.std(0, ddof=1) for name, values in stacked.items() if len(tables) > 1}
        return {name: values.mean(0) for name, values in stacked.items()}, spread

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of `local`, if it is one of the scores; otherwise {}."""
        scorer = self.scorers[0]
        if LOCAL not in self.names or scorer.local is None:
            return {}
        local = scorer.local.local
        return {"map": scorer.map_name, "scales": list(local.scales), "relative": local.relate}

    def facts(self) -> dict[str, Any]:
        job = self.job
        return {
            "run": self.trained.run.owner.id,
            "name": self.trained.title,
            "runs": [Run(Path(path)).id for path in (job.run, *job.others)],
            "in": job.ins,
            "seed": job.seed,
            "seeds": len(self.tables),
            "checkpoint": job.checkpoint,
            "precision": job.precision or "fp32",
            "step": self.trained.step,
            "perceptual": self.perceptual,
            "background": self.background,
            "processes": ranks.world(),
            "choice": self.choice,
            "settings": self.settings,
        }


def scores_of(trained: Trained, job: ScoreJob) -> list[str]:
    """The scores of a job: the requested ones, or every score of the model for `all`. Otherwise they are
    those of `choose`, from which an alarm selects one."""
    requested = job.scores or ()
    if requested == ("all",):
        background = job.background or trained.part.ood.background
        names = computable(trained, background=background is not None)
        return [*names, WAIC] if job.others and "nll" in names else names
    names = choose(trained, [name for name in requested if name != WAIC] or None)
    if WAIC not in requested:
        return names
    if not job.others:
        raise UsageError(
            f"the score `{WAIC}` needs several runs", hint=gz("ood", "RUN", "RUN2", "RUN3", score="waic")
        )
    choose(trained, ["nll"])
    return list(requested)


def perceive(trained: Trained, home: Pack, log: Log) -> str | None:
    """Sets the perceptual distance of a model whose scores compare images. It is LPIPS, or the LeNet's
    distance if the weights of LPIPS are missing. Returns the name of the distance."""
    if not trained.model.perceptual_scores or trained.space is not None or trained.values is not None:
        return None
    try:
        trained.model.perceptual = LPIPS.from_files().to(trained.device).forward
        return "lpips"
    except MissingError:
        net = lenet(home, device=trained.device, say=log.info)
        trained.model.perceptual = net.distance
        return f"lenet {net.hash}"


def draws(scorer: Scorer, trial: Batch) -> int:
    """The number of seeds over which scores are averaged; one if they do not depend on noise."""
    reseeded = copy(scorer)
    reseeded.seed += 1
    scores, other_scores = scorer(trial), reseeded(trial)
    equal = all(np.allclose(scores[name], other_scores[name], rtol=conformal.TIE) for name in scores)
    return ranks.agree(1 if equal else NOISE_DRAWS)


def afford(runs: Sequence[FittedRun], picks: Picks, seeds: int, log: Log) -> int:
    """The number of images of each set that all processes together can score within the budget of every
    run, if all runs take as long as this one."""
    passes, sets, processes = len(runs) * seeds, len(picks(1)), ranks.world()
    costs = [
        (timed(partial(scorer, trial), trial.x.device) / len(trial) / processes, budget)
        for scorer, trial, budget in runs
    ]
    n = min(affordable(seconds, budget, passes * sets) for seconds, budget in costs)
    images = sum(len(pick.index) for pick in picks(n).values())
    if any(seconds * passes * images > 1.5 * budget for seconds, budget in costs):
        expected = sum(seconds for seconds, _ in costs) * seeds * images
        minutes = f"{expected / 60:.0f} minutes for {images:,} images"
        log.warn(f"the scores need about {minutes}; lower `-n` to score fewer images")
    return n


def batches_of(pick: Pick, trained: Trained, seed: int) -> Pick:
    return pick.batches(trained, size=devices.batch_of(BATCH_SIZE, trained.device), seed=seed)


def score_pick(scorer: Scorer, pick: Pick, log: Log) -> Table:
    """The scores of picked images. A score that is not finite raises DivergedError; for an `unbounded` pick
    it becomes NaN, and so do means over seeds and runs."""
    images = batches_of(pick, scorer.trained, scorer.seed)
    count, share = 0, math.ceil(len(images.index) / ranks.world())
    with log.bar(f"score {pick.pack.meta.name}") as progress:

        def work(batch: Batch) -> Table:
            nonlocal count
            try:
                scores = scorer.values(batch) if pick.unbounded else scorer(batch)
            except DivergedError as e:
                raise DivergedError(f"{e.message} of `{pick.pack.meta.reference}`", hint=e.hint) from e
            count += len(batch)
            progress(count, share)
            return {name: np.where(np.isfinite(v), v, np.nan) for name, v in scores.items()}

        return ranks.over(images, work)


def combined(
    members: Sequence[Mapping[str, Table]], names: Sequence[str], reference: str
) -> dict[str, Table]:
    """The scores of every pick by all runs together, without the reference pick. For a single run, its own
    scores."""
    picks = [pick for pick in members[0] if pick != reference]
    if len(members) == 1:
        return {pick: dict(members[0][pick]) for pick in picks}

    def together(pick: str, name: str) -> np.ndarray:
        if name == WAIC:
            nll = np.stack([member[pick]["nll"] for member in members])
            return nll.mean(0) + nll.var(0)
        pairs = ((member[pick][name], member[reference][name]) for member in members)
        # 0 if all held-out scores are equal
        return np.mean([(scores - usual.mean()) / (usual.std() or np.inf) for scores, usual in pairs], 0)

    return {pick: {name: together(pick, name) for name in names} for pick in picks}


def write_csv(path: Path, header: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    """Writes a table, with floats written by `repr`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    files.write_atomic(path, text.getvalue())
