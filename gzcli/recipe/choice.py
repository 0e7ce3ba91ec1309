"""Which sections of a recipe's `for` apply: by the scale of the run, and by what is known of the data set.

    for:
      digits: {…}                  # a set, at every scale
      flat: {…}                    # a trait of the pixels, at every scale
      small:                       # a scale:
        colour: {…}                #   a shape class
        few: {…}                   #   a trait
        brief: {…}                 #   a training of minutes
        brief-colour: {…}          #   one on a shape class
        cifar10: {…}               #   a set

Sections of a shape class come first, then those of traits, then those of the set; of one name, the section
for all scales comes before that of the scale. `brief` holds where `--minutes` asks for few of them on a CPU:
a net of an hour would not have learned to draw by then, a smaller one has.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gzcli.core.errors import UsageError, canonical
from gzcli.core.sections import SCALES
from gzcli.data.packs.augment import patch_of
from gzcli.data.packs.traits import SHAPES, TRAITS, Facts, facts_of
from gzcli.data.sets.names import DataSet
from gzcli.data.sets.registry import DataSpec
from gzcli.recipe.files import RecipeFile
from gzcli.recipe.layers import Layer
from gzcli.recipe.load import Problem

BRIEF, FEW_MINUTES = "brief", 15.0  # the section, and the minutes up to which it applies
GENERAL = (*SHAPES, *TRAITS, BRIEF, *(f"{BRIEF}-{shape}" for shape in SHAPES))  # sections of no single set
Path = tuple[str, ...]  # the keys below `for` that lead to a section: ("mnist",) or ("small", "colour")


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    scale: of SCALES; None: the recipe has no scales.
    why: the reason, for people.
    names: shape class and traits of the set, whether the training is brief, alone and by the class, and name
      of the set, in the order in which their sections apply.
    read: the scale whose sections are read; `full` reads those of `paper` where it has none of its own.
    facts: of the set; None: not known.
    """

    scale: str | None
    why: str
    names: tuple[str, ...]
    read: str | None
    facts: Facts | None

    def rank(self, path: Path) -> tuple[int, int] | None:
        """The place of a section in the order in which sections apply; None: it does not."""
        *scale, name = path
        if scale and scale[0] != self.read:
            return None
        places = [i for i, own in enumerate(self.names) if canonical(own) == canonical(name)]
        return (places[0], len(scale)) if places else None


def names_of(found: DataSet | None, name: str, facts: Facts | None, paths: Iterable[Path]) -> tuple[str, ...]:
    """Shape class, traits and name of a set. An embedded set is a demonstration of the models whose recipes
    name it: there it has no class.

    found: the set; None: it is not there yet.
    name: as `data.name` has it.
    facts: of the set; None: not known.
    paths: of all sections of the recipe.
    """
    embedded = isinstance(found, DataSpec) and found.embedded
    if facts is None or (embedded and any(canonical(path[-1]) == canonical(name) for path in paths)):
        return (name,)
    return (facts.shape_class, *facts.traits, name)


def choice_of(
    chain: Iterable[RecipeFile],
    own: Collection[Layer],
    found: DataSet | None,
    name: str,
    gpus: int,
    problems: list[Problem],
) -> Choice:
    """The scale, and the names whose sections apply. Adds to `problems` that there is no such scale.

    own: the files' own values, and what was typed.
    """
    paths = list(dict.fromkeys(at for file in chain for at in file.sections))
    launch = _last(own, "launch")
    on_gpus = not launch.get("cpu") and launch.get("gpus") != 0 and bool(launch.get("gpus") or gpus)
    given = [layer for layer in own if isinstance(layer.tree.get("scale"), str)]
    scale = given[-1].tree["scale"] if given else None
    asked = (scale, given[-1].origin(("scale",))) if scale in SCALES else None
    data = _last(own, "data")
    default = asked[0] if asked else "full" if on_gpus else "small"
    sections = [(name,), (default, name)]
    of_set = [
        tree.get("data") or {}
        for file in chain
        for at, tree in file.sections.items()
        if tuple(map(canonical, at)) in [tuple(map(canonical, section)) for section in sections]
        and isinstance(tree, Mapping)
    ]
    size = data.get("size") or next((d["size"] for d in reversed(of_set) if d.get("size")), None)
    try:
        form = {"size": size, "channels": data.get("channels"), "n": data.get("n")}
        form["patch"] = patch_of(data.get("augment") or ())
        facts = facts_of(found, **form) if found else None
        names = names_of(found, name, facts, paths)
        minutes = _last(own, "train").get("minutes")
        if len(names) > 1 and not on_gpus and isinstance(minutes, int | float) and minutes <= FEW_MINUTES:
            names = (*names[:-1], BRIEF, f"{BRIEF}-{names[0]}", names[-1])
        return choose(paths, asked, on_gpus, names, facts)
    except (UsageError, TypeError, ValueError) as e:  # a wrong size is told with its place
        if isinstance(e, UsageError) and given:
            problems.append(Problem(given[-1].where(("scale",), True), e.message, e.hint))
        return Choice(scale, "", (name,), None, None)


