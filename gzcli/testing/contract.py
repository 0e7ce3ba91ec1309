"""The contract of every model. Cases are models that are small enough to be checked in seconds. The checks
raise Broken with a description of the fault."""

from __future__ import annotations

import copy
import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gzcli.core.errors import GzError
from gzcli.core.types import Batch, BatchNoise, DataInfo, ImageNoise, Noise, no_progress
from gzcli.data.packs.batches import TrainBatches, TrainImages, quantise, scan
from gzcli.data.packs.open import open_pack
from gzcli.data.packs.pack import Pack
from gzcli.engine.checkpoint import weights_of
from gzcli.engine.prepared import with_prepared
from gzcli.models import catalog
from gzcli.models.base import Model, Phase, flat_defaults, group_options, named_losses
from gzcli.models.denoising.process import DiscreteVP, Process
from gzcli.models.denoising.samplers import solve
from gzcli.models.nn import ClassEmbedding
from gzcli.store import model_files

CONTRACT_SEED = 0
CPU = torch.device("cpu")
# Few steps suffice for likelihoods and for scores: the checks test dependences, not values.
ODE_STEPS = 4
SCORE_STEPS = 2  # for checks of dependences, in which values do not matter
CONTRACT_CLASSES = 2  # of a mixture of classes, for the same reason
SEARCH_STEPS = 25  # gradient steps of the search for the latent code of an image
FEW_OPTIONS = {"steps": 2, "times": 3, "starts": 2}
FALL = 0.10  # relative fall of a phase's loss on one batch that is required
FALL_STEPS = 30  # steps for that fall
TRIALS = (8, 25, 75, 200)  # steps after which a trained copy is compared with an untrained one
DATA_KINDS = ("rgb", "multi-label", "label-free")  # properties of data sets that every model accepts
N = 6  # number of images in such a set


@dataclass(frozen=True)
class Case:
    """A model with hyperparameters with which it trains in a second or two.

    model: name of the model.
    options: hyperparameters, flat, as in `Model.of`.
    lr: learning rate of Adam, with which every check trains.
    batch: number of images per step.
    levels: grey levels. None: those of the data set.
    sample: options of `sample` that keep sampling short.
    quiet: whether the loss of a new model may be independent of `batch.noise`.
    data: name of the data set.
    stages: the models on which it is built, by the names of its parameters.
    """

    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    lr: float = 1e-3
    batch: int = 32
    levels: int | None = None
    sample: Mapping[str, Any] = field(default_factory=dict)
    quiet: bool = False
    data: str = "digits"
    stages: Mapping[str, Case] = field(default_factory=dict)

    @property
    def conditional(self) -> bool:
        """Whether the model takes labels, by its options or by default."""
        default = catalog.card(self.model).params.get("conditional")
        return bool(self.options.get("conditional", default.default if default else False))

    @property
    def settings(self) -> dict[str, Any]:
        """The options with which the model is built. A test may add a folder, such as the base of a
        fine-tuning."""
        return dict(self.options)

    def build(self, info: DataInfo, seed: int = CONTRACT_SEED) -> Model:
        """The model with weights from a seed, built on stages with the same seed."""
        stages = {name: stage.build(info, seed) for name, stage in self.stages.items()}
        torch.manual_seed(seed)
        for p in (p for stage in stages.values() for p in stage.parameters()):
            # a layer initialised with zeros would hide the effect of the stage
            p.data += 0.1 * torch.randn_like(p)
        torch.manual_seed(seed)
        return catalog.load(self.model).of(info, **self.settings, **stages)

    def pack(self) -> Pack:
        return open_pack(self.data)

    def fresh(self) -> Model:
        """The model for its data set, in training mode."""
        return self.build(self.pack().info(levels=self.levels, steps=1000)).train()

    def batches(self) -> TrainBatches:
        """Training batches of its data set on the CPU."""
        pack = self.pack()
        images = TrainImages(pack, pack.info(levels=self.levels).levels, CPU, CONTRACT_SEED)
        return TrainBatches(images, self.batch, needs=catalog.card(self.model).needs)

    def __str__(self) -> str:
        return self.model + "".join(f"-{k}={v}" for k, v in self.options.items() if isinstance(v, bool | str))


