"""`gz sample`: images from a trained model, or one of its applications; `--like IMAGE` repeats an earlier `gz
sample` from one of its images."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gzcli.cli import jobs, out
from gzcli.cli import options as opt
from gzcli.cli.jobs import end, quoted, took
from gzcli.cli.model_options import a_label, an_application
from gzcli.cli.options import option
from gzcli.core.errors import GzError, MissingError, UsageError, canonical, choose, did_you_mean
from gzcli.core.sections import LaunchSection
from gzcli.core.units import counted
from gzcli.data.sets.labels import class_names, class_numbers, in_turns
from gzcli.data.sets.registry import data_key, slug
from gzcli.launch.cost import UNKNOWN_IMAGE, Cost, sampling
from gzcli.store import claims
from gzcli.store.files import checksum
from gzcli.store.paths import cache_dir
from gzcli.store.png import FORMATS, origin_of
from gzcli.store.run_folder import Run
from gzcli.store.runs import all_runs

if TYPE_CHECKING:
    from gzcli.models.catalog import ModelCard
    from gzcli.store.jobs import SampleJob

    Sampling = tuple[Run, SampleJob, list[str]]  # a run, a job on it, and applications of the run

MANY = 64  # images, unless another number is requested
# what an image decides by itself: key of the job → the option that would change it
DECIDED = {"n": "-n", "labels": "--label", "prompts": "--prompt", "do": "--do"}
SETTINGS = jobs.OWN_OPTIONS

_N_HELP = "Number of images. Default: about 64, equally many per class, or one per prompt or input image."
_N = Annotated[int | None, option("-n N", _N_HELP, min=1)]
_LABEL_HELP = "Class names or numbers, for conditional models. Quote names that contain a comma: '\"x,y\"'."
_Label = Annotated[str | None, option("--label L[,L…]", _LABEL_HELP, complete=a_label)]
_PROMPT_HELP = "Prompt, for models that take text; repeatable, used in turn."
_Prompt = Annotated[list[str] | None, option("--prompt TEXT", _PROMPT_HELP)]
_PROMPTS_HELP = "File of prompts, one per line. `#` starts a comment."
_Prompts = Annotated[Path | None, option("--prompts FILE", _PROMPTS_HELP, exists=True, dir_okay=False)]
_DO_HELP = "An application: inpaint, interpolate, …"
_Do = Annotated[str | None, option("--do METHOD", _DO_HELP, complete=an_application)]
_INPUT_HELP = "Input images for `--do` or a conditional model. Default: test images."
_Input = Annotated[Path | None, option("--input PATH", _INPUT_HELP, exists=True, resolve_path=True)]
_MASK_HELP = "Mask image: white is kept, black is filled in."
_Mask = Annotated[Path | None, option("--mask PATH", _MASK_HELP, exists=True, resolve_path=True)]
_Out = Annotated[Path | None, option("--out DIR", "Output folder. Default: inside the run's folder.")]
_ANIMATE_HELP = "Write animation.gif: the sampling process of the first 16 images."
_Animate = Annotated[bool, option("--animate", _ANIMATE_HELP)]
_LIKE_HELP = "Redraw the image in this PNG from `gz sample`. Omit MODEL."
_LIKE = option("--like IMAGE", _LIKE_HELP, exists=True, dir_okay=False, resolve_path=True)
_Like = Annotated[Path | None, _LIKE]


@opt.with_flags("formats", {name: format.help for name, format in FORMATS.items()})
def sample(
    ctx: typer.Context,
    model: opt.Model = "",
    pretrained: opt.Pretrained = False,
    data: opt.Data = None,
    n: _N = None,
    label: _Label = None,
    prompt: _Prompt = None,
    prompts: _Prompts = None,
    seed: opt.SeedOrZero = 0,
    do: _Do = None,
    like: _Like = None,
    input: _Input = None,
    mask: _Mask = None,
    checkpoint: opt.Checkpoint = "last",
    gpus: opt.Gpus = None,
    cpu: opt.Cpu = False,
    processes: opt.Processes = None,
    precision: opt.Precision = None,
    out_dir: _Out = None,
    formats: tuple[str, ...] = (),
    animate: _Animate = False,
    opened: opt.Open = False,
    dry_run: opt.DryRun = False,
    submit: opt.Submit = None,
    slurm: opt.Slurm = None,
) -> None:
    """Draw images from a trained model, or apply it to images (`--do`).

    The model's own options (`--steps 50`, `--temperature 0.7`) are the keys of its recipe's `sample` section,
    or of the application.
    """
    from gzcli.store.jobs import SampleJob
    from gzcli.store.pretrained import spelled

    word, words = jobs.model_and_words(model, ctx)
    model = spelled(word or "", pretrained)
    if not model and not like:
        hint = f"name it before `{words[0]}`" if words else "gz sample vae"
        with jobs.misspellings(words, ctx):
            raise UsageError("`gz sample` needs a model, a run or a file", hint=hint)
    typed = SampleJob(
        "",
        n,
        label,
        tuple(read_prompts(prompt or [], prompts)),
        do=do,
        input=str(input) if input else None,
        mask=str(mask) if mask else None,
        formats=formats,
        animate=animate,
        checkpoint=checkpoint,
        seed=seed,
        precision=precision,
        launch=LaunchSection(opt.parse_gpus(gpus), cpu, processes),
    )
    key = data_key(data) if data else None
    run, job, able = job_like(like, model, typed, words) if like else job_of(model, data, typed, words, ctx)
    if submit or slurm:
        subject = model or Path(str(like)).stem
        name = f"sample-{slug(subject)}"
        return jobs.submit("sample", name, seed, job.launch, slurm, dry_run=dry_run)
    jobs.announce(run, str(run.path) if like else model, data=key)
    name = "like" if like else job.do or (f"n{job.n}" if job.n else "from-input")
    if dry_run:
        if out_dir:
            claims.check_free(out_dir)
        planned = run.path / "sampled" / f"{name}-<time>-<id>"
        return show_dry(run, job, out_dir.absolute() if out_dir else planned)
    folder = out_dir.absolute() if out_dir else claims.new_folder(run.path / "sampled", name)
    result = jobs.do_job(folder, replace(job, origin=origin_of_job(job, run)))
    show(result, opened=opened)
    if like:
        return out.data(result | {"like": compare(like, result)})
    out.data(result)
    ending(quoted(model) + (f" --data {quoted(data)}" if data else ""), able, job.do, result)


def job_of(model: str, data: str | None, typed: SampleJob, words: list[str], ctx: typer.Context) -> Sampling:
    """The run that a name refers to, the typed job completed from it, and the run's applications."""
    from gzcli.core.sections import part_of
    from gzcli.launch.from_file import trained_run
    from gzcli.models.catalog import card_of

    key = data_key(data) if data else None
    run = trained_run(model, lambda card: options_of(card, typed, words, ctx), data=key, typed=data)
    part = part_of(run.serving.tree())
    card, conditional = card_of(run, part.model), bool(part.options.get("conditional"))
    do = choose_application(typed.do, card) if typed.do else None
    check(card, do, run, typed, conditional=conditional)
    options = options_of(card, typed, words, ctx)
    classes = classes_of(run, part.data.name)
    turns = class_numbers(typed.labels, classes) if typed.labels and classes else classes
    n, from_input = typed.n, typed.input and not do
    if n is None and not from_input:  # only the engine knows how many input images there are
        n = MANY if do else len(typed.prompts) or MANY
        # equally many of each class, if the classes are known
        if conditional and not do and not typed.prompts:
            n = in_turns(MANY, len(turns))
    job = replace(typed, run=str(run.path), n=n, options=options, do=do)
    job = replace(job, input_as=card.inputs[0] if from_input else None)
    return run, job, [name for name in card.do if conditional or name not in card.with_labels]


