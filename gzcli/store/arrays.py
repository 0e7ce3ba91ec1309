"""The one reader of the files of arrays that gz made: weights in safetensors, arrays of numpy.

A file that is cut short, is another tool's or holds something else is damaged, whatever its library says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from gzcli.core.errors import DamagedError, GzError, MissingError, first_line

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

T = TypeVar("T")
AGAIN = "remove it: it is made again"


@contextmanager
def reading(path: Path, hint: str | None = AGAIN) -> Iterator[None]:
    """Raises DamagedError for whatever goes wrong in the block, which reads a file and tests its content."""
    try:
        yield
    except FileNotFoundError as e:
        raise MissingError(f"there is no `{path}`") from e
    except GzError:
        raise
    except Exception as e:  # of zip, pickle, numpy, safetensors and torch, each with errors of its own
        raise DamagedError(f"`{path}` is damaged, or not by gz: {first_line(e)}", hint=hint) from e


def tensors(path: Path, hint: str | None = AGAIN) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file and its metadata. Raises DamagedError, also for one with NaN."""
    from safetensors import safe_open

    with reading(path, hint), safe_open(path, "pt") as f:
        found = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
        for name, value in found.items():
            if value.is_floating_point() and value.isnan().any():
                raise ValueError(f"`{name}` holds NaN")
        return found, dict(f.metadata() or {})


def array(path: Path, hint: str | None = AGAIN) -> np.ndarray:
    """The array of a `.npy` file. Raises DamagedError."""
    import numpy as np

    with reading(path, hint):
        found = np.load(path, allow_pickle=False)
        if not isinstance(found, np.ndarray):
            raise ValueError("it is no array")
        return found


def arrays(path: Path, *names: str, hint: str | None = AGAIN) -> dict[str, np.ndarray]:
    """The arrays of a `.npz` file by their names. Raises DamagedError, also where one of `names` is not
    there."""
    import numpy as np

    with reading(path, hint):
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            raise ValueError("it is one array")
        with found:
            held = {name: found[name] for name in found.files}
        if lacking := [name for name in names if name not in held]:
            raise ValueError(f"it has no `{lacking[0]}`")
        return held


def cached(path: Path, read: Callable[[Path], T], say: Callable[[str], None]) -> T | None:
    """What `read` makes of a file of the cache; None where there is none. A damaged one is removed with a
    line, so that it is made again."""
    if not path.exists():
        return None
    try:
        return read(path)
    except DamagedError as e:
        say(f"{e.message}; it is made again")
        path.unlink(missing_ok=True)
        return None
