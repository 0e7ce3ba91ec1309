"""Fine-tuning of Stable Diffusion, of tiny pipelines, against diffusers' pipelines, losses and files."""

import copy
import json
import os
import re
import shutil
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import diffusers
import draws
import numpy as np
import pytest
import tiny_sd
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.training_utils import compute_snr
from helpers import lines, recipe, trainer
from refused import refused
from safetensors.torch import load_file
from sklearn.datasets import load_sample_images
from zoo import FIRST

from gzcli.core.errors import GzError, MissingError
from gzcli.core.sections import OptimSection, Part, TrainSection
from gzcli.core.types import Batch, DataInfo, ImageNoise, no_progress
from gzcli.engine import optim
from gzcli.engine.forecast import params_of
from gzcli.engine.log import Log
from gzcli.engine.trained import load_trained
from gzcli.export import export
from gzcli.judge import sample as sample_verb
from gzcli.models import catalog
from gzcli.models.base import group_options
from gzcli.models.stable_diffusion import tiny
from gzcli.models.stable_diffusion.base import PromptOptions, to_bytes, to_text
from gzcli.models.stable_diffusion.controlnet import ControlNet, canny
from gzcli.models.stable_diffusion.instructpix2pix import InstructPix2Pix, widen
from gzcli.models.stable_diffusion.pretrained import load_base
from gzcli.models.stable_diffusion.sd_lora import SDLoRA
from gzcli.store.jobs import ExportJob, SampleJob

INFO = DataInfo((3, 16, 16), 256, n=64)
CPU = torch.device("cpu")
TEXTS = ["a handwritten seven", "a handwritten two", "mirror it", "make it bold"]
MODELS = [SDLoRA, ControlNet, InstructPix2Pix]


def built(cls, kind: str = "tiny", prediction: str = "epsilon", seed: int = 0, **options):
    torch.manual_seed(seed)
    return cls.of(INFO, base=tiny_sd.base(kind, prediction), **options)


def batch(n: int = 4, step: int = 0, **extra) -> Batch:
    generator = torch.Generator().manual_seed(5)
    x, before = (torch.rand(n, 3, 16, 16, generator=generator) * 2 - 1 for _ in "ab")
    captions = [TEXTS[i % len(TEXTS)] for i in range(n)]
    return draws.batch(x, step, **{"caption": captions, "before": before, **extra})


def stirred(model, scale: float = 0.05):
    """As if trained: what starts at zero is not zero any more."""
    for i, p in enumerate(model.parameters()):
        p.data += scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    return model.eval()


def drawn(model, n: int = 2, **options) -> torch.Tensor:
    options = group_options(model.sample, {"steps": 3, **options})
    return model.sample(n, noise=ImageNoise(3, range(n)), progress=no_progress, **options)


HOW = {"num_inference_steps": 3, "output_type": "pt", "height": 16, "width": 16}  # of a call of diffusers


def latents(n: int = 2) -> torch.Tensor:
    return ImageNoise(3, range(n)).randn(n, 4, 8, 8)


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Ours in [-1, 1], theirs in [0, 1]."""
    torch.testing.assert_close((ours + 1) / 2, theirs, atol=2e-5, rtol=0)


TUNED = ["sd_lora", *(pytest.param(m, marks=pytest.mark.slow) for m in ("controlnet", "instructpix2pix"))]


@pytest.fixture(scope="module", params=TUNED)
def trained(request):
    """A run of 40 steps on four images, and the base's weights before it."""
    case = FIRST[request.param]
    case = replace(case, batch=4, lr=6e-3)
    if case.model == "sd_lora":  # attention alone can do little for random weights
        targets = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_out")
        case = replace(case, options={"rank": 8, "targets": targets, "min_snr": None})
    sets = "data.n=4 data.size=16 data.channels=3 train.ema=0.5 optim.warmup=0 optim.schedule=constant"
    t = trainer(recipe(case, steps=40, sets=tuple(sets.split())))
    frozen = {name: copy.deepcopy(part.state_dict()) for name, part in t.model.attached.items()}
    t.fit()
    return t, frozen


