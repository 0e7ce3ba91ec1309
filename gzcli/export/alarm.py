"""An alarm that needs neither gz nor torch: its models as one ONNX graph, its held-out scores as a table, and
a script that judges images by them.

The graph takes images uint8 [N, C, H, W]. It returns `score` [N, K] for K models and, for most methods, `map`
[N, H, W]. The false-alarm rate is not stored; it is an argument of the script.
"""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gzcli.core.errors import DivergedError, MissingError, UsageError, install_line
from gzcli.core.sections import Fit
from gzcli.data.readers.images import PILLOW_FORMATS, SUFFIXES
from gzcli.engine.log import Log
from gzcli.export import portable_alarm
from gzcli.judge import methods
from gzcli.judge.scores import write_csv
from gzcli.metrics.alarms.cross import Calibrated
from gzcli.metrics.alarms.fitted import Fitted, sharing
from gzcli.metrics.alarms.pca import Combinations, Components
from gzcli.metrics.alarms.state import tensor
from gzcli.store import files
from gzcli.store.jobs import PortableJob

GRAPH, TABLE = "alarm.onnx", "held_out.csv"  # names of the files that the script checks
OPSET = 20
# rounding errors of an eigenvalue, as a share of the largest, and of a row of length 1
NOISE, EXACT = 1e-10, 1e-5
Shape = tuple[int, int, int]

# ---------------------------------------------------------------------------- the graph


class Judge(nn.Module):
    """The scores [N, K] of K models, and the mean of their maps [N, H, W], of images uint8 [N, C, H, W]."""

    def __init__(self, models: Sequence[Fitted]):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        with sharing(image):
            scores, maps = zip(*(model(image) for model in self.models), strict=True)
        score = torch.stack(scores, 1)
        return (score,) if maps[0] is None else (score, torch.stack(maps).mean(0))


def graph_of(models: Sequence[Fitted], shape: Shape) -> bytes:
    """The models as one ONNX graph. Raises UsageError for a method that no graph can compute."""
    if not all(type(model).exports for model in models):
        raise UsageError(
            "the method cannot be computed by a graph", hint="gz ood --in ./good --export ./alarm"
        )
    judge = Judge(with_common_bases(models)).eval()
    images = torch.zeros(2, *shape, dtype=torch.uint8)
    return onnx_of(judge, images, {"image": {0: torch.export.Dim("n")}}, ["score", "map"])


def onnx_of(module: nn.Module, image: Tensor, dynamic: Any, outputs: Sequence[str]) -> bytes:
    """A module with one input as an ONNX graph."""
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # errors in the exporters' own code
        program = torch.export.export(module, (image,), dynamic_shapes=dynamic)
        how: dict[str, Any] = {"dynamo": True, "verbose": False, "opset_version": OPSET, "optimize": False}
        exported = torch.onnx.export(program, (), input_names=["image"], output_names=[*outputs], **how)
    assert exported is not None  # of `dynamo`
    graph = exported.model_proto
    for node in graph.graph.node:
        node.ClearField("metadata_props")  # stack traces, with the paths of this machine
    return graph.SerializeToString()


def with_common_bases(models: Sequence[Fitted]) -> list[Fitted]:
    """The models with components that are combinations of a basis that all share, if that is much smaller."""
    shared = copy.deepcopy(list(models))
    every = [
        (owner, name, part)
        for model in shared
        for owner in model.modules()
        for name, part in owner.named_children()
        if isinstance(part, Components)
    ]
    for side in {part.rows.shape[1] for _, _, part in every}:
        group = {id(part.rows): part.rows for _, _, part in every if part.rows.shape[1] == side}
        basis = common_basis([rows.numpy() for rows in group.values()]) if len(group) > 1 else None
        if basis is None:
            continue
        rows = {key: each @ basis.mT for key, each in group.items()}
        for owner, name, part in every:
            if id(part.rows) in rows:
                setattr(owner, name, Combinations(part.mean, rows[id(part.rows)], basis))
    return shared


