"""Trainings of a few steps, as someone who tries a setting starts them: each ends, with finite figures."""

from __future__ import annotations

import io
import math
import os
import zipfile
from pathlib import Path

from forks import Zygote
from helpers import lines

from gzcli.data.sets.registry import SPECS
from gzcli.recipe.resolve import resolve
from gzcli.store import runs
from gzcli.store.paths import recipe_names

EMBEDDED = [name for name, spec in SPECS.items() if spec.embedded]
REFUSED = 2  # exit code where a recipe does not train on a set


def offline() -> list[str]:
    """The recipes that train without weights from the internet."""
    return [name for name in recipe_names() if resolve(name).card.family != "stable_diffusion"]


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
    code = forks.asked(
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
