"""`gz runs ema`: averages of the weights with any length, computed after the training from snapshots of two
other averages (Karras et al. 2024, arXiv:2312.02696, §3.2 and appendix C).

At time t, a power-function average weighs the weights of time τ ≤ t by a profile p(τ) = (γ + 1) τ^γ / t^(γ +
1). Its length is the standard deviation of p in units of t. Averages are linear in their profiles. A
requested profile is therefore fitted by a linear combination of the snapshots' profiles, and its average is
the same combination of the snapshots.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gzcli.core import ranks
from gzcli.core.errors import DamagedError, MissingError, UsageError
from gzcli.core.hints import Option, advice, setting
from gzcli.core.sections import TrainSection
from gzcli.core.types import Batch, Say
from gzcli.core.units import counted
from gzcli.data.packs.batches import TrainBatches, TrainImages
from gzcli.data.packs.open import open_pack, pack_options
from gzcli.data.packs.pack import check_unchanged
from gzcli.engine import checkpoint
from gzcli.engine.ema import CALIBRATION_IMAGES, EMA, LENGTHS, exponent, random_images
from gzcli.engine.log import Log
from gzcli.engine.prepared import train_images
from gzcli.engine.trained import Trained, load_trained
from gzcli.engine.validate import best_metric, chosen_by, judge_of, validate
from gzcli.store import files
from gzcli.store.jobs import EmaJob
from gzcli.store.runs import Run

# candidate lengths; the best one is chosen
TRIED_LENGTHS = (0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25)
REMOVE = "remove it to average the others"
MAX_PROFILE_ERROR = 0.1  # largest relative error of a fitted profile


class Snapshots:
    """The files RUN/snapshots/00001000.safetensors, each with the power-function averages at one step."""

    def __init__(self, run: Run, ema: EMA, train: TrainSection):
        self.folder, self.ema = run.snapshots_folder, ema
        self.every = -(-train.steps // train.ema_snapshots) if train.ema_snapshots else 0
        if self.every and not train.ema:
            message = "`train.ema_snapshots` needs averaged weights, but `train.ema` is 0"
            raise UsageError(message, hint="set `train.ema=0.999`, or omit `train.ema_snapshots`")

    def take(self, done: int, *, last: bool = False) -> None:
        """Writes a file if `done` is a multiple of the interval; with `last`, if it is not. Every rank must
        call it; rank 0 writes."""
        if not self.every or (done % self.every == 0) == last:
            return
        averages = ranks.gathered(self.ema.power_state())
        if ranks.rank() == 0:
            named = {f"{length}/{k}": v for length, state in averages.items() for k, v in state.items()}
            tensors = checkpoint.weights_of(named)
            files.need_space(self.folder, sum(t.nbytes for t in tensors.values()))
            facts = {"step": str(done), "sha256": digest_of(tensors)}
            files.write_tensors(self.folder / f"{done:08d}.safetensors", tensors, facts)

    def trim(self, done: int) -> None:
        """Removes files of steps after `done`, which will be written again. In an extended run, it also thins
        them out to at most `train.ema_snapshots`."""
        if ranks.rank() == 0 and self.every:
            files.remove_leftovers(self.folder)
            for step, path in snapshots_in(self.folder).items():
                if step > done or step % self.every:
                    path.unlink()


def snapshots_in(folder: Path) -> dict[int, Path]:
    """The snapshots in a folder by step, in order; other files are ignored."""
    paths = [path for path in sorted(folder.glob("*.safetensors")) if path.stem.isdecimal()]
    return {int(p.stem): p for p in paths if p.is_file() and p.stem == f"{int(p.stem):08d}"}


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of named tensors on the CPU."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_snapshot(path: Path, like: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The averages of a snapshot, by length and parameter name. Raises DamagedError if it is incomplete or
    its parameters differ from those of `like`."""
    tensors, facts = files.read_tensors(path, REMOVE)
    with files.reading(path, REMOVE):
        shapes = {f"{length:g}/{name}": value.shape for length in LENGTHS for name, value in like.items()}
        if {name: value.shape for name, value in tensors.items()} != shapes:
            raise ValueError("its tensors are not those of this run")
        if not all(value.isfinite().all() for value in tensors.values()):
            raise ValueError("its values are not finite")
        if int(facts.get("step", path.stem)) != int(path.stem):
            raise ValueError(f"it belongs to step {facts['step']}")
        if "sha256" in facts and facts["sha256"] != digest_of(tensors):  # older ones have none
            raise ValueError("it does not match its checksum")
    averages: dict[str, dict[str, Tensor]] = {f"{length:g}": {} for length in LENGTHS}
    for key, value in tensors.items():
        length, _, name = key.partition("/")
        averages[length][name] = value
    return averages


def whole_snapshots(run: Run, like: Mapping[str, Tensor], warn: Say) -> dict[int, Path]:
    """The undamaged snapshots of a run, by step; `warn` gets a line about each damaged one. Raises
    MissingError if none is undamaged."""
    whole = {}
    for step, path in snapshots_in(run.snapshots_folder).items():
        try:
            read_snapshot(path, like)
            whole[step] = path
        except DamagedError as e:
            warn(f"{e.message}; averaging the others")
    if not whole:
        message = f"no intact snapshot in `{run.snapshots_folder}`"
        raise MissingError(
            message, hint=advice("train with {} to save snapshots", setting("train.ema_snapshots", 20))
        )
    return whole


# ---------------------------------------------------------------------------- profiles


