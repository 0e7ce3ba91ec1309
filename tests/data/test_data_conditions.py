"""Captions, conditioning maps and images before an instruction."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from draws import train_batches
from pictures import RED, SPLITS, as_tar, as_zip, augmented, encoded, nothing_half_written, png, write
from PIL import Image

from gzcli.core.errors import MissingError, UsageError
from gzcli.core.types import BatchNoise, ImageNoise
from gzcli.data.library import import_set, listing
from gzcli.data.packs import stream
from gzcli.data.packs.augment import ReplayedNoise, augmenter
from gzcli.data.packs.batches import TrainBatches, quantise, scan, to_uint8
from gzcli.data.packs.open import open_pack, peek
from gzcli.data.sets.registry import Form

N = 20
pytestmark = pytest.mark.usefixtures("home")


def lines(*rows: dict) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def captioned(path: Path, files: dict[str, bytes], rows: list[dict]) -> Path:
    """A folder or an archive of pictures with the lines that describe them."""
    make = {".zip": as_zip, ".tar": as_tar}.get(path.suffix, write)
    return make(path, {**files, "metadata.jsonl": lines(*rows)})


# Image i has red i; its map has red 100 + i, the image before it red 200 + i.
AFTER = {f"{i}_out.png": png((i, 0, 9)) for i in range(N)}
TRIPLES = AFTER | {f"{i}_in.png": png((200 + i, 0, 9)) for i in range(N)}
ROWS = [{"file_name": f"{i}_out.png", "text": f"image {i}", "before": f"{i}_in.png"} for i in range(N)]


def check(opened, **plus: int) -> None:
    """Each image's caption, and the red of its further pictures."""
    assert sum(opened.meta.counts.values()) == N and opened.meta.extras == ("caption", *plus)
    assert opened.meta.classes == ()
    for split in SPLITS:
        red = opened.images(split)[:, 0, 3, 3].astype(int)
        assert opened.captions(split) == [f"image {i}" for i in red]
        assert set(opened.further(split)) == set(plus)
        for kind, more in plus.items():
            pictures = opened.further(split)[kind]
            assert pictures.shape == opened.images(split).shape and (pictures[:, 0, 3, 3] == more + red).all()


def test_text_map_and_picture_before_have_several_names(tmp_path):
    files = {f"images/{i:02}.png": png((i, 0, 9)) for i in range(N)}
    files |= {f"maps/{i:02}.png": png((100 + i, 0, 9)) for i in range(N)}
    for name, text, control in (
        ("maps", "text", "control"),
        ("maps.zip", "caption", "conditioning_image"),
        ("maps.tar", "text", "conditioning"),
    ):
        rows = [
            {"file_name": f"images/{i:02}.png", text: f"image {i}", control: f"maps/{i:02}.png"}
            for i in range(N)
        ]
        check(open_pack(captioned(tmp_path / name, files, rows)), control=100)
    for before, after, text in (
        ("before", "file_name", "text"),
        ("input_image", "edited_image", "edit_prompt"),
        ("original_image", "target", "instruction"),
        ("source", "after", "text"),
        ("input_image_file_name", "edited_image_file_name", "edit_prompt"),
    ):
        rows = [{before: f"{i}_in.png", text: f"image {i}", after: f"{i}_out.png"} for i in range(N)]
        check(open_pack(captioned(tmp_path / before, TRIPLES, rows)), before=200)


def test_names_are_relative_to_the_lines_in_each_split(tmp_path):
    files = {f"maps/{i}.png": png((100 + i, 0, 9)) for i in range(N)}
    for split, part in (("train", range(15)), ("test", range(15, N))):
        files |= {f"{split}/{i}.png": png((i, 0, 9)) for i in part}
        rows = [{"file_name": f"{i}.png", "control": f"../maps/{i}.png", "text": f"image {i}"} for i in part]
        files[f"{split}/metadata.jsonl"] = lines(*rows)
    opened = open_pack(write(tmp_path / "set", files))
    check(opened, control=100)
    assert opened.meta.counts["test"] == 5


