"""Model cards, read from model files with `ast`, so that neither listing nor resolving imports torch.

A model file is `models/<family>/<name>.py`. It defines a subclass of `Model` with a `paper`; files of nets,
layers or samplers define none. The folder is the registry. The `variants` of a class are models too.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, wraps
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, TypeVar

from gzcli.core.errors import MissingError, UsageError, canonical, did_you_mean
from gzcli.core.hints import advice, gz
from gzcli.metrics.alarms.methods import LOCAL
from gzcli.metrics.likelihood_scores import SCORES
from gzcli.store import model_files
from gzcli.store.run_folder import Run

if TYPE_CHECKING:
    from gzcli.models.base import Model

T = TypeVar("T")
MODELS_FOLDER = Path(__file__).resolve().parent

APPLICATIONS = (
    *("reconstruct", "interpolate", "traverse", "analogies", "translate", "inpaint"),
    *("upscale", "complete", "edit", "classify", "restore"),
)
OUTSIDE = "outside"  # the family of models from outside the package

# class attributes of `Model` that are also on a card
_ATTRIBUTES = (
    *("needs", "likelihood", "best", "latents", "takes", "square", "aspects", "shares"),
    *("sums", "perceptual_scores", "labels_for", "with_labels"),
)
# a table in a class, in one line or several
_VARIANTS = re.compile(r"^    variants = (\{[^\n]*\}|\{\n.*?^    \})$", re.MULTILINE | re.DOTALL)
# classes that files from outside may import by their old names
RENAMED_CLASSES = dict.fromkeys(("EstimateOptions", "ScoreOptions"), "ObjectiveOptions") | {
    "ZigzagOptions": "DiTOptions"
}
_INPUTS = {"Tensor", "Module", "Noise", "Progress", "Batch", "Callable", "Iterable", "Iterator"}
_SHAPE = re.compile(r"^\[B\]: | \[[A-Z1, ]+\]")  # as in `images [B, C, H, W]`
_RAISES = re.compile(r" ?\bRaises \w+.*?(?:\.(?= |$)|$)")


# ---------------------------------------------------------------------------- files


PARSING = RLock()  # Python's parser counts its depth for all threads together (python/cpython#106905)


def modification_time(path: Path) -> int:
    """The modification time in ns of a file outside the package; 0 for a file of the package."""
    return 0 if str(path).startswith(f"{MODELS_FOLDER}/") else path.stat().st_mtime_ns


def cached_by_file(function: Callable[[Path], T]) -> Callable[[Path], T]:
    """Caches a function of a file until the file changes.

    Raises UsageError for a file that is not Python, MissingError for an unreadable one.
    """
    values: dict[tuple[Path, int], T] = {}

    @wraps(function)
    def cached(path: Path) -> T:
        try:
            key = path, modification_time(path)
            with PARSING:
                if key not in values:
                    values[key] = function(path)
            return values[key]
        except SyntaxError as e:
            raise UsageError(f"{path}:{e.lineno or 1}: {e.msg}") from e
        except (RecursionError, MemoryError) as e:  # of Python's parser, for 5,000 signs in a row
            raise UsageError(f"`{path}` is nested too deeply for Python") from e
        except ValueError as e:  # bytes that are not UTF-8
            raise UsageError(f"`{path}` is not a Python file: {e}") from e
        except OSError as e:
            raise MissingError(f"`{path}` cannot be read: {e.strerror}") from e

    cached.cache = values  # type: ignore[attr-defined]
    return cached


@dataclass(frozen=True)
class Module:
    """The top level of a file.

    docstring: "" without one.
    line: the line of the docstring.
    values: assigned names, such as type aliases and tables, with their expressions.
    imports: local name → (module of gzcli, name in that module).
    """

    docstring: str
    line: int
    classes: dict[str, ast.ClassDef]
    values: dict[str, ast.expr]
    imports: dict[str, tuple[str, str]]


def text_of(path: Path) -> str:
    return model_files.program(path).decode("utf-8-sig")


@cached_by_file
def module_of(path: Path) -> Module:
    text = text_of(path)
    try:
        tree = ast.parse(outline(text))
    except SyntaxError:
        tree = ast.parse(text, str(path))
    body = tree.body
    package = (
        ["gzcli", *path.parent.relative_to(MODELS_FOLDER.parent).parts]
        if MODELS_FOLDER.parent in path.parents
        else []
    )
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
    """The assigned names with their values; a `TypeAlias` remains its own type name."""
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
    """The text without the bodies of functions, except for docstrings and the whole of `phases`. Line numbers
    stay the same. It parses in a third of the time.

    A multi-line string may confuse it. The result then does not parse, and the caller parses the full text.
    """
    lines: list[str] = []
    open_brackets, indent, quote = 0, 0, ""
    keeps_body = False  # whether the body of the function whose head is being read is kept
    body = None  # the indentation of the function whose body is left out
    starts = False  # whether that body has not begun
    for line in text.split("\n"):
        head = _DEF.match(line)
        if quote:
            lines.append(line)
            quote = "" if quote in line else quote
        elif open_brackets or (head and (body is None or len(head[1]) <= body)):
            if head and not open_brackets:
                indent, keeps_body = len(head[1]), head[2] == "phases"
            code = line.partition("#")[0].rstrip()
            open_brackets += sum(map(code.count, "([{")) - sum(map(code.count, ")]}"))
            starts = not keeps_body and not open_brackets and code.endswith(":")
            lines.append(code if starts else line)
            body = indent if starts else None
        elif starts and (docstring := _QUOTE.match(line)):
            starts, tail = False, line[docstring.end() :]
            quote = "" if docstring[1] in tail else docstring[1]
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
    """The file of a module of gzcli; None if there is none."""
    file = root.parent.joinpath(*module.split(".")[1:])
    return next((p for p in (file.with_suffix(".py"), file / "__init__.py") if p.is_file()), None)


def outdated_imports(path: Path) -> list[str]:
    """The imports of a file that gz no longer has, as lines such as `maf.py:3: …`, with the replacements."""
    lines = []
    for node in ast.walk(ast.parse(text_of(path), str(path))):
        module = (node.module or "") if isinstance(node, ast.ImportFrom) and not node.level else ""
        if isinstance(node, ast.ImportFrom) and module.split(".")[0] == "gzcli":
            absent = [alias.name for alias in node.names if not _can_import(module, alias.name)]
            lines += [f"{path}:{node.lineno}: {_successor(module, name)}" for name in absent]
    return lines


def _can_import(module: str, name: str) -> bool:
    """Whether a module of gz may define a name: its text contains the name, or a submodule has it."""
    file = _file_of(MODELS_FOLDER, module)
    in_text = file is not None and re.search(rf"\b{name}\b", text_of(file))
    return name == "*" or bool(in_text or _file_of(MODELS_FOLDER, f"{module}.{name}"))


def _successor(module: str, name: str) -> str:
    """A sentence on a removed name, with the import of its successor if there is one."""
    gone, options, new = f"gz has no `{module}.{name}`", "", RENAMED_CLASSES.get(name, name)
    if variant := _variant(name):
        place, new = variant.module, variant.cls
        defaults = variant.lineage[0].attributes["variants"]
        values = value_of(defaults, variant.path)[variant.name]
        values = {key: value for key, value in values.items() if key in variant.params}
        options = f", and set `model: {json.dumps(values)}` in the recipe"
    else:
        definition = re.compile(rf"^(?:class |def ){new}\b|^{new}\b.* = ", re.MULTILINE)
        files = [path for path in MODELS_FOLDER.rglob("*.py") if definition.search(text_of(path))]
        if len(files) != 1:
            return gone
        place = ".".join(files[0].relative_to(MODELS_FOLDER.parent.parent).with_suffix("").parts)
    alias = "" if new == name else f" as {name}"
    return f"{gone}; write `from {place} import {new}{alias}`{options}"


def _value(name: str, path: Path) -> tuple[ast.expr | None, Path]:
    """The expression assigned to a name, or None, and the file of the assignment."""
    module = module_of(path)
    if name in module.imports:
        source, original = module.imports[name]
        file = _file_of(MODELS_FOLDER, source)
        return _value(original, file) if file else (None, path)
    return module.values.get(name), path


# ---------------------------------------------------------------------------- classes


@dataclass(frozen=True)
class Class:
    node: ast.ClassDef
    path: Path

    @property
    def is_model(self) -> bool:
        return self.node.name == "Model" and self.path == MODELS_FOLDER / "base.py"

    @cached_property
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
    """The class and its bases in Python's method resolution order, without bases from outside gzcli."""
    module = module_of(path)
    if name not in module.classes:
        source, original = module.imports.get(name, ("", ""))
        file = _file_of(MODELS_FOLDER, source) if source else None
        return lineage_of(file, original) if file else []
    node = module.classes[name]
    line = [Class(node, path)]
    for base in node.bases:
        if isinstance(base, ast.Name):
            line += lineage_of(path, base.id)
        elif isinstance(base, ast.Attribute) and isinstance(base.value, ast.Name):  # vae.Vae
            origin = module.imports.get(base.value.id)
            if origin and (file := _file_of(MODELS_FOLDER, ".".join(filter(None, origin)))):
                line += lineage_of(file, base.attr)
    # A base that two branches share comes after both, as in Python's own order.
    return [cls for i, cls in enumerate(line) if all(cls.node is not later.node for later in line[i + 1 :])]


