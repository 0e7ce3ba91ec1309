"""Started by test_processes.py as N processes: trains a zoo line in float64 and tells the losses and the rank gap."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from helpers import lines, trainer

from gzcli.engine import watch
from gzcli.store.runs import Run

if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    watch.EVAL_BATCH = 50  # the 144 digits held out are three batches: two ranks have unequal shares
    run = Run(Path(sys.argv[1]))
    t = trainer(run.tree(), run)
    t.fit()
    state = {k: v.double() for k, v in t.model.state_dict().items() if isinstance(v, torch.Tensor)}
    gap = 0.0
    if t.world > 1:
        for value in state.values():
            low, high = value.clone(), value.clone()
            torch.distributed.all_reduce(low, torch.distributed.ReduceOp.MIN)
            torch.distributed.all_reduce(high, torch.distributed.ReduceOp.MAX)
            gap = max(gap, float((high - low).abs().max()))
    if t.rank == 0:
        shown = lines(run.path / "metrics.jsonl")
        of_training = ({k: v for k, v in x.items() if k.endswith("loss") and k != "val_loss"} for x in shown)
        losses = [found for found in of_training if found]
        held_out = [v for x in shown for k, v in x.items() if k.startswith("val_")]
        (run.path / "out.json").write_text(json.dumps({"gap": gap, "losses": losses, "held_out": held_out}))
    t.accelerator.wait_for_everyone()
    t.accelerator.end_training()
    os._exit(0)  # gloo's threads now and then abort an interpreter that exits by itself; `gz` goes by `status.json`
