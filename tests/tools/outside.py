"""Figures of judged runs once more, without gz: by scipy, scikit-learn and plain torch.

python tests/tools/outside.py --mnist FOLDER RESULT.json…

FOLDER holds MNIST's four files; a RESULT is that of `gz bench -n 10000` of one run, which names its samples.
Each line shows gz's figure with its interval, and the one computed here. Only the judge's weights are gz's.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy.linalg import sqrtm
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

WEIGHTS = Path(__file__).resolve().parents[2] / "gzcli/metrics/judges"
PART = 5000  # images of a part by which precision and recall are taken


class LeNet:
    """The first judge, from its file of weights."""

    def __init__(self) -> None:
        (file,) = WEIGHTS.glob("lenet-*.safetensors")
        self.weights = load_file(file)

    def features(self, images: np.ndarray) -> Tensor:
        """(n, 28, 28) bytes to (n, 64)."""
        w, parts = self.weights, []
        names = sorted(name[:-7] for name in w if name.startswith("body") and name.endswith(".weight"))
        for x in (torch.tensor(images).float()[:, None] / 255).split(1000):
            for name in names:
                x = F.max_pool2d(F.relu(F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=2)), 2)
            parts.append(F.linear(x.flatten(1), w["neck.weight"], w["neck.bias"]))
        return torch.cat(parts)

    def sureness(self, features: Tensor) -> np.ndarray:
        logits = F.linear(F.relu(features), self.weights["head.weight"], self.weights["head.bias"])
        return logits.double().softmax(1).amax(1).numpy()


def frechet(fake: np.ndarray, real: np.ndarray) -> float:
    a, b = np.cov(fake.T), np.cov(real.T)
    means = np.sum((fake.mean(0) - real.mean(0)) ** 2)
    return float(means + np.trace(a) + np.trace(b) - 2 * np.trace(sqrtm(a @ b).real))


def kid(fake: np.ndarray, real: np.ndarray, rng: np.random.Generator, n: int = 1000) -> float:
    """The mean over 40 draws of n; features are standardised by the real ones."""
    fake, real = ((x - real.mean(0)) / real.std(0) for x in (fake, real))
    values = []
    for _ in range(40):
        x, y = (z[rng.choice(len(z), n, replace=False)] for z in (fake, real))
        kernels = (polynomial_kernel(z, degree=3, gamma=1 / z.shape[1], coef0=1) for z in (x, y))
        cross = polynomial_kernel(x, y, degree=3, gamma=1 / x.shape[1], coef0=1).mean()
        values.append(sum((k.sum() - np.trace(k)) / (n * (n - 1)) for k in kernels) - 2 * cross)
    return float(np.mean(values))


def precision_recall(
    fake: np.ndarray, real: np.ndarray, rng: np.random.Generator, k: int = 3
) -> tuple[float, float]:
    """The means over disjoint parts of PART images, of both sides."""
    fakes, reals = (np.split(x[rng.permutation(len(x))], len(x) // PART) for x in (fake, real))

    def share(points: np.ndarray, centres: np.ndarray) -> float:
        radii = NearestNeighbors(n_neighbors=k + 1).fit(centres).kneighbors(centres)[0][:, k]
        return float((torch.cdist(*map(torch.from_numpy, (points, centres))).numpy() < radii).any(1).mean())

    pairs = list(zip(fakes, reals, strict=True))
    precision, recall = (np.mean([share(*pair[::order]) for pair in pairs]) for order in (1, -1))
    return float(precision), float(recall)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--mnist", type=Path, required=True)
    options = parser.parse_args()
    idx = gzip.decompress((options.mnist / "t10k-images-idx3-ubyte.gz").read_bytes())
    judge = LeNet()
    features = judge.features(np.frombuffer(idx, np.uint8, offset=16).reshape(-1, 28, 28))
    real, surely = features.double().numpy(), np.quantile(judge.sureness(features), 0.05)
    for file in options.results:
        (row,) = json.loads(file.read_text())["rows"]
        drawn = judge.features(np.load(row["samples"])["samples"][..., 0])
        fake, rng = drawn.double().numpy(), np.random.default_rng(5)
        precision, recall = precision_recall(fake, real, rng)
        figures = {
            "fd": frechet(fake, real),
            "kid_lenet": kid(fake, real, rng),
            "precision_lenet": precision,
            "recall_lenet": recall,
            "legible": float((judge.sureness(drawn) >= surely).mean()),
        }
        for name, value in figures.items():
            low, high = row["intervals"][name]
            verdict = "" if low <= value <= high else "  differs"
            print(
                f"{row['name']:20s} {name:16s} {row['metrics'][name]:9.5f}"
                f" ({low:.5f} to {high:.5f}) {value:9.5f}{verdict}"
            )


if __name__ == "__main__":
    main()
