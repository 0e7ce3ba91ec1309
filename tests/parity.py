"""What gz computes for the page *Parity*: losses, samplers and transforms in float64, on fixed networks,
images and noise. `tools/references.py` computes the same by published code, and `truth/parity.json` has its
numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from gzcli.core.types import Batch, DataInfo, Noise
from gzcli.models import catalog
from gzcli.models.autoregressive.scales import ScaledCodebook
from gzcli.models.autoregressive.tokenizer import Codebook, CodebookOptions
from gzcli.models.autoregressive.vqgan import adaptive_weight
from gzcli.models.base import group_options
from gzcli.models.denoising import consistency as consistency_file
from gzcli.models.denoising import samplers
from gzcli.models.denoising.denoiser import UNCLIPPED
from gzcli.models.denoising.process import Level
from gzcli.models.diffusion.ect import ECT
from gzcli.models.flow_matching.fm import couple_noise
from gzcli.models.labelled import ClusterOptions, LabelOptions
from gzcli.models.nn.pixels import LogisticMixture
from gzcli.models.nn.transformer import TransformerOptions
from gzcli.models.normalizing_flow.flowpp import LogisticCDF
from gzcli.models.normalizing_flow.layers import AffineCoupling, InvertibleConv1x1
from gzcli.models.normalizing_flow.tarflow import PatchFlow

RECORDED = Path(__file__).parent / "truth" / "parity.json"
SHAPE, N = (1, 8, 8), 3
LATENTS = DataInfo(SHAPE, None)  # samples of images are clamped, of latents they are not


def waves(*shape: int, k: float = 0.0) -> Tensor:
    """Fixed numbers in (-1, 1), which look like noise."""
    return torch.sin(
        1e4 * torch.sin(torch.arange(1, 1 + math.prod(shape), dtype=torch.float64) + 7 * k)
    ).view(*shape)


def normal(*shape: int, k: float = 0.0) -> Tensor:
    """The k-th of fixed draws that stand for standard normal ones."""
    return 1.4 * waves(*shape, k=k + 20)


def uniform(*shape: int, k: float = 0.0) -> Tensor:
    return 0.5 + 0.499 * waves(*shape, k=k + 40)


class Fixed(Noise):
    """The fixed draws, in turn."""

    def __init__(self) -> None:
        self.device, self.normals, self.uniforms = torch.device("cpu"), 0, 0

    def randn(self, *shape: int) -> Tensor:
        self.normals += 1
        return normal(*shape, k=self.normals - 1)

    def rand(self, *shape: int) -> Tensor:
        self.uniforms += 1
        return uniform(*shape, k=self.uniforms - 1)


class Net(nn.Module):
    """A network of three parameters that mixes neighbours, and depends on x and t in a curved way. Times are
    those of gz, [B] or several a row."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.7, 0.4, 0.3], dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, *_: object) -> Tensor:
        times = torch.as_tensor(t).to(x).reshape(len(x), -1)
        phase = sum((0.003 - 0.001 * i) * times[:, i] for i in range(times.shape[1])).view(-1, 1, 1, 1)
        near = x.roll(1, -1) - 0.5 * x.roll(1, -2)
        return self.w[0] * torch.tanh(x + self.w[1] * near + torch.cos(phase)) + self.w[2] * torch.sin(phase)


class Score(nn.Module):
    """A discriminator of two parameters: [B] numbers of images."""

    independent = True

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5, -0.8], dtype=torch.float64))

    def forward(self, x: Tensor, *_: object) -> Tensor:
        flat = x.reshape(len(x), -1)
        line = torch.linspace(-1, 1, flat.shape[1], dtype=torch.float64)
        return torch.tanh(self.w[0] * flat * line + self.w[1] * flat.roll(1, 1) ** 2).sum(1)


