"""Recipes as YAML that every reader understands alike, whether it follows YAML 1.1 or 1.2."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from gzcli.recipe.load import Key, scalar

# Words that need no quotes in any place of any YAML: no sign, no colon, no comma, no bracket.
_PLAIN = re.compile(r"[A-Za-z_/]([A-Za-z0-9_./+ -]*[A-Za-z0-9_./+-])?")
# Words that the specification of YAML 1.1 takes for other values; PyYAML takes some of them for texts.
_BOOL_1_1 = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}
_RESOLVER_1_1 = yaml.resolver.Resolver()


def dump(tree: Mapping[str, Any]) -> str:
    """The tree in its own order: a block for each section, lists in one line. Every value reads back as it
    is."""
    return "".join(f"{line}\n" for _, line in lines(tree)) or "{}\n"


def lines(tree: Mapping[str, Any], at: Key = ()) -> Iterator[tuple[Key, str]]:
    """The lines of the text, each with the keys that lead to it."""
    indent = "  " * len(at)
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield (*at, key), f"{indent}{_text(key)}:"
            yield from lines(value, (*at, key))
        else:
            yield (*at, key), f"{indent}{_text(key)}: {flow(value)}"


def flow(value: Any) -> str:
    """A value in one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_text(k)}: {flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(flow, value)) + "]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, str):
        return _text(value)
    raise TypeError(f"{type(value).__name__} has no place in a recipe: {value!r}")


def _float(value: float) -> str:
    """YAML 1.1 wants a dot, and a sign in the exponent: 1e-05 is written 1.0e-05."""
    text = repr(value)
    if text in ("inf", "-inf", "nan"):
        return text.replace("inf", ".inf").replace("nan", ".nan")
    mantissa, e, exponent = text.partition("e")
    return (mantissa if "." in mantissa else f"{mantissa}.0") + e + exponent


def _text(text: str) -> str:
    """Plain where every reader takes it for a string, else in double quotes with YAML's escapes."""
    plain = (
        _PLAIN.fullmatch(text)
        and text.lower() not in _BOOL_1_1
        and isinstance(scalar(text), str)
        and _RESOLVER_1_1.resolve(yaml.ScalarNode, text, (True, False)) == "tag:yaml.org,2002:str"
    )
    return text if plain else '"' + "".join(map(_escape, text)) + '"'


def _escape(c: str) -> str:
    if c in '"\\':
        return "\\" + c
    if c.isprintable():
        return c
    code = ord(c)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
