"""Judges rows that a pull request adds to the leagues again: python .ci/row.py .github/rows/SET/NAME.json …

Beside each file is the model, NAME.safetensors of `gz runs export`. The file is what `gz bench
.github/rows/SET/NAME.safetensors --data SET -n 2000 --json` printed. A value that is outside of the interval
of the second judgement fails.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

MOST = 4_000_000  # bytes of a model, as `--dtype bf16` exports it


def judged(model: Path, n: int) -> dict[str, Any]:
    """The row of a model, by this checkout."""
    words = ["bench", str(model), "--data", model.parent.name, "-n", str(n), "--cpu", "--json"]
    done = subprocess.run([sys.executable, "-m", "gzcli", *words], check=True, stdout=subprocess.PIPE)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])["rows"][0]
    return row


def differing(claimed: dict[str, Any], again: dict[str, Any]) -> list[str]:
    """The metrics with intervals whose claimed value is outside of that of the second judgement."""
    lines = []
    for name, (low, high) in again["intervals"].items():
        value = claimed["metrics"].get(name)
        if value is None or not low <= value <= high:
            lines.append(f"{name}: claimed {value}, judged {low:.4g} to {high:.4g}")
    return lines


def main(paths: list[str]) -> int:
    failed = 0
    for path in map(Path, paths):
        model, claimed = path.with_suffix(".safetensors"), json.loads(path.read_text())["rows"][0]
        if model.stat().st_size > MOST:
            problems = [f"{model.name} has more than {MOST:,} bytes: export it with `--dtype bf16`"]
        else:
            problems = differing(claimed, judged(model, claimed["n"]))
        print(f"{path}: {'; '.join(problems) or 'judged alike'}")
        failed += bool(problems)
    return failed


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
