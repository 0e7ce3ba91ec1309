"""What an image costs by the recipe as it comes: at most twenty calls of the network, guidance included."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo
from draws import noise

from gzcli.core.types import DataInfo, no_progress
from gzcli.engine.sampler import counted
from gzcli.models import catalog
from gzcli.models.base import group_options
from gzcli.recipe.resolve import resolve

SETS, MOST = ("glyphs", "shapes"), 20
INFO = DataInfo((1, 16, 16), 256, ("a", "b"), n=100, steps=100)


def denoisers() -> list[str]:
    """Those that are drawn with their own network, with guidance."""
    cases = (case for case in zoo.FIRST.values() if not case.stages and case.model != "diffae")
    cards = (catalog.card(case.model) for case in cases)
    cards = (card for card in cards if "guidance" in card.sample)
    return [card.name for card in cards if any(cls.node.name == "Denoiser" for cls in card.lineage)]


@pytest.mark.parametrize("name", denoisers())
def test_a_guided_image_takes_at_most_twenty_network_calls(name):
    grey, colour = (resolve(name, data=data, flags={"scale": "small"}).parts[-1] for data in SETS)
    learned = {k: grey.options[k] for k in ("trained_guidance",) if k in grey.options}
    case = zoo.FIRST[name]
    model: Any = replace(case, options={**case.options, "clusters": 3, **learned}).build(INFO).eval()
    for sample in [grey.sample] if grey.sample == colour.sample else [grey.sample, colour.sample]:
        options = {**sample, "guidance": 1.5, **({"stop": 0.0} if name == "eqm" else {})}
        with torch.inference_mode(), counted(model.net) as runs:
            model.sample(1, noise=noise(1), progress=no_progress, **group_options(model.sample, options))
        assert 0 < runs[model.net] <= (4 if learned else MOST)
