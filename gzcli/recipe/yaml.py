"""Reads and writes the YAML of recipes, in the core schema of YAML 1.2.2 (§10.3), with the position of every
key and value.

PyYAML follows YAML 1.1, in which `1e-4` is a string, `no` is false, `010` is 8, `12:30` is 750, and the last
of two equal keys silently wins. Here `1e-4` is a float, `no` and `12:30` are strings, `010` is 10, and equal
keys are a mistake. Aliases, merge keys and tags are refused, so that a recipe can be read from top to bottom.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from gzcli.core.errors import UsageError

Key = tuple[Any, ...]  # ("train", "steps"), ("optim", "betas", 0)
WRONG = object()  # replaces a value whose problem is already recorded

_TAG = "tag:yaml.org,2002:"
_NULL = {"null", "Null", "NULL", "~", ""}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]{1,30}")
_BASE = re.compile(r"0o[0-7]{1,30}|0x[0-9a-fA-F]{1,30}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class Mark(NamedTuple):
    """A place in a file, counted from 1."""

    line: int
    column: int


@dataclass(frozen=True)
class Problem:
    """A mistake in a recipe; `where` is its position, such as `my.yaml:3:7` or `--steps`."""

    where: str
    message: str
    hint: str | None = None

    @property
    def text(self) -> str:
        """The place and the message, without the hint."""
        return f"{self.where}: {self.message}" if self.where else self.message

    def __str__(self) -> str:
        return self.text + (f" ({self.hint})" if self.hint else "")


MAX_RECIPE_BYTES = 1_000_000  # most bytes of a recipe; the longest of the zoo has 5,000


@dataclass
class Document:
    """A parsed YAML text, with the position of each key and value. `name` is its name in messages."""

    name: str
    tree: Any = None
    keys: dict[Key, Mark] = field(default_factory=dict)
    values: dict[Key, Mark] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def mark(self, path: Key, *, value: bool = False) -> Mark:
        """The position of a key or of its value; if it is not written out, that of the closest enclosing
        value."""
        first, second = (self.values, self.keys) if value else (self.keys, self.values)
        while path and path not in first and path not in second:
            path = path[:-1]
        return first.get(path) or second.get(path) or Mark(1, 1)

    def where(self, path: Key, *, value: bool = False) -> str:
        """The position as text, such as `my.yaml:3:7`."""
        mark = self.mark(path, value=value)
        return f"{self.name}:{mark.line}:{mark.column}"


def read_text(text: str, name: str) -> Document:
    """Parses one document and collects the mistakes in its content. Raises UsageError with `file:line:column`
    if the text is not YAML."""
    document = Document(name)
    try:
        node = yaml.compose(text, Loader=_Loader)
    except UnicodeEncodeError as e:
        raise UsageError(f"{name}: not valid UTF-8: {e.reason}") from None
    except yaml.reader.ReaderError as e:
        before = text.encode()[: e.position].decode(errors="ignore")
        line, column = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
        raise UsageError(f"{name}:{line}:{column}: {e.reason}") from None
    except yaml.MarkedYAMLError as e:
        at, problem = e.problem_mark or e.context_mark or yaml.Mark(name, 0, 0, 0, None, 0), e.problem or ""
        words = next((words for form, words in _WORDS.items() if re.fullmatch(form, problem)), problem)
        lines = text.splitlines()
        if at.line < len(lines) and lines[at.line][at.column : at.column + 1] == "\t":
            words = TAB
        hint = next((hint for part, hint in _HINTS.items() if part in problem), None)
        message = f"{name}:{at.line + 1}:{at.column + 1}: {words or 'this is not valid YAML'}"
        raise UsageError(message, hint=hint) from None
    if node is not None:
        document.tree = _Reader(document).read(node, ())
    return document


def read_file(path: Path, name: str | None = None) -> Document:
    """Parses a file. Raises UsageError if it cannot be read or is not YAML."""
    name = name or str(path)
    try:
        if (size := path.stat().st_size) > MAX_RECIPE_BYTES:
            most = f"a recipe may be at most {MAX_RECIPE_BYTES / 1e6:g} MB"
            raise UsageError(f"{name}: it is {size / 1e6:,.1f} MB, but {most}")
        return read_text(path.read_text(encoding="utf-8-sig"), name)
    except UnicodeDecodeError as e:
        raise UsageError(f"{name}: not valid UTF-8: {e.reason} at byte {e.start}") from None
    except OSError as e:
        raise UsageError(f"{name}: {(e.strerror or str(e)).lower()}") from None


def load(path: Path) -> dict[str, Any]:
    """The plain content of a YAML file that contains a map. Raises UsageError that lists all its mistakes."""
    document = read_file(path)
    if document.problems:
        raise refusal(document.problems)
    if not isinstance(document.tree, dict):
        raise UsageError(f"{path}: not a map of keys to values")
    return document.tree


def in_order(problems: Iterable[Problem]) -> list[Problem]:
    """Each problem once, file by file and from top to bottom; those of the command line last."""
    files: dict[str, int] = {}

    def place(problem: Problem) -> tuple[int, ...]:
        name, *at = problem.where.rsplit(":", 2)
        marks = tuple(map(int, at)) if len(at) == 2 and all(map(str.isdecimal, at)) else ()
        return (files.setdefault(name, len(files)), *marks) if marks else (sys.maxsize,)

    return sorted(dict.fromkeys(problems), key=place)


def refusal(problems: Iterable[Problem]) -> UsageError:
    """One error that lists all the problems."""
    problems = in_order(problems)
    if len(problems) == 1:
        return UsageError(problems[0].text, hint=problems[0].hint)
    return UsageError("\n  ".join([f"{len(problems)} mistakes", *map(str, problems)]))


def scalar(text: str) -> Any:
    """The value of a plain scalar in the core schema."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text):
        return int(text)
    if _BASE.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _SPECIAL.fullmatch(text):
        return float(text.replace(".", "").lower())
    return text


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """libyaml's parser, if PyYAML was built with it. It is ten times as fast and yields the same nodes and
    marks."""

    def resolve(self, kind: type, value: Any, implicit: Any) -> str:
        """Plain scalars get a special tag, so that `scalar` decides their type."""
        plain = kind is yaml.ScalarNode and implicit[0]
        return f"{_TAG}plain" if plain else super().resolve(kind, value, implicit)


