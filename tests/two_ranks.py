"""Two processes against one.

Started by tests, it trains runs one after another in float64, in one process or several that it forks, and
tells of each its losses, its figures of validation and the rank gap. A run that comes again has lost its last
checkpoint, and goes on.

    python tests/two_ranks.py --all [--steps 30] [--batch 8] [--fp32] [MODEL[,KEY=VALUE…] …]

measures instead: it trains every recipe, or those that are named, on its embedded set, all stages, by one
process and by two, and prints how far the weights are apart, a line a stage.
"""

import argparse
import gc
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from forks import forked
from helpers import QUICK, lines, recipe, trainer
from safetensors.torch import load_file

from gzcli.core import ranks
from gzcli.engine import trainer as train_loop
from gzcli.engine import validate
from gzcli.engine.trainer import Trainer
from gzcli.launch import launcher
from gzcli.launch.plan import with_data, write_run
from gzcli.models import catalog
from gzcli.recipe.resolve import resolve
from gzcli.recipe.yaml import dump
from gzcli.store import files, runs
from gzcli.store.paths import recipe_names
from gzcli.store.runs import Run


def trained(run: Run) -> Trainer:
    """Trains a run, and writes its `out.json`."""
    t = trainer(run.tree(), run)
    t.fit()
    gap = 0.0
    for value in map(ranks.whole, t.model.state_dict().values()) if t.world > 1 else ():
        if isinstance(value, torch.Tensor):
            low, high = value.double(), value.double().clone()
            torch.distributed.all_reduce(low, torch.distributed.ReduceOp.MIN)
            torch.distributed.all_reduce(high, torch.distributed.ReduceOp.MAX)
            gap = max(gap, float((high - low).abs().max()))
    if t.rank == 0:
        shown = lines(run.path / "metrics.jsonl")
        of_training = ({k: v for k, v in x.items() if k.endswith("loss") and k != "val_loss"} for x in shown)
        losses = [row for row in of_training if row]
        held_out = [v for x in shown for k, v in x.items() if k.startswith("val_")]
        (run.path / "out.json").write_text(json.dumps({"gap": gap, "losses": losses, "held_out": held_out}))
        run.update(state="finished")
    return t


def work(folders: list[str]) -> None:
    """Trains the runs, or the stages of a run, in these folders."""
    validate.MAX_VALIDATION_IMAGES, validate.EVAL_BATCH = (
        30,
        10,
    )  # three batches: two ranks have unequal shares
    vars(train_loop)["loss_curve"] = lambda path: None  # drawing takes longer than many of these trainings
    for i, folder in enumerate(folders):
        if folder in folders[:i] and ranks.rank() == 0:
            (Path(folder) / "model.safetensors").rename(Path(folder) / "first.safetensors")
            shutil.rmtree(max((Path(folder) / "checkpoints").glob("0*")))
        ranks.wait()
        for run in Run(Path(folder)).stages or [Run(Path(folder))]:
            accelerator = trained(run).accelerator
            accelerator.free_memory()
            gc.freeze()  # what it has left is not looked through again
            ranks.wait()
    accelerator.wait_for_everyone()
    accelerator.end_training()


def train(by_world: dict[str, list[str]], *, fp32: bool = False) -> None:
    """Trains the runs in these folders, by the number of processes that each has."""
    torch.set_num_threads(1)
    folders = {Path(folder) for of_world in by_world.values() for folder in of_world}
    for model in {run.tree()["model"]["name"] for f in folders for run in Run(f).stages or [Run(f)]}:
        catalog.load(model)
    gc.freeze()  # after each run accelerate collects garbage, of which what is imported here is none
    if not fp32:
        torch.set_default_dtype(torch.float64)
    for world, of_world in by_world.items():
        ended = forked(int(world), partial(work, of_world))
        assert ended == [0] * int(world), f"the processes ended with {ended}"


def folders_of(planned: dict[int, list[Run]]) -> dict[str, list[str]]:
    """What `train` takes, and JSON holds."""
    return {str(world): [str(run.path) for run in of_world] for world, of_world in planned.items()}


