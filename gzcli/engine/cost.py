"""What a training step of a recipe costs: parameters, floating-point operations and memory.

The model is built, and a step of each phase runs, on tensors without values (`shapes.py`): no weights are
read, and a net of a billion parameters takes no memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch

from gzcli.core.devices import fast_bf16
from gzcli.core.parts import Part
from gzcli.core.types import Batch, BatchNoise, DataInfo
from gzcli.engine import muon
from gzcli.engine.build import build_model
from gzcli.engine.prepared import with_prepared
from gzcli.engine.shapes import PROBE, Counter, bytes_of, shapes_only
from gzcli.launch.costs import Cost, Line
from gzcli.models import catalog
from gzcli.models.base import Model, Phase, named_losses

CPU = torch.device("cpu")
PREPARING = ("pair_steps",)  # options of `prepare` that a step does not depend on, so that it is short here
MANY = 64  # images of the larger of the two micro-batches whose peaks give the line of memory, at least
MOMENTS = {"adamw8bit": 2, "sgd": 4, "rmsprop": 4}  # bytes that an optimizer keeps of a parameter; else 8
NEWTON = 14  # bytes that Muon's iteration holds of an element of a matrix: one in fp32, five in bf16


class Seen(NamedTuple):
    """A part of a recipe, and the description of what its model sees: of latents where it is trained on
    these."""

    part: Part
    info: DataInfo


Stages = Mapping[str, Seen]  # earlier stages by their names


def cost_of(part: Part, info: DataInfo, stages: Stages | None = None) -> Cost:
    """The cost of training a part of a recipe. Its batch is shared by `launch.processes`, or `launch.gpus`.

    info: description of what its model sees: of latents where it is trained on latents.
    stages: what the model is built on.

    Raises what the model raises for options that do not fit the data.
    """
    images = micro_batch(part)
    batches = (images, max(2 * images, MANY))
    with shapes_only(*batches) as counter:
        model, helpers = build(part, info, stages or {})
        phases = model.phases()
        own = list(model.parameters())
        weights = bytes_of([*own, *model.buffers(), *helpers])
        found = step(counter, model, phases, part)
    moments, scratch, products = optimizers(model, phases, part)
    flops = found.flops * part.train.accumulate * processes_of(part)
    return Cost(
        params=sum(p.numel() for p in own),
        flops=flops + products,
        operators=found.operators * part.train.accumulate,
        weights=weights,
        gradients=max(bytes_of(phase.parameters()) for phase in phases),
        moments=moments,
        average=bytes_of(own) if part.train.ema else 0,
        scratch=scratch,
        step=line(batches, found.peaks),
        images=images,
        pieces=part.train.accumulate,
        processes=processes_of(part),
    )


def flops_of(part: Part, info: DataInfo, stages: Stages | None = None) -> float:
    """The floating-point operations of `cost_of` alone."""
    with shapes_only(micro_batch(part)) as counter:
        model, _ = build(part, info, stages or {})
        phases = model.phases()
        found = step(counter, model, phases, part).flops
    return found * part.train.accumulate * processes_of(part) + optimizers(model, phases, part)[2]


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


def line(batches: tuple[int, int], values: list[float]) -> Line:
    """The line through the values of two micro-batches; a cost never falls with the batch."""
    (low, high), (first, second) = batches, values
    each = max(0.0, (second - first) / (high - low))
    return Line(first - low * each, each)


def halved(part: Part) -> bool:
    """Whether a step computes in 16 bits; `auto` does on GPUs, and on a CPU that gains from it."""
    if part.train.precision != "auto":
        return part.train.precision in ("bf16", "fp16")
    if part.launch.gpus and not part.launch.cpu:
        return True
    return fast_bf16()


class Step(NamedTuple):
    """What a step takes of a micro-batch.

    flops: operations of the first of the counter's batches, averaged over the run.
    operators: number of operators, averaged over the run.
    peaks: the most bytes of its own tensors, gradients among them, for each of the counter's batches.
    """

    flops: float
    operators: float
    peaks: list[float]


def step(counter: Counter, model: Model, phases: list[Phase], part: Part) -> Step:
    """Runs each phase once."""
    flops, operators, peaks = 0.0, 0.0, [0.0 for _ in counter.batches]
    trained = {id(p): p for phase in phases for p in phase.parameters()}
    with torch.no_grad():
        batch = with_prepared(model, batch_of(part, model.data, PROBE))
        if hasattr(model, "on_batch"):
            batch.extra |= model.on_batch(batch)
    for phase in phases:
        for p in trained.values():
            p.requires_grad_(False)
        for p in phase.parameters():
            p.requires_grad_(True)
        before = counter.mark()
        with torch.autocast("cpu", torch.bfloat16, enabled=halved(part)):
            loss = named_losses(model, batch.rows(slice(None), noise(part, phase.name, PROBE)), phase.name)
        loss["loss"].backward()
        del loss
        own = (most - there for most, there in zip(counter.peak, before, strict=True))
        peaks = list(map(max, peaks, own))
        share = max(0, part.train.steps - phase.start) / part.train.steps / phase.every
        flops, operators = flops + counter.flops[0] * share, operators + counter.operators * share
        for p in trained.values():
            p.grad = None
    return Step(flops, operators, peaks)


def noise(part: Part, key: str, images: int, device: torch.device = CPU) -> BatchNoise:
    """The noise of a batch of so many images."""
    return BatchNoise(part.seed, 0, key, total=images, device=device)


def batch_of(part: Part, info: DataInfo, images: int, device: torch.device = CPU) -> Batch:
    """A batch of so many images, with what the model needs beside them."""
    x = torch.zeros(images, *info.shape, device=device)
    many = (images, len(info.classes)) if info.multilabel else (images,)
    y = torch.zeros(many, dtype=torch.int64, device=device) if info.classes else None
    needs = catalog.card(part.model).needs
    extra = {key: ["a picture"] * images if key == "caption" else x.clone() for key in needs}
    index = torch.arange(images, device=device)
    return Batch(x, y, index, noise(part, "batch", images, device), extra)


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
