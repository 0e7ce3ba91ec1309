"""`gz ood --input`: flags single images that do not resemble the training set of a model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gzcli.core import ranks
from gzcli.core.errors import UsageError
from gzcli.core.types import Batch
from gzcli.core.units import counted, percent
from gzcli.data.packs.open import open_pack
from gzcli.data.packs.pack import Pack
from gzcli.data.sets.registry import Form, OwnSet, locate
from gzcli.engine.log import Log
from gzcli.engine.sheets import Row, sheet
from gzcli.judge import methods
from gzcli.judge.images import FITTED_IMAGES, Pick, count_of, treatment
from gzcli.judge.local import enlarged
from gzcli.judge.methods import is_good_test
from gzcli.judge.scores import Scoring, Table, batches_of, map_of, write_csv
from gzcli.metrics import conformal
from gzcli.metrics.alarms import copies
from gzcli.metrics.alarms.cross import USUAL_IMAGES, quantiles
from gzcli.metrics.alarms.methods import DEFAULT_METHOD, LOCAL, METHODS
from gzcli.metrics.interval import subset
from gzcli.metrics.likelihood_scores import tails_of
from gzcli.store import files
from gzcli.store.jobs import AlarmJob
from gzcli.store.png import save_images, save_png
from gzcli.store.runs import Run

SHEET_IMAGES, SHEET_COLUMNS = 16, 8  # images of each kind on the sheet, and per row
# p-value and number of images from which a drift is noted, unless most images are flagged anyway
DRIFT_LEVEL, MIN_DRIFT_IMAGES, MAX_DRIFT_FLAGGED = 0.01, 8, 0.5
IMAGES_AT_ONCE = 1024  # images that are read at once


@dataclass(frozen=True)
class Compared:
    """Scores of images, and of the held-out images that they are compared with. A run or a method without
    training computes them.

    scores: scores of images by K models, [N, K] each; K is 1 for a run.
    held_out: scores of held-out images, [n] each. Each image is scored by the model that was not fitted to
      it, whose index is in `fold` [n].
    spread: standard deviation of an image's score over draws of noise, [N] each; {} for a single draw.
    maps: function from positions of images to their maps in false colours, such as `heat_maps`.
    """

    facts: Mapping[str, Any]
    pictures: Pack
    scores: Table
    held_out: Table
    fold: np.ndarray
    spread: Table
    compared: Mapping[str, Any]
    notes: Sequence[str]
    levels: int | None
    shows: str | None
    maps: Callable[[np.ndarray], dict[int, np.ndarray]]


def run(job: AlarmJob, folder: Path, device: torch.device, log: Log) -> dict[str, Any]:
    """Writes `alarm.csv`, `alarm.png`, `alarm.json` and maps into `folder`. Returns the JSON of `gz ood
    --input` on rank 0, {} on others."""
    began = time.monotonic()
    outcome = by_method(job, log) if job.method else by_run(job, device, log)
    pictures = outcome.pictures
    labels = pictures.names("test") or [str(i) for i in range(pictures.meta.counts["test"])]
    verdicts, thresholds = verdicts_of(outcome, job.fpr, labels)
    mapped = verdicts if job.png else [v for flagged in (True, False) for v in sheet_rows(verdicts, flagged)]
    maps = outcome.maps(np.array([verdict.i for verdict in mapped])) if outcome.shows else {}
    if ranks.rank():
        return {}
    table, picture = folder / "alarm.csv", folder / "alarm.png"
    header = ["file", "p", "flagged", *thresholds, *(f"{name} ±" for name in verdicts[0].spread)]
    lines = ([v.file, v.p, int(v.flagged), *v.scores.values(), *v.spread.values()] for v in verdicts)
    write_csv(table, header, lines)
    save_png(picture, overview(pictures, verdicts, maps))
    outputs: dict[str, Any] = {"scores": str(table), "picture": str(picture)}
    if maps:
        paths = save_images(folder / "maps", np.stack(list(maps.values())))
        outputs["maps"] = {labels[i]: path for i, path in zip(maps, paths, strict=True)}
    low, high = (finite({name: ends[i] for name, ends in thresholds.items()}) for i in (0, 1))
    result = {
        **outcome.facts,
        "input": job.input,
        "fpr": job.fpr,
        "threshold": next(iter(high.values())) if len(high) == 1 else None,
        "thresholds": high,
        "thresholds_low": low,
        "flagged": sum(verdict.flagged for verdict in verdicts),
        "unreadable": list(pictures.meta.skipped),
        "compared": outcome.compared,
        "notes": [
            *outcome.notes,
            *notes(job, verdicts, thresholds, outcome.compared["n"]),
            *treatment({"input": pictures}, outcome.levels),
        ],
        "files": [verdict.row() for verdict in verdicts],
        "map": outcome.shows,
        "seconds": round(time.monotonic() - began, 1),
        "outputs": outputs,
    }
    files.write_json(Run(folder).alarm_file, result)
    return result


def open_pictures(job: AlarmJob, form: Mapping[str, Any], log: Log) -> Pack:
    """The user's images as one split `test`, in the form of the in-distribution set."""
    source = OwnSet(Path(job.input), form=Form(skip_bad=True, layout="flat"))
    return open_pack(source, **form, foreign=True, say=log.info)


