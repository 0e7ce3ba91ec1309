"""`gz ood`: how well the scores of a trained model separate foreign images from its training set. With
`--input`, an alarm for each of the user's images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from gzcli.cli import jobs, out
from gzcli.cli import options as opt
from gzcli.cli.jobs import end, quoted, took
from gzcli.cli.model_options import a_score
from gzcli.cli.options import a_set, option, split
from gzcli.cli.report import check_report, page_of, with_report
from gzcli.core.errors import FLAGGED, MissingError, UsageError, canonical, matching
from gzcli.core.sections import LaunchSection, part_of
from gzcli.core.units import MOST, about, affordable, counted, percent, short
from gzcli.data.readers.inspection import open_inspection
from gzcli.data.sets.registry import Form, OwnSet, data_key, is_set, local, locate, slug
from gzcli.metrics.alarms.methods import DEFAULT, LOCAL, METHODS, is_local
from gzcli.store import claims
from gzcli.store.paths import user_dir
from gzcli.store.run_folder import Run

if TYPE_CHECKING:
    from gzcli.core.sections import DataSection
    from gzcli.data.sets.benchmarks import Benchmark
    from gzcli.data.sets.registry import DataSet
    from gzcli.launch.forecast import Scored
    from gzcli.models.catalog import ModelCard
    from gzcli.store.jobs import AlarmJob, OodJob

SETTINGS = jobs.OWN_OPTIONS
ANY_RATE = 0.5  # rate of an exported alarm, whose user sets it
# Of an alarm: most draws of noise, most held-out images on which scores are fitted, and approximate number
# of images by which it chooses its score.
SEEDS, FITTED, CHOOSING = 4, 500, 300
MOST_FITTED = 2000  # most images to which a method is fitted
LINES, NAME = 20, 40  # flagged images in the table, and letters of a name there, at most

_JUDGE_HELP = (
    f"{opt.MODEL_HELP} Or a method that needs no training: {', '.join(METHODS)}. Default: `{DEFAULT}`."
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
    from gzcli.launch.from_file import find_run
    from gzcli.store.jobs import AlarmJob, InspectJob, OodJob

    check_report(report)
    of_pictures = {"--fpr": fpr, "--calibrate": calibrate, "--map": map_, "--png": png, "--fail": fail}
    of_sets = {"--out": out_, "--benchmark": benchmark, "--imglists": imglists}
    layout = inspection_at(in_) if in_ and not benchmark else None
    inspected = None if input_ or out_ else layout
    model, unknown = jobs.model_and_words(model, ctx)
    typed = " ".join(filter(None, [model, f"--in {quoted(in_)}" if in_ else None]))
    with jobs.misspellings(unknown, ctx):
        check_options(typed, input_, of_pictures, of_sets, alone=bool(inspected or export))
    method = method_of(model, in_, of_sets)
    if export and not method:
        hint = f"gz runs export {quoted(model or 'RUN')} --to alarm"
        raise UsageError("`--export` needs a method that requires no training", hint=hint)
    openood = benchmark_of(benchmark, in_, out_) if benchmark else None
    name = openood.inside if openood else in_
    inside = layout.home if layout else locate(name) if name else None
    job: AlarmJob | OodJob
    further = str(local(calibrate)) if calibrate and not is_set(calibrate) else calibrate
    if method:
        assert in_ and inside
        with jobs.misspellings(unknown, ctx):
            how: dict[str, Any] = {"method": method, "seed": seed, "size": size_in(unknown)}
        how["launch"] = LaunchSection(opt.parse_gpus(gpus), cpu)
        if submit or slurm:
            name = f"ood-{slug(inside.key)}"
            return jobs.submit("ood", name, seed, how["launch"], slurm, dry_run=dry_run)
        of_alarm: dict[str, Any] = {"calibrate": further, "maps": True, "png": png}
        if dry_run:
            against = split_sets(out_) if out_ else None
            path = inspected.path if inspected else None
            return show_dry_method(inside, against, input_, n, method=method, inspected=path)
        if export:
            exported = write_alarm(inside.reference, local(export), how | of_alarm)
            if not input_:
                return out.data(exported)
        words = f"{model or ''} --in {quoted(in_)}".strip()
        if out_:
            outs = tuple(locate(name).reference for name in split_sets(out_))
            folder = claims.new_folder(user_dir("ood"), f"{inside.key}-{label_of(outs)}")
            job = OodJob("", inside.reference, outs, n=n, full=full, **how)
        else:
            kind, path = (InspectJob, inspected.path) if inspected else (AlarmJob, local(input_ or ""))
            folder = claims.new_folder(user_dir("ood"), f"{inside.key}-{slug(path.stem)}")
            job = kind("", inside.reference, str(path), rate(fpr), **how, **of_alarm)
        result = jobs.do_job(folder, job)
        (table_of_defects if inspected else table if out_ else table_of_pictures)(result)
        return finish(result, folder, words, METHODS[result["method"]].mapped, report, fail)
    assert model
    model = opt.spelled(model, pretrained)
    run, card, data, settings = of_runs(model, ctx, inside, split(score))
    settings |= {"checkpoint": checkpoint, "n": n, "full": full, "seed": seed, "precision": precision}
    settings |= {"background": str(find_run(background).path) if background else None}
    settings |= {"launch": LaunchSection(opt.parse_gpus(gpus), cpu, processes)}
    if inspected:
        settings |= {"calibrate": further}
        label = f"inspect-{slug(inspected.path.stem)}"
        job = InspectJob(input=str(inspected.path), fpr=rate(fpr), seeds=seeds, **settings)
    elif input_ is not None:
        if map_ and not card.maps:
            from gzcli.models.catalog import cards

            able = ", ".join(model.name for model in cards().values() if model.maps)
            message = f"`{card.name}` has no anomaly maps"
            raise UsageError(message, hint=f"models with maps: {able}")
        path = local(input_)
        label = f"input-{slug(path.stem)}"
        settings |= {"calibrate": further}
        job = AlarmJob(input=str(path), fpr=rate(fpr), maps=map_, png=png, seeds=seeds, **settings)
    else:
        lists = local(imglists) if imglists else None
        if openood:
            foreign = with_lists(openood, lists) if lists else at_hand(openood, data)
        else:
            foreign = [locate(name) for name in split_sets(out_ or "")]
        outs = tuple(one.reference for one in foreign)
        label = openood.name if openood else label_of(outs)
        settings |= {"benchmark": openood and openood.name, "imglists": str(lists) if lists else None}
        job = OodJob(outs=outs, seeds=seeds or 1, **settings)
    if submit or slurm:
        return jobs.submit("ood", f"ood-{slug(model)}", seed, job.launch, slurm, dry_run=dry_run)
    jobs.announce(run, model, data=inside.key if inside else None)
    if dry_run:
        return show_dry_run(run, job)
    folder = claims.new_folder(run.path / "ood", label)
    result = jobs.do_job(folder, job)
    shown = table_of_defects if inspected else table if input_ is None else table_of_pictures
    shown(result)
    words = quoted(model) + (f" --in {quoted(in_)}" if in_ else "")
    finish(result, folder, words, bool(card.maps), report, fail)


def show_dry_run(run: Run, job: OodJob | AlarmJob) -> None:
    """Prints what a run would score, and the time: images × the cost of their scores, and of the fits."""
    from gzcli.launch import forecast
    from gzcli.metrics.alarms.choice import FEWEST
    from gzcli.store.jobs import OodJob

    part = part_of(run.serving.tree())
    names = job.scores or part.ood.scores or ()
    cost, budget, seeds = cost_of(run, job, names), part.ood.budget, job.seeds
    known, free = cost.each is not None and cost.fit is not None, not (job.n or job.full)
    if isinstance(job, OodJob):
        against, counts, most, further = job.outs, counts_of_sets(job), "about", 0
    else:
        against, counts, most, further = (job.input,), counts_of_alarm(job), "up to about", 0
        seeds = seeds or SEEDS
        further = CHOOSING if not (job.scores or job.others) and (counts[0] or 0) >= FEWEST else 0
    passes = (seeds or 1) * (1 + len(job.others))
    n = None if job.full else job.n
    if free and known:
        n = affordable(cost.each or 0.0, budget - (cost.fit or 0.0), passes * len(counts))
    # an alarm scores every image of its input
    limits = [n if isinstance(job, OodJob) or not i else None for i in range(len(counts))]
    sizes = [
        limit if size is None else min(size, limit or size)
        for size, limit in zip(counts, limits, strict=True)
    ]
    every = forecast.together(sizes)
    scored = None if every is None else passes * int(every) + further
    facts: dict[str, Any] = {"n": n, "scored": scored, "seconds": None, "calls": cost.calls}
    if not known:
        time = f"at most {about(budget)}, the recipe's `ood.budget`" if free and not further else "unknown"
    elif scored is None:
        time = f"{short(passes * len(counts) * (cost.each or 0.0), 2)} s for an image of each data set"
    else:
        fit, each = cost.fit or 0.0, cost.each or 0.0
        facts["seconds"] = seconds = forecast.STARTING_UP + passes * fit + scored * each
        calls = f" × {counted(round(cost.calls), 'network call')}" if cost.calls else ""
        fits = f"; {about(passes * fit)} of it to fit the scores" if passes * fit >= 1 else ""
        time = f"{most} {about(seconds)} for {counted(scored, 'image')}{calls}{fits}"
    if isinstance(job, OodJob):
        enough = n is None or all(size is not None and size <= n for size in counts)
        images = "all" if enough else f"{'up to ' * free}{n:,} per data set"
    else:
        images = f"{in_words(sizes[1])}, compared with {in_words(sizes[0])} held-out images"
    show_dry(locate(job.ins), against, by=", ".join(names), images=images, time=time, **facts)


def show_dry_method(
    home: DataSet,
    outs: Sequence[str] | None,
    input_: str | None,
    n: int | None,
    *,
    method: str,
    inspected: Path | None,
) -> None:
    """Prints what a method without training is fitted to and what it checks, and the time. Without `outs` and
    `input_`, it checks the test images of an inspection set, whose path is `inspected`."""
    from gzcli.data.packs.open import counts_of
    from gzcli.launch import forecast

    good, official = counts_of(home) or {}, official_test(home)
    if outs:
        fitted = good.get("train")
        tests = [good, *(counts_of(locate(name), foreign=True) or {} for name in outs)]
        checked = forecast.together([min(one["test"], n or MOST) if one else None for one in tests])
        images = f"{n:,} per data set" if n else "all"
    else:
        fitted = sum(good.values()) - (official or 0) if good else None
        checked = inputs(input_) if input_ else inspected_images(str(inspected))
        images = f"{in_words(checked)}, compared with {in_words(fitted)} good images"
    of_all = forecast.together([fitted and min(fitted, MOST_FITTED if outs else MOST), checked])
    seconds = of_all and forecast.STARTING_UP + forecast.checking(int(of_all), method)
    time = f"about {about(seconds)}" if seconds else "unknown"
    against = outs or [input_ or home.reference]
    show_dry(home, against, by=method, images=images, time=time, n=n, seconds=seconds, calls=None)


def in_words(n: int | None) -> str:
    return "all" if n is None else f"{n:,}"


def official_test(data: DataSet) -> int | None:
    """The number of images of the user's own folder `test`, which may show anything."""
    from gzcli.data.readers.folder import open_path

    if not isinstance(data, OwnSet) or not data.path.exists():
        return None
    return open_path(data.path, data.form).counts.get("test")


