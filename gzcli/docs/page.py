"""The page of a model: facts of its file and recipe, the text written by hand, measured figures.

The text is `models/NAME.md`: a title, a paragraph, the key equation in TeX and as a terminal shows it, a line
that names the equation, and two lists, limits and code by others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from gzcli.core import measured
from gzcli.core.measured import Curve
from gzcli.core.sections import lists
from gzcli.models import catalog
from gzcli.models.catalog import ModelCard
from gzcli.models.signatures import Param
from gzcli.recipe.files import RecipeFile, find, read_chain
from gzcli.recipe.kinds import parse, words
from gzcli.recipe.schema import score_names
from gzcli.store import model_files
from gzcli.store.paths import recipe_names, spelling, trained_in
from gzcli.store.pretrained import Pretrained, every

ROOT = Path(__file__).parent

_FORM = re.compile(
    r"# (?P<title>.+?)\n\n(?P<text>.+?)\n\n\$\$(?P<tex>.+?)\$\$\n\n```\n(?P<equation>.+?)\n```\n\n"
    r"(?P<source>.+?)\n\n## Limits\n\n(?P<limits>.+?)\n\n## Code\n\n(?P<code>.+)",
    re.DOTALL,
)
_REMARK = re.compile(r"\s{2,}\((.+)\)$")  # what stands in brackets behind a command in the head of a recipe
_LIKELIHOOD = {
    "exact": "exact",
    "bound": "a lower bound",
    "ode": "by solving an ODE, with an estimated divergence",
}


@dataclass(frozen=True)
class Written:
    """A model in words.

    title: what it is called.
    text: what it is, in a paragraph, in Markdown.
    tex: the key equation in TeX.
    equation: the same in Unicode, in one line or more.
    source: where it is from, and what its symbols mean.
    limits: what it cannot do, a sentence or two each.
    code: (owner/name on GitHub, what it is) of code by others.
    """

    title: str
    text: str
    tex: str
    equation: str
    source: str
    limits: tuple[str, ...]
    code: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Option:
    """An option with its default, which the recipe may have changed, its type in words, and what it means."""

    name: str
    default: Any
    kind: str
    text: str


@dataclass(frozen=True)
class Group:
    """Options that are set in one way.

    title: what they are about.
    how: the words that set one.
    """

    title: str
    how: str
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Reference:
    """A reference run, or a stage of it.

    data, scale: of the league that it is from.
    stage: "" of a recipe without stages.
    """

    data: str
    scale: str
    stage: str
    curve: Curve


@dataclass(frozen=True)
class Page:
    """A model.

    name: as the user types it.
    recipe: name of the recipe that trains it; None: a model from outside.
    stage: name of the stage that it is in that recipe; "" of a recipe without stages.
    stages: the model of each stage of the recipe.
    about: the recipe in one line, else what the class says; "" of a model that is only ever a stage.
    words: what is written about it; None for a model from outside.
    likelihood: what its likelihood is; None: it has none.
    commands: (command, remark) to try.
    can: (command, what it does) of sampling and of each application.
    scores: (score or scores, what they are): its own, then those that its likelihood gives.
    remarks: the further lines of the recipe's head.
    references: curves of reference runs.
    drawn: (set, scale) of the leagues that have a picture of its samples.
    ready: those that come with gz, trained.
    places: (set, scale, row of the summary) of the leagues that it is in.
    costs: what its trainings cost, by set and scale.
    """

    name: str
    family: str
    paper: str
    recipe: str | None
    stage: str
    stages: Mapping[str, str]
    about: str
    words: Written | None
    likelihood: str | None
    commands: tuple[tuple[str, str], ...]
    can: tuple[tuple[str, str], ...]
    scores: tuple[tuple[str, str], ...]
    groups: tuple[Group, ...]
    remarks: tuple[str, ...]
    references: tuple[Reference, ...]
    drawn: tuple[tuple[str, str], ...]
    ready: tuple[Pretrained, ...]
    places: tuple[tuple[str, str, Mapping[str, str]], ...]
    costs: tuple[Mapping[str, str], ...]


def page_of(what: str) -> Page:
    """The page of a model, or of the one in a file. Raises UsageError, with the nearest name, where there is
    none."""
    if model_files.is_file(what):
        find(what)  # makes its model known
        what = Path(what).stem
    card = catalog.card(what)
    name = spelling(card.name)
    recipe, stage = (name, "") if name in recipe_names() else trained_in(name) or (name, "")
    chain, _ = read_chain(recipe)
    stages = _stages(chain)
    stage = stage or next((key for key, model in stages.items() if model == name), "")
    alone = recipe != name  # a model that is only ever a stage
    serving = catalog.card(list(stages.values())[-1]) if stages and not alone else card
    head, remarks = _head(chain[-1].path)
    return Page(
        name=name,
        family=card.family,
        paper=card.paper,
        recipe=recipe if chain[-1].shipped else None,
        stage=stage,
        stages=stages,
        about="" if alone else chain[-1].own.get("about") or catalog.first_words(card),
        words=written(name),
        likelihood=_LIKELIHOOD[card.likelihood] if card.likelihood else None,
        commands=((f"gz train {recipe}", ""),) if alone else head,
        can=_can(card, serving, recipe, (list(stages) or [""])[-1]),
        scores=_scores(serving),
        groups=_groups(card, serving, chain, recipe, stage),
        remarks=() if alone else remarks,
        references=_references(recipe, [stage] if alone else list(stages) or [""]),
        drawn=tuple(place for place in measured.places() if measured.picture(recipe, *place).is_file()),
        ready=tuple(one for one in every() if one.model == recipe),
        places=tuple(
            (data, scale, row)
            for data, scale in measured.places()
            for row in measured.standings(data, scale)
            if row["model"] == recipe
        ),
        costs=tuple(measured.costs(recipe)),
    )


def _stages(chain: Sequence[RecipeFile]) -> dict[str, str]:
    """The model of each stage of a recipe, in order; {} without stages."""
    found: dict[str, str] = {}
    for file in chain:
        for stage, part in (file.own.get("stages") or {}).items():
            named = (part.get("model") or {}).get("name") or found.get(stage, "")
            found[stage] = spelling(named)
    return found


def _own(chain: Sequence[RecipeFile], stage: str) -> dict[str, Any]:
    """The sections that a recipe gives a model on every set, or one of its stages."""
    found: dict[str, Any] = {}
    for file in chain:
        tree = file.own.get("stages", {}).get(stage) or {} if stage else file.own
        for section, values in tree.items():
            found[section] = {**found.get(section, {}), **values} if isinstance(values, dict) else values
    return found


def _head(path: Path) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """The commands in the comment that a recipe begins with, each with its remark, and the comment's other
    lines but the first, joined."""
    head = list(takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines()))
    commands, rest = [], []
    for line in head[1:]:
        if not line.startswith("#   "):
            rest.append(line[1:].strip())
            continue
        remark = _REMARK.search(line)
        for part in re.split(r"\s{2,}then\s{2,}", line[4 : remark.start()] if remark else line[4:]):
            commands.append((part.strip(), remark[1] if remark else ""))
    return tuple(commands), tuple(rest)


def _can(card: ModelCard, serving: ModelCard, name: str, stage: str) -> tuple[tuple[str, str], ...]:
    """What the recipe `name` can do, each with its command.

    card: the model, which may be a first stage.
    serving: the model of the recipe's last stage, which draws and scores.
    stage: name of that stage.
    """
    found = [(f"gz sample {name}", "samples")]
    first = ""
    if "conditional" in serving.can:
        key = f"stages.{stage}.model.conditional" if stage else "model.conditional"
        told = serving.params["conditional"].default is True
        first = "" if told else f", after `--set {key}=true` in training"
        found.append((f"gz sample {name} --label 3", f"samples of a class{first}"))
    if "prompt" in serving.can:
        found.append((f'gz sample {name} --prompt "a red door"', "samples of a text"))
    for do in serving.do:
        told_first = first if do in serving.unlabelled_lack else ""
        found.append((f"gz sample {name} --do {do}", catalog.first_words(serving, do) + told_first))
    if "ood" in serving.can:
        sets = "--out SET" if serving.needs else "--in mnist --out fashionmnist"
        found.append((f"gz ood {name} {sets}", "how well it tells foreign images"))
    if "map" in serving.can:
        found.append((f"gz ood {name} --in mnist --input DIR --map", "where pictures are strange"))
    if "prompt" not in serving.can and "translate" not in serving.do:
        found.append((f"gz bench {name} --data mnist", "its figures beside the floor of real images"))
    if "latent" in card.can:
        found.append((f"gz train fm --set data.latent={name}", "a model of its latents"))
    if "export" in serving.can:
        found.append((f"gz runs export {name} --to diffusers", "a folder that diffusers loads"))
    return tuple(found)


def _scores(card: ModelCard) -> tuple[tuple[str, str], ...]:
    """The model's own scores, and in one row those that every likelihood gives."""
    names = score_names(card)
    own = [(name, catalog.first_words(card, f"score_{name}")) for name in card.scores]
    general = ", ".join(name for name in names if name not in card.scores)
    return (*own, (general, "made of its likelihood, as of every model's")) if general else tuple(own)


