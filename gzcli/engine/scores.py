"""Out-of-distribution scores of a trained model: its own `score_<name>`, and those written once over `log_prob`.

  nll         −log p(x), nats
  typicality  |nll − mean nll of validation images|                        Nalisnick et al. 2019, arXiv:1906.02994
  complexity  nll in bits − length of the image's best lossless code       Serrà et al. 2020, arXiv:1909.11480, eq. 3
  ratio       nll − nll under a background model, trained on mutated images   Ren et al. 2019, arXiv:1906.02845, eq. 4
  gradnorm    log ‖∂ log p(x) / ∂θ‖, all parameters, one image at a time   after Kwon et al. 2020, arXiv:2007.09507
Higher is more out-of-distribution. A score depends on (model, image, seed, index) alone, not on the batch.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gzcli.data.batches import to_uint8
from gzcli.engine.context import Trained
from gzcli.errors import DivergedError, MissingError, UsageError, did_you_mean
from gzcli.metrics.baselines import code_length
from gzcli.types import Batch, ImageNoise

OVER_NLL = ("nll", "typicality", "complexity", "ratio")
GENERIC = (*OVER_NLL, "gradnorm")
DEAR = ("regret", "inversion")  # an optimisation an image: only when named


def own_scores(model: Any) -> list[str]:
    """The names of the model's `score_<name>` methods."""
    return sorted(name.removeprefix("score_") for name in dir(type(model)) if name.startswith("score_"))


def choose(trained: Trained, asked: Sequence[str] | None) -> list[str]:
    """The scores to compute: those asked for, else the recipe's, else every cheap one.

    Raises UsageError for a score that the model does not have.
    """
    model, name = trained.model, trained.tree["model"]["name"]
    own, has_nll = own_scores(model), hasattr(model, "log_prob")
    options = [*own, *(GENERIC if has_nll else ())]
    wanted = list(asked or trained.tree["ood"].get("scores") or ())
    if not wanted:
        cheap = ("nll", "typicality", "complexity") if model.likelihood in ("exact", "bound") else ()
        wanted = [*cheap, *(score for score in own if score not in DEAR)] or own[:1]
    if not wanted:
        raise UsageError(f"`{name}` has no score for out-of-distribution images", hint="gz list models --can ood")
    for score in wanted:
        if score in options:
            continue
        if score in GENERIC:
            raise UsageError(f"`{name}` has no likelihood, which the score `{score}` needs", hint=f"it has: {', '.join(own)}")
        raise UsageError(f"`{name}` has no score `{score}`", hint=did_you_mean(score, options) or f"it has: {', '.join(options)}")
    return list(dict.fromkeys(wanted))


class Scorer:
    """Computes the scores `names` of batches; `fit` must see in-distribution batches first.

    `options` are keywords of `score_<name>` and `fit_<name>`, shared by all scores that take them.
    Raises MissingError where `ratio` has no background model, UsageError where that one is for other images.
    """

    def __init__(self, trained: Trained, names: Sequence[str], *, background: Trained | None = None,
                 options: Mapping[str, Any] | None = None, seed: int = 0):  # fmt: skip
        self.trained, self.model, self.names, self.seed = trained, trained.model, list(names), seed
        self.background, self.options = background, dict(options or {})
        self.mean_nll = math.nan
        if "ratio" in names:
            self._check_background()
        unused = set(self.options) - {key for name in names for key in self._keywords("score", name) | self._keywords("fit", name)}
        self.unused = sorted(unused)

    def fit(self, batches: Sequence[Batch]) -> None:
        """In-distribution statistics, of held-out images."""
        if "typicality" in self.names:
            self.mean_nll = float(np.concatenate([self._nll(self.model, batch) for batch in batches]).mean())
        for name in self.names:
            if method := getattr(self.model, f"fit_{name}", None):
                method(batches, **self._take("fit", name))

    def __call__(self, batch: Batch) -> dict[str, np.ndarray]:
        """float64 [B] of each score. Raises DivergedError that names a score with values that are not finite."""
        nll = self._nll(self.model, batch) if set(self.names) & set(OVER_NLL) else None
        values = {}
        for name in self.names:
            values[name] = value = self._one(name, batch, nll)
            if bad := int((~np.isfinite(value)).sum()):
                raise DivergedError(f"the score `{name}` is not finite for {bad} of {len(value)} images",
                                    hint="the model may have diverged: look at its `loss.png`")  # fmt: skip
        return values

    def _one(self, name: str, batch: Batch, nll: np.ndarray | None) -> np.ndarray:
        if name == "nll":
            return nll
        if name == "typicality":
            return np.abs(nll - self.mean_nll)
        if name == "complexity":
            return nll / math.log(2) - code_length(to_uint8(batch.x).cpu().numpy())
        if name == "ratio":
            return nll - self._nll(self.background.model, batch)
        if name == "gradnorm":
            return self._gradnorm(batch)
        score = getattr(self.model, f"score_{name}")(batch.x, noise=self._noise(batch.index), **self._take("score", name))
        return score.detach().double().cpu().numpy()

    def _nll(self, model: Any, batch: Batch) -> np.ndarray:
        with torch.no_grad():
            return -model.log_prob(batch.x, noise=self._noise(batch.index)).double().cpu().numpy()

    def _gradnorm(self, batch: Batch) -> np.ndarray:
        parameters = list(self.model.parameters())
        frozen = [p.requires_grad for p in parameters]
        self.model.requires_grad_(True)
        try:
            norms = [self._norm(batch.x[i : i + 1], batch.index[i : i + 1], parameters) for i in range(len(batch))]
        finally:
            for p, requires in zip(parameters, frozen, strict=True):
                p.requires_grad_(requires)
        return torch.stack(norms).cpu().numpy()

    def _norm(self, x: Tensor, index: Tensor, parameters: list[Tensor]) -> Tensor:
        with torch.enable_grad():
            value = self.model.log_prob(x, noise=self._noise(index)).sum()
            if not value.requires_grad:
                raise UsageError(f"`{self.trained.tree['model']['name']}` has a likelihood without gradient, `gradnorm` needs one")
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        return sum(g.double().square().sum() for g in gradients if g is not None).sqrt().log()

    def _noise(self, index: Tensor) -> ImageNoise:
        """Fresh for each score, so that a score does not depend on which others are computed."""
        return ImageNoise(self.seed, index.tolist(), self.trained.device)

    def _keywords(self, kind: str, name: str) -> set[str]:
        method = getattr(self.model, f"{kind}_{name}", None)
        return set(inspect.signature(method).parameters) - {"x", "noise", "batches"} if method else set()

    def _take(self, kind: str, name: str) -> dict[str, Any]:
        return {key: self.options[key] for key in self._keywords(kind, name) & set(self.options)}

    def _check_background(self) -> None:
        name, data = self.trained.tree["model"]["name"], self.trained.tree["data"]["name"]
        if self.background is None:
            raise MissingError("the score `ratio` needs a background run",
                               hint=f"`gz train {name} --data {data} --set data.augment=[mutate] --name background`, "
                                    "then `--background background`")  # fmt: skip
        one, other = self.trained.info, self.background.info
        if (one.shape, one.levels) != (other.shape, other.levels):
            raise UsageError(f"the background run has images of {other.shape} and {other.levels} levels, "
                             f"this one of {one.shape} and {one.levels}")  # fmt: skip
