"""How well alarms without training do on inspection sets, beside simple ones, and how often they are wrong:

    python tests/tools/alarm_rows.py rows SET…      # detected at 2 %, AUROC, good and foreign images flagged
    python tests/tools/alarm_rows.py hindsight SET…     # the default alarm beside the best of all settings
    python tests/tools/alarm_rows.py coverage NAME --good 500 [--splits 20] [--textures ZIP] [--mnist DIR] …
    python tests/tools/alarm_rows.py summary --csv FILE     # of all splits of `coverage`

A SET is a folder that `inspection_sets.py` has written, a NAME one of its sets, of which every split has new
pictures. Lines of CSV go to stdout, or to the end of `--csv FILE`, whose splits are not made again.

`rows` has the default alarm, each method, and two alarms of a few lines each, whose held-out pictures are the
same: the largest mean over 3 × 3 of the squared residual of 60 principal components, and that of the residual
of 150 after it is normalised in each pixel, both of images of about 32 pixels, by 5 folds.
"""

from __future__ import annotations

import argparse
import csv
import io
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import inspection_sets
import numpy as np
import torch
from PIL import Image
from scipy.stats import betabinom
from torch import Tensor

from gzcli.metrics import conformal
from gzcli.metrics.alarms import choice, cross, patches, pca
from gzcli.metrics.alarms.alarm import Alarm, calibrate
from gzcli.metrics.alarms.fitted import Fitted, reduced, reductions, sides
from gzcli.metrics.alarms.local import fit_local, smooth
from gzcli.metrics.alarms.methods import DEFAULT_METHOD, METHODS
from gzcli.metrics.detection import detection as figures_of

RATE = 0.02
METHODS_ALONE = ("pca_local", "pca_patch", "knn_patch", "patchcore", "pca", "knn_pixels")
SEARCHED = ("pca_local", "knn_patch", "pca_patch", "pca")  # of which `hindsight` takes the best
Row = dict[str, Any]


# ---------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Inspected:
    """An inspection set: good pictures for training and for the test, defects and their kinds."""

    name: str
    train: np.ndarray  # uint8 [N, C, H, W]
    good: np.ndarray
    bad: np.ndarray
    kinds: np.ndarray

    @classmethod
    def read(cls, folder: Path) -> Inspected:
        files = sorted(path for path in folder.glob("test/*/*.png") if path.parent.name != "good")
        kinds = np.array([path.parent.name for path in files])
        train, good = (sorted(folder.glob(f"{split}/good/*.png")) for split in ("train", "test"))
        return cls(folder.name, pictures(train), pictures(good), pictures(files), kinds)


def pictures(files: list[Path]) -> np.ndarray:
    return stacked([np.array(Image.open(file)) for file in files])


def stacked(images: list[np.ndarray]) -> np.ndarray:
    whole = np.stack(images)
    return whole[:, None] if whole.ndim == 3 else np.ascontiguousarray(whole.transpose(0, 3, 1, 2))


def foreign(shape: tuple[int, ...], like: np.ndarray) -> dict[str, np.ndarray]:
    """Images that are none of a set, in its shape: of one colour, noise, photographs, and inverted ones."""
    from sklearn.datasets import load_sample_images

    rng, (channels, height, width) = np.random.default_rng(0), shape
    photos = []
    for source in load_sample_images().images:
        for _ in range(10):
            side = int(rng.integers(height, 4 * height))
            y, x = rng.integers(0, source.shape[0] - side), rng.integers(0, source.shape[1] - side)
            crop = Image.fromarray(source[y : y + side, x : x + side]).resize((width, height))
            photos.append(np.array(crop.convert("L" if channels == 1 else "RGB")))
    blank = [np.full(shape, value, np.uint8) for value in (0, 64, 128, 192, 255)]
    return {
        "blank": np.stack(blank),
        "noise": rng.integers(0, 256, (20, *shape), np.uint8),
        "photos": stacked(photos),
        "inverted": 255 - like[:20],
    }


# ---------------------------------------------------------------------------- alarms of a few lines


def factor_32(images: np.ndarray) -> int:
    return max(1, round(images.shape[2] / 32))


@dataclass(eq=False)
class Plain60(Fitted):
    factor: int
    basis: pca.Components

    def scores(self, images: Tensor) -> Tensor:
        squares = self.basis.residual(reduced(images, self.factor)).square().mean(1)
        return smooth(squares, 3).amax((1, 2))


