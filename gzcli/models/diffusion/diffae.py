"""Diffusion autoencoder — Preechakul et al. 2022, arXiv:2111.15640.

An image has two codes: the semantic code z_sem = E(x), a vector, and the stochastic code x_T, the noise from
which the diffusion given z_sem generates x. DDIM run backwards finds x_T, which holds what z_sem leaves out.

    L = E ‖ε_θ(x_t, t, E(x)) − ε‖²                                    (eq. 6; or of the image, or of v)

A step of z_sem along the weights of a linear classifier changes an attribute; with x_T kept, the rest of the
image stays (section 5.3).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace

import torch
from torch import Tensor

from gzcli.core.types import Batch, DataInfo, Noise, Progress, no_progress
from gzcli.models.diffusion.applications import DiffusionApplications
from gzcli.models.diffusion.code_applications import CodeApplications
from gzcli.models.diffusion.codes import SemanticCodes
from gzcli.models.diffusion.options import DiffusionOptions, PathOptions, SamplingOptions
from gzcli.models.diffusion.semantic import CodedUNet, Encoder
from gzcli.models.labelled import ClusterOptions
from gzcli.models.nn.unet_sizes import UNetOptions, widths_of

MEASURED = 256  # images that `measure` takes


class DiffAE(CodeApplications, SemanticCodes):
    """An encoder of z_sem [B, latent] and a U-Net that denoises given z_sem; a first stage of `latent_prior`.

    By itself it samples z_sem from a Gaussian with the running mean and covariance of the training codes.
    Raises UsageError for sizes that do not fit.

    latent: dimensions of z_sem.
    encoder_mult: width of each level of the encoder in units of `channels`; null: one level more than the
      U-Net, of widths 1, 2, 4, 8, 8; its other sizes are the U-Net's.
    """

    paper = "Preechakul et al. 2022, arXiv:2111.15640"
    best = "loss"

    def __init__(
        self,
        data: DataInfo,
        *,
        latent: int = 64,
        unet: UNetOptions = UNetOptions(),
        encoder_mult: tuple[int, ...] | None = None,
        process: DiffusionOptions = DiffusionOptions(),
    ):
        net = CodedUNet.of(data, unet, latent=latent)
        if encoder_mult is None:
            encoder_mult = tuple(2 ** min(i, 3) for i in range(len(widths_of(data.shape, unet)) + 1))
        encoder = Encoder(data, latent, replace(unet, mult=encoder_mult))
        # to the diffusion a code [B, latent] is a multi-hot label [B, K]
        coded = replace(data, classes=("z_sem",), multilabel=True)
        labels = ClusterOptions(conditional=True, label_dropout=0.0)
        super().__init__(data, latent, encoder, DiffusionApplications(coded, net, process, labels))

    @property
    def coder(self) -> SemanticCodes:
        return self

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """The error of the denoiser given the code; in the phase `classifier` that of the classifier."""
        if phase == "classifier" and self.head is not None and batch.y is not None:
            return self.classified(batch.x, batch.y, self.head)
        z = self.encode(batch.x)
        if self.training:
            self.keep_moments(z.detach())
        return self.diffusion.loss(replace(batch, y=z))

    # ---- sampling

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress = no_progress,
        path: PathOptions = PathOptions(),
    ) -> Tensor:
        """n images [n, C, H, W] in [-1, 1] of codes drawn from the Gaussian."""
        variances, axes = torch.linalg.eigh(self.cov)
        root = axes * variances.clamp(min=0).sqrt() @ axes.mT
        return self.draw(self.mean + noise.randn(n, self.latent) @ root, noise, progress, path)

    def draw(self, z: Tensor, noise: Noise, progress: Progress, path: PathOptions) -> Tensor:
        """Images [n, C, H, W] of semantic codes z [n, latent], each with a stochastic code of `noise`."""
        options = SamplingOptions(**asdict(path))
        return self.diffusion.sample(len(z), labels=z, noise=noise, progress=progress, options=options)

    # ---- scores and figures

    @torch.no_grad()
    def score_recon(self, x: Tensor, *, noise: Noise, steps: int = 10) -> Tensor:
        """[B]: mean squared error of images rebuilt from z_sem alone, with x_T from `noise`.

        steps: network calls.
        """
        back = self.reconstruct(x, noise=noise, steps=steps, stochastic=False).images
        return (x - back).square().flatten(1).mean(1)

    @torch.no_grad()
    def map_recon(self, x: Tensor, *, noise: Noise, steps: int = 10) -> Tensor:
        """|x − x̂| at each pixel, of images rebuilt from z_sem alone, over channels: [B, H, W].

        steps: network calls.
        """
        return (x - self.reconstruct(x, noise=noise, steps=steps, stochastic=False).images).abs().mean(1)

    @torch.no_grad()
    def score_denoise(self, x: Tensor, *, noise: Noise, times: int = 10) -> Tensor:
        """[B]: mean squared error of the network's ε given z_sem.

        times: evenly spaced noise levels that the error is averaged over.
        """
        return self.diffusion.errors(x, self.encode(x), noise, times)

    @torch.no_grad()
    def score_code(self, x: Tensor, *, noise: Noise) -> Tensor:
        """[B]: squared Mahalanobis distance of z_sem to the Gaussian of the training codes.

        A share of the mean variance is added to each variance. Otherwise rounding errors in directions
        without variance would decide the distance.
        """
        d = self.encode(x) - self.mean
        floor = 1e-4 * self.cov.diagonal().mean()
        cov = self.cov + floor * torch.eye(self.latent, dtype=d.dtype, device=d.device)
        return (d * torch.linalg.solve(cov, d.mT).mT).sum(1)

    def measure(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Figures of the first images: `mse` of reconstructions from both codes in 50 steps, for images in
        [0, 1]; `mse_semantic`, from z_sem alone; and the `accuracy` of the classifier."""
        sums, n = dict.fromkeys(("mse", "mse_semantic", "accuracy"), 0.0), 0
        for batch in batches:
            for name, stochastic in (("mse", True), ("mse_semantic", False)):
                back = self.reconstruct(batch.x, noise=batch.noise, stochastic=stochastic).images
                sums[name] += float((0.5 * (batch.x - back)).square().flatten(1).mean(1).sum())
            if self.head is not None:
                sums["accuracy"] += len(batch) * float(self.loss(batch, "classifier")["accuracy"])
            n += len(batch)
            if n >= MEASURED:
                break
        if self.head is None:
            del sums["accuracy"]
        return {name: total / n for name, total in sums.items()}
