"""A run in several ways in one comparison: with other weights, or by another sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gzcli.engine.calls import steps_for
from gzcli.engine.trained import Trained, load_trained
from gzcli.jobs import BenchJob
from gzcli.store.runs import Run

OF_MODEL = ("bpd", "own")  # metrics that do not depend on samples


def load(path: str, job: BenchJob, how: Mapping[str, Any], device: torch.device) -> Trained:
    """The model of a run, with the weights and the sampler that its variant asks for.

    path: folder of the run.
    how: the variant, as `BenchJob.variants` has it.
    """
    trained = load_trained(Run(Path(path)), device, how.get("checkpoint", job.checkpoint), job.precision)
    options = dict(how.get("sample", {}))
    if "calls" in how:
        options["steps"] = steps_for(trained, how["calls"])
    trained.part = replace(trained.part, sample={**trained.part.sample, **options})
    return trained


def quick(metrics: Sequence[str]) -> list[str]:
    """The metrics without those that do not depend on samples."""
    return [name for name in metrics if name not in OF_MODEL]
