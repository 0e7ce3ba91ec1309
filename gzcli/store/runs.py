"""The store of runs, and the lookup of a run by id, alias, path or model. A run is a folder such as
`glow-celeba-20260131-142501-ab12`. In a run with stages, each stage is a run in `stages/<name>/`, with an id
such as `vqgan-mnist-…/stages/tokenizer`. The last stage is sampled and scored. The name of a model refers to
its newest complete run, see `choose`."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from gzcli.core.errors import DamagedError, MissingError, UsageError, canonical, did_you_mean, matching
from gzcli.core.hints import Option, advice, gz
from gzcli.core.units import Size
from gzcli.store import files, index
from gzcli.store.claims import check_removable, claimed, remove_folder
from gzcli.store.paths import is_name, recipe_names, spelling, trained_in, user_dir
from gzcli.store.run_folder import RUN_ID, STAGES, Run

WAIT_HINT = "wait until the training ends"
_STAMP = "%Y%m%d-%H%M%S"


def create(model: str, data: str, *, alias: str | None = None, stack: ExitStack | None = None) -> Run:
    """A new, empty run folder, claimed until `stack` is closed. Its status has a running number, `order`,
    which identifies the newest run even if the clock was set back. Raises UsageError for an alias that is
    taken or is a model's name."""
    import psutil

    model, root = spelling(model), user_dir("runs")
    with _store_lock():
        runs = all_runs()
        if alias is not None:
            check_alias(alias, runs)
        name = f"{model}-{data}".lower()
        if not is_name(name):
            hint = "use letters, digits, `-` and `_` in names"
            raise UsageError(f"`{name}` is not valid in a run's id", hint=hint)
        files.remove_leftovers(root, user_dir())
        for run in filter(_is_stillborn, runs):
            remove_folder(run.path)
        stamp = time_of_id(root)
        while (path := root / f"{name}-{stamp}-{secrets.token_hex(2)}").exists():
            continue
        order = 1 + max((_age(run.status())[0] for run in runs), default=0)
        now = {"state": "planned", "pid": os.getpid(), "created": time.time(), "order": order}
        now["process_began"] = psutil.Process().create_time()
        with files.new_dir(path) as part:
            Run(part).mark("run")
            Run(part).update(model=model, data=data, alias=alias, **now)
        if stack is not None:
            stack.enter_context(claimed(Run(path)))
    return Run(path)


def _store_lock() -> contextlib.AbstractContextManager[bool]:
    """The lock for making or removing a run."""
    return files.lock(user_dir("runs", ".lock"))


def time_of_id(root: Path) -> str:
    """The time in the id of a new run, later than in the ids of all others even if the clock was set
    back. Times more than a day in the future come from a wrong clock and are ignored."""
    now = latest = datetime.fromtimestamp(int(time.time()))
    for parts in filter(None, (RUN_ID.fullmatch(path.name) for path in root.iterdir())):
        with contextlib.suppress(ValueError):
            start = datetime.strptime(parts[2], _STAMP)
            latest = max(latest, start + timedelta(seconds=1)) if start - now < timedelta(days=1) else latest
    return f"{latest:{_STAMP}}"


def short_name(id: str) -> str:
    """A run's id without its time, `glow-celeba-ab12`, which identifies the run if it is unique."""
    parts = RUN_ID.fullmatch(id)
    return f"{parts[1]}-{parts[3]}" if parts else id


def tidy() -> None:
    """Removes the leftovers of killed processes in the store."""
    with _store_lock():
        files.remove_leftovers(user_dir("runs"), user_dir())


def _is_stillborn(run: Run) -> bool:
    """Whether the `gz` that created a run was killed before it wrote the recipe."""
    import psutil

    if run.recipe_file.exists() or run.is_held:
        return False
    status = run.status()
    pid = status.get("pid")
    if status.get("state") != "planned" or pid is None:
        return False
    try:  # a later process may have its number, as each `gz` in a container has
        began = psutil.Process(pid).create_time()
        return abs(began - status.get("process_began", began)) > 1
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:  # another user's
        return False


def check_alias(alias: str, runs: list[Run] | None = None) -> None:
    """Raises UsageError for an alias that is malformed, a model's name, or taken by one of the runs."""
    runs = all_runs() if runs is None else runs
    owner = next((run for run in runs if run.alias == alias or run.id == alias), None)
    if owner and not _is_stillborn(owner):
        raise UsageError(
            f"the name `{alias}` is already used for `{owner.id}`",
            hint=advice("choose another {}", Option("name")),
        )
    if matching(alias, recipe_names()):  # it would hide the model's recipe
        hint = advice(f"choose another {{}}, such as `{alias}-1`", Option("name"))
        raise UsageError(f"`{alias}` is the name of a model", hint=hint)
    if not re.fullmatch(r"[^\W_][\w.-]*", alias):
        hint = advice("use letters, digits, `-`, `_` and `.`, and begin with a letter or digit")
        raise UsageError(f"`--name {alias}` is not a valid name", hint=hint)


