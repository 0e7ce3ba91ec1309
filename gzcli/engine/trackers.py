"""Trackers of a training by name, through accelerate: they get recipe, losses, validations and pictures."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from gzcli.core.errors import MissingError, first_line
from gzcli.core.sections import LaunchSection
from gzcli.engine.log import Log
from gzcli.store import files
from gzcli.store.paths import user_dir
from gzcli.store.runs import Run

PROJECT = "gz"  # under which a service lists the runs
# What to do where a tracker does not start: no key, no network, no server.
HINTS = {
    "wandb": "`wandb login` once, or `WANDB_MODE=offline`, and `wandb sync` later",
    "trackio": "`TRACKIO_DIR` and `HF_TOKEN` set where it writes; without a space it stays on this machine",
    "mlflow": "`MLFLOW_TRACKING_URI` says which server; without it a file in gz's own folder serves",
    "tensorboard": "it writes into the run's folder, which must be writable",
}


def names(section: LaunchSection) -> tuple[str, ...]:
    """The trackers that a recipe asks for, each once."""
    return tuple(dict.fromkeys((*section.track, *(("wandb",) if section.wandb else ()))))


class Trackers:
    """The trackers of a run. One that fails while it is trained is told of and left: it stops no training.

    names: of the trackers.
    run: the run, or the stage of a run, that is trained.
    config: its recipe, and what is known besides.
    log: where a failure is told.
    start: the step that a resumed run goes on from.

    Raises MissingError where a tracker's package is missing, or it cannot start.
    """

    def __init__(
        self, names: Sequence[str], run: Run, config: Mapping[str, Any], log: Log, *, start: int = 0
    ):
        self.log = log
        self.open = {name: started(name, run, config, start) for name in names}

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        """Logs figures of a step."""
        self._each(lambda name, tracker: tracker.log(dict(values), step=step))

    def picture(self, step: int, path: Path) -> None:
        """Logs the picture of samples of a step."""
        self._each(lambda name, tracker: show(name, tracker, step, path))

    def close(self) -> None:
        """Ends the runs of the trackers, which send what is left."""
        self._each(lambda name, tracker: tracker.finish())
        self.open = {}

    def _each(self, do: Callable[[str, Any], None]) -> None:
        for name, tracker in list(self.open.items()):
            try:
                with redirect_stdout(sys.stderr):
                    do(name, tracker)
            except Exception as e:  # a server that is gone, a full disk: the training goes on
                del self.open[name]
                self.log.warn(f"`{name}` does not track any more: {first_line(e)}")


def started(name: str, run: Run, config: Mapping[str, Any], start: int) -> Any:
    """accelerate's tracker of this name, which has stored the recipe.

    Raises MissingError where its package is missing, or it cannot start.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    if name not in LOGGER_TYPE_TO_CLASS:
        raise MissingError(f"this accelerate knows no tracker `{name}`", hint="pip install -U accelerate")
    id_ = run.id.replace("/", "-")  # of a stage it is a path
    options: dict[str, Any]
    known = {"project": os.environ.get(f"{name.upper()}_PROJECT", PROJECT), "name": run.id}
    try:
        if name == "tensorboard":  # a resumed run hides what was logged after its checkpoint
            options = {"purge_step": start} if start else {}
            tracker = LOGGER_TYPE_TO_CLASS[name](name, run.path, **options)
        elif name == "mlflow":
            place = user_dir(name)
            place.mkdir(parents=True, exist_ok=True)
            os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{place / 'runs.db'}")
            earlier = files.read_json(run.tracker_file) if start else None
            options = {"run_id": earlier["run_id"]} if earlier else {"run_name": id_}
            tracker = LOGGER_TYPE_TO_CLASS[name](PROJECT, logging_dir=place.as_uri(), **options)
        else:
            own = {"id": id_, "dir": run.path} if name == "wandb" else {}
            more = {"name": known["name"], "resume": "allow", "config": dict(config), **own}
            tracker = LOGGER_TYPE_TO_CLASS[name](known["project"], **more)
        with redirect_stdout(sys.stderr):  # what packages say of themselves is no data
            tracker.start()
        if name == "mlflow":
            files.write_json(run.tracker_file, {"run_id": tracker.active_run.info.run_id})
        if name == "tensorboard" or (name == "mlflow" and not start):  # the others have it from the start
            tracker.store_init_configuration(flat(config))
    except ImportError as e:
        raise MissingError(f"`--track {name}` needs the package `{name}`", hint=f"pip install {name}") from e
    except Exception as e:  # no key, a wrong one, no network, no server: each package has errors of its own
        raise MissingError(f"`--track {name}`: {first_line(e)}", hint=HINTS[name]) from e
    return tracker


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, int | float | str | bool]:
    """The values of a tree by dotted key, in types that all trackers take; without those that are None."""
    found: dict[str, int | float | str | bool] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif value is not None:
            found[prefix + key] = value if isinstance(value, int | float | str) else str(value)
    return found


def show(name: str, tracker: Any, step: int, path: Path) -> None:
    """Logs a picture with one tracker."""
    if name == "mlflow":
        tracker.log_artifact(str(path), artifact_path="samples")
    elif name == "trackio":
        import trackio

        tracker.log({"samples": trackio.Image(str(path))}, step=step)
    else:
        import numpy as np
        from PIL import Image

        image = np.asarray(Image.open(path).convert("RGB"))[None]  # [1, H, W, 3]
        order = {"dataformats": "NHWC"} if name == "tensorboard" else {}
        tracker.log_images({"samples": image}, step, **order)
