"""Batches: order, ranks, grey levels, binarisation, augmentation, speed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from draws import train_batches
from pictures import augmented

from gzcli.core.errors import UsageError
from gzcli.core.types import BatchNoise, ImageNoise
from gzcli.data.packs.augment import augmenter, parse_augment
from gzcli.data.packs.batches import TrainBatches, quantise, scan, to_uint8
from gzcli.data.packs.open import open_pack
from gzcli.models.nn import from_levels, to_levels


@pytest.fixture(scope="module")
def pack():
    return open_pack("digits")


def batches(pack, **options) -> TrainBatches:
    return train_batches(pack, **{"seed": 3, "batch_size": 32, "levels": 17, "device": "cpu", **options})


def test_a_batch_is_what_the_pack_says(pack):
    batch = batches(pack, levels=256).at(5)
    rows = batch.index.numpy()
    assert batch.x.shape == (32, 1, 16, 16) and batch.x.dtype == torch.float32
    assert batch.y.dtype == torch.int64
    assert (to_uint8(batch.x).numpy() == pack.images("train")[rows]).all()
    assert (batch.y.numpy() == pack.labels("train")[rows]).all()
    assert torch.equal(batch.noise.randn(32, 2), BatchNoise(3, 5, "main", total=32).randn(32, 2))


def test_each_epoch_sees_every_image_once_in_a_new_order(pack):
    n = pack.meta.counts["train"]
    for size in (32, 1000, 3000):
        source = batches(pack, batch_size=size)
        seen = torch.cat([source.at(step).index for step in range(-(-2 * n // size))])
        first, second = seen[:n], seen[n : 2 * n]
        assert torch.equal(first.sort().values, torch.arange(n)) and not torch.equal(first, second)
        assert torch.equal(second.sort().values, torch.arange(n))


def test_order_is_a_function_of_seed_and_step(pack):
    source = batches(pack)
    forward = [source.at(step).index for step in (0, 1, 90, 500)]
    fresh = [batches(pack).at(step).index for step in (500, 90, 1, 0)][::-1]
    assert all(map(torch.equal, forward, fresh))
    assert not torch.equal(forward[0], batches(pack, seed=4).at(0).index)


def test_ranks_together_are_the_single_process(pack):
    everything = ("hflip", "crop", "mutate", "jitter")
    for levels, augment in ((17, ()), (2, ()), (256, everything), (2, ("hflip",))):
        options = {"levels": levels, "augment": augment}
        for world, step in ((2, 0), (2, 40), (4, 40), (4, 41)):  # 40 crosses into the second epoch
            whole = batches(pack, **options).at(step)
            parts = [batches(pack, rank=rank, world=world, **options).at(step) for rank in range(world)]
            for of in ("x", "y", "index"):
                joined = torch.cat([getattr(part, of) for part in parts])
                assert torch.equal(getattr(whole, of), joined), (of, options, world, step)
            draws = torch.cat([part.noise.rand(32 // world, 3) for part in parts])
            assert torch.equal(whole.noise.rand(32, 3), draws)


def test_a_subset_is_fixed_and_mixed_and_ranks_share_a_batch(pack):
    sets = [torch.cat([batches(pack, n=64, seed=seed).at(s).index for s in (0, 1)]) for seed in (0, 1)]
    a, b = (index.sort().values for index in sets)
    assert torch.equal(a, b) and len(a.unique()) == 64 and a.max() > 500
    assert len(batches(pack, n=10**9).at(0)) == 32
    with pytest.raises(UsageError, match="cannot be divided among 3") as e:
        batches(pack, world=3)
    assert "train.batch_size=30" in e.value.hint


def test_quantise(request):
    u8 = torch.arange(256, dtype=torch.uint8)
    for levels in (3, 8, 17, 32, 256):
        x = quantise(u8, levels)
        k = to_levels(x, levels)
        assert k.tolist() == [i * levels // 256 for i in range(256)]
        assert torch.equal(x, from_levels(k, levels))
        assert x.min() == -1 and x.max() == 1 and len(k.unique()) == levels
    assert torch.equal(to_uint8(x), u8)
    assert to_uint8(torch.tensor([-3.0, -1, 0, 1, 3])).tolist() == [0, 0, 128, 255, 255]
    request.getfixturevalue("fp64")  # from here on
    assert quantise(torch.tensor([128], dtype=torch.uint8), 256).item() == 2 * 128 / 255 - 1


def test_binary_images_are_drawn_anew_in_training_and_once_in_a_scan(pack):
    source = batches(pack, levels=2, n=32)
    white, steps = torch.zeros(32, 1, 16, 16), 400
    for step in range(steps):
        batch = source.at(step)
        assert batch.x.abs().eq(1).all()
        white += batch.x[batch.index.argsort()] > 0
    mean = white / steps
    order = source.at(0).index.sort().values.numpy()
    p = torch.from_numpy(pack.images("train")[order] / 255.0)
    error = (mean - p) / (p * (1 - p) / steps).clamp(min=1e-9).sqrt()
    assert (mean[p == 0] == 0).all() and (mean[p == 1] == 1).all()
    inner = error[(p > 0.05) & (p < 0.95)]
    assert inner.abs().max() < 5.5 and 0.9 < inner.std() < 1.1  # standard scores of a binomial mean

    def scanned(**options):
        return torch.cat([batch.x for batch in scan(pack, "test", levels=2, device="cpu", **options)])

    one, two = scanned(batch_size=50), scanned(batch_size=7, seed=9)
    some = scanned(batch_size=3, index=[300, 5, 17])
    assert torch.equal(one, two) and torch.equal(some, one[[300, 5, 17]]) and one.abs().eq(1).all()
    with pytest.raises(ValueError, match="noise"):
        quantise(torch.zeros(1, dtype=torch.uint8), 2)


def test_the_binary_draw_is_not_the_models_own_noise(pack):
    """One stream for both would tie the dequantisation or latent of an image to its pixels."""
    batch = next(scan(pack, "test", batch_size=64, levels=2, device="cpu", seed=0))
    u8 = pack.images("test")[:64].astype(float) / 255
    inner = (u8 > 0.2) & (u8 < 0.8)
    white, noise = batch.x.numpy()[inner] > 0, batch.noise.rand(64, 1, 16, 16).numpy()[inner]
    assert abs(np.corrcoef(white, noise)[0, 1]) < 0.05


def test_scan_is_in_order_with_noise_of_the_image(pack):
    parts = list(scan(pack, "val", batch_size=50, levels=256, device="cpu", seed=2))
    n = pack.meta.counts["val"]
    assert [len(part) for part in parts] == [50, 50, n - 100]
    assert torch.equal(torch.cat([part.index for part in parts]), torch.arange(n))
    assert (to_uint8(torch.cat([part.x for part in parts])).numpy() == pack.images("val")).all()
    assert torch.equal(parts[1].noise.randn(50, 3), ImageNoise(2, range(50, 100)).randn(50, 3))


def test_sets_without_labels_and_with_several_and_with_captions(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    many = np.random.default_rng(1).integers(0, 2, (40, 5))
    np.savez(tmp_path / "none.npz", images=images)
    np.savez(tmp_path / "many.npz", images=images, labels=many)
    assert batches(open_pack(tmp_path / "none.npz")).at(0).y is None
    batch = batches(open_pack(tmp_path / "many.npz")).at(0)
    assert batch.y.shape == (32, 5)
    assert (batch.y.numpy() == open_pack(tmp_path / "many.npz").labels("train")[batch.index]).all()
    captioned = batches(open_pack("digits-captioned")).at(0)
    captions = open_pack("digits-captioned").captions("train")
    assert captioned.extra["caption"] == [captions[row] for row in captioned.index]
    assert captioned.rows(slice(2, 4), captioned.noise).extra["caption"] == captioned.extra["caption"][2:4]


def drawn(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_augmentations_against_numpy():
    u8 = drawn(500, 3, 12, 12)
    noise = BatchNoise(0, total=500)

    flipped = augmented(["hflip"], u8, noise)
    mirrored = (flipped == u8.flip(-1)).flatten(1).all(1)
    assert (mirrored | (flipped == u8).flatten(1).all(1)).all() and 200 < mirrored.sum() < 300

    cropped = augmented(["crop=2"], u8, noise).numpy()
    padded = np.pad(u8.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), mode="reflect")
    hits = np.zeros((500, 5, 5), bool)
    for y, x in np.ndindex(5, 5):
        hits[:, y, x] = (padded[:, :, y : y + 12, x : x + 12] == cropped).all((1, 2, 3))
    assert (hits.sum((1, 2)) == 1).all() and (hits.sum(0) > 5).all()  # each is one crop; every shift occurs

    mutated = augmented(["mutate=0.2"], u8, noise)
    changed = (mutated != u8).float().mean().item()
    assert abs(changed - 0.2 * 255 / 256) < 0.005
    assert np.histogram(mutated[mutated != u8], 16, (0, 256))[0].std() < 150  # uniform, of about 2,600 a bin
    assert augmenter([]) is None


@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_is_that_of_torchvision(channels):
    """Image by image, within rounding of its functions on floats; those on bytes cut off after each stage, up
    to 3 levels."""
    from torchvision.transforms.v2 import functional as tv

    u8 = drawn(60, channels, 12, 10)
    u8[30:] = u8[30:] // 4 + 90  # little contrast: nothing is clamped
    changed = augmented(["jitter=0.5"], u8, BatchNoise(0, total=60))
    factors = 0.5 + BatchNoise(0, total=60).rand(60, 3)
    for image, ours, (brightness, contrast, saturation) in zip(u8, changed, factors.tolist(), strict=True):
        x = tv.adjust_contrast(tv.adjust_brightness(image / 255, brightness), contrast)
        x = tv.adjust_saturation(x, saturation) if channels == 3 else x
        assert (ours - 255 * x).abs().max() < 0.6
    assert changed.dtype == torch.uint8
    assert (changed[30:].float().std((1, 2, 3)) / u8[30:].float().std((1, 2, 3))).std() > 0.2


def test_jitter_of_an_image_does_not_depend_on_its_batch():
    u8 = drawn(64, 3, 33, 31)
    whole = augmented(["jitter"], u8, BatchNoise(0, total=64))
    parts = [augmented(["jitter"], u8[i : i + 4], BatchNoise(0, total=64, start=i)) for i in range(0, 64, 4)]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(augmented(["jitter=0"], u8, BatchNoise(0, total=64)), u8)


def test_bad_augmentations():
    for bad in ("hflp", "jitter=1.5", "crop=1.5", "mutate=2", "mutate=x", "hflip=", "crop=nan"):
        with pytest.raises(UsageError) as e:
            parse_augment([bad])
        assert e.value.hint, bad
    assert parse_augment("mutate") == (("mutate", 0.3),)
