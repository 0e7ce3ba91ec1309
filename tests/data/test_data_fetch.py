"""Downloads of sets and of weights against a server that stalls, cuts off, redirects, refuses ranges, and
lies; passwords in addresses are shown nowhere."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from helpers import ROOT
from pictures import write
from server import serve

from gzcli.__main__ import main
from gzcli.cli.app import run
from gzcli.core.errors import GzError, MissingError, UsageError, redacted
from gzcli.core.units import size as in_words
from gzcli.data.download import fetch as fetching
from gzcli.data.download import http
from gzcli.data.download.fetch import JUDGE_WEIGHTS, fetch, fetch_weights
from gzcli.data.library import data_path, import_set, remove, verify
from gzcli.data.sets.registry import SPECS, DataFile, is_fetched, locate, raw_dir
from gzcli.launch import launcher
from gzcli.metrics.metric import metric_weights, metrics
from gzcli.store import files, runs
from gzcli.store.hub import INCEPTION
from gzcli.store.paths import cache_dir

DATA = random.Random(0).randbytes(100_000)
MD5 = hashlib.md5(DATA).hexdigest()


@pytest.fixture(autouse=True)
def _quick(home, monkeypatch):
    monkeypatch.delenv("GZ_OFFLINE", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(http, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(http, "BLOCK_BYTES", 1 << 12)


@pytest.fixture
def site(tmp_path):
    return write(tmp_path / "site", {"a.bin": DATA})


def spec_at(*urls: str):
    """A set `toy` of one file `a.bin`."""
    file = DataFile("a.bin", tuple(f"{url}/a.bin" for url in urls), len(DATA), md5=MD5)
    return replace(SPECS["mnist"], name="toy", files=(file,))


def left_over(*where: str) -> list[str]:
    return sorted(path.name for path in cache_dir(*(where or ("raw", "toy"))).glob("[!.]*"))


def is_fetched_whole() -> bool:
    return left_over() == ["a.bin"] and (cache_dir("raw", "toy") / "a.bin").read_bytes() == DATA


def forget():
    (cache_dir("raw", "toy") / "a.bin").unlink()


RECOVERED = [  # faults, the ranges asked for
    ([], [None]),
    (["redirect"], [None, None]),
    (["503", "503"], [None, None, None]),
    (["cut"], [None, "bytes=50000-"]),
    (["cut", "whole"], [None, "bytes=50000-"]),
    (["cut", "503", "cut"], [None, "bytes=50000-", "bytes=50000-", "bytes=75000-"]),
    (["mixed"], [None, "bytes=50000-", None]),  # half of another file, then the rest of this one
    (["cut"] * 6, None),  # progress each time: never given up
]


def test_recovers(site):
    for faults, spans in RECOVERED:
        seen = []
        with serve(site, *faults) as server:
            fetch(spec_at(server.url), progress=lambda *row, seen=seen: seen.append(row))
            assert spans is None or [range_ for _, range_ in server.requests] == spans, faults
        assert is_fetched_whole(), faults
        assert seen[-1] == (len(DATA), len(DATA)) and {total for _, total in seen} == {len(DATA)}, faults
        forget()


def test_a_connection_that_falls_silent_is_resumed(site, monkeypatch):
    """Only silence in the middle of a body counts: how long the server takes to answer depends on how busy
    the machine is."""
    urlopen, said = urllib.request.urlopen, []

    def impatient(request, timeout):
        response = urlopen(request, timeout=timeout)
        response.fp.raw._sock.settimeout(1)
        return response

    monkeypatch.setattr(urllib.request, "urlopen", impatient)
    with serve(site, "stall") as server:
        fetch(spec_at(server.url), say=said.append)
        assert is_fetched_whole() and server.requests == [("/a.bin", None), ("/a.bin", "bytes=50000-")]
    assert len(said) == 1 and "sent nothing for" in said[0]


def test_bad_answers_are_named_and_leave_nothing(site):
    """Also a page of the right size under another type than HTML."""
    for fault, named in (
        ("html", "an HTML page"),
        ("wrong", "wrong checksum"),
        ("long", "wrong size: 100,004 bytes instead of 100,000"),
        ("404", "404"),
        ("astray", "is not a valid URL, or redirects to an invalid one"),
        ("503", "503"),
        ("ok", "an HTML page"),
    ):
        if fault == "ok":
            (site / "a.bin").write_bytes(b"<html>" + b" " * 99_994)
        with serve(site, *[fault] * 10) as server, pytest.raises(MissingError, match=named) as e:
            fetch(spec_at(server.url))
        assert e.value.code == 3 and "`a.bin`" in e.value.message and "gz data download toy" in e.value.hint
        assert left_over() == [], fault


def test_what_is_no_file_where_a_part_should_be_gives_way(site):
    part = raw_dir(spec_at()) / "a.bin.part"
    part.parent.mkdir(parents=True)
    makers = ((Path.mkdir,), (Path.symlink_to, "/nowhere/a.bin"), (Path.write_bytes, DATA * 2))
    with serve(site) as server:
        for source, (make, *args) in product((None, str(site)), makers):
            make(part, *args)
            fetch(spec_at(server.url), source=source)
            assert is_fetched_whole(), (source, make)
            forget()


def test_a_server_that_sends_other_ranges_is_given_up(site):
    """Half, then another range than asked for, so that the half is dropped, then half again: no progress."""
    with serve(site, *["cut", "other"] * 50) as server:
        with pytest.raises(MissingError, match="times in a row"):
            fetch(spec_at(server.url))
        assert len(server.requests) < 12


def test_a_store_that_may_only_be_read_is_told(site, monkeypatch):
    def refuse(path, *args, **how):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    with monkeypatch.context() as patch, pytest.raises(MissingError, match="is not writable"):
        patch.setattr(Path, "mkdir", refuse)
        fetch(spec_at(), source=str(site))
    fetch(spec_at(), source=str(site))
    monkeypatch.setattr("shutil.rmtree", refuse)
    with pytest.raises(MissingError, match="cannot be removed: Read-only file system"):
        remove(spec_at())
    assert left_over() == ["a.bin"]


def test_next_address_mirror_and_source(site, tmp_path, monkeypatch):
    mirror = write(tmp_path / "mirror", {"toy/a.bin": DATA})
    with serve(tmp_path / "nothing") as dead, serve(site) as server, serve(mirror) as online:

        def fetched(*urls: str, source: object = None) -> None:
            fetch(spec_at(dead.url, *urls), source=source and str(source))
            assert is_fetched_whole(), source
            forget()

        fetched(server.url)
        assert len(dead.requests) == 1
        for address in (str(mirror), f"file://{mirror}", online.url):
            monkeypatch.setenv("GZ_MIRROR", address)
            fetched()
        assert online.requests == [("/toy/a.bin", None)]
        monkeypatch.delenv("GZ_MIRROR")
        urls = (f"file://{site}", server.url, f"{server.url}/a.bin")
        for source in (site, site / "a.bin", mirror, *urls):
            fetched(source=source)
        assert len(dead.requests) == 1


def test_bad_sources(site, tmp_path, monkeypatch):
    at, no_address = str(site), "http://[::1"
    for content, spec, source, error, named in (
        (DATA, spec_at(), str(tmp_path / "none"), MissingError, "does not exist"),
        (DATA[:-1], spec_at(), at, MissingError, "wrong size"),
        (DATA[:-1] + b"?", spec_at(), at, MissingError, "wrong checksum"),
        (DATA, "mnist", str(site / "a.bin"), UsageError, "4 files"),
        (DATA, spec_at(), no_address, UsageError, r"`http://\[::1` is not a valid URL"),
        (DATA, spec_at(no_address), None, MissingError, "is not a valid URL"),
    ):
        (site / "a.bin").write_bytes(content)
        with pytest.raises(error, match=named):
            fetch(spec, source=source)
    monkeypatch.setenv("GZ_MIRROR", no_address)
    with pytest.raises(UsageError, match="is not a valid URL"):
        fetch(spec_at())
    assert left_over() == []


def test_offline(site, monkeypatch):
    monkeypatch.setenv("GZ_OFFLINE", "1")
    with serve(site) as server:
        for source in (None, server.url):
            with pytest.raises(MissingError, match="GZ_OFFLINE"):
                fetch(spec_at(server.url), source=source)
        fetch(spec_at(server.url), source=str(site))  # a local file needs no network
        assert server.requests == []


def test_a_proxy_is_used(site, monkeypatch):
    monkeypatch.setattr(urllib.request, "_opener", None)  # it remembers the proxies of the first request
    monkeypatch.delenv("no_proxy")
    with serve(site) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        fetch(spec_at("http://data.invalid"))
        assert proxy.requests == [("http://data.invalid/a.bin", None)] and is_fetched_whole()


CHILD = """
import sys
from dataclasses import replace
from gzcli.data.download import http
from gzcli.data.download.fetch import fetch
from gzcli.data.sets.registry import SPECS, DataFile
url, size, md5 = sys.argv[1:]
http.BLOCK, http.TIMEOUT = 1 << 12, 10**6
fetch(replace(SPECS["mnist"], name="toy", files=(DataFile("a.bin", (url + "/a.bin",), int(size), md5=md5),)))
"""
PATIENCE = 240  # seconds until a process counts as hanging


def child(url):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, url, str(len(DATA)), MD5], cwd=ROOT, stderr=subprocess.PIPE
    )


def wait_for(condition):
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_two_processes_share_one_download(site):
    with serve(site) as server:
        server.pace = 0.01
        two = [child(server.url), child(server.url)]
        assert [process.wait(PATIENCE) for process in two] == [0, 0]
        assert len(server.requests) == 1 and is_fetched_whole()


FIRST = "bytes=0-0"  # asked for to see how large a file is


def resumed(server, size: int) -> None:
    """Fetches what is missing, and only that."""
    server.faults.clear()
    server.requests.clear()
    fetch(spec_at(server.url))
    assert server.requests == [("/a.bin", f"bytes={size}-")] and is_fetched_whole()


def test_killed_then_resumed(site):
    """The connection hangs in a read that would never end."""
    part = cache_dir("raw", "toy") / "a.bin.part"
    with serve(site, "hold") as server:
        process = child(server.url)
        wait_for(lambda: http.file_bytes(part))
        process.kill()
        assert process.wait(PATIENCE) == -signal.SIGKILL
        assert left_over() == ["a.bin.part"] and 0 < http.file_bytes(part) < len(DATA)
        resumed(server, http.file_bytes(part))


def test_an_interrupt_keeps_what_came(site):
    def interrupt(done, total):
        if done:
            raise KeyboardInterrupt

    with serve(site, "hold") as server:
        with pytest.raises(KeyboardInterrupt):
            fetch(spec_at(server.url), progress=interrupt)
        server.released.set()
        size = http.file_bytes(raw_dir(spec_at()) / "a.bin.part")
        assert 0 < size <= len(DATA) // 2
        resumed(server, size)


def test_what_fails_leaves_its_bytes_for_a_resume(site, monkeypatch):
    monkeypatch.setattr(http, "MAX_TRIES", 1)
    with serve(site, "cut", *["503"] * 8) as server:
        with pytest.raises(MissingError, match="503") as e:
            fetch(spec_at(server.url))
        size = http.file_bytes(raw_dir(spec_at()) / "a.bin.part")
        assert f"to resume after {in_words(size)}" in e.value.hint and size == 50_000
        resumed(server, size)


LEFT = [  # the ending of each part → its bytes; the ranges that are asked for
    ({"": DATA[:40_000]}, ["bytes=40000-"]),
    ({"": DATA[:40_000], "1": DATA[25_000:30_000]}, ["bytes=40000-"]),  # of four connections, once
    ({"1": DATA[:25_001], "3": b"?"}, [None]),
    ({"": bytes(40_000)}, ["bytes=40000-", None]),  # of another file: all of it once more
    ({"": bytes(200_000)}, [None]),
    ({"": DATA, "3": b"?"}, []),
]


def test_parts_of_earlier_tries(site):
    for left, spans in LEFT:
        write(cache_dir("raw", "toy"), {f"a.bin.part{ending}": content for ending, content in left.items()})
        with serve(site) as server:
            fetch(spec_at(server.url))
            requests = [range_ for _, range_ in server.requests]
        assert requests == spans and is_fetched_whole(), spans
        forget()


def test_an_estimated_size_gives_way_to_the_real_one(site):
    for about in (10, 10**6):
        for fault in ("ok", "whole", "unsized"):
            seen = []
            with serve(site, *[fault] * 9) as server:
                spec = estimated(about, server.url)
                fetch(spec, progress=lambda *row, seen=seen: seen.append(row))
                assert len(server.requests) == 2, (about, fault)
            assert is_fetched_whole() and is_fetched(spec) and seen[-1] == (len(DATA), len(DATA)), (
                about,
                fault,
            )
            assert fault == "unsized" or {total for _, total in seen} == {len(DATA)}
            assert verify_files(spec) == ["a.bin"]
            forget()


def test_an_estimated_size_is_resumed_copied_and_checked(site, tmp_path):
    raw = cache_dir("raw", "toy")
    with serve(site, "ok", "cut", *["503"] * 4, "ok", "ok") as server:
        spec = estimated(90_000, server.url)
        with pytest.raises(MissingError, match="503") as e:
            fetch(spec)
        assert "to resume after" in e.value.hint and (raw / "a.bin.part").exists() and not is_fetched(spec)
        fetch(spec)
        assert server.requests[-1][1] == "bytes=50000-"
        (raw / "a.bin").rename(raw / "a.bin.part")  # killed before it was renamed
        fetch(spec)
        assert server.requests[-1][1] == FIRST
        (raw / "a.bin").unlink()
        server.faults.extend(["wrong"] * 2)
        with pytest.raises(MissingError, match="wrong checksum"):
            fetch(spec)
        assert left_over() == []
    fetch(spec, source=str(site))
    assert (raw / "a.bin").read_bytes() == DATA


def estimated(about: int, *urls: str):
    spec = spec_at(*urls)
    return replace(spec, files=(replace(spec.files[0], size=about, exact=False),))


def verify_files(spec) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SPECS, "toy", spec)
        return [Path(path).name for path in verify("toy")["files"]]


def test_every_size_of_a_set_lies_in_one_folder_and_is_verified(site, monkeypatch):
    small = spec_at()
    file = replace(small.files[0], name="a_64.bin", exact=False, size=7)
    both = replace(small, size=28, larger=((64, (file,)),))
    (site / "a_64.bin").write_bytes(DATA)
    fetch(both.sized(64), source=str(site))
    assert is_fetched(both.sized(64)) and not is_fetched(both) and left_over() == ["a_64.bin"]
    fetch(both, source=str(site))
    assert verify_files(both) == ["a.bin", "a_64.bin"]
    (raw_dir(both) / "a_64.bin").write_bytes(DATA[:-1])
    with pytest.raises(MissingError, match=r"a_64\.bin` is damaged"):
        verify_files(both)
    monkeypatch.setitem(SPECS, "toy", both)
    remove("toy")
    for sized, words in ((both, "toy"), (both.sized(64), "toy --size 64")):
        with pytest.raises(MissingError) as e:
            fetch(sized, source=str(site.parent))
        assert f"`gz data download {words} --from DIR`" in e.value.hint


def test_by_hand_what_a_program_is_refused(site):
    write(site, {"b.bin": DATA, "c.bin": DATA})
    with serve(site, "html", "ok", "html") as server:
        file = spec_at().files[0]
        names = ("a.bin", "b.bin", "c.bin")
        files = tuple(replace(file, name=name, urls=(f"{server.url}/{name}",)) for name in names)
        spec = replace(spec_at(), files=files, page="https://faces.example/get")
        with pytest.raises(MissingError, match="HTML page") as e:
            fetch(spec)
        assert "`a.bin`, `c.bin` of `toy`" in e.value.message and left_over() == ["b.bin"]
        by_hand = "download `a.bin`, `c.bin` from https://faces.example/get in a browser"
        assert e.value.hint == f"{by_hand}, then run `gz data download toy --from DIR`"
        server.faults.extend(["html"] * 2)
        # without a page for a browser there is no use in fetching the other files
        with pytest.raises(MissingError, match=r"^`a\.bin` of `toy`"):
            fetch(replace(spec, page=""))
        server.requests.clear()
        fetch(spec, source=str(site))
        assert server.requests == [] and is_fetched(spec)


@pytest.fixture
def spec():
    """A set `own` of two files that nobody serves."""
    file = DataFile("train.tar", (), len(DATA), md5=hashlib.md5(DATA).hexdigest())
    files = (file, replace(file, name="val.tar", size=10**15))
    return replace(SPECS["imagenet"], name="own", files=files)


def test_no_address_no_network(spec, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("the network is touched"))
    said = []
    for offline in "01":
        monkeypatch.setenv("GZ_OFFLINE", offline)
        with pytest.raises(MissingError, match=r"`train\.tar`, `val\.tar` of `own` could not .* login") as e:
            fetch(spec, pack_size=10**18, say=said.append)
        assert said == []
        assert "https://image-net.org" in e.value.hint and "`gz data download own --from DIR`" in e.value.hint
        assert "`train` and `val`" in e.value.hint


def test_linked_files_stay_where_they_are(spec, site, monkeypatch):
    monkeypatch.setattr(fetching, "ANNOUNCED_BYTES", 50_000)
    monkeypatch.chdir(site.parent)
    spec = replace(spec, files=spec.files[:1])
    (site / "train.tar").write_bytes(DATA[:-1] + b"?")
    with pytest.raises(MissingError, match="wrong checksum"):
        fetch(spec, source="site")
    assert (site / "train.tar").exists() and not list(raw_dir(spec).iterdir())
    (site / "train.tar").write_bytes(DATA)
    said, seen = [], []
    link = fetch(spec, source="site", say=said.append, progress=lambda *row: seen.append(row)) / "train.tar"
    assert link.is_symlink() and os.readlink(link) == str(site / "train.tar") and is_fetched(spec)
    assert said == ["checking the md5 of `train.tar` (100 kB)"] and seen[-1] == (len(DATA), len(DATA))
    (site / "train.tar").rename(site / "moved.tar")
    assert not is_fetched(spec)  # a dangling link
    fetch(spec, source=str(site / "moved.tar"))
    assert link.resolve() == site / "moved.tar"
    link.unlink()
    (site / "mirror" / "own").mkdir(parents=True)
    (site / "mirror" / "own" / "train.tar").symlink_to(site / "moved.tar")
    monkeypatch.setenv("GZ_MIRROR", str(site / "mirror"))
    monkeypatch.setenv("GZ_OFFLINE", "1")
    fetch(spec)
    assert os.readlink(link) == str(site / "mirror" / "own" / "train.tar")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SPECS, "own", spec)
        assert len(verify("own")["files"]) == 1
        assert remove("own") == [raw_dir(spec)] and not raw_dir(spec).exists()
    assert (site / "moved.tar").read_bytes() == DATA


def test_linked_folders(spec, site, monkeypatch):
    """Of class folders, there or in a folder of the set's name; a flat one is not linked."""
    monkeypatch.setitem(SPECS, "own", spec)
    flat = write(site / "flat", {"train/n01/a.jpg": b"picture", "val/b.jpg": b"picture"})
    with pytest.raises(MissingError, match="does not exist") as e:
        fetch(spec, source=str(flat))
    assert "a folder for each class" in e.value.hint and not is_fetched(spec)
    for source, root in ((site, site), (site / "x", site / "x" / "own")):
        pictures = {"train/n01/a.jpg": b"picture", "val/n01/b.jpg": b"picture"}
        write(root, pictures)
        folder = fetch(spec, source=str(source))
        assert is_fetched(spec) and sorted(p.name for p in folder.iterdir()) == ["train", "val"]
        assert os.readlink(folder / "val") == str(root / "val")
        assert fetch(spec) == folder  # they are there
        assert verify("own")["files"] == [] and data_path("own") == folder
        assert remove("own") == [folder] and not folder.exists()
        assert {name: (root / name).read_bytes() for name in pictures} == pictures


