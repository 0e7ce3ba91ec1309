"""The static site: all pages, built by MkDocs into a folder that opens from disk and asks no server."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from mkdocs.commands.build import build as mkdocs_build
from mkdocs.config import load_config

from gzcli.core import measured
from gzcli.core.errors import canonical
from gzcli.core.units import duration
from gzcli.docs.manual import GUIDES, TUTORIALS, texts
from gzcli.docs.page import ROOT, Page, as_markdown, page_of, picture_name, ready_picture, table
from gzcli.models import catalog
from gzcli.store.paths import recipe_names
from gzcli.store.pretrained import every


def build(into: Path, commands: str) -> Path:
    """Builds the site. Returns its first page.

    into: the folder; what an earlier build left there goes.
    commands: the page of all commands.
    """
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder) / "docs"
        nav = write(sources, commands)
        config = Path(folder) / "mkdocs.yml"
        config.write_text(yaml.safe_dump(settings(sources, into.absolute(), nav)))
        mkdocs_build(load_config(str(config)))
    return into / "index.html"


def write(folder: Path, commands: str) -> list[Any]:
    """Writes the Markdown of every page into a folder. Returns the site's navigation."""
    shutil.copytree(ROOT / "static", folder)
    guides_text = texts()
    for name, text in guides_text.items():
        beside = text.replace("](../static/", "](")  # here the folder lies beside the pages
        (folder / f"{name}.md").write_text(beside)
    pages = {name: page_of(name) for name in model_names()}
    (folder / "models").mkdir()
    (folder / "models" / "index.md").write_text(models_index(pages))
    for name, page in pages.items():
        (folder / "models" / f"{name}.md").write_text(as_markdown(page, site=True))
        for data, scale in page.drawn:
            target = folder / "models" / picture_name(page.recipe or name, data, scale)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(measured.picture(page.recipe or name, data, scale), target)
    (folder / "commands.md").write_text(commands)
    (folder / "pretrained.md").write_text(ready_page())
    (folder / "pretrained").mkdir()
    for one in every():
        (folder / ready_picture(one)).write_bytes(one.preview)
    further: list[Any] = [{"Pretrained models": "pretrained.md"}, {"Commands": "commands.md"}]
    if league := league_page():
        (folder / "league.md").write_text(league)
        further.insert(0, {"Leagues": "league.md"})

    def named(names: tuple[str, ...]) -> list[Any]:
        return [{title_of(guides_text[name]): f"{name}.md"} for name in names]

    models: list[Any] = ["models/index.md"]
    for family in dict.fromkeys(page.family for page in pages.values()):
        own = [{name: f"models/{name}.md"} for name, page in pages.items() if page.family == family]
        models.append({family_name(family): own})
    guides = {"Guides": [*named(GUIDES), *further]}
    return [{"gz": "index.md"}, {"Tutorials": named(TUTORIALS)}, guides, {"Models": models}]


def model_names() -> list[str]:
    """The models that have a page: those of recipes, and those that are only ever a stage."""
    staged = [path.stem for path in (ROOT / "models").glob("*.md")]
    every_name = dict.fromkeys([*recipe_names(), *sorted(staged)])
    return sorted(every_name, key=lambda name: (page_of(name).family, canonical(name)))


def settings(sources: Path, into: Path, nav: list[Any]) -> dict[str, Any]:
    """The configuration of MkDocs: nothing is fetched, by the build or by a reader's browser."""
    schemes = {"default": "light", "slate": "dark"}
    navigation = [f"navigation.{part}" for part in ("tabs", "sections", "indexes", "top")]
    theme = {
        "name": "material",
        "font": False,
        "palette": [
            {"scheme": scheme, "media": f"(prefers-color-scheme: {colours})"}
            for scheme, colours in schemes.items()
        ],
        "features": [*navigation, "content.code.copy", "toc.follow"],
        "icon": {"logo": "material/image-auto-adjust"},
    }
    return {
        "site_name": "gz",
        "site_description": "Train, sample, score and compare image generative models",
        "docs_dir": str(sources),
        "site_dir": str(into),
        "nav": nav,
        "use_directory_urls": False,
        "strict": True,
        "theme": theme,
        "plugins": ["search", "offline"],
        "markdown_extensions": ["tables", "fenced_code", "toc", "md_in_html"],
        "extra": {"generator": False, "polyfills": ["assets/iframe-worker.js"]},
        "extra_css": ["assets/gz.css"],
    }


