"""Streamed sets: where the bytes of members lie, the same batches as from a pack, by workers ahead."""

from __future__ import annotations

import contextlib
import gc
import io
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from draws import train_batches
from helpers import ROOT
from pictures import as_deflated, as_tar, as_zip, encoded, write

from gzcli.core.errors import DeviceError, MissingError, UsageError
from gzcli.data.packs import stream
from gzcli.data.packs.batches import TrainBatches, scan
from gzcli.data.packs.open import open_pack
from gzcli.data.packs.pack import Pack
from gzcli.data.packs.stream import Pictures, Prefetch, worker_count, write_index
from gzcli.data.readers.archive import Tar, Zip, open_members
from gzcli.data.readers.images import Span, read_span
from gzcli.data.readers.pictures import Decoding

CONTENT = np.random.default_rng(0).integers(0, 256, (64, 12, 12, 3), dtype=np.uint8)
FILES = {f"{'ab'[i % 2]}/{i:02}.png": encoded(image) for i, image in enumerate(CONTENT)}
KINDS = {"folder": write, "stored.zip": as_zip, "deflated.zip": as_deflated, "plain.tar": as_tar}


@pytest.fixture(autouse=True)
def _in_this_process(home, monkeypatch):
    """Most of it needs no workers."""
    monkeypatch.setenv("GZ_WORKERS", "0")


def streamed(path: Path, monkeypatch, **options) -> Pack:
    with monkeypatch.context() as patch:
        patch.setenv("GZ_PACK_LIMIT", "1")
        pack = open_pack(path, **options)
    assert pack.meta.streamed and isinstance(pack.images("train"), Pictures)
    return pack


def both(path: Path, monkeypatch) -> tuple[Pack, Pack]:
    """The same files packed and streamed."""
    packed = open_pack(path)
    monkeypatch.setenv("GZ_HOME", str(path.parent / "other home"))
    return packed, streamed(path, monkeypatch)


def batches(pack: Pack, **options) -> TrainBatches:
    return train_batches(pack, **{"seed": 3, "batch_size": 8, "levels": 256, "device": "cpu", **options})


def equal(a, b) -> bool:
    draws = a.noise.rand(len(a), 2), b.noise.rand(len(b), 2)
    pairs = ((a.x, b.x), (a.y, b.y), (a.index, b.index), draws)
    return a.extra == b.extra and all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_batches_are_the_packed_ones(kind, tmp_path, monkeypatch):
    packed, lazy = both(KINDS[kind](tmp_path / kind, FILES), monkeypatch)
    augmented = {"levels": 2, "augment": ("hflip", "crop=2", "jitter")}
    for options in ({}, augmented, {"n": 20}, {"batch_size": 100}):
        one, two = batches(packed, **options), batches(lazy, **options)
        assert all(equal(one.at(step), two.at(step)) for step in range(8))  # beyond the first epoch
    for split, index in (("train", None), ("test", None), ("val", [3, 0, 3])):
        options = {"batch_size": 4, "levels": 2, "device": "cpu", "index": index, "seed": 1}
        pairs = list(zip(scan(packed, split, **options), scan(lazy, split, **options), strict=True))
        assert pairs and all(equal(*pair) for pair in pairs)


