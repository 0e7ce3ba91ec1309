"""`gz sample`: images from a trained model, or one of its applications; `--like PICTURE` repeats an earlier
`gz sample` from one of its pictures."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gzcli.cli import out
from gzcli.cli.jobs import OWN_OPTIONS, end, quoted, took
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
from gzcli.core.errors import GzError, MissingError, UsageError, canonical, did_you_mean
from gzcli.core.units import counted
from gzcli.data.sets.names import class_numbers, in_turns
from gzcli.store.files import checksum

if TYPE_CHECKING:
    from gzcli.core.jobs import SampleJob
    from gzcli.core.parts import Part
    from gzcli.models.catalog import ModelCard
    from gzcli.store.runs import Run

MANY = 64  # images, if no other number is asked for
# what a picture decides by itself: key of its origin → the option that would change it
DECIDED = {"n": "-n", "labels": "--label", "prompts": "--prompt", "do": "--do", "options": "options"}
SETTINGS = OWN_OPTIONS

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
    from gzcli.cli.jobs import announce, do_job, method_options, processes_of
    from gzcli.cli.submit import submit_verb
    from gzcli.core.jobs import SampleJob
    from gzcli.core.parts import part_of
    from gzcli.data.sets.names import data_key
    from gzcli.launch.from_file import find_run
    from gzcli.models.catalog import card_of

    job = SampleJob("", npz=npz, png=png, animate=animate)  # the rest follows from the run
    job = replace(job, input=str(input) if input else None, mask=str(mask) if mask else None)
    if like:
        job = replace(job, launch=processes_of(gpus, cpu, processes))
        if submit or slurm:
            return submit_verb("sample", model or like.stem, seed, job.launch, slurm or ())
        both = {"n": n, "labels": label, "prompts": prompt or prompts, "do": do, "options": ctx.args}
        return draw_like(like, model, both, job, out_dir)
    if not model:
        raise UsageError("`gz sample` needs a model, a run or a file", hint="gz sample vae")
    key = data_key(data) if data else None
    model = spelled(model, pretrained)
    run = find_run(model, data=key)
    part = part_of(run.serving.tree())
    card = card_of(run, part.model)
    conditional = bool(part.options.get("conditional"))
    do = choose_application(do, card) if do else None
    check_pictures(card, do, input, mask)
    check_labels(card, do, run, label, conditional=conditional)
    what, takes = (f"`--do {do}`", card.do[do]) if do else (f"`{card.name}`", card.sample)
    texts = read_prompts(prompt or [], prompts)
    if texts and "prompt" not in takes:
        raise UsageError(f"{what} takes no prompts", hint=without_prompts(card))
    options = method_options(ctx.args, takes, what, "sample")
    if n is None and (do or not input):  # without `--do`, only the engine knows how many pictures there are
        n = MANY if do else len(texts) or in_turns(MANY, turn_of(part, label))
    launch = processes_of(gpus, cpu, processes)
    if submit or slurm:
        return submit_verb("sample", model, seed, launch, slurm or ())
    announce(run, model, data=key)
    name = do or (f"n{n}" if n else "from-input")
    folder = folder_of(out_dir, run, name)
    job = replace(
        job,
        run=str(run.path),
        checkpoint=checkpoint,
        n=n,
        seed=seed,
        labels=label,
        prompts=tuple(texts),
        options=options,
        do=do,
        input_as=card.inputs[0] if input and not do else None,
        precision=precision,
        launch=launch,
    )
    result = do_job(folder, replace(job, origin=origin_of_job(job, run)))
    show(result)
    able = [name for name in card.do if conditional or name not in card.with_labels]
    ending(quoted(model) + (f" --data {quoted(data)}" if data else ""), able, do, result, took(began))


def turn_of(part: Part, label: str | None) -> int:
    """The number of classes that samples of a model take in turn; 0 where they take none, or where the
    classes are not known before the engine runs, which then says what is wrong with a label."""
    if part.options.get("conditional"):
        with suppress(GzError):
            classes = labels_of(None, part.data.name)
            return len(class_numbers(label, classes)) if label else len(classes)
    return 0


def ending(name: str, able: Iterable[str], do: str | None, result: Mapping[str, Any], time: str) -> None:
    """The end of `gz sample`: how many images in what time, and what else the run can do."""
    others = [other for other in able if other != do]
    then = [(f"gz sample {name} --do {others[0]}", f"it can {', '.join(others)}")] if others else []
    if do:
        then.append((f"gz sample {name} --do {do} --input ./pictures", "the same with your own pictures"))
    else:
        then.append((f"gz bench {name}", "how good they are, beside real images"))
    each = f"{result['seconds'] / result['n']:.2g} s an image" if result["n"] and result["seconds"] else None
    end([counted(result["n"], "image"), time, each], then)


def folder_of(out_dir: Path | None, run: Run, name: str) -> Path:
    """The folder of a job: that of `--out`, else a new one below the run."""
    from gzcli.cli.jobs import new_folder

    return out_dir.absolute() if out_dir else new_folder(run.path / "sampled", name)


def show(result: Mapping[str, Any]) -> None:
    """Prints what was drawn."""
    for path in (result["grid"], result["npz"], result["animation"]):
        if path:
            out.text(path)
    for name, value in result.get("figures", {}).items():
        out.info(f"{name}: {value:.3f} of {result['n']:,} images")
    if not result["files"] and not result["npz"]:
        out.info(f"{result['n']:,} images: all on one sheet, none by itself")
        out.hint("`--png` writes each of them, `--npz` all in one file")
    out.data(result)


# ---------------------------------------------------------------------------- what was asked for


def check_pictures(model: ModelCard, do: str | None, input: Path | None, mask: Path | None) -> None:
    """Raises UsageError where the application `do`, or sampling without one, takes no input or no mask."""
    if not do and (mask or (input and not model.inputs)):
        raise UsageError(f"`{'--mask' if mask else '--input'}` goes with `--do`", hint=abilities(model))
    if mask and do not in model.masked:
        others = "`gz list models --can inpaint` shows models that take one"
        hint = f"these do: {', '.join(model.masked)}" if model.masked else others
        raise UsageError(f"`--do {do}` of `{model.name}` takes no mask", hint=hint)


def check_labels(model: ModelCard, do: str | None, run: Run, label: str | None, *, conditional: bool) -> None:
    """Raises UsageError where the application `do` needs a run that was trained with labels, or where
    `--label` has no effect on it, or on samples of this run."""
    if do in model.with_labels and not conditional:
        raise not_labelled(run, f"`--do {do}` is for runs that were trained with labels, unlike `{run.id}`")
    if not label:
        return
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
    """The application of the model that the word means."""
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


def read_prompts(typed: list[str], file: Path | None) -> list[str]:
    """The prompts of the command line, then those of a file."""
    if file is None:
        return typed
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as e:
        raise UsageError(f"`{file}` is not UTF-8 text", hint="prompts are plain text, one a line") from e
    if not (prompts := [line for line in lines if line and not line.startswith("#")]):
        raise UsageError(
            f"`{file}` holds no prompts", hint="write them one a line; lines that begin with `#` are left out"
        )
    return typed + prompts


def without_prompts(model: ModelCard) -> str:
    """A hint: what to use with a model that takes no prompts."""
    if "conditional" in model.can:
        return "`--label` asks for a class"
    return "`gz list models --can prompt` shows models that do"


# ---------------------------------------------------------------------------- --like


def draw_like(
    picture: Path, model: str, also: Mapping[str, Any], job: SampleJob, out_dir: Path | None
) -> None:
    """Repeats the `gz sample` that drew a picture."""
    from gzcli.cli.jobs import announce, do_job

    run, job = job_of(picture, model, also, job)
    announce(run, str(run.path))
    result = do_job(folder_of(out_dir, run, "like"), replace(job, origin=origin_of_job(job, run)))
    show(result | {"like": compare(picture, result)})


def origin_of_job(job: SampleJob, run: Run) -> dict[str, Any]:
    """What the pictures of a job say of their making that the engine does not know: the command that makes
    them, without places of files, the origin of a shared run, and the hashes of the user's own pictures."""
    paths = {key: Path(path) for key, path in (("input", job.input), ("mask", job.mask)) if path}
    pictures = {key: {"name": path.name, "sha256": digest(path)} for key, path in paths.items()}
    return {"command": command(job, run), "from": run.status().get("from"), **pictures}


