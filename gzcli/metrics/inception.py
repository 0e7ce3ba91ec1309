"""The feature space of FID, KID and IS: Inception as torch-fidelity has it, whose weights are fetched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from gzcli.core.errors import UsageError
from gzcli.store import files
from gzcli.store.hub import INCEPTION
from gzcli.store.hub import weights as find_weights

if TYPE_CHECKING:
    from gzcli.data.packs.stream import Pictures

FEATURES = 2048  # pooled features of an image; its logits of 1,008 classes stand behind them
LAYERS = ("2048", "logits_unbiased")


@dataclass
class InceptionFeatures:
    """Torch-fidelity's port of the Inception of TensorFlow that FID is defined by (`inception-v3-compat`)."""

    net: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
    hash: str  # of the file of its weights
    device: torch.device
    batch: int = field(default=32, repr=False)  # number of images in a forward pass

    @torch.no_grad()
    def features(self, images: np.ndarray | Pictures) -> np.ndarray:
        """float64 [N, 2048 + 1008]: the pooled features and the logits of one pass of uint8 [N, C, H, W],
        resized to 299×299 inside; grey images are repeated to three channels."""
        parts = []
        for i in range(0, len(images), self.batch):
            x = torch.from_numpy(np.array(images[i : i + self.batch])).to(self.device)
            parts.append(torch.cat(self.net(x.expand(-1, 3, -1, -1)), 1).double().cpu().numpy())
        return np.concatenate(parts)


def inception(path: str | Path | None = None, device: torch.device | str = "cpu") -> InceptionFeatures:
    """The network with its weights; parameters and errors as of `inception_weights`."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    file, digest = inception_weights(path)
    net = FeatureExtractorInceptionV3(
        "inception-v3-compat", list(LAYERS), feature_extractor_weights_path=str(file)
    )
    return InceptionFeatures(net.eval().requires_grad_(False).to(device), digest, torch.device(device))


def inception_weights(path: str | Path | None = None) -> tuple[Path, str]:
    """The file of Inception's weights and its sha256."""
    use, source = "FID, KID and IS, by Inception,", "torch-fidelity's releases (v0.2.0)"
    otherwise = ", or name it with `--weights FILE`"
    file = find_weights(INCEPTION, path=path, use=use, source=source, otherwise=otherwise)
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
