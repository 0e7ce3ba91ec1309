"""`gz ood`: how well the scores of a trained model separate foreign images from its training set. With
`--input`, an alarm for each of the user's images. The forecast is in `launch.scoring`, the tables are in
`report.terminal`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from gzcli.cli import jobs, out
from gzcli.cli import options as opt
from gzcli.cli.jobs import end, quoted, took
from gzcli.cli.model_options import a_score, card_for, flag
from gzcli.cli.options import a_set, option, split
from gzcli.cli.report import check_report, page_of, with_report
from gzcli.core.errors import FLAGGED, MissingError, UsageError, canonical, matching
from gzcli.core.sections import LaunchSection, part_of
from gzcli.core.units import percent
from gzcli.data.readers.inspection import open_inspection
from gzcli.data.sets.registry import OwnSet, data_key, is_set, local, locate, slug
from gzcli.metrics.alarms.methods import DEFAULT, LOCAL, METHODS, reduced_size
from gzcli.store import claims
from gzcli.store.paths import user_dir
from gzcli.store.run_folder import Run

if TYPE_CHECKING:
    from gzcli.core.sections import DataSection
    from gzcli.data.sets.benchmarks import Benchmark
    from gzcli.data.sets.registry import DataSet
    from gzcli.launch.scoring import Cost, Scoring
    from gzcli.models.catalog import ModelCard
    from gzcli.store.jobs import AlarmJob, OodJob

SETTINGS = jobs.OWN_OPTIONS
ANY_RATE = 0.5  # rate of an exported alarm, whose user sets it
# Most images on which scores are fitted that have maps, and approximate number of synthetic defects.
MAPPED, DEFECTS = 200, 100

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
    from gzcli.recipe.schema import score_options
    from gzcli.store.jobs import AlarmJob, InspectJob, OodJob

    check_report(report)
    pairs = (("-n", n, "--full", full), ("--out", out_, "--export", export))
    if both := next(((one, two) for one, first, two, second in pairs if first and second), None):
        raise UsageError(f"`{both[0]}` and `{both[1]}` exclude each other", hint="omit one of them")
    of_pictures = {"--fpr": fpr, "--calibrate": calibrate, "--map": map_, "--png": png, "--fail": fail}
    of_sets = {"--out": out_, "--benchmark": benchmark, "--imglists": imglists}
    layout = inspection_at(in_) if in_ and not benchmark else None
    inspected = None if input_ or out_ else layout
    model, unknown = jobs.model_and_words(model, ctx)
    model = opt.spelled(model, pretrained) if model else None
    typed = " ".join(filter(None, [model and quoted(model), f"--in {quoted(in_)}" if in_ else None]))
    of_model = {"--score": score, "--background": background, "--seeds": seeds, "--precision": precision}
    of_model |= {"--checkpoint": checkpoint != "last", "--pretrained": pretrained, "--processes": processes}
    of_model |= {} if out_ else {"-n": n, "--full": full}  # a method compares images with all good ones
    method = DEFAULT if model is None else matching(model, tuple(METHODS))
    card = card_for(model) if model and unknown and not method else None
    of_scores = [flag(name) for name in score_options(card)] if card else ()
    refused = of_model if method else ()
    spelling = partial(jobs.misspellings, unknown, ctx, of_model=of_scores, refused=refused)
    with spelling():
        alone = ("--fpr", "--calibrate") if inspected else ("--calibrate",) if export else ()
        check_options(typed, input_, of_pictures, of_sets, alone=alone)
    share, further = rate(fpr), calibrating(calibrate, in_)
    if method:
        check_method(method, model, in_, of_sets, of_model)
    if export and not method:
        hint = f"gz runs export {quoted(model or 'RUN')} --to alarm"
        raise UsageError("`--export` needs a method that requires no training", hint=hint)
    openood = benchmark_of(benchmark, in_, out_) if benchmark else None
    name = openood.inside if openood else in_
    inside = layout.home if layout else locate(name) if name else None
    if method:
        with spelling():
            scorer = of_method(method, inside, unknown)
    else:
        scorer = of_runs(model or "", ctx, inside, split(score))
    if map_ and scorer.card:
        check_maps(scorer.card)
    settings = {**scorer.settings, "checkpoint": checkpoint, "n": n, "full": full, "seed": seed}
    settings |= {"background": str(find_run(background).path) if background else None}
    settings |= {"precision": precision, "launch": LaunchSection(opt.parse_gpus(gpus), cpu, processes)}
    job: AlarmJob | OodJob
    if inspected or input_ is not None or export:
        kind, path = (InspectJob, inspected.path) if inspected else (AlarmJob, local(input_ or ""))
        images = str(path) if inspected or input_ else ""
        settings |= {"calibrate": further, "maps": map_ or bool(method), "png": png, "seeds": seeds}
        job, label = kind(input=images, fpr=share, **settings), slug(path.stem)
    else:
        lists = local(imglists) if imglists else None
        foreign = foreign_sets(out_, openood, lists, scorer.data)
        settings |= {"benchmark": openood and openood.name, "imglists": str(lists) if lists else None}
        job = OodJob(outs=tuple(one.reference for one in foreign), seeds=seeds or 1, **settings)
        label = openood.name if openood else label_of(job.outs)
    if submit or slurm:
        of = f"ood-{slug(model or job.ins)}"
        return jobs.submit("ood", of, seed, job.launch, slurm, dry_run=dry_run)
    if scorer.run:
        jobs.announce(scorer.run, model or "", data=inside.key if inside else None)
    if dry_run:
        return show_dry(job, scorer.run)
    if export:
        assert isinstance(job, AlarmJob)
        exported = write_alarm(job, local(export))
        if input_ is None:
            return out.data(exported)
    folder = claims.new_folder(scorer.folder, f"{scorer.prefix}{label}")
    result = jobs.do_job(folder, job)
    mapped = bool(scorer.card.maps if scorer.card else METHODS[result["method"]].mapped)
    finish(result, folder, typed, mapped, report, fail)


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
    alone: Sequence[str] = (),
) -> None:
    """Raises UsageError for options that cannot be combined, MissingError if there are no images.

    typed: the model and `--in` of the command line, for hints.
    alone: the options of single images that need no `--input`, as for an inspection set; () if `--in` alone
      does not suffice.
    """
    of_images = f"gz ood {typed or '--in ./good'} --input ./today"
    wrong = of_pictures if input_ is None else of_sets
    typed_ones = (name for name, value in wrong.items() if value not in (None, False))
    strange = next((name for name in typed_ones if name not in alone), None)
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


def check_method(
    method: str, typed: str | None, in_: str | None, of_sets: Mapping[str, Any], of_model: Mapping[str, Any]
) -> None:
    """Raises UsageError if a method without training, which may be typed, lacks its images, or gets an option
    of models."""
    hint = " ".join(filter(None, ["gz ood", typed, "--in ./good --input ./today"]))
    if of_sets["--benchmark"]:
        message = "`--benchmark` needs a model; use `--out` with a method that requires no training"
        words = filter(None, ["gz ood", typed, "--in mnist --out fashionmnist"])
        raise UsageError(message, hint=" ".join(words))
    if not in_:
        raise UsageError("a method that requires no training needs good images: `--in`", hint=hint)
    if strange := next((name for name, value in of_model.items() if value), None):
        message = f"`{strange}` needs a model or a run, but `{method}` is a method that requires no training"
        raise UsageError(
            message, hint=f"omit `{strange}`, or name a model: `gz ood MODEL --in {quoted(in_)}`"
        )


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


class Scorer(NamedTuple):
    """Runs that score images, or a method without training."""

    settings: Mapping[str, Any]  # settings of jobs that depend on it
    folder: Path  # of its outputs, whose names begin with the prefix
    prefix: str = ""
    run: Run | None = None  # the first of the runs
    card: ModelCard | None = None  # of its model
    data: DataSection | None = None  # of its recipe


def of_method(method: str, inside: DataSet | None, words: list[str]) -> Scorer:
    """A method that is fitted to the images of a set, with the options in these words."""
    assert inside
    settings = {"run": "", "ins": inside.reference, "method": method, "size": size_in(words)}
    return Scorer(settings, user_dir("ood"), f"{inside.key}-")


def of_runs(model: str, ctx: typer.Context, inside: DataSet | None, scores: list[str]) -> Scorer:
    """The run of a model, and the further runs in the words of the command line."""
    from gzcli.launch.from_file import find_run
    from gzcli.models.catalog import card_of
    from gzcli.recipe.schema import score_options

    words = ctx.args
    at = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))

    def options_of(card: ModelCard) -> dict[str, Any]:
        what = f"`gz ood {card.name}`"
        return jobs.method_options(words[at:], score_options(card), what, "ood", verb=ctx.command)

    key = inside.key if inside else None
    run = jobs.run_of(model, key, inside.reference if inside else None, options_of)
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
    options = options_of(cards[0])
    paths = [str(each.path) for each in runs]
    settings: dict[str, Any] = {"run": paths[0], "others": tuple(paths[1:]), "ins": home.reference}
    settings |= {"scores": chosen, "options": options}
    return Scorer(settings, run.path / "ood", "", run, cards[0], parts[0].data)


def check_maps(card: ModelCard) -> None:
    """Raises UsageError if a model has no anomaly maps."""
    from gzcli.models.catalog import cards

    if not card.maps:
        able = ", ".join(model.name for model in cards().values() if model.maps)
        raise UsageError(f"`{card.name}` has no anomaly maps", hint=f"models with maps: {able}")


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


def foreign_sets(
    names: str | None, benchmark: Benchmark | None, lists: Path | None, data: DataSection | None
) -> list[DataSet]:
    """The sets of `--out`, or those of a benchmark, either with lists in OpenOOD's folder or in the form of a
    run's data."""
    if benchmark is None:
        return [locate(name) for name in split_sets(names or "")]
    assert data
    return with_lists(benchmark, lists) if lists else at_hand(benchmark, data)


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


