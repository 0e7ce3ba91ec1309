"""A data set of the hub: parquet files, or a folder that `save_to_disk` of the `datasets` library wrote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gzcli.core.errors import MissingError, UsageError
from gzcli.data.readers.conditions import CAPTIONS, further_of
from gzcli.data.readers.encoded import PROBES
from gzcli.data.readers.kinds import counted
from gzcli.data.readers.layout import split_of
from gzcli.data.readers.parquet import Parquet, parquet_files
from gzcli.data.readers.raw_images import Block, Blocks, RawImages
from gzcli.data.readers.walk import is_regular, read_regular

MARKS = ("dataset_dict.json", "state.json")  # files by which a folder of `save_to_disk` is known
# Columns that may hold labels as plain numbers or texts; the first that is there counts.
LABELS = ("label", "labels", "fine_label", "class", "class_label", "target", "category", "cls", "y")
MOST_CLASSES = 10_000  # classes of a column of numbers, at most


class Columns(Protocol):
    """The rows of a split of a data set of the hub.

    kinds: what each column holds: "image", "class" (class labels), "int", "text" or "" (anything else).
    classes: names of the classes of each column of class labels.
    """

    kinds: dict[str, str]
    classes: dict[str, tuple[str, ...]]

    def __len__(self) -> int: ...

    def values(self, column: str) -> list[Any]:
        """The cells of a column in order."""

    def pictures(self, column: str) -> Iterator[bytes | None]:
        """The encoded pictures of a column in order; None for an empty cell."""

    def some(self, column: str, n: int) -> Iterator[tuple[int, bytes | None]]:
        """(row, encoded picture) of about n rows that lie apart."""


def is_dataset_folder(path: Path) -> bool:
    """Whether a path is a data set of the hub, by its files alone: no library is imported."""
    if not is_regular(path):
        return False
    if path.is_file():
        return path.suffix == ".parquet"
    return any((path / mark).exists() for mark in MARKS) or bool(parquet_files(path))


def dataset_folder(path: Path) -> RawImages:
    """The images of a data set of the hub.

    - images: the first column of images whose name does not mean a further picture
    - further pictures: columns of images whose names do (`conditioning_image`, `input_image`, …)
    - labels: the first column of class labels, else of integers or texts in a column of LABELS. A split but
      train whose labels are all −1, the hub's sign for hidden ones, is left out.
    - captions: a column `text`, `caption`, `edit_prompt` or `instruction`

    Raises MissingError without the package that reads it, UsageError where there is no column of images.
    """
    splits = _splits(path)
    kinds = splits["train"].kinds
    columns = [name for name, kind in kinds.items() if kind == "image"]
    if not columns:
        hint = f"its columns are {', '.join(f'`{name}`' for name in kinds)}; one must be of images"
        raise UsageError(f"`{path}` has no column of images", hint=hint)
    image = next((name for name in columns if further_of(name) is None), columns[0])
    further: dict[str, str] = {}  # kind → column
    for name in columns:
        if name != image and (kind := further_of(name)):
            further.setdefault(kind, name)
    classes, labels, left_out = _labels(path, splits)
    splits = {split: rows for split, rows in splits.items() if not labels or split in labels}
    caption = next((name for name in CAPTIONS if name in kinds), None)

    def named(column: str, split: str, i: int, picture: bytes | None) -> tuple[str, bytes]:
        where = split if column == image else f"{split}.{column}"
        if picture is None:
            raise UsageError(
                f"`{path}` has no picture in `{where}[{i}]`", hint="take the row out, or the column"
            )
        return f"{where}[{i}]", picture

    def blocks_of(column: str) -> Blocks:
        def blocks() -> Iterator[Block]:
            for split, rows in splits.items():
                for i, cell in enumerate(rows.pictures(column)):
                    name, picture = named(column, split, i, cell)
                    yield Block(split, i, picture, name)

        return blocks

    def few() -> Iterator[tuple[str, bytes]]:
        return (named(image, "train", i, cell) for i, cell in splits["train"].some(image, PROBES))

    texts = {split: rows.values(caption) for split, rows in splits.items()} if caption else {}
    return RawImages(
        str(path),
        classes,
        {split: len(rows) for split, rows in splits.items()},
        labels,
        blocks_of(image),
        probe=few,
        captions={split: [text or "" for text in cells] for split, cells in texts.items()},
        further={kind: blocks_of(column) for kind, column in further.items()},
        notes=left_out,
    )


def _labels(
    path: Path, splits: dict[str, Columns]
) -> tuple[tuple[str, ...], dict[str, np.ndarray], list[str]]:
    """The classes, the labels int64 [N] of each split, and what was left out."""
    kinds = splits["train"].kinds
    named = next((name for name, kind in kinds.items() if kind == "class"), None)
    column = named or next((name for name in LABELS if kinds.get(name) in ("int", "text")), None)
    if column is None:
        return (), {}, []
    values = {split: data.values(column) for split, data in splits.items()}
    hidden = [
        split for split, rows in values.items() if split != "train" and rows and set(rows) <= {-1, None}
    ]
    notes = [
        f"{counted(len(values.pop(split)), 'picture')} of `{split}` skipped: they have no labels"
        for split in hidden
    ]
    every = {value for rows in values.values() for value in rows}
    if None in every:
        raise UsageError(
            f"`{path}` has images without a label in `{column}`", hint="take them out, or the column"
        )
    if kinds[column] == "text":
        classes = tuple(sorted(every))
        number = {label: i for i, label in enumerate(classes)}
        values = {split: [number[label] for label in rows] for split, rows in values.items()}
    else:
        numbers = range(min(max(every, default=0) + 1, MOST_CLASSES))
        classes = splits["train"].classes[column] if named else tuple(map(str, numbers))
    labels = {split: np.asarray(rows, np.int64) for split, rows in values.items()}
    if any(len(y) and (y.min() < 0 or y.max() >= len(classes)) for y in labels.values()):
        raise UsageError(
            f"`{path}` has images without a label in `{column}`", hint="take them out, or the column"
        )
    return classes, labels, notes


def _splits(path: Path) -> dict[str, Columns]:
    """The rows of train, and of val and test where there are."""
    files = {} if any((path / mark).exists() for mark in MARKS) else parquet_files(path)
    named: dict[str, Columns] = (
        {split: Parquet(paths) for split, paths in files.items()} if files else _saved(path)
    )
    found = {split: data for name, data in named.items() if (split := (split_of(name) or ("",))[0])}
    if "train" not in found:
        raise UsageError(f"`{path}` has no split `train`", hint=f"it has: {', '.join(named)}")
    return found


def _saved(path: Path) -> dict[str, Columns]:
    """The splits that `save_to_disk` wrote. Raises MissingError without the `datasets` library."""
    try:
        import datasets
    except ImportError as e:
        hint = "`pip install 'gzcli[datasets]'`"
        raise MissingError(
            f"`{path}` is a dataset folder: reading it takes the package `datasets`", hint=hint
        ) from e
    datasets.disable_progress_bars()
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as e:  # whatever its readers raise: ArrowInvalid, FileNotFoundError, ValueError, …
        raise MissingError(f"`{path}` is not a dataset folder that can be read: {e}") from e
    named = dict(found) if isinstance(found, dict) else {"train": found}
    return {split: Saved(path, data) for split, data in named.items()}


class Saved:
    """The `Columns` of a split that the `datasets` library reads.

    path: the folder.
    data: the library's own object.
    """

    def __init__(self, path: Path, data: Any):
        self.path, self.data = path, data
        kinds = {"Image": "image", "ClassLabel": "class"}
        plain = {"string": "text", "large_string": "text"} | {
            f"{u}int{n}": "int" for u in ("", "u") for n in (8, 16, 32, 64)
        }
        features = data.features.items()
        self.kinds = {
            k: kinds.get(type(f).__name__, plain.get(getattr(f, "dtype", ""), "")) for k, f in features
        }
        self.classes = {
            name: tuple(feature.names) for name, feature in features if self.kinds[name] == "class"
        }

    def __len__(self) -> int:
        return len(self.data)

    def values(self, column: str) -> list[Any]:
        return list(self.data[column])

    def pictures(self, column: str) -> Iterator[bytes | None]:
        return (cell for _, cell in self._rows(column, range(len(self))))

    def some(self, column: str, n: int) -> Iterator[tuple[int, bytes | None]]:
        return self._rows(column, range(0, len(self), max(1, len(self) // n)))

    def _rows(self, column: str, rows: range) -> Iterator[tuple[int, bytes | None]]:
        import datasets

        undecoded = self.data.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        for i in rows:
            cell = undecoded[i][column]
            if cell and cell["bytes"] is None:
                yield i, read_regular(self.path / cell["path"])
            else:
                yield i, cell["bytes"] if cell else None
