"""The services that `--track` logs a run to: one record each, based on accelerate's tracker of that name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT = "gz"  # project of the runs at a service


@dataclass(frozen=True)
class Logged:
    """Arguments with which a tracker is started.

    name: name of the tracker.
    run: id of the run, which may be the path of a stage.
    folder: folder of the run.
    local: folder for a service without a server.
    config: the recipe.
    start: number of steps that the run has trained before.
    stored: what the tracker's `to_store` returned when the run began.
    """

    name: str
    run: str
    folder: Path
    local: Path
    config: Mapping[str, Any]
    start: int
    stored: Mapping[str, Any]

    @property
    def id(self) -> str:
        """The run's id as part of a path."""
        return self.run.replace("/", "-")


@dataclass(frozen=True)
class Tracker:
    """A service that a run can be logged to.

    hint: what to do if it does not start: no key, no network, no server.
    make: function of accelerate's class and `Logged` that returns the tracker.
    show: logs an image of a step.
    to_store: returns what a resume needs. None: nothing.
    recipe: when the recipe is logged automatically: at each start, or at the first. "": `make` logs it.
    """

    hint: str
    make: Callable[[Any, Logged], Any]
    show: Callable[[Any, Path, int], None]
    to_store: Callable[[Any], dict[str, Any]] | None = None
    recipe: str = ""


def _service(make: Any, run: Logged, **options: Any) -> Any:
    project = os.environ.get(f"{run.name.upper()}_PROJECT", PROJECT)
    return make(project, name=run.run, resume="allow", config=dict(run.config), **options)


def _wandb(make: Any, run: Logged) -> Any:
    return _service(make, run, id=run.id, dir=run.folder)


def _tensorboard(make: Any, run: Logged) -> Any:
    """Starts TensorBoard's tracker. A resumed run hides entries after its checkpoint."""
    return make(run.name, run.folder, **({"purge_step": run.start} if run.start else {}))


def _mlflow(make: Any, run: Logged) -> Any:
    run.local.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{run.local / 'runs.db'}")
    identity = dict(run.stored) or {"run_name": run.id}
    return make(PROJECT, logging_dir=run.local.as_uri(), **identity)


def _show_array(tracker: Any, path: Path, step: int, **order: str) -> None:
    import numpy as np
    from PIL import Image

    image = np.asarray(Image.open(path).convert("RGB"))[None]  # [1, H, W, 3]
    tracker.log_images({"samples": image}, step, **order)


def _show_tensorboard(tracker: Any, path: Path, step: int) -> None:
    _show_array(tracker, path, step, dataformats="NHWC")


def _show_trackio(tracker: Any, path: Path, step: int) -> None:
    import trackio

    tracker.log({"samples": trackio.Image(str(path))}, step=step)


def _show_mlflow(tracker: Any, path: Path, step: int) -> None:
    tracker.log_artifact(str(path), artifact_path="samples")


TRACKERS: Mapping[str, Tracker] = {
    "wandb": Tracker(
        "run `wandb login`, or set `WANDB_MODE=offline` and run `wandb sync` later", _wandb, _show_array
    ),
    "tensorboard": Tracker(
        "make the run's folder writable: tensorboard logs to it",
        _tensorboard,
        _show_tensorboard,
        recipe="each",
    ),
    "trackio": Tracker(
        "set `TRACKIO_DIR` to a writable folder, or `HF_TOKEN` to log to a space",
        _service,
        _show_trackio,
    ),
    "mlflow": Tracker(
        "set `MLFLOW_TRACKING_URI` to your server, or unset it to log to gz's own folder",
        _mlflow,
        _show_mlflow,
        to_store=lambda tracker: {"run_id": tracker.active_run.info.run_id},
        recipe="first",
    ),
}
