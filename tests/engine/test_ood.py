"""`gz ood` on a model whose likelihood can be counted by hand: independent pixels with known histograms."""

import csv
import io
import json
import math
import zlib
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pixelwise import Pixelwise, fake_run, fitted, nll_of
from refused import refused

from gzcli.cli import ood as ood_verb
from gzcli.cli import out
from gzcli.core.errors import DivergedError, MissingError
from gzcli.core.sections import DataSection
from gzcli.core.types import Batch
from gzcli.core.units import affordable
from gzcli.data.packs.batches import scan, to_uint8
from gzcli.data.packs.open import open_pack
from gzcli.data.sets.benchmarks import Benchmark, find_benchmark
from gzcli.engine.log import Log
from gzcli.engine.pictures import score_bins
from gzcli.judge import ood, scores
from gzcli.judge.images import short_paths
from gzcli.judge.ood import BASELINES
from gzcli.judge.scores import Scorer, choose, computable
from gzcli.launch import scoring
from gzcli.metrics.baselines import code_length, pixel_mean, png_size
from gzcli.metrics.detection import detection
from gzcli.metrics.interval import subset
from gzcli.models import catalog
from gzcli.models.base import flat_defaults
from gzcli.models.diffusion.ddpm import DDPM
from gzcli.models.flow_matching.fm import FM
from gzcli.models.gan.wgan import WGAN
from gzcli.store.jobs import OodJob


@pytest.fixture(autouse=True)
def _quick(request, monkeypatch):
    """Histograms, which take longer to draw than most scores, are drawn where files are tested. Components
    are those of few images."""
    monkeypatch.setattr(ood, "MAX_FITTED_IMAGES", 100)
    if request.function is not test_result_files_and_figures_agree:
        monkeypatch.setattr(ood, "histograms", lambda *args: None)


@pytest.fixture
def trained(tmp_path, monkeypatch):
    return fake_run(tmp_path, monkeypatch, scores)


def job(**changes):
    settings = {"run": "model", "ins": "digits", "outs": ("digits-ab",), "n": 120, "checkpoint": "last"}
    return OodJob(**settings | changes)


def run(folder, **changes):
    return ood.run(job(**changes), folder, torch.device("cpu"), Log())


def rows_of(folder, role=None):
    """The lines of `scores.csv`, of one role."""
    rows = csv.DictReader((folder / "scores.csv").open())
    return [row for row in rows if role in (None, row["role"])]


def first_of(split="test", n=6):
    """The first images of a split of the digits, as a batch."""
    return next(scan(open_pack("digits"), split, batch_size=n, levels=17, device="cpu"))


def test_result_files_and_figures_agree(trained, tmp_path):
    result = run(tmp_path)
    assert json.loads((tmp_path / "ood.json").read_text()) == json.loads(json.dumps(result))
    without_model = ["png", "mean", "knn_pixels", "pca", "pca_local"]
    rows, names = rows_of(tmp_path), ["nll", "typicality", "complexity", "far", *without_model]
    assert list(rows[0]) == ["set", "role", "index", "file", *names]
    sides = [("digits", "in")] * 120 + [("digits-ab", "out")] * 120
    assert [(row["set"], row["role"]) for row in rows] == sides
    assert [int(row["index"]) for row in rows[:120]] == subset(355, 120).tolist()
    assert min(Image.open(tmp_path / "histograms.png").size) > 300
    assert [(row["out"], row["score"], row["baseline"]) for row in result["results"]] == [
        ("digits-ab", name, name in without_model) for name in names
    ]
    for entry in result["results"]:  # every figure follows from scores.csv alone
        sides = ([float(row[entry["score"]]) for row in rows if row["role"] == s] for s in ("in", "out"))
        again = detection(*sides)
        assert {key: entry[key] for key in again} == again
    assert result["run"] == "model" and result["in"] == "digits" and result["positive"] == "out"
    nll = next(row["auroc"] for row in result["results"] if row["score"] == "nll")
    assert any("likelihood fails" in note for note in result["notes"]) == (nll < 0.5)


