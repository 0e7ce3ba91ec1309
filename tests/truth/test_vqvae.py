"""The codebook against `vector-quantize-pytorch` and the paper; what a tokenizer promises to a prior."""

import math

import pytest
import torch
import torch.nn.functional as F
from draws import images

from gzcli.core.types import Batch, BatchNoise, DataInfo, ImageNoise, no_progress
from gzcli.models.autoregressive.tokenizer import (
    DEAD,
    LAPLACE_EPS,
    Codebook,
    CodebookOptions,
    FiniteScalar,
    draw,
)
from gzcli.models.autoregressive.vqgan import VQGAN
from gzcli.models.autoregressive.vqvae import VQVAE

K, D, SHAPE = 8, 4, (6, 4, 3, 2)


def noise(n: int = 6, step: int = 0) -> BatchNoise:
    return BatchNoise(0, step, "main", total=n)


def vectors(seed: int = 0) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def book(**options) -> Codebook:
    torch.manual_seed(1)
    return Codebook(CodebookOptions(codes=K, dim=D, **options))


def peer(ours: Codebook, **options):
    """Their layer with our codes and, for the averages, our statistics in their counts."""
    sizes = {"dim": D, "codebook_size": K, "decay": 0.9, "commitment_weight": 0.3, "eps": LAPLACE_EPS * 36}
    how = {"accept_image_fmap": True, "threshold_ema_dead_code": 0, "rotation_trick": False}
    theirs = pytest.importorskip("vector_quantize_pytorch").VectorQuantize(**sizes, **how, **options)
    with torch.no_grad():
        theirs._codebook.embed.copy_(ours.embedding[None])
        if ours.options.codebook == "ema":
            theirs._codebook.cluster_size.copy_(36 * ours.usage[None])
            theirs._codebook.embed_avg.copy_(36 * ours.total[None])
    return theirs.train()


@pytest.mark.parametrize("cosine", [False, True])
def test_codes_loss_gradient_and_averages_are_those_of_the_peer(cosine):
    ours = book(beta=0.3, decay=0.9, restart=False, cosine=cosine).train()
    theirs = peer(ours, use_cosine_sim=cosine)
    for step in range(3):
        z, w = vectors(step).requires_grad_(), vectors(step).requires_grad_()
        codes = ours.nearest(z)[1]
        q, figures = ours(z, noise())
        peer_q, peer_codes, peer_loss = theirs(w)
        assert torch.equal(codes, peer_codes)
        torch.testing.assert_close(q, peer_q)
        torch.testing.assert_close(ours.embedding, theirs._codebook.embed[0], rtol=1e-5, atol=1e-6)
        if not cosine:  # theirs is committed to codes before the vector is put onto the sphere
            torch.testing.assert_close(figures["loss"], peer_loss.squeeze())
            (q.sum() + figures["loss"]).backward()
            (peer_q.sum() + peer_loss.sum()).backward()
            torch.testing.assert_close(z.grad, w.grad)


def test_a_learned_codebook_has_the_loss_of_equation_3():
    ours, z = book(codebook="gradient", beta=0.3, restart=False).train(), vectors().requires_grad_()
    q, figures = ours(z, noise())
    e = ours.lookup(ours.nearest(z)[1]).detach()
    torch.testing.assert_close(figures["loss"], 1.3 * F.mse_loss(z, e))
    to_z, to_e = torch.autograd.grad(figures["loss"], [z, ours.embedding], retain_graph=True)
    torch.testing.assert_close(to_z, 0.3 * 2 * (z - e) / z.numel())  # beta holds the encoder, not the codes
    taken = F.one_hot(ours.nearest(z)[1].flatten(), K).float()
    pull = 2 * taken.T @ (e - z.detach()).movedim(1, -1).flatten(0, 2) / z.numel()
    torch.testing.assert_close(to_e, pull)
    assert torch.equal(torch.autograd.grad(q.sum(), z)[0], torch.ones_like(z))  # straight through


def test_codes_are_the_nearest_by_brute_force_also_under_autocast():
    ours, z = book(), vectors()
    flat = z.movedim(1, -1)
    brute = (flat[..., None, :] - ours.embedding).square().sum(-1).argmin(-1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours.nearest(z)[1], brute)
    round_ = book(codebook="gradient", cosine=True)
    round_.embedding.data *= torch.arange(1, K + 1)[:, None]  # a step of its optimizer leaves the sphere
    angle = F.cosine_similarity(flat[..., None, :], round_.embedding, dim=-1)
    assert torch.equal(round_.nearest(z)[1], angle.argmax(-1))
    torch.testing.assert_close(round_.nearest(z)[2].norm(dim=1), torch.ones(6, 3, 2))
    one = (z - ours.lookup(brute)).square().sum(1)
    assert all((one <= (z - ours.embedding[k][:, None, None]).square().sum(1) + 1e-6).all() for k in range(K))


