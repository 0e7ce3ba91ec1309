"""What a recipe may contain: closed sections with closed keys. The keys of a model are read from its
signatures.

A schema is a tree of `Rule`s in the shape of a recipe. A rule's type is written as in a signature, so that
`train.steps` and a model's own hyperparameter are checked by the same few lines: int, float, bool, str, None,
Any, Size, Literal[…], tuple[…], list[…] and unions of them by `|`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from operator import ge, gt, le, lt
from typing import Any, NamedTuple

from gzcli.core import sections
from gzcli.core.errors import UsageError, canonical, did_you_mean
from gzcli.core.sections import FIXED_KEYS, SECTIONS, SYNONYMS, Part, keys_of, renamed, without_gone
from gzcli.core.units import SIZE_FORMS, canonical_size, nearest
from gzcli.models.catalog import ModelCard, Param, phases, scores_made
from gzcli.recipe.yaml import WRONG, Key, Problem, scalar

LARGEST_FLOAT = 3.4028234663852886e38  # of float32, in which models compute
ABSENT = object()  # default of a key that is only in the resolved recipe if it is given
ANY = "*"  # represents every other key of a section whose keys are not known
# keys of other programs → what to use here
FOREIGN_KEYS = {
    "epochs": "use `train.steps`; `gz train MODEL --epochs N` converts epochs to steps",
}


# ---------------------------------------------------------------------------- rules


@dataclass(frozen=True)
class Rule:
    """What a key may contain: its type, written as in a signature, its default, and the range of its numbers,
    written as for `limits`."""

    annotation: str
    default: Any = None
    range: str | None = None


_CHOICE = re.compile(r"Annotated\[str, (\w+)\]")

Rules = Mapping[str, "Rule | Rules"]  # key → its rule, or those of the keys below it


def below(rules: Rules, key: str) -> Rules:
    """The rules of the keys inside a section or map."""
    rule = rules[key]
    return {} if isinstance(rule, Rule) else rule


def rules_of(section: type) -> dict[str, Rule]:
    """The rules of the keys that a section of `sections.py` declares."""
    return {f.name: Rule(_typed(str(f.type)), f.default, f.metadata.get("range")) for f in keys_of(section)}


def _typed(annotation: str) -> str:
    """A type from `sections.py`. A choice from a table, `Annotated[str, TABLE]`, becomes a Literal of its
    keys."""
    literal = lambda choice: f"Literal[{', '.join(map(repr, vars(sections)[choice[1]]))}]"  # noqa: E731
    return _CHOICE.sub(literal, annotation)


DATA, TRAIN, OPTIM, OOD, BENCH, LAUNCH = map(rules_of, SECTIONS.values())
PART = rules_of(Part)
FIRST_KEYS = ("about", "scale", "seed", "format")


def schema(card: ModelCard | None) -> Rules:
    """The rules of a recipe without stages, sections in order. Without a model, any key is allowed in the
    sections whose keys a model decides."""
    anything: Rules = {ANY: Rule("")}
    phase: Rules = {key: replace(rule, default=ABSENT) for key, rule in OPTIM.items()}
    names, scores = (phases(card), score_names(card)) if card else (None, [])
    listed = f"Literal[{', '.join(map(repr, scores))}]" if scores else "str"
    of_scores = replace(OOD["scores"], annotation=f"tuple[{listed}, ...] | None")
    return {
        **{key: PART[key] for key in FIRST_KEYS},
        "model": {"name": Rule("str"), **(_rules(card.params) if card else anything)},
        "data": DATA,
        "train": TRAIN,
        "optim": {**OPTIM, **({ANY: phase} if names is None else dict.fromkeys(names, phase))},
        "sample": _rules(card.sample) if card else anything,
        "ood": {**OOD, "scores": of_scores, **(score_options(card) if card else anything)},
        "bench": BENCH,
        "launch": LAUNCH,
        "params": PART["params"],
    }


def staged(cards: Mapping[str, ModelCard | None]) -> Rules:
    """The rules of a recipe in stages: sections at the top apply to all stages, sections below `stages` to
    one stage, which cannot have another data set."""
    own_data = {key: rule for key, rule in DATA.items() if key != "name"}
    first, last = {key: PART[key] for key in FIRST_KEYS}, {"bench": BENCH, "launch": LAUNCH}
    stages: dict[str, Rules] = {}
    for name, card in cards.items():
        rules = {**schema(card), "data": own_data}
        stages[name] = _without_defaults({k: r for k, r in rules.items() if k not in {**first, **last}})
    shared = _without_defaults({"train": TRAIN, "optim": OPTIM})
    return {**first, "data": DATA, **shared, "stages": stages, **last}


def _without_defaults(rules: Rules) -> Rules:
    """The same rules without defaults, so that missing keys stay missing."""
    return {
        k: replace(r, default=ABSENT) if isinstance(r, Rule) else _without_defaults(r)
        for k, r in rules.items()
    }


def _rules(params: Mapping[str, Param]) -> dict[str, Rule]:
    # a required parameter has no default; `missing` finds it if it is not given
    return {n: Rule(p.annotation, ABSENT if p.required else p.default, p.range) for n, p in params.items()}


def score_options(card: ModelCard) -> dict[str, Rule]:
    """The options of a model's scores: keys of the recipe's `ood` section, and of `gz ood`. An option is
    passed to every score that has it. If the scores' defaults differ, it has no default here, and each score
    uses its own.
    """
    rules: dict[str, Rule] = {}
    for options in card.scores.values():
        for name, rule in _rules(options).items():
            differs = rules.get(name, rule) != rule
            rules[name] = replace(rule, default=ABSENT) if differs else rule
    return rules


def score_names(card: ModelCard) -> list[str]:
    """The scores of a model: its own, and those that the engine computes from its likelihood and its map."""
    of_engine = scores_made(log_prob="log_prob" in card.can, names=card.scores, maps=bool(card.maps))
    return list(dict.fromkeys((*card.scores, *of_engine)))


def defaults(rules: Rules) -> dict[str, Any]:
    """The tree of all default values, without required keys and without sections under the name of a
    phase."""
    tree = {}
    for key, rule in rules.items():
        if key == ANY:
            continue
        if not isinstance(rule, Rule):
            if not rule or (part := defaults(rule)) or ANY in rule:
                tree[key] = part if rule else {}
        elif rule.default is not ABSENT:
            tree[key] = convert(parse(rule.annotation), rule.default)[1]
    return tree


def check(
    fragment: Mapping[str, Any], rules: Rules, where: Callable[[Key, bool], str]
) -> tuple[dict[str, Any], list[Problem]]:
    """A part of a recipe with converted values, such as floats from ints, and all its errors. `where` returns
    the position of a key or, if its second argument is true, that of its value."""
    problems: list[Problem] = []

    def wrong(here: Key, message: str, hint: str | None, *, value: bool = True) -> None:
        problems.append(Problem(where(here, value), message, hint))

    def checked(part: Mapping[str, Any], rules_here: Rules, path: Key) -> dict[str, Any]:
        clean: dict[str, Any] = {}
        for key, value in without_gone(path[-1] if path else "", part).items():
            key = renamed(key, rules_here, *path[-1:])
            here, rule = (*path, key), rules_here.get(key, rules_here.get(ANY))
            name = ".".join(here)
            if value is WRONG or (isinstance(value, list) and WRONG in value):
                continue
            if isinstance(rule, Rule):
                ok, converted = convert(parse(rule.annotation), value)
                if key in rules_here and not (ok and in_range(converted, rule.range)):
                    node = parse(rule.annotation)
                    must, hint = (rule.range, None) if ok else (words(node), advice(node, value))
                    wrong(here, f"`{name}` must be {must}, not {shown(value)}", hint)
                else:
                    clean[key] = converted
            elif rule is not None and (value is None or isinstance(value, Mapping)):
                clean[key] = checked(value or {}, rule, here)
            elif key in rules_here:
                keys = below(rules_here, key)
                named = "name" in keys and len(here) == 1
                hint = f"did you mean `{key}.name`?" if named else f"its keys: {_list(keys)}"
                wrong(here, f"`{name}` must contain keys, not {shown(value)}", hint)
            elif path[-1:] != ("model",) or all(value != of.get(key, WRONG) for of in FIXED_KEYS.values()):
                inside = f" in `{'.'.join(path)}`" if path else ""
                hint = _suggest(here, rules_here, rules, value)
                wrong(here, f"unknown key `{key}`{inside}", hint, value=False)
        return clean

    return checked(fragment, rules, ()), problems


def check_value(value: Any, param: Param | Rule, name: str) -> Any:
    """A command-line value converted for a parameter; `1,2` may be a list. Raises UsageError."""
    node = parse(param.annotation)
    ok, converted = convert(node, value)
    if not ok and isinstance(value, str):
        ok, converted = convert(node, [scalar(item.strip()) for item in value.strip("[]").split(",")])
    if not ok:
        raise UsageError(f"`{name}` must be {words(node)}, not {shown(value)}", hint=advice(node, value))
    if not in_range(converted, param.range):
        raise UsageError(f"`{name}` must be {param.range}, not {shown(value)}")
    return converted


def check_scores(names: Iterable[str], card: ModelCard) -> list[str]:
    """The scores by their exact names; `-` and `_` are equivalent. Raises UsageError with the closest
    name."""
    scores = {canonical(score): score for score in score_names(card)}
    for name in names:
        if canonical(name) not in scores:
            able = ", ".join(scores.values())
            ways = f"its scores: {able}" if able else "`gz list models --can ood` shows models with scores"
            hint = did_you_mean(name, scores.values()) or ways
            raise UsageError(f"`{card.name}` has no score `{name}`", hint=hint)
    return [scores[canonical(name)] for name in names]


def takes_integers(rules: Rules, key: str) -> bool:
    """Whether a dotted key accepts only integers as numbers."""
    rule: Rule | Rules | None = rules
    for name in key.split("."):
        rule = None if rule is None or isinstance(rule, Rule) else rule.get(name, rule.get(ANY))
    node = parse(rule.annotation) if isinstance(rule, Rule) else parse("")
    return convert(node, 32)[0] and not convert(node, 32.5)[0]


def missing(tree: Mapping[str, Any], rules: Rules) -> list[str]:
    """The models' hyperparameters that have no default and are missing in the recipe."""
    if "stages" in rules:
        parts = {name: part for name, part in tree["stages"].items() if isinstance(part, Mapping)}
        of_stage = below(rules, "stages")
        return [f"stages.{n}.{key}" for n, part in parts.items() for key in missing(part, below(of_stage, n))]
    return [f"model.{key}" for key in below(rules, "model") if key != ANY and key not in tree["model"]]


