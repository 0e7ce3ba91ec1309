"""The documentation of a model's options, read from the docstrings of its file: a line `name: text` each.

The docstring of a class documents the parameters of `__init__`, the docstring of a dataclass of options its
fields, the docstring of a method its keywords. Continuation lines are indented. No file is imported.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping

from gzcli.models.catalog import ModelCard
from gzcli.models.signatures import Param
from gzcli.models.sources import Class, class_with_bodies, documented, lineage_of

Texts = Mapping[str, str]

_SHAPE = re.compile(r"^\[B\]: | \[[A-Z1, ]+\]")  # as in `images [B, C, H, W]`


def options(card: ModelCard) -> dict[str, Texts]:
    """The text of each option, by the section of a recipe: `model`, `sample`, `ood` and each application.

    For an option that a method does not document, it is the text in `sample`, else in the class.
    """
    lineage = [class_with_bodies(cls) for cls in lineage_of(card.path, card.cls)]
    model = _merged(_of_class(cls) for cls in lineage)
    sample = _of_method(lineage, "sample")
    scores = _merged(
        _of_method(lineage, f"{kind}_{score}") for score in card.scores for kind in ("score", "fit")
    )
    texts: dict[str, Texts] = {
        "model": _known(card.params, model),
        "sample": _known(card.sample, sample, model),
        "ood": _known(
            {key: p for options in card.scores.values() for key, p in options.items()}, scores, sample, model
        ),
    }
    for name, params in card.do.items():
        texts[name] = _known(params, _of_method(lineage, name), sample, model)
    return texts


def _known(params: Mapping[str, Param], *sources: Texts) -> dict[str, str]:
    """The text of each parameter: its own, else that of the first source that has one."""
    found = {}
    for name, param in params.items():
        own = {name: param.doc} if param.doc else {}
        texts = [source[name] for source in (own, *sources) if name in source]
        if texts:
            found[name] = texts[0]
    return found


def _merged(parts: Iterable[Texts]) -> dict[str, str]:
    """All texts; for an option that occurs twice, the first text."""
    found: dict[str, str] = {}
    for part in parts:
        found = {**part, **found}
    return found


def _of_class(cls: Class) -> dict[str, str]:
    init = cls.methods.get("__init__")
    return _of(cls.node) | (_of(init) if init else {})


def _of_method(lineage: Iterable[Class], name: str) -> dict[str, str]:
    return _merged(_of(cls.methods[name]) for cls in lineage if name in cls.methods)


def _of(node: ast.ClassDef | ast.FunctionDef) -> dict[str, str]:
    return documented(ast.get_docstring(node) or "")


def first_words(card: ModelCard, method: str | None = None) -> str:
    """The first paragraph of the docstring of the class, or of a method, in one line and without shapes; ""
    where there is none."""
    lineage = (class_with_bodies(cls) for cls in lineage_of(card.path, card.cls))
    found: ast.ClassDef | ast.FunctionDef | None
    found = next((node for cls in lineage if (node := cls.methods.get(method) if method else cls.node)), None)
    paragraph = (ast.get_docstring(found) or "" if found else "").split("\n\n")[0]
    return _SHAPE.sub("", " ".join(paragraph.split()))
