"""Images of any size: models train on them in half precision, or say what fits; U-Nets draw other sizes."""

import pytest
import torch
from draws import only, squares
from refused import refused
from zoo import CASES, Case

from gzcli.core.errors import UsageError
from gzcli.core.types import Batch, BatchNoise, DataInfo, ImageNoise, no_progress
from gzcli.models import catalog
from gzcli.models.base import grouped
from gzcli.testing.contract import draw

INFO = DataInfo((1, 16, 16), 17, tuple("0123456789"), n=100, steps=100)
FIRST = {case.model: case for case in reversed(CASES) if not case.stages}
BUILT = [case for name, case in FIRST.items() if catalog.card(name).family != "stable_diffusion"]


@pytest.mark.parametrize("case", BUILT, ids=str)
def test_any_size_in_bf16(case: Case):
    for shape in ((1, 28, 28), (3, 18, 27)):
        info = DataInfo(shape, case.levels or 256, ("a", "b"), n=64, steps=100)
        try:
            model = case.build(info).train()
        except UsageError as e:
            assert e.hint, shape
            continue
        x, y = squares(4, info), torch.arange(4) % 2
        extra = {"second_domain": x.flip(0)} if "second_domain" in model.needs else {}
        batch = Batch(x, y, torch.arange(4), BatchNoise(0, 0, "main", total=4), extra)
        with torch.no_grad():
            model.on_start(batch)
        for phase in model.phases():
            only(model, phase.name)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model.loss(batch, phase.name)["loss"]
            loss.backward()
            assert loss.isfinite() and loss.dtype == torch.float32, (shape, phase.name)
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None), shape
        drawn = draw(model.eval(), case, n=2)
        assert drawn.shape == (2, *shape) and drawn.isfinite().all(), shape


def drawn(model: str, info: DataInfo = INFO, **options) -> torch.Tensor:
    case = FIRST[model]
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


def test_a_network_made_for_one_size_says_so():
    for model in ("rf", "dit", "zigma", "ncsnv2"):
        e = refused("made for one size of images", drawn, model, size="24x20")
        assert "16×16" in e.hint, model
    refused("made for latents", drawn, "fm", DataInfo((4, 8, 8), None, INFO.classes), size=24)
