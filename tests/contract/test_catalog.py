"""What `gz` says of a model without importing it is what its class says."""

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import subprocess
import sys
import time
import typing

import pytest
import torch
from refused import refused
from zoo import CASES

from gzcli import models
from gzcli.core.errors import canonical
from gzcli.core.types import DataInfo
from gzcli.core.units import Size
from gzcli.models import catalog
from gzcli.store.paths import recipes_dir
from gzcli.testing.contract import held_out

NAMES = sorted(catalog.cards())
DIGITS = DataInfo((1, 16, 16), 17, tuple("0123456789"), n=1442, steps=100)


def forget() -> None:
    """What has been read of files."""
    for cached in (catalog.read_card, catalog.model_class, catalog.module_of, catalog.variant_names):
        cached.cache.clear()
    catalog.zoo_files.cache_clear()


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """Writes files into an empty gzcli.models of its own: zoo("vae/vae.py", text)."""
    root = tmp_path / "gzcli" / "models"

    def write(name: str, text: str) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
        forget()

    write("base.py", (catalog.MODELS_FOLDER / "base.py").read_text())
    monkeypatch.setattr(catalog, "MODELS_FOLDER", root)
    return write


def types_of(owner) -> dict[str, typing.Any]:
    """The types of parameters or fields; a choice from a table is a Literal of its keys and what is added."""
    hints = typing.get_type_hints(owner, include_extras=True)
    for name, kind in hints.items():
        if typing.get_origin(kind) is typing.Annotated:
            tables = [[choice] if isinstance(choice, str) else choice for choice in kind.__metadata__]
            hints[name] = typing.Literal[tuple(key for table in tables for key in table)]
    return hints


def parameters(*functions) -> dict[str, tuple]:
    """name → (type, default, required), as Python itself has them; of a dataclass of options its fields."""
    params = {}
    for function in functions:
        hints = types_of(function)
        for name, p in inspect.signature(function).parameters.items():
            if dataclasses.is_dataclass(p.default):
                kinds = types_of(type(p.default))
                params |= {key: (kinds[key], value, False) for key, value in vars(p.default).items()}
            else:
                required = p.default is p.empty
                params[name] = (hints.get(name), None if required else p.default, required)
    return params


def read(params: dict[str, catalog.Param]) -> dict[str, tuple]:
    """The same as the card has it."""
    scope = vars(typing) | vars(importlib.import_module("builtins")) | {"Size": Size}
    return {p.name: (eval(p.annotation, scope), p.default, p.required) for p in params.values()}


@pytest.mark.parametrize("name", NAMES)
def test_a_card_is_what_the_class_and_its_signatures_are(name):
    card, cls = catalog.card(name), catalog.load(name)
    init = parameters(cls.__init__)
    assert read(card.params) == {key: init[key] for key in init.keys() - {"self", "data", *card.stages}}
    assert set(card.stages) == {key for key, (kind, *_) in init.items() if kind is models.base.Model}
    assert "kwargs" not in init and "args" not in init, "every key of a recipe has a name"
    read_from = [(card.sample, [cls.sample])]
    read_from += [(params, [getattr(cls, do)]) for do, params in card.do.items()]
    for score, params in card.scores.items():
        kinds = ["fit", "score"] if score in card.fits else ["score"]
        read_from.append((params, [getattr(cls, f"{kind}_{score}") for kind in kinds]))
    for params, functions in read_from:
        options = parameters(*functions)
        assert read(params) == {key: value for key, value in options.items() if key in params}
        inputs = {"self", "n", "x", "labels", "noise", "progress", "batches"}
        tensors = {key for key, (kind, *_) in options.items() if "Tensor" in str(kind)}
        assert options.keys() - params.keys() <= inputs | tensors, "an option that nobody can set"
    for fact in ("paper", *catalog._ATTRIBUTES):
        assert getattr(card, fact) == getattr(cls, fact), fact
    of_file = cls if name == card.path.stem else cls.__base__
    assert (card.module, card.cls) == (cls.__module__, of_file.__name__)
    methods = {m for m in dir(cls) if callable(getattr(cls, m)) and not hasattr(models.base.Model, m)}
    for names, kind in ((card.scores, "score_"), (card.fits, "fit_"), (card.maps, "map_")):
        assert set(names) == {m.removeprefix(kind) for m in methods if m.startswith(kind)}
    assert set(card.do) == methods & set(catalog.APPLICATIONS)
    can = {"sample", *card.do} | ({"log_prob"} & methods)
    can |= {"conditional"} & set(card.params) | {"prompt"} & set(card.sample)
    there = {"ood": card.scores or "log_prob" in methods, "map": card.maps}
    there |= {"export": "to_diffusers" in methods, "latent": "to_latent" in methods}
    can |= {key for key, value in there.items() if value}
    assert set(card.can) == can and len(card.can) == len(can)
    assert (card.likelihood is None) == ("log_prob" not in methods)


