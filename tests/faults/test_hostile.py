"""Hostile archives, weights files, names and numbers: each is read or refused, soon, and nothing escapes."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import shutil
import socket
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from generated import generated
from helpers import recipe
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from zoo import CASES

from gzcli.cli import app, out
from gzcli.core.errors import GzError, MissingError
from gzcli.data.packs.open import open_pack
from gzcli.data.readers.archive import open_members
from gzcli.data.readers.images import is_picture, read_span
from gzcli.engine import checkpoint as checkpoints
from gzcli.launch import launcher
from gzcli.launch.from_file import run_of
from gzcli.recipe.resolve import check

pytestmark = pytest.mark.filterwarnings("ignore:Duplicate name")  # of Python's zipfile, which writes them
PATIENCE = 10.0  # CPU-seconds, beyond which a case hangs


def picture(side: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("L", (side, side), 7).save(file, "PNG")
    return file.getvalue()


PNG = picture()
CONTENTS = st.sampled_from([PNG, PNG, PNG, b"", PNG[:40], bytes(3000)]) | st.binary(max_size=64)
OUTSIDE = r"../out.png a/../../out.png /tmp/gz-out.png C:\out.png ..\out.png \\host\out.png ~/out.png"
INSIDE = "a.png a.png ./a.png a//b.png a/b.png/ . .. / CON.png train/0/a.png a.txt é.png e\u0301.png"
ODD = ("", "a" * 300 + ".png", "b/" * 150 + "c.png", "\udcff\udcfe.png", "a\nb.png", "a\x1b[2J.png")
HOSTILE = (*OUTSIDE.split(), *INSIDE.split(), *ODD)
NAMES = st.sampled_from(HOSTILE) | st.text(max_size=20).map(lambda text: f"{text}.png")
KINDS = st.sampled_from([b"0"] * 6 + [bytes([letter]) for letter in b"5123467SLKxgA"])
PAX_KEYS = "path size linkpath mtime GNU.sparse.major GNU.sparse.realsize GNU.sparse.map hdrcharset"
PAX_VALUES = ["0", "-1", "1e9", str(1 << 70), "../../out.png", "a" * 5000, "1,2,3", "BINARY", "\udcff", ""]
PAX = st.dictionaries(st.sampled_from(PAX_KEYS.split()), st.sampled_from(PAX_VALUES), max_size=3)
SIZES = st.sampled_from([None] * 6 + [0, 1, 1 << 33, (1 << 63) - 1, -1])


def header(name: str, kind: bytes, size: int | None, content: bytes, pax: dict[str, str], link: str) -> bytes:
    """A member of a tar; `size` is what its header claims where that is not the truth."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, len(content) if size is None else size, link
    info.pax_headers = pax
    form = tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT
    return info.tobuf(form, "utf-8", "surrogateescape") + content + bytes(-len(content) % 512)


@st.composite
def tars(draw: Callable) -> bytes:
    """A tar with a few good members and some that are not."""
    parts = []
    for _ in range(draw(st.integers(0, 4))):
        name, kind, size = draw(NAMES), draw(KINDS), draw(SIZES)
        pax = draw(PAX) if draw(st.integers(0, 3)) == 0 else {}
        try:
            parts.append(header(name, kind, size, draw(CONTENTS), pax, draw(NAMES)))
        except (ValueError, OverflowError, UnicodeError, tarfile.HeaderError, struct.error):
            continue  # not even Python can write it
    data = b"".join(parts) + bytes(draw(st.sampled_from([1024, 1024, 512, 0])))
    data = changed(draw, data)
    return draw(st.sampled_from([bytes, bytes, gzip.compress, bz2.compress, lzma.compress]))(data)


METHODS = st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])


@st.composite
def zips(draw: Callable) -> bytes:
    """A zip with names and attributes of any kind."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for _ in range(draw(st.integers(0, 4))):
            info = zipfile.ZipInfo("x")
            info.filename = draw(NAMES).encode("utf-8", "replace").decode()
            info.external_attr = draw(st.sampled_from([0, 0, 0, 0o120777 << 16, 0o060666 << 16, 0x10]))
            info.flag_bits = draw(st.sampled_from([0, 0, 0, 1, 0x800]))
            archive.writestr(info, draw(CONTENTS), draw(METHODS))
        archive.comment = draw(st.binary(max_size=8))
    return changed(draw, file.getvalue())


def changed(draw: Callable, data: bytes) -> bytes:
    """The bytes as they are, cut, with some of them changed, or with some put in between."""
    how = draw(st.sampled_from(["whole", "whole", "cut", "bytes", "more"]))
    at = draw(st.integers(0, max(len(data) - 1, 0)))
    if how == "cut":
        return data[:at]
    if how == "bytes":
        new = draw(st.binary(min_size=1, max_size=8))
        return data[:at] + new + data[at + len(new) :]
    return data[:at] + draw(st.binary(max_size=600)) + data[at:] if how == "more" else data


@contextmanager
def patient(seconds: float = PATIENCE, what: object = "") -> Iterator[None]:
    """The block takes less CPU-seconds, and raises nothing but gz's own errors."""
    since = time.process_time()
    try:
        yield
    except GzError as e:
        assert e.code != 1, e
    assert time.process_time() - since < seconds, what


