"""The Fréchet distance of Gaussians that are fitted to two sets of features (Heusel et al. 2017,
arXiv:1706.08500, eq. 6). Training imports it too, so there is no heavy import at the top."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from gzcli.core.errors import UsageError

if TYPE_CHECKING:
    from gzcli.metrics.metric import Array


class Moments(NamedTuple):
    mean: Array
    covariance: Array


def moments(features: Array) -> Moments:
    import numpy as np

    features = rows_of(features)
    return Moments(features.mean(0), np.atleast_2d(np.cov(features, rowvar=False)))


def rows_of(features: Array) -> Array:
    """Features [N, D] in float64. Raises UsageError if there are fewer than two rows, or if values are not
    finite."""
    import numpy as np

    features = np.asarray(features, np.float64)
    if features.ndim != 2:
        raise UsageError(f"features must have the shape [N, D], not {features.shape}")
    if len(features) < 2:
        raise UsageError("a Fréchet distance needs at least two images in each set")
    if not np.isfinite(features).all():
        raise UsageError("some features are not finite")
    return features


def check_widths(width_a: int, width_b: int) -> None:
    if width_a != width_b:
        raise UsageError(f"features of widths {width_a} and {width_b} cannot be compared")


def frechet_of_moments(a: Moments, b: Moments) -> float:
    import numpy as np

    check_widths(len(a.mean), len(b.mean))
    difference = a.mean - b.mean
    # Σ₁Σ₂ has the eigenvalues of the symmetric matrix Σ₁^½ Σ₂ Σ₁^½. They are real and, but for rounding, not
    # negative: the square root needs no complex numbers, and no ε on the diagonal of singular covariances.
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b.covariance @ root).clip(0)).sum()
    return float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


def frechet_distance(f1: Array, f2: Array) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½) of features [N1, D] and [N2, D], in float64."""
    import numpy as np

    f1, f2 = rows_of(f1), rows_of(f2)
    if max(len(f1), len(f2)) >= f1.shape[1] or f1.shape[1] != f2.shape[1]:
        return frechet_of_moments(moments(f1), moments(f2))
    # With Σ = AᵀA, tr (Σ₁Σ₂)^½ is the sum of the singular values of A₁A₂ᵀ, [N1, N2]: the same distance, in
    # less time if there are fewer rows than features.
    a1, a2 = ((f - f.mean(0)) / np.sqrt(len(f) - 1) for f in (f1, f2))
    difference = f1.mean(0) - f2.mean(0)
    cross = np.linalg.svd(a1 @ a2.T, compute_uv=False).sum()
    return float(difference @ difference + np.square(a1).sum() + np.square(a2).sum() - 2 * cross)
