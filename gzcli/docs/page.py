"""The page of a model: facts of its file and recipe, the text written by hand, measured figures; and the
page as Markdown, for the site and for terminals.

The text is `models/NAME.md`: a title, a paragraph, the key equation in TeX and as a terminal shows it, a line
that names the equation, and two lists, limits and code by others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from gzcli.core import measured
from gzcli.core.measured import Curve
from gzcli.core.sections import lists
from gzcli.core.units import about, count, duration, figure
from gzcli.models import catalog
from gzcli.models.catalog import ModelCard, Param
from gzcli.recipe.files import RecipeFile, find, read_chain
from gzcli.recipe.schema import parse, score_names, words
from gzcli.recipe.yaml import flow
from gzcli.store import model_files
from gzcli.store.paths import recipe_names, spelling, trained_in
from gzcli.store.pretrained import Pretrained, every

ROOT = Path(__file__).parent
COLUMNS = 72  # of a command, before it is broken
POINTS = 6  # of a curve
_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")

_FORM = re.compile(  # the fields of `Written` in their order
    r"# (.+?)\n\n(.+?)\n\n\$\$(.+?)\$\$\n\n```\n(.+?)\n```\n\n(.+?)\n\n## Limits\n\n(.+?)\n\n## Code\n\n(.+)",
    re.DOTALL,
)
_REMARK = re.compile(r"\s{2,}\((.+)\)$")  # what stands in brackets behind a command in the head of a recipe
_ODE = "by solving an ODE, with an estimated divergence"
_LIKELIHOOD = {"exact": "exact", "bound": "a lower bound", "ode": _ODE}


@dataclass(frozen=True)
class Written:
    """A model in words."""

    title: str
    text: str  # what it is, in a paragraph, in Markdown
    tex: str  # the key equation in TeX
    equation: str  # the same in Unicode, in one line or more
    source: str  # where it is from, and what its symbols mean
    limits: tuple[str, ...]  # what it cannot do, a sentence or two each
    code: tuple[tuple[str, str], ...]  # (owner/name on GitHub, what it is) of code by others


@dataclass(frozen=True)
class Option:
    """An option with its default, which the recipe may have changed, its type in words, and what it means."""

    name: str
    default: Any
    kind: str
    text: str


@dataclass(frozen=True)
class Group:
    """Options that are set in one way."""

    title: str
    how: str  # the words that set one
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Reference:
    """A reference run of a league, or a stage of it."""

    data: str
    scale: str
    stage: str  # "" of a recipe without stages
    curve: Curve


@dataclass(frozen=True)
class Page:
    """A model."""

    name: str  # as the user types it
    family: str
    paper: str
    recipe: str | None  # name of the recipe that trains it; None: a model from outside
    stage: str  # name of the stage that it is in that recipe; "" of a recipe without stages
    stages: Mapping[str, str]  # the model of each stage of the recipe
    about: str  # the recipe in one line, else what the class says; "" of a model that is only ever a stage
    words: Written | None  # what is written about it; None for a model from outside
    likelihood: str | None  # what its likelihood is; None: it has none
    commands: tuple[tuple[str, str], ...]  # (command, remark) to try
    can: tuple[tuple[str, str], ...]  # (command, what it does) of sampling and of each application
    scores: tuple[tuple[str, str], ...]  # (score or scores, what they are): its own, then of its likelihood
    groups: tuple[Group, ...]
    remarks: tuple[str, ...]  # the further lines of the recipe's head
    references: tuple[Reference, ...]
    drawn: tuple[tuple[str, str], ...]  # (set, scale) of the leagues that have a picture of its samples
    ready: tuple[Pretrained, ...]  # those that come with gz, trained
    places: tuple[tuple[str, str, Mapping[str, str]], ...]  # (set, scale, row of the summary) of its leagues
    costs: tuple[Mapping[str, str], ...]  # what its trainings cost, by set and scale


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
        references=tuple(
            Reference(data, scale, each, curve)
            for data, scale in measured.places()
            for each in ([stage] if alone else list(stages) or [""])
            if (curve := measured.curve(recipe, data, scale, each))
        ),
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
    models: dict[str, str] = {}
    for file in chain:
        for stage, part in (file.own.get("stages") or {}).items():
            models[stage] = spelling((part.get("model") or {}).get("name") or models.get(stage, ""))
    return models


def _own(chain: Sequence[RecipeFile], stage: str) -> dict[str, Any]:
    """The sections that a recipe gives a model on every set, or one of its stages."""
    sections: dict[str, Any] = {}
    for file in chain:
        tree = file.own.get("stages", {}).get(stage) or {} if stage else file.own
        for name, values in tree.items():
            sections[name] = {**sections.get(name, {}), **values} if isinstance(values, dict) else values
    return sections


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
    can, key = serving.can, f"stages.{stage}.model.conditional" if stage else "model.conditional"
    always = "conditional" in can and serving.params["conditional"].default is True
    first = "" if always or "conditional" not in can else f", after `--set {key}=true` in training"
    sets = "--out SET" if serving.needs else "--in mnist --out fashionmnist"
    rows = [
        (True, f"gz sample {name}", "samples"),
        ("conditional" in can, f"gz sample {name} --label 3", f"samples of a class{first}"),
        ("prompt" in can, f'gz sample {name} --prompt "a red door"', "samples of a text"),
    ]
    for do in serving.do:
        does = catalog.first_words(serving, do) + (first if do in serving.unlabelled_lack else "")
        rows.append((True, f"gz sample {name} --do {do}", does))
    figures, benched = "its figures beside the floor of real images", not {"prompt", "translate"} & {*can}
    rows += [
        ("ood" in can, f"gz ood {name} {sets}", "how well it tells foreign images"),
        ("map" in can, f"gz ood {name} --in mnist --input DIR --map", "where pictures are strange"),
        (benched, f"gz bench {name} --data mnist", figures),
        ("latent" in card.can, f"gz train fm --set data.latent={name}", "a model of its latents"),
        ("export" in can, f"gz runs export {name} --to diffusers", "a folder that diffusers loads"),
    ]
    return tuple((command, what) for holds, command, what in rows if holds)


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
    own = _own(chain, stage)
    verbs = own if serving is card else _own(chain, (list(_stages(chain)) or [""])[-1])
    texts = catalog.option_texts(serving)
    key = f"stages.{stage}.model.KEY" if stage else "model.KEY"

    def group(
        title: str, how: str, params: Mapping[str, Param], texts: Mapping[str, str], values: Any = None
    ) -> Group:
        defaults = lists({name: param.default for name, param in params.items()}) | dict(values or {})
        options = (
            Option(name, defaults[name], words(parse(param.annotation)), texts.get(name, ""))
            for name, param in params.items()
        )
        return Group(title, how, tuple(options))

    model = catalog.option_texts(card)["model"]
    groups = [
        group("Model", f"gz train {name} --set {key}=VALUE", card.params, model, own.get("model")),
        group(
            "Sampling", f"gz sample {name} --KEY VALUE", serving.sample, texts["sample"], verbs.get("sample")
        ),
    ]
    for do, params in serving.do.items():
        new = {key: param for key, param in params.items() if serving.sample.get(key) != param}
        groups.append(group(f"`{do}`", f"gz sample {name} --do {do} --KEY VALUE", new, texts[do]))
    scored = {key: param for options in serving.scores.values() for key, param in options.items()}
    groups.append(group("Scores", f"gz ood {name} --KEY VALUE", scored, texts["ood"], verbs.get("ood")))
    return tuple(group for group in groups if group.options)


def written(name: str) -> Written | None:
    """What is written about a model, by the name that a user types; None: nothing is."""
    path = ROOT / "models" / f"{name}.md"
    if not path.is_file():
        return None
    match = _FORM.fullmatch(path.read_text(encoding="utf-8").strip())
    if match is None:
        raise ValueError(f"{path} has another form than `page.py` says")
    title, text, tex, equation, source, limits, code = match.groups()
    others = tuple((name, words) for name, _, words in (item.partition(": ") for item in _items(code)))
    return Written(title, _line(text), tex, equation, _line(source), _items(limits), others)


def _line(text: str) -> str:
    return " ".join(text.split())


def _items(text: str) -> tuple[str, ...]:
    """The items of a Markdown list."""
    return tuple(map(_line, re.split(r"^- ", text, flags=re.MULTILINE)[1:]))


# ---------------------------------------------------------------------------- Markdown


def as_markdown(page: Page, site: bool = False) -> str:
    """The page.

    site: with MathML, pictures, and links to the pages beside it; else with the equation in Unicode.
    """
    return "\n".join(_lines(page, site)).rstrip() + "\n"


def as_text(markdown: str, width: int) -> str:
    """Markdown as plain text of at most `width` columns."""
    from rich.console import Console  # loaded by the verbs that print a page
    from rich.markdown import Markdown

    headings = re.sub(r"^##+ (.+)$", lambda match: match[1].upper(), markdown, flags=re.MULTILINE)
    plain = headings.removeprefix("# ")
    console = Console(width=width, no_color=True, force_terminal=False)
    with console.capture() as capture:
        console.print(Markdown(plain, hyperlinks=False))
    text = "\n".join(line.rstrip() for line in capture.get().splitlines())
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _lines(page: Page, site: bool) -> Iterator[str]:
    yield from (f"# {page.name}", "", *_title(page, site))
    yield from (*_pictures(page), "") if site else ()
    yield from (f"Likelihood: {page.likelihood}.", "") if page.likelihood else ()
    for one in page.ready:
        best, params, seconds, _ = one.cells
        yield f"`gz sample pretrained:{one.name}` comes with gz: {params} parameters, {best}, trained for"
        yield from (f"{seconds} of a CPU core.", "")
    for stage, model in page.stages.items():
        if model != page.name:
            link = f"[{model}]({model}.md)" if site else f"`{model}`"
            yield from (f"Its stage `{stage}` is a {link}.", "")
    yield from ("## Try", "", "```")
    for command, remark in page.commands:
        yield from folded(command)
        yield from (f"    ({remark})",) if remark else ()
    yield from ("```", "", "## Applications", "", *bullets((f"`{do}`", what) for do, what in page.can))
    if page.scores:
        yield from ("## Out-of-distribution scores", "")
        yield from bullets((f"`{name}`", what) for name, what in page.scores)
    for group in page.groups:
        yield from (f"### {group.title}", "", f"`{group.how}`", "")
        yield from bullets((f"`{o.name}={flow(o.default)}` ({o.kind})", o.text) for o in group.options)
    yield from _measured(page, site)
    if page.remarks:
        yield from ("## Notes of the recipe", "", " ".join(page.remarks), "")
    if page.words:
        link = "[{0}](https://github.com/{0})" if site else "https://github.com/{0}"
        yield from ("## Limits", "", *bullets((limit, "") for limit in page.words.limits))
        yield "## Code by others"
        yield ""
        yield from bullets((link.format(name), what) for name, what in page.words.code)


def _title(page: Page, site: bool) -> Iterator[str]:
    words = page.words
    title = words.title if words else page.about or page.name
    paper = re.sub(_ARXIV, r"[arXiv:\1](https://arxiv.org/abs/\1)", page.paper) if site else page.paper
    yield from (f"**{title}** · {page.family.replace('_', ' ')} · {paper}", "")
    if words:
        equation = [mathml(words.tex)] if site else ["```text", words.equation, "```"]
        yield from (words.text, "", *equation, "", words.source, "")


def _pictures(page: Page) -> Iterator[str]:
    for data, scale in page.drawn:
        text = f"Samples of a run of a league, {data} at scale {scale}"
        yield from (f"![{text}]({picture_name(page.recipe or page.name, data, scale)})", "", f"*{text}.*", "")
    for one in page.ready:
        yield from (f"![Samples of gz sample pretrained:{one.name}](../{ready_picture(one)})", "")


def _measured(page: Page, site: bool) -> Iterator[str]:
    """Costs, places in leagues, curves of reference runs."""
    if page.costs:
        yield from ("## What a training costs", "")
        head = ("data", "scale", "parameters", "steps", "on a CPU", "on an H100")
        yield from table(head, [_cost_cells(row) for row in page.costs])
        machine = page.costs[0]["machine"]
        yield (f"CPU: {machine}. " if machine else "") + f"On yours: `gz train {page.name} --dry-run`."
        yield ""
    for data, scale, row in page.places:
        place = f"place {row['place']}, " if row["place"] else ""
        league = "[league](../league.md)" if site else "league"
        yield from (f"In the {league} of {data} at scale {scale}: {place}{_place_in_words(row)}.", "")
    for reference in page.references:
        stage = f", stage {reference.stage}" if reference.stage else ""
        yield from (f"## Reference curve, {reference.data} at scale {reference.scale}{stage}", "")
        yield from (f"{reference.curve.metric} on validation images", "")
        points = reference.curve.points
        chosen = sorted({round(i * (len(points) - 1) / (POINTS - 1)) for i in range(POINTS)})
        rows = [(f"{points[i][0]:,}", duration(points[i][1]), figure(points[i][2])) for i in chosen]
        yield from table(("step", "time", reference.curve.metric), rows)


def _cost_cells(row: Mapping[str, str]) -> tuple[str, ...]:
    seconds = [about(float(row[key])) if row[key] else "-" for key in ("seconds", "seconds_on_h100")]
    return (row["data"], row["scale"], count(float(row["params"])), f"{int(row['steps']):,}", *seconds)


def _place_in_words(row: Mapping[str, str]) -> str:
    """A row of a league's summary: multiple of the floor, time of training, seconds an image."""
    relative = f"{float(row['times_floor']):.3g} × the floor" if row["times_floor"] else "no figure"
    trained = duration(float(row["train_seconds"])) if row["train_seconds"] else "-"
    speed = f", {float(row['sample_seconds']):.2g} s an image" if row["sample_seconds"] else ""
    return f"{relative} after {trained} of training{speed}"


