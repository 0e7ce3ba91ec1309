"""Inspection sets: good pictures, defects and masks, by the folders of MVTec, VisA and others."""

import numpy as np
import pytest
from pictures import RED, as_tar, as_zip, encoded, png, write
from refused import refused

from gzcli.core.errors import UsageError
from gzcli.data.packs.open import open_pack
from gzcli.data.readers.inspection import inspection, open_inspection, read_masks
from gzcli.data.readers.layouts import DEFECTS
from gzcli.data.sets.registry import Form, OwnSet

pytestmark = pytest.mark.usefixtures("home")

MASK = png(255, mode="L")
MVTEC = {
    **{f"train/good/{i:03}.png": png(RED) for i in range(12)},
    **{f"test/good/{i:03}.png": png(RED) for i in range(3)},
    **{f"test/{kind}/{i:03}.png": png((9, 9, i)) for kind in ("chip", "scratch") for i in range(2)},
    **{f"ground_truth/{kind}/{i:03}_mask.png": MASK for kind in ("chip", "scratch") for i in range(2)},
}
LINES = b"""image,label,mask
candle/Data/Images/Anomaly/0.JPG,bent,m
candle/Data/Images/Anomaly/1.JPG,"a,b",
"""
VISA = {
    **{f"Data/Images/Normal/{i:04}.JPG": png(RED, format="JPEG") for i in range(12)},
    **{f"Data/Images/Anomaly/{i}.JPG": png((9, 9, i), format="JPEG") for i in range(2)},
    **{f"Data/Masks/Anomaly/{i}.png": MASK for i in range(2)},
    "image_anno.csv": LINES,
}
PLAIN = {
    **{f"good/{i}.png": png(RED) for i in range(12)},
    "dent/0.png": png(0, mode="L"),
    "hole/0.png": png(0, mode="L"),
    "hole/1.png": png(0, mode="L"),
    "masks/hole/1.png": MASK,
    "dent/0_mask.png": MASK,
}


def masked(kind, i):
    return f"test/{kind}/{i:03}.png", (f"ground_truth/{kind}/{i:03}_mask.png",)


def test_the_layout_of_mvtec_in_a_folder_a_zip_and_a_tar(tmp_path):
    paths = [write(tmp_path / "bottle", MVTEC), as_zip(tmp_path / "bottle.zip", MVTEC)]
    wrapped = {f"bottle/{name}": data for name, data in MVTEC.items()}
    paths.append(as_tar(tmp_path / "bottle.tar.gz", wrapped))
    for path in paths:
        opened = open_inspection(path)
        outer = "bottle/" if path.suffix == ".gz" else ""
        expected = [masked(kind, i) for kind in ("chip", "scratch") for i in range(2)]
        assert list(opened.masks.items()) == [(outer + a, (outer + b[0],)) for a, b in expected]
        assert list(opened.kinds.values()) == ["chip", "chip", "scratch", "scratch"]
        assert opened.good is None and not opened.notes
        # an ordinary pack has the good pictures alone; what is scored are the pictures with defects
        assert open_pack(path).meta.counts == {"train": 11, "val": 1, "test": 3}
        scored = open_pack(OwnSet(path, form=Form(layout=DEFECTS)), foreign=True)
        assert sorted(scored.names("test")) == sorted(opened.kinds) and scored.meta.counts["test"] == 4
        assert len(read_masks(path, opened, list(opened.kinds), (8, 8), "crop")) == 4


def test_the_layout_of_visa_and_its_list_of_kinds(tmp_path):
    opened = open_inspection(write(tmp_path / "candle", VISA))
    pictures = [f"Data/Images/Anomaly/{i}.JPG" for i in range(2)]
    assert opened.good == "Data/Images/Normal"
    assert opened.kinds == {pictures[1]: "a", pictures[0]: "bent"}
    assert opened.masks == {name: (f"Data/Masks/Anomaly/{i}.png",) for i, name in enumerate(pictures)}
    table = tmp_path / "candle" / "image_anno.csv"
    for content, problem in (
        (LINES.replace(b"bent", b"b\xe4nt"), "is not UTF-8 text, but probably LATIN1: byte 0xE4 in line 2"),
        (MASK, "is not UTF-8 text: byte 0x89 in line 1"),
        (LINES + b"x" * 200_000, "is not a table: field larger"),
    ):
        table.write_bytes(content)
        refused(problem, open_inspection, tmp_path / "candle")
    table.unlink()
    assert set(open_inspection(tmp_path / "candle").kinds.values()) == {"Anomaly"}


