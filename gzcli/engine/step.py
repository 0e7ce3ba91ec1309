"""The module that trains in one process or in several: its forward is a model's loss."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gzcli.core import devices, ranks
from gzcli.core.parts import Part
from gzcli.core.types import Batch
from gzcli.engine import compiled, shapes
from gzcli.engine.accelerator import ddp
from gzcli.engine.compiled import Compiled
from gzcli.engine.forecast import micro_batch, operations
from gzcli.engine.log import Log, Speed
from gzcli.models.base import Model, named_losses
from gzcli.models.nn import whole_batch

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

# Steps of a run whose operations are not worth being counted, which takes a second: demonstrations of a
# minute, on the embedded sets, have so few.
FEW = 1_500


class Step(nn.Module):
    """What DDP and FSDP wrap, so that they see every forward."""

    def __init__(self, model: Model, graphs: Compiled | None = None):
        super().__init__()
        self.model, self.compiled = model, graphs

    def forward(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        if self.compiled is None:
            return named_losses(self.model, batch, phase)
        return self.compiled(batch, phase)


def step_of(model: Model, part: Part, device: torch.device, log: Log) -> Step:
    """The step of a model, compiled where the recipe asks for it or it is known to gain."""
    if not compiled.compiles(part, model, device):
        return Step(model)
    asked, mode = part.train.compile is True, compiled.mode_of(part, model, device)
    return Step(model, Compiled(model, part.train.steps, log, asked=asked, mode=mode))


def speed_of(model: Model, batch: Batch, part: Part, accelerator: Accelerator, log: Log) -> Speed:
    """What a step of a run does: its images and, where they can be counted, its floating-point operations."""
    images = part.train.batch_size
    if part.train.steps < FEW or not log.main:
        return Speed(images)
    try:
        other, whole, mode = shapes.without_values(model, batch, batch.extra)
        with ranks.alone(), shapes.shapes_only(mode):
            flops = operations(other.train(), whole.rows(slice(micro_batch(part)), whole.noise), part)
    except Exception as e:  # a figure that cannot be found must not end a training
        log.record(f"the operations of a step are not known: {type(e).__name__}: {e}")
        return Speed(images)
    plain = "fp32" if part.train.deterministic else "tf32"
    kind = {"no": plain}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    each = devices.peak(accelerator.device, kind)
    return Speed(images, flops, each and each * ranks.world())


def is_shared_out(part: Part) -> bool:
    """Whether the weights are shared out among processes (`launch.strategy: fsdp`)."""
    return part.launch.strategy == "fsdp" and ranks.world() > 1


def wrapped(
    accelerator: Accelerator, model: Model, part: Part, log: Log, *, first: Batch | None = None
) -> nn.Module:
    """The step of a model, wrapped for the processes of the run.

    Where weights are shared out, the model's parameters are other objects from then on.
    """
    if ranks.world() > 1:
        whole_batch.share(model)
    step = step_of(model, part, accelerator.device, log)
    if is_shared_out(part):
        # of accelerate's preparation only autocast: its own wrapping would take the optimizers too
        accelerator.prepare_model(step, device_placement=False, evaluation_mode=True)
        ranks.shard(step, blocks_of(model), accelerator.device)
        return step
    accelerator.ddp_handler = ddp(every_parameter=first is not None and trains_all(model, first))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch renames an option of DDP that accelerate sets
        return accelerator.prepare(step)


def trains_all(model: Model, first: Batch) -> bool:
    """Whether one phase trains all that can be trained, and each step gives all of it a gradient."""
    phases = model.phases()
    own = {id(p) for p in model.parameters() if p.requires_grad}
    one = len(phases) == 1 and own == {id(p) for p in phases[0].parameters()}
    return one and compiled.reaches_all(model, first, phases[0].name)


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """The repeated blocks of a net, outermost: what stands in lists of modules and has parameters."""
    for child in model.children():
        if isinstance(child, nn.ModuleList) and len(child) > 1:
            yield from (block for block in child if any(True for _ in block.parameters()))
        else:
            yield from blocks_of(child)


def twin(model: Model) -> Model:
    """A copy of a model. Frozen modules that share nothing with what is trained belong to both."""
    own = set(map(id, model.modules()))
    attached = vars(model).get("attached", {}).values()
    shared = {id(m): m for m in attached if own.isdisjoint(map(id, m.modules()))}
    return copy.deepcopy(model, shared).requires_grad_(False)
