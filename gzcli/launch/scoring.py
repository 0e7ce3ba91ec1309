"""The request of `gz ood`: the job that scores data sets or single images, by runs or by a method without
training, and its cost. Nothing is scored here.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from gzcli.core.errors import MissingError, UsageError, canonical, matching
from gzcli.core.hints import advice, gz
from gzcli.core.sections import DataSection, LaunchSection, part_of
from gzcli.core.types import Say, silent
from gzcli.core.units import MAX_SCORED_IMAGES, Size, about, affordable, as_size, percent, short
from gzcli.data.library import list_of
from gzcli.data.packs import open as packs
from gzcli.data.packs.open import counts_of, crops_of, facts_of, pack_options
from gzcli.data.readers.inspection import open_inspection
from gzcli.data.readers.layouts import DEFECTS as DEFECTS_LAYOUT
from gzcli.data.sets.benchmarks import Benchmark, find_benchmark
from gzcli.data.sets.registry import DataSet, Form, OwnSet, data_key, is_set, local, locate, slug
from gzcli.launch import forecast, launcher
from gzcli.launch.cost import START_UP, UNKNOWN, Cost, checking, judge_networks, together
from gzcli.launch.from_file import find_run, trained_run
from gzcli.metrics import networks
from gzcli.metrics.alarms.methods import DEFAULT_METHOD, LOCAL, METHODS, reduced_size
from gzcli.models import catalog
from gzcli.models.catalog import ModelCard
from gzcli.recipe.schema import check_scores, score_names
from gzcli.store import claims, pretrained
from gzcli.store.jobs import AlarmJob, InspectJob, OodJob, PortableJob
from gzcli.store.paths import user_dir
from gzcli.store.run_folder import Run

MAX_SEEDS, MAX_FITTED = 4, 500  # most draws of noise of an alarm, and most images on which scores are fitted
MOST_FITTED = 2000  # most images to which a method is fitted
# most images on which scores are fitted that have maps, and approximate number of synthetic defects
MAPPED_IMAGES, MAPPED_DEFECTS = 200, 100
ANY_RATE = 0.5  # rate of an exported alarm, whose user sets it
# options that a method without training does not have, with their fields; the last two only for single images
OF_MODEL = {f"--{name}": name for name in ("background", "seeds", "precision", "checkpoint", "pretrained")}
OF_MODEL |= {"--score": "scores", "--processes": "launch.processes", "-n": "n", "--full": "full"}


class Inspected(NamedTuple):
    """An inspection set: its path, and the good images in it."""

    path: Path
    home: DataSet


@dataclass(frozen=True, kw_only=True)
class Question:
    """The options of `gz ood`, checked against each other. None, (), "" and False mean an omitted option.

    what: a model or a run, with further runs of an ensemble; or a method without training. (): the default
      method.
    keywords: function from the card of the model to the keywords of its scores, and from None to the settings
      of a method without training.
    """

    keywords: Callable[[ModelCard | None], Mapping[str, Any]]
    what: tuple[str, ...] = ()
    pretrained: bool = False
    ins: str | None = None
    outs: tuple[str, ...] = ()
    benchmark: str | None = None
    imglists: str | None = None
    input: str | None = None
    fpr: str | float | None = None
    calibrate: str | None = None
    export: str | None = None
    maps: bool = False
    png: bool = False
    fail: bool = False
    scores: tuple[str, ...] = ()
    n: int | None = None
    full: bool = False
    background: str | None = None
    seeds: int | None = None
    checkpoint: str = "last"
    seed: int = 0
    precision: str | None = None
    launch: LaunchSection = field(default_factory=LaunchSection)

    def __post_init__(self) -> None:
        """Raises UsageError for options that cannot be combined, MissingError if there are no images."""
        for (one, first), (two, second) in (
            (("-n", self.n), ("--full", self.full)),
            (("--out", self.outs), ("--export", self.export)),
        ):
            if first and second:
                raise UsageError(f"`{one}` and `{two}` exclude each other", hint="omit one of them")
        self._check_images()
        if self.method:
            self._check_method(self.method)
        elif self.export:
            hint = gz("runs export", self.model or "RUN", to="alarm")
            raise UsageError("`--export` needs a method that requires no training", hint=hint)

    @property
    def model(self) -> str | None:
        """The model, the first run or the method."""
        return pretrained.spelled(self.what[0], self.pretrained) if self.what else None

    @property
    def method(self) -> str | None:
        return method_of(self.model)

    @property
    def words(self) -> str:
        """The model and `--in` as words of a command line."""
        model = [shlex.quote(self.model)] if self.model else []
        return " ".join([*model, *(["--in", shlex.quote(self.ins)] if self.ins else [])])

    @cached_property
    def layout(self) -> Inspected | None:
        """The inspection set of `--in`; None for any other set."""
        return inspection_at(self.ins) if self.ins and not self.benchmark else None

    @property
    def inspected(self) -> Inspected | None:
        """The inspection set whose defects are to be detected."""
        return None if self.input or self.outs else self.layout

    def _check_images(self) -> None:
        of_pictures = {"--fpr": self.fpr, "--calibrate": self.calibrate, "--map": self.maps}
        of_pictures |= {"--png": self.png, "--fail": self.fail}
        of_sets = {"--out": self.outs, "--benchmark": self.benchmark, "--imglists": self.imglists}
        names, ins = [self.model] if self.model else [], self.ins or (None if self.model else "./good")
        of_images = gz("ood", *names, in_=ins, input="./today")
        # the options of single images that need no `--input`
        alone = ("--fpr", "--calibrate") if self.inspected else ("--calibrate",) if self.export else ()
        wrong = of_pictures if self.input is None else of_sets
        used = (name for name, value in wrong.items() if value not in (None, False, ()))
        strange = next((name for name in used if name not in alone), None)
        if self.input is not None:
            if strange:
                message = f"`--input` checks single images, but `{strange}` compares data sets"
                raise UsageError(message, hint="omit one of them")
            if self.png and not self.maps:
                raise UsageError("`--png` needs `--map`", hint="add `--map`")
            if not local(self.input).exists():
                hint = "pass an image, or a folder, zip, tar or npz of images"
                raise MissingError(f"`{self.input}` does not exist", hint=hint)
        elif strange:
            raise UsageError(f"`{strange}` needs `--input`", hint=of_images)
        elif self.imglists and not self.benchmark:
            raise UsageError("`--imglists` needs `--benchmark`", hint="--benchmark openood-cifar10")
        elif not (self.outs or self.benchmark or alone):
            message = "`gz ood` needs the images to judge: `--input`, `--out` or `--benchmark`"
            raise UsageError(message, hint=of_images)

    def _check_method(self, method: str) -> None:
        """Raises UsageError if a method without training, which may be named, lacks its images, or gets an
        option of models."""
        if self.benchmark:
            message = "`--benchmark` needs a model; use `--out` with a method that requires no training"
            raise UsageError(message, hint=gz("ood", *self.what[:1], in_="mnist", out="fashionmnist"))
        if not self.ins:
            message = "a method that requires no training needs good images: `--in`"
            raise UsageError(message, hint=gz("ood", *self.what[:1], in_="./good", input="./today"))
        values = {flag: attrgetter(name)(self) for flag, name in OF_MODEL.items()}
        allowed = ("-n", "--full") if self.outs else ()  # it compares single images with all good ones
        used = (flag for flag, value in values.items() if value and value != "last" and flag not in allowed)
        if strange := next(used, None):
            what = f"but `{method}` is a method that requires no training"
            hint = advice(f"omit `{strange}`, or name a model: {{}}", gz("ood", "MODEL", in_=self.ins))
            raise UsageError(f"`{strange}` needs a model or a run, {what}", hint=hint)


def method_of(model: str | None) -> str | None:
    """The method without training that a word refers to, or that is used without one; None for a model."""
    return DEFAULT_METHOD if model is None else matching(model, tuple(METHODS))


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


# ---------------------------------------------------------------------------- the request


@dataclass(frozen=True)
class Request:
    """A job with scores that can start.

    run, card: the first of the runs, and the card of its model; None for a method without training.
    place, name: folder of the outputs, and the beginning of their name.
    key: key of the in-distribution set; None if it was not named.
    """

    question: Question
    job: OodJob | AlarmJob
    place: Path
    name: str
    run: Run | None = None
    card: ModelCard | None = None
    key: str | None = None

    @property
    def maps(self) -> bool:
        """Whether the model or the method has maps of where an image is unusual."""
        return bool(self.card.maps) if self.card else METHODS[self.job.method or ""].mapped

    def new_folder(self) -> Path:
        """A new folder for the job."""
        return claims.new_folder(self.place, self.name)

    @property
    def portable(self) -> PortableJob | None:
        """The job that exports the alarm; None without `--export`. Raises UsageError if its folder contains
        anything."""
        if self.question.export is None:
            return None
        claims.check_empty(place := local(self.question.export))
        settings = vars(self.job) | {"input": "", "fpr": ANY_RATE, "verb": PortableJob.verb}
        return PortableJob(**settings, out=str(place))

    def cost(self, say: Say = silent) -> Estimate:
        """What is scored, and for how long. The scores of runs are timed on untrained copies, if no earlier
        estimate has timed them."""
        if self.run is None:
            return cost_of_method(self.job)
        if isinstance(self.job, OodJob):
            return cost_of_sets(self.run, self.job, say)
        return cost_of_alarm(self.run, self.job, say)


def ask(question: Question, *, say: Say = silent) -> Request:
    """The request for the options of `gz ood`. Raises UsageError for a name or an option that does not exist,
    MissingError for a run or a set that is not here."""
    openood = benchmark_of(question.benchmark, question.ins, question.outs) if question.benchmark else None
    layout, name = question.layout, openood.inside if openood else question.ins
    home = layout.home if layout else locate(name) if name else None
    scorer = of_method(question, home) if question.method and home else of_runs(question, home)
    card = scorer.card
    if question.maps and card and not card.maps:
        able = ", ".join(model.name for model in catalog.cards().values() if model.maps)
        raise UsageError(f"`{card.name}` has no anomaly maps", hint=f"models with maps: {able}")
    shared = ("n", "full", "seeds", "checkpoint", "seed", "precision", "launch")
    settings = {**scorer.settings, **{key: getattr(question, key) for key in shared}}
    settings["background"] = str(find_run(question.background).path) if question.background else None
    job: OodJob | AlarmJob
    if question.inspected or question.input is not None or question.export:
        job, label = alarm_job(question, settings)
    else:
        lists = local(question.imglists) if question.imglists else None
        foreign = foreign_sets(question.outs, openood, lists, scorer.data, say)
        settings |= {"benchmark": openood and openood.name, "imglists": str(lists) if lists else None}
        job = OodJob(
            outs=tuple(one.reference for one in foreign), **settings | {"seeds": question.seeds or 1}
        )
        label = openood.name if openood else label_of(job.outs)
    name = f"{scorer.prefix}{label}"
    return Request(question, job, scorer.place, name, scorer.run, card, home.key if home else None)


def alarm_job(question: Question, settings: Mapping[str, Any]) -> tuple[AlarmJob, str]:
    """The job of an alarm, and the label of its folder."""
    inspected = question.inspected
    kind, path = (InspectJob, inspected.path) if inspected else (AlarmJob, local(question.input or ""))
    job = kind(
        input=str(path) if inspected or question.input else "",
        fpr=rate(question.fpr),
        calibrate=calibrating(question.calibrate, question.ins),
        maps=question.maps or bool(question.method),
        png=question.png,
        **settings,
    )
    return job, slug(path.stem)


def rate(value: str | float | None) -> float:
    """A false-positive rate, such as `1%` or `0.01`, as a fraction. Raises UsageError outside 0 … 1."""
    word = "1%" if value is None else str(value).strip()
    try:
        share = float(word.removesuffix("%")) / (100 if word.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        hint = f"`--fpr {word}%`" if 1 <= share < 100 and "%" not in word else "`--fpr 1%`, or `--fpr 0.01`"
        raise UsageError(f"`--fpr {value}` is not a rate between 0 and 1", hint=hint)
    return share


def calibrating(name: str | None, ins: str | None) -> str | None:
    """The name or the path of the images for calibration; None without `--calibrate`. Raises MissingError if
    there are none, UsageError for those of `--in`, to which methods are fitted."""
    if name is None:
        return None
    if not name or not (is_set(name) or local(name).exists()):
        hint = "pass a folder, zip, tar or npz of good images, or the name of a data set"
        raise MissingError(f"`--calibrate {name}` does not exist", hint=hint)
    if ins and data_key(name) == data_key(ins):
        hint = "omit `--calibrate`, or pass other good images"
        raise UsageError("`--calibrate` and `--in` are the same images", hint=hint)
    return name if is_set(name) else str(local(name))


class Scorer(NamedTuple):
    """Runs that score images, or a method without training."""

    settings: Mapping[str, Any]  # settings of jobs that depend on it
    place: Path  # of its outputs, whose names begin with the prefix
    prefix: str = ""
    run: Run | None = None  # the first of the runs
    card: ModelCard | None = None  # of its model
    data: DataSection | None = None  # of its recipe


def of_method(question: Question, home: DataSet) -> Scorer:
    """A method that is fitted to the images of a set."""
    settings = {"run": "", "ins": home.reference, "method": question.method}
    settings |= question.keywords(None)
    if further := question.what[1:]:
        message = f"`{question.method}` requires no training, and makes no ensemble with `{further[0]}`"
        raise UsageError(message, hint="use one method, or several runs")
    return Scorer(settings, user_dir("ood"), f"{home.key}-")


def of_runs(question: Question, inside: DataSet | None) -> Scorer:
    """The run of a model, and the further runs of an ensemble."""
    key, typed = (inside.key, inside.reference) if inside else (None, None)
    run = trained_run(question.model or "", question.keywords, data=key, typed=typed)
    home = inside or locate(part_of(run.serving.tree()).data.name)
    runs = [run, *(find_run(word, data=home.key) for word in question.what[1:])]
    parts = [part_of(each.serving.tree()) for each in runs]
    models = [catalog.card_of(each, part.model) for each, part in zip(runs, parts, strict=True)]
    trained_on = [part.data.name for part in parts]
    for each, name in zip(runs, trained_on, strict=True):
        if data_key(name) != data_key(trained_on[0]):
            message = f"`{each.id}` was trained on `{name}`, but the first run on `{trained_on[0]}`"
            raise UsageError(message, hint="use runs that were trained on the same data set")
    chosen = choose_scores(question.scores, models, parts[0].ood.scores)
    paths = [str(each.path) for each in runs]
    settings: dict[str, Any] = {"run": paths[0], "others": tuple(paths[1:]), "ins": home.reference}
    settings |= {"scores": chosen, "options": question.keywords(models[0])}
    return Scorer(settings, run.path / "ood", "", run, models[0], parts[0].data)


def choose_scores(
    names: Sequence[str], models: Sequence[ModelCard], of_recipe: Sequence[str] | None
) -> tuple[str, ...] | None:
    """The scores by their exact names; for several runs, those that all of them have. None means the recipe's
    scores."""
    if [canonical(name) for name in names] == ["all"]:
        return ("all",)
    if names or len(models) == 1:
        plain = [name for name in names if canonical(name) != "waic"]
        for card in models:
            plain = check_scores(plain, card)
        proper = iter(plain)
        return tuple("waic" if canonical(name) == "waic" else next(proper) for name in names) or None
    scores = [set(score_names(card)) for card in models]
    common = [name for name in of_recipe or score_names(models[0]) if all(name in each for each in scores)]
    waic = ["waic"] if all("nll" in each for each in scores) else []
    if not common + waic:
        raise UsageError("the runs have no score in common", hint="gz list models --can ood")
    return tuple(common + waic)


def benchmark_of(name: str, ins: str | None, outs: Sequence[str]) -> Benchmark:
    """The benchmark with this name. Raises UsageError if sets other than its own are named."""
    benchmark = find_benchmark(name)
    if outs or (ins and ins != benchmark.inside):
        message = f"`{benchmark.name}` defines its own data sets: `--in {benchmark.inside}`"
        raise UsageError(message, hint="omit `--in` and `--out`")
    return benchmark


def foreign_sets(
    names: Sequence[str], benchmark: Benchmark | None, lists: Path | None, data: DataSection | None, say: Say
) -> list[DataSet]:
    """The sets with these names, or those of a benchmark, either with lists in OpenOOD's folder or in the
    form of a run's data."""
    if benchmark is None:
        return [locate(name) for name in names]
    assert data
    return with_lists(benchmark, lists, say) if lists else available_sets(benchmark, data, say)


