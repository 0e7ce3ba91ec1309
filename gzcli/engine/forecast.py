"""The cost of a recipe's training step: floating-point operations, counted on tensors without values, and
time and memory of a real step on this machine. Also the time of a sample, of a likelihood and of scores.

The images are noise, so the data set is not read. Without values, a net of a billion parameters takes no
memory, and no weights are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from gzcli.core import devices, ranks
from gzcli.core.errors import GzError, MissingError, UsageError, first_line
from gzcli.core.sections import Part, part_of
from gzcli.core.types import Batch, BatchNoise, DataInfo, ImageNoise, Noise, silent
from gzcli.data.packs.open import open_pack, pack_options
from gzcli.engine.ema import EMA, LENGTHS
from gzcli.engine.log import Log, Speed
from gzcli.engine.prepared import on_latents, with_prepared
from gzcli.engine.sampler import NoneFinite, batch_size, calls_in, count_calls, draw
from gzcli.engine.step import RecordedNoise, Step, precision, prepare_torch, shapes_only, without_values
from gzcli.engine.trained import Trained, build_model, to_device
from gzcli.engine.updates import Alone, Updates
from gzcli.metrics.alarms.methods import LOCAL
from gzcli.metrics.likelihood_scores import SCORES
from gzcli.models import catalog
from gzcli.models.base import Model, flat_defaults, group_options
from gzcli.models.nn import full_fp32
from gzcli.store.jobs import IMAGE_COSTS, SCORE_COSTS, TrialJob
from gzcli.store.runs import Run

if TYPE_CHECKING:
    from accelerate import Accelerator

PREPARING = ("pair_steps",)  # options of `prepare` that do not affect a step, so it is kept short here
# Steps of a run whose operations are not worth being counted, which takes a second: demonstrations of a
# minute, on the embedded sets, have so few.
MAX_SHORT_STEPS = 1_500
FALLBACK_TRIAL_IMAGES = 4  # images of a step whose operations are unknown
ENOUGH_TIMED_SECONDS = 1.0  # seconds after which no further step is timed
MIN_TIMED_STEPS, MAX_TIMED_STEPS = 2, 12  # steps that are timed: at least, and if steps are short
TIMED_SAMPLES = 20  # images of a sample that is timed on a CPU
SLOW_IMAGE_SECONDS = 0.5  # seconds of an image above which it is not timed again
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_aten = torch.ops.aten
NO_KERNEL = {_aten.detach, _aten._unsafe_view, _aten.empty, _aten.empty_like, _aten.empty_strided}
MAX_CPU_TRIAL_PARAMETERS = (
    100_000_000  # parameters above which a net is not tried on a CPU, because that takes long
)


class Work(NamedTuple):
    """The work of a step of the global batch."""

    flops: float  # floating-point operations, on all processes
    kernels: float  # kernels that a process launches one after another


class PartOnData(NamedTuple):
    """A part of a recipe, and the description of the images or latents that its model sees."""

    part: Part
    info: DataInfo


Stages = Mapping[str, PartOnData]  # earlier stages by their names


def run(job: TrialJob, folder: Path, device: torch.device, log: Log) -> dict[str, Any]:
    """{"parts": […]}: for each part, the `params`, `flops` and `kernels` of a step. If a step is tried, also
    its `seconds` and `bytes`; for a part that draws, the result of `try_drawing`, and for one that scores, of
    `try_scoring`. A failed attempt has an `error`, and a mistake in the recipe its hint as `refused`."""
    results = []
    for row in job.parts:
        result: dict[str, Any] = {"timed": row["timed"], "error": None}
        of_step = ("params", *Work._fields, "seconds", "bytes")
        scores, kinds = row.get("scores", ()), row.get("draws", ())
        result |= dict.fromkeys(SCORE_COSTS if scores else IMAGE_COSTS if kinds else of_step)
        try:
            stages = {name: on_data(part_of(tree, name), job.info) for name, tree in row["stages"].items()}
            part, info = on_data(part_of(row["tree"], row["stage"]), job.info)
            if scores or kinds:
                trained = untrained(part, info, stages, device, Run(folder))
                result |= try_scoring(trained, scores) if scores else try_drawing(trained, kinds)
                continue
            result["params"] = params_of(part, info, stages)
            if work := work_of(part, info, stages):
                result |= work._asdict()
            if row["timed"] and not (device.type == "cpu" and result["params"] > MAX_CPU_TRIAL_PARAMETERS):
                result |= try_step(part, info, stages, result["flops"], device)
        except GzError as e:
            result["error"] = e.message
            result["missing"] = isinstance(e, MissingError)  # then the result is not stored
            if isinstance(e, UsageError):
                result["refused"] = e.hint or ""
        except Exception as e:  # a user's model may do anything, and a net may not fit into memory
            result["error"] = f"{type(e).__name__}: {first_line(e)}"
        finally:
            results.append(result)
    return {"parts": results}


def on_data(part: Part, tree: Mapping[str, Any]) -> PartOnData:
    """A part with the description of its model's input, for the data set of `TrialJob.info`."""
    shape, levels = tuple(tree["shape"]), part.data.levels or tree["levels"]
    info = DataInfo(shape, levels, tuple(tree["classes"]), tree["multilabel"], tree["n"], part.train.steps)
    return PartOnData(part, on_latents(part, info))


