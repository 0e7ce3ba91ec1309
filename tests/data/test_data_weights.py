"""Weights of published networks against a server: fetched when they are asked for, whole and unchanged."""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
from dataclasses import replace

import pytest
from pictures import write
from server import serve

from gzcli.core.errors import MissingError
from gzcli.data.download import http
from gzcli.data.download.fetch import WEIGHTS, fetch_weights
from gzcli.data.sets.registry import DataFile
from gzcli.launch import launcher
from gzcli.metrics.metric import metrics, weights_of
from gzcli.store import files, runs
from gzcli.store.hub import INCEPTION
from gzcli.store.paths import cache_dir

BYTES = random.Random(1).randbytes(60_000)
LEAST = 50_000_000  # bytes of the smallest of the known networks


@pytest.fixture(autouse=True)
def _quick(home, monkeypatch):
    monkeypatch.delenv("GZ_OFFLINE", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(http, "BACKOFF", 0.01)


@pytest.fixture
def site(tmp_path):
    """A folder that is served: it has the file of Inception as a mirror and as its publisher."""
    return write(tmp_path / "site", {f"weights/{INCEPTION}": BYTES, f"there/{INCEPTION}": BYTES})


def published(monkeypatch, url: str) -> None:
    checksum = hashlib.sha256(BYTES).hexdigest()
    file = DataFile(INCEPTION, (f"{url}/there/{INCEPTION}",), len(BYTES), sha256=checksum)
    monkeypatch.setitem(WEIGHTS, "inception", replace(WEIGHTS["inception"], file=file))


def left_over() -> list[str]:
    return sorted(path.name for path in cache_dir("weights").glob("[!.]*"))


def test_a_cut_download_is_resumed_and_said(site, monkeypatch):
    told = []
    with serve(site, "cut", "503") as server:
        published(monkeypatch, server.url)
        place = fetch_weights("inception", say=told.append)
        assert place == cache_dir("weights", INCEPTION) and place.read_bytes() == BYTES
        assert server.requests[-1] == (f"/there/{INCEPTION}", f"bytes={len(BYTES) // 2}-")
        count = len(server.requests)
        assert fetch_weights("inception", say=told.append) == place and len(server.requests) == count
    what, where = "60 kB, licence: Apache-2.0", f"from {server.url}/there/{INCEPTION}"
    assert what in told[0] and where in told[0] and "InceptionV3" in told[0]
    assert left_over() == [INCEPTION]


def test_other_bytes_and_no_network_leave_nothing_but_advice(site, monkeypatch):
    with serve(site, "wrong") as server:
        published(monkeypatch, server.url)
        with pytest.raises(MissingError, match="has the wrong checksum") as error:
            fetch_weights("inception")
    place = cache_dir("weights", INCEPTION)
    assert error.value.hint == f"put that file at `{place}` or name it with `--weights FILE`"
    assert left_over() == []
    monkeypatch.setattr(http, "TRIES", 1)
    with pytest.raises(MissingError, match="cannot be read"):  # nobody listens there any more
        fetch_weights("inception")


def test_a_mirror_comes_first_and_alone_when_offline(site, monkeypatch, tmp_path):
    with serve(site) as server:
        published(monkeypatch, server.url)
        monkeypatch.setenv("GZ_OFFLINE", "1")
        monkeypatch.setenv("GZ_MIRROR", server.url)
        assert fetch_weights("inception") is None and not server.requests
        monkeypatch.delenv("GZ_OFFLINE")
        fetch_weights("inception")
        assert [path for path, _ in server.requests] == [f"/weights/{INCEPTION}"]
        shutil.rmtree(cache_dir("weights"))
        monkeypatch.setenv("GZ_OFFLINE", "1")
        monkeypatch.setenv("GZ_MIRROR", os.fspath(site))
        assert fetch_weights("inception").read_bytes() == BYTES and len(server.requests) == 1


def test_the_metrics_that_fetch_are_those_that_need_it():
    assert weights_of(("fd", "kid")) == ["inception"] and weights_of(("fd", "kid_lenet")) == []
    assert set(weights_of(metrics())) <= set(WEIGHTS)
    for known in WEIGHTS.values():
        if named := re.search(r"-([0-9a-f]{8})\.", known.file.name):  # by how the checksum begins
            assert known.file.sha256.startswith(named[1])
        assert known.file.size > LEAST and all(url.startswith("https://") for url in known.file.urls)


def test_bench_fetches_what_its_metric_needs_before_it_starts(call, site, monkeypatch):
    run = runs.create("vae", "digits", alias="mine")
    run.update(state="finished", step=60)
    (run.path / "run.yaml").write_text("model: {name: vae}\n")
    (run.path / "model.safetensors").touch()
    result = {"rows": [], "floor": {}, "notes": []}

    def work(folder, plan, **options):
        files.write_json(folder / "result.json", result)

    monkeypatch.setattr(launcher, "run", work)
    monkeypatch.setattr("gzcli.cli.bench.table", lambda *_, **__: None)
    with serve(site) as server:
        published(monkeypatch, server.url)
        assert call("bench", "mine", "--data", "digits", "--metrics", "fd")[0] == 0 and not server.requests
        own = cache_dir().parent / "own.pth"
        own.touch()
        words = ("bench", "mine", "--data", "digits", "--metrics", "fd,fid")
        assert call(*words, "--weights", str(own))[0] == 0 and not server.requests
        code, _, stderr = call(*words)
        assert code == 0 and "fetching InceptionV3" in stderr and cache_dir("weights", INCEPTION).exists()
