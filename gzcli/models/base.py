"""The protocol of a model: the attributes and methods that trainer, sampler and scorers use."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from gzcli.core.errors import UsageError
from gzcli.core.types import Applied, Batch, DataInfo, Noise, Progress

if TYPE_CHECKING:
    from typing_extensions import Self

_EXAMPLE = "see an example with `gz model new NAME`"


@dataclass
class Phase:
    """One optimizer's update. Phases run in the listed order, at steps from `start` on with
    (step + 1) % every == 0.

    name: the `phase` that is passed to `loss`.
    params: parameters, or optimizer groups, which may have `weight_decay` and `lr_scale`.
    every: steps from one update to the next.
    start: the first step at which the phase runs.
    """

    name: str
    params: Iterable[nn.Parameter] | list[dict[str, Any]]
    every: int = 1
    start: int = 0

    def due(self, step: int) -> bool:
        """Whether the phase runs at a step."""
        return step >= self.start and (step + 1) % self.every == 0

    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.groups() for p in group["params"]]

    def groups(self) -> list[dict[str, Any]]:
        params: list[Any] = list(self.params)  # an iterator can be read once
        has_groups = bool(params) and isinstance(params[0], dict)
        self.params = params = [{**g, "params": list(g["params"])} for g in params] if has_groups else params
        return params if has_groups else [{"params": params}]


class Model(nn.Module):
    """Base of every model. The typed keyword-only `__init__` is the schema of its recipe.

    A model may define optional methods. Each one is a capability, which `gz list --can` shows:

      log_prob(x, labels=None, *, noise)   [B] nats of the discrete image; see the attribute `likelihood`
      score_<name>(x, *, noise, …)         [B], higher = more out-of-distribution
      map_<name>(x, *, noise, …)           [B, H, W], the share of each pixel in that score, or its error
      fit_<name>(batches)                  computes in-distribution statistics for a score
      measure(batches)                     {name: metric} of held-out images, shown by `gz bench`; a line of
                                           its docstring names each one, such as `mse: error of …`
      prepare(batch)                       {key: rows}, computed once for every image, for `batch.extra`
      reconstruct · interpolate · traverse · analogies · translate · inpaint · upscale · complete ·
      edit · classify
                                           applications, run by `--do`: (x, *, noise, progress, …) →
                                           `Applied`; some take a `mask`, `labels`, or y, the labels of x
                                           if the set has them; without a y, `labels` are those of x
                                           unless others are named
      sources(n, *, noise, …)              [n, C, H, W], the images that `sample` transforms for this noise
      to_latent(x) · from_latent(z)        latents [B, c, h, w] of images and back, for `data.latent`
      to_diffusers()                       a pipeline of diffusers with the same weights, for `gz runs export`
      on_batch(batch)                      {key: rows} of a step's whole batch, in `batch.extra` of its
                                           micro-batches
      calibrate(batches)                   recomputes statistics of training images in buffers, for averaged
                                           weights
    """

    paper: ClassVar[str]
    # models that are this class with other defaults: by name their paper, other class attributes and options
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    needs: ClassVar[tuple[str, ...]] = ()  # inputs besides the image, such as a caption
    conditional: bool = False  # whether this instance was built to take labels
    null_label: ClassVar[bool] = True  # whether a conditional model has a label for images without one
    # applications that take labels though the model is not conditional
    labels_for: ClassVar[tuple[str, ...]] = ()
    with_labels: ClassVar[tuple[str, ...]] = ()  # applications that only a conditional model has
    latents: ClassVar[bool] = False  # whether it can be trained on latents (`data.latent`)
    # "values": any images; "levels": no real numbers; "bytes": at most 256 levels; "pictures": 8 bits
    takes: ClassVar[str] = "values"
    square: ClassVar[bool] = False  # whether it needs square images
    aspects: ClassVar[bool] = False  # whether it trains on images of several shapes (`data.fit: aspect`)
    shares: ClassVar[bool] = False  # whether its weights can be sharded over GPUs (`launch.strategy: fsdp`)
    likelihood: ClassVar[str | None] = None  # what log_prob is: "exact" | "bound" | "ode"
    # the metric of the best checkpoint: "bpd" | "fd" | "loss"; auto: bpd where log_prob is cheap, else loss
    best: ClassVar[str] = "auto"
    # phases whose loss is a sum over the dimensions of an image, such as its nats; training divides their
    # gradient by the number of dimensions, so that its norm is alike for images of any size
    sums: ClassVar[tuple[str, ...]] = ()
    # phases whose loss is normalised, so that it does not fall as samples improve; `gz model check` requires
    # instead that samples approach a batch, by their energy distance
    normalised: ClassVar[tuple[str, ...]] = ()
    # a loss validated besides `best`: its rise shows that the model memorises training images
    watched: ClassVar[str | None] = None
    # scores with an optimisation for each image, computed only if named
    costly: ClassVar[tuple[str, ...]] = ()
    fitted_on_train: ClassVar[tuple[str, ...]] = ()  # scores that are fitted to training images
    # scores that compare images by `perceptual` too, unless their option `pixels` is true
    perceptual_scores: ClassVar[tuple[str, ...]] = ()
    # distance [B] of two batches, set by `gz ood`
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None
    warnings: tuple[str, ...] = ()  # warnings of `on_start` for the log

    if TYPE_CHECKING:  # the optional methods that the engine calls; `hasattr` finds whether a model has one
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
        """The model with options as in a recipe: flat, with lists for tuples."""
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
        return cls(data, **group_options(cls, values))

    @classmethod
    @cache
    def variant(cls, name: str) -> type[Self]:
        """A subclass with the paper, class attributes and defaults of an entry of `variants`."""
        values = dict(cls.variants[name])
        attributes = {key: values.pop(key) for key in values.keys() - flat_defaults(cls).keys()}
        defaults = group_options(cls, values)

        @wraps(cls.__init__)
        def init(self: Model, data: DataInfo, **options: Any) -> None:
            cls.__init__(self, data, **defaults | options)

        signature = inspect.signature(cls.__init__)
        parameters = [
            p.replace(default=defaults.get(p.name, p.default)) for p in signature.parameters.values()
        ]
        init.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        more = {"__init__": init, "__doc__": cls.__doc__, "__module__": cls.__module__}
        return type(name, (cls,), attributes | more)

    def phases(self) -> list[Phase]:
        """The updates of a step. By default, a single update of all trainable parameters."""
        return [Phase("main", [p for p in self.parameters() if p.requires_grad])]

    def loss(self, batch: Batch, phase: str = "main") -> Tensor | dict[str, Tensor]:
        """The loss of a phase, a mean over the batch. It may be a dict with the loss as "loss" and other
        values to log. The loss of an image is a mean over its dimensions, or their sum if `sums` names the
        phase. It falls as the model learns, unless `normalised` names the phase."""
        raise UsageError(f"`{type(self).__name__}` has no method `loss`", hint=_EXAMPLE)

    def sample(self, n: int, *, labels: Tensor | None = None, noise: Noise, progress: Progress) -> Tensor:
        """n images [n, C, H, W] in [-1, 1].

        labels: [n] int64 or [n, K]; None: image i of a conditional model has class i % K.
        """
        raise UsageError(f"`{type(self).__name__}` has no method `sample`", hint=_EXAMPLE)

    def fit(self, batches: Iterable[Batch]) -> None:
        """Called once per run, before `on_start`, with a random subset of the training images."""

    def begins_anew(self, earlier: DataInfo, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """For a training from another model's weights (`train.init`): values, by name, that replace weights
        whose meaning differs on this data. `earlier` describes that model's data; it has classes if the model
        was conditioned on them."""
        return {}

    def on_start(self, batch: Batch) -> None:
        """Called with the first batch before the first step, for data-dependent initialisation. After a
        resume it is called again, and must then change nothing."""

    def on_format(self, format: int) -> None:
        """Called after `__init__` for recipes of an earlier format, in which keys had other meanings."""

    def on_step(self, step: int) -> None:
        """Called after each step, and after a resume, for annealing as a function of the step."""

    def attach(self, name: str, module: nn.Module) -> None:
        """Attaches a frozen module. It moves with the model and stays in eval mode. It is not part of the
        parameters, the state dict, the averaged weights or DDP."""
        module.eval().requires_grad_(False)
        self.__dict__.setdefault("attached", {})[name] = module
        self.__dict__[name] = module  # bypasses nn.Module.__setattr__, which would register it

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for module in self.__dict__.get("attached", {}).values():
            module._apply(fn)
        return super()._apply(fn, recurse)


def named_losses(model: Model, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
    """The losses of a phase by name, scalars: "loss", and the other values for the log."""
    out = model.loss(batch, phase)
    return out if isinstance(out, dict) else {"loss": out}


# --- options: flat in a recipe, in dataclasses in a signature ---


def group_options(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Flat options as keywords of `function`: those that are fields of a dataclass are grouped in it.

    A parameter is a group if its default is an instance of a dataclass, as in `unet: UNetOptions =
    UNetOptions(channels=32)`. Fields without an option keep their value in that default.
    """
    flat, keywords = dict(options), {}
    for name, parameter in inspect.signature(function).parameters.items():
        default = parameter.default
        if _is_group(default):
            fields = {f.name: flat.pop(f.name) for f in dataclasses.fields(default) if f.name in flat}
            keywords[name] = dataclasses.replace(default, **fields)
    return keywords | flat


def _is_group(default: Any) -> bool:
    """Whether a parameter is a group of options, judged by its default."""
    return dataclasses.is_dataclass(default) and not isinstance(default, type)


def flat_defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """The parameters of `function` with their defaults, flat: a dataclass of options is replaced by its
    fields. The default of a required parameter is `inspect.Parameter.empty`."""
    values: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        default = parameter.default
        if _is_group(default):
            values |= {f.name: getattr(default, f.name) for f in dataclasses.fields(default)}
        else:
            values[name] = default
    return values
