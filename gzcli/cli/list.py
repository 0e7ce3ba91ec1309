"""`gz list`: models, data sets, recipes and runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gzcli.cli import out
from gzcli.cli.options import Json, Quiet, Wide, choose, names
from gzcli.cli.tables import wrapped
from gzcli.core.errors import UsageError, canonical

if TYPE_CHECKING:
    from gzcli.models.catalog import ModelCard

LABELLED = "°"  # marks what needs a run that was trained with labels
_WHAT = ("models", "data", "recipes", "runs", "pretrained")


def _complete_what(incomplete: str) -> list[str]:
    return names(incomplete, _WHAT)


def _complete_family(incomplete: str) -> list[str]:
    from gzcli.models.catalog import cards

    return names(incomplete, dict.fromkeys(card.family for card in cards().values()))


def _complete_can(incomplete: str) -> list[str]:
    from gzcli.models.catalog import cards

    return names(incomplete, dict.fromkeys(can for card in cards().values() for can in card.can))


def list_(
    what: Annotated[
        str, typer.Argument(metavar="[models|data|recipes|runs|pretrained]", autocompletion=_complete_what)
    ] = "",
    family: Annotated[
        str,
        typer.Option(
            "--family", metavar="F", help="Models of one family only.", autocompletion=_complete_family
        ),
    ] = "",
    can: Annotated[
        str,
        typer.Option(
            "--can", metavar="CAP", help="Models with a capability only.", autocompletion=_complete_can
        ),
    ] = "",
    wide: Wide = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List models, data sets, recipes or runs."""
    kind = choose("list", what, _WHAT) if what else "models"
    if kind != "models" and (family or can):
        raise UsageError("`--family` and `--can` choose among models", hint="gz list models")
    if kind == "models":
        list_models(family, can, short=not what, wide=wide)
    else:
        _LISTS[kind](wide=wide)


def alone(verb: str, show: Callable[[], None]) -> Callable[..., None]:
    """What `gz VERB` does without a word more: it lists what there is."""

    def callback(ctx: typer.Context, json: Json = False, quiet: Quiet = False) -> None:
        if ctx.invoked_subcommand is None:
            show()
            out.hint(f"`gz {verb} --help` shows its commands")

    return callback


def list_models(family: str = "", can: str = "", *, short: bool = False, wide: bool = False) -> None:
    """Prints the models of a family that have a capability; `short`: their names by family alone; `wide`: in
    full, as in the other lists."""
    from gzcli.models.catalog import OUTSIDE, cards, counted
    from gzcli.store.paths import recipe_names

    known = cards().values()
    if family:
        family = choose("family", family, sorted({card.family for card in known}))
    if can:
        can = choose("capability", can, sorted({able for card in known for able in card.can}))
    shown = [card for card in known if family in ("", card.family) and (not can or can in card.can)]
    shown.sort(key=lambda card: (card.family, card.name))
    recipes = {canonical(name): name for name in recipe_names()}
    rows = [(recipes.get(canonical(card.name)) or card.name, card) for card in shown]
    staged = {name for name, card in rows if name not in recipes.values() and card.family != OUTSIDE}
    abouts = {name: _about(name, card, staged) for name, card in rows} if out.is_json() or not short else {}
    if short:
        families: dict[str, list[str]] = {}
        for name, card in rows:
            if name not in staged:
                families.setdefault(card.family, []).append(name)
        lines = [(name, " ".join(models)) for name, models in families.items()]
        out.table(("family", "models"), lines, wrap=("models",), wide=wide)
        out.info("")
    else:
        out.table(
            ("model", "what it is", "can", "family", "paper"),
            [(name, abouts[name], " ".join(_marked(card)), card.family, card.paper) for name, card in rows],
            spare=("paper", "family"),
            wrap=("what it is", "can", "paper"),
            wide=wide,
        )
        if any(card.unlabelled_lack for _, card in rows):
            out.hint(f"what is marked {LABELLED} is for runs trained with `--set model.conditional=true`")
    out.info(counted(len(rows) - len(staged), len(staged)))
    if short:
        out.hint("`gz list models` says what they do; also data, recipes, runs, pretrained")
    models = [
        {
            "name": name,
            "family": card.family,
            "about": abouts.get(name),
            "can": list(card.can),
            "paper": card.paper,
            "recipe": recipes.get(canonical(card.name)),
        }
        for name, card in rows
    ]
    out.data({"models": models})


def _about(name: str, card: ModelCard, staged: Container[str]) -> str:
    """What a model is, in a line: as its recipe says it, else its class."""
    from gzcli.docs.page import written
    from gzcli.models.docs import first_words
    from gzcli.recipe.files import recipes
    from gzcli.recipe.yaml import load
    from gzcli.store.paths import trained_in

    if name in staged:
        words, (recipe, _) = written(name), trained_in(name) or ("another", "")
        return f"A stage of {recipe}: {words.title if words else first_words(card)}"
    shipped = recipes().get(name)
    return str(load(shipped).get("about", "")) if shipped else first_words(card)


def _marked(card: ModelCard) -> Iterator[str]:
    """What a model can, with a mark where that takes a run that was trained with labels."""
    return (f"{name}{LABELLED}" if name in card.unlabelled_lack else name for name in card.can)


