"""Parquet files, in which the hub keeps data sets: found by split, and read in batches where they lie,
without a copy in a cache."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from gzcli.core.errors import MissingError, UsageError
from gzcli.data.readers.layout import split_of
from gzcli.data.readers.walk import read_regular

BATCH_ROWS = 64  # rows that are read at a time
MOST_FOLDERS = 30  # folders in a folder, beyond which it is taken for one of classes
NAMED_AS_IMAGES = ("image", "img", "picture", "photo", "jpg", "png")


def parquet_files(path: Path) -> dict[str, list[Path]]:
    """The parquet files at a path, or in a folder and those below it, by split. A file's name tells its split
    (`train-00000-of-00002.parquet`), or its folder's does (`default/train/0000.parquet`). Where neither does
    of any file, all are of train. {} where there are no files.

    Raises UsageError where several sets (configurations) lie side by side.
    """
    if path.suffix == ".parquet":
        return {"train": [path]}
    sets: dict[str, dict[str, list[Path]]] = {}
    for file in _found(path, 2):
        words = [file.name.split("-")[0].split(".")[0], file.parent.name.removeprefix("partial-")]
        splits = [split_of(word) for word in words[: 1 if file.parent == path else 2]]
        split = next((found[0] for found in splits if found), "")
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
        raise UsageError(
            f"`{path}` holds several sets: {names}", hint=f"give one of them, as `{path / min(chosen)}`"
        )
    files = next(iter(chosen.values()), {})
    with_split = {split: paths for split, paths in files.items() if split}
    return with_split or ({"train": files[""]} if files else {})


def _found(path: Path, depth: int) -> list[Path]:
    """The parquet files in a folder and in those below it, to some depth."""
    names = sorted(name for name in os.listdir(path) if not name.startswith("."))
    found = [path / name for name in names if name.endswith(".parquet") and (path / name).is_file()]
    folders = [path / name for name in names if "." not in name and (path / name).is_dir()] if depth else []
    if len(folders) > MOST_FOLDERS:
        return found
    return found + [file for folder in folders for file in _found(folder, depth - 1)]


class Parquet:
    """The rows of parquet files, as `dataset_folder.Columns`.

    paths: the files, in order.

    Raises MissingError for a file that is no parquet, and without pyarrow.
    """

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
