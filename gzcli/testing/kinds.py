"""The kinds of data sets that a model must take: grey or RGB images; one label, several at once, or none."""

from __future__ import annotations

import torch

from gzcli.core.types import Batch, BatchNoise, DataInfo, ImageNoise
from gzcli.data.packs.batches import quantise
from gzcli.engine.prepared import with_prepared
from gzcli.testing.case import SEED, Case
from gzcli.testing.tools import draw, fixed_noise, log_likelihood, loss_of, only, require

KINDS = ("rgb", "multi-label", "label-free")
N = 6  # images


def every_kind_of_set(case: Case) -> None:
    """The model takes RGB images, several labels at once, and none."""
    for kind in KINDS:
        if kind != "label-free" or not case.conditional:  # a conditional model is refused such a set
            kind_of_set(case, kind)


def kind_of_set(case: Case, kind: str) -> None:
    """The model is built for random images of this kind, and trains, samples and scores."""
    on = f"on a set that is {kind}"
    classes = () if kind == "label-free" else ("a", "b", "c")
    shape = (3 if kind == "rgb" else 1, 16, 16)
    info = DataInfo(shape, case.levels or 256, classes, kind == "multi-label", n=64, steps=100)
    model = case.build(info, SEED).train()
    u8 = torch.randint(256, (N, *shape), generator=torch.Generator().manual_seed(SEED), dtype=torch.uint8)
    several = torch.tensor([[0, 0, 0], [1, 0, 1], [1, 1, 1]] * 2).byte()
    y = {"rgb": torch.arange(N) % 3, "multi-label": several}.get(kind)
    noise = BatchNoise(SEED, 0, "main", total=N)
    x = quantise(u8, info.levels, noise)
    extra = {"second_domain": x.flip(0), "before": x.flip(0), "caption": ["a handwritten seven"] * N}
    given = {key: extra[key] for key in model.needs if key in extra}
    batch = with_prepared(model, Batch(x, y, torch.arange(N), noise, given))
    with torch.no_grad():
        model.fit([batch])
        model.on_start(batch)
    for phase in model.phases():
        only(model, phase)
        loss = loss_of(model, fixed_noise(batch, phase.name), phase.name)
        loss.backward()
        finite = all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
        require(
            torch.isfinite(loss) and finite,
            f"{on} the loss of phase `{phase.name}`, or a gradient, is not finite",
        )
    model.eval()
    found = tuple(draw(model, case, n=3).shape)
    require(found == (3, *shape), f"{on} `sample(3)` returns {found}, not {(3, *shape)}")
    if case.conditional and kind == "multi-label":
        found = tuple(draw(model, case, n=3, labels=several[:3].float()).shape)
        require(found == (3, *shape), f"{on} `sample(3)` with labels returns {found}")
    if hasattr(model, "log_prob"):
        with torch.no_grad():
            labels = y if case.conditional else None
            value = log_likelihood(model, batch.x, labels, noise=ImageNoise(SEED, range(N)))
        require(
            value.shape == (N,) and torch.isfinite(value).all(), f"{on} `log_prob` is not {N} finite numbers"
        )
