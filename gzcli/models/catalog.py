"""What each model is and can do, read from its file with `ast`, so that neither listing nor resolving imports
torch.

A model file is `models/<family>/<name>.py`. It holds a class that derives from `Model`, directly or not, and
names its `paper`; files of nets, layers or samplers hold none. The folder is the registry.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gzcli.core.errors import UsageError, canonical, did_you_mean
from gzcli.metrics.likelihood_scores import SCORES
from gzcli.models.signatures import (
    GIVEN,
    ROOT,
    Class,
    Param,
    by_file,
    documented,
    lineage_of,
    module_of,
    params_of,
    stamp,
    text_of,
    value_of,
)
from gzcli.store import model_files
from gzcli.store.run_folder import Run

if TYPE_CHECKING:
    from gzcli.models.base import Model

APPLICATIONS = (
    *("reconstruct", "interpolate", "traverse", "translate", "inpaint"),
    *("upscale", "complete", "edit", "classify"),
)
OUTSIDE = "outside"  # the family of models from outside the package

# class attributes of `Model` that a card has
_ATTRIBUTES = ("needs", "likelihood", "best", "latents", "square", "shares", "labels_for", "with_labels")
_INPUTS = {"Tensor", "Module", "Noise", "Progress", "Batch", "Callable", "Iterable", "Iterator"}
_SHAPE = re.compile(r"^\[B\]: | \[[A-Z1, ]+\]")  # as in `images [B, C, H, W]`


@dataclass(frozen=True)
class ModelCard:
    """A model as its file describes it."""

    name: str
    family: str
    path: Path
    module: str
    cls: str
    lineage: tuple[Class, ...] = field(repr=False, compare=False)
    paper: str
    needs: tuple[str, ...]
    likelihood: str | None  # what log_prob is: "exact" | "bound" | "ode"
    best: str
    latents: bool  # whether it can live on latents
    square: bool  # whether it needs square images
    shares: bool  # whether GPUs can share its weights out
    params: dict[str, Param]  # hyperparameters: the keys of the recipe's `model`
    stages: tuple[str, ...]  # earlier stages of the recipe, whose trained models `__init__` takes
    sample: dict[str, Param]  # options of `sample`
    inputs: tuple[str, ...]  # pictures that `sample` may take: "control", "before"
    scores: dict[str, dict[str, Param]]  # score → options of `score_<name>` and `fit_<name>`
    fits: tuple[str, ...]  # the scores that have a `fit_<name>`
    maps: tuple[str, ...]  # the scores that have a `map_<name>`
    do: dict[str, dict[str, Param]]  # application → its options
    labelled: tuple[str, ...]  # the applications that take labels
    masked: tuple[str, ...]  # the applications that take a mask
    labels_for: tuple[str, ...]  # the applications that take labels though the model is not conditional
    with_labels: tuple[str, ...]  # the applications that only a run trained with `model.conditional` has
    can: tuple[str, ...]  # sample, conditional, prompt, log_prob, ood, map, latent, export, applications

    @property
    def unlabelled_lack(self) -> tuple[str, ...]:
        """The applications that a run lacks unless it is asked to be conditional."""
        default = self.params.get("conditional")
        return self.with_labels if default is not None and default.default is False else ()


# ---------------------------------------------------------------------------- cards by name


def cards() -> dict[str, ModelCard]:
    """Every model by name: the zoo in order of family and name, then models from outside the package."""
    by_name: dict[str, ModelCard] = {}
    for path in (*_zoo(), *model_files.model_files().values()):
        if card := read_card(path):
            by_name.setdefault(card.name, card)
    return by_name


def card(name: str) -> ModelCard:
    """The card of one model, from its file and the files of its bases alone; `-` and `_` are alike.

    A file that was named by its path comes first, then the zoo, then other files from outside the package.
    Raises UsageError with the nearest name where there is no such model.
    """
    for path in (model_files.typed(name), *_zoo(escape(canonical(name)))):
        if path and (card := read_card(path)):
            return card
    # installed packages are searched last: that takes longer than all else
    if (path := model_files.find(name)) and (card := read_card(path)):
        return card
    hint = did_you_mean(name, cards()) or "`gz list models` names them all"
    raise UsageError(f"no model is called `{name}`", hint=hint)


def card_of(run: Run, name: str) -> ModelCard:
    """The card of the model that a run, or a stage of it, has trained. For a model from outside the package,
    it is read from the run's copy of the file."""
    copy = model_files.kept(run.owner.path, name)
    return card_at(copy) if copy else card(name)


