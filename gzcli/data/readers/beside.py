"""The files beside images that describe them: captions, further images and labels.

- a line of a `metadata.jsonl`, {"file_name": …, "text": …}, with names relative to it. Further images in it
("control": …, "before": …) are not images of the set themselves.
- `NAME.txt`, a caption
- `NAME.cls`, a label, which overrides the folders
- a row of a table `*.csv` with its name and its label, which override the folders, too
- TinyImageNet's lists of classes
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import PurePosixPath
from posixpath import normpath, splitext

from gzcli.core.errors import MissingError, UsageError
from gzcli.core.units import counted
from gzcli.data.readers.hub import LABEL_COLUMNS
from gzcli.data.readers.images import LABEL_ENDING, METADATA, TABLE_ENDINGS, Members, may_be_picture
from gzcli.data.readers.texts import lines_of, rows_of, text_of
from gzcli.data.sets.registry import CAPTIONS, TARGET_KEYS, further_of


def _texts(title: str, members: Members, names: list[str]) -> Iterator[tuple[str, str]]:
    """(name, text) of some members. An archive is not opened for an empty list."""
    return ((name, text_of(data, name, title)) for name, data in (members.read(names) if names else ()))


# --- captions and further images ---


def descriptions(
    title: str, members: Members, names: list[str]
) -> tuple[list[str], dict[str, str], dict[str, dict[str, str]]]:
    """The images without those that are further images of others; captions by image; and further images by
    kind and image. Raises UsageError if only some images have a further image."""
    files = [name for name in members.names if name.endswith((".txt", METADATA))]
    picture_of = {splitext(name)[0] + ".txt": name for name in names} if files else {}
    texts = [name for name in files if name in picture_of or PurePosixPath(name).name == METADATA]
    captions: dict[str, str] = {}
    lined: dict[str, str] = {}  # the captions of lines, which override others
    further: dict[str, dict[str, str]] = {}
    for name, text in _texts(title, members, texts):
        if name in picture_of:
            captions[picture_of[name]] = text.strip()
            continue
        for picture, caption, others in _metadata(title, name, text, set(names)):
            lined[picture] = caption
            for kind, other in others.items():
                further.setdefault(kind, {})[picture] = other
    hidden = {other for pairs in further.values() for other in pairs.values()}.difference(lined)
    names = [name for name in names if name not in hidden]
    for kind, pairs in further.items():
        if lacking := [name for name in names if name not in pairs]:
            hint = f"give every image a line in `{METADATA}` with its `{kind}`, or none"
            message = f"`{title}` has {len(lacking):,} images without `{kind}`, such as `{lacking[0]}`"
            raise UsageError(message, hint=hint)
    return names, captions | lined, further


def _metadata(
    title: str, name: str, text: str, pictures: set[str]
) -> Iterator[tuple[str, str, dict[str, str]]]:
    """The lines of a `metadata.jsonl` as in `_metadata_line`, with the names of members."""
    for number, line in enumerate(lines_of(text), 1):
        if line.strip():
            picture, caption, further = _metadata_line(line, f"line {number} of `{name}` in `{title}`")
            inside = {file: normpath(f"{name}/../{file}") for file in (picture, *further.values())}
            if lost := next((file for file in inside.values() if file not in pictures), None):
                message = f"line {number} of `{name}` names `{lost}`, which `{title}` does not contain"
                raise MissingError(message)
            yield inside[picture], caption, {kind: inside[file] for kind, file in further.items()}


def _metadata_line(line: str, place: str) -> tuple[str, str, dict[str, str]]:
    """The image, the caption and the further images by kind of a line of `metadata.jsonl`. Keys may end in
    `_file_name`, as in the `datasets` library. A key of FURTHER is ignored if its value is not the name of an
    image, as in {"source": "flickr"}."""
    hint = 'write each line like {"file_name": "0001.png", "text": "a red door"}'
    try:
        row = {key.removesuffix("_file_name"): value for key, value in json.loads(line).items()}
        pictures = {k: v for k, v in row.items() if isinstance(v, str) and may_be_picture(v)}
        targets = [pictures[key] for key in TARGET_KEYS if key in pictures]
        picture = str(row["file_name"]) if "file_name" in row or not targets else targets[0]
        caption = next(row[key] for key in CAPTIONS if isinstance(row.get(key), str))
    except (ValueError, KeyError, StopIteration, AttributeError, RecursionError) as e:
        raise UsageError(f"{place} lacks `file_name` or `text`", hint=hint) from e
    if any(target != picture for target in targets):
        example = '{"before": "in.png", "after": "out.png", "text": "make it snow"}'
        hint = f"name the image to edit `before`, as in {example}"
        raise UsageError(f"{place} names two images, `{picture}` and `{targets[-1]}`", hint=hint)
    further: dict[str, str] = {}
    for key, value in pictures.items():
        if kind := further_of(key):
            further.setdefault(kind, value)
    return picture, caption, further


# --- labels ---


def labels(title: str, members: Members, names: list[str]) -> tuple[dict[str, str], bool, list[str]]:
    """The labels of images by label files or tables, whether they are those of label files, and notes on the
    tables."""
    if labels := _label_files(title, members, names):
        return labels, True, []
    labels, notes = _listed(title, members, names)
    return labels, False, notes


def _label_files(title: str, members: Members, names: list[str]) -> dict[str, str]:
    """The labels in `NAME.cls` files by image, for all images or none."""
    files = [name for name in members.names if name.endswith(LABEL_ENDING)]
    picture_of = {splitext(name)[0] + LABEL_ENDING: name for name in names} if files else {}
    texts = _texts(title, members, [name for name in files if name in picture_of])
    labels = {picture_of[name]: text.strip() for name, text in texts}
    if labels and (lacking := next((name for name in names if not labels.get(name)), None)):
        hint = "give every image a label file, or none"
        raise UsageError(f"`{title}` has no label file (`{LABEL_ENDING}`) for `{lacking}`", hint=hint)
    return labels


def _listed(title: str, members: Members, names: list[str]) -> tuple[dict[str, str], list[str]]:
    """The labels of images by the tables that list them, for all images or none, and notes on the tables."""
    tables = [name for name in members.names if splitext(name)[1].lower() in TABLE_ENDINGS]
    labels: dict[str, str] = {}
    used: list[str] = []
    notes: list[str] = []
    for table, text in _texts(title, members, tables):
        try:
            rows, why = _labels_in(table, rows_of(text, table), names)
        except UsageError as e:
            notes.append(f"{e.message}; skipped")
            continue
        double = next((name for name, label in rows.items() if labels.get(name, label) != label), None)
        why = f"it has another label for `{double}` than `{used[0]}`" if double else why
        labels |= {} if why else rows
        (notes if why else used).append(f"`{table}` skipped: {why}" if why else table)
    if used and (lacking := [name for name in names if name not in labels]):
        few = f"{counted(len(lacking), 'image')}, such as `{lacking[0]}`"
        return {}, [*notes, f"`{used[0]}` skipped: it has no label for {few}"]
    return labels, [*notes, *(f"labels from `{table}`" for table in used)]


def _labels_in(table: str, rows: list[list[str]], names: list[str]) -> tuple[dict[str, str], str]:
    """The labels of images by a table, and why there are none. The column of names is the one that contains
    most images, possibly without ending or with other folders."""
    image, width = _image_finder(table, names), min(map(len, rows), default=0)
    counts = [len({image(row[i]) for row in rows} - {None}) for i in range(width)]
    if not any(counts):
        return {}, "it has no column of image files"
    at = counts.index(max(counts))
    heads = ["" if image(rows[0][at]) else cell.strip().lower() for cell in rows[0][:width]]
    pairs = [(name, row) for row in rows if (name := image(row[at]))]
    column, why = _label_column(heads, at, pairs)
    labels: dict[str, str] = {}
    for name, row in pairs if not why else ():
        label = row[column].strip()
        if label and labels.setdefault(name, label) != label:
            return {}, f"it has several labels for `{name}`"
    return labels, why


def _image_finder(table: str, names: list[str]) -> Callable[[str], str | None]:
    """The function from a cell of a table to the image that it names, possibly without ending or with other
    folders."""
    alike = Counter(key for name in names for key in {PurePosixPath(name).name, PurePosixPath(name).stem})
    image_of = {key: name for name in names for key in (PurePosixPath(name).stem, PurePosixPath(name).name)}
    image_of = {key: name for key, name in image_of.items() if alike[key] == 1}
    image_of |= {key: name for name in names for key in (splitext(name)[0], name)}

    @cache
    def image(cell: str) -> str | None:
        cell = cell.strip().replace("\\", "/")
        if cell.rstrip("/").rpartition("/")[2] not in alike:  # most cells of a wide table, soon
            return None
        places = (normpath(f"{PurePosixPath(table).parent}/{cell}"), normpath(cell), PurePosixPath(cell).name)
        return next((image_of[place] for place in places if place in image_of), None)

    return image


def _label_column(heads: list[str], at: int, pairs: Sequence[tuple[str, list[str]]]) -> tuple[int, str]:
    """The column of labels, and why there is none: a column of LABEL_COLUMNS, or the only one besides that of
    names if its cells repeat."""
    others = {head: i for i, head in enumerate(heads) if i != at}
    if named := [others[key] for key in LABEL_COLUMNS if key in others]:
        return named[0], ""
    column = 1 - at
    if len(heads) != 2 or heads[column] in CAPTIONS:
        return 0, f"it has no column `{LABEL_COLUMNS[0]}`"
    repeated = 2 * len({row[column] for _, row in pairs}) <= len({name for name, _ in pairs})
    return column, "" if repeated else "its labels do not repeat"


def annotated(title: str, members: Members) -> dict[str, str]:
    """The classes of images `SPLIT/images/NAME` from TinyImageNet's `SPLIT/SPLIT_annotations.txt`, whose
    lines contain NAME, class and box, separated by tabs."""
    lists = [name for name in members.names if name.endswith("_annotations.txt") and "/" in name]
    classes: dict[str, str] = {}
    for name, text in _texts(title, members, lists):
        rows = (line.split("\t") for line in lines_of(text))
        classes |= {f"{PurePosixPath(name).parent}/images/{row[0]}": row[1] for row in rows if len(row) > 1}
    return classes
