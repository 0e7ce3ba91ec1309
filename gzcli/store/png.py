"""PNG files with a text chunk `gz`, which says in JSON what made them, and no time: equal commands write
equal files."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gzcli.core.errors import MissingError, UsageError
from gzcli.store.files import part_path
from gzcli.version import __version__

if TYPE_CHECKING:
    import numpy as np

KEY = "gz"  # of the text chunk
_maker: dict[str, Any] = {}  # the facts that `made_by` sets


def made_by(**facts: Any) -> None:
    """Sets the facts that every picture of this process gets, such as `verb` and `run`."""
    _maker.clear()
    _maker.update(facts)


def texts(**facts: Any) -> dict[str, str]:
    """The text chunks of a picture: these facts and those of `made_by`."""
    origin = {**_maker, **facts, "versions": {"gz": __version__, "torch": version("torch")}}
    return {"Software": f"gz {__version__}", KEY: json.dumps(origin, sort_keys=True)}


def save_png(path: Path, image: np.ndarray, origin: Mapping[str, Any] | None = None) -> None:
    """Writes a picture [H, W, C] uint8, C = 1 or 3, with `origin` beside the facts of `made_by`."""
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    for key, text in texts(**(origin or {})).items():
        info.add_text(key, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)
    part = part_path(path)
    picture.save(part, "png", pnginfo=info)
    part.replace(path)


def save_images(folder: Path, images: np.ndarray, origin: Mapping[str, Any] | None = None) -> list[str]:
    """Writes each image of [N, C, H, W] as `000000.png` …, with its number as `index`; returns the paths."""
    paths = [folder / f"{i:06d}.png" for i in range(len(images))]
    for i, (path, image) in enumerate(zip(paths, images, strict=True)):
        save_png(path, image.transpose(1, 2, 0), {**(origin or {}), "index": i})
    return [str(path) for path in paths]


def origin_of(file: Path) -> dict[str, Any]:
    """What made a picture; raises MissingError without a file, UsageError for one that is no PNG by gz."""
    from PIL import Image

    try:
        with Image.open(file, formats=["PNG"]) as image:
            image.load()
            text = image.info.get(KEY, "null")
    except FileNotFoundError as e:
        raise MissingError(f"there is no picture `{file}`") from e
    except (ValueError, OSError, SyntaxError) as e:  # SyntaxError: so PIL calls a damaged chunk
        raise UsageError(f"`{file}` is no whole PNG", hint="name a picture that gz wrote") from e
    origin = None
    with contextlib.suppress(ValueError, TypeError):
        origin = json.loads(text)
    if not isinstance(origin, dict):
        hint = "programs that edit or send pictures often leave its text out: take the file that gz wrote"
        raise UsageError(f"`{file}` does not say what made it", hint=hint)
    return origin