def command(job: SampleJob, run: Run) -> str:
    """The command line of a job, in one form however it was typed."""
    words = ["gz", "sample", run.id, *(["-n", str(job.n)] if job.n else []), "--seed", str(job.seed)]
    flags = {"label": job.labels, "do": job.do, "input": job.input, "mask": job.mask}
    if job.checkpoint not in ("last", "finished"):
        flags["checkpoint"] = job.checkpoint
    flags["precision"] = job.precision
    for name, value in flags.items():
        if value:
            words += [f"--{name}", Path(value).name if name in ("input", "mask") else value]
    for prompt in job.prompts:
        words += ["--prompt", prompt]
    for key, value in job.options.items():
        name = key.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}={value}"]
    return shlex.join(words)


def digest(path: Path) -> str:
    """The sha256 of a file; of a folder that of the names and checksums of all its files."""
    if path.is_file():
        return checksum(path)
    total = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        total.update(f"{file.relative_to(path).as_posix()}\0{checksum(file)}\n".encode())
    return total.hexdigest()


def job_of(picture: Path, model: str, also: Mapping[str, Any], job: SampleJob) -> tuple[Run, SampleJob]:
    """The run of a picture, and the job that draws it again."""
    from gzcli.store.png import origin_of

    facts = origin_of(picture)
    if facts.get("verb") != "sample":
        raise UsageError(f"`{picture}` was not drawn by `gz sample`", hint=_instead(facts))
    if both := [option for key, option in DECIDED.items() if also.get(key)]:
        raise UsageError(f"`--like` decides what is drawn, `{both[0]}` does too", hint=facts.get("command"))
    for key in ("input", "mask"):
        _check_picture(key, facts.get(key), getattr(job, key))
    run = _run_of(facts, model)
    drawn = {key: facts[key] for key in ("n", "seed", "labels", "options", "do", "input_as", "precision")}
    checkpoint = _with_weights(run, facts)
    prompts = tuple(facts["prompts"])
    png = job.png or facts.get("index") is not None
    return run, replace(job, run=str(run.path), checkpoint=checkpoint, prompts=prompts, png=png, **drawn)


