"""Every set by name: small archives in its publisher's layout are served, checked, parsed and packed."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pictures import SPLITS, as_zip, encoded, nothing_half_written, write
from PIL import Image
from scipy.io import savemat
from server import serve

from gzcli.core.errors import MissingError
from gzcli.data.download.fetch import fetch
from gzcli.data.library import listing, remove, verify
from gzcli.data.packs.open import open_pack
from gzcli.data.readers import publishers
from gzcli.data.readers.pictures import Decoding, decode
from gzcli.data.sets.registry import MEDMNIST, SPECS, raw_dir
from gzcli.store.paths import cache_dir

pytestmark = pytest.mark.usefixtures("home")


def colour(label: int) -> tuple[int, int, int]:
    """A colour for each class, far from its neighbours."""
    return (label * 37 % 256, (label * 91 + 60) % 256, (label * 151 + 120) % 256)


def jpeg(label: int, size=(64, 64)) -> bytes:
    """A picture of the class's colour whose upper left is black: which way is up can be seen."""
    image = Image.new("RGB", size, colour(label))
    image.paste((0, 0, 0), (0, 0, size[0] // 2, size[1] // 2))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=95)
    return out.getvalue()


def tarred(files: dict[str, bytes], mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    as_zip(out, files)
    return out.getvalue()


# files, labels of each split, classes
Made = tuple[dict[str, bytes], dict[str, "np.ndarray | list"], tuple[str, ...]]


def make_idx(spec) -> Made:
    random, files, labels = np.random.default_rng(0), {}, {}
    for split, stem, n in (("train", "train", 40), ("test", "t10k", 10)):
        y = random.integers(0, 10, n, dtype=np.uint8)
        images = np.zeros((n, 28, 28), np.uint8) + y[:, None, None] * 20
        images[:, :14, :14] = 0
        head = struct.pack(">HBBIII", 0, 8, 3, n, 28, 28)
        files[f"{stem}-images-idx3-ubyte.gz"] = gzip.compress(head + images.tobytes())
        files[f"{stem}-labels-idx1-ubyte.gz"] = gzip.compress(struct.pack(">HBBI", 0, 8, 1, n) + y.tobytes())
        labels[split] = y
    return files, labels, spec.classes


def cifar_rows(y: np.ndarray) -> np.ndarray:
    """uint8 [n, 3072]: channel by channel, row by row."""
    images = np.array([colour(int(label)) for label in y], np.uint8)[:, :, None, None]
    images = images.repeat(32, 2).repeat(32, 3)
    images[:, :, :16, :16] = 0
    return images.reshape(len(y), 3072)


def make_cifar10(spec) -> Made:
    files, labels = {}, {"train": [], "test": []}
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        y = (np.arange(12) * 7 + i) % 10
        labels["test" if name == "test_batch" else "train"] += y.tolist()
        batch = {b"data": cifar_rows(y), b"labels": y.tolist()}
        files[f"cifar-10-batches-py/{name}"] = pickle.dumps(batch, protocol=2 + 2 * (i % 2))  # of either age
    return {"cifar-10-python.tar.gz": tarred(files, "w:gz")}, labels, spec.classes


def make_cifar100(spec) -> Made:
    names = tuple(f"kind {i}" for i in range(100))
    labels = {"train": np.arange(100) * 13 % 100, "test": np.arange(50)[::-1]}
    meta = {b"fine_label_names": [name.encode() for name in names]}
    files = {"cifar-100-python/meta": pickle.dumps(meta, protocol=2)}
    for split, y in labels.items():
        batch = {b"data": cifar_rows(y), b"fine_labels": y.tolist(), b"coarse_labels": [0] * len(y)}
        files[f"cifar-100-python/{split}"] = pickle.dumps(batch, protocol=2)
    return {"cifar-100-python.tar.gz": tarred(files, "w:gz")}, labels, names


def make_svhn(spec) -> Made:
    files, labels = {}, {"train": np.arange(40) % 10, "test": np.arange(11) * 3 % 10}
    for split, y in labels.items():
        images = cifar_rows(y).reshape(-1, 3, 32, 32).transpose(2, 3, 1, 0)
        out = io.BytesIO()
        savemat(out, {"X": images, "y": np.where(y == 0, 10, y)[:, None]}, do_compression=True)
        files[f"{split}_32x32.mat"] = out.getvalue()
    return files, labels, spec.classes


def make_dtd(spec) -> Made:
    classes, files, labels = ("banded", "blotchy", "woven"), {}, {}
    for s, split in enumerate(("train", "val", "test")):
        rows = [(f"{n}/{n}_{10 * s + i:04}.jpg", y) for y, n in enumerate(classes) for i in range(4)]
        files |= {f"dtd/images/{name}": jpeg(y, (300, 200)) for name, y in rows}
        files[f"dtd/labels/{split}1.txt"] = "".join(f"{name}\n" for name, _ in rows).encode()
        files[f"dtd/labels/{split}2.txt"] = b"banded/banded_0000.jpg\n"
        labels[split] = [y for _, y in rows]
    return {"dtd-r1.0.1.tar.gz": tarred(files, "w:gz")}, labels, classes


def make_places365(spec) -> Made:
    classes = ("airfield", "apartment_building/outdoor", "zen_garden")
    train = [(f"/{c[0]}/{c}/{i:08}.jpg", y) for y, c in enumerate(classes) for i in range(1, 7)]
    val = [(f"Places365_val_{i:08}.jpg", i * 2 % 3) for i in range(1, 8)]
    lists = {
        "categories_places365.txt": "".join(f"/{c[0]}/{c} {y}\n" for y, c in enumerate(classes)),
        "places365_train_standard.txt": "".join(f"{name} {y}\n" for name, y in reversed(train)),
        "places365_val.txt": "".join(f"{name} {y}\n" for name, y in val),
        "places365_test.txt": "nothing\n",
    }
    pictures = {f"data_256{name}": jpeg(y, (256, 256)) for name, y in train}
    files = {
        "filelist_places365-standard.tar": tarred({name: text.encode() for name, text in lists.items()}),
        "train_256_places365standard.tar": tarred(pictures),
        "val_256.tar": tarred({f"val_256/{name}": jpeg(y, (256, 256)) for name, y in val}),
    }
    return files, {"train": [y for _, y in train], "test": [y for _, y in val]}, classes


def make_celeba(spec) -> Made:
    classes = tuple(f"Attribute_{i}" for i in range(40))
    flags = np.random.default_rng(0).random((30, 40)) < 0.4
    splits = np.array([0] * 18 + [1] * 5 + [2] * 7)[np.random.default_rng(1).permutation(30)]
    names = [f"{i:06}.jpg" for i in range(1, 31)]
    rows = [f"{name} {' '.join('-1' if not f else ' 1' for f in flags[i])}" for i, name in enumerate(names)]
    pictures = {f"img_align_celeba/{n}": jpeg(int(flags[i, 0]), (178, 218)) for i, n in enumerate(names)}
    files = {
        "list_eval_partition.txt": "".join(f"{n} {s}\n" for n, s in zip(names, splits, strict=True)).encode(),
        "list_attr_celeba.txt": "\n".join(["30", " ".join(classes), *rows, ""]).encode(),
        "img_align_celeba.zip": zipped(pictures),
    }
    return files, {s: flags[splits == code] for code, s in enumerate(SPLITS)}, classes


def make_imagenette(spec) -> Made:
    wnids = [f"n0{1000000 + i * 1111}" for i in range(10)]
    train = [(f"train/{wnid}/{wnid}_{i}.JPEG", y) for y, wnid in enumerate(wnids) for i in range(3)]
    val = [(f"val/{wnid}/ILSVRC2012_val_0000{i}.JPEG", y) for y, wnid in enumerate(wnids) for i in range(2)]
    files = {f"imagenette2-320/{name}": jpeg(y, (430, 320)) for name, y in reversed(train + val)}
    files |= {"imagenette2-320/noisy_imagenette.csv": b"", "imagenette2-320/train/.DS_Store": b"x"}
    packed = {"imagenette2-320.tgz": tarred(files, "w:gz")}
    return packed, {"train": [y for _, y in train], "test": [y for _, y in val]}, spec.classes


def make_medmnist(spec) -> Made:
    arrays, labels = {}, {}
    for split, n in (("train", 30), ("val", 10), ("test", 12)):
        if spec.multilabel:
            y = (np.random.default_rng(n).random((n, len(spec.classes))) < 0.3).astype(np.uint8)
        else:
            y = (np.arange(n) % len(spec.classes)).astype(np.uint8)[:, None]
        images = np.zeros((n, spec.size, spec.size), np.uint8) + 10 + 20 * y[:, :1, None]
        if spec.channels == 3:
            colours = np.array([colour(int(label)) for label in y[:, 0]], np.uint8)
            images = np.zeros((n, spec.size, spec.size, 3), np.uint8) + colours[:, None, None]
        images[:, : spec.size // 2, : spec.size // 2] = 0
        arrays |= {f"{split}_images": images, f"{split}_labels": y}
        labels[split] = y if spec.multilabel else y[:, 0]
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)
    return {spec.files[0].name: out.getvalue()}, labels, spec.classes


def make_tinyimagenet(spec) -> Made:
    root, wnids = "tiny-imagenet-200", ["n02124075", "n01443537", "n04067472"]
    ordered = sorted(wnids)
    names = {"n01443537": "goldfish, Carassius auratus", "n02124075": "Egyptian cat", "n04067472": "reel"}
    train = [(f"train/{w}/images/{w}_{i}.JPEG", y) for y, w in enumerate(ordered) for i in range(5)]
    val = [(f"val_{i}.JPEG", i * 2 % 3) for i in range(9)]
    files = {f"{root}/{name}": jpeg(y) for name, y in train}
    files |= {f"{root}/val/images/{name}": jpeg(y) for name, y in val}
    files |= {f"{root}/test/images/test_{i}.JPEG": jpeg(9) for i in range(4)}
    texts = {
        "wnids.txt": "\n".join(wnids) + "\n",
        "words.txt": "".join(f"{w}\t{name}\n" for w, name in [("n00001740", "entity"), *names.items()]),
        "val/val_annotations.txt": "".join(f"{name}\t{ordered[y]}\t0\t0\t9\t9\n" for name, y in val),
        "train/n01443537/n01443537_boxes.txt": "n01443537_0.JPEG\t0\t0\t9\t9\n",
    }
    files |= {f"{root}/{name}": text.encode() for name, text in texts.items()}
    labels = {"train": [y for _, y in train], "test": [y for _, y in sorted(val)]}
    return {"tiny-imagenet-200.zip": zipped(files)}, labels, tuple(names[w] for w in ordered)


def make_horse2zebra(spec) -> Made:
    files, labels = {}, {"train": [0] * 8 + [1] * 8, "test": [0] * 3 + [1] * 3}
    for split, n in (("train", 8), ("test", 3)):
        for y, domain in enumerate("AB"):
            files |= {f"horse2zebra/{split}{domain}/n0{y}_{i}.jpg": jpeg(y, (256, 256)) for i in range(n)}
    return {"horse2zebra.zip": zipped(files)}, labels, ("A", "B")


def make_notmnist(spec) -> Made:
    """Thirteen pictures a letter; as in the real archive, two files are none."""
    files, labels = {}, {"train": [], "test": []}
    for y, letter in enumerate("ABCDEFGHIJ"):
        for i in range(13):
            image = np.full((28, 28), 10 + 20 * y, np.uint8)
            image[:14, :14] = 0
            files[f"notMNIST_small/{letter}/{i:02d}.png"] = encoded(image)
            labels["test" if i % 5 == 4 else "train"].append(y)
    files |= {"notMNIST_small/A/000.png": b"", "notMNIST_small/F/000.png": b"\x89PNG\r\n"}
    return {"notMNIST_small.tar.gz": tarred(files, "w:gz")}, labels, tuple("ABCDEFGHIJ")


WNIDS = ("n01440764", "n02102040", "n02979186")


def make_imagenet(spec) -> Made:
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    synsets = [(3 - y, w, w, 0) for y, w in enumerate(WNIDS)] + [(4, "n00000001", "entity", 3)]
    mat = io.BytesIO()
    savemat(mat, {"synsets": np.array(synsets, kind)[:, None]})
    val = [(f"ILSVRC2012_val_{i:08}.JPEG", i % 3) for i in range(1, 8)]
    truth = "".join(f"{3 - y}\n" for _, y in val).encode()
    data = "ILSVRC2012_devkit_t12/data"
    kit = {f"{data}/meta.mat": mat.getvalue(), f"{data}/ILSVRC2012_validation_ground_truth.txt": truth}
    train = [{f"{w}_{i}.JPEG": jpeg(y, (130 + 40 * i, 200)) for i in range(6)} for y, w in enumerate(WNIDS)]
    files = {
        "ILSVRC2012_devkit_t12.tar.gz": tarred(kit, "w:gz"),
        "ILSVRC2012_img_val.tar": tarred({name: jpeg(y, (200, 150)) for name, y in reversed(val)}),
        "ILSVRC2012_img_train.tar": tarred(
            {f"{w}.tar": tarred(x) for w, x in zip(WNIDS, train, strict=True)}
        ),
    }
    return files, {"train": np.repeat(range(3), 6), "test": [y for _, y in val]}, WNIDS


MAKERS: dict[str, Callable[..., Made]] = {
    "mnist": make_idx,
    "fashionmnist": make_idx,
    "notmnist": make_notmnist,
    "cifar10": make_cifar10,
    "cifar100": make_cifar100,
    "svhn": make_svhn,
    "dtd": make_dtd,
    "places365": make_places365,
    "celeba": make_celeba,
    "imagenette": make_imagenette,
    **dict.fromkeys((spec.name for spec in MEDMNIST), make_medmnist),
    "tinyimagenet": make_tinyimagenet,
    "horse2zebra": make_horse2zebra,
    "imagenet": make_imagenet,
}


def publish(name: str, site: Path, monkeypatch, size: int | None = None) -> tuple:
    """Small official files under `site/NAME`, and their sizes and checksums in the set's entry."""
    spec = SPECS[name].sized(size)
    files, labels, classes = MAKERS[name](spec)
    assert set(files) == {file.name for file in spec.files}
    (site / name).mkdir(parents=True)
    checked = []
    for file in spec.files:
        data = files[file.name]
        (site / name / file.name).write_bytes(data)
        facts = {"size": len(data) + (not file.exact), "md5": hashlib.md5(data).hexdigest(), "sha256": None}
        checked.append(replace(file, **facts))
    if spec.size != SPECS[name].size:
        sized = ((side, tuple(checked) if side == spec.size else rows) for side, rows in SPECS[name].larger)
        monkeypatch.setitem(SPECS, name, replace(SPECS[name], larger=tuple(sized)))
    else:
        monkeypatch.setitem(SPECS, name, replace(spec, files=tuple(checked)))
    return spec, labels, classes


def check(opened, spec, labels, classes, size: int) -> None:
    """Shape, splits, classes, and each picture of its label's colour with the upper left black."""
    meta, counts = opened.meta, {split: len(y) for split, y in labels.items()}
    assert meta.shape == (spec.channels, size, size) and meta.classes == tuple(classes)
    carved = "val" not in counts
    assert meta.multilabel == spec.multilabel and meta.counts["test"] == counts["test"]
    assert meta.counts["train"] == counts["train"] - carved * meta.counts["val"]
    assert meta.counts["val"] == (counts["train"] // 10 or 1 if carved else counts["val"])
    base = 0 if spec.name in ("mnist", "fashionmnist") else 10
    for split in SPLITS:
        y, x = opened.labels(split), opened.images(split).astype(int)
        if not (carved and split != "test"):
            assert np.array_equal(y, labels[split])
        for image, label in zip(x, y[:, 0] if spec.multilabel else y, strict=True):
            corner, rest = image[:, : size // 2 - 3, : size // 2 - 3], image[:, size // 2 + 3 :]
            assert corner.max() < 12, (split, label)
            if spec.channels == 3:
                assert np.abs(rest - np.array(colour(int(label)))[:, None, None]).max() < 12, (split, label)
            else:
                assert np.abs(rest - base - 20 * int(label)).max() < 3
    if carved:
        both = np.sort(np.concatenate([opened.labels("train"), opened.labels("val")]))
        assert np.array_equal(both, np.sort(labels["train"]))


# of MedMNIST's twelve sets of one layout: a grey one, one in colour, one with several labels
BY_NAME = [name for name in MAKERS if MAKERS[name] is not make_medmnist]
BY_NAME += ["pneumoniamnist", "bloodmnist", "chestmnist"]


@pytest.mark.parametrize("name", BY_NAME)
def test_by_name(name, tmp_path, monkeypatch):
    """From the first answer to the pack; the large sets then once more, too large to pack: streamed."""
    monkeypatch.delenv("GZ_OFFLINE")
    spec, labels, classes = publish(name, tmp_path / "site", monkeypatch)
    with serve(tmp_path / "site", "redirect", "503") as server:
        monkeypatch.setattr("gzcli.data.download.http.BACKOFF_SECONDS", 0.01)
        monkeypatch.setenv("GZ_MIRROR", server.url)
        fetch(name)
    packed = open_pack(name)
    check(packed, spec, labels, classes, spec.size)
    assert len(verify(name)["files"]) == len(spec.files)
    assert next(row for row in listing() if row["name"] == name)["cached"]
    if name in ("places365", "celeba", "tinyimagenet", "imagenet"):
        check_streaming(name, packed, monkeypatch)


def check_streaming(name: str, packed, monkeypatch) -> None:
    images = {split: packed.images(split)[:].copy() for split in SPLITS}
    labels = {split: packed.labels(split).copy() for split in SPLITS}
    for meta in cache_dir("packs", name).glob("*/meta.json"):
        meta.unlink()
    monkeypatch.setenv("GZ_PACK_LIMIT", "1000")
    streamed = open_pack(name)
    assert streamed.meta.streamed and not (streamed.folder / "train.npy").exists()
    for split in SPLITS:
        assert (streamed.images(split)[:] == images[split]).all()
        assert (streamed.labels(split) == labels[split]).all()
    monkeypatch.delenv("GZ_PACK_LIMIT")
    assert not open_pack(name).meta.streamed  # the limit was raised: it is packed now


@pytest.mark.parametrize(("size", "side"), [(32, 64), (100, 128), (256, 224)])
def test_medmnist_comes_in_four_sizes(size, side, tmp_path, monkeypatch):
    """Besides the smallest, which is got by name."""
    monkeypatch.delenv("GZ_OFFLINE")
    spec, labels, classes = publish("pneumoniamnist", tmp_path, monkeypatch, size)
    assert spec.size == side
    monkeypatch.setenv("GZ_MIRROR", str(tmp_path))
    check(open_pack("pneumoniamnist", size=size), spec, labels, classes, size)


@pytest.mark.parametrize("way", ["archives", "folders"])
def test_imagenet_from_the_users_own_copy(way, tmp_path, monkeypatch):
    spec, labels, _ = publish("imagenet", tmp_path, monkeypatch)
    copy = tmp_path / "imagenet"
    if way == "folders":
        copy = tmp_path / "extracted"
        for split, name in (("train", "train"), ("val", "test")):
            rows = enumerate(labels[name])
            write(copy / split, {f"{WNIDS[y]}/{i:03}.JPEG": jpeg(int(y), (200, 150)) for i, y in rows})
        labels = {split: sorted(y) for split, y in labels.items()}
    fetch("imagenet", source=str(copy))
    assert all(path.is_symlink() for path in raw_dir(spec).iterdir() if not path.name.startswith("."))
    check(open_pack("imagenet", size=32), spec, labels, WNIDS, 32)
    before = sorted(str(path) for path in copy.rglob("*"))
    remove("imagenet")
    assert sorted(str(path) for path in copy.rglob("*")) == before


def test_imagenet_from_its_copy_on_the_hub(tmp_path, monkeypatch):
    """Parquet files as the hub has them, whose test split has no labels; the hub itself is played."""
    datasets = pytest.importorskip("datasets")
    copy, requests = tmp_path / "copy", []
    (copy / "data").mkdir(parents=True)
    names = datasets.ClassLabel(names=["tench, Tinca tinca", "goldfish", "great white shark"])
    features = datasets.Features({"image": datasets.Image(), "label": names})
    for split, y in {"train": [0, 2, 1, 0], "validation": [2, 1, 0], "test": [-1, -1]}.items():
        cells = {"image": [{"bytes": jpeg(max(label, 0), (90, 70))} for label in y], "label": y}
        made = datasets.Dataset.from_dict(cells, features=features)
        made.to_parquet(copy / "data" / f"{split}-00000-of-00001.parquet")

    def snapshot(name, **options):
        requests.append((name, options["repo_type"]))
        return str(copy)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    for source in (str(copy), "hf://datasets/ILSVRC/imagenet-1k"):
        fetch("imagenet", source=source)
        opened = open_pack("imagenet", size=32)
        assert opened.meta.counts["test"] == 3 and opened.labels("test").tolist() == [2, 1, 0]
        assert opened.meta.counts["train"] + opened.meta.counts["val"] == 4 and len(opened.meta.classes) == 3
        assert requests == ([] if source == str(copy) else [("ILSVRC/imagenet-1k", "dataset")])
        remove("imagenet")


def test_adm_crop_is_the_reference():
    """The crop of guided-diffusion, written out: box halving, bicubic to the shorter side, the middle."""
    photo = np.random.default_rng(0).integers(0, 256, (150, 271, 3), dtype=np.uint8)
    image = Image.fromarray(photo)
    image = image.resize((135, 75), Image.BOX)  # 150 ≥ 2 · 64; 75 is not
    image = image.resize((round(135 * 64 / 75), 64), Image.BICUBIC)
    left = (image.width - 64) // 2
    want = np.asarray(image)[:, left : left + 64].transpose(2, 0, 1)
    assert (decode(encoded(photo), "a", Decoding(64, 3, rule="adm"))[0] == want).all()


def test_medmnist_facts_are_its_packages():
    info = pytest.importorskip("medmnist.info").INFO
    assert {spec.name for spec in MEDMNIST} == {name for name in info if not name.endswith("3d")}
    for spec in MEDMNIST:
        facts = info[spec.name]
        assert spec.classes == tuple(facts["label"].values()) and spec.licence == facts["license"]
        assert (spec.n_train, spec.n_val, spec.n_test) == tuple(facts["n_samples"][split] for split in SPLITS)
        assert spec.multilabel == facts["task"].startswith("multi-label")
        assert spec.channels == facts["n_channels"]
        for side, files in ((28, spec.files), *spec.larger):
            suffix = "" if side == 28 else f"_{side}"
            assert (files[0].md5, files[0].urls[0]) == (facts[f"MD5{suffix}"], facts[f"url{suffix}"])


def test_every_downloaded_set_has_a_parser_and_checksums():
    fetched = {name for name, spec in SPECS.items() if not spec.embedded}
    assert fetched == set(publishers.PARSERS) == set(MAKERS)
    for spec in SPECS.values():
        for file in spec.files:
            assert (file.md5 or file.sha256) and file.size and (file.urls or spec.linked), file.name
        assert spec.licence and spec.citation and spec.n_train and spec.n_test


def test_files_that_are_not_what_they_should_be(tmp_path, monkeypatch):
    """Neither an IDX file, nor a pickle without code, nor all pictures of a list."""

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    publish("mnist", tmp_path, monkeypatch)
    (tmp_path / "mnist" / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x0d\x03"))
    with pytest.raises(MissingError, match="not an IDX file"):
        list(publishers.idx(SPECS["mnist"], tmp_path / "mnist").blocks())
    evil = tarred({"cifar-10-batches-py/data_batch_1": pickle.dumps(Evil())}, "w:gz")
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(evil)
    with pytest.raises(MissingError, match="which gz does not load"):
        publishers.cifar(SPECS["cifar10"], tmp_path)
    assert not (tmp_path / "ran").exists()
    publish("celeba", tmp_path, monkeypatch)
    with zipfile.ZipFile(tmp_path / "celeba" / "img_align_celeba.zip") as archive:
        files = {name: archive.read(name) for name in archive.namelist()[1:]}
    (tmp_path / "celeba" / "img_align_celeba.zip").write_bytes(zipped(files))
    with pytest.raises(MissingError, match=r"lacks 1 of its images, such as `img_align_celeba/000001.jpg`"):
        publishers.celeba(SPECS["celeba"], tmp_path / "celeba")


def cached(name: str, tmp_path: Path, monkeypatch) -> Path:
    """The folder of a set's small official files, as if they had been fetched."""
    publish(name, tmp_path, monkeypatch)
    raw = cache_dir("raw", name)
    raw.parent.mkdir(parents=True, exist_ok=True)
    return (tmp_path / name).rename(raw)


@pytest.mark.parametrize("name", ["mnist", "imagenet"])
def test_a_bit_that_flipped_after_a_set_was_fetched_is_not_trained_on(name, tmp_path, monkeypatch):
    raw = cached(name, tmp_path, monkeypatch)
    file = raw / SPECS[name].files[-1].name
    data = file.read_bytes()
    file.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    with pytest.raises(
        MissingError, match=f"{file.name}` is damaged: its md5 differs from the publisher's"
    ) as e:
        open_pack(name)
    assert f"`gz data remove {name}`, then `gz data download {name}" in e.value.hint
    assert ("--from DIR" in e.value.hint) == SPECS[name].linked
    file.write_bytes(data)
    assert open_pack(name).meta.counts["test"]


CUT_OFF = {
    "tiny-imagenet-200.zip": ("tinyimagenet", "is damaged|cannot be read"),
    "dtd-r1.0.1.tar.gz": ("dtd", "is damaged|cannot be read"),
    "test_32x32.mat": ("svhn", "cannot be read"),
    "list_attr_celeba.txt": ("celeba", "cannot be read"),
    "octmnist.npz": ("octmnist", "is damaged|cannot be read"),
    "ILSVRC2012_img_train.tar": ("imagenet", "is damaged|no training images"),
}


def test_files_cut_off_after_they_were_fetched(tmp_path, monkeypatch):
    """As they are cut off between the check of their bytes and their reading."""
    monkeypatch.setattr("gzcli.data.packs.source.check_files", lambda spec, say: [])
    for file, (name, named) in CUT_OFF.items():
        raw = cached(name, tmp_path, monkeypatch)
        data = (raw / file).read_bytes()
        half = data[: len(data) // 2]
        (raw / file).write_bytes(half.ljust(len(data), b"\n" if name == "celeba" else b"\0"))
        with pytest.raises(MissingError, match=named) as e:
            open_pack(name)
        assert e.value.hint and nothing_half_written(), file


@pytest.mark.slow
def test_mnist_from_the_official_files(shared_data, monkeypatch):
    from torchvision.datasets import MNIST  # its parser, for the same files

    monkeypatch.setenv("GZ_MIRROR", f"{shared_data}/mirror")
    opened = open_pack("mnist")
    assert opened.meta.counts == {"train": 58000, "val": 2000, "test": 10000}
    raw = cache_dir("raw", "mnist")
    folder = raw.parent / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for file in raw.glob("*.gz"):
        (folder / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    test = MNIST(str(raw.parent), train=False)
    assert (opened.images("test")[:, 0] == test.data.numpy()).all()
    assert (opened.labels("test") == test.targets.numpy()).all()
