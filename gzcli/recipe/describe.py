"""Descriptions of recipes: for people, YAML with the text of each key; for editors, a JSON schema.

The schema is derived from gz's rules. The keys of a model are known if the recipe names it, by `model.name`
or `extends`. Elsewhere, as in the sections of `for` in a recipe with stages, a key is allowed if any model
has it. `gz recipe check` finds the remaining mistakes.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from gzcli.core.sections import SCALES, SECTIONS, OptimSection, Part, keys_of
from gzcli.models import catalog
from gzcli.models.catalog import OUTSIDE, ModelCard, cards, families, parameter_texts
from gzcli.recipe.files import SCALE_KEYS, presets
from gzcli.recipe.recipe import Recipe
from gzcli.recipe.schema import ABSENT, ANY, Rule, Rules, as_json_schema, below, limits, parse, schema
from gzcli.recipe.yaml import Key, lines
from gzcli.store.paths import recipe_names, spelling

PAGE_COLUMNS = 80  # columns of a terminal
COLUMN = 31  # where texts begin, unless all values of a section are shorter
MIN_TEXT_COLUMNS = 24  # least columns of a text, however far its section is indented

Tree = dict[str, Any]

DIALECT = "http://json-schema.org/draft-07/schema#"  # the newest draft that editors support
OPEN = ("model", "optim", "sample", "ood")  # sections whose keys depend on the model


# --- for the user ---


def section_texts(section: type) -> dict[str, str]:
    """The text of each key that a section declares, from its docstring."""
    texts = parameter_texts(inspect.getdoc(section) or "")
    return {f.name: texts[f.name] for f in keys_of(section) if f.name in texts}


def key_texts(recipe: Recipe) -> dict[str, str]:
    """The texts of a recipe's keys, by dotted key. Keys without a text are omitted."""
    of_part, optim = section_texts(Part), section_texts(OptimSection)
    shared = {key: of_part[key] for key in ("about", "scale", "seed", "format", "params")}
    for name, section in SECTIONS.items():
        shared |= {f"{name}.{key}": text for key, text in section_texts(section).items()}
    every = dict(shared)
    for part in recipe.parts:
        texts, options = {**shared}, catalog.option_texts(catalog.card(part.model))
        for verb in ("model", "sample", "ood"):
            texts |= {f"{verb}.{key}": text for key, text in options[verb].items()}
        for phase, keys in part.optim.phases.items():
            texts |= {f"optim.{phase}.{key}": optim[key] for key in keys}
        texts["model.name"] = of_part["model"]
        every |= {f"{part.in_recipe}{key}": text for key, text in texts.items()}
    return every


def annotated(tree: Mapping[str, Any], texts: Mapping[str, str], width: int = PAGE_COLUMNS) -> str:
    """The tree as YAML with the text of each key as a comment, wrapped at `width` columns if values allow."""
    written = [(at[:-1], texts.get(".".join(map(str, at)), ""), line) for at, line in lines(tree)]
    columns: dict[Key, int] = {}  # column in which the texts of a section begin
    for section, _, line in written:
        if not line.endswith(":"):
            columns[section] = max(columns.get(section, 0), min(COLUMN, len(line) + 2))
    out = []
    for section, text, line in written:
        if not text or line.endswith(":"):
            out.append(line)
            continue
        column = columns[section]
        first, *more = textwrap.wrap(text, max(MIN_TEXT_COLUMNS, width - column - 2), break_on_hyphens=False)
        if len(line) + 2 > column:
            out.append(line)
            line = ""
        out += [f"{line:<{column}}# {first}", *(f"{'':<{column}}# {words}" for words in more)]
    return "\n".join(out)


# --- for editors ---


def recipe_schema() -> Tree:
    """The schema of every recipe."""
    zoo = {card.name: card for card in cards().values() if card.family != OUTSIDE}
    sections = {name: sections_of(card) for name, card in zoo.items()}
    union = {section: _united([tree[section] for tree in sections.values()]) for section in OPEN}
    return {
        "$schema": DIALECT,
        "title": "gz recipe",
        "allOf": [{"$ref": "#/definitions/recipe"}],
        "definitions": {
            "recipe": _fragment(union, sections, top=True),
            "stage": _fragment(union, sections, top=False),
            **{f"model {name}": _closed(tree, f"model {name}") for name, tree in sections.items()},
            "any model": _closed(union, "any model"),
        },
    }


def sections_of(card: ModelCard) -> Tree:
    """The sections of a recipe whose keys depend on the model."""
    rules, texts = schema(card), catalog.option_texts(card)
    texts["optim"] = section_texts(SECTIONS["optim"])
    texts["ood"] = {**section_texts(SECTIONS["ood"]), **texts["ood"]}
    sections = {section: _section(below(rules, section), texts[section]) for section in OPEN}
    names = [spelling(name) for name, family in families().items() if family != OUTSIDE]
    either = [{"enum": names}, {"type": "string"}]
    sections["model"]["properties"]["name"] = {"description": "name of the model.", "anyOf": either}
    return sections


