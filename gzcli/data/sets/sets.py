"""The data sets known by name. Metadata only, no heavy import.

Adding a set is one entry here and one parser in `parsers.py` (or `embedded.py`) under the same name. Sizes
and checksums are the publishers' own.
"""

from __future__ import annotations

from gzcli.core.errors import UsageError, did_you_mean, matching
from gzcli.data.sets.installed import INSTALLED
from gzcli.data.sets.medmnist import MEDMNIST
from gzcli.data.sets.specs import DataFile, DataSpec, listed


def find(name: str) -> DataSpec:
    """The set of this name, `-` and `_` alike. Raises UsageError with the nearest name."""
    if known := matching(name, SPECS):
        return SPECS[known]
    raise UsageError(
        f"there is no data set `{name}`",
        hint=did_you_mean(name, SPECS) or "`gz data list` shows the names; a path works too",
    )


def _files(bases: tuple[str, ...], *rows: tuple[str, int, str]) -> tuple[DataFile, ...]:
    """Files (name, bytes, md5) served under each of the base addresses."""
    return tuple(
        DataFile(name, tuple(base + name for base in bases), size, md5=md5) for name, size, md5 in rows
    )


def _drive(name: str, id_: str, size: int, md5: str) -> DataFile:
    """A file on Google Drive, which serves it without a browser until its quota is used up."""
    url = f"https://drive.usercontent.google.com/download?id={id_}&export=download&confirm=t"
    return DataFile(name, (url,), size, md5=md5)


def _cifar(name: str, title: str, classes: tuple[str, ...] | int, file: tuple[str, int, str]) -> DataSpec:
    return DataSpec(
        name,
        title,
        classes,
        channels=3,
        size=32,
        n_train=50_000,
        n_test=10_000,
        licence="not stated by the publisher",
        citation="Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images",
        files=_files(("https://www.cs.toronto.edu/~kriz/",), file),
    )


_DIGITS = tuple("0123456789")
_CIFAR10 = listed("airplane; automobile; bird; cat; deer; dog; frog; horse; ship; truck")
_FASHION = listed("T-shirt/top; Trouser; Pullover; Dress; Coat; Sandal; Shirt; Sneaker; Bag; Ankle boot")
_IMAGENETTE = listed(
    "tench; English springer; cassette player; chain saw; church; French horn; garbage truck; gas pump; "
    "golf ball; parachute"
)

