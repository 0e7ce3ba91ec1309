"""Template — the method, its authors, and the paper if there is one.

    train: {steps: 600, batch_size: 64, ema: 0.99}
    optim: {lr: 1e-3}

The indented lines above are the model's recipe; a file `template.yaml` beside this one would replace them.
This first version is flow matching (Lipman 2023, arXiv:2210.02747): a network v(x_t, t) learns the velocity
x1 − x0 from noise x0 to an image x1, at x_t = (1 − t) x0 + t x1. Change what you like: `gz model check
./template.py` checks whether the result meets the contract, and `gz train ./template.py` trains it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli import Batch, DataInfo, Model, Noise, Progress


class Template(Model):
    """A small convolutional network that learns a velocity.

    hidden: channels of its inner layers.
    layers: number of inner layers.
    """

    paper = "Lipman 2023, arXiv:2210.02747"

    def __init__(self, data: DataInfo, *, hidden: int = 32, layers: int = 3):
        super().__init__(data)
        channels = data.shape[0]
        inner = [nn.Conv2d(hidden, hidden, 3, padding=1) for _ in range(layers)]
        self.first = nn.Conv2d(channels + 1, hidden, 3, padding=1)
        self.inner = nn.ModuleList(inner)
        self.last = nn.Conv2d(hidden, channels, 3, padding=1)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """v(x_t, t) [B, C, H, W] of x [B, C, H, W] and times t [B] in [0, 1]."""
        time = t[:, None, None, None].expand(-1, 1, *x.shape[2:])
        h = self.first(torch.cat([x, time], 1))
        for layer in self.inner:
            h = h + layer(F.silu(h))
        return self.last(F.silu(h))

    def loss(self, batch: Batch, phase: str = "main") -> Tensor:
        """The mean squared error of the velocity; all randomness is drawn from `batch.noise`."""
        x1 = batch.x  # [B, C, H, W] in [-1, 1]
        x0, t = batch.noise.randn(*x1.shape), batch.noise.rand(len(batch))
        time = t[:, None, None, None]
        return F.mse_loss(self.velocity((1 - time) * x0 + time * x1, t), x1 - x0)

    def sample(
        self, n: int, *, labels: Tensor | None = None, noise: Noise, progress: Progress, steps: int = 50
    ) -> Tensor:
        """Draws n images [n, C, H, W] by Euler's method.

        steps: evaluations of the network.
        """
        x = noise.randn(n, *self.data.shape)
        for i in range(steps):
            x = x + self.velocity(x, x.new_full((n,), i / steps)) / steps
            progress(i + 1, steps, x)
        return x.clamp(-1, 1)
