"""The hand-written text on a model, from `models/NAME.md`: a title, a paragraph, the key equation in TeX and
as a terminal shows it, a line that names the equation, and two lists, limits and code by others."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

DOCS_FOLDER = Path(__file__).parent

_FORM = re.compile(  # the fields of `Written` in their order
    r"# (.+?)\n\n(.+?)\n\n\$\$(.+?)\$\$\n\n```\n(.+?)\n```\n\n(.+?)\n\n## Limits\n\n(.+?)\n\n## Code\n\n(.+)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Written:
    """The hand-written text on a model."""

    title: str
    text: str  # the idea of the model, a paragraph of Markdown
    tex: str  # the key equation in TeX
    equation: str  # the same in Unicode, in one line or more
    source: str  # its source, and the meaning of its symbols
    limits: tuple[str, ...]  # its limits, a sentence or two each
    code: tuple[tuple[str, str], ...]  # (owner/name on GitHub, description) of code by others


def written(name: str) -> Written | None:
    """The hand-written text on a model, by the name that a user types; None if there is none."""
    path = DOCS_FOLDER / "models" / f"{name}.md"
    if not path.is_file():
        return None
    match = _FORM.fullmatch(path.read_text(encoding="utf-8").strip())
    if match is None:
        raise ValueError(f"{path} does not have the sections that `text.py` requires")
    title, text, tex, equation, source, limits, code = match.groups()
    code_of = tuple((name, words) for name, _, words in (item.partition(": ") for item in _items(code)))
    return Written(title, _line(text), tex, equation, _line(source), _items(limits), code_of)


def _line(text: str) -> str:
    return " ".join(text.split())


def _items(text: str) -> tuple[str, ...]:
    """The items of a Markdown list."""
    return tuple(map(_line, re.split(r"^- ", text, flags=re.MULTILINE)[1:]))
