"""`gz ood`: scores of in-distribution and foreign test images, and how well each score tells them apart."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gzcli.data import same
from gzcli.data.batches import scan, to_uint8
from gzcli.data.benchmarks import Benchmark
from gzcli.data.benchmarks import find as find_benchmark
from gzcli.data.pack import Pack, open_pack
from gzcli.engine.budget import affordable, subset, timed
from gzcli.engine.context import Trained, load_trained
from gzcli.engine.converged import solver_gap, told
from gzcli.engine.log import Log
from gzcli.engine.pictures import histograms
from gzcli.engine.scores import OVER_NLL, Scorer, choose
from gzcli.errors import DivergedError, MissingError, UsageError
from gzcli.metrics import baselines
from gzcli.metrics.detection import detection
from gzcli.metrics.features import lenet
from gzcli.models.guided import Returning
from gzcli.models.nn import LPIPS
from gzcli.store import files
from gzcli.store.runs import Run, find
from gzcli.types import Batch

BASELINES = ("png", "mean", "knn_pixels")
BATCH = {"cpu": 64, "mps": 128, "cuda": 256}
TRIAL = 16  # images on which the scores are timed
VALIDATION = 2000  # images that scores are fitted on, at most
NEIGHBOURS = 10_000  # training images of the k-NN baseline, at most


def run(job: Mapping[str, Any], folder: Path, device: torch.device, log: Log) -> dict[str, Any]:
    """Does the job and writes `scores.csv`, `histograms.png` and `ood.json` into `folder`.

    job: {run, checkpoint, in, out, scores, background, benchmark, n, full, seed, options}. The in-distribution images are
    the test split of `in`; those of `out` pass through the run's size, channels and grey levels. Returns the JSON of
    `gz ood`. Raises DivergedError for scores that are not finite.
    """
    began = time.monotonic()
    trained = load_trained(Run(Path(job["run"])), device, job["checkpoint"])
    c, size, _ = trained.images.shape
    home = open_pack(job["in"], size=size, channels=c, say=log.info)
    same.hold(trained.run.owner.path, home.meta)
    packs = {name: open_pack(name, size=size, channels=c, say=log.info) for name in job["out"]}
    check_sets(home, packs)
    settings = trained.tree["ood"]
    behind = job.get("background") or settings.get("background")
    names = choose(trained, job["scores"])
    background = load_trained(find(behind), device) if behind and "ratio" in names else None
    options = {k: v for k, v in settings.items() if k not in ("scores", "budget", "background")} | dict(job["options"])
    scorer = Scorer(trained, names, background=background, options=options, seed=job["seed"])
    if wrong := sorted(set(job["options"]) & set(scorer.unused)):
        raise UsageError(f"none of the scores {', '.join(names)} takes `{wrong[0]}`")

    asked = {"recon", "ensemble"} & set(names) and not options.get("pixels")
    seen_by = perceive(trained, home, log) if asked else None
    source = Source(trained, job["seed"])
    n, split = job["n"], "val" if home.meta.counts["val"] else "train"  # a tiny set has no validation images
    if n is None and not job["full"]:
        trial = next(source.batches(home, split, subset(home.meta.counts[split], TRIAL)))
        n = afford(scorer, trial, settings["budget"], 1 + len(packs), log)
    scorer.fit(list(source.batches(home, split, subset(home.meta.counts[split], min(n or VALIDATION, VALIDATION)))))
    by_ode = set(names) & set(OVER_NLL)
    gap = solver_gap(trained, next(source.batches(home, split, subset(home.meta.counts[split], TRIAL)))) if by_ode else None
    if gap:
        log.info(told(gap))
    tables: dict[str, dict[str, np.ndarray]] = {}
    for name, pack in [(job["in"], home), *packs.items()]:
        tables[name] = score_set(scorer, source, pack, n, log)
    add_baselines(tables, source, home)

    benchmark = find_benchmark(job["benchmark"]) if job.get("benchmark") else None
    results = compare(tables, packs, names, trapezoid=benchmark is not None)
    if benchmark:
        results = grouped(results, benchmark)
    write_scores(folder / "scores.csv", tables, job["in"])
    histograms(folder / "histograms.png", tables, job["in"], results)
    result = {
        "run": trained.run.owner.id, "in": job["in"], "results": results, "notes": notes(results, packs, benchmark),
        "positive": "out", "benchmark": benchmark and benchmark.name, "seed": job["seed"], "checkpoint": job["checkpoint"],
        "step": trained.step, "levels": trained.images.levels, "shape": list(trained.images.shape),
        "perceptual": seen_by, "likelihood": trained.model.likelihood, "background": background and background.run.owner.id,
        "solver_gap": gap, "coders": sorted(baselines.coders()), "seconds": round(time.monotonic() - began, 1),
        "files": {"scores": str(folder / "scores.csv"), "histograms": str(folder / "histograms.png")},
    }  # fmt: skip
    files.write_json(folder / "ood.json", result)
    return result


class Source:
    """Batches of a split as this run sees its images."""

    def __init__(self, trained: Trained, seed: int):
        self.levels, self.device, self.seed = trained.images.levels, trained.device, seed

    def batches(self, pack: Pack, split: str, index: np.ndarray, size: int | None = None) -> Iterator[Batch]:
        size = size or BATCH[self.device.type]
        return scan(pack, split, batch_size=size, levels=self.levels, device=self.device, index=index, seed=self.seed)


def perceive(trained: Trained, home: Pack, log: Log) -> str | None:
    """Gives a model whose `recon` asks for it a distance of images beside that of pixels: LPIPS where its weights are at hand,
    else that of the features of a LeNet of the set. Returns which."""
    if getattr(type(trained.model), "score_recon", None) is not Returning.score_recon or trained.space is not None:
        return None
    try:
        trained.model.perceptual = LPIPS.from_files().to(trained.device).forward
        return "lpips"
    except MissingError:
        judge = lenet(home, device=trained.device, say=log.info)
        trained.model.perceptual = judge.distance
        return f"lenet {judge.hash}"


def check_sets(home: Pack, packs: Mapping[str, Pack]) -> None:
    for name, pack in packs.items():
        if pack.meta.digest == home.meta.digest:
            raise UsageError(f"`{name}` is both the in- and the out-of-distribution set", hint="`--out` takes other sets")
    if not home.meta.counts["test"]:
        raise UsageError(f"`{home.meta.name}` has no test images")


def afford(scorer: Scorer, trial: Batch, budget: float, sets: int, log: Log) -> int:
    """Images of each of `sets` test splits that `budget` seconds pay for, timed on a first batch."""
    scorer.fit([trial])
    seconds = timed(lambda: scorer(trial), trial.x.device) / len(trial)
    n = affordable(seconds, budget, sets + 1)  # one more for the validation images
    if (expected := seconds * sets * n) > 1.5 * budget:
        log.warn(f"the scores need about {expected / 60:.0f} minutes even for {n} images a set; `-n` takes fewer")
    return n


def score_set(scorer: Scorer, source: Source, pack: Pack, n: int | None, log: Log) -> dict[str, np.ndarray]:
    """Of n test images, or all: index [N], float64 [N] a score, images uint8 [N, C, H, W] as the model saw them."""
    total = pack.meta.counts["test"]
    index = subset(total, n or total)
    parts, done = [], 0
    with log.bar(f"score {pack.meta.name}") as progress:
        for batch in source.batches(pack, "test", index):
            try:
                parts.append(scorer(batch) | {"images": to_uint8(batch.x).cpu().numpy()})
            except DivergedError as e:
                raise DivergedError(f"{e.message} of `{pack.meta.name}`", hint=e.hint) from e
            done += len(batch)
            progress(done, len(index))
    return {"index": index} | {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def add_baselines(tables: dict[str, dict[str, np.ndarray]], source: Source, home: Pack) -> None:
    """PNG size, pixel mean and k-NN beside the scores of each set; the images, not needed any more, go."""
    train = home.images("train")
    index = subset(len(train), NEIGHBOURS if train[0].size <= 4096 else NEIGHBOURS // 4)
    seen = np.concatenate([to_uint8(batch.x).cpu().numpy() for batch in source.batches(home, "train", index)])
    distances = baselines.knn_pca(seen, [table["images"] for table in tables.values()])
    for table, distance in zip(tables.values(), distances, strict=True):
        images = table.pop("images")
        table |= {"png": baselines.png_size(images), "mean": baselines.pixel_mean(images), "knn_pixels": distance}


def compare(tables: Mapping[str, Mapping[str, np.ndarray]], packs: Mapping[str, Pack], names: list[str], *,
            trapezoid: bool = False) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each foreign set and score. `beats_baselines`: a higher AUROC than any baseline's, either way round."""
    inside, *outside = tables
    rows = []
    for out in outside:
        measured = {
            score: detection(tables[inside][score], tables[out][score], trapezoid=trapezoid) for score in (*names, *BASELINES)
        }
        bar = max(max(measured[score]["auroc"], 1 - measured[score]["auroc"]) for score in BASELINES)
        rows += [
            {"out": out, "score": score, "baseline": score in BASELINES, **found, "resized": packs[out].meta.resized,
             "beats_baselines": None if score in BASELINES else found["auroc"] > bar}
            for score, found in measured.items()
        ]  # fmt: skip
    return rows


