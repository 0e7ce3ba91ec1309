"""The recipe in a model's file: the indented lines of its docstring that begin with a section, such as

train: {steps: 600, batch_size: 64}
optim: {lr: 1e-3}
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from gzcli.models.sources import tree_of
from gzcli.recipe.load import Document, read_text
from gzcli.recipe.schema import schema

_FIRST = re.compile(rf" +({'|'.join([*schema(None), 'stages', 'for', 'extends'])}):")


def read_header(path: Path) -> Document:
    """The recipe of a model's file, with the places of the file. Raises UsageError for a file that is no
    Python, or whose recipe is no YAML."""
    body = tree_of(path).body
    kept: list[str] = []
    first = body[0] if body else None
    if (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    ):
        inside = False
        kept = [""] * (first.lineno - 1)
        for line in first.value.value.splitlines():
            inside = bool(_FIRST.match(line)) or (inside and (not line.strip() or line.startswith(" ")))
            kept.append(line if inside else "")
    return read_text("\n".join(kept), str(path))
