"""RealNVP: Density Estimation Using Real NVP (Dinh et al. 2017, arXiv:1605.08803).

x → dequantise → [checkerboard couplings → squeeze → channel-wise couplings → split] × scales → checkerboard
couplings → z, batch norm after each (§3.4–3.7). The prior of what is split off starts as the paper's N(0, 1)
and is learned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import ClassVar

import torch
from torch import nn

from gzcli.models.nn.common import fresh_statistics
from gzcli.models.normalizing_flow import layers
from gzcli.models.normalizing_flow.base import ImageFlow
from gzcli.models.normalizing_flow.dequantise import Dequant, dequantiser
from gzcli.models.normalizing_flow.nets import ResNet
from gzcli.models.normalizing_flow.norms import BatchNorm
from gzcli.types import Batch, DataInfo

CALIBRATION = 20  # batches


class Realnvp(ImageFlow):
    """Multi-scale affine couplings with residual nets and batch normalisation.

    scales: how often the image is squeezed; couplings: of each mask at a scale (the last has one more, of
    checkerboards alone); hidden, blocks: channels and residual blocks of their nets; batch_norm: after each
    coupling; dequant: noise on the grey levels, uniform or a flow of its own; logit, class_weight: see
    `ImageFlow`.

    Raises UsageError where height or width cannot be halved `scales` times.
    """

    paper: ClassVar[str] = "arXiv:1605.08803"

    def __init__(
        self,
        data: DataInfo,
        *,
        scales: int = 2,
        couplings: int = 3,
        hidden: int = 64,
        blocks: int = 2,
        batch_norm: bool = True,
        dequant: Dequant = "uniform",
        logit: float = 0.05,
        conditional: bool = False,
        class_weight: float = 1.0,
    ):
        noise = dequantiser(dequant, data)
        super().__init__(
            data, logit=logit, dequantiser=noise, conditional=conditional, class_weight=class_weight
        )

        def alternate(channels: int, count: int) -> Iterator[nn.Module]:
            for k in range(count):
                yield layers.AffineCoupling(
                    channels, ResNet(channels // 2, channels, hidden, blocks), flip=k % 2 == 1
                )
                if batch_norm:
                    yield BatchNorm(channels)

        def steps(i: int, channels: int) -> Iterator[nn.Module]:
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
        """The statistics of batch norm, those of `batches` under the weights as they are. The density is
        exact with any; with those of other weights it would be centred and scaled for what they make of
        images."""
        with fresh_statistics(self) as norms:
            for batch in islice(batches, CALIBRATION if norms else 0):
                self.encode(self.to_unit(batch.x, batch.noise)[0])
