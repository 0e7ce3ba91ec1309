"""The multi-scale architecture of flows (Dinh et al. 2017, arXiv:1605.08803, §3.6)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from torch import Tensor

from gzcli.core.errors import UsageError
from gzcli.core.types import Progress, no_progress
from gzcli.core.units import as_size
from gzcli.models.nn.common import Modules
from gzcli.models.normalizing_flow import layers
from gzcli.models.normalizing_flow.base import ImageFlow
from gzcli.models.normalizing_flow.norms import Bijection


class MultiscaleFlow(ImageFlow):
    """[squeeze → steps → split] × scales; the last scale keeps all its channels as the top latent.

    A flow defines its steps in `__init__`:

        super().__init__(data, options)
        self.build(scales, steps)
    """

    def build(self, scales: int, steps: Callable[[int, int], Iterable[Bijection]]) -> None:
        """Builds the scales. Raises UsageError where the image cannot be halved so often.

        scales: how often the image is squeezed.
        steps: steps(i, channels), the layers of scale i, on squeezed images of that many channels.
        """
        check_size(self.data.shape, scales)
        self.flow: Modules[Modules[Bijection]] = Modules()
        self.splits: Modules[layers.SplitPrior] = Modules()
        shapes = []
        C, H, W = self.data.shape
        for i in range(scales):
            C, H, W = 4 * C, H // 2, W // 2
            self.flow.append(Modules(steps(i, C)))
            if i < scales - 1:
                self.splits.append(layers.SplitPrior(C))
                shapes.append((C - C // 2, H, W))
                C //= 2
        self.build_top([*shapes, (C, H, W)])

    def encode(self, v: Tensor) -> tuple[list[Tensor], Tensor]:
        h, log_det = self.preprocess(v)
        z = []
        for steps, split in zip(self.flow, [*self.splits, None], strict=True):
            h = layers.squeeze(h)
            for step in steps:
                h, step_log_det = step(h)
                log_det = log_det + step_log_det
            if split is not None:
                h, eps, split_log_det = split(h)
                z.append(eps)
                log_det = log_det + split_log_det
        return [*z, h], log_det

    def decode(self, z: list[Tensor], progress: Progress = no_progress) -> Tensor:
        *eps, h = z
        scales = list(zip(self.flow, [*self.splits, None], [*eps, None], strict=True))
        for done, (steps, split, e) in enumerate(reversed(scales), 1):
            if split is not None and e is not None:
                h = split.inverse(h, e)
            for step in reversed(steps):
                h = step.inverse(h)
            h = layers.unsqueeze(h)
            progress(done, len(scales))
        return self.postprocess(h)


def scales_of(shape: tuple[int, ...]) -> int:
    """How often images (C, H, W) are halved where no number is given: while both sides are even and the
    smaller one is above 4, at least once."""
    _, height, width = shape
    scales = 1
    while math.gcd(height, width) % 2 ** (scales + 1) == 0 and min(height, width) > 4 * 2**scales:
        scales += 1
    return scales


def check_size(shape: tuple[int, ...], scales: int) -> None:
    """Raises UsageError unless height and width of `shape` can be halved `scales` ≥ 1 times."""
    _, height, width = shape
    if scales < 1:
        raise UsageError(f"`model.scales` must be at least 1, not {scales}")
    unit = 2**scales
    if height % unit or width % unit:
        most = int(math.log2(math.gcd(height, width) & -math.gcd(height, width)))
        larger = f"`data.size={as_size(*(-(-side // unit) * unit for side in (height, width)))}`"
        raise UsageError(
            f"`model.scales={scales}` halves images {scales} times, and {height}×{width} is not divisible "
            f"by {unit}",
            hint=f"set `model.scales={most}`, or {larger}" if most else f"set {larger}",
        )
