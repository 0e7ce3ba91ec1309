"""The parameters of a method's signature: names, types and defaults, read from the syntax tree."""

from __future__ import annotations

import ast
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gzcli.core.errors import UsageError
from gzcli.models.ranges import range_of
from gzcli.models.sources import ROOT, Class, annotation_of, documented, lineage_of

# Arguments that the engine hands to a method; every other parameter is an option that a user can set.
GIVEN = {"self", "cls", "n", "x", "labels", "noise", "progress", "data", "batch", "batches", "index"}

_ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


@dataclass(frozen=True)
class Param:
    """A parameter of a signature, or a field of a dataclass of options in it.

    annotation: its source text.
    default: None where a value is `required`.
    ours: whether it is of a class that comes with gz.
    doc: text of the field in the docstring of its dataclass.
    """

    name: str
    annotation: str
    default: Any
    required: bool
    ours: bool = field(default=False, compare=False)
    doc: str = field(default="", compare=False)

    @property
    def range(self) -> str | None:
        """The range of its numbers, as `gzcli.recipe.kinds` reads it; None: any."""
        return range_of(self.name, self.annotation, ours=self.ours)


def params_of(function: ast.FunctionDef, path: Path) -> Iterator[Param]:
    """The parameters of a signature; a dataclass of options is replaced by its fields."""
    a, ours = function.args, ROOT in path.parents
    positional = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(positional) - len(a.defaults)) + a.defaults
    for arg, default in [
        *zip(positional, defaults, strict=True),
        *zip(a.kwonlyargs, a.kw_defaults, strict=True),
    ]:
        if isinstance(default, ast.Call) and (group := _group(arg.annotation, path)):
            yield from _fields(group, default, path)
            continue
        value = None if default is None or arg.arg in GIVEN else value_of(default, path)
        yield Param(arg.arg, annotation_of(arg.annotation, path), value, default is None, ours)


def _group(annotation: ast.expr | None, path: Path) -> list[Class]:
    """The dataclass of options that an annotation names, with its bases; [] for any other type."""
    lineage = lineage_of(path, annotation.id) if isinstance(annotation, ast.Name) else []
    return lineage if lineage and lineage[0].is_dataclass else []


def _fields(group: list[Class], default: ast.Call, path: Path) -> Iterator[Param]:
    """The fields of a dataclass of options, with the values that the default of the signature gives them."""
    given = {keyword.arg: value_of(keyword.value, path) for keyword in default.keywords}
    found: dict[str, Param] = {}
    texts: dict[str, str] = {}
    for cls in reversed(group):
        ours = ROOT in cls.path.parents
        texts |= documented(ast.get_docstring(cls.node) or "")
        for line in cls.fields:
            name = line.target.id if isinstance(line.target, ast.Name) else ""
            value = None if line.value is None else value_of(line.value, cls.path)
            kind = annotation_of(line.annotation, cls.path)
            found[name] = Param(name, kind, value, line.value is None, ours)
    for name, param in found.items():
        param = replace(param, doc=texts.get(name, ""))
        yield replace(param, default=given[name], required=False) if name in given else param


def value_of(node: ast.expr, path: Path) -> Any:
    """The value of a literal, or of arithmetic on numbers. Raises UsageError, with its place, for any other
    expression."""
    where = f"{path}:{node.lineno}:{node.col_offset + 1}"
    try:
        return node.value if isinstance(node, ast.Constant) else _computed(node)
    except RecursionError:
        raise UsageError(f"{where}: this is nested too deeply") from None
    except (ValueError, ArithmeticError):
        raise UsageError(
            f"{where}: `{ast.unparse(node)}` must be a literal: recipes are made from it without an import",
            hint="write the value itself: a number, a text, true or false, None, or a tuple of these",
        ) from None


def _computed(node: ast.expr) -> Any:
    """The value of a literal, or of arithmetic on numbers such as `4 * 64`. Raises ValueError for any
    other expression."""
    if isinstance(node, ast.Tuple):
        return tuple(map(_computed, node.elts))
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        left, right = _computed(node.left), _computed(node.right)
        if all(isinstance(side, int | float) for side in (left, right)):
            return _ARITHMETIC[type(node.op)](left, right)
    return ast.literal_eval(node)
