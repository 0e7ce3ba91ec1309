"""Runs that an earlier gz trained are sampled and resumed as it would have done.

`old_runs.tar.gz` was made with the code of commit 75c7b40, which kept `space` and `built_on` in the recipe:
an MLP VAE, a VQ-VAE with its prior in stages, and flow matching on latents of the VAE. Each was trained for
20 steps; its checkpoint of step 10 and its last weights are kept. `expected.npz` holds what that code drew
from both, and with which torch on which kind of CPU: there, this test asks for the same images, and for
weights that ten steps on CPUs of two makers may leave apart. The noise of an image was then a generator's of
its own, and samples were in fp32; the test draws so too.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import lines
from safetensors.torch import load_file

from gzcli.engine import sampler
from gzcli.engine.__main__ import main
from gzcli.engine.report import RATES
from gzcli.engine.trained import load_trained
from gzcli.store import runs
from gzcli.store.paths import user_dir
from gzcli.store.runs import Run
from gzcli.types import ImageNoise, mix

NAMES = ("old-vae", "old-vqvae", "old-fm")


def drawn_then(
    noise: ImageNoise, method: str, shape: tuple[int, ...], high: int | None = None
) -> torch.Tensor:
    """What `ImageNoise` drew before it was a function of a counter."""
    seeds = [mix(noise.seed, int(i)) for i in noise.index]
    generators = noise.__dict__.setdefault("generators", [torch.Generator().manual_seed(s) for s in seeds])
    draw = torch.empty(shape, dtype=torch.get_default_dtype() if high is None else torch.int64)
    for row, generator in zip(draw.view(shape[0], -1), generators, strict=False):
        getattr(row, method)(*(() if high is None else (0, high)), generator=generator)
    return draw


@pytest.fixture
def expected(home, monkeypatch) -> Iterator[dict[str, np.ndarray]]:
    """The runs are in the store; what was drawn from them, uint8 [4, 1, 16, 16], by `name/checkpoint`."""
    with tarfile.open(Path(__file__).with_name("old_runs.tar.gz")) as archive:
        archive.extractall(user_dir(), filter="data")
    monkeypatch.setattr(ImageNoise, "_draw", drawn_then)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as then
    yield dict(np.load(user_dir("expected.npz")))
    torch.set_num_threads(threads)


def same_machine(expected: dict[str, np.ndarray]) -> bool:
    return expected["made_by"].tolist() == [torch.__version__, torch.backends.cpu.get_cpu_capability()]


@pytest.mark.parametrize("name", NAMES)
def test_they_are_sampled(name, expected):
    for checkpoint in ("finished", "10"):
        then = expected[f"{name}/{checkpoint}"]
        now = sampler.draw(load_trained(runs.find(name), "cpu", checkpoint, "fp32"), len(then), seed=3)
        if same_machine(expected):
            assert np.array_equal(now, then)
        assert np.abs(now.astype(int) - then).max() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_they_are_resumed(name, expected):
    run = runs.find(name)
    parts = run.stages or [run]
    then = [load_file(part.path / "model.safetensors") for part in parts]
    logged = [figures(part) for part in parts]
    for part in {run, *parts}:
        part.update(state="interrupted")
        (part.path / "model.safetensors").unlink(missing_ok=True)
    assert main(run.path) == 0 and run.state == "finished"
    for part, weights, before in zip(parts, then, logged, strict=True):
        assert "resumed at step 10" in (part.path / "log.txt").read_text()
        now = load_file(part.path / "model.safetensors")
        assert now.keys() == weights.keys()
        for key, value in weights.items():
            torch.testing.assert_close(now[key], value, rtol=1e-2, atol=1e-3)
        assert figures(part) == [pytest.approx(line, rel=1e-4) for line in before]


def figures(run: Run) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, but for what the clock said."""
    return [{k: v for k, v in line.items() if k not in RATES} for line in lines(run.path / "metrics.jsonl")]
