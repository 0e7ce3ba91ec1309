"""A model small enough to be checked in seconds, and the steps that its checks share: a batch, a loss,
samples, a failed requirement.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gzcli.core.types import Batch, BatchNoise, DataInfo, ImageNoise, Noise, no_progress
from gzcli.data.packs.batches import TrainBatches, scan
from gzcli.data.packs.open import open_pack
from gzcli.data.packs.pack import Pack
from gzcli.engine.prepared import with_prepared
from gzcli.models import catalog
from gzcli.models.base import Model, Phase, defaults, grouped, named_losses

SEED = 0
CPU = torch.device("cpu")
# Of a likelihood that is integrated, and of scores: a check asks what they depend on, not what they are.
ODE_STEPS = 4
FEW = {"steps": 3, "times": 3, "starts": 2}


@dataclass(frozen=True)
class Case:
    """A model with hyperparameters that train in a second or two.

    model: name of the model.
    options: hyperparameters, flat, as `Model.of` takes them.
    lr: learning rate of Adam, by which every check trains.
    batch: images of one step.
    levels: grey levels; None: those of the data set.
    sample: options of `sample`, to draw few or quick steps.
    quiet: whether the loss of a new model may be the same for any `batch.noise`.
    data: name of the data set.
    stages: the models that it is built on, by the names of its parameters.
    """

    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    lr: float = 1e-3
    batch: int = 32
    levels: int | None = None
    sample: Mapping[str, Any] = field(default_factory=dict)
    quiet: bool = False
    data: str = "digits"
    stages: Mapping[str, Case] = field(default_factory=dict)

    @property
    def conditional(self) -> bool:
        """Whether it takes labels, by its options or by its default."""
        default = catalog.card(self.model).params.get("conditional")
        return bool(self.options.get("conditional", default.default if default else False))

    @property
    def settings(self) -> dict[str, Any]:
        """The options that the model is built with; a test may add a folder, as the base of a fine-tuning."""
        return dict(self.options)

    def build(self, info: DataInfo, seed: int = SEED) -> Model:
        """The model with the weights that a seed gives, built on stages of the same seed."""
        stages = {name: stage.build(info, seed) for name, stage in self.stages.items()}
        torch.manual_seed(seed)
        for p in (p for stage in stages.values() for p in stage.parameters()):
            p.data += 0.1 * torch.randn_like(p)  # a layer that starts at zero would hide what the stage does
        torch.manual_seed(seed)
        return catalog.load(self.model).of(info, **self.settings, **stages)

    def pack(self) -> Pack:
        return open_pack(self.data)

    def fresh(self) -> Model:
        """The model for its data set, in training mode."""
        return self.build(self.pack().info(levels=self.levels, steps=1000)).train()

    def batches(self) -> TrainBatches:
        """Training batches of its data set on the CPU."""
        pack = self.pack()
        levels, needs = pack.info(levels=self.levels).levels, catalog.card(self.model).needs
        return TrainBatches(pack, seed=SEED, batch_size=self.batch, levels=levels, device=CPU, needs=needs)

    def __str__(self) -> str:
        return self.model + "".join(f"-{k}={v}" for k, v in self.options.items() if isinstance(v, bool | str))


# ---------------------------------------------------------------------------- the steps of a check


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
    few = {key: value for key, value in FEW.items() if key in defaults(method)}
    return partial(method, **grouped(method, few))


def held_out(pack: Pack, model: Model, split: str, n: int, count: int | None = None) -> Iterator[Batch]:
    """Batches of n images of a split, or of its first `count` images, with the model's grey levels."""
    index = None if count is None else range(count)
    return scan(pack, split, batch_size=n, levels=model.data.levels, device=CPU, index=index)
