"""PNG files that say what made them: a text chunk `gz` holds it as JSON, beside the chunk `Software`.

The bytes are a function of the picture and of what made it, without a time: equal commands write equal files.
No heavy import at the top.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gzcli.core.errors import MissingError, UsageError
from gzcli.store.leftovers import beside
from gzcli.version import __version__

if TYPE_CHECKING:
    import numpy as np

KEY = "gz"  # of the text chunk
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_maker: dict[str, Any] = {}  # what this process does; `made_by` sets it


def made_by(**facts: Any) -> None:
    """Says what made every picture that this process writes from now on, as `verb` and `run`."""
    _maker.clear()
    _maker.update(facts)


def texts(**facts: Any) -> dict[str, str]:
    """The text chunks of a picture.

    facts: what made this picture, beside what `made_by` was told.
    """
    origin = {**_maker, **facts, "versions": {"gz": __version__, "torch": version("torch")}}
    return {"Software": f"gz {__version__}", KEY: json.dumps(origin, sort_keys=True)}


def save_png(path: Path, image: np.ndarray, origin: Mapping[str, Any] | None = None) -> None:
    """Writes a picture [H, W, C] uint8, C = 1 or 3.

    origin: what made this picture, beside what `made_by` was told.
    """
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    for key, text in texts(**(origin or {})).items():
        info.add_text(key, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)
    part = beside(path)
    picture.save(part, "png", pnginfo=info)
    part.replace(path)


def save_images(folder: Path, images: np.ndarray, origin: Mapping[str, Any] | None = None) -> list[str]:
    """Writes each image of [N, C, H, W] as a PNG, `000000.png` …, which has its number as `index`; returns
    their paths."""
    names = [folder / f"{i:06d}.png" for i in range(len(images))]
    for i, (path, image) in enumerate(zip(names, images, strict=True)):
        save_png(path, image.transpose(1, 2, 0), {**(origin or {}), "index": i})
    return [str(path) for path in names]


def origin_of(file: Path) -> dict[str, Any]:
    """What made a picture.

    Raises MissingError where there is no file, UsageError for one that is no PNG, or not by gz.
    """
    try:
        text = _text(file.read_bytes())
    except FileNotFoundError as e:
        raise MissingError(f"there is no picture `{file}`") from e
    except (ValueError, OSError) as e:
        raise UsageError(f"`{file}` is no whole PNG", hint="name a picture that gz wrote") from e
    try:
        found = json.loads(text or "null")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        hint = "programs that edit or send pictures often leave its text out: take the file that gz wrote"
        raise UsageError(f"`{file}` does not say what made it", hint=hint)
    return found


def _text(data: bytes) -> str | None:
    """The text under KEY of a PNG, a row of chunks (length, type, content, checksum); None where there is
    none. Raises ValueError for another file."""
    if not data.startswith(_SIGNATURE):
        raise ValueError("no PNG")
    at = len(_SIGNATURE)
    while at + 8 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        key, _, value = data[at + 8 : at + 8 + length].partition(b"\0")
        if kind == b"tEXt" and key == KEY.encode():
            return value.decode("latin-1")
        if kind == b"IEND":
            return None
        at += 12 + length
    raise ValueError("cut off")