def test_plain_folders_with_masks_beside_or_in_folders_and_several_masks_of_a_picture(tmp_path):
    opened = open_inspection(write(tmp_path / "parts", PLAIN))
    assert opened.good == "good"
    assert opened.kinds == {"dent/0.png": "dent", "hole/0.png": "hole", "hole/1.png": "hole"}
    assert opened.masks == {"dent/0.png": ("dent/0_mask.png",), "hole/1.png": ("masks/hole/1.png",)}
    beside = ["good/0.tif", "dent/0.TIFF", "dent/0_mask.tiff"]
    assert inspection("x", beside).masks == {"dent/0.TIFF": ("dent/0_mask.tiff",)}, "endings of any format"
    loco = {name for name in MVTEC if "ground" not in name} | {f"ground_truth/chip/001/{i}.png" for i in "01"}
    both = "ground_truth/chip/001/0.png", "ground_truth/chip/001/1.png"
    assert inspection("x", sorted(loco)).masks == {"test/chip/001.png": both}


@pytest.mark.parametrize(
    "names",
    [
        ["a.png", "b.png"],
        ["cat/0.png", "dog/0.png"],
        ["good/0.png", "ok/0.png"],  # which of them?
        ["train/cat/0.png", "train/dog/0.png", "test/cat/0.png", "test/dog/0.png"],
        ["train/good/0.png", "test/good/0.png", "ground_truth/good/0.png"],
        ["train/0.png", "test/0.png"],
        ["trainA/0.png", "testB/0.png"],
    ],
)
def test_other_sets_are_none(names):
    assert inspection("x", names) is None


def test_masks_are_cropped_as_their_pictures_at_about_their_own_size(tmp_path):
    marked = np.zeros((48, 64), np.uint8)
    marked[:24, 8:32] = 255  # the upper left quarter of the middle square
    files = MVTEC | {"test/chip/000.png": png(RED, size=(64, 48))}
    files["ground_truth/chip/000_mask.png"] = encoded(marked)
    path = write(tmp_path / "wide", files)
    opened = open_inspection(path)
    masks = read_masks(path, opened, ["test/chip/000.png"], (16, 16), "crop")
    (mask,) = masks.values()
    assert mask.shape == (48, 48) and mask[:23, :23].all() and not mask[25:].any() and not mask[:, 25:].any()
    assert read_masks(path, opened, ["test/good/000.png"], (16, 16), "crop") == {}


def test_the_values_of_a_mask_may_be_labels_of_defects(tmp_path):
    marked = np.zeros((48, 48), np.uint8)
    marked[:24, :24], marked[30:40, 30:40] = 1, 4
    files = VISA | {"Data/Images/Anomaly/0.JPG": png(RED, size=(48, 48), format="JPEG")}
    both = []
    for name, mask in (("labels", marked), ("white", np.uint8(255) * (marked > 0))):
        path = write(tmp_path / name, files | {"Data/Masks/Anomaly/0.png": encoded(mask)})
        masks = read_masks(path, open_inspection(path), ["Data/Images/Anomaly/0.JPG"], (16, 16), "crop")
        both += masks.values()
    assert (both[0] == both[1]).all() and (both[0] == (marked > 0)).all()


def test_masks_that_fit_nothing(tmp_path):
    lost = {name: data for name, data in MVTEC.items() if "ground" not in name}
    one = lost | {"ground_truth/chip/000_mask.png": MASK, "ground_truth/chip/099_mask.png": MASK}
    opened = open_inspection(write(tmp_path / "one", one))
    assert opened.notes == ("1 mask without an image, such as `ground_truth/chip/099_mask.png`",)
    none = write(tmp_path / "none", lost | {"ground_truth/chip/099_mask.png": MASK})
    with pytest.raises(
        UsageError, match=r"no mask of .* matches an image, for example `ground_truth/chip/099_mask.png`"
    ):
        open_inspection(none)
    small = write(tmp_path / "small", lost | {"ground_truth/chip/000_mask.png": png(255, (6, 6), "L")})
    message = "the mask `ground_truth/chip/000_mask.png` is 6×6, but its image is 8×8"
    opened = open_inspection(small)
    refused(message, read_masks, small, opened, list(opened.kinds), (8, 8), "crop")
