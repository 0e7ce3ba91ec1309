"""Image quality of samples against a data set's test split: Fréchet distance, KID, precision and recall,
classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gzcli.data.batches import quantise, to_uint8
from gzcli.data.pack import Pack
from gzcli.engine.images import subset
from gzcli.metrics.features import LeNetFeatures, lenet
from gzcli.metrics.fidelity import KEYS, fidelity, inception_weights, register
from gzcli.metrics.frechet import frechet_distance

OF_LENET = ("fd", "kid_lenet", "prc_lenet", "classes")
OF_INCEPTION = {"fid": "fid", "kid": "kid", "is": "isc"}  # ours → torch-fidelity's
DRAWS = 5  # draws of training images over which the floor of the Fréchet distance is averaged
SUBSETS = 20  # subsets of LeNet features for KID: enough for its mean, as its spread is not printed
SMALL = 10_000  # number of images below which FID is biased upwards


@dataclass
class RealImages:
    """The images of a data set at the grey levels of the samples that they are compared with.

    pack: the data set.
    """

    pack: Pack
    _test: dict[int | None, np.ndarray] = field(default_factory=dict, repr=False)

    def test(self, levels: int | None) -> np.ndarray:
        """The test split, uint8 [N, C, H, W]."""
        if levels not in self._test:
            self._test[levels] = self.at(self.pack.images("test"), levels)
        return self._test[levels]

    def at(self, images: Any, levels: int | None) -> np.ndarray:
        """Images of the set, uint8 [N, C, H, W], at as few grey levels."""
        if levels in (None, 2, self.pack.meta.levels):
            return images
        return to_uint8(quantise(torch.from_numpy(np.array(images)), levels)).numpy()


class LeNetQuality:
    """Figures in the features of the set's LeNet.

    The LeNet of a set without labels is trained to tell four rotations apart; names of its figures end in
    `_rot`. Precision and recall (k = 3) depend on the numbers of real images and samples: both are equal.

    real: the images of the data set.
    net: the LeNet of the data set.
    """

    def __init__(self, real: RealImages, net: LeNetFeatures):
        self.real, self.net = real, net
        self.extractor = register(net)
        self.features: dict[int | None, np.ndarray] = {}  # of the test split, by grey levels
        self.tail = "_rot" if net.rotations else ""

    def __call__(
        self, images: np.ndarray, labels: Tensor | None, levels: int | None, metrics: set[str]
    ) -> dict[str, float]:
        """The figures of those `metrics` that use a LeNet. The other parameters are those of `Quality`."""
        found: dict[str, float] = {}
        if "fd" in metrics:
            found["fd" + self.tail] = self.frechet_distance(images, levels)
        kinds = [kind for kind, metric in (("kid", "kid_lenet"), ("prc", "prc_lenet")) if metric in metrics]
        if kinds:
            real = self.real.test(levels)
            real = real[subset(len(real), len(images))]
            made = fidelity(images, real, extractor=self.extractor, metrics=tuple(kinds), subsets=SUBSETS)
            for key, value in made.items():
                found[("kid" if key.startswith("kernel") else key) + (self.tail or "_lenet")] = value
        pack = self.real.pack
        known = pack.labels("train")
        if "classes" in metrics and known is not None and not self.net.rotations and not pack.meta.multilabel:
            seen = self.net.predict(images)
            found["tv"] = total_variation(seen, known, len(pack.meta.classes))
            if labels is not None:
                found["label_accuracy"] = float(np.mean(seen == labels.cpu().numpy()))
        return found

    def frechet_distance(self, images: np.ndarray, levels: int | None) -> float:
        """The Fréchet distance of images uint8 [N, C, H, W] to the test split at these grey levels."""
        if levels not in self.features:
            self.features[levels] = self.net.features(self.real.test(levels))
        return frechet_distance(self.net.features(images), self.features[levels])


class InceptionQuality:
    """Figures in the features of Inception. Raises MissingError for absent weights.

    real: the images of the data set.
    metrics: names, of `OF_INCEPTION`.
    device: device of the network.
    weights: path of the file of Inception's weights; None: the file in the cache.
    """

    def __init__(self, real: RealImages, metrics: Sequence[str], device: torch.device, weights: str | None):
        self.real, self.metrics, self.device = real, list(metrics), device
        self.weights, self.hash = inception_weights(weights)

    def __call__(self, images: np.ndarray, levels: int | None) -> dict[str, float]:
        made = fidelity(
            images,
            self.real.test(levels),
            extractor="inception-v3-compat",
            metrics=tuple(OF_INCEPTION[name] for name in self.metrics),
            weights=self.weights,
            cache=f"{self.real.pack.meta.digest}-test-{levels}-{self.hash[:8]}",
            device=self.device,
        )
        return {name: made[KEYS[key][0]] for name, key in OF_INCEPTION.items() if name in self.metrics}


class Quality:
    """The quality of samples by the chosen metrics: made once for a data set, called for each model.

    pack: the data set.
    metrics: names, of `OF_LENET` and `OF_INCEPTION`; others have no effect.
    n: number of samples of each model.
    device: device of the networks.
    weights: path of the file of Inception's weights; None: the file in the cache.
    say: takes a line about work that takes long.

    Raises MissingError for absent weights.
    """

    def __init__(
        self,
        pack: Pack,
        metrics: Sequence[str],
        n: int,
        *,
        device: torch.device,
        weights: str | None = None,
        say: Callable[[str], None] = lambda text: None,
    ):
        self.pack, self.metrics, self.n, self.real = pack, set(metrics), n, RealImages(pack)
        self.inception: InceptionQuality | None = None
        if of_inception := [name for name in metrics if name in OF_INCEPTION]:
            self.inception = InceptionQuality(self.real, of_inception, device, weights)
        self.lenet: LeNetQuality | None = None
        if self.metrics & set(OF_LENET):
            self.lenet = LeNetQuality(self.real, lenet(pack, device=device, say=say))
        self.used: set[int | None] = set()  # grey levels of the models so far
        self.floor_draws: dict[str, list[float]] = {}
        self.warnings: list[str] = []
        if "fid" in metrics and n < SMALL:
            self.warnings.append(
                f"FID of {n} images is biased upwards: compare it at the same n only, or use `kid`"
            )

    def __call__(self, images: np.ndarray, labels: Tensor | None, levels: int | None) -> dict[str, float]:
        """The figures of samples against the test split at equal grey levels.

        images: uint8 [N, C, H, W].
        labels: labels by which the images were sampled, [N] or [N, K]; None: no labels.
        levels: grey levels of the model.
        """
        self.used.add(levels)
        found = self.lenet(images, labels, levels, self.metrics) if self.lenet else {}
        return found | (self.inception(images, levels) if self.inception else {})

    def classes(self, images: np.ndarray, labels: Tensor | None, levels: int | None) -> dict[str, float]:
        """The figures of classes alone, if `classes` is among the metrics."""
        return self.lenet(images, labels, levels, self.metrics & {"classes"}) if self.lenet else {}

    def floor(self) -> dict[str, float]:
        """The same figures of n real training images, at all grey levels of the models so far.

        One draw of 2,000 digits may have twice the Fréchet distance of another, so the floor's is a mean over
        draws.
        """
        train = self.pack.images("train")
        found: dict[str, float] = {}
        first, *others = self._draws(len(train))
        for levels in list(self.used):
            mark = self.mark(levels)
            made = self(self.real.at(train[first], levels), None, levels)
            if self.lenet and (key := "fd" + self.lenet.tail) in made:
                draws = (self.real.at(train[rows], levels) for rows in others)
                of_draws = [made[key], *(self.lenet.frechet_distance(draw, levels) for draw in draws)]
                self.floor_draws[key + mark] = of_draws
                made[key] = float(np.mean(of_draws))
            found |= {key + mark: value for key, value in made.items()}
        return found

    def mark(self, levels: int | None) -> str:
        """The ending of figures at other grey levels than the data set has, as `@32`."""
        return "" if levels in (None, self.pack.meta.levels) else f"@{levels}"

    def _draws(self, total: int) -> list[np.ndarray]:
        """Rows of up to five disjoint random draws of n images; the first is `subset(total, n)`."""
        order, n = np.random.default_rng(0).permutation(total), min(self.n, total)
        return [np.sort(order[i * n : (i + 1) * n]) for i in range(min(DRAWS, total // n))]

    def provenance(self) -> dict[str, Any]:
        """What the figures depend on beside the images."""
        net = self.lenet.net if self.lenet else None
        return {
            "features": net and net.hash,
            "features_accuracy": net and net.accuracy,
            "features_rotations": net and net.rotations,
            "inception": self.inception and self.inception.hash,
            "floor_draws": self.floor_draws,
        }


def total_variation(seen: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """½ Σ |p − q| of the class frequencies of `seen` [N] and of `labels` [M]."""
    p, q = (np.bincount(np.asarray(y), minlength=classes)[:classes] / len(y) for y in (seen, labels))
    return float(0.5 * np.abs(p - q).sum())
