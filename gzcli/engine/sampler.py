"""Images from a trained model, in batches that fit the device. The noise of image i depends only on (seed,
i)."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gzcli.core import devices, ranks
from gzcli.core.errors import DeviceError, DivergedError
from gzcli.core.hints import Option, advice
from gzcli.core.types import DataInfo, ImageNoise, Progress, Say, no_progress
from gzcli.core.units import sides
from gzcli.data.packs.batches import to_uint8
from gzcli.data.sets.labels import class_numbers
from gzcli.engine.trained import Trained, load_model
from gzcli.models.base import Model, group_options
from gzcli.models.nn import spread_labels
from gzcli.store import runs

BATCH_SIZE = 256  # images of VALUES_AT_ONCE values in a batch on a usual device
VALUES_AT_ONCE = (
    3 * 64 * 64
)  # values of the largest image in a full batch; batches of larger images are smaller


def draw(trained: Trained, n: int, **options: Any) -> np.ndarray:
    """The 8-bit images that `draw_all` returns."""
    return draw_all(trained, n, **options)[0]


def draw_all(
    trained: Trained,
    n: int,
    *,
    seed: int = 0,
    labels: Tensor | None = None,
    conditions: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Progress = no_progress,
    warn: Say = warnings.warn,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Samples 0 … n − 1 of the model, uint8 [n, C, H, W], on every rank; each rank draws its share. If the
    samples have values beyond 8 bits, these are returned too, with all channels. `warn` gets a line if some
    samples are not finite. Raises NoneFinite if none is."""
    if labels is None and trained.model.conditional:
        labels = spread_labels(None, n, trained.info, torch.device("cpu"))
    options, conditions = {**trained.part.sample, **(options or {})}, dict(conditions or {})
    weak = load_model(runs.find(name), trained.device)[0] if (name := options.get("weak")) else None
    if prompts := conditions.get("prompt") or options.get("prompt"):
        conditions["prompt"] = [prompts] if isinstance(prompts, str) else prompts
    rank, world = ranks.rank(), ranks.world()
    share = math.ceil(n / world)
    start, end = min(rank * share, n), min((rank + 1) * share, n)
    size, position = batch_size(trained, options), start
    parts, finite = [np.zeros((0, *trained.images.shape), np.uint8)], [np.zeros(0, bool)]
    values: list[np.ndarray] = []
    while position < end:
        rows = range(position, min(position + size, end))
        chunk = None if labels is None else labels[rows.start : rows.stop].to(trained.device)
        inputs = {key: cycled(values, rows, trained.device) for key, values in conditions.items()}
        before, batch = position - start, len(rows)

        def report(i: float, n: float, x: Any = None, before: int = before, batch: int = batch) -> None:
            progress(before + batch * i / n, end - start, x)

        keywords = group_options(trained.model.sample, {**options, **inputs})
        try:
            with torch.inference_mode(), trained.sampling(), guided_away(trained, weak):
                noise = ImageNoise(seed, rows, trained.device)
                x = trained.model.sample(len(rows), labels=chunk, noise=noise, progress=report, **keywords)
                if trained.values:
                    values.append(trained.values.restored(x.float().cpu().numpy()))
                x = trained.decode(x)
        except torch.OutOfMemoryError as e:
            if size == 1:
                raise DeviceError("not enough memory for one image") from e
            size //= 2
            devices.empty_cache(trained.device)
            continue
        images, are_finite = to_images(x)
        parts.append(images)
        finite.append(are_finite)
        position += len(rows)
    check_finite(ranks.gather(np.concatenate(finite)), trained, warn)
    pictures = ranks.gather(ranks.joined(parts))
    return pictures, ranks.gather(ranks.joined(values)) if trained.values else None


