"""What is written by hand about a model: `models/NAME.md`, and nothing that code, recipe or a run can tell.

A file holds in this order a title, a paragraph, the key equation in TeX and as a terminal shows it, a line
that names it, and lists: limits, and code by others.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent

_FORM = re.compile(
    r"# (?P<title>.+?)\n\n(?P<text>.+?)\n\n\$\$(?P<tex>.+?)\$\$\n\n```\n(?P<equation>.+?)\n```\n\n"
    r"(?P<source>.+?)\n\n## Limits\n\n(?P<limits>.+?)\n\n## Code\n\n(?P<code>.+)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Written:
    """A model in words.

    title: what it is called.
    text: what it is, in a paragraph, in Markdown.
    tex: the key equation in TeX.
    equation: the same in Unicode, in one line or more.
    source: where it is from, and what its symbols mean.
    limits: what it cannot do, a sentence or two each.
    code: (owner/name on GitHub, what it is) of code by others.
    """

    title: str
    text: str
    tex: str
    equation: str
    source: str
    limits: tuple[str, ...]
    code: tuple[tuple[str, str], ...]


def written(name: str) -> Written | None:
    """What is written about a model, by the name that a user types; None: nothing is."""
    path = ROOT / "models" / f"{name}.md"
    if not path.is_file():
        return None
    found = _FORM.fullmatch(path.read_text(encoding="utf-8").strip())
    if found is None:
        raise ValueError(f"{path} has another form than `written.py` says")
    code = (item.partition(": ") for item in _items(found["code"]))
    return Written(
        title=found["title"],
        text=_line(found["text"]),
        tex=found["tex"],
        equation=found["equation"],
        source=_line(found["source"]),
        limits=_items(found["limits"]),
        code=tuple((name, words) for name, _, words in code),
    )


def _line(text: str) -> str:
    return " ".join(text.split())


def _items(text: str) -> tuple[str, ...]:
    """The items of a Markdown list."""
    return tuple(map(_line, re.split(r"^- ", text, flags=re.MULTILINE)[1:]))
