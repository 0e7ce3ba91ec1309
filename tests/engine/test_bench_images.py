"""`gz bench` on images from anywhere: read, named, and compared as samples are."""

import json
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import peers
import pytest
import torch
from PIL import Image
from pixelwise import fake_run, fitted
from refused import refused

from gzcli.cli import bench as bench_verb
from gzcli.core.errors import MissingError
from gzcli.data.packs.open import open_pack
from gzcli.engine.log import Log
from gzcli.judge import bench
from gzcli.judge.bench import json_figures
from gzcli.judge.contestants import Contestant, PackOptions, labels_in, read, tell_apart
from gzcli.judge.real import ImageSet
from gzcli.launch.comparing import find_contestants, images_at
from gzcli.metrics.features import lenet
from gzcli.metrics.interval import Interval
from gzcli.metrics.metric import column_of
from gzcli.metrics.quality import worth
from gzcli.metrics.quality.fd import frechet_distance
from gzcli.metrics.second import second
from gzcli.metrics.selection import choose
from gzcli.store import runs
from gzcli.store.jobs import BenchJob


@pytest.fixture(scope="module")
def digits():
    return open_pack("digits")


@pytest.fixture(scope="module")
def paths(digits, tmp_path_factory):
    """The test split as an npz; every fifth training image as PNGs, twice as large, in a folder and a zip."""
    folder = tmp_path_factory.mktemp("images")
    test, train = np.asarray(digits.images("test")), np.asarray(digits.images("train"))[::5]
    np.savez(folder / "same.npz", samples=test.transpose(0, 2, 3, 1), labels=digits.labels("test"))
    (folder / "train").mkdir()
    with zipfile.ZipFile(folder / "train.zip", "w") as archive:
        for i, image in enumerate(train):
            path = folder / "train" / f"{i:03}.png"
            Image.fromarray(image[0]).resize((32, 32), Image.Resampling.NEAREST).save(path)
            archive.write(path, path.name)
    return folder


def run(tmp_path, *images, runs=(), **changes):
    job = replace(BenchJob(runs, "digits", ("fd",), images=tuple(map(str, images))), **changes)
    return bench.run(job, tmp_path, torch.device("cpu"), Log())


def test_a_set_against_itself_is_at_nought_and_the_floor_is_of_as_many_images(paths, digits, tmp_path):
    metrics = ("fd", "prc_lenet", "swd", "classes", "memory")
    result = run(tmp_path, paths / "same.npz", paths / "train", metrics=metrics)
    same, train = result["rows"]
    for name in ("fd", "swd"):
        assert same["metrics"][name] == pytest.approx(0, abs=1e-6) and same["intervals"][name][0] == 0
    assert all(same["metrics"][f"{name}_lenet"] == 1 for name in ("precision", "recall", "coverage"))
    assert same["metrics"]["label_accuracy"] == pytest.approx(lenet(digits).accuracy)
    assert (same["n"], train["n"]) == (355, 260) and [f["n"] for f in result["floors"]] == [355, 260]
    for floor in result["floors"]:
        assert floor["metrics"]["fd"] == pytest.approx(np.mean(floor["draws"]["fd"]))
    assert result["provenance"]["floor_draws"] == result["floors"][0]["draws"]
    assert (same["name"], same["model"], same["run"]) == ("same.npz", None, None)
    for said in ("260 grey images of 16×16, resized from 32×32; fewer than", "floor for the same number"):
        assert any(said in note for note in result["notes"]), said
    # copies of training images are told from images that were not trained on
    assert train["metrics"]["authenticity"] < 0.2 < result["floor"]["authenticity"]
    assert train["metrics"]["duplicates"] > 0.5
    assert result["floor"]["duplicates"] == pytest.approx(0.01, abs=5e-3)
    assert result["directions"]["duplicates"] == "down" and result["directions"]["authenticity"] == "up"
    assert min(Image.open(result["neighbours"]).size) > 100


def test_a_folder_and_a_zip_of_equal_pictures_are_equal_and_beside_runs(paths, tmp_path, monkeypatch):
    fake_run(tmp_path, monkeypatch, bench, model=fitted(), name="plain")
    result = run(tmp_path, paths / "train", paths / "train.zip", runs=("plain",), n=60)
    plain, folder, archive = result["rows"]
    assert folder["metrics"] == archive["metrics"] and folder["n"] == plain["n"] == 60
    assert (plain["run"], folder["path"]) == ("plain", str(paths / "train"))
    assert folder["metrics"]["fd"] < plain["metrics"]["fd"]
    assert folder["intervals"]["fd"][1] < plain["intervals"]["fd"][0], "the intervals are apart"
    assert any("260 grey images" in note and "60 of them" in note for note in result["notes"])


