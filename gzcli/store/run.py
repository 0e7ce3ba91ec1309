"""A run: the folder of one training, with its recipe, state, checkpoints, weights and metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gzcli.core.errors import DamagedError, UsageError, first_line
from gzcli.store import files, index, owned
from gzcli.store.paths import inside, is_name

STAGES = "stages"
# types of the values of `status.json` that are relied on; any may be null
KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("state", "model", "data", "alias", "asked", "copy_of"), str),
    **dict.fromkeys(("step", "steps", "order", "pid", "parent", "params", "code", "levels"), int),
    **dict.fromkeys(("created", "started", "ended", "seconds", "work", "peak_memory"), (int, float)),
    **dict.fromkeys(("recipe", "error", "lost"), dict),
}


@dataclass(frozen=True)
class Best:
    """The best value of a metric on validation images; less is better.

    metric: name of the metric.
    value: its value.
    step: the training step of the checkpoint that has it.
    """

    metric: str
    value: float
    step: int


@dataclass(frozen=True)
class Run:
    """A run directory. `status.json` holds its state, identity and error; `run.yaml` its whole recipe.

    path: the folder.
    """

    path: Path

    @property
    def id(self) -> str:
        """The folder's name; of a stage, its place below the owner's."""
        return self.path.name if self.owner is self else f"{self.owner.id}/{STAGES}/{self.path.name}"

    @property
    def owner(self) -> Run:
        """The run that this one is a stage of; the run itself where it is no stage."""
        above = self.path.parent
        return Run(above.parent) if above.name == STAGES and (above.parent / "run.yaml").exists() else self

    @property
    def stages(self) -> list[Run]:
        """The stages in order of training; empty for a run without stages."""
        planned = (self.path / "run.yaml").exists() and (self.path / STAGES).is_dir()
        try:
            return [self.stage(name) for name in self.tree().get(STAGES, ())] if planned else []
        except (DamagedError, UsageError):  # a verb that needs the recipe reads it again, and says so
            return []

    @property
    def serving(self) -> Run:
        """The run whose weights are sampled and scored: the last stage, or the run itself."""
        stages = self.stages  # read from `run.yaml`
        return stages[-1] if stages else self

    @property
    def in_owner(self) -> str:
        """The prefix of this run's keys in the owner's recipe: `stages.prior.`, empty without stages."""
        return "" if self.owner is self else f"{STAGES}.{self.path.name}."

    def stage(self, name: str) -> Run:
        """The stage of this name, which need not exist yet. Raises UsageError for a name that is a path."""
        if not is_name(name):
            hint = "use lower-case letters, digits, `-` and `_`"
            raise UsageError(f"`{name}` cannot be a stage's name", hint=hint)
        return Run(inside(self.path / STAGES / name, self.path))

    @property
    def model(self) -> str:
        """The name of its model; "?" where it is not recorded."""
        return self.status().get("model", "?")

    @property
    def data(self) -> str:
        """The key of its data set; "?" where it is not recorded."""
        return self.status().get("data", "?")

    @property
    def alias(self) -> str | None:
        """Its second name; None where it has none."""
        return self.status().get("alias")

    @property
    def lock(self) -> Path:
        """The file of the lock that its training holds; of a stage that of its owner."""
        return self.owner.path / ".lock"

    @property
    def is_held(self) -> bool:
        """Whether a process starts its training, trains it, or waits for its end."""
        return files.is_locked(self.lock) or files.is_locked(self.owner.path / owned.CLAIM)

    @property
    def state(self) -> str:
        """planned | running | finished | interrupted | failed | diverged | killed.

        A run is `killed` where its status says `running`, but no process holds it, and `running` from when it
        is about to start.
        """
        state = self.status().get("state", "planned")
        if state in ("finished", "damaged"):
            return state
        return "running" if self.is_held else "killed" if state == "running" else state

    @property
    def checkpoints(self) -> list[Path]:
        """The folders of the checkpoints, oldest first; of a run in stages those of all stages."""
        folders = (self.path / "checkpoints").glob("[0-9]*")
        found = sorted(folder for folder in folders if (folder / "ema.safetensors").exists())
        return [path for stage in self.stages for path in stage.checkpoints] or found

    @property
    def has_begun(self) -> bool:
        """Whether any step was trained and recorded: there is a checkpoint, or a line of metrics."""
        parts = [self, *(stage for stage in self.stages if "copy_of" not in stage.status())]
        return any(part.checkpoints or (part.path / "metrics.jsonl").exists() for part in parts)

    @property
    def weights(self) -> Path | None:
        """The file of the weights that are sampled; None where there is none yet.

        That is `model.safetensors` of a finished run, and the newest checkpoint of an unfinished one.
        """
        if stages := self.stages:
            return stages[-1].weights
        whole, checkpoints = self.path / "model.safetensors", self.checkpoints
        if checkpoints and self.state != "finished":
            return checkpoints[-1] / "ema.safetensors"
        return whole if whole.exists() else None

    @property
    def shortfalls(self) -> list[str]:
        """What the run lacks of what its recipe plans, as `60 of 700 steps`; empty for a complete run.

        The run is compared with what was noted at its start (`note_recipe`), so it does not matter whether
        `--steps`, `--minutes` or `--set` cut it short.
        """
        found = []
        for part in self.stages or [self]:
            status = part.status()
            planned, done = (status.get("recipe") or {}).get("steps"), status.get("step", 0)
            if planned and done < planned:
                of_stage = "" if part is self else f" of `{part.path.name}`"
                found.append(f"{done:,} of {planned:,} steps{of_stage}")
        status = self.status()
        size, planned_size = status.get("size"), (status.get("recipe") or {}).get("size")
        if size and planned_size and size != planned_size:
            found.append(f"images of {size} pixels in place of {planned_size}")
        return found

    @property
    def seconds(self) -> float:
        """Seconds of training over all its starts; a start that was killed does not count."""
        status = self.status()
        began, ended = status.get("started"), status.get("ended")
        if began and not ended and self.state == "running":
            ended = time.time()
        return status.get("seconds", 0.0) + (max(0.0, ended - began) if began and ended else 0.0)

    @property
    def work(self) -> float:
        """Seconds of work of its first process's cores over all its starts; a start that was killed does not
        count."""
        return float(self.status().get("work", 0.0))

    @property
    def best(self) -> Best | None:
        """The best validation result; None where nothing was validated."""
        try:
            found = files.read_object(self.path / "checkpoints" / "best.json")
            return Best(str(found["metric"]), float(found["value"]), int(found["step"])) if found else None
        except (DamagedError, KeyError, TypeError, ValueError):  # one is found again at the next validation
            return None

    @property
    def bytes(self) -> int:
        """Size of all its files together, in bytes."""
        return index.survey(self.path)[1]

    def status(self) -> dict[str, Any]:
        """The content of `status.json`; empty where there is none.

        Of a damaged file the state is "damaged", the error says what is wrong, and model and data are read
        off the folder's name.
        """
        if known := index.recall(self.path, "status"):
            return dict(known)
        marks: index.Marks = {"status.json": index.mark(f"{self.path}/status.json")}
        try:
            found = files.read_object(self.path / "status.json")
            if "model" not in found and owned.is_marked(self.path, "run"):
                how = "is damaged" if found else "is missing or empty"
                raise DamagedError(f"`{self.path / 'status.json'}` {how}: it does not say what the run is of")
            if self._checked(found):
                index.keep(self.path, "status", marks, found)
            return found
        except DamagedError as e:
            model, data, *_ = [*self.path.name.split("-"), "?", "?"]
            error = {"kind": e.kind, "message": e.message, "hint": f"gz runs remove {self.path.name}"}
            return {"state": "damaged", "model": model, "data": data, "error": error}

    def _checked(self, status: dict[str, Any]) -> dict[str, Any]:
        """A status whose values are of the types that are relied on. Raises DamagedError."""
        for key, value in status.items():
            if value is not None and not isinstance(value, KINDS.get(key, object)):
                raise DamagedError(f"`{self.path / 'status.json'}` is damaged: `{key}` is {value!r:.40}")
        return status

    def update(self, **changes: Any) -> None:
        """Changes keys of `status.json`."""
        known = self.status()
        if known.get("state") == "damaged":  # a resume repairs what is left
            known = {key: known[key] for key in ("model", "data")} if "model" not in changes else {}
        files.write_json(self.path / "status.json", known | changes)

    def tree(self) -> dict[str, Any]:
        """The resolved recipe of `run.yaml`, which is written so that YAML 1.1 and 1.2 read it alike.

        Raises DamagedError where it is missing, or no recipe.
        """
        import yaml

        path, hint = (
            self.path / "run.yaml",
            f"put a copy back, or `gz runs remove {self.owner.id}`",
        )
        if (text := files.read_text(path)) is None:
            raise DamagedError(f"`{path}` is missing, the recipe of this run", hint=hint)
        try:
            found = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except (yaml.YAMLError, RecursionError, ValueError) as e:
            raise DamagedError(f"`{path}` is damaged: {first_line(e)}", hint=hint) from e
        staged = isinstance(found, dict) and STAGES in found
        parts = found[STAGES] if staged else {"only": found}
        named = isinstance(parts, dict) and all(is_name(str(name)) for name in parts)
        # a stage that is taken from another run is that run's id
        if not named or not all(isinstance(part, str) or _is_recipe(part) for part in parts.values()):
            raise DamagedError(f"`{path}` is damaged: it is no recipe", hint=hint)
        return found


def _is_recipe(tree: Any) -> bool:
    """Whether a tree has what the recipe of a model must have: the model's name, and maps for sections."""
    sections = ("data", "train", "optim", "sample", "ood", "bench", "launch")
    return (
        isinstance(tree, dict)
        and isinstance(tree.get("model"), dict)
        and isinstance(tree["model"].get("name"), str)
        and all(isinstance(tree.get(name) or {}, dict) for name in sections)
    )
