"""Faults of a set of images: near-duplicates, images that do not belong, and wrong labels.

All three read the features of EfficientNet-Lite0, at its last activations and at two earlier stages, which
describe textures and layout. A photograph needs the last ones; a digit or an X-ray needs the earlier ones.

* Two images may be copies if they are neighbours in features, which hardly change if an image is mirrored,
  moved or compressed. They are copies if their fine details agree after alignment, and agree beyond what
  similar images share: the plates of a production line agree in everything but their noise.
* An image does not belong if its k-th neighbour is far away. k exceeds the number of foreign images that
  resemble each other.
* A label is wrong if a classifier that was not fitted to the image prefers another class (Northcutt et al.
  2021, arXiv:1911.00068, rank labels by the same margin).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from gzcli.metrics.pretrained import MEAN, STD, lite_net, lite_weights

ROWS_AT_ONCE = 1024  # rows of a matrix of distances, or pairs of images, that are computed together

# ---------------------------------------------------------------------------- features

NETWORK_SIDE = 160  # side of the network's inputs: half the cost of 224, and as accurate for small images
LAYOUT_SIDE = 3  # places per side at which earlier activations are averaged
MAX_WIDTH = 1280  # features of the last activations


@dataclass(frozen=True)
class Features:
    """Features of N images, float16.

    objects: mean of the last activations, [N, 1280].
    fine, coarse: means and standard deviations of the channels at strides 8 and 16, [N, 80] and [N, 224].
    layout: averages of these channels at 3 × 3 places, [N, 1368].
    """

    objects: np.ndarray
    fine: np.ndarray
    coarse: np.ndarray
    layout: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence[Features]) -> Features:
        return cls(*(np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(cls)))

    def some(self, index: np.ndarray) -> Features:
        return Features(*(getattr(self, each.name)[index] for each in fields(self)))

    @cached_property
    def directions(self) -> np.ndarray:
        """Square roots of the last activations, scaled to length 1, float32 [N, 1280]. The roots keep a few
        strong features from hiding the rest."""
        roots = np.sqrt(self.objects.astype(np.float32))
        return roots / np.maximum(np.linalg.norm(roots, axis=1, keepdims=True), 1e-6)

    @property
    def together(self) -> np.ndarray:
        """All features, standardised, float32 [N, 2952]. The last and the earlier activations weigh the
        same."""
        early = [self.fine, self.coarse, self.layout]
        weight = (MAX_WIDTH / sum(part.shape[1] for part in early)) ** 0.5
        parts = [standardised(self.objects), *(weight * standardised(part) for part in early)]
        return np.concatenate(parts, 1)


def describer(device: torch.device) -> Callable[[np.ndarray], Features]:
    """A function from images uint8 [B, 3, NETWORK_SIDE, NETWORK_SIDE] to their features."""
    net = lite_net(lite_weights()[0]).to(device)
    stages = net.tapped()
    children = [child for stage in stages for child in stage.children()]
    last = net.layers[len(children) :]

    @torch.inference_mode()
    def describe(images: np.ndarray) -> Features:
        x = torch.from_numpy(images).to(device).float() / 255
        x = ((x - MEAN) / STD).contiguous(memory_format=torch.channels_last)
        statistics, layout = [], []
        for stage in stages:
            x = stage(x)
            deviation, mean = torch.std_mean(x, (2, 3))
            statistics.append(torch.cat([mean, deviation], 1))
            layout.append(F.adaptive_avg_pool2d(x, LAYOUT_SIDE).flatten(1))
        parts = last(x).mean((2, 3)), *statistics, torch.cat(layout, 1)
        return Features(*(part.half().cpu().numpy() for part in parts))

    return describe


def standardised(values: np.ndarray) -> np.ndarray:
    """Columns with mean 0 and standard deviation 1, float32. Constant columns become 0."""
    values = values.astype(np.float32)
    return (values - values.mean(0)) / (values.std(0) + 1e-6)


@dataclass(frozen=True)
class Neighbours:
    """The nearest other images of each image in order: distances float32 [N, K], positions [N, K]."""

    distances: np.ndarray
    positions: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray, k: int, device: torch.device) -> Neighbours:
        """The k nearest other rows of each row."""
        x = torch.from_numpy(rows).to(device)
        lengths = (x * x).sum(1)
        parts = []
        for start in range(0, len(x), ROWS_AT_ONCE):
            some = x[start : start + ROWS_AT_ONCE]
            squares = (some * some).sum(1, keepdim=True) + lengths - 2 * some @ x.T
            squares.diagonal(start).fill_(torch.inf)
            nearest = squares.topk(min(k, len(x) - 1), largest=False)
            parts.append((nearest.values.clamp(min=0).sqrt().cpu().numpy(), nearest.indices.cpu().numpy()))
        return cls(*map(np.concatenate, zip(*parts, strict=True)))


@dataclass(frozen=True)
class Neighbourhood:
    """The neighbours of images by their last activations (`Features.directions`) and by both earlier ones."""

    objects: Neighbours
    fine: Neighbours
    coarse: Neighbours

    @classmethod
    def of(cls, features: Features, device: torch.device) -> Neighbourhood:
        k = max(MAX_CANDIDATES + PEER_IMAGES, MAX_RANK)
        rows = features.directions, standardised(features.fine), standardised(features.coarse)
        return cls(*(Neighbours.of(part, k, device) for part in rows))


# ---------------------------------------------------------------------------- images that do not belong

FEWEST_IMAGES = 20  # of fewer images, none is called foreign
GROUP_SHARE, MIN_RANK, MAX_RANK = (
    1 / 40,
    5,
    50,
)  # rank k of the neighbour, as a share of the images and its limits
MIN_DEVIATION = 2.25  # standard deviations above the median of an image that does not belong
# quantiles of a normal distribution, and their standard deviations above its median
UPPER_QUANTILE, FAR_QUANTILE, FAR_DEVIATIONS = 0.84, 0.975, 1.96


def foreign(neighbourhood: Neighbourhood) -> tuple[np.ndarray, np.ndarray]:
    """The p-value of each image, [N], and whether it does not belong, bool [N].

    An image is held out of the images that it is compared with. All N scores are thus exchangeable if all
    images belong, and the rank of a score is a valid p-value (Vovk et al. 2005, §2.2). Some image always has
    the lowest rank, so the distance decides which images do not belong.
    """
    far = deviations(neighbourhood)
    p = (len(far) - np.searchsorted(np.sort(far), far)) / len(far)
    tail = max(
        1.0, np.quantile(far, FAR_QUANTILE) / FAR_DEVIATIONS
    )  # distances may spread more than normal ones
    return p, far >= MIN_DEVIATION * tail


def deviations(neighbourhood: Neighbourhood) -> np.ndarray:
    """How far each image is from the others, in robust standard deviations above the median, [N]."""
    rank = rank_of(len(neighbourhood.objects.distances))
    parts = neighbourhood.objects, neighbourhood.fine, neighbourhood.coarse
    distances = (np.log(np.maximum(part.distances[:, rank - 1], 1e-6)) for part in parts)
    objects, fine, coarse = map(robust, distances)
    return robust(objects + (fine + coarse) / 2)


def rank_of(n: int) -> int:
    """The rank of the neighbour whose distance counts, for n images."""
    return max(1, min(round(np.clip(n * GROUP_SHARE, MIN_RANK, MAX_RANK)), n - 1))


def robust(values: np.ndarray) -> np.ndarray:
    """Values as deviations above their median."""
    middle, upper = np.quantile(values, (0.5, UPPER_QUANTILE))
    return (values - middle) / max(upper - middle, 1e-6)


# ---------------------------------------------------------------------------- copies

MAX_CANDIDATES = 10  # nearest neighbours by the last activations that may be copies
MAX_FURTHER_CANDIDATES = (
    3  # and by earlier activations, and by fine details, which alone tell images of one thing apart
)
DETAIL_PROJECTIONS = 512  # random projections of fine details
PEER_IMAGES = 6  # neighbours of both kinds after the candidates, which show what similar images share
DOUBTFUL_PAIRS = 3  # of an image, those that agree most, which are compared with its peers
MIN_THUMBNAIL_SIDE, THUMBNAIL_SIDE = 16, 96  # smallest and largest side at which images are compared
COARSE_SIDE = 24  # side at which most candidates are refused
BLUR_PIXELS = 2.0  # standard deviation in pixels of the blur that is subtracted to obtain fine details
MAX_SHIFT_SHARE = 0.1  # of the side of an image
MIN_SHIFT = 2  # pixels by which a copy may be moved, whatever its side
COARSE_AGREEMENT = 0.6  # least correlation of the details of candidates at the coarse side
MIN_AGREEMENT = 0.75  # least correlation of the details of copies
CERTAIN_AGREEMENT = 0.985  # correlation that only copies reach, however similar the images of a set are
LEAST_BEYOND = 0.5  # least correlation of copies beyond what similar images share
BEYOND_DEVIATIONS = 5.5  # by which this correlation exceeds that of similar images, after Fisher's transform
UPPER_TAIL, TAIL_DEVIATIONS = 0.95, 1.645  # a quantile, and its value in a standard normal distribution
NULL_PAIRS = 400  # pairs of similar images whose correlations are compared


@dataclass(frozen=True)
class Copies:
    """P pairs of images that show the same.

    pairs: positions, the smaller one first, [P, 2].
    agreement: correlation of their details after alignment, [P].
    mirrored: whether the second is a mirror image, bool [P].
    shift: pixels by which it is moved down and to the right, at the side of the thumbnails, [P, 2].
    """

    pairs: np.ndarray
    agreement: np.ndarray
    mirrored: np.ndarray
    shift: np.ndarray


class Aligner:
    """Aligns images by their fine details.

    thumbnails: grey images uint8 [N, S, S].
    """

    def __init__(self, thumbnails: np.ndarray, device: torch.device):
        self.thumbnails, self.device = thumbnails, device
        self.side = thumbnails.shape[-1]
        self.margin = max(MIN_SHIFT, round(MAX_SHIFT_SHARE * self.side))
        blur = gaussian_filter1d(np.eye(self.side, dtype=np.float32), BLUR_PIXELS, axis=0)
        self.blur = torch.from_numpy(blur).to(device)
        # frequencies in radians per pixel
        down = torch.fft.fftfreq(self.side, device=device)[:, None]
        across = torch.fft.rfftfreq(self.side, device=device)[None]
        self.frequencies = 2 * torch.pi * down, 2 * torch.pi * across

    def details(self, index: np.ndarray) -> Tensor:
        """What a blur removes, float32 [B, S, S]."""
        x = torch.from_numpy(self.thumbnails[index]).to(self.device).float()
        return x - self.blur @ x @ self.blur.T

    def projections(self) -> np.ndarray:
        """Random projections of the details without their mean, which keep the correlations of images,
        float32 [N, DETAIL_PROJECTIONS]."""
        rng = np.random.default_rng(0)
        directions = rng.standard_normal((self.side**2, DETAIL_PROJECTIONS), np.float32)
        onto = torch.from_numpy(directions).to(self.device)
        mean = sum(part.sum(0) for part in self._all_details()) / len(self.thumbnails)
        parts = [F.normalize((part - mean).flatten(1)) @ onto for part in self._all_details()]
        return torch.cat(parts).cpu().numpy()

    def _all_details(self) -> Iterator[Tensor]:
        every = np.arange(len(self.thumbnails))
        return (self.details(every[start : start + ROWS_AT_ONCE]) for start in every[::ROWS_AT_ONCE])

    def align(self, pairs: np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The details of pairs of images after alignment, without a margin, [B, D] each with mean 0; whether
        the second image is mirrored, [B]; and the pixels by which it is moved (down, right), [B, 2]."""
        m, width = self.margin, 2 * self.margin + 1
        a, b = self.details(pairs[:, 0]), self.details(pairs[:, 1])
        spectrum, images = torch.fft.rfft2(a), (b, b.flip(-1))
        both = [torch.fft.rfft2(image) for image in images]
        heights = []
        for of_image in both:
            correlation = torch.fft.irfft2(spectrum * of_image.conj(), s=a.shape[1:])
            rows = torch.cat([correlation[:, -m:], correlation[:, : m + 1]], 1)
            heights.append(torch.cat([rows[..., -m:], rows[..., : m + 1]], 2))
        surface = torch.stack(heights, 1)  # [B, 2, width, width]
        best = surface.flatten(1).argmax(1)
        mirrored, row, column = best >= width**2, best % width**2 // width, best % width
        peaks = surface[torch.arange(len(a)), mirrored.long()]
        shift = torch.stack([vertex(peaks, row, column), vertex(peaks.mT, column, row)], 1) - m
        turn = sum(
            part[None] * offset[:, None, None] for part, offset in zip(self.frequencies, shift.T, strict=True)
        )
        moved = torch.where(mirrored[:, None, None], both[1], both[0]) * torch.polar(
            torch.ones_like(turn), -turn
        )
        moved = torch.fft.irfft2(moved, s=a.shape[1:])
        inside = slice(m, self.side - m)
        return centred(a[:, inside, inside]), centred(moved[:, inside, inside]), mirrored, -shift

    def shared(self, index: np.ndarray, peers: np.ndarray, counts: np.ndarray) -> Tensor:
        """What images share with their peers [B, K]: orthonormal rows [B, K, D] that span the aligned details
        of those that count, bool [B, K]."""
        pairs = np.stack([np.repeat(index, peers.shape[1]), peers.ravel()], 1)
        details = self.align(pairs)[1].reshape(*peers.shape, -1)
        details = F.normalize(details, dim=2) * torch.from_numpy(counts[..., None]).to(self.device)
        return torch.linalg.qr(details.mT).Q.mT


