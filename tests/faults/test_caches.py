"""Files of the cache that are damaged in every way, or that cannot be written: gz makes each again, and no
command fails or waits. Files that it cannot make again are named in an error."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import recipe, trainer
from test_full import largest
from zoo import CASES

from gzcli.cli import app
from gzcli.core.errors import MissingError
from gzcli.core.sections import LaunchSection
from gzcli.data import library
from gzcli.data.packs.open import open_pack
from gzcli.data.readers import memory
from gzcli.data.sets.benchmarks import Benchmark
from gzcli.engine.log import Log
from gzcli.judge import bench, contestants
from gzcli.judge.real import ImageSet
from gzcli.launch import cost, forecast, launcher
from gzcli.launch.from_file import metadata, published_file, run_of
from gzcli.metrics import classifier
from gzcli.metrics.alarms.stored import stored
from gzcli.metrics.features import LeNet
from gzcli.metrics.pretrained import Features
from gzcli.store import cache_files, files, index, metrics, rates, runs
from gzcli.store.run_folder import Run

IMAGES = np.random.default_rng(0).integers(0, 256, (60, 1, 8, 8), np.uint8)
VAE = next(case for case in CASES if case.model == "vae")
SECONDS = 20  # after which a call counts as waiting for ever

Use = Callable[[], object]  # gives a value that is in the cache, or that is new
Cache = Callable[[Path, pytest.MonkeyPatch, list[str]], Use]


def rates_of_cpu(home: Path, patch: pytest.MonkeyPatch, said: list[str]) -> Use:
    patch.setattr(
        rates, "measured_rates", lambda types: {kind: dict.fromkeys(rates.WORK, 80.0) for kind in types}
    )

    def use() -> object:
        rates._stored.cache_clear()  # as another process
        return rates.cpu_rates("a CPU")

    return use


def cost_of_step(home: Path, patch: pytest.MonkeyPatch, said: list[str]) -> Use:
    patch.delenv("GZ_TRIAL", raising=False)
    result = dict.fromkeys(forecast.NUMBERS, 2.5) | {"timed": True}

    def use() -> object:
        row = {"key": "cost", "result": forecast.recall("cost")}
        if not row["result"]:
            forecast.fill([row], {}, LaunchSection(), lambda job: [result])
        return row["result"]

    return use


def cost_of_judging(home: Path, patch: pytest.MonkeyPatch, said: list[str]) -> Use:
    def use() -> object:
        if cost.noted("judged", 0, 5.0) == 5.0:
            cost.note("judged", 0, 2.0)
        return 2.0

    return use


def gpus(home: Path, patch: pytest.MonkeyPatch, said: list[str]) -> Use:
    driver = home.with_name("driver")
    driver.write_text("NVRM version: 1")
    patch.setattr(launcher, "DRIVER", driver)
    patch.setattr(launcher, "_tried_apart", lambda there: launcher.Gpus(there, there))
    return lambda: launcher._usable.__wrapped__(1, None, None)


def alarm(home: Path, patch: pytest.MonkeyPatch, said: list[str]) -> Use:
    return lambda: repr(stored({"a": 1}, lambda: {"mean": np.arange(3.0), "sides": (1, 2.5)}, said.append))


def judge(home: Path, patch: pytest.MonkeyPatch, said: list[str]) -> Use:
    pack = open_pack(memory.stored(IMAGES))

    def optimizer(parameters: Iterator[Any]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1)

    training = classifier.Training("toy-1", LeNet, optimizer, None, steps=2, batch=8)
    return lambda: classifier.once(pack, training, say=said.append).hash


def features(home: Path, patch: pytest.MonkeyPatch, said: list[str]) -> Use:
    space = Features(lambda x: x.float().flatten(1), "hash", torch.device("cpu"))
    return lambda: ImageSet(IMAGES, key="digits", say=said.append).features(space).sum()


def floor(home: Path, patch: pytest.MonkeyPatch, said: list[str]) -> Use:
    real = SimpleNamespace(
        bank=lambda *_: SimpleNamespace(key="k"), reference=lambda _: [1], draws=lambda *_: [(1, 2)]
    )
    of = SimpleNamespace(metrics=[SimpleNamespace(cheap=True, name="fd")], living={}, stats=None, real=real)
    of.say, of.compared = said.append, lambda *_, **how: {"fd": SimpleNamespace(value=1.5)}
    return lambda: bench.Judge._draws(of, 9, None, None)


def summaries(home: Path, patch: pytest.MonkeyPatch, said: list[str]) -> Use:
    run = runs.create("vae", "digits")
    files.write_json(run.status_file, {"model": "vae", "data": "digits", "state": "finished"})
    patch.setattr(index, "SETTLED", 0)

    def use() -> object:
        index._open.clear()
        return metrics.summaries([run])

    return use


def pack(home: Path, patch: pytest.MonkeyPatch, said: list[str]) -> Use:
    folder = home.with_name("pictures")
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
        for i, image in enumerate(IMAGES[:20, 0]):
            memory._picture(image).save(folder / label / f"{i}.png")

    def use() -> object:
        opened = open_pack(folder, say=said.append)
        return opened.images("train")[:].tobytes(), opened.labels("val").tolist(), opened.names("val")

    return use


def run_of_file(home: Path, patch: pytest.MonkeyPatch, said: list[str]) -> Use:
    weights = home.with_name("weights") / "own.safetensors"
    weights.parent.mkdir()
    trained = trainer(recipe(VAE, steps=1, sets=("train.checkpoint_every=1", "train.best=loss")))
    trained.fit()
    shutil.copy(trained.run.model_file, weights)

    def use() -> object:
        run = run_of(weights)
        return run.tree(), metadata(run.model_file), run.state

    return use


def published(home: Path, patch: pytest.MonkeyPatch, said: list[str]) -> Use:
    """Of a folder of others, with an engine that copies weights."""
    trained = trainer(recipe(VAE, steps=1, sets=("train.checkpoint_every=1", "train.best=loss")))
    trained.fit()
    folder = home.with_name("theirs")
    files.write_json(folder / "config.json", {})

    def run(place: Path, plan: object, **how: object) -> None:
        out = Path(files.read_object(place / "job.json")["out"])
        files.make_folder(out.parent)
        with files.replacing(out) as part:
            shutil.copy(trained.run.model_file, part)

    patch.setattr(launcher, "run", run)
    return lambda: metadata(published_file(folder, "theirs"))


def images_of_a_list(home: Path, patch: pytest.MonkeyPatch, said: list[str]) -> Use:
    root = home.with_name("openood")
    for i in range(3):
        place = root / "images_classic" / "toy" / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        memory._picture(IMAGES[i, 0]).save(place)
    lines = "".join(f"toy/{i}.png 0\n" for i in range(3))
    files.write_atomic(root / "benchmark_imglist" / "toy" / "test_toy.txt", lines)
    benchmark = Benchmark("toy", "toy", ("toy",), ())

    def use() -> object:
        data = library.listed_images(root, benchmark, "toy")
        return [path.read_bytes() for path in sorted(data.path.iterdir())]

    return use


def images_of_python(home: Path, patch: pytest.MonkeyPatch, said: list[str]) -> Use:
    return lambda: sorted(np.load(memory.stored(IMAGES)).items())[0][1].tobytes()


CACHES: dict[str, tuple[Cache, str]] = {  # cache → a pattern of its file
    "rates": (rates_of_cpu, "costs/rates-*.json"),
    "cost of a step": (cost_of_step, "costs/cost.json"),
    "cost of judging": (cost_of_judging, "costs/judged-*.json"),
    "GPUs": (gpus, "gpus.json"),
    "alarm": (alarm, "alarms/*.npz"),
    "judge": (judge, "features/toy-*.safetensors"),
    "features": (features, "features/real/*.npy"),
    "floor": (floor, "features/floors/*.json"),
    "index": (summaries, "runs/.index-summary.json"),
    "metadata of a pack": (pack, "packs/pictures-*/*/meta.json"),
    "images of a pack": (pack, "packs/pictures-*/*/train.npy"),
    "labels of a pack": (pack, "packs/pictures-*/*/val_labels.npy"),
    "names of a pack": (pack, "packs/pictures-*/*/val_names.json"),
    "recipe of a file": (run_of_file, "files/*/run.yaml"),
    "status of a file": (run_of_file, "files/*/status.json"),
    "weights of a file": (run_of_file, "files/*/model.safetensors"),
    "weights of others": (published, "published/*/theirs.safetensors"),
    "image of a list": (images_of_a_list, "imglists/*/000001.png"),
    "images from Python": (images_of_python, "arrays/*.npz"),
}
# gz cannot continue without these
NEEDED = (pack, run_of_file, published, images_of_a_list, images_of_python)


def a_list_of_arrays(path: Path) -> None:
    with open(path, "wb") as f:
        np.savez(f, x=np.zeros(3), y=np.array(["a"]))


def pickled(path: Path) -> None:
    with open(path, "wb") as f:
        np.save(f, np.array([{}], object), allow_pickle=True)


def of_other_shape(path: Path) -> None:
    with open(path, "wb") as f:
        np.save(f, np.zeros((3, 2), np.uint8))


def a_socket(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, socket.socket(socket.AF_UNIX) as one:
        patch.chdir(path.parent)  # a socket's path is short
        one.bind(path.name)


def a_folder(path: Path) -> None:
    path.mkdir()
    (path / "file").write_text("x")


TEXTS = {"empty": "", "text": "text\n" * 99, "list": "[]", "object": "{}", "number": "5", "null": "null"}
TEXTS |= {"texts": '["a", "b"]', "NaN": '{"seconds": NaN, "timed": true}', "deep": "[" * 100_000}
TEXTS |= {"other types": '{"seconds": "3", "fp32": 3, "bf16": [], "terms": [], "draws": {"fd": ["x"]}}'}
KINDS: dict[str, Callable[[Path], object]] = {  # damage → what is then at the path, where nothing is
    **{name: lambda path, text=text: path.write_text(text) for name, text in TEXTS.items()},
    "zeros": lambda path: path.write_bytes(bytes(4096)),
    "other arrays": a_list_of_arrays,
    "pickled": pickled,
    "other shape": of_other_shape,
    "pipe": os.mkfifo,
    "socket": a_socket,
    "folder": a_folder,
    "link to nothing": lambda path: path.symlink_to(path.with_name("nothing")),
    "link to itself": lambda path: path.symlink_to(path),
    "unreadable": lambda path: (path.write_text("{}"), path.chmod(0)),
}


class Waiting(BaseException):
    """A call waits for ever. It is no Exception, which a reader would take for damage."""


@contextmanager
def in_time() -> Iterator[None]:
    """Ends a call that waits, for example for the writer of a pipe."""

    def stop(*_: object) -> None:
        raise Waiting

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def at_path(path: Path, make: Callable[[Path], object]) -> None:
    """Puts something else where a file is. The file has other links, which keep its content."""
    path.unlink()
    make(path)


@pytest.mark.parametrize("name", CACHES)
def test_a_damaged_file_is_made_again(name, home, monkeypatch, tmp_path):
    home.mkdir()
    monkeypatch.chdir(tmp_path)
    cache, pattern = CACHES[name]
    said: list[str] = []
    use = cache(home, monkeypatch, said)
    value = use()
    (path,) = home.glob(pattern)
    whole = path.read_bytes()
    half = {"half": lambda path: path.write_bytes(whole[: len(whole) // 2])}
    for how, make in {**KINDS, **half}.items():
        at_path(path, make)
        with in_time():
            assert repr(use()) == repr(value), how
        assert path.is_file() and not path.is_symlink() and path.read_bytes() == whole, how
        said.clear()
        assert repr(use()) == repr(value) and said == [], how
    assert not list(home.rglob("*.part"))


@pytest.mark.parametrize("name", [name for name in CACHES if CACHES[name][0] not in NEEDED])
def test_a_file_that_cannot_be_written_is_a_note(name, home, monkeypatch, tmp_path):
    home.mkdir()
    cache, pattern = CACHES[name]
    said: list[str] = []
    use = cache(home, monkeypatch, said)
    value = use()
    (path,) = home.glob(pattern)
    path.unlink()
    said.clear()
    with largest(10):
        assert repr(use()) == repr(value)
    assert not path.exists() and not list(home.rglob("*.part"))
    if name in ("alarm", "judge", "features", "floor"):  # the others take less than seconds
        assert any(f"`{path}` cannot be stored (file too large)" in line for line in said)
    folder = path.parent
    shutil.rmtree(folder)
    folder.write_text("a file in place of the folder")
    if name != "index":  # its folder has the runs
        assert repr(use()) == repr(value)


def test_an_array_of_another_set_is_not_taken(home):
    """A file under another name is another key."""
    first = stored({"a": 1}, lambda: {"mean": np.zeros(3)}, print)
    (path,) = home.glob("alarms/*.npz")
    other = stored({"a": 2}, lambda: {"mean": np.ones(3)}, print)
    (path_of_other,) = set(home.glob("alarms/*.npz")) - {path}
    shutil.copy(path_of_other, path)
    assert stored({"a": 1}, lambda: {"mean": np.zeros(3)}, print)["mean"].sum() == first["mean"].sum() == 0
    assert other["mean"].sum() == 3
    floors = {"terms": [1, "k"], "draws": {"fd": [1, 2.5]}}
    files.write_json(home / "floor.json", floors)
    assert bench.read_draws(home / "floor.json", [1, "k"]) == {"fd": [1.0, 2.5]}
    assert cache_files.read(home / "floor.json", lambda path: bench.read_draws(path, [2, "k"])) is None
    assert not (home / "floor.json").exists()


def test_samples_of_an_earlier_bench_are_reused_only_if_they_are_whole(tmp_path):
    path, trained = tmp_path / "samples.npz", SimpleNamespace(images=SimpleNamespace(shape=(1, 8, 8)))
    samples = np.zeros((5, 8, 8, 1), np.uint8)
    files.write_arrays(path, {"samples": samples, "seconds": np.float64(2), "notes": np.array(["x"])})
    images, seconds, notes = contestants.read_samples(path, trained, 5)
    assert images.shape == (5, 1, 8, 8) and (seconds, notes) == (2.0, ["x"])
    whole = path.read_bytes()
    for how, make in KINDS.items():
        at_path(path, make)
        with in_time():
            assert contestants.read_samples(path, trained, 5) is None, how
        files.remove_tree(path)
        path.write_bytes(whole)
    for changed in (samples[:, :4], samples.astype(float), samples[..., 0], samples[:0], samples[[0] * 9]):
        files.write_arrays(path, {"samples": changed, "seconds": np.float64(2)})
        assert contestants.read_samples(path, trained, 5) is None


@pytest.mark.parametrize("name", ["run.yaml", "status.json", "model.safetensors", "log.txt", "metrics.jsonl"])
def test_a_file_of_a_run_is_named_and_nothing_waits(name, home, capsys):
    """gz cannot make these again; those that only record the training do not end it."""
    home.mkdir()
    trained = trainer(recipe(VAE, steps=1, sets=("train.checkpoint_every=1", "train.best=loss")))
    trained.fit()
    run = trained.run
    run.update(state="finished", steps=1)
    path = run.path / name
    for how in ("pipe", "socket", "folder"):
        path.unlink(missing_ok=True)
        KINDS[how](path)
        for words in (("runs", "list"), ("runs", "show", run.id), ("sample", run.id, "--dry-run")):
            with in_time():
                code = app.run([*words])
            said = capsys.readouterr()
            assert code in (0, 3) and "internal" not in said.out + said.err, (how, words, said)
            if words[0] == "sample" and name in ("run.yaml", "status.json"):
                assert code == 3 and f"`{path}` is damaged: it is not a regular file" in said.err, (how, said)
                assert "hint: " in said.err
        if name in ("log.txt", "metrics.jsonl"):
            log = Log(run.path)
            with in_time(), pytest.raises(MissingError, match="is not a regular file"):
                log.info("a line") if name == "log.txt" else log.metrics(1, loss=0.0)
        files.remove_tree(path)


def test_a_list_of_runs_does_not_wait_for_a_lock_that_is_a_pipe(home, capsys):
    run = Run(runs.create("vae", "digits").path)
    run.update(model="vae", data="digits", state="running")
    os.mkfifo(run.lock_file)
    with in_time():
        assert app.run(["runs", "list"]) == 0
    assert "killed" in capsys.readouterr().out