def all_runs(*, model: str | None = None, data: str | None = None) -> list[Run]:
    """The runs of the store, newest first. `model` and `data`, the key of a data set, restrict them."""
    folder = user_dir("runs")
    if not folder.is_dir():
        return []
    index.begin(folder, "status")
    names = [name for name in os.listdir(folder) if not name.startswith(".")]
    statuses = {run: status for name in names if (status := _status(run := Run(folder / name)))}
    index.save(folder, "status", (run.path.name for run in statuses))
    newest_first = sorted(statuses.items(), key=lambda item: _age(item[1]), reverse=True)
    terms = [(key, canonical(name)) for key, name in (("model", model), ("data", data)) if name is not None]
    return [run for run, s in newest_first if all(canonical(s.get(key, "?")) == name for key, name in terms)]


def _status(run: Run) -> dict[str, Any]:
    """The status of a run. Empty if the folder is not a run, because other programs write such files too."""
    status = run.status()
    is_valid = "model" in status and status.get("state") != "damaged"
    return status if is_valid or run.is_marked("run") else {}


def _age(status: Mapping[str, Any]) -> tuple[int, float]:
    """A sorting key: newer runs come later, runs without a number come first."""
    return status.get("order") or 0, status.get("created") or 0.0


def by_name(ref: str) -> Run | None:
    """The run of this id, alias, short name or path; None if there is none."""
    if "\0" in ref:  # which no path can contain
        return None
    path = Path(ref).expanduser()
    if _status(Run(path)):
        return Run(path.resolve())
    ref, below, stage = ref.partition(f"/{STAGES}/")
    of_id = Run(user_dir("runs") / ref)
    match: Run | None = of_id
    if not (is_name(ref) and _status(of_id)):  # for an id, no other run is read
        runs = all_runs()
        match = next((run for run in runs if ref in (run.path.name, run.alias)), None)
        short = [] if match else [run for run in runs if short_name(run.id) == ref]
        match = short[0] if len(short) == 1 else match
    if match and below:
        return match.stage(stage) if is_name(stage) and match.stage(stage).status() else None
    return match


def short_names(runs: Iterable[Run], everything: Iterable[Run] | None = None) -> dict[str, str]:
    """The short name of each run, by run id. If two runs would share a name, it is the id."""
    counts = Counter(short_name(run.id) for run in (all_runs() if everything is None else everything))
    names = {run.id: short_name(run.id) for run in runs}
    return {id: short if counts[short] < 2 else id for id, short in names.items()}


def choose(finished: list[Run]) -> Run | None:
    """The run that a model name refers to: its newest complete run, otherwise its newest finished one. A
    quick trial therefore does not replace a run that took a night to train."""
    return next((run for run in finished if not run.shortfalls), finished[0] if finished else None)


def find(ref: str, *, data: str | None = None, typed: str | None = None) -> Run:
    """The run of an id, an alias or a path, or the one that `choose` selects for a model on this data set.
    Raises MissingError with a `gz train` command for a model without a finished run, UsageError for an
    unknown name.

    data: key of the data set.
    typed: the data set as a command names it.
    """
    if run := by_name(ref):
        if (state := run.state) == "damaged":
            error = run.status()["error"]
            raise DamagedError(error["message"], hint=error["hint"])
        if state != "finished" and run.weights is None:
            is_running = state == "running"
            hint = "wait for its first checkpoint" if is_running else gz("train", ref, resume=True)
            raise MissingError(f"`{run.id}` has no weights yet ({state})", hint=hint)
        return run
    model = spelling(ref)
    if model not in recipe_names() and not all_runs(model=model):
        if place := trained_in(ref):
            message = f"`{ref}` has no runs: it is a stage of other models"
            raise UsageError(message, hint=gz("sample", place[0]))
        if "/" in ref or Path(ref).suffix[1:].isalpha():
            exists = Path(ref).expanduser().exists()
            message = f"`{ref}` is not a run or a weights file" if exists else f"`{ref}` does not exist"
            hint = advice(
                "give the folder of a run, its `model.safetensors`, or a name from {}", gz("runs list")
            )
            raise MissingError(message, hint=hint)
        options = [*recipe_names(), *(name for run in all_runs() for name in (run.id, run.alias) if name)]
        hint = did_you_mean(ref, options) or "gz list models · gz runs list"
        raise UsageError(f"no model or run is called `{ref}`", hint=hint)
    return _of_model(model, data, typed or data)


