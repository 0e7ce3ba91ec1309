"""What a league still costs: its trainings, samples and evaluations that are not done yet."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from gzcli.core.types import Say
from gzcli.data.sets.registry import locate
from gzcli.launch import comparing, cost, forecast, launcher
from gzcli.launch.cost import OF_EVALUATION, OF_SAMPLING, OF_TRAINING, Cost
from gzcli.league.league import Entry, Terms, is_judged
from gzcli.league.loop import League


def costs_of(league: League, say: Say) -> list[tuple[int, Cost]]:
    """For each entry, the number of its samples and the cost of what is left to do. say: prints what is
    timed."""
    terms = league.terms
    left = {entry.key: entry for entry in league.entries if not is_judged(entry.run(), terms)}
    drawers = [forecast.Drawer.of(entry.request.recipe, entry.plan) for entry in left.values()]
    kinds = comparing.likelihood_kinds(terms.job)
    most = comparing.likelihood_images(terms.job, locate(terms.data))
    costs = forecast.image_costs(drawers, partial(forecast.measured, say=say), kinds, most)
    here = dict(zip(left, costs, strict=True))
    return [_cost_of(entry, terms, here.get(entry.key)) for entry in league.entries]


def _cost_of(entry: Entry, terms: Terms, here: tuple[Cost, Cost] | None) -> tuple[int, Cost]:
    """here: the cost of an image and of the likelihoods on this machine; None if nothing is left to do."""
    run = entry.run()
    trained = bool(run and run.state == "finished")
    image = cost.sampling(entry.model, locate(terms.data).key, run if trained else None)
    if here and here[0].each and not trained:
        image = here[0]
    n = terms.job.n
    if (seconds := image.seconds(n)) and seconds > terms.budget:
        n = min(n, comparing.DEFAULT_SAMPLES)
    left = Cost(calls=image.calls)
    if here:
        judged = cost.START + cost.evaluation(n, entry.plan.gpus) + here[1]
        left += Cost.once(0.0 if trained else terms.budget, OF_TRAINING)
        left += Cost.once(image.seconds(n), OF_SAMPLING) + Cost.once(judged.fixed, OF_EVALUATION)
    return n, left


def judges_of(league: League, costs: Sequence[Cost]) -> Cost:
    """The cost of training the judges, if anything is left to judge."""
    if not any(OF_EVALUATION in each.why for each in costs):
        return Cost()
    return cost.judge_networks(league.metrics, locate(league.terms.data), league.pack)


def parallel_of(league: League, costs: Sequence[Cost], at_once: int | None) -> int:
    """The number of trainings that run in parallel, at most that of the entries with work left."""
    left = max(sum(bool(each.why) for each in costs), 1)
    return launcher.parallel(min(at_once or 1, left), gpus=bool(league.terms.job.launch.gpus))


def seconds_of(costs: Sequence[Cost], judges: Cost, parallel: int) -> float:
    """The seconds of the judges, and then of the entries in parallel, without what is unknown."""
    each = [sum(cost.why.values()) for cost in costs]
    return sum(judges.why.values()) + max(sum(each) / parallel, *each)
