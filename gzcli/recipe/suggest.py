"""Which model to begin with: the one answer behind hints, the end of an import, and `gz train --data SET`."""

from __future__ import annotations

# need → the model for a set with labels, and for one without. `gz which` compares models on the set itself.
BY_NEED = {
    "samples": ("cfm", "fm"),
    "one-call": ("soflow", "soflow"),  # GANs want hours in colour
    "likelihood": ("pixelcnnpp", "pixelcnnpp"),
    "codes": ("vae", "vae"),
}


def suggest(classes: int | None, need: str = "samples") -> str:
    """The model to begin with on a set of so many classes; 0: without labels, None: not known."""
    labelled, unlabelled = BY_NEED[need]
    return labelled if classes else unlabelled
