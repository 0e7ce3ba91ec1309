"""Trainings of a few steps, as who tries a setting starts them: each is to end, with finite figures.

python tests/tools/few_steps.py [--steps 1,2,5,10] [--data SET,…] [MODEL …]

trains recipes, all stages, as `gz train` does, validates each once and draws two pictures. It prints a table:
a row for each recipe, a column for each set and number of steps. Without `--data` the sets are all embedded
ones and `colour.zip`, which is made here. A dash: the recipe does not train on the set. Models that need
weights from the internet are left out.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script it finds the helpers of the tests

from forks import Zygote, zygote
from helpers import lines

from gzcli.core.errors import canonical
from gzcli.data.sets.registry import SPECS
from gzcli.models.catalog import cards
from gzcli.store import runs
from gzcli.store.paths import recipe_names

EMBEDDED = [name for name, spec in SPECS.items() if spec.embedded]
ZIP = "colour.zip"
REFUSED = 2  # exit code where a recipe does not train on a set


def offline() -> list[str]:
    """The recipes that train without weights from the internet."""
    families = {name: cards()[canonical(name)].family for name in recipe_names()}
    return [name for name, family in families.items() if family != "stable_diffusion"]


def colour_zip(path: Path) -> Path:
    """Sixty colour pictures of 32×32 in two classes: smooth shades, and noise."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(60):
            kind = "AB"[i % 2]
            coarse = rng.integers(0, 256, (4, 4, 3) if kind == "A" else (32, 32, 3), dtype=np.uint8)
            made = io.BytesIO()
            Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC).save(made, "png")
            archive.writestr(f"{kind}/{i}.png", made.getvalue())
    return path


def faults(forks: Zygote, model: str, data: str, steps: int) -> tuple[str, dict[str, float]] | None:
    """What is wrong with a training, "" if nothing, and its last figures; None: it is refused."""
    before = {run.id for run in runs.all_runs()}
    sets = (f"train.eval_every={steps}", "train.samples=2", "train.log_every=1")
    words = ("train", model, "--data", data, "--steps", str(steps), "--cpu", "--yes")
    words += tuple(word for one in sets for word in ("--set", one))
    code = forks.code_of(
        words=words, home=os.environ["GZ_HOME"], here=str(forks.folder), said=str(forks.folder / "said.txt")
    )
    if code == REFUSED:
        return None
    if code:
        return f"exit {code}", {}
    (run,) = (run for run in runs.all_runs() if run.id not in before)
    figures: dict[str, float] = {}
    for stage in run.stages or [run]:
        prefix = "" if stage is run else f"{stage.path.name}."
        for line in lines(stage.path / "metrics.jsonl"):
            figures |= {prefix + key: value for key, value in line.items()}
            if bad := [key for key, value in line.items() if value is None or not math.isfinite(value)]:
                return f"{prefix}{bad[0]} at step {line['step']}", figures
    return "", figures


def shown(figures: dict[str, float]) -> str:
    """Losses and figures of validation, of the last stage."""
    last = {key: value for key, value in figures.items() if "." not in key} or {
        key.rpartition(".")[2]: value for key, value in figures.items()
    }
    return ", ".join(f"{k} {v:.3g}" for k, v in last.items() if k == "loss" or k.startswith("val_"))


def rows(forks: Zygote, models: list[str], sets: list[str], counts: list[int]) -> Iterator[list[str]]:
    """The rows of the table."""
    for model in models:
        row = [model]
        for data in sets:
            for steps in counts:
                result = faults(forks, model, data, steps)
                row.append("–" if result is None else result[0] or shown(result[1]))
        yield row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", default="1,2,5,10")
    parser.add_argument("--data", default=",".join([*EMBEDDED, ZIP]))
    parser.add_argument("models", nargs="*")
    args = parser.parse_args()
    counts = [int(n) for n in args.steps.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"GZ_HOME": f"{folder}/home", "GZ_OFFLINE": "1", "GZ_TRIAL": "0", "COLUMNS": "200"}
        made = str(colour_zip(Path(folder) / ZIP))
        sets = [made if name == ZIP else name for name in args.data.split(",")]
        head = ["model", *(f"{Path(name).name} × {n}" for name in sets for n in counts)]
        print("| " + " | ".join(head) + " |\n|" + "---|" * len(head), flush=True)
        with zygote(Path(folder)) as forks:
            for row in rows(forks, args.models or offline(), sets, counts):
                print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
