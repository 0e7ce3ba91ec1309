"""`gz train`: creates a run from a recipe, trains it, and prints the path of an image of samples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

from gzcli.cli import options as opt
from gzcli.cli import out
from gzcli.cli.options import a_model_or_run, argument, option, split
from gzcli.core.errors import MissingError, UsageError, choose, install_line
from gzcli.core.hints import gz
from gzcli.core.trackers import TRACKERS
from gzcli.data.sets.registry import locate
from gzcli.recipe.suggest import suggest

if TYPE_CHECKING:
    from gzcli.store.run_folder import Run


_WHAT_HELP = (
    "A model, a recipe file, or a run to repeat. With `--data`, also weights to start from: a run, a file, "
    "pretrained:NAME or hf://OWNER/NAME. Default: the model that suits the data set."
)
_What = Annotated[str | None, argument("MODEL|RECIPE|RUN|FILE", _WHAT_HELP, a_model_or_run)]
_Steps = Annotated[int | None, option("--steps N", "Train for N steps.", min=1)]
_MINUTES_HELP = (
    "Train for as many steps as fit in M minutes of wall-clock time (CPU time with `--set train.clock=cpu`)."
)
_MINUTES = option("--minutes M", _MINUTES_HELP, min=0.05)
_Minutes = Annotated[float | None, _MINUTES]
# words of other programs for keys of the recipe: they are understood, and the help does not show them
_Epochs = Annotated[float | None, option("--epochs N", min=0.001, max=1e9, hidden=True)]
_Batch = Annotated[int | None, option("--batch-size N", min=1, hidden=True)]
_Rate = Annotated[float | None, option("--lr --learning-rate X", hidden=True)]
_Size = Annotated[str | None, option("--size --resolution S", hidden=True)]
_Name = Annotated[str | None, option("--name ALIAS", "A second name for the run.")]
_Resume = Annotated[bool, option("--resume", "Resume the newest unfinished run, or the given RUN.")]
_Requeue = Annotated[bool, option("--requeue", "Resume if possible, otherwise start.")]
_Wandb = Annotated[bool, option("--wandb", "The same as `--track wandb`.")]
_TRACK_HELP = f"Also log to {', '.join(TRACKERS)}; repeatable."
_Track = Annotated[list[str] | None, option("--track T", _TRACK_HELP, complete=TRACKERS)]
_Dry = Annotated[bool, option("--dry-run", "Print the plan without training.")]
_Keys = Annotated[
    bool, option("--keys", "With `--dry-run`: also print every key and the origin of its value.")
]
_Yes = Annotated[bool, option("--yes", "Start without asking, even if training takes more than a week.")]
_several = partial(option, panel="Several machines")
_Machines = Annotated[int | None, _several("--num-machines N", "Number of machines.", min=1)]
_Rank = Annotated[int | None, _several("--machine-rank R", "Index of this machine, from 0.", min=0)]
_Ip = Annotated[str | None, _several("--main-process-ip HOST", "Address of machine 0.")]
_PORT = _several("--main-process-port P", "Port of machine 0. Default: derived from the job.")
_Port = Annotated[int | None, _PORT]


def train(
    what: _What = None,
    data: opt.Data = None,
    scale: opt.Scale = None,
    gpus: opt.Gpus = None,
    steps: _Steps = None,
    minutes: _Minutes = None,
    epochs: _Epochs = None,
    batch_size: _Batch = None,
    lr: _Rate = None,
    size: _Size = None,
    seed: opt.Seed = None,
    name: _Name = None,
    sets: opt.Sets = None,
    resume: _Resume = False,
    requeue: _Requeue = False,
    wandb: _Wandb = False,
    track: _Track = None,
    cpu: opt.Cpu = False,
    processes: opt.Processes = None,
    num_machines: _Machines = None,
    machine_rank: _Rank = None,
    main_process_ip: _Ip = None,
    main_process_port: _Port = None,
    submit: opt.Submit = None,
    slurm: opt.Slurm = None,
    dry_run: _Dry = False,
    keys: _Keys = False,
    yes: _Yes = False,
    opened: opt.Open = False,
    extra: opt.Extra = None,
) -> None:
    """Train a model.

    If you omit `--data`, gz uses an embedded data set: `gz train cvae` works offline and takes about a
    minute. To fine-tune trained weights, name them: `gz train pretrained:fm --data ./photos`.
    """
    from gzcli.cli import jobs, plan
    from gzcli.launch.plan import ask, prepare
    from gzcli.recipe.yaml import scalar
    from gzcli.store.runs import check_alias

    out.configure(lenient=True)  # a lost reader never stops a training
    what = what or suggested(data)
    lengths = {"--steps": steps, "--minutes": minutes, "--epochs": epochs}
    if len(typed := [f"`{flag}`" for flag, value in lengths.items() if value]) > 1:
        raise UsageError(f"{' and '.join(typed)} cannot be used together")
    if keys and not dry_run:
        raise UsageError("`--keys` needs `--dry-run`", hint=gz("recipe show", what, resolved=True))
    flags = {
        "scale": scale,
        "train.steps": steps,
        "train.minutes": minutes,
        "train.batch_size": batch_size,
        "optim.lr": lr,
        "data.size": scalar(size) if size else None,
        "seed": seed,
        "launch.gpus": opt.parse_gpus(gpus),
        "launch.cpu": cpu or None,
        "launch.processes": processes,
        "launch.machines": num_machines,
        "launch.machine_rank": machine_rank,
        "launch.main_ip": main_process_ip,
        "launch.main_port": main_process_port,
        "launch.track": check_trackers([*(track or ()), *(["wandb"] if wandb else [])]),
    }
    request = ask(what, data, sets or (), flags, epochs=epochs, say=out.info, resume=resume)
    if lr is not None:
        places = (f"stages.{part.stage}." if part.stage else "" for part in request.recipe.parts)
        out.info(f"learning rate {lr:g}: {' '.join(f'--set {place}optim.lr={lr:g}' for place in places)}")
    if submit or slurm:
        if name is not None:
            check_alias(f"{name}-1")  # the job's number follows
        seed, launch = request.recipe.seed, request.recipe.launch
        job = partial(jobs.submit, "train", name or request.recipe.card.name, seed, launch, slurm)
        return job("resumed" if resume else "named", dry_run=dry_run)
    start = prepare(request, alias=name, resume=resume, requeue=requeue, extra=extra or (), check=not dry_run)
    if start.plan.note:
        out.warn(start.plan.note)
    if dry_run:
        return plan.show_plan(start, keys=keys)
    if any(part.options.get("perceptual") == "lpips" for part in request.recipe.parts):
        jobs.fetch(["vgg16"])
    with out.progress("packing", unit="images") as report:
        recipe = start.recipe(say=out.info, progress=report)
    plan.before_start(start, recipe, yes=yes)
    try:
        run = start.train(recipe, mode=out.mode(), announce=announce, say=out.info)
    except BaseException as error:
        vars(error)["event"] = "error"  # `out.error` prints it as its own line
        raise
    if pictures := sorted(run.serving.samples_folder.glob("*.png")):
        out.picture(pictures[-1], opened=opened)
    if not start.plan.machine_rank:
        after_training(run)


def suggested(data: str | None) -> str:
    """The model suggested for a data set, which is printed. Raises UsageError if no set is named."""
    from gzcli.data.packs.open import facts_of

    if data is None:
        raise UsageError(
            "`gz train` needs a model or `--data`", hint="gz train cvae · gz train --data ./photos · gz list"
        )
    facts = facts_of(locate(data))
    model = suggest(facts.classes if facts else None)
    out.info(f"model: {model}")
    return model


def announce(run: Run) -> None:
    out.info(f"run: {run.id}")


def check_trackers(texts: Sequence[str]) -> list[str] | None:
    """The trackers of `--track`, whose values may be lists such as `wandb,mlflow`; None if there are none."""
    trackers = [choose("tracker", word, TRACKERS) for text in texts for word in split(text)]
    for name in trackers:
        if find_spec(name) is None:
            raise MissingError(f"`--track {name}` needs the package `{name}`", hint=install_line(name))
    return trackers or None


def after_training(run: Run) -> None:
    """Prints the best metric, time and size, and the commands that draw from the run and evaluate it."""
    from gzcli.cli.jobs import end, name_of
    from gzcli.store.metrics import in_words, summary
    from gzcli.store.runs import all_runs

    row, name = summary(run), name_of(run)
    shown, best = in_words(row), row["best"]
    best_one = f"best {shown['best']} at step {best['step']:,}" if best else None
    params = f"{shown['params']} parameters" if shown["params"] else None
    second = (f"gz bench {name}", "compare with real images")
    finished = [r for r in all_runs(data=run.data) if r.state == "finished" and r.path != run.path]
    if finished:
        like = next((r for r in finished if r.model == run.model), finished[0])
        second = (f"gz runs compare {name} {name_of(like)}", "compare the two runs")
    end([best_one, shown["time"], params, shown["size"]], [(f"gz sample {name}", "draw images"), second])