def _groups(
    card: ModelCard, serving: ModelCard, chain: Sequence[RecipeFile], name: str, stage: str
) -> tuple[Group, ...]:
    """The options of a model, and those of the verbs that a recipe's last stage, `serving`, answers.

    name: of the recipe.
    stage: the model's own.
    """
    last = (list(_stages(chain)) or [""])[-1]
    own = _own(chain, stage)
    verbs = own if serving is card else _own(chain, last)
    texts, told = catalog.option_texts(card), catalog.option_texts(serving)
    key = f"stages.{stage}.model.KEY" if stage else "model.KEY"
    found = [
        Group(
            "Model",
            f"gz train {name} --set {key}=VALUE",
            _listed(card.params, texts["model"], own.get("model")),
        ),
        Group(
            "Sampling",
            f"gz sample {name} --KEY VALUE",
            _listed(serving.sample, told["sample"], verbs.get("sample")),
        ),
    ]
    for do, params in serving.do.items():
        new = {key: param for key, param in params.items() if serving.sample.get(key) != param}
        found.append(
            Group(f"`{do}`", f"gz sample {name} --do {do} --KEY VALUE", _listed(new, told[do], None))
        )
    scored = {key: param for options in serving.scores.values() for key, param in options.items()}
    found.append(
        Group("Scores", f"gz ood {name} --KEY VALUE", _listed(scored, told["ood"], verbs.get("ood")))
    )
    return tuple(group for group in found if group.options)


