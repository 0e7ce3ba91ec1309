"""The English of pages, model pages, help and option texts: the length of sentences, and constructions that a
reader has to translate. Their number only falls: lower a ceiling when you remove some."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from itertools import chain

import pytest
from helpers import ROOT

from gzcli.cli import app
from gzcli.docs import page as manual
from gzcli.models import catalog
from gzcli.recipe.describe import section_texts
from gzcli.recipe.recipe import Part
from gzcli.recipe.schema import SECTIONS
from gzcli.store.paths import recipe_names

LONGEST = 25  # words of a sentence
LONG = {"pages": 1, "models": 2, "help": 0, "options": 1}  # sentences above it, at most
PATTERNS = {  # what reads as a translation
    "goes on": r"\b(goes|go|going|went) on\b",
    "in place of": r"\bin (the )?place of\b",
    "of its own": r"\bof (its|their) own\b",
    ", as x": r", as `|\(as `",
    "where for if": r"\bwhere (there|it|they|that|one|none|no|nothing)\b",
    "picture": r"\bpictures?\b",
    "figure": r"\bfigures?\b",
    "stands, lies": r"\b(stands?|stood|lies|lay)\b",
    "holds": r"\b(holds?|held)\b(?! |-out)",
    "says, tells": r"\b(says|said|tells?|told)\b",
    "null:": r"\bnull:",
    "without it": r"\bwithout (it|them|one)\b",
    "else": r"[;,] else\b",
    "anew": r"\banew\b",
    "that of": r"\b(that|those) of\b",
}
CEILINGS = {
    "pages": {"where for if": 2},
    "models": {"that of": 17},
    "help": {"where for if": 1},
    "options": {},
}


def prose(markdown: str) -> Iterator[str]:
    """The paragraphs and items of a page in one line each, without code, tables, headings and pictures."""
    text = re.sub(r"(?ms)^ *```.*?^ *```$", "", markdown)
    text = re.sub(r"(?m)^(\||#|\$\$|\*\*gz\*\*| *!\[|<).*$", "", text)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    for block in re.split(r"\n\s*\n|\n(?= *(?:[-*]|\d+\.) )", text):
        yield " ".join(block.split()).lstrip("-* ")


def sentences(text: str) -> list[str]:
    plain = re.sub(r"`[^`]*`", "`x`", text)
    return re.split(r"(?<=[.!?:;*])\s+(?=[A-Z`(“]|gz )|[:;] | · ", plain)


@cache
def texts(kind: str) -> tuple[str, ...]:
    """The sentences of a kind of text."""
    if kind == "pages":
        pages = [
            (ROOT / "README.md"),
            *(manual.DOCS_FOLDER / "pages").glob("*.md"),
            manual.DOCS_FOLDER / "static/index.md",
        ]
        parts: Iterator[str] = chain.from_iterable(prose(path.read_text()) for path in pages)
    elif kind == "models":
        pages = (manual.DOCS_FOLDER / "models").glob("*.md")
        parts = chain.from_iterable(prose(path.read_text()) for path in pages)
    elif kind == "help":
        commands = [command for _, command in manual.leaves(app.build(), ("gz",))]
        params = (getattr(param, "help", "") or "" for command in commands for param in command.params)
        parts = iter(dict.fromkeys([*(command.help or "" for command in commands), *params]))
    else:
        cards = (catalog.option_texts(card) for card in catalog.cards().values())
        shared = (section_texts(section) for section in (*SECTIONS.values(), Part))
        options = [*(text for card in cards for texts in card.values() for text in texts.values())]
        parts = iter(dict.fromkeys([*options, *(text for texts in shared for text in texts.values())]))
    return tuple(sentence for part in parts for sentence in sentences(part) if sentence.strip())


@pytest.mark.parametrize("kind", CEILINGS)
def test_sentences_are_short_and_constructions_only_fall(kind):
    long = [text for text in texts(kind) if len(text.split()) > LONGEST]
    assert len(long) <= LONG[kind], "\n".join(long)
    for name, pattern in PATTERNS.items():
        used = [text for text in texts(kind) if re.search(pattern, text)]
        assert len(used) <= CEILINGS[kind].get(name, 0), f"`{name}`:\n" + "\n".join(used)


def test_what_show_prints_has_no_names_of_python():
    for name in recipe_names():
        text = re.sub(r"(?ms)^```.*?^```$|`[^`]*`|https?://\S+", "", manual.as_markdown(manual.page_of(name)))
        matches = re.findall(
            r"\bRaises\b|\w+Error\b|\bself\.|\b(?:fit_\w+|score_\w+|log_prob)|\.\.(?!\.)|\.,|,,|\.;|;;", text
        )
        assert not matches, f"{name}: {matches}"
