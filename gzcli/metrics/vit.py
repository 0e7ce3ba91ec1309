"""The feature spaces of DINOv2 and of CLIP: vision transformers (Dosovitskiy et al. 2021, arXiv:2010.11929)
of transformers, whose weights are fetched when a metric names them.

DINOv2's ViT-L/14 is the space of Stein et al. 2023, arXiv:2306.04675, and of the FD that EDM2 reports; CLIP's
ViT-B/32 that of Kynkäänniemi et al. 2023, arXiv:2203.06026. Pictures come to them as to these papers' code:
enlarged by Pillow's bicubic filter to 224 pixels, in bytes, CLIP's cut to a square.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzcli.core.errors import UsageError
from gzcli.store import files
from gzcli.store.hub import CLIP, DINOV2, weights

if TYPE_CHECKING:
    from gzcli.data.packs.stream import Pictures

SIDE = 224  # of the pictures that the networks read, as in both papers
HEAD = 64  # width of a head of attention, in every size of both networks
OFFSET = 0.1  # which DINOv2 adds to the side, in patches, where it resizes its table of positions
State = Mapping[str, Tensor]


@dataclass
class ViTFeatures:
    """A vision transformer as a feature space."""

    net: Callable[[Tensor], Tensor]  # [B, D] of normalised pictures [B, 3, 224, 224]
    hash: str  # of the file of its weights
    device: torch.device
    mean: tuple[float, float, float]  # of the colours in its training
    std: tuple[float, float, float]
    cut: bool  # whether pictures that are not square are cut; if not, they are squeezed
    batch: int = field(default=32, repr=False)

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
    """The network with its weights; 1,024 features, the class token at the end. Errors as of `network`."""
    net, digest = network(DINOV2, dinov2_of, source="dinov2's ViT-L/14")
    net.to(device)
    colours = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return ViTFeatures(lambda x: net(x).pooler_output, digest, torch.device(device), *colours, cut=False)


def clip(device: torch.device | str = "cpu") -> ViTFeatures:
    """The network with its weights; 512 features, those that are compared with texts. Errors as of
    `network`."""
    net, digest = network(CLIP, clip_of, source="`openai/clip-vit-base-patch32` (its `pytorch_model.bin`)")
    net.to(device)
    colours = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return ViTFeatures(lambda x: net(x).image_embeds, digest, torch.device(device), *colours, cut=True)


def network(name: str, build: Callable[[State], nn.Module], *, source: str) -> tuple[nn.Module, str]:
    """The network of a file of the cache, and the sha256 of the file."""
    file = weights(name, use="features of a vision transformer", source=source)
    try:
        net = build(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as e:  # pickles break in many ways
        raise UsageError(
            f"`{file}` does not hold the weights of {source}: {type(e).__name__}: {e}",
            hint="remove it: it is fetched again",
        ) from e
    return net.float().eval().requires_grad_(False), files.checksum(file)


def dinov2_of(state: State) -> nn.Module:
    """DINOv2 of the publisher's weights; its sizes are those of the weights."""
    from transformers import Dinov2Config, Dinov2Model

    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=sum(name.endswith("attn.qkv.weight") for name in state),
        num_attention_heads=width // HEAD,
        mlp_ratio=len(state["blocks.0.mlp.fc1.weight"]) // width,
        patch_size=patch,
        image_size=SIDE,
    )
    with torch.device("meta"):  # no draw from the global generator
        net = Dinov2Model(config)
    later = "encoder.layer.0.attention.q_proj.weight" in net.state_dict()  # since transformers 5
    q, k, v, out = (
        [f"attention.{word}_proj" for word in "qkvo"]
        if later
        else [
            *(f"attention.attention.{word}" for word in ("query", "key", "value")),
            "attention.output.dense",
        ]
    )
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        name = name.replace("blocks.", "encoder.layer.").replace("attn.proj", out)
        for i in (1, 2):
            name = name.replace(f"ls{i}.gamma", f"layer_scale{i}.lambda1")
        if "attn.qkv" in name:
            renamed |= {
                name.replace("attn.qkv", part): value
                for part, value in zip((q, k, v), value.chunk(3), strict=True)
            }
        else:
            renamed[name] = value
    at = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
    for theirs, ours in at.items():
        renamed |= {f"{ours}.{kind}": renamed.pop(f"{theirs}.{kind}") for kind in ("weight", "bias")}
    renamed |= {f"embeddings.{name}": renamed.pop(name) for name in ("cls_token", "mask_token")}
    renamed["embeddings.position_embeddings"] = positions(renamed.pop("pos_embed"), SIDE // patch)
    net.load_state_dict(renamed, assign=True)
    return net


def positions(table: Tensor, side: int) -> Tensor:
    """The table of positions [1, 1 + n, D] for side × side patches, resized as its authors do."""
    first, rest = table[:, :1], table[0, 1:]
    now = round(len(rest) ** 0.5)
    if now == side:
        return table
    grid = rest.T.unflatten(1, (now, now))[None]
    grid = F.interpolate(grid, scale_factor=(side + OFFSET) / now, mode="bicubic")
    return torch.cat([first, grid[0].flatten(1).T[None]], 1)


def clip_of(state: State) -> nn.Module:
    """The vision part of CLIP of the publisher's weights; its sizes are those of the weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    width, _, patch, _ = state["vision_model.embeddings.patch_embedding.weight"].shape
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=len(state["vision_model.encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=sum(
            name.startswith("vision_model") and name.endswith("q_proj.weight") for name in state
        ),
        num_attention_heads=width // HEAD,
        patch_size=patch,
        image_size=SIDE,
        projection_dim=len(state["visual_projection.weight"]),
    )
    with torch.device("meta"):  # no draw from the global generator
        net = CLIPVisionModelWithProjection(config)
    places = torch.arange((SIDE // patch) ** 2 + 1)[None]
    net.vision_model.embeddings.position_ids = places
    weights_of_net = net.state_dict()
    net.load_state_dict({name: value for name, value in state.items() if name in weights_of_net}, assign=True)
    return net


def prepared(images: np.ndarray, *, cut: bool) -> Tensor:
    """Images uint8 [N, 1 or 3, H, W] as the networks read them, uint8 [N, 3, 224, 224]."""
    from PIL import Image
    from torchvision.transforms.functional import InterpolationMode, center_crop, resize

    if images.shape[1] not in (1, 3):
        raise UsageError(f"DINOv2 and CLIP read images of one channel or three, not of {images.shape[1]}")
    pictures = []
    for image in images:
        picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).convert("RGB")
        picture = resize(picture, SIDE if cut else [SIDE, SIDE], InterpolationMode.BICUBIC)
        pictures.append(np.array(center_crop(picture, SIDE)))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