def test_nll_typicality_complexity_and_gradnorm_are_what_they_say(trained, tmp_path):
    run(tmp_path, n=60)
    rows, pack, index = rows_of(tmp_path, "in"), open_pack("digits"), subset(355, 60)
    expected = nll_of(trained, pack.images("test")[index])
    assert np.allclose([float(row["nll"]) for row in rows], expected, rtol=1e-5)
    held_out = nll_of(trained, pack.images("val")).mean()
    assert np.allclose([float(row["typicality"]) for row in rows], abs(expected - held_out), atol=1e-2)
    parts = scan(pack, "test", batch_size=99, levels=17, device="cpu", index=index)
    seen = np.concatenate([to_uint8(b.x).numpy() for b in parts])
    for row, image, value in zip(rows, seen, expected, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(image[0]).save(buffer, "PNG", optimize=True)
        assert float(row["png"]) == pytest.approx(buffer.tell())
        assert float(row["mean"]) == pytest.approx(image.mean())
        # other coders can only shorten it
        length = 8 * min(buffer.tell(), len(zlib.compress(image.tobytes(), 9)))
        assert value / math.log(2) - length <= float(row["complexity"]) + 0.1
    # for independent softmax pixels ∂ log p(x) / ∂ logits = onehot(x) − p
    norms = Scorer(trained, ["gradnorm"])(first_of(n=6))["gradnorm"]
    k = (np.asarray(open_pack("digits").images("test")[:6]).astype(int) * 17) >> 8
    gradient = np.eye(17)[k.reshape(6, -1)] - trained.model.table.numpy()
    assert np.allclose(norms, np.log(np.sqrt((gradient**2).sum((1, 2)))), rtol=1e-5)
    assert not any(p.requires_grad for p in trained.model.parameters())


def test_a_score_does_not_depend_on_its_batch_or_on_other_scores(trained):
    pack, values = open_pack("digits"), {}
    for names in (("nll", "gradnorm", "noisy"), ("noisy",)):
        for size in (10, 1):
            batches = scan(pack, "test", batch_size=size, levels=17, device="cpu", index=np.arange(20))
            parts = [Scorer(trained, names, seed=3)(batch) for batch in batches]
            values[names, size] = {name: np.concatenate([part[name] for part in parts]) for name in names}
        together, alone = values[names, 10], values[names, 1]
        assert all(np.allclose(together[name], alone[name], rtol=1e-6) for name in names)
    with_others = values[("nll", "gradnorm", "noisy"), 10]
    assert np.array_equal(together["noisy"], with_others["noisy"])
    second = Scorer(trained, ["noisy"], seed=4)(first_of(n=10))["noisy"]
    assert not np.allclose(second, together["noisy"][:10])


def test_ensemble_and_ratio_are_what_they_say(trained, tmp_path, monkeypatch):
    """Against scikit-learn's kernel densities at the same bandwidth (Scott's rule)."""
    from sklearn.neighbors import KernelDensity

    val, test = first_of("val", 60), first_of("test", 60)
    scorer = Scorer(trained, ["ensemble", "nll", "far", "noisy"])
    scorer.fit([val], [])
    seen, score = scorer(test), 0.0
    held = Scorer(trained, ["nll", "far", "noisy"])
    held.fit([val], [])
    fitted = held(val)
    bits = [code_length(to_uint8(batch.x).numpy()) for batch in (val, test)]
    for a, b in [*((fitted[name], seen[name]) for name in ("nll", "far", "noisy")), bits]:
        width = a.std(ddof=1) * len(a) ** (-1 / 5)
        score = score - KernelDensity(bandwidth=width).fit(a[:, None]).score_samples(b[:, None])
    np.testing.assert_allclose(seen["ensemble"], score, rtol=1e-6)
    far = np.full_like(seen["nll"], 1e6)
    assert np.isfinite(scorer.fitted["ensemble"]["nll"].logpdf(far)).all(), "far images have a finite score"
    flat = Pixelwise(trained.info, table=torch.full_like(trained.model.table, 1 / 17))
    background = fake_run(tmp_path, monkeypatch, scores, model=flat, name="flat")
    batch = first_of(n=6)
    scorer = Scorer(trained, ["nll", "ratio"], background=background)
    values = scorer(batch)
    assert np.allclose(values["ratio"], values["nll"] - 256 * math.log(17), rtol=1e-5)
    error = refused("", Scorer, trained, ["ratio"], error=MissingError)
    assert "gz train pixelwise --data digits --set data.augment=[mutate]" in error.hint


@dataclass(frozen=True)
class FarOptions:
    power: float = 3.0
    scale: float = 1.0


def test_options_reach_the_scores_that_take_them_also_in_a_dataclass(trained, tmp_path, monkeypatch):
    batch = first_of(n=9)
    plain, squared = Scorer(trained, ["far"]), Scorer(trained, ["far"], options={"power": 2.0, "other": 1})
    plain.fit([batch], [])
    assert np.allclose(plain(batch)["far"] ** 2, squared(batch)["far"], rtol=1e-5)
    assert squared.unused == ["other"]
    refused("has the option `powr`", run, tmp_path, scores=("far",), n=20, options={"powr": 0.0})

    def score_far(self, x, *, noise, far: FarOptions = FarOptions(scale=5.0), shift: float = 0.0):
        return torch.full((len(x),), far.scale * 2.0**far.power + shift)

    monkeypatch.setattr(Pixelwise, "score_far", score_far)
    for options, value in (({}, 40), ({"power": 2.0}, 20), ({"scale": 1.0, "shift": 7.0}, 15)):
        scorer = Scorer(trained, ["far"], options=options)
        assert scorer(batch)["far"].tolist() == [value] * 9 and scorer.unused == []
    assert Scorer(trained, ["far"], options={"far": 1}).unused == ["far"]
    assert flat_defaults(trained.model.score_far)["scale"] == 5.0


def test_fits_see_the_same_images_whatever_n_is(trained, tmp_path, monkeypatch):
    """Statistics those of held-out images, the bank of `knn` those of training images."""
    monkeypatch.setattr(Pixelwise, "fit_knn", Pixelwise.fit_far, raising=False)
    monkeypatch.setattr(Pixelwise, "score_knn", Pixelwise.score_noisy, raising=False)
    monkeypatch.setattr(Pixelwise, "fitted_on_train", ("knn",))
    for score, split in (("far", "val"), ("knn", "train")):
        images = torch.from_numpy(np.array(open_pack("digits").images(split)))
        for n in (10, None):
            run(tmp_path, scores=(score,), n=n)
            seen = torch.cat([batch.x for batch in trained.model.fitted])
            assert torch.allclose(seen, ((images.long() * 17) >> 8) / 8 - 1), (score, n)
    # a bank of the trial's 16 images has no twenty neighbours
    model = WGAN.of(trained.info, width=8, latent=4)
    fake_run(tmp_path, monkeypatch, scores, model=model, name="wgan")
    monkeypatch.setattr(scores, "affordable", lambda *args: 20)
    result = run(tmp_path, run="wgan", scores=("knn",), n=None, options={"k": 20})
    assert len(model.bank) == len(open_pack("digits").images("train"))
    assert result["results"][0]["score"] == "knn"


def test_fits_are_made_once(home, trained, tmp_path, monkeypatch):
    """Of the same weights, images and options; a model from outside may keep anything, and is fitted anew."""
    monkeypatch.setattr(ood, "histograms", lambda *args: None)
    fits = []

    def counted(kind, method):
        fit = getattr(kind, method)
        monkeypatch.setattr(
            kind, method, lambda self, *words, **how: fits.append(method) or fit(self, *words, **how)
        )

    def scored(**changes):
        model = WGAN.of(trained.info, width=8, latent=4)
        model.load_state_dict(weights)
        fake_run(tmp_path, monkeypatch, scores, model=model, name="wgan")
        how = {"scores": ("knn", "local"), "options": {"starts": 2, "steps": 3}}
        return run(tmp_path, run="wgan", n=10, **how | changes)["results"]

    counted(WGAN, "fit_knn"), counted(Pixelwise, "fit_far")
    weights = WGAN.of(trained.info, width=8, latent=4).state_dict()
    (tmp_path / "wgan").mkdir()
    (tmp_path / "wgan" / "model.safetensors").write_bytes(b"x")
    first = scored()
    assert scored() == first and fits == ["fit_knn"]
    assert len(list((home / "fits").glob("*.npz"))) == 1
    scored(seed=1), scored(scores=("knn",), options={})
    assert fits == ["fit_knn"] * 3
    (tmp_path / "wgan" / "model.safetensors").write_bytes(b"xy")  # other weights
    scored()
    (stored, *_) = (home / "fits").glob("*.npz")
    for path in (home / "fits").glob("*.npz"):
        path.write_bytes(stored.read_bytes()[:50])  # a damaged file is made again
    assert scored() == first and fits == ["fit_knn"] * 5
    for _ in range(2):
        run(tmp_path, scores=("far",), n=10)
    assert fits[5:] == ["fit_far"] * 2


def test_rebuilt_images_are_also_compared_by_the_features_of_the_set(trained, tmp_path, monkeypatch):
    """Without LPIPS's weights by those of a LeNet, which then moves the score; `pixels` leaves it out."""
    monkeypatch.setattr("gzcli.judge.images.FITTED_IMAGES", 12)
    model = DDPM.of(trained.info, channels=8, mult=(1,), attention=(), timesteps=20)
    fake_run(tmp_path, monkeypatch, scores, model=model, name="ddpm")
    jobs = [job(run="ddpm", scores=("recon",), n=12, options={"pixels": pixels}) for pixels in (False, True)]
    with_features, alone = (ood.run(each, tmp_path, torch.device("cpu"), Log()) for each in jobs)
    assert with_features["perceptual"].startswith("lenet ")
    assert with_features["results"][0]["auroc"] != alone["results"][0]["auroc"]
    assert run(tmp_path, n=12)["perceptual"] is None


def test_scores_that_there_are_and_are_not(trained, monkeypatch):
    """A likelihood by an ODE has no gradient, and `ratio` needs a background."""
    fm = FM.of(trained.info, channels=8, mult=(1,), attention=())
    names = set(computable(replace(trained, model=fm.eval()), background=False))
    assert {"nll", "typicality", "complexity", "ensemble"} < names and not {"gradnorm", "ratio"} & names
    assert {"gradnorm", "ratio"} < set(computable(trained, background=True))
    for score in ("nlll", "fara"):
        refused(f"no score `{score}`", choose, trained, [score], hint="did you mean")
    monkeypatch.setattr(Pixelwise, "likelihood", "ode")  # which is computed without a gradient
    refused("`gradnorm` needs a gradient", choose, trained, ["gradnorm"])
    monkeypatch.delattr(Pixelwise, "log_prob")
    refused("has no likelihood", choose, trained, ["nll"])


def test_a_benchmark_has_groups_a_version_and_names_what_is_missing(trained, tmp_path, monkeypatch, capsys):
    """Offline and with an empty cache every set is named with what would fetch it."""
    result = run(tmp_path, outs=("patches", "digits-ab"))
    rows = result["results"]
    assert any("`patches` was resized to 16×16 and converted to grey" in n for n in result["notes"])
    assert all(row["resized"] == (row["out"] == "patches") for row in rows)
    toy = Benchmark("toy", "digits", ("digits-ab", "svhn"), ("patches",))
    table = ood.with_group_means(rows, toy)
    named = ["digits-ab", "mean of near", "patches", "mean of far"]
    assert [row["out"] for row in table if row["score"] == "nll"] == named
    mean = next(row for row in table if row["out"] == "mean of far" and row["score"] == "nll")
    single = next(row for row in rows if row["out"] == "patches" and row["score"] == "nll")
    assert mean["auroc"] == single["auroc"] > 0.9 and mean["group"] == "far"
    said = ood.notes(rows, {"digits-ab": open_pack("digits-ab")}, 17, toy, job())
    assert said[0].startswith("omitted from `toy`: svhn, patches;")
    benchmark = scoring.benchmark_of("OpenOOD_CIFAR10", None, ())
    assert benchmark.inside == "cifar10" and benchmark.near == ("cifar100", "tinyimagenet")
    refused("defines its own data sets", scoring.benchmark_of, "openood-mnist", "cifar10", ())
    refused("there is no benchmark `openood`", scoring.benchmark_of, "openood", None, ())
    with pytest.raises(MissingError, match="no out-of-distribution data set"):
        scoring.available_sets(benchmark, DataSection(size=32, channels=3), out.info)
    messages = capsys.readouterr().err
    assert all(f"`{name}`" in messages for name in (*benchmark.near, *benchmark.far))
    assert "gz data download" in messages
    # OpenOOD v1 takes in-distribution images as positive, v1.5 foreign ones; MNIST's benchmark is of v1
    row = {"out": "b", "score": "far", "auroc": 0.9, "n_out": 9, "beats_baselines": True}
    for benchmark, words in (
        ("openood-mnist", ("OpenOOD v1,", "`fpr95_id`: the share of foreign images that is accepted")),
        ("openood-cifar10", ("OpenOOD v1.5,", "`fpr95`: the share of in-distribution images that is")),
        (None, ("`fpr95` (OpenOOD v1.5):", "`fpr95_id` (ODIN, OpenOOD v1):")),
    ):
        notes = ood.notes([row], {}, 17, find_benchmark(benchmark) if benchmark else None, job())
        (line,) = (note for note in notes if "OpenOOD v1" in note)
        assert all(word in line for word in words), benchmark


def test_notes_on_directions_are_printed_only_where_they_apply():
    """A likelihood that fails on images with larger PNGs fails for another reason than simplicity."""

    def count(words: str, **figures: float) -> int:
        rows = [{"out": "b", "score": score, "auroc": auroc, "n_out": 9} for score, auroc in figures.items()]
        rows = [row | {"baseline": row["score"] in BASELINES} for row in rows]
        return sum(words in note for note in ood.notes(rows, {}, 17, None, job()))

    assert count("likelihood fails", nll=0.1, png=0.2) == 1
    assert count("likelihood fails", nll=0.1, png=0.9) == count("likelihood fails", nll=0.9, png=0.2) == 0
    assert count("either direction", mean=0.1) == 1 and count("either direction", mean=0.9) == 0


def test_what_is_worse_than_chance_is_not_called_as_good_as_a_baseline():
    """`kl` at .22 is neither level with `png` at .9 nor with `mean` at .05, which is worth .95."""
    figures = {"local": 0.95, "nll": 0.97, "kl": 0.22, "png": 0.9, "mean": 0.05}
    rows = [{"out": "b", "score": s, "auroc": v, "baseline": s in BASELINES} for s, v in figures.items()]
    level, worse = ood.beside_baselines(rows, "b")
    assert level.startswith("on `b`, `local` and `kl` have no higher AUROC than the baseline `mean`, ")
    assert (
        level.endswith("(0.950)")
        and worse == "on `b`, `kl` has an AUROC below .5, which is worse than chance"
    )
    assert ood.beside_baselines([row for row in rows if row["score"] not in ("local", "kl")], "b") == []
    assert ood.beside_baselines(rows, "the set itself") == []


def test_baselines_of_a_binary_run_are_of_the_sets_own_bytes(trained, tmp_path, monkeypatch):
    fake_run(tmp_path, monkeypatch, scores, model=fitted(levels=2), name="binary")
    result = run(tmp_path, run="binary", scores=("nll",), n=40)
    assert any("binarized" in note and "before binarization" in note for note in result["notes"])
    rows = rows_of(tmp_path)
    for role, name in (("in", "digits"), ("out", "digits-ab")):
        images = open_pack(name).images("test")[subset(355, 40)]
        of_role = [row for row in rows if row["role"] == role]
        assert np.allclose([float(row["png"]) for row in of_role], png_size(images))
        assert np.allclose([float(row["mean"]) for row in of_role], pixel_mean(images))


@pytest.fixture
def pictures(tmp_path):
    """Makes a folder of 16×16 pictures from names and grey levels."""

    def make(folder, names):
        for i, name in enumerate(names):
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((16, 16), 10 * i, np.uint8)).save(path)
        return str(tmp_path / folder)

    return make


