"""Out-of-distribution scores of a trained model: its own `score_<name>`, and those made of a likelihood.

A higher score is more out-of-distribution. It depends on (model, image, seed, index) alone, not on the batch.
A model without a density of pixels may have a `score_nll` of its own, as that of the codes of its tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gzcli.core import ranks
from gzcli.core.errors import DivergedError, MissingError, UsageError, did_you_mean
from gzcli.core.types import Batch, ImageNoise
from gzcli.data.packs.batches import to_uint8
from gzcli.engine.trained import Trained
from gzcli.metrics.baselines import code_length
from gzcli.metrics.likelihood_scores import SCORES, Arrays, Facts, read
from gzcli.models.base import Model
from gzcli.models.catalog import likelihood_scores
from gzcli.models.nn import double, full_fp32
from gzcli.models.options import defaults, grouped


def model_scores(model: Model) -> list[str]:
    """The names of the model's `score_<name>` methods."""
    return sorted(name.removeprefix("score_") for name in dir(type(model)) if name.startswith("score_"))


def cheap_scores(model: Model) -> list[str]:
    """The names of the model's own scores that are not `costly`."""
    return [score for score in model_scores(model) if score not in model.costly]


def choose(
    trained: Trained, asked: Sequence[str] | None, *, every: bool = False, background: bool = False
) -> list[str]:
    """The scores to compute: those asked for, else the recipe's, else every cheap one."""
    model, name = trained.model, trained.name
    own_names = model_scores(model)
    of_pixels = trained.space is None
    made = likelihood_scores(log_prob=hasattr(model, "log_prob") and of_pixels, own=own_names)
    options = list(dict.fromkeys((*own_names, *made)))
    if every:
        return [score for score in options if background or not read([score], "background_nll")]
    wanted = list(asked or trained.part.ood.scores or ())
    if not wanted:
        cheap_likelihood = of_pixels and model.likelihood in ("exact", "bound")
        of_likelihood = [name for name, score in SCORES.items() if score.default and cheap_likelihood]
        wanted = [*of_likelihood, *cheap_scores(model)] or own_names[:1]
    if not wanted:
        raise UsageError(
            f"`{name}` has no score for out-of-distribution images", hint="gz list models --can ood"
        )
    for score in wanted:
        if score in options:
            continue
        if score in SCORES:
            raise UsageError(
                f"`{name}` has no likelihood, which the score `{score}` needs",
                hint=f"it has: {', '.join(own_names)}",
            )
        raise UsageError(
            f"`{name}` has no score `{score}`",
            hint=did_you_mean(score, options) or f"it has: {', '.join(options)}",
        )
    return list(dict.fromkeys(wanted))


class Scorer:
    """Computes scores of batches. `fit` must see in-distribution batches first, all of them on every rank."""

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
            checked_background(trained, background)
        taken = [self._keywords(f"{kind}_{name}") for name in names for kind in ("score", "fit")]
        self.unused = sorted(set(self.options).difference(*taken))

    def model_scores(self) -> list[str]:
        """The model's own scores that are computed: those named, and the cheap ones as statistics."""
        statistics = cheap_scores(self.model) if read(self.names, "statistics") else []
        names = dict.fromkeys((*self.names, *statistics))
        return [name for name in names if hasattr(self.model, f"score_{name}")]

    def fits(self) -> list[str]:
        """The model's own scores that have a fit."""
        return [name for name in self.model_scores() if hasattr(self.model, f"fit_{name}")]

    def is_fitted(self) -> bool:
        """Whether any score has a fit."""
        return bool(self.fits() or [name for name in self.names if name in SCORES and SCORES[name].gather])

    def fit(self, held_out: ranks.Sliceable[Batch], train: Iterable[Batch]) -> None:
        """Fits the scores that have a fit."""
        for name in self.fits():
            batches = SeenBatches(self.trained, train if name in self.model.fitted_on_train else held_out)
            method = f"fit_{name}"
            with self.trained.scoring():
                getattr(self.model, method)(batches, **self._taken(method))
        for name in self.names:
            if (score := SCORES.get(name)) and score.gather:
                self.fitted[name] = score.fit(self._gathered(score.gather, held_out))

    def _gathered(
        self, gather: Callable[[Facts], Arrays], batches: ranks.Sliceable[Batch]
    ) -> dict[str, np.ndarray]:
        return ranks.over(batches, lambda batch: gather(BatchFacts(self, self.trained.seen(batch))))

    def values(self, batch: Batch) -> dict[str, np.ndarray]:
        """float64 [B] of each score, finite or not."""
        batch = self.trained.seen(batch)
        facts, values = BatchFacts(self, batch), {}
        for name in self.names:
            score = SCORES.get(name)
            values[name] = (
                score.compute(facts, self.fitted.get(name)) if score else self.model_score(name, batch)
            )
        return values

    def __call__(self, batch: Batch) -> dict[str, np.ndarray]:
        """float64 [B] of each score. Raises DivergedError that names a score with values that are not
        finite."""
        values = self.values(batch)
        for name, value in values.items():
            if bad := int((~np.isfinite(value)).sum()):
                raise DivergedError(
                    f"the score `{name}` is not finite for {bad} of {len(value)} images",
                    hint="the model may have diverged: look at its `loss.png`",
                )
        return values

    def model_score(self, name: str, batch: Batch) -> np.ndarray:
        """float64 [B]: the model's `score_<name>`."""
        method = f"score_{name}"
        with self.trained.scoring():
            score = getattr(self.model, method)(
                batch.x, noise=fresh_noise(self.seed, batch), **self._taken(method)
            )
        return score.detach().cpu().double().numpy()

    def _keywords(self, method: str) -> set[str]:
        """The names of a method's options; empty where the model has no such method."""
        function = getattr(self.model, method, None)
        return set(defaults(function)) - {"x", "noise", "batches"} if function else set()

    def _taken(self, method: str) -> dict[str, Any]:
        """The given options that a method of the model takes, as its keywords."""
        taken = {key: self.options[key] for key in self._keywords(method) & set(self.options)}
        return grouped(getattr(self.model, method), taken)