def card_at(path: Path) -> ModelCard:
    """The card of the model in a file. Raises UsageError where it holds none."""
    if card := read_card(path):
        return card
    hint = "a class that derives from `gzcli.Model` and names its `paper`"
    raise UsageError(f"`{path}` holds no model", hint=hint)


def counted(trained: int, staged: int) -> str:
    """The number of models in words: those that are trained by name, then those that are a stage alone."""
    stages = f", and {staged} that only ever {'is' if staged == 1 else 'are'} a stage of one"
    return f"{trained} model{'' if trained == 1 else 's'}{stages if staged else ''}"


def _zoo(stem: str = "*") -> list[Path]:
    """The files of the package that may hold a model; `stem` is a pattern of their names without `.py`."""
    files = ROOT.glob(f"*/{stem}.py")
    return sorted(path for path in files if path.parent.name != "nn" and path.stem != "__init__")


# ---------------------------------------------------------------------------- what a card tells


def likelihood_scores(*, log_prob: bool, own: Iterable[str]) -> tuple[str, ...]:
    """The out-of-distribution scores that the engine computes from a model's likelihood.

    log_prob: whether the model has `log_prob`, the likelihood of pixels.
    own: the names of the model's own scores; its `nll` may be the likelihood of codes, which is not compared
      with the length of a lossless code of the pixels.
    """
    if log_prob:
        return tuple(SCORES)
    return tuple(name for name, s in SCORES.items() if "code_length" not in s.reads) if "nll" in own else ()


def phases(model: ModelCard) -> tuple[str, ...] | None:
    """The names of the model's phases, from the `Phase("critic", …)` calls of its `phases`.

    None where the calls do not name them by literals: then only the trainer knows them.
    """
    method = next((cls.methods["phases"] for cls in model.lineage if "phases" in cls.methods), None)
    if method is None:
        return ("main",)
    names: list[object] = []
    for node in ast.walk(method):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Phase":
            name = [*node.args, *(k.value for k in node.keywords if k.arg == "name"), None][0]
            names.append(name.value if isinstance(name, ast.Constant) else None)
    return tuple(dict.fromkeys(map(str, names))) if names and None not in names else None


def option_texts(card: ModelCard) -> dict[str, dict[str, str]]:
    """The text of each option, by the section of a recipe: `model`, `sample`, `ood` and each application.

    The docstring of a class documents the parameters of `__init__`, that of a dataclass of options its
    fields, that of a method its keywords. For an option that a method does not document, it is the text in
    `sample`, else in the class.
    """

    def texts_of(*methods: str | None) -> dict[str, str]:
        """What methods, None for the class, say of their parameters: the first one, of the nearest class."""
        texts: dict[str, str] = {}
        for method in reversed(methods):
            for cls in reversed(card.lineage):
                node = cls.methods.get(method) if method else cls.node
                texts |= documented(ast.get_docstring(node) or "") if node else {}
        return texts

    def chosen(params: Mapping[str, Param], texts: Mapping[str, str]) -> dict[str, str]:
        chosen = {name: param.doc or texts.get(name, "") for name, param in params.items()}
        return {name: text for name, text in chosen.items() if text}

    model = texts_of(None, "__init__")
    sample = model | texts_of("sample")
    scores = texts_of(*(f"{kind}_{score}" for score in card.scores for kind in ("score", "fit")))
    of_scores = {key: param for params in card.scores.values() for key, param in params.items()}
    return {
        "model": chosen(card.params, model),
        "sample": chosen(card.sample, sample),
        "ood": chosen(of_scores, sample | scores),
        **{name: chosen(params, sample | texts_of(name)) for name, params in card.do.items()},
    }


def first_words(card: ModelCard, method: str | None = None) -> str:
    """The first paragraph of the docstring of the class, or of a method, in one line and without shapes; ""
    where there is none."""
    nodes = (cls.methods.get(method) if method else cls.node for cls in card.lineage)
    node = next((node for node in nodes if node), None)
    paragraph = (ast.get_docstring(node) or "" if node else "").split("\n\n")[0]
    return _SHAPE.sub("", " ".join(paragraph.split()))


# ---------------------------------------------------------------------------- the class of a card


def load(name: str) -> type[Model]:
    """The model's class. Imports its file, and so torch."""
    return load_class(card(name))


