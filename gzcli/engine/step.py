"""The training step: a model's loss, in one process or in several, compiled if that gains.

A compiled step is one graph per phase, because its random numbers are drawn beforehand. To find the draws of
a loss, a copy of the model runs on tensors without values (torch's FakeTensorMode), which takes no memory. A
loss whose draws or branches depend on values fails in that run and stays eager.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from gzcli.core import devices, ranks
from gzcli.core.errors import first_line
from gzcli.core.sections import Part
from gzcli.core.types import Batch, Noise
from gzcli.engine.log import Log
from gzcli.models.base import Model, named_losses
from gzcli.models.nn import shared_batch_norm
from gzcli.store import rates

if TYPE_CHECKING:
    from accelerate import Accelerator

MIN_COMPILED_STEPS = (
    2_000  # steps of a run that gains from `torch.compile`: a U-Net takes about a minute to compile
)
LONG_MINUTES = 10.0  # the same for a run whose length is given in minutes
MAX_SMALL_PARAMETERS = 200e6  # parameters up to which a step may be bound by the launches of its kernels
FOR_EVER = 1 << 40  # number of steps after which all annealing has ended
BACKEND = "inductor"
Draw = tuple[str, tuple[int, ...], int | None]  # method, shape and bound of `Noise._draw`


def prepare_torch(part: Part) -> None:
    """Sets the number of threads that the recipe records, so that a resume is reproducible. Selects
    deterministic kernels or TF32."""
    if part.launch.threads:
        torch.set_num_threads(part.launch.threads)
    if part.train.deterministic:
        devices.deterministic_kernels()
    else:
        devices.fast_kernels()


def precision(part: Part) -> str:
    """The precision of a training: fp32, bf16 or fp16. Raises UsageError for fp16 without a GPU."""
    return rates.chosen_precision(part.train.precision, devices.training_kind(part.launch))


def accelerate(part: Part) -> Accelerator:
    """The Accelerator of a recipe. Its state is reset first, because a stage may have another precision than
    the previous one."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs

    AcceleratorState._reset_state()
    ranks.rejoin(devices.training_kind(part.launch))
    patience = InitProcessGroupKwargs(timeout=timedelta(minutes=part.launch.timeout))
    mixed = precision(part).replace("fp32", "no")  # accelerate's name
    return Accelerator(mixed_precision=mixed, cpu=part.launch.cpu, kwargs_handlers=[patience])


