"""The figures of an inspection set: of an alarm whose answers are known."""

import numpy as np
import pytest
from pictures import encoded, png, write

from gzcli.data.readers.inspection import open_inspection
from gzcli.judge.inspection import MEAN, Judged, figures, notes, open_defective, overview
from gzcli.store.png import save_png

pytestmark = pytest.mark.usefixtures("home")
FORM = {"size": "8x8", "channels": 1, "fit": "crop", "patch": None}


@pytest.fixture
def defects(tmp_path):
    """Two kinds: the chips have masks of the left half at twice the size, of the dents one has none."""
    half = np.zeros((16, 16), np.uint8)
    half[:, :8] = 255
    files = {f"train/good/{i}.png": png(9, (16, 16), "L") for i in range(4)}
    for kind in ("chip", "dent"):
        files |= {f"test/{kind}/{i}.png": png(99, (16, 16), "L") for i in range(2)}
        files |= {f"ground_truth/{kind}/{i}_mask.png": encoded(half) for i in range(2)}
    del files["ground_truth/dent/1_mask.png"]
    path = write(tmp_path / "parts", files)
    return open_defective(path, open_inspection(path), FORM, print)


def judged(p, score, left):
    maps = np.zeros((len(p), 8, 8), np.float32)
    maps[:, :, :4] = np.array(left)[:, None, None]
    return Judged(np.array(p), np.array(score, float), maps)


def test_each_kind_by_itself_and_the_mean_last(defects, tmp_path):
    good = judged([0.5, 0.9, 0.02, 0.3], [1, 0, 5, 2], [0, 0, 0, 0])
    bad = judged([0.01, 0.02, 0.4, 0.03], [9, 8, 1.5, 6], [1, 1, 0, 1])
    chip, dent, mean = rows = figures(good, bad, defects, 0.02)
    assert (chip["defect"], dent["defect"], mean["defect"]) == ("chip", "dent", MEAN)
    assert chip["auroc"] == 1 and dent["auroc"] == pytest.approx((2 + 4) / 8)
    assert mean["auroc"] == pytest.approx((1 + 0.75) / 2) and mean["n"] == 4
    assert [row["detected_n"] for row in rows] == [2, 0, 2] and mean["detected"] == 0.5
    assert chip["detected_ci"][0] == pytest.approx(0.342, abs=1e-3)  # Wilson's of 2 of 2
    # maps are enlarged to the masks; of the dents only the one with a mask counts, whose map is blank
    assert chip["aupro"] > 0.97 and chip["pixel_f1"] > 0.9 and dent["pixel_auroc"] == 0.5
    assert mean["aupro"] == pytest.approx((chip["aupro"] + dent["aupro"]) / 2)
    said = notes(defects, rows, good, 0.02)
    assert said[0] == "1 of 4 good test pictures flagged at 2 %" and "1 picture without a mask" in said
    colours = np.zeros((4, 3, 8, 8), np.uint8)
    image = overview(bad, defects, colours, 0.02)
    save_png(tmp_path / "sheet.png", image)
    assert image.shape[2] == 3 and (image == 255).all(2).any()  # masks are white


def test_a_score_without_a_map_has_no_figures_of_pixels(defects):
    good, bad = Judged(np.ones(3), np.arange(3.0), None), Judged(np.full(4, 0.01), np.full(4, 9.0), None)
    rows = figures(good, bad, defects, 0.02)
    assert all(row["aupro"] is row["pixel_f1"] is None for row in rows) and rows[-1]["auroc"] == 1
    assert overview(bad, defects, None, 0.02).shape[2] == 3
