"""Images, and a small tokenizer whose codes tell them apart, for tests of priors."""

import draws
import torch
from draws import batch

from gzcli.core.types import Batch, DataInfo
from gzcli.models.autoregressive.vqvae import VQVAE


def images(n: int, shape: tuple[int, ...] = (1, 12, 8), seed: int = 2) -> torch.Tensor:
    return draws.images(n, shape, seed).double()


def tokenizer(info: DataInfo, codes: int, **options) -> VQVAE:
    """Untrained, its codes at what it makes of random images; a code stands for 4×4 pixels."""
    model = VQVAE.of(info, hidden=4, residual=2, blocks=1, codes=codes, dim=3, **options)
    model.on_start(batch(draws.images(64, info.shape)))
    return model


def prior(
    cls, shape=(1, 12, 8), *, codes=5, scale=0.5, classes=(), dtype=torch.float64, book=None, **options
):
    """A prior of random weights, so that its distributions are far from uniform."""
    torch.manual_seed(0)
    info = DataInfo(shape, 256, classes)
    small = {"width": 16, "layers": 2, "heads": 2, "conditional": bool(classes), **options}
    model = cls.of(info, tokenizer=tokenizer(info, codes, **(book or {})), **small).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn_like(p))
    return model.eval()


def prepared(model, x: torch.Tensor, y: torch.Tensor | None = None) -> Batch:
    """A training batch of x with its codes."""
    made = batch(x, y=y)
    made.extra |= model.prepare(made)
    return made