def by_run(job: AlarmJob, device: torch.device, log: Log) -> Compared:
    """Compares images by the scores of a run. The score of an image is the mean over several draws of noise,
    which its pixels seed. The held-out images that calibrate were not used to fit a score."""
    scoring = Scoring(job, device, log)
    trained = scoring.trained
    held_out, fitted, remarks = calibrate(job, scoring)
    least_images = conformal.fewest(job.fpr, len(scoring.names))
    shows = shown_map(scoring) if job.maps else None
    pictures = open_pictures(job, trained.form, log)
    every = Pick(pictures, "test", np.arange(pictures.meta.counts["test"]), by_content=True, unbounded=True)

    def picks(n: int | None) -> dict[str, Pick]:
        index = np.sort(held_out.index[: None if n is None else max(n, least_images)])
        return {"compared": replace(held_out, index=index), "pictures": every}

    scoring.score(picks, fitted)
    (usual, _), (means, spread) = map(scoring.over_seeds, ("compared", "pictures"))
    n = len(scoring.picks["compared"].index)

    def maps(order: np.ndarray) -> dict[int, np.ndarray]:
        few = replace(held_out, index=held_out.index[:USUAL_IMAGES])
        return heat_maps(scoring, shows or "", replace(every, index=order), few)

    return Compared(
        facts=scoring.facts(),
        pictures=pictures,
        scores={name: values[:, None] for name, values in means.items()},
        held_out=usual,
        fold=np.zeros(n, np.int64),
        spread=spread,
        compared={"split": held_out.split, "n": n, "needed": least_images},
        notes=[*remarks, *chosen_in_words(scoring)],
        levels=trained.images.levels,
        shows=shows,
        maps=maps,
    )


def by_method(job: AlarmJob, log: Log) -> Compared:
    """Compares images by a method that needs no training. The method is fitted to good images and calibrated
    on them."""
    good = methods.open_good(job, log.info)
    alarm = methods.alarm_of(good, job, log.info)
    calibrated, name = alarm.calibrated, alarm.choice.method
    pictures = open_pictures(job, good.form, log)
    images = np.asarray(pictures.images("test"))
    n, scores = len(calibrated.held_out), calibrated.score(images)
    drift = conformal.drift(calibrated.held_out, calibrated.fold, scores)
    flagged = conformal.flagged(calibrated.p_values(scores), job.fpr)

    def maps(chosen: np.ndarray) -> dict[int, np.ndarray]:
        strange = calibrated.map(images[chosen])
        if strange is None:
            return {}
        return dict(zip(chosen.tolist(), heat(strange, calibrated.bright), strict=True))

    return Compared(
        facts=methods.facts(good, alarm, job),
        pictures=pictures,
        scores={name: scores},
        held_out={name: calibrated.held_out},
        fold=calibrated.fold,
        spread={},
        compared={
            "split": good.split,
            "n": n,
            "needed": conformal.fewest(job.fpr),
            "folds": len(calibrated.models),
            "bound": calibrated.bound(job.fpr),
            "drift": drift,
        },
        notes=[*methods.notes(good, alarm, job.fpr), *drift_in_words(drift, flagged)],
        levels=None,
        shows=name if job.maps and METHODS[name].mapped else None,
        maps=maps,
    )


def drift_in_words(p: float, flagged: np.ndarray) -> list[str]:
    """A note if the images differ as a whole from those that calibrate."""
    if p >= DRIFT_LEVEL or len(flagged) < MIN_DRIFT_IMAGES or flagged.mean() > MAX_DRIFT_FLAGGED:
        return []
    cause = "light, focus, camera? `--calibrate DIR` with new good images adapts the alarm"
    return [f"today differs as a whole (p {p:.1g}): {cause}"]


