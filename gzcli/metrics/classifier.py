"""Small classifiers of the data set itself, whose features are used to compare samples. They are trained
once, cached and checked.

Features of an ImageNet network are hardly informative about grey 28×28 digits, and its weights must be
downloaded. For a set without labels, or with labels that cannot be learned, a network classifies four
rotations (Gidaris et al. 2018, arXiv:1803.07728). Images that are not square have only the two rotations that
keep their shape.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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
from gzcli.metrics.networks import places
from gzcli.store import cache_files, files

FEATURES = 64
CLASSIFIER_STEPS, CLASSIFIER_BATCH = 1500, 128
SMALL_SET_EPOCHS, MIN_BATCH = (
    30,
    32,
)  # small sets use smaller batches, to get about this many epochs; least batch
WARMUP_SHARE = 0.07  # warm-up, as a share of the steps
SKILL = 0.25  # least accuracy beyond chance of a network that trains, as a share of the possible gain


class Classifier(nn.Module):
    """Images [B, C, H, W] in [0, 1] to 64 features, and these to logits."""

    def __init__(self, size: Size):
        super().__init__()
        height, width = sides(size)
        if min(height, width) < 8:
            small = f"images of {width}×{height} are too small"
            raise UsageError(f"{small} for the feature network, which needs 8×8")

    def features(self, x: Tensor) -> Tensor:
        """The features, [B, 64]."""
        raise NotImplementedError

    def logits(self, features: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.features(x))


@dataclass(frozen=True)
class Training:
    """How a network is built and trained."""

    recipe: str  # as in `networks.RECIPES`
    network: Callable[[int, Size, int], Classifier]  # by channels, size and number of outputs
    optimizer: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]
    augment: Callable[[Tensor], Tensor] | None
    smoothing: float = 0.0  # of the labels
    steps: int = CLASSIFIER_STEPS
    batch: int = CLASSIFIER_BATCH
    seed: int = 0

    def sized(self, images: int) -> Training:
        return replace(self, batch=min(self.batch, max(MIN_BATCH, SMALL_SET_EPOCHS * images // self.steps)))


@dataclass
class NetFeatures:
    """A trained network. Metrics in the features of different networks are not comparable."""

    net: Classifier
    hash: str  # hash of the weights; identifies the feature space
    accuracy: float  # accuracy on the test split, for classes or rotations; for attributes, balanced
    rotations: bool  # whether it classifies rotations
    device: torch.device
    batch: int = field(default=500, repr=False)  # number of images in a forward pass
    chance: float = 0.0  # accuracy without any skill: the share of the largest class

    @property
    def alive(self) -> bool:
        """Whether the network has learned its task. The features of a dead network are useless."""
        return self.accuracy - self.chance >= SKILL * (1 - self.chance)

    def is_dead(self, name: str) -> str:
        """The message that the network has not learned its task."""
        task = "to recognize rotations" if self.rotations else "its classes"
        what = f"accuracy {self.accuracy:.0%} on test images, {self.chance:.0%} by chance"
        return f"the judge network `{name}` did not learn {task} ({what})"

    @torch.no_grad()
    def features(self, images: np.ndarray | Pictures) -> np.ndarray:
        """The features float64 [N, 64] of images uint8 [N, C, H, W]."""
        batches = (images[i : i + self.batch] for i in range(0, len(images), self.batch))
        parts = [self.net.features(_to_input(batch).to(self.device)).cpu() for batch in batches]
        return torch.cat(parts).double().numpy()

    @torch.no_grad()
    def logits_of(self, features: np.ndarray) -> np.ndarray:
        """The logits float64 [N, K] of features [N, 64]."""
        rows = torch.from_numpy(np.asarray(features, np.float32)).to(self.device)
        return self.net.logits(rows).cpu().double().numpy()

    def predict(self, images: np.ndarray | Pictures) -> np.ndarray:
        """The predicted classes (or rotations) int64 [N] of images uint8 [N, C, H, W]."""
        return self.logits_of(self.features(images)).argmax(1)


def once(
    pack: Pack, training: Training, *, device: torch.device | str = "cpu", say: Say = silent
) -> NetFeatures:
    """The network of a data set, which comes with gz or is trained once. Training uses one CPU thread, so
    that equal machines get equal weights and hashes."""
    kind, shipped, path = training.recipe.partition("-")[0], *places(training.recipe, pack.meta)
    restored = partial(_restored, pack=pack, training=training, device=torch.device(device))

    def read(path: Path) -> NetFeatures:
        with files.reading(path):
            return restored(*files.read_tensors(path))

    if shipped.is_file():
        return read(shipped)
    waiting = f"waiting for another process that trains the feature network `{kind}`"
    with cache_files.exclusive(path, on_wait=lambda: say(waiting)):
        if net := cache_files.read(path, read, say):
            return net
        say(f"training the feature network `{kind}` of `{pack.meta.name}` (once, a minute or more)")
        net = _living(pack, training, say)
        meta = _task(pack, net.rotations) | {"accuracy": net.accuracy, "chance": net.chance}
        state, texts = net.net.state_dict(), {"judge": json.dumps(meta)}
        cache_files.write(path, partial(files.write_tensors, metadata=texts), state, say)
        return restored(state, texts)


def at_hand(pack: Pack, training: Training) -> bool:
    """Whether `once` has the network of a data set without training it."""
    return any(path.is_file() for path in places(training.recipe, pack.meta))


def _living(pack: Pack, training: Training, say: Say) -> NetFeatures:
    """A network trained on the classes or, if it does not learn them, on rotations. It is on the CPU."""
    images, labels = pack.images("train"), pack.labels("train")
    training, classes = training.sized(len(images)), len(pack.meta.classes) > 1 and labels is not None
    for rotations in (False, True) if classes else (True,):
        outputs = _task(pack, rotations)["outputs"]
        with _one_thread():
            net = trained(images, None if rotations else labels, outputs, training)
            judge = NetFeatures(net, "", 0.0, rotations, torch.device("cpu"))
            judge.accuracy, judge.chance = _skill(judge, pack)
        if judge.alive:
            break
        if not rotations:  # the user of a network that learned neither prints a note
            score = f"accuracy {judge.accuracy:.0%}, {judge.chance:.0%} by chance"
            say(f"the feature network did not learn its classes ({score}); training it on rotations instead")
    return judge


def trained(
    images: np.ndarray | Pictures, labels: np.ndarray | None, outputs: int, training: Training
) -> Classifier:
    """Trains a network reproducibly, on one CPU thread and with its own random numbers. Without labels it
    classifies rotations."""
    rng, order = np.random.default_rng(training.seed), np.empty(0, np.int64)
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(training.seed)
        net = training.network(images.shape[1], as_size(*images.shape[2:]), outputs)
        optimizer = training.optimizer(net.parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, steps=training.steps))
        for _ in range(training.steps):
            while len(order) < training.batch:
                order = np.concatenate([order, rng.permutation(len(images))])
            rows, order = np.sort(order[: training.batch]), order[training.batch :]
            x = _to_input(images[rows])
            x, y = _rotated(x) if labels is None else (x, torch.from_numpy(np.asarray(labels[rows])))
            loss = _loss(net(training.augment(x) if training.augment else x), y, training.smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def _rate(step: int, steps: int) -> float:
    """The factor of the learning rate: a warm-up, followed by half a cosine."""
    return min(1, (step + 1) / (WARMUP_SHARE * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _loss(logits: Tensor, y: Tensor, smoothing: float) -> Tensor:
    if y.ndim == 2:  # attributes
        targets = y.float() * (1 - smoothing) + smoothing / 2
        return nn.functional.binary_cross_entropy_with_logits(logits, targets)
    return nn.functional.cross_entropy(logits, y, label_smoothing=smoothing)


def _task(pack: Pack, rotations: bool) -> dict[str, Any]:
    channels, *shape = pack.meta.shape
    outputs = len(turns(shape)) if rotations else len(pack.meta.classes)
    return {"channels": channels, "size": as_size(*shape), "outputs": outputs, "rotations": rotations}


def _restored(
    state: dict[str, Tensor], texts: Mapping[str, str], pack: Pack, training: Training, device: torch.device
) -> NetFeatures:
    """The network of a file's tensors and metadata. Raises an error unless `once` made them for this set."""
    meta = json.loads(texts["judge"])
    accuracy, chance = float(meta.pop("accuracy")), float(meta.pop("chance"))
    task = _task(pack, bool(meta["rotations"]))
    if meta != json.loads(json.dumps(task)) or not (0 <= accuracy <= 1 and 0 <= chance <= 1):
        raise ValueError("it was trained on other images")
    with torch.device("meta"):  # leaves the global generator untouched
        net = training.network(task["channels"], task["size"], task["outputs"])
    expected = {name: (value.shape, value.dtype) for name, value in net.state_dict().items()}
    if {name: (value.shape, value.dtype) for name, value in state.items()} != expected:
        raise ValueError("its weights are those of another network")
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(state[name].numpy().tobytes())
    net.load_state_dict(state, assign=True)
    net.eval().requires_grad_(False).to(device)
    return NetFeatures(net, digest.hexdigest()[:16], accuracy, task["rotations"], device, chance=chance)


