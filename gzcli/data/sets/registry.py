"""The data sets known by name: what they show, the files they come in, and where these lie in the cache.
No heavy import.

Adding a set is one entry here and one reader of the same name in `readers/publishers.py` or
`embedded.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gzcli.core.errors import MissingError, UsageError, did_you_mean, matching
from gzcli.core.sections import Fit
from gzcli.core.types import Say
from gzcli.core.units import Size, sides
from gzcli.store.files import checksum
from gzcli.store.paths import cache_dir

# What may come with an image beside its label, by the names of keys in `metadata.jsonl` or of columns; of
# several the first counts. `control` is a map that the image follows (edges, depth, a pose), `before` the
# image that an instruction, the caption, changed into this one.
CAPTIONS = ("text", "caption", "edit_prompt", "instruction")
FURTHER = {
    "control": ("control", "conditioning_image", "conditioning"),
    "before": ("before", "input_image", "original_image", "source"),
}
TARGETS = ("edited_image", "target", "after")  # the image itself, where it has a `before`
MAPS = ("control",)  # their values have a meaning: augmentations that change colours leave them as they are
EXTRAS = ("caption", *FURTHER)


def further_of(name: str) -> str | None:
    """`conditioning_image` → "control"; None for a name that means no further picture."""
    return next((kind for kind, names in FURTHER.items() if name in names), None)


def extras_in_words(extras: Iterable[str]) -> str:
    """("caption", "before") → "captions and `before` pictures"."""
    return " and ".join("captions" if extra == "caption" else f"`{extra}` pictures" for extra in extras)


@dataclass(frozen=True)
class Form:
    """How the images of a set are read and packed."""

    size: Size | None = None  # to which the images are resized; None: as they are
    channels: int | None = None  # 1 (grey) or 3 (RGB) to which they are converted; None: as they are
    skip_bad: bool = False  # whether pictures that do not decode are left out; if not, they are an error
    # what the folders of pictures mean, of LAYOUTS of the folder reader; None: what their names say
    layout: str | None = None
    # whether the images are scored only: one split `test`, in whatever folders, without classes
    foreign: bool = False
    fit: Fit = "crop"  # how pictures of another shape come to the size
    mixed: bool = False  # whether the images may have any sizes, as patches of them are used

    def with_options(
        self, size: Size | None, channels: int | None, fit: Fit = "crop", patch: int | None = None
    ) -> Form:
        """This form with the size, channels and fit asked for, where any are."""
        form = replace(self, size=size or self.size, channels=channels or self.channels, fit=fit)
        return replace(form, mixed=patch is not None and form.size is None)


@dataclass(frozen=True)
class DataFile:
    """A file as its publisher serves it."""

    name: str  # its name there and in the cache
    urls: tuple[str, ...]  # addresses, tried in order; () where the publisher asks for a log-in
    size: int  # bytes; an estimate where the publisher states none
    md5: str | None = None  # checksum in hexadecimal digits, where the publisher states this one
    sha256: str | None = None  # checksum in hexadecimal digits, where the publisher states this one
    exact: bool = True  # whether `size` is exact; if not, the checksum alone decides


@dataclass(frozen=True)
class DataSpec:
    """A data set that gz knows by name: images [channels, size, size]."""

    name: str  # what `--data` takes
    title: str  # what it shows, in a line
    # names of the classes, or how many there are where the files tell the names; () without labels
    classes: tuple[str, ...] | int
    channels: int  # 1 (grey) or 3 (RGB)
    size: int  # pixels a side; pictures of many sizes are packed to it unless `data.size` asks for another
    n_train: int  # images of the official training split
    n_test: int  # images of the official test split
    licence: str  # the publisher's terms, in a line
    citation: str  # the paper, or the page
    n_val: int = 0  # images of the official validation split; 0: validation is carved from train
    levels: int = 256  # grey levels, 2 … 256
    multilabel: bool = False  # whether an image may have any number of the classes
    files: tuple[DataFile, ...] = ()  # what is downloaded
    # (size, files) of the sizes that the publisher offers beside `size`, ascending
    larger: tuple[tuple[int, tuple[DataFile, ...]], ...] = ()
    extras: tuple[str, ...] = ()  # what comes with each image, of EXTRAS
    embedded: bool = False  # whether it is made from an installed package, without a download
    page: str = ""  # where a browser gets the files, if their host may refuse a program
    hub: str = ""  # its id on the Hugging Face hub, where it may be had by agreement
    # whether the user's own files are used where they lie; `--from` then makes links, no copies
    linked: bool = False

    @property
    def key(self) -> str:
        """Its name in run ids, in the cache, in messages, and anywhere else."""
        return self.name

    reference = shown = key

    @property
    def form(self) -> Form:
        """How its images are packed unless asked otherwise."""
        return Form(self.size, self.channels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of an image."""
        return self.channels, self.size, self.size

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; numbers where only the files tell the names."""
        return tuple(map(str, range(self.classes))) if isinstance(self.classes, int) else self.classes

    @property
    def n_classes(self) -> int:
        return self.classes if isinstance(self.classes, int) else len(self.classes)

    @property
    def trained_on(self) -> int:
        """Images that `build.split_plan` will leave to train on, before anything is packed."""
        tenth = max(1, self.n_train // 10)
        test, val = 0 if self.n_test else tenth, 0 if self.n_val else min(2000, tenth)
        return self.n_train - test - val

    @property
    def download_size(self) -> int:
        """Bytes to fetch."""
        return sum(file.size for file in self.files)

    @property
    def versions(self) -> tuple[DataSpec, ...]:
        """The set in every size that its publisher offers."""
        return (self, *(self.sized(side) for side, _ in self.larger))

    def sized(self, size: Size | None) -> DataSpec:
        """The set in the smallest size of its publisher that holds images of `size`, else in the largest."""
        if size is None or max(sides(size)) <= self.size or not self.larger:
            return self
        side, files = next((row for row in self.larger if row[0] >= max(sides(size))), self.larger[-1])
        return replace(self, size=side, files=files, larger=())


# --- the files of a set in the cache ---

SPLIT_FOLDERS = ("train", "val")  # folders that `raw_dir` of a linked set may hold instead of its files
HUB = "hub"  # a link to the folder of its parquet files, which may be there instead too


def raw_dir(spec: DataSpec) -> Path:
    """The folder of a set's files, in whatever sizes its publisher offers."""
    return cache_dir("raw", spec.name)


