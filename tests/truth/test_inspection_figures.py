"""The figures of an inspection set: of an alarm whose answers are known."""

import numpy as np
import pytest
import torch
from helpers import fit, recipe
from pictures import encoded, png, write
from refused import refused
from zoo import CASES

from gzcli.data.library import import_set
from gzcli.data.readers.inspection import open_inspection
from gzcli.engine.log import Log
from gzcli.judge.inspection import MEAN_ROW, Judged, defect_sheet, kind_figures, notes, open_defective, run
from gzcli.launch.scoring import inspection_at
from gzcli.report.ood import document
from gzcli.report.results import read
from gzcli.store.files import read_json
from gzcli.store.jobs import InspectJob
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
    chip, dent, mean = rows = kind_figures(good, bad, defects, 0.02)
    assert (chip["defect"], dent["defect"], mean["defect"]) == ("chip", "dent", MEAN_ROW)
    assert chip["auroc"] == 1 and dent["auroc"] == pytest.approx((2 + 4) / 8)
    assert mean["auroc"] == pytest.approx((1 + 0.75) / 2) and mean["n"] == 4
    assert [row["detected_n"] for row in rows] == [2, 0, 2] and mean["detected"] == 0.5
    assert chip["detected_ci"][0] == pytest.approx(0.025**0.5)  # the exact interval of 2 of 2
    # maps are enlarged to the masks; of the dents only the one with a mask counts, whose map is blank
    assert chip["aupro"] > 0.97 and chip["pixel_f1"] > 0.9 and dent["pixel_auroc"] == 0.5
    assert mean["aupro"] == pytest.approx((chip["aupro"] + dent["aupro"]) / 2)
    assert "1 image without a mask" in notes(defects, rows)
    colours = np.zeros((4, 3, 8, 8), np.uint8)
    image = defect_sheet(bad, defects, colours, 0.02)
    save_png(tmp_path / "sheet.png", image)
    assert image.shape[2] == 3 and (image == 255).all(2).any()  # masks are white


def inspection_set(root):
    """Grey pictures with noise; chips are white squares, dents dark ones, which only chips have masks of."""
    rng, files = np.random.default_rng(0), {}

    def picture(spot=None):
        image = (120 + rng.normal(0, 8, (16, 16))).clip(0, 255)
        if spot is not None:
            image[4:9, 5:10] = spot
        return encoded(image.astype(np.uint8))

    for i in range(60):
        files[f"train/good/{i:02}.png"] = picture()
    for i in range(12):
        files[f"test/good/{i:02}.png"] = picture()
    mask = np.zeros((16, 16), np.uint8)
    mask[4:9, 5:10] = 255
    for i in range(5):
        files |= {f"test/chip/{i}.png": picture(255), f"test/dent/{i}.png": picture(0)}
        files[f"ground_truth/chip/{i}_mask.png"] = encoded(mask)
    return write(root, files)


def test_a_method_and_a_run_judge_a_set_by_its_kinds_of_defects(tmp_path):
    path = inspection_set(tmp_path / "parts")
    (path / "test" / "dent" / "torn.png").write_bytes(b"torn")
    job = InspectJob("", str(path), str(path), 0.03, method="pca_local")
    result = run(job, tmp_path, torch.device("cpu"), Log(mode="quiet"))
    chip, dent, mean = result["defects"]
    assert chip["detected_n"] == dent["detected_n"] == 5 and mean["auroc"] == 1
    assert chip["aupro"] > 0.9 and dent["aupro"] is None and mean["aupro"] == chip["aupro"]
    assert result["good"]["n"] == 12 and result["good"]["flagged"] <= 2
    assert "torn.png" in result["unreadable"][0] and "5 images without a mask" in result["notes"]
    lines = (tmp_path / "inspection.csv").read_text().splitlines()
    assert lines[0] == "file,defect,p,flagged,score" and len(lines) == 1 + 12 + 10
    assert lines[1].startswith("test/good/00.png,good,") and lines[-1].startswith("test/dent/4.png,dent,")
    assert (tmp_path / "inspection.png").exists()
    assert read_json(tmp_path / "inspection.json")["defects"] == result["defects"]
    report = document(read(tmp_path))
    table = report.tables[0]
    assert [cell.text for cell in table.columns[0].cells] == ["chip", "dent", "mean"]
    assert report.title == "Defects of parts" and "10 of 10 defects detected" in report.lead
    # by a run, of the set under a name
    import_set(path, "parts")
    case = next(case for case in CASES if case.model == "vae")
    trained = fit(recipe(case, steps=2, data="parts"))
    job = InspectJob(str(trained.run.path), "parts", str(path), 0.2)
    result = run(job, tmp_path, torch.device("cpu"), Log(mode="quiet"))
    assert [row["n"] for row in result["defects"]] == [5, 5, 10]
    assert result["run"] == trained.run.id and result["defects"][0]["aupro"] > 0.5
    nothing = InspectJob("", "digits", str(tmp_path / "today"), 0.03)
    refused("not an inspection set", run, nothing, tmp_path, torch.device("cpu"), Log(mode="quiet"))


@pytest.mark.parametrize(
    ("good", "bad", "masks"),
    [("Data/Images/Normal", "Data/Images/Anomaly", "Data/Masks/Anomaly"), ("good", "dent", "masks/dent")],
)
def test_the_layouts_of_visa_and_of_plain_folders_are_judged(tmp_path, good, bad, masks):
    """Their defects are neither fitted to nor do they calibrate."""
    rng, corner = np.random.default_rng(0), np.zeros((16, 16), np.uint8)
    corner[:4, :4] = 255
    images = rng.integers(100, 110, (45, 16, 16), np.uint8)
    images[40:, :4, :4] = 255
    files = {f"{good}/{i:02}.png": encoded(image) for i, image in enumerate(images[:40])}
    files |= {f"{bad}/{i}.png": encoded(image) for i, image in enumerate(images[40:])}
    files |= {f"{masks}/{i}.png": encoded(corner) for i in range(5)}
    path = write(tmp_path / "set", files)
    layout = inspection_at(str(path))
    assert layout.path == path and layout.home.path == path / good
    job = InspectJob("", layout.home.reference, str(path), 0.05, method="pca")
    result = run(job, tmp_path, torch.device("cpu"), Log(mode="quiet"))
    kind = result["defects"][0]
    assert kind["defect"] == bad.rpartition("/")[2] and kind["detected_n"] == 5
    assert kind["aupro"] > 0.9 and result["fitted_on"] < 40
    # a mask that is none of these pictures'
    for i in range(5):
        (path / masks / f"{i}.png").rename(path / masks / f"other{i}.png")
    assert "name each mask after its image" in refused("no mask", inspection_at, str(path)).hint


def test_a_score_without_a_map_has_no_figures_of_pixels(defects):
    good, bad = Judged(np.ones(3), np.arange(3.0), None), Judged(np.full(4, 0.01), np.full(4, 9.0), None)
    rows = kind_figures(good, bad, defects, 0.02)
    assert all(row["aupro"] is row["pixel_f1"] is None for row in rows) and rows[-1]["auroc"] == 1
    assert defect_sheet(bad, defects, None, 0.02).shape[2] == 3
