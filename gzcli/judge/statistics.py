"""Means and covariances of real images as files that other tools write and read: `mu` and `sigma` in an
`.npz`, as pytorch-fid and clean-fid have them."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gzcli.core.errors import MissingError, UsageError
from gzcli.judge.figures import WIDTHS
from gzcli.judge.image_sets import ImageSet, Space
from gzcli.metrics.frechet import Moments, moments
from gzcli.store import arrays, files

SpaceOf = Callable[[str], Space | None]  # the feature space of a metric

UNKNOWN = 2**62  # images of statistics that do not say how many there were


@dataclass(frozen=True)
class Statistics:
    """The Gaussian of real images' features."""

    metric: str  # the Fréchet distance that it is for: "fd", "fd_lite", "fid", "fd_dinov2" or "fd_clip"
    moments: Moments  # mean, covariance and number of images
    facts: dict[str, Any]  # what the file says beside them


def metric_of(metrics: Sequence[str]) -> str:
    """The Fréchet distance among the metrics whose statistics are meant. Raises UsageError where there is not
    exactly one."""
    asked = [name for name in metrics if name in WIDTHS]
    if len(asked) != 1:
        hint = "`--metrics fid` for files of pytorch-fid and clean-fid, `fd` for the features of the set"
        raise UsageError(f"statistics are of one Fréchet distance, not of {len(asked)}", hint=hint)
    return asked[0]


def write(path: Path, real: ImageSet, metrics: Sequence[str], space_of: SpaceOf) -> None:
    """Writes `mu` [D] and `sigma` [D, D] of real images, with the number of images and the features' hash.

    Raises UsageError where the metrics do not say which.
    """
    metric = metric_of(metrics)
    space = space_of(metric)
    found = moments(real.features(space)[:, : WIDTHS[metric]])
    file, name = io.BytesIO(), np.array(space.hash if space else "")
    np.savez(file, mu=found.mean, sigma=found.covariance, n=np.array(found.n), features=name)
    files.write_atomic(path, file.getvalue())


def read(path: Path, metrics: Sequence[str], space_of: SpaceOf) -> Statistics:
    """The statistics in a file; the parameters are those of `write`.

    Raises UsageError for a file that is none, or of other features.
    """
    metric = metric_of(metrics)
    space = space_of(metric)
    hint, width = "statistics are arrays `mu` and `sigma`", WIDTHS[metric]
    try:
        held = arrays.arrays(path, "mu", "sigma")
        with arrays.reading(path):
            mu, sigma = (np.asarray(held[name], np.float64) for name in ("mu", "sigma"))
            n = int(held["n"]) if "n" in held else UNKNOWN
            if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
                raise ValueError("it holds numbers that are not finite")
    except MissingError as e:
        raise UsageError(f"no npz of statistics: {e.message}", hint=hint) from e
    if mu.shape != (width,) or sigma.shape != (width, width):
        raise UsageError(
            f"`{path}` has `mu` of shape {mu.shape} and `sigma` of {sigma.shape}: "
            f"`{metric}` has {width} features"
        )
    theirs = str(held["features"]) if "features" in held else None
    if theirs and space and theirs != space.hash:
        raise UsageError(
            f"`{path}` is of other features than `{metric}` has here ({theirs[:8]}, not {space.hash[:8]})",
            hint="a LeNet is of one data set: compare on the same `--data`, or by `fid`",
        )
    facts = {"file": str(path), "n": n if "n" in held else None, "features": theirs}
    return Statistics(metric, Moments(mu, sigma, n), facts)
