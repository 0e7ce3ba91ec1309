"""Imports go one way. Read off the syntax tree, imports inside functions included."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "gzcli"
LEAVES = {"errors", "types", "units", "store", "signals", "streams", "start", "ranks", "__init__"}
MAY = {  # a layer → what it may import, besides itself and the leaves
    "__main__": {"cli"},
    "cli": {
        "planning",
        "requirements",
        "recipe",
        "launch",
        "jobs",
        "models.catalog",
        "models.signatures",
        "models.docs",
        "data",
    },
    "requirements": {"recipe", "launch", "models.catalog", "data"},
    "planning": {"recipe", "models.catalog", "data"},
    "recipe": {"models.catalog", "models.signatures", "models.sources", "models.docs", "data"},
    "launch": {"recipe", "ending"},
    "ending": set(),
    "signals": set(),
    "streams": set(),
    "start": set(),
    "ranks": set(),
    "jobs": {"recipe.parts"},
    "engine": {"recipe", "jobs", "models", "data", "metrics"},
    "models": {"metrics.features", "recipe.parts"},
    "data": set(),
    "metrics": {"data"},
    "store": set(),
    "errors": set(),
    "types": set(),
    "units": set(),
    "__init__": set(),
}
LIGHT = (
    "cli",
    "planning",
    "requirements",
    "units",
    "recipe",
    "store",
    "launch",
    "ending",
    "signals",
    "streams",
    "start",
    "errors",
    "types",
    "__main__",
)
HEAVY = {
    "torch",
    "numpy",
    "accelerate",
    "PIL",
    "torchvision",
    "diffusers",
    "sklearn",
    "wandb",
    "rich",
    "pydantic",
    "matplotlib",
}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") or "__init__"


def imports(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_go_one_way(path):
    name = name_of(path)
    layer = name.split(".")[0]
    for target in imports(ast.parse(path.read_text())):
        if not target.startswith("gzcli."):
            continue
        inner = target.removeprefix("gzcli.")
        if inner.split(".")[0] in LEAVES | {layer, "__version__"}:
            continue
        assert any(inner == to or inner.startswith(f"{to}.") for to in MAY[layer]), f"{name} imports {target}"


@pytest.mark.parametrize("path", [p for p in modules() if name_of(p).startswith(LIGHT)], ids=name_of)
def test_what_the_command_line_loads_is_light(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for target in imports(node):
                assert target.split(".")[0] not in HEAVY, f"{name_of(path)} imports {target} at its top"
