"""`gz train`: makes a run of a recipe, launches its training, and prints the path of a picture of samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gzcli.cli import out
from gzcli.cli.model_options import Sets
from gzcli.cli.options import (
    Cpu,
    Data,
    Extra,
    Gpus,
    Json,
    Processes,
    Quiet,
    Scale,
    Seed,
    Slurm,
    Submit,
    complete_model_or_run,
)
from gzcli.cli.trackers import check_trackers, complete_trackers
from gzcli.core.errors import MissingError, UsageError

if TYPE_CHECKING:
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
# words of other programs, which are keys here: they are understood, and the help names the keys alone
_Epochs = Annotated[float | None, typer.Option("--epochs", metavar="N", min=0.001, hidden=True)]
_Batch = Annotated[int | None, typer.Option("--batch-size", metavar="N", min=1, hidden=True)]
_Rate = Annotated[float | None, typer.Option("--lr", "--learning-rate", metavar="X", hidden=True)]
_Name = Annotated[str | None, typer.Option("--name", metavar="ALIAS", help="A second name for the run.")]
_Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the newest unfinished run, or the RUN named.")
]
_Requeue = Annotated[
    bool, typer.Option("--requeue", help="Resume if there is something to resume, start otherwise.")
]
_Wandb = Annotated[bool, typer.Option("--wandb", help="The same as `--track wandb`.")]
_Track = Annotated[
    list[str] | None,
    typer.Option(
        "--track",
        metavar="T",
        help="Log to wandb, tensorboard, trackio or mlflow too; may be repeated.",
        autocompletion=complete_trackers,
    ),
]
_Dry = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and do nothing.")]
_Keys = Annotated[
    bool, typer.Option("--keys", help="With `--dry-run`: every key too, and where its value comes from.")
]
_Yes = Annotated[bool, typer.Option("--yes", help="Start also what takes more than a week here.")]
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
    int | None,
    typer.Option(
        "--main-process-port",
        metavar="P",
        help="Its port; it follows from the job if it is not given.",
        rich_help_panel=_PANEL,
    ),
]


def train(
    what: _What,
    data: Data = None,
    scale: Scale = None,
    gpus: Gpus = None,
    steps: _Steps = None,
    minutes: _Minutes = None,
    epochs: _Epochs = None,
    batch_size: _Batch = None,
    lr: _Rate = None,
    seed: Seed = None,
    name: _Name = None,
    sets: Sets = None,
    resume: _Resume = False,
    requeue: _Requeue = False,
    wandb: _Wandb = False,
    track: _Track = None,
    cpu: Cpu = False,
    processes: Processes = None,
    num_machines: _Machines = None,
    machine_rank: _Rank = None,
    main_process_ip: _Ip = None,
    main_process_port: _Port = None,
    submit: Submit = None,
    slurm: Slurm = None,
    dry_run: _Dry = False,
    keys: _Keys = False,
    yes: _Yes = False,
    extra: Extra = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a model.

    Without `--data` it trains on an embedded set: `gz train cvae` works offline and takes about a minute.
    """
    from gzcli.cli.dry_run import show_plan
    from gzcli.cli.ends import after_training
    from gzcli.cli.options import parse_gpus
    from gzcli.cli.plan import at_paper, before_start
    from gzcli.cli.submit import submit_training
    from gzcli.cli.weights import bring
    from gzcli.launch import launcher
    from gzcli.launch import plan as planning
    from gzcli.launch.accelerate import previous_words
    from gzcli.launch.requirements import in_steps
    from gzcli.store import runs

    out.configure(lenient=True)  # a lost reader never stops a training
    lengths = {"--steps": steps, "--minutes": minutes, "--epochs": epochs}
    if len(given := [f"`{flag}`" for flag, value in lengths.items() if value]) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other")
    if keys and not dry_run:
        raise UsageError("`--keys` goes with `--dry-run`", hint=f"gz recipe show {what} --resolved")
    flags = {
        "scale": scale,
        "train.steps": steps,
        "train.minutes": minutes,
        "train.batch_size": batch_size,
        "optim.lr": lr,
        "seed": seed,
        "launch.gpus": parse_gpus(gpus),
        "launch.cpu": cpu or None,
        "launch.processes": processes,
        "launch.machines": num_machines,
        "launch.machine_rank": machine_rank,
        "launch.main_ip": main_process_ip,
        "launch.main_port": main_process_port,
        "launch.wandb": wandb or None,
        "launch.track": check_trackers(track, wandb=wandb),
    }
    asked = planning.ask(what, data, sets or (), flags)
    if epochs:
        counted = in_steps(asked.recipe, epochs, say=out.info)
        flags |= counted
        asked, steps = planning.ask(what, data, sets or (), flags), counted.get("train.steps")
    model, run = asked.recipe.card.name, None
    if submit or slurm:
        return submit_training(asked, name, resume=resume, options=slurm or (), dry_run=dry_run)
    shared = [value for key, value in flags.items() if key != "launch.machine_rank"]
    typed = (what, data, *(sets or ()), *shared, name)
    plan = launcher.plan(asked.recipe.launch, every_gpu=True, check=not dry_run, job=typed, extra=extra or ())
    if plan.note:
        out.warn(plan.note)
    if (resume or requeue) and not plan.machine_rank:
        run = asked.to_resume(extend=steps is not None, alias=name if requeue else None)
        if run is None and resume:
            raise MissingError(
                f"no unfinished run of `{model}` on `{asked.recipe.data.name}`",
                hint=f"gz train {what}" + (f" --data {data}" if data else ""),
            )
        if run and plan.machines == 1:
            again = planning.launched_again(run, asked.recipe)
            plan = launcher.plan(again, every_gpu=True, check=not dry_run, extra=extra or ())
    if run is None and name is not None and not plan.machine_rank:
        runs.check_alias(name)
    paper = None if run else at_paper(what, data, sets or (), flags, asked.recipe)
    if dry_run:
        show_plan(asked.recipe, plan, run, paper, keys=keys)
        return
    if any(part.options.get("perceptual") == "lpips" for part in asked.recipe.parts):
        bring(["vgg16"])
    with out.progress("packing", unit="images") as report:
        recipe = planning.ready(asked, run, steps, plan.processes, say=out.info, progress=report)
    if run and (before := previous_words(run)):
        out.info(f"note: it was started with `-- {' '.join(before)}`, which is not taken over: type it again")
    if run is None and not plan.machine_rank:
        before_start(asked.recipe, recipe, plan, paper, yes=yes)

    def announce(run: Run) -> None:
        out.info(f"run: {run.id}")

    mode = "json" if out.is_json() else "quiet" if out.is_quiet() else "human"
    try:
        run = planning.start(asked, recipe, plan, run, alias=name, mode=mode, announce=announce, say=out.info)
    except BaseException as error:
        vars(error)["event"] = "error"  # `out.error` prints it as a line of its own
        raise
    pictures = sorted(run.serving.samples_folder.glob("*.png"))
    if pictures:
        out.text(str(pictures[-1]))
    if not plan.machine_rank:
        after_training(run)
