"""Options that several verbs share, and their shell completion, which reads names from disk and imports
little."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from gzcli.cli import out
from gzcli.errors import UsageError, canonical, did_you_mean
from gzcli.store.paths import recipe_names

if TYPE_CHECKING:
    from gzcli.models.catalog import ModelCard


# --- completion: word so far → words that it may become ---


def names(incomplete: str, options: Iterable[str]) -> list[str]:
    """The options that begin with the word, `-` and `_` alike, spelt as the user began."""
    fits = (option for option in options if canonical(option).startswith(canonical(incomplete)))
    return [incomplete + option[len(incomplete) :] for option in fits]


def many(incomplete: str, options: Iterable[str]) -> list[str]:
    """The same for the last item of a comma-separated list."""
    done, comma, last = incomplete.rpartition(",")
    given = done.split(",")
    return [
        done + comma + name for name in names(last, (option for option in options if option not in given))
    ]


def run_names() -> list[str]:
    """Ids and aliases of the runs, newest first."""
    from gzcli.store.runs import all_runs

    return [name for run in all_runs() for name in (run.alias, run.id) if name]


def data_names() -> list[str]:
    from gzcli.data.names import names as known

    return list(known())


def complete_model(incomplete: str) -> list[str]:
    return names(incomplete, recipe_names())


def complete_run(incomplete: str) -> list[str]:
    return names(incomplete, run_names())


def complete_model_or_run(incomplete: str) -> list[str]:
    return names(incomplete, [*recipe_names(), *run_names()])


def complete_data(incomplete: str) -> list[str]:
    return names(incomplete, data_names())


def complete_data_list(incomplete: str) -> list[str]:
    return many(incomplete, data_names())


def complete_scores(ctx: typer.Context, incomplete: str) -> list[str]:
    """The scores of the model typed before, and those that the engine makes of any likelihood."""
    from gzcli.recipe.schema import score_names

    return many(
        incomplete,
        sorted({score for card in _cards_of(ctx.params.get("model")) for score in score_names(card)}),
    )


def complete_do(ctx: typer.Context, incomplete: str) -> list[str]:
    """The applications of the model typed before."""
    return names(incomplete, sorted({do for card in _cards_of(ctx.params.get("model")) for do in card.do}))


def _cards_of(model: str | None) -> list[ModelCard]:
    """The card of a model or of a run that is named after it; every card where neither is known."""
    from gzcli.models.catalog import cards

    word, known = canonical(model or ""), cards()
    fits = [card for name, card in known.items() if word == name or word.startswith(f"{name}_")]
    return fits or list(known.values())


def complete_checkpoint(incomplete: str) -> list[str]:
    return names(incomplete, ["last", "best"])


# --- checks ---


def choose(what: str, name: str, options: Iterable[str]) -> str:
    """The option that `name` means, `-` and `_` alike; raises UsageError with the nearest, or with all."""
    options = list(options)
    by_form = {canonical(option): option for option in options}
    if canonical(name) not in by_form:
        every = "it is one of " + ", ".join(f"`{option}`" for option in options)
        raise UsageError(f"no {what} is called `{name}`", hint=did_you_mean(name, options) or every)
    return by_form[canonical(name)]


def parse_gpus(text: str | None) -> int | str | None:
    """`--gpus 2` or `--gpus all`. Raises UsageError."""
    if text in (None, "all"):
        return text
    if not text.isdigit():
        raise UsageError(f"`--gpus {text}` is neither a number nor `all`")
    return int(text)


def parse_checkpoint(text: str) -> str:
    if text not in ("last", "best") and not text.isdigit():
        raise UsageError(f"`--checkpoint {text}` is neither `last`, `best` nor a step")
    return text


def split(values: Iterable[str] | str | None) -> list[str]:
    """`a,b` or ["a,b", "c"] as ["a", "b", "c"]."""
    return list(_split([values] if isinstance(values, str) else values or ()))


def _split(values: Iterable[str]) -> Iterator[str]:
    for value in values:
        yield from filter(None, (part.strip() for part in value.split(",")))


def _after_dashes(ctx: typer.Context, value: list[str] | None) -> list[str]:
    """Words that the launcher gets stand after `--`, and are options that may; a stray word before is a
    mistake."""
    words = ctx.obj or []
    after = words[words.index("--") + 1 :] if "--" in words else []
    given = list(value or ())
    if given and given != after[-len(given) :] and not ctx.resilient_parsing:
        raise UsageError(
            f"unexpected argument `{given[0]}`", hint="arguments for `accelerate launch` stand after `--`"
        )
    if not given:
        return given
    from gzcli.cli.accelerate import check

    return check(given)


def _json(value: bool) -> bool:
    out.configure(json=value or None)  # `gz --json list` has set it already
    return value


def _quiet(value: bool) -> bool:
    out.configure(quiet=value)
    return value


def confirmed(what: str, yes: bool) -> bool:
    """Whether `what` may be removed: `yes` (`--yes`), or the answer of whoever sits there.

    Raises UsageError where nobody does."""
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UsageError(f"removing {what} needs `--yes` where nobody can be asked")
    return typer.confirm(f"Remove {what}?", err=True)


# --- the options ---

_OUTPUT, _DEVICE = "Output", "Devices"

Json = Annotated[
    bool, typer.Option("--json", callback=_json, help="Print JSON for scripts.", rich_help_panel=_OUTPUT)
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", callback=_quiet, help="Print data and errors only.", rich_help_panel=_OUTPUT
    ),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]

_RUNS = {"metavar": "MODEL|RUN", "autocompletion": complete_model_or_run}
Model = Annotated[
    str, typer.Argument(help="A model (its newest finished run), or a run's id, alias or folder.", **_RUNS)
]
Models = Annotated[
    list[str] | None, typer.Argument(help="Models, or ids, aliases or folders of runs.", **_RUNS)
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="NAME|PATH", help="A data set, or your own images.", autocompletion=complete_data
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="S", min=0, help="Seed of all randomness.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="a.b=v", help="Change a key of the recipe; may be repeated."),
]
Checkpoint = Annotated[
    str,
    typer.Option(
        metavar="last|best|STEP",
        callback=parse_checkpoint,
        help="Which weights of the run.",
        autocompletion=complete_checkpoint,
    ),
]
Gpus = Annotated[str | None, typer.Option(metavar="N|all", help="How many GPUs.", rich_help_panel=_DEVICE)]
Cpu = Annotated[
    bool, typer.Option("--cpu", help="Use the CPU even where there are GPUs.", rich_help_panel=_DEVICE)
]
Processes = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="CPU processes, with `--cpu`.", rich_help_panel=_DEVICE),
]
Extra = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="-- ARG", callback=_after_dashes, help="Options of `accelerate launch`, after `--`."
    ),
]
