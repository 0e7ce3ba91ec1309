"""Converts published weights, a folder in the layout of diffusers, into a file of gz.

The network is a `UNet2DModel` or a `DiTTransformer2DModel` with its noise scheduler. For a DiT on latents,
the folder also contains the autoencoder. Only JSON and safetensors are read; no code in the folder is run. A
conversion is accepted if one forward pass agrees with that of diffusers.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gzcli.core.errors import DamagedError, MissingError, UsageError, first_line
from gzcli.core.sections import DataSection, Part, TrainSection
from gzcli.core.types import DataInfo
from gzcli.core.units import as_size
from gzcli.engine.checkpoint import Saved, SpaceRecord, save_weights, weights_of
from gzcli.engine.log import Log
from gzcli.engine.trained import autoencoder_weights, build_model
from gzcli.models.denoising.process import BETAS, DiscreteVP
from gzcli.models.nn.unet import Constants, UNet
from gzcli.store import files, layout
from gzcli.store.jobs import PublishedJob
from gzcli.store.layout import CONFIG, COPY, INDEX, SCHEDULER

UNET, DIT = "UNet2DModel", "DiTTransformer2DModel"
NET_READERS = {
    UNET: UNET,
    DIT: DIT,
    "Transformer2DModel": DIT,
}  # a class of diffusers, and gz's class that reads it
NET_FOLDERS = ("", "unet", "transformer")  # the folder of the network in that of the pipeline
NEEDS = {  # keys without which a network is not described
    UNET: ("in_channels", "block_out_channels", "down_block_types", "up_block_types"),
    DIT: (
        *("in_channels", "num_attention_heads", "attention_head_dim"),
        *("num_layers", "patch_size", "num_embeds_ada_norm"),
    ),
}
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
CLASSES_KEY = "num_class_embeds"
BETA_KEYS = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule"),
    *("trained_betas", "rescale_betas_zero_snr"),
)
SIGMAS = ("sigma_min", "sigma_max", "sigma_data")  # keys of a consistency function's scheduler
# keys of a network's configuration that do not affect its outputs, or that are compared with the weights
IDLE_KEYS = {"sample_size", "num_train_timesteps", "dropout", "upcast_attention", "attn_norm_num_groups"}
IDLE_KEYS |= {CLASSES_KEY, "num_embeds_ada_norm"}
MAX_DIFFERENCE = 1e-4  # maximum difference of outputs, relative to their deviation, of equal networks
MAX_PATCHES = 16_384  # patches of a transformer; published ones have 1,024
TIME_LEVELS = 1000  # keys of a flow's network


@dataclass(frozen=True)
class Published:
    """The content of a diffusers folder."""

    folder: Path
    net: Path  # the folder of the network
    config: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    classes: tuple[str, ...]

    @property
    def kind(self) -> str:
        return NET_READERS[self.config["_class_name"]]

    @property
    def flow(self) -> bool:
        """Whether the network is a flow on straight paths that predicts the velocity."""
        return "FlowMatch" in str(self.scheduler.get("_class_name"))

    @property
    def consistency(self) -> bool:
        """Whether the network is a consistency function with EDM's noise."""
        return str(self.scheduler.get("_class_name")).startswith("CM")

    @property
    def learned_variance(self) -> bool:
        channels = self.config.get("out_channels") or self.config["in_channels"]
        return bool(channels == 2 * self.config["in_channels"])

    @property
    def sides(self) -> tuple[int, int]:
        """The height and width of the network's input."""
        size = self.config.get("sample_size")
        if not size:
            raise UsageError(f"`{self.net}` does not specify its image size", hint="add `sample_size` to it")
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def vae(self) -> Path | None:
        """The folder of its autoencoder."""
        return self.folder / "vae" if (self.folder / "vae" / CONFIG).exists() else None


def run(job: PublishedJob, folder: Path, device: torch.device, log: Log) -> dict[str, Any]:
    """Writes the file `job.out` from the weights in `job.folder`."""
    published = read(Path(job.folder))
    saved = saved_of(published, job.name)
    files.make_folder(Path(job.out).parent)
    with files.replacing(Path(job.out)) as part:
        save_weights(part, saved)
    return {
        "path": job.out,
        "model": saved.part.model,
        "params": sum(v.numel() for v in saved.weights.values()),
    }