class Step(nn.Module):
    """The module that DDP and FSDP wrap. Every loss therefore goes through their `forward`."""

    def __init__(self, model: Model, graphs: Compiled | None = None):
        super().__init__()
        self.model, self.compiled = model, graphs

    def forward(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        if self.compiled is None:
            return named_losses(self.model, batch, phase)
        return self.compiled(batch, phase)


def wrap_step(accelerator: Accelerator, model: Model, part: Part, log: Log, first: Batch | None) -> nn.Module:
    """The step of a model, compiled if `train.compile` asks for it, and wrapped for the run's processes. FSDP
    replaces the parameters of the model by other objects."""
    graphs, device = None, accelerator.device
    if ranks.world() > 1:
        shared_batch_norm.share_batch_norm(model)
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
    complete = first is not None and ranks.agree(ranks.rank() == 0 and trains_all(model, first))
    accelerator.ddp_handler = DistributedDataParallelKwargs(
        find_unused_parameters=not complete, gradient_as_bucket_view=True, broadcast_buffers=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch renames an option of DDP that accelerate sets
        return accelerator.prepare(step)


def is_shared_out(part: Part) -> bool:
    """Whether the weights are sharded over processes (`launch.strategy: fsdp`)."""
    return part.launch.strategy == "fsdp" and ranks.world() > 1


def trains_all(model: Model, first: Batch) -> bool:
    """Whether a single phase trains all trainable parameters, and each of them gets a gradient in every step.
    False if that depends on values or on the step."""
    phases = model.phases()
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    if len(phases) > 1 or trainable != {id(p) for p in phases[0].parameters()}:
        return False
    if numbers(model) != numbers_after(model, FOR_EVER):
        return False
    blank, batch, mode = without_values(model, first)
    try:
        with mode, ranks.alone():
            reached = reached_parameters(named_losses(blank, batch, phases[0].name)["loss"])
    except Exception:  # whatever a model does with tensors that have no values
        return False
    return all(id(p) in reached for p in blank.parameters() if p.requires_grad)


def reached_parameters(loss: Tensor) -> set[int]:
    """The ids of the parameters that a backward pass from a loss reaches, found as DDP finds them."""
    seen: set[Any] = set()
    following: list[Any] = [loss.grad_fn]
    while following:
        seen.add(node := following.pop())
        following += [node for node, _ in node.next_functions if node is not None and node not in seen]
    return {id(node.variable) for node in seen if hasattr(node, "variable")}


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost repeated blocks of a net, which are the elements of module lists with parameters."""
    for child in model.children():
        if isinstance(child, nn.ModuleList) and len(child) > 1:
            yield from (block for block in child if any(True for _ in block.parameters()))
        else:
            yield from blocks_of(child)


def twin(model: Model) -> Model:
    """A copy of a model that shares the attached frozen modules."""
    trained = set(map(id, model.modules()))
    attached = vars(model).get("attached", {}).values()
    shared_modules = {id(m): m for m in attached if trained.isdisjoint(map(id, m.modules()))}
    return copy.deepcopy(model, shared_modules).requires_grad_(False)


# ---------------------------------------------------------------------------- compiled steps


def compiles(part: Part, model: Model, device: torch.device) -> bool:
    """Whether the steps of a run are compiled, by `train.compile`. `auto` compiles models of one phase on a
    GPU, in runs that are long enough to amortise it."""
    if part.train.compile != "auto":
        return part.train.compile
    minutes = part.train.minutes
    long = minutes >= LONG_MINUTES if minutes else part.train.steps >= MIN_COMPILED_STEPS
    is_single_phase = part.launch.strategy == "ddp" and len(model.phases()) == 1
    return devices.device_kind(device).compiled and long and is_single_phase and not part.train.deterministic


def mode_of(part: Part, model: Model, device: torch.device) -> str | None:
    """The mode of `torch.compile`. CUDA graphs launch all kernels of a small net at once; they own the memory
    of the gradients, which therefore cannot be added up over micro-batches."""
    small = sum(p.numel() for p in model.parameters()) <= MAX_SMALL_PARAMETERS
    graphs = devices.device_kind(device).compiled and small and part.train.accumulate == 1
    return "reduce-overhead" if graphs else None


class GivenNoise(Noise):
    """Noise that returns draws from a list."""

    def __init__(self, draws: Sequence[Tensor], total: int, start: Tensor):
        # `start` as a number would be a constant of the graph, and each micro-batch would have its own graph
        self.draws, self.total, self.start, self.device = draws, total, start, start.device
        self.at = 0

    def _draw(self, method: str, shape: tuple[int, ...], high: int | None = None) -> Tensor:
        self.at += 1
        return self.draws[self.at - 1]


class Compiled:
    """The losses of a model, compiled if possible. Whenever `on_step` changed a number of the model, it would
    be recompiled, so it stays eager until these numbers are final."""

    def __init__(
        self, model: Model, steps: int, log: Log, *, loud: bool, backend: Any = None, mode: str | None = None
    ):
        torch.compiler.reset()  # graphs of an earlier stage, or of the trial of `--minutes`
        self.model, self.say = model, log.warn if loud else log.record
        self.graph = torch.compile(losses, dynamic=False, backend=backend or BACKEND, mode=mode)
        self.final = numbers_after(model, steps)
        self.draws: dict[Any, list[Draw] | None] = {}  # of each phase and shape of batch; None: eager
        self.tried: set[Any] = set()  # keys whose graph has run

    def __call__(self, batch: Batch, phase: str) -> dict[str, Tensor]:
        """The losses of a phase by name."""
        if numbers(self.model) != self.final:
            return named_losses(self.model, batch, phase)
        tensors = {key: value for key, value in batch.extra.items() if isinstance(value, Tensor)}
        shapes = tuple((key, value.shape) for key, value in tensors.items())
        key = phase, batch.x.shape, shapes, self.model.training, torch.is_grad_enabled()
        if key not in self.draws:
            try:
                self.draws[key] = draws_of(self.model, replace(batch, extra=tensors), phase)
            except Exception as e:  # whatever a model does with tensors that have no values
                self.leave_eager(key, e)
        if (draws := self.draws[key]) is None:
            return named_losses(self.model, batch, phase)
        noise: Any = batch.noise
        fresh = copy.copy(noise)
        start = torch.full((), noise.start, dtype=torch.int64, device=batch.x.device)
        inputs = {"x": batch.x, "y": batch.y, "index": batch.index, "start": start, "extra": tensors}
        try:
            drawn = [noise._draw(*draw) for draw in draws]
            values = self.graph(self.model, phase, inputs, drawn, noise.total)
        # errors of what torch cannot compile: no compiler, a gradient of a gradient
        except RuntimeError as e:
            if key in self.tried:
                raise
            self.leave_eager(key, e)
            return named_losses(self.model, replace(batch, noise=fresh), phase)
        self.tried.add(key)
        # the next run of a CUDA graph overwrites what this one has returned
        return {name: value.clone() for name, value in values.items()}

    def leave_eager(self, key: tuple[Any, ...], e: Exception) -> None:
        self.draws[key] = None
        self.say(f"phase `{key[0]}` is not compiled: {first_line(e)}")


def losses(
    model: Model, phase: str, batch: dict[str, Any], draws: list[Tensor], total: int
) -> dict[str, Tensor]:
    """The function that is compiled. It returns the losses of a phase by name; all random numbers are
    arguments."""
    noise = GivenNoise(draws, total, batch["start"])
    return named_losses(model, Batch(batch["x"], batch["y"], batch["index"], noise, batch["extra"]), phase)


def draws_of(model: Model, batch: Batch, phase: str) -> list[Draw]:
    """The draws of a loss, found without values. Raises what the loss raises if it needs values."""
    blank, part, mode = without_values(model, batch)
    with mode, ranks.alone():
        named_losses(blank, part, phase)
    assert isinstance(part.noise, RecordedNoise)
    return part.noise.draws


def numbers(model: Model) -> dict[str, float]:
    """The plain numbers among a model's attributes, which are constants of a graph."""
    return {k: v for k, v in vars(model).items() if isinstance(v, int | float) and k != "training"}


def numbers_after(model: Model, steps: int) -> dict[str, float]:
    """`numbers` of a model after the last step. The model is not changed."""
    if type(model).on_step is Model.on_step:
        return numbers(model)
    later, buffers = copy.copy(model), [b.clone() for b in model.buffers()]
    later.on_step(steps - 1)
    with torch.no_grad():
        for b, before in zip(model.buffers(), buffers, strict=True):
            b.copy_(before)
    return numbers(later)


# ---------------------------------------------------------------------------- tensors without values


class Arrays(TorchFunctionMode):
    """Within the block, `Tensor.numpy` of a tensor without values returns an array filled with 0.5."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.numpy, Tensor.__array__) and isinstance(args[0], FakeTensor):
            return np.full(tuple(args[0].shape), 0.5).astype(str(args[0].dtype).removeprefix("torch."))
        return func(*args, **(kwargs or {}))


class RecordedNoise(Noise):
    """Noise that records its draws, which are zero or have no values."""

    def __init__(self, total: int, start: Tensor):
        self.total, self.start, self.device = total, start, start.device
        self.draws: list[Draw] = []

    def _draw(self, method: str, shape: tuple[int, ...], high: int | None = None) -> Tensor:
        self.draws.append((method, tuple(int(n) for n in shape), high))
        dtype = torch.int64 if method == "random_" else torch.get_default_dtype()
        return torch.zeros(shape, dtype=dtype, device=self.device)


@contextmanager
def shapes_only(mode: FakeTensorMode | None = None) -> Iterator[None]:
    """Within the block, new tensors have shapes but no values."""
    rng = torch.get_rng_state()
    try:
        with warnings.catch_warnings(), mode or FakeTensorMode(allow_non_fake_inputs=True), Arrays():
            warnings.simplefilter("ignore")  # copying a module reads the addresses of its tensors
            yield
    finally:
        torch.set_rng_state(rng)


def without_values(model: Model, batch: Batch) -> tuple[Model, Batch, FakeTensorMode]:
    """Copies of a model and of a batch whose tensors have no values, and the mode in which they are used."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    modules = [model, *vars(model).get("attached", {}).values()]
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    blank = copy.deepcopy(model, {id(t): mode.from_tensor(t) for t in tensors})
    noise: Any = batch.noise
    start = torch.full((), noise.start, dtype=torch.int64, device=batch.x.device)
    parts = (batch.x, batch.y, batch.index, start, batch.extra)
    x, y, index, start, extra = tree_map_only(Tensor, mode.from_tensor, parts)
    return blank, Batch(x, y, index, RecordedNoise(noise.total, start), extra), mode
