"""Writes the models of README.md, and how many there are, from the recipes, and some rows of the league of
MNIST from its files: `python .ci/readme.py`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from gzcli.core import measured
from gzcli.core.errors import canonical
from gzcli.core.units import duration
from gzcli.docs.site import heading
from gzcli.metrics.standings import Excess
from gzcli.models import catalog
from gzcli.store.paths import recipe_names

README = Path(__file__).resolve().parents[1] / "README.md"
LEAGUE = "mnist", "tiny"
# models of the table, one of each kind
SHOWN = {
    "cfm": "flow matching",
    "cgan": "GAN",
    "ddpm": "diffusion",
    "aae": "autoencoder",
    "glow": "normalizing flow",
}


def league() -> str:
    """The caption and the table of the league, the best model first."""
    rows, minutes = measured.standings(*LEAGUE), measured.about(*LEAGUE)["budget"] / 60
    lines = ["| rank | model | family | excess fd | training | per image |", "|---|---|---|---|---|---|"]
    for row in (row for row in rows if row["model"] in SHOWN):
        took, each = duration(float(row["train_seconds"])), 1000 * float(row["sample_seconds"])
        name, rank = row["model"], row["place"] or "–"
        lines.append(f"| {rank} | `{name}` | {SHOWN[name]} | {excess(row)} | {took} | {each:.2g} ms |")
    simplest = next(row for row in measured.peers(LEAGUE[0]) if not row["model"])
    name, package = simplest["name"].split(", ")
    took = duration(float(simplest["seconds"]))
    lines.append(f"| – | {name} | {package} | {excess(simplest)} | {took} | – |")
    caption = f"Five of {len(rows)} models, trained on MNIST for {minutes:g} minutes on a CPU:"
    return "\n".join([caption, "", *lines])


def excess(row: Mapping[str, str]) -> str:
    return Excess(float(row["fd_excess"]), float(row["fd_excess_half"])).words


def written(text: str) -> str:
    """The text of README.md with the models that have a recipe, a line a family, and with the league."""
    families: dict[str, list[str]] = {}
    for name in recipe_names():
        families.setdefault(heading(catalog.card(canonical(name)).family), []).append(f"`{name}`")
    lines = "\n".join(f"* **{family}** {' '.join(names)}" for family, names in sorted(families.items()))
    text = re.sub(r"(?<=gz has )\d+(?= models)", str(len(recipe_names())), text)
    text = re.sub(r"(?<=\n)Five of .*?(?=\n\n\*)", league(), text, flags=re.S)
    return re.sub(r"(?<=\n## Models\n\n).*?(?=\n\n)", lines, text, flags=re.S)


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
