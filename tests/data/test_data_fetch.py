"""Downloads against a server that stalls, cuts off, redirects, refuses ranges, answers 503 and lies."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import ROOT
from pictures import write
from server import serve

from gzcli.__main__ import main
from gzcli.core.errors import MissingError, UsageError
from gzcli.data.download import fetch as fetching
from gzcli.data.download import http
from gzcli.data.download.fetch import fetch
from gzcli.data.sets.library import data_path, remove, verify
from gzcli.data.sets.registry import SPECS, DataFile, is_fetched, raw_dir
from gzcli.store.paths import cache_dir

DATA = random.Random(0).randbytes(100_000)
MD5 = hashlib.md5(DATA).hexdigest()


@pytest.fixture(autouse=True)
def _quick(home, monkeypatch):
    monkeypatch.delenv("GZ_OFFLINE", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(http, "BACKOFF", 0.01)
    monkeypatch.setattr(http, "BLOCK", 1 << 12)


@pytest.fixture
def site(tmp_path):
    return write(tmp_path / "site", {"a.bin": DATA})


def spec_at(*urls: str):
    """A set `toy` of one file `a.bin`."""
    file = DataFile("a.bin", tuple(f"{url}/a.bin" for url in urls), len(DATA), md5=MD5)
    return replace(SPECS["mnist"], name="toy", files=(file,))


def left_over() -> list[str]:
    return sorted(path.name for path in cache_dir("raw", "toy").glob("*"))


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
    (["cut"] * 6, None),  # progress each time: never given up
]


def test_recovers(site):
    for faults, asked in RECOVERED:
        seen = []
        with serve(site, *faults) as server:
            fetch(spec_at(server.url), progress=lambda *row, seen=seen: seen.append(row))
            assert asked is None or [range_ for _, range_ in server.requests] == asked, faults
        assert is_fetched_whole(), faults
        assert seen[-1] == (len(DATA), len(DATA)) and {total for _, total in seen} == {len(DATA)}, faults
        forget()


def test_a_connection_that_falls_silent_is_resumed(site, monkeypatch):
    """In one piece and in four. Only silence in the middle of a body counts: how long the server takes to
    answer depends on how busy the machine is."""
    urlopen, said = urllib.request.urlopen, []

    def impatient(request, timeout):
        response = urlopen(request, timeout=timeout)
        response.fp.raw._sock.settimeout(1)
        return response

    monkeypatch.setattr(urllib.request, "urlopen", impatient)
    with serve(site, "stall", "ok", "ok", "stall") as server:
        fetch(spec_at(server.url), say=said.append)
        assert is_fetched_whole() and server.requests == [("/a.bin", None), ("/a.bin", "bytes=50000-")]
        forget()
        monkeypatch.setattr(http, "LARGE", 50_000)
        fetch(spec_at(server.url), say=said.append)
        assert is_fetched_whole() and len(server.requests) == 2 + 6
    assert len(said) == 2 and all("stalled for" in text for text in said)


def test_bad_answers_are_named_and_leave_nothing(site):
    """Also a page of the right size under another type than HTML."""
    for fault, named in (
        ("html", "an HTML page"),
        ("wrong", "wrong checksum"),
        ("long", "wrong size: 100,004 bytes where 100,000"),
        ("404", "404"),
        ("astray", "is no address, or leads to one that is none"),
        ("503", "503"),
        ("ok", "an HTML page"),
    ):
        if fault == "ok":
            (site / "a.bin").write_bytes(b"<html>" + b" " * 99_994)
        with serve(site, *[fault] * 10) as server, pytest.raises(MissingError, match=named) as e:
            fetch(spec_at(server.url))
        assert e.value.code == 3 and "`a.bin`" in e.value.message and "gz data download toy" in e.value.hint
        assert left_over() == [], fault


def test_a_download_goes_on_whatever_an_earlier_try_has_left(site, monkeypatch):
    monkeypatch.setattr(http, "LARGE", 50_000)
    part = raw_dir(spec_at()) / "a.bin.part"
    part.parent.mkdir(parents=True)
    sizes = {"half": 50_000, "all": 100_000, "more": 100_001, "a piece": 10}
    with serve(site) as server:
        for source in (None, str(site)):
            for left in (*sizes, "a folder", "a lost link"):
                if left == "a folder":
                    part.mkdir()
                elif left == "a lost link":
                    part.symlink_to("/nowhere/a.bin")
                else:
                    part.write_bytes(b"x" * sizes[left])
                if left == "a piece":
                    part.with_name("a.bin.part1").write_bytes(b"x" * 25_000)
                fetch(spec_at(server.url), source=source)
                assert is_fetched_whole(), (source, left)
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

    with monkeypatch.context() as patch, pytest.raises(MissingError, match="cannot be written"):
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
    for content, source, named in (
        (DATA, tmp_path / "none", "there is no"),
        (DATA[:-1], site, "wrong size"),
        (DATA[:-1] + b"?", site, "wrong checksum"),
    ):
        (site / "a.bin").write_bytes(content)
        with pytest.raises(MissingError, match=named):
            fetch(spec_at(), source=str(source))
    with pytest.raises(UsageError, match="4 files"):
        fetch("mnist", source=str(site / "a.bin"))
    with pytest.raises(UsageError, match=r"`http://\[::1` is no address"):
        fetch(spec_at(), source="http://[::1")
    with pytest.raises(MissingError, match="is no address"):
        fetch(spec_at("http://[::1"))
    monkeypatch.setenv("GZ_MIRROR", "http://[::1")
    with pytest.raises(UsageError, match="is no address"):
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
url, size, md5, large, sabotage = sys.argv[1:]
http.LARGE, http.BLOCK, http.TIMEOUT = int(large), 1 << 12, 10**6
exec(sabotage)
fetch(replace(SPECS["mnist"], name="toy", files=(DataFile("a.bin", (url + "/a.bin",), int(size), md5=md5),)))
"""
PATIENCE = 240  # seconds until a process counts as hanging