def _listed(
    params: Mapping[str, Param], texts: Mapping[str, str], own: Mapping[str, Any] | None
) -> tuple[Option, ...]:
    defaults = lists({name: param.default for name, param in params.items()})
    return tuple(
        Option(
            name=name,
            default=(own or {}).get(name, None if param.required else defaults[name]),
            kind=words(parse(param.annotation)),
            text=texts.get(name, ""),
        )
        for name, param in params.items()
    )


def _references(recipe: str, stages: Sequence[str]) -> tuple[Reference, ...]:
    return tuple(
        Reference(data, scale, stage, found)
        for data, scale in measured.places()
        for stage in stages
        if (found := measured.curve(recipe, data, scale, stage))
    )


def written(name: str) -> Written | None:
    """What is written about a model, by the name that a user types; None: nothing is."""
    path = ROOT / "models" / f"{name}.md"
    if not path.is_file():
        return None
    found = _FORM.fullmatch(path.read_text(encoding="utf-8").strip())
    if found is None:
        raise ValueError(f"{path} has another form than `page.py` says")
    code = (item.partition(": ") for item in _items(found["code"]))
    return Written(
        title=found["title"],
        text=_line(found["text"]),
        tex=found["tex"],
        equation=found["equation"],
        source=_line(found["source"]),
        limits=_items(found["limits"]),
        code=tuple((name, words) for name, _, words in code),
    )


def _line(text: str) -> str:
    return " ".join(text.split())


def _items(text: str) -> tuple[str, ...]:
    """The items of a Markdown list."""
    return tuple(map(_line, re.split(r"^- ", text, flags=re.MULTILINE)[1:]))
