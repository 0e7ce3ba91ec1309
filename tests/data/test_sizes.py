"""How pictures become bytes: depths, transparency, sizes of width and height, fits, and patches."""

from __future__ import annotations

import io
import json
import struct
import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from draws import train_batches
from pictures import BLUE, GREEN, RED, encoded, png, write
from PIL import Image

import gzcli
from gzcli.cli.app import run
from gzcli.core.errors import MissingError, UsageError
from gzcli.core.sections import DataSection, Part, TrainSection
from gzcli.core.units import canonical_size, sides
from gzcli.data.library import import_set, listing
from gzcli.data.packs import build, stream
from gzcli.data.packs.batches import TrainBatches, scan, to_uint8
from gzcli.data.packs.facts import Facts, measure, settings_lines
from gzcli.data.packs.open import facts_of, open_pack, pack_options, peek, size_of
from gzcli.data.readers.embedded import MAKERS
from gzcli.data.readers.folder import open_path, read_pictures
from gzcli.data.readers.images import PILLOW_FORMATS
from gzcli.data.readers.pictures import Decoding, bucket, cropping, decode, look, notes_in_words, sides_of
from gzcli.data.readers.publishers import PARSERS
from gzcli.data.sets.registry import SPECS, locate
from gzcli.engine.sheets import grid, grid_columns
from gzcli.engine.validate import best_metric
from gzcli.launch.plan import with_data
from gzcli.metrics.classifier import turns
from gzcli.metrics.features import LeNet
from gzcli.metrics.second import ResNet
from gzcli.models import catalog
from gzcli.recipe.recipe import check_batch_of, check_data
from gzcli.recipe.resolve import resolve


