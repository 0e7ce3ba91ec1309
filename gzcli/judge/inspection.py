"""`gz ood` of an inspection set: how well an alarm finds each kind of defect, and where it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gzcli.core.types import Say
from gzcli.core.units import counted
from gzcli.data.packs.open import PackOptions, open_pack
from gzcli.data.packs.pack import Pack
from gzcli.data.readers.folder import DEFECTS
from gzcli.data.readers.inspection import Inspection, read_masks
from gzcli.data.readers.pictures import fit_array
from gzcli.data.sets.names import OwnSet
from gzcli.data.sets.registry import Form
from gzcli.engine.sheets import Row, sheet
from gzcli.metrics import conformal
from gzcli.metrics.detection import detection, wilson
from gzcli.metrics.pixels import pixel_figures

SHOWN = 8  # pictures of each kind on the sheet
PIXELS = ("pixel_auroc", "aupro", "pixel_f1")
MEAN = "mean"


@dataclass(frozen=True)
class Judged:
    """What an alarm says of pictures.

    p: p-values, [N].
    score: one number of each, higher where it is stranger, [N].
    maps: float [N, H, W] in the pictures' size; None of a score without a map.
    """

    p: np.ndarray
    score: np.ndarray
    maps: np.ndarray | None


@dataclass(frozen=True)
class Defective:
    """The pictures with defects of an inspection set.

    pack: they are its split `test`.
    kinds: the kind of defect of each.
    masks: bool [kH, kW] by position, of those that have one; their pictures are [H, W].
    """

    pack: Pack
    kinds: tuple[str, ...]
    masks: dict[int, np.ndarray]
    notes: tuple[str, ...]

    @cached_property
    def images(self) -> np.ndarray:
        return np.asarray(self.pack.images("test"))


def open_defective(path: Path, found: Inspection, form: PackOptions, say: Say) -> Defective:
    """The pictures with defects, in the form of the good ones."""
    source = OwnSet(path, form=Form(skip_bad=True, layout=DEFECTS))
    pack = open_pack(source, **form, foreign=True, say=say)
    names = pack.names("test") or []
    masks = read_masks(path, found, names, (pack.meta.shape[1], pack.meta.shape[2]), form["fit"])
    at = {name: i for i, name in enumerate(names)}
    lacking = [f"{counted(n, 'picture')} without a mask"] if (n := len(names) - len(masks)) and masks else []
    kinds = tuple(found.kinds[name] for name in names)
    by_place = {at[name]: mask for name, mask in masks.items()}
    return Defective(pack, kinds, by_place, (*found.notes, *lacking))


def figures(good: Judged, bad: Judged, defects: Defective, fpr: float) -> list[dict[str, Any]]:
    """A row for each kind of defect, and their mean.

    auroc, ci: against good test pictures, with its 95 % interval.
    detected, detected_ci: share that is flagged at the rate, with its interval.
    pixel_auroc, aupro, pixel_f1: of the maps of pictures with masks and of all good ones; None without.
    """
    flagged = conformal.flagged(bad.p, fpr)
    kinds = np.array(defects.kinds)
    rows: list[dict[str, Any]] = []
    for kind in dict.fromkeys(defects.kinds):
        of = kinds == kind
        found, n = detection(good.score, bad.score[of]), int(of.sum())
        share = float(flagged[of].mean())
        ends = [float(end) for end in wilson(share, n)]
        row = {"defect": kind, "n": n, "auroc": found["auroc"], "ci": found["ci"]["auroc"]}
        row |= {"detected": share, "detected_n": int(flagged[of].sum()), "detected_ci": ends}
        rows.append(row | dict.fromkeys(PIXELS) | pixels(good, bad, defects, of.nonzero()[0]))
    mean: dict[str, Any] = {"defect": MEAN, "n": len(kinds), "ci": None, "detected_ci": None}
    mean["detected_n"] = int(flagged.sum())
    for key in ("auroc", "detected", *PIXELS):
        values = [row[key] for row in rows if row[key] is not None]
        mean[key] = float(np.mean(values)) if values else None
    return [*rows, mean]


def pixels(good: Judged, bad: Judged, defects: Defective, places: np.ndarray) -> dict[str, float]:
    """The figures of maps of the pictures at some places that have a mask; {} without."""
    marked = [i for i in places.tolist() if i in defects.masks]
    if not marked or good.maps is None or bad.maps is None:
        return {}
    sides = defects.masks[marked[0]].shape
    masks = [np.zeros(sides, bool)] * len(good.maps) + [defects.masks[i] for i in marked]
    maps = [*good.maps, *(bad.maps[i] for i in marked)]
    return pixel_figures([larger(each, sides) for each in maps], masks) or {}


def larger(each: np.ndarray, sides: tuple[int, ...]) -> np.ndarray:
    """A map float [H, W] in the size of its mask, which is a multiple."""
    from scipy import ndimage

    k = sides[0] // each.shape[0]
    return each if k == 1 else ndimage.zoom(each, k, order=1, mode="nearest", grid_mode=True)


def overview(bad: Judged, defects: Defective, colours: np.ndarray | None, fpr: float) -> np.ndarray:
    """A sheet of each kind of defect, its most suspicious pictures first: pictures, maps in false colours
    uint8 [N, 3, H, W], and masks."""
    blocks, flagged = [], conformal.flagged(bad.p, fpr)
    for kind in dict.fromkeys(defects.kinds):
        places = np.array([i for i, each in enumerate(defects.kinds) if each == kind])
        places = places[np.lexsort((-bad.score[places], bad.p[places]))]
        some = places[np.linspace(0, len(places) - 1, min(SHOWN, len(places))).round().astype(int)]
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


def notes(defects: Defective, rows: Sequence[Mapping[str, Any]], good: Judged, fpr: float) -> list[str]:
    """What is said of the figures besides."""
    flagged = int(conformal.flagged(good.p, fpr).sum())
    lines = [f"{flagged} of {counted(len(good.p), 'good test picture')} flagged at {100 * fpr:.3g} %"]
    if rows[-1]["aupro"] is not None:
        lines.append("`aupro` is integrated to a false-positive rate of 30 %; pixels of good pictures count")
    return [*lines, *defects.notes]