def _suggest(path: Key, rules: Rules, root: Rules, value: Any) -> str:
    """A suggestion for an unknown key. It is the same key in another section, preferably one that has the
    keys of its value too. Otherwise it is the closest key of this section, otherwise all keys of this
    section."""
    key = canonical(path[-1])
    if key in FOREIGN_KEYS:
        return FOREIGN_KEYS[key]
    stages = below(root, "stages") if "stages" in root else {}
    sections = {name: below(root, name) for name in root}
    sections |= {f"stages.{name}": below(stages, name) for name in stages}
    elsewhere = [f"{name}.{k}" for name, part in sections.items() for k in part if k == key]
    words = ((name, SYNONYMS.get(name, {}).get(key)) for name in sections)
    elsewhere += [f"{name}.{word}" for name, word in words if word in sections[name]]
    for inner in value if isinstance(value, Mapping) else ():
        holding = [name for name, part in sections.items() if key in part and inner in below(part, key)]
        elsewhere = [f"{name}.{key}.{inner}" for name in holding] or elsewhere
    here = [k for k in rules if k != ANY]
    if elsewhere and key not in map(canonical, here):
        return f"did you mean `{elsewhere[0]}`?"
    return did_you_mean(path[-1], here) or (f"its keys: {_list(rules)}" if here else "it has no keys")


