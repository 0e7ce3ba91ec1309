"""Classes of models as their files declare them, with their bases in other files, without an import."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from typing import Any, TypeVar

from gzcli.core.errors import MissingError, UsageError
from gzcli.store.model_files import program

ROOT = Path(__file__).resolve().parent

DEEPEST = 400  # names, unions and brackets of a type
_DEF = re.compile(r"( *)def ")
_ITEM = re.compile(r"([A-Za-z_]\w*): +(\S.*)")

T = TypeVar("T")


def stamp(path: Path) -> int:
    """When a file from outside the package, which may be edited while gz runs, was changed; 0 inside."""
    return 0 if str(path).startswith(f"{ROOT}/") else path.stat().st_mtime_ns


def by_file(function: Callable[[Path], T]) -> Callable[[Path], T]:
    """Caches a function of a file until the file changes.

    Raises UsageError for a file that is no Python, MissingError for one that cannot be read.
    """
    values: dict[tuple[Path, int], T] = {}

    @wraps(function)
    def cached(path: Path) -> T:
        try:
            key = path, stamp(path)
            if key not in values:
                values[key] = function(path)
            return values[key]
        except SyntaxError as e:
            raise UsageError(f"{path}:{e.lineno or 1}: {e.msg}") from e
        except (RecursionError, MemoryError) as e:  # what Python's parser says of 5,000 signs in a row
            raise UsageError(f"`{path}` is nested too deeply for Python") from e
        except ValueError as e:  # bytes that are no UTF-8
            raise UsageError(f"`{path}` is no Python file: {e}") from e
        except OSError as e:
            raise MissingError(f"`{path}` cannot be read: {e.strerror}") from e

    cached.cache = values  # type: ignore[attr-defined]
    return cached


@dataclass(frozen=True)
class Class:
    """A class in a file; without the bodies of its methods, unless it is read by `class_with_bodies`."""

    node: ast.ClassDef
    path: Path

    @property
    def is_model(self) -> bool:
        return self.node.name == "Model" and self.path == ROOT / "base.py"

    @property
    def methods(self) -> dict[str, ast.FunctionDef]:
        """Methods by name; none for `Model` itself, whose methods are the protocol and no capability."""
        return {} if self.is_model else {m.name: m for m in self.node.body if isinstance(m, ast.FunctionDef)}

    @property
    def is_dataclass(self) -> bool:
        names = (node.func if isinstance(node, ast.Call) else node for node in self.node.decorator_list)
        return any(isinstance(node, ast.Name) and node.id == "dataclass" for node in names)

    @property
    def fields(self) -> list[ast.AnnAssign]:
        """The annotated attributes, which are the fields of a dataclass."""
        return [line for line in self.node.body if isinstance(line, ast.AnnAssign)]

    @property
    def attributes(self) -> dict[str, ast.expr]:
        """Class attributes that have a value, by name."""
        return _values(self.node.body)


@dataclass(frozen=True)
class _Module:
    classes: dict[str, ast.ClassDef]
    values: dict[str, ast.expr]  # of names: types written with brackets or `|`, and tables
    imports: dict[str, tuple[str, str]]  # name here → (module of gzcli, name there)


def _values(lines: list[ast.stmt]) -> dict[str, ast.expr]:
    """The names that are assigned to, with their values; a `TypeAlias` stays a type of its own name."""
    values: dict[str, ast.expr] = {}
    for line in lines:
        if isinstance(line, ast.Assign):
            values |= {t.id: line.value for t in line.targets if isinstance(t, ast.Name)}
        elif isinstance(line, ast.AnnAssign) and line.value and isinstance(line.target, ast.Name):
            alias = isinstance(line.annotation, ast.Name) and line.annotation.id == "TypeAlias"
            values |= {} if alias else {line.target.id: line.value}
    return values


@by_file
def _module(path: Path) -> _Module:
    try:
        tree = ast.parse(_outline(text_of(path)))
    except SyntaxError:
        tree = tree_of(path)
    package = ["gzcli", *path.parent.relative_to(ROOT.parent).parts] if ROOT.parent in path.parents else []
    imports: dict[str, tuple[str, str]] = {}
    # also those for type checkers alone
    for node in (line for top in tree.body for line in (top.body if isinstance(top, ast.If) else [top])):
        if isinstance(node, ast.ImportFrom):
            origin = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*origin, *([node.module] if node.module else [])])
            if source.split(".")[0] == "gzcli":
                imports |= {alias.asname or alias.name: (source, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):  # `import gzcli`, then `gzcli.Model`
            imports |= {a.asname or "gzcli": ("gzcli", "") for a in node.names if a.name == "gzcli"}
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    return _Module(classes, _values(tree.body), imports)


def _outline(text: str) -> str:
    """The text without the bodies of its functions, line numbers kept: parsed in a fifth of the time.

    A string that spans lines may mislead it. Then the result does not parse, and the caller parses the whole
    text.
    """
    lines, open_brackets, indent = [], 0, 0
    body = None  # the indentation of the function whose body is left out
    for line in text.split("\n"):
        start = _DEF.match(line)
        if open_brackets or (start and (body is None or len(start[1]) <= body)):
            indent = len(start[1]) if start and not open_brackets else indent
            code = line.partition("#")[0].rstrip()
            open_brackets += sum(map(code.count, "([{")) - sum(map(code.count, ")]}"))
            ends = not open_brackets and code.endswith(":")
            lines.append(f"{code} ..." if ends else line)
            body = indent if ends else None
        elif body is not None and (not line.strip() or len(line) - len(line.lstrip()) > body):
            lines.append("")
        else:
            body = None
            lines.append(line)
    return "\n".join(lines)


@by_file
def text_of(path: Path) -> str:
    return program(path).decode("utf-8-sig")


@by_file
def tree_of(path: Path) -> ast.Module:
    """The syntax tree of a whole file."""
    return ast.parse(text_of(path), str(path))


@cache
def _file_of(root: Path, module: str) -> Path | None:
    """The file of a module of gzcli; None where there is none."""
    file = root.parent.joinpath(*module.split(".")[1:])
    return next((p for p in (file.with_suffix(".py"), file / "__init__.py") if p.is_file()), None)


def lineage_of(path: Path, name: str) -> list[Class]:
    """The class and its bases, nearest first, in the order in which Python looks up a method; without bases
    from outside gzcli."""
    module = _module(path)
    if name not in module.classes:
        source, there = module.imports.get(name, ("", ""))
        file = _file_of(ROOT, source) if source else None
        return lineage_of(file, there) if file else []
    node = module.classes[name]
    line = [Class(node, path)]
    for base in node.bases:
        if isinstance(base, ast.Name):
            line += lineage_of(path, base.id)
        elif isinstance(base, ast.Attribute) and isinstance(base.value, ast.Name):  # vae.Vae
            origin = module.imports.get(base.value.id)
            if origin and (file := _file_of(ROOT, ".".join(filter(None, origin)))):
                line += lineage_of(file, base.attr)
    # A base that two branches share comes after both, as in Python's own order.
    return [cls for i, cls in enumerate(line) if all(cls.node is not later.node for later in line[i + 1 :])]


def classes_of(path: Path) -> list[str]:
    """The names of the classes that the file defines, in order."""
    return list(_module(path).classes)


def class_with_bodies(cls: Class) -> Class:
    """The class with the bodies of its methods."""
    whole = (node for node in tree_of(cls.path).body if isinstance(node, ast.ClassDef))
    return Class(next(node for node in whole if node.name == cls.node.name), cls.path)


def _value(path: Path, name: str) -> tuple[ast.expr, Path] | None:
    """What a name of a file stands for, and the file that says so."""
    module = _module(path)
    if name in module.imports:
        source, there = module.imports[name]
        file = _file_of(ROOT, source)
        return _value(file, there) if file else None
    return (module.values[name], path) if name in module.values else None


def annotation_of(node: ast.expr | None, path: Path) -> str:
    """The annotation's text, with aliases (`Spacing = Literal[…]`) replaced by the types, and a choice from a
    table, `Annotated[str, TABLE, "more"]`, by the `Literal` of the table's keys and what comes after.

    Raises UsageError for one that is nested too deeply to be taken apart.
    """
    if node is None:
        return ""
    parts = list(ast.walk(node))
    if len(parts) > DEEPEST:
        raise UsageError(f"{path}:{node.lineno}: a type of more than {DEEPEST} parts")
    names = {part.id for part in parts if isinstance(part, ast.Name)}
    if "Annotated" in names or any(_value(path, name) for name in names):
        return ast.unparse(_Resolved(path).visit(node))
    line = _lines(path)[node.lineno - 1]
    # columns count bytes, so they are those of the text in ASCII alone; `unparse` takes ten times as long
    if node.lineno == node.end_lineno and line.isascii():
        return line[node.col_offset : node.end_col_offset]
    return ast.unparse(node)


@by_file
def _lines(path: Path) -> list[str]:
    return text_of(path).split("\n")


class _Resolved(ast.NodeTransformer):
    """Replaces the aliases and the tables in an annotation of a file."""

    def __init__(self, path: Path):
        self.path = path

    def visit_Name(self, node: ast.Name) -> ast.expr:
        value, path = _value(self.path, node.id) or (node, self.path)
        return _Resolved(path).visit(value) if isinstance(value, ast.Subscript | ast.BinOp) else node

    def visit_Subscript(self, node: ast.Subscript) -> Any:
        if isinstance(node.value, ast.Name) and node.value.id == "Annotated":
            _, *choices = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            names = dict.fromkeys(name for choice in choices for name in _keys(choice, self.path))
            return ast.parse(f"Literal[{', '.join(map(repr, names))}]", mode="eval").body
        return self.generic_visit(node)


def _keys(node: ast.expr | None, path: Path) -> list[str]:
    """The texts that are keys of a table, `{"a": …, **OTHER} | MORE`, or a single text."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.Name):
        value, there = _value(path, node.id) or (None, path)
        return _keys(value, there)
    if isinstance(node, ast.BinOp):
        return _keys(node.left, path) + _keys(node.right, path)
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return [name for key, value in pairs for name in _keys(value if key is None else key, path)]
    return []


def documented(docstring: str) -> dict[str, str]:
    """The parameters that a cleaned docstring documents, each with its text in one line."""
    texts: dict[str, str] = {}
    name = None
    for line in docstring.splitlines():
        if item := _ITEM.fullmatch(line):
            name, texts[item[1]] = item[1], item[2]
        elif name and line.startswith("  ") and line.strip():
            texts[name] += " " + line.strip()
        else:
            name = None
    return texts