def test_a_large_need_is_told_first(site, monkeypatch):
    """Room for what is missing is needed."""
    said, needs = [], []
    fetch(spec_at(), source=str(site), pack_size=10**6, say=said.append)
    assert said == []
    forget()
    monkeypatch.setattr(fetching, "ANNOUNCED_BYTES", 50_000)
    with serve(site, "404") as server, pytest.raises(MissingError):
        fetch(spec_at(server.url), pack_size=2 * 10**6, say=said.append)
    where = re.escape(str(raw_dir(spec_at())))
    regex = rf"`toy`: downloading 100 kB to `{where}`, the pack will take 2.0 MB; [\d,.]+ [MG]B free"
    assert len(said) == 1 and re.fullmatch(regex, said[0])
    with pytest.raises(MissingError, match="of free space"):
        fetch(spec_at(), source=str(site), pack_size=10**18)
    monkeypatch.setattr(fetching, "need_space", lambda folder, size: needs.append(size))
    (raw_dir(spec_at()) / "a.bin.part").write_bytes(DATA[:25_000])
    fetch(spec_at(), source=str(site))
    assert needs == [len(DATA) - 25_000]


def test_download_takes_a_size_and_channels(monkeypatch, capsys):
    seen = []

    def spy(spec, **how):
        seen.append((spec.files[0].name, how["pack_size"]))
        raise MissingError("enough")

    monkeypatch.setattr(fetching, "fetch", spy)
    for words in ([], ["--size", "100"], ["--size", "300", "--channels", "3"]):
        assert main(["data", "download", "pneumoniamnist", *words]) == 3
    n = 4_708 + 524 + 624
    assert seen == [
        ("pneumoniamnist.npz", n * 28**2),
        ("pneumoniamnist_128.npz", n * 100**2),
        ("pneumoniamnist_224.npz", n * 300**2 * 3),
    ]
    assert main(["data", "download", "mnist", "--channels", "2"]) == 2 and len(seen) == 3
    assert main(["data", "download", "digits", "--size", "8", "--channels", "3", "--json"]) == 0
    assert '"shape": [3, 8, 8]' in capsys.readouterr().out


