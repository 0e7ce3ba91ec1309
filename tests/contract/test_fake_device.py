"""Every path of the zoo on a device: none mixed, no float64, no wait of the host but where listed."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from draws import train_batches
from fake_device import DEVICE, NAME, PACKAGE, NoFloat64, OnDevice, on_device
from helpers import recipe
from refused import refused
from zoo import CASES, FIRST, Case

from gzcli.core import philox
from gzcli.core.sections import LaunchSection, OptimSection, Part, part_of
from gzcli.core.types import Batch, ImageNoise, no_progress
from gzcli.data.packs.open import open_pack
from gzcli.data.packs.pack import Pack
from gzcli.engine import optim, prepared, sampler, trained, trainer, validate
from gzcli.engine.checkpoint import SpaceRecord
from gzcli.engine.log import Log
from gzcli.engine.step import precision
from gzcli.judge import scores
from gzcli.judge.images import Pick
from gzcli.judge.sample import apply
from gzcli.judge.scores import Scorer, model_scores
from gzcli.metrics.features import LeNet, LeNetFeatures
from gzcli.metrics.interval import subset
from gzcli.metrics.quality import model as model_figures
from gzcli.models import catalog
from gzcli.models.base import Phase, flat_defaults, group_options
from gzcli.models.denoising.applications import Applications
from gzcli.models.nn import double
from gzcli.models.nn.unet import UNet
from gzcli.recipe import schema
from gzcli.store import runs
from gzcli.store.jobs import SampleJob

# Where the host waits for the device: in a step nowhere, before the first one, and with a trained model.
TEXTS = {
    f"models/stable_diffusion/kinds.py::{kind}.embed": "without `cache`: captions become tokens, on the host"
    for kind in ("Kind", "XL", "SD3", "Flux")
}
STEP = {
    "models/flow_matching/fm.py::couple_noise": "the assignment is solved on the host, by scipy",
    **TEXTS,
    "models/stable_diffusion/base.py::StableDiffusion.path": "at the first step: diffusers' table moves",
    "models/stable_diffusion/controlnet.py::canny": "without `cache`: edges are found on the host",
}
START = {
    "models/autoregressive/tokenizer.py::Codebook.init_codes": "once a run: whether a resume has started it",
    "models/autoregressive/pixelcnn.py::PixelCNN.on_start": "once a run: the same, and a histogram",
    "models/score/edm.py::EDM.fit": "once a run: the deviation of the training images",
    "models/score/ncsnv2.py::NCSNv2.on_start": "once a run: the largest distance of two images",
    "models/gan/cyclegan.py::CycleGAN.on_start": "once a run: whether images are remembered, and which",
    "models/stable_diffusion/base.py::StableDiffusion.on_start": "once a run: which captions are kept",
    "models/stable_diffusion/sd_lora.py::SDLoRA.on_start": "once a run: whether a prior was drawn",
    "models/stable_diffusion/base.py::StableDiffusion.draw": "once a run: the prior's pictures",
    "models/stable_diffusion/base.py::StableDiffusion.examples": "once a run: the prior's text",
    "models/labelled.py::Clusters.fit": "once a run: k-means on the host",
    "models/normalizing_flow/layers.py::initialising": "once a run: whether a resume has initialised it",
}
TRAINED = {
    "engine/validate.py::validation_mean": "the metric",
    **TEXTS,
    "models/stable_diffusion/base.py::StableDiffusion.draw": "diffusers' pipeline",
    "models/stable_diffusion/base.py::StableDiffusion.examples": "remembered captions, which are text",
    "models/stable_diffusion/controlnet.py::canny": "edges are found on the host",
    "engine/sampler.py::draw_all": "labels there, once a batch",
    "engine/sampler.py::to_images": "images back, and which of them are finite, once a batch",
    "engine/sampler.py::cycled": "images there, once a batch",
    "judge/sample.py": "images there and back",
    "models/denoising/applications.py::Applications.classify": "once a call: the accuracy",
    "judge/scores.py::Scorer.model_score": "the scores",
    "judge/scores.py::Scorer._nll": "the scores",
    "judge/scores.py::Scorer._gradient_norms": "the scores",
    "judge/scores.py::Scorer.facts": "the images, which a coder on the host takes",
    "engine/prepared.py::with_remembered": "what is computed of validation images is kept on the host",
    "engine/prepared.py::_measure": "moments of latents, in float64 on the host",
    "engine/trained.py::LatentSpace.encode": "a number a channel",
    "engine/trained.py::LatentSpace.decode": "a number a channel",
    "models/flow_matching/fm.py::couple_noise": "the assignment is solved on the host, by scipy",
    "models/autoregressive/base.py::PixelCache.__init__": "the order of its weights, once a batch",
    "models/flow_matching/fm.py::FlowMatching.fit_path": "a covariance, in float64",
    "models/flow_matching/fm.py::FlowMatching.score_path": "a distance, in float64",
    "models/denoising/samplers.py::solve_adaptive": "whether all images have arrived",
    "models/energy/eqm.py::descend": "whether all images have arrived",
    "engine/ema.py::EMA.swapped": "which statistics the averaged weights have changed",
    "models/nn/__init__.py::traversal": "the dimensions that change most, by which rows are named",
    "models/gan/cyclegan.py": "each image by the translator of its domain, by which rows are named",
}

CHEAP = {"k": 1, "samples": 1, "iterations": 1, "jump": 1, "rows": 15}
CHEAP |= dict.fromkeys(("steps", "starts", "terms", "times", "search", "dims", "frames", "resample"), 2)
FLUX = "diffusers.models.transformers.transformer_flux"
GRADNORM = ("vae", "glow", "pixelcnn")  # it is the engine's, over any likelihood
# the line that is put through all paths, where a model has several
# whose samplers and figures are another model's
KIN = ("cvae", "cgan", "cddpm", "cfm", "edm", "dit", "zigma", "rf", "reflow")


class Accelerator:
    """Of one process on the device, which accelerate does not know; `precision` is autocast's."""

    device, process_index, num_processes, scaler, precision = DEVICE, 0, 1, None, None

    def autocast(self) -> torch.autocast:
        return torch.autocast(NAME, dtype=self.precision, enabled=self.precision is not None)

    def prepare(self, module: torch.nn.Module) -> torch.nn.Module:
        forward = module.forward

        def cast(*args):
            with self.autocast():
                return forward(*args)

        module.forward = cast
        return module

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def no_sync(self, module: torch.nn.Module) -> Any:
        return contextlib.nullcontext()

    def wait_for_everyone(self) -> None:
        pass


