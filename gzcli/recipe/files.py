"""Recipe files, and the files that they extend, as layers: a file's own values, the sections of its `for`,
and command-line values. A file is a shipped recipe (by name), a user's recipe (by path), or the header of a
model's file.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from gzcli.core.errors import UsageError, canonical, did_you_mean
from gzcli.core.hints import advice, gz
from gzcli.core.sections import SCALES, SECTIONS
from gzcli.data.sets.registry import is_set
from gzcli.models import catalog
from gzcli.models.catalog import ENGINE_ARGS, lineage_of, module_of, params_of
from gzcli.recipe.schema import is_storable, parse, schema
from gzcli.recipe.yaml import Document, Key, Problem, read_file, read_text
from gzcli.store import model_files
from gzcli.store.paths import recipes_dir, trained_in

SCALE_KEYS = ("model", "sample", "stages", *SECTIONS)  # below a scale, these apply to all its sets
STORABLE = "int, float, bool, str, None, Literal[…], tuple[…], list[…]"
RESERVED = {"name"}  # key in a recipe's `model` with the model's name
_HEADER = re.compile(rf" +({'|'.join([*schema(None), 'stages', 'for', 'extends'])}):")
_ENTRY = re.compile(r" +(#|- |[^\s:]+:( |$))")  # a line of YAML that can come after an empty one
# Flags with another name than the last part of their key.
_FLAGS = {
    "data.name": "--data",
    "launch.machines": "--num-machines",
    "launch.main_ip": "--main-process-ip",
    "launch.main_port": "--main-process-port",
}
# Names of models elsewhere, in canonical form → the nearest model here.
FOREIGN_MODELS = {
    **dict.fromkeys(("advvae", "adversarialvae", "vae_gan", "vaegan"), "aae"),
    **dict.fromkeys(("vanvae", "vanillavae", "betavae", "beta_vae"), "vae"),
    **dict.fromkeys(("vanflow", "vanillaflow", "nice"), "flow"),
    **dict.fromkeys(("condvae", "conditional_vae"), "cvae"),
    **dict.fromkeys(("condddpm", "conditional_ddpm"), "cddpm"),
    **dict.fromkeys(("condfm", "conditional_flow_matching"), "cfm"),
    **dict.fromkeys(("dae", "diffusionae", "diffusion_autoencoder"), "diffae"),
    **dict.fromkeys(("gpt", "mar", "taming"), "vqgan"),
    **dict.fromkeys(("consistency_model", "ct", "icm"), "ect"),
    **dict.fromkeys(("imf", "mean_flow"), "meanflow"),
    **dict.fromkeys(("dreambooth", "lora", "stable_diffusion"), "sd-lora"),
    **dict.fromkeys(("diffusion", "ddim"), "ddpm"),
    **dict.fromkeys(("flow_matching", "fm_ot"), "fm"),
    "rectified_flow": "rf",
    **dict.fromkeys(("score_sde", "ncsn", "ncsnpp"), "sgm"),
    **dict.fromkeys(("gan", "sngan"), "dcgan"),
    **dict.fromkeys(("wgan_gp", "wgangp"), "wgan"),
    **dict.fromkeys(("pixelcnn_pp", "pixelcnn++"), "pixelcnnpp"),
    **dict.fromkeys(("flow++", "flow_pp"), "flowpp"),
    "visual_autoregressive": "var",
    **dict.fromkeys(("nvae", "very_deep_vae"), "vdvae"),
}
Keys = tuple[str, ...]  # keys of a section below `for`: ("small",), ("mnist",), ("small", "grey")


@dataclass(frozen=True)
class Layer:
    """Values of a recipe from one place: a file, a section of its `for`, or the command line."""

    tree: dict[str, Any]
    label: str  # the file (if shipped, `recipes/glow.yaml` wherever gz is installed), or the flag
    source: str = "typed"  # "shipped", "file" (of the user) or "typed"
    typed: str = ""  # the option as typed
    document: Document | None = None  # of the file
    at: Key = ()  # keys in the document that lead to the tree
    case: Keys = ()  # the section of `for`: of `128px, 256px`, which is one in the document, one of the two
    applies: bool = True  # whether it is for this data set; otherwise it is only checked

    def where(self, path: Key, value: bool = False) -> str:
        """The position of a key or of its value, as text for messages."""
        return self.document.where((*self.at, *path), value=value) if self.document else f"`{self.typed}`"

    def origin(self, path: Key) -> str:
        """The position of a key, shown beside its value."""
        if self.document is None:
            return self.label
        case = f"for.{'.'.join(self.case)} " if self.case else ""
        return f"{case}{self.label}:{self.document.mark((*self.at, *path)).line}"

    def section(self, name: str) -> Mapping[str, Any]:
        """The values of a section; {} if the layer has none, or a value of another kind."""
        values = self.tree.get(name)
        return values if isinstance(values, Mapping) else {}

    def problem(self, key: Key, message: str, hint: str | None = None, *, value: bool = False) -> Problem:
        """A mistake at a key of the layer, or at its value."""
        return Problem(self.where(key, value), message, hint)


@dataclass(frozen=True)
class RecipeFile:
    """A recipe file: its values without `for` and `extends`, the file that it extends, and the sections of
    `for`."""

    path: Path
    document: Document
    base: Layer
    extends: Any
    sections: Mapping[Keys, Layer]

    @property
    def tree(self) -> dict[str, Any]:
        return self.base.tree

    @property
    def shipped(self) -> bool:
        return self.base.source == "shipped"


def recipes() -> dict[str, Path]:
    """The shipped recipes: name → file."""
    return {path.stem: path for path in sorted(recipes_dir().glob("*.yaml"))}


def presets() -> list[str]:
    """Presets, which recipes may extend. They contain values that several recipes share, such as
    `presets/unet`."""
    return [f"presets/{path.stem}" for path in sorted((recipes_dir() / "presets").glob("*.yaml"))]


def show(what: str) -> str:
    """The text of a shipped recipe or of a file. Raises UsageError if there is none."""
    return find(what).read_text(encoding="utf-8")


def find(what: str) -> Path:
    """The file of a recipe: of a shipped recipe or preset by name, of a user's recipe by path, or of an
    outside model. An outside model's recipe is the YAML file beside it, otherwise the model's file itself.
    Raises UsageError with the closest name."""
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
            near = as_data(what) or did_you_mean(path.name, [x.name for x in path.parent.glob("*.y*ml")])
            copy = "copy a shipped one with `gz recipe copy NAME`"
            raise UsageError(f"there is no recipe `{what}`", hint=near or copy)
        return path
    shipped = {canonical(name): path for name, path in recipes().items()}
    if canonical(what) in shipped:
        return shipped[canonical(what)]
    if place := trained_in(what):
        recipe, stage = place
        hint = gz("train", recipe, set={f"stages.{stage}.model.name": canonical(what)})
        message = f"`{what}` cannot be trained alone: it is the stage `{stage}` of `{recipe}`"
        raise UsageError(message, hint=hint)
    if model := catalog.zoo_file(what) or model_files.find(what):
        return _recipe_of(model)
    names = "see the names with `gz list models`, or pass your own recipe as a path"
    if Path(f"{what}.py").is_file():
        raise UsageError(
            f"there is no model `{what}`", hint=f"for the file in this folder, use `./{what}.py`"
        )
    ours = FOREIGN_MODELS.get(canonical(what))
    near = f"the closest model in gz is `{ours}`" if ours else as_data(what) or did_you_mean(what, recipes())
    raise UsageError(f"there is no model `{what}`", hint=near or names)


def as_data(what: str) -> str | None:
    """The hint for a text that names a data set instead of a model; None for any other text."""
    return f"`{what}` is a data set: `gz train --data {shlex.quote(what)}`" if is_set(what) else None


def _recipe_of(model: Path) -> Path:
    beside = model.with_suffix(".yaml")
    return beside if beside.is_file() else model


def _added(file: str) -> str:
    """Registers the model of a file in this process. Returns its name."""
    name = model_files.add(file)
    if canonical(name) in map(canonical, recipes()) or catalog.zoo_file(name):
        hint = f"rename the file, for example to `my_{name}.py`"
        raise UsageError(f"gz already has a model `{name}`", hint=hint)
    if wrong := mistakes(Path(file).expanduser().absolute()):
        raise UsageError("\n".join(wrong), hint=advice("see the details with {}", gz("model check", file)))
    return name


# --- a recipe with the recipes that it extends ---


def read_chain(what: str) -> tuple[list[RecipeFile], list[Problem]]:
    """The recipe's files, beginning with those that it extends, and the mistakes in them. Raises UsageError
    if a file is missing or is not YAML."""
    chain: list[RecipeFile] = []
    problems: list[Problem] = []
    path = find(what)
    while True:
        file = _read(path, problems)
        chain.insert(0, file)
        base, where = file.extends, file.document.where(("extends",), value=True)
        if base is None:
            return chain, problems
        if not isinstance(base, str):
            return chain, [*problems, Problem(where, "`extends` must be a recipe's name or path")]
        is_name = "/" not in base and not base.endswith((".yaml", ".yml"))
        is_preset = (recipes_dir() / f"{base}.yaml").is_file()
        try:  # a path is relative to the file that contains it
            path = find(base if is_name or is_preset else str(path.parent / base))
        except UsageError as e:
            return chain, [*problems, Problem(where, e.message, e.hint)]
        if any(path.resolve() == parent.path.resolve() for parent in chain):
            return chain, [
                *problems,
                Problem(where, f"`extends` forms a circle: `{base}` also extends this recipe"),
            ]


def _read(path: Path, problems: list[Problem]) -> RecipeFile:
    home = recipes_dir().resolve()
    shipped = home in path.resolve().parents
    label = f"recipes/{path.resolve().relative_to(home).as_posix()}" if shipped else str(path)
    if shipped:
        document = _parsed(path.read_text(encoding="utf-8"), label)
    else:
        document = read_header(path) if path.suffix == ".py" else read_file(path, label)
    problems += document.problems
    tree = document.tree or {}
    if not isinstance(tree, dict):
        message = "a recipe is a map of sections, such as `model: {name: vae}`"
        problems.append(Problem(document.where(()), message))
        tree = {}
    general = {key: value for key, value in tree.items() if key not in ("for", "extends")}
    model = path.absolute().with_suffix(".py")
    if not shipped and model in (catalog.zoo_file(path.stem), model_files.find(path.stem)):
        general["model"] = {"name": path.stem, **(general.get("model") or {})}
    base = Layer(general, label, "shipped" if shipped else "file", document=document)
    sections = _sections(base, tree.get("for") or {}, problems)
    return RecipeFile(path, document, base, tree.get("extends"), sections)


@cache
def _parsed(text: str, label: str) -> Document:
    """A parsed shipped recipe. It is cached, because a league or a page resolves it many times, and no caller
    changes it."""
    return read_text(text, label)


def _sections(file: Layer, tree: Any, problems: list[Problem]) -> dict[Keys, Layer]:
    """The sections of a file's `for`."""
    sections: dict[Keys, Layer] = {}

    def add(written: Keys, values: Any) -> None:
        *scale, names = written
        for name in names.split(", "):
            case = (*scale, name)
            sections[case] = replace(file, tree=values or {}, at=("for", *written), case=case)

    if not isinstance(tree, dict):
        problems.append(file.problem(("for",), "`for` must contain data sets, such as `for: {mnist: {…}}`"))
        return sections
    for name, section in tree.items():
        if name not in SCALES:
            add((name,), section)
        elif isinstance(section, dict):
            if whole := {key: value for key, value in section.items() if key in SCALE_KEYS}:
                add((name,), whole)
            for key, values in section.items():
                if key not in SCALE_KEYS:
                    add((name, key), values)
        else:
            message = (
                f"`for.{name}` is a scale: it must contain sections, such as `{name}: {{colour: {{…}}}}`"
            )
            problems.append(file.problem(("for", name), message))
    return sections


