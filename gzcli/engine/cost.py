"""What a training step of a recipe costs: parameters, floating-point operations and memory.

The model is built, and a step of each phase runs, on tensors without values (`shapes.py`): no weights are
read, and a net of a billion parameters takes no memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from gzcli.engine import muon
from gzcli.engine.build import build_model
from gzcli.engine.prepared import with_prepared
from gzcli.engine.shapes import Counter, shapes_only, size_of
from gzcli.models import catalog
from gzcli.models.base import Model, Phase, named_losses
from gzcli.parts import Part
from gzcli.types import Batch, BatchNoise, DataInfo

PREPARING = ("pair_steps",)  # options of `prepare` that a step does not depend on, so that it is short here
MANY = 64  # images of the larger of two micro-batches that a step is run with, at least
MOMENTS = {"adamw8bit": 2, "sgd": 4, "rmsprop": 4}  # bytes that an optimizer keeps of a parameter; else 8
NEWTON = 14  # bytes that Muon's iteration holds of an element of a matrix: one in fp32, five in bf16


class Seen(NamedTuple):
    """A part of a recipe, and the description of what its model sees: of latents where it is trained on
    these."""

    part: Part
    info: DataInfo


Stages = Mapping[str, Seen]  # earlier stages by their names


@dataclass(frozen=True)
class Line:
    """A cost by the micro-batch: `fixed` + b · `each` for b images."""

    fixed: float
    each: float

    def at(self, images: float) -> float:
        """The cost of a micro-batch."""
        return self.fixed + images * self.each


@dataclass(frozen=True)
class Cost:
    """What a training step costs; memory is that of one process.

    params: parameters of the model, without those of frozen helpers.
    trainable: parameters that a phase trains.
    flops: floating-point operations of a step of the global batch, forward and backward, and of Muon. A phase
      counts by the share of the steps at which it runs.
    weights: bytes of parameters, buffers and frozen helpers.
    gradients: bytes.
    moments: bytes that the optimizer keeps.
    average: bytes of the averaged weights.
    scratch: bytes that the optimizer takes beside these while it steps.
    step: the most bytes of tensors that a phase makes: what is kept for the gradient, temporary tensors, and
      the gradients that are there by then.
    images: the micro-batch, images that a process computes at once.
    pieces: micro-batches of a process whose gradients a step adds up.
    """

    params: int
    trainable: int
    flops: float
    weights: int
    gradients: int
    moments: int
    average: int
    scratch: int
    step: Line
    images: int
    pieces: int

    def activations(self, images: int | None = None) -> int:
        """Bytes of a step's own tensors for a micro-batch; None: that of the recipe."""
        peak = self.step.at(self.images if images is None else images)
        # the gradients are there before where they are added up, and counted by themselves
        return max(self.scratch, round(peak - (self.gradients if self.pieces == 1 else 0)))

    def rows(self, images: int | None = None) -> list[tuple[str, int]]:
        """(what, bytes) of a process, for a micro-batch; None: that of the recipe."""
        rows = [
            ("weights", self.weights),
            ("gradients", self.gradients),
            ("optimizer", self.moments),
            ("average", self.average),
            ("activations", self.activations(images)),
        ]
        return [row for row in rows if row[1]]

    def memory(self, images: int | None = None) -> int:
        """Bytes of a process for a micro-batch, without what its libraries take."""
        return sum(size for _, size in self.rows(images))

    def largest(self, there: int) -> int:
        """The largest micro-batch that fits in so many bytes; 0: not even one image does."""
        if self.memory(1) > there:
            return 0
        static = self.memory(0) - self.activations(0) - (self.gradients if self.pieces == 1 else 0)
        return max(1, int((there - static - self.step.fixed) / max(1.0, self.step.each)))


def cost_of(part: Part, info: DataInfo, stages: Stages | None = None) -> Cost:
    """The cost of training a part of a recipe. Its batch is shared by `launch.processes`, or `launch.gpus`.

    info: description of what its model sees: of latents where it is trained on latents.
    stages: what the model is built on.

    Raises what the model raises for options that do not fit the data.
    """
    with shapes_only() as counter:
        model, helpers = build(part, info, stages or {})
        phases = model.phases()
        own, trained = list(model.parameters()), {id(p): p for phase in phases for p in phase.parameters()}
        weights = size_of([*own, *model.buffers(), *helpers])
        images = micro_batch(part)
        counts = (images, max(2 * images, MANY))
        probes = [probe(counter, model, phases, part, count) for count in counts]
    moments, scratch, products = optimizers(model, phases, part)
    flops = probes[0][0] * part.train.accumulate * processes_of(part)
    return Cost(
        params=sum(p.numel() for p in own),
        trainable=sum(p.numel() for p in trained.values()),
        flops=flops + products,
        weights=weights,
        gradients=max(size_of(phase.parameters()) for phase in phases),
        moments=moments,
        average=size_of(own) if part.train.ema else 0,
        scratch=scratch,
        step=line(counts, [peak for _, peak in probes]),
        images=images,
        pieces=part.train.accumulate,
    )


