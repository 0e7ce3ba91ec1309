"""`gz bench` on models whose likelihood, classes and samples are known by counting."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import partialmethod
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pixelwise import fake_run, fitted, nll_of
from refused import refused
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from gzcli.core.errors import DivergedError, MissingError
from gzcli.core.types import Applied
from gzcli.data.packs.batches import scan, to_uint8
from gzcli.data.packs.open import open_pack
from gzcli.engine.log import Log
from gzcli.judge import bench, contestants
from gzcli.judge.bench import Judge
from gzcli.judge.contestants import ImageSet
from gzcli.metrics import pretrained
from gzcli.metrics.features import lenet
from gzcli.metrics.interval import subset
from gzcli.metrics.metric import metrics
from gzcli.metrics.quality import lpips
from gzcli.metrics.quality.fd import frechet_distance
from gzcli.models.nn.perceptual import LPIPS
from gzcli.store.jobs import BenchJob


@pytest.fixture
def load(tmp_path, monkeypatch):
    return lambda name, **how: fake_run(tmp_path, monkeypatch, bench, model=fitted(**how), name=name)


def run(tmp_path, *runs, **changes):
    job = BenchJob(runs, "digits", n=200, checkpoint="last")
    return bench.run(replace(job, **changes), tmp_path, torch.device("cpu"), Log())


def test_two_models_side_by_side(load, tmp_path):
    load("plain"), load("classes", conditional=True)
    result = run(tmp_path, "plain", "classes")
    plain, classes = result["rows"]
    neighbours = {f"{name}_lenet" for name in ("precision", "recall", "density", "coverage")}
    of_images = {"fd", "fd_second", "fd_class", "kid_lenet", "swd", "tv", "legible"} | neighbours
    common = of_images | {"bpd", "samples_per_s"}
    assert set(plain["metrics"]) == common and set(classes["metrics"]) == common | {"label_accuracy", "bpd|y"}
    assert [row["run"] for row in result["rows"]] == ["plain", "classes"]
    assert (plain["params"], classes["params"]) == (256 * 17, 2560 * 17)
    assert classes["metrics"]["fd"] < plain["metrics"]["fd"]  # the class tables look like digits
    assert result["floor"]["fd"] < classes["metrics"]["fd"]
    assert set(result["floor"]) == set(result["floor_intervals"]) == of_images
    for row in result["rows"]:
        assert set(row["intervals"]) == set(row["metrics"]) - {"samples_per_s"}
        assert all(low <= row["metrics"][name] <= high for name, (low, high) in row["intervals"].items())
    assert result["directions"]["fd"] == "down" and result["directions"]["recall_lenet"] == "up"
    assert result["biased"] == {"200": []}
    assert classes["metrics"]["label_accuracy"] > 0.8
    made = result["provenance"]
    expected = {"n_real": 355, "n_fake": 200, "split": "test", "shape": [1, 16, 16], "seed": 0}
    assert expected.items() <= made.items()
    assert result["floor"]["fd"] == pytest.approx(np.mean(made["floor_draws"]["fd"]))
    assert len(made["floor_draws"]["fd"]) == 20
    assert [(row["drawn"], row["n"]) for row in result["rows"]] == [("random", 200), ("label", 200)]
    assert [floor["drawn"] for floor in result["floors"]] == ["random", "label"]
    for row in result["rows"]:
        value, low, high = row["excess"]["fd"]
        assert value == pytest.approx(row["metrics"]["fd"] - row["floor"]["fd"]) and low < value < high
        assert (
            row["excess"]["recall_lenet"][0] == row["floor"]["recall_lenet"] - row["metrics"]["recall_lenet"]
        )
    assert result["places"] == {"plain": "2", "classes": "1"} and result["second"] is None
    assert made["features"] == lenet(open_pack("digits")).hash and made["versions"]["torch-fidelity"]
    assert json.loads((tmp_path / "bench.json").read_text()) == json.loads(json.dumps(result))
    assert min(Image.open(tmp_path / "bench.png").size) > 100


def test_figures_follow_from_the_kept_samples_and_the_code_length_of_the_test_split(load, tmp_path):
    trained = load("plain")
    trained.run.update(step=7, seconds=12.04, work=12.04)
    row = run(tmp_path, "plain", metrics=("fd", "speed", "bpd"))["rows"][0]
    (path,) = (tmp_path / "samples").glob("plain-*.npz")
    samples, pack, figures, made = np.load(path), open_pack("digits"), row["metrics"], row["likelihood"]
    images = samples["samples"].transpose(0, 3, 1, 2)
    assert images.shape == (200, 1, 16, 16) and images.dtype == np.uint8
    fd = frechet_distance(*(lenet(pack).features(x) for x in (images, pack.images("test"))))
    nll = nll_of(trained, pack.images("test"))
    assert figures["fd"] == pytest.approx(fd, rel=1e-8)
    assert figures["samples_per_s"] == pytest.approx(200 / float(samples["seconds"]), rel=1e-2)
    assert figures["bpd"] == pytest.approx(nll.mean() / (256 * math.log(2)), rel=1e-5)
    assert set(figures) == {"fd", "samples_per_s", "bpd"}
    assert (row["train_steps"], row["train_seconds"]) == (7, 12.0)
    few = run(tmp_path, "plain", metrics=("bpd",), likelihoods=60)["rows"][0]
    assert few["likelihood"]["n"] == 60 < row["likelihood"]["n"], "`-n 60` is of likelihoods too"
    assert (made["kind"], made["n"], made["given_labels"]) == ("exact", 355, False)
    assert made["se"] == pytest.approx(nll.std(ddof=1) / math.sqrt(355), rel=1e-4)


def test_a_league_draws_again_only_by_other_code(load, tmp_path, monkeypatch):
    trained, pack, drawn = load("plain"), open_pack("digits"), []
    draw = contestants.timed_draw
    monkeypatch.setattr(contestants, "timed_draw", lambda *words: drawn.append(words[1]) or draw(*words))
    job = BenchJob(("plain",), "digits", n=60, checkpoint="last", patience=100.0, drawing="code")

    def samples(name: str, **changes) -> np.ndarray:
        folder = trained.run.owner.path / "bench" / name
        entry = contestants.sampled(trained, pack, replace(job, **changes), folder, Log())
        assert entry.file.startswith(str(folder)) and entry.seconds > 0
        return entry.images.images

    first = samples("1")
    assert np.array_equal(samples("2"), first) and drawn == [60]
    for changes in ({"drawing": "new"}, {"seed": 1}, {"n": 50}, {"drawing": None}):
        samples("3", **changes)
    assert drawn == [60, 60, 60, 50, 60]


def test_a_conditional_model_has_two_columns(load, tmp_path, monkeypatch):
    """log p(x | y) with the label given beside log p(x) = log Σ p(y) p(x | y), both counted by hand."""
    trained = load("classes", conditional=True)
    load("plain")
    result = run(tmp_path, "plain", "classes", metrics=("bpd",))
    plain, classes = result["rows"]
    assert set(plain["metrics"]) == {"bpd"} and set(classes["metrics"]) == {"bpd", "bpd|y"}
    assert any("do not compare" in note for note in result["notes"])
    pack = open_pack("digits")
    k = (np.asarray(pack.images("test")).astype(int) * 17) >> 8
    logp = np.log(trained.model.table.numpy()).astype(float)  # [classes, pixels, levels]
    at = k.reshape(355, -1)[..., None]
    of_class = np.stack([np.take_along_axis(t[None], at, 2).sum((1, 2)) for t in logp])
    prior = np.bincount(pack.labels("train")) / len(pack.labels("train"))
    of_label, unit = of_class[pack.labels("test"), np.arange(355)], 256 * math.log(2)
    assert classes["metrics"]["bpd|y"] == pytest.approx(-of_label.mean() / unit, rel=1e-5)
    marginal = np.logaddexp.reduce(of_class + np.log(prior)[:, None], 0)
    assert classes["metrics"]["bpd"] == pytest.approx(-marginal.mean() / unit, rel=1e-5)
    value = classes["likelihood"]
    assert value["given_labels"] and value["marginal"]["nats"] == pytest.approx(-marginal.mean())
    # a budget that does not pay for every class in turn
    trained.part = replace(trained.part, ood=replace(trained.part.ood, budget=1e-9))
    (dear,) = run(tmp_path, "classes", metrics=("bpd",))["rows"]
    assert set(dear["metrics"]) == {"bpd|y"}


def test_other_grey_levels_stand_in_columns_of_their_own_and_binary_models_have_nats(
    load, tmp_path, monkeypatch
):
    """Binary samples are compared with binarised images, samples of means with the grey ones."""
    load("plain"), load("coarse", levels=5)
    result = run(tmp_path, "plain", "coarse", metrics=("fd", "bpd"))
    plain, coarse = (row["metrics"] for row in result["rows"])
    assert set(plain) == {"fd", "bpd"} and set(coarse) == {"fd@5", "bpd@5"}
    assert set(result["floor"]) == {"fd", "fd@5"} and result["floor"]["fd@5"] != result["floor"]["fd"]
    trained = load("binary", levels=2)
    result = run(tmp_path, "binary")
    metrics = result["rows"][0]["metrics"]
    pack = open_pack("digits")
    (batch,) = scan(pack, "test", batch_size=355, levels=2, device="cpu")
    total = -float(trained.model.log_prob(batch.x, noise=None).sum())
    assert metrics["nats"] == pytest.approx(total / 355, rel=1e-5)
    (path,) = (tmp_path / "samples").glob("binary-*.npz")
    drawn = np.load(path)["samples"].transpose(0, 3, 1, 2)
    fd = frechet_distance(*(lenet(pack).features(x) for x in (drawn, to_uint8(batch.x).numpy())))
    assert set(np.unique(drawn)) == {0, 255} and metrics["fd@2"] == pytest.approx(fd, rel=1e-9)
    assert "fd" not in metrics and result["floor"]["fd@2"] < fd
    monkeypatch.setattr(contestants, "timed_draw", lambda *_: (pack.images("train")[:200], 1.0))
    row = run(tmp_path, "binary")["rows"][0]
    assert row["metrics"]["fd"] < 2 * row["floor"]["fd"] and row["metrics"]["nats"] == metrics["nats"]


def test_what_is_refused(load, tmp_path):
    trained = load("plain")
    load("large", size=20)
    refused(r"1×20×20.*1×16×16", run, tmp_path, "plain", "large")
    error = refused("no metric `fdd`", run, tmp_path, "plain", metrics=("fdd",))
    assert "did you mean `fd`" in error.hint
    refused("weights-inception-2015", run, tmp_path, "plain", metrics=("fid",), error=MissingError)
    trained.model.logits[:] = float("nan")
    refused("not finite", run, tmp_path, "plain", metrics=("bpd",), error=DivergedError)


def test_features_of_fetched_transformers(load, tmp_path, monkeypatch):
    """Of a small CLIP; the raw distance is marked at fewer images than twice its features."""
    load("plain")
    torch.manual_seed(0)
    sizes = {"intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "patch_size": 112}
    small = CLIPVisionModelWithProjection(CLIPVisionConfig(hidden_size=64, projection_dim=12, **sizes))
    file = tmp_path / "clip.bin"
    torch.save(small.state_dict(), file)
    monkeypatch.setattr(pretrained, "weights", lambda name, **options: file)
    result = run(tmp_path, "plain", n=60, metrics=("fd_clip", "kid_clip", "prc_clip"))
    figures = result["rows"][0]["metrics"]
    parts = {f"{name}_clip" for name in ("precision", "recall", "density", "coverage")}
    assert set(figures) == {"fd_clip", "kid_clip", *parts} == set(result["floor"])
    assert result["floor"]["fd_clip"] < figures["fd_clip"] and result["biased"] == {"60": ["fd_clip"]}
    assert result["directions"] == dict.fromkeys(("fd_clip", "kid_clip"), "down") | dict.fromkeys(parts, "up")
    space, pack = pretrained.clip(), open_pack("digits")
    (path,) = (tmp_path / "samples").glob("plain-*.npz")
    fake = space.features(np.load(path)["samples"].transpose(0, 3, 1, 2))
    want = frechet_distance(fake, space.features(pack.images("test")))
    assert figures["fd_clip"] == pytest.approx(want, rel=1e-5)
    assert result["provenance"]["clip"] == space.hash


def test_lpips_of_pairs(load, tmp_path, monkeypatch):
    """Samples of one class are nearer to each other than others; a model that rebuilds its images is at 0."""
    trained = load("classes", conditional=True)
    torch.manual_seed(0)
    net = LPIPS().requires_grad_(False)
    monkeypatch.setattr(Judge, "lpips", net)
    Model = type(trained.model)
    monkeypatch.setattr(lpips, "REBUILT", 20)

    def rebuild(self, x, *, labels=None, noise, progress, shift=0.0):
        assert len(labels) == len(x)
        return Applied((x + shift).clamp(-1, 1), rows=("same",))

    monkeypatch.setattr(Model, "reconstruct", rebuild, raising=False)
    result = run(tmp_path, "classes", n=60, metrics=("lpips",))
    figures = result["rows"][0]["metrics"]
    assert figures["lpips_recon"] == 0 and 0 < figures["lpips_diversity|y"] < figures["lpips_diversity"]
    assert set(result["floor"]) == {"lpips_diversity", "lpips_diversity|y"}
    ways = {"lpips_recon": "down", "lpips_diversity": None, "lpips_diversity|y": None}
    assert result["directions"] == ways
    monkeypatch.setattr(Model, "reconstruct", partialmethod(rebuild, shift=0.5))
    shifted = run(tmp_path, "classes", n=60, metrics=("lpips",))["rows"][0]["metrics"]["lpips_recon"]
    index = subset(355, 20)
    x = torch.from_numpy(open_pack("digits").images("test")[index]).float() / 127.5 - 1
    assert shifted == pytest.approx(float(net(x, (x + 0.5).clamp(-1, 1)).mean()), rel=0.05)
    same = ImageSet(np.repeat(open_pack("digits").images("test")[:1], 8, 0))
    judge = SimpleNamespace(lpips=net, device="cpu")
    assert lpips.diversity(judge, same)["lpips_diversity"].value == 0


def test_records_of_metrics_are_light_and_name_each_column_once():
    code = "from gzcli.metrics.metric import *; import sys; help_text(), column_of('fd'), meanings(); "
    code += "sys.exit(bool({'numpy', 'torch'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
    names = [column.name for metric in metrics().values() for column in metric.columns]
    assert len(names) == len(set(names))