# ---------------------------------------------------------------------------- options of methods

# Arguments that the engine hands to a method; every other parameter is an option that a user can set.
ENGINE_ARGS = {"self", "cls", "n", "x", "labels", "noise", "progress", "data", "batch", "batches", "index"}

# A name has one meaning, and so one range, in all models. A width of 10⁹ would take all memory.
ANY_INT, COUNT, SIZE = "-1,000,000 … 1,000,000", "0 … 1,000,000", "1 … 1,000,000"
ZERO_ALLOWED = {
    *("attention", "blocks", "burn_in", "cells", "channel", "checkerboard", "clusters", "corrector"),
    *("dequant_blocks", "disc_start", "down", "halvings", "keep", "kl_warmup", "pool", "rows"),
}
FLOAT_RANGES = {
    **dict.fromkeys(("accept", "caption_dropout", "decay", "dynamic", "label_dropout"), "in [0, 1]"),
    "weight_warmup": "in [0, 1]",
    **dict.fromkeys(("dropout", "logit", "smoothing", "t_min"), "in [0, 1)"),
    **dict.fromkeys(("log_std", "min_snr", "sigma", "sigma_data", "sigma_last"), "greater than 0"),
    **dict.fromkeys(("sigma_max", "step", "tolerance"), "greater than 0"),
}
# Scales and means that may be negative.
SIGNED = {"control_scale", "guidance", "image_guidance", "log_mean", "lora_scale", "pair_guidance"}
SIGNED |= {"tuned_guidance"}