def test_phases_recipes_and_keys_are_what_cards_say():
    recipes = {canonical(path.stem) for path in recipes_dir().glob("*.yaml")}
    cases = {canonical(case.model): case for case in reversed(CASES)}
    for name in NAMES:
        card, built = catalog.card(name), cases[name].build(DIGITS).phases()
        assert catalog.phases(card) in (None, tuple(phase.name for phase in built)), name
        # a later stage stands in the recipe of its first, and published weights have none
        assert card.stages or name in recipes or name == "consistency", name
        assert card.paper.strip(), name


def test_each_metric_of_a_model_is_in_its_docstring():
    """By this, `gz bench` refuses other columns before it starts."""
    seen = {}
    for case in CASES:
        cls = catalog.load(case.model)
        if hasattr(cls, "measure") and cls.measure not in seen:
            model = case.fresh().eval()
            with torch.inference_mode():
                figures = model.measure([next(held_out(case.pack(), model, "val", 3))])
            seen[cls.measure] = catalog.card(case.model).metrics
            assert {*figures} <= {*seen[cls.measure]}, case
    every = {name for names in seen.values() for name in names}
    assert len(seen) == 6 and {"iwae100", "cycle_l1", "mse_semantic", "code_nats", "accuracy"} < every


def test_no_model_escapes_the_catalogue():
    """A model that names no paper would be taken for a helper; only the base of one that does may."""
    classes = {base for name in NAMES for base in catalog.load(name).__mro__}
    for module in pkgutil.walk_packages(models.__path__, "gzcli.models."):
        for cls in vars(importlib.import_module(module.name)).values():
            if isinstance(cls, type) and issubclass(cls, models.base.Model) and cls.__module__ == module.name:
                assert cls in classes, f"{cls.__module__}.{cls.__name__} names no paper"
    families = [(name, card.family) for name, card in catalog.cards().items()]
    assert [*catalog.families().items()] == families, "the text of a file says what its syntax says"


def heads(tree: ast.AST) -> list[str]:
    """Classes, bases, signatures and assignments of a module, without bodies."""
    parts = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            parts += [node.name, *map(ast.dump, node.bases), *heads(node)]
        elif isinstance(node, ast.FunctionDef):
            parts += [node.name, str(node.lineno), ast.dump(node.args)]
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.ImportFrom):
            parts.append(ast.dump(node))
    return parts


VAE = """
from gzcli.models.base import Model
class Scores:
    def score_kl(self, x, *, noise, k: int = 3): ...
    def sample(self, n, *, mixed: bool = True): ...
class Encoder: ...
class VAE(Scores, Model):
    paper = "arXiv:1"
    likelihood = "bound"
    def __init__(self, data, *, latent: int = 8, mult: tuple[int, ...] = (1, 2), rate: float = -1e-3): ...
    def log_prob(self, x, labels=None, *, noise): ...
    def fit_kl(self, batches, *, rounds: int = 2): ...
    def complete(self, x, *, rows: int, mask: Tensor, noise, progress): ...
    def phases(self):
        return [Phase("main", []), Phase(name="late", params=[])]
"""
CVAE = """
from gzcli.models.vae import VAE
from gzcli.models.types import Spacing
class CVAE(VAE):
    paper: str = "arXiv:2"
    needs = ("labels",)
    def __init__(self, data, *, conditional: bool = True, spacing: Spacing | None = None): ...
"""


def test_bases_in_other_files_are_followed(zoo):
    zoo("vae/__init__.py", "from gzcli.models.vae.vae import VAE\n")
    zoo("types.py", "from typing import Literal\nSpacing = Literal['even', 'odd']\n")
    zoo("vae/vae.py", VAE), zoo("vae/cvae.py", CVAE)
    gan = "from ..vae import vae\nclass GAN(vae.VAE):\n    paper = 'arXiv:3'\n"
    zoo("gan/gan.py", f"{gan}    def phases(self): return extra()\n")
    zoo("gan/nets.py", '"""The paper = a net."""\nclass Net: ...\n')
    zoo("nn/common.py", "from gzcli.models.base import Model\nclass Block(Model):\n    paper = 'none'\n")
    cards = catalog.cards()
    assert list(cards) == list(catalog.families()) == ["gan", "cvae", "vae"]
    vae, cvae, gan = cards["vae"], cards["cvae"], cards["gan"]
    assert vae.params["mult"] == catalog.Param("mult", "tuple[int, ...]", (1, 2), False)
    assert vae.params["rate"].default == -1e-3
    assert vae.can == ("sample", "log_prob", "ood", "complete")
    k, rounds = catalog.Param("k", "int", 3, False), catalog.Param("rounds", "int", 2, False)
    assert vae.scores == {"kl": {"k": k, "rounds": rounds}}
    assert vae.do == {"complete": {"rows": catalog.Param("rows", "int", None, True)}}
    assert list(vae.sample) == ["mixed"] and vae.fits == ("kl",)
    assert (cvae.paper, cvae.needs, cvae.likelihood, cvae.family) == ("arXiv:2", ("labels",), "bound", "vae")
    assert list(cvae.params) == ["conditional", "spacing"]
    assert cvae.params["spacing"].annotation == "Literal['even', 'odd'] | None"
    assert "conditional" in cvae.can and cvae.scores == vae.scores
    assert catalog.phases(vae) == catalog.phases(cvae) == ("main", "late")
    assert catalog.phases(gan) is None, "phases made elsewhere are for the trainer to know"
    assert gan.params == vae.params


