"""What a model adds to a verb, for completion and `--help`: options of its methods, keys, scores and labels.
Models are read from their files and recipes, without slow imports.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from gzcli.core.errors import canonical
from gzcli.core.streams import printable

if TYPE_CHECKING:
    from gzcli.core.sections import Part
    from gzcli.models.catalog import ModelCard, Param
    from gzcli.recipe.recipe import Recipe
    from gzcli.recipe.schema import Rule

    Options = Mapping[str, Param | Rule]

OptionRow = Sequence[str]
EXTENDED_VERBS = ("sample", "ood")  # verbs to whose options a model adds
MAX_LABELS_NAMED = 6  # up to so many labels are all named
SHOWN_TYPES = (bool, int, float, str, list, tuple, type(None))  # types of values that a help shows
STYLES = ("cyan", "yellow", "")  # of the columns, as Typer's own


def options_of(verb: str, card: ModelCard, do: str | None = None) -> Options:
    """The options that a model adds to a verb; `do` is the application of `--do`."""
    from gzcli.recipe.schema import score_options

    if verb == "ood":
        return score_options(card)
    return card.do.get(canonical(do), {}) if do else card.sample


def values_of(annotation: str) -> list[str]:
    """The values of a Literal type, as written on the command line; [] for any other type."""
    from gzcli.recipe.schema import literal_values

    return [written(value) for value in literal_values(annotation)]


def keys_of(recipe: Recipe) -> dict[str, tuple[Any, list[str]]]:
    """Every key of a recipe with its value, and with its allowed values if they are listed."""
    from gzcli.models.catalog import card
    from gzcli.recipe.schema import LAUNCH, Rule, schema, staged

    cards = {part.stage: card(part.model) for part in recipe.parts}
    rules = staged(cards) if recipe.stages else schema(card(recipe.parts[-1].model))
    keys: dict[str, tuple[Any, list[str]]] = {}

    def walk(rules: Mapping[str, Any], tree: Any, path: str) -> None:
        for key, rule in rules.items():
            value = tree.get(key) if isinstance(tree, Mapping) else None
            if not isinstance(rule, Rule):
                walk(rule, value, f"{path}{key}.")
            elif key != "*":
                keys[path + key] = (value, values_of(rule.annotation))

    walk({key: rule for key, rule in rules.items() if rule is not LAUNCH}, recipe.tree(), "")
    return keys


def written(value: Any) -> str:
    """A value for `--set`, quoted as one word of a shell."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    return f"[{','.join(map(written, value))}]" if isinstance(value, (list, tuple)) else str(value)


def flag(name: str) -> str:
    """The option for a keyword: `--top-p` for `top_p`."""
    return f"--{name.replace('_', '-')}"


def labels_of(word: str | None, data: str | None) -> list[str]:
    """The classes of `--data`, otherwise those of the run's set, otherwise those of the digits; [] if they
    are not packed yet."""
    from gzcli.data.sets.labels import class_names
    from gzcli.store.runs import all_runs, by_name

    if not data and word:
        run = by_name(word) or next(iter(all_runs(model=word)), None)
        data = run.serving.tree()["data"]["name"] if run else None
    return class_names(data or "digits")


# --- completion: what a model adds to a verb; `typed` has what precedes, by Typer's names ---


def complete_option(verb: str, typed: Mapping[str, Any]) -> dict[str, str]:
    """The options of the model, with the help of each."""
    from gzcli.models.catalog import option_texts
    from gzcli.recipe.resolve import card_for

    card = card_for(word_of(typed)) if verb in EXTENDED_VERBS else None
    if card is None:
        return {}
    do = typed.get("do")
    texts = option_texts(card).get(do or verb, {})
    return {flag(name): texts.get(name, "") for name in options_of(verb, card, do)}


def complete_value(verb: str, typed: Mapping[str, Any], option: str, incomplete: str) -> list[str]:
    """The values of one of the model's options, or of `--set`."""
    from gzcli.recipe.resolve import card_for

    if verb not in EXTENDED_VERBS:
        return []
    if option == "--set":
        return settings(word_of(typed), typed.get("data"), incomplete, section=verb)
    card = card_for(word_of(typed))
    options = options_of(verb, card, typed.get("do")) if card else {}
    param = options.get(option.lstrip("-").replace("-", "_"))
    return values_of(param.annotation) if param else []


def word_of(typed: Mapping[str, Any]) -> str:
    """The model or run that was typed."""
    return next((str(typed[key]) for key in ("model", "what", "recipe") if typed.get(key)), "")


def settings(word: str, data: str | None, incomplete: str, section: str = "") -> list[str]:
    """Completions of `--set a.b=v`: keys with their values, and after `=` the allowed values of the key."""
    from gzcli.recipe.resolve import recipe_for

    keys = keys_of(recipe) if (recipe := recipe_for(word, data)) else {}
    key, equals, _ = incomplete.partition("=")
    if equals:
        value, choices = keys.get(key, (None, []))
        return [f"{key}={choice}" for choice in choices or [written(value)]] if keys else []
    shown = {key: f"{key}={written(value)}" for key, (value, _) in keys.items()}
    return [text for key, text in shown.items() if section in ("", key.split(".")[0])]


def an_application(ctx: typer.Context, incomplete: str) -> list[str]:
    return sorted({do for card in _cards(ctx) for do in card.do})


def a_score(ctx: typer.Context, incomplete: str) -> list[str]:
    """The scores of the model, including those from its likelihood and from several runs."""
    from gzcli.recipe.schema import score_names

    scores = {score for card in _cards(ctx) for score in score_names(card)}
    more = ["all"] if "," not in incomplete else []
    return [*sorted(scores), *(["waic"] if "nll" in scores else []), *more]


