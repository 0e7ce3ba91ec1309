"""The folder of a run, of one of its stages, or of a job: every name, path and format in it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import time
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gzcli.core.errors import DamagedError, UsageError, first_line
from gzcli.core.sections import Part, leaves, titled
from gzcli.store import files, index
from gzcli.store.paths import inside, is_name

RUN_ID = re.compile(r"(.+)-(\d{8}-\d{6})-([0-9a-f]{4})")  # model and data, time, random digits
# first line of `run.yaml`, by which a file that was cut off is recognized; older files have none
KEYS = re.compile(r"# (\d+) keys\n")
STAGES = "stages"  # key in a recipe, and folder in a run
# types of values of `status.json`; any may be null
STATUS_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("state", "model", "data", "alias", "copy_of", "clock", "file", "from"), str),
    **dict.fromkeys(("step", "steps", "order", "pid", "parent", "params", "code", "levels"), int),
    # step at which `train.patience` ended training, and step of the weights in use
    **dict.fromkeys(("ended_by_patience", "served", "first_steps"), int),
    **dict.fromkeys(("created", "started", "saved_at", "ended", "process_began"), (int, float)),
    **dict.fromkeys(("seconds", "work", "work_from", "peak_memory"), (int, float)),
    **dict.fromkeys(("sample_seconds", "ema_length"), (int, float)),
    **dict.fromkeys(("recipe", "error", "lost"), dict),
}
# the same of `env.json`
NOTED: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("packages", "training", "data"), dict),
    **dict.fromkeys(("command", "models"), list),
}


class Place:
    """A path below a folder. Read from an object it is absolute, read from the class it is relative."""

    def __init__(self, name: str):
        self.name = name

    def __get__(self, folder: Any, kind: type) -> Path:
        return Path(self.name) if folder is None else folder.path / self.name


@dataclass(frozen=True)
class CheckpointFolder:
    """The folder of one checkpoint, `checkpoints/00001000`."""

    path: Path

    weights = Place("model.safetensors")  # the trained weights
    averaged = Place("ema.safetensors")  # the averaged weights, with recipe and data in the metadata
    training = Place("train.pt")  # optimizers, scaler, counters, per-rank state, losses not yet logged
    meta = Place("meta.json")  # step, facts of the machine, checksums of the other files

    @classmethod
    def of(cls, folder: Path, step: int) -> CheckpointFolder:
        return cls(folder / f"{step:08d}")


def steps_of(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, oldest first."""
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


@dataclass(frozen=True)
class Best:
    """The best value of a metric on validation images (lower is better), and its step."""

    metric: str
    value: float
    step: int


