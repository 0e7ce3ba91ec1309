"""The processes (ranks) of a run or a verb. Only this file uses `torch.distributed`. All ranks must call
these functions in the same order, otherwise they wait for each other forever. In a run of one process every
function returns its argument.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from gzcli.core import devices
from gzcli.core.errors import GzError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


def rank() -> int:
    """The number of this process, 0 … world() − 1."""
    return torch.distributed.get_rank() if _several() else 0


def world() -> int:
    """How many processes there are."""
    return torch.distributed.get_world_size() if _several() else 1


def rejoin(device: str) -> None:
    """Forms the process group again after torch's launcher has restarted the processes; accelerate forms the
    first one. The launcher's store survives a restart and contains the addresses of the dead processes, so
    each restart uses new names in it."""
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if not again or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or _several():
        return
    index, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = torch.distributed.TCPStore(host, port, count, is_master=False)
    devices.use_of_rank(device)
    backend = devices.device_kind(device).backend
    names = torch.distributed.PrefixStore(f"restart {again}", store)
    torch.distributed.init_process_group(backend, store=names, rank=index, world_size=count)


def wait() -> None:
    """Waits until every rank is here."""
    if _several():
        torch.distributed.barrier()


def everyone(value: T) -> list[T]:
    """The values of all ranks, in their order, on every rank."""
    parts = [value] * world()
    if len(parts) > 1:
        torch.distributed.all_gather_object(parts, value)
    return parts


def agree(value: T) -> T:
    """Rank 0's value on every rank. It is for values that may differ between ranks, such as the time or
    whether a file exists."""
    return everyone(value)[0]


def gather(rows: np.ndarray) -> np.ndarray:
    """The rows of all ranks [n, …] in the order of the ranks, on every rank."""
    return joined(everyone(rows))


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Parts [n, …] concatenated; an empty part may have another shape."""
    return np.concatenate([part for part in parts if len(part)] or parts[:1])


class Sliceable(Protocol[T_co]):
    """A type with a length, iteration and slices, such as a list."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[T_co]: ...

    def __getitem__(self, which: slice, /) -> Iterable[T_co]: ...


def over(batches: Sliceable[T], work: Callable[[T], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The results of `work` for all batches on every rank, as arrays [N, …] by name. Each rank computes a
    share of the batches. If a rank fails, every rank raises its error, so that none waits for a rank that has
    ended."""
    start, end = (len(batches) * r // world() for r in (rank(), rank() + 1))
    share, problem = [], None
    try:
        share = [work(batch) for batch in batches[start:end]]
    except GzError as e:
        problem = e
    results = everyone((share, problem))
    if first := next((e for _, e in results if e is not None), None):
        raise first
    parts = [part for share, _ in results for part in share]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def total(t: Tensor) -> Tensor:
    """The sum of `t` over the ranks, in place."""
    if _several():
        torch.distributed.all_reduce(t)
    return t


def maximum(t: Tensor) -> Tensor:
    """The elementwise maximum of `t` over the ranks, in place."""
    if _several():
        torch.distributed.all_reduce(t, torch.distributed.ReduceOp.MAX)
    return t


def sharing(module: nn.Module) -> int:
    """The number of ranks that share the statistics of `module`: all of them during training, on equal
    batches. In eval mode it is one: the ranks have different numbers of batches there, and would wait for
    each other."""
    return world() if module.training else 1


def mean_over_ranks(t: Tensor, module: nn.Module) -> Tensor:
    """The mean of a statistic of `module` over the ranks that share it, without gradient."""
    count = sharing(module)
    return t if count == 1 else total(t.detach().clone()) / count


def rows(t: Tensor, module: nn.Module) -> Tensor:
    """The rows of all ranks that share the statistics of `module`, in the order of the ranks."""
    count = sharing(module)
    if count == 1:
        return t
    t = t.detach().contiguous()
    parts = [torch.empty_like(t) for _ in range(count)]
    torch.distributed.all_gather(parts, t)
    return torch.cat(parts)


def own_rows(t: Tensor, module: nn.Module) -> Tensor:
    """This rank's rows of the output of `rows`, [N, …] → [N / sharing(module), …]."""
    count = sharing(module)
    return t if count == 1 else t.chunk(count)[rank()]


# ---------------------------------------------------------------------------- parameters in parts (FSDP2)


def shard(module: nn.Module, parts: Iterable[nn.Module], device: torch.device) -> None:
    """Shards the parameters of a module over the ranks (Zhao 2023, arXiv:2304.11277). A rank gathers whole
    parameters for a forward or backward pass, and receives its part of the mean gradient. Parameters become
    `DTensor`; those of each module in `parts` are gathered together."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world(),))
    for part in parts:
        fully_shard(part, mesh=mesh)
    fully_shard(module, mesh=mesh)


def is_sharded(value: Any) -> bool:
    """Whether a tensor is sharded."""
    return hasattr(value, "device_mesh")


def part_of(t: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, in the same memory; any other tensor unchanged."""
    parts: Any = t
    return parts.to_local() if is_sharded(t) else t


def part_like(t: Tensor, like: Any) -> Tensor:
    """A tensor that is whole on every rank, sharded like `like`."""
    if not is_sharded(like):
        return t
    from torch.distributed.tensor import distribute_tensor

    t = t.to(like.device, like.dtype)
    return distribute_tensor(t, like.device_mesh, like.placements, src_data_rank=None)


def put_together(part: Tensor, like: Any) -> Tensor:
    """The tensor made of every rank's part, sharded like `like`."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def whole(value: Any) -> Any:
    """The whole tensor of a sharded one, on every rank; any other value unchanged. Every rank must call
    it."""
    return value.full_tensor() if is_sharded(value) else value


def gathered(tree: Any) -> Any:
    """A tree of dicts and lists, with whole tensors on the CPU instead of sharded ones. Ranks other than 0,
    which write no files, get empty tensors. Every rank must call it."""

    def one(value: Any) -> Any:
        if not is_sharded(value):
            return value
        full = value.detach().full_tensor()
        return full.cpu() if rank() == 0 else full.new_empty(0)

    return torch.utils._pytree.tree_map(one, tree)


@contextmanager
def alone() -> Iterator[None]:
    """Within the block, this thread sees a world of one process. It is for values that a rank computes by
    itself."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


_alone = ContextVar("alone", default=False)


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized() and not _alone.get()


def unresponsive() -> dict[int, int]:
    """The ranks of this machine that were stopped, or that ended while others waited for them, with their
    process ids. They are looked up among the launcher's children."""
    import psutil

    lost: dict[int, int] = {}
    launcher = psutil.Process().parent()
    for process in launcher.children() if launcher else ():
        try:
            rank = process.environ().get("RANK")
            if rank is not None and process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
                lost[int(rank)] = process.pid
        except psutil.Error:  # it has ended, or belongs to another user
            continue
    return lost
