"""A recipe as typed values: a `Part` for the model, or one for each stage, and its sections. Their fields
declare the keys, types, defaults and ranges that `schema.py` checks; nothing else declares them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import Field, asdict, dataclass, field, fields, replace
from typing import Annotated, Any, Literal, TypeAlias

from gzcli.core.errors import UsageError, canonical
from gzcli.core.trackers import TRACKERS
from gzcli.core.units import Size

Fit: TypeAlias = Literal["crop", "pad", "stretch", "aspect"]

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
# minutes on one core, an hour on two, a day on a GPU, the paper's training
SCALES = ("tiny", "small", "full", "paper")

MEETING_KEYS = (
    "machines",
    "machine_rank",
    "main_ip",
    "main_port",
)  # where processes of several machines meet

# Old name → new name of a key, by section, and of an application's options as `do`: older recipes, runs,
# images and command lines are read by the new name.
RENAMED_KEYS: Mapping[str, Mapping[str, str]] = {
    "model": {"sde": "process"},
    "sample": {"solver": "sampler"},
    "do": {"steps": "frames"},
}

# Other programs' word → name of a key, by section: recipes and command lines may use them.
SYNONYMS: Mapping[str, Mapping[str, str]] = {
    "data": {"resolution": "size", "image_size": "size", "max_train_samples": "n"},
    "train": {
        "max_steps": "steps",
        "max_train_steps": "steps",
        "train_batch_size": "batch_size",
        "gradient_accumulation_steps": "accumulate",
        "ema_decay": "ema",
        "max_grad_norm": "clip",
        "save_total_limit": "keep",
        "early_stopping_patience": "patience",
    },
    "optim": {
        "optimizer": "name",
        "learning_rate": "lr",
        "warmup_steps": "warmup",
        "lr_warmup_steps": "warmup",
        "lr_scheduler": "schedule",
    },
    "sample": {
        "guidance_scale": "guidance",
        "guidance_interval": "interval",
        "num_inference_steps": "steps",
    },
    "model": {
        "channel_mult": "mult",
        "model_channels": "channels",
        "latent_dim": "latent",
        "r1_gamma": "r1",
        "path": "process",
    },
}

# What keys mean, which a resolved recipe notes. In runs that note nothing it is 1: shares of the way to noise
# are of a model's own time (`strength`, `interval`, the levels of scores). In 2 they are of the noise itself.
# Up to 2 `clip` and `skip` are of the gradient of a loss of an image; in 3, of its loss per dimension.
RECIPE_FORMAT = 3
PER_DIMENSION = 3  # the format from which losses that are sums have gradients per dimension

# Options that became constants, by model: older recipes and runs that hold the constant's value are read.
FIXED_KEYS: Mapping[str, Mapping[str, float | str]] = {
    **{name: {"label_dim": 32} for name in ("aae", "cvae", "hvae", "vae")},
    **{name: {"class_weight": 1.0} for name in ("flow", "flowpp", "glow", "realnvp")},
    "controlnet": {"edge_sigma": 1.0},
    "edm": {"boundary": 0.0, "noise_input": "time"},  # consistency functions became a model
    "sgm": {"beta_max": 20.0},
}


def _tracked(launch: Mapping[str, Any]) -> dict[str, Any]:
    """`launch.wandb: true` as an entry of `launch.track`."""
    track = launch.get("track") or ()
    return {"track": [*track, *({"wandb"} - {*track})]} if launch["wandb"] else {}


# Removed keys by section, with the keys that replace them, so that older recipes and runs can be read.
GONE_KEYS: Mapping[str, Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]]] = {
    "launch": {"wandb": _tracked},
    "sample": {"naive": lambda sample: {}},  # they were slower, with the same images
}


def without_gone(section: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    """A section of a recipe without keys that gz no longer has."""
    gone = {key: now for key, now in GONE_KEYS.get(section, {}).items() if key in keys}
    replaced = [now(keys) for now in gone.values()]
    rest = {key: value for key, value in keys.items() if key not in gone}
    return {**rest, **{key: value for more in replaced for key, value in more.items()}}


def without_fixed(model: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's section `model` without options that have become constants. Raises UsageError if such an
    option has a different value."""
    fixed = FIXED_KEYS.get(canonical(str(model.get("name"))), {})
    for key in fixed.keys() & model.keys():
        if model[key] != fixed[key]:
            constant = fixed[key] if isinstance(fixed[key], str) else f"{fixed[key]:g}"
            message = f"`model.{key}` is {constant} in this version of gz, not {model[key]}"
            raise UsageError(message, hint="train the model again, or use an older version of gz")
    return {key: value for key, value in model.items() if key not in fixed}


