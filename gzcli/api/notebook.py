"""Output in notebooks: progress bars of training and sampling, and a run as a table. A notebook does not show
what other processes print, so the bar of a training reads the lines that the run records."""

from __future__ import annotations

import builtins
import html
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from gzcli.core.types import Progress, no_progress
from gzcli.store.metrics import metric_lines
from gzcli.store.run_folder import Run

REFRESH_SECONDS = 0.5  # seconds between two looks at a run


def is_here() -> bool:
    """Whether this process is the kernel of a notebook."""
    shell = getattr(builtins, "get_ipython", None)
    return shell is not None and type(shell()).__name__ == "ZMQInteractiveShell"


def shown_bar() -> Callable[[str, float, float, str], None]:
    """Returns a bar below the cell. Call it with title, done, total and a note; each call replaces the
    previous output."""
    from IPython.display import HTML, display

    handle = display(HTML(""), display_id=True)
    return lambda title, done, total, note: handle.update(HTML(bar_html(title, done, total, note)))


def bar_html(title: str, done: float, total: float, note: str = "") -> str:
    words = f"{title} {done:,.0f}/{total:,.0f}  {note}".strip()
    return f'<progress value="{done:g}" max="{total:g}"></progress> <code>{html.escape(words)}</code>'


@contextmanager
def sampling(title: str, progress: Progress) -> Iterator[Progress]:
    """Yields the caller's callback or, in a notebook without one, a bar for calls `progress(i, n, x)`."""
    if progress is not no_progress or not is_here():
        yield progress
        return
    bar = shown_bar()
    yield lambda i, n, x=None: bar(title, i, n, "")


class TrainingBar:
    """The progress bar of a run that another process trains. `begin` starts it for a run; leaving the block
    ends it."""

    def __init__(self, shown: bool):
        self.run: Run | None = None
        self._thread: threading.Thread | None = None
        self._end = threading.Event()
        self._bar = shown_bar() if shown else None

    def begin(self, run: Run) -> None:
        self.run = run
        if self._bar:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()

    def __enter__(self) -> TrainingBar:
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        if self._thread:
            self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(REFRESH_SECONDS):
            self._look()
        self._look()

    def _look(self) -> None:
        run = self.run
        part = run and next((stage for stage in run.stages if stage.state != "finished"), run.serving)
        lines = metric_lines(part.path) if part else []
        if part and lines and self._bar:
            line, steps = lines[-1], part.status().get("steps") or lines[-1]["step"]
            names = [name for name in line if name.endswith("loss") or name == "it_s"]
            note = "  ".join(f"{name} {line[name]:.4g}" for name in names)
            self._bar("train" if part is run else part.path.name, line["step"], steps, note)


def table_html(rows: Mapping[str, Any], picture: str | None = None) -> str:
    """A table of two columns, with an image in base64 below it."""
    cells = "".join(
        f"<tr><th style='text-align:left'>{html.escape(str(key))}</th><td>{html.escape(str(value))}</td></tr>"
        for key, value in rows.items()
        if value is not None
    )
    shown = f'<img src="data:image/png;base64,{picture}"/>' if picture else ""
    return f"<table>{cells}</table>{shown}"
