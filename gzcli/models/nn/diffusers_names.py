"""The names of diffusers' weights in the networks of this package."""

from __future__ import annotations

import re
from collections.abc import Sequence

Patterns = Sequence[tuple[str, str]]

UNET = (  # of `UNet2DModel` with sinusoidal time and convolutional resampling
    (r"^time_embedding\.linear_1", "time.0"),
    (r"^time_embedding\.linear_2", "time.2"),
    (r"^class_embedding", "label.table"),
    (r"^conv_norm_out", "norm_out"),
    (r"^(down|up|mid)_blocks?\b", r"\1"),
    (r"\.resnets\.", ".blocks."),
    (r"\.time_emb_proj", ".emb"),
    (r"\.conv_shortcut", ".skip"),
    (r"\.group_norm", ".norm"),
    (r"\.to_([qkv])", r".\1"),
    (r"\.to_out\.0", ".out"),
    (r"\.(down|up)samplers\.0", ".resample"),
)

DIT = (  # of `DiTTransformer2DModel`
    (r"^pos_embed\.proj", "embed"),
    (r"^proj_out_1", "modulation"),
    (r"^proj_out_2", "out"),
    (r"^transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_1", "time.0"),
    (r"^transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_2", "time.2"),
    (r"^transformer_blocks\.0\.norm1\.emb\.class_embedder\.embedding_table", "label.table"),
    (r"^transformer_blocks", "blocks"),
    (r"\.norm1\.linear", ".modulation"),
    (r"\.attn1\.to_out\.0", ".out"),
    (r"\.ff\.net\.0\.proj", ".mlp.0"),
    (r"\.ff\.net\.2", ".mlp.2"),
)


def renamed(key: str, patterns: Patterns) -> str:
    """The name in this package of the weight that diffusers calls `key`."""
    for pattern, name in patterns:
        key = re.sub(pattern, name, key)
    return key
