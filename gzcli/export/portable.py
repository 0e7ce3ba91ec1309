"""`gz runs export --to onnx|torch`: the network of a model as a graph, and a sampler that needs neither gz
nor torch.

GANs, VAEs and flows make an image in one pass: the exported network is the whole sampler. The samplers of
denoisers and flow models call a network repeatedly, and combine the noise and its outputs linearly. So the
solver is run once on unit vectors instead of these, which yields the coefficients of the combinations; the
exported network is that of one call.
"""

from __future__ import annotations

import io
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gzcli.core.errors import MissingError, UsageError
from gzcli.core.types import ImageNoise, Noise, no_progress
from gzcli.engine import sampler
from gzcli.engine.trained import Trained
from gzcli.export import portable_sampler
from gzcli.models.base import Model, group_options
from gzcli.models.denoising.denoiser import AS_TRAINED, WalkOptions
from gzcli.models.denoising.process import SDE, Level
from gzcli.models.denoising.samplers import Estimate
from gzcli.models.nn import spread_labels
from gzcli.store.files import make_folder, write_atomic

CHECKED = 4  # images that the export is tested on
TOLERANCE = 1  # grey levels of 255 by which the exported sampler may differ
ELSE = "`--to file` takes every run; `--to diffusers` what `gz list models --can export` shows"
BATCH = 3  # images of the example that a graph is traced with
KINDS = {"normal_": "normal", "uniform_": "uniform"}
BY_VALUES = "images step by step, each value from those before"
NONE_YET = {"autoregressive": BY_VALUES, "stable_diffusion": "with networks of diffusers: `--to diffusers`"}


def write(trained: Trained, to: str, folder: Path) -> dict[str, Any]:
    """Writes the graphs, `model.json` and, for onnx, `sample.py` into a folder. Returns {files, differs}, the
    latter being the largest difference of a pixel from gz's own, in grey levels."""
    packages = ("onnx", "onnxruntime", "onnxscript") if to == "onnx" else ()
    if missing := [name for name in packages if find_spec(name) is None]:
        raise MissingError(f"`--to onnx` needs {', '.join(missing)}", hint='pip install "gzcli[onnx]"')
    make_folder(folder)
    options = group_options(trained.model.sample, trained.part.sample)
    trained.requested_precision = "fp32"
    try:
        spec, step, example = step_of(trained, options)
    except Unportable as e:
        raise UsageError(f"the sampler of `{trained.name}` cannot be exported: {e}", hint=ELSE) from e
    spec |= {
        "model": trained.name,
        "run": trained.run.owner.id,
        "classes": list(trained.info.classes) if trained.model.conditional else [],
        "multilabel": trained.info.multilabel,
        "decode": trained.space is not None,
    }
    graphs = {"step": (step, example)}
    if trained.space is not None:
        graphs["decode"] = (Decode(trained), {"x": torch.zeros(BATCH, *trained.info.shape)})
    try:
        files = [graph(folder, name, net, inputs, to) for name, (net, inputs) in graphs.items()]
    except OSError:  # of the disk
        raise
    except Exception as e:  # the exporters of torch raise errors of many kinds
        why = str(e).strip().partition("\n")[0][:200]
        message = f"torch cannot write the network of `{trained.name}` as a graph: {why}"
        raise UsageError(message, hint=ELSE) from e
    text = json.dumps(spec, indent=1)
    write_atomic(folder / "model.json", text + "\n")
    files.append("model.json")
    if to == "onnx":
        files.append(shutil.copyfile(portable_sampler.__file__, folder / "sample.py").name)
    return {"files": files, "differs": check(trained, json.loads(text), folder, to)}


def graph(folder: Path, name: str, net: nn.Module, inputs: Mapping[str, Any], to: str) -> str:
    """Writes one network for batches of every size. Returns the file's name."""
    n = torch.export.Dim("n", min=1, max=4096)
    shapes: dict[str, Any] = {key: {0: n} for key in inputs}
    shapes |= {key: {} for key in ("alpha", "sigma") if key in inputs}  # one number for the whole batch
    names = list(inputs)
    if noise := inputs.get("noise"):
        shapes["noise"] = [{0: n}] * len(noise)
        names = [*(f"noise_{i}" for i in range(len(noise))), *(key for key in inputs if key != "noise")]
    file = folder / f"{name}.{'pt2' if to == 'torch' else 'onnx'}"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporters' own code
        program = torch.export.export(net.eval(), (), dict(inputs), dynamic_shapes=shapes)
        if to == "torch":
            torch.export.save(program, buffer := io.BytesIO())
            write_atomic(file, buffer.getbuffer())
        else:
            form: dict[str, Any] = {"dynamo": True, "external_data": False, "verbose": False}
            torch.onnx.export(program, (), file, input_names=names, **form)
    return file.name


