"""Started by test_processes.py as N processes: trains zoo lines one after another in float64, and tells of
each its losses, its figures of validation and the rank gap. A run that comes again has lost its last
checkpoint, and goes on from the one before."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from helpers import lines, trainer

from gzcli import ranks
from gzcli.engine import validate
from gzcli.engine.trainer import Trainer
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
        losses = [found for found in of_training if found]
        held_out = [v for x in shown for k, v in x.items() if k.startswith("val_")]
        (run.path / "out.json").write_text(json.dumps({"gap": gap, "losses": losses, "held_out": held_out}))
    return t


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    validate.VALIDATION, validate.EVAL_BATCH = 30, 10  # three batches: two ranks have unequal shares
    for i, folder in enumerate(sys.argv[1:], start=1):
        if folder in sys.argv[1:i] and ranks.rank() == 0:
            (Path(folder) / "model.safetensors").rename(Path(folder) / "first.safetensors")
            shutil.rmtree(max((Path(folder) / "checkpoints").glob("0*")))
        ranks.wait()
        accelerator = trained(Run(Path(folder))).accelerator
        accelerator.free_memory()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    os._exit(
        0
    )  # gloo's threads now and then abort an interpreter that exits by itself; `gz` goes by `status.json`
