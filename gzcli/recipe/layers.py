"""The layers of a recipe: values of files and of the command line, which sections of `for` apply, and how one
layer is laid over another.

    for:
      mnist: {…}             # a set, at every scale
      small:
        train: {…}           # of the whole scale
        colour: {…}          # a shape class
        few: {…}             # sets of few images
        cifar10: {…}         # a set

Within a scale its own values come first, then those of the shape class, of `few`, and of the set; of one
name, a section of all scales before that of the scale. `tiny` changes `small`, whose sections come before its
own; a set that `tiny` names takes that section alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gzcli.core.errors import UsageError, canonical
from gzcli.core.sections import MEETING, SCALES
from gzcli.data.packs.augment import patch_of
from gzcli.data.packs.open import FEW_IMAGES, SHAPES, Facts, facts_of
from gzcli.data.sets.names import DataSet
from gzcli.recipe.files import Keys, RecipeFile
from gzcli.recipe.yaml import Key, Problem, read_text

MINUTES = 15.0  # up to which a training on a CPU is of the scale `tiny`
GENERAL = (*SHAPES, FEW_IMAGES, *SCALES)  # sections of no single set

# Flags with another name than the last part of their key.
_FLAGS = {
    "data.name": "--data",
    "launch.machines": "--num-machines",
    "launch.main_ip": "--main-process-ip",
    "launch.main_port": "--main-process-port",
}
_TYPED = {
    "extra": "options of `accelerate launch` after `--`",
    "machines": "`--num-machines N`",
    "machine_rank": "`--machine-rank R`",
    "main_ip": "`--main-process-ip HOST`",
    "main_port": "`--main-process-port P`",
}


@dataclass
class Layer:
    """Values of a recipe from one place: a file, a section of its `for`, or the command line.

    where: the place of a key or, if the second argument is true, of its value; for messages.
    origin: the place of a key as it is shown beside its value.
    inside: whether it is a section of `for`.
    applies: whether it is for this data set; else it is only checked.
    source: "shipped", "file" (of the user) or "typed".
    """

    tree: dict[str, Any]
    where: Callable[[Key, bool], str]
    origin: Callable[[Key], str]
    inside: bool = False
    applies: bool = True
    source: str = "typed"

    def section(self, name: str) -> Mapping[str, Any]:
        """The values of a section; {} where the layer has none, or something else in its place."""
        values = self.tree.get(name)
        return values if isinstance(values, Mapping) else {}

    def problem(self, key: Key, message: str, hint: str | None = None, *, value: bool = False) -> Problem:
        """A mistake at a key of the layer, or at its value."""
        return Problem(self.where(key, value), message, hint)


def layers_of(file: RecipeFile, choice: Choice) -> list[Layer]:
    """A file's own values, then its sections of `for`: those that apply in their order, then the others."""
    ranks = {at: choice.rank(at) for at in file.sections}
    applying = sorted((rank, at) for at, rank in ranks.items() if rank is not None)
    others = [layer_of(file, at, applies=False) for at, rank in ranks.items() if rank is None]
    return [layer_of(file), *(layer_of(file, at) for _, at in applying), *others]


def layer_of(file: RecipeFile, section: Key = (), *, applies: bool = True) -> Layer:
    """A file's own values, or those of a section of `for`."""
    at: Key = ("for", *file.written[section]) if section else ()
    tree = (file.sections[section] or {}) if section else file.own
    prefix = f"for.{'.'.join(section)} " if section else ""

    def where(path: Key, value: bool) -> str:
        return file.document.where((*at, *path), value=value)

    def origin(path: Key) -> str:
        return f"{prefix}{file.label}:{file.document.mark((*at, *path)).line}"

    source = "shipped" if file.shipped else "file"
    return Layer(tree, where, origin, inside=bool(section), applies=applies, source=source)