class _Reader:
    """Converts nodes to values, and records positions and mistakes in the document."""

    def __init__(self, document: Document):
        self.document = document
        self.seen: set[int] = set()

    def read(self, node: yaml.Node, path: Key) -> Any:
        # An alias composes to the very node of its anchor; refusing it also stops loops and exponential
        # growth.
        if id(node) in self.seen:
            return self._problem(self.document.mark(path), "aliases are not supported", "write the value out")
        self.seen.add(id(node))
        self.document.values[path] = mark = _mark(node)
        if node.tag.removeprefix(_TAG) not in ("map", "seq", "str", "plain"):
            message = f"the tag `{node.tag.replace(_TAG, '!!')}` is not supported"
            return self._problem(mark, message, "remove it")
        if isinstance(node, yaml.MappingNode):
            return self._map(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, (*path, i)) for i, item in enumerate(node.value)]
        return node.value if node.tag == f"{_TAG}str" else self._scalar(node.value, mark)

    def _map(self, node: yaml.MappingNode, path: Key) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            mark = _mark(key_node)
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else ""
            plain, here = key_node.tag == f"{_TAG}plain", (*path, key)
            if not key or (plain and not isinstance(scalar(key), str)):
                self._problem(mark, "a key must be a word", f'write `"{key}"`' if key else None)
            elif key == "<<" and plain:
                self._problem(mark, "merge keys are not supported", "write the values out")
            elif key in values:
                first = self.document.keys[here].line
                message = f"the key `{key}` is already on line {first}"
                self._problem(mark, message, "remove one of them")
            else:
                self.document.keys[here] = mark
                values[key] = self.read(value_node, here)
        return values

    def _scalar(self, text: str, mark: Mark) -> Any:
        plain = text.replace("_", "")
        if plain != text and text[0] != "_" and _FLOAT.fullmatch(plain):
            return self._problem(mark, f"`{text}` is not a number", f"write {plain}")
        if len(text) > 30 and text.lstrip("-+").isdigit():
            return self._problem(mark, "this number is too long")
        return scalar(text)

    def _problem(self, mark: Mark, message: str, hint: str | None = None) -> object:
        where = f"{self.document.name}:{mark.line}:{mark.column}"
        self.document.problems.append(Problem(where, message, hint))
        return WRONG


