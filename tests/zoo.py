"""One line a model: the small build that the contract suite checks."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark.structures import ParameterSet

from gzcli import testing
from gzcli.core.errors import canonical
from gzcli.models import catalog


@dataclass(frozen=True)
class Case(testing.Case):
    """A model that trains in a second or two; `base` is the tiny base that is tuned."""

    base: str = "tiny"

    @property
    def settings(self) -> dict[str, Any]:
        """The options, and the folder of the base where the model tunes one."""
        if "base" not in catalog.card(self.model).params:
            return dict(self.options)
        import tiny_sd

        return {"base": tiny_sd.base(self.base), **self.options}

    def __str__(self) -> str:
        kind = self.base.removeprefix("tiny")
        return super().__str__().replace(self.model, self.model + kind, 1)


HVAE = {"channels": (8, 16, 16), "groups": (0, 1, 1), "cells": (0, 1, 1), "latent": 4, "mixture": 3}
VDVAE = {"channels": (8, 16, 16), "groups": (0, 2, 2), "blocks": (1, 1, 1), "latent": 4, "mixture": 3}
FLOWPP = {"channel": (0, 1), "checkerboard": (0, 1), "hidden": 8, "blocks": 1, "components": 4}
FLOWPP |= {"dequant_couplings": 2}
FM = {"channels": 4, "groups": 4, "mult": (1, 2), "attention": ()}
DDPM = {"channels": 8, "mult": (1, 2), "attention": (), "timesteps": 20}
REFINENET = {"width": 8, "mult": (1, 2), "dilation": (1, 2), "sigma_max": 10.0}
DIT = {"width": 32, "layers": 2, "heads": 2, "patch": 4}
ZIGMA = {"width": 32, "layers": 2, "patch": 8, "state": 4}
RF = Case("rf", DIT | {"bounded": True}, lr=3e-3, batch=8, sample={"steps": 3})
RF_LABELS = Case("rf", DIT | {"conditional": True}, lr=3e-3, batch=8, sample={"steps": 3, "guidance": 2.0})

# untrained, whose output is zero, all but the prediction of x0 inverts to what it reconstructs exactly; its
# classifier draws nothing
DIFFAE_OPTIONS = DDPM | {"latent": 8, "encoder_mult": (1, 2), "prediction": "x0"}
DIFFAE = Case("diffae", DIFFAE_OPTIONS, lr=1e-2, batch=8, sample={"steps": 4}, quiet=True)
LATENT = {"width": 64, "layers": 3, "timesteps": 20}
VQVAE = Case("vqvae", {"hidden": 16, "residual": 8, "blocks": 1, "codes": 32, "dim": 8}, lr=3e-3, quiet=True)
VQGAN = {"channels": 8, "mult": (1, 1, 2), "groups": 4, "codes": 32, "dim": 8, "disc_width": 8}
VQGAN |= {"perceptual": "none"}
CYCLEGAN = {"width": 8, "halvings": 1, "blocks": 1, "disc_width": 8}
SCALED = Case("vqvae", VQVAE.options | {"scales": (1, 2)}, lr=3e-3, quiet=True)
PRIOR = {"width": 32, "layers": 2, "heads": 2}
MLP = {"net": "mlp", "hidden": (64,), "latent": 8}
GAN = {"width": 8, "latent": 16}
R3GAN = {"width": 8, "mult": (1, 2), "latent": 8, "group": 8, "patch": 3, "r1": 0.2, "r2": 0.2}
DRIFT = {"width": 8, "mult": (1, 2), "latent": 8, "group": 8, "patch": 3, "feature_width": 4}
PIXELS = {"hidden": 16, "head": 16, "dilations": (1, 2, 1)}
PIXELSPP = {"hidden": 16, "blocks": (0, 1), "mixture": 3}
FLOW = {"depth": 2, "hidden": 16, "blocks": 1}
EBM = {"width": 8, "chains": 64, "chain_steps": 3}
TARFLOW = {"depth": 2, "width": 32, "layers": 1, "heads": 2, "patch": 4}
LABELS = {"conditional": True}
LEARNED = {"timesteps": 20, "conditional": False, "bounded": True, "learned_variance": True}
STEPS, CODES, GUIDED = {"steps": 4}, {"steps": 3, "code_steps": 4}, {"guidance": 2.0}
LEARNS = {"trained_guidance": 3.0}  # guidance
GUIDED_PAIRS = {"pair_steps": 4, "pair_guidance": 2.0}
AAE_CONV = {"hidden": (16, 32), "latent": 8, "disc_hidden": (32,), "image_weight": 1.0, "image_width": 8}
R1 = {"r1": 1.0, "r1_every": 1, "augment": ("color", "cutout"), "ada": 0.6, "lecam": 0.1}
RESIDUAL = {"net": "residual", "patch": 2}
LIKELIHOOD = {"process": "subvp", "prediction": "eps", "weighting": "likelihood"}
EDM = {"bounded": True, "sigma_data": 0.5, "weight_warmup": 0.5}
FEW_LEVELS = {"levels": 10, "prediction": "v", "weighting": "even", "time_sampling": "cosine"}


def denoiser(model: str, options: dict[str, Any], *, lr: float = 3e-3, stages=None, **sample: Any) -> Case:
    return Case(model, options, lr=lr, batch=8, sample=sample, stages=stages or {})


def tuner(model: str, options: dict[str, Any], *, lr: float, data="digits-captioned", base="tiny") -> Case:
    return Case(model, options, lr=lr, batch=8, sample={"steps": 3}, data=data, base=base)


TEACHER, TEACHER_LABELS = denoiser("fm", FM, steps=3), denoiser("ddpm", DDPM | LABELS, steps=4)

CASES = [
    Case("vae", {"net": "conv", "hidden": (16, 32), "latent": 8}, lr=3e-3),
    Case("vae", MLP | LABELS, lr=3e-3, levels=2),
    Case("cvae", {"net": "conv", "hidden": (16, 32), "latent": 8}, lr=3e-3),
    Case("aae", AAE_CONV, lr=3e-3, quiet=True),
    Case("aae", MLP | LABELS | {"posterior": "gaussian"}, lr=3e-3),
    Case("hvae", HVAE, lr=3e-3),
    Case("hvae", HVAE | LABELS | {"kl_warmup": 50}, lr=3e-3, levels=2),
    Case("vdvae", VDVAE, lr=3e-3),
    Case("vdvae", VDVAE | LABELS, lr=3e-3, levels=2),
    Case("wgan", GAN, lr=2e-3),
    Case("wgan", GAN | LABELS | RESIDUAL, lr=2e-3),
    Case("dcgan", GAN | {"norm": "group"}, lr=2e-3),
    Case("dcgan", GAN | {"objective": "nonsaturating", "spectral": False, "disc_norm": "batch"}, lr=2e-3),
    Case("dcgan", GAN | LABELS | R1, lr=2e-3),
    Case("cgan", GAN | {"norm": "group"}, lr=2e-3),
    Case("cgan", GAN | {"label_as": "projection"} | RESIDUAL, lr=2e-3),
    Case("drifting", DRIFT, lr=2e-3, batch=16),
    Case("drifting", DRIFT | LABELS, lr=2e-3, batch=16),
    Case("r3gan", R3GAN, lr=2e-3, batch=16),
    # at a rate of 2e-3 all images of it are white after 200 steps
    Case("r3gan", R3GAN | LABELS | {"patch": 1, "r1_decay": 0.1}, lr=5e-4, batch=16),
    Case("presgan", GAN | {"draws": 1, "leapfrog": 3}, lr=2e-3),
    Case("presgan", GAN | LABELS | {"objective": "hinge", "burn_in": 1, "draws": 1, "leapfrog": 2}, lr=2e-3),
    # two ranks have two pools
    Case("cyclegan", CYCLEGAN | {"pool": 0}, lr=3e-3, batch=4, quiet=True, data="digits-ab"),
    Case("cyclegan", CYCLEGAN | {"pool": 8}, lr=3e-3, batch=4, quiet=True, data="digits-ab"),
    Case("pixelcnn", PIXELS, lr=3e-3, batch=16),
    Case("pixelcnn", PIXELS | LABELS, lr=3e-3, batch=16, levels=2),
    Case("pixelcnnpp", PIXELSPP, lr=3e-3, batch=8),
    Case("pixelcnnpp", PIXELSPP | LABELS, lr=3e-3, batch=8),
    Case("glow", {"depth": 2, "hidden": 16, "net": "residual"}),
    Case("glow", {"scales": 3, "depth": 1, "hidden": 16, "conditional": True}),
    Case("flow", FLOW | {"dequant": "variational"}, lr=5e-4),
    Case("flow", FLOW | LABELS | {"scales": 3}, lr=5e-4),
    Case("realnvp", {"couplings": 2, "hidden": 16, "blocks": 1}, lr=3e-3),
    Case("realnvp", {"scales": 1, "couplings": 2, "hidden": 16, "blocks": 1, "conditional": True}, lr=3e-3),
    Case("flowpp", FLOWPP | LABELS | {"dequant": "uniform"}, lr=1e-3, batch=16),
    Case("flowpp", FLOWPP, lr=3e-3, batch=16),
    Case("tarflow", TARFLOW, lr=3e-3, batch=16),
    Case(
        "tarflow", TARFLOW | LABELS | {"dequant": "variational"}, lr=3e-3, batch=16, sample={"guidance": 2.0}
    ),
    Case("tarflow", TARFLOW | {"coupling": "jet", "noise_std": 0.1, "clusters": 5}, lr=3e-3, batch=16),
    denoiser("ddpm", DDPM, steps=4),
    denoiser("ddpm", DDPM | LABELS, steps=4, guidance=2.0),
    denoiser("ddpm", DDPM | {"factor": 2}, steps=4),
    denoiser("cddpm", DDPM | {"bounded": True}, steps=4, guidance=2.0),
    denoiser("dit", DIT | {"timesteps": 20}, steps=4, guidance=2.0),
    denoiser("dit", DIT | LEARNED, sampler="ancestral", steps=4),
    DIFFAE,
    Case("latent_prior", LATENT, lr=3e-3, sample=CODES, stages={"autoencoder": DIFFAE}),
    Case("latent_prior", LATENT | LABELS, lr=3e-3, sample=CODES | GUIDED, stages={"autoencoder": DIFFAE}),
    denoiser("fm", FM, lr=5e-3, steps=3),
    denoiser("fm", FM | LABELS | {"time_sampling": "uniform", "sigma_min": 0.01}, lr=5e-3, steps=3),
    denoiser("fm", FM | {"clusters": 5}, lr=5e-3, steps=3, guidance=2.0),
    denoiser("cfm", FM | {"coupling": "ot", "clusters": 20}, lr=5e-3, steps=3, guidance=2.0),
    denoiser("zigma", ZIGMA, steps=3),
    denoiser("zigma", ZIGMA | LABELS | {"patch": 2}, steps=3, guidance=2.0),
    denoiser("soflow", FM, lr=5e-3, steps=2),
    denoiser(
        "soflow", FM | LABELS | {"clusters": 20, "map_every": 1} | LEARNS, lr=5e-3, steps=1, guidance=2.0
    ),
    denoiser("meanflow", FM | {"attention": (8,)}, lr=5e-3, steps=1),
    denoiser("meanflow", FM | LABELS | LEARNS, lr=5e-3, steps=2, guidance=2.0),
    RF,
    RF_LABELS,
    denoiser("reflow", {"pair_steps": 4}, stages={"teacher": RF}, steps=2, sampler="euler"),
    denoiser("reflow", LABELS | GUIDED_PAIRS, stages={"teacher": RF_LABELS}, steps=2, guidance=2.0),
    denoiser("ect", {"q": 4.0, "stages": 2}, stages={"teacher": TEACHER}, steps=2),
    denoiser("ect", LABELS | {"tuned_guidance": 2.0}, stages={"teacher": TEACHER_LABELS}, steps=2),
    denoiser("sgm", FM, lr=5e-3, steps=4),
    denoiser("sgm", FM | LABELS | LIKELIHOOD, lr=5e-3, steps=4, guidance=2.0),
    denoiser("sgm", FM | {"process": "ve", "time_sampling": "uniform"}, lr=5e-3, sampler="pc", steps=4),
    denoiser("edm", FM, lr=5e-3, steps=4),
    denoiser("edm", FM | LABELS | EDM, lr=5e-3, sampler="heun", churn=2.0, steps=4, guidance=2.0),
    denoiser("consistency", FM, lr=5e-3),
    denoiser("consistency", FM | LABELS, lr=5e-3, steps=3),
    denoiser("ncsnv2", REFINENET, steps=4),
    denoiser("ncsnv2", REFINENET | LABELS | FEW_LEVELS, sampler="langevin", repeats=1, guidance=2.0),
    # the slope of an untrained net is small
    denoiser("eqm", FM | {"energy": "dot"}, lr=5e-3, steps=3, stop=0.0),
    denoiser("eqm", FM | LABELS, lr=5e-3, steps=3, stop=0.0, guidance=2.0),
    Case("ebm", EBM, lr=1e-3, sample={"steps": 5}, quiet=True),
    Case("ebm", EBM | LABELS, lr=1e-3, sample={"steps": 5}, quiet=True),
    VQVAE,
    Case("vqvae", VQVAE.options | {"codebook": "gradient", "cosine": True}, lr=3e-3, quiet=True),
    Case("vqvae", VQVAE.options | {"levels": (4, 4, 3)}, lr=3e-3, quiet=True),
    SCALED,
    Case("vqgan", VQGAN | {"r1": 0.1, "lecam": 0.1}, batch=16, quiet=True),
    *(
        Case("transformer", PRIOR | more, lr=3e-3, quiet=True, stages={"tokenizer": VQVAE})
        for more in ({}, LABELS, {"clusters": 5, "label_dropout": 0.1})
    ),
    Case("maskgit", PRIOR, lr=3e-3, sample={"steps": 4}, stages={"tokenizer": VQVAE}),
    Case("maskgit", PRIOR | LABELS | {"clusters": 20}, lr=3e-3, sample=STEPS, stages={"tokenizer": VQVAE}),
    Case("var", PRIOR, lr=3e-3, quiet=True, stages={"tokenizer": SCALED}),
    Case("var", PRIOR | LABELS | {"clusters": 20}, lr=3e-3, sample=GUIDED, stages={"tokenizer": SCALED}),
    tuner("sd_lora", {"rank": 8}, lr=1e-2),
    tuner("sd_lora", {"text_lora": True, "prior": "a digit", "prior_images": 2}, lr=1e-2, base="tiny-xl"),
    tuner("sd_lora", {"text_lora": True}, lr=1e-2, base="tiny-flux"),
    tuner("controlnet", {"cache": False}, lr=3e-3),
    tuner("instructpix2pix", {"cache": False}, lr=3e-3, data="digits-edited"),
]
# of each model, and the first of a family is quick
FIRST = dict(reversed({case.model: case for case in reversed(CASES)}.items()))


def one_a_family(cases: Iterable[Case], *, but: Iterable[str] = ()) -> list[ParameterSet]:
    """The cases as parameters of a test; all but the first of each family are slow, and all of `but`."""
    families = {*but}
    chosen = []
    for case in cases:
        family = catalog.card(case.model).family
        chosen.append(pytest.param(case, id=str(case), marks=pytest.mark.slow if family in families else ()))
        families.add(family)
    return chosen


def first_of_families(names: Iterable[str]) -> list[str]:
    """Of models or recipes the first of each family."""
    return list({catalog.card(canonical(name)).family: name for name in reversed([*names])}.values())


def definer(model: str, method: str) -> tuple[Path, str] | None:
    """The class that a model has a method of, by its file and its name; None without such a method."""
    lineage = catalog.card(model).lineage
    return next(((cls.path, cls.node.name) for cls in lineage if method in cls.methods), None)
