"""The figures of `gz bench` that compare two sets of features: each with its 95 % interval and the direction
in which it is better."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np

from gzcli.judge.images import subset
from gzcli.metrics import fidelity
from gzcli.metrics.fidelity import inception_score
from gzcli.metrics.frechet import (
    Moments,
    frechet_distance,
    frechet_infinity,
    frechet_of_moments,
    moments,
    pca_frechet,
)
from gzcli.metrics.interval import Interval, half_samples
from gzcli.metrics.kid import kid
from gzcli.metrics.manifold import prdc
from gzcli.metrics.sliced import sliced_wasserstein

Found = dict[str, Interval]
Direction = Literal["down", "up"]

# What each metric is computed of: the features of a network, or pixels.
SPACES = {
    "fd": "lenet",
    "fd_inf": "lenet",
    "kid_lenet": "lenet",
    "prc_lenet": "lenet",
    "swd": "pixels",
    "fd_lite": "lite",
    "fd_lite_pca": "lite",
    "kid_lite": "lite",
    "prc_lite": "lite",
    "fid": "inception",
    "kid": "inception",
    "is": "inception",
    "fd_dinov2": "dinov2",
    "kid_dinov2": "dinov2",
    "prc_dinov2": "dinov2",
    "fd_clip": "clip",
    "kid_clip": "clip",
    "prc_clip": "clip",
}
# of the features of raw Fréchet distances
WIDTHS = {"fd": 64, "fd_lite": 1280, "fid": fidelity.FEATURES, "fd_dinov2": 1024, "fd_clip": 512}
WIDE = 256  # features from which an interval has fewer draws: each takes about a second
DRAWS, FEW_DRAWS = 50, 12  # halves of the images for the interval of a Fréchet distance
HALVES = 20  # the same of extrapolated and of sliced distances
SUBSETS = {"kid": 100}  # by which KID is found; of other features than Inception's `FEWER_SUBSETS`
FEWER_SUBSETS = 40
FEW_PROJECTIONS = 64  # by which the interval of a sliced distance is found
PRECISE, DENSE = 3, 5  # the neighbour whose distance is the radius: of precision and recall, of the others
SIGNED = ("kid", "fd_inf")  # unbiased figures, which may be below 0
SEED = 2020  # torch-fidelity's, so that its subsets for KID are ours

DOWN = {"fd", "kid", "swd", "fid", "tv", "bpd", "nats", "duplicates", "lpips_recon"}
UP = {
    "precision",
    "recall",
    "density",
    "coverage",
    "is",
    "label",
    "samples",
    "train",
    "authenticity",
    "worth",
}


def direction(name: str) -> Direction | None:
    """In which direction a figure is better, by its name or by the first word of it; None for one that says
    nothing of it, as the models' own do."""
    whole = re.split(r"[|@]", name)[0]
    words = {whole, whole.split("_")[0]}
    return "down" if words & DOWN else "up" if words & UP else None


def compare(metric: str, fake: np.ndarray, real: np.ndarray, *, ends: bool = True) -> Found:
    """The figures of a metric of SPACES by their names; those in the features of a LeNet as of a set with
    labels."""
    return COMPUTED[metric](fake, real, ends) if metric in COMPUTED else _prdc(metric, fake, real, ends)


def to_statistics(metric: str, fake: np.ndarray, real: Moments) -> Found:
    """The Fréchet distance of features [N, D] to a mean and a covariance, of the real images of which no more
    is known. Its interval is that of the samples alone."""
    fake = fake[:, : WIDTHS[metric]]

    def distance(rows: np.ndarray) -> float:
        return frechet_of_moments(moments(rows), real)

    return {metric: not_negative(half_samples(distance, fake, draws=_draws(fake)))}


def halves(function: Callable[..., float], *samples: np.ndarray, draws: int, ends: bool = True) -> Interval:
    """A figure with its interval by `half_samples`; without where no `ends` are asked for."""
    return half_samples(function, *samples, draws=draws) if ends else Interval(function(*samples))


def is_biased(metric: str, fake: int, real: int) -> bool:
    """Whether a raw Fréchet distance of so many samples and real images says more of their number than of
    their quality: at fewer than two a feature."""
    return metric in WIDTHS and min(fake, real) < 2 * WIDTHS[metric]


def share(value: float, n: int) -> Interval:
    """A share of n images that were drawn independently, with Wilson's interval (1927)."""
    from scipy.stats import binomtest

    found = binomtest(round(value * n), n).proportion_ci(method="wilson")
    return Interval(value, float(found.low), float(found.high))


