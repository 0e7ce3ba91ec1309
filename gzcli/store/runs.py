"""Runs: a folder each, named `glow-celeba-20260131-142501-ab12`; found by id, alias, path, or model and data.

A run in stages holds a run for each in `stages/<name>/`, called `vqgan-mnist-…/stages/tokenizer`; verbs talk
to the last. A model's name means its newest finished run that was not cut short: see `choose`.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from gzcli.errors import MissingError, UsageError, canonical, did_you_mean
from gzcli.store import files, owned
from gzcli.store.paths import inside, is_name, recipe_names, spelling, trained_in, user_dir
from gzcli.store.run import STAGES, Run


def create(model: str, data: str, *, alias: str | None = None) -> Run:
    """A new, empty run folder. Raises UsageError where the alias is taken or is the name of a model.

    `order` in its status counts the store's runs: which is the newest does not hang on a clock that may be
    set back.
    """
    model, root = spelling(model), user_dir("runs")
    with files.lock(root / ".lock"):
        runs = all_runs()
        if alias is not None:
            check_alias(alias, runs)
        name = f"{model}-{data}".lower()
        if not is_name(name):
            hint = "use letters, digits, `-` and `_` in names"
            raise UsageError(f"`{name}` cannot be in a run's id", hint=hint)
        path = inside(root / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}", root)
        path.mkdir()
        owned.mark(path, "run")
        run, order = Run(path), 1 + max((_age(run)[0] for run in runs), default=0)
        run.update(state="planned", model=model, data=data, alias=alias, created=time.time(), order=order)
    return run


def check_alias(alias: str, runs: list[Run] | None = None) -> None:
    """Raises UsageError for an alias that a run of these (or of all) has, or that cannot be one."""
    runs = all_runs() if runs is None else runs
    taken = next((run for run in runs if run.alias == alias or run.id == alias), None)
    if taken:
        raise UsageError(f"the name `{alias}` is taken by `{taken.id}`", hint="choose another `--name`")
    if canonical(alias) in map(canonical, recipe_names()):  # or it would hide the model's recipe ever after
        raise UsageError(
            f"the name `{alias}` is that of a model", hint=f"choose another `--name`, as `{alias}-1`"
        )
    if not alias.replace("-", "").replace("_", "").replace(".", "").isalnum() or not alias[0].isalnum():
        message = f"`--name {alias}` may hold letters, digits, `-`, `_` and `.` only, a letter or digit first"
        raise UsageError(message)


def all_runs(*, model: str | None = None, data: str | None = None) -> list[Run]:
    """Every run in the store, newest first."""
    folder = user_dir("runs")
    runs = [Run(path) for path in folder.iterdir() if _is_run(path)] if folder.is_dir() else []
    if model is not None:
        runs = [run for run in runs if canonical(run.model) == canonical(model)]
    if data is not None:
        runs = [run for run in runs if canonical(run.data) == canonical(data)]
    return sorted(runs, key=_age, reverse=True)


def _is_run(folder: Path) -> bool:
    """Whether `status.json` is that of a run: other programs write files of this name too, and so do our
    jobs."""
    status = files.read_json(folder / "status.json") if (folder / "status.json").is_file() else None
    return isinstance(status, dict) and "model" in status


def _age(run: Run) -> tuple[int, float]:
    status = run.status()
    return status.get("order") or 0, status.get(
        "created"
    ) or 0.0  # those of before runs were counted are the oldest


def by_name(ref: str) -> Run | None:
    """The run of that id, alias or path; None where there is none."""
    path = Path(ref).expanduser()
    if _is_run(path):
        return Run(path.resolve())
    ref, below, stage = ref.partition(f"/{STAGES}/")
    runs = all_runs()
    found = next((run for run in runs if ref == run.id), None) or next(
        (run for run in runs if ref == run.alias), None
    )
    if found and below:
        return found.stage(stage) if is_name(stage) and found.stage(stage).status() else None
    return found


def choose(finished: list[Run]) -> Run | None:
    """The run that a model's name means, of its finished runs, newest first: the newest that is as long and
    of the size that its recipe calls done, else the newest; a quick trial does not stand in for the run that
    took a night."""
    return next((run for run in finished if not run.shortfalls), finished[0] if finished else None)


def outdated(keep: int) -> list[Run]:
    """The finished runs that are not among the `keep` newest of their model and data set, nor the best of
    these.

    Whole runs count as newer than those cut short. The best is that of the least figure; figures are compared
    where images have one size and number of grey levels. With `keep` 0 no best one is kept.
    """
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in all_runs():
        if run.state == "finished":
            groups.setdefault((canonical(run.model), canonical(run.data)), []).append(run)
    old = []
    for group in groups.values():
        ranked = sorted(group, key=lambda run: bool(run.shortfalls))  # which leaves the newest first
        kept = [*ranked[:keep], *(_best_of(group) if keep else ())]
        old += [run for run in ranked if run not in kept]
    return old


def _best_of(group: list[Run]) -> list[Run]:
    best: dict[tuple, Run] = {}
    for run in reversed(group):
        figure, status = run.serving.best, run.status()
        if figure:
            key = (figure["metric"], status.get("size"), status.get("levels"))
            if key not in best or figure["value"] <= best[key].serving.best["value"]:
                best[key] = run
    return list(best.values())


def find(ref: str, *, data: str | None = None) -> Run:
    """The run that `ref` means: an id, alias or path; or a model: of its finished runs on `data` (else on any
    set) the one that `choose` takes.

    Raises MissingError with the `gz train` line where a model has none, UsageError where `ref` names nothing.
    """
    if run := by_name(ref):
        if run.state != "finished" and run.weights is None:
            begun = run.state == "running"
            hint = "its first checkpoint is still to come" if begun else f"gz train {ref} --resume"
            raise MissingError(f"`{run.id}` is {run.state} and has no weights yet", hint=hint)
        return run
    model = spelling(ref)
    if model not in recipe_names() and not all_runs(model=model):
        if place := trained_in(ref):
            message = f"`{ref}` is no model of its own, but a stage of others"
            raise UsageError(message, hint=f"gz sample {place[0]}")
        options = [*recipe_names(), *(name for run in all_runs() for name in (run.id, run.alias) if name)]
        raise UsageError(
            f"no model or run is called `{ref}`",
            hint=did_you_mean(ref, options) or "gz list models · gz runs list",
        )
    run = choose([run for run in all_runs(model=model, data=data) if run.state == "finished"])
    if run is None:
        message, on = (f" on `{data}`", f" --data {data}") if data else ("", "")
        raise MissingError(f"no finished run of `{model}`{message}", hint=f"gz train {model}{on}")
    return run


def note_recipe(run: Run, steps: Mapping[str, int | None], own_size: int | None, **facts: int | None) -> None:
    """Notes at a run's start what its recipe calls done: the `steps` of each stage ("" of a run without
    stages), None where it gives a time; the side of the set's own images; and `facts` of the run's: `size`,
    `levels`."""
    for name, count in steps.items():
        part = run.stage(name) if name else run
        part.update(recipe={"steps": count})
    run.update(recipe=(run.status().get("recipe") or {}) | {"size": own_size}, **facts)


def find_stage(ref: str, name: str) -> Run:
    """The run that `ref` means (see `find`) or, of a run in stages, its stage of that name.

    Raises as `find` does, and MissingError where the stage is not finished.
    """
    run = by_name(ref) or find(ref)
    found = next((stage for stage in run.stages if stage.path.name == name), run.serving)
    if not (found.path / "model.safetensors").exists():
        raise MissingError(
            f"`{found.id}` is {found.state} and has no weights yet", hint=f"gz train {run.id} --resume"
        )
    return found


def copy_weights(run: Run, target: Run) -> None:
    """Makes `target` a finished run with the recipe and weights of `run`: all that sampling takes. Linked
    where it can be."""
    with files.new_dir(target.path) as part:
        for name in ("run.yaml", "model.safetensors"):
            try:
                os.link(run.path / name, part / name)
            except OSError:  # another disk, or one without links
                shutil.copyfile(run.path / name, part / name)
        files.write_json(part / "status.json", run.status() | {"state": "finished", "copy_of": run.id})


def remove(run: Run) -> None:
    """Deletes a run of the store. Raises UsageError while it is being trained, and for what lies
    elsewhere."""
    if run.owner is not run:
        raise UsageError(f"`{run.id}` is a stage of a run", hint=f"gz runs remove {run.owner.id}")
    if run.state == "running":
        raise UsageError(
            f"`{run.id}` is being trained by process {run.status().get('pid')}", hint="stop it first"
        )
    owned.remove_run(run.path)


def give_up(run: Run, *, keep: bool) -> bool:
    """After a start that failed: the run is removed again if nothing was trained; True if so.

    With `keep`, after a fault of ours, the folder stays for its `log.txt`, without its alias: nothing takes
    it.
    """
    if run.has_begun or run.state == "running":
        return False
    if keep:
        run.update(state="failed", alias=None)
        return False
    remove(run)
    return True
