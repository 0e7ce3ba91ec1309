"""Which run several machines train together: machine 0 tells, the others find it in the store they share."""

from __future__ import annotations

import time
from collections.abc import Callable

from gzcli.launch import meeting
from gzcli.launch.launcher import Plan
from gzcli.recipe.recipe import Recipe
from gzcli.store import runs
from gzcli.store.paths import user_dir
from gzcli.store.runs import Run

VISIBLE = 60.0  # seconds until what one machine wrote must be seen by another


def tell(recipe: Recipe, plan: Plan, run: Run, say: Callable[[str], None]) -> None:
    """Machine 0: waits for the others and tells them the run, whose `run.yaml` is written.

    Raises the errors of `meeting.gather`.
    """
    meeting.gather(plan.main_port or 0, facts(recipe, plan), run.id, say)


def find(recipe: Recipe, plan: Plan, earlier: Run | None, say: Callable[[str], None]) -> Run:
    """Another machine: the run that machine 0 makes or goes on with.

    earlier: the run that was named here, which may lie outside the store.

    Raises the errors of `meeting.join`.
    """

    def seen(name: str) -> Run | None:
        known = [*([earlier] if earlier else []), *runs.all_runs()]
        return next((run for run in known if run.id == name and run.recipe_file.exists()), None)

    def problem(name: str) -> str | None:
        deadline = time.monotonic() + VISIBLE
        while seen(name) is None:
            if time.monotonic() > deadline:
                return f"machine {plan.machine_rank} does not see the run `{name}` in `{user_dir('runs')}`"
            time.sleep(0.2)
        return None

    host, port = plan.main_ip or "", plan.main_port or 0
    name = meeting.join(host, port, plan.machine_rank, facts(recipe, plan), problem, say)
    run = seen(name)
    assert run is not None, "it was seen before"
    return run


def facts(recipe: Recipe, plan: Plan) -> meeting.Facts:
    """What must be the same on all machines."""
    return {
        "model": recipe.parts[-1].model,
        "data": recipe.data.name,
        "machines": plan.machines,
        "processes": plan.processes,
    }