def is_fetched(spec: DataSpec) -> bool:
    """Whether every file is there; or, for a linked set, the two folders or the hub's copy in their place."""
    folder = raw_dir(spec)
    if spec.linked and ((folder / HUB).is_dir() or all((folder / name).is_dir() for name in SPLIT_FOLDERS)):
        return True
    return bool(spec.files) and all(is_there(spec, file) for file in spec.files)


def is_there(spec: DataSpec, file: DataFile) -> bool:
    """Whether a file is there, with its size if that is known; `check_files` reads its bytes."""
    path = raw_dir(spec) / file.name
    return path.exists() and (not file.exact or path.stat().st_size == file.size)


def check_files(spec: DataSpec, say: Say) -> list[Path]:
    """Reads every file of a set that is there. Raises MissingError for a wrong checksum."""
    paths = []
    for file in spec.files:
        path = raw_dir(spec) / file.name
        if not path.exists():
            continue  # a linked set may have folders in the place of files
        say(f"checking `{path}`")
        kind = "sha256" if file.sha256 else "md5"
        if not is_there(spec, file) or checksum(path, kind) != (file.sha256 or file.md5):
            again = f"`gz data remove {spec.name}`, then `gz data download {spec.name}"
            hint = f"{again}{' --from DIR`' if spec.linked else '`'} fetches it anew"
            raise MissingError(f"`{path}` is damaged: its {kind} is not the publisher's", hint=hint)
        paths.append(path)
    return paths


# --- the sets ---


def _names(text: str) -> tuple[str, ...]:
    """The names in a text, which semicolons separate."""
    return tuple(name.strip() for name in text.split(";"))


def _files(bases: tuple[str, ...], *rows: tuple[str, int, str]) -> tuple[DataFile, ...]:
    """Files (name, bytes, md5) served under each of the base addresses."""
    return tuple(DataFile(name, tuple(base + name for base in bases), size, md5) for name, size, md5 in rows)


def _drive(*rows: tuple[str, str, int, str]) -> tuple[DataFile, ...]:
    """Files (name, id, bytes, md5) on Google Drive, which serves a program until its quota is used up."""
    url = "https://drive.usercontent.google.com/download?id={}&export=download&confirm=t"
    return tuple(DataFile(name, (url.format(id_),), size, md5) for name, id_, size, md5 in rows)


