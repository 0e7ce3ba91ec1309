"""What may come with each image beside its label: a caption, and further pictures of the same size. No heavy
import.

`control` is the map that the image is to follow (edges, depth, a pose); `before` the image that an
instruction, which is its caption, made into this one. They are known by the names that data sets for
diffusion models give them.
"""

from __future__ import annotations

from collections.abc import Iterable

# Names of keys in `metadata.jsonl`, or of columns; where a set has several of a line, the first counts.
CAPTIONS = ("text", "caption", "edit_prompt", "instruction")
FURTHER = {
    "control": ("control", "conditioning_image", "conditioning"),
    "before": ("before", "input_image", "original_image", "source"),
}
TARGETS = ("edited_image", "target", "after")  # the image itself, where it has a `before`

MAPS = ("control",)  # no photographs: their values have a meaning, and what changes colours leaves them alone

EXTRAS = ("caption", *FURTHER)


def further_of(name: str) -> str | None:
    """`conditioning_image` → "control"; None for a name that means no further picture."""
    return next((kind for kind, names in FURTHER.items() if name in names), None)


def in_words(extras: Iterable[str]) -> str:
    """("caption", "before") → "captions and `before` pictures"."""
    return " and ".join("captions" if extra == "caption" else f"`{extra}` pictures" for extra in extras)