def renamed(key: str, options: Container[str], *sections: str) -> str:
    """The current name of an option, looked up in some sections of RENAMED_KEYS and SYNONYMS. `options` are
    the existing names: the new name is returned only if they contain it and not the old one."""
    names = (
        table.get(section, {}).get(key, key) for table in (RENAMED_KEYS, SYNONYMS) for section in sections
    )
    return key if key in options else next((name for name in names if name in options), key)


def ranged(default: Any, range: str) -> Any:
    """A field whose numbers must be in a range, written as in `schema.limits`."""
    return field(default=default, metadata={"range": range})


def _further() -> Any:
    """A field for the keys that the model declares, and no dataclass."""
    return field(default_factory=dict, metadata={"further": True})


def keys_of(section: type) -> tuple[Field[Any], ...]:
    """The keys that a section declares itself, in order."""
    return tuple(f for f in fields(section) if not f.metadata.get("further"))


@dataclass(frozen=True)
class DataSection:
    """Which images, in which form.

    name: name or path of a data set.
    size: side of the images in pixels, or width and height, such as `48x32`. Default: the data set's.
    fit: how images of another shape are resized: cropped, padded with the mean colour of the border, or
      stretched. `aspect`: to the nearest aspect ratio, for models that support it.
    channels: 1 (grey) or 3 (RGB). Default: the data set's.
    levels: grey levels, 2 … 256, or 65,536 for 16-bit images. 2: binary images. Default: the data set's.
    latent: run or diffusers `AutoencoderKL` whose latents are modelled instead of pixels.
    latent_draw: latent of an `AutoencoderKL`: the mode of the posterior, or a sample.
    augment: augmentations of training images, in this order.
    n: number of training images, a fixed random subset. Default: all.
    """

    name: str = "digits"
    size: Size | None = field(default=None, metadata={"range": "1 or more"})
    fit: Literal["crop", "pad", "stretch", "aspect"] = "crop"
    channels: Literal[1, 3] | None = None
    levels: int | None = ranged(None, "2 … 65,536")
    latent: str | None = None
    latent_draw: Literal["mode", "sample"] = "mode"
    augment: tuple[str, ...] = ()
    n: int | None = ranged(None, "1 … 1,000,000,000")