def test_it_learns_four_images_and_leaves_alone_what_is_frozen(trained):
    t, frozen = trained
    losses = [line["loss"] for line in lines(t.run.path / "metrics.jsonl")]
    assert np.mean(losses[-10:]) < 0.85 * np.mean(losses[:5]), losses
    ids = {id(p) for p in t.model.parameters()}
    for name, part in t.model.attached.items():
        tuned = {key for key, p in part.named_parameters() if id(p) in ids}
        assert bool(tuned) == (name == "unet" and t.part.model == "sd_lora")
        for key, value in part.state_dict().items():
            assert torch.equal(value, frozen[name][key]) == (key not in tuned), key
    keys = load_file(t.run.path / "model.safetensors").keys() - {"captions", "pictures"}
    prefix = {"sd_lora": "adapter.", "controlnet": "controlnet.", "instructpix2pix": "unet."}[t.part.model]
    assert all(key.startswith(prefix) for key in keys) and len(keys) == len(list(t.model.parameters()))


def test_what_it_shows_of_itself_needs_no_prompt_and_its_export_is_the_same_picture(trained, tmp_path):
    """`gz sample` and `gz runs export`, then diffusers by itself on the exported files."""
    t, _ = trained
    name, run = t.part.model, str(t.run.path)
    log = Log(t.run.path, rank=0)
    prompts = ["a handwritten three", "turn it upside down"]
    picture = canny(batch(2).x) if name == "controlnet" else batch(2).x
    inputs = {"sd_lora": {}, "controlnet": {"control": picture}, "instructpix2pix": {"before": picture}}[name]
    how = {"n": 2, "seed": 3, "options": {"steps": 3, "guidance": 7.5}, "formats": ("npz",)}
    job = SampleJob(run, checkpoint="last", prompts=tuple(prompts), **how)
    (tmp_path / "shown").mkdir()
    assert sample_verb.run(replace(job, prompts=()), tmp_path / "shown", CPU, log)["n"] == 2
    out = export.run(ExportJob(run, "diffusers", str(tmp_path / "out"), "last"), tmp_path, CPU, log)
    pipe, keywords = diffusers_loads(name, Path(out["path"]), picture)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(prompts, latents=latents(), **keywords).images
    model = load_trained(t.run, CPU).model
    assert not model.training
    same(drawn(model, prompt=prompts, **inputs), theirs)
    if name == "sd_lora":
        (tmp_path / "sampled").mkdir()
        sample_verb.run(job, tmp_path / "sampled", CPU, log)
        ours = np.load(tmp_path / "sampled" / "samples.npz")["samples"]
        assert np.abs(ours - (theirs * 255).round().permute(0, 2, 3, 1).numpy()).max() <= 1


def diffusers_loads(name: str, folder: Path, picture: torch.Tensor):
    """A pipeline of diffusers from what was exported, and what it is called with."""
    base, plain, inputs = tiny_sd.base(), {"safety_checker": None}, {"image": (picture + 1) / 2}
    if name == "sd_lora":
        pipe = diffusers.DiffusionPipeline.from_pretrained(base, **plain)
        pipe.load_lora_weights(folder)
        return pipe, HOW
    if name == "controlnet":
        net = diffusers.ControlNetModel.from_pretrained(folder)
        pipe = diffusers.StableDiffusionControlNetPipeline.from_pretrained(base, controlnet=net, **plain)
        return pipe, {**inputs, **HOW}
    pipe = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(folder, **plain)
    return pipe, {**inputs, "image_guidance_scale": 1.5, "num_inference_steps": 3, "output_type": "pt"}


def denoised(model, **conditions) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    z, t = latents(4), torch.tensor([1, 300, 600, 999])
    text = model.embed(TEXTS)
    with torch.no_grad():
        return model.denoise(z, t, {**text, **conditions}), z, t


