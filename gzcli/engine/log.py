"""The output of the engine: a bar on a terminal, lines for a pipe, JSON events for scripts; `log.txt` and
`metrics.jsonl`."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gzcli.core import streams
from gzcli.core.streams import printable
from gzcli.core.types import Progress, no_progress
from gzcli.store import files
from gzcli.store.run_folder import Run

if TYPE_CHECKING:
    from torch import Tensor

LINE_COLUMNS = 80  # columns of a line of losses; those that do not fit are in `log.txt`
BAR_COLUMNS = 56  # columns of a terminal that the bar needs besides its note
MAX_LOG_BYTES = 16_000_000  # bytes of `log.txt`, 150,000 lines of losses
PLAIN_AFTER = 10.0  # seconds until the first line without a terminal; each further one takes twice as long
PARTS_WITH_LINES = (
    3  # parts of a run that have a line of losses if there is no terminal: `log.txt` has them all
)


class Log:
    """The output of an engine process; silent on ranks other than 0. `GZ_OUTPUT` is human | quiet | json."""

    def __init__(
        self, folder: Path | None = None, *, rank: int = 0, stage: str | None = None, mode: str | None = None
    ):
        self.mode = mode or os.environ.get("GZ_OUTPUT", "human")
        self.main, self.rank, self.stage = rank == 0, rank, stage
        self.folder = folder if self.main else None
        terminal = sys.stderr.isatty() and "CI" not in os.environ and os.environ.get("TERM") != "dumb"
        self.fancy = self.main and self.mode == "human" and terminal
        self._bar: Any = None
        self.validated = ""  # the metrics of the last validation, for the next line of losses

    def info(self, text: str, *, sparse: bool = False) -> None:
        """A line for the user, in `log.txt` too."""
        self.record(text)
        if self.main and self.mode == "human" and (self.fancy or not sparse):
            self.say(text)

    def warn(self, text: str) -> None:
        """A warning, in `log.txt` too; it is shown on stderr unless the mode is quiet."""
        self.record(f"warning: {text}")
        if self.main and self.mode != "quiet":
            self.say(f"warning: {text}")

    def event(self, event: str, **fields: Any) -> None:
        """A line of `--json` for scripts."""
        if self.main and self.mode == "json":
            stage = {"stage": self.stage} if self.stage else {}
            infinite = {k: None for k, v in fields.items() if isinstance(v, float) and not math.isfinite(v)}
            print(json.dumps({"schema": 1, "event": event, **stage, **fields, **infinite}), flush=True)

    def metrics(self, step: int, **values: float) -> None:
        """A line of `metrics.jsonl`."""
        if self.folder:
            with files.appending(Run(self.folder).metrics_file) as f:
                f.write(json.dumps({"step": step, **values}) + "\n")

    @contextmanager
    def bar(self, title: str) -> Iterator[Progress]:
        """Shows a bar on a terminal, elsewhere lines at growing intervals. Yields progress(i, n, x=None)."""
        streams.stop_spinner()
        if not self.main or self.mode != "human":
            yield no_progress
        elif self.fancy:
            with self._rich_bar() as bar:
                task = bar.add_task(printable(title), total=None, note="")
                try:
                    yield lambda i, n, x=None: bar.update(task, completed=i, total=n)
                except BaseException:
                    if bar.tasks[0].total is None:  # no `0/?` above the error
                        bar.update(task, visible=False)
                    raise
        else:
            began, after = time.monotonic(), PLAIN_AFTER

            def progress(i: float, n: float, x: Tensor | None = None) -> None:
                nonlocal after
                if time.monotonic() - began > after:
                    after = 2 * (time.monotonic() - began)
                    self.say(f"{title} {i:.0f}/{n:.0f}")

            yield progress

    @contextmanager
    def training(self, start: int, steps: int, *, stages: int = 1) -> Iterator[TrainBar]:
        """The bar of a training run: step, it/s, time left, losses."""
        streams.stop_spinner()
        if not self.fancy:
            yield TrainBar(self, None, start, steps, lines=math.ceil(PARTS_WITH_LINES / stages))
            return
        with self._rich_bar() as bar:
            yield TrainBar(self, bar, start, steps)

    @contextmanager
    def _rich_bar(self) -> Iterator[Any]:
        """A rich bar with a note at its end. Lines that are printed meanwhile appear above it."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        title, note = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[note]}")
        columns = (title, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note)
        with Progress(*columns, console=Console(stderr=True), transient=False) as bar:
            self._bar = bar
            try:
                yield bar
            finally:
                self._bar = None

    def say(self, text: str) -> None:
        """A line above the bar, or on stderr."""
        if self._bar is not None:
            self._bar.console.print(printable(text), markup=False, highlight=False)
        else:
            erase = streams.ERASE if self.fancy else ""  # erases a spinner
            columns = streams.room(sys.stderr) if self.fancy else None
            print(erase + streams.broken(printable(text), columns), file=sys.stderr, flush=True)

    def record(self, text: str) -> None:
        """A line of `log.txt`, which is renamed to `log.1.txt` beyond MAX_LOG_BYTES bytes."""
        if self.folder and self.folder.is_dir():
            path = Run(self.folder).log_file
            with files.appending(path) as f:
                f.write(f"{time.strftime('%F %T')} {printable(text)}\n")
                full = f.tell() > MAX_LOG_BYTES
            if full:
                os.replace(path, Run(self.folder).earlier_log_file)


