"""A data set of the hub, read in place: parquet files, or Arrow files by `save_to_disk` of the `datasets`
library."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gzcli.core.errors import MissingError, UsageError, first_line, install_line
from gzcli.core.formats import extra_of
from gzcli.core.units import counted
from gzcli.data.readers.images import (
    PROBED_IMAGES,
    Block,
    Blocks,
    Content,
    RawImages,
    content_of,
    is_regular,
    refuse_exhausted,
    split_of,
)
from gzcli.data.sets.registry import CAPTIONS, further_of
from gzcli.store.files import is_below, read_object

BATCH_ROWS = 64  # rows read at a time
MOST_FOLDERS = 30  # with more subfolders than this, a folder is one of classes
NAMED_AS_IMAGES = ("image", "img", "picture", "photo", "jpg", "png")
SPLITS_FILE, STATE_FILE = "dataset_dict.json", "state.json"  # of a folder of `save_to_disk`
# Columns that may contain labels as plain numbers or texts; the first that is there counts.
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "class_label", "target", "category", "cls", "y")
MAX_HUB_CLASSES = 10_000  # maximum number of classes in a column of numbers


def is_dataset_folder(path: Path) -> bool:
    """Whether a path is a data set of the hub. Only its files are checked, without importing a library."""
    if not is_regular(path):
        return False
    if path.is_file():
        return path.suffix == ".parquet"
    return any((path / name).exists() for name in (SPLITS_FILE, STATE_FILE)) or bool(parquet_files(path))


def parquet_files(path: Path) -> dict[str, list[Path]]:
    """The parquet files at a path, or in a folder and those below it, by split. The split is in the file name
    (`train-00000-of-00002.parquet`) or the folder name (`default/train/0000.parquet`). If no name has a
    split, all files are train. {} if there are no files."""
    if path.suffix == ".parquet":
        return {"train": [path]}
    sets: dict[str, dict[str, list[Path]]] = {}
    for file in _parquet_below(path, 2):
        above = [part.removeprefix("partial-") for part in file.relative_to(path).parts[:-1]]
        words = [re.split("[-.]", file.name)[0], *above[-1:]]
        split = next((split[0] for word in words if (split := split_of(word))), "")
        name = "/".join(part for part in above if part != "data" and not split_of(part))
        sets.setdefault(name, {}).setdefault(split, []).append(file)
    sets = {name: splits for name, splits in sets.items() if any(splits)} or sets
    if len(sets) > 1:
        names = ", ".join(f"`{name or '.'}`" for name in sorted(sets))
        hint = f"give one of them, such as `{path / min(sets)}`"
        raise UsageError(f"`{path}` contains several sets: {names}", hint=hint)
    files = next(iter(sets.values()), {})
    named = {split: paths for split, paths in files.items() if split}
    return named or ({"train": files[""]} if files else {})


def _parquet_below(path: Path, depth: int) -> list[Path]:
    """The parquet files in a folder and in those below it, to some depth."""
    names = sorted(name for name in os.listdir(path) if not name.startswith("."))
    files = [path / name for name in names if name.endswith(".parquet") and (path / name).is_file()]
    folders = [path / name for name in names if "." not in name and (path / name).is_dir()] if depth else []
    if len(folders) > MOST_FOLDERS:
        return files
    return files + [file for folder in folders for file in _parquet_below(folder, depth - 1)]


def _arrow_files(folder: Path) -> list[Path]:
    """The Arrow files of a split that `save_to_disk` wrote."""
    state = read_object(folder / STATE_FILE)
    return [folder / Path(row["filename"]).name for row in state["_data_files"]]


class Part(NamedTuple):
    """Consecutive rows of a file that are read together."""

    file: int  # index of the file
    group: int | None  # index of the row group; None in an Arrow file, which has none
    first: int  # index of its first row in the file
    rows: int  # number of rows


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns errors of a damaged or foreign file that is read within the block into MissingError."""
    try:
        import pyarrow
    except ImportError as e:
        hint = install_line(extra_of("hub"))
        raise MissingError(f"reading `{path}` requires the package `pyarrow`", hint=hint) from e
    try:
        yield
    except (OSError, ValueError, TypeError, AttributeError, LookupError, pyarrow.ArrowException) as e:
        refuse_exhausted(e)
        raise MissingError(f"`{path}` cannot be read: {first_line(e)}", hint="replace or remove it") from e


