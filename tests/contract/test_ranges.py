"""Options: what a range lets through is built or refused in words, choices are those of tables."""

import dataclasses
from dataclasses import replace

import pytest
import torch
from refused import refused
from zoo import FIRST, Case, one_a_family

from gzcli.cli.jobs import method_options
from gzcli.core.errors import GzError
from gzcli.core.types import DataInfo
from gzcli.data.packs.open import open_pack
from gzcli.models import catalog
from gzcli.models.catalog import FLOAT_RANGES, OUTSIDE, SIGNED, ZERO_ALLOWED, Param
from gzcli.models.denoising import denoiser as denoising
from gzcli.models.denoising.process import BETAS, PATHS
from gzcli.models.denoising.samplers import TABLEAUX
from gzcli.models.diffusion import ddpm
from gzcli.models.score import sgm
from gzcli.recipe.schema import in_range, literal_values

ZOO = [card for card in catalog.cards().values() if card.family != OUTSIDE]
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


def test_defaults_tables_and_options_lie_in_their_ranges():
    def values(param: Param) -> object:
        return list(param.default) if isinstance(param.default, tuple) else param.default

    assert [place for place, param in options() if not in_range(values(param), param.range)] == []
    numeric = [param for _, param in options() if replace(param, from_gz=False).range]
    assert len(numeric) > 300
    for _, param in options():
        if param.range:
            assert not in_range(-1, param.range), param
        elif "float" in param.annotation.replace(",", " ").replace("[", " ").split():
            assert param.name in SIGNED, param
    names = {param.name for _, param in options()}
    assert sorted({*ZERO_ALLOWED, *FLOAT_RANGES, *SIGNED} - names) == []
    for name, kind, ours, range in (
        ("pair_solver", "Literal['euler', 'midpoint']", True, None),
        ("dropout", "float", False, None),
        ("width", "int", False, "-1,000,000 … 1,000,000"),
        ("mult", "tuple[int, ...] | None", True, "1 … 1,000,000"),
        ("groups", "tuple[int, ...]", True, "0 … 1,000,000"),
    ):
        assert Param(name, kind, None, True, ours).range == range
    card = catalog.card("ddpm")
    for words, must in {
        "--dynamic -1": "in [0, 1]",
        "--eta -0.5": "0 or more",
        "--steps=-3": "1 … 1,000,000",
    }.items():
        e = refused(r"`--\w+` must be ", method_options, words.split(), card.sample, "`ddpm`", "sample")
        assert must in e.message
    assert method_options(["--guidance", "-1"], card.sample, "`ddpm`", "sample") == {"guidance": -1.0}


@pytest.mark.parametrize("case", one_a_family(BUILDERS))
def test_the_least_number_of_a_range_is_built_or_refused_in_words(case: Case):
    pack = open_pack(case.data)
    info = pack.info(levels=case.levels or pack.meta.levels, steps=100)
    for name, param in catalog.card(case.model).params.items():
        least = next((v for v in LEAST if param.range and in_range(v, param.range)), None)
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