@dataclass(frozen=True)
class TrainSection:
    """How long, in which batches and precision; how often losses, samples and checkpoints are written.

    steps: number of training steps.
    minutes: training time in minutes. `steps` becomes the number of steps that fit.
    clock: clock of `minutes`. wall: wall-clock time, the minutes that you wait. cpu: CPU time, the sum over
      threads, which other programs do not lengthen, for comparisons on a busy machine. GPUs always use
      wall-clock time.
    batch_size: images per step, in total over all processes.
    accumulate: number of micro-batches per step (gradient accumulation). The result is the same.
    precision: precision of a step. auto: bf16 if the device gains from it.
    ema: decay per step of the averaged weights (EMA). 0: no average.
    ema_snapshots: number of points at which two more averages are saved, each the size of the weights. `gz
      runs ema` combines them into averages of any length. 0: none.
    clip: maximum gradient norm of a phase, for a loss per image dimension. Default: no limit.
    skip: gradient norm of a phase, before `clip`, above which its step is skipped. Default: never.
    compile: whether to use `torch.compile`. auto: if it is known to help.
    deterministic: whether to use deterministic kernels only.
    log_every: steps between log lines.
    sample_every: steps between sample grids. 0: none. Default: derived from the time that a grid takes.
    samples: images per grid. Default: 36, or 64 at the end.
    eval_every: steps between validations. 0: none. Default: derived from the time that a validation takes.
    eval_images: validation images of a mean, such as of bpd. Default: 2,000, or fewer if `minutes` is short.
    checkpoint_every: steps between checkpoints. 0: only the last. Default: derived from the time that a
      checkpoint takes.
    keep: number of newest checkpoints to keep, besides the best one. Default: 2, or 1 after the run has
      finished.
    best: validation metric that selects the best checkpoint (lower is better). auto: the model's default.
    patience: number of validations without improvement after which training stops (early stopping). Default:
      never.
    init: initial weights: a stage, a run, a safetensors file, `pretrained:NAME` or `hf://OWNER/NAME`.
    parent: name and sha256 of the initial weights. gz writes this key and rejects other weights of that name.
    """

    steps: int = ranged(10_000, "1 … 1,000,000,000")
    minutes: float | None = ranged(None, "greater than 0")
    clock: Literal["wall", "cpu"] = "wall"
    batch_size: int = ranged(64, "1 … 1,000,000")
    accumulate: int = ranged(1, "1 … 65,536")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    ema: float = ranged(0.0, "in [0, 1)")
    ema_snapshots: int = ranged(0, "0 … 1,000")
    clip: float | None = ranged(None, "greater than 0")
    skip: float | None = ranged(None, "greater than 0")
    compile: bool | Literal["auto"] = "auto"
    deterministic: bool = False
    log_every: int = ranged(50, "1 or more")
    sample_every: int | None = ranged(None, "0 or more")
    samples: int | None = ranged(None, "1 … 10,000")
    eval_every: int | None = ranged(None, "0 or more")
    eval_images: int | None = ranged(None, "1 or more")
    checkpoint_every: int | None = ranged(None, "0 or more")
    keep: int | None = ranged(None, "1 … 1,000,000")
    best: Literal["auto", "bpd", "fd", "loss", "none"] = "auto"
    patience: int | None = ranged(None, "1 … 1,000,000")
    init: str | None = None
    parent: str | None = None


# Factor of the learning rate at a share of the steps after the warm-up.
SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "late_linear": lambda progress: min(1.0, 2 * (1 - progress)),  # constant over the first half
    "wsd": lambda progress: 1 - max(0.0, 5 * progress - 4) ** 0.5,  # Hägele 2024, arXiv:2405.18392, eq. 1
}


@dataclass(frozen=True)
class OptimSection:
    """The optimizer of every phase.

    name: name of the optimizer.
    lr: learning rate after the warm-up.
    betas: decay rates of the running averages of the gradient and its square.
    eps: constant added to the denominator.
    weight_decay: decoupled weight decay, as a multiple of lr per step.
    warmup: steps over which lr rises from 0.
    schedule: learning-rate decay. wsd decays over the last fifth only, so that `--resume --steps N` continues
      at the full rate (Wen 2024, arXiv:2410.05192).
    phases: keys with a different value for one phase, by the name of the phase.
    """

    name: Literal["adam", "adamw", "adamw8bit", "muon", "adamax", "sgd", "rmsprop"] = "adamw"
    lr: float = ranged(2e-4, "greater than 0")
    betas: tuple[float, float] = ranged((0.9, 0.999), "in [0, 1)")
    eps: float = ranged(1e-8, "greater than 0")
    weight_decay: float = ranged(0.0, "0 or more")
    warmup: int = ranged(0, "0 or more")
    schedule: Annotated[str, SCHEDULES] = "constant"
    phases: Mapping[str, Mapping[str, Any]] = _further()

    def of(self, phase: str) -> OptimSection:
        """The section with the phase's own keys applied."""
        return replace(self, phases={}, **self.phases.get(phase, {}))