FOLDERS = {  # the pictures, and which of them are scored where it is not all
    "flat": ([f"{i}.png" for i in range(23)], None),
    "two": (["one.png", 'a, "b".png'], None),
    "only test": (["test/x.png", "test/y.png", "test/z.png"], None),
    "train and test": (["train/a.png", "train/b.png", "train/c.png", "test/d.png"], ["test/d.png"]),
    "classes": (["cat/a.png", "cat/b.png", "dog/c.png"], None),
    "train and val": (["train/a.png", "val/b.png", "train/c.png"], None),
    "mixed": (["a.png", "trip/b.png", "trip/test/c.png"], None),
    "in a folder": (["m/val/a.png", "m/test/x/b.png", "m/test/c.png"], ["m/test/x/b.png", "m/test/c.png"]),
    "unlabelled test": (["train/cat/a.png", "train/dog/b.png", "test/c.png"], ["test/c.png"]),
}


def test_a_foreign_folder_is_scored_whole_or_its_subset_told(trained, tmp_path, monkeypatch, pictures):
    for which, (names, scored) in FOLDERS.items():
        folder = pictures(which, names)
        result = run(tmp_path, outs=(folder,), scores=("nll",), n=None, full=True)
        rows = rows_of(tmp_path, "out")
        assert sorted(row["file"] for row in rows) == sorted(scored or names), which
        assert {row["set"] for row in rows} == {folder} and result["names"][folder] == which
        mean = {row["file"]: float(row["mean"]) for row in rows}
        assert mean == {name: 10 * names.index(name) for name in mean}, which
    folder = pictures("own", [f"{i}.png" for i in range(20)])
    notes = run(tmp_path, outs=(folder,), scores=("nll",), n=12)["notes"]
    assert any(
        "12 of the 20 images of `own` were scored; use `--full` to score all" in note for note in notes
    )
    for sides in ({"ins": folder, "outs": (folder,)}, {"outs": ("digits",)}):
        refused("both", run, tmp_path, **sides)
    trained.model.broken = True
    with pytest.raises(DivergedError, match=r"`far` is not finite for \d+ of \d+ images of `digits`"):
        run(tmp_path, scores=("far",))