def places(height: int, width: int, number: int) -> np.ndarray:
    """A picture each of whose pixels tells its row, its column and the picture: uint8 [H, W, 3]."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y, x, np.full_like(y, number)], 2).astype(np.uint8)


def test_a_size_is_a_side_or_width_and_height(tmp_path):
    assert sides(48) == sides("48") == sides("48x48") == (48, 48) and sides("48x32") == (32, 48)
    assert canonical_size("48x48") == 48 and canonical_size("48X32") == "48x32"
    for wrong in ("48 x 32", "x32", "0x5", "5x0", "48x", "-4", "1.5", "", "48x32x3", "٤٨"):
        with pytest.raises(UsageError, match="48x32"):
            sides(wrong)
    for text, hint in (("48 x 32", "write 48x32"), ("x32", "write 32"), ("0", ""), ("48x", "write 48")):
        with pytest.raises(UsageError, match=r"`data\.size` must be") as e:
            resolve("vae", sets=[f"data.size={text}"])
        assert "--set data.size" in e.value.message and hint in (e.value.hint or "")
        (tmp_path / "mine.yaml").write_text(f"extends: vae\ndata:\n  size: {text}\n")
        with pytest.raises(UsageError, match=r"mine\.yaml:3:9"):
            resolve(str(tmp_path / "mine.yaml"))
    for text, size in (("48x32", "48x32"), ("48x48", 48), ("'24'", 24), ("24", 24)):
        resolved = resolve("vae", sets=[f"data.size={text}"]).data.size
        assert resolved == size and type(resolved) is type(size)
    for size in ("2x8", "8x2000", 3):
        with pytest.raises(UsageError, match="4 to 1024 pixels per side"):
            open_pack("digits", size=size)


def test_the_fits_differ_in_what_they_keep():
    bands = np.zeros((20, 40, 3), np.uint8)  # red, green twice as wide, blue
    bands[:, :10, 0], bands[:, 10:30, 1], bands[:, 30:, 2] = 200, 200, 200
    data = encoded(bands)

    def fitted(fit: str, size="8x8") -> np.ndarray:
        return decode(data, "a", Decoding(size, 3, fit=fit))[0].astype(int)

    assert (fitted("crop")[1] > 180).all()  # the middle square alone
    stretched = fitted("stretch")
    assert stretched[0, :, 0].min() > 180 and stretched[2, :, 7].min() > 180
    padded = fitted("pad")
    # 8×4 in the middle; a border of 10 red, 20 green and 10 blue columns, and of a red and a blue column
    assert padded[0, 2:6, 0].min() > 180 and padded[2, 2:6, 7].min() > 180
    border = padded[:, [0, 1, 6, 7]].reshape(3, -1)
    assert (border == border[:, :1]).all() and 40 < border[:, 0].min() < border[:, 0].max() < 110
    for fit in ("crop", "pad", "stretch"):
        assert fitted(fit, "48x32").shape == (3, 32, 48)
        assert (fitted(fit, "40x20") == bands.transpose(2, 0, 1)).all()  # its own size: nothing is done


def test_a_square_is_cropped_as_ever():
    rng = np.random.default_rng(0)
    for h, w in ((40, 61), (61, 40), (33, 33)):
        image = Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8))
        side = min(h, w)
        box = ((w - side) // 2, (h - side) // 2, (w - side) // 2 + side, (h - side) // 2 + side)
        want = np.asarray(image.resize((16, 16), Image.Resampling.LANCZOS, box=box)).transpose(2, 0, 1)
        assert (decode(encoded(np.asarray(image)), "a", Decoding(16, 3))[0] == want).all()


def test_the_middle_of_the_wanted_shape_is_cropped():
    image = places(40, 40, 7)
    wide = decode(encoded(image), "a", Decoding("40x20", 3))[0]
    assert (wide == image[10:30].transpose(2, 0, 1)).all()  # of a square the middle rows, not resized
    halved = decode(encoded(image), "a", Decoding("10x20", 3, rule="adm"))[0].astype(int)
    assert halved.shape == (3, 20, 10) and abs(halved[1].mean() - 19.5) < 0.6 and halved[1].min() >= 9


def test_pictures_that_are_not_square_are_packed_as_they_are(tmp_path):
    folder = write(tmp_path / "wide", {f"{i}.png": encoded(places(8, 12, i)) for i in range(9)})
    opened = open_pack(folder)
    assert opened.meta.shape == (3, 8, 12) and not opened.meta.resized
    assert (opened.images("train")[:, :2] == places(8, 12, 0).transpose(2, 0, 1)[:2]).all()
    # asked for in the size that it has, it is not packed again, whatever the fit
    for fit in ("crop", "pad", "stretch"):
        assert open_pack(folder, size="12x8", fit=fit).folder == opened.folder
    made = {fit: open_pack(folder, size=8, fit=fit) for fit in ("crop", "pad", "stretch")}
    assert len({pack.folder for pack in made.values()}) == 3 and made["crop"].folder.name == "8xown"
    assert len({pack.meta.digest for pack in made.values()}) == 3
    assert peek(folder, size="8x8", fit="pad").digest == made["pad"].meta.digest
    import_set(folder, "broad")
    open_pack("broad")
    assert next(row for row in listing() if row["name"] == "broad")["size"] == "12x8"


def test_pictures_beside_a_run_are_brought_to_its_size_as_its_set(tmp_path):
    files = {f"{i}.png": encoded(places(20, 40, i)) for i in range(4)}
    folder = write(tmp_path / "set", files)
    for fit in ("crop", "pad", "stretch"):
        form = {"size": "16x24", "channels": 3, "fit": fit}
        read = read_pictures(folder, limit=None, **form)
        packed = open_pack(folder, foreign=True, **form).images("test")
        assert read.shape == (4, 3, 24, 16) and (read == packed).all()
    whole = read_pictures(folder / "2.png", size=None, channels=3, limit=1, patch=16)[0]
    assert (whole == places(20, 40, 2)[2:18, 12:28].transpose(2, 0, 1)).all()
    with pytest.raises(UsageError, match=r"2.png` is 40×20, smaller than the patch of 24×24"):
        read_pictures(folder / "2.png", size=None, channels=3, limit=1, patch=24)


def test_buckets_have_no_more_pixels_and_the_nearest_ratio():
    assert bucket((100, 100), (512, 512)) == (512, 512)
    assert bucket((300, 400), (512, 512)) == (448, 576) and bucket((400, 300), (512, 512)) == (576, 448)
    assert bucket((100, 900), (1024, 1024)) == (704, 1408)  # no more than twice as wide
    assert bucket((9, 10), (32, 32)) == (32, 32) and bucket((3, 4), (48, 64)) == (48, 64)
    rng = np.random.default_rng(0)
    for h, w in rng.integers(50, 100, (100, 2)).tolist():
        high, wide = bucket((h, w), (512, 512))
        assert high * wide <= 512**2 and high % 64 == wide % 64 == 0
        assert abs(np.log(wide / high * h / w)) < 0.17


def test_images_of_several_shapes_come_in_batches_of_one(tmp_path, monkeypatch):
    shapes = [(64, 64)] * 4 + [(40, 80)] * 12 + [(90, 50)] * 24  # height, width
    monkeypatch.setattr(stream, "MAX_IMAGES_IN_PROCESS", 2)  # packed by worker processes
    files = {f"{i:02}.png": encoded(places(*shape, i)) for i, shape in enumerate(shapes)}
    folder = write(tmp_path / "photos", files)
    pack = open_pack(folder, size=64, fit="aspect")
    assert "sizes: 48×80 (24), 80×48 (12), 64×64 (4)" in pack.meta.words and pack.meta.shape == (3, 64, 64)
    assert (pack.images("train") == open_pack(folder, size=64).images("train")).all()  # for all but training
    assert open_pack(folder, size=64, fit="aspect").folder == pack.folder
    batches = [train_batches(pack, seed=3, batch_size=4, levels=256, n=30) for _ in range(3)]
    halves = [
        train_batches(pack, seed=3, batch_size=4, levels=256, n=30, rank=rank, world=2) for rank in (0, 1)
    ]
    seen = np.zeros(pack.meta.counts["train"], int)
    for step in range(75):
        batch = batches[0].at(step)
        np.add.at(seen, batch.index.numpy(), 1)  # a shape of few images fills a batch with repeats
        for x, i in zip(batch.x, batch.index.tolist(), strict=True):
            path = folder / pack.names("train")[i]
            want = decode(path.read_bytes(), "a", Decoding(f"{x.shape[2]}x{x.shape[1]}", 3))[0]
            assert tuple(x.shape[1:]) == bucket(Image.open(path).size[::-1], (64, 64))
            assert (to_uint8(x).numpy() == want).all()
        assert torch.equal(torch.cat([half.at(step).x for half in halves]), batch.x)
    assert torch.equal(batches[1].at(74).x, batch.x), "a resume begins in the middle"
    assert seen.sum() == 300 and set(seen) - {0} <= {9, 10, 11} and (seen > 0).sum() == 30
    scanned = list(scan(pack, "val", batch_size=3, levels=256, device="cpu", index=[3, 1, 0, 2]))
    assert sorted(i for batch in scanned for i in batch.index.tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("options", "problem"),
    [({"size": None}, "needs a `data.size`"), ({"patch": 16}, "whole images")],
)
def test_what_cannot_have_several_shapes(tmp_path, options, problem):
    folder = write(tmp_path / "p", {f"{i}.png": png(RED, (30, 20)) for i in range(9)})
    with pytest.raises(UsageError, match=problem):
        open_pack(folder, **{"size": 32, "fit": "aspect", **options})
    with pytest.raises(UsageError, match="does not support"):
        open_pack("digits-edited", size=32, fit="aspect")
    part = Part("ddpm", data=DataSection(fit="aspect"))
    with pytest.raises(UsageError, match="one shape"):
        check_data(part, catalog.card("ddpm"), SPECS["digits"])


def test_the_command_line_takes_width_and_height(tmp_path, capsys):
    folder = write(tmp_path / "p", {f"{i}.png": png(RED, (30, 20 + i)) for i in range(9)})
    assert run(["data", "import", str(folder), "--name", "oblong", "--size", "12x8", "-q"]) == 0
    assert open_pack("oblong").meta.shape == (3, 8, 12)
    assert run(["data", "show", "oblong", "--size", "0x5"]) == 2
    assert "`--size 5`" in capsys.readouterr().err
    assert run(["data", "list"]) == 0 and "12×8×3" in capsys.readouterr().out
    published = SPECS["pneumoniamnist"]  # the version that holds the longer side is taken
    for size, side in ((None, 28), (28, 28), ("20x28", 28), ("20x40", 64), ("100x64", 128)):
        assert published.sized(size).size == side
    data = DataSection(size="96x64", augment=("hflip", "patch=32"))
    assert size_of(data) == 32 and size_of(replace(data, augment=())) == "96x64"
    assert pack_options(data)["size"] == "96x64" and pack_options(data)["patch"] == 32


def cut_from(patches: torch.Tensor, side: int) -> list[tuple[int, int, int]]:
    """The row, the column and the number of the picture of each patch of `places`, where it must lie."""
    corners = []
    for patch in ((patches + 1) * 127.5).round().int().numpy():
        top, left, number = map(int, patch[:, 0, 0])
        whole = places(64, 64, number)[top : top + side, left : left + side]
        assert (patch == whole.transpose(2, 0, 1)).all()
        corners.append((top, left, number))
    return corners


def folder_of(tmp_path, *shapes):
    files = {f"{i}.png": encoded(places(*shapes[i % len(shapes)], i)) for i in range(12)}
    return write(tmp_path / "set", files)


@pytest.mark.parametrize("shapes", [[(20, 28)], [(20, 28), (17, 40), (16, 16)]], ids=["one size", "mixed"])
def test_random_patches_are_trained_on_and_middle_ones_validated(tmp_path, shapes, monkeypatch):
    monkeypatch.setenv("GZ_WORKERS", "0")
    pack = open_pack(folder_of(tmp_path, *shapes), patch=16)
    assert pack.meta.shape == (3, 16, 16) == pack.info().shape and pack.meta.mixed == (len(shapes) > 1)

    def batches(**options) -> TrainBatches:
        made = {"seed": 1, "batch_size": 8, "levels": 256, "device": "cpu", "augment": ("patch=16",)}
        return train_batches(pack, **made | options)

    one = batches()
    seen = [place for step in range(30) for place in cut_from(one.at(step).x, 16)]
    for top, left, number in seen:
        height, width = shapes[number % len(shapes)]
        assert top <= height - 16 and left <= width - 16
    assert {top for top, _, number in seen if number % len(shapes) == 0} == set(range(5))
    assert cut_from(batches().at(3).x, 16) == seen[24:32]  # a function of seed and step
    shares = [batches(rank=rank, world=2).at(3).x for rank in (0, 1)]
    assert cut_from(torch.cat(shares), 16) == seen[24:32]
    (batch,) = scan(pack, "val", batch_size=99, levels=256, device="cpu")
    for top, left, number in cut_from(batch.x, 16):
        height, width = shapes[number % len(shapes)]
        assert (top, left) == ((height - 16) // 2, (width - 16) // 2)


def test_arrays_and_large_pictures_are_cut_too(tmp_path, monkeypatch):
    """Also after they were brought to a size; large pictures of one size are not packed."""
    np.savez(tmp_path / "a.npz", images=np.stack([places(24, 20, i) for i in range(30)]))
    for size in (None, "20x24"):
        pack = open_pack(tmp_path / "a.npz", size=size, patch=16)
        assert (pack.images("val")[:, :2] == places(24, 20, 0)[4:20, 2:18].transpose(2, 0, 1)[:2]).all()
        assert pack.images("train", uncut=True).shape[1:] == (3, 24, 20)
    assert open_pack(tmp_path / "a.npz").images("val").shape[1:] == (3, 24, 20)
    monkeypatch.setattr(build, "MAX_UNRESIZED_SIDE", 19)
    pack = open_pack(folder_of(tmp_path, (20, 28)), patch=16)
    assert pack.meta.mixed and pack.meta.streamed and pack.meta.shape == (3, 16, 16)
    assert (pack.images("val")[:][:, :2] == places(20, 28, 0)[2:18, 6:22].transpose(2, 0, 1)[:2]).all()


def test_a_picture_smaller_than_the_patch_is_named(tmp_path):
    folder = folder_of(tmp_path, (20, 28), (17, 40))
    with pytest.raises(UsageError, match=r"`\d+.png` of .*set` \(40×17\)") as e:
        open_pack(folder, patch=18)
    assert "smaller than the patch of 18×18" in e.value.message and "[patch=17]" in e.value.hint
    assert open_pack(folder, patch=17).meta.shape == (3, 17, 17)
    with pytest.raises(UsageError, match=r"\(16×16\) are smaller than the patch"):
        open_pack("digits", patch=32)
    with pytest.raises(UsageError, match="mixed sizes"):
        open_pack(folder)
    with pytest.raises(UsageError, match="the side in pixels must be a whole number from 4 to 1024"):
        resolved = resolve("vae", sets=["data.augment=[patch=2]"])
        pack_options(resolved.data)


def test_what_a_set_was_taken_for_is_told(tmp_path):
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (40, 24, 24, 1), np.uint8).repeat(3, 3)
    np.savez(tmp_path / "grey.npz", images=grey)
    said: list[str] = []
    pack = open_pack(tmp_path / "grey.npz", say=said.append)
    assert pack.meta.shape == (3, 24, 24)  # as it is
    words = (
        "32 grey (stored as colour) training images of 24×24, few; models use their settings for `grey few`"
    )
    assert said[-1].endswith(pack.meta.words), "`gz ood` packs too, and trains nothing"
    first, second = settings_lines(facts_of(locate(tmp_path / "grey.npz")))
    assert first == words and "data.channels=1" in second
    for sets in ([], ["data.channels=1"], ["data.channels=3"]):
        lines: list[str] = []
        recipe = resolve("vae", data=str(tmp_path / "grey.npz"), sets=sets)
        with_data(recipe, recipe.dataset, say=lines.append)
        assert (second in lines) == (not sets)
    source = locate(tmp_path / "grey.npz")
    of_pack = Facts(24, 24, 3, 32, grey=True, classes=0, name=str(source.path))
    assert facts_of(source) == of_pack
    assert facts_of(source, size="90x100").shape_class == "128px"
    assert facts_of(source, size="90x100", patch=64).shape_class == "64px"
    assert not settings_lines(facts_of(SPECS["digits"]))


def test_the_facts_say_whether_an_image_has_several_labels(tmp_path):
    images = np.zeros((40, 8, 8), np.uint8)
    np.savez(tmp_path / "one.npz", images=images, labels=np.arange(40) % 3)
    np.savez(tmp_path / "several.npz", images=images, labels=np.eye(3, dtype=np.uint8)[np.arange(40) % 3])
    for name, several in (("one", False), ("several", True)):
        source = locate(tmp_path / f"{name}.npz")
        assert facts_of(source).multilabel is several
        pack = open_pack(source)
        earlier = dict(pack.meta.facts)
        del earlier["multilabel"]  # the facts of packs of earlier versions lack it
        assert facts_of(source, meta=replace(pack.meta, facts=earlier)).multilabel is several
    assert facts_of(SPECS["chestmnist"]).multilabel and not facts_of(SPECS["mnist"]).multilabel


@pytest.mark.slow
def test_whether_a_set_is_grey_is_measured(shared_data):
    for spec in (spec for spec in SPECS.values() if spec.embedded):
        spec = replace(spec, n_train=720, n_test=72)  # of those that are made in any number
        assert measure(MAKERS[spec.name](spec)).grey is False, spec.name
    for name in ("mnist", "fashionmnist"):
        assert measure(PARSERS[name](SPECS[name], shared_data / "mirror" / name)).grey is False, name
    by_name = {path.stem: measure(open_path(path)) for path in (shared_data / "sets").iterdir()}
    assert len(by_name) >= 6 and not any(facts.grey for facts in by_name.values())
    assert SPECS["pneumoniamnist"].n_train == by_name["pneumoniamnist"].n


def test_a_batch_larger_than_the_set_is_refused():
    part = Part("vae", train=TrainSection(batch_size=64))
    check_batch_of(part, SimpleNamespace(name="x", counts={"train": 64}))
    for n, of, fits in ((17, None, 16), (1000, 15, 8), (1, None, 1)):
        with pytest.raises(UsageError, match=rf"is 64, but `x` has {of or n} training images?") as e:
            meta = SimpleNamespace(name="x", counts={"train": n})
            check_batch_of(replace(part, data=DataSection(n=of)), meta)
        assert f"train.batch_size={fits}`" in e.value.hint


def test_one_validation_image_is_no_distribution(tmp_path):
    pack = open_pack(folder_of(tmp_path, (16, 16)))
    assert pack.meta.counts["val"] == 1
    model = SimpleNamespace(best="fd", likelihood=None, watched=None)
    assert best_metric(model, "auto", pack) is None and best_metric(model, "fd", pack) is None
    assert best_metric(model, "loss", pack) == "loss"
    assert best_metric(model, "auto", open_pack("digits")) == "fd"


def test_a_model_that_needs_a_square_says_so():
    card = replace(catalog.card("vae"), square=True)
    square, wide = (SimpleNamespace(name="x", shape=(3, 32, w), classes=(), extras=()) for w in (32, 48))
    check_data(Part("vae"), card, square)
    check_data(Part("vae"), replace(card, square=False), wide)
    with pytest.raises(UsageError, match="needs square images, but those of `x` are 48×32") as e:
        check_data(Part("vae"), card, wide)
    assert "data.size=32" in e.value.hint


def test_figures_of_images_that_are_not_square():
    wide = np.zeros((16, 3, 32, 48), np.uint8)
    high, broad, _ = grid(wide).shape
    assert 0.5 < high / broad < 2
    for network in (LeNet, ResNet):
        assert network(3, "48x32", 5)(torch.rand(2, 3, 32, 48)).shape == (2, 5)
        with pytest.raises(UsageError, match="images of 48×7"):
            network(3, "48x7", 5)
    assert turns((32, 32)) == (0, 1, 2, 3) and turns((32, 48)) == (0, 2)
    columns = {(64, 1): 8, (64, 2 / 3): 8, (20, 1): 5, (36, 1.5): 9, (17, 1): 5, (7, 1.5): 4, (2, 1): 2}
    for (n, ratio), wanted in (columns | {(1, 3): 1}).items():
        assert grid_columns(n, ratio) == wanted, "about square, in full rows"


pytestmark = pytest.mark.usefixtures("home")


def test_every_kind_of_picture():
    def decoded(data, channels=3, size=None):
        return decode(data, "a", Decoding(size, channels))[0]

    assert decoded(png(RED))[:, 0, 0].tolist() == list(RED)
    assert decoded(png(RED, format="WEBP", lossless=True))[:, 0, 0].tolist() == list(RED)
    assert decoded(png(RED, format="TIFF"))[:, 0, 0].tolist() == list(RED)
    assert decoded(png((*RED, 0), mode="RGBA"))[:, 0, 0].tolist() == [255, 255, 255]  # transparent: white
    assert decoded(png((0, 0, 0, 128), mode="RGBA"))[:, 0, 0].tolist() == [127, 127, 127]
    assert decoded(png((0, 128), mode="LA"), 1)[:, 0, 0].tolist() == [127]
    assert decoded(png(1, mode="1"), 1)[:, 0, 0].tolist() == [255]
    Image.new("RGB", (8, 8), GREEN).quantize(4).save(out := io.BytesIO(), "PNG")  # a palette
    assert decoded(out.getvalue())[:, 0, 0].tolist() == list(GREEN)
    for value, byte in ((0, 0), (257, 1), (32896, 128), (65535, 255)):
        assert decoded(encoded(np.full((8, 8), value, np.uint16)), 1)[0, 0, 0] == byte
    assert decoded(png(RED), 1)[0, 0, 0] == round(0.299 * RED[0] + 0.587 * RED[1] + 0.114 * RED[2])
    assert decoded(png(77, mode="L"))[:, 0, 0].tolist() == [77, 77, 77]


def deep(values, sbit: int | None = None) -> bytes:
    """A grey PNG of 16 bits, with a chunk sBIT if asked."""
    data = encoded(np.asarray(values, np.uint16))
    if sbit is None:
        return data
    chunk = b"sBIT" + bytes([sbit])
    return data[:33] + struct.pack(">I", 1) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]


def tiff_of_12_bits(values) -> bytes:
    """A grey TIFF of rows of an even number of values, two of which lie in three bytes."""
    rows = np.asarray(values)
    a, b = rows[:, ::2].astype(int), rows[:, 1::2].astype(int)
    body = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1).astype(np.uint8).tobytes()
    tags = {256: rows.shape[1], 257: len(rows), 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: len(rows)}
    tags[279] = len(body)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    head = b"II*\0" + struct.pack("<I", 8 + len(body))
    return head + body + struct.pack("<H", len(tags)) + entries + bytes(4)


RAMP = np.linspace(0, 4095, 64).astype(int).reshape(8, 8)  # 12 bits
TWELVE, SIXTEEN = "of 12 bits, read as 0 … 4,095", "of 16 bits, read as 0 … 65,535"
DARK = f"{SIXTEEN}: nearly black, as none has a value"
DEPTHS = {
    "tiff": (tiff_of_12_bits(RAMP), 4095, TWELVE),
    "low bits": (deep(RAMP, 12), 4095, TWELVE),
    "scaled bits": (deep(RAMP << 4 | RAMP >> 8, 12), 65535 / 16, SIXTEEN),
    "dark": (deep(RAMP >> 4 << 4, 12), 65535, DARK),
    "untold": (deep(RAMP), 65535, f"{DARK} above 4,095"),
    "whole range": (deep(RAMP * 16), 65535 / 16, SIXTEEN),
}


def test_more_bits_than_eight_are_read_as_the_file_says():
    """And never by what values a picture happens to have: a dark one of a set would be made bright."""
    for name, (data, white, words) in DEPTHS.items():
        notes = []
        pixels, _ = decode(data, "a", Decoding(None, 1), notes.append)
        assert np.abs(pixels[0] - RAMP / white * 255).max() <= 1, name
        (note,) = notes
        assert note.startswith(words) and ("nearly black" in words) == ("nearly" in note), name


def inked(colour) -> bytes:
    """A stroke of soft edges on a transparent picture."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., :3] = colour
    pixels[1:7, 2:6, 3] = (80, 255, 255, 80)
    return encoded(pixels)