@dataclass(eq=False)
class Normalised150(Fitted):
    factor: int
    basis: pca.Components
    mean: Tensor
    deviation: Tensor

    def scores(self, images: Tensor) -> Tensor:
        strength = pca.strength(self.basis.residual(reduced(images, self.factor)))
        return smooth((strength - self.mean) / self.deviation, 3).amax((1, 2))


def fit_plain_60(images: np.ndarray) -> Plain60:
    factor = factor_32(images)
    return Plain60({}, factor, pca.components(reductions(images, factor), 60))


def fit_normalised_150(images: np.ndarray) -> Normalised150:
    factor = factor_32(images)
    x = reductions(images, factor)
    left = pca.strengths(pca.left_out(x[None], 150))
    moments = (torch.from_numpy(each) for each in (left.mean(0), left.std(0) + 1e-6))
    return Normalised150({}, factor, pca.components(x, 150), *moments)


FEW_LINES = {"PCA 60, 3×3": fit_plain_60, "PCA 150, normalised, 3×3": fit_normalised_150}


# ---------------------------------------------------------------------------- rows


def rows(of: Inspected, only: list[str] | None) -> Iterator[Row]:
    needed = conformal.fewest(RATE)
    for name in ["default", *FEW_LINES, *METHODS_ALONE]:
        if only and name not in only:
            continue
        began = time.process_time()
        settings: Mapping[str, Any] = {}
        if name in FEW_LINES:
            calibrated = cross.cross(of.train, FEW_LINES[name], folds=5)
        else:
            alarm = calibrate(of.train, DEFAULT_METHOD if name == "default" else name, needed=needed)
            calibrated = alarm.calibrated
            settings = {"method": alarm.choice.method, **calibrated.models[0].settings}
        yield figures(of, calibrated, name) | {
            "settings": settings,
            "cpu_seconds": round(time.process_time() - began, 1),
        }


def figures(of: Inspected, calibrated: cross.Calibrated, name: str) -> Row:
    strange = foreign(of.good.shape[1:], of.good)
    scores = {
        key: calibrated.score(images) for key, images in {"good": of.good, "bad": of.bad, **strange}.items()
    }
    flagged = {key: conformal.flagged(calibrated.p_values(each), RATE) for key, each in scores.items()}
    by_kind = {kind: int(flagged["bad"][of.kinds == kind].sum()) for kind in dict.fromkeys(of.kinds.tolist())}
    auroc = figures_of(scores["good"].mean(1), scores["bad"].mean(1))["auroc"]
    return {
        "set": of.name,
        "alarm": name,
        "detected": int(flagged["bad"].sum()),
        "of": len(of.bad),
        "auroc": round(auroc, 4),
        "good_flagged": int(flagged["good"].sum()),
        "good": len(of.good),
        **{key: f"{flagged[key].sum()}/{len(images)}" for key, images in strange.items()},
        "kinds": by_kind,
    }


# ---------------------------------------------------------------------------- hindsight


def hindsight(of: Inspected) -> Iterator[Row]:
    """The default alarm and each setting of each method, fitted to all good training images. Detected are the
    defects whose score is above the 2 % of the good test images that have the highest ones."""
    count = max(1, round(RATE * len(of.good)))

    def share(good: np.ndarray, bad: np.ndarray) -> float:
        return 100 * float((bad > np.sort(good)[-count]).mean())

    every = [(share(*scores), name, how) for name, how, scores in every_score(of)]
    best, name, settings = max(every, key=lambda row: row[0])
    default = METHODS[DEFAULT_METHOD].fit(of.train)
    detected = share(default.score(of.good), default.score(of.bad))
    yield {
        "set": of.name,
        "default": round(detected, 1),
        "best": name,
        "best_settings": dict(settings),
        "best_detected": round(best, 1),
        "regret": round(best - detected, 1),
        "settings": len(every),
        "best_of": {
            key: round(max(s for s, n, _ in every if n == key), 1) for key in {n for _, n, _ in every}
        },
    }


def every_score(of: Inspected) -> Iterator[tuple[str, Mapping[str, Any], tuple[np.ndarray, np.ndarray]]]:
    factors = sides(of.train.shape[1:])
    for name in SEARCHED:
        if name not in choice.SEARCHES:
            for factor in factors[:2]:
                fitted = METHODS[name].fit(of.train, factor=factor)
                yield name, {"factor": factor}, (fitted.score(of.good), fitted.score(of.bad))
            continue
        for base, maps_of in choice.SEARCHES[name](of.train, factors):
            usual = usual_maps(name, of.train, base)
            maps = [maps_of(images) for images in (of.good, of.bad)]
            for scales, relate, even in product(choice.SCALE_GROUPS, (False, True), (False, True)):
                how: dict[str, Any] = {"scales": scales, "relate": relate, "even": even}
                local = fit_local(usual, **how)
                good, bad = map(local.tops, maps)
                yield name, {**base, **how}, (good, bad)


