"""Weights in the layout of diffusers: what gz builds of their configuration computes what diffusers does."""

import json
import os
from functools import partial

import pytest
import torch
from helpers import in_process
from hub import hub
from refused import refused
from safetensors.torch import load_file, save_file

from gzcli.cli import app
from gzcli.core.errors import DamagedError, GzError, MissingError, UsageError
from gzcli.core.types import ImageNoise, no_progress
from gzcli.engine.trained import build_model, load_trained
from gzcli.export import published
from gzcli.judge.scores import choose
from gzcli.launch import launcher
from gzcli.launch.from_file import find_run
from gzcli.launch.plan import ask, prepare
from gzcli.models.denoising import samplers
from gzcli.models.denoising.process import Level
from gzcli.models.diffusion.ddpm import SamplingOptions
from gzcli.store import layout

diffusers = pytest.importorskip("diffusers")
GOOGLE = {  # what the five networks of `google/ddpm-*` have in common
    "act_fn": "silu",
    "attention_head_dim": None,
    "center_input_sample": False,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "out_channels": 3,
}
DIT = {"num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8}
DIT |= {"num_layers": 28, "sample_size": 32, "patch_size": 2, "num_embeds_ada_norm": 1000, "norm_eps": 1e-5}


def blocks(widths, attended):
    """The keys of levels of these widths, with attention in those of these numbers."""
    down = ["AttnDownBlock2D" if i in attended else "DownBlock2D" for i in range(len(widths))]
    up = [kind.replace("Down", "Up") for kind in reversed(down)]
    return {"block_out_channels": widths, "down_block_types": down, "up_block_types": up}


CD = {  # `openai/diffusers-cd_imagenet64_l2`, a consistency function
    "attention_head_dim": 64,
    "attn_norm_num_groups": 32,
    "block_out_channels": [192, 384, 576, 768],
    "down_block_types": ["ResnetDownsampleBlock2D", *["AttnDownBlock2D"] * 3],
    "downsample_padding": 1,
    "downsample_type": "resnet",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 3,
    "layers_per_block": 3,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "num_class_embeds": 1000,
    "out_channels": 3,
    "resnet_time_scale_shift": "scale_shift",
    "sample_size": 64,
    "up_block_types": [*["AttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"],
    "upsample_type": "resnet",
}
CIFAR = GOOGLE | {"sample_size": 32} | blocks([128, 256, 256, 256], {1})
PHOTOS = GOOGLE | {"sample_size": 256} | blocks([128, 128, 256, 256, 512, 512], {4})
SMALL = {"norm_num_groups": 4}
SMALL_CIFAR = CIFAR | SMALL | blocks([8, 16, 16, 16], {1})
FULL = {
    "google/ddpm-cifar10-32": CIFAR,
    "google/ddpm-celebahq-256": PHOTOS,
    "google/ddpm-church-256": PHOTOS,
    "google/ddpm-bedroom-256": PHOTOS,
    "google/ddpm-cat-256": PHOTOS,
    "openai/diffusers-cd_imagenet64_l2": CD,
    "facebook/DiT-XL-2-256": DIT,
}
HERE = {
    "cifar10": SMALL_CIFAR,
    "celebahq": PHOTOS | SMALL | {"sample_size": 64} | blocks([8, 8, 16, 16, 32, 32], {4}),
    "heads": SMALL_CIFAR
    | {"attention_head_dim": 4, "flip_sin_to_cos": True, "freq_shift": 0, "out_channels": 6},
    "classes": SMALL_CIFAR
    | {"num_class_embeds": 5, "sample_size": 16, "downsample_padding": 1, "norm_eps": 1e-5},
    "consistency": CD
    | SMALL
    | {"attn_norm_num_groups": 4, "block_out_channels": [8, 16, 16, 16], "attention_head_dim": 4}
    | {"layers_per_block": 1, "num_class_embeds": 5, "sample_size": 16},
    "dit": DIT | {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8},
}


def folder_of(path, config, scheduler=None):
    """A folder with random weights under a configuration, and a network's outputs that are not all alike."""
    kind = "DiTTransformer2DModel" if "num_layers" in config else "UNet2DModel"
    torch.manual_seed(0)
    net = getattr(diffusers, kind)(**config)
    for p in net.parameters():
        p.data.normal_().mul_(0.7 * p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
    if kind == "UNet2DModel":
        net.save_pretrained(path)
        noise = diffusers.DDPMScheduler(variance_type="fixed_large")
        if "downsample_type" in config:
            noise = diffusers.CMStochasticIterativeScheduler()
        (scheduler or noise).save_pretrained(path)
        return path
    first = net.transformer_blocks[0].norm1.emb.state_dict()  # every block has the same, as published
    for block in net.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    net.save_pretrained(path / "transformer")
    (scheduler or diffusers.DDIMScheduler(clip_sample=False)).save_pretrained(path / "scheduler")
    sizes = {"block_out_channels": (4,) * 4, "norm_num_groups": 4, "latent_channels": 4, "sample_size": 64}
    types = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    diffusers.AutoencoderKL(**sizes, **types).save_pretrained(path / "vae")
    words = {str(i): f"c{i}, or d{i}" for i in range(config["num_embeds_ada_norm"])}
    (path / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", "id2label": words}))
    return path


def model_of(folder):
    saved = published.saved_of(published.read(folder), "digits")
    model = build_model(saved.part, saved.info)
    model.load_state_dict(saved.weights)
    return model.eval(), saved


def difference(folder):
    """Of outputs, as a share of their deviation."""
    return published.check(model_of(folder)[0], published.read(folder))


def some(*fast, of=HERE):
    """These configurations, and the others of some nightly."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in of]


@pytest.mark.parametrize("name", some("cifar10", "heads", "consistency", "dit"))
def test_a_forward_pass_is_that_of_diffusers(name, tmp_path):
    assert difference(folder_of(tmp_path, HERE[name])) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_a_forward_pass_at_the_published_size(name, tmp_path):
    assert difference(folder_of(tmp_path, FULL[name])) <= 2e-5


def test_a_flow_runs_from_noise_to_data_here(tmp_path):
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    for config in (SMALL_CIFAR, SMALL_CIFAR | {"flip_sin_to_cos": True, "freq_shift": 0}):
        folder = folder_of(tmp_path / str(config["freq_shift"]), config, flow)
        model, saved = model_of(folder)
        assert saved.part.model == "fm" and model.process.shift == 3
        assert published.check(model, published.read(folder)) <= 2e-5


def twenty_steps(folder, steps=20, n=2):
    """The largest difference of what gz and diffusers draw from the same noise by DDIM, images or latents.
    diffusers keeps the noise of an estimate that it clamps, unless `use_clipped_model_output` is set."""
    model, _ = model_of(folder)
    read, shape = published.read(folder), model.data.shape
    y = torch.arange(n) % len(read.classes) if read.classes else None
    net = getattr(diffusers, read.kind).from_pretrained(read.net).eval()
    options = {"clip_sample": model.data.levels is not None}
    scheduler = diffusers.DDIMScheduler.from_config(dict(read.scheduler) | options)
    scheduler.set_timesteps(steps)
    x = ImageNoise(0, range(n), torch.device("cpu")).randn(n, *shape)
    labels = {} if y is None else {"class_labels": y}
    with torch.no_grad():
        for t in scheduler.timesteps:
            times = t.expand(n)
            out = net(x, times, **labels).sample[:, : shape[0]]
            x = scheduler.step(out, t, x, use_clipped_model_output=True).prev_sample
    walk = SamplingOptions(sampler="ddim", steps=steps, spacing="leading", guidance=1.0)
    noise = ImageNoise(0, range(n), torch.device("cpu"))
    ours = model.sample(n, labels=y, noise=noise, progress=no_progress, options=walk)
    assert ours.std() > 0.05
    return float((ours - (x.clamp(-1, 1) if options["clip_sample"] else x)).abs().max())


@pytest.mark.parametrize("name", some("classes", "dit", of=("cifar10", "celebahq", "classes", "dit")))
def test_twenty_steps_of_ddim_from_the_same_noise(name, tmp_path):
    assert twenty_steps(folder_of(tmp_path, HERE[name])) < 2 / 255  # of [-1, 1]


def test_twenty_steps_of_a_consistency_function(tmp_path, monkeypatch):
    from diffusers.schedulers import scheduling_consistency_models

    model, _ = model_of(folder_of(tmp_path, HERE["consistency"]))
    net, y = diffusers.UNet2DModel.from_pretrained(tmp_path).eval(), torch.tensor([1, 3])
    noise = torch.randn(21, 2, 3, 16, 16)
    scheduler, draws = diffusers.CMStochasticIterativeScheduler(), iter(noise)
    monkeypatch.setattr(scheduling_consistency_models, "randn_tensor", lambda *_, **__: next(draws))
    scheduler.set_timesteps(20)
    x = scheduler.init_noise_sigma * next(draws)
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = net(scheduler.scale_model_input(x, t), t, class_labels=y).sample
            x = scheduler.step(out, t, x).prev_sample
        path = [model.process.ratio_level(float(sigma)) for sigma in scheduler.sigmas]
        draws = iter(noise)
        start = path[0].sigma * next(draws)
        path.append(Level(0.0, 1.0, 0.0))
        ours = samplers.renoise(model.denoiser(y), start, path, randn=lambda: next(draws))
    assert ours.std() > 0.05 and float((ours - x).abs().max()) < 2 / 255
    # at its boundary it is the identity
    level = model.process.ratio_level(model.least)
    torch.testing.assert_close(model.estimate(x, level, y).x0, x, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_twenty_steps_at_the_size_of_dit_xl(tmp_path):
    """8 GB of memory, some minutes."""
    assert twenty_steps(folder_of(tmp_path, DIT), n=1) < 2 / 255


@pytest.mark.parametrize("name", some("cifar10", "consistency"))
def test_a_network_is_exported_and_imported_again(name, tmp_path):
    model, saved = model_of(folder := folder_of(tmp_path / "a", HERE[name]))
    if name == "consistency":  # whose pipeline gz does not write
        model.net.to_diffusers(model.data.shape[1:], 3, null=False).save_pretrained(tmp_path / "b")
        diffusers.CMStochasticIterativeScheduler().save_pretrained(tmp_path / "b")
    else:
        model.to_diffusers().save_pretrained(tmp_path / "b")
    if name == "dit":  # beside whose transformer the autoencoder is to lie
        (folder / "vae").rename(tmp_path / "b" / "vae")
    again, reloaded = model_of(tmp_path / "b")
    weights = {key: value for key, value in saved.weights.items() if not key.startswith("net.conv_out")}
    assert all(again.state_dict()[key].equal(value) for key, value in weights.items())
    assert len(reloaded.info.classes) == len(saved.info.classes) and reloaded.part.model == saved.part.model
    if name != "dit":  # without learned variances
        rows = again.net.conv_out.bias
        assert rows.equal(model.net.conv_out.bias[: len(rows)])


def test_export_keeps_the_noise_and_old_names_are_read(tmp_path):
    model, _ = model_of(folder_of(tmp_path / "a", SMALL_CIFAR))
    model.to_diffusers().save_pretrained(tmp_path / "b")
    scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path / "b" / "scheduler")
    assert scheduler.config.prediction_type == "epsilon"
    # names of 2022, which diffusers still reads
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    file = tmp_path / "a" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for new, name in old.items():
        tensors = {key.replace(new, name): value for key, value in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    assert difference(tmp_path / "a") <= 1e-5


def test_what_gz_cannot_read_is_refused(tmp_path):
    def changed(name, file="config.json", **changes):
        folder = folder_of(tmp_path / name, SMALL_CIFAR)
        tree = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(tree | changes))
        return published.read(folder)

    for said, changes in (
        ("with `act_fn: gelu`", {"act_fn": "gelu"}),
        ("with `time_embedding_type: fourier`", {"time_embedding_type": "fourier"}),
        ("do not fit its `config.json`", {"layers_per_block": 1}),
        ("not multiples of the first", {"block_out_channels": [8, 12, 16, 16]}),
    ):
        refused(said, published.saved_of, changed(said[-8:-1].strip("`: "), **changes), "digits")
    refused("contains `X`, a network that gz cannot read", changed, "x", _class_name="X")
    scaled = changed("scaled", "scheduler_config.json", beta_schedule="scaled_linear")
    refused("gz does not support the noise schedule of", published.saved_of, scaled, "digits")
    folder = folder_of(tmp_path / "bin", SMALL_CIFAR)
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(MissingError, match=r"no `diffusion_pytorch_model\.safetensors`"):
        published.saved_of(published.read(folder), "digits")
    (folder / "scheduler_config.json").unlink()
    with pytest.raises(MissingError, match="does not specify the noise"):
        published.read(folder)


def test_a_network_that_computes_something_else_is_not_trusted(tmp_path, monkeypatch):
    """All its weights load, and its outputs are far from those of diffusers."""
    folder = folder_of(tmp_path, SMALL_CIFAR)
    read = published._unet
    monkeypatch.setattr(published, "_unet", lambda folder: read(folder) | {"downsample_padding": 1})
    monkeypatch.setattr(published, "_check_config", lambda *_: None)
    with pytest.raises(UsageError, match="outputs differ from those of diffusers"):
        model_of(folder)


def test_a_folder_is_a_run_and_a_start(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(launcher, "run", in_process)
    for name in ("cifar10", "dit"):
        folder = folder_of(tmp_path / f"ddpm-{name}-32", HERE[name])
        run = find_run(str(folder))
        assert run is not None and find_run(str(folder)).path == run.path
        trained = load_trained(run, torch.device("cpu"))
        images = trained.decode(trained.model.sample(2, noise=ImageNoise(0, range(2), trained.device)))
        assert images.shape[1:] == ((3, 32, 32) if name == "cifar10" else (3, 64, 64))
    sets = (
        "train.sample_every=0",
        "train.samples=2",
        "train.eval_every=0",
        "train.best=none",
        "train.patience=null",
        "data.n=16",
    )
    request = ask(str(tmp_path / "ddpm-cifar10-32"), "patches", sets, {"launch.cpu": True, "train.steps": 1})
    part = request.recipe.parts[0]
    assert (part.model, part.options["downsample_padding"], part.data.size) == ("ddpm", 0, 32)
    start = prepare(request)
    assert start.train(start.recipe()).state == "finished"


def test_the_hub_gives_a_folder_as_a_disk_does(tmp_path, monkeypatch, capfd):
    from huggingface_hub import constants

    monkeypatch.setattr(launcher, "run", in_process)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = folder_of(tmp_path / "weights", SMALL_CIFAR)
    with hub() as service:
        monkeypatch.setenv("HF_ENDPOINT", service.url)
        monkeypatch.setenv("GZ_OFFLINE", "0")
        service.repos["google/ddpm-cifar10-32"] = {p.name: p.read_bytes() for p in folder.iterdir()}
        run = find_run("hf://google/ddpm-cifar10-32")
    assert (run.model, run.data) == ("ddpm", "cifar10")
    monkeypatch.setenv("GZ_OFFLINE", "1")
    assert find_run("hf://google/ddpm-cifar10-32").path == run.path  # it is in the hub's cache
    with pytest.raises(MissingError, match="is not on this machine") as e:
        find_run("hf://google/ddpm-cat-256")
    assert e.value.code == 3 and "hf download google/ddpm-cat-256" in e.value.hint


def test_a_consistency_function_only_samples(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(launcher, "run", in_process)
    folder = str(folder_of(tmp_path / "cm-patches", HERE["consistency"]))
    trained = load_trained(find_run(folder), torch.device("cpu"))
    assert trained.name == "consistency" and trained.model.likelihood is None
    refused("`consistency` has no score for", choose, trained, None)
    refused("`consistency` has no likelihood, which the score `nll` needs", choose, trained, ["nll"])
    for said, *words in (
        ("`--sampler` must be `renoise`", "--sampler", "heun"),
        ("no such option `--guidance`", "--guidance", "2"),
        ("`consistency` does not inpaint", "--do", "inpaint"),
        ("`consistency` does not reconstruct", "--do", "reconstruct"),
    ):
        assert app.run(["sample", folder, *words]) == 2 and said in capfd.readouterr().err, words


WRONG = {
    "null": None,
    "string": "x",
    "negative": -1,
    "zero": 0,
    "huge": 10**9,
    "nan": float("nan"),
    "infinite": float("inf"),
    "fraction": 1.5,
    "empty": [],
    "list": [3, 3, 3],
    "strings": ["x"] * 11,
    "map": {},
    "flag": True,
}
MAY_BE = {  # which of these a key may be: texts, and the lengths of lists, are compared later
    "attention_head_dim": ("null",),
    "attn_norm_num_groups": ("null",),
    "num_class_embeds": ("null",),
    "num_train_timesteps": ("null",),
    "out_channels": ("null",),
    "sample_size": ("null",),
    "trained_betas": ("null",),
    "block_out_channels": ("list",),
    "id2label": ("null", "map"),
    **dict.fromkeys(("_class_name", "act_fn", "beta_schedule", "prediction_type"), ("string",)),
    **dict.fromkeys(("downsample_type", "resnet_time_scale_shift"), ("string",)),
    **dict.fromkeys(("dropout", "norm_eps", "freq_shift", "beta_start", "beta_end"), ("zero",)),
    "downsample_padding": ("zero",),
    **dict.fromkeys(("scaling_factor", "sigma_min", "sigma_max", "sigma_data", "shift"), ("fraction",)),
    "shift_factor": ("null", "fraction", "negative", "zero"),
    **dict.fromkeys(("flip_sin_to_cos", "rescale_betas_zero_snr", "use_dynamic_shifting"), ("flag",)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each kind."""
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    kinds = {"classes": None, "consistency": None, "dit": None, "cifar10": flow}
    place = tmp_path_factory.mktemp("published")
    return {name: folder_of(place / name, HERE[name], noise) for name, noise in kinds.items()}


def facts(folder):
    """What is read before anything is built, with the autoencoder."""
    read = published.read(folder)
    return read, published.autoencoder_weights(read.vae) if read.vae else None


@pytest.mark.parametrize("kind", ["classes", "consistency", "dit", "cifar10"])
def test_a_wrong_value_of_a_key_is_named(kind, folders):
    tried = 0
    for file in sorted(folders[kind].rglob("*.json")):
        tree, text = json.loads(file.read_text()), file.read_text()
        for key in tree.keys() & layout.RULES.keys():
            for name, value in WRONG.items():
                if name in MAY_BE.get(key, ()):
                    continue
                file.write_text(json.dumps(tree | {key: value}))
                error = refused(f"`{key}` must be", facts, folders[kind], error=DamagedError)
                assert str(file) in error.message and error.code == 3 and error.hint, (key, name)
                tried += 1
        file.write_text(text)
    facts(folders[kind])
    assert tried > 150


NEEDED = {  # by the file, or its folder
    "scheduler_config.json": {"_class_name"},
    "vae": {"block_out_channels", "latent_channels", "out_channels"},
    "transformer": {"_class_name", *published.NEEDS[published.DIT]},
    "model_index.json": set(),
}


@pytest.mark.parametrize("kind", ["classes", "dit"])
def test_a_damaged_file_is_named(kind, folders):
    """Cut, emptied, not text, replaced by a folder or a pipe, or without one of its keys."""
    for file in sorted(folders[kind].rglob("*.json")):
        whole, tree = file.read_bytes(), json.loads(file.read_text())
        for data in (b"", b"{", b"[1]", b"\xff\xfe", whole[:1], whole[: len(whole) // 2], whole[:-3]):
            file.write_bytes(data)
            refused(f"{file}` is damaged", facts, folders[kind], error=DamagedError)
        file.unlink()
        for make, remove in ((file.mkdir, file.rmdir), (partial(os.mkfifo, file), file.unlink)):
            make()
            refused(str(file), facts, folders[kind], error=DamagedError, hint="get a new copy")
            remove()
        unet = {"_class_name", *published.NEEDS[published.UNET]}
        for key in NEEDED.get(file.name, NEEDED.get(file.parent.name, unet)):
            file.write_text(json.dumps({k: v for k, v in tree.items() if k != key}))
            refused(f"{file}` is damaged: it has no `{key}`", facts, folders[kind], error=DamagedError)
        file.write_bytes(whole)


def converted(folder):
    return published.saved_of(published.read(folder), "digits")


def test_damaged_weights_are_named(folders):
    folder = folders["classes"]
    file = folder / "diffusion_pytorch_model.safetensors"
    whole, tensors = file.read_bytes(), load_file(file)
    for size in (0, 4, 8, 200, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        refused(f"{file}` is damaged", converted, folder, error=DamagedError)
    for data in (b"\xff" * len(whole), whole[:8] + b"[" + whole[9:], whole + b"\0"):
        file.write_bytes(data)
        refused(f"{file}` is damaged", converted, folder, error=DamagedError)
    name = "conv_in.weight"
    without = {key: value for key, value in tensors.items() if key != name}
    for changed in (without, tensors | {name: tensors[name][:, :1].clone()}, tensors | {"x": torch.zeros(1)}):
        save_file(changed, file)
        refused("do not fit its `config.json`", converted, folder)
    save_file(tensors | {name: tensors[name] / 0}, file)
    refused(f"{file}` is damaged: `{name}` is not finite", converted, folder, error=DamagedError)
    for make, remove in ((file.mkdir, file.rmdir), (partial(os.mkfifo, file), file.unlink)):
        file.unlink(missing_ok=True)
        make()
        refused(f"{file}` is not a file", converted, folder, error=DamagedError)
        remove()
    file.write_bytes(whole)


@pytest.mark.parametrize(
    ("kind", "file", "key", "value", "said"),
    [
        ("classes", "config.json", "down_block_types", ["DownBlock2D"], "must be a list of 4 strings"),
        ("classes", "config.json", "up_block_types", ["X"] * 4, "which gz does not support"),
        ("classes", "config.json", "layers_per_block", 64, "do not fit its `config.json`"),
        ("classes", "config.json", "block_out_channels", [16384] * 4, "do not fit its `config.json`"),
        ("classes", "config.json", "norm_num_groups", 3, "config.json` describes no network"),
        ("classes", "config.json", "class_embed_type", "identity", "with `class_embed_type: identity`"),
        ("classes", "config.json", "time_embedding_dim", 8, "with `time_embedding_dim: 8`"),
        ("classes", "scheduler_config.json", "beta_schedule", "x", r"the noise schedule of .* \(x\)"),
        ("classes", "scheduler_config.json", "_class_name", "XScheduler", "the noise schedule of"),
        ("classes", "scheduler_config.json", "_class_name", "ScoreSdeVeScheduler", "the noise schedule of"),
        ("classes", "scheduler_config.json", "trained_betas", [0.1] * 3, "has 3 numbers, not 1000"),
        ("classes", "scheduler_config.json", "prediction_type", "x", "the prediction type `x`"),
        ("dit", "transformer/config.json", "sample_size", 4096, "for at most 16,384 patches"),
        ("dit", "transformer/config.json", "attention_head_dim", None, "must be an integer, not `null`"),
        ("dit", "transformer/config.json", "num_layers", 256, "do not fit its `config.json`"),
        ("dit", "transformer/config.json", "activation_fn", "x", "with `activation_fn: x`"),
        ("dit", "vae/config.json", "latent_channels", 8, "numbers, but its `config.json` describes"),
        ("dit", "vae/config.json", "layers_per_block", 64, "numbers, but its `config.json` describes"),
        ("dit", "vae/config.json", "norm_num_groups", 3, "describes no `AutoencoderKL`"),
    ],
)
def test_what_does_not_fit_is_refused_before_memory_is_taken(kind, file, key, value, said, folders):
    path = folders[kind] / file
    text = path.read_text()
    path.write_text(json.dumps(json.loads(text) | {key: value}))
    try:
        refused(said, converted, folders[kind], error=GzError)
    finally:
        path.write_text(text)
