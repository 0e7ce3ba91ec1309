"""Threads, kernels, precision and accelerate, as a recipe has them."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from gzcli.core import devices, ranks
from gzcli.core.parts import Part

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs


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
    """The Accelerator of a recipe.

    accelerate's state is reset first, as a later stage may have another precision than the one before.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs

    AcceleratorState._reset_state()
    ranks.rejoin(devices.training_kind(part.launch))
    patience = InitProcessGroupKwargs(timeout=timedelta(minutes=part.launch.timeout))
    mixed = precision(part).replace("fp32", "no")  # accelerate's name
    return Accelerator(mixed_precision=mixed, cpu=part.launch.cpu, kwargs_handlers=[patience])


def ddp(*, every_parameter: bool) -> DistributedDataParallelKwargs:
    """How DDP sums gradients: in buckets that the gradients are views of, which saves a copy of them.

    Buffers are not broadcast at every forward: the models keep them equal on all ranks. The graph is not
    declared static: it is another one in the last of the micro-batches, and where a phase is not due.

    every_parameter: whether each step gives every parameter a gradient. If not, as where a phase leaves the
      parameters of others without, DDP looks at every step for those that have none.
    """
    from accelerate.utils import DistributedDataParallelKwargs

    return DistributedDataParallelKwargs(
        find_unused_parameters=not every_parameter, gradient_as_bucket_view=True, broadcast_buffers=False
    )
