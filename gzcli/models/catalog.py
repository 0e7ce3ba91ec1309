"""What each model is and can do, read from its file with `ast`, so that neither listing nor resolving imports
torch.

A model file is `models/<family>/<name>.py`. It holds a class that derives from `Model`, directly or not, and
names its `paper`; files of nets, layers or samplers hold none. The folder is the registry.
"""

from __future__ import annotations

import ast
import hashlib
import sys
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from glob import escape
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from gzcli.core.errors import UsageError, canonical, did_you_mean
from gzcli.metrics.likelihood_scores import SCORES
from gzcli.models.signatures import GIVEN, Param, params_of, value_of
from gzcli.models.sources import ROOT, Class, by_file, classes_of, lineage_of, method_of, stamp, text_of
from gzcli.store import model_files
from gzcli.store.run_folder import Run

if TYPE_CHECKING:
    from gzcli.models.base import Model

APPLICATIONS = (
    "reconstruct",
    "interpolate",
    "traverse",
    "translate",
    "inpaint",
    "upscale",
    "complete",
    "edit",
    "classify",
)

_INPUTS = {"Tensor", "Module", "Noise", "Progress", "Batch", "Callable", "Iterable", "Iterator"}

OUTSIDE = "outside"  # the family of models from outside the package


@dataclass(frozen=True)
class ModelCard:
    """A model as its file describes it."""

    name: str
    family: str
    path: Path
    module: str
    cls: str
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


def cards() -> dict[str, ModelCard]:
    """Every model by name: the zoo in order of family and name, then models from outside the package."""
    found: dict[str, ModelCard] = {}
    for path in (*_zoo(), *model_files.model_files().values()):
        if card := _read_card(path):
            found.setdefault(card.name, card)
    return found


def counted(trained: int, staged: int) -> str:
    """The number of models in words: those that are trained by name, then those that are a stage alone."""
    stages = f", and {staged} that only ever {'is' if staged == 1 else 'are'} a stage of one"
    return f"{trained} model{'' if trained == 1 else 's'}{stages if staged else ''}"


def card(name: str) -> ModelCard:
    """The card of one model, from its file and the files of its bases alone; `-` and `_` are alike.

    A file that was named by its path comes first, then the zoo, then other files from outside the package.
    Raises UsageError with the nearest name where there is no such model.
    """
    zoo = _zoo(escape(canonical(name)))
    # installed packages are searched last: that takes longer than all else
    for path in chain(filter(None, [model_files.typed(name)]), zoo, _elsewhere(name)):
        if found := _read_card(path):
            return found
    hint = did_you_mean(name, cards()) or "`gz list models` names them all"
    raise UsageError(f"no model is called `{name}`", hint=hint)


def _elsewhere(name: str) -> Iterator[Path]:
    if path := model_files.find(name):
        yield path


def card_of(run: Run, name: str) -> ModelCard:
    """The card of the model that a run, or a stage of it, has trained. For a model from outside the package,
    it is read from the run's copy of the file."""
    kept = model_files.kept(run.owner.path, name)
    return card_at(kept) if kept else card(name)


def card_at(path: Path) -> ModelCard:
    """The card of the model in a file. Raises UsageError where it holds none."""
    if found := _read_card(path):
        return found
    raise UsageError(
        f"`{path}` holds no model", hint="a class that derives from `gzcli.Model` and names its `paper`"
    )


def likelihood_scores(*, log_prob: bool, own: Iterable[str]) -> tuple[str, ...]:
    """The out-of-distribution scores that the engine computes from a model's likelihood.

    log_prob: whether the model has `log_prob`, the likelihood of pixels.
    own: the names of the model's own scores; its `nll` may be the likelihood of codes, which is not compared
      with the length of a lossless code of the pixels.
    """
    if log_prob:
        return tuple(SCORES)
    return tuple(name for name, s in SCORES.items() if "code_length" not in s.reads) if "nll" in own else ()


def load(name: str) -> type[Model]:
    """The model's class. Imports its file, and so torch."""
    return load_class(card(name))


def load_class(found: ModelCard) -> type[Model]:
    """The class that a card describes. Raises UsageError where a file from outside cannot be imported."""
    import importlib.util

    if found.family != OUTSIDE:
        return getattr(importlib.import_module(found.module), found.cls)
    if (module := sys.modules.get(found.module)) is None:
        spec = importlib.util.spec_from_file_location(found.module, found.path)
        assert spec is not None
        program = model_files.program(found.path)
        module = sys.modules[found.module] = importlib.util.module_from_spec(spec)
        try:
            # the loader itself would take a `__pycache__` beside the file, which nobody has read
            exec(compile(program, found.path, "exec", dont_inherit=True), module.__dict__)
        except BaseException as e:
            del sys.modules[found.module]
            if not isinstance(e, Exception):
                raise
            frames = traceback.extract_tb(e.__traceback__)
            lines = [frame.lineno for frame in frames if frame.filename == str(found.path)]
            place = f"{found.path}:{lines[-1]}" if lines and lines[-1] else str(found.path)
            raise UsageError(f"`{place}` cannot be imported: {type(e).__name__}: {e}") from e
    return getattr(module, found.cls)


