"""Options that several verbs share, and their shell completion.

Completion runs at every TAB: it reads names from disk and imports little.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import typer

from gzcli.cli import out
from gzcli.core.errors import UsageError, canonical, did_you_mean, matching
from gzcli.core.sections import PRECISIONS, SCALES
from gzcli.store.paths import recipe_names

# --- completion: the beginning of a word → the words that complete it ---


def names(incomplete: str, options: Iterable[str]) -> list[str]:
    """The options that begin with `incomplete`, spelt as the user began; `-` and `_` are the same."""
    fits = (option for option in options if canonical(option).startswith(canonical(incomplete)))
    return [incomplete + option[len(incomplete) :] for option in fits]


def many(incomplete: str, options: Iterable[str]) -> list[str]:
    """The completions of the last item of a comma-separated list, without the items before it."""
    done, comma, last = incomplete.rpartition(",")
    items = done.split(",")
    return [
        done + comma + name for name in names(last, (option for option in options if option not in items))
    ]


def run_names() -> list[str]:
    """Ids and aliases of the runs, newest first."""
    from gzcli.store.runs import all_runs

    return [name for run in all_runs() for name in (run.alias, run.id) if name]


def data_names() -> list[str]:
    from gzcli.data.sets.names import names as known

    return list(known())


def complete_model(incomplete: str) -> list[str]:
    return names(incomplete, recipe_names())


def complete_models(incomplete: str) -> list[str]:
    return many(incomplete, [*recipe_names(), *([] if "," in incomplete else ["all"])])


def complete_run(incomplete: str) -> list[str]:
    return names(incomplete, run_names()) or _short_names(incomplete)


def _short_names(incomplete: str) -> list[str]:
    """Completions of a run's id without its time, as tables show it."""
    from gzcli.store.runs import all_runs, short_names

    runs = all_runs()
    return names(incomplete, short_names(runs, runs).values())


def complete_model_or_run(incomplete: str) -> list[str]:
    return names(incomplete, [*recipe_names(), *run_names()]) or _short_names(incomplete)


def complete_data(incomplete: str) -> list[str]:
    return names(incomplete, data_names())


def complete_data_list(incomplete: str) -> list[str]:
    return many(incomplete, data_names())


# --- checks ---


def choose(what: str, name: str, options: Iterable[str]) -> str:
    """The option that `name` means; `-` and `_` are the same. Raises UsageError that hints at the nearest
    option, or at all; `what` names their kind."""
    options = list(options)
    if match := matching(name, options):
        return match
    every = "it is one of " + ", ".join(f"`{option}`" for option in options)
    raise UsageError(f"no {what} is called `{name}`", hint=did_you_mean(name, options) or every)


def parse_gpus(text: str | None) -> int | Literal["all"] | None:
    """The value of `--gpus`: a number or `all`. Raises UsageError."""
    if text is None:
        return None
    if text == "all":
        return "all"
    if not text.isdigit():
        raise UsageError(f"`--gpus {text}` is neither a number nor `all`")
    return int(text)


def parse_checkpoint(text: str) -> str:
    """The value of `--checkpoint`. Raises UsageError."""
    if text not in ("last", "best") and not text.isdigit():
        raise UsageError(f"`--checkpoint {text}` is neither `last`, `best` nor a step")
    return text


def parse_precision(text: str | None) -> str | None:
    """The value of `--precision`. Raises UsageError."""
    return None if text is None else choose("precision", text, PRECISIONS)


def split(text: str | None) -> list[str]:
    """The items of a comma-separated list: `a, b` as ["a", "b"]; [] of None."""
    return [item for item in map(str.strip, (text or "").split(",")) if item]


def _after_dashes(ctx: typer.Context, value: list[str] | None) -> list[str]:
    """The words after `--`, which go to `accelerate launch`. Raises UsageError for a stray word before `--`,
    and for an option that gz sets itself."""
    words = ctx.obj or []
    after = words[words.index("--") + 1 :] if "--" in words else []
    extra = list(value or ())
    if extra and extra != after[-len(extra) :] and not ctx.resilient_parsing:
        raise UsageError(
            f"unexpected argument `{extra[0]}`", hint="arguments for `accelerate launch` stand after `--`"
        )
    if not extra:
        return extra
    from gzcli.launch.launcher import check_extra

    return check_extra(extra)


