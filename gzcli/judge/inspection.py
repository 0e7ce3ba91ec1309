"""`gz ood` of an inspection set: how well an alarm detects and localises each kind of defect."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gzcli.core import ranks
from gzcli.core.errors import UsageError
from gzcli.core.hints import gz
from gzcli.core.types import Say
from gzcli.core.units import counted
from gzcli.data.packs.open import PackOptions, open_pack
from gzcli.data.packs.pack import Pack
from gzcli.data.readers.inspection import Inspection, open_inspection, read_masks
from gzcli.data.readers.layouts import DEFECTS
from gzcli.data.readers.pictures import fit_array
from gzcli.data.sets.registry import Form, OwnSet
from gzcli.engine.log import Log
from gzcli.engine.sheets import Row, sheet
from gzcli.judge import methods
from gzcli.judge.alarm import (
    calibrate,
    chosen_in_words,
    heat,
    maps_by,
    shown_map,
    training,
    without_copies,
)
from gzcli.judge.images import Pick
from gzcli.judge.scores import Scoring, model_maps, write_csv
from gzcli.metrics import conformal
from gzcli.metrics.alarms.cross import quantiles
from gzcli.metrics.detection import detection
from gzcli.metrics.interval import share
from gzcli.metrics.likelihood_scores import tails_of
from gzcli.metrics.pixels import pixel_figures
from gzcli.store import files
from gzcli.store.jobs import InspectJob
from gzcli.store.png import save_png
from gzcli.store.runs import Run

AT_ONCE = 64  # images scored together
SHEET_IMAGES = 8  # images of each kind on the sheet
PIXEL_METRICS = ("pixel_auroc", "aupro", "pixel_f1")
GOOD_KIND, MEAN_ROW = "good", "mean"


@dataclass(frozen=True)
class Judged:
    """The verdicts of an alarm on images.

    p: p-values, [N].
    score: one number for each image, higher if it is more unusual, [N].
    maps: float [N, H, W], at the images' size; None for a score without a map.
    """

    p: np.ndarray
    score: np.ndarray
    maps: np.ndarray | None


@dataclass(frozen=True)
class Defective:
    """The images with defects of an inspection set.

    pack: the pack that contains them as its split `test`.
    kinds: the kind of defect of each image.
    masks: by position, for images with a mask: bool [kH, kW], k times the size of the images.
    """

    pack: Pack
    kinds: tuple[str, ...]
    masks: dict[int, np.ndarray]
    notes: tuple[str, ...]

    @cached_property
    def images(self) -> np.ndarray:
        return np.asarray(self.pack.images("test"))


@dataclass(frozen=True)
class Set:
    """An inspection set and the verdicts of an alarm on it.

    facts: facts of the alarm, for JSON.
    good: verdicts on the good test images, whose files are `names`.
    bad: verdicts on the images with defects.
    """

    facts: Mapping[str, Any]
    good: Judged
    names: Sequence[str]
    bad: Judged
    defects: Defective
    notes: tuple[str, ...]


def open_defective(path: Path, layout: Inspection, form: PackOptions, say: Say) -> Defective:
    """The images with defects, in the form of the good ones."""
    source = OwnSet(path, form=Form(skip_bad=True, layout=DEFECTS))
    pack = open_pack(source, **form, foreign=True, say=say)
    names = pack.names("test") or []
    masks = read_masks(path, layout, names, (pack.meta.shape[1], pack.meta.shape[2]), form["fit"])
    at = {name: i for i, name in enumerate(names)}
    lacking = [f"{counted(n, 'image')} without a mask"] if (n := len(names) - len(masks)) and masks else []
    kinds = tuple(layout.kinds[name] for name in names)
    by_place = {at[name]: mask for name, mask in masks.items()}
    return Defective(pack, kinds, by_place, (*layout.notes, *lacking))


def run(job: InspectJob, folder: Path, device: torch.device, log: Log) -> dict[str, Any]:
    """Writes `inspection.csv`, `inspection.png` and `inspection.json` into `folder`. Returns the JSON of `gz
    ood` of an inspection set on rank 0, {} on others."""
    began = time.monotonic()
    path = Path(job.input)
    if (layout := open_inspection(path)) is None:
        raise UsageError(f"`{path}` is not an inspection set", hint=gz("ood", in_="./good", input="./today"))
    judged = by_method(job, layout, log) if job.method else by_run(job, layout, device, log)
    if ranks.rank():
        return {}
    rows = kind_figures(judged.good, judged.bad, judged.defects, job.fpr)
    outputs = write(judged, folder, job.fpr)
    result = {
        **judged.facts,
        "inspection": str(path),
        "fpr": job.fpr,
        "defects": rows,
        "good": {"n": len(judged.good.p), "flagged": int(conformal.flagged(judged.good.p, job.fpr).sum())},
        "flagged": rows[-1]["detected_n"],
        "notes": [*judged.notes, *notes(judged.defects, rows)],
        "unreadable": list(judged.defects.pack.meta.skipped),
        "seconds": round(time.monotonic() - began, 1),
        "outputs": outputs,
    }
    files.write_json(Run(folder).inspection_file, result)
    return result


def by_method(job: InspectJob, layout: Inspection, log: Log) -> Set:
    """Inspects by a method that needs no training. It is fitted to the good training images only."""
    good = methods.open_good(job, log.info)
    tested, names, remarks = good_images(good.pack)
    defects = open_defective(Path(job.input), layout, good.form, log.info)
    alarm = methods.alarm_of(good, job, log.info)
    calibrated = alarm.calibrated

    def judge(images: np.ndarray) -> Judged:
        scores, maps = [], []
        for i in range(0, len(images), AT_ONCE):
            some = np.asarray(images[i : i + AT_ONCE])
            scores.append(calibrated.score(some))
            maps.append(calibrated.map(some))
        every = np.concatenate(scores)
        has_maps = bool(maps) and maps[0] is not None
        shown = np.concatenate([each for each in maps if each is not None]) if has_maps else None
        return Judged(calibrated.p_values(every), every.mean(1), shown)

    facts, remarks = methods.facts(good, alarm, job), [*remarks, *methods.notes(good, alarm, job.fpr)]
    return Set(facts, judge(tested.images()), names, judge(defects.images), defects, tuple(remarks))


def by_run(job: InspectJob, layout: Inspection, device: torch.device, log: Log) -> Set:
    """Inspects by the scores of a run, as `alarm.by_run` does."""
    scoring = Scoring(job, device, log)
    trained = scoring.trained
    tested, names, remarks = good_images(scoring.home)
    defects = open_defective(Path(job.input), layout, trained.form, log.info)
    held_out, fitted, copied = calibrate(job, scoring)
    least_images = conformal.fewest(job.fpr, len(scoring.names))
    sets = {"good": tested, "bad": replace(tested, pack=defects.pack, index=np.arange(len(defects.kinds)))}

    def picks(n: int | None) -> dict[str, Pick]:
        index = np.sort(held_out.index[: None if n is None else max(n, least_images)])
        return {"compared": replace(held_out, index=index), **sets}

    scoring.score(picks, fitted)
    usual, _ = scoring.over_seeds("compared")
    shows = maps_by(scoring, shown_map(scoring)) if model_maps(trained.model) else None

    def judge(name: str) -> Judged:
        values = {key: highest(each) for key, each in scoring.over_seeds(name)[0].items()}
        p = [conformal.p_values(usual[key], each, tails=tails_of(key)) for key, each in values.items()]
        first = next(iter(values.values()))
        return Judged(conformal.bonferroni(np.stack(p)), first, shows(sets[name]) if shows else None)

    good, bad = judge("good"), judge("bad")
    remarks += [*copied, *chosen_in_words(scoring)]
    return Set(scoring.facts(), good, names, bad, defects, tuple(remarks))


def highest(values: np.ndarray) -> np.ndarray:
    """The scores, with values that are not finite replaced by one above all others."""
    finite = np.isfinite(values)
    return np.where(finite, values, values[finite].max(initial=0) + 1 + abs(values[finite]).max(initial=0))


def good_images(home: Pack) -> tuple[Pick, list[str], list[str]]:
    """The good test images without copies of other good images, the names of their files, and notes on
    copies. Raises UsageError if there are none."""
    test = Pick(home, "test", np.arange(home.meta.counts["test"]), by_content=True, unbounded=True)
    good, remarks = without_copies(test, training(home, "train+val"))
    if not len(good.index):
        hint = "put good images that are not used for training into `test/good`"
        raise UsageError(": ".join([f"`{home.meta.title}` has no good test images", *remarks]), hint=hint)
    names = home.names("test")
    return good, [names[i] for i in good.index] if names else [], remarks


def write(judged: Set, folder: Path, fpr: float) -> dict[str, str]:
    """Writes the table and the sheet. Returns their paths."""
    table, picture = folder / "inspection.csv", folder / "inspection.png"
    good, bad, defects = judged.good, judged.bad, judged.defects
    lines: list[list[Any]] = []
    for names, kinds, each in (
        (judged.names, [GOOD_KIND] * len(good.p), good),
        (defects.pack.names("test") or [], defects.kinds, bad),
    ):
        flagged = conformal.flagged(each.p, fpr)
        rows = zip(names, kinds, each.p, flagged, each.score, strict=True)
        lines += [[name, kind, float(p), int(flag), float(score)] for name, kind, p, flag, score in rows]
    write_csv(table, ["file", "defect", "p", "flagged", "score"], lines)
    colours = None
    if bad.maps is not None and good.maps is not None:
        colours = heat(bad.maps, float(quantiles(good.maps).mean()))
    save_png(picture, defect_sheet(bad, defects, colours, fpr))
    return {"scores": str(table), "picture": str(picture)}


def kind_figures(good: Judged, bad: Judged, defects: Defective, fpr: float) -> list[dict[str, Any]]:
    """A row for each kind of defect, and one for their mean.

    auroc, ci: AUROC against good test images, with its 95 % interval.
    detected, detected_ci: share of images flagged at the rate, with its interval.
    pixel_auroc, aupro, pixel_f1: metrics of the maps of images with masks and of all good images; None
      without maps.
    """
    flagged = conformal.flagged(bad.p, fpr)
    kinds = np.array(defects.kinds)
    rows: list[dict[str, Any]] = []
    for kind in dict.fromkeys(defects.kinds):
        of = kinds == kind
        detected, n = detection(good.score, bad.score[of]), int(of.sum())
        detected_share = share(float(flagged[of].mean()), n)
        row = {"defect": kind, "n": n, "auroc": detected["auroc"], "ci": detected["ci"]["auroc"]}
        row |= {"detected": detected_share.value, "detected_n": int(flagged[of].sum())}
        row["detected_ci"] = [detected_share.low, detected_share.high]
        rows.append(row | dict.fromkeys(PIXEL_METRICS) | pixels(good, bad, defects, of.nonzero()[0]))
    mean: dict[str, Any] = {"defect": MEAN_ROW, "n": len(kinds), "ci": None, "detected_ci": None}
    mean["detected_n"] = int(flagged.sum())
    for key in ("auroc", "detected", *PIXEL_METRICS):
        values = [row[key] for row in rows if row[key] is not None]
        mean[key] = float(np.mean(values)) if values else None
    return [*rows, mean]


def pixels(good: Judged, bad: Judged, defects: Defective, places: np.ndarray) -> dict[str, float]:
    """The metrics of the maps at the given positions whose images have a mask; {} without such an image."""
    marked = [i for i in places.tolist() if i in defects.masks]
    if not marked or good.maps is None or bad.maps is None:
        return {}
    sides = defects.masks[marked[0]].shape
    masks = [np.zeros(sides, bool)] * len(good.maps) + [defects.masks[i] for i in marked]
    maps = [*good.maps, *(bad.maps[i] for i in marked)]
    return pixel_figures([larger(each, sides) for each in maps], masks) or {}


def larger(each: np.ndarray, sides: tuple[int, ...]) -> np.ndarray:
    """A map, float [H, W], enlarged to the size of its mask, which is a multiple of the map's."""
    from scipy import ndimage

    k = sides[0] // each.shape[0]
    return each if k == 1 else ndimage.zoom(each, k, order=1, mode="nearest", grid_mode=True)


