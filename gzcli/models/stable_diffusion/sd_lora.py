"""LoRA of Stable Diffusion — Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models",
arXiv:2106.09685.

    W x + (α / r) · B A x,   A [r, in] ~ N(0, 1/r²),  B [out, r] = 0

beside the frozen linear maps W of the U-Net's attention and, if asked, of the text encoder(s). A checkpoint
holds A and B alone;
`gz runs export` writes the file that `load_lora_weights` of diffusers reads.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from gzcli.models.stable_diffusion.base import Dtype, StableDiffusion
from gzcli.types import DataInfo, Noise, Progress

TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


class SDLoRA(StableDiffusion):
    """Of SD 1.x, 2.x and XL. rank: r; alpha: α, as r without; targets: the layers of the U-Net, by the ends
    of their names;
    text_lora: the text encoders' attention too. The rest: see `StableDiffusion`.
    """

    paper = "Hu et al. 2021, arXiv:2106.09685"
    needs: ClassVar = ("caption",)

    def __init__(
        self,
        data: DataInfo,
        *,
        base: str = "stable-diffusion-v1-5/stable-diffusion-v1-5",
        rank: int = 16,
        alpha: float | None = None,
        targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0"),
        text_lora: bool = False,
        dtype: Dtype = "fp32",
        cache: bool = True,
        checkpointing: bool = False,
        caption_dropout: float = 0.0,
        min_snr: float | None = None,
        noise_offset: float = 0.0,
        prompts: tuple[str, ...] = (),
    ):
        super().__init__(
            data,
            base=base,
            dtype=dtype,
            cache=cache,
            checkpointing=checkpointing,
            caption_dropout=caption_dropout,
            min_snr=min_snr,
            noise_offset=noise_offset,
            prompts=prompts,
        )
        self.text_trains = text_lora
        self.adapted = {"unet": targets}
        if text_lora:
            self.adapted |= dict.fromkeys(("text_encoder", "text_encoder_2")[: 1 + self.xl], TEXT_TARGETS)
        self.adapter = nn.ModuleDict()  # the layers of the attached parts that are trained, in full precision
        for part, names in self.adapted.items():
            module = getattr(self, part)
            config = {"r": rank, "lora_alpha": alpha or rank, "init_lora_weights": "gaussian"}
            inject_adapter_in_model(LoraConfig(**config, target_modules=list(names)), module)
            for name, layer in module.named_modules():
                if isinstance(layer, BaseTunerLayer):
                    for kind in ("lora_A", "lora_B"):
                        self.adapter[f"{part}.{name}.{kind}".replace(".", "/")] = getattr(layer, kind)[
                            "default"
                        ]
        self.adapter.to(torch.get_default_dtype()).requires_grad_(True)

    def denoise(self, z_t: Tensor, t: Tensor, text: Tensor, pooled: Tensor | None = None) -> Tensor:
        return self.unet(z_t, t, encoder_hidden_states=text, added_cond_kwargs=self.added(z_t, pooled)).sample

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress,
        prompt: str | list[str] | None = None,
        negative: str = "",
        guidance: float = 7.5,
        steps: int = 30,
        size: int | None = None,
        lora_scale: float = 1.0,
    ) -> Tensor:
        """n images [n, C, H, W] in [-1, 1] of the prompts, which are cycled through; of remembered captions
        without.

        negative: what to keep away from; guidance: 1 is none; size: the side; lora_scale: of the adapter's
        share, 0 is the base.
        """
        z, (height, width) = self.start(n, noise, size)
        prompts, _ = self.examples(n, noise, prompt, None)
        return self.draw(
            self.pipe,
            z,
            noise=noise,
            progress=progress,
            prompts=prompts,
            negative=negative,
            guidance=guidance,
            steps=steps,
            pictures={},
            height=height,
            width=width,
            cross_attention_kwargs={"scale": lora_scale},
        )

    def to_diffusers(self) -> Any:
        """The adapter as `pytorch_lora_weights.safetensors`."""
        return Adapter(self)


class Adapter:
    """The adapter of a model, to be saved in diffusers' format: with α / r in B, which no version of
    diffusers or peft misreads."""

    loaded_by = "pipeline.load_lora_weights"

    def __init__(self, model: SDLoRA):
        self.model = model

    def save_pretrained(self, folder: str) -> None:
        layers = {}
        for part in self.model.adapted:
            module = getattr(self.model, part)
            config = module.peft_config["default"]
            scale = {"A": 1.0, "B": config.lora_alpha / config.r}
            found = get_peft_model_state_dict(module)
            layers[f"{part}_lora_layers"] = {
                key: scale[key.split(".lora_")[1][0]] * value for key, value in found.items()
            }
        type(self.model.pipe).save_lora_weights(folder, **layers)
