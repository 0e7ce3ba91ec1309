"""`gz demo`: what the page does, in this process; that its code gives what is shown; and the server."""

from __future__ import annotations

import gc
import signal
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from zoo import CASES

from gzcli.cli import app, demo
from gzcli.data.open import open_pack
from gzcli.demo import code
from gzcli.demo.choices import choices
from gzcli.demo.studio import Asked, Studio, enlarged, sheet
from gzcli.demo.watch import MOST, watched
from gzcli.engine.trained import Trained
from gzcli.errors import MissingError, UsageError
from gzcli.handles import Run
from gzcli.parts import Part
from gzcli.recipe.from_file import find_run
from gzcli.sections import DataSection
from gzcli.store import pretrained, runs


@pytest.fixture
def studio(home, monkeypatch):
    """studio("cfm"): a studio with an untrained model of the zoo, and the name of its run."""

    def open_studio(model: str) -> tuple[Studio, str]:
        case = next(case for case in CASES if case.model == model)
        pack = open_pack(case.data)
        run = runs.create(case.model, case.data)
        run.update(state="finished", step=7)
        (run.path / "run.yaml").write_text(f"model: {{name: {case.model}}}\n")
        (run.path / "model.safetensors").write_bytes(b"x")
        info = pack.info(levels=case.levels, steps=1000)
        part = Part(case.model, sample=case.sample, data=DataSection(case.data))
        model_ = case.build(info).eval().requires_grad_(False)
        found = Run(Trained(run, model_, info, part, torch.device("cpu"), 7))
        monkeypatch.setattr("gzcli.api.load", lambda *args, **kwargs: found)
        return Studio(), run.id

    return open_studio


def made_by(lines: str, monkeypatch, folder=None) -> dict:
    """The variables that Python lines leave behind."""
    if folder:
        monkeypatch.chdir(folder)
    found: dict = {}
    exec(lines, found)
    return found


def test_samples_become_and_the_code_makes_the_same(studio, monkeypatch):
    show, name = studio("cfm")
    choice, *ready = choices()
    assert {one.name for one in ready} == {f"pretrained:{known}" for known in pretrained.names()}
    assert ready[0].name.endswith("-glyphs") and "comes with gz" in ready[0].title
    assert choice.name == name and "cfm on digits, 7 steps" in choice.title
    _, can = show.open(name)
    assert dict(can.numbers) == {"steps": 3, "guidance": 2.0} and can.sampler == "midpoint" in can.samplers
    assert can.classes == tuple("0123456789") and can.inpaints and can.way and can.maps
    *states, (last, made) = show.draw(Asked(name, 4, 5, "7", {"steps": 2, "guidance": 2.0}))
    assert len(states) >= 2 and all(found is None for _, found in states)
    assert made.shell == f"gz sample {name} -n 4 --seed 5 --label 7 --steps 2", (
        "what the recipe says is left out"
    )
    assert (sheet(made_by(made.python, monkeypatch)["images"]) == last).all()


def test_the_way_between_two_seeds(studio, monkeypatch):
    show, name = studio("vae")
    ends = Asked(name, 1, 0), Asked(name, 1, 1)
    *_, (last, made) = show.between(*ends, 3)
    assert (sheet(made_by(made.python, monkeypatch)["images"], 3) == last).all()
    assert made.shell.splitlines()[-1] == f"gz sample {name} --do interpolate --input ends --frames 3"
    show, name = studio("pixelcnn")
    with pytest.raises(UsageError, match="does not go from image to image"):
        list(show.between(Asked(name), Asked(name), 3))


def test_what_is_painted_over_is_filled_in(studio, monkeypatch):
    show, name = studio("fm")
    canvas = show.canvas(name, 3, None)
    assert canvas.shape == (480, 480, 3)
    painted = np.zeros((480, 480), bool)
    with pytest.raises(UsageError, match="nothing is painted over"):
        list(show.inpaint(name, canvas, painted, 0, None))
    painted[:240] = True
    *_, (last, made) = show.inpaint(name, canvas, painted, 2, None)
    found = made_by(made.python, monkeypatch, show.folder)
    assert (sheet(found["images"]) == last).all() and not found["mask"][:7].any() and found["mask"][9:].all()
    small = show.open(name)[0].sample(1, seed=3)
    assert (found["picture"] == small).all(), "the enlarged sample becomes what it was"


