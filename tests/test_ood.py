"""`gz ood` on a model whose likelihood can be counted by hand: independent pixels with known histograms."""

from __future__ import annotations

import csv
import io
import json
import math
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from pixelwise import Pixelwise, fake_run

from gzcli.cli import ood as ood_verb
from gzcli.data.batches import scan, to_uint8
from gzcli.data.benchmarks import Benchmark
from gzcli.data.pack import open_pack
from gzcli.engine import ood
from gzcli.engine.budget import affordable, subset
from gzcli.engine.log import Log
from gzcli.engine.scores import Scorer, choose
from gzcli.errors import DivergedError, MissingError, UsageError
from gzcli.metrics.baselines import code_length
from gzcli.metrics.detection import detection
from gzcli.models import catalog
from gzcli.models.diffusion.ddpm import DDPM
from gzcli.store import runs


@pytest.fixture
def trained(tmp_path, monkeypatch):
    return fake_run(tmp_path, monkeypatch, ood)


def job(**changes):
    return {"run": "model", "in": "digits", "out": ["digits-ab"], "scores": None, "n": 120, "full": False, "seed": 0,
            "checkpoint": "last", "options": {}, "background": None} | changes  # fmt: skip


def test_result_files_and_figures_agree(trained, tmp_path):
    result = ood.run(job(), tmp_path, torch.device("cpu"), Log())
    assert json.loads((tmp_path / "ood.json").read_text()) == json.loads(json.dumps(result))
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert list(rows[0]) == ["set", "role", "index", "nll", "typicality", "complexity", "far", "png", "mean", "knn_pixels"]
    assert [(row["set"], row["role"]) for row in rows] == [("digits", "in")] * 120 + [("digits-ab", "out")] * 120
    assert [int(row["index"]) for row in rows[:120]] == subset(355, 120).tolist()
    picture = Image.open(tmp_path / "histograms.png")
    assert min(picture.size) > 300
    names = ["nll", "typicality", "complexity", "far", "png", "mean", "knn_pixels"]
    assert [(row["out"], row["score"], row["baseline"]) for row in result["results"]] == [
        ("digits-ab", name, name in ("png", "mean", "knn_pixels")) for name in names
    ]
    for found in result["results"]:  # every figure follows from scores.csv alone
        values = {role: [float(row[found["score"]]) for row in rows if row["role"] == role] for role in ("in", "out")}
        again = detection(values["in"], values["out"])
        assert {key: found[key] for key in again} == again
    assert result["run"] == "model" and result["in"] == "digits" and result["positive"] == "out"
    assert any("hard direction" in note for note in result["notes"])


