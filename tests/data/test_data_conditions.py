"""Captions, conditioning maps and images before an instruction: every form in which they come, and what is
done to them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import RED, SPLITS, as_tar, as_zip, augmented, encoded, nothing_half_written, png, write
from PIL import Image

from gzcli.core.errors import MissingError, UsageError
from gzcli.core.types import BatchNoise, ImageNoise
from gzcli.data.packs import stream
from gzcli.data.packs.augment import ReplayedNoise, augmenter
from gzcli.data.packs.batches import TrainBatches, quantise, scan, to_uint8
from gzcli.data.packs.open import open_pack, peek
from gzcli.data.sets.library import import_set, listing
from gzcli.data.sets.registry import Form

N = 20


pytestmark = pytest.mark.usefixtures("home")


def lines(*rows: dict) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def made(path: Path, files: dict[str, bytes]) -> Path:
    return {".zip": as_zip, ".tar": as_tar}.get(path.suffix, write)(path, files)


# Image i has red i; its map has red 100 + i, the image before it red 200 + i.
WITH_MAPS = {f"images/{i:02}.png": png((i, 0, 9)) for i in range(N)} | {
    f"maps/{i:02}.png": png((100 + i, 0, 9)) for i in range(N)
}
TRIPLES = {f"{i}_out.png": png((i, 0, 9)) for i in range(N)} | {
    f"{i}_in.png": png((200 + i, 0, 9)) for i in range(N)
}


def check(opened, **plus: int) -> None:
    """Each image's caption, and the red of its further pictures."""
    assert sum(opened.meta.counts.values()) == N and opened.meta.extras == ("caption", *plus)
    assert opened.meta.classes == ()
    for split in SPLITS:
        red = opened.images(split)[:, 0, 3, 3].astype(int)
        assert opened.captions(split) == [f"picture {i}" for i in red]
        assert set(opened.further(split)) == set(plus)
        for kind, more in plus.items():
            pictures = opened.further(split)[kind]
            assert pictures.shape == opened.images(split).shape and (pictures[:, 0, 3, 3] == more + red).all()


# --- folders and archives ---


@pytest.mark.parametrize("form", ["set", "set.zip", "set.tar"])
@pytest.mark.parametrize(
    "keys", [("text", "control"), ("caption", "conditioning_image"), ("text", "conditioning")]
)
def test_conditioning_maps(tmp_path, form, keys):
    text, control = keys
    rows = [
        {"file_name": f"images/{i:02}.png", text: f"picture {i}", control: f"maps/{i:02}.png"}
        for i in range(N)
    ]
    check(open_pack(made(tmp_path / form, {**WITH_MAPS, "metadata.jsonl": lines(*rows)})), control=100)


@pytest.mark.parametrize(
    "keys",
    [
        ("before", "file_name", "text"),
        ("input_image", "edited_image", "edit_prompt"),
        ("original_image", "target", "instruction"),
        ("source", "after", "text"),
        ("input_image_file_name", "edited_image_file_name", "edit_prompt"),
    ],
)
def test_triples(tmp_path, keys):
    before, after, text = keys
    rows = [{before: f"{i}_in.png", text: f"picture {i}", after: f"{i}_out.png"} for i in range(N)]
    check(open_pack(made(tmp_path / "set", {**TRIPLES, "metadata.jsonl": lines(*rows)})), before=200)


def test_names_are_relative_to_the_lines_in_each_split(tmp_path):
    files = {
        f"{s}/{i}.png": png((i, 0, 9))
        for s, part in (("train", range(15)), ("test", range(15, N)))
        for i in part
    }
    files |= {f"maps/{i}.png": png((100 + i, 0, 9)) for i in range(N)}
    for split, part in (("train", range(15)), ("test", range(15, N))):
        rows = [
            {"file_name": f"{i}.png", "text": f"picture {i}", "control": f"../maps/{i}.png"} for i in part
        ]
        files[f"{split}/metadata.jsonl"] = lines(*rows)
    opened = open_pack(write(tmp_path / "set", files))
    check(opened, control=100)
    assert opened.meta.counts["test"] == 5


