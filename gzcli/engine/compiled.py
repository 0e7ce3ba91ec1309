"""A training step by `torch.compile`: one graph for each phase, since its random numbers are drawn before it.

Which numbers a loss draws is found by a run of a copy of the model on tensors without values
(`FakeTensorMode`), which costs no memory and changes nothing. A loss whose draws or branches depend on values
ends that run; it stays eager.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gzcli.core import ranks
from gzcli.core.devices import kind_of
from gzcli.core.errors import first_line
from gzcli.core.parts import Part
from gzcli.core.types import Batch, Noise
from gzcli.engine.log import Log
from gzcli.engine.shapes import Draw, RecordedNoise, without_values
from gzcli.models.base import Model, named_losses

LONG = 2_000  # steps of a run that gains on a GPU: a U-Net takes about a minute to compile
LONG_MINUTES = 10.0  # the same of a run whose length is given in minutes
FOR_EVER = 1 << 40  # a number of steps after which nothing anneals any more
SMALL = 200e6  # parameters up to which a step may be bound by the launches of its kernels

BACKEND = "inductor"


def compiles(part: Part, model: Model, device: torch.device) -> bool:
    """Whether the steps of a run are compiled: as `train.compile` says; `auto` means where that gains.

    It gains on a GPU, in a run that is long enough to earn the time of compiling, of a model of one phase. On
    a CPU it is slower or takes longer to compile than it saves.
    """
    choice = part.train.compile
    if choice != "auto":
        return choice
    minutes = part.train.minutes
    long = minutes >= LONG_MINUTES if minutes else part.train.steps >= LONG
    one = part.launch.strategy == "ddp" and len(model.phases()) == 1
    return kind_of(device).compiled and long and one and not part.train.deterministic


def mode_of(part: Part, model: Model, device: torch.device) -> str | None:
    """The mode of `torch.compile`. Kernels of a small net on a GPU take less time than their launches: CUDA
    graphs launch all at once.

    They own the memory of the gradients, which therefore cannot be added up over micro-batches.
    """
    small = sum(p.numel() for p in model.parameters()) <= SMALL
    return "reduce-overhead" if kind_of(device).compiled and small and part.train.accumulate == 1 else None


class GivenNoise(Noise):
    """Noise whose draws were made before."""

    def __init__(self, draws: Sequence[Tensor], total: int, start: Tensor):
        # `start` as a number would be a constant of the graph, and each micro-batch would have its own graph
        self.draws, self.total, self.start, self.device = draws, total, start, start.device
        self.at = 0

    def _draw(self, method: str, shape: tuple[int, ...], high: int | None = None) -> Tensor:
        self.at += 1
        return self.draws[self.at - 1]


class Compiled:
    """The losses of a model, compiled where that is possible. The names of its parameters stay as they are.

    While `on_step` changes numbers that the model holds, each step would be compiled anew: such a model is
    compiled from the step on from which they stay.
    """

    def __init__(
        self,
        model: Model,
        steps: int,
        log: Log,
        *,
        asked: bool = True,
        backend: Any = None,
        mode: str | None = None,
    ):
        torch.compiler.reset()  # graphs of an earlier stage, or of the trial of `--minutes`
        self.model, self.say = model, log.warn if asked else log.record
        self.graph: Callable[..., dict[str, Tensor]] = torch.compile(
            losses, dynamic=False, backend=backend or BACKEND, mode=mode
        )
        self.final = numbers_after(model, steps)
        self.draws: dict[Any, list[Draw] | None] = {}  # of each phase and shape of batch; None: it is eager
        self.tried: set[Any] = set()  # those whose graph has run

    def __call__(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        """The losses of a phase by name."""
        if numbers(self.model) != self.final:
            return named_losses(self.model, batch, phase)
        tensors = {key: value for key, value in batch.extra.items() if isinstance(value, Tensor)}
        shapes = tuple((key, value.shape) for key, value in tensors.items())
        key = phase, batch.x.shape, shapes, self.model.training, torch.is_grad_enabled()
        if key not in self.draws:
            self.draws[key] = self.find(batch, tensors, phase)
        wanted = self.draws[key]
        if wanted is None:
            return named_losses(self.model, batch, phase)
        fresh = copy.copy(batch.noise)
        try:
            values = self.graph(self.model, phase, *arguments(batch, tensors, wanted))
        except RuntimeError as e:  # what torch cannot compile: no compiler, a gradient of a gradient
            if key in self.tried:
                raise
            self.draws[key] = None
            self.say(f"phase `{phase}` is not compiled: {first_line(e)}")
            return named_losses(self.model, replace(batch, noise=fresh), phase)
        self.tried.add(key)
        # the next run of a CUDA graph overwrites what this one has returned
        return {name: value.clone() for name, value in values.items()}

    def find(self, batch: Batch, tensors: dict[str, Tensor], phase: str) -> list[Draw] | None:
        """The draws of a loss; None where they depend on values."""
        try:
            return draws_of(self.model, batch, tensors, phase)
        except Exception as e:  # whatever a model does with tensors that have no values
            self.say(f"phase `{phase}` is not compiled: {first_line(e)}")
            return None


def losses(
    model: Model,
    phase: str,
    x: Tensor,
    y: Tensor | None,
    index: Tensor,
    extra: dict[str, Tensor],
    draws: tuple[Tensor, ...],
    total: int,
    start: Tensor,
) -> dict[str, Tensor]:
    """The losses of a phase by name, where all random numbers are arguments: what is compiled."""
    return named_losses(model, Batch(x, y, index, GivenNoise(draws, total, start), extra), phase)


def arguments(batch: Batch, tensors: dict[str, Tensor], wanted: Sequence[Draw]) -> tuple[Any, ...]:
    """The arguments of `losses` after the phase: the batch and the draws, which are made now."""
    draws = tuple(batch.noise._draw(*draw) for draw in wanted)
    return batch.x, batch.y, batch.index, tensors, draws, *place(batch)


def place(batch: Batch) -> tuple[int, Tensor]:
    """The size of the global batch, and the position of this batch in it as a scalar on the device."""
    noise: Any = batch.noise
    return noise.total, torch.full((), noise.start, dtype=torch.int64, device=batch.x.device)


def draws_of(model: Model, batch: Batch, tensors: dict[str, Tensor], phase: str) -> list[Draw]:
    """The draws of a loss, found without values. Raises what the loss raises where it needs values."""
    other, part, mode = without_values(model, batch, tensors)
    with mode, ranks.alone():
        named_losses(other, part, phase)
    assert isinstance(part.noise, RecordedNoise)
    return part.noise.made


def reaches_all(model: Model, batch: Batch, phase: str) -> bool:
    """Whether the loss of a phase gives every parameter a gradient, whatever the values are.

    It may not where that depends on values, or on the step.
    """
    if numbers(model) != numbers_after(model, FOR_EVER):
        return False
    other, part, mode = without_values(model, batch, batch.extra)
    try:
        with mode, ranks.alone():
            named_losses(other, part, phase)["loss"].backward()
    except Exception:  # whatever a model does with tensors that have no values
        return False
    return all(p.grad is not None for p in other.parameters() if p.requires_grad)


def numbers(model: Model) -> dict[str, float]:
    """The numbers that a model holds beside its modules and tensors, which are constants of a graph."""
    return {k: v for k, v in vars(model).items() if isinstance(v, int | float) and k != "training"}


def numbers_after(model: Model, steps: int) -> dict[str, float]:
    """The numbers that a model holds after the last step; the model stays as it is."""
    if type(model).on_step is Model.on_step:
        return numbers(model)
    other, buffers = copy.copy(model), [b.clone() for b in model.buffers()]
    other.on_step(steps - 1)
    with torch.no_grad():
        for b, before in zip(model.buffers(), buffers, strict=True):
            b.copy_(before)
    return numbers(other)
