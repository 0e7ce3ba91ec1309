"""`gz bench`: trained models and other images compared on one data set, by image quality, likelihood, class
balance and speed."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gzcli.core import devices, ranks, streams
from gzcli.core.errors import MissingError, UsageError
from gzcli.core.units import counted
from gzcli.data.packs.open import open_pack
from gzcli.data.packs.pack import Pack, check_unchanged
from gzcli.engine.log import Log
from gzcli.engine.pictures import sample_rows, training_speed
from gzcli.engine.sampler import count_calls
from gzcli.engine.sheets import Row, sheet
from gzcli.engine.trained import Trained, load_trained
from gzcli.judge.contestants import (
    Contestant,
    common_form,
    read,
    sampled,
    tell_apart,
    varied,
)
from gzcli.judge.images import Pick, treatment
from gzcli.judge.likelihood import LIKELIHOOD_BATCH, likelihood
from gzcli.judge.real import ImageSet, RealImages, Space, Strata
from gzcli.metrics import networks, pretrained, standings
from gzcli.metrics.classifier import NetFeatures
from gzcli.metrics.features import lenet
from gzcli.metrics.interval import excess, mean_of_draws, subset
from gzcli.metrics.metric import FETCHED, Figures, Metric, column_of, metrics, one_distance
from gzcli.metrics.quality.fd import Moments, moments, to_moments
from gzcli.metrics.quality.neighbours import nearest_rows
from gzcli.metrics.second import second
from gzcli.metrics.selection import choose, omitted
from gzcli.models.nn.perceptual import LPIPS
from gzcli.store import cache_files, files
from gzcli.store.code import JUDGING, code_hash
from gzcli.store.jobs import BenchJob
from gzcli.store.paths import cache_dir
from gzcli.store.png import save_png
from gzcli.store.runs import Run

NEIGHBOUR_PAIRS = 16  # images per contestant on the sheet
COPIES_SHOWN = 10  # samples per contestant on the sheet of those closest to a training image
UNBIASED_FID_IMAGES = 10_000  # number of images below which FID is biased upwards
MAX_SEARCHED_IMAGES = 50_000  # maximum number of training images that are searched for copies
TIMES_DRAWN = 4  # networks of photographs read the whole bank up to so many times the size of a draw
LPIPS_SIDE = 16  # shortest side in pixels, as VGG16 halves it four times
GIVEN_LABELS = "columns with `|y` give log p(x | y), for the given label; do not compare them with log p(x)"
MEANS = "samples that are pixel means are compared with the grey images instead"
MARGINAL = "log p(x) of a conditional model is log Σ p(y) p(x | y), with p(y) from the training set"
# suffixes of a judge's name in the provenance → facts of the judge
JUDGE_FACTS = {"": "hash", "_accuracy": "accuracy", "_rotations": "rotations", "_alive": "alive"}
Remark = tuple[object, str]  # what it depends on, true or not, and its sentence
VERSIONS = ("gzcli", "torch", "torch-fidelity", "numpy", "scikit-learn")


def run(job: BenchJob, folder: Path, device: torch.device, log: Log) -> dict[str, Any]:
    """Writes samples, `bench.json` and `bench.png` into `folder`, and `neighbours.png` if `memory` is among
    the metrics. Only rank 0 compares and returns the JSON of `gz bench`; other ranks return {}. All runs must
    have the same image size and `fit`. Images from elsewhere are resized to match."""
    choose(job.metrics)
    variants = job.variants or ({},) * len(job.runs)
    models = []
    for path, variant in zip(job.runs, variants, strict=True):
        weights = variant.get("checkpoint", job.checkpoint)
        models.append(varied(load_trained(Run(Path(path)), device, weights, job.precision), variant))
    pack = open_pack(job.data, **common_form(models), say=log.info)
    for trained in models:
        check_unchanged(trained.run.owner.path, pack.meta)
    judge = Judge(pack, choose(job.metrics, pack.meta, job.split), job, device, log)
    contestants = [sampled(trained, pack, job, folder, log) for trained in models]
    for trained, entry, variant in zip(models, contestants, variants, strict=True):
        since = time.monotonic()
        entry.figures = judge.of_model(entry, sampler_only=bool(variant.get("quick")))
        if job.variants and not ranks.rank():
            entry.facts["calls"] = count_calls(trained)
        entry.facts["seconds"] = time.monotonic() - since + (entry.seconds or 0.0)
    contestants += [read(source, pack, common_form(models, pack), job.n, log) for source in job.images]
    tell_apart(contestants)
    rank, processes = ranks.rank(), ranks.world()
    judge.prepare(contestants)
    if rank:
        return {}
    with ranks.alone():
        return judge.compare_all(contestants, folder, processes)


def sampler_of(trained: Trained) -> dict[str, Any]:
    """The resolved options of the sampler, and the guidance scale."""
    options = dict(trained.part.sample)
    return options if trained.guidance is None else options | {"guidance": trained.guidance}


def refuse_photographs(chosen: Sequence[Metric], pack: Pack) -> None:
    """Raises UsageError for metrics of networks that were trained on photographs, if the images have other
    channels."""
    shown = [metric.name for metric in chosen if metric.features in (*FETCHED, "lite")]
    if shown and pack.meta.channels not in (1, 3):
        has = f"`{pack.meta.reference}` has {counted(pack.meta.channels, 'channel')}"
        message = f"`{shown[0]}` uses a network trained on photographs, but {has}"
        raise UsageError(message, hint="use `fd` or `swd`, which compare images of three channels")


def brief(values: Mapping[str, float]) -> str:
    return "   ".join(f"{k} {v:.4g}" for k, v in values.items() if k.startswith(("fd", "bpd", "nats")))


@dataclass
class Floor:
    """The metrics of real images instead of samples."""

    n: int  # of the samples
    images: int  # number of real images, which may be smaller
    drawn: str  # "random", or evenly by "label" or "cluster"
    figures: Figures = field(default_factory=dict)
    draws: dict[str, list[float]] = field(default_factory=dict)  # draws of each metric that has many
    levels: list[int | None] = field(default_factory=list)  # grey levels so far


class Judge:
    """The judge of a bench. It computes the chosen metrics of images, and of the models that drew them,
    against a data set's real images. It also computes the floor: the same metrics for real images instead of
    samples. Metrics read its attributes."""

    def __init__(self, pack: Pack, names: Sequence[str], job: BenchJob, device: torch.device, log: Log):
        self.metrics = [metrics()[name] for name in names]
        refuse_photographs(self.metrics, pack)
        if job.stats or job.export_stats:
            one_distance(self.metrics)  # refused before the networks are prepared
        self.pack, self.job, self.device, self.log, self.say = pack, job, device, log, log.info
        self.seed, self.named = job.seed, job.metrics is not None
        self.real = RealImages(pack, job.split, self.say)
        self.values = int(np.prod(pack.meta.shape))  # number of values of an image
        self.remembers = "memory" in names
        names_of_spaces = {metric.features for metric in self.metrics} - {"", "pixels"}
        if self.remembers:
            names_of_spaces.add("lite" if pack.meta.shape[0] == 3 and networks.is_installed() else "lenet")
        opened: dict[str, Callable[[], Space]] = {
            "inception": partial(pretrained.inception, job.weights, device),
            "lite": partial(pretrained.lite, device),
            "dinov2": partial(pretrained.dinov2, device),
            "clip": partial(pretrained.clip, device),
            "lenet": partial(lenet, pack, device=device, say=self.say),
            "second": partial(second, pack, device=device, say=self.say),
        }
        streams.change_spinner("preparing the feature networks")
        self.spaces = {name: space() for name, space in opened.items() if name in names_of_spaces}
        self.judges: dict[str, NetFeatures] = {
            name: space for name, space in self.spaces.items() if isinstance(space, NetFeatures)
        }
        self.leave_out_the_dead()
        self.large = self.spaces.keys() - self.judges.keys()
        self.lenet = self.living.get("lenet")
        self.memory_space = self.spaces.get("lite", self.lenet)
        if self.remembers and self.memory_space is None:
            self.remembers = False
            self.metrics = [metric for metric in self.metrics if metric.name != "memory"]
        # by number of images, and classes or clusters that are drawn evenly
        self.floors: dict[tuple[int, str], Floor] = {}
        self.first_draws: dict[tuple[int, int | None, str], tuple[ImageSet, ImageSet]] = {}
        # moments of other real images, for a Fréchet distance
        self.stats: tuple[Metric, Moments] | None = None
        self.stats_facts: dict[str, Any] | None = None
        if job.stats:
            metric = one_distance(self.metrics)
            statistics, self.stats_facts = read_statistics(Path(job.stats), metric, self.space_of(metric))
            self.stats = metric, statistics
        if "lpips" in names:
            self.lpips  # noqa: B018 -- absent weights are reported before the work

    def leave_out_the_dead(self) -> None:
        """Drops the metrics of judges that have not learned their classes. If no metrics were named, or none
        of the named ones compares images without these judges, those of the extra `features` replace them, if
        that is installed."""
        self.living = {name: judge for name, judge in self.judges.items() if judge.alive}
        if self.living.keys() == self.judges.keys():
            return
        dead = self.judges.keys() - self.living.keys()
        usable = [metric for metric in self.metrics if metric.features not in dead]
        enough = self.named and any(metric.compare for metric in usable)
        if not enough and networks.is_installed():
            self.spaces.setdefault("lite", pretrained.lite(self.device))
            usable += [
                metric for metric in metrics().values() if metric.default == "colour" and metric not in usable
            ]
        self.metrics = usable

    # ------------------------------------------------------------------------ what metrics read

    def space_of(self, metric: Metric) -> Space | None:
        return self.spaces.get(metric.features)

    @cached_property
    def train_images(self) -> ImageSet:
        return self.real.of("train").first(MAX_SEARCHED_IMAGES)

    @cached_property
    def lpips(self) -> LPIPS:
        _, height, width = self.pack.meta.shape
        if min(height, width) < LPIPS_SIDE:
            least, name = f"{LPIPS_SIDE}×{LPIPS_SIDE}", self.pack.meta.reference
            raise UsageError(
                f"LPIPS needs images of at least {least}, but those of `{name}` are {width}×{height}"
            )
        return LPIPS.from_files().eval().requires_grad_(False).to(self.device)

    def test_images(self, trained: Trained, n: int, size: int | None = None) -> Pick:
        index = subset(self.pack.meta.counts["test"], n)
        size = size or devices.batch_of(LIKELIHOOD_BATCH, trained.device)
        return Pick(self.pack, "test", index).batches(trained, size=size, seed=self.seed)

    def likelihood(self, trained: Trained) -> dict[str, Any]:
        most = self.job.likelihoods
        return likelihood(trained, self.test_images, self.pack, self.seed, self.log, most=most)

    def training_speed(self, trained: Trained) -> dict[str, float]:
        return training_speed(trained.run.path)

    def mark(self, levels: int | None) -> str:
        """The suffix of metrics at other grey levels than the data set's, such as `@32`."""
        return "" if levels in (None, self.pack.meta.levels) else f"@{levels}"

    # ------------------------------------------------------------------------ metrics

    def compared(
        self, images: ImageSet, real: ImageSet, chosen: Sequence[Metric], *, intervals: bool = True
    ) -> Figures:
        figures: Figures = {}
        for metric in chosen:
            if metric.compare is None and metric.within is None:
                continue
            fake = images.features(space := self.space_of(metric))
            if self.stats and metric is self.stats[0]:
                figures |= to_moments(*self.stats, fake)
            elif metric.compare:
                figures |= metric.compare(fake, real.features(space), intervals)
            elif metric.within and not (net := self.judges[metric.features]).rotations:
                sides = fake, real.features(space)
                of_fake, of_real = (net.logits_of(side).argmax(1) for side in sides)
                figures |= metric.within(*sides, of_fake, of_real, intervals)
        figures = {self._named(name): value for name, value in figures.items()}
        return figures | self._of_images(images, "draws", chosen=chosen)

    def of_model(self, contestant: Contestant, *, sampler_only: bool) -> Figures:
        """The metrics of a contestant's model itself, such as its likelihood; only rank 0 gets them. Every
        rank must call it."""
        figures: Figures = {}
        for metric in self.metrics:
            applies = (metric.distributed or not ranks.rank()) and (metric.of_sampler or not sampler_only)
            if metric.of_model and applies:
                figures |= metric.of_model(self, contestant)
        return figures

    def _of_images(self, images: ImageSet, *floors: str, chosen: Sequence[Metric] | None = None) -> Figures:
        figures: Figures = {}
        for metric in self.metrics if chosen is None else chosen:
            if metric.of_images and metric.floor in floors:
                figures |= metric.of_images(self, images)
        return figures

    def _marked(self, figures: Figures, levels: int | None) -> Figures:
        return {name + self.mark(levels): value for name, value in figures.items()}

    def _named(self, name: str) -> str:
        """The metric's name, with the suffix `_rot` if its LeNet was trained to classify rotations."""
        of_lenet = name in ("fd", "fd_inf") or name.endswith("_lenet")
        rotated = of_lenet and self.lenet and self.lenet.rotations
        return f"{name.removesuffix('_lenet')}_rot" if rotated else name

    # ------------------------------------------------------------------------ the floor

    def floor(self, entry: Contestant) -> Floor:
        """The metrics of real images that are sampled like a contestant's. They use the grey levels of all
        earlier contestants that were sampled in the same way."""
        n, strata, levels = len(entry), entry.strata, entry.levels
        key = n, entry.layout
        if key not in self.floors:
            images, drawn = min(n, self.real.at_most), strata.name if strata else "random"
            self.floors[key] = floor = Floor(n, images, drawn)
            for split in ("test", "train"):
                if any(metric.of_images and metric.floor == split for metric in self.metrics):
                    floor.figures |= self._of_images(self.real.of(split).first(n), split)
        floor = self.floors[key]
        if levels not in floor.levels:
            floor.levels.append(levels)
            dear = [metric for metric in self.metrics if not metric.cheap]
            single = self.compared(*self.first_draw(entry), dear) if dear else {}
            draws = self._draws(floor.images, levels, strata)
            if min(map(len, draws.values()), default=0) < 2:
                cheap = [metric for metric in self.metrics if metric.cheap]
                draws, single = {}, single | self.compared(*self.first_draw(entry), cheap)
            means = {name: mean_of_draws(v, signed=column_of(name).signed) for name, v in draws.items()}
            floor.figures |= self._marked(single | means, levels)
            floor.draws |= {name + self.mark(levels): values for name, values in draws.items()}
        return floor

    def first_draw(self, entry: Contestant) -> tuple[ImageSet, ImageSet]:
        key = len(entry), entry.levels, entry.layout
        if key not in self.first_draws:
            n = min(len(entry), self.real.at_most)
            self.first_draws[key] = next(self.real.draws(n, entry.levels, entry.strata))
        return self.first_draws[key]

    def _draws(self, n: int, levels: int | None, strata: Strata | None) -> dict[str, list[float]]:
        """The cheap metrics of many draws of n real images. They are cached, because every run of a league
        needs them and large draws take minutes."""
        cheap = [metric for metric in self.metrics if metric.cheap]
        nets = [judge.hash for judge in self.living.values()]
        of = strata and [strata.name, strata.key, strata.shares.tolist()]
        names = [metric.name for metric in cheap]
        real = [self.real.bank(n, levels).key, len(self.real.reference(levels))]
        terms = [code_hash(*JUDGING), *real, n, nets, of, names]
        digest = hashlib.sha256(json.dumps(terms).encode()).hexdigest()[:16]
        path = cache_dir("features", "floors") / f"{digest}.json"
        read = partial(read_draws, terms=terms)
        if not self.stats and (cached := cache_files.read(path, read, self.say)):
            return cached
        pairs = self.real.draws(n, levels, strata)
        drawn = [self.compared(fake, real, cheap, intervals=False) for fake, real in pairs]
        draws = {name: [figures[name].value for figures in drawn] for name in drawn[0]}
        if not self.stats:
            cache_files.write(path, files.write_json, {"terms": terms, "draws": draws}, self.say)
        return draws

    # ------------------------------------------------------------------------ features

    def prepare(self, contestants: Sequence[Contestant]) -> None:
        """Computes the features of the contestants' images and of the real ones; each process computes a
        share. Every rank must call it."""
        memory = [self.memory_space] if self.remembers else []
        for images in (self.train_images, self.real.of("test")) if memory else ():
            self._compute("the data set", images, memory)
        compared = [metric for metric in self.metrics if metric.compare or metric.within]
        spaces = [self.space_of(metric) for metric in compared]
        for entry in {entry.name: entry for entry in contestants}.values():
            self._compute(f"`{entry.name}`", entry.images, [*spaces, *memory])
        # with `--stats`, the real images of that metric are known by their moments alone
        of_real = [self.space_of(m) for m in compared if not self.stats or m is not self.stats[0]]
        for levels in sorted({entry.levels for entry in contestants}, key=str):
            self._compute("the data set", self.real.reference(levels), of_real)
            for entry in contestants:
                n = min(len(entry), self.real.at_most)
                bank = self.real.bank(n, levels)
                # models of a league share the features of a small bank
                of_bank = spaces if len(bank) <= TIMES_DRAWN * n else list(self.living.values())
                self._compute("the floor", bank, of_bank)
                if self.large and entry.levels == levels:
                    fake, real = self.first_draw(entry)
                    self._compute("the floor", fake, spaces)
                    self._compute("the data set", real, of_real)

    def _compute(self, name: str, images: ImageSet, spaces: Sequence[Space | None]) -> None:
        work = f"features of {len(images):,} images of {name}"
        if self.large and not all(space is None or images.knows(space) for space in spaces):
            self.say(work)
        since = time.monotonic()
        for space in spaces:
            if space is not None:
                images.features(space)
        if (seconds := time.monotonic() - since) >= 1:
            by = f" on {ranks.world()} processes" if ranks.world() > 1 else ""
            self.say(f"{work}: {seconds:.1f} s{by}")

    # ------------------------------------------------------------------------ the result

    def compare_all(self, contestants: Sequence[Contestant], folder: Path, processes: int) -> dict[str, Any]:
        """Writes the files of `gz bench` and returns its JSON."""
        rows, lines, meta = [], [], self.pack.meta
        for entry in contestants:
            rows.append(self.row_of(entry))
            figures, images = brief(rows[-1]["metrics"]), entry.images.images
            if figures:
                self.say(f"{entry.name}: {figures}")
            # images in a folder are often ordered by class
            n, rng = len(images), np.random.default_rng(0)
            order = np.arange(n) if entry.trained else rng.permutation(n)
            lines.append((f"{entry.name}   {figures}", images[order[:NEIGHBOUR_PAIRS]]))
        floors = sorted(self.floors.values(), key=lambda floor: -floor.n)
        if self.job.export_stats:
            self.write_stats(Path(self.job.export_stats))
        picture, neighbours = folder / "bench.png", folder / "neighbours.png"
        real = self.real.reference(None).images
        of_real = brief({f"{name} (floor)": value.value for name, value in floors[0].figures.items()})
        title = f"real images of {meta.name}   {of_real}"
        sample_rows(picture, [*lines, (title, real[subset(len(real), NEIGHBOUR_PAIRS)])])
        if self.remembers:
            save_png(neighbours, self.copies(contestants))
        every = [*(row["metrics"] for row in rows), *(floor.figures for floor in floors)]
        result = {
            "data": meta.name,
            "rows": rows,
            **json_figures("floor", floors[0].figures),
            "floors": [
                {"n": floor.n, "images": floor.images, "drawn": floor.drawn, "draws": floor.draws}
                | json_figures("metrics", floor.figures)
                for floor in floors
            ],
            "directions": {name: column_of(name).better for part in every for name in part},
            "biased": {str(floor.n): self.biased(floor.n) for floor in floors},
            "provenance": self.provenance(processes),
            "notes": self.notes(contestants, rows, floors),
            "picture": str(picture),
            "neighbours": str(neighbours) if self.remembers else None,
            "stats": self.job.export_stats,
        }
        result |= standings.two_judges(rows, self.job.metrics, result["directions"])
        files.write_json(Run(folder).bench_file, result)
        return result

    def row_of(self, entry: Contestant) -> dict[str, Any]:
        since, trained, images, levels = time.monotonic(), entry.trained, entry.images, entry.levels
        figures = self._marked(self.compared(images, self.real.reference(levels), self.metrics), levels)
        figures |= self._of_images(images, "test", "train") | entry.figures
        floor = self.floor(entry)
        row: dict[str, Any] = {"name": entry.name, "model": None, "run": None, "step": None, "params": None}
        if trained:
            row |= {"model": trained.name, "run": trained.run.owner.id, "step": trained.step}
            row["params"] = sum(p.numel() for p in trained.model.parameters())
            row |= trained.run.owner.training
        return {
            **row,
            "path": entry.path,
            "samples": entry.file,
            "n": len(entry),
            **json_figures("metrics", figures),
            "drawn": floor.drawn,
            "floor": {name: value.value for name, value in floor.figures.items()},
            "excess": self.excesses(figures, floor),
            "title": trained.title_of_samples if trained else entry.name,
            "sample": sampler_of(trained) if trained else {},
            "precision": trained.precision if trained else None,
            "conditional": entry.images.labels is not None,
            "levels": levels,
            **entry.facts,
            "seconds": round(entry.facts.get("seconds", 0.0) + time.monotonic() - since, 1),
        }

    def excesses(self, figures: Figures, floor: Floor) -> dict[str, list[float | None]]:
        """The excess of each metric over its floor (positive is worse), with its interval."""
        differences = {
            name: excess(figure, floor.figures[name], way)
            for name, figure in figures.items()
            if name in floor.figures and (way := column_of(name).better)
        }
        return {name: [figure.value, figure.low, figure.high] for name, figure in differences.items()}

    def copies(self, contestants: Sequence[Contestant]) -> np.ndarray:
        """A sheet of the samples and test images that are closest to a training image. Below each are its
        neighbours by features and by pixels."""
        train, space, blocks = self.train_images, self.memory_space, []
        sets = {entry.name: entry.images for entry in contestants} | {"test images": self.real.of("test")}
        for name, images in sets.items():
            distances, places = nearest_rows(images.features(space), train.features(space))
            rows = np.argsort(distances[:, 0], kind="stable")[:COPIES_SHOWN]
            samples = np.asarray(images.images[np.sort(rows)])[np.argsort(np.argsort(rows))]
            by_pixels = nearest_rows(samples, np.asarray(train.images[:]))[1][:, 0]
            neighbours = {"nearest by features": places[rows, 0], "nearest by pixels": by_pixels}
            of_train = [
                Row(kind, [train.images[int(i)] for i in index]) for kind, index in neighbours.items()
            ]
            blocks.append([Row(name, list(samples)), *of_train])
        return sheet(blocks)

    def biased(self, n: int) -> list[str]:
        """The raw Fréchet distances whose number of samples n is less than twice the number of features."""
        least = min(n, len(self.real.reference(None)))
        return [
            self._named(metric.name) for metric in self.metrics if metric.width and least < 2 * metric.width
        ]

    def notes(
        self, contestants: Sequence[Contestant], rows: Sequence[Mapping[str, Any]], floors: Sequence[Floor]
    ) -> list[str]:
        """Notes on metrics that could be misread."""
        install = "" if "lite" in self.spaces else "; for others, install `gzcli[features]`"
        dead = [judge.is_dead(name) for name, judge in self.judges.items() if name not in self.living]
        sizes = list(dict.fromkeys(floor.n for floor in floors))
        binary = any(entry.trained and entry.trained.images.levels == 2 for entry in contestants)
        lines = omitted(self.job.metrics, self.pack.meta, self.job.split)
        lines += [f"{judge}: its metrics are omitted{install}" for judge in dead]
        lines += [text for n in sizes for when, text in self.remarks_on_size(n) if when]
        lines += treatment({self.pack.meta.reference: self.pack}, 2 if binary else None, but=MEANS)
        lines += [note for entry in contestants for note in entry.notes]
        lines += [text for when, text in self.remarks_on_values(rows, sizes) if when]
        lines += [text for when, text in self.remarks_on_images(contestants, rows, floors) if when]
        return list(dict.fromkeys(lines))

    def remarks_on_size(self, n: int) -> list[Remark]:
        """Remarks on contestants with n images."""
        biased = self.biased(n)
        reason = "with fewer images than twice the features, a raw Fréchet distance depends more on n than on"
        fid = not biased and n < UNBIASED_FID_IMAGES and "fid" in {metric.name for metric in self.metrics}
        return [
            (biased, f"`{'~`, `'.join(biased)}~`: {reason} quality; use `kid…` or `…_pca`"),
            (fid, f"FID of {n} images is biased upwards: compare it only at the same n, or use `kid`"),
        ]

    def remarks_on_values(self, rows: Sequence[Mapping[str, Any]], sizes: Sequence[int]) -> list[Remark]:
        counts = ", ".join(f"{n:,}" for n in sizes)
        values = [(row["name"], name, value) for row in rows for name, value in row["metrics"].items()]
        infinite = [f"`{name}` of `{title}`" for title, name, value in values if not np.isfinite(value)]
        negative = dict.fromkeys(name for _, name, value in values if value < 0)
        below = [name for name in negative if column_of(name).signed]
        several = f"the contestants have {counts} images: compare each with the floor for the same number"
        zero = f"`{'`, `'.join(below)}` below 0: the samples cannot be distinguished from real images"
        return [
            (len(sizes) > 1, several),
            (infinite, f"not finite, so not ranked: {', '.join(infinite)}"),
            (below, zero),
        ]

    def remarks_on_images(
        self, contestants: Sequence[Contestant], rows: Sequence[Mapping[str, Any]], floors: Sequence[Floor]
    ) -> list[Remark]:
        file = (self.stats_facts or {}).get("file")
        distance = f"`{self.stats[0].name}`" if self.stats else ""
        unlabelled = [entry.name for entry in contestants if entry.images.labels is None]
        worth = unlabelled and any(metric.name == "worth" for metric in self.metrics)
        likelihoods = [row["likelihood"] for row in rows if "likelihood" in row]
        few = "real images, because there are no more"
        pairs = dict.fromkeys((floor.n, floor.images) for floor in floors)
        return [
            (file, f"{distance} is the distance to the mean and covariance in `{file}`"),
            *((m < n, f"the floor for {n:,} samples uses only {m:,} {few}") for n, m in pairs),
            (worth, f"`worth` needs labels and is omitted for `{'`, `'.join(unlabelled)}`"),
            (any(each["given_labels"] for each in likelihoods), GIVEN_LABELS),
            (any(each["marginal"] for each in likelihoods), MARGINAL),
        ]

    def provenance(self, processes: int) -> dict[str, Any]:
        meta, job, floors = self.pack.meta, self.job, list(self.floors.values())
        of_judges = {
            {"lenet": "features"}.get(name, name) + mark: getattr(judge, fact)
            for name, judge in self.judges.items()
            for mark, fact in JUDGE_FACTS.items()
        }
        return {
            "n_real": len(self.real.reference(None)),
            "n_fake": job.n,
            "split": job.split,
            "shape": list(meta.shape),
            "levels": meta.levels,
            "resized": meta.resized,
            "digest": meta.digest,
            "seed": job.seed,
            "checkpoint": job.checkpoint,
            "processes": processes,
            **dict.fromkeys(("features", "lite", "inception")),
            **of_judges,
            **{name: self.spaces[name].hash for name in self.large},
            "stats": self.stats_facts,
            "floor_draws": max(floors, key=lambda floor: floor.n).draws if floors else {},
            "versions": {name: version(name) for name in VERSIONS},
        }

    # ------------------------------------------------------------------------ statistics of real images

    def write_stats(self, path: Path) -> None:
        """Writes `mu` and `sigma` of the real images as pytorch-fid and clean-fid read them."""
        metric = one_distance(self.metrics)
        space = self.space_of(metric)
        features = self.real.reference(None).features(space)[:, : metric.width]
        real, name = moments(features), np.array(space.hash if space else "")
        arrays = {"mu": real.mean, "sigma": real.covariance, "n": np.array(len(features)), "features": name}
        files.write_arrays(path, arrays)


