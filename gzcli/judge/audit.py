"""`gz data audit`: the faults of a data set. Unreadable files, blank images and odd sizes are noticed as the
images are read; copies, foreign images and wrong labels by their features (`metrics/audit.py`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gzcli.core import ranks
from gzcli.core.errors import MissingError
from gzcli.core.types import Progress
from gzcli.core.units import counted
from gzcli.data.packs.pack import SPLITS
from gzcli.data.packs.source import at_hand, read
from gzcli.data.readers.images import Content, RawImages, bytes_in
from gzcli.data.readers.pictures import Decoding, decode, padded, sides_of
from gzcli.data.readers.values import value_ranges, with_pictures
from gzcli.data.sets.registry import locate
from gzcli.engine.log import Log
from gzcli.engine.sheets import CELL_SIDE, Row, sheet
from gzcli.judge.scores import write_csv
from gzcli.metrics import audit
from gzcli.metrics.alarms import copies
from gzcli.store.jobs import AUDIT_KINDS, AuditJob
from gzcli.store.png import picture_of, save_png

BATCH_IMAGES = 16  # images in a forward pass
MOVED_PIXELS = 0.5  # pixels of a thumbnail by which a copy is moved at least, to be called so
BLANK_LEVELS = 4  # largest difference between the grey levels of a blank image, as compression leaves it
COMMON_SHARE = 0.9  # of the images: if as many have one size, every other size is odd
ODD_FACTOR = 2.0  # by which an odd side or aspect ratio exceeds those of nearly all images
NEARLY_ALL = (0.02, 0.98)  # quantiles between which nearly all images are
DRAWN_FAULTS, FAULTS_PER_ROW = 16, 8  # of each kind on the sheet
TABLE_COLUMNS = ("file", "split", "kind", "score", "of", "label", "suggested", "note")


@dataclass(frozen=True)
class Fault:
    """A fault of an image, a row of the table.

    score: of a copy, the correlation of its details with the original's; of a foreign image, its p-value; of
      a wrong label, its probability against the suggested one. None for other kinds.
    of: the file that a copy shows.
    """

    file: str
    split: str
    kind: str
    score: float | None = None
    of: str | None = None
    label: str | None = None
    suggested: str | None = None
    note: str = ""


@dataclass
class Survey:
    """The images of a set, in the order train, val, test.

    labels: class numbers; −1 without.
    sides: width and height of each image, 0 for those that cannot be read, [N, 2].
    problems: for images that cannot be read, the reason.
    original: for each image that was read, the first one with the same pixels.
    described: positions of the first ones that are not blank, whose features and thumbnails follow.
    """

    names: list[str]
    splits: list[str]
    labels: np.ndarray
    classes: tuple[str, ...]
    sides: np.ndarray
    problems: dict[int, str] = field(default_factory=dict)
    blank: list[int] = field(default_factory=list)
    original: dict[int, int] = field(default_factory=dict)
    described: list[int] = field(default_factory=list)
    features: list[audit.Features] = field(default_factory=list)
    thumbnails: list[np.ndarray] = field(default_factory=list)

    def fault(self, i: int, kind: str, **facts: Any) -> Fault:
        label = self.classes[self.labels[i]] if self.labels[i] >= 0 else None
        return Fault(self.names[i], self.splits[i], kind, label=label, **facts)


def run(job: AuditJob, folder: Path, device: torch.device, log: Log) -> dict[str, Any]:
    """Writes `audit.csv` and `audit.png` into `folder`. Returns the JSON of `gz data audit` on rank 0, {} on
    others."""
    if ranks.rank():
        return {}
    began = time.monotonic()
    data = at_hand(locate(job.data), log.info)
    images = as_pictures(read(data, data.form, log.info))
    rows = chosen_places(images, job.n)
    with log.bar("images") as progress:
        survey = surveyed(images, rows, audit.describer(device), progress)
    faults, notes = faults_of(survey, device)
    if images.multilabel:
        notes.append("labels were not judged, because an image may have several")
    if len(rows) < sum(images.counts.values()):
        notes.append(f"{counted(len(rows), 'image')} of {sum(images.counts.values()):,}, drawn at random")
    write_csv(
        folder / "audit.csv",
        TABLE_COLUMNS,
        [tuple(asdict(fault)[key] for key in TABLE_COLUMNS) for fault in faults],
    )
    picture = folder / "audit.png" if draw(images, rows, survey, faults, folder / "audit.png") else None
    return {
        "data": data.reference,
        "images": len(rows),
        "counts": {kind: sum(fault.kind == kind for fault in faults) for kind in AUDIT_KINDS},
        "faults": [asdict(fault) for fault in faults],
        "notes": [*images.notes, *notes],
        "table": str(folder / "audit.csv"),
        "sheet": picture and str(picture),
        "seconds": time.monotonic() - began,
    }


# ---------------------------------------------------------------------------- reading


def as_pictures(images: RawImages) -> RawImages:
    """The images, those of other values as images of 8 bits."""
    return images if images.values is None else with_pictures(images, value_ranges(images))


def chosen_places(images: RawImages, n: int | None) -> dict[tuple[str, int], int]:
    """The images to audit, (split, number in it), and their positions: all, or n that are drawn at random."""
    every = [(split, i) for split in SPLITS for i in range(images.counts.get(split, 0))]
    chosen = np.sort(np.random.default_rng(0).permutation(len(every))[:n]).tolist()
    return {every[i]: position for position, i in enumerate(chosen)}


def members(
    images: RawImages, rows: Mapping[tuple[str, int], int], some: Collection[int] | None = None
) -> Iterator[tuple[int, str, Content | np.ndarray]]:
    """Position, name and content of each image, or of some: an encoded one, or uint8 [C, H, W]."""
    for split, start, data, name in images.blocks():
        for i in range(len(data) if isinstance(data, np.ndarray) else 1):
            position = rows.get((split, start + i))
            if position is not None and (some is None or position in some):
                yield position, name, data[i] if isinstance(data, np.ndarray) else data


def pixels_of(content: Content | np.ndarray, name: str) -> np.ndarray:
    """An image as RGB, uint8 [3, H, W]. Raises MissingError if it cannot be read."""
    if not isinstance(content, np.ndarray):
        if not bytes_in(content):
            raise MissingError(f"`{name}` is empty")
        return decode(content, name, Decoding(None, 3))[0]
    return np.ascontiguousarray(np.broadcast_to(content, (3, *content.shape[1:])))


def thumbnail_side(images: RawImages) -> int:
    """The side at which images are compared: that of a usual image, within limits."""
    if images.shape:
        usual = float(max(images.shape[1:]))
    else:
        sides = []
        for _, data in images.probe() if images.probe else ():
            try:
                sides.append(max(sides_of(data)))
            except Exception:  # as in `decode`; the survey names every one of them
                continue
        usual = float(np.median(sides)) if sides else audit.THUMBNAIL_SIDE
    return round(min(max(usual, audit.MIN_THUMBNAIL_SIDE), audit.THUMBNAIL_SIDE))


def surveyed(
    images: RawImages,
    rows: Mapping[tuple[str, int], int],
    describe: Callable[[np.ndarray], audit.Features],
    progress: Progress,
) -> Survey:
    """Reads all images once, and describes those that are neither blank nor copies of the same pixels."""
    from PIL import Image

    labels = {} if images.multilabel else images.labels
    survey = Survey(
        names=[images.names[split][i] if images.names else f"{split}/{i}" for split, i in rows],
        splits=[split for split, _ in rows],
        labels=np.array([labels[split][i] if split in labels else -1 for split, i in rows], np.int64),
        classes=images.classes,
        sides=np.zeros((len(rows), 2), np.int64),
    )
    side, first, inputs = thumbnail_side(images), dict[bytes, int](), list[np.ndarray]()
    shapes: tuple[tuple[str, int], ...] = (("RGB", audit.NETWORK_SIDE), ("L", side))

    def flush() -> None:
        if inputs:
            survey.features.append(describe(np.stack(inputs)))
            inputs.clear()

    for done, (position, name, content) in enumerate(members(images, rows)):
        progress(done, len(rows))
        try:
            pixels = pixels_of(content, name)
        except MissingError as e:
            survey.problems[position] = e.message
            continue
        survey.sides[position] = pixels.shape[:0:-1]
        if (np.ptp(pixels, axis=(1, 2)) <= BLANK_LEVELS).all():
            survey.blank.append(position)
            continue
        (digest,) = copies.hashes([pixels])
        survey.original[position] = first.setdefault(digest, position)
        if survey.original[position] == position:
            picture = picture_of(pixels.transpose(1, 2, 0))
            rgb, grey = (
                np.asarray(picture.convert(mode).resize((s, s), Image.Resampling.LANCZOS, reducing_gap=3.0))
                for mode, s in shapes
            )
            survey.described.append(position)
            survey.thumbnails.append(grey)
            inputs.append(rgb.transpose(2, 0, 1))
            if len(inputs) == BATCH_IMAGES:
                flush()
    flush()
    return survey


# ---------------------------------------------------------------------------- the faults


def faults_of(survey: Survey, device: torch.device) -> tuple[list[Fault], list[str]]:
    """The faults of a set by kind, the clearest first, and notes on what was not judged."""
    faults = [survey.fault(i, "unreadable", note=reason) for i, reason in sorted(survey.problems.items())]
    faults += [survey.fault(i, "blank") for i in sorted(survey.blank)]
    faults += odd_sizes(survey)
    n = len(survey.described)
    if n < audit.FEWEST_IMAGES:
        few = f"{counted(n, 'different image')} are too few to compare their features"
        return faults + copied(survey, None), [few]
    features = audit.Features.joined(survey.features)
    neighbourhood = audit.Neighbourhood.of(features, device)
    near = audit.near_copies(np.stack(survey.thumbnails), neighbourhood, device)
    faults += copied(survey, near)
    p, is_foreign = audit.foreign(neighbourhood)
    for i in np.flatnonzero(is_foreign)[np.argsort(p[is_foreign], kind="stable")].tolist():
        faults.append(survey.fault(survey.described[i], "foreign", score=float(p[i])))
    wrong, notes = mislabelled(survey, features, audit.groups(n, near.pairs), is_foreign)
    return faults + wrong, notes


def odd_sizes(survey: Survey) -> list[Fault]:
    """The images whose size differs from the usual one, or is far from those of nearly all images."""
    readable = np.flatnonzero(survey.sides[:, 0])
    if not len(readable):
        return []
    sides = survey.sides[readable]
    sizes, member, counts = np.unique(sides, axis=0, return_inverse=True, return_counts=True)
    odd, usual = member.ravel() != counts.argmax(), "×".join(map(str, sizes[counts.argmax()]))
    words = f"others are {usual}"
    if counts.max() < COMMON_SHARE * len(readable):
        shape = np.log(np.stack([sides.prod(1) ** 0.5, sides[:, 0] / sides[:, 1]], 1))
        low, high = np.quantile(shape, NEARLY_ALL, axis=0)
        odd = ((shape < low - np.log(ODD_FACTOR)) | (shape > high + np.log(ODD_FACTOR))).any(1)
        words = "unlike nearly all others"
    every = ((i, "×".join(map(str, survey.sides[i]))) for i in readable[odd].tolist())
    return [survey.fault(i, "size", note=f"{size}, {words}") for i, size in every]


def copied(survey: Survey, near: audit.Copies | None) -> list[Fault]:
    """Every image that shows the same as an earlier one, the clearest first."""
    faults, described = [], survey.described
    place = {position: i for i, position in enumerate(described)}
    n = len(described)
    group = np.arange(n) if near is None else audit.groups(n, near.pairs)
    source = np.full(n, n)  # of each group, the first image in the order of splits
    np.minimum.at(source, group, np.argsort(np.argsort(described)))
    in_order = sorted(described)
    links: dict[int, tuple[float, str]] = {}
    if near is not None:
        for k in np.argsort(near.agreement).tolist():  # the best link of an image is the last
            how = (
                "mirrored"
                if near.mirrored[k]
                else "moved"
                if np.abs(near.shift[k]).max() > MOVED_PIXELS
                else ""
            )
            for i in near.pairs[k].tolist():
                links[described[i]] = float(near.agreement[k]), how
    for position, twin in sorted(survey.original.items()):
        of = in_order[source[group[place[twin]]]]
        if position == of:
            continue
        score, how = links.get(position, (1.0, "")) if survey.original[of] != twin else (1.0, "same pixels")
        notes = [how] * bool(how)
        if survey.labels[position] != survey.labels[of]:
            notes.append(f"labelled `{survey.classes[survey.labels[of]]}` there")
        kind = "copy" if survey.splits[position] == survey.splits[of] else "split-copy"
        facts = {"score": score, "of": survey.names[of], "note": "; ".join(notes)}
        faults.append(survey.fault(position, kind, **facts))
    return sorted(faults, key=lambda fault: (fault.kind == "copy", -(fault.score or 0)))


def mislabelled(
    survey: Survey, features: audit.Features, group: np.ndarray, is_foreign: np.ndarray
) -> tuple[list[Fault], list[str]]:
    """The images whose label is probably wrong, the most certain first. Foreign images are not judged."""
    labels, notes = survey.labels[survey.described], list[str]()
    if not survey.classes:
        return [], notes
    counts = np.bincount(labels[labels >= 0], minlength=len(survey.classes))
    enough = counts >= audit.MIN_CLASS_IMAGES
    if few := int((~enough & (counts > 0)).sum()):
        least = audit.MIN_CLASS_IMAGES
        classes = "class" if few == 1 else "classes"
        notes.append(f"labels of {few:,} {classes} with fewer than {least} images were not judged")
    judged = np.flatnonzero((labels >= 0) & ~is_foreign & enough[labels])
    if enough.sum() < 2 or not len(judged):
        return [], notes
    numbers, y = np.unique(labels[judged], return_inverse=True)
    probabilities = audit.class_probabilities(features.some(judged), y, group[judged])
    odds, rival = audit.suspects(probabilities, y)
    order = np.argsort(-odds, kind="stable")
    return [
        survey.fault(
            survey.described[judged[i]],
            "label",
            score=float(1 / (1 + odds[i])),
            suggested=survey.classes[numbers[rival[i]]],
        )
        for i in order[odds[order] >= audit.LABEL_ODDS].tolist()
    ], notes


# ---------------------------------------------------------------------------- the sheet


def draw(
    images: RawImages,
    rows: Mapping[tuple[str, int], int],
    survey: Survey,
    faults: Sequence[Fault],
    file: Path,
) -> bool:
    """Draws the clearest faults of each kind that can be seen. Returns whether there are any."""
    shown = {kind: [fault for fault in faults if fault.kind == kind] for kind in AUDIT_KINDS[1:]}
    shown = {kind: some for kind, some in shown.items() if some}
    if not shown:
        return False
    position = {name: i for i, name in enumerate(survey.names)}
    names = {
        name for some in shown.values() for fault in some[:DRAWN_FAULTS] for name in (fault.file, fault.of)
    }
    wanted = {position[name] for name in names if name}
    cells = {}
    for i, name, content in members(images, rows, wanted):
        picture = picture_of(pixels_of(content, name).transpose(1, 2, 0))
        cells[survey.names[i]] = np.asarray(padded(picture, CELL_SIDE, CELL_SIDE)).transpose(2, 0, 1)
    blocks = [block_of(kind, some, cells) for kind, some in shown.items()]
    save_png(file, sheet(blocks, f"audit of {images.title} · {counted(len(rows), 'image')}"))
    return True


def block_of(kind: str, faults: Sequence[Fault], cells: Mapping[str, np.ndarray]) -> list[Row]:
    """The rows of the sheet for a kind of fault. Originals are below their copies."""
    block, some = [], faults[:DRAWN_FAULTS]
    count = f"{len(faults):,}, first {len(some)}" if len(some) < len(faults) else f"{len(faults)}"
    for start in range(0, len(some), FAULTS_PER_ROW):
        part = some[start : start + FAULTS_PER_ROW]
        words = [(fault.file, in_words(fault)) for fault in part]
        block.append(
            Row("" if start else f"{kind}: {count}", [cells[fault.file] for fault in part], under=words)
        )
        if originals := [fault.of for fault in part if fault.of]:
            block.append(
                Row("of", [cells[name] for name in originals], under=[(name,) for name in originals])
            )
    return block


def in_words(fault: Fault) -> str:
    if fault.kind == "label":
        return f"{fault.label} → {fault.suggested}"
    score = (
        ""
        if fault.score is None
        else f"p {fault.score:.2g}"
        if fault.kind == "foreign"
        else f"{fault.score:.2f}"
    )
    return fault.note.partition(",")[0] or score