# ---------------------------------------------------------------------------- the steps of a check


class Broken(AssertionError):
    """A model breaks the contract. The message is a sentence for the model's author."""


def require(condition: object, sentence: str) -> None:
    if not condition:
        raise Broken(sentence)


def fault_of(check: Callable[[Case], None], case: Case) -> str | None:
    """A sentence on the fault that a check finds; None if the model passes."""
    try:
        check(case)
    except Broken as e:
        return str(e)
    except Exception as e:
        file = catalog.card(case.model).path
        line = model_files.line_in(e, [file])
        what = str(e) if isinstance(e, GzError) else f"{type(e).__name__}: {e}"
        return f"{file}:{line[1]}: {what}" if line else what
    return None


def started(case: Case) -> tuple[Model, Batch]:
    """The model after its data-dependent start, and the first batch."""
    model = case.fresh()
    batch = with_prepared(model, case.batches().at(0))
    with torch.no_grad():
        model.fit([batch])
        model.on_start(batch)
    return model, batch


def fixed_noise(batch: Batch, phase: str, step: int = 0) -> Batch:
    """The batch with the noise of a phase at a step; its next draw is the first."""
    return batch.rows(slice(None), BatchNoise(CONTRACT_SEED, step, phase, total=len(batch)))


def loss_of(model: Model, batch: Batch, phase: str) -> Tensor:
    return named_losses(model, batch, phase)["loss"]


def only(model: Model, phase: Phase) -> list[nn.Parameter]:
    """Sets `requires_grad` for the parameters of a phase alone, and returns them."""
    model.requires_grad_(False)
    params = phase.parameters()
    for p in params:
        p.requires_grad_(True)
    return params


def draw(model: Model, case: Case, seed: int = 0, n: int = 4, labels: Tensor | None = None) -> Tensor:
    """n samples [n, C, H, W], with the case's options of `sample`."""
    with torch.inference_mode():
        options, noise = group_options(model.sample, case.sample), ImageNoise(seed, range(n))
        return model.sample(n, labels=labels, noise=noise, progress=no_progress, **options)


def log_likelihood(
    model: Model, x: Tensor, labels: Tensor | None = None, *, noise: Noise, steps: int | None = None
) -> Tensor:
    """`log_prob` of images, [B] nats, with few steps of an equation or few terms of a bound."""
    options, few = flat_defaults(model.log_prob), steps or ODE_STEPS
    short = {"steps": few} if model.likelihood == "ode" and "steps" in options else {}
    short |= {"terms": few} if "terms" in options else {}
    return model.log_prob(x, labels, noise=noise, **group_options(model.log_prob, short))


def brief_likelihood(model: Model, x: Tensor, *, noise: Noise) -> Tensor:
    """`log_likelihood` with the fewest steps, of the mixture of the first classes alone."""
    few = replace(model.data, classes=model.data.classes[:CONTRACT_CLASSES])
    with mock.patch.object(model, "data", few):
        return log_likelihood(model, x, noise=noise, steps=SCORE_STEPS)


