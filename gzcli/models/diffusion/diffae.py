"""Diffusion autoencoder — Preechakul et al. 2022, arXiv:2111.15640.

An image is kept by two codes: z_sem = E(x), a vector that says what is there, and x_T, the noise from which
the diffusion, told z_sem, walks to x, found by DDIM run backwards; x_T holds what z_sem leaves out.

    L = E ‖ε_θ(x_t, t, E(x)) − ε‖²                                                      (eq. 6; or of the
    image, or of v)

A step of z_sem along a linear classifier changes what is there; with x_T held the rest stays (section 5.3).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli import ranks
from gzcli.errors import UsageError
from gzcli.models.base import Model, Phase
from gzcli.models.diffusion import samplers
from gzcli.models.diffusion.applications import Applications
from gzcli.models.diffusion.schedule import Level
from gzcli.models.diffusion.semantic import CodedUNet, Encoder, ddim_inverse
from gzcli.models.nn import as_ways, at_least, full_fp32, pairs_of, slerp, spread_labels, to_fp32, ways
from gzcli.types import Applied, Batch, DataInfo, Noise, Progress, no_progress

DECAY = 0.95  # of the mean and covariance of z_sem
MEASURED = 256  # images that `measure` inverts


class DiffAE(Model):
    """An encoder of z_sem [B, latent] and a U-Net that denoises given it; a first stage of `latent_prior`.

    channels × mult: width of each level of the U-Net, channels × encoder_mult: of the encoder; layers,
    attention, head_dim,
    dropout, groups: of both, as in `ddpm`, as are the keys of the process. By itself it samples z_sem from a
    Gaussian of the mean and covariance that running averages keep of training. Where the data have labels a
    linear classifier of the normalised z_sem learns beside it, without a gradient to the encoder. Raises
    UsageError for sizes that do not fit.
    """

    paper = "Preechakul et al. 2022, arXiv:2111.15640"
    best = "loss"
    labels_for = ("edit",)

    def __init__(
        self,
        data: DataInfo,
        *,
        latent: int = 64,
        channels: int = 32,
        mult: tuple[int, ...] = (1, 2, 2),
        encoder_mult: tuple[int, ...] = (1, 2, 4, 8),
        layers: int = 1,
        attention: tuple[int, ...] = (7, 8),
        head_dim: int | None = None,
        dropout: float = 0.0,
        groups: int = 8,
        timesteps: int = 1000,
        schedule: Literal["linear", "cosine"] = "cosine",
        zero_snr: bool = False,
        prediction: Literal["eps", "x0", "v"] = "v",
        loss_type: Literal["l2", "l1", "huber"] = "l2",
        min_snr: float | None = None,
        time_sampling: Literal["uniform", "stratified"] = "stratified",
    ):
        super().__init__(data)
        sizes = {"layers": layers, "head_dim": head_dim, "dropout": dropout, "groups": groups}
        net = CodedUNet.of(
            data, channels=channels, mult=mult, attention=attention, conditional=False, latent=latent, **sizes
        )
        self.latent = latent
        self.encoder = Encoder(
            data, latent, channels=channels, mult=encoder_mult, attention=attention, **sizes
        )
        self.diffusion = Applications(
            replace(
                data, classes=("z_sem",), multilabel=True
            ),  # to the process, a code [B, latent] is what labels [B, K] are
            net,
            timesteps=timesteps,
            schedule=schedule,
            zero_snr=zero_snr,
            prediction=prediction,
            loss_type=loss_type,
            min_snr=min_snr,
            time_sampling=time_sampling,
            conditional=True,
            label_dropout=0.0,
        )
        self.head = nn.Linear(latent, len(data.classes)) if data.classes else None
        self.register_buffer("mean", torch.zeros(latent))  # of z_sem
        self.register_buffer("cov", torch.eye(latent))
        self.register_buffer("batches", torch.zeros(()))  # that they have seen

    # ---------------------------------------------------------------------------------------------- training

    def phases(self) -> list[Phase]:
        main = Phase("main", [*self.encoder.parameters(), *self.diffusion.parameters()])
        return [main] if self.head is None else [main, Phase("classifier", list(self.head.parameters()))]

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """Of the denoiser given the code; of the classifier, by softmax, or one sigmoid a label where there
        may be several."""
        if phase == "classifier":
            with torch.no_grad():
                z = self.encode(batch.x)
            logits, y = to_fp32(self.head(self.normalise(z))), self.one_hot(batch.y).to(z)
            error = F.binary_cross_entropy_with_logits if self.data.multilabel else F.cross_entropy
            return {"loss": error(logits, y), "accuracy": (self.seen(logits) == y).all(1).float().mean()}
        z = self.encode(batch.x)
        if self.training:
            self.keep_moments(z.detach())
        return self.diffusion.loss(replace(batch, y=z))

    @torch.no_grad()
    def keep_moments(self, z: Tensor) -> None:
        """Running mean and covariance of z_sem [B, latent], of the batches of all ranks."""
        with torch.autocast(z.device.type, enabled=False):
            mean = ranks.mean(z.mean(0), self)
            cov = ranks.mean((z - mean).mT @ (z - mean) / len(z), self)
        weight = (1 / (self.batches + 1)).clamp(min=1 - DECAY)
        self.mean.lerp_(mean, weight)
        self.cov.lerp_(cov, weight)
        self.batches += 1

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Batch]) -> None:
        """The moments of z_sem of all `batches` under the encoder as it is: the running ones are those of
        another, the encoder on its way, with its dropout, and codes are far from theirs once the weights are
        averaged."""
        z = torch.cat([self.encode(batch.x) for batch in batches])
        self.mean.copy_(z.mean(0))
        with full_fp32(z.device):
            self.cov.copy_((z - self.mean).mT @ (z - self.mean) / len(z))

    # ------------------------------------------------------------------------------------------------- codes

    def encode(self, x: Tensor) -> Tensor:
        """z_sem [B, latent] of images."""
        return to_fp32(self.encoder(x))

    def normalise(self, z: Tensor) -> Tensor:
        """z_sem with mean 0 and variance 1 in every coordinate."""
        return (z - self.mean) / self.std

    def denormalise(self, z: Tensor) -> Tensor:
        return self.mean + z * self.std

    @property
    def std(self) -> Tensor:
        return self.cov.diagonal().clamp(min=1e-8).sqrt()

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

    # ---------------------------------------------------------------------------------------------- sampling

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress = no_progress,
        sampler: Literal["ancestral", "ddim", "dpmpp", "dpmpp_sde", "unipc", "heun"] = "dpmpp",
        steps: int = 20,
        spacing: Literal["trailing", "leading", "linspace", "karras", "logsnr"] = "karras",
    ) -> Tensor:
        """n images [n, C, H, W] in [-1, 1] of codes drawn from the Gaussian; options as in `ddpm`."""
        variances, axes = torch.linalg.eigh(self.cov)
        root = axes * variances.clamp(min=0).sqrt() @ axes.mT
        z = self.mean + noise.randn(n, self.latent).to(self.mean) @ root
        return self.draw(z, noise, progress, sampler=sampler, steps=steps, spacing=spacing)

    def draw(self, z: Tensor, noise: Noise, progress: Progress, **options) -> Tensor:
        """Images of semantic codes z, each with a stochastic one of `noise`; options of
        `Diffusion.sample`."""
        return self.diffusion.sample(len(z), labels=z, noise=noise, progress=progress, **options)

    # ------------------------------------------------------------------------------------------------------
    # applications

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
        """Images through their codes, of `steps` network calls each way; not stochastic: with x_T from
        `noise`, which shows what z_sem alone holds."""
        at_least(1, steps=steps)
        z = self.encode(x)
        x_T = self.invert(x, z, steps, half(progress, 0)) if stochastic else noise.randn(*x.shape).to(x)
        back = self.decode(z, x_T, steps, half(progress, 1) if stochastic else progress)
        return Applied(back, rows=("reconstruction",))

    @torch.no_grad()
    def interpolate(
        self, x: Tensor, *, noise: Noise, progress: Progress = no_progress, frames: int = 8, steps: int = 50
    ) -> Applied:
        """The way from image 0 to 1, 2 to 3, …, ends included: z_sem on a line, x_T on the sphere (section
        5.2).

        Raises UsageError for fewer than two images, or frames.
        """
        at_least(2, frames=frames)
        at_least(1, steps=steps)
        x = pairs_of(x)
        z = self.encode(x)
        between = ways(z, frames)
        x_T = ways(self.invert(x, z, steps, half(progress, 0)).flatten(1), frames, slerp)
        return as_ways(self.decode(between, x_T.unflatten(1, x.shape[1:]), steps, half(progress, 1)), frames)

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
        """Images [B, C, H, W] given `labels`, at their own stochastic code, by a step in z_sem (section 5.3).

        z_sem goes along Σ w, where w are the classifier's weights of the labels asked for less those of the
        labels that it sees, and Σ is the covariance of the training's codes: w itself, the paper's direction,
        leads where no codes are if their coordinates vary together (Haufe 2014,
        doi:10.1016/j.neuroimage.2013.10.067). strength: of the step, in standard deviations of the codes
        along it. An image that is seen as asked stays. Raises UsageError for a model of data without labels.
        """
        if self.head is None:
            raise UsageError("`edit` needs a model of data with labels", hint="gz list data")
        at_least(1, steps=steps)
        z, labels = self.encode(x), spread_labels(labels, len(x), self.data, x.device)
        x_T = self.invert(x, z, steps, half(progress, 0))
        done = self.decode(self.moved(z, labels, strength), x_T, steps, half(progress, 1))
        return Applied(done, rows=("edited",), labels=labels)

    def moved(self, z: Tensor, y: Tensor, strength: float) -> Tensor:
        """Codes z [B, latent] on the way to labels y, as `edit` says."""
        change = self.one_hot(y).to(z) - self.seen(self.head(self.normalise(z))).to(z)  # [B, K]
        w = change @ self.head.weight / self.std  # of z_sem as it is
        along = w @ self.cov
        return z + strength * along / (w * along).sum(1, keepdim=True).clamp(min=1e-12).sqrt()

    def seen(self, logits: Tensor) -> Tensor:
        """The labels [B, K] 0/1 that the classifier sees."""
        return (logits > 0).long() if self.data.multilabel else self.one_hot(logits.argmax(1))

    def one_hot(self, y: Tensor) -> Tensor:
        """Labels as [B, K] 0/1."""
        return y if self.data.multilabel else F.one_hot(y, len(self.data.classes))

    # ------------------------------------------------------------------------------------------------ scores

    @torch.no_grad()
    def score_recon(self, x: Tensor, *, noise: Noise, steps: int = 10) -> Tensor:
        """[B]: mean squared error of images rebuilt from z_sem alone, with x_T from `noise`."""
        back = self.reconstruct(x, noise=noise, steps=steps, stochastic=False).images
        return (x - back).square().flatten(1).mean(1)

    @torch.no_grad()
    def score_denoise(self, x: Tensor, *, noise: Noise, times: int = 10) -> Tensor:
        """[B]: mean squared error of the network's ε, told z_sem, over `times` evenly spaced noise levels."""
        return self.diffusion.errors(x, self.encode(x), noise, times)

    @torch.no_grad()
    def score_code(self, x: Tensor, *, noise: Noise) -> Tensor:
        """[B]: squared Mahalanobis distance of z_sem to the Gaussian of the training's."""
        d = self.encode(x) - self.mean
        floor = (
            1e-4 * self.cov.diagonal().mean()
        )  # what the encoder never varies would decide by rounding alone
        return (
            d
            * torch.linalg.solve(
                self.cov + floor * torch.eye(self.latent, dtype=d.dtype, device=d.device), d.mT
            ).mT
        ).sum(1)

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
        return {
            name: total / n for name, total in sums.items() if name != "accuracy" or self.head is not None
        }


def half(progress: Progress, which: int) -> Progress:
    """The progress of one of the two ways, to noise and back."""
    return lambda i, n, x=None: progress(which * n + i, 2 * n, x)