def _json(value: bool) -> bool:
    out.configure(json=value or None)  # `gz --json list` has set it already
    return value


def _quiet(value: bool) -> bool:
    out.configure(quiet=value or None)  # `gz data -q list` has set it already
    return value


def may_remove(what: str, yes: bool) -> bool:
    """Whether `what` may be removed: `--yes`, or the user's answer. Raises UsageError where nobody can be
    asked."""
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UsageError(f"removing {what} needs `--yes` where nobody can be asked")
    return out.confirmed(f"Remove {what}?")


def spelled(model: str, pretrained: bool) -> str:
    """`MODEL --pretrained` in the spelling that every verb takes."""
    from gzcli.store.pretrained import PREFIX

    return f"{PREFIX}{model}" if pretrained and not model.startswith(PREFIX) else model


# --- the options ---

_OUTPUT, _DEVICE, _CLUSTER = "Output", "Devices", "A cluster"

Json = Annotated[
    bool, typer.Option("--json", callback=_json, help="Print JSON for scripts.", rich_help_panel=_OUTPUT)
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", callback=_quiet, help="Print data and errors only.", rich_help_panel=_OUTPUT
    ),
]
Wide = Annotated[
    bool,
    typer.Option(
        "--wide", help="Print every column in full, wider than the terminal.", rich_help_panel=_OUTPUT
    ),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|RUN",
        help="A model (its newest finished run), a run's id, alias or folder, a file, `hf://OWNER/NAME`, or "
        "`pretrained:MODEL`.",
        autocompletion=complete_model_or_run,
    ),
]
Pretrained = Annotated[
    bool,
    typer.Option("--pretrained", help="The model that comes with gz, trained already: `pretrained:MODEL`."),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="NAME|PATH", help="A data set, or your own images.", autocompletion=complete_data
    ),
]
Scale = Annotated[
    str | None,
    typer.Option(
        "--scale",
        metavar="|".join(SCALES),
        help="Size of network and training; else tiny for embedded sets, full on GPUs, small without.",
        autocompletion=lambda: list(SCALES),
    ),
]
_SEED = typer.Option("--seed", metavar="S", min=0, help="Seed of all randomness.")
Seed = Annotated[int | None, _SEED]  # None: the recipe's
SeedOrZero = Annotated[int, _SEED]
Checkpoint = Annotated[
    str,
    typer.Option(
        metavar="last|best|STEP",
        callback=parse_checkpoint,
        help="Which weights of the run.",
        autocompletion=lambda: ["last", "best"],
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(
        "--precision",
        metavar="|".join(PRECISIONS),
        callback=parse_precision,
        help="Else the run's own for samples, and fp32 for scores. Likelihoods are always in fp32.",
        autocompletion=lambda: list(PRECISIONS),
        rich_help_panel=_DEVICE,
    ),
]
Report = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="DIR",
        help="Write the results as HTML, Markdown and LaTeX tables too.",
        rich_help_panel=_OUTPUT,
    ),
]
Gpus = Annotated[str | None, typer.Option(metavar="N|all", help="How many GPUs.", rich_help_panel=_DEVICE)]
Cpu = Annotated[
    bool, typer.Option("--cpu", help="Use the CPU even where there are GPUs.", rich_help_panel=_DEVICE)
]
Processes = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="CPU processes, with `--cpu`.", rich_help_panel=_DEVICE)
]
Submit = Annotated[
    Literal["slurm"] | None,
    typer.Option("--submit", help="Write a job script and submit it.", rich_help_panel=_CLUSTER),
]
Slurm = Annotated[
    list[str] | None,
    typer.Option(
        "--slurm",
        metavar="KEY=VALUE",
        help="An option of `sbatch`, as `time=2:00:00`; `array=0-4` takes five seeds.",
        rich_help_panel=_CLUSTER,
    ),
]
Extra = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="-- ARG", callback=_after_dashes, help="Options of `accelerate launch`, after `--`."
    ),
]