def test_ink_on_transparency_is_seen():
    over_white = "with transparency, placed on white"
    over_black = "in white on a transparent background, placed on black"
    dark, light = ((0, 0, 0), RED), ((255, 255, 255), (250, 250, 245))
    for colour in (*dark, *light):
        notes, expected = [], over_white if colour in dark else over_black
        pixels, _ = decode(inked(colour), "a", Decoding(None, 1), notes.append)
        assert notes == [expected] and (pixels[0, 0, 0] == 0) == (expected == over_black)
        assert int(pixels.max()) - int(pixels.min()) > 100, "the stroke"
    for colour, expected in (((9, 9, 9, 255), []), ((255, 255, 255, 255), []), ((0, 0, 0, 0), [over_white])):
        notes = []
        decode(png(colour, mode="RGBA"), "a", Decoding(None, 1), notes.append)
        assert notes == expected


def test_the_share_that_a_crop_cuts_away_is_said(tmp_path):
    squares = np.zeros((12, 64, 64, 3), np.uint8)
    folder = write(tmp_path / "p", {f"{i:02}.png": encoded(image) for i, image in enumerate(squares)})
    np.savez(tmp_path / "a.npz", images=squares)
    words = "12 images cropped to 24×72, which cuts away 65 % of each"
    for source in (folder, tmp_path / "a.npz"):
        assert open_pack(source, size="24x72").meta.notes == (words,)
        assert open_pack(source, size="36x64").meta.notes == (
            words.replace("24×72", "36×64").replace("65", "45"),
        )
        for how in ({"size": 32}, {"size": "63x64"}, {"size": "24x72", "fit": "pad"}):
            assert open_pack(source, **how).meta.notes == (), how
    lines = []
    read_pictures(folder, size="24x72", channels=3, limit=None, say=lines.append)
    assert lines == [f"`{folder}`: {words}"]
    (folder / "wide.png").write_bytes(encoded(np.zeros((24, 36, 3), np.uint8)))
    assert open_pack(folder, size="24x72").meta.notes == (words.replace("12", "13").replace("65", "65–80"),)
    assert notes_in_words(cropping((64, 64), (72, 24))) == [
        "1 image cropped to 24×72, which cuts away 65 % of it"
    ]


