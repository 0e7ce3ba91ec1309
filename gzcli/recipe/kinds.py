"""Types and ranges by their text: what an annotation of a signature, or of a `Rule`, asks of a value.

Known types are int, float, bool, str, None, Any, Size, Literal[…], tuple[…], list[…] and unions of them by
`|`.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

from gzcli.core.errors import UsageError, did_you_mean
from gzcli.core.units import WORDS, canonical_size, nearest
from gzcli.recipe.yaml import scalar


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Scalar(NamedTuple):
    """A type without brackets.

    accepts: whether a value is of the type.
    words: the type in words.
    many: a list of the type in words.
    json: its name in a JSON schema.
    """

    accepts: Callable[[Any], bool]
    words: str
    many: str = ""
    json: str | None = None


SCALARS = {
    "Any": Scalar(lambda value: True, "Any"),
    "None": Scalar(lambda value: value is None, "null", json="null"),
    "bool": Scalar(lambda value: isinstance(value, bool), "true or false", "true or false", "boolean"),
    "str": Scalar(lambda value: isinstance(value, str), "a text", "texts", "string"),
    "int": Scalar(
        lambda value: _number(value) and isinstance(value, int), "an integer", "integers", "integer"
    ),
    "float": Scalar(lambda value: _number(value) and math.isfinite(value), "a number", "numbers", "number"),
    "Size": Scalar(lambda value: isinstance(value, int | str) and not isinstance(value, bool), WORDS),
}
_TRUE_1_1, _FALSE_1_1 = {"yes", "on", "y"}, {"no", "off", "n"}  # in YAML 1.1; texts in YAML 1.2


# --- the parts of a type ---


@cache
def parse(annotation: str) -> ast.expr:
    """The syntax tree of a type; of an empty text that of Any."""
    return ast.parse(annotation or "Any", mode="eval").body


def _alternatives(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return [*_alternatives(node.left), *_alternatives(node.right)]
    return [node]


def _arguments(node: ast.AST) -> list[ast.expr]:
    """The types or values in the brackets of a type."""
    if not isinstance(node, ast.Subscript):
        return []
    return node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]


def _head(node: ast.expr) -> str:
    """The name of a type without its brackets: int, None, Literal, tuple, …"""
    if isinstance(node, ast.Subscript):
        return _head(node.value)
    if isinstance(node, ast.Name):
        return node.id
    return str(node.value) if isinstance(node, ast.Constant) else ast.unparse(node)


def _item_kinds(node: ast.expr, n: int) -> list[ast.expr]:
    """The type of each of n items: n times X for list[X] and tuple[X, ...]; X, Y for tuple[X, Y]."""
    kinds = _arguments(node) or [parse(""), ast.Constant(...)]
    if _head(node) == "list" or (isinstance(kinds[-1], ast.Constant) and kinds[-1].value is ...):
        return kinds[:1] * n
    return kinds


def _choices(node: ast.expr) -> list[Any]:
    """The values of every Literal in a type."""
    literals = (n for n in ast.walk(node) if isinstance(n, ast.Subscript) and _head(n) == "Literal")
    return [ast.literal_eval(choice) for literal in literals for choice in _arguments(literal)]


def literals(annotation: str) -> list[Any]:
    """The values that a type lists by `Literal`; [] of any other type."""
    return _choices(parse(annotation))


def listed(annotation: str) -> list[Any]:
    """The values that a type lists: those of each Literal, true and false of bool; [] where it lists none."""
    node = parse(annotation)
    is_bool = any(isinstance(part, ast.Name) and part.id == "bool" for part in ast.walk(node))
    return [*_choices(node), *((True, False) if is_bool else ())]


def is_storable(node: ast.expr) -> bool:
    """Whether a recipe can hold values of the type."""
    if len(options := _alternatives(node)) > 1:
        return all(map(is_storable, options))
    if _head(node) in ("tuple", "list"):
        return all(map(is_storable, _item_kinds(node, 1)))
    return _head(node) in (*SCALARS, "Literal")


# --- values ---


def convert(node: ast.expr, value: Any) -> tuple[bool, Any]:
    """Whether the value is of the type, and the value in it: a list for a tuple, a float for a whole
    number."""
    for option in _alternatives(node):
        ok, converted = _convert_one(option, value)
        if ok:
            return True, converted
    return False, value


def _convert_one(node: ast.expr, value: Any) -> tuple[bool, Any]:
    kind = _head(node)
    if kind == "Literal":
        return any(value == choice and type(value) is type(choice) for choice in _choices(node)), value
    if kind in ("tuple", "list"):
        if not isinstance(value, list | tuple) or len(kinds := _item_kinds(node, len(value))) != len(value):
            return False, value
        items = [convert(kind, item) for kind, item in zip(kinds, value, strict=True)]
        return all(ok for ok, _ in items), [item for _, item in items]
    if kind not in SCALARS or not SCALARS[kind].accepts(value):
        return False, value
    try:  # a size may have any value, which a range holds
        return True, float(value) if kind == "float" else canonical_size(value) if kind == "Size" else value
    except UsageError:
        return False, value


def words(node: ast.expr) -> str:
    """The type in words."""
    options: list[str] = []
    for option in _alternatives(node):
        kind = _head(option)
        if kind == "Literal":
            options += [f"`{choice}`" for choice in _choices(option)]
        elif kind in ("tuple", "list") and isinstance(option, ast.Subscript):
            items = _item_kinds(option, 1)
            count = f"{len(items)} " if kind == "tuple" and len(items) > 1 else ""
            choices, of = ", ".join(f"`{choice}`" for choice in _choices(items[0])), _head(items[0])
            many = SCALARS[of].many if of in SCALARS else "lists"
            options.append(f"a list out of {choices}" if choices else f"a list of {count}{many}")
        else:
            options.append(SCALARS[kind].words if kind in SCALARS else kind)
    return " or ".join([", ".join(options[:-1]), options[-1]] if options[:-1] else options)


def shown(value: Any) -> str:
    """A value as messages show it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the text `{value}`"
    return "a map" if isinstance(value, Mapping) else f"`{value}`"