def test_dead_codes_move_into_the_batch_and_living_ones_stay():
    ours, z = book().train(), vectors()
    ours.usage[:3] = 0.5 * DEAD / K
    ours.embedding[:3] = ours.total[:3] = 100.0
    before = ours.embedding.clone()
    _, figures = ours(z, noise())
    assert figures["dead"] == 0
    everything = z.movedim(1, -1).flatten(0, 2)
    nearest = (ours.embedding[:, None] - everything).norm(dim=2).min(1).values
    assert (nearest[:3] < 1e-5).all() and (before[3:] - ours.embedding[3:]).abs().max() < 0.2
    assert len(ours.embedding[:3].unique(dim=0)) == 3, "each got its own vector"
    again = book().train()
    again.usage[:3], again.embedding[:3], again.total[:3] = 0.5 * DEAD / K, 100.0, 100.0
    again(z, noise(step=1))
    assert not torch.equal(again.embedding[:3], ours.embedding[:3]), "the batch's noise says which"
    still = book(restart=False).train()
    still.usage[:3], still.embedding[:3] = 0.5 * DEAD / K, 100.0
    assert still(z, noise())[1]["dead"] == pytest.approx(3 / K)


def test_the_start_is_once_and_evaluation_changes_nothing():
    ours, z = book(), vectors()
    ours.init_codes(z, noise())
    started = ours.embedding.clone()
    everything = z.movedim(1, -1).flatten(0, 2)
    assert all((everything == vector).all(1).any() for vector in started)
    assert len(started.unique(dim=0)) == K
    ours.init_codes(vectors(1), noise())
    assert torch.equal(ours.embedding, started)
    ours = book().eval()
    before = {name: t.clone() for name, t in ours.state_dict().items()}
    first, second = ours(vectors(), noise()), ours(vectors(), noise())
    assert torch.equal(first[0], second[0]) and first[1]["loss"] == second[1]["loss"]
    assert all(torch.equal(t, before[name]) for name, t in ours.state_dict().items())


