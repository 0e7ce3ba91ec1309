"""The metrics of a bench: the named or the usual ones, if the data set has enough images. No heavy import at
the top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gzcli.core.errors import UsageError, did_you_mean
from gzcli.data.packs.open import official_counts
from gzcli.data.packs.pack import PackMeta
from gzcli.data.sets.registry import locate, split_sizes
from gzcli.metrics import networks
from gzcli.metrics.metric import metrics

# Split to compare with → split whose images replace samples.
COUNTERPART = {"test": "train", "val": "train", "train": "test", "all": "all"}
WORDS = {"train": "training images", "val": "validation images", "test": "test images"}


def choose(names: Sequence[str] | None, meta: PackMeta | None = None, split: str = "test") -> list[str]:
    """The named metrics (`nats` means `bpd`). If none is named, the cheap ones that need no download and that
    have enough images. Raises UsageError for a name that does not exist, or with too few images."""
    table = metrics()
    if names is None:
        return [name for name in usual(meta) if not shortages([name], meta, split)]
    names = ["bpd" if name == "nats" else name for name in names]
    for name in names:
        if name not in table:
            hint = did_you_mean(name, table) or f"choose from {', '.join(table)}"
            raise UsageError(f"there is no metric `{name}`", hint=hint)
    if meta:
        check(names, meta.reference, meta.counts, len(meta.classes), split)
    return list(dict.fromkeys(names))


def check(names: Sequence[str], data: str, counts: Mapping[str, int], classes: int, split: str) -> None:
    """Raises UsageError if a set has too few images for one of these metrics."""
    for message, way in _shortages(names, data, counts, classes, split):
        raise UsageError(message, hint=f"{way}, or omit it from `--metrics`" if split == "test" else way)


def usual(meta: PackMeta | None) -> list[str]:
    """The metrics if none is named."""
    photographs = meta is not None and meta.shape[0] == 3 and meta.values is None
    ways = ("always", "colour") if photographs and networks.is_installed() else ("always",)
    return [name for way in ways for name, metric in metrics().items() if metric.default == way]


def omitted(names: Sequence[str] | None, meta: PackMeta | None, split: str) -> list[str]:
    """Notes on the usual metrics for which a set has too few images, if none is named."""
    short = [] if names else shortages(usual(meta), meta, split)
    return [f"omitted: {message}; {way}" for message, way in short]


def shortages(names: Sequence[str], meta: PackMeta | None, split: str) -> list[tuple[str, str]]:
    """For each number of images that metrics need and a packed set lacks: a message, and how to get as
    many."""
    return _shortages(names, meta.reference, meta.counts, len(meta.classes), split) if meta else []


def _shortages(
    names: Sequence[str], data: str, counts: Mapping[str, int], classes: int, split: str
) -> list[tuple[str, str]]:
    total = sum(counts.values())
    side = min((split, COUNTERPART[split]), key=lambda name: counts.get(name, 0))
    n, images = (total // 2, "images") if split == "all" else (counts[side], WORDS[side])
    by_need: dict[int, list[str]] = {}
    for name in names:
        if (need := fewest(name, classes)) > n:
            by_need.setdefault(need, []).append(f"`{name}`")
    parts = []
    for need, short in by_need.items():
        verb = "needs" if len(short) == 1 else "need"
        least, has = (2 * need, total) if split == "all" else (need, n)
        message = f"{', '.join(short)} {verb} at least {least:,} {images}, but `{data}` has {has:,}"
        more = split == "test" and total // 2 >= need
        parts.append((message, "use `--split all`" if more else _remedy(data, split, need)))
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