def no_engine(*args: object, **more: object) -> None:
    raise MissingError("no engine is started here")


def below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Path]:
    """A folder in whose inner one the archives lie, and gz's home; what escapes shows in the outer one."""
    folder = tmp_path_factory.mktemp("archives")
    (folder / "in").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GZ_HOME", str(folder / "home"))
        patch.chdir(folder / "in")
        yield folder


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_any_archive_is_read_or_refused(place, kind):
    path = place / "in" / f"set.{kind}"
    archives = tars() if kind == "tar" else zips()

    @generated(300)
    @given(data=archives)
    def members_are_inside(data: bytes) -> None:
        path.write_bytes(data)
        with patient():
            members = open_members(path, is_picture)
            for name, content in members.read():
                assert ".." not in name.split("/") and not name.startswith("/") and len(content) < 1 << 20
            for span in members.spans().values():
                assert len(read_span(span)) < 1 << 20

    @generated(30)
    @given(data=archives)
    def a_set_is_made_or_none(data: bytes) -> None:
        path.write_bytes(data)
        with patient():
            assert len(open_pack(path).images("train")) < 100

    members_are_inside()
    assert {name for name in below(place) if not name.startswith("home")} == {"in", f"in/set.{kind}"}
    a_set_is_made_or_none()
    path.unlink()
    assert {name.split("/")[0] for name in below(place)} <= {"in", "home"} and not below(place / "in")


IN_FOLDERS = (
    *("a", "b", "train", "test", "trainA", "trainB", "0.png", "1.png", "2.jpg", "metadata.jsonl", "0.txt"),
    *("0.cls", ".hidden.png", "é", "a\nb.png", "a b.png", "x.npz", "set.zip", "_", "*.png", "\udcff.png"),
)
PARTS = st.sampled_from(IN_FOLDERS)
ENTRIES = st.tuples(
    st.lists(PARTS, min_size=1, max_size=3),
    st.sampled_from(["file"] * 7 + ["link out", "circle", "broken", "pipe", "no rights"]),
    CONTENTS | st.text(max_size=30).map(str.encode) | st.just(b'{"file_name": "../../out.png", "text": 5}\n'),
)


def test_a_set_is_made_of_any_folder_or_none(place, tmp_path):
    (tmp_path / "outside.png").write_bytes(PNG)
    at = tmp_path / "set"
    links = {"link out": tmp_path / "outside.png", "circle": at, "broken": at / "none"}

    @generated(80)
    @given(entries=st.lists(ENTRIES, max_size=6))
    def each(entries: list[tuple[list[str], str, bytes]]) -> None:
        shutil.rmtree(at, ignore_errors=True)
        at.mkdir()
        for parts, kind, content in entries:
            path = at.joinpath(*parts)
            if os.path.lexists(path):  # nothing is written into a pipe, or through a link
                continue
            with contextlib.suppress(OSError):  # a file is where a folder should be
                path.parent.mkdir(parents=True, exist_ok=True)
                if kind in links:
                    path.symlink_to(links[kind])
                elif kind == "pipe":
                    os.mkfifo(path)
                else:
                    path.write_bytes(content)
                    path.chmod(0 if kind == "no rights" else 0o644)
        before = below(at)
        with patient():
            assert len(open_pack(at).images("train")) < 100
        assert below(at) == before

    each()
    assert {path.name for path in tmp_path.iterdir()} == {"outside.png", "set"}
    assert {name.split("/")[0] for name in below(place)} <= {"in", "home"}


ZEROS = 400 * gzip.compress(bytes(10**6), mtime=0)
BOMBS = {
    "longname": header("././@LongLink", b"L", 1 << 40, b"a" * 512, {}, ""),
    "many longnames": b"".join(header("x", b"L", None, b"a" * 60_000, {}, "") for _ in range(200)),
    "pax": header("x", b"x", 1 << 40, b"12 path=a\n", {}, ""),
    "zeros": gzip.compress(header("a.png", b"0", 400_000_000, b"", {}, ""), mtime=0) + ZEROS,
}


def test_bombs_are_refused_at_once(tmp_path):
    path = tmp_path / "bomb.tar"
    for name, content in BOMBS.items():
        path.write_bytes(content)
        with patient(5, name):
            assert not list(open_members(path, is_picture).read()), f"nothing in {name} is an image"


