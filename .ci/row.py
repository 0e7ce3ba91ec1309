"""Judges rows that a pull request adds to the leagues again: python .ci/row.py FILE …, its files below
.github/rows.

A row is two files in .github/rows/SET: the model, NAME.safetensors of `gz runs export`, and NAME.json, which
`gz bench .github/rows/SET/NAME.safetensors --data SET -n 2000 --json` printed. Everything that the page of
leagues shows is compared with a second judgement.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

MOST = 4_000_000  # bytes of a model, as `--dtype bf16` exports it
SAMPLES = "2000"
FACTS = ("model", "title", "params", "n", "sample")  # what a row states besides metrics


def judged(model: Path) -> dict[str, Any]:
    """The row of a model, by this checkout."""
    words = ["bench", str(model), "--data", model.parent.name, "-n", SAMPLES, "--cpu", "--json"]
    done = subprocess.run([sys.executable, "-m", "gzcli", *words], check=True, stdout=subprocess.PIPE)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])["rows"][0]
    return row


def differing(claimed: dict[str, Any], again: dict[str, Any]) -> list[str]:
    """What a row claims otherwise than the second judgement: a fact, a metric or excess outside of the new
    interval, or an interval of an excess that is less than half or more than twice as wide."""
    rows = claimed, again
    lines = [
        f"{key}: claimed {claimed.get(key)}, judged {again[key]}"
        for key in FACTS
        if claimed.get(key) != again[key]
    ]
    for key in ("metrics", "excess"):
        names = [set(row[key]) for row in rows]
        lines += [f"{key}: only one judgement has {name}" for name in sorted(names[0] ^ names[1])]
    for name, (low, high) in again["intervals"].items():
        value = claimed["metrics"].get(name)
        if value is not None and not low <= value <= high:
            lines.append(f"{name}: claimed {value}, judged {low:.4g} to {high:.4g}")
    for name, (_, low, high) in again["excess"].items():
        value, *ends = claimed["excess"].get(name, (low, low, high))
        if not low <= value <= high or not (high - low) / 2 <= ends[1] - ends[0] <= 2 * (high - low):
            half = (ends[1] - ends[0]) / 2
            lines.append(f"excess of {name}: claimed {value} ± {half:.2g}, judged {low:.4g} to {high:.4g}")
    return lines


def main(paths: list[str]) -> int:
    failed = 0
    for path in sorted({Path(path).with_suffix(".json") for path in paths}):
        model, claimed = path.with_suffix(".safetensors"), json.loads(path.read_text())["rows"][0]
        if model.stat().st_size > MOST:
            problems = [f"{model.name} has more than {MOST:,} bytes: export it with `--dtype bf16`"]
        else:
            problems = differing(claimed, judged(model))
        print(f"{path}: {'; '.join(problems) or 'judged alike'}")
        failed += bool(problems)
    return failed


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
