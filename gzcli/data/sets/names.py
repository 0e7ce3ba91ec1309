"""Finds data sets by name or path, and classes by the names of `--label`. No heavy import."""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gzcli.core.errors import DamagedError, MissingError, UsageError, canonical, did_you_mean, matching
from gzcli.core.units import Size
from gzcli.data.sets.registry import SPECS, DataSpec, Form
from gzcli.store.files import read_object
from gzcli.store.hub import HUB_SCHEME, snapshot_of
from gzcli.store.paths import user_dir

REGISTER = "data.json"  # in the user's folder: the imported sets, {name: {"path": …, "size": …, …}}
_ADDRESS = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
ENDINGS = (
    ".zip",
    ".npz",
    ".npy",
    ".tar",
    ".tgz",
    ".gz",
    ".zst",
    ".parquet",
)  # by which a text is taken for a path


@dataclass(frozen=True)
class OwnSet:
    """The user's own images."""

    path: Path  # their absolute path
    name: str | None = None  # the name of their import; None for a path
    form: Form = field(default_factory=Form)  # their default form, set by the import

    @property
    def key(self) -> str:
        """Its name in run ids and in the cache, which differs for equally named folders."""
        if self.name:
            return self.name
        stem = self.path.name.split(".")[0] or "data"
        return f"{slug(stem)}-{hashlib.sha256(str(self.path).encode()).hexdigest()[:6]}"

    @property
    def reference(self) -> str:
        """The name or absolute path of the set, valid in any folder."""
        return self.name or str(self.path)

    @property
    def shown(self) -> str:
        """Its name in messages."""
        return str(self.path)

    title = shown

    @property
    def size(self) -> Size | None:
        return self.form.size

    @property
    def channels(self) -> int | None:
        return self.form.channels

    def sized(self, size: Size | None) -> OwnSet:
        """The set itself: only a publisher has versions of several sizes."""
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


DataSet = DataSpec | OwnSet  # both have key, title, reference, shown, form, size, channels and sized()


def slug(text: str) -> str:
    """A text as part of a file name: small letters, digits and `-`."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "data"


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
    if isinstance(what, Path) or "/" in text or path.suffix.lower() in ENDINGS:
        hint = "give the path of a folder, zip, tar or npz of images"
        raise MissingError(f"there is no `{text}`", hint=hint)
    ways = "`gz data list` shows the names; a path works too, such as `./my_photos`"
    raise UsageError(f"there is no data set `{text}`", hint=did_you_mean(text, names()) or ways)


def hub_set(text: str) -> HubSet:
    """The set of an address on the hub, which is not fetched. Raises UsageError for no address."""
    address, _, config = text.removeprefix(HUB_SCHEME).strip("/").partition("/")
    name, _, config = config.partition("/")
    address = f"{address}/{name}"
    if not _ADDRESS.fullmatch(address) or ".." in Path(config).parts:
        hint = f"`{HUB_SCHEME}owner/name`, or `{HUB_SCHEME}owner/name/config`"
        raise UsageError(f"`{text}` is no address of a data set on the hub", hint=hint)
    return HubSet(snapshot_of(address, "datasets") / config, address=address, config=config)


def is_set(what: str) -> bool:
    """Whether the text as it stands is the name of a set or an existing path."""
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
        return OwnSet(Path(what).expanduser().absolute()).key


def names() -> list[str]:
    """Every name that `--data` takes: known sets first, then imported ones."""
    return [*SPECS, *imports()]


def imports() -> dict[str, dict[str, Any]]:
    """The imported sets by name, as the register has them."""
    register = read_object(user_dir(REGISTER))
    if all(isinstance(line, dict) and isinstance(line.get("path"), str) for line in register.values()):
        return register
    hint = "move the file away, and `gz data import` the sets again: their images are where they were"
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
    """The absolute path of a typed one. Raises UsageError for a URL."""
    if "://" in text:
        raise UsageError(f"`{text}` is a URL", hint="download it yourself, then give the path of what came")
    return Path(text).expanduser().absolute()


def class_numbers(text: str, classes: Sequence[str]) -> list[int]:
    """The class numbers of a text: `cat`, `3`, or a list `cat,"x,y"` as in CSV. A word is the name of a
    class, otherwise one up to capitals, `-` and `_`, otherwise a number."""
    if not classes:
        raise UsageError("`--label` needs a data set with classes")
    if text in classes:
        return [classes.index(text)]
    words = next(csv.reader([text.replace("\n", " ")], skipinitialspace=True), [])
    return [_number(word.strip(), classes) for word in words or [""]]


def in_turns(n: int, classes: int) -> int:
    """The multiple of `classes` nearest to n; n itself if there are more classes."""
    return n if not 0 < classes <= n else classes * round(n / classes)


def _number(word: str, classes: Sequence[str]) -> int:
    if word in classes:
        return classes.index(word)
    alike = [i for i, name in enumerate(classes) if canonical(name) == canonical(word)]
    if len(alike) > 1:
        either = " or ".join(f"`{classes[i]}`" for i in alike)
        raise UsageError(f"the label `{word}` may be {either}", hint="write it as it is spelt")
    if alike:
        return alike[0]
    if word.isascii() and word.isdecimal() and int(word) < len(classes):
        return int(word)
    match = next((name for name in classes if "," in name and word in name.split(",")), None)
    quoted = f"""quote a name that contains a comma: `--label '"{match}"'`""" if match and word else None
    hint = quoted or did_you_mean(word, classes) or f"labels: {', '.join(classes[:20])}"
    raise UsageError(f"no label `{word}` among {len(classes)} classes", hint=hint)
