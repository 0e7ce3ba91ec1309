"""Images in Python's memory that are no images, or not clearly: each is refused in words, none is misread."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from refused import refused

import gzcli
from gzcli.data.readers.memory import MAX_BYTES, stored

pytestmark = pytest.mark.usefixtures("home")

N = 12
X = np.random.default_rng(0).integers(0, 256, (N, 8, 8), dtype=np.uint8)
REAL = torch.rand(N, 1, 8, 8)
EVERY_OTHER = [1 + i % 2 for i in range(N)]


def picture(numbers, mode="uint8") -> Image.Image:
    return Image.fromarray(np.asarray(numbers, mode))


def truncated() -> Image.Image:
    file = io.BytesIO()
    picture(np.random.default_rng(0).integers(0, 256, (64, 64))).save(file, "PNG")
    return Image.open(io.BytesIO(file.getvalue()[:2000]))


def closed() -> Image.Image:
    image = picture(X[0])
    image.close()
    return image


class Iterable:
    """Images without end, as of a data set that is drawn."""

    def __init__(self, image):
        self.image = image

    def __iter__(self):
        return itertools.repeat(self.image)


REFUSED = {
    "truncated": (
        lambda: [*map(picture, X), truncated()],
        "item 12 of `data` cannot be decoded: .*truncated",
    ),
    "closed": (lambda: [picture(X[0]), closed()], "item 1 of `data` cannot be decoded: .*closed"),
    "no pixels": (lambda: [picture(X[0]), Image.new("L", (0, 8))], "item 1 .* it has no pixels"),
    "an empty side": (lambda: np.zeros((N, 0, 8), np.uint8), r"shape \(12, 0, 8\)"),
    "32 bits of two sizes": (
        lambda: [picture(X[0][: 4 + i % 2], "int32") for i in range(N)],
        "item 0 .* mode `I`",
    ),
    "32 bits among 8": (lambda: [picture(X[0]), picture(X[1], "int32")], "item 1 of `data` has the mode `I`"),
    "floats of two sizes": (
        lambda: [picture(X[0][: 4 + i % 2], "float32") for i in range(N)],
        "the mode `F`",
    ),
    "sparse": (REAL.to_sparse, "`data` is a tensor that numpy cannot read: .*sparse"),
    "sparse items": (lambda: [x.to_sparse() for x in REAL], "item 0 of `data` is a tensor .*sparse"),
    "float8": (lambda: REAL.to(torch.float8_e4m3fn), "cannot read: torch.float8_e4m3fn"),
    "quantized": (lambda: torch.quantize_per_tensor(REAL, 0.1, 0, torch.quint8), "torch.quint8"),
    "without values": (lambda: REAL.to("meta"), "the device meta"),
    "conjugated": (lambda: REAL.to(torch.complex64).conj(), "torch.complex64"),
    "masked": (lambda: np.ma.masked_array(X, X > 100), "`data` is a masked array"),
    "masked items": (lambda: list(np.ma.masked_array(X, X > 100)), "item 0 of `data` is a masked array"),
    "a split twice": (lambda: {"train": X, "training": X}, "`train`, `training`"),
    "a class": (lambda: dict, "`data` is a `type`, not images"),
    "ragged labels": (lambda: (X, [[1] * n for n in EVERY_OTHER]), "labels of `data` have several lengths"),
    "ragged items": (lambda: [(x, [1] * n) for x, n in zip(X, EVERY_OTHER, strict=True)], "several lengths"),
    "ragged tensors": (lambda: [(x, torch.ones(n)) for x, n in zip(X, EVERY_OTHER, strict=True)], "several"),
    "labels of objects": (lambda: (X, [{}] * N), "labels of type object"),
    "labels of bytes": (lambda: (X, [b"cat"] * N), "labels of type |S3"),
    "endless labels": (lambda: (X, np.full(N, np.inf)), "labels of type float64"),
    "masked labels": (
        lambda: (X, np.ma.masked_array(np.ones(N, int), np.arange(N) == 1)),
        "labels is a masked",
    ),
    "float8 labels": (
        lambda: (X, torch.ones(N).to(torch.float8_e5m2)),
        "labels is a tensor .* torch.float8_e5m2",
    ),
}


@pytest.mark.filterwarnings("ignore:torch.quantize")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused(case):
    make, words = REFUSED[case]
    assert refused(words, stored, make()).hint


def test_data_without_an_end_have_a_limit():
    large = np.broadcast_to(np.uint8(0), (50_000, 50_000))  # one byte of memory
    assert 3 * large.nbytes < MAX_BYTES < 4 * large.nbytes
    for data in (Iterable(large), ((large, 1) for _ in itertools.count()), {"train": Iterable(large)}):
        assert (
            "islice"
            in refused("has no length and returns more than 1,000,000 images or 8.0 GB", stored, data).hint
        )


def test_labels_of_splits_have_one_shape():
    data = {"train": (X, np.arange(N) % 3), "test": (X, np.eye(N, 3, dtype=int))}
    refused("the labels of the splits of .* have different shapes", gzcli.open_data, data)


def test_numbers_of_32_bits_keep_their_values(tmp_path):
    for low in (0, 300, 70_000, -5):
        pictures = [picture(np.full((8, 8), low + i), "int32") for i in range(N)]
        arrays = np.stack([np.asarray(image) for image in pictures])
        assert stored(pictures) == stored(arrays)
    filled = np.ma.masked_array(X, np.zeros_like(X, bool))
    assert stored(filled) == stored(X), "nothing is masked"
    assert stored((X, torch.ones(N, dtype=torch.bfloat16))) == stored((X, [1] * N))
    assert stored(torch._neg_view(-REAL)) == stored(REAL)