def layers_typed(flags: Mapping[str, Any], sets: Iterable[str], problems: list[Problem]) -> list[Layer]:
    """The layers of typed settings: flags by dotted key (None if not typed), then texts `a.b=v` of
    `--set`."""
    layers = []

    def add(keys: list[str], value: Any, label: str, typed: str) -> None:
        for key in reversed(keys):
            value = {key: value}
        layers.append(Layer(value, label, typed=typed))

    for key, value in flags.items():
        flag = _FLAGS.get(key) or f"--{key.rpartition('.')[2].replace('_', '-')}"
        if value is not None:
            add(key.split("."), value, flag, flag)
    for text in sets:
        name, equals, value = text.partition("=")
        keys, where = [part.strip() for part in name.split(".")], f"`--set {text}`"
        if not equals or not all(keys):
            like = f"{name}=VALUE" if "." in name and not equals else "train.steps=1000"
            problems.append(Problem(where, "not of the form `a.b=v`", f"write it as `--set {like}`"))
            continue
        try:
            document = read_text(value, where)
        except UsageError:
            problems.append(Problem(where, f"`{value}` is not valid YAML", "quote it: `--set 'a.b=\"…\"'`"))
            continue
        problems += [Problem(where, problem.message, problem.hint) for problem in document.problems]
        add(keys, document.tree, "--set", f"--set {text}")
    return layers


