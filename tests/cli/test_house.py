"""The rules of the house, read off the syntax tree: imports in functions and for type checkers count too."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "gzcli"
FAMILIES = sorted(
    p.name for p in (ROOT / "models").iterdir() if p.is_dir() and p.name not in ("nn", "__pycache__")
)
# what costs the command line more than it may wait for
HEAVY = {"torch", "numpy", "accelerate", "PIL", "torchvision", "diffusers", "transformers", "peft", "sklearn"}
HEAVY |= {
    "scipy",
    "wandb",
    "rich",
    "pydantic",
    "matplotlib",
    "safetensors",
    "huggingface_hub",
    "jinja2",
    "gradio",
}
# room, a folder or file right below gzcli → the rooms that it may import, besides itself and the leaves
LEAVES = {"core", "store", "version", "types"}  # `types` is a module of Python too
MAY = {
    "__main__": {"cli"},
    "__init__": {"api", "models"},
    "cli": {"launch", "recipe", "models", "data", "metrics", "judge", "testing", "report", "docs", "demo"},
    "docs": {"recipe", "models"},
    "demo": {"api", "engine", "judge", "data", "recipe", "models"},
    "api": {"engine", "judge", "launch", "recipe", "models", "data"},
    "testing": {"__init__", "engine", "recipe", "models", "data"},
    "report": {"engine", "metrics"},
    "export": {"engine", "models", "data"},
    "judge": {"engine", "launch", "recipe", "models", "metrics", "data"},
    "engine": {"launch", "recipe", "models", "metrics", "data"},
    "launch": {"recipe", "models", "data"},
    "recipe": {"models", "data"},
    "models": {"metrics"},
    "metrics": {"data"},
}


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name without `gzcli.`."""
    return {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") or "__init__"


def resolved(node: ast.AST) -> list[str]:
    """What an import statement loads: modules of the package without `gzcli.`, others by their first name."""
    if isinstance(node, ast.Import):
        found = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        found = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        return []
    return [inner(name) for name in found]


def inner(name: str) -> str:
    first, _, rest = name.partition(".")
    if first != "gzcli":
        return first
    while rest and rest not in modules():
        rest = rest.rpartition(".")[0]
    return rest or "__init__"


@cache
def tree_of(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text())


@cache
def imports(name: str) -> frozenset[str]:
    """All that a module imports, wherever it says so."""
    return frozenset(target for node in ast.walk(tree_of(name)) for target in resolved(node))


@cache
def imports_at_its_top(name: str) -> frozenset[str]:
    return frozenset(target for node in tree_of(name).body for target in resolved(node))


def part(name: str) -> str:
    return name.partition(".")[0]


def loaded(name: str) -> set[str]:
    """All modules, ours and others, that come with an import of this one."""
    found, todo = set(), {name}
    while todo:
        now = todo.pop()
        found.add(now)
        parents = {".".join(now.split(".")[:i]) for i in range(1, now.count(".") + 1)} & set(modules())
        todo |= ((imports_at_its_top(now) if now in modules() else set()) | parents) - found
    return found


def test_no_circle_of_files():
    found, path = [], []

    def visit(name: str, done: set[str]) -> None:
        if name in path:
            found.append(" → ".join([*path[path.index(name) :], name]))
            return
        if name not in done:
            path.append(name)
            for target in sorted(imports(name) & modules().keys() - {name}):
                visit(target, done)
            path.pop()
            done.add(name)

    done: set[str] = set()
    for name in modules():
        visit(name, done)
    assert not found


def test_only_ranks_touches_torch_distributed():
    found = [
        name
        for name in modules()
        for node in ast.walk(tree_of(name))
        if (isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed"))
        or (isinstance(node, ast.Import | ast.ImportFrom) and "torch.distributed" in ast.unparse(node))
    ]
    assert set(found) == {"core.ranks"}


@pytest.mark.parametrize("name", modules())
def test_imports_go_one_way(name):
    ours = {part(target) for target in imports(name) if target in modules()}
    assert ours <= MAY.get(part(name), set()) | LEAVES | {part(name)}


def test_only_the_zoo_knows_a_model():
    known = (
        "models.base",
        "models.catalog",
        "models.denoising.process",
        "models.nn",
        "models.options",
        "models.signatures",
        "models.docs",
    )
    for name in modules():
        for target in imports(name) if part(name) in ("engine", "judge", "export") else ():
            assert not target.startswith("models.") or target.startswith(known), f"{name} imports {target}"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_imports_itself_and_what_all_share(family):
    common = ("nn", "denoising", "base", "labelled", "options", f"{family}.")
    shared = tuple(f"models.{name}" for name in common)
    for name in modules():
        for target in imports(name) if name.startswith(f"models.{family}.") else ():
            assert not target.startswith("models.") or target.startswith(shared), f"{name} imports {target}"


def test_the_trainer_is_imported_by_the_engines_start_alone():
    assert [name for name in modules() if "engine.trainer" in imports(name)] == ["engine.__main__"]


LIGHT = [
    name
    for name in modules()
    if part(name) in {"cli", "launch", "recipe", "__init__", "__main__", *LEAVES}
    and name not in ("core.ranks", "core.philox")
]


@pytest.mark.parametrize("name", LIGHT)
def test_what_the_command_line_loads_is_light(name):
    assert not loaded(name) & HEAVY


@pytest.mark.parametrize("name", modules())
def test_an_import_in_a_function_saves_a_heavy_one(name):
    """Those of the verbs and of `gzcli` itself are loaded as they are called for, whatever they cost."""
    if (
        part(name) in ("cli", "__init__", "__main__") or name == "core.start"
    ):  # run before gzcli is on the path
        return
    here = loaded(name)
    for function in ast.walk(tree_of(name)):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                for target in resolved(node):
                    costs = target not in modules() or (loaded(target) - here) & (HEAVY | {"yaml", "urllib"})
                    assert costs, f"{name}.{function.name} could import {target} at its top"
