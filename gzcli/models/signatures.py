"""What the files of models declare — classes, their bases in other files, the options of their methods with
types, defaults, ranges and texts — read from the syntax, without an import."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, wraps
from operator import add, floordiv, mul, sub, truediv
from pathlib import Path
from typing import Any, TypeVar

from gzcli.core.errors import MissingError, UsageError
from gzcli.store.model_files import program

ROOT = Path(__file__).resolve().parent
T = TypeVar("T")

# ---------------------------------------------------------------------------- files


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
class Module:
    """What a file defines at its top.

    docstring: the text that it begins with; "" without one.
    line: of that text.
    values: what names are assigned, as types written with brackets or `|`, and tables.
    imports: name here → (module of gzcli, name there).
    """

    docstring: str
    line: int
    classes: dict[str, ast.ClassDef]
    values: dict[str, ast.expr]
    imports: dict[str, tuple[str, str]]


def text_of(path: Path) -> str:
    return program(path).decode("utf-8-sig")


@by_file
def module_of(path: Path) -> Module:
    text = text_of(path)
    try:
        tree = ast.parse(outline(text))
    except SyntaxError:
        tree = ast.parse(text, str(path))
    body = tree.body
    package = ["gzcli", *path.parent.relative_to(ROOT.parent).parts] if ROOT.parent in path.parents else []
    imports: dict[str, tuple[str, str]] = {}
    for node in (line for top in body for line in (top.body if isinstance(top, ast.If) else [top])):
        if isinstance(node, ast.ImportFrom):
            origin = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*origin, *([node.module] if node.module else [])])
            if source.split(".")[0] == "gzcli":
                imports |= {alias.asname or alias.name: (source, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):  # `import gzcli`, then `gzcli.Model`
            imports |= {a.asname or "gzcli": ("gzcli", "") for a in node.names if a.name == "gzcli"}
    docstring = ast.get_docstring(tree, clean=False) or ""
    classes = {node.name: node for node in body if isinstance(node, ast.ClassDef)}
    return Module(docstring, body[0].lineno if body else 1, classes, _assigned(body), imports)


def _assigned(lines: list[ast.stmt]) -> dict[str, ast.expr]:
    """The names that are assigned to, with their values; a `TypeAlias` stays a type of its own name."""
    values: dict[str, ast.expr] = {}
    for line in lines:
        if isinstance(line, ast.Assign):
            values |= {t.id: line.value for t in line.targets if isinstance(t, ast.Name)}
        elif isinstance(line, ast.AnnAssign) and line.value and isinstance(line.target, ast.Name):
            is_alias = isinstance(line.annotation, ast.Name) and line.annotation.id == "TypeAlias"
            values |= {} if is_alias else {line.target.id: line.value}
    return values


_DEF = re.compile(r"( *)def (\w+)")
_QUOTE = re.compile(r"""\s*[rR]?(\"\"\"|'''|"|')""")


def outline(text: str) -> str:
    """The text without the bodies of its functions, but with their docstrings and the whole of `phases`; line
    numbers stay. It is parsed in a third of the time.

    A string that spans lines may mislead it. Then the result does not parse, and the caller parses the whole
    text.
    """
    lines: list[str] = []
    open_brackets, indent, quote = 0, 0, ""
    whole = False  # whether the body of the function whose head is being read is kept
    body = None  # the indentation of the function whose body is left out
    starts = False  # whether that body has not begun
    for line in text.split("\n"):
        head = _DEF.match(line)
        if quote:
            lines.append(line)
            quote = "" if quote in line else quote
        elif open_brackets or (head and (body is None or len(head[1]) <= body)):
            if head and not open_brackets:
                indent, whole = len(head[1]), head[2] == "phases"
            code = line.partition("#")[0].rstrip()
            open_brackets += sum(map(code.count, "([{")) - sum(map(code.count, ")]}"))
            starts = not whole and not open_brackets and code.endswith(":")
            lines.append(code if starts else line)
            body = indent if starts else None
        elif starts and (docstring := _QUOTE.match(line)):
            starts, rest = False, line[docstring.end() :]
            quote = "" if docstring[1] in rest else docstring[1]
            lines.append(line)
        elif body is not None and (not line.strip() or len(line) - len(line.lstrip()) > body):
            lines[-1] += " ..." if starts else ""
            starts = False
            lines.append("")
        else:
            body = None
            lines.append(line)
    return "\n".join(lines)


@cache
def _file_of(root: Path, module: str) -> Path | None:
    """The file of a module of gzcli; None where there is none."""
    file = root.parent.joinpath(*module.split(".")[1:])
    return next((p for p in (file.with_suffix(".py"), file / "__init__.py") if p.is_file()), None)


def _value(name: str, path: Path) -> tuple[ast.expr | None, Path]:
    """What a name of a file stands for, and the file that says so; None where nothing is assigned to it."""
    module = module_of(path)
    if name in module.imports:
        source, there = module.imports[name]
        file = _file_of(ROOT, source)
        return _value(there, file) if file else (None, path)
    return module.values.get(name), path


# ---------------------------------------------------------------------------- classes


@dataclass(frozen=True)
class Class:
    """A class in a file."""

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
    def attributes(self) -> dict[str, ast.expr]:
        """Class attributes that have a value, by name."""
        return _assigned(self.node.body)


def lineage_of(path: Path, name: str) -> list[Class]:
    """The class and its bases, nearest first, in the order in which Python looks up a method; without bases
    from outside gzcli."""
    module = module_of(path)
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


# ---------------------------------------------------------------------------- options

# Arguments that the engine hands to a method; every other parameter is an option that a user can set.
GIVEN = {"self", "cls", "n", "x", "labels", "noise", "progress", "data", "batch", "batches", "index"}

# In the zoo a name has one meaning, and so one range, in all models. A width of 10⁹ would take all memory.
ANY_INT, COUNT, SIZE = "-1,000,000 … 1,000,000", "0 … 1,000,000", "1 … 1,000,000"
MAY_BE_0 = {
    *("attention", "blocks", "burn_in", "cells", "channel", "checkerboard", "clusters", "corrector"),
    *("dequant_blocks", "disc_start", "down", "halvings", "keep", "kl_warmup", "pool", "rows"),
}
OF_FLOATS = {
    **dict.fromkeys(("accept", "caption_dropout", "decay", "dynamic", "label_dropout"), "in [0, 1]"),
    **dict.fromkeys(("dropout", "logit", "smoothing", "t_min"), "in [0, 1)"),
    **dict.fromkeys(("min_snr", "sigma", "sigma_max", "step", "tolerance"), "greater than 0"),
}
# Scales that may turn around what they scale.
SIGNED = {"control_scale", "guidance", "image_guidance", "lora_scale", "pair_guidance"}


@dataclass(frozen=True)
class Param:
    """A parameter of a signature, or a field of a dataclass of options in it.

    annotation: its type, with the names of other types and of tables replaced by what they stand for.
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
    def words(self) -> set[str]:
        """The names in its type."""
        return set(re.findall(r"\w+", self.annotation))

    @property
    def range(self) -> str | None:
        """The range of its numbers, as `gzcli.recipe.kinds` reads it; None: any, or it has none."""
        if "int" in self.words:
            # HVAE has `groups` for each resolution, some of which are 0
            zero = self.name in MAY_BE_0 or (self.name == "groups" and "tuple" in self.words)
            return (COUNT if zero else SIZE) if self.ours else ANY_INT
        if "float" in self.words and self.ours and self.name not in SIGNED:
            return OF_FLOATS.get(self.name, "0 or more")
        return None


@cache  # models share most of their methods
def params_of(function: ast.FunctionDef, path: Path) -> tuple[Param, ...]:
    """The parameters of a signature; a dataclass of options is replaced by its fields."""
    return tuple(_params(function, path))


def _params(function: ast.FunctionDef, path: Path) -> Iterator[Param]:
    a, ours = function.args, ROOT in path.parents
    defaults = [None] * (len(a.posonlyargs) + len(a.args) - len(a.defaults)) + a.defaults + a.kw_defaults
    for arg, default in zip((*a.posonlyargs, *a.args, *a.kwonlyargs), defaults, strict=True):
        if isinstance(default, ast.Call) and isinstance(arg.annotation, ast.Name):
            group = lineage_of(path, arg.annotation.id)
            if group and group[0].is_dataclass:
                yield from _fields(group, default, path)
                continue
        value = None if default is None or arg.arg in GIVEN else value_of(default, path)
        yield Param(arg.arg, type_of(arg.annotation, path), value, default is None, ours)


def _fields(group: list[Class], default: ast.Call, path: Path) -> Iterator[Param]:
    """The fields of a dataclass of options, with the values that the default of the signature gives them."""
    changed = {keyword.arg: value_of(keyword.value, path) for keyword in default.keywords}
    fields: dict[str, Param] = {}
    texts: dict[str, str] = {}
    for cls in reversed(group):
        texts |= documented(ast.get_docstring(cls.node) or "")
        for line in cls.node.body:
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                name, kind = line.target.id, type_of(line.annotation, cls.path)
                value = None if line.value is None else value_of(line.value, cls.path)
                fields[name] = Param(name, kind, value, line.value is None, ROOT in cls.path.parents)
    for name, param in fields.items():
        param = replace(param, doc=texts.get(name, ""))
        yield replace(param, default=changed[name], required=False) if name in changed else param


DEEPEST = 400  # names, unions and brackets of a type


def type_of(node: ast.expr | None, path: Path) -> str:
    """The text of a type, with aliases (`Spacing = Literal[…]`) replaced by the types, and a choice from a
    table, `Annotated[str, TABLE, "more"]`, by the `Literal` of the table's keys and what comes after.

    Raises UsageError for one that is nested too deeply to be taken apart.
    """
    if node is None:
        return ""
    if sum(1 for _ in ast.walk(node)) > DEEPEST:
        raise UsageError(f"{path}:{node.lineno}: a type of more than {DEEPEST} parts")
    return _type(node, path)


def _type(node: ast.expr, path: Path) -> str:
    if isinstance(node, ast.Name):
        value, there = _value(node.id, path)
        return _type(value, there) if isinstance(value, ast.Subscript | ast.BinOp) else node.id
    if isinstance(node, ast.BinOp):
        return f"{_type(node.left, path)} | {_type(node.right, path)}"
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id != "Literal":
        items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if node.value.id == "Annotated":
            keys = dict.fromkeys(key for item in items[1:] for key in _keys(item, path))
            return f"Literal[{', '.join(map(repr, keys))}]"
        return f"{node.value.id}[{', '.join(_type(item, path) for item in items)}]"
    return ast.unparse(node)


def _keys(node: ast.expr | None, path: Path) -> list[str]:
    """The texts that are keys of a table, `{"a": …, **OTHER} | MORE`, or a single text."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.Name):
        return _keys(*_value(node.id, path))
    if isinstance(node, ast.BinOp):
        return _keys(node.left, path) + _keys(node.right, path)
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return [name for key, value in pairs for name in _keys(value if key is None else key, path)]
    return []


_ARITHMETIC = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv, ast.FloorDiv: floordiv}


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
    """`value_of` an expression. Raises ValueError for one that is neither literal nor arithmetic."""
    if isinstance(node, ast.Tuple):
        return tuple(map(_computed, node.elts))
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        left, right = _computed(node.left), _computed(node.right)
        if all(isinstance(side, int | float) for side in (left, right)):
            return _ARITHMETIC[type(node.op)](left, right)
    return ast.literal_eval(node)


_ITEM = re.compile(r"([A-Za-z_]\w*): +(\S.*)")


def documented(docstring: str) -> dict[str, str]:
    """The parameters that a cleaned docstring documents by a line `name: text` each, with the text in one
    line; continuation lines are indented."""
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
