"""`gz sweep`: real trainings of a few steps, in this process."""

import json
import sys

import pytest
from helpers import in_process

from gzcli.cli import app
from gzcli.launch import launcher
from gzcli.league.sweep import sweep_of
from gzcli.store import runs

pytestmark = pytest.mark.usefixtures("undrawn")
WORDS = ("sweep", "vae", "--data", "digits", "--set", "optim.lr=1e-9,3e-3", "--set", "train.best=loss")
WORDS += ("--set", "train.samples=2", "--set", "model.hidden=[8]", "--budget", "0.6s", "--cpu", "--json")


def test_the_better_half_goes_on_and_a_sweep_that_was_stopped_too(home, monkeypatch, capsys):
    monkeypatch.setattr("gzcli.league.league.SHORTEST", 0.1)
    trained, most = [], 1

    def train(folder, plan, **how):
        if len(trained) == most:
            raise KeyboardInterrupt
        trained.append(folder)
        return in_process(folder, plan, **how)

    monkeypatch.setattr(launcher, "run", train)
    assert app.run(list(WORDS)) == 130 and len(trained) == 1
    most = 2
    assert app.run(list(WORDS)) == 130 and len(trained) == 2, "the trial that was trained is not again"
    short = {path: runs.Run(path).status()["step"] for path in trained}
    most = 10
    capsys.readouterr()
    assert app.run(list(WORDS)) == 0 and len(trained) == 3 and trained[2] == trained[1]
    result = json.loads(capsys.readouterr().out)
    best, loser = result["trials"]
    assert (best["setting"], best["state"]) == (["optim.lr=3e-3"], "best")
    assert (loser["setting"], loser["state"]) == (["optim.lr=1e-9"], "stopped")
    assert (best["steps"], loser["steps"]) == (2 * short[trained[1]], short[trained[0]])
    assert best["value"] < loser["value"] and result["metric"] == "loss"
    assert result["command"].endswith("--set optim.lr=3e-3") and "'model.hidden=[8]'" in result["command"]
    assert {run.id for run in runs.all_runs()} == {best["run"], loser["run"]}
    (folder,) = (home / "sweeps").iterdir()
    assert {"study.journal", "sweep.png"} <= {path.name for path in folder.iterdir()}
    assert app.run(list(WORDS)) == 0 and len(trained) == 3, "nothing is left to do"
    assert json.loads(capsys.readouterr().out) == result


def test_what_is_tried_is_read_and_refused(home, monkeypatch, capsys):
    terms = {"model": "vae", "data": "digits", "budget": 90.0, "flags": {"seed": 0}}
    sets = (
        "optim.lr=1e-4..1e-2",
        "model.hidden=[8],[8, 16]",
        "train.clip=1,2,3",
        "data.augment=[flip, shift]",
    )
    sweep = sweep_of(sets, None, **terms)
    assert sweep.ranges == {"optim.lr": (1e-4, 1e-2)} and sweep.fixed == ["data.augment=[flip, shift]"]
    assert sweep.lists == {"model.hidden": ["[8]", "[8, 16]"], "train.clip": ["1", "2", "3"]}
    assert sweep.rungs == [8, 4, 2, 1] and sweep.first * (8 + 4 + 2 * 2 + 4) == pytest.approx(90)
    for words, message in (
        (("--set", "optim.lr=1e-3"), "nothing to try"),
        (("--set", "optim.lr=3..1"), "no range"),
        (("--set", "optim.lr=1e-4..1e-2", "--budget", "9s"), "leaves each of 8 trials"),
    ):
        assert app.run(["sweep", "vae", "--data", "digits", "--budget", "9m", *words]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert app.run([*WORDS[:6], "--budget", "1m"]) == 3
    assert "gzcli[sweep]" in capsys.readouterr().err