def with_lists(benchmark: Benchmark, root: Path, say: Say) -> list[DataSet]:
    """The foreign sets of a benchmark whose lists are in OpenOOD's `data` folder. Reports the
    omitted sets."""
    names = (*benchmark.near, *benchmark.far)
    sets = [locate(name) for name in names if list_of(root, benchmark, name)]
    for name in set(names).difference(one.key for one in sets):
        say(f"left out: `{name}`, because `{root}` has no list of it")
    if not sets or not list_of(root, benchmark, benchmark.inside):
        raise MissingError(f"`{root}` has no lists of `{benchmark.name}`", hint="omit `--imglists`")
    return sets


def available_sets(benchmark: Benchmark, data: DataSection, say: Say) -> list[DataSet]:
    """The foreign sets of a benchmark that are in the cache or small enough to download. Reports the omitted
    sets."""
    sets, names = [], (*benchmark.near, *benchmark.far)
    for foreign in map(locate, names):
        try:
            packs.open_pack(foreign, **pack_options(data), say=say)
            sets.append(foreign)
        except MissingError as e:
            say(f"left out: {e.message} ({e.hint})")
    if not sets:
        message = f"no out-of-distribution data set of `{benchmark.name}` is available"
        raise MissingError(message, hint=f"gz data download {' '.join(names)}")
    return sets


