"""The processes of a run or a verb, each a rank. This file alone touches `torch.distributed`.

All ranks must call these functions in the same order, or they wait for each other for ever. In a run of one
process every function returns what it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from gzcli.errors import GzError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


def rank() -> int:
    """The number of this process, 0 … world() − 1."""
    return torch.distributed.get_rank() if _several() else 0


def world() -> int:
    """How many processes there are."""
    return torch.distributed.get_world_size() if _several() else 1


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
    """Rank 0's value on every rank, for values that may differ: a clock's, or whether a file exists."""
    return everyone(value)[0]


def gather(rows: np.ndarray) -> np.ndarray:
    """The rows of all ranks [n, …] in the order of the ranks, on every rank."""
    return joined(everyone(rows))


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Parts [n, …] as one; an empty one may be of another shape."""
    return np.concatenate([part for part in parts if len(part)] or parts[:1])


class Sliceable(Protocol[T_co]):
    """What has a length, is iterated over and has slices, as a list does."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[T_co]: ...

    def __getitem__(self, which: slice, /) -> Iterable[T_co]: ...


def over(batches: Sliceable[T], work: Callable[[T], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The results of `work` for all batches, arrays [N, …] by name, on every rank; each rank does a share.

    batches: all batches; each rank iterates over a slice.
    work: (batch of n images) → arrays [n, …] by name.

    Raises on every rank the error of the first rank that has one, so that no rank waits for one that ended.
    """
    start, end = (len(batches) * r // world() for r in (rank(), rank() + 1))
    made, problem = [], None
    try:
        made = [work(batch) for batch in batches[start:end]]
    except GzError as e:
        problem = e
    found = everyone((made, problem))
    if first := next((e for _, e in found if e is not None), None):
        raise first
    parts = [part for made, _ in found for part in made]
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
    """How many ranks have the statistics of `module` in common: all while it trains, on equal batches.

    In eval mode it is one rank: there the ranks have unequal shares of the images, and a rank that waited for
    a batch of another would hang.
    """
    return world() if module.training else 1


def mean(t: Tensor, module: nn.Module) -> Tensor:
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


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
