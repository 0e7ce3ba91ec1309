"""Which runs newer and better ones have replaced, for `gz runs prune`."""

from __future__ import annotations

from gzcli.core.errors import canonical
from gzcli.core.sizes import Size
from gzcli.store.run import Run
from gzcli.store.runs import all_runs


def outdated(keep: int) -> list[Run]:
    """The finished runs that are neither among the newest of their model and data set nor the best of these.

    Complete runs count as newer than those cut short. The best run has the least validation result. Results
    are compared among runs of one metric, image size and number of grey levels only.

    keep: number of newest runs to keep for each model and data set; with 0 no best one is kept either.
    """
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in all_runs():
        if run.state == "finished":
            groups.setdefault((canonical(run.model), canonical(run.data)), []).append(run)
    old = []
    for group in groups.values():
        ranked = sorted(group, key=lambda run: bool(run.shortfalls))  # stable: the newest stay first
        kept = [*ranked[:keep], *(_best_of(group) if keep else ())]
        old += [run for run in ranked if run not in kept]
    return old


def _best_of(group: list[Run]) -> list[Run]:
    """The best run for each metric, image size and number of grey levels; of equal ones the newest."""
    best: dict[tuple[str, Size | None, int | None], tuple[float, Run]] = {}
    for run in reversed(group):  # oldest first
        if result := run.serving.best:
            status = run.status()
            key = (result.metric, status.get("size"), status.get("levels"))
            if key not in best or result.value <= best[key][0]:
                best[key] = result.value, run
    return [run for _, run in best.values()]