def title_of(text: str) -> str:
    """The heading of a page."""
    return text.partition("\n")[0].removeprefix("# ").removeprefix("Tutorial: ")


def family_name(family: str) -> str:
    """A family as a heading."""
    return {"vae": "VAEs", "gan": "GANs"}.get(family, family.replace("_", " ").capitalize())


def models_index(pages: dict[str, Page]) -> str:
    """The page that lists the models, by family."""
    trained = sum(page.recipe == name for name, page in pages.items())
    count = catalog.counted(trained, len(pages) - trained)
    lines = ["# Models", "", f"{count}. `gz show MODEL` prints the same pages in a terminal.", ""]
    for family in dict.fromkeys(page.family for page in pages.values()):
        rows = []
        for name, page in pages.items():
            if page.family == family:
                what = page.about or (page.words.title if page.words else "")
                scores = ", ".join(score for score, _ in page.scores if "," not in score)
                rows.append((f"[{name}]({name}.md)", what, page.likelihood or "–", scores or "–"))
        head = ("model", "what it is", "likelihood", "scores")
        lines += [f"## {family_name(family)}", "", *table(head, rows)]
    return "\n".join(lines)


def ready_page() -> str:
    """The trained models that come with gz, with a picture of each."""
    head = ("model and set", "figure", "parameters", "CPU time", "size")
    lines = ["# Pretrained models", ""]
    lines += ["They lie in the package, and every verb takes them: `gz ood pretrained:fm-digits`.", ""]
    lines += table(head, [(f"[{one.name}](models/{one.model}.md)", *one.cells) for one in every()])
    for one in every():
        lines += [f"## {one.name}", "", f"![Samples of {one.name}]({ready_picture(one)})", ""]
        lines += ["```", one.card["command"], f"gz sample pretrained:{one.name}", "```", ""]
    return "\n".join(lines)


def league_page() -> str | None:
    """The leagues that are shipped; None where there is none."""
    lines = [line for data, scale in measured.places() for line in _league(data, scale)]
    return "\n".join(["# Leagues", "", *lines]) if lines else None


def _league(data: str, scale: str) -> Iterator[str]:
    about = measured.about(data, scale)
    metric = about["metric"]
    yield from (f"## {data}, scale {scale}", "")
    yield f"Each model was trained for {duration(about['budget'])} on {about['machine']}, {about['date']}, by"
    yield from ("", f"    {about['command']}", "")
    floor = f"{about['floor'][metric]:.3g}"
    yield f"`× floor`: how many times the {metric} of as many real images, {floor}; 1 is perfect."
    yield from ("[Comparing models](bench.md) explains the figures.", "")
    head = ("", "model", metric, "× floor", "parameters", "s/image")
    rows = []
    for row in measured.standings(data, scale):
        link = f"[{row['model']}](models/{row['model']}.md)"
        figures = (row.get(metric, ""), row["times_floor"], row["params"], row["sample_seconds"])
        rows.append([short(cell) for cell in (row["place"], link, *figures)])
    yield from table(head, rows)


def short(cell: str) -> str:
    """A number of a table in three digits; other text as it is."""
    try:
        value = float(cell)
    except ValueError:
        return cell or "–"
    return f"{value:,.0f}" if abs(value) >= 1000 or value.is_integer() else f"{value:.3g}"