def vertex(peaks: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """The row of the maximum of each surface [B, W, W] to a fraction of a pixel, by a parabola through the
    values beside its largest one, which is at `row` and `column`."""
    every, last = torch.arange(len(peaks)), peaks.shape[1] - 1
    below, at, above = (peaks[every, (row + step).clamp(0, last), column] for step in (-1, 0, 1))
    bend = 2 * at - below - above
    offset = torch.where(bend > 0, (above - below) / (2 * bend.clamp(min=1e-6)), 0)
    return row + torch.where((row > 0) & (row < last), offset.clamp(-0.5, 0.5), 0)


def centred(images: Tensor) -> Tensor:
    rows = images.flatten(1)
    return rows - rows.mean(1, keepdim=True)


def correlations(a: Tensor, b: Tensor) -> Tensor:
    """The correlation of each row, [B]; 0 if a row is constant."""
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-6)


def near_copies(thumbnails: np.ndarray, neighbourhood: Neighbourhood, device: torch.device) -> Copies:
    """The copies among N images, of grey thumbnails uint8 [N, S, S]."""
    aligner, by_objects = Aligner(thumbnails, device), neighbourhood.objects.positions
    by_details = Neighbours.of(aligner.projections(), MAX_FURTHER_CANDIDATES + PEER_IMAGES, device).positions
    by_coarse = neighbourhood.coarse.positions
    pairs = unique_pairs(
        by_objects[:, :MAX_CANDIDATES],
        by_coarse[:, :MAX_FURTHER_CANDIDATES],
        by_details[:, :MAX_FURTHER_CANDIDATES],
    )
    if aligner.side > 2 * COARSE_SIDE:
        images = torch.from_numpy(thumbnails)[:, None]
        reduced = F.interpolate(images, (COARSE_SIDE,) * 2, mode="bilinear", antialias=True)
        alike = agreements(Aligner(reduced[:, 0].numpy(), device), pairs)[:, 0]
        pairs = pairs[alike >= COARSE_AGREEMENT]
    table = agreements(aligner, pairs)
    similar = table[:, 0] >= MIN_AGREEMENT
    pairs, table = pairs[similar], table[similar]
    copies = table[:, 0] >= CERTAIN_AGREEMENT
    peers = np.concatenate(
        [
            by_objects[:, MAX_CANDIDATES : MAX_CANDIDATES + PEER_IMAGES],
            by_details[:, MAX_FURTHER_CANDIDATES:],
        ],
        1,
    )
    doubtful = np.flatnonzero(~copies & (places_of(pairs, table[:, 0]) < DOUBTFUL_PAIRS))
    if len(doubtful) and peers.shape[1] == 2 * PEER_IMAGES:
        limit = least_beyond(aligner, by_objects, peers)
        copies[doubtful] = beyond(aligner, pairs[doubtful], peers) >= limit
    pairs, table = pairs[copies], table[copies]
    return Copies(pairs, table[:, 0], table[:, 1] > 0, table[:, 2:])


