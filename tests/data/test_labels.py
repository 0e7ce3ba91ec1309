"""Which classes `--label` means."""

from __future__ import annotations

import pytest

from gzcli.core.errors import UsageError
from gzcli.core.types import DataInfo
from gzcli.data.sets.names import class_numbers
from gzcli.engine.sampler import parse_labels

FOUND = [
    ("A", ("a", "A"), [1]),
    ("a", ("A", "a"), [1]),
    ("B", ("a", "b"), [1]),
    ("sea-lion", ("sea_lion", "seal"), [0]),
    ("1", ("7", "1"), [1]),  # a name before a number
    ("0", ("7", "1"), [0]),
    ("x,y", ("x", "x,y"), [1]),  # the whole text is a name
    ("x,y", ("x", "y"), [0, 1]),
    ('"x,y",x', ("x", "x,y"), [1, 0]),
    ('x, "x,y"', ("x", "x,y"), [0, 1]),
    ('"x,y"', ("x", "x,y"), [1]),
]


def test_names_as_they_are_spelt_come_first():
    for text, classes, numbers in FOUND:
        assert class_numbers(text, classes) == numbers, text
        labels = parse_labels(text, 2 * len(numbers), DataInfo((1, 8, 8), 256, classes))
        assert labels.tolist() == numbers * 2, text


REFUSED = [
    ("Á", ("a", "A"), "no label `Á`", "labels: a, A"),
    ("sea lion", ("sea-lion", "sea_lion"), "no label", "sea"),
    ("SEA-lion", ("sea-lion", "sea_lion"), "may be `sea-lion` or `sea_lion`", "as it is spelt"),
    ("x", ("x,y", "z,w"), "no label `x`", """`--label '"x,y"'`"""),
    ("2", ("a", "b"), "no label `2` among 2", "a, b"),
    ("", ("a",), "no label ``", "a"),
    ("cat", (), "needs a data set with classes", ""),
]


def test_labels_that_are_none_or_two():
    for text, classes, named, hint in REFUSED:
        with pytest.raises(UsageError, match=named) as e:
            class_numbers(text, classes)
        assert hint in (e.value.hint or ""), text
