"""Reproducible random numbers: their bits, their distributions, where they lie and what they depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from gzcli.core import philox
from gzcli.core.types import BatchNoise, ImageNoise, Noise

FULL = 2**32 - 1
PI = 0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344
# counter, key and result of `philox4x32 10` in the file kat_vectors of Random123
PUBLISHED = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((FULL,) * 4, (FULL,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (PI, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


def words(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    made = philox.philox(torch.tensor([*counter, 0, 0])[:, None], key)
    return [int(word) for word in made]


def by_hand(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    """Philox 4×32-10 in Python's own integers."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (q >> 32) ^ b ^ k, q & FULL, (p >> 32) ^ d ^ m, p & FULL
        k, m = (k + 0x9E3779B9) & FULL, (m + 0xBB67AE85) & FULL
    return [a, b, c, d]


def test_the_published_vectors():
    for counter, key, result in PUBLISHED:
        assert words(counter, key) == by_hand(counter, key) == list(result)


def test_a_draw_is_of_the_counters_that_its_page_names():
    """Word w of block j of an image's draw makes its number w · b + j; seed and image have 64 bits."""
    seed, image, blocks = 2**62 + 7, 2**40 + 3, 3
    noise = ImageNoise(seed, [5, image])
    noise.randn(2, 1)
    drawn = noise.randint(2**31, 2, 4 * blocks - 2)[1].tolist()
    key = (seed & FULL, seed >> 32)
    made = [by_hand((j, 1, image & FULL, image >> 32), key) for j in range(blocks)]
    assert drawn == [made[j][w] >> 1 for w in range(4) for j in range(blocks)][: len(drawn)]


def test_numbers_do_not_depend_on_the_batch_nor_on_the_parts(monkeypatch):
    index, shape = [4, 9, 0, 2**33], (3, 7, 5)
    whole = [getattr(ImageNoise(3, index), kind)(4, *shape) for kind in ("randn", "rand")]
    torch.set_num_threads(1)
    for memory in (2**20, 27, 10, 1):  # blocks of a part: all, those of an image, fewer than it has, one
        monkeypatch.setattr(philox, "CACHED_BLOCKS", memory)
        for order in ([0, 1, 2, 3], [3, 1], [2]):
            part = [index[i] for i in order]
            for kind, expected in zip(("randn", "rand"), whole, strict=True):
                numbers = getattr(ImageNoise(3, part), kind)(len(part), *shape)
                assert torch.equal(numbers, expected[order])


def test_the_first_images_and_the_rest_share_no_number():
    noise = ImageNoise(0, range(4))
    first = noise.first(2).randn(2, 6)
    assert not torch.isin(noise.randn(4, 6), first).any()
    assert ImageNoise(0, range(0)).randn(0, 3).shape == (0, 3)
    assert ImageNoise(0, range(2)).rand(2).shape == (2,)
    assert ImageNoise(0, range(2)).rand(2, 0, 3).shape == (2, 0, 3)
    assert torch.equal(ImageNoise(1, torch.tensor([3, 8])).rand(2, 5), ImageNoise(1, [3, 8]).rand(2, 5))
    many, one = ImageNoise(0, [4, 7, 9]), ImageNoise(0, [7])
    assert torch.equal(ImageNoise(0, [4, 7, 9]).first(2).rand(2, 5), ImageNoise(0, [4, 7]).rand(2, 5))
    for _ in range(2):  # alone and in a batch, also in a later draw
        assert torch.equal(many.randn(3, 2, 2)[1:2], one.randn(1, 2, 2))
    with pytest.raises(ValueError, match="noise for 3 images, not for 2"):
        many.randn(2, 4)


def test_numbers_have_their_type_and_bits(request):
    u = ImageNoise(0, range(8)).rand(8, 4096)
    assert torch.equal((u * 2**24).frac(), torch.zeros_like(u)) and u.min() >= 0 and u.max() < 1
    single = ImageNoise(0, range(2)).randn(2, 9)
    request.getfixturevalue("fp64")  # from here on
    double = ImageNoise(0, range(2)).randn(2, 9)
    assert double.dtype == torch.float64 and torch.equal(double.float(), single)
    ends = torch.tensor([0, 255, 256, FULL])
    assert all(torch.isfinite(z).all() for z in philox.normal((ends, ends.flip(0), ends, ends)))
    assert max(int(k.max()) for k in philox.below(10)((ends,) * 4)) == 9


