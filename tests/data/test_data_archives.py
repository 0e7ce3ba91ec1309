"""Where the bytes of members lie, and how they are read there."""

from __future__ import annotations

import io
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from pictures import as_deflated, as_tar, as_zip, write

from gzcli.core.errors import MissingError, UsageError
from gzcli.data.readers.archive import Tar, Zip, open_members
from gzcli.data.readers.images import Span, read_span

FILES = {f"a/{i}.bin": np.random.default_rng(i).integers(0, 9, 100 * i, np.uint8).tobytes() for i in range(9)}


def as_zip64(path: Path, files: dict[str, bytes]) -> Path:
    """Local headers have an extra field that the directory's have not; all of it follows something else."""
    with path.open("wb") as file:
        file.write(b"#!/bin/sh\n")
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in files.items():
                with archive.open(name, "w", force_zip64=True) as member:
                    member.write(data)
    return path


KINDS = {
    "folder": write,
    "a.zip": as_zip,
    "deflated.zip": as_deflated,
    "zip64.zip": as_zip64,
    "a.tar": as_tar,
}


def test_spans_lead_to_the_bytes_that_are_read(tmp_path, monkeypatch):
    for kind, make in KINDS.items():
        make(tmp_path / kind, {**FILES, "left/out.txt": b"no"})
        monkeypatch.chdir(tmp_path)
        members = open_members(Path(kind), lambda name: name.endswith(".bin"))
        spans = members.spans()
        assert list(spans) == members.names and dict(members.read()) == FILES, kind
        monkeypatch.chdir("/")
        assert {name: read_span(span) for name, span in spans.items()} == FILES, kind
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
    with pytest.raises(UsageError, match=r"a\.tar\.gz` cannot be streamed: it is compressed as a whole") as e:
        Tar(as_tar(tmp_path / "a.tar.gz", FILES), lambda name: True).spans()
    assert "`gunzip` it" in e.value.hint and "give the folder" in e.value.hint
    with pytest.raises(UsageError, match="not by deflate") as e:
        Zip(as_deflated(tmp_path / "a.zip", FILES, zipfile.ZIP_BZIP2), lambda name: True).spans()
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
    with pytest.raises(MissingError, match="a member has no end"):
        read_span(span._replace(length=span.length - 1))
    bomb = zlib.compress(bytes(10_000_000), wbits=-zlib.MAX_WBITS)
    path.write_bytes(bomb)
    monkeypatch.setattr("gzcli.data.readers.images.LARGEST_FILE", 9_000_000)
    with pytest.raises(MissingError, match="no end"):  # within what a picture's file may have
        read_span(Span(str(path), 0, len(bomb), True))
    path.unlink()
    with pytest.raises(MissingError, match="cannot be read: No such file"):
        read_span(span)
    members = Zip(as_zip(path, FILES), lambda name: True)
    path.write_bytes(path.read_bytes().replace(b"PK\3\4", b"XX\3\4"))
    with pytest.raises(MissingError, match=r"damaged: `a/0\.bin` has no header"):
        members.spans()
