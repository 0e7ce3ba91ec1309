"""Applications of a trained denoiser, and its score by the error of rebuilt images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gzcli.core.errors import MissingError, UsageError, install_line
from gzcli.core.hints import Option, advice, setting
from gzcli.core.types import Applied, Batch, Noise, Progress, no_progress
from gzcli.core.units import by_sides
from gzcli.models.denoising import samplers
from gzcli.models.denoising.denoiser import UNCLIPPED, Denoiser, WalkOptions
from gzcli.models.denoising.process import Level
from gzcli.models.denoising.samplers import Denoise, Estimate, Path, Randn, Sampler, solve
from gzcli.models.nn import (
    Mix,
    as_interpolations,
    at_least,
    complete_pairs,
    every_label,
    mix_codes,
    nearer,
    slerp,
)
from gzcli.store.png import picture_of

CLASSIFYING_LEVELS = 4  # noise levels by which translation classifies an unlabelled image
MEASURED_SIGMA, JPEG_SIGMA = (
    0.01,
    0.05,
)  # standard deviation of the noise of degraded images, whose range is 0 … 1
SIGMA_Y = 0.05  # standard deviation assumed for measurements, for the error of the network's estimates


@dataclass(frozen=True)
class InpaintOptions:
    """How hidden pixels are completed.

    method: condition on the known pixels by the first two moments of images (moments), or replace them at
      each noise level by noised ones (repaint). RePaint varies too little, but computes no gradients.
    steps: noise levels. Default: 25, or 50 for repaint.
    resample: repetitions of each segment by repaint. The cost is at most steps × resample network calls.
    jump: noise levels of a segment of repaint.
    iterations: iterations of conjugate gradients in each step of `moments`. A step takes one network call,
      and iterations + 1 gradients.
    guidance: classifier-free guidance scale. 0: unconditional; 1: no guidance; above 1: sharper.
    """

    method: Literal["moments", "repaint"] = "moments"
    steps: int | None = None
    resample: int = 5
    jump: int = 5
    iterations: int = 4
    guidance: float = 1.0


@dataclass(frozen=True)
class RestoreOptions:
    """How images are degraded, and restored by DiffPIR (Zhu 2023, arXiv:2305.08995).

    operator: degradation: a Gaussian blur, a lower resolution (super), hidden pixels (inpaint) or JPEG.
    degraded: whether the inputs are degraded already. Default: gz degrades them and measures both in dB.
    width: standard deviation of the blur in pixels.
    factor: factor of the lower resolution.
    share: fraction of pixels that inpaint shows, drawn at random. A mask replaces it.
    quality: JPEG quality, 1 … 95.
    sigma: standard deviation of the noise in the degraded images, whose range is 0 … 1. gz adds the noise
      except to JPEG images. Default: 0.01, or 0.05 for JPEG because of its compression errors.
    steps: steps, one network call each.
    """

    operator: Literal["blur", "super", "inpaint", "jpeg"] = "blur"
    degraded: bool = False
    width: float = 1.0
    factor: int = 2
    share: float = 0.5
    quality: int = 10
    sigma: float | None = None
    steps: int = 50


class Applications(Denoiser):
    """Applications over the estimates and the ODE of a denoiser."""

    with_labels = ("translate", "classify")
    perceptual_scores = ("recon",)
    reverse_sampler: ClassVar[Sampler]  # returns from noised images to clean ones
    # sampler to noise and back, and its default steps
    ode_solver: ClassVar[tuple[Any, int]] = ("midpoint", 20)
    recon_mean: Tensor | None = None  # mean and deviation of each error of an image, set by `fit_recon`
    recon_std: Tensor | None = None

    # ---- to noise and back

    def path(self, steps: int, **options: Any) -> list[Level]:
        """A path of at most `steps` steps. `start`: its first noise level, as a share of the way to pure
        noise."""
        strength = options.get("start", 1.0)
        if not 0 < strength <= 1:
            raise UsageError(f"`strength` must be above 0 and at most 1, not {strength:g}")
        return self.process.path(min(steps, self.process.most_steps(strength)), **options)

    def to_noise(self, x: Tensor, y: Tensor | None, steps: int, progress: Progress) -> Tensor:
        times = self.process.ode_times(steps)[::-1]
        return solve(self.velocity(y), x, times, self.ode_solver[0], progress=progress)

    def to_data(self, z: Tensor, y: Tensor | None, steps: int, guidance: float, progress: Progress) -> Tensor:
        times = self.process.ode_times(steps)
        return solve(self.velocity(y, guidance), z, times, self.ode_solver[0], progress=progress)

    def denoise_path(
        self, x: Tensor, path: Path, y: Tensor | None, guidance: float, randn: Randn, progress: Progress
    ) -> Tensor:
        """Images that are noised to path[0] and then denoised along the path, given labels y."""
        denoise = self.denoiser(y, WalkOptions(guidance))
        return self.into_range(self.reverse_sampler(denoise, x, path, randn=randn, progress=progress))

    def round_trip(
        self,
        x: Tensor,
        noise: Noise,
        strength: float,
        steps: int,
        *,
        y: Tensor | None = None,
        guidance: float = 1.0,
        progress: Progress = no_progress,
    ) -> tuple[Tensor, Tensor]:
        """Noises x up to the share `strength` of the way to pure noise, and denoises it in at most `steps`
        steps, given labels y (SDEdit, Meng 2022, arXiv:2108.01073). Returns the denoised images."""
        path, randn = self.path(steps, start=strength), partial(noise.randn, *x.shape)
        x_t = path[0].alpha * x + path[0].sigma * randn()
        return x_t, self.denoise_path(x_t, path, self.image_condition(x, y), guidance, randn, progress)

    @torch.no_grad()
    def reconstruct(
        self,
        x: Tensor,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress = no_progress,
        strength: float = 0.4,
        steps: int = 20,
    ) -> Applied:
        """Adds noise to images [B, C, H, W] and denoises them, given `labels` if they are known.

        strength: share of the way from data to noise, 0 … 1; .5 is as much noise as image.
        steps: denoising steps, at most.
        """
        at_least(1, steps=steps)
        x_t, denoised = self.round_trip(x, noise, strength, steps, y=labels, progress=progress)
        return Applied(denoised, rows=("denoised",), condition=x_t, how="noised", labels=labels)

    @torch.no_grad()
    def edit(
        self,
        x: Tensor,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress = no_progress,
        strength: float = 0.6,
        steps: int = 50,
        guidance: float = 1.0,
    ) -> Applied:
        """Adds noise to images [B, C, H, W] and denoises them towards `labels` (SDEdit).

        strength: share of the way from data to noise, 0 … 1; .5 is as much noise as image.
        steps: denoising steps, at most.
        guidance: classifier-free guidance scale. 0: unconditional; 1: no guidance; above 1: sharper.
        """
        at_least(1, steps=steps)
        y = self.requested_labels(labels, len(x))
        x_t, edited = self.round_trip(x, noise, strength, steps, y=y, guidance=guidance, progress=progress)
        return Applied(edited, rows=("edited",), condition=x_t, how="noised", labels=y)

    @torch.no_grad()
    def interpolate(
        self,
        x: Tensor,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress = no_progress,
        frames: int = 8,
        steps: int | None = None,
    ) -> Applied:
        """Interpolates between image 0 and 1, 2 and 3, … in the noise that the ODE maps them to. Each frame
        has the label of the nearer image. Raises UsageError for fewer than two images or frames.

        frames: images of an interpolation, both ends included.
        steps: steps of the solver in each direction. Default: 20 midpoint steps of two network calls, or 10
          Runge–Kutta steps of four for score models.
        """
        at_least(1, steps=steps)
        at_least(2, frames=frames)
        x, steps = complete_pairs(x), steps or self.ode_solver[1]
        ends = None if labels is None else labels[: len(x)]
        z, y = self.to_noise(x, self.image_condition(x, ends), steps, progress), nearer(ends, frames)
        z, c = interpolate_images(z, frames, slerp), self.image_condition(interpolate_images(x, frames), y)
        return as_interpolations(self.into_range(self.to_data(z, c, steps, 1.0, progress)), frames, y)

    # ---- images from measurements

    @torch.no_grad()
    def inpaint(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress = no_progress,
        options: InpaintOptions = InpaintOptions(),
    ) -> Applied:
        """Fills in images [B, C, H, W] at the pixels where mask [B, 1, H, W] is 0. The default mask hides the
        centre, half as high and wide as the image.

        The method `moments` is exact for Gaussian data. RePaint (Lugmayr 2022, arXiv:2201.09865; for scores
        Song 2021, appendix I.2) samples the hidden pixels given the known ones only approximately.
        """
        steps = options.steps or (25 if options.method == "moments" else 50)
        at_least(1, steps=options.steps, resample=options.resample, jump=options.jump)
        at_least(1, iterations=options.iterations)
        mask = centre_mask(x) if mask is None else mask.to(x)
        y = None if labels is None else self.requested_labels(labels, len(x))
        c = self.image_condition(x, y, mask)
        randn = partial(noise.randn, *x.shape)
        z = self.process.prior_std * randn()
        if options.method == "moments":
            measurement = Measurement(*[lambda image: mask * image] * 3)
            denoise = self.denoiser(c, WalkOptions(options.guidance, clip=False))
            denoise = self.condition_on(denoise, mask * x, measurement, options.iterations)
            images = samplers.dpmpp(denoise, z, self.path(steps, spacing="logsnr"), progress=progress)
        else:
            denoise = self.denoiser(c, WalkOptions(options.guidance))
            path = samplers.repeat_stretches(self.path(steps), options.resample, options.jump)
            images = samplers.repaint(denoise, z, path, image=x, mask=mask, randn=randn, progress=progress)
        inpainted = torch.lerp(self.into_range(images), x, mask)
        return Applied(inpainted, rows=("inpainted",), visible=mask, how="masked", labels=y)

    @torch.no_grad()
    def upscale(
        self,
        x: Tensor,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress = no_progress,
        factor: int = 2,
        steps: int = 25,
        iterations: int = 4,
    ) -> Applied:
        """Enlarges small images. The ODE is conditioned on their pixels as block means, through the first two
        moments of images given x_t. Raises UsageError for sizes that do not fit.

        x: small images [B, C, h, w], where h divides H; or images of full size, which are first reduced.
        factor: factor by which full-size images are first reduced.
        steps: steps, uniform in log σ/α. Each takes a network call and iterations + 1 gradients.
        iterations: iterations of conjugate gradients in each step.
        """
        at_least(1, factor=factor, steps=steps, iterations=iterations)
        small, ratio = downscale(x, factor, self.data.shape[1:])
        denoise = self.denoiser(self.image_condition(small, labels), UNCLIPPED)
        denoise = self.condition_on(denoise, small, block_means(ratio), iterations)
        z = self.process.prior_std * noise.randn(len(x), *self.data.shape)
        images = samplers.dpmpp(denoise, z, self.path(steps, spacing="logsnr"), progress=progress)
        upscaled, how = self.into_range(images), f"small, 1/{ratio}"
        return Applied(upscaled, rows=("upscaled",), condition=small, how=how, labels=labels)

    @torch.no_grad()
    def restore(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress = no_progress,
        options: RestoreOptions = RestoreOptions(),
    ) -> Applied:
        """Restores degraded images [B, C, H, W] one by one, with a solver of deepinv. Its metrics are the
        peak signal-to-noise ratios before and after, unless the inputs are degraded already. Raises
        MissingError if deepinv is missing, UsageError for latents and options that do not fit."""
        at_least(1, steps=options.steps)
        degrade = Degradation(options, tuple(x.shape[1:]), mask, noise.rand(*x.shape)[:, :1])
        solver = solver_of(options, x.device)
        if self.data.levels is None:
            hint = "use a model of pixels"
            raise UsageError("`restore` compares pixels, but this model is of latents", hint=hint)
        clean, randn, seeds = x / 2 + 0.5, noise.randn(*x.shape), (noise.rand(len(x)) * 2**31).long()
        restored, seen = [], []
        for i in range(len(x)):
            physics, y, rough = degrade(clean[i : i + 1], randn[i : i + 1], i)
            condition = self.image_condition(2 * rough - 1, None if labels is None else labels[i : i + 1])
            solver.model = self.on_unit_range(condition)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(seeds[i]))
                restored.append(solver(y, physics, x_init=rough))
            seen.append(rough)
            progress(i + 1, len(x), None)
        images, rough = torch.cat(restored).clamp(0, 1), torch.cat(seen)
        figures = {}
        if not options.degraded:
            error = lambda z: float((z.clamp(0, 1) - clean).square().flatten(1).mean(1).log10().mean())  # noqa: E731
            figures = {"dB before": -10 * error(rough), "dB after": -10 * error(images)}
        applied = Applied(2 * images - 1, rows=("restored",), figures=figures, labels=labels)
        return replace(applied, condition=2 * rough - 1, how=options.operator)

    def on_unit_range(self, y: Tensor | None) -> Callable[..., Tensor]:
        """The denoiser for deepinv: maps x, images in 0 … 1 with noise of standard deviation σ, to denoised
        images."""

        def denoise(x: Tensor, sigma: Tensor | float, **_: Any) -> Tensor:
            level = self.process.ratio_level(2 * float(torch.as_tensor(sigma).flatten()[0]))
            return self.into_range(self.estimate(level.alpha * (2 * x - 1), level, y).x0) / 2 + 0.5

        return denoise

    def condition_on(
        self, denoise: Denoise, y: Tensor, measurement: Measurement, iterations: int = 0
    ) -> Denoise:
        """The denoiser of images x_0 with known y = A x_0. It moves x̂_0 to the nearest image with A x_0 = y
        (DDNM, Wang 2022, arXiv:2212.00490, eq. 13). With iterations, it first estimates E[x_0 | x_t, y] by
        the first two moments of x_0 given x_t (Rozet 2024, arXiv:2405.13712, section 4). These use the
        gradient of a `denoise` that does not clip.

            Cov[x_0 | x_t] = (σ²/α) ∂x̂_0/∂x_t
            x̂_0 + Cov Aᵀ (A Cov Aᵀ + σ_y² I)⁻¹ (y − A x̂_0)
        """

        def by_moments(x: Tensor, t: float, alpha: float, sigma: float) -> Tensor:
            with torch.inference_mode(False), torch.enable_grad():
                x = x.detach().clone().requires_grad_()
                x0 = denoise(x, t).x0

                def covariance(v: Tensor) -> Tensor:
                    return sigma**2 / alpha * torch.autograd.grad(x0, x, v, retain_graph=True)[0]

                def matrix(v: Tensor) -> Tensor:
                    return measurement.apply(covariance(measurement.adjoint(v))) + SIGMA_Y**2 * v

                mean = x0.detach()
                scaled = conjugate_gradients(matrix, y - measurement.apply(mean), iterations)
                return self.into_range(mean + covariance(measurement.adjoint(scaled)))

        def estimates(x: Tensor, t: float) -> Estimate:
            _, alpha, sigma = self.process.level(t)
            x0 = by_moments(x, t, alpha, sigma) if iterations else denoise(x, t).x0
            x, x0 = x.detach(), x0 + measurement.pseudo_inverse(y - measurement.apply(x0))
            return Estimate(x0, (x - alpha * x0) / sigma)

        return estimates

    # ---- applications of labels

    def error(self, x: Tensor, eps: Tensor, level: Level, y: Tensor | None) -> Tensor:
        """The mean squared error [B] of the predicted velocity, or of ε, for x noised with eps."""
        x_t = level.alpha * x + level.sigma * eps
        image_level = self.process.batch_level(x, level.t)
        out = self.output(x_t, image_level, y)
        if self.prediction == "velocity":
            difference = out - self.target(x, eps, image_level)
        else:
            difference = eps - self.to_estimate(out, x_t, image_level).eps
        return difference.square().flatten(1).mean(1)

    def errors(self, x: Tensor, y: Tensor | None, noise: Noise, times: int) -> Tensor:
        """The mean error [B] over `times` noise levels, each with its own noise."""
        levels = self.process.error_levels(times)
        return torch.stack([self.error(x, noise.randn(*x.shape), level, y) for level in levels]).mean(0)

    def class_errors(
        self, x: Tensor, noise: Noise, times: int = CLASSIFYING_LEVELS, progress: Progress = no_progress
    ) -> Tensor:
        """The error [B, K] given each class, with the same noise for every class (Li 2023, "Your Diffusion
        Model is Secretly a Zero-Shot Classifier", arXiv:2303.16203)."""
        classes = [self.image_condition(x, y) for y in every_label(self.data, len(x), x.device)]
        total = x.new_zeros(len(x), len(classes))
        for i in range(times):
            eps, level = noise.randn(*x.shape), self.process.level_at((i + 0.5) / times)
            total = total + torch.stack([self.error(x, eps, level, y) for y in classes], 1) / times
            progress(i + 1, times, x)
        return total

    @torch.no_grad()
    def classify(
        self,
        x: Tensor,
        *,
        y: Tensor | None = None,
        noise: Noise,
        progress: Progress = no_progress,
        times: int = 20,
    ) -> Applied:
        """Classifies images by the class with the best noise prediction (Li 2023, arXiv:2303.16203). Reports
        the accuracy if the labels are known. Raises UsageError for an unconditional model, and for
        multi-label data.

        times: noise levels at which the classes are compared; each takes a network call for every class.
        """
        at_least(1, times=times)
        self.check_conditional("classify")
        if self.data.multilabel:
            raise UsageError("`classify` needs images with one class, and these may have several")
        labels = self.class_errors(x, noise, times, progress).argmin(1)
        figures = {} if y is None else {"accuracy": float((labels == y).float().mean())}
        return Applied(x, rows=("classified",), labels=labels, figures=figures)

    @torch.no_grad()
    def translate(
        self,
        x: Tensor,
        *,
        labels: Tensor | None = None,
        y: Tensor | None = None,
        noise: Noise,
        progress: Progress = no_progress,
        steps: int = 25,
        guidance: float = 1.0,
    ) -> Applied:
        """Translates images [B, C, H, W] to other classes. The ODE of their own class maps them to noise, and
        the ODE of the other class maps the noise to images (Su 2022, "Dual Diffusion Implicit Bridges",
        arXiv:2203.08382). Without labels, the images get all classes in turn. Images of unknown class are
        classified first. Raises UsageError for an unconditional model.

        steps: steps of the ODE, to noise and back.
        guidance: guidance scale on the way back. 1: no guidance; above 1: sharper.
        """
        at_least(1, steps=steps)
        self.check_conditional("translate")
        if y is None and not self.data.multilabel:
            y = self.class_errors(x, noise).argmin(1)
        target_labels = self.requested_labels(labels, len(x))
        z = self.to_noise(x, self.image_condition(x, y), steps, progress)
        target = self.image_condition(x, target_labels)
        images = self.into_range(self.to_data(z, target, steps, guidance, progress))
        return Applied(images, rows=("translated",), labels=target_labels)

    def check_conditional(self, verb: str) -> None:
        if not self.conditional:
            hint = advice("train it with {}", setting("model.conditional", True))
            raise UsageError(f"only a conditional model can {verb}", hint=hint)

    # ---- out-of-distribution scores

    @torch.no_grad()
    def score_recon(
        self, x: Tensor, *, noise: Noise, starts: int = 4, steps: int = 2, pixels: bool = False
    ) -> Tensor:
        """The mean z-score [B] of the errors of images rebuilt from several noise levels (Graham 2023,
        arXiv:2211.07740). Without fitted statistics, it is the mean error. Raises UsageError if the fit had a
        different number of errors.

        starts: noise levels from which images are rebuilt.
        steps: denoising steps from each noise level, at most.
        pixels: whether to use the pixel error only, without the perceptual distance.
        """
        errors = self.recon_errors(x, noise, starts, steps, pixels)
        if self.recon_mean is None or self.recon_std is None:
            return errors.mean(1)
        fitted, count = len(self.recon_mean), errors.shape[1]
        if fitted != count:
            raise UsageError(f"`recon` was fitted with {fitted} errors per image, not {count}")
        return ((errors - self.recon_mean) / self.recon_std).mean(1)

    @torch.no_grad()
    def fit_recon(
        self, batches: Iterable[Batch], *, starts: int = 4, steps: int = 2, pixels: bool = False
    ) -> None:
        """Fits the mean and standard deviation of each error over held-out images."""
        errors = torch.cat([self.recon_errors(b.x, b.noise, starts, steps, pixels) for b in batches])
        self.recon_mean, self.recon_std = errors.mean(0), errors.std(0).clamp(min=1e-8)

    @torch.no_grad()
    def map_recon(self, x: Tensor, *, noise: Noise, starts: int = 4, steps: int = 2) -> Tensor:
        """|x − x̂| at each pixel, averaged over channels and noise levels: [B, H, W]."""
        rebuilt = self.reconstructions(x, noise, starts, steps)
        return torch.stack([(x - x_hat).abs().mean(1) for x_hat in rebuilt]).mean(0)

    def recon_errors(self, x: Tensor, noise: Noise, starts: int, steps: int, pixels: bool) -> Tensor:
        """The mean squared errors of rebuilt images, followed by perceptual distances: [B, starts or 2 ·
        starts]."""
        rebuilt = self.reconstructions(x, noise, starts, steps)
        errors = [(x - x_hat).square().flatten(1).mean(1) for x_hat in rebuilt]
        if self.perceptual is not None and not pixels:
            errors += [self.perceptual(x, x_hat) for x_hat in rebuilt]
        return torch.stack(errors, 1)

    def reconstructions(self, x: Tensor, noise: Noise, starts: int, steps: int) -> list[Tensor]:
        """x after round trips of strength k / (starts + 1)."""
        return [self.round_trip(x, noise, (k + 1) / (starts + 1), steps)[1] for k in range(starts)]


class NoiseApplications(Applications):
    """Applications, and a score per image by the error of the estimated noise."""

    @torch.no_grad()
    def score_denoise(self, x: Tensor, *, noise: Noise, times: int = 10) -> Tensor:
        """The mean squared error [B] of the network's estimate of ε.

        times: number of noise levels that the error is averaged over, evenly spaced.
        """
        return self.errors(x, self.image_condition(x), noise, times)


def solver_of(options: RestoreOptions, device: torch.device) -> Any:
    """The DiffPIR solver, still without a denoiser. Raises MissingError if deepinv is missing."""
    try:
        from deepinv.optim.data_fidelity import L2
        from deepinv.sampling import DiffPIR
    except ImportError as e:
        message = "`restore` needs the package `deepinv`"
        raise MissingError(message, hint=install_line("gzcli[restore]")) from e
    sigma = options.sigma or (JPEG_SIGMA if options.operator == "jpeg" else MEASURED_SIGMA)
    # deepinv overwrites the level by that of the noise model, so physics have none
    return DiffPIR(None, L2(), sigma=sigma, max_iter=options.steps, device=device)


class Degradation:
    """A degradation of images in 0 … 1. Raises UsageError for invalid options.

    draws: [B, 1, H, W], uniform; the pixels below `share` are shown.
    """

    def __init__(self, options: RestoreOptions, shape: tuple[int, ...], mask: Tensor | None, draws: Tensor):
        self.options, self.shape = options, shape
        self.mask = (draws < options.share).float() if mask is None else mask.to(draws)
        if not (options.width > 0 and 0 < options.share <= 1 and 1 <= options.quality <= 95):
            raise UsageError("`width` must be above 0, `share` in (0, 1], and `quality` in 1 … 95")
        at_least(2 if options.operator == "super" else 1, factor=options.factor)
        if options.operator == "super" and any(side % options.factor for side in shape[1:]):
            message = f"images of {by_sides(reversed(shape[1:]))} cannot be reduced {options.factor} times"
            raise UsageError(message, hint=advice("choose another {}", Option("factor")))

    def __call__(self, x: Tensor, noise: Tensor, i: int) -> tuple[Any, Tensor, Tensor]:
        """For image i: the operator, the measurement, and an image of full size that shows the
        measurement."""
        import deepinv as dinv

        options, device = self.options, x.device
        if options.operator == "jpeg":
            y = x if options.degraded else compressed(x, options.quality)
            return dinv.physics.Denoising(noise_model=None), y, y
        if options.operator == "blur":
            kernel = dinv.physics.blur.gaussian_blur(sigma=(options.width, options.width))
            physics = dinv.physics.BlurFFT(img_size=self.shape, filter=kernel, device=device)
        elif options.operator == "super":
            form = {"factor": options.factor, "filter": "bicubic", "padding": "circular", "device": device}
            physics = dinv.physics.Downsampling(img_size=self.shape, **form)
        else:
            shown = self.mask[i : i + 1].expand(1, *self.shape)
            physics = dinv.physics.Inpainting(img_size=self.shape, mask=shown[0], device=device)
        is_measured = options.degraded and options.operator != "super"  # for `super`, it comes at full size
        y = x if is_measured else physics.A(x)
        if not options.degraded:
            y = y + (options.sigma or MEASURED_SIGMA) * noise[..., : y.shape[2], : y.shape[3]]
        if options.operator == "inpaint":
            y = y * self.mask[i : i + 1]
        if y.shape == x.shape:
            return physics, y, y
        return physics, y, F.interpolate(y, size=x.shape[2:], mode="bicubic", align_corners=False)


def compressed(x: Tensor, quality: int) -> Tensor:
    """Images [B, C, H, W] in 0 … 1 after JPEG compression."""
    import io

    import numpy as np
    from PIL import Image

    images = []
    for image in (x.clamp(0, 1) * 255).round().byte().cpu().permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        picture_of(image).save(file, "jpeg", quality=quality)
        decoded = np.asarray(Image.open(file), np.float32) / 255
        images.append(torch.from_numpy(decoded.reshape(image.shape)).permute(2, 0, 1))
    return torch.stack(images).to(x)


def centre_mask(x: Tensor) -> Tensor:
    """The mask [B, 1, H, W] that hides the middle quarter of x: 0 in the middle, 1 elsewhere."""
    n, _, h, w = x.shape
    mask = x.new_ones(n, 1, h, w)
    mask[:, :, h // 4 : h - h // 4, w // 4 : w - w // 4] = 0
    return mask


def downscale(x: Tensor, factor: int, size: tuple[int, ...]) -> tuple[Tensor, int]:
    """Small images, and the ratio of `size` (H, W) to their size. They are x itself or, for x of full size, x
    reduced by `factor`. Raises UsageError for sizes that do not divide."""
    if x.shape[2:] == size:
        if any(side % factor for side in size):
            raise UsageError(f"`factor` {factor} does not divide images of {by_sides(reversed(size))}")
        x = F.avg_pool2d(x, factor)
    ratio = size[0] // x.shape[2]
    if tuple(s * ratio for s in x.shape[2:]) != tuple(size):
        small, whole = (by_sides(reversed(shape)) for shape in (x.shape[2:], size))
        raise UsageError(f"images of {small} pixels do not fit a whole number of times into {whole}")
    return x, ratio


def interpolate_images(z: Tensor, frames: int, mix: Mix = torch.lerp) -> Tensor:
    """Interpolations from image 0 to 1, 2 to 3, … of z, including both ends. For noise, `mix` is `slerp`,
    which keeps its norm."""
    return mix_codes(z.flatten(1), frames, mix).unflatten(1, z.shape[1:])


class Measurement(NamedTuple):
    """A linear map A of images: A x, Aᵀ y, and A⁺ y, the image of minimum norm with A A⁺ y = y."""

    apply: Callable[[Tensor], Tensor]
    adjoint: Callable[[Tensor], Tensor]
    pseudo_inverse: Callable[[Tensor], Tensor]


def block_means(side: int) -> Measurement:
    """The means of blocks of side × side pixels."""
    fill = partial(F.interpolate, scale_factor=side, mode="nearest")
    return Measurement(partial(F.avg_pool2d, kernel_size=side), lambda y: fill(y) / side**2, fill)


def conjugate_gradients(matrix: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> Tensor:
    """The solution x of matrix(x) = b for each row of the batch, from 0 (Hestenes & Stiefel 1952). A
    network's matrix need not be positive definite, so a row takes no step along negative curvature."""

    def dot(u: Tensor, v: Tensor) -> Tensor:  # of each row, [B, 1, 1, 1]
        return (u * v).sum((1, 2, 3), keepdim=True)

    x, r, p = torch.zeros_like(b), b, b
    rr = dot(r, r)
    for _ in range(iterations):
        ap = matrix(p)
        curvature = dot(p, ap)
        step = torch.where(curvature > 0, rr / curvature.clamp(min=1e-30), 0.0)
        x, r = x + step * p, r - step * ap
        before, rr = rr, dot(r, r)
        p = r + (rr / before.clamp(min=1e-30)) * p
    return x
