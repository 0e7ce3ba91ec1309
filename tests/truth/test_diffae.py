"""Diffusion autoencoder: codes and their inversion, the classifier, editing, the prior of the codes."""

import math

import pytest
import torch
from draws import fitted, flat, noise
from refused import refused
from torch import nn
from torch.nn import functional as F

from gzcli.core.types import Batch, BatchNoise, DataInfo
from gzcli.models.denoising import samplers
from gzcli.models.denoising.process import DiscreteVP
from gzcli.models.diffusion.diffae import CodedUNet, DiffAE, SemanticEncoder
from gzcli.models.diffusion.latent_prior import LatentPrior
from gzcli.models.nn.unet import Levels, UNet, UNetOptions

INFO = DataInfo((1, 8, 8), levels=17, classes=("across", "down"), n=100)
STEPS, LR = 160, 4e-3
SMALL = {"latent": 4, "channels": 8, "mult": (1, 2), "encoder_mult": (1, 2), "attention": (4,)}


def build(info=INFO, seed=0, **kw) -> DiffAE:
    """A small untrained model off its zero start."""
    torch.manual_seed(seed)
    model = DiffAE.of(info, **SMALL | kw).eval()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


def bars(n: int, seed: int = 0) -> Batch:
    """A bright bar on black at one of three places, across (class 0) or down (class 1), a little noisy."""
    g = torch.Generator().manual_seed(seed)
    y, at = torch.arange(n) % 2, 1 + 2 * torch.randint(3, (n,), generator=g)
    x = torch.full((n, 1, 8, 8), -0.8)
    x[torch.arange(n), 0, at] = 0.8
    x = torch.where((y == 1)[:, None, None, None], x.mT, x) + 0.1 * torch.randn(x.shape, generator=g)
    return Batch(x.clamp(-1, 1), y, torch.arange(n), BatchNoise(seed, 0, "main", total=n))


def is_down(x: torch.Tensor) -> torch.Tensor:
    """The class of bars: whether the brightest column is brighter than the brightest row."""
    return (x.mean(2).amax((1, 2)) > x.mean(3).amax((1, 2))).long()


@pytest.fixture(scope="module")
def trained() -> DiffAE:
    """A model that knows bars."""
    torch.manual_seed(0)
    model = DiffAE.of(INFO, latent=8, channels=16, mult=(1, 2), encoder_mult=(1, 2), attention=()).train()
    phases = zip(model.phases(), (LR, 2e-2), strict=True)
    main, classifier = (torch.optim.Adam(p.parameters(), lr=lr) for p, lr in phases)
    for step in range(STEPS):
        main.param_groups[0]["lr"] = LR * (1 - step / STEPS)
        batch = bars(16, step)
        for optimizer, phase in ((main, "main"), (classifier, "classifier")):
            model.loss(batch, phase)["loss"].backward()
            optimizer.step()
            model.zero_grad(set_to_none=True)
    return model.eval()


def test_the_inverse_of_ddim():
    """The flow of N(m, s²) keeps (x_t − α m) / √(α² s² + σ²), so x_T is known; errors are of first order."""
    schedule, m, s = DiscreteVP("cosine", 1000), 0.3, 0.5

    def denoise(x, t):
        _, a, b = schedule.level(t)
        x0 = m + a * s**2 / (a**2 * s**2 + b**2) * (x - a * m)
        return samplers.Estimate(x0, (x - a * x0) / b)

    x = m + s * torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors, back = [], []
    for steps in (25, 50, 100):
        path = schedule.path(steps)
        _, a, b = path[0]
        x_T = samplers.ddim_inverse(denoise, x, path)
        errors.append(float((x_T - (a * m + math.sqrt(a**2 * s**2 + b**2) * (x - m) / s)).abs().mean()))
        back.append(float((samplers.ddim(denoise, x_T, path) - x).abs().mean()))
    for error in (errors, back):
        assert error[0] < 0.1
        assert 1.7 < error[0] / error[1] < 2.3 and 1.7 < error[1] / error[2] < 2.3
    # where ε does not depend on x it is the same at both ends of a step, and nothing is lost
    schedule, eps = DiscreteVP("linear", 1000), torch.randn(3, 1, 4, 4, dtype=torch.float64)

    def denoise(x, t):
        _, a, b = schedule.level(t)
        return samplers.Estimate((x - b * eps) / a, eps)

    path, x_T = schedule.path(7), torch.randn(3, 1, 4, 4, dtype=torch.float64)
    x = samplers.ddim(denoise, x_T, path)
    # the clean image is taken for one of least noise, which only here, where ε is not a guess, is an error
    first = path[-2]._replace(t=0.0, alpha=schedule.alpha[0], sigma=schedule.sigma[0])
    x = first.alpha * x + first.sigma * eps
    back = samplers.ddim_inverse(denoise, x, [*path[:-1], first])
    torch.testing.assert_close(back, x_T, atol=1e-9, rtol=1e-9)


