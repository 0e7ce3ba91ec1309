"""The text of each key of a recipe, from the docstrings, and a recipe as YAML with its texts as comments."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from gzcli.core.parts import Part
from gzcli.core.sections import SECTIONS, OptimSection, keys_of
from gzcli.models import catalog, docs
from gzcli.models.catalog import ModelCard
from gzcli.models.sources import documented
from gzcli.recipe.load import Key
from gzcli.recipe.recipe import Recipe
from gzcli.recipe.write import lines

WIDTH = 80  # columns of a terminal
COLUMN = 31  # where texts begin, unless all values of a section are shorter
LEAST = 24  # columns that a text has at least, however far a section is indented


def section_texts(section: type) -> dict[str, str]:
    """The text of each key that a section declares, from its docstring."""
    texts = documented(inspect.getdoc(section) or "")
    return {f.name: texts[f.name] for f in keys_of(section) if f.name in texts}


def texts(recipe: Recipe) -> dict[str, str]:
    """The text of each key of a recipe, by dotted key, as far as there is one."""
    of_part = section_texts(Part)
    found: dict[Key, str] = {(key,): of_part[key] for key in ("about", "scale", "seed", "params")}
    for name, section in SECTIONS.items():
        found |= {(name, key): text for key, text in section_texts(section).items()}
    shared = dict(found)
    for part in recipe.parts:
        below: Key = ("stages", part.stage) if part.stage else ()
        own = {**shared, **_of_model(catalog.card(part.model), part), ("model", "name"): of_part["model"]}
        found |= {(*below, *key): text for key, text in own.items()}
    return {".".join(key): text for key, text in found.items()}


def _of_model(model: ModelCard, part: Part) -> dict[Key, str]:
    """The texts of the keys that the model has beyond those of the sections."""
    options = docs.options(model)
    found: dict[Key, str] = {
        (section, key): text
        for section in ("model", "sample", "ood")
        for key, text in options[section].items()
    }
    optim = section_texts(OptimSection)
    found |= {("optim", phase, key): optim[key] for phase, keys in part.optim.phases.items() for key in keys}
    return found


def annotated(tree: Mapping[str, Any], texts: Mapping[str, str], width: int = WIDTH) -> str:
    """The tree as YAML, each key with its text as a comment, in at most `width` columns where the values
    allow it."""
    written = list(lines(tree))
    out = []
    for (at, line), column in zip(written, _columns(written), strict=True):
        text = texts.get(".".join(map(str, at)))
        if not text or line.endswith(":"):
            out.append(line)
            continue
        first, *further = textwrap.wrap(text, max(LEAST, width - column - 2), break_on_hyphens=False)
        if len(line) + 2 <= column:
            out.append(f"{line:<{column}}# {first}")
        else:
            out += [line, f"{'':<{column}}# {first}"]
        out += [f"{'':<{column}}# {more}" for more in further]
    return "\n".join(out)


def _columns(written: list[tuple[Key, str]]) -> Iterator[int]:
    """The column of the text beside each line: the same for all keys of a section."""
    longest: dict[Key, int] = {}
    for at, line in written:
        if not line.endswith(":"):
            longest[at[:-1]] = max(longest.get(at[:-1], 0), min(COLUMN, len(line) + 2))
    for at, _ in written:
        yield longest.get(at[:-1], COLUMN)
