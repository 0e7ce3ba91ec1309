"""From a request to a training run: its recipe, its processes and its folder. Nothing is printed here: the
caller passes `say` for lines and `progress` for progress.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from gzcli.core.devices import cpu_name, trains_on_cpu
from gzcli.core.errors import DeviceError, GzError, MissingError, UsageError
from gzcli.core.hints import Option, advice, gz, setting
from gzcli.core.sections import LaunchSection, Part
from gzcli.core.types import Report, Say, silent, unreported
from gzcli.core.units import as_size
from gzcli.data.packs.augment import patch_of
from gzcli.data.packs.facts import ONE_CHANNEL
from gzcli.data.packs.open import Use, open_pack, pack_options, size_of
from gzcli.data.packs.pack import check_unchanged
from gzcli.data.sets.registry import SPECS, DataSet, data_key, locate
from gzcli.launch import launcher
from gzcli.launch.from_file import find_run, is_bundle, is_shared, is_weights
from gzcli.launch.launcher import Plan
from gzcli.launch.needs import check_set, in_steps
from gzcli.models import catalog
from gzcli.recipe import schema
from gzcli.recipe.recipe import OF_STAGE, Recipe, anchored, recipe_of, write_chosen, write_recipe
from gzcli.recipe.resolve import Resolved, Weights, changes_loss, dotted, large_limits, resolve
from gzcli.store import claims, files, model_files, rates, runs
from gzcli.store.paths import user_dir
from gzcli.store.run_folder import STAGES
from gzcli.store.runs import Run

R = TypeVar("R", bound=Recipe)
OF_START = ("seed", "launch", "params")  # keys that a training from a run's weights does not adopt
# seconds that machines wait for each other: one may be packing images, or its user may still be typing
MEETING_SECONDS = 1800.0
# keys of a recipe that do not change a training
NOT_TRAINED = ("about", "format", "bench", "launch", "ood", "params")


# ---------------------------------------------------------------------------- the request


@dataclass(frozen=True)
class Request:
    """The arguments of `ask`, and the resulting recipe."""

    recipe: Resolved  # with absolute paths
    earlier: Run | None  # the run to repeat; None if a model, a file or initial weights were named
    what: str
    data: str | None
    sets: Sequence[str]
    flags: Mapping[str, Any]
    parent: Run | None = None  # the run whose weights the training starts from

    @property
    def at_paper(self) -> Resolved | None:
        """The recipe at the scale `paper`, to compare times. None if it is at that scale already or lacks it,
        or if the user set the length."""
        if self.recipe.choice.scale in (None, "paper") or self.length_is_typed:
            return None
        try:
            return ask(self.what, self.data, self.sets, {**self.flags, "scale": "paper"}).recipe
        except GzError:
            return None

    @property
    def length_is_typed(self) -> bool:
        """Whether the command line sets the length of the training, so that no estimate is needed."""
        return any(key.endswith(("train.steps", "train.minutes")) for key in typed_keys(self.recipe))

    def to_resume(self, alias: str | None = None) -> Run | None:
        """The run that `--resume` refers to: the named one, otherwise the newest unfinished run of this model
        and data. If all are finished and more steps are requested, it is the newest one. For an alias, it is
        the run of that name."""
        if self.earlier and alias is None:
            return self.earlier
        if alias is not None:
            return next((r for r in runs.all_runs() if r.alias == alias and r.recipe_file.exists()), None)
        similar = runs.all_runs(model=self.recipe.card.name, data=self.recipe.key)
        idle = [run for run in similar if run.state != "running" and run.recipe_file.exists()]
        unfinished = [run for run in idle if run.state != "finished" and resumable(run)]
        has_steps = any(key.endswith("train.steps") for key in typed_keys(self.recipe))
        return next(iter(unfinished or (idle if has_steps else [])), None)


def ask(
    what: str,
    data: str | None,
    sets: Iterable[str],
    flags: Mapping[str, Any],
    *,
    epochs: float | None = None,
    say: Say = silent,
    resume: bool = False,
) -> Request:
    """The recipe of a model, a file or an earlier run, overridden by the command line. `sets` are the texts
    of `--set`; `flags` are values by dotted key, None for an omitted option. `epochs` become steps. With
    other data, a training starts from a run's weights. On its own data, a run is repeated or, with `resume`,
    continued."""
    earlier, sets = runs.by_name(what), tuple(sets)
    parent, source, chosen, start = None, what, data, None
    if is_shared(what) or (earlier and data and data_key(data) != earlier.owner.data and not resume):
        parent, earlier = to_start_from(what, data), None
        start = start_of(what, parent)
    if run := earlier or parent:
        model_files.add_copies(run.path)
        source, chosen = str(run.recipe_file), data or recipe_of(run.tree()).data.name
    there = 0 if flags.get("launch.cpu") else launcher.usable_gpus().usable
    recipe = resolve(source, data=chosen, sets=sets, flags=flags, gpus=there, start=start)
    recipe = anchored(recipe, recipe.dataset)
    if epochs:
        steps = in_steps(recipe, epochs, say)
        return ask(what, data, sets, {**flags, **steps}, resume=resume)
    return Request(recipe, earlier, what, data, sets, flags, parent)


def resumable(run: Run) -> bool:
    """Whether a run can be resumed. A run that failed before its first step would fail again."""
    return run.state != "failed" or run.has_begun


def typed_keys(recipe: Resolved) -> list[str]:
    """The dotted keys with values from the command line."""
    return [key for key, origin in recipe.origin.items() if origin.startswith("--")]


# ---------------------------------------------------------------------------- trained weights to start from


def to_start_from(what: str, data: str | None) -> Run:
    """The run whose weights a training on a set starts from. Raises UsageError if no set is named,
    MissingError for a run without weights."""
    if data is None:
        hint = gz("train", what, data="NAME|PATH")
        raise UsageError(f"`gz train {what}` needs `--data`, the images to fine-tune on", hint=hint)
    return find_run(what)


def start_of(name: str, run: Run) -> Weights:
    """The weights of a run, or of each of its stages, to start from. `name` is the word on the command
    line."""
    tree = {key: value for key, value in run.tree().items() if key not in OF_START}
    if stages := {stage.path.name: stage for stage in run.stages}:
        parts = {  # a stage from another run is in the folder too
            stage: part if isinstance(part := tree[STAGES][stage], dict) else one.tree()
            for stage, one in stages.items()
        }
        shared = tree["data"].items()  # the file of a run repeats it in each stage
        tree[STAGES] = {
            stage: {key: value for key, value in part.items() if key in OF_STAGE}
            | {"data": {k: v for k, v in (part.get("data") or {}).items() if (k, v) not in shared}}
            for stage, part in parts.items()
        }
    data: dict[str, Any] = {"channels": None, "n": None}
    spec = SPECS.get(str(tree["data"].get("name")))
    # these are keys of the data set, not of the recipe
    if tree["data"].get("levels") == (spec.levels if spec else 256):
        data["levels"] = None
    if run.owner.latent_folder.is_dir():
        data["latent"] = str(run.owner.latent_folder)
    train = {stage: {"train": weights_of(name, one)} for stage, one in (stages or {"": run}).items()}
    return Weights(name, tree, {"data": data, **({STAGES: train} if stages else train[""])})


def weights_of(name: str, run: Run) -> dict[str, Any]:
    """The keys `init` and `parent` of a training that starts from the weights of a run."""
    if (file := run.weights) is None:
        raise MissingError(f"`{name}` has no weights yet", hint=gz("train", name, resume=True))
    return {"init": str(file.absolute()), "parent": f"{name} sha256:{files.checksum(file)}"}


def with_parents(recipe: Resolved) -> Resolved:
    """The recipe with the path and the hash of the weights that `train.init` names. Raises MissingError and
    UsageError if there are none."""
    parts = [replace(part, train=replace(part.train, **_parent_of(part, recipe))) for part in recipe.parts]
    return replace(recipe, parts=tuple(parts))


def _parent_of(part: Part, recipe: Resolved) -> dict[str, Any]:
    init, typed = part.train.init, recipe.origin.get(f"{part.in_recipe}train.init", "").startswith("--")
    if not init or init in recipe.stages or (part.train.parent and not typed):
        return {}
    if is_weights(init) and not is_bundle(Path(init).expanduser()):
        file = Path(init).expanduser().absolute()
        return {"init": str(file), "parent": f"{init} sha256:{files.checksum(file)}"}
    run = find_run(init)  # a run whose stages are the initial weights of the stages of the same names
    return weights_of(
        init, next((stage for stage in run.stages if stage.path.name == part.stage), run.serving)
    )


# ---------------------------------------------------------------------------- how it starts


@dataclass(frozen=True)
class Start:
    """A training that can start."""

    request: Request
    plan: Plan
    # the run to continue; None: make a new one, or join that of machine 0
    run: Run | None = None
    alias: str | None = None  # name of a new run

    def recipe(self, *, say: Say = silent, progress: Report = unreported) -> Recipe:
        """The recipe to train, completed by its data set, which is downloaded and packed if necessary."""
        resolved, processes = self.request.recipe, self.plan.processes
        recipe: Recipe
        if self.run:
            recipe = continued(self.run, resolved)
            for old, new in zip(recipe_of(self.run.tree()).parts, recipe.parts, strict=True):
                if new.train.steps < old.train.steps:
                    fewer = f"{new.train.steps:,} instead of {old.train.steps:,}"
                    say(f"`{new.in_recipe}train.steps` becomes {fewer}: the run ends earlier")
            check_batches(recipe, processes, goes_on=True)
        else:
            recipe, changes = shared_out(with_parents(resolved), processes)
            for line in (*changes, *large_limits(resolved)):
                say(line)
        return with_data(recipe, resolved.dataset, self.run, say=say, progress=progress)

    def train(
        self,
        recipe: Recipe,
        *,
        mode: str = "quiet",
        announce: Callable[[Run], None] = lambda run: None,
        say: Say = silent,
    ) -> Run:
        """Trains in separate processes and waits for them. Returns the run. A new run is removed if nothing
        was trained. `announce` is called with the run before it is launched."""
        if self.plan.machine_rank:
            run = made_by_machine_0(self.plan, say)
            announce(run)
            launcher.run(run.path, self.plan, launcher=self.plan.launched, mode=mode)
            return run
        stack, resolved = ExitStack(), self.request.recipe
        if self.run is None:
            run = runs.create(resolved.card.name, resolved.key, alias=self.alias, stack=stack)
        else:
            run = self.run
            runs.tidy()
            stack.enter_context(claims.claimed(run))
            claims.sign(run)
            for stage, steps in typed_lengths(run, resolved).items():
                part = run.stage(stage) if stage else run
                if steps > part.done_steps:
                    part.update(ended_by_patience=None)
        try:
            if self.run and run.environment_file.exists() and not run.environment:
                say(f"`{run.environment_file}` was damaged; gz rewrote it without its record of the data set")
            with stack:  # so that no other process trains it, or removes it or its data, meanwhile
                stack.callback(Use(locate(recipe.data.name)).end)
                write_run(run, recipe, self.plan)
                if self.run is None or "recipe" not in run.status():
                    note_whole(run, self.request, recipe)
                announce(run)
                if self.plan.job:
                    run.update(job=self.plan.job, launched=time.time())
                _launch(run, self.plan, mode, say)
        except BaseException as error:
            ours = not isinstance(error, KeyboardInterrupt) and getattr(error, "kind", "bug") == "bug"
            if self.run is None and runs.give_up(run, keep=ours):
                say(f"nothing was trained: removing `{run.id}`")
            raise
        return run


def prepare(
    request: Request,
    *,
    alias: str | None = None,
    resume: bool = False,
    requeue: bool = False,
    extra: Sequence[str] = (),
    check: bool = True,
) -> Start:
    """How a training starts: with which processes, and whether a run continues. With `resume` it must
    continue, with `requeue` it may. With several machines, the first one decides."""
    typed = [value for key, value in request.flags.items() if key != "launch.machine_rank"]
    words = [request.what, request.data, *request.sets, *typed, alias]
    job = hashlib.sha256(json.dumps([*map(str, words)]).encode()).hexdigest()
    plan = launcher.plan(request.recipe.launch, every_gpu=True, check=check, job=job, extra=extra)
    if plan.machine_rank:
        return Start(request, plan)
    run = request.to_resume(alias if requeue else None) if resume or requeue else None
    if run is None and resume:
        similar = runs.all_runs(model=request.recipe.card.name, data=request.recipe.key)
        if busy := next((run for run in similar if run.is_held), None):
            raise claims.in_use(busy)
        message = f"no unfinished run of `{request.recipe.card.name}` on `{request.recipe.data.name}`"
        raise MissingError(message, hint=gz("train", request.what, data=request.data))
    if run is None and alias is not None:
        runs.check_alias(alias)
    if run and plan.machines == 1:
        section = launched_again(run, request.recipe)
        again = launcher.plan(section, every_gpu=True, check=check, extra=extra)
        plan = replace(again, note=plan.note)
    return Start(request, plan, run, alias)


def made_by_machine_0(plan: Plan, say: Say, patience: float = MEETING_SECONDS) -> Run:
    """The run that machine 0 created for this job in the shared store; the other machines wait for it. The
    store may also contain an earlier start with the same command line, so the engine compares the run ids of
    all machines."""
    store, begun = user_dir("runs"), time.time()
    say(f"waiting for machine 0 to create the run in `{store}`")
    while time.time() < begun + patience:
        for run in runs.all_runs():
            status = run.status()
            recent = status.get("launched", 0.0) > begun - patience
            if status.get("job") == plan.job and recent and status.get("state") in ("planned", "running"):
                return run
        time.sleep(0.5)
    message = f"machine 0 did not create the run in `{store}` within {patience / 60:.0f} minutes"
    hint = advice(
        "start the same command there with {}; all machines must share one `GZ_HOME`",
        Option("machine_rank", 0),
    )
    raise MissingError(message, hint=hint)


def _launch(run: Run, plan: Plan, mode: str, say: Say) -> None:
    """Trains a run. If the first step runs out of GPU memory, tries again with smaller micro-batches."""
    while True:
        try:
            launcher.run(run.path, plan, launcher=plan.launched, mode=mode)
            return
        except DeviceError:
            change = halve(run, plan.processes) if plan.machines == 1 else None
            if change is None:
                raise
            say(change)


# ---------------------------------------------------------------------------- the recipe of the run


def with_data(
    recipe: R,
    dataset: DataSet | None,
    run: Run | None = None,
    *,
    say: Say = silent,
    progress: Report = unreported,
) -> R:
    """The recipe with the channels, size and levels of its data set, which is downloaded and packed if
    necessary. A run that continues requires the data set that it was trained on."""
    from gzcli.data.readers.pictures import is_crop

    data = recipe.data
    pack = open_pack(dataset or data.name, **pack_options(data), say=say, progress=progress)
    if run is not None:
        check_unchanged(run.path, pack.meta)
    elif data.fit == "crop" and any(map(is_crop, pack.meta.notes)):
        say("to train on whole images, use `--set data.fit=pad`")
    if run is None and data.channels is None and (pack.meta.facts or {}).get("grey"):
        say(ONE_CHANNEL)
    check_set(recipe, pack.meta, batch=run is None)
    channels, *sides = pack.meta.shape
    size = data.size if pack.patch else as_size(*sides)
    levels = pack.seen(data.levels).info(data.levels).levels
    return recipe.on(replace(data, channels=1 if channels == 1 else 3, size=size, levels=levels))


def shared_out(recipe: Resolved, processes: int) -> tuple[Resolved, list[str]]:
    """The recipe with batches that are divisible by processes and micro-batches, and the changes in words.
    Only values that gz itself chose are changed."""
    images = recipe.choice.facts.n if recipe.choice.facts else None
    parts, origin, changes = [], dict(recipe.origin), []
    for part in recipe.parts:
        size, accumulate = part.train.batch_size, part.train.accumulate
        share = max(1, size // processes)
        if f"{part.in_recipe}train.accumulate" in recipe.ours and size % (processes * accumulate):
            accumulate = min(accumulate, share)
            if size % processes == 0:  # a part keeps its size or shrinks
                accumulate = next(k for k in range(accumulate, share + 1) if share % k == 0)
        batch, key = size, f"{part.in_recipe}train.batch_size"
        if key in recipe.ours and size % (processes * accumulate):
            batch, into = near_batch(size, processes * accumulate, images), in_words(processes, accumulate)
            whose = f" of stage `{part.stage}`" if part.stage else ""
            changes.append(f"a batch of {size}{whose} cannot be divided among {into}; using {batch}")
            origin[key] = f"{size}, for {into}"
        parts.append(replace(part, train=replace(part.train, batch_size=batch, accumulate=accumulate)))
    recipe = replace(recipe, parts=tuple(parts), origin=origin)
    check_batches(recipe, processes)
    return recipe, changes


def near_batch(size: int, pieces: int, most: int | None = None) -> int:
    """The batch size, closest to `size`, that is divisible by the number of pieces, and at most `most` if
    possible. The images per piece have at most four significant binary digits, because a prime number could
    not be split again."""
    unit = pieces << max(0, (size // pieces).bit_length() - 4)
    near = unit * max(1, round(size / unit))
    return max(unit, near - unit) if most is not None and near > most else near


def check_batches(recipe: Recipe, processes: int, *, goes_on: bool = False) -> None:
    """Raises UsageError if a global batch is not divisible by its processes and micro-batches."""
    for part in recipe.parts:
        size, accumulate = part.train.batch_size, part.train.accumulate
        if size % (pieces := processes * accumulate) == 0:
            continue
        hint = advice(setting(f"{part.in_recipe}train.batch_size", near_batch(size, pieces)))
        if goes_on:
            able = next(n for n in range(processes, 0, -1) if n == 1 or size % (n * accumulate) == 0)
            hint = advice(f"a resumed run keeps its batch size: resume on {in_words(able, 1)}")
        raise UsageError(
            f"`{part.in_recipe}train.batch_size` is the global batch: {size} cannot be divided among "
            f"{in_words(processes, accumulate)}",
            hint=hint,
        )


def in_words(processes: int, accumulate: int) -> str:
    """The pieces of a batch in words, such as `3 processes` or `3 processes × 2 parts`."""
    several = f"{processes} process{'es' if processes > 1 else ''}"
    return several if accumulate == 1 else f"{several} × {accumulate} parts"


def continued(run: Run, typed: Resolved) -> Recipe:
    """The run's recipe, with more steps and other processes if requested. Raises UsageError that lists
    requested values that differ from the run's."""
    if run.is_held:
        raise claims.in_use(run.owner)
    recipe, lengths, differ = recipe_of(run.tree()), typed_lengths(run, typed), []
    for key in typed_keys(typed):
        if not (key.startswith("launch.") or (lengths and key.endswith("train.steps"))):
            old, new = recipe.value(key), typed.value(key)
            # they were converted to a number of steps
            counted = key.endswith("train.minutes") and old is None
            if old != new and not counted:
                differ.append(f"  {key}: {old} in the run, {new} requested")
    for stage, steps in lengths.items():
        if steps < (done := (run.stage(stage) if stage else run).status().get("step", 0)):
            differ.append(f"  train.steps: the run has done {done}, {steps} requested")
    if differ:
        message = "\n".join([f"`{run.id}` cannot resume with a different recipe", *differ])
        raise UsageError(
            message, hint=advice("omit these settings, or start a new run without {}", Option("resume"))
        )
    return recipe.lengthened(lengths).launched(launched_again(run, typed))