def options_of(card: ModelCard, typed: SampleJob, words: list[str], ctx: typer.Context) -> dict[str, Any]:
    """The options in these words, of the model or of the application. Raises UsageError for others, and for
    prompts that the method does not take."""
    do = choose_application(typed.do, card) if typed.do else None
    what, takes = (f"`--do {do}`", card.do[do]) if do else (f"`{card.name}`", card.sample)
    if typed.prompts and "prompt" not in takes:
        alternative = "`gz list models --can prompt` shows models that do"
        hint = "choose a class with `--label`" if "conditional" in card.can else alternative
        raise UsageError(f"{what} takes no prompts", hint=hint)
    by_method = {f"--do {name}": params for name, params in card.do.items()}
    return jobs.method_options(words, takes, what, "sample", by_method, ctx.command)


def show_dry(run: Run, job: SampleJob, folder: Path) -> None:
    """Prints the cost of the job and its folder. The cost of an application is unknown."""
    from gzcli.cli.plan import show_sampling

    lines = [f"application: `{job.do}`"] * bool(job.do)
    image = UNKNOWN_IMAGE if job.do else cost_of(run, job)
    show_sampling([(run, job.n, image)], [*lines, f"files: {folder}"], out=folder)


def cost_of(run: Run, job: SampleJob) -> Cost:
    """The cost of an image with the job's options, as the run measured it if these are only its steps, and
    otherwise as an untrained copy takes on this machine."""
    from gzcli.launch import forecast, launcher

    measured, steps = job.options.keys() <= {"steps"}, job.options.get("steps")
    image = sampling(run.model, run.data, run, steps) if measured else UNKNOWN_IMAGE
    if None not in (image.each, image.calls):
        return image
    plan = launcher.plan(job.launch, every_gpu=False)
    if not (drawer := forecast.drawer_of_run(run, plan, job.options)):
        return image
    ((tried, _),) = forecast.image_costs([drawer], partial(forecast.measured, say=out.info))
    return image.or_else(tried)


