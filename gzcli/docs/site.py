"""The static site: all pages, built by MkDocs into a folder that opens from disk and asks no server."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml
from mkdocs.commands.build import build as mkdocs_build
from mkdocs.config import load_config

from gzcli.core import measured
from gzcli.core.errors import canonical
from gzcli.docs.as_markdown import as_markdown, picture_name, ready_picture
from gzcli.docs.page import page_of
from gzcli.docs.pages import (
    GUIDES,
    TUTORIALS,
    composed,
    family_name,
    league_page,
    models_index,
    ready_page,
    title_of,
)
from gzcli.docs.written import ROOT
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
    texts = composed()
    for name, text in texts.items():
        (folder / f"{name}.md").write_text(
            text.replace("](../static/", "](")
        )  # it lies beside the pages here
    pages = {name: page_of(name) for name in model_names()}
    (folder / "models").mkdir()
    (folder / "models" / "index.md").write_text(models_index(pages))
    for name, page in pages.items():
        (folder / "models" / f"{name}.md").write_text(as_markdown(page))
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
        return [{title_of(texts[name]): f"{name}.md"} for name in names if name in texts]

    models: list[Any] = ["models/index.md"]
    for family in dict.fromkeys(page.family for page in pages.values()):
        own = [{name: f"models/{name}.md"} for name, page in pages.items() if page.family == family]
        models.append({family_name(family): own})
    guides = {"Guides": [*named(GUIDES), *further]}
    return [{"gz": "index.md"}, {"Tutorials": named(TUTORIALS)}, guides, {"Models": models}]


def model_names() -> list[str]:
    """The models that have a page: those of recipes, and those that are only ever a stage."""
    staged = [path.stem for path in (ROOT / "models").glob("*.md")]
    known = dict.fromkeys([*recipe_names(), *sorted(staged)])
    by_family = sorted(known, key=lambda name: (page_of(name).family, canonical(name)))
    return by_family


def settings(sources: Path, into: Path, nav: list[Any]) -> dict[str, Any]:
    """The configuration of MkDocs: nothing is fetched, by the build or by a reader's browser."""
    switch = [
        {"scheme": "default", "media": "(prefers-color-scheme: light)"},
        {"scheme": "slate", "media": "(prefers-color-scheme: dark)"},
    ]
    return {
        "site_name": "gz",
        "site_description": "Train, sample, score and compare image generative models",
        "docs_dir": str(sources),
        "site_dir": str(into),
        "nav": nav,
        "use_directory_urls": False,
        "strict": True,
        "theme": {
            "name": "material",
            "font": False,
            "palette": switch,
            "features": [
                "navigation.tabs",
                "navigation.sections",
                "navigation.indexes",
                "navigation.top",
                "content.code.copy",
                "toc.follow",
            ],
            "icon": {"logo": "material/image-auto-adjust"},
        },
        "plugins": ["search", "offline"],
        "markdown_extensions": ["tables", "fenced_code", "toc", "md_in_html"],
        "extra": {"generator": False, "polyfills": ["assets/iframe-worker.js"]},
        "extra_css": ["assets/gz.css"],
    }
