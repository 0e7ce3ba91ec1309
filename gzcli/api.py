"""gz from Python: train, load, sample and score with numpy arrays in and out.

Images are uint8 [N, C, H, W] with C = 1 or 3. What is drawn depends on the seed and the number of the image
alone, as on the command line.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from gzcli import launch, planning
from gzcli.data.library import listing
from gzcli.data.open import open_named
from gzcli.engine.devices import pick_device
from gzcli.engine.trained import load_trained
from gzcli.errors import UsageError
from gzcli.handles import Data, Run
from gzcli.recipe.from_file import find_run
from gzcli.recipe.parts import LaunchSection


def train(
    what: str,
    *,
    data: str | Path | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    seed: int | None = None,
    name: str | None = None,
    resume: bool = False,
    gpus: int | str | None = None,
    cpu: bool = False,
    processes: int | None = None,
    set: Mapping[str, Any] | Iterable[str] = (),
    quiet: bool = False,
) -> Run:
    """Trains a model in processes of its own, as `gz train` does, and loads what came out.

    what: a model, a recipe's path, a model's file, or a run to repeat.
    data: the set, a name or path; None: that of the recipe.
    steps: how many; None: as the recipe says.
    minutes: as many steps as fit in this time.
    seed: of weights and noise.
    name: an alias of the run.
    resume: go on with the newest unfinished run, or the run that `what` names.
    gpus: how many, or "all"; None: every visible one.
    cpu: leave GPUs alone.
    processes: of a CPU.
    set: keys of the recipe, {"model.hidden": 16} or ["model.hidden=16"].
    quiet: print nothing meanwhile.

    Raises the errors of `gzcli.errors`: UsageError, MissingError, DeviceError, DivergedError, Interrupted.
    """
    if steps and minutes:
        raise UsageError("`steps` and `minutes` exclude each other")
    flags: dict[str, Any] = {
        "train.steps": steps,
        "train.minutes": minutes,
        "seed": seed,
        "launch.gpus": gpus,
        "launch.cpu": cpu or None,
        "launch.processes": processes,
    }
    if isinstance(set, Mapping):
        flags |= {key: list(v) if isinstance(v, tuple) else v for key, v in set.items()}
    sets = [] if isinstance(set, Mapping) else set
    asked = planning.ask(what, None if data is None else str(data), sets, flags)
    run = asked.to_resume(extend=steps is not None) if resume else None
    plan = launch.plan(asked.recipe.launch, every_gpu=True)
    recipe = planning.ready(asked, run, steps, plan.processes)
    run = planning.start(asked, recipe, plan, run, alias=name, mode="quiet" if quiet else "human")
    return Run(load_trained(run, pick_device(recipe.launch)))


def load(
    what: str | Path, *, data: str | None = None, checkpoint: str | int = "last", device: str | None = None
) -> Run:
    """The trained model that a name means.

    what: a run's id, alias or folder, a model, whose newest finished run is taken, or a `model.safetensors`.
    data: the set of that run, where a model is named.
    checkpoint: "last", "best" or a step.
    device: as torch names it; None: a GPU if there is one.

    Raises MissingError where there is none, UsageError where nothing is called so.
    """
    run = find_run(str(what), data=data)
    where = torch.device(device) if device else pick_device(LaunchSection())
    return Run(load_trained(run, where, str(checkpoint)))


def datasets() -> list[dict[str, Any]]:
    """What is known of each data set, as `gz list data --json` has it: name, title, classes, cached, …"""
    return listing()


def open_data(name: str | Path, *, size: int | None = None, channels: int | None = None) -> Data:
    """A data set, fetched (up to 200 MB) and packed now if need be.

    name: a known set, an imported one, or a path.
    size: side of the images in pixels; None: as the set has it.
    channels: 1 or 3; None: as the set has it.

    Raises UsageError for an unknown name, MissingError where its files are not there.
    """
    return Data(open_named(name, size=size, channels=channels))
