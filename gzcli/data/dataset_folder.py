"""A dataset folder of the `datasets` library: one that `save_to_disk` wrote, or one of parquet files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gzcli.data.build import Block, Source
from gzcli.errors import MissingError, UsageError
from gzcli.store.paths import cache_dir

MARKS = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves


def is_dataset_folder(path: Path) -> bool:
    """Whether a folder is one; told by its files, without the library."""
    return path.is_dir() and (any((path / mark).exists() for mark in MARKS) or bool(_parquet(path)))


def dataset_folder(path: Path) -> Source:
    """Its images: the first column of images that is not named as a further picture; those that are (`conditioning_image`,
    `input_image`, …); labels of the first column of class labels; captions of a column `text`, `caption`, `edit_prompt` or
    `instruction`. Raises MissingError without the `datasets` package, UsageError where there is no column of images."""
    from gzcli.data.conditions import CAPTIONS, further_of
    from gzcli.data.encoded import PROBES

    splits = _splits(path)
    features = splits["train"].features
    images = _columns(features, "Image")
    if not images:
        hint = f"its columns are {', '.join(f'`{name}`' for name in features)}; one must be of images"
        raise UsageError(f"`{path}` has no column of images", hint=hint)
    image = next((name for name in images if further_of(name) is None), images[0])
    further: dict[str, str] = {}  # kind → column
    for name in images:
        if name != image and (kind := further_of(name)):
            further.setdefault(kind, name)
    label = next(iter(_columns(features, "ClassLabel")), None)
    caption = next((name for name in CAPTIONS if name in features), None)
    classes = tuple(features[label].names) if label else ()
    labels = {split: np.asarray(data[label], np.int64) for split, data in splits.items()} if label else {}
    if any(len(y) and (y.min() < 0 or y.max() >= len(classes)) for y in labels.values()):
        raise UsageError(f"`{path}` has images without a label in `{label}`", hint="take them out, or the column")

    def cells(column: str, split: str, data: Any, index: Any) -> Iterator[tuple[int, str, bytes]]:
        where = split if column == image else f"{split}.{column}"
        undecoded = data.select_columns([column]).cast_column(column, _undecoded())
        for i in index:
            cell = undecoded[int(i)][column]
            if cell is None:
                raise UsageError(f"`{path}` has no picture in `{where}[{i}]`", hint="take the row out, or the column")
            picture = cell["bytes"] if cell["bytes"] is not None else (path / cell["path"]).read_bytes()
            yield i, f"{where}[{i}]", picture

    def blocks_of(column: str) -> Callable[[], Iterator[Block]]:
        def blocks() -> Iterator[Block]:
            for split, data in splits.items():
                for i, name, picture in cells(column, split, data, range(len(data))):
                    yield split, i, picture, name

        return blocks

    def probe() -> Iterator[tuple[str, bytes]]:
        n = len(splits["train"])
        looked_at = range(0, n, max(1, n // PROBES))
        return ((name, data) for _, name, data in cells(image, "train", splits["train"], looked_at))

    return Source(
        str(path), classes, {split: len(data) for split, data in splits.items()}, labels, blocks_of(image), probe=probe,
        captions={split: [text or "" for text in data[caption]] for split, data in splits.items()} if caption else {},
        further={kind: blocks_of(column) for kind, column in further.items()},
    )  # fmt: skip


def _splits(path: Path) -> dict[str, Any]:
    """train, and val and test where there are."""
    try:
        import datasets
    except ImportError as e:
        hint = "`pip install 'gzcli[datasets]'`"
        raise MissingError(f"`{path}` is a dataset folder: reading it takes the package `datasets`", hint=hint) from e
    try:
        if files := _parquet(path):
            given = {split: list(map(str, paths)) for split, paths in files.items()}
            found = datasets.load_dataset("parquet", data_files=given, cache_dir=str(cache_dir("datasets")))
        else:
            found = datasets.load_from_disk(str(path))
    except Exception as e:  # the library raises what its readers raise: ArrowInvalid, FileNotFoundError, ValueError, …
        raise MissingError(f"`{path}` is not a dataset folder that can be read: {e}") from e
    named = dict(found) if isinstance(found, dict) else {"train": found}
    splits = {_split(name): data for name, data in named.items() if _split(name)}
    if "train" not in splits:
        raise UsageError(f"`{path}` has no split `train`", hint=f"it has: {', '.join(named)}")
    return splits


def _parquet(path: Path) -> dict[str, list[Path]]:
    """The parquet files of a folder, or of its `data` folder, by split: `train-00000-of-00002.parquet`."""
    found: dict[str, list[Path]] = {}
    for file in sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")]):
        if split := _split(file.name.split("-")[0].split(".")[0]):
            found.setdefault(split, []).append(file)
    return found


def _split(name: str) -> str | None:
    from gzcli.data.folder import SPLIT_NAMES

    return SPLIT_NAMES.get(name.lower())


def _columns(features: Any, kind: str) -> list[str]:
    return [name for name, feature in features.items() if type(feature).__name__ == kind]


def _undecoded() -> Any:
    import datasets

    return datasets.Image(decode=False)