def label_of(outs: Sequence[str]) -> str:
    """The label of the output folder for scores of foreign sets."""
    return "-".join(slug(name.rsplit("/", 1)[-1]) for name in outs)[:80]


def rate(text: str | None) -> float:
    """The value of `--fpr`, such as `1%` or `0.01`, as a fraction. Raises UsageError outside 0 … 1."""
    word = "1%" if text is None else text.strip()
    try:
        share = float(word.removesuffix("%")) / (100 if word.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        hint = f"`--fpr {word}%`" if 1 <= share < 100 and "%" not in word else "`--fpr 1%`, or `--fpr 0.01`"
        raise UsageError(f"`--fpr {text}` is not a rate between 0 and 1", hint=hint)
    return share


def calibrating(text: str | None, in_: str | None) -> str | None:
    """The name or the path of the images for calibration; None without `--calibrate`. Raises MissingError if
    there are none, UsageError for those of `--in`, to which methods are fitted."""
    if text is None:
        return None
    if not text or not (is_set(text) or local(text).exists()):
        hint = "pass a folder, zip, tar or npz of good images, or the name of a data set"
        raise MissingError(f"`--calibrate {text}` does not exist", hint=hint)
    if in_ and data_key(text) == data_key(in_):
        hint = "omit `--calibrate`, or pass other good images"
        raise UsageError("`--calibrate` and `--in` are the same images", hint=hint)
    return text if is_set(text) else str(local(text))


# ---------------------------------------------------------------------------- what is printed


def show_dry(job: OodJob | AlarmJob, run: Run | None) -> None:
    """Prints the images that a run, or a method without training, would score, and the time."""
    from gzcli.store.jobs import OodJob

    if run is None:
        return show_dry_method(job)
    return show_dry_sets(run, job) if isinstance(job, OodJob) else show_dry_alarm(run, job)


def show_dry_sets(run: Run, job: OodJob) -> None:
    """Prints the data sets that a run would score, and the time."""
    from gzcli.launch import scoring

    by, cost = cost_of(run, job, scoring.fitted_for_sets(job))
    show_forecast(job.ins, job.outs, by, scoring.of_sets(job, cost))


def show_dry_alarm(run: Run, job: AlarmJob) -> None:
    """Prints the images that a run would check, and the time. Warns if the held-out images are too few for
    the rate."""
    from gzcli.launch import scoring
    from gzcli.metrics.alarms.choice import FEWEST
    from gzcli.metrics.conformal import fewest

    is_chosen = not (job.scores or job.others)
    needed = fewest(job.fpr, 1 if is_chosen else len(job.scores or ()))
    total, compared, fitted = scoring.held_out(job, needed)
    by, cost = cost_of(run, job, fitted)
    enough = total if job.n is None else min(job.n, total or job.n)
    warn_if_few(job.fpr, needed, enough, "held-out")
    choosing = mapped(fitted) if is_chosen and fitted >= FEWEST else 0
    show_forecast(job.ins, [job.input], by, scoring.of_alarm(job, cost, compared, choosing))


def show_dry_method(job: OodJob | AlarmJob) -> None:
    """Prints what a method without training is fitted to and what it checks, and the time. Warns if the good
    images are too few for the rate."""
    from gzcli.data.packs.open import counts_of, facts_of
    from gzcli.launch import scoring
    from gzcli.metrics.conformal import fewest
    from gzcli.store.jobs import OodJob

    forecast = scoring.of_method(job, job.size or reduced_size(facts_of(locate(job.ins))))
    if isinstance(job, OodJob):
        return show_forecast(job.ins, job.outs, job.method or "", forecast)
    good, kind = scoring.good_images(job), "good"
    if job.calibrate:
        good, kind = counts_of(locate(job.calibrate), foreign=True), "further good"
    warn_if_few(job.fpr, fewest(job.fpr), sum(good.values()) if good else None, kind)
    show_forecast(job.ins, [job.input or job.ins], job.method or "", forecast)


def warn_if_few(fpr: float, needed: int, n: int | None, kind: str) -> None:
    """Warns if n images of this kind are fewer than the rate needs."""
    if n is not None and n < needed:
        rate = f"a false-alarm rate of {percent(fpr)}"
        out.warn(f"{rate} needs {needed:,} {kind} images, but there are only {n:,}")


def cost_of(run: Run, job: OodJob | AlarmJob, fitted: int) -> tuple[str, Cost]:
    """The names of a job's scores, and their cost if they are fitted on so many images."""
    from gzcli.launch.scoring import Cost

    names = job.scores or part_of(run.serving.tree()).ood.scores or ()
    # `local` is added to scores that are not named
    timed = names if job.scores or not names else (*names, LOCAL)
    return ", ".join(names), Cost.of(
        run, job, timed, fitted, mapped(fitted), judges_of(run, job, names), out.info
    )


def judges_of(run: Run, job: OodJob | AlarmJob, names: Sequence[str]) -> float:
    """The seconds to train the judge network by which these scores of a run compare images; 0 if it is
    trained or not needed."""
    from gzcli.data.packs.open import pack_options, peek
    from gzcli.metrics import networks
    from gzcli.models.catalog import card_of

    part = part_of(run.serving.tree())
    compares = set(names).intersection(card_of(run, part.model).perceptual_scores)
    if not compares or {**part.ood.options, **job.options}.get("pixels") or networks.has_lpips():
        return 0.0
    data = locate(job.ins)
    pack = peek(data, **pack_options(part.data))
    if pack and pack.values:  # only pixels are compared
        return 0.0
    return networks.TRAINING * len(networks.untrained(("fd",), data, pack))


def mapped(fitted: int) -> int:
    """The images whose maps `local` is fitted to: some on which scores are fitted, and synthetic defects."""
    from gzcli.metrics.alarms.choice import FEWEST

    return min(MAPPED, fitted) + (DEFECTS if fitted >= FEWEST else 0)


def show_forecast(ins: str, against: Sequence[str], by: str, scoring: Scoring) -> None:
    """Prints the sets or images to score, the scores, and the forecast."""
    for label, text in (
        ("in", ins),
        ("against", ", ".join(against)),
        ("by", by or "the model's default scores"),
        ("images", scoring.images),
        ("time", scoring.time),
    ):
        out.text("\n".join(out.fitted(text, f"{label:<9}")))
    for note in scoring.notes:
        out.info(note)
    out.data({"in": ins, "against": list(against), "by": by, **scoring.facts})


def write_alarm(job: AlarmJob, place: Path) -> dict[str, Any]:
    """Exports the alarm of a method on good images into a folder. Returns the result as JSON."""
    from gzcli.metrics.conformal import lowest_rate
    from gzcli.store.jobs import PortableJob

    claims.check_empty(place)
    folder = claims.new_folder(user_dir("ood"), "export")
    settings = vars(job) | {"input": "", "fpr": ANY_RATE, "verb": PortableJob.verb}
    result = jobs.do_job(folder, PortableJob(**settings, out=str(place)))
    out.info(
        f"`{result['method']}` with {result['held_out']:,} held-out scores: {', '.join(result['files'])}"
    )
    least = max(1.0, lowest_rate(result["held_out"]))
    then = (f"python {quoted(place / 'judge.py')} ./today --fpr {least:g}%", "run it without gz")
    end([f"exported to {quoted(place)}", took()], [then])
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


def finish(
    result: dict[str, Any], folder: Path, words: str, maps: bool, report: Path | None, fail: bool
) -> None:
    """Prints the table and the lines after it. Exits with the code `FLAGGED` if that was requested."""
    from gzcli.report import terminal

    show(result)
    for text in (*(f"note: {note}" for note in result.get("notes", [])), f"files: {folder}"):
        out.info(text)
    result = with_report(result, folder, report)
    summary, then = terminal.ending(result, words, maps)
    end([summary, took()], [*(page_of(result, folder) if "results" in result else []), then])
    out.data(result)
    if fail and (result["flagged"] or result["unreadable"]):
        raise SystemExit(FLAGGED)
