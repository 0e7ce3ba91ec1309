"""Any process, prediction, weight, times and network of a denoiser go together."""

import pytest
import torch
from draws import batch, images, noise
from refused import refused

from gzcli.core.types import DataInfo, no_progress
from gzcli.models.base import group_options
from gzcli.models.diffusion.ddpm import DDPM
from gzcli.models.energy.eqm import EqM
from gzcli.models.flow_matching.fm import FM
from gzcli.models.flow_matching.meanflow import MeanFlow
from gzcli.models.flow_matching.soflow import SoFlow
from gzcli.models.score.edm import EDM
from gzcli.models.score.sgm import SGM

INFO = DataInfo((1, 8, 8), 256, ("a", "b", "c"), n=100, steps=10)
SMALL = {"channels": 8, "mult": (1,), "attention": ()}
ZIGZAG = {"net": "zigzag", "width": 16, "layers": 1, "patch": 4, "state": 2}
DIT = {"net": "dit", "width": 16, "layers": 1, "heads": 2, "patch": 4}
PREDICTIONS = ("eps", "x0", "v", "velocity")
NEAR = {"rtol": 1e-2, "atol": 1e-6, "check_dtype": False}
TIMES = ("uniform", "stratified", "logit_normal", "cosine", "log_normal")
PROCESSES = [
    *((DDPM, {"schedule": name, "timesteps": 50}) for name in ("linear", "cosine", "straight")),
    *((SGM, {"process": name}) for name in ("vp", "subvp", "ve")),
    *((FM, {"process": name}) for name in ("straight", "cosine", "vp", "subvp", "ve")),
    (EDM, {}),
]
OF_PATCHES = [
    *((kind, ZIGZAG) for kind in (DDPM, SGM, SoFlow, EqM)),
    *((kind, DIT) for kind in (SoFlow, MeanFlow, EqM)),
]
CHOSEN = [PROCESSES[i] for i in (1, 3, 6, 7, -1)]


def levels(model, n):
    return model.process.levels_at(model.draw_times(noise(n), n))


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize(("kind", "options"), PROCESSES, ids=str)
def test_each_prediction_inverts_to_image_and_noise(kind, options):
    """And its error is as much larger than that of the image, or of the noise, as its weights say."""
    x, eps = images(16, INFO.shape).double(), noise(16).randn(16, *INFO.shape).double()
    for prediction in (*PREDICTIONS, *(["edm"] if kind is EDM else [])):
        model = kind.of(INFO, **SMALL, **options, prediction=prediction, time_sampling="cosine").train()
        level = levels(model, 16)
        x_t, target = level.alpha * x + level.sigma * eps, model.target(x, eps, level)
        estimate = model.to_estimate(target, x_t, level)
        torch.testing.assert_close(estimate.x0, x, rtol=1e-3, atol=1e-3, check_dtype=False)
        torch.testing.assert_close(estimate.eps, eps, rtol=1e-3, atol=1e-3, check_dtype=False)
        off = model.to_estimate(target + 1, x_t, level)
        square = lambda a, b: (a - b).square().flatten(1).mean(1)  # noqa: E731
        torch.testing.assert_close(model.image_weight(level), 1 / square(off.x0, x), **NEAR)
        model.weighting = "score"
        torch.testing.assert_close(model.loss_weight(level), square(off.eps, eps), **NEAR)
        model.weighting, model.min_snr = "even", 5.0
        snr = (level.alpha / level.sigma).view(-1) ** 2
        wanted = snr.clamp(max=5) * square(off.x0, x)
        torch.testing.assert_close(model.loss_weight(level), wanted, **NEAR)


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize(("kind", "options"), PROCESSES, ids=str)
def test_one_function_is_one_denoiser_and_one_ode_by_any_prediction(kind, options):
    """A network whose image is sin x / 2, by each of its four or five outputs: the same estimates, the same
    right-hand side of the ODE, which for a velocity is the output itself, and the same step."""
    x, estimates = images(4, INFO.shape).double(), []
    for prediction in (*PREDICTIONS, *(["edm"] if kind is EDM else [])):
        model = kind.of(INFO, **SMALL, **options, prediction=prediction).eval()
        time = round(model.process.at_share(0.5)) if kind is DDPM else model.process.at_share(0.5)
        t = torch.full((4,), time, dtype=torch.long if kind is DDPM else torch.double)

        def output(x, level, *_, model=model):
            image = x.sin() / 2
            return model.target(image, (x - level.alpha * image) / level.sigma, level)

        model.output = output
        level, slope = model.process.levels_at(t), model.velocity()(x, t)
        estimate = model.estimate(x, level)
        estimates.append((estimate.x0, estimate.eps, slope, x + 0.01 * slope))
    near = {"rtol": 1e-4, "atol": 1e-5} if kind is DDPM else {"rtol": 1e-9, "atol": 1e-9}  # of fp32 tables
    for values in estimates:
        for value, first in zip(values, estimates[0], strict=True):
            torch.testing.assert_close(value, first, **near)
    torch.testing.assert_close(estimates[0][0], x.sin() / 2, **near)