GREY, LATENTS = DataInfo((1, 28, 28)), DataInfo((4, 8, 8), None)
LABELLED, PIXELS = DataInfo((1, 28, 28), 256, tuple("abc")), ("pixelcnn", "pixelcnnpp")
REFUSED = [
    ("flow", DataInfo((1, 7, 7)), {}, "7×7 is not divisible by 2", ""),
    ("flow", LATENTS, {"dequant": "variational"}, "latents do not have", "dequant=uniform"),
    ("flow", GREY, {"conditional": True}, "needs a data set with labels", "gz list data"),
    ("flow", GREY, {"logit": 1.0}, r"`model.logit` must be in \[0, 1\)", ""),
    ("glow", GREY, {"scales": 3}, "28×28 is not divisible by 8", "set `model.scales=2`, or `data.size=32`"),
    # width first, as it is typed
    ("glow", DataInfo((1, 30, 44)), {"scales": 2}, "30×44 is not divisible by 4", "or `data.size=44x32`"),
    ("glow", DataInfo((1, 45, 31)), {}, "45×31 is not divisible by 2", "set `data.size=32x46`"),
    ("glow", GREY, {"scales": 0}, "at least 1", ""),
    ("flowpp", GREY, {"channel": (0, 1, 1), "checkerboard": (1, 1, 1)}, "28×28", "`data.size=32`"),
    ("flowpp", GREY, {"channel": (1, 1), "checkerboard": (1, 1)}, r"model\.channel", ""),
    ("flowpp", GREY, {"heads": 5}, r"model\.heads=5", ""),
    ("tarflow", GREY, {"patch": 3}, "cannot be divided into patches of 3", "one of 1, 2, 4, 7, 14"),
    ("vae", GREY, {"pixels": "bernoulli"}, "2 grey levels", "data.levels=2"),
    ("vae", GREY, {"pixels": "mixture", "recon": "ms_ssim"}, "have no gradient", "model.pixels=logistic"),
    ("vae", GREY, {"pixels": "mixture", "mixture": 0}, r"model\.mixture.* must be 1 or more", ""),
    ("vae", GREY, {"recon": "ms_ssim", "iwae": 5}, "iwae", ""),
    ("hvae", LATENTS, {"pixels": "mixture"}, "grey levels", "gaussian"),
    ("hvae", GREY, {"channels": (8, 8), "groups": (0, 1, 1), "cells": (0, 1)}, "differ in length", ""),
    ("hvae", GREY, {"channels": (8, 8), "groups": (1, 0), "cells": (1, 1)}, "coarsest", ""),
    ("hvae", GREY, {"channels": (8, 8), "groups": (-1, 1), "cells": (1, 1)}, "0 or more, not -1", ""),
    ("vdvae", GREY, {"channels": (8, 8), "groups": (1, 1), "blocks": (1,)}, "blocks` differ in length", ""),
    ("dit", LABELLED, {"patch": 3}, "28×28 cannot be divided into patches of 3", "to one of 1, 2, 4, 7, 14"),
    ("dit", LABELLED, {"width": 30}, r"`model\.width` is 30", "set `model.width` to 32"),
    ("dit", GREY, {}, "needs a data set with labels", "gz list data"),
    *((name, LATENTS, {}, "latents do not have", "data.latent") for name in PIXELS),
    *((name, GREY, {"conditional": True}, "needs a data set with labels", "gz list data") for name in PIXELS),
    ("pixelcnn", GREY, {"kernel": 4}, "must be odd", ""),
    ("pixelcnn", GREY, {"first": 1}, "at least 3", ""),
    ("pixelcnnpp", GREY, {"blocks": ()}, "for each scale", ""),
    ("pixelcnnpp", GREY, {"mixture": 0}, "at least 1", ""),
    ("ddpm", GREY, {"zero_snr": True, "prediction": "eps"}, "zero_snr", ""),
    ("ddpm", GREY, {"timesteps": 1}, "at least 2", ""),
    *((name, GREY, {"conditional": True}, "needs a data set with labels", "") for name in ("ddpm", "zigma")),
    ("zigma", LABELLED, {"patch": 3}, "28×28 cannot be divided into patches of 3", ""),
    ("zigma", LABELLED, {"width": 30}, r"`model\.width` is 30, but must be divisible by 4", "to 32"),
    ("sgm", GREY, {"process": "ve", "sigma_min": 0.0}, "", "model."),
    *(("sgm", GREY, option, "", "model.") for option in ({"beta_min": 30.0}, {"t_min": 0.0})),
    ("edm", GREY, {"sigma_min": 0.0}, "", "model."),
    ("soflow", GREY, {"prediction": "x0"}, "straight paths", "model.prediction"),
    *(("ncsnv2", GREY, {"mult": (1, 2), "dilation": d}, "", "model.") for d in ((1, 1, 2), (2, 1))),
    *(("ncsnv2", GREY, option, "", "model.") for option in ({"levels": 1}, {"sigma_max": 0.01})),
    ("cgan", GREY, {}, "needs a data set with labels", "gz list data"),
    ("dcgan", GREY, {"augment": ("colour",)}, "has no `colour`", "color, translation, cutout"),
]


@pytest.mark.parametrize(("model", "info", "options", "message", "hint"), REFUSED)
def test_what_cannot_be_built_is_refused_with_what_to_do(model, info, options, message, hint):
    e = refused(message, catalog.load(model).of, info, **options)
    assert hint in (e.hint or "")


def test_choices_are_the_entries_of_their_table():
    """As the recipe, the help and completion have them."""
    solvers = [*TABLEAUX, "adams", "adaptive"]
    for model, option, table in (
        ("ddpm", "sampler", ddpm.SAMPLERS),
        ("sgm", "sampler", [*sgm.SAMPLERS, "ode"]),
        ("ncsnv2", "sampler", ["langevin", *sgm.SAMPLERS, "ode"]),
        ("fm", "sampler", [*solvers, "sde"]),
        ("reflow", "pair_solver", solvers),
        ("sgm", "process", PATHS),
        ("ddpm", "schedule", BETAS),
        ("ddpm", "loss_type", denoising.LOSSES),
    ):
        card = catalog.card(model)
        assert literal_values((card.params | card.sample)[option].annotation) == list(table), (model, option)
    groups = (ddpm.SamplingOptions, ddpm.DiffusionOptions, sgm.SamplingOptions, sgm.PathOptions)
    for group in groups:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(group(), dataclasses.fields(group)[0].name, None)
