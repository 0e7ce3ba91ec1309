"""One line a model: the small build that the contract suite (test_contract.py) puts through its paces."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """A model with hyperparameters that train in a second or two on the digits."""

    model: str
    options: dict[str, Any] = field(default_factory=dict)
    lr: float = 1e-3
    batch: int = 32
    levels: int | None = None  # grey levels; the set's own 17 without it
    sample: dict[str, Any] = field(default_factory=dict)  # cheap sampler options

    def __str__(self) -> str:
        return self.model + "".join(f"-{k}={v}" for k, v in self.options.items() if isinstance(v, bool | str))


DDPM = {"channels": 8, "mult": (1, 2), "attention": (), "timesteps": 20}

CASES = [
    Case("vae", {"net": "conv", "hidden": (16, 32), "latent": 8}, lr=3e-3),
    Case("vae", {"net": "mlp", "hidden": (64,), "latent": 8, "conditional": True}, lr=3e-3, levels=2),
    Case("wgan", {"width": 8, "latent": 16}, lr=2e-3),
    Case("wgan", {"width": 8, "latent": 16, "conditional": True}, lr=2e-3),
    Case("pixelcnn", {"hidden": 16, "head": 16, "dilations": (1, 2, 1)}, lr=3e-3, batch=16),
    Case("pixelcnn", {"hidden": 16, "head": 16, "dilations": (1, 2, 1), "conditional": True}, lr=3e-3, batch=16, levels=2),
    Case("glow", {"depth": 2, "hidden": 16, "net": "residual"}),
    Case("glow", {"scales": 3, "depth": 1, "hidden": 16, "conditional": True}),
    Case("ddpm", DDPM, lr=3e-3, batch=8, sample={"steps": 4}),
    Case("ddpm", DDPM | {"conditional": True}, lr=3e-3, batch=8, sample={"steps": 4, "guidance": 2.0}),
]