def _set(
    names: tuple[str, str],
    form: tuple[tuple[str, ...] | int, tuple[int, int], tuple[int, int, int]],
    terms: tuple[str, str],
    files: tuple[DataFile, ...] = (),
    **more: Any,
) -> DataSpec:
    """A set by (name, title), (classes, (channels, size), counts of splits), (licence, citation), files."""
    classes, (channels, size), (train, val, test) = form
    return DataSpec(*names, classes, channels, size, train, test, *terms, n_val=val, files=files, **more)


def _digits(name: str, title: str, classes: tuple[str, ...], *extras: str) -> DataSpec:
    paper = (
        "Alpaydin & Kaynak 1998, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository"
    )
    form = (classes, (1, 16), (1442, 0, 355))
    return _set((name, title), form, ("CC BY 4.0", paper), levels=17, embedded=True, extras=extras)


def _cifar(name: str, title: str, classes: tuple[str, ...] | int, size: int, md5: str) -> DataSpec:
    file = (name.replace("cifar", "cifar-") + "-python.tar.gz", size, md5)
    return _set(
        (name, title),
        (classes, (3, 32), (50_000, 0, 10_000)),
        (_NOT_STATED, "Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images"),
        _files(("https://www.cs.toronto.edu/~kriz/",), file),
    )


def _medmnist(
    names: tuple[str, str],
    form: tuple[tuple[str, ...], tuple[int, int, int]],
    *,
    channels: int = 1,
    licence: str = "CC BY 4.0",
    multilabel: bool = False,
) -> DataSpec:
    """A flat set of MedMNIST v2 in four sizes, 28 first."""
    (name, title), (classes, counts) = names, form
    words = [w for row in _MEDMNIST_FILES.splitlines() if row.startswith(f"{name} ") for w in row.split()[1:]]
    sized = []
    for side, about, md5 in zip((28, 64, 128, 224), words[::2], words[1::2], strict=True):
        file = f"{name}.npz" if side == 28 else f"{name}_{side}.npz"
        urls = (f"https://zenodo.org/records/10519652/files/{file}?download=1",)
        sized.append((side, (DataFile(file, urls, int(about), md5, exact=False),)))
    (size, files), *larger = sized
    terms = (licence, "Yang et al. 2023, MedMNIST v2, Scientific Data 10:41")
    more: dict[str, Any] = {"larger": tuple(larger), "multilabel": multilabel}
    return _set((name, f"{title} (MedMNIST)"), (classes, (channels, size), counts), terms, files, **more)