def _to_input(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(images).astype(np.float32)) / 255


def turns(shape: Sequence[int]) -> tuple[int, ...]:
    """The rotations that keep the shape (H, W) of images, in quarter turns."""
    height, width = shape
    return (0, 1, 2, 3) if height == width else (0, 2)


def _rotated(x: Tensor) -> tuple[Tensor, Tensor]:
    """Images [B, C, H, W], each rotated by a random one of `turns`, and the indices [B] of the rotations."""
    quarters = turns(x.shape[2:])
    y = torch.randint(len(quarters), (len(x),))
    return torch.stack([torch.rot90(image, quarters[i], (1, 2)) for image, i in zip(x, y, strict=True)]), y


def _skill(net: NetFeatures, pack: Pack) -> tuple[float, float]:
    """The accuracy on the test split, and the accuracy by chance. For attributes, it is the balanced accuracy
    (½ by chance), averaged over the attributes that have both values. Most images lack most attributes, so a
    network that detects none would have a high plain accuracy."""
    images, labels = pack.images("test"), pack.labels("test")
    if net.rotations or labels is None:
        quarters, upright = turns(images.shape[2:]), np.asarray(images)
        right = [net.predict(np.rot90(upright, k, (2, 3))) == i for i, k in enumerate(quarters)]
        return float(np.mean(right)), 1 / len(quarters)
    labels, logits = np.asarray(labels), net.logits_of(net.features(images))
    if labels.ndim == 1:
        return float(np.mean(logits.argmax(1) == labels)), float(np.bincount(labels).max() / len(labels))
    present, hits = labels > 0, (logits > 0) == (labels > 0)
    both = present.any(0) & ~present.all(0)
    shares = [(hits & side).sum(0)[both] / side.sum(0)[both] for side in (present, ~present)]
    return float(np.mean(shares)) if both.any() else 0.0, 0.5


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
