"""The steps that the checks of a model share: a batch, a loss, samples, a failed requirement."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gzcli.core.types import Batch, BatchNoise, ImageNoise, Noise, no_progress
from gzcli.data.packs.batches import scan
from gzcli.data.packs.pack import Pack
from gzcli.engine.prepared import with_prepared
from gzcli.models import catalog
from gzcli.models.base import Model, Phase, named_losses
from gzcli.models.options import defaults, grouped
from gzcli.testing.case import CPU, SEED, Case

# Of a likelihood that is integrated, and of scores: a check asks what they depend on, not what they are.
ODE_STEPS = 4
FEW = {"steps": 3, "times": 3, "starts": 2}


class Broken(AssertionError):
    """A model does not keep the contract; the message is a sentence for whoever wrote it."""


def require(condition: object, sentence: str) -> None:
    """Raises Broken with the sentence unless the condition is true."""
    if not condition:
        raise Broken(sentence)


def fault_of(check: Callable[[Case], None], case: Case) -> str | None:
    """The fault that a check finds, in a sentence; None where the model passes."""
    try:
        check(case)
    except Broken as e:
        return str(e)
    except Exception as e:
        file = str(catalog.card(case.model).path)
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == file]
        return f"{file}:{lines[-1]}: {type(e).__name__}: {e}" if lines else f"{type(e).__name__}: {e}"
    return None


def started(case: Case) -> tuple[Model, Batch]:
    """The model after its data-dependent start, and the first batch."""
    model = case.fresh()
    batch = with_prepared(model, case.batches().at(0))
    with torch.no_grad():
        model.fit([batch])
        model.on_start(batch)
    return model, batch


def fixed_noise(batch: Batch, phase: str, step: int = 0) -> Batch:
    """The batch with the noise of a phase at a step, from its first draw on."""
    return batch.rows(slice(None), BatchNoise(SEED, step, phase, total=len(batch)))


def loss_of(model: Model, batch: Batch, phase: str) -> Tensor:
    """The loss of a phase, a scalar."""
    return named_losses(model, batch, phase)["loss"]


def only(model: Model, phase: Phase) -> list[nn.Parameter]:
    """Makes the parameters of a phase alone require grad, and returns them."""
    model.requires_grad_(False)
    params = phase.parameters()
    for p in params:
        p.requires_grad_(True)
    return params


def draw(model: Model, case: Case, seed: int = 0, n: int = 4, labels: Tensor | None = None) -> Tensor:
    """n samples [n, C, H, W], with the case's options of `sample`."""
    with torch.inference_mode():
        options = grouped(model.sample, case.sample)
        return model.sample(
            n, labels=labels, noise=ImageNoise(seed, range(n)), progress=no_progress, **options
        )


def log_likelihood(model: Model, x: Tensor, labels: Tensor | None = None, *, noise: Noise) -> Tensor:
    """The model's `log_prob` of images, [B] nats; over few steps where it integrates an equation."""
    few = {"steps": ODE_STEPS} if model.likelihood == "ode" and "steps" in defaults(model.log_prob) else {}
    return model.log_prob(x, labels, noise=noise, **grouped(model.log_prob, few))


def quick(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method with few steps, in place of as many as it takes by itself."""
    return partial(method, **{key: value for key, value in FEW.items() if key in defaults(method)})


def held_out(pack: Pack, model: Model, split: str, n: int, count: int | None = None) -> Iterator[Batch]:
    """Batches of n images of a split, or of its first `count` images, with the model's grey levels."""
    index = None if count is None else range(count)
    return scan(pack, split, batch_size=n, levels=model.data.levels, device=CPU, index=index)
