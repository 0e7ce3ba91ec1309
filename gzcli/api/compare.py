"""Comparisons from Python: `gzcli.bench` and `gzcli.compare`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from gzcli.core.devices import pick_device
from gzcli.core.sections import LaunchSection
from gzcli.core.spoken import spoken
from gzcli.data.download.fetch import fetch_weights
from gzcli.data.readers.memory import reference_of
from gzcli.data.sets.registry import locate
from gzcli.engine.log import Log
from gzcli.judge import bench as judge
from gzcli.launch import comparing
from gzcli.launch.comparing import Split
from gzcli.launch.jobs import do_job
from gzcli.store import claims
from gzcli.store.jobs import Job
from gzcli.store.paths import user_dir


@dataclass(frozen=True)
class BenchRow:
    """A run, or images from elsewhere, in a comparison.

    name: name in tables.
    run: id of the run; None for images from elsewhere.
    metrics: each metric by name, such as `fd`.
    intervals: ends of the 95 % interval of each metric that has one.
    """

    name: str
    run: str | None
    metrics: Mapping[str, float]
    intervals: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class BenchResult:
    """The result of a comparison with the real images of a data set.

    metric: metric of the ranking; None if nothing can be ranked.
    places: rank by row name: "1", or "1–2" if the intervals do not separate two rows.
    floor: the metrics of real images instead of samples.
    folder: folder with the tables, for `gz report`.
    """

    data: str
    metric: str | None
    rows: tuple[BenchRow, ...]
    places: Mapping[str, str]
    floor: Mapping[str, float]
    notes: tuple[str, ...]
    folder: Path

    @property
    def metrics(self) -> Mapping[str, float]:
        """The metrics of the first contestant."""
        return self.rows[0].metrics if self.rows else {}


@spoken
def bench(
    *contestants: Any,
    data: Any = None,
    split: Split = "test",
    metrics: Iterable[str] = (),
    n: int | None = None,
    weights: str | Path | None = None,
    real_stats: str | Path | None = None,
    export_stats: str | Path | None = None,
    checkpoint: str = "last",
    gpus: int | None = None,
    cpu: bool = False,
    processes: int | None = None,
    precision: str | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> BenchResult:
    """Compares trained models and other sets of images with real images, as `gz bench` does.

    contestants: models, ids, aliases or folders of runs; a folder, zip, tar or npz of images, or images in
      memory. None: every model that has a finished run on the data set.
    data: name or path of the set of real images, or images in memory. None: the set of the first run.
    split: split of the real images.
    metrics: names of metrics; (): those that need no weights of Inception.
    n: number of samples of each model, and maximum number of other images and of likelihoods. None: 2,000,
      and as many likelihoods as the recipe's budget allows.
    weights: file with Inception weights; None: the one in the cache.
    real_stats: file with `mu` and `sigma` of real images for the Fréchet distance, as of pytorch-fid.
    export_stats: file to which `mu` and `sigma` of the real images are written.
    checkpoint: "last", "best", or a step.
    gpus: number of GPUs; None: one, if there is one.
    cpu: whether to use the CPU even if there are GPUs.
    processes: number of CPU processes, with `cpu`.
    precision: numeric precision of the samples; None: that of the training.
    seed: seed of the noise.
    quiet: whether to print nothing.

    Raises UsageError for an unknown name, MissingError if there is no such run.
    """
    words, real = [str(reference_of(word)) for word in contestants], reference_of(data)
    job = comparing.job_of(
        n,
        data="" if real is None else str(real),
        split=split,
        metrics=metrics,
        weights=weights,
        real_stats=real_stats,
        export_stats=export_stats,
        checkpoint=checkpoint,
        launch=LaunchSection(gpus, cpu, processes),
        precision=precision,
        seed=seed,
    )
    request = comparing.ask(words, job)
    for network in request.weights:
        fetch_weights(network)
    folder = request.new_folder()
    return _bench_result(done(folder, request.job, quiet), folder)


def _bench_result(result: Mapping[str, Any], folder: Path) -> BenchResult:
    rows = tuple(row_of(BenchRow, row) for row in result["rows"])
    metric, places, floor = result["metric"], result["places"], result["floor"]
    return BenchResult(result["data"], metric, rows, places, floor, tuple(result["notes"]), folder)


@spoken
def compare(
    images: Any,
    real: Any,
    *,
    metrics: Iterable[str] = (),
    n: int = 10_000,
    split: Split = "all",
    seed: int = 0,
) -> BenchResult:
    """Compares images with real ones, in this process and without a run. The metrics are in `result.metrics`,
    such as `result.metrics["fd"]`.

    images: uint8 array [N, C, H, W] or [N, H, W, C], or anything else that `train` accepts as `data`.
    real: the real images in the same form, or the name of a data set.
    metrics: names of metrics; (): those that need no weights of Inception. `fd` uses a small network that is
      trained once on the real images.
    n: maximum number of images.
    split: split of the real images.
    seed: seed of the selection of images.

    Raises UsageError for fewer than 50 images and for an unknown metric.
    """
    reference, shown = locate(reference_of(real)).reference, str(reference_of(images))
    job = comparing.job_of(n, data=reference, split=split, metrics=metrics, checkpoint="last", seed=seed)
    for network in comparing.downloads(job):
        fetch_weights(network)
    folder = claims.new_folder(user_dir("bench"), locate(reference).key)
    result = judge.run(replace(job, images=(shown,)), folder, pick_device(LaunchSection()), Log(mode="quiet"))
    return _bench_result(result, folder)


def done(folder: Path, job: Job, quiet: bool) -> dict[str, Any]:
    """Runs the request in the engine and returns its result."""
    return do_job(
        folder,
        job,
        mode="quiet" if quiet else "human",
        warn=lambda text: None if quiet else print(text, file=sys.stderr),
    )


def row_of(kind: type, row: Mapping[str, Any]) -> Any:
    """A row of a result as a value of this dataclass."""
    return kind(**{field.name: row[field.name] for field in fields(kind)})
