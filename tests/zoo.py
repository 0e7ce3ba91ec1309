"""One line a model: the small build that the contract suite checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gzcli import testing
from gzcli.models import catalog


@dataclass(frozen=True)
class Case(testing.Case):
    """A model with hyperparameters that train in a second or two on the digits.

    base: the kind of the tiny pipeline that is tuned, by a model that tunes one.
    """

    base: str = "sd"

    @property
    def settings(self) -> dict[str, Any]:
        """The options, and the folder of the base where the model tunes one."""
        if "base" not in catalog.card(self.model).params:
            return dict(self.options)
        import tiny_sd

        return {"base": tiny_sd.base(self.base), **self.options}

    def __str__(self) -> str:
        kind = "" if self.base == "sd" else f"-{self.base}"
        return super().__str__().replace(self.model, self.model + kind, 1)


HVAE = {"channels": (8, 16, 16), "groups": (0, 1, 1), "cells": (0, 1, 1), "latent": 4, "mixture": 3}
FLOWPP = {
    "channel": (0, 1),
    "checkerboard": (0, 1),
    "hidden": 8,
    "blocks": 1,
    "components": 4,
    "dequant_couplings": 2,
}
FM = {"channels": 4, "groups": 4, "mult": (1, 2), "attention": ()}
DDPM = {"channels": 8, "mult": (1, 2), "attention": (), "timesteps": 20}
REFINENET = {"width": 8, "mult": (1, 2), "dilation": (1, 2), "sigma_max": 10.0}

DIT = {"width": 32, "layers": 2, "heads": 2, "patch": 4}
ZIGMA = {"width": 32, "layers": 2, "patch": 4, "state": 4}
RF = Case("rf", DIT, lr=3e-3, batch=8, sample={"steps": 3})
RF_LABELS = Case("rf", DIT | {"conditional": True}, lr=3e-3, batch=8, sample={"steps": 3, "guidance": 2.0})

# untrained, whose output is zero, all but the prediction of x0 inverts to what it reconstructs exactly
DIFFAE_OPTIONS = DDPM | {"latent": 8, "encoder_mult": (1, 2), "prediction": "x0"}
DIFFAE = Case(
    "diffae", DIFFAE_OPTIONS, lr=1e-2, batch=8, sample={"steps": 4}, quiet=True
)  # its classifier draws nothing
LATENT = {"width": 64, "layers": 3, "timesteps": 20}

VQVAE = Case("vqvae", {"hidden": 16, "residual": 8, "blocks": 1, "codes": 32, "dim": 8}, lr=3e-3, quiet=True)
VQGAN = {
    "channels": 8,
    "mult": (1, 1, 2),
    "groups": 4,
    "codes": 32,
    "dim": 8,
    "disc_width": 8,
    "perceptual": "none",
}
CYCLEGAN = {"width": 8, "halvings": 1, "blocks": 1, "disc_width": 8}
PRIOR = {"width": 32, "layers": 2, "heads": 2}

CASES = [
    Case("vae", {"net": "conv", "hidden": (16, 32), "latent": 8}, lr=3e-3),
    Case("vae", {"net": "mlp", "hidden": (64,), "latent": 8, "conditional": True}, lr=3e-3, levels=2),
    Case("cvae", {"net": "conv", "hidden": (16, 32), "latent": 8}, lr=3e-3),
    Case(
        "aae",
        {"hidden": (16, 32), "latent": 8, "disc_hidden": (32,), "image_weight": 1.0, "image_width": 8},
        lr=3e-3,
        quiet=True,
    ),
    Case(
        "aae",
        {"net": "mlp", "hidden": (64,), "latent": 8, "posterior": "gaussian", "conditional": True},
        lr=3e-3,
    ),
    Case("hvae", HVAE, lr=3e-3),
    Case("hvae", HVAE | {"conditional": True, "kl_warmup": 50}, lr=3e-3, levels=2),
    Case("wgan", {"width": 8, "latent": 16}, lr=2e-3),
    Case("wgan", {"width": 8, "latent": 16, "conditional": True}, lr=2e-3),
    Case("dcgan", {"width": 8, "latent": 16, "norm": "group"}, lr=2e-3),
    Case(
        "dcgan",
        {"width": 8, "latent": 16, "objective": "nonsaturating", "spectral": False, "disc_norm": "batch"},
        lr=2e-3,
    ),
    Case(
        "dcgan",
        {
            "width": 8,
            "latent": 16,
            "conditional": True,
            "r1": 1.0,
            "r1_every": 1,
            "augment": ("color", "cutout"),
        },
        lr=2e-3,
    ),
    Case("cgan", {"width": 8, "latent": 16, "norm": "group"}, lr=2e-3),
    Case("cgan", {"width": 8, "latent": 16, "label_as": "projection"}, lr=2e-3),
    Case("presgan", {"width": 8, "latent": 16, "draws": 1, "leapfrog": 3}, lr=2e-3),
    Case(
        "presgan",
        {
            "width": 8,
            "latent": 16,
            "objective": "hinge",
            "conditional": True,
            "burn_in": 1,
            "draws": 1,
            "leapfrog": 2,
        },
        lr=2e-3,
    ),
    Case(
        "cyclegan", CYCLEGAN | {"pool": 0}, lr=3e-3, batch=4, quiet=True, data="digits-ab"
    ),  # two ranks have two pools
    Case("cyclegan", CYCLEGAN | {"pool": 8}, lr=3e-3, batch=4, quiet=True, data="digits-ab"),
    Case("pixelcnn", {"hidden": 16, "head": 16, "dilations": (1, 2, 1)}, lr=3e-3, batch=16),
    Case(
        "pixelcnn",
        {"hidden": 16, "head": 16, "dilations": (1, 2, 1), "conditional": True},
        lr=3e-3,
        batch=16,
        levels=2,
    ),
    Case("pixelcnnpp", {"hidden": 16, "blocks": (0, 1), "mixture": 3}, lr=3e-3, batch=8),
    Case("pixelcnnpp", {"hidden": 16, "blocks": (0, 1), "mixture": 3, "conditional": True}, lr=3e-3, batch=8),
    Case("glow", {"depth": 2, "hidden": 16, "net": "residual"}),
    Case("glow", {"scales": 3, "depth": 1, "hidden": 16, "conditional": True}),
    Case("flow", {"depth": 2, "hidden": 16, "blocks": 1, "dequant": "variational"}, lr=5e-4),
    Case("flow", {"scales": 3, "depth": 2, "hidden": 16, "blocks": 1, "conditional": True}, lr=5e-4),
    Case("realnvp", {"couplings": 2, "hidden": 16, "blocks": 1}, lr=3e-3),
    Case("realnvp", {"scales": 1, "couplings": 2, "hidden": 16, "blocks": 1, "conditional": True}, lr=3e-3),
    Case("flowpp", FLOWPP | {"dequant": "uniform", "conditional": True}, lr=1e-3, batch=16),
    Case("flowpp", FLOWPP, lr=3e-3, batch=16),
    Case("ddpm", DDPM, lr=3e-3, batch=8, sample={"steps": 4}),
    Case("ddpm", DDPM | {"conditional": True}, lr=3e-3, batch=8, sample={"steps": 4, "guidance": 2.0}),
    Case("ddpm", DDPM | {"factor": 2}, lr=3e-3, batch=8, sample={"steps": 4}),
    Case("cddpm", DDPM, lr=3e-3, batch=8, sample={"steps": 4, "guidance": 2.0}),
    Case("dit", DIT | {"timesteps": 20}, lr=3e-3, batch=8, sample={"steps": 4, "guidance": 2.0}),
    Case("dit", DIT | {"timesteps": 20, "conditional": False}, lr=3e-3, batch=8, sample={"steps": 4}),
    DIFFAE,
    Case(
        "latent_prior", LATENT, lr=3e-3, sample={"steps": 3, "code_steps": 4}, stages={"autoencoder": DIFFAE}
    ),
    Case(
        "latent_prior",
        LATENT | {"conditional": True},
        lr=3e-3,
        sample={"steps": 3, "code_steps": 4, "guidance": 2.0},
        stages={"autoencoder": DIFFAE},
    ),
    Case("zigma", ZIGMA, lr=3e-3, batch=8, sample={"steps": 3}),
    Case(
        "zigma",
        ZIGMA | {"conditional": True, "patch": 2},
        lr=3e-3,
        batch=8,
        sample={"steps": 3, "guidance": 2.0},
    ),
    Case("fm", FM, lr=5e-3, batch=8, sample={"steps": 3}),
    Case(
        "fm",
        FM | {"conditional": True, "time_sampling": "uniform", "sigma_min": 0.01},
        lr=5e-3,
        batch=8,
        sample={"steps": 3},
    ),
    Case("fm", FM | {"clusters": 5}, lr=5e-3, batch=8, sample={"steps": 3, "guidance": 2.0}),
    Case("cfm", FM | {"coupling": "ot"}, lr=5e-3, batch=8, sample={"steps": 3, "guidance": 2.0}),
    RF,
    RF_LABELS,
    Case(
        "reflow",
        {"pair_steps": 4},
        lr=3e-3,
        batch=8,
        sample={"steps": 2, "sampler": "euler"},
        stages={"teacher": RF},
    ),
    Case(
        "reflow",
        {"pair_steps": 4, "pair_guidance": 2.0, "conditional": True},
        lr=3e-3,
        batch=8,
        sample={"steps": 2, "guidance": 2.0},
        stages={"teacher": RF_LABELS},
    ),
    Case("sgm", FM, lr=5e-3, batch=8, sample={"steps": 4}),
    Case(
        "sgm",
        FM | {"sde": "subvp", "prediction": "eps", "weighting": "likelihood", "conditional": True},
        lr=5e-3,
        batch=8,
        sample={"steps": 4, "guidance": 2.0},
    ),
    Case(
        "sgm",
        FM | {"sde": "ve", "time_sampling": "uniform"},
        lr=5e-3,
        batch=8,
        sample={"sampler": "pc", "steps": 4},
    ),
    Case("ncsnv2", REFINENET, lr=3e-3, batch=8, sample={"steps": 4}),
    Case(
        "ncsnv2",
        REFINENET
        | {"levels": 10, "conditional": True}
        | {"prediction": "v", "weighting": "even", "time_sampling": "cosine"},
        lr=3e-3,
        batch=8,
        sample={"sampler": "langevin", "repeats": 1, "guidance": 2.0},
    ),
    VQVAE,
    Case("vqvae", VQVAE.options | {"codebook": "gradient", "cosine": True}, lr=3e-3, quiet=True),
    Case("vqgan", VQGAN, batch=16, quiet=True),
    Case("transformer", PRIOR, lr=3e-3, quiet=True, stages={"tokenizer": VQVAE}),
    Case("transformer", PRIOR | {"conditional": True}, lr=3e-3, quiet=True, stages={"tokenizer": VQVAE}),
    Case(
        "transformer",
        PRIOR | {"clusters": 5, "label_dropout": 0.1},
        lr=3e-3,
        quiet=True,
        stages={"tokenizer": VQVAE},
    ),
    Case("maskgit", PRIOR, lr=3e-3, sample={"steps": 4}, stages={"tokenizer": VQVAE}),
    Case("maskgit", PRIOR | {"conditional": True}, lr=3e-3, sample={"steps": 4}, stages={"tokenizer": VQVAE}),
    Case("sd_lora", {"rank": 8}, lr=1e-2, batch=8, sample={"steps": 3}, data="digits-captioned"),
    Case(
        "sd_lora",
        {"text_lora": True},
        lr=1e-2,
        batch=8,
        sample={"steps": 3},
        data="digits-captioned",
        base="sdxl",
    ),
    Case("controlnet", {"cache": False}, lr=3e-3, batch=8, sample={"steps": 3}, data="digits-captioned"),
    Case("instructpix2pix", {"cache": False}, lr=3e-3, batch=8, sample={"steps": 3}, data="digits-edited"),
]
