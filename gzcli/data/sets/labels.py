"""Classes by the names of `--label`. No heavy import."""

from __future__ import annotations

import csv
from collections.abc import Sequence

from gzcli.core.errors import UsageError, canonical, did_you_mean
from gzcli.data.sets.registry import locate
from gzcli.store import cache_files, files
from gzcli.store.paths import cache_dir


def class_numbers(text: str, classes: Sequence[str]) -> list[int]:
    """The class numbers of a text: `cat`, `3`, or a list `cat,"x,y"` as in CSV. A word is the exact name of a
    class, otherwise a name that differs only in case, `-` and `_`, otherwise a number."""
    if not classes:
        raise UsageError("`--label` needs a data set with classes")
    if text in classes:
        return [classes.index(text)]
    try:
        words = next(csv.reader([text.replace("\n", " ")], skipinitialspace=True), [])
    except csv.Error as e:
        raise UsageError(f"`--label` is not a list of labels: {e}", hint="give names, as in `cat,dog`") from e
    return [_number(word.strip(), classes) for word in words or [""]]


def class_names(data: str) -> list[str]:
    """The classes of a data set; [] if the set has none, or is not packed yet."""
    data_set = locate(data)
    if isinstance(classes := getattr(data_set, "classes", None), tuple):
        return list(map(str, classes))
    for path in sorted(cache_dir("packs", data_set.key).glob("*/meta.json")):
        if meta := cache_files.read(path, files.read_object):
            return list(map(str, meta.get("classes") or []))
    return []


def in_turns(n: int, classes: int) -> int:
    """The multiple of `classes` nearest to n; n itself if there are more classes."""
    return n if not 0 < classes <= n else classes * round(n / classes)


def _number(word: str, classes: Sequence[str]) -> int:
    if word in classes:
        return classes.index(word)
    alike = [i for i, name in enumerate(classes) if canonical(name) == canonical(word)]
    if len(alike) > 1:
        either = " or ".join(f"`{classes[i]}`" for i in alike)
        raise UsageError(f"the label `{word}` is ambiguous: {either}", hint="spell the label exactly")
    if alike:
        return alike[0]
    if word.isascii() and word.isdecimal() and int(word) < len(classes):
        return int(word)
    parts = ((name, map(canonical, name.split(","))) for name in classes if "," in name)
    match = next((name for name, words in parts if canonical(word) in words), None)
    quoted = f"""quote a name that contains a comma: `--label '"{match}"'`""" if match and word else None
    hint = quoted or did_you_mean(word, classes) or f"labels: {', '.join(classes[:20])}"
    raise UsageError(f"there is no label `{word}` among the {len(classes)} classes", hint=hint)