class Draw(nn.Module):
    """A generator of one parameter: images of [B, 4] numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.9, dtype=torch.float64))

    def forward(self, z: Tensor, *_: object) -> Tensor:
        return torch.tanh(self.w * z.repeat(1, math.prod(SHAPE) // 4)).view(-1, *SHAPE)


X = 0.9 * waves(N, *SHAPE)
TIMES = torch.tensor([0.15, 0.5, 0.8], dtype=torch.float64)  # of a batch, gz's or theirs


def with_gradient(loss: Tensor, *modules: nn.Module) -> Tensor:
    """A loss, and its gradient by the parameters of modules."""
    parameters = [p for module in modules for p in module.parameters()]
    gradients = torch.autograd.grad(loss, parameters)
    return torch.cat([loss.reshape(1), *(g.flatten() for g in gradients)]).detach()


@contextmanager
def in_float64() -> Iterator[None]:
    """Inside, what has no type is float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# ---------------------------------------------------------------------------- denoisers


def denoiser(name: str, data: DataInfo = LATENTS, **options: object) -> nn.Module:
    """A model of this name with the fixed network."""
    model = catalog.load(name).of(data, **options).double()
    model.net = Net()
    return model


def batch(**extra: Tensor) -> Batch:
    return Batch(X, None, torch.arange(N), Fixed(), extra)


def loss_of(model: nn.Module, t: Tensor, **extra: Tensor) -> Tensor:
    """The loss at these times, and its gradient."""
    with mock.patch.object(model, "draw_times", lambda *_: t):
        return with_gradient(model.loss(batch(**extra))["loss"], model.net)


def walk(model: nn.Module, sampler: Callable[..., Tensor], path: list[Level], **options: object) -> Tensor:
    """What a sampler makes along a path of the noise with which it starts."""
    noise = Fixed()
    x = path[0].sigma * noise.randn(N, *SHAPE)
    with torch.no_grad():
        randn = partial(noise.randn, N, *SHAPE)
        return sampler(model.denoiser(options=UNCLIPPED), x, path, randn=randn, **options)


def drawn(model: nn.Module, **options: object) -> Tensor:
    """Images by `sample`."""
    return model.sample(N, noise=Fixed(), **group_options(model.sample, options))


STEPS = 40  # of a discrete process


def ddpm(data: DataInfo = LATENTS, **options: object) -> nn.Module:
    linear = {"timesteps": STEPS, "schedule": "linear", "prediction": "eps"}
    return denoiser("ddpm", data, **linear | options)


DISCRETE = torch.tensor([3, 17, 36])  # times of ddpm


def ddpm_loss() -> Tensor:
    return loss_of(ddpm(), DISCRETE)


def ddpm_v_loss() -> Tensor:
    return loss_of(ddpm(prediction="v"), DISCRETE)


def schedule() -> Tensor:
    return torch.from_numpy(ddpm(schedule="cosine").process.alpha ** 2)


def whole(name: str, **options: object) -> Callable[[], Tensor]:
    """`sample` of ddpm along all of its steps."""
    images = DataInfo(SHAPE, 256)
    return lambda: drawn(ddpm(images), sampler=name, steps=STEPS, spacing="trailing", **options)


def inverse_ddim() -> Tensor:
    """From the least of the noise levels, which is where the published code takes an image to be."""
    model = ddpm()
    path = model.process.path(STEPS, "trailing")[:-1]
    with torch.no_grad():
        return samplers.ddim_inverse(model.denoiser(options=UNCLIPPED), X, path)


WALKED = [1.0, 0.85, 0.7, 0.5, 0.3, 0.15, 0.05]  # times of samplers of sgm


def edm(**options: object) -> nn.Module:
    return denoiser("edm", sigma_data=0.5, **options)


def time_of(sigma: Tensor) -> Tensor:
    """gz's time of σ of edm, 0 … 1."""
    return (sigma / 0.002).log() / math.log(80 / 0.002)


def edm_loss() -> Tensor:
    return loss_of(edm(), time_of((1.2 * normal(N) - 1.2).exp()))


MOST, CHURN = 60.0, 1.0  # σ from which edm walks, and S_churn: below the largest σ of the process with it


def karras(steps: int = 6, rho: float = 7.0) -> list[float]:
    ends = [s ** (1 / rho) for s in (MOST, 0.002)]
    return [(ends[0] + i / (steps - 1) * (ends[1] - ends[0])) ** rho for i in range(steps)]