def advice(node: ast.expr, value: Any) -> str | None:
    """A hint at what to write instead; None where it cannot be guessed."""

    def suits(other: Any) -> bool:
        return convert(node, other)[0]

    if isinstance(value, float) and value.is_integer() and suits(int(value)):
        return f"write {int(value)}"
    if isinstance(value, str):
        if any(_head(option) == "Size" for option in _alternatives(node)):
            return f"write {nearest(value)}"
        if value.lower() in _TRUE_1_1 | _FALSE_1_1 and suits(True):
            return f"write {'true' if value.lower() in _TRUE_1_1 else 'false'}"
        if not isinstance(scalar(value), str) and suits(scalar(value)):
            return "leave out the quotes"
        items = [item.strip() for item in value.split(",")]
        if suits([*map(scalar, items)]):
            return f"write [{', '.join(items)}]"
    if suits([value]):
        return f"write [{value}]"
    choices = [choice for choice in _choices(node) if isinstance(choice, str)]
    odd = next(
        (item for item in (value if isinstance(value, list) else [value]) if item not in choices), None
    )
    return did_you_mean(odd, choices) if isinstance(odd, str) else None


def as_json_schema(node: ast.expr, limits: Mapping[str, Any]) -> dict[str, Any]:
    """The type as a JSON schema says it; `limits` are keywords for its numbers, in lists too."""
    if len(options := _alternatives(node)) > 1:
        return {"anyOf": [as_json_schema(option, limits) for option in options]}
    kind = _head(node)
    if kind == "Size":
        return {"type": ["integer", "string"], "pattern": r"^\d+(x\d+)?$", **limits}
    if kind == "Literal":
        return {"enum": _choices(node)}
    if kind in ("tuple", "list"):
        items = [as_json_schema(item, limits) for item in _item_kinds(node, 1)]
        if len(items) > 1:
            return {"type": "array", "items": items, "minItems": len(items), "maxItems": len(items)}
        return {"type": "array", "items": items[0]}
    if kind not in SCALARS or SCALARS[kind].json is None:
        return {}
    return {"type": SCALARS[kind].json, **(limits if kind in ("int", "float") else {})}


# --- ranges ---

RANGES: dict[str, Callable[[float], bool]] = {
    "greater than 0": lambda v: v > 0,
    "0 or more": lambda v: v >= 0,
    "1 or more": lambda v: v >= 1,
    "in [0, 1]": lambda v: 0 <= v <= 1,
    "in [0, 1)": lambda v: 0 <= v < 1,
}


def bounds(range: str) -> tuple[int, int]:
    """The least and the largest number of a range such as `2 … 256`."""
    low, high = (int(text.replace(",", "")) for text in range.split(" … "))
    return low, high


def within(range: str) -> Callable[[float], bool]:
    """Whether a number lies in a range: one of RANGES, or one that `bounds` reads."""
    if range in RANGES:
        return RANGES[range]
    low, high = bounds(range)
    return lambda v: low <= v <= high


def in_range(value: Any, range: str | None) -> bool:
    """Whether all numbers of a value lie in a range; None: any."""
    numbers = filter(_number, value if isinstance(value, list) else [value])
    return range is None or all(map(within(range), numbers))