def to_images(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Images [B, C, H, W] in [-1, 1] as uint8, and whether each is finite, bool [B]. Images that are not
    finite become black."""
    finite = x.isfinite().flatten(1).all(1)
    return to_uint8(torch.where(finite[:, None, None, None], x, -1.0)).cpu().numpy(), finite.cpu().numpy()


class NoneFinite(DivergedError):
    """No image of a draw is finite, on any rank."""


def check_finite(finite: np.ndarray, trained: Trained, warn: Say) -> None:
    """Raises NoneFinite if no image is finite, by `finite` bool [n]. `warn` gets the number of images that
    are not."""
    n, bad = len(finite), int((~finite).sum())
    if bad and bad == n:
        message = f"`{trained.title}` produced no finite image"
        hint = advice(
            "use the default options, {} or {}", Option("precision", "fp32"), Option("checkpoint", "best")
        )
        raise NoneFinite(message, hint=hint)
    if bad:
        warn(f"{bad:,} of {n:,} images from `{trained.title}` are not finite and shown in black")


def guided_away(trained: Trained, weak: Model | None) -> AbstractContextManager[None]:
    """A context in which samples are guided away from a weaker model, if the model has one."""
    model: Any = trained.model
    return model.guided_away_from(weak) if weak else nullcontext()


def batch_size(trained: Trained, options: Mapping[str, Any]) -> int:
    """The number of images in the first batch."""
    channels, *trained_sides = trained.images.shape
    values = channels * math.prod(sides(size) if (size := options.get("size")) else trained_sides)
    most = devices.batch_of(BATCH_SIZE, trained.device)
    return max(1, min(most, most * VALUES_AT_ONCE // values))


def cycled(values: Any, rows: range, device: torch.device) -> Any:
    """The elements i % m of a list or a tensor [m, …], for the images i in `rows`."""
    if isinstance(values, Tensor):
        return values[torch.arange(rows.start, rows.stop) % len(values)].to(device)
    return [values[i % len(values)] for i in rows]


def parse_labels(text: str, n: int, info: DataInfo) -> Tensor:
    """The labels of n images that cycle through the classes of `--label`: [n] int64, or [n, K] of 0 and 1 for
    a multi-label set. Raises UsageError for a text that does not name classes."""
    numbers = class_numbers(text, info.classes)
    y = torch.tensor([numbers[i % len(numbers)] for i in range(n)])
    return torch.nn.functional.one_hot(y, len(info.classes)).float() if info.multilabel else y


def count_calls(trained: Trained, options: Mapping[str, Any] | None = None) -> int:
    """The number of network calls for one image, counted while it is sampled. Only calls of the layers that
    contain half of the parameters count, and so the largest of several networks. Guidance doubles the batch
    and counts as two calls. Pixel models cache activations and bypass `forward`; for them, each value counts
    as one call."""
    model = trained.model
    keywords = group_options(model.sample, {**trained.part.sample, **(options or {})})
    if hasattr(model, "incremental"):
        return int(getattr(model, "parts")) * math.prod(trained.info.shape[1:])  # noqa: B009
    noise = ImageNoise(0, range(1), trained.device)
    labels = spread_labels(None, 1, trained.info, trained.device) if model.conditional else None

    def sample() -> None:
        with torch.inference_mode(), trained.sampling():
            model.sample(1, labels=labels, noise=noise, progress=no_progress, **keywords)

    return calls_in(sample, model)


def calls_in(function: Callable[[], object], model: Model) -> int:
    """The network calls of a model while `function` processes one image."""
    net = getattr(model, "net", getattr(model, "trunk", None))  # a denoiser's, a prior's
    with counted(net) as runs:
        function()
    weights = {layer: sum(p.numel() for p in layer.parameters(recurse=False)) for layer in runs}
    half, reached = sum(weights.values()) / 2, 0
    for layer, count in sorted(runs.items(), key=lambda item: item[1], reverse=True):
        reached += weights[layer]
        if weights[layer] and reached >= half:
            return count
    return 0


@contextmanager
def counted(net: nn.Module | None) -> Iterator[Counter[nn.Module]]:
    """Within the block, counts the calls of every module, including attached ones, for one image."""
    runs: Counter[nn.Module] = Counter()
    rows = 1

    def note(module: nn.Module, inputs: Any) -> None:
        nonlocal rows
        if module is net:
            rows = len(inputs[0])
        runs[module] += rows

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield runs
    finally:
        handle.remove()