class Rows:
    """The rows of a split, column by column. Cells may name images in the folder of the set, `root`."""

    def __init__(self, paths: Sequence[Path], root: Path):
        self.paths, self.root = paths, root
        self.files = [_opened(path) for path in paths]
        schema = _schema(self.files[0])
        self.classes: dict[str, tuple[str, ...]] = {}  # names of the classes, by column of class labels
        with _reading(paths[0]):
            noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
            # description of columns, as in the `datasets` library
            features = noted.get("info", {}).get("features") or {}
            # The kind of each column: "image", "class" (class labels), "int", "text" or "" (anything else).
            self.kinds = {field.name: self._kind(field, features.get(field.name)) for field in schema}

    def _kind(self, field: Any, feature: Any) -> str:
        from pyarrow import types

        noted = feature if isinstance(feature, dict) else {}
        if noted.get("_type") == "ClassLabel" and noted.get("names") and types.is_integer(field.type):
            self.classes[field.name] = tuple(map(str, noted["names"]))
            return "class"
        # an image, or in a structure an image or the name of its file
        cells = {part.name: part.type for part in field.type} if types.is_struct(field.type) else {}
        raw = cells.get("bytes", field.type)
        named = noted.get("_type") == "Image" or field.name.lower() in NAMED_AS_IMAGES
        binary = types.is_binary(raw) or types.is_large_binary(raw) or types.is_null(raw)
        if binary and (cells or named):
            return "image"
        if types.is_integer(field.type):
            return "int"
        return "text" if types.is_string(field.type) or types.is_large_string(field.type) else ""

    def __len__(self) -> int:
        return sum(part.rows for part in self._parts())

    def values(self, column: str) -> list[Any]:
        """The cells of a column in order."""
        return [cell for part in self._parts() for cell in self._cells(part, column)]

    def pictures(self, column: str) -> Iterator[Content | None]:
        """The encoded images of a column in order; None for an empty cell."""
        for part in self._parts():
            yield from self._pictures(part, column)

    def spread_rows(self, column: str, n: int) -> Iterator[tuple[int, Content | None]]:
        """(row, encoded image) of about n rows spread over the files: the first rows of n parts."""
        parts, first = [], 0
        for part in self._parts():
            parts.append((first, part))
            first += part.rows
        chosen = parts[:: max(1, len(parts) // n)][:n]
        for first, part in chosen:
            yield from islice(enumerate(self._pictures(part, column), first), max(1, n // len(chosen)))

    def _parts(self) -> Iterator[Part]:
        for index, file in enumerate(self.files):
            first = 0
            if hasattr(file, "num_row_groups"):
                for group in range(file.num_row_groups):
                    rows = file.metadata.row_group(group).num_rows
                    yield Part(index, group, first, rows)
                    first += rows
            else:
                for first in range(0, len(file), BATCH_ROWS):
                    yield Part(index, None, first, min(BATCH_ROWS, len(file) - first))

    def _cells(self, part: Part, column: str) -> Iterator[Any]:
        file = self.files[part.file]
        with _reading(self.paths[part.file]):
            if column not in _schema(file).names:
                raise ValueError(f"it has no column `{column}`")
            if part.group is None:
                yield from file.column(column).slice(part.first, BATCH_ROWS).to_pylist()
                return
            for batch in file.iter_batches(BATCH_ROWS, columns=[column], row_groups=[part.group]):
                yield from batch.column(0).to_pylist()

    def _pictures(self, part: Part, column: str) -> Iterator[Content | None]:
        path = self.paths[part.file]
        for row, cell in enumerate(self._cells(part, column), part.first):
            yield self._picture(path, row, cell) if isinstance(cell, dict) else cell

    def _picture(self, path: Path, row: int, cell: dict[str, Any]) -> Content | None:
        """The encoded image of a cell, which may name a file of the set instead of containing the image.
        Raises MissingError for any other file, as the set may come from a stranger."""
        if cell["bytes"] is not None or cell.get("path") is None:
            return cell["bytes"]
        file = path.parent / str(cell["path"])
        # in the hub's cache, all files of a set are links into one folder
        linked = os.path.islink(file) and is_below(Path(os.path.realpath(file)), path.resolve().parent)
        if linked or is_below(file, self.root):
            return content_of(file)
        message = f"row {row} of `{path}` names `{cell['path']}`, which is not a file below `{self.root}`"
        raise MissingError(message, hint="store the image in the row, or put its file into that folder")


def _opened(path: Path) -> Any:
    """A parquet file, or the table of an Arrow file, which is mapped into memory."""
    with _reading(path):
        import pyarrow.parquet

        if path.suffix == ".parquet":
            return pyarrow.parquet.ParquetFile(path)
        return pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()


def _schema(file: Any) -> Any:
    return getattr(file, "schema_arrow", None) or file.schema


def _splits(path: Path) -> dict[str, Rows]:
    """The rows of train, and those of val and test if there are any."""
    try:
        if (path / SPLITS_FILE).exists():
            names = read_object(path / SPLITS_FILE)["splits"]
            files = {name: _arrow_files(path / name) if split_of(name) else [] for name in names}
        else:
            files = {"train": _arrow_files(path)} if (path / STATE_FILE).exists() else parquet_files(path)
    except (KeyError, TypeError) as e:
        raise MissingError(f"`{path}` cannot be read as a data set folder: {first_line(e)}") from e
    splits = {split[0]: paths for name, paths in files.items() if paths and (split := split_of(name))}
    if "train" not in splits:
        names = ", ".join(name for name, paths in files.items() if paths)
        raise UsageError(
            f"`{path}` has no split `train`",
            hint=f"name one of its splits `train`; it has: {names or 'none with rows'}",
        )
    root = path if path.is_dir() else path.parent
    return {split: Rows(paths, root) for split, paths in splits.items()}


def dataset_folder(path: Path) -> RawImages:
    """The images of a data set of the hub.

    - images: the first column of images whose name does not denote further images
    - further images: columns of images whose names denote them (`conditioning_image`, `input_image`, …)
    - labels: the first column of class labels, otherwise a column of LABEL_COLUMNS with integers or texts. A
    split other than train whose labels are all −1 (hidden on the hub) is omitted.
    - captions: a column `text`, `caption`, `edit_prompt` or `instruction`
    """
    splits = _splits(path)
    kinds = splits["train"].kinds
    columns = [name for name, kind in kinds.items() if kind == "image"]
    if not columns:
        hint = f"put images into one of its columns: {', '.join(f'`{name}`' for name in kinds)}"
        raise UsageError(f"`{path}` has no column of images", hint=hint)
    image = next((name for name in columns if further_of(name) is None), columns[0])
    further: dict[str, str] = {}  # kind → column
    for name in columns:
        if name != image and (kind := further_of(name)):
            further.setdefault(kind, name)
    classes, labels, notes = _labels(path, splits)
    splits = {split: rows for split, rows in splits.items() if not labels or split in labels}
    caption = next((name for name in CAPTIONS if name in kinds), None)

    def checked_picture(column: str, split: str, i: int, picture: Content | None) -> tuple[str, Content]:
        place = f"{split if column == image else f'{split}.{column}'}[{i}]"
        if picture is None:
            raise UsageError(f"`{path}` has no image in `{place}`", hint="remove the row or the column")
        return place, picture

    def blocks_of(column: str) -> Blocks:
        def blocks() -> Iterator[Block]:
            for split, rows in splits.items():
                for i, cell in enumerate(rows.pictures(column)):
                    name, picture = checked_picture(column, split, i, cell)
                    yield Block(split, i, picture, name)

        return blocks

    return RawImages(
        str(path),
        classes,
        {split: len(rows) for split, rows in splits.items()},
        labels,
        blocks_of(image),
        probe=lambda: (
            checked_picture(image, "train", i, cell)
            for i, cell in splits["train"].spread_rows(image, PROBED_IMAGES)
        ),
        captions={s: [text or "" for text in rows.values(caption)] for s, rows in splits.items() if caption},
        further={kind: blocks_of(column) for kind, column in further.items()},
        notes=notes,
    )


def _labels(path: Path, splits: dict[str, Rows]) -> tuple[tuple[str, ...], dict[str, np.ndarray], list[str]]:
    """The classes, the labels int64 [N] of each split, and notes on omissions."""
    kinds = splits["train"].kinds
    labelled = next((name for name, kind in kinds.items() if kind == "class"), None)
    column = labelled or next((name for name in LABEL_COLUMNS if kinds.get(name) in ("int", "text")), None)
    if column is None:
        return (), {}, []
    values = {split: rows.values(column) for split, rows in splits.items()}
    hidden = [split for split, y in values.items() if split != "train" and y and set(y) <= {-1, None}]
    notes = [
        f"{counted(len(values.pop(split)), 'image')} of `{split}` skipped: they have no labels"
        for split in hidden
    ]
    every = {value for y in values.values() for value in y}
    message = f"`{path}` has images without a label in `{column}`"
    unlabelled = UsageError(message, hint="remove these images, or the column")
    if None in every:
        raise unlabelled
    if kinds[column] == "text":
        classes = tuple(sorted(every))
        number = {label: i for i, label in enumerate(classes)}
        values = {split: [number[label] for label in y] for split, y in values.items()}
    elif labelled:
        classes = splits["train"].classes[column]
    else:
        classes = tuple(map(str, range(min(max(every, default=0) + 1, MAX_HUB_CLASSES))))
    if any(not 0 <= label < len(classes) for y in values.values() for label in y):
        raise unlabelled
    return classes, {split: np.asarray(y, np.int64) for split, y in values.items()}, notes
