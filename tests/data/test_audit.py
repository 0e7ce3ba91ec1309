"""`gz data audit` on a folder of patches of two photographs, in which faults are planted."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
import torch
from pictures import encoded, write
from PIL import Image

import gzcli
from gzcli.cli import out
from gzcli.core.errors import UsageError
from gzcli.data.readers.embedded import _of_sklearn
from gzcli.engine.log import Log
from gzcli.judge import audit
from gzcli.launch import auditing, jobs
from gzcli.store.jobs import AuditJob
from gzcli.store.png import origin_of

pytestmark = pytest.mark.usefixtures("home")
CPU = torch.device("cpu")
SIDE, STEP, PATCHES = 40, 42, 32  # pixels of a patch and from one to the next; patches of a photograph
WRONG = 3  # further patches of one photograph among those of the other


def as_jpeg(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=60)
    return stream.getvalue()


@pytest.fixture(scope="module")
def patches() -> dict[str, np.ndarray]:
    """Patches uint8 [N, SIDE, SIDE, 3] of each photograph that do not overlap."""
    chosen = {}
    for name in ("china", "flower"):
        photo = np.asarray(Image.open(_of_sklearn(f"images/{name}.jpg")))
        starts = [
            (y, x)
            for y in range(2, photo.shape[0] - STEP, STEP)
            for x in range(2, photo.shape[1] - STEP, STEP)
        ]
        cuts = np.stack([photo[y : y + SIDE, x : x + SIDE] for y, x in starts])
        busy = np.argsort(-cuts.reshape(len(cuts), -1).std(1))  # not the sky
        chosen[name] = cuts[busy[: PATCHES + WRONG]]
    return chosen


@pytest.fixture
def folder(tmp_path, patches):
    """A set with train and test, and a fault of each kind."""
    files = {
        f"{'test' if i % 4 == 3 else 'train'}/{name}/{i:03d}.png": encoded(pixels)
        for name, some in patches.items()
        for i, pixels in enumerate(some[:PATCHES])
    }
    china = patches["china"]
    files |= {f"train/flower/wrong{i}.png": encoded(china[PATCHES + i]) for i in range(WRONG)}
    files |= {
        "test/china/mirrored.png": encoded(np.ascontiguousarray(china[0][:, ::-1])),
        "train/china/compressed.jpg": as_jpeg(china[1]),
        "train/china/same.png": encoded(china[4]),
        "train/china/white.png": encoded(np.full_like(china[0], 255)),
        "train/china/none.png": b"",
        "train/flower/half.jpg": as_jpeg(china[5])[:400],
        "train/flower/wide.png": encoded(np.concatenate([*patches["flower"][8:11]], 1)),
        "train/china/stripes.png": encoded(np.tile(np.uint8([[[0] * 3], [[255] * 3]]), (20, 40, 1))),
    }
    return write(tmp_path / "photos", files)


def audited(path, tmp_path, **options):
    place = tmp_path / "job"
    place.mkdir(exist_ok=True)
    return audit.run(AuditJob(data=str(path), **options), place, CPU, Log(place, mode="quiet"))


def test_each_kind_of_fault_is_reported(folder, tmp_path):
    result = audited(folder, tmp_path)
    assert result["images"] == 75 and sum(result["counts"].values()) == len(result["faults"])
    faults = {row["file"]: row for row in result["faults"] if row["kind"] != "label"}
    kinds = {file: row["kind"] for file, row in faults.items()}
    assert kinds["train/china/none.png"] == kinds["train/flower/half.jpg"] == "unreadable"
    assert kinds["train/china/white.png"] == "blank" and kinds["train/flower/wide.png"] == "size"
    assert "120×40, others are 40×40" in faults["train/flower/wide.png"]["note"]
    assert kinds["train/china/stripes.png"] == "foreign"
    copies = {file: (row["kind"], row["of"]) for file, row in faults.items() if row["of"]}
    assert copies == {
        "test/china/mirrored.png": ("split-copy", "train/china/000.png"),
        "train/china/compressed.jpg": ("copy", "train/china/001.png"),
        "train/china/same.png": ("copy", "train/china/004.png"),
    }
    wrong = [row for row in result["faults"] if row["kind"] == "label"]
    print(wrong)
    assert wrong[0]["file"].startswith("train/flower/wrong")
    assert (wrong[0]["label"], wrong[0]["suggested"]) == ("flower", "china")


def test_the_table_and_the_sheet_show_the_faults(folder, tmp_path):
    result = audited(folder, tmp_path)
    with open(result["table"], newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [fault["file"] for fault in result["faults"]]
    assert set(rows[0]) == {"file", "split", "kind", "score", "of", "label", "suggested", "note"}
    with Image.open(result["sheet"]) as picture:
        assert picture.width > 400 and picture.height > 600
    assert origin_of(tmp_path / "job" / "audit.png") is not None


def test_arrays_without_classes_have_names_by_split(tmp_path, patches):
    images = np.concatenate([*(some[:PATCHES] for some in patches.values()), patches["china"][3:4]])
    np.savez(tmp_path / "set.npz", images=images)
    result = audited(tmp_path / "set.npz", tmp_path)
    copies = [(row["kind"], row["file"], row["of"]) for row in result["faults"] if row["of"]]
    assert copies == [("copy", "train/64", "train/3")]
    assert result["counts"]["label"] == 0


def test_too_few_images_are_only_searched_for_files_of_no_use(tmp_path, patches):
    files = {f"{i}.png": encoded(pixels) for i, pixels in enumerate(patches["china"][:3])}
    result = audited(write(tmp_path / "few", files | {"3.png": files["0.png"], "4.png": b"x"}), tmp_path)
    assert [(row["kind"], row["file"], row["of"]) for row in result["faults"]] == [
        ("unreadable", "4.png", None),
        ("copy", "3.png", "0.png"),
    ]
    assert "too few" in " ".join(result["notes"])


def test_a_part_of_a_set_is_drawn_at_random(folder, tmp_path):
    result = audited(folder, tmp_path, n=30)
    assert result["images"] == 30 and "30 images of 75, drawn at random" in result["notes"]


# ---------------------------------------------------------------------------- the command line and Python


@pytest.fixture
def in_process(monkeypatch):
    """Jobs are done in this process, by the same engine."""

    def do_job(place, job, **_):
        return json.loads(json.dumps(audit.run(job, place, CPU, Log(place, mode="quiet"))))

    monkeypatch.setattr(jobs, "do_job", do_job)
    monkeypatch.setattr("gzcli.api.compare.do_job", do_job)


@pytest.fixture
def run(capsys):
    from gzcli.__main__ import main

    def call(*words):
        code = main(list(words))
        return code, *capsys.readouterr()

    yield call
    out.configure(json=False, quiet=False)


def test_fail_ends_with_code_6_only_if_there_is_a_fault(in_process, run, folder, tmp_path, patches):
    code, table, messages = run("data", "audit", str(folder), "--fail")
    assert code == 6 and "train/flower/half.jpg" in table and "more likely china" in table
    assert "audit.png" in table and "faults: unreadable: 2" in messages and "with faults" in messages
    good = write(tmp_path / "good", {f"{i}.png": encoded(p) for i, p in enumerate(patches["flower"][:12])})
    code, table, messages = run("data", "audit", str(good), "--fail")
    assert code == 0 and table == "" and "no faults" in messages
    code, text, _ = run("--json", "data", "audit", str(folder))
    assert code == 0 and json.loads(text)["counts"]["unreadable"] == 2


def test_a_set_that_does_not_exist_is_refused(run):
    code, _, messages = run("data", "audit", "./nothing")
    assert code == 3 and "`./nothing` does not exist" in messages
    with pytest.raises(UsageError, match="there is no data set"):
        auditing.ask("mnits")


def test_an_audit_from_python(in_process, folder):
    result = gzcli.audit(folder, quiet=True)
    assert result.files("blank") == ["train/china/white.png"] and result.counts["blank"] == 1
    assert result.rows[0].kind == "unreadable" and (result.folder / "audit.csv").exists()