def test_a_picture_is_judged_as_by_the_verb(studio, monkeypatch):
    """The verb's own function is called, with the picture as it was dropped."""
    show, name = studio("fm")
    asked = []

    def run(job, folder, device, log):
        asked.append(job)
        Image.fromarray(np.full((16, 16, 3), 9, np.uint8)).save(folder / "map.png")
        return {"outputs": {"maps": {"picture.png": str(folder / "map.png")}}}

    monkeypatch.setattr("gzcli.engine.alarm.run", run)
    found, shown, made = show.judge(name, np.full((40, 40, 3), 200, np.uint8), 150)
    assert (asked[0].n, asked[0].maps, asked[0].ins) == (150, True, "digits") and found["outputs"]
    assert shown.shape[2] == 3 and shown.shape[1] > 2 * shown.shape[0] * 0.8
    assert made.shell == f"gz ood {name} --input picture.png -n 150 --map"


def test_states_are_thinned_out_and_errors_come_through():
    def work(progress):
        for i in range(1000):
            progress(i + 1, 1000, torch.zeros(1, 1, 2, 2))
        return np.ones((1, 1, 2, 2), np.uint8)

    found = list(watched(work, lambda x: x.numpy().astype(np.uint8)))
    assert 10 < len(found) <= MOST + 2 and found[-1].all() and not found[0].any()

    def fails(progress):
        raise MissingError("gone")

    with pytest.raises(MissingError, match="gone"):
        list(watched(fails, lambda x: x.numpy()))
    assert enlarged(np.zeros((16, 16, 1), np.uint8), 480).shape == (480, 480, 1)


def test_what_is_shown_has_a_file_of_its_own():
    """The browser may still be reading the picture of an equal drawing; all files go with the demo."""
    show, picture = Studio(), np.full((4, 4, 1), 7, np.uint8)
    paths = [Path(show.file(picture)) for _ in range(2)]
    assert len(set(paths)) == 2 and all(path.parent == show.shown for path in paths)
    assert all((np.asarray(Image.open(path)) == 7).all() for path in paths)
    folder = show.folder
    del show
    gc.collect()
    assert not folder.exists()


def test_a_signal_ends_the_demo_as_ctrl_c_does(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("gzcli.cli.demo.time.sleep", lambda _: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        demo.wait()
    assert signal.getsignal(signal.SIGTERM) is before


def test_names_are_quoted_in_the_code():
    made = code.drawing("./my run", 2, 0, "x, y", 3, {"prompt": "a red door", "no_clip": 1})
    words = """gz sample './my run' -n 2 --seed 0 --label '"x, y"' --prompt 'a red door' --no-clip 1"""
    assert made.shell == words and "labels=[3], prompt='a red door'" in made.python


def test_without_gradio_or_with_a_model_that_comes_with_gz(call, home, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code_, _, stderr = call("demo")
    assert code_ == 3 and "gradio" in stderr and "pip install 'gzcli[demo]'" in stderr
    name = f"pretrained:{next(iter(pretrained.names()))}"
    assert [choice.name for choice in choices([find_run(name)])] == [name]


@pytest.mark.slow  # gradio takes its seconds to import
def test_the_page_is_served_from_here_alone(studio, capsys, monkeypatch):
    pytest.importorskip("gradio")
    from gzcli.demo import page, serve

    studio("fm")
    seen = {}

    def ended() -> None:
        url = seen["url"] = capsys.readouterr().out.strip()
        said = page._said(Studio(), iter([(np.zeros((4, 4, 1), np.uint8), None)] * 2))
        seen["pictures"] = {shown for shown, *_ in said}
        answer = urllib.request.urlopen(url)
        seen["policy"], seen["html"] = answer.headers["content-security-policy"], answer.read().decode()
        raise KeyboardInterrupt

    monkeypatch.setattr("gzcli.cli.demo.wait", ended)
    assert app.run(["demo", "--no-browser", "-q"]) == 0
    assert seen["url"].startswith("http://127.0.0.1:") and seen["policy"] == serve.POLICY
    assert "Is it one" in seen["html"] or "gz demo" in seen["html"]
    assert "gradio" in sys.modules and len(seen["pictures"]) == 2
