"""The metrics of a model on validation images, one of which chooses the best weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from gzcli.core import ranks
from gzcli.core.errors import install_line
from gzcli.core.sections import TrainSection
from gzcli.core.types import Say
from gzcli.data.packs.batches import scan
from gzcli.data.packs.pack import Pack
from gzcli.engine import sampler
from gzcli.engine.forecast import seconds_each
from gzcli.engine.log import Log
from gzcli.engine.prepared import with_remembered
from gzcli.engine.trained import Trained
from gzcli.metrics import collapse, networks, pretrained
from gzcli.metrics.classifier import NetFeatures
from gzcli.metrics.features import has_lenet, lenet
from gzcli.metrics.frechet import frechet_distance
from gzcli.metrics.pretrained import Features
from gzcli.metrics.quality.neighbours import DENSITY_NEIGHBOUR, prdc
from gzcli.models.base import Model, named_losses
from gzcli.models.nn import double, full_fp32
from gzcli.store.runs import Run

MAX_VALIDATION_IMAGES = 2000  # maximum number of validation images for metrics
EVAL_BATCH = 100  # images per batch
SLOW_SAMPLES = 200  # samples for comparison, for a model with expensive sampling
MIN_VALIDATION_IMAGES = (
    200  # minimum number of validation images to compare with; a distance to fewer is mostly noise
)
PATIENT_MINUTES = (
    10.0  # minimum minutes of a run that trains the judge of its data set, which takes about one
)


def best_metric(model: Model, choice: str, pack: Pack, minutes: float | None = None) -> str | None:
    """The metric that selects the best checkpoint: "bpd", "fd", "loss" or None; "auto": the model's choice.
    A model with a `watched` metric falls back to it if its samples cannot be judged. This is so with fewer
    than MIN_VALIDATION_IMAGES validation images, or without a judge and with less than PATIENT_MINUTES
    `minutes` for the run. Few colour images always have a judge, a published network."""
    n = len(pack.images("val"))
    if choice == "none" or n == 0:
        return None
    metric = next(name for name in (choice, model.best, usual_metric(model)) if name != "auto")
    if choice == "auto" and metric == "fd" and model.watched:
        judged = (
            (minutes or 0.0) >= PATIENT_MINUTES or has_lenet(pack) or networks.published_judges(pack.meta)
        )
        return metric if n >= MIN_VALIDATION_IMAGES and judged else model.watched
    if metric == "bpd" and model.data.levels is None:  # real numbers have densities, not bits
        metric = "loss"
    return None if metric == "fd" and n < 2 else metric


def usual_metric(model: Model) -> str:
    has_bits = model.likelihood in ("exact", "bound") and model.data.levels is not None
    return model.watched or ("bpd" if has_bits else "loss")


def chosen_by(run: Run, train: TrainSection) -> str:
    """The metric of the best checkpoint, which a resumed run keeps. Without one it is the recipe's choice."""
    return run.best.metric if run.best else train.best


def judge_of(
    model: Model, pack: Pack, device: torch.device, log: Log, choice: str = "auto"
) -> tuple[NetFeatures | Features, str | None]:
    """The net whose features the metric `fd` compares, and the metric to use. If the data set's judge fails
    to learn its classes, the metric is `fd_lite` if the extra `features` is installed. Otherwise it is the
    usual metric of models without a judge, or None for GANs, whose loss does not measure sample quality. Few
    colour images do not train a judge: unless `choice` is "fd", `fd_lite` is used at once."""
    if choice != "fd" and networks.published_judges(pack.meta):
        log.info("few colour images: `train.best` uses features of EfficientNet-Lite0")
        return pretrained.lite(device), "fd_lite"
    judge = lenet(pack, device=device, say=log.info)
    if judge.alive:
        return judge, "fd"
    why = judge.is_dead("lenet")
    if networks.is_installed():
        log.warn(f"{why}: `train.best` uses features of EfficientNet-Lite0")
        return pretrained.lite(device), "fd_lite"
    metric = usual_metric(model) if model.watched or model.best != "fd" else None
    instead = f"`train.best` uses `{metric}`" if metric else "no best checkpoint is chosen"
    log.warn(f"{why}: {instead}; for other features, run `{install_line('gzcli[features]')}`")
    return judge, metric


