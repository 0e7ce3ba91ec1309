"""`gz ood --input`: which single pictures are no images of the set that a model was trained on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gzcli.core import ranks
from gzcli.core.errors import UsageError
from gzcli.core.jobs import AlarmJob
from gzcli.data.packs import same
from gzcli.data.packs.forms import Form
from gzcli.data.packs.open import open_pack
from gzcli.data.packs.pack import Pack
from gzcli.data.readers.kinds import counted
from gzcli.data.sets.names import OwnSet
from gzcli.engine.log import Log
from gzcli.engine.trained import Trained, load_trained
from gzcli.judge.alarm_files import SHOWN, Maps, written
from gzcli.judge.images import FIT, treatment
from gzcli.judge.judged import Judged, judged
from gzcli.judge.ood_scores import Pick, Scored, asked_scores, score_all
from gzcli.judge.score_maps import heat, map_of, score_maps, upper
from gzcli.judge.scores import choose
from gzcli.metrics import conformal
from gzcli.store import files
from gzcli.store.runs import Run

USUAL = 32  # held-out images whose maps say what is usual


def run(job: AlarmJob, folder: Path, device: torch.device, log: Log) -> dict[str, Any]:
    """Does the job and writes `alarm.csv`, `alarm.png`, `alarm.json` and maps into `folder`.

    Each picture has a conformal p-value, by its score among those of held-out images, on which no score was
    fitted. All are scored by one rule: the mean over the same draws of noise, which go by an image's pixels.
    With several scores it is the least of their p-values times their number (Bonferroni). A picture
    is flagged where its p-value is at most `job.fpr`. Each process scores its share. Returns the JSON of
    `gz ood --input` on rank 0, and {} on others.

    A picture whose score is not finite is flagged, as no held-out image has such a score. Raises UsageError
    where these are too few for such a rate, DivergedError where the score of one is not finite.
    """
    began = time.monotonic()

    def load(path: str) -> Trained:
        return load_trained(Run(Path(path)), device, job.checkpoint, job.precision)

    trained = load(job.run)
    if job.scores is None:
        job = replace(job, scores=tuple(choose(trained, None)[:1]))
    names = asked_scores(trained, job)
    shows = map_of(trained.model, names, trained.name) if job.maps else None
    sets = opened(trained, job, names, log)
    home, parts, pictures = sets.home, sets.parts, sets.pictures
    scored = score_all(trained, job, home, sets.picks, log, load=load, sets=2, held_out=parts.fitted)
    found = judged(scored, job.fpr)
    order = np.lexsort((-found.strangeness, found.p))  # by p, equal ones the strangest first
    maps = drawn_maps(trained, shows, job, sets.mine, order, home, parts) if shows else None
    if ranks.rank():
        return {}
    labels = pictures.names("test") or [str(i) for i in range(len(order))]
    outputs = written(folder, pictures, labels, order, found, maps)
    result = {
        **summary(job, trained, sets, scored, found),
        "files": [{"file": labels[i], **found.row(i)} for i in order],
        "map": shows,
        "seconds": round(time.monotonic() - began, 1),
        "outputs": outputs,
    }
    files.write_json(folder / "alarm.json", result)
    return result


@dataclass(frozen=True)
class Parts:
    """The held-out images of a set."""

    split: str  # whose images the pictures are compared with
    fitted: np.ndarray | None
    compared: np.ndarray  # positions of the others, in the order in which they are taken


@dataclass(frozen=True)
class Sets:
    """The pictures, and what they are compared with."""

    home: Pack  # the in-distribution set
    parts: Parts  # its held-out images
    needed: int  # number of held-out images that the rate of false alarms needs
    pictures: Pack  # the pictures, as a set whose test split they are

    @property
    def mine(self) -> Pick:
        """All pictures."""
        every = np.arange(self.pictures.meta.counts["test"])
        return Pick(self.pictures, "test", every, by_content=True, unbounded=True)

    def picks(self, n: int | None) -> dict[str, Pick]:
        """Held-out images, `n` of them or as many as the rate needs, and all pictures; None: all images."""
        kept = np.sort(self.parts.compared[: None if n is None else max(n, self.needed)])
        return {"compared": Pick(self.home, self.parts.split, kept, by_content=True), "pictures": self.mine}


def opened(trained: Trained, job: AlarmJob, names: Sequence[str], log: Log) -> Sets:
    """The set and the pictures. Raises UsageError where the held-out images are too few."""
    home = open_pack(job.ins, **trained.wanted, say=log.info)
    same.check(trained.run.owner.path, home.meta)
    parts = divided(home)
    needed = conformal.fewest(job.fpr, len(names))
    check_enough(parts, job, needed, names)
    own = OwnSet(Path(job.input), form=Form(skip_bad=True, layout="flat"))
    return Sets(home, parts, needed, open_pack(own, **trained.wanted, foreign=True, say=log.info))


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


def summary(job: AlarmJob, trained: Trained, sets: Sets, scored: Scored, found: Judged) -> dict[str, Any]:
    """What was compared, by which rule, and what is flagged, for JSON."""
    return {
        "run": trained.run.owner.id,
        "runs": [Run(Path(path)).id for path in (job.run, *job.others)],
        "in": job.ins,
        "input": job.input,
        "fpr": job.fpr,
        **found.limits(),
        "flagged": int(found.flagged.sum()),
        "unreadable": list(sets.pictures.meta.skipped),
        "compared": {"split": sets.parts.split, "n": found.n, "needed": sets.needed},
        "notes": notes(job, sets.pictures, trained, found),
        "seed": job.seed,
        "seeds": len(scored.seeds),
        "checkpoint": job.checkpoint,
        "precision": job.precision or "fp32",
        "step": trained.step,
        "perceptual": scored.perceptual,
        "background": scored.background,
        "processes": ranks.world(),
    }


def drawn_maps(
    trained: Trained,
    name: str,
    job: AlarmJob,
    pictures: Pick,
    order: np.ndarray,
    home: Pack,
    parts: Parts,
) -> Maps:
    """The maps of the strangest pictures, or with `--png` of all, beside those of usual images."""
    chosen = order if job.png else order[:SHOWN]
    options = {**trained.part.ood.options, **job.options}

    def of(pick: Pick, index: np.ndarray) -> np.ndarray:
        back = np.argsort(np.argsort(index, kind="stable"), kind="stable")
        images = replace(pick, index=np.sort(index)).images(trained, job.seed)
        return score_maps(trained, name, images, options)[back]

    held_out = Pick(home, parts.split, parts.compared, by_content=True)
    usual = upper(of(held_out, parts.compared[:USUAL]))
    return Maps(chosen, heat(of(pictures, chosen), usual))


def notes(job: AlarmJob, pictures: Pack, trained: Trained, found: Judged) -> list[str]:
    """Notes without which the alarms could be misread."""
    lines, count = [], len(found.scores)
    if count > 1:
        lines.append(
            f"p-values of {count} scores together: the least times {count} (Bonferroni), so each "
            f"score flags at {100 * job.fpr / count:.3g} %"
        )
    if found.one_sided():
        least = np.ceil(1000 * 2 * count / (found.n + 1)) / 10
        lines.append(
            f"{found.n:,} held-out images are too few to flag at {100 * job.fpr:.3g} % what is unusual by "
            f"being simple, as a blank picture is: `--fpr {least:g}%` does"
        )
    if strangest := found.overflown():
        lines.append(
            f"{counted(strangest, 'picture')} with a score that is not finite: the model overflows, "
            "so it counts as higher than that of any held-out image"
        )
    return [*lines, *treatment({"input": pictures}, trained.images.levels)]