@dataclass(frozen=True)
class Run:
    """The folder of a run, a stage or a job."""

    path: Path

    mark_file = Place(".gz")  # marks a folder that gz made
    lock_file = Place(".lock")  # lock held by the engine while it trains or runs a job
    claim_file = Place(".claim")  # lock held by `gz` from before an engine starts until it has ended
    status_file = Place("status.json")  # state, identity and error
    log_file = Place("log.txt")
    earlier_log_file = Place("log.1.txt")
    stop_file = Place("stop")  # number of the signal that stops the engine
    launch_file = Place("accelerate.yaml")
    # of a training
    recipe_file = Place("run.yaml")  # the whole recipe
    environment_file = Place("env.json")  # packages, machine, command line, data
    metrics_file = Place("metrics.jsonl")
    model_file = Place("model.safetensors")  # averaged weights of a finished run
    checkpoints_folder = Place("checkpoints")
    best_file = Place("checkpoints/best.json")
    # power-function averages of the weights, from which others are computed
    snapshots_folder = Place("snapshots")
    samples_folder = Place("samples")  # grids of a training; images that a `gz bench` drew
    losses_picture = Place("loss.png")
    tracker_file = Place("mlflow.json")  # the run's id in MLflow
    stages_folder = Place(STAGES)
    latent_folder = Place("latent")  # autoencoder of a run imported from one file
    programs_folder = Place("models")  # copies of model files from outside
    card_file = Place("card.json")  # card of a run imported from one file
    preview_picture = Place("preview.png")
    # of a job
    job_file = Place("job.json")
    result_file = Place("result.json")
    bench_file, league_file = Place("bench.json"), Place("league.json")
    ood_file, alarm_file = Place("ood.json"), Place("alarm.json")
    inspection_file = Place("inspection.json")
    scores_file = Place("scores.csv")  # of `gz ood`
    sheet_picture = Place("grid.png")  # of `gz sample`
    images_folder = Place("images")
    images_file = Place("samples.npz")  # all images in one file
    animation_file = Place("animation.gif")

    @property
    def id(self) -> str:
        """The folder's name. For a stage, its path below the folder that contains the owner."""
        return self.path.name if self.owner is self else f"{self.owner.id}/{STAGES}/{self.path.name}"

    @property
    def owner(self) -> Run:
        """The run of which this is a stage; otherwise the run itself."""
        above = self.path.parent
        return Run(above.parent) if above.name == STAGES and Run(above.parent).recipe_file.exists() else self

    @property
    def stages(self) -> list[Run]:
        """The stages in order of training; empty for a run without stages."""
        if self.recipe_file.exists() and self.stages_folder.is_dir():
            # a verb that needs the recipe reads it again and reports its error
            with contextlib.suppress(DamagedError, UsageError):
                return [self.stage(name) for name in self.tree().get(STAGES, ())]
        return []

    @property
    def serving(self) -> Run:
        """The run whose weights are sampled and scored: the last stage, or the run itself."""
        return [self, *self.stages][-1]

    @property
    def in_owner(self) -> str:
        """The prefix of this run's keys in the owner's recipe: `stages.prior.`, empty without stages."""
        return "" if self.owner is self else f"{STAGES}.{self.path.name}."

    def stage(self, name: str) -> Run:
        """The stage of this name, which may not exist yet. Raises UsageError if the name is a path."""
        if not is_name(name):
            message = f"`{name}` is not a valid name for a stage"
            raise UsageError(message, hint="use lower-case letters, digits, `-` and `_`")
        return Run(inside(self.stages_folder / name, self.path))

    @property
    def model(self) -> str:
        return self.status().get("model", "?")

    @property
    def title(self) -> str:
        """The model's name for the user: `fm +100 clusters`."""
        # a verb that needs the recipe reads it again and reports its error
        with contextlib.suppress(DamagedError, UsageError):
            tree, stage = self.owner.tree(), self.owner.stage
            parts = (tree.get(STAGES) or {"": tree}).items()
            # a string is a run from which the stage is copied
            trees = [stage(name).tree() if isinstance(part, str) else part for name, part in parts]
            return titled(str(self.model), trees)
        return str(self.model)

    @property
    def data(self) -> str:
        return self.status().get("data", "?")

    @property
    def alias(self) -> str | None:
        return self.status().get("alias")

    @property
    def lock(self) -> Path:
        """The lock of its training; a stage shares its owner's."""
        return self.owner.lock_file

    @property
    def is_held(self) -> bool:
        """Whether a process is starting its training, training it, or waiting for its end."""
        return files.is_locked(self.lock) or files.is_locked(self.owner.claim_file)

    @property
    def state(self) -> str:
        """planned | running | finished | interrupted | failed | diverged | killed | damaged."""
        state = self.status().get("state", "planned")
        if state in ("finished", "damaged"):
            return state
        # a training claims its run before it writes the status; without a claim, it was killed
        return "running" if self.is_held else "killed" if state == "running" else state

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoint folders, oldest first; for a run in stages, those of all its stages."""
        folders = sorted(self.checkpoints_folder.glob("[0-9]*"))
        complete = [folder for folder in folders if CheckpointFolder(folder).averaged.exists()]
        return [path for stage in self.stages for path in stage.checkpoints] or complete

    @property
    def saved_steps(self) -> list[int]:
        """The steps with a checkpoint, oldest first. A run in stages has none itself."""
        return steps_of(self.checkpoints_folder)

    def checkpoint(self, step: int) -> CheckpointFolder:
        return CheckpointFolder.of(self.checkpoints_folder, step)

    def samples_picture(self, step: int) -> Path:
        return self.samples_folder / f"{step:08d}.png"

    def launch_file_of(self, machine: int) -> Path:
        """The file of accelerate's configuration. Machines that share a run folder have one each."""
        return self.path / f"accelerate.{machine}.yaml" if machine else self.launch_file

    @property
    def has_begun(self) -> bool:
        """Whether at least one step is recorded, by a checkpoint or a line of metrics."""
        parts = [self, *(stage for stage in self.stages if "copy_of" not in stage.status())]
        return any(part.checkpoints or part.metrics_file.exists() for part in parts)

    @property
    def weights(self) -> Path | None:
        """The weights for sampling; for an unfinished run, those of its newest checkpoint, or None."""
        run = self.serving
        if run.state != "finished" and (checkpoints := run.checkpoints):
            return CheckpointFolder(checkpoints[-1]).averaged
        return run.model_file if run.model_file.exists() else None

    @property
    def shortfalls(self) -> list[str]:
        """How the run falls short of its recipe, such as `60 steps instead of the recipe's 700`. Empty for a
        complete run."""
        lacking = []
        for part in self.stages or [self]:
            status = part.status()
            planned, steps = (status.get("recipe") or {}).get("steps"), status.get("step", 0)
            if planned and part.done_steps < planned:
                of_stage = "" if part is self else f" of `{part.path.name}`"
                lacking.append(f"{steps:,} steps{of_stage} instead of the recipe's {planned:,}")
        status = self.status()
        size, planned_size = status.get("size"), (status.get("recipe") or {}).get("size")
        if size and planned_size and size != planned_size:
            lacking.append(f"images of {size} pixels instead of {planned_size}")
        return lacking

    @property
    def ended_by_patience(self) -> int | None:
        """The step at which `train.patience` ended the training; None if it did not."""
        status = self.status()
        end = status.get("ended_by_patience")
        return end if end and end == status.get("step") else None

    @property
    def done_steps(self) -> int:
        """The number of steps of its plan that need no more training: all if `train.patience` ended it."""
        return self.status().get("steps" if self.ended_by_patience else "step") or 0

    @property
    def served(self) -> int | None:
        """The step of the weights of a finished run; None if they are those of its last step."""
        status = self.serving.status()
        served, is_average = status.get("served"), status.get("ema_length")
        earlier = served and served != status.get("step") and not is_average
        return served if earlier and self.state == "finished" else None

    @property
    def seconds(self) -> float:
        """Seconds of training, summed over its starts."""
        return self.seconds_at(time.time() if self.state == "running" else None)

    def seconds_at(self, now: float | None) -> float:
        """`seconds` at a time if its last start has not ended; None: that start was killed, and counts until
        its last checkpoint."""
        status = self.status()
        began, ended = status.get("started"), status.get("ended") or now or status.get("saved_at")
        return status.get("seconds", 0.0) + (max(0.0, ended - began) if began and ended else 0.0)

    @property
    def work(self) -> float:
        """CPU seconds of its first process, summed over its starts; one that was killed counts until its last
        checkpoint."""
        status = self.status()
        running = status.get("state") == "running" and status.get("pid") == os.getpid()
        now = time.process_time() - status.get("work_from", 0.0) if running else 0.0
        return float(status.get("work", 0.0)) + now

    @property
    def clock(self) -> str:
        """The clock that measures its length: cpu (CPU time) or wall (wall-clock time)."""
        return "cpu" if all(part._clock == "cpu" for part in self.stages or [self]) else "wall"

    @property
    def _clock(self) -> str | None:
        """The clock in the run's status; for an older run, in its recipe."""
        if clock := self.status().get("clock"):
            return str(clock)
        with contextlib.suppress(DamagedError, UsageError):
            return (self.tree().get("train") or {}).get("clock")
        return None

    @property
    def training_seconds(self) -> float:
        """Seconds of training over all its stages, by its clock."""
        on_cores = self.clock == "cpu"
        # the stages of a run from one file have no record of their own
        whole = self.work if on_cores else self.seconds
        return sum(part.work if on_cores else part.seconds for part in self.stages) or whole

    @property
    def training(self) -> dict[str, Any]:
        """The commit and machine of its training, and seconds, steps and peak memory in bytes over all its
        stages; None where the run has no record."""
        parts, environment = [part.status() for part in self.stages or [self]], self.environment
        return {
            "commit": commit_in(environment),
            "machine": environment.get("machine"),
            "train_seconds": round(self.training_seconds, 1) or None,
            "train_steps": sum(status.get("step") or 0 for status in parts) or None,
            "peak_memory": max((status.get("peak_memory") or 0 for status in parts), default=0) or None,
        }

    @property
    def best(self) -> Best | None:
        """The best validation result; None if nothing was validated."""
        # the next validation writes a damaged record again
        with contextlib.suppress(KeyError, TypeError, ValueError):
            record = files.whole_object(self.best_file)
            best = Best(str(record["metric"]), float(record["value"]), int(record["step"]))
            return best if math.isfinite(best.value) else None
        return None

    def status(self) -> dict[str, Any]:
        """The content of `status.json`. Empty if the file is missing; if it is damaged, the state is
        "damaged"."""
        if (status := index.recall(self.path, "status")) is not None:
            return dict(status)
        marks: index.Marks = {self.status_file.name: index.mark(str(self.status_file))}
        try:
            status = files.read_object(self.status_file)
            if "model" not in status and self.is_marked("run"):
                fault = "is damaged" if status else "is missing or empty"
                raise DamagedError(f"`{self.status_file}` {fault}: it does not name the run's model")
            for key, value in status.items():
                if value is not None and not isinstance(value, STATUS_TYPES.get(key, object)):
                    raise DamagedError(f"`{self.status_file}` is damaged: `{key}` is {value!r:.40}")
            if status:
                index.store_value(self.path, "status", marks, status)
            return status
        except DamagedError as e:
            model, data, *_ = [*self.path.name.split("-"), "?", "?"]
            error = {"kind": e.kind, "message": e.message, "hint": f"gz runs remove {self.path.name}"}
            return {"state": "damaged", "model": model, "data": data, "error": error}

    @property
    def environment(self) -> dict[str, Any]:
        """The record in `env.json`, without damaged entries. Training does not depend on it."""
        record = files.whole_object(self.environment_file)
        return {key: value for key, value in record.items() if isinstance(value, NOTED.get(key, object))}

    def mark(self, kind: str) -> None:
        """Marks a new folder as a "run", "job" or "report" of gz; raises FileExistsError for a marked one."""
        with open(self.mark_file, "x") as f:
            f.write(json.dumps({"kind": kind}) + "\n")

    def is_marked(self, kind: str) -> bool:
        """Whether gz made the folder as a "run", "job" or "report"."""
        return files.whole_object(self.mark_file).get("kind") == kind  # `.gz` may belong to another program

    def update(self, **changes: Any) -> None:
        status = self.status()
        if status.get("state") == "damaged":  # a resume repairs what is left
            status = {key: status[key] for key in ("model", "data")} if "model" not in changes else {}
        files.write_json(self.status_file, status | changes)

    def save_step(self, step: int) -> None:
        """Records a checkpoint of its training, and the time until then in case the process is killed."""
        self.update(step=step, saved_at=time.time(), work=self.work, work_from=time.process_time())

    def tree(self) -> dict[str, Any]:
        """The resolved recipe in `run.yaml`. Raises DamagedError if the file is missing or is not a
        recipe, UsageError if keys are missing."""
        import yaml

        path, hint = self.recipe_file, f"restore a copy, or run `gz runs remove {self.owner.id}`"
        if (text := files.read_text(path, hint)) is None:
            raise DamagedError(f"the recipe of this run, `{path}`, is missing", hint=hint)
        try:
            tree = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except (yaml.YAMLError, RecursionError, ValueError) as e:
            raise DamagedError(f"`{path}` is damaged: {first_line(e)}", hint=hint) from e
        staged = isinstance(tree, dict) and STAGES in tree
        parts = tree[STAGES] if staged else {"only": tree}
        has_names = isinstance(parts, dict) and all(is_name(str(name)) for name in parts)
        # a stage from another run is recorded as that run's id
        has_parts = has_names and all(
            (staged and isinstance(part, str)) or _is_recipe(part) for part in parts.values()
        )
        if not has_parts:
            raise DamagedError(f"`{path}` is damaged: it is not a recipe", hint=hint)
        if (count := KEYS.match(text)) and (keys := len(leaves(tree))) < int(count[1]):
            gone = ", ".join(f"`{key}`" for key in _missing(tree))
            message = f"`{path}` has only {keys} of its {count[1]} keys"
            raise UsageError(f"{message}: it lacks {gone}" if gone else message, hint=hint)
        return tree


