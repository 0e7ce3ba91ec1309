"""What the options of a model mean, from the docstrings of its file: one option a line, `name: text`.

The text of a class documents its `__init__`, that of a dataclass of options its fields, that of a method its
keywords. Lines that go on are indented. No file is imported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping

from gzcli.models.catalog import ModelCard
from gzcli.models.signatures import Param
from gzcli.models.sources import Class, class_with_bodies, lineage_of, told

Texts = Mapping[str, str]


def options(card: ModelCard) -> dict[str, Texts]:
    """The text of each option of a model: `model`, `sample`, `ood` and, by its name, each application.

    An option that a method does not document means what it means in `sample`, else in the class.
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
    found = {}
    for name, param in params.items():
        text = next(
            (texts[name] for texts in ({name: param.doc} if param.doc else {}, *sources) if name in texts),
            None,
        )
        if text:
            found[name] = text
    return found


def _merged(parts: Iterable[Texts]) -> dict[str, str]:
    """All texts; of two of one option the first."""
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
    return told(ast.get_docstring(node) or "")