def label_of(outs: Sequence[str]) -> str:
    """The label of the output folder for scores of foreign sets."""
    return "-".join(slug(name.rsplit("/", 1)[-1]) for name in outs)[:80]


# ---------------------------------------------------------------------------- the cost


@dataclass(frozen=True)
class Estimate:
    """What a job scores, by which scores, and its cost, in words and as JSON.

    cost: that of the job, and of each image.
    warnings: what will prevent the job.
    """

    by: str
    images: str
    time: str
    facts: Mapping[str, Any]
    cost: Cost
    notes: Sequence[str] = ()
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class ScoreCosts:
    """The costs of the scores of runs.

    by: names of the scores.
    of_runs, budgets: for each run, the cost of an image with one draw of noise, and its budget in seconds.
    judges: cost of the judge networks by which the scores compare images.
    """

    job: OodJob | AlarmJob
    by: str
    of_runs: Sequence[Cost]
    budgets: Sequence[float]
    judges: Cost

    @classmethod
    def of(cls, run: Run, job: OodJob | AlarmJob, fitted: int, say: Say) -> ScoreCosts:
        """The costs on this machine, if the scores are fitted on so many images. They are measured on
        untrained copies of the runs."""
        runs = [run, *(Run(Path(path)) for path in job.others)]
        parts, plan = (
            [part_of(one.serving.tree()) for one in runs],
            launcher.plan(job.launch, every_gpu=False),
        )
        names, counts = job.scores or parts[0].ood.scores or (), counts_of(locate(job.ins))
        added = [LOCAL] if names and not job.scores else []  # to scores that are not named
        timed = list(dict.fromkeys("nll" if name == "waic" else name for name in (*names, *added)))
        images = {
            "held_out": fitted,
            "train": min(MAX_SCORED_IMAGES, counts["train"] if counts else MAX_SCORED_IMAGES),
        }
        measure = partial(forecast.measured, say=say)

        def cost_of(one: Run) -> Cost:
            drawer = forecast.drawer_of_run(one, plan, score_options=job.options)
            if not (timed and drawer):
                return UNKNOWN
            return forecast.score_cost(drawer, timed, measure, **images, maps=mapped(fitted))

        costs, budgets = [cost_of(one) for one in runs], [part.ood.budget for part in parts]
        return cls(job, ", ".join(names), costs, budgets, judge_cost(run, job, names))

    @property
    def passes(self) -> int:
        """How often an image is scored: by each run, with each draw of noise."""
        seeds = self.job.seeds or (MAX_SEEDS if isinstance(self.job, AlarmJob) else 1)
        return seeds * len(self.of_runs)

    @property
    def is_free(self) -> bool:
        """Whether the budget decides the number of images."""
        return not (self.job.n or self.job.full)

    def limit(self, sets: int) -> int | None:
        """The most images of a set that are scored, so few that they suit every run; None: all, or
        unknown."""
        pairs = zip(self.of_runs, self.budgets, strict=True)
        times = [(cost.each, cost.fixed, budget) for cost, budget in pairs]
        timed = [(x, fit, budget) for x, fit, budget in times if x is not None and fit is not None]
        if not self.is_free or len(timed) < len(times):
            return None if self.job.full else self.job.n
        return min(affordable(each, budget - fit, self.passes * sets) for each, fit, budget in timed)

    def estimate(
        self,
        sizes: Sequence[int | None],
        n: int | None,
        images: str,
        *,
        choosing: int = 0,
        roughly: str = "about",
        warnings: Sequence[str] = (),
    ) -> Estimate:
        """The estimate for sets of these sizes, at most n images of each, which `images` describes.
        choosing: number of further scores, by which an alarm chooses one."""
        mean = 1 / len(self.of_runs) * sum(self.of_runs, Cost())
        fits = self.passes * replace(mean, each=0.0, calls=0.0)
        cost = Cost(START_UP) + fits + self.judges + replace(mean, fixed=0.0, why={})
        every = together(sizes)
        scored = None if every is None else self.passes * int(every) + choosing
        facts = {"n": n, "scored": scored, "seconds": None, "calls": cost.calls}
        if cost.each is None or cost.fixed is None:
            budget = min(self.budgets)
            by_budget = self.is_free and not choosing
            time = f"at most {about(budget)}, the recipe's `ood.budget`" if by_budget else "unknown"
        elif scored is None:
            time = f"{short(self.passes * len(sizes) * cost.each, 2)} s for an image of each data set"
        else:
            facts["seconds"], time = cost.seconds(scored), cost.in_words(scored, roughly=roughly)
        return Estimate(self.by, images, time, facts, cost, warnings=warnings)


