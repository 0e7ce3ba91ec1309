"""Weights that gz did not train: files in the cache's `weights` folder or elsewhere, and repositories of the
Hugging Face hub.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gzcli.core.errors import MissingError
from gzcli.store.paths import cache_dir

# torch-fidelity's port of the TensorFlow network of 2015-12-05
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
LONGEST_HEADER = 100_000_000  # bytes, as the library has it
HUB_SCHEME = "hf://datasets/"  # before the id of a data set of the hub
VGG = "vgg16-397923af.pth"  # torchvision's
DINOV2 = "dinov2_vitl14_pretrain.pth"  # its authors'
CLIP = "clip-vit-base-patch32.bin"  # OpenAI's, as `pytorch_model.bin` of their repository on the hub


def weights(name: str, *, path: str | Path | None = None, use: str, source: str, otherwise: str = "") -> Path:
    """The path of a file of weights.

    name: name of the file in the cache.
    path: path of the user's own file; None: the file of the cache.
    use: what needs the weights, for the message.
    source: who publishes them, for the message.
    otherwise: what else a user may do, for the hint.

    Raises MissingError that says where to get the file and where to put it.
    """
    place = cache_dir("weights", name)
    file = Path(path).expanduser() if path else place
    if not file.is_file():
        raise MissingError(
            f"{use} need the weights `{name}`, and `{file}` is not there",
            hint=f"put that file of {source} at `{place}`{otherwise}",
        )
    return file


def repository(name: str, *, key: str, files: Sequence[str]) -> Path:
    """The folder of a model repository, fetched from the hub unless it is there or `GZ_OFFLINE` is set.

    A token is taken from `HF_TOKEN`.

    name: a folder, or an id of the hub.
    key: the recipe's key that names it, for the message.
    files: patterns of the files that are fetched.

    Raises MissingError that says what to fetch and how.
    """
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    gated = "(a gated one needs `HF_TOKEN`)"
    hint = f"`hf download {name}` where there is a network {gated}, or `--set {key}=FOLDER`"
    if not is_id(name):
        raise MissingError(
            f"`{key}`: there is no folder `{name}`", hint="a folder, or an id of the hub, as `owner/name`"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(files), local_files_only=offline()))
    except HFValidationError as e:
        raise MissingError(
            f"`{key}`: `{name}` is no folder and no id of the hub", hint="an id is like `owner/name`"
        ) from e
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        why = "and `GZ_OFFLINE` is set" if offline() else f"and the hub does not give it ({type(e).__name__})"
        raise MissingError(f"`{key}`: the weights of `{name}` are not at hand, {why}", hint=hint) from e


def data_repository(name: str) -> Path:
    """The folder of the parquet files of a data set of the hub, fetched unless they are there or `GZ_OFFLINE`
    is set. A token is taken from `HF_TOKEN`.

    name: its id, `owner/name`.

    Raises MissingError that says how to get it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            name, repo_type="dataset", allow_patterns=["*.parquet"], local_files_only=offline()
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as e:
        why = "and `GZ_OFFLINE` is set" if offline() else f"and the hub does not give it ({type(e).__name__})"
        raise MissingError(
            f"the data set `{name}` of the hub is not at hand, {why}",
            hint="agree to its terms on its page, then set `HF_TOKEN` to a token of yours",
        ) from e
    return Path(found)


def is_id(name: str) -> bool:
    """Whether a name has the form of a hub id, `owner/name`, and not of a path."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def at_hand(name: str) -> bool:
    """Whether a model repository is a folder or lies in the hub's cache, without the hub's library."""
    cache = Path(os.environ.get("HF_HUB_CACHE") or hub_home() / "hub").expanduser()
    return Path(name).expanduser().is_dir() or any(
        cache.glob(f"models--{name.replace('/', '--')}/snapshots/*")
    )


def hub_home() -> Path:
    """The folder of Hugging Face's libraries: HF_HOME, else below XDG_CACHE_HOME, else below ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or f"{cache}/huggingface").expanduser()


def offline() -> bool:
    """Whether the user forbids the network."""
    return os.environ.get("GZ_OFFLINE", "") not in ("", "0")


def safetensors_header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file: dtype and shape of each tensor by its name, and `__metadata__`.

    Such a file begins with the length of its header, in 8 bytes, and the header, in JSON. Raises ValueError
    for any other file, and for one whose tensors do not follow each other from the header to the file's end:
    of tensors that share bytes a small file could hold any number.
    """
    size = file.stat().st_size - 8
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if not 0 < length <= min(size, LONGEST_HEADER):
            raise ValueError("its header is cut off, or longer than any")
        try:
            head = json.loads(f.read(length))
        except RecursionError as e:
            raise ValueError("its header is nested too deeply") from e
    try:
        spans = sorted(spec["data_offsets"] for name, spec in head.items() if name != "__metadata__")
        whole = all(isinstance(at, int) for first, last in spans for at in (first, last))
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise ValueError("its header does not say where the tensors are") from e
    at = 0
    for first, last in spans:
        if not whole or first != at or last < first:
            raise ValueError("its tensors overlap, or leave bytes between them")
        at = last
    if at != size - length:
        raise ValueError("its tensors do not end where the file ends")
    return head
