"""What a start from trained weights is worth: steps to the validation loss of a training from scratch.

python tests/tools/tuned.py [--steps 25,50,200] [--images 200] [--set K=V]… [WEIGHTS:DATA …]

trains each pair with few images, the same net from scratch and from the weights, by the recipe that
`gz train WEIGHTS --data DATA` takes. It prints a row a pair: the validation loss before the first step, after
each number of steps (each a training of that length), and from scratch after the last. `--set` is for both.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script it finds the helpers of the tests

from helpers import in_process, lines

from gzcli.launch import launcher
from gzcli.launch.plan import ask, prepare
from gzcli.store import runs

PAIRS = ("pretrained:fm-glyphs:mnist", "pretrained:cfm-glyphs:fashionmnist", "pretrained:fm-emoji:patches")
QUIET = ("train.sample_every=0", "train.samples=2", "train.patience=null", "train.checkpoint_every=0")


def after(weights: str, data: str, sets: tuple[str, ...], steps: int, *, scratch: bool) -> float:
    """The validation loss of a training."""
    flags = {"launch.cpu": True, "train.steps": steps}
    options = ("train.best=loss", f"train.eval_every={steps}", *sets)
    start = prepare(ask(weights, data, (*QUIET, *options, *("train.init=null",) * scratch), flags))
    run = start.train(start.recipe())
    figures = {key: value for line in lines(run.path / "metrics.jsonl") for key, value in line.items()}
    runs.remove(run)
    return figures["val_loss"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("pairs", nargs="*", default=PAIRS)
    parser.add_argument("--steps", default="25,50,200")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    launcher.run = in_process
    steps = [int(one) for one in args.steps.split(",")]
    print("pair", *(f"tuned {n}" for n in (0, *steps)), f"scratch {steps[-1]}", sep="\t")
    for pair in args.pairs:
        weights, _, data = pair.rpartition(":")
        sets = (f"data.n={args.images}", *args.set)
        frozen = (*sets, "optim.lr=1e-12")
        row = [after(weights, data, frozen, 1, scratch=False)]
        row += [after(weights, data, sets, n, scratch=False) for n in steps]
        row += [after(weights, data, sets, steps[-1], scratch=True)]
        print(pair, *(f"{value:.4f}" for value in row), sep="\t", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as home:
        main()