def _mark(node: yaml.Node) -> Mark:
    return Mark(node.start_mark.line + 1, node.start_mark.column + 1)


TAB = "a tab where only spaces are allowed"
# A message of libyaml (PyYAML's own parser words it differently) → what it means.
_WORDS = {
    r"found a tab character.*": TAB,
    r"found character (that|'.' that) cannot start any token": "a value cannot begin with this character",
    r"mapping values are not allowed.*": "a colon that is not allowed here",
    r"(did not find )?expected ',' or '\].*": "a list that is not closed: `]` or `,` is missing",
    r"(did not find )?expected ',' or '\}.*": "a map that is not closed: `}` or `,` is missing",
    r".*expected (key|<block end>.*)": "a line with a different indentation from its neighbours",
    r"did not find expected '-' indicator": "a list item without its `-`",
    r"(could|did) not find expected ':'": "a key without its colon",
    r"found unexpected end of stream": "a quote that is not closed",
    r"found unexpected document indicator": "a quote that is not closed before `---`",
    r"did not find expected node content|expected the node content.*": "a value is missing",
    r"found undefined alias.*": "an undefined alias (`*`)",
    r"(but )?found another document": "a second document",
    r".*expected .?<document start>.*": "text after the end of the recipe",
    r"found unknown escape character.*": "an unknown `\\` escape in double quotes",
    r"did not find expected alphabetic or numeric character.*": "a name is missing after `*`, `&` or `!`",
}


_HINTS = {
    "tab": "indent with spaces, and quote a value that begins with a character such as `@`",
    "token": "indent with spaces, and quote a value that begins with a character such as `@`",
    "mapping values are not allowed": "quote a value that contains a colon, or check the indentation",
    "document": "remove `---`: a recipe is one document",
}


# --- writing ---

# Words that need no quotes anywhere in any YAML: without signs, colons, commas and brackets.
_PLAIN = re.compile(r"[A-Za-z_/]([A-Za-z0-9_./+ -]*[A-Za-z0-9_./+-])?")
# Words that the specification of YAML 1.1 takes for other values; PyYAML takes some of them for texts.
_BOOL_1_1 = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}
_RESOLVER_1_1 = yaml.resolver.Resolver()
SURROGATE = re.compile("[\ud800-\udfff]")


def dump(tree: Mapping[str, Any]) -> str:
    """The tree as YAML that means the same in versions 1.1 and 1.2: one block per section, lists on one
    line."""
    return "".join(f"{line}\n" for _, line in lines(tree)) or "{}\n"


def lines(tree: Mapping[str, Any], at: Key = ()) -> Iterator[tuple[Key, str]]:
    """The lines of `dump`, each with the keys that lead to it."""
    indent = "  " * len(at)
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield (*at, key), f"{indent}{_text(key)}:"
            yield from lines(value, (*at, key))
        else:
            yield (*at, key), f"{indent}{_text(key)}: {flow(value)}"


def flow(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_text(k)}: {flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(flow, value)) + "]"
    if value is None or isinstance(value, int):  # True and False are integers of Python
        return json.dumps(value)
    if isinstance(value, float):
        # YAML 1.1 wants a dot, and a sign in the exponent: 1e-05 is written 1.0e-05
        mantissa, e, exponent = repr(value).partition("e")
        if not math.isfinite(value):
            return mantissa.replace("inf", ".inf").replace("nan", ".nan")
        return (mantissa if "." in mantissa else f"{mantissa}.0") + e + exponent
    if isinstance(value, str):
        return _text(value)
    raise TypeError(f"a recipe cannot contain a {type(value).__name__}: {value!r}")


def check_text(text: str) -> None:
    """Raises UsageError for the name of a file that is not UTF-8, for which YAML has no escape."""
    if SURROGATE.search(text):
        hint = "rename it, or give it a name: gz data import PATH --name NAME"
        raise UsageError(f"a recipe cannot contain `{text}`, which is not UTF-8", hint=hint)


def _text(text: str) -> str:
    """A string: plain if every reader takes it for a string, otherwise in double quotes with YAML's
    escapes."""
    check_text(text)
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
