"""How often a network runs to make one image: the cost of a sampler that no machine decides on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gzcli.core.types import ImageNoise, no_progress
from gzcli.engine.trained import Trained
from gzcli.models.nn import spread_labels
from gzcli.models.options import defaults, grouped


def count_calls(trained: Trained, options: Mapping[str, Any] | None = None) -> int:
    """The network calls of one image, found by drawing it.

    Each layer that runs counts with its parameters, and half of these parameters run as often or more. So
    the large network of several counts, and a layer that is skipped at some steps does not. Guidance doubles
    the batch, which counts as two calls. The pixel models compute every value once and keep it, past their
    layers' `forward`: they count as many calls as they take without that (`naive`), one for each value drawn.
    """
    keywords = grouped(trained.model.sample, {**trained.part.sample, **(options or {})})
    if "naive" in defaults(trained.model.sample):
        parts: Any = trained.model.parts
        return parts * math.prod(trained.info.shape[1:])
    noise = ImageNoise(0, range(1), trained.device)
    labels = spread_labels(None, 1, trained.info, trained.device) if trained.model.conditional else None
    net = getattr(trained.model, "net", getattr(trained.model, "trunk", None))  # a denoiser's, a prior's
    with torch.inference_mode(), trained.sampling(), counted(net) as runs:
        trained.model.sample(1, labels=labels, noise=noise, progress=no_progress, **keywords)
    return weighted_median([(count, own_size(layer)) for layer, count in runs.items()])


def steps_for(trained: Trained, calls: int) -> int | None:
    """The most `steps` of the model's sampler whose calls are `calls` at most; None where it has no steps.

    The calls of a solver are a line in its steps (Euler s, midpoint 2 s, Heun 2 s − 1): two counts give it.
    Where its first step alone takes more it is 1 step.
    """
    if "steps" not in defaults(trained.model.sample):
        return None
    few, more = count_calls(trained, {"steps": 2}), count_calls(trained, {"steps": 4})
    slope = (more - few) / 2
    steps = int(2 + (calls - few) / slope) if slope > 0 else calls
    return max(1, steps)


@contextmanager
def counted(net: nn.Module | None) -> Iterator[Counter[nn.Module]]:
    """Counts the calls of every module within the block, also of attached ones, while one image is drawn."""
    runs: Counter[nn.Module] = Counter()
    rows = 1

    def note(module: nn.Module, inputs: Any) -> None:
        nonlocal rows
        if module is net:
            rows = len(inputs[0])
        runs[module] += rows

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield runs
    finally:
        handle.remove()


def own_size(layer: nn.Module) -> int:
    """The parameters of a module itself, without those of modules in it."""
    return sum(p.numel() for p in layer.parameters(recurse=False))


def weighted_median(values: Sequence[tuple[int, int]]) -> int:
    """The largest value that half of the weight reaches or exceeds; 0 without weight."""
    half, reached = sum(weight for _, weight in values) / 2, 0
    for value, weight in sorted(values, reverse=True):
        reached += weight
        if weight and reached >= half:
            return value
    return 0