def test_pictures_that_several_images_share(tmp_path):
    """Maps of two images each, one picture before all, and images that are also before others."""
    rows = [row | {"before": "all.png", "control": f"{i - i % 2}_in.png"} for i, row in enumerate(ROWS)]
    files = AFTER | {f"{i}_in.png": TRIPLES[f"{i}_in.png"] for i in range(0, N, 2)}
    files["all.png"] = png((77, 0, 9))
    opened = open_pack(captioned(tmp_path / "set.tar", files, rows))
    assert opened.meta.extras[0] == "caption" and set(opened.meta.extras) == {"caption", "before", "control"}
    for split in SPLITS:
        red, further = opened.images(split)[:, 0, 3, 3].astype(int), opened.further(split)
        assert (further["before"][:, 0] == 77).all()
        assert (further["control"][:, 0, 3, 3] == 200 + red - red % 2).all()
    rows = [{"before": f"{i}_out.png", "after": f"{i + 1}_out.png", "text": "on"} for i in range(N - 1)]
    rows.append({"before": "0_in.png", "after": "0_out.png", "text": "on"})
    opened = open_pack(captioned(tmp_path / "set", AFTER | {"0_in.png": TRIPLES["0_in.png"]}, rows))
    assert sum(opened.meta.counts.values()) == N
    for split in SPLITS:
        red = opened.images(split)[:, 0, 3, 3].astype(int)
        assert (opened.further(split)["before"][:, 0, 3, 3] == np.where(red, red - 1, 200)).all()


def test_a_word_that_names_no_picture_is_not_taken_for_one(tmp_path):
    sources = ("flickr", "https://a.b/c.png")
    rows = [
        {"file_name": f"{i}_out.png", "text": f"image {i}", "source": sources[i % 2], "target": "cat"}
        for i in range(N)
    ]
    check(open_pack(captioned(tmp_path / "set", AFTER, rows)))


A = {"file_name": "0_out.png", "text": "a", "before": "0_in.png"}
SMALL = png(RED, (12, 8))
BAD = [
    ([A], {}, UsageError, "has 19 images without `before`, such as `10_out.png`"),
    ([A | {"before": "none.png"}], {}, MissingError, "line 1 of `metadata.jsonl` names `none.png`"),
    ([A | {"before": "../0_in.png"}], {}, MissingError, r"names `../0_in.png`, which .* does not contain"),
    ([A | {"after": "1_out.png"}], {}, UsageError, "line 1 .* two images, `0_out.png` and `1_out.png`"),
    ([{"before": "0_in.png", "text": "a"}], {}, UsageError, "lacks `file_name`"),
    (ROWS, {"3_in.png": b"no picture"}, MissingError, "`3_in.png` cannot be decoded"),
    (
        ROWS,
        {"3_in.png": SMALL},
        UsageError,
        "`3_in.png` is 12×8, but its image is 8×8: their aspect ratios differ",
    ),
]


def test_bad_sets(tmp_path):
    for i, (rows, files, error, named) in enumerate(BAD):
        content = TRIPLES if rows == ROWS else AFTER | {"0_in.png": TRIPLES["0_in.png"]}
        with pytest.raises(error, match=named) as e:
            open_pack(captioned(tmp_path / f"{i}", content | files, rows))
        assert nothing_half_written() and (e.value.hint or "names" in named)


def test_colour_in_a_map_of_grey_images_is_not_dropped_unasked(tmp_path):
    files = {f"{i}.png": png(i, mode="L") for i in range(N)}
    files |= {f"m/{i}.png": png((i, 90, 9)) for i in range(N)}
    rows = [{"file_name": f"{i}.png", "text": "a", "control": f"m/{i}.png"} for i in range(N)]
    folder = captioned(tmp_path / "set", files, rows)
    with pytest.raises(UsageError, match=r"`m/0.png` has colours, but the first images are grey") as e:
        open_pack(folder)
    assert "data.channels=3" in e.value.hint
    opened = open_pack(folder, channels=3)
    assert (opened.further("train")["control"][:, 1] == 90).all() and opened.images("train").shape[1] == 3


