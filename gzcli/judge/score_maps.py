"""Where a model finds a picture anomalous: a heat map beside the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from gzcli.core import ranks
from gzcli.core.errors import UsageError
from gzcli.core.types import Batch
from gzcli.engine.trained import Trained
from gzcli.judge.images import Images
from gzcli.judge.scores import fresh_noise
from gzcli.metrics.likelihood_scores import SCORES
from gzcli.models.base import Model
from gzcli.models.options import defaults, grouped

BRIGHT = 0.995  # the quantile of a map that has the brightest colour


def map_of(model: Model, scores: Sequence[str], name: str) -> str:
    """The name of the map that explains scores best: that of the first score which has one, `nll` where it is
    made of the likelihood, else the first map that the model has.

    Raises UsageError for a model without maps.
    """
    found = sorted(each.removeprefix("map_") for each in dir(type(model)) if each.startswith("map_"))
    if not found:
        raise UsageError(
            f"`{name}` does not say where a picture is anomalous", hint="gz list models --can map"
        )
    made_of = {score: "nll" if score in SCORES or score == "waic" else score for score in scores}
    return next((made_of[score] for score in scores if made_of[score] in found), found[0])


def score_maps(trained: Trained, name: str, images: Images, options: Mapping[str, Any]) -> np.ndarray:
    """The maps `name` of images, float32 [N, H, W] in the images' own size; each process makes its share.

    Maps of latents are enlarged.
    """
    method = getattr(trained.model, f"map_{name}")
    known = defaults(method)
    taken = grouped(method, {key: value for key, value in options.items() if key in known})
    _, height, width = trained.images.shape

    def work(batch: Batch) -> dict[str, np.ndarray]:
        seen = trained.seen(batch)
        with trained.scoring(), torch.no_grad():
            found = method(seen.x, noise=fresh_noise(images.seed, seen), **taken)
        whole = torch.nn.functional.interpolate(found[:, None].float(), (height, width), mode="nearest")
        return {"map": whole[:, 0].cpu().numpy()}

    return ranks.over(images, work)["map"]


def heat(maps: np.ndarray, usual: float) -> np.ndarray:
    """Maps [N, H, W] as pictures in false colours, uint8 [N, 3, H, W].

    Black is 0 or less. The brightest colour stands for the upper values of the map itself, but never for less
    than `usual`, so that maps of ordinary pictures stay dark. A value that is not finite has it, too.
    """
    from matplotlib import colormaps

    finite = np.isfinite(maps)
    maps = np.where(finite, maps, 0)
    top = np.maximum(np.quantile(maps.reshape(len(maps), -1), BRIGHT, axis=1), usual)
    share = np.where(finite, maps / np.maximum(top, 1e-12)[:, None, None], 1).clip(0, 1)
    return (colormaps["inferno"](share)[..., :3] * 255).round().astype(np.uint8).transpose(0, 3, 1, 2)


def upper(maps: np.ndarray) -> float:
    """The upper value of maps [N, H, W], the mean over the images of a high quantile of each."""
    return float(np.quantile(maps.reshape(len(maps), -1), BRIGHT, axis=1).mean())
