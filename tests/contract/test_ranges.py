"""The numbers that options of models may have: what a range lets through is built, or refused in words."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from zoo import CASES, Case

from gzcli.cli.jobs import method_options
from gzcli.core.errors import GzError, UsageError
from gzcli.data.packs.open import open_pack
from gzcli.models import catalog
from gzcli.models.catalog import OUTSIDE
from gzcli.models.signatures import MAY_BE_0, OF_FLOATS, SIGNED, Param
from gzcli.recipe.kinds import in_range, within

ZOO = [card for card in catalog.cards().values() if card.family != OUTSIDE]
FIRST = {case.model: case for case in reversed(CASES)}
LEAST = (0, 1)  # of a range the least whole number is one of these
BUILDERS = [case for case in FIRST.values() if catalog.card(case.model).family != "stable_diffusion"]


def options() -> list[tuple[str, Param]]:
    """(place, option) of all that the zoo has: of models, of their samplers, scores and applications."""
    return [
        (f"{card.name} {name}", param)
        for card in ZOO
        for methods in ({"model": card.params, "sample": card.sample}, card.scores, card.do)
        for options in methods.values()
        for name, param in options.items()
    ]


def test_defaults_and_tables_lie_in_their_ranges():
    def values(param: Param) -> object:
        return list(param.default) if isinstance(param.default, tuple) else param.default

    assert [place for place, param in options() if not in_range(values(param), param.range)] == []
    numeric = [param for _, param in options() if replace(param, ours=False).range]
    assert len(numeric) > 300
    for _, param in options():
        if param.range:
            assert not within(param.range)(-1), param
        elif "float" in param.annotation.replace(",", " ").replace("[", " ").split():
            assert param.name in SIGNED, param
    names = {param.name for _, param in options()}
    assert sorted({*MAY_BE_0, *OF_FLOATS, *SIGNED} - names) == []
    for name, kind, ours, range in (
        ("pair_solver", "Literal['euler', 'midpoint']", True, None),
        ("dropout", "float", False, None),
        ("width", "int", False, "-1,000,000 … 1,000,000"),
        ("mult", "tuple[int, ...] | None", True, "1 … 1,000,000"),
        ("groups", "tuple[int, ...]", True, "0 … 1,000,000"),
    ):
        assert Param(name, kind, None, True, ours).range == range


@pytest.mark.parametrize("case", BUILDERS, ids=lambda case: case.model)
def test_the_least_number_of_a_range_is_built_or_refused_in_words(case: Case):
    pack = open_pack(case.data)
    info = pack.info(levels=case.levels or pack.meta.levels, steps=100)
    for name, param in catalog.card(case.model).params.items():
        least = next((v for v in LEAST if param.range and within(param.range)(v)), None)
        if least is None:
            continue
        value = (least,) if param.annotation.startswith("tuple") else least
        try:
            with torch.device("meta"):
                replace(case, options={**case.options, name: value}).build(info)
        except GzError:
            pass
        except Exception as e:
            raise AssertionError(f"`{name}` {value}") from e


def test_an_option_of_the_command_line_has_its_range():
    card = catalog.card("ddpm")
    for words, must in (
        ("--dynamic -1", "in [0, 1]"),
        ("--eta -0.5", "0 or more"),
        ("--steps=-3", "1 … 1,000,000"),
    ):
        with pytest.raises(UsageError, match=r"`--\w+` must be ") as e:
            method_options(words.split(), card.sample, "`ddpm`", "sample")
        assert must in e.value.message
    assert method_options(["--guidance", "-1"], card.sample, "`ddpm`", "sample") == {"guidance": -1.0}