def layers_typed(flags: Mapping[str, Any], sets: Iterable[str], problems: list[Problem]) -> list[Layer]:
    """What was typed: flags by dotted key, None for one that was not given, then texts `a.b=v` of `--set`."""

    def typed(keys: list[str], value: Any, where: str, origin: str) -> Layer:
        for key in reversed(keys):
            value = {key: value}
        return Layer(value, lambda path, value: where, lambda path: origin)

    layers = []
    for key, value in flags.items():
        flag = _FLAGS.get(key) or f"--{key.rpartition('.')[2].replace('_', '-')}"
        if value is not None:
            layers.append(typed(key.split("."), value, f"`{flag}`", flag))
    for text in sets:
        name, equals, value = text.partition("=")
        keys, where = [part.strip() for part in name.split(".")], f"`--set {text}`"
        if not equals or not all(keys):
            problems.append(Problem(where, "not of the form `a.b=v`", "such as `--set train.steps=1000`"))
            continue
        try:
            document = read_text(value, where)
        except UsageError:
            problems.append(Problem(where, f"`{value}` is not YAML", "quote it, such as `--set 'a.b=\"…\"'`"))
            continue
        problems += [Problem(where, problem.message, problem.hint) for problem in document.problems]
        layers.append(typed(keys, document.tree, where, "--set"))
    return layers


def without_meeting(layer: Layer, problems: list[Problem]) -> Mapping[str, Any]:
    """The layer's tree without the keys of `launch` that only the command line may give; adds a mistake for
    each that is given.

    A recipe or run of a stranger must not decide which program is started: `launch.extra`, a key of earlier
    versions, could name one. Nor must it decide which machine is trusted: processes that meet at an address
    accept whatever is sent from there.
    """
    launch = layer.section("launch")
    banned = ("extra",) if layer.source == "typed" else ("extra", *MEETING)
    if not set(banned) & set(launch):
        return layer.tree
    for key in banned:
        if launch.get(key):
            message = f"`launch.{key}` is for the command line alone, where it is yours"
            problems.append(layer.problem(("launch", key), message, f"type {_TYPED[key]}"))
    return {**layer.tree, "launch": {key: value for key, value in launch.items() if key not in banned}}


# --- which sections of `for` apply ---


@dataclass(frozen=True)
class Choice:
    """The scale with its reason in words, None of a recipe without scales; the sections that apply, in order,
    which a recipe need not have; and the facts of the set, None where it is not known."""

    scale: str | None
    why: str
    order: tuple[Keys, ...]
    facts: Facts | None = None

    def rank(self, path: Keys) -> int | None:
        """The place of a section in `order`; None: it does not apply."""
        path = tuple(map(canonical, path))
        return self.order.index(path) if path in self.order else None


def choice_of(
    chain: Iterable[RecipeFile],
    layers: Collection[Layer],
    dataset: DataSet | None,
    name: str,
    gpus: int,
    problems: list[Problem],
) -> Choice:
    """The scale and the sections that apply. Adds to `problems` that the recipe lacks the scale.

    layers: the files' own values, and what was typed.
    dataset: the data set `name`; None: it is not there yet.
    """
    written = [(tuple(map(canonical, at)), tree) for file in chain for at, tree in file.sections.items()]
    sections, of_set = dict(written), canonical(name)
    scaled = any(at[0] in SCALES for at in sections)
    layer = next((layer for layer in reversed([*layers]) if layer.tree.get("scale") in SCALES), None)
    if layer:
        scale, why = layer.tree["scale"], layer.origin(("scale",))
    else:
        scale, why = _usual_scale(layers, sections, of_set, name, gpus) if scaled else (None, "")
    facts = None
    if dataset:
        data = _merged(layer.section("data") for layer in layers)
        of_name = [tree for at, tree in written if at in ((of_set,), (scale, of_set))]
        sized = _merged(tree.get("data") for tree in of_name if isinstance(tree, Mapping))
        form = {"size": data.get("size") or sized.get("size")}
        form |= {"channels": data.get("channels"), "n": data.get("n")}
        try:
            facts = facts_of(dataset, **form, patch=patch_of(data.get("augment") or ()))
        except (UsageError, TypeError, ValueError):  # a wrong size is told with its place
            return Choice(scale, "", ((of_set,),))
    choice = Choice(scale, why, tuple(_order(scale if scaled else None, sections, of_set, facts)), facts)
    if layer and (problem := _lack(choice, sections, of_set, facts.words if facts else f"`{name}`")):
        problems.append(layer.problem(("scale",), *problem, value=True))
    return choice


