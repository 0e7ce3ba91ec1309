"""The metric `lpips` of `gz bench`, where there are pairs of images: how far reconstructions look from their
images, and samples from each other (Zhang et al. 2018, arXiv:1801.03924)."""

from __future__ import annotations

import numpy as np
import torch

from gzcli.core import ranks
from gzcli.core.errors import UsageError
from gzcli.core.types import Batch, no_progress
from gzcli.data.packs.pack import Pack
from gzcli.engine.log import Log
from gzcli.engine.trained import Trained
from gzcli.judge.figures import Found
from gzcli.judge.image_sets import ImageSet
from gzcli.judge.images import Images, subset
from gzcli.judge.scores import fresh_noise
from gzcli.metrics.interval import Interval
from gzcli.models.nn import LPIPS
from gzcli.models.options import defaults

REBUILT = 200  # test images that are reconstructed: of a GAN each takes a search
PAIRS = 500  # of samples
BATCH = 50  # pairs in a forward pass
LEAST = 16  # pixels of a side, which VGG16 halves four times


def network(pack: Pack, device: torch.device) -> LPIPS:
    """LPIPS for the images of a set. Raises MissingError for absent weights, UsageError for images that are
    too small."""
    _, *sides = pack.meta.shape
    if min(sides) < LEAST:
        height, width = sides
        raise UsageError(
            f"LPIPS needs images of {LEAST}×{LEAST}, and those of `{pack.meta.name}` are {width}×{height}"
        )
    return LPIPS.from_files().eval().requires_grad_(False).to(device)


def of_reconstructions(trained: Trained, pack: Pack, net: LPIPS, seed: int, log: Log) -> Found:
    """`lpips_recon`, the mean over test images of the distance to what the model rebuilds of them, as
    `gz sample --do reconstruct` does; {} of a model that reconstructs nothing. A call of every rank.

    Raises UsageError where the model cannot do without labels, and the set has none.
    """
    method = getattr(trained.model, "reconstruct", None)
    if method is None:
        return {}
    index = subset(pack.meta.counts["test"], REBUILT)
    images = Images.of(trained, pack, "test", index, size=BATCH, seed=seed)
    takes_labels, done = "labels" in defaults(method) and trained.model.conditional, 0
    with log.bar(f"reconstruct by {trained.name}") as progress:

        def work(batch: Batch) -> dict[str, np.ndarray]:
            nonlocal done
            given = {"labels": batch.y} if takes_labels else {}
            with trained.applying():
                noise = fresh_noise(seed, batch)
                found = method(trained.seen(batch).x, noise=noise, progress=no_progress, **given)
                back = trained.shown(found.images)
            done += len(batch)
            progress(done, len(index) / ranks.world())
            with torch.no_grad():
                return {"distance": net(batch.x, back.float()).cpu().numpy()}

        return {"lpips_recon": mean(ranks.over(images, work)["distance"])}


def of_samples(images: ImageSet, net: LPIPS, device: torch.device) -> Found:
    """`lpips_diversity`, the mean distance of random pairs of images, and `lpips_diversity|y`, that of pairs
    of one class where there are labels. Images that do not differ are 0 apart."""
    rng = np.random.default_rng(0)
    found = {"lpips_diversity": mean(apart(images, pairs(rng.permutation(len(images))), net, device))}
    if images.labels is None or images.labels.ndim > 1:
        return found
    order = rng.permutation(len(images))
    of_class = [pairs(order[images.labels[order] == y]) for y in np.unique(images.labels)]
    chosen = rng.permutation(np.concatenate(of_class))
    return found | ({"lpips_diversity|y": mean(apart(images, chosen, net, device))} if len(chosen) else {})


def pairs(rows: np.ndarray) -> np.ndarray:
    """Neighbours among rows as pairs, [n // 2, 2]."""
    return rows[: len(rows) // 2 * 2].reshape(-1, 2)


@torch.no_grad()
def apart(images: ImageSet, chosen: np.ndarray, net: LPIPS, device: torch.device) -> np.ndarray:
    """The distances of the first pairs [≤ PAIRS, 2] of images."""
    found = []
    for rows in np.array_split(chosen[:PAIRS], max(1, len(chosen[:PAIRS]) // BATCH)):
        a, b = (unit(images, rows[:, side]).to(device) for side in (0, 1))
        found.append(net(a, b).cpu().numpy())
    return np.concatenate(found)


def unit(images: ImageSet, rows: np.ndarray) -> torch.Tensor:
    """Images [n, C, H, W] in [-1, 1]."""
    return torch.from_numpy(np.stack([images.images[int(i)] for i in rows])).float() / 127.5 - 1


def mean(values: np.ndarray) -> Interval:
    """The mean of distances, with its interval."""
    value, half = float(values.mean()), 1.96 * float(values.std()) / len(values) ** 0.5
    return Interval(value, max(0.0, value - half), value + half)
