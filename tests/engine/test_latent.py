"""`data.latent`: models on the latents of a run of ours, or of an AutoencoderKL of diffusers."""

import numpy as np
import pytest
import torch
from helpers import fit, recipe, trainer
from refused import refused
from zoo import Case

from gzcli.core.errors import MissingError, UsageError
from gzcli.data.packs.batches import quantise, scan
from gzcli.data.packs.open import open_pack
from gzcli.engine import sampler
from gzcli.engine.checkpoint import Saved, save_weights, weights_of
from gzcli.engine.prepared import MEASURED_IMAGES, new_space
from gzcli.engine.trained import load_trained
from gzcli.judge.scores import Scorer, choose
from gzcli.store import runs

# one worker makes what these tests share, once
pytestmark = pytest.mark.usefixtures("undrawn")
TOKENIZER = Case("vqvae", {"hidden": 16, "residual": 8, "blocks": 1, "codes": 64, "dim": 4}, lr=3e-3)
VAE = Case("vae", {"net": "mlp", "hidden": (64,), "latent": 8}, lr=3e-3)
FM = Case("fm", {"channels": 8, "mult": (1, 2), "attention": ()}, lr=3e-3, batch=16, sample={"steps": 3})


def trained(case: Case, steps: int, *sets: str) -> runs.Run:
    t = fit(recipe(case, steps=steps, sets=sets))
    t.run.update(state="finished")
    return t.run


@pytest.fixture(scope="module")
def tokenizer() -> runs.Run:
    return trained(TOKENIZER, 80)


@pytest.fixture(scope="module")
def on_latents(tokenizer) -> runs.Run:
    return trained(FM, 20, f"data.latent={tokenizer.path}")


