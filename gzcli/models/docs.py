"""The documentation of a model's options, read from the docstrings of its file: a line `name: text` each.

The docstring of a class documents the parameters of `__init__`, the docstring of a dataclass of options its
fields, the docstring of a method its keywords. Continuation lines are indented. No file is imported.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping

from gzcli.models.catalog import ModelCard
from gzcli.models.signatures import Param
from gzcli.models.sources import class_with_bodies, documented, lineage_of

Texts = Mapping[str, str]

_SHAPE = re.compile(r"^\[B\]: | \[[A-Z1, ]+\]")  # as in `images [B, C, H, W]`


def options(card: ModelCard) -> dict[str, Texts]:
    """The text of each option, by the section of a recipe: `model`, `sample`, `ood` and each application.

    For an option that a method does not document, it is the text in `sample`, else in the class.
    """
    lineage = [class_with_bodies(cls) for cls in lineage_of(card.path, card.cls)]

    def texts_of(*methods: str) -> dict[str, str]:
        """What the methods say of their keywords: of several classes the nearest."""
        texts: dict[str, str] = {}
        for method in methods:
            for cls in lineage:
                texts = _of(cls.methods.get(method)) | texts
        return texts

    model: dict[str, str] = {}
    for cls in lineage:
        model = _of(cls.node) | _of(cls.methods.get("__init__")) | model
    sample = texts_of("sample")
    scores = texts_of(*(f"{kind}_{score}" for score in card.scores for kind in ("score", "fit")))
    of_scores = {key: p for params in card.scores.values() for key, p in params.items()}
    return {
        "model": _chosen(card.params, model),
        "sample": _chosen(card.sample, model | sample),
        "ood": _chosen(of_scores, model | sample | scores),
        **{name: _chosen(params, model | sample | texts_of(name)) for name, params in card.do.items()},
    }


def _chosen(params: Mapping[str, Param], texts: Texts) -> dict[str, str]:
    """The text of each parameter that has one: that of its dataclass of options, else of the docstrings."""
    chosen = {name: param.doc or texts.get(name, "") for name, param in params.items()}
    return {name: text for name, text in chosen.items() if text}


def _of(node: ast.ClassDef | ast.FunctionDef | None) -> dict[str, str]:
    return documented(ast.get_docstring(node) or "") if node else {}


def first_words(card: ModelCard, method: str | None = None) -> str:
    """The first paragraph of the docstring of the class, or of a method, in one line and without shapes; ""
    where there is none."""
    lineage = (class_with_bodies(cls) for cls in lineage_of(card.path, card.cls))
    nodes: list[ast.FunctionDef | ast.ClassDef | None]
    nodes = [cls.methods.get(method) if method else cls.node for cls in lineage]
    node = next((node for node in nodes if node), None)
    paragraph = (ast.get_docstring(node) or "" if node else "").split("\n\n")[0]
    return _SHAPE.sub("", " ".join(paragraph.split()))
