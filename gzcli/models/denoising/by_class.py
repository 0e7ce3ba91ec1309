"""What a model that knows labels can do with images: say their class, and take them to another one."""

from __future__ import annotations

import torch
from torch import Tensor

from gzcli.core.errors import UsageError
from gzcli.core.types import Applied, Noise, Progress, no_progress
from gzcli.models.denoising.guided import Guided
from gzcli.models.nn import at_least, spread_labels

TIMES = 4  # noise levels by which translation finds the class of an image that has no label


class ByClass(Guided):
    """Classification and translation of images, by the error and the ODE that a family defines."""

    with_labels = ("translate", "classify")

    def error_at(self, x: Tensor, eps: Tensor, share: float, y: Tensor | None) -> Tensor:
        """[B]: the mean squared error of the network's prediction for images x noised by eps, given labels y.

        share: which noise level, 0 … 1, as a share of the way between data and noise.
        """
        raise NotImplementedError

    def to_noise(self, x: Tensor, y: Tensor | None, steps: int, progress: Progress) -> Tensor:
        """The noise that the ODE given labels y takes images x to."""
        raise NotImplementedError

    def to_data(self, z: Tensor, y: Tensor | None, steps: int, guidance: float, progress: Progress) -> Tensor:
        """The images that the ODE given labels y takes noise z to."""
        raise NotImplementedError

    def class_errors(
        self, x: Tensor, noise: Noise, times: int = 4, progress: Progress = no_progress
    ) -> Tensor:
        """[B, K]: the error of the prediction given each class, at `times` noise levels and with the same
        noise for every class. The class of the least error is the model's classification (Li 2023, "Your
        Diffusion Model is Secretly a Zero-Shot Classifier", arXiv:2303.16203)."""
        classes = spread_labels(None, len(self.data.classes), self.data, x.device)
        errors = x.new_zeros(len(x), len(classes))
        for i in range(times):
            eps = noise.randn(*x.shape)
            share = (i + 0.5) / times
            found = [self.error_at(x, eps, share, y.expand(len(x), *y.shape)) for y in classes]
            errors = errors + torch.stack(found, 1) / times
            progress(i + 1, times, x)
        return errors

    @torch.no_grad()
    def classify(
        self,
        x: Tensor,
        *,
        y: Tensor | None = None,
        noise: Noise,
        progress: Progress = no_progress,
        times: int = 20,
    ) -> Applied:
        """The images with the class under which the model predicts their noise best, a classification that
        it was not trained for (Li 2023, arXiv:2303.16203); and its accuracy, where the classes y are known.

        Raises UsageError for an unconditional model, and where several classes hold at once.

        times: noise levels at which the classes are compared; each takes a network call for every class.
        """
        at_least(1, times=times)
        self._check_conditional("classify")
        if self.data.multilabel:
            raise UsageError("several classes may hold at once: there is no one class to find")
        found = self.class_errors(x, noise, times, progress).argmin(1)
        figures = {} if y is None else {"accuracy": float((found == y).float().mean())}
        return Applied(x, rows=("classified",), labels=found, figures=figures)

    @torch.no_grad()
    def translate(
        self,
        x: Tensor,
        *,
        labels: Tensor | None = None,
        y: Tensor | None = None,
        noise: Noise,
        progress: Progress = no_progress,
        steps: int = 25,
        guidance: float = 1.0,
    ) -> Applied:
        """Images [B, C, H, W] of one class as those of another, `labels`: their noise by the ODE given their
        own class, and the images of that noise given the other one (Su 2022, "Dual Diffusion Implicit
        Bridges", arXiv:2203.08382). Without labels, image i gets class i % K. Images whose class y is not
        known are classified first.

        Raises UsageError for an unconditional model.

        steps: of the ODE, to noise and back.
        guidance: strength of the labels on the way back; 1: as trained, more: sharper.
        """
        at_least(1, steps=steps)
        self._check_conditional("translate")
        if y is None and not self.data.multilabel:
            y = self.class_errors(x, noise, TIMES).argmin(1)
        to = self.asked_labels(labels, len(x))
        z = self.to_noise(x, self.known_labels(y), steps, progress)
        made = self.into_range(self.to_data(z, to, steps, guidance, progress))
        return Applied(made, rows=("translated",), labels=to)

    def _check_conditional(self, verb: str) -> None:
        if not self.conditional:
            raise UsageError(
                f"only a model that knows labels can {verb}",
                hint="train it with `--set model.conditional=true`",
            )