def test_a_path_with_a_comma_is_one_set(home, tmp_path, monkeypatch):
    """Exact match first: a comma parts only what is no set as it stands."""
    monkeypatch.chdir(tmp_path)
    for name in ("a, b", "c"):
        (tmp_path / name).mkdir()
    for words, names in {
        "a, b": ["a, b"],
        f"{tmp_path}/a, b": [f"{tmp_path}/a, b"],
        "a,b": ["a", "b"],
        "mnist,a, b,c": ["mnist", "a, b", "c"],
        "mnist, fashionmnist,": ["mnist", "fashionmnist"],
    }.items():
        assert ood_verb.split_sets(words) == names


def test_the_table_has_intervals_and_fits_a_terminal(capsys):
    row = {"out": "/x/fashionmnist", "score": "knn_pixels", "baseline": True, "n_in": 500, "n_out": 500}
    row |= {"auroc": 0.98765, "fpr95": 0.05, "fpr95_id": 0.1, "aupr_in": 0.9, "aupr_out": 0.9}
    row |= {"ci": {"auroc": [0.981, 0.9939], "fpr95": [0.04, 0.06]}}
    out.configure(json=False, quiet=False)
    result = {"in": "mnist", "names": {"mnist": "mnist", "/x/fashionmnist": "fashionmnist"}, "results": [row]}
    ood_verb.show(result)
    output = capsys.readouterr()
    assert "knn_pixels*" in output.out and ".981–.994" in output.out and ".040–.060" in output.out
    assert max(map(len, output.out.splitlines())) <= 80
    assert "500 of `fashionmnist` (out)" in output.err
    mean = row | {"out": "mean of near", "ci": None}
    ood_verb.show(result | {"results": [row, mean]})
    assert "mean of near" in capsys.readouterr().out


