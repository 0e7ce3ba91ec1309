"""`gz train`: a recipe, resolved and checked, becomes a run directory; the run is launched; a picture comes
out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from gzcli.cli import out
from gzcli.cli.options import (
    Cpu,
    Data,
    Extra,
    Gpus,
    Json,
    Processes,
    Quiet,
    Seed,
    Sets,
    complete_model_or_run,
)
from gzcli.errors import MissingError, UsageError

if TYPE_CHECKING:
    from gzcli.recipe.resolve import Recipe
    from gzcli.store.runs import Run

_What = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|RECIPE|RUN",
        help="A model, a recipe file, or a run to repeat.",
        autocompletion=complete_model_or_run,
    ),
]
_Steps = Annotated[int | None, typer.Option("--steps", metavar="N", min=1, help="Train for N steps.")]
_Minutes = Annotated[
    float | None,
    typer.Option("--minutes", metavar="M", min=0.05, help="Train for as many steps as fit in M minutes."),
]
_Name = Annotated[str | None, typer.Option("--name", metavar="ALIAS", help="A second name for the run.")]
_Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the newest unfinished run, or the RUN named.")
]
_Requeue = Annotated[
    bool, typer.Option("--requeue", help="Resume if there is something to resume, start otherwise.")
]
_Wandb = Annotated[bool, typer.Option("--wandb", help="Log to Weights & Biases too.")]
_Dry = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and do nothing.")]
_PANEL = "Several machines"
_Machines = Annotated[
    int | None, typer.Option("--num-machines", metavar="N", min=1, help="How many.", rich_help_panel=_PANEL)
]
_Rank = Annotated[
    int | None,
    typer.Option("--machine-rank", metavar="R", min=0, help="Which one this is.", rich_help_panel=_PANEL),
]
_Ip = Annotated[
    str | None,
    typer.Option("--main-process-ip", metavar="HOST", help="Address of machine 0.", rich_help_panel=_PANEL),
]
_Port = Annotated[
    int | None, typer.Option("--main-process-port", metavar="P", help="Its port.", rich_help_panel=_PANEL)
]


def train(
    what: _What,
    data: Data = None,
    gpus: Gpus = None,
    steps: _Steps = None,
    minutes: _Minutes = None,
    seed: Seed = None,
    name: _Name = None,
    sets: Sets = None,
    resume: _Resume = False,
    requeue: _Requeue = False,
    wandb: _Wandb = False,
    cpu: Cpu = False,
    processes: Processes = None,
    num_machines: _Machines = None,
    machine_rank: _Rank = None,
    main_process_ip: _Ip = None,
    main_process_port: _Port = None,
    dry_run: _Dry = False,
    extra: Extra = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a model.

    Without `--data` it trains on the embedded digits: `gz train vae` works offline and takes about a minute.
    """
    from gzcli import launch
    from gzcli.cli.accelerate import told_before
    from gzcli.cli.anchor import anchor
    from gzcli.cli.options import parse_gpus
    from gzcli.cli.plan import show_memory, show_plan
    from gzcli.recipe.layers import MEETING
    from gzcli.recipe.resolve import resolve
    from gzcli.store import runs

    out.configure(lenient=True)  # a lost reader never stops a training
    if steps and minutes:
        raise UsageError("`--steps` and `--minutes` exclude each other")
    given = {
        "train.steps": steps,
        "train.minutes": minutes,
        "seed": seed,
        "launch.gpus": parse_gpus(gpus),
        "launch.cpu": cpu or None,
        "launch.processes": processes,
        "launch.machines": num_machines,
        "launch.machine_rank": machine_rank,
        "launch.main_ip": main_process_ip,
        "launch.main_port": main_process_port,
        "launch.wandb": wandb or None,
    }
    flags = {key: value for key, value in given.items() if value is not None}
    earlier = runs.by_name(what)
    if earlier is None:
        recipe = resolve(what, data=data, sets=sets or (), flags=flags)
    else:
        tree = earlier.tree()
        recipe = resolve(
            str(earlier.path / "run.yaml"), data=data or tree["data"]["name"], sets=sets or (), flags=flags
        )
    anchor(recipe.tree)
    run = None
    if resume or requeue:
        run = earlier or newest_unfinished(recipe, extend=steps is not None)
        if run is None and resume:
            raise MissingError(
                f"no unfinished run of `{recipe.card.name}` on `{recipe.tree['data']['name']}`",
                hint=f"gz train {what}" + (f" --data {data}" if data else ""),
            )
    plan = launch.plan(recipe.tree["launch"], every_gpu=True, check=not dry_run, extra=extra or ())
    if run is None and name is not None:
        runs.check_alias(name)
    if dry_run:
        show_plan(recipe, plan, run)
        return
    if run:
        recipe.tree = continued(run, recipe, steps)
    for tree in whole_trees(recipe.tree):
        check_batch(tree, plan.processes)
    recipe = with_data(recipe, run)
    new = run is None
    if new:
        run = runs.create(recipe.card.name, data_key(recipe), alias=name)
    elif before := told_before(run):
        out.info(f"note: it was started with `-- {' '.join(before)}`, which is not taken over: type it again")
    out.info(f"run: {run.id}")
    recipe.tree["launch"] |= dict.fromkeys(MEETING)  # of this start, not of the run; `env.json` has the words
    try:
        launch.write_run(run, recipe.tree, plan)
        if new:
            note_whole(run, recipe, earlier)
        show_memory(recipe, plan)
        launch.run(
            run.path,
            plan,
            launcher=True,
            mode="json" if out.is_json() else "quiet" if out.is_quiet() else "human",
        )
    except BaseException as error:
        error.event = "error"
        ours = not isinstance(error, KeyboardInterrupt) and getattr(error, "kind", "bug") == "bug"
        if new and runs.give_up(run, keep=ours):
            out.info(f"nothing was trained: `{run.id}` is removed again")
        raise
    pictures = sorted((run.serving.path / "samples").glob("*.png"))
    if pictures:
        out.text(str(pictures[-1]))


