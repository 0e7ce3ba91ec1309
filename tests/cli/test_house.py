"""The rules of the house, read off the syntax tree: imports in functions and for type checkers count too."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2] / "gzcli"
FAMILIES = [p.name for p in (ROOT / "models").iterdir() if p.is_dir() and p.name not in ("nn", "__pycache__")]
# what costs the command line more than it may wait for
HEAVY = {"torch", "numpy", "accelerate", "PIL", "torchvision", "diffusers", "transformers", "peft", "sklearn"}
HEAVY |= {"scipy", "wandb", "rich", "pydantic", "matplotlib", "safetensors", "huggingface_hub", "jinja2"}
HEAVY |= {"gradio"}
# room, a folder or file right below gzcli → the rooms that it may import, besides itself and, if it is
# no leaf, the leaves
LEAVES = {"core", "store", "version", "types"}  # `types` is a module of Python too
MAY = {
    "__main__": {"cli"},
    "__init__": {"api", "league", "models"},
    "cli": {"launch", "recipe", "models", "data", "metrics", "league", "testing", "report", "docs", "demo"},
    "docs": {"recipe", "models"},
    "demo": {"api", "engine", "judge", "data", "recipe", "models"},
    "api": {"engine", "judge", "launch", "recipe", "models", "metrics", "data"},
    "testing": {"__init__", "engine", "recipe", "models", "data"},
    "report": {"engine", "metrics"},
    "export": {"judge", "engine", "metrics", "models", "data"},
    "league": {"engine", "launch", "recipe", "models", "metrics", "data"},
    "judge": {"engine", "recipe", "models", "metrics", "data"},
    "engine": {"recipe", "models", "metrics", "data"},
    "launch": {"recipe", "models", "metrics", "data"},
    "recipe": {"models", "data"},
    "models": {"metrics"},
    "metrics": {"data"},
    "store": {"core", "version"},
    "core": {"version"},
    "types": {"core"},
}
DATA = ("sets", "readers", "download", "packs", "library")  # the layers of `data`, each above those before it
SHARED = ("models.base", "models.nn", "models.catalog", "models.denoising")

# Measures: none may grow, no exception may be added; lower what has become smaller.
ROOT_FILES = 4
LENGTH, PARAMETERS = 60, 8
SHARED_NAMES, ONE_WORD_CONSTANTS = 39, 505  # these may only fall
LONG: dict[str, int] = {}
WIDE: dict[str, int] = {}


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name without `gzcli.`."""
    names = {
        path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted(ROOT.rglob("*.py"))
    }
    return {name.removesuffix(".__init__") or "__init__": path for path, name in names.items()}


def inner(name: str) -> str:
    """The module of the package that an import loads, without `gzcli.`; another library by its first name."""
    first, _, rest = name.partition(".")
    if first != "gzcli":
        return f"python {first}" if first in modules() else first  # `types` is a module of Python too
    while rest and rest not in modules():
        rest = rest.rpartition(".")[0]
    return rest or "__init__"


@cache
def tree_of(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text())


@cache
def nodes_of(name: str) -> tuple[ast.AST, ...]:
    """All nodes of a module's tree, which each test would walk anew."""
    return tuple(ast.walk(tree_of(name)))


def targets(nodes: Iterable[ast.AST]) -> frozenset[str]:
    """What the import statements among these nodes load."""
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return frozenset(map(inner, names))


@cache
def imports(name: str) -> frozenset[str]:
    """All that a module imports, wherever it says so."""
    return targets(nodes_of(name))


def defined(name: str) -> set[str]:
    """The functions, classes and constants at the top of a module."""
    names = set()
    for node in tree_of(name).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names |= {
                n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
            }
    return {each for each in names if not each.startswith("_") or each.isupper()}


def room(name: str) -> str:
    return name.partition(".")[0]


def importable(name: str) -> set[str]:
    """The rooms that a room may import."""
    return {name} | MAY.get(name, set()) | (set() if name in LEAVES else LEAVES)


def family(name: str) -> str | None:
    """The family of a model's module; None for any other module."""
    parts = name.split(".")
    return parts[1] if parts[0] == "models" and parts[1:] and parts[1] in FAMILIES else None


@cache
def loaded(name: str) -> frozenset[str]:
    """All modules, ours and others, that come with an import of this one."""
    seen, todo = set(), {name}
    while todo:
        now = todo.pop()
        seen.add(now)
        parents = {".".join(now.split(".")[:i]) for i in range(1, now.count(".") + 1)} & set(modules())
        todo |= ((targets(tree_of(now).body) if now in modules() else set()) | parents) - seen
    return frozenset(seen)


