"""`gz ood --input`: which single pictures are no images of the set that a model was trained on."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gzcli import ranks
from gzcli.data import same
from gzcli.data.forms import Form
from gzcli.data.names import OwnSet
from gzcli.data.open import open_pack
from gzcli.data.pack import Pack
from gzcli.engine.alarm_files import SHOWN, Maps, written
from gzcli.engine.images import FIT, Images, treatment
from gzcli.engine.log import Log
from gzcli.engine.ood_scores import BATCH_SIZE, Pick, Scored, asked_scores, score_all
from gzcli.engine.score_maps import heat, map_of, score_maps, upper
from gzcli.engine.scores import choose
from gzcli.engine.trained import Trained, load_trained
from gzcli.errors import UsageError
from gzcli.jobs import AlarmJob
from gzcli.metrics import conformal
from gzcli.store import files
from gzcli.store.runs import Run

USUAL = 32  # held-out images whose maps say what is usual


def run(job: AlarmJob, folder: Path, device: torch.device, log: Log) -> dict[str, Any]:
    """Does the job and writes `alarm.csv`, `alarm.png`, `alarm.json` and maps into `folder`.

    Each picture has a conformal p-value, by its score among those of held-out images, on which no score was
    fitted. With several scores it is the least of their p-values times their number (Bonferroni). A picture
    is flagged where its p-value is at most `job.fpr`. Each process scores its share. Returns the JSON of
    `gz ood --input` on rank 0, and {} on others.

    Raises UsageError where the held-out images are too few for such a rate, DivergedError for scores that are
    not finite.
    """
    began = time.monotonic()

    def load(path: str) -> Trained:
        return load_trained(Run(Path(path)), device, job.checkpoint, job.precision)

    trained = load(job.run)
    if job.scores is None:
        job = replace(job, scores=tuple(choose(trained, None)[:1]))
    names = asked_scores(trained, job)
    shows = map_of(trained.model, names, trained.name) if job.maps else None
    home = open_pack(job.ins, **trained.wanted, say=log.info)
    same.check(trained.run.owner.path, home.meta)
    parts = divided(home)
    needed = conformal.fewest(job.fpr, len(names))
    check_enough(parts, job, needed, names)
    mine = OwnSet(Path(job.input), form=Form(skip_bad=True, layout="flat"))
    pictures = open_pack(mine, **trained.wanted, foreign=True, say=log.info)
    every = np.arange(pictures.meta.counts["test"])

    def picks(n: int | None) -> dict[str, Pick]:
        kept = np.sort(parts.compared[: None if n is None else max(n, needed)])
        return {"compared": Pick(home, parts.split, kept), "pictures": Pick(pictures, "test", every)}

    scored = score_all(trained, job, home, picks, log, load=load, sets=2, held_out=parts.fitted)
    found = judged(scored, job.fpr)
    order = np.lexsort((-found.strangeness, found.p))  # by p, equal ones the strangest first
    maps = (
        drawn_maps(trained, shows, job, Pick(pictures, "test", every), order, home, parts) if shows else None
    )
    if ranks.rank():
        return {}
    labels = pictures.names("test") or [str(i) for i in every]
    outputs = written(folder, pictures, labels, order, found.p, found.flagged, found.scores, maps)
    flagged = found.flagged
    result = {
        "run": trained.run.owner.id,
        "runs": [Run(Path(path)).id for path in (job.run, *job.others)],
        "in": job.ins,
        "input": job.input,
        "fpr": job.fpr,
        "threshold": next(iter(found.thresholds.values())) if len(names) == 1 else None,
        "thresholds": found.thresholds,
        "files": [
            {
                "file": labels[i],
                "scores": {name: float(values[i]) for name, values in found.scores.items()},
                "p": float(found.p[i]),
                "flagged": bool(flagged[i]),
                **(
                    {"spread": {name: float(s[i]) for name, s in found.spread.items()}}
                    if found.spread
                    else {}
                ),
            }
            for i in order
        ],
        "flagged": int(flagged.sum()),
        "unreadable": list(pictures.meta.skipped),
        "compared": {"split": parts.split, "n": found.n, "needed": needed},
        "map": shows,
        "notes": notes(found, job, pictures, trained, names),
        "seed": job.seed,
        "seeds": job.seeds,
        "checkpoint": job.checkpoint,
        "precision": job.precision or "fp32",
        "step": trained.step,
        "perceptual": scored.perceptual,
        "background": scored.background,
        "processes": ranks.world(),
        "seconds": round(time.monotonic() - began, 1),
        "outputs": outputs,
    }
    files.write_json(folder / "alarm.json", result)
    return result


@dataclass(frozen=True)
class Parts:
    """The held-out images of a set.

    split: whose images the pictures are compared with.
    fitted: positions of validation images that scores are fitted on; None: those of the training split are.
    compared: positions of the others, in the order in which they are taken.
    """

    split: str
    fitted: np.ndarray | None
    compared: np.ndarray


def divided(home: Pack) -> Parts:
    """Held-out images, of which 500 or a quarter are kept for fits; test images where a tiny set has no
    validation split. Raises UsageError for a set without either."""
    counts = home.meta.counts
    split = "val" if counts["val"] else "test"
    if not counts[split]:
        raise UsageError(
            f"`{home.meta.name}` has neither validation nor test images to compare pictures with"
        )
    order = np.random.default_rng(0).permutation(counts[split])
    if split == "test":
        return Parts(split, None, order)
    k = min(FIT, len(order) // 4)
    return Parts(split, np.sort(order[:k]), order[k:])


def check_enough(parts: Parts, job: AlarmJob, needed: int, names: Sequence[str]) -> None:
    """Raises UsageError where there are fewer images to compare with than a rate of false alarms needs."""
    have = len(parts.compared) if job.n is None else min(job.n, len(parts.compared))
    if have >= needed:
        return
    by = f" by {len(names)} scores" if len(names) > 1 else ""
    least = len(names) / (len(parts.compared) + 1)
    fewer = "one score with `--score`, or " if len(names) > 1 else ""
    more = "a larger `-n`, or " if job.n is not None and len(parts.compared) >= needed else ""
    raise UsageError(
        f"{have:,} held-out images are too few for a false-alarm rate of {100 * job.fpr:.3g} %{by}: "
        f"it needs {needed:,}",
        hint=f"{fewer}{more}`--fpr {np.ceil(1000 * least) / 10:g}%` or more",
    )


@dataclass(frozen=True)
class Judged:
    """What is found of each picture.

    scores: float64 [N] of each score, by name.
    spread: their deviations over the seeds; {} of one seed.
    p: p-values [N], of all scores together.
    flagged: whether each picture is, [N].
    thresholds: of each score, above which it flags a picture by itself.
    strangeness: the largest distance of a score to its threshold, in deviations; it orders equal p-values.
    n: number of images that the pictures were compared with.
    """

    scores: Mapping[str, np.ndarray]
    spread: Mapping[str, np.ndarray]
    p: np.ndarray
    flagged: np.ndarray
    thresholds: dict[str, float]
    strangeness: np.ndarray
    n: int


def judged(scored: Scored, fpr: float) -> Judged:
    """The p-values of the pictures, and which are flagged at a false-alarm rate."""
    held_out, scores = scored.mean("compared"), scored.mean("pictures")
    p = np.stack([conformal.p_values(held_out[name], values) for name, values in scores.items()])
    of_all = conformal.bonferroni(p)
    thresholds = {name: conformal.threshold(values, fpr / len(p)) for name, values in held_out.items()}
    above = [(scores[name] - limit) / (held_out[name].std() or 1) for name, limit in thresholds.items()]
    return Judged(
        scores,
        scored.spread("pictures"),
        of_all,
        conformal.flagged(of_all, fpr),
        thresholds,
        np.max(above, 0),
        len(next(iter(held_out.values()))),
    )


def drawn_maps(
    trained: Trained,
    name: str,
    job: AlarmJob,
    pictures: Pick,
    order: np.ndarray,
    home: Pack,
    parts: Parts,
) -> Maps:
    """The maps of the strangest pictures, or with `--png` of all, beside those of usual images.

    name: of the map.
    pictures: all pictures.
    order: of the pictures, strangest first.
    home: the in-distribution set.
    parts: its held-out images.
    """
    chosen = order if job.png else order[:SHOWN]
    size = BATCH_SIZE[trained.device.type]

    def of(pack: Pack, split: str, index: np.ndarray) -> np.ndarray:
        back = np.argsort(np.argsort(index, kind="stable"), kind="stable")
        images = Images.of(trained, pack, split, np.sort(index), size=size, seed=job.seed)
        return score_maps(trained, name, images, {**trained.part.ood.options, **job.options})[back]

    usual = upper(of(home, parts.split, parts.compared[:USUAL]))
    return Maps(chosen, heat(of(pictures.pack, pictures.split, chosen), usual))


def notes(found: Judged, job: AlarmJob, pictures: Pack, trained: Trained, names: Sequence[str]) -> list[str]:
    """Notes without which the alarms could be misread."""
    lines = []
    if len(names) > 1:
        lines.append(
            f"p-values of {len(names)} scores together: the least times {len(names)} (Bonferroni), so each "
            f"score flags at {100 * job.fpr / len(names):.3g} %"
        )
    if not found.flagged.any() and found.p.min() <= 2 * job.fpr:
        lines.append(f"no picture is flagged; the least p-value is {found.p.min():.3g}")
    return [*lines, *treatment({"input": pictures}, trained.images.levels)]
