"""The result of `gz data audit` on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gzcli.report.terminal import MAX_FILE_LETTERS, TerminalTable

LINES_PER_KIND = 4  # most lines of a kind in the table


def faults_table(result: Mapping[str, Any]) -> TerminalTable:
    """The clearest faults of each kind, and the number of all."""
    counts = {kind: n for kind, n in result["counts"].items() if n}
    lines = []
    for kind in counts:
        some = [row for row in result["faults"] if row["kind"] == kind][:LINES_PER_KIND]
        lines += [[kind, shortened(row["file"]), detail(row)] for row in some]
    notes = [f"{kind}: {n:,}" for kind, n in counts.items()]
    notes = [f"faults: {', '.join(notes)}" if notes else "no faults"]
    if len(lines) < len(result["faults"]):
        notes.append(f"the table shows up to {LINES_PER_KIND} of a kind; `audit.csv` lists all")
    return TerminalTable(["fault", "file", "detail"], lines, notes)


def detail(row: Mapping[str, Any]) -> str:
    """What is known of a fault: the original of a copy, the likely class, or the reason."""
    if row["of"]:
        return f"of {shortened(row['of'])}"
    if row["suggested"]:
        return f"{row['label']}, more likely {row['suggested']}"
    if row["kind"] == "foreign":
        return f"p {row['score']:.4f}"
    return str(row["note"]).removeprefix(f"`{row['file']}` ")


def shortened(file: str) -> str:
    """The end of a long name."""
    return file if len(file) <= MAX_FILE_LETTERS else f"…{file[1 - MAX_FILE_LETTERS :]}"
