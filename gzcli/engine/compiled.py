"""A training step by `torch.compile`: one graph for each phase, since its random numbers are drawn before it.

Which numbers a loss draws is found by a run of a copy of the model on tensors that have a shape and no values
(torch's FakeTensorMode), which costs no memory and changes nothing. What would be read on the host as an
array is one half everywhere there. A loss whose draws or branches depend on values ends that run; it stays
eager.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from gzcli.core import ranks
from gzcli.core.errors import first_line
from gzcli.core.types import Batch, Noise
from gzcli.engine.log import Log
from gzcli.models.base import Model, named_losses

FOR_EVER = 1 << 40  # a number of steps after which nothing anneals any more
Draw = tuple[str, tuple[int, ...], int | None]  # method, shape and bound of `Noise._draw`
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
    """The losses of a model, compiled where that is possible. While `on_step` changes numbers that the model
    holds, each step would be compiled anew: the model is compiled from the step on from which they stay."""

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
    """Whether the loss of a phase gives every parameter a gradient, whatever the values are. It may not where
    that depends on values, or on the step."""
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


# ---------------------------------------------------------------------------- tensors without values


class Arrays(TorchFunctionMode):
    """Gives the host arrays of one half in the place of tensors without values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.numpy, Tensor.__array__) and isinstance(args[0], FakeTensor):
            return np.full(tuple(args[0].shape), 0.5).astype(str(args[0].dtype).removeprefix("torch."))
        return func(*args, **(kwargs or {}))


class RecordedNoise(Noise):
    """Noise that writes down what is drawn; its draws are zero, or have no values."""

    def __init__(self, total: int, start: Tensor):
        self.total, self.start, self.device = total, start, start.device
        self.made: list[Draw] = []

    def _draw(self, method: str, shape: tuple[int, ...], high: int | None = None) -> Tensor:
        self.made.append((method, tuple(int(n) for n in shape), high))
        dtype = torch.int64 if method == "random_" else torch.get_default_dtype()
        return torch.zeros(shape, dtype=dtype, device=self.device)


@contextmanager
def shapes_only(mode: FakeTensorMode | None = None) -> Iterator[None]:
    """Inside, every new tensor has a shape alone."""
    rng = torch.get_rng_state()
    try:
        with warnings.catch_warnings(), mode or FakeTensorMode(allow_non_fake_inputs=True), Arrays():
            warnings.simplefilter("ignore")  # a copy of a module asks where its tensors lie
            yield
    finally:
        torch.set_rng_state(rng)


def without_values(model: Model, batch: Batch) -> tuple[Model, Batch, FakeTensorMode]:
    """Copies of a model and of a batch whose tensors have no values, and the mode in which they are used."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    modules = [model, *vars(model).get("attached", {}).values()]
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    blank = copy.deepcopy(model, {id(t): mode.from_tensor(t) for t in tensors})
    noise: Any = batch.noise
    start = torch.full((), noise.start, dtype=torch.int64, device=batch.x.device)
    x, y, index, start, extra = tree_map_only(
        Tensor, mode.from_tensor, (batch.x, batch.y, batch.index, start, batch.extra)
    )
    return blank, Batch(x, y, index, RecordedNoise(noise.total, start), extra), mode