def classes_of(run: Run, data: str) -> list[str]:
    """The classes that a run was trained on, from its weights or its set; [] if neither records them."""
    from gzcli.launch.from_file import metadata

    with suppress(GzError):
        return list(map(str, json.loads(metadata(run.serving.model_file)["data"])["classes"]))
    with suppress(GzError):
        return class_names(data)
    return []


def show(result: Mapping[str, Any], *, opened: bool = False) -> None:
    """Prints what was drawn."""
    if result["grid"]:
        out.picture(Path(result["grid"]), opened=opened)
    whole = [result[format.key] for format in FORMATS.values() if not format.several]
    for path in filter(None, (*whole, result["animation"])):
        out.text(path)
    for name, value in result.get("figures", {}).items():
        out.info(f"{name}: {value:.3f} over {result['n']:,} images")
    if not any(result[format.key] for format in FORMATS.values()):
        out.info(f"{result['n']:,} images are on one sheet; no single files were written")
        out.hint("`--png` writes one file per image, `--npz` one for all")


def ending(name: str, able: Iterable[str], do: str | None, result: Mapping[str, Any]) -> None:
    """The final lines of `gz sample`: the number of images, the time, and what else the run can do."""
    further = [application for application in able if application != do]
    if further:
        out.info(f"applications (`--do`): {', '.join(further)}")
    then = [(f"gz sample {name} --do {further[0]}", "try one of its applications")] if further else []
    again = (f"gz sample {name} --do {do} --input ./pictures", "use your own images")
    then.append(again if do else (f"gz bench {name}", "compare with real images"))
    each = f"{result['seconds'] / result['n']:.2g} s per image" if result["n"] and result["seconds"] else None
    end([counted(result["n"], "image"), took(), each], then)


# ---------------------------------------------------------------------------- checks