def _usual_scale(
    layers: Iterable[Layer], sections: Collection[Keys], of_set: str, name: str, gpus: int
) -> tuple[str, str]:
    """The scale where none is asked for, and why."""
    layers = list(layers)
    launch = _merged(layer.section("launch") for layer in layers)
    minutes = _merged(layer.section("train") for layer in layers).get("minutes")
    if ("tiny", of_set) in sections:
        return "tiny", f"the recipe names {name}"
    if not launch.get("cpu") and launch.get("gpus") != 0 and (launch.get("gpus") or gpus):
        return "full", "on GPUs"
    if isinstance(minutes, int | float) and minutes <= MINUTES:
        return "tiny", f"up to {MINUTES:g} minutes"
    return "small", "no GPU is used"


def _order(scale: str | None, sections: Collection[Keys], of_set: str, facts: Facts | None) -> Iterator[Keys]:
    """The sections in the order in which they apply."""
    if scale == "tiny" and ("tiny", of_set) in sections:
        yield from ((of_set,), ("tiny", of_set))
        return
    few = [FEW_IMAGES] if facts and facts.few else []
    names = [*([facts.shape_class, *few] if facts else []), of_set]
    first = "small" if scale == "tiny" else scale
    if first:
        yield (first,)
    for name in names:
        yield (name,)
        if first:
            yield (first, name)
    if scale == "tiny":
        yield (scale,)
        yield from ((scale, name) for name in names)


def _lack(
    choice: Choice, sections: Collection[Keys], of_set: str, words: str
) -> tuple[str, str | None] | None:
    """The mistake, with its hint, that a recipe lacks the scale that was asked for; `words` name the set."""
    scale = str(choice.scale)
    if not any(at[0] in SCALES for at in sections):
        hint = "a run is repeated at the scale that it has; a model's recipe has scales"
        typed = choice.why.startswith("--")
        return (f"{choice.why} {scale}: this recipe has no scales", hint) if typed else None

    def serves(scale: str) -> bool:
        """Whether it has values for the shape class, for the set or, but for `paper`, for all sets."""
        order = _order(scale, sections, of_set, choice.facts)
        if any(at in sections for at in order if at[-1] not in (FEW_IMAGES, *SCALES)):
            return True
        return scale != "paper" and ("small" if scale == "tiny" else scale,) in sections

    if serves(scale):
        return None
    able = next((other for other in ("small", "full", "paper") if serves(other)), None)
    named = ", ".join(at[1] for at in sections if at[0] == scale and at[1:])
    hint = f"`--scale {able}`" + (f"; `{scale}` has: {named}" if named else "")
    return f"no setting of scale `{scale}` is known for {words}", hint if able else None


def _merged(parts: Iterable[Any]) -> dict[str, Any]:
    """The values of all maps among the parts, those of later ones over earlier ones."""
    return {key: value for part in parts if isinstance(part, Mapping) for key, value in part.items()}


def misspelt(path: Keys, sets: Iterable[str]) -> tuple[str, str] | None:
    """The mistake, with its hint, of a section whose name nearly is that of a set, a shape class or a scale:
    it would never apply. Other unknown names may be of sets that are imported later."""
    names = [*map(canonical, (*sets, *GENERAL))]
    if canonical(path[-1]) in names:
        return None
    near = difflib.get_close_matches(canonical(path[-1]), names, n=1, cutoff=0.75)
    return (f"there is no data set `{path[-1]}`", f"did you mean `{near[0]}`?") if near else None


# --- one layer over another ---


def lay(
    tree: dict[str, Any], part: Mapping[str, Any], origin: dict[str, str], of: Callable[[Key], str]
) -> None:
    """Replaces values of the tree by those of a layer, and notes the origin of each. A layer that may change
    the number of parameters sets `params` to null."""
    if changes_model(part):
        tree["params"] = None

    def put(tree: dict[str, Any], part: Mapping[str, Any], at: Key) -> None:
        for key, value in part.items():
            if isinstance(value, Mapping):
                put(tree.setdefault(key, {}), value, (*at, key))
            else:
                tree[key] = value
                origin[".".join((*at, key))] = of((*at, key))

    put(tree, part, ())


def dotted(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys of all values that are not maps."""
    keys = []
    for key, value in tree.items():
        keys += dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [prefix + key]
    return keys


def changes_model(part: Mapping[str, Any]) -> bool:
    """Whether a layer may change how many parameters the model has."""
    return bool(set(part.get("model", {})) - {"name"} or {"size", "channels"} & set(part.get("data", {})))
