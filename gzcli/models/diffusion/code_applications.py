"""Applications of a diffusion autoencoder (Preechakul et al. 2022, arXiv:2111.15640), for the autoencoder
itself and for the prior of its codes."""

from __future__ import annotations

import torch
from torch import Tensor

from gzcli.core.errors import UsageError
from gzcli.core.types import Applied, Noise, Progress, no_progress
from gzcli.models.base import Model
from gzcli.models.denoising.interpolation import through_noise
from gzcli.models.diffusion.codes import SemanticCodes
from gzcli.models.nn import at_least, interpolated, pairs_of, spread_labels


class CodeApplications(Model):
    """Images reconstructed, interpolated and edited through the codes of an autoencoder."""

    labels_for = ("edit",)

    @property
    def coder(self) -> SemanticCodes:
        """The autoencoder."""
        raise NotImplementedError

    @torch.no_grad()
    def reconstruct(
        self,
        x: Tensor,
        *,
        noise: Noise,
        progress: Progress = no_progress,
        steps: int = 50,
        stochastic: bool = True,
    ) -> Applied:
        """Images [B, C, H, W] encoded and decoded.

        steps: network calls from image to noise, and from noise to image.
        stochastic: whether x_T is the image's own code; otherwise it is drawn from `noise`, which shows what
          z_sem alone encodes.
        """
        at_least(1, steps=steps)
        coder = self.coder
        z = coder.encode(x)
        x_T = coder.invert(x, z, steps, half(progress, 0)) if stochastic else noise.randn(*x.shape)
        back = coder.decode(z, x_T, steps, half(progress, 1) if stochastic else progress)
        return Applied(back, rows=("reconstruction",))

    @torch.no_grad()
    def interpolate(
        self, x: Tensor, *, noise: Noise, progress: Progress = no_progress, frames: int = 8, steps: int = 50
    ) -> Applied:
        """Interpolations from image 0 to 1, 2 to 3, …: of z_sem on a line, of x_T on the sphere (section
        5.2).

        Raises UsageError for fewer than two images, or frames.

        frames: images of an interpolation, both ends included.
        steps: network calls from image to noise, and from noise to image.
        """
        at_least(2, frames=frames)
        at_least(1, steps=steps)
        coder = self.coder
        z = coder.encode(pairs_of(x))
        between = interpolated(z, frames)
        return through_noise(
            x,
            frames,
            to_noise=lambda x: coder.invert(x, z, steps, half(progress, 0)),
            to_images=lambda x_T: coder.decode(between, x_T, steps, half(progress, 1)),
        )

    @torch.no_grad()
    def edit(
        self,
        x: Tensor,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress = no_progress,
        strength: float = 3.0,
        steps: int = 50,
    ) -> Applied:
        """Images [B, C, H, W] changed towards `labels` by a step of z_sem, with x_T kept (section 5.3). An
        image that the classifier gives these labels already is unchanged.

        The step is along Σ w, where w are the classifier's weights of the wanted labels minus those of the
        predicted labels, and Σ is the covariance of the training codes. The paper's direction w leads away
        from all codes where their coordinates are correlated (Haufe 2014,
        doi:10.1016/j.neuroimage.2013.10.067). Raises UsageError for a model of data without labels.

        strength: length of the step in standard deviations of the codes along it.
        steps: network calls from image to noise, and from noise to image.
        """
        coder = self.coder
        if coder.head is None:
            raise UsageError("`edit` needs a model of data with labels", hint="gz list data")
        at_least(1, steps=steps)
        z, labels = coder.encode(x), spread_labels(labels, len(x), coder.data, x.device)
        x_T = coder.invert(x, z, steps, half(progress, 0))
        done = coder.decode(coder.moved(z, labels, strength, coder.head), x_T, steps, half(progress, 1))
        return Applied(done, rows=("edited",), labels=labels)


def half(progress: Progress, which: int) -> Progress:
    """The progress of the first half of the work, from image to noise (0), or of the second, from noise to
    image (1), as progress of the whole."""
    return lambda i, n, x=None: progress(which * n + i, 2 * n, x)