@dataclass(frozen=True)
class Param:
    """A parameter of a signature, or a field of a dataclass of options in it.

    annotation: its type, with aliases and tables resolved.
    default: None if a value is `required`.
    from_gz: whether its class is part of gz.
    doc: text of the field in the docstring of its dataclass.
    """

    name: str
    annotation: str
    default: Any
    required: bool
    from_gz: bool = field(default=False, compare=False)
    doc: str = field(default="", compare=False)

    @property
    def words(self) -> set[str]:
        """The names in its type."""
        return set(re.findall(r"\w+", self.annotation))

    @cached_property
    def range(self) -> str | None:
        """The range of its numbers, in the form of `gzcli.recipe.schema`; None: unbounded or not a number."""
        if "int" in self.words:
            # HVAE has `groups` for each resolution, some of which are 0
            zero = self.name in ZERO_ALLOWED or (self.name == "groups" and "tuple" in self.words)
            return (COUNT if zero else SIZE) if self.from_gz else ANY_INT
        if "float" in self.words and self.from_gz and self.name not in SIGNED:
            return FLOAT_RANGES.get(self.name, "0 or more")
        return None


@cache  # models share most of their methods
def params_of(function: ast.FunctionDef, path: Path) -> tuple[Param, ...]:
    """The parameters of a signature; a dataclass of options is replaced by its fields. Raises UsageError for
    options with equal names, because recipes are flat."""
    params: dict[str, Param] = {}
    source: dict[str, str] = {}  # of an option the parameter that it is part of
    a, from_gz = function.args, MODELS_FOLDER in path.parents
    defaults = [None] * (len(a.posonlyargs) + len(a.args) - len(a.defaults)) + a.defaults + a.kw_defaults
    for arg, default in zip((*a.posonlyargs, *a.args, *a.kwonlyargs), defaults, strict=True):
        place = f"{path}:{arg.lineno}:{arg.col_offset + 1}"
        options: list[Param] = []
        if isinstance(default, ast.Call) and isinstance(arg.annotation, ast.Name):
            group = lineage_of(path, arg.annotation.id)
            if group and group[0].is_dataclass:
                options = list(_fields(group, default, path))
            elif isinstance(default.func, ast.Name) and default.func.id == arg.annotation.id:
                message = f"{place}: `{arg.annotation.id}` must be a dataclass of this file or of gz"
                raise UsageError(
                    message, hint="define it in this file: recipes are made without importing it"
                )
        if not options:
            value = None if default is None or arg.arg in ENGINE_ARGS else value_of(default, path)
            options = [Param(arg.arg, type_of(arg.annotation, path), value, default is None, from_gz)]
        for option in options:
            if option.name in params:
                message = f"{place}: the option `{option.name}` is in `{source[option.name]}` and `{arg.arg}`"
                hint = "rename one of the fields: a recipe has one key for each option"
                raise UsageError(message, hint=hint)
            params[option.name], source[option.name] = option, arg.arg
    return tuple(params.values())