BYTES = random.Random(1).randbytes(60_000)


@pytest.fixture
def weights(tmp_path):
    """A folder that is served: it has the file of Inception as a mirror and as its publisher."""
    return write(tmp_path / "site", {f"weights/{INCEPTION}": BYTES, f"there/{INCEPTION}": BYTES})


def published(monkeypatch, url: str) -> None:
    checksum = hashlib.sha256(BYTES).hexdigest()
    file = DataFile(INCEPTION, (f"{url}/there/{INCEPTION}",), len(BYTES), sha256=checksum)
    monkeypatch.setitem(JUDGE_WEIGHTS, "inception", replace(JUDGE_WEIGHTS["inception"], file=file))


def test_a_cut_download_is_resumed_and_said(weights, monkeypatch):
    messages = []
    with serve(weights, "cut", "503") as server:
        published(monkeypatch, server.url)
        place = fetch_weights("inception", say=messages.append)
        assert place == cache_dir("weights", INCEPTION) and place.read_bytes() == BYTES
        assert server.requests[-1] == (f"/there/{INCEPTION}", f"bytes={len(BYTES) // 2}-")
        count = len(server.requests)
        assert fetch_weights("inception", say=messages.append) == place and len(server.requests) == count
    what, where = "60 kB, licence: Apache-2.0", f"from {server.url}/there/{INCEPTION}"
    assert what in messages[0] and where in messages[0] and "InceptionV3" in messages[0]
    assert left_over("weights") == [INCEPTION]


