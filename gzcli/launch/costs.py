"""What a training step costs and how long it takes, as it was found by the engine and kept in the cache. No
heavy import.

A cost depends on the recipe and the code alone; a time on the machine too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gzcli.core.devices import PEAKS, cpu_name, gpu_name
from gzcli.core.errors import DamagedError
from gzcli.core.parts import Part
from gzcli.models import catalog
from gzcli.store import files
from gzcli.store.paths import cache_dir

# The share of an H100's peak that a net of this zoo is taken to reach, and what the launch of one operator
# takes PyTorch's host in seconds, which small nets wait for.
H100, SHARE, LAUNCH = 1e12 * PEAKS["H100"]["bf16"], 0.2, 6e-6
PAUSES = 0.1  # share of the time that pictures, validation and checkpoints take; `--minutes` counts so too
# What a process takes beside its tensors: gaps that its allocator leaves, as a share of them, and scratch of
# its libraries in bytes. Fitted to vae, glow, pixelcnn and vqvae on a CPU.
GAPS, SCRATCH = 0.15, 12e6
# Keys of a recipe, and of its `train` section, on which neither the cost nor the time of a step depends.
APART = ("seed", "about", "scale", "sample", "ood", "bench", "params")
PAUSING = ("log_every", "sample_every", "samples", "eval_every", "checkpoint_every", "keep", "best", "init")


@dataclass(frozen=True)
class Line:
    """A cost by the micro-batch: `fixed` + b · `each` for b images."""

    fixed: float
    each: float

    def at(self, images: float) -> float:
        """The cost of a micro-batch."""
        return self.fixed + images * self.each


@dataclass(frozen=True)
class Cost:
    """What a training step costs; memory is that of one process.

    params: parameters of the model, without those of frozen helpers.
    flops: floating-point operations of a step of the global batch, forward and backward, and of Muon. A phase
      counts by the share of the steps at which it runs.
    operators: operators that a process runs in a step.
    weights: bytes of parameters, buffers and frozen helpers.
    gradients: bytes.
    moments: bytes that the optimizer keeps.
    average: bytes of the averaged weights.
    scratch: bytes that the optimizer takes beside these while it steps.
    step: the most bytes of tensors that a phase makes: what is kept for the gradient, temporary tensors, and
      the gradients that are there by then.
    images: the micro-batch, images that a process computes at once.
    pieces: micro-batches of a process whose gradients a step adds up.
    processes: processes that share a batch.
    """

    params: int
    flops: float
    operators: float
    weights: int
    gradients: int
    moments: int
    average: int
    scratch: int
    step: Line
    images: int
    pieces: int
    processes: int

    def activations(self, images: int | None = None, pieces: int | None = None) -> int:
        """Bytes of a step's own tensors for a micro-batch; None: that of the recipe."""
        peak = self.step.at(self.images if images is None else images)
        # gradients that are added up are there all the time; they are counted by themselves
        alone = (pieces or self.pieces) == 1
        return max(self.scratch, round(peak - (self.gradients if alone else 0)))

    def rows(self, images: int | None = None, pieces: int | None = None) -> list[tuple[str, int]]:
        """(what, bytes) of a process, for a micro-batch and a number of pieces; None: those of the recipe."""
        rows = [
            ("weights", self.weights),
            ("gradients", self.gradients),
            ("optimizer", self.moments),
            ("average", self.average),
            ("activations", self.activations(images, pieces)),
        ]
        rows.append(("gaps and scratch", round(SCRATCH + GAPS * sum(size for _, size in rows))))
        return [row for row in rows if row[1]]

    def memory(self, images: int | None = None, pieces: int | None = None) -> int:
        """Bytes of a process, without the code of its libraries and the data set."""
        return sum(size for _, size in self.rows(images, pieces))

    def largest(self, there: int) -> int:
        """The largest micro-batch that fits in so many bytes; 0: not even one image does."""
        low, high = 0, 1 << 32
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.memory(middle) <= there else (low, middle)
        return low

    def pieces_for(self, there: int) -> int | None:
        """The fewest pieces in which a process's share of the batch fits in so many bytes; None: no number
        does."""
        share = self.images * self.pieces
        able = (k for k in range(self.pieces, share + 1) if share % k == 0)
        return next((k for k in able if self.memory(share // k, k) <= there), None)

    def on_h100s(self, gpus: int = 1) -> float:
        """About how many seconds a step takes on so many H100s."""
        return max(self.flops / gpus / (H100 * SHARE), self.operators * LAUNCH)


def cost_from(tree: Mapping[str, Any]) -> Cost:
    """The cost that `asdict` made the tree of."""
    return Cost(**{**tree, "step": Line(**tree["step"])})


# ---------------------------------------------------------------------------- the cache


def key_of(part: Part, shape: Mapping[str, Any], stages: Mapping[str, Part]) -> str:
    """The name under which the cost of a part is kept: a hash of all that it depends on.

    shape: description of the data set.
    stages: what the model is built on.
    """
    parts = (part, *stages.values())
    sources = [_source(catalog.card(p.model).path) for p in parts]
    text = repr(([_of_step(p) for p in parts], sorted(shape.items()), sources, code(), version("torch")))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _of_step(part: Part) -> dict[str, Any]:
    """The keys of a part that a step depends on."""
    tree = {key: value for key, value in part.tree().items() if key not in APART}
    return {**tree, "train": {key: v for key, v in tree["train"].items() if key not in PAUSING}}


@cache
def code() -> str:
    """A hash of the code that a cost depends on."""
    root = Path(__file__).resolve().parents[1]
    read = [Path(__file__), *root.glob("models/**/*.py"), *(root / "engine").glob("*.py")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(read))).hexdigest()


def _source(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def kept(key: str) -> Cost | None:
    """The cost that is kept under a key; None: it is not known."""
    tree = _read(key)
    return cost_from(tree["cost"]) if tree else None


def kept_seconds(key: str, machine: str) -> float | None:
    """How many seconds a step took on a machine; None: it was not tried."""
    return _read(key).get("seconds", {}).get(machine)


def keep(key: str, cost: Cost, machine: str, seconds: float | None) -> None:
    """Keeps a cost, and how long a step took on a machine; None: it was not tried."""
    path = _path(key)
    known = _read(key).get("seconds", {})
    now = {} if seconds is None else {machine: seconds}
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, {"cost": asdict(cost), "seconds": known | now})


def _path(key: str) -> Path:
    return cache_dir("costs", f"{key}.json")


def _read(key: str) -> dict[str, Any]:
    """What is kept under a key; {} where that is nothing, or damaged."""
    try:
        found = files.read_object(_path(key))
        if found:
            cost_from(found["cost"])
            dict.items(found.get("seconds", {}))
        return found
    except (DamagedError, KeyError, TypeError):
        return {}


def machine_of(threads: int, gpus: int) -> str:
    """This machine, as far as the time of a step depends on it: its GPU, or its CPU and the threads."""
    return gpu_name() if gpus else f"{cpu_name()}, {threads} threads"