def _of_model(model: str, data: str | None, typed: str | None) -> Run:
    """The run by `choose`. Raises MissingError with the command that trains one."""
    of_model = all_runs(model=model, data=data)
    if run := choose([run for run in of_model if run.state == "finished"]):
        return run
    message = f"no finished run of `{model}`" + (f" on `{typed}`" if typed else "")
    newest = next((run for run in of_model if run.state == "running" or run.weights), None)
    if newest is None:
        train = gz("train", model, data=typed)
        alternative = choose([run for run in all_runs(data=data) if data and run.state == "finished"])
        if alternative is None:
            raise MissingError(message, hint=train)
        name = alternative.alias or short_names([alternative])[alternative.id]
        raise MissingError(message, hint=advice(f"{{}}, or use your run `{name}`", train))
    name = newest.alias or short_names([newest])[newest.id]
    state = "being trained" if newest.state == "running" else newest.state
    hint = f"to use its newest checkpoint, pass `{name}`" if newest.weights else "it has no checkpoint yet"
    raise MissingError(f"{message}; `{name}` is {state}", hint=hint)


def note_recipe(
    run: Run, steps: Mapping[str, int | None], own_size: Size | None, shipped_loss: bool, **facts: Size | None
) -> None:
    """Writes the recipe's plan into a run's status, for `Run.shortfalls`. It consists of the steps of each
    stage, the size of the set's images, and the run's own `size` and `levels`. A run without stages has the
    stage "". The steps are None if the length is a time."""
    for name, count in steps.items():
        (run.stage(name) if name else run).update(recipe={"steps": count})
    plan = {"size": own_size, "shipped_loss": shipped_loss}
    run.update(recipe=(run.status().get("recipe") or {}) | plan, **facts)


def has_shipped_loss(run: Run) -> bool:
    return bool((run.status().get("recipe") or {}).get("shipped_loss"))


def find_stage(ref: str, name: str) -> Run:
    """The run that `ref` refers to; if it has stages, its stage of this name. Raises the errors of `find`,
    and MissingError if the stage has no weights yet."""
    run = by_name(ref) or find(ref)
    part = next((stage for stage in run.stages if stage.path.name == name), run.serving)
    if not part.model_file.exists():
        message = f"`{part.id}` has no weights yet ({part.state})"
        resume = f"gz train {run.id} --resume"
        raise MissingError(message, hint=WAIT_HINT if run.state == "running" else resume)
    return part


def copy_weights(run: Run, target: Run) -> None:
    """Makes `target` a finished run with the recipe and weights of `run`, by hard links if possible."""
    with files.new_dir(target.path) as part:
        for place in (Run.recipe_file, Run.model_file):
            files.link_or_copy(run.path / place, part / place)
        files.write_json(part / Run.status_file, run.status() | {"state": "finished", "copy_of": run.id})


def remove(run: Run) -> None:
    """Deletes a run of the store. Raises the errors of `check_removable`."""
    check_removable(run)
    with _store_lock(), claimed(run):  # a run in the making is not claimed yet
        remove_folder(run.path)


def give_up(run: Run, *, keep: bool) -> bool:
    """Removes a run whose start failed, unless a step was trained. Returns whether it was removed. With
    `keep`, for example after a bug in gz, the folder remains for its `log.txt`, and the run loses its
    alias."""
    if run.has_begun or run.state == "running":
        return False
    if keep:
        run.update(state="failed", alias=None)
        return False
    with contextlib.suppress(UsageError):  # another process has claimed it meanwhile
        remove(run)
        return True
    return False


def outdated(keep: int) -> list[Run]:
    """The finished runs to remove. The `keep` newest of each model and data set stay, complete runs first.
    The best run for each metric, image size and number of grey levels also stays, the newest of equal ones.
    With `keep` 0, none stays."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in all_runs():
        if run.state == "finished":
            groups.setdefault((canonical(run.model), canonical(run.data)), []).append(run)
    old = []
    for group in groups.values():
        ranked = sorted(group, key=lambda run: bool(run.shortfalls))  # stable: the newest stay first
        best: dict[tuple[str, Size | None, int | None], tuple[float, Run]] = {}
        for run in reversed(group) if keep else ():  # oldest first
            if result := run.serving.best:
                key = (result.metric, run.status().get("size"), run.status().get("levels"))
                if key not in best or result.value <= best[key][0]:
                    best[key] = result.value, run
        stay = {*ranked[:keep], *(run for _, run in best.values())}
        old += [run for run in ranked if run not in stay]
    return old
