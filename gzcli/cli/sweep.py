"""`gz sweep`: trains several settings of a model on one budget, and ranks them by validation."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Annotated, Any

from gzcli.cli import options as opt
from gzcli.cli import out
from gzcli.cli.jobs import end, name_of, quoted, took
from gzcli.cli.options import argument, option
from gzcli.core.units import about, duration, figure, seconds_of
from gzcli.store.runs import by_name

_What = Annotated[str, argument("MODEL|RECIPE", "A model, or a recipe file.", opt.a_model)]
_BUDGET_HELP = "Total training time: CPU time on CPUs, wall-clock time on GPUs."
_Budget = Annotated[str, option("--budget 20m|1h", _BUDGET_HELP)]
_Trials = Annotated[
    int | None, option("--trials N", "Number of settings drawn from ranges. Default: 8.", min=2)
]


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
    dry_run: opt.DryRun = False,
) -> None:
    """Tune a model's settings within a time budget, by validation.

    `--set optim.lr=1e-3,3e-3` tries these values; several keys give all combinations. `--set
    optim.lr=1e-4..1e-2` draws values from a range, log-uniformly. Re-running the command resumes a sweep.
    """
    from gzcli.league.sweep import judge_cost, run_sweep, sweep_of

    out.configure(lenient=True)  # a lost reader never stops a training
    flags = {"scale": scale, "launch.gpus": opt.parse_gpus(gpus), "launch.cpu": cpu or None, "seed": seed}
    seconds = seconds_of(budget)
    how: dict[str, Any] = {"budget": seconds, "trials": trials, "flags": flags, "dry_run": dry_run}
    with out.progress("packing", unit="images") as report:
        plan = sweep_of(what, data, sets or (), progress=report, **how)
    rounds = f"{' → '.join(map(str, plan.rungs))} trials, {duration(plan.first)} each in the first round"
    if dry_run:
        out.table(("trial", "setting"), [(i, " ".join(setting)) for i, setting in enumerate(plan.settings)])
        out.text(f"rounds  {rounds}")
        extra = judge_cost(plan).seconds()
        time = f"{duration(seconds)} of training"
        if extra:
            time += f", about {about(extra)} to train a judge network of the data set"
            time += f"; total: about {about(seconds + extra)}"
        for line in out.wrapped_text(time, "time    "):
            out.text(line)
        shown = {"settings": plan.settings, "rounds": plan.rungs, "first": plan.first}
        return out.data(shown | {"judges_seconds": extra})
    out.info(rounds)
    result = run_sweep(plan, out.info)
    rows = [
        (" ".join(row.setting), row.steps, "-" if row.value is None else figure(row.value), row.state)
        for row in result.trials
    ]
    out.table(("setting", "steps", f"val {result.metric}", ""), rows)
    out.info(f"plot: {result.picture}")
    best = [word for text in (*result.fixed, *result.best.setting) for word in ("--set", text)]
    of_scale = ["--scale", scale] if scale else []
    command = " ".join(map(quoted, ["gz", "train", what, "--data", plan.data, *of_scale, *best]))
    lost = Counter(row.state for row in result.trials)
    facts = [f"{lost[state]} of {plan.trials} {state}" for state in ("diverged", "failed") if lost[state]]
    run = by_name(result.best.run) if result.best.run else None
    sample = [(f"gz sample {name_of(run)}", "draw images with the best trial")] if run else []
    end([*facts, took()], [(command, "train the best at full length"), *sample])
    out.data(asdict(result) | {"command": command})