def validate(
    trained: Trained,
    metric: str,
    *,
    pack: Pack,
    data: Pack,
    net: NetFeatures | Features | None,
    warn: Say,
) -> dict[str, float]:
    """The metric on the first 2,000 validation images, with metrics that explain it; lower is better. Every
    rank must call it. The value is the same on every rank, for any number of ranks. NaN if no sample is
    finite."""
    values: dict[str, float] = {}
    if metric in ("fd", "fd_lite"):
        try:
            values = sample_distances(trained, metric, pack, net, warn)
        except sampler.NoneFinite as e:
            warn(e.message)
            values = {metric: math.nan}
    for name in (metric, trained.model.watched):
        if name and name not in values:
            values[name] = validation_mean(trained, name, data)
    return values


def validation_seconds(
    trained: Trained,
    metric: str,
    *,
    pack: Pack,
    data: Pack,
    net: NetFeatures | Features | None,
    each: float,
    clock: Callable[[], float],
) -> float:
    """The seconds of `validate`, extrapolated from few images, if a sample takes `each`. Every rank must call
    it."""
    real, total = pack.images("val")[:MAX_VALIDATION_IMAGES], 0.0
    n_mean = mean_count(trained, len(real))
    if metric in ("fd", "fd_lite"):
        n = sample_count(trained, len(real))
        features = seconds_each(lambda n: net and net.features(real[:n]), trained, clock)
        total += n * each + (n + len(real)) * features
    for name in {metric, trained.model.watched} - {"fd", "fd_lite"}:
        if name:
            total += n_mean * seconds_each(partial(validation_mean, trained, name, data), trained, clock)
    return total


def mean_count(trained: Trained, real: int) -> int:
    """The number of validation images of a mean. If the model prepares images, which can take longer than its
    steps, there are at most a tenth as many as for training."""
    n = min(real, trained.part.train.eval_images or MAX_VALIDATION_IMAGES)
    few = trained.part.data.n if hasattr(trained.model, "prepare") else None
    return min(n, max(1, few // 10)) if few else n


def validation_mean(trained: Trained, metric: str, data: Pack, most: int = MAX_VALIDATION_IMAGES) -> float:
    """The mean over validation images of the bits per dimension, or of the loss of the first phase. Every
    rank has its share of the same batches."""
    model, info, device = trained.model, trained.info, trained.device
    n = min(most, mean_count(trained, len(data.images("val"))))
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
                total -= double(model.log_prob(batch.x, labels, noise=batch.noise).detach()).sum() / nats
        else:
            batch = with_remembered(model, batch, trained.memory)
            total += double(named_losses(model, batch, phase)["loss"].detach()) * len(batch)
    return float(ranks.total(total)) / n


def sample_count(trained: Trained, real: int) -> int:
    """The number of samples that are compared with validation images."""
    return min(real, SLOW_SAMPLES) if trained.model.watched else real


def sample_distances(
    trained: Trained, name: str, pack: Pack, net: NetFeatures | Features | None, warn: Say
) -> dict[str, float]:
    """Metrics of samples against validation images: the Fréchet distance, under `name`, and `distance`, the
    mean distance between samples relative to that between real images. If the net is a classifier, `classes`
    is the entropy of the samples' classes relative to that of real images. A model with a `watched` metric
    draws only a few hundred samples, because each takes many calls, and also gets `recall`."""
    real = pack.images("val")[:MAX_VALIDATION_IMAGES]
    images = sampler.draw(trained, sample_count(trained, len(real)), warn=warn)
    if net is None:
        return {name: 0.0}
    classifier = net if isinstance(net, NetFeatures) and not trained.info.multilabel else None
    fake, real_features = net.features(images), net.features(real)
    predicted, classes = (
        classifier.predict(x) if classifier else np.zeros(len(x), int) for x in (images, real)
    )
    figures = {
        name: float(frechet_distance(real_features, fake)),
        "distance": collapse.diversity(fake, predicted, real_features, classes),
    }
    if trained.model.watched and len(real) > DENSITY_NEIGHBOUR:
        figures["recall"] = prdc(fake, real_features[: len(fake)])["recall"]
    if classifier and not classifier.rotations:
        figures["classes"] = collapse.coverage(predicted, classes)
    return figures
