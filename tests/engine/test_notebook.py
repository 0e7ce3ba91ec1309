"""The steps that a researcher takes in a notebook, from an array to a comparison, each a call of gzcli."""

from __future__ import annotations

import builtins
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import in_process
from PIL import Image

import gzcli
from gzcli.data.readers import memory
from gzcli.launch import launcher
from gzcli.store import model_files

NAMES = ("ant", "bee", "cow")
SMALL = {"model.net": "mlp", "model.hidden": (16,), "model.latent": 2, "model.conditional": True}
SMALL |= {"train.log_every": 5, "train.best": "loss", "train.eval_every": 10, "train.batch_size": 16}
N = 90


def images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


X = images(N, 16, 16)
Y = np.arange(N) % 3


@pytest.fixture(scope="module", autouse=True)
def _home(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("GZ_HOME", str(tmp_path_factory.mktemp("notebook")))
    patch.setattr(model_files, "_typed", {})
    yield
    patch.undo()


@pytest.fixture(scope="module")
def run(_home) -> gzcli.Run:
    """By a training in this process; that of tests/engine/test_api.py is one of its own."""
    labels = np.array(NAMES)[Y]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "run", in_process)
        return gzcli.train("vae", data=(X, labels), steps=20, name="mine", cpu=True, set=SMALL, quiet=True)


def packed(data, split="train") -> np.ndarray:
    """The images of a set in the order in which they were given: those that a split was drawn from."""
    pack = gzcli.open_data(data)
    if split != "train":
        return np.asarray(pack.images(split))
    parts = [np.asarray(pack.images(name)) for name in ("train", "val", "test")]
    return np.concatenate(parts)


def same(data, pixels: np.ndarray) -> None:
    """The set has exactly these images [N, C, H, W], in any order."""
    pack = packed(data)
    assert pack.shape == pixels.shape and pack.dtype == np.uint8
    rows = [sorted(map(bytes, np.ascontiguousarray(side).reshape(len(side), -1))) for side in (pack, pixels)]
    assert rows[0] == rows[1]


class Pairs(torch.utils.data.Dataset):
    """A map-style data set as torchvision's: pictures, labels and the names of classes."""

    classes = list(NAMES)

    def __len__(self):
        return N

    def __getitem__(self, i):
        return Image.fromarray(X[i]), int(Y[i])


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return ((torch.from_numpy(x)[None] / 255, y) for x, y in zip(X, Y, strict=True))


def hub_dataset(n: int = N):
    datasets = pytest.importorskip("datasets")
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))})
    rows = {"image": [Image.fromarray(x) for x in X[:n]], "label": Y[:n].tolist()}
    return datasets.Dataset.from_dict(rows, features=kinds)


# ---------------------------------------------------------------------------- images in


def a_set_by_name(run, tmp_path):
    assert len(gzcli.open_data("digits").classes) == 10


def every_set_and_model(run, tmp_path):
    assert "digits" in [row["name"] for row in gzcli.datasets()] and gzcli.models()["vae"].family == "vae"


def an_array_of_grey_images(run, tmp_path):
    same(X, X[:, None])


def an_array_with_channels_last(run, tmp_path):
    rgb = images(N, 8, 8, 3)
    same(rgb, rgb.transpose(0, 3, 1, 2))


def an_array_with_channels_first(run, tmp_path):
    rgb = images(N, 3, 8, 8)
    same(rgb, rgb)


def a_tensor(run, tmp_path):
    rgb = images(N, 3, 8, 3)  # of a tensor channels are first where both may be meant, of an array last
    same(torch.from_numpy(rgb), rgb)
    same(rgb, rgb.transpose(0, 3, 1, 2))


def floats_that_are_grey_levels(run, tmp_path):
    same(torch.from_numpy(X)[:, None] / 255, X[:, None])
    same(X.astype(np.float32) / 127.5 - 1, X[:, None])
    same(X.astype(np.int64), X[:, None])
    same(X.astype(np.float64), X[:, None])