def edm_walk(churn: float) -> Tensor:
    model = edm()
    times = time_of(torch.tensor(karras(), dtype=torch.float64)).tolist()
    path = [*map(model.process.level, times), Level(0.0, 1.0, 0.0)]
    return walk(model, samplers.heun, path, churn=churn, level=model.process.ratio_level)


def sgm(sde: str, weighting: str = "score") -> nn.Module:
    return denoiser("sgm", process=sde, prediction="eps", weighting=weighting)


def sgm_walk(sampler: Callable[..., Tensor], **options: object) -> Tensor:
    model = sgm("vp")
    return walk(model, sampler, [model.process.level(t) for t in WALKED], **options)


def probability_flow(sde: str) -> Tensor:
    with torch.no_grad():
        return sgm(sde).velocity()(X, TIMES)


LADDER, STEP = (10.0, 0.1, 5), 0.02  # σ from, to, and levels; the step over σ²


def ncsnv2() -> nn.Module:
    most, least, levels = LADDER
    return denoiser("ncsnv2", sigma_max=most, sigma_min=least, levels=levels, weighting="score")


def ncsnv2_loss() -> Tensor:
    return loss_of(ncsnv2(), 1 - torch.tensor([0, 2, 4]) / 4)


def annealed_langevin() -> Tensor:
    return drawn(ncsnv2(), sampler="langevin", repeats=2, step=STEP)


# ---------------------------------------------------------------------------- flows without a density


def flow(name: str, **options: object) -> nn.Module:
    return denoiser(name, **options)


def pairing() -> Tensor:
    return couple_noise(normal(16, *SHAPE), waves(16, *SHAPE), None, nn.Identity())


def reflow_loss() -> Tensor:
    labels = ClusterOptions()
    model = catalog.load("reflow")(LATENTS, teacher=flow("rf"), labels=labels).double()
    return loss_of(model, TIMES, noise=normal(N, *SHAPE), image=X)


SPANS = torch.tensor([0.7, 0.9, 0.95], dtype=torch.float64)  # the later times of intervals


def interval_loss(name: str, **options: object) -> Tensor:
    """The loss over intervals from TIMES to SPANS, in training."""
    model = flow(name, map_every=1, weight_power=0.5, **options).train()
    ends = iter([TIMES, SPANS])
    noise = Fixed()
    with (
        mock.patch.object(model, "draw_times", lambda *_: TIMES.clone()),
        mock.patch.object(noise, "rand", lambda *_: next(ends)),
    ):
        return with_gradient(model.loss(Batch(X, None, torch.arange(N), noise))["loss"], model.net)


RHO = 0.25


def soflow_loss() -> Tensor:
    """The gradient alone: the authors' loss has it, and another value."""
    return interval_loss("soflow", rho=[RHO, RHO])[1:]


def consistency(teacher: nn.Module) -> nn.Module:
    """ect of float64, with a table of levels of that."""
    labels = LabelOptions(label_dropout=0.0)
    model = ECT(LATENTS, teacher=teacher, labels=labels).double()
    model.net = Net()
    return model


Q, STAGE = 2.0, 3


def ect_loss() -> Tensor:
    """Without the smoothing of the norm at 0, which is gz's."""
    model, u = consistency(edm()), torch.special.ndtr(normal(N))
    model.gap = Q ** -(STAGE + 1)
    b = batch()
    with mock.patch.object(consistency_file, "SMOOTH", 0.0), mock.patch.object(b.noise, "rand", lambda *_: u):
        return with_gradient(model.loss(b)["loss"], model.net)


def ect_draw() -> Tensor:
    return drawn(consistency(edm()), steps=2, sigma_last=0.8)


# ---------------------------------------------------------------------------- energies


def eqm(**options: object) -> Tensor:
    model = flow("eqm")
    return drawn(model, steps=8, step=0.02, stop=0.0, **options)


# ---------------------------------------------------------------------------- adversarial


def gan(name: str, phase: str, **options: object) -> Tensor:
    """The loss of a phase, and its gradient."""
    model = catalog.load(name).of(DataInfo(SHAPE, 256), latent=4, **options)
    model.generator, model.critic = Draw(), Score()
    module = model.critic if phase == "critic" else model.generator
    return with_gradient(model.train().loss(batch(), phase)["loss"], module)