def calibrate(job: AlarmJob, scoring: Scoring) -> tuple[Pick, Pick, list[str]]:
    """Splits the held-out images into those to compare with, in random order, and those to fit scores on.
    Also returns notes on copies, and chooses the score of an alarm. Raises UsageError if there are too few
    images for the rate."""
    needed, home = conformal.fewest(job.fpr, 1 if scoring.is_free else len(scoring.names)), scoring.home
    held_out, fitted, notes = split_held_out(home, is_good_test(locate(job.ins), job.verb), needed)
    if job.calibrate:
        pack = open_pack(job.calibrate, **scoring.trained.form, foreign=True, say=scoring.log.info)
        order = np.random.default_rng(0).permutation(pack.meta.counts["test"])
        if fitted.split == held_out.split:
            both = np.sort(np.concatenate([fitted.index, held_out.index]))
            fitted = replace(fitted, index=both[subset(len(both), FITTED_IMAGES)])
        held_out, notes = without_copies(Pick(pack, "test", order, by_content=True), training(home), fitted)
    names = scoring.names[:1] if scoring.is_free else scoring.names
    total = len(held_out.index)
    if not job.calibrate and fitted.split == held_out.split:  # at a lower rate, these would calibrate too
        total += len(fitted.index)
    check_held_out(total, job, names, home, notes)
    if scoring.is_free:
        scoring.choose(fitted)
    return held_out, fitted, notes


