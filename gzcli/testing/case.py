"""A model small enough to be checked in seconds, and what its checks start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from gzcli.core.types import DataInfo
from gzcli.data.packs.batches import TrainBatches
from gzcli.data.packs.open import open_pack
from gzcli.data.packs.pack import Pack
from gzcli.models import catalog
from gzcli.models.base import Model

SEED = 0
CPU = torch.device("cpu")


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
        """The data set."""
        return open_pack(self.data)

    def fresh(self) -> Model:
        """The model for its data set, in training mode."""
        return self.build(self.pack().info(levels=self.levels, steps=1000)).train()

    def batches(self) -> TrainBatches:
        """Training batches of its data set on the CPU."""
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
