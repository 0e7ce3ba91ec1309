"""U-Nets draw images of other sizes than they were trained on; other networks refuse to."""

from __future__ import annotations

import pytest
import torch
from gzcli.core.errors import UsageError
from gzcli.core.types import DataInfo, ImageNoise, no_progress
from zoo import CASES

from gzcli.models.options import grouped

INFO = DataInfo((1, 16, 16), 17, tuple("0123456789"), n=100, steps=100)


def drawn(model: str, info: DataInfo = INFO, **options) -> torch.Tensor:
    case = next(case for case in CASES if case.model == model)
    built = case.build(info).eval()
    torch.manual_seed(1)
    for p in built.parameters():  # a new network returns zero, whatever its input
        p.data += 0.02 * torch.randn_like(p)
    labels = torch.zeros(2, dtype=torch.long) if case.conditional else None
    keywords = grouped(built.sample, {**case.sample, **options})
    return built.sample(2, labels=labels, noise=ImageNoise(0, range(2)), progress=no_progress, **keywords)


@pytest.mark.parametrize("model", ["ddpm", "fm", "sgm"])
def test_a_u_net_draws_any_size(model):
    wide = drawn(model, size="24x20")
    assert wide.shape == (2, 1, 20, 24) and wide.isfinite().all()
    # the same as a network with these weights that was made for images of this size
    assert torch.equal(wide, drawn(model, DataInfo((1, 20, 24), 17, INFO.classes, n=100, steps=100)))
    assert torch.equal(drawn(model, size=16), drawn(model))


@pytest.mark.parametrize("model", ["rf", "dit", "zigma", "ncsnv2"])
def test_a_network_made_for_one_size_says_so(model):
    with pytest.raises(UsageError, match="made for one size of images") as e:
        drawn(model, size="24x20")
    assert "16×16" in e.value.hint


def test_latents_are_drawn_in_their_own_size():
    with pytest.raises(UsageError, match="made for latents"):
        drawn("fm", DataInfo((4, 8, 8), None, INFO.classes), size=24)
