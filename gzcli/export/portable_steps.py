"""What of a model's sampler is exported: the network of a call, and the program that calls it.

One kind of sampler makes an image of its noise at once (GANs, VAEs, flows): its network is the whole
sampler. The other walks from noise to image by calls of a denoiser or of a velocity. As every solver combines
its noise and the outputs of the calls linearly, it is run once on unit vectors in their place, and what comes
out are the factors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gzcli.core.types import ImageNoise, Noise, no_progress
from gzcli.engine.trained import Trained
from gzcli.models.base import Model
from gzcli.models.denoising.process import Levels
from gzcli.models.nn import spread_labels

BATCH = 3  # images of the example that a graph is traced with
KINDS = {"normal_": "normal", "uniform_": "uniform"}
BY_VALUES = "images step by step, each value from those before"
NONE_YET = {"autoregressive": BY_VALUES, "stable_diffusion": "with networks of diffusers: `--to diffusers`"}


class Given(Noise):
    """Noise that is given, in place of being drawn.

    values: the draws in order.
    """

    def __init__(self, values: list[Tensor]):
        self.values, self.device = iter(values), values[0].device

    def _draw(self, method: str, shape: tuple[int, ...], high: int | None = None) -> Tensor:
        return next(self.values)


class Noted(ImageNoise):
    """Noise that notes what is drawn: [(kind, shape of an image)]."""

    def __init__(self, n: int):
        super().__init__(0, range(n))
        self.drawn: list[tuple[str, list[int]]] = []
        self.values: list[Tensor] = []

    def _draw(self, method: str, shape: tuple[int, ...], high: int | None = None) -> Tensor:
        if method not in KINDS:
            raise Unportable("it draws integers")
        self.drawn.append((KINDS[method], list(shape[1:])))
        self.values.append(super()._draw(method, shape, high))
        return self.values[-1]


class Unportable(Exception):
    """A model whose sampler cannot be exported; the text says why."""


class Units(Noise):
    """Noise, and outputs of a network, as unit vectors [1, size, 1, 1] in the order in which they come.

    size: how many there will be.
    """

    def __init__(self, size: int):
        self.device, self.size, self.count = torch.device("cpu"), size, 0
        self.program: list[dict[str, Any]] = []

    def unit(self) -> Tensor:
        found = torch.zeros(1, self.size, 1, 1, dtype=torch.float64)
        if self.count < self.size:
            found[0, self.count] = 1
        self.count += 1
        return found

    def _draw(self, method: str, shape: tuple[int, ...], high: int | None = None) -> Tensor:
        if method not in KINDS:
            raise Unportable("it draws integers")
        # the first draw is the image's noise; later ones are made like x, which is a unit vector here
        own = self.program[0]["shape"] if self.program else list(shape[1:])
        self.program.append({"do": "draw", "kind": KINDS[method], "shape": own})
        return self.unit()

    def call(self, x: Tensor, **scalars: float) -> None:
        """Notes a call of the network at x, a combination of what came before."""
        self.program.append({"do": "call", "x": terms(x), **scalars})


def terms(x: Tensor) -> list[list[float]]:
    """The numbers of the unit vectors in x [1, size, 1, 1], with their factors."""
    row = x.flatten()
    return [[i, float(row[i])] for i in row.nonzero().flatten().tolist()]


class Whole(nn.Module):
    """A sampler that makes images at once: the graph of `sample`.

    options: keywords of `sample`.
    """

    def __init__(self, model: Model, options: Mapping[str, Any]):
        super().__init__()
        self.model, self.options = model, options

    def forward(self, noise: list[Tensor], y: Tensor | None = None) -> Tensor:
        n = noise[0].shape[0]  # which is a symbol in a graph, as `len` is not
        return self.model.sample(n, labels=y, noise=Given(noise), progress=no_progress, **self.options)


class Denoise(nn.Module):
    """One call of a denoiser: (x_0, ε) of x [B, C, H, W] at times t [B] with the levels α, σ [1].

    how: its guidance, and whether x_0 is clipped.
    """

    def __init__(self, model: Any, how: Mapping[str, Any]):
        super().__init__()
        self.model, self.scale = model, how.get("guidance", 1.0)
        self.clip = how.get("clip", True) and model.data.levels is not None
        self.dynamic = [how["dynamic"]] if how.get("dynamic") else []

    def forward(
        self, x: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor, y: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        model = self.model
        x0, eps = model.estimate(x, Levels(t, alpha, sigma), y, self.scale)
        if self.clip:
            x0 = model.into_range(x0, *self.dynamic)
            eps = (x - alpha * x0) / sigma
        return x0, eps


class Velocity(nn.Module):
    """One call of a velocity of x [B, C, H, W] at times t [B]."""

    def __init__(self, model: Any, how: Mapping[str, Any]):
        super().__init__()
        self.model, self.scale = model, how.get("guidance", 1.0)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return self.model.velocity(y, self.scale)(x, t)


class Decode(nn.Module):
    """Images [B, C, H, W] of latents."""

    def __init__(self, trained: Trained):
        super().__init__()
        self.autoencoder: Any = trained.space and trained.space.autoencoder
        self.shown = trained.shown

    def forward(self, x: Tensor) -> Tensor:
        return self.shown(x)


def step_of(trained: Trained, options: Mapping[str, Any]) -> tuple[dict[str, Any], nn.Module, dict[str, Any]]:
    """(program and result, the network of a call, an example of its inputs). Raises Unportable."""
    model, card = trained.model, type(trained.model).__module__.split(".")
    if family := next((part for part in card if part in NONE_YET), None):
        raise Unportable(f"it makes {NONE_YET[family]}")
    if hasattr(model, "sources"):
        raise Unportable("it makes images of pictures")
    y = spread_labels(None, BATCH, trained.info, trained.device) if model.conditional else None
    if getattr(model, "clusters", None) is not None:
        y = torch.zeros(BATCH, dtype=torch.long)
    labels = {} if y is None else {"y": y}
    example: dict[str, Any]
    if not (hasattr(model, "denoiser") or hasattr(model, "velocity")):
        noted = Noted(BATCH)
        with torch.no_grad():
            model.sample(BATCH, labels=y, noise=noted, progress=no_progress, **options)
        program: list[dict[str, Any]] = [
            {"do": "draw", "kind": kind, "shape": shape} for kind, shape in noted.drawn
        ]
        program.append({"do": "make"})
        return (
            {"program": program, "result": [[0, 1.0]]},
            Whole(model, options),
            {"noise": noted.values} | labels,
        )
    program, result, how = walk(model, options)
    x, t = torch.zeros(BATCH, *trained.info.shape), torch.full((BATCH,), 0.5)
    example = {"x": x, "t": t}
    if how["kind"] == "velocity":
        return {"program": program, "result": result}, Velocity(model, how), example | labels
    example |= {"alpha": torch.full((1,), 0.8), "sigma": torch.full((1,), 0.6)}
    return {"program": program, "result": result}, Denoise(model, how), example | labels


def walk(
    model: Any, options: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[list[float]], dict[str, Any]]:
    """The program of a sampler, its result as a combination, and what it asks of the network."""
    size = 1
    for _ in range(2):  # the first time counts
        units = Units(size)
        how: dict[str, Any] = {}
        with in_place(model, units, how):
            result = model.sample(1, noise=units, progress=no_progress, **options)
        size = units.count
    if not how:
        raise Unportable("it calls its network in a way of its own")
    if tuple(how.get("interval", (0.0, 1.0))) != (0.0, 1.0):
        raise Unportable("its guidance acts within an interval of times alone")
    return units.program, terms(result), how


@contextmanager
def in_place(model: Any, units: Units, how: dict[str, Any]) -> Iterator[None]:
    """While the block runs, the model's network answers with unit vectors, and images have no range.

    how: gets what the sampler asks of the network.
    """

    def denoiser(y: Tensor | None = None, **asked: Any) -> Any:
        how.update(asked, kind="denoise")

        def denoise(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
            level = model.process.level(t)
            units.call(x, t=float(t), alpha=float(level.alpha), sigma=float(level.sigma))
            return units.unit(), units.unit()

        return denoise

    def velocity(y: Tensor | None = None, guidance: float = 1.0, interval: Any = (0.0, 1.0)) -> Any:
        how.update(guidance=guidance, interval=interval, kind="velocity")

        def f(x: Tensor, t: Tensor) -> Tensor:
            units.call(x, t=float(t.flatten()[0]))
            return units.unit()

        return f

    def sampled_labels(*_: Any) -> None:
        if model.clusters is not None:
            units.program.append({"do": "cluster", "shares": model.clusters.shares.tolist()})

    fakes = {
        "denoiser": denoiser,
        "velocity": velocity,
        "sampled_labels": sampled_labels,
        "into_range": lambda x, *_: x,
    }
    fakes = {name: fake for name, fake in fakes.items() if hasattr(model, name)}
    vars(model).update(fakes)
    try:
        yield
    finally:
        for name in fakes:
            vars(model).pop(name)
