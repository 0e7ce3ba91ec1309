"""`make screens`: what gz prints on a terminal of 80 columns, as pictures of the manual, in
`gzcli/docs/static/assets/`. No picture takes a font, or anything else, from elsewhere.

python tests/tools/screens.py [INTO]      trains two models: about two minutes
"""

from __future__ import annotations

import os
import pty
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pyte
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from gzcli.docs.page import ROOT

INTO = ROOT / "static" / "assets"
COLUMNS = 80
LEAGUE = "gz league --budget 10s --models vae,dcgan --seeds 2 --data digits --report page"
NARROW = {"bench": 58}  # columns of a screen that the README shows beside another
# The pictures, in the order in which their commands are run, from an empty GZ_HOME on; None is not drawn.
SCREENS: list[tuple[str | None, str]] = [
    ("list", "gz list"),
    ("train", "gz train cvae --data glyphs"),
    (None, "gz train vae --data glyphs"),
    ("compare", "gz runs compare vae cvae"),
    ("bench", "gz bench vae cvae --data glyphs -n 500 --quiet"),
    (None, LEAGUE),
    ("league", LEAGUE),  # again, with all of it trained
    ("error", "gz train glow --set model.dpeth=4"),
    (None, "gz model new maf"),
    ("check", "gz model check ./maf.py"),
]
SHOWN = 0.7  # of the size in which rich draws: letters of 14 pixels
WINDOW, LETTERS = (30, 33, 40), (220, 223, 228)
COLOURS = [(110, 117, 130), (240, 113, 120), (152, 195, 121), (229, 192, 123), (97, 175, 239)]
COLOURS += [(198, 120, 221), (86, 182, 194), LETTERS]  # grey, red, green, yellow, blue, magenta, cyan
THEME = TerminalTheme(WINDOW, LETTERS, COLOURS, COLOURS)
# An opaque window, which reads well on a light page and on a dark one; letters of the reader's own machine.
FORMAT = """\
<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  font-size: {char_height}px; line-height: {line_height}px; white-space: pre }}
{styles}
</style>
<defs>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def screen_of(command: str, home: str, folder: str, columns: int = COLUMNS) -> pyte.Screen:
    """What stands on a terminal, high enough for all of it, when a command has ended.

    home: the GZ_HOME.
    folder: the working directory.
    """
    screen = pyte.Screen(columns, 400)
    stream = pyte.ByteStream(screen)
    ours, theirs = pty.openpty()
    drop = ("NO_COLOR", "CI", "LINES")
    env = {key: value for key, value in os.environ.items() if key not in drop}
    env |= {"GZ_HOME": home, "COLUMNS": str(columns), "TERM": "xterm-256color"}
    env |= {"PYTHONPATH": str(ROOT.parents[1])}
    words = [sys.executable, "-m", "gzcli", *shlex.split(command)[1:]]
    process = subprocess.Popen(words, cwd=folder, env=env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    try:
        while read := os.read(ours, 65536):
            stream.feed(read)
    except OSError:  # nobody writes any more
        pass
    process.wait()
    os.close(ours)
    return screen


def lines_of(screen: pyte.Screen) -> Iterator[Text]:
    """The lines with their colours and weights, without the empty ones at the end."""
    last = max((y for y, line in enumerate(screen.display) if line.strip()), default=-1)
    for y in range(last + 1):
        cells = [screen.buffer[y][x] for x in range(screen.columns)]
        runs = ((style, "".join(c.data for c in same)) for style, same in groupby(cells, style_of))
        line = Text.assemble(*((text, style) for style, text in runs))
        line.rstrip()
        yield line


def style_of(cell: pyte.screens.Char) -> str:
    """How a cell looks, in rich's words: a name of a colour, or six digits of one."""
    named = {"default": "", "brown": "yellow"}.get(cell.fg, cell.fg)
    colour = f"#{named}" if re.fullmatch("[0-9a-f]{6}", named) else named
    return f"{colour} bold" if cell.bold else colour


def drawn(name: str, command: str, screen: pyte.Screen) -> str:
    """The picture of a command and of what it has left on the screen, as wide as its longest line."""
    lines = [Text.assemble(("$ ", "bright_black"), (command, "bold")), *lines_of(screen)]
    width = max(line.cell_len for line in lines)
    with open(os.devnull, "w") as nowhere:
        console = Console(
            record=True, width=width, file=nowhere, force_terminal=True, color_system="truecolor"
        )
        for line in lines:
            console.print(line)
        svg = console.export_svg(title="", theme=THEME, code_format=FORMAT, unique_id=f"gz-{name}")
    return re.sub(
        r'(?<=<svg )viewBox="0 0 (\S+)', lambda box: f'width="{SHOWN * float(box[1]):.0f}" {box[0]}', svg
    )


def main(into: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="gz-") as home:
        for name, command in SCREENS:
            screen = screen_of(command, home, home, NARROW.get(name or "", COLUMNS))
            if name:
                path = into / f"screen-{name}.svg"
                path.write_text(drawn(name, command, screen))
                print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else INTO)
