"""The classes that `--label` names. No heavy import."""

from __future__ import annotations

import csv
from collections.abc import Sequence

from gzcli.core.errors import UsageError, canonical, did_you_mean


def chosen(text: str, classes: Sequence[str]) -> list[int]:
    """The numbers of the classes that a text names: `cat`, `3`, or a list `cat,dog`. A name that holds a
    comma is quoted, as in CSV: `"x,y",dog`. A word means the class of exactly that name; else one whose name
    differs in capitals, `-` and `_` alone; else a number.

    text: the value of `--label`.
    classes: names of the classes.

    Raises UsageError for a word that names no class, or may name two.
    """
    if not classes:
        raise UsageError("`--label` needs a data set with classes")
    if text in classes:
        return [classes.index(text)]
    words = next(csv.reader([text.replace("\n", " ")], skipinitialspace=True), [])
    return [_number(word.strip(), classes) for word in words or [""]]


def in_turns(n: int, classes: int) -> int:
    """About n images, as many of each class; n where there are more classes."""
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
    whole = next((name for name in classes if "," in name and word in name.split(",")), None)
    quoted = f"""quote a name that holds a comma: `--label '"{whole}"'`""" if whole and word else None
    hint = quoted or did_you_mean(word, classes) or f"labels: {', '.join(classes[:20])}"
    raise UsageError(f"no label `{word}` among {len(classes)} classes", hint=hint)