def _fields(group: list[Class], default: ast.Call, path: Path) -> Iterator[Param]:
    """The fields of a dataclass of options, with their values in the default of the signature."""
    changed = {keyword.arg: value_of(keyword.value, path) for keyword in default.keywords}
    fields: dict[str, Param] = {}
    texts: dict[str, str] = {}
    for cls in reversed(group):
        texts |= parameter_texts(ast.get_docstring(cls.node) or "")
        for line in cls.node.body:
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                name, kind = line.target.id, type_of(line.annotation, cls.path)
                value = None if line.value is None else value_of(line.value, cls.path)
                fields[name] = Param(name, kind, value, line.value is None, MODELS_FOLDER in cls.path.parents)
    for name, param in fields.items():
        param = replace(param, doc=texts.get(name, ""))
        yield replace(param, default=changed[name], required=False) if name in changed else param


MOST_PARTS = 400  # names, unions and brackets of a type


@cache
def type_of(node: ast.expr | None, path: Path) -> str:
    """The text of a type, with aliases (`Spacing = Literal[…]`) replaced by their types. A choice from a
    table, `Annotated[str, TABLE, "more"]`, becomes the `Literal` of the table's keys and the texts after it.
    Another such choice may replace `str`.

    Raises UsageError for a type with too many parts.
    """
    if node is None:
        return ""
    if sum(1 for _ in ast.walk(node)) > MOST_PARTS:
        raise UsageError(f"{path}:{node.lineno}: the type has more than {MOST_PARTS} parts")
    return _type(node, path)


def _type(node: ast.expr, path: Path) -> str:
    if isinstance(node, ast.Name):
        value, origin = _value(node.id, path)
        return _type(value, origin) if isinstance(value, ast.Subscript | ast.BinOp) else node.id
    if isinstance(node, ast.BinOp):
        return f"{_type(node.left, path)} | {_type(node.right, path)}"
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id != "Literal":
        items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if node.value.id == "Annotated":
            keys = dict.fromkeys(key for item in items for key in _keys(item, path))
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
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple):  # another choice from a table
        return [key for item in node.slice.elts for key in _keys(item, path)]
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return [name for key, value in pairs for name in _keys(value if key is None else key, path)]
    return []


