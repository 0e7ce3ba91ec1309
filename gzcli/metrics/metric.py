"""The metrics of `gz bench`: one record each, in a file of `quality/`. Bench, tables, leagues, reports, help,
completion and the page of a shared model read these records. A new metric is a new file there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gzcli.core.errors import UsageError
from gzcli.core.hints import Option, advice

if TYPE_CHECKING:
    from numpy import ndarray as Array
else:
    Array = Any

# feature spaces with downloaded weights, each named like its weights
FETCHED = ("inception", "dinov2", "clip")


@dataclass(frozen=True)
class Interval:
    """A metric and its 95 % interval; `low` and `high` are None if none is known."""

    value: float
    low: float | None = None
    high: float | None = None


Figures = dict[str, Interval]


@dataclass(frozen=True)
class Column:
    """A column of a metric in tables. A name that ends in `*` matches all columns with that prefix."""

    name: str
    better: Literal["down", "up"] | None = None  # direction of better values; None: neither
    keep: int = 10  # priority in a narrow table; the column with the least is dropped first
    rank: int | None = None  # its place among the metrics that rank a league
    signed: bool = False  # whether it is unbiased and may be below 0
    beside: bool = False  # whether the table of a league shows it beside the ranking metric
    cost: bool = False  # whether it is a cost of a model, not a quality
    meaning: str = ""  # its definition for the page of a shared model


@dataclass(frozen=True)
class Metric:
    """The functions behind one name of `--metrics`. `compare` takes features of samples [N, D], those of real
    images [M, D], and whether to compute expensive intervals; `of_images` takes the judge and a set of
    images; `of_model` takes the judge and a contestant with a model. `within` is `compare` with two more
    arguments before the last, the predicted classes of the samples [N] and of the real images [M]."""

    name: str
    order: int  # its place in lists
    columns: tuple[Column, ...]
    features: str = ""  # the space for comparing images: that of a network, or "pixels"
    width: int | None = None  # number of features of a raw Fréchet distance
    weights: str = ""  # downloaded weights besides those of its features
    fewest: int = 4  # fewest images in each set that it compares; an interval comes from their halves
    default: Literal["", "always", "colour"] = ""  # the sets for which it is a default metric
    floor: Literal["draws", "test", "train"] = "draws"  # real images used instead of samples
    of_sampler: bool = False  # whether `of_model` depends on the sampler
    # whether every rank computes a share of `of_model`, instead of the first rank everything
    distributed: bool = False
    compare: Callable[[Array, Array, bool], Figures] | None = None
    within: Callable[[Array, Array, Array, Array, bool], Figures] | None = None
    of_images: Callable[[Any, Any], Figures] | None = None
    of_model: Callable[[Any, Any], Figures] | None = None

    @property
    def cheap(self) -> bool:
        """Whether the floor is averaged over many draws. This holds for metrics without features, or with
        those of the set's own networks."""
        return self.features in ("", "pixels", "lenet", "second") and not self.weights

    @property
    def fetches(self) -> str:
        return self.weights or (self.features if self.features in FETCHED else "")


@cache
def metrics() -> dict[str, Metric]:
    package = import_module("gzcli.metrics.quality")
    files = sorted(Path(package.__path__[0]).glob("[!_]*.py"))
    modules = [import_module(f"{package.__name__}.{file.stem}") for file in files]
    records = [metric for module in modules for metric in module.METRICS]
    return {metric.name: metric for metric in sorted(records, key=lambda metric: metric.order)}


@cache
def columns() -> dict[str, Column]:
    return {column.name: column for metric in metrics().values() for column in metric.columns}


def column_of(figure: str) -> Column:
    """The column of a value: `fd` for `fd@32`; `kid_lenet` for `kid_rot`, whose LeNet was trained on
    rotations. An empty column for metrics of a model itself."""
    name, table = re.split(r"[@/]", figure)[0], columns()
    base = name.partition("|")[0]
    plain = base.removesuffix("_rot")
    for key in (name, base, *((f"{plain}_lenet", plain) if plain != base else ())):
        if key in table:
            return table[key]
    patterns = (column for key, column in table.items() if key[-1] == "*" and base.startswith(key[:-1]))
    return next(patterns, Column(figure))


def ranking() -> list[str]:
    return [c.name for c in sorted(columns().values(), key=lambda c: c.rank or 0) if c.rank is not None]


def metric_weights(names: Iterable[str]) -> list[str]:
    fetched = (metric.fetches for name, metric in metrics().items() if name in names)
    return list(dict.fromkeys(filter(None, fetched)))


def one_distance(chosen: Iterable[Metric]) -> Metric:
    """The metric for which statistics of real images are read or written. That of the second judge counts
    only if it is the only one. Raises UsageError unless there is exactly one."""
    of_both = [metric for metric in chosen if metric.width]
    distances = [metric for metric in of_both if metric.features != "second"] or of_both
    if len(distances) != 1:
        hint = advice(
            "use {} for files of pytorch-fid and clean-fid, or `fd` for features of the set",
            Option("metrics", "fid"),
        )
        raise UsageError(
            f"`mu` and `sigma` need exactly one Fréchet distance among the metrics, not {len(distances)}",
            hint=hint,
        )
    return distances[0]


def help_text() -> str:
    groups: dict[str, list[str]] = {"": [], "lite": []}
    for metric in metrics().values():
        need = metric.fetches or ("lite" if metric.features == "lite" else "")
        groups.setdefault(need, []).append(metric.name)
    plain, extra, *fetched = (" ".join(names) for names in groups.values())
    return f"{plain}; with the extra `features` {extra}; with downloaded weights {', '.join(fetched)}."


def meanings() -> dict[str, str]:
    """Explanations of the metrics on the page of a shared model, by their names."""
    ways = {"down": "; lower is better", "up": "; higher is better", None: ""}
    texts = {name: c.meaning + ways[c.better] for name, c in columns().items() if c.meaning}
    return texts | {"loss": "training loss on unseen images; lower is better"}
