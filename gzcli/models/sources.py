"""Classes of models as their files declare them, with their bases in other files, without an import."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from gzcli.core.errors import MissingError, UsageError
from gzcli.store.model_files import program

ROOT = Path(__file__).resolve().parent

# frequent names of types that are no aliases
_NO_ALIAS = {"int", "float", "bool", "str", "None", "Any", "Literal", "tuple", "list"}
_NO_ALIAS |= {"Tensor", "Noise", "Progress"}
DEEPEST = 400  # names, unions and brackets of a type
_DEF = re.compile(r"( *)def ")
_ITEM = re.compile(r"([A-Za-z_]\w*): +(\S.*)")

T = TypeVar("T")


def stamp(path: Path) -> int:
    """The time of change of a file from outside the package, which may be edited while gz runs; 0 for a file
    inside."""
    return 0 if ROOT in path.parents else path.stat().st_mtime_ns


class by_file(Generic[T]):  # noqa: N801
    """A decorator that caches a function of a file until the file changes.

    Raises UsageError for a file that is no Python, MissingError for one that cannot be read.
    """

    def __init__(self, function: Callable[[Path], T]):
        self.function = function
        self.known: dict[tuple[Path, int], T] = {}

    def __call__(self, path: Path) -> T:
        try:
            key = path, stamp(path)
            if key not in self.known:
                self.known[key] = self.function(path)
            return self.known[key]
        except SyntaxError as e:
            raise UsageError(f"{path}:{e.lineno or 1}: {e.msg}") from e
        except (RecursionError, MemoryError) as e:  # what Python's parser says of 5,000 signs in a row
            raise UsageError(f"`{path}` is nested too deeply for Python") from e
        except ValueError as e:  # bytes that are no UTF-8
            raise UsageError(f"`{path}` is no Python file: {e}") from e
        except OSError as e:
            raise MissingError(f"`{path}` cannot be read: {e.strerror}") from e

    def cache_clear(self) -> None:
        """Forgets all files."""
        self.known.clear()


@dataclass(frozen=True)
class Class:
    """A class in a file, without the bodies of its methods."""

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
        """Whether it is decorated as a dataclass."""
        names = (node.func if isinstance(node, ast.Call) else node for node in self.node.decorator_list)
        return any(isinstance(node, ast.Name) and node.id == "dataclass" for node in names)

    @property
    def fields(self) -> list[ast.AnnAssign]:
        """The annotated attributes, which are the fields of a dataclass."""
        return [line for line in self.node.body if isinstance(line, ast.AnnAssign)]

    @property
    def attributes(self) -> dict[str, ast.expr]:
        """Class attributes that have a value, by name."""
        found = {}
        for line in self.node.body:
            if isinstance(line, ast.AnnAssign) and line.value and isinstance(line.target, ast.Name):
                found[line.target.id] = line.value
            elif isinstance(line, ast.Assign):
                found |= {t.id: line.value for t in line.targets if isinstance(t, ast.Name)}
        return found


@dataclass(frozen=True)
class _Module:
    classes: dict[str, ast.ClassDef]
    aliases: dict[str, ast.expr]  # Name = Literal[…], or other types written with brackets or `|`
    imports: dict[str, tuple[str, str]]  # name here → (module of gzcli, name there)


def lineage_of(path: Path, name: str) -> list[Class]:
    """The class and its bases, nearest first, in the order in which Python looks up a method; without bases
    from outside gzcli."""
    module = _module(path)
    if name not in module.classes:
        if name not in module.imports:
            return []
        source, there = module.imports[name]
        file = _module_path(source)
        return lineage_of(file, there) if file else []
    node = module.classes[name]
    line = [Class(node, path)]
    for base in node.bases:
        if isinstance(base, ast.Name):
            line += lineage_of(path, base.id)
        elif isinstance(base, ast.Attribute) and isinstance(base.value, ast.Name):  # vae.Vae
            origin = module.imports.get(base.value.id)
            if origin and (file := _module_path(".".join(filter(None, origin)))):
                line += lineage_of(file, base.attr)
    # A base that two branches share comes after both, as in Python's own order.
    return [cls for i, cls in enumerate(line) if all(cls.node is not later.node for later in line[i + 1 :])]


def classes_of(path: Path) -> list[str]:
    """The names of the classes that the file defines, in order."""
    return list(_module(path).classes)


def class_with_bodies(cls: Class) -> Class:
    """The class with the bodies of its methods."""
    return Class(_whole(cls.path)[cls.node.name], cls.path)


@by_file
def tree_of(path: Path) -> ast.Module:
    """The syntax tree of a whole file."""
    return ast.parse(text_of(path), str(path))


@by_file
def _whole(path: Path) -> dict[str, ast.ClassDef]:
    """The classes of a file with the bodies of their methods."""
    return {node.name: node for node in tree_of(path).body if isinstance(node, ast.ClassDef)}


def method_of(cls: Class, name: str) -> ast.FunctionDef:
    """A method of the class with its body."""
    return class_with_bodies(cls).methods[name]


@by_file
def _module(path: Path) -> _Module:
    text = text_of(path)
    try:
        tree = ast.parse(_outline(text))
    except SyntaxError:
        tree = tree_of(path)
    package = ["gzcli", *path.parent.relative_to(ROOT.parent).parts] if ROOT.parent in path.parents else []
    imports: dict[str, tuple[str, str]] = {}
    for node in _top(tree):
        if isinstance(node, ast.ImportFrom):
            origin = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*origin, *([node.module] if node.module else [])])
            if source.split(".")[0] == "gzcli":
                imports |= {alias.asname or alias.name: (source, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):  # `import gzcli`, then `gzcli.Model`
            imports |= {a.asname or "gzcli": ("gzcli", "") for a in node.names if a.name == "gzcli"}
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    aliases: dict[str, ast.expr] = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Subscript | ast.BinOp)
    }
    return _Module(classes, aliases, imports)


def _top(tree: ast.Module) -> Iterator[ast.stmt]:
    """The statements of a file, also those for type checkers alone."""
    for node in tree.body:
        yield from node.body if isinstance(node, ast.If) else [node]


def _alias(path: Path, name: str) -> ast.expr | None:
    """The type that a name stands for, in the file or where it imports the name from."""
    module = _module(path)
    if name in module.imports:
        source, there = module.imports[name]
        file = _module_path(source)
        return _alias(file, there) if file else None
    return module.aliases.get(name)


def _outline(text: str) -> str:
    """The text without the bodies of its functions, line numbers kept: parsed in a fifth of the time.

    A string that spans lines may mislead it. Then the result does not parse, and the caller parses the whole
    text.
    """
    kept, open_brackets, indent = [], 0, 0
    body = None  # the indentation of the function whose body is left out
    for line in text.split("\n"):
        start = _DEF.match(line)
        if open_brackets or (start and (body is None or len(start[1]) <= body)):
            indent = len(start[1]) if start and not open_brackets else indent
            code = line.partition("#")[0].rstrip()
            open_brackets += sum(map(code.count, "([{")) - sum(map(code.count, ")]}"))
            ends = not open_brackets and code.endswith(":")
            kept.append(f"{code} ..." if ends else line)
            body = indent if ends else None
        elif body is not None and (not line.strip() or len(line) - len(line.lstrip()) > body):
            kept.append("")
        else:
            body = None
            kept.append(line)
    return "\n".join(kept)


@by_file
def text_of(path: Path) -> str:
    return program(path).decode("utf-8-sig")


def _module_path(module: str) -> Path | None:
    """The file of a module of gzcli; None where there is none."""
    file = ROOT.parent.joinpath(*module.split(".")[1:])
    return next((p for p in (file.with_suffix(".py"), file / "__init__.py") if p.is_file()), None)


def annotation_of(node: ast.expr | None, path: Path) -> str:
    """The annotation's text, with aliases of types (`Spacing = Literal[…]`) replaced by the types.

    Raises UsageError for one that is nested too deeply to be taken apart.
    """
    if node is None:
        return ""
    if isinstance(node, ast.Name) and node.id in _NO_ALIAS:
        return node.id
    parts = list(ast.walk(node))
    if len(parts) > DEEPEST:
        raise UsageError(f"{path}:{node.lineno}: a type of more than {DEEPEST} parts")
    names = {part.id for part in parts if isinstance(part, ast.Name)} - _NO_ALIAS
    if any(_alias(path, name) for name in names):
        return ast.unparse(_Unaliased(path).visit(node))
    line = _lines(path)[node.lineno - 1]
    # columns count bytes, so they are those of the text in ASCII alone
    if node.lineno == node.end_lineno and line.isascii():
        return line[node.col_offset : node.end_col_offset]
    return ast.unparse(node)


@by_file
def _lines(path: Path) -> list[str]:
    return text_of(path).split("\n")


class _Unaliased(ast.NodeTransformer):
    """Replaces the aliases in an annotation by their types."""

    def __init__(self, path: Path):
        self.path = path

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return _alias(self.path, node.id) or node


def documented(docstring: str) -> dict[str, str]:
    """The parameters that a cleaned docstring documents, each with its text in one line."""
    found: dict[str, str] = {}
    name = None
    for line in docstring.splitlines():
        if item := _ITEM.fullmatch(line):
            name = item[1]
            found[name] = item[2]
        elif name and line.startswith("  ") and line.strip():
            found[name] += " " + line.strip()
        else:
            name = None
    return found
