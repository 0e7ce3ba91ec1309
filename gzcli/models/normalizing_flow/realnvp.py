"""RealNVP: Density Estimation Using Real NVP (Dinh et al. 2017, arXiv:1605.08803).

x → dequantise → [checkerboard couplings → squeeze → channel-wise couplings → split] × scales → checkerboard
couplings → z, with batch norm after each coupling (§3.4–3.7). The prior of the split channels starts as the
paper's N(0, 1) and is learned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import ClassVar

import torch

from gzcli.core.types import Batch, DataInfo
from gzcli.models.nn.common import fresh_statistics
from gzcli.models.normalizing_flow import layers
from gzcli.models.normalizing_flow.base import FlowOptions
from gzcli.models.normalizing_flow.multiscale import MultiscaleFlow, scales_of
from gzcli.models.normalizing_flow.nets import ResNet
from gzcli.models.normalizing_flow.norms import BatchNorm, Bijection


class RealNVP(MultiscaleFlow):
    """Multi-scale affine couplings with residual networks and batch normalisation.

    Raises UsageError where height or width cannot be halved `scales` times.

    scales: how often the image is squeezed; null: until a side is odd, or 4 or less.
    couplings: couplings for each of the two masks of a scale; the last scale has checkerboard masks alone,
      and one coupling more.
    hidden: channels of a coupling's network.
    blocks: residual blocks of a coupling's network.
    batch_norm: whether batch norm follows each coupling.
    """

    paper: ClassVar[str] = "arXiv:1605.08803"

    def __init__(
        self,
        data: DataInfo,
        *,
        scales: int | None = None,
        couplings: int = 3,
        hidden: int = 64,
        blocks: int = 2,
        batch_norm: bool = True,
        options: FlowOptions = FlowOptions(logit=0.05),
    ):
        super().__init__(data, options)
        scales = scales_of(data.shape) if scales is None else scales

        def alternate(channels: int, count: int) -> Iterator[Bijection]:
            for k in range(count):
                net = ResNet(channels // 2, channels, hidden, blocks)
                yield layers.AffineCoupling(channels, net, flip=k % 2 == 1)
                if batch_norm:
                    yield BatchNorm(channels)

        def steps(i: int, channels: int) -> Iterator[Bijection]:
            last = i == scales - 1
            board = layers.checkerboard(channels)
            yield layers.Permute(board)
            yield from alternate(channels, couplings + last)
            if not last:
                yield layers.Permute([board.index(c) for c in range(channels)])
                yield from alternate(channels, couplings)

        self.build(scales, steps)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Batch]) -> None:
        """Recomputes the statistics of batch norm for the present weights.

        The density is exact with any statistics, but those of other weights would not normalise the images.
        """
        with fresh_statistics(self) as count:
            for batch in islice(batches, count):
                self.encode(self.to_unit(batch.x, batch.noise)[0])
