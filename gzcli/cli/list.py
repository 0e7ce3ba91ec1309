"""`gz list`: models, data sets, recipes and runs; and `gz show`: a page on a model."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gzcli.cli import options as opt
from gzcli.cli import out
from gzcli.cli.options import a_model, argument, option
from gzcli.core.errors import UsageError, canonical, choose
from gzcli.core.hints import gz
from gzcli.core.units import sides, size
from gzcli.store.paths import about_of, recipe_names, spelling, trained_in

if TYPE_CHECKING:
    from gzcli.models.catalog import ModelCard
    from gzcli.store.run_folder import Run

NEEDS_LABELS = "°"  # marks what needs a run that was trained with labels
_WHAT = ("models", "data", "recipes", "runs", "pretrained")
RUN_COLUMNS = ("run", "name", "state", "step", "best", "curve", "time", "size", "params", "made")
DISPENSABLE_COLUMNS = (
    "params",
    "made",
    "size",
    "curve",
    "state",
    "name",
)  # omitted first if a table is too wide
MIN_PAGE_COLUMNS, MAX_PAGE_COLUMNS = 40, 100  # columns of a page


def _a_family(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    from gzcli.models.catalog import families

    return dict.fromkeys(families().values())


def _a_capability(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    from gzcli.models.catalog import cards

    return dict.fromkeys(can for card in cards().values() for can in card.can)


_WHAT_HELP = "models, data, recipes, runs or pretrained. Default: models, by family."
_What = Annotated[str, argument("LIST", _WHAT_HELP, _WHAT)]
_Family = Annotated[str, option("--family F", "Only models of one family.", complete=_a_family)]
_Can = Annotated[str, option("--can CAP", "Only models with a capability.", complete=_a_capability)]


def list_(what: _What = "", family: _Family = "", can: _Can = "", wide: opt.Wide = False) -> None:
    """List models, data sets, recipes or runs."""
    kind = choose("list", what, _WHAT) if what else "models"
    if kind == "models":
        return list_models(family, can, short=not what, wide=wide)
    if family or can:
        raise UsageError("`--family` and `--can` filter models only", hint=gz("list", "models"))
    lists: dict[str, Callable[..., None]]
    lists = {"data": list_data, "recipes": list_recipes, "runs": list_runs, "pretrained": list_pretrained}
    lists[kind](wide=wide)


def group(verb: str, show: Callable[..., None]) -> typer.Typer:
    """The command group of a verb. Without a command, it lists its items."""

    def callback(ctx: typer.Context, wide: opt.Wide = False) -> None:
        if ctx.invoked_subcommand is None:
            show(wide=wide)
            out.hint(f"`gz {verb} --help` shows its commands")
        elif wide:
            message = f"`--wide` before `{ctx.invoked_subcommand}` has no effect"
            raise UsageError(message, hint=f"gz {verb} --wide")

    return typer.Typer(callback=callback, invoke_without_command=True)


_ShownModel = Annotated[str, argument("MODEL", "Name of a model from `gz list`.", a_model)]


_Options = Annotated[bool, option("--options", "Also show every option, metrics and reference curves.")]


def show(model: _ShownModel, options: _Options = False, sets: opt.Sets = None) -> None:
    """Explain a model: its idea, equation, commands and limits."""
    from gzcli.docs.page import as_markdown, as_text, page_of

    page = page_of(model, sets or ())
    columns = max(MIN_PAGE_COLUMNS, min(MAX_PAGE_COLUMNS, shutil.get_terminal_size().columns))
    out.text(as_text(as_markdown(page, full=options), columns))
    if not options:
        count = sum(len(group.options) for group in page.groups)
        out.hint(f"`gz show {model} --options` adds {count} options, metrics and curves")
    out.data(asdict(page))


# ---------------------------------------------------------------------------- models and recipes


def list_models(family: str = "", can: str = "", *, short: bool = False, wide: bool = False) -> None:
    """Prints the models of a family that have a capability. `short`: only their names, by family."""
    from gzcli.models.catalog import OUTSIDE, cards, families, model_count

    family_of = families()
    every = cards() if can or not short or out.is_json() else {}  # names alone are read far sooner
    if family:
        family = choose("family", family, sorted({*family_of.values()}))
    if can:
        can = choose("capability", can, sorted({able for card in every.values() for able in card.can}))
    recipes = {canonical(name): name for name in recipe_names()}
    rows, others = [], set()
    by_family: dict[str, list[str]] = {}
    for model, of in sorted(family_of.items(), key=lambda item: item[::-1]):
        if (family and of != family) or (can and can not in every[model].can):
            continue
        recipe = recipes.get(canonical(model))
        name = recipe or model
        if recipe or of == OUTSIDE:
            by_family.setdefault(of, []).append(name)
        else:
            others.add(name)
        if (card := every.get(model)) is None:
            continue
        about = _about(name, card) if not short or out.is_json() else None
        row = {"name": name, "family": card.family, "about": about, "can": list(card.can)}
        rows.append((card, row | {"paper": card.paper, "recipe": recipe}))
    if short:
        lines = [(name, " ".join(models)) for name, models in by_family.items()]
        out.table(("family", "models"), lines, wrap=("models",), wide=wide)
        out.info("")
    else:
        columns, wrap = ("model", "what it is", "can", "family", "paper"), ("what it is", "can", "paper")
        cells = []
        for card, row in rows:
            more = [can for can in card.can if can != "sample"]  # which every model can
            marked = " ".join(f"{can}{NEEDS_LABELS}" if can in card.unlabelled_lack else can for can in more)
            cells.append((row["name"], row["about"], marked, card.family, card.paper))
        out.table(columns, cells, spare=("paper", "family"), wrap=wrap, wide=wide)
        if any(card.unlabelled_lack for card, _ in rows):
            out.hint(
                f"{NEEDS_LABELS} marks capabilities that need a run trained with "
                "`--set model.conditional=true`"
            )
    out.info(model_count(sum(map(len, by_family.values())), len(others)))
    if short:
        out.hint("`gz list models` describes them; also: data, recipes, runs, pretrained")
    out.data({"models": [row for _, row in rows]})


def _about(name: str, card: ModelCard) -> str:
    """A model in one line, from its recipe if it has one, otherwise from its class."""
    from gzcli.docs.text import written
    from gzcli.models.catalog import first_words

    if about := about_of(name):
        return about
    if place := trained_in(name):
        words = written(name)
        return f"A stage of {place[0]}: {words.title if words else first_words(card)}"
    return first_words(card).rstrip(".")


def list_recipes(*, wide: bool = False) -> None:
    """Prints the shipped recipes."""
    from gzcli.recipe.files import read_chain, recipes

    rows = []
    for name, path in recipes().items():
        chain, _ = read_chain(name)
        about, sets = chain[-1].tree.get("about", ""), list({at[0]: None for f in chain for at in f.sections})
        rows.append({"name": name, "path": path, "about": about, "for": sets})
    lines = [(row["name"], row["about"], " ".join(row["for"])) for row in rows]
    out.table(("recipe", "about", "for"), lines, spare=("for",), wrap=("about", "for"), wide=wide)
    out.data({"recipes": rows})


def list_pretrained(*, wide: bool = False) -> None:
    """Prints the trained models that come with gz."""
    from gzcli.store.pretrained import PREFIX, elsewhere, every

    models, lacking = every(), list(elsewhere())
    columns = ("pretrained", "data", "guidance", "metric", "above real", "params", "CPU time", "size")
    lines = [(PREFIX + one.name, one.data, one.guidance, *one.cells) for one in models]
    out.table(columns, lines, spare=("size", "CPU time", "params", "guidance"), wide=wide)
    if models:
        out.hint(models[0].command)
    if lacking:
        out.info(f"the gz repository has {len(lacking)} more: {', '.join(lacking)}")
    facts = ("about", "params", "seconds", "work", "command")
    rows = [
        {"name": PREFIX + one.name, "model": one.model, "data": one.data, "figures": one.figures}
        | {key: one.card[key] for key in facts}
        | {"bytes": one.file.stat().st_size, "path": one.file}
        for one in models
    ]
    out.data({"pretrained": rows, "elsewhere": lacking})


# ---------------------------------------------------------------------------- data sets


def list_data(*, long: bool = False, wide: bool = False) -> None:
    """Prints one line for every data set; if `long`, everything that is known about it."""
    from gzcli.data.library import listing

    rows = listing()
    if long:
        for row in rows:
            out.text("\n".join(_data_block(row, out.room(sys.stdout))) + "\n")
    else:
        columns = ("data", "images", "classes", "cached", "title")
        lines = []
        for row in rows:
            state = "yes" if row["cached"] else "gone" if row["lost"] else "no"
            lines.append((row["name"], _images(row), row["classes"] or None, state, row["title"]))
        out.table(columns, lines, spare=("classes", "images"), wrap=("title",), wide=wide)
    out.data({"data": rows})


def _images(row: dict[str, Any]) -> str | None:
    if not (row["size"] and row["channels"]):
        return None
    height, width = sides(row["size"])
    return f"{width}×{height}×{row['channels']}"


def _data_block(row: dict[str, Any], room: int | None) -> list[str]:
    """A data set's row as text: a heading, then each fact, wrapped at `room` columns."""
    from gzcli.data.sets.registry import extras_in_words

    images = ", ".join(f"{n:,} {split}" for split in ("train", "val", "test") if (n := row[f"n_{split}"]))
    sizes = f"also {', '.join(map(str, row['larger']))} pixels per side" if row["larger"] else None
    kind = "findings or attributes (any number per image)" if row["multilabel"] else "classes"
    state = ["cached" if row["cached"] else "not cached"]
    state += ["its path no longer exists"] if row["lost"] else []
    state += [f"{size(row['download'])} to download"] if row["download"] else []
    texts = {
        f"{row['name']}: ": row["title"],
        "  images     ": ", ".join(filter(None, (_images(row), images, sizes))),
        "  labels     ": f"{row['classes'] or 'no'} {kind}",
        "  with each  ": extras_in_words(row["extras"]),
        "  state      ": ", ".join(state),
        "  licence    ": row["licence"],
        "  cite       ": row["citation"],
        "  get it at  ": row["page"],
        "  path       ": row["path"],
    }
    lines = []
    for head, text in texts.items():
        if text:
            lines += out.wrapped(str(text), head, room) if room else [f"{head}{text}"]
    return lines


