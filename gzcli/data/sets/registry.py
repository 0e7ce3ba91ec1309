"""The data sets: known ones by name, with their content, files and places in the cache, and the user's own by
path. No heavy import.

Adding a set is one entry in `sets.json` and one reader of the same name in `readers/publishers.py` or
`embedded.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gzcli.core.errors import DamagedError, MissingError, UsageError, did_you_mean, matching
from gzcli.core.formats import ARCHIVE, ARRAY, SET, endings_of
from gzcli.core.sections import Fit
from gzcli.core.types import Say
from gzcli.core.units import Size, sides
from gzcli.store.files import checksum, read_object
from gzcli.store.hub import HUB_SCHEME, snapshot_of
from gzcli.store.paths import cache_dir, user_dir

REGISTER = "data.json"  # in the user's folder: the imported sets, {name: {"path": …, "size": …, …}}
_ADDRESS = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
PATH_ENDINGS = endings_of(ARRAY, SET, ARCHIVE)  # they make a text a path

# Companions of an image besides its label, by keys of `metadata.jsonl` or columns, the first of which counts.
# `control` is a map that the image follows (edges, depth, a pose), `before` the image that an instruction,
# the caption, changed into this one.
CAPTIONS = ("text", "caption", "edit_prompt", "instruction")
FURTHER = {
    "control": ("control", "conditioning_image", "conditioning"),
    "before": ("before", "input_image", "original_image", "source"),
}
TARGET_KEYS = ("edited_image", "target", "after")  # the image itself, if it has a `before`
MAP_KEYS = (
    "control",
)  # their values have a meaning: augmentations that change colours leave them as they are
EXTRAS = ("caption", *FURTHER)


def further_of(name: str) -> str | None:
    """The kind of further image that a name denotes: `conditioning_image` → "control". None for any other
    name."""
    return next((kind for kind, names in FURTHER.items() if name in names), None)


def extras_in_words(extras: Iterable[str]) -> str:
    """The extras in words: ("caption", "before") → "captions and `before` images"."""
    return " and ".join("captions" if extra == "caption" else f"`{extra}` images" for extra in extras)


@dataclass(frozen=True)
class Form:
    """How the images of a set are read and packed."""

    size: Size | None = None  # size of the packed images; None: their own
    channels: int | None = None  # channels of the packed images, 1 (grey) or 3 (RGB); None: their own
    skip_bad: bool = False  # whether images that do not decode are skipped instead of raising an error
    layout: str | None = None  # meaning of the folders, a key of `LAYOUTS`; None: by their names
    foreign: bool = False  # whether images are only scored: one split `test`, any folders, no classes
    fit: Fit = "crop"  # how images of another shape are resized
    mixed: bool = False  # whether the images may have several sizes, for patches

    @property
    def folder(self) -> str:
        """The name of the folder with packs of this form: `28x1`, `ownxown`, `48x32x3-pad`."""
        end = "-mixed" if self.mixed else f"-{self.fit}" if self.size and self.fit != "crop" else ""
        return f"{self.size or 'own'}x{self.channels or 'own'}{end}{'-foreign' if self.foreign else ''}"

    def with_options(self, size: Size | None, channels: int | None, fit: Fit, patch: int | None) -> Form:
        """This form with the requested size, channels and fit, if any."""
        form = replace(self, size=size or self.size, channels=channels or self.channels, fit=fit)
        return replace(form, mixed=patch is not None and form.size is None)


@dataclass(frozen=True)
class DataFile:
    """A publisher's file."""

    name: str  # its name at the publisher and in the cache
    urls: tuple[str, ...]  # addresses, tried in order; () if the publisher asks for a log-in
    size: int  # bytes; an estimate if the publisher states none
    md5: str | None = None  # checksum in hexadecimal digits, if the publisher states this kind
    sha256: str | None = None  # checksum in hexadecimal digits, if the publisher states this kind
    exact: bool = True  # whether `size` is exact; if not, the checksum alone decides


