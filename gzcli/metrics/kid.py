"""The kernel distance KID (Bińkowski et al. 2018, arXiv:1801.01401): unbiased, so it holds at small n."""

from __future__ import annotations

import numpy as np

from gzcli.errors import UsageError
from gzcli.metrics.interval import LEVELS, Interval


def kid(
    fake: np.ndarray, real: np.ndarray, *, subsets: int = 100, size: int = 1000, seed: int = 0
) -> Interval:
    """The mean over random subsets of the squared maximum mean discrepancy, by its unbiased estimate with
    the kernel (x·y / D + 1)³, and its interval for all N rows of the smaller side.

    The subsets are those of torch-fidelity for this seed. Subsets of m rows spread √((N − m) / m) times as
    far as the estimate of all N rows (Shao & Wu 1989, Ann. Statist. 17:1176).

    Raises UsageError for fewer than four rows or different widths.

    fake: features of generated images, [N1, D].
    real: features of real images, [N2, D].
    subsets: number of subsets.
    size: rows of a subset; at most half of the smaller side's, as larger subsets would hardly differ.
    seed: of the subsets.
    """
    fake, real = (np.asarray(f, np.float64) for f in (fake, real))
    if fake.ndim != 2 or real.ndim != 2 or fake.shape[1] != real.shape[1]:
        raise UsageError(f"features of shapes {fake.shape} and {real.shape} cannot be compared")
    n = min(len(fake), len(real))
    if n < 4:
        raise UsageError("a kernel distance needs at least four images on each side")
    size = min(size, n // 2)
    rng = np.random.RandomState(seed)
    values = np.empty(subsets)
    for i in range(subsets):
        rows = [f[rng.choice(len(f), size, replace=False)] for f in (fake, real)]
        values[i] = _mmd2(*rows)
    value = values.mean()
    low, high = value + (np.quantile(values, LEVELS) - value) * np.sqrt(size / (n - size))
    return Interval(float(value), float(low), float(high))


def _mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate of MMD² of rows [m, D] each (Gretton et al. 2012, JMLR 13, eq. 3)."""
    m, width = x.shape
    xx, yy, xy = ((a @ b.T / width + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (m * (m - 1))
    return float(within - 2 * xy.mean())
