"""gz from Python: train, load, sample and score with numpy arrays in and out.

Images are uint8 [N, C, H, W] with C = 1 or 3. What is drawn depends on the seed and the number of the image
alone, as on the command line.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from gzcli.api.handles import Data, Run
from gzcli.core.devices import pick_device
from gzcli.core.errors import UsageError
from gzcli.core.sections import PRECISIONS, Fit, LaunchSection
from gzcli.core.units import Size
from gzcli.data.packs.open import open_pack
from gzcli.data.sets.library import listing
from gzcli.engine.trained import load_trained
from gzcli.launch.from_file import find_run
from gzcli.launch.plan import ask, prepare
from gzcli.store.pretrained import PREFIX


def train(
    what: str,
    *,
    data: str | Path | None = None,
    scale: str | None = None,
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

    what: name of a model, path of a recipe or of a model's file, or a run to repeat.
    data: name or path of the data set; None: that of the recipe.
    scale: "tiny", "small", "full" or "paper"; None: tiny for embedded sets and up to 15 minutes of a
      CPU, else full where GPUs are used, small elsewhere.
    steps: number of training steps; None: that of the recipe.
    minutes: time to train, in minutes; None: the recipe's number of steps.
    seed: seed of weights and noise; None: that of the recipe.
    name: an alias of the run.
    resume: whether the newest unfinished run goes on, or the run that `what` names or that is called `name`;
      where there is none a new one starts.
    gpus: number of GPUs, or "all"; None: every visible one.
    cpu: whether the CPU is used though there are GPUs.
    processes: number of processes on a CPU.
    set: keys of the recipe with other values, {"model.hidden": 16} or ["model.hidden=16"].
    quiet: whether nothing is printed meanwhile.

    Raises the errors of `gzcli.core.errors`: UsageError, MissingError, DeviceError, DivergedError,
    Interrupted.
    """
    if steps and minutes:
        raise UsageError("`steps` and `minutes` exclude each other")
    flags: dict[str, Any] = {
        "scale": scale,
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
    request = ask(what, None if data is None else str(data), sets, flags)
    start = prepare(request, alias=name, requeue=resume)
    if start.plan.note:
        warnings.warn(start.plan.note, stacklevel=2)
    recipe = start.recipe()
    run = start.train(recipe, mode="quiet" if quiet else "human")
    return Run(load_trained(run, pick_device(recipe.launch)))


def load(
    what: str | Path,
    *,
    data: str | None = None,
    pretrained: bool = False,
    checkpoint: str | int = "last",
    device: str | None = None,
    precision: str | None = None,
) -> Run:
    """The trained model that a name means.

    what: a run's id, alias or folder, a model, whose newest finished run is taken, a file of weights,
      `hf://OWNER/NAME` of the hub, or `pretrained:MODEL`.
    data: the set of that run, where a model is named.
    pretrained: whether the model is the one that comes with gz: `pretrained:MODEL` by another name.
    checkpoint: "last", "best" or a step.
    device: as torch names it; None: a GPU if there is one.
    precision: of samples and scores: "fp32", "bf16", "fp16" or "auto"; None: samples as it was trained,
      scores in fp32. Likelihoods are always in fp32.

    Raises MissingError where there is none, UsageError where nothing is called so, and for another precision.
    """
    if precision not in (None, *PRECISIONS):
        raise UsageError(f"there is no precision `{precision}`", hint=f"it is one of {', '.join(PRECISIONS)}")
    run = find_run(f"{PREFIX}{what}" if pretrained else str(what), data=data)
    where = torch.device(device) if device else pick_device(LaunchSection())
    return Run(load_trained(run, where, str(checkpoint), precision))


def datasets() -> list[dict[str, Any]]:
    """Each data set as a dict of name, title, classes, cached, …, as `gz list data --json` prints it."""
    return listing()


def open_data(
    name: str | Path, *, size: Size | None = None, channels: int | None = None, fit: Fit = "crop"
) -> Data:
    """A data set, fetched (up to 200 MB) and packed now if need be.

    name: a known set, an imported one, or a path.
    size: side of the images in pixels, or width and height as "48x32"; None: as the set has it.
    channels: 1 or 3; None: as the set has it.
    fit: how pictures of another shape come to the size: "crop", "pad" or "stretch".

    Raises UsageError for an unknown name, MissingError where its files are not there.
    """
    return Data(open_pack(name, size=size, channels=channels, fit=fit))
