"""FID, KID, IS, precision and recall by torch-fidelity, on Inception's features or on a LeNet's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from gzcli.errors import UsageError
from gzcli.metrics.features import FEATURES, LeNetFeatures
from gzcli.store import files
from gzcli.store.paths import cache_dir
from gzcli.store.weights import INCEPTION
from gzcli.store.weights import weights as find_weights

KEYS = {
    "isc": ("inception_score_mean",),
    "fid": ("frechet_inception_distance",),
    "kid": ("kernel_inception_distance_mean",),
    "prc": ("precision", "recall"),
}


def fidelity(
    fake: np.ndarray,
    real: np.ndarray,
    *,
    extractor: str,
    metrics: tuple[str, ...],
    weights: Path | None = None,
    cache: str | None = None,
    device: torch.device | str = "cpu",
    subsets: int = 100,
) -> dict[str, float]:
    """`metrics` (of isc, fid, kid, prc) of uint8 images [N, C, H, W], under torch-fidelity's own names.

    extractor: "inception-v3-compat" (with `weights`; grey images repeated to three channels) or from
    `register`.
    cache: a name under which the features of `real` are kept in the user's cache. KID subsets have min(1000,
    N) images.
    """
    from torch_fidelity import calculate_metrics

    lenet = extractor.startswith("lenet-")
    sides = [_Images(images, as_rgb=not lenet) for images in (fake, real)]
    found = calculate_metrics(
        input1=sides[0],
        input2=sides[1],
        cuda=torch.device(device).type == "cuda",
        batch_size=100 if lenet else 32,
        feature_extractor=extractor,
        feature_extractor_weights_path=None if weights is None else str(weights),
        kid_subsets=subsets,
        kid_subset_size=min(1000, len(fake), len(real)),
        prc_batch_size=2000,
        save_cpu_ram=True,
        cache=cache is not None,
        cache_root=str(cache_dir("features", "torch-fidelity")),
        input2_cache_name=cache,
        verbose=False,
        **{name: name in metrics for name in KEYS},
    )
    return {key: float(found[key]) for name in metrics for key in KEYS[name]}


def register(lenet: LeNetFeatures) -> str:
    """Makes a LeNet known to torch-fidelity; returns the name to ask for. Its IS is over its own classes."""
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

    class Extractor(FeatureExtractorBase):
        """Features float64 [B, 64] of images uint8 [B, C, H, W]."""

        def __init__(self, name, features_list, **kwargs):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list():
            return (str(FEATURES), "logits")

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "logits" if metric == "isc" else str(FEATURES)

        @staticmethod
        def can_be_compiled():
            return False

        def forward(self, images):
            images = images.cpu().numpy()
            made = {str(FEATURES): lenet.features, "logits": lenet.logits}
            return tuple(torch.from_numpy(made[name](images)) for name in self.features_list)

    name = f"lenet-{lenet.hash}"
    FEATURE_EXTRACTORS_REGISTRY.pop(name, None)
    register_feature_extractor(name, Extractor)
    return name


def inception_weights(path: str | Path | None = None) -> tuple[Path, str]:
    """Inception's weights, `path` or the file in the user's cache, and their sha256.

    Raises MissingError that says which file to put where, UsageError for a file that is something else.
    """
    use, source = "FID, KID and IS, by Inception,", "torch-fidelity's releases (v0.2.0)"
    file = find_weights(INCEPTION, path=path, use=use, source=source)
    try:  # torch-fidelity unpickles freely; a file that passes here holds tensors only
        state = torch.load(file, map_location="meta", weights_only=True)
    except Exception as e:
        raise UsageError(f"`{file}` is not a file of weights: {type(e).__name__}") from e
    if not isinstance(state, dict) or "Mixed_7c.branch1x1.conv.weight" not in state:
        raise UsageError(
            f"`{file}` does not hold the weights of torch-fidelity's Inception",
            hint=f"its name is `{INCEPTION}`",
        )
    return file, files.checksum(file)


class _Images(torch.utils.data.Dataset):
    """uint8 [N, C, H, W] as torch-fidelity reads it."""

    def __init__(self, images: np.ndarray, *, as_rgb: bool):
        self.images, self.as_rgb = images, as_rgb

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Any:
        image = torch.from_numpy(np.array(self.images[i]))
        return image.expand(3, -1, -1) if self.as_rgb and len(image) == 1 else image