def cost_of_sets(run: Run, job: OodJob, say: Say) -> Estimate:
    """The estimate of scores of data sets by runs."""
    counts = counts_of(locate(job.ins))
    fitted = min(MAX_FITTED, counts["val"] or counts["train"]) if counts else MAX_FITTED
    costs, sizes = ScoreCosts.of(run, job, fitted, say), counts_of_sets(job)
    n = costs.limit(len(sizes))
    whole = n is None or all(size is not None and size <= n for size in sizes)
    images = "all" if whole else f"{'up to ' * costs.is_free}{n:,} per data set"
    return costs.estimate([at_most(n, size) for size in sizes], n, images)


def cost_of_alarm(run: Run, job: AlarmJob, say: Say) -> Estimate:
    """The estimate of an alarm by runs, which scores every image of its input and compares it with held-out
    ones. Warns if these are too few for the rate."""
    from gzcli.metrics.alarms.choice import MIN_IMAGES_TO_CHOOSE
    from gzcli.metrics.conformal import fewest

    is_chosen = not (job.scores or job.others)
    needed = fewest(job.fpr, 1 if is_chosen else len(job.scores or ()))
    total, left, fitted = held_out(job, needed)
    costs, checked = ScoreCosts.of(run, job, fitted, say), checked_images(job)
    n = costs.limit(2)
    compared = at_most(n, left)
    return costs.estimate(
        [compared, checked],
        n,
        f"{in_words(checked)}, compared with {in_words(compared)} held-out images",
        choosing=mapped(fitted) if is_chosen and fitted >= MIN_IMAGES_TO_CHOOSE else 0,
        roughly="up to about",
        warnings=if_few(job, needed, total if job.n is None else min(job.n, total or job.n), "held-out"),
    )