# MedMNIST's files in 28, 64, 128 and 224 pixels: about how many bytes, and the md5 that its package states.
_MEDMNIST_FILES = """
chestmnist 82802576 02c8a6516a18b556561a56cbdd36c4a8 390000000 9de6cd0b934ebb5b7426cfba5efbae16
chestmnist 1400000000 db107e5590b27930b62dbaf558aebee3 3900000000 45bd33e6f06c3e8cdb481c74a89152aa
octmnist 54938180 c68d92d5b585d8d81f7112f81e2d0842 250000000 e229e9440236b774d9f0dfef9d07bdaf
octmnist 900000000 0a97e76651ace45c5d943ee3f65b63ae 2500000000 abc493b6d529d5de7569faaef2773ba3
pneumoniamnist 4170669 28209eda62fecd6e6a2d98b1501bb15f 20000000 8f4eceb4ccffa70c672198ea285246c6
pneumoniamnist 72000000 05b46931834c231683c68f40c47b2971 206000000 d6a3c71de1b945ea11211b03746c1fe1
tissuemnist 124962739 ebe78ee8b05294063de985d821c1c34b 480000000 123ece2eba09d0aa5d698fda57103344
tissuemnist 1500000000 61b955355d7425a89687b06cca3ce0c2 3500000000 b077128c4a949f0a4eb01517f9037b9c
bloodmnist 35461855 7053d0359d879ad8a5505303e11de1dc 170000000 2b94928a2ae4916078ca51e05b6b800b
bloodmnist 600000000 adace1e0ed228fccda1f39692059dd4c 1700000000 b718ff6835fcbdb22ba9eacccd7b2601
breastmnist 559580 750601b1f35ba3300ea97c75c52ff8f6 2600000 742edef2a1fd1524b2efff4bd7ba9364
breastmnist 9500000 363e4b3f8d712e9b5de15470a2aaadf1 27000000 b56378a6eefa9fed602bb16d192d4c8b
dermamnist 19725078 0744692d530f8e62ec473284d019b0c7 93000000 b70a2f5635c6199aeaa28c31d7202e1f
dermamnist 330000000 2defd784463fa5243564e855ed717de1 930000000 8974907d8e169bef5f5b96bc506ae45d
organamnist 38247903 68e3f8846a6bd62f0c9bf841c0d9eacc 180000000 2dcccc29b88e6da5a01161ef20cda288
organamnist 650000000 eeae80d0a227a8d099027e1b3cfd3b60 1800000000 50747347e05c87dd3aaf92c49f9f3170
organcmnist 15527535 b9ceb9546e10131b32923c5bbeaea2b1 73000000 3ce34a8724ea6f548e6db4744d03b6a9
organcmnist 260000000 773c1f009daa3fe5d9a2a201b2a7ed94 740000000 050f5e875dc056f6768abf94ec9995d1
organsmnist 16528536 9ab87b696fb54e2a387ebe992d6ed5f1 78000000 53a6d115339d874c25e309a994ff46d3
organsmnist 280000000 ded0c5fa01a95dc4978b956f613e9b8e 780000000 b354719e553fbbb2513d5533f52a4cb1
pathmnist 205615438 a8b06965200029087d5bd730944a56c1 970000000 55aa9c1e0525abe5a6b9d8343a507616
pathmnist 3500000000 ac42d08fb904d92c244187169d1fd1d9 9700000000 2c51a510bcdc9cf8ddb2af93af1eadec
retinamnist 3291041 bd4c0672f1bba3e3a89f0e4e876791e4 15000000 afda852cc34dcda56f86ad2b2457dbcc
retinamnist 56000000 e48e916a24454daf90583d4e6efb1a18 160000000 eae7e3b6f3fcbda4ae613ebdcbe35348
"""

_TEN = tuple("0123456789")
_CIFAR10 = _names("airplane; automobile; bird; cat; deer; dog; frog; horse; ship; truck")
_FASHION = _names("T-shirt/top; Trouser; Pullover; Dress; Coat; Sandal; Shirt; Sneaker; Bag; Ankle boot")
_IMAGENETTE = _names(
    "tench; English springer; cassette player; chain saw; church; French horn; garbage truck; gas pump; "
    "golf ball; parachute"
)
_KINDS = _names("circle; ring; moon; heart; triangle; square; star; cross")
_FACTORS = _names(
    "red; orange; yellow; green; turquoise; blue; violet; pink; small; medium; large; "
    "left; right; top; bottom; centre"
)
_SHAPES = (3, 32), (20_000, 0, 4_000)
_CHEST = _names(
    "atelectasis; cardiomegaly; effusion; infiltration; mass; nodule; pneumonia; pneumothorax; "
    "consolidation; edema; emphysema; fibrosis; pleural; hernia"
)
_OCT = _names("choroidal neovascularization; diabetic macular edema; drusen; normal")
_TISSUE = _names(
    "Collecting Duct, Connecting Tubule; Distal Convoluted Tubule; Glomerular endothelial cells; "
    "Interstitial endothelial cells; Leukocytes; Podocytes; Proximal Tubule Segments; Thick Ascending "
    "Limb"
)
_BLOOD = _names(
    "basophil; eosinophil; erythroblast; immature granulocytes(myelocytes, metamyelocytes and "
    "promyelocytes); lymphocyte; monocyte; neutrophil; platelet"
)
_DERMA = _names(
    "actinic keratoses and intraepithelial carcinoma; basal cell carcinoma; benign keratosis-like lesions; "
    "dermatofibroma; melanoma; melanocytic nevi; vascular lesions"
)
_ORGANS = _names(
    "bladder; femur-left; femur-right; heart; kidney-left; kidney-right; liver; lung-left; lung-right; "
    "pancreas; spleen"
)
_PATH = _names(
    "adipose; background; debris; lymphocytes; mucus; smooth muscle; normal colon mucosa; "
    "cancer-associated stroma; colorectal adenocarcinoma epithelium"
)
_NOT_STATED, _BY_GZ = "not stated by the publisher", ("made by gz", "none: made by gz")
_OF_IMAGENET = "ImageNet's terms: non-commercial research and education"

