"""VQGAN's two losses by hand, the adaptive weight, LPIPS and PatchGAN against their originals' arithmetic."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from draws import batch, images, only
from helpers import fit, recipe
from refused import refused
from zoo import FIRST

from gzcli.core.errors import MissingError
from gzcli.core.types import DataInfo
from gzcli.models.autoregressive.vqgan import VQGAN, adaptive_weight
from gzcli.models.nn import perceptual as module
from gzcli.models.nn.adversarial import PatchGAN
from gzcli.models.nn.perceptual import FEATURE_WIDTHS, LPIPS, linear_file
from gzcli.store.hub import VGG
from gzcli.store.paths import cache_dir

SMALL = {"channels": 8, "mult": (1, 2), "groups": 4, "codes": 16, "dim": 4, "disc_width": 4}
SMALL |= {"perceptual": "none"}


def build(shape=(1, 16, 16), **options) -> VQGAN:
    torch.manual_seed(0)
    return VQGAN.of(DataInfo(shape, 256), **{**SMALL, **options}).train()


def test_the_adaptive_weight_makes_the_gradients_of_the_last_layer_equal():
    last, h = torch.nn.Linear(5, 3), torch.randn(5)
    rec, gan = 10 * last(h).square().sum(), 0.01 * last(h).sin().sum()
    weight = adaptive_weight(rec, gan, last)
    g_rec, g_gan = (torch.autograd.grad(s, last.weight, retain_graph=True)[0].norm() for s in (rec, gan))
    assert weight.item() == pytest.approx(float(g_rec / (g_gan + 1e-4)), rel=1e-6)
    assert not weight.requires_grad
    assert adaptive_weight(rec, 0 * gan, last) == 1e4  # clamped


def test_the_generator_loss_is_its_parts():
    model, x = build(disc_weight=0.5, beta=0.4, disc_start=3), images(4)
    only(model, "generator")
    z, _, e = model.codebook.nearest(model.encoder(x))
    fake = model.decoder(z + (e - z).detach())
    rec, commit = F.l1_loss(fake, x), 0.4 * F.mse_loss(z, e)
    early = model.loss(batch(x))
    torch.testing.assert_close(early["loss"], rec + commit)
    assert "gan" not in early, "the discriminator knows nothing yet"
    assert [step for step in range(6) if model.phases()[1].due(step)] == [3, 4, 5]
    model.on_step(2)
    model.codebook.options = replace(model.codebook.options, decay=1.0)  # codes stay between the calls
    z, _, e = model.codebook.nearest(model.encoder(x))
    fake = model.decoder(z + (e - z).detach())
    rec, gan = F.l1_loss(fake, x), -model.discriminator(fake).mean()
    weight = 0.5 * adaptive_weight(rec, gan, model.decoder.conv_out)
    parts = model.loss(batch(x))
    torch.testing.assert_close(parts["loss"], rec + 0.4 * F.mse_loss(z, e) + weight * gan)
    torch.testing.assert_close(parts["gan_weight"], weight)
    parts["loss"].backward()
    assert all(p.grad is None for p in model.discriminator.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.phases()[0].parameters())
    with torch.no_grad():
        plain = model.eval().loss(batch(x))
    assert "gan" not in plain, "validation needs no gradient"


def test_the_discriminator_has_the_hinge_loss_and_leaves_the_rest_alone():
    model, x = build(), images(4)
    before = {key: t.clone() for key, t in model.codebook.state_dict().items()}
    only(model, "discriminator")
    parts = model.loss(batch(x), "discriminator")
    with torch.no_grad():
        fake = model.decoder(model.codebook.nearest(model.encoder(x))[2])
        hinge = F.relu(1 - model.discriminator(x)).mean() + F.relu(1 + model.discriminator(fake)).mean()
    torch.testing.assert_close(parts["loss"], 0.5 * hinge)
    parts["loss"].backward()
    assert all(p.grad is None for p in model.phases()[0].parameters())
    assert all(p.grad is not None for p in model.discriminator.parameters())
    after = model.codebook.state_dict().items()
    assert all(torch.equal(t, before[key]) for key, t in after), "codes move once a step"


def test_r1_and_lecam_of_the_discriminator():
    model, x = build(r1=0.7, lecam=0.2), images(4)
    model.discriminator = torch.nn.Conv2d(1, 1, 8, stride=8)  # four patches, each of slope w
    model.lecam.averages = torch.tensor([0.3, -0.2])
    with torch.no_grad():
        fake = model.decoder(model.codebook.nearest(model.encoder(x))[2])
        on_real, on_fake = model.discriminator(x), model.discriminator(fake)
    a_real, a_fake = 0.3 * 0.99 + on_real.mean() * 0.01, -0.2 * 0.99 + on_fake.mean() * 0.01
    loss = 0.5 * (F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean())
    loss = loss + 0.2 * ((on_real - a_fake).square().mean() + (on_fake - a_real).square().mean())
    r1 = 4 * model.discriminator.weight.square().sum() / 2
    parts = model.loss(batch(x), "discriminator")
    torch.testing.assert_close(parts["r1"], r1.detach())
    torch.testing.assert_close(parts["loss"], loss + 0.7 * r1)


def test_sizes_of_the_papers_and_their_patches():
    """Encoder and decoder as taming-transformers builds them for faces: 29.3 M and 42.4 M parameters."""
    with torch.device("meta"):
        sizes = {"channels": 128, "mult": (1, 1, 2, 2, 4), "blocks": 2, "groups": 32, "codes": 1024}
        more = {"dim": 256, "disc_layers": 3, "perceptual": "none"}
        model = VQGAN.of(DataInfo((3, 256, 256), 256), **sizes, **more)
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert model.grid == (16, 16)
    assert count(model.encoder) == pytest.approx(29.3e6, rel=0.01)
    assert count(model.decoder) == pytest.approx(42.4e6, rel=0.01)
    assert count(model.discriminator) == pytest.approx(2.8e6, rel=0.02)
    net = PatchGAN((3, 96, 96), width=4, layers=3, norm="none")
    x = images(1, (3, 96, 96)).requires_grad_()
    logits = net(x)
    assert logits.shape == (1, 1, 10, 10)
    (gradient,) = torch.autograd.grad(logits[0, 0, 5, 5], x)
    rows = (gradient[0].abs().sum((0, 2)) > 0).nonzero()
    assert rows.max() - rows.min() + 1 == 70
    refused("too small", PatchGAN, (1, 16, 16), 8, 3, "none")


def random_weights() -> tuple[dict, dict]:
    """State dicts as torchvision's VGG16 and the authors' linear layers have them."""
    torch.manual_seed(0)
    net = LPIPS().layers
    for p in net.parameters():
        p.data.mul_(1.7)
    vgg = {f"features.{key}": value for key, value in net.state_dict().items()}
    vgg["classifier.0.weight"] = torch.zeros(1)
    return vgg, {
        f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate(FEATURE_WIDTHS)
    }


def ours(vgg: dict, linear: dict) -> LPIPS:
    model = LPIPS()
    model.load(vgg, linear)
    return model.eval()


def test_lpips_is_the_authors_on_the_same_weights():
    package = pytest.importorskip("lpips")
    vgg, linear = random_weights()
    theirs = package.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False).eval()
    for i in range(5):
        part = getattr(theirs.net, f"slice{i + 1}")
        part.load_state_dict({key: vgg[f"features.{key}"] for key in part.state_dict()})
        getattr(theirs, f"lin{i}").load_state_dict({"model.1.weight": linear[f"lin{i}.model.1.weight"]})
    x, y = images(2, (3, 32, 32)), images(2, (3, 32, 32), seed=1)
    with torch.no_grad():
        mine, grey = ours(vgg, linear), x[:, :1]
        distances = mine(x, y)
        torch.testing.assert_close(distances, theirs(x, y).flatten())
        assert distances.min() > 1e-3
        torch.testing.assert_close(mine(grey, y), mine(grey.expand(-1, 3, -1, -1), y))
    pytest.importorskip("lpips")
    state = torch.load(linear_file(), map_location="cpu", weights_only=True)
    model = ours(random_weights()[0], state)
    for i, (p, width) in enumerate(zip(model.linear, FEATURE_WIDTHS, strict=True)):
        assert torch.equal(p, state[f"lin{i}.model.1.weight"].flatten()) and p.shape == (width,)
        assert p.min() >= 0 and p.max() > 0  # the authors keep them from below zero


def test_lpips_comes_from_the_cache_and_is_missed_aloud(home, monkeypatch):
    x = images(2, (3, 32, 32))
    missing = build((3, 32, 32), perceptual="lpips")
    refused(VGG, missing.on_start, batch(x), error=MissingError)
    silent = build((3, 32, 32), perceptual="auto")
    silent.on_start(batch(x))
    assert silent.lpips is None and VGG in silent.warnings[0]
    assert "lpips" not in silent.loss(batch(x))
    folder = cache_dir("weights")
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(random_weights()[0], folder / VGG)
    model = build((3, 32, 32), perceptual="auto", perceptual_weight=2.0, disc_start=9)
    model.on_start(batch(x))
    assert not model.warnings and not any("lpips" in key for key in model.state_dict())
    parts = model.eval().loss(batch(x))
    z, _, e = model.codebook.nearest(model.encoder(x))
    distance = model.lpips(model.decoder(e), x).mean()
    torch.testing.assert_close(parts["lpips"], distance)
    want = F.l1_loss(model.decoder(e), x) + 2 * distance + 0.25 * F.mse_loss(z, e)
    torch.testing.assert_close(parts["loss"], want)
    torch.save({"something": torch.zeros(1)}, folder / VGG)
    refused("LPIPS", module.LPIPS.from_files)
    (folder / VGG).unlink()
    tree = recipe(FIRST["vqgan"], steps=1)
    tree["model"]["perceptual"] = "auto"
    text = (fit(tree).run.path / "log.txt").read_text()
    assert f"warning: no perceptual loss: perceptual distances (LPIPS) need the weights `{VGG}`" in text
    assert f"copy torchvision's `{VGG}` into" in text