def cost_of_method(job: OodJob | AlarmJob) -> Estimate:
    """The estimate of a method without training. Warns if the good images are too few for the rate. Raises
    UsageError for images of several sizes."""
    from gzcli.metrics.conformal import fewest

    home, good, warnings = locate(job.ins), good_images(job), list[str]()
    total = sum(good.values()) if good else None
    if isinstance(job, OodJob):
        sets = [locate(name) for name in job.outs]
        fitted = min(good["train"], MOST_FITTED) if good else None
        tests = [good, *(counts_of(one, foreign=True) for one in sets)]
        n = None if job.full else job.n or MAX_SCORED_IMAGES
        checked = together([at_most(n, one["test"]) if one else None for one in tests])
        images = f"{job.n:,} per data set" if job.n else "all"
    else:
        sets, checked = [judged(job)] if job.input else [], checked_images(job)
        fitted = total and min(total, MAX_SCORED_IMAGES)
        images = f"{in_words(checked)}, compared with {in_words(total)} good images"
        further = counts_of(locate(job.calibrate), foreign=True) if job.calibrate else None
        enough, kind = (further, "further good") if job.calibrate else (good, "good")
        warnings = if_few(job, fewest(job.fpr), sum(enough.values()) if enough else None, kind)
    cost, of_all = checking(job.method or ""), together([fitted, checked])
    seconds = cost.seconds(None if of_all is None else int(of_all))
    time = f"about {about(seconds)}" if seconds else "unknown"
    notes = crops(home, sets, job.size or reduced_size(facts_of(home), job.method))
    facts = {"n": job.n, "seconds": seconds, "calls": None}
    return Estimate(job.method or "", images, time, facts, cost, notes, warnings)


