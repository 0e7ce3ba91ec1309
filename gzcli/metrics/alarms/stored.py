"""A cache of alarms, and of other fits that consist of dataclasses and arrays. The key is a hash of the
images, the settings and the code."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from gzcli.core.types import Say
from gzcli.store import cache_files, files
from gzcli.store.code import JUDGING, code_hash
from gzcli.store.paths import cache_dir

TREE = "tree"  # name of the array that contains all but arrays, as JSON
SEAL = "seal"  # name of the array with the checksum
# bytes; larger alarms are fitted again. 5 folds of 300 components at 128 px have 295 MB
MAX_STORED_BYTES = 400_000_000
ALARMS_PACKAGE = "gzcli.metrics.alarms."
T = TypeVar("T")


def stored(key: Mapping[str, Any], make: Callable[[], T], say: Say, folder: str = "alarms") -> T:
    """The fit of this key from the cache; otherwise a new one, which is stored. Processes that fit the same
    at once each write a complete file."""
    text = json.dumps({"code": code_hash(*JUDGING), **key}, sort_keys=True, default=str)
    path = cache_dir(folder, f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.npz")
    fit: T | None = cache_files.read(path, read, say)
    if fit is None:
        cache_files.write(path, write, fit := make(), say)
    return fit


def seal(path: Path, tree: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """The checksum of a file's name, which is its key, and of its content."""
    digest = hashlib.sha256(f"{path.name} {tree}".encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return np.array(digest.hexdigest())


def write(path: Path, fit: Any) -> None:
    arrays: dict[str, np.ndarray] = {}
    names: dict[int, str] = {}  # keyed by identity, because several parts of a fit share arrays

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray | torch.Tensor):
            name = names.setdefault(id(value), f"a{len(names)}")
            arrays[name] = np.asarray(value)
            return {"tensor" if isinstance(value, torch.Tensor) else "array": name}
        if is_dataclass(value):
            kind = f"{type(value).__module__.removeprefix(ALARMS_PACKAGE)}.{type(value).__name__}"
            return {"kind": kind, **{f.name: plain(getattr(value, f.name)) for f in fields(value)}}
        if isinstance(value, tuple | nn.ModuleList):
            return {"tuple": [plain(each) for each in value]}
        if isinstance(value, Mapping):
            return {"map": [[key, plain(each)] for key, each in value.items()]}
        return value.item() if isinstance(value, np.generic) else value

    tree = json.dumps(plain(fit))
    if sum(array.nbytes for array in arrays.values()) <= MAX_STORED_BYTES:
        buffer, marks = io.BytesIO(), {TREE: np.array(tree), SEAL: seal(path, tree, arrays)}
        np.savez(buffer, **dict[str, Any]({**marks, **arrays}))
        files.write_atomic(path, buffer.getvalue())


def read(path: Path) -> Any:
    """The fit in a file. Raises an error unless `write` stored it under this name."""
    arrays = files.read_arrays(path, TREE, SEAL)
    tree, sealed = str(arrays.pop(TREE)), str(arrays.pop(SEAL))
    if sealed != str(seal(path, tree, arrays)):
        raise ValueError("its checksum differs")

    # parts of a fit share tensors
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}

    def whole(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if "array" in value:
            return arrays[value["array"]]
        if "tensor" in value:
            return tensors[value["tensor"]]
        if "tuple" in value:
            return tuple(map(whole, value["tuple"]))
        if "map" in value:
            return {key: whole(each) for key, each in value["map"]}
        module, _, name = value["kind"].rpartition(".")
        kind = getattr(import_module(ALARMS_PACKAGE + module), name)
        return kind(**{key: whole(each) for key, each in value.items() if key != "kind"})

    return whole(json.loads(tree))