@dataclass(frozen=True)
class OodSection:
    """How images are scored as out-of-distribution.

    scores: names of the scores. Default: the fast ones.
    budget: time budget of the scores in seconds.
    background: background run of the score `ratio`.
    options: options of the model's own scores.
    """

    scores: tuple[str, ...] | None = None
    budget: float = ranged(300.0, "greater than 0")
    background: str | None = None
    options: Mapping[str, Any] = _further()


@dataclass(frozen=True)
class BenchSection:
    """What `gz bench` measures.

    metrics: names of the metrics. Default: those whose weights are available.
    n: number of samples of each model. Default: the command's.
    """

    metrics: tuple[str, ...] | None = None
    n: int | None = ranged(None, "1 … 10,000,000")


@dataclass(frozen=True)
class LaunchSection:
    """Which processes are started.

    gpus: number of GPUs, or `all`. Default: all for training, one for other commands.
    cpu: whether to use the CPU even if there are GPUs.
    processes: number of processes on a CPU.
    threads: threads per process. Default: its share of the cores.
    machines: number of machines.
    machine_rank: index of this machine, from 0.
    main_ip: address of machine 0.
    main_port: port of machine 0. Default: derived from the job.
    restarts: number of restarts from the newest checkpoint after a process fails. Default: 0 on one machine,
      2 on several.
    timeout: minutes to wait for a process that does not respond.
    strategy: distribution of the model over GPUs: replicated (ddp) or sharded (fsdp).
    track: trackers that receive metrics, images and the recipe.
    """

    gpus: int | Literal["all"] | None = ranged(None, "0 or more")
    cpu: bool = False
    processes: int | None = ranged(None, "1 … 1,024")
    threads: int | None = ranged(None, "1 … 1,024")
    machines: int | None = ranged(None, "1 … 100,000")
    machine_rank: int | None = ranged(None, "0 or more")
    main_ip: str | None = None
    main_port: int | None = ranged(None, "0 … 65,535")
    restarts: int | None = ranged(None, "0 … 10,000")
    timeout: float = ranged(10.0, "greater than 0")
    strategy: Literal["ddp", "fsdp"] = "ddp"
    track: tuple[Annotated[str, TRACKERS], ...] = ()

    def alone(self) -> LaunchSection:
        """The section without the settings of several machines."""
        nowhere: dict[str, Any] = dict.fromkeys(MEETING_KEYS)
        return replace(self, **nowhere)


SECTIONS: Mapping[str, type] = {
    "data": DataSection,
    "train": TrainSection,
    "optim": OptimSection,
    "ood": OodSection,
    "bench": BenchSection,
    "launch": LaunchSection,
}


def plain_values(section: Any) -> dict[str, Any]:
    """The section as plain values for YAML and JSON, with the model's own keys among the others."""
    values = lists(asdict(section))
    for f in fields(section):
        if f.metadata.get("further"):
            values |= values.pop(f.name)
    return values


def section_of(kind: type, tree: Mapping[str, Any]) -> Any:
    """The section from a tree that `plain` made. Keys that the section does not declare are the model's."""
    declared = {f.name for f in keys_of(kind)}
    rest = {key: value for key, value in tree.items() if key not in declared}
    further = {f.name: rest for f in fields(kind) if f.metadata.get("further")}
    return kind(**tuples({key: tree[key] for key in tree if key in declared}), **further)


def tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with lists turned into tuples, as in a section."""
    return {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}


def lists(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with tuples turned into lists, for YAML and JSON."""
    return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


