"""Texts as HTML, Markdown and LaTeX that show them as they are, whatever a file or run is called."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {character: f"\\{character}" for character in "&%_#${}"}
_LATEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "`": r"\textasciigrave{}"}
_LATEX |= {
    '"': r"\textquotedbl{}",
    "–": "--",
    "…": r"\ldots{}",
    "·": r"$\cdot$",
    "−": "$-$",
    "×": r"$\times$",
}
_LATEX |= {"→": r"$\rightarrow$", "↓": r"$\downarrow$", "↑": r"$\uparrow$", "±": r"$\pm$", "½": r"$\frac12$"}
_LATEX |= {"≤": r"$\leq$", "≥": r"$\geq$", "Σ": r"$\Sigma$", "σ": r"$\sigma$", "β": r"$\beta$"}


def html(text: str) -> Markup:
    """A sentence in which `…` marks code."""
    parts = (Markup("<code>{}</code>").format(part) if code else escape(part) for code, part in pieces(text))
    return Markup("").join(parts)


def markdown(text: str) -> str:
    """A text, which may stand in a cell of a table."""
    line = re.sub(r"([\\`*_{}\[\]#|~$])", r"\\\1", " ".join(str(text).split()))
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def markdown_sentence(text: str) -> str:
    """A sentence in which `…` marks code."""
    return "".join(f"`{part}`" if code else spaced(part, markdown(part)) for code, part in pieces(text))


def fenced(text: str) -> str:
    """A block of code of Markdown, whose fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text.rstrip()}\n{fence}"


def latex(text: str) -> str:
    """A text."""
    return "".join(_LATEX.get(character, character) for character in " ".join(str(text).split()))


def pieces(text: str) -> list[tuple[bool, str]]:
    """(is code, text) of the parts of a sentence; one with a mark that is not closed is a single part."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return [(False, text)]
    return [(i % 2 == 1, part) for i, part in enumerate(parts) if part]


def spaced(part: str, made: str) -> str:
    """What was made of a part, with the blanks that the part has at its ends."""
    if not part.strip():
        return " "
    return f"{' ' * part[:1].isspace()}{made}{' ' * part[-1:].isspace()}"