def common_basis(every: Sequence[np.ndarray]) -> Tensor | None:
    """An orthonormal basis of the span of all these rows [k, D], if together with the rows in its coordinates
    it is less than half as large as the rows. The components of 20 folds of 70 images are combinations of
    these images. The basis is that of random mixtures of the rows (Halko et al. 2011, arXiv:0909.4061)."""
    stacked = np.concatenate(every)
    n, d = stacked.shape
    most = max(1, n * d // (2 * (n + d)))
    some = np.random.default_rng(0).normal(size=(most, n)).astype(np.float32) @ stacked
    basis = np.linalg.qr(some.T)[0].T
    inside = (stacked @ basis.T).astype(np.float64)
    values, turn = np.linalg.eigh(inside.T @ inside)
    basis = turn[:, values > NOISE * values[-1]].T.astype(np.float32) @ basis
    missing = np.linalg.norm(stacked - (stacked @ basis.T) @ basis, axis=1)
    return tensor(basis) if missing.max() < EXACT else None


# ---------------------------------------------------------------------------- the files


def write(alarm: Calibrated, shape: Shape, fit: Fit, folder: Path, facts: dict[str, Any]) -> list[str]:
    """Writes the files of an alarm on images of a shape into a folder. Returns their names.

    fit: how images of another shape are resized.
    facts: further entries of `alarm.json`, which the script does not read.
    """
    check(fit)
    files.write_atomic(folder / GRAPH, graph_of(alarm.models, shape))
    table(folder, alarm.fold, alarm.held_out)
    spec = {"shape": list(shape), "fit": fit, "tails": alarm.tails, **facts}
    return script(folder, spec, len(alarm.held_out))


def run(job: PortableJob, folder: Path, device: Any, log: Log) -> dict[str, Any]:
    """Writes the alarm of a method without training to `job.out`. Returns the JSON of `gz ood --export`."""
    check("crop")
    good = methods.open_good(job, log.info)
    for note in good.notes:
        log.info(note)
    alarm = methods.alarm_of(good, job, log.info)
    facts = methods.facts(good, alarm, job)
    spec = {key: facts[key] for key in ("method", "settings", "hash", "fitted_on")}
    names = write(alarm.calibrated, good.pack.meta.shape, good.form["fit"], Path(job.out), spec)
    return facts | {"path": job.out, "files": names, "held_out": len(alarm.calibrated.held_out)}


def check(fit: Fit) -> None:
    """Raises MissingError if a package of ONNX is missing, UsageError for a `fit` that the
    script does not support."""
    if missing := [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]:
        message = f"an exported alarm needs {', '.join(missing)}"
        raise MissingError(message, hint=install_line("gzcli[onnx]"))
    if fit not in ("crop", "stretch"):
        message = f"an exported alarm does not support `data.fit: {fit}`"
        raise UsageError(message, hint="use `data.fit: crop` or `stretch`")


def table(folder: Path, fold: np.ndarray, held_out: np.ndarray) -> None:
    """Writes the table of held-out scores. Raises DivergedError if one is not finite, because it would hide
    every foreign image."""
    if not np.isfinite(held_out).all():
        raise DivergedError("an alarm with a held-out score that is not finite cannot be exported")
    rows = ([int(k), float(score)] for k, score in zip(fold, held_out, strict=True))
    write_csv(folder / TABLE, ["fold", "score"], rows)


def script(folder: Path, spec: dict[str, Any], held_out: int) -> list[str]:
    """Writes the script and its description of an alarm whose graph and table are in the folder. Returns the
    names of all files."""
    kinds = {"formats": PILLOW_FORMATS, "suffixes": SUFFIXES}
    checks = {
        "held_out": held_out,
        "sha256": {name: files.checksum(folder / name) for name in (GRAPH, TABLE)},
    }
    files.write_json(folder / "alarm.json", spec | kinds | checks)
    shutil.copyfile(portable_alarm.__file__, folder / "judge.py")
    return [GRAPH, TABLE, "alarm.json", "judge.py"]
