"""`gz which`: which model suits a set of images, by a race on the set itself.

The ranking on one set need not hold on another, so several models compete. The shortlist contains the model
that gz would suggest without a race. It is the smallest such group one of which is nearly the best on every
shipped league, with models of further families until there are four. They are trained for equal times
and judged on validation images. The better half is trained for twice as long, until two remain (successive
halving, Jamieson and Talwalkar 2016, arXiv:1502.07943). Each round is a league, so the same call resumes an
interrupted race.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from typing import Any

from gzcli.core import measured
from gzcli.core.errors import MissingError, UsageError, choose
from gzcli.core.hints import Option, advice
from gzcli.core.sections import LaunchSection
from gzcli.core.types import Say, silent
from gzcli.core.units import duration, seconds_of
from gzcli.data.packs.facts import Facts
from gzcli.data.packs.open import facts_of, peek
from gzcli.data.sets.registry import locate
from gzcli.launch import cost, launcher
from gzcli.launch import plan as planning
from gzcli.league.league import MIN_ENTRY_SECONDS, SAMPLE_SOURCES, Terms, beside_others, least_budget
from gzcli.league.loop import League, run_league
from gzcli.metrics import networks, standings
from gzcli.metrics.selection import choose as choose_metrics
from gzcli.models import catalog
from gzcli.recipe.suggest import NEEDS, suggest
from gzcli.recipe.yaml import check_text
from gzcli.store.jobs import BenchJob
from gzcli.store.runs import Run, by_name

REGRET = 1.1  # largest excess of the shortlist on a shipped league, as a multiple of the least
SHORTLIST_MODELS = 4  # models of the shortlist, if that many fit
LAST_ROUND_SAMPLES = (
    1000  # samples compared for each model of the last round; earlier rounds take proportionally fewer
)
MIN_SLOW_SAMPLES = 100  # fewest samples, for a model that draws for longer than `SHARE` of its training
SLOW_SHARE = 0.1
LEAGUE_JUDGES = ("fd", standings.SECOND_METRIC)  # judges of the shipped leagues
PUBLISHED = "kid_lite"  # judge of colour images: it needs no training on the set, which may be small

Excesses = Mapping[str, Mapping[str, float]]  # league and judge → model → excess over real images


@dataclass(frozen=True)
class Race:
    """Models that compete for a budget."""

    models: tuple[str, ...]
    terms: Terms  # the league of its rounds, with their judges, except for models and budget
    budget: float  # seconds of training of all rounds together

    @property
    def rounds(self) -> list[tuple[int, float]]:
        """The number of models in each round, and the seconds of each training."""
        sizes = [len(self.models)]
        while sizes[-1] > 2:
            sizes.append(-(-sizes[-1] // 2))
        first = self.budget / sum(n * 2**i for i, n in enumerate(sizes))
        return [(n, first * 2**i) for i, n in enumerate(sizes)]

    def samples(self, seconds: float) -> int:
        """The number of samples compared for each model of a round with trainings of so many seconds."""
        return max(MIN_SLOW_SAMPLES, round(LAST_ROUND_SAMPLES * seconds / self.rounds[-1][1]))

    @property
    def evaluation(self) -> float:
        """The most seconds for sampling and evaluation, and for training the judges."""
        gpus = launcher.plan(self.terms.job.launch, every_gpu=True).gpus
        data = locate(self.terms.data)
        judges = cost.judge_networks(self.terms.job.metrics or (), data, peek(data))
        rounds = (
            n * (cost.START + cost.evaluation(self.samples(seconds), gpus)) for n, seconds in self.rounds
        )
        return sum(sum(rounds, judges).why.values(), SLOW_SHARE * self.budget)

    def seconds(self, parallel: int) -> float:
        """The most seconds of the race with so many trainings in parallel."""
        return self.evaluation + sum(-(-n // parallel) * seconds for n, seconds in self.rounds)

    def parallel(self, at_once: int | None) -> int:
        """The number of trainings that run in parallel if so many are requested."""
        return launcher.parallel(min(at_once or 1, len(self.models)), gpus=bool(self.terms.job.launch.gpus))


@dataclass(frozen=True)
class Outcome:
    """The outcome of a finished race.

    rounds: the JSON of each round's league.
    order: all models, the best first.
    agreement: Spearman's rank correlation of the first two rounds; None for fewer than three models in both.
    """

    race: Race
    rounds: tuple[dict[str, Any], ...]
    order: tuple[str, ...]
    agreement: float | None

    @property
    def favourite(self) -> str:
        """The best model of the first round."""
        return order(self.rounds[0])[0]

    @property
    def ties(self) -> list[str]:
        """The best model and the models of the last round that no judge distinguishes from it, if any."""
        last = self.rounds[-1]
        of_model = {row["model"]: judged(last, row) for row in last["summary"]}
        best = of_model[self.order[0]]
        alike = [
            name
            for name in order(last)
            if of_model[name] and not any(best[key].differs(excess) for key, excess in of_model[name].items())
        ]
        return alike if len(alike) > 1 else []

    @property
    def dropped_alike(self) -> list[str]:
        """The models that did not pass the first round, though no judge distinguishes them from one that
        did."""
        first = self.rounds[0]
        later = {row["model"] for result in self.rounds[1:] for row in result["summary"]}
        of_model = {row["model"]: judged(first, row) for row in first["summary"]}
        passed = [of_model[name] for name in of_model if name in later]

        def is_alike(one: Mapping[str, standings.Excess], two: Mapping[str, standings.Excess]) -> bool:
            common = one.keys() & two.keys()
            return bool(common) and not any(one[key].differs(two[key]) for key in common)

        return [
            name
            for name, excesses in of_model.items()
            if name not in later and any(is_alike(one, excesses) for one in passed)
        ]

    @property
    def winner(self) -> Run:
        """The longest training of the best model."""
        row = next(row for row in self.rounds[-1]["rows"] if row["model"] == self.order[0])
        if (run := by_name(row["run"])) is None:
            raise MissingError(f"the run `{row['run']}` of the best model was removed")
        return run


# ---------------------------------------------------------------------------- who takes part


def ask(
    data: str,
    budget: str,
    models: Iterable[str] = (),
    needs: Iterable[str] = (),
    *,
    seed: int = 0,
    launch: LaunchSection,
    at_once: int | None = None,
) -> Race:
    """The race of these models, or of a shortlist, on a data set.

    budget: time of all trainings together, such as `20m`.
    needs: capabilities of every model, keys of NEEDS.
    at_once: number of parallel trainings, each on one core or GPU; None: one at a time, on all of them.
    """
    capabilities = [choose("need", word, NEEDS) for word in needs]
    launch = beside_others(launch) if at_once else launch
    name = locate(data).reference
    job = BenchJob((), name, None, LAST_ROUND_SAMPLES, seed=seed, launch=launch, split="val")
    return race_of(Terms(name, seconds_of(budget), tuple(models) or None, (seed,), job, 0), capabilities)


def race_of(terms: Terms, needs: Sequence[str]) -> Race:
    """The race of the models in the terms. By default, these are the shortlist and gz's suggestion. Raises
    UsageError if no model fits the set, if the judges need more images, or if the budget is too small."""
    check_text(terms.data)
    if terms.models:
        for name in terms.models:
            card = planning.ask(name, terms.data, (), {}).recipe.card
            if lacking := [need for need in needs if not meets(card, need)]:
                raise UsageError(f"`{name}` does not meet `--need {lacking[0]}`", hint="omit one of them")
        models = terms.models
    else:
        models = candidates(terms.data, needs)
    if not models:
        hint = advice("ask for fewer capabilities, or choose models with {}", Option("models"))
        raise UsageError(f"no model of the shipped leagues fits `{terms.data}`", hint=hint)
    data = locate(terms.data)
    judges = metrics_of(facts_of(data))
    choose_metrics(judges, data, terms.job.split)
    race = Race(models, replace(terms, job=replace(terms.job, metrics=judges)), terms.budget)
    if (least := race.rounds[0][1]) < MIN_ENTRY_SECONDS:
        message = f"the budget gives each of {len(models)} models only {least:.1g} s in the first round"
        raise UsageError(
            message, hint=advice("use {} or more", Option("budget", least_budget(terms.budget, least)))
        )
    return race


def metrics_of(facts: Facts | None) -> tuple[str, ...]:
    """The metrics of a race: those of its judges. The published judge decides alone on few images, because
    judges that were trained on few detect neither blurs nor checkerboards."""
    if facts and networks.published_judges(facts):
        return (PUBLISHED,)
    return (
        (*LEAGUE_JUDGES, PUBLISHED)
        if facts and facts.channels == 3 and networks.is_installed()
        else LEAGUE_JUDGES
    )


def candidates(data: str, needs: Sequence[str]) -> tuple[str, ...]:
    """The models that race on a set. Models that do not fit the set are excluded before the choice."""
    facts = facts_of(locate(data))
    if "labels" in needs and facts and facts.classes == 0:
        message = f"`--need labels`: `{data}` has no labels"
        raise UsageError(
            message, hint=advice("sort the images into class folders, or omit {}", Option("need", "labels"))
        )
    usual, models = suggest(facts.classes if facts else None), able(needs)
    while True:
        chosen = shortlist(excesses(), models, usual)
        if not (misfits := [name for name in chosen if not fits(name, data)]):
            return chosen
        models = [name for name in models if name not in misfits]


def fits(name: str, data: str) -> bool:
    """Whether a model can be trained on a set, and samples without further inputs."""
    try:
        recipe = planning.ask(name, data, (), {}).recipe
    except UsageError:
        return False
    return not any(need in SAMPLE_SOURCES for part in recipe.parts for need in catalog.card(part.model).needs)


def able(needs: Sequence[str]) -> list[str]:
    """The models of the shipped leagues that meet `needs`."""
    names = dict.fromkeys(name for row in excesses().values() for name in row)
    return [name for name in names if all(meets(catalog.card(name), need) for need in needs)]


def meets(card: catalog.ModelCard, need: str) -> bool:
    """Whether a model has a capability, one of NEEDS."""
    can = NEEDS[need]
    return can in card.can if can else calls().get(card.name) == 1


def excesses() -> dict[str, dict[str, float]]:
    """The excess of every model on each shipped league, by league and judge."""
    table: dict[str, dict[str, float]] = {}
    for data, scale in measured.places():
        for row in measured.standings(data, scale):
            if row.get("late") == "True":  # it was trained for longer than the others
                continue
            # with few images, the other judges miss blur
            for judge in (PUBLISHED,) if row.get(f"{PUBLISHED}_excess") else LEAGUE_JUDGES:
                if value := row.get(f"{judge}_excess"):
                    # an excess below half its interval cannot be distinguished from 0
                    least = float(row[f"{judge}_excess_half"])
                    of_judge = table.setdefault(f"{data} {scale} {judge}", {})
                    of_judge[row["model"]] = max(float(value), least)
    return table


@cache
def calls() -> dict[str, float]:
    """The largest number of network calls per image of each model, over the shipped leagues."""
    most: dict[str, float] = {}
    for place in measured.places():
        for row in measured.standings(*place):
            most[row["model"]] = max(most.get(row["model"], 0), float(row["calls"] or math.inf))
    return most


def shortlist(table: Excesses, models: Collection[str], usual: str) -> tuple[str, ...]:
    """The usual model, and the models that with it cover every row of the table. If these are fewer than
    `FEWEST`, models with the smallest regrets over all rows are added, those of new families first."""
    chosen = dict.fromkeys(cover(table, models, {usual} & {*models}))
    regrets = regrets_of(table, models)

    def preference(name: str) -> tuple[bool, float]:
        families = {catalog.card(one).family for one in chosen}
        logs = [math.log(row.get(name, max(row.values()))) for row in regrets]
        return catalog.card(name).family in families, sum(logs)

    while len(chosen) < SHORTLIST_MODELS and (left := [name for name in models if name not in chosen]):
        chosen[min(left, key=preference)] = None
    return tuple(chosen)


def regrets_of(table: Excesses, models: Collection[str]) -> list[dict[str, float]]:
    """The rows of the table that have some of these models, with excesses as multiples of the row's
    smallest."""
    rows = [{name: row[name] for name in models if name in row} for row in table.values()]
    return [{name: value / min(row.values()) for name, value in row.items()} for row in rows if row]


def cover(table: Excesses, models: Collection[str], members: Collection[str] = ()) -> tuple[str, ...]:
    """The smallest group of these models whose best one, in every row of the table, has at most `REGRET`
    times the smallest excess. Of equally small groups, it is the one with the smallest regrets.

    members: models that every group has.
    """
    regrets = regrets_of(table, models)
    if not regrets:
        return tuple(models)
    # a model must be within the bound in at least one row
    others = [name for name in models if name not in members]
    useful = [name for name in others if any(row.get(name, math.inf) <= REGRET for row in regrets)]

    def worst(chosen: Sequence[str]) -> list[float]:
        return [min((row.get(name, math.inf) for name in chosen), default=math.inf) for row in regrets]

    for size in range(len(useful) + 1):
        groups = [(*some, *members) for some in combinations(useful, size)]
        if fit := [chosen for chosen in groups if max(worst(chosen)) <= REGRET]:
            return min(fit, key=lambda chosen: sum(worst(chosen)))
    return (*useful, *members)


# ---------------------------------------------------------------------------- the race


def leagues(race: Race, outcomes: list[dict[str, Any]], how: Mapping[str, Any]) -> Iterator[League]:
    """The league of each round, with the models that remain after the earlier rounds."""
    models = race.models
    for size, seconds in race.rounds:
        if outcomes:
            models = tuple(order(outcomes[-1])[:size])
        n = race.samples(seconds)
        job = replace(race.terms.job, n=n, few=MIN_SLOW_SAMPLES, patience=SLOW_SHARE * seconds)
        terms = replace(race.terms, models=models, budget=seconds, job=job)
        yield League.of(terms, f"{seconds:.0f}s", **how)


def run(race: Race, *, at_once: int | None = None, say: Say = silent, mode: str = "human") -> Outcome:
    """Runs the race. Raises MissingError if the judges cannot distinguish models on this set."""
    outcomes: list[dict[str, Any]] = []
    for i, league in enumerate(leagues(race, outcomes, {"say": say})):
        names = ", ".join(dict.fromkeys(entry.model for entry in league.entries))
        say(f"round {i + 1} of {len(race.rounds)}, {duration(league.terms.budget)} each: {names}")
        result = run_league(league, at_once=at_once, say=say, mode=mode)
        result["judges"] = judges_of(result)
        if result["metric"] is None:
            hint = next(iter(result["notes"]), None)
            raise MissingError(f"no judge can compare models on `{race.terms.data}`", hint=hint)
        outcomes.append(result)
    ordered = dict.fromkeys(name for result in reversed(outcomes) for name in order(result))
    return Outcome(race, tuple(outcomes), tuple(ordered), agreement(outcomes))


def judges_of(result: Mapping[str, Any]) -> list[str]:
    """The judges that rank the models of a round."""
    judges = dict.fromkeys([result["metric"], standings.SECOND_METRIC, PUBLISHED])
    return [judge for judge in judges if any(judge in row["excess"] for row in result["summary"])]


def judged(result: Mapping[str, Any], row: standings.Row) -> dict[str, standings.Excess]:
    """The excess of a row by each judge that ranks the models; empty for a model that failed."""
    return standings.excesses_of(row, result["judges"])


def agreement(outcomes: Sequence[Mapping[str, Any]]) -> float | None:
    """Spearman's rank correlation of the first two rounds; None for fewer than three models in both."""
    if len(outcomes) < 2 or len(second := order(outcomes[1])) < 3:
        return None
    first = [name for name in order(outcomes[0]) if name in second]
    return standings.spearman(range(len(first)), [second.index(name) for name in first])


def order(result: Mapping[str, Any]) -> list[str]:
    """The models of a round, the best first, by the geometric mean of their excesses over all judges. Models
    that a judge cannot distinguish from real images tie for it. A model that failed comes last."""
    of_model = {row["model"]: judged(result, row) for row in result["summary"]}
    judges = {judge for excesses in of_model.values() for judge in excesses}
    least = {
        judge: min(excesses[judge].half for excesses in of_model.values() if judge in excesses)
        for judge in judges
    }
    scores = dict[str, float]()
    for name, excesses in of_model.items():
        sizes = [math.log(max(excess.value, least[judge], 1e-12)) for judge, excess in excesses.items()]
        scores[name] = sum(sizes) / len(sizes) if sizes else math.inf
    return sorted(scores, key=lambda name: scores[name])
