"""Input that asks for more than there is: refused with the limit, before anything is allocated."""

from __future__ import annotations

import struct
import time
import zipfile
from pathlib import Path

import pytest
from generated import generated
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gzcli.core.errors import GzError
from gzcli.data.packs.open import open_pack
from gzcli.recipe.resolve import check


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
    "huge": (shaped("(1000000000000, 8, 8)"), "cut off"),
    "wide": (shaped("(1, 100000000, 100000000)"), "cut off"),
    "negative": (shaped("(-5, 8, 8)"), "its shape is"),
    "a truth": (shaped("(True, 8, 8)"), "its shape is"),
    "no pixels": (shaped("(20, 0, 8)"), "its shape is"),
    "nested": (shaped("((5, 8), 8)"), "not a numpy array"),
    "unclosed": (shaped("(5, 8, 8" + "(" * 500), "not a numpy array"),
    "objects": (shaped("(5, 8, 8)", "|O"), "Python objects"),
    "cut": (IMAGES[:200], "cut off"),
}


def test_an_array_s_head_is_read_before_anything_is_allocated(tmp_path):
    for name, (content, message) in HEADS.items():
        since = time.process_time()
        for arrays in ({"x_train": content}, {"x_train": IMAGES, "y_train": content}):
            with pytest.raises(GzError, match=message if len(arrays) == 1 else "y_train"):
                open_pack(npz(tmp_path / "set.npz", **arrays))
        assert time.process_time() - since < 2, name


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
    since = time.process_time()
    assert "a recipe 1 MB at most" in check(str(path))[0]
    assert time.process_time() - since < 0.5


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


TEXTS = st.text(max_size=60) | st.from_regex(r"(model|train|for|stages): ?[\[{&*!|>]?[a-z0-9:\- \n]{0,40}")


@generated(40)
@given(lines=st.lists(TEXTS, max_size=4))
def test_any_text_of_a_recipe_is_met(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("recipe") / "own.yaml"
    path.write_text("\n".join(["extends: vae", *lines]), encoding="utf-8", errors="surrogatepass")
    assert isinstance(check(str(path)), list)
