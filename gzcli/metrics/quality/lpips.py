"""`lpips`: the perceptual distance between reconstructions and their images, and between samples (Zhang et
al. 2018, arXiv:1801.03924)."""

from __future__ import annotations

from typing import Any

from gzcli.core.types import Batch, ImageNoise, no_progress
from gzcli.metrics.metric import Array, Column, Figures, Interval, Metric

REBUILT = 200  # test images to reconstruct; with a GAN, each takes a search
PAIRS = 500  # pairs of samples
PAIRS_AT_ONCE = 50  # pairs in a forward pass


def reconstruction(judge: Any, contestant: Any) -> Figures:
    """`lpips_recon`, the mean distance of test images to their reconstructions by `gz sample --do
    reconstruct`; {} for a model without reconstructions."""
    import torch

    from gzcli.core import ranks

    trained = contestant.trained
    method = getattr(trained.model, "reconstruct", None)
    if method is None:
        return {}
    images, count = judge.test_images(trained, REBUILT, PAIRS_AT_ONCE), 0
    with judge.log.bar(f"reconstruct with {trained.title}") as progress:

        def work(batch: Batch) -> dict[str, Array]:
            nonlocal count
            labels = trained.label_keywords("reconstruct", None, batch.y)
            with trained.applying():
                noise = ImageNoise(judge.seed, batch.index, batch.x.device)  # restarted at its first draw
                applied = method(trained.encode(batch).x, noise=noise, progress=no_progress, **labels)
                rebuilt = trained.decode(applied.images)
            count += len(batch)
            progress(count, len(images.index) / ranks.world())
            with torch.no_grad():
                return {"distance": judge.lpips(batch.x, rebuilt.float()).cpu().numpy()}

        return {"lpips_recon": mean(ranks.over(images, work)["distance"])}


def diversity(judge: Any, images: Any) -> Figures:
    """`lpips_diversity`, the mean distance of random pairs of images, and `lpips_diversity|y`, that of pairs
    of one class if there are labels. Equal images have distance 0."""
    import numpy as np

    rng = np.random.default_rng(0)
    figures = {"lpips_diversity": mean(distances(judge, images, pairs(rng.permutation(len(images)))))}
    if images.labels is None or images.labels.ndim > 1:
        return figures
    order = rng.permutation(len(images))
    of_class = [pairs(order[images.labels[order] == y]) for y in np.unique(images.labels)]
    chosen = rng.permutation(np.concatenate(of_class))
    return figures | ({"lpips_diversity|y": mean(distances(judge, images, chosen))} if len(chosen) else {})


def pairs(rows: Array) -> Array:
    return rows[: len(rows) // 2 * 2].reshape(-1, 2)


def distances(judge: Any, images: Any, chosen: Array) -> Array:
    import numpy as np
    import torch

    chosen, parts = chosen[:PAIRS], []
    with torch.no_grad():
        for rows in np.array_split(chosen, max(1, len(chosen) // PAIRS_AT_ONCE)):
            sides = (np.stack([images.images[int(i)] for i in side]) for side in rows.T)
            a, b = ((torch.from_numpy(side).float() / 127.5 - 1).to(judge.device) for side in sides)
            parts.append(judge.lpips(a, b).cpu().numpy())
    return np.concatenate(parts)


def mean(values: Array) -> Interval:
    from gzcli.metrics.interval import mean_of_draws

    return mean_of_draws(values)


LPIPS_COLUMNS = (Column("lpips_recon", "down"), Column("lpips_diversity"), Column("lpips_diversity|y"))
HOW: dict[str, Any] = {"of_images": diversity, "of_model": reconstruction}
METRICS = (Metric("lpips", 330, LPIPS_COLUMNS, weights="vgg16", floor="train", distributed=True, **HOW),)
