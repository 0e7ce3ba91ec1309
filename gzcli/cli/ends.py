"""How a verb ends: a line of what came out, and what to type next. They stand on stderr, as no script reads
them."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from gzcli.cli import out
from gzcli.core.units import counted, duration, size

if TYPE_CHECKING:
    from pathlib import Path

    from gzcli.store.runs import Run

FIRST = "fm"  # the model that a new data set is tried with: the best pictures of those that train in minutes
LABEL = len("next: ")


def end(facts: Iterable[str | None], then: Iterable[tuple[str, str]] = ()) -> None:
    """Prints `done: …`, and `next: …` with a command a line.

    facts: what came out; None for what is not known.
    then: commands with what each is for, which is left out where the line has no room for it.
    """
    if out.is_quiet() or out.is_json():
        return
    if told := ", ".join(filter(None, facts)):
        out.info(f"{out.style('done:', 'cyan')} {told}")
    steps = list(then)
    room, longest = out.width(), max((len(command) for command, _ in steps), default=0)
    for i, (command, purpose) in enumerate(steps):
        head = out.style("next:", "cyan") + " " if not i else " " * LABEL
        fits = purpose and LABEL + longest + 2 + len(purpose) <= room
        gap = " " * (longest - len(command) + 2)
        out.line(head + out.style(command, "bold") + (gap + purpose if fits else ""))


def took(since: float) -> str:
    """The time since `time.monotonic()` was `since`, as people read it."""
    return duration(time.monotonic() - since)


def bytes_of(path: Path) -> str:
    """The size of a file, or of all files in a folder, as people read it."""
    files = path.rglob("*") if path.is_dir() else [path]
    return size(sum(file.lstat().st_size for file in files if file.is_file()))


def name_of(run: Run) -> str:
    """The shortest word by which a command means a run of the store."""
    from gzcli.store.runs import short_names

    return quoted(run.alias or short_names([run])[run.id])


def quoted(text: object) -> str:
    """A text as a shell takes it for one word."""
    return shlex.quote(str(text))


def new_set(images: int | None, words: str, began: float, *, show: bool) -> None:
    """The end of a verb that makes a set ready: how many images, and to look at it or train on it.

    images: how many; None: they are not packed yet.
    words: what `--data` takes, with further options.
    began: when the verb did, by `time.monotonic()`.
    show: whether it can be drawn.
    """
    drawn = [(f"gz data show {words}", "its classes, and a sheet of its pictures")] if show else []
    trained = (f"gz train {FIRST} --data {words}", "a model of it")
    end([counted(images, "image") if images else None, took(began)], [*drawn, trained])


def after_training(run: Run) -> None:
    """The end of `gz train`: best figure, time and size; to draw from the run, and to see how good it is."""
    from gzcli.cli.summary import in_words, summary
    from gzcli.store.runs import all_runs

    row, name = summary(run), name_of(run)
    shown, best = in_words(row), row["best"]
    figure = f"best {shown['best']} at step {best['step']:,}" if best else None
    others = [r for r in all_runs(data=run.data) if r.state == "finished" and r.path != run.path]
    second = (f"gz bench {name}", "how good they are, beside real images")
    if others:
        like = next((r for r in others if r.model == run.model), others[0])
        second = (f"gz runs compare {name} {name_of(like)}", "what was better, and why")
    params = f"{shown['params']} parameters" if shown["params"] else None
    facts = [figure, shown["time"], params, shown["size"]]
    end(facts, [(f"gz sample {name}", "pictures from it"), second])
