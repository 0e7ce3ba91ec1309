"""Folders in the layout of diffusers, as others publish them: JSON and safetensors, which may be damaged.

Every key that gz reads has a type and limits, so nothing is built whose size has not been bounded. Weights
are described by the headers of their files, before memory is taken.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gzcli.core.errors import DamagedError, MissingError, first_line
from gzcli.store import files

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, SCHEDULER, INDEX = "config.json", "scheduler_config.json", "model_index.json"
WEIGHTS = "diffusion_pytorch_model*.safetensors"
COPY = "get a new copy of the folder"


NOUNS = {
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    bool: ("true or false", ""),
    str: ("a string", "strings"),
    dict: ("a map", ""),
}


@dataclass(frozen=True)
class Rule:
    """What a key may contain.

    kind: type of the value, or of the items of a list; a float may be an integer.
    low, high: least and largest number.
    lengths: lengths of a list; None: no list.
    single: whether a single value is allowed.
    null: whether null is allowed.
    """

    kind: Any
    low: float = -math.inf
    high: float = math.inf
    lengths: range | None = None
    single: bool = True
    null: bool = False

    def allows(self, value: Any) -> bool:
        if value is None:
            return self.null
        if isinstance(value, list):
            return self.lengths is not None and len(value) in self.lengths and all(map(self._fits, value))
        return self.single and self._fits(value)

    def _fits(self, value: Any) -> bool:
        if type(value) is self.kind or (self.kind is float and type(value) is int):
            return self.kind not in (int, float) or self.low <= value <= self.high  # not for NaN
        return False

    def __str__(self) -> str:
        one, many = NOUNS[self.kind]
        limits = f" from {self.low:,g} to {self.high:,g}" if self.high < math.inf else ""
        words = [f"{one}{limits}"] if self.single else []
        if self.lengths is not None:
            least, most = self.lengths[0], self.lengths[-1]
            count = f"{least}" if least == most else f"{least} to {most:,}"
            words.append(f"a list of {count} {many}{limits}")
        return " or ".join([*words, *["null"] * self.null])


_WIDTH, _COUNT, _SHARE = Rule(int, 1, 16_384), Rule(int, 1, 256), Rule(float, 0, 1)
_LEVELS = range(1, 11)
# Keys of networks, autoencoders and schedulers. A key has one meaning in all of them.
RULES: Mapping[str, Rule] = {
    "_class_name": Rule(str),
    # networks and autoencoders
    "sample_size": Rule(int, 1, 4096, range(2, 3), null=True),
    **dict.fromkeys(("in_channels", "latent_channels", "norm_num_groups", "patch_size"), _WIDTH),
    **dict.fromkeys(("out_channels", "attn_norm_num_groups"), Rule(int, 1, 16_384, null=True)),
    "block_out_channels": Rule(int, 1, 16_384, _LEVELS, single=False),
    **dict.fromkeys(("down_block_types", "up_block_types"), Rule(str, lengths=_LEVELS, single=False)),
    "layers_per_block": Rule(int, 1, 64),
    **dict.fromkeys(("num_layers", "num_attention_heads"), _COUNT),
    "attention_head_dim": Rule(int, 1, 16_384, null=True),
    "num_class_embeds": Rule(int, 1, 100_000, null=True),
    "num_embeds_ada_norm": Rule(int, 1, 100_000),
    **dict.fromkeys(("dropout", "norm_eps", "freq_shift"), _SHARE),
    "downsample_padding": Rule(int, 0, 1),
    "flip_sin_to_cos": Rule(bool),
    **dict.fromkeys(("resnet_time_scale_shift", "downsample_type", "act_fn"), Rule(str)),
    "scaling_factor": Rule(float, 1e-6, 1e6),
    "shift_factor": Rule(float, -1e6, 1e6, null=True),
    # schedulers
    "num_train_timesteps": Rule(int, 2, 10_000, null=True),
    **dict.fromkeys(("beta_start", "beta_end"), _SHARE),
    **dict.fromkeys(("beta_schedule", "prediction_type"), Rule(str)),
    "trained_betas": Rule(float, 0, 1, range(2, 10_001), single=False, null=True),
    **dict.fromkeys(("rescale_betas_zero_snr", "use_dynamic_shifting"), Rule(bool)),
    "shift": Rule(float, 1e-3, 1e3),
    **dict.fromkeys(("sigma_min", "sigma_max", "sigma_data"), Rule(float, 1e-6, 1e6)),
    # pipelines
    "id2label": Rule(dict, null=True),
}


def config(path: Path, needs: Iterable[str] = ()) -> dict[str, Any]:
    """The JSON object of a file. Raises DamagedError that names the key for a value outside `RULES`, and if
    one of `needs` is missing; MissingError if the file is."""
    if not path.exists():
        raise MissingError(f"`{path}` does not exist", hint=COPY)
    try:
        tree = files.read_object(path)
    except DamagedError as e:
        raise DamagedError(e.message, hint=COPY) from e
    for key in needs:
        if key not in tree:
            raise DamagedError(f"`{path}` is damaged: it has no `{key}`", hint=COPY)
    for key, rule in RULES.items():
        if key in tree and not rule.allows(tree[key]):
            raise wrong(path, key, tree[key], str(rule))
    return tree


def wrong(path: Path, key: str, value: Any, right: str) -> DamagedError:
    """The error for a wrong value of a key."""
    text = json.dumps(value)
    text = text if len(text) <= 60 else f"{text[:60]} …"
    return DamagedError(f"`{path}`: `{key}` must be {right}, not `{text}`", hint=COPY)


def weight_files(folder: Path, pattern: str = WEIGHTS) -> list[Path]:
    """The safetensors files of a network. Raises MissingError if there are none."""
    paths = sorted(path for path in folder.glob(pattern) if ".fp16" not in path.name)
    if not paths:
        hint = "convert the weights to safetensors; gz does not read `.bin` files, as they may run code"
        raise MissingError(f"`{folder}` contains no `diffusion_pytorch_model.safetensors`", hint=hint)
    for path in paths:
        if not path.is_file():
            raise DamagedError(f"`{path}` is not a file", hint=COPY)
    return paths


def shapes(paths: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in safetensors files, by name. Raises DamagedError."""
    found: dict[str, tuple[int, ...]] = {}
    for path in paths:
        try:
            head = files.safetensors_header(path)
            specs = {name: spec for name, spec in head.items() if name != "__metadata__"}
            found |= {name: tuple(map(int, spec["shape"])) for name, spec in specs.items()}
        except (OSError, KeyError, TypeError, ValueError) as e:
            raise DamagedError(f"`{path}` is damaged: {first_line(e)}", hint=COPY) from e
    return found


def tensors(paths: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of safetensors files, in fp32. Raises DamagedError, also for a number that is not
    finite."""
    from safetensors.torch import load_file

    for path in paths:
        try:
            values = load_file(path)
        except Exception as e:  # of safetensors, which has an error class of its own, and of torch
            raise DamagedError(f"`{path}` is damaged: {first_line(e)}", hint=COPY) from e
        for name, value in values.items():
            if not value.float().isfinite().all():
                raise DamagedError(f"`{path}` is damaged: `{name}` is not finite", hint=COPY)
            yield name, value.float()
