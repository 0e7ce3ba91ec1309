"""A page for the site: Markdown, with the equation in MathML."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from latex2mathml.converter import convert

from gzcli.docs.as_text import cost_cells, curve_rows, curve_title, folded, place_in_words
from gzcli.docs.page import Page
from gzcli.recipe.yaml import flow
from gzcli.store.pretrained import Pretrained

COLUMNS = 76  # of a command, before it is broken


def as_markdown(page: Page) -> str:
    """The page; links lead to other pages of models, which lie beside it."""
    return "\n".join(_lines(page)).rstrip() + "\n"


def _lines(page: Page) -> Iterator[str]:
    words = page.words
    yield from (f"# {page.name}", "")
    if words:
        yield from (f"**{words.title}** · {page.family.replace('_', ' ')} · {linked(page.paper)}", "")
        yield from (words.text, "", mathml(words.tex), "", words.source, "")
    for data, scale in page.drawn:
        text = f"Samples of a run of a league, {data} at scale {scale}"
        yield from (f"![{text}]({picture_name(page.recipe or page.name, data, scale)})", "", f"*{text}.*", "")
    for one in page.ready:
        best, params, seconds, _ = one.cells
        text = f"Samples of `gz sample pretrained:{one.name}`, which comes with gz"
        yield from (f"![{text.replace('`', '')}](../{ready_picture(one)})", "")
        yield from (f"*{text}: {params} parameters, {best}, trained for {seconds} of a CPU core.*", "")
    if page.likelihood:
        yield from (f"Likelihood: {page.likelihood}.", "")
    for stage, model in page.stages.items():
        if model != page.name:
            yield from (f"Its stage `{stage}` is a [{model}]({model}.md).", "")
    yield from ("## Try", "", "```")
    for command, remark in page.commands:
        yield from folded(command, COLUMNS)
        if remark:
            yield f"    ({remark})"
    yield from ("```", "", "## What it can do", "")
    yield from table(("command", "what"), [(f"`{command}`", what) for command, what in page.can])
    if page.scores:
        yield from ("## Out-of-distribution scores", "")
        yield from table(("score", "what it is"), page.scores)
    yield from ("## Options", "")
    for group in page.groups:
        yield from (f"### {group.title}", "", f"`{group.how}`", "")
        rows = [(f"`{o.name}`", f"`{flow(o.default)}`", o.kind, o.text) for o in group.options]
        yield from table(("option", "default", "type", "meaning"), rows)
    if page.costs:
        yield from ("## What a training costs", "")
        head = ("data", "scale", "parameters", "steps", "on a CPU", "on an H100")
        yield from table(head, [cost_cells(row) for row in page.costs])
        machine = page.costs[0]["machine"]
        yield (f"CPU: {machine}. " if machine else "") + f"On yours: `gz train {page.name} --dry-run`."
        yield ""
    for data, scale, row in page.places:
        place = f"place {row['place']}, " if row["place"] else ""
        yield from (
            f"In the [league](../league.md) of {data} at scale {scale}: {place}{place_in_words(row)}.",
            "",
        )
    for reference in page.references:
        yield from (f"## Reference curve: {curve_title(reference)}", "")
        names, *points = curve_rows(reference)
        yield from table(names, points)
    if page.remarks:
        yield from ("## Notes of the recipe", "", " ".join(page.remarks), "")
    if words:
        yield from ("## Limits", "", *(f"- {limit}" for limit in words.limits), "")
        code = (f"- [{name}](https://github.com/{name}): {what}" for name, what in words.code)
        yield from ("## Code by others", "", *code, "")


def picture_name(recipe: str, data: str, scale: str) -> str:
    """The path of a picture of samples on the site, beside the pages of models."""
    return f"samples/{data}-{scale}-{recipe}.png"


def ready_picture(one: Pretrained) -> str:
    """The path of the picture of a trained model that comes with gz, on the site."""
    return f"pretrained/{one.name}.png"


def mathml(tex: str) -> str:
    """An equation that a browser draws without a script."""
    plain = re.sub(r"\\[bB]igg?(?![a-zA-Z])", "", " ".join(tex.split()))  # brackets of MathML stretch anyway
    return f'<div class="equation">{convert(plain, display="block")}</div>'


def linked(text: str) -> str:
    """The text with a link where it names a paper of arXiv."""
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table, and a blank line."""
    for row in (head, ["---"] * len(head), *rows):
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
    yield ""