def build(part: Part, info: DataInfo, stages: Stages) -> Model:
    """The model, in training mode, built on freshly initialised earlier stages."""
    names = catalog.card(part.model).stages
    stage_models = {name: build(*stages[name], stages).eval().requires_grad_(False) for name in names}
    short = {key: 1 for key in PREPARING if key in part.options}
    return build_model(replace(part, options={**part.options, **short}), info, stage_models).train()


def check_stages(run: Run) -> None:
    """Builds the models of all stages of a run, so that a wrong option is reported before any stage is
    trained. A stage that cannot be built for another reason ends the check."""
    stages: dict[str, PartOnData] = {}
    for stage in run.stages:
        part = part_of(stage.tree())
        try:
            pack = open_pack(part.data.name, **pack_options(part.data))
            seen = pack.seen(part.data.levels)
            info = on_latents(part, seen.info(levels=part.data.levels, steps=part.train.steps))
            with shapes_only():
                build(part, info, stages)
        except UsageError:
            raise
        except Exception:  # a user's model may do anything with a net without values
            return
        stages[stage.path.name] = PartOnData(part, info)


def params_of(part: Part, info: DataInfo, stages: Stages) -> int:
    """The number of parameters of a model. Raises the model's errors for invalid options."""
    with torch.device("meta"):
        return sum(p.numel() for p in build(part, info, stages).parameters())


def work_of(part: Part, info: DataInfo, stages: Stages | None = None) -> Work | None:
    """The work of a step of the global batch; None if the model needs values."""
    try:
        with shapes_only():
            noise = RecordedNoise(part.train.batch_size, torch.zeros((), dtype=torch.int64))
            model = build(part, info, stages or {})
            return count_work(model, batch_of(model, micro_batch(part), noise), part)
    except MissingError:  # an optional package
        raise
    except Exception:  # errors of a model, or its library, with tensors without values
        return None


def count_work(model: Model, batch: Batch, part: Part) -> Work:
    """The work of a step over the global batch, counted with a model and a micro-batch without values."""
    with Counter() as counter:
        loss, update = Trial(model, part, batch, real=False).step(counter.read)
    flops, kernels = loss * np.array([pieces_of(part), part.train.accumulate]) + update
    return Work(float(flops), float(kernels))


