"""Networks as graphs of ONNX and torch.export, with a sampler that needs neither gz nor torch."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import fit, recipe
from PIL import Image
from refused import refused
from zoo import CASES, Case

from gzcli.core.errors import UsageError
from gzcli.core.types import ImageNoise
from gzcli.engine import sampler
from gzcli.engine.trained import Trained, load_trained
from gzcli.export import portable, portable_sampler
from gzcli.export.export import to_diffusers
from gzcli.models import catalog
from gzcli.models.base import group_options

DCGAN = Case("dcgan", {"width": 8, "latent": 4, "conditional": True}, lr=1e-3, batch=8)
# Models that are refused, and why.
REFUSED = dict.fromkeys(("pixelcnn", "pixelcnnpp", "vqvae", "vqgan", "var"), "each value from those before")
REFUSED |= {"cyclegan": "images of images"}
# torch does not write all their graphs
UNWRITTEN = {"glow", "flowpp", "tarflow", "hvae", "vdvae", "zigma", "diffae", "aae"}
STAGES = {"transformer", "maskgit", "var", "latent_prior", "reflow", "ect"}  # which need another stage


def made(case: Case) -> Trained:
    t = fit(recipe(case, steps=1))
    return load_trained(t.run, "cpu")


@pytest.fixture(scope="module")
def dcgan() -> Trained:
    return made(DCGAN)


SMALL = {"channels": 4, "groups": 4, "mult": (1,), "attention": ()}
HEUN = {"sampler": "heun", "steps": 3, "tolerance": 1e-4, "guidance": 1.0, "interval": (0.0, 1.0)}


def test_noise_is_written_down():
    ours = ImageNoise(7, range(3))
    for call, (kind, shape) in enumerate([("normal", [2, 3, 3]), ("uniform", [5]), ("normal", [1])]):
        expected = ours.randn(3, *shape) if kind == "normal" else ours.rand(3, *shape)
        numbers = portable_sampler.noise(kind, shape, 3, 7, call)
        np.testing.assert_allclose(numbers, expected.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "clusters"),
    [("fm", 0), ("ddpm", 0), ("sgm", 0), ("soflow", 0), ("soflow", 3), ("fm", 3), ("ddpm", 3), ("cfm", 20)],
)
def test_a_program_draws_what_gz_draws(name, clusters):
    trained = made(Case(name, SMALL | {"clusters": clusters}, lr=1e-3, batch=8))
    options = HEUN if name == "fm" else {**trained.part.sample, "steps": 3}
    spec, step, _ = portable.step_of(trained, group_options(trained.model.sample, options))
    classes = trained.info.classes if trained.model.conditional else []
    spec = json.loads(json.dumps(spec)) | {"classes": classes, "multilabel": False, "decode": False}
    steps = ["draw", *(["cluster"] if clusters else []), *["call"] * 5]  # the last step is Euler's
    assert name != "fm" or [part["do"] for part in spec["program"]] == steps

    labels = []

    def call(_, feeds):
        labels.append(feeds.get("y"))
        with torch.no_grad():
            made = step(**{key: torch.from_numpy(np.asarray(value)) for key, value in feeds.items()})
        return [value.numpy() for value in (made if isinstance(made, tuple | list) else [made])]

    theirs = portable_sampler.draw(spec, call, 12, seed=4).transpose(0, 3, 1, 2)
    trained.requested_precision = "fp32"
    ours = sampler.draw(trained, 12, seed=4, options=options)
    assert np.abs(theirs.astype(int) - ours.astype(int)).max() <= 1
    if clusters:
        draws = ImageNoise(4, range(12))
        draws.randn(12, *trained.info.shape)
        assert labels[-1].tolist() == trained.model.draw_labels(None, 12, draws).tolist()
        assert len(set(labels[-1].tolist())) > 2
    if name == "ddpm" and clusters:
        refused("no pipeline", to_diffusers, trained, "", None, hint="model.clusters=0")


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
    if case.model in STAGES or catalog.card(case.model).family == "stable_diffusion":
        pytest.skip("needs another stage, or networks of diffusers")
    trained = made(case)
    if message := REFUSED.get(case.model):
        refused(message, portable.write, trained, to, tmp_path)
        return
    try:
        result = portable.write(trained, to, tmp_path)
    except UsageError as e:
        assert case.model in UNWRITTEN and e.hint == portable.ELSE, e.message
        return
    assert result["differs"] <= portable.TOLERANCE