def _list(rules: Rules) -> str:
    return ", ".join(key for key in rules if key != ANY)


# ---------------------------------------------------------------------------- types and ranges


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Scalar(NamedTuple):
    """A type without brackets.

    accepts: whether a value is of the type.
    words: description of the type.
    many: description of a list of the type.
    json: its name in a JSON schema.
    """

    accepts: Callable[[Any], bool]
    words: str
    many: str = ""
    json: str | None = None


SCALARS = {
    "Any": Scalar(lambda value: True, "Any"),
    "None": Scalar(lambda value: value is None, "null", json="null"),
    "bool": Scalar(lambda value: isinstance(value, bool), "true or false", "true or false", "boolean"),
    "str": Scalar(lambda value: isinstance(value, str), "a string", "strings", "string"),
    "int": Scalar(lambda value: type(value) is int, "an integer", "integers", "integer"),
    "float": Scalar(
        lambda value: _number(value) and abs(value) <= LARGEST_FLOAT, "a number", "numbers", "number"
    ),
    "Size": Scalar(lambda value: isinstance(value, int | str) and not isinstance(value, bool), SIZE_FORMS),
}
_TRUE_1_1, _FALSE_1_1 = {"yes", "on", "y"}, {"no", "off", "n"}  # in YAML 1.1; texts in YAML 1.2