def test_with_workers(tmp_path, monkeypatch):
    """Steps in a row, again, back and ahead; a resume in the middle; two ranks; a scan: as without
    workers."""
    packed, lazy = both(write(tmp_path / "p", FILES), monkeypatch)
    monkeypatch.setenv("GZ_WORKERS", "2")
    one, two = batches(packed), batches(lazy)
    state = torch.get_rng_state()
    assert all(equal(one.at(step), two.at(step)) for step in (0, 0, 1, 2, 3, 50, 51, 7, 8, 8))
    assert torch.equal(torch.get_rng_state(), state)  # dropout draws from there
    assert equal(batches(packed).at(5000), batches(lazy).at(5000))
    ranks = [batches(lazy, rank=rank, world=2) for rank in (0, 1)]
    assert all(torch.equal(one.at(step).x, torch.cat([part.at(step).x for part in ranks])) for step in (4, 5))
    assert multiprocessing.active_children()
    del two, ranks
    options = {"batch_size": 5, "levels": 256, "device": "cpu"}
    pairs = zip(scan(packed, "train", **options), scan(lazy, "train", **options), strict=True)
    assert sum(equal(*pair) for pair in pairs) == -(-packed.meta.counts["train"] // 5) > 4
    assert not multiprocessing.active_children()  # they ended with who used them


def test_a_rank_decodes_only_its_own_rows(tmp_path, monkeypatch):
    lazy = streamed(write(tmp_path / "p", FILES), monkeypatch)
    read, real = [], stream.read_span
    monkeypatch.setattr(stream, "read_span", lambda span: read.append(span) or real(span))
    batches(lazy, rank=1, world=4).at(3)
    assert len(read) == 2


@pytest.fixture
def pictures(tmp_path) -> Pictures:
    root = write(tmp_path / "files", FILES)
    spans = [Span(str(root / name), 0, len(data), False) for name, data in FILES.items()]
    write_index(tmp_path, "train", [*spans, spans[0]])
    write_index(tmp_path, "val", [])
    return Pictures(tmp_path, "train", (3, 12, 12), Decoding(None, 3), None)


def test_pictures_are_like_an_array(pictures, tmp_path):
    want = np.concatenate([CONTENT, CONTENT[:1]]).transpose(0, 3, 1, 2)
    for of in ("shape", "dtype", "nbytes"):
        assert getattr(pictures, of) == getattr(want, of)
    assert pictures[3].shape == (3, 12, 12) and (pictures[-1] == want[-1]).all()
    slices = (slice(None), slice(60, 99), slice(0, 0), slice(9, 2, -3))
    lists = ([5, 5, 0], range(3), np.array([64, -1]))
    for rows in (*slices, *lists, np.zeros(0, int), np.arange(65) % 2 == 0):
        assert pictures[rows].shape == want[rows].shape and (pictures[rows] == want[rows]).all()
    assert (np.asarray(pictures) == want).all()
    with pytest.raises(IndexError):
        pictures[len(pictures)]
    assert len(np.load(tmp_path / "train_containers.npy")) == 64  # each once
    empty = Pictures(tmp_path, "val", (3, 12, 12), pictures.decoding, None)
    assert len(empty) == 0 and empty[:].shape == (0, 3, 12, 12)
    data = pickle.dumps(pictures)
    assert len(data) < 600 and (pickle.loads(data)[:] == want).all(), "they travel without their index"


def test_names_of_any_kind(tmp_path):
    names, data = ["ü.png", "a b.png", os.fsdecode(b"\xff.png")], encoded(CONTENT[0])
    root = write(tmp_path / "files", dict.fromkeys(names, data))
    write_index(tmp_path, "train", [Span(str(root / name), 0, len(data), False) for name in names])
    assert len(Pictures(tmp_path, "train", (3, 12, 12), Decoding(None, 3), None)[:]) == 3


@pytest.mark.parametrize(("kind", "workers"), [("folder", 0), ("stored.zip", 1)])
def test_a_picture_that_does_not_decode_is_named_when_it_is_due(kind, workers, tmp_path, monkeypatch):
    path = KINDS[kind](tmp_path / kind, {**FILES, "a/06.png": b"this is no picture"})
    images = streamed(path, monkeypatch).images("train")
    at = next(i for i in range(len(images)) if images._spans[i, 2] == 18)
    order = [row for row in range(len(images)) if row != at]
    order.insert(9, at)
    ahead = Prefetch(images, lambda step: order[4 * step : 4 * step + 4], workers)
    assert ahead.at(0).shape == ahead.at(1).shape == (4, 3, 12, 12)
    for _ in range(2):
        with pytest.raises(MissingError, match="not a readable image") as e:
            ahead.at(2)
        where = str(path / "a/06.png") if kind == "folder" else f"{path} at byte {images._spans[at, 1]:,}"
        assert f"`{where}`" in e.value.message and e.value.hint
    assert (ahead.at(3).numpy() == images[order[12:16]]).all()


def test_files_that_are_gone_and_mixed_sizes(pictures, tmp_path):
    (tmp_path / "files" / "a/02.png").unlink()
    with pytest.raises(MissingError, match=r"02\.png` cannot be read"):
        pictures[2]
    write(tmp_path / "files", {"a/04.png": FILES["a/04.png"][:20]})
    with pytest.raises(MissingError, match=r"04\.png` is damaged: it ends before byte"):
        pictures[4]
    pictures.shape = (65, 3, 12, 13)
    with pytest.raises(UsageError, match=r"mixed sizes: `.*00\.png` is 12×12, but others are 13×12") as e:
        pictures[0]
    assert "data.size" in e.value.hint


@pytest.mark.parametrize("wait", [0, 0.5])
def test_a_killed_worker_is_told(wait, pictures, monkeypatch):
    """While batches of it are on their way, and later."""
    often = (0.1,)  # seconds between looks whether the workers live, of which torch waits five
    monkeypatch.setattr(
        "torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data.__defaults__", often
    )
    ahead = Prefetch(pictures, lambda step: [step % 60] * 4, 2)
    ahead.at(0)
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)
    time.sleep(wait)
    with pytest.raises(DeviceError, match="worker process was killed while decoding images") as e:
        for step in range(1, 30):
            ahead.at(step)
    assert "GZ_WORKERS" in e.value.hint


