"""The metrics of a bench: the named or the usual ones, if the data set has enough images. No heavy import at
the top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gzcli.core.errors import UsageError, did_you_mean
from gzcli.core.hints import Option, advice
from gzcli.data.packs.open import counts_of, facts_of, official_counts
from gzcli.data.packs.pack import PackMeta
from gzcli.data.sets.registry import DataSet, locate, split_sizes
from gzcli.metrics import networks
from gzcli.metrics.metric import metrics

# Split to compare with → split whose images replace samples.
COUNTERPART = {"test": "train", "val": "train", "train": "test", "all": "all"}
SPLIT_WORDS = {"train": "training images", "val": "validation images", "test": "test images"}


class RealSet(NamedTuple):
    """The facts of real images that decide which metrics are computed."""

    name: str
    counts: Mapping[str, int]  # number of images in each split
    classes: int
    photographs: bool  # whether they are 8-bit colour images

    @classmethod
    def of(cls, images: PackMeta | DataSet) -> RealSet | None:
        """The facts of a pack, or of a set that need not be packed; None if its files are missing."""
        if isinstance(images, PackMeta):
            colour = images.shape[0] == 3 and images.values is None
            return cls(images.reference, images.counts, len(images.classes), colour)
        facts, counts = facts_of(images), counts_of(images)
        if not (facts and counts):
            return None
        return cls(images.reference, counts, facts.classes or 0, facts.channels == 3 and not facts.valued)


def choose(
    names: Sequence[str] | None, images: PackMeta | DataSet | None = None, split: str = "test"
) -> list[str]:
    """The named metrics (`nats` means `bpd`). If none is named, the cheap ones that need no download and that
    have enough images. Raises UsageError for a name that does not exist, or with too few images."""
    table, real = metrics(), RealSet.of(images) if images else None
    if names is None:
        return [name for name in usual(real) if not (real and shortages([name], real, split))]
    names = ["bpd" if name == "nats" else name for name in names]
    for name in names:
        if name not in table:
            hint = did_you_mean(name, table) or f"choose from {', '.join(table)}"
            raise UsageError(f"there is no metric `{name}`", hint=hint)
    for message, way in shortages(names, real, split) if real else ():
        raise UsageError(
            message,
            hint=advice(f"{way}, or omit it from {{}}", Option("metrics")) if split == "test" else way,
        )
    return list(dict.fromkeys(names))


def usual(real: RealSet | None) -> list[str]:
    """The metrics if none is named."""
    ways = ("always", "colour") if real and real.photographs and networks.is_installed() else ("always",)
    return [name for way in ways for name, metric in metrics().items() if metric.default == way]


def omitted(names: Sequence[str] | None, images: PackMeta | DataSet, split: str) -> list[str]:
    """Notes on the usual metrics for which a set has too few images, if none is named."""
    real = None if names else RealSet.of(images)
    short = shortages(usual(real), real, split) if real else []
    return [f"omitted: {message}; {way}" for message, way in short]


def shortages(names: Sequence[str], real: RealSet, split: str) -> list[tuple[str, str]]:
    """For each number of images that metrics need and a set lacks: a message, and how to get as many."""
    counts, total = real.counts, sum(real.counts.values())
    side = min((split, COUNTERPART[split]), key=lambda name: counts.get(name, 0))
    n, images = (total // 2, "images") if split == "all" else (counts[side], SPLIT_WORDS[side])
    by_need: dict[int, list[str]] = {}
    for name in names:
        if (need := fewest(name, real.classes)) > n:
            by_need.setdefault(need, []).append(f"`{name}`")
    parts = []
    for need, short in by_need.items():
        verb = "needs" if len(short) == 1 else "need"
        least, has = (2 * need, total) if split == "all" else (need, n)
        message = f"{', '.join(short)} {verb} at least {least:,} {images}, but `{real.name}` has {has:,}"
        more = split == "test" and total // 2 >= need
        parts.append((message, "use `--split all`" if more else _remedy(real.name, split, need)))
    return parts


def _remedy(data: str, split: str, need: int) -> str:
    """How many images a set needs, so that those of a split and of its counterpart are as many as needed."""
    if split == "all":
        return f"give at least {2 * need:,} images"
    official, compared = official_counts(locate(data)) or {}, {split, COUNTERPART[split]}
    for part in compared - {"train"}:
        if 0 < official.get(part, 0) < need:
            return f"give at least {need:,} images in its split `{part}`"
    # a drawn split has at most a tenth of the images
    sizes = ((n, split_sizes({**official, "train": n})) for n in range(10 * need + 1))
    least = next((n for n, size in sizes if min(size[part] for part in compared) >= need), None)
    where = " in its split `train`" if any(official.get(part) for part in ("val", "test")) else ""
    return f"give at least {least:,} images{where}" if least else "add images to the data set"


def fewest(name: str, classes: int) -> int:
    """The fewest images in each set that a metric compares; 0 for a metric of a model itself. Within classes,
    one class must have two."""
    metric = metrics()[name]
    if not (metric.compare or metric.within or metric.of_images):
        return 0
    return max(metric.fewest, classes + 1) if metric.within else metric.fewest
