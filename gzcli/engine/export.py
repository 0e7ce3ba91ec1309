"""`gz runs export`: a trained model in the format of another library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gzcli.engine.context import load_trained
from gzcli.engine.log import Log
from gzcli.errors import UsageError
from gzcli.store.runs import Run


def run(job: Mapping[str, Any], folder: Path, device: torch.device, log: Log) -> dict[str, Any]:
    """Writes the averaged weights of `job["run"]` into `job["out"]`. Returns the JSON of `gz runs export`.

    job: {run, checkpoint, to, out}. A model with a method `to_diffusers` can be exported: it returns a pipeline, or what else
    has a `save_pretrained`, with the method that loads it as `loaded_by` if that is another.
    Raises UsageError for one without.
    """
    trained = load_trained(Run(Path(job["run"])), device, job["checkpoint"])
    if not hasattr(trained.model, "to_diffusers"):
        raise UsageError(f"`{trained.name}` has no counterpart in diffusers", hint="gz list models --can export")
    pipeline = trained.model.to_diffusers()
    pipeline.save_pretrained(job["out"])
    loaded_by = getattr(pipeline, "loaded_by", f"{type(pipeline).__name__}.from_pretrained")
    log.info(f"diffusers loads it by `{loaded_by}({job['out']!r})`")
    return {"run": trained.run.owner.id, "to": job["to"], "path": job["out"], "pipeline": type(pipeline).__name__}
