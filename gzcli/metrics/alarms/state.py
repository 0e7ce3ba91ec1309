"""The parts of a fitted method: dataclasses that are modules of torch. Their tensors are buffers, so a method
can be moved to a device and exported as a graph."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import nn


class ModuleState(nn.Module):
    """A base class of dataclasses with `eq=False`. A field that is a tensor becomes a buffer, one that is a
    tuple of modules an `nn.ModuleList`."""

    def __new__(cls, *_: Any, **__: Any) -> ModuleState:
        self = super().__new__(cls)
        nn.Module.__init__(self)  # before the dataclass assigns its fields
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, tuple) and value and all(isinstance(each, nn.Module) for each in value):
            value = nn.ModuleList(value)
        if isinstance(value, torch.Tensor) and name not in self._buffers:
            self.register_buffer(name, value)
        else:
            super().__setattr__(name, value)

    @property
    def hash(self) -> str:
        """A hash of all fields."""
        digest = hashlib.sha256()
        _feed(digest, self)
        return digest.hexdigest()[:16]


def tensor(array: np.ndarray) -> torch.Tensor:
    """The array as a tensor, without a copy if it is contiguous and writable."""
    array = np.ascontiguousarray(array)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, ModuleState):
        for field in fields(value):  # type: ignore[arg-type]  # subclasses are dataclasses
            _feed(digest, getattr(value, field.name))
    elif isinstance(value, torch.Tensor):
        array = np.ascontiguousarray(value.cpu().numpy())
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    elif isinstance(value, tuple | list | nn.ModuleList):
        for each in value:
            _feed(digest, each)
    elif isinstance(value, Mapping):
        digest.update(repr(sorted(value.items())).encode())
    else:
        digest.update(repr(value).encode())
