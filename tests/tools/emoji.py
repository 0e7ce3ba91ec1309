"""Draws the set `emoji`: `gzcli/data/sets/emoji.webp` and `emoji.tsv`.

    python tests/tools/emoji.py emoji-test.txt [NotoColorEmoji.ttf]

`emoji-test.txt` is Unicode's list (Debian: `unicode-data`), the font Noto Color Emoji (Debian:
`fonts-noto-color-emoji`), which is looked for where it is not given. Skin tones are left out. A row of the
table is a class, the characters and a name; rows and pictures are in the order train, validation, test.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from gzcli.data.readers.embedded import EMOJI_SHEET, EMOJI_TABLE, draw_emoji, emoji_font
from gzcli.data.sets.registry import find

SIDE, COLUMNS = 32, 52
ENTRY = re.compile(r"([0-9A-F ]+?) *; fully-qualified +# \S+ E\S+ (.+)")
SKIN = range(0x1F3FB, 0x1F400)
GROUPS = {  # CLDR's groups and the names of their classes
    "Smileys & Emotion": "smileys",
    "People & Body": "people",
    "Animals & Nature": "animals",
    "Food & Drink": "food",
    "Travel & Places": "travel",
    "Activities": "activities",
    "Objects": "objects",
    "Symbols": "symbols",
    "Flags": "flags",
}


def entries(listing: Path) -> list[tuple[str, str, str]]:
    """The class, characters and name of every emoji without a skin tone, in Unicode's order."""
    rows, group = [], ""
    for line in listing.read_text("utf-8").splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ")
        elif match := ENTRY.fullmatch(line):
            codes = [int(code, 16) for code in match[1].split()]
            if not any(code in SKIN for code in codes):
                rows.append((GROUPS[group], "".join(map(chr, codes)), match[2]))
    return rows


def by_splits(rows: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """The rows, shuffled with seed 0: of nine of each class seven train, then one for validation and one for
    the test."""
    seen, splits = dict.fromkeys(GROUPS.values(), 0), ([], [], [])
    for i in np.random.RandomState(0).permutation(len(rows)):
        label = rows[i][0]
        splits[max(0, seen[label] % 9 - 6)].append(rows[i])
        seen[label] += 1
    print("train, validation, test:", *map(len, splits))
    return [row for split in splits for row in split]


def main(listing: str, font: str | None = None) -> None:
    rows = by_splits(entries(Path(listing)))
    assert list(find("emoji").class_names) == list(GROUPS.values())
    EMOJI_TABLE.write_text("".join("\t".join(row) + "\n" for row in rows), "utf-8")
    images = draw_emoji([characters for _, characters, _ in rows], SIDE, Path(font) if font else emoji_font())
    high = -(-len(images) // COLUMNS)
    sheet = np.full((high * COLUMNS, SIDE, SIDE, 3), 255, np.uint8)
    sheet[: len(images)] = images.transpose(0, 2, 3, 1)
    sheet = sheet.reshape(high, COLUMNS, SIDE, SIDE, 3).swapaxes(1, 2).reshape(high * SIDE, COLUMNS * SIDE, 3)
    Image.fromarray(sheet).save(EMOJI_SHEET, lossless=True, quality=100, method=6)
    print(f"{len(rows)} pictures, {EMOJI_SHEET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
