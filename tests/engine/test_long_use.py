"""Long runs: what is read and written of them stays bounded, and a stop more or less changes nothing."""

import io
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from draws import train_batches
from helpers import figures, fit, recipe, same, trainer
from PIL import Image
from refused import refused
from safetensors.torch import load_file
from zoo import FIRST

from gzcli.cli import model_options
from gzcli.core.errors import Interrupted
from gzcli.data.packs.open import open_pack
from gzcli.engine import log as logs
from gzcli.engine.cadence import Stop
from gzcli.engine.log import Log
from gzcli.store import metrics
from gzcli.store.run_folder import Run

pytestmark = pytest.mark.usefixtures("undrawn")


def write(folder: Path, count: int, every: int) -> None:
    """A `metrics.jsonl` of so many lines of losses, and one of validation after every `every` of them."""
    with open(folder / "metrics.jsonl", "w") as f:
        for i in range(1, count + 1):
            f.write(f'{{"step": {50 * i}, "loss": {1000 / i:.4f}, "lr": 0.001, "it_s": 123.4}}\n')
            if i % every == 0:
                f.write(f'{{"step": {50 * i}, "val_bpd": {2 + 1 / i}}}\n')
        f.write('{"step": 99, "los')  # a kill has cut it short


def test_the_curve_of_a_long_run_is_that_of_all_its_lines(tmp_path, monkeypatch):
    write(tmp_path, 8_000, 400)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best.json").write_text('{"metric": "bpd", "value": 2, "step": 50}')
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "MAX_LINES", 1 << 40)
        whole, last = metrics.metric_lines(tmp_path), metrics.last_figures(Run(tmp_path))
        curve = metrics.curve_of(Run(tmp_path))
        losses = metrics.Curve.of("loss", metrics.curves(whole)["loss"])
    monkeypatch.setattr(metrics, "MAX_LINES", 1_000)
    monkeypatch.setattr(metrics, "SPACED_LINES", 500)
    some = metrics.metric_lines(tmp_path)
    assert len(whole) == 8_020 and len(some) < 2000 and some[-1] == whole[-1]
    assert metrics.curve_of(Run(tmp_path)) == curve and metrics.last_figures(Run(tmp_path)) == last
    thin = metrics.Curve.of("loss", metrics.curves(some)["loss"])
    assert all(abs(a - b) < 0.3 * b for a, b in zip(thin.values[1:], losses.values[1:], strict=True))
    assert [line["step"] for line in some] == sorted(line["step"] for line in some)
    assert list(metrics.every_line(tmp_path)) == whole
    write(tmp_path, 12_000, 1)
    monkeypatch.setattr(metrics, "MAX_LINES", 1_000)
    monkeypatch.setattr(metrics, "MAX_VALIDATION_LINES", 500)
    since = time.process_time()
    assert 500 < len(metrics.metric_lines(tmp_path)) < 2 * metrics.SPACED_LINES + 1500
    assert time.process_time() - since < 0.5


def test_a_log_is_rotated(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "MAX_LOG_BYTES", 1000)
    log = Log(tmp_path, mode="quiet")
    for i in range(100):
        log.info(f"line {i} " + "x" * 50)
    sizes = [(tmp_path / name).stat().st_size for name in ("log.txt", "log.1.txt")]
    assert max(sizes) < 1200 and len(list(tmp_path.iterdir())) == 2
    assert "line 99" in (tmp_path / "log.txt").read_text()


VAE = FIRST["vae"]


@pytest.mark.slow
def test_ten_thousand_steps_take_no_more_memory_or_files_than_a_thousand():
    t = trainer(recipe(VAE, steps=10_000, sets=("train.checkpoint_every=1000", "train.log_every=100")))
    seen: list[tuple[int, int, int]] = []
    process, over = psutil.Process(), threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            seen.append((t.done, process.memory_info().rss, process.num_fds()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    t.fit()
    over.set()
    watcher.join()
    early = [row for row in seen if 1000 <= row[0] < 4000]
    late = [row for row in seen if row[0] >= 7000]
    assert np.median([row[1] for row in late]) < np.median([row[1] for row in early]) + 10e6
    assert np.median([row[2] for row in late]) <= np.median([row[2] for row in early])


@pytest.mark.slow
def test_fifty_resumes_are_one_unbroken_run(monkeypatch):
    """A stop after every other number of steps, and always another process's objects."""
    tree = recipe(VAE, steps=160, sets=("train.ema=0.9", "train.log_every=7"))
    whole = fit(tree)
    run, starts = None, []
    for k in range(51):
        until = 3 * (k + 1) + k % 2
        monkeypatch.setattr(Stop, "signal", lambda self, done, at=until: 15 if done == at and at < 153 else 0)
        broken = trainer(tree, run)
        run = broken.run
        if k < 50:
            refused("", broken.fit, error=Interrupted)
        else:
            broken.fit()
        starts.append(broken.start)
    assert len(set(starts)) == 51
    a, b = (load_file(r.path / "model.safetensors") for r in (whole.run, run))
    assert same(a, b) and figures(whole.run) == figures(run)


def many(path: Path, count: int, classes: int) -> Path:
    """A tar of so many pictures of 8×8, in a folder a class."""
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            file = io.BytesIO()
            Image.fromarray(np.full((8, 8), i % 251, np.uint8)).save(file, "PNG", compress_level=0)
            info = tarfile.TarInfo(f"c{i % classes:04d}/{i:07d}.png")
            info.size = file.tell()
            file.seek(0)
            tar.addfile(info, file)
    return path


@pytest.mark.parametrize(
    ("count", "classes"), [(300, 100), pytest.param(200_000, 1000, marks=pytest.mark.slow)]
)
def test_many_small_files_and_classes_are_streamed(count, classes, tmp_path, monkeypatch, home):
    path = many(tmp_path / "many.tar", count, classes)
    monkeypatch.setenv("GZ_PACK_LIMIT", "1")
    monkeypatch.setenv("GZ_WORKERS", "0")
    before = psutil.Process().memory_info().rss
    pack = open_pack(path)
    assert pack.meta.streamed and len(pack.meta.classes) == classes
    batches = train_batches(pack, seed=0, batch_size=64, levels=256, device="cpu")
    for step in range(5):
        batch = batches.at(step)
        assert batch.x.shape == (64, 1, 8, 8) and batch.y.max() < classes
    assert psutil.Process().memory_info().rss - before < 50e6 + 2000 * count
    labels = model_options.labels_of(None, str(path))
    assert labels == [f"c{i:04d}" for i in range(classes)]
