"""A run: a folder with its recipe, its state, its checkpoints and weights, and what its figures are."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gzcli.errors import UsageError
from gzcli.store import files
from gzcli.store.paths import inside, is_name

STAGES = "stages"


@dataclass(frozen=True)
class Run:
    """A run directory. `status.json` holds its state, identity and error; `run.yaml` its whole recipe."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.name if self.owner is self else f"{self.owner.id}/{STAGES}/{self.path.name}"

    @property
    def owner(self) -> Run:
        """The run that this one is a stage of; itself where it is none."""
        above = self.path.parent
        return Run(above.parent) if above.name == STAGES and (above.parent / "run.yaml").exists() else self

    @property
    def stages(self) -> list[Run]:
        """Its stages in order; [] where it is trained at once."""
        planned = (self.path / "run.yaml").exists() and (self.path / STAGES).is_dir()
        return [self.stage(name) for name in self.tree().get(STAGES, ())] if planned else []

    @property
    def serving(self) -> Run:
        """The run whose weights the verbs use: the last stage, or itself."""
        stages = self.stages  # read from `run.yaml`
        return stages[-1] if stages else self

    @property
    def in_owner(self) -> str:
        """What comes before its keys in the owner's recipe: `stages.prior.`, or nothing."""
        return "" if self.owner is self else f"{STAGES}.{self.path.name}."

    def stage(self, name: str) -> Run:
        """Its stage of this name, made yet or not. Raises UsageError for a name that leads out of the run."""
        if not is_name(name):
            hint = "use lower-case letters, digits, `-` and `_`"
            raise UsageError(f"`{name}` cannot be a stage's name", hint=hint)
        return Run(inside(self.path / STAGES / name, self.path))

    @property
    def model(self) -> str:
        return self.status().get("model", "?")

    @property
    def data(self) -> str:
        return self.status().get("data", "?")

    @property
    def alias(self) -> str | None:
        return self.status().get("alias")

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    @property
    def state(self) -> str:
        """planned | running | finished | interrupted | failed | diverged, or `killed`: nobody runs it, though
        it says so."""
        state = self.status().get("state", "planned")
        return "killed" if state == "running" and not files.is_locked(self.owner.lock) else state

    @property
    def checkpoints(self) -> list[Path]:
        """The folders of its checkpoints, oldest first; of a run in stages those of all stages."""
        folders = (self.path / "checkpoints").glob("[0-9]*")
        found = sorted(folder for folder in folders if (folder / "ema.safetensors").exists())
        return [path for stage in self.stages for path in stage.checkpoints] or found

    @property
    def has_begun(self) -> bool:
        """Whether anything was trained: there is a checkpoint, or a line of losses."""
        parts = [self, *(stage for stage in self.stages if "copy_of" not in stage.status())]
        return any(part.checkpoints or (part.path / "metrics.jsonl").exists() for part in parts)

    @property
    def weights(self) -> Path | None:
        """What is sampled: its `model.safetensors`, while it is unfinished its newest checkpoint; None
        without."""
        if stages := self.stages:
            return stages[-1].weights
        whole, checkpoints = self.path / "model.safetensors", self.checkpoints
        if checkpoints and self.state != "finished":
            return checkpoints[-1] / "ema.safetensors"
        return whole if whole.exists() else None

    @property
    def shortfalls(self) -> list[str]:
        """In what it is less than its recipe calls done, in words: `60 of 700 steps`. Held against what was
        noted at its start (`note_recipe`), so that `--steps`, `--minutes` and `--set` count alike; [] where
        nothing was noted."""
        found, own = [], self.status().get("recipe") or {}
        for part in self.stages or [self]:
            status = part.status()
            whole, done = (status.get("recipe") or {}).get("steps"), status.get("step", 0)
            if whole and done < whole:
                of_stage = "" if part is self else f" of `{part.path.name}`"
                found.append(f"{done:,} of {whole:,} steps{of_stage}")
        size = self.status().get("size")
        if size and own.get("size") and size != own["size"]:
            found.append(f"images of {size} pixels in place of {own['size']}")
        return found

    @property
    def seconds(self) -> float:
        """How long it has been trained, in all its sittings; one that was killed does not count."""
        status = self.status()
        began, ended = status.get("started"), status.get("ended")
        if began and not ended and self.state == "running":
            ended = time.time()
        return status.get("seconds", 0.0) + (max(0.0, ended - began) if began and ended else 0.0)

    @property
    def best(self) -> dict[str, Any] | None:
        """Its best figure on validation images: {metric, value, step}; less is better. None where none was
        taken."""
        return files.read_json(self.path / "checkpoints" / "best.json")

    @property
    def bytes(self) -> int:
        """Of all its files."""
        return sum(file.lstat().st_size for file in self.path.rglob("*") if file.is_file())

    def status(self) -> dict[str, Any]:
        return files.read_json(self.path / "status.json") or {}

    def update(self, **changes: Any) -> None:
        """Changes keys of `status.json`."""
        files.write_json(self.path / "status.json", self.status() | changes)

    def tree(self) -> dict[str, Any]:
        """The resolved recipe of `run.yaml`, which is written so that every YAML reader understands it
        alike."""
        import yaml

        return yaml.load((self.path / "run.yaml").read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
