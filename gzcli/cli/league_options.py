"""The options of `gz bench` that make a league of it, and what they ask for together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from gzcli.cli.options import choose, complete_models, split
from gzcli.core.errors import UsageError

if TYPE_CHECKING:
    from gzcli.core.jobs import BenchJob
    from gzcli.judge.league import Terms

_PANEL = "Training what is compared"
_CURVES = ("steps", "time")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}

TrainMissing = Annotated[
    bool,
    typer.Option("--train-missing", help="Train each model for an equal time first.", rich_help_panel=_PANEL),
]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="8m|1h",
        help="Time of each training: of work of the cores, on GPUs of the clock.",
        rich_help_panel=_PANEL,
    ),
]
LeagueModels = Annotated[
    str | None,
    typer.Option(
        "--models",
        metavar="all|M[,M…]",
        help="Which; without it all that fit.",
        rich_help_panel=_PANEL,
        autocompletion=complete_models,
    ),
]
Seeds = Annotated[
    int,
    typer.Option(
        "--seeds", metavar="K", min=1, help="Trainings of each, from `--seed` on.", rich_help_panel=_PANEL
    ),
]
Calls = Annotated[
    int,
    typer.Option(
        "--calls",
        metavar="N",
        min=0,
        help="Compare samplers at N network calls an image, too; 0: not.",
        rich_help_panel=_PANEL,
    ),
]
Curve = Annotated[
    str | None,
    typer.Option(
        "--curve",
        metavar="steps|time",
        help="Draw quality against a sampler's steps, or the training's time.",
        rich_help_panel=_PANEL,
    ),
]


def terms_of(
    job: BenchJob,
    models: str | Sequence[str] | None,
    seeds: int,
    calls: int,
    curve: str | None,
    budget: str | None,
    *,
    train_missing: bool,
) -> Terms:
    """What the options ask for.

    Raises UsageError where the options do not go together, and for a wrong one.
    """
    from gzcli.data.sets.names import locate
    from gzcli.judge.league import Terms

    if not train_missing:
        raise UsageError(
            "`--budget`, `--models` and `--curve` say what is trained",
            hint="gz bench --train-missing --budget 8m --data mnist",
        )
    if not job.data:
        raise UsageError(
            "`--train-missing` needs `--data`, the set to train on",
            hint=f"gz bench --train-missing --budget {budget or '8m'} --data mnist",
        )
    seconds = parse_budget(budget)
    job = replace(job, data=locate(job.data).reference)
    names = split(models) if isinstance(models, str) else list(models or ())
    curves = tuple(choose("curve", name, _CURVES) for name in split(curve))
    chosen = None if not names or names == ["all"] else tuple(dict.fromkeys(names))
    wanted = tuple(range(job.seed, job.seed + seeds))
    return Terms(job.data, seconds, chosen, wanted, job, calls, curves)


def parse_budget(text: str | None) -> float:
    """The seconds of a budget such as `8m`, `1.5h` or `90s`. Raises UsageError for anything else."""
    from gzcli.judge.league import SHORTEST

    hint = "a number with its unit, at least 3s: `--budget 8m`, `--budget 1.5h`"
    if text is None:
        raise UsageError("`--train-missing` needs `--budget`, the time of each training", hint=hint)
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)([smhd])", text.strip())
    if not found:
        raise UsageError(f"`--budget {text}` is no time", hint=hint)
    seconds = float(found[1]) * _UNITS[found[2]]
    if seconds < SHORTEST:
        raise UsageError(f"`--budget {text}` is too short to train anything", hint=hint)
    return seconds