def total_variation(seen: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """½ Σ |p − q| of the class frequencies of `seen` [N] and of `labels` [M]."""
    p, q = (np.bincount(np.asarray(y), minlength=classes)[:classes] / len(y) for y in (seen, labels))
    return float(0.5 * np.abs(p - q).sum())


def mean_of_draws(draws: Sequence[Mapping[str, Interval]]) -> Found:
    """The mean of each figure over several draws of images, with Student's interval of that mean, which is no
    narrower than that of a draw where this is known; of a single draw the figures themselves."""
    from scipy.stats import t

    if len(draws) == 1:
        return dict(draws[0])
    found, n = {}, len(draws)
    for name in draws[0]:
        of_draws = [draw[name] for draw in draws]
        values = np.array([one.value for one in of_draws])
        half = float(t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n))
        known = [(one.high - one.low) / 2 for one in of_draws if one.low is not None and one.high is not None]
        half = max([half, *known])  # all draws are compared with the same real images
        mean = float(values.mean())
        of_all = Interval(mean, mean - half, mean + half)
        found[name] = of_all if name.startswith(SIGNED) else not_negative(of_all)
    return found


def _frechet(metric: str, fake: np.ndarray, real: np.ndarray, ends: bool) -> Found:
    fake, real = (rows[:, : WIDTHS[metric]] for rows in (fake, real))
    return {metric: not_negative(halves(frechet_distance, fake, real, draws=_draws(fake), ends=ends))}


def _infinity(fake: np.ndarray, real: np.ndarray, ends: bool) -> Found:
    return {"fd_inf": halves(frechet_infinity, fake, real, draws=HALVES, ends=ends)}


def _pca(fake: np.ndarray, real: np.ndarray, ends: bool) -> Found:
    return {"fd_lite_pca": not_negative(halves(pca_frechet, fake, real, draws=FEW_DRAWS, ends=ends))}


def _kid(name: str, fake: np.ndarray, real: np.ndarray, ends: bool) -> Found:
    fake, real = (rows[:, : fidelity.FEATURES] for rows in (fake, real))
    return {name: kid(fake, real, subsets=SUBSETS.get(name, FEWER_SUBSETS), seed=SEED)}


def _score(fake: np.ndarray, real: np.ndarray, ends: bool) -> Found:
    return {"is": inception_score(fake)}


def _swd(fake: np.ndarray, real: np.ndarray, ends: bool) -> Found:
    """In units of a pixel's whole range: images that are all lighter by the share s are s apart."""
    value = sliced_wasserstein(fake, real) / 255
    if not ends:
        return {"swd": Interval(value)}
    fewer = partial(sliced_wasserstein, projections=FEW_PROJECTIONS)
    spread = half_samples(fewer, fake, real, draws=HALVES)
    low, high = (value + (end - spread.value) / 255 for end in (spread.low or 0.0, spread.high or 0.0))
    return {"swd": not_negative(Interval(value, low, high))}


def _prdc(metric: str, fake: np.ndarray, real: np.ndarray, ends: bool) -> Found:
    """Both sides in equal numbers, on which these figures depend. Three are shares of the images, whose
    intervals take the neighbours as given; that of the density is by halves of the images."""
    n = min(len(fake), len(real))
    fake, real = (rows[subset(len(rows), n)] for rows in (fake, real))
    near, far = prdc(fake, real, k=PRECISE), prdc(fake, real, k=DENSE)
    shares = {"precision": near["precision"], "recall": near["recall"], "coverage": far["coverage"]}
    found = {metric.replace("prc", name): share(value, n) for name, value in shares.items()}
    density = Interval(far["density"])
    if ends:
        density = half_samples(lambda a, b: prdc(a, b, k=DENSE)["density"], fake, real, draws=FEW_DRAWS)
    return found | {metric.replace("prc", "density"): not_negative(density)}


COMPUTED: dict[str, Callable[[np.ndarray, np.ndarray, bool], Found]] = {
    **{name: partial(_frechet, name) for name in WIDTHS},
    **{name: partial(_kid, name) for name in SPACES if name.startswith("kid")},
    "fd_inf": _infinity,
    "fd_lite_pca": _pca,
    "swd": _swd,
    "is": _score,
}


def _draws(features: np.ndarray) -> int:
    return FEW_DRAWS if features.shape[1] >= WIDE else DRAWS


def not_negative(found: Interval) -> Interval:
    return found if found.low is None else replace(found, low=max(0.0, found.low))
