"""MeanFlow — Geng et al. 2025, arXiv:2505.13447, with the loss of improved MeanFlow (iMF), Geng et al. 2025,
arXiv:2512.02012.

    F(x_t, t, s) = v + (s − t) d/dt F(x_t, t, s),   d/dt = v_θ ∂_x + ∂_t,   v_θ = F(x_t, t, t)

F is the average velocity over [t, s]; d/dt is its derivative along the flow. The right-hand side, with v =
x_0 − ε, is a constant target for F. The papers' times run from data to noise.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gzcli.models.denoising.process import per_image
from gzcli.models.flow_matching.average_velocity import AverageVelocity, Interval
from gzcli.models.nn import is_shape_only


class MeanFlow(AverageVelocity):
    """A network that learns its average velocity from that velocity's derivative along the flow."""

    paper = "Geng et al. 2025, arXiv:2505.13447"
    differentiates = True

    def interval_target(self, interval: Interval) -> tuple[Tensor, float]:
        """v + (s − t) dF/dt, with guided v and v_θ. The derivative is computed in forward mode, without a
        gradient. F itself is computed in an ordinary pass, so that its gradients are synchronised."""
        x, t, average = interval.x, interval.t, partial(self.average, interval)
        velocity, guided = self.velocity_and_guidance(interval)
        if is_shape_only():  # where torch's derivatives of some layers fail
            slope = average(x, t)
        else:
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward-mode derivative
                slope = torch.func.jvp(average, (x, t), (velocity + guided, torch.ones_like(t)))[1]
        return interval.v + guided + per_image(interval.s - t) * slope, 1.0