def read(folder: Path) -> Published:
    """The facts of a published folder. Raises MissingError for a missing or damaged part, UsageError for an
    unknown network."""
    net = next((folder / p for p in NET_FOLDERS if (folder / p / CONFIG).exists()), None)
    if net is None:
        hint = f"give a `{UNET}` or `{DIT}` of diffusers"
        raise UsageError(f"`{folder}` contains no network", hint=hint)
    config = layout.config(net / CONFIG, ["_class_name"])
    name = config["_class_name"]
    if name not in NET_READERS or (
        name == "Transformer2DModel" and config.get("norm_type") != "ada_norm_zero"
    ):
        hint = f"give a `{UNET}` or `{DIT}` of diffusers"
        raise UsageError(f"`{folder}` contains `{name}`, a network that gz cannot read", hint=hint)
    is_dit = NET_READERS[name] == DIT
    config = layout.config(net / CONFIG, NEEDS[NET_READERS[name]])
    places = (folder / "scheduler" / SCHEDULER, folder / SCHEDULER)
    place = next((path for path in places if path.exists()), None)
    if place is None:
        hint = f"put its `{SCHEDULER}` beside it"
        raise MissingError(f"`{folder}` does not specify the noise schedule of its network", hint=hint)
    scheduler = layout.config(place, ["_class_name"])
    if scheduler["_class_name"].startswith("CM"):
        scheduler = layout.config(place, SIGMAS)
    count = config.get("num_embeds_ada_norm" if is_dit else CLASSES_KEY) or 0
    count = 0 if is_dit and count == 1 else count  # the one label of a network without labels
    words = (layout.config(folder / INDEX) if (folder / INDEX).exists() else {}).get("id2label") or {}
    classes = tuple(str(words.get(str(i), i)).partition(",")[0] for i in range(count))
    return Published(folder, net, config, scheduler, classes)


def saved_of(published: Published, name: str) -> Saved:
    """The weights, and a recipe of gz for them. Raises UsageError if gz does not support the network or its
    noise schedule, or if the outputs differ from those of diffusers."""
    config, (h, w) = published.config, published.sides
    latent, space = _space(published, h, w)
    info = DataInfo((config["in_channels"], h, w), None if latent else 256, published.classes)
    size = as_size(*(space.shape[1:] if space else (h, w)))
    channels: Any = space.shape[0] if space else config["in_channels"]
    if channels not in (1, 3):
        hint = "give a network of grey or RGB images, or of latents with their `vae`"
        raise UsageError(f"`{published.folder}` is for images of {channels} channels", hint=hint)
    data = DataSection(name, size=size, channels=channels, levels=256, latent=latent)
    net = _unet(published) if published.kind == UNET else _dit(published)
    model = "fm" if published.flow else "consistency" if published.consistency else "ddpm"
    model = "dit" if published.kind == DIT else model
    options = {**net, **_process(published)}
    if published.classes:
        options |= {"conditional": True, "label_dropout": 0.1 if published.kind == DIT else 0.0}
    elif published.kind == DIT:
        options["conditional"] = False
    train = TrainSection(steps=1)
    part = Part(model, options, about=f"Published weights, {name}", data=data, train=train)
    network = _network(published, part, info)
    return Saved(weights_of(network.state_dict()), part, info, 1, {}, space)


def _network(published: Published, part: Part, info: DataInfo) -> Any:
    """The model with the weights of its network. Before it takes memory, it is built without values and
    compared with the shapes of the weights. Raises DamagedError for a configuration that describes no
    network, UsageError if the weights are of another network or if the outputs differ from those of
    diffusers."""
    paths = layout.weight_files(published.net)
    shapes = layout.shapes(paths)
    try:
        with torch.device("meta"):
            empty: Any = build_model(part, info)
    except Exception as e:  # the sizes are bounded, but a layer may refuse them
        message = f"`{published.net / CONFIG}` describes no network: {first_line(e)}"
        raise DamagedError(message, hint=COPY) from e
    _check_config(published, empty)
    try:
        empty.net.load_diffusers({n: torch.empty(shape, device="meta") for n, shape in shapes.items()})
    except Exception as e:  # of torch, for a name or a shape
        message = f"the weights of `{published.net}` do not fit its `{CONFIG}`"
        raise UsageError(message, hint=str(e).strip().splitlines()[-1].strip()) from e
    tensors = dict(layout.tensors(paths))
    network: Any = build_model(part, info)
    network.net.load_diffusers(reversed_flow(tensors, published.config) if published.flow else tensors)
    check(network, published)
    return network