# Records that are rewritten or grow in place; any other change in a run changes the time of a folder.
RECORDS = {place.name for place in (Run.status_file, Run.recipe_file, Run.metrics_file, Run.best_file)}


def commit_in(environment: Mapping[str, Any]) -> str | None:
    """The commit of gz's code in an environment, marked if its clone had changes; None if it is unknown."""
    code = environment.get("code") or {}
    return f"{code['commit']} with changes" if code.get("dirty") else code.get("commit")


def _missing(tree: Mapping[str, Any]) -> list[str]:
    """The sections, and keys of sections, that a resolved recipe, or its last stage, lacks."""
    stages = [part for part in tree.get(STAGES, {}).values() if isinstance(part, dict)]
    there, missing = ChainMap(dict(tree), *stages[-1:]), []
    for name, usual in Part("").tree().items():
        if name not in there:
            missing.append(name)
        elif isinstance(usual, dict):
            missing += [f"{name}.{key}" for key in usual if key not in (there[name] or {})]
    return missing


def _is_recipe(tree: Any) -> bool:
    """Whether a tree has what a model's recipe needs: the model's name, and maps as sections."""
    sections = ("data", "train", "optim", "sample", "ood", "bench", "launch")
    return (
        isinstance(tree, dict)
        and isinstance(tree.get("model"), dict)
        and isinstance(tree["model"].get("name"), str)
        and all(isinstance(tree.get(name) or {}, dict) for name in sections)
    )