def test_other_bytes_and_no_network_leave_nothing_but_advice(weights, monkeypatch):
    with serve(weights, "wrong") as server:
        published(monkeypatch, server.url)
        with pytest.raises(MissingError, match="has the wrong checksum") as error:
            fetch_weights("inception")
    place = cache_dir("weights", INCEPTION)
    assert error.value.hint == f"save the file as `{place}` or name it with `--weights FILE`"
    assert left_over("weights") == []
    monkeypatch.setattr(http, "MAX_TRIES", 1)
    with pytest.raises(MissingError, match="cannot be read"):  # nobody listens there any more
        fetch_weights("inception")


def test_a_mirror_comes_first_and_alone_when_offline(weights, monkeypatch, tmp_path):
    with serve(weights) as server:
        published(monkeypatch, server.url)
        monkeypatch.setenv("GZ_OFFLINE", "1")
        monkeypatch.setenv("GZ_MIRROR", server.url)
        assert fetch_weights("inception") is None and not server.requests
        monkeypatch.delenv("GZ_OFFLINE")
        fetch_weights("inception")
        assert [path for path, _ in server.requests] == [f"/weights/{INCEPTION}"]
        shutil.rmtree(cache_dir("weights"))
        monkeypatch.setenv("GZ_OFFLINE", "1")
        monkeypatch.setenv("GZ_MIRROR", os.fspath(weights))
        assert fetch_weights("inception").read_bytes() == BYTES and len(server.requests) == 1