def value_of(node: ast.expr, path: Path) -> Any:
    """The value of a literal. Raises UsageError, with its place, for any other expression."""
    place = f"{path}:{node.lineno}:{node.col_offset + 1}"
    try:
        try:
            return node.value if isinstance(node, ast.Constant) else ast.literal_eval(node)
        except ValueError:
            text = ast.unparse(node)
    except RecursionError:
        raise UsageError(f"{place}: this is nested too deeply") from None
    raise UsageError(
        f"{place}: `{text}` must be a literal, not an expression: recipes are made without importing it",
        hint="write a number, a string, True, False, None, or a tuple of these",
    )


_ITEM = re.compile(r"([A-Za-z_]\w*): +(\S.*)")


def parameter_texts(docstring: str) -> dict[str, str]:
    """The texts of the lines `name: text` of a cleaned docstring, with their indented continuations."""
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


# ---------------------------------------------------------------------------- cards


@dataclass(frozen=True)
class ModelCard:
    """A model as its file describes it."""

    name: str
    family: str
    path: Path
    module: str
    cls: str  # the class in the file
    lineage: tuple[Class, ...] = field(repr=False, compare=False)
    paper: str
    needs: tuple[str, ...]
    likelihood: str | None  # what log_prob is: "exact" | "bound" | "ode"
    best: str
    latents: bool  # whether it can be trained on latents
    takes: str  # the images that it models: "values", "levels", "bytes" or "pictures", as in `Model`
    square: bool  # whether it needs square images
    aspects: bool  # whether it trains on images of several shapes
    shares: bool  # whether its weights can be sharded over GPUs
    sums: tuple[str, ...]  # the phases with a loss that is a sum over the dimensions of an image
    perceptual_scores: tuple[str, ...]  # the scores that compare images by a network
    params: dict[str, Param]  # hyperparameters: the keys of the recipe's `model`
    stages: tuple[str, ...]  # earlier stages of the recipe, whose trained models `__init__` takes
    sample: dict[str, Param]  # options of `sample`
    inputs: tuple[str, ...]  # images that `sample` may take: "control", "before"
    scores: dict[str, dict[str, Param]]  # score → options of `score_<name>` and `fit_<name>`
    fits: tuple[str, ...]  # the scores that have a `fit_<name>`
    maps: tuple[str, ...]  # the scores that have a `map_<name>`
    do: dict[str, dict[str, Param]]  # application → its options
    labelled: tuple[str, ...]  # the applications that take labels
    masked: tuple[str, ...]  # the applications that take a mask
    labels_for: tuple[str, ...]  # the applications that take labels though the model is not conditional
    with_labels: tuple[str, ...]  # the applications that only a run trained with `model.conditional` has
    can: tuple[str, ...]  # sample, conditional, prompt, log_prob, ood, map, latent, export, applications

    @property
    def unlabelled_lack(self) -> tuple[str, ...]:
        """The applications that need a conditional run, for a model that is unconditional by default."""
        default = self.params.get("conditional")
        return self.with_labels if default is not None and default.default is False else ()

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics of `measure`, by its docstring."""
        measure = next((cls.methods["measure"] for cls in self.lineage if "measure" in cls.methods), None)
        return tuple(parameter_texts(ast.get_docstring(measure) or "")) if measure else ()


def cards() -> dict[str, ModelCard]:
    """Every model by name: the zoo, ordered by family and name, then models from outside the package."""
    firsts = filter(None, map(read_card, zoo_files(MODELS_FOLDER)))
    zoo = [card for first in firsts for card in (first, *variants_of(first))]
    by_name = {card.name: card for card in sorted(zoo, key=lambda card: (card.family, card.name))}
    for path in model_files.model_files().values():
        if card := read_card(path):
            by_name.setdefault(card.name, card)
    return by_name


def families() -> dict[str, str]:
    """The family of every model by name, in the order of `cards`. The files of gz are searched and not
    parsed, which takes a twentieth of the time."""
    zoo: list[tuple[str, str]] = []
    for path in zoo_files(MODELS_FOLDER):
        if model_files.names_paper(text := text_of(path)):
            zoo += [(path.parent.name, name) for name in (path.stem, *_variants_in(text))]
    family_of = {name: family for family, name in sorted(zoo)}
    for path in model_files.model_files().values():
        if card := read_card(path):
            family_of.setdefault(card.name, card.family)
    return family_of


def card(name: str) -> ModelCard:
    """The card of one model, read only from its file and the files of its bases; `-` and `_` are equivalent.
    A file given by its path comes first, then the zoo, then other files outside the package. Raises
    UsageError with the closest name if there is no such model.
    """
    for path in (model_files.typed(name), zoo_file(name)):
        if path and (card := read_card(path)):
            return card
    if variant := _variant(name):
        return variant
    # installed packages are searched last: that takes longer than all else
    if path := model_files.find(name):
        return card_at(path)
    hint = did_you_mean(name, families()) or advice("see the names with {}", gz("list", "models"))
    raise UsageError(f"there is no model `{name}`", hint=hint)


def _variant(name: str) -> ModelCard | None:
    """The card of a variant: a model of the zoo that is another one with other defaults."""
    firsts = (read_card(path) for path in zoo_files(MODELS_FOLDER) if canonical(name) in variant_names(path))
    variants = (variant for first in firsts if first for variant in variants_of(first))
    return next((variant for variant in variants if variant.name == canonical(name)), None)


def _variants_in(text: str) -> list[str]:
    """The names of the variants in the source text of a model."""
    table = _VARIANTS.search(text)
    return list(ast.literal_eval(table[1])) if table else []


@cached_by_file
def variant_names(path: Path) -> list[str]:
    """The names of the variants in the file of a model."""
    return _variants_in(text_of(path))


def card_of(run: Run, name: str) -> ModelCard:
    """The card of the model that a run, or a stage of it, has trained. For an outside model, it is read from
    the run's copy of the file."""
    copy = model_files.copy_of(run.owner.path, name)
    return card_at(copy) if copy else card(name)


