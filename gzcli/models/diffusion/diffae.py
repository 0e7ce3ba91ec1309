"""Diffusion autoencoder — Preechakul et al. 2022, arXiv:2111.15640.

An image is kept by two codes: z_sem = E(x), a vector that says what is there, and x_T, the noise from which
the diffusion, told z_sem, walks to x, found by DDIM run backwards; x_T holds what z_sem leaves out.

    L = E ‖ε_θ(x_t, t, E(x)) − ε‖²                                    (eq. 6; or of the image, or of v)

A step of z_sem along a linear classifier changes what is there; with x_T held the rest stays (section 5.3).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace

import torch
from torch import Tensor

from gzcli.errors import UsageError
from gzcli.models.denoising import samplers
from gzcli.models.denoising.guided import LabelOptions
from gzcli.models.denoising.interpolation import through_noise
from gzcli.models.denoising.schedule import Level
from gzcli.models.diffusion.applications import DiffusionApplications
from gzcli.models.diffusion.codes import SemanticCodes
from gzcli.models.diffusion.options import DiffusionOptions, PathOptions, SamplingOptions
from gzcli.models.diffusion.semantic import CodedUNet, Encoder, ddim_inverse
from gzcli.models.nn import at_least, interpolated, pairs_of, spread_labels
from gzcli.models.nn.unet import UNetOptions
from gzcli.types import Applied, Batch, DataInfo, Noise, Progress, no_progress

MEASURED = 256  # images that `measure` inverts


class DiffAE(SemanticCodes):
    """An encoder of z_sem [B, latent] and a U-Net that denoises given it; a first stage of `latent_prior`.

    By itself it samples z_sem from a Gaussian of the mean and covariance that running averages keep of
    training. Raises UsageError for sizes that do not fit.

    latent: numbers of z_sem.
    encoder_mult: width of each level of the encoder in units of `channels`; its other sizes are the U-Net's.
    """

    paper = "Preechakul et al. 2022, arXiv:2111.15640"
    best = "loss"
    labels_for = ("edit",)

    def __init__(
        self,
        data: DataInfo,
        *,
        latent: int = 64,
        unet: UNetOptions = UNetOptions(),
        encoder_mult: tuple[int, ...] = (1, 2, 4, 8),
        process: DiffusionOptions = DiffusionOptions(),
    ):
        net = CodedUNet.of(data, unet, latent=latent)
        encoder = Encoder(data, latent, replace(unet, mult=encoder_mult))
        coded = replace(data, classes=("z_sem",), multilabel=True)  # a code [B, latent] as labels [B, K] are
        told = LabelOptions(conditional=True, label_dropout=0.0)
        super().__init__(data, latent, encoder, DiffusionApplications(coded, net, process, told))

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """The error of the denoiser given the code; in the phase `classifier` that of the classifier."""
        if phase == "classifier" and self.head is not None and batch.y is not None:
            return self.classified(batch.x, batch.y, self.head)
        z = self.encode(batch.x)
        if self.training:
            self.keep_moments(z.detach())
        return self.diffusion.loss(replace(batch, y=z))

    # ---- between images and codes

    def invert(self, x: Tensor, z: Tensor, steps: int, progress: Progress = no_progress) -> Tensor:
        """The stochastic code x_T of images x whose semantic code is z."""
        return ddim_inverse(self.diffusion.denoiser(z, clip=False), x, self.path(steps), progress=progress)

    def decode(self, z: Tensor, x_T: Tensor, steps: int, progress: Progress = no_progress) -> Tensor:
        """The images [B, C, H, W] of both codes, by DDIM."""
        denoise = self.diffusion.denoiser(z, clip=False)
        return self.diffusion.into_range(samplers.ddim(denoise, x_T, self.path(steps), progress=progress))

    def path(self, steps: int) -> list[Level]:
        """The levels of at most `steps` steps, there and back."""
        return self.diffusion.schedule.spaced(min(steps, self.diffusion.timesteps))

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

    # ---- applications

    @torch.no_grad()
    def reconstruct(
        self,
        x: Tensor,
        *,
        noise: Noise,
        progress: Progress = no_progress,
        steps: int = 50,
        stochastic: bool = True,
    ) -> Applied:
        """Images through their codes.

        steps: network calls from image to noise, and from noise to image.
        stochastic: whether x_T is the image's own; otherwise it is from `noise`, which shows what z_sem alone
          holds.
        """
        at_least(1, steps=steps)
        z = self.encode(x)
        x_T = self.invert(x, z, steps, half(progress, 0)) if stochastic else noise.randn(*x.shape)
        back = self.decode(z, x_T, steps, half(progress, 1) if stochastic else progress)
        return Applied(back, rows=("reconstruction",))

    @torch.no_grad()
    def interpolate(
        self, x: Tensor, *, noise: Noise, progress: Progress = no_progress, frames: int = 8, steps: int = 50
    ) -> Applied:
        """Interpolations from image 0 to 1, 2 to 3, …, ends included: z_sem on a line, x_T on the sphere
        (section 5.2).

        Raises UsageError for fewer than two images, or frames.

        frames: images of an interpolation, both ends included.
        steps: network calls from image to noise, and from noise to image.
        """
        at_least(2, frames=frames)
        at_least(1, steps=steps)
        z = self.encode(pairs_of(x))
        between = interpolated(z, frames)
        return through_noise(
            x,
            frames,
            to_noise=lambda x: self.invert(x, z, steps, half(progress, 0)),
            to_images=lambda x_T: self.decode(between, x_T, steps, half(progress, 1)),
        )

    @torch.no_grad()
    def edit(
        self,
        x: Tensor,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress = no_progress,
        strength: float = 3.0,
        steps: int = 50,
    ) -> Applied:
        """Images [B, C, H, W] given `labels`, at their own stochastic code, by a step in z_sem (section
        5.3). An image that the classifier sees as asked stays.

        z_sem goes along Σ w, where w are the classifier's weights of the labels asked for less those of the
        labels that it sees, and Σ is the covariance of the training's codes. The paper's direction, w itself,
        leads to where no codes are if their coordinates vary together (Haufe 2014,
        doi:10.1016/j.neuroimage.2013.10.067). Raises UsageError for a model of data without labels.

        strength: length of the step in standard deviations of the codes along it.
        steps: network calls from image to noise, and from noise to image.
        """
        if self.head is None:
            raise UsageError("`edit` needs a model of data with labels", hint="gz list data")
        at_least(1, steps=steps)
        z, labels = self.encode(x), spread_labels(labels, len(x), self.data, x.device)
        x_T = self.invert(x, z, steps, half(progress, 0))
        done = self.decode(self.moved(z, labels, strength, self.head), x_T, steps, half(progress, 1))
        return Applied(done, rows=("edited",), labels=labels)

    # ---- scores

    @torch.no_grad()
    def score_recon(self, x: Tensor, *, noise: Noise, steps: int = 10) -> Tensor:
        """[B]: mean squared error of images rebuilt from z_sem alone, with x_T from `noise`.

        steps: network calls.
        """
        back = self.reconstruct(x, noise=noise, steps=steps, stochastic=False).images
        return (x - back).square().flatten(1).mean(1)

    @torch.no_grad()
    def score_denoise(self, x: Tensor, *, noise: Noise, times: int = 10) -> Tensor:
        """[B]: mean squared error of the network's ε, told z_sem.

        times: evenly spaced noise levels that the error is averaged over.
        """
        return self.diffusion.errors(x, self.encode(x), noise, times)

    @torch.no_grad()
    def score_code(self, x: Tensor, *, noise: Noise) -> Tensor:
        """[B]: squared Mahalanobis distance of z_sem to the Gaussian of the training's codes.

        A share of the mean variance is added to each, or directions in which the encoder never varies would
        decide by rounding errors.
        """
        d = self.encode(x) - self.mean
        floor = 1e-4 * self.cov.diagonal().mean()
        cov = self.cov + floor * torch.eye(self.latent, dtype=d.dtype, device=d.device)
        return (d * torch.linalg.solve(cov, d.mT).mT).sum(1)

    def measure(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Of the first images: `mse`, of images in [0, 1] through both codes in 50 steps, `mse_semantic`,
        through z_sem alone, and the `accuracy` of the classifier."""
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


def half(progress: Progress, which: int) -> Progress:
    """The progress of one of two ways, to noise (0) and back (1), within that of both."""
    return lambda i, n, x=None: progress(which * n + i, 2 * n, x)