def if_few(job: AlarmJob, needed: int, n: int | None, kind: str) -> list[str]:
    """A warning if n images of this kind are fewer than the rate needs."""
    if n is None or n >= needed:
        return []
    fpr = f"a false-alarm rate of {percent(job.fpr)}"
    return [f"{fpr} needs {needed:,} {kind} images, but there are only {n:,}"]


def judge_cost(run: Run, job: OodJob | AlarmJob, names: Sequence[str]) -> Cost:
    """The cost of the judge network by which these scores of a run compare images, if it is needed and not
    trained yet."""
    part = part_of(run.serving.tree())
    compares = set(names).intersection(catalog.card_of(run, part.model).perceptual_scores)
    if not compares or {**part.ood.options, **job.options}.get("pixels") or networks.has_lpips():
        return Cost()
    data = locate(job.ins)
    pack = packs.peek(data, **pack_options(part.data))
    # of values beyond 8 bits, only pixels are compared
    return Cost() if pack and pack.values else judge_networks(("fd",), data, pack)


def mapped(fitted: int) -> int:
    """The images whose maps `local` is fitted to: some on which scores are fitted, and synthetic defects."""
    from gzcli.metrics.alarms.choice import MIN_IMAGES_TO_CHOOSE

    return min(MAPPED_IMAGES, fitted) + (MAPPED_DEFECTS if fitted >= MIN_IMAGES_TO_CHOOSE else 0)


