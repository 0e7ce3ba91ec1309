"""`gz model`: a model of your own, from a first file to one that meets the contract of the zoo."""

from __future__ import annotations

import ast
import keyword
from importlib.resources import files
from pathlib import Path
from typing import Annotated

from gzcli.cli import options as opt
from gzcli.cli import out
from gzcli.cli.jobs import end, quoted, took
from gzcli.cli.list import group, list_models
from gzcli.cli.options import argument, option
from gzcli.core import streams
from gzcli.core.errors import UsageError, canonical
from gzcli.core.hints import Option, advice, gz
from gzcli.core.units import counted
from gzcli.store import model_files
from gzcli.store.files import write_atomic

app = group("model", list_models)

_Name = Annotated[str, argument("NAME", "Name of the model, such as `maf`.")]
_File = Annotated[Path, argument("FILE", "The model file, such as `./maf.py`.")]
_Data = Annotated[str, option("--data NAME|PATH", "The data set used for the check.")]


@app.command()
def new(name: _Name, force: opt.Force = False) -> None:
    """Write NAME.py: a complete model of 60 lines that trains and passes `gz model check`."""
    from gzcli.models.catalog import families

    stem = canonical(name.removesuffix(".py"))
    if not model_files.can_be_named(stem):
        raise UsageError(
            f"`{name}` is not a valid name for a model", hint="use lower-case letters, digits and `_`"
        )
    if stem in families():
        raise UsageError(f"gz already has a model `{name}`", hint=f"choose another name, such as `{stem}2`")
    title = "".join(part.capitalize() for part in stem.split("_"))
    # not imported, because that would load torch
    template = (files("gzcli") / "testing" / "template.py").read_text(encoding="utf-8")
    imports = [node for node in ast.walk(ast.parse(template)) if isinstance(node, ast.alias)]
    if title in {*keyword.kwlist, *(node.asname or node.name for node in imports)}:
        hint = f"the class name `{title}` is already used; choose another name, such as `my_{stem}`"
        raise UsageError(f"`{name}` is not a valid name for a model", hint=hint)
    target = Path(f"{stem}.py")
    if target.exists() and not force:
        raise UsageError(f"`{target}` already exists", hint=advice("overwrite it with {}", Option("force")))
    write_atomic(target, template.replace("Template", title).replace("template", stem))
    out.text(str(target))
    check = (f"gz model check ./{target}", "check it against the model contract")
    train = (f"gz train ./{target}", "train it on digits")
    end([f"{len(template.splitlines())} lines"], [check, train])
    out.data({"path": target})


@app.command()
def check(file: _File, data: _Data = "digits") -> None:
    """Check a model file against the contract of gz. A small model takes less than a minute.

    gz trains, samples, saves and scores the model on the CPU, with its default options.
    """
    from gzcli.recipe.files import mistakes

    name = model_files.add(file)
    model_files.trust(file.expanduser())
    wrong = mistakes(file.expanduser().absolute())
    results = [("file", text) for text in wrong] or _contract(name, data)
    for title, fault in results:
        out.text(f"{'fault' if fault else 'ok':<6} {title.replace('_', ' ')}")
        if fault:
            out.text(f"       {fault}")
    out.data({"model": name, "checks": [{"check": title, "fault": fault} for title, fault in results]})
    if faults := sum(bool(fault) for _, fault in results):
        message = f"`{file}` violates the contract: {counted(faults, 'fault')}"
        raise UsageError(message, hint=advice("start from a file that passes: {}", gz("model new", "NAME")))
    more = (f"gz train {quoted(file)} --data mnist", "train it on another data set")
    end([f"all {len(results)} checks passed", took()], [(f"gz train {quoted(file)}", ""), more])


def _contract(name: str, data: str) -> list[tuple[str, str | None]]:
    """The checks, each with the fault that it found; None if it passed."""
    from gzcli.recipe.resolve import resolve

    with streams.spinner("loading torch", shown=out.mode() == "human"):
        from gzcli.testing import CHECKS, Case, fault_of

    part = resolve(name, data=data).parts[0]
    case = Case(name, part.options, lr=max(part.optim.lr, 1e-3), data=part.data.name, levels=part.data.levels)
    results = []
    with out.progress("checks", unit="checks") as report:
        for i, (title, check) in enumerate(CHECKS.items()):
            results.append((title, fault_of(check, case)))
            report(i + 1, len(CHECKS))
    return results
