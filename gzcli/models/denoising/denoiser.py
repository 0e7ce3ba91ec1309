"""A denoising network: its prediction, training, guidance by labels, and likelihood.

The inputs of the network net(x, t, y, drop) are the noised image x [B, C, H, W]; its time t [B], or [B, 2]
for a network of two times; labels y [B] or [B, K], None if they are unknown; and drop [B], the rows whose
label is hidden. It predicts one of four functions of x_t = α x_0 + σ ε, each of which determines x_0 and ε:

    eps       ε
    x0        x_0
    v         (α ε − σ x_0) / √(α² + σ²), of the same variance at every time (Salimans 2022)
    velocity  dx_t/dt = α′ x_0 + σ′ ε
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.core.errors import UsageError
from gzcli.core.types import Batch, DataInfo, Noise, Progress
from gzcli.core.units import Size, sides
from gzcli.models.base import Model
from gzcli.models.denoising import samplers
from gzcli.models.denoising.process import Level, Process, normal_draws, stratified
from gzcli.models.denoising.samplers import Denoise, Estimate, Path, Sampler, Solver, Velocity, solve
from gzcli.models.labelled import GUIDANCE, ClusterOptions, Guidance, Labelled, LabelOptions
from gzcli.models.nn import double, to_fp32

Times = Literal["uniform", "stratified", "logit_normal", "cosine", "log_normal"]
Prediction = Literal["eps", "x0", "v", "velocity"]

LEAST_SIGMA = 0.05  # least divisor of the error of a predicted image (Li & He 2025, arXiv:2511.13720)


@dataclass(frozen=True)
class GuidanceOptions:
    """Labels and size of samples.

    guidance: classifier-free guidance scale (Ho & Salimans 2022). 0: unconditional; 1: no guidance; above 1:
      sharper. auto: chosen at the end of training on validation images. Default: 1, or 1.3 for models with
      clusters or if `weak` is set.
    size: image size in pixels, if the network supports other sizes. Default: the size of the training images.
    """

    guidance: Guidance = None
    size: Size | None = None


@dataclass(frozen=True)
class DrawOptions(GuidanceOptions):
    """Options of samples along noise levels, for any sampler.

    interval: interval of noise in which guidance is applied (Kynkäänniemi 2024, arXiv:2404.07724), as
      fractions of the way from data to noise; at .5 there is as much noise as image. The paper's σ of .28 …
      2.9 is .17 … .79.
    weak: run of a weaker model for autoguidance (Karras 2024, arXiv:2406.02507), with fewer steps or a
      smaller network. Replaces the unconditional prediction. Default: none.
    """

    interval: tuple[float, float] = (0.0, 1.0)
    weak: str | None = None


@dataclass(frozen=True)
class WalkOptions(DrawOptions):
    """`DrawOptions` of a sampler along noise levels.

    clip: whether predicted images are clamped to [-1, 1].
    dynamic: quantile of |x_0| for dynamic thresholding, such as .995, instead of clamping (Saharia 2022).
      Default: off.
    """

    clip: bool = True
    dynamic: float | None = None


LOSSES = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.smooth_l1_loss}
PURE = 1e6  # σ/α from which noise says nothing about an image in fp32
QUANTILES = 4097  # of a distribution of times


@dataclass(frozen=True, kw_only=True)
class TimeOptions:
    """How a batch draws its times.

    time_sampling: distribution of training times: independent (uniform; in score models stratified), one from
      each of B equal intervals (stratified), concentrated in the middle (logit_normal; Esser 2024,
      arXiv:2403.03206), uniform in the angle of (α, σ) as in the cosine schedule (cosine), or normal in log
      σ/α (log_normal; Karras 2022).
    log_mean: mean of log σ/α in training by log_normal.
    log_std: standard deviation of log σ/α.
    """

    time_sampling: Times = "stratified"
    log_mean: float = -1.2
    log_std: float = 1.2


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions(TimeOptions):
    """What the network predicts, and how it is trained.

    bounded: whether predicted images are clamped to [-1, 1], in training and sampling. Gives clean black
      backgrounds and a higher likelihood. Not for latents.
    prediction: prediction target: the noise (eps), v = (α ε − σ x_0) / √(α² + σ²) (Salimans 2022), the
      velocity α′ x_0 + σ′ ε, or the image (x0), with the error weighted as for v or the velocity (Li & He
      2025, arXiv:2511.13720).
    loss_type: error of the prediction: squared (l2), absolute (l1) or Huber's.
    weighting: loss weight: the unweighted error of the prediction (even), the unweighted error of ε (score),
      or g²/σ² of it, a bound of the likelihood (likelihood; Song 2021b, arXiv:2101.09258).
    min_snr: γ of min-SNR-γ loss weights (Hang 2023, arXiv:2303.09556). Default: see `weighting`.
    """

    bounded: bool = False
    prediction: Prediction = "v"
    loss_type: Annotated[str, LOSSES] = "l2"
    weighting: Literal["even", "score", "likelihood"] = "even"
    min_snr: float | None = None


AS_TRAINED, UNCLIPPED = WalkOptions(guidance=1.0), WalkOptions(guidance=1.0, clip=False)


# a model and the weaker one away from which its samples are guided: several threads may draw from one model
_GUIDED: ContextVar[tuple[Denoiser | None, Denoiser | None]] = ContextVar("guided", default=(None, None))


class Denoiser(Labelled):
    """A network on a process."""

    latents = True
    best = "fd"  # a lower loss does not mean better images
    watched: ClassVar[str | None] = "loss"
    prediction: Prediction = "velocity"  # what the network predicts
    time_sampling: str = "stratified"  # how a batch draws its times
    quantiles: Tensor | None  # quantiles of the distribution of times, unless it is from `Process.times`
    loss_type, weighting = "l2", "even"
    min_snr: float | None = None
    rescale = False  # whether the network sees x / √(α² + σ²) instead of x
    bounded = False  # whether estimates of x_0 are clamped to [-1, 1] if they are images

    def __init__(self, data: DataInfo, net: nn.Module, process: Process, labels: ClusterOptions):
        super().__init__(data, labels)
        self.net, self.process = net, process
        self.register_buffer("quantiles", None, persistent=False)

    def train_by(self, options: ObjectiveOptions) -> None:
        """Sets the options of training. Raises UsageError for incompatible weights, and for a prediction that
        the process does not determine."""
        if options.weighting != "even" and options.min_snr is not None:
            hint = "omit one of them"
            raise UsageError(
                f"`model.min_snr` does not work with `model.weighting: {options.weighting}`", hint=hint
            )
        end = self.process.level(self.process.noisy)
        if options.prediction == "eps" and end.sigma > PURE * end.alpha:
            message = "`prediction: eps` does not determine the image where the last level is pure noise"
            raise UsageError(message, hint="set `model.prediction` to `v` or `x0`")
        self.prediction, self.bounded, self.loss_type = options.prediction, options.bounded, options.loss_type
        self.weighting, self.min_snr = options.weighting, options.min_snr
        self.draw_by(options)

    def draw_by(self, options: TimeOptions) -> None:
        """Sets the distribution of training times."""
        self.time_sampling, u = options.time_sampling, np.linspace(0, 1, QUANTILES)
        with np.errstate(divide="ignore"):
            if options.time_sampling == "cosine":
                ends = (self.process.level(t) for t in (self.process.clean, self.process.noisy))
                low, high = (math.atan2(level.sigma, level.alpha) for level in ends)
                log_ratio = np.log(np.tan(low + u * (high - low)))
            elif options.time_sampling == "log_normal":
                from scipy.special import ndtri  # saves other models a tenth of a second

                log_ratio = options.log_mean + options.log_std * ndtri(u)
            else:
                return
        self.quantiles = torch.from_numpy(self.process.times_at(log_ratio)).float()

    def on_format(self, format: int) -> None:
        if format < 2:
            self.process.clock = "time"

    # ---- training

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """The error of the network's prediction at one random time per image."""
        t = self.draw_times(batch.noise, len(batch))
        eps, x = self.noise_and_images(batch)
        y, drop = self.training_labels(batch)
        level = self.process.levels_at(t)
        x_t = level.alpha * x + level.sigma * eps
        inputs = self.inputs(x_t, level, self.training_guide(batch))
        out = self.within(self.raw_output(inputs, self.time_input(t), y, drop), x_t, level)
        return self.objective(out, self.target(x, eps, level), level)

    def draw_times(self, noise: Noise, n: int) -> Tensor:
        """The times of a batch, [n]. For logit_normal, the uniform draws get standard normal logits (Esser
        2024, arXiv:2403.03206, section 3.1)."""
        u = noise.rand(n)
        if self.time_sampling != "uniform":
            u = stratified(u, noise)
        if self.time_sampling == "logit_normal":
            u = normal_draws(u).sigmoid()
        if self.quantiles is None:
            return self.process.times(u)
        place = u.to(self.quantiles.dtype) * (len(self.quantiles) - 1)
        k = place.long().clamp_(max=len(self.quantiles) - 2)
        return self.process.nearest(torch.lerp(self.quantiles[k], self.quantiles[k + 1], place - k))

    def noise_and_images(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The noise ε and the images x_0 [B, C, H, W] of a batch."""
        return batch.noise.randn(*batch.x.shape), batch.x

    def target(self, x: Tensor, eps: Tensor, level: Level) -> Tensor:
        """The target of the network's prediction."""
        if self.prediction == "eps":
            return eps
        if self.prediction == "x0":
            return x
        if self.prediction == "v":
            return (level.alpha * eps - level.sigma * x) / self.process.norm(level)
        d_alpha, d_sigma = self.process.derivatives(level.t)
        return d_alpha * x + d_sigma * eps

    def objective(self, out: Tensor, target: Tensor, level: Level) -> dict[str, Tensor]:
        """The loss of predictions at these noise levels, and further values to log."""
        weight = self.loss_weight(level)
        if self.prediction == "x0" and weight is None:
            scale = level.sigma / self.process.norm(level) if self.rescale else level.sigma
            scale = scale.clamp(min=LEAST_SIGMA)
            out, target = out / scale, target / scale
        error = LOSSES[self.loss_type](out, target, reduction="none").flatten(1).mean(1)  # [B]
        if weight is None:
            return {"loss": error.mean()}
        return {"loss": (weight * error).mean(), "unweighted": error.detach().mean()}

    def loss_weight(self, level: Level) -> Tensor | None:
        """The weight [B] of the prediction's error; None means 1."""
        if self.min_snr is not None:
            return self.process.snr(level).clamp(max=self.min_snr) / self.image_weight(level)
        if self.weighting == "even":
            return None
        alpha, sigma = level.alpha.view(-1), level.sigma.view(-1)
        if self.prediction == "eps":
            weight = torch.ones_like(alpha)
        elif self.prediction == "v":  # the error of ε is α/r times that of v
            weight = (level.alpha / self.process.norm(level)).view(-1) ** 2
        else:
            weight = self.process.snr(level) / self.image_weight(level)
        if self.weighting == "likelihood":
            weight = weight * self.process.rates(level.t)[1].abs().view(-1) / sigma**2
        return weight

    def image_weight(self, level: Level) -> Tensor:
        """The factor [B] by which the squared error of x_0 enters that of the prediction."""
        snr = self.process.snr(level)
        if self.prediction == "velocity":
            d_alpha, d_sigma = self.process.derivatives(level.t)
            return (level.alpha / level.sigma * d_sigma - d_alpha).view(-1) ** 2
        return {"eps": snr, "x0": torch.ones_like(snr), "v": snr + 1}[self.prediction]

    def training_guide(self, batch: Batch) -> Tensor | None:
        """The image that guides the network in training, if any."""
        return None

    # ---- the network

    def inputs(self, x: Tensor, level: Level, guide: Tensor | None = None) -> Tensor:
        """The first input of the network, from x and an image that guides it."""
        return x / self.process.norm(level) if self.rescale else x

    def time_input(self, t: Tensor) -> Tensor:
        """The network's second input at times t [B]; a network of two times gets [B, 2]."""
        return self.process.scale * t

    def raw_output(self, x: Tensor, t: Tensor, y: Tensor | None, drop: Tensor | None = None) -> Tensor:
        """The unguided output for the network's inputs, in fp32."""
        return to_fp32(self.net(x, t, y, drop))

    def output(
        self,
        x: Tensor,
        level: Level,
        y: Tensor | None = None,
        scale: float = 1.0,
        guide: Tensor | None = None,
    ) -> Tensor:
        """The guided output at noise levels `level`."""
        t = level.t if isinstance(level.t, Tensor) else x.new_full((len(x),), level.t)
        inputs, time = self.inputs(x, level, guide), self.time_input(t)
        if self.weak is None or scale == 1:
            return self.within(self.guided_output(inputs, time, y, scale), x, level)
        weak = self.weak.output(x, level, y, 1.0, guide)
        return self.within(torch.lerp(weak, self.raw_output(inputs, time, y), scale), x, level)

    def guided_output(self, x: Tensor, t: Tensor, y: Tensor | None, scale: float) -> Tensor:
        """The output u + scale · (c − u) in fp32, where c is the output with labels and u that without (Ho &
        Salimans 2022, arXiv:2207.12598, eq. 6). It takes one pass of a doubled batch; at scales 1 and 0, one
        pass of the batch itself."""
        if y is None or scale in (0, 1):
            return self.raw_output(x, t, y if scale else None)
        n = x.shape[0]
        label_hidden = torch.arange(2 * n, device=x.device) >= n
        out = self.raw_output(x.repeat(2, 1, 1, 1), torch.cat([t, t]), torch.cat([y, y]), label_hidden)
        return torch.lerp(out[n:], out[:n], scale)

    def within(self, out: Tensor, x: Tensor, level: Level) -> Tensor:
        """The output at x; if the model is `bounded`, that whose estimate of x_0 is clamped. In training, the
        gradient is that of `out` itself, so that an estimate outside the range can move back."""
        if not self.bounded or self.data.levels is None:
            return out
        x0 = self.into_range(self.to_estimate(out, x, level).x0)
        inside = self.target(x0, (x - level.alpha * x0) / level.sigma, level)
        inside = torch.cat([inside, out[:, x.shape[1] :]], 1)  # shares of variances have no range
        return out + (inside - out).detach() if self.training else inside

    def to_estimate(self, out: Tensor, x: Tensor, level: Level) -> Estimate:
        """The estimates of x_0 and ε from the network's output at x."""
        alpha, sigma = level.alpha, level.sigma
        if self.prediction == "eps":
            return Estimate((x - sigma * out) / alpha, out)
        if self.prediction == "x0":
            return Estimate(out, (x - alpha * out) / sigma)
        if self.prediction == "v":
            r = self.process.norm(level)
            return Estimate((alpha * x / r - sigma * out) / r, (sigma * x / r + alpha * out) / r)
        d_alpha, d_sigma = self.process.derivatives(level.t)
        det = alpha * d_sigma - sigma * d_alpha  # of (α, σ) and (α′, σ′)
        return Estimate((d_sigma * x - sigma * out) / det, (alpha * out - d_alpha * x) / det)

    def estimate(self, x: Tensor, level: Level, y: Tensor | None = None) -> Estimate:
        return self.to_estimate(self.output(x, level, y), x, level)

    def denoiser(
        self, y: Tensor | None = None, options: WalkOptions = AS_TRAINED, guide: Tensor | None = None
    ) -> Denoise:
        """The function `denoise(x, t)` of samplers, given labels y and an image `guide`."""
        guidance, (low, high) = self.guidance_scale(options.guidance), options.interval
        self.check_guidance(guidance, y)

        def denoise(x: Tensor, t: float) -> Estimate:
            scale = guidance if low <= self.process.share(t) <= high else 1.0
            level = self.process.batch_level(x, t)
            estimate = self.to_estimate(self.output(x, level, y, scale, guide), x, level)
            if not options.clip or self.data.levels is None:
                return estimate
            exact, x0 = self.process.level(t), self.into_range(estimate.x0, options.dynamic)
            return Estimate(x0, (x - exact.alpha * x0) / exact.sigma, estimate.share)

        return denoise

    def velocity(
        self, y: Tensor | None = None, guidance: float = 1.0, interval: Sequence[float] = (0.0, 1.0)
    ) -> Velocity:
        """The right-hand side of the probability-flow ODE, for solvers, given labels y. Rows whose time is
        outside the guidance interval take half the network passes."""
        self.check_guidance(guidance, y)
        low, high = interval

        def output(x: Tensor, t: Tensor) -> Tensor:
            if y is None or guidance == 1 or (low <= 0 and high >= 1):
                return self.output(x, self.process.levels_at(t), y, guidance)
            share, out = self.process.share(t), torch.empty_like(x)
            inside = (low <= share) & (share <= high)
            for rows, scale in ((inside, guidance), (~inside, 1.0)):
                if bool(rows.any()):
                    out[rows] = self.output(x[rows], self.process.levels_at(t[rows]), y[rows], scale)
            return out

        def f(x: Tensor, t: Tensor) -> Tensor:
            out = output(x, t)
            if self.prediction == "velocity":
                return out
            x0, eps, _ = self.to_estimate(out, x, self.process.levels_at(t))
            return self.process.velocity(x, x0, eps, t)

        return f

    def into_range(self, x0: Tensor, dynamic: float | None = None) -> Tensor:
        """Images clamped to [-1, 1], or thresholded at a quantile (Saharia 2022); latents unchanged."""
        if self.data.levels is None:
            return x0
        if dynamic is None:
            return x0.clamp(-1, 1)
        s = x0.abs().flatten(1).quantile(dynamic, 1).clamp(min=1)[:, None, None, None]
        return x0.clamp(-s, s) / s

    def learn_from(self, teacher: Denoiser) -> None:
        """Attaches the teacher, whose clusters become the student's."""
        if self.clusters is not None:
            self.clusters.load_state_dict(teacher.get_submodule("clusters").state_dict())
        self.attach("teacher", teacher)

    @property
    def weak(self) -> Denoiser | None:
        """The weaker model that currently guides samples in this thread."""
        guided, weak = _GUIDED.get()
        return weak if guided is self else None

    @contextmanager
    def guided_away_from(self, weak: Model) -> Iterator[None]:
        """Within the block, samples are guided away from a weaker model. Raises UsageError for a model with
        another prediction, or with other images, noise, labels or clusters."""
        form = lambda m: (m.prediction, m.data.shape, m.data.classes, m.labelled, m.process.path(4))  # noqa: E731
        if not isinstance(weak, Denoiser) or form(weak) != form(self):
            hint = "train it with the same recipe, for fewer steps or with a smaller network"
            raise UsageError("`weak` has different images, labels or noise levels than this model", hint=hint)
        centres = [None if m.clusters is None else m.clusters.centres.tolist() for m in (self, weak)]
        if centres[0] != centres[1]:
            raise UsageError("`weak` has different clusters", hint="train it with the same seed")
        token = _GUIDED.set((self, weak))
        try:
            yield
        finally:
            _GUIDED.reset(token)

    def guidance_scale(self, guidance: Guidance) -> float:
        if guidance in (None, "auto") and self.weak is not None:
            return GUIDANCE
        return super().guidance_scale(guidance)

    def check_guidance(self, guidance: float, y: Tensor | None) -> None:
        if self.weak is None:
            super().check_guidance(guidance, y)

    # ---- sampling

    def initial_noise(
        self, n: int, labels: Tensor | None, noise: Noise, size: Size | None
    ) -> tuple[Tensor, Any]:
        """The initial noise of n images of a size, and their labels."""
        x = self.process.prior_std * noise.randn(n, *self.shape_of(size))
        return x, self.draw_labels(labels, n, noise)

    def draw(
        self,
        n: int,
        labels: Tensor | None,
        noise: Noise,
        progress: Progress,
        options: Any,
        sampler: Sampler,
        path: Path | None = None,
    ) -> Tensor:
        """Draws n images [n, C, H, W] with a sampler; the options are `WalkOptions`, with `steps` and
        `spacing` if no path is given."""
        x, y = self.initial_noise(n, labels, noise, options.size)
        denoise, randn = self.denoiser(y, options), partial(noise.randn, *x.shape)
        path = self.process.path(options.steps, options.spacing) if path is None else path
        return self.into_range(sampler(denoise, x, path, randn=randn, progress=progress))

    def shape_of(self, size: Size | None) -> tuple[int, ...]:
        """The shape of images of a size; None: the training size. Raises UsageError for a size that the
        network or latents do not support."""
        if size is None or sides(size) == self.data.shape[1:]:
            return self.data.shape
        if self.data.levels is None or not getattr(self.net, "any_size", False):
            limit = "latents" if self.data.levels is None else "one size of images"
            height, width = self.data.shape[1:]
            raise UsageError(
                f"`size` {size} is not possible: the network of `{type(self).__name__}` is made for {limit}",
                hint=f"omit `size` to draw {width}×{height}; the U-Nets of ddpm, fm and sgm draw any size",
            )
        return self.data.shape[0], *sides(size)

    @property
    def grey_levels(self) -> int:
        """The number of grey levels. Raises UsageError for latents, which have none."""
        if self.data.levels is None:
            raise UsageError("latents have no grey levels, so there is no likelihood of the discrete image")
        return self.data.levels


def conditions_of(teacher: Denoiser, labels: LabelOptions) -> ClusterOptions:
    """The conditions of a student with the network of a `teacher`. Raises UsageError if only one of both is
    conditional."""
    if labels.conditional != teacher.conditional:
        value = str(teacher.conditional).lower()
        message = f"the teacher's `model.conditional` is {value}, but the student's is not"
        raise UsageError(message, hint="give both the same value")
    clusters = 0 if teacher.clusters is None else len(teacher.clusters)
    return ClusterOptions(labels.conditional, labels.label_dropout, clusters)


@dataclass(frozen=True)
class LikelihoodOptions:
    """The solution of the ODE from data to noise for a likelihood.

    solver: solver of the ODE, with one network call and gradient per step (euler, adams), two (midpoint,
      heun), four (rk4), or six in adaptive steps (adaptive).
    steps: number of steps of a fixed-step solver, even in log σ/α.
    tolerance: largest error of an adaptive step, of x and of the nats per dimension.
    probes: Rademacher vectors that estimate the divergence.
    """

    solver: Solver = "rk4"
    steps: int = 24
    tolerance: float = 1e-4
    probes: int = 1


class LikelihoodByODE(Denoiser):
    """A denoiser with the likelihood of its probability-flow ODE."""

    likelihood = "ode"

    def log_prob(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        *,
        noise: Noise,
        ode: LikelihoodOptions = LikelihoodOptions(),
    ) -> Tensor:
        """The log-likelihood of the discrete image, [B] nats, by the change of density along the ODE to noise
        (Song 2021, arXiv:2011.13456, eq. 39). With clusters, it is the joint one of x and its cluster. A
        conditional model without labels has the mixture of its classes, which takes one solution per class.
        Raises UsageError for latents, and for a mixture of more than 10 classes.

        Grey levels are dequantised uniformly, so the value is a bound. The dequantised images replace α x + σ
        ε at the time where σ/α is the deviation of the uniform noise, or at the nearest time of the model.
        With less noise, a model with spikes at the grey levels underestimates the likelihood; more noise
        hides details of flat parts. The divergence is Hutchinson's unbiased estimate.
        """
        density = partial(self.log_density, x, ode=ode)
        return self.over_classes(density, len(x), labels, noise)

    def log_density(
        self, x: Tensor, labels: Tensor | None, noise: Noise, *, ode: LikelihoodOptions
    ) -> Tensor:
        """log p(x | labels), [B] nats; with clusters, the joint log-density of x and its cluster."""
        n, size, width = len(x), x[0].numel(), 2 / (self.grey_levels - 1)  # of a grey level
        path = self.process.likelihood_path(1 / (self.grey_levels - 1) / math.sqrt(3), ode.steps)
        c = self.image_condition(x, labels)
        f, times = self.velocity(c), [level.t for level in path]
        alpha, std = path[0].alpha, self.process.prior_std
        x = alpha * (x + width * (noise.rand(*x.shape) - 0.5))
        total = x.new_zeros(())
        for _ in range(ode.probes):
            g = samplers.with_divergence(f, x.shape[1:], 2 * noise.randint(2, n, size).to(x.dtype) - 1)
            state = torch.cat([x.flatten(1), x.new_zeros(n, 1)], 1)
            state = solve(g, state, times, ode.solver, tolerance=ode.tolerance, norm=samplers.density_norm)
            z, gained = double(state[:, :-1]) / std, size * double(state[:, -1])
            # from data to noise log p changes by `gained`, to the log density of the noise
            total = total - 0.5 * z.square().sum(1) - size * math.log(std * math.sqrt(2 * math.pi)) - gained
        log_p = (total / ode.probes + size * math.log(alpha * width)).to(x)
        return log_p + self.condition_log_prob(c, labels)
