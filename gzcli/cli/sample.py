"""`gz sample`: images from a trained model, or one of its applications."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gzcli.cli.ends import end, quoted, took
from gzcli.cli.jobs import OWN_OPTIONS
from gzcli.cli.model_options import complete_do, complete_labels, labels_of
from gzcli.cli.options import (
    Checkpoint,
    Cpu,
    Data,
    Gpus,
    Json,
    Model,
    Precision,
    Pretrained,
    Processes,
    Quiet,
    SeedOrZero,
    Slurm,
    Submit,
    choose,
    spelled,
)
from gzcli.core.errors import GzError, UsageError, canonical, did_you_mean
from gzcli.data.readers.kinds import counted
from gzcli.data.sets.labels import chosen, in_turns

if TYPE_CHECKING:
    from gzcli.core.parts import Part
    from gzcli.models.catalog import ModelCard
    from gzcli.store.runs import Run

MANY = 64  # images, if no other number is asked for

_N = Annotated[
    int | None,
    typer.Option(
        "-n",
        metavar="N",
        min=1,
        help="How many images; about 64, as many of each class, or one for each prompt or input picture.",
    ),
]
_Label = Annotated[
    str | None,
    typer.Option(
        "--label",
        metavar="L[,L…]",
        help="Class names or numbers, for conditional models; as '\"x,y\"' with a comma.",
        autocompletion=complete_labels,
    ),
]
_Prompt = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt",
        metavar="TEXT",
        help="What to show, for models that take text; may be repeated, images take turns.",
    ),
]
_Prompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help="Prompts, one a line; `#` begins a comment.",
        exists=True,
        dir_okay=False,
    ),
]
_Do = Annotated[
    str | None,
    typer.Option(
        "--do", metavar="METHOD", help="An application: inpaint, interpolate, …", autocompletion=complete_do
    ),
]
_Input = Annotated[
    Path | None,
    typer.Option(
        "--input",
        metavar="PATH",
        help="Pictures for `--do` (test images without it), or that images are made from.",
        exists=True,
        resolve_path=True,
    ),
]
_Mask = Annotated[
    Path | None,
    typer.Option(
        "--mask", metavar="PATH", help="White is kept, black filled in.", exists=True, resolve_path=True
    ),
]
_Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="Where to write; into the run's folder without it."),
]
_Npz = Annotated[bool, typer.Option("--npz", help="Write samples.npz too: uint8 [N, H, W, C], and labels.")]
_Animate = Annotated[
    bool, typer.Option("--animate", help="Write animation.gif: the first 16 images while they are drawn.")
]
_Like = Annotated[
    Path | None,
    typer.Option(
        "--like",
        metavar="PICTURE",
        help="Draw again what this PNG of `gz sample` shows; MODEL may be left out.",
        exists=True,
        dir_okay=False,
        resolve_path=True,
    ),
]
_Png = Annotated[bool, typer.Option("--png", help="Write single PNGs of more than 256 images too.")]

SETTINGS = OWN_OPTIONS


def sample(
    ctx: typer.Context,
    model: Model = "",
    pretrained: Pretrained = False,
    data: Data = None,
    n: _N = None,
    label: _Label = None,
    prompt: _Prompt = None,
    prompts: _Prompts = None,
    seed: SeedOrZero = 0,
    do: _Do = None,
    like: _Like = None,
    input: _Input = None,
    mask: _Mask = None,
    checkpoint: Checkpoint = "last",
    gpus: Gpus = None,
    cpu: Cpu = False,
    processes: Processes = None,
    precision: Precision = None,
    out_dir: _Out = None,
    npz: _Npz = False,
    png: _Png = False,
    animate: _Animate = False,
    submit: Submit = None,
    slurm: Slurm = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw images from a trained model, or apply it to pictures (`--do`).

    The model's own options (`--steps 50`, `--temperature 0.7`) are those of its recipe's `sample` section, or
    of the method.
    """
    began = monotonic()
    from gzcli.cli.drawn import place, tell
    from gzcli.cli.jobs import announce, do_job, method_options, processes_of
    from gzcli.cli.like import draw_like, origin_of_job
    from gzcli.cli.submit import submit_verb
    from gzcli.core.jobs import SampleJob
    from gzcli.core.parts import part_of
    from gzcli.data.sets.names import data_key
    from gzcli.launch.from_file import find_run
    from gzcli.models.catalog import card_of

    if like:
        launch = processes_of(gpus, cpu, processes)
        if submit or slurm:
            return submit_verb("sample", model or like.stem, seed, launch, slurm or ())
        given = {"n": n, "labels": label, "prompts": prompt or prompts, "do": do, "options": ctx.args}
        job = SampleJob("", npz=npz, png=png, animate=animate, launch=launch)
        job = replace(job, input=str(input) if input else None, mask=str(mask) if mask else None)
        return draw_like(like, model, given, job, out_dir)
    if not model:
        raise UsageError("`gz sample` needs a model, a run or a file", hint="gz sample vae")
    key = data_key(data) if data else None
    model = spelled(model, pretrained)
    run = find_run(model, data=key)
    part = part_of(run.serving.tree())
    known = card_of(run, part.model)
    if do:
        do = choose_application(do, known)
    check_pictures(known, do, input, mask)
    conditional = bool(part.options.get("conditional"))
    if do in known.with_labels and not conditional:
        raise not_labelled(run, f"`--do {do}` is for runs that were trained with labels, unlike `{run.id}`")
    if label:
        check_labels(known, do, run, conditional=conditional)
    what, takes = (f"`--do {do}`", known.do[do]) if do else (f"`{known.name}`", known.sample)
    texts = read_prompts(prompt or [], prompts)
    if texts and "prompt" not in takes:
        raise UsageError(f"{what} takes no prompts", hint=without_prompts(known))
    options = method_options(ctx.args, takes, what, "sample")
    if n is None and (do or not input):  # without `--do`, only the engine knows how many pictures there are
        n = MANY if do else len(texts) or in_turns(MANY, turn_of(part, label))
    launch = processes_of(gpus, cpu, processes)
    if submit or slurm:
        return submit_verb("sample", model, seed, launch, slurm or ())
    announce(run, model, data=key)
    name = do or (f"n{n}" if n else "from-input")
    folder = place(out_dir, run, name)
    job = SampleJob(
        str(run.path),
        checkpoint,
        n,
        seed,
        label,
        tuple(texts),
        options,
        do,
        input=str(input) if input else None,
        input_as=known.inputs[0] if input and not do else None,
        mask=str(mask) if mask else None,
        npz=npz,
        png=png,
        animate=animate,
        precision=precision,
        launch=launch,
    )
    result = do_job(folder, replace(job, origin=origin_of_job(job, run)))
    tell(result)
    able = [name for name in known.do if conditional or name not in known.with_labels]
    ended(quoted(model) + (f" --data {quoted(data)}" if data else ""), able, do, result, took(began))