DTYPES = st.sampled_from(["F32", "F16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "C64", "X9", "", 5, None])
NUMBERS = st.integers(-2, 70) | st.sampled_from([1 << 31, 1 << 62, 1 << 70, -1 << 63, 0.5, "8", None, True])
SHAPES, OFFSETS = st.lists(NUMBERS, max_size=5) | NUMBERS, st.lists(NUMBERS, max_size=3)
TENSOR = st.fixed_dictionaries({}, optional={"dtype": DTYPES, "shape": SHAPES, "data_offsets": OFFSETS})
RECIPE = json.dumps({"model": {"name": "vae"}, "data": {"name": "digits"}})
KEYS = st.sampled_from(["gz", "recipe", "data", "step", "card", "parts", "built_on", "preview"])
TEXTS = [RECIPE, RECIPE, "{}", "[]", "null", "1", "-1", "1" * 400, "[" * 2000, '{"shape": [1, 16, 16]}', ""]
METADATA = st.dictionaries(KEYS, st.sampled_from(TEXTS) | st.text(max_size=20))
HEADERS = st.dictionaries(st.text(max_size=8), TENSOR, max_size=4)


@st.composite
def weights_files(draw: Callable) -> bytes:
    """A safetensors file: its length, its header, its bytes; each right or wrong."""
    tree = draw(HEADERS) | draw(st.just({}) | METADATA.map(lambda texts: {"__metadata__": texts}))
    text = json.dumps(tree).encode() if draw(st.integers(0, 4)) else draw(st.binary(max_size=80))
    length = draw(st.sampled_from([len(text)] * 5 + [0, 1, 1 << 40, (1 << 64) - 1]))
    return changed(draw, struct.pack("<Q", length) + text + bytes(draw(st.sampled_from([0, 64, 256]))))


def test_any_weights_file_is_read_or_refused(place):
    @generated(300)
    @given(data=weights_files())
    def each(data: bytes) -> None:
        path = place / "in" / "own.safetensors"
        path.write_bytes(data)
        for read in (checkpoints.read_weights, run_of):
            with patient():
                read(path)

    each()
    assert {name.split("/")[0] for name in below(place)} <= {"in", "home"}
    assert below(place / "in") == {"own.safetensors"}


def test_a_stranger_s_weights_file_asks_nobody(tmp_path, monkeypatch, capsys):
    """Neither its recipe's latent, base and data, nor a source in its card, are fetched."""
    calls = []

    def refuse(*args: object, **more: object) -> None:
        calls.append(args)
        raise OSError("no network is asked for")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("GZ_OFFLINE")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(launcher, "run", no_engine)
    tree, file = recipe(next(c for c in CASES if c.model == "vae"), steps=1), tmp_path / "own.safetensors"
    texts = {"gz": "1", "step": "1", "data": '{"shape": [1, 16, 16], "classes": [], "levels": 17}'}
    for more in (
        {"data": tree["data"] | {"latent": "stranger/latent"}},
        {"model": tree["model"] | {"base": "stranger/base"}},
        {"data": tree["data"] | {"name": "hf://datasets/stranger/set"}},
        {"model": {"name": "evil"}},
    ):
        save_file({"w": torch.zeros(1)}, file, metadata=texts | {"recipe": json.dumps(tree | more)})
        for words in (("sample", str(file)), ("runs", "show", str(file))):
            code = app.run(list(words))
            out.configure(json=False, quiet=False, lenient=False)
            assert code != 1 and not calls, (more, calls, capsys.readouterr())


NAMES_OF_NOTHING = """vae/stages/.. .. ~ ~nobody hf:// hf://a/b pretrained: pretrained:../x digits:train
- -- = %s {0} $HOME `id`"""
ODD_NAMES = [*filter(None, HOSTILE), *NAMES_OF_NOTHING.split(), "vae-digits-20260101-000000-abcd"]
WORDS = st.text(min_size=1, max_size=30).filter(lambda text: "\0" not in text)
WORDS |= st.sampled_from([*ODD_NAMES, "a" * 5000, "\udcff"])
LINES = """runs path WORD; runs show WORD; runs remove WORD --yes; show WORD; data path WORD;
data remove WORD --yes; data show WORD; recipe show WORD; train vae --name WORD --dry-run; sample WORD;
ood vae --in WORD --out WORD; runs list --data WORD; runs list --model WORD; list WORD"""
NAMED = st.tuples(st.sampled_from([tuple(line.split()) for line in LINES.split(";")]), WORDS).map(
    lambda two: [two[1] if part == "WORD" else part for part in two[0]]
)
VOCABULARY = """train sample vae fm --data digits --set train.steps=1 --json list runs show --label 3 -n 0
--steps x recipe ood --out bench data --help"""
COMMANDS = st.lists(st.sampled_from(VOCABULARY.split()) | st.text(max_size=12), max_size=7)


def test_any_command_line_is_met(place, tmp_path, monkeypatch):
    """Nothing is started, no error is a bug in gz, and no name leads to a file outside of gz's folders."""
    monkeypatch.setattr(launcher, "run", no_engine)

    def each(words: list[str]) -> None:
        try:
            with patient():
                assert app.run(words) != 1
        finally:
            out.configure(json=False, quiet=False, lenient=False)

    before = below(place / "in")
    generated(30)(given(words=NAMED)(each))()
    assert below(place / "in") == before and {name.split("/")[0] for name in below(place)} <= {"in", "home"}
    monkeypatch.chdir(tmp_path)
    generated(40)(given(words=COMMANDS)(each))()


def npy(head: str, body: bytes = bytes(128)) -> bytes:
    """A `.npy` file whose head says what is typed here."""
    text = head.encode("latin1", "replace")
    text += b" " * (-(11 + len(text)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body


def shaped(shape: str, dtype: str = "|u1", body: bytes = bytes(128)) -> bytes:
    return npy(f"{{'descr':'{dtype}','fortran_order':False,'shape':{shape}}}", body)


def npz(path: Path, **arrays: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in arrays.items():
            archive.writestr(f"{name}.npy", content)
    return path


IMAGES = shaped("(20, 8, 8)", body=bytes(20 * 8 * 8))
HEADS = {
    "huge": (shaped("(1000000000000, 8, 8)"), "truncated"),
    "wide": (shaped("(1, 100000000, 100000000)"), "truncated"),
    "negative": (shaped("(-5, 8, 8)"), "its shape is"),
    "a truth": (shaped("(True, 8, 8)"), "its shape is"),
    "no pixels": (shaped("(20, 0, 8)"), "its shape is"),
    "nested": (shaped("((5, 8), 8)"), "not a numpy array"),
    "unclosed": (shaped("(5, 8, 8" + "(" * 500), "not a numpy array"),
    "objects": (shaped("(5, 8, 8)", "|O"), "Python objects"),
    "cut": (IMAGES[:200], "truncated"),
}


def test_an_array_s_head_is_read_before_anything_is_allocated(tmp_path):
    for name, (content, message) in HEADS.items():
        for arrays in ({"x_train": content}, {"x_train": IMAGES, "y_train": content}):
            named = message if len(arrays) == 1 else "y_train"
            with patient(1, name), pytest.raises(GzError, match=named):
                open_pack(npz(tmp_path / "set.npz", **arrays))


@generated(160)
@given(content=st.binary(max_size=200) | st.text(max_size=100).map(npy) | st.text(max_size=30).map(shaped))
def test_any_head_is_met(tmp_path_factory, content):
    path = npz(tmp_path_factory.mktemp("npz") / "set.npz", x_train=content)
    with pytest.raises(GzError):
        open_pack(path)


def test_metadata_nested_without_end_and_a_recipe_of_many_megabytes(tmp_path):
    for i in range(12):
        Image.new("L", (16, 16), i).save(tmp_path / f"{i}.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "x": ' + "[" * 100_000 + "\n")
    with pytest.raises(GzError, match=r"line 1 of `metadata.jsonl`"):
        open_pack(tmp_path)
    path = tmp_path / "big.yaml"
    path.write_text("extends: vae\nabout: |\n" + "  x y z\n" * 200_000)
    with patient(0.5):
        assert "a recipe may be at most 1 MB" in check(str(path))[0]


LIMITS = {
    "train.samples=1000000000": "1 … 10,000",
    "launch.processes=1000000": "1 … 1,024",
    "launch.threads=1000000": "1 … 1,024",
    "train.batch_size=1000000000000000000": "1 … 1,000,000",
    "train.steps=1000000000000": "1 … 1,000,000,000",
    "train.accumulate=1000000000000": "1 … 65,536",
    "seed=1000000000000000000000000": "0 … 9,007,199,254,740,991",
    "model.width=1000000000": "1,000,000",
    "optim.lr=1e400": "must be a number",
}


def test_numbers_beyond_all_use_are_refused_with_the_limit(call):
    for key, limit in LIMITS.items():
        code, _, stderr = call("train", "vae", "--data", "digits", "--set", key)
        assert code == 2 and limit in stderr, key


OF_RECIPES = st.text(max_size=60)
OF_RECIPES |= st.from_regex(r"(model|train|for|stages): ?[\[{&*!|>]?[a-z0-9:\- \n]{0,40}")


@generated(40)
@given(lines=st.lists(OF_RECIPES, max_size=4))
def test_any_text_of_a_recipe_is_met(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("recipe") / "own.yaml"
    path.write_text("\n".join(["extends: vae", *lines]), encoding="utf-8", errors="surrogatepass")
    assert isinstance(check(str(path)), list)
