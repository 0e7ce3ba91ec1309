"""What each image flow owes: its inverse, its log-det, the probabilities of its samples, half precision."""

import itertools
import math

import pytest
import torch
from draws import noise
from flows import batch, check_bijection, check_log_prob, check_probabilities, images
from test_flow import flow
from test_flowpp import model_of as flowpp
from test_glow import glow
from test_realnvp import realnvp
from test_tarflow import tarflow

from gzcli.core.types import Batch
from gzcli.models.nn import from_levels

GREY, WIDE, RGB = (1, 8, 8), (1, 4, 8), (3, 4, 4)
BIJECTIONS = [
    *((flow, GREY, how) for how in ({}, {"scales": 2}, {"scales": 3, "depth": 2}, {"logit": 1e-3})),
    (flow, RGB, {"scales": 2}),
    *((glow, GREY, how) for how in ({}, {"coupling": "additive"}, {"logit": 1e-3}, {"scales": 3})),
    (glow, GREY, {"net": "residual"}),
    *((realnvp, GREY, how) for how in ({}, {"scales": 3, "couplings": 1})),
    (realnvp, GREY, {"batch_norm": False, "logit": 0.0, "size": 0.02}),
    (realnvp, RGB, {}),
    *((flowpp, WIDE, how) for how in ({}, {"logit": 0.0}, {"attention": 0})),
    (flowpp, WIDE, {"channel": (0, 1, 1), "checkerboard": (1, 0, 0)}),
    *(
        (tarflow, shape, how)
        for shape, how in ((GREY, {"logit": 1e-3}), (RGB, {"patch": 1}), (RGB, {"coupling": "jet"}))
    ),
]
DENSITIES = [
    *((flow, GREY, levels, {"logit": 0.01, "scales": 2}) for levels in (2, 17, 256)),
    *((glow, GREY, levels, {"logit": logit}) for levels in (2, 17, 256) for logit in (0.0, 0.01)),
    (realnvp, GREY, 17, {}),
    (flowpp, WIDE, 17, {"dequant": "uniform"}),
    (tarflow, WIDE, 17, {"logit": 0.01}),
]
LABELLED = {"classes": ("a", "b"), "conditional": True, "scales": 1}
PROBABILITIES = [
    *((flow, {"dequant": how, "logit": 0.1, "size": 0.05}) for how in ("uniform", "variational")),
    *((glow, LABELLED | {"depth": 2, "logit": logit}) for logit in (0.0, 0.1)),
    (realnvp, LABELLED | {"logit": 0.1}),
    (tarflow, {"patch": 1, "logit": 0.1, "width": 8, "layers": 1}),
]


@pytest.mark.parametrize(("build", "shape", "options"), BIJECTIONS)
def test_it_inverts_and_has_the_log_det_of_its_jacobian(build, shape, options):
    check_bijection(build(shape, **options), shape)


@pytest.mark.parametrize(("build", "shape", "levels", "options"), DENSITIES)
def test_log_prob_is_the_dequantised_density_minus_d_log_levels(build, shape, levels, options):
    model = build(shape, levels=levels, **options).double()
    check_log_prob(model, images(1, shape, levels).double())


@pytest.mark.parametrize(("build", "options"), PROBABILITIES)
def test_probabilities_of_all_images_sum_to_one_and_are_the_frequencies_of_samples(build, options):
    model = build((1, 2, 2), levels=3, **options)
    if build is glow:
        every = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 1, 2, 2)
        model.on_start(batch(from_levels(every, 3)))
    check_probabilities(model)


@pytest.mark.parametrize(("build", "size"), [(glow, 0.1), (flowpp, 0.02), (realnvp, 0.02), (tarflow, 0.02)])
def test_every_image_is_reconstructed(build, size):
    for shape in ((1, 16, 16), (1, 28, 28), (3, 32, 32)):
        model, x = build(shape, logit=1e-6, size=size), images(3, shape)
        model.on_start(batch(x))
        back = model.reconstruct(x, noise=noise(3)).images
        assert ((back - x).abs() * 127.5 < 1.01).all(), shape
        assert (back != x).float().mean() < 0.02, shape  # a value at the edge of its bin may round across


@pytest.mark.parametrize(
    ("build", "options", "rtol"),
    [
        (flow, {"dequant": "variational", "scales": 2, "hidden": 16}, 1e-2),
        (flowpp, {"hidden": 32, "heads": 4}, 3e-3),
        (realnvp, {}, 1e-2),
        (tarflow, {"width": 32}, 1e-2),
    ],
)
def test_log_prob_is_in_fp32_under_bf16_with_gradients(build, options, rtol):
    model, x = build((1, 16, 16), logit=1e-6, size=0.02, **options), images(8, (1, 16, 16))
    model.on_start(batch(x))
    x.requires_grad_()
    full = model.log_prob(x, noise=noise(8))
    with torch.autocast("cpu", torch.bfloat16):
        low = model.log_prob(x, noise=noise(8))
        assert (model.reconstruct(x.detach(), noise=noise(8)).images - x).abs().mean() < 0.01
    low.sum().backward()
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, full, rtol=rtol, atol=0)
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("build", "options"), [(flow, {"dequant": "variational"}), (glow, {})])
def test_without_labels_the_conditional_model_gives_the_marginal(build, options):
    model, x = build(conditional=True, **options), images(3)
    with torch.no_grad():
        each = torch.stack([model.log_prob(x, torch.full((3,), k), noise=noise(3)) for k in range(10)])
        marginal = model.log_prob(x, noise=noise(3))
    assert (each.std(0) > 0.01).all()
    torch.testing.assert_close(marginal, each.logsumexp(0) - math.log(10))
    if build is glow:
        loss = model.loss(Batch(x, torch.tensor([0, 4, 9]), torch.arange(3), noise(3)))
        rows = [0, 4, 9], [0, 1, 2]
        torch.testing.assert_close(loss["loss"], -(each[rows].mean() + each.log_softmax(0)[rows].mean()))