def _unet(published: Published) -> dict[str, Any]:
    """The options of a U-Net."""
    config, side = published.config, min(published.sides)
    widths, downs = config["block_out_channels"], config["down_block_types"]
    for key in ("down_block_types", "up_block_types"):
        if len(config[key]) != len(widths):
            right = f"a list of {len(widths)} strings, as many as `block_out_channels`"
            raise layout.wrong(published.net / CONFIG, key, config[key], right)
    first = widths[0]
    if any(width % first for width in widths):
        raise UsageError(
            f"`{published.net}` has levels of {widths} channels, which are not multiples of the first"
        )
    sides = [math.ceil(side / 2**i) for i in range(len(widths))]
    constants = {key: config[key] for key in vars(Constants()) if key in config}
    return {
        "channels": first,
        "mult": tuple(width // first for width in widths),
        "layers": config.get("layers_per_block", 2),
        "attention": tuple(s for s, kind in zip(sides, downs, strict=True) if kind.startswith("Attn")),
        "head_dim": config.get("attention_head_dim", 8),
        "dropout": config.get("dropout", 0.0),
        "groups": config.get("norm_num_groups", 32),
        "patch": 1,
        **constants,
    }


def _dit(published: Published) -> dict[str, Any]:
    """The options of a transformer."""
    config = published.config
    heads = config["num_attention_heads"]
    if config["attention_head_dim"] is None:
        raise layout.wrong(published.net / CONFIG, "attention_head_dim", None, "an integer")
    h, w = published.sides
    if h * w > MAX_PATCHES * config["patch_size"] ** 2:
        right = f"for at most {MAX_PATCHES:,} patches"
        raise layout.wrong(published.net / CONFIG, "sample_size", config["sample_size"], right)
    sizes = {"width": heads * config["attention_head_dim"], "heads": heads, "layers": config["num_layers"]}
    return {
        **sizes,
        "patch": config["patch_size"],
        "norm_eps": config.get("norm_eps", 1e-5),
        "block": "plain",
    }


def _process(published: Published) -> dict[str, Any]:
    """The options of the noise process. Raises UsageError for a schedule that gz lacks."""
    scheduler = published.scheduler
    if published.flow:
        if published.kind == DIT or scheduler.get("use_dynamic_shifting"):
            raise UsageError(f"gz does not support the flow of `{published.folder}`")
        return {"shift": float(scheduler.get("shift", 1.0)), "sigma_min": 0.0}
    if published.consistency:
        noise = {key: float(scheduler[key]) for key in SIGMAS}
        return {**noise, "q": 256.0, "stages": 1}  # it is trained further as the last stage trains
    table = _alphas(published)
    kinds = [(name, zero) for name in BETAS for zero in (False, True) if len(table) > 1]
    fits = lambda name, zero: np.allclose(DiscreteVP(name, len(table), zero_snr=zero).alpha, table, atol=1e-5)  # noqa: E731
    schedule = next(((name, zero) for name, zero in kinds if fits(name, zero)), None)
    if schedule is None:
        what = scheduler.get("beta_schedule") or scheduler["_class_name"]
        hint = "give a model with a linear (1e-4 … .02) or cosine schedule, or with a straight flow"
        raise UsageError(
            f"gz does not support the noise schedule of `{published.folder}` ({what})", hint=hint
        )
    prediction = PREDICTIONS.get(scheduler.get("prediction_type", "epsilon"))
    if prediction is None:
        raise UsageError(f"gz does not support the prediction type `{scheduler['prediction_type']}`")
    process = {"timesteps": len(table), "schedule": schedule[0], "zero_snr": schedule[1], "shift": 1.0}
    return {**process, "prediction": prediction, "learned_variance": published.learned_variance}


def _alphas(published: Published) -> np.ndarray:
    """α at each time of a scheduler with betas; empty for any other scheduler."""
    import diffusers

    scheduler = published.scheduler
    cls: Any = getattr(diffusers, scheduler["_class_name"], None)
    is_scheduler = isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)
    parameters = inspect.signature(cls).parameters if is_scheduler else dict[str, Any]()
    if "trained_betas" not in parameters:
        return np.zeros(0)
    form = {key: scheduler.get(key, parameters[key].default) for key in BETA_KEYS if key in parameters}
    betas, times = form["trained_betas"], form["num_train_timesteps"]
    if betas is not None and len(betas) != times:
        raise UsageError(f"`trained_betas` of `{published.folder}` has {len(betas)} numbers, not {times}")
    try:
        reference: Any = diffusers.DDPMScheduler(**form)
    except (NotImplementedError, TypeError):  # an unknown schedule, or null
        return np.zeros(0)
    return reference.alphas_cumprod.double().sqrt().numpy()