def test_labels_of_images_are_numbers_of_the_same_classes(digits, tmp_path):
    def labelled(*classes):
        path, n = tmp_path / f"{'-'.join(classes)}.npz", len(classes)
        np.savez(path, images=np.zeros((n, 16, 16), np.uint8), labels=np.arange(n), class_names=classes)
        return open_pack(path, foreign=True)

    fruit = labelled("apple", "fig", "pear")
    assert labels_in(digits, labelled("7", "3")).tolist() == [7, 3]
    assert labels_in(digits, fruit) is None, "other classes"
    assert labels_in(fruit, labelled("pear", "apple")).tolist() == [2, 0]
    assert labels_in(fruit, labelled("0", "1", "2")).tolist() == [0, 1, 2], "numbers, without names"


def test_the_real_side_is_a_split_or_all_or_statistics(paths, digits, tmp_path):
    net, train = lenet(digits), digits.images("train")
    result = run(tmp_path, paths / "same.npz", split="train", n=100, export_stats=str(tmp_path / "s.npz"))
    some = run(tmp_path, paths / "same.npz", n=100, stats=str(tmp_path / "s.npz"))
    assert result["provenance"]["n_real"] == len(train) and result["provenance"]["split"] == "train"
    assert any("mean and covariance in" in note for note in some["notes"])
    assert some["rows"][0]["metrics"]["fd"] == pytest.approx(result["rows"][0]["metrics"]["fd"], rel=1e-9)
    with np.load(tmp_path / "s.npz") as held:
        features = net.features(train)
        assert held["mu"] == pytest.approx(features.mean(0)) and held["n"] == len(train)
        assert held["sigma"] == pytest.approx(np.cov(features, rowvar=False))
    np.savez(tmp_path / "wide.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    refused("`fd` has 64 features", run, tmp_path, paths / "same.npz", stats=str(tmp_path / "wide.npz"))
    np.savez(tmp_path / "other.npz", mu=np.zeros(64), sigma=np.eye(64), features="another")
    refused("a different network from", run, tmp_path, paths / "same.npz", stats=str(tmp_path / "other.npz"))


def test_metrics_with_too_few_real_images_are_omitted_or_refused(paths, digits, tmp_path, monkeypatch):
    """The usual ones are omitted. Named ones are refused before a judge is trained."""
    arrays = {"images": digits.images("train")[:60, 0], "labels": digits.labels("train")[:60]}
    np.savez(few := tmp_path / "few.npz", **arrays, class_names=list(map(str, range(10))))
    least = f"`prc_lenet` needs at least 12 test images, but `{few}` has 6"
    with monkeypatch.context() as patched:
        patched.setattr(bench, "lenet", lambda *_, **how: pytest.fail("trained"))
        named = {"data": str(few), "metrics": ("fd", "prc_lenet")}
        refused(least, run, tmp_path, paths / "train", hint="use `--split all`, or omit it", **named)
    for judge in (lenet, second):
        monkeypatch.setattr(bench, judge.__name__, lambda pack, judge=judge, **how: judge(digits))
    result = run(tmp_path, paths / "train", data=str(few), metrics=None, n=60)
    within = f"`fd_class` needs at least 11 test images, but `{few}` has 6"
    for message in (least, within):
        assert f"omitted: {message}; use `--split all`" in result["notes"]
    assert "fd" in result["floor"] and "precision_lenet" not in result["floor"]
    assert {"prc_lenet", "fd_class"} <= {*choose(None, open_pack(few).meta, "all")}


def test_worth_is_of_labelled_samples(paths, tmp_path, monkeypatch):
    """One step of training shows what is trained on what; the figure itself is tested where it is made."""
    monkeypatch.setattr(worth, "worth", partial(worth.worth, steps=1, seeds=2))
    result = run(tmp_path, paths / "same.npz", paths / "train", metrics=("worth",), n=100)
    labelled, without = result["rows"]
    expected = {"worth_real", "worth_samples", "worth_both", "worth_both_gain", "worth_filled_balanced_gain"}
    assert expected <= labelled["metrics"].keys() and expected <= labelled["intervals"].keys()
    assert without["metrics"] == {} and expected <= result["floor"].keys()
    assert result["directions"]["worth_both_gain"] == "up"
    assert any("labels" in note for note in result["notes"])


def test_samples_of_a_peer_are_read_as_they_are(digits, tmp_path, monkeypatch):
    """What `tests/tools/peers.py` writes, in the form of MNIST; its training ends when its time is up."""

    def fake(images, labels, settings, clock, folder):
        def train() -> None:
            while True:
                clock.tick()

        clock.run(train)
        return lambda labels: torch.from_numpy(images) / 255

    peer = peers.Peer(fake, "torch", "none", {}, conditional=True)
    monkeypatch.setitem(peers.PEERS, "fake", peer)
    images = np.random.default_rng(0).integers(256, size=(120, 1, 28, 28), dtype=np.uint8)
    peers.train("fake", images, None, 0.1, 120, out := tmp_path / "fake.npz")
    facts = json.loads(out.with_suffix(".json").read_text())
    assert facts["steps"] > 0 and 0.1 <= facts["train_cpu_seconds"] < 0.5
    form = PackOptions(size=28, channels=1, fit="crop", patch=None)
    image_set = read(str(out), digits, form, 120, Log()).images
    assert np.array_equal(image_set.images, images) and np.array_equal(image_set.labels, np.arange(120) % 10)


def test_the_simplest_model_draws_each_mode_of_its_images(tmp_path):
    """Two grey levels with noise: samples have both levels, in both halves of the file."""
    noise = np.random.default_rng(0).integers(20, size=(1200, 3, 6, 6))
    images = (noise + 150 * (np.arange(1200) % 2)[:, None, None, None]).astype(np.uint8)
    peers.train("scikit-learn", images, None, 60, 200, out := tmp_path / "simplest.npz")
    facts = json.loads(out.with_suffix(".json").read_text())
    assert facts["steps"] >= 1 and facts["train_cpu_seconds"] < 60
    drawn = np.load(out)["samples"]
    assert drawn.shape == (200, 6, 6, 3)
    for half in np.split(drawn.mean((1, 2, 3)), 2):
        assert set(np.round(half / 150).astype(int)) == {0, 1} and abs((half > 85).mean() - 0.5) < 0.15
        assert np.allclose(half % 150, 9.5, atol=6)


def test_contestants_and_their_features(digits):
    paths = ("/a/x/im.zip", "/a/y/im.zip", "/b.npz", "/b.npz")
    some = [Contestant(Path(path).name, ImageSet(np.zeros(0)), path) for path in paths]
    tell_apart(some)
    assert [c.name for c in some] == ["x/im.zip", "y/im.zip", "b.npz", "b.npz (2)"]
    figures = json_figures("floor", {"fd": Interval(2.0, 1.0, 3.0), "own": Interval(4.0)})
    wanted = {"floor": {"fd": 2.0, "own": 4.0}, "floor_intervals": {"fd": [1.0, 3.0]}}
    assert json.loads(json.dumps(figures)) == wanted
    net, rows = lenet(digits), np.array([3, 40, 41])
    whole = ImageSet(digits.images("test"))
    before = whole.take(rows).features(net)
    assert whole.features(net).shape == (355, 64)
    assert np.array_equal(whole.take(rows).features(net), whole.features(net)[rows])
    assert np.allclose(before, whole.features(net)[rows], atol=1e-4)
    assert frechet_distance(before, whole.take(rows).features(net)) == pytest.approx(0, abs=1e-3)


def test_words_are_runs_models_or_images(home, paths, tmp_path, monkeypatch):
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    for name in ("grid.png", "job.json"):
        (drawn / name).write_bytes(b"{}")
    refused("only a sheet of samples", images_at, str(drawn))
    (drawn / "images").symlink_to(paths / "train")
    assert images_at(str(drawn)) == str(drawn / "images")
    monkeypatch.chdir(paths)
    run = runs.create("vae", "digits", alias="mine")
    run.update(state="finished")
    (run.path / "run.yaml").write_text("model: {name: vae}\ndata: {name: digits}\n")
    (run.path / "model.safetensors").write_bytes(b"x")
    source, named, images = find_contestants(["vae", "./train", "mine", "same.npz", "mnist"], None)
    assert source.key == "digits" and [word for _, word in named] == ["vae", "mine"]
    assert images == [str(paths / "train"), str(paths / "same.npz"), "mnist"]
    assert find_contestants([], None)[1][0][0] == run, "every model with a run on the set of the newest"
    refused("pass `--data`", find_contestants, ["./train"], None)
    refused("not a run, a model, or a folder", find_contestants, ["mine", "./absent"], None)
    error = refused("no model or run is called `vaee`", find_contestants, ["vaee"], None)
    assert "did you mean `vae`" in error.hint
    (paths / "notes.txt").write_text("no images")
    refused("", images_at, "./notes.txt")
    refused("no finished run on `mnist`", find_contestants, [], "mnist", error=MissingError)


def test_the_table_fits_and_names_what_it_leaves_out(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    names = ["fd_lite", "kid_lenet", "precision_lenet", "recall_lenet", "density_lenet", "swd", "tv", "bpd"]
    names += ["recon", "samples_per_s"]
    values = {name: 1234.5678 + i for i, name in enumerate(names)}
    ends = {name: [value - 2, value + 2] for name, value in values.items()}
    row = {"name": "a-name", "metrics": values, "intervals": ends, "params": 12345, "seconds": 3.0}
    floor = {"n": 200, "images": 150, "metrics": {"fd_lite": 1.0}, "intervals": {}, "drawn": "random"}
    way = {name: column_of(name).better for name in names}
    result = {"rows": [row], "floors": [floor], "directions": way, "biased": {"200": ["fd_lite"]}}
    bench_verb.table(result)
    printed, progress = capsys.readouterr()
    head, *lines = printed.splitlines()
    assert max(map(len, printed.splitlines())) <= 80 and head.split()[:3] == ["name", "fd_lite~↓", "±"]
    assert "precision↑" in head and "recall↑" in head and "(real images, 150)" in lines[-1]
    assert "omitted to save space" in progress and "seconds" in progress and "density_lenet" in progress
    bench_verb.table(result, wide=True)
    head, line, *_ = capsys.readouterr().out.splitlines()
    assert "params" in head and " 12.3K " in line
    assert head.count("±") == len(names) and "recon " in head and "samples_per_s↑" in head