@pytest.fixture
def device(monkeypatch) -> Iterator[OnDevice]:
    for module, name in (
        (validate, "MAX_VALIDATION_IMAGES"),
        (model_figures, "MAX_TEST_IMAGES"),
        (prepared, "MEASURED_IMAGES"),
    ):
        monkeypatch.setattr(module, name, 4)

    def lenet(pack, **_):
        return LeNetFeatures(LeNet(*pack.meta.shape[:2], 10).to(DEVICE), "", 0.0, False, DEVICE)

    monkeypatch.setattr(scores, "lenet", lenet)
    with on_device() as device:
        yield device


@pytest.fixture
def quick_noise(monkeypatch) -> None:
    """A draw is one operation on the device in place of a hundred, which have a test of their own."""
    real = philox.draw

    def draw(seed, call, images, count, numbers, dtype):
        if images.device != DEVICE:
            return real(seed, call, images, count, numbers, dtype)
        return torch.empty(len(images), count, dtype=dtype, device=DEVICE)

    monkeypatch.setattr(philox, "draw", draw)


@pytest.fixture
def quick_nets(monkeypatch) -> None:
    """A U-Net makes the same operations whenever its inputs have the same shapes and types. Without gradients
    it runs for the first of them only, and its later outputs are new tensors like the first one."""
    real, outputs = UNet.forward, {}

    def forward(net: UNet, *inputs: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            return real(net, *inputs)
        forms = [(x.shape, x.dtype, x.device) if isinstance(x, torch.Tensor) else x for x in inputs]
        key = (net, net.training, torch.is_inference_mode_enabled(), torch.is_autocast_enabled(NAME), *forms)
        if key not in outputs:
            outputs[key] = real(net, *inputs)
        return torch.empty_like(outputs[key])

    monkeypatch.setattr(UNet, "forward", forward)


@cache
def base() -> dict[str, Any]:
    return recipe(FIRST["vae"], steps=100_000)


def few(name: str) -> Pack:
    """A set with few images to prepare."""
    pack = open_pack(name)
    pack.meta = replace(pack.meta, counts=pack.meta.counts | {"train": 16})
    return pack


def trainer_of(case: Case, monkeypatch) -> trainer.Trainer:
    tree = copy.deepcopy(base())
    tree["model"], tree["sample"], tree["ood"]["scores"] = {"name": case.model}, dict(case.sample), None
    tree["data"] |= {"name": case.data, "levels": case.levels, "augment": []}
    tree["data"] |= dict.fromkeys(("size", "channels", "n"))
    tree["train"] |= {"batch_size": 4, "ema": 0.9, "clip": 1.0, "accumulate": 1}
    tree["train"] |= {"precision": "fp32", "best": "auto"}
    monkeypatch.setattr(trainer, "build_model", lambda part, info, stages, card: case.build(info))
    monkeypatch.setattr(trainer, "stages_for", lambda *_: {})  # `case` builds them
    monkeypatch.setattr(trainer, "built_on", lambda *_: {})
    run = runs.create(case.model, case.data)
    return trainer.Trainer(run, part_of(tree), few(case.data), Accelerator(), Log(run.path, rank=1))


class Paths:
    """What the engine does with one model, by the engine's own calls."""

    def __init__(self, case: Case, t: trainer.Trainer, device: OnDevice):
        self.t, self.device, self.card = t, device, catalog.card(case.model)
        self.first = FIRST[case.model] is case
        self.whole = self.first and case.model not in KIN
        self.sampled = self.whole and "sampler" in self.card.sample
        steps = ([step for step in range(p.start, p.start + p.every) if p.due(step)] for p in t.phases)
        self.model, self.due = t.model, sorted({due[0] for due in steps})
        self.trained = t.trained
        if hasattr(self.model, "rungs"):
            self.model.rungs = 3  # of tens, which langevin goes down one by one
        self.conditions = {"prompt": ["a handwritten seven", "three"]} if "prompt" in self.card.can else {}
        self.conditions |= {picture: torch.zeros(2, *t.info.shape) for picture in self.card.inputs}
        self.batch = next(iter(Pick(t.pack, "test", np.arange(2)).batches(self.trained, size=2, seed=0)))

    def all(self) -> Iterator[tuple[str, dict[str, str], Callable[[], None]]]:
        """(name, where the host may wait, what to call)."""
        yield "start", START, self.start
        yield "train", STEP, self.train
        if self.first:
            yield "train in bf16", STEP, lambda: self.train(torch.bfloat16)
        yield "validate", TRAINED, self.validate
        self.model.eval().requires_grad_(False)
        # one pixel after another takes long, and `complete` does a row of them
        if "complete" not in self.card.do or self.card.stages:
            yield "sample", TRAINED, self.sample
        for choice in schema.literal_values(self.card.sample["sampler"].annotation) if self.sampled else ():
            few = {"steps": 2} | ({"repeats": 1} if "repeats" in self.card.sample else {})
            call = lambda choice=choice, few=few: self.sample(sampler=choice, **few)  # noqa: E731
            yield f"sample sampler={choice}", TRAINED, call
        if self.first:
            yield from self.of_scores()
        for do in {*(self.card.do if self.first else self.card.labelled)} - {"restore"}:  # which is deepinv's
            yield f"do {do}", TRAINED, lambda do=do: self.apply(do)
        cheap = self.card.family in ("autoregressive", "gan", "vae")
        if self.whole and hasattr(self.model, "measure") and cheap:
            yield "measure", TRAINED | MEASURE, self.measure
        if "latent" in self.card.can:
            yield "latents", TRAINED, self.latents

    def measure(self) -> None:
        index = subset(self.t.pack.meta.counts["test"], model_figures.MAX_TEST_IMAGES)
        images = Pick(self.t.pack, "test", index).batches(self.trained, size=50, seed=0)
        model_figures.measured_figures(SimpleNamespace(test_images=lambda *_: images), self)

    def of_scores(self) -> Iterator[tuple[str, dict[str, str], Callable[[], None]]]:
        scores.perceive(self.trained, self.t.pack, self.t.log)
        for name in model_scores(self.model):
            yield f"score {name}", TRAINED, lambda name=name: self.score(name)
        for name in self.card.maps:
            yield f"map {name}", TRAINED, lambda name=name: self.map(f"map_{name}")
        in_steps = self.model.likelihood and {"steps", "terms"} & {*flat_defaults(self.model.log_prob)}
        if in_steps:  # a score would take all of them
            yield "log_prob", TRAINED, self.log_prob
        elif self.whole and self.model.likelihood:
            yield "score complexity", TRAINED, lambda: self.score("complexity")
        if self.card.name in GRADNORM and self.whole:
            yield "score gradnorm", TRAINED, lambda: self.score("gradnorm")

    def start(self) -> None:
        self.device.answer = False  # nothing has been initialised
        self.t.begin()
        self.device.answer = True

    def train(self, precision: torch.dtype | None = None) -> None:
        self.t.accelerator.precision = precision
        self.device.syncs.clear()
        for step in self.due:
            self.t.history.add(self.t.step(step))

    def validate(self) -> None:
        if self.t.metric and self.t.metric != "fd":
            with self.t.ema.evaluating():
                validate.validation_mean(self.trained, self.t.metric, self.t.images.pack)

    def sample(self, **options: Any) -> None:
        sampler.draw(self.trained, 2, conditions=self.conditions, options=options)

    def score(self, name: str) -> None:
        scorer = Scorer(self.trained, [name], options=CHEAP)
        scorer.fit([self.batch], [self.batch])
        scorer(self.batch.rows(slice(0, 1), self.batch.noise) if name == "gradnorm" else self.batch)

    def cheaply(self, method: Callable[..., torch.Tensor], batch: Batch) -> torch.Tensor:
        cheap = {key: value for key, value in CHEAP.items() if key in flat_defaults(method)}
        with torch.no_grad():
            return method(batch.x, noise=batch.noise, **group_options(method, cheap))

    def map(self, name: str) -> None:
        seen = self.trained.encode(self.batch)
        with self.trained.scoring():
            maps = self.cheaply(getattr(self.model, name), seen)
        assert maps.shape == (len(seen), *seen.x.shape[2:])

    def log_prob(self) -> None:
        self.cheaply(self.model.log_prob, self.batch)

    def apply(self, do: str) -> None:
        options = {key: value for key, value in CHEAP.items() if key in self.card.do[do]}
        if self.card.stages and "rows" in options:
            options["rows"] = 12  # whole rows of codes
        labelled = do in self.card.labels_for or (self.model.conditional and do in self.card.labelled)
        n, labels = 1 if do == "traverse" else 2, "3" if labelled else None
        job = SampleJob("", n=n, labels=labels, options=options, do=do)
        if do == "edit" and self.card.family == "normalizing_flow" and not labelled:
            return  # it has nothing to edit to
        by_class = isinstance(self.model, Applications) and do in ("classify", "translate")
        if by_class and not self.model.conditional:
            return  # it knows no class
        apply(self.trained, do, job, no_progress)

    def latents(self) -> None:
        info = self.t.info
        measured = prepared._measure(self.model, self.t.pack, info.levels, DEVICE)
        shift, scale = (values.tolist() for values in measured)
        record = SpaceRecord("", list(info.shape), info.levels, shift, scale)
        space = trained.LatentSpace(self.model, record)
        space.decode(space.encode(self.batch.x))


MEASURE = {
    "models/autoregressive/prior.py": "sums over the set, in float64 on the host",
    "models/autoregressive/tokenizer.py": "sums over the set, in float64 on the host",
    "models/gan/cyclegan.py": "sums over the set, in float64 on the host",
    "models/vae/vae.py": "sums over the set, in float64 on the host",
}


def unlisted(syncs: set[str], listed: dict[str, str]) -> list[str]:
    """Those of the syncs, as `read file::function`, that no entry `file::function` or `file` names."""
    places = {sync: sync.split(" ", 1)[1].split(".<locals>")[0] for sync in syncs}
    return sorted(
        sync for sync, place in places.items() if place not in listed and place.split("::")[0] not in listed
    )


# the fake device has no forward-mode derivatives
TRIED = [case for case in CASES if case.model != "meanflow"]
QUICK = FIRST["ddpm"]  # it has applications, scores, a likelihood and several samplers


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=str(c), marks=() if c is QUICK else pytest.mark.slow) for c in TRIED]
)
def test_every_path(case, device, quick_noise, quick_nets, monkeypatch, record_property):
    if case.base == "tiny-flux":  # its positions are in float32, as on MPS
        monkeypatch.setattr(f"{FLUX}.maybe_adjust_dtype_for_device", lambda dtype, device: torch.float32)
    t = trainer_of(case, monkeypatch)
    wrong, count = [], 0
    for name, listed, path in Paths(case, t, device).all():
        device.syncs.clear()
        count += 1
        try:
            path()
        except Exception as e:
            wrong.append(f"{name}: {type(e).__name__}: {e}")
        wrong += [f"{name}: the host waits: {sync}" for sync in unlisted(device.syncs, listed)]
    record_property("paths", count)
    assert not wrong, f"of {count} paths\n" + "\n".join(wrong)