INSTALLED = (
    _digits("digits", "scikit-learn's handwritten digits, 8×8 doubled to 16×16", _TEN),
    _set(
        ("glyphs", "letters and digits of 21 faces of DejaVu, STIX and Computer Modern"),
        (tuple("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"), (1, 28), (21_600, 0, 3_600)),
        (
            "the fonts': Bitstream Vera, OFL 1.1, BaKoMa",
            "none: made by gz of the fonts that matplotlib carries",
        ),
        embedded=True,
    ),
    _set(
        ("shapes", "forms of known colour, size, place and angle; the class is the kind"),
        (_KINDS, *_SHAPES),
        _BY_GZ,
        embedded=True,
        extras=("caption",),
    ),
    _set(
        ("shapes-factors", "the same images, with each factor as a label"),
        ((*_KINDS, *_FACTORS), *_SHAPES),
        _BY_GZ,
        embedded=True,
        multilabel=True,
    ),
    _set(
        ("patches", "32×32 patches of scikit-learn's two sample photographs"),
        (("china", "flower"), (3, 32), (1328, 0, 104)),
        ("CC BY 2.0", "photographs by danielbuechele and vultilion (flickr), 2011"),
        embedded=True,
    ),
    _digits("digits-ab", "digits in two unpaired domains: A white on black, B black on white", ("A", "B")),
    _digits("digits-captioned", "digits with a caption each", _TEN, "caption"),
    _digits(
        "digits-edited",
        "digits after an instruction such as `mirror it`, with the digit before it",
        _TEN,
        "caption",
        "before",
    ),
)

MEDMNIST = (
    _medmnist(
        ("chestmnist", "chest X-rays with fourteen findings, any number of which can hold"),
        (_CHEST, (78_468, 11_219, 22_433)),
        multilabel=True,
    ),
    _medmnist(("octmnist", "retinal tomographies"), (_OCT, (97_477, 10_832, 1_000))),
    _medmnist(
        ("pneumoniamnist", "chest X-rays of children, with and without pneumonia"),
        (("normal", "pneumonia"), (4_708, 524, 624)),
    ),
    _medmnist(("tissuemnist", "cells of the kidney's cortex"), (_TISSUE, (165_466, 23_640, 47_280))),
    _medmnist(("bloodmnist", "blood cells"), (_BLOOD, (11_959, 1_712, 3_421)), channels=3),
    _medmnist(("breastmnist", "ultrasound of the breast"), (("malignant", "normal, benign"), (546, 78, 156))),
    _medmnist(
        ("dermamnist", "pigmented lesions of the skin"),
        (_DERMA, (7_007, 1_003, 2_005)),
        channels=3,
        licence="CC BY-NC 4.0",
    ),
    _medmnist(
        ("organamnist", "organs in axial slices of computed tomographies"), (_ORGANS, (34_561, 6_491, 17_778))
    ),
    _medmnist(
        ("organcmnist", "organs in coronal slices of computed tomographies"),
        (_ORGANS, (12_975, 2_392, 8_216)),
    ),
    _medmnist(
        ("organsmnist", "organs in sagittal slices of computed tomographies"),
        (_ORGANS, (13_932, 2_452, 8_827)),
    ),
    _medmnist(
        ("pathmnist", "tissue of colorectal cancer, stained"), (_PATH, (89_996, 10_004, 7_180)), channels=3
    ),
    _medmnist(
        ("retinamnist", "fundus photographs, graded by diabetic retinopathy"),
        (tuple("01234"), (1_080, 120, 400)),
        channels=3,
    ),
)