def read_draws(path: Path, terms: Sequence[Any]) -> dict[str, list[float]]:
    """The metrics of a floor's draws, from a file of the cache. Raises an error if they were drawn on other
    terms."""
    tree = files.read_object(path)
    draws = {name: list(map(float, values)) for name, values in tree["draws"].items()}
    if tree["terms"] != terms or not np.isfinite([*draws.values()]).all():
        raise ValueError("these are not the draws of the set")
    return draws


def read_statistics(path: Path, metric: Metric, space: Space | None) -> tuple[Moments, dict[str, Any]]:
    """`mu` and `sigma` from an npz file, and the file's path, number of images and features. Raises
    UsageError for another kind of file, or for other features."""
    width = metric.width
    try:
        arrays = files.read_arrays(path, "mu", "sigma")
        with files.reading(path):
            mu, sigma = (np.asarray(arrays[name], np.float64) for name in ("mu", "sigma"))
            n = int(arrays["n"]) if "n" in arrays else None
            if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
                raise ValueError("it contains numbers that are not finite")
    except MissingError as e:
        hint = "give an npz file with the arrays `mu` and `sigma`"
        raise UsageError(f"the statistics cannot be read: {e.message}", hint=hint) from e
    if mu.shape != (width,) or sigma.shape != (width, width):
        shapes = f"`mu` of shape {mu.shape} and `sigma` of {sigma.shape}"
        raise UsageError(f"`{path}` has {shapes}, but `{metric.name}` has {width} features")
    features = str(arrays["features"]) if "features" in arrays else None
    if features and space and features != space.hash:
        hashes = f"({features[:8]}, not {space.hash[:8]})"
        hint = "use the same `--data`, as each data set has its own LeNet, or compare by `fid`"
        raise UsageError(
            f"`{path}` was computed with a different network from that of `{metric.name}` {hashes}", hint=hint
        )
    return Moments(mu, sigma), {"file": str(path), "n": n, "features": features}


def json_figures(name: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    """For JSON: metrics under a name, and their intervals under `intervals` or `NAME_intervals`."""
    ends = {key: [value.low, value.high] for key, value in figures.items() if value.low is not None}
    intervals = "intervals" if name == "metrics" else f"{name}_intervals"
    return {name: {key: value.value for key, value in figures.items()}, intervals: ends}
