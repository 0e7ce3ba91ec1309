"""`gz ood`: how well the scores of a trained model separate foreign images from its training set. With
`--input`, an alarm for each of the user's images. The request and its cost are in `launch.scoring`, the
tables are in `report.terminal`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gzcli.cli import jobs, out
from gzcli.cli import options as opt
from gzcli.cli.jobs import end, quoted, took
from gzcli.cli.model_options import a_score, flag
from gzcli.cli.options import a_set, option, split
from gzcli.cli.report import check_report, page_of, with_report
from gzcli.core.errors import FLAGGED_CODE, UsageError
from gzcli.core.sections import LaunchSection
from gzcli.data.sets.registry import is_set, slug
from gzcli.metrics.alarms.methods import DEFAULT_METHOD, METHODS
from gzcli.store import claims
from gzcli.store.paths import user_dir

if TYPE_CHECKING:
    from gzcli.launch.scoring import Request
    from gzcli.models.catalog import ModelCard
    from gzcli.store.jobs import PortableJob

SETTINGS = jobs.OWN_OPTIONS

_JUDGE_HELP = (
    f"{opt.MODEL_HELP} Or a method that needs no training: {', '.join(METHODS)}. Default: `{DEFAULT_METHOD}`."
)
_Judge = Annotated[str | None, opt.argument("MODEL|RUN|METHOD", _JUDGE_HELP, opt.a_judge)]
_IN_HELP = "In-distribution data set, scored on its test split. Default: the run's data set."
_In = Annotated[str | None, option("--in NAME|PATH", _IN_HELP, complete=a_set)]
_OUT_HELP = (
    "Out-of-distribution data sets, or your own images. Uses the test split, or all images if "
    "there is none. A path may contain a comma."
)
_Outs = Annotated[str | None, option("--out NAME|PATH[,…]", _OUT_HELP, complete=a_set)]
_BENCHMARK_HELP = "Data sets of openood-mnist, openood-cifar10 or openood-cifar100."
_Benchmark = Annotated[str | None, option("--benchmark B", _BENCHMARK_HELP)]
_SCORE_HELP = (
    "Scores, or `all`. Default: the recipe's scores and `local`. With `--input`: the score that detects the "
    "most synthetic defects."
)
_Score = Annotated[str | None, option("--score S[,S…]", _SCORE_HELP, complete=a_score)]
_N_HELP = "Number of images per data set. Default: as many as the time budget allows."
_N = Annotated[int | None, option("-n N", _N_HELP, min=10)]
_Full = Annotated[bool, option("--full", "Score all images of each set.")]
_BACKGROUND_HELP = "Background run of the score `ratio`, trained on mutated images."
_Background = Annotated[str | None, option("--background RUN", _BACKGROUND_HELP)]
_SEEDS_HELP = (
    "Number of noise seeds, reported as mean ± standard deviation. Default: 1, or 4 with `--input` if the "
    "score draws "
    "noise."
)
_Seeds = Annotated[int | None, option("--seeds K", _SEEDS_HELP, min=1)]
_IMGLISTS_HELP = "OpenOOD's `data` folder, whose image lists define the images of `--benchmark`."
_Imglists = Annotated[str | None, option("--imglists DIR", _IMGLISTS_HELP)]

_of_pictures = partial(option, panel="Single images")
_INPUT_HELP = "Images to check one by one: an image, or a folder, zip, tar or npz of images."
_Input = Annotated[str | None, _of_pictures("--input PATH", _INPUT_HELP)]
_FPR_HELP = "False-positive rate. Default: 1 %."
_Fpr = Annotated[str | None, _of_pictures("--fpr 1%|0.01", _FPR_HELP)]
_CALIBRATE_HELP = "More good images for calibration. Methods are not fitted to them."
_Calibrate = Annotated[str | None, _of_pictures("--calibrate DIR", _CALIBRATE_HELP)]
_Map = Annotated[bool, _of_pictures("--map", "Write anomaly maps of the most unusual images.")]
_Png = Annotated[bool, _of_pictures("--png", "Write the map of every image, not just the most unusual.")]
_EXPORT_HELP = "Export a method's alarm as an ONNX graph and a script that need neither gz nor torch."
_Export = Annotated[str | None, option("--export DIR", _EXPORT_HELP)]
_FAIL_HELP = "Exit with code 6 if any image is flagged or unreadable, for scripts."
_Fail = Annotated[bool, _of_pictures("--fail", _FAIL_HELP)]


def ood(
    ctx: typer.Context,
    model: _Judge = None,
    pretrained: opt.Pretrained = False,
    in_: _In = None,
    out_: _Outs = None,
    benchmark: _Benchmark = None,
    input_: _Input = None,
    fpr: _Fpr = None,
    calibrate: _Calibrate = None,
    export: _Export = None,
    map_: _Map = False,
    png: _Png = False,
    fail: _Fail = False,
    score: _Score = None,
    n: _N = None,
    full: _Full = False,
    background: _Background = None,
    checkpoint: opt.Checkpoint = "last",
    gpus: opt.Gpus = None,
    cpu: opt.Cpu = False,
    processes: opt.Processes = None,
    precision: opt.Precision = None,
    seed: opt.SeedOrZero = 0,
    seeds: _Seeds = None,
    imglists: _Imglists = None,
    report: opt.Report = None,
    dry_run: opt.DryRun = False,
    submit: opt.Submit = None,
    slurm: opt.Slurm = None,
) -> None:
    """Score data sets or single images for out-of-distribution detection.

    If you omit the model, a method that needs no training checks the images of `--input` in seconds: `gz ood
    --in ./good --input ./today --fail`. For an inspection set with defects and masks, such as MVTec's, `gz
    ood --in ./bottle` shows how well each kind of defect is detected.

    A higher score is more out-of-distribution. Baselines without a model are listed beside the scores of the
    model. Several runs form an ensemble: `gz ood RUN RUN2 RUN3 --out mnist`.

    The scores' own options (`--starts 8`, `--steps 20`) are the keys of the recipe's `ood` section.
    """
    from gzcli.launch import scoring
    from gzcli.recipe.resolve import card_for
    from gzcli.recipe.schema import score_options

    check_report(report)
    model, words = jobs.model_and_words(model, ctx)
    further = list(itertools.takewhile(lambda word: not word.startswith("-"), words)) if model else []
    method = scoring.method_of(model)
    card = card_for(model) if model and words and not (method or pretrained) else None
    of_model = [flag(name) for name in score_options(card)] if card else []
    refused = list(scoring.OF_MODEL)[: -2 if out_ else None] if method else ()
    spelling = partial(jobs.misspellings, words, ctx, of_model=of_model, refused=refused)

    def keywords(card: ModelCard | None) -> dict[str, Any]:
        if card:
            what, own = f"`gz ood {card.name}`", words[len(further) :]
            return jobs.method_options(own, score_options(card), what, "ood", verb=ctx.command)
        with spelling():
            return {"size": size_in(words)}

    with spelling():
        question = scoring.Question(
            keywords=keywords,
            what=(model, *further) if model else (),
            pretrained=pretrained,
            ins=in_,
            outs=tuple(split_sets(out_)) if out_ else (),
            benchmark=benchmark,
            imglists=imglists,
            input=input_,
            fpr=fpr,
            calibrate=calibrate,
            export=export,
            maps=map_,
            png=png,
            fail=fail,
            scores=tuple(split(score)),
            n=n,
            full=full,
            background=background,
            seeds=seeds,
            checkpoint=checkpoint,
            seed=seed,
            precision=precision,
            launch=LaunchSection(opt.parse_gpus(gpus), cpu, processes),
        )
    request = scoring.ask(question, say=out.info)
    job = request.job
    if submit or slurm:
        of = f"ood-{slug(question.model or job.ins)}"
        return jobs.submit("ood", of, seed, job.launch, slurm, dry_run=dry_run)
    if request.run:
        jobs.announce(request.run, question.model or "", data=request.key)
    if dry_run:
        return show_dry(request)
    if portable := request.portable:
        exported = write_alarm(portable)
        if input_ is None:
            return out.data(exported)
    folder = request.new_folder()
    result = jobs.do_job(folder, job)
    finish(result, folder, request, report, fail)


def size_in(words: list[str]) -> Any:
    """The image size from `--set data.size=64`, the only key that methods accept; None if it is not set."""
    from gzcli.core.units import canonical_size
    from gzcli.recipe.yaml import scalar

    size, rest = None, list(words)
    while rest:
        word = rest.pop(0)
        setting = rest.pop(0) if word == "--set" and rest else word.removeprefix("--set=")
        key, equals, value = setting.partition("=")
        if key != "data.size" or not equals:
            hint = "a method that requires no training accepts only `--set data.size=64`"
            raise UsageError(f"no such option `{word}`", hint=hint)
        size = canonical_size(scalar(value))
    return size


def split_sets(text: str) -> list[str]:
    """The names in a comma-separated list. A name may itself contain commas, so the longest text that is a
    set or a path counts as one name."""
    parts, names = text.split(","), []
    while parts:
        length = next((n for n in range(len(parts), 1, -1) if is_set(",".join(parts[:n]).strip())), 1)
        names.append(",".join(parts[:length]).strip())
        parts = parts[length:]
    if not any(names):
        raise UsageError(f"`--out {text}` names no data set", hint="gz list data")
    return [name for name in names if name]


# ---------------------------------------------------------------------------- what is printed


def show_dry(request: Request) -> None:
    """Prints the sets or images to score, the scores, and the forecast."""
    from gzcli.store.jobs import OodJob

    job, estimate = request.job, request.cost(out.info)
    against = list(job.outs) if isinstance(job, OodJob) else [job.input or job.ins]
    for text in estimate.warnings:
        out.warn(text)
    for label, text in (
        ("in", job.ins),
        ("against", ", ".join(against)),
        ("by", estimate.by or "the model's default scores"),
        ("images", estimate.images),
        ("time", estimate.time),
    ):
        out.text("\n".join(out.wrapped_text(text, f"{label:<9}")))
    for note in estimate.notes:
        out.info(note)
    out.data({"in": job.ins, "against": against, "by": estimate.by, **estimate.facts})


def write_alarm(job: PortableJob) -> dict[str, Any]:
    """Exports the alarm of a method on good images into a folder. Returns the result as JSON."""
    from gzcli.metrics.conformal import lowest_rate

    result = jobs.do_job(claims.new_folder(user_dir("ood"), "export"), job)
    out.info(
        f"`{result['method']}` with {result['held_out']:,} held-out scores: {', '.join(result['files'])}"
    )
    least = max(1.0, lowest_rate(result["held_out"]))
    then = (f"python {quoted(f'{job.out}/judge.py')} ./today --fpr {least:g}%", "run it without gz")
    end([f"exported to {quoted(job.out)}", took()], [then])
    return result


def show(result: Mapping[str, Any]) -> None:
    """Prints the table of a result, its notes, and the images that could not be read."""
    from gzcli.report import terminal

    shown = terminal.table(result)
    if shown.rows:
        out.table(shown.head, shown.rows, spare=shown.spare, elsewhere=shown.elsewhere)
    for note in shown.notes:
        out.info(note)
    for message in result.get("unreadable", ()):
        out.warn(f"left out: {message}")


def finish(result: dict[str, Any], folder: Path, request: Request, report: Path | None, fail: bool) -> None:
    """Prints the table and the lines after it. Exits with the code `FLAGGED` if that was requested."""
    from gzcli.report import terminal

    show(result)
    for text in (*(f"note: {note}" for note in result.get("notes", [])), f"files: {folder}"):
        out.info(text)
    result = with_report(result, folder, report)
    summary, then = terminal.ending(result, request.question.words, request.maps)
    end([summary, took()], [*(page_of(result, folder) if "results" in result else []), then])
    out.data(result)
    if fail and (result["flagged"] or result["unreadable"]):
        raise SystemExit(FLAGGED_CODE)