def check(model: ModelCard, do: str | None, run: Run, job: SampleJob, *, conditional: bool) -> None:
    """Raises UsageError if the application `do`, or plain sampling, does not accept the job's images or
    labels, or needs a run that was trained with labels."""
    if not do and (job.mask or (job.input and not model.inputs)):
        raise UsageError(f"`{'--mask' if job.mask else '--input'}` needs `--do`", hint=abilities(model))
    if job.mask and do not in model.masked:
        search = "`gz list models --can inpaint` shows models that take one"
        hint = f"these applications do: {', '.join(model.masked)}" if model.masked else search
        raise UsageError(f"`--do {do}` of `{model.name}` takes no mask", hint=hint)
    train = f"gz train {run.model} --data {run.data} --set {run.serving.in_owner}model.conditional=true"
    if do in model.with_labels and not conditional:
        message = f"`--do {do}` needs a run trained with labels, but `{run.id}` was not"
        raise UsageError(message, hint=train)
    if job.labels and do and do not in model.labelled:
        hint = f"applications that do: {', '.join(model.labelled) or 'none'}"
        raise UsageError(f"`--do {do}` of `{model.name}` takes no labels", hint=hint)
    if job.labels and not conditional and do not in model.labels_for:
        raise UsageError(f"`{run.id}` was not trained with labels", hint=train)


def choose_application(word: str, model: ModelCard) -> str:
    """The application of the model that a word refers to."""
    from gzcli.models.catalog import APPLICATIONS

    name = canonical(word)
    if name in APPLICATIONS and name not in model.do:
        hint = f"{abilities(model)}; `gz list models --can {name}` shows models that do"
        raise UsageError(f"`{model.name}` does not {name}", hint=hint)
    if not model.do:
        hint = did_you_mean(word, APPLICATIONS) or abilities(model)
        raise UsageError(f"`{model.name}` has no applications, including `{word}`", hint=hint)
    return choose(f"application of `{model.name}`", word, model.do)


def abilities(model: ModelCard) -> str:
    return f"`{model.name}` supports: {', '.join(model.do) or 'sampling only'}"


def read_prompts(typed: list[str], file: Path | None) -> list[str]:
    """The prompts of the command line, then those of a file."""
    if file is None:
        return typed
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as e:
        raise UsageError(
            f"`{file}` is not UTF-8 text", hint="save the prompts as plain text, one per line"
        ) from e
    if not (prompts := [line for line in lines if line and not line.startswith("#")]):
        hint = "write one prompt per line; lines that begin with `#` are comments"
        raise UsageError(f"`{file}` contains no prompts", hint=hint)
    return typed + prompts


# ------------------------------------------------------------------------- what images say of their making


def origin_of_job(job: SampleJob, run: Run) -> dict[str, Any]:
    """The part of the images' origin that the engine cannot know. It consists of the command without file
    paths, the origin of a shared run, and the hashes of the user's own images."""
    paths = {key: Path(path) for key, path in (("input", job.input), ("mask", job.mask)) if path}
    pictures = {key: {"name": path.name, "sha256": digest(path)} for key, path in paths.items()}
    return {"command": command(job, run), "from": run.status().get("from"), **pictures}


def command(job: SampleJob, run: Run) -> str:
    """The command line of a job in a canonical form."""
    words = ["gz", "sample", run.id, *(["-n", str(job.n)] if job.n else []), "--seed", str(job.seed)]
    pictures = {key: Path(path).name for key, path in (("input", job.input), ("mask", job.mask)) if path}
    checkpoint = None if job.checkpoint in ("last", "finished") else job.checkpoint
    flags = {"label": job.labels, "do": job.do, **pictures}
    flags |= {"checkpoint": checkpoint, "precision": job.precision}
    words += [word for name, value in flags.items() if value for word in (f"--{name}", value)]
    for prompt in job.prompts:
        words += ["--prompt", prompt]
    for key, value in job.options.items():
        name = key.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}={value}"]
    return shlex.join(words)


def digest(path: Path) -> str:
    """The sha256 of a file, or of the names and checksums of all files in a folder."""
    if path.is_file():
        return checksum(path)
    total = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        total.update(os.fsencode(f"{file.relative_to(path).as_posix()}\0{checksum(file)}\n"))
    return total.hexdigest()


# ---------------------------------------------------------------------------- --like