def child(url, *, large=10**9, sabotage=""):
    args = [url, str(len(DATA)), MD5, str(large), sabotage]
    return subprocess.Popen([sys.executable, "-c", CHILD, *args], cwd=ROOT, stderr=subprocess.PIPE)


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


QUARTERS = ["bytes=0-24999", "bytes=25000-49999", "bytes=50000-74999", "bytes=75000-"]
FIRST = "bytes=0-0"  # asked for to see whether ranges are served


@pytest.fixture
def large(monkeypatch):
    monkeypatch.setattr(http, "LARGE", 50_000)


def ranges(server) -> list[str | None]:
    """The first request, then the others in the order of their bytes."""
    first, *others = [asked for _, asked in server.requests]
    return [first, *sorted(others, key=lambda asked: int(asked.split("=")[1].split("-")[0]) if asked else -1)]


def asked_bytes(server) -> int:
    """How many bytes the requests that followed the first asked for."""
    spans = [asked.removeprefix("bytes=").split("-") for asked in ranges(server)[1:]]
    return sum(int(last or len(DATA) - 1) + 1 - int(first) for first, last in spans)


def test_a_large_file_comes_in_pieces(site, large):
    """Over four connections at once: each waits after its half, until all four do."""
    seen = []

    def progress(done, total):
        seen.append((done, total))
        if server.busy == 4 and 0 < done < len(DATA):
            server.released.set()

    with serve(site, "ok", *["hold"] * 4) as server:
        fetch(spec_at(server.url), progress=progress)
        assert server.released.is_set() and ranges(server) == [FIRST, *QUARTERS]
    assert is_fetched_whole() and seen[-1] == (len(DATA), len(DATA)) and seen == sorted(seen)


