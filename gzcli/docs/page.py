"""The manual as Markdown, for the site and for terminals. It consists of a page for each model, the other
pages in order, and the help of every command. A model's page combines its file, its recipe, measured metrics
and a hand-written text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from gzcli.core import measured
from gzcli.core.errors import canonical
from gzcli.core.measured import Curve
from gzcli.core.sections import Part, lists
from gzcli.core.units import about, count, duration, figure
from gzcli.docs.text import DOCS_FOLDER, Written, written
from gzcli.models import catalog
from gzcli.models.catalog import ModelCard, Param
from gzcli.recipe.files import RecipeFile, find, read_chain
from gzcli.recipe.resolve import resolve
from gzcli.recipe.schema import parse, score_names, words
from gzcli.recipe.yaml import flow, load
from gzcli.store import model_files
from gzcli.store.paths import about_of, recipe_names, spelling, trained_in
from gzcli.store.pretrained import Pretrained, every

TUTORIALS = ("first-model", "own-pictures", "ood-alarm", "compare")
GUIDES = (
    *("use", "data", "scale", "gpus", "ood", "bench", "sweep", "recipes"),
    *("latents", "stable-diffusion", "share", "demo", "adding", "own-method", "python", "questions"),
)
ORDER = (*TUTORIALS, *GUIDES)
COMMAND_COLUMNS = 72  # columns of a command before it is wrapped
CURVE_POINTS = 6  # of a curve

TARGET_FORMULAS = {"eps": "ε", "x0": "x₀", "v": "(α ε − σ x₀)/√(α² + σ²)", "velocity": "(α′ x₀ + σ′ ε)"}

_REMARK = re.compile(r"\s{2,}\((.+)\)$")  # remark in brackets after a command in the head of a recipe
_EXCESS = (
    "In parentheses: how much worse the value is than that of real images (the excess), ± half of the 95 % "
    "interval."
)
_LIKELIHOOD = {"exact": "exact", "bound": "a lower bound"}
_LIKELIHOOD |= {"ode": "by solving an ODE, with an estimated divergence"}


@dataclass(frozen=True)
class Option:
    """An option of a model."""

    name: str
    default: Any  # the recipe's value, if it has one
    kind: str  # its type in words
    text: str  # what it means


@dataclass(frozen=True)
class Group:
    """Options that are set in the same way."""

    title: str
    how: str  # the words with which one is set
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Reference:
    """A reference run of a league, or a stage of it."""

    data: str
    scale: str
    stage: str  # "" for a recipe without stages
    curve: Curve


@dataclass(frozen=True)
class Page:
    """A model."""

    name: str  # in the form that the user types
    family: str
    paper: str
    recipe: str | None  # name of the recipe that trains it; None: a model from outside
    stage: str  # name of its stage in that recipe; "" for a recipe without stages
    stages: Mapping[str, str]  # the model of each stage of the recipe
    about: str  # the recipe in one line, otherwise the class's line; "" for a model that is only a stage
    words: Written | None  # the hand-written text; None for a model from outside
    objective: str  # the loss of a denoiser, from its recipe, in Unicode; "" for other models
    differs: tuple[str, ...]  # differences of the recipe itself from the paper's settings
    likelihood: str | None  # kind of its likelihood; None: it has none
    commands: tuple[tuple[str, str], ...]  # (command, remark) to try
    can: tuple[tuple[str, str], ...]  # (command, what it does) of sampling and of each application
    # (score or scores, description): its own, then those of its likelihood
    scores: tuple[tuple[str, str], ...]
    groups: tuple[Group, ...]
    remarks: tuple[str, ...]  # the other lines of the recipe's head
    references: tuple[Reference, ...]
    # (set, scale, title) of the leagues that have an image of its samples; the title names the guidance
    drawn: tuple[tuple[str, str, str], ...]
    ready: tuple[Pretrained, ...]  # its pretrained files that come with gz
    compared: tuple[tuple[str, str, str, str], ...]  # (whose, set, metrics, source): paper, peers, gz
    costs: tuple[Mapping[str, str], ...]  # cost of its trainings, by set and scale

    @property
    def pictures(self) -> tuple[tuple[str, str], ...]:
        """(path from the models' pages on the site, caption) for each image of samples."""
        recipe = self.recipe or self.name
        league = (
            (picture_name(recipe, data, scale), f"Samples of {title} from a league, {data} at scale {scale}")
            for data, scale, title in self.drawn
        )
        ready = (
            (f"../{ready_picture(one)}", ", ".join(filter(None, (f"Samples of {one.command}", one.variant))))
            for one in self.ready
        )
        return *league, *ready


def page_of(name_or_file: str, sets: Sequence[str] = ()) -> Page:
    """The page of a model by its name or file, with the loss of its recipe changed by `sets`, `model.key=v`.
    Raises UsageError with the nearest name for an unknown one."""
    stem = name_or_file
    if model_files.is_file(name_or_file):
        find(name_or_file)  # registers its model
        stem = Path(name_or_file).stem
    card = catalog.card(stem)
    name = spelling(card.name)
    recipe, stage = (name, "") if name in recipe_names() else trained_in(name) or (name, "")
    chain, _ = read_chain(recipe)
    stages = _stages(chain)
    stage = stage or next((key for key, model in stages.items() if model == name), "")
    alone = recipe != name  # a model that is only a stage
    serving = catalog.card(list(stages.values())[-1]) if stages and not alone else card
    head, remarks = _head(chain[-1].path)
    return Page(
        name=name,
        family=card.family,
        paper=card.paper,
        recipe=recipe if chain[-1].shipped else None,
        stage=stage,
        stages=stages,
        about="" if alone else chain[-1].tree.get("about") or catalog.first_words(card).rstrip("."),
        words=written(name),
        **_as_trained(card, recipe, chain, sets),
        likelihood=_LIKELIHOOD[card.likelihood] if card.likelihood else None,
        commands=((f"gz train {recipe}", ""),) if alone else head or ((f"gz train {name_or_file}", ""),),
        can=_can(card, serving, recipe, (list(stages) or [""])[-1]),
        scores=_scores(serving),
        groups=_groups(card, serving, chain, recipe, stage),
        remarks=() if alone else remarks,
        references=tuple(
            Reference(data, scale, part, curve)
            for data, scale in measured.places()
            for part in ([stage] if alone else list(stages) or [""])
            if (curve := measured.ReferenceRun(recipe, data, scale, part).curve)
        ),
        drawn=tuple(
            (*place, measured.title(recipe, *place))
            for place in measured.places()
            if measured.picture(recipe, *place).is_file()
        ),
        ready=tuple(model for model in every() if model.model == recipe),
        compared=() if alone else tuple(_compared(name)),
        costs=tuple(measured.costs(recipe)),
    )


def _as_trained(
    card: ModelCard, recipe: str, chain: Sequence[RecipeFile], sets: Sequence[str]
) -> dict[str, Any]:
    """`objective` and `differs` of a page. They compare the recipe, resolved with `sets`, with the settings
    of the first set at its scale `paper`."""

    def part_of_model(**how: Any) -> Part | None:
        parts = resolve(recipe, **how).parts
        return next((part for part in parts if canonical(part.model) == canonical(card.name)), None)

    papers = [at[-1] for file in chain for at in file.sections if at[0] == "paper" and len(at) == 2]
    if not chain[-1].shipped or (part := part_of_model(sets=sets)) is None:
        return {"objective": "", "differs": ()}
    paper = part_of_model(data=papers[0], flags={"scale": "paper"}) if papers else None
    owner = next((cls.node.name for cls in card.lineage if {"loss", "target"} & set(cls.methods)), "")
    rescaled = any("rescale" in cls.attributes for cls in card.lineage if cls.node.name != "Denoiser")
    # others have a loss of their own
    loss = objective(part.options, rescaled) if owner in ("Denoiser", "EDM") else ""
    return {"objective": loss, "differs": _differences(card, part, paper or part)}


# weights of terms of a loss, which 0 or null disables
TERMS = ("image_weight", "penalty", "r1", "r2", "lecam", "min_snr", "noise_std")


def _differences(card: ModelCard, part: Part, paper: Part) -> tuple[str, ...]:
    """A recipe's choices, followed by the paper's, such as `prediction v (eps)`. Also terms that one of the
    two disables by 0, such as `image_weight 150 (0)`. Sizes and lengths depend on the data and do not
    count."""
    pairs = [(key, part.options.get(key), paper.options.get(key)) for key in card.params]
    kinds = {key: param.words for key, param in card.params.items()}
    rows = [row for row in pairs if {"Literal", "bool"} & kinds[row[0]] or row[0] == "clusters"]
    rows += [(key, a, b) for key, a, b in pairs if key in TERMS and bool(a) != bool(b)]
    rows += [("optimizer", part.optim.name, paper.optim.name)]
    rows += [(key, part.sample.get(key), paper.sample.get(key)) for key in ("sampler",)]
    value = lambda v: f"{v:g}" if isinstance(v, float) else flow(v)  # noqa: E731
    return tuple(f"{key} {value(a)} ({value(b)})" for key, a, b in rows if a != b)


def objective(options: Mapping[str, Any], rescaled: bool = False) -> str:
    """The loss of a denoiser with these options, in Unicode; "" for other models. `rescaled`: whether the
    network's input is scaled to unit variance."""
    prediction = options.get("prediction")
    if prediction not in TARGET_FORMULAS or "weighting" not in options:
        return ""
    power = {"l2": "²", "l1": "₁"}.get(options["loss_type"], " (Huber)")
    loss = f"‖f(α x₀ + σ ε, t) − {TARGET_FORMULAS[prediction]}‖{power}"
    if options["min_snr"] is not None:
        scale = {"eps": "(α²/σ²)", "x0": "1", "v": "(α²/σ² + 1)"}.get(prediction, "((α σ′ − σ α′)/σ)²")
        return f"E min(α²/σ², {options['min_snr']:g}) / {scale} · {loss}"
    if options["weighting"] == "even":
        if prediction != "x0":
            return f"E {loss}"
        scale = "σ/√(α² + σ²)" if rescaled else "σ"
        return f"E ‖(f(α x₀ + σ ε, t) − x₀) / max({scale}, .05)‖{power}"
    kind = {"score": "the error of ε", "likelihood": "g²/σ² times the error of ε"}[options["weighting"]]
    return f"E w(t) {loss}, with w such that it is {kind}"


def _compared(name: str) -> Iterator[tuple[str, str, str, str]]:
    """The metrics of the model's paper, of other packages' models of its kind, and of the model itself."""
    for data, figures, source in load(DOCS_FOLDER / "published.yaml").get(name, ()):
        yield "paper", data, figures, source
    for data in sorted({data for data, _ in measured.places()}):
        yield from (_of_peer(data, row) for row in measured.peers(data) if row["model"] == name)
    for data, scale in measured.places():
        for row in (row for row in measured.standings(data, scale) if row["model"] == name):
            place = f"rank {row['place']} in the league" if row["place"] else "the league"
            took = f", {duration(float(row['train_seconds']))} of training" if row["train_seconds"] else ""
            took += f", samples at {_temperature(row)}" if _temperature(row) else ""
            named = (row.get("title") or name).removeprefix(name).strip()
            whose = f"gz, {named}" if named else "gz"
            yield whose, f"{data}, {scale}", _figures(row), place + took
            yield from (_of_peer(data, simple) for simple in measured.peers(data) if not simple["model"])
    for (data, out, model), cell in measured.detections().items():
        if model == name:
            yield "gz", f"{out} with a model of {data}", f"AUROC {cell}", "the league"


def _of_peer(data: str, row: Mapping[str, str]) -> tuple[str, str, str, str]:
    """A row of `_compared` about another package's model."""
    seconds = float(row["seconds"])
    took = duration(seconds) if seconds >= 1 else f"{seconds:g}s"
    how = f"trained for {took}, {int(row['train_steps']):,} steps"
    how += ", with its own settings" if row["model"] else ""
    how += f" on {row['machine']}" if row.get("machine") else ""
    return f"{row['name']} {row['version']}", data, _figures(row), how


def _cells(row: Mapping[str, str]) -> dict[str, str]:
    is_ours = row["model"] in recipe_names() and "version" not in row
    return measured.figures(row, catalog.card(row["model"]).likelihood if is_ours else "")


def _figures(row: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {cell}" for name, cell in _cells(row).items()) or "no metric"


def league_table(data: str, scale: str) -> tuple[list[str], list[tuple[Mapping[str, str], list[str]]]]:
    """The metrics of a league, of rows by others, and of peers on its set: the names of the metrics, and the
    rows with their cells."""
    lacking = ("place", "sample_seconds", "params", "n", "train_seconds", "train_steps", "sampler", "calls")
    empty = dict.fromkeys(lacking, "")
    peers = [{"train_seconds": row["seconds"], **row} for row in measured.peers(data)]
    every_row = (*measured.standings(data, scale), *measured.added(data), *peers)
    rows = [(empty | row | {"link": _link(row)}, _cells(row)) for row in every_row]
    for row, _ in rows:
        row["sampler"] = ", ".join(filter(None, (row["sampler"], _temperature(row))))
    names = sorted(dict.fromkeys(name for _, cells in rows for name in cells), key=measured.order)
    return names, [(row, [cells.get(name, "–") for name in names]) for row, cells in rows]


def _temperature(row: Mapping[str, str]) -> str:
    """The temperature of a row's samples in words; "" for 1. Others change samples as guidance does, but not
    likelihoods."""
    temperature = row.get("temperature") or "1.0"
    return "" if temperature == "1.0" else f"temperature {temperature}"


def _link(row: Mapping[str, str]) -> str:
    """The first cell of a row of a league: its title with a link to the model's page, and whose it is."""
    title = row.get("title") or row["model"]
    link = f"[{title}](models/{row['model']}.md)" if written(row["model"]) else title
    if "version" in row:
        return f"{row['name']} {row['version']}" + (f", as {link}" if link else "")
    return f"{link}, added as `{row['by']}`" if "by" in row else link + " †" * (row.get("late") == "True")


def league_facts(data: str, scale: str) -> tuple[Any, ...]:
    """What the page of leagues prints of one, in the order of its template."""
    parts = (part(data, scale) for part in (league_seeds, league_tuned, league_simplest, league_table))
    return data, scale, measured.about(data, scale), *parts


def league_seeds(data: str, scale: str) -> str:
    """What the intervals of a league cover: images, or also trainings."""
    models: dict[int, list[str]] = {}  # by their number of seeds
    for row in measured.standings(data, scale):
        models.setdefault(int(row.get("seeds") or 1), []).append(row["model"])
    if set(models) <= {1}:
        return "1 seed for each model: ± covers only the choice of images."
    if len(models) == 1:
        return f"{next(iter(models))} seeds for each model: ± is half of a 95 % interval over trainings."
    names = {n: ", ".join(f"`{name}`" for name in some) for n, some in models.items()}
    several = [f"{some}: {n} seeds" for n, some in names.items() if n > 1]
    single = ["the other models: 1 seed, so their ± covers only the choice of images"] if 1 in models else []
    return "; ".join([*several, *single]) + "."


def league_tuned(data: str, scale: str) -> str:
    """The recipes that were chosen by trials on a league's data set, and the seeds of their rows; "" for
    none."""
    seeds: dict[str, list[str]] = {}
    for row in measured.shipped_league(data, scale):
        seeds.setdefault(row["model"], []).append(row["seed"])

    def words(name: str, trials: int | None) -> str:
        number = f"{trials} trial{'s' * (trials > 1)}" if trials else "several trials"
        of_row = f"seed{'s' * (len(seeds[name]) > 1)} {', '.join(seeds[name])}"
        return f"`{name}` ({number}; its row has {of_row})"

    tuned = measured.about(data, scale).get("tuned", {})
    tried = {name: trials for name, trials in tuned.items() if name in seeds}
    listed = ", ".join(words(name, trials) for name, trials in tried.items())
    best = " Values of seed 0 favour these recipes." if any("0" in seeds[name] for name in tried) else ""
    return f"These recipes were tuned on this data set with seed 0: {listed}.{best}" if tried else ""


def league_simplest(data: str, scale: str) -> dict[str, Any]:
    """The name of the simplest model of a set, how many models a league has and how many of them are better
    by a metric; empty if it was not measured. The metric is that of the league, or `kid_lite` if the judges
    were others."""
    for row in measured.peers(data):
        if not row["model"]:
            ranking = measured.about(data, scale)["metric"]
            metric = next(name for name in (ranking, "kid_lite") if row.get(f"{name}_excess"))
            excess = [one[f"{metric}_excess"] for one in measured.standings(data, scale)]
            better = [value for value in excess if value and float(value) < float(row[f"{metric}_excess"])]
            facts = {"models": sum(map(bool, excess)), "better": len(better)}
            return {"name": row["name"], "metric": metric, **facts}
    return {}


def _stages(chain: Sequence[RecipeFile]) -> dict[str, str]:
    """The model of each stage of a recipe, in order; {} without stages."""
    models: dict[str, str] = {}
    for file in chain:
        for stage, part in (file.tree.get("stages") or {}).items():
            models[stage] = spelling((part.get("model") or {}).get("name") or models.get(stage, ""))
    return models


def _common(chain: Sequence[RecipeFile], stage: str) -> dict[str, Any]:
    """The sections of a recipe that apply to a model, or to one of its stages, on every data set."""
    sections: dict[str, Any] = {}
    for file in chain:
        tree = file.tree.get("stages", {}).get(stage) or {} if stage else file.tree
        for name, values in tree.items():
            sections[name] = {**sections.get(name, {}), **values} if isinstance(values, dict) else values
    return sections


def _head(path: Path) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """The commands in a recipe's head comment, each with its remark, and the comment's other lines except the
    first."""
    head = list(takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines()))
    commands, remarks = [], []
    for line in head[1:]:
        if not line.startswith("#   "):
            remarks.append(line[1:].strip())
            continue
        remark = _REMARK.search(line)
        for part in re.split(r"\s{2,}then\s{2,}", line[4 : remark.start()] if remark else line[4:]):
            commands.append((part.strip(), remark[1] if remark else ""))
    return tuple(commands), tuple(remarks)


def _can(card: ModelCard, serving: ModelCard, name: str, stage: str) -> tuple[tuple[str, str], ...]:
    """The capabilities of the recipe `name`, each with its command. `card` is the model, which may be a first
    stage. `serving` is the model of the last stage, called `stage`, which samples and scores."""
    can, key = serving.can, f"stages.{stage}.model.conditional" if stage else "model.conditional"
    always = "conditional" in can and serving.params["conditional"].default is True
    first = "" if always or "conditional" not in can else f" (train with `--set {key}=true`)"
    sets = "--out SET" if serving.needs else "--in mnist --out fashionmnist"
    does = {do: catalog.first_words(serving, do) for do in serving.do}
    pairs = {"translate"} == {*serving.do} - {"reconstruct"}  # it draws nothing from noise
    rows = [
        (True, f"gz sample {name}", "translates training images" if pairs else "draws images"),
        ("conditional" in can, f"gz sample {name} --label 3", f"draws images of a class{first}"),
        ("prompt" in can, f'gz sample {name} --prompt "a red door"', "draws images of a prompt"),
        *(
            (
                True,
                f"gz sample {name} --do {do}",
                _with(meaning, first if do in serving.unlabelled_lack else ""),
            )
            for do, meaning in does.items()
        ),
        ("ood" in can, f"gz ood {name} {sets}", "measures how well the model detects foreign images"),
        ("map" in can, f"gz ood {name} --in mnist --input DIR --map", "shows where images are unusual"),
        (
            not {"prompt", "translate"} & {*can},
            f"gz bench {name} --data mnist",
            "evaluates the model's samples",
        ),
        ("prompt" not in can, "gz train RUN --data ./photos", "fine-tunes a run on other images"),
        ("latent" in card.can, f"gz train fm --set data.latent={name}", "trains a model on its latents"),
        ("export" in can, f"gz runs export {name} --to diffusers", "exports a folder for diffusers"),
    ]
    return tuple((command, meaning) for holds, command, meaning in rows if holds)


def _with(meaning: str, remark: str) -> str:
    """A description with a remark in brackets after its first sentence."""
    first, point, rest = meaning.partition(". ")
    return first.rstrip(".") + remark + (point + rest or "." * meaning.endswith("."))


def _scores(card: ModelCard) -> tuple[tuple[str, str], ...]:
    """The model's own scores, one row for the scores from its likelihood, and the score of its map."""
    rows = [(name, catalog.first_words(card, f"score_{name}")) for name in card.scores]
    general = [name for name in score_names(card) if name not in card.scores]
    of_map = catalog.scores_made(log_prob=False, names=(), maps=True)
    kinds = {"derived from the likelihood": [name for name in general if name not in of_map]}
    kinds["the largest deviation in the model's map"] = [*{*general} & {*of_map}]
    return (*rows, *((", ".join(names), what) for what, names in kinds.items() if names))


def _groups(
    card: ModelCard, serving: ModelCard, chain: Sequence[RecipeFile], name: str, stage: str
) -> tuple[Group, ...]:
    """The options of a model, which is `stage` of the recipe `name`, and those of the verbs, which use the
    recipe's last stage, `serving`."""
    model_values = _common(chain, stage)
    values = model_values if serving is card else _common(chain, (list(_stages(chain)) or [""])[-1])
    texts = catalog.option_texts(serving)
    key = f"stages.{stage}.model.KEY" if stage else "model.KEY"
    scored = {key: param for options in serving.scores.values() for key, param in options.items()}
    # title, words that set an option, options, their texts, the recipe's values
    rows: list[tuple[str, str, Mapping[str, Param], Mapping[str, str], Any]] = [
        (
            *("Model", f"gz train {name} --set {key}=VALUE", card.params),
            *(catalog.option_texts(card)["model"], model_values.get("model")),
        ),
        ("Sampling", f"gz sample {name} --KEY VALUE", serving.sample, texts["sample"], values.get("sample")),
    ]
    for do, options_of in serving.do.items():
        new = {key: param for key, param in options_of.items() if serving.sample.get(key) != param}
        rows.append((f"`{do}`", f"gz sample {name} --do {do} --KEY VALUE", new, texts[do], None))
    rows.append(("Scores", f"gz ood {name} --KEY VALUE", scored, texts["ood"], values.get("ood")))
    groups = []
    for title, command, params, meanings, of_recipe in rows:
        defaults = lists({key: param.default for key, param in params.items()}) | dict(of_recipe or {})
        options = [
            Option(key, defaults[key], words(parse(param.annotation)), meanings.get(key, ""))
            for key, param in params.items()
        ]
        groups += [Group(title, command, tuple(options))] if options else []
    return tuple(groups)


# ---------------------------------------------------------------------------- Markdown


def as_markdown(page: Page, *, site: bool = False, full: bool = True) -> str:
    """The page.

    site: with MathML, images, and links to the pages beside it; otherwise with the equation in Unicode.
    full: with options, costs, metrics and curves; otherwise without them, and with one sentence per
      capability.
    """
    return rendered("model", page=page, site=site, full=full)


def rendered(name: str, **words: Any) -> str:
    """The Markdown of a template."""
    text = environment().get_template(f"{name}.md.j2").render(**words)
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


@cache
def environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("gzcli.docs")
    env = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"about": about, "count": count, "duration": duration, "figure": figure, "flow": flow}
    env.filters |= {"folded": folded, "mathml": mathml, "phrase": phrase}
    env.filters |= {"short": short_cell, "thinned": thinned}
    env.filters |= {"ms": lambda seconds: short_cell(str(1000 * float(seconds)) if seconds else "")}
    env.filters |= {
        "arxiv": lambda text: re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[\g<0>](https://arxiv.org/abs/\1)", text),
        "commits": commits,
        "cell": lambda text: text.replace("|", "\\|"),
        "own_scores": lambda scores: ", ".join(name for name, _ in scores if "," not in name) or "–",
    }
    env.globals |= {"ready_picture": ready_picture, "excess_text": _EXCESS}
    return env


def as_text(markdown: str, width: int) -> str:
    """Markdown as plain text of at most `width` columns."""
    from rich.console import Console  # loaded by the verbs that print a page
    from rich.markdown import Markdown

    headings = re.sub(r"^##+ (.+)$", lambda match: match[1].upper(), markdown, flags=re.MULTILINE)
    console = Console(width=width, no_color=True, force_terminal=False)
    with console.capture() as capture:
        console.print(Markdown(headings.removeprefix("# "), hyperlinks=False))
    text = "\n".join(line.rstrip() for line in capture.get().splitlines())
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def picture_name(recipe: str, data: str, scale: str) -> str:
    """The path of a model's samples on the site, beside the model pages."""
    return f"samples/{data}-{scale}-{recipe}.png"


def ready_picture(model: Pretrained) -> str:
    """The path of the image of a pretrained model on the site."""
    return f"pretrained/{model.name}.png"


def mathml(tex: str) -> str:
    """An equation as MathML, which a browser draws without a script."""
    from latex2mathml.converter import convert  # an optional package, which only the site needs

    plain = re.sub(r"\\[bB]igg?(?![a-zA-Z])", "", " ".join(tex.split()))  # brackets of MathML stretch anyway
    return f'<div class="equation">{convert(plain, display="block")}</div>'


def commits(text: str) -> str:
    """The commit of a league in words; the number of commits if its rows name different ones."""
    count = len(text.split("; "))
    one = re.sub(r"([0-9a-f]{12})[0-9a-f]{28}", r"\1", f"commit {text}")
    return f"{count} commits, listed in `results.csv`" if count > 1 else one


def thinned(points: Sequence[Any]) -> list[Any]:
    """CURVE_POINTS evenly spaced points of a curve, including both ends."""
    return [
        points[i]
        for i in sorted({round(i * (len(points) - 1) / (CURVE_POINTS - 1)) for i in range(CURVE_POINTS)})
    ]


def phrase(text: str) -> str:
    """The first sentence of a text in a form that can end another sentence: without its full stop and
    brackets."""
    first: str = re.split(r"[.:;] (?=[A-Z(])|\.$", re.sub(r" \([^()]*\)", "", text))[0]
    return first[:1].lower() + first[1:] if re.match(r"[A-Z]([a-z]|\b )", first) else first


def short_cell(cell: str) -> str:
    """A number in a table with three digits; other text unchanged."""
    try:
        value = float(cell)
    except ValueError:
        return cell or "–"
    return f"{value:,.0f}" if abs(value) >= 1000 or value.is_integer() else f"{value:.3g}"


def folded(command: str) -> str:
    """A command, wrapped before options into lines that a shell joins again."""
    first, *remainder = re.split(r" (?=--?\w)", command)
    lines = [first]
    for part in remainder:
        if len(lines[-1]) + len(part) > COMMAND_COLUMNS - 3:
            lines.append(f"    {part}")
        else:
            lines[-1] += f" {part}"
    return " \\\n".join(lines)


# ---------------------------------------------------------------------------- the manual


def texts() -> dict[str, str]:
    """The Markdown of each page by its name, in order."""
    return {name: (DOCS_FOLDER / "pages" / f"{name}.md").read_text(encoding="utf-8") for name in ORDER}


def commands(root: Any) -> str:
    """Every command of the command line with its arguments and options."""
    return rendered("commands", leaves=list(leaves(root, ("gz",))))


def leaves(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Each command with the words that are typed for it."""
    children = getattr(command, "commands", {})
    if not children:
        yield " ".join(path), command
    for name, child in children.items():
        yield from leaves(child, (*path, name))


def in_a_line(name: str) -> str:
    """A line on what a model is, from its shipped recipe, otherwise from its class."""
    return about_of(name) or catalog.first_words(catalog.card(name))


def overview() -> str:
    """What gz is, its commands at a glance, and the topics of `gz --llm TOPIC`."""
    titles = {name: text.partition("\n")[0].removeprefix("# ") for name, text in texts().items()}
    about = {name: in_a_line(name) for name in recipe_names()}
    return _plain(rendered("llm", use=texts()["use"], titles=titles, about=about))


def topics(root: Any) -> dict[str, Callable[[], str]]:
    """The function for the text of each topic: a page, a verb with its options, or a model.

    root: the command line with all verbs.
    """
    pages = texts()

    def text(name: str) -> str:
        branch = {"commands": root, **root.commands}.get(name)
        path = ("gz",) if name == "commands" else ("gz", name)
        parts = [pages.get(name, "")]
        parts += [rendered("commands", leaves=list(leaves(branch, path)))] if branch else []
        parts += [as_markdown(page_of(name))] if name in recipe_names() else []
        return _plain("\n\n".join(part.strip() for part in parts if part))

    names = dict.fromkeys([*pages, "commands", *root.commands, *recipe_names()])
    return {name: partial(text, name) for name in names}


def _plain(text: str) -> str:
    return re.sub(r"(?m)^ *!\[.*\]\(.*\)\n+", "", text).strip()