def test_bins_show_both_sides_however_far_apart():
    """An ELBO of 10⁹ for one set left the other a single bar."""
    rng = np.random.default_rng(0)
    near, far = rng.normal(100, 20, 1000), np.exp(rng.normal(20, 1, 1000))
    bins, scale = score_bins([near, far])
    assert scale is not None and (np.diff(bins) > 0).all()
    for values in (near, far):
        assert (np.histogram(values.clip(bins[0], bins[-1]), bins)[0] > 0).sum() >= 5
        assert np.histogram(values.clip(bins[0], bins[-1]), bins)[0].sum() == 1000
    assert np.allclose(scale[1](scale[0](near)), near)
    bins, scale = score_bins([near, near + 60])
    assert scale is None and np.allclose(np.diff(bins), bins[1] - bins[0])
    bins, scale = score_bins([np.ones(9), np.ones(9)])
    assert scale is None and bins[0] < 1 < bins[-1]


@pytest.mark.parametrize(("there", "warned"), [(6, []), (900, ["8 minutes for 500 images"])])
def test_scores_that_need_longer_than_the_budget_are_announced(there, warned, monkeypatch):
    """By the images that there are, which may be fewer than the fewest of a budget."""
    monkeypatch.setattr(scores, "timed", lambda function, device: 16.0)  # of 16 images
    home, said = open_pack("digits"), []
    trial = Batch(torch.zeros(16, 1), None, torch.arange(16), None, {})

    def picks(n):
        return {"in": scores.Pick(home, "test", np.arange(min(n, there)))}

    runs = [scores.FittedRun(len, trial, 300.0)]
    assert scores.afford(runs, picks, 1, SimpleNamespace(warn=said.append)) == 500
    assert [text.partition("about ")[2].partition(";")[0] for text in said] == warned


