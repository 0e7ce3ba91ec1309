"""The folder of a run as its training starts: recipe, machine, and files of models from outside."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gzcli.core.devices import trains_on_cpu
from gzcli.launch.launcher import Plan
from gzcli.models import catalog
from gzcli.recipe.recipe import Recipe
from gzcli.recipe.yaml import dump
from gzcli.store import files, model_files, runs
from gzcli.store.runs import Run

NOT_TRAINED = (
    "about",
    "bench",
    "launch",
    "ood",
    "params",
)  # keys of a recipe that change nothing of a training


def write_run(target: Run, recipe: Recipe, p: Plan) -> None:
    """Writes `run.yaml`, the whole recipe, and `env.json`, the machine: by these two the run can be repeated.
    Each stage gets a folder of the same form.

    The address at which processes meet belongs to this start and not to the run: `run.yaml` leaves it out,
    and `env.json` has it in the command line.

    p: the processes that are started.
    """
    from importlib.metadata import version

    here = replace(
        recipe.launch.alone(), threads=p.threads, cpu=recipe.launch.cpu or trains_on_cpu(p.gpus, p.processes)
    )
    recipe = recipe.launched(here)
    asked = target.status().get("asked")
    if asked is None or training(target.tree()) != training(recipe.tree()):
        asked = fingerprint(recipe, p)
    files.write_atomic(target.recipe_file, dump(recipe.tree()))
    packages = {name: version(name) for name in ("gzcli", "torch", "torchvision", "accelerate", "numpy")}
    before = files.read_object(target.environment_file)
    env = {
        "packages": packages,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git": git_state(),
        "processes": p.processes,
        "threads": p.threads,
        "gpus": p.gpus,
        "command": [Path(sys.argv[0]).name.replace("__main__.py", "gz"), *sys.argv[1:]],
        "data": before.get("data"),  # a resume compares its data with this record
        "models": before.get("models") or _kept_models(target, recipe),
    }
    files.write_json(target.environment_file, env)
    start = {"state": "planned", "error": None, "code": None}
    target.update(**start, asked=asked)
    for part in recipe.parts if recipe.stages else ():
        stage = target.stage(part.stage)
        stage.path.mkdir(parents=True, exist_ok=True)
        files.write_atomic(stage.recipe_file, dump(part.tree()))
        if stage.status().get("step", 0) < part.train.steps or stage.state != "finished":
            stage.update(model=part.model, data=target.data, **start)
    for name, run in recipe.reused.items():
        if not target.stage(name).status():
            runs.copy_weights(runs.find_stage(run, name), target.stage(name))


def write_train(run: Run, changes: Mapping[str, Any]) -> None:
    """Writes keys of `train` that gz chose into `run.yaml`; of a stage into that of its run too."""
    tree = run.tree()
    files.write_atomic(run.recipe_file, dump(tree | {"train": {**tree["train"], **changes}}))
    if run.owner is not run:
        whole = run.owner.tree()
        stage = whole["stages"][run.path.name]
        stage["train"] = {**stage["train"], **changes}
        files.write_atomic(run.owner.recipe_file, dump(whole))


def halve(run: Run, processes: int) -> str | None:
    """Takes the batch whose first step ran out of a GPU's memory in at least twice as many parts: the global
    batch stays. Returns what was changed, for people; None where nothing can be.

    processes: number of processes that share the batch.
    """
    part = next((part for part in run.stages or [run] if part.status().get("too_large")), None)
    if part is None:
        return None
    train = part.tree()["train"]
    share = train["batch_size"] // processes
    able = (k for k in range(2 * train["accumulate"], share + 1) if share % k == 0)
    if (pieces := next(able, None)) is None:
        return None
    write_train(part, {"accumulate": pieces})
    return f"a batch of {train['batch_size']} does not fit the GPU: {pieces} parts of {share // pieces}"


def fingerprint(recipe: Recipe, p: Plan) -> str:
    """A hash of all that decides on the outcome of a training and on its time, as it was asked for: two runs
    of one fingerprint are trained alike for the same time.

    It is that of a run with `train.minutes` before these become a number of steps.
    """
    asked = f"{training(recipe.tree())} {p.processes} {p.gpus} {p.threads}"
    return hashlib.sha256(asked.encode()).hexdigest()[:16]


def training(tree: Mapping[str, Any]) -> str:
    """What of a recipe's tree changes what is trained, as JSON, in which a tuple and a list are alike."""
    return json.dumps(_training(tree), sort_keys=True)


def _training(tree: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: value for key, value in tree.items() if key not in NOT_TRAINED}
    if "train" in found:
        found["train"] = {key: value for key, value in found["train"].items() if key != "keep"}
    for name, part in found.get("stages", {}).items():
        found["stages"] = found["stages"] | {name: _training(part) if isinstance(part, Mapping) else part}
    return found


def _kept_models(target: Run, recipe: Recipe) -> list[dict[str, str]]:
    """Copies the files of models from outside into the run. Returns their names, places and hashes."""
    cards = {part.model: catalog.card(part.model) for part in recipe.parts}
    return [
        model_files.keep(target.path, card.path) for card in cards.values() if card.family == catalog.OUTSIDE
    ]


def git_state() -> dict[str, Any] | None:
    """Commit of the folder that gz was called in and whether it has changes; None outside a repository."""

    def git(*words: str) -> str | None:
        try:
            out = subprocess.run(["git", *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return out.stdout.strip() if out.returncode == 0 else None

    if (commit := git("rev-parse", "HEAD")) is None:
        return None
    return {"commit": commit, "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