def test_perplexity_and_draws_of_codes():
    ours = book().eval()
    ours.embedding[:] = 10 * torch.arange(K)[:, None]
    z = 10.0 * torch.tensor([0, 0, 0, 0, 3, 3, 5, 7]).view(8, 1, 1, 1).expand(-1, D, -1, -1)
    entropy = -(0.5 * math.log(0.5) + 0.25 * math.log(0.25) + 2 * 0.125 * math.log(0.125))
    assert ours(z, noise(8))[1]["perplexity"].item() == pytest.approx(math.exp(entropy), rel=1e-5)
    weights = torch.tensor([0.0, 2.0, 0.0, 1.0, 1.0, 0.0])
    u = torch.tensor([0.0, 0.25, 0.499, 0.5, 0.74, 0.75, 0.9999999, 1 - 2**-24])
    assert draw(weights.expand(8, -1), u).tolist() == [1, 1, 1, 3, 3, 4, 4, 4]
    n = 40_000
    frequencies = draw(weights.expand(n, -1), noise(n).rand(n)).bincount(minlength=6) / n
    p = weights / weights.sum()
    assert ((frequencies - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()


def test_levels_in_place_of_a_codebook():
    """All codes by enumeration, evenly used on even input, with the gradient of tanh; nothing to train."""
    levels = (8, 5, 2)
    fsq = FiniteScalar(CodebookOptions(levels=levels)).double().train()
    every = torch.cartesian_prod(*(((2 * torch.arange(n) + 1) / n - 1).double() for n in levels))  # [80, 3]
    codes = fsq.index(every.T[None])[0]
    assert codes.sort().values.tolist() == list(range(80)) and not list(fsq.parameters())
    assert torch.equal(fsq.lookup(codes[None])[0].T, every.to(fsq.embedding))
    assert codes[:4].tolist() == [0, 40, 8, 48]  # the first number counts fastest
    even = torch.rand(1, 3, 400, 100, dtype=torch.float64) * 2 - 1
    assert fsq.index(even).flatten().bincount(minlength=80).min() > 0.8 * 500
    z = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    out, logged = fsq.eval()(z, noise(4))
    upstream = torch.randn_like(out)
    (gradient,) = torch.autograd.grad((out * upstream).sum() + logged["loss"], z)
    torch.testing.assert_close(gradient, upstream * (1 - z.tanh() ** 2))
    torch.testing.assert_close(out, fsq.lookup(fsq.nearest(z)[1]).to(out))
    assert ((out - z.tanh()).abs().amax((0, 2, 3)) <= 1 / torch.tensor(levels) + 1e-9).all()
    assert logged["loss"] == 0 and logged["perplexity"] > 20
    assert (fsq.index(torch.tensor([1.0, -1.0]).expand(1, 3, 2)) == torch.tensor([79, 0])).all()
    for _ in range(150):  # an encoder whose vectors are alike
        fsq.train()(z.detach() * 0.01 + 7, noise(4))
    assert fsq(z.detach() * 0.01 + 7, noise(4))[1]["perplexity"] > 20
    net = model(levels=levels)
    assert net.codes == 80 and net.encoder.body[-1].out_channels == 3


def model(shape=(1, 16, 16), **options) -> VQVAE:
    torch.manual_seed(0)
    small = {"hidden": 8, "residual": 4, "blocks": 1, "codes": 16, "dim": 4}
    return VQVAE.of(DataInfo(shape, 256), **{**small, **options})


def test_the_net_has_the_layers_of_the_paper_and_a_grid_that_follows_from_the_sides():
    """Section 4.1: two strided convolutions, two residual blocks of 256, their mirror."""
    net = VQVAE.of(DataInfo((3, 32, 32), 256), hidden=256, residual=256, blocks=2, codes=512, dim=10)
    residual = 2 * (256 * 256 * 10 + 2 * 256)
    encoder = (3 + 256) * 256 * 16 + 2 * 256 + 256 * 256 * 9 + 256 + residual + 256 * 10 + 10
    decoder = 10 * 256 * 9 + 256 + residual + (256 + 3) * 256 * 16 + 256 + 3
    assert sum(p.numel() for p in net.parameters()) == encoder + decoder
    assert net.codebook.embedding.shape == (512, 10)
    for shape, (grid, widths) in GRIDS.items():
        with torch.device("meta"):
            vae = model(shape)
            gan = VQGAN.of(DataInfo(shape, 256), channels=8, codes=4, dim=4, disc_width=4)
            for net in (vae, gan):
                assert net.grid == grid
                assert net.decoder(net.encoder(torch.empty(2, *shape))).shape == (2, *shape)
        assert tuple(level[0].conv2.out_channels for level in gan.encoder.levels) == widths


def test_the_loss_and_samples_of_the_model():
    net, x = model(beta=0.5).eval(), images(4)
    batch = Batch(x, None, torch.arange(4), noise(4))
    net.on_start(batch)
    parts = net.loss(batch)
    z, codes, e = net.codebook.nearest(net.encoder(x))
    recon, commit = F.mse_loss(net.decoder(e), x), F.mse_loss(z, e)
    torch.testing.assert_close(parts["loss"], recon + 0.5 * commit)
    torch.testing.assert_close(parts["recon"], recon)
    again = net.reconstruct(x, noise=ImageNoise(0, range(4)), progress=no_progress).images
    torch.testing.assert_close(again, net.decode(codes))
    torch.testing.assert_close(net.score_recon(x, noise=noise(4)), (x - again).square().flatten(1).sum(1))
    torch.testing.assert_close(net.score_code(x, noise=noise(4)), (z - e).square().flatten(1).sum(1))
    net = model().eval()
    net.codebook.usage.zero_()
    net.codebook.usage[3] = 1.0
    x = net.sample(2, noise=ImageNoise(0, range(2)), progress=no_progress)
    assert torch.equal(x, net.decode(torch.full((2, 4, 4), 3)))


GRIDS = {  # of a shape the codes, and the widths of VQGAN's levels
    (1, 16, 16): ((4, 4), (8, 16, 32)),
    (1, 28, 28): ((7, 7), (8, 16, 32)),
    (3, 32, 48): ((8, 12), (8, 16, 32)),
    (3, 64, 64): ((16, 16), (8, 16, 32)),
    (3, 128, 96): ((16, 12), (8, 16, 16, 32)),
    (3, 256, 256): ((16, 16), (8, 8, 16, 16, 32)),  # the net of VQGAN's paper
    (3, 512, 256): ((16, 8), (8, 8, 8, 16, 16, 32)),
}