def test_both_at_once_and_pictures_that_several_images_share(tmp_path):
    rows = [
        {
            "before": "all.png",
            "file_name": f"{i}_out.png",
            "text": f"picture {i}",
            "control": f"{i - i % 2}_in.png",
        }
        for i in range(N)
    ]
    files = {
        name: data
        for name, data in TRIPLES.items()
        if not name.endswith("_in.png") or int(name.split("_")[0]) % 2 == 0
    }
    opened = open_pack(
        as_tar(tmp_path / "set.tar", {**files, "all.png": png((77, 0, 9)), "metadata.jsonl": lines(*rows)})
    )
    assert opened.meta.extras[0] == "caption" and set(opened.meta.extras) == {"caption", "before", "control"}
    for split in SPLITS:
        red, further = opened.images(split)[:, 0, 3, 3].astype(int), opened.further(split)
        assert (further["before"][:, 0] == 77).all()
        assert (further["control"][:, 0, 3, 3] == 200 + red - red % 2).all()


def test_an_image_that_is_also_before_another_stays_one(tmp_path):
    rows = [{"before": f"{i}_out.png", "after": f"{i + 1}_out.png", "text": "on"} for i in range(N - 1)]
    rows.append({"before": "0_in.png", "after": "0_out.png", "text": "on"})
    files = {name: data for name, data in TRIPLES.items() if "_out" in name or name == "0_in.png"}
    opened = open_pack(write(tmp_path / "set", {**files, "metadata.jsonl": lines(*rows)}))
    assert sum(opened.meta.counts.values()) == N
    for split in SPLITS:
        red, before = (
            opened.images(split)[:, 0, 3, 3].astype(int),
            opened.further(split)["before"][:, 0, 3, 3].astype(int),
        )
        assert (before == np.where(red, red - 1, 200)).all()


def test_a_word_that_names_no_picture_is_not_taken_for_one(tmp_path):
    rows = [
        {
            "file_name": f"{i}_out.png",
            "text": f"picture {i}",
            "source": ("flickr", "https://a.b/c.png")[i % 2],
            "target": "cat",
        }
        for i in range(N)
    ]
    files = {name: data for name, data in TRIPLES.items() if "_out" in name}
    check(open_pack(write(tmp_path / "set", {**files, "metadata.jsonl": lines(*rows)})))


A = {"file_name": "0_out.png", "text": "a", "before": "0_in.png"}


@pytest.mark.parametrize(
    ("rows", "files", "error", "named"),
    [
        ([A], {}, UsageError, "has 19 images without `before`, as `10_out.png`"),
        ([A | {"before": "none.png"}], {}, MissingError, "line 1 of `metadata.jsonl` names `none.png`"),
        ([A | {"before": "../0_in.png"}], {}, MissingError, r"names `../0_in.png`, which .* does not hold"),
        (
            [A | {"after": "1_out.png"}],
            {},
            UsageError,
            "line 1 .* names two images, `0_out.png` and `1_out.png`",
        ),
        ([{"before": "0_in.png", "text": "a"}], {}, UsageError, "no `file_name`"),
        (None, {"3_in.png": b"no picture"}, MissingError, "`3_in.png` does not decode"),
        (
            None,
            {"3_in.png": png(RED, (12, 8))},
            UsageError,
            "`3_in.png` is 12×8, and its image 8×8: another shape",
        ),
    ],
)
def test_bad_sets(tmp_path, rows, files, error, named):
    rows = rows or [{"file_name": f"{i}_out.png", "text": "a", "before": f"{i}_in.png"} for i in range(N)]
    others = {} if len(rows) > 1 else {f"{i}_in.png": None for i in range(1, N)}
    content = {name: data for name, data in {**TRIPLES, **files}.items() if name not in others}
    with pytest.raises(error, match=named) as e:
        open_pack(write(tmp_path / "set", {**content, "metadata.jsonl": lines(*rows)}))
    assert nothing_half_written() and (e.value.hint or "names" in named)


def test_colour_in_a_map_of_grey_images_is_not_dropped_unasked(tmp_path):
    files = {f"{i}.png": png(i, mode="L") for i in range(N)} | {
        f"m/{i}.png": png((i, 90, 9)) for i in range(N)
    }
    rows = [{"file_name": f"{i}.png", "text": "a", "control": f"m/{i}.png"} for i in range(N)]
    folder = write(tmp_path / "set", {**files, "metadata.jsonl": lines(*rows)})
    with pytest.raises(UsageError, match=r"`m/0.png` has colour, the first images have none") as e:
        open_pack(folder)
    assert "data.channels=3" in e.value.hint
    opened = open_pack(folder, channels=3)
    assert (opened.further("train")["control"][:, 1] == 90).all() and opened.images("train").shape[1] == 3


