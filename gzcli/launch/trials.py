"""What a step costs, found by the engine in a process of its own before a training starts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gzcli.core import jobs, signals
from gzcli.core.errors import GzError, Interrupted
from gzcli.core.jobs import TrialJob
from gzcli.core.types import Say, silent
from gzcli.launch import forecast, launcher, requirements
from gzcli.launch.launcher import Plan
from gzcli.recipe.recipe import Recipe
from gzcli.recipe.resolve import Resolved
from gzcli.store import files, paths
from gzcli.store.files import part_path, sweep
from gzcli.store.run_folder import Run


def measure(job: TrialJob, say: Say = silent) -> Mapping[str, Any]:
    """Does the job in a process of its own, and returns its result. What keeps that from being done is the
    `error` of each part: a plan is no reason not to start.

    say: takes a line about what is done.
    """
    costs = paths.cache_dir("costs")
    try:
        costs.mkdir(parents=True, exist_ok=True)
        sweep(costs)
        folder = part_path(costs / "job")
        folder.mkdir()
    except OSError as error:
        return not_tried(job, f"`{costs}` cannot be written ({os.strerror(error.errno or 0).lower()})")
    tried = any(row["timed"] for row in job.parts)
    say("planning: " + ("a step is tried on this machine" if tried else "finding what a step costs"))
    try:
        jobs.write(folder, job)
        with signals.noted() as got:
            try:
                launcher.run(folder, launcher.plan(job.launch, every_gpu=False), launcher=False, mode="quiet")
            finally:
                if got:  # whatever the engine made of it: what is planned must not start
                    raise Interrupted(f"stopped by {signals.name_of(got[0])}", signum=got[0])
        found: Mapping[str, Any] = files.read_json(Run(folder).result_file)
        return found
    except Interrupted:
        raise
    except GzError as error:
        return not_tried(job, error.message)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def not_tried(job: TrialJob, why: str) -> Mapping[str, Any]:
    """The result of a job that could not be done."""
    asked = [row for row in job.parts if row["asked"]]
    return {"parts": [{"cost": None, "seconds": None, "error": why} for _ in asked]}


def split_to_fit(asked: Resolved, recipe: Recipe, plan: Plan) -> Recipe:
    """The recipe with its batches in as many parts as fit in the GPU's memory; on a CPU as it is.

    asked: the recipe as it was asked for.
    recipe: what is trained, with what its data set decides.
    """
    if not plan.gpus:
        return recipe
    facts, _ = requirements.of_data(asked)
    whole = replace(asked, parts=recipe.parts, data=recipe.data)
    expected, _ = forecast.expect(whole, plan, facts.info(), measure=measure, timed=False)
    return forecast.split_to_fit(recipe, expected, requirements.memory_of(plan))[0]
