"""Types and ranges by their text: what an annotation of a signature, or of a `Rule`, asks of a value.

Known types are int, float, bool, str, None, Any, Literal[…], tuple[…], list[…] and unions of them by `|`.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from gzcli.core.errors import UsageError, did_you_mean
from gzcli.core.units import WORDS, canonical_size, nearest
from gzcli.recipe.yaml import scalar


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
    if kind == "Any":
        return True, value
    if kind == "None":
        return value is None, None
    if kind == "bool":
        return isinstance(value, bool), value
    if kind == "str":
        return isinstance(value, str), value
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool), value
    if kind == "Size":
        return _convert_size(value)
    if kind == "float":
        ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return ok, float(value) if ok else value
    if kind == "Literal":
        options = [ast.literal_eval(option) for option in _arguments(node)]
        return any(value == option and type(value) is type(option) for option in options), value
    if kind in ("tuple", "list"):
        return _convert_items(node, value)
    return False, value


def _convert_size(value: Any) -> tuple[bool, Any]:
    """Sizes as `sizes.as_size` writes them; numbers of any value, which a range holds."""
    try:
        ok = isinstance(value, int | str) and not isinstance(value, bool)
        return ok, canonical_size(value) if ok else value
    except UsageError:
        return False, value


def _convert_items(node: ast.expr, value: Any) -> tuple[bool, Any]:
    if not isinstance(value, list | tuple):
        return False, value
    kinds = _item_kinds(node, len(value))
    if len(kinds) != len(value):
        return False, value
    items = [convert(kind, item) for kind, item in zip(kinds, value, strict=True)]
    return all(ok for ok, _ in items), [item for _, item in items]


def _item_kinds(node: ast.expr, n: int) -> list[ast.expr]:
    """The type of each of n items: n times X for list[X] and tuple[X, ...]; X, Y for tuple[X, Y]."""
    if not isinstance(node, ast.Subscript):
        return [parse("")] * n
    kinds = _arguments(node)
    if _head(node) == "list" or (isinstance(kinds[-1], ast.Constant) and kinds[-1].value is ...):
        return kinds[:1] * n
    return kinds


def literals(annotation: str) -> list[Any]:
    """The values that a type lists by `Literal`; [] of any other type."""
    return _choices(parse(annotation))


def _choices(node: ast.expr) -> list[Any]:
    """The values of every Literal in a type."""
    return [ast.literal_eval(c) for n in ast.walk(node) if _is_literal(n) for c in _arguments(n)]


def listed(annotation: str) -> list[Any]:
    """The values that a type lists: those of each Literal, true and false of bool; [] where it lists none."""
    node = parse(annotation)
    is_bool = any(isinstance(part, ast.Name) and part.id == "bool" for part in ast.walk(node))
    return [*_choices(node), *((True, False) if is_bool else ())]


def _is_literal(node: ast.AST) -> bool:
    return isinstance(node, ast.Subscript) and _head(node) == "Literal"


_ONE = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "a text", "None": "null"}
_ONE["Size"] = WORDS
_MANY = {"int": "integers", "float": "numbers", "bool": "true or false", "str": "texts"}
_MANY |= {"tuple": "lists", "list": "lists"}
_TRUE_1_1, _FALSE_1_1 = {"yes", "on", "y"}, {"no", "off", "n"}  # in YAML 1.1; texts in YAML 1.2


def words(node: ast.expr) -> str:
    """The type in words."""
    found = []
    for option in _alternatives(node):
        kind = _head(option)
        if kind == "Literal":
            found += [f"`{choice}`" for choice in _choices(option)]
        elif kind in ("tuple", "list") and isinstance(option, ast.Subscript):
            items = _item_kinds(option, 1)
            count = f"{len(items)} " if kind == "tuple" and len(items) > 1 else ""
            choices = ", ".join(f"`{choice}`" for choice in _choices(items[0]))
            of_items = f"out of {choices}" if choices else f"of {count}{_MANY[_head(items[0])]}"
            found.append(f"a list {of_items}")
        else:
            found.append(_ONE.get(kind, kind))
    return " or ".join([", ".join(found[:-1]), found[-1]] if found[:-1] else found)


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
    if isinstance(value, float) and value.is_integer() and convert(node, int(value))[0]:
        return f"write {int(value)}"
    if isinstance(value, str) and any(_head(option) == "Size" for option in _alternatives(node)):
        return f"write {nearest(value)}"
    if isinstance(value, str):
        if value.lower() in _TRUE_1_1 | _FALSE_1_1 and convert(node, True)[0]:
            return f"write {'true' if value.lower() in _TRUE_1_1 else 'false'}"
        if not isinstance(scalar(value), str) and convert(node, scalar(value))[0]:
            return "leave out the quotes"
        items = [scalar(item.strip()) for item in value.split(",")]
        if convert(node, items)[0]:
            return f"write [{', '.join(item.strip() for item in value.split(','))}]"
    if convert(node, [value])[0]:
        return f"write [{value}]"
    choices = [option for option in _choices(node) if isinstance(option, str)]
    odd = next((v for v in (value if isinstance(value, list) else [value]) if v not in choices), None)
    return did_you_mean(odd, choices) if isinstance(odd, str) else None


def is_storable(node: ast.expr) -> bool:
    """Whether a recipe can hold values of the type."""
    for option in _alternatives(node):
        kind = _head(option)
        if kind in ("tuple", "list") and isinstance(option, ast.Subscript):
            if not all(is_storable(item) for item in _item_kinds(option, 1)):
                return False
        elif kind not in ("Any", "None", "bool", "str", "int", "float", "Size", "Literal", "tuple", "list"):
            return False
    return True


_JSON = {"int": "integer", "float": "number", "bool": "boolean", "str": "string", "None": "null"}


def as_json_schema(node: ast.expr, limits: Mapping[str, Any]) -> dict[str, Any]:
    """The type as a JSON schema says it; `limits` are keywords for its numbers, in lists too."""
    found = [_as_one(option, limits) for option in _alternatives(node)]
    return found[0] if len(found) == 1 else {"anyOf": found}


def _as_one(node: ast.expr, limits: Mapping[str, Any]) -> dict[str, Any]:
    kind = _head(node)
    if kind in ("int", "float"):
        return {"type": _JSON[kind], **limits}
    if kind in _JSON:
        return {"type": _JSON[kind]}
    if kind == "Size":
        return {"type": ["integer", "string"], "pattern": r"^\d+(x\d+)?$", **limits}
    if kind == "Literal":
        return {"enum": [ast.literal_eval(option) for option in _arguments(node)]}
    if kind in ("tuple", "list"):
        kinds = _item_kinds(node, 1)
        if len(kinds) > 1:
            items = [as_json_schema(item, limits) for item in kinds]
            return {"type": "array", "items": items, "minItems": len(items), "maxItems": len(items)}
        return {"type": "array", "items": as_json_schema(kinds[0], limits)}
    return {}


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
    values = value if isinstance(value, list) else [value]
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    return range is None or all(map(within(range), numbers))