def defect_sheet(bad: Judged, defects: Defective, colours: np.ndarray | None, fpr: float) -> np.ndarray:
    """A sheet of each kind of defect, its most suspicious images first: images, maps in false colours
    uint8 [N, 3, H, W], and masks."""
    blocks, flagged = [], conformal.flagged(bad.p, fpr)
    for kind in dict.fromkeys(defects.kinds):
        places = np.array([i for i, each in enumerate(defects.kinds) if each == kind])
        places = places[np.lexsort((-bad.score[places], bad.p[places]))]
        some = places[np.linspace(0, len(places) - 1, min(SHEET_IMAGES, len(places))).round().astype(int)]
        images = defects.images[some]
        images = images.repeat(3, 1) if images.shape[1] == 1 else images
        name = f"{kind}: {flagged[places].sum()} of {len(places)}"
        words = [("flagged" if flagged[i] else "not flagged", f"p {bad.p[i]:.2g}") for i in some]
        rows = [Row(name, list(images), under=words)]
        if colours is not None:
            rows.append(Row("map", list(colours[some]), exact=True))
        if any(i in defects.masks for i in some):
            _, height, width = defects.pack.meta.shape
            blank = np.zeros((height, width), bool)
            masks = (np.uint8(255) * defects.masks.get(int(i), blank)[None, None] for i in some)
            shown = [fit_array(mask, (1, height, width), "crop")[0].repeat(3, 0) for mask in masks]
            rows.append(Row("mask", shown, exact=True))
        blocks.append(rows)
    return sheet(blocks)


def notes(defects: Defective, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Remarks on the metrics."""
    pixels = "`aupro` is integrated to a false-positive rate of 30 %; good images count as free of defects"
    return [*([pixels] if rows[-1]["aupro"] is not None else []), *defects.notes]