@pytest.mark.parametrize("kind", ["tiny", "tiny-xl"])
@pytest.mark.parametrize("cls", [SDLoRA, ControlNet])
def test_at_first_it_is_the_base(cls, kind):
    model = built(cls, kind)
    conditions = {"control": torch.rand(4, 3, 16, 16)} if cls is ControlNet else {}
    ours, z, t = denoised(model, **conditions)
    text = model.embed(TEXTS)
    added = None
    if kind == "tiny-xl":
        ids = model.pipe._get_add_time_ids((16, 16), (0, 0), (16, 16), torch.float32, 32)
        added = {"text_embeds": text["pooled"], "time_ids": ids.expand(4, -1)}
    theirs = load_base(tiny_sd.base(kind)).pipe.unet(z, t, text["text"], added_cond_kwargs=added).sample
    assert torch.equal(ours, theirs)
    assert not torch.equal(denoised(stirred(model), **conditions)[0], theirs)


def test_what_an_edit_does_without_and_new_channels():
    model = built(InstructPix2Pix)
    weight = model.unet.conv_in.weight
    assert weight.shape[1] == 8 and not weight[:, 4:].any() and weight[:, :4].all()
    ours, z, t = denoised(model, before=torch.randn(4, 4, 8, 8))
    theirs = load_base(tiny_sd.base()).pipe.unet(z, t, model.embed(TEXTS)["text"]).sample
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert not torch.allclose(denoised(stirred(model), before=torch.randn(4, 4, 8, 8))[0], theirs, atol=1e-3)
    model, n = built(InstructPix2Pix), 4000
    b = batch(n)
    b.extra = {"text": torch.full((n, 32, 32), 7.0), "before_latent": torch.full((n, 4, 8, 8), 7.0)}
    conditions = model.conditions(b)
    text, image = (conditions["text"] != 7).flatten(1).all(1), (conditions["before"] != 7).flatten(1).all(1)
    assert not conditions["before"][image].any()
    for share in (text & ~image, text & image, ~text & image):
        assert float(share.float().mean()) == pytest.approx(0.05, abs=0.012)


@pytest.mark.parametrize(
    ("kind", "prediction"), [("tiny", "epsilon"), ("tiny", "v_prediction"), ("tiny-xl", "epsilon")]
)
def test_the_loss_is_that_of_diffusers_examples(kind, prediction):
    model, b, noise = stirred(built(SDLoRA, kind, prediction, noise_offset=0.1)), batch(), batch().noise
    pipe = load_base(tiny_sd.base(kind, prediction)).pipe
    with torch.no_grad():
        dist = pipe.vae.encode(b.x).latent_dist
        z = (dist.mean + dist.std * noise.randn(4, 4, 8, 8)) * pipe.vae.config.scaling_factor
        eps, t = noise.randn(4, 4, 8, 8), noise.randint(1000, 4)
        eps = eps + 0.1 * noise.randn(4, 4, 1, 1)
        schedule = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
        out = model.denoise(schedule.add_noise(z, eps, t), t, model.embed(TEXTS))
        target = eps if prediction == "epsilon" else schedule.get_velocity(z, eps, t)
        error = (out - target).square().mean((1, 2, 3))
        snr = compute_snr(schedule, t)
        weight = snr.clamp(max=5) / (snr if prediction == "epsilon" else snr + 1)
        for min_snr, weighed in ((None, error), (5.0, weight * error)):
            model.tuning, b.noise = replace(model.tuning, min_snr=min_snr), batch().noise
            torch.testing.assert_close(model.loss(b)["loss"], weighed.mean())


@pytest.mark.parametrize("base", ["tiny-sd3", "tiny-flux"])
def test_a_flow_that_knows_the_images_has_no_loss_and_draws_them(base, monkeypatch):
    """The net is the velocity (z_t − z_0) / σ of two images, in training and in diffusers' pipelines; their
    blocks of 2×2 pixels pass the tiny VAE unchanged."""
    model, b = built(SDLoRA, base), batch(2)
    b.x = b.x[:, :, ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3)
    pack = diffusers.FluxPipeline._pack_latents
    steps = 1000 if base == "tiny-sd3" else 1  # of the times that the net is told
    config, z = model.vae.config, model.vae.encode(b.x).latent_dist.mean
    z = (z - config.shift_factor) * config.scaling_factor
    rows = z if base == "tiny-sd3" else pack(z, 2, 4, 8, 8)

    def velocity(hidden_states, timestep, **options):
        v = (hidden_states - rows) / (timestep / steps).view(-1, *[1] * (rows.ndim - 1))
        return Transformer2DModelOutput(v) if options.get("return_dict", True) else (v,)

    monkeypatch.setattr(model.transformer, "forward", velocity)
    assert float(model.loss(b)["loss"]) < 1e-6
    torch.testing.assert_close(drawn(model, prompt="two", guidance=1.0), b.x, atol=1e-4, rtol=0)


