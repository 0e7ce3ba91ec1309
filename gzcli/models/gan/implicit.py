"""Images from a generator of z ~ N(0, I): sampling, and the search for the z of an image with its
applications."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzcli.core.errors import UsageError
from gzcli.core.types import Applied, Batch, DataInfo, Noise, Progress, no_progress
from gzcli.models.base import Model
from gzcli.models.nn import (
    Labels,
    as_interpolations,
    at_least,
    best_labels,
    complete_pairs,
    double,
    every_label,
    mix_codes,
    nearer,
    needs_labels,
    slerp,
    spread_labels,
    to_fp32,
    traversal,
)


@dataclass(frozen=True)
class Search:
    """The search for the z of an image.

    steps: gradient steps of the search for z.
    lr: learning rate of Adam in the search for z.
    starts: number of samples of z. The search starts at the nearest one.
    feature: weight of the features in the distance, in [0, 1].
    """

    steps: int = 100
    lr: float = 0.05
    starts: int = 8
    feature: float = 0.1


class ImplicitModel(Model):
    """A generator of z ~ N(0, I), and a net whose `maps` are the features by which images are compared.

    Raises UsageError for a conditional model of data without labels.
    """

    best = "fd"
    costly = ("inversion",)
    fitted_on_train = ("knn",)
    generator: nn.Module  # (z [B, latent], labels) → images [B, C, H, W]
    bank: Tensor | None

    def __init__(self, data: DataInfo, latent: int, conditional: bool):
        super().__init__(data)
        self.latent, self.conditional = latent, needs_labels(conditional, data)
        self.register_buffer("bank", None, persistent=False)  # features of training images, for `knn`

    @property
    def comparer(self) -> Any:
        """The net whose `maps` are features [B, C', h, w] of images."""
        raise NotImplementedError

    # ---- sampling

    @torch.no_grad()
    def sample(
        self, n: int, *, labels: Labels = None, noise: Noise, progress: Progress, temperature: float = 1.0
    ) -> Tensor:
        """G(z) for z ~ N(0, temperature²).

        temperature: standard deviation of z.
        """
        device = next(self.parameters()).device
        y = spread_labels(labels, n, self.data, device) if self.conditional else None
        x = self.generator(temperature * noise.randn(n, self.latent), y)
        progress(1, 1, x)
        return x

    # ---- inversion and its applications

    def invert(
        self,
        x: Tensor,
        noise: Noise,
        search: Search,
        *,
        labels: Labels = None,
        progress: Progress = no_progress,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The nearest z [B, latent] of each image, its labels, and the distance [B], by Adam from the best of
        several starts (AnoGAN, Schlegl et al. 2017, arXiv:1703.05921, section 2.2): (1 − feature)·‖x − G(z)‖²
        + feature·‖φ(x) − φ(G(z))‖², where φ is the net's coarsest feature map.

        Without labels, a conditional model starts from every class (multi-label: also from no class). After
        half of the steps it keeps the labels with the smallest distance. Adam works elementwise on the sum
        over images, in double precision if the device supports it, so that z does not depend on the batch."""
        n, tries, feature = len(x), self.first_labels(x, labels, search.starts), search.feature
        with torch.inference_mode(False), torch.enable_grad():
            exact, z = double(x.detach()).clone(), double(noise.randn(n, len(tries) * self.latent)).clone()
            generator = copy.deepcopy(self.generator).to(z.dtype)
            net = copy.deepcopy(self.comparer).to(z.dtype)
            target = net.maps(exact).detach() if feature else None

            def distance(z: Tensor, y: Labels) -> Tensor:
                fake = generator(z, y)
                d = (1 - feature) * (exact - fake).square().flatten(1).sum(1)
                if target is not None:
                    d = d + feature * (target - net.maps(fake)).square().flatten(1).sum(1)
                return d

            z, rows = z.unflatten(1, (len(tries), self.latent)), torch.arange(n, device=z.device)
            with torch.no_grad():
                first = torch.stack([distance(z[:, i], y) for i, y in enumerate(tries)], dim=1).argmin(1)
            labelled = [y for y in tries if y is not None]
            y = torch.stack(labelled, 1)[rows, first] if labelled else None
            z = z[rows, first].requires_grad_()
            adam = torch.optim.Adam([z], lr=search.lr, eps=1e-3)
            best = torch.full((n,), torch.inf, device=x.device, dtype=z.dtype)
            best_z = z.detach().clone()
            for step in range(search.steps + 1):
                if step and step == search.steps // 2 and y is not None and labels is None:
                    z.data.copy_(best_z)
                    y, best = best_labels(partial(distance, best_z), y, self.data)
                d = distance(z, y)
                better = d.detach() < best
                best = torch.where(better, d.detach(), best)
                best_z = torch.where(better[:, None], z.detach(), best_z)
                if step < search.steps:
                    (z.grad,) = torch.autograd.grad(d.sum(), z)
                    adam.step()
                    progress(step + 1, search.steps)
        return best_z.to(x.dtype), y, best.to(x.dtype)

    def first_labels(self, x: Tensor, labels: Labels, starts: int) -> list[Tensor | None]:
        """The labels of x for each of at least `starts` draws of z: [B] or [B, K]; None without classes."""
        if not self.conditional:
            return [None] * starts
        if labels is not None:
            return [labels.to(x.device)] * starts
        classes = every_label(self.data, len(x), x.device)
        if self.data.multilabel:
            classes = [torch.zeros_like(classes[0]), *classes]
        return [classes[i % len(classes)] for i in range(max(starts, len(classes)))]

    def reconstruct(
        self, x: Tensor, *, labels: Labels = None, noise: Noise, progress: Progress, steps: int = 100
    ) -> Applied:
        """Finds the generated image that is closest to each image, given `labels` or the best-fitting ones.

        steps: gradient steps of the search for z.
        """
        at_least(1, steps=steps)
        z, y, _ = self.invert(x, noise, Search(steps), labels=labels, progress=progress)
        with torch.no_grad():
            return Applied(self.generator(z, y), rows=("nearest",), labels=y)

    def interpolate(
        self,
        x: Tensor,
        *,
        labels: Labels = None,
        noise: Noise,
        progress: Progress,
        frames: int = 8,
        search: int = 100,
    ) -> Applied:
        """Interpolates between the generated images that are closest to image 0 and 1, 2 and 3, …, along
        great circles of z. Labels are `labels` or the best-fitting ones. Each frame has the label of the
        nearer image.

        frames: images of an interpolation, both ends included.
        search: gradient steps of the search for z.
        """
        at_least(2, frames=frames)
        at_least(1, search=search)
        x = complete_pairs(x)
        ends = None if labels is None else labels[: len(x)]
        z, y, _ = self.invert(x, noise.first(len(x)), Search(search), labels=ends, progress=progress)
        y = nearer(y, frames)
        with torch.no_grad():
            return as_interpolations(self.generator(mix_codes(z, frames, slerp), y), frames, y)

    def traverse(
        self,
        x: Tensor,
        *,
        labels: Labels = None,
        noise: Noise,
        progress: Progress,
        dims: int = 8,
        frames: int = 8,
        span: float = 3.0,
        search: int = 100,
    ) -> Applied:
        """Changes the generated image that is closest to the first image, along the coordinates of z that
        change it most.

        dims: number of coordinates, one per row.
        frames: images per row.
        span: a coordinate goes from −span to span, in standard deviations of the prior.
        search: gradient steps of the search for z.
        """
        at_least(1, dims=dims, frames=frames, search=search)
        ends = None if labels is None else labels[:1]
        z, y, _ = self.invert(x[:1], noise.first(1), Search(search), labels=ends, progress=progress)

        def decode(z: Tensor) -> Tensor:
            return self.generator(z, None if y is None else y.expand(len(z), *y.shape[1:]))

        with torch.no_grad():
            return traversal(decode, z, dims, frames, span)

    # ---- out-of-distribution scores

    def score_inversion(self, x: Tensor, *, noise: Noise, search: Search = Search()) -> Tensor:
        """The distance of x to the closest generated image (AnoGAN, eq. 4)."""
        return self.invert(x, noise, search)[2]

    def map_inversion(self, x: Tensor, *, noise: Noise, search: Search = Search()) -> Tensor:
        """|x − G(z)| at each pixel for the closest generated image, averaged over channels: [B, H, W]."""
        z, y, _ = self.invert(x, noise, search)
        return (x - self.generator(z, y)).abs().mean(1)

    def unit_features(self, x: Tensor) -> Tensor:
        """The features on a 2×2 grid, normalised to 1: [B, 4·C']."""
        return F.normalize(F.adaptive_avg_pool2d(to_fp32(self.comparer.maps(x)), 2).flatten(1), dim=1)

    @torch.no_grad()
    def fit_knn(self, batches: Iterable[Batch]) -> None:
        """Keeps the features of the training images of `batches`."""
        self.bank = torch.cat([self.unit_features(batch.x) for batch in batches])

    def score_knn(self, x: Tensor, *, noise: Noise, k: int = 10) -> Tensor:
        """Distance to the k-th nearest training image in features (Sun 2022, arXiv:2204.06507).

        k: rank of the neighbour. 1: the nearest.
        """
        if self.bank is None or len(self.bank) < k:
            raise UsageError(
                f"the `knn` score needs the features of at least {k} training images",
                hint="fit the score first, or use fewer neighbours",
            )
        h = self.unit_features(x)
        neighbour = (h @ self.bank.T).topk(k, dim=1).indices[:, -1]
        return (h - self.bank[neighbour]).norm(dim=1)  # the difference keeps the digits of near ones