def test_an_ensemble_scores_as_many_images_as_suit_each_run(monkeypatch):
    monkeypatch.setattr(scores, "timed", lambda function, device: function())
    trial = Batch(torch.zeros(10, 1), None, torch.arange(10), None, {})
    runs = [scores.FittedRun(lambda x, s=s: 10 * s, trial, left) for s, left in ((0.02, 280), (0.06, 288))]

    def picks(n):
        return dict.fromkeys(("in", "out"), scores.Pick(open_pack("digits"), "test", np.arange(n)))

    for order in (runs, runs[::-1]):
        assert scores.afford(order, picks, 1, SimpleNamespace()) == 1200, "288 s for 2 runs and 2 sets"


def test_without_n_the_budget_decides_and_full_takes_all(trained, tmp_path, monkeypatch):
    assert [affordable(seconds, 300, 2) for seconds in (0.1, 10, 1e-6)] == [1500, 500, 10_000]
    small, large = subset(1000, 100), subset(1000, 300)
    assert (np.diff(small) > 0).all() and set(small) <= set(large) and len(large) == 300
    assert np.array_equal(subset(50, 500), np.arange(50))
    names = short_paths(["mnist", "/home/me/photos", "/data/a/photos", "/data/faces"])
    assert list(names.values()) == ["mnist", "me/photos", "a/photos", "faces"]
    calls = []
    monkeypatch.setattr(scores, "affordable", lambda *spent: calls.append(spent) or 40)
    result = run(tmp_path, scores=("nll",), n=None)
    assert result["results"][0]["n_in"] == result["results"][0]["n_out"] == 40
    ((seconds, budget, sets),) = calls
    assert 0 < seconds < 1 and 290 < budget < 300 and sets == 2  # what the fit took is spent
    result = run(tmp_path, scores=("nll",), n=None, full=True)
    assert result["results"][0]["n_in"] == 355


