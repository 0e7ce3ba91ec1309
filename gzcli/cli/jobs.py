"""Code that verbs share: jobs of the engine and of SLURM, options of a model's methods, and the final lines
of output."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gzcli.cli import out
from gzcli.cli.options import meant
from gzcli.core.errors import GzError, MissingError, UsageError
from gzcli.core.hints import Option, advice, gz, setting
from gzcli.core.sections import LaunchSection, renamed
from gzcli.core.units import counted, duration, size
from gzcli.recipe.suggest import suggest
from gzcli.store import files, runs, start
from gzcli.store.paths import user_dir
from gzcli.store.run_folder import Run

if TYPE_CHECKING:
    import typer

    from gzcli.models.catalog import Param
    from gzcli.recipe.schema import Rule
    from gzcli.store.jobs import Job

# settings of a verb that passes options on to the model's methods
OWN_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}
START_TIME = time.monotonic()


# ---------------------------------------------------------------------------- a job of the engine


def do_job(folder: Path, job: Job) -> dict[str, Any]:
    """Runs a job in the engine, shows its progress and returns its result."""
    from gzcli.launch import jobs

    mode = "human" if out.mode() == "human" else "quiet"
    return jobs.do_job(folder, job, mode=mode, warn=out.warn)


def announce(run: Run, ref: str, *, data: str | None = None) -> None:
    """Prints which run is used. If the user may have expected another one, it also prints the reason."""
    from gzcli.launch.from_file import is_shared

    out.info(f"run: {run.id}")
    if run.served:
        last = run.serving.status()["step"]
        best = f"using the weights of step {run.served:,}, the best by validation"
        out.info(f"note: {best}; `--checkpoint {last}` selects the last")
    if length := run.serving.status().get("ema_length"):
        out.info(f"note: using the average of EMA length {length:g}, made by `gz runs ema`")
    if runs.by_name(ref) is not None:
        weights = run.weights
        if run.state != "finished" and weights and weights != run.serving.model_file:
            step = int(weights.parent.name)
            out.info(
                f"note: the run is unfinished ({run.state}); using its newest checkpoint, at step {step:,}"
            )
    elif is_shared(ref):
        return
    elif short := run.shortfalls:
        on = f" on `{data}`" if data else ""
        out.info(f"note: the newest finished run of `{run.model}`{on} has {', '.join(short)}")
    else:
        finished = [one for one in runs.all_runs(model=run.model, data=data) if one.state == "finished"]
        for newer in finished[: finished.index(run)]:
            out.info(f"note: skipped the newer run `{newer.id}`: {', '.join(newer.shortfalls)}")


def fetch(weights: Iterable[str]) -> None:
    """Downloads these networks of `gzcli.data.download.fetch.WEIGHTS` if they are not in the cache."""
    from gzcli.data.download.fetch import fetch_weights

    for name in weights:
        with out.progress(name) as report:
            fetch_weights(name, progress=report, say=out.info)


# ---------------------------------------------------------------------------- options of a model's methods


def as_options(words: list[str], section: str) -> list[str]:
    """The words that Typer left over. `--set sample.steps=15`, for a key of this section, becomes
    `--steps=15`."""
    options, rest = [], iter(words)
    for word in rest:
        if word == "--set" or word.startswith("--set="):
            text = next(rest, "") if word == "--set" else word.removeprefix("--set=")
            key, equals, value = text.partition("=")
            if not equals or not key.startswith(f"{section}."):
                message = f"`--set {text}`: a trained model accepts only `{section}.KEY=VALUE`"
                raise UsageError(message, hint=setting(f"{section}.steps", 20))
            word = f"--{key.removeprefix(f'{section}.')}={value}"
        options.append(word)
    return options


def method_options(
    words: list[str],
    params: Mapping[str, Param | Rule],
    what: str,
    section: str,
    by_method: Mapping[str, Iterable[str]] | None = None,
    verb: Any = None,
) -> dict[str, Any]:
    """Parses words such as `--rows 14 --no-clip` into the typed keywords of a method. Messages call the
    method `what`.

    by_method: options of other methods, for hints.
    verb: Typer command, whose options serve hints too.
    """
    from gzcli.recipe.schema import check_value
    from gzcli.recipe.yaml import scalar

    values: dict[str, Any] = {}
    words = as_options(words, section)
    while words:
        word = words.pop(0)
        name, equals, text = word.lstrip("-").partition("=")
        name = renamed(name.replace("-", "_"), params, section, "do")
        positive = name.removeprefix("no_")  # `--no-clip` sets `clip` to false
        if name == "size" and name not in params and section == "sample":
            hint = advice(
                "the U-Nets of ddpm, fm and sgm draw any size: {}", gz("sample", "fm", size="96x64")
            )
            raise UsageError(f"{what} draws images only at its training size", hint=hint)
        if not word.startswith("--") or (name not in params and positive not in params):
            options = [f"--{p.replace('_', '-')}" for p in params]
            takes = f"options of {what}: {' '.join(options)}" if options else f"{what} has no options"
            owners = [f"`{method}`" for method, names in (by_method or {}).items() if name in names]
            like = meant(f"--{name}", verb, *options) or takes
            hint = advice(f"it is an option of {', '.join(owners)}" if owners else like)
            kind = "no such option" if word.startswith("-") else "unexpected argument"
            raise UsageError(f"{kind} `{word.partition('=')[0]}`", hint=hint)
        if name not in params:
            values[positive] = False
            continue
        annotation = params[name].annotation
        if annotation == "bool" and not equals and (not words or words[0].startswith("--")):
            values[name] = True
            continue
        if not equals and not words:
            raise UsageError(f"`--{name}` needs a value ({annotation})")
        text = text if equals else words.pop(0)
        value = text if annotation == "str" else scalar(text)  # `--negative 3` is a text
        values[name] = check_value(value, params[name], f"--{name.replace('_', '-')}")
    return values


def model_and_words(model: str | None, ctx: typer.Context) -> tuple[str | None, list[str]]:
    """The model of a command line, and the words that Typer does not know. It takes an unknown option before
    the model, or without one, for the model."""
    return (None, [model, *ctx.args]) if model and model.startswith("-") else (model, ctx.args)


@contextmanager
def misspellings(
    words: Iterable[str], ctx: typer.Context, *, of_model: Sequence[str] = (), refused: Collection[str] = ()
) -> Iterator[None]:
    """Names an option that is misspelt among these words if the command line is refused.

    of_model: options that the model adds to the verb.
    refused: options that hints do not name.
    """
    try:
        yield
    except UsageError:
        for word in (word.partition("=")[0] for word in words if word.startswith("--")):
            if word in of_model:
                continue
            if hint := meant(word, ctx.command, *of_model, refused=refused):
                raise UsageError(f"no such option `{word}`", hint=hint) from None
        raise


# ---------------------------------------------------------------------------- a job of SLURM

# Options that are about the submission, or that the script writes itself → whether a value follows.
SUBMISSION_OPTIONS = dict.fromkeys(("--submit", "--slurm", "--name", "--seed"), True)
SUBMISSION_OPTIONS |= dict.fromkeys(("--dry-run", "--json", "--resume", "--requeue"), False)


def submit(
    verb: str,
    name: str,
    seed: int,
    launch: LaunchSection,
    options: Iterable[str] | None,
    goes_on: Literal["named", "resumed", "same"] | None = None,
    *,
    tasks: Sequence[str] = (),
    dry_run: bool = False,
) -> None:
    """Writes the command line of this process as a job script into the folder of runs and submits it; with
    `dry_run`, prints it instead. Raises UsageError for `--gpus all`, because SLURM needs a number.

    goes_on: how a job that has run out of time is restarted. None: it is not restarted.
    tasks: entries of a league; each task of an array takes one.
    """
    from gzcli.launch import slurm

    if launch.gpus == "all":
        raise UsageError("SLURM needs a number of GPUs, not `--gpus all`", hint=Option("gpus", 4))
    gpus = launch.gpus or 0
    cores = (launch.threads or slurm.CORES_OF_A_PROCESS) * (gpus or launch.processes or 1)
    words, machines = words_of(sys.argv, verb), launch.machines or 1
    job = slurm.Job(words, name, seed, gpus, cores, machines=machines, goes_on=goes_on, tasks=tasks)
    folder = user_dir("runs", "slurm")
    program = [sys.executable, start.SCRIPT, "gzcli"]
    text = slurm.batch_script(job, slurm.options(options or ()), program=program, folder=folder)
    if dry_run:
        out.text(text.rstrip())
        out.data({"script": text})
        return
    path = folder / f"{job.name}-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 1000:03d}.sh"
    files.write_atomic(path, text)
    if shutil.which("sbatch") is None:
        message = f"`sbatch` is not available on this machine; the script is `{path}`"
        raise MissingError(message, hint=f"on a machine with SLURM, run `sbatch {path}`")
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True)
    if done.returncode:
        why = " ".join(done.stderr.split()) or f"code {done.returncode}"
        hint = advice(f"correct the options with {{}}, or edit `{path}`", Option("slurm", "KEY=VALUE"))
        raise MissingError(f"`sbatch` refused the job: {why}", hint=hint)
    number = done.stdout.strip().partition(";")[0]
    if not number:
        raise GzError("`sbatch` printed no job number")
    out.info(f"script: {path}")
    out.text(f"job {number}")
    out.data({"job": number, "script": text, "path": path})


def words_of(argv: list[str], verb: str) -> list[str]:
    """The command line that a job runs. The options of SUBMISSION_OPTIONS are removed; everything after `--`
    is unchanged."""
    words: list[str] = []
    rest = iter(argv[argv.index(verb) :] if verb in argv else argv)
    for word in rest:
        if word == "--":
            return [*words, word, *rest]
        option, equals, _ = word.partition("=")
        if option not in SUBMISSION_OPTIONS:
            words.append(word)
        elif SUBMISSION_OPTIONS[option] and not equals:
            next(rest, None)
    return words


# ---------------------------------------------------------------------------- how a verb ends


def end(facts: Iterable[str | None], then: Iterable[tuple[str, str]] = ()) -> None:
    """Prints `done: …` and `next: …` on stderr. Each next command has its own line, with its purpose if there
    is room."""
    if out.mode() != "human":
        return
    if words := ", ".join(filter(None, facts)):
        out.info(f"{out.style('done:', 'cyan')} {words}")
    steps = list(then)
    label, longest = len("next: "), max((len(command) for command, _ in steps), default=0)
    for i, (command, purpose) in enumerate(steps):
        head = " " * label if i else out.style("next:", "cyan") + " "
        fits = purpose and label + longest + 2 + len(purpose) <= out.width()
        gap = " " * (longest - len(command) + 2)
        out.line(head + out.style(command, "bold") + (gap + purpose if fits else ""))


def took() -> str:
    """The time since the command began, in readable form."""
    return duration(time.monotonic() - START_TIME)


def bytes_of(path: Path) -> str:
    """The size of a file, or of all files in a folder, in readable form."""
    files = path.rglob("*") if path.is_dir() else [path]
    return size(sum(file.lstat().st_size for file in files if file.is_file()))


def name_of(run: Run) -> str:
    """The shortest name that identifies a run of the store in a command."""
    return quoted(run.alias or runs.short_names([run])[run.id])


def quoted(text: object) -> str:
    """A text quoted as one word of a shell."""
    return shlex.quote(str(text))


def new_set(images: int | None, words: str, classes: int | None, *, show: bool) -> None:
    """Prints the final lines of a verb that prepared a data set with this number of classes. The next
    commands contain the words of its `--data`."""
    drawn = [(f"gz data show {words}", "show its classes and some images")] if show else []
    trained = (f"gz train {suggest(classes)} --data {words}", "train a model")
    end([counted(images, "image") if images else None, took()], [*drawn, trained])
