"""MeanFlow — Geng et al. 2025, arXiv:2505.13447, with the loss of improved MeanFlow (iMF), Geng et al. 2025,
arXiv:2512.02012.

    F(x_t, t, s) = v + (s − t) d/dt F(x_t, t, s),   d/dt = v_θ ∂_x + ∂_t,   v_θ = F(x_t, t, t)

The average velocity F over [t, s] is that at t, where time passes along the flow. The right-hand side, with
v = x_0 − ε, is taken as a constant target of F. The papers' times run from data to noise.
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
    """A network that learns the average of its own velocity by its derivative along the flow."""

    paper = "Geng et al. 2025, arXiv:2505.13447"
    differentiates = True

    def interval_target(self, interval: Interval) -> tuple[Tensor, float]:
        """v + (s − t) dF/dt, of a guided v and v_θ. The derivative, in forward mode, has no gradient, and the
        pass of F that has one is an ordinary one, so that its gradients are synchronised."""
        x, t, average = interval.x, interval.t, partial(self.average, interval)
        velocity, guided = self.velocity_and_guidance(interval)
        if is_shape_only():  # where torch's derivatives of some layers fail
            slope = average(x, t)
        else:
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward-mode derivative
                slope = torch.func.jvp(average, (x, t), (velocity + guided, torch.ones_like(t)))[1]
        return interval.v + guided + per_image(interval.s - t) * slope, 1.0
