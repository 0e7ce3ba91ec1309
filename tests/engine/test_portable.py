"""Networks as graphs of ONNX and torch.export, with a sampler that needs neither gz nor torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import recipe, trainer
from PIL import Image
from zoo import CASES, Case

from gzcli.core.errors import UsageError
from gzcli.core.types import ImageNoise
from gzcli.engine import sampler
from gzcli.engine.trained import Trained, load_trained
from gzcli.export import portable, portable_sampler
from gzcli.models.base import grouped

DCGAN = Case("dcgan", {"width": 8, "latent": 4, "conditional": True}, lr=1e-3, batch=8)
# Models that are refused, and why.
REFUSED = dict.fromkeys(("pixelcnn", "pixelcnnpp", "vqvae", "vqgan"), "each value from those before")
REFUSED |= {"cyclegan": "images of pictures"}
UNWRITTEN = {"glow", "flowpp", "hvae", "zigma", "diffae", "aae"}  # torch does not write all their graphs
STAGES = {"transformer", "maskgit", "latent_prior", "reflow"}  # which need another stage


def made(case: Case) -> Trained:
    t = trainer(recipe(case, steps=1))
    t.fit()
    return load_trained(t.run, "cpu")


@pytest.fixture(scope="module")
def dcgan() -> Trained:
    return made(DCGAN)


def test_noise_and_a_solver_are_written_down():
    ours = ImageNoise(7, range(3))
    for call, (kind, shape) in enumerate([("normal", [2, 3, 3]), ("uniform", [5]), ("normal", [1])]):
        expected = ours.randn(3, *shape) if kind == "normal" else ours.rand(3, *shape)
        found = portable_sampler.noise(kind, shape, 3, 7, call)
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)
    trained = made(Case("fm", {"channels": 4, "groups": 4, "mult": (1,), "attention": ()}, lr=1e-3, batch=8))
    options = {"sampler": "heun", "steps": 3, "tolerance": 1e-4, "guidance": 1.0, "interval": (0.0, 1.0)}
    spec, step, _ = portable.step_of(trained, grouped(trained.model.sample, options))
    spec = json.loads(json.dumps(spec)) | {"classes": [], "multilabel": False, "decode": False}
    assert [part["do"] for part in spec["program"]] == ["draw", *["call"] * 6]

    def call(name, feeds):
        with torch.no_grad():
            return [step(**{key: torch.from_numpy(value) for key, value in feeds.items()}).numpy()]

    theirs = portable_sampler.draw(spec, call, 2, seed=4).transpose(0, 3, 1, 2)
    trained.requested_precision = "fp32"
    ours = sampler.draw(trained, 2, seed=4, options=options)
    assert np.abs(theirs.astype(int) - ours.astype(int)).max() <= 1


@pytest.mark.parametrize("name", ["ddpm", "sgm"])
def test_a_denoiser_s_program_draws_what_gz_draws(name):
    small = {"channels": 4, "groups": 4, "mult": (1,), "attention": ()}
    trained = made(Case(name, small, lr=1e-3, batch=8))
    options = {**trained.part.sample, "steps": 3}
    spec, step, _ = portable.step_of(trained, grouped(trained.model.sample, options))
    spec = json.loads(json.dumps(spec)) | {"classes": [], "multilabel": False, "decode": False}

    def call(_, feeds):
        with torch.no_grad():
            made = step(**{key: torch.from_numpy(np.asarray(value)) for key, value in feeds.items()})
        return [value.numpy() for value in made]

    theirs = portable_sampler.draw(spec, call, 2, seed=4).transpose(0, 3, 1, 2)
    trained.requested_precision = "fp32"
    ours = sampler.draw(trained, 2, seed=4, options=options)
    assert np.abs(theirs.astype(int) - ours.astype(int)).max() <= 1


@pytest.mark.slow
def test_a_graph_of_torch_draws_what_gz_draws(dcgan, tmp_path):
    result = portable.write(dcgan, "torch", tmp_path)
    assert result["differs"] <= 1 and result["files"] == ["step.pt2", "model.json"]


@pytest.mark.slow
def test_the_written_sampler_runs_by_itself(dcgan, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    portable.write(dcgan, "onnx", tmp_path)
    words = [sys.executable, "-I", str(tmp_path / "sample.py"), "-n", "3", "--seed", "5", "--label", "2"]
    subprocess.run([*words, "--out", str(tmp_path / "drawn")], check=True, cwd=tmp_path)
    dcgan.requested_precision = "fp32"
    ours = sampler.draw(dcgan, 3, seed=5, labels=torch.full((3,), 2))
    for i, image in enumerate(ours):
        drawn = np.asarray(Image.open(tmp_path / "drawn" / f"{i:06d}.png")).astype(int)
        assert np.abs(drawn - image[0]).max() <= 1
    text = Path(tmp_path / "sample.py").read_text()
    assert "import torch" not in text and "gzcli" not in text


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torch", "onnx"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_family_is_exported_or_refused(case, to, tmp_path):
    if to == "onnx":
        pytest.importorskip("onnxscript")
    if (
        case.model in STAGES
        or case.base != "sd"
        or case.model in ("sd_lora", "controlnet", "instructpix2pix")
    ):
        pytest.skip("needs another stage, or networks of diffusers")
    trained = made(case)
    if told := REFUSED.get(case.model):
        with pytest.raises(UsageError, match=told):
            portable.write(trained, to, tmp_path)
        return
    try:
        result = portable.write(trained, to, tmp_path)
    except UsageError as e:
        assert case.model in UNWRITTEN and e.hint == portable.ELSE, e.message
        return
    assert result["differs"] <= portable.TOLERANCE