def note_whole(run: Run, recipe: Recipe, earlier: Run | None) -> None:
    """Notes in a new run what its recipe calls done; one that repeats another takes over what was noted
    there."""
    from gzcli.data.names import locate
    from gzcli.store import runs

    data, steps, size = recipe.tree["data"], dict(recipe.whole.steps), recipe.whole.size
    for name in steps if earlier else ():
        noted = (earlier.stage(name) if name else earlier).status().get("recipe") or {}
        steps[name] = noted.get("steps", steps[name])
    if earlier and earlier.data == run.data:
        size = (earlier.status().get("recipe") or {}).get("size")
    size = size or locate(data["name"]).size
    runs.note_recipe(run, steps, size, size=data["size"], levels=data["levels"])


def whole_trees(tree: dict[str, Any]) -> list[dict[str, Any]]:
    """The recipe, or that of each stage that is to be trained."""
    from gzcli.recipe.stages import trees

    return list(trees(tree).values()) if "stages" in tree else [tree]


def with_data(recipe: Recipe, run: Run | None = None) -> Recipe:
    """The recipe with what only the data can tell: size, channels and levels. Fetches and packs the set if
    need be.

    Raises UsageError where the model needs labels, or other things, that the set has not, and MissingError
    where `run`, which is to go on, was trained on other images.
    """
    from gzcli.data import same
    from gzcli.data.open import open_named
    from gzcli.models.catalog import card
    from gzcli.recipe.resolve import check_data

    data = recipe.tree["data"]
    with out.progress("packing", unit="images") as report:
        meta = open_named(
            data["name"], size=data["size"], channels=data["channels"], say=out.info, progress=report
        ).meta
    if run is not None:
        same.hold(run.path, meta)
    for tree in whole_trees(recipe.tree):
        check_data(tree, card(tree["model"]["name"]), meta.classes, meta.name, meta.extras)
    recipe.tree["data"] = data | {
        "channels": meta.shape[0],
        "size": meta.shape[1],
        "levels": data["levels"] or meta.levels,
    }
    return recipe


def data_key(recipe: Recipe) -> str:
    from gzcli.data.names import data_key

    return data_key(recipe.tree["data"]["name"])


def check_batch(tree: dict[str, Any], processes: int) -> None:
    size, parts = tree["train"]["batch_size"], processes * tree["train"]["accumulate"]
    if size % parts:
        near = max(parts, round(size / parts) * parts)
        raise UsageError(
            f"`train.batch_size` is the global batch: {size} does not divide into {processes} process"
            f"{'es' if processes > 1 else ''} × {tree['train']['accumulate']} parts",
            hint=f"--set train.batch_size={near}",
        )


def newest_unfinished(recipe: Recipe, *, extend: bool) -> Run | None:
    """The newest run of the same model and data that is not finished; with a new `--steps`, a finished one
    too."""
    from gzcli.store import runs

    found = runs.all_runs(model=recipe.card.name, data=data_key(recipe))
    idle = [run for run in found if run.state != "running" and (run.path / "run.yaml").exists()]
    unfinished = [run for run in idle if run.state != "finished" and (run.state != "failed" or run.has_begun)]
    return next(iter(unfinished or (idle if extend else [])), None)


def continued(run: Run, recipe: Recipe, steps: int | None) -> dict[str, Any]:
    """The run's own recipe, with more steps if asked, on the devices of now.

    Raises UsageError that lists what was asked for and differs from it.
    """
    if run.state == "running":
        raise UsageError(f"`{run.id}` is being trained by process {run.status().get('pid')}")
    tree = run.tree()
    differ = []
    for key, origin in recipe.origin.items():
        if origin.startswith("--") and not key.startswith("launch.") and not key.endswith("train.steps"):
            old, new = dig(tree, key), dig(recipe.tree, key)
            if old != new:
                differ.append(f"  {key}: {old} in the run, {new} asked for")
    parts = parts_to_train(run) if steps is not None else []
    for part in parts:
        if steps < (done := part.status().get("step", 0)):
            differ.append(f"  train.steps: the run has done {done}, {steps} asked for")
    if differ:
        raise UsageError(
            "\n".join([f"`{run.id}` cannot go on with another recipe", *differ]),
            hint="leave them out, or start a new run without `--resume`",
        )
    for part in parts:
        section = tree if part.owner is part else tree["stages"][part.path.name]
        section["train"] = section["train"] | {"steps": steps, "minutes": None}
    given = [key for key in recipe.tree["launch"] if recipe.origin.get(f"launch.{key}", "").startswith("--")]
    tree["launch"] = tree["launch"] | {key: recipe.tree["launch"][key] for key in given}
    return tree


def parts_to_train(run: Run) -> list[Run]:
    """What a new `--steps` is for: the run, or its unfinished stages; the last where all are finished, as
    those before it must stay what it was trained with."""
    stages = [stage for stage in run.stages if stage.state != "finished"]
    return stages or [run.serving]


def dig(tree: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        tree = tree[part] if isinstance(tree, dict) and part in tree else {}
    return tree
