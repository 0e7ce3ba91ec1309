"""Recipe files: the shipped ones by name, the user's by path, the header of a model's file, and what each
extends."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gzcli.core.errors import UsageError, canonical, did_you_mean
from gzcli.core.sections import SCALES, SECTIONS
from gzcli.models import catalog
from gzcli.models.catalog import GIVEN, lineage_of, module_of, params_of
from gzcli.recipe.kinds import is_storable, parse
from gzcli.recipe.schema import schema
from gzcli.recipe.yaml import Document, Problem, read_file, read_text
from gzcli.store import model_files
from gzcli.store.paths import recipes_dir, trained_in

PARTS = ("model", "sample", "stages", *SECTIONS)  # below a scale these hold for all its sets
STORABLE = "int, float, bool, str, None, Literal[…], tuple[…], list[…]"
RESERVED = {"name"}  # the key of a recipe's `model` that names the model
_HEADER = re.compile(rf" +({'|'.join([*schema(None), 'stages', 'for', 'extends'])}):")
Keys = tuple[str, ...]  # below `for`, of a section: ("small",), ("mnist",), ("small", "grey")


@dataclass
class RecipeFile:
    """A recipe file."""

    path: Path
    label: str  # its name in messages; of a shipped one `recipes/glow.yaml`, wherever gz is installed
    document: Document
    shipped: bool = False  # whether it is gz's own
    own: dict[str, Any] = field(default_factory=dict)  # its values without `for` and `extends`
    # its values for scales, shape classes and data sets, by the keys below `for`
    sections: dict[Keys, Any] = field(default_factory=dict)
    # the keys of a section as they are written: `128px, 256px` stands for two sections
    written: dict[Keys, Keys] = field(default_factory=dict)


def recipes() -> dict[str, Path]:
    """The shipped recipes: name → file."""
    return {path.stem: path for path in sorted(recipes_dir().glob("*.yaml"))}


def presets() -> list[str]:
    """What a recipe may extend beside recipes: values that several share, as `presets/unet`."""
    return [f"presets/{path.stem}" for path in sorted((recipes_dir() / "presets").glob("*.yaml"))]


def show(what: str) -> str:
    """The text of a shipped recipe or of a file. Raises UsageError where there is none."""
    return find(what).read_text(encoding="utf-8")


def find(what: str) -> Path:
    """The file of a recipe. Raises UsageError with the nearest name.

    what: name of a shipped recipe or preset, path of a recipe, or name or path of a model from outside. The
      recipe of such a model is the YAML file beside it, else the model's file itself.
    """
    if model_files.is_file(what):
        what = _added(what)
    if model := model_files.typed(what):
        return _recipe_of(model)
    preset = recipes_dir() / f"{what}.yaml"
    if what.startswith("presets/") and preset.is_file():
        return preset
    if what.endswith((".yaml", ".yml")) or "/" in what:
        path = Path(what).expanduser()
        if not path.is_file():
            near = did_you_mean(path.name, [other.name for other in path.parent.glob("*.y*ml")])
            copy = "`gz recipe copy NAME` makes one of a shipped one"
            raise UsageError(f"there is no recipe `{what}`", hint=near or copy)
        return path
    shipped = {canonical(name): path for name, path in recipes().items()}
    if canonical(what) in shipped:
        return shipped[canonical(what)]
    if place := trained_in(what):
        recipe, stage = place
        hint = f"gz train {recipe} --set stages.{stage}.model.name={canonical(what)}"
        message = f"`{what}` is no model of its own: it is trained as the stage `{stage}` of `{recipe}`"
        raise UsageError(message, hint=hint)
    if model := model_files.find(what):
        return _recipe_of(model)
    names = "`gz list models` shows the names; a recipe of yours is given as a path"
    raise UsageError(f"there is no model `{what}`", hint=did_you_mean(what, recipes()) or names)


def _recipe_of(model: Path) -> Path:
    beside = model.with_suffix(".yaml")
    return beside if beside.is_file() else model


def _added(file: str) -> str:
    """Makes the model of a file known to this process. Returns its name."""
    name = model_files.add(file)
    if canonical(name) in map(canonical, recipes()) or trained_in(name):
        hint = f"call the file otherwise, as `my_{name}.py`"
        raise UsageError(f"`{name}` is a model of gz already", hint=hint)
    if wrong := mistakes(Path(file).expanduser().absolute()):
        raise UsageError("\n".join(wrong), hint=f"`gz model check {file}` tells more")
    return name


# --- a recipe with what it extends ---


def read_chain(what: str) -> tuple[list[RecipeFile], list[Problem]]:
    """The recipe's files, those that it extends first, and the mistakes in them.

    Raises UsageError where one is not there or not YAML.
    """
    chain: list[RecipeFile] = []
    problems: list[Problem] = []
    path = find(what)
    while True:
        file = _read(path)
        chain.insert(0, file)
        document = file.document
        problems += document.problems
        tree = document.tree or {}
        if not isinstance(tree, dict):
            message = "a recipe is a map of sections, as `model: {name: vae}`"
            return chain, [*problems, Problem(document.where(()), message)]
        file.own = {key: value for key, value in tree.items() if key not in ("for", "extends")}
        model = path.absolute().with_suffix(".py")
        if not file.shipped and model.is_file() and model_files.find(path.stem) == model:
            file.own["model"] = {"name": path.stem, **(file.own.get("model") or {})}
        _add_sections(file, tree.get("for") or {}, problems)
        base = tree.get("extends")
        if base is None:
            return chain, problems
        where = document.where(("extends",), value=True)
        if not isinstance(base, str):
            return chain, [*problems, Problem(where, "`extends` must be a recipe's name or path")]
        is_name = "/" not in base and not base.endswith((".yaml", ".yml"))
        is_preset = (recipes_dir() / f"{base}.yaml").is_file()
        try:  # a path is relative to the file that holds it
            path = find(base if is_name or is_preset else str(path.parent / base))
        except UsageError as e:
            return chain, [*problems, Problem(where, e.message, e.hint)]
        if any(path.resolve() == other.path.resolve() for other in chain):
            return chain, [*problems, Problem(where, f"`{base}` extends this recipe in its turn")]


def _read(path: Path) -> RecipeFile:
    home = recipes_dir().resolve()
    shipped = home in path.resolve().parents
    label = f"recipes/{path.resolve().relative_to(home).as_posix()}" if shipped else str(path)
    document = read_header(path) if path.suffix == ".py" else read_file(path, label)
    return RecipeFile(path, label, document, shipped)


def _add_sections(file: RecipeFile, tree: Any, problems: list[Problem]) -> None:
    """Notes the sections of `for` in the file."""

    def add(written: Keys, values: Any) -> None:
        *scale, names = written
        for name in names.split(", "):
            at = (*scale, name)
            file.sections[at], file.written[at] = values, written

    if not isinstance(tree, dict):
        message = "`for` must hold data sets, as `for: {mnist: {…}}`"
        problems.append(Problem(file.document.where(("for",)), message))
        return
    for name, section in tree.items():
        if name not in SCALES:
            add((name,), section)
        elif isinstance(section, dict):
            if whole := {key: value for key, value in section.items() if key in PARTS}:
                add((name,), whole)
            for key, values in section.items():
                if key not in PARTS:
                    add((name, key), values)
        else:
            message = f"`for.{name}` is a scale: it must hold sections, as `{name}: {{colour: {{…}}}}`"
            problems.append(Problem(file.document.where(("for", name)), message))


# --- a model's file ---


def read_header(path: Path) -> Document:
    """The recipe in a model's file, with the places of the file: the indented lines of its docstring that
    begin with a section, as `  train: {steps: 600}`.

    Raises UsageError for a file that is no Python, or whose recipe is no YAML.
    """
    module = module_of(path)
    inside = False
    lines = [""] * (module.line - 1)
    for line in module.docstring.splitlines():
        inside = bool(_HEADER.match(line)) or (inside and (not line.strip() or line.startswith(" ")))
        lines.append(line if inside else "")
    return read_text("\n".join(lines), str(path))


def mistakes(path: Path) -> list[str]:
    """The mistakes in the source of a model's file, as `maf.py:12: …`; [] where it describes a model. Nothing
    is imported."""
    try:
        lineage = catalog.model_class(path)
        if lineage is None:
            return [_no_model(path)]
        methods = [item for cls in lineage if cls.path == path for item in cls.methods.items()]
        public = ("__init__", "sample", *catalog.APPLICATIONS)
        wrong: list[str] = []
        for name, method in methods:
            if name in public or name.startswith(("score_", "fit_")):
                wrong += _of_signature(name, method, path)
        if not wrong:
            catalog.card_at(path)
        return wrong
    except UsageError as e:
        return [e.message]


def _no_model(path: Path) -> str:
    for name, node in module_of(path).classes.items():
        if any(cls.is_model for cls in lineage_of(path, name)):
            return f'{path}:{node.lineno}: class `{name}` needs a line `paper = "…"`, which names its source'
    return f"{path}: no class here derives from `gzcli.Model`"


def _of_signature(name: str, method: ast.FunctionDef, path: Path) -> Iterator[str]:
    """The mistakes in a signature that this very file writes."""
    at, a = f"{path}:{method.lineno}", method.args
    for star, arg in (("*", a.vararg), ("**", a.kwarg)):
        if arg:
            schema_of = "name each option: the signature is the recipe's schema"
            yield f"{at}: `{name}` takes `{star}{arg.arg}`; {schema_of}"
    untyped = set()
    for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs):
        where, option = f"{path}:{arg.lineno}", arg.arg
        if option not in GIVEN and arg.annotation is None:
            untyped.add(option)
            yield f"{where}: option `{option}` of `{name}` has no type; write `{option}: int = 8`"
        elif name == "__init__" and option in RESERVED:
            yield f"{where}: `{option}` cannot be an option: in a recipe it names the model"
    try:
        options = [p for p in params_of(method, path) if p.name not in GIVEN | untyped]
    except UsageError as e:
        yield e.message
        return
    for param in options:
        made_by_gz = {"Tensor", "Module", "Model"} & set(param.annotation.replace("|", " ").split())
        if not made_by_gz and not is_storable(parse(param.annotation)):
            what = f"option `{param.name}` of `{name}` is a `{param.annotation}`, which no recipe can hold"
            yield f"{at}: {what}; known are {STORABLE} and unions of these by `|`"