# ---------------------------------------------------------------------------- runs


def list_runs(model: str | None = None, data: str | None = None, *, wide: bool = False) -> None:
    """Prints the runs of a model on a data set, newest first. Raises UsageError for unknown names."""
    from gzcli.data.sets.registry import data_key
    from gzcli.recipe.files import find
    from gzcli.store.metrics import summaries
    from gzcli.store.runs import all_runs

    chosen = all_runs(model=model, data=data)
    if not chosen and data:  # runs name a folder by its key; an unknown name is refused here
        chosen = all_runs(model=model, data=data_key(data))
    if not chosen and model:
        find(spelling(model))  # raises UsageError for an unknown model
    rows = summaries(chosen)
    if rows or out.is_json():
        table_of_runs(chosen, rows, wide=wide)
    else:
        out.info("no runs yet")
        on = f" --data {data}" if data else ""
        out.hint(f"start one with `gz train {spelling(model) if model else 'vae'}{on}`")
    out.data({"runs": rows})


def table_of_runs(
    chosen: Sequence[Run], rows: Sequence[Mapping[str, Any]], *, wide: bool = False, to_stderr: bool = False
) -> None:
    """Prints a line for each run, from its summary."""
    from gzcli.store.metrics import in_words

    lines = []
    for name, row in zip(names_of(chosen, wide=wide, to_stderr=to_stderr), rows, strict=True):
        step, steps = row["step"], row["steps"]
        unfinished = row["state"] != "finished" and step is not None and steps
        added = str(row["name"]).removeprefix(str(row["model"])).strip()
        alias = " ".join(filter(None, (row["alias"], added))) or None
        cells = {**row, **in_words(row), "run": name, "name": alias}
        cells["step"] = f"{step}/{steps}" if unfinished else step
        lines.append([cells[column] for column in RUN_COLUMNS])
    out.table(RUN_COLUMNS, lines, spare=DISPENSABLE_COLUMNS, wide=wide, to_stderr=to_stderr)


def names_of(chosen: Sequence[Run], *, wide: bool = False, to_stderr: bool = False) -> list[str]:
    """The names of the runs in a table: full for scripts, otherwise the shortest that are unambiguous."""
    from gzcli.store.runs import short_names

    for_scripts = wide or out.room(sys.stderr if to_stderr else sys.stdout) is None
    short = {} if for_scripts else short_names(chosen)
    return [short.get(run.id, run.id) for run in chosen]
