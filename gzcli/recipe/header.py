"""The recipe in a model's file: the indented lines of its docstring that begin with a section, such as

train: {steps: 600, batch_size: 64}
optim: {lr: 1e-3}
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from gzcli.errors import UsageError
from gzcli.recipe.load import Document, read_text

SECTIONS = "about|seed|model|data|train|optim|sample|ood|bench|launch|stages|for|params"
_FIRST = re.compile(rf" +({SECTIONS}):")


def read_header(path: Path) -> Document:
    """The recipe of a model's file, its marks those of the file. Raises UsageError where it is not YAML."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        body = ast.parse(text, str(path)).body
    except SyntaxError as e:
        raise UsageError(f"{path}:{e.lineno}: {e.msg}") from None
    lines = [""] * len(text.splitlines())
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        first, last = body[0].lineno - 1, body[0].end_lineno or body[0].lineno
        inside = False
        for i, line in enumerate(text.splitlines()[first:last], first):
            inside = bool(_FIRST.match(line)) or (inside and (not line.strip() or line.startswith(" ")))
            if inside and not line.strip().startswith(('"""', "'''")):
                lines[i] = line
    return read_text("\n".join(lines), str(path))
