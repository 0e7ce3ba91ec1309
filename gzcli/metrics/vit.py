"""The feature spaces of DINOv2 and of CLIP: vision transformers (Dosovitskiy et al. 2021, arXiv:2010.11929)
whose weights are fetched when a metric names them.

DINOv2's ViT-L/14 is the space of Stein et al. 2023, arXiv:2306.04675, and of the FD that EDM2 reports; CLIP's
ViT-B/32 that of Kynkäänniemi et al. 2023, arXiv:2203.06026. Pictures come to them as to these papers' code:
enlarged by Pillow's bicubic filter to 224 pixels, in bytes, CLIP's cut to a square.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzcli.core.errors import UsageError
from gzcli.store import files
from gzcli.store.weights import CLIP, DINOV2, weights

if TYPE_CHECKING:
    from gzcli.data.packs.stream import Pictures

SIDE = 224  # of the pictures that the networks read, as in both papers
HEAD = 64  # width of a head of attention, in every size of both networks
OFFSET = 0.1  # which DINOv2 adds to the side, in patches, where it resizes its table of positions
Names = Mapping[str, str]  # the published name of each weight, by ours


class Block(nn.Module):
    """Attention and a perceptron, each after a normalisation and added to its input."""

    def __init__(self, width: int, inner: int, activation: Callable[[Tensor], Tensor], eps: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] of tokens [B, T, D]."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """A vision transformer whose sizes are those of its weights."""

    def __init__(self, state: Mapping[str, Tensor], activation: Callable[[Tensor], Tensor], eps: float):
        super().__init__()
        kernel, depth = state["patches.weight"], 1 + max(_block(name) for name in state)
        width, inner = len(kernel), len(state["blocks.0.fc1.weight"])
        with torch.device("meta"):  # no draw from the global generator
            self.cls = nn.Parameter(torch.empty(width))
            self.positions = nn.Parameter(torch.empty(state["positions"].shape))
            self.patches = nn.Conv2d(
                3, width, kernel.shape[-1], kernel.shape[-1], bias="patches.bias" in state
            )
            self.pre = nn.LayerNorm(width, eps) if "pre.weight" in state else nn.Identity()
            self.blocks = nn.Sequential(*(Block(width, inner, activation, eps) for _ in range(depth)))
            self.norm = nn.LayerNorm(width, eps)
            head = state.get("head.weight")
            self.head = nn.Identity() if head is None else nn.Linear(width, len(head), bias=False)
        self.load_state_dict(dict(state), assign=True)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D]: the first token at the end, of normalised pictures [B, 3, S, S]."""
        patches = self.patches(x).flatten(2).mT
        x = torch.cat([self.cls.expand(len(x), 1, -1), patches], 1) + self.positions
        return self.head(self.norm(self.blocks(self.pre(x))[:, 0]))


@dataclass
class ViTFeatures:
    """A vision transformer as a feature space."""

    net: nn.Module  # the network
    hash: str  # of the file of its weights
    device: torch.device  # where it computes
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    cut: bool  # whether pictures that are not square are cut; if not, they are squeezed
    batch: int = field(default=32, repr=False)  # number of images in a forward pass

    @torch.no_grad()
    def features(self, images: np.ndarray | Pictures) -> np.ndarray:
        """float64 [N, D] of uint8 [N, C, H, W]; grey images are repeated to three channels."""
        mean, std = (torch.tensor(v, device=self.device)[:, None, None] for v in (self.mean, self.std))
        parts = []
        for i in range(0, len(images), self.batch):
            x = prepared(np.asarray(images[i : i + self.batch]), cut=self.cut).to(self.device)
            parts.append(self.net((x.float() / 255 - mean) / std).double().cpu().numpy())
        return np.concatenate(parts)


def dinov2(device: torch.device | str = "cpu") -> ViTFeatures:
    """The network with its weights; 1,024 features. Errors as of `network`."""
    net, digest = network(DINOV2, of_dinov2, F.gelu, 1e-6, source="dinov2's ViT-L/14")
    colours = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return ViTFeatures(net.to(device), digest, torch.device(device), *colours, cut=False)


def clip(device: torch.device | str = "cpu") -> ViTFeatures:
    """The network with its weights; 512 features, those that are compared with texts. Errors as of `network`."""
    net, digest = network(
        CLIP, of_clip, quick_gelu, 1e-5, source="`openai/clip-vit-base-patch32` (its `pytorch_model.bin`)"
    )
    colours = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return ViTFeatures(net.to(device), digest, torch.device(device), *colours, cut=True)


def quick_gelu(x: Tensor) -> Tensor:
    """The activation of CLIP."""
    return x * torch.sigmoid(1.702 * x)


