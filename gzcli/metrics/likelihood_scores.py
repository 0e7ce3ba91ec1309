"""Out-of-distribution scores that can be computed from any model's likelihood. A new score is an entry of
`SCORES`.

  nll         −log p(x), nats
  typicality  |nll − mean nll of held-out images|
              Nalisnick et al. 2019, arXiv:1906.02994
  complexity  nll in bits − length of the image's shortest lossless code
              Serrà et al. 2020, arXiv:1909.11480, eq. 3
  ratio       nll − nll under a background model, which was trained on mutated images
              Ren et al. 2019, arXiv:1906.02845, eq. 4
  gradnorm    log ‖∂ log p(x) / ∂θ‖ over all parameters, one image at a time
              after Kwon et al. 2020, arXiv:2007.09507
  ensemble    −Σ log density of each statistic of the image (nll, code length, the model's own cheap scores),
              densities being kernel estimates on held-out images
              Morningstar et al. 2021, arXiv:2006.09273

A higher score is more out-of-distribution. This module does not import numpy, because the command line reads
the names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from gzcli.metrics.alarms.methods import LOCAL, METHODS

if TYPE_CHECKING:
    import numpy as np

ScoreArrays = Mapping[str, "np.ndarray"]
Fact = Literal["nll", "background_nll", "code_length", "gradient_norm", "statistics"]


@dataclass(frozen=True)
class LikelihoodScore:
    """A score as a function of facts about B images: float64 [B] each, by the names of `Fact`. `statistics`
    are the NLL, the code length and further facts, each by its own name."""

    compute: Callable[[ScoreArrays, Any], np.ndarray]  # function of the facts and of what was fitted
    reads: tuple[Fact, ...]  # names of the facts; a model without one of them does not have the score
    fit: Callable[[ScoreArrays], Any] | None = None  # function that fits to the same facts of held-out images
    default: bool = False  # whether the score is computed if no score is named
    tails: int = 2  # 2 if low values are unusual too; 1 if low values are the most usual


def densities(held_out: ScoreArrays) -> dict[str, Any]:
    """A Gaussian kernel density estimate for each statistic that varies."""
    from scipy.stats import gaussian_kde

    return {name: gaussian_kde(values) for name, values in held_out.items() if values.std() > 0}


def surprise(facts: ScoreArrays, estimates: Mapping[str, Any]) -> np.ndarray:
    return -sum(estimate.logpdf(facts[name]) for name, estimate in estimates.items())


def typicality(facts: ScoreArrays, mean: float) -> np.ndarray:
    return abs(facts["nll"] - mean)


def complexity(facts: ScoreArrays, _: None) -> np.ndarray:
    return facts["nll"] / math.log(2) - facts["code_length"]


def ratio(facts: ScoreArrays, _: None) -> np.ndarray:
    return facts["nll"] - facts["background_nll"]


SCORES: dict[str, LikelihoodScore] = {
    "nll": LikelihoodScore(lambda facts, _: facts["nll"], ("nll",), default=True),
    "typicality": LikelihoodScore(
        typicality, ("nll",), fit=lambda facts: float(facts["nll"].mean()), default=True, tails=1
    ),
    "complexity": LikelihoodScore(complexity, ("nll", "code_length"), default=True),
    "ratio": LikelihoodScore(ratio, ("nll", "background_nll")),
    "gradnorm": LikelihoodScore(lambda facts, _: facts["gradient_norm"], ("gradient_norm",)),
    "ensemble": LikelihoodScore(surprise, ("nll", "statistics"), fit=densities, tails=1),
}


def tails_of(name: str) -> int:
    """How many tails of a score count as unusual. A model's own scores have two, its local score has one."""
    if name in SCORES:
        return SCORES[name].tails
    return 1 if name == LOCAL else METHODS[name].tails if name in METHODS else 2


def read(names: Iterable[str], fact: Fact) -> bool:
    """Whether one of the scores reads the fact. Names that are not in `SCORES` read none."""
    return any(fact in SCORES[name].reads for name in names if name in SCORES)