RECOVERED_PIECES = [  # faults, how many requests there are, whether one connection goes on
    (["503"], 6, False),
    (["ok", "503"], 6, False),
    (["ok", *["cut"] * 5], 10, False),
    (["ok", "other"], 6, False),
    (["ok", *["open"] * 3], 5, False),
    (["redirect", "ok", "redirect"], 7, False),
    (["whole", "whole"], 2, False),  # no ranges
    (["ok", *["whole"] * 5], None, True),
    (["ok", "ok", "404"], None, True),
    (["ok", "ok", *["503"] * 12], 17, True),  # a server that serves one at a time
]


def test_pieces_recover(site, large):
    for faults, requests, alone in RECOVERED_PIECES:
        said = []
        with serve(site, *faults) as server:
            fetch(spec_at(server.url), say=said.append)
            assert requests in (None, len(server.requests)) and is_fetched_whole(), faults
        assert any("going on with one connection" in text for text in said) == alone, faults
        forget()


def test_a_large_file_is_refused_at_the_first_look(site, large):
    for fault, named in (("html", "an HTML page"), ("long", "wrong size"), ("404", "404"), ("503", "503")):
        with serve(site, *[fault] * 10) as server, pytest.raises(MissingError, match=named):
            fetch(spec_at(server.url))
        assert {asked for _, asked in server.requests} == {FIRST} and left_over() == []


def test_a_piece_that_fails_leaves_the_others_for_a_resume(site, large, monkeypatch):
    monkeypatch.setattr(http, "TRIES", 1)
    with serve(site, "ok", *["cut"] * 4, *["503"] * 8) as server:
        with pytest.raises(MissingError, match="503") as e:
            fetch(spec_at(server.url))
        kept = http.held(raw_dir(spec_at()) / "a.bin.part")
        assert f"goes on from the {kept / 1e6:,.1f} MB" in e.value.hint and kept >= 12_500
        server.faults.clear()
        server.requests.clear()
        fetch(spec_at(server.url))
        assert asked_bytes(server) == len(DATA) - kept and is_fetched_whole()


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_pieces_interrupted_then_resumed(site, large, signum):
    """Three connections hang in a read that would never end."""
    raw = cache_dir("raw", "toy")
    with serve(site, "ok", "ok", *["hold"] * 3) as server:
        process = child(server.url, large=50_000)
        wait_for(lambda: len(left_over()) == 4 and all(map(http.size_of, raw.glob("a.bin.part*"))))
        process.send_signal(signum)
        assert process.wait(PATIENCE) != 0
        assert signum == signal.SIGKILL or b"KeyboardInterrupt" in process.stderr.read()
        kept = http.held(raw / "a.bin.part")
        assert left_over() == ["a.bin.part", "a.bin.part1", "a.bin.part2", "a.bin.part3"]
        assert 0 < kept < len(DATA)
        server.requests.clear()
        server.faults.clear()
        fetch(spec_at(server.url))
        assert asked_bytes(server) == len(DATA) - kept and is_fetched_whole()


def test_an_interrupt_ends_every_connection(site, large):
    """Each of which has brought its half."""

    def interrupt(done, total):
        if done and server.busy == 4:
            raise KeyboardInterrupt

    with serve(site, "ok", *["hold"] * 4) as server:
        with pytest.raises(KeyboardInterrupt):
            fetch(spec_at(server.url), progress=interrupt)
        server.released.set()
        wait_for(lambda: not any("(work)" in thread.name for thread in threading.enumerate()))
    assert 0 < http.held(raw_dir(spec_at()) / "a.bin.part") <= len(DATA) // 2


COPYING = """import os, signal
def copy(src, out, block, calls=[]):
    calls.append(1)
    out.write(src.read(10_000 if len(calls) == NTH else -1))
    if len(calls) == NTH:
        out.flush()
        os.kill(os.getpid(), signal.SIGKILL)
http.shutil.copyfileobj = copy
"""