# --- a model's file ---


def read_header(path: Path) -> Document:
    """The recipe in a model's file, with positions in that file. It consists of the indented lines of the
    docstring that begin with a section, such as `train: {steps: 600}`, and the lines below them. An indented
    line after an empty one that has no key, such as an equation, does not belong to it. Raises UsageError if
    the file is not Python, or if the recipe is not YAML."""
    module = module_of(path)
    inside = after_empty = False
    lines = [""] * (module.line - 1)
    for line in module.docstring.splitlines():
        more = line.startswith(" ") and (not after_empty or _ENTRY.match(line))
        inside = bool(_HEADER.match(line)) or (inside and bool(more or not line.strip()))
        lines.append(line if inside else "")
        after_empty = not line.strip()
    return read_text("\n".join(lines), str(path))


def mistakes(path: Path) -> list[str]:
    """The mistakes in the source of a model's file, such as `maf.py:12: …`; [] if it describes a model. The
    file is not imported."""
    try:
        lineage = catalog.model_class(path)
        if lineage is None:
            for name, node in module_of(path).classes.items():
                if any(cls.is_model for cls in lineage_of(path, name)):
                    needed = 'a line `paper = "…"` that names its source'
                    return [f"{path}:{node.lineno}: class `{name}` needs {needed}"]
            return catalog.outdated_imports(path) or [f"{path}: no class derives from `gzcli.Model`"]
        if variants := lineage[0].attributes.get("variants"):
            instead = f"write a recipe with `extends: ./{path.name}` for each"
            return [f"{path}:{variants.lineno}: `variants` works only in models of gz; {instead}"]
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


