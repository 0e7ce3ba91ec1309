"""`gz which`: a race of models on a data set, in rounds that are leagues."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from gzcli.cli import options as opt
from gzcli.cli import out
from gzcli.cli.jobs import end, name_of, quoted, took
from gzcli.cli.league import LONG_LEAGUE_SECONDS, in_parallel
from gzcli.cli.options import a_model, a_set, option
from gzcli.core.errors import UsageError
from gzcli.core.sections import LaunchSection
from gzcli.core.units import about, counted, duration
from gzcli.metrics import standings
from gzcli.recipe.suggest import NEEDS

if TYPE_CHECKING:
    from gzcli.league.which import Outcome, Race

USUAL_RACE = "20m"
_RACE_HELP = "Total training time: CPU time on CPUs, wall-clock time on GPUs. Required."
_RaceBudget = Annotated[str | None, option("--budget 20m|1h", _RACE_HELP)]
_NEED_HELP = f"Capabilities that the model needs: {', '.join(NEEDS)}."
_Need = Annotated[str | None, option("--need A[,B…]", _NEED_HELP, complete=NEEDS)]
_RACED_HELP = "Models to race. Default: a shortlist from the shipped leagues."
_Raced = Annotated[str | None, option("--models M[,M…]", _RACED_HELP, complete=a_model)]
_RACE_DATA_HELP = "The data set, or your own images."
_RaceJobs = Annotated[int | None, option("--jobs N", opt.JOBS_HELP, min=1)]
_RaceData = Annotated[str, option("--data NAME|PATH", _RACE_DATA_HELP, complete=a_set)]
_Dry = Annotated[bool, option("--dry-run", "Print the rounds without training.")]


def which(
    data: _RaceData,
    budget: _RaceBudget = None,
    need: _Need = None,
    models: _Raced = None,
    at_once: _RaceJobs = None,
    seed: opt.SeedOrZero = 0,
    gpus: opt.Gpus = None,
    cpu: opt.Cpu = False,
    dry_run: _Dry = False,
    yes: opt.Yes = False,
) -> None:
    """Find the model that suits a data set, by racing models on it.

    The models train for equal times, and gz compares their samples with validation images. The better half
    trains for twice as long, until two are left. Re-running the command resumes a race.
    """
    from gzcli.cli.plan import start_or_not
    from gzcli.league import which as race

    out.configure(lenient=True)  # a lost reader does not end what takes hours
    if budget is None:
        hint = f"gz which --data {quoted(data)} --budget {USUAL_RACE}"
        raise UsageError("missing option `--budget`", hint=hint)
    launch = LaunchSection(opt.parse_gpus(gpus), cpu)
    how: dict[str, Any] = {"seed": seed, "launch": launch, "at_once": at_once}
    plan = race.ask(data, budget, opt.split(models), opt.split(need), **how)
    parallel = plan.parallel(at_once)
    say = out.text if dry_run else out.info
    for text in in_words(plan, parallel):
        say(text)
    if dry_run:
        facts = {
            "data": plan.terms.data,
            "budget": plan.budget,
            "evaluation": plan.evaluation,
            **as_json(plan),
        }
        return out.data(facts | {"parallel": parallel, "seconds": plan.seconds(parallel)})
    ways = "to save time, use fewer `--models`, or a smaller `--budget`"
    start_or_not(plan.seconds(parallel), most=LONG_LEAGUE_SECONDS, span="a day", ways=ways, yes=yes)
    mode = "quiet" if out.is_quiet() else "human"
    show_race(race.run(plan, at_once=at_once, say=out.info, mode=mode))


def in_words(race: Race, parallel: int) -> list[str]:
    """The models and the rounds of a race, in words."""
    rounds = " → ".join(f"{n} × {duration(seconds)}" for n, seconds in race.rounds)
    return [
        *out.wrapped_text(" ".join(race.models), f"{counted(len(race.models), 'model')}: "),
        f"rounds: {rounds}",
        f"training: about {about(race.budget)}; sampling and evaluation: up to {about(race.evaluation)}",
        f"total: up to {about(race.seconds(parallel))}{in_parallel(parallel)}",
    ]


def as_json(race: Race) -> dict[str, Any]:
    return {"models": race.models, "rounds": [{"models": n, "seconds": s} for n, s in race.rounds]}


def race_table(outcome: Outcome) -> None:
    """Prints the result of the longest training of each model, the best first."""
    judges, of_model = outcome.rounds[-1]["judges"], dict[str, tuple[int, dict[str, standings.Excess]]]()
    for i, result in enumerate(outcome.rounds):
        of_model |= {row["model"]: (i, standings.excesses_of(row, judges)) for row in result["summary"]}
    lines = []
    for name in outcome.order:
        i, excesses = of_model[name]
        cells = [excesses[key].words if key in excesses else None for key in judges]
        lines.append([name, i + 1, *cells, duration(outcome.race.rounds[i][1])])
    out.table(("model", "round", *judges, "trained"), lines)
    ranked = "; the best model has the lowest geometric mean" if len(judges) > 1 else ""
    out.info(f"{', '.join(judges)}: excess over real images, lower is better{ranked}")


def show_race(outcome: Outcome) -> None:
    """Prints the outcome of a race, and the command that continues the winner's training."""
    race_table(outcome)
    if outcome.ties:
        out.info(f"no judge distinguishes {' and '.join(outcome.ties)}")
    if outcome.agreement is not None:
        out.info(f"rank correlation between the first two rounds: {outcome.agreement:.2f}")
    if outcome.order[0] != outcome.favourite:
        out.info(
            f"`{outcome.favourite}` led the first round but did not win: short trainings mislead on this "
            "data set, so use a larger `--budget`"
        )
    if outcome.dropped_alike:
        dropped = " and ".join(outcome.dropped_alike)
        out.info(
            f"the first round may have dropped {dropped} by chance: no judge saw a difference from a model "
            "that stayed; a larger `--budget` helps"
        )
    winner, steps = outcome.winner, outcome.winner.status()["step"]
    resume = f"gz train {quoted(name_of(winner))} --resume --steps {2 * steps}"
    data = quoted(outcome.race.terms.data)
    whole = f"gz train {outcome.order[0]} --data {data}"
    end(
        [f"best: {outcome.order[0]}", took()],
        [(whole, "train it at full length"), (resume, "continue its training")],
    )
    out.data(
        {
            "data": outcome.race.terms.data,
            "budget": outcome.race.budget,
            **as_json(outcome.race),
            "order": outcome.order,
            "judges": outcome.rounds[-1]["judges"],
            "ties": outcome.ties,
            "agreement": outcome.agreement,
            "run": winner.id,
            "command": resume,
            "rows": [result["summary"] for result in outcome.rounds],
        }
    )
