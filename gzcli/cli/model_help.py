"""What `gz VERB MODEL --help` says of the model, below what it says of the verb."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from gzcli.cli import own
from gzcli.core.streams import printable

if TYPE_CHECKING:
    from gzcli.core.parts import Part
    from gzcli.models.catalog import ModelCard
    from gzcli.recipe.recipe import Recipe

Row = Sequence[str]
VERBS = ("sample", "ood", "train")
DASH, MOST = "-", 6  # labels that are all named
STYLES = ("cyan", "yellow", "")  # of the columns, as Typer's own


def show(argv: Sequence[str]) -> None:
    """Prints panels on the model that a command line with `--help` names; nothing where it names none."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    verb, *words = [word for word in argv if not word.startswith(DASH)] or [""]
    found = own.recipe_for(words[0]) if words and verb in VERBS else None
    if found is None:
        return
    name = found.parts[-1].model if verb != "train" else words[0]
    for title, rows in panels(verb, words[0], found):
        grid = Table.grid(padding=(0, 2))
        for row in rows:
            grid.add_row(
                *(Text(printable(cell), style=style) for cell, style in zip(row, STYLES, strict=False))
            )
        heading = Text(printable(title.format(name)))
        Console().print(Panel(grid, title=heading, title_align="left", border_style="dim"))


def panels(verb: str, word: str, recipe: Recipe) -> Iterator[tuple[str, Iterable[Row]]]:
    """(title with a place for the model's name, rows of name, value and text) of each panel.

    word: what was typed for the model.
    """
    from gzcli.models.catalog import card

    part = own.serving(recipe)
    model = card(part.model)
    if verb == "train":
        yield "Keys of {}: --set KEY=VALUE", keys(recipe)
    elif verb == "ood":
        yield "Scores of {}: --score", scores(model, part)
        if options := list(rows_of("ood", model, part)):
            yield "Options of the scores of {}", options
    else:
        if options := list(rows_of("sample", model, part)):
            yield "Options of {}", options
        yield "Labels of {}: --label", [labels(word, model, part)]
        if model.do:
            yield "Applications of {}: --do", [applied(model, name) for name in model.do]
    yield "Examples", [(line,) for line in examples(verb, word, model)]


def rows_of(verb: str, model: ModelCard, part: Part) -> Iterator[Row]:
    """A row for each option that the model adds to a verb."""
    from gzcli.models.docs import options
    from gzcli.recipe.kinds import parse, words

    texts, values = options(model)[verb], part.tree()[verb]
    for name, param in own.options_of(verb, model).items():
        choices = " ".join(own.values_of(param.annotation)) or words(parse(param.annotation))
        value = values.get(name, param.default)
        default = f" [default: {own.written(value)}]" if _is_value(value) else ""
        yield f"--{name.replace('_', DASH)}", choices, texts.get(name, "") + default


def keys(recipe: Recipe) -> Iterator[Row]:
    """A row for each key of the model, with its value."""
    from gzcli.recipe.texts import texts

    docs = texts(recipe)
    for key, (value, choices) in own.keys_of(recipe).items():
        if "model" in key.split(".")[:-1] and not key.endswith(".name"):
            more = f" [{' '.join(choices)}]" if choices else ""
            yield key, own.written(value) if _is_value(value) else "", docs.get(key, "") + more


def scores(model: ModelCard, part: Part) -> Iterator[Row]:
    """A row for each score; those that the recipe asks for are marked."""
    from gzcli.recipe.schema import score_names

    chosen = part.ood.scores or ()
    for name in score_names(model):
        kind = "of its own" if name in model.scores else "of its likelihood"
        drawn = ", shows where (--map)" if name in model.maps else ""
        yield name, "default" if name in chosen else "", kind + drawn
    yield "all", "", "every one of these"


def labels(word: str, model: ModelCard, part: Part) -> Row:
    """Whether the model takes labels, and which."""
    if not part.options.get("conditional"):
        how = "with `--set model.conditional=true` it is trained with them"
        return "none", "", how if "conditional" in model.can else "it takes none"
    known = own.labels_of(word, None)
    of_set = "of the set that it was trained on; a list as A,B takes turns"
    if len(known) > MOST:
        return f"{known[0]} to {known[-1]}", "", f"{len(known):,} classes {of_set}"
    return " ".join(known) or "a class", "", of_set


def applied(model: ModelCard, name: str) -> Row:
    """An application, and the options that it takes."""
    takes = [f"--{option.replace('_', DASH)}" for option in model.do[name]]
    takes += ["--mask"] if name in model.masked else []
    takes += ["--label"] if name in model.labelled else []
    takes += ["(where it was trained with labels)"] if name in model.unlabelled_lack else []
    return name, "", " ".join(takes)


def examples(verb: str, word: str, model: ModelCard) -> Iterator[str]:
    """Commands that work as they are typed, in bash, zsh and fish."""
    if verb == "train":
        yield f"gz train {word} --data mnist --minutes 20"
        yield f"gz train {word} --data ./pictures --set data.size=32 --set 'data.augment=[hflip]'"
    elif verb == "ood":
        yield f"gz ood {word} --out patches --score all"
        yield f"gz ood {word} --input ./pictures"
    else:
        yield f"gz sample {word} -n 16 --seed 1"
        choices = own.values_of(model.sample["sampler"].annotation) if "sampler" in model.sample else []
        if choices:
            yield f"gz sample {word} --sampler {choices[0]} --steps 20"
        yield from (f"gz sample {word} --do {name}" for name in list(model.do)[:2])


def _is_value(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | list | tuple)