@pytest.mark.parametrize("several", [False, True])
def test_unreadable_pictures_take_their_images_with_them(tmp_path, monkeypatch, several):
    if several:
        monkeypatch.setattr(stream, "FEW", 5)
        monkeypatch.setattr(stream, "cores", lambda: 2)
    rows = [{"file_name": f"{i}_out.png", "text": f"picture {i}", "before": f"{i}_in.png"} for i in range(N)]
    bad = {"3_in.png": b"x", "5_out.png": b"y", "7_in.png": b"z", "7_out.png": b"z"}
    folder = write(tmp_path / "set", {**TRIPLES, **bad, "metadata.jsonl": lines(*rows)})
    with pytest.raises(MissingError, match=r"3 pictures of .* do not decode") as e:
        open_pack(folder)
    assert "--skip-bad" in e.value.hint and nothing_half_written()
    import_set(folder, "good", Form(skip_bad=True))
    opened = open_pack("good")
    assert len(opened.meta.skipped) == 3 and sum(opened.meta.counts.values()) == N - 3
    seen = []
    for split in SPLITS:
        red = opened.images(split)[:, 0, 3, 3].astype(int)
        assert opened.captions(split) == [f"picture {i}" for i in red]
        assert (opened.further(split)["before"][:, 0, 3, 3] == 200 + red).all()
        assert len(red) == opened.meta.counts[split]
        seen += red.tolist()
    assert sorted(seen) == sorted(set(range(N)) - {3, 5, 7})


# --- the crop ---


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
    folder = write(tmp_path / "set", {**files, "metadata.jsonl": lines(*rows)})
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
    assert open_pack(
        write(tmp_path / "set", {**files, "metadata.jsonl": lines(*rows)}), size=8
    ).meta.shape == (3, 8, 8)
    files["m2.png"] = png(RED, (16, 24))
    with pytest.raises(UsageError, match=r"`m2.png` is 16×24, and its image 24×16"):
        open_pack(write(tmp_path / "other", {**files, "metadata.jsonl": lines(*rows)}), size=8)


# --- dataset folders ---


@pytest.mark.parametrize("form", ["saved", "parquet"])
@pytest.mark.parametrize(
    ("columns", "plus"),
    [
        ({"image": 0, "conditioning_image": 100, "text": None}, {"control": 100}),
        ({"original_image": 200, "edit_prompt": None, "edited_image": 0}, {"before": 200}),
        (
            {"input_image": 200, "control": 100, "instruction": None, "image": 0},
            {"before": 200, "control": 100},
        ),
        ({"source": 0, "caption": None}, {}),  # the only image is the image
    ],
)
def test_dataset_folders(tmp_path, form, columns, plus):
    datasets = pytest.importorskip("datasets")
    rows = {
        name: [
            f"picture {i}" if more is None else {"bytes": png((more + i, 0, 9)), "path": None}
            for i in range(N)
        ]
        for name, more in columns.items()
    }
    features = {
        name: datasets.Value("string") if more is None else datasets.Image() for name, more in columns.items()
    }
    data = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    folder = tmp_path / "set"
    if form == "saved":
        data.save_to_disk(str(folder))
    else:
        folder.mkdir()
        data.to_parquet(str(folder / "train.parquet"))
    opened = open_pack(folder)
    check(opened, **{kind: plus[kind] for kind in opened.meta.extras[1:]})
    assert set(opened.meta.extras) == {"caption", *plus}


def test_a_dataset_folder_with_a_hole(tmp_path):
    datasets = pytest.importorskip("datasets")
    cells = [{"bytes": png(RED), "path": None} for _ in range(N)]
    rows = {"image": cells, "conditioning_image": [None if i == 4 else cell for i, cell in enumerate(cells)]}
    features = datasets.Features({name: datasets.Image() for name in rows})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(UsageError, match=r"no picture in `train.conditioning_image\[4\]`"):
        open_pack(tmp_path / "set")


