"""A model small enough to be checked in seconds, and what its checks start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from gzcli.data.batches import TrainBatches
from gzcli.data.open import open_named
from gzcli.data.pack import Pack
from gzcli.models import catalog
from gzcli.models.base import Model
from gzcli.types import DataInfo

SEED = 0
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A model with hyperparameters that train in a second or two.

    model: its name.
    options: hyperparameters, flat.
    lr: of Adam, which each check trains by.
    batch: images of a step.
    levels: grey levels; None: the set's own.
    sample: options of `sample` that make it cheap.
    quiet: whether the loss draws nothing that shows at once.
    data: the set.
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
    def settings(self) -> dict[str, Any]:
        """The hyperparameters that the model is built with."""
        return dict(self.options)

    @property
    def conditional(self) -> bool:
        """Whether it takes labels: as its options say, else by its default."""
        default = catalog.card(self.model).params.get("conditional")
        return bool(self.options.get("conditional", default.default if default else False))

    def build(self, info: DataInfo, seed: int = SEED) -> Model:
        """The model as its seed initialises it, over stages of the same seed."""
        stages = {name: stage.build(info, seed) for name, stage in self.stages.items()}
        torch.manual_seed(seed)
        for p in (p for stage in stages.values() for p in stage.parameters()):
            p.data += 0.1 * torch.randn_like(p)  # a layer that starts at zero would hide what the stage does
        torch.manual_seed(seed)
        return catalog.load(self.model).of(info, **self.settings, **stages)

    def pack(self) -> Pack:
        """The set."""
        return open_named(self.data)

    def fresh(self) -> Model:
        """The model for its set, in training mode."""
        return self.build(self.pack().info(levels=self.levels, steps=1000)).train()

    def batches(self) -> TrainBatches:
        """Training batches of its set on the CPU."""
        pack = self.pack()
        return TrainBatches(
            pack,
            seed=SEED,
            batch_size=self.batch,
            levels=pack.info(levels=self.levels).levels,
            device=CPU,
            needs=catalog.card(self.model).needs,
        )

    def __str__(self) -> str:
        return self.model + "".join(f"-{k}={v}" for k, v in self.options.items() if isinstance(v, bool | str))