_ALL = (
    *INSTALLED,
    DataSpec(
        "mnist",
        "handwritten digits",
        classes=_DIGITS,
        channels=1,
        size=28,
        n_train=60_000,
        n_test=10_000,
        licence="CC BY-SA 3.0",
        citation="LeCun, Cortes & Burges 1998, The MNIST database of handwritten digits",
        files=_files(
            ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/"),
            ("train-images-idx3-ubyte.gz", 9_912_422, "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
            ("train-labels-idx1-ubyte.gz", 28_881, "d53e105ee54ea40749a09fcbcd1e9432"),
            ("t10k-images-idx3-ubyte.gz", 1_648_877, "9fb629c4189551a2d022fa330f9573f3"),
            ("t10k-labels-idx1-ubyte.gz", 4_542, "ec29112dd5afa0611ce80d1b7f02629c"),
        ),
    ),
    DataSpec(
        "fashionmnist",
        "Zalando's article images",
        classes=_FASHION,
        channels=1,
        size=28,
        n_train=60_000,
        n_test=10_000,
        licence="MIT",
        citation="Xiao, Rasul & Vollgraf 2017, arXiv:1708.07747",
        files=_files(
            (
                "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
            ),
            ("train-images-idx3-ubyte.gz", 26_421_880, "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
            ("train-labels-idx1-ubyte.gz", 29_515, "25c81989df183df01b3e8a0aad5dffbe"),
            ("t10k-images-idx3-ubyte.gz", 4_422_102, "bef4ecab320f06d8554ea6380940ec79"),
            ("t10k-labels-idx1-ubyte.gz", 5_148, "bb300cfdad3c16e7a12a480ee83cd310"),
        ),
    ),
    DataSpec(
        "notmnist",
        "letters A to J of fonts from the web, the small set; every fifth image of a letter is a test image",
        classes=tuple("ABCDEFGHIJ"),
        channels=1,
        size=28,
        n_train=14_984,
        n_test=3_740,
        licence="not stated by the publisher",
        citation="Bulatov 2011, https://yaroslavvb.blogspot.com/2011/09/notmnist-dataset.html",
        files=_files(
            (
                "http://yaroslavvb.com/upload/notMNIST/",
                "https://commondatastorage.googleapis.com/books1000/",
            ),
            ("notMNIST_small.tar.gz", 8_458_043, "c9890a473a9769fda4bdf314aaf500dd"),
        ),
    ),
    _cifar(
        "cifar10",
        "tiny images of ten classes",
        _CIFAR10,
        ("cifar-10-python.tar.gz", 170_498_071, "c58f30108f718f92721af3b95e74349a"),
    ),
    _cifar(
        "cifar100",
        "tiny images of a hundred classes",
        100,
        ("cifar-100-python.tar.gz", 169_001_437, "eb9058c3a382ffc7106e4002c42a8d85"),
    ),
    DataSpec(
        "svhn",
        "house numbers from street views, cropped to a digit",
        classes=_DIGITS,
        channels=3,
        size=32,
        n_train=73_257,
        n_test=26_032,
        licence="non-commercial use only",
        citation="Netzer et al. 2011, Reading Digits in Natural Images with Unsupervised Feature Learning",
        files=_files(
            ("http://ufldl.stanford.edu/housenumbers/",),
            ("train_32x32.mat", 182_040_794, "e26dedcc434d2e4c54c9b2d4a06d8373"),
            ("test_32x32.mat", 64_275_384, "eb5a983be6a315427106f1b164d9cef3"),
        ),
    ),
    DataSpec(
        "dtd",
        "describable textures in the wild; the first of the ten official splits",
        classes=47,
        channels=3,
        size=64,
        n_train=1_880,
        n_val=1_880,
        n_test=1_880,
        licence="research purposes only",
        citation="Cimpoi et al. 2014, arXiv:1311.3618",
        files=_files(
            ("https://www.robots.ox.ac.uk/~vgg/data/dtd/download/",),
            ("dtd-r1.0.1.tar.gz", 625_239_812, "fff73e5086ae6bdbea199a49dfb8a4c1"),
        ),
    ),
    DataSpec(
        "places365",
        "photographs of 365 scenes, 256×256; the official validation set is the test split",
        classes=365,
        channels=3,
        size=64,
        n_train=1_803_460,
        n_test=36_500,
        licence="research and education only",
        citation="Zhou et al. 2017, Places, IEEE TPAMI 40(6)",
        files=_files(
            ("http://data.csail.mit.edu/places/places365/",),
            ("filelist_places365-standard.tar", 67_498_496, "35a0585fee1fa656440f3ab298f8479c"),
            ("train_256_places365standard.tar", 26_103_685_120, "53ca1c756c3d1e7809517cc47c5561c5"),
            ("val_256.tar", 525_158_400, "e27b17d8d44f4af9a78502beb927f808"),
        ),
    ),
    DataSpec(
        "celeba",
        "aligned faces of celebrities with forty attributes, cropped to the middle 178×178",
        classes=40,
        multilabel=True,
        channels=3,
        size=64,
        n_train=162_770,
        n_val=19_867,
        n_test=19_962,
        licence="non-commercial research only",
        citation="Liu et al. 2015, arXiv:1411.7766",
        page="https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
        files=(
            _drive(
                "list_eval_partition.txt",
                "0B7EVK8r0v71pY0NSMzRuSXJEVkk",
                2_836_386,
                "d32c9cbf5e040fd4025c592c306e6668",
            ),
            _drive(
                "list_attr_celeba.txt",
                "0B7EVK8r0v71pblRyaVFSWGxPY0U",
                26_721_026,
                "75e246fa4810816ffd6ee81facbd244c",
            ),
            _drive(
                "img_align_celeba.zip",
                "0B7EVK8r0v71pZjFTYXZWM3FlRnM",
                1_443_490_838,
                "00d2c5bc6d35e252742224ab0c1e8fcb",
            ),
        ),
    ),
    DataSpec(
        "imagenette",
        "ten easy classes of ImageNet, shortest side 320; its validation set is the test split",
        classes=_IMAGENETTE,
        channels=3,
        size=64,
        n_train=9_469,
        n_test=3_925,
        licence="Apache 2.0 (the selection; the photographs are their owners')",
        citation="Howard 2019, https://github.com/fastai/imagenette",
        files=(
            DataFile(
                "imagenette2-320.tgz",
                ("https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz",),
                341_663_724,
                md5="3df6f0d01a2c9592104656642f5e78a3",
                exact=False,
            ),
        ),
    ),
    *MEDMNIST,
    DataSpec(
        "tinyimagenet",
        "two hundred classes of ImageNet at 64×64; the labelled validation set is the test split",
        classes=200,
        channels=3,
        size=64,
        n_train=100_000,
        n_test=10_000,
        licence="ImageNet's terms: non-commercial research and education",
        citation="Le & Yang 2015, Tiny ImageNet Visual Recognition Challenge",
        files=_files(
            ("http://cs231n.stanford.edu/",),
            ("tiny-imagenet-200.zip", 248_100_043, "90528d7ca1a48142e341f4ef8d21d0de"),
        ),
    ),
    DataSpec(
        "horse2zebra",
        "horses (A) and zebras (B), unpaired",
        classes=("A", "B"),
        channels=3,
        size=256,
        n_train=2_401,
        n_test=260,
        licence="ImageNet's terms: non-commercial research and education",
        citation="Zhu et al. 2017, arXiv:1703.10593",
        files=(
            DataFile(
                "horse2zebra.zip",
                (
                    "https://efrosgans.eecs.berkeley.edu/cyclegan/datasets/horse2zebra.zip",
                    "https://people.eecs.berkeley.edu/~taesung_park/CycleGAN/datasets/horse2zebra.zip",
                ),
                116_867_962,
                sha256="a74d9d392eecca9966b51287a76ca126af473d9de4f3e8fc0e9cda08fa1730a1",
            ),
        ),
    ),
    DataSpec(
        "imagenet",
        "ILSVRC 2012, a thousand classes; the labelled validation set is the test split",
        classes=1000,
        channels=3,
        size=64,
        n_train=1_281_167,
        n_test=50_000,
        licence="non-commercial research and education, by agreement",
        citation="Russakovsky et al. 2015, arXiv:1409.0575",
        page="https://image-net.org/download-images.php",
        hub="ILSVRC/imagenet-1k",
        linked=True,
        files=(
            DataFile("ILSVRC2012_devkit_t12.tar.gz", (), 2_568_145, md5="fa75699e90414af021442c21a62c3abf"),
            DataFile("ILSVRC2012_img_val.tar", (), 6_744_924_160, md5="29b22e2961454d5413ddabcf34fc5622"),
            DataFile("ILSVRC2012_img_train.tar", (), 147_897_477_120, md5="1d675b47d978889d74fa0da5fadfb00e"),
        ),
    ),
)

SPECS: dict[str, DataSpec] = {spec.name: spec for spec in _ALL}
