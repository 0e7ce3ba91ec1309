"""What is known of a data set before it is opened: shape, classes, files with checksums, licence. No heavy
import."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class DataFile:
    """A file as its publisher serves it; `urls` are tried in order, `size` is in bytes.

    Where the publisher states no size (`exact` is False) it is an estimate, and the checksum alone decides.
    """

    name: str
    urls: tuple[str, ...]
    size: int
    md5: str | None = None
    sha256: str | None = None
    exact: bool = True


@dataclass(frozen=True)
class DataSpec:
    """A data set: images [channels, size, size] with `levels` grey levels.

    `classes` are names, or how many there are where the files tell the names; () where the set has no labels.
    """

    name: str
    title: str
    classes: tuple[str, ...] | int
    channels: int
    # that of the files; of pictures of many sizes, that to which they are packed unless `data.size` asks
    size: int
    n_train: int  # the official splits
    n_test: int
    licence: str
    citation: str
    n_val: int = 0  # 0: validation is carved from train
    levels: int = 256
    multilabel: bool = False  # any number of the classes can hold at once
    files: tuple[DataFile, ...] = ()
    larger: tuple[
        tuple[int, tuple[DataFile, ...]], ...
    ] = ()  # sizes that the publisher offers beside `size`, ascending
    extras: tuple[str, ...] = ()  # what comes with each image: "caption", "control", "before"
    embedded: bool = False  # made from what is installed; nothing to download
    page: str = ""  # where a browser gets the files, if their host may refuse a program
    linked: bool = False  # the user's own files, used where they lie: `--from` makes links to them, no copies

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        return self.channels, self.size, self.size

    @property
    def n_classes(self) -> int:
        return self.classes if isinstance(self.classes, int) else len(self.classes)

    @property
    def download_size(self) -> int:
        """Bytes to fetch."""
        return sum(file.size for file in self.files)

    @property
    def versions(self) -> list[DataSpec]:
        """The set in every size that its publisher offers."""
        return [self, *(self.sized(side) for side, _ in self.larger)]

    def sized(self, size: int | None) -> DataSpec:
        """The set in the smallest size of its publisher that holds `size` pixels, else in the largest."""
        if size is None or size <= self.size or not self.larger:
            return self
        side, files = next((row for row in self.larger if row[0] >= size), self.larger[-1])
        return replace(self, size=side, files=files, larger=())


def find(name: str) -> DataSpec:
    """The set of this name, `-` and `_` alike. Raises UsageError with the nearest name."""
    from gzcli.data.sets import SPECS
    from gzcli.errors import UsageError, canonical, did_you_mean

    for spec in SPECS.values():
        if canonical(spec.name) == canonical(name):
            return spec
    raise UsageError(
        f"there is no data set `{name}`",
        hint=did_you_mean(name, SPECS) or "`gz data list` shows the names; a path works too",
    )
