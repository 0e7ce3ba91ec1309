"""The trained models that come with gz: files of `gz runs export` in the package's folder `pretrained`, named
MODEL-DATA.safetensors. Every verb accepts one as `pretrained:cfm`; `pretrained:cfm-digits`, or `--data
digits`, also selects the data set. A wheel contains one or two models of each family. The others, in `more`,
are only in a clone of gz; `more.json` lists them with their checksums."""

from __future__ import annotations

import base64
import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gzcli.core.errors import MissingError, UsageError, canonical, did_you_mean, matching
from gzcli.core.hints import advice, gz
from gzcli.core.sections import titled
from gzcli.core.units import count, duration, short, size
from gzcli.store.files import read_json, safetensors_header
from gzcli.store.paths import recipe_names
from gzcli.store.run_folder import STAGES

PREFIX = "pretrained:"
PRETRAINED_FOLDER = Path(__file__).resolve().parents[1] / "pretrained"
MORE = "more"
PREFERRED_SETS = (
    "emoji",
    "glyphs",
    "shapes",
    "digits",
)  # the preferred sets, in this order, if none is named
DEFAULT_MODEL = f"{PREFIX}cfm"  # model used if none is named


@dataclass(frozen=True)
class Pretrained:
    """A trained model that comes with gz."""

    name: str  # as `cfm-digits`
    file: Path
    model: str  # as the user types it
    title: str  # as people call it: `fm +100 clusters`
    data: str  # key of its data set
    card: dict[str, Any]  # what `gz runs export` records about a run
    preview: bytes  # a PNG of its samples

    @property
    def figures(self) -> list[dict[str, Any]]:
        """Its results of `gz bench`: name, value, n, way of drawing, floor (equally many real images, drawn
        alike), and excess over the floor with its 95 % interval."""
        return [row for row in measured() if row["model"] == self.name]

    @property
    def variant(self) -> str:
        """How the samples of its metric were drawn, such as `+100 clusters, guided 1.3`; "" for the model
        alone."""
        title: str = self.figures[0]["title"] if self.figures else self.title
        return title.removeprefix(self.model).strip(" ,")

    @property
    def guidance(self) -> str | None:
        """The guidance scale of the samples of its metric; None without guidance."""
        return self.variant.partition("guided ")[2] or None

    @property
    def command(self) -> str:
        return f"gz sample {PREFIX}{self.name}"

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        """Its table cells: metric, excess over real images, parameters, seconds of training on one core, and
        size."""
        best = excess = "-"
        if self.figures:
            row = self.figures[0]
            value, low, high = row["excess"]
            half = short((high - low) / 2, 2)
            best, excess = f"{row['name']} {short(row['value'])}", f"{short(value)} ± {half}"
        params, seconds = count(self.card["params"]), duration(self.card["work"])
        return best, excess, params, seconds, size(self.file.stat().st_size)


@cache  # cached, because the pages of all models ask for them
def every() -> tuple[Pretrained, ...]:
    """The installed models, grouped by data set, the best first."""
    models = []
    for name, file in pretrained_names().items():
        texts = safetensors_header(file)["__metadata__"]
        card, preview = json.loads(texts["card"]), base64.b64decode(texts["preview"])
        (model, data), recipe = parts_of(name), json.loads(texts["recipe"])
        title = titled(model, (recipe.get(STAGES) or {"": recipe}).values())
        models.append(Pretrained(name, file, model, title, data, card, preview))
    excess = {row["model"]: row["excess"][0] for row in reversed(measured())}
    return tuple(sorted(models, key=lambda one: (one.data, excess.get(one.name, math.inf))))


@cache
def measured() -> list[dict[str, Any]]:
    """The results of `gz bench` on all files, including those that are not installed."""
    return read_json(PRETRAINED_FOLDER / "figures.json") or []


def spelled(model: str, pretrained: bool) -> str:
    """The name of a model in the spelling that every verb accepts, for `MODEL --pretrained` or `--pretrained`
    alone."""
    if not pretrained or model.startswith(PREFIX):
        return model
    return f"{PREFIX}{model}" if model else DEFAULT_MODEL


def is_name(ref: str) -> bool:
    return ref.startswith(PREFIX)


def pretrained_names() -> dict[str, Path]:
    """The installed files by name, such as `cfm-digits`."""
    files = [
        *PRETRAINED_FOLDER.glob("*.safetensors"),
        *PRETRAINED_FOLDER.joinpath(MORE).glob("*.safetensors"),
    ]
    return {file.stem: file for file in sorted(files, key=lambda file: file.stem)}


def elsewhere() -> dict[str, str]:
    """The SHA-256 checksums, by name, of the files that only a clone of gz contains."""
    listed: dict[str, str] = read_json(PRETRAINED_FOLDER / f"{MORE}.json") or {}
    return {name: checksum for name, checksum in listed.items() if name not in pretrained_names()}


def parts_of(name: str) -> tuple[str, str]:
    """The model and the data set in a file's name. Both may contain a `-`, so the longest matching model is
    taken."""
    fits = [m for m in recipe_names() if canonical(name).startswith(canonical(m) + "_")]
    model = max(fits, key=len, default=name.partition("-")[0])
    return model, name[len(model) + 1 :]


def file_of(ref: str, data: str | None = None) -> Path:
    """The file of `pretrained:MODEL-DATA`, or of `pretrained:MODEL`, preferably on a set of PREFERRED_SETS.
    Raises UsageError for an unknown name. Raises MissingError if the model has no file for that set, or if
    the file is only in a clone."""
    name, here = ref.removeprefix(PREFIX), pretrained_names()
    every_name = [*here, *elsewhere()]
    if stem := matching(name, every_name):
        return _file(stem)
    parts = {stem: parts_of(stem) for stem in every_name}
    sets = {key: stem for stem, (model, key) in parts.items() if matching(name, [model])}
    if not sets:
        hint = did_you_mean(name, every_name) or advice("{} lists them", gz("list", "pretrained"))
        raise UsageError(f"no pretrained model is called `{name}`", hint=hint)
    if data is None:
        first = [key for key in PREFERRED_SETS if key in sets] or list(sets)
        return _file(sets[next((key for key in first if sets[key] in here), first[0])])
    if key := matching(data, sets):
        return _file(sets[key])
    message = f"there is no pretrained `{name}` for `{data}`"
    raise MissingError(
        message,
        hint=advice(f"use one for {', '.join(sets)}, or train one: {{}}", gz("train", name, data=data)),
    )


def _file(name: str) -> Path:
    """The file of a model. Raises MissingError if it is only in a clone."""
    if file := pretrained_names().get(name):
        return file
    path = f"gzcli/{PRETRAINED_FOLDER.name}/{MORE}/{name}.safetensors"
    hint = f"use the file from the gz repository: `{path}`, SHA-256 {elsewhere()[name][:12]}…"
    raise MissingError(f"`{PREFIX}{name}` is not included in the installed package", hint=hint)