def crops(home: DataSet, sets: Sequence[DataSet], size: Size | None) -> list[str]:
    """The notes on the images of each set that are cropped to the size of the good ones."""
    facts, notes = facts_of(home), [(home, note) for note in crops_of(home, size)]
    if facts:
        size = size or as_size(facts.height, facts.width)
        notes += [(one, note) for one in sets for note in crops_of(one, size, foreign=True)]
    return [f"`{one.shown}`: {note}" for one, note in notes]


# -------------------------------------------------------------------------- numbers of images; None: unknown


def in_words(n: int | None) -> str:
    return "all" if n is None else f"{n:,}"


def at_most(n: int | None, size: int | None) -> int | None:
    """The number of images of a set of this size if at most n are scored."""
    return n if size is None else min(size, n or size)


def official_test(data: DataSet) -> int | None:
    """The number of images of the user's own folder `test`, which may show anything."""
    from gzcli.data.readers.folder import open_path

    if not isinstance(data, OwnSet) or not data.path.exists():
        return None
    return open_path(data.path, data.form).counts.get("test")


def good_images(job: OodJob | AlarmJob) -> dict[str, int] | None:
    """The good images of each split to which a method is fitted, or against which sets are compared."""
    home = locate(job.ins)
    counts = counts_of(home)
    if counts and isinstance(job, AlarmJob):
        return counts | ({"test": 0} if job.verb == "inspect" or official_test(home) else {})
    return counts


