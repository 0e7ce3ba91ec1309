"""Recipe files: the shipped ones by name, the user's by path, and the files that each extends."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gzcli.core.errors import UsageError, canonical, did_you_mean
from gzcli.core.sections import SCALES, SECTIONS
from gzcli.recipe.header import read_header
from gzcli.recipe.load import Document, Problem, read_file
from gzcli.recipe.mistakes import mistakes
from gzcli.store import model_files
from gzcli.store.paths import recipes_dir, trained_in

NO_SETS = ("model", "sample", "stages", *SECTIONS)  # sections of a recipe, not of its `for`


def recipes() -> dict[str, Path]:
    """The shipped recipes: name → file."""
    return {path.stem: path for path in sorted(recipes_dir().glob("*.yaml"))}


def show(what: str) -> str:
    """The text of a shipped recipe or of a file. Raises UsageError where there is none."""
    return find(what).read_text(encoding="utf-8")


@dataclass
class RecipeFile:
    """A recipe file.

    path: where it lies.
    label: its name in messages; of a shipped one `recipes/glow.yaml`, wherever gz is installed.
    document: its content with the place of each key.
    shipped: whether it is gz's own.
    own: its values without `for` and `extends`.
    sections: its values for data sets, shape classes, traits and scales, by the keys below `for`.
    """

    path: Path
    label: str
    document: Document
    shipped: bool = False
    own: dict[str, Any] = field(default_factory=dict)
    sections: dict[tuple[str, ...], Any] = field(default_factory=dict)


def find(what: str) -> Path:
    """The file of a recipe.

    what: name of a shipped recipe, path of a recipe, or name or path of a model from outside. The recipe of
      such a model is the YAML file beside it, else the model's file itself.

    Raises UsageError with the nearest name.
    """
    if model_files.is_file(what):
        what = _added(what)
    if model := model_files.typed(what):
        return _recipe_of(model)
    if what.endswith((".yaml", ".yml")) or "/" in what:
        path = Path(what).expanduser()
        if not path.is_file():
            near = did_you_mean(path.name, [beside.name for beside in path.parent.glob("*.y*ml")])
            hint = near or "`gz recipe copy NAME` makes one of a shipped one"
            raise UsageError(f"there is no recipe `{what}`", hint=hint)
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
    """The recipe beside a model's file, else the file itself."""
    beside = model.with_suffix(".yaml")
    return beside if beside.is_file() else model


def _added(file: str) -> str:
    """Makes the model of a file known to this process. Returns its name.

    Raises UsageError where the file holds no model, or one with the name of a model of gz.
    """
    name = model_files.add(file)
    if canonical(name) in map(canonical, recipes()) or trained_in(name):
        raise UsageError(
            f"`{name}` is a model of gz already", hint=f"call the file otherwise, as `my_{name}.py`"
        )
    if wrong := mistakes(Path(file).expanduser().absolute()):
        raise UsageError("\n".join(wrong), hint=f"`gz model check {file}` tells more")
    return name


def read_chain(what: str) -> tuple[list[RecipeFile], list[Problem]]:
    """The recipe's files, those that it extends first, and the mistakes in them.

    Raises UsageError where one is not there or not YAML.
    """
    chain: list[RecipeFile] = []
    problems: list[Problem] = []
    path = find(what)
    while True:
        shipped = path.resolve().parent == recipes_dir().resolve()
        file = RecipeFile(path, f"recipes/{path.name}" if shipped else str(path), Document(""), shipped)
        file.document = document = read_header(path) if path.suffix == ".py" else read_file(path, file.label)
        chain.insert(0, file)
        problems += document.problems
        tree = document.tree or {}
        if not isinstance(tree, dict):
            message = "a recipe is a map of sections, as `model: {name: vae}`"
            return chain, [*problems, Problem(document.where(()), message)]
        file.own = {key: value for key, value in tree.items() if key not in ("for", "extends")}
        model = path.absolute().with_suffix(".py")
        if not shipped and model.is_file() and model_files.find(path.stem) == model:
            file.own["model"] = {"name": path.stem, **(file.own.get("model") or {})}
        file.sections = _sections(document, tree.get("for") or {}, problems)
        base = tree.get("extends")
        if base is None:
            return chain, problems
        where = document.where(("extends",), value=True)
        if not isinstance(base, str):
            return chain, [*problems, Problem(where, "`extends` must be a recipe's name or path")]
        # a path is relative to the file that holds it
        near = base if "/" not in base and not base.endswith((".yaml", ".yml")) else str(path.parent / base)
        try:
            path = find(near)
        except UsageError as e:
            return chain, [*problems, Problem(where, e.message, e.hint)]
        if any(path.resolve() == other.path.resolve() for other in chain):
            return chain, [*problems, Problem(where, f"`{base}` extends this recipe in its turn")]


def _sections(document: Document, tree: Any, problems: list[Problem]) -> dict[tuple[str, ...], Any]:
    """The sections of `for`, by the keys that lead to each."""
    found: dict[tuple[str, ...], Any] = {}
    if not isinstance(tree, dict):
        message = "`for` must hold data sets, as `for: {mnist: {…}}`"
        problems.append(Problem(document.where(("for",)), message))
        return found
    for name, section in tree.items():
        if name not in SCALES:
            found[(name,)] = section
        elif isinstance(section, dict):
            for inner, values in section.items():
                if inner in NO_SETS:  # it would be taken for the name of a data set
                    message = f"`for.{name}` holds sections by shape class, trait or data set, not `{inner}`"
                    hint = f"as in `{name}: {{colour: {{{inner}: {{…}}}}}}`"
                    problems.append(Problem(document.where(("for", name, inner)), message, hint))
                else:
                    found[name, inner] = values
        else:
            message = f"`for.{name}` is a scale: it must hold sections, as `{name}: {{colour: {{…}}}}`"
            problems.append(Problem(document.where(("for", name)), message))
    return found