def unique_pairs(*neighbours: np.ndarray) -> np.ndarray:
    """The pairs of each image with its neighbours [N, K], each pair once, the smaller position first."""
    every = np.arange(len(neighbours[0]))[:, None]
    pairs = [np.stack(np.broadcast_arrays(every, part), 2).reshape(-1, 2) for part in neighbours]
    return np.unique(np.sort(np.concatenate(pairs), 1), axis=0)


def places_of(pairs: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The place of each pair among those of the same first image, 0 for the highest value, [P]."""
    order = np.lexsort((-values, pairs[:, 0]))
    _, start, count = np.unique(pairs[order, 0], return_index=True, return_counts=True)
    places = np.empty(len(pairs), np.int64)
    places[order] = np.arange(len(pairs)) - np.repeat(start, count)
    return places


def groups(n: int, pairs: np.ndarray) -> np.ndarray:
    """The number of the group of each of n images that pairs of copies connect, [n]."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    links = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    return connected_components(links, directed=False)[1]


def agreements(aligner: Aligner, pairs: np.ndarray) -> np.ndarray:
    """For each pair: the correlation of its details, whether it is mirrored, and its shift, [P, 4]."""
    parts = [np.zeros((0, 4), np.float32)]
    for start in range(0, len(pairs), ROWS_AT_ONCE):
        a, b, mirrored, shift = aligner.align(pairs[start : start + ROWS_AT_ONCE])
        parts.append(torch.cat([correlations(a, b)[:, None], mirrored[:, None], shift], 1).cpu().numpy())
    return np.concatenate(parts)


def beyond(aligner: Aligner, pairs: np.ndarray, peers: np.ndarray) -> np.ndarray:
    """The correlation of the details of each pair beyond what the peers [N, K] of its first image explain.
    Peers are no close neighbours, because these may be copies too."""
    values = np.zeros(len(pairs), np.float32)
    images, member = np.unique(pairs[:, 0], return_inverse=True)
    for start in range(0, len(images), ROWS_AT_ONCE // peers.shape[1]):
        some = images[start : start + ROWS_AT_ONCE // peers.shape[1]]
        places = np.flatnonzero((member >= start) & (member < start + len(some)))
        partner = np.zeros((len(some), len(peers)), bool)
        partner[member[places] - start, pairs[places, 1]] = True
        shared = aligner.shared(some, peers[some], ~np.take_along_axis(partner, peers[some], 1))
        a, b, _, _ = aligner.align(pairs[places])
        rows = shared[torch.from_numpy(member[places] - start)]
        a, b = (x - torch.einsum("bk,bkd->bd", torch.einsum("bkd,bd->bk", rows, x), rows) for x in (a, b))
        values[places] = correlations(a, b).cpu().numpy()
    return values


def least_beyond(aligner: Aligner, nearest: np.ndarray, peers: np.ndarray) -> float:
    """The correlation that similar images do not reach beyond what their peers explain. Few neighbours are
    copies, so the correlations of neighbours show it."""
    first = np.random.default_rng(0).permutation(len(nearest))[:NULL_PAIRS]
    pairs = np.stack([first, nearest[first, MAX_CANDIDATES // 2]], 1)
    usual = np.arctanh(np.clip(beyond(aligner, pairs, peers), -0.999, 0.999))
    middle, tail = np.quantile(usual, (0.5, UPPER_TAIL))
    limit = np.tanh(middle + BEYOND_DEVIATIONS * (tail - middle) / TAIL_DEVIATIONS)
    return float(np.clip(limit, LEAST_BEYOND, CERTAIN_AGREEMENT))


# ---------------------------------------------------------------------------- wrong labels

LABEL_FOLDS, LABEL_ROUNDS = (
    5,
    3,
)  # each round divides the images anew, which averages the chance of a division
MANY_IMAGES = 10_000  # above which one round suffices
LABEL_COMPONENTS = 256  # principal components that the classifier reads
INVERSE_PENALTY = 3.0  # inverse strength of its regularisation
MIN_CLASS_IMAGES = LABEL_FOLDS  # a smaller class has folds without it, so its labels are not judged
MIN_PROBABILITY = 1e-9  # of a class that a fold does not know
POWER_LIMITS = (0.5, 8.0)  # limits of the power of `calibrated`
LABEL_ODDS = 10.0  # how many times more probable another class is than the label of a suspect


def class_probabilities(features: Features, labels: np.ndarray, group: np.ndarray) -> np.ndarray:
    """The probabilities [N, K] of classes by classifiers that were not fitted to the image, nor to a copy.

    labels: 0 … K − 1, [N], each with at least MIN_CLASS_IMAGES images.
    group: number of each image's group of copies, [N].
    """
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression

    n, rng = len(labels), np.random.default_rng(0)
    count = min(LABEL_COMPONENTS, n - 1)
    x = PCA(count, svd_solver="randomized", random_state=0).fit_transform(features.together)
    x /= np.sqrt((x**2).sum(1).mean())
    total = np.zeros((n, labels.max() + 1))
    rounds = LABEL_ROUNDS if n <= MANY_IMAGES else 1
    for _ in range(rounds):
        fold = folds_of(labels, group, rng)
        for k in range(LABEL_FOLDS):
            held_out = fold == k
            judge = LogisticRegression(C=INVERSE_PENALTY, max_iter=300).fit(x[~held_out], labels[~held_out])
            total[np.ix_(held_out, judge.classes_)] += judge.predict_proba(x[held_out]) / rounds
    return calibrated(total, labels)


def calibrated(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Probabilities to the power that maximises the likelihood of the labels (temperature scaling, Guo et al.
    2017, arXiv:1706.04599). A regularised judge of few images is too cautious. All odds change by the same
    power, so their order stays."""
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    logs = np.log(np.maximum(probabilities, MIN_PROBABILITY))
    every = np.arange(len(labels))

    def loss(power: float) -> float:
        return -float(log_softmax(power * logs, 1)[every, labels].mean())

    best = minimize_scalar(loss, bounds=POWER_LIMITS, method="bounded").x
    return np.exp(log_softmax(best * logs, 1))


def folds_of(labels: np.ndarray, group: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A fold for each image, [N]. Each has as many images of a class as the others, and all copies of its
    images."""
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    fold = np.empty(len(labels), np.int64)
    fold[order] = np.arange(len(labels)) % LABEL_FOLDS
    _, first, member = np.unique(group, return_index=True, return_inverse=True)
    return fold[first][member]


def suspects(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The odds [N] of the most probable other class against the label, and that class, [N]."""
    every = np.arange(len(labels))
    rivals = probabilities.copy()
    rivals[every, labels] = -1
    rival = rivals.argmax(1)
    return rivals[every, rival] / np.maximum(probabilities[every, labels], 1e-12), rival
