"""An alarm from good images only: a method and its calibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gzcli.metrics import conformal
from gzcli.metrics.alarms.choice import MAX_HELD_OUT_IMAGES, Choice, choose, set_aside
from gzcli.metrics.alarms.cross import AT_ONCE, Calibrated, cross, split
from gzcli.metrics.alarms.defects import DEFECT_KINDS, synthetic
from gzcli.metrics.alarms.fitted import Fitted
from gzcli.metrics.alarms.methods import METHODS

MIN_SPLIT_IMAGES = 2000  # from this number of good images, some are only used to calibrate, without folds
MAX_FITTED_IMAGES = 2000  # most images to fit methods to
PROBES_PER_KIND, PROBED_MODELS = 12, 4  # synthetic defects of each kind, and models that judge them
CALIBRATING = 10_000  # most images to calibrate with


@dataclass(frozen=True)
class Alarm:
    choice: Choice
    calibrated: Calibrated
    fitted_on: int  # approximate number of images that each model was fitted to
    # the p-values of synthetic defects of each kind, on images to which the model was not fitted
    power: Mapping[str, tuple[float, ...]]


def calibrate(
    images: np.ndarray,
    name: str,
    *,
    held_out: np.ndarray | None = None,
    needed: int = 0,
) -> Alarm:
    """A method fitted to good images, uint8 [N, C, H, W], and calibrated. It is calibrated on `held_out`
    images if there are any, otherwise by cross-validation, or on a share of very many images. The images by
    which its settings are chosen do not calibrate, so the choice may depend on them in any way. If fewer than
    `needed` images would be left to calibrate, no choice is made."""
    order = np.random.default_rng(0).permutation(len(images))
    images = images[order]
    aside = set_aside(len(images), name, needed if held_out is None else 0)
    choice = choose(images[: min(aside, MAX_HELD_OUT_IMAGES)], name)
    method = METHODS[name]

    def fit(some: np.ndarray) -> Fitted:
        return method.fit(some, **choice.settings)

    if held_out is None and method.fits and len(images) < MIN_SPLIT_IMAGES:
        folds = cross(images[aside:], fit, spare=images[:aside], tails=method.tails)
        fitted_on = len(images) - len(images[aside:]) // len(folds.models)
        return Alarm(choice, folds, fitted_on, power_of(folds, images[aside:]))
    if held_out is None:
        fitted = min(MAX_FITTED_IMAGES, len(images) // 2) if method.fits else aside
        images, held_out = images[:fitted], images[fitted : fitted + CALIBRATING]
    images = images[:MAX_FITTED_IMAGES]
    calibrated = split(fit(images), held_out, tails=method.tails)
    return Alarm(choice, calibrated, len(images), power_of(calibrated, held_out))


def power_of(calibrated: Calibrated, images: np.ndarray) -> dict[str, tuple[float, ...]]:
    """The p-values of synthetic defects of each kind, drawn on the images that calibrated, and judged by a
    model that was not fitted to these."""
    models = range(min(PROBED_MODELS, len(calibrated.models)))
    p: dict[str, list[float]] = {kind: [] for kind in DEFECT_KINDS}
    for k in models:
        good = images[calibrated.fold == k]
        bad, kinds, _ = synthetic(good, each=PROBES_PER_KIND // len(models), seed=1 + k, kinds=DEFECT_KINDS)
        some = (bad[i : i + AT_ONCE] for i in range(0, len(bad), AT_ONCE))
        scores = np.concatenate([calibrated.models[k].score(each) for each in some])
        values = conformal.p_values(calibrated.held_out, scores, tails=calibrated.tails)
        for kind, value in zip(kinds, values.tolist(), strict=True):
            p[kind].append(value)
    return {kind: tuple(values) for kind, values in p.items()}