def _of_signature(name: str, method: ast.FunctionDef, path: Path) -> Iterator[str]:
    """The mistakes in a signature that this file itself defines."""
    at, a = f"{path}:{method.lineno}", method.args
    for star, arg in (("*", a.vararg), ("**", a.kwarg)):
        if arg:
            schema_of = "name each option: the signature is the recipe's schema"
            yield f"{at}: `{name}` takes `{star}{arg.arg}`; {schema_of}"
    untyped = set()
    for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs):
        where, option = f"{path}:{arg.lineno}", arg.arg
        if option not in ENGINE_ARGS and arg.annotation is None:
            untyped.add(option)
            yield f"{where}: option `{option}` of `{name}` has no type; write `{option}: int = 8`"
        elif name == "__init__" and option in RESERVED:
            yield f"{where}: `{option}` cannot be an option: recipes use this key for the model's name"
    try:
        options = [p for p in params_of(method, path) if p.name not in ENGINE_ARGS | untyped]
    except UsageError as e:
        yield e.message
        return
    for param in options:
        made_by_gz = {"Tensor", "Module", "Model"} & set(param.annotation.replace("|", " ").split())
        if not made_by_gz and not is_storable(parse(param.annotation)):
            what = (
                f"option `{param.name}` of `{name}` has the type `{param.annotation}`, which a recipe "
                "cannot contain"
            )
            yield f"{at}: {what}; use {STORABLE} or a union of these with `|`"
