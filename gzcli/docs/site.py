"""The static site: all pages, built by MkDocs into a folder that a browser opens without a server."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from mkdocs.commands.build import build as mkdocs_build
from mkdocs.config import load_config

from gzcli.core import measured
from gzcli.core.errors import canonical
from gzcli.docs import page as manual
from gzcli.docs.page import Page, as_markdown, page_of, picture_name, ready_picture, rendered
from gzcli.models import catalog
from gzcli.store.paths import recipe_names
from gzcli.store.pretrained import every

CODE_COLUMNS = 84  # columns of a code block on a laptop's screen


def build(into: Path, commands: str) -> Path:
    """Builds the site. Returns its first page.

    into: the folder; files of an earlier build are removed.
    commands: the page of all commands.
    """
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder) / "docs"
        nav = write(sources, commands)
        config = Path(folder) / "mkdocs.yml"
        config.write_text(yaml.safe_dump(mkdocs_settings(sources, into.absolute(), nav)))
        mkdocs_build(load_config(str(config)))
    return into / "index.html"


def write(folder: Path, commands: str) -> list[Any]:
    """Writes the Markdown of every page into a folder. Returns the site's navigation."""
    shutil.copytree(manual.DOCS_FOLDER / "static", folder)
    for name in ("models", "models/samples", "pretrained"):
        (folder / name).mkdir()
    pages = {name: page_of(name) for name in model_names()}
    ready, leagues = every(), list(measured.places())
    # the folders `static` and `models` are beside the pages here
    files = {
        name: stacked(text.replace("](../static/", "](").replace("](../models/", "](models/"))
        for name, text in manual.texts().items()
    }
    heads = {name: text.partition("\n")[0] for name, text in files.items()}
    titles = {name: head.split(": ")[-1].removeprefix("# ") for name, head in heads.items()}
    files |= {f"models/{name}": as_markdown(page, site=True) for name, page in pages.items()}
    files |= {"models/index": models_index(pages), "commands": commands}
    files["pretrained"] = rendered("pretrained", ready=ready)
    files["parity"] = rendered("parity", rows=measured.parity())
    if leagues:
        facts = [manual.league_facts(*place) for place in leagues]
        files["league"] = rendered("league", leagues=facts, detections=measured.detections())
        (folder / "results.csv").write_text(measured.results())
    for name, text in files.items():
        (folder / f"{name}.md").write_text(text)
    for name, page in pages.items():
        for data, scale, _ in page.drawn:
            picture = measured.picture(page.recipe or name, data, scale)
            shutil.copyfile(picture, folder / "models" / picture_name(page.recipe or name, data, scale))
    for model in ready:
        (folder / ready_picture(model)).write_bytes(model.preview)

    def navigation(names: Iterable[str], titles: Mapping[str, str] = titles, under: str = "") -> list[Any]:
        return [{titles[name]: f"{under}{name}.md"} for name in names]

    further = {"league": "Leagues", "parity": "Parity", "pretrained": "Pretrained models"}
    further |= {"commands": "Commands"}
    guides = [*navigation(manual.GUIDES), *navigation((name for name in further if name in files), further)]
    families = [
        {family: navigation((page.name for page in some), {page.name: page.name for page in some}, "models/")}
        for family, some in by_family(pages).items()
    ]
    sections = {"Tutorials": navigation(manual.TUTORIALS), "Guides": guides}
    sections["Models"] = ["models/index.md", *families]
    return [{"gz": "index.md"}, *({title: pages_of} for title, pages_of in sections.items())]


def stacked(text: str) -> str:
    """A page whose code blocks fit its width: in a block with too long a line, comments are placed above what
    they describe."""

    def narrow(block: re.Match[str]) -> str:
        code = block[0].splitlines()
        if max(map(len, code)) <= CODE_COLUMNS:
            return block[0]
        lines = (re.sub(r"^( *)(\S.*?) {2,}# (.+)$", r"\1# \3\n\1\2", line) for line in code)
        apart = re.sub(r"(?<=[^\n]\n)(?=# )", "\n", "\n".join(lines))
        return re.sub(r"^(```\w*\n)\n", r"\1", apart) + "\n"

    return re.sub(r"(?ms)^```(?:sh|python)?\n.*?^```\n", narrow, text)


def model_names() -> list[str]:
    """The models that have a page: those with recipes, and those that are only stages."""
    names = {*recipe_names(), *(path.stem for path in (manual.DOCS_FOLDER / "models").glob("*.md"))}
    return sorted(names, key=lambda name: (catalog.card(name).family, canonical(name)))


def by_family(pages: Mapping[str, Page]) -> dict[str, list[Page]]:
    """The pages of each family, under its name as a heading."""
    families: dict[str, list[Page]] = {}
    for page in pages.values():
        families.setdefault(heading(page.family), []).append(page)
    return families


def heading(family: str) -> str:
    return {"vae": "VAEs", "gan": "GANs"}.get(family, family.replace("_", " ").capitalize())


def models_index(pages: Mapping[str, Page]) -> str:
    """The page that lists the models, by family."""
    trained = sum(page.recipe == name for name, page in pages.items())
    counted = catalog.model_count(trained, len(pages) - trained)
    return rendered("models", families=by_family(pages), counted=counted)


def mkdocs_settings(sources: Path, into: Path, nav: list[Any]) -> dict[str, Any]:
    """The configuration of MkDocs. Neither the build nor a reader's browser fetches anything."""
    schemes = {"default": "light", "slate": "dark"}
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
            "palette": [
                {"scheme": scheme, "media": f"(prefers-color-scheme: {colours})"}
                for scheme, colours in schemes.items()
            ],
            "features": [
                *(f"navigation.{part}" for part in ("tabs", "sections", "indexes", "top")),
                *("content.code.copy", "toc.follow"),
            ],
            "icon": {"logo": "material/image-auto-adjust"},
        },
        "plugins": ["search", "offline"],
        "markdown_extensions": ["tables", "fenced_code", "toc", "md_in_html"],
        "extra": {"generator": False, "polyfills": ["assets/iframe-worker.js"]},
        "extra_css": ["assets/gz.css"],
    }
