"""An alarm from good images only: a method and its calibration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gzcli.metrics.alarms.choice import MAX_HELD_OUT_IMAGES, Choice, choose, set_aside
from gzcli.metrics.alarms.cross import Calibrated, cross, split
from gzcli.metrics.alarms.fitted import Fitted
from gzcli.metrics.alarms.methods import METHODS

MIN_SPLIT_IMAGES = 2000  # from this number of good images, some are only used to calibrate, without folds
MAX_FITTED_IMAGES = 2000  # most images to fit methods to
CALIBRATING = 10_000  # most images to calibrate with


@dataclass(frozen=True)
class Alarm:
    choice: Choice
    calibrated: Calibrated
    fitted_on: int  # approximate number of images that each model was fitted to


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
        return Alarm(choice, folds, len(images) - len(images[aside:]) // len(folds.models))
    if held_out is None:
        fitted = min(MAX_FITTED_IMAGES, len(images) // 2) if method.fits else aside
        images, held_out = images[:fitted], images[fitted : fitted + CALIBRATING]
    images = images[:MAX_FITTED_IMAGES]
    return Alarm(choice, split(fit(images), held_out, tails=method.tails), len(images))
