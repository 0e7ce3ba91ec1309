"""`gz bench`: trained models side by side on one data set: image quality, likelihood, class balance,
speed."""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gzcli import ranks
from gzcli.data import same
from gzcli.data.open import open_named
from gzcli.data.pack import Pack
from gzcli.engine.budget import Images, affordable, subset, timed, treatment
from gzcli.engine.converged import gap_line, solver_gap
from gzcli.engine.devices import synchronise
from gzcli.engine.log import Log
from gzcli.engine.pictures import sample_rows
from gzcli.engine.quality import Judge
from gzcli.engine.sampler import draw
from gzcli.engine.trained import Trained, load_trained
from gzcli.errors import DivergedError, UsageError, did_you_mean
from gzcli.store import files
from gzcli.store.runs import Run
from gzcli.types import Batch, ImageNoise

METRICS = ("fd", "kid_lenet", "prc_lenet", "classes", "bpd", "own", "speed", "fid", "kid", "is")
DEFAULT = ("fd", "kid_lenet", "prc_lenet", "classes", "bpd", "own", "speed")
MOST = 10_000  # test images of a likelihood
FEW = 500  # of one by an ODE, which takes hundreds of network calls an image
BATCH = defaultdict(lambda: 100, cpu=50, cuda=200)


def run(job: Mapping[str, Any], folder: Path, device: torch.device, log: Log) -> dict[str, Any]:
    """Does the job and writes samples, `bench.json` and `bench.png` into `folder`. Returns the JSON of `gz
    bench`.

    job: {runs, checkpoint, data, metrics, n, seed, weights}. `n` samples of each model are compared with the
    whole test split, beside the floor: n training images in their place. All runs must have images of one
    size; a run with other grey levels than the data set's own has columns of its own (`bpd@32`), one of
    binary images has `nats` and no
    `fd`. The likelihood of an image given its label stands in `bpd|y`. Each process draws and computes
    likelihoods for its share, rank 0 judges; the others return nothing.
    Raises UsageError for runs of different sizes or an unknown metric, MissingError for absent weights.
    """
    metrics = choose(job["metrics"])
    models = [load_trained(Run(Path(path)), device, job["checkpoint"]) for path in job["runs"]]
    shape = same_shape(models)
    pack = open_named(job["data"], size=shape[1], channels=shape[0], say=log.info)
    for trained in models:
        same.hold(trained.run.owner.path, pack.meta)
    judge = Judge(pack, metrics, job["n"], device=device, weights=job["weights"], say=log.info)
    rows, pictures = [], []
    for trained in models:
        row, samples = measure(trained, pack, judge, metrics, job, folder, log)
        if ranks.rank():
            continue
        shown = "   ".join(
            f"{k} {v:.4g}" for k, v in row["metrics"].items() if k.startswith(("fd", "bpd", "nats"))
        )
        log.info(f"{row['model']}: {shown}")
        rows.append(row)
        pictures.append((f"{row['model']}   {shown}", samples))
    if ranks.rank():
        return {}
    floor = judge.floor()
    real, name = pack.images("test"), pack.meta.name
    title = f"real images of {name}" + "".join(
        f"   {k} {v:.4g} (floor)" for k, v in floor.items() if k.startswith("fd")
    )
    sample_rows(folder / "bench.png", [*pictures, (title, real[subset(len(real), 16)])])
    result = {
        "data": name,
        "rows": rows,
        "floor": floor,
        "provenance": provenance(pack, judge, job),
        "notes": [*judge.warnings, *notes(models, rows, pack)],
        "picture": str(folder / "bench.png"),
    }
    files.write_json(folder / "bench.json", result)
    return result


def notes(models: list[Trained], rows: list[dict[str, Any]], pack: Pack) -> list[str]:
    """What a reader must know of these figures."""
    binary = [2 for trained in models if trained.images.levels == 2]
    said = treatment({pack.meta.name: pack}, binary[0] if binary else None)
    told = [row["likelihood"] for row in rows if "likelihood" in row]
    if any(found["given_labels"] for found in told):
        said.append(
            "columns `|y` are of log p(x | y), the label given: not to be compared with those of log p(x)"
        )
    if any(found["marginal"] for found in told):
        said.append(
            "log p(x) of a conditional model is log Σ p(y) p(x | y), classes as frequent as in training"
        )
    return said


def choose(asked: list[str] | None) -> list[str]:
    """The metrics to compute; `nats` means `bpd`. Raises UsageError for one that there is not."""
    wanted = ["bpd" if name == "nats" else name for name in asked or DEFAULT]
    for name in wanted:
        if name not in METRICS:
            raise UsageError(
                f"there is no metric `{name}`",
                hint=did_you_mean(name, METRICS) or f"metrics: {', '.join(METRICS)}",
            )
    return list(dict.fromkeys(wanted))


