"""What verbs share: a job that the engine does, options of a model's methods, and the lines at the end."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gzcli.cli import out
from gzcli.core.errors import GzError, UsageError, did_you_mean
from gzcli.core.sections import renamed
from gzcli.core.units import counted, duration, size

if TYPE_CHECKING:
    from gzcli.core.jobs import Job
    from gzcli.core.sections import LaunchSection
    from gzcli.models.signatures import Param
    from gzcli.recipe.schema import Rule
    from gzcli.store.runs import Run

# settings of a verb that passes options on to the model's methods
OWN_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}
FIRST = "fm"  # the model that a new data set is tried with: the best pictures of those that train in minutes
LABEL = len("next: ")


def do_job(folder: Path, job: Job, *, quiet: bool = False) -> dict[str, Any]:
    """Runs the engine on a job in a new or empty folder, and returns the engine's `result.json`. After an
    error of the engine a new folder without any output is removed."""
    from gzcli.core import jobs
    from gzcli.launch import launcher
    from gzcli.store import claims, files, paths
    from gzcli.store.run_folder import Run

    try:
        plan = launcher.plan(job.launch, every_gpu=False)
    except GzError:
        if paths.user_dir() in folder.parents:  # it was made for this job
            folder.rmdir()
        raise
    if plan.note:
        out.warn(plan.note)
    new = not folder.exists() or paths.user_dir() in folder.parents
    try:
        with claims.claimed_folder(folder):
            jobs.write(folder, replace(job, launch=replace(job.launch, threads=plan.threads)))
            quiet = quiet or out.is_json() or out.is_quiet()
            launcher.run(folder, plan, launcher=False, mode="quiet" if quiet else "human")
    except GzError as error:
        if new and error.kind != "bug":  # whose log may tell more
            claims.discard(folder)
        raise
    return files.read_json(Run(folder).result_file)


def processes_of(gpus: str | None, cpu: bool, processes: int | None) -> LaunchSection:
    """The processes that `--gpus`, `--cpu` and `--processes` ask for. Raises UsageError."""
    from gzcli.cli.options import parse_gpus
    from gzcli.core.sections import LaunchSection

    return LaunchSection(parse_gpus(gpus), cpu, processes)


def new_folder(parent: Path, name: str = "") -> Path:
    """A new folder NAME-TIME-xxxx for a job; what killed jobs left half written beside it is removed."""
    from gzcli.store.files import sweep

    sweep(*parent.glob("*"))
    while True:
        words = filter(None, [name, time.strftime("%Y%m%d-%H%M%S"), os.urandom(2).hex()])
        folder = parent / "-".join(words)
        try:
            folder.mkdir(parents=True)
            return folder.absolute()
        except FileExistsError:
            continue


def announce(run: Run, ref: str, *, data: str | None = None) -> None:
    """Prints `run: …` on stderr, and a note where the user may have expected another run: where it is
    unfinished, or where `ref` is a model's name and its run was cut short or is not the newest."""
    from gzcli.launch.from_file import is_shared
    from gzcli.store import runs

    out.info(f"run: {run.id}")
    if runs.by_name(ref) is not None:
        weights = run.weights
        if run.state != "finished" and weights and weights != run.serving.model_file:
            step = int(weights.parent.name)
            out.info(f"note: it is {run.state}; its newest checkpoint is taken, of step {step:,}")
    elif is_shared(ref):
        return
    elif short := run.shortfalls:
        on = f" on `{data}`" if data else ""
        none = f"no finished run of `{run.model}`{on} is whole"
        out.info(f"note: {none}, the newest is taken: {', '.join(short)}")
    else:
        same = [other for other in runs.all_runs(model=run.model, data=data) if other.state == "finished"]
        for newer in same[: same.index(run)]:
            out.info(f"note: passed over `{newer.id}`, which is newer: {', '.join(newer.shortfalls)}")


