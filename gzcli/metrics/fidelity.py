"""FID, KID, IS, precision and recall by torch-fidelity, in the features of Inception or of a LeNet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
    """Figures under torch-fidelity's own names.

    fake: generated images, uint8 [N, C, H, W].
    real: real images, uint8 [M, C, H, W].
    extractor: "inception-v3-compat", for which grey images get three channels, or a name from `register`.
    metrics: keys of `KEYS`.
    weights: the file of Inception's weights.
    cache: the name of the features of `real` in the user's cache; None: they are not cached.
    device: where Inception computes.
    subsets: number of subsets, of at most 1000 images, over which KID is averaged.
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
    """Registers a LeNet as a feature extractor of torch-fidelity and returns its name. Its inception score
    uses its own classes."""
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

    class Extractor(FeatureExtractorBase):
        """Features float64 [B, 64] of images uint8 [B, C, H, W]."""

        def __init__(self, name: str, features_list: list[str], **kwargs: Any):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return (str(FEATURES), "logits")

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits" if metric == "isc" else str(FEATURES)

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            u8 = images.cpu().numpy()
            made = {str(FEATURES): lenet.features, "logits": lenet.logits}
            return tuple(torch.from_numpy(made[name](u8)) for name in self.features_list)

    name = f"lenet-{lenet.hash}"
    FEATURE_EXTRACTORS_REGISTRY.pop(name, None)
    register_feature_extractor(name, Extractor)
    return name


def inception_weights(path: str | Path | None = None) -> tuple[Path, str]:
    """The file of Inception's weights and its sha256.

    Raises MissingError with the name and the folder of a missing file, UsageError for a file with other
    content.

    path: the file; None: the one in the user's cache.
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
    """Images uint8 [N, C, H, W] as the data set that torch-fidelity reads."""

    def __init__(self, images: np.ndarray, *, as_rgb: bool):
        self.images, self.as_rgb = images, as_rgb

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Any:
        image = torch.from_numpy(np.array(self.images[i]))
        return image.expand(3, -1, -1) if self.as_rgb and len(image) == 1 else image