@cache
def parse(annotation: str) -> ast.expr:
    """The syntax tree of a type; Any for an empty text."""
    return ast.parse(annotation or "Any", mode="eval").body


# trees from `parse` do not change, so results from their nodes can be cached


@cache
def _alternatives(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return [*_alternatives(node.left), *_alternatives(node.right)]
    return [node]


def _arguments(node: ast.AST) -> list[ast.expr]:
    """The types or values in the brackets of a type."""
    if not isinstance(node, ast.Subscript):
        return []
    return node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]


@cache
def _head(node: ast.expr) -> str:
    """The name of a type without its brackets: int, None, Literal, tuple, …"""
    if isinstance(node, ast.Subscript):
        return _head(node.value)
    if isinstance(node, ast.Name):
        return node.id
    return str(node.value) if isinstance(node, ast.Constant) else ast.unparse(node)


def _item_kinds(node: ast.expr, n: int) -> list[ast.expr]:
    """The types of n items: X for each item of list[X] and tuple[X, ...]; X and Y for tuple[X, Y]."""
    kinds = _arguments(node) or [parse(""), ast.Constant(...)]
    if _head(node) == "list" or (isinstance(kinds[-1], ast.Constant) and kinds[-1].value is ...):
        return kinds[:1] * n
    return kinds


@cache
def _choices(node: ast.expr) -> list[Any]:
    """The values of every Literal in a type."""
    literals = (n for n in ast.walk(node) if isinstance(n, ast.Subscript) and _head(n) == "Literal")
    return [ast.literal_eval(choice) for literal in literals for choice in _arguments(literal)]


def literal_values(annotation: str) -> list[Any]:
    """The values that a type lists: those of each Literal, and true and false for bool; [] if it lists
    none."""
    node = parse(annotation)
    is_bool = any(isinstance(part, ast.Name) and part.id == "bool" for part in ast.walk(node))
    return [*_choices(node), *((True, False) if is_bool else ())]


def is_storable(node: ast.expr) -> bool:
    """Whether a recipe can contain values of the type."""
    if len(options := _alternatives(node)) > 1:
        return all(map(is_storable, options))
    if _head(node) in ("tuple", "list"):
        return all(map(is_storable, _item_kinds(node, 1)))
    return _head(node) in (*SCALARS, "Literal")


def convert(node: ast.expr, value: Any) -> tuple[bool, Any]:
    """Whether the value is of the type, and the converted value: a list becomes a tuple, an integer becomes a
    float."""
    for option in _alternatives(node):
        ok, converted = _convert_one(option, value)
        if ok:
            return True, converted
    return False, value


def _convert_one(node: ast.expr, value: Any) -> tuple[bool, Any]:
    kind = _head(node)
    if kind == "Literal":
        return any(value == choice and type(value) is type(choice) for choice in _choices(node)), value
    if kind in ("tuple", "list"):
        if not isinstance(value, list | tuple) or len(kinds := _item_kinds(node, len(value))) != len(value):
            return False, value
        items = [convert(kind, item) for kind, item in zip(kinds, value, strict=True)]
        return all(ok for ok, _ in items), [item for _, item in items]
    if kind not in SCALARS or not SCALARS[kind].accepts(value):
        return False, value
    try:  # a size may have any value within a range
        return True, float(value) if kind == "float" else canonical_size(value) if kind == "Size" else value
    except UsageError:
        return False, value