@pytest.mark.parametrize(("kind", "options"), CHOSEN, ids=str)
def test_they_train_and_sample(kind, options):
    """Each prediction with other weights and times: finite losses, gradients and samples."""
    of_error = ({"min_snr": 5.0}, {"weighting": "score"}, {"weighting": "likelihood"}, {"loss_type": "l1"})
    for i, prediction in enumerate(PREDICTIONS):
        for net in (SMALL, DIT):
            how = {"prediction": prediction, "time_sampling": TIMES[i + (net is DIT)], **of_error[i]}
            model = kind.of(INFO, **net, **options, **how).train()
            loss = model.loss(batch(images(8, INFO.shape), y=torch.arange(8) % 3))["loss"]
            loss.backward()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            assert loss.isfinite() and all(g.isfinite().all() for g in grads), how
            sample = group_options(model.sample, {"steps": 2})
            with torch.no_grad():
                x = model.eval().sample(2, noise=noise(2), progress=no_progress, **sample)
            assert x.shape == (2, *INFO.shape) and x.isfinite().all() and x.abs().max() <= 1, how


@pytest.mark.parametrize(("kind", "net"), OF_PATCHES, ids=str)
def test_others_take_networks_of_patches(kind, net):
    model = kind.of(INFO, **net, conditional=True).train()
    loss = model.loss(batch(images(8, INFO.shape), y=torch.arange(8) % 3))["loss"]
    loss.backward()
    sample = group_options(model.sample, {"steps": 2})
    with torch.no_grad():
        x = model.eval().sample(3, noise=noise(3), progress=no_progress, **sample)
    assert loss.isfinite() and x.shape == (3, *INFO.shape) and x.isfinite().all()


@pytest.mark.parametrize("kind", [SoFlow, MeanFlow])
def test_average_velocities_have_the_weights_and_the_error_of_their_options(kind):
    """A network begins with F = 0, whose targets are all v: the loss is that of v by hand. The squared error
    of x_0 is σ² times that of v, so the weight of min-SNR is min(α²/σ², γ) σ²."""

    def losses(**more):
        model, seen = kind.of(INFO, **DIT, weight_power=0.0, **more).train(), []
        target = model.target
        model.target = lambda x, eps, level: seen.append((target(x, eps, level), level.t)) or seen[-1][0]
        return model.loss(batch(images(8, INFO.shape)))["loss"].item(), *seen[0]

    loss, v, t = losses(min_snr=5.0)
    weight = torch.minimum(t**2, 5 * (1 - t) ** 2)
    assert loss == pytest.approx(float((weight * v.square().flatten(1).mean(1)).mean()), rel=1e-4)
    loss, v, _ = losses(loss_type="l1")
    assert loss == pytest.approx(float(v.abs().mean()), rel=1e-4)


@pytest.mark.parametrize(("kind", "energy"), [(MeanFlow, {}), (EqM, {"energy": "dot"})], ids=str)
def test_a_network_without_second_derivatives_is_refused_where_a_loss_takes_them(kind, energy):
    refused("second derivatives, which `net: zigzag` does not support", kind.of, INFO, **ZIGZAG, **energy)


def test_times_have_their_law_in_every_process():
    """Log-normal ones a normal log σ/α, of this mean and deviation; cosine ones a uniform angle."""
    for kind, options in (*PROCESSES, (EqM, {})):
        options = options | {"timesteps": 1000} if kind is DDPM else options
        log_normal = {"time_sampling": "log_normal", "log_mean": -0.5, "log_std": 0.5}
        level = levels(kind.of(INFO, **SMALL, **options, **log_normal), 4000)
        log_ratio = (level.sigma / level.alpha).log().view(-1)
        assert float(log_ratio.mean()) == pytest.approx(-0.5, abs=0.05), options
        assert float(log_ratio.std()) == pytest.approx(0.5, abs=0.05), options
        model = kind.of(INFO, **SMALL, **options, time_sampling="cosine")
        level = levels(model, 4000)
        share = torch.atan2(level.sigma, level.alpha).view(-1).sort().values
        even = torch.linspace(float(share[0]), float(share[-1]), 4000)
        torch.testing.assert_close(share, even, atol=0.06, rtol=0)