@pytest.mark.slow
def test_reconstruction_of_held_out_images(trained):
    x, draws = bars(6, 999).x, torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    z = trained.mean + 0.5 * trained.std * draws
    back = lambda steps: trained.decode(z, trained.invert(x, z, steps), steps)  # noqa: E731
    with torch.no_grad():
        errors = [float((back(steps) - x).abs().mean()) for steps in (10, 30, 90)]
    assert errors[1] < 0.5 * errors[0] and errors[2] < 0.5 * errors[1], errors
    # the semantic code alone keeps the class; the inversion of so small a net may end on another bar
    batch = bars(32, 999)
    both, alone = (trained.reconstruct(batch.x, noise=noise(32), stochastic=s).images for s in (True, False))
    of_both, of_code = ((0.5 * (batch.x - back)).square().flatten(1).mean(1) for back in (both, alone))
    assert of_both.median() < 0.001 and of_both.mean() < 0.25 * of_code.mean(), (of_both, of_code)
    assert (is_down(alone) == batch.y).float().mean() > 0.9 and not torch.equal(alone, both)
    figures = trained.measure([bars(16, 998), bars(16, 999)])
    assert figures["mse"] < 0.25 * figures["mse_semantic"] and figures["accuracy"] > 0.9
    assert set(build(DataInfo((1, 8, 8))).measure([bars(2)])) == {"mse", "mse_semantic"}
    seen, how = [], {"steps": 4, "progress": lambda i, n, x=None: seen.append((i, n))}
    build().reconstruct(batch.x[:2], noise=noise(2), **how)
    assert seen == [(i, 8) for i in range(1, 9)], "there and back"


def test_the_unet_without_a_code_s_effect_is_the_plain_one_and_blocks_are_modulated_by_both():
    """By time, then by code: z_s (t_s GroupNorm(h) + t_b), Preechakul 2022, eq. 7."""
    levels = Levels((8, 16), (False, True), layers=1)
    plain, coded = UNet(1, 1, levels, scale_shift=True), CodedUNet(1, 1, levels, latent=3)
    for p in plain.parameters():
        p.data += 0.1 * torch.randn_like(p)
    state = {key.replace(".emb.", ".emb.time."): value for key, value in plain.state_dict().items()}
    missing, unexpected = coded.load_state_dict(state, strict=False)
    assert not unexpected and all(".emb.code." in key for key in missing)
    x, t, z = torch.randn(4, 1, 8, 8), torch.tensor([0, 3, 500, 999]), torch.randn(4, 3)
    assert not torch.allclose(coded(x, t, z), plain(x, t), atol=1e-3)
    for name, p in coded.named_parameters():
        if ".emb.code." in name:
            nn.init.zeros_(p)
    torch.testing.assert_close(coded(x, t, z), plain(x, t))
    block = CodedUNet(1, 1, Levels((8,), (False,), layers=1), latent=3).mid.blocks[0]
    nn.init.normal_(block.conv2.weight, std=0.1)
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 32 + 3)
    scale, shift = block.emb.time(emb[:, :32])[..., None, None].chunk(2, 1)
    h = block.norm2(block.conv1(F.silu(block.norm1(x))))
    h = (1 + block.emb.code(emb[:, 32:]))[..., None, None] * ((1 + scale) * h + shift)
    torch.testing.assert_close(block(x, emb), x + block.conv2(F.silu(h)))