def test_nll_typicality_and_complexity_are_what_they_say(trained, tmp_path):
    ood.run(job(n=60), tmp_path, torch.device("cpu"), Log())
    rows = [row for row in csv.DictReader((tmp_path / "scores.csv").open()) if row["role"] == "in"]
    pack = open_pack("digits")

    def nll(images):
        k = (np.asarray(images).astype(int) * 17) >> 8
        logp = np.log(trained.model.table.numpy())
        return -np.take_along_axis(logp[None], k.reshape(len(k), -1)[..., None], 2).sum((1, 2))

    index = subset(355, 60)
    expected = nll(pack.images("test")[index])
    assert np.allclose([float(row["nll"]) for row in rows], expected, rtol=1e-5)
    held_out = nll(pack.images("val")[subset(len(pack.images("val")), 60)]).mean()
    assert np.allclose([float(row["typicality"]) for row in rows], abs(expected - held_out), atol=1e-2)
    seen = np.concatenate([to_uint8(b.x).numpy() for b in scan(pack, "test", batch_size=99, levels=17, device="cpu", index=index)])
    for row, image, value in zip(rows, seen, expected, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(image[0]).save(buffer, "PNG", optimize=True)
        length = 8 * min(buffer.tell(), len(zlib.compress(image.tobytes(), 9)))
        assert float(row["png"]) == pytest.approx(buffer.tell()) and float(row["mean"]) == pytest.approx(image.mean())
        assert value / math.log(2) - length <= float(row["complexity"]) + 0.1  # other coders can only shorten L(x)


def test_a_score_does_not_depend_on_its_batch_or_on_other_scores(trained):
    pack = open_pack("digits")
    batches = list(scan(pack, "test", batch_size=10, levels=17, device="cpu", index=np.arange(20)))
    singles = list(scan(pack, "test", batch_size=1, levels=17, device="cpu", index=np.arange(20)))
    for names in (["nll", "gradnorm", "noisy"], ["noisy"]):
        scorer = Scorer(trained, names, seed=3)
        together = [scorer(b) for b in batches]
        alone = [scorer(b) for b in singles]
        for name in names:
            assert np.allclose(np.concatenate([t[name] for t in together]), np.concatenate([a[name] for a in alone]), rtol=1e-6)
    assert not np.allclose(Scorer(trained, ["noisy"], seed=4)(batches[0])["noisy"], scorer(batches[0])["noisy"])
    again = np.concatenate([scorer(b)["noisy"] for b in batches])
    assert np.array_equal(again, np.concatenate([t["noisy"] for t in together]))


def test_gradnorm_is_the_norm_of_the_gradient_of_all_parameters(trained):
    """For independent softmax pixels ∂ log p(x) / ∂ logits = onehot(x) − p."""
    pack = open_pack("digits")
    batch = next(scan(pack, "test", batch_size=6, levels=17, device="cpu"))
    found = Scorer(trained, ["gradnorm"])(batch)["gradnorm"]
    k = (np.asarray(pack.images("test")[:6]).astype(int) * 17) >> 8
    gradient = np.eye(17)[k.reshape(6, -1)] - trained.model.table.numpy()
    assert np.allclose(found, np.log(np.sqrt((gradient**2).sum((1, 2)))), rtol=1e-5)
    assert not any(p.requires_grad for p in trained.model.parameters())


def test_the_ensemble_is_the_sum_of_log_densities_among_validation_images(trained, tmp_path):
    """Against scikit-learn's kernel densities at the same bandwidth (Scott's rule)."""
    from sklearn.neighbors import KernelDensity

    pack = open_pack("digits")
    val, test = (next(scan(pack, split, batch_size=60, levels=17, device="cpu")) for split in ("val", "test"))
    scorer = Scorer(trained, ["ensemble", "nll", "far", "noisy"])
    scorer.fit([val])
    seen, score = scorer(test), 0.0
    held = Scorer(trained, ["nll", "far", "noisy"])
    held.fit([val])
    fitted = held(val)
    bits = [code_length(to_uint8(batch.x).numpy()) for batch in (val, test)]
    for a, b in [*((fitted[name], seen[name]) for name in ("nll", "far", "noisy")), bits]:
        width = a.std(ddof=1) * len(a) ** (-1 / 5)
        score = score - KernelDensity(bandwidth=width).fit(a[:, None]).score_samples(b[:, None])
    np.testing.assert_allclose(seen["ensemble"], score, rtol=1e-6)
    far = np.full_like(seen["nll"], 1e6)
    assert np.isfinite(scorer.densities["nll"].logpdf(far)).all(), "far images have a finite score"


def test_ratio_is_the_difference_to_the_background(trained, tmp_path, monkeypatch):
    flat = Pixelwise(trained.info, table=torch.full_like(trained.model.table, 1 / 17))
    other = fake_run(tmp_path, monkeypatch, ood, model=flat, name="flat")
    batch = next(scan(open_pack("digits"), "test", batch_size=6, levels=17, device="cpu"))
    scorer = Scorer(trained, ["nll", "ratio"], background=other)
    found = scorer(batch)
    assert np.allclose(found["ratio"], found["nll"] - 256 * math.log(17), rtol=1e-5)
    with pytest.raises(MissingError) as error:
        Scorer(trained, ["ratio"])
    assert "gz train pixelwise --data digits --set data.augment=[mutate]" in error.value.hint


def test_options_reach_the_scores_that_take_them(trained, tmp_path):
    batch = next(scan(open_pack("digits"), "test", batch_size=9, levels=17, device="cpu"))
    plain, squared = Scorer(trained, ["far"]), Scorer(trained, ["far"], options={"power": 2.0, "other": 1})
    plain.fit([batch])
    assert np.allclose(plain(batch)["far"] ** 2, squared(batch)["far"], rtol=1e-5)
    assert squared.unused == ["other"]
    with pytest.raises(UsageError, match="takes `powr`"):
        ood.run(job(scores=["far"], n=20, options={"powr": 0.0}), tmp_path, torch.device("cpu"), Log())


def test_fit_sees_validation_images_only(trained, tmp_path):
    ood.run(job(scores=["far"], n=30), tmp_path, torch.device("cpu"), Log())
    val = open_pack("digits").images("val")
    seen = torch.cat([batch.x for batch in trained.model.fitted])
    k = (torch.from_numpy(np.array(val[subset(len(val), 30)])).long() * 17) >> 8
    assert torch.allclose(seen, k / 8 - 1)


def test_rebuilt_images_are_also_compared_by_the_features_of_the_set(trained, tmp_path, monkeypatch):
    """Without LPIPS's weights by those of a LeNet, which then moves the score; `pixels` leaves it out."""
    model = DDPM(trained.info, channels=8, mult=(1,), attention=(), timesteps=20)
    fake_run(tmp_path, monkeypatch, ood, model=model, name="ddpm")
    asked = [job(run="ddpm", scores=["recon"], n=12, options={"pixels": pixels}) for pixels in (False, True)]
    with_features, alone = (ood.run(each, tmp_path, torch.device("cpu"), Log()) for each in asked)
    assert with_features["perceptual"].startswith("lenet ")
    assert with_features["results"][0]["auroc"] != alone["results"][0]["auroc"]
    assert ood.run(job(n=12), tmp_path, torch.device("cpu"), Log())["perceptual"] is None


def test_scores_that_are_not_finite_name_the_score_and_the_set(trained, tmp_path):
    trained.model.broken = True
    with pytest.raises(DivergedError, match=r"`far` is not finite for \d+ of \d+ images of `digits`"):
        ood.run(job(scores=["far"]), tmp_path, torch.device("cpu"), Log())


@pytest.mark.parametrize("scores, message", [(["nlll"], "no score `nlll`"), (["fara"], "no score `fara`")])
def test_unknown_scores_are_refused_with_the_nearest(trained, scores, message):
    with pytest.raises(UsageError, match=message) as error:
        choose(trained, scores)
    assert "did you mean" in error.value.hint


def test_a_model_without_likelihood_says_so(trained, monkeypatch):
    monkeypatch.delattr(Pixelwise, "log_prob")
    with pytest.raises(UsageError, match="has no likelihood"):
        choose(trained, ["nll"])


def test_a_benchmark_has_groups_with_means_and_names_what_is_missing(trained, tmp_path, monkeypatch):
    rows = ood.run(job(out=["patches", "digits-ab"]), tmp_path, torch.device("cpu"), Log())["results"]
    toy = Benchmark("toy", "digits", ("digits-ab", "svhn"), ("patches",), ("notmnist",))
    found = ood.grouped(rows, toy)
    assert [row["out"] for row in found if row["score"] == "nll"] == ["digits-ab", "mean of near", "patches", "mean of far"]
    mean = next(row for row in found if row["out"] == "mean of far" and row["score"] == "nll")
    single = next(row for row in rows if row["out"] == "patches" and row["score"] == "nll")
    assert mean["auroc"] == single["auroc"] and mean["group"] == "far"
    said = ood.notes(rows, {name: open_pack(name) for name in ("digits-ab",)}, toy)
    assert said[0].startswith("left out of `toy`: svhn, patches, notmnist")


def test_the_sets_of_a_benchmark(trained, monkeypatch, capsys):
    """Offline and with an empty cache every one is named with what would fetch it."""
    benchmark = ood_verb.inside_of("OpenOOD_CIFAR10", None, None)
    assert benchmark.inside == "cifar10" and benchmark.near == ("cifar100", "tinyimagenet")
    with pytest.raises(UsageError, match="has sets of its own"):
        ood_verb.inside_of("openood-mnist", "cifar10", None)
    with pytest.raises(UsageError, match="there is no benchmark `openood`"):
        ood_verb.inside_of("openood", None, None)
    run = runs.create("vae", "cifar10")
    (run.path / "run.yaml").write_text("data: {size: 32, channels: 3}")
    with pytest.raises(MissingError, match="none of the foreign sets"):
        ood_verb.at_hand(benchmark, run)
    told = capsys.readouterr().err
    assert all(f"`{name}`" in told and "gz data download" in told for name in (*benchmark.near, *benchmark.far))


def test_the_same_set_on_both_sides_is_refused(trained, tmp_path):
    with pytest.raises(UsageError, match="both"):
        ood.run(job(out=["digits"]), tmp_path, torch.device("cpu"), Log())


def test_foreign_sets_pass_through_the_runs_size_and_channels(trained, tmp_path):
    result = ood.run(job(out=["patches"], scores=["nll"], n=50), tmp_path, torch.device("cpu"), Log())
    assert all(row["resized"] for row in result["results"])
    assert any("`patches` was resized" in note for note in result["notes"])
    assert result["results"][0]["score"] == "nll" and result["results"][0]["auroc"] > 0.9


def test_the_budget_buys_500_to_10000_images():
    assert affordable(0.1, 300, 2) == 1500
    assert affordable(10, 300, 2) == 500
    assert affordable(1e-6, 300, 2) == 10_000


def test_subsets_are_seeded_sorted_and_nested():
    small, large = subset(1000, 100), subset(1000, 300)
    assert (np.diff(small) > 0).all() and set(small) <= set(large) and len(large) == 300
    assert np.array_equal(subset(50, 500), np.arange(50))


def test_without_n_the_budget_decides_and_full_takes_all(trained, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(ood, "affordable", lambda seconds, budget, sets: asked.append((seconds, budget, sets)) or 40)
    result = ood.run(job(scores=["nll"], n=None), tmp_path, torch.device("cpu"), Log())
    assert result["results"][0]["n_in"] == result["results"][0]["n_out"] == 40
    ((seconds, budget, sets),) = asked
    assert 0 < seconds < 1 and (budget, sets) == (300, 3)  # in, out, and validation
    result = ood.run(job(scores=["nll"], n=None, full=True), tmp_path, torch.device("cpu"), Log())
    assert result["results"][0]["n_in"] == 355


def test_no_model_has_a_score_of_the_name_of_a_baseline():
    for card in catalog.cards().values():
        assert not set(card.scores) & set(ood.BASELINES), card.name
