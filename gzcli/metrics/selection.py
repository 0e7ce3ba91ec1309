"""The metrics of a bench: the named or the usual ones, if the data set has enough images. No heavy import at
the top."""

from __future__ import annotations

from collections.abc import Sequence

from gzcli.core.errors import UsageError, did_you_mean
from gzcli.data.packs.pack import PackMeta
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
    for message, way in shortages(names, meta, split):
        raise UsageError(message, hint=f"{way}, or omit it from `--metrics`" if split == "test" else way)
    return list(dict.fromkeys(names))


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
    """For each number of images that metrics need and a set lacks: a message, and how to get as many."""
    if meta is None:
        return []
    total = sum(meta.counts.values())
    side = min((split, COUNTERPART[split]), key=lambda name: meta.counts.get(name, 0))
    n, images = (total // 2, "images") if split == "all" else (meta.counts[side], WORDS[side])
    by_need: dict[int, list[str]] = {}
    for name in names:
        if (need := fewest(name, meta)) > n:
            by_need.setdefault(need, []).append(f"`{name}`")
    parts = []
    for need, short in by_need.items():
        verb = "needs" if len(short) == 1 else "need"
        least, has = (2 * need, total) if split == "all" else (need, n)
        message = f"{', '.join(short)} {verb} at least {least:,} {images}, but `{meta.name}` has {has:,}"
        more = split == "test" and total // 2 >= need
        parts.append((message, "use `--split all`" if more else "add images to the data set"))
    return parts


def fewest(name: str, meta: PackMeta) -> int:
    """The fewest images in each set that a metric compares; 0 for a metric of a model itself. Within classes,
    one class must have two."""
    metric = metrics()[name]
    if not (metric.compare or metric.within or metric.of_images):
        return 0
    return max(metric.fewest, len(meta.classes) + 1) if metric.within else metric.fewest