def card_at(path: Path) -> ModelCard:
    """The card of the model in a file. Raises UsageError if it contains none."""
    if card := read_card(path):
        return card
    if outdated := outdated_imports(path):
        raise UsageError("\n".join(outdated))
    hint = "define a class that derives from `gzcli.Model` and sets `paper`"
    raise UsageError(f"`{path}` contains no model", hint=hint)


def model_count(trained: int, others: int) -> str:
    """A phrase with the number of models that have a recipe, and of those without: stages of others, and
    networks of published weights."""
    models = f"{trained} model{'' if trained == 1 else 's'}"
    return f"{models}, and {others} without a recipe" if others else models


@cache
def zoo_files(root: Path) -> tuple[Path, ...]:
    """The files of the package that may contain a model."""
    files = root.glob("*/*.py")
    return tuple(sorted(path for path in files if path.parent.name != "nn" and path.stem != "__init__"))


def zoo_file(name: str) -> Path | None:
    """The file of the package that defines a model of this name; None if there is none."""
    files = (path for path in zoo_files(MODELS_FOLDER) if path.stem == canonical(name))
    return next((path for path in files if model_class(path)), None)


# ---------------------------------------------------------------------------- facts of a card


def scores_made(*, log_prob: bool, names: Iterable[str], maps: bool) -> tuple[str, ...]:
    """The out-of-distribution scores that the engine computes from a model's likelihood, and from its map.

    log_prob: whether the model has `log_prob`, the likelihood of pixels.
    maps: whether it has maps of anomalies.
    names: names of the model's scores. Without `log_prob` its `nll` is the likelihood of codes, which is not
      compared with the length of a lossless code of the pixels.
    """
    scores = list(SCORES) if log_prob or "nll" in names else []
    if not log_prob:
        scores = [name for name in scores if "code_length" not in SCORES[name].reads]
    return (*scores, *([LOCAL] if maps else []))


def phases(model: ModelCard) -> tuple[str, ...] | None:
    """The names of the model's phases, from the `Phase("critic", …)` calls of its `phases`; None if the names
    are not literals, because then only the trainer can determine them."""
    method = next((cls.methods["phases"] for cls in model.lineage if "phases" in cls.methods), None)
    return _phases_in(method) if method else ("main",)


