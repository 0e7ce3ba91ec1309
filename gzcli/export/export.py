"""`gz runs export`: a trained model as one file, or in the format of another library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gzcli.core.errors import UsageError
from gzcli.core.jobs import ExportJob
from gzcli.engine.log import Log
from gzcli.engine.trained import Trained, load_trained
from gzcli.export import bundle, portable
from gzcli.store import files
from gzcli.store.files import sweep
from gzcli.store.runs import Run


def run(job: ExportJob, folder: Path, device: torch.device, log: Log) -> dict[str, Any]:
    """Writes the averaged weights of the job's run to `job.out`. Returns the JSON of `gz runs export`."""
    trained = load_trained(Run(Path(job.run)), device, job.checkpoint)
    sweep(Path(job.out).parent)
    facts = {"run": trained.run.owner.id, "to": job.to, "path": job.out}
    if job.to == "file":
        return facts | {"card": bundle.write(trained, job)}
    if job.to in ("onnx", "torch"):
        made = portable.write(trained, job.to, Path(job.out))
        log.info(f"images within {made['differs']} of 255 of gz's; files: {', '.join(made['files'])}")
        return facts | made
    return facts | to_diffusers(trained, job.out, log)


def to_diffusers(trained: Trained, out: str, log: Log) -> dict[str, Any]:
    """Writes a folder that diffusers loads. Returns the class of its pipeline and what to call next.

    A model can be exported if it has a method `to_diffusers`. That returns a pipeline, or any object with
    `save_pretrained`. The object may have two attributes: `loaded_by`, the call that loads it, where that is
    not its class's `from_pretrained`; and `usage`, what to call next. Both are printed, and written into the
    folder's README.md.

    Raises UsageError for a model without the method.
    """
    if not hasattr(trained.model, "to_diffusers"):
        raise UsageError(
            f"`{trained.name}` has no counterpart in diffusers", hint="gz list models --can export"
        )
    pipeline = trained.model.to_diffusers()
    pipeline.save_pretrained(out)
    loaded_by = getattr(pipeline, "loaded_by", f"{type(pipeline).__name__}.from_pretrained")
    usage = getattr(pipeline, "usage", None)
    log.info(f"diffusers loads it by `{loaded_by}({out!r})`")
    if usage:
        log.info(f"then {usage}")
    files.write_atomic(Path(out) / "README.md", readme(trained, loaded_by, usage))
    return {"pipeline": type(pipeline).__name__, "usage": usage}


def readme(trained: Trained, loaded_by: str, usage: str | None) -> str:
    """The text of the exported folder's README.md."""
    title = [
        f"# {trained.name}, {trained.run.owner.id}",
        "",
        f"Weights after {trained.step} steps, for diffusers:",
    ]
    lines = [*title, "", f"    pipeline = {loaded_by}(FOLDER)", ""]
    return "\n".join([*lines, *([f"then {usage}.", ""] if usage else [])])