def inspected_images(path: str) -> int | None:
    """The number of test images of an inspection set: defective ones, and good ones."""
    layout, good = open_inspection(Path(path)), official_test(OwnSet(Path(path)))
    return len(layout.kinds) + (good or 0) if layout else None


def inputs(path: str) -> int | None:
    """The number of images to check one by one."""
    from gzcli.data.packs.open import counts_of

    form = Form(skip_bad=True, layout="flat")
    counts = counts_of(OwnSet(local(path), form=form), foreign=True)
    return counts["test"] if counts else None


def counts_of_sets(job: OodJob) -> list[int | None]:
    """The test images of each set that is scored. None: unknown."""
    from gzcli.data.packs.open import counts_of

    if job.imglists:
        return [None] * (1 + len(job.outs))
    sets = [counts_of(locate(job.ins)), *(counts_of(locate(name), foreign=True) for name in job.outs)]
    return [counts["test"] if counts else None for counts in sets]


def counts_of_alarm(job: AlarmJob) -> list[int | None]:
    """The held-out images of an alarm, without those on which scores are fitted, and the images that it
    checks. None: unknown. Warns if the former are too few for the rate."""
    from gzcli.data.packs.open import counts_of
    from gzcli.metrics.conformal import fewest

    home, held_out, used = locate(job.ins), counts_of(locate(job.ins)), 0
    official = official_test(home)
    if job.calibrate:
        more = counts_of(locate(job.calibrate), foreign=True)
        total = more["test"] if more else None
    else:
        total = held_out["val"] + (0 if official else held_out["test"]) if held_out else None
        used = min(FITTED, (total or 0) // 4)
    scores = len(job.scores or ()) if job.scores or job.others else 1
    needed, enough = fewest(job.fpr, scores), total if job.n is None else min(job.n, total or job.n)
    if enough is not None and enough < needed:
        rate = f"a false-alarm rate of {percent(job.fpr)}"
        out.warn(f"{rate} needs {needed:,} held-out images, but there are only {enough:,}")
    inspects = job.verb == "inspect"
    return [total and total - used, (inspected_images if inspects else inputs)(job.input)]


def cost_of(run: Run, job: OodJob | AlarmJob, names: Sequence[str]) -> Scored:
    """The cost of the scores of an image on this machine, measured on an untrained copy of the run."""
    from gzcli.launch import forecast, launcher

    plan = launcher.plan(job.launch, every_gpu=False)
    drawer = forecast.drawer_of_run(run, plan, score_options=job.options)
    if not names or not drawer:
        return forecast.Scored()
    # `local` is added to scores that are not named
    every = names if job.scores else (*names, LOCAL)
    return forecast.scored(drawer, every, partial(forecast.measured, say=out.info))


def show_dry(home: DataSet, against: Sequence[str], *, by: str, images: str, time: str, **facts: Any) -> None:
    """Prints the sets or images to score, the scores and the time. The JSON also has the facts."""
    for label, text in (
        ("in", home.reference),
        ("against", ", ".join(against)),
        ("by", by or "the model's default scores"),
        ("images", images),
        ("time", time),
    ):
        out.text("\n".join(out.fitted(text, f"{label:<9}")))
    out.data({"in": home.reference, "against": list(against), "by": by, **facts})


def label_of(outs: Sequence[str]) -> str:
    """The label of the output folder for scores of foreign sets."""
    return "-".join(slug(name.rsplit("/", 1)[-1]) for name in outs)[:80]


def finish(
    result: dict[str, Any], folder: Path, words: str, maps: bool, report: Path | None, fail: bool
) -> None:
    """Prints the lines after the table. Exits with the code `FLAGGED` if that was requested."""
    for text in (*(f"note: {note}" for note in result.get("notes", [])), f"files: {folder}"):
        out.info(text)
    result = with_report(result, folder, report)
    ending(result, folder, words, maps)
    out.data(result)
    if fail and (result["flagged"] or result["unreadable"]):
        raise SystemExit(FLAGGED)


# -------------------------------------------------------------------------- checks, and what the runs decide


class Inspected(NamedTuple):
    """An inspection set: its path, and the good images in it."""

    path: Path
    home: DataSet


def inspection_at(name: str) -> Inspected | None:
    """The inspection set of a name or path; None for any other set."""
    data = locate(name)
    layout = open_inspection(data.path) if isinstance(data, OwnSet) else None
    if not layout:
        return None
    assert isinstance(data, OwnSet)
    if layout.good is None:
        return Inspected(data.path, data)
    if not data.path.is_dir():
        hint = "unpack it, and pass the folder"
        raise UsageError(f"the archive `{data.path}` has no `train` split of good images", hint=hint)
    return Inspected(data.path, OwnSet(data.path / layout.good))


def check_options(
    typed: str,
    input_: str | None,
    of_pictures: Mapping[str, Any],
    of_sets: Mapping[str, Any],
    *,
    alone: bool = False,
) -> None:
    """Raises UsageError for options that cannot be combined, MissingError if there are no images.

    typed: the model and `--in` of the command line, for hints.
    alone: whether `--in` suffices, as for an inspection set.
    """
    of_images = f"gz ood {typed or '--in ./good'} --input ./today"
    wrong = of_pictures if input_ is None else of_sets
    allowed = ("--fpr", "--calibrate") if alone else ()
    strange = next((name for name, value in wrong.items() if value and name not in allowed), None)
    if input_ is not None:
        if strange:
            message = f"`--input` checks single images, but `{strange}` compares data sets"
            raise UsageError(message, hint="omit one of them")
        if of_pictures["--png"] and not of_pictures["--map"]:
            raise UsageError("`--png` needs `--map`", hint="add `--map`")
        if not local(input_).exists():
            hint = "pass an image, or a folder, zip, tar or npz of images"
            raise MissingError(f"`{input_}` does not exist", hint=hint)
    elif strange:
        raise UsageError(f"`{strange}` needs `--input`", hint=of_images)
    elif of_sets["--imglists"] and not of_sets["--benchmark"]:
        raise UsageError("`--imglists` needs `--benchmark`", hint="--benchmark openood-cifar10")
    elif of_sets["--out"]:
        split_sets(of_sets["--out"])
    elif not of_sets["--benchmark"] and not alone:
        message = "`gz ood` needs the images to judge: `--input`, `--out` or `--benchmark`"
        raise UsageError(message, hint=of_images)


def method_of(model: str | None, in_: str | None, of_sets: Mapping[str, Any]) -> str | None:
    """The method without training that a command names. It is `DEFAULT` if the command names nothing, and
    None if it names a model or a run. Raises UsageError if a method lacks its images."""
    method = DEFAULT if model is None else matching(model, tuple(METHODS))
    if method is None:
        return None
    hint = " ".join(filter(None, ["gz ood", model, "--in ./good --input ./today"]))
    if of_sets["--benchmark"]:
        message = "`--benchmark` needs a model; use `--out` with a method that requires no training"
        words = filter(None, ["gz ood", model, "--in mnist --out fashionmnist"])
        raise UsageError(message, hint=" ".join(words))
    if not in_:
        raise UsageError("a method that requires no training needs good images: `--in`", hint=hint)
    return method


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


def of_runs(
    model: str, ctx: typer.Context, inside: DataSet | None, scores: list[str]
) -> tuple[Run, ModelCard, DataSection, dict[str, Any]]:
    """The first of the runs, its model, its data, and the settings of a job that depend on the runs."""
    from gzcli.launch.from_file import find_run
    from gzcli.models.catalog import card_of
    from gzcli.recipe.schema import score_options

    words = ctx.args
    at = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    run = find_run(model, data=inside.key if inside else None, typed=inside.reference if inside else None)
    home = inside or locate(part_of(run.serving.tree()).data.name)
    runs = [run, *(find_run(word, data=home.key) for word in words[:at])]
    parts = [part_of(each.serving.tree()) for each in runs]
    cards = [card_of(each, part.model) for each, part in zip(runs, parts, strict=True)]
    trained_on = [part.data.name for part in parts]
    for each, name in zip(runs, trained_on, strict=True):
        if data_key(name) != data_key(trained_on[0]):
            message = f"`{each.id}` was trained on `{name}`, but the first run on `{trained_on[0]}`"
            raise UsageError(message, hint="use runs that were trained on the same data set")
    chosen = choose_scores(scores, cards, parts[0].ood.scores)
    what = f"`gz ood {cards[0].name}`"
    options = jobs.method_options(words[at:], score_options(cards[0]), what, "ood", verb=ctx.command)
    paths = [str(each.path) for each in runs]
    settings = {"run": paths[0], "others": tuple(paths[1:]), "ins": home.reference}
    return run, cards[0], parts[0].data, settings | {"scores": chosen, "options": options}


def choose_scores(
    names: list[str], cards: Sequence[ModelCard], of_recipe: Sequence[str] | None
) -> tuple[str, ...] | None:
    """The scores by their exact names; for several runs, those that all of them have. None means the recipe's
    scores."""
    from gzcli.recipe.schema import check_scores, score_names

    if [canonical(name) for name in names] == ["all"]:
        return ("all",)
    if names or len(cards) == 1:
        plain = [name for name in names if canonical(name) != "waic"]
        for card in cards:
            plain = check_scores(plain, card)
        proper = iter(plain)
        return tuple("waic" if canonical(name) == "waic" else next(proper) for name in names) or None
    scores = [set(score_names(card)) for card in cards]
    common = [name for name in of_recipe or score_names(cards[0]) if all(name in each for each in scores)]
    waic = ["waic"] if all("nll" in each for each in scores) else []
    if not common + waic:
        raise UsageError("the runs have no score in common", hint="gz list models --can ood")
    return tuple(common + waic)


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


def benchmark_of(name: str, in_: str | None, out_: str | None) -> Benchmark:
    """The benchmark with this name. Raises UsageError if sets other than its own are named."""
    from gzcli.data.sets.benchmarks import find_benchmark

    benchmark = find_benchmark(name)
    if out_ or (in_ and in_ != benchmark.inside):
        message = f"`{benchmark.name}` defines its own data sets: `--in {benchmark.inside}`"
        raise UsageError(message, hint="omit `--in` and `--out`")
    return benchmark


def with_lists(benchmark: Benchmark, root: Path) -> list[DataSet]:
    """The foreign sets of a benchmark whose lists are in OpenOOD's `data` folder. Prints the omitted sets."""
    from gzcli.data.library import list_of

    names = (*benchmark.near, *benchmark.far)
    sets = [locate(name) for name in names if list_of(root, benchmark, name)]
    for name in set(names).difference(one.key for one in sets):
        out.info(f"left out: `{name}`, because `{root}` has no list of it")
    if not sets or not list_of(root, benchmark, benchmark.inside):
        raise MissingError(f"`{root}` has no lists of `{benchmark.name}`", hint="omit `--imglists`")
    return sets


def at_hand(benchmark: Benchmark, data: DataSection) -> list[DataSet]:
    """The foreign sets of a benchmark that are in the cache or small enough to download. Prints the omitted
    sets."""
    from gzcli.data.packs.open import open_pack, pack_options

    sets, names = [], (*benchmark.near, *benchmark.far)
    for foreign in map(locate, names):
        try:
            open_pack(foreign, **pack_options(data), say=out.info)
            sets.append(foreign)
        except MissingError as e:
            out.info(f"left out: {e.message} ({e.hint})")
    if not sets:
        message = f"no out-of-distribution data set of `{benchmark.name}` is available"
        raise MissingError(message, hint=f"gz data download {' '.join(names)}")
    return sets


def rate(text: str | None) -> float:
    """The value of `--fpr`, such as `1%` or `0.01`, as a fraction. Raises UsageError outside 0 … 1."""
    word = (text or "1%").strip()
    try:
        share = float(word.removesuffix("%")) / (100 if word.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        hint = f"`--fpr {word}%`" if 1 <= share < 100 and "%" not in word else "`--fpr 1%`, or `--fpr 0.01`"
        raise UsageError(f"`--fpr {text}` is not a rate between 0 and 1", hint=hint)
    return share


# ---------------------------------------------------------------------------- what is printed


def write_alarm(reference: str, place: Path, how: Mapping[str, Any]) -> dict[str, Any]:
    """Exports the alarm of a method on good images into a folder. Returns the result as JSON."""
    from gzcli.store.jobs import PortableJob

    claims.check_empty(place)
    folder = claims.new_folder(user_dir("ood"), "export")
    result = jobs.do_job(folder, PortableJob("", reference, "", ANY_RATE, out=str(place), **how))
    out.info(
        f"`{result['method']}` with {result['held_out']:,} held-out scores: {', '.join(result['files'])}"
    )
    least = max(1.0, math.ceil(1000 / (result["held_out"] + 1)) / 10)
    then = (f"python {quoted(place / 'judge.py')} ./today --fpr {least:g}%", "run it without gz")
    end([f"exported to {quoted(place)}", took()], [then])
    return result


def table_of_defects(result: Mapping[str, Any]) -> None:
    """Prints a line for each kind of defect, then their mean, and the number of flagged good images."""
    rate, lines = f"at {percent(result['fpr'])}", []
    for row in result["defects"]:
        interval = "–".join(f"{end:.3f}".removeprefix("0") for end in row["ci"] or ())
        line = [row["defect"], f"{row['auroc']:.4f}", interval, f"{row['detected_n']} of {row['n']}"]
        figures = (row[key] for key in ("pixel_auroc", "aupro", "pixel_f1"))
        lines.append(line + ["" if value is None else f"{value:.4f}" for value in figures])
    columns = ["defect", "auroc", "(95 %)", rate, "pixel auroc", "aupro", "pixel f1"]
    out.table(columns, lines, spare=("pixel f1", "(95 %)"), elsewhere="see `--json`")
    good = result["good"]
    out.info(f"good test images flagged {rate}: {good['flagged']:,} of {good['n']:,}")
    for message in result["unreadable"]:
        out.warn(f"left out: {message}")


def ending(result: Mapping[str, Any], folder: Path, name: str, maps: bool) -> None:
    """Prints the final lines of `gz ood`: the best score or the flagged images, and the next commands. maps:
    whether the run or method has maps."""
    if "defects" in result:
        mean = result["defects"][-1]
        summary = (
            f"{mean['detected_n']:,} of {counted(mean['n'], 'defect')} detected, AUROC {mean['auroc']:.3f}"
        )
        more = better_without(result) or (f"gz ood {name} --input ./today --fail", "check images one by one")
        return end([summary, took()], [more])
    if "thresholds" in result:
        flagged = sum(row["flagged"] for row in result["files"])
        again = f"gz ood {name} --input {quoted(result['input'])}"
        shown = maps and not result.get("map")
        more = (f"{again} --map", "show where they are unusual") if shown else (f"{again} --fpr 5%", "")
        more = better_without(result) or more
        return end([f"{flagged:,} of {counted(len(result['files']), 'image')} flagged", took()], [more])
    scores = [row for row in result["results"] if not row["baseline"]]
    best = max(scores, key=lambda row: row["auroc"], default=None)
    best_score = f"best score `{best['score']}`, AUROC {best['auroc']:.3f}" if best else None
    if best and result["run"]:
        best_score = f"{best_score}{beaten_by(best, result['results'])}"
    single = (f"gz ood {name} --input ./pictures", "check your own images one by one")
    end([best_score, took()], [*page_of(result, folder), single])


def beaten_by(best: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The note on the best score of a run if a method without a model does as well on the same set."""
    tails = {name: method.tails for name, method in METHODS.items()}
    sided = [row for row in rows if row["out"] == best["out"] and tails.get(row["score"]) == 1]
    method = max(sided, key=lambda row: row["auroc"], default=None)
    least = min([best["auroc"], *((best["ci"] or {}).get("auroc") or ())])
    if not method or method["auroc"] < least:
        return ""
    return f", not clearly better than `{method['score']}` without a model ({method['auroc']:.3f})"


def better_without(result: Mapping[str, Any]) -> tuple[str, str] | None:
    """The command for an alarm without a model, if that detects at least as many synthetic defects as the
    run."""
    table = result["choice"] if result["run"] else {}
    if not table or max(table, key=lambda name: (table[name], name == DEFAULT)) != DEFAULT:
        return None
    words = f"gz ood --in {quoted(result['in'])}"
    if "defects" not in result:
        words += f" --input {quoted(result['input'])}"
    if result["fpr"] != rate(None):
        words += f" --fpr {100 * result['fpr']:g}%"
    return words, "detects at least as many synthetic defects without a model"


def table(result: Mapping[str, Any]) -> None:
    """Prints a line for each foreign set and score, with 95 % intervals."""
    names, rows = result["names"], result["results"]
    several = len({row["out"] for row in rows}) > 1
    error = "± seeds" if any("spread" in row for row in rows) else "(95 %)"
    lines = []
    for row in rows:
        line = [names.get(row["out"], row["out"])] if several else []
        line.append(row["score"] + "*" * row["baseline"])
        for key in ("auroc", "fpr95"):
            ends = [f"{end:.3f}".removeprefix("0") for end in (row["ci"] or {}).get(key) or ()]
            spread = f"±{row['spread'][key]:.4f}" if "spread" in row else "–".join(ends)
            line += [f"{row[key]:.4f}", spread]
        lines.append(line + [f"{row[key]:.4f}" for key in ("fpr95_id", "aupr_in", "aupr_out")])
    columns = ["score", "auroc", error, "fpr95", error, "fpr95_id", "aupr_in", "aupr_out"]
    spare, elsewhere = ("aupr_in", "aupr_out", "fpr95_id", error), "see `gz report` or `--json`"
    out.table([*(["out"] if several else []), *columns], lines, spare=spare, elsewhere=elsewhere)
    counts = {names[row["out"]]: row["n_out"] for row in rows if row["out"] in names}
    sizes = ", ".join(f"{n:,} of `{name}`" for name, n in counts.items())
    inside = f"{rows[0]['n_in']:,} of `{names[result['in']]}`"
    out.info(f"images: {inside} (in), {sizes} (out); * marks baselines, which use no model")


def table_of_pictures(result: Mapping[str, Any]) -> None:
    """Prints the flagged images, the most unusual first, and their number. The table fits 80 columns."""
    flagged = [row for row in result["files"] if row["flagged"]]
    names, draws = list(result["thresholds"]), result["seeds"]
    shown = names[: 1 if draws > 1 else 2]  # as many as fit into 80 columns, with their spread
    heads = ["file", "p", *(head for name in shown for head in ([name, "±"] if draws > 1 else [name]))]
    lines = []
    for row in flagged[:LINES]:
        file = row["file"] if len(row["file"]) <= NAME else f"…{row['file'][1 - NAME :]}"
        line = [file, f"{row['p']:.4f}"]
        for name in shown:
            score = row["scores"][name]
            line.append("not finite" if score is None else f"{score:.4g}")
            if draws > 1:
                line.append("" if score is None else f"{row['spread'][name]:.2g}")
        lines.append(line)
    if lines:
        out.table(heads, lines)
    for text in facts_of_alarm(result, flagged):
        out.info(text)
    for message in result["unreadable"]:
        out.warn(f"left out: {message}")


def facts_of_alarm(result: Mapping[str, Any], flagged: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The note below the table of flagged images."""
    total, draws = len(result["files"]), result["seeds"]
    if len(flagged) > LINES:
        yield f"and {len(flagged) - LINES:,} more: `alarm.csv` lists all images, most unusual first"
    by = f"by {', '.join(result['thresholds'])}, against {result['compared']['n']:,} held-out images"
    yield f"flagged: {len(flagged):,} of {counted(total, 'image')} {by}"
    if draws > 1:
        yield f"scores are means over {draws} noise draws; ± is their standard deviation"
    if low := sum(row["side"] == "low" for row in flagged):
        yield f"{low:,} have an unusually low score, which is typical of very simple images"
    of_set, expected = Path(result["in"]).name, result["fpr"] * total
    most = "about" if result["compared"].get("folds", 1) > 1 else "at most"  # the bound by folds is a note
    share = f"on average, {most} {percent(result['fpr'])} of images like those of `{of_set}` are flagged"
    yield f"{share}: {expected:.2g} of {total:,}" if expected >= 1 else share
    if len(flagged) < total and not any(map(is_local, result["thresholds"])):
        yield "the others may still be anomalous: whole-image scores miss small defects"
