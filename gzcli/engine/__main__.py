"""`python -m gzcli.engine FOLDER`: trains the run, or does the job, that the folder describes.

A folder with `job.json` is a job of `gz sample`, `gz ood` or `gz bench`, which writes `result.json`; one with
`run.yaml` is a run to be trained. Either way `status.json` tells how it ended, for whoever started it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from gzcli import jobs, ranks
from gzcli.engine import stop
from gzcli.engine.log import Log
from gzcli.errors import DeviceError, DivergedError, GzError, Interrupted, UsageError
from gzcli.store import files
from gzcli.store.runs import Run

STATES = {DivergedError: "diverged", Interrupted: "interrupted"}


def main(folder: Path) -> int:
    run = Run(folder.absolute())
    rank = int(os.environ.get("RANK", "0"))
    # All ranks stop alike for these two, and the `gz` that started us reads them in `status.json`: a code
    # would only make the launcher print its own traceback.
    told = "GZ_PARENT" in os.environ
    log = Log(run.path, rank=rank)
    with files.lock(run.lock, wait=False) if rank == 0 else contextlib.nullcontext(True) as got:
        if not got:
            raise SystemExit(f"`{run.id}` is in use by process {run.status().get('pid')}")
        try:
            with recorded(run, log):
                job = jobs.read(run.path)
                train(run, log) if job is None else work(run, job, log)
        except BaseException as e:
            if os.environ.get("GZ_DEBUG"):
                traceback.print_exc()
            return 0 if told and type(explain(e)) in STATES else explain(e).code
        finally:
            (run.path / "stop").unlink(missing_ok=True)
    return 0


@contextlib.contextmanager
def recorded(run: Run, log: Log) -> Iterator[None]:
    """`status.json` tells that the block runs, then how it ended."""
    if log.main:
        now = {"started": time.time(), "ended": None, "seconds": run.seconds}  # those of earlier sittings
        parent = int(os.environ.get("GZ_PARENT", "0"))
        run.update(state="running", pid=os.getpid(), parent=parent, **now, error=None, code=None)
    try:
        yield
    except BaseException as e:
        error = explain(e)
        log._record(traceback.format_exc())
        if not log.main and run.status().get("error"):
            raise  # the first word stands: what follows from it, as a partner that is gone, says less
        run.update(
            state=STATES.get(type(error), "failed"),
            code=error.code,
            ended=time.time(),
            error={"kind": error.kind, "message": error.message, "hint": error.hint},
        )
        raise
    if log.main:
        run.update(state="finished", code=0, ended=time.time())


def explain(e: BaseException) -> GzError:
    """The error as it is told to a person."""
    if isinstance(e, GzError):
        return e
    if isinstance(e, KeyboardInterrupt):
        return Interrupted("interrupted", signum=2)
    if isinstance(e, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(e):
        return DeviceError(
            "out of memory",
            hint="lower `train.batch_size`, or raise `train.accumulate`: the result is the same",
        )
    return GzError(
        f"{type(e).__name__}: {e}", hint="the traceback is in the run's `log.txt`; `GZ_DEBUG=1` shows it"
    )


def train(run: Run, log: Log) -> None:
    """Trains the run of `run.yaml`, or each of its stages that is not finished, in the processes that
    accelerate started."""
    stop.listen()
    accelerator = None
    for stage in run.stages:
        if stage.state == "finished":
            log.info(f"stage `{stage.path.name}` is finished")
            continue
        part = Log(stage.path, rank=log.rank, stage=stage.path.name)
        part.info(f"stage `{stage.path.name}`")
        with recorded(stage, part):
            accelerator = train_one(stage, part)
    if not run.stages:
        accelerator = train_one(run, log)
    log.event(
        "done", run=run.id, path=str(run.path), step=run.serving.tree()["train"]["steps"], **made(run.serving)
    )
    if accelerator is not None:
        accelerator.wait_for_everyone()  # gloo aborts a rank whose partner has gone before it
        accelerator.end_training()


def made(run: Run) -> dict[str, Any]:
    """What came out of a finished run: its last picture, its last validation and its best one, as far as
    there are any.
    """
    from gzcli.engine.report import metric_lines

    pictures = sorted((run.path / "samples").glob("*.png"))
    figures = [{k: v for k, v in line.items() if k.startswith("val_")} for line in metric_lines(run.path)]
    return {
        "picture": str(pictures[-1]) if pictures else None,
        "figures": next(filter(None, reversed(figures)), None),
        "best": files.read_json(run.path / "checkpoints" / "best.json"),
    }


def train_one(run: Run, log: Log) -> Any:
    """Trains one model, from its newest checkpoint if it has one. Returns its Accelerator."""
    from gzcli.data import same
    from gzcli.data.open import open_named
    from gzcli.engine.state import write_train
    from gzcli.engine.trainer import Trainer

    began, tree = time.time(), run.tree()
    prepare_torch(tree)
    accelerator = accelerate(tree)
    data = tree["data"]
    pack = open_named(data["name"], size=data["size"], channels=data["channels"], say=log.info)
    same.hold(run.owner.path, pack.meta)
    if accelerator.is_main_process:
        same.remember(run.owner.path, pack.meta)
    if tree["train"]["minutes"] and not (run.path / "checkpoints").exists():
        steps = Trainer(run, tree, pack, accelerator, log).count_steps(tree["train"]["minutes"], began)
        found = {"steps": ranks.agree(steps), "minutes": None}
        tree["train"] = tree["train"] | found
        if accelerator.is_main_process:
            write_train(run, found)
        accelerator.wait_for_everyone()
        log.info(f"{tree['train']['steps']} steps fit in the time")
    trainer = Trainer(run, tree, pack, accelerator, log)
    if accelerator.is_main_process:
        run.update(steps=trainer.steps, params=sum(p.numel() for p in trainer.model.parameters()))
    trainer.fit()
    accelerator.free_memory()
    return accelerator


def accelerate(tree: dict[str, Any]) -> Any:
    """The Accelerator of a recipe. A phase leaves the other phases' parameters without gradient, which DDP
    must expect; buffers are equal on all ranks by the models' own means, not sent about at every forward. A
    later stage may have another precision than the one before."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs

    AcceleratorState._reset_state()
    several = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    return Accelerator(
        mixed_precision=precision(tree), cpu=bool(tree["launch"]["cpu"]), kwargs_handlers=[several]
    )