@cache
def _phases_in(method: ast.FunctionDef) -> tuple[str, ...] | None:
    names: list[object] = []
    for node in ast.walk(method):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Phase":
            name = [*node.args, *(k.value for k in node.keywords if k.arg == "name"), None][0]
            names.append(name.value if isinstance(name, ast.Constant) else None)
    return tuple(dict.fromkeys(map(str, names))) if names and None not in names else None


def option_texts(card: ModelCard) -> dict[str, dict[str, str]]:
    """The text of each option, by section of a recipe (`model`, `sample`, `ood`) or application.

    Docstrings of classes document `__init__`, those of dataclasses their fields, those of methods their
    keywords. An option without a text in its method takes that in `sample`, otherwise that in the class.
    """

    def texts_of(*methods: str | None) -> dict[str, str]:
        """The texts of methods (None: the class); the first method and the nearest class take precedence."""
        texts: dict[str, str] = {}
        for method in reversed(methods):
            for cls in reversed(card.lineage):
                node = cls.methods.get(method) if method else cls.node
                texts |= parameter_texts(ast.get_docstring(node) or "") if node else {}
        return texts

    def described(params: Mapping[str, Param], texts: Mapping[str, str]) -> dict[str, str]:
        descriptions = {name: param.doc or texts.get(name, "") for name, param in params.items()}
        return {name: text for name, text in descriptions.items() if text}

    model = texts_of(None, "__init__")
    sample = model | texts_of("sample")
    scores = texts_of(*(f"{kind}_{score}" for score in card.scores for kind in ("score", "fit")))
    score_params = {key: param for params in card.scores.values() for key, param in params.items()}
    return {
        "model": described(card.params, model),
        "sample": described(card.sample, sample),
        "ood": described(score_params, sample | scores),
        **{name: described(params, sample | texts_of(name)) for name, params in card.do.items()},
    }


def first_words(card: ModelCard, method: str | None = None) -> str:
    """The first paragraph of the docstring of the class, or of a method, in one line, without shapes and
    errors; "" if there is none."""
    nodes = (cls.methods.get(method) if method else cls.node for cls in card.lineage)
    node = next((node for node in nodes if node), None)
    paragraph = (ast.get_docstring(node) or "" if node else "").split("\n\n")[0]
    return _SHAPE.sub("", _RAISES.sub("", " ".join(paragraph.split())))


# ---------------------------------------------------------------------------- the class of a card


def keep(folder: Path, names: Iterable[str]) -> list[dict[str, str]]:
    """Copies the files of outside models into the folder of a run or job. Returns their names, places and
    hashes."""
    outside = [one for name in dict.fromkeys(names) if (one := card(name)).family == OUTSIDE]
    return [model_files.keep(folder, one.path) for one in outside]


def load(name: str) -> type[Model]:
    """The model's class. Imports its file and therefore torch."""
    return load_class(card(name))


def load_class(card: ModelCard) -> type[Model]:
    """The class that a card describes. Raises UsageError if a file from outside cannot be imported."""
    import importlib.util

    if card.family != OUTSIDE:
        cls = getattr(importlib.import_module(card.module), card.cls)
        return cls if card.name == card.path.stem else cls.variant(card.name)
    if (module := sys.modules.get(card.module)) is None:
        spec = importlib.util.spec_from_file_location(card.module, card.path)
        assert spec is not None
        program = model_files.program(card.path)
        module = sys.modules[card.module] = importlib.util.module_from_spec(spec)
        try:
            # the loader itself would take a `__pycache__` beside the file, which nobody has read
            exec(compile(program, card.path, "exec", dont_inherit=True), module.__dict__)
        except BaseException as e:
            del sys.modules[card.module]
            if not isinstance(e, Exception):
                raise
            if isinstance(e, ImportError) and (outdated := outdated_imports(card.path)):
                raise UsageError("\n".join(outdated)) from e
            line = model_files.line_in(e, [card.path])
            place = f"{card.path}:{line[1]}" if line else str(card.path)
            raise UsageError(f"`{place}` cannot be imported: {type(e).__name__}: {e}") from e
    return getattr(module, card.cls)


# ---------------------------------------------------------------------------- a card from a file