@pytest.mark.parametrize("nth", [1, 3])
def test_killed_while_pieces_are_joined(site, large, nth):
    """In the middle of a copy; `tests/faults/test_killed.py` kills between the changes of files."""
    with serve(site) as server:
        process = child(server.url, large=50_000, sabotage=COPYING.replace("NTH", str(nth)))
        assert process.wait(PATIENCE) == -signal.SIGKILL
        assert "a.bin" not in left_over()
        server.requests.clear()
        fetch(spec_at(server.url))
        assert [asked for _, asked in server.requests] in ([FIRST], [])  # nothing is fetched twice
    assert is_fetched_whole()


ZEROS = ["bytes=0-24999", *QUARTERS[1:3], "bytes=40000-49999", "bytes=50000-74999", *[QUARTERS[3]] * 2]
LEFT = [  # the ending of each part → its bytes; the ranges asked for after the first
    ({"": DATA[:40_000]}, ["bytes=40000-49999", *QUARTERS[2:]]),  # by a single connection
    ({"": DATA[:80_000]}, ["bytes=80000-"]),
    ({"": DATA[:40_000], "1": DATA[25_000:30_000]}, ["bytes=40000-49999", *QUARTERS[2:]]),
    (
        {"": DATA[:10_000], "2": DATA[50_000:60_000]},
        ["bytes=10000-24999", QUARTERS[1], "bytes=60000-74999", QUARTERS[3]],
    ),
    ({"1": DATA[:25_001]}, QUARTERS),  # too long to be a piece
    ({"": bytes(40_000)}, [FIRST, *ZEROS]),  # of another file: all of it once more
    ({"": bytes(200_000)}, QUARTERS),
    ({"": DATA, "3": b"?"}, None),
]


def test_parts_of_earlier_tries(site, large):
    for left, asked in LEFT:
        write(cache_dir("raw", "toy"), {f"a.bin.part{ending}": content for ending, content in left.items()})
        with serve(site) as server:
            fetch(spec_at(server.url))
            requests = sorted(range_ for _, range_ in server.requests)
        assert requests == sorted([] if asked is None else [FIRST, *asked]), asked
        assert is_fetched_whole(), asked
        forget()


def test_an_estimated_size_gives_way_to_the_real_one(site, large):
    for about in (10, 10**6):
        for fault in ("ok", "whole", "unsized"):
            seen = []
            with serve(site, *[fault] * 9) as server:
                spec = estimated(about, server.url)
                fetch(spec, progress=lambda *row, seen=seen: seen.append(row))
                assert len(server.requests) == (5 if fault == "ok" else 2), (about, fault)
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
        assert "goes on from" in e.value.hint and (raw / "a.bin.part").exists() and not is_fetched(spec)
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
        assert f"`gz data download {words}`" in e.value.hint


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
        by_hand = (
            "get `a.bin`, `c.bin` at https://faces.example/get with a browser, then `gz data download toy"
        )
        assert e.value.hint == f"{by_hand} --from DIR`"
        server.faults.extend(["html"] * 2)
        # without a page for a browser there is no use in fetching the other files
        with pytest.raises(MissingError, match=r"^`a\.bin` of `toy`"):
            fetch(replace(spec, page=""))
        server.requests.clear()
        fetch(spec, source=str(site))
        assert server.requests == [] and is_fetched(spec)


@pytest.fixture
def own():
    """A set `own` of two files that nobody serves."""
    file = DataFile("train.tar", (), len(DATA), md5=hashlib.md5(DATA).hexdigest())
    files = (file, replace(file, name="val.tar", size=10**15))
    return replace(SPECS["imagenet"], name="own", files=files)


def test_no_address_no_network(own, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("the network is touched"))
    said = []
    for offline in "01":
        monkeypatch.setenv("GZ_OFFLINE", offline)
        with pytest.raises(MissingError, match=r"`train\.tar`, `val\.tar` of `own` could not .* log-in") as e:
            fetch(own, pack_size=10**18, say=said.append)
        assert said == []
        assert "https://image-net.org" in e.value.hint and "`gz data download own --from DIR`" in e.value.hint
        assert "`train` and `val`" in e.value.hint


