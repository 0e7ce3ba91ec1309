"""Inversion of a generator, the search for the z of an image, and applications of it.

After AnoGAN (Schlegl et al. 2017, arXiv:1703.05921, section 2.2).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from gzcli.core.types import Applied, Noise, Progress
from gzcli.models.base import Model
from gzcli.models.gan.generator import Generator
from gzcli.models.nn.common import at_least, best_labels, double, spread_labels
from gzcli.models.nn.critic import Critic
from gzcli.models.nn.latent import as_interpolations, interpolated, pairs_of, slerp, traversal


@dataclass(frozen=True)
class Search:
    """Options of the search for z.

    steps: gradient steps.
    lr: learning rate of Adam.
    starts: draws of z; the search starts at the nearest one.
    feature: weight of the critic's features in the distance, in [0, 1].
    """

    steps: int
    lr: float = 0.05
    starts: int = 8
    feature: float = 0.1


class InvertibleGAN(Model):
    """A generator and a critic, with the search for z and the applications that need it."""

    costly = ("inversion",)

    generator: Generator
    critic: Critic
    latent: int

    def invert(
        self,
        x: Tensor,
        noise: Noise,
        search: Search,
        *,
        labels: Tensor | None = None,
        progress: Progress | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """z [B, latent] near each image, its labels, and its distance [B], found by Adam from the best start.

        distance = (1 − feature)·‖x − G(z)‖² + feature·‖φ(x) − φ(G(z))‖², where φ is the critic's coarsest
        feature map. The z of the least distance of all steps is returned. The sum over the images is
        minimised and Adam works elementwise, so that an image's z does not depend on its batch. The nets
        compute in double where the device does: at a kink of a ReLU a rounding error, which depends on the
        batch, would lead to another z.

        labels: of x; None: a conditional model starts from every class (multi-label: from no class and from
          each class alone), and at half the steps takes the labels of the least distance.
        """
        n, tries = len(x), self.first_labels(x, labels, search.starts)
        starts, feature = len(tries), search.feature
        with torch.inference_mode(False), torch.enable_grad():
            exact, z = double(x.detach()).clone(), double(noise.randn(n, starts * self.latent)).clone()
            generator = copy.deepcopy(self.generator).to(z.dtype)
            critic = copy.deepcopy(self.critic).to(z.dtype)
            target = critic.maps(exact).detach() if feature else None

            def distance(z: Tensor, y: Tensor | None) -> Tensor:
                fake = generator(z, y)
                d = (1 - feature) * (exact - fake).square().flatten(1).sum(1)
                if target is not None:
                    d = d + feature * (target - critic.maps(fake)).square().flatten(1).sum(1)
                return d

            z = z.unflatten(1, (starts, self.latent))
            with torch.no_grad():
                first = torch.stack([distance(z[:, i], tries[i]) for i in range(starts)], dim=1).argmin(1)
            rows = torch.arange(n, device=z.device)
            known = [y for y in tries if y is not None]
            y = torch.stack(known, 1)[rows, first] if known else None
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
                    if progress is not None:
                        progress(step + 1, search.steps)
        return best_z.to(x.dtype), y, best.to(x.dtype)

    def first_labels(self, x: Tensor, labels: Tensor | None, starts: int) -> list[Tensor | None]:
        """Labels of x for each of at least `starts` draws of z: [B] or [B, K], None without classes."""
        if not self.conditional:
            return [None] * starts
        if labels is not None:
            return [labels.to(x.device)] * starts
        K = len(self.data.classes)
        classes = spread_labels(None, K, self.data, x.device)
        if self.data.multilabel:
            classes = torch.cat([torch.zeros_like(classes[:1]), classes])
        draws = range(max(starts, len(classes)))
        return [classes[i % len(classes)].expand(len(x), *classes.shape[1:]) for i in draws]

    # ---- applications

    def reconstruct(
        self, x: Tensor, *, labels: Tensor | None = None, noise: Noise, progress: Progress, steps: int = 100
    ) -> Applied:
        """The generator's nearest image to each x, given `labels`, or without them the best-fitting labels.

        Raises UsageError for no steps.

        steps: gradient steps of the search for z.
        """
        at_least(1, steps=steps)
        z, y, _ = self.invert(x, noise, Search(steps), labels=labels, progress=progress)
        with torch.no_grad():
            return Applied(self.generator(z, y), rows=("nearest",), labels=y)

    def interpolate(
        self, x: Tensor, *, noise: Noise, progress: Progress, frames: int = 8, search: int = 100
    ) -> Applied:
        """Interpolations from image 0 to 1, 2 to 3, … along great circles of z, between the generator's
        nearest images.

        A conditional model changes the label in the middle. Raises UsageError for fewer than two images or
        frames, or for no search.

        frames: images of an interpolation, both ends included.
        search: gradient steps of the search for z.
        """
        at_least(2, frames=frames)
        at_least(1, search=search)
        x = pairs_of(x)
        z, y, _ = self.invert(x, noise.first(len(x)), Search(search), progress=progress)
        z, pairs = interpolated(z, frames, slerp), len(x) // 2
        if y is not None:  # an image has the label of the nearer end
            end = 2 * torch.arange(pairs, device=x.device)[:, None] + (
                torch.arange(frames, device=x.device) * 2 >= frames
            )
            y = y[end.flatten()]
        with torch.no_grad():
            return replace(as_interpolations(self.generator(z, y), frames), labels=y)

    def traverse(
        self,
        x: Tensor,
        *,
        noise: Noise,
        progress: Progress,
        dims: int = 8,
        frames: int = 8,
        span: float = 3.0,
        search: int = 100,
    ) -> Applied:
        """The generator's nearest image to the first of x, changed along the coordinates of z that change it
        most.

        Raises UsageError for fewer than one of `dims`, `frames` or `search`.

        dims: number of coordinates, one a row.
        frames: images of a row.
        span: a coordinate goes from −span to span, in standard deviations of the prior.
        search: gradient steps of the search for z.
        """
        at_least(1, dims=dims, frames=frames, search=search)
        z, y, _ = self.invert(x[:1], noise.first(1), Search(search), progress=progress)

        def decode(z: Tensor) -> Tensor:
            return self.generator(z, None if y is None else y.expand(len(z), *y.shape[1:]))

        with torch.no_grad():
            return traversal(decode, z, dims, frames, span)
