"""The data sets known by name: shape, classes, files with checksums, licence. Metadata only; nothing heavy is imported.

Adding a set is one entry here and one parser in `parsers.py` (or `embedded.py`) under the same name.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataFile:
    """A file as its publisher serves it; `urls` are tried in order, `size` is in bytes."""

    name: str
    urls: tuple[str, ...]
    size: int
    md5: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class DataSpec:
    """A data set: images [channels, size, size] with `levels` grey levels; `classes` is () where it has no labels."""

    name: str
    title: str
    classes: tuple[str, ...]
    channels: int
    size: int
    n_train: int  # the official training split, from which validation is carved
    n_test: int
    licence: str
    citation: str
    levels: int = 256
    multilabel: bool = False
    files: tuple[DataFile, ...] = ()
    embedded: bool = False  # made from what is installed; nothing to download

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        return self.channels, self.size, self.size

    @property
    def download_size(self) -> int:
        """Bytes to fetch."""
        return sum(file.size for file in self.files)


def find(name: str) -> DataSpec:
    """The set of this name, `-` and `_` alike. Raises UsageError with the nearest name."""
    from gzcli.errors import UsageError, canonical, did_you_mean

    for spec in SPECS.values():
        if canonical(spec.name) == canonical(name):
            return spec
    raise UsageError(
        f"there is no data set `{name}`",
        hint=did_you_mean(name, SPECS) or "`gz data list` shows the names; a path works too",
    )


def _files(bases: tuple[str, ...], *rows: tuple[str, int, str]) -> tuple[DataFile, ...]:
    """Files (name, size, md5) served under each of the base addresses."""
    return tuple(DataFile(name, tuple(base + name for base in bases), size, md5=md5) for name, size, md5 in rows)


_DIGITS = tuple("0123456789")
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_FASHION = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_UCI = "Alpaydin & Kaynak 1998, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository"

_ALL = (
    DataSpec(
        "digits", "scikit-learn's handwritten digits, 8×8 doubled to 16×16",
        classes=_DIGITS, channels=1, size=16, levels=17, n_train=1442, n_test=355, embedded=True,
        licence="CC BY 4.0", citation=_UCI,
    ),
    DataSpec(
        "patches", "32×32 patches of scikit-learn's two sample photographs",
        classes=("china", "flower"), channels=3, size=32, n_train=1328, n_test=104, embedded=True,
        licence="CC BY 2.0", citation="photographs by danielbuechele and vultilion (flickr), 2011",
    ),
    DataSpec(
        "digits-ab", "digits in two unpaired domains: A white on black, B black on white",
        classes=("A", "B"), channels=1, size=16, levels=17, n_train=1442, n_test=355, embedded=True,
        licence="CC BY 4.0", citation=_UCI,
    ),
    DataSpec(
        "digits-captioned", "digits with a caption each",
        classes=_DIGITS, channels=1, size=16, levels=17, n_train=1442, n_test=355, embedded=True,
        licence="CC BY 4.0", citation=_UCI,
    ),
    DataSpec(
        "mnist", "handwritten digits",
        classes=_DIGITS, channels=1, size=28, n_train=60_000, n_test=10_000,
        licence="CC BY-SA 3.0", citation="LeCun, Cortes & Burges 1998, The MNIST database of handwritten digits",
        files=_files(
            ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/"),
            ("train-images-idx3-ubyte.gz", 9_912_422, "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
            ("train-labels-idx1-ubyte.gz", 28_881, "d53e105ee54ea40749a09fcbcd1e9432"),
            ("t10k-images-idx3-ubyte.gz", 1_648_877, "9fb629c4189551a2d022fa330f9573f3"),
            ("t10k-labels-idx1-ubyte.gz", 4_542, "ec29112dd5afa0611ce80d1b7f02629c"),
        ),
    ),
    DataSpec(
        "fashionmnist", "Zalando's article images",
        classes=_FASHION, channels=1, size=28, n_train=60_000, n_test=10_000,
        licence="MIT", citation="Xiao, Rasul & Vollgraf 2017, arXiv:1708.07747",
        files=_files(
            ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
             "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"),
            ("train-images-idx3-ubyte.gz", 26_421_880, "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
            ("train-labels-idx1-ubyte.gz", 29_515, "25c81989df183df01b3e8a0aad5dffbe"),
            ("t10k-images-idx3-ubyte.gz", 4_422_102, "bef4ecab320f06d8554ea6380940ec79"),
            ("t10k-labels-idx1-ubyte.gz", 5_148, "bb300cfdad3c16e7a12a480ee83cd310"),
        ),
    ),
    DataSpec(
        "cifar10", "tiny images of ten classes",
        classes=_CIFAR10, channels=3, size=32, n_train=50_000, n_test=10_000,
        licence="not stated by the publisher",
        citation="Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images",
        files=_files(
            ("https://www.cs.toronto.edu/~kriz/",),
            ("cifar-10-python.tar.gz", 170_498_071, "c58f30108f718f92721af3b95e74349a"),
        ),
    ),
)  # fmt: skip

SPECS: dict[str, DataSpec] = {spec.name: spec for spec in _ALL}
