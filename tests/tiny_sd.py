"""Stable Diffusion pipelines of a few ten thousand random weights, saved to disk as the real ones are."""

import json
import os
from functools import cache
from pathlib import Path

WORDS = (
    "a handwritten zero one two three four five six seven eight nine "
    "invert the colours mirror it turn upside down make bold"
)

XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "use_linear_projection": True}
XL |= {"transformer_layers_per_block": (1, 2), "projection_class_embeddings_input_dim": 16 + 6 * 4}


@cache
def base(kind: str = "sd", prediction: str = "epsilon") -> str:
    """The folder of a base of this kind, "sd" or "sdxl", made in GZ_HOME when first asked for."""
    folder = Path(os.environ["GZ_HOME"]) / f"tiny-{kind}-{prediction}-{os.getpid()}"
    if not folder.exists():
        pipeline(kind, prediction).save_pretrained(folder, safe_serialization=True)
    return str(folder)


def pipeline(kind: str, prediction: str):
    """Images 2 pixels a latent; texts of up to 16 tokens, words of WORDS whole, all else by letters."""
    import diffusers
    import torch

    state = torch.get_rng_state()
    torch.manual_seed(0)
    xl = kind == "sdxl"
    sizes = {"sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
    sizes |= {"cross_attention_dim": 32 if xl else 16, "attention_head_dim": (2, 4)} | (XL if xl else {})
    sizes |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    sizes |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    unet = diffusers.UNet2DConditionModel(**sizes)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 4, "sample_size": 16}
    vae = diffusers.AutoencoderKL(scaling_factor=0.5, **blocks, **sizes)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    how = {"clip_sample": False, "set_alpha_to_one": False, "prediction_type": prediction}
    parts = {"unet": unet, "vae": vae, "scheduler": diffusers.DDIMScheduler(**betas, **how)}
    parts |= {"text_encoder": text_encoder(False), "tokenizer": tokenizer()}
    if xl:
        parts |= {"text_encoder_2": text_encoder(True), "tokenizer_2": tokenizer()}
        pipe = diffusers.StableDiffusionXLPipeline(**parts)
    else:
        none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = diffusers.StableDiffusionPipeline(**parts, **none)
    torch.set_rng_state(state)
    return pipe


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens of a byte-pair encoding and its merges: every word grows from its letters, left to right."""
    letters = [chr(c) for c in range(33, 127)]
    tokens, merges = dict.fromkeys([*letters, *(f"{c}</w>" for c in letters)]), {}
    for word in WORDS.split():
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges[parts[0], parts[1]] = None
            parts = [parts[0] + parts[1], *parts[2:]]
            tokens[parts[0]] = None
    tokens |= dict.fromkeys(["<|startoftext|>", "<|endoftext|>"])
    return {token: i for i, token in enumerate(tokens)}, list(merges)


def tokenizer():
    import tempfile

    from transformers import CLIPTokenizer

    vocab, merges = vocabulary()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(vocab))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
        told = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 16, "pad_token": "<|endoftext|>"}
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(told))
        return CLIPTokenizer.from_pretrained(folder)


def text_encoder(projected: bool):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    vocab, _ = vocabulary()
    vocab, _ = vocabulary()
    sizes = {"vocab_size": len(vocab), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "projection_dim": 16, "max_position_embeddings": 16}
    start, end = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
    config = CLIPTextConfig(**sizes, bos_token_id=start, eos_token_id=end, pad_token_id=end)
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
