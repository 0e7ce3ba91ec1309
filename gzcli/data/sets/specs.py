"""The description of a known data set: shape, classes, files with checksums, licence. No heavy import."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gzcli.core.sizes import Size, sides
from gzcli.data.packs.forms import Form


@dataclass(frozen=True)
class DataFile:
    """A file as its publisher serves it.

    name: its name there and in the cache.
    urls: addresses, tried in order; () where the publisher asks for a log-in.
    size: bytes; an estimate where the publisher states none.
    md5: checksum in hexadecimal digits, where the publisher states this one.
    sha256: checksum in hexadecimal digits, where the publisher states this one.
    exact: whether `size` is exact; if not, the checksum alone decides.
    """

    name: str
    urls: tuple[str, ...]
    size: int
    md5: str | None = None
    sha256: str | None = None
    exact: bool = True


@dataclass(frozen=True)
class DataSpec:
    """A data set that gz knows by name: images [channels, size, size].

    name: what `--data` takes.
    title: what it shows, in a line.
    classes: names of the classes, or how many there are where the files tell the names; () without labels.
    channels: 1 (grey) or 3 (RGB).
    size: pixels a side; pictures of many sizes are packed to it unless `data.size` asks for another.
    n_train: images of the official training split.
    n_test: images of the official test split.
    licence: the publisher's terms, in a line.
    citation: the paper, or the page.
    n_val: images of the official validation split; 0: validation is carved from train.
    levels: grey levels, 2 … 256.
    multilabel: whether an image may have any number of the classes.
    files: what is downloaded.
    larger: (size, files) of the sizes that the publisher offers beside `size`, ascending.
    extras: what comes with each image, of `conditions.EXTRAS`.
    embedded: whether it is made from an installed package, without a download.
    page: where a browser gets the files, if their host may refuse a program.
    hub: its id on the Hugging Face hub, where it may be had by agreement.
    linked: whether the user's own files are used where they lie; `--from` then makes links, no copies.
    grey: whether they are grey and stored as colour.
    """

    name: str
    title: str
    classes: tuple[str, ...] | int
    channels: int
    size: int
    n_train: int
    n_test: int
    licence: str
    citation: str
    n_val: int = 0
    levels: int = 256
    multilabel: bool = False
    files: tuple[DataFile, ...] = ()
    larger: tuple[tuple[int, tuple[DataFile, ...]], ...] = ()
    extras: tuple[str, ...] = ()
    embedded: bool = False
    page: str = ""
    hub: str = ""
    linked: bool = False
    grey: bool = False

    @property
    def key(self) -> str:
        """Its name in run ids and in the cache."""
        return self.name

    @property
    def reference(self) -> str:
        """The text that means this set from any folder."""
        return self.name

    @property
    def shown(self) -> str:
        """What messages call it."""
        return self.name

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
        """Images that are left to train on, once what the publisher does not split off is carved from train:
        as `splits.split_plan` does it, before anything is packed."""
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


def listed(text: str) -> tuple[str, ...]:
    """The names in a text, which semicolons separate."""
    return tuple(name.strip() for name in text.split(";"))
