"""A cache of alarms, and of other fits that consist of dataclasses and arrays. The key is a hash of the
images, the settings and the code of this folder."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from gzcli.core.types import Say
from gzcli.store import files
from gzcli.store.paths import cache_dir

TREE = "tree"  # name of the array that contains all but arrays, as JSON
# bytes; larger alarms are fitted again. 5 folds of 300 components at 128 px have 295 MB
LARGEST = 400_000_000
ROOM = "gzcli.metrics.alarms."
T = TypeVar("T")


def stored(key: Mapping[str, Any], make: Callable[[], T], say: Say, folder: str = "alarms") -> T:
    """The fit of this key from the cache; otherwise a new one, which is stored. Processes that fit the same
    at once each write a complete file."""
    text = json.dumps({"code": code(), **key}, sort_keys=True, default=str)
    path = cache_dir(folder, f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.npz")
    fit: T | None = files.read_cached(path, read, say)
    if fit is None:
        fit = make()
        write(path, fit)
    return fit


@cache
def code(hash_of: Callable[[Path], str] = files.syntax, root: Path = Path(__file__).parent) -> str:
    """The hash of the code in a folder, by default the folder of the alarms."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(hash_of(path).encode())
    return digest.hexdigest()[:16]


def write(path: Path, fit: Any) -> None:
    arrays: dict[str, np.ndarray] = {}
    names: dict[int, str] = {}  # keyed by identity, because several parts of a fit share arrays

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            name = names.setdefault(id(value), f"a{len(names)}")
            arrays[name] = value
            return {"array": name}
        if is_dataclass(value):
            kind = f"{type(value).__module__.removeprefix(ROOM)}.{type(value).__name__}"
            return {"kind": kind, **{f.name: plain(getattr(value, f.name)) for f in fields(value)}}
        if isinstance(value, tuple):
            return {"tuple": [plain(each) for each in value]}
        if isinstance(value, Mapping):
            return {"map": [[key, plain(each)] for key, each in value.items()]}
        return value.item() if isinstance(value, np.generic) else value

    tree = json.dumps(plain(fit))
    if sum(array.nbytes for array in arrays.values()) <= LARGEST:
        buffer = io.BytesIO()
        np.savez(buffer, **dict[str, Any]({TREE: np.array(tree), **arrays}))
        files.write_atomic(path, buffer.getvalue())


def read(path: Path) -> Any:
    arrays = files.read_arrays(path, TREE)

    def whole(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if "array" in value:
            return arrays[value["array"]]
        if "tuple" in value:
            return tuple(map(whole, value["tuple"]))
        if "map" in value:
            return {key: whole(each) for key, each in value["map"]}
        module, _, name = value["kind"].rpartition(".")
        kind = getattr(import_module(ROOM + module), name)
        return kind(**{key: whole(each) for key, each in value.items() if key != "kind"})

    return whole(json.loads(str(arrays[TREE])))
