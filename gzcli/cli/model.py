"""`gz model`: a model of your own, from a first file to one that keeps the contract of the zoo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gzcli.cli import out
from gzcli.cli.options import Json, Quiet
from gzcli.errors import UsageError, canonical

app = typer.Typer(help="Write a model of your own, and check it.")

_Name = Annotated[str, typer.Argument(metavar="NAME", help="What the model will be called, as `maf`.")]
_File = Annotated[Path, typer.Argument(metavar="FILE", help="The model's file, as `./maf.py`.")]
_Data = Annotated[str, typer.Option("--data", metavar="NAME|PATH", help="The set that it is checked on.")]


@app.command()
def new(
    name: _Name,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write NAME.py: a whole model, of 60 lines, that trains and passes `gz model check`."""
    from importlib.util import find_spec

    from gzcli.models.catalog import cards
    from gzcli.store import files, outside

    stem = canonical(name.removesuffix(".py"))
    if not outside.can_be_named(stem):
        raise UsageError(f"`{name}` cannot be a model's name", hint="use lower-case letters, digits and `_`")
    if stem in cards():
        raise UsageError(f"`{name}` is a model of gz already", hint=f"another name, as `{stem}2`")
    target = Path(f"{stem}.py")
    if target.exists() and not force:
        raise UsageError(f"`{target}` is there already", hint="`--force` writes over it")
    spec = find_spec("gzcli.testing")
    source = (
        Path(spec.submodule_search_locations[0]) / "template.py"
        if spec and spec.submodule_search_locations
        else None
    )
    if source is None:
        raise UsageError("the template of a model is not installed", hint="install gz again")
    text = source.read_text(encoding="utf-8")
    title = "".join(part.capitalize() for part in stem.split("_"))
    files.write_atomic(target, text.replace("Template", title).replace("template", stem))
    out.text(str(target))
    out.hint(f"`gz model check ./{target}`, then `gz train ./{target}`")
    out.data({"path": target})


@app.command()
def check(file: _File, data: _Data = "digits", json: Json = False, quiet: Quiet = False) -> None:
    """Hold a model's file against the contract of the zoo, a minute or less for a small model.

    It is trained, sampled, saved and scored on the CPU with the defaults of its signature.
    """
    from gzcli.store import outside

    name = outside.add(file)
    results: list[dict[str, str | None]] = []
    if wrong := _mistakes(file.expanduser().absolute()):
        results = [{"check": "file", "fault": text} for text in wrong]
    else:
        results = _contract(name, data)
    faults = [row for row in results if row["fault"]]
    for row in results:
        out.text(f"{'fault' if row['fault'] else 'ok':<6} {(row['check'] or '').replace('_', ' ')}")
        if row["fault"]:
            out.text(f"       {row['fault']}")
    out.data({"model": name, "checks": results})
    if faults:
        count = f"{len(faults)} {'fault' if len(faults) == 1 else 'faults'}"
        raise UsageError(
            f"`{file}` does not keep the contract: {count}", hint="`gz model new NAME` writes one that does"
        )


def _mistakes(file: Path) -> list[str]:
    from gzcli.recipe.mistakes import mistakes

    return mistakes(file)


def _contract(name: str, data: str) -> list[dict[str, str | None]]:
    """The result of each check: its name and, where it fails, what is wrong."""
    from gzcli.recipe.resolve import resolve
    from gzcli.testing import CHECKS, Case, fault_of

    part = resolve(name, data=data).parts[0]
    case = Case(name, part.options, lr=max(part.optim.lr, 1e-3), data=part.data.name, levels=part.data.levels)
    results: list[dict[str, str | None]] = []
    with out.progress("checks", unit="checks") as report:
        for i, (title, check) in enumerate(CHECKS.items()):
            results.append({"check": title, "fault": fault_of(check, case)})
            report(i + 1, len(CHECKS))
    return results