def picture_name(recipe: str, data: str, scale: str) -> str:
    """The path of a picture of samples on the site, beside the pages of models."""
    return f"samples/{data}-{scale}-{recipe}.png"


def ready_picture(one: Pretrained) -> str:
    """The path of the picture of a pretrained model on the site."""
    return f"pretrained/{one.name}.png"


def mathml(tex: str) -> str:
    """An equation that a browser draws without a script."""
    from latex2mathml.converter import convert  # an optional package, which the site alone needs

    plain = re.sub(r"\\[bB]igg?(?![a-zA-Z])", "", " ".join(tex.split()))  # brackets of MathML stretch anyway
    return f'<div class="equation">{convert(plain, display="block")}</div>'


def bullets(pairs: Iterable[tuple[str, str]]) -> Iterator[str]:
    """A list of terms with their meaning, and a blank line."""
    for term, meaning in pairs:
        yield f"- {term}: {meaning}" if meaning else f"- {term}"
    yield ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table, and a blank line."""
    for row in (head, ["---"] * len(head), *rows):
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
    yield ""


def folded(command: str) -> Iterator[str]:
    """A command in lines that a shell joins again, broken before options."""
    line = ""
    for part in re.split(r" (?=--?\w)", command):
        if line and len(line) + len(part) > COLUMNS - 3:
            yield f"{line} \\"
            line = f"    {part}"
        else:
            line = f"{line} {part}" if line else part
    yield line
