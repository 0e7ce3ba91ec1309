"""Figures of a model on validation images. One of them chooses the best checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from gzcli.core import ranks
from gzcli.data.packs.batches import scan
from gzcli.data.packs.pack import Pack
from gzcli.engine import sampler
from gzcli.engine.prepared import with_prepared
from gzcli.engine.trained import Trained
from gzcli.models.base import Model, named_losses
from gzcli.models.nn import double, full_fp32

if TYPE_CHECKING:
    from gzcli.metrics.features import LeNetFeatures

VALIDATION = 2000  # validation images that figures are computed of, at most
EVAL_BATCH = 100  # images of a batch


def best_metric(model: Model, asked: str, pack: Pack) -> str | None:
    """The figure that chooses the best checkpoint: "bpd", "fd" or "loss"; None where none does, as `fd` of a
    single validation image. "auto" is bpd where `log_prob` is exact or a bound, fd where the model says so
    (GANs), and else the validation loss."""
    n = len(pack.images("val"))
    if asked == "none" or n == 0:
        return None
    own = "bpd" if model.likelihood in ("exact", "bound") else "loss"
    metric = next(name for name in (asked, model.best, own) if name != "auto")
    return None if metric == "fd" and n < 2 else metric


def validate(
    trained: Trained, metric: str, *, pack: Pack, data: Pack, net: LeNetFeatures | None
) -> dict[str, float]:
    """The metric on the first 2,000 validation images, with figures that explain it; less is better.

    A call of every rank; the metric is the same number however many there are.
    """
    if metric == "fd":
        return distances(trained, pack, net)
    return {metric: mean(trained, metric, data)}


def mean(trained: Trained, metric: str, data: Pack) -> float:
    """The mean over validation images of the bits per dimension, or of the loss of the first phase.

    Every rank has its share of the same batches.
    """
    model, info, device = trained.model, trained.info, trained.device
    n = min(VALIDATION, len(data.images("val")))
    firsts = range(ranks.rank() * EVAL_BATCH, n, ranks.world() * EVAL_BATCH)
    index = [i for first in firsts for i in range(first, min(first + EVAL_BATCH, n))]
    total = double(torch.zeros((), device=device))
    phase = model.phases()[0].name
    nats = torch.Size(info.shape).numel() * math.log(2)  # nats of one bit per dimension
    batches = scan(data, "val", batch_size=EVAL_BATCH, levels=info.levels, device=device, index=index)
    for batch in batches if index else ():
        if metric == "bpd":
            labels = batch.y if model.conditional else None
            with full_fp32(device):
                total += -double(model.log_prob(batch.x, labels, noise=batch.noise)).sum() / nats
        else:
            total += double(named_losses(model, with_prepared(model, batch), phase)["loss"]) * len(batch)
    return float(ranks.total(total)) / n


def distances(trained: Trained, pack: Pack, net: LeNetFeatures | None) -> dict[str, float]:
    """Figures of samples against as many validation images.

    They are `fd`, the Fréchet distance; `distance`, the distance of pairs of samples as a share of that of
    pairs of real images; and, where the net knows the classes of the set, `classes`, the entropy of the
    samples' classes as a share of that of real images.
    """
    real = pack.images("val")[:VALIDATION]
    images = sampler.draw(trained, len(real))
    if net is None:
        return {"fd": 0.0}
    from gzcli.metrics import collapse
    from gzcli.metrics.frechet import frechet_distance

    several = trained.info.multilabel
    made, true = net.features(images), net.features(real)
    predicted, classes = (np.zeros(len(x), int) if several else net.predict(x) for x in (images, real))
    figures = {
        "fd": float(frechet_distance(true, made)),
        "distance": collapse.diversity(made, predicted, true, classes),
    }
    if not net.rotations and not several:
        figures["classes"] = collapse.coverage(predicted, classes)
    return figures


def collapsed(values: Mapping[str, float]) -> str | None:
    """A warning where `distances` show that a generator has collapsed; None where they do not."""
    if "distance" not in values:
        return None
    from gzcli.metrics import collapse

    return collapse.warning(values["distance"], values.get("classes"))