def work(run: Run, job: jobs.Job, log: Log) -> None:
    """Does a job and writes its `result.json`."""
    from accelerate import PartialState

    from gzcli.engine.trained import pick_device

    state = None
    if (
        "RANK" in os.environ
    ):  # rank 0 alone judges what all have made, longer than NCCL's ten minutes if need be
        state = PartialState(cpu=job.launch.cpu, timeout=timedelta(hours=2))
    device = state.device if state else pick_device(job.launch)
    if job.launch.threads:
        torch.set_num_threads(job.launch.threads)
    verb = importlib.import_module(f"gzcli.engine.{job.verb}")
    result = verb.run(job, run.path, device, log)
    if state is None or state.is_main_process:
        files.write_json(run.path / "result.json", result)
    if state:
        state.wait_for_everyone()
        state.destroy_process_group()


def prepare_torch(tree: dict[str, Any]) -> None:
    """Threads as recorded, so that a resume computes the same; deterministic kernels if asked; TF32
    otherwise."""
    if threads := tree["launch"]["threads"]:
        torch.set_num_threads(threads)
    if tree["train"]["deterministic"]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    else:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True


def precision(tree: dict[str, Any]) -> str:
    """accelerate's name of the training precision; auto is bf16 where the device gains from it."""
    asked = tree["train"]["precision"]
    gpu = torch.cuda.is_available() and not tree["launch"]["cpu"]
    if asked == "fp16" and not gpu:
        raise UsageError(
            "`train.precision: fp16` needs a GPU", hint="`bf16` works on many CPUs, `fp32` on all"
        )
    if asked != "auto":
        return "no" if asked == "fp32" else asked
    if gpu:
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if torch.backends.mps.is_available() and not tree["launch"]["cpu"]:
        return "no"
    # a torch without oneDNN, as on Macs, does not know the operator
    fast = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16" if fast else "no"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
