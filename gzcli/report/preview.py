"""An image in the terminal, shown by the protocol of iTerm, otherwise with half blocks in 24-bit colour.
Pipes, `NO_COLOR`, `CI` and `TERM=dumb` get only the path."""

from __future__ import annotations

import base64
import io
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from gzcli.core import streams

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS_WIDE, MAX_PIXELS_HIGH, MAX_BLOCK_ROWS = (
    640,
    480,
    24,
)  # most pixels of a picture, and most rows of blocks
# programs of terminals that show a link by another text
LINKING = ("iTerm.app", "WezTerm", "vscode", "ghostty", "Hyper")
VTE = 5000  # first version in which the terminals of GNOME and Xfce show links


def protocol() -> str | None:
    """The protocol by which this terminal can show an image, judged by its environment; None if there is
    none."""
    env = os.environ
    direct = "TMUX" not in env and not env.get("TERM", "").startswith("screen")
    if direct and env.get("TERM_PROGRAM") in ("iTerm.app", "WezTerm"):
        return "iterm"
    return "blocks" if env.get("COLORTERM") in ("truecolor", "24bit") else None


def drawn(path: Path, way: str) -> str | None:
    """An image encoded for a terminal; None if it cannot be read."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    if way == "blocks":
        columns, lines = shutil.get_terminal_size()
        return blocks(shrunk(image, min(columns, 80), 2 * min(lines - 4, MAX_BLOCK_ROWS)))
    return iterm(shrunk(image, MAX_PIXELS_WIDE, MAX_PIXELS_HIGH))


def link(path: Path) -> str | None:
    """The last two parts of a path as a link to it; None if this terminal does not support links."""
    env = os.environ
    vte = env.get("VTE_VERSION", "")
    by_version = (vte.isdigit() and int(vte) >= VTE) or "WT_SESSION" in env  # `WT_SESSION`: Windows Terminal
    if env.get("TERM_PROGRAM") not in LINKING and ("TMUX" in env or not by_version):
        return None
    text = streams.printable("/".join(path.parts[-2:]))
    return f"\033]8;;file://{quote(str(path))}\033\\{text}\033]8;;\033\\"


def shrunk(image: Image.Image, wide: int, high: int) -> Image.Image:
    """The image, no larger than these sides."""
    share = min(1.0, wide / image.width, max(2, high) / image.height)
    sides = (max(1, round(image.width * share)), max(1, round(image.height * share)))
    return image if share == 1 else image.resize(sides)


# ---------------------------------------------------------------------------- protocols


def iterm(image: Image.Image) -> str:
    """iTerm's protocol, https://iterm2.com/documentation-images.html"""
    content = png(image)
    return f"\033]1337;File=inline=1;size={len(content)}:{base64.b64encode(content).decode()}\a"


def blocks(image: Image.Image) -> str:
    """One character for two pixels: `▀` in the colour of the upper pixel, on the colour of the lower one."""
    pixels, rows = image.load(), []
    assert pixels is not None
    for y in range(0, image.height - image.height % 2, 2):
        cells = ((pixels[x, y], pixels[x, y + 1]) for x in range(image.width))
        row = "".join(f"\033[38;2;{rgb(above)}m\033[48;2;{rgb(below)}m▀" for above, below in cells)
        rows.append(f"{row}\033[0m")
    return "\n".join(rows)


def rgb(pixel: object) -> str:
    return ";".join(map(str, pixel))  # type: ignore[call-overload]


def png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "png")
    return content.getvalue()
