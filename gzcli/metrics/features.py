"""The feature space of the metric `fd`: a small classifier of the data set itself, trained once and cached.

Features of an ImageNet network say little about grey 28×28 digits, and its weights must be downloaded. The
features here are the 64 penultimate activations before the ReLU, which would lower their rank. For a set
without labels the same network is trained to classify four rotations (Gidaris et al. 2018, arXiv:1803.07728);
of images that are not square the two that keep their shape.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gzcli.core.errors import UsageError
from gzcli.core.types import Say, silent
from gzcli.core.units import Size, as_size, sides
from gzcli.data.packs.pack import Pack
from gzcli.data.packs.stream import Pictures
from gzcli.store import files
from gzcli.store.paths import cache_dir

RECIPE = "lenet-1"  # part of the cache's key; must change with any change of the weights
WIDTHS = (16, 32, 64, 64)
FEATURES = 64
STEPS, EPOCHS, BATCH = 1500, 30, 128  # 1500 steps, or 30 epochs of a small set
LR, WARMUP, WEIGHT_DECAY = 3e-3, 0.07, 1e-2  # the warm-up is a share of the steps


class LeNet(nn.Module):
    """5×5 convolutions and pooling down to a side of at most 7, 64 features, a linear head."""

    def __init__(self, channels: int, size: Size, outputs: int):
        super().__init__()
        height, width = sides(size)
        if min(height, width) < 8:
            small = f"images of {width}×{height} are too small"
            raise UsageError(f"{small} for the feature network, it needs 8×8")
        layers: list[nn.Module] = []
        for filters in WIDTHS:
            layers += [nn.Conv2d(channels, filters, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
            channels, height, width = filters, height // 2, width // 2
            if min(height, width) <= 7:
                break
        pooled = min(height, 7), min(width, 7)
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(pooled), nn.Flatten())
        self.neck = nn.Linear(channels * pooled[0] * pooled[1], FEATURES)
        self.head = nn.Linear(FEATURES, outputs)

    def features(self, x: Tensor) -> Tensor:
        """[B, 64] before the ReLU, of images [B, C, H, W] in [0, 1]."""
        return self.neck(self.body(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).relu())


@dataclass
class LeNetFeatures:
    """A trained LeNet. Figures in the features of different networks are not comparable."""

    net: LeNet
    hash: str  # of the weights; it names the feature space
    accuracy: float  # on the test split, of the classes or of the rotations
    rotations: bool  # whether it classifies rotations
    device: torch.device
    batch: int = field(default=500, repr=False)  # number of images in a forward pass

    def features(self, images: np.ndarray | Pictures) -> np.ndarray:
        """float64 [N, 64] of uint8 [N, C, H, W]."""
        return self._map(self.net.features, images).double().numpy()

    def predict(self, images: np.ndarray | Pictures) -> np.ndarray:
        """int64 [N]: the predicted classes (or rotations) of uint8 [N, C, H, W]."""
        return self._map(lambda x: self.net(x).argmax(1), images).numpy()

    @torch.no_grad()
    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean squared difference of the features of images x and y [B, C, H, W] in [-1, 1], [B]."""
        a, b = (self.net.features((images + 1) / 2) for images in (x, y))
        return (a - b).square().mean(1)

    @torch.no_grad()
    def _map(self, function: Callable[[Tensor], Tensor], images: np.ndarray | Pictures) -> Tensor:
        batches = (images[i : i + self.batch] for i in range(0, len(images), self.batch))
        return torch.cat([function(_to_input(batch).to(self.device)).cpu() for batch in batches])