def test_the_device_tells_what_a_gpu_would(device):
    x = torch.randn(2, 3).to(DEVICE)
    for wrong in (lambda: x + torch.zeros(2, 3), lambda: torch.cat([x, torch.zeros(2, 3)])):
        refused("two devices", wrong, error=RuntimeError)
    for wrong in (
        x.double,
        lambda: x.to(torch.float64),
        lambda: torch.zeros(2, dtype=torch.float64, device=DEVICE),
        lambda: torch.zeros(2, dtype=torch.float64).to(DEVICE),
        lambda: torch.linspace(0, 1, 3).double().to(DEVICE),
    ):
        refused("", wrong, error=NoFloat64)
    copies = (torch.zeros(2).to, lambda device: torch.tensor(1.0, device=device))
    waits = {
        "read": [x.sum().item, x.cpu, x.tolist, lambda: bool(x.sum() > 0), lambda: x[0].to("cpu")],
        "size": [lambda: x[x > 0], (x > 0).nonzero],
        "copy": [*(partial(copy, DEVICE) for copy in copies), lambda: x[torch.tensor([0])]],
    }
    for mode in (contextlib.nullcontext, torch.inference_mode):
        for kind, ways in waits.items():
            for way in ways:
                device.syncs.clear()
                with mode():
                    way()
                assert {sync.split()[0] for sync in device.syncs} == {kind}
        device.syncs.clear()
        with mode():
            torch.zeros(2).pin_memory().to(DEVICE, non_blocking=True) + x[0, :2] * 2.0 + torch.tensor(1.0)
        assert not device.syncs
    with pytest.raises((TypeError, RuntimeError)):
        x.numpy()


