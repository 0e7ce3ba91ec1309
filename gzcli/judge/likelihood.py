"""The mean likelihood of test images for `gz bench`: log p(x), or log p(x | y) and the marginal log p(x)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gzcli.core import devices, ranks
from gzcli.core.errors import DivergedError
from gzcli.core.types import Batch, ImageNoise, Noise
from gzcli.core.units import BY_ODE, MAX_SCORED_IMAGES, about, likelihoods
from gzcli.data.packs.pack import Pack
from gzcli.engine.log import Log
from gzcli.engine.trained import Trained
from gzcli.judge.images import Pick, timed
from gzcli.models.base import Model, flat_defaults, group_options
from gzcli.models.nn import full_fp32

LIKELIHOOD_BATCH = 100  # test images per batch on a usual device
MAX_CHECKED_IMAGES = 8  # maximum number of images on which the solver is checked
NOTABLE_BPD = 0.01  # bits per dimension: the last digit in which tables give bpd


def likelihood(
    trained: Trained,
    test_images: Callable[[Trained, int], Pick],
    pack: Pack,
    seed: int,
    log: Log,
    *,
    most: int | None = None,
) -> dict[str, Any]:
    """The mean negative log-likelihood of test images: {kind, nats, bpd, n, se (of nats), given_labels,
    marginal, solver_gap}.

    n is at most 10,000, or 500 for likelihoods by an ODE, and no more than the recipe's `ood.budget` allows.
    A conditional model is given the label. If the budget allows every class in turn, `marginal` is {nats,
    bpd, se} of p(x) = Σ_y p(y) p(x | y). p(y) is the frequency of a class in training. Otherwise `marginal`
    is None.
    """
    device, model = trained.device, trained.model
    budget, by_ode = trained.part.ood.budget, model.likelihood == "ode"
    trial = next(iter(test_images(trained, devices.batch_of(LIKELIHOOD_BATCH, device))))
    seconds_each = timed(lambda: given_label(model, trial), device) / len(trial) / ranks.world()
    most = min(most or MAX_SCORED_IMAGES, BY_ODE if by_ode else MAX_SCORED_IMAGES, pack.meta.counts["test"])
    labels, frequencies, classes = pack.labels("train"), None, 0
    if labels is not None and model.conditional and not pack.meta.multilabel and not by_ode:
        counts = np.bincount(labels, minlength=len(pack.meta.classes))
        frequencies, classes = torch.from_numpy(counts / len(labels)), len(counts)
    n, passes = ranks.agree(likelihoods(seconds_each, budget, most, classes))
    log.info(f"likelihood of {n:,} test images by {trained.title}, about {about(seconds_each * n * passes)}")
    count = 0
    with log.bar(f"likelihood of {trained.title}") as progress:

        def work(batch: Batch) -> dict[str, np.ndarray]:
            nonlocal count
            values = {"nats": -given_label(model, batch)}
            if passes > 1 and frequencies is not None:
                values["marginal"] = -log_marginal(model, batch, frequencies, seed)
            count += len(batch)
            progress(count, n / ranks.world())
            return {name: nats.numpy() for name, nats in values.items()}

        values = ranks.over(test_images(trained, n), work)
    if not all(np.isfinite(nats).all() for nats in values.values()):
        raise DivergedError(f"the likelihood of `{trained.run.id}` is not finite for some test images")
    unit, figures = int(np.prod(trained.info.shape)) * np.log(2), {}
    for name, nats in values.items():
        mean, se = float(nats.mean()), float(nats.std(ddof=1) / np.sqrt(n)) if n > 1 else None
        figures[name] = {"nats": mean, "bpd": mean / unit, "se": se}
    labelled = bool(model.conditional) and trial.y is not None
    if gap := solver_gap(trained, trial, trial.y if labelled else None, seed):
        log.info(str(gap))
    return {
        "kind": model.likelihood,
        "n": n,
        "given_labels": labelled,
        "marginal": figures.get("marginal"),
        "solver_gap": gap and asdict(gap),
    } | figures["nats"]


def log_prob(model: Model, x: Tensor, y: Tensor | None, noise: Noise, **options: Any) -> Tensor:
    with torch.no_grad(), full_fp32(x.device):
        return model.log_prob(x, y, noise=noise, **group_options(model.log_prob, options)).cpu().double()


def given_label(model: Model, batch: Batch) -> Tensor:
    """float64 [B]: log p(x | y) of a conditional model, log p(x) of others."""
    return log_prob(model, batch.x, batch.y if model.conditional else None, batch.noise)


def log_marginal(model: Model, batch: Batch, frequencies: Tensor, seed: int) -> Tensor:
    """float64 [B]: log Σ_y p(y) p(x | y), with the same noise for each class. If the likelihoods are lower
    bounds, the result is one too."""
    of_class = []
    for y in range(len(frequencies)):
        noise = ImageNoise(seed, batch.index, batch.x.device)
        of_class.append(log_prob(model, batch.x, torch.full_like(batch.index, y), noise))
    return torch.logsumexp(torch.stack(of_class) + frequencies.log()[:, None], 0)


@dataclass(frozen=True)
class SolverGap:
    """The change of some images' likelihoods when the solver takes twice as many steps."""

    steps: int
    mean: float  # mean change in bits per dimension, above 0 if the likelihood is too high
    worst: float  # largest absolute change in bits per dimension
    n: int

    def __str__(self) -> str:
        line = (
            f"likelihood by the ODE: {self.steps} steps instead of {2 * self.steps} change it by "
            f"{self.mean:+.4f} bpd on average, by {self.worst:.4f} at most ({self.n} images)"
        )
        return line if self.worst < NOTABLE_BPD else f"{line}: too few steps for two correct decimals"


def solver_gap(
    trained: Trained, batch: Batch, labels: Tensor | None = None, seed: int = 0
) -> SolverGap | None:
    """The gap of a batch's first images; None unless the likelihood comes from an ODE with fixed steps."""
    model, n = trained.model, min(MAX_CHECKED_IMAGES, len(batch))
    if model.likelihood != "ode" or not trained.has_levels:
        return None
    options = flat_defaults(model.log_prob)
    if options["solver"] == "adaptive":
        return None
    steps, x, y = options["steps"], batch.x[:n], None if labels is None else labels[:n]

    def nats(count: int) -> Tensor:
        return log_prob(model, x, y, ImageNoise(seed, batch.index[:n], x.device), steps=count)

    gap = (nats(steps) - nats(2 * steps)) / (x[0].numel() * math.log(2))
    return SolverGap(steps, float(gap.mean()), float(gap.abs().max()), n)