def turn_of(part: Part, label: str | None) -> int:
    """The number of classes that samples of a model take in turn; 0 where they take none, or where the
    classes are not known before the engine runs, which then says what is wrong with a label."""
    if part.options.get("conditional"):
        with suppress(GzError):
            classes = labels_of(None, part.data.name)
            return len(chosen(label, classes)) if label else len(classes)
    return 0


def ended(name: str, able: Iterable[str], do: str | None, result: Mapping[str, Any], time: str) -> None:
    """The end of `gz sample`: how many images in what time, and what else the run can do.

    name: the words that mean the run.
    able: its applications.
    do: the application; None: images were drawn.
    time: that the verb took.
    """
    others = [other for other in able if other != do]
    then = [(f"gz sample {name} --do {others[0]}", f"it can {', '.join(others)}")] if others else []
    if do:
        then.append((f"gz sample {name} --do {do} --input ./pictures", "the same with your own pictures"))
    else:
        then.append((f"gz bench {name}", "how good they are, beside real images"))
    each = f"{result['seconds'] / result['n']:.2g} s an image" if result["n"] and result["seconds"] else None
    end([counted(result["n"], "image"), time, each], then)


def check_pictures(model: ModelCard, do: str | None, input: Path | None, mask: Path | None) -> None:
    """Raises UsageError where the application `do`, or sampling without one, takes no input or no mask."""
    if not do and (mask or (input and not model.inputs)):
        raise UsageError(f"`{'--mask' if mask else '--input'}` goes with `--do`", hint=abilities(model))
    if mask and do not in model.masked:
        others = "`gz list models --can inpaint` shows models that take one"
        hint = f"these do: {', '.join(model.masked)}" if model.masked else others
        raise UsageError(f"`--do {do}` of `{model.name}` takes no mask", hint=hint)


def check_labels(model: ModelCard, do: str | None, run: Run, *, conditional: bool) -> None:
    """Raises UsageError where `--label` has no effect on the application `do`, or on samples of this run."""
    if do and do not in model.labelled:
        raise UsageError(
            f"`--do {do}` of `{model.name}` takes no labels",
            hint=f"these do: {', '.join(model.labelled) or 'none'}",
        )
    if not conditional and do not in model.labels_for:
        raise not_labelled(run, f"`{run.id}` was not trained with labels")


def not_labelled(run: Run, message: str) -> UsageError:
    """The error of what needs a run that was trained with labels: how to train one."""
    key = f"{run.serving.in_owner}model.conditional"
    return UsageError(message, hint=f"gz train {run.model} --data {run.data} --set {key}=true")


def choose_application(word: str, model: ModelCard) -> str:
    """The application of the model that the word means.

    Raises UsageError that hints at the nearest name, or at models that have the application.
    """
    from gzcli.models.catalog import APPLICATIONS

    name = canonical(word)
    if name in APPLICATIONS and name not in model.do:
        hint = f"{abilities(model)}; `gz list models --can {name}` shows models that do"
        raise UsageError(f"`{model.name}` does not {name}", hint=hint)
    if not model.do:
        hint = did_you_mean(word, APPLICATIONS) or abilities(model)
        raise UsageError(f"`{model.name}` has no applications, so none is called `{word}`", hint=hint)
    return choose(f"application of `{model.name}`", word, model.do)


def abilities(model: ModelCard) -> str:
    """A hint: the applications of a model."""
    return f"`{model.name}` can: {', '.join(model.do) or 'sample only'}"


def read_prompts(given: list[str], file: Path | None) -> list[str]:
    """The prompts of the command line, then those of a file.

    Raises UsageError for a file that is not text or holds no prompt.
    """
    if file is None:
        return given
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as e:
        raise UsageError(f"`{file}` is not UTF-8 text", hint="prompts are plain text, one a line") from e
    if not (found := [line for line in lines if line and not line.startswith("#")]):
        raise UsageError(
            f"`{file}` holds no prompts", hint="write them one a line; lines that begin with `#` are left out"
        )
    return given + found


def without_prompts(model: ModelCard) -> str:
    """A hint: what to use with a model that takes no prompts."""
    if "conditional" in model.can:
        return "`--label` asks for a class"
    return "`gz list models --can prompt` shows models that do"
