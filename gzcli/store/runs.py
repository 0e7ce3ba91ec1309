"""Runs: a folder each, named `glow-celeba-20260131-142501-ab12`; found by id, alias, path, or model and data.

A run in stages holds a run for each in `stages/<name>/`, called `vqgan-mnist-…/stages/tokenizer`; verbs talk to the last.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gzcli.errors import MissingError, UsageError, canonical, did_you_mean
from gzcli.store import files
from gzcli.store.paths import recipe_names, user_dir

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
        return Run(self.path.parent.parent) if self.path.parent.name == STAGES else self

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
        return Run(self.path / STAGES / name)

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
        """planned | running | finished | interrupted | failed | diverged, or `killed`: running by name, but nobody runs it."""
        state = self.status().get("state", "planned")
        return "killed" if state == "running" and not files.is_locked(self.owner.lock) else state

    def status(self) -> dict[str, Any]:
        return files.read_json(self.path / "status.json") or {}

    def update(self, **changes: Any) -> None:
        """Changes keys of `status.json`."""
        files.write_json(self.path / "status.json", self.status() | changes)

    def tree(self) -> dict[str, Any]:
        """The resolved recipe of `run.yaml`, which is written so that every YAML reader understands it alike."""
        import yaml

        return yaml.load((self.path / "run.yaml").read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def create(model: str, data: str, *, alias: str | None = None) -> Run:
    """A new, empty run folder. Raises UsageError where the alias is taken or is the name of a model."""
    if alias is not None:
        taken = next((run for run in all_runs() if run.alias == alias or run.id == alias), None)
        if taken:
            raise UsageError(f"the name `{alias}` is taken by `{taken.id}`", hint="choose another `--name`")
        if canonical(alias) in map(canonical, recipe_names()):  # or it would hide the model's recipe ever after
            raise UsageError(f"the name `{alias}` is that of a model", hint=f"choose another `--name`, as `{alias}-1`")
        if not alias.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise UsageError(f"`--name {alias}` may hold letters, digits, `-`, `_` and `.` only")
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = user_dir("runs") / f"{model}-{data}-{stamp}-{secrets.token_hex(2)}"
    path.mkdir(parents=True)
    run = Run(path)
    run.update(state="planned", model=model, data=data, alias=alias, created=time.time())
    return run


def all_runs(*, model: str | None = None, data: str | None = None) -> list[Run]:
    """Every run in the store, newest first."""
    folder = user_dir("runs")
    runs = [Run(path) for path in folder.iterdir() if (path / "status.json").exists()] if folder.is_dir() else []
    if model is not None:
        runs = [run for run in runs if canonical(run.model) == canonical(model)]
    if data is not None:
        runs = [run for run in runs if canonical(run.data) == canonical(data)]
    return sorted(runs, key=lambda run: run.status().get("created", 0), reverse=True)


def by_name(ref: str) -> Run | None:
    """The run of that id, alias or path; None where there is none."""
    path = Path(ref).expanduser()
    if (path / "status.json").exists():
        return Run(path.resolve())
    ref, inside, stage = ref.partition(f"/{STAGES}/")
    runs = all_runs()
    found = next((run for run in runs if ref == run.id), None) or next((run for run in runs if ref == run.alias), None)
    if found and inside:
        return found.stage(stage) if found.stage(stage).status() else None
    return found


def find(ref: str, *, data: str | None = None) -> Run:
    """The run that `ref` means: an id, alias or path; or a model: its newest finished run on `data` (else on any set).

    Raises MissingError with the `gz train` line where a model has none, UsageError where `ref` names nothing.
    """
    if run := by_name(ref):
        if run.state != "finished" and not (run.serving.path / "model.safetensors").exists():
            raise MissingError(f"`{run.id}` is {run.state} and has no weights yet", hint=f"gz train {ref} --resume")
        return run
    name = canonical(ref)
    models = {canonical(model): model for model in recipe_names()}
    if name not in models:
        options = [*models.values(), *(run.id for run in all_runs()), *(run.alias for run in all_runs() if run.alias)]
        raise UsageError(f"no model or run is called `{ref}`", hint=did_you_mean(ref, options) or "gz list models · gz runs list")
    runs = [run for run in all_runs(model=name, data=data) if run.state == "finished"]
    if not runs:
        on = f" --data {data}" if data else ""
        raise MissingError(
            f"no finished run of `{models[name]}`" + (f" on `{data}`" if data else ""), hint=f"gz train {models[name]}{on}"
        )
    return runs[0]


def find_stage(ref: str, name: str) -> Run:
    """The run that `ref` means (see `find`) or, of a run in stages, its stage of that name.

    Raises as `find` does, and MissingError where the stage is not finished.
    """
    run = by_name(ref) or find(ref)
    found = next((stage for stage in run.stages if stage.path.name == name), run.serving)
    if not (found.path / "model.safetensors").exists():
        raise MissingError(f"`{found.id}` is {found.state} and has no weights yet", hint=f"gz train {run.id} --resume")
    return found


def copy_weights(run: Run, target: Run) -> None:
    """Makes `target` a finished run with the recipe and weights of `run`: all that sampling takes. Linked where it can be."""
    with files.new_dir(target.path) as part:
        for name in ("run.yaml", "model.safetensors"):
            try:
                os.link(run.path / name, part / name)
            except OSError:  # another disk, or one without links
                shutil.copyfile(run.path / name, part / name)
        files.write_json(part / "status.json", run.status() | {"state": "finished", "copy_of": run.id})


def remove(run: Run) -> None:
    """Deletes a run. Raises UsageError while it is being trained."""
    if run.state == "running":
        raise UsageError(f"`{run.id}` is being trained by process {run.status().get('pid')}", hint="stop it first")
    shutil.rmtree(run.path)
