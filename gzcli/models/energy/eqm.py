"""Equilibrium Matching — Wang & Du 2025, arXiv:2510.02300: one time-independent energy, whose gradient leads
from any mixture of noise and data to the data.

    x_γ = γ x + (1 − γ) ε,   E ‖∇E(x_γ) − c(γ) (ε − x)‖²,   c(γ) = λ min(1, (1 − γ) / (1 − a))

The gradient vanishes at the data, so gradient descent from noise generates images. γ runs from noise at 0 to
data at 1. A network f is the gradient of an energy that stays implicit (EqM); or the energy is E(x) = x ·
f(x) (EqM-E, "dot").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gzcli.core.types import DataInfo, Noise, Progress, no_progress
from gzcli.models.denoising.denoiser import Denoiser, GuidanceOptions, TimeOptions
from gzcli.models.denoising.process import CondOT, Level, Shift, shift_of
from gzcli.models.denoising.samplers import root_mean_square
from gzcli.models.labelled import ClusterOptions
from gzcli.models.nn import at_least, to_fp32
from gzcli.models.nn.nets import NetOptions

GRADIENT_SCALE, DECAY_START = 4.0, 0.8  # λ of the gradient, and a, the γ from which it decays
NODES = 16  # steps of the integral of an implicit energy


@dataclass(frozen=True)
class DescentOptions(GuidanceOptions):
    """Gradient descent from noise to an image.

    steps: maximum number of steps. Each takes a gradient of the energy, or a network call if the energy is
      implicit.
    step: step size η in units of the gradient. The descent diverges above about .08.
    momentum: momentum μ (Nesterov 1983), 0 … 1.
    stop: root-mean-square gradient at which an image is finished. The remaining distance is about a
      twentieth of it, so .2 is one grey level of 256.
    last_step: size of the last step. A step of .05 covers the whole remaining distance. Then nine steps of
      .025 before it, without momentum, are enough. Default: `step`.
    """

    steps: int = 30
    step: float = 0.015
    momentum: float = 0.35
    stop: float = 0.2
    last_step: float | None = None


class EqM(Denoiser):
    """A network that predicts the gradient of an energy, or whose product with the image is the energy.

    energy: form of the energy. implicit: the network predicts the gradient directly. dot: E(x) = x · f(x),
      whose gradient takes a second pass, and training a third.
    shift: factor of the noise-to-signal ratio (1 − γ) / γ. auto: side / 64, at least 1.
    """

    paper = "Wang & Du 2025, arXiv:2510.02300"
    # a descent sharpens by itself. MNIST, 8 CPU-minutes, 1,000 samples against validation images, by 1, 1.15
    # and 1.3: fd 11.4, 9.5, 13.6, precision .83, .88, .91, recall .87, .81, .72, legible .85, .90, .92
    towards_clusters = 1.15

    def __init__(
        self,
        data: DataInfo,
        *,
        net: NetOptions = NetOptions(),
        energy: Literal["implicit", "dot"] = "implicit",
        times: TimeOptions = TimeOptions(),
        shift: Shift = 1.0,
        labels: ClusterOptions = ClusterOptions(),
    ):
        if energy == "dot":
            net.check_twice_differentiable()
        network = net.build(data, classes=labels.kinds(data))
        super().__init__(data, network, CondOT(shift=shift_of(shift, data.shape)), labels)
        self.draw_by(times)
        self.explicit = energy == "dot"

    # ---- the energy and its gradient

    def target(self, x: Tensor, eps: Tensor, level: Level) -> Tensor:
        return GRADIENT_SCALE * (level.sigma / (1 - DECAY_START)).clamp(max=1) * (eps - x)

    def time_input(self, t: Tensor) -> Tensor:
        """Zeros, because the energy does not depend on time."""
        return torch.zeros_like(t)

    def raw_output(self, x: Tensor, t: Tensor, y: Tensor | None, drop: Tensor | None = None) -> Tensor:
        """∇E(x) for the batch, in fp32."""
        return self.slope(x, y, drop) if self.explicit else super().raw_output(x, t, y, drop)

    @torch.compiler.disable  # torch compiles no gradient of a gradient
    def slope(self, x: Tensor, y: Tensor | None, drop: Tensor | None) -> Tensor:
        """The gradient of `energy`; in training, with its graph, which fused attention does not support."""
        trains = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            x = x.clone().requires_grad_()  # a copy is not an inference tensor
            y, drop = (v if v is None else v.clone() for v in (y, drop))
            energy = self.energy(x, y, drop)
            return torch.autograd.grad(energy.sum(), x, create_graph=trains)[0]

    def energy(self, x: Tensor, y: Tensor | None = None, drop: Tensor | None = None) -> Tensor:
        """E(x) = x · f(x), [B]. For an implicit energy, its increase ∫ x · f(s x) ds along the ray from 0 to
        x."""
        shares = [1.0] if self.explicit else [(i + 0.5) / NODES for i in range(NODES)]
        slopes = [to_fp32(self.net(s * x, x.new_zeros(len(x)), y, drop)) for s in shares]
        return (x * torch.stack(slopes).mean(0)).flatten(1).sum(1)

    def gradient(self, y: Tensor | None, guidance: float = 1.0) -> Callable[[Tensor], Tensor]:
        """The gradient of the energy given labels y; with guidance, of E(x) + guidance · (E(x | y) −
        E(x))."""
        self.check_guidance(guidance, y)
        return lambda x: self.guided_output(x, x.new_zeros(len(x)), y, guidance)

    # ---- sampling

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress = no_progress,
        options: DescentOptions = DescentOptions(),
    ) -> Tensor:
        """n images [n, C, H, W] in [-1, 1], by descending the energy from noise."""
        x, y = self.initial_noise(n, labels, noise, options.size)
        gradient = self.gradient(y, self.guidance_scale(options.guidance))
        return self.into_range(descend(gradient, x, options, progress))

    # ---- out-of-distribution scores

    def score_energy(self, x: Tensor, *, noise: Noise) -> Tensor:
        """The energy [B] of an image, which is low for the training data."""
        return self.energy(x, self.image_condition(x))

    def score_gradient(self, x: Tensor, *, noise: Noise) -> Tensor:
        """The norm [B] of the energy's gradient, which vanishes at the training data."""
        return self.gradient(self.image_condition(x))(x).flatten(1).norm(dim=1)


def descend(
    gradient: Callable[[Tensor], Tensor], x: Tensor, options: DescentOptions, progress: Progress
) -> Tensor:
    """The images at which gradient descent from x with Nesterov's momentum ends. Each image stops
    independently of the others in its batch."""
    at_least(1, steps=options.steps)
    before, moves = x, x.new_ones(len(x), dtype=torch.bool)
    last = options.step if options.last_step is None else options.last_step
    lengths = [*[options.step] * (options.steps - 1), last]
    for i in range(options.steps):
        ahead = x + options.momentum * (x - before)
        slope = gradient(ahead)
        moves = moves & (root_mean_square(slope) > options.stop)
        before, x = x, torch.where(moves[:, None, None, None], ahead - lengths[i] * slope, x)
        progress(i + 1, options.steps, x)
        if not moves.any():
            break
    return x
