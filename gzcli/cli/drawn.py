"""Where samples go, and what is told of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gzcli.cli import out
from gzcli.cli.jobs import new_folder

if TYPE_CHECKING:
    from gzcli.store.runs import Run


def place(out_dir: Path | None, run: Run, name: str) -> Path:
    """The folder of a job: that of `--out`, else a new one below the run."""
    return out_dir.absolute() if out_dir else new_folder(run.path / "sampled", name)


def tell(result: Mapping[str, Any]) -> None:
    """Prints what was drawn."""
    for path in (result["grid"], result["npz"], result["animation"]):
        if path:
            out.text(path)
    for name, value in result.get("figures", {}).items():
        out.info(f"{name}: {value:.3f} of {result['n']:,} images")
    if not result["files"] and not result["npz"]:
        out.info(f"{result['n']:,} images: all on one sheet, none by itself")
        out.hint("`--png` writes each of them, `--npz` all in one file")
    out.data(result)