def _last(layers: Iterable[Layer], section: str) -> dict[str, Any]:
    """The values of a section, those of later layers over earlier ones."""
    found: dict[str, Any] = {}
    for layer in layers:
        part = layer.tree.get(section) if isinstance(layer.tree, Mapping) else None
        found |= part if isinstance(part, Mapping) else {}
    return found


def choose(
    paths: Collection[Path],
    asked: tuple[str, str] | None,
    on_gpus: bool,
    names: tuple[str, ...],
    facts: Facts | None,
) -> Choice:
    """The scale that was asked for, else `full` where GPUs are used and `small` elsewhere.

    paths: of all sections of the recipe.
    asked: the scale that was asked for, and where; None: none was.
    on_gpus: whether GPUs are used.
    names: as `names_of` returns them.
    facts: of the set.

    Raises UsageError for a scale that the recipe does not have for this set.
    """
    scales = [scale for scale in SCALES if any(path[0] == scale for path in paths)]
    if not scales:
        if asked and asked[1].startswith("--"):
            raise UsageError(
                f"{asked[1]} {asked[0]}: this recipe has no scales",
                hint="a run is repeated at the scale that it has; a model's recipe has scales",
            )
        return Choice(asked[0] if asked else None, asked[1] if asked else "", names, None, facts)
    scale, why = asked or (("full", "on GPUs") if on_gpus else ("small", "no GPU is used"))
    own = [path for path in paths if path[0] == scale and _decisive(path, names)]
    read = scale
    if not own and scale == "full":
        own = [path for path in paths if path[0] == "paper" and _decisive(path, names)]
        read = "paper" if own else scale
    at_all_scales = any(len(path) == 1 and canonical(path[0]) == canonical(names[-1]) for path in paths)
    if asked and not own and not at_all_scales:
        able = [s for s in scales if any(path[0] == s and _decisive(path, names) for path in paths)]
        of = ", ".join(path[1] for path in paths if path[0] == scale and len(path) > 1)
        raise UsageError(
            f"no setting of scale `{scale}` is known for {facts.words if facts else f'`{names[-1]}`'}",
            hint=f"`--scale {able[0]}`" + (f"; `{scale}` has: {of}" if of else "") if able else None,
        )
    return Choice(scale, why, names, read, facts)


def _decisive(path: Path, names: tuple[str, ...]) -> bool:
    """Whether a section of a scale is for the shape class or the name of the set, and not for a trait."""
    return len(path) > 1 and canonical(path[1]) in map(canonical, {names[0], names[-1]} - {*TRAITS, BRIEF})


def misspelt(path: Path, sets: Iterable[str]) -> tuple[str, str] | None:
    """The mistake, with its hint, of a section whose name nearly is that of a set, a shape class or a trait:
    it would never apply. Other unknown names may be of sets that are imported later."""
    known = [*sets, *GENERAL]
    if len(path) == 1:
        known += SCALES
    name = path[-1]
    if canonical(name) in map(canonical, known):
        return None
    near = difflib.get_close_matches(canonical(name), map(canonical, known), n=1, cutoff=0.75)
    return (f"there is no data set `{name}`", f"did you mean `{near[0]}`?") if near else None


def chosen_by_gz(origin: Mapping[str, str], chain: Collection[RecipeFile]) -> frozenset[str]:
    """The dotted keys whose values nobody but gz chose: defaults, and values of the recipes that it comes
    with.

    origin: the place of each value, by dotted key.
    chain: the files of the recipe.
    """
    of_user = {file.label for file in chain if not file.shipped}
    shipped = {file.label for file in chain} - of_user

    def is_ours(place: str) -> bool:
        return place == "default" or place.split()[-1].rpartition(":")[0] in shipped

    return frozenset(key for key, place in origin.items() if is_ours(place))


def lower_batches(tree: dict[str, Any], origin: dict[str, str], n: int, ours: Collection[str]) -> None:
    """Lowers each batch that gz itself chose, and that is larger than the set, to the largest power of two
    that the set holds, of parts no larger than before. One that the user chose stays, and is refused later.

    tree: the resolved recipe; is changed.
    origin: the place of each value, by dotted key; is changed.
    n: number of training images.
    ours: the keys whose values gz chose.
    """
    stages = {f"stages.{name}.": part for name, part in tree.get("stages", {}).items()} or {"": tree}
    for prefix, part in stages.items():
        key = f"{prefix}train.batch_size"
        if not isinstance(part, Mapping) or part["train"]["batch_size"] <= n:
            continue
        if key in ours:
            train, fits = part["train"], 1 << (n.bit_length() - 1)
            train["accumulate"] = max(1, train["accumulate"] * fits // train["batch_size"])
            train["batch_size"] = fits
            origin[key] = f"{n} images"
