"""Images from a trained model: in batches sized to the device, the noise of image i by (seed, i) alone."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gzcli import ranks
from gzcli.data.batches import to_uint8
from gzcli.data.labels import chosen
from gzcli.engine.pictures import PAPER
from gzcli.engine.trained import Trained
from gzcli.errors import DeviceError
from gzcli.models.nn import spread_labels
from gzcli.models.options import grouped
from gzcli.types import DataInfo, ImageNoise, Progress, no_progress

BATCH = defaultdict(
    lambda: 256, cpu=128, cuda=512
)  # images of up to 64×64 in RGB; of larger ones so many fewer
VALUES = 3 * 64 * 64


def draw(
    trained: Trained,
    n: int,
    *,
    seed: int = 0,
    labels: Tensor | None = None,
    given: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Progress = no_progress,
) -> np.ndarray:
    """Images 0 … n − 1 of this model under `seed`, uint8 [n, C, H, W], on every rank; each rank draws its
    share.

    `labels` [n] int64 or [n, K]; None for a conditional model means i % K. `options` override the recipe's
    `sample` section.
    `given`: keywords of `sample` that are lists of prompts or batches of pictures, of which image i gets the
    (i % len)th; a
    `prompt` among the options is one of them.
    """
    if labels is None and trained.model.conditional:
        labels = spread_labels(None, n, trained.info, torch.device("cpu"))
    options, given = {**trained.part.sample, **(options or {})}, dict(given or {})
    if prompts := given.get("prompt") or options.get("prompt"):
        given["prompt"] = [prompts] if isinstance(prompts, str) else prompts
    rank, world = ranks.rank(), ranks.world()
    share = math.ceil(n / world)
    start, end = min(rank * share, n), min((rank + 1) * share, n)
    size, parts, at = at_once(trained, options), [np.zeros((0, *trained.images.shape), np.uint8)], start
    while at < end:
        rows = range(at, min(at + size, end))
        chunk = None if labels is None else labels[rows.start : rows.stop].to(trained.device)
        own = {key: cycled(values, rows, trained.device) for key, values in given.items()}
        before, chunks = (at - start) / size, (end - start) / size

        def report(i, of, x=None, before=before, chunks=chunks):
            progress(min(before + i / of, chunks), chunks, x)

        try:
            with torch.inference_mode():
                noise = ImageNoise(seed, rows, trained.device)
                sample = trained.model.sample
                asked = grouped(sample, {**options, **own})
                x = sample(len(rows), labels=chunk, noise=noise, progress=report, **asked)
                x = trained.shown(x)
        except torch.OutOfMemoryError as e:
            if size == 1:
                raise DeviceError("not enough memory for one image") from e
            size //= 2
            torch.cuda.empty_cache()
            continue
        parts.append(to_uint8(x).cpu().numpy())
        at += len(rows)
    return ranks.gather(ranks.joined(parts))


def at_once(trained: Trained, options: Mapping[str, Any]) -> int:
    """How many images a first batch has; `size` among the options is their side, where they are not of the
    model's own."""
    channels, height, width = trained.images.shape
    values = channels * ((options.get("size") or 0) ** 2 or height * width)
    return max(1, min(BATCH[trained.device.type], BATCH[trained.device.type] * VALUES // values))


def cycled(values: Any, rows: range, device: torch.device) -> Any:
    """What the images of these numbers get of a list or a tensor [m, …] that images cycle through."""
    if isinstance(values, Tensor):
        return values[torch.arange(rows.start, rows.stop) % len(values)].to(device)
    return [values[i % len(values)] for i in rows]


def parse_labels(text: str, n: int, info: DataInfo) -> Tensor:
    """What `--label` names (`data.labels.chosen`), of which n images take turns: [n] int64, or [n, K] for
    multi-label sets. Raises UsageError."""
    numbers = chosen(text, info.classes)
    y = torch.tensor([numbers[i % len(numbers)] for i in range(n)])
    return torch.nn.functional.one_hot(y, len(info.classes)).float() if info.multilabel else y


def grid(images: np.ndarray, columns: int | None = None) -> np.ndarray:
    """uint8 [N, C, H, W] → one picture [H', W', C], as square as may be, two pixels apart; small images are
    enlarged."""
    n, c, h, w = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows, pad = math.ceil(n / columns), 2
    sheet = np.full((c, rows * (h + pad) + pad, columns * (w + pad) + pad), PAPER, np.uint8)
    for i, image in enumerate(images):
        top, left = pad + i // columns * (h + pad), pad + i % columns * (w + pad)
        sheet[:, top : top + h, left : left + w] = image
    scale = max(1, 512 // sheet.shape[2])
    return sheet.repeat(scale, 1).repeat(scale, 2).transpose(1, 2, 0)


def save_png(path: Path, image: np.ndarray) -> None:
    """[H, W, C] uint8, C = 1 or 3."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(path)


def save_images(folder: Path, images: np.ndarray) -> list[str]:
    """One PNG an image, `000000.png` …; returns their paths."""
    names: Sequence[Path] = [folder / f"{i:06d}.png" for i in range(len(images))]
    for path, image in zip(names, images, strict=True):
        save_png(path, image.transpose(1, 2, 0))
    return [str(path) for path in names]