GAMMA = 0.3


def weight_of_gan() -> Tensor:
    last = nn.Conv2d(1, 1, 3, padding=1).double()
    with torch.no_grad():
        last.weight.copy_(waves(1, 1, 3, 3, k=3))
        last.bias.zero_()
    x = last(X)
    return adaptive_weight((x - X).abs().mean(), -Score()(x).mean(), last).reshape(1)


# ---------------------------------------------------------------------------- autoencoders


class Encode(nn.Module):
    """Means and log variances [B, 2 · 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(0.1 * waves(math.prod(SHAPE), 8, k=5))

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return x.flatten(1) @ self.w


class Decode(nn.Module):
    """Logits of images of [B, 4] numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(0.7 * waves(4, math.prod(SHAPE), k=6))

    def forward(self, z: Tensor, *_: object) -> Tensor:
        return torch.tanh(z @ self.w).view(-1, *SHAPE)


BINARY = (X > 0).double() * 2 - 1


def vae(**options: object) -> Tensor:
    """The loss, and its gradient."""
    model = catalog.load("vae").of(DataInfo(SHAPE, 2), latent=4, pixels="bernoulli", **options).double()
    model.encoder, model.decoder = Encode(), Decode()
    loss = model.loss(Batch(BINARY, None, torch.arange(N), Fixed()))["loss"]
    return with_gradient(loss, model.encoder, model.decoder)


CODES = 0.8 * waves(6, 4, k=8)  # six codes of four numbers
VECTORS = waves(2, 4, 4, 4, k=9)  # of a map of two images
DECAY, BETA = 0.9, 0.25


def vqvae() -> Tensor:
    """The quantised vectors and the loss of a step, and the codes after it."""
    options = CodebookOptions(codes=6, dim=4, decay=DECAY, beta=BETA, restart=False, codebook="ema")
    book = Codebook(options).double().train()
    book.embedding.copy_(CODES)
    book.total.copy_(CODES / 6)
    out, logged = book(VECTORS, Fixed())
    return torch.cat([out.flatten(), logged["loss"].reshape(1), book.embedding.flatten()])


def scales() -> Tensor:
    """The sum of the parts of all scales, and the loss."""
    options = CodebookOptions(codes=6, dim=4, beta=BETA, codebook="gradient", scales=(1, 2, 4), restart=False)
    book = ScaledCodebook(options, (4, 4)).double().eval()
    book.embedding.data.copy_(CODES)
    for conv in book.convs:
        nn.init.zeros_(conv.weight), nn.init.zeros_(conv.bias)
    out, logged = book(VECTORS, Fixed())
    return torch.cat([out.flatten(), logged["loss"].reshape(1)]).detach()


# ---------------------------------------------------------------------------- densities

PARAMS = waves(2, 4, 4, 5, 10, k=11)  # five components: logits, 3 means, 3 log scales, 3 coefficients
COLOURS = torch.round(127.5 * (1 + waves(2, 4, 4, 3, k=12))) / 127.5 - 1
COLOURS[0, 0, 0] = torch.tensor([-1.0, 1.0, -1.0])


def mixture() -> Tensor:
    parts = PARAMS.movedim(-1, -2).flatten(-2)  # [..., 10 · 5]
    return LogisticMixture(3, 256, 5).log_prob(parts, COLOURS).flatten(1).sum(1)


FLAT = waves(2, 4, 4, 4, k=13)  # a map that a flow transforms


def invertible() -> nn.Module:
    """A 1×1 convolution of four channels, of fixed factors."""
    layer = InvertibleConv1x1(4).double()
    layer.permutation.copy_(torch.tensor([2, 0, 3, 1]))
    layer.sign.copy_(torch.tensor([1, -1, 1, 1]))
    for i, p in enumerate(layer.parameters()):
        p.data.copy_(0.5 * waves(*p.shape, k=20 + i))
    return layer


def conv1x1() -> Tensor:
    layer = invertible()
    y, log_det = layer(FLAT)
    return torch.cat([layer.weight().flatten(), y.flatten(), log_det.expand(2).flatten()]).detach()


