"""All that judges images in `gz bench`: their quality, whether they are copies, what they are worth, and how
far they look from each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from gzcli.core.jobs import BenchJob
from gzcli.data.packs.pack import Pack
from gzcli.judge import perceptual
from gzcli.judge.contestants import Contestant
from gzcli.judge.figures import Found
from gzcli.judge.image_sets import ImageSet, some
from gzcli.judge.memorised import Memory, worth_of
from gzcli.judge.quality import Quality
from gzcli.models.nn import LPIPS


class Judges:
    """The judges of a bench: made once, called for each contestant's images.

    Raises MissingError for absent weights, UsageError for statistics of other features.
    """

    def __init__(
        self,
        pack: Pack,
        metrics: Sequence[str],
        job: BenchJob,
        device: torch.device,
        say: Callable[[str], None],
    ):
        self.metrics, self.device, self.say = metrics, device, say
        how = {"weights": job.weights, "stats": job.stats}
        self.quality = Quality(pack, metrics, split=job.split, device=device, say=say, **how)
        space = self.quality.memory_space
        self.memory = Memory(self.quality.real, space) if space else None
        self.lpips: LPIPS | None = perceptual.network(pack, device) if "lpips" in metrics else None

    def prepare(self, contestants: Sequence[Contestant]) -> None:
        """Computes the features that the figures of contestants need. A call of every rank."""
        others = (self.memory.train, self.memory.held_out) if self.memory else ()
        self.quality.prepare({one.name: (one.images, one.levels) for one in contestants}, *others)

    def __call__(self, images: ImageSet, levels: int | None) -> Found:
        """The figures of images, of a model with so many grey levels; None: of images from elsewhere."""
        if levels == 2:
            found = self.quality.classes(images) if "classes" in self.metrics else {}
        else:
            mark = self.quality.mark(levels)
            found = {name + mark: value for name, value in self.quality(images, levels).items()}
        return found | (self.memory(images) if self.memory else {}) | self._of_labelled(images)

    def floor(self, n: int) -> Found:
        """The figures of n real images in place of samples."""
        found = self.quality.floor(n) | (self.memory.floor(n) if self.memory else {})
        return found | self._of_labelled(some(self.quality.real.of("train"), n))

    def _of_labelled(self, images: ImageSet) -> Found:
        """The figures that labels change."""
        found: Found = {}
        if self.lpips:
            found |= perceptual.of_samples(images, self.lpips, self.device)
        if "worth" in self.metrics:
            found |= worth_of(images, self.quality.real, self.say)
        return found
