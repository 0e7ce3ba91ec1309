"""What `gz bench` tells beside its figures: in which direction they are better, notes, and what they depend
on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from gzcli.core.jobs import BenchJob
from gzcli.judge.contestants import Contestant
from gzcli.judge.figures import Found, direction
from gzcli.judge.images import treatment
from gzcli.judge.quality import Quality


def told(name: str, found: Found) -> dict[str, Any]:
    """Figures under a name, and their intervals under `intervals` or `NAME_intervals`, for JSON."""
    ends = {k: [v.low, v.high] for k, v in found.items() if v.low is not None}
    intervals = "intervals" if name == "metrics" else f"{name}_intervals"
    return {name: {k: v.value for k, v in found.items()}, intervals: ends}


def directions(found: Sequence[Mapping[str, Any]]) -> dict[str, str | None]:
    """In which direction each figure is better: "down", "up" or None."""
    return {name: direction(name) for figures in found for name in figures}


def brief(values: Mapping[str, float]) -> str:
    return "   ".join(f"{k} {v:.4g}" for k, v in values.items() if k.startswith(("fd", "bpd", "nats")))


def notes(
    contestants: Sequence[Contestant],
    rows: Sequence[Mapping[str, Any]],
    quality: Quality,
    sizes: Sequence[int],
) -> list[str]:
    """Notes without which the figures could be misread."""
    binary = any(one.levels == 2 for one in contestants)
    pack = quality.pack
    lines = [line for n in sizes for line in quality.warnings(n)]
    lines += treatment({pack.meta.name: pack}, 2 if binary else None)
    lines += [note for one in contestants for note in one.notes]
    if len(sizes) > 1:
        counts = ", ".join(f"{n:,}" for n in sizes)
        lines.append(f"the contestants have {counts} images: compare each with the floor of its own number")
    if quality.stats:
        file = quality.stats.facts["file"]
        lines.append(f"`{quality.stats.metric}` is the distance to the mean and covariance in `{file}`")
    lines += [
        f"the floor of {n:,} samples is of {quality.floor_size(n):,} real images, as there are no more"
        for n in sizes
        if quality.floor_size(n) < n
    ]
    if "worth" in quality.metrics and (
        bare := [one.name for one in contestants if one.images.labels is None]
    ):
        lines.append(f"`worth` needs labels, which there are none of with `{'`, `'.join(bare)}`")
    likelihoods = [row["likelihood"] for row in rows if "likelihood" in row]
    if any(found["given_labels"] for found in likelihoods):
        lines.append(
            "columns `|y` are of log p(x | y), the label given: not to be compared with those of log p(x)"
        )
    if any(found["marginal"] for found in likelihoods):
        lines.append(
            "log p(x) of a conditional model is log Σ p(y) p(x | y), classes as frequent as in training"
        )
    return list(dict.fromkeys(lines))


def provenance(quality: Quality, job: BenchJob, processes: int) -> dict[str, Any]:
    """What the figures depend on, beside the facts of each row."""
    pack = quality.pack
    return {
        "n_real": len(quality.real.reference(None)),
        "n_fake": job.n,
        "split": job.split,
        "shape": list(pack.meta.shape),
        "levels": pack.meta.levels,
        "resized": pack.meta.resized,
        "digest": pack.meta.digest,
        "seed": job.seed,
        "checkpoint": job.checkpoint,
        "processes": processes,
        **quality.provenance(),
        "versions": {
            name: version(name) for name in ("gzcli", "torch", "torch-fidelity", "numpy", "scikit-learn")
        },
    }
