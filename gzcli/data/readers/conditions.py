"""What may belong to an image beside its label: a caption, and further pictures of the same size. No heavy
import.

`control` is a map that the image follows (edges, depth, a pose). `before` is the image that an instruction,
the caption, changed into this one. Data sets for diffusion models give them the names below.
"""

from __future__ import annotations

from collections.abc import Iterable

# Names of keys in `metadata.jsonl`, or of columns. Where a set has several, the first one counts.
CAPTIONS = ("text", "caption", "edit_prompt", "instruction")
FURTHER = {
    "control": ("control", "conditioning_image", "conditioning"),
    "before": ("before", "input_image", "original_image", "source"),
}
TARGETS = ("edited_image", "target", "after")  # the image itself, where it has a `before`

MAPS = ("control",)  # their values have a meaning: augmentations that change colours leave them as they are

EXTRAS = ("caption", *FURTHER)


def further_of(name: str) -> str | None:
    """`conditioning_image` → "control"; None for a name that means no further picture."""
    return next((kind for kind, names in FURTHER.items() if name in names), None)


def in_words(extras: Iterable[str]) -> str:
    """("caption", "before") → "captions and `before` pictures"."""
    return " and ".join("captions" if extra == "caption" else f"`{extra}` pictures" for extra in extras)
