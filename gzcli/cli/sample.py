"""`gz sample`: images from a trained model, or one of its applications; `--like IMAGE` repeats an earlier `gz
sample` from one of its images. The request and its cost are in `launch.sampling`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gzcli.cli import jobs, out
from gzcli.cli import options as opt
from gzcli.cli.jobs import end, quoted, took
from gzcli.cli.model_options import a_label, an_application
from gzcli.cli.options import option
from gzcli.core.errors import UsageError
from gzcli.core.sections import LaunchSection
from gzcli.core.units import counted
from gzcli.data.sets.registry import slug
from gzcli.store import claims
from gzcli.store.png import FORMATS

if TYPE_CHECKING:
    from gzcli.launch.sampling import Request
    from gzcli.models.catalog import Param

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
    from gzcli.launch import sampling
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
        tuple(sampling.read_prompts(prompt or [], prompts)),
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

    def keywords(what: str, takes: Mapping[str, Param], by_method: Mapping[str, Iterable[str]]) -> Any:
        return jobs.method_options(words, takes, what, "sample", by_method, ctx.command)

    request = sampling.ask(model, typed, keywords if words else None, data=data, like=like)
    run, job = request.run, request.job
    if submit or slurm:
        subject = model or Path(str(like)).stem
        name = f"sample-{slug(subject)}"
        return jobs.submit("sample", name, seed, job.launch, slurm, dry_run=dry_run)
    jobs.announce(run, str(run.path) if like else model, data=request.key)
    if dry_run:
        return show_dry(request, out_dir)
    folder = out_dir.absolute() if out_dir else request.new_folder()
    result = jobs.do_job(folder, request.with_origin())
    show(result, opened=opened)
    if like:
        again = sampling.compare(like, result)
        out.info(again.words)
        like_facts = {"file": again.file, "same": again.most == 0, "most": again.most}
        return out.data(result | {"like": like_facts})
    out.data(result)
    ending(quoted(model) + (f" --data {quoted(data)}" if data else ""), request.applications, job.do, result)


def show_dry(request: Request, out_dir: Path | None) -> None:
    """Prints the cost of the job and its folder."""
    from gzcli.cli.plan import show_sampling
    from gzcli.launch.cost import Cost

    run, job = request.run, request.job
    if out_dir:
        claims.check_free(out_dir)
    folder = out_dir.absolute() if out_dir else run.path / "sampled" / f"{request.name}-<time>-<id>"
    lines = [f"application: `{job.do}`"] * bool(job.do)
    rows = [(run, job.n, request.cost(out.info))]
    show_sampling(rows, [*lines, f"files: {folder}"], Cost(), out=folder)


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