def quick(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method with few steps instead of its default number."""
    options = {key: value for key, value in FEW_OPTIONS.items() if key in flat_defaults(method)}
    return partial(method, **group_options(method, options))


def held_out(pack: Pack, model: Model, split: str, n: int, count: int | None = None) -> Iterator[Batch]:
    """Batches of n images of a split, or of its first `count` images, with the model's grey levels."""
    index = None if count is None else range(count)
    return scan(pack, split, batch_size=n, levels=model.data.levels, device=CPU, index=index)


# ---------------------------------------------------------------------------- the checks


def each_phase_trains_its_parameters(case: Case) -> None:
    """On one batch with fixed noise, each phase's loss falls. If the loss is normalised, samples approach the
    batch. All gradients are finite and within the phase."""
    fresh, batch = started(case)
    for attribute in ("sums", "normalised"):
        strange = {*getattr(fresh, attribute)} - {phase.name for phase in fresh.phases()}
        require(not strange, f"`{attribute}` names {', '.join(sorted(strange))}, which is not a phase")
    for phase in fresh.phases():
        model = copy.deepcopy(fresh)
        params = only(model, next(p for p in model.phases() if p.name == phase.name))
        require(params, f"phase `{phase.name}` has no parameters")
        optimizer, values = torch.optim.Adam(params, lr=case.lr), []
        normalised = phase.name in model.normalised
        for _ in range(FALL_STEPS + 1):
            loss = loss_of(model, fixed_noise(batch, phase.name), phase.name)
            loss_name = f"`loss` of phase `{phase.name}`"
            require(loss.ndim == 0, f"{loss_name} has shape {tuple(loss.shape)} and is not a scalar")
            require(loss.requires_grad, f"{loss_name} has no gradient")
            values.append(_energy_distance(model, case, batch) if normalised else float(loss.detach()))
            if has_fallen := values[0] - values[-1] >= FALL * abs(values[0]) > 0:
                break
            loss.backward()
            _check_gradients(model, phase.name, solved=values[-1] == 0, params=params)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        what = "the energy distance of samples to its images" if normalised else "its loss"
        require(
            has_fallen,
            f"phase `{phase.name}` does not learn: on one batch, with fixed noise, {what} went from "
            f"{values[0]:.4g} to {values[-1]:.4g} in {FALL_STEPS} steps of Adam at {case.lr:g}",
        )


def _energy_distance(model: Model, case: Case, batch: Batch) -> float:
    """2 E‖x − y‖ − E‖x − x'‖ − E‖y − y'‖ of samples x, with the labels of a batch, and its images y."""
    labels = batch.y if case.conditional else None
    x, y = draw(model, case, n=len(batch), labels=labels).flatten(1), batch.x.flatten(1)
    within = (torch.cdist(z, z).sum() / (len(z) * (len(z) - 1)) for z in (x, y))
    return float(2 * torch.cdist(x, y).mean() - sum(within))


def _check_gradients(model: Model, phase: str, *, solved: bool, params: list[torch.nn.Parameter]) -> None:
    """Requires that gradients are finite, and that only parameters of the phase have one, at least one of
    them."""
    for name, p in model.named_parameters():
        if p.grad is not None:
            foreign = f"phase `{phase}` gives a gradient to `{name}`, which is not among its parameters"
            require(p.requires_grad, foreign)
            infinite = f"phase `{phase}` gives `{name}` a gradient that is not finite"
            require(torch.isfinite(p.grad).all(), infinite)
    moved = solved or any(p.grad is not None and p.grad.any() for p in params)
    require(moved, f"phase `{phase}` gives none of its parameters a gradient")


def the_loss_is_a_mean(case: Case) -> None:
    """A batch with every image twice has the same loss, not twice the loss."""
    model, batch = started(case)
    doubled = batch.rows(slice(None), batch.noise)
    doubled.x, doubled.index = torch.cat([batch.x, batch.x]), torch.cat([batch.index, batch.index])
    doubled.y = None if batch.y is None else torch.cat([batch.y, batch.y])
    doubled.extra = {
        key: torch.cat([value, value]) if isinstance(value, Tensor) else [*value, *value]
        for key, value in batch.extra.items()
    }
    for phase in model.phases():
        only(model, phase)
        pairs = ((copy.deepcopy(model), batch), (model, doubled))
        once, twice = (sum(_value(m, b, phase.name, i) for i in range(4)) / 4 for m, b in pairs)
        require(
            abs(twice - once) <= abs(twice - 2 * once) or abs(once) < 1e-3,
            f"the loss of phase `{phase.name}` is a sum over the batch, not a mean: {len(batch)} images "
            f"give {once:.4g}, the same images twice {twice:.4g}; divide by `len(batch)`",
        )


def the_loss_depends_only_on_the_batch(case: Case) -> None:
    """All randomness of a loss comes from `batch.noise`. Torch's global generator does not affect it."""
    model, batch = started(case)
    for phase in model.phases():
        only(model, phase)
        values = []
        for state in (1, 2):
            torch.manual_seed(state)
            values.append(_value(copy.deepcopy(model), batch, phase.name))
        require(
            values[0] == values[1],
            f"the loss of phase `{phase.name}` changes with torch's global generator ({values[0]:.6g}, "
            f"{values[1]:.6g}); draw from `batch.noise`",
        )
        other_value = _value(model, batch, phase.name, step=1)
        quiet = case.quiet or (model.likelihood == "exact" and model.data.levels is not None)
        idle = f"`batch.noise` has no effect on the loss of phase `{phase.name}`"
        require(other_value != values[0] or quiet, idle)


def _value(model: Model, batch: Batch, phase: str, step: int = 0) -> float:
    """The loss of the model, which it may change, with the noise of a step."""
    return float(loss_of(model, fixed_noise(batch, phase, step), phase).detach())


def samples_are_images(case: Case) -> None:
    """Samples have the data's shape and range, repeat with their seed, and change with seed and label."""
    model = started(case)[0]
    for p in model.parameters():  # outputs initialised with zeros would hide the inputs
        p.data += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    model.eval()
    x, shape = draw(model, case), (4, *case.pack().info().shape)
    require(tuple(x.shape) == shape, f"`sample(4)` returns {tuple(x.shape)}, not {shape}")
    require(torch.isfinite(x).all(), "`sample` returns values that are not finite")
    low, high = float(x.min()), float(x.max())
    require(low >= -1 and high <= 1, f"`sample` returns values outside [-1, 1]: {low:.3g} … {high:.3g}")
    repeated, with_seed_1, first_two = draw(model, case), draw(model, case, seed=1), draw(model, case, n=2)
    require(
        torch.equal(x, repeated),
        "`sample` draws different images from the same noise; draw only from `noise`",
    )
    require(not torch.equal(x, with_seed_1), "`sample` draws the same images from different noise")
    alike = torch.allclose(x[:2], first_two, atol=2 / 255)
    require(alike, "image i depends on how many images are drawn with it")
    if model.conditional:
        for table in (m.table for m in model.modules() if isinstance(m, ClassEmbedding)):
            torch.nn.init.normal_(table.weight, generator=torch.Generator().manual_seed(2))
        one, with_seed_1 = (draw(model, case, labels=torch.full((4,), y)) for y in (0, 1))
        require(not torch.equal(one, with_seed_1), "`sample` draws the same images for different labels")


def weights_save_and_load(case: Case) -> None:
    """A new model with the saved weights draws the same images."""
    model = started(case)[0]
    with tempfile.TemporaryDirectory() as folder:
        save_file(weights_of(model.state_dict()), Path(folder) / "w.safetensors")
        weights = load_file(Path(folder) / "w.safetensors")
    loaded = case.build(model.data, 99)
    vars(loaded).update({name: vars(model)[name] for name in case.stages})  # a stage has its own file
    missing, unexpected = loaded.load_state_dict(weights, strict=False)
    lost = [key for key in missing if not key.endswith("_extra_state")]
    require(not unexpected and not lost, f"a saved model does not load: {', '.join([*unexpected, *lost])}")
    is_equal = torch.equal(draw(model.eval(), case), draw(loaded.eval(), case))
    lost_state = "`sample` uses a value that is neither a parameter nor a buffer"
    require(is_equal, f"a loaded model draws different images: {lost_state}")


def declared_capabilities_work(case: Case) -> None:
    """The facts that the catalogue reads from the file without an import agree with the class."""
    card, model = catalog.card(case.model), case.fresh()
    require(type(model) is catalog.load(case.model), f"the catalogue reads `{card.cls}` as the model")
    require(card.paper and card.paper == model.paper, "`paper` is empty")
    for name in (*card.do, *(f"score_{score}" for score in card.scores)):
        require(callable(getattr(model, name, None)), f"`{name}` is not a method")
    metrics = "the docstring of `measure` needs a line for each metric, such as `mse: error of …`"
    require(card.metrics or not hasattr(model, "measure"), metrics)
    alike = hasattr(model, "log_prob") == (model.likelihood is not None)
    require(
        alike,
        'define both `log_prob` and the class attribute `likelihood` ("exact", "bound" or "ode"), or neither',
    )
    require(("log_prob" in card.can) == hasattr(model, "log_prob"), "the catalogue does not list `log_prob`")
    conditional = "`self.conditional` differs from the option `conditional`; set it in `__init__`"
    require(model.conditional == case.conditional, conditional)


def training_improves_the_model(case: Case) -> None:
    """Within 200 steps the likelihood, or reconstruction, of test images beats that of an untrained copy."""
    model, source = started(case)[0], case.batches()
    if not hasattr(model, "log_prob") and not hasattr(model, "reconstruct"):
        return
    untrained = copy.deepcopy(model).eval()
    batch = next(held_out(case.pack(), model, "test", 8))
    before = goodness(untrained, batch)
    optimizers = {phase.name: torch.optim.Adam(phase.parameters(), lr=case.lr) for phase in model.phases()}
    for step in range(TRIALS[-1]):
        train_batch = with_prepared(model, source.at(step))
        for phase in model.phases():
            if phase.due(step):
                only(model, phase)
                loss_of(model, fixed_noise(train_batch, phase.name, step), phase.name).backward()
                optimizers[phase.name].step()
                model.zero_grad(set_to_none=True)
        model.on_step(step)
        if step + 1 in TRIALS:
            after = goodness(copy.deepcopy(model).eval(), batch)
            if after > before:
                return
    raise Broken(
        f"{TRIALS[-1]} steps of training do not improve the log-likelihood, or the reconstruction error with "
        f"a minus sign, of test images: it went from {before:.4g} to {after:.4g}"
    )


def goodness(model: Model, batch: Batch) -> float:
    """The mean log-likelihood of test images, otherwise minus the error of their reconstruction."""
    noise = ImageNoise(0, batch.index.tolist())
    with torch.no_grad():  # the divergence of an ODE needs gradients of labelled networks too
        if hasattr(model, "prepare"):  # a later stage models the output of an earlier one
            return -float(loss_of(model, with_prepared(model, fixed_noise(batch, "main")), "main"))
        if hasattr(model, "log_prob"):
            return float(log_likelihood(model, batch.x, noise=noise).mean())
        few = {"steps": SEARCH_STEPS} if "steps" in flat_defaults(model.reconstruct) else {}
        few = group_options(model.reconstruct, few)
        rebuilt = model.reconstruct(batch.x, noise=noise, progress=no_progress, **few).images
        return -float((rebuilt - batch.x).square().mean())


def scores_do_not_depend_on_the_batch(case: Case) -> None:
    """A score of an image is the same alone and in a batch."""
    model, pack, card = started(case)[0].eval(), case.pack(), catalog.card(case.model)
    for name in card.fits:
        quick(getattr(model, f"fit_{name}"))(held_out(pack, model, "val", 8, 16))
    batch = next(held_out(pack, model, "test", 4))
    methods = {f"score_{name}": quick(getattr(model, f"score_{name}")) for name in card.scores}
    if hasattr(model, "log_prob"):
        methods["log_prob"] = partial(brief_likelihood, model)
    for name, method in methods.items():
        index = batch.index.tolist()
        with torch.no_grad():
            together = method(batch.x, noise=ImageNoise(0, index))
            alone = method(batch.x[2:3], noise=ImageNoise(0, index[2:3]))
        shape = tuple(together.shape)
        require(shape == (4,), f"`{name}` of 4 images has shape {shape}, not (4,)")
        require(torch.isfinite(together).all(), f"`{name}` is not finite")
        require(
            torch.allclose(alone[0], together[2], rtol=1e-5, atol=1e-4),
            f"`{name}` of an image is {float(together[2]):.6g} in a batch and {float(alone[0]):.6g} alone",
        )


def evaluation_needs_no_other_process(case: Case) -> None:
    """In eval mode, a model makes no collective call. Ranks have unequal shares, so one would wait
    forever."""
    model = started(case)[0].eval()
    met: list[str] = []
    batch = with_prepared(model, next(held_out(case.pack(), model, "val", 3)))
    distributed: dict[str, Any] = {
        "is_initialized": lambda: True,
        "get_world_size": lambda: 2,
        "get_rank": lambda: 0,
        "all_reduce": lambda *_: met.append("all_reduce"),
        "all_gather": lambda *_: met.append("all_gather"),
    }
    with mock.patch.multiple("torch.distributed", **distributed), torch.no_grad():
        if hasattr(model, "log_prob"):
            brief_likelihood(model, batch.x, noise=batch.noise)
        if model.best != "fd":  # such a model is only validated by its samples
            model.loss(batch, model.phases()[0].name)
        draw(model, case, n=2)
    require(not met, f"in eval mode the model calls `{next(iter(met), '')}`; see `gzcli.core.ranks`")


def a_path_matches_its_marginal(case: Case) -> None:
    """The derivatives, levels and paths of a denoiser's process are consistent with its α(t) and σ(t)."""
    process = getattr(started(case)[0], "process", None)
    if isinstance(process, Process) and not isinstance(process, DiscreteVP):  # which has few times
        _check_levels(process)
        _check_derivatives(process)
        _check_density(process)


def _check_levels(process: Process) -> None:
    """Requires levels and descending paths at the named noise levels."""
    name = type(process).__name__
    for share in (0.2, 0.5, 0.8):
        ratio = math.tan(share * math.pi / 2)
        level = process.ratio_level(ratio)
        got, t_of_ratio = level.sigma / level.alpha, process.ratio_level(process.ratio(level.t)).t
        require(abs(got / ratio - 1) < 0.02, f"`{name}.ratio_level({ratio:.3g})` has a σ/α of {got:.3g}")
        require(
            abs(t_of_ratio - level.t) < 0.01 * abs(process.noisy - process.clean),
            f"`{name}.ratio` is not σ/α",
        )
        walk = process.path(5, start=share)
        first, ends = walk[0].sigma / walk[0].alpha, walk[-1].sigma
        require(abs(first / ratio - 1) < 0.05, f"`{name}.path(start={share})` starts at a σ/α of {first:.3g}")
        falls = all(a.sigma * b.alpha > b.sigma * a.alpha for a, b in itertools.pairwise(walk))
        require(falls and ends <= 0.05, f"the noise of `{name}.path` does not fall to the image")


def _check_derivatives(process: Process) -> None:
    """Requires that α′ and σ′ agree with finite differences, at times of any shape."""
    name, h = type(process).__name__, 1e-6
    for share in (0.2, 0.5, 0.8):
        t = process.at_share(share)
        before, after, derivatives = process.level(t - h), process.level(t + h), process.derivatives(t)
        for k, got in enumerate(derivatives, 1):
            slope = (after[k] - before[k]) / (2 * h)
            right = abs(got - slope) < 1e-3 * (1 + abs(slope))
            require(
                right, f"`{name}.derivatives({t:.3g})` is {got:.4g}, but finite differences give {slope:.4g}"
            )
        for times in (torch.full((2,), t), torch.full((2, 1, 1, 1), t)):
            same = all(torch.allclose(torch.as_tensor(v), torch.tensor(w), rtol=1e-3)
                       for v, w in zip(process.derivatives(times), derivatives, strict=True))  # fmt: skip
            require(same, f"`{name}.derivatives` differ for times of shape {list(times.shape)}")


def _check_density(process: Process) -> None:
    """Requires that the ODE along `likelihood_path` takes N(0, std²) to the marginals of the process."""
    walk, std = process.likelihood_path(0.01, 100), 0.5

    def f(x: Tensor, t: Tensor) -> Tensor:
        _, alpha, sigma = process.levels_at(t)
        scaled = x / (alpha**2 * std**2 + sigma**2)  # E[x_0 | x] is α std² of it, E[ε | x] σ
        return process.velocity(x, alpha * std**2 * scaled, sigma * scaled, t)

    first, last = (math.hypot(level.alpha * std, level.sigma) for level in (walk[0], walk[-1]))
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    got = float(solve(f, x, [level.t for level in walk], "rk4"))
    sentence = (
        f"the ODE of `{type(process).__name__}` multiplies a Gaussian by {got:.4g}, not {last / first:.4g}"
    )
    require(abs(got * first / last - 1) < 0.01, sentence)


def every_kind_of_data_set(case: Case) -> None:
    """The model takes RGB images, several labels at once, and none."""
    refused = ("label-free", *(("multi-label",) if case.options.get("clusters") else ()))
    for kind in DATA_KINDS:
        if kind not in refused or not case.conditional:  # a conditional model is refused such sets
            _takes(case, kind)


def _takes(case: Case, kind: str) -> None:
    """Requires that the model can be built for random images of this kind, and trains, samples and scores."""
    on = f"on a set that is {kind}"
    classes = () if kind == "label-free" else ("a", "b", "c")
    shape = (3 if kind == "rgb" else 1, 16, 16)
    info = DataInfo(shape, case.levels or 256, classes, kind == "multi-label", n=64, steps=100)
    model = case.build(info, CONTRACT_SEED).train()
    u8 = torch.randint(
        256, (N, *shape), generator=torch.Generator().manual_seed(CONTRACT_SEED), dtype=torch.uint8
    )
    multi_labels = torch.tensor([[0, 0, 0], [1, 0, 1], [1, 1, 1]] * 2).byte()
    y = {"rgb": torch.arange(N) % 3, "multi-label": multi_labels}.get(kind)
    noise = BatchNoise(CONTRACT_SEED, 0, "main", total=N)
    x = quantise(u8, info.levels, noise)
    extra = {"second_domain": x.flip(0), "before": x.flip(0), "caption": ["a handwritten seven"] * N}
    inputs = {key: extra[key] for key in model.needs if key in extra}
    batch = with_prepared(model, Batch(x, y, torch.arange(N), noise, inputs))
    with torch.no_grad():
        model.fit([batch])
        model.on_start(batch)
    for phase in model.phases():
        only(model, phase)
        loss = loss_of(model, fixed_noise(batch, phase.name), phase.name)
        loss.backward()
        finite = all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
        infinite = f"{on} the loss of phase `{phase.name}`, or a gradient, is not finite"
        require(torch.isfinite(loss) and finite, infinite)
    model.eval()
    result = tuple(draw(model, case, n=3).shape)
    require(result == (3, *shape), f"{on} `sample(3)` returns {result}, not {(3, *shape)}")
    if case.conditional and kind == "multi-label":
        result = tuple(draw(model, case, n=3, labels=multi_labels[:3].float()).shape)
        require(result == (3, *shape), f"{on} `sample(3)` with labels returns {result}")
    if hasattr(model, "log_prob"):
        with torch.no_grad():
            labels = y if case.conditional else None
            rows = ImageNoise(CONTRACT_SEED, range(N))
            value = log_likelihood(model, batch.x, labels, noise=rows, steps=SCORE_STEPS)
        finite = value.shape == (N,) and bool(torch.isfinite(value).all())
        require(finite, f"{on} `log_prob` is not {N} finite numbers")


_CHECKS = (
    *(declared_capabilities_work, each_phase_trains_its_parameters, the_loss_is_a_mean),
    *(the_loss_depends_only_on_the_batch, samples_are_images, weights_save_and_load),
    *(scores_do_not_depend_on_the_batch, evaluation_needs_no_other_process, every_kind_of_data_set),
    a_path_matches_its_marginal,
    training_improves_the_model,
)
CHECKS: dict[str, Callable[[Case], None]] = {check.__name__: check for check in _CHECKS}
