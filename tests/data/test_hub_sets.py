"""`--data hf://datasets/OWNER/NAME[/config]`: from the hub's cache at once, or fetched from a server."""

import io

import numpy as np
import pytest
from hub import hub
from PIL import Image
from refused import refused

import gzcli
from gzcli.core.errors import MissingError
from gzcli.data.library import import_set
from gzcli.data.sets.registry import HubSet, locate

pq = pytest.importorskip("pyarrow.parquet")
pa = pytest.importorskip("pyarrow")
X = np.random.default_rng(0).integers(0, 256, (24, 8, 8), dtype=np.uint8)
NAME = "hf://datasets/some/pictures"


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(images: np.ndarray) -> bytes:
    cells = [{"bytes": png(image), "path": None} for image in images]
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": cells, "label": [i % 2 for i in range(len(images))]}), buffer)
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def _cache(home, tmp_path, monkeypatch):
    """An empty cache of the hub, and no network."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("GZ_OFFLINE", "1")
    yield tmp_path / "hub"


def snapshot(cache, files: dict[str, bytes], commit: str = "abc") -> None:
    folder = cache / "datasets--some--pictures"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    for name, content in files.items():
        path = folder / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_a_snapshot_of_the_cache_is_a_set_at_once(_cache):
    files = {"data/train-00000-of-00001.parquet": parquet(X[:20]), "data/test.parquet": parquet(X[20:])}
    snapshot(_cache, {**files, "README.md": b"---"})
    pack = gzcli.open_data(NAME)
    assert pack.meta.counts["test"] == 4 and np.array_equal(pack.images("test"), X[20:, None])
    assert pack.classes == ("0", "1") and pack.name == "hub-some-pictures"
    assert locate(NAME).reference == NAME, "what a recipe names, wherever the cache lies"
    import_set(NAME, "theirs")
    assert gzcli.open_data("theirs").meta.counts == pack.meta.counts


def test_a_config_is_one_of_several_sets(_cache):
    snapshot(_cache, {"small/train.parquet": parquet(X[:12]), "large/train.parquet": parquet(X)})
    refused("contains several sets", gzcli.open_data, NAME)
    assert sum(gzcli.open_data(f"{NAME}/small").meta.counts.values()) == 12
    hint = "hf download some/pictures --repo-type dataset"
    refused("has no `huge`", gzcli.open_data, f"{NAME}/huge", error=MissingError, hint=hint)


def test_images_are_read_as_those_of_a_folder(_cache):
    snapshot(_cache, {f"train/{'ab'[i % 2]}/{i}.png": png(X[i]) for i in range(12)})
    assert gzcli.open_data(NAME).classes == ("a", "b")


def test_the_newest_commit_is_read_and_an_old_pack_serves_without_it(_cache):
    snapshot(_cache, {"train.parquet": parquet(X[:12])})
    assert sum(gzcli.open_data(NAME).meta.counts.values()) == 12
    snapshot(_cache, {"train.parquet": parquet(X)}, commit="def")
    assert sum(gzcli.open_data(NAME).meta.counts.values()) == 24
    (_cache / "datasets--some--pictures").rename(_cache / "elsewhere")
    assert sum(gzcli.open_data(NAME).meta.counts.values()) == 24, "packed already"


def test_without_a_network_the_line_that_fetches_is_said(_cache, capsys):
    from gzcli.cli.app import run

    hint = "hf download some/pictures --repo-type dataset"
    error = refused("some/pictures", gzcli.open_data, NAME, error=MissingError, hint=hint)
    assert error.code == 3
    assert run(["train", "vae", "--data", NAME, "--cpu"]) == 3
    assert hint in capsys.readouterr().err
    for wrong in ("hf://datasets/alone", "hf://datasets/a/b/../c", "hf://datasets/a b/c"):
        refused("not the address of a data set", locate, wrong)


def test_files_are_fetched_and_others_are_not(_cache, monkeypatch):
    """From a server that speaks as the hub does."""
    with hub() as server:
        server.repos["datasets/some/pictures"] = {"data/train.parquet": parquet(X), "weights.bin": b"0" * 99}
        monkeypatch.setenv("GZ_OFFLINE", "0")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        pack = gzcli.open_data(NAME)
        assert sum(pack.meta.counts.values()) == 24
        assert not any("weights.bin" in path for _, path in server.requests)
        assert isinstance(locate(NAME), HubSet) and locate(NAME).path.is_dir()


def test_an_address_leads_nowhere_else():
    for address in ("hf://datasets/a/b/../c", "hf://datasets/a/b//etc", "hf://datasets/a"):
        refused("is not the address of a data set on the hub", locate, address)
