"""Long runs: what is read and written of them stays bounded, and a stop more or less changes nothing."""

from __future__ import annotations

import time
from pathlib import Path

from gzcli.engine import log as logs
from gzcli.engine.log import Log
from gzcli.store import metrics
from gzcli.store.run import Run

# --- records ---


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
        patch.setattr(metrics, "LARGE", 1 << 40)
        whole, last = metrics.metric_lines(tmp_path), metrics.last_figures(Run(tmp_path))
        curve, losses = metrics.curve_of(Run(tmp_path)), metrics._points(whole, "loss")
    monkeypatch.setattr(metrics, "LARGE", 100_000)
    monkeypatch.setattr(metrics, "SOME", 500)
    some = metrics.metric_lines(tmp_path)
    assert len(whole) == 8_020 and len(some) < 2000 and some[-1] == whole[-1]
    assert metrics.curve_of(Run(tmp_path)) == curve and metrics.last_figures(Run(tmp_path)) == last
    thin = metrics._points(some, "loss")
    assert all(abs(a - b) < 0.3 * b for a, b in zip(thin.values[1:], losses.values[1:], strict=True))
    assert [line["step"] for line in some] == sorted(line["step"] for line in some)
    assert list(metrics.every_line(tmp_path)) == whole


def test_validation_at_every_line_is_thinned_too(tmp_path, monkeypatch):
    write(tmp_path, 12_000, 1)
    monkeypatch.setattr(metrics, "LARGE", 100_000)
    monkeypatch.setattr(metrics, "MANY", 500)
    since = time.process_time()
    assert 500 < len(metrics.metric_lines(tmp_path)) < 2 * metrics.SOME + 1500
    assert time.process_time() - since < 0.5


def test_a_log_is_rotated(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "FULL", 1000)
    log = Log(tmp_path, mode="quiet")
    for i in range(100):
        log.info(f"line {i} " + "x" * 50)
    sizes = [(tmp_path / name).stat().st_size for name in ("log.txt", "log.1.txt")]
    assert max(sizes) < 1200 and len(list(tmp_path.iterdir())) == 2
    assert "line 99" in (tmp_path / "log.txt").read_text()