@cached_by_file
def read_card(path: Path) -> ModelCard | None:
    """The card of the model in a file; None if it contains none."""
    lineage = model_class(path)
    if lineage is None:
        return None
    bases_first = lineage[::-1]
    methods = {name: (node, cls.path) for cls in bases_first for name, node in cls.methods.items()}
    attributes = {name: (node, cls.path) for cls in bases_first for name, node in cls.attributes.items()}

    def params(method: str) -> dict[str, Param]:
        return {p.name: p for p in params_of(*methods[method])} if method in methods else {}

    def options(method: str) -> dict[str, Param]:
        return {
            name: p for name, p in params(method).items() if name not in ENGINE_ARGS and not p.words & _INPUTS
        }

    def suffixes(prefix: str) -> tuple[str, ...]:
        return tuple(name.removeprefix(prefix) for name in methods if name.startswith(prefix))

    values: dict[str, Any] = {name: value_of(*attributes[name]) for name in _ATTRIBUTES}
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    init = {name: p for name, p in params("__init__").items() if name not in ("self", "data")}
    stages = tuple(name for name, p in init.items() if p.annotation == "Model")
    do = {name: options(name) for name in APPLICATIONS if name in methods}
    scores = {name: options(f"fit_{name}") | options(f"score_{name}") for name in suffixes("score_")}
    sample = options("sample")
    can = {
        "sample": True,
        "conditional": "conditional" in init,
        "prompt": "prompt" in sample,
        "log_prob": "log_prob" in methods,
        "ood": bool(scores) or "log_prob" in methods,
        "map": bool(suffixes("map_")),
        "latent": "to_latent" in methods,
        "export": "to_diffusers" in methods,
    }
    family, module = _place(path)
    return ModelCard(
        name=path.stem,
        family=family,
        path=path,
        module=module,
        cls=lineage[0].node.name,
        lineage=tuple(lineage),
        paper=value_of(*attributes["paper"]),
        **values,
        params={name: p for name, p in init.items() if name not in stages},
        stages=stages,
        sample=sample,
        inputs=tuple(n for n, p in params("sample").items() if n not in ENGINE_ARGS and "Tensor" in p.words),
        scores=scores,
        fits=suffixes("fit_"),
        maps=suffixes("map_"),
        do=do,
        labelled=tuple(name for name in do if "labels" in params(name)),
        masked=tuple(name for name in do if "mask" in params(name)),
        can=(*(name for name, holds in can.items() if holds), *do),
    )


def variants_of(card: ModelCard) -> Iterator[ModelCard]:
    """The cards of the models that are a class of the package with other defaults."""
    table = card.lineage[0].attributes.get("variants") if card.family != OUTSIDE else None
    for name, values in (value_of(table, card.path) if table else {}).items():
        attributes = {key: value for key, value in values.items() if key not in card.params}
        params = {key: replace(p, default=values.get(key, p.default)) for key, p in card.params.items()}
        yield replace(card, name=name, params=params, **attributes)


def _place(path: Path) -> tuple[str, str]:
    """The family of a file, and the name of its module. Each version of an outside file has its own name,
    because two runs may contain two versions."""
    if MODELS_FOLDER in path.parents:
        return path.parent.name, f"{__package__}.{path.parent.name}.{path.stem}"
    digest = hashlib.sha256(f"{path}:{modification_time(path)}".encode()).hexdigest()[:12]
    return OUTSIDE, f"gzcli_outside_{digest}_{path.stem}"


@cached_by_file
def model_class(path: Path) -> list[Class] | None:
    """The lineage of the file's model class. Of several classes, it is the one named like the file, otherwise
    the last."""
    if not model_files.names_paper(text_of(path)):
        return None  # a file of helpers need not be parsed
    lineages = [lineage_of(path, name) for name in module_of(path).classes]
    models = [
        lineage
        for lineage in lineages
        if any(cls.is_model for cls in lineage) and any("paper" in cls.attributes for cls in lineage)
    ]
    models.sort(key=lambda lineage: lineage[0].node.name.lower() == path.stem.replace("_", ""))
    return models[-1] if models else None