def grouped(results: list[dict[str, Any]], benchmark: Benchmark) -> list[dict[str, Any]]:
    """The rows with their `group`, near or far, and after each group a row of its means for every score."""
    rows = [row | {"group": benchmark.group(row["out"])} for row in results]
    ordered = []
    for group in ("near", "far"):
        inside = [row for row in rows if row["group"] == group]
        ordered += inside
        for score in dict.fromkeys(row["score"] for row in inside):
            same = [row for row in inside if row["score"] == score]
            means = {
                key: float(np.mean([row[key] for row in same])) for key in ("auroc", "aupr_in", "aupr_out", "fpr95", "fpr95_id")
            }
            total = {"n_in": same[0]["n_in"], "n_out": sum(row["n_out"] for row in same)}
            ordered.append(same[0] | means | total | {"out": f"mean of {group}", "ci": None, "beats_baselines": None})
    return ordered


def notes(results: list[dict[str, Any]], packs: Mapping[str, Pack], benchmark: Benchmark | None = None) -> list[str]:
    """What a reader must know of these figures."""
    said = []
    if benchmark:
        left = [name for name in (*benchmark.near, *benchmark.far) if name not in packs]
        if missing := [*left, *benchmark.absent]:
            said.append(f"left out of `{benchmark.name}`: {', '.join(missing)}; means are of the others")
        said.append("OpenOOD draws its images from lists of its own; these are from the whole test splits, AUPR by its trapezoid")
    said += ["`png` and `mean` know no direction: their AUROC of .1 is worth one of .9"]
    said += [f"`{name}` was resized to the run's images" for name, pack in packs.items() if pack.meta.resized]
    if plain := [row for row in results if row["score"] in ("nll", "elbo")]:
        failed = sorted({f"`{row['out']}`" for row in plain if row["auroc"] < 0.5})
        here = f", as here on {', '.join(failed)}" if failed else ""
        said.append(
            "plain likelihood fails in the hard direction (FashionMNIST → MNIST: AUROC near .1), as simpler images are "
            f"more likely{here}; `complexity` or `ratio` correct for it"
        )
    beaten = [f"`{row['score']}` on `{row['out']}`" for row in results if row["beats_baselines"] is False]
    if beaten:
        said.append(f"a baseline, without a model, does as well as {', '.join(beaten)}")
    return said


def write_scores(path: Path, tables: Mapping[str, Mapping[str, np.ndarray]], inside: str) -> None:
    """Columns: set, role (in | out), index, one a score."""
    columns = [key for key in tables[inside] if key != "index"]
    lines = [",".join(["set", "role", "index", *columns])]
    for name, table in tables.items():
        role = "in" if name == inside else "out"
        for i, row in enumerate(zip(*(table[key] for key in columns), strict=True)):
            lines.append(
                ",".join([f'"{name}"' if "," in name else name, role, str(table["index"][i]), *map(repr, map(float, row))])
            )
    files.write_atomic(path, "\n".join(lines) + "\n")
