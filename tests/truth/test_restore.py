"""Images that deepinv's solver restores by gz's denoisers are nearer to the originals than before."""

import pytest
import torch

from gzcli.core.errors import MissingError, install_line
from gzcli.core.types import ImageNoise, no_progress
from gzcli.engine.trained import load_trained
from gzcli.launch.from_file import find_run
from gzcli.models.denoising import applications
from gzcli.models.denoising.applications import RestoreOptions

CPU = torch.device("cpu")
GAINS = {"blur": 3.0, "super": 2.0, "inpaint": 3.0, "jpeg": 0.1}  # dB, at the least


def noise(n):
    return ImageNoise(0, range(n), CPU)


@pytest.mark.parametrize(
    "name", ["sgm", *(pytest.param(n, marks=pytest.mark.slow) for n in ("cddpm", "cfm"))]
)
def test_each_operator_loses_what_the_model_knows(name):
    """Of a discrete process, of an SDE and of a straight path."""
    pytest.importorskip("deepinv")
    model = load_trained(find_run(f"pretrained:{name}-glyphs"), CPU).model
    x = model.sample(2, noise=ImageNoise(7, range(2), CPU), progress=no_progress)
    labels = torch.arange(2) if model.conditional else None
    for operator, gain in GAINS.items():
        options = RestoreOptions(operator=operator, width=1.5, steps=20)
        applied = model.restore(x, labels=labels, noise=noise(2), options=options)
        before, after = applied.figures.values()
        assert after > before + gain, (operator, before, after)
        assert applied.images.shape == applied.condition.shape == x.shape
    one = model.restore(
        x[:1], labels=labels[:1] if model.conditional else None, noise=noise(1), options=options
    )
    torch.testing.assert_close(one.images, applied.images[:1], atol=1e-3, rtol=0)  # alone or in a batch
    options = RestoreOptions(operator="inpaint", degraded=True, steps=5)
    mask = torch.ones(2, 1, *x.shape[2:])
    restored = model.restore(x, mask=mask, labels=labels, noise=noise(2), options=options)
    assert not restored.figures and float((restored.images - x).abs().mean()) < 0.1  # all pixels are seen


def test_without_deepinv_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "deepinv.sampling", None)
    monkeypatch.setitem(__import__("sys").modules, "deepinv.optim.data_fidelity", None)
    with pytest.raises(MissingError, match="needs the package `deepinv`") as e:
        applications.solver_of(RestoreOptions(), CPU)
    assert e.value.hint == install_line("gzcli[restore]")