def test_workers_end_at_once_with_who_uses_them(pictures, request, monkeypatch):
    """None is waited for in vain, as one is that cannot see that it shall end."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 600)  # seconds of such a wait
    gc.collect()
    gc.freeze()  # what the tests before have left, which takes seconds to look through
    request.addfinalizer(gc.unfreeze)
    for way in ("close", "last reference", "cycle"):
        children = set(multiprocessing.active_children())  # another test's that was not collected yet
        ahead = Prefetch(pictures, lambda step: [step], 1)
        ahead.at(0)
        (worker,) = set(multiprocessing.active_children()) - children
        started = time.monotonic()
        if way == "close":
            ahead.close()
        elif way == "cycle":
            ahead.itself = ahead
        del ahead
        gc.collect()
        assert worker not in multiprocessing.active_children() and time.monotonic() - started < 600, way


SCRIPT = """
import sys, time
from pathlib import Path
from gzcli.data.readers.pictures import Decoding
from gzcli.data.packs.stream import Pictures, Prefetch

pictures = Pictures(Path(sys.argv[1]), "train", (3, 12, 12), Decoding(None, 3), None)
ahead = Prefetch(pictures, lambda step: [step], 2)
ahead.at(0)
print("ready", flush=True)
time.sleep(600 * (sys.argv[2] == "wait"))
"""  # without `if __name__ == "__main__"`: no worker may run it again


@pytest.mark.parametrize("end", ["wait", "exit"])
def test_no_process_is_left_behind(end, pictures, tmp_path):
    """After a SIGKILL, which leaves the process no time for anything; and after a common end."""
    (tmp_path / "script.py").write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, str(tmp_path / "script.py"), str(tmp_path), end]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env, start_new_session=True) as main:
        assert main.stdout.readline() == "ready\n"
        if end == "wait":
            assert len(group(main.pid)) >= 4  # itself, the fork server, two workers
            main.kill()
        main.wait(60)
        deadline = time.monotonic() + 60
        while group(main.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not group(main.pid)


def group(leader: int) -> list[int]:
    """The living processes of a process group."""
    living = [p for p in psutil.process_iter(["status"]) if p.info["status"] != psutil.STATUS_ZOMBIE]
    members = []
    for process in living:
        with contextlib.suppress(ProcessLookupError):
            members += [process.pid] * (os.getpgid(process.pid) == leader)
    return members


def test_how_many_workers(monkeypatch):
    monkeypatch.delenv("GZ_WORKERS")
    for cores, ranks, workers in ((2, 1, 2), (64, 1, 8), (64, 4, 8), (16, 4, 4), (2, 4, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: range(cores), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert worker_count() == workers
    monkeypatch.setenv("GZ_WORKERS", "0")
    assert worker_count() == 0
    monkeypatch.setenv("GZ_WORKERS", "-1")
    with pytest.raises(UsageError, match="`GZ_WORKERS` must be a number"):
        worker_count()


MEMBERS = {f"a/{i}.bin": bytes(np.random.default_rng(i).integers(0, 9, 100 * i, np.uint8)) for i in range(9)}


def as_zip64(path: Path, files: dict[str, bytes]) -> Path:
    """Local headers have an extra field that the directory's have not; all of it follows something else."""
    with path.open("wb") as file:
        file.write(b"#!/bin/sh\n")
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in files.items():
                with archive.open(name, "w", force_zip64=True) as member:
                    member.write(data)
    return path