HEAD = """from gzcli.models.base import Model
from gzcli.models.vae.base import TABLE
Kind = Annotated[str, TABLE]
class VAE(Model):
    paper = ''
    def __init__(self, *, """


def test_what_is_read_of_a_file(zoo):
    """A choice from the table that declares it; no code in a string; a default must be a literal."""
    zoo("vae/base.py", "BASE = {'a': 1}\nTABLE: dict = {**BASE, 'b': lambda x: x} | {'c': 2}\n")
    zoo("vae/vae.py", HEAD + "kind: Kind = 'a', way: Annotated[str, TABLE, 'x'] | None = None): ...\n")
    params = catalog.card("vae").params
    assert params["kind"].annotation == "Literal['a', 'b', 'c']"
    assert params["way"].annotation == "Literal['a', 'b', 'c', 'x'] | None"
    text = 'a: int = 1):\n        self.help = """\n    def __init__(self, *, b: int = 2):\n    """\n'
    zoo("vae/vae.py", f"{HEAD}{text}    def score_it(self, x, *, noise, c: int = 3): ...\n")
    card = catalog.card("vae")
    assert list(card.params) == ["a"] and list(card.scores["it"]) == ["c"]
    zoo("vae/vae.py", HEAD + "k=2 ** N): ...\n")
    refused(r"vae.py:6:29: `2 \*\* N` must be a literal, not an expression", catalog.cards)
    zoo("vae/base.py", "@dataclass\nclass Sizes:\n    width: int = 1\n")
    sizes = "one: Sizes = Sizes(), {}): ...\n"
    head = HEAD.replace("import TABLE", "import TABLE, Sizes")
    for more in ("two: Sizes = Sizes(width=2)", "width: int = 2"):
        zoo("vae/vae.py", head + sizes.format(more))
        refused(r"vae.py:6:\d+: the option `width` is in `one` and `\w+`", catalog.cards)
    zoo("vae/vae.py", HEAD + "beside: Beside = Beside()): ...\n")
    refused(r"vae.py:6:\d+: `Beside` must be a dataclass of this file or of gz", catalog.cards)


def test_outlines_keep_signatures_and_names_are_compared_loosely():
    assert catalog.card(" VAE ").name == "vae"
    e = refused("", catalog.card, "glwo")
    assert (e.message, e.hint) == ("there is no model `glwo`", "did you mean `glow`?")
    # what the quick reader leaves out is bodies alone
    for path in catalog.MODELS_FOLDER.rglob("*.py"):
        text = path.read_text()
        assert heads(ast.parse(catalog.outline(text))) == heads(ast.parse(text)), path


def test_names_and_families_need_no_card(zoo):
    table = "".join(f"\n        '{name}': {{\n            'paper': '',\n        }}," for name in "ca")
    for variants in ("{'a': {'paper': ''}, 'c': {'paper': ''}}", f"{{{table}\n    }}"):
        zoo("vae/vae.py", f"{HEAD}k: int = 1): ...\n    variants = {variants}\n    takes = 'bytes'\n")
        assert list(catalog.cards()) == list(catalog.families()) == ["a", "c", "vae"]
        assert catalog.card("C").family == "vae"


def test_reading_the_zoo_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys; from gzcli.models.catalog import cards; cards();"
        "from gzcli.recipe.files import recipes; from gzcli.recipe.resolve import resolve;"
        "[resolve(name) for name in recipes()];"
        "print([m for m in ('torch', 'numpy', 'PIL', 'accelerate', 'rich', 'pydantic') if m in sys.modules])"
    )
    out = subprocess.check_output(
        [sys.executable, "-c", code], text=True, cwd=catalog.MODELS_FOLDER.parents[1]
    )
    assert out.strip() == "[]"


def test_the_zoo_is_read_in_little_more_than_parsing_it_takes():
    """Of each the least of some runs counts: a busy machine makes any run dearer, and none cheaper."""
    texts = [card.path.read_text() for card in catalog.cards().values()]
    parsing = reading = float("inf")
    for _ in range(12):
        since = time.process_time()
        for text in texts:
            ast.parse(text)
        parsing, since = min(parsing, time.process_time() - since), time.process_time()
        forget()
        catalog.cards()
        reading = min(reading, time.process_time() - since)
        if reading <= 4 * parsing:
            return
    pytest.fail(f"{1e3 * reading:.0f} ms, {1e3 * parsing:.0f} to parse the files; `gz list models` reads all")