def phases(model: ModelCard) -> tuple[str, ...] | None:
    """The names of the model's phases, from the `Phase("critic", …)` calls of its `phases`.

    None where the calls do not name them by literals: then only the trainer knows them.
    """
    for cls in lineage_of(model.path, model.cls):
        if "phases" in cls.methods:
            nodes = ast.walk(method_of(cls, "phases"))
            names = [_phase_name(node) for node in nodes if isinstance(node, ast.Call) and _is_phase(node)]
            return tuple(dict.fromkeys(filter(None, names))) if names and None not in names else None
    return ("main",)


def _is_phase(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id == "Phase"


def _phase_name(call: ast.Call) -> str | None:
    node = call.args[0] if call.args else next((k.value for k in call.keywords if k.arg == "name"), None)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


# ---------------------------------------------------------------------------- a card from a file


def _zoo(stem: str = "*") -> list[Path]:
    """The files of the package that may hold a model; `stem` is a pattern of their names without `.py`."""
    found = ROOT.glob(f"*/{stem}.py")
    return sorted(path for path in found if path.parent.name != "nn" and path.stem != "__init__")


@by_file
def _read_card(path: Path) -> ModelCard | None:
    lineage = model_class(path)
    if lineage is None:
        return None
    first = lineage[0]
    methods = {name: method for cls in reversed(lineage) for name, method in cls.methods.items()}
    owners = {name: cls.path for cls in reversed(lineage) for name in cls.methods}
    attributes = {name: value for cls in reversed(lineage) for name, value in cls.attributes.items()}

    def params(method: str) -> dict[str, Param]:
        return {p.name: p for p in params_of(methods[method], owners[method])} if method in methods else {}

    def options(method: str) -> dict[str, Param]:
        return {name: p for name, p in params(method).items() if name not in GIVEN and not _is_input(p)}

    def named(prefix: str) -> list[str]:
        return [name.removeprefix(prefix) for name in methods if name.startswith(prefix)]

    init = {name: p for name, p in params("__init__").items() if name not in ("self", "data")}
    stages = tuple(name for name, p in init.items() if p.annotation == "Model")
    do = {name: options(name) for name in APPLICATIONS if name in methods}
    scores = {name: options(f"fit_{name}") | options(f"score_{name}") for name in named("score_")}
    drawn_by = options("sample")
    can = {
        "sample": True,
        "conditional": "conditional" in init,
        "prompt": "prompt" in drawn_by,
        "log_prob": "log_prob" in methods,
    }
    can["ood"] = bool(scores) or can["log_prob"]
    can["map"] = bool(named("map_"))
    can |= {"latent": "to_latent" in methods, "export": "to_diffusers" in methods}
    return ModelCard(
        name=path.stem,
        family=path.parent.name if ROOT in path.parents else OUTSIDE,
        path=path,
        module=_module_name(path),
        cls=first.node.name,
        paper=value_of(attributes["paper"], path),
        needs=tuple(value_of(attributes["needs"], path)) if "needs" in attributes else (),
        likelihood=value_of(attributes["likelihood"], path) if "likelihood" in attributes else None,
        best=value_of(attributes["best"], path) if "best" in attributes else "auto",
        latents="latents" in attributes and value_of(attributes["latents"], path),
        square="square" in attributes and value_of(attributes["square"], path),
        shares="shares" in attributes and value_of(attributes["shares"], path),
        params={name: p for name, p in init.items() if name not in stages},
        stages=stages,
        sample=drawn_by,
        inputs=tuple(
            name for name, p in params("sample").items() if name not in GIVEN and "Tensor" in _words(p)
        ),
        scores=scores,
        fits=tuple(named("fit_")),
        maps=tuple(named("map_")),
        do=do,
        labelled=tuple(name for name in do if "labels" in params(name)),
        masked=tuple(name for name in do if "mask" in params(name)),
        labels_for=tuple(value_of(attributes["labels_for"], path)) if "labels_for" in attributes else (),
        with_labels=tuple(value_of(attributes["with_labels"], path)) if "with_labels" in attributes else (),
        can=(*(name for name, true in can.items() if true), *do),
    )


def _module_name(path: Path) -> str:
    """The name that a file is imported by. A file from outside has one for each of its states, because two
    runs may hold two versions of it."""
    if ROOT in path.parents:
        return f"{__package__}.{path.parent.name}.{path.stem}"
    return f"gzcli_outside_{hashlib.sha256(f'{path}:{stamp(path)}'.encode()).hexdigest()[:12]}_{path.stem}"


def model_class(path: Path) -> list[Class] | None:
    """The lineage of the file's model class: of several, the one named like the file, else the last."""
    if not model_files.names_paper(text_of(path)):
        return None  # a file of helpers, recognised without the cost of parsing it
    found = []
    for name in classes_of(path):
        lineage = lineage_of(path, name)
        if any(cls.is_model for cls in lineage) and any("paper" in cls.attributes for cls in lineage):
            found.append(lineage)
    found.sort(key=lambda lineage: lineage[0].node.name.lower() == path.stem.replace("_", ""))
    return found[-1] if found else None


def _is_input(param: Param) -> bool:
    return bool(_words(param) & _INPUTS)


def _words(param: Param) -> set[str]:
    """The names in the annotation of a parameter."""
    return set("".join(c if c.isalnum() or c == "_" else " " for c in param.annotation).split())