def test_the_metrics_that_fetch_are_those_that_need_it():
    assert metric_weights(("fd", "kid")) == ["inception"] and metric_weights(("fd", "kid_lenet")) == []
    assert set(metric_weights(metrics())) <= set(JUDGE_WEIGHTS)
    for entry in JUDGE_WEIGHTS.values():  # at least the smallest network's bytes
        if named := re.search(r"-([0-9a-f]{8})\.", entry.file.name):  # by how the checksum begins
            assert entry.file.sha256.startswith(named[1])
        assert entry.file.size > 50_000_000 and all(url.startswith("https://") for url in entry.file.urls)


def test_bench_fetches_what_its_metric_needs_before_it_starts(call, weights, monkeypatch):
    run = runs.create("vae", "digits", alias="mine")
    run.update(state="finished", step=60)
    (run.path / "run.yaml").write_text("model: {name: vae}\n")
    (run.path / "model.safetensors").touch()
    result = {"rows": [], "floor": {}, "notes": [], "metric": None, "places": {}, "provenance": {}}
    result |= {"data": "digits", "directions": {}}

    def work(folder, plan, **options):
        files.write_json(folder / "result.json", result)

    monkeypatch.setattr(launcher, "run", work)
    monkeypatch.setattr("gzcli.cli.bench.table", lambda *_, **__: None)
    with serve(weights) as server:
        published(monkeypatch, server.url)
        assert call("bench", "mine", "--data", "digits", "--metrics", "fd")[0] == 0 and not server.requests
        file = cache_dir().parent / "own.pth"
        file.touch()
        words = ("bench", "mine", "--data", "digits", "--metrics", "fd,fid")
        assert call(*words, "--weights", str(file))[0] == 0 and not server.requests
        code, _, stderr = call(*words)
        assert code == 0 and "downloading InceptionV3" in stderr and cache_dir("weights", INCEPTION).exists()