@pytest.fixture(scope="module")
def kl(tmp_path_factory) -> str:
    """A pipeline's folder with a tiny AutoencoderKL in `vae`."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"in_channels": 1, "out_channels": 1, "latent_channels": 2, "block_out_channels": (8, 8)}
    vae = AutoencoderKL(norm_num_groups=4, scaling_factor=0.7, shift_factor=0.2, **blocks, **sizes)
    folder = tmp_path_factory.mktemp("pipeline")
    vae.save_pretrained(folder / "vae")
    return str(folder)


def test_latents_have_mean_0_and_deviation_1_and_decode_to_what_was_encoded(tokenizer, on_latents):
    t = trainer(recipe(FM, steps=20, sets=(f"data.latent={tokenizer.path}",)))
    assert t.info.shape == (4, 4, 4) and t.info.levels is None and t.info.classes == t.pack.info().classes
    z = torch.from_numpy(np.asarray(t.images.pack.images("train")))
    assert z.dtype == torch.float16
    assert len(z) == len(t.pack.images("train"))
    assert len(t.images.pack.images("val")) == len(t.pack.images("val"))
    assert len(z) <= MEASURED_IMAGES  # so that all of them were measured
    assert z.float().mean((0, 2, 3)).abs().max() < 2e-3 and (z.float().std((0, 2, 3)) - 1).abs().max() < 2e-3
    batch = t.batches.at(3)
    x = quantise(torch.from_numpy(np.asarray(t.pack.images("train")[batch.index.numpy()])), 17)
    torch.testing.assert_close(batch.x, t.space.encode(x), rtol=2e-3, atol=2e-3)
    autoencoder = load_trained(tokenizer, "cpu").model
    expected = autoencoder.decode(autoencoder.encode(x))
    off = (t.space.decode(t.space.encode(x)) - expected).abs() > 1e-4
    assert off.float().mean() < 0.01  # a tie between two codes may fall


def test_a_trained_run_samples_images_scores_them_and_remembers_its_autoencoder(tokenizer, on_latents):
    model = load_trained(on_latents, "cpu")
    assert model.info.shape == (4, 4, 4) and model.images.shape == (1, 16, 16) and model.images.levels == 17
    images = sampler.draw(model, 5, seed=1)
    assert images.shape == (5, 1, 16, 16) and images.std() > 10
    again = sampler.draw(model, 2, seed=1)
    assert np.abs(images[:2].astype(int) - again).max() <= 1
    pack = open_pack("digits")
    scorer = Scorer(model, ["recon", "path"], options={"starts": 2})
    few = list(scan(pack, "test", batch_size=8, levels=17, device="cpu", index=range(16)))
    scorer.fit(few, few)
    assert all(np.isfinite(v).all() and v.shape == (8,) for v in scorer(few[0]).values())
    refused("no likelihood", choose, model, ["nll"])
    weights = tokenizer.path / "model.safetensors"
    content = weights.read_bytes()
    try:
        autoencoder = load_trained(tokenizer, "cpu")
        theirs = weights_of(autoencoder.model.state_dict())
        changed = {k: v + 0.1 if v.is_floating_point() else v for k, v in theirs.items()}
        save_weights(weights, Saved(changed, autoencoder.part, autoencoder.info, 80))
        refused("not the autoencoder", load_trained, on_latents, "cpu", error=MissingError)
    finally:
        weights.write_bytes(content)


def test_a_second_run_finds_the_latents_packed_and_sees_images(forks, on_latents, tokenizer, monkeypatch):
    done = forks.gz("sample", on_latents.id, "--do", "inpaint", "-n", "3", "--steps", "3", "--cpu", "--json")
    assert '"n": 3' in done.stdout  # the outputs alone
    monkeypatch.setattr("gzcli.engine.prepared.write_maps", lambda *args, **how: pytest.fail("encoded again"))
    trainer(recipe(FM, steps=3, sets=(f"data.latent={tokenizer.path}", "seed=3")))


def test_a_vae_gives_a_picture_of_one_pixel():
    run = trained(VAE, 20)
    t = trainer(recipe(FM, steps=2, sets=(f"data.latent={run.id}",)))
    assert t.info.shape == (8, 1, 1)
    t.fit()
    assert sampler.draw(load_trained(t.run, "cpu"), 3).shape == (3, 1, 16, 16)


def test_an_autoencoder_kl_is_taken_as_diffusers_means_it(kl):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(f"{kl}/vae")
    pack = open_pack("digits")
    space = new_space(kl, "cpu", pack, 17)
    x = quantise(torch.from_numpy(np.asarray(pack.images("test")[:4])), 17)
    with torch.no_grad():
        mode = vae.encode(x).latent_dist.mode()
        torch.testing.assert_close(space.encode(x), (mode - 0.2) * 0.7)
        torch.testing.assert_close(space.decode(space.encode(x)), vae.decode(mode).sample.clamp(-1, 1))
    t = trainer(recipe(FM, steps=2, sets=(f"data.latent={kl}/vae",)))
    assert t.info.shape == (2, 8, 8)
    modes = torch.from_numpy(np.asarray(t.images.pack.images("train"))).float()
    drawn = trainer(recipe(FM, steps=2, sets=(f"data.latent={kl}/vae", "data.latent_draw=sample")))
    draws = torch.from_numpy(np.asarray(drawn.images.pack.images("train"))).float()
    x = quantise(torch.from_numpy(np.asarray(pack.images("train"))), 17)
    with torch.no_grad():
        std = 0.7 * vae.encode(x).latent_dist.std
    z = (draws - modes) / std  # standard normal, another one for each image
    assert abs(float(z.mean())) < 0.02 and float(z.std()) == pytest.approx(1, abs=0.02)
    assert float((z[0] - z[1]).abs().max()) > 0.1
    # images that are encoded later have the mode
    torch.testing.assert_close(drawn.space.encode(x[:2]), t.space.encode(x[:2]))


def test_what_cannot_be_is_refused(tokenizer, on_latents, tmp_path, kl):
    refused("models grey levels", recipe, Case("pixelcnn"), steps=1, sets=(f"data.latent={tokenizer.id}",))
    for latent, error, message in (
        (on_latents.id, UsageError, "has no image latents"),
        ("./nowhere", MissingError, "does not exist"),
        ("nobody/nothing", MissingError, "GZ_OFFLINE"),
        (str(tmp_path), MissingError, "contains no `AutoencoderKL`"),
    ):
        refused(message, trainer, recipe(FM, steps=1, sets=(f"data.latent={latent}",)), error=error)
    with pytest.raises(UsageError, match="trained on images of 1×16×16"):
        trainer(recipe(FM, steps=1, sets=(f"data.latent={tokenizer.id}", "data.size=8")))
    with pytest.raises(UsageError, match="no distribution"):
        trainer(recipe(FM, steps=1, sets=(f"data.latent={tokenizer.id}", "data.latent_draw=sample")))
    refused("takes 1 channels", trainer, recipe(FM, steps=1, data="patches", sets=(f"data.latent={kl}",)))
