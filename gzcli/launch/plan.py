"""From what was asked for to a run that can start.

Nothing is printed here: lines go to `say`, and progress to `progress`, which the caller gives.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from gzcli.core.errors import DeviceError, MissingError, UsageError
from gzcli.core.sections import LaunchSection
from gzcli.core.types import Report, Say, silent, unreported
from gzcli.core.units import as_size
from gzcli.data.packs.augment import patch_of
from gzcli.data.packs.open import check_unchanged, open_pack, pack_options, size_of
from gzcli.data.packs.pack import Use
from gzcli.data.sets.names import DataSet, locate
from gzcli.launch import launcher
from gzcli.launch.launcher import Plan
from gzcli.launch.run_folder import halve, write_run
from gzcli.models import catalog
from gzcli.recipe.recipe import Recipe, anchored, check_batch_of, check_data, recipe_of
from gzcli.recipe.resolve import Resolved, resolve
from gzcli.store import claims, model_files, runs
from gzcli.store.paths import user_dir
from gzcli.store.runs import Run

R = TypeVar("R", bound=Recipe)
PATIENCE = 1800.0  # seconds that machines wait for each other: images may be packed, somebody still be typing


@dataclass(frozen=True)
class Asked:
    """What was asked for.

    recipe: the resolved recipe, with absolute paths.
    earlier: the run that the recipe was taken from; None where a model or a file was named.
    """

    recipe: Resolved
    earlier: Run | None

    def to_resume(self, *, extend: bool, alias: str | None = None) -> Run | None:
        """The run that `--resume` means: the one named, else the newest of this model and data that is not
        finished.

        extend: whether a finished one will do, as it is to have more steps.
        alias: the run's second name, which alone counts then: jobs side by side go on with their own runs.
        """
        if alias is not None:
            named = (run for run in runs.all_runs() if run.alias == alias)
            return next((run for run in named if run.recipe_file.exists()), None)
        if self.earlier:
            return self.earlier
        found = runs.all_runs(model=self.recipe.card.name, data=self.recipe.key)
        idle = [run for run in found if run.state != "running" and run.recipe_file.exists()]
        unfinished = [
            run for run in idle if run.state != "finished" and (run.state != "failed" or run.has_begun)
        ]
        return next(iter(unfinished or (idle if extend else [])), None)


def ask(what: str, data: str | None, sets: Iterable[str], flags: Mapping[str, Any]) -> Asked:
    """The recipe of a model, of a file or of an earlier run, with what was typed laid over it.

    what: name of a model, path of a recipe, or a run's id, alias or path.
    data: name or path of the data set; None: that of the recipe.
    sets: what was given to `--set`.
    flags: values of other options by dotted key; None where an option was not given.
    """
    earlier = runs.by_name(what)
    if earlier:
        for file in model_files.kept_files(earlier.path):
            model_files.add(file)
        what, data = str(earlier.recipe_file), data or recipe_of(earlier.tree()).data.name
    there = 0 if flags.get("launch.cpu") else launcher.usable_gpus().usable
    recipe = resolve(what, data=data, sets=sets, flags=flags, gpus=there)
    return Asked(anchored(recipe, recipe.found), earlier)


def ready(
    asked: Asked,
    run: Run | None,
    steps: int | None,
    processes: int,
    *,
    say: Say = silent,
    progress: Report = unreported,
) -> Recipe:
    """The recipe that is trained, with size, channels and levels of its data filled in.

    asked: what was asked for.
    run: the run that goes on, with its own recipe; None: a new run is made.
    steps: value of `--steps`.
    processes: number of processes that share a batch.
    say: takes a line about what is done.
    progress: takes images packed and in all.

    Raises UsageError and MissingError of `continued`, `shared_out` and `with_data`.
    """
    recipe: Recipe
    if run:
        recipe = continued(run, asked.recipe, steps)
        check_batches(recipe, processes, goes_on=True)
    else:
        recipe, told = shared_out(asked.recipe, processes)
        for line in told:
            say(line)
    return with_data(recipe, asked.recipe.found, run, say=say, progress=progress)


def with_data(
    recipe: R,
    found: DataSet | None,
    run: Run | None = None,
    *,
    say: Say = silent,
    progress: Report = unreported,
) -> R:
    """The recipe with channels, size and levels of its data set, which is fetched and packed if need be.

    found: the set; None: it is looked up by the recipe's name.
    run: the run that goes on.

    Raises UsageError where a model needs what the set does not have, MissingError where the set is not there
    or is not the one that `run` was trained on.
    """
    data = recipe.data
    pack = open_pack(found or data.name, **pack_options(data), say=say, progress=progress)
    meta = pack.meta
    if run is not None:
        check_unchanged(run.path, meta)
    for part in recipe.parts:
        check_data(part, catalog.card(part.model), meta.classes, meta.name, meta.extras, meta.shape)
        if run is None:
            check_batch_of(part, meta.counts["train"], meta.name)
    channels, *sides = meta.shape
    found_out: dict[str, Any] = {"channels": channels, "size": data.size if pack.patch else as_size(*sides)}
    return recipe.on(replace(data, **found_out, levels=data.levels or meta.levels))


def shared_out(recipe: Resolved, processes: int) -> tuple[Resolved, list[str]]:
    """The recipe with batches that divide into the processes and their parts, and what was changed, for
    people. Only what gz itself chose is changed.

    Raises UsageError where a batch of the user's own does not divide.
    """
    images = recipe.choice.facts.n if recipe.choice.facts else None
    parts, origin, told = [], dict(recipe.origin), []
    for part in recipe.parts:
        size, accumulate = part.train.batch_size, part.train.accumulate
        share = max(1, size // processes)
        if f"{part.in_recipe}train.accumulate" in recipe.ours and size % (processes * accumulate):
            accumulate = min(accumulate, share)
            if size % processes == 0:  # in parts no larger than before
                accumulate = next(k for k in range(accumulate, share + 1) if share % k == 0)
        taken, key = size, f"{part.in_recipe}train.batch_size"
        if key in recipe.ours and size % (processes * accumulate):
            taken, into = near_batch(size, processes * accumulate, images), in_words(processes, accumulate)
            whose = f" of stage `{part.stage}`" if part.stage else ""
            told.append(f"a batch of {size}{whose} does not divide into {into}: {taken} is taken")
            origin[key] = f"{size}, for {into}"
        parts.append(replace(part, train=replace(part.train, batch_size=taken, accumulate=accumulate)))
    recipe = replace(recipe, parts=tuple(parts), origin=origin)
    check_batches(recipe, processes)
    return recipe, told


def near_batch(size: int, pieces: int, most: int | None = None) -> int:
    """The batch near a size that so many pieces divide. Each piece gets a number of images in four binary
    digits, since a prime number of them could not be split again to fit the memory.

    most: images that there are; a larger batch is taken only where no smaller one divides.
    """
    unit = pieces << max(0, (size // pieces).bit_length() - 4)
    near = unit * max(1, round(size / unit))
    return max(unit, near - unit) if most is not None and near > most else near


def check_batches(recipe: Recipe, processes: int, *, goes_on: bool = False) -> None:
    """Raises UsageError where a global batch does not divide into the processes and their parts.

    goes_on: whether the recipe is that of a run that goes on, which keeps its batch.
    """
    for part in recipe.parts:
        size, accumulate = part.train.batch_size, part.train.accumulate
        if size % (pieces := processes * accumulate) == 0:
            continue
        hint = f"--set {part.in_recipe}train.batch_size={near_batch(size, pieces)}"
        if goes_on:
            able = next(n for n in range(processes, 0, -1) if n == 1 or size % (n * accumulate) == 0)
            hint = f"a run keeps its batch when it goes on: this one can on {able} of them"
        raise UsageError(
            f"`{part.in_recipe}train.batch_size` is the global batch: {size} does not divide into "
            f"{in_words(processes, accumulate)}",
            hint=hint,
        )


def in_words(processes: int, accumulate: int) -> str:
    """The parts of a batch, as `3 processes` or `3 processes × 2 parts`."""
    several = f"{processes} process{'es' if processes > 1 else ''}"
    return several if accumulate == 1 else f"{several} × {accumulate} parts"


def continued(run: Run, asked: Resolved, steps: int | None) -> Recipe:
    """The run's own recipe, with more steps and other processes where these were asked for.

    Raises UsageError that lists the keys that were asked for with other values than the run has.
    """
    if run.is_held:
        raise claims.in_use(run.owner)
    own, typed = recipe_of(run.tree()), [key for key, of in asked.origin.items() if of.startswith("--")]
    differ = []
    for key in typed:
        if not key.startswith("launch.") and not key.endswith("train.steps"):
            old, new = own.value(key), asked.value(key)
            counted = key.endswith("train.minutes") and old is None  # they have become a number of steps
            if old != new and not counted:
                differ.append(f"  {key}: {old} in the run, {new} asked for")
    if steps is not None:
        longer = parts_to_train(run)
        done = [part.status().get("step", 0) for part in longer]
        differ += [f"  train.steps: the run has done {n}, {steps} asked for" for n in done if steps < n]
        own = own.lengthened(steps, ["" if part.owner is part else part.path.name for part in longer])
    if differ:
        raise UsageError(
            "\n".join([f"`{run.id}` cannot go on with another recipe", *differ]),
            hint="leave them out, or start a new run without `--resume`",
        )
    return own.launched(launched_again(run, asked))


def launched_again(run: Run, asked: Resolved) -> LaunchSection:
    """The processes that a run goes on with: its own, but for what was typed. Threads are shared out anew
    where the number of processes was typed."""
    own = recipe_of(run.tree()).launch
    typed = {f.name: getattr(asked.launch, f.name) for f in fields(LaunchSection)}
    typed = {
        key: value for key, value in typed.items() if asked.origin.get(f"launch.{key}", "").startswith("--")
    }
    if typed.get("gpus"):
        own = replace(own, cpu=False, processes=None)
    if typed.get("processes"):
        own = replace(own, gpus=None)
    if "gpus" in typed or "processes" in typed:
        own = replace(own, threads=None)
    return replace(own, **typed)


def parts_to_train(run: Run) -> list[Run]:
    """The parts of a run that a new `--steps` lengthens: the run itself, or its unfinished stages.

    Where all stages are finished it is the last one: the earlier ones must stay as it was trained with them.
    """
    stages = [stage for stage in run.stages if stage.state != "finished"]
    return stages or [run.serving]


def note_whole(run: Run, asked: Asked, recipe: Recipe) -> None:
    """Notes in the status of a new run how many steps and which image size its recipe plans, and whether its
    loss is that of the recipe that gz ships.

    A run that repeats another one takes over the notes of that run.
    """
    whole, earlier = asked.recipe.whole, asked.earlier
    steps: dict[str, int | None] = dict(whole.steps)
    size, shipped = whole.size, not whole.loss
    if earlier:
        shipped = "typed" not in whole.loss and runs.has_shipped_loss(earlier)
        for name in steps:
            noted = (earlier.stage(name) if name else earlier).status().get("recipe") or {}
            steps[name] = noted.get("steps", steps[name])
        if earlier.data == run.data:
            size = (earlier.status().get("recipe") or {}).get("size")
    if size is None and asked.recipe.found:
        size = asked.recipe.found.size
    if patch_of(recipe.data.augment):
        size = size_of(recipe.data)  # patches of whatever size are no smaller version of the set
    runs.note_recipe(run, steps, size, shipped, size=size_of(recipe.data), levels=recipe.data.levels)


def made_by_machine_0(plan: Plan, say: Say, patience: float = PATIENCE) -> Run:
    """The run of this job, for which another machine waits in the store that all share.

    A start of the same words that ended without a trace may lie there too; the engine holds the ids of all
    machines against each other.

    Raises MissingError where machine 0 makes none in time.
    """
    store, begun = user_dir("runs"), time.time()
    say(f"waiting for the run that machine 0 makes in `{store}`")
    while time.time() < begun + patience:
        for run in runs.all_runs():
            status = run.status()
            recent = status.get("launched", 0.0) > begun - patience
            if status.get("job") == plan.job and recent and status.get("state") in ("planned", "running"):
                return run
        time.sleep(0.5)
    raise MissingError(
        f"machine 0 has made no run of this job in `{store}` for {patience / 60:.0f} minutes",
        hint="start the same command there with `--machine-rank 0`; all machines share one `GZ_HOME`",
    )


def start(
    asked: Asked,
    recipe: Recipe,
    plan: Plan,
    run: Run | None = None,
    *,
    alias: str | None = None,
    mode: str = "quiet",
    announce: Callable[[Run], None] = lambda run: None,
    say: Say = silent,
) -> Run:
    """Trains in processes of their own, and waits for them. Returns the run.

    asked: what was asked for.
    recipe: what is trained, as `ready` returned it.
    plan: the processes.
    run: the run that goes on; None: a new one is made, and removed again where nothing was trained. Only
      machine 0 decides that; the others of several take part in its run.
    alias: a second name of a new run.
    mode: what the engine prints: "human", "quiet" or "json" lines.
    announce: called with the run before it is launched.
    say: takes a line about what is done.

    Raises the engine's own error, UsageError where another process trains the run that goes on, and
    MissingError where that is gone.
    """
    if plan.machine_rank:
        run = made_by_machine_0(plan, say)
        announce(run)
        launcher.run(run.path, plan, launcher=plan.launched, mode=mode)
        return run
    new, held = run is None, ExitStack()
    if run is None:
        run = runs.create(asked.recipe.card.name, asked.recipe.key, alias=alias, held=held)
    else:
        runs.tidy()
        held.enter_context(claims.claimed(run))
        claims.sign(run)
    try:
        with held:  # nobody else trains or removes it meanwhile, or its data
            use = Use(locate(recipe.data.name))
            held.callback(use.end)
            write_run(run, recipe, plan)
            if new or "recipe" not in run.status():
                note_whole(run, asked, recipe)
            announce(run)
            if plan.job:
                run.update(job=plan.job, launched=time.time())
            train(run, plan, mode, say)
    except BaseException as error:
        ours = not isinstance(error, KeyboardInterrupt) and getattr(error, "kind", "bug") == "bug"
        if new and runs.give_up(run, keep=ours):
            say(f"nothing was trained: `{run.id}` is removed again")
        raise
    return run


def train(run: Run, plan: Plan, mode: str, say: Say) -> None:
    """Trains a run, on one machine again with smaller parts of its batch where the first step runs out of a
    GPU's memory."""
    while True:
        try:
            launcher.run(run.path, plan, launcher=plan.launched, mode=mode)
            return
        except DeviceError:
            change = halve(run, plan.processes) if plan.machines == 1 else None
            if change is None:
                raise
            say(change)
