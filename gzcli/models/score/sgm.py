"""Score-based generative modelling through SDEs — Song et al. 2021, arXiv:2011.13456."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from gzcli.models.nn import UNet
from gzcli.models.nn.ode import Velocity, density_norm, dequantised, log_density, solve, solve_adaptive
from gzcli.models.score.applications import Applications
from gzcli.models.score.score import Prediction, Solver, Times, Weighting
from gzcli.models.score.sde import VE, VP, SubVP
from gzcli.types import DataInfo, Noise


class SGM(Applications):
    """A U-Net that tells the score, see score.py for `prediction`, `weighting` and `time_sampling`.

    sde: variance preserving (vp) or sub-VP (subvp), of `beta_min` and `beta_max`, or exploding (ve), of
    `sigma_min` and `sigma_max` in the unit of images in [-1, 1]. t_min: the least time, which is trained and
    at which a likelihood may begin. A likelihood knows a flat pixel no better than its least noise: with 256
    levels σ = .01 costs it 1.2 nats, .002 costs .2. channels × mult: width of each level, of `layers`
    residual blocks; attention: the resolutions, in pixels, that have it beside the middle, with heads of
    `head_dim` channels (None: one head).
    """

    paper = "Song et al. 2021, arXiv:2011.13456"
    likelihood = "ode"

    def __init__(
        self,
        data: DataInfo,
        *,
        channels: int = 32,
        mult: tuple[int, ...] = (1, 2, 2),
        layers: int = 1,
        attention: tuple[int, ...] = (7, 8),
        head_dim: int | None = None,
        dropout: float = 0.0,
        groups: int = 8,
        sde: Literal["vp", "subvp", "ve"] = "vp",
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        sigma_min: float = 0.01,
        sigma_max: float = 50.0,
        t_min: float = 1e-5,
        prediction: Prediction = "v",
        weighting: Weighting = "even",
        time_sampling: Times = "cosine",
        conditional: bool = False,
        label_dropout: float = 0.1,
    ):
        net = UNet.of(
            data,
            channels=channels,
            mult=mult,
            attention=attention,
            conditional=conditional,
            layers=layers,
            head_dim=head_dim,
            dropout=dropout,
            groups=groups,
        )
        law = (
            VE(t_min, sigma_min, sigma_max)
            if sde == "ve"
            else {"vp": VP, "subvp": SubVP}[sde](t_min, beta_min, beta_max)
        )
        super().__init__(
            data,
            net,
            law,
            prediction=prediction,
            weighting=weighting,
            time_sampling=time_sampling,
            rescale=True,
            conditional=conditional,
            label_dropout=label_dropout,
        )

    def log_prob(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        *,
        noise: Noise,
        solver: Solver = "rk4",
        steps: int = 24,
        tolerance: float = 1e-4,
        probes: int = 1,
    ) -> Tensor:
        """[B] nats of the discrete image by the ODE from data to noise, see nn/ode.py. Raises UsageError for
        latents.

        `steps`, of four network calls and gradients by default, are uniform in log σ/α; adaptive ones keep
        the error of x and of the nats a dimension each to `tolerance`.
        """
        levels = self.data.levels
        path = self.sde.rising(dequantised(levels), steps)

        def carry(g: Velocity, state: Tensor) -> Tensor:
            if solver == "adaptive":
                return solve_adaptive(
                    g, state, path[0].t, 1.0, rtol=tolerance, atol=tolerance, norm=density_norm
                )
            return solve(g, state, [level.t for level in path], solver)

        f, alpha = self.velocity(self.known_labels(labels)), path[0].alpha
        return log_density(
            f, carry, x, levels=levels, alpha=alpha, noise=noise, probes=probes, std=self.prior_std
        )
