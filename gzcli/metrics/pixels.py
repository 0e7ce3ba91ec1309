"""How well maps localise the defects of images, compared with masks of the defects. A higher map value is
more anomalous. Pixels of defects are the positive class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MAX_OVERLAP_RATE = 0.3  # the overlap of regions is integrated up to this false-positive rate


def pixel_figures(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> dict[str, float] | None:
    """The metrics of maps, float [H, W], against masks, bool [H, W] of the same sizes. None if no pixel or
    every pixel belongs to a defect. NaN in a map counts as the highest value.

    pixel_auroc: area under the ROC curve of all pixels.
    aupro: area under the curve of the mean overlap with defect regions over the false-positive rate of
      pixels, up to `LIMIT` and divided by it (Bergmann et al. 2021, doi:10.1007/s11263-020-01400-4). A region
      consists of pixels that touch, including at corners.
    pixel_f1: F1 of pixels at the best threshold.
    """
    from sklearn.metrics import auc

    weights = np.concatenate([region_weights(mask).ravel() for mask in masks])
    values = np.concatenate([np.asarray(each, np.float64).ravel() for each in maps])
    values[np.isnan(values)] = np.inf
    regions, positive = weights.sum(), int((weights > 0).sum())
    if not 0 < positive < len(weights):
        return None
    order = np.argsort(-values, kind="stable")
    ordered, weights = values[order], weights[order]
    ends = np.append((ordered[1:] != ordered[:-1]).nonzero()[0], len(ordered) - 1)  # of equal values
    hits, overlap = (np.append(0, np.cumsum(each)[ends]) for each in (weights > 0, weights))
    false = np.append(0, ends + 1) - hits
    fpr, tpr, overlap = false / false[-1], hits / positive, overlap / regions
    inside = fpr <= MAX_OVERLAP_RATE
    x = np.append(fpr[inside], MAX_OVERLAP_RATE)
    y = np.append(overlap[inside], np.interp(MAX_OVERLAP_RATE, fpr, overlap))
    return {
        "pixel_auroc": float(auc(fpr, tpr)),
        "aupro": float(auc(x, y)) / MAX_OVERLAP_RATE,
        "pixel_f1": float((2 * hits / (hits + false + positive)).max()),
    }


def region_weights(mask: np.ndarray) -> np.ndarray:
    """1 / the number of pixels of the region that a pixel is in, float64 [H, W]; 0 outside all regions."""
    from scipy import ndimage

    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    shares = 1 / np.bincount(labels.ravel()).clip(1)
    shares[0] = 0
    return shares[labels]
