"""The mistakes in the source of a model's file, each with its line; nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from gzcli.core.errors import UsageError
from gzcli.models import catalog
from gzcli.models.signatures import GIVEN, Param, params_of
from gzcli.models.sources import Class, lineage_of, tree_of
from gzcli.recipe.kinds import known, parse

RESERVED = {"name"}  # the key of a recipe's `model` that names the model


def mistakes(path: Path) -> list[str]:
    """Sentences with the place, `maf.py:12: …`; [] where the file describes a model."""
    try:
        found = catalog.model_class(path)
        if found is None:
            return [_no_model(path, tree_of(path))]
        wrong = list(_of_methods(found, path))
        if wrong:
            return wrong
        catalog.card_at(path)
    except UsageError as e:
        return [e.message]
    return []


def _no_model(path: Path, tree: ast.Module) -> str:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and any(cls.is_model for cls in lineage_of(path, node.name)):
            lacking = 'needs a line `paper = "…"`, which names its source'
            return f"{path}:{node.lineno}: class `{node.name}` {lacking}"
    return f"{path}: no class here derives from `gzcli.Model`"


def _of_methods(lineage: list[Class], path: Path) -> Iterator[str]:
    """The mistakes in signatures that this very file writes."""
    own = [cls for cls in lineage if cls.path == path]
    for cls in own:
        for name, method in cls.methods.items():
            known = ("__init__", "sample", *catalog.APPLICATIONS)
            if name in known or name.startswith(("score_", "fit_")):
                yield from _of_signature(name, method, path)


def _of_signature(name: str, method: ast.FunctionDef, path: Path) -> Iterator[str]:
    at = f"{path}:{method.lineno}"
    for star, arg in (("*", method.args.vararg), ("**", method.args.kwarg)):
        if arg:
            yield (
                f"{at}: `{name}` takes `{star}{arg.arg}`; name each option: the signature is the "
                "recipe's schema"
            )
    arguments = [*method.args.posonlyargs, *method.args.args, *method.args.kwonlyargs]
    for arg in arguments:
        if arg.arg not in GIVEN and arg.annotation is None:
            yield (
                f"{path}:{arg.lineno}: option `{arg.arg}` of `{name}` has no type; write `{arg.arg}: int = 8`"
            )
        elif name == "__init__" and arg.arg in RESERVED:
            yield f"{path}:{arg.lineno}: `{arg.arg}` cannot be an option: in a recipe it names the model"
    typed = {arg.arg for arg in arguments if arg.annotation is not None}
    try:
        options = [p for p in params_of(method, path) if p.name not in GIVEN and p.name in typed]
    except UsageError as e:
        yield e.message
        return
    for param in options:
        yield from _of_type(name, param, at)


def _of_type(name: str, param: Param, at: str) -> Iterator[str]:
    given = {"Tensor", "Module", "Model"} & set(param.annotation.replace("|", " ").split())
    if not given and not known(parse(param.annotation)):
        yield (
            f"{at}: option `{param.name}` of `{name}` is a `{param.annotation}`, which no recipe can hold; "
            "known are int, float, bool, str, None, Literal[…], tuple[…], list[…] and unions of these by `|`"
        )
