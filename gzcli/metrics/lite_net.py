"""EfficientNet-Lite0 (Tan & Le 2019, arXiv:1905.11946; the variant without squeeze-and-excitation and with
ReLU6), for inference: its batch normalisation is folded into the convolutions."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gzcli.core.errors import UsageError

SIDE = 128  # the side that images are resized to: a third of the cost of the 224 it was trained at
MEAN, STD = 127 / 255, 128 / 255  # of its training, in TensorFlow; not those of ImageNet
EPSILON = 1e-3  # of the batch normalisation
# of each stage: number of blocks, stride of its first block, expansion of the channels
STAGES = ((1, 1, 1), (2, 2, 6), (2, 2, 6), (3, 2, 6), (3, 1, 6), (4, 2, 6), (1, 1, 6))
LEVELS = (0, 2, 4, 10, 14)  # the blocks before each halving of the side, and the last but one


class Lite0(nn.Module):
    """The network with the published weights, whose names it reads strictly.

    Raises UsageError where a weight is missing or left over.
    """

    def __init__(self, state: dict[str, Tensor]):
        super().__init__()
        rest = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
        try:
            self.stem = _folded(rest, "_conv_stem", "_bn0", stride=2)
            self.blocks = nn.ModuleList(_blocks(rest))
            self.neck = _folded(rest, "_conv_head", "_bn1")
            weight, bias = rest.pop("_fc.weight"), rest.pop("_fc.bias")
        except KeyError as e:
            raise UsageError(f"the weights of EfficientNet-Lite0 lack {e}") from e
        if rest:
            raise UsageError(f"`{min(rest)}` is no weight of EfficientNet-Lite0")
        self.head = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        self.head.load_state_dict({"weight": weight, "bias": bias}, assign=True)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1000] logits of `prepared` images."""
        return self.head(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """[B, 1280] of `prepared` images: the last activations, averaged over places."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.neck(x).mean((2, 3))

    def levels(self, x: Tensor) -> list[Tensor]:
        """The activations [B, C, H, W] of `prepared` images at each of the `LEVELS`."""
        x, found = self.stem(x), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in LEVELS:
                found.append(x)
        return found


class Block(nn.Module):
    """An inverted residual block: expansion, depthwise convolution, projection."""

    def __init__(self, layers: list[nn.Module], residual: bool):
        super().__init__()
        self.layers, self.residual = nn.Sequential(*layers), residual

    def forward(self, x: Tensor) -> Tensor:
        """[B, C', H', W'] of [B, C, H, W]."""
        return x + self.layers(x) if self.residual else self.layers(x)


def prepared(x: Tensor) -> Tensor:
    """Images [B, C, H, W] in [0, 1], of one channel or three and any size, as the network reads them: three
    channels, resized to 128 × 128 with antialiasing, in the units of its training.

    Raises UsageError for other numbers of channels.
    """
    if x.shape[1] not in (1, 3):
        raise UsageError(f"EfficientNet-Lite0 reads images of one channel or three, not of {x.shape[1]}")
    x = nn.functional.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
    x = ((x - MEAN) / STD).expand(-1, 3, -1, -1)
    return x.contiguous(memory_format=torch.channels_last)


def _blocks(state: dict[str, Tensor]) -> Iterator[Block]:
    """The blocks, whose weights are taken out of the state dict."""
    number = 0
    for repeats, first, expansion in STAGES:
        for i in range(repeats):
            at, stride = f"_blocks.{number}.", first if i == 0 else 1
            layers = [_folded(state, at + "_expand_conv", at + "_bn0")] if expansion > 1 else []
            depthwise = _folded(state, at + "_depthwise_conv", at + "_bn1", stride=stride, depthwise=True)
            project = _folded(state, at + "_project_conv", at + "_bn2", relu=False)
            yield Block([*layers, depthwise, project], residual=i > 0)
            number += 1


def _folded(
    state: dict[str, Tensor],
    conv: str,
    norm: str,
    *,
    stride: int = 1,
    depthwise: bool = False,
    relu: bool = True,
) -> nn.Sequential:
    """A convolution and the batch normalisation after it as one convolution, whose weights are taken out of
    the state dict. Zeros about the image keep its side, or halve it at a stride of 2; of an odd number of
    them more stand after the image than before it, as TensorFlow has it."""
    weight = state.pop(f"{conv}.weight").double()
    scale, shift, mean, var = (
        state.pop(f"{norm}.{name}").double() for name in ("weight", "bias", "running_mean", "running_var")
    )
    gain = scale / (var + EPSILON).sqrt()
    outputs, inputs, kernel, _ = weight.shape
    zeros = kernel - stride  # in all, where the side is a multiple of the stride, as all of SIDE's are
    layer = nn.Conv2d(
        outputs if depthwise else inputs,
        outputs,
        kernel,
        stride,
        padding=zeros // 2 if zeros % 2 == 0 else 0,
        groups=outputs if depthwise else 1,
        device="meta",  # no draw from the global generator
    )
    weight = (weight * gain[:, None, None, None]).float().contiguous(memory_format=torch.channels_last)
    layer.load_state_dict({"weight": weight, "bias": (shift - mean * gain).float()}, assign=True)
    uneven = (zeros // 2, zeros - zeros // 2) * 2
    pad = [nn.ZeroPad2d(uneven)] if zeros % 2 else []
    return nn.Sequential(*pad, layer, *([nn.ReLU6(inplace=True)] if relu else []))
