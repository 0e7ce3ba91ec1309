"""The sliced Wasserstein distance (Rabin et al. 2011; Bonneel et al. 2015, J. Math. Imaging Vis. 51:22)."""

from __future__ import annotations

import numpy as np

from gzcli.metrics.manifold import paired


def sliced_wasserstein(fake: np.ndarray, real: np.ndarray, *, projections: int = 512, seed: int = 0) -> float:
    """The root of the mean, over random directions, of the squared Wasserstein distance W₂² of the rows'
    projections, in the rows' own unit.

    Raises UsageError for a side without rows or different widths.
    """
    a, b = paired(fake, real)
    directions = np.random.default_rng(seed).normal(size=(a.shape[1], projections))
    directions /= np.linalg.norm(directions, axis=0)
    return float(np.sqrt(_squared(*(_projected(rows, directions) for rows in (a, b))).mean()))


def _projected(rows: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """The sorted projections of rows [N, D] on each direction, [N, P]."""
    return np.sort(rows @ directions.astype(rows.dtype), axis=0).astype(np.float64)


def _squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """W₂² of the columns of sorted a [N, P] and b [M, P]: ∫ (F⁻¹ − G⁻¹)² over the steps that both quantile
    functions share."""
    n, m = len(a), len(b)
    edges = np.union1d(np.arange(n + 1) * m, np.arange(m + 1) * n)  # in units of 1 / (N M)
    start, width = edges[:-1], np.diff(edges) / (n * m)
    return width @ np.square(a[start // m] - b[start // n])