def judged(job: AlarmJob) -> OwnSet:
    """The images that an alarm checks one by one, or those of an inspection set that have defects."""
    layout = DEFECTS_LAYOUT if job.verb == "inspect" else "flat"
    return OwnSet(Path(job.input), form=Form(skip_bad=True, layout=layout))


def checked_images(job: AlarmJob) -> int | None:
    """The number of images that an alarm checks; of an inspection set also the good test images."""
    if not job.input:
        return None
    counts = counts_of(judged(job), foreign=True)
    good = official_test(OwnSet(Path(job.input))) if job.verb == "inspect" else 0
    return counts["test"] + (good or 0) if counts else None


def counts_of_sets(job: OodJob) -> list[int | None]:
    """The test images of each set that is scored."""
    if job.imglists:
        return [None] * (1 + len(job.outs))
    sets = [counts_of(locate(job.ins)), *(counts_of(locate(name), foreign=True) for name in job.outs)]
    return [counts["test"] if counts else None for counts in sets]


def held_out(job: AlarmJob, needed: int) -> tuple[int | None, int | None, int]:
    """The held-out images of an alarm that needs so many, those that are left to compare with, and the number
    of images on which scores are fitted."""
    home = locate(job.ins)
    counts = counts_of(home)
    total = counts["val"] + (0 if official_test(home) else counts["test"]) if counts else None
    fitted = MAX_FITTED if total is None else min(MAX_FITTED, total // 4)
    left = total and total - fitted
    if counts and total and total - fitted < needed <= total:  # then scores are fitted on training images
        left, fitted = total, min(MAX_FITTED, counts["train"])
    if job.calibrate:
        more = counts_of(locate(job.calibrate), foreign=True)
        fitted, total = max(fitted, min(MAX_FITTED, total or 0)), more["test"] if more else None
        left = total
    return total, left, fitted
