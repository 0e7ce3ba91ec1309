"""The protocol of a model: what the one trainer, the sampler and the scorers ask of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from gzcli.models.options import grouped
from gzcli.types import Applied, Batch, DataInfo, Noise, Progress

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass
class Phase:
    """One optimizer's update; phases run in the listed order, at steps where (step + 1) % every == 0, from
    `start` on."""

    name: str
    params: Iterable[nn.Parameter] | list[dict[str, Any]]  # or groups with weight_decay / lr_scale
    every: int = 1
    start: int = 0

    def due(self, step: int) -> bool:
        return step >= self.start and (step + 1) % self.every == 0

    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.groups() for p in group["params"]]

    def groups(self) -> list[dict[str, Any]]:
        """The parameters as optimizer groups."""
        params: list[Any] = list(self.params)  # it may be an iterator, which can be read once
        grouped = bool(params) and isinstance(params[0], dict)
        self.params = params = [{**g, "params": list(g["params"])} for g in params] if grouped else params
        return params if grouped else [{"params": params}]


class Model(nn.Module):
    """Base of every model. Its typed keyword-only `__init__` IS its recipe's schema.

    Optional methods are capabilities; defining one is what `gz list --can` shows:
      log_prob(x, labels=None, *, noise)   [B] nats of the discrete image; with the class attribute
      `likelihood`
      score_<name>(x, *, noise, …)         [B], higher = more out-of-distribution
      fit_<name>(batches)                  in-distribution statistics that a score needs
      measure(batches)                     {name: figure} of its own on held-out images, shown by `gz bench`
      prepare(batch)                       {key: rows}, made once of every training image, in `batch.extra`
      from then on
      reconstruct · interpolate · traverse · translate · inpaint · upscale · complete · edit    applications,
      called by
                                           `--do`: (x, *, noise, progress, …) → `Applied`; some may be told
                                           `labels`, a
                                           `mask`, or y, the labels of x where the set has them
      sources(n, *, noise, …)              [n, C, H, W] that `sample` makes its images of, given the same
      noise
      to_latent(x) · from_latent(z)        latents [B, c, h, w] of images and back, for `data.latent`
      to_diffusers()                       a pipeline of diffusers with the same weights, for `gz runs export`
      on_start(batch) · on_step(step)      data-dependent start · annealing; called after a resume too
      on_batch(batch)                      {key: rows} of a step's whole batch, in `batch.extra` of its parts
      calibrate(batches)                   what buffers keep of training images, anew of the averaged weights
    """

    paper: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()  # what must come with each image, as a caption or a second domain
    conditional: bool = False  # an instance's own, where it was built to take labels
    # applications that take labels though the model is not conditional
    labels_for: ClassVar[tuple[str, ...]] = ()
    latents: ClassVar[bool] = False  # whether it can live on latents (`data.latent`)
    likelihood: ClassVar[str | None] = None  # what log_prob is: "exact" | "bound" | "ode"
    # the best checkpoint is by "bpd" | "fd" | "loss"; auto is bpd where log_prob is cheap, else loss
    best: ClassVar[str] = "auto"
    costly: ClassVar[tuple[str, ...]] = ()  # scores that take an optimisation an image: only when named
    fitted_on_train: ClassVar[tuple[str, ...]] = ()  # scores whose fit takes training images
    # scores that compare images by `perceptual` too, unless their option `pixels` is true
    perceptual_scores: ClassVar[tuple[str, ...]] = ()
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None  # distance [B] of two batches, by `gz ood`
    warnings: tuple[str, ...] = ()  # what `on_start` has to say to whoever trains it

    if TYPE_CHECKING:  # the optional methods that the engine calls; `hasattr` tells whether a model has one
        calibrate: Callable[..., None]
        from_latent: Callable[[Tensor], Tensor]
        log_prob: Callable[..., Tensor]
        measure: Callable[..., dict[str, float]]
        on_batch: Callable[[Batch], dict[str, Tensor]]
        prepare: Callable[[Batch], dict[str, Tensor]]
        reconstruct: Callable[..., Applied]
        score_nll: Callable[..., Tensor]
        sources: Callable[..., Tensor]
        to_diffusers: Callable[[], Any]
        to_latent: Callable[[Tensor], Tensor]

    def __init__(self, data: DataInfo):
        super().__init__()
        self.data = data

    @classmethod
    def of(cls, data: DataInfo, **options: Any) -> Self:
        """The model of options as a recipe has them: flat, lists for tuples."""
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
        return cls(data, **grouped(cls, values))

    def phases(self) -> list[Phase]:
        return [Phase("main", [p for p in self.parameters() if p.requires_grad])]

    def loss(self, batch: Batch, phase: str = "main") -> Tensor | dict[str, Tensor]:
        """The mean over the batch's samples of `phase`'s loss; a dict holds "loss", the rest is logged."""
        raise NotImplementedError

    def sample(self, n: int, *, labels: Tensor | None = None, noise: Noise, progress: Progress) -> Tensor:
        """n images [n, C, H, W] in [-1, 1]; `labels` [n] int64 or [n, K]; None when conditional means i %
        K."""
        raise NotImplementedError

    def on_start(self, batch: Batch) -> None:
        """Before the first step, with its batch; for data-dependent initialisation. Must be idempotent
        (resume)."""

    def on_step(self, step: int) -> None:
        """After step `step`; for annealing that is a function of the step. Called after a resume too."""

    def attach(self, name: str, module: nn.Module) -> None:
        """Hold a frozen helper: moved with the model, in eval mode, outside parameters, state dict, EMA and
        DDP."""
        module.eval().requires_grad_(False)
        self.__dict__.setdefault("attached", {})[name] = module
        self.__dict__[name] = module  # past nn.Module.__setattr__, which would register it

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for module in self.__dict__.get("attached", {}).values():
            module._apply(fn)
        return super()._apply(fn, recurse)