def test_what_the_engine_must_know_of_scores_is_told_by_the_model():
    """Which scores take an optimisation an image, are fitted on training images, or compare images by eye."""
    for name, card in catalog.cards().items():
        model = catalog.load(name)
        assert set(model.costly) == {"regret", "inversion"} & card.scores.keys(), name
        assert set(model.fitted_on_train) == {"knn"} & card.scores.keys(), name
        by_eye = {score for score, keys in card.scores.items() if "pixels" in keys}
        assert set(model.perceptual_scores) == by_eye and not set(card.scores) & set(BASELINES), name


@pytest.mark.parametrize("installed", [True, False])
def test_pictures_in_colour_have_neighbours_in_features(monkeypatch, installed):
    """Against a scan of all distances between unit vectors."""

    class Space:
        def features(self, images):
            return np.asarray(images).mean((2, 3)) + 1

    monkeypatch.setattr(ood.networks, "is_installed", lambda: installed)
    monkeypatch.setattr(ood, "MAX_BANK_IMAGES", 400)
    monkeypatch.setattr(ood.pretrained, "lite", lambda device: Space())
    home, foreign = open_pack("patches"), open_pack("digits", size=32, channels=3)
    picks = {p.meta.name: scores.Pick(p, "test", np.arange(12)) for p in (home, foreign)}
    tables = ood.baseline_scores(picks, home, torch.device("cpu"))
    names = ["png", "mean", "knn_pixels", "pca", "pca_local", *(["knn_lite"] if installed else [])]
    assert [list(table) for table in tables.values()] == [names] * 2
    if installed:
        index = subset(home.meta.counts["train"], 100)
        rows = map(Space().features, (home.images("train")[index], foreign.images("test")[:12]))
        bank, seen = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in rows)
        nearest = np.linalg.norm(seen[:, None] - bank, axis=2).min(1)
        np.testing.assert_allclose(tables["digits"]["knn_lite"], nearest, atol=1e-7)
    rows = ood.compare(tables, {"digits": foreign}, [])
    assert [row["score"] for row in rows] == names