def usual_maps(name: str, images: np.ndarray, base: Mapping[str, Any]) -> np.ndarray:
    """Maps of good images by what was not fitted to them, as the fits of the methods have them."""
    x = reductions(images, base["factor"])
    if name == "pca_local":
        return pca.strengths(pca.with_moved(pca.moved(images), base["factor"], base["share"])[1])
    return patches.remembered(patches.embed(x, base["side"], base["weight"])(x))[1]


# ---------------------------------------------------------------------------- coverage


def coverage(name: str, draw: inspection_sets.Drawer, chosen: argparse.Namespace) -> Iterator[Row]:
    """Of each split the good pictures, of `TEST` new ones, that are flagged at 2 %."""
    each, seen = chosen.good + chosen.test, done(chosen.csv)
    for split in range(chosen.splits):
        if (name, str(chosen.good), str(split)) in seen:
            continue
        first, began = (1 + split) * 1_000_000 + chosen.seed * 100_000_000, time.process_time()
        whole = stacked([inspection_sets.rounded(draw(first + i, None)) for i in range(each)])
        alarm: Alarm = calibrate(whole[: chosen.good], DEFAULT_METHOD, needed=conformal.fewest(RATE))
        calibrated = alarm.calibrated
        p = calibrated.p_values(calibrated.score(whole[chosen.good :]))
        yield {
            "set": name,
            "good": chosen.good,
            "split": split,
            "flagged": int(conformal.flagged(p, RATE).sum()),
            "test": chosen.test,
            "held_out": len(calibrated.held_out),
            "method": alarm.choice.method,
            "cpu_seconds": round(time.process_time() - began, 1),
        }


def done(file: Path | None) -> set[tuple[str, ...]]:
    if file is None or not file.exists():
        return set()
    return {tuple(row[:3]) for row in csv.reader(file.open())}


def summary(file: Path) -> None:
    """Of each set and number of good pictures: the false alarms of all splits, and the 95 % interval of a
    rate of 2 %. It is that of independent splits, of which each has the rate that its own held-out images
    give it by chance (Vovk 2012): k of n + 1 places, Beta(k, n + 1 − k)."""
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in csv.DictReader(file.open()):
        groups.setdefault((row["set"], row["good"]), []).append(row)
    for (name, good), group in groups.items():
        flagged, test = (sum(int(row[key]) for row in group) for key in ("flagged", "test"))
        n = int(group[0]["held_out"])
        k = int(RATE * (n + 1) + 1e-9)
        rng = np.random.default_rng(0)
        sums = sum(
            betabinom.rvs(int(row["test"]), k, n + 1 - k, size=20_000, random_state=rng) for row in group
        )
        low, high = np.quantile(sums, [0.025, 0.975])
        print(
            f"{name},{good},{len(group)} splits,{flagged} of {test},{100 * flagged / test:.2f} %,"
            f"interval {100 * low / test:.2f}–{100 * high / test:.2f} % of {100 * k / (n + 1):.2f} %"
        )


# ---------------------------------------------------------------------------- the command


def write(lines: Iterator[Row], file: Path | None) -> None:
    """Writes each row as soon as it is made, the first one below the names of its columns."""
    new = file is None or not file.exists()
    for row in lines:
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerows([list(row), list(row.values())] if new else [list(row.values())])
        new = False
        if file is None:
            print(text.getvalue(), end="", flush=True)
            continue
        with file.open("a") as out:
            out.write(text.getvalue())


def main() -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("what", choices=["rows", "hindsight", "coverage", "summary"])
    parser.add_argument("names", nargs="*", metavar="SET|NAME")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    parser.add_argument("--only", action="append", help="an alarm of `rows`")
    parser.add_argument("--good", type=int, default=500)
    parser.add_argument("--test", type=int, default=200, help="new good pictures of a split")
    parser.add_argument("--splits", type=int, default=20)
    inspection_sets.add_options(parser)
    chosen = parser.parse_args()
    if chosen.what == "summary":
        summary(chosen.csv)
        return
    made = inspection_sets.drawers_of(chosen) if chosen.what == "coverage" else {}
    for name in chosen.names:
        if chosen.what == "coverage":
            write(coverage(name, made[name][0], chosen), chosen.csv)
            continue
        of = Inspected.read(Path(name))
        write(rows(of, chosen.only) if chosen.what == "rows" else hindsight(of), chosen.csv)


if __name__ == "__main__":
    main()