@pytest.mark.parametrize("base", ["tiny-sd3", "tiny-flux"])
def test_times_and_noisy_latents_of_a_flow_are_those_of_its_scheduler(base, monkeypatch):
    model = built(SDLoRA, base)
    schedule, i = model.pipe.scheduler, torch.tensor([1, 300, 700, 998])
    tau = 1 - i / 1000  # times before the shift
    monkeypatch.setattr(model.schedule.config, "use_dynamic_shifting", False)
    t = model.times(4, SimpleNamespace(randn=lambda n: tau.logit()))
    torch.testing.assert_close(t, schedule.sigmas[i])
    z, eps = latents(4), torch.randn(4, 4, 8, 8)
    z_t, target, weight = model.path(z, eps, t)
    torch.testing.assert_close(z_t, schedule.scale_noise(z, schedule.timesteps[i], eps))
    assert weight == 1 and torch.equal(target, eps - z)
    text = model.embed(TEXTS)
    with torch.no_grad():
        ours = model.denoise(z_t, t, text)
        how = {"pooled_projections": text["pooled"], "encoder_hidden_states": text["text"]}
        if base == "tiny-sd3":
            theirs = model.transformer(z_t, timestep=schedule.timesteps[i], **how).sample
        else:
            flux = diffusers.FluxPipeline
            ids = flux._prepare_latent_image_ids(4, 4, 4, CPU, torch.float32)
            how |= {"img_ids": ids, "txt_ids": torch.zeros(32, 3), "guidance": torch.full([4], 3.5)}
            rows = model.transformer(flux._pack_latents(z_t, 4, 4, 8, 8), timestep=t, **how).sample
            theirs = flux._unpack_latents(rows, 16, 16, 2)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_min_snr_weights_are_finite_at_zero_snr():
    """At pure noise, of ε, min(γ / SNR, 1) is 1 there, of v, min(γ, SNR) / (SNR + 1) is 0."""
    model = built(SDLoRA, "tiny", "epsilon", min_snr=5.0)
    model.schedule.alphas_cumprod[-1] = 0.0
    t = torch.tensor([0, 500, 999])
    eps, v = model.weight(t, False), model.weight(t, True)
    assert eps[-1] == 1 and v[-1] == 0 and eps.isfinite().all()
    alpha_bar = model.schedule.alphas_cumprod[t[:2]]
    snr = alpha_bar / (1 - alpha_bar)
    torch.testing.assert_close(eps[:2], snr.clamp(max=5) / snr)


@pytest.mark.parametrize("cls", MODELS)
def test_what_is_prepared_makes_the_same_loss(cls):
    model, b = stirred(built(cls)), batch()
    with torch.no_grad():
        fresh = float(model.loss(b)["loss"])
        tensors = model.prepare(batch())
        assert {"latent_mean", "latent_std", "text"} <= tensors.keys()
        assert all(len(v) == 4 for v in tensors.values())
        cached = batch(**tensors)
        cached.extra.pop("before")
        cached.x = torch.zeros_like(cached.x)  # nothing is made of the images any more
        assert float(model.loss(cached)["loss"]) == pytest.approx(fresh, rel=2e-3)
        assert float(model.loss(batch(step=1, **tensors))["loss"]) != pytest.approx(fresh, rel=2e-3)
    assert built(cls, cache=False).prepare(batch()) == {}


@pytest.mark.parametrize("base", tiny_sd.TINY)
def test_images_of_another_shape_have_the_loss_of_their_latents(base):
    model, b = stirred(built(SDLoRA, base)), batch()
    b.x = b.x[:, :, :, :12].reshape(4, 3, 8, 24)
    with torch.no_grad():
        fresh, prepared = float(model.loss(b)["loss"]), model.prepare(b)
        assert prepared["latent_mean"].shape == model.prepare(batch())["latent_mean"].shape, (
            "rows of one file"
        )
        b = replace(batch(**prepared), x=torch.zeros_like(b.x))
        assert float(model.loss(b)["loss"]) == pytest.approx(fresh, rel=2e-3)
    assert drawn(model, size="24x8").shape == (2, 3, 8, 24)