def build(part: Part, info: DataInfo, stages: Stages) -> tuple[Model, list[torch.Tensor]]:
    """The model, in training mode, and the tensors of its frozen helpers."""
    names = catalog.card(part.model).stages
    earlier = {name: build(*stages[name], stages)[0].eval().requires_grad_(False) for name in names}
    few = {key: 1 for key in PREPARING if key in part.options}
    model = build_model(replace(part, options={**part.options, **few}), info, earlier).train()
    attached = vars(model).get("attached", {}).values()
    return model, [t for helper in attached for t in (*helper.parameters(), *helper.buffers())]


def processes_of(part: Part) -> int:
    """The processes that share a batch."""
    gpus = part.launch.gpus if isinstance(part.launch.gpus, int) else None
    return max(1, part.launch.processes or gpus or 1)


def micro_batch(part: Part) -> int:
    """Images that a process computes at once."""
    return max(1, part.train.batch_size // (processes_of(part) * part.train.accumulate))


def line(counts: tuple[int, int], values: list[float]) -> Line:
    """The line through the values of two micro-batches; a cost never falls with the batch."""
    (low, high), (first, second) = counts, values
    each = max(0.0, (second - first) / (high - low))
    return Line(first - low * each, each)


def halved(part: Part) -> bool:
    """Whether a step computes in 16 bits; `auto` does on GPUs, and on a CPU that gains from it."""
    if part.train.precision != "auto":
        return part.train.precision in ("bf16", "fp16")
    if part.launch.gpus and not part.launch.cpu:
        return True
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def probe(
    counter: Counter, model: Model, phases: list[Phase], part: Part, images: int
) -> tuple[float, float]:
    """What a step takes of a micro-batch: its operations, averaged over the run, and the most bytes of its
    own tensors, gradients among them."""
    flops = peak = 0.0
    trained = {id(p): p for phase in phases for p in phase.parameters()}
    with torch.no_grad():
        batch = with_prepared(model, batch_of(part, model.data, images))
        if hasattr(model, "on_batch"):
            batch.extra |= model.on_batch(batch)
    for phase in phases:
        for p in trained.values():
            p.requires_grad_(False)
        for p in phase.parameters():
            p.requires_grad_(True)
        before = counter.mark()
        with torch.autocast("cpu", torch.bfloat16, enabled=halved(part)):
            loss = named_losses(model, batch.rows(slice(None), noise(part, phase.name, images)), phase.name)
        loss["loss"].backward()
        del loss
        peak = max(peak, counter.peak - before)
        flops += counter.flops * max(0, part.train.steps - phase.start) / part.train.steps / phase.every
        for p in trained.values():
            p.grad = None
    return flops, peak


def noise(part: Part, key: str, images: int) -> BatchNoise:
    """The noise of a batch; it has no values either."""
    return BatchNoise(part.seed, 0, key, total=images)


def batch_of(part: Part, info: DataInfo, images: int) -> Batch:
    """A batch of so many images, with what the model needs beside them."""
    x = torch.zeros(images, *info.shape)
    many = (images, len(info.classes)) if info.multilabel else (images,)
    y = torch.zeros(many, dtype=torch.int64) if info.classes else None
    needs = catalog.card(part.model).needs
    extra = {key: ["a picture"] * images if key == "caption" else x.clone() for key in needs}
    return Batch(x, y, torch.arange(images), noise(part, "batch", images), extra)


def optimizers(model: Model, phases: list[Phase], part: Part) -> tuple[int, int, float]:
    """Bytes that the optimizers keep, bytes that they take beside while they step, and the floating-point
    operations of a step."""
    kept, scratch, flops = 0, 0, 0.0
    known = muon.matrices_of(model)
    for phase in phases:
        name = part.optim.of(phase.name).name
        for group in muon.halves(phase.groups(), known):
            sizes = [p.numel() for p in group["params"]]
            if name != "muon" or not group["wide"]:
                kept += MOMENTS.get(name, 8) * sum(sizes)
                continue
            kept += 4 * sum(sizes)
            scratch = max(scratch, (4 + NEWTON) * sum(sizes))
            for p, count in zip(group["params"], group["matrices"], strict=True):
                rows, columns = sorted((len(p) // count, p[0].numel()))
                each = 2 * rows * rows * (2 * columns + rows)  # three products
                flops += count * muon.STEPS * each / phase.every
    return kept, scratch, flops