def test_spans_lead_to_the_bytes_that_are_read(tmp_path, monkeypatch):
    for kind, make in {**KINDS, "zip64.zip": as_zip64}.items():
        make(tmp_path / kind, {**MEMBERS, "left/out.txt": b"no"})
        monkeypatch.chdir(tmp_path)
        members = open_members(Path(kind), lambda name: name.endswith(".bin"))
        spans = members.spans()
        assert list(spans) == members.names and dict(members.read()) == MEMBERS, kind
        monkeypatch.chdir("/")
        assert {name: read_span(span) for name, span in spans.items()} == MEMBERS, kind
        assert {span.deflated for span in spans.values()} == {kind == "deflated.zip"}


def test_of_two_members_of_one_name_spans_have_the_one_that_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("x", b"first")
        archive.writestr("x", b"second")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for data in (b"first", b"second"):
            info = tarfile.TarInfo("./x")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    for kind in (Zip, Tar):
        members = kind(tmp_path / f"a.{kind.__name__.lower()}", lambda name: True)
        assert members.names == ["x"] == list(members.spans())
        assert read_span(members.spans()["x"]) == dict(members.read())["x"]


def test_archives_that_cannot_be_streamed(tmp_path):
    with pytest.raises(
        UsageError, match=r"a\.tar\.gz` cannot be streamed: the whole archive is compressed"
    ) as e:
        Tar(as_tar(tmp_path / "a.tar.gz", MEMBERS), lambda name: True).spans()
    assert "decompress it" in e.value.hint and "give the folder" in e.value.hint
    with pytest.raises(UsageError, match="not compressed with deflate") as e:
        Zip(as_deflated(tmp_path / "a.zip", MEMBERS, zipfile.ZIP_BZIP2), lambda name: True).spans()
    assert "give the folder" in e.value.hint


def test_damage_is_told(tmp_path, monkeypatch):
    path = as_deflated(tmp_path / "a.zip", {"x": bytes(range(256)) * 40})
    span = Zip(path, lambda name: True).spans()["x"]
    whole = path.read_bytes()
    for change, message in (
        (whole[: span.offset + span.length - 1], "it ends before byte"),
        (whole[: span.offset] + b"\xff" * span.length, "damaged at byte"),
    ):
        path.write_bytes(change)
        with pytest.raises(MissingError, match=message) as e:
            read_span(span)
        assert str(path) in e.value.message and e.value.hint
    path.write_bytes(whole)
    with pytest.raises(MissingError, match="a member is incomplete"):
        read_span(span._replace(length=span.length - 1))
    bomb = zlib.compress(bytes(10_000_000), wbits=-zlib.MAX_WBITS)
    path.write_bytes(bomb)
    monkeypatch.setattr("gzcli.data.readers.images.LARGEST_FILE", 9_000_000)
    with pytest.raises(MissingError, match="is incomplete"):  # within what a picture's file may have
        read_span(Span(str(path), 0, len(bomb), True))
    path.unlink()
    with pytest.raises(MissingError, match="cannot be read: No such file"):
        read_span(span)
    members = Zip(as_zip(path, MEMBERS), lambda name: True)
    path.write_bytes(path.read_bytes().replace(b"PK\3\4", b"XX\3\4"))
    with pytest.raises(MissingError, match=r"damaged: `a/0\.bin` has no header"):
        members.spans()