def test_the_encoder_follows_from_the_size():
    """One more than the U-Net has: those of the paper's nets for 64 and 128 pixels."""
    with torch.device("meta"):
        for side, patch, levels in ((28, 1, 4), (64, 1, 5), (64, 2, 4)):
            model = DiffAE.of(DataInfo((3, side, side)), latent=4, channels=8, patch=patch)
            widths = [stage.blocks[-1].conv2.out_channels for stage in model.encoder.down]
            assert widths == [8, 16, 32, 64, 64][:levels]
    for shape in ((1, 16, 16), (3, 28, 28), (1, 9, 7)):
        torch.manual_seed(0)
        encoder = SemanticEncoder(
            DataInfo(shape), 5, UNetOptions(channels=8, mult=(1, 2, 2), attention=(7, 8))
        )
        for p in encoder.parameters():
            p.data += 0.05 * torch.randn_like(p)
        z = encoder(torch.randn(4, *shape))
        assert z.shape == (4, 5)
        z.square().sum().backward()
        assert all(p.grad.isfinite().all() and p.grad.any() for p in encoder.parameters()), shape


def test_each_phase_teaches_its_own():
    model, batch = build().train(), bars(8)
    model.loss(batch)["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in model.encoder.parameters())
    assert all(p.grad is None for p in model.head.parameters())
    model.zero_grad(set_to_none=True)
    model.loss(batch, "classifier")["loss"].backward()
    taught = {name for name, p in model.named_parameters() if p.grad is not None}
    assert taught == {"head.weight", "head.bias"}
    unlabelled = build(DataInfo((1, 8, 8)))
    assert [p.name for p in unlabelled.phases()] == ["main"] and unlabelled.head is None
    refused("labels", unlabelled.edit, batch.x, labels=batch.y, noise=noise(8))


def test_moments_are_those_of_the_codes_and_of_samples(monkeypatch):
    """From the first batch on, and in training alone."""
    model, batch, g = build(), bars(16), torch.Generator().manual_seed(0)
    model.loss(batch)
    assert not model.batches and not model.mean.any()
    model.train().loss(batch)
    z = model.encode(batch.x)
    torch.testing.assert_close(model.mean, z.mean(0))
    torch.testing.assert_close(model.cov, z.mT.cov(correction=0))
    model, root = build(), torch.randn(4, 4, generator=g)
    for _ in range(200):
        model.keep_moments(torch.randn(256, 4, generator=g) @ root + 2)
    torch.testing.assert_close(model.mean, torch.full((4,), 2.0), atol=0.1, rtol=0)
    torch.testing.assert_close(model.cov, root.mT @ root, atol=0.3, rtol=0.05)
    x = torch.randn(64, 4, generator=g)
    torch.testing.assert_close(model.denormalise(model.normalise(x)), x)
    model, n = build(), 4000
    root = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    model.cov.copy_(root.mT @ root), model.mean.fill_(3)
    monkeypatch.setattr(model, "draw", lambda z, *args, **options: z)
    z = flat(model.sample)(n, noise=BatchNoise("z", total=n))
    torch.testing.assert_close(z.mean(0), model.mean, atol=0.15, rtol=0)
    torch.testing.assert_close(z.mT.cov(), model.cov, atol=0.25, rtol=0.05)
    d = model.score_code  # its distance is χ² with 4 degrees of freedom
    monkeypatch.setattr(model, "encode", lambda x: x)
    assert float(d(z, noise=noise(n)).mean()) == pytest.approx(4, rel=0.05)


def correlated(model: DiffAE) -> torch.Tensor:
    """Gives the codes moments of their own, and returns codes drawn so."""
    g = torch.Generator().manual_seed(3)
    root = torch.randn(model.latent, model.latent, generator=g)
    model.cov.copy_(root.mT @ root), model.mean.copy_(torch.randn(model.latent, generator=g))
    return model.mean + torch.randn(50, model.latent, generator=g) @ root


def test_a_step_is_the_likeliest_that_moves_the_logits_so():
    """Of all steps as long in the Gaussian's measure, none moves the asked label's logit further."""
    model = build()
    z, y = correlated(model), torch.arange(50) % 2
    seen = model.head(model.normalise(z)).argmax(1)
    assert 0 < seen.float().mean() < 1
    new, mask = model.move_codes(z, y, 1.5, model.head), seen != y
    assert torch.equal(new[~mask], z[~mask])
    step = new[mask] - z[mask]
    length = (step * torch.linalg.solve(model.cov, step.mT).mT).sum(1).sqrt()
    torch.testing.assert_close(length, torch.full_like(length, 1.5), atol=1e-3, rtol=1e-3)

    def margin(z):
        logits, rows = model.head(model.normalise(z)), torch.arange(len(z))
        return logits[rows, y[mask]] - logits[rows, seen[mask]]

    gain = margin(new[mask]) - margin(z[mask])
    assert (gain > 0).all()
    root = torch.linalg.cholesky(model.cov)
    for seed in range(20):
        sphere = F.normalize(torch.randn(step.shape, generator=torch.Generator().manual_seed(seed)), dim=1)
        assert (margin(z[mask] + 1.5 * sphere @ root.mT) - margin(z[mask]) <= gain + 1e-4).all()

    # several labels at once move where they differ
    model = build(DataInfo((1, 8, 8), 17, ("a", "b", "c"), multilabel=True))
    z = correlated(model)
    logits = model.head(model.normalise(z))
    seen = (logits > 0).long()
    labels = seen.clone()
    labels[:, 1] = 1 - labels[:, 1]
    change = model.head(model.normalise(model.move_codes(z, labels, 1.0, model.head)))[:, 1] - logits[:, 1]
    assert (change.sign() == (2 * labels[:, 1] - 1)).all()
    assert torch.equal(model.move_codes(z, seen, 1.0, model.head), z)


@pytest.mark.slow
def test_edits_ways_between_images_and_scores(trained):
    batch = bars(40, 999)
    assert torch.equal(is_down(batch.x), batch.y)
    assert float(trained.loss(batch, "classifier")["accuracy"]) > 0.9
    for y, least in ((1 - batch.y, 0.59), (batch.y, 0.9)):
        edited = trained.edit(batch.x, labels=y, noise=noise(40), steps=20).images
        assert (is_down(edited) == y).float().mean() > least
    x = bars(5, 999).x
    way = trained.interpolate(x, noise=noise(5), frames=4, steps=20).images
    ends = trained.reconstruct(x[:4], noise=noise(4), steps=20).images
    assert way.shape == (8, 1, 8, 8)
    torch.testing.assert_close(way[[0, 3, 4, 7]], ends, atol=2e-3, rtol=1e-3)
    between = way[[1, 2]] - ends[:1]
    assert between[0].norm() < between[1].norm()
    refused("pairs", trained.interpolate, x[:1], noise=noise(1))
    inside = bars(40, 999).x
    outside = torch.rand(inside.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for name in ("recon", "denoise"):
        a, b = (getattr(trained, f"score_{name}")(x, noise=noise(40)) for x in (inside, outside))
        assert (a[:, None] < b).float().mean() > 0.95, name


def prior_of(model: DiffAE, **kw) -> LatentPrior:
    torch.manual_seed(0)
    return LatentPrior.of(INFO, autoencoder=model, **{"width": 32, "layers": 3} | kw).eval()


def knowing(prior: LatentPrior, s: float) -> LatentPrior:
    """Of the best guess of ε for codes of N(0, s²): σ z_t / (α² s² + σ²)."""
    schedule = prior.diffusion.process
    gain = torch.as_tensor(schedule.sigma / (schedule.alpha**2 * s**2 + schedule.sigma**2)).float()
    prior.diffusion.net.forward = lambda z, t, *_, **__: gain[t.round().long()][:, None, None, None] * z
    return prior


def test_the_prior_s_loss_and_samples_are_those_of_a_gaussian(monkeypatch):
    """Of N(0, 1) the best guess is off by α ε', so that the loss is E α², or E α √(2/π)."""
    n = 20_000
    code = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    for loss_type in ("l2", "l1"):
        prior = knowing(prior_of(build(), loss_type=loss_type), 1.0)
        schedule = prior.diffusion.process
        want = schedule.alpha**2 if loss_type == "l2" else schedule.alpha * math.sqrt(2 / math.pi)
        draws = BatchNoise("loss", total=n)
        batch = Batch(torch.zeros(n, 1), None, torch.arange(n), draws, {"code": code})
        assert float(prior.loss(batch)["loss"]) == pytest.approx(want.mean(), rel=0.02), loss_type
    # codes of N(0, s²), put back where the autoencoder's are
    model, n = build(), 4000
    prior = knowing(prior_of(model), 0.5)
    model.mean.fill_(2), model.cov.copy_(9 * torch.eye(4))
    monkeypatch.setattr(model, "draw", lambda z, *args, **options: z)
    z = flat(prior.sample)(n, noise=BatchNoise("z", total=n), code_steps=100)
    torch.testing.assert_close(z.mean(0), model.mean, atol=0.1, rtol=0)
    torch.testing.assert_close(z.std(0), torch.full((4,), 1.5), atol=0, rtol=0.06)


@pytest.mark.slow
def test_the_prior_learns_the_codes_of_each_class_and_does_what_its_autoencoder_can(trained):
    """Codes sampled by label are what the classifier takes for it, and the images are bars of that class."""
    prior = prior_of(trained, width=64, layers=4, conditional=True).train()
    batch = bars(512)
    code = prior.prepare(batch)["code"]
    torch.testing.assert_close(code, trained.normalise(trained.encode(batch.x)))

    def at(step: int) -> Batch:
        rows = torch.randint(512, (128,), generator=torch.Generator().manual_seed(step))
        draws = BatchNoise(0, step, total=128)
        return Batch(batch.x[rows], batch.y[rows], rows, draws, {"code": code[rows]})

    fitted(prior, at, 600, 3e-3)
    prior.eval()
    y = torch.arange(40) % 2
    assert (is_down(flat(prior.sample)(40, labels=y, noise=noise(40))) == y).float().mean() > 0.8
    assert (is_down(flat(prior.sample)(40, noise=noise(40), guidance=2.0)) == y).float().mean() > 0.8
    outside = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    score = lambda x: sum(prior.score_code(x, noise=noise(40, seed)) for seed in range(4))  # noqa: E731
    a, b = score(bars(40, 999).x), score(outside)  # over four draws, as one may tell them apart by luck
    assert (a[:, None] < b).float().mean() > 0.8
    prior, x = prior_of(trained), bars(4, 999).x
    cases = {"reconstruct": {"stochastic": False}, "interpolate": {"frames": 3}, "edit": {"strength": 2.0}}
    for name, options in cases.items():
        a, b = (getattr(m, name)(x, noise=noise(4), steps=5, **options).images for m in (prior, trained))
        assert torch.equal(a, b), name
    for name in ("recon", "denoise"):
        assert torch.equal(*(getattr(m, f"score_{name}")(x, noise=noise(4)) for m in (prior, trained)))
    assert not any(key.startswith("autoencoder") for key in prior.state_dict())
    unlabelled = DataInfo((1, 8, 8))
    refused("a data set with labels", LatentPrior.of, unlabelled, autoencoder=trained, conditional=True)
