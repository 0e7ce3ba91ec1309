"""Noise, batches and images that the tests of models are made with, and methods called with flat options."""

from collections.abc import Callable
from typing import Any

import torch

from gzcli.core.types import Batch, BatchNoise, DataInfo, ImageNoise
from gzcli.data.packs.batches import TrainBatches, TrainImages
from gzcli.data.packs.pack import Pack
from gzcli.models.base import group_options
from gzcli.models.nn import from_levels


def flat(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, whose dataclasses of options are given by their fields, as a recipe has them."""
    return lambda *args, **options: method(*args, **group_options(method, options))


def noise(n: int, seed: int = 0) -> ImageNoise:
    return ImageNoise(seed, range(n))


def batch(x: torch.Tensor, step: int = 0, y: torch.Tensor | None = None, **extra) -> Batch:
    return Batch(x, y, torch.arange(len(x)), BatchNoise(0, step, "main", total=len(x)), extra)


def images(n: int, shape: tuple[int, ...] = (1, 16, 16), seed: int = 0) -> torch.Tensor:
    """Uniform in [-1, 1]."""
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def squares(n: int, info: DataInfo, seed: int = 0) -> torch.Tensor:
    """A bright square each, at different places, on the set's grey levels."""
    g = torch.Generator().manual_seed(seed)
    c, h, w = info.shape
    k = torch.zeros(n, c, h, w)
    for i in range(n):
        top, left = torch.randint(h - h // 3, (2,), generator=g).tolist()
        grey = torch.randint(1, info.levels, (1,), generator=g)
        k[i, :, top : top + h // 3, left : left + h // 3] = grey.float()
    return from_levels(k, info.levels)


def awake(net: torch.nn.Module, std: float = 0.2) -> torch.nn.Module:
    """Off the start, at which blocks are the identity and the output is zero."""
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=std, generator=generator)
    return net


def only(model: torch.nn.Module, name: str) -> None:
    """The parameters of one phase alone require a gradient."""
    for phase in model.phases():
        for p in phase.parameters():
            p.requires_grad_(phase.name == name)


def fitted(model: torch.nn.Module, batch_at: Callable[[int], Batch], steps: int, lr: float) -> list[float]:
    """Trains a model by Adam on the batches of steps; returns its losses."""
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=lr), []
    for step in range(steps):
        loss = model.loss(batch_at(step))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def train_batches(pack: Pack, *, seed: int, batch_size: int, levels: int, **options: Any) -> TrainBatches:
    """The training batches of a pack; `options` as `TrainImages` and `TrainBatches` take them."""
    device, augment = torch.device(options.pop("device", "cpu")), options.pop("augment", ())
    return TrainBatches(TrainImages(pack, levels, device, seed, augment), batch_size, **options)
