"""Figures of maps against masks: held against scikit-learn, and AUPRO against its definition by loops."""

import itertools

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import precision_recall_curve, roc_auc_score

from gzcli.metrics.pixels import pixel_figures


def drawn(seed, *, ties):
    """Maps that are higher within random masks, which touch borders and each other; the first has none."""
    rng = np.random.default_rng(seed)
    shapes = [(9, 12), (9, 12), (20, 17), (16, 16)]
    masks = [ndimage.gaussian_filter(rng.standard_normal(shape), 1.5) > 0.2 for shape in shapes]
    masks[0][:] = False
    maps = [rng.standard_normal(shape) + mask for shape, mask in zip(shapes, masks, strict=True)]
    return [np.round(each, 1) if ties else each for each in maps], masks


def naive_aupro(maps, masks, limit=0.3):
    """The curve by every threshold and every region, one after another."""
    regions, sound = [], np.concatenate([m[~k] for m, k in zip(maps, masks, strict=True)])
    for each, mask in zip(maps, masks, strict=True):
        labels, count = ndimage.label(mask, [[1] * 3] * 3)
        regions += [each[labels == i] for i in range(1, count + 1)]
    curve = [(0.0, 0.0)]
    for threshold in sorted({float(v) for each in maps for v in each.ravel()}, reverse=True):
        overlap = np.mean([(region >= threshold).mean() for region in regions])
        curve.append(((sound >= threshold).mean(), overlap))
    area = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x0 >= limit:
            break
        if x1 > limit:
            x1, y1 = limit, y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
        area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


@pytest.mark.parametrize("ties", [False, True])
def test_figures_of_pixels_against_scikit_learn_and_the_definition(ties):
    for seed in range(5):
        maps, masks = drawn(seed, ties=ties)
        figures = pixel_figures(maps, masks)
        truth = np.concatenate([mask.ravel() for mask in masks])
        values = np.concatenate([each.ravel() for each in maps])
        assert figures["pixel_auroc"] == pytest.approx(roc_auc_score(truth, values), abs=1e-12)
        precision, recall, _ = precision_recall_curve(truth, values)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        assert figures["pixel_f1"] == pytest.approx(f1.max(), abs=1e-12)
        assert figures["aupro"] == pytest.approx(naive_aupro(maps, masks), abs=1e-12)


def test_small_regions_count_as_much_as_large_ones():
    """Half of the regions, though a tenth of the pixels, is half of the overlap; corners join a region."""
    mask = np.zeros((30, 30), bool)
    mask[0:9, 0:1] = mask[20, 20] = True
    estimate = np.where(mask, 1.0, 0.0)
    assert pixel_figures([estimate], [mask])["aupro"] == 1
    estimate[20, 20] = -1.0
    # all other pixels are equal: the curve is a line from (0, ½) to (1, ½), and 1 where every pixel counts
    assert pixel_figures([estimate], [mask])["aupro"] == pytest.approx(0.5)
    corner = mask.copy()
    corner[9, 1] = True
    shown = np.where(corner, 1.0, 0.0)
    shown[9, 1] = shown[20, 20] = -1.0
    assert pixel_figures([shown], [corner])["aupro"] == pytest.approx((0.9 + 0) / 2)


def test_what_has_no_figures_and_what_is_not_finite():
    blank, full = np.zeros((4, 4), bool), np.ones((4, 4), bool)
    assert pixel_figures([np.ones((4, 4))], [blank]) is None
    assert pixel_figures([np.ones((4, 4))], [full]) is None
    mask = blank.copy()
    mask[1, 1] = True
    for highest in (np.inf, np.nan):
        shown = np.zeros((4, 4))
        shown[1, 1] = highest
        assert pixel_figures([shown], [mask]) == {"pixel_auroc": 1, "aupro": 1, "pixel_f1": 1}