def split_held_out(home: Pack, with_test: bool = True, needed: int = 0) -> tuple[Pick, Pick, list[str]]:
    """The held-out images to compare with, in random order, those to fit scores on (500, or a quarter), and
    notes on copies. If fewer than `needed` would remain to compare with, scores are fitted on training
    images. Held-out images are the validation images and, `with_test`, the test images, without copies of
    training images. A tiny set may have test images only. Raises UsageError for a set without either."""
    counts = home.meta.counts
    split = "+".join(["val"] * bool(counts["val"]) + ["test"] * (with_test or not counts["val"]))
    order = np.random.default_rng(0).permutation(count_of(home, split))
    every, notes = without_copies(Pick(home, split, order, by_content=True), training(home))
    total, order = len(every.index), every.index
    if not total:
        none = f"`{home.meta.reference}` has neither validation nor test images to compare with"
        raise UsageError(": ".join([none, *notes]))
    k = min(FITTED_IMAGES, total // 4)
    if total - k < needed <= total:
        return every, Pick(home, "train", subset(counts["train"], FITTED_IMAGES)), notes
    return replace(every, index=order[k:]), Pick(home, split, np.sort(order[:k])), notes


def training(home: Pack, split: str = "train") -> Pick:
    """All images of one or several splits."""
    return Pick(home, split, np.arange(count_of(home, split)))


def without_copies(pick: Pick, *used: Pick) -> tuple[Pick, list[str]]:
    """A pick without copies of its own images and of those that a run was trained on or a score is fitted to,
    and a note if any is left out."""
    title = pick.pack.meta.reference
    if any(each.pack.meta.streamed for each in (pick, *used)):  # to decode all of it takes too long
        return pick, [f"`{title}` was not searched for copies of training images, because a set is streamed"]
    order = np.sort(pick.index)
    keys = list(hashes(replace(pick, index=order)))
    wanted = set(keys)
    seen = {key for each in used for key in hashes(each) if key in wanted}
    kept = pick.index[np.isin(pick.index, order[copies.originals(keys, seen)])]
    if len(kept) == len(order):
        return pick, []
    return replace(pick, index=kept), [copies.in_words(len(order) - len(kept), title, fitting=True)]


def hashes(pick: Pick) -> Iterator[bytes]:
    """The hashes of the images of a pick, in which some are read at once."""
    pick = replace(pick, size=IMAGES_AT_ONCE)
    for i in range(len(pick)):
        yield from copies.hashes(pick[i : i + 1].images())


def check_held_out(total: int, job: AlarmJob, names: Sequence[str], home: Pack, why: Sequence[str]) -> None:
    """Raises UsageError if there are too few held-out images for the false-alarm rate. The message ends with
    `why`; the hint is a command that reaches the rate."""
    n, least_images = total if job.n is None else min(job.n, total), conformal.fewest(job.fpr, len(names))
    if n >= least_images:
        return
    by, fewer = (f" with {len(names)} scores", "one score with `--score`, ") if len(names) > 1 else ("", "")
    larger = f"`-n {least_images}`, " if total >= least_images else ""
    least = conformal.lowest_rate(n, len(names))
    rate = f"a false-alarm rate of {percent(job.fpr)}{by}"
    message = f"{rate} needs {least_images:,} held-out images, but there are only {n:,}"
    message = ": ".join([message, *(why if n == total else [])])
    hint = f"use {fewer}{larger}`--fpr {least:g}%` or more, or give more good images with `--calibrate DIR`"
    if (line := methods.line_that_reaches(job, home)) and not (fewer or larger):
        hint += f"; or use no model: `{line}`"
    raise UsageError(message, hint=hint)


def chosen_in_words(scoring: Scoring) -> list[str]:
    """How the score of a run was chosen."""
    if not (table := scoring.choice):
        return []
    shares = ", ".join(f"`{name}` {100 * share:.0f} %" for name, share in table.items())
    text = f"synthetic defects detected on held-out images: {shares}"
    if DEFAULT_METHOD in table:
        text += f"; `{DEFAULT_METHOD}` uses no model"
    words = methods.in_words(scoring.settings)
    return [text, f"score: `{scoring.names[0]}`" + (f" with {words}" if words else "")]


@dataclass(frozen=True)
class Verdict:
    """The outcome for one image, by the ranks of its scores among those of held-out images."""

    i: int  # position among the images
    file: str
    scores: dict[str, float]  # infinite if the model overflows
    spread: dict[str, float]  # standard deviations over the draws of noise; {} for a single draw
    p: float  # p-value of all scores together
    low: bool  # whether the deciding score is unusually low, not high
    flagged: bool

    def row(self) -> dict[str, Any]:
        row = {"file": self.file, "scores": finite(self.scores), "p": self.p, "flagged": self.flagged}
        row["side"] = "low" if self.low else "high"
        return row | ({"spread": finite(self.spread)} if self.spread else {})


def finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def verdicts_of(
    outcome: Compared, fpr: float, labels: Sequence[str]
) -> tuple[list[Verdict], dict[str, tuple[float, float]]]:
    """The verdicts at a false-alarm rate, the most unusual image first, and the lower and upper thresholds of
    each score. A score that is not finite ranks above all others, because no held-out image has such a
    score."""
    by_models = {name: np.where(np.isnan(values), np.inf, values) for name, values in outcome.scores.items()}
    scores = {name: values.mean(1) for name, values in by_models.items()}
    p, low, thresholds, beyond = [], [], {}, []
    for name, values in scores.items():
        usual, tails = outcome.held_out[name], tails_of(name)
        p.append(conformal.cross_p_values(usual, outcome.fold, by_models[name], tails=tails))
        low.append((tails == 2) & (values < np.median(usual)))
        ends = thresholds[name] = conformal.thresholds(usual, fpr / len(scores), tails=tails)
        unit = usual.std() or 1
        beyond += [(ends[0] - values) / unit, (values - ends[1]) / unit]
    of_each = np.stack(p)
    together = conformal.bonferroni(of_each)
    is_low = np.take_along_axis(np.stack(low), of_each.argmin(0)[None], 0)[0]
    flagged = conformal.flagged(together, fpr)

    def verdict(i: int) -> Verdict:
        value, deviation = (
            {name: float(values[i]) for name, values in table.items()} for table in (scores, outcome.spread)
        )
        return Verdict(i, labels[i], value, deviation, float(together[i]), bool(is_low[i]), bool(flagged[i]))

    # sorted by p, ties by the largest distance of a score beyond its threshold, in standard deviations
    return [verdict(i) for i in np.lexsort((-np.max(beyond, 0), together)).tolist()], thresholds


def notes(
    job: AlarmJob, verdicts: Sequence[Verdict], thresholds: Mapping[str, tuple[float, float]], n: int
) -> list[str]:
    lines, count = [], len(thresholds)
    if count > 1:
        lines.append(
            f"the p-value is the smallest of {count} scores, times {count} (Bonferroni), so each "
            f"score flags at {percent(job.fpr / count)}"
        )
    if any(tails_of(name) == 2 and not math.isfinite(low) for name, (low, _) in thresholds.items()):
        least = conformal.lowest_rate(n, 2 * count)
        lines.append(
            f"{n:,} held-out images are too few to flag unusually simple images, such as blank ones, "
            f"at {percent(job.fpr)}; use `--fpr {least:g}%`"
        )
    if overflown := sum(not all(map(math.isfinite, verdict.scores.values())) for verdict in verdicts):
        lines.append(
            f"the score of {counted(overflown, 'image')} is not finite, because the model overflows; "
            "such a score counts as higher than every held-out score"
        )
    return lines


def shown_map(scoring: Scoring) -> str:
    """The map to show: the local map if it is a score, otherwise the map of the first score that has one."""
    model, names = scoring.trained.model, scoring.names
    return LOCAL if LOCAL in names else map_of(model, names, scoring.trained.name)


def heat_maps(scoring: Scoring, name: str, pictures: Pick, usual: Pick) -> dict[int, np.ndarray]:
    """Maps of the images by position, in false colours, uint8 [3, H, W], at the images' size. The colours are
    scaled so that maps of `usual` images stay dark."""
    maps_of = maps_by(scoring, name)
    bright = float(quantiles(maps_of(usual)).mean())
    return dict(zip(pictures.index.tolist(), heat(maps_of(pictures), bright), strict=True))


def maps_by(scoring: Scoring, name: str) -> Callable[[Pick], np.ndarray]:
    """A function from images to the local map, or to the model's map of this name: float [N, H, W], at the
    images' size and in their order. Each process computes its share. A local map is the mean over the draws
    of noise."""
    trained = scoring.trained
    scorers = scoring.scorers if name == LOCAL else scoring.scorers[:1]

    def work(batch: Batch) -> dict[str, np.ndarray]:
        batch, maps = trained.encode(batch), []
        for scorer in scorers:
            if name == LOCAL and scorer.local:
                maps.append(scorer.local.local.shown(torch.from_numpy(scorer.map(batch))).numpy())
            else:
                maps.append(scorer.map(batch, name))
        return {"map": enlarged(np.stack(maps).mean(0), trained.images.shape[1:])}

    def maps_of(pick: Pick) -> np.ndarray:
        order = np.argsort(pick.index, kind="stable")
        images = batches_of(replace(pick, index=pick.index[order]), trained, scoring.job.seed)
        return ranks.over(images, work)["map"][np.argsort(order, kind="stable")]

    return maps_of


def heat(maps: np.ndarray, usual: float) -> np.ndarray:
    """Maps [N, H, W] as images in false colours, uint8 [N, 3, H, W]. Black is 0 or less. The brightest colour
    is reached at the `BRIGHT` quantile of the map or at `usual`, whichever is larger, and by values that are
    not finite."""
    from matplotlib import colormaps

    finite = np.isfinite(maps)
    maps = np.where(finite, maps, 0)
    top = np.maximum(quantiles(maps), usual)
    share = np.where(finite, maps / np.maximum(top, 1e-12)[:, None, None], 1).clip(0, 1)
    return (colormaps["inferno"](share)[..., :3] * 255).round().astype(np.uint8).transpose(0, 3, 1, 2)


def sheet_rows(verdicts: Sequence[Verdict], flagged: bool) -> list[Verdict]:
    """A row of the sheet with images of one kind."""
    return [verdict for verdict in verdicts if verdict.flagged == flagged][:SHEET_IMAGES]


def overview(pictures: Pack, verdicts: Sequence[Verdict], maps: Mapping[int, np.ndarray]) -> np.ndarray:
    """A sheet of the flagged images and of the others, the most unusual first, with their maps below."""
    blocks = []
    for kind in ("flagged", "not flagged"):
        rows, every = [], sum(verdict.flagged == (kind == "flagged") for verdict in verdicts)
        shown = sheet_rows(verdicts, kind == "flagged")
        count = f"{every:,}, first {SHEET_IMAGES}" if every > SHEET_IMAGES else f"{every}"
        for start in range(0, len(shown), SHEET_COLUMNS):
            some = shown[start : start + SHEET_COLUMNS]
            images = pictures.images("test")[np.array([verdict.i for verdict in some])]
            if maps and images.shape[1] == 1:  # maps are in colour
                images = images.repeat(3, 1)
            words = [(verdict.file, f"p {verdict.p:.2g}") for verdict in some]
            rows.append(Row("" if start else f"{kind}: {count}", list(images), under=words))
            if mapped := [maps[verdict.i] for verdict in some if verdict.i in maps]:
                rows.append(Row("map", mapped, exact=True))
        blocks.append(rows)
    return sheet([rows for rows in blocks if rows])
