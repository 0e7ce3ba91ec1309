"""Options that several verbs share, and their shell completion.

Completion runs at every TAB: it reads names from disk and imports little.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from gzcli.cli import out
from gzcli.core.errors import UsageError, canonical, choose, did_you_mean
from gzcli.core.sections import PRECISIONS, SCALES
from gzcli.store.paths import recipe_names

PROGRAMS = ("gz", "gzcli")  # what the command is called
SHELLS = {"bash": "gz.bash", "zsh": "_gz", "fish": "gz.fish"}  # with the files of their completions
# (context of the command line, beginning of a word) → candidates for its completion
Completions = Callable[[typer.Context, str], Iterable[str]]
Verb = Callable[..., None]
# options with one purpose and different names, by verb
SAME_OPTIONS = (
    ("--budget", "--minutes", "--steps", "--epochs"),
    ("--data", "--in"),
    ("--dtype", "--precision"),
    ("--force", "--yes"),
    ("--metrics", "--score"),
    ("--need", "--can"),
)


def option(
    words: str,
    help: str = "",
    *,
    complete: Completions | Iterable[str] | None = None,
    panel: str = "",
    **more: Any,
) -> Any:
    """A Typer option. `words` are its names and the placeholder of its value: `--seed S`."""
    names = [word for word in words.split() if word.startswith("-")]
    metavar = next((word for word in words.split() if word not in names), "")
    more |= {"autocompletion": completer(complete, metavar), "rich_help_panel": panel or None}
    return typer.Option(*names, metavar=metavar or None, help=help, **more)


def argument(
    metavar: str, help: str = "", complete: Completions | Iterable[str] | None = None, **more: Any
) -> Any:
    more["autocompletion"] = completer(complete, metavar)
    return typer.Argument(metavar=metavar, help=help or None, **more)


def with_flags(parameter: str, helps: Mapping[str, str]) -> Callable[[Verb], Verb]:
    """Replaces a parameter of a verb by flags: one `--NAME` for each name of a table, with its help. The
    parameter receives the names whose flags were typed."""

    def decorate(verb: Verb) -> Verb:
        @wraps(verb)
        def flagged(**values: Any) -> None:
            typed = tuple(name for name in helps if values.pop(name))
            verb(**values, **{parameter: typed})

        whole = inspect.signature(verb, eval_str=True)
        parameters = dict(whole.parameters)
        place = list(parameters).index(parameter)
        of_name = {name: Annotated[bool, option(f"--{name}", text)] for name, text in helps.items()}
        flags = [
            parameters[parameter].replace(name=name, default=False, annotation=kind)
            for name, kind in of_name.items()
        ]
        every = [*parameters.values()][:place] + flags + [*parameters.values()][place + 1 :]
        flagged.__signature__ = whole.replace(parameters=every)  # type: ignore[attr-defined]
        flagged.__annotations__ = {p.name: p.annotation for p in every}
        return flagged

    return decorate


# --- completion: the beginning of a word → the words that complete it ---


def completer(words: Completions | Iterable[str] | None, metavar: str) -> Any:
    """A completion function for Typer. In a list such as `M[,M…]`, it completes the last item."""

    def complete(ctx: typer.Context, incomplete: str) -> list[str]:
        options = words(ctx, incomplete) if callable(words) else words or ()
        if "[," not in metavar:
            return names(incomplete, options)
        earlier, comma, last = incomplete.rpartition(",")
        left = (option for option in options if option not in earlier.split(","))
        return [earlier + comma + name for name in names(last, left)]

    return complete if words else None


def names(incomplete: str, options: Iterable[str]) -> list[str]:
    """The options that begin with `incomplete`, spelt as the user began; `-` and `_` are the same."""
    fits = (option for option in options if canonical(option).startswith(canonical(incomplete)))
    return [incomplete + option[len(incomplete) :] for option in fits]


def run_names() -> list[str]:
    """Ids and aliases of the runs, newest first."""
    from gzcli.store.runs import all_runs

    return [name for run in all_runs() for name in (run.alias, run.id) if name]


def a_model(ctx: typer.Context, incomplete: str) -> list[str]:
    return recipe_names()


def a_run(ctx: typer.Context, incomplete: str, *candidates: str) -> list[str]:
    """The names of runs, after other words. If none matches, the ids without their times, as tables show
    them."""
    from gzcli.store.runs import all_runs, short_names

    if names(incomplete, words := [*candidates, *run_names()]):
        return words
    every = all_runs()
    return list(short_names(every, every).values())


def a_model_or_run(ctx: typer.Context, incomplete: str) -> list[str]:
    return a_run(ctx, incomplete, *recipe_names())


def a_judge(ctx: typer.Context, incomplete: str) -> list[str]:
    """Completions for what `gz ood` scores with: runs, models and methods without training."""
    from gzcli.metrics.alarms.methods import METHODS

    return [*METHODS, *a_model_or_run(ctx, incomplete)]


def a_setting(ctx: typer.Context, incomplete: str) -> list[str]:
    from gzcli.cli.model_options import settings, word_of

    return settings(word_of(ctx.params), ctx.params.get("data"), incomplete)


def a_set(ctx: typer.Context, incomplete: str) -> list[str]:
    from gzcli.data.sets.registry import names as names_of_sets

    return list(names_of_sets())


# --- checks ---


def meant(option: str, verb: Any, *others: str, refused: Collection[str] = ()) -> str | None:
    """A hint at the option of a verb that an unknown one means: its name in this verb, or a similar one.
    others: further options, such as those of a model.
    refused: options that the rest of the command line excludes."""
    opts = [name for param in verb.params for name in param.opts] if verb else []
    names = [name for name in opts if name.startswith("-") and name not in refused]
    same = (name for group in SAME_OPTIONS if option in group for name in group if name in names)
    name = next(same, None)
    return f"did you mean `{name}`?" if name else did_you_mean(option, [*others, *names])


def parse_gpus(text: str | None) -> int | Literal["all"] | None:
    if text is None or text == "all":
        return text  # type: ignore[return-value]
    if not text.isdigit():
        raise UsageError(f"`--gpus {text}` is neither a number nor `all`")
    return int(text)


def parse_checkpoint(text: str) -> str:
    if text not in ("last", "best") and not text.isdigit():
        raise UsageError(f"`--checkpoint {text}` is neither `last`, `best` nor a step")
    return text


def parse_precision(text: str | None) -> str | None:
    return None if text is None else choose("precision", text, PRECISIONS)


def split(text: str | None) -> list[str]:
    """The different items of a comma-separated list: `a, b` as ["a", "b"]; [] for None. Raises UsageError for
    a list without items."""
    items = [item for item in dict.fromkeys(map(str.strip, (text or "").split(","))) if item]
    if text and not items:
        raise UsageError(f"`{text}` contains no names", hint="separate names with commas, such as `a,b`")
    return items


def _after_dashes(ctx: typer.Context, value: list[str] | None) -> list[str]:
    """The words after `--`, which are passed to `accelerate launch`. Raises UsageError for a stray word
    before them."""
    words, extra = ctx.obj or [], list(value or ())
    after = words[words.index("--") + 1 :] if "--" in words else []
    if extra and extra != after[-len(extra) :] and not ctx.resilient_parsing:
        hint = "name one model; put arguments for `accelerate launch` after `--`"
        raise UsageError(f"unexpected argument `{extra[0]}`", hint=hint)
    if not extra:
        return extra
    from gzcli.launch.launcher import check_extra

    return check_extra(extra)


def _switch(param: typer.CallbackParam, value: bool) -> bool:
    out.configure(**{str(param.name): value or None})  # `gz --json list` has set it already
    return value


def may_remove(what: str, yes: bool) -> bool:
    """Whether `what` may be removed: `--yes` was typed, or the user agreed on a terminal."""
    if not yes and not sys.stdin.isatty():
        raise UsageError(f"removing {what} needs `--yes` if there is no terminal to ask on")
    return yes or out.confirmed(f"Remove {what}?")


# --- the options ---

OUTPUT = "Output"
_of_devices, _of_cluster = partial(option, panel="Devices"), partial(option, panel="A cluster")

Json = Annotated[bool, option("--json", "Print JSON for scripts.", callback=_switch, panel=OUTPUT)]
Quiet = Annotated[bool, option("--quiet -q", "Print data and errors only.", callback=_switch, panel=OUTPUT)]


def switch(json: Json = False, quiet: Quiet = False) -> None:
    """The options of every verb."""


Wide = Annotated[bool, option("--wide", "Print every column, even beyond the terminal width.", panel=OUTPUT)]
_REPORT_HELP = "Also write the results as HTML, Markdown and LaTeX."
Report = Annotated[Path | None, option("--report DIR", _REPORT_HELP, panel=OUTPUT)]
Open = Annotated[bool, option("--open", "Also open the image in the default viewer.", panel=OUTPUT)]
_COLUMNS_HELP = "Columns of the report's table to cite, such as `fd,recall,bpd,seconds`."
Columns = Annotated[str | None, option("--columns C[,C…]", _COLUMNS_HELP, panel=OUTPUT)]
Yes = Annotated[bool, option("--yes -y", "Do not ask for confirmation.")]
JOBS_HELP = "Number of parallel trainings, each on a core or GPU."
DryRun = Annotated[
    bool, option("--dry-run", "Print what would be done and how long it would take, and stop.")
]
Force = Annotated[bool, option("--force", "Overwrite an existing file.")]

MODEL_HELP = (
    "A model (its newest finished run), a run's id, alias or folder, a file, `hf://OWNER/NAME`, or "
    "`pretrained:MODEL`."
)
Model = Annotated[str, argument("MODEL|RUN", MODEL_HELP, a_model_or_run)]
_PRETRAINED_HELP = "Use the pretrained model that comes with gz (`pretrained:MODEL`)."
Pretrained = Annotated[bool, option("--pretrained", _PRETRAINED_HELP)]
Data = Annotated[str | None, option("--data NAME|PATH", "A data set, or your own images.", complete=a_set)]
_SCALE_HELP = "Model and training size. Default: tiny for embedded data sets, full on GPUs, small on CPUs."
Scale = Annotated[str | None, option(f"--scale {'|'.join(SCALES)}", _SCALE_HELP, complete=SCALES)]
_SEED = option("--seed S", "Random seed.", min=0)
Seed = Annotated[int | None, _SEED]  # None: the recipe's
SeedOrZero = Annotated[int, _SEED]
_of_checkpoint = partial(option, callback=parse_checkpoint, complete=("last", "best"))
Checkpoint = Annotated[str, _of_checkpoint("--checkpoint last|best|STEP", "Checkpoint of the run to use.")]
_PRECISION_HELP = (
    "Numeric precision. Default: the training precision for samples, fp32 for scores. Likelihoods always "
    "use fp32."
)
_of_precision = partial(_of_devices, callback=parse_precision, complete=PRECISIONS)
Precision = Annotated[str | None, _of_precision(f"--precision {'|'.join(PRECISIONS)}", _PRECISION_HELP)]
Gpus = Annotated[str | None, _of_devices("--gpus N|all", "Number of GPUs.")]
Cpu = Annotated[bool, _of_devices("--cpu", "Use the CPU even if there are GPUs.")]
Processes = Annotated[
    int | None, _of_devices("--processes N", "Number of CPU processes, with `--cpu`.", min=1)
]
Submit = Annotated[Literal["slurm"] | None, _of_cluster("--submit", "Write a job script and submit it.")]
_SLURM_HELP = "An `sbatch` option, such as `time=2:00:00`. `array=0-4` runs five seeds."
Slurm = Annotated[list[str] | None, _of_cluster("--slurm KEY=VALUE", _SLURM_HELP)]
_EXTRA = argument("-- ARG", "Options for `accelerate launch`, after `--`.", callback=_after_dashes)
Extra = Annotated[list[str] | None, _EXTRA]
_SETS_HELP = "Change a key of the recipe; repeatable. Quote a value with brackets or spaces."
Sets = Annotated[list[str] | None, option("--set a.b=v", _SETS_HELP, complete=a_setting)]
