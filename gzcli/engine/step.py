"""The module that trains in one process or in several: its forward is a model's loss. Accelerate, threads and
kernels are set up as the recipe has them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gzcli.core import devices, ranks
from gzcli.core.sections import Part
from gzcli.core.types import Batch
from gzcli.engine.compiled import Compiled, reaches_all
from gzcli.engine.log import Log
from gzcli.models.base import Model, named_losses
from gzcli.models.nn import whole_batch

if TYPE_CHECKING:
    from accelerate import Accelerator

LONG = 2_000  # steps of a run that gains from `torch.compile`: a U-Net takes about a minute to compile
LONG_MINUTES = 10.0  # the same of a run whose length is given in minutes
SMALL = 200e6  # parameters up to which a step may be bound by the launches of its kernels


def prepare_torch(part: Part) -> None:
    """Sets threads as the recipe records them, so that a resume repeats it; deterministic kernels or TF32."""
    if part.launch.threads:
        torch.set_num_threads(part.launch.threads)
    if part.train.deterministic:
        devices.deterministic_kernels()
    else:
        devices.fast_kernels()


def precision(part: Part) -> str:
    """The precision of a training: fp32, bf16 or fp16. Raises UsageError for fp16 without a GPU."""
    return devices.chosen_precision(part.train.precision, devices.training_kind(part.launch))


def accelerate(part: Part) -> Accelerator:
    """The Accelerator of a recipe. Its state is reset first, as a later stage may have another precision than
    the one before."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs

    AcceleratorState._reset_state()
    ranks.rejoin(devices.training_kind(part.launch))
    patience = InitProcessGroupKwargs(timeout=timedelta(minutes=part.launch.timeout))
    mixed = precision(part).replace("fp32", "no")  # accelerate's name
    return Accelerator(mixed_precision=mixed, cpu=part.launch.cpu, kwargs_handlers=[patience])


def compiles(part: Part, model: Model, device: torch.device) -> bool:
    """Whether the steps of a run are compiled: as `train.compile` says; `auto` means on a GPU, in a run that
    is long enough to earn the time of compiling, of a model of one phase."""
    if part.train.compile != "auto":
        return part.train.compile
    minutes = part.train.minutes
    long = minutes >= LONG_MINUTES if minutes else part.train.steps >= LONG
    one = part.launch.strategy == "ddp" and len(model.phases()) == 1
    return devices.kind_of(device).compiled and long and one and not part.train.deterministic


def mode_of(part: Part, model: Model, device: torch.device) -> str | None:
    """The mode of `torch.compile`. CUDA graphs launch all kernels of a small net at once; they own the memory
    of the gradients, which therefore cannot be added up over micro-batches."""
    small = sum(p.numel() for p in model.parameters()) <= SMALL
    return (
        "reduce-overhead"
        if devices.kind_of(device).compiled and small and part.train.accumulate == 1
        else None
    )


class Step(nn.Module):
    """What DDP and FSDP wrap, so that they see every forward."""

    def __init__(self, model: Model, graphs: Compiled | None = None):
        super().__init__()
        self.model, self.compiled = model, graphs

    def forward(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        if self.compiled is None:
            return named_losses(self.model, batch, phase)
        return self.compiled(batch, phase)


def wrapped(
    accelerator: Accelerator, model: Model, part: Part, log: Log, *, first: Batch | None = None
) -> nn.Module:
    """The step of a model, compiled where the recipe asks for it or it is known to gain, and wrapped for the
    processes of the run. Where weights are shared out, the model's parameters are other objects from then
    on."""
    graphs, device = None, accelerator.device
    if ranks.world() > 1:
        whole_batch.share(model)
    if compiles(part, model, device):
        loud, mode = part.train.compile is True, mode_of(part, model, device)
        graphs = Compiled(model, part.train.steps, log, loud=loud, mode=mode)
    step = Step(model, graphs)
    if is_shared_out(part):
        # of accelerate's preparation only autocast: its own wrapping would take the optimizers too
        accelerator.prepare_model(step, device_placement=False, evaluation_mode=True)
        ranks.shard(step, blocks_of(model), device)
        return step
    from accelerate.utils import DistributedDataParallelKwargs

    # Gradients are views of the buckets in which DDP sums them, which saves a copy. The models keep buffers
    # equal on all ranks. Where not every step gives every parameter a gradient, DDP looks for those that have
    # none. The graph is not declared static: it is another one in the last micro-batch, and where a phase is
    # not due.
    complete = first is not None and trains_all(model, first)
    accelerator.ddp_handler = DistributedDataParallelKwargs(
        find_unused_parameters=not complete, gradient_as_bucket_view=True, broadcast_buffers=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch renames an option of DDP that accelerate sets
        return accelerator.prepare(step)


def is_shared_out(part: Part) -> bool:
    """Whether the weights are shared out among processes (`launch.strategy: fsdp`)."""
    return part.launch.strategy == "fsdp" and ranks.world() > 1


def trains_all(model: Model, first: Batch) -> bool:
    """Whether one phase trains all that can be trained, and each step gives all of it a gradient."""
    phases = model.phases()
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    one = len(phases) == 1 and trainable == {id(p) for p in phases[0].parameters()}
    return one and reaches_all(model, first, phases[0].name)


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """The repeated blocks of a net, outermost: what stands in lists of modules and has parameters."""
    for child in model.children():
        if isinstance(child, nn.ModuleList) and len(child) > 1:
            yield from (block for block in child if any(True for _ in block.parameters()))
        else:
            yield from blocks_of(child)


def twin(model: Model) -> Model:
    """A copy of a model. Frozen modules that share nothing with what is trained belong to both."""
    trained = set(map(id, model.modules()))
    attached = vars(model).get("attached", {}).values()
    shared = {id(m): m for m in attached if trained.isdisjoint(map(id, m.modules()))}
    return copy.deepcopy(model, shared).requires_grad_(False)