def test_a_training_suggests_how_to_keep_whole_images(tmp_path):
    """Each new training does, but not one that pads, and no note of a pack."""
    squares = np.zeros((12, 64, 64, 3), np.uint8)
    folder = write(tmp_path / "p", {f"{i:02}.png": encoded(image) for i, image in enumerate(squares)})
    line = "to train on whole images, use `--set data.fit=pad`"
    for sets, is_cropped in ((["data.size=24x72"], True), (["data.size=24x72", "data.fit=pad"], False)):
        lines: list[str] = []
        recipe = resolve("vae", data=str(folder), sets=sets)
        with_data(recipe, recipe.dataset, say=lines.append)
        assert (line in lines) == is_cropped


def test_an_import_says_how_images_are_resized(tmp_path, call):
    """Packs, recipes and samples of the set follow it, until a recipe says otherwise."""
    wide = {f"{i:02}.png": encoded(np.zeros((32, 64, 3), np.uint8)) for i in range(12)}
    folder = str(write(tmp_path / "p", wide))
    for name, words in (("cut", ()), ("padded", ("--fit", "pad"))):
        code, stdout, _ = call("data", "import", folder, "--name", name, "--size", "16", *words, "--json")
        assert code == 0 and bool(json.loads(stdout)["notes"]) == (name == "cut")
    assert resolve("fm", data="cut").data.fit == "crop" and resolve("fm", data="padded").data.fit == "pad"
    assert resolve("fm", data="padded", flags={"data.fit": "stretch"}).data.fit == "stretch"
    assert call("data", "import", folder, "--name", "x", "--fit", "squeeze")[0] == 2