def test_linked_files_stay_where_they_are(own, site, monkeypatch):
    monkeypatch.setattr(fetching, "LARGE", 50_000)
    monkeypatch.chdir(site.parent)
    own = replace(own, files=own.files[:1])
    (site / "train.tar").write_bytes(DATA[:-1] + b"?")
    with pytest.raises(MissingError, match="wrong checksum"):
        fetch(own, source="site")
    assert (site / "train.tar").exists() and not list(raw_dir(own).iterdir())
    (site / "train.tar").write_bytes(DATA)
    said, seen = [], []
    link = fetch(own, source="site", say=said.append, progress=lambda *row: seen.append(row)) / "train.tar"
    assert link.is_symlink() and os.readlink(link) == str(site / "train.tar") and is_fetched(own)
    assert said == ["checking the md5 of `train.tar`, 0 MB"] and seen[-1] == (len(DATA), len(DATA))
    (site / "train.tar").rename(site / "moved.tar")
    assert not is_fetched(own)  # a dangling link
    fetch(own, source=str(site / "moved.tar"))
    assert link.resolve() == site / "moved.tar"
    link.unlink()
    (site / "mirror" / "own").mkdir(parents=True)
    (site / "mirror" / "own" / "train.tar").symlink_to(site / "moved.tar")
    monkeypatch.setenv("GZ_MIRROR", str(site / "mirror"))
    monkeypatch.setenv("GZ_OFFLINE", "1")
    fetch(own)
    assert os.readlink(link) == str(site / "mirror" / "own" / "train.tar")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SPECS, "own", own)
        assert len(verify("own")["files"]) == 1
        assert remove("own") == [raw_dir(own)] and not raw_dir(own).exists()
    assert (site / "moved.tar").read_bytes() == DATA


def test_linked_folders(own, site, monkeypatch):
    """Of class folders, there or in a folder of the set's name; a flat one is not linked."""
    monkeypatch.setitem(SPECS, "own", own)
    flat = write(site / "flat", {"train/n01/a.jpg": b"picture", "val/b.jpg": b"picture"})
    with pytest.raises(MissingError, match="does not exist") as e:
        fetch(own, source=str(flat))
    assert "folders of class folders" in e.value.hint and not is_fetched(own)
    for source, root in ((site, site), (site / "x", site / "x" / "own")):
        pictures = {"train/n01/a.jpg": b"picture", "val/n01/b.jpg": b"picture"}
        write(root, pictures)
        folder = fetch(own, source=str(source))
        assert is_fetched(own) and sorted(p.name for p in folder.iterdir()) == ["train", "val"]
        assert os.readlink(folder / "val") == str(root / "val")
        assert fetch(own) == folder  # they are there
        assert verify("own")["files"] == [] and data_path("own") == folder
        assert remove("own") == [folder] and not folder.exists()
        assert {name: (root / name).read_bytes() for name in pictures} == pictures


def test_a_large_need_is_told_first(site, large, monkeypatch):
    """Room for what is missing, and for a piece twice, is needed."""
    said, needs = [], []
    fetch(spec_at(), source=str(site), pack_size=10**6, say=said.append)
    assert said == []
    forget()
    monkeypatch.setattr(fetching, "LARGE", 50_000)
    with serve(site, "404") as server, pytest.raises(MissingError):
        fetch(spec_at(server.url), pack_size=2 * 10**6, say=said.append)
    told = rf"`toy`: fetching 0 MB into `{raw_dir(spec_at())}`, its pack will take 2 MB; [\d,]+ MB are free"
    assert len(said) == 1 and re.fullmatch(told, said[0])
    with pytest.raises(MissingError, match="are needed"):
        fetch(spec_at(), source=str(site), pack_size=10**18)
    monkeypatch.setattr(fetching, "need_space", lambda folder, size: needs.append(size))
    for number, size in (("", 25_000), ("1", 5_000)):
        (raw_dir(spec_at()) / f"a.bin.part{number}").write_bytes(DATA[25_000:][:size])
    fetch(spec_at(), source=str(site))
    assert needs == [len(DATA) - 30_000 + 25_000]


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
