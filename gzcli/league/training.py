"""A training that the same call can continue: an interrupted one resumes, a finished one is not repeated."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

from gzcli.core import signals
from gzcli.core.errors import DivergedError, Interrupted
from gzcli.core.hints import advice, gz
from gzcli.core.sections import Part
from gzcli.core.types import Report, Say, silent, unreported
from gzcli.data.packs.open import open_pack, pack_options
from gzcli.launch import launcher
from gzcli.launch.launcher import Plan
from gzcli.launch.plan import Request, Start, is_of_training, launched_again, resumable, training
from gzcli.metrics.metric import metrics
from gzcli.metrics.networks import published_judges
from gzcli.recipe.recipe import Recipe
from gzcli.store import files, runs
from gzcli.store.paths import cache_dir
from gzcli.store.runs import Run

if TYPE_CHECKING:
    from typing_extensions import Self

RESUME_HINT = "run the same command to resume"
STATUS_SECONDS = 0.5  # seconds between checks of another process's training


@dataclass(frozen=True)
class Training:
    """A training. Its alias identifies it or, without an alias, its recipe."""

    _: KW_ONLY
    request: Request
    recipe: Recipe  # the request's recipe, resolved for its data set
    plan: Plan
    alias: str | None = None

    @classmethod
    def of(cls, request: Request, say: Say = silent, progress: Report = unreported, **facts: Any) -> Self:
        plan = launcher.plan(request.recipe.launch, every_gpu=True)
        recipe = Start(request, plan).recipe(say=say, progress=progress)
        return cls(request=request, recipe=recipe, plan=plan, **facts)

    def run(self) -> Run | None:
        """The finished run of this training, otherwise the newest run that can be resumed or that
        diverged."""
        if self.alias is not None:
            return self.request.to_resume(self.alias)
        similar = runs.all_runs(model=self.request.recipe.card.name, data=self.request.recipe.key)
        written = [run for run in similar if run.recipe_file.exists()]
        matching = [run for run in written if is_of_training(run, self.recipe, self.plan)]
        finished = (run for run in matching if run.state == "finished")
        return next(finished, None) or next(filter(resumable, matching), None)

    def is_done(self, run: Run) -> bool:
        """Whether a run is finished with the requested number of steps."""
        steps = self.request.flags.get("train.steps") or 0
        return run.state == "finished" and run.serving.done_steps >= steps

    def train(self, say: Say = silent) -> Run:
        """Trains and returns the finished run. If another process is training it, this one waits. That
        process may belong to another league, or its `gz` was killed and it is saving a checkpoint. Raises
        Interrupted for a signal that `signals.noted` gets meanwhile."""
        key, waits = digest(self.alias or training(self.recipe, self.plan), 16), False
        lock = cache_dir("entries", f"{key}.lock")
        while True:
            with files.lock(lock, wait=False) as locked:
                run = self.run()
                if locked and not (run and run.is_held):
                    return self._train(run, say)
            if number := signals.heard():
                raise stopped(number)
            if not waits:
                say(
                    f"waiting: another process is training `{run.id}`"
                    if run
                    else "waiting: another `gz` is training it"
                )
            waits = True
            time.sleep(STATUS_SECONDS)

    def _train(self, run: Run | None, say: Say) -> Run:
        if run and self.is_done(run):
            return run
        if run and run.state == "diverged":
            message = (run.status().get("error") or {}).get("message", "the loss is not finite")
            raise DivergedError(message, hint=advice("to try again, first run {}", gz("runs remove", run.id)))
        plan, recipe = self.plan, self.recipe
        if run:
            plan = launcher.plan(launched_again(run, self.request.recipe), every_gpu=True)
            recipe = Start(self.request, plan, run).recipe(say=say)
        return Start(self.request, plan, run, self.alias).train(recipe, say=say)


def train_judges(parts: Iterable[Part], say: Say, by: Sequence[str] | None = ()) -> None:
    """Trains the first judge of each packed set, except for latents. Otherwise the first training would do so
    in its own time. A published network judges few colour images: they get a judge only if a recipe requests
    `fd`, or if one of the metrics `by` (None: the default ones) uses it."""
    from gzcli.metrics.features import lenet

    always = by is None or any(metrics()[name].features == "lenet" for name in by if name in metrics())
    different = {
        (*pack_options(part.data).items(), part.train.best == "fd"): part.data
        for part in parts
        if not part.data.latent
    }
    for (*_, by_fd), data in different.items():
        pack = open_pack(data.name, **pack_options(data), say=say)
        if always or by_fd or not published_judges(pack.meta):
            lenet(pack, say=say)


def stopped(number: int) -> Interrupted:
    """The error for work that a signal stopped between two trainings."""
    return Interrupted(f"stopped by {signals.signal_name(number)}", signum=number, hint=RESUME_HINT)


def digest(value: Any, digits: int) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:digits]