def images_and_labels(run, tmp_path):
    pack = gzcli.open_data((X, Y))
    assert pack.classes == ("0", "1", "2") and pack.meta.notes == ()
    assert gzcli.open_data((X, 2 * Y)).meta.notes == ("no training images: `1`, `3`",)
    number = {x.tobytes(): y for x, y in zip(X, Y, strict=True)}
    for split in ("train", "val", "test"):
        pairs = zip(pack.images(split), pack.labels(split), strict=True)
        assert all(number[x.tobytes()] == y for x, y in pairs)


def labels_that_are_names(run, tmp_path):
    assert gzcli.open_data((X, [NAMES[y] for y in Y])).classes == NAMES
    assert gzcli.open_data((X, pytest.importorskip("pandas").Series(np.array(NAMES)[Y]))).classes == NAMES
    many = gzcli.open_data((X, np.eye(3, dtype=np.int64)[Y]))
    assert many.meta.multilabel and many.labels("train").shape[1] == 3


def a_torch_dataset(run, tmp_path):
    data = torch.utils.data.TensorDataset(torch.from_numpy(X)[:, None], torch.from_numpy(Y))
    same(data, X[:, None])
    assert gzcli.open_data(Pairs()).classes == NAMES
    assert gzcli.open_data(torch.utils.data.Subset(Pairs(), range(N - 1))).classes == NAMES


def an_iterable_torch_dataset(run, tmp_path):
    same(Stream(), X[:, None])
    assert len(gzcli.open_data(Stream()).classes) == 3


def a_dataset_of_the_hub(run, tmp_path):
    pack = gzcli.open_data(hub_dataset())
    assert pack.classes == NAMES and pack.shape == (1, 16, 16)
    same(hub_dataset(), X[:, None])
    same(hub_dataset().to_iterable_dataset(), X[:, None])


def splits_of_the_hub(run, tmp_path):
    datasets = pytest.importorskip("datasets")
    both = datasets.DatasetDict({"train": hub_dataset(60), "test": hub_dataset(20)})
    assert gzcli.open_data(both).meta.counts["test"] == 20


def a_list_of_pictures(run, tmp_path):
    same([Image.fromarray(x) for x in X], X[:, None])


def pictures_of_several_sizes(run, tmp_path):
    pictures = [Image.fromarray(images(12 + i % 3, 12, 3, seed=i)) for i in range(12)]
    pack = gzcli.open_data((pictures, ["a", "b"] * 6), size=8)
    assert pack.shape == (3, 8, 8) and pack.classes == ("a", "b")


def splits_of_arrays(run, tmp_path):
    pack = gzcli.open_data({"train": (X[:60], Y[:60]), "test": (X[60:], Y[60:])})
    assert np.array_equal(pack.images("test"), X[60:, None]) and np.array_equal(pack.labels("test"), Y[60:])


def the_same_images_again(run, tmp_path):
    assert memory.stored((X, Y)) == memory.stored((X.copy(), Y.tolist())), "the content is the name"
    assert memory.stored(X) != memory.stored(X[::-1])
    assert gzcli.open_data(gzcli.open_data(X)).meta.digest == gzcli.open_data(X).meta.digest


def what_is_no_image(run, tmp_path):
    for data, words in (
        (object(), "`object`, not images"),
        (X[0], "type uint8 and shape (16, 16)"),
        (X.astype(complex), "complex"),
        ((X, Y[:5]), "labels of type int64 and shape (5,) for 90 images"),
        ((X, Y - 1), "label below 0"),
        ((X, [None] * N), "item 0 of `data` has no label"),
        ((X, [*NAMES * 29, "ant", "bee", float("nan")]), "item 89 of `data` has no label"),
        ({"pixels": X}, "its keys are pixels"),
        ({"test": X}, "no split `train`"),
        ([], "no images"),
        ([3, 4], "item 0 of `data` is a `int`"),
        (torch.utils.data.DataLoader(Pairs()), "loader"),
    ):
        with pytest.raises(gzcli.UsageError) as error:
            gzcli.train("vae", data=data)
        assert words in str(error.value) and "\nhint: " in str(error.value)


# ---------------------------------------------------------------------------- a run


def a_run_trained_on_an_array(run, tmp_path):
    assert run.info.shape == (1, 16, 16) and run.info.classes == NAMES and run.trained.step == 20
    assert run.data.meta.counts["train"] + run.data.meta.counts["val"] + run.data.meta.counts["test"] == N


