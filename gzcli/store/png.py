"""Images as files: PNGs with their origin as JSON in a text chunk `gz`, and the other formats of `gz sample`.
No file contains a time, so equal commands write equal files."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gzcli.core.errors import MissingError, UsageError
from gzcli.store.files import make_folder, replacing, write_arrays
from gzcli.store.run_folder import Run
from gzcli.version import __version__

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image, ImageFont

KEY = "gz"  # keyword of the text chunk
_maker: dict[str, Any] = {}  # facts that `made_by` sets


def made_by(**facts: Any) -> None:
    """Sets the facts that every image written by this process contains, such as `verb` and `run`."""
    _maker.clear()
    _maker.update(facts)


@cache  # searching the installed packages takes longer than writing a small image
def _versions() -> dict[str, str]:
    return {"gz": __version__, "torch": version("torch")}


def text_chunks(**facts: Any) -> dict[str, str]:
    """The text chunks of an image: these facts and those of `made_by`."""
    origin = {**_maker, **facts, "versions": _versions()}
    return {"Software": f"gz {__version__}", KEY: json.dumps(origin, sort_keys=True)}


def picture_of(image: np.ndarray) -> Image.Image:
    """An image [H, W, C] uint8, C = 1, 3 or 4, as a Pillow image."""
    from PIL import Image

    return Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)


def save_png(path: Path, image: np.ndarray, origin: Mapping[str, Any] | None = None) -> None:
    """Writes an image [H, W, C] uint8, C = 1, 3 or 4, with `origin` added to the facts of `made_by`."""
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    for key, text in text_chunks(**(origin or {})).items():
        info.add_text(key, text)
    make_folder(path.parent)
    with replacing(path) as part:
        picture_of(image).save(part, "png", pnginfo=info)


def save_images(folder: Path, images: np.ndarray, origin: Mapping[str, Any] | None = None) -> list[str]:
    """Writes the images [N, C, H, W] as `000000.png` …, each with its `index` in the text chunk; returns the
    paths."""
    paths = [folder / f"{i:06d}.png" for i in range(len(images))]
    for i, (path, image) in enumerate(zip(paths, images, strict=True)):
        save_png(path, image.transpose(1, 2, 0), {**(origin or {}), "index": i})
    return [str(path) for path in paths]


def write_images(job: Run, images: np.ndarray, labels: np.ndarray | None, origin: Mapping[str, Any]) -> Any:
    return save_images(job.images_folder, images, origin)


def write_npz(job: Run, images: np.ndarray, labels: np.ndarray | None, origin: Mapping[str, Any]) -> Any:
    arrays = {"samples": images.transpose(0, 2, 3, 1)} | ({} if labels is None else {"labels": labels})
    write_arrays(job.images_file, arrays)
    return str(job.images_file)


class Format(NamedTuple):
    """A format in which `gz sample` writes images in addition to the sheet; its flag is `--NAME`."""

    key: str  # key of the result in JSON, with what `write` returns
    help: str
    # the folder of the job, images uint8 [N, C, H, W], labels [N] or [N, K], origin → the path, or the paths
    write: Callable[[Run, np.ndarray, np.ndarray | None, Mapping[str, Any]], Any]
    several: bool = False  # whether there are several paths


FORMATS = {
    "npz": Format("npz", "Also write samples.npz: uint8 [N, H, W, C], and labels.", write_npz),
    "png": Format("files", "Write single PNGs even for more than 256 images.", write_images, several=True),
}


def origin_of(file: Path) -> dict[str, Any]:
    """The origin of an image. Raises MissingError if there is no file, UsageError if it is not a PNG that gz
    wrote."""
    from PIL import Image

    try:
        with Image.open(file, formats=["PNG"]) as image:
            image.load()
            text = image.info.get(KEY, "null")
    except FileNotFoundError as e:
        raise MissingError(f"the image `{file}` does not exist") from e
    except (ValueError, OSError, SyntaxError) as e:  # SyntaxError: so PIL calls a damaged chunk
        raise UsageError(f"`{file}` is not a complete PNG", hint="use an image that gz wrote") from e
    origin = None
    with contextlib.suppress(ValueError, TypeError):
        origin = json.loads(text)
    if not isinstance(origin, dict):
        hint = "use the original file: programs that edit or send images often remove its metadata"
        raise UsageError(f"`{file}` does not record how it was made", hint=hint)
    return origin


@cache
def font_of(height: int) -> ImageFont.FreeTypeFont:
    """Matplotlib's font, which covers the letters of most languages."""
    from PIL import ImageFont

    library = find_spec("matplotlib")  # finds the library's files without the time of its import
    assert library is not None and library.origin is not None
    fonts = Path(library.origin).parent / "mpl-data" / "fonts" / "ttf"
    return ImageFont.truetype(str(fonts / "DejaVuSans.ttf"), height)
