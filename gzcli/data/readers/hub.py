"""A data set of the hub: parquet files, read where they lie, or a folder that `save_to_disk` of the
`datasets` library wrote."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gzcli.core.errors import MissingError, UsageError
from gzcli.core.units import counted
from gzcli.data.readers.files import is_regular, read_regular, split_of
from gzcli.data.readers.images import PROBES, Block, Blocks, RawImages
from gzcli.data.sets.registry import CAPTIONS, further_of

BATCH_ROWS = 64  # rows that are read at a time
MOST_FOLDERS = 30  # folders in a folder, beyond which it is taken for one of classes
NAMED_AS_IMAGES = ("image", "img", "picture", "photo", "jpg", "png")
MARKS = ("dataset_dict.json", "state.json")  # files by which a folder of `save_to_disk` is known
# Columns that may hold labels as plain numbers or texts; the first that is there counts.
LABELS = ("label", "labels", "fine_label", "class", "class_label", "target", "category", "cls", "y")
MOST_CLASSES = 10_000  # classes of a column of numbers, at most


def parquet_files(path: Path) -> dict[str, list[Path]]:
    """The parquet files at a path, or in a folder and those below it, by split. A file's name tells its split
    (`train-00000-of-00002.parquet`), or its folder's does (`default/train/0000.parquet`). Where neither does
    of any file, all are of train. {} where there are no files."""
    if path.suffix == ".parquet":
        return {"train": [path]}
    sets: dict[str, dict[str, list[Path]]] = {}
    for file in _parquet_below(path, 2):
        words = [file.name.split("-")[0].split(".")[0], file.parent.name.removeprefix("partial-")]
        splits = [split_of(word) for word in words[: 1 if file.parent == path else 2]]
        split = next((split[0] for split in splits if split), "")
        parents = [
            part
            for part in file.relative_to(path).parts[:-1]
            if part != "data" and not split_of(part.removeprefix("partial-"))
        ]
        sets.setdefault("/".join(parents), {}).setdefault(split, []).append(file)
    with_splits = {name: files for name, files in sets.items() if set(files) != {""}}
    chosen = with_splits or sets
    if len(chosen) > 1:
        names = ", ".join(f"`{name or '.'}`" for name in sorted(chosen))
        hint = f"give one of them, as `{path / min(chosen)}`"
        raise UsageError(f"`{path}` holds several sets: {names}", hint=hint)
    files = next(iter(chosen.values()), {})
    with_split = {split: paths for split, paths in files.items() if split}
    return with_split or ({"train": files[""]} if files else {})


def _parquet_below(path: Path, depth: int) -> list[Path]:
    """The parquet files in a folder and in those below it, to some depth."""
    names = sorted(name for name in os.listdir(path) if not name.startswith("."))
    files = [path / name for name in names if name.endswith(".parquet") and (path / name).is_file()]
    folders = [path / name for name in names if "." not in name and (path / name).is_dir()] if depth else []
    if len(folders) > MOST_FOLDERS:
        return files
    return files + [file for folder in folders for file in _parquet_below(folder, depth - 1)]


class Parquet:
    """The rows of parquet files, as `Columns`."""

    def __init__(self, paths: Sequence[Path]):
        try:
            import pyarrow.parquet
        except ImportError as e:
            hint = "`pip install 'gzcli[datasets]'`"
            raise MissingError(f"reading `{paths[0]}` takes the package `pyarrow`", hint=hint) from e
        self.paths = paths
        try:
            self.files = [pyarrow.parquet.ParquetFile(path) for path in paths]
        except (OSError, pyarrow.ArrowException) as e:
            raise MissingError(f"`{paths[0].parent}` holds parquet that cannot be read: {e}") from e
        self.classes: dict[str, tuple[str, ...]] = {}
        self.kinds = {field.name: self._kind(field) for field in self.files[0].schema_arrow}

    @cached_property
    def _features(self) -> dict[str, Any]:
        """What the `datasets` library noted of each column."""
        noted = (self.files[0].schema_arrow.metadata or {}).get(b"huggingface")
        return json.loads(noted).get("info", {}).get("features") or {} if noted else {}

    def _kind(self, field: Any) -> str:
        import pyarrow as pa

        feature = self._features.get(field.name)
        noted: dict[str, Any] = feature if isinstance(feature, dict) else {}
        if noted.get("_type") == "ClassLabel" and noted.get("names"):
            self.classes[field.name] = tuple(noted["names"])
            return "class"
        cell = pa.types.is_struct(field.type) and {"bytes"} <= {part.name for part in field.type}
        raw = pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)
        if noted.get("_type") == "Image" or cell or (raw and field.name.lower() in NAMED_AS_IMAGES):
            return "image"
        if pa.types.is_integer(field.type):
            return "int"
        return "text" if pa.types.is_string(field.type) or pa.types.is_large_string(field.type) else ""

    def __len__(self) -> int:
        return sum(file.metadata.num_rows for file in self.files)

    def values(self, column: str) -> list[Any]:
        return [value for batch in self._batches(column) for value in batch.column(0).to_pylist()]

    def pictures(self, column: str) -> Iterator[bytes | None]:
        """Encoded pictures in order, None for an empty cell."""
        for file in range(len(self.files)):
            for batch in self._batches(column, [file]):
                yield from (self._picture(file, cell) for cell in batch.column(0).to_pylist())

    def some(self, column: str, n: int) -> Iterator[tuple[int, bytes | None]]:
        """(row, picture) of about n rows that lie apart: the first of as many row groups."""
        groups, first = [], 0
        for number, file in enumerate(self.files):
            for group in range(file.num_row_groups):
                groups.append((first, number, group))
                first += file.metadata.row_group(group).num_rows
        few = groups[:: max(1, len(groups) // n)][:n]
        for first, number, group in few:
            batch = next(self._batches(column, [number], [group]), None)
            cells = [] if batch is None else batch.column(0).to_pylist()[: max(1, n // len(few))]
            for i, cell in enumerate(cells):
                yield first + i, self._picture(number, cell)

    def _batches(
        self, column: str, files: Sequence[int] | None = None, groups: list[int] | None = None
    ) -> Iterator[Any]:
        for number in range(len(self.files)) if files is None else files:
            yield from self.files[number].iter_batches(BATCH_ROWS, columns=[column], row_groups=groups)

    def _picture(self, file: int, cell: Any) -> bytes | None:
        if cell is None or isinstance(cell, bytes):
            return cell
        if cell["bytes"] is not None:
            return cell["bytes"]
        return read_regular(self.paths[file].parent / cell["path"])


class Columns(Protocol):
    """The rows of a split of a data set of the hub."""

    # what each column holds: "image", "class" (class labels), "int", "text" or "" (anything else)
    kinds: dict[str, str]
    classes: dict[str, tuple[str, ...]]  # names of the classes of each column of class labels

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
            hint = "take the row out, or the column"
            raise UsageError(f"`{path}` has no picture in `{where}[{i}]`", hint=hint)
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
    message, hint = f"`{path}` has images without a label in `{column}`", "take them out, or the column"
    if None in every:
        raise UsageError(message, hint=hint)
    if kinds[column] == "text":
        classes = tuple(sorted(every))
        number = {label: i for i, label in enumerate(classes)}
        values = {split: [number[label] for label in rows] for split, rows in values.items()}
    else:
        numbers = range(min(max(every, default=0) + 1, MOST_CLASSES))
        classes = splits["train"].classes[column] if named else tuple(map(str, numbers))
    labels = {split: np.asarray(rows, np.int64) for split, rows in values.items()}
    if any(len(y) and (y.min() < 0 or y.max() >= len(classes)) for y in labels.values()):
        raise UsageError(message, hint=hint)
    return classes, labels, notes


def _splits(path: Path) -> dict[str, Columns]:
    """The rows of train, and of val and test where there are."""
    files = {} if any((path / mark).exists() for mark in MARKS) else parquet_files(path)
    named: dict[str, Columns] = (
        {split: Parquet(paths) for split, paths in files.items()} if files else _saved(path)
    )
    splits = {split: data for name, data in named.items() if (split := (split_of(name) or ("",))[0])}
    if "train" not in splits:
        raise UsageError(f"`{path}` has no split `train`", hint=f"it has: {', '.join(named)}")
    return splits


def _saved(path: Path) -> dict[str, Columns]:
    """The splits that `save_to_disk` wrote."""
    try:
        import datasets
    except ImportError as e:
        hint = "`pip install 'gzcli[datasets]'`"
        message = f"`{path}` is a dataset folder: reading it takes the package `datasets`"
        raise MissingError(message, hint=hint) from e
    datasets.disable_progress_bars()
    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as e:  # whatever its readers raise: ArrowInvalid, FileNotFoundError, ValueError, …
        raise MissingError(f"`{path}` is not a dataset folder that can be read: {e}") from e
    named = dict(saved) if isinstance(saved, dict) else {"train": saved}
    return {split: Saved(path, data) for split, data in named.items()}


class Saved:
    """The `Columns` of a split that the `datasets` library reads."""

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
