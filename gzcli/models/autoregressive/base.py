"""What autoregressive models of pixels have in common: likelihood, generation in order, completion."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from gzcli.core.errors import UsageError
from gzcli.core.types import Applied, Batch, DataInfo, Noise, Progress, no_progress
from gzcli.models.base import Model
from gzcli.models.nn import Labels, bits, double, every_label, needs_labels, spread_labels


class PixelModel(Model):
    """p(x) = Π p(part_i | parts before it): rows from the top, pixels from the left, each of `parts` equal
    groups of channels.

    A subclass defines the three methods below, and forward(x, labels) [B, parts, H, W, outputs], the net's
    outputs for every part given those before it. A draw of a part takes `uniforms` numbers.

    conditional: whether labels condition every factor.
    """

    likelihood: ClassVar[str] = "exact"
    best: ClassVar[str] = "bpd"

    def __init__(self, data: DataInfo, conditional: bool, *, parts: int, uniforms: int):
        super().__init__(data)
        self.levels = grey_levels(data)
        self.conditional, self.parts, self.uniforms = needs_labels(conditional, data), parts, uniforms

    def part_log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        """log p of every part of x given those before it, [B, parts, H, W]."""
        raise NotImplementedError

    def draw(self, outputs: Tensor, u: Tensor, temperature: float) -> Tensor:
        """Values [n, C / parts] of a part, by inversion at u [n, uniforms] in [0, 1)."""
        raise NotImplementedError

    def incremental(self, n: int, labels: Labels) -> Any:
        """The net for n images position by position. Its methods are called in this order: `row(above)` for
        the image's row above [n, C, W], zeros for the first; then for a known row `keep(row)`, or for each
        pixel j and part `outputs(j, part)` [n, outputs] and `put(j, part, value)`, value [n, C / parts]."""
        raise NotImplementedError

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        nats = -self._pixels_log_prob(batch.x, batch.y if self.conditional else None).flatten(1).sum(1).mean()
        return {"loss": nats, "bpd": bits(nats, self.data)}

    def log_prob(self, x: Tensor, labels: Labels = None, *, noise: Noise | None = None) -> Tensor:
        """[B] nats, exact. A conditional model without labels: of the mixture over its classes, log mean_y
        p(x | y)."""
        if not self.conditional or labels is not None:
            return self._pixels_log_prob(x, labels).flatten(1).sum(1)
        return self._class_log_prob(x, rows=x.shape[2]).logsumexp(1) - math.log(len(self.data.classes))

    def map_nll(self, x: Tensor, *, noise: Noise) -> Tensor:
        """−log p(pixel | pixels before it) in nats, [B, H, W]; it sums to −log p(x). A conditional model: of
        the mixture over its classes, whose weights change as pixels become known."""
        if not self.conditional:
            return -self._pixels_log_prob(x, None).sum(1)
        every = every_label(self.data, len(x), x.device)
        of_class = torch.stack([self._pixels_log_prob(x, y).sum(1) for y in every], 1)
        log_p = double(of_class).flatten(2).cumsum(2).logsumexp(1) - math.log(len(every))
        return -log_p.diff(prepend=log_p.new_zeros(len(x), 1)).unflatten(1, x.shape[2:]).to(x.dtype)

    def _pixels_log_prob(self, x: Tensor, labels: Labels) -> Tensor:
        return self.part_log_prob(self(x, labels), x)

    def _class_log_prob(self, x: Tensor, rows: int) -> Tensor:
        """log p(first `rows` rows of x | class) for every class, [B, K]."""
        every = every_label(self.data, len(x), x.device)
        return torch.stack([self._pixels_log_prob(x, y)[:, :, :rows].flatten(1).sum(1) for y in every], 1)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        labels: Labels = None,
        noise: Noise,
        progress: Progress = no_progress,
        temperature: float = 1.0,
        naive: bool = False,
    ) -> Tensor:
        """n images [n, C, H, W] in [-1, 1], pixel by pixel.

        temperature: of every factor, above 0; 1: as trained, less: nearer to the mode.
        naive: whether every value takes a pass of the whole network, in place of the incremental one; slow, a
          reference for tests.
        """
        x = next(self.parameters()).new_zeros(n, *self.data.shape)
        if self.conditional:
            labels = spread_labels(labels, n, self.data, x.device)
        return self._generate(x, 0, labels, noise, progress, temperature, naive)

    @torch.no_grad()
    def complete(
        self,
        x: Tensor,
        *,
        rows: int | None = None,
        labels: Labels = None,
        noise: Noise,
        progress: Progress = no_progress,
        temperature: float = 1.0,
    ) -> Applied:
        """x [B, C, H, W] with its first rows kept, and the rest sampled given them.

        A conditional model without labels takes the class that makes the kept rows most probable.

        rows: how many rows are kept, 0 … H; null: half of them.
        """
        rows = x.shape[2] // 2 if rows is None else rows
        if not 0 <= rows <= x.shape[2]:
            raise UsageError(f"`rows` is {rows}, the images have {x.shape[2]} rows")
        x = x.to(next(self.parameters()))
        if self.conditional and labels is None:
            best = self._class_log_prob(x, rows).argmax(1)
            labels = spread_labels(None, len(self.data.classes), self.data, x.device)[best]
        labels = labels if self.conditional else None
        completed = self._generate(x, rows, labels, noise, progress, temperature)
        return Applied(completed, rows=("completed",), known=first_rows(x, rows), how="kept", labels=labels)

    def _generate(
        self,
        x: Tensor,
        rows: int,
        labels: Labels,
        noise: Noise,
        progress: Progress,
        temperature: float,
        naive: bool = False,
    ) -> Tensor:
        """x with the values below its first `rows` rows drawn in order."""
        if temperature <= 0:
            raise UsageError(f"`temperature` is {temperature}, it must be above 0")
        n, _, height, width = x.shape
        u = noise.rand(n, self.parts, self.uniforms, height, width)
        x = x.clone()
        x[:, :, rows:] = 0
        split = x.unflatten(1, (self.parts, -1))  # a view [n, parts, C / parts, H, W]
        # without autocast: a draw follows the distribution that the weights define, at full precision
        with torch.autocast(x.device.type, enabled=False):
            net = WholeNet(self, x, labels) if naive else self.incremental(n, labels)
            for i in range(height):
                net.row(x[:, :, i - 1] if i else torch.zeros_like(x[:, :, 0]))
                if i < rows:
                    net.keep(x[:, :, i])
                for j in range(width if i >= rows else 0):
                    for part in range(self.parts):
                        value = self.draw(net.outputs(j, part), u[:, part, :, i, j], temperature)
                        split[:, part, :, i, j] = value
                        net.put(j, part, value)
                progress(i + 1, height, x)
        return x


def grey_levels(data: DataInfo) -> int:
    if data.levels is None:
        message = "this model is of pixels with grey levels, and latents have none"
        raise UsageError(message, hint="leave `data.latent` out")
    return data.levels


def first_rows(x: Tensor, rows: int) -> Tensor:
    """[B, 1, H, W]: 1 in the first `rows` rows of the images x [B, C, H, W], 0 below."""
    return (torch.arange(x.shape[2], device=x.device) < rows).to(x)[:, None].expand(len(x), 1, -1, x.shape[3])


class WholeNet:
    """`incremental` without caches: every output is a pass of the whole network over x, as far as drawn."""

    def __init__(self, net: PixelModel, x: Tensor, labels: Labels):
        self.net, self.x, self.labels, self.i = net, x, labels, -1

    def row(self, above: Tensor) -> None:
        self.i += 1

    def keep(self, row: Tensor) -> None: ...

    def outputs(self, j: int, part: int) -> Tensor:
        return self.net(self.x, self.labels)[:, part, self.i, j]

    def put(self, j: int, part: int, value: Tensor) -> None: ...
