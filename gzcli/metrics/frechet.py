"""The Fréchet distance of Gaussians fitted to two sets of features (Heusel et al. 2017, arXiv:1706.08500, eq.
6)."""

from __future__ import annotations

import numpy as np

from gzcli.errors import UsageError


def frechet_distance(f1: np.ndarray, f2: np.ndarray) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½) of features [N1, D] and [N2, D], in float64.

    Raises UsageError for fewer than two rows, different widths or features that are not finite.
    """
    f1, f2 = (np.asarray(f, np.float64) for f in (f1, f2))
    if f1.ndim != 2 or f2.ndim != 2 or f1.shape[1] != f2.shape[1]:
        raise UsageError(f"features of shapes {f1.shape} and {f2.shape} cannot be compared")
    if min(len(f1), len(f2)) < 2:
        raise UsageError("a Fréchet distance needs at least two images on each side")
    if not (np.isfinite(f1).all() and np.isfinite(f2).all()):
        raise UsageError("some features are not finite")
    difference = f1.mean(0) - f2.mean(0)
    s1, s2 = (np.atleast_2d(np.cov(f, rowvar=False)) for f in (f1, f2))
    # Σ₁Σ₂ has the eigenvalues of the symmetric matrix Σ₁^½ Σ₂ Σ₁^½. They are real and, but for rounding, not
    # negative: the square root needs no complex numbers, and no ε on the diagonal of singular covariances.
    values, vectors = np.linalg.eigh(s1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ s2 @ root).clip(0)).sum()
    return float(difference @ difference + np.trace(s1) + np.trace(s2) - 2 * cross)
