"""A comparison of runs, and of images from elsewhere, with real images: the request of `gz bench`."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from gzcli.core.errors import MissingError, UsageError, canonical, matching
from gzcli.core.sections import part_of
from gzcli.core.types import Say
from gzcli.core.units import MAX_SCORED_IMAGES
from gzcli.data.packs.open import counts_of, pack_options, peek
from gzcli.data.packs.pack import PackMeta
from gzcli.data.packs.source import at_hand
from gzcli.data.sets.registry import PATH_ENDINGS, DataSet, Form, OwnSet, is_set, locate
from gzcli.launch import cost, forecast, launcher
from gzcli.launch.cost import Cost
from gzcli.launch.from_file import find_run, is_shared
from gzcli.metrics import selection
from gzcli.metrics.metric import metric_weights, metrics, one_distance
from gzcli.models import catalog
from gzcli.models.catalog import ModelCard
from gzcli.store import claims
from gzcli.store.jobs import BenchJob
from gzcli.store.paths import recipe_names, user_dir
from gzcli.store.run_folder import Run
from gzcli.store.runs import all_runs, by_name

DEFAULT_SAMPLES = 2000  # of each model
Split = Literal["test", "val", "train", "all"]  # of the real images


@dataclass(frozen=True)
class Request:
    """A comparison that is ready to run. words: what was typed for each run."""

    job: BenchJob
    data: DataSet
    runs: Sequence[Run]
    words: Sequence[str]

    @property
    def weights(self) -> list[str]:
        """The networks that the metrics need."""
        return downloads(self.job)

    @property
    def columns(self) -> list[str]:
        """The metrics that the result may have."""
        cards = (catalog.card_of(run, part_of(run.serving.tree()).model) for run in self.runs)
        return columns_of(self.job, cards)

    def check_images(self) -> None:
        """Raises UsageError for a metric that needs more real images, or other ones."""
        selection.choose(self.job.metrics, self.data, self.job.split)

    def new_folder(self) -> Path:
        return claims.new_folder(user_dir("bench"), self.data.key)

    def cost(self, say: Say) -> tuple[list[Cost], Cost]:
        """The cost of an image of each run, and that of evaluating all contestants, without metrics that must
        be named. say: prints what is timed."""
        job, launch = self.job, launcher.plan(self.job.launch, every_gpu=False)
        drawers = [forecast.drawer_of_run(run, launch) for run in self.runs]
        timed = [drawer for drawer in drawers if drawer]
        measure, most = partial(forecast.measured, say=say), likelihood_images(job, self.data)
        tried = iter(forecast.image_costs(timed, measure, likelihood_kinds(job), most))
        here = [next(tried) if drawer else (cost.UNKNOWN_IMAGE, Cost()) for drawer in drawers]
        of_runs = zip(self.runs, here, strict=True)
        images = [cost.sampling(run.model, run.data, run).or_else(of_image) for run, (of_image, _) in of_runs]
        contestants = len(self.runs) + len(job.images)
        evaluation = cost.START + contestants * cost.evaluation(job.n, launch.gpus)
        evaluation = sum((likelihoods for _, likelihoods in here), evaluation)
        return images, evaluation + cost.judge_networks(self._metrics, self.data, self._pack)

    def forecast_notes(self) -> list[str]:
        """Notes on the metrics that are omitted, or that `cost` does not include, and on the networks that
        these need."""
        lines = selection.omitted(self.job.metrics, self._pack or self.data, self.job.split)
        named = [name for name in self._metrics if not metrics()[name].default]
        if named:
            lines.append(f"the time of {listed(named)} is not included")
        if weights := [] if self.job.weights else metric_weights(named):
            lines.append(f"the weights of {listed(weights)} are downloaded if they are missing")
        return lines

    @cached_property
    def _pack(self) -> PackMeta | None:
        if not self.runs:
            return peek(self.data)
        return peek(self.data, **pack_options(part_of(self.runs[0].serving.tree()).data))

    @cached_property
    def _metrics(self) -> list[str]:
        return selection.choose(self.job.metrics, self._pack or self.data, self.job.split)


def ask(words: Sequence[str], job: BenchJob) -> Request:
    """The comparison of these contestants, which are runs, models or images. Without any, that of every model
    with a finished run on the data set.

    job: the comparison without its contestants; its data set may be "".
    """
    data, runs, images = find_contestants(list(words), job.data or None)
    paths = tuple(str(run.path) for run, _ in runs)
    job = replace(job, runs=paths, data=data.reference, images=tuple(images))
    return Request(job, data, [run for run, _ in runs], [word for _, word in runs])


def job_of(
    n: int | None,
    usual: int = DEFAULT_SAMPLES,
    *,
    metrics: Iterable[str] = (),
    weights: Path | str | None = None,
    real_stats: Path | str | None = None,
    export_stats: Path | str | None = None,
    **options: Any,
) -> BenchJob:
    """The job of a comparison or of a league, without contestants. Raises UsageError for statistics of real
    images that do not match exactly one metric, or cannot be written.

    n: number of samples of each model, and most real images; None: `usual`, and as many likelihoods as the
      budget allows.
    options: further fields of the job.
    """
    places = {"weights": weights, "stats": real_stats, "export_stats": export_stats}
    paths: dict[str, Any] = {key: str(path) if path else None for key, path in places.items()}
    job = BenchJob((), metrics=tuple(metrics) or None, n=n or usual, likelihoods=n, **paths, **options)
    check_stats(job)
    return job


def check_stats(job: BenchJob) -> None:
    """Raises UsageError if statistics of real images do not match exactly one metric, or cannot be
    written."""
    if (job.stats or job.export_stats) and job.metrics:
        one_distance(metrics()[name] for name in job.metrics if name in metrics())
    if job.export_stats and Path(job.export_stats).is_dir():
        file = shlex.quote(str(Path(job.export_stats) / "stats.npz"))
        hint = f"name a file in it: `--export-stats {file}`"
        raise UsageError(f"`--export-stats` needs a file, but `{job.export_stats}` is a folder", hint=hint)


def columns_of(job: BenchJob, cards: Iterable[ModelCard]) -> list[str]:
    """The metrics that models with these cards may have. The images choose among the usual metrics later, so
    all of them count."""
    usual = [name for name, metric in metrics().items() if metric.default]
    chosen = selection.choose(job.metrics) if job.metrics else usual
    columns = [column.name for name in chosen for column in metrics()[name].columns]
    if "own" in chosen:
        columns += [name for card in cards for name in card.metrics]
    return list(dict.fromkeys(columns))


def downloads(job: BenchJob) -> list[str]:
    """The networks that the metrics of a job need."""
    return [] if job.weights else metric_weights(job.metrics or ())


def likelihood_images(job: BenchJob, data: DataSet) -> int:
    """The most test images whose likelihood is computed. The set need not be packed."""
    most, counts = job.likelihoods or MAX_SCORED_IMAGES, counts_of(data)
    return min(most, counts["test"]) if counts else most


def likelihood_kinds(job: BenchJob) -> tuple[str, ...]:
    """The kinds of likelihoods that a bench computes. Those by an ODE are expensive, so they must be
    named."""
    if job.metrics is None:
        return ("exact", "bound")
    return ("exact", "bound", "ode") if {"bpd", "nats"} & set(job.metrics) else ()


def listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


# ---------------------------------------------------------------------------- contestants


def find_contestants(words: list[str], data: str | None) -> tuple[DataSet, list[tuple[Run, str]], list[str]]:
    """The set of real images, the runs with the words that were typed for them, and the references of the
    images."""
    data_set = locate(data) if data else None
    names = [word for word in words if is_run(word)]
    images = [images_at(word) for word in words if word not in names]
    if not words:
        done = [run for run in all_runs() if run.state == "finished"]
        data_set = data_set or locate(data_of(done[0]) if done else "digits")
        done = [run for run in done if canonical(run.data) == canonical(data_set.key)]
        names = list({run.model: None for run in reversed(done)})  # each once, in order of its first run
        if not names:
            name = data_set.reference
            raise MissingError(f"no finished run on `{name}`", hint=f"gz train vae --data {name}")
    runs: list[tuple[Run, str]] = []
    for word in names:
        key, typed = (data_set.key, data_set.reference) if data_set else (None, None)
        runs.append((find_run(word, data=key, typed=typed), word))
        data_set = data_set or locate(data_of(runs[0][0]))
    if data_set is None:
        hint = f"gz bench {words[0]} --data mnist · gz bench {words[0]} --data ./real"
        raise UsageError("comparing images needs real images: pass `--data`", hint=hint)
    return data_set, runs, images


def is_run(word: str) -> bool:
    """Whether a word refers to a run, a model or weights. True for an unknown name, because the search for
    runs gives a hint."""
    if by_name(word) is not None or is_shared(word) or matching(word, recipe_names()):
        return True
    if "/" in word or word.lower().endswith(PATH_ENDINGS) or word.endswith(".safetensors"):
        return False
    return bool(all_runs(model=word)) or not is_set(word)


def images_at(word: str) -> str:
    """The images that a word refers to; for a folder of `gz sample`, `samples.npz`, otherwise `images`."""
    from gzcli.data.readers.folder import open_path

    try:
        source = at_hand(locate(word))
        if not isinstance(source, OwnSet):
            return source.reference
        drawn = Run(source.path)
        if drawn.sheet_picture.is_file() and drawn.job_file.is_file():
            parts = [part for part in (drawn.images_file, drawn.images_folder) if part.exists()]
            if not parts:
                hint = "draw them again with `gz sample … --npz`"
                raise UsageError(
                    f"`{word}` contains only a sheet of samples, not the single images", hint=hint
                )
            source = OwnSet(parts[0])
        open_path(source.path, Form(foreign=True))
    except MissingError as e:
        message = f"`{word}` is not a run, a model, or a folder, zip, tar or npz of images: {e.message}"
        raise UsageError(message, hint=e.hint) from e
    return source.reference


def data_of(run: Run) -> str:
    return str(run.serving.tree()["data"]["name"])