def lenet(pack: Pack, *, device: torch.device | str = "cpu", say: Say = silent) -> LeNetFeatures:
    """The feature network of a data set, from the cache, or trained in about a minute on one CPU thread,
    so that equal machines get equal weights, and so equal hashes."""
    from safetensors.torch import save

    channels, *shape = pack.meta.shape
    text = f"{RECIPE}:{pack.meta.digest}:{as_size(*shape)}:{channels}"
    path = cache_dir("features") / f"lenet-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"

    read = partial(_load, pack=pack, device=torch.device(device))
    waiting = "waiting for another process that trains the LeNet"
    with files.lock(path.with_suffix(".lock"), on_wait=lambda: say(waiting)):
        if cached := files.read_cached(path, read, say):
            return cached
        files.sweep(path.parent)
        say(f"training the feature network of `{pack.meta.name}` once (a LeNet, about a minute)")
        meta, images = _task(pack), pack.images("train")
        labels = None if meta["rotations"] else pack.labels("train")
        steps = max(1, min(STEPS, EPOCHS * len(images) // BATCH))
        net = trained(images, labels, meta["outputs"], steps=steps)
        with _one_thread():
            judge = LeNetFeatures(net, "", 0.0, meta["rotations"], torch.device("cpu"))
            meta |= {"accuracy": _accuracy(judge, pack)}
        files.write_atomic(path, save(net.state_dict(), metadata={"lenet": json.dumps(meta)}))
        return read(path)


def trained(
    images: np.ndarray | Pictures, labels: np.ndarray | None, outputs: int, *, steps: int, seed: int = 0
) -> LeNet:
    """A LeNet trained reproducibly: on one CPU thread, with its own random numbers."""
    rng, order = np.random.default_rng(seed), np.empty(0, np.int64)
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(seed)
        net = LeNet(images.shape[1], as_size(*images.shape[2:]), outputs)
        optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
        for step in range(steps):
            while len(order) < BATCH:
                order = np.concatenate([order, rng.permutation(len(images))])
            rows, order = np.sort(order[:BATCH]), order[BATCH:]
            for group in optimizer.param_groups:
                warm = min(1, (step + 1) / (WARMUP * steps))
                group["lr"] = LR * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
            x = _to_input(images[rows])
            x, y = _rotated(x, step) if labels is None else (x, torch.from_numpy(np.asarray(labels[rows])))
            if y.ndim == 2:  # attributes
                loss = nn.functional.binary_cross_entropy_with_logits(net(x), y.float())
            else:
                loss = nn.functional.cross_entropy(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


def _task(pack: Pack) -> dict[str, Any]:
    classes, (channels, *shape) = pack.meta.classes, pack.meta.shape
    rotations = len(classes) < 2 or pack.labels("train") is None
    outputs = len(turns(shape)) if rotations else len(classes)
    return {"channels": channels, "size": as_size(*shape), "outputs": outputs, "rotations": rotations}


def _load(path: Path, pack: Pack, device: torch.device) -> LeNetFeatures:
    """The network in a file. Raises DamagedError unless `lenet` wrote the file for this set."""
    state, texts = files.read_tensors(path)
    with files.reading(path):
        meta, task = json.loads(texts["lenet"]), _task(pack)
        accuracy = float(meta.pop("accuracy"))
        if meta != json.loads(json.dumps(task)):
            raise ValueError("it is of other images")
        with torch.device("meta"):  # no draw from the global generator
            net = LeNet(task["channels"], task["size"], task["outputs"])
        expected = {name: (value.shape, value.dtype) for name, value in net.state_dict().items()}
        if {name: (value.shape, value.dtype) for name, value in state.items()} != expected:
            raise ValueError("its weights are of another network")
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(state[name].numpy().tobytes())
    net.load_state_dict(state, assign=True)
    net.eval().requires_grad_(False).to(device)
    return LeNetFeatures(net, digest.hexdigest()[:16], accuracy, task["rotations"], device)


def _to_input(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(images).astype(np.float32)) / 255


def turns(shape: Sequence[int]) -> tuple[int, ...]:
    """The rotations that keep the shape (H, W) of images, in quarter turns."""
    height, width = shape
    return (0, 1, 2, 3) if height == width else (0, 2)


def _rotated(x: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Images [B, C, H, W], each rotated by a seeded one of `turns`, and the numbers of these [B]."""
    quarters = turns(x.shape[2:])
    y = torch.from_numpy(np.random.default_rng([1, step]).integers(0, len(quarters), len(x)))
    return torch.stack([torch.rot90(image, quarters[i], (1, 2)) for image, i in zip(x, y, strict=True)]), y


def _accuracy(net: LeNetFeatures, pack: Pack) -> float:
    """The share of right classes, attributes or rotations in the test split."""
    images, labels = pack.images("test"), pack.labels("test")
    if net.rotations or labels is None:
        quarters, upright = enumerate(turns(images.shape[2:])), np.asarray(images)
        return float(np.mean([net.predict(np.rot90(upright, k, (2, 3))) == i for i, k in quarters]))
    if labels.ndim == 2:
        return float(np.mean((net._map(net.net, images).numpy() > 0) == (labels > 0)))
    return float(np.mean(net.predict(images) == labels))


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
