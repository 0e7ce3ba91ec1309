"""Drifting: the field against sums over pairs, its sign, where it leads, and the loss."""

import math

import pytest
import torch
from draws import batch, images

from gzcli.core.types import DataInfo
from gzcli.models.gan.drifting import Drifting, field

DIGITS = DataInfo((1, 16, 16), 17, tuple("0123456789"))
SMALL = {"latent": 4, "width": 4, "feature_width": 4, "feature_latent": 8}


def nobody(n: int, m: int) -> torch.Tensor:
    return torch.zeros(n, n + m, dtype=torch.bool)


def test_the_field_is_the_sum_over_all_pairs_of_a_real_and_a_generated_image():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (4, 5))
    apart = torch.cat([torch.zeros(4, 5), torch.eye(4)], 1).bool()
    kernel = [[math.exp(-float((a - b).norm()) / (0.7 * math.sqrt(3))) for b in (*y, *x)] for a in x]
    for i in range(4):
        kernel[i][5 + i] = 0.0
    columns = [sum(kernel[i][j] for i in range(4)) for j in range(9)]
    want = torch.zeros(4, 3, dtype=torch.float64)
    for i in range(4):
        weight = [kernel[i][j] / math.sqrt(sum(kernel[i]) * columns[j]) for j in range(9)]
        for j in range(5):
            for k in range(4):
                want[i] += weight[j] * weight[5 + k] * (y[j] - x[k])
    v = field(x, y, apart, (0.7,))
    torch.testing.assert_close(v, want / want.square().mean().sqrt())
    both = field(x, y, apart, (0.7, 0.1))
    torch.testing.assert_close(both, v + field(x, y, apart, (0.1,)))


def test_the_field_at_a_point_changes_its_sign_where_the_two_sides_change_places():
    """At x alone, of all images, V is towards y; with y and other generated images exchanged it is away."""
    generator = torch.Generator().manual_seed(1)
    x, p, q = (torch.randn(n, 2, generator=generator) for n in (1, 6, 6))

    def at_x(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        points = torch.cat([x, q])
        apart = nobody(7, 6)
        apart[:, 6] = True  # x acts on none
        apart[1:] = True  # and only x is acted on
        return field(points, p, apart, (0.3,))[0]

    torch.testing.assert_close(at_x(p, q), -at_x(q, p))
    torch.testing.assert_close(at_x(p, p), torch.zeros(2), atol=1e-4, rtol=0)


def test_points_drift_to_eight_gaussians():
    generator = torch.Generator().manual_seed(0)
    angles = torch.arange(8) * (math.pi / 4)
    means = torch.stack([angles.cos(), angles.sin()], 1)
    x = 0.05 * torch.randn(256, 2, generator=generator) + means[0]  # all at one of them
    apart = torch.cat([torch.zeros(256, 256), torch.eye(256)], 1).bool()
    for step in range(300):
        y = means[torch.randint(8, (256,), generator=generator)]
        y = y + 0.05 * torch.randn(256, 2, generator=generator)
        x = x + 0.05 * (1 - step / 300) * field(x, y, apart, (0.05, 0.2, 0.5))
    distance, mode = torch.cdist(x, means).min(1)
    share = torch.bincount(mode[distance < 0.25], minlength=8) / 256
    assert share.min() > 0.06 and share.sum() > 0.9, share


def test_the_loss_leads_images_where_the_field_points():
    model, x = Drifting.of(DIGITS, **SMALL), images(6)
    fake = model.generator(batch(x).noise.randn(6, 4)).detach()
    features, real = model.autoencoder.features(fake), model.autoencoder.features(x)
    assert [len(f[0]) for f in features] == [256, 4 * 64, 8 * 16, 8] and torch.equal(
        features[0], fake.flatten(1)
    )
    leaves = [f.detach().requires_grad_() for f in features]
    apart = torch.cat([torch.zeros(6, 6), torch.eye(6)], 1).bool()
    for f, r in zip(leaves, real, strict=True):
        d, mean = f.shape[1], torch.cdist(f, torch.cat([r, f])).mean().detach()
        scale = math.sqrt(d) / mean
        v = field((scale * f).detach(), (scale * r).detach(), apart, (0.02, 0.05, 0.2))
        loss = model.drift_loss(f, r.detach(), apart)
        torch.testing.assert_close(loss, v.square().mean())
        torch.testing.assert_close(torch.autograd.grad(loss, f)[0], -2 * scale * v / v.numel())
    total = sum(model.drift_loss(f, r.detach(), apart) for f, r in zip(features, real, strict=True))
    torch.testing.assert_close(model.loss(batch(x), "generator")["loss"], total)


@pytest.mark.parametrize(
    "labels", [torch.tensor([0, 1, 1, 0]), torch.tensor([[1, 0], [0, 1], [0, 1], [1, 0]])]
)
def test_images_of_another_label_and_the_image_itself_do_not_act(labels):
    model = Drifting.of(DIGITS, **SMALL, conditional=True)
    same = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]]).bool()
    apart = model.apart(4, labels)
    assert torch.equal(apart, torch.cat([~same, ~same | torch.eye(4).bool()], 1))
    x, y = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    v = field(x, y, apart, (0.5,))
    moved = y + 9.0 * torch.tensor([0, 1, 1, 0])[:, None]
    changed = field(x, moved, apart, (0.5,))
    directions = [torch.nn.functional.normalize(f[[0, 3]], dim=1) for f in (v, changed)]
    torch.testing.assert_close(*directions)  # the first label's field has nothing to do with the second's


def test_the_autoencoder_sees_a_part_of_the_squares():
    model, x = Drifting.of(DIGITS, **SMALL, hidden=1.0).autoencoder, images(4)
    blind = model.decoder(model.code(model.maps(torch.zeros_like(x)).flatten(1)))
    torch.testing.assert_close(model(x, batch(x).noise), (blind - x).square().mean())
    model.hidden = 0.0
    seen = model.decoder(model.code(model.maps(x).flatten(1)))
    torch.testing.assert_close(model(x, batch(x).noise), (seen - x).square().mean())