def test_unreadable_pictures_take_their_images_with_them(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "MAX_IMAGES_IN_PROCESS", 5)  # by several processes
    monkeypatch.setattr(stream, "cores", lambda: 2)
    bad = {"3_in.png": b"x", "5_out.png": b"y", "7_in.png": b"z", "7_out.png": b"z"}
    folder = captioned(tmp_path / "set", TRIPLES | bad, ROWS)
    with pytest.raises(MissingError, match=r"3 images of .* cannot be decoded") as e:
        open_pack(folder)
    assert "--skip-bad" in e.value.hint and nothing_half_written()
    import_set(folder, "good", Form(skip_bad=True))
    opened = open_pack("good")
    assert len(opened.meta.skipped) == 3 and sum(opened.meta.counts.values()) == N - 3
    seen = []
    for split in SPLITS:
        red = opened.images(split)[:, 0, 3, 3].astype(int)
        assert opened.captions(split) == [f"image {i}" for i in red]
        assert (opened.further(split)["before"][:, 0, 3, 3] == 200 + red).all()
        assert len(red) == opened.meta.counts[split]
        seen += red.tolist()
    assert sorted(seen) == sorted(set(range(N)) - {3, 5, 7})


def test_a_map_is_cropped_as_its_image(tmp_path):
    """Portraits and landscapes in a frame, of which the crop takes two sides away, with a mark; maps of half
    the size."""
    files, rows = {}, []
    for i in range(6):
        w, h = ((48, 32), (32, 60))[i % 2]
        image = np.full((h, w, 3), 40, np.uint8)
        image[:2], image[-2:], image[:, :2], image[:, -2:] = 255, 255, 255, 255
        y, x = h // 2 - 8 + 4 * (i % 3), w // 2 - 6
        image[y : y + 8, x : x + 4] = 255
        files[f"{i}.png"], files[f"m{i}.png"] = encoded(image), encoded(image[::2, ::2])
        rows.append({"file_name": f"{i}.png", "text": "a", "control": f"m{i}.png"})
    folder = captioned(tmp_path / "set", files, rows)
    opened = open_pack(folder, size=16)
    for split in SPLITS:
        for image, control in zip(opened.images(split), opened.further(split)["control"], strict=True):
            assert np.abs(image.astype(int) - control).mean() < 12 and image[:, 2:14, 2:14].max() > 200
            sides = image[0, 3:13, 0].mean(), image[0, 0, 3:13].mean()
            # aspect kept: one pair of sides was cut off, the other is the frame
            assert min(sides) < 60 and max(sides) > 200
    with pytest.raises(UsageError, match="mixed sizes"):
        open_pack(folder)


def test_a_turned_photograph_and_its_upright_map(tmp_path):
    """The shape that counts is the one that is seen, after the turn that EXIF tells of."""
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {f"{i}.jpg": png(RED, (16, 24), format="JPEG", exif=exif.tobytes()) for i in range(4)}
    files |= {f"m{i}.png": png(RED, (24, 16)) for i in range(4)}
    rows = [{"file_name": f"{i}.jpg", "text": "a", "control": f"m{i}.png"} for i in range(4)]
    assert open_pack(captioned(tmp_path / "set", files, rows), size=8).meta.shape == (3, 8, 8)
    files["m2.png"] = png(RED, (16, 24))
    with pytest.raises(UsageError, match=r"`m2.png` is 16×24, but its image is 24×16"):
        open_pack(captioned(tmp_path / "other", files, rows), size=8)


COLUMNS = [  # what is added to the red of image i in each column, None: the text; what follows the image
    ({"image": 0, "conditioning_image": 100, "text": None}, {"control": 100}),
    ({"original_image": 200, "edit_prompt": None, "edited_image": 0}, {"before": 200}),
    ({"input_image": 200, "control": 100, "instruction": None, "image": 0}, {"before": 200, "control": 100}),
    ({"source": 0, "caption": None}, {}),  # the only image is the image
]