class Counter(TorchDispatchMode):
    """Counts floating-point operations, by torch's formulas, and the number of kernels. Unlike
    FlopCounterMode it supports gradients of gradients and the attention of CPUs."""

    flops, kernels = 0.0, 0

    def read(self) -> Any:
        return np.array([self.flops, self.kernels])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.kernels += not (func.is_view or func._overloadpacket in NO_KERNEL)
        if func._overloadpacket is _flash:
            self.flops += sdpa_flop_count(*(t.shape for t in args[:3]))
        elif func._overloadpacket is _flash_backward:
            self.flops += sdpa_backward_flop_count(*(t.shape for t in args[:4]))
        elif count := flop_registry.get(func._overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out


def pieces_of(part: Part) -> int:
    """The micro-batches of a batch, over all processes."""
    gpus = part.launch.gpus if isinstance(part.launch.gpus, int) else None
    return max(1, part.launch.processes or gpus or 1) * part.train.accumulate


def micro_batch(part: Part) -> int:
    """The number of images that a process computes at once."""
    return max(1, part.train.batch_size // pieces_of(part))


def batch_of(model: Model, images: int, noise: RecordedNoise | BatchNoise) -> Batch:
    """A batch of noise, with everything that the model needs besides the images."""
    info, device = model.data, noise.device
    x = torch.rand(images, *info.shape, device=device) * 2 - 1
    labels = (images, len(info.classes)) if info.multilabel else (images,)
    y = torch.zeros(labels, dtype=torch.int64, device=device) if info.classes else None
    extra = {key: ["an image"] * images if key == "caption" else x.clone() for key in model.needs}
    with torch.no_grad():
        return with_prepared(model, Batch(x, y, torch.arange(images, device=device), noise, extra))


class Trial(Updates):
    """Steps of a model, as the trainer takes them, on one micro-batch. `real`: whether tensors have values.
    Without values, the only updates that are run are those of Muon, because others cost next to nothing."""

    def __init__(self, model: Model, part: Part, batch: Batch, *, real: bool = True):
        kind = precision(part) if real else "fp32"
        alone = Alone(batch.x.device, devices.half(kind))
        super().__init__(model, part, alone, Step(model), kind)
        self.batch, self.parts, self.real = batch, 1, real
        lengths = LENGTHS if real and part.train.ema_snapshots else ()
        self.ema = EMA(model, part.train.ema if real else 0, lengths=lengths)

    def noise(self, step: int, key: str, start: int) -> Noise:
        return self.batch.noise

    def step(self, read: Callable[[], Any]) -> tuple[Any, Any]:
        """Runs every phase once. Returns the increments of the counter `read` for losses with gradients, and
        for updates. Each phase is weighted by its share of the run's steps."""
        loss, update, steps = 0.0, 0.0, self.steps
        start = read()
        batch = self.batch.rows(slice(None), self.batch.noise)
        self.extend(batch, 0)
        loss += read() - start
        for phase in self.phases:
            self.only(phase)
            start = read()
            with self.accelerator.autocast():
                self.backward(batch, 0, phase)
            middle = read()
            if self.real or self.settings[phase.name].name == "muon":
                self.update(0, phase)
            share = max(0, steps - phase.start) / steps / phase.every
            loss, update = loss + share * (middle - start), update + share * (read() - middle)
            for p in self.trainable:
                p.grad = None
        start = read()
        self.ema.update()
        return loss, update + read() - start


def try_step(
    part: Part, info: DataInfo, stages: Stages, flops: float | None, device: torch.device
) -> dict[str, Any]:
    """The `seconds` and `bytes` of a step of the global batch, extrapolated from a step of few images. As
    long as that runs out of GPU memory, the number of images is halved."""
    prepare_torch(part)
    share = micro_batch(part)
    batch = share * pieces_of(part)
    enough = math.ceil(devices.device_kind(device).flops * batch / flops) if flops else FALLBACK_TRIAL_IMAGES
    images = max(1, min(share, enough))
    while True:
        try:
            model = build(part, info, stages).to(device)
            noise = BatchNoise(part.seed, 0, "batch", total=images, device=device)
            trial = Trial(model, part, batch_of(model, images, noise))
            with torch.no_grad():
                model.on_start(trial.batch)
            return measure_steps(trial, share / images, device)
        except torch.OutOfMemoryError:
            if images <= 1:
                raise
            images //= 2


def measure_steps(trial: Trial, times: float, device: torch.device) -> dict[str, Any]:
    """The `seconds` and `bytes` of a step whose micro-batch has `times` the images of the trial. The fastest
    of several steps counts, because delays beyond it are not the model's."""
    # of one thread on a CPU its work is timed, so that other programs on the machine do not count
    clock = partial(devices.clock, device, "cpu" if torch.get_num_threads() == 1 else "wall")
    before = devices.memory_now(device)
    trial.step(clock)
    states = [item for optimizer in trial.optimizers.values() for item in optimizer.state.items()]
    tensors = [t for p, values in states for t in (p, *values.values())]  # the gradient is as large as p
    state = sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
    peak, since = devices.peak_memory(device), devices.clock(device)
    steps: list[tuple[float, float]] = []
    while len(steps) < MIN_TIMED_STEPS or (
        len(steps) < MAX_TIMED_STEPS and devices.clock(device) - since < ENOUGH_TIMED_SECONDS
    ):
        steps.append(trial.step(clock))
    loss, update = (min(values) for values in zip(*steps, strict=True))
    size = None if peak is None else round(before + state + max(0, peak - before - state) * times)
    return {"seconds": loss * times * trial.part.train.accumulate + update, "bytes": size}


def untrained(part: Part, info: DataInfo, stages: Stages, device: torch.device, run: Run) -> Trained:
    prepare_torch(part)
    model = to_device(build(part, info, stages), device).eval().requires_grad_(False)
    return Trained(run, model, info, part, device, 0)


def try_drawing(trained: Trained, kinds: Sequence[str]) -> dict[str, Any]:
    """The cost of an image for an untrained model. `sample_seconds` and the network `calls` are those of the
    recipe's sampler. For likelihoods of these kinds, there are also `log_prob_seconds` and the number of
    `classes` for which it may be computed."""
    model, info, device = trained.model, trained.info, trained.device
    result: dict[str, Any] = {"sample_seconds": sample_seconds(trained), "calls": count_calls(trained)}
    if model.likelihood in kinds and trained.has_levels:
        y = torch.zeros(TIMED_SAMPLES, dtype=torch.int64, device=device) if model.conditional else None
        y = one_hot(y, len(info.classes)).float() if y is not None and info.multilabel else y
        x = random_images(trained)

        def log_prob(n: int) -> None:
            with torch.no_grad(), full_fp32(device):
                noise = ImageNoise(0, range(n), device)
                model.log_prob(x[:n], None if y is None else y[:n], noise=noise)

        result["log_prob_seconds"] = seconds_each(log_prob, trained)
        turns = model.conditional and not info.multilabel and model.likelihood != "ode"
        result["classes"] = len(info.classes) if turns else 0
    return result


def random_images(trained: Trained) -> Tensor:
    """[TIMED_SAMPLES, C, H, W] of uniform grey levels."""
    levels = trained.info.levels or 256
    shape = (TIMED_SAMPLES, *trained.info.shape)
    return torch.randint(levels, shape, device=trained.device) * 2 / (levels - 1) - 1


def try_scoring(trained: Trained, names: Sequence[str]) -> dict[str, Any]:
    """The cost of these scores of an image for an untrained model: `score_seconds` and `score_calls`. The
    cost of an image to which they are fitted: `fit_seconds` if it is held out, `train_fit_seconds` if it is
    a training image, and `map_seconds` for `local`. `local` is skipped if the model has no cheap map. {} if
    the cost of a score is unknown."""
    model, device = trained.model, trained.device
    first = catalog.card(trained.part.model).maps[:1] if LOCAL in names else ()
    maps = [f"map_{name}" for name in first if name not in model.costly]
    of_model = [f"score_{name}" for name in names if hasattr(model, f"score_{name}")]
    derived = [name for name in names if name in SCORES and f"score_{name}" not in of_model]
    unknown = set(names) - {LOCAL, *derived, *(name.removeprefix("score_") for name in of_model)}
    if unknown or {fact for name in derived for fact in SCORES[name].reads} - {"nll", "code_length"}:
        return {}
    methods = [*of_model, *(["log_prob"] if derived else []), *maps]
    x, options = random_images(trained), trained.part.ood.options

    def keywords(method: str) -> dict[str, Any]:
        function = getattr(model, method)
        flat = flat_defaults(function)
        return group_options(function, {key: options[key] for key in flat.keys() & options.keys()})

    def score(n: int, only: Sequence[str] = methods) -> None:
        for method in only:
            with trained.scoring(), torch.no_grad():
                getattr(model, method)(x[:n], noise=ImageNoise(0, range(n), device), **keywords(method))

    def fit(n: int, method: str) -> None:
        index = torch.arange(n, device=device)
        batch = Batch(x[:n], None, index, ImageNoise(0, index, device), {})
        with trained.scoring():
            getattr(model, method)([batch], **keywords(method))

    fits = dict.fromkeys(("fit_seconds", "train_fit_seconds"), 0.0)
    for name in names:
        if hasattr(model, f"fit_{name}"):
            key = "train_fit_seconds" if name in model.fitted_on_train else "fit_seconds"
            fits[key] += seconds_each(partial(fit, method=f"fit_{name}"), trained)
    if any(SCORES[name].fit for name in derived):
        fits["fit_seconds"] += seconds_each(partial(score, only=["log_prob"]), trained)
    fits["map_seconds"] = seconds_each(partial(score, only=maps), trained) if maps else 0.0
    calls = calls_in(partial(score, 1), model)
    return {"score_seconds": seconds_each(score, trained), "score_calls": calls, **fits}


def sample_seconds(trained: Trained, clock: Callable[[], float] | None = None) -> float:
    """The seconds of a sample."""

    def sample(n: int) -> None:
        with suppress(NoneFinite):
            draw(trained, n, warn=silent)

    return seconds_each(sample, trained, clock)


def seconds_each(
    function: Callable[[int], object], trained: Trained, clock: Callable[[], float] | None = None
) -> float:
    """The seconds per image in a call with many images. On a CPU it is measured as the difference of two
    calls, because a full batch shares the fixed cost of a call. Slow images are timed once. Every rank must
    call it."""
    device = trained.device
    few, many = (
        (FALLBACK_TRIAL_IMAGES, TIMED_SAMPLES) if device.type == "cpu" else (0, batch_size(trained, {}))
    )
    clock = clock or partial(devices.clock, device, "cpu" if torch.get_num_threads() == 1 else "wall")
    since = clock()
    function(FALLBACK_TRIAL_IMAGES)
    if few and ranks.agree((first := (clock() - since) / FALLBACK_TRIAL_IMAGES) > SLOW_IMAGE_SECONDS):
        return first
    times = []
    for n in filter(None, (few, many)):
        since = clock()
        function(n)
        times.append(clock() - since)
    longer = times[-1] - times[0] if few else times[-1]
    return longer / (many - few) if longer > 0 else times[-1] / many


def speed_of(model: Model, batch: Batch, part: Part, accelerator: Accelerator, log: Log) -> Speed:
    """The number of images in a run's step and, if they can be counted, its floating-point operations."""
    images = part.train.batch_size
    if part.train.steps < MAX_SHORT_STEPS or not log.main:
        return Speed(images)
    try:
        blank, fake, mode = without_values(model, batch)
        with ranks.alone(), shapes_only(mode):
            work = count_work(blank.train(), fake.rows(slice(micro_batch(part)), fake.noise), part)
    except Exception as e:  # a metric that cannot be computed must not end a training
        log.record(f"the cost of a step is unknown: {type(e).__name__}: {e}")
        return Speed(images)
    plain = "fp32" if part.train.deterministic else "tf32"
    kind = {"no": plain}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    peak = devices.peak(accelerator.device, kind)
    return Speed(images, work.flops, peak and peak * ranks.world())