def compare(picture: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """Compares a picture with its repetition: {file, same, most}, `most` being the largest difference of a
    pixel in grey levels, of 255; None where the sizes differ."""
    import numpy as np
    from PIL import Image

    from gzcli.store.png import origin_of

    facts = origin_of(picture)
    index = facts.get("index")
    file = result["grid"] if index is None else result["files"][index]
    then, now = (np.asarray(Image.open(path)).astype(int) for path in (picture, file))
    most = int(abs(then - now).max()) if then.shape == now.shape else None
    if most == 0:
        out.info(f"the same to the last bit: {file}")
    else:
        there, here = facts.get("device"), origin_of(Path(file)).get("device")
        why = f"drawn on {there}, now on {here}" if there != here else "other versions or threads"
        how = "of another size" if most is None else f"pixels differ by up to {most} of 255"
        out.info(f"note: {how} ({why}): {file}")
    return {"file": file, "same": most == 0, "most": most}


def _instead(facts: Mapping[str, Any]) -> str:
    """A hint: what draws a picture that another verb made."""
    run, verb = facts.get("run"), facts.get("verb")
    if verb == "train" and run and facts.get("step"):
        owner = run.partition("/")[0]
        return f"gz sample {owner} --checkpoint {facts['step']} -n {facts['n']}"
    return f"`gz {verb}` made it" if verb else "name a picture of `gz sample`"


def _check_picture(key: str, then: Mapping[str, Any] | None, now: str | None) -> None:
    """Raises UsageError unless the user names the same input, or mask, as the picture was made from."""
    if then is None and now is None:
        return
    if then is None:
        raise UsageError(f"the picture was drawn without `--{key}`")
    if now is None:
        raise UsageError(
            f"the picture was made from `{then['name']}`, which it does not hold",
            hint=f"name it: `--{key} PATH`",
        )
    if digest(Path(now)) != then["sha256"]:
        raise UsageError(f"`{now}` is not the `{then['name']}` that the picture was made from")


def _run_of(facts: Mapping[str, Any], model: str) -> Run:
    """The run that the user names, else the one that the picture names, else one with the same weights."""
    from gzcli.launch.from_file import find_run

    if model:
        return find_run(model)
    if run := next(_candidates(facts), None):
        return run
    source = facts.get("from") or "MODEL|FILE"
    raise MissingError(
        f"the picture is of the run `{facts['run']}`, which is not here",
        hint=f"gz sample {source} --like PICTURE",
    )


def _candidates(facts: Mapping[str, Any]) -> Iterator[Run]:
    """Runs that may be the picture's: by its id, of a file that was used before, by its weights."""
    from gzcli.store.paths import cache_dir
    from gzcli.store.runs import Run, all_runs

    here = all_runs()
    yield from (run for run in here if run.id == facts["run"])
    shared = cache_dir("files")
    yield from (Run(path) for path in shared.glob("*") if path.name == facts["run"])
    yield from (run for run in here if run.model == facts["model"] and _matching(run, facts))


def _matching(run: Run, facts: Mapping[str, Any]) -> str | None:
    """The checkpoint of a run that has the picture's weights, as `--checkpoint` takes it."""
    serving = run.serving
    step = int(facts["step"])
    places = {
        "finished": serving.model_file,
        str(step): serving.checkpoint(step).averaged,
    }
    same = (at for at, file in places.items() if file.is_file() and checksum(file) == facts["weights"])
    return next(same, None)


def _with_weights(run: Run, facts: Mapping[str, Any]) -> str:
    """The checkpoint of the run with the picture's weights. Raises MissingError where it has them not."""
    if checkpoint := _matching(run, facts):
        return checkpoint
    raise MissingError(
        f"`{run.id}` does not have the weights that drew the picture",
        hint=f"they were of step {facts['step']:,} of `{facts['run']}`, sha256 {facts['weights'][:12]}…",
    )
