"""The metrics of `gz bench`: one record each, in a file of `quality/`, which bench, tables, leagues, reports,
help, completion and the page of a shared model read. A new metric is a new file there.

Neither this module nor those files import numpy or torch at their top, as the command line reads the records.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

Direction = Literal["down", "up"]
FETCHED = (
    "inception",
    "dinov2",
    "clip",
)  # feature spaces whose weights are fetched, by the name of the weights


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % interval; `low` and `high` are None where none is known."""

    value: float
    low: float | None = None
    high: float | None = None


Figures = dict[str, Interval]


@dataclass(frozen=True)
class Column:
    """A figure of a metric, as tables show it. A name that ends in `*` stands for all that begin so."""

    name: str
    better: Direction | None = None  # where better values lie; None: neither way
    keep: int = 10  # the column with the least leaves a narrow table first
    rank: int | None = None  # its place among the figures that a league is ranked by
    signed: bool = False  # whether it is unbiased and may be below 0
    cost: bool = False  # whether it says what a model costs, not how good it is
    meaning: str = ""  # for the page of a shared model


@dataclass(frozen=True)
class Metric:
    """What one name of `--metrics` computes, by one or more of the three functions at the end.

    `compare` takes features of samples [N, D] and of real images [M, D], and whether intervals that take time
    are wanted. `of_images` takes the judge and a set of images, `of_model` the judge and a contestant with a
    model.
    """

    name: str
    order: int  # its place in lists
    columns: tuple[Column, ...]
    features: str = ""  # the space in which images are compared: that of a network, or "pixels"
    width: int | None = None  # number of features of a raw Fréchet distance
    weights: str = ""  # fetched weights that it needs besides those of its features
    default: Literal["", "always", "colour"] = (
        ""  # the sets for which it is computed unless metrics are named
    )
    floor: Literal["draws", "test", "train"] = "draws"  # real images that stand in place of samples
    of_sampler: bool = False  # whether `of_model` depends on the sampler
    shared: bool = (
        False  # whether every rank computes a share of `of_model`; else the first one computes it alone
    )
    compare: Callable[[np.ndarray, np.ndarray, bool], Figures] | None = None
    of_images: Callable[[Any, Any], Figures] | None = None
    of_model: Callable[[Any, Any], Figures] | None = None

    @property
    def fetches(self) -> str:
        """The name of the fetched weights that it needs; empty where it needs none."""
        return self.weights or (self.features if self.features in FETCHED else "")


@cache
def metrics() -> dict[str, Metric]:
    """Every metric by its name."""
    spec = find_spec("gzcli.metrics.quality")
    folder = Path(next(iter(spec.submodule_search_locations or ()))) if spec else Path()
    files = sorted(path.stem for path in folder.glob("[!_]*.py"))
    records = [metric for name in files for metric in import_module(f"gzcli.metrics.quality.{name}").METRICS]
    return {metric.name: metric for metric in sorted(records, key=lambda metric: metric.order)}


@cache
def columns() -> dict[str, Column]:
    """Every column by its name."""
    return {column.name: column for metric in metrics().values() for column in metric.columns}


def column_of(figure: str) -> Column:
    """The column of a figure: of `fd@32` that of `fd`, of a LeNet that tells rotations apart (`kid_rot`) that
    of `kid_lenet`; one without any facts for the figures of a model itself."""
    name, known = re.split(r"[@/]", figure)[0], columns()
    base = name.partition("|")[0]
    plain = base.removesuffix("_rot")
    names = (name, base, *((plain, f"{plain}_lenet") if plain != base else ()))
    whole = (known[key] for key in names if key in known)
    begun = (column for key, column in known.items() if key[-1] == "*" and base.startswith(key[:-1]))
    return next(iter((*whole, *begun, Column(figure))))


def ranking() -> list[str]:
    """The figures that a league is ranked by, by preference."""
    return [c.name for c in sorted(columns().values(), key=lambda c: c.rank or 0) if c.rank is not None]


def weights_of(names: Iterable[str]) -> list[str]:
    """The names of the fetched weights that some metrics need."""
    return list(
        dict.fromkeys(
            metric.fetches for name, metric in metrics().items() if name in names and metric.fetches
        )
    )


def help_text() -> str:
    """The metrics, by what they need."""
    records = list(metrics().values())
    plain = [m.name for m in records if not m.fetches and m.features != "lite"]
    extra = [m.name for m in records if m.features == "lite"]
    fetched: dict[str, list[str]] = {}
    for metric in records:
        if metric.fetches:
            fetched.setdefault(metric.fetches, []).append(metric.name)
    return (
        f"{' '.join(plain)}; with the extra `features` {' '.join(extra)}; with weights that are fetched "
        f"{', '.join(' '.join(names) for names in fetched.values())}."
    )


def meanings() -> dict[str, str]:
    """What the figures on the page of a shared model say, by their names."""
    ways = {"down": "; less is better", "up": "; more is better", None: ""}
    texts = {name: c.meaning + ways[c.better] for name, c in columns().items() if c.meaning}
    return texts | {"loss": "training loss on unseen images; less is better"}
