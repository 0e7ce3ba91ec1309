"""log p(x) of conditional models without labels: the mixture of classes, by enumeration, or refused."""

import math
from functools import partial

import pytest
import torch
from draws import flat, images, noise
from flows import roughen
from refused import refused

from gzcli.core.types import DataInfo, ImageNoise
from gzcli.models import catalog
from gzcli.models.autoregressive.pixelcnn import PixelCNN
from gzcli.models.normalizing_flow.glow import Glow
from gzcli.models.normalizing_flow.tarflow import TarFlow
from gzcli.models.vae.cvae import CVAE
from gzcli.models.vae.hvae import HVAE

N = 4
CDDPM, CFM = catalog.load("cddpm"), catalog.load("cfm")
UNET = {"channels": 8, "mult": (1,), "layers": 1, "groups": 4}
MODELS = {
    CVAE: {"net": "mlp", "hidden": (16,), "latent": 2},
    HVAE: {"channels": (8, 8), "groups": (1, 1), "cells": (1, 1)},
    CDDPM: {**UNET, "timesteps": 8},
    CFM: UNET,
    Glow: {"scales": 1, "depth": 1, "hidden": 8},
    TarFlow: {"width": 16, "layers": 1, "heads": 2, "depth": 2, "patch": 2},
    PixelCNN: {"hidden": 8, "head": 8},
}


def built(cls, classes=("a", "b", "c"), *, multilabel=False, **more):
    torch.manual_seed(0)
    info = DataInfo((1, 8, 8), 16, classes, multilabel)
    return roughen(cls.of(info, **MODELS[cls], conditional=True, **more), 0.1).eval()


def grey(n=N):
    return images(n, (1, 8, 8)).mul(7.5).add(7.5).round().div(7.5).sub(1)


@pytest.mark.parametrize("cls", MODELS, ids=lambda cls: cls.__name__)
def test_it_is_the_mixture_of_classes_by_enumeration(cls):
    """With the same noise for each class; whether training hid labels or not."""
    model, x = built(cls), grey()
    log_prob = partial(flat(model.log_prob), x, **({"steps": 3} if model.likelihood == "ode" else {}))
    with torch.no_grad():
        each = [log_prob(torch.full((N,), k), noise=noise(N)) for k in range(3)]
        mixed = log_prob(noise=noise(N))
    each = torch.stack(each)
    torch.testing.assert_close(mixed, each.logsumexp(0) - math.log(3), rtol=1e-5, atol=1e-3)
    assert each.std(0).min() > 1e-3, "labels matter"


@pytest.mark.parametrize(("cls", "most"), [(CVAE, 100), (CFM, 10)], ids=["bound", "ode"])
def test_more_classes_than_can_be_summed_are_refused(cls, most):
    model, x = built(cls, tuple(map(str, range(most + 1)))), grey()
    error = refused(
        f"a sum over {most + 1} classes, and gz allows at most {most}", model.log_prob, x, noise=noise(N)
    )
    assert "labels" in error.hint


def test_of_several_labels_it_is_the_density_that_hidden_labels_teach():
    model, x = built(CVAE, multilabel=True), grey()
    y = torch.zeros(N, 3)
    assert not torch.equal(*(model.log_prob(x, labels, noise=noise(N)) for labels in (None, y)))
    refused(
        "without a null label", built(CVAE, multilabel=True, label_dropout=0.0).log_prob, x, noise=noise(N)
    )


def test_a_noise_again_draws_the_same_and_the_first_goes_on():
    first = ImageNoise(3, range(N))
    first.randn(N, 2)
    second = first.again()
    a, b = first.randn(N, 2), second.randn(N, 2)
    assert torch.equal(a, b) and not torch.equal(first.randn(N, 2), a)