class Halves(nn.Module):
    """Shift and scale of half of the channels [B, 2, …] by the other half."""

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return torch.cat([x.roll(1, 2) * 0.5, torch.sin(2 * x)], 1)


def coupling() -> Tensor:
    y, log_det = AffineCoupling(4, Halves()).double()(FLAT)
    return torch.cat([y.flatten(), log_det]).detach()


def logistic_cdf() -> Tensor:
    logits, mean, log_scale = waves(3, 2, 5, 4, k=14)
    y, log_slope = LogisticCDF.from_logits(logits, mean, log_scale).logit_cdf(2 * waves(2, 4, k=15))
    return torch.cat([y.flatten(), log_slope.flatten()])


class Means(nn.Module):
    """The mean of each patch and those before it."""

    def forward(self, h: Tensor, *_: object, **__: object) -> Tensor:
        return h.cumsum(1) / torch.arange(1, h.shape[1] + 1).view(1, -1, 1).to(h)


EMBED, OUT, PLACES = (
    waves(4, 6, k=16),
    0.4 * waves(8, 6, k=17),
    waves(9, 6, k=18),
)  # of patches of four numbers
PATCHES = waves(2, 9, 4, k=19)


def patch_flow(flip: bool) -> Tensor:
    """The images of a flow over nine patches, and the log-det."""
    block = PatchFlow((3, 3), 4, TransformerOptions(width=6, layers=1, heads=1), int(flip)).double()
    del block.embed, block.out, block.position
    block.embed, block.out = partial(torch.matmul, other=EMBED), partial(torch.matmul, other=OUT.T)
    block.trunk, block.position = Means(), lambda: PLACES.roll(1, 0)
    z, log_det = block(PATCHES, torch.zeros(1, 1, 6))
    return torch.cat([z.flatten(), log_det])


# ---------------------------------------------------------------------------- the rows


@dataclass(frozen=True)
class Row:
    """A line of the page: the models, what of them is compared, and gz's value."""

    models: str
    part: str
    ours: Callable[[], Tensor]