def test_how_pictures_were_read_is_said_in_one_line(tmp_path, monkeypatch):
    files = {f"{i:02}.png": deep(RAMP, 12) for i in range(12)} | {"x.png": inked((255, 255, 255))}
    folder, lines = write(tmp_path / "p", files), []
    words = "12 images of 12 bits, read as 0 … 4,095; "
    words += "1 image in white on a transparent background, placed on black"
    opened = open_pack(folder, channels=1, say=lines.append)
    assert [line for line in lines if "12 bits" in line] == [f"`{folder}`: {opened.meta.words}"]
    assert opened.meta.words.endswith(words)
    for again in range(2):
        lines.clear()
        open_pack(folder, channels=1, foreign=True, say=lines.append)
        assert [words in line for line in lines] == [False] * (1 - again) + [True], "each time"
    lines.clear()
    read_pictures(folder, size=8, channels=1, limit=None, say=lines.append)
    assert lines == [f"`{folder}`: {words}"]
    lines.clear()
    plain = write(tmp_path / "q", {"a.png": png(RED)})
    read_pictures(plain, size=8, channels=1, limit=None, say=lines.append)
    assert lines == []
    monkeypatch.setenv("GZ_PACK_LIMIT", "100")
    seen = open_pack(write(tmp_path / "s", {f"{i}.png": deep(RAMP) for i in range(4)}), channels=1).meta
    assert seen.streamed and seen.notes[-1].startswith("in a sample of the set: 4 images of 16 bits")


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(monkeypatch):
    """By its header, whatever its format: one of a few bytes may claim any size."""
    Image.init()
    small, files = Image.new("RGB", (64, 64), RED), {}
    for kind in (kind for kind in PILLOW_FORMATS if kind in Image.SAVE):  # this Pillow may not write all
        small.save(out := io.BytesIO(), kind)
        files[kind] = out.getvalue()
    assert len(files) > 4
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2 - 1)  # Pillow refuses twice that
    monkeypatch.setattr(Image.Image, "convert", lambda *args: pytest.fail("it was decoded"))
    for kind, data in files.items():
        for read in (lambda data: decode(data, "a", Decoding(8, 3)), lambda data: look(data, "a")):
            with pytest.raises(MissingError, match="exceeds limit"):
                read(data)
                pytest.fail(kind)