def load_class(card: ModelCard) -> type[Model]:
    """The class that a card describes. Raises UsageError where a file from outside cannot be imported."""
    import importlib.util

    if card.family != OUTSIDE:
        return getattr(importlib.import_module(card.module), card.cls)
    if (module := sys.modules.get(card.module)) is None:
        spec = importlib.util.spec_from_file_location(card.module, card.path)
        assert spec is not None
        program = model_files.program(card.path)
        module = sys.modules[card.module] = importlib.util.module_from_spec(spec)
        try:
            # the loader itself would take a `__pycache__` beside the file, which nobody has read
            exec(compile(program, card.path, "exec", dont_inherit=True), module.__dict__)
        except BaseException as e:
            del sys.modules[card.module]
            if not isinstance(e, Exception):
                raise
            frames = traceback.extract_tb(e.__traceback__)
            lines = [frame.lineno for frame in frames if frame.filename == str(card.path)]
            place = f"{card.path}:{lines[-1]}" if lines and lines[-1] else str(card.path)
            raise UsageError(f"`{place}` cannot be imported: {type(e).__name__}: {e}") from e
    return getattr(module, card.cls)


# ---------------------------------------------------------------------------- a card from a file


@by_file
def read_card(path: Path) -> ModelCard | None:
    """The card of the model in a file; None where it holds none."""
    lineage = model_class(path)
    if lineage is None:
        return None
    bases_first = lineage[::-1]
    methods = {name: (node, cls.path) for cls in bases_first for name, node in cls.methods.items()}
    attributes = {name: (node, cls.path) for cls in bases_first for name, node in cls.attributes.items()}

    def params(method: str) -> dict[str, Param]:
        return {p.name: p for p in params_of(*methods[method])} if method in methods else {}

    def options(method: str) -> dict[str, Param]:
        return {name: p for name, p in params(method).items() if name not in GIVEN and not p.words & _INPUTS}

    def named(prefix: str) -> tuple[str, ...]:
        return tuple(name.removeprefix(prefix) for name in methods if name.startswith(prefix))

    values: dict[str, Any] = {name: value_of(*attributes[name]) for name in _ATTRIBUTES}
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    init = {name: p for name, p in params("__init__").items() if name not in ("self", "data")}
    stages = tuple(name for name, p in init.items() if p.annotation == "Model")
    do = {name: options(name) for name in APPLICATIONS if name in methods}
    scores = {name: options(f"fit_{name}") | options(f"score_{name}") for name in named("score_")}
    sample = options("sample")
    can = {
        "sample": True,
        "conditional": "conditional" in init,
        "prompt": "prompt" in sample,
        "log_prob": "log_prob" in methods,
        "ood": bool(scores) or "log_prob" in methods,
        "map": bool(named("map_")),
        "latent": "to_latent" in methods,
        "export": "to_diffusers" in methods,
    }
    family, module = _place(path)
    return ModelCard(
        name=path.stem,
        family=family,
        path=path,
        module=module,
        cls=lineage[0].node.name,
        lineage=tuple(lineage),
        paper=value_of(*attributes["paper"]),
        **values,
        params={name: p for name, p in init.items() if name not in stages},
        stages=stages,
        sample=sample,
        inputs=tuple(n for n, p in params("sample").items() if n not in GIVEN and "Tensor" in p.words),
        scores=scores,
        fits=named("fit_"),
        maps=named("map_"),
        do=do,
        labelled=tuple(name for name in do if "labels" in params(name)),
        masked=tuple(name for name in do if "mask" in params(name)),
        can=(*(name for name, true in can.items() if true), *do),
    )


def _place(path: Path) -> tuple[str, str]:
    """The family of a file, and the name of its module. A file from outside has a name for each of its
    states, because two runs may hold two versions of it."""
    if ROOT in path.parents:
        return path.parent.name, f"{__package__}.{path.parent.name}.{path.stem}"
    digest = hashlib.sha256(f"{path}:{stamp(path)}".encode()).hexdigest()[:12]
    return OUTSIDE, f"gzcli_outside_{digest}_{path.stem}"


@by_file
def model_class(path: Path) -> list[Class] | None:
    """The lineage of the file's model class: of several, the one named like the file, else the last."""
    if not model_files.names_paper(text_of(path)):
        return None  # a file of helpers, recognised without the cost of parsing it
    lineages = [lineage_of(path, name) for name in module_of(path).classes]
    models = [
        lineage
        for lineage in lineages
        if any(cls.is_model for cls in lineage) and any("paper" in cls.attributes for cls in lineage)
    ]
    models.sort(key=lambda lineage: lineage[0].node.name.lower() == path.stem.replace("_", ""))
    return models[-1] if models else None