def leaves(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of everything in the tree that is not a map, or an empty one."""
    rows = []
    for key, value in tree.items():
        is_map = isinstance(value, Mapping) and value
        rows += leaves(value, f"{prefix}{key}.") if is_map else [(prefix + key, value)]
    return rows


# options that add to the method of a model → suffix of the model's name in tables
ADDITIONS = {"clusters": "+{} clusters", "image_weight": "+image discriminator"}


def additions(options: Mapping[str, Any]) -> dict[str, str]:
    """What these options add to a model's method, by option."""
    return {key: text.format(options[key]) for key, text in ADDITIONS.items() if options.get(key)}


def titled(model: str, trees: Iterable[Mapping[str, Any]]) -> str:
    """The name of a model for the user, such as `fm +100 clusters`, from the recipes of its parts."""
    added = [text for tree in trees for text in additions(tree["model"]).values()]
    return " ".join(dict.fromkeys((model, *added)))


@dataclass(frozen=True)
class Part:
    """The recipe of one model: how to train, sample and score it.

    model: name of the model.
    options: hyperparameters of the model, flat, as in `Model.of`.
    stage: name of the stage; "" for a recipe without stages.
    about: the recipe in one line.
    scale: scale of the recipe: tiny, small, full or paper. Default: none.
    seed: seed of the initial weights, the image order and all noise.
    format: version of the recipe format, written by gz.
    data: the data set.
    train: length of training and batches.
    optim: the optimizer.
    sample: options of sampling.
    ood: options of scoring.
    bench: options of benchmarks.
    launch: processes and devices.
    params: number of parameters of the model, such as `44M`. Default: not stated.
    """

    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    stage: str = ""
    about: str = ""
    scale: Literal["tiny", "small", "full", "paper"] | None = None
    seed: int = ranged(0, "0 … 9,007,199,254,740,991")
    format: int = ranged(RECIPE_FORMAT, f"1 … {RECIPE_FORMAT}")
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    optim: OptimSection = field(default_factory=OptimSection)
    sample: Mapping[str, Any] = field(default_factory=dict)
    ood: OodSection = field(default_factory=OodSection)
    bench: BenchSection = field(default_factory=BenchSection)
    launch: LaunchSection = field(default_factory=LaunchSection)
    params: int | str | None = ranged(None, "1 or more")

    @property
    def in_recipe(self) -> str:
        """The prefix of its keys in a recipe: `stages.prior.`, or "" without stages."""
        return f"stages.{self.stage}." if self.stage else ""

    @property
    def title(self) -> str:
        """The model's name for the user: `fm +100 clusters`."""
        return titled(self.model, [{"model": self.options}])

    def tree(self) -> dict[str, Any]:
        """The part as a tree for YAML and JSON; `part_of` reads it back."""
        sections = {name: plain_values(getattr(self, name)) for name in SECTIONS}
        return {
            "about": self.about,
            "scale": self.scale,
            "seed": self.seed,
            "format": self.format,
            "model": {"name": self.model, **self.options},
            **{name: sections[name] for name in ("data", "train", "optim")},
            "sample": dict(self.sample),
            **{name: sections[name] for name in ("ood", "bench", "launch")},
            "params": self.params,
        }


def part_of(tree: Mapping[str, Any], stage: str = "") -> Part:
    """The part that the tree of a run or of a stage describes. A missing key has its default. Raises
    UsageError if an option that has become a constant has another value."""
    model, sample = without_fixed(tree["model"]), without_gone("sample", tree.get("sample") or {})
    # an old name stays if the new one exists too: then the model has both
    names = {old: new for old, new in RENAMED_KEYS["sample"].items() if new not in sample}
    return Part(
        model=model.pop("name"),
        options=model,
        stage=stage,
        about=tree.get("about", ""),
        scale=tree.get("scale"),
        seed=tree.get("seed", 0),
        format=tree.get("format", 1),
        sample={names.get(key, key): value for key, value in sample.items()},
        params=tree.get("params"),
        **{
            name: section_of(kind, without_gone(name, tree.get(name) or {}))
            for name, kind in SECTIONS.items()
        },
    )
