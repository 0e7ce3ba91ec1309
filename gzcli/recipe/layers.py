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
from gzcli.data.packs.traits import FEW_IMAGES, SHAPES, Facts, facts_of
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


# --- layers of files and of the command line ---


def layers_of(file: RecipeFile, choice: Choice) -> list[Layer]:
    """A file's own values, then its sections of `for`: those that apply in their order, then the others."""
    ranks = {at: choice.rank(at) for at in file.sections}
    applying = sorted((rank, at) for at, rank in ranks.items() if rank is not None)
    chosen = [layer_of(file, at) for _, at in applying]
    others = [layer_of(file, at, applies=False) for at, rank in ranks.items() if rank is None]
    return [layer_of(file), *chosen, *others]


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
    layers = []
    for key, value in flags.items():
        flag = _FLAGS.get(key) or f"--{key.rpartition('.')[2].replace('_', '-')}"
        if value is not None:
            layers.append(_typed(key.split("."), value, f"`{flag}`", flag))
    for text in sets:
        name, equals, value = text.partition("=")
        keys, where = [part.strip() for part in name.split(".")], f"`--set {text}`"
        if not equals or not all(keys):
            problems.append(Problem(where, "not of the form `a.b=v`", "such as `--set train.steps=1000`"))
            continue
        try:
            document = read_text(value, where)
        except UsageError:
            hint = "quote it, such as `--set 'a.b=\"…\"'`"
            problems.append(Problem(where, f"`{value}` is not YAML", hint))
            continue
        problems += [Problem(where, problem.message, problem.hint) for problem in document.problems]
        layers.append(_typed(keys, document.tree, where, "--set"))
    return layers


def _typed(keys: list[str], value: Any, where: str, origin: str) -> Layer:
    for key in reversed(keys):
        value = {key: value}
    return Layer(value, lambda path, value: where, lambda path: origin)


def without_meeting(layer: Layer, problems: list[Problem]) -> Mapping[str, Any]:
    """The layer's tree without the keys of `launch` that only the command line may give; adds a mistake for
    each that is given.

    A recipe or run of a stranger must not decide which program is started: `launch.extra`, a key of earlier
    versions, could name one. Nor must it decide which machine is trusted: processes that meet at an address
    accept whatever is sent from there.
    """
    launch = layer.tree.get("launch")
    banned = ("extra",) if layer.source == "typed" else ("extra", *MEETING)
    if not isinstance(launch, Mapping) or not set(banned) & set(launch):
        return layer.tree
    for key in banned:
        if launch.get(key):
            message = f"`launch.{key}` is for the command line alone, where it is yours"
            problems.append(Problem(layer.where(("launch", key), False), message, f"type {_TYPED[key]}"))
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
    found: DataSet | None,
    name: str,
    gpus: int,
    problems: list[Problem],
) -> Choice:
    """The scale and the sections that apply. Adds to `problems` that the recipe lacks the scale.

    layers: the files' own values, and what was typed.
    found: the data set `name`; None: it is not there yet.
    """
    written = [(tuple(map(canonical, at)), tree) for file in chain for at, tree in file.sections.items()]
    sections = dict(written)
    asked = [layer for layer in layers if layer.tree.get("scale") in SCALES]
    scale = asked[-1].tree["scale"] if asked else None
    why = asked[-1].origin(("scale",)) if asked else ""
    scaled = any(at[0] in SCALES for at in sections)
    problem: UsageError | None = None
    if scaled and not asked:
        scale, why = _usual_scale(layers, sections, name, gpus)
    elif asked and not scaled and why.startswith("--"):
        problem = UsageError(
            f"{why} {scale}: this recipe has no scales",
            hint="a run is repeated at the scale that it has; a model's recipe has scales",
        )
    facts = None
    if found:
        of_set = [tree for at, tree in written if at in ((canonical(name),), (scale, canonical(name)))]
        data = _values((layer.tree for layer in layers), "data")
        size = data.get("size") or _values(of_set, "data").get("size")
        form = {"size": size, "channels": data.get("channels"), "n": data.get("n")}
        try:
            facts = facts_of(found, **form, patch=patch_of(data.get("augment") or ()))
        except (UsageError, TypeError, ValueError):  # a wrong size is told with its place
            return Choice(scale, "", ((canonical(name),),))
    order = tuple(_order(scale if scaled else None, sections, name, facts))
    if scaled and asked and not _has_setting(sections, order, str(scale)):
        words = facts.words if facts else f"`{name}`"
        orders = {each: tuple(_order(each, sections, name, facts)) for each in ("small", "full", "paper")}
        able = [each for each in orders if _has_setting(sections, orders[each], each)]
        of = ", ".join(at[1] for at in sections if at[0] == scale and at[1:])
        hint = f"`--scale {able[0]}`" + (f"; `{scale}` has: {of}" if of else "") if able else None
        problem = UsageError(f"no setting of scale `{scale}` is known for {words}", hint=hint)
    if problem:
        problems.append(Problem(asked[-1].where(("scale",), True), problem.message, problem.hint))
    return Choice(scale, why, order, facts)


def _usual_scale(
    layers: Collection[Layer], sections: Collection[Keys], name: str, gpus: int
) -> tuple[str, str]:
    """The scale where none is asked for, and why."""
    trees = [layer.tree for layer in layers]
    launch, minutes = _values(trees, "launch"), _values(trees, "train").get("minutes")
    if ("tiny", canonical(name)) in sections:
        return "tiny", f"the recipe names {name}"
    if not launch.get("cpu") and launch.get("gpus") != 0 and (launch.get("gpus") or gpus):
        return "full", "on GPUs"
    if isinstance(minutes, int | float) and minutes <= MINUTES:
        return "tiny", f"up to {MINUTES:g} minutes"
    return "small", "no GPU is used"


def _order(scale: str | None, sections: Collection[Keys], name: str, facts: Facts | None) -> Iterator[Keys]:
    """The sections in the order in which they apply."""
    of_set = canonical(name)
    if scale == "tiny" and ("tiny", of_set) in sections:
        yield from ((of_set,), ("tiny", of_set))
        return
    few = [FEW_IMAGES] if facts and facts.few else []
    names = [*([facts.shape_class, *few] if facts else []), of_set]
    scales = ["small", "tiny"] if scale == "tiny" else [scale] if scale else []
    yield from ((first,) for first in scales[:1])
    for each in names:
        yield (each,)
        yield from ((first, each) for first in scales[:1])
    for then in scales[1:]:
        yield (then,)
        yield from ((then, each) for each in names)


def _has_setting(sections: Collection[Keys], order: Iterable[Keys], scale: str) -> bool:
    """Whether a scale has values for a set: for its shape class, for itself, or, but for `paper`, for all."""
    if any(at in sections for at in order if at[-1] not in (FEW_IMAGES, *SCALES)):
        return True
    return scale != "paper" and ("small" if scale == "tiny" else scale,) in sections


def _values(trees: Iterable[Any], section: str) -> dict[str, Any]:
    """The values of a section, those of later trees over earlier ones."""
    parts = [tree.get(section) for tree in trees if isinstance(tree, Mapping)]
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
    tree: dict[str, Any],
    part: Mapping[str, Any],
    origin: dict[str, str],
    of: Callable[[Key], str],
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
