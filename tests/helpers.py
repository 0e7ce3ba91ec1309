"""Runs of the trainer and of the command line, for tests."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from gzcli.engine.log import Log
from gzcli.engine.trainer import Trainer
from gzcli.store import runs
from gzcli.store.runs import Run

NO_PAUSES = ("train.sample_every=0", "train.eval_every=0", "train.best=none")
QUICK = (*NO_PAUSES, "train.log_every=1", "train.samples=2")
ROOT = Path(__file__).resolve().parents[1]
# what a user's own script may be called
TRAPS = ("random", "queue", "torch", "numpy", "yaml", "signal", "accelerate")


def traps() -> Path:
    """A folder with files of these names, which end the process that runs one of them."""
    folder = Path(os.environ["GZ_HOME"]).parent / "traps"
    folder.mkdir(exist_ok=True)
    for name in TRAPS:
        (folder / f"{name}.py").write_text("import os\nos._exit(99)\n")
    return folder


def recipe(case: Any, *, steps: int, data: str | None = None, sets: tuple[str, ...] = ()) -> dict[str, Any]:
    """The resolved recipe of a zoo line, quick and quiet, with the data's facts filled in."""
    from gzcli.launch.plan import with_data
    from gzcli.recipe.recipe import recipe_of
    from gzcli.recipe.resolve import resolve

    base = resolve(case.model, data=data or case.data, sets=(*QUICK, *sets), flags={"train.steps": steps})
    tree = base.parts[0].tree()  # of a recipe in stages the first stage by itself
    tree["model"] |= {k: list(v) if isinstance(v, tuple) else v for k, v in case.settings.items()}
    tree["sample"] |= case.sample
    tree["train"] |= {"batch_size": case.batch, "precision": "fp32"}
    tree["optim"]["lr"] = case.lr
    tree["launch"]["cpu"] = True
    if case.levels:
        tree["data"]["levels"] = case.levels
    return with_data(recipe_of(tree), base.dataset).tree()


def trainer(tree: dict[str, Any], run: Run | None = None) -> Trainer:
    """A trainer in this process."""
    from gzcli.core.sections import part_of
    from gzcli.data.packs.open import open_pack, pack_options
    from gzcli.engine.step import accelerate
    from gzcli.recipe.recipe import write_recipe

    if run is None:
        run = runs.create(tree["model"]["name"], tree["data"]["name"])
        write_recipe(run, tree)
    part = part_of(tree)
    pack = open_pack(part.data.name, **pack_options(part.data))
    return Trainer(run, part, pack, accelerate(part), Log(run.path, rank=int(os.environ.get("RANK", "0"))))


def fit(tree: dict[str, Any], run: Run | None = None) -> Trainer:
    """A trainer that has trained."""
    made = trainer(tree, run)
    made.fit()
    return made


def gz(
    *words: str, code: int = 0, env: dict[str, str] | None = None, timeout: float = 240
) -> subprocess.CompletedProcess:
    """Runs `gz` as a user does, in a folder of traps, and checks its exit code."""
    how = {"capture_output": True, "text": True, "timeout": timeout, "cwd": traps()}
    how["env"] = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    done = subprocess.run([sys.executable, "-m", "gzcli", *words], **how)
    assert done.returncode == code, f"gz {' '.join(words)} → {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def spawn(*words: str, inside: Sequence[str] = ()) -> subprocess.Popen:
    """Starts `gz` as a user does, in a folder of traps; `inside`: a command that it is started by."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*inside, sys.executable, "-m", "gzcli", *words], cwd=traps(), env=env, **pipes)


def run_at(step: int, alias: str | None = None, patience: float = 240) -> Run:
    """The run, by its second name or the newest, once it has so many lines of metrics."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        run = runs.by_name(alias) if alias else next(iter(runs.all_runs()), None)
        if run and run.metrics_file.exists() and len(run.metrics_file.read_text().splitlines()) >= step:
            return run
        time.sleep(0.05)
    raise AssertionError("the run does not get on")


def in_process(folder: Path, plan: Any, *, launcher: bool, mode: str = "human") -> dict[str, Any]:
    """In place of `launch.run`: the engine in this process."""
    from gzcli.launch.launcher import outcome

    return outcome(Run(folder), engine(folder), [])


def engine(folder: Path) -> int:
    """The exit code of the engine in this process. As in its own, model files from the command line are
    unknown."""
    from gzcli.engine.__main__ import main
    from gzcli.store import model_files

    with patch.dict(model_files._typed, clear=True):
        return main(folder)


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def figures(run: Run) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` without what depends on the machine."""
    from gzcli.engine.pictures import RATE_KEYS

    return [{k: v for k, v in x.items() if k not in RATE_KEYS} for x in lines(run.path / "metrics.jsonl")]


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two files of weights hold the same bits."""
    return a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)