REDACTED = {
    "`https://ann:pa55@host/a.zip` answers 404": "`https://…@host/a.zip` answers 404",
    "https://host/a?token=S3cret&x=1: cut off": "https://host/a?… cut off",
    "see https://host:8080/a/b, or not": "see https://host:8080/a/b, or not",
    "http://ann:pa/55@host/x": "http://…@host/x",  # a password that should have been quoted
    "/here/https:/ann:pa55@host/x.zip": "/here/https:/…@host/x.zip",  # a URL taken for a path
    "https://host/x#access_token=S3cret": "https://host/x#…",
    "`file:///data/a@b?c` and C:/a@b": "`file:///data/a@b?c` and C:/a@b",
}


def test_redacted():
    for text, shown in REDACTED.items():
        assert redacted(text) == GzError(text).message == GzError("", hint=text).hint == shown


def test_user_and_password_are_sent_and_not_shown(site):
    said: list[str] = []
    with serve(site, "503", "404", "404") as server:
        secret = server.url.replace("://", "://ann:pa%2355@")
        with pytest.raises(GzError) as e:
            fetch(spec_at(), source=f"{secret}?token=S3cret", say=said.append)
        text = " ".join([*said, e.value.message, e.value.hint or ""])
        assert "trying again" in text and "404" in text
        assert not [word for word in ("ann", "pa%2355", "pa#55", "S3cret") if word in text]
        fetch(spec_at(), source=f"{secret}?token=S3cret")
        assert is_fetched_whole()
        assert "/a.bin?token=S3cret" in {path for path, _ in server.requests}
    request = http.request(secret)
    got = request.get_header("Authorization") or request.unredirected_hdrs["Authorization"]
    assert base64.b64decode(got.removeprefix("Basic ")) == b"ann:pa#55"
    assert http.request(secret).full_url == server.url  # and not in what an exception would show


