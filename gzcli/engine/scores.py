"""Out-of-distribution scores of a trained model: its own `score_<name>`, and those written once over
`log_prob`.

  nll         −log p(x), nats
  typicality  |nll − mean nll of validation images|                        Nalisnick et al. 2019,
  arXiv:1906.02994
  complexity  nll in bits − length of the image's best lossless code       Serrà et al. 2020,
  arXiv:1909.11480, eq. 3
  ratio       nll − nll under a background model, trained on mutated images   Ren et al. 2019,
  arXiv:1906.02845, eq. 4
  gradnorm    log ‖∂ log p(x) / ∂θ‖, all parameters, one image at a time   after Kwon et al. 2020,
  arXiv:2007.09507
  ensemble    −Σ log density of each statistic of the image (nll, code length, the model's own cheap scores)
  among
              validation images, by kernel density estimates               Morningstar et al. 2021,
              arXiv:2006.09273
Higher is more out-of-distribution. A score depends on (model, image, seed, index) alone, not on the batch.
The nll of a model without a density of pixels is its own `score_nll`, as that of the codes of its tokenizer.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gzcli import ranks
from gzcli.data.batches import to_uint8
from gzcli.engine.trained import Trained
from gzcli.errors import DivergedError, MissingError, UsageError, did_you_mean
from gzcli.metrics.baselines import code_length
from gzcli.models.catalog import LIKELIHOOD_SCORES, likelihood_scores
from gzcli.models.nn import double
from gzcli.types import Batch, ImageNoise

OVER_NLL = ("nll", "typicality", "complexity", "ratio", "ensemble")
BANKS = (
    "knn",
)  # their fit keeps training images to compare with; other fits are statistics of held-out images
DEAR = ("regret", "inversion")  # an optimisation an image: only when named


def own_scores(model: Any) -> list[str]:
    """The names of the model's `score_<name>` methods."""
    return sorted(name.removeprefix("score_") for name in dir(type(model)) if name.startswith("score_"))


def cheap_scores(model: Any) -> list[str]:
    """Those of them that cost no optimisation an image."""
    return [score for score in own_scores(model) if score not in DEAR]


def choose(trained: Trained, asked: Sequence[str] | None) -> list[str]:
    """The scores to compute: those asked for, else the recipe's, else every cheap one.

    Raises UsageError for a score that the model does not have.
    """
    model, name = trained.model, trained.name
    own = own_scores(model)
    of_pixels = trained.space is None
    made = likelihood_scores(log_prob=hasattr(model, "log_prob") and of_pixels, own=own)
    options = list(dict.fromkeys((*own, *made)))
    wanted = list(asked or trained.part.ood.scores or ())
    if not wanted:
        cheap = (
            ("nll", "typicality", "complexity")
            if of_pixels and model.likelihood in ("exact", "bound")
            else ()
        )
        wanted = [*cheap, *cheap_scores(model)] or own[:1]
    if not wanted:
        raise UsageError(
            f"`{name}` has no score for out-of-distribution images", hint="gz list models --can ood"
        )
    for score in wanted:
        if score in options:
            continue
        if score in LIKELIHOOD_SCORES:
            raise UsageError(
                f"`{name}` has no likelihood, which the score `{score}` needs",
                hint=f"it has: {', '.join(own)}",
            )
        raise UsageError(
            f"`{name}` has no score `{score}`",
            hint=did_you_mean(score, options) or f"it has: {', '.join(options)}",
        )
    return list(dict.fromkeys(wanted))