def test_a_prior_is_what_the_base_draws_and_its_loss_is_that_of_images_with_its_text():
    text, model = "a digit", built(SDLoRA, prior="a digit", prior_images=3, prior_weight=0.5)
    how = {"noise": ImageNoise(0, range(3)), "progress": no_progress, "prompting": PromptOptions(text)}
    images = model.sample(3, **how)
    model.on_start(batch(3))
    torch.testing.assert_close(model.prior_latents, model.scaled(model.encode(images)[0]))
    prior = model.prior_latents.clone()
    stirred(model).on_start(batch(3))  # a resume
    assert torch.equal(model.prior_latents, prior)
    both, alone = model.train().loss(batch(3)), model.eval().loss(batch(3))["loss"]
    torch.testing.assert_close(both["loss"], alone + 0.5 * both["prior"])
    same_draws = batch(3)
    for draw in ("randn", "randn"):  # those of the photos
        getattr(same_draws.noise, draw)(3, 4, 8, 8)
    model.times(3, same_draws.noise), same_draws.noise.rand(3)
    z = prior[same_draws.noise.randint(3, 3)]
    eps, t = same_draws.noise.randn(*z.shape), model.times(3, same_draws.noise)
    z_t = model.schedule.add_noise(z, eps, t)
    error = (model.denoise(z_t, t, model.embed([text] * 3)) - eps).square().mean()
    torch.testing.assert_close(both["prior"], error)


def test_captions_are_dropped_and_text_encoders_tuned():
    for kind in ("tiny", "tiny-xl"):
        model = built(SDLoRA, kind, caption_dropout=0.5)
        inputs = model.conditions(batch(64))
        text, none, *more = model.pipe.encode_prompt(
            TEXTS, device=CPU, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        dropped = batch(64).noise.rand(64) < 0.5
        for i, gone in enumerate(dropped.tolist()):
            torch.testing.assert_close(inputs["text"][i], (none if gone else text)[i % 4], msg=f"{kind} {i}")
            if more:
                torch.testing.assert_close(inputs["pooled"][i], more[gone][i % 4])
    model = built(SDLoRA, "tiny-xl", text_lora=True)
    assert "text" not in model.prepare(batch())
    stirred(model).loss(batch())["loss"].backward()
    taught = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    parts = {name.split(".")[1].split("/")[0] for name in taught}
    assert parts == {"unet", "text_encoder", "text_encoder_2"}
    attached = (p for part in model.attached.values() for p in part.parameters())
    assert all(p.grad is None for p in attached if not p.requires_grad)


@pytest.mark.parametrize("cls", MODELS)
def test_checkpointing_changes_no_gradient(cls):
    results = []
    for checkpointing in (False, True):
        model = stirred(built(cls, checkpointing=checkpointing)).train()
        saved = []
        keep = lambda x, saved=saved: saved.append(x.numel()) or x  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model.loss(batch())["loss"]
        loss.backward()
        results.append((sum(saved), [p.grad for p in model.parameters()]))
    assert results[1][0] < 0.6 * results[0][0]
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-6, rtol=1e-4)


HALVES = [*((cls, "tiny") for cls in MODELS), (SDLoRA, "tiny-sd3"), (SDLoRA, "tiny-flux")]