def test_noise_autocast_and_double_on_the_device(device):
    noise = ImageNoise(2**40, torch.arange(3), DEVICE)
    device.syncs.clear()
    drawn = noise.randn(3, 2, 5), noise.rand(3, 7), noise.randint(9, 3)
    assert [t.dtype for t in drawn] == [torch.float32, torch.float32, torch.int64]
    assert {t.device for t in drawn} == {DEVICE}
    assert not device.syncs
    net, x = torch.nn.Linear(3, 4).to(DEVICE), torch.randn(2, 3).to(DEVICE)
    with torch.autocast(NAME, dtype=torch.bfloat16):
        y = net(x)
        assert y.dtype == torch.bfloat16
        assert y.softmax(1).dtype == torch.float32
        assert torch.cat([y, x], 1).dtype == torch.float32
        y.sum().backward()
    assert net.weight.grad.dtype == torch.float32 and net.weight.grad.device == DEVICE
    assert double(torch.zeros(2)).dtype == torch.float64
    for dtype in (torch.float32, torch.bfloat16):
        assert double(torch.zeros(2, dtype=dtype, device=DEVICE)).dtype == torch.float32


def test_optimizers(device):
    for name in ("adam", "adamw", "muon", "adamax", "sgd", "rmsprop"):
        net = torch.nn.Sequential(torch.nn.Linear(40, 40), torch.nn.Linear(40, 1)).to(DEVICE)
        conf = OptimSection(name=name, betas=(0.9, 0.99), lr=1e-3, weight_decay=0.1)
        phase = Phase("main", list(net.parameters()))
        optimizer = optim.build(phase, conf)
        device.syncs.clear()
        for step in range(2):
            net(torch.zeros(2, 40, device=DEVICE)).sum().backward()
            optim.set_lr(optimizer, conf, step, 2)
            optim.clip(phase.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        assert not device.syncs, name


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("levels", [2, 17])
def test_a_batch_gets_to_the_device_without_a_wait(resident, levels, device, monkeypatch):
    if not resident:
        monkeypatch.setattr("gzcli.data.packs.batches.ON_DEVICE", 0)
    codes = {"codes": torch.zeros(1797, 4).numpy()}
    how = {"seed": 0, "batch_size": 4, "levels": levels, "device": DEVICE}
    source = train_batches(open_pack("digits"), augment=("hflip", "mutate=0.2"), **how)
    source.prepared = codes
    device.syncs.clear()
    batch = source.at(0)
    assert not device.syncs
    tensors = (batch.x, batch.y, batch.index, batch.extra["codes"], batch.noise.randn(4, 2))
    assert {t.device for t in tensors} == {DEVICE}


@pytest.mark.parametrize("mac", [True, False])
def test_precision_where_torch_has_no_onednn(mac, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mac)
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    assert precision(Part("vae", launch=LaunchSection(cpu=False))) == "fp32"


def test_the_lists_name_what_there_is():
    for place in STEP | START | TRAINED | MEASURE:
        path, _, name = place.partition("::")
        text = (PACKAGE / path).read_text()
        assert not name or f"def {name.rsplit('.', 1)[-1]}(" in text, place