def network(
    name: str,
    by_our_names: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    activation: Callable[[Tensor], Tensor],
    eps: float,
    *,
    source: str,
) -> tuple[ViT, str]:
    """The network of a file of the cache, and the sha256 of the file.

    Raises MissingError that says where to put the file, UsageError for one of other content.
    """
    file = weights(name, use="features of a vision transformer", source=source)
    try:
        net = ViT(by_our_names(torch.load(file, map_location="cpu", weights_only=True)), activation, eps)
    except Exception as e:  # pickles break in many ways
        raise UsageError(
            f"`{file}` does not hold the weights of {source}: {type(e).__name__}: {e}",
            hint="remove it: it is fetched again",
        ) from e
    return net.float().eval().requires_grad_(False), files.checksum(file)


def of_dinov2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of DINOv2 by our names: the factors of its branches are put into the branches' last layers,
    and its table of positions is resized to pictures of 224 pixels."""
    found = _renamed(
        state,
        {
            "cls": "cls_token",
            "positions": "pos_embed",
            "patches": "patch_embed.proj",
            "norm": "norm",
        },
        "blocks.{}.",
        {
            **{name: name for name in ("norm1", "norm2")},
            "qkv": "attn.qkv",
            "out": "attn.proj",
            "fc1": "mlp.fc1",
            "fc2": "mlp.fc2",
            "scale1": "ls1.gamma",
            "scale2": "ls2.gamma",
        },
    )
    for i in range(1 + max(map(_block, found))):
        for layer, scale in (("out", "scale1"), ("fc2", "scale2")):
            factor = found.pop(f"blocks.{i}.{scale}")
            for kind in ("weight", "bias"):
                name = f"blocks.{i}.{layer}.{kind}"
                found[name] = factor.reshape(-1, *[1] * (found[name].ndim - 1)) * found[name]
    found["cls"] = found["cls"].flatten()
    first, table = found["positions"][0, :1], found["positions"][0, 1:]
    had, side = round(len(table) ** 0.5), SIDE // found["patches.weight"].shape[-1]
    if had != side:
        grid = table.T.unflatten(1, (had, had))[None]
        grid = F.interpolate(grid, scale_factor=(side + OFFSET) / had, mode="bicubic")
        table = grid[0].flatten(1).T
    found["positions"] = torch.cat([first, table])
    return found


def of_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of CLIP's vision by our names: queries, keys and values in one layer."""
    at = "vision_model."
    found = _renamed(
        state,
        {
            "cls": f"{at}embeddings.class_embedding",
            "positions": f"{at}embeddings.position_embedding.weight",
            "patches": f"{at}embeddings.patch_embedding",
            "pre": f"{at}pre_layrnorm",
            "norm": f"{at}post_layernorm",
            "head": "visual_projection",
        },
        f"{at}encoder.layers.{{}}.",
        {
            "norm1": "layer_norm1",
            "norm2": "layer_norm2",
            "fc1": "mlp.fc1",
            "fc2": "mlp.fc2",
            **{name: f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")},
        },
    )
    for i in range(1 + max(map(_block, found))):
        for kind in ("weight", "bias"):
            parts = [found.pop(f"blocks.{i}.{name}.{kind}") for name in ("q", "k", "v")]
            found[f"blocks.{i}.qkv.{kind}"] = torch.cat(parts)
    return found


def prepared(images: np.ndarray, *, cut: bool) -> Tensor:
    """Images uint8 [N, 1 or 3, H, W] as the networks read them, uint8 [N, 3, 224, 224].

    Raises UsageError for other numbers of channels.
    """
    from PIL import Image
    from torchvision.transforms.functional import InterpolationMode, center_crop, resize

    if images.shape[1] not in (1, 3):
        raise UsageError(f"DINOv2 and CLIP read images of one channel or three, not of {images.shape[1]}")
    found = []
    for image in images:
        picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).convert("RGB")
        picture = resize(picture, SIDE if cut else [SIDE, SIDE], InterpolationMode.BICUBIC)
        found.append(np.array(center_crop(picture, SIDE)))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)


def _renamed(state: Mapping[str, Tensor], outside: Names, at: str, inside: Names) -> dict[str, Tensor]:
    """Weights by our names.

    Raises KeyError where one is missing.
    """
    pattern = re.compile(re.escape(at).replace(r"\{\}", r"(\d+)"))
    numbers = sorted({int(m[1]) for name in state if (m := pattern.match(name))})
    wanted = dict(outside)
    wanted |= {f"blocks.{i}.{own}": at.format(i) + name for i in numbers for own, name in inside.items()}
    found: dict[str, Tensor] = {}
    for own, name in wanted.items():
        endings = {"": name, ".weight": f"{name}.weight", ".bias": f"{name}.bias"}
        known = {own + ending: state[at] for ending, at in endings.items() if at in state}
        if not known:
            raise KeyError(name)
        found |= known
    return found


def _block(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith("blocks.") else -1