class Scorer:
    """Computes the scores `names` of batches; `fit` must see in-distribution batches first, all on every
    rank.

    `options` are keywords of `score_<name>` and `fit_<name>`, shared by all scores that take them.
    Raises MissingError where `ratio` has no background model, UsageError where that one is for other images.
    """

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
        self.mean_nll = math.nan
        self.densities: dict[str, Any] = {}
        if "ratio" in names:
            self._check_background()
        unused = set(self.options) - {
            key for name in names for key in self._keywords("score", name) | self._keywords("fit", name)
        }
        self.unused = sorted(unused)

    def fits(self) -> list[str]:
        """The scores of this model that have a fit, those among the statistics of `ensemble` too."""
        statistics = cheap_scores(self.model) if "ensemble" in self.names else []
        names = dict.fromkeys((*self.names, *statistics))
        return [name for name in names if hasattr(self.model, f"fit_{name}")]

    def fit(self, held_out: Sequence[Batch], train: Sequence[Batch]) -> None:
        """In-distribution statistics, of held-out images; the bank of `knn` is of training images."""
        for name in self.fits():
            batches = _Seen(self.trained, train if name in BANKS else held_out)
            getattr(self.model, f"fit_{name}")(batches, **self._take("fit", name))
        if "typicality" in self.names:
            self.mean_nll = float(ranks.over(held_out, self._of_nll)["nll"].mean())
        if "ensemble" in self.names:
            self.densities = densities(ranks.over(held_out, self._of_ensemble))

    def _of_nll(self, batch: Batch) -> dict[str, np.ndarray]:
        return {"nll": self._nll(self.model, self.trained.seen(batch))}

    def _of_ensemble(self, batch: Batch) -> dict[str, np.ndarray]:
        batch = self.trained.seen(batch)
        return self._statistics(batch, self._nll(self.model, batch))

    def __call__(self, batch: Batch) -> dict[str, np.ndarray]:
        """float64 [B] of each score. Raises DivergedError that names a score with values that are not
        finite."""
        batch = self.trained.seen(batch)
        nll = self._nll(self.model, batch) if set(self.names) & set(OVER_NLL) else None
        values = {}
        for name in self.names:
            values[name] = value = self._one(name, batch, nll)
            if bad := int((~np.isfinite(value)).sum()):
                raise DivergedError(
                    f"the score `{name}` is not finite for {bad} of {len(value)} images",
                    hint="the model may have diverged: look at its `loss.png`",
                )
        return values

    def _one(self, name: str, batch: Batch, nll: np.ndarray | None) -> np.ndarray:
        if name == "nll":
            return nll
        if name == "typicality":
            return np.abs(nll - self.mean_nll)
        if name == "complexity":
            return nll / math.log(2) - _code_length(batch)
        if name == "ratio":
            return nll - self._nll(self.background.model, batch)
        if name == "gradnorm":
            return self._gradnorm(batch)
        if name == "ensemble":
            found = self._statistics(batch, nll)
            return -sum(density.logpdf(found[statistic]) for statistic, density in self.densities.items())
        return self._own(name, batch)

    def _own(self, name: str, batch: Batch) -> np.ndarray:
        score = getattr(self.model, f"score_{name}")(
            batch.x, noise=self._noise(batch.index), **self._take("score", name)
        )
        return score.detach().cpu().double().numpy()

    def _statistics(self, batch: Batch, nll: np.ndarray) -> dict[str, np.ndarray]:
        """What `ensemble` knows of each image."""
        own = {name: self._own(name, batch) for name in cheap_scores(self.model) if name != "nll"}
        return {"nll": nll, "code": _code_length(batch), **own}

    def _nll(self, model: Any, batch: Batch) -> np.ndarray:
        with torch.no_grad():
            return -_log_prob(model, batch.x, self._noise(batch.index)).cpu().double().numpy()

    def _gradnorm(self, batch: Batch) -> np.ndarray:
        parameters = list(self.model.parameters())
        frozen = [p.requires_grad for p in parameters]
        self.model.requires_grad_(True)
        try:
            norms = [
                self._norm(batch.x[i : i + 1], batch.index[i : i + 1], parameters) for i in range(len(batch))
            ]
        finally:
            for p, requires in zip(parameters, frozen, strict=True):
                p.requires_grad_(requires)
        return torch.stack(norms).cpu().double().numpy()

    def _norm(self, x: Tensor, index: Tensor, parameters: list[Tensor]) -> Tensor:
        with torch.enable_grad():
            value = _log_prob(self.model, x, self._noise(index)).sum()
            if not value.requires_grad:
                raise UsageError(
                    f"`{self.trained.name}` has a likelihood without gradient, `gradnorm` needs one"
                )
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        return sum(double(g).square().sum() for g in gradients if g is not None).sqrt().log()

    def _noise(self, index: Tensor) -> ImageNoise:
        """Fresh for each score, so that a score does not depend on which others are computed."""
        return ImageNoise(self.seed, index.tolist(), self.trained.device)

    def _keywords(self, kind: str, name: str) -> set[str]:
        method = getattr(self.model, f"{kind}_{name}", None)
        return set(inspect.signature(method).parameters) - {"x", "noise", "batches"} if method else set()

    def _take(self, kind: str, name: str) -> dict[str, Any]:
        return {key: self.options[key] for key in self._keywords(kind, name) & set(self.options)}

    def _check_background(self) -> None:
        run, data = self.trained.run, self.trained.part.data.name
        if self.background is None:
            sets = [
                f"{run.in_owner}data.augment=[mutate]",
                *(f"stages.{stage.path.name}={run.owner.id}" for stage in run.owner.stages[:-1]),
            ]
            line = " ".join(f"--set {each}" for each in sets)
            raise MissingError(
                "the score `ratio` needs a background run",
                hint=f"`gz train {self.trained.name} --data {data} {line} --name background`, "
                "then `--background background`",
            )
        one, other = self.trained.info, self.background.info
        if (one.shape, one.levels) != (other.shape, other.levels):
            raise UsageError(
                f"the background run has images of {other.shape} and {other.levels} levels, "
                f"this one of {one.shape} and {one.levels}"
            )


@dataclass(frozen=True)
class _Seen:
    """Batches as the model sees them, to go through as often as a fit likes."""

    trained: Trained
    batches: Iterable[Batch]

    def __iter__(self) -> Iterator[Batch]:
        return map(self.trained.seen, self.batches)


def densities(statistics: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A Gaussian kernel density estimate of each statistic [N] that varies."""
    from scipy.stats import gaussian_kde

    return {name: gaussian_kde(values) for name, values in statistics.items() if values.std() > 0}


def _log_prob(model: Any, x: Tensor, noise: ImageNoise) -> Tensor:
    return model.log_prob(x, noise=noise) if hasattr(model, "log_prob") else -model.score_nll(x, noise=noise)


def _code_length(batch: Batch) -> np.ndarray:
    return code_length(to_uint8(batch.x).cpu().numpy())