def a_label(ctx: typer.Context, incomplete: str) -> list[str]:
    labels = labels_of(word_of(ctx.params), ctx.params.get("data"))
    return [label for label in labels if "," not in label]


def _cards(ctx: typer.Context) -> list[ModelCard]:
    """The card of the model on the command line; the cards of all models if none was typed."""
    from gzcli.models.catalog import cards
    from gzcli.recipe.resolve import card_for

    card = card_for(word_of(ctx.params))
    return [card] if card else list(cards().values())


# --- `gz VERB MODEL --help`: the model's part, below the help of the verb ---


def show_help(argv: Sequence[str]) -> None:
    """Prints panels on the model that a command line with `--help` names; nothing if it names none."""
    from gzcli.recipe.resolve import recipe_for

    verb, *words = [word for word in argv if not word.startswith("-")] or [""]
    recipe = recipe_for(words[0]) if words and verb in ("train", *EXTENDED_VERBS) else None
    if recipe is None:
        return
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    name = recipe.parts[-1].model if verb != "train" else words[0]
    for title, rows in panels(verb, words[0], recipe):
        grid = Table.grid(padding=(0, 2))
        for row in rows:
            cells = zip(row, STYLES, strict=False)
            grid.add_row(*(Text(printable(cell), style=style) for cell, style in cells))
        heading = Text(printable(title.format(name)))
        Console().print(Panel(grid, title=heading, title_align="left", border_style="dim"))


def panels(verb: str, word: str, recipe: Recipe) -> Iterator[tuple[str, Iterable[OptionRow]]]:
    """For each panel: a title with a placeholder for the model's name, and rows of name, value and text."""
    from gzcli.models.catalog import card

    part = recipe.parts[-1]
    model = card(part.model)
    rows = list(options(verb, model, part)) if verb in EXTENDED_VERBS else []
    if verb == "train":
        yield "Keys of {}: --set KEY=VALUE", keys(recipe)
        of_pictures = "--set data.size=32 --set 'data.augment=[hflip]'"
        lines = ["train {} --data mnist --minutes 20"]
        # after a few minutes on a CPU, a GAN's samples of photographs are all alike
        if model.family != "gan":
            lines.append(f"train {{}} --data ./pictures {of_pictures}")
    elif verb == "ood":
        yield "Scores of {}: --score", scores(model, part)
        lines = ["ood {} --out patches --score all", "ood {} --input ./pictures"]
    else:
        lines = ["sample {} -n 16 --seed 1"]
        if "sampler" in model.sample and (choices := values_of(model.sample["sampler"].annotation)):
            lines.append(f"sample {{}} --sampler {choices[0]} --steps 20")
        lines += [f"sample {{}} --do {name}" for name in list(model.do)[:2]]
    if rows:
        yield "Options of the scores of {}" if verb == "ood" else "Options of {}", rows
    if verb == "sample":
        yield "Labels of {}: --label", [labels(word, model, part)]
        if model.do:
            yield "Applications of {}: --do", [applied(model, name) for name in model.do]
    yield "Examples", [(f"gz {line}".replace("{}", word),) for line in lines]


def options(verb: str, model: ModelCard, part: Part) -> Iterator[OptionRow]:
    """A row for each option that the model adds to a verb."""
    from gzcli.models.catalog import option_texts
    from gzcli.recipe.schema import parse, words

    texts, values = option_texts(model)[verb], part.tree()[verb]
    for name, param in options_of(verb, model).items():
        choices = " ".join(values_of(param.annotation)) or words(parse(param.annotation))
        value = values.get(name, param.default)
        default = f" [default: {written(value)}]" if isinstance(value, SHOWN_TYPES) else ""
        yield flag(name), choices, texts.get(name, "") + default


def keys(recipe: Recipe) -> Iterator[OptionRow]:
    from gzcli.recipe.describe import key_texts

    docs = key_texts(recipe)
    for key, (value, choices) in keys_of(recipe).items():
        if "model" in key.split(".")[:-1] and not key.endswith(".name"):
            more = f" [{' '.join(choices)}]" if choices else ""
            yield key, written(value) if isinstance(value, SHOWN_TYPES) else "", docs.get(key, "") + more


def scores(model: ModelCard, part: Part) -> Iterator[OptionRow]:
    """A row for each score; the recipe's own are marked."""
    from gzcli.recipe.schema import score_names

    for name in score_names(model):
        kind = "specific to the model" if name in model.scores else "from its likelihood"
        mapped = ", with an anomaly map (--map)" if name in model.maps else ""
        yield name, "default" if name in (part.ood.scores or ()) else "", kind + mapped
    yield "all", "", "all scores above"


def labels(word: str, model: ModelCard, part: Part) -> OptionRow:
    """Rows that show whether the model takes labels, and which."""
    if not part.options.get("conditional"):
        advice = "to train with labels, use `--set model.conditional=true`"
        return "none", "", advice if "conditional" in model.can else "the model takes no labels"
    classes = labels_of(word, None)
    of_set = "of the training data; a list such as A,B assigns them in turn"
    if len(classes) > MAX_LABELS_NAMED:
        return f"{classes[0]} to {classes[-1]}", "", f"{len(classes):,} classes {of_set}"
    return " ".join(classes) or "a class", "", of_set


def applied(model: ModelCard, name: str) -> OptionRow:
    """Rows for an application and its options."""
    takes = [flag(option) for option in model.do[name]]
    takes += ["--mask"] if name in model.masked else []
    takes += ["--label"] if name in model.labelled else []
    takes += ["(if it was trained with labels)"] if name in model.unlabelled_lack else []
    return name, "", " ".join(takes)
