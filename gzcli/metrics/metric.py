"""The metrics of `gz bench`: a table of one record each, which bench, tables, leagues, reports, help,
completion and the page of a shared model read.

What a record computes is a function of a file of `quality/`, which is loaded when it is called: the command
line reads the records, and waits for no numpy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pkgutil import resolve_name
from typing import Any, Literal

FETCHED = ("inception", "dinov2", "clip")  # feature spaces whose weights are fetched, by the weights' name


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
    better: Literal["down", "up"] | None = None  # where better values lie; None: neither way
    keep: int = 10  # the column with the least leaves a narrow table first
    rank: int | None = None  # its place among the figures that a league is ranked by
    signed: bool = False  # whether it is unbiased and may be below 0
    cost: bool = False  # whether it says what a model costs, not how good it is
    meaning: str = ""  # for the page of a shared model


@dataclass(frozen=True)
class Metric:
    """What one name of `--metrics` computes: `compare` of features of samples [N, D] and of real images
    [M, D], and whether intervals that take time are wanted; `of_images` of the judge and a set of images;
    `of_model` of the judge and a contestant with a model."""

    name: str
    columns: tuple[Column, ...]
    features: str = ""  # the space in which images are compared: that of a network, or "pixels"
    width: int | None = None  # number of features of a raw Fréchet distance
    weights: str = ""  # fetched weights that it needs besides those of its features
    default: Literal["", "always", "colour"] = ""  # for which sets it is computed where no metric is named
    floor: Literal["draws", "test", "train"] = "draws"  # real images that stand in place of samples
    of_sampler: bool = False  # whether `of_model` depends on the sampler
    shared: bool = False  # whether every rank computes a share of `of_model`, not the first one all
    compare: Callable[[Any, Any, bool], Figures] | None = None
    of_images: Callable[[Any, Any], Figures] | None = None
    of_model: Callable[[Any, Any], Figures] | None = None

    @property
    def fetches(self) -> str:
        return self.weights or (self.features if self.features in FETCHED else "")


def by(function: str, *first: Any) -> Callable[..., Figures]:
    """A function `file:name` of `quality/`, with its first arguments."""
    return lambda *rest: resolve_name(f"{__package__}.quality.{function}")(*first, *rest)


def frechet(name: str, features: str, rank: int | None = None, *, keep: int = 19, **more: Any) -> Metric:
    meaning = MEANINGS.get(name, "")
    column = Column(name, "down", keep=keep, rank=rank, signed=name == "fd_inf", meaning=meaning)
    rotated = (Column("fd_rot", "down", keep=keep, rank=2),) if name == "fd" else ()
    return Metric(name, (column, *rotated), features, compare=by("fd:compare", name), **more)


def kernel(name: str, features: str, rank: int, **more: Any) -> Metric:
    column = Column(name, "down", keep=17, rank=rank, signed=True, meaning=MEANINGS.get(name, ""))
    return Metric(name, (column,), features, compare=by("kid:compare", name), **more)


def neighbours(features: str, **more: Any) -> Metric:
    keep = {"precision": 16, "recall": 15, "coverage": 6, "density": 3}
    columns = tuple(Column(f"{figure}_{features}", "up", keep=least) for figure, least in keep.items())
    return Metric(f"prc_{features}", columns, features, compare=by("neighbours:compare", features), **more)


MEANINGS = {
    "fd": "Fréchet distance in features of the set's own LeNet",
    "fid": "Fréchet Inception distance",
    "kid": "kernel Inception distance",
}
CLASSES = (Column("tv", "down", keep=12), Column("label_accuracy", "up", keep=11))
BPD = (
    Column("bpd", "down", keep=14, meaning="bits per dimension of unseen images"),
    Column("bpd|y", "down", keep=9),
    Column("nats", "down", keep=13),
    Column("nats|y", "down", keep=8),
)
SPEED = (Column("samples_per_s", "up", keep=7, cost=True), Column("train_*", "up", keep=1, cost=True))
COPIES = (Column("authenticity", "up"), Column("duplicates", "down"))
LPIPS: dict[str, Any] = {"of_images": by("lpips:diversity"), "of_model": by("lpips:reconstruction")}
SWD = (Column("swd", "down", keep=4, rank=12),)
RECORDS = (
    frechet("fd", "lenet", 1, width=64, default="always"),
    frechet("fd_inf", "lenet"),
    kernel("kid_lenet", "lenet", 6, default="always"),
    neighbours("lenet", default="always"),
    Metric("swd", SWD, "pixels", default="always", compare=by("swd:compare")),
    Metric("classes", CLASSES, "lenet", default="always", of_images=by("classes:of_images")),
    Metric("bpd", BPD, default="always", shared=True, of_model=by("model:bpd")),
    Metric("own", (), default="always", of_model=by("model:own")),
    Metric("speed", SPEED, default="always", of_sampler=True, of_model=by("model:speed")),
    Metric("memory", COPIES, floor="test", of_images=by("neighbours:memory")),
    Metric("worth", (Column("worth_*", "up"),), floor="train", of_images=by("worth:of_images")),
    frechet("fd_lite", "lite", 11, width=1280),
    frechet("fd_lite_pca", "lite"),
    kernel("kid_lite", "lite", 7, default="colour"),
    neighbours("lite"),
    frechet("fid", "inception", 3, width=2048, keep=18),
    kernel("kid", "inception", 8),
    Metric("is", (Column("is", "up"),), "inception", compare=by("classes:inception_score")),
    Metric("lpips", (Column("lpips_recon", "down"),), weights="vgg16", floor="train", shared=True, **LPIPS),
    frechet("fd_dinov2", "dinov2", 4, width=1024),
    kernel("kid_dinov2", "dinov2", 9),
    neighbours("dinov2"),
    frechet("fd_clip", "clip", 5, width=512),
    kernel("kid_clip", "clip", 10),
    neighbours("clip"),
)


@cache
def metrics() -> dict[str, Metric]:
    return {metric.name: metric for metric in RECORDS}


@cache
def columns() -> dict[str, Column]:
    return {column.name: column for metric in metrics().values() for column in metric.columns}


def column_of(figure: str) -> Column:
    """The column of a figure: of `fd@32` that of `fd`, of a LeNet that tells rotations apart (`kid_rot`) that
    of `kid_lenet`; one without any facts for the figures of a model itself."""
    name, known = re.split(r"[@/]", figure)[0], columns()
    base = name.partition("|")[0]
    plain = base.removesuffix("_rot")
    for key in (name, base, *((plain, f"{plain}_lenet") if plain != base else ())):
        if key in known:
            return known[key]
    begun = (column for key, column in known.items() if key[-1] == "*" and base.startswith(key[:-1]))
    return next(begun, Column(figure))


def ranking() -> list[str]:
    return [c.name for c in sorted(columns().values(), key=lambda c: c.rank or 0) if c.rank is not None]


def weights_of(names: Iterable[str]) -> list[str]:
    fetched = (metric.fetches for name, metric in metrics().items() if name in names)
    return list(dict.fromkeys(filter(None, fetched)))


def help_text() -> str:
    groups: dict[str, list[str]] = {"": [], "lite": []}
    for metric in metrics().values():
        need = metric.fetches or ("lite" if metric.features == "lite" else "")
        groups.setdefault(need, []).append(metric.name)
    plain, extra, *fetched = (" ".join(names) for names in groups.values())
    return f"{plain}; with the extra `features` {extra}; with weights that are fetched {', '.join(fetched)}."


def meanings() -> dict[str, str]:
    """What the figures on the page of a shared model say, by their names."""
    ways = {"down": "; less is better", "up": "; more is better", None: ""}
    texts = {name: c.meaning + ways[c.better] for name, c in columns().items() if c.meaning}
    return texts | {"loss": "training loss on unseen images; less is better"}