def words(node: ast.expr) -> str:
    """A description of the type for messages."""
    options: list[str] = []
    for option in _alternatives(node):
        kind = _head(option)
        if kind == "Literal":
            options += [f"`{choice}`" for choice in _choices(option)]
        elif kind in ("tuple", "list") and isinstance(option, ast.Subscript):
            items = _item_kinds(option, 1)
            count = f"{len(items)} " if kind == "tuple" and len(items) > 1 else ""
            choices, of = ", ".join(f"`{choice}`" for choice in _choices(items[0])), _head(items[0])
            many = SCALARS[of].many if of in SCALARS else "lists"
            options.append(f"a list from {choices}" if choices else f"a list of {count}{many}")
        else:
            options.append(SCALARS[kind].words if kind in SCALARS else kind)
    return " or ".join([", ".join(options[:-1]), options[-1]] if options[:-1] else options)


def shown(value: Any) -> str:
    """A value as messages show it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the string `{value}`"
    return "a map" if isinstance(value, Mapping) else f"`{value}`"


def advice(node: ast.expr, value: Any) -> str | None:
    """A hint on what to write instead; None if that cannot be guessed."""

    def suits(option: Any) -> bool:
        return convert(node, option)[0]

    if _number(value) and abs(value) > LARGEST_FLOAT:
        return f"use a number between -{LARGEST_FLOAT:.1e} and {LARGEST_FLOAT:.1e}"
    if isinstance(value, float) and value.is_integer() and suits(int(value)):
        return f"write {int(value)}"
    if isinstance(value, str):
        if any(_head(option) == "Size" for option in _alternatives(node)):
            return f"write {nearest(value)}"
        if value.lower() in _TRUE_1_1 | _FALSE_1_1 and suits(True):
            return f"write {'true' if value.lower() in _TRUE_1_1 else 'false'}"
        if not isinstance(scalar(value), str) and suits(scalar(value)):
            return "remove the quotes"
        items = [item.strip() for item in value.split(",")]
        if suits([*map(scalar, items)]):
            return f"write [{', '.join(items)}]"
    if suits([value]):
        return f"write [{value}]"
    choices = [choice for choice in _choices(node) if isinstance(choice, str)]
    values = value if isinstance(value, list) else [value]
    odd = next((item for item in values if item not in choices), None)
    return did_you_mean(odd, choices) if isinstance(odd, str) else None


def as_json_schema(node: ast.expr, limits: Mapping[str, float]) -> dict[str, Any]:
    """The type as a JSON schema, with `limits` for its numbers, including those in lists."""
    if len(options := _alternatives(node)) > 1:
        return {"anyOf": [as_json_schema(option, limits) for option in options]}
    kind = _head(node)
    if kind == "Size":
        return {"type": ["integer", "string"], "pattern": r"^\d+(x\d+)?$", **limits}
    if kind == "Literal":
        return {"enum": _choices(node)}
    if kind in ("tuple", "list"):
        items = [as_json_schema(item, limits) for item in _item_kinds(node, 1)]
        if len(items) > 1:
            return {"type": "array", "items": items, "minItems": len(items), "maxItems": len(items)}
        return {"type": "array", "items": items[0]}
    if kind not in SCALARS or SCALARS[kind].json is None:
        return {}
    return {"type": SCALARS[kind].json, **(limits if kind in ("int", "float") else {})}


# The ranges in words, and what a JSON schema calls their limits.
LIMITS: Mapping[str | None, Mapping[str, float]] = {
    None: {},
    "greater than 0": {"exclusiveMinimum": 0},
    "0 or more": {"minimum": 0},
    "1 or more": {"minimum": 1},
    "in [0, 1]": {"minimum": 0, "maximum": 1},
    "in [0, 1)": {"minimum": 0, "exclusiveMaximum": 1},
}
_KEEPS = {"minimum": ge, "maximum": le, "exclusiveMinimum": gt, "exclusiveMaximum": lt}


def limits(range: str | None) -> Mapping[str, float]:
    """The limits of a range, which is one of LIMITS or a text such as `2 … 256`."""
    if range in LIMITS:
        return LIMITS[range]
    low, high = (int(text.replace(",", "")) for text in str(range).split(" … "))
    return {"minimum": low, "maximum": high}


def in_range(value: Any, range: str | None) -> bool:
    """Whether all numbers of a value are in a range; None allows any."""
    numbers = [*filter(_number, value if isinstance(value, list) else [value])]
    return all(_KEEPS[name](number, limit) for name, limit in limits(range).items() for number in numbers)
