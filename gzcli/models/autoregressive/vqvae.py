"""VQ-VAE — van den Oord et al. 2017, "Neural Discrete Representation Learning", arXiv:1711.00937.

    L = −log p(x | z_q(x)) + ‖sg[z_e(x)] − e‖² + β ‖z_e(x) − sg[e]‖²                               (eq. 3)

p(x | z) is a Gaussian of fixed variance, so the first term is a mean squared error.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from gzcli.core.types import Batch, DataInfo
from gzcli.models.autoregressive.scales import codebook_of
from gzcli.models.autoregressive.tokenizer import CodebookOptions, Tokenizer, default_halvings
from gzcli.models.nn import halved_sizes, to_fp32


class Residual(nn.Module):
    """ReLU, 3×3 convolution, ReLU, 1×1 convolution (section 4.1)."""

    def __init__(self, hidden: int, inner: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.ReLU(), nn.Conv2d(hidden, inner, 3, padding=1), nn.ReLU(), nn.Conv2d(inner, hidden, 1)
        )

    def forward(self, h: Tensor) -> Tensor:
        return h + self.net(h)


class Encoder(nn.Module):
    """x [B, C, H, W] → z_e [B, dim, h, w]: `down` strided convolutions, then residual blocks."""

    def __init__(self, channels: int, hidden: int, inner: int, blocks: int, down: int, dim: int):
        super().__init__()
        widths = [channels] + [hidden] * down
        self.downs = nn.ModuleList(nn.Conv2d(i, hidden, 4, stride=2, padding=1) for i in widths[:-1])
        residual = [Residual(hidden, inner) for _ in range(blocks)]
        self.body = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, padding=1), *residual, nn.ReLU(), nn.Conv2d(hidden, dim, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        for down in self.downs:
            x = F.relu(down(F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2))))
        return self.body(x)


class Decoder(nn.Module):
    """z_q [B, dim, h, w] → x [B, C, H, W], the mirror image of the encoder."""

    def __init__(
        self, channels: int, hidden: int, inner: int, blocks: int, sizes: list[tuple[int, int]], dim: int
    ):
        super().__init__()
        residual = [Residual(hidden, inner) for _ in range(blocks)]
        self.body = nn.Sequential(nn.Conv2d(dim, hidden, 3, padding=1), *residual)
        self.targets = sizes[-2::-1]
        widths = [hidden] * (len(sizes) - 1) + [channels]
        self.ups = nn.ModuleList(nn.ConvTranspose2d(hidden, o, 4, stride=2, padding=1) for o in widths[1:])

    def forward(self, z: Tensor) -> Tensor:
        h = self.body(z)
        for up, (height, width) in zip(self.ups, self.targets, strict=True):
            h = up(F.relu(h))[:, :, :height, :width]
        return h


class VQVAE(Tokenizer):
    """The paper's network (section 4.1) with a codebook; a first stage, see `Tokenizer`.

    hidden: channels of encoder and decoder.
    residual: channels inside a residual block.
    blocks: residual blocks of the encoder, and of the decoder.
    down: number of times that the encoder halves the resolution. Default: 2, or more until neither side has
      more than 16 codes.
    """

    paper = "van den Oord et al. 2017, arXiv:1711.00937"

    def __init__(
        self,
        data: DataInfo,
        *,
        hidden: int = 128,
        residual: int = 32,
        blocks: int = 2,
        down: int | None = None,
        quantise: CodebookOptions = CodebookOptions(),
    ):
        down = default_halvings(data.shape) if down is None else down
        sizes, channels, dim = halved_sizes(data.shape, down), data.shape[0], quantise.width
        encoder = Encoder(channels, hidden, residual, blocks, down, dim)
        codebook = codebook_of(quantise, sizes[-1])
        decoder = Decoder(channels, hidden, residual, blocks, sizes, dim)
        super().__init__(data, sizes[-1], encoder, codebook, decoder)

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        z, logged = self.codebook(self.encoder(batch.x), batch.noise)
        recon = F.mse_loss(to_fp32(self.decoder(z)), batch.x)
        return logged | {"loss": recon + logged["loss"], "recon": recon.detach()}