def networks(folder: Path) -> portable_sampler.Call:
    """Calls the networks that `torch.export` has written into a folder."""
    nets: dict[str, Any] = {}

    def call(name: str, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        if name not in nets:
            nets[name] = torch.export.load(folder / f"{name}.pt2").module()
        tensors: dict[str, Any] = {key: torch.from_numpy(np.asarray(value)) for key, value in feeds.items()}
        if noises := [tensors.pop(key) for key in list(tensors) if key.startswith("noise_")]:
            tensors = {"noise": noises, **tensors}
        with torch.no_grad():
            outputs = nets[name](**tensors)
        return [value.numpy() for value in (outputs if isinstance(outputs, tuple) else (outputs,))]

    return call


def check(trained: Trained, spec: Mapping[str, Any], folder: Path, to: str) -> int:
    """The largest difference between images of the export and of gz, in grey levels of 255. Raises UsageError
    if it exceeds `TOLERANCE`."""
    call = (portable_sampler.networks if to == "onnx" else networks)(folder)
    exported = portable_sampler.draw(spec, call, CHECKED).transpose(0, 3, 1, 2)
    differs = int(np.abs(exported.astype(int) - sampler.draw(trained, CHECKED).astype(int)).max())
    if differs > TOLERANCE:
        message = f"what was exported draws other images than `{trained.name}`, by up to {differs} of 255"
        hint = "a sampler of fixed steps, without correctors: `gz list models`, `gz sample MODEL --help`"
        raise UsageError(message, hint=hint)
    return differs


# ---------------------------------------------------------------------------- the network and its program


class DrawnNoise(Noise):
    """Noise that returns draws from a list."""

    def __init__(self, values: list[Tensor]):
        self.values, self.device = iter(values), values[0].device

    def _draw(self, method: str, shape: tuple[int, ...], high: int | None = None) -> Tensor:
        return next(self.values)


class RecordedNoise(ImageNoise):
    """Noise that records the draws for an image."""

    def __init__(self, n: int, seed: int = 0):
        super().__init__(seed, range(n))
        self.program: list[dict[str, Any]] = []
        self.values: list[Tensor] = []

    def _draw(self, method: str, shape: tuple[int, ...], high: int | None = None) -> Tensor:
        self.program.append(draw_of(method, shape[1:]))
        self.values.append(super()._draw(method, shape, high))
        return self.values[-1]


class Unportable(Exception):
    """A model whose sampler cannot be exported; the text says why."""


def draw_of(method: str, shape: Sequence[int]) -> dict[str, Any]:
    """A draw as a step of a program."""
    if method not in KINDS:
        raise Unportable("it draws integers")
    return {"do": "draw", "kind": KINDS[method], "shape": list(shape)}


class UnitVectors(Noise):
    """A unit vector [1, size, 1, 1] for each draw and each output of the network, in order."""

    def __init__(self, size: int):
        self.device, self.size, self.count = torch.device("cpu"), size, 0
        self.program: list[dict[str, Any]] = []

    def unit(self) -> Tensor:
        vector = torch.zeros(1, self.size, 1, 1, dtype=torch.float64)
        if self.count < self.size:
            vector[0, self.count] = 1
        self.count += 1
        return vector

    def _draw(self, method: str, shape: tuple[int, ...], high: int | None = None) -> Tensor:
        # the first draw is the image's noise; later ones are made like x, which is a unit vector here
        self.program.append(draw_of(method, self.program[0]["shape"] if self.program else shape[1:]))
        return self.unit()

    def call(self, x: Tensor, **scalars: float | list[float]) -> None:
        """Records a call of the network at x, a combination of earlier draws and outputs."""
        self.program.append({"do": "call", "x": terms(x), **scalars})


def terms(x: Tensor) -> list[list[float]]:
    """The combination x [1, size, 1, 1] as [[number of the unit vector, factor]]."""
    row = x.flatten()
    return [[i, float(row[i])] for i in row.nonzero().flatten().tolist()]


class Sampler(nn.Module):
    """A sampler that makes images in one pass: the graph of `sample`."""

    def __init__(self, model: Model, options: Mapping[str, Any]):
        super().__init__()
        self.model, self.options = model, options

    def forward(self, noise: list[Tensor], y: Tensor | None = None) -> Tensor:
        n = noise[0].shape[0]  # which is a symbol in a graph, as `len` is not
        return self.model.sample(n, labels=y, noise=DrawnNoise(noise), progress=no_progress, **self.options)


class Denoise(nn.Module):
    """One call of a denoiser: (x_0, ε) of x [B, C, H, W] at times t [B] with the levels α, σ [1]."""

    def __init__(self, model: Any, settings: Mapping[str, Any]):
        super().__init__()
        self.model, self.scale = model, settings.get("guidance", 1.0)
        self.clip, self.dynamic = settings["clip"] and model.data.levels is not None, settings["dynamic"]

    def forward(
        self, x: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor, y: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        model, process = self.model, self.model.process
        level = process.levels_at(t) if isinstance(process, SDE) else Level(t, alpha, sigma)
        x0, eps, _ = model.to_estimate(model.output(x, level, y, self.scale), x, level)
        if self.clip:
            x0 = model.into_range(x0, self.dynamic)
            eps = (x - alpha * x0) / sigma
        return x0, eps


class Velocity(nn.Module):
    """One call of a velocity of x [B, C, H, W] at times t [B], or of its average between two times [B, 2]."""

    def __init__(self, model: Any, settings: Mapping[str, Any]):
        super().__init__()
        self.model, self.scale = model, settings.get("guidance", 1.0)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return self.model.velocity(y, self.scale)(x, t)


class Decode(nn.Module):
    """Images [B, C, H, W] of latents."""

    def __init__(self, trained: Trained):
        super().__init__()
        self.autoencoder: Any = trained.space and trained.space.autoencoder
        self.shown = trained.decode

    def forward(self, x: Tensor) -> Tensor:
        return self.shown(x)


def step_of(trained: Trained, options: Mapping[str, Any]) -> tuple[dict[str, Any], nn.Module, dict[str, Any]]:
    """(program and result, the network of a call, an example of its inputs). Raises Unportable."""
    model, card = trained.model, type(trained.model).__module__.split(".")
    if family := next((part for part in card if part in NONE_YET), None):
        raise Unportable(f"it makes {NONE_YET[family]}")
    if hasattr(model, "sources"):
        raise Unportable("it makes images of images")
    if options.get("weak"):
        raise Unportable("it is guided by another run")
    y = spread_labels(None, BATCH, trained.info, trained.device) if model.conditional else None
    if getattr(model, "clusters", None) is not None:
        y = torch.zeros(BATCH, dtype=torch.long)
    labels = {} if y is None else {"y": y}
    if not (hasattr(model, "denoiser") or hasattr(model, "velocity")):
        recorded = RecordedNoise(BATCH)
        with torch.no_grad():
            model.sample(BATCH, labels=y, noise=recorded, progress=no_progress, **options)
        spec = {"program": [*recorded.program, {"do": "make"}], "result": [[0, 1.0]]}
        return spec, Sampler(model, options), {"noise": recorded.values} | labels
    program, result, settings = trace_sampler(model, options)
    spec = {"program": program, "result": result}
    times = [part["t"] for part in program if part["do"] == "call"]
    example = {"x": torch.zeros(BATCH, *trained.info.shape), "t": torch.tensor(times[:1] * BATCH)}
    if settings["kind"] == "velocity":
        return spec, Velocity(model, settings), example | labels
    example |= {"alpha": torch.full((1,), 0.8), "sigma": torch.full((1,), 0.6)}
    return spec, Denoise(model, settings), example | labels


def trace_sampler(
    model: Any, options: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[list[float]], dict[str, Any]]:
    """The program of a sampler, its result as a combination, and its settings for the network's calls."""
    size = 1
    for _ in range(2):  # the first time counts
        units = UnitVectors(size)
        settings: dict[str, Any] = {}
        with unit_outputs(model, units, settings):
            result = model.sample(1, noise=units, progress=no_progress, **options)
        size = units.count
    if not settings:
        raise Unportable("it calls its network in its own way")
    if tuple(settings.get("interval", (0.0, 1.0))) != (0.0, 1.0):
        raise Unportable("its guidance acts within an interval of times alone")
    return units.program, terms(result), settings


@contextmanager
def unit_outputs(model: Any, units: UnitVectors, settings: dict[str, Any]) -> Iterator[None]:
    """Within the block, the outputs of the model's network are unit vectors, and nothing is clipped to the
    range of images."""

    def denoiser(y: Tensor | None = None, options: WalkOptions = AS_TRAINED, guide: Any = None) -> Any:
        guidance = model.guidance_scale(options.guidance)
        settings.update(asdict(options) | {"guidance": guidance, "kind": "denoise"})

        def denoise(x: Tensor, t: float) -> Estimate:
            level = model.process.level(t)
            units.call(x, t=float(t), alpha=float(level.alpha), sigma=float(level.sigma))
            return Estimate(units.unit(), units.unit())

        return denoise

    def velocity(y: Tensor | None = None, guidance: float = 1.0, interval: Any = (0.0, 1.0)) -> Any:
        settings.update(guidance=guidance, interval=interval, kind="velocity")

        def f(x: Tensor, t: Tensor) -> Tensor:
            units.call(x, t=t[0].tolist())
            return units.unit()

        return f

    def draw_labels(*_: Any) -> None:
        if model.clusters is not None:
            units.program.append({"do": "cluster", "shares": model.clusters.class_shares.tolist()})

    fakes: dict[str, Any] = {"denoiser": denoiser, "velocity": velocity, "draw_labels": draw_labels}
    fakes["into_range"] = lambda x, *_: x
    fakes = {name: fake for name, fake in fakes.items() if hasattr(model, name)}
    vars(model).update(fakes)
    try:
        yield
    finally:
        for name in fakes:
            del vars(model)[name]