PUBLISHED = (
    _set(
        ("mnist", "handwritten digits"),
        (_TEN, (1, 28), (60_000, 0, 10_000)),
        ("CC BY-SA 3.0", "LeCun, Cortes & Burges 1998, The MNIST database of handwritten digits"),
        _files(
            ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/"),
            ("train-images-idx3-ubyte.gz", 9_912_422, "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
            ("train-labels-idx1-ubyte.gz", 28_881, "d53e105ee54ea40749a09fcbcd1e9432"),
            ("t10k-images-idx3-ubyte.gz", 1_648_877, "9fb629c4189551a2d022fa330f9573f3"),
            ("t10k-labels-idx1-ubyte.gz", 4_542, "ec29112dd5afa0611ce80d1b7f02629c"),
        ),
    ),
    _set(
        ("fashionmnist", "Zalando's article images"),
        (_FASHION, (1, 28), (60_000, 0, 10_000)),
        ("MIT", "Xiao, Rasul & Vollgraf 2017, arXiv:1708.07747"),
        _files(
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
    _set(
        (
            "notmnist",
            "letters A to J of fonts from the web, the small set; every fifth image of a letter is a test "
            "image",
        ),
        (tuple("ABCDEFGHIJ"), (1, 28), (14_984, 0, 3_740)),
        (_NOT_STATED, "Bulatov 2011, https://yaroslavvb.blogspot.com/2011/09/notmnist-dataset.html"),
        _files(
            ("http://yaroslavvb.com/upload/notMNIST/", "https://commondatastorage.googleapis.com/books1000/"),
            ("notMNIST_small.tar.gz", 8_458_043, "c9890a473a9769fda4bdf314aaf500dd"),
        ),
    ),
    _cifar(
        "cifar10", "tiny images of ten classes", _CIFAR10, 170_498_071, "c58f30108f718f92721af3b95e74349a"
    ),
    _cifar(
        "cifar100", "tiny images of a hundred classes", 100, 169_001_437, "eb9058c3a382ffc7106e4002c42a8d85"
    ),
    _set(
        ("svhn", "house numbers from street views, cropped to a digit"),
        (_TEN, (3, 32), (73_257, 0, 26_032)),
        (
            "non-commercial use only",
            "Netzer et al. 2011, Reading Digits in Natural Images with Unsupervised Feature Learning",
        ),
        _files(
            ("http://ufldl.stanford.edu/housenumbers/",),
            ("train_32x32.mat", 182_040_794, "e26dedcc434d2e4c54c9b2d4a06d8373"),
            ("test_32x32.mat", 64_275_384, "eb5a983be6a315427106f1b164d9cef3"),
        ),
    ),
    _set(
        ("dtd", "describable textures in the wild; the first of the ten official splits"),
        (47, (3, 64), (1_880, 1_880, 1_880)),
        ("research purposes only", "Cimpoi et al. 2014, arXiv:1311.3618"),
        _files(
            ("https://www.robots.ox.ac.uk/~vgg/data/dtd/download/",),
            ("dtd-r1.0.1.tar.gz", 625_239_812, "fff73e5086ae6bdbea199a49dfb8a4c1"),
        ),
    ),
    _set(
        ("places365", "photographs of 365 scenes, 256×256; the official validation set is the test split"),
        (365, (3, 64), (1_803_460, 0, 36_500)),
        ("research and education only", "Zhou et al. 2017, Places, IEEE TPAMI 40(6)"),
        _files(
            ("http://data.csail.mit.edu/places/places365/",),
            ("filelist_places365-standard.tar", 67_498_496, "35a0585fee1fa656440f3ab298f8479c"),
            ("train_256_places365standard.tar", 26_103_685_120, "53ca1c756c3d1e7809517cc47c5561c5"),
            ("val_256.tar", 525_158_400, "e27b17d8d44f4af9a78502beb927f808"),
        ),
    ),
    _set(
        ("celeba", "aligned faces of celebrities with forty attributes, cropped to the middle 178×178"),
        (40, (3, 64), (162_770, 19_867, 19_962)),
        ("non-commercial research only", "Liu et al. 2015, arXiv:1411.7766"),
        _drive(
            (
                "list_eval_partition.txt",
                "0B7EVK8r0v71pY0NSMzRuSXJEVkk",
                2_836_386,
                "d32c9cbf5e040fd4025c592c306e6668",
            ),
            (
                "list_attr_celeba.txt",
                "0B7EVK8r0v71pblRyaVFSWGxPY0U",
                26_721_026,
                "75e246fa4810816ffd6ee81facbd244c",
            ),
            (
                "img_align_celeba.zip",
                "0B7EVK8r0v71pZjFTYXZWM3FlRnM",
                1_443_490_838,
                "00d2c5bc6d35e252742224ab0c1e8fcb",
            ),
        ),
        multilabel=True,
        page="https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
    ),
    _set(
        (
            "imagenette",
            "ten easy classes of ImageNet, shortest side 320; its validation set is the test split",
        ),
        (_IMAGENETTE, (3, 64), (9_469, 0, 3_925)),
        (
            "Apache 2.0 (the selection; the photographs are their owners')",
            "Howard 2019, https://github.com/fastai/imagenette",
        ),
        (
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
    _set(
        (
            "tinyimagenet",
            "two hundred classes of ImageNet at 64×64; the labelled validation set is the test split",
        ),
        (200, (3, 64), (100_000, 0, 10_000)),
        (_OF_IMAGENET, "Le & Yang 2015, Tiny ImageNet Visual Recognition Challenge"),
        _files(
            ("http://cs231n.stanford.edu/",),
            ("tiny-imagenet-200.zip", 248_100_043, "90528d7ca1a48142e341f4ef8d21d0de"),
        ),
    ),
    _set(
        ("horse2zebra", "horses (A) and zebras (B), unpaired"),
        (("A", "B"), (3, 256), (2_401, 0, 260)),
        (_OF_IMAGENET, "Zhu et al. 2017, arXiv:1703.10593"),
        (
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
    _set(
        ("imagenet", "ILSVRC 2012, a thousand classes; the labelled validation set is the test split"),
        (1000, (3, 64), (1_281_167, 0, 50_000)),
        ("non-commercial research and education, by agreement", "Russakovsky et al. 2015, arXiv:1409.0575"),
        (
            DataFile("ILSVRC2012_devkit_t12.tar.gz", (), 2_568_145, md5="fa75699e90414af021442c21a62c3abf"),
            DataFile("ILSVRC2012_img_val.tar", (), 6_744_924_160, md5="29b22e2961454d5413ddabcf34fc5622"),
            DataFile("ILSVRC2012_img_train.tar", (), 147_897_477_120, md5="1d675b47d978889d74fa0da5fadfb00e"),
        ),
        page="https://image-net.org/download-images.php",
        hub="ILSVRC/imagenet-1k",
        linked=True,
    ),
)

SPECS: dict[str, DataSpec] = {spec.name: spec for spec in (*INSTALLED, *PUBLISHED)}


def find(name: str) -> DataSpec:
    """The set of this name, `-` and `_` alike. Raises UsageError with the nearest name."""
    if match := matching(name, SPECS):
        return SPECS[match]
    hint = did_you_mean(name, SPECS) or "`gz data list` shows the names; a path works too"
    raise UsageError(f"there is no data set `{name}`", hint=hint)


# --- which sets the published out-of-distribution benchmarks compare ---


@dataclass(frozen=True)
class Benchmark:
    """The sets of a published benchmark."""

    name: str  # what `--benchmark` takes
    inside: str  # the in-distribution set
    near: tuple[str, ...]  # foreign sets that resemble it
    far: tuple[str, ...]  # foreign sets that do not
    version: str = "v1.5"  # of OpenOOD, whose evaluator prints another FPR95 in each (`fpr`)

    @property
    def fpr(self) -> str:
        """The figure of `gz ood` that the benchmark's evaluator prints as FPR95: version 1 takes
        in-distribution images as positive (its `fpr_recall`), version 1.5 foreign ones."""
        return "fpr95_id" if self.version == "v1" else "fpr95"

    def group(self, name: str) -> str:
        """Whether a foreign set is "near" or "far"."""
        return "near" if name in self.near else "far"


_FAR = ("mnist", "svhn", "dtd", "places365")
# OpenOOD v1.5 (Zhang et al. 2023, arXiv:2306.09301), table 1; MNIST's is that of v1.
BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "openood-mnist",
            "mnist",
            ("notmnist", "fashionmnist"),
            ("dtd", "cifar10", "tinyimagenet", "places365"),
            version="v1",
        ),
        Benchmark("openood-cifar10", "cifar10", ("cifar100", "tinyimagenet"), _FAR),
        Benchmark("openood-cifar100", "cifar100", ("cifar10", "tinyimagenet"), _FAR),
    )
}


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of this name, `-` and `_` alike."""
    if match := matching(name, BENCHMARKS):
        return BENCHMARKS[match]
    hint = did_you_mean(name, BENCHMARKS) or f"there are: {', '.join(BENCHMARKS)}"
    raise UsageError(f"there is no benchmark `{name}`", hint=hint)
