"""Samples and outputs that are not finite: a few are told, and nothing is made of them if all are."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import lines, recipe, trainer
from pixelwise import fake_run, fitted
from refused import refused
from zoo import FIRST

from gzcli.api import LoadedRun
from gzcli.core.errors import DivergedError
from gzcli.core.types import Applied
from gzcli.data.packs.open import open_pack
from gzcli.engine import sampler
from gzcli.engine.log import Log
from gzcli.judge import bench, contestants, sample
from gzcli.models.nn import within
from gzcli.models.nn.pixels import Pixels
from gzcli.models.normalizing_flow import layers
from gzcli.store.jobs import BenchJob, SampleJob

CPU = torch.device("cpu")
BAD = pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])


def spoiled(monkeypatch, trained, value: float, rows: slice):
    """Makes these samples and outputs of a model, in each batch, not finite."""
    draw = type(trained.model).sample

    def broken(n, *, labels=None, noise, progress):
        x = draw(trained.model, n, labels=labels, noise=noise, progress=progress)
        x[rows, 0, 0, 0] = value
        return x

    def reconstruct(x, *, noise, progress):
        x = x.clone()
        x[rows, 0, 0, 0] = value
        return Applied(x, ("reconstruction",))

    monkeypatch.setattr(trained.model, "sample", broken)
    monkeypatch.setattr(trained.model, "reconstruct", reconstruct, raising=False)


@BAD
def test_a_model_without_finite_samples_has_no_row_and_a_few_are_told(tmp_path, monkeypatch, value):
    trained = fake_run(tmp_path, monkeypatch, bench, model=fitted(), name="broken")
    job = BenchJob(("broken",), "digits", metrics=("fd",), n=60, checkpoint="last", drawing="code")
    spoiled(monkeypatch, trained, value, slice(None))
    error = refused("produced no finite image", bench.run, job, tmp_path, CPU, Log(), error=DivergedError)
    assert error.code == 5
    spoiled(monkeypatch, trained, value, slice(0, 3))
    draw = "`pixelwise` are not finite and shown in black"
    for _ in range(2):  # drawn, and read again
        folder = trained.run.owner.path / "bench" / "1"
        entry = contestants.sampled(trained, open_pack("digits"), job, folder, Log())
        assert [note for note in entry.notes if draw in note] == [f"3 of 60 images from {draw}"]
        assert not entry.images.images[:3].any() and entry.images.images[3:].any((1, 2, 3)).all()
    result = bench.run(job, tmp_path, CPU, Log())
    assert f"3 of 60 images from {draw}" in result["notes"]


@BAD
def test_a_metric_that_is_not_finite_is_in_a_note(tmp_path, monkeypatch, value):
    trained = fake_run(tmp_path, monkeypatch, bench, model=fitted(), name="broken")
    monkeypatch.setattr(trained.model, "measure", lambda batches: {"mse": value}, raising=False)
    job = BenchJob(("broken",), "digits", metrics=("swd", "own"), n=60, checkpoint="last")
    result = bench.run(job, tmp_path, CPU, Log())
    assert "not finite, so not ranked: `mse` of `pixelwise`" in result["notes"]
    assert result["places"] == {"pixelwise": "1"}


@BAD
def test_samples_and_applications_that_are_not_finite_are_no_pictures(tmp_path, monkeypatch, capsys, value):
    trained = fake_run(tmp_path, monkeypatch, sample, model=fitted(), name="broken")
    monkeypatch.setattr(sample, "checksum", lambda path: "")
    run, job = LoadedRun(trained), SampleJob("broken", n=8, checkpoint="last")
    for of in (job, replace(job, do="reconstruct")):
        spoiled(monkeypatch, trained, value, slice(None))
        refused("produced no finite image", sample.run, of, tmp_path, CPU, Log(), error=DivergedError)
        assert not (tmp_path / "grid.png").exists()
        spoiled(monkeypatch, trained, value, slice(0, 2))
        result = sample.run(of, tmp_path, CPU, Log())
        assert result["notes"] == ["2 of 8 images from `pixelwise` are not finite and shown in black"]
        assert "warning: 2 of 8 images" in capsys.readouterr().err
        (tmp_path / "grid.png").unlink()
    pictures = np.asarray(open_pack("digits").images("test")[:8])
    with pytest.warns(UserWarning, match="2 of 8"):
        assert not run.sample(8)[:2].any()
    with pytest.warns(UserWarning, match="2 of 8"):
        assert not run.do("reconstruct", pictures)[:2].any()
    spoiled(monkeypatch, trained, value, slice(None))
    refused("no finite image", run.sample, 8, error=DivergedError)
    refused("no finite image", lambda: run.do("reconstruct", pictures), error=DivergedError)


def test_a_training_goes_on_without_finite_samples_but_does_not_end_so(monkeypatch):
    """And a validation that is not finite is never the best one."""
    sets = ("train.eval_every=2", "train.sample_every=2", "train.best=fd", "train.checkpoint_every=4")
    t = trainer(recipe(FIRST["wgan"], steps=4, sets=sets))
    said, draw = [], t.model.sample
    monkeypatch.setattr(t.log, "warn", said.append)
    monkeypatch.setattr(t, "get_net", lambda: None)
    t.net = SimpleNamespace(features=lambda x: x.reshape(len(x), -1)[:, ::16].astype(float), rotations=True)
    t.net.predict = lambda x: x[:, 0, 0, 0] * 0
    monkeypatch.setattr(t.model, "sample", lambda *a, **k: draw(*a, **k) * math.nan)
    refused("produced no finite image", t.fit, error=sampler.NoneFinite)
    assert t.run.best is None and t.run.saved_steps[-1] == 4  # whose weights are not lost
    assert sum("`wgan` produced no finite image" in text for text in said) == 3  # validated twice, drawn once
    assert sum("validation `fd`" in text for text in said) == 2
    assert any(math.isnan(line.get("val_fd", 0)) for line in lines(t.run.path / "metrics.jsonl"))
    t.run.best_file.write_text(json.dumps({"step": 2, "metric": "fd", "value": math.nan}))
    assert t.run.best is None


def test_clamping_hides_nothing():
    x = torch.tensor([math.inf, -math.inf, math.nan, 3.0, -3.0, 0.5])
    assert within(x)[:3].isnan().all() and within(x)[3:].tolist() == [1.0, -1.0, 0.5]
    assert layers.quantise(x, 17)[:3].isnan().all() and layers.quantise(x, 17)[3:].isfinite().all()
    out = torch.stack([x, torch.zeros(6)]).view(1, 2, 1, 6)
    logistic = Pixels("logistic", 17)
    for images in (logistic.mean(out), logistic.draw(out, torch.full((1, 1, 1, 6), 0.5))):
        assert images.flatten()[:3].isnan().all() and images.flatten()[3:].isfinite().all()
