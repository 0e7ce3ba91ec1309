"""Writes the models of README.md, and how many there are, from the recipes: `python .ci/readme.py`."""

from __future__ import annotations

import re
from pathlib import Path

from gzcli.core.errors import canonical
from gzcli.docs.site import heading
from gzcli.models import catalog
from gzcli.store.paths import recipe_names

README = Path(__file__).resolve().parents[1] / "README.md"


def written(text: str) -> str:
    """The text of README.md with the models that have a recipe, a line a family."""
    families: dict[str, list[str]] = {}
    for name in recipe_names():
        families.setdefault(heading(catalog.card(canonical(name)).family), []).append(f"`{name}`")
    lines = "\n".join(f"* **{family}** {' '.join(names)}" for family, names in sorted(families.items()))
    text = re.sub(r"(?<=gz has )\d+(?= models)", str(len(recipe_names())), text)
    return re.sub(r"(?<=\n## Models\n\n).*?(?=\n\n)", lines, text, flags=re.S)


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