@dataclass(frozen=True)
class DataSpec:
    """A data set that gz knows by name: images [channels, size, size]."""

    name: str  # what `--data` takes
    title: str  # its description, in a line
    classes: tuple[str, ...] | int  # names, or their number if the files hold the names; () without labels
    channels: int  # 1 (grey) or 3 (RGB)
    size: int  # pixels a side; images of many sizes are packed to it unless `data.size` asks for another
    n_train: int  # images of the official training split
    n_test: int  # images of the official test split
    licence: str  # the publisher's terms, in a line
    citation: str  # the paper, or the page
    n_val: int = 0  # images of the official validation split; 0: split off from train
    levels: int = 256  # grey levels, 2 … 256
    multilabel: bool = False  # whether an image may have any number of the classes
    files: tuple[DataFile, ...] = ()  # what is downloaded
    # (size, files) of the sizes that the publisher offers besides `size`, ascending
    larger: tuple[tuple[int, tuple[DataFile, ...]], ...] = ()
    extras: tuple[str, ...] = ()  # extras of each image, from EXTRAS
    embedded: bool = False  # whether it is made from an installed package, without a download
    page: str = ""  # web page of the files, if their host may refuse a program
    hub: str = ""  # its id on the Hugging Face hub, if it is available by agreement
    linked: bool = False  # whether `--from` links the user's files instead of copying them

    @property
    def key(self) -> str:
        """The set's name everywhere: in run ids, in the cache and in messages."""
        return self.name

    reference = shown = key

    @property
    def form(self) -> Form:
        """The default form of its packs."""
        return Form(self.size, self.channels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of an image."""
        return self.channels, self.size, self.size

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes; numbers if the names are only in the files."""
        return tuple(map(str, range(self.classes))) if isinstance(self.classes, int) else self.classes

    @property
    def n_classes(self) -> int:
        return self.classes if isinstance(self.classes, int) else len(self.classes)

    @property
    def trained_on(self) -> int:
        """The number of images that are left for training, known before anything is packed."""
        return split_sizes(self.official)["train"]

    @property
    def official(self) -> dict[str, int]:
        """The number of images of each official split."""
        return {"train": self.n_train, "val": self.n_val, "test": self.n_test}

    @property
    def download_size(self) -> int:
        """The size of the download in bytes."""
        return sum(file.size for file in self.files)

    @property
    def versions(self) -> tuple[DataSpec, ...]:
        """The set in every size that its publisher offers."""
        return (self, *(self.sized(side) for side, _ in self.larger))

    def sized(self, size: Size | None) -> DataSpec:
        """The set in its publisher's smallest size that is at least `size`, otherwise in the largest."""
        if size is None or max(sides(size)) <= self.size or not self.larger:
            return self
        side, files = next((row for row in self.larger if row[0] >= max(sides(size))), self.larger[-1])
        return replace(self, size=side, files=files, larger=())


@dataclass(frozen=True)
class OwnSet:
    """The user's own images."""

    path: Path  # their absolute path
    name: str | None = None  # the name of their import; None for a path
    form: Form = field(default_factory=Form)  # their default form, set by the import

    @property
    def key(self) -> str:
        """The name in run ids and in the cache, which is unique for each folder."""
        if self.name:
            return self.name
        stem = self.path.name.split(".")[0] or "data"
        return f"{slug(stem)}-{hashlib.sha256(os.fsencode(self.path)).hexdigest()[:6]}"

    @property
    def reference(self) -> str:
        """The name or absolute path of the set, valid in any folder."""
        return self.name or str(self.path)

    @property
    def shown(self) -> str:
        """The set's name in messages."""
        return str(self.path)

    title = shown

    @property
    def size(self) -> Size | None:
        return self.form.size

    @property
    def channels(self) -> int | None:
        return self.form.channels

    def sized(self, size: Size | None) -> OwnSet:
        """The set itself, because only published sets have versions of several sizes."""
        return self


@dataclass(frozen=True)
class HubSet(OwnSet):
    """A data set of the hub, `hf://datasets/OWNER/NAME[/config]`; `path` is its folder in the hub's cache."""

    address: str = ""  # OWNER/NAME
    config: str = ""  # its folder there; empty for all

    @property
    def key(self) -> str:
        return f"hub-{slug(' '.join((*self.address.split('/'), self.config)))}"

    @property
    def reference(self) -> str:
        return HUB_SCHEME + "/".join(filter(None, (self.address, self.config)))

    shown = reference
    title = reference


def split_sizes(official: Mapping[str, int]) -> dict[str, int]:
    """The images of each packed split of a set with these official splits. A missing validation split is
    min(2000, 10 %) of train; a missing test split is 10 %."""
    n = official.get("train", 0)
    tenth = max(1, n // 10)
    drawn = {"val": min(2000, tenth), "test": tenth}
    sizes = {split: official.get(split) or size for split, size in drawn.items()}
    return {"train": n - sum(size for split, size in drawn.items() if not official.get(split)), **sizes}


DataSet = DataSpec | OwnSet  # both have key, title, reference, shown, form, size, channels and sized()


def import_line(path: str, option: str) -> str:
    """The command line that imports images with an option."""
    return f"gz data import {shlex.quote(path)} --name {slug(Path(path).stem)} {option}"


def slug(text: str) -> str:
    """A text as part of a file name: small letters, digits and `-`."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "data"


# --- the files of a set in the cache ---

SPLIT_FOLDERS = ("train", "val")  # folders that `raw_dir` of a linked set may contain instead of its files
HUB = "hub"  # a link to the folder of its parquet files, which may be there instead too


def raw_dir(spec: DataSpec) -> Path:
    """The folder of a set's files, shared by all its sizes."""
    return cache_dir("raw") / spec.name


def is_fetched(spec: DataSpec) -> bool:
    """Whether every file is in the cache. For a linked set, the two folders or the hub's copy suffice."""
    folder = raw_dir(spec)
    if spec.linked and ((folder / HUB).is_dir() or all((folder / name).is_dir() for name in SPLIT_FOLDERS)):
        return True
    return bool(spec.files) and all(is_there(spec, file) for file in spec.files)


def is_there(spec: DataSpec, file: DataFile) -> bool:
    """Whether a file is in the cache, with the right size if it is known; `check_files` reads its bytes."""
    path = raw_dir(spec) / file.name
    return path.is_file() and (not file.exact or path.stat().st_size == file.size)


def check_files(spec: DataSpec, say: Say) -> list[Path]:
    """Checks every file of a set in the cache. Raises MissingError for a wrong checksum."""
    paths = []
    for file in spec.files:
        path = raw_dir(spec) / file.name
        if not path.exists():
            continue  # a linked set may have folders instead of files
        say(f"checking `{path}`")
        kind = "sha256" if file.sha256 else "md5"
        if not is_there(spec, file) or checksum(path, kind) != (file.sha256 or file.md5):
            command = f"run `gz data remove {spec.name}`, then `gz data download {spec.name}"
            hint = f"{command}{' --from DIR`' if spec.linked else '`'}"
            raise MissingError(f"`{path}` is damaged: its {kind} differs from the publisher's", hint=hint)
        paths.append(path)
    return paths


# --- the sets ---


def _spec(row: dict[str, Any]) -> DataSpec:
    """The set that an entry of `sets.json` describes: fields of `DataSpec`, with lists for tuples."""
    row = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    larger = tuple((side, _files(rows)) for side, rows in row.pop("larger", ()))
    return DataSpec(**row | {"files": _files(row.get("files", ())), "larger": larger})


def _files(rows: Iterable[dict[str, Any]]) -> tuple[DataFile, ...]:
    return tuple(DataFile(**row | {"urls": tuple(row.get("urls", ()))}) for row in rows)


_ROWS = json.loads(Path(__file__).with_name("sets.json").read_bytes())
SPECS = {row["name"]: _spec(row) for row in _ROWS}
MEDMNIST = tuple(spec for spec in SPECS.values() if spec.title.endswith("(MedMNIST)"))


def find(name: str) -> DataSpec:
    """The set with this name; `-` and `_` are equivalent. Raises UsageError with the closest name."""
    if match := matching(name, SPECS):
        return SPECS[match]
    hint = did_you_mean(name, SPECS) or "see the names with `gz data list`, or give a path"
    raise UsageError(f"there is no data set `{name}`", hint=hint)


# --- sets by name or path ---


def locate(what: DataSet | str | Path) -> DataSet:
    """The set of a known name, an imported name, or a path. Raises UsageError or MissingError."""
    if isinstance(what, DataSet):
        return what
    text = str(what)
    if text.startswith(HUB_SCHEME):
        return hub_set(text)
    if name := matching(text, SPECS):
        return SPECS[name]
    imported = imports()
    if name := matching(text, imported):
        return own_set(name, imported[name])
    path = local(text)
    if path.exists():
        return OwnSet(path)
    if isinstance(what, Path) or "/" in text or text.lower().endswith(PATH_ENDINGS):
        hint = "give the path of a folder, zip, tar or npz of images"
        raise MissingError(f"`{text}` does not exist", hint=hint)
    ways = "see the names with `gz data list`, or give a path such as `./my_photos`"
    here = [path for path in Path().iterdir() if path.is_dir() or path.name.lower().endswith(PATH_ENDINGS)]
    near = did_you_mean(text, names()) or did_you_mean(f"./{text}", [f"./{path.name}" for path in here])
    raise UsageError(f"there is no data set `{text}`", hint=near or ways)


def hub_set(text: str) -> HubSet:
    """The set at an address on the hub; nothing is downloaded. Raises UsageError for an invalid address."""
    address, _, config = text.removeprefix(HUB_SCHEME).strip("/").partition("/")
    name, _, config = config.partition("/")
    address = f"{address}/{name}"
    if not _ADDRESS.fullmatch(address) or {"..", "/"} & {*Path(config).parts}:
        hint = f"write `{HUB_SCHEME}owner/name` or `{HUB_SCHEME}owner/name/config`"
        raise UsageError(f"`{text}` is not the address of a data set on the hub", hint=hint)
    return HubSet(snapshot_of(address, "datasets") / config, address=address, config=config)


def is_set(what: str) -> bool:
    """Whether the unchanged text is the name of a set or an existing path."""
    try:
        locate(what)
    except (UsageError, MissingError):
        return False
    return True


def data_key(what: str | Path) -> str:
    """The key of a set: `mnist`, or `my-photos-3f2a1c` for a path, which need not exist."""
    try:
        return locate(what).key
    except MissingError:
        return OwnSet(local(str(what))).key


def names() -> list[str]:
    """Every name for `--data`: known sets first, then imported ones."""
    return [*SPECS, *imports()]


def imports() -> dict[str, dict[str, Any]]:
    """The imported sets by name, as stored in the register."""
    register = read_object(user_dir(REGISTER))
    if all(isinstance(line, dict) and isinstance(line.get("path"), str) for line in register.values()):
        return register
    hint = "move the file away and import the sets again; their images are unchanged"
    raise DamagedError(f"`{user_dir(REGISTER)}` is damaged: a set has no path", hint=hint)


def own_set(name: str, line: dict[str, Any]) -> OwnSet:
    """The imported set that a line of the register describes."""
    form = Form(
        line.get("size"),
        line.get("channels"),
        line.get("skip_bad", False),
        line.get("form"),
        fit=line.get("fit", "crop"),
    )
    return OwnSet(Path(line["path"]), name, form)


def local(text: str) -> Path:
    """The absolute path of a typed path. It has no `..`, because the path names the set.

    Raises UsageError for a URL.
    """
    if "://" in text:
        raise UsageError(f"`{text}` is a URL, not a path", hint="download it, then give the path of the file")
    path = Path(text).expanduser()
    return path.resolve() if ".." in path.parts else path.absolute()