def test_distributions():
    """Of each place of a block, over images, calls and seeds; what is unlikely by 1e-4 is a fault."""
    noise = ImageNoise(11, range(64))
    z = noise.randn(64, 1024).numpy()
    u = noise.rand(64, 1024).numpy()
    k = noise.randint(10, 64, 1024).numpy()
    for place in range(4):
        part = slice(256 * place, 256 * (place + 1))
        assert stats.kstest(z[:, part].ravel(), "norm").pvalue > 1e-4
        assert stats.kstest(u[:, part].ravel(), "uniform").pvalue > 1e-4
        assert stats.chisquare(np.bincount(k[:, part].ravel(), minlength=10)).pvalue > 1e-4
    assert stats.kstest((z**2).sum(1), stats.chi2(1024).cdf).pvalue > 1e-4


def test_images_calls_seeds_and_neighbours_are_uncorrelated():
    noises = [ImageNoise(seed, range(32)) for seed in (0, 1, 2**32)]
    rows = torch.cat([noise.randn(32, 4000) for noise in noises for _ in range(2)]).double()  # [192, 4000]
    bound = 5.5 / 4000**0.5  # of 18,336 pairs, one beyond it has a chance of 7e-4
    correlation = torch.corrcoef(rows).fill_diagonal_(0)
    assert correlation.abs().max() < bound
    squares = torch.corrcoef(rows.square()).fill_diagonal_(0)
    assert squares.abs().max() < 7 / 4000**0.5
    z = rows[0:64].flatten()
    for lag in (1, 2, 4, 1000, 2000, 4000):  # the two numbers of Box and Muller are 1,000 apart
        for a, b in ((z[:-lag], z[lag:]), (z[:-lag].square(), z[lag:].square())):
            assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 5 / len(a) ** 0.5


def test_spread_numbers_are_multiples_of_the_golden_ratio():
    index = np.array([0, 1, 2, 999, 10_000])
    u = ImageNoise(5, index.tolist()).spread(5).double().numpy()
    first = ImageNoise(5, [0]).rand(1).double().numpy()
    assert u == pytest.approx((first + index * (5**0.5 - 1) / 2) % 1, abs=1e-5)
    far = ImageNoise(5, [2**40 + 3, 3]).spread(2)
    assert far.min() >= 0 and far.max() < 1
    noise = ImageNoise(5, range(1_000))
    drawn, second = noise.spread(1_000), noise.spread(1_000)
    counts = np.bincount((drawn * 100).int().numpy(), minlength=100)
    assert counts.tolist() == pytest.approx([10] * 100, abs=2)
    turn = np.remainder((second - drawn).double().numpy(), 1)
    assert turn == pytest.approx(turn[0], abs=1e-5) and 1e-3 < turn[0] < 1 - 1e-3, "of another start"


CPU = torch.device("cpu")


def draws(noise: Noise) -> list[torch.Tensor]:
    return [noise.randn(3, 2), noise.rand(3), noise.randint(9, 3, 1), noise.first(3).randn(3)]


def test_draws_lie_on_the_device_of_the_batch():
    """Nothing has to be moved after a draw, and the host does not wait for one."""
    for how in ({}, {"device": "cpu"}, {"device": CPU}):
        for noise in (BatchNoise(0, 5, "main", total=7, start=2, **how), ImageNoise(0, range(3), **how)):
            assert noise.device == CPU and {t.device for t in draws(noise)} == {CPU}
            assert [t.dtype for t in draws(noise)] == [*[torch.float32] * 2, torch.int64, torch.float32]
    import fake_device  # which skips where torch makes no devices in Python

    with fake_device.on_device() as device:
        there = {"device": fake_device.DEVICE}
        for noise in (BatchNoise(0, 5, "main", total=3, **there), ImageNoise(0, range(3), **there)):
            assert noise.device.type == noise.first(2).device.type == fake_device.NAME
            assert {t.device.type for t in draws(noise)} == {fake_device.NAME}
        assert not device.syncs


def test_a_micro_batch_sees_its_rows_of_the_draw_for_the_global_batch():
    whole, part = BatchNoise(1, 2, total=6), BatchNoise(1, 2, total=6, start=2)
    for shape in ((3, 4), (3,)):
        assert torch.equal(whole.randn(6, *shape[1:])[2:5], part.randn(*shape))
    assert not torch.equal(BatchNoise(1, 3, total=6).randn(6), BatchNoise(1, 2, total=6).randn(6))
