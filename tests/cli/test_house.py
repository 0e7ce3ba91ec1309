"""The rules of the house, read off the syntax tree: imports in functions and for type checkers count too."""

from __future__ import annotations

import ast
from collections import Counter
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2] / "gzcli"
FAMILIES = [p.name for p in (ROOT / "models").iterdir() if p.is_dir() and p.name not in ("nn", "__pycache__")]
# what costs the command line more than it may wait for
HEAVY = {"torch", "numpy", "accelerate", "PIL", "torchvision", "diffusers", "transformers", "peft", "sklearn"}
HEAVY |= {"scipy", "wandb", "rich", "pydantic", "matplotlib", "safetensors", "huggingface_hub", "jinja2"}
HEAVY |= {"gradio"}
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
SHARED = ("models.base", "models.nn", "models.options", "models.signatures", "models.docs", "models.catalog")
SHARED = (*SHARED, "models.denoising.process")

# Measures: none may grow, no exception may be added; lower what has become smaller.
ROOT_FILES, FOLDER, LINES, FILES = 4, 20, 53_000, 290
FOLDERS = {"cli": 32, "engine": 22}
LENGTH, PARAMETERS = 60, 8
LONG = {"demo.page.page": 97, "judge.ood.run": 61, "models.catalog._read_card": 65}
LONG |= {"models.nn.unet.__init__": 74}
WIDE = {"data.packs.batches.__init__": 11, "engine.compiled.losses": 9}
WIDE |= {"models.denoising.applications.inpaint": 11, "models.denoising.ode.solve_adaptive": 9}
WIDE |= {"models.denoising.samplers.repaint": 9, "models.nn.unet.__init__": 15}


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name without `gzcli.`."""
    return {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") or "__init__"


def targets(node: ast.AST) -> list[str]:
    """What an import statement loads: modules of the package without `gzcli.`, others by their first name."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        return []
    return [inner(name) for name in names]


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
    return frozenset(target for node in ast.walk(tree_of(name)) for target in targets(node))


@cache
def imports_at_its_top(name: str) -> frozenset[str]:
    return frozenset(target for node in tree_of(name).body for target in targets(node))


def room(name: str) -> str:
    return name.partition(".")[0]


@cache
def loaded(name: str) -> frozenset[str]:
    """All modules, ours and others, that come with an import of this one."""
    seen, todo = set(), {name}
    while todo:
        now = todo.pop()
        seen.add(now)
        parents = {".".join(now.split(".")[:i]) for i in range(1, now.count(".") + 1)} & set(modules())
        todo |= ((imports_at_its_top(now) if now in modules() else set()) | parents) - seen
    return frozenset(seen)


def test_imports_go_one_way_and_in_no_circle():
    wrong = [
        f"{name} imports {target}"
        for name in modules()
        for target in imports(name) & modules().keys()
        if room(target) not in MAY.get(room(name), set()) | LEAVES | {room(name)}
    ]
    assert not wrong
    circles, path, done = [], [], set()

    def visit(name: str) -> None:
        if name in path:
            circles.append(" → ".join([*path[path.index(name) :], name]))
        elif name not in done:
            path.append(name)
            for target in sorted(imports(name) & modules().keys() - {name}):
                visit(target)
            path.pop()
            done.add(name)

    for name in modules():
        visit(name)
    assert not circles


def test_only_the_zoo_knows_a_model_and_a_family_itself():
    common = ("nn", "denoising", "base", "labelled", "options")
    for name in modules():
        if room(name) in ("engine", "judge", "export"):
            may = SHARED
        elif name.split(".")[1:2] and name.split(".")[1] in FAMILIES and room(name) == "models":
            may = tuple(f"models.{part}" for part in (*common, f"{name.split('.')[1]}."))
        else:
            continue
        for target in imports(name):
            assert not target.startswith("models.") or target.startswith(may), f"{name} imports {target}"


def test_one_module_each_touches_torch_distributed_and_the_trainer():
    touching = {
        name
        for name in modules()
        for node in ast.walk(tree_of(name))
        if (isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed"))
        or (isinstance(node, ast.Import | ast.ImportFrom) and "torch.distributed" in ast.unparse(node))
    }
    assert touching == {"core.ranks"}
    assert [name for name in modules() if "engine.trainer" in imports(name)] == ["engine.__main__"]


def test_what_the_command_line_loads_is_light():
    for name in modules():
        light = room(name) in {"cli", "launch", "recipe", "__init__", "__main__", *LEAVES}
        if light and name not in ("core.ranks", "core.philox"):
            assert not loaded(name) & HEAVY, name


def test_an_import_in_a_function_saves_a_heavy_one():
    """Those of the verbs and of `gzcli` itself are loaded as they are called for, whatever they cost."""
    for name in modules():
        if (
            room(name) in ("cli", "__init__", "__main__") or name == "core.start"
        ):  # before gzcli is on the path
            continue
        functions = [node for node in ast.walk(tree_of(name)) if isinstance(node, ast.FunctionDef)]
        for target in {target for f in functions for node in ast.walk(f) for target in targets(node)}:
            costs = target not in modules() or (loaded(target) - loaded(name)) & (HEAVY | {"yaml", "urllib"})
            assert costs, f"{name} could import {target} at its top"


def test_folders_and_the_whole_do_not_grow():
    assert len([path for path in ROOT.iterdir() if path.is_file()]) <= ROOT_FILES
    folders = Counter(".".join(path.parent.relative_to(ROOT).parts) for path in modules().values())
    assert [name for name, files in folders.items() if files > FOLDERS.get(name, FOLDER)] == []
    assert len(modules()) <= FILES
    assert sum(len(path.read_text().splitlines()) for path in modules().values()) <= LINES


def test_functions_are_short_and_take_few_parameters():
    """But verbs, `gzcli.train`, and the options of models."""
    for name in modules():
        options = {"__init__", "sample"} if name.split(".")[1:2] and name.split(".")[1] in FAMILIES else set()
        for node in ast.walk(tree_of(name)):
            if room(name) == "cli" or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            where, a = f"{name}.{node.name}", node.args
            length = node.end_lineno - node.lineno + 1
            assert length <= LONG.get(where, LENGTH), f"{where} has {length} lines"
            names = [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
            if node.name not in options and where != "api.functions.train":
                few = len(names) - (names[:1] in (["self"], ["cls"])) <= WIDE.get(where, PARAMETERS)
                assert few, f"{where} takes {len(names)} parameters"
