"""The ranges of the options of models, by their names: in the zoo a name has one meaning in all models."""

from __future__ import annotations

import re

# Whole numbers; a width of 10⁹ would take all memory.
ANY_INT, COUNT, SIZE = "-1,000,000 … 1,000,000", "0 … 1,000,000", "1 … 1,000,000"
MAY_BE_0 = frozenset(
    (
        *("attention", "blocks", "burn_in", "cells", "channel", "checkerboard", "clusters", "corrector"),
        *("dequant_blocks", "disc_start", "down", "halvings", "keep", "kl_warmup", "pool", "rows"),
    )
)
OF_FLOATS = {
    **dict.fromkeys(("accept", "caption_dropout", "decay", "dynamic", "label_dropout"), "in [0, 1]"),
    **dict.fromkeys(("dropout", "logit", "smoothing", "t_min"), "in [0, 1)"),
    **dict.fromkeys(("min_snr", "sigma", "sigma_max", "step", "tolerance"), "greater than 0"),
}
# Scales that may turn around what they scale.
SIGNED = frozenset(("control_scale", "guidance", "image_guidance", "lora_scale", "pair_guidance"))


def range_of(name: str, annotation: str, *, ours: bool) -> str | None:
    """The range of the numbers of an option; None: any, or it has none.

    annotation: its type.
    ours: whether its model comes with gz; of those of others nothing is known.
    """
    if re.search(r"\bint\b", annotation):
        # HVAE has `groups` for each resolution, some of which are 0
        zero = name in MAY_BE_0 or (name == "groups" and "tuple" in annotation)
        return (COUNT if zero else SIZE) if ours else ANY_INT
    if re.search(r"\bfloat\b", annotation) and ours and name not in SIGNED:
        return OF_FLOATS.get(name, "0 or more")
    return None