def job_like(picture: Path, model: str, typed: SampleJob, words: list[str]) -> Sampling:
    """The run that drew an image, found by name or weights, and the job that draws the image again."""
    from gzcli.launch.from_file import find_run

    facts = origin_of(picture)
    if (verb := facts.get("verb")) != "sample":
        hint = f"it was made by `gz {verb}`" if verb else "pass an image that `gz sample` wrote"
        if verb == "train" and facts.get("run") and facts.get("step"):
            owner = facts["run"].partition("/")[0]
            hint = f"gz sample {owner} --checkpoint {facts['step']} -n {facts['n']}"
        raise UsageError(f"`{picture}` was not drawn by `gz sample`", hint=hint)
    flags = [flag for key, flag in DECIDED.items() if getattr(typed, key)] + (["options"] if words else [])
    if flags:
        raise UsageError(f"`--like` and `{flags[0]}` cannot be used together", hint=facts.get("command"))
    for key in ("input", "mask"):
        then, now = facts.get(key), getattr(typed, key)
        if not then and now:
            raise UsageError(f"the image was drawn without `--{key}`")
        if then and not now:
            message = f"the image was made from `{then['name']}`, which is not stored in it"
            raise UsageError(message, hint=f"pass it: `--{key} PATH`")
        if then and digest(Path(now)) != then["sha256"]:
            raise UsageError(f"`{now}` is not the `{then['name']}` that the image was made from")
    run = find_run(model) if model else next(_candidates(facts), None)
    if run is None:
        hint = f"gz sample {facts.get('from') or 'MODEL|FILE'} --like IMAGE"
        raise MissingError(
            f"the image was drawn by the run `{facts['run']}`, which is not on this machine", hint=hint
        )
    if (checkpoint := _checkpoint_with(facts, run)) is None:
        hint = (
            f"the weights were those of step {facts['step']:,} of `{facts['run']}`, sha256 "
            f"{facts['weights'][:12]}…"
        )
        raise MissingError(f"`{run.id}` does not have the weights that drew the image", hint=hint)
    drawn = {key: facts[key] for key in ("n", "seed", "labels", "options", "do", "input_as", "precision")}
    drawn |= {"prompts": tuple(facts["prompts"]), "checkpoint": checkpoint}
    if facts.get("index") is not None:  # option of the image, which is drawn to a file again
        drawn["formats"] = (*typed.formats, "png")
    return run, replace(typed, run=str(run.path), **drawn), []


def compare(picture: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """How an image differs from its repetition: {file, same, most}, `most` in grey levels of 255."""
    import numpy as np
    from PIL import Image

    facts = origin_of(picture)
    index = facts.get("index")
    file = result["grid"] if index is None else result["files"][index]
    then, now = (np.asarray(Image.open(path)).astype(int) for path in (picture, file))
    most = int(abs(then - now).max()) if then.shape == now.shape else None
    if most == 0:
        out.info(f"identical to the last bit: {file}")
    else:
        devices = [facts.get("device"), origin_of(Path(file)).get("device")]
        why = "different versions or threads"
        if devices[0] != devices[1]:
            why = f"drawn on {devices[0]}, now on {devices[1]}"
        how = "the image sizes differ" if most is None else f"pixels differ by up to {most} of 255"
        out.info(f"note: {how} ({why}): {file}")
    return {"file": file, "same": most == 0, "most": most}


def _candidates(facts: Mapping[str, Any]) -> Iterator[Run]:
    """Candidates for the run that drew an image: by id, from a file used before, or by weights."""
    stored = all_runs()
    yield from (run for run in stored if run.id == facts["run"])
    yield from (Run(path) for path in cache_dir("files").glob("*") if path.name == facts["run"])
    yield from (run for run in stored if run.model == facts["model"] and _checkpoint_with(facts, run))


def _checkpoint_with(facts: Mapping[str, Any], run: Run) -> str | None:
    """The checkpoint of a run that has the image's weights, as a value for `--checkpoint`."""
    step = int(facts["step"])
    places = {"finished": run.serving.model_file, str(step): run.serving.checkpoint(step).averaged}
    equal = (at for at, file in places.items() if file.is_file() and checksum(file) == facts["weights"])
    return next(equal, None)