LOSS = "loss and its gradient"
ROWS = {
    "ddpm-loss": Row("ddpm, cddpm", f"{LOSS}, of ε", ddpm_loss),
    "ddpm-v": Row("ddpm", f"{LOSS}, of v", ddpm_v_loss),
    "ddpm-cosine": Row("ddpm", "cosine noise schedule", schedule),
    "ddpm-ancestral": Row("ddpm, cddpm, dit", "ancestral sampler", whole("ancestral", variance="small")),
    "ddpm-ddim": Row("ddpm", "DDIM", whole("ddim")),
    "ddpm-eta": Row("ddpm", "DDIM with η = .5", whole("ddim", eta=0.5)),
    "diffae-inverse": Row("diffae", "DDIM backwards, to noise", inverse_ddim),
    "edm-loss": Row("edm", LOSS, edm_loss),
    "edm-heun": Row("edm", "Heun sampler", lambda: edm_walk(0.0)),
    "edm-churn": Row("edm", "Heun sampler with S_churn = 1", lambda: edm_walk(CHURN)),
    "sgm-vp": Row("sgm", f"{LOSS}, VP", lambda: loss_of(sgm("vp"), TIMES)),
    "sgm-likelihood": Row(
        "sgm", f"{LOSS}, VP, weighted by g²", lambda: loss_of(sgm("vp", "likelihood"), TIMES)
    ),
    "sgm-subvp": Row("sgm", f"{LOSS}, sub-VP", lambda: loss_of(sgm("subvp"), TIMES)),
    "sgm-ve": Row("sgm", f"{LOSS}, VE", lambda: loss_of(sgm("ve"), TIMES)),
    "sgm-ode": Row(
        "sgm",
        "probability-flow ODE, VP, sub-VP and VE",
        lambda: torch.cat([*map(probability_flow, ("vp", "subvp", "ve"))]),
    ),
    "sgm-em": Row(
        "sgm",
        "Euler–Maruyama sampler",
        lambda: sgm_walk(samplers.euler_maruyama, sde=sgm("vp").process),
    ),
    "sgm-dpmpp": Row("ddpm, sgm", "DPM-Solver++(2M)", lambda: sgm_walk(samplers.dpmpp)),
    "sgm-unipc": Row("ddpm", "UniPC", lambda: sgm_walk(samplers.unipc)),
    "ncsnv2-loss": Row("ncsnv2", LOSS, ncsnv2_loss),
    "ncsnv2-langevin": Row("ncsnv2", "annealed Langevin sampler", annealed_langevin),
    "fm-loss": Row("fm", LOSS, lambda: loss_of(flow("fm"), TIMES)),
    "fm-midpoint": Row("fm, cfm", "midpoint sampler", lambda: drawn(flow("fm"), sampler="midpoint", steps=8)),
    "fm-sigma": Row("fm", f"{LOSS}, σ = .1", lambda: loss_of(flow("fm", sigma_min=0.1), TIMES)),
    "cfm-ot": Row("cfm", "optimal pairs of noise and images", pairing),
    "rf-loss": Row("rf", LOSS, lambda: loss_of(flow("rf"), TIMES)),
    "rf-euler": Row("rf, reflow", "Euler sampler", lambda: drawn(flow("rf"), sampler="euler", steps=10)),
    "reflow-loss": Row("reflow", f"{LOSS}, on pairs", reflow_loss),
    "meanflow-loss": Row("meanflow", LOSS, lambda: interval_loss("meanflow")),
    "meanflow-sample": Row("meanflow", "one-step sampler", lambda: drawn(flow("meanflow"), steps=1)),
    "soflow-loss": Row("soflow", "gradient of the loss", soflow_loss),
    "ect-loss": Row("ect", LOSS, ect_loss),
    "ect-sample": Row("ect", "two-step sampler", ect_draw),
    "eqm-loss": Row("eqm", LOSS, lambda: loss_of(flow("eqm"), TIMES)),
    "eqm-descent": Row("eqm", "gradient descent", lambda: eqm(momentum=0.0)),
    "r3gan-critic": Row(
        "r3gan", f"{LOSS}, of the discriminator", lambda: gan("r3gan", "critic", r1=GAMMA, r2=GAMMA)
    ),
    "r3gan-generator": Row("r3gan", f"{LOSS}, of the generator", lambda: gan("r3gan", "generator")),
    "wgan-critic": Row("wgan", f"{LOSS}, of the critic", lambda: gan("wgan", "critic", penalty=10.0)),
    "vqgan-weight": Row("vqgan", "adaptive weight of the adversarial loss", weight_of_gan),
    "vae-elbo": Row("vae, cvae", LOSS, vae),
    "vae-iwae": Row("vae", "gradient of the loss of four importance samples", lambda: vae(iwae=4)[1:]),
    "vqvae-step": Row("vqvae, vqgan", "codebook: a step of moving averages", vqvae),
    "var-scales": Row("var", "codebook of three scales", scales),
    "pixelcnnpp-mixture": Row("pixelcnnpp, vdvae, hvae", "discretised mixture of logistics", mixture),
    "glow-conv": Row("glow", "1×1 convolution and its log-det", conv1x1),
    "realnvp-coupling": Row("realnvp, glow, flow", "affine coupling and its log-det", coupling),
    "flowpp-mixture": Row("flowpp", "logistic mixture and its log-det", logistic_cdf),
    "tarflow-block": Row(
        "tarflow",
        "a flow each way, and its log-det",
        lambda: torch.cat([patch_flow(False), patch_flow(True)]),
    ),
}


def value(name: str) -> Tensor:
    """gz's value of a row, flat."""
    with in_float64():
        torch.manual_seed(0)
        return ROWS[name].ours().detach().flatten()


def table() -> list[dict[str, str]]:
    """The rows of the page: what is compared with what, and the largest difference."""
    recorded, rows = json.loads(RECORDED.read_text()), []
    for name, row in ROWS.items():
        theirs = recorded[name]
        apart = difference(value(name), torch.tensor(theirs["values"], dtype=torch.float64))
        facts = {"models": row.models, "part": row.part, "reference": theirs["reference"]}
        rows.append(facts | {"version": theirs["version"], "difference": f"{apart:.1e}"})
    return rows


def difference(mine: Tensor, theirs: Tensor) -> float:
    """The largest difference, over the largest number or 1."""
    return float((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1))