def _fragment(union: Tree, sections: Mapping[str, Tree], *, top: bool) -> Tree:
    """The schema of a recipe, or of a stage, with the rules of the model that it names. `sections` are the
    rules of each model, `union` those of all models together."""
    rules = schema(None)
    texts = section_texts(Part)
    shared = {
        key: _section(below(rules, key), section_texts(SECTIONS[key]))
        if key in SECTIONS
        else _rule(rule, texts[key])
        for key, rule in rules.items()
        if key not in OPEN
    }
    properties: Tree = {**shared, **{key: {"type": ["object", "null"]} for key in OPEN}}
    for section in OPEN:  # editors complete these; the rule below forbids the rest
        properties[section]["properties"] = union[section]["properties"]
    properties["stages"] = {
        "type": "object",
        "description": "stages in order: each trains a model that can use the earlier ones.",
        "additionalProperties": {"$ref": "#/definitions/stage"},
    }
    if top:
        properties["extends"] = {
            "description": "recipe to extend: the name of a shipped recipe, or a path.",
            "anyOf": [{"enum": [*recipe_names(), *presets()]}, {"type": "string"}],
        }
        cases = {"type": "object", "description": "settings for some data sets or scales."}
        properties["for"] = _cases(cases, "stage")
    strangers = _named({"not": {"enum": list(dict.fromkeys([*sections, *map(spelling, sections)]))}})
    choices: list[Tree] = [{"if": strangers, "else": {"$ref": "#/definitions/any model"}}]
    for name in sections:
        named = _named({"enum": list(dict.fromkeys([name, spelling(name)]))})
        choices.append({"if": named, "then": {"$ref": f"#/definitions/model {name}"}})
    closed = {"properties": properties, "additionalProperties": False}
    return {"type": "object", **closed, "allOf": choices}


def _named(one: Tree) -> Tree:
    """A condition that is true if a recipe names one of these models, or extends the recipe of one."""
    model = {"type": "object", "required": ["name"], "properties": {"name": one}}
    by_name = {"required": ["model"], "properties": {"model": model}}
    return {"anyOf": [by_name, {"required": ["extends"], "properties": {"extends": one}}]}


def _closed(sections: Tree, name: str) -> Tree:
    """A condition that these sections, including those of `for`, have no other keys."""
    return {"properties": {**sections, "for": _cases({}, name)}}


def _cases(tree: Tree, name: str) -> Tree:
    """The schema of `for`: a fragment for each set or shape class. A scale has its own sections, and a map of
    such fragments."""
    one = {"$ref": f"#/definitions/{name}"}
    there = SCALE_KEYS if name == "stage" else OPEN
    scales = {
        part: {"$ref": f"{one['$ref']}/properties/{part}"} if part in there else {} for part in SCALE_KEYS
    }
    scale = {"type": "object", "properties": scales, "additionalProperties": one}
    return {**tree, "properties": dict.fromkeys(SCALES, scale), "additionalProperties": one}


def _section(rules: Rules, texts: Mapping[str, str]) -> Tree:
    """The schema of a section with these keys only; null means an empty section."""
    properties = {
        key: _rule(rule, texts.get(key, "")) if isinstance(rule, Rule) else _section(rule, texts)
        for key, rule in rules.items()
        if key != ANY
    }
    further: Any = False
    if ANY in rules:
        any_rule = rules[ANY]
        further = True if isinstance(any_rule, Rule) else _section(any_rule, texts)
    return {"type": ["object", "null"], "properties": properties, "additionalProperties": further}


def _rule(rule: Any, text: str) -> Tree:
    tree = as_json_schema(parse(rule.annotation), limits(rule.range))
    if text:
        tree["description"] = text
    if rule.default is not ABSENT and rule.default is not None:
        tree["default"] = list(rule.default) if isinstance(rule.default, tuple) else rule.default
    return tree


def _united(sections: Iterable[Tree]) -> Tree:
    """The schema of a section with the keys of any of these. A value must be valid in at least one that has
    the key."""
    values: dict[str, list[Tree]] = {}
    for section in sections:
        for key, value in section["properties"].items():
            bare = {k: v for k, v in value.items() if k not in ("description", "default")}
            if bare not in values.setdefault(key, []):
                values[key].append(bare)
    properties = {key: some[0] if len(some) == 1 else {"anyOf": some} for key, some in values.items()}
    return {"type": ["object", "null"], "properties": properties, "additionalProperties": False}
