"""The methods without training, by name. A new one is an entry of `METHODS`. No heavy import at the top,
because the command line reads the names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from gzcli.core.units import Size, as_size

if TYPE_CHECKING:
    from gzcli.data.packs.facts import Facts
    from gzcli.metrics.alarms.fitted import Fitted

MAX_METHOD_SIDE = 128  # length in pixels to which the longer side of larger images is reduced


@dataclass(frozen=True)
class Method:
    about: str  # the meaning of its score, for help and tables
    # function that fits it, such as `pca.fit_pca`: images uint8 [N, C, H, W] and settings → `Fitted`
    function: str
    mapped: bool = False  # whether it maps where an image is unusual
    local: bool = False  # whether its score measures the most unusual place, not the whole image
    reduces: bool = False  # whether it reduces images by a setting `factor`
    fits: bool = True  # whether it depends on good images at all
    tails: int = 1  # 2 if low values are unusual too

    @property
    def fit(self) -> Callable[..., Fitted]:
        module, _, name = self.function.partition(".")
        function: Any = getattr(import_module(f"gzcli.metrics.alarms.{module}"), name)
        return function


DEFAULT_METHOD = "combined"  # method of an alarm without a model, the baseline for those with one
LOCAL = "local"  # scores of a run that are the maximum of a map, like `local.Local`

METHODS: dict[str, Method] = {
    "combined": Method(
        "the mean of the two highest of several scores", "combined.fit_combined", mapped=True, local=True
    ),
    "pca_local": Method(
        "the residual of a PCA where it is most unusual",
        "pca.fit_pca_local",
        reduces=True,
        mapped=True,
        local=True,
    ),
    "pca_patch": Method(
        "like `pca_local` around each place, relative to its covariance",
        "neighbourhoods.fit_pca_patch",
        reduces=True,
        mapped=True,
        local=True,
    ),
    "knn_patch": Method(
        "the distance of the patch that is farthest from patches of good images",
        "patches.fit_knn_patch",
        reduces=True,
        mapped=True,
        local=True,
    ),
    "patchcore": Method(
        "the place that is farthest from good ones in features of EfficientNet-Lite0",
        "patches.fit_patchcore",
        mapped=True,
        local=True,
    ),
    "knn_features": Method(
        "the distance to the fifth nearest good image, in features of EfficientNet-Lite0",
        "whole.fit_knn_features",
    ),
    "pca": Method("the mean residual of a PCA", "pca.fit_pca", mapped=True, reduces=True),
    "knn_pixels": Method("the distance to the fifth nearest good image, in pixels", "whole.fit_knn_pixels"),
    "png": Method("the size of the image as a PNG, in bytes", "whole.fit_png", fits=False, tails=2),
    "mean": Method("the mean of all pixels", "whole.fit_mean", fits=False, tails=2),
}


def reduced_size(facts: Facts | None) -> Size | None:
    """The size to which methods reduce larger images; None for no change."""
    if facts is None or max(facts.height, facts.width) <= MAX_METHOD_SIDE:
        return None
    scale = MAX_METHOD_SIDE / max(facts.height, facts.width)
    return as_size(max(8, round(facts.height * scale)), max(8, round(facts.width * scale)))


def is_local(score: str) -> bool:
    """Whether a score measures the most unusual place of an image rather than the whole image."""
    return score == LOCAL or (score in METHODS and METHODS[score].local)