def as_options(words: list[str], section: str) -> list[str]:
    """The words that Typer has left, with `--set sample.steps=15` of this section as `--steps=15`."""
    options, rest = [], iter(words)
    for word in rest:
        if word == "--set" or word.startswith("--set="):
            setting = next(rest, "") if word == "--set" else word.removeprefix("--set=")
            key, equals, value = setting.partition("=")
            if not equals or not key.startswith(f"{section}."):
                message = f"`--set {setting}`: of a trained model only `{section}.KEY=VALUE` can be changed"
                raise UsageError(message, hint=f"--set {section}.steps=20")
            word = f"--{key.removeprefix(f'{section}.')}={value}"
        options.append(word)
    return options


def method_options(
    words: list[str], params: Mapping[str, Param | Rule], what: str, section: str
) -> dict[str, Any]:
    """The typed keywords of a method, which messages call `what`, from words as `--rows 14 --no-clip`; its
    defaults are in this section of a recipe."""
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
            hint = "`gz sample fm --size 96x64`: the U-Nets of ddpm, fm and sgm draw any size"
            raise UsageError(f"{what} makes images of the size that it was trained on", hint=hint)
        if not word.startswith("--") or (name not in params and positive not in params):
            options = [f"--{p.replace('_', '-')}" for p in params]
            takes = f"{what} takes: {' '.join(options)}" if options else f"{what} takes no options of its own"
            raise UsageError(f"no such option `{word}`", hint=did_you_mean(word, options) or takes)
        if name not in params:
            values[positive] = False
            continue
        annotation = params[name].annotation
        if annotation == "bool" and not equals and (not words or words[0].startswith("--")):
            values[name] = True
            continue
        if not equals:
            if not words:
                raise UsageError(f"`--{name}` needs a value ({annotation})")
            text = words.pop(0)
        value = text if annotation == "str" else scalar(text)  # `--negative 3` is a text
        values[name] = check_value(value, params[name], f"--{name.replace('_', '-')}")
    return values


def fetch(weights: Iterable[str]) -> None:
    """Fetches these networks of `gzcli.data.download.fetch.WEIGHTS` if they are not in the cache."""
    from gzcli.data.download.fetch import fetch_weights

    for name in weights:
        with out.progress(name) as report:
            fetch_weights(name, progress=report, say=out.info)


# ---------------------------------------------------------------------------- how a verb ends


def end(facts: Iterable[str | None], then: Iterable[tuple[str, str]] = ()) -> None:
    """Prints on stderr `done: …` and `next: …`, a command a line with its purpose where the line has room."""
    if out.is_quiet() or out.is_json():
        return
    if words := ", ".join(filter(None, facts)):
        out.info(f"{out.style('done:', 'cyan')} {words}")
    steps = list(then)
    room, longest = out.width(), max((len(command) for command, _ in steps), default=0)
    for i, (command, purpose) in enumerate(steps):
        head = out.style("next:", "cyan") + " " if not i else " " * LABEL
        fits = purpose and LABEL + longest + 2 + len(purpose) <= room
        gap = " " * (longest - len(command) + 2)
        out.line(head + out.style(command, "bold") + (gap + purpose if fits else ""))


def took(since: float) -> str:
    """The time since `time.monotonic()` was `since`, as people read it."""
    return duration(time.monotonic() - since)


def bytes_of(path: Path) -> str:
    """The size of a file, or of all files in a folder, as people read it."""
    files = path.rglob("*") if path.is_dir() else [path]
    return size(sum(file.lstat().st_size for file in files if file.is_file()))


def name_of(run: Run) -> str:
    """The shortest word by which a command means a run of the store."""
    from gzcli.store.runs import short_names

    return quoted(run.alias or short_names([run])[run.id])


def quoted(text: object) -> str:
    """A text as a shell takes it for one word."""
    return shlex.quote(str(text))


def new_set(images: int | None, words: str, began: float, *, show: bool) -> None:
    """The end of a verb that makes a set ready, of so many images, None before they are packed. `words`: what
    `--data` takes; `show`: whether it can be drawn."""
    drawn = [(f"gz data show {words}", "its classes, and a sheet of its pictures")] if show else []
    trained = (f"gz train {FIRST} --data {words}", "a model of it")
    end([counted(images, "image") if images else None, took(began)], [*drawn, trained])