def _space(published: Published, height: int, width: int) -> tuple[str | None, SpaceRecord | None]:
    """The name and the record of the latent space, if the network has an autoencoder."""
    if published.vae is None:
        return None, None
    weights, config = autoencoder_weights(published.vae)
    if (latents := config["latent_channels"]) != (channels := published.config["in_channels"]):
        message = f"the latents of `{published.vae}` have {latents} channels"
        raise UsageError(message, hint=f"its network in `{published.net}` takes {channels}")
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    scale, shift = config.get("scaling_factor", 0.18215), config.get("shift_factor") or 0.0
    shape = [config["out_channels"], factor * height, factor * width]
    record = SpaceRecord(files.checksum(weights), shape, 256, [shift] * channels, [scale] * channels)
    return str(published.folder.absolute()), record


def _check_config(published: Published, model: Any) -> None:
    """Raises UsageError if the folder's network differs from the one that gz builds from its options."""
    import diffusers

    with torch.device("meta"):  # without drawing weights: by default, a DiT has 700 million
        of_class = dict(getattr(diffusers, published.kind)().config)
    built = {**of_class, **model.net.config}
    for key, value in published.config.items():
        value = tuple(value) if isinstance(value, list) else value
        if key.startswith("_") or key in IDLE_KEYS or key not in of_class or value == built[key]:
            continue
        if key == "out_channels" and value in (None, built[key]):
            continue
        raise UsageError(
            f"`{published.net}` is a `{published.kind}` with `{key}: {value}`, which gz does not support",
            hint=f"give a network with `{key}: {built[key]}`",
        )


def reversed_flow(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Converts the weights of a flow from data (time 0) to noise (time 1,000) into those of a flow from noise
    to data. The velocity changes its sign. The sinusoids of time 1,000 − t are those of t rotated by an
    angle, which the next layer's weights undo."""
    weights = dict(tensors)
    for name in ("conv_out.weight", "conv_out.bias"):
        weights[name] = -weights[name]
    name = "time_embedding.linear_1.weight"
    half, first = weights[name].shape[1] // 2, config.get("flip_sin_to_cos", True)
    frequencies = torch.arange(half, dtype=torch.float64) / (half - config.get("freq_shift", 0))
    angle = TIME_LEVELS * torch.exp(-math.log(10_000) * frequencies)
    halves = weights[name].double().split(half, 1)
    of_cos, of_sin = halves if first else halves[::-1]
    turned = of_cos * angle.cos() + of_sin * angle.sin(), of_cos * angle.sin() - of_sin * angle.cos()
    weights[name] = torch.cat(turned if first else turned[::-1], 1).float()
    return weights


@torch.no_grad()
def check(model: Any, published: Published) -> float:
    """The largest difference between one forward pass and that of diffusers, relative to the standard
    deviation of the outputs. Raises UsageError if it exceeds rounding errors."""
    import diffusers

    reference: Any = getattr(diffusers, published.kind)
    noise = torch.Generator().manual_seed(0)
    sides: tuple[int, ...] = published.sides
    if isinstance(model.net, UNet):  # of any size
        least = 2 ** len(model.net.config["block_out_channels"])
        sides = tuple(min(side, least) for side in sides)
    x = torch.randn(2, published.config["in_channels"], *sides, generator=noise)
    t = torch.tensor([TIME_LEVELS // 3, TIME_LEVELS - 2])
    y = torch.tensor([0, len(published.classes) - 1]) if published.classes else None
    named = (
        {}
        if y is None and published.kind == UNET
        else {"class_labels": torch.zeros(2).long() if y is None else y}
    )
    try:
        theirs = reference.from_pretrained(published.net, use_safetensors=True, local_files_only=True).eval()
        want = theirs(x, t, **named).sample
    except Exception as e:  # of diffusers, for a key that gz does not read
        message = f"`{published.net / CONFIG}` describes no network of diffusers: {first_line(e)}"
        raise DamagedError(message, hint=COPY) from e
    model.eval()
    ours = model.net(x, TIME_LEVELS - t, y) * -1 if published.flow else model.net(x, t, y)
    differs = float((want - ours).abs().max() / want.std().clamp(min=1e-6))
    if not differs <= MAX_DIFFERENCE:
        raise UsageError(
            f"gz reads the network of `{published.net}` wrongly: its outputs differ from those of "
            f"diffusers by {differs:.2g} standard deviations",
            hint="report these weights to gz's authors",
        )
    return differs