def test_a_url_where_a_path_is_wanted(home):
    for make in (locate, lambda url: import_set(url, "mine")):
        with pytest.raises(UsageError, match="is a URL") as e:
            make("https://ann:pa55@host/photos.zip?token=S3cret")
        assert "pa55" not in str(e.value.message) and "S3cret" not in e.value.message and e.value.hint


def test_doctor_and_download_show_no_secrets(home, monkeypatch, capsys):
    monkeypatch.setenv("GZ_MIRROR", "http://ann:pa55@127.0.0.1:9/data?token=S3cret")
    monkeypatch.setattr(http, "BACKOFF_SECONDS", 0.0)
    monkeypatch.setenv("GZ_API_TOKEN", "T0ken")
    run(["doctor", "--json"])
    shown = capsys.readouterr().out
    checks = {check["name"]: check for check in json.loads(shown)["checks"]}
    assert checks["GZ_MIRROR"]["detail"] == "http://…@127.0.0.1:9/data?…"
    assert checks["GZ_API_TOKEN"]["detail"] == "set"
    assert "not reachable" in checks["mirror"]["detail"]
    words = ("--json", "--from", "http://ann:pa55@127.0.0.1:9/x?token=S3cret")
    assert run(["data", "download", "horse2zebra", *words]) == 3
    shown += "".join(capsys.readouterr())
    assert not [word for word in ("pa55", "S3cret", "T0ken") if word in shown]