def typed_lengths(run: Run, typed: Resolved) -> dict[str, int]:
    """The steps that the command line sets, by unfinished stage, or for "" if the run has no stages. If all
    stages are finished, only for the last one, because it was trained on the others as they are."""
    stages = [stage for stage in run.stages if stage.state != "finished"] or [run.serving]
    keys, lengths = typed_keys(typed), dict[str, int]()
    for stage in stages:
        if (key := f"{stage.in_owner}train.steps") in keys:
            lengths["" if stage == run else stage.path.name] = typed.value(key)
    return lengths


def launched_again(run: Run, typed: Resolved) -> LaunchSection:
    """The processes with which a run resumes: its own, except for requested changes."""
    section = recipe_of(run.tree()).launch
    names = [key.removeprefix("launch.") for key in typed_keys(typed) if key.startswith("launch.")]
    values = {name: getattr(typed.launch, name) for name in names}
    if values.get("gpus"):
        section = replace(section, cpu=False, processes=None)
    if values.get("processes"):
        section = replace(section, gpus=None)
    if "gpus" in values or "processes" in values:
        section = replace(section, threads=None)
    return replace(section, **values)


# ---------------------------------------------------------------------------- the folder of the run


def write_run(target: Run, recipe: Recipe, p: Plan) -> None:
    """Writes `run.yaml` (the whole recipe) and `env.json` (the machine), so that the run can be repeated.
    Each stage gets a folder of the same form."""
    from importlib.metadata import version

    cpu = recipe.launch.cpu or trains_on_cpu(p.gpus, p.processes)
    recipe = recipe.launched(replace(recipe.launch.alone(), threads=p.threads, cpu=cpu))
    before = target.environment
    same = "training" in before and trained(target.tree()) == trained(recipe.tree())
    packages = ("gzcli", "torch", "torchvision", "accelerate", "numpy")
    env = {
        "packages": {name: version(name) for name in packages},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": cpu_name(),
        "instructions": list(rates.instruction_sets()),
        "git": git_state(Path.cwd()),
        "code": code_state(),
        "processes": p.processes,
        "threads": p.threads,
        "gpus": p.gpus,
        "command": [Path(sys.argv[0]).name.replace("__main__.py", "gz"), *sys.argv[1:]],
        "training": before["training"] if same else training(recipe, p),
        "data": before.get("data"),  # a resume compares its data with this record
        "models": before.get("models") or catalog.keep(target.path, (part.model for part in recipe.parts)),
    }
    # first, because the list names a run by what its recipe trains
    files.write_json(target.environment_file, env)
    write_recipe(target, recipe.tree())
    start = {"state": "planned", "error": None, "code": None}
    target.update(**start)
    for part in recipe.parts if recipe.stages else ():
        stage = target.stage(part.stage)
        write_recipe(stage, part.tree())
        short = stage.status().get("step", 0) < part.train.steps and not stage.ended_by_patience
        if short or stage.state != "finished":
            stage.update(model=part.model, data=target.data, **start)
    for name, run in recipe.reused.items():
        if not target.stage(name).status():
            runs.copy_weights(runs.find_stage(run, name), target.stage(name))


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the repository of a folder, and whether it has changes; None outside a repository."""

    def git(*words: str) -> str | None:
        try:
            command = ["git", "-C", str(folder), *words]
            done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if not commit:
        return None
    return {"commit": commit, "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}


def code_state() -> dict[str, Any] | None:
    """The git state of gz's own clone; None if gz is installed in another way, even within another
    repository."""
    clone = Path(__file__).resolve().parents[2]
    return git_state(clone) if (clone / ".git").exists() else None


def previous_words(run: Run) -> list[str]:
    """The words after `--` when this run was last started, from `env.json`."""
    words = run.environment.get("command", [])
    return words[words.index("--") + 1 :] if "--" in words else []


def halve(run: Run, processes: int) -> str | None:
    """Splits the batch whose first step ran out of GPU memory into at least twice as many micro-batches.
    Returns the change in words; None if nothing can be changed."""
    part = next((part for part in run.stages or [run] if part.status().get("too_large")), None)
    if part is None:
        return None
    train = part.tree()["train"]
    share = train["batch_size"] // processes
    able = (k for k in range(2 * train["accumulate"], share + 1) if share % k == 0)
    if (pieces := next(able, None)) is None:
        return None
    write_chosen(part, {"train": {"accumulate": pieces}})
    parts = f"{pieces} parts of {share // pieces}"
    return f"a batch of {train['batch_size']} does not fit on the GPU; splitting it into {parts}"


def training(recipe: Recipe, p: Plan) -> dict[str, Any]:
    """The requested training and its length, before `train.minutes` become steps."""
    return {"recipe": trained(recipe.tree()), "on": [p.processes, p.gpus, p.threads]}


def is_of_training(run: Run, recipe: Recipe, p: Plan) -> bool:
    """Whether a run is that training. Keys that are newer than its recipe have their defaults. A recipe with
    a removed key counts as another training."""
    before = run.environment.get("training") or {}
    try:
        filled = trained(with_defaults(recipe_of(before["recipe"])).tree())
    except (KeyError, TypeError, AttributeError, GzError):
        return False
    gone = set(dotted(before["recipe"])) - set(dotted(filled))
    return not gone and {**before, "recipe": filled} == training(recipe, p)


def with_defaults(recipe: Recipe) -> Recipe:
    """The recipe with all current options of its models and their sampling."""

    def filled(part: Part) -> Part:
        usual = schema.defaults(schema.schema(catalog.card(part.model)))
        options = {**usual["model"], "name": part.model, **part.options}
        return replace(part, options=options, sample={**usual.get("sample", {}), **part.sample})

    return replace(recipe, parts=tuple(map(filled, recipe.parts)))


def trained(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a recipe's tree that determines the training, as JSON values."""

    def cut(tree: Any) -> Any:
        if not isinstance(tree, Mapping):  # a stage given as a run's id
            return tree
        keys = {key: value for key, value in tree.items() if key not in NOT_TRAINED}
        if "train" in keys:
            keys["train"] = {key: value for key, value in keys["train"].items() if key != "keep"}
        if stages := keys.get("stages"):
            keys["stages"] = {name: cut(stage) for name, stage in stages.items()}
        return keys

    return dict(json.loads(json.dumps(cut(tree))))