def same_shape(models: list[Trained]) -> tuple[int, ...]:
    """The (C, H, W) of all runs. Raises UsageError where they differ."""
    first = models[0]
    for other in models:
        if other.images.shape != first.images.shape:
            raise UsageError(
                f"`{other.run.id}` has images of {by(other.images.shape)}, `{first.run.id}` of "
                f"{by(first.images.shape)}: "
                "their figures are not comparable",
                hint="run `gz bench` once for each size",
            )
    return first.images.shape


def by(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def measure(
    trained: Trained,
    pack: Pack,
    judge: Judge,
    metrics: list[str],
    job: Mapping[str, Any],
    folder: Path,
    log: Log,
) -> tuple[dict[str, Any], np.ndarray]:
    """A model's row and its samples uint8 [n, C, H, W]."""
    since, levels = time.monotonic(), trained.images.levels
    mark = "" if levels in (None, pack.meta.levels) else f"@{levels}"
    labels = ask_labels(trained, pack, job["n"])
    samples, seconds = sample(trained, labels, job, folder, log)
    row: dict[str, Any] = {"model": trained.name, "run": trained.run.owner.id, "step": trained.step}
    row["params"] = sum(p.numel() for p in trained.model.parameters())
    kind = None if trained.space else trained.model.likelihood  # latents have no likelihood of pixels
    if "bpd" in metrics and (
        kind in ("exact", "bound") or (kind == "ode" and job["metrics"])
    ):  # the dear one when named
        row["likelihood"] = likelihood(trained, pack, job["seed"], log)
    if ranks.rank():
        return row, samples
    found: dict[str, float] = {}
    row["metrics"] = found
    if levels != 2:
        found |= {key + mark: value for key, value in judge(samples, labels, levels).items()}
    elif "classes" in metrics:
        found |= judge(samples, labels, levels, only=("classes",))
    if value := row.get("likelihood"):
        unit = "nats" if levels == 2 else "bpd"
        if value["given_labels"]:
            found[f"{unit}|y{mark * (unit == 'bpd')}"] = value[unit]
            value = value["marginal"]
        if value:
            found[unit + mark * (unit == "bpd")] = value[unit]
    if "own" in metrics and hasattr(trained.model, "measure"):
        found |= own_figures(trained, pack, job["seed"])
    if "speed" in metrics:
        found["samples_per_s"] = round(job["n"] / seconds, 3)
    row |= {
        "sample": dict(trained.part.sample),
        "conditional": labels is not None,
        "levels": levels,
        "seconds": round(time.monotonic() - since, 1),
    }
    return row, samples


def ask_labels(trained: Trained, pack: Pack, n: int) -> torch.Tensor | None:
    """Labels to ask of a conditional model: those of n training images, so that classes are as frequent."""
    labels = pack.labels("train")
    if labels is None or not trained.model.conditional:
        return None
    rows = np.random.default_rng(0).permutation(len(labels))
    chosen = torch.from_numpy(np.asarray(labels[np.resize(rows, n)]))
    return chosen.float() if pack.meta.multilabel else chosen


def sample(
    trained: Trained, labels: torch.Tensor | None, job: Mapping[str, Any], folder: Path, log: Log
) -> tuple[np.ndarray, float]:
    """n samples and the seconds they took; kept in `folder` under a name that says what made them."""
    weights = trained.run.path / "model.safetensors"
    stamp = weights.stat().st_mtime_ns if weights.exists() else 0
    made = [
        trained.run.owner.id,
        trained.step,
        stamp,
        job["n"],
        job["seed"],
        dict(trained.part.sample),
        trained.device.type,
    ]
    key = hashlib.sha256(json.dumps(made, default=str).encode()).hexdigest()[:8]
    path = folder / "samples" / f"{trained.run.owner.id}-{key}.npz"
    if ranks.agree(path.exists()):
        with np.load(path) as kept:
            return kept["samples"].transpose(0, 3, 1, 2), float(kept["seconds"])
    since = time.perf_counter()
    with log.bar(f"sample {trained.name}") as progress:
        images = draw(trained, job["n"], seed=job["seed"], labels=labels, progress=progress)
    synchronise(trained.device)
    seconds = time.perf_counter() - since
    if ranks.rank():
        return images, seconds
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, samples=images.transpose(0, 2, 3, 1), seconds=seconds)
    return images, seconds


def own_figures(trained: Trained, pack: Pack, seed: int) -> dict[str, float]:
    """What the model's `measure` says of test images, 10,000 at most."""
    with torch.inference_mode():
        return trained.model.measure(map(trained.seen, test_images(trained, pack, MOST, seed)))