# --- embedded ---


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
        before, told = opened.further(split)["before"], opened.captions(split)
        assert (before == digits.images(split)).all() and (opened.labels(split) == digits.labels(split)).all()
        assert {told.count(text) > len(told) // 10 for text in edits} == {True}
        for x, y, text in zip(before, opened.images(split), told, strict=True):
            assert (edits[text](x[0]) == y[0]).all()
    assert (opened.images("test") != digits.images("test")).any((1, 2, 3)).mean() > 0.99
    levels = opened.images("train").astype(int) * 17 >> 8
    assert set(np.unique(levels)) == set(range(17))


# --- what is known of a pack without opening it ---


def test_extras_are_told_by_json_alone(tmp_path):
    assert peek("digits-edited") is None
    assert next(r for r in listing() if r["name"] == "digits-edited")["extras"]
    open_pack("digits-edited")
    assert peek("digits-edited").extras == ("caption", "before") and open_pack("digits").meta.extras == ()


def test_packs_of_older_versions(tmp_path):
    """They say nothing of extras: captions are told by their file. Those of the user's own images are made
    anew."""
    opened = open_pack("digits-captioned")
    meta = opened.folder / "meta.json"
    raw = json.loads(meta.read_text())
    assert raw.pop("extras") == ["caption"]
    meta.write_text(json.dumps(raw))
    assert peek("digits-captioned").extras == ("caption",)
    assert peek("digits-captioned").digest == opened.meta.digest
    folder = write(tmp_path / "set", {f"{i}.png": png(RED) for i in range(N)})
    open_pack(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gzcli.data.packs.pack.OWN_RULE", 2)
        assert peek(folder) is None
    assert peek(folder) is not None


def test_too_large_to_pack_is_refused_and_not_streamed(tmp_path, monkeypatch):
    rows = [{"file_name": f"{i}_out.png", "text": "a", "before": f"{i}_in.png"} for i in range(N)]
    folder = write(tmp_path / "set", {**TRIPLES, "metadata.jsonl": lines(*rows)})
    monkeypatch.setenv("GZ_PACK_LIMIT", str(2 * N * 3 * 64 - 1))  # the images alone would fit
    with pytest.raises(
        UsageError, match="larger than `GZ_PACK_LIMIT` allows to pack, and `before` pictures are not streamed"
    ) as e:
        open_pack(folder)
    assert "GZ_PACK_LIMIT" in e.value.hint and nothing_half_written()
    monkeypatch.setenv("GZ_PACK_LIMIT", str(2 * N * 3 * 64))
    assert open_pack(folder).meta.extras == ("caption", "before")


# --- batches ---


@pytest.fixture
def followed(tmp_path):
    """Noise as images; the map is the image inverted, the image before it the image itself."""
    rng = np.random.default_rng(0)
    files, rows = {}, []
    for i in range(40):
        image = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        files |= {f"{i}.png": encoded(image), f"c{i}.png": encoded(255 - image), f"b/{i}.png": encoded(image)}
        rows.append(
            {"file_name": f"{i}.png", "text": f"picture {i}", "control": f"c{i}.png", "before": f"b/{i}.png"}
        )
    return open_pack(write(tmp_path / "set", {**files, "metadata.jsonl": lines(*rows)}))


def batches(pack, **options) -> TrainBatches:
    return TrainBatches(pack, **{"seed": 3, "batch_size": 8, "levels": 256, "device": "cpu", **options})


def test_a_batch_has_them(followed):
    batch = batches(followed).at(3)
    rows = batch.index.numpy()
    assert set(batch.extra) == {"caption", "control", "before"}
    assert batch.extra["control"].dtype == batch.x.dtype
    assert (to_uint8(batch.extra["control"]).numpy() == followed.further("train")["control"][rows]).all()
    assert torch.equal(batch.extra["before"], batch.x)
    assert torch.allclose(batch.extra["control"], -batch.x, atol=1e-6)
    part = batch.rows(slice(2, 5), batch.noise)
    assert torch.equal(part.extra["control"], batch.extra["control"][2:5])
    assert part.extra["caption"] == batch.extra["caption"][2:5]
    assert batch.extra["before"].min() >= -1 and batch.extra["before"].max() <= 1


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
        values = set(u8.flatten().tolist())
        assert all(
            set(a.flatten().tolist()) <= set(b.flatten().tolist())
            for a, b in zip(both["control"], u8, strict=True)
        )
        assert values


def test_draws_can_be_had_again():
    same = ReplayedNoise(BatchNoise(0, total=4))
    first = same.randn(4, 2), same.rand(4), same.randint(9, 4)
    again = same.replay()
    assert all(map(torch.equal, first, (again.randn(4, 2), again.rand(4), again.randint(9, 4))))
    plain = BatchNoise(0, total=4)
    assert all(map(torch.equal, first, (plain.randn(4, 2), plain.rand(4), plain.randint(9, 4))))
    assert not torch.equal(same.rand(4), first[1])


def test_what_is_prepared_comes_beside_them(followed):
    n = followed.meta.counts["train"]
    batch = batches(followed, prepared={"latent": np.arange(n, dtype=np.float32)[:, None]}).at(0)
    assert set(batch.extra) == {"caption", "control", "before", "latent"}
    assert torch.equal(batch.extra["latent"][:, 0], batch.index.float())
