"""The choice of a method's settings: those that detect the most synthetic defects on held-out good images.

Some of the good images are set aside for the choice: they are used for fitting, but neither for calibration
nor for judgement. They are split into parts. A fit to all parts but one scores the images of that part, with
and without a synthetic defect. `detection` is the share of defects that score above the good images, averaged
over the thresholds at rates up to `MAX_THRESHOLD_RATE`. If hardly any defect is detected, as on an irregular
texture, plainer defects are more informative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import numpy as np
import torch

from gzcli.metrics.alarms import combined, patches, pca
from gzcli.metrics.alarms.cross import AT_ONCE
from gzcli.metrics.alarms.defects import DEFECT_KINDS, synthetic
from gzcli.metrics.alarms.fitted import reductions, sides
from gzcli.metrics.alarms.local import fit_local
from gzcli.metrics.alarms.methods import DEFAULT_METHOD, METHODS

MAX_THRESHOLD_RATE = 0.06  # largest false-alarm rate of a threshold that counts
MIN_IMAGES_TO_CHOOSE_MEMBERS = 40  # fewest good images for a choice of members; with fewer, all are used
MIN_IMAGES_TO_CHOOSE = 12  # fewest good images for a choice; with fewer, the first settings are used
HELD_OUT_SHARE, MAX_HELD_OUT_IMAGES = (
    0.28,
    140,
)  # share of good images set aside: for a rate of 2 %, 50 of 70 are left
DEFECTS_PER_KIND, PROBES_PER_KIND = 16, 8  # defects of each kind, for settings and for members
MAX_CALIBRATING_SHARE = 0.8  # largest share of good images that calibrate if there is a choice
# the first settings, or members, whose share is at most this much below the best are chosen
TIE_MARGIN, MEMBERS_TIE_MARGIN = 0.03, 0.01
TELLING_SHARE = (
    0.25  # share of the defects that the best settings must find; otherwise plainer defects are drawn
)
# groups of scales to choose from; the first is the default
SCALE_GROUPS = ((1, 3, 5), (1,), (3, -9), (3,), (5,))
SINGLE_SCALES = tuple(dict.fromkeys(k for group in SCALE_GROUPS for k in group))
Maps = Callable[[np.ndarray], np.ndarray]  # images → the maps [N, h, w] from which a local score is computed


@dataclass(frozen=True)
class Choice:
    method: str
    settings: Mapping[str, Any]  # keywords for its fit
    # share of the synthetic defects that these settings find; None: nothing was chosen
    detected: float | None


def set_aside(n: int, name: str, needed: int = 0) -> int:
    """How many of n good images do not calibrate; 0 if fewer than `needed` would be left. The choice of a
    method's settings uses up to `MAX_HELD_OUT_IMAGES` of them. With m = `needed`, a rate of 1 / (m + 1) is
    spent exactly by k (m + 1) − 1 images that calibrate."""
    if name not in (*SEARCHES, DEFAULT_METHOD):
        return 0
    if not needed:
        count = min(MAX_HELD_OUT_IMAGES, round(HELD_OUT_SHARE * n))
        return count if count >= MIN_IMAGES_TO_CHOOSE else 0
    times = int(MAX_CALIBRATING_SHARE * n + 1) // (needed + 1)
    count = n - times * (needed + 1) + 1
    return count if times and count >= MIN_IMAGES_TO_CHOOSE else 0


def choose(images: np.ndarray, name: str) -> Choice:
    """The best settings of a method for good images uint8 [N, C, H, W]; the default ones if there are no
    images. No image is scored by a fit to itself."""
    factors = sides(images.shape[1:])
    if not len(images):
        return Choice(name, defaults(name, factors), None)
    if name == DEFAULT_METHOD:
        enough = len(images) >= MIN_IMAGES_TO_CHOOSE_MEMBERS
        return choose_members(images) if enough else Choice(name, {}, None)
    defects = [synthetic(images, each=DEFECTS_PER_KIND, plain=plain) for plain in (False, True)]
    bad, source = (np.concatenate([each[i] for each in defects]) for i in (0, 2))
    rows = list(tried(name, factors, images, bad, source))
    for half in np.split(np.arange(len(bad)), 2):
        detected, settings = best_of((how, of_good, of_bad[half]) for how, of_good, of_bad in rows)
        if detected >= TELLING_SHARE:
            break
    return Choice(name, settings, detected)


def detection(good: np.ndarray, bad: np.ndarray, *, tails: int = 1) -> float:
    """The share of `bad` scores that are more unusual than a `good` score, averaged over the most unusual
    `good` scores up to the rate `MAX_THRESHOLD_RATE`. Two tails are ordered as in `conformal`."""
    ordered, shares = np.sort(good), []
    for count in range(1, max(1, round(MAX_THRESHOLD_RATE * len(good))) + 1):
        low, high = (count // 2, (count + 1) // 2) if tails == 2 else (0, count)
        shares.append(((bad > ordered[-high]) | (bad < ordered[low - 1] if low else False)).mean())
    return float(np.mean(shares))


def defaults(name: str, factors: Sequence[int]) -> dict[str, Any]:
    return {"factor": factors[0]} if METHODS[name].reduces else {}


def tried(
    name: str, factors: Sequence[int], good: np.ndarray, bad: np.ndarray, source: np.ndarray
) -> Iterator[tuple[dict[str, Any], np.ndarray, np.ndarray]]:
    """Yields settings of a method, and the scores of good and of defective images with each. `source` is the
    good image on which a defective one was drawn."""
    parts = [(part, part[source]) for part in pca.parts_of(len(good))]
    searches = [SEARCHES[name](good[~part], factors) for part, _ in parts]
    for candidates in zip(*searches, strict=True):
        settings = candidates[0][0]
        maps = []
        for at, images in enumerate((good, bad)):
            each = [maps_of(images[part[at]]) for (_, maps_of), part in zip(candidates, parts, strict=True)]
            whole = np.empty((len(images), *each[0].shape[1:]), np.float32)
            for part, values in zip(parts, each, strict=True):
                whole[part[at]] = values
            maps.append(whole)
        for how, of_good, of_bad in tried_scales(maps, parts):
            yield settings | how, of_good, of_bad


def tried_scales(
    maps: Sequence[np.ndarray], parts: Sequence[tuple[np.ndarray, np.ndarray]]
) -> Iterator[tuple[dict[str, Any], np.ndarray, np.ndarray]]:
    """Yields settings of a local score, and the scores of good and of defective images with each, computed
    from their maps.
    parts: parts of the good and of the defective images, each of which the others normalise."""
    for relate, even in product((False, True), repeat=2):
        how = {"relate": relate, "even": even}
        # a local score for each single scale; that of a group is their maximum
        tops = {k: tops_of(maps, parts, k, how) for k in SINGLE_SCALES}
        for scales in SCALE_GROUPS:
            of_good, of_bad = (np.max([tops[k][side] for k in scales], 0) for side in (0, 1))
            yield {"scales": scales, **how}, of_good, of_bad


def best_scales(good: np.ndarray, bad: np.ndarray, source: np.ndarray) -> tuple[float, dict[str, Any]]:
    """The settings of a local score that detect the most defects, given the maps of good and of defective
    images, and the share detected."""
    parts = [(part, part[source]) for part in pca.parts_of(len(good))]
    return best_of(tried_scales([good, bad], parts))


def best_of(
    scored: Iterable[tuple[dict[str, Any], np.ndarray, np.ndarray]], margin: float = TIE_MARGIN
) -> tuple[float, dict[str, Any]]:
    """The share of defects that the best settings detect, and the first settings that detect about as
    many."""
    every = [(detection(of_good, of_bad), settings) for settings, of_good, of_bad in scored]
    least = max(value for value, _ in every) - margin
    return next(row for row in every if row[0] >= least)


def tops_of(
    maps: Sequence[np.ndarray],
    parts: Sequence[tuple[np.ndarray, np.ndarray]],
    k: int,
    how: Mapping[str, bool],
) -> list[np.ndarray]:
    """The local scores of good and of defective images at one scale, from their maps. The good images of the
    other parts define the usual map of a part."""
    scores = [np.empty(len(each), np.float32) for each in maps]
    for part in parts:
        local = fit_local(maps[0][~part[0]], (k,), **how)
        for out, each, members in zip(scores, maps, part, strict=True):
            if members.any():
                out[members] = local.tops(each[members])
    return scores


def search_pca(images: np.ndarray, factors: Sequence[int]) -> Iterator[tuple[dict[str, Any], Maps]]:
    """Tries numbers of components, as shares of the number of images, because more images support more
    components."""
    moved = pca.moved(images)
    for factor in factors:
        every = pca.components(reductions(moved.reshape(-1, *images.shape[1:]), factor), pca.MAX_COMPONENTS)
        for share in pca.COMPONENT_SHARES:
            first = every.first(max(1, round(share * len(every.rows))))

            def maps(each: np.ndarray, first: pca.Components = first, factor: int = factor) -> np.ndarray:
                return pca.strength(first.residual(torch.from_numpy(reductions(each, factor)))).numpy()

            yield {"factor": factor, "share": share}, maps


def search_patches(images: np.ndarray, factors: Sequence[int]) -> Iterator[tuple[dict[str, Any], Maps]]:
    """Tries sides of the patch and weights of its place, at the smallest size."""
    factor = factors[0]
    x = reductions(images, factor)
    for side in (3, 5):
        for weight in (0.0, 1.0):
            embedding = patches.embed(x, side, weight)
            memory = patches.coreset(embedding(x), patches.MEMORY_PATCHES)

            def maps(
                each: np.ndarray, embedding: patches.Embedding = embedding, memory: np.ndarray = memory
            ) -> np.ndarray:
                return patches.distances(embedding(reductions(each, factor)), memory)

            yield {"factor": factor, "side": side, "weight": weight}, maps


def choose_members(images: np.ndarray) -> Choice:
    """The members of `combined` that together detect the most synthetic defects of all kinds, on good images
    uint8 [N, C, H, W]. All of them are preferred."""
    bad, _, source = synthetic(images, each=PROBES_PER_KIND, plain=True, kinds=DEFECT_KINDS)
    names = combined.available()
    of_good, of_bad = (np.empty((len(each), len(names))) for each in (images, bad))
    for part in pca.parts_of(len(images)):
        model = combined.fit_combined(images[~part])
        of_good[part] = each_score(model, images[part])
        of_bad[part[source]] = each_score(model, bad[part[source]])
    tables = []
    for size in range(len(names), 0, -1):
        for some in combinations(range(len(names)), size):
            rows = list(some)
            settings = {"members": tuple(names[i] for i in rows)}
            tables.append((settings, of_good[:, rows].max(1), of_bad[:, rows].max(1)))
    detected, settings = best_of(tables, MEMBERS_TIE_MARGIN)
    return Choice(DEFAULT_METHOD, settings, detected)


def each_score(model: combined.Combined, images: np.ndarray) -> np.ndarray:
    """The standardised scores of the members, [N, members]."""
    with torch.inference_mode():
        rows = [model.each(torch.from_numpy(images[i : i + AT_ONCE])) for i in range(0, len(images), AT_ONCE)]
    return torch.cat(rows).numpy() if rows else np.empty((0, len(model.members)))


SEARCHES = {"pca_local": search_pca, "knn_patch": search_patches}
