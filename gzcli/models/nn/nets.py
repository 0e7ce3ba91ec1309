"""The network of a denoiser, chosen by its recipe."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from gzcli.core.errors import UsageError
from gzcli.core.types import DataInfo
from gzcli.models.nn import Classes
from gzcli.models.nn.dit import DiTNet, DiTOptions
from gzcli.models.nn.magnitude import MPUNet
from gzcli.models.nn.unet import TimesUNet, UNet, UNetOptions
from gzcli.models.nn.zigzag import ZigzagNet

LAYERS = {"unet": 1, "dit": 4, "edm2": 1, "zigzag": 8}  # by default


@dataclass(frozen=True)
class NetOptions(DiTOptions, UNetOptions):
    """The network and its sizes.

    net: architecture: a U-Net (unet), a transformer over patches (dit; Peebles & Xie 2023,
      arXiv:2212.09748), state-space blocks over patches at a cost linear in their number (zigzag; Hu 2024,
      arXiv:2403.13802), or a U-Net whose layers preserve magnitudes (edm2; Karras 2023, arXiv:2312.02696),
      which has no norms: train it with Adam at a learning rate of .01.
    layers: residual blocks of each level of a U-Net's encoder, or blocks of dit and zigzag. Default: 1, or 4
      for dit, and 8 for zigzag.
    patch: patch size in pixels. A U-Net pads images to a multiple of it; for dit and zigzag it must divide
      the image's height and width. Default: 1, or the size that gives about `tokens` patches.
    norm_eps: number added to the variance in a norm. Default: 1e-5, or 1e-6 for dit.
    """

    net: Literal["unet", "dit", "edm2", "zigzag"] = "unet"
    layers: int | None = None  # type: ignore[assignment]
    patch: int | None = None  # type: ignore[assignment]
    norm_eps: float | None = None  # type: ignore[assignment]

    def check_twice_differentiable(self) -> None:
        """Raises UsageError for a network without second derivatives, or without derivatives in forward
        mode."""
        if self.net == "zigzag":
            hint = "set `model.net` to `unet` or `dit`"
            raise UsageError(
                "the loss needs second derivatives, which `net: zigzag` does not support", hint=hint
            )

    def build(
        self,
        data: DataInfo,
        *,
        classes: Classes = 0,
        guides: int = 0,
        outputs: int = 1,
        times: int = 1,
        freq_shift: float = 0.0,
    ) -> nn.Module:
        """The network for images like `data`, with `guides` additional input channels, `outputs` output
        channels per image channel, and `times` times. Raises UsageError for a transformer with guides."""
        layers = LAYERS[self.net] if self.layers is None else self.layers
        if self.net in ("dit", "zigzag"):
            if guides:
                hint = "set `model.net` to `unet`, or `model.factor` to null"
                raise UsageError("a transformer cannot be conditioned on small images", hint=hint)
            how: dict[str, Any] = {"outputs": outputs, "times": times, "freq_shift": freq_shift}
            network = ZigzagNet if self.net == "zigzag" else DiTNet
            eps = 1e-6 if self.norm_eps is None else self.norm_eps
            sizes = replace(self, layers=layers, norm_eps=eps)
            return network(data.shape, sizes, classes=classes, **how)
        fields = {key: getattr(self, key) for key in UNetOptions.__dataclass_fields__} | {"layers": layers}
        usual = {"patch": 1, "norm_eps": 1e-5}
        options = UNetOptions(**fields | {key: v for key, v in usual.items() if fields[key] is None})
        if self.net == "edm2":
            if times > 1:
                hint = "set `model.net` to `unet`, `dit` or `zigzag`"
                raise UsageError("`net: edm2` supports one time, but this model has two", hint=hint)
            return MPUNet(data, options, classes, guides, outputs)
        if times == 1:
            return UNet.of(data, options, classes=classes, guides=guides, outputs=outputs)
        return TimesUNet.of(data, options, classes=classes, times=times)
