"""A run in several ways in one comparison: with other weights, or by another sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gzcli.engine.trained import Trained
from gzcli.judge.calls import steps_for

OF_MODEL = ("bpd", "own", "lpips")  # metrics of which a part does not depend on samples


def varied(trained: Trained, how: Mapping[str, Any]) -> Trained:
    """The model with the sampler that its variant asks for."""
    options = dict(how.get("sample", {}))
    if "calls" in how:
        options["steps"] = steps_for(trained, how["calls"])
    return replace(trained, part=replace(trained.part, sample={**trained.part.sample, **options}))


def quick(metrics: Sequence[str]) -> list[str]:
    """The metrics without those of which a part does not depend on samples, as the model alone has it."""
    return [name for name in metrics if name not in OF_MODEL]