def test_imports_go_one_way_and_in_no_circle():
    wrong = [
        f"{name} imports {target}"
        for name in modules()
        for target in imports(name) & modules().keys()
        if room(target) not in importable(room(name))
    ]
    assert not wrong
    for name in (name for name in modules() if name.startswith("data.")):
        layer = DATA.index(name.split(".")[1])
        for target in imports(name):
            below = not target.startswith("data.") or DATA.index(target.split(".")[1]) <= layer
            assert below, f"{name} imports {target}"
    graph = {name: imports(name) & modules().keys() - {name} for name in modules()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names a circle


def test_only_the_zoo_knows_a_model_and_a_family_itself():
    common = ("nn", "denoising", "base", "labelled", "options")
    for name in modules():
        may = tuple(f"models.{part}" for part in (*common, f"{family(name)}."))
        may = SHARED if room(name) in ("engine", "judge", "export") else may if family(name) else ("models.",)
        for target in imports(name):
            assert not target.startswith("models.") or target.startswith(may), f"{name} imports {target}"


def test_one_module_each_touches_torch_distributed_and_the_trainer():
    kinds = (ast.Attribute, ast.Import, ast.ImportFrom)
    touching = {
        name
        for name in modules()
        if "torch.distributed" in modules()[name].read_text()
        for node in nodes_of(name)
        if isinstance(node, kinds) and "torch.distributed" in ast.unparse(node)
    }
    assert touching == {"core.ranks"}
    assert [name for name in modules() if "engine.trainer" in imports(name)] == ["engine.__main__"]


def test_what_the_command_line_loads_is_light():
    for name in modules():
        light = room(name) in {"cli", "league", "launch", "recipe", "__init__", "__main__", *LEAVES}
        if light and name not in ("core.ranks", "core.philox"):
            assert not loaded(name) & HEAVY, name


def test_an_import_in_a_function_saves_a_heavy_one():
    """Those of the verbs, of `gzcli` itself and of `gzcli.models` are loaded as they are called for, whatever
    they cost; and `store.start` imports before gzcli is on the path."""
    for name in modules():
        if room(name) in ("cli", "__init__", "__main__") or name in ("store.start", "models"):
            continue
        functions = [node for node in nodes_of(name) if isinstance(node, ast.FunctionDef)]
        for target in targets({node: None for f in functions for node in ast.walk(f)}):
            costs = target not in modules() or (loaded(target) - loaded(name)) & (HEAVY | {"yaml", "urllib"})
            assert costs, f"{name} could import {target} at its top"


def test_samplers_come_without_the_rest():
    """A person's own network needs neither the catalogue nor the store nor the data."""
    rooms = {room(name) for name in loaded("models.denoising.samplers") if name in modules()}
    assert rooms <= {"__init__", "core", "models", "version", "types"}
    assert "models.catalog" not in loaded("models.denoising.samplers")


def test_the_root_does_not_grow():
    assert len(list(ROOT.glob("*.py"))) <= ROOT_FILES


def test_functions_are_short_and_take_few_parameters():
    """But verbs, also those of Python, and the options of models."""
    for name in modules():
        options = {"__init__", "sample"} if family(name) else set()
        for node in nodes_of(name):
            if room(name) == "cli" or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            where, a = f"{name}.{node.name}", node.args
            spoken = "spoken" in map(ast.unparse, node.decorator_list)  # its signature and its text are long
            length = node.end_lineno - (node.body[1] if spoken else node).lineno + 1
            assert length <= LONG.get(where, LENGTH), f"{where} has {length} lines"
            names = [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
            if node.name not in options and not spoken:
                few = len(names) - (names[:1] in (["self"], ["cls"])) <= WIDE.get(where, PARAMETERS)
                assert few, f"{where} takes {len(names)} parameters"


def test_names_and_constants_of_one_word_only_fall():
    """A name that three modules define means three things; `MOST` says neither of what nor in which unit."""
    places = Counter(name for module in modules() for name in defined(module))
    shared = sorted(name for name, count in places.items() if count > 2)
    single = sum(count for name, count in places.items() if name.isupper() and "_" not in name.strip("_"))
    assert len(shared) <= SHARED_NAMES, shared
    assert single <= ONE_WORD_CONSTANTS, single
