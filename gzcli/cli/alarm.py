"""`gz ood --input`: an alarm for each of the user's pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gzcli.cli import out
from gzcli.core.errors import MissingError, UsageError

if TYPE_CHECKING:
    from gzcli.models.catalog import ModelCard

LINES, NAME = 20, 40  # flagged pictures in the table, and letters of a name there, at most
_PANEL = "Single pictures"

Input = Annotated[
    str | None,
    typer.Option(
        "--input",
        metavar="PATH",
        help="Pictures to be judged one by one: a picture, or a folder, zip, tar or npz of them.",
        rich_help_panel=_PANEL,
    ),
]
Fpr = Annotated[
    str | None,
    typer.Option(
        "--fpr",
        metavar="1%|0.01",
        help="Share of in-distribution pictures that may be flagged; 1 % without it.",
        rich_help_panel=_PANEL,
    ),
]
Map = Annotated[
    bool,
    typer.Option("--map", help="Show where the strangest pictures are anomalous.", rich_help_panel=_PANEL),
]
Png = Annotated[
    bool,
    typer.Option(
        "--png",
        help="Write the map of every picture, not of the strangest alone.",
        rich_help_panel=_PANEL,
    ),
]

Fail = Annotated[
    bool,
    typer.Option(
        "--fail", help="End with exit code 6 where a picture is flagged, for scripts.", rich_help_panel=_PANEL
    ),
]


def check(input_: str | None, single: Mapping[str, object], others: Mapping[str, object]) -> None:
    """Raises UsageError for options that do not go together, MissingError where the pictures are not
    there."""
    if input_ is None:
        if wrong := next((name for name, value in single.items() if value), None):
            raise UsageError(f"`{wrong}` goes with `--input`", hint="gz ood RUN --input ./pictures")
        return
    if wrong := next((name for name, value in others.items() if value), None):
        raise UsageError(
            f"`--input` judges single pictures, `{wrong}` compares sets", hint="leave one of them out"
        )
    if single["--png"] and not single["--map"]:
        raise UsageError("`--png` writes maps", hint="add `--map`")
    if not path_of(input_).exists():
        raise MissingError(
            f"there is no `{input_}`", hint="give a picture, or a folder, zip, tar or npz of pictures"
        )


def path_of(text: str) -> Path:
    """The absolute path of the pictures. Raises UsageError for a URL."""
    from gzcli.data.sets.names import local

    return local(text)


def rate(text: str | None) -> float:
    """The value of `--fpr`, `1%` or `0.01`, as a share. Raises UsageError outside 0 … 1."""
    word = (text or "1%").strip()
    try:
        share = float(word.removesuffix("%")) / (100 if word.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise UsageError(f"`--fpr {text}` is no share between 0 and 1", hint="`--fpr 1%`, or `--fpr 0.01`")
    return share


def check_maps(model: ModelCard) -> None:
    """Raises UsageError that names the models that can, where this one makes no maps."""
    from gzcli.models.catalog import cards

    if not model.maps:
        able = ", ".join(card.name for card in cards().values() if card.maps)
        raise UsageError(
            f"`{model.name}` does not say where a picture is anomalous", hint=f"these do: {able}"
        )


def table(result: Mapping[str, Any]) -> None:
    """Prints the flagged pictures, strangest first, and how many there are; within 80 columns."""
    from gzcli.data.readers.kinds import counted

    flagged = [row for row in result["files"] if row["flagged"]]
    names, draws = list(result["thresholds"]), result["seeds"]
    shown = names[: 1 if draws > 1 else 2]  # as many as 80 columns hold, with their spread

    def line(row: Mapping[str, Any]) -> list[str]:
        cells = [_short(row["file"]), f"{row['p']:.4f}"]
        for name in shown:
            score = row["scores"][name]
            cells.append("not finite" if score is None else f"{score:.4g}")
            if draws > 1:
                cells.append("" if score is None else f"{row['spread'][name]:.2g}")
        return cells

    if flagged:
        heads = [head for name in shown for head in ((name, "±") if draws > 1 else (name,))]
        out.table(["file", "p", *heads], [line(row) for row in flagged[:LINES]])
    if len(flagged) > LINES:
        out.info(f"and {len(flagged) - LINES:,} more: `alarm.csv` has all pictures, strangest first")
    total, compared = len(result["files"]), result["compared"]["n"]
    by = f"by {', '.join(names)}, against {compared:,} held-out images"
    out.info(f"flagged: {len(flagged):,} of {counted(total, 'picture')} {by}")
    if draws > 1:
        out.info(f"scores are means over {draws} draws of noise, ± is the deviation between the draws")
    if low := sum(row["side"] == "low" for row in flagged):
        out.info(f"{low:,} by a score below the usual, as that of pictures simpler than those of the set")
    named, rate_ = Path(result["in"]).name, result["fpr"]
    share = f"of pictures like those of `{named}` at most {100 * rate_:.3g} % are, on average"
    about = rate_ * total
    out.info(f"{share}: {about:.2g} of {total:,}" if about >= 1 else share)
    if len(flagged) < total:
        out.info("the others may be foreign all the same: a score of a whole picture misses small defects")
    for message in result["unreadable"]:
        out.warn(f"left out: {message}")


def _short(name: str) -> str:
    return name if len(name) <= NAME else f"…{name[1 - NAME :]}"