def test_images(trained: Trained, pack: Pack, n: int, seed: int) -> Images:
    index = subset(pack.meta.counts["test"], n)
    return Images.of(trained, pack, "test", index, size=BATCH[trained.device.type], seed=seed)


def likelihood(trained: Trained, pack: Pack, seed: int, log: Log) -> dict[str, Any]:
    """The mean negative log-likelihood of test images: {kind, nats, bpd, n, se (of nats), given_labels,
    marginal, solver_gap}.

    Of the test split up to 10,000 images (500 by an ODE), or of the seeded subset that the recipe's
    `ood.budget` allows. A conditional model is told the label; where the budget allows that for every class
    in turn, `marginal` is {nats, bpd, se} of p(x) = Σ_y p(y) p(x | y), p(y) being the classes' frequencies in
    training. Raises DivergedError where it is not finite.
    """
    device, model = trained.device, trained.model
    frequencies = class_frequencies(model, pack)
    budget = trained.part.ood.budget
    trial = next(iter(test_images(trained, pack, BATCH[device.type], seed)))
    given = bool(model.conditional) and trial.y is not None
    each = timed(lambda: given_label(model, trial), device) / len(trial) / ranks.world()
    n = min(affordable(each, budget, 1), FEW if model.likelihood == "ode" else MOST, pack.meta.counts["test"])
    passes = 1 if frequencies is None else 1 + len(frequencies)
    every = passes > 1 and model.likelihood != "ode" and each * n * passes <= budget
    n, every = ranks.agree((n, every))
    log.info(f"likelihood of {n} test images, about {each * n * (passes if every else 1):.0f} seconds")
    done = 0
    with log.bar(f"likelihood of {trained.name}") as progress:

        def work(batch: Batch) -> dict[str, np.ndarray]:
            nonlocal done
            found = {"nats": -given_label(model, batch)}
            if every:
                found["marginal"] = -log_marginal(model, batch, frequencies, seed)
            done += len(batch)
            progress(done, n / ranks.world())
            return {name: values.numpy() for name, values in found.items()}

        values = ranks.over(test_images(trained, pack, n, seed), work)
    dims = int(np.prod(trained.info.shape))
    if not all(np.isfinite(each).all() for each in values.values()):
        raise DivergedError(f"the likelihood of `{trained.run.id}` is not finite for some test images")
    figures = {}
    for name, v in values.items():
        nats, se = float(v.mean()), float(v.std() / np.sqrt(n))
        figures[name] = {"nats": nats, "bpd": nats / (dims * np.log(2)), "se": se}
    if gap := solver_gap(trained, trial, trial.y if given else None, seed):
        log.info(gap_line(gap))
    told = {
        "kind": model.likelihood,
        "n": n,
        "given_labels": given,
        "marginal": figures.get("marginal"),
        "solver_gap": gap,
    }
    return told | figures["nats"]


def class_frequencies(model: Any, pack: Pack) -> torch.Tensor | None:
    """[K] of a conditional model's classes among training images; None where labels are many at once, or
    none."""
    labels = pack.labels("train")
    if labels is None or not model.conditional or pack.meta.multilabel:
        return None
    return torch.from_numpy(np.bincount(labels, minlength=len(pack.meta.classes)) / len(labels))


@torch.no_grad()
def given_label(model: Any, batch: Batch) -> torch.Tensor:
    """float64 [B], on the host: log p(x | y) of a conditional model, log p(x) of others."""
    return model.log_prob(batch.x, batch.y if model.conditional else None, noise=batch.noise).cpu().double()


@torch.no_grad()
def log_marginal(model: Any, batch: Batch, frequencies: torch.Tensor, seed: int) -> torch.Tensor:
    """float64 [B], on the host: log Σ_y p(y) p(x | y), each class by the same noise; of bounds it is a
    bound."""
    index, device = batch.index.tolist(), batch.x.device
    of_class = [
        model.log_prob(batch.x, torch.full_like(batch.y, y), noise=ImageNoise(seed, index, device))
        .cpu()
        .double()
        for y in range(len(frequencies))
    ]
    return torch.logsumexp(torch.stack(of_class) + frequencies.log()[:, None], 0)


def provenance(pack: Pack, judge: Judge, job: Mapping[str, Any]) -> dict[str, Any]:
    """All that a figure depends on and that its row does not say."""
    return {
        "n_real": len(pack.images("test")),
        "n_fake": job["n"],
        "split": "test",
        "shape": list(pack.meta.shape),
        "levels": pack.meta.levels,
        "resized": pack.meta.resized,
        "digest": pack.meta.digest,
        "seed": job["seed"],
        "checkpoint": job["checkpoint"],
        "processes": ranks.world(),
        **judge.provenance(),
        "versions": {
            name: version(name) for name in ("gzcli", "torch", "torch-fidelity", "numpy", "scikit-learn")
        },
    }
