"""`tests/tools/compare.py` sees what a change of the code changes, and nothing that changes by itself."""

from __future__ import annotations

from pathlib import Path

import compare
import numpy as np
from digests import Normal, digest
from PIL import Image

METRICS = '{{"step": 6, "loss": {loss}, "it_s": {rate}}}\n'


def written(folder: Path, *, day: str, red: int = 0, loss: float = 0.5, said: str = "done") -> dict:
    """The record of a training that wrote figures and a picture on a day, 9 seconds later on each."""
    run = folder / "runs" / f"vae-digits-202611{day}-08181{day[1]}-e{day}7"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text(METRICS.format(loss=loss, rate=day))
    pixels = np.full((4, 4, 3), 7, np.uint8)
    pixels[1, 2, 0] += red
    Image.fromarray(pixels).save(run / "grid.png")
    normal = Normal({str(folder): "<home>"})
    files = {normal(str(path)): digest(path, normal) for path in run.iterdir()}
    stderr = normal.lines(f"run: {run.name}\n{said}: {run}, 1{day[1]}s\nnext: gz sample vae-digits-e{day}7")
    return {"command": "train vae", "code": 0, "stdout": [], "stderr": stderr, "files": files, "removed": []}


def test_a_change_is_found_and_a_date_is_none(tmp_path: Path):
    first = written(tmp_path / "first", day="28")
    assert compare.verdict(first, written(tmp_path / "date", day="29")) == ("same to the bit", [], False)

    said, lines, broken = compare.verdict(first, written(tmp_path / "pixel", day="28", red=1))
    assert said == "figures differ (1)" and "grid.png" in lines[0] and broken
    said, lines, broken = compare.verdict(first, written(tmp_path / "loss", day="28", loss=0.5000000001))
    assert said.startswith("figures differ") and "metrics.jsonl" in lines[0] and broken
    said, lines, broken = compare.verdict(first, written(tmp_path / "words", day="28", said="ready"))
    assert said == "same but for messages (2 lines)" and "ready" in lines[1] and not broken
    assert compare.verdict(first, first | {"code": 1})[2] and compare.verdict(first, None)[2]


def test_seconds_are_replaced_and_figures_are_not_and_braces_give_a_command_each():
    for line, normal in (
        ("done: 4 images, 2s, 0.0027 s per image", "done: 4 images, <time>, <time> per image"),
        ("done: best bpd 3.101 at step 6, 1m40s", "done: best bpd 3.101 at step 6, <time>"),
        ("step 6  3.98 it/s  loss 586.4", "step 6  <time>  loss 586.4"),
        ("6 of 700 steps, 64 images, 355 test images", "6 of 700 steps, 64 images, 355 test images"),
    ):
        assert Normal({}).lines(line) == [normal]
    expected = ["list data -n 1", "list data -n 2", "list runs -n 1", "list runs -n 2"]
    assert compare.commands("# note\n[one]\nlist {data,runs} -n {1,2}\n") == {"one": expected}
