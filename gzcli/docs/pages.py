"""The pages of the manual in order: those of `pages/`, and those that code makes."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import fill

from gzcli.core import measured
from gzcli.core.units import duration
from gzcli.docs.alike import DIFFERENCES
from gzcli.docs.as_markdown import ready_picture, table
from gzcli.docs.page import Page
from gzcli.docs.written import ROOT
from gzcli.models import catalog
from gzcli.store.pretrained import every

TUTORIALS = ("first-model", "own-pictures", "ood-alarm", "compare")
GUIDES = (
    "use",
    "data",
    "scale",
    "gpus",
    "ood",
    "bench",
    "recipes",
    "what_we_tried",
    "latents",
    "stable-diffusion",
    "share",
    "demo",
    "adding",
    "python",
    "questions",
)
ORDER = (*TUTORIALS, *GUIDES)


def composed() -> dict[str, str]:
    """The Markdown of each written page, by its name, with what code knows better."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "pages").glob("*.md"))}
    return texts | {"gpus": "\n".join([texts["gpus"], *_differences(), ""])}


def _differences() -> Iterator[str]:
    """What of a training depends on the number of its processes, as items of a list."""
    for known in DIFFERENCES:
        text = f"* **{known.of}.** {known.why[0].upper()}{known.why[1:]}."
        if known.example:
            words = " with ".join(f"`{word}`" for word in known.example.split(","))
            how = " in fp32" if known.fp32 else ""
            text += f" After 30 steps of {words}{how}, weights differ by {known.most:g} at most."
        yield fill(text, 130, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)


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
        lines += [
            f"## {family_name(family)}",
            "",
            "| model | what it is | likelihood | scores |",
        ]
        lines.append("| --- | --- | --- | --- |")
        for name, page in pages.items():
            if page.family == family:
                what = page.about or (page.words.title if page.words else "")
                scores = ", ".join(score for score, _ in page.scores if "," not in score)
                lines.append(f"| [{name}]({name}.md) | {what} | {page.likelihood or '–'} | {scores or '–'} |")
        lines.append("")
    return "\n".join(lines)


def ready_page() -> str:
    """The trained models that come with gz, with a picture of each."""
    known = every()
    head = ("model and set", "figure", "parameters", "CPU time", "size")
    cells = [(f"[{one.name}](models/{one.model}.md)", *one.cells) for one in known]
    lines = ["# Pretrained models", ""]
    lines += ["They lie in the package, and every verb takes them: `gz ood pretrained:fm-digits`.", ""]
    lines += table(head, cells)
    for one in known:
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
    yield f"| | model | {metric} | × floor | parameters | s/image |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for row in measured.standings(data, scale):
        cells = [
            row["place"],
            f"[{row['model']}](models/{row['model']}.md)",
            row.get(metric, ""),
            row["times_floor"],
        ]
        cells += [row["params"], row["sample_seconds"]]
        yield "| " + " | ".join(short(cell) for cell in cells) + " |"
    yield ""


def short(cell: str) -> str:
    """A number of a table in three digits; other text as it is."""
    try:
        value = float(cell)
    except ValueError:
        return cell or "–"
    return f"{value:,.0f}" if abs(value) >= 1000 or value.is_integer() else f"{value:.3g}"
