"""What `gz sample`, `gz ood` and `gz bench` share: a job folder, its launch, its result."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gzcli.cli import out
from gzcli.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from gzcli.models.signatures import Param
    from gzcli.recipe.schema import Rule
    from gzcli.store.runs import Run


def do_job(
    folder: Path,
    job: Mapping[str, Any],
    *,
    gpus: str | None,
    cpu: bool,
    processes: int | None = None,
) -> dict[str, Any]:
    """Makes the folder the job's own, writes `job.json`, runs the engine on it, returns its `result.json`.

    The folder is `stamp`ed, or what the user names with `--out`: raises UsageError where that is not empty.
    processes: of a CPU.
    """
    from gzcli import launch
    from gzcli.cli.options import parse_gpus
    from gzcli.recipe.parts import LaunchSection
    from gzcli.store import files, owned

    section: dict[str, Any] = {"gpus": parse_gpus(gpus), "cpu": cpu, "processes": processes}
    plan = launch.plan(LaunchSection(**section), every_gpu=False)
    owned.claim(folder)
    files.write_json(folder / "job.json", {**job, "launch": section | {"threads": plan.threads}})
    launch.run(folder, plan, launcher=False, mode="quiet" if out.is_json() or out.is_quiet() else "human")
    return files.read_json(folder / "result.json")


def reference(what: str) -> str:
    """A data set as a job names it: its proper name, or an absolute path. Raises UsageError, MissingError."""
    from gzcli.data.names import locate

    found = locate(what)
    return found.name or str(found.path)


def stamp() -> str:
    """The time, and what tells apart two jobs of one second."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"


def tell_run(run: Run, ref: str, *, data: str | None = None) -> None:
    """`run: …` on stderr; and what of it is not plain: it is unfinished, or was taken for a model's name
    though it is short or not the newest. `data` as `runs.find` got it."""
    from gzcli.store import runs

    out.info(f"run: {run.id}")
    if runs.by_name(ref) is not None:
        weights = run.weights
        if run.state != "finished" and weights and weights.parent.parent.name == "checkpoints":
            step = int(weights.parent.name)
            out.info(f"note: it is {run.state}; its newest checkpoint is taken, of step {step:,}")
        return
    if short := run.shortfalls:
        on = f" on `{data}`" if data else ""
        none = f"no finished run of `{run.model}`{on} is whole"
        out.info(f"note: {none}, the newest is taken: {', '.join(short)}")
        return
    finished = [other for other in runs.all_runs(model=run.model, data=data) if other.state == "finished"]
    for newer in finished[: finished.index(run)]:
        out.info(f"note: passed over `{newer.id}`, which is newer: {', '.join(newer.shortfalls)}")


OWN_OPTIONS = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
}  # a verb's, that takes those of the model's methods


def as_options(words: list[str], section: str) -> list[str]:
    """The words with `--set sample.steps=15`, as a recipe has it, for `--steps=15`. Raises UsageError for
    another section."""
    found, rest = [], iter(words)
    for word in rest:
        if word == "--set" or word.startswith("--set="):
            given = next(rest, "") if word == "--set" else word.removeprefix("--set=")
            key, equals, value = given.partition("=")
            if not equals or not key.startswith(f"{section}."):
                message = f"`--set {given}`: of a trained model only `{section}.KEY=VALUE` can be changed"
                raise UsageError(message, hint=f"--set {section}.steps=20")
            word = f"--{key.removeprefix(f'{section}.')}={value}"
        found.append(word)
    return found


def method_options(
    words: list[str], params: Mapping[str, Param | Rule], what: str, section: str
) -> dict[str, Any]:
    """`--rows 14 --no-clip --sampler=ddim` as the typed keywords of a method whose signature is `params`;
    `section` of a recipe has them too.

    Raises UsageError for an unknown option, a missing or a wrong value.
    """
    from gzcli.recipe.load import scalar
    from gzcli.recipe.schema import check_value

    values: dict[str, Any] = {}
    words = as_options(words, section)
    while words:
        word = words.pop(0)
        name, equals, text = word.lstrip("-").partition("=")
        name = name.replace("-", "_")
        negated = name.removeprefix("no_") if name not in params else None
        if not word.startswith("--") or (name not in params and negated not in params):
            options = [f"--{p.replace('_', '-')}" for p in params]
            takes = f"{what} takes: {' '.join(options)}" if options else f"{what} takes no options of its own"
            raise UsageError(f"no such option `{word}`", hint=did_you_mean(word, options) or takes)
        if name not in params:
            values[negated] = False
        elif params[name].annotation == "bool" and not equals and (not words or words[0].startswith("--")):
            values[name] = True
        elif not equals and not words:
            raise UsageError(f"`--{name}` needs a value ({params[name].annotation})")
        else:
            text = text if equals else words.pop(0)
            value = text if params[name].annotation == "str" else scalar(text)  # `--negative 3` is a text
            values[name] = check_value(value, params[name].annotation, f"--{name.replace('_', '-')}")
    return values