TURNS = {  # EXIF orientation → how an upright image is stored
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_rotation_by_exif(kind):
    """Files and the images that Python opens from them are upright, and so are the sides in a header."""
    image = Image.new("RGB", (16, 24), BLUE)
    image.paste(RED, (0, 0, 8, 12))  # red in the top left corner
    opened = []
    for orientation, turn in TURNS.items():
        exif, out = Image.Exif(), io.BytesIO()
        exif[0x0112] = orientation
        (image.transpose(turn) if turn is not None else image).save(out, kind, exif=exif)
        pixels, _ = decode(out.getvalue(), "a", Decoding(None, 3))
        assert sides_of(out.getvalue()) == (16, 24) and pixels.shape == (3, 24, 16), orientation
        reds = pixels[0, [4, 4, 20, 20], [4, 12, 4, 12]] > pixels[2, [4, 4, 20, 20], [4, 12, 4, 12]]
        assert reds.tolist() == [True, False, False, False], orientation
        opened.append(Image.open(out))
    upright = gzcli.open_data(opened).images("train")
    assert (upright[:, 0, 4, 4] > upright[:, 2, 4, 4]).all()


def test_transparent_images_of_python_are_read_as_files():
    def half(mode: str) -> Image.Image:
        """An image whose left half is transparent, by one colour or by an alpha channel."""
        image = Image.new("RGB", (16, 16), BLUE)
        image.paste(RED, (0, 0, 8, 16))
        if mode in ("L", "P", "RGB"):
            plain = image.quantize(2) if mode == "P" else image.convert(mode)
            plain.info["transparency"] = plain.getpixel((0, 0))
            return plain
        alpha = Image.new("L", image.size, 255)
        alpha.paste(0, (0, 0, 8, 16))
        if mode == "PA":
            image = image.quantize(2).convert("PA")
        image.putalpha(alpha)
        return image.convert("LA").convert(mode) if mode == "La" else image.convert(mode)

    for mode in ("L", "P", "RGB", "LA", "RGBA", "La", "PA", "RGBa"):
        file, image = io.BytesIO(), half(mode)
        image.convert({"La": "LA", "PA": "RGBA", "RGBa": "RGBA"}.get(mode, mode)).save(file, "PNG")
        images = gzcli.open_data([image] * 4).images("train")
        pixels, _ = decode(file.getvalue(), "a", Decoding(None, images.shape[1]))
        assert (images == pixels).all() and (pixels[:, :, :8] == 255).all() and pixels.min() < 255, mode