def note_whole(run: Run, request: Request, recipe: Recipe) -> None:
    """Records in a new run's status the number of steps and the image size that its recipe has without
    command-line changes. Also records whether its loss is that of the shipped recipe. A repeated run copies
    these from the earlier run."""
    resolved, earlier = request.recipe, request.earlier
    parts = resolved.written().parts
    steps = {part.stage: None if part.train.minutes else part.train.steps for part in parts}
    # the size of the user's file is ignored: a run at the set's own size is preferred
    sizes = [layer.section("data").get("size") for layer in resolved.layers if layer.source == "shipped"]
    size = next(filter(None, reversed(sizes)), None)
    changing = {layer.source for layer in filter(changes_loss, resolved.layers)} - {"shipped"}
    shipped = not changing
    if earlier:
        shipped = "typed" not in changing and runs.has_shipped_loss(earlier)
        notes = {n: (earlier.stage(n) if n else earlier).status().get("recipe") or {} for n in steps}
        steps = {name: note.get("steps", steps[name]) for name, note in notes.items()}
        if earlier.data == run.data:
            size = (earlier.status().get("recipe") or {}).get("size")
    if request.parent:  # the weights have the plan's size
        size = size_of(recipe.data)
    elif size is None and resolved.dataset:
        size = resolved.dataset.size
    if patch_of(recipe.data.augment):
        size = size_of(recipe.data)  # patches are not a smaller version of the set, whatever their size
    runs.note_recipe(run, steps, size, shipped, size=size_of(recipe.data), levels=recipe.data.levels)