def launched(planned: dict[int, list[Run]], *, fp32: bool = False, said: int | None = None) -> None:
    """Trains runs, by the number of gloo processes; `said` is where they write, as `subprocess` has it."""
    here = Path(__file__).resolve()
    common = {"PYTHONPATH": os.pathsep.join(map(str, here.parents[:2])), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(here), "--train", json.dumps(folders_of(planned)), *["--fp32"][: int(fp32)]]
    subprocess.run(words, env={**os.environ, **common}, stderr=said, timeout=7200, check=True)


def planned(what: str, steps: int, batch: int) -> Run:
    """A run of a recipe as it is shipped, on its embedded set, but for the length and the batch; what tunes a
    pipeline tunes a tiny one. `what` is the recipe's name, and after commas what else is set."""
    from zoo import FIRST

    name, *more = what.split(",")
    sets = (*QUICK, f"train.batch_size={batch}", *more)
    flags = {"train.steps": steps, "train.precision": "fp32", "launch.cpu": True}
    source = resolve(name, sets=sets, flags=flags)
    run = runs.create(name, source.data.name)
    if source.card.family == "stable_diffusion":
        case = FIRST[source.card.name]
        tree = recipe(case, steps=steps, sets=(*sets, "data.size=16"))
        files.write_atomic(run.path / "run.yaml", dump(tree))
    else:
        made = with_data(source, source.dataset)
        write_run(run, made, launcher.plan(made.launch, every_gpu=True))
    return run


def apart(one: Run, two: Run) -> Iterator[dict[str, Any]]:
    """How far two trainings of one recipe are apart, of each stage: the largest difference of a weight or
    buffer and where it is, and the largest relative one of a loss, at the first step and at any."""
    for a, b in zip(one.stages or [one], two.stages or [two], strict=True):
        ours, theirs = (load_file(run.checkpoints[-1] / "model.safetensors") for run in (a, b))
        assert ours.keys() == theirs.keys()
        moved = {k: (v.double() - theirs[k].double()).abs() for k, v in ours.items() if v.numel()}
        by_name = {k: float(v.max()) for k, v in moved.items()}
        where = max(by_name, key=by_name.__getitem__)
        losses, gap = zip(*((x["losses"], x["gap"]) for x in map(out_of, (a, b))), strict=True)
        far = lambda x, y: abs(x - y) / max(1e-12, abs(x), abs(y))  # noqa: E731
        of_steps = [max(far(p[k], q[k]) for k in p) for p, q in zip(*losses, strict=True)]
        row = {"stage": "" if a is one else a.path.name, "weights": by_name[where], "where": where}
        yield row | {"first": of_steps[0], "losses": max(of_steps), "gap": max(gap)}


def out_of(run: Run) -> dict[str, Any]:
    """What `trained` wrote of a run."""
    return json.loads((run.path / "out.json").read_text())


def pairs(names: Iterable[str], *, steps: int, batch: int, **how: Any) -> dict[str, tuple[Run, Run]]:
    """Trains recipes, named as `planned` takes them, by one process and by two; returns both runs of each."""
    by_name = {name: (planned(name, steps, batch), planned(name, steps, batch)) for name in names}
    launched({world: [pair[world - 1] for pair in by_name.values()] for world in (1, 2)}, **how)
    return by_name


def measure(names: list[str], steps: int, batch: int, fp32: bool) -> None:
    """Prints the table of one process against two."""
    by_name = pairs(names, steps=steps, batch=batch, fp32=fp32, said=subprocess.DEVNULL)
    print(f"{'model':28} {'stage':12} {'weights':>8} {'1st loss':>8} {'losses':>8} {'ranks':>8}  where")
    for name, (one, two) in by_name.items():
        for row in apart(one, two):
            figures = " ".join(f"{row[key]:8.1e}" for key in ("weights", "first", "losses", "gap"))
            print(f"{name:28} {row['stage']:12} {figures}  {row['where']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--fp32", action="store_true")
    parser.add_argument("--train", type=json.loads)
    parser.add_argument("what", nargs="*")
    args = parser.parse_args()
    if args.all:
        with tempfile.TemporaryDirectory() as home:
            os.environ |= {"GZ_HOME": home, "GZ_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "GZ_TRIAL": "0"}
            measure(args.what or recipe_names(), args.steps, args.batch, args.fp32)
        return
    for name in ("torch._dynamo", "torch.distributed.tensor", "accelerate"):
        importlib.import_module(name)
    train(args.train, fp32=args.fp32)


if __name__ == "__main__":
    main()
