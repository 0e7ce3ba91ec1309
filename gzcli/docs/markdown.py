"""A page of a model as Markdown, for the site and for terminals."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from gzcli.core.units import about, count, duration, figure
from gzcli.docs.page import Page
from gzcli.recipe.yaml import flow
from gzcli.store.pretrained import Pretrained

COLUMNS = 72  # of a command, before it is broken
POINTS = 6  # of a curve
_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


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
    yield from (f"# {page.name}", "", *_head(page, site))
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


def _head(page: Page, site: bool) -> Iterator[str]:
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
