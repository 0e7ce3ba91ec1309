"""`python -m gzcli.engine FOLDER`: trains the run, or does the job, that the folder describes.

A folder with `job.json` is a job of `gz sample`, `gz ood`, `gz bench` or `gz runs`, which writes
`result.json`. One with `run.yaml` is a run to be trained. `status.json` then records how it ended.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from gzcli.core import devices, errors, ranks, streams
from gzcli.core.hints import advice, gz
from gzcli.core.sections import part_of
from gzcli.core.units import duration
from gzcli.data.packs.open import open_pack, pack_options
from gzcli.data.packs.pack import check_unchanged, record_data
from gzcli.engine.cadence import MIN_TRAINING_SHARE, PAUSE_KEYS, RESERVE_SHARE, count_steps
from gzcli.engine.forecast import check_stages
from gzcli.engine.log import Log
from gzcli.engine.step import accelerate, compiles, prepare_torch
from gzcli.engine.trainer import Trainer
from gzcli.recipe.recipe import write_chosen
from gzcli.store import claims, files, jobs, model_files, png
from gzcli.store.metrics import metric_lines
from gzcli.store.runs import Run

if TYPE_CHECKING:
    from accelerate import Accelerator

JOB_MODULES = {  # verb of a job → the module whose `run` does it
    "sample": "judge.sample",
    "ood": "judge.ood",
    "alarm": "judge.alarm",
    "inspect": "judge.inspection",
    "portable": "export.alarm",
    "bench": "judge.bench",
    "audit": "judge.audit",
    "export": "export.export",
    "published": "export.published",
    "ema": "engine.averages",
    "trial": "engine.forecast",
}
STATES = {errors.DivergedError: "diverged", errors.Interrupted: "interrupted"}


def main(folder: Path) -> int:
    """Trains the run, or does the job, in a folder. Returns the exit code."""
    run = Run(folder.absolute())
    rank = int(os.environ.get("RANK", "0"))
    # All ranks stop alike for the errors of STATES, and the `gz` that started this process reads them in
    # `status.json`: an exit code would only make the launcher print its own traceback.
    started_by_gz = "GZ_PARENT" in os.environ
    log = Log(run.path, rank=rank)
    with files.lock(run.lock, wait=False) if rank == 0 else contextlib.nullcontext(True) as locked:
        if not locked:  # the status is that of the other process, and stays
            print(streams.printable(claims.in_use(run).message), file=sys.stderr)
            return errors.UsageError.code
        if rank == 0:
            claims.tidy(run)
        try:
            with record_status(run, log):
                devices.check_planned()
                model_files.add_copies(run.path)
                job = jobs.read(run.path)
                train(run, log) if job is None else work(run, job, log)
        except BaseException as e:
            if os.environ.get("GZ_DEBUG"):
                traceback.print_exc()
            error = explain(e)
            return 0 if started_by_gz and isinstance(error, tuple(STATES)) else error.code
        finally:
            run.stop_file.unlink(missing_ok=True)
    return 0


@contextlib.contextmanager
def record_status(run: Run, log: Log) -> Iterator[None]:
    """Records in `status.json` that the block is running, then how it ended."""
    before, since = run.status().get("work", 0.0), time.process_time()

    def ended() -> dict[str, float]:
        return {"ended": time.time(), "work": before + time.process_time() - since}

    if log.main:
        seconds = run.seconds_at(None)  # of earlier starts
        parent = int(os.environ.get("GZ_PARENT", "0"))
        nothing = dict.fromkeys(("saved_at", "ended", "error", "code", "lost", "too_large"))
        now = {"pid": os.getpid(), "parent": parent, "started": time.time(), "stepping": False}
        run.update(state="running", **now, **nothing, seconds=seconds, work=before, work_from=since)
    try:
        yield
    except BaseException as e:
        with contextlib.suppress(errors.DamagedError):  # `log.txt` itself may be the problem
            log.record(traceback.format_exc())
        if not log.main and run.status().get("error"):
            raise  # keep the first error: this one may only report that another rank is gone
        error = explain(e)
        state = next((state for kind, state in STATES.items() if isinstance(error, kind)), "failed")
        run.update(state=state, code=error.code, error=error.record, **ended())
        raise
    if log.main:
        run.update(state="finished", code=0, error=None, **ended())


def explain(e: BaseException) -> errors.GzError:
    """The error that the user sees for an exception."""
    if isinstance(e, errors.GzError):
        return e
    if isinstance(e, KeyboardInterrupt):
        return errors.Interrupted("interrupted", signum=2)
    if devices.is_out_of_memory(e):
        hint = "lower `train.batch_size`, or raise `train.accumulate`, which does not change the result"
        return errors.DeviceError("out of memory", hint=hint)
    if "no kernel image" in str(e):
        message = f"torch cannot use this GPU: {errors.first_line(e)}"
        return errors.DeviceError(message, hint=devices.INSTALL_HINT)
    if error := errors.system_error(e):
        return error
    if "timed out" in str(e).lower() and (silent := ranks.unresponsive()):
        names = ", ".join(f"rank {rank} (process {pid})" for rank, pid in silent.items())
        hint = "raise `launch.timeout` to wait longer"
        return errors.DeviceError(f"{names} did not respond", hint=hint)
    message = f"{type(e).__name__}: {e}"
    if place := model_files.place_of(e):
        hint = advice(
            "test the file with {}; `GZ_DEBUG=1` shows the traceback", gz("model check", place.split(":")[0])
        )
        return errors.UsageError(f"`{place}`: {message}", hint=hint)
    return errors.GzError(message, hint="the traceback is in the run's `log.txt`; `GZ_DEBUG=1` shows it")


def train(run: Run, log: Log) -> None:
    """Trains the run of `run.yaml`, or each of its unfinished stages. Every rank must call it."""
    png.made_by(verb="train", run=run.id)
    if lives := int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        log.warn(f"a process failed; restarting all processes ({lives} of `launch.restarts`)")
    if sum(stage.state != "finished" for stage in run.stages) > 1:
        check_stages(run)
    accelerator: Accelerator | None = None
    since = psutil.Process().create_time()  # imports are part of the time of the first training
    for stage in run.stages:
        if stage.state == "finished":
            log.info(f"stage `{stage.path.name}` is finished")
            continue
        part = Log(stage.path, rank=log.rank, stage=stage.path.name)
        part.info(f"stage `{stage.path.name}`", sparse=True)
        with record_status(stage, part):
            accelerator = train_one(stage, part, since)
            since = time.time()
    if not run.stages:
        accelerator = train_one(run, log, since)
    step = run.serving.status().get("step")
    log.event("done", run=run.id, path=str(run.path), step=step, **results_of(run.serving))
    if accelerator is not None:
        ranks.wait()  # gloo aborts a rank whose partner has gone before it
        accelerator.end_training()


def results_of(run: Run) -> dict[str, Any]:
    """The results of a finished run: last image, last and best validation, chosen guidance with its metrics,
    and seconds for 1,000 samples. A missing one is None."""
    pictures = sorted(run.samples_folder.glob("*.png"))
    figures = [{k: v for k, v in line.items() if k.startswith("val_")} for line in metric_lines(run.path)]
    return {
        "picture": str(pictures[-1]) if pictures else None,
        "figures": next(filter(None, reversed(figures)), None),
        "best": files.read_json(run.best_file),
        "guidance": run.status().get("guidance"),
        "sample_seconds": run.status().get("sample_seconds"),
    }


def train_one(run: Run, log: Log, since: float | None = None) -> Accelerator:
    """Trains one model, from its newest checkpoint if it has one. `since`: when its time began, by default
    now."""
    part = part_of(run.tree())
    prepare_torch(part)
    accelerator = accelerate(part)
    if len(started := {*ranks.everyone(run.owner.id)}) > 1:  # of several machines
        message = f"the machines train different runs: {', '.join(sorted(started))}"
        raise errors.UsageError(message, hint="run the same command again on all machines")
    streams.change_spinner("reading the images")
    clock = partial(devices.clock, accelerator.device, part.train.clock)
    began = clock()
    if since and devices.clock_of(accelerator.device, part.train.clock) == "wall":
        began -= time.time() - since
    pack = open_pack(part.data.name, **pack_options(part.data), say=log.info)
    check_unchanged(run.owner.path, pack.meta)
    if log.main:
        record_data(run.owner.path, pack.meta)
    judge = None
    if part.train.minutes and not run.checkpoints_folder.exists():
        trial = Trainer(run, part, pack, accelerator, log)
        chosen = steps_of_minutes(trial, began, clock)
        judge = trial.net, trial.metric
        part = replace(trial.part, train=replace(part.train, **chosen))
        del trial  # its memory is needed
        if log.main:
            write_chosen(run, {"train": chosen})
        ranks.wait()
        log.info(f"{part.train.steps} steps fit into the time")
    streams.change_spinner("building the model")
    trainer = Trainer(run, part, pack, accelerator, log, judge)
    if log.main:
        run.update(
            steps=trainer.steps,
            params=sum(p.numel() for p in trainer.model.parameters()),
            clock=devices.clock_of(trainer.device, part.train.clock),
        )
    try:
        with note_out_of_memory(trainer):
            trainer.fit()
    finally:
        if trainer.history.trackers:
            trainer.history.trackers.close()
    if log.main:
        run.update(peak_memory=devices.peak_memory(trainer.device))
    accelerator.free_memory()
    return accelerator


def steps_of_minutes(trial: Trainer, began: float, clock: Callable[[], float]) -> dict[str, Any]:
    """The keys of `train` with which a run takes `train.minutes`, computed from the timed steps of a
    trial."""
    minutes, since = trial.train.minutes or 0.0, clock()
    trial.begin()
    preparation = clock() - since  # the run begins as its trial does
    trial.get_net()
    judged = trial.metric
    with note_out_of_memory(trial):
        pauses = trial.pauses(60 * minutes, clock)
        ready = clock() - began + preparation
        steps = ranks.agree(count_steps(trial.step, trial.phases, pauses, clock() - ready, clock))
    if ready > (1 - MIN_TRAINING_SHARE - RESERVE_SHARE) * 60 * minutes:
        trial.log.warn(f"preparation took {duration(ready)} of the {duration(60 * minutes)}")
    # the run is compiled in the same way as the timed steps
    compiled = compiles(trial.part, trial.model, trial.device)
    chosen: dict[str, Any] = {"steps": steps, "minutes": None, "compile": compiled}
    chosen |= {"eval_images": trial.train.eval_images}
    chosen |= {PAUSE_KEYS[kind]: steps for kind in pauses.last_only}
    return chosen if trial.metric == judged else chosen | {"best": trial.metric}


@contextlib.contextmanager
def note_out_of_memory(trainer: Trainer) -> Iterator[None]:
    """Records in the status that a training ran out of GPU memory before its first step. `gz` then restarts
    it with smaller micro-batches."""
    try:
        yield
    except torch.OutOfMemoryError:
        if trainer.done == trainer.start:
            trainer.run.update(too_large=True)
        raise


def work(run: Run, job: jobs.Job, log: Log) -> None:
    """Does a job and writes its `result.json`."""
    state = None
    if "RANK" in os.environ:
        from accelerate import PartialState  # a single process does not wait

        # rank 0 judges the images of all ranks alone, which may take longer than NCCL's ten minutes
        state = PartialState(cpu=job.launch.cpu, timeout=timedelta(hours=2))
    device = state.device if state else devices.pick_device(job.launch)
    if job.launch.threads:
        torch.set_num_threads(job.launch.threads)
    devices.fast_kernels()
    streams.change_spinner("loading the model")
    png.made_by(**jobs.origin_of(job))
    result = importlib.import_module(f"gzcli.{JOB_MODULES[job.verb]}").run(job, run.path, device, log)
    if ranks.rank() == 0:
        files.write_json(run.result_file, result)
    if state:
        ranks.wait()
        state.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