def list_data(*, long: bool = False, wide: bool = False) -> None:
    """Prints every data set, a line each or, if `long`, all that is known of it."""
    from gzcli.data.sets.library import listing

    rows = listing()
    if long:
        for row in rows:
            out.text("\n".join(_data_block(row, out.room(sys.stdout))) + "\n")
    else:
        lines = [(r["name"], _images(r), r["classes"] or None, _state(r), r["title"]) for r in rows]
        out.table(
            ("data", "images", "classes", "cached", "title"),
            lines,
            spare=("classes", "images"),
            wrap=("title",),
            wide=wide,
        )
    out.data({"data": rows})


def _state(row: dict[str, Any]) -> str:
    return "yes" if row["cached"] else "gone" if row["lost"] else "no"


def _images(row: dict[str, Any]) -> str | None:
    from gzcli.core.units import sides

    if not (row["size"] and row["channels"]):
        return None
    height, width = sides(row["size"])
    return f"{width}×{height}×{row['channels']}"


def _data_block(row: dict[str, Any], room: int | None) -> list[str]:
    """A data set's row as text: a heading and each fact, in lines of `room` columns."""
    from gzcli.data.sets.registry import extras_in_words

    splits = [(row["n_train"], "train"), (row["n_val"], "val"), (row["n_test"], "test")]
    images = ", ".join(f"{n:,} {split}" for n, split in splits if n)
    sizes = f"also {', '.join(map(str, row['larger']))} pixels a side" if row["larger"] else None
    fetched = f"{row['download'] / 1e6:,.0f} MB to download" if row["download"] else None
    lost = "nothing is at its path any more" if row["lost"] else None
    state = ", ".join(filter(None, ("cached" if row["cached"] else "not cached", lost, fetched)))
    kind = "findings or attributes, any number at once" if row["multilabel"] else "classes"
    facts = {
        "images": ", ".join(filter(None, (_images(row), images, sizes))),
        "labels": f"{row['classes'] or 'no'} {kind}",
        "with each": extras_in_words(row["extras"]),
        "state": state,
        "licence": row["licence"],
        "cite": row["citation"],
        "get it at": row["page"],
        "path": row["path"],
    }
    texts = {f"{row['name']}: ": row["title"], **{f"  {key:<10} ": value for key, value in facts.items()}}
    return [
        line
        for head, text in texts.items()
        if text
        for line in (wrapped(str(text), head, room) if room else [f"{head}{text}"])
    ]


def list_recipes(*, wide: bool = False) -> None:
    """Prints the shipped recipes."""
    from gzcli.recipe.files import read_chain, recipes

    rows = []
    for name, path in recipes().items():
        chain, _ = read_chain(name)
        about, sets = chain[-1].own.get("about", ""), list({at[0]: None for f in chain for at in f.sections})
        rows.append({"name": name, "path": path, "about": about, "for": sets})
    out.table(
        ("recipe", "about", "for"),
        [(row["name"], row["about"], " ".join(row["for"])) for row in rows],
        spare=("for",),
        wrap=("about", "for"),
        wide=wide,
    )
    out.data({"recipes": rows})


def list_runs(model: str | None = None, data: str | None = None, *, wide: bool = False) -> None:
    """Prints the runs of a model on a data set, newest first. Raises UsageError for unknown names."""
    from gzcli.cli.summary import summaries, table
    from gzcli.data.sets.names import data_key
    from gzcli.recipe.files import find
    from gzcli.store.paths import spelling
    from gzcli.store.runs import all_runs

    runs = all_runs(model=model, data=data)
    if not runs and data:  # runs name a folder by its key; an unknown name is refused here
        runs = all_runs(model=model, data=data_key(data))
    if not runs and model:
        find(spelling(model))  # raises UsageError for an unknown model
    rows = summaries(runs)
    if rows or out.is_json():
        table(runs, rows, wide=wide)
    else:
        out.info("no runs yet")
        on = f" --data {data}" if data else ""
        out.hint(f"`gz train {spelling(model) if model else 'vae'}{on}` makes one")
    out.data({"runs": rows})


def list_pretrained(*, wide: bool = False) -> None:
    """Prints the trained models that come with gz."""
    from gzcli.store.pretrained import PREFIX, every

    known = every()
    columns = ("pretrained", "data", "figure", "params", "CPU time", "size")
    out.table(columns, [(PREFIX + one.name, one.data, *one.cells) for one in known], wide=wide)
    if known:
        out.hint(f"gz sample {PREFIX}{known[0].name}")
    facts = ("about", "params", "seconds", "work", "command")
    rows = [
        {"name": PREFIX + one.name, "model": one.model, "data": one.data, "figures": one.figures}
        | {key: one.card[key] for key in facts}
        | {"bytes": one.file.stat().st_size, "path": one.file}
        for one in known
    ]
    out.data({"pretrained": rows})


_LISTS: dict[str, Callable[..., None]] = {
    "data": list_data,
    "recipes": list_recipes,
    "runs": list_runs,
    "pretrained": list_pretrained,
}