@pytest.mark.parametrize(("cls", "base"), HALVES)
def test_frozen_parts_in_half_precision(cls, base):
    model, full = (stirred(built(cls, base, dtype=dtype)) for dtype in ("bf16", "fp32"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert next(model.text_encoder.parameters()).dtype == torch.bfloat16
    assert next(model.vae.parameters()).dtype == torch.float32
    a, b = (m.loss(batch())["loss"] for m in (model, full))
    a.backward()
    assert float(a.detach()) == pytest.approx(float(b.detach()), rel=0.02)
    model.on_start(batch()), full.on_start(batch())
    assert (drawn(model) - drawn(full)).abs().mean() < 0.05


@pytest.mark.parametrize("kind", tiny_sd.TINY)
def test_an_adapter_in_plain_diffusers(kind, tmp_path):
    model = stirred(built(SDLoRA, kind, rank=4, alpha=8.0))
    model.to_diffusers().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    base = load_base(tiny_sd.base(kind))
    pipe, how, z = base.pipe, HOW, latents()
    if base.flow:
        how = HOW | {"max_sequence_length": 32}
    if kind == "tiny-flux":
        z = pipe._pack_latents(z, 2, 4, 8, 8)
    untuned = pipe(TEXTS[:2], latents=z, guidance_scale=4.0, **how).images
    same(drawn(model, prompt=TEXTS[:2], guidance=4.0, lora_scale=0.0), untuned)
    pipe.load_lora_weights(tmp_path)
    for scale, negative in ((1.0, ""), (0.5, "bold")):
        options = {"negative_prompt": [negative] * 2 if negative else None, "guidance_scale": 4.0}
        if negative and kind == "tiny-flux":
            options |= {"guidance_scale": 3.5, "true_cfg_scale": 4.0}
        scaled = {base.scale_key: {"scale": scale}}
        theirs = pipe(TEXTS[:2], latents=z, **options, **scaled, **how).images
        same(drawn(model, prompt=TEXTS[:2], guidance=4.0, lora_scale=scale, negative=negative), theirs)
        assert (theirs - untuned).abs().max() > 0.01


def test_a_text_encoders_adapter_in_plain_diffusers(tmp_path, monkeypatch):
    """transformers asks for a newer peft than there may be; what it does with it needs none."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.14.0")
    model = stirred(built(SDLoRA, text_lora=True))
    model.to_diffusers().save_pretrained(tmp_path)
    pipe = load_base(tiny_sd.base()).pipe
    before = pipe.encode_prompt(TEXTS[:2], CPU, 1, False)[0]
    pipe.load_lora_weights(tmp_path)
    assert not torch.allclose(pipe.encode_prompt(TEXTS[:2], CPU, 1, False)[0], before, atol=1e-3)
    theirs = pipe(TEXTS[:2], latents=latents(), **HOW).images
    same(drawn(model, prompt=TEXTS[:2]), theirs)


def test_a_controlnet_of_xl_in_plain_diffusers(tmp_path):
    model, control = stirred(built(ControlNet, "tiny-xl")), canny(batch(2).x)
    model.to_diffusers().save_pretrained(tmp_path)
    net = diffusers.ControlNetModel.from_pretrained(tmp_path)
    xl = diffusers.StableDiffusionXLControlNetPipeline
    pipe = xl.from_pretrained(tiny_sd.base("tiny-xl"), controlnet=net)
    options = {"image": (control + 1) / 2, "guidance_scale": 7.5, "controlnet_conditioning_scale": 0.7}
    theirs = pipe(TEXTS[:2], latents=latents(), **options, **HOW).images
    same(drawn(model, prompt=TEXTS[:2], control=control, control_scale=0.7), theirs)
    same(drawn(model, prompt=TEXTS[:2], control=batch(2).x, control_scale=0.7, edges=True), theirs)


def test_prompts_sizes_and_conditions_that_are_not_given():
    model = built(SDLoRA)
    model.on_start(batch())
    captions = {to_text(row) for row in model.captions}
    assert captions == set(TEXTS)
    images = drawn(model, 3)
    again = [torch.cat([drawn(model, 3, prompt=text)[i : i + 1] for text in TEXTS]) for i in range(3)]
    assert all((same == image).flatten(1).all(1).any() for same, image in zip(again, images, strict=True))
    zero = built(SDLoRA, prompts=("zero",))
    assert torch.equal(drawn(zero), drawn(model, prompt=["zero", "zero"]))
    assert drawn(model, prompt="two", size=32).shape == (2, 3, 32, 32)
    for wrong in ({"size": 20}, {"steps": 0}):
        refused("", drawn, model, 1, **wrong)
    net = built(ControlNet)
    net.on_start(batch())
    assert torch.equal(net.pictures[:4] == 255, canny(batch().x) == 1)
    assert drawn(stirred(net), control=canny(batch(2).x)).shape == (2, 3, 16, 16)
    # what is shown beside the images is what they were made from
    noise = ImageNoise(3, range(2))
    same = net.sources(2, noise=noise)
    assert torch.equal(drawn(stirred(net), prompt=TEXTS[:2]), drawn(net, prompt=TEXTS[:2], control=same))
    assert torch.equal(net.sources(2, noise=noise, control=batch(2).x, edges=True), canny(batch(2).x))
    before = net.pictures.clone()
    net.on_start(batch(2, step=7))
    assert torch.equal(net.pictures, before), "a resume remembers what the first start did"


def test_progress_ends_at_the_number_of_images_and_captions_are_kept_as_bytes(monkeypatch):
    monkeypatch.setattr("gzcli.models.stable_diffusion.base.LATENTS", 2 * 64)
    seen = []
    how = {"noise": ImageNoise(3, range(3)), "prompting": PromptOptions(prompt="two", steps=2)}
    built(SDLoRA).sample(3, progress=lambda i, n: seen.append((i, n)), **how)
    assert seen[-1] == (3, 3) and [i for i, _ in seen] == sorted(i for i, _ in seen) and len(seen) == 4
    for caption in ("", "a dog\nin two lines", "雪" * 200):
        text = to_text(to_bytes(caption))
        assert caption.startswith(text) and len(text.encode()) >= min(len(caption.encode()), 290)


def test_edges_are_found_in_photographs_and_without_scikit_image_it_says_what_to_install(monkeypatch):
    """White on black, on a twentieth of a photograph's pixels and around a square."""
    photographs = [image.mean(2) / 127.5 - 1 for image in load_sample_images().images]
    square = np.pad(np.ones((8, 8)), 8) * 2 - 1
    for grey, least, most in (*((image, 0.02, 0.3) for image in photographs), (square, 0.04, 0.08)):
        maps = canny(torch.from_numpy(grey)[None, None].float())
        assert maps.unique().tolist() == [-1, 1] and least < (maps == 1).float().mean() < most
    monkeypatch.setitem(sys.modules, "skimage.feature", None)
    refused("need the package `scikit-image`", canny, batch(2).x, error=MissingError)


def test_bases_that_are_not_whole_or_of_another_kind(tmp_path):
    """Absent ones, pickled weights, which are not read, and pointers of Git LFS in place of weights."""
    with pytest.raises(MissingError, match=r"nobody/nothing` are not available") as e:
        SDLoRA.of(INFO, base="nobody/nothing")
    assert "hf download nobody/nothing" in e.value.hint and "--set model.base=" in e.value.hint
    for folder, message in ((tmp_path / "none", ""), (tmp_path, "model_index")):
        refused(message, SDLoRA.of, INFO, base=str(folder), error=MissingError)
    pickled = tmp_path / "pickled"
    pipe = tiny.tiny_base("tiny").pipe
    pipe.save_pretrained(pickled, safe_serialization=False)
    for file in pickled.rglob("*.safetensors"):  # transformers writes no others any more
        file.unlink()
    assert list(pickled.rglob("*.bin"))
    for part in ("unet", "text_encoder"):
        pipe.save_pretrained(tmp_path / part)
        for file in (tmp_path / part / part).glob("*.safetensors"):
            file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 3438167536\n")
    for folder in ("pickled", "unet", "text_encoder"):
        refused("is incomplete", SDLoRA.of, INFO, base=str(tmp_path / folder), error=MissingError)
    pipe = tiny.tiny_base("tiny").pipe
    widen(pipe.unet, 5)  # of inpainting
    pipe.save_pretrained(tmp_path)
    for message, call in {
        "is XL": lambda: built(InstructPix2Pix, "tiny-xl"),
        "is FLUX": lambda: built(ControlNet, "tiny-flux"),
        "predicts `sample`": lambda: built(SDLoRA, "tiny", "sample"),
        "multiples of 8": lambda: SDLoRA.of(DataInfo((3, 28, 28)), base=tiny_sd.base()),
        "takes 9 channels": lambda: SDLoRA.of(INFO, base=str(tmp_path)),
    }.items():
        refused(message, call)


def test_a_tiny_base_in_the_cache_that_is_damaged_is_made_again(home):
    whole = load_base("tiny").pipe.unet.state_dict()
    (folder,) = (home / "bases").iterdir()
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    damages = {
        weights: os.mkfifo,
        folder / "model_index.json": lambda path: path.write_text("[]"),
        folder / "vae" / "config.json": lambda path: path.symlink_to("nothing"),
    }
    for path, damage in damages.items():
        path.unlink()
        damage(path)
        now = load_base("tiny").pipe.unet.state_dict()
        assert all(torch.equal(now[name], value) for name, value in whole.items()), path
        assert path.is_file() and not list(folder.parent.glob(".*.part"))
    shutil.rmtree(folder)
    folder.write_text("a file in place of the folder")
    assert load_base("tiny").net == "unet" and folder.is_dir()


EVIL = "open({!r}, 'w')\n\nclass Evil:\n    from_pretrained = classmethod(lambda cls, *a, **k: cls())\n"


def test_a_base_brings_no_code(tmp_path, monkeypatch):
    """diffusers .32 runs `scheduler/evil.py` for an entry ["evil", "Evil"]."""
    ran, index = tmp_path / "ran", tmp_path / "base" / "model_index.json"
    shutil.copytree(tiny_sd.base("tiny"), index.parent)
    parts = json.loads(index.read_text())
    for place in (index.parent, index.parent / "scheduler", tmp_path):
        (place / "evil.py").write_text(EVIL.format(str(ran)))
    monkeypatch.syspath_prepend(tmp_path)
    entries = (["evil", "Evil"], ["transformers", "AutoModel"], ["diffusers", "utils"], ["diffusers"], "ev")
    for part, entry in product(("scheduler", "unet", "other"), entries):
        index.write_text(json.dumps(parts | {part: entry}))
        refused(
            rf"`{part}` of `.*` is {re.escape(json.dumps(entry))}", SDLoRA.of, INFO, base=str(index.parent)
        )
    for part, entry in (
        ("safety_checker", ["evil", "Evil"]),
        ("feature_extractor", []),
        ("_class_name", ["evil", "Evil"]),
    ):
        index.write_text(json.dumps(parts | {part: entry}))
        refused("of `.*` is|`.*` is a", SDLoRA.of, INFO, base=str(index.parent))
    assert not ran.exists() and "evil" not in sys.modules
    index.write_text(
        json.dumps(parts | {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]})
    )
    SDLoRA.of(INFO, base=str(index.parent))


def test_damaged_files_of_a_base_are_named(tmp_path):
    whole = tiny_sd.base("tiny")
    for place, content in product(
        ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json"),
        ("", "{", "[]", "[1]", "\0", "{" * 5000),
    ):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        shutil.copytree(whole, folder)
        if not (folder / place).is_file():
            continue
        (folder / place).write_text(content)
        with pytest.raises(GzError) as e:
            SDLoRA.of(INFO, base=str(folder))
        assert e.value.code in (2, 3) and str(folder) in e.value.message, (place, content)
        shutil.rmtree(folder)


def test_what_a_base_and_its_optimizer_need(monkeypatch):
    """SD 1.5 is known by its id: nothing is read."""
    options = {key: p.default for key, p in catalog.card("controlnet").params.items()}
    options["base"] = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    part = Part("controlnet", options, train=TrainSection(batch_size=1, precision="fp32"))
    assert params_of(part, DataInfo((3, 64, 64)), {}) == 361_279_120
    tuned = {key: p.default for key, p in catalog.card("sd_lora").params.items()}
    part_lora = Part("sd_lora", tuned | {"base": "black-forest-labs/FLUX.1-dev"}, train=part.train)
    # four maps of 3,072 features in 19 blocks, three in 38
    assert params_of(part_lora, DataInfo((3, 64, 64)), {}) == (4 * 19 + 3 * 38) * 2 * 3072 * 16
    stranger = replace(part, options={**options, "base": "somebody/something"})
    with pytest.raises(MissingError, match="the size of `somebody/something` is unknown"):
        params_of(stranger, DataInfo((3, 64, 64)), {})
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    conf = OptimSection(name="adamw8bit", lr=1e-3, betas=(0.9, 0.99))
    refused("bitsandbytes", optim.build, built(SDLoRA).phases()[0], conf, error=MissingError)