class TrainBar:
    """The progress of a training, as a bar or, without a terminal, as a few lines."""

    speed: Speed | None = None  # work of a step; None: only steps per second are shown

    def __init__(self, log: Log, bar: Any, start: int, steps: int, lines: int = PARTS_WITH_LINES):
        self.log, self.bar, self.start, self.steps, self.lines = log, bar, start, steps, lines
        self.part = -1  # index of the last line's part, of the run's `lines` parts
        self.since, self.at = time.monotonic(), start
        self.task = bar.add_task(log.stage or "train", total=steps, completed=start, note="") if bar else None

    def advance(self, step: int) -> None:
        """Called after every step; rich draws ten times a second, however often it is called."""
        if self.bar:
            self.bar.update(self.task, completed=step)

    def show(self, step: int, values: dict[str, float]) -> dict[str, float]:
        """Shows the losses; called every `log_every` steps. Returns the rates since the last call: steps per
        second (`it_s`), and those of `Speed.rates_at`."""
        now = time.monotonic()
        rate = (step - self.at) / max(now - self.since, 1e-9)
        self.since, self.at = now, step
        speeds = self.speed.rates_at(rate) if self.speed else {}
        texts = {key: f"{key} {value:.4g}" for key, value in values.items()}
        main = [text for key, text in texts.items() if key.rsplit(".")[-1] in ("loss", "bpd")]
        if self.bar:  # only these fit beside the bar
            line = "  ".join([f"{rate:.1f} it/s", *main])
            note = with_room(line, in_words(speeds), self.bar.console.width - BAR_COLUMNS)
            self.bar.update(self.task, note=note)
        elif self.log.main and self.log.mode == "human" and self.is_due(step):
            remaining = time.strftime("%H:%M:%S", time.gmtime((self.steps - step) / max(rate, 1e-9)))
            stage = f"{self.log.stage}: " if self.log.stage else ""
            line = f"{stage}step {step}/{self.steps}  {rate:.1f} it/s  {remaining} left"
            validated = [self.log.validated] if self.log.validated else []
            further = [text for text in texts.values() if text not in main]
            extras = [*main[:1], *validated, *main[1:], *further, *in_words(speeds)]
            self.log.say(with_room(line, extras, LINE_COLUMNS))
        losses = "  ".join(texts.values())
        self.log.record("  ".join([f"step {step}  {rate:.2f} it/s  {losses}", *in_words(speeds)]))
        return {"it_s": round(rate, 3), **speeds}

    def is_due(self, step: int) -> bool:
        """Whether to print a line if there is no terminal: the first one, and one in each part of the run.
        None is printed at the end, because the last validation prints its own."""
        part = (step - self.start) * self.lines // (self.steps - self.start)
        due, self.part = part > self.part, part
        return due and not (step == self.steps and self.log.validated)


def with_room(line: str, extras: Sequence[str], width: int) -> str:
    """The line, followed by the `extras` that fit in `width` columns."""
    for text in extras:
        if len(line) + 2 + len(text) <= width:
            line = f"{line}  {text}"
    return line


# ---------------------------------------------------------------------------- speed


@dataclass(frozen=True)
class Speed:
    """The work of a step, which converts steps per second into other rates; None if unknown."""

    images: int
    flops: float | None = None  # floating-point operations
    peak: float | None = None  # FLOP/s of all devices together

    def rates_at(self, rate: float) -> dict[str, float]:
        """`images_s` and, if known, `tflops` and `mfu` (model FLOP utilisation, 0 … 1)."""
        rates = {"images_s": self.images * rate}
        if self.flops:
            rates["tflops"] = self.flops * rate / 1e12
        if self.flops and self.peak:
            rates["mfu"] = self.flops * rate / self.peak
        return {name: float(f"{value:.4g}") for name, value in rates.items()}


def in_words(values: Mapping[str, float]) -> list[str]:
    """The rates of `Speed.rates_at` as text, the most informative first."""
    formats = {"mfu": "MFU {:.0%}", "tflops": "{:.3g} TFLOP/s", "images_s": "{:.3g} images/s"}
    return [text.format(values[name]) for name, text in formats.items() if name in values]
