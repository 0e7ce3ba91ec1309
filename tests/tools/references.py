"""What published code computes for the rows of `tests/parity.py`, and the page's table.

python tests/tools/references.py record CLONES     writes tests/truth/parity.json
python tests/tools/references.py page              writes gzcli/docs/measured/parity.csv

CLONES/OWNER/NAME is a clone of that repository of GitHub, of which HEAD is run. Packages are those of `pip
install pythae torchcfm normflows diffusers`. All of it runs in float64: casts to float32 are replaced, random
draws are the fixed ones, and a GPU that it asks for is this CPU.
"""

from __future__ import annotations

import codeop
import importlib
import json
import math
import subprocess
import sys
import tempfile
import textwrap
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import parity
from parity import SHAPE, TIMES, N, Net, X, normal, uniform, with_gradient

from gzcli.core import measured
from gzcli.metrics.standings import as_csv

REFERENCES: dict[str, tuple[str, Callable[..., Tensor]]] = {}  # by row: repository or package, and its value
CLONES = Path()


def reference(row: str, of: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Enters what a repository (OWNER/NAME) or a package computes for a row."""

    def enter(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        REFERENCES[row] = of, function
        return function

    return enter


# ---------------------------------------------------------------------------- published code


def head(of: str) -> str:
    """The commit of a repository, or the version of a package."""
    if "/" not in of:
        return version(of)
    return git(of, "rev-parse", "HEAD").decode().strip()[:12]


def git(of: str, *words: str) -> bytes:
    folder = CLONES / of
    where = folder / ".git" if (folder / ".git").exists() else folder
    return subprocess.run(["git", "--git-dir", where, *words], check=True, capture_output=True).stdout


@contextmanager
def checkout(of: str, under: str = "") -> Iterator[None]:
    """Inside, the modules of a repository are imported; `under`: from this folder of it."""
    modules = set(sys.modules)
    with tempfile.TemporaryDirectory() as folder:
        paths = git(of, "ls-tree", "-r", "HEAD", "--name-only").decode().split("\n")
        for path in (path for path in paths if path.endswith(".py")):
            target = Path(folder, path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(git(of, "show", f"HEAD:{path}"))
        sys.path.insert(0, str(Path(folder, under)))
        try:
            yield
        finally:
            sys.path.remove(str(Path(folder, under)))
            for name in set(sys.modules) - modules:
                module = sys.modules[name]
                where = [getattr(module, "__file__", None), *getattr(module, "__path__", [])]
                if any(str(path).startswith(folder) for path in where):
                    del sys.modules[name]


def piece(of: str, path: str, start: str, **names: Any) -> Any:
    """A function of a file, which does not import as a whole; `names` are what it uses. Or the names after a
    loop of the file. start: how its first line begins."""
    lines = git(of, "show", f"HEAD:{path}").decode().split("\n")
    first = next(i for i, line in enumerate(lines) if line.lstrip().startswith(start))
    depth = len(lines[first]) - len(lines[first].lstrip())
    for end in range(first + 1, len(lines) + 1):  # a signature may end at the depth at which it begins
        inside = end < len(lines) and (not lines[end].strip() or lines[end].startswith(" " * (depth + 1)))
        text = textwrap.dedent("\n".join(lines[first:end]))
        if not inside and codeop.compile_command(text + "\n") is not None:
            exec(text, names)
            break
    return names[start.removeprefix("def ").rstrip("(")] if start.startswith("def ") else names


def absent(*names: str) -> Any:
    """Packages that published code imports and does not use here."""
    return mock.patch.dict(sys.modules, {name: mock.MagicMock(name=name) for name in names})


@contextmanager
def as_here() -> Iterator[None]:
    """Inside, draws of torch are the fixed ones, float32 is float64, and a GPU this CPU."""
    drawn = {"randn": count(), "rand": count()}

    def shape_of(size: tuple[Any, ...]) -> tuple[int, ...]:
        return tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size

    def randn(*size: Any, **_: Any) -> Tensor:
        return normal(*shape_of(size), k=next(drawn["randn"]))

    def rand(*size: Any, **_: Any) -> Tensor:
        return uniform(*shape_of(size), k=next(drawn["rand"]))

    with ExitStack() as stack:
        patch = lambda of, name, value: stack.enter_context(mock.patch.object(of, name, value))  # noqa: E731
        patch(torch, "randn", randn)
        patch(torch, "randn_like", lambda x, **_: randn(*x.shape))
        patch(torch, "rand", rand)
        patch(torch, "float32", torch.float64)
        patch(torch, "float", torch.float64)
        patch(Tensor, "float", Tensor.double)
        patch(Tensor, "cuda", lambda x, *_, **__: x)
        patch(torch.cuda, "get_rng_state", lambda *_: None)
        patch(torch.cuda, "set_rng_state", lambda *_: None)
        stack.enter_context(parity.in_float64())
        yield


def times_are(t: Tensor) -> Any:
    """Inside, uniform draws are these times."""
    return mock.patch.object(torch, "rand", lambda *_, **__: t)


class Shim(nn.Module):
    """The fixed network as published code calls it.

    call: from the network and the arguments of that code to the output.
    """

    def __init__(self, call: Callable[..., Tensor]):
        super().__init__()
        self.net, self.call = Net(), call

    def forward(self, *values: Any, **_: Any) -> Tensor:
        return self.call(self.net, *values)


# ---------------------------------------------------------------------------- ddpm

GUIDED = "openai/guided-diffusion"


def guided(kind: str = "EPSILON") -> Any:
    from guided_diffusion import gaussian_diffusion as gd

    return gd.GaussianDiffusion(
        betas=gd.get_named_beta_schedule("linear", parity.STEPS),
        model_mean_type=gd.ModelMeanType[kind],
        model_var_type=gd.ModelVarType.FIXED_SMALL,
        loss_type=gd.LossType.MSE,
    )


@reference("ddpm-loss", GUIDED)
def ddpm_loss() -> Tensor:
    with checkout(GUIDED):
        net = Net()
        loss = guided().training_losses(net, X, parity.DISCRETE, noise=normal(N, *SHAPE))["loss"]
        return with_gradient(loss.mean(), net)


@reference("ddpm-v", "diffusers")
def ddpm_v() -> Tensor:
    from diffusers import DDPMScheduler

    ends = {"beta_start": 0.0001 * 1000 / parity.STEPS, "beta_end": 0.02 * 1000 / parity.STEPS}
    scheduler = DDPMScheduler(parity.STEPS, **ends, beta_schedule="linear")
    net, eps, t = Net(), normal(N, *SHAPE), parity.DISCRETE
    out = net(scheduler.add_noise(X, eps, t), t)
    return with_gradient(nn.functional.mse_loss(out, scheduler.get_velocity(X, eps, t)), net)


@reference("ddpm-cosine", GUIDED)
def cosine() -> Tensor:
    with checkout(GUIDED):
        from guided_diffusion import gaussian_diffusion as gd

        betas = gd.get_named_beta_schedule("cosine", parity.STEPS)
        return torch.from_numpy((1 - betas).cumprod())


def guided_sample(loop: str, **options: Any) -> Callable[[], Tensor]:
    def value() -> Tensor:
        with checkout(GUIDED):
            net = Net()
            return getattr(guided(), loop)(net, (N, *SHAPE), device="cpu", **options).clamp(-1, 1)

    return value


reference("ddpm-ancestral", GUIDED)(guided_sample("p_sample_loop"))
reference("ddpm-ddim", GUIDED)(guided_sample("ddim_sample_loop"))
reference("ddpm-eta", GUIDED)(guided_sample("ddim_sample_loop", eta=0.5))


@reference("diffae-inverse", GUIDED)
def inverse() -> Tensor:
    with checkout(GUIDED), torch.no_grad():
        net, process, x = Net(), guided(), X
        for t in range(parity.STEPS - 1):
            steps = torch.full((N,), t)
            x = process.ddim_reverse_sample(net, x, steps, clip_denoised=False)["sample"]
        return x


# ---------------------------------------------------------------------------- edm, ect

EDM, ECT = "NVlabs/edm", "locuslab/ect"


def preconditioned() -> Any:
    """Their network with ours inside, in a checkout."""
    from training import networks

    networks.Shim = lambda **_: Shim(at_noise)
    return networks.EDMPrecond(8, 1, model_type="Shim")


def at_noise(net: Net, x: Tensor, c_noise: Tensor) -> Tensor:
    return net(x, 1000 * parity.time_of((4 * c_noise).exp()).expand(len(x)))


@reference("edm-loss", EDM)
def edm_loss() -> Tensor:
    with absent("requests"), checkout(EDM):
        from training.loss import EDMLoss

        net = preconditioned()
        draws = iter([normal(N).view(N, 1, 1, 1)])
        with mock.patch.object(torch, "randn", lambda *_, **__: next(draws)):
            loss = EDMLoss()(lambda *values, **_: net(*values[:2]), X)
        return with_gradient(loss.mean(), net)


def edm_sample(churn: float) -> Callable[[], Tensor]:
    def value() -> Tensor:
        with absent("requests", "click"), checkout(EDM), torch.no_grad():
            from generate import edm_sampler

            return edm_sampler(
                preconditioned(),
                torch.randn(N, *SHAPE),
                num_steps=6,
                sigma_max=parity.MOST,
                S_churn=churn,
                randn_like=(torch.randn_like if churn else torch.zeros_like),
            )

    return value


reference("edm-heun", EDM)(edm_sample(0.0))
reference("edm-churn", EDM)(edm_sample(parity.CHURN))


@reference("ect-loss", ECT)
def ect_loss() -> Tensor:
    with absent("requests"), checkout(ECT):
        from training.loss import ECMLoss

        net, draws = preconditioned(), iter([normal(N).view(N, 1, 1, 1)])
        loss = ECMLoss(q=parity.Q)
        loss.update_schedule(parity.STAGE)
        with mock.patch.object(torch, "randn", lambda *_, **__: next(draws)):
            value = loss(lambda *values, **_: net(*values[:2]), X)
        return with_gradient(value.mean() / math.prod(SHAPE) ** 0.5, net)  # gz's norm is a mean over pixels


@reference("ect-sample", ECT)
def ect_sample() -> Tensor:
    sample = piece(ECT, "ct_eval.py", "def generator_fn(", torch=torch)
    with absent("requests"), checkout(ECT), torch.no_grad():
        return sample(preconditioned(), torch.randn(N, *SHAPE), mid_t=[0.8])


# ---------------------------------------------------------------------------- score models

SDE, NCSN = "yang-song/score_sde_pytorch", "ermongroup/ncsnv2"


def sde_of(name: str) -> tuple[Any, Shim]:
    """Their SDE with our defaults, and the network as they call it: ε times −1/σ of VE is the score."""
    import sde_lib

    if name == "ve":
        sde = sde_lib.VESDE(0.01, 50.0, 1000)

        def call(net: Net, x: Tensor, sigma: Tensor) -> Tensor:
            t = (sigma / 0.01).log() / math.log(5000)
            x_in = x / (1 + sigma**2).sqrt().view(-1, 1, 1, 1)  # gz's network sees images of unit variance
            return -net(x_in, 1000 * t) / sigma.view(-1, 1, 1, 1)

        return sde, Shim(call)
    sde = {"vp": sde_lib.VPSDE, "subvp": sde_lib.subVPSDE}[name](0.1, 20.0, 1000)

    def of_noise(net: Net, x: Tensor, label: Tensor) -> Tensor:
        t = label / 999
        alpha = sde.marginal_prob(torch.ones(len(x), 1, 1, 1), t)[0]
        norm = (alpha**2 + sde.marginal_prob(x, t)[1].view(-1, 1, 1, 1) ** 2).sqrt()
        return net(x / norm, 1000 * t)  # 1 for VP

    return sde, Shim(of_noise)


def song() -> Any:
    return absent("ml_collections", "tensorflow", "tensorflow_gan", "tensorflow_datasets", "op")


def sde_loss(name: str, *, likelihood: bool = False) -> Callable[[], Tensor]:
    def value() -> Tensor:
        with song(), checkout(SDE):
            from losses import get_sde_loss_fn

            sde, net = sde_of(name)
            loss = get_sde_loss_fn(
                sde, train=True, reduce_mean=True, continuous=True, likelihood_weighting=likelihood
            )
            with times_are((TIMES - 1e-5) / (1 - 1e-5)):
                return with_gradient(loss(net, X), net)

    return value


reference("sgm-vp", SDE)(sde_loss("vp"))
reference("sgm-likelihood", SDE)(sde_loss("vp", likelihood=True))
reference("sgm-subvp", SDE)(sde_loss("subvp"))
reference("sgm-ve", SDE)(sde_loss("ve"))


@reference("sgm-ode", SDE)
def flow_ode() -> Tensor:
    with song(), checkout(SDE), torch.no_grad():
        from models.utils import get_score_fn

        values = []
        for name in ("vp", "subvp", "ve"):
            sde, net = sde_of(name)
            score = get_score_fn(sde, net, train=False, continuous=True)
            values.append(sde.reverse(score, probability_flow=True).sde(X, TIMES)[0])
        return torch.cat(values)


@reference("sgm-em", SDE)
def euler_maruyama() -> Tensor:
    with song(), checkout(SDE), torch.no_grad():
        from models.utils import get_score_fn
        from sampling import EulerMaruyamaPredictor

        sde, net = sde_of("vp")
        score = get_score_fn(sde, net, train=False, continuous=True)
        x = parity.sgm("vp").process.level(1.0).sigma * torch.randn(N, *SHAPE)
        for t, after in zip(parity.WALKED, parity.WALKED[1:], strict=False):
            predictor = EulerMaruyamaPredictor(sde, score)
            predictor.rsde.N = 1 / (t - after)
            x, _ = predictor.update_fn(x, torch.full((N,), t))
        return x


def by_solver(of: str, path: str, build: Callable[[Any, Any, Any], Any]) -> Callable[[], Tensor]:
    """A solver of the ODE of VP over the times that parity walks."""

    def value() -> Tensor:
        with checkout(of, path):
            module = importlib.import_module("uni_pc" if "UniPC" in of else "dpm_solver_pytorch")
            schedule = module.NoiseScheduleVP("linear", continuous_beta_0=0.1, continuous_beta_1=20.0)
            net = Net()
            model = module.model_wrapper(lambda x, t: net(x, 1000 * t), schedule)
            solver = build(module, model, schedule)
            solver.get_time_steps = lambda **_: torch.tensor(parity.WALKED)
            x = parity.sgm("vp").process.level(1.0).sigma * torch.randn(N, *SHAPE)
            steps = len(parity.WALKED) - 1
            with torch.no_grad():
                return solver.sample(x, steps=steps, order=2, method="multistep", lower_order_final=False)

    return value


reference("sgm-dpmpp", "LuChengTHU/dpm-solver")(
    by_solver(
        "LuChengTHU/dpm-solver",
        "",
        lambda m, model, schedule: m.DPM_Solver(model, schedule, algorithm_type="dpmsolver++"),
    )
)
reference("sgm-unipc", "wl-zhao/UniPC")(
    by_solver(
        "wl-zhao/UniPC",
        "example/score_sde_pytorch",
        lambda m, model, schedule: m.UniPC(model, schedule, algorithm_type="data_prediction", variant="bh2"),
    )
)


def ladder() -> Tensor:
    most, least, levels = parity.LADDER
    return torch.exp(torch.linspace(math.log(most), math.log(least), levels))


def ladder_net(net: Net, x: Tensor, labels: Tensor) -> Tensor:
    return -net(x, 1000 * (1 - labels / (parity.LADDER[2] - 1))) / ladder()[labels].view(-1, 1, 1, 1)


@reference("ncsnv2-loss", NCSN)
def ncsn_loss() -> Tensor:
    score_matching = piece(NCSN, "losses/dsm.py", "def anneal_dsm_score_estimation(", torch=torch)
    net = Shim(ladder_net)
    loss = score_matching(net, X, ladder(), torch.tensor([0, 2, 4]))
    return with_gradient(loss * 2 / math.prod(SHAPE), net)  # theirs is half the sum over pixels


@reference("ncsnv2-langevin", NCSN)
def langevin() -> Tensor:
    import numpy as np

    most, least, _ = parity.LADDER
    sample = piece(NCSN, "models/__init__.py", "def anneal_Langevin_dynamics(", torch=torch, np=np)
    x = most * torch.randn(N, *SHAPE)
    (x,) = sample(
        x, Shim(ladder_net), ladder(), n_steps_each=2, step_lr=parity.STEP * least**2, final_only=True
    )
    return x


# ---------------------------------------------------------------------------- flow matching

FM, RF = "facebookresearch/flow_matching", "gnobitab/RectifiedFlow"


@reference("fm-loss", FM)
def fm_loss() -> Tensor:
    with checkout(FM):
        from flow_matching.path import CondOTProbPath

        net = Net()
        drawn = CondOTProbPath().sample(t=TIMES, x_0=normal(N, *SHAPE), x_1=X)
        out = net(drawn.x_t, 1000 * drawn.t)
        return with_gradient((out - drawn.dx_t).square().mean(), net)


@reference("fm-midpoint", FM)
def midpoint() -> Tensor:
    with checkout(FM):
        from flow_matching.solver import ODESolver

        net = Net()
        solver = ODESolver(lambda x, t: net(x, (1000 * t).expand(len(x))))
        ends = torch.tensor([0.0, 1.0])
        return solver.sample(torch.randn(N, *SHAPE), step_size=1 / 8, method="midpoint", time_grid=ends)


@reference("fm-sigma", "torchcfm")
def fm_sigma() -> Tensor:
    from torchcfm import TargetConditionalFlowMatcher

    net, matcher = Net(), TargetConditionalFlowMatcher(sigma=0.1)
    t, x_t, u_t = matcher.sample_location_and_conditional_flow(torch.zeros_like(X), X, t=TIMES)
    return with_gradient((net(x_t, 1000 * t) - u_t).square().mean(), net)


@reference("cfm-ot", "torchcfm")
def pairing() -> Tensor:
    from torchcfm.optimal_transport import OTPlanSampler

    noise, images = normal(16, *SHAPE), parity.waves(16, *SHAPE)
    plan = torch.from_numpy(OTPlanSampler("exact").get_map(noise, images))  # [noise, images], of 1/16
    return torch.einsum("ij,ichw->jchw", 16 * plan, noise)


def rectified(*, reflow: bool = False) -> Any:
    import sde_lib

    return sde_lib.RectifiedFlow(reflow_flag=reflow)


def rf_loss(*, reflow: bool) -> Callable[[], Tensor]:
    def value() -> Tensor:
        with song(), checkout(RF, "ImageGeneration"):
            from losses import get_rectified_flow_loss_fn

            sde = rectified(reflow=reflow)
            net = Shim(lambda net, x, t: net(x, 1000 / 999 * t))
            loss = get_rectified_flow_loss_fn(sde, train=True, reduce_mean=True, eps=0.0)
            with times_are(TIMES):
                return with_gradient(loss(net, [normal(N, *SHAPE), X] if reflow else X), net)

    return value


reference("rf-loss", RF)(rf_loss(reflow=False))
reference("reflow-loss", RF)(rf_loss(reflow=True))


@reference("rf-euler", RF)
def rf_euler() -> Tensor:
    with song(), checkout(RF, "ImageGeneration"):
        # their times start at .001
        net = Shim(lambda net, x, t: net(x, 1000 * (t / 999 - 1e-3) / (1 - 1e-3)))
        return rectified().euler_ode(torch.randn(N, *SHAPE), net, N=10)


# ---------------------------------------------------------------------------- intervals

MEAN, SOFLOW = "Gsunshine/py-meanflow", "zlab-princeton/SoFlow"
SCALE = 100.0  # `time_scale` of gz


def backwards(net: Net, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """The average velocity from t to r, for times that run from data to noise."""
    return -net(x, SCALE * torch.stack([1 - t, t - r], 1))


def mean_flow() -> Any:
    from models.meanflow import MeanFlow

    pixels, power = math.prod(SHAPE), 0.5
    args = types.SimpleNamespace(ema_decay=0.9, ema_decays=[], norm_eps=1e-3 * pixels, norm_p=power)
    shim = lambda: Shim(lambda net, x, times, *_: backwards(net, x, times[0], times[0] - times[1]))  # noqa: E731
    return MeanFlow(shim, args, {})


@reference("meanflow-loss", MEAN)
def mean_loss() -> Tensor:
    """With the tangent of improved MeanFlow, the velocity that the network predicts."""
    jvp = torch.func.jvp

    def improved(f: Any, values: Any, tangents: Any) -> Any:
        x, t, _ = values
        with torch.no_grad():
            velocity = f(x, t, t)
        return jvp(f, values, (velocity, *tangents[1:]))

    with checkout(MEAN, "meanflow"):
        model = mean_flow()
        module = sys.modules["models.meanflow"]
        with (
            mock.patch.object(module, "sample_two_timesteps", lambda *_, **__: (1 - TIMES, 1 - parity.SPANS)),
            mock.patch.object(torch.func, "jvp", improved),
        ):
            loss = model.forward_with_loss(X, None)
        # gz's error is a mean over pixels
        return with_gradient(loss * math.prod(SHAPE) ** -0.5, model.net)


@reference("meanflow-sample", MEAN)
def mean_sample() -> Tensor:
    with checkout(MEAN, "meanflow"), torch.no_grad():
        model = mean_flow()
        return model.sample((N, *SHAPE), net=lambda x, times, aug_cond: model.net(x, times))


@reference("soflow-loss", SOFLOW)
def soflow() -> Tensor:
    with absent("unet", "dit"), checkout(SOFLOW):
        import models

        model = models.Soflow.__new__(models.Soflow)
        nn.Module.__init__(model)
        model.scheduler = models.Scheduler()
        model.network = Shim(lambda net, x, t, s, *_: backwards(net, x, t.view(-1), s.view(-1)))
        t, s = 1 - TIMES, 1 - parity.SPANS
        loss, *_ = model.get_consistency_loss(
            X, t, t + parity.RHO * (s - t), s, None, None, 1.0, 1.0, p=0.5, eps=1e-3
        )
        return with_gradient(2 * loss, model.network)[
            1:
        ]  # the square of the error, where theirs is half of it


# ---------------------------------------------------------------------------- energies

EQM = "raywang4/EqM"


@reference("eqm-loss", EQM)
def eqm_loss() -> Tensor:
    with checkout(EQM):
        from transport import create_transport

        net = Shim(lambda net, x, t: -net(x, 0 * t))
        with times_are(TIMES):
            return with_gradient(create_transport().training_losses(net, X)["loss"].mean(), net)


@reference("eqm-descent", EQM)
def descent() -> Tensor:
    net = Net()
    names = {
        "args": types.SimpleNamespace(num_sampling_steps=9, sampler="gd", stepsize=0.02, cfg_scale=1.0),
        "model_fn": lambda x, *_: -net(x, torch.zeros(N)),
        "xt": torch.randn(N, *SHAPE),
        "t": torch.ones(N),
        "y": None,
        "torch": torch,
    }
    with torch.no_grad():
        loop = piece(EQM, "sample_gd.py", "for i in range(args.num_sampling_steps-1):", **names)
        return loop["xt"]


# ---------------------------------------------------------------------------- adversarial

R3GAN, WGAN, TAMING = "brownvc/R3GAN", "caogang/wgan-gp", "CompVis/taming-transformers"


def r3gan(phase: str) -> Callable[[], Tensor]:
    def value() -> Tensor:
        with checkout(R3GAN):
            from R3GAN.Trainer import AdversarialTraining

            draw, score = parity.Draw(), parity.Score()
            trainer = AdversarialTraining(draw, score)
            z = torch.randn(N, 4)
            if phase == "critic":
                parts = trainer.AccumulateDiscriminatorGradients(z, X, None, parity.GAMMA)
                loss = parts[0] + parity.GAMMA / 2 * (parts[2] + parts[3])
            else:
                loss = trainer.AccumulateGeneratorGradients(z, X, None)[0]
            parameter = (score if phase == "critic" else draw).w
            return torch.cat([loss.mean().reshape(1), parameter.grad.reshape(-1)])

    return value


reference("r3gan-critic", R3GAN)(r3gan("critic"))
reference("r3gan-generator", R3GAN)(r3gan("generator"))


@reference("wgan-critic", WGAN)
def wgan() -> Tensor:
    names = {"torch": torch, "autograd": torch.autograd, "BATCH_SIZE": N, "LAMBDA": 10.0, "use_cuda": False}
    of_gradient = piece(WGAN, "gan_mnist.py", "def calc_gradient_penalty(", **names)
    score, fake = parity.Score(), parity.Draw()(torch.randn(N, 4)).detach()
    penalty = of_gradient(score, X.flatten(1), fake.flatten(1))
    return with_gradient(score(fake).mean() - score(X).mean() + penalty, score)


@reference("vqgan-weight", TAMING)
def weight() -> Tensor:
    path = "taming/modules/losses/vqperceptual.py"
    adaptive = piece(TAMING, path, "def calculate_adaptive_weight(", torch=torch)
    last = nn.Conv2d(1, 1, 3, padding=1)
    with torch.no_grad():
        last.weight.copy_(parity.waves(1, 1, 3, 3, k=3))
        last.bias.zero_()
    x, loss = last(X), types.SimpleNamespace(discriminator_weight=1.0)
    nll, gan = (x - X).abs().mean(), -parity.Score()(x).mean()
    return adaptive(loss, nll, gan, last.weight).reshape(1)


# ---------------------------------------------------------------------------- autoencoders


def pythae_loss(model: str, draws: int) -> Tensor:
    """The loss of pythae's model on the fixed encoder and decoder, and its gradient."""
    module = importlib.import_module(f"pythae.models.{model.lower()}.{model.lower()}_model")
    fixed = types.SimpleNamespace(
        model_config=types.SimpleNamespace(reconstruction_loss="bce"), n_samples=draws
    )
    encode, decode = parity.Encode(), parity.Decode()
    mu, log_var = encode(parity.BINARY).chunk(2, 1)
    x, eps = (parity.BINARY + 1) / 2, torch.randn(N, 4 * draws)
    if draws > 1:
        mu, log_var, eps = mu[:, None], log_var[:, None], eps.unflatten(1, (draws, 4))
    z = mu + eps * (0.5 * log_var).exp()
    out = decode(z).sigmoid().reshape(N, draws, -1)
    out = out.squeeze(1) if draws == 1 else out
    loss, *_ = getattr(module, model).loss_function(fixed, out, x, mu, log_var, z)
    return with_gradient(loss, encode, decode)


reference("vae-elbo", "pythae")(lambda: pythae_loss("VAE", 1))
# of the bound their loss has the gradient, and another value
reference("vae-iwae", "pythae")(lambda: pythae_loss("IWAE", 4)[1:])


@reference("vqvae-step", "pythae")
def vqvae() -> Tensor:
    from pythae.models.vq_vae.vq_vae_utils import QuantizerEMA

    fixed = types.SimpleNamespace(
        embedding_dim=4, num_embeddings=6, commitment_loss_factor=parity.BETA, decay=parity.DECAY
    )
    book, vectors = QuantizerEMA(fixed).train(), parity.VECTORS.movedim(1, -1)
    n = vectors[..., 0].numel()
    # gz starts with equal shares of use, which are counts of vectors here
    book.embeddings.copy_(parity.CODES)
    book.cluster_size.fill_(n / 6)
    book.ema_embed.copy_(parity.CODES * n / 6)
    out = book(vectors)
    parts = out.quantized_vector.flatten(), out.loss.reshape(1), book.embeddings.flatten()
    return torch.cat(parts)


VAR = "FoundationVision/VAR"


@reference("var-scales", VAR)
def var() -> Tensor:
    with (
        absent("dist"),
        checkout(VAR, "models"),
        mock.patch.object(torch.distributed, "get_world_size", lambda: 1),
    ):
        import quant

        sys.modules["dist"].initialized = lambda: False
        return of_scales(quant)


def of_scales(quant: Any) -> Tensor:
    book = quant.VectorQuantizer2(6, 4, False, parity.BETA, v_patch_nums=(1, 2, 4), quant_resi=0.0).eval()
    book.embedding.weight.data.copy_(parity.CODES)
    out, _, loss = book(parity.VECTORS)
    return torch.cat([out.flatten(), loss.reshape(1)]).detach()


# ---------------------------------------------------------------------------- densities

PIXELCNN, FLOWPP, TARFLOW = "pclucas14/pixel-cnn-pp", "chrischute/flowplusplus", "apple/ml-tarflow"


@reference("pixelcnnpp-mixture", PIXELCNN)
def mixture() -> Tensor:
    import numpy as np
    from torch.autograd import Variable

    names: dict[str, Any] = {"torch": torch, "F": nn.functional, "np": np, "Variable": Variable}
    for name in ("log_sum_exp", "log_prob_from_logits", "discretized_mix_logistic_loss"):
        names[name] = piece(PIXELCNN, "utils.py", f"def {name}(", **names)
    logits, rest = parity.PARAMS[..., 0], parity.PARAMS[..., 1:].unflatten(-1, (3, 3))
    # [..., five, kind, colour] to [..., colour · kind · five]
    rest = rest.movedim(-3, -1).transpose(-3, -2).flatten(-3)
    params = torch.cat([logits, rest], -1).movedim(-1, 1)
    rows = zip(parity.COLOURS.movedim(-1, 1).split(1), params.split(1), strict=True)
    return -torch.stack([names["discretized_mix_logistic_loss"](*row) for row in rows])


@reference("glow-conv", "normflows")
def conv1x1() -> Tensor:
    from normflows.flows.mixing import Invertible1x1Conv

    weight = parity.invertible().weight().detach()
    layer = Invertible1x1Conv(4)
    layer.W.data.copy_(weight)
    y, log_det = layer.inverse(parity.FLAT)  # from images to latents
    return torch.cat([weight.flatten(), y.flatten(), log_det.expand(2)]).detach()


@reference("realnvp-coupling", "normflows")
def coupling() -> Tensor:
    from normflows.flows.affine.coupling import AffineCoupling

    class Alternating(nn.Module):
        """Their shifts are in the even channels, and come after the scale."""

        def forward(self, x: Tensor) -> Tensor:
            shift, raw = parity.Halves()(x).chunk(2, 1)
            log_scale = 2 * raw.tanh()
            return torch.stack([shift * log_scale.exp(), log_scale], 2).flatten(1, 2)

    (same, moved), log_det = AffineCoupling(Alternating())(parity.FLAT.chunk(2, 1))
    return torch.cat([torch.cat([same, moved], 1).flatten(), log_det])


@reference("flowpp-mixture", FLOWPP)
def logistic_cdf() -> Tensor:
    import numpy as np

    names: dict[str, Any] = {"torch": torch, "F": nn.functional, "np": np}
    names["safe_log"] = piece(FLOWPP, "util/array_util.py", "def safe_log(", **names)
    for name in ("_log_pdf", "_log_cdf", "mixture_log_pdf", "mixture_log_cdf", "inverse"):
        names[name] = piece(FLOWPP, "models/flowplusplus/log_dist.py", f"def {name}(", **names)
    logits, mean, log_scale = parity.waves(3, 2, 5, 4, k=14)
    x = 2 * parity.waves(2, 4, k=15)
    y, log_det = names["inverse"](names["mixture_log_cdf"](x, logits, mean, log_scale).exp())
    return torch.cat(
        [y.flatten(), (log_det + names["mixture_log_pdf"](x, logits, mean, log_scale)).flatten()]
    )


def tarflow_block(*, flip: bool) -> Tensor:
    import transformer_flow as module

    permutation = (module.PermutationFlip if flip else module.PermutationIdentity)(9)
    block = module.MetaBlock(4, 6, 9, permutation, num_layers=1, head_dim=6)
    del block.proj_in, block.proj_out, block.attn_blocks
    out = parity.OUT.T.roll(4, 1)  # their scale is before the shift
    block.proj_in, block.proj_out = (lambda x: x @ parity.EMBED), (lambda h: h @ out)
    block.attn_blocks = [parity.Means()]
    block.pos_embed = nn.Parameter(parity.PLACES.flip(0) if flip else parity.PLACES)
    z, log_det = block(parity.PATCHES)
    return torch.cat([z.flatten(), 36 * log_det])  # theirs is a mean over numbers


@reference("tarflow-block", TARFLOW)
def tarflow() -> Tensor:
    with checkout(TARFLOW):
        return torch.cat([tarflow_block(flip=False), tarflow_block(flip=True)]).detach()


# ---------------------------------------------------------------------------- the table


def record(clones: Path, names: list[str]) -> None:
    """Writes the values of published code."""
    global CLONES
    CLONES = clones.absolute()
    rows = json.loads(parity.RECORDED.read_text()) if parity.RECORDED.is_file() and names else {}
    for name in names or parity.ROWS:
        of, function = REFERENCES[name]
        with as_here():
            torch.manual_seed(0)
            value = function().detach().flatten()
        apart = parity.difference(parity.value(name), value)
        print(f"{name:20} {of:34} {head(of):14} {apart:.1e}", flush=True)
        rows[name] = {"reference": of, "version": head(of), "values": value.tolist()}
    rows = {name: rows[name] for name in parity.ROWS if name in rows}
    parity.RECORDED.write_text(
        "{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()) + "\n}\n"
    )


def page() -> None:
    """Writes the table of the page."""
    (measured.MEASURED_FOLDER / "parity.csv").write_text(as_csv(parity.table()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["record"] and len(sys.argv) > 2:
        record(Path(sys.argv[2]), sys.argv[3:])
    elif sys.argv[1:] == ["page"]:
        page()
    else:
        raise SystemExit(__doc__)