def test_dataset_folders(tmp_path):
    datasets = pytest.importorskip("datasets")

    def dataset(columns, hole=None):
        features, rows = {}, {}
        for name, more in columns.items():
            features[name] = datasets.Value("string") if more is None else datasets.Image()
            pictures = [{"bytes": png(((more or 0) + i, 0, 9)), "path": None} for i in range(N)]
            rows[name] = [f"image {i}" for i in range(N)] if more is None else pictures
        if hole:
            rows[hole][4] = None
        return datasets.Dataset.from_dict(rows, features=datasets.Features(features))

    for number, (columns, plus) in enumerate(COLUMNS):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        if number % 2:
            dataset(columns).save_to_disk(str(folder))
        else:
            dataset(columns).to_parquet(str(folder / "train.parquet"))
        opened = open_pack(folder)
        check(opened, **{kind: plus[kind] for kind in opened.meta.extras[1:]})
        assert set(opened.meta.extras) == {"caption", *plus}
    dataset(COLUMNS[0][0], hole="conditioning_image").save_to_disk(str(tmp_path / "hole"))
    with pytest.raises(UsageError, match=r"no image in `train.conditioning_image\[4\]`"):
        open_pack(tmp_path / "hole")


def test_digits_edited():
    """The instruction, carried out anew on `before`, gives the image."""
    from scipy import ndimage

    opened, digits = open_pack("digits-edited"), open_pack("digits")
    cross = ndimage.generate_binary_structure(2, 1)
    edits = {
        "invert the colours": lambda x: 255 - x,
        "mirror it": np.fliplr,
        "turn it upside down": lambda x: np.rot90(x, 2),
        "make it bold": lambda x: ndimage.grey_dilation(x, footprint=cross, mode="constant"),
        "make it thin": lambda x: ndimage.grey_erosion(x, footprint=cross, mode="constant"),
        "make it smaller": lambda x: np.pad(x[::2, ::2], 4),
    }
    for split in SPLITS:
        before, captions = opened.further(split)["before"], opened.captions(split)
        assert (before == digits.images(split)).all() and (opened.labels(split) == digits.labels(split)).all()
        assert {captions.count(text) > len(captions) // 10 for text in edits} == {True}
        for x, y, text in zip(before, opened.images(split), captions, strict=True):
            assert (edits[text](x[0]) == y[0]).all()
    assert (opened.images("test") != digits.images("test")).any((1, 2, 3)).mean() > 0.99
    levels = opened.images("train").astype(int) * 17 >> 8
    assert set(np.unique(levels)) == set(range(17))


def test_extras_are_told_by_json_alone(tmp_path):
    """Packs of older versions say nothing of them: captions are told by their file. Those of the user's own
    images are made anew."""
    listed = next(row for row in listing() if row["name"] == "digits-edited")
    assert peek("digits-edited") is None and listed["extras"]
    open_pack("digits-edited")
    assert peek("digits-edited").extras == ("caption", "before") and open_pack("digits").meta.extras == ()
    opened = open_pack("digits-captioned")
    meta = opened.folder / "meta.json"
    raw = json.loads(meta.read_text())
    assert raw.pop("extras") == ["caption"]
    meta.write_text(json.dumps(raw))
    seen = peek("digits-captioned")
    assert seen.extras == ("caption",) and seen.digest == opened.meta.digest
    folder = write(tmp_path / "set", {f"{i}.png": png(RED) for i in range(N)})
    open_pack(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gzcli.data.packs.open.OWN_RULE", 2)
        assert peek(folder) is None
    assert peek(folder) is not None


def test_too_large_to_pack_is_refused_and_not_streamed(tmp_path, monkeypatch):
    folder = captioned(tmp_path / "set", TRIPLES, ROWS)
    monkeypatch.setenv("GZ_PACK_LIMIT", str(2 * N * 3 * 64 - 1))  # the images alone would fit
    named = "exceeds `GZ_PACK_LIMIT`, and `before` images cannot be streamed"
    with pytest.raises(UsageError, match=named) as e:
        open_pack(folder)
    assert "GZ_PACK_LIMIT" in e.value.hint and nothing_half_written()
    monkeypatch.setenv("GZ_PACK_LIMIT", str(2 * N * 3 * 64))
    assert open_pack(folder).meta.extras == ("caption", "before")


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """Noise as images; the map is the image inverted, the image before it the image itself."""
    rng = np.random.default_rng(0)
    files, rows = {}, []
    for i in range(40):
        image = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        names = {"file_name": f"{i}.png", "control": f"c{i}.png", "before": f"b{i}.png"}
        files |= dict(zip(names.values(), map(encoded, (image, 255 - image, image)), strict=True))
        rows.append(names | {"text": f"image {i}"})
    return open_pack(captioned(tmp_path_factory.mktemp("followed"), files, rows))


def batches(pack, **options) -> TrainBatches:
    return train_batches(pack, **{"seed": 3, "batch_size": 8, "levels": 256, "device": "cpu", **options})


def test_a_batch_has_them(followed):
    codes = np.arange(followed.meta.counts["train"], dtype=np.float32)[:, None]
    source = batches(followed)
    source.prepared = {"latent": codes}
    batch = source.at(3)
    extra, rows = batch.extra, batch.index.numpy()
    assert set(extra) == {"caption", "control", "before", "latent"}
    assert extra["control"].dtype == batch.x.dtype
    assert torch.equal(extra["latent"][:, 0], batch.index.float())
    assert (to_uint8(extra["control"]).numpy() == followed.further("train")["control"][rows]).all()
    assert torch.equal(extra["before"], batch.x)
    assert torch.allclose(extra["control"], -batch.x, atol=1e-6)
    part = batch.rows(slice(2, 5), batch.noise).extra
    assert torch.equal(part["control"], extra["control"][2:5]) and part["caption"] == extra["caption"][2:5]


@pytest.mark.parametrize("levels", [256, 17, 2])
def test_a_flipped_image_has_a_flipped_map(followed, levels):
    """Moves by one draw; colours change alike in `before` and not in `control`. In training and in a scan."""
    for augment in (("hflip",), ("crop=3", "hflip"), ("jitter=0.4", "hflip", "mutate=0.3", "crop=2")):
        plain = [name for name in augment if name.split("=")[0] in ("hflip", "crop")]
        several = batches(followed, augment=augment, levels=levels)
        scanned = scan(followed, "train", batch_size=8, levels=levels, device="cpu", augment=augment, seed=5)
        moved = 0
        for batch in [*(several.at(step) for step in range(4)), *scanned]:
            assert torch.equal(batch.extra["before"], batch.x)  # binary ones too: the draw is one
            if augment[0] == "jitter=0.4":
                assert not torch.allclose(batch.extra["control"], -batch.x, atol=0.01)
            elif levels == 256:
                assert torch.allclose(batch.extra["control"], -batch.x, atol=1e-6)
            original = quantise(torch.from_numpy(followed.images("train")[batch.index]), 256)
            moved += (original != batch.x).flatten(1).any(1).sum().item()
        assert moved > 10
        if augment[0] == "hflip" and levels == 256:  # against the augmentation of a lone image
            index = several.at(1).index
            noise = BatchNoise(3, 1, "data", total=8)
            u8 = torch.from_numpy(followed.further("train")["control"][index])
            assert torch.equal(several.at(1).extra["control"], quantise(augmented(plain, u8, noise), 256))


def test_images_are_augmented_as_ever(followed):
    """Further pictures take nothing from the draws of the image."""
    names = ("jitter=0.4", "hflip", "mutate=0.3", "crop=2")
    u8 = torch.from_numpy(followed.images("train")[:8])
    for noise in (lambda: BatchNoise(1, total=8), lambda: ImageNoise(1, range(8))):
        lone = augmented(names, u8, noise())
        both = augmenter(names)({"x": u8, "control": u8, "before": u8}, noise())
        assert torch.equal(lone, both["x"]) and torch.equal(lone, both["before"])
        assert not torch.equal(lone, both["control"])
        for moved, image in zip(both["control"], u8, strict=True):
            assert set(moved.flatten().tolist()) <= set(image.flatten().tolist())
    same, plain = ReplayedNoise(BatchNoise(0, total=4)), BatchNoise(0, total=4)
    first = same.randn(4, 2), same.rand(4), same.randint(9, 4)
    for again in (same.replay(), plain):
        assert all(map(torch.equal, first, (again.randn(4, 2), again.rand(4), again.randint(9, 4))))
    assert not torch.equal(same.rand(4), first[1])