def its_recipe(run, tmp_path):
    assert run.config["train"]["steps"] == 20 and run.config["model"]["hidden"] == [16]


def its_history(run, tmp_path):
    table = run.history
    assert list(table.index) == [5, 10, 15, 20] and table["loss"].notna().all()
    assert table["val_loss"].notna().sum() == 2, "losses and validation of a step are one row"


def its_history_without_pandas(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert run.history[0]["step"] == 5


def its_curves(run, tmp_path):
    run.plot().savefig(tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").size[0] > 300


def its_best(run, tmp_path):
    assert run.best.metric == "loss" and run.best.step in (10, 20)


def its_page(run, tmp_path):
    page = run._repr_html_()
    assert "mine" in page and "loss" in page and "data:image/png;base64," in page


def its_module(run, tmp_path):
    assert isinstance(run.model, torch.nn.Module) and not run.model.training


def samples_that_know_what_they_are(run, tmp_path):
    drawn = run.sample(6, seed=4)
    assert isinstance(drawn, gzcli.Samples) and drawn.shape == (6, 1, 16, 16) and drawn.dtype == np.uint8
    assert drawn.seed == 4 and drawn.labels.tolist() == [0, 1, 2, 0, 1, 2] and drawn.classes == NAMES
    assert drawn[2:4].labels.tolist() == [2, 0] and drawn[np.array([5])].labels.tolist() == [2]
    assert drawn[0].labels is None and drawn.mean().dtype == np.float64
    assert (drawn == drawn).all() and np.abs(drawn - 1.0).max(keepdims=True).labels is None


def labels_by_name(run, tmp_path):
    assert run.sample(3, labels=["cow", "ant"]).labels.tolist() == [2, 0, 2]
    assert run.sample(2, labels="bee").labels.tolist() == [1, 1]
    assert np.array_equal(run.sample(2, labels=["bee"]), run.sample(2, labels=[1]))
    with pytest.raises(gzcli.UsageError, match="no label `cat`"):
        run.sample(2, labels=["cat"])


def a_picture_inline(run, tmp_path):
    drawn = run.sample(6)
    assert drawn._repr_png_()[:4] == b"\x89PNG" and drawn.grid(2).size[0] < drawn.grid(6).size[0]
    assert (drawn / 255)._repr_png_() is None, "numbers, and no image"


def samples_on_disk(run, tmp_path):
    drawn = run.sample(4, seed=1)
    assert Image.open(drawn.save(tmp_path / "grid.png")).size == drawn.grid().size
    stored = np.load(drawn.save(tmp_path / "four.npz"))
    assert np.array_equal(stored["samples"].transpose(0, 3, 1, 2), drawn)
    assert stored["labels"].tolist() == [0, 1, 2, 0] and stored["class_names"].tolist() == list(NAMES)
    assert len([*drawn.save(tmp_path / "folder").iterdir()]) == 4


def latents_and_likelihoods(run, tmp_path):
    drawn = run.sample(3)
    assert run.encode(drawn).shape[:2] == (3, 2)
    assert run.log_prob(drawn).shape == (3,) and run.score(drawn, "elbo").shape == (3,)
    assert run.do("reconstruct", drawn).shape == drawn.shape


def features(run, tmp_path):
    ready = gzcli.load("cfm", data="glyphs", pretrained=True, device="cpu")  # whose judge comes with gz
    pixels = np.array(ready.data.images("test")[:5])
    assert ready.features(pixels).shape[0] == 5
    with pytest.raises(gzcli.UsageError, match="`vgg` is not the name"):
        ready.features(pixels, by="vgg")


def every_run(run, tmp_path):
    assert [row["alias"] for row in gzcli.runs("vae")] == ["mine"] and gzcli.runs("fm") == []
    assert gzcli.runs(data=(X, np.array(NAMES)[Y]))[0]["run"] == run.id
    assert gzcli.load("vae", data=(X, np.array(NAMES)[Y])).id == run.id


def two_arrays_compared(run, tmp_path):
    near = gzcli.compare(X[:60], X[30:], metrics=["swd"])
    far = gzcli.compare(X[:60] // 4, X[30:], metrics=["swd"])
    assert 0 <= near.metrics["swd"] < far.metrics["swd"] and near.floor["swd"] >= 0


STEPS = [
    a_set_by_name,
    every_set_and_model,
    an_array_of_grey_images,
    an_array_with_channels_last,
    an_array_with_channels_first,
    a_tensor,
    floats_that_are_grey_levels,
    images_and_labels,
    labels_that_are_names,
    a_torch_dataset,
    an_iterable_torch_dataset,
    a_dataset_of_the_hub,
    splits_of_the_hub,
    a_list_of_pictures,
    pictures_of_several_sizes,
    splits_of_arrays,
    the_same_images_again,
    what_is_no_image,
    a_run_trained_on_an_array,
    its_recipe,
    its_history,
    its_curves,
    its_best,
    its_page,
    its_module,
    samples_that_know_what_they_are,
    labels_by_name,
    a_picture_inline,
    samples_on_disk,
    latents_and_likelihoods,
    features,
    every_run,
    two_arrays_compared,
]


assert len(STEPS) == 33


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_a_step_works(step, run, tmp_path):
    step(run, tmp_path)


def test_a_history_without_pandas_is_a_list(run, tmp_path, monkeypatch):
    its_history_without_pandas(run, tmp_path, monkeypatch)


def test_a_path_is_never_the_name_of_a_set(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("digits").mkdir()
    for i in range(9):
        Image.fromarray(images(8, 8, 3, seed=i)).save(f"digits/{i}.png")
    assert gzcli.open_data(Path("digits")).shape == (3, 8, 8)


def test_verbs_that_compare_take_arrays(run, monkeypatch):
    """Their jobs have the paths of the images in the cache."""
    jobs = []

    def do_job(folder, job, **how):
        jobs.append(job)
        raise gzcli.UsageError("enough")

    monkeypatch.setattr("gzcli.api.compare.do_job", do_job)
    drawn = run.sample(4)
    for call in (
        lambda: gzcli.bench("mine", drawn, data=(X, Y), cpu=True, quiet=True),
        lambda: gzcli.ood("mine", out=X // 2, cpu=True, quiet=True),
    ):
        with pytest.raises(gzcli.UsageError, match="enough"):
            call()
    assert jobs[0].images == (str(memory.stored(drawn)),) and jobs[0].data == str(memory.stored((X, Y)))
    assert jobs[1].outs == (str(memory.stored(X // 2)),)


def test_an_error_speaks_python(run):
    """Its text has the hint, with calls and keywords in place of commands and flags."""
    for call, words in (
        (lambda: gzcli.load("fm"), 'hint: gzcli.train("fm")'),
        (lambda: gzcli.train("vae", set={"optim.lr": -1}), '`set={"optim.lr": -1}`: `optim.lr` must be'),
        (lambda: gzcli.train("vae", steps=-1), "`steps=…`: `train.steps` must be"),
        (lambda: gzcli.train("vae", data="mnst"), "hint: did you mean `mnist`?"),
        (lambda: run.score(run.sample(1), "wit"), "hint: choose from "),
    ):
        with pytest.raises(gzcli.GzError) as error:
            call()
        assert words in str(error.value) and "--" not in str(error.value)


def test_bars_are_drawn_below_the_cell(run, monkeypatch):
    """A kernel sees nothing of what other processes print: the bar is drawn from the run's records."""
    shown: list[str] = []
    handle = types.SimpleNamespace(update=shown.append)
    display = types.SimpleNamespace(HTML=str, display=lambda html, display_id: handle)
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    shell = type("ZMQInteractiveShell", (), {})
    monkeypatch.setattr(builtins, "get_ipython", shell, raising=False)
    run.sample(2)
    with gzcli.api.notebook.TrainingBar(True) as bar:
        bar.begin(run.trained.run)
    assert any("train 20/20" in line and "loss" in line for line in shown)
    assert sum(line.startswith("<progress") for line in shown) == len(shown)


NOTEBOOK = Path(gzcli.__file__).parent / "docs" / "static" / "gz.ipynb"


def test_the_notebook_of_the_docs_runs(run, monkeypatch):
    """Cell after cell, as a kernel does; its training is the one of this module."""
    trained = []
    monkeypatch.setattr(gzcli, "train", lambda *words, **options: trained.append(options) or run)
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    names: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert trained and gzcli.open_data(trained[0]["data"]).meta.counts["train"]
