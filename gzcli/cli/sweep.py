"""`gz sweep`: settings of a model on one budget, of which the better half goes on again and again."""

from __future__ import annotations

from typing import Annotated

from gzcli.cli import options as opt
from gzcli.cli import out
from gzcli.cli.bench import seconds_of
from gzcli.cli.jobs import end, quoted, took
from gzcli.cli.options import a_model, argument, option
from gzcli.core.errors import Interrupted, UsageError
from gzcli.core.units import duration, figure
from gzcli.store import files
from gzcli.store.paths import user_dir

_What = Annotated[str, argument("MODEL|RECIPE", "A model, or a recipe file.", a_model)]
_BUDGET_HELP = "Time of all trainings together: of work of the cores, on GPUs of the clock."
_Budget = Annotated[str, option("--budget 20m|1h", _BUDGET_HELP)]
_Trials = Annotated[int | None, option("--trials N", "Settings that are drawn of a range; usually 8.", min=2)]


def sweep(
    what: _What,
    budget: _Budget,
    data: opt.Data = None,
    sets: opt.Sets = None,
    trials: _Trials = None,
    scale: opt.Scale = None,
    seed: opt.SeedOrZero = 0,
    gpus: opt.Gpus = None,
    cpu: opt.Cpu = False,
) -> None:
    """Try settings of a model on one budget, and find the best by validation.

    `--set optim.lr=1e-3,3e-3` tries values, of several keys all combinations; `--set optim.lr=1e-4..1e-2`
    draws from a range, evenly in the logarithm. The same command goes on with a sweep that was stopped.
    """
    from gzcli.judge.league import SHORTEST
    from gzcli.judge.sweep import play, sweep_of
    from gzcli.launch.plan import ask

    out.configure(lenient=True)  # a lost reader never stops a training
    flags = {"scale": scale, "launch.gpus": opt.parse_gpus(gpus), "launch.cpu": cpu or None, "seed": seed}
    recipe = ask(what, data, (), flags).recipe
    if len(recipe.parts) > 1:
        raise UsageError(f"`{what}` is trained in stages, and a sweep is of one training")
    terms = {"model": what, "data": data or recipe.data.name, "flags": flags, "budget": seconds_of(budget)}
    plan = sweep_of(sets or (), trials, **terms)
    if plan.first < SHORTEST:
        message = f"`--budget {budget}` leaves each of {plan.trials} trials {plan.first:.1g} s at first"
        raise UsageError(message, hint=f"it takes {SHORTEST:g} s: a larger budget, or fewer values")
    out.info(f"{' → '.join(map(str, plan.rungs))} trials, of {duration(plan.first)} each at first")
    folder = user_dir("sweeps") / plan.name
    with files.lock(folder / ".lock", wait=False) as locked:
        if not locked:
            raise UsageError("another `gz` does this sweep", hint=f"it writes into `{folder}`")
        try:
            result = play(plan, folder, out.info)
        except Interrupted as error:
            error.hint = "the same command goes on"
            raise
    rows = [
        (" ".join(row["setting"]), row.get("steps"), figure(row["value"]), row["state"])
        for row in result["trials"]
    ]
    out.table(("setting", "steps", f"val {result['metric']}", ""), rows)
    out.info(f"picture: {result['picture']}")
    best = [word for text in (*plan.fixed, *result["trials"][0]["setting"]) for word in ("--set", text)]
    command = " ".join(map(quoted, ["gz", "train", what, "--data", plan.data, *best]))
    end([took()], [(command, "the best at full length")])
    out.data(result | {"command": command})
