"""Downloads against a server that stalls, cuts off, redirects, refuses ranges, answers 503 and lies."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from server import serve

from gzcli.data import fetch as fetching
from gzcli.data.fetch import fetch
from gzcli.data.library import data_path, raw_dir, remove, verify
from gzcli.data.specs import SPECS, DataFile
from gzcli.errors import MissingError, UsageError
from gzcli.store.paths import cache_dir

DATA = random.Random(0).randbytes(100_000)


@pytest.fixture(autouse=True)
def _quick(home, monkeypatch):
    monkeypatch.delenv("GZ_OFFLINE", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(fetching, "BACKOFF", 0.01)
    monkeypatch.setattr(fetching, "TIMEOUT", 0.3)
    monkeypatch.setattr(fetching, "BLOCK", 1 << 12)


@pytest.fixture
def site(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "a.bin").write_bytes(DATA)
    return tmp_path / "site"


def spec_at(*urls: str, data: bytes = DATA):
    """A set `toy` of one file `a.bin`."""
    file = DataFile("a.bin", tuple(f"{url}/a.bin" for url in urls), len(data), md5=hashlib.md5(data).hexdigest())
    return replace(SPECS["mnist"], name="toy", files=(file,))


def left_over() -> list[str]:
    return sorted(p.name for p in cache_dir("raw", "toy").glob("*")) if cache_dir("raw", "toy").exists() else []


@pytest.mark.parametrize(
    ("faults", "ranges"),
    [
        ([], [None]),
        (["redirect"], [None, None]),
        (["503", "503"], [None, None, None]),
        (["cut"], [None, "bytes=50000-"]),
        (["stall"], [None, "bytes=50000-"]),
        (["cut", "whole"], [None, "bytes=50000-"]),
        (["cut", "503", "cut"], [None, "bytes=50000-", "bytes=50000-", "bytes=75000-"]),
        (["cut"] * 6, None),  # progress each time: never given up
    ],
)
def test_recovers(site, faults, ranges):
    seen = []
    with serve(site, *faults) as server:
        folder = fetch(spec_at(server.url), progress=lambda done, total: seen.append((done, total)))
        assert ranges is None or [asked for _, asked in server.requests] == ranges
    assert (folder / "a.bin").read_bytes() == DATA
    assert left_over() == ["a.bin"]
    assert seen[-1] == (len(DATA), len(DATA)) and all(total == len(DATA) for _, total in seen)


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("html", "an HTML page"),
        ("wrong", "wrong checksum"),
        ("long", "wrong size: 100,004 bytes where 100,000"),
        ("404", "404"),
        ("503", "503"),
    ],
)
def test_bad_answers_are_named_and_leave_nothing(site, fault, named):
    with serve(site, *[fault] * 10) as server, pytest.raises(MissingError, match=named) as e:
        fetch(spec_at(server.url))
    assert e.value.code == 3 and "`a.bin`" in e.value.message and "gz data download toy" in e.value.hint
    assert left_over() == []


def test_html_under_another_type_and_the_right_size(site):
    page = b"<html>" + b" " * 99_994
    (site / "a.bin").write_bytes(page)
    with serve(site) as server, pytest.raises(MissingError, match="HTML page"):
        fetch(spec_at(server.url))
    assert left_over() == []


def test_truncated_is_named_and_resumed_later(site, monkeypatch):
    monkeypatch.setattr(fetching, "TRIES", 2)
    with serve(site, "cut", "503", "503", "503") as server:
        with pytest.raises(MissingError, match="503") as e:
            fetch(spec_at(server.url))
        assert "goes on from" in e.value.hint and left_over() == ["a.bin.part"]
        fetch(spec_at(server.url))
        assert server.requests[-1][1] == "bytes=50000-"
    assert (raw_dir(spec_at()) / "a.bin").read_bytes() == DATA


def test_a_part_of_another_file_is_started_anew(site):
    raw = cache_dir("raw", "toy")
    raw.mkdir(parents=True)
    (raw / "a.bin.part").write_bytes(b"x" * 40_000)
    with serve(site) as server:
        fetch(spec_at(server.url))
        assert [asked for _, asked in server.requests] == ["bytes=40000-", None]
    assert (raw / "a.bin").read_bytes() == DATA


def test_next_address_mirror_and_source(site, tmp_path, monkeypatch):
    with serve(tmp_path / "nothing") as dead, serve(site) as server:
        fetch(spec_at(dead.url, server.url))
        assert len(dead.requests) == 1 and left_over() == ["a.bin"]
        remove_toy()

        mirror = tmp_path / "mirror" / "toy"
        mirror.mkdir(parents=True)
        (mirror / "a.bin").write_bytes(DATA)
        for value in (str(mirror.parent), f"file://{mirror.parent}"):
            monkeypatch.setenv("GZ_MIRROR", value)
            fetch(spec_at(dead.url))
            remove_toy()
        with serve(mirror.parent) as http:
            monkeypatch.setenv("GZ_MIRROR", http.url)
            fetch(spec_at(dead.url))
            assert http.requests == [("/toy/a.bin", None)]
            remove_toy()
        monkeypatch.delenv("GZ_MIRROR")
        assert len(dead.requests) == 1

        for source in (site, site / "a.bin", mirror.parent, f"file://{site}", server.url, f"{server.url}/a.bin"):
            fetch(spec_at(dead.url), source=str(source))
            assert left_over() == ["a.bin"]
            remove_toy()
        assert len(dead.requests) == 1


def remove_toy():
    (cache_dir("raw", "toy") / "a.bin").unlink()


def test_bad_sources(site, tmp_path):
    with pytest.raises(MissingError, match="there is no"):
        fetch(spec_at(), source=str(tmp_path / "none"))
    (site / "a.bin").write_bytes(DATA[:-1])
    with pytest.raises(MissingError, match="wrong size"):
        fetch(spec_at(), source=str(site))
    (site / "a.bin").write_bytes(DATA[:-1] + b"?")
    with pytest.raises(MissingError, match="wrong checksum"):
        fetch(spec_at(), source=str(site))
    with pytest.raises(UsageError, match="4 files"):
        fetch("mnist", source=str(site / "a.bin"))
    assert left_over() == []


def test_offline(site, monkeypatch):
    monkeypatch.setenv("GZ_OFFLINE", "1")
    with serve(site) as server:
        with pytest.raises(MissingError, match="GZ_OFFLINE"):
            fetch(spec_at(server.url))
        with pytest.raises(MissingError, match="GZ_OFFLINE"):
            fetch(spec_at(server.url), source=server.url)
        fetch(spec_at(server.url), source=str(site))  # a local file needs no network
        assert server.requests == []


def test_no_space(site, monkeypatch):
    file = replace(spec_at("http://x").files[0], size=10**18)
    with pytest.raises(MissingError, match="are needed"):
        fetch(replace(spec_at(), files=(file,)))


def test_read_only_cache(site, home, monkeypatch):
    def refused(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(MissingError, match="cannot be written"):
        fetch(spec_at(), source=str(site))


CHILD = """
import hashlib, sys
from dataclasses import replace
from gzcli.data.fetch import fetch
from gzcli.data.specs import SPECS, DataFile
url, size, md5 = sys.argv[1:]
fetch(replace(SPECS["mnist"], name="toy", files=(DataFile("a.bin", (url + "/a.bin",), int(size), md5=md5),)))
"""


def child(server):
    args = [sys.executable, "-c", CHILD, server.url, str(len(DATA)), hashlib.md5(DATA).hexdigest()]
    return subprocess.Popen(args, cwd=Path(__file__).resolve().parents[1], env=os.environ.copy())


def test_two_processes_share_one_download(site):
    with serve(site) as server:
        server.pace = 0.01
        two = [child(server), child(server)]
        assert [process.wait(20) for process in two] == [0, 0]
        assert len(server.requests) == 1
    assert left_over() == ["a.bin"]


def test_killed_in_the_middle_then_resumed(site):
    part = cache_dir("raw", "toy", "a.bin.part")
    with serve(site) as server:
        server.pace = 0.05
        process = child(server)
        until = time.monotonic() + 20
        while not (part.exists() and part.stat().st_size) and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert 0 < part.stat().st_size < len(DATA)
        server.pace = 0
        fetch(spec_at(server.url))
        assert server.requests[-1][1].startswith("bytes=")
    assert (part.parent / "a.bin").read_bytes() == DATA


def test_official_files_through_the_mirror(shared_data, monkeypatch):
    monkeypatch.setenv("GZ_MIRROR", f"file://{shared_data}/mirror")
    monkeypatch.setenv("GZ_OFFLINE", "1")
    folder = fetch("mnist")
    assert len(verify("mnist")["files"]) == 4 and data_path("mnist") == folder
    with open(folder / "t10k-labels-idx1-ubyte.gz", "r+b") as f:
        f.seek(100)
        f.write(b"?")
    with pytest.raises(MissingError, match="damaged"):
        verify("mnist")
    assert remove("mnist") == [folder] and not folder.exists()