class BatchFacts:
    """What likelihood scores read of a batch (`likelihood_scores.Facts`); each fact is computed once."""

    def __init__(self, scorer: Scorer, batch: Batch):
        self.scorer, self.batch = scorer, batch

    @cached_property
    def nll(self) -> np.ndarray:
        return self._nll(self.scorer.model)

    @cached_property
    def background_nll(self) -> np.ndarray:
        return self._nll(checked_background(self.scorer.trained, self.scorer.background).model)

    @cached_property
    def code_length(self) -> np.ndarray:
        return code_length(to_uint8(self.batch.x).cpu().numpy())

    @cached_property
    def statistics(self) -> dict[str, np.ndarray]:
        cheap = [name for name in cheap_scores(self.scorer.model) if name != "nll"]
        own = {name: self.scorer.model_score(name, self.batch) for name in cheap}
        return {"nll": self.nll, "code": self.code_length, **own}

    @cached_property
    def gradient_norm(self) -> np.ndarray:
        model = self.scorer.model
        required = [p.requires_grad for p in model.parameters()]
        model.requires_grad_(True)
        try:
            norms = [self._log_norm(i) for i in range(len(self.batch))]
        finally:
            for p, requires in zip(model.parameters(), required, strict=True):
                p.requires_grad_(requires)
        return torch.stack(norms).cpu().double().numpy()

    def _nll(self, model: Model) -> np.ndarray:
        with torch.no_grad():
            return -log_prob(model, self.batch, self.scorer.seed).cpu().double().numpy()

    def _log_norm(self, i: int) -> Tensor:
        """log ‖∂ log p(x_i) / ∂θ‖, a scalar."""
        scorer, one = self.scorer, self.batch.rows(slice(i, i + 1), self.batch.noise)
        with torch.enable_grad():
            value = log_prob(scorer.model, one, scorer.seed).sum()
            if not value.requires_grad:
                raise UsageError(
                    f"`{scorer.trained.name}` has a likelihood without gradient, `gradnorm` needs one"
                )
            gradients = torch.autograd.grad(value, list(scorer.model.parameters()), allow_unused=True)
        squares = (double(g).square().sum() for g in gradients if g is not None)
        return sum(squares, start=value.new_zeros(())).sqrt().log()


@dataclass(frozen=True)
class SeenBatches:
    """Batches as the model sees them, which a fit may read several times."""

    trained: Trained
    batches: Iterable[Batch]

    def __iter__(self) -> Iterator[Batch]:
        return map(self.trained.seen, self.batches)


def log_prob(model: Model, batch: Batch, seed: int) -> Tensor:
    """The log-likelihood of each image, [B] nats, in fp32; of a model of codes that of the image's codes."""
    noise = fresh_noise(seed, batch)
    with full_fp32(batch.x.device):
        if hasattr(model, "log_prob"):
            return model.log_prob(batch.x, noise=noise)
        return -model.score_nll(batch.x, noise=noise)


def fresh_noise(seed: int, batch: Batch) -> ImageNoise:
    """The noise of a batch's images from its first draw on, so that no score depends on another one."""
    return ImageNoise(seed, batch.index, batch.x.device)


def checked_background(trained: Trained, background: Trained | None) -> Trained:
    """The background model. Raises MissingError without one, UsageError where it is for other images."""
    if background is None:
        run, data = trained.run, trained.part.data.name
        sets = [
            f"{run.in_owner}data.augment=[mutate]",
            *(f"stages.{stage.path.name}={run.owner.id}" for stage in run.owner.stages[:-1]),
        ]
        line = " ".join(f"--set {each}" for each in sets)
        raise MissingError(
            "the score `ratio` needs a background run",
            hint=f"`gz train {trained.name} --data {data} {line} --name background`, "
            "then `--background background`",
        )
    one, other = trained.info, background.info
    if (one.shape, one.levels) != (other.shape, other.levels):
        raise UsageError(
            f"the background run has images of {other.shape} and {other.levels} levels, "
            f"this one of {one.shape} and {one.levels}"
        )
    return background
