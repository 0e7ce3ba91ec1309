"""Reproducible random numbers: on which device they lie, and what they depend on."""

from __future__ import annotations

import pytest
import torch
from gzcli.core.types import BatchNoise, ImageNoise, Noise

CPU = torch.device("cpu")


def draws(noise: Noise) -> list[torch.Tensor]:
    return [noise.randn(3, 2), noise.rand(3), noise.randint(9, 3, 1), noise.first(3).randn(3)]


@pytest.mark.parametrize("how", [{}, {"device": "cpu"}, {"device": CPU}], ids=["default", "name", "device"])
def test_draws_lie_on_the_cpu(how):
    for noise in (BatchNoise(0, 5, "main", total=7, start=2, **how), ImageNoise(0, range(3), **how)):
        assert noise.device == CPU
        assert [(t.device, t.dtype) for t in draws(noise)] == [
            (CPU, torch.int64 if i == 2 else torch.float32) for i in range(4)
        ]


def test_draws_lie_on_the_device_of_the_batch():
    """Nothing has to be moved after a draw, and the host does not wait for one."""
    import fake_device  # which skips where torch makes no devices in Python

    with fake_device.on_device() as device:
        for noise in (
            BatchNoise(0, 5, "main", total=3, device=fake_device.DEVICE),
            ImageNoise(0, range(3), fake_device.DEVICE),
        ):
            assert noise.device.type == noise.first(2).device.type == fake_device.NAME
            assert {t.device.type for t in draws(noise)} == {fake_device.NAME}
        assert not device.syncs


def test_a_micro_batch_sees_its_rows_of_the_draw_for_the_global_batch():
    whole, part = BatchNoise(1, 2, total=6), BatchNoise(1, 2, total=6, start=2)
    for shape in ((3, 4), (3,)):
        assert torch.equal(whole.randn(6, *shape[1:])[2:5], part.randn(*shape))
    assert not torch.equal(BatchNoise(1, 3, total=6).randn(6), BatchNoise(1, 2, total=6).randn(6))


def test_an_image_has_the_same_noise_alone_and_in_a_batch():
    many, one = ImageNoise(0, [4, 7, 9]), ImageNoise(0, [7])
    for _ in range(2):
        assert torch.equal(many.randn(3, 2, 2)[1:2], one.randn(1, 2, 2))
    assert torch.equal(ImageNoise(0, [4, 7, 9]).first(2).rand(2, 5), ImageNoise(0, [4, 7]).rand(2, 5))
    with pytest.raises(ValueError, match="noise for 3 images, asked for 2"):
        many.randn(2, 4)
