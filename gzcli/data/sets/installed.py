"""The sets that need no download: made of scikit-learn's digits and photographs, of matplotlib's fonts, or of
nothing. Metadata only."""

from __future__ import annotations

from gzcli.data.sets.specs import DataSpec, listed

_DIGITS = tuple("0123456789")
_UCI = "Alpaydin & Kaynak 1998, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository"


def _digits(name: str, title: str, classes: tuple[str, ...], *extras: str) -> DataSpec:
    """A set made of scikit-learn's digits."""
    return DataSpec(
        name,
        title,
        classes,
        channels=1,
        size=16,
        n_train=1442,
        n_test=355,
        licence="CC BY 4.0",
        citation=_UCI,
        levels=17,
        extras=extras,
        embedded=True,
    )


_KINDS = listed("circle; ring; moon; heart; triangle; square; star; cross")
_FACTORS = listed(
    "red; orange; yellow; green; turquoise; blue; violet; pink; small; medium; large; "
    "left; right; top; bottom; centre"
)


def _shapes(name: str, title: str, classes: tuple[str, ...], *extras: str) -> DataSpec:
    """A set of flat forms, all of whose factors are known."""
    return DataSpec(
        name,
        title,
        classes,
        channels=3,
        size=32,
        n_train=20_000,
        n_test=4_000,
        licence="made by gz",
        citation="none: made by gz",
        multilabel=len(classes) > len(_KINDS),
        extras=extras,
        embedded=True,
    )


INSTALLED = (
    _digits("digits", "scikit-learn's handwritten digits, 8×8 doubled to 16×16", _DIGITS),
    DataSpec(
        "glyphs",
        "letters and digits of 21 faces of DejaVu, STIX and Computer Modern",
        classes=tuple("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
        channels=1,
        size=28,
        n_train=21_600,
        n_test=3_600,
        licence="the fonts': Bitstream Vera, OFL 1.1, BaKoMa",
        citation="none: made by gz of the fonts that matplotlib carries",
        embedded=True,
    ),
    _shapes(
        "shapes", "forms of known colour, size, place and angle; the class is the kind", _KINDS, "caption"
    ),
    _shapes("shapes-factors", "the same images, with each factor as a label", (*_KINDS, *_FACTORS)),
    DataSpec(
        "patches",
        "32×32 patches of scikit-learn's two sample photographs",
        classes=("china", "flower"),
        channels=3,
        size=32,
        n_train=1328,
        n_test=104,
        embedded=True,
        licence="CC BY 2.0",
        citation="photographs by danielbuechele and vultilion (flickr), 2011",
    ),
    _digits("digits-ab", "digits in two unpaired domains: A white on black, B black on white", ("A", "B")),
    _digits("digits-captioned", "digits with a caption each", _DIGITS, "caption"),
    _digits(
        "digits-edited",
        "digits after an instruction such as `mirror it`, with the digit before it",
        _DIGITS,
        "caption",
        "before",
    ),
)