def product(t: Any, gamma: Any, s: Any, gamma_s: Any) -> np.ndarray:
    """⟨p, q⟩ = ∫ p q dτ of profiles p of time t and exponent γ, and q of time s and another exponent."""
    later = np.maximum(t, s)
    ratio, of_later = np.minimum(t, s) / later, np.where(np.greater(s, t), gamma_s, gamma)
    return (gamma + 1) * (gamma_s + 1) / (gamma + gamma_s + 1) * ratio**of_later / later


def fitted(times: np.ndarray, lengths: np.ndarray, time: int, length: float) -> tuple[np.ndarray, float]:
    """The coefficients [n] with which n averages of given times and lengths best approximate another average,
    and the relative error of the approximated profile. The fit is least squares over profiles."""
    gammas, gamma = np.array([exponent(float(value)) for value in lengths]), exponent(length)
    gram = product(times[:, None], gammas[:, None], times, gammas)
    target = product(times, gammas, time, gamma)
    factors = np.linalg.lstsq(gram, target, rcond=None)[0]
    missed = 1 - factors @ target / product(time, gamma, time, gamma)
    return factors, float(np.sqrt(max(0.0, missed)))


def average(
    places: Mapping[int, Path], like: Mapping[str, Tensor], step: int, length: float
) -> tuple[dict[str, Tensor], float]:
    """The average of a length after `step` steps, computed from snapshots, and the relative error of its
    profile. `like` are weights with the same names and shapes. Raises UsageError if the error exceeds
    MAX_PROFILE_ERROR."""
    times = np.repeat([float(step) for step in places], len(LENGTHS))
    factors, missed = fitted(times, np.tile(LENGTHS, len(places)), step, length)
    if missed > MAX_PROFILE_ERROR:
        message = f"{counted(len(places), 'snapshot')} cannot give an average of length {length:g}"
        hint = "use a length closer to 0.05 … 0.1, or train with a larger `train.ema_snapshots`"
        raise UsageError(f"{message}: the error of its profile would be {missed:.0%}", hint=hint)
    total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in like.items()}
    for path, row in zip(places.values(), factors.reshape(len(places), -1), strict=True):
        for profile, factor in zip(read_snapshot(path, like).values(), row, strict=True):
            for name, value in profile.items():
                total[name] += value.double() * factor
    return {name: value.float() for name, value in total.items()}, missed


# ---------------------------------------------------------------------------- the job


def run(job: EmaJob, folder: Path, device: torch.device, log: Log) -> dict[str, Any]:
    """Makes the average of `job.length` the run's weights; without a length, the average that is best by the
    metric of the best checkpoint. Returns the JSON of `gz runs ema`."""
    run = Run(Path(job.run))
    trained = load_trained(run, device, str(run.saved_steps[-1]))
    part, model, step = trained.part, trained.model.train(), trained.step
    pack = open_pack(part.data.name, **pack_options(part.data), say=log.info)
    check_unchanged(run.owner.path, pack.meta)
    images, _, _ = train_images(part, pack, device, run, log)
    net, metric = None, best_metric(model, part.train.best, pack)
    if metric == "fd":
        net, metric = judge_of(model, pack, device, log, chosen_by(run, part.train))
    if metric is None and job.length is None:
        message = "no metric can choose the length: `train.best` is `none`, or there are no validation images"
        raise UsageError(message, hint=advice("choose it yourself: {}", Option("length", "0.05")))
    model.on_step(step - 1)  # annealed values are those at the end of the training
    ema = EMA(model, part.train.ema, partial(some_images, images, trained))
    usual = checkpoint.read_weights(run.checkpoint(served_by_training(run)).averaged).weights
    usual, rows, best = {name: usual[name] for name in ema.state_dict()}, [], None
    places = whole_snapshots(run, usual, log.warn)
    for length in (None, *TRIED_LENGTHS) if job.length is None else (job.length,):
        row: dict[str, Any] = {"length": length, "missed": None, "value": None}
        try:
            weights, row["missed"] = (usual, None) if length is None else average(places, usual, step, length)
        except UsageError:
            if job.length is not None:
                raise
            continue
        ema.load_state_dict(weights, step)
        if metric:
            with ema.evaluating():
                values = validate(trained, metric, pack=pack, data=images.pack, net=net, warn=log.warn)
            row["value"] = values[metric]
        rows.append(row)
        if best is None or row["value"] < best[0]["value"]:
            best = row, weights
    assert best is not None  # average of the training itself, or of `job.length`
    serve(run, ema, best[1], best[0]["length"])
    facts = {"run": run.owner.id, "metric": metric, "decay": part.train.ema, "length": best[0]["length"]}
    return facts | {"snapshots": len(places), "rows": rows}


def some_images(images: TrainImages, trained: Trained) -> Iterator[Batch]:
    """Training images of the run, for the calibration of an average."""
    part = trained.part
    batches = TrainBatches(images, part.train.batch_size, n=part.data.n, needs=trained.model.needs)
    return random_images(images, batches.positions(), CALIBRATION_IMAGES)


def served_by_training(run: Run) -> int:
    """The step of the weights that the run's training serves, before any `gz runs ema`."""
    step = run.status().get("served") or 0
    return step if run.checkpoint(step).averaged.exists() else run.saved_steps[-1]


def serve(run: Run, ema: EMA, weights: Mapping[str, Tensor], length: float | None) -> None:
    """Makes an average the run's `model.safetensors`; for None, the average of the training."""
    step = run.saved_steps[-1] if length else served_by_training(run)
    saved = checkpoint.read_weights(run.checkpoint(step).averaged)
    ema.load_state_dict(weights, step)
    saved.weights |= checkpoint.weights_of(ema.state_dict() | ema.statistics())
    with files.replacing(run.model_file) as part:
        checkpoint.save_weights(part, saved)
    run.update(ema_length=length)
