"""The options of a method, read from its signature: names, types, defaults, ranges and texts.

In the zoo a name has one meaning, and so one range, in all models.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from gzcli.core.errors import UsageError
from gzcli.models.sources import ROOT, Class, annotation_of, documented, lineage_of

# Whole numbers; a width of 10⁹ would take all memory.
ANY_INT, COUNT, SIZE = "-1,000,000 … 1,000,000", "0 … 1,000,000", "1 … 1,000,000"
MAY_BE_0 = frozenset(
    (
        *("attention", "blocks", "burn_in", "cells", "channel", "checkerboard", "clusters", "corrector"),
        *("dequant_blocks", "disc_start", "down", "halvings", "keep", "kl_warmup", "pool", "rows"),
    )
)
OF_FLOATS = {
    **dict.fromkeys(("accept", "caption_dropout", "decay", "dynamic", "label_dropout"), "in [0, 1]"),
    **dict.fromkeys(("dropout", "logit", "smoothing", "t_min"), "in [0, 1)"),
    **dict.fromkeys(("min_snr", "sigma", "sigma_max", "step", "tolerance"), "greater than 0"),
}
# Scales that may turn around what they scale.
SIGNED = frozenset(("control_scale", "guidance", "image_guidance", "lora_scale", "pair_guidance"))


def range_of(name: str, annotation: str, *, ours: bool) -> str | None:
    """The range of the numbers of an option; None: any, or it has none.

    annotation: its type.
    ours: whether its model comes with gz; of those of others nothing is known.
    """
    if re.search(r"\bint\b", annotation):
        # HVAE has `groups` for each resolution, some of which are 0
        zero = name in MAY_BE_0 or (name == "groups" and "tuple" in annotation)
        return (COUNT if zero else SIZE) if ours else ANY_INT
    if re.search(r"\bfloat\b", annotation) and ours and name not in SIGNED:
        return OF_FLOATS.get(name, "0 or more")
    return None


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


@cache
def params_of(function: ast.FunctionDef, path: Path) -> tuple[Param, ...]:
    """The parameters of a signature; a dataclass of options is replaced by its fields. Models share most of
    their methods, so each is read once."""
    return tuple(_params(function, path))


def _params(function: ast.FunctionDef, path: Path) -> Iterator[Param]:
    a, ours = function.args, ROOT in path.parents
    positional = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(positional) - len(a.defaults)) + a.defaults
    for arg, default in [
        *zip(positional, defaults, strict=True),
        *zip(a.kwonlyargs, a.kw_defaults, strict=True),
    ]:
        if isinstance(default, ast.Call) and isinstance(arg.annotation, ast.Name):
            group = lineage_of(path, arg.annotation.id)
            if group and group[0].is_dataclass:
                yield from _fields(group, default, path)
                continue
        value = None if default is None or arg.arg in GIVEN else value_of(default, path)
        yield Param(arg.arg, annotation_of(arg.annotation, path), value, default is None, ours)


def _fields(group: list[Class], default: ast.Call, path: Path) -> Iterator[Param]:
    """The fields of a dataclass of options, with the values that the default of the signature gives them."""
    set_here = {keyword.arg: value_of(keyword.value, path) for keyword in default.keywords}
    fields: dict[str, Param] = {}
    texts: dict[str, str] = {}
    for cls in reversed(group):
        ours = ROOT in cls.path.parents
        texts |= documented(ast.get_docstring(cls.node) or "")
        for line in cls.fields:
            name = line.target.id if isinstance(line.target, ast.Name) else ""
            value = None if line.value is None else value_of(line.value, cls.path)
            kind = annotation_of(line.annotation, cls.path)
            fields[name] = Param(name, kind, value, line.value is None, ours)
    for name, param in fields.items():
        param = replace(param, doc=texts.get(name, ""))
        yield replace(param, default=set_here[name], required=False) if name in set_here else param


def value_of(node: ast.expr, path: Path) -> Any:
    """The value of a literal, or of arithmetic on numbers. Raises UsageError, with its place, for any other
    expression."""
    try:
        return node.value if isinstance(node, ast.Constant) else _computed(node)
    except (ValueError, ArithmeticError, RecursionError) as e:
        where = f"{path}:{node.lineno}:{node.col_offset + 1}"
        if isinstance(e, RecursionError):
            raise UsageError(f"{where}: this is nested too deeply") from None
        raise UsageError(
            f"{where}: `{ast.unparse(node)}` must be a literal: recipes are made from it without an import",
            hint="write the value itself: a number, a text, true or false, None, or a tuple of these",
        ) from None


def _computed(node: ast.expr) -> Any:
    """`value_of` an expression. Raises ValueError for one that is neither literal nor arithmetic."""
    if isinstance(node, ast.Tuple):
        return tuple(map(_computed, node.elts))
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        left, right = _computed(node.left), _computed(node.right)
        if all(isinstance(side, int | float) for side in (left, right)):
            return _ARITHMETIC[type(node.op)](left, right)
    return ast.literal_eval(node)
