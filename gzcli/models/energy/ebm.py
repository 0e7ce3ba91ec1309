"""An energy-based model, by persistent contrastive divergence — Du & Mordatch 2019, arXiv:1903.08689.

    p(x) ∝ e^−E(x),   loss = E[E(x)] − E[E(x̃)] + α E[E(x)² + E(x̃)²]

x̃ are the ends of Langevin chains, which continue from one training step to the next (Tieleman 2008,
doi:10.1145/1390156.1390290). A fraction of them restarts from uniform noise:

    x ← x + σ ε,   x ← x − η ∇E(x),   each clamped to [-1, 1]; the gradient of a pixel to ±.03
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.core import ranks
from gzcli.core.errors import UsageError
from gzcli.core.types import Batch, DataInfo, Noise, Progress, no_progress
from gzcli.models.base import Model
from gzcli.models.nn import Labels, at_least, every_label, needs_labels, pyramid, spread_labels
from gzcli.models.nn.adversarial import Discriminator, widths

STEEPEST = 0.03  # slope of a pixel


@dataclass(frozen=True)
class ChainOptions:
    """The chains of training, and Langevin's steps.

    chains: number of chains that take turns. At least the batch size.
    chain_steps: Langevin steps of a chain in a training step.
    restart: fraction of the chains that restart from noise when it is their turn.
    step: step size η in units of the gradient.
    noise: standard deviation σ of a step's noise, for images in [-1, 1]. Training images get the same noise.
    """

    chains: int = 2048
    chain_steps: int = 30
    restart: float = 0.05
    step: float = 10.0
    noise: float = 0.005


class EnergyNet(Discriminator):
    """−E(x), or −E(x, y): strided convolutions with smooth activations, because chains follow the
    gradient."""

    def __init__(self, shape: tuple[int, ...], width: int, classes: int):
        super().__init__()
        sizes = pyramid(shape, coarsest=2)
        channels = (shape[0], *widths(width, len(sizes) - 1))
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, stride=2, padding=1) for i, o in pairwise(channels))
        self.hidden = nn.Linear(channels[-1] * math.prod(sizes[-1]), channels[-1])
        self.add_head(channels[-1], classes)

    def maps(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        for conv in self.convs:
            x = F.silu(conv(x))
        return F.silu(self.hidden(x.flatten(1)))


class Chains(nn.Module):
    """The ends of the chains of all ranks. Each training step continues the next chains in turn."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.begun = size, 0  # number of turns begun
        self.images: Tensor | None = None  # [size, C, H, W]

    def starts(self, fresh: Tensor, restart: Tensor) -> tuple[Tensor, Tensor]:
        """The images [B, C, H, W] from which the next chains start, `fresh` ones for those that restart [B]
        or have not begun, and the chains' indices [B]. Raises UsageError if there are fewer chains than
        images."""
        turn, total = self.begun, len(fresh) * ranks.sharing(self)
        if total > self.size:
            raise UsageError(f"`model.chains` is {self.size}, but a batch of {total} needs at least as many")
        self.begun += total
        turns = ranks.own_rows(torch.arange(turn, turn + total, device=fresh.device), self)
        images = fresh.new_zeros(self.size, *fresh.shape[1:]) if self.images is None else self.images
        self.images = images = images.to(fresh)
        is_fresh = (restart | (turns < self.size))[:, None, None, None]
        return torch.where(is_fresh, fresh, images[turns % self.size]), turns % self.size

    def store(self, number: Tensor, ends: Tensor) -> None:
        assert self.images is not None  # made by `starts`
        self.images[ranks.rows(number, self)] = ranks.rows(ends, self)

    def get_extra_state(self) -> dict[str, Any]:
        return {"begun": self.begun, "images": None if self.images is None else self.images.cpu()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.begun, self.images = state["begun"], state["images"]


class EBM(Model):
    """The energy of images, and of their labels.

    width: channels of the finest scale, doubled at each coarser one, at most 8-fold.
    alpha: α, the weight of squared energies, which keeps them near 0.
    conditional: whether the energy is conditioned on labels.
    """

    paper: ClassVar[str] = "Du & Mordatch 2019, arXiv:1903.08689"
    best = "fd"

    def __init__(
        self,
        data: DataInfo,
        *,
        width: int = 32,
        alpha: float = 0.1,
        chain: ChainOptions = ChainOptions(),
        conditional: bool = False,
    ):
        super().__init__(data)
        at_least(1, chain_steps=chain.chain_steps)
        self.conditional = needs_labels(conditional, data)
        self.net = EnergyNet(data.shape, width, len(data.classes) if conditional else 0)
        self.chains, self.chain, self.alpha = Chains(chain.chains), chain, alpha

    # ---- training

    @torch.no_grad()
    def on_batch(self, batch: Batch) -> dict[str, Tensor]:
        """The ends x̃ of one chain for each image, and their labels."""
        noise = batch.noise
        fresh, restart = self.uniform(len(batch), noise), noise.rand(len(batch)) < self.chain.restart
        x, number = self.chains.starts(fresh, restart)
        y = spread_labels(None, self.chain.chains, self.data, x.device)[number] if self.conditional else None
        ends = self.langevin(x, y, self.chain.chain_steps, noise)
        self.chains.store(number, ends)
        return {"ends": ends} | ({} if y is None else {"end_labels": y})

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """The loss against the `ends` of `on_batch`, or those of new chains with the batch's labels."""
        x, y = batch.x, batch.y if self.conditional else None
        x = (x + self.chain.noise * batch.noise.randn(*x.shape)).clamp(-1, 1)
        if "ends" in batch.extra:
            ends, end_labels = batch.extra["ends"], batch.extra.get("end_labels", y)
        else:
            with torch.no_grad():
                start, end_labels = self.uniform(len(x), batch.noise), y
                ends = self.langevin(start, y, self.chain.chain_steps, batch.noise)
        labels = None if y is None or end_labels is None else torch.cat([y, end_labels])
        real, drawn = self.energy(torch.cat([x, ends]), labels).chunk(2)
        gap = real.mean() - drawn.mean()
        return {"loss": gap + self.alpha * (real.square() + drawn.square()).mean(), "gap": gap.detach()}

    # ---- the energy

    def energy(self, x: Tensor, y: Labels = None) -> Tensor:
        """E(x, y), [B]. For a conditional model without labels, E(x) = −log Σ_y e^−E(x, y)."""
        if y is not None or not self.conditional:
            return -self.net(x, y)
        each = [self.net(x, y) for y in every_label(self.data, len(x), x.device)]
        return -torch.stack(each).logsumexp(0)

    @torch.compiler.disable  # its steps are many, and training compiles the loss
    def slope(self, x: Tensor, y: Labels = None) -> Tensor:
        """∇E [B, C, H, W]."""
        with torch.inference_mode(False), torch.enable_grad():
            x, y = x.clone().requires_grad_(), None if y is None else y.clone()
            return torch.autograd.grad(self.energy(x, y).sum(), x)[0]

    def uniform(self, n: int, noise: Noise) -> Tensor:
        """The noise [n, C, H, W] in [-1, 1] from which chains start."""
        return 2 * noise.rand(n, *self.data.shape) - 1

    def langevin(
        self, x: Tensor, y: Labels, steps: int, noise: Noise, progress: Progress = no_progress
    ) -> Tensor:
        """The ends of chains after the given number of steps from x [B, C, H, W]."""
        for i in range(steps):
            x = (x + self.chain.noise * noise.randn(*x.shape)).clamp(-1, 1)
            x = (x - self.chain.step * self.slope(x, y).clamp(-STEEPEST, STEEPEST)).clamp(-1, 1)
            progress(i + 1, steps, x)
        return x

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        labels: Labels = None,
        noise: Noise,
        progress: Progress = no_progress,
        steps: int = 200,
    ) -> Tensor:
        """n images [n, C, H, W] in [-1, 1], the ends of chains from uniform noise.

        steps: Langevin steps of a chain.
        """
        at_least(1, steps=steps)
        x = self.uniform(n, noise)
        y = spread_labels(labels, n, self.data, x.device) if self.conditional else None
        return self.langevin(x, y, steps, noise, progress)

    # ---- out-of-distribution scores

    def score_energy(self, x: Tensor, *, noise: Noise) -> Tensor:
        """E(x) [B], which is low for the training data."""
        return self.energy(x)

    def score_gradient(self, x: Tensor, *, noise: Noise) -> Tensor:
        """‖∇E(x)‖ [B], which is small for the training data."""
        return self.slope(x).flatten(1).norm(dim=1)
