"""A training step by `torch.compile`: one graph for each phase, since its random numbers are drawn before it.

Which numbers a loss draws is found by a run of a copy of the model on tensors without values (`shapes.py`),
which changes nothing. A loss whose draws or branches depend on values ends that run; it stays eager.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gzcli.core import ranks
from gzcli.core.errors import first_line
from gzcli.core.types import Batch, Noise
from gzcli.engine.log import Log
from gzcli.engine.shapes import Draw, RecordedNoise, without_values
from gzcli.models.base import Model, named_losses

FOR_EVER = 1 << 40  # a number of steps after which nothing anneals any more
BACKEND = "inductor"


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
    """The losses of a model, compiled where that is possible.

    While `on_step` changes numbers that the model holds, each step would be compiled anew: such a model is
    compiled from the step on from which they stay.

    loud: whether a phase that stays eager is warned of; else only `log.txt` has it.
    """

    def __init__(
        self,
        model: Model,
        steps: int,
        log: Log,
        *,
        loud: bool = True,
        backend: Any = None,
        mode: str | None = None,
    ):
        torch.compiler.reset()  # graphs of an earlier stage, or of the trial of `--minutes`
        self.model, self.say = model, log.warn if loud else log.record
        self.graph = torch.compile(losses, dynamic=False, backend=backend or BACKEND, mode=mode)
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
            try:
                self.draws[key] = draws_of(self.model, replace(batch, extra=tensors), phase)
            except Exception as e:  # whatever a model does with tensors that have no values
                self.leave_eager(key, e)
        if (wanted := self.draws[key]) is None:
            return named_losses(self.model, batch, phase)
        noise: Any = batch.noise
        fresh = copy.copy(noise)
        start = torch.full((), noise.start, dtype=torch.int64, device=batch.x.device)
        given = {"x": batch.x, "y": batch.y, "index": batch.index, "start": start, "extra": tensors}
        try:
            values = self.graph(
                self.model, phase, given, [noise._draw(*draw) for draw in wanted], noise.total
            )
        except RuntimeError as e:  # what torch cannot compile: no compiler, a gradient of a gradient
            if key in self.tried:
                raise
            self.leave_eager(key, e)
            return named_losses(self.model, replace(batch, noise=fresh), phase)
        self.tried.add(key)
        # the next run of a CUDA graph overwrites what this one has returned
        return {name: value.clone() for name, value in values.items()}

    def leave_eager(self, key: tuple[Any, ...], e: Exception) -> None:
        self.draws[key] = None
        self.say(f"phase `{key[0]}` is not compiled: {first_line(e)}")


def losses(
    model: Model, phase: str, given: dict[str, Any], draws: list[Tensor], total: int
) -> dict[str, Tensor]:
    """The losses of a phase by name, where all random numbers are arguments: what is compiled."""
    noise = GivenNoise(draws, total, given["start"])
    return named_losses(model, Batch(given["x"], given["y"], given["index"], noise, given["extra"]), phase)


def draws_of(model: Model, batch: Batch, phase: str) -> list[Draw]:
    """The draws of a loss, found without values. Raises what the loss raises where it needs values."""
    blank, part, mode = without_values(model, batch)
    with mode, ranks.alone():
        named_losses(blank, part, phase)
    assert isinstance(part.noise, RecordedNoise)
    return part.noise.made


def reaches_all(model: Model, batch: Batch, phase: str) -> bool:
    """Whether the loss of a phase gives every parameter a gradient, whatever the values are.

    It may not where that depends on values, or on the step.
    """
    if numbers(model) != numbers_after(model, FOR_EVER):
        return False
    blank, part, mode = without_values(model, batch)
    try:
        with mode, ranks.alone():
            named_losses(blank, part, phase)["loss"].backward()
    except Exception:  # whatever a model does with tensors that have no values
        return False
    return all(p.grad is not None for p in blank.parameters() if p.requires_grad)


def numbers(model: Model) -> dict[str, float]:
    """The numbers that a model holds beside its modules and tensors, which are constants of a graph."""
    return {k: v for k, v in vars(model).items() if isinstance(v, int | float) and k != "training"}


def numbers_after(model: Model, steps: int) -> dict[str, float]:
    """The numbers that a model holds after the last step; the model stays as it is."""
    if type(model).on_step is Model.on_step:
        return numbers(model)
    later, buffers = copy.copy(model), [b.clone() for b in model.buffers()]
    later.on_step(steps - 1)
    with torch.no_grad():
        for b, before in zip(model.buffers(), buffers, strict=True):
            b.copy_(before)
    return numbers(later)
