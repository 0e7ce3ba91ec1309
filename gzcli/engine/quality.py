"""What `gz bench` says of a set of samples: Fréchet distance, KID, precision and recall, classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from gzcli.data.batches import quantise, to_uint8
from gzcli.data.pack import Pack
from gzcli.engine.budget import subset
from gzcli.metrics.features import lenet
from gzcli.metrics.fidelity import KEYS, fidelity, inception_weights, register
from gzcli.metrics.frechet import frechet_distance

OF_LENET = ("fd", "kid_lenet", "prc_lenet", "classes")
OF_INCEPTION = {"fid": "fid", "kid": "kid", "is": "isc"}  # ours → torch-fidelity's
DRAWS = 5  # of training images, for the floor of the Fréchet distance
SUBSETS = 20  # of LeNet features: enough for the mean of KID, whose spread is not printed
SMALL = 10_000  # FID is biased upwards below so many images


class Judge:
    """Compares images with a data set's test split; made once, called for each model.

    With the LeNet of four rotations (a set without labels) the names end in `_rot`. Precision and recall (k =
    3) are of equally many real images as fakes, since they depend on both numbers. Raises MissingError for
    absent weights.
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
        self.pack, self.metrics, self.n, self.device = pack, list(metrics), n, device
        self.inception = [OF_INCEPTION[name] for name in metrics if name in OF_INCEPTION]
        self.weights, self.weights_hash = inception_weights(weights) if self.inception else (None, None)
        self.net = lenet(pack, device=device, say=say) if set(metrics) & set(OF_LENET) else None
        self.extractor = register(self.net) if self.net else ""
        self.used: set[int | None] = set()
        self.real: dict[int | None, np.ndarray] = {}
        self.floor_draws: dict[str, list[float]] = {}
        self.warnings = []
        if "fid" in metrics and n < SMALL:
            self.warnings.append(
                f"FID of {n} images is biased upwards: compare it at the same n only, or use `kid`"
            )

    def __call__(
        self,
        images: np.ndarray,
        labels: torch.Tensor | None,
        levels: int | None,
        only: Sequence[str] | None = None,
    ) -> dict[str, float]:
        """The figures of uint8 [N, C, H, W] against the test split at equal grey levels; `labels`: as asked
        for."""
        metrics = set(self.metrics if only is None else only)
        if not only:
            self.used.add(levels)
        found: dict[str, float] = {}
        if self.net:
            found |= self._by_lenet(images, labels, levels, metrics)
        if self.inception and not only:
            cache = f"{self.pack.meta.digest}-test-{levels}-{self.weights_hash[:8]}"
            made = fidelity(
                images,
                self._test(levels),
                extractor="inception-v3-compat",
                metrics=tuple(self.inception),
                weights=self.weights,
                cache=cache,
                device=self.device,
            )
            found |= {name: made[KEYS[key][0]] for name, key in OF_INCEPTION.items() if key in self.inception}
        return found

    def floor(self) -> dict[str, float]:
        """The same figures of n real training images, at each number of grey levels that was judged.

        One draw of 2,000 digits may have twice the Fréchet distance of another: that of the floor is a mean
        over draws.
        """
        train, found = self.pack.images("train"), {}
        first, *others = self._draws(len(train))
        for levels in self.used:
            mark = "" if levels in (None, self.pack.meta.levels) else f"@{levels}"
            made = self(self._at(train[first], levels), None, levels)
            for key in made:
                if key.startswith("fd"):
                    self.floor_draws[key + mark] = [
                        made[key],
                        *(self._fd(train[rows], levels) for rows in others),
                    ]
                    made[key] = float(np.mean(self.floor_draws[key + mark]))
            found |= {key + mark: value for key, value in made.items()}
        return found

    def _draws(self, total: int) -> list[np.ndarray]:
        """Rows of up to five disjoint random draws of n images; the first is `subset(total, n)`."""
        order, n = np.random.default_rng(0).permutation(total), min(self.n, total)
        return [np.sort(order[i * n : (i + 1) * n]) for i in range(min(DRAWS, total // n))]

    def _fd(self, images: np.ndarray, levels: int | None) -> float:
        return frechet_distance(self.net.features(self._at(images, levels)), self._features(levels))

    def provenance(self) -> dict[str, Any]:
        return {
            "features": self.net and self.net.hash,
            "features_accuracy": self.net and self.net.accuracy,
            "features_rotations": self.net and self.net.rotations,
            "inception": self.weights_hash,
            "floor_draws": self.floor_draws,
        }

    def _by_lenet(self, images, labels, levels, metrics: set[str]) -> dict[str, float]:
        found: dict[str, float] = {}
        tail = "_rot" if self.net.rotations else ""
        name = tail or "_lenet"
        if "fd" in metrics:
            found["fd" + tail] = frechet_distance(self.net.features(images), self._features(levels))
        kinds = [kind for kind, metric in (("kid", "kid_lenet"), ("prc", "prc_lenet")) if metric in metrics]
        if kinds:
            real = self._test(levels)
            real = real[subset(len(real), len(images))]
            made = fidelity(images, real, extractor=self.extractor, metrics=tuple(kinds), subsets=SUBSETS)
            for key, value in made.items():
                found[("kid" if key.startswith("kernel") else key) + name] = value
        if "classes" in metrics and not self.net.rotations and not self.pack.meta.multilabel:
            seen = self.net.predict(images)
            found["tv"] = total_variation(seen, self.pack.labels("train"), len(self.pack.meta.classes))
            if labels is not None:
                found["label_accuracy"] = float(np.mean(seen == labels.cpu().numpy()))
        return found

    def _features(self, levels: int | None) -> np.ndarray:
        key = ("features", levels)
        if key not in self.real:
            self.real[key] = self.net.features(self._test(levels))
        return self.real[key]

    def _test(self, levels: int | None) -> np.ndarray:
        if levels not in self.real:
            self.real[levels] = self._at(self.pack.images("test"), levels)
        return self.real[levels]

    def _at(self, images: np.ndarray, levels: int | None) -> np.ndarray:
        """Real images with as few grey levels as the model's."""
        if levels in (None, 2, self.pack.meta.levels):
            return images
        return to_uint8(quantise(torch.from_numpy(np.array(images)), levels)).numpy()


def total_variation(seen: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """½ Σ |p − q| of the class frequencies of `seen` [N] and of `labels` [M]."""
    p, q = (np.bincount(np.asarray(y), minlength=classes)[:classes] / len(y) for y in (seen, labels))
    return float(0.5 * np.abs(p - q).sum())
