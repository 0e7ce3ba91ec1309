"""`gz sweep`: a real one of a few steps, then trainings that are figures, in this process."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import in_process

import gzcli
from gzcli.cli import app
from gzcli.core.errors import DeviceError, DivergedError, GzError, Interrupted, UsageError
from gzcli.launch import launcher, plan
from gzcli.league import sweep, training
from gzcli.league.sweep import sweep_of
from gzcli.store import files, runs
from gzcli.store.runs import Run

pytestmark = pytest.mark.usefixtures("undrawn")
FAST = ("--set", "train.best=loss", "--set", "train.samples=2", "--set", "model.hidden=[8]", "--cpu")
WORDS = ("sweep", "vae", "--data", "digits", "--set", "optim.lr=1e-9,3e-3", *FAST, "--budget", "0.6s")
RATES = ("sweep", "vae", "--data", "digits", "--cpu", "--budget", "1m", "--json", "--set")


@pytest.fixture
def trained(home, monkeypatch):
    """(alias, steps) of the trainings, whose value is the distance of the learning rate from 3e-3 and a
    little more that falls with the steps. `trained.fails` maps a rate to the error of its next training."""

    class Log(list):
        fails: dict = {}
        meanwhile: Callable[[Run], None] | None = None

    log = Log()

    def engine(folder, p, **how):
        run = Run(folder)
        tree = run.tree()
        rate, counted = tree["optim"]["lr"], tree["train"]["minutes"] is None
        steps = tree["train"]["steps"] if counted else 10
        log.append((run.alias[-1], steps))
        plan.write_chosen(run, {"train": {"minutes": None, "steps": steps}})
        values = {n: abs(math.log10(rate / 3e-3)) + 1 / n for n in range(5, steps + 1, 5)}
        lines = (json.dumps({"step": n, "val_loss": value}) + "\n" for n, value in values.items())
        files.write_atomic(run.metrics_file, "".join(lines))
        best = {"metric": "loss", "value": values[steps], "step": steps}
        files.write_json(run.best_file, best)
        if log.meanwhile:
            log.meanwhile(run)
        if error := log.fails.get(rate):
            state = "diverged" if isinstance(error, DivergedError) else "failed"
            run.update(state=state, step=steps, error={"message": error.message, "kind": error.kind})
            raise error
        run.update(state="finished", step=steps, seconds=float(steps), error=None)
        return run.status()

    monkeypatch.setattr(launcher, "run", engine)
    monkeypatch.setattr(sweep, "draw_curves", lambda *_, **__: None)
    return log


def shown(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def of(result: dict, *keys: str) -> list:
    return [tuple(trial[key] for key in keys) for trial in result["trials"]]


def test_the_better_half_goes_on_and_a_sweep_that_was_stopped_too(home, monkeypatch, capsys):
    """Real trainings; nothing but gz itself is needed."""
    monkeypatch.setattr(sweep, "MIN_ENTRY_SECONDS", 0.1)
    monkeypatch.setitem(sys.modules, "optuna", None)
    started, most = [], 1

    def train(folder, plan, **how):
        if len(started) == most:
            raise KeyboardInterrupt
        started.append(folder)
        return in_process(folder, plan, **how)

    monkeypatch.setattr(launcher, "run", train)
    words = [*WORDS, "--json"]
    assert app.run(words) == 130 and len(started) == 1
    most = 2
    assert app.run(words) == 130 and len(started) == 2, "the trial that was trained is not again"
    short = {path: Run(path).status()["step"] for path in started}
    most = 10
    capsys.readouterr()
    assert app.run(words) == 0 and len(started) == 3 and started[2] == started[1]
    result = shown(capsys)
    best, loser = result["trials"]
    assert (best["setting"], best["state"]) == (["optim.lr=3e-3"], "best")
    assert (loser["setting"], loser["state"]) == (["optim.lr=1e-9"], "stopped")
    assert (best["steps"], loser["steps"]) == (2 * short[started[1]], short[started[0]])
    assert best["value"] < loser["value"] and result["metric"] == "loss"
    assert result["command"].endswith("--set optim.lr=3e-3") and "'model.hidden=[8]'" in result["command"]
    assert {run.id for run in runs.all_runs()} == {best["run"], loser["run"]}
    (folder,) = (home / "sweeps").iterdir()
    assert {"sweep.json", "sweep.png"} <= {path.name for path in folder.iterdir()}
    assert app.run(words) == 0 and len(started) == 3, "nothing is left to do"
    assert shown(capsys) == result
    assert app.run([*WORDS]) == 0
    said = capsys.readouterr().err
    assert f"next: {result['command']}" in said and f"gz sample {runs.by_name(best['run']).alias}\n" in said


FOUR = (*RATES, "optim.lr=1e-5,1e-4,1e-3,1e-2")
TWO = (*RATES, "optim.lr=1e-5,1e-3")
CAME_OUT = [("1e-3", 20, 2), ("1e-5", 10, 1)]  # settings, the best first: steps, lengths


@pytest.mark.parametrize("few", [8, pytest.param(None, marks=pytest.mark.slow)])
def test_a_sweep_killed_at_any_line_goes_on_by_the_same_command(few, trained, tmp_path, monkeypatch, capsys):
    """At the first and at the last time that each line of a sweep, of a training that it runs again and of
    what makes a run is reached. What comes out is as if nothing had been killed, and nothing is left over."""
    sets = [(f"optim.lr={rate}", steps) for rate, steps, _ in CAME_OUT]
    monkeypatch.setenv("GZ_HOME", str(tmp_path / "whole"))
    times = Counter(reached(TWO, tmp_path / "lines"))
    for name, least in {"sweep.py": 60, "training.py": 20, "plan.py": 40, "runs.py": 20}.items():
        assert sum(line.startswith(name) for line in times) >= least, name
    places = [(line, n) for line in times for n in sorted({1, times[line]})]
    killed = 0
    for i, (line, n) in enumerate(places[:: len(places) // few] if few else places):
        monkeypatch.setenv("GZ_HOME", str(tmp_path / str(i)))
        killed += Counter(reached(TWO, tmp_path / "lines", until=(line, n)))[line] == n
        assert app.run(list(TWO)) == 0, (line, n)
        assert [(*trial["setting"], trial["steps"]) for trial in shown(capsys)["trials"]] == sets, (line, n)
        assert len(runs.all_runs()) == 2 and {run.state for run in runs.all_runs()} == {"finished"}, (line, n)
        (path,) = (tmp_path / str(i) / "sweeps").glob("*/sweep.json")
        values = {row["setting"][0]: len(row["values"]) for row in json.loads(path.read_text())["trials"]}
        assert values == {f"optim.lr={rate}": lengths for rate, _, lengths in CAME_OUT}, (line, n)
    assert killed > 0.9 * i, "some lines depend on the clock"


def reached(words: tuple[str, ...], log: Path, until: tuple[str, int] | None = None) -> list[str]:
    """The lines of gz that a sweep reaches in a process of its own, which ends without a word when this line
    is reached so many times."""
    watched = {str(Path(module.__file__)) for module in (sweep, training, plan, runs)}
    log.unlink(missing_ok=True)
    if pid := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, 9) and (until or code == 0)
        return log.read_text().split()
    out, times, run_sweep = log.open("w"), Counter(), sweep.run_sweep

    def trace(frame, event, arg):
        if frame.f_code.co_filename not in watched:
            return None
        if event == "line":
            line = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
            print(line, file=out, flush=True)
            times[line] += 1
            if until == (line, times[line]):
                os._exit(9)
        return trace

    def traced(*words):
        sys.settrace(trace)
        return run_sweep(*words)

    sweep.run_sweep = traced
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    os._exit(app.run(list(words)))


def test_a_record_that_is_damaged_or_lost_is_made_again(trained, home, capsys):
    """Also that of an earlier version's sweep, which optuna wrote: its runs have the names of the trials."""
    assert app.run(list(FOUR)) == 0
    result, n = shown(capsys), len(trained)
    (path,) = home.glob("sweeps/*/sweep.json")
    whole = path.read_text()
    broken = (whole[: len(whole) // 2], "", "[]", "{}", "\0", whole.replace('"values"', '"v"'))
    broken += (whole.replace("optim.lr=1e-3", "optim.lr=2"), whole.replace('"steps": 10', '"steps": "x"'))
    broken += (whole.replace('"values": [', '"values": [NaN, '), None)
    for text in broken:
        path.unlink()
        os.mkfifo(path) if text is None else path.write_text(text)
        assert app.run(list(FOUR)) == 0, text
        said = capsys.readouterr()
        assert json.loads(said.out) == result and len(trained) == n, text
        assert "is damaged" in said.err and "rebuilds it from the runs" in said.err, text
        assert path.read_text() == whole, text
    path.unlink()
    assert app.run(list(FOUR)) == 0 and shown(capsys) == result and len(trained) == n
    path.unlink()
    path.mkdir()
    assert app.run(list(FOUR)) == 3 and f"`{path}`: is a directory" in capsys.readouterr().out
    path.rmdir()
    runs.all_runs()[-1].update(first_steps="10")
    assert app.run(list(FOUR)) == 0, "a trial whose run is damaged is trained again"
    assert shown(capsys)["trials"][0]["value"] == result["trials"][0]["value"]


def test_a_sweep_from_python_is_that_of_the_command(trained, capsys):
    sets = {"optim.lr": ["1e-5", 1e-3], "model.hidden": [[8]], "train.clip": 2.0}
    result = gzcli.sweep("vae", set=sets, data="digits", budget="1m", cpu=True, quiet=True)
    assert capsys.readouterr() == ("", "") and result.fixed == ("model.hidden=[8]", "train.clip=2.0")
    assert [(row.setting, row.steps, row.state) for row in result.trials] == [
        (("optim.lr=0.001",), 20, "best"),
        (("optim.lr=1e-5",), 10, "stopped"),
    ]
    assert result.best.value < 1 and result.metric == "loss" and len(trained) == 3
    words = [word for key in ("optim.lr=1e-5,0.001", *result.fixed) for word in ("--set", key)]
    assert app.run([*RATES[:-2], *words, "-q"]) == 0 and len(trained) == 3, "the same sweep"
    with pytest.raises(UsageError, match="at least two settings"):
        gzcli.sweep("vae", set=["optim.lr=1e-3"], data="digits", budget="1m", cpu=True)


def test_a_trial_that_fails_loses_alone_and_is_tried_again(trained, capsys):
    trained.fails = {1e-3: DeviceError("out of memory"), 1e-5: GzError("RuntimeError: no")}
    assert app.run(list(FOUR)) == 0
    result = shown(capsys)
    assert {*of(result, "state", "error")[2:]} == {
        ("failed", "out of memory"),
        ("failed", "RuntimeError: no"),
    }
    assert result["trials"][0]["setting"] == ["optim.lr=1e-2"]
    trained.fails, n = {}, len(trained)
    assert app.run([word for word in FOUR if word != "--json"]) == 0
    said = capsys.readouterr()
    assert [alias for alias, _ in trained[n:]] == ["0", "2", "2", "2"] and "best" in said.out
    assert "--set optim.lr=1e-3" in said.err and "failed" not in said.err


def test_a_trial_that_diverges_later_is_not_the_best(trained, capsys):
    def meanwhile(run):
        trained.fails = {1e-3: DivergedError("not finite")} if run.tree()["train"]["steps"] > 10 else {}

    trained.meanwhile = meanwhile
    assert app.run(list(FOUR)) == 0
    rows = of(result := shown(capsys), "setting", "state")
    assert rows[0] == (["optim.lr=1e-2"], "best") and (["optim.lr=1e-3"], "diverged") in rows
    assert app.run(list(FOUR)) == 0 and shown(capsys) == result


def test_all_that_diverge_end_with_the_code_of_it_and_no_advice(trained, capsys):
    trained.fails = dict.fromkeys((1e-5, 1e-4, 1e-3, 1e-2), DivergedError("not finite"))
    for _ in range(2):
        assert app.run([word for word in FOUR if word != "--json"]) == 5
        said = capsys.readouterr()
        assert "none of the 4 trials has a result: all diverged" in said.err and "next:" not in said.err
    assert len(trained) == 4, "none is tried again"
    trained.fails = {1e-5: DeviceError("no room")}
    trained.fails |= {rate: DivergedError("not finite") for rate in (1e-4, 1e-3, 1e-2)}
    for run in runs.all_runs():
        runs.remove(run)
    (path,) = Path(os.environ["GZ_HOME"]).glob("sweeps/*/sweep.json")
    path.unlink()
    assert app.run(list(FOUR)) == 4 and "no room" in capsys.readouterr().out


def test_a_run_that_was_removed_is_trained_to_the_length_that_is_left(trained, capsys):
    """And what is recorded of it stays."""

    def removing(run):
        if len(trained) == 4:
            raise Interrupted("stopped", signum=2)

    trained.meanwhile = removing
    assert app.run(list(FOUR)) == 130
    trained.meanwhile = None
    for run in runs.all_runs():
        runs.remove(run)
    assert app.run(list(FOUR)) == 0
    assert trained[4:] == [("3", 10), ("2", 20), ("3", 20), ("2", 40)], "not those that lost"
    rows = of(shown(capsys), "setting", "steps", "run")
    assert rows[0][:2] == (["optim.lr=1e-3"], 40) and rows[-1][1:] == (None, None)


def test_a_signal_between_two_trials_ends_the_sweep_with_a_word(trained, capsys):
    trained.meanwhile = lambda run: os.kill(os.getpid(), signal.SIGTERM)
    for n in (1, 2):
        assert app.run([word for word in FOUR if word != "--json"]) == 143 and len(trained) == n
        said = capsys.readouterr().err
        assert "stopped by SIGTERM" in said and "run the same command to resume" in said
    trained.meanwhile = None
    assert app.run(list(FOUR)) == 0
    assert [alias for alias, _ in trained] == ["0", "1", "2", "3", "2", "3", "2"], "each length once"


def test_a_signal_ends_the_waiting_for_another_process(trained, home, monkeypatch, capsys):
    trained.meanwhile = lambda run: os.kill(os.getpid(), signal.SIGTERM)
    assert app.run(list(FOUR)) == 143
    (run,) = runs.all_runs()
    monkeypatch.setattr(training, "STATUS_SECONDS", 0.0)
    run.update(state="interrupted")
    (record,) = home.glob("sweeps/*/sweep.json")
    record.unlink()
    monkeypatch.setattr(training.time, "sleep", lambda seconds: os.kill(os.getpid(), signal.SIGTERM))
    with files.lock(run.lock):
        assert app.run(list(FOUR)) == 143 and len(trained) == 1
    assert "another process is training" in capsys.readouterr().err


def test_a_full_disk_ends_the_sweep_with_its_code(trained, monkeypatch, capsys):
    write_json, full = files.write_json, []

    def written(path, *words, **how):
        if path.name == "sweep.json" and full:
            raise OSError(28, "No space left on device", str(path))
        write_json(path, *words, **how)

    monkeypatch.setattr(files, "write_json", written)
    full.append(True)
    assert app.run(list(FOUR)) == 3 and "no space left" in capsys.readouterr().out
    full.clear()
    assert app.run(list(FOUR)) == 0 and shown(capsys)["trials"][0]["steps"] == 40
    assert [alias for alias, _ in trained] == ["0", "1", "2", "3", "2", "3", "2"]


def test_a_run_that_was_killed_before_its_recipe_is_made_again_whoever_has_its_number_now(trained, home):
    """As in a container, where each `gz` has the same number."""
    run = runs.create("vae", "digits", alias="a-0")
    with pytest.raises(GzError, match="is already used"):
        runs.check_alias("a-0")
    run.update(created=run.status()["created"] - 1e6)  # a clock that was set back tells nothing
    with pytest.raises(GzError, match="is already used"):
        runs.check_alias("a-0")
    run.update(process_began=run.status()["process_began"] - 1e6)
    runs.check_alias("a-0")
    assert runs.create("vae", "digits", alias="a-0") != run and not run.path.exists()


def test_what_is_tried_is_read_and_refused_before_the_first_training(trained, capsys):
    flags = {"scale": None, "launch.gpus": None, "launch.cpu": True, "seed": 0}
    terms = {"budget": 9e5, "flags": flags}
    sets = [
        "optim.lr=1e-4..1e-2",
        "model.hidden=[8],[8, 16]",
        "train.clip=1,2,3",
        "data.augment=[flip, shift]",
    ]
    got = sweep.parsed(sets)
    assert got[0] == ["data.augment=[flip, shift]"] and got[2] == {"optim.lr": (1e-4, 1e-2)}
    assert got[1] == {"model.hidden": ["[8]", "[8, 16]"], "train.clip": ["1", "2", "3"]}
    made = sweep_of("vae", "digits", sets[:3], **terms)
    assert made.rungs == [8, 4, 2, 1] and made.first * (8 + 4 + 2 * 2 + 4) == pytest.approx(9e5)
    assert [setting[1] for setting in made.settings[:3]] == [f"train.clip={n}" for n in (1, 2, 3)]
    assert sweep_of("vae", "digits", sets[:3], **terms) == made, "draws depend on the seed alone"
    many = sweep.drawn({}, {"a": (1e-4, 1e-2)}, set(), 999, 0)
    low = sum(float(a.partition("=")[2]) < 1e-3 for (a,) in many)
    assert low / len(many) == pytest.approx(0.5, abs=0.05)
    whole = sweep_of("vae", "digits", ["train.batch_size=8..32"], **terms)
    sizes = [int(size.partition("=")[2]) for (size,) in whole.settings]
    assert len(set(sizes)) == 8 and all(8 <= size <= 32 for size in sizes)
    assert sweep_of("vae", "digits", ["train.batch_size=8..10"], **terms).trials == 3
    for words, message in (
        (["optim.lr=1e-3"], "at least two settings"),
        (["optim.lr=3..1"], "is not a range"),
        (["optim.lr=1e-3..1e400"], "not a range of numbers above 0"),
        (["optim.lr=1e-3,abc"], "`optim.lr` must be a number, not the string `abc`"),
        (["optim.lrr=1e-3,1e-2"], "did you mean `lr`?"),
        (["optim.lr=1e-3,1e-2", "optim.lr=1e-4..1e-2"], "`optim.lr` is set twice"),
        (["optim.lr=1e-3,1e-2", "optim.lr=1e-4"], "`optim.lr` is set twice"),
        (["seed=1,2", "seed=3, 4"], "hint: --set 'seed=1,2,3, 4'"),
        (["optim.lr=1e-3,0.001"], "are the same setting"),
        (["data.name=digits,glyphs"], "`data.name` digits and glyphs have no common validation metric"),
        (["data.size=16,8"], "hint: run a sweep for each `data.size`"),
        (["data.levels=2,17"], "`data.levels` 2 and 17"),
        (["data.channels=1,3"], "`data.channels` 1 and 3"),
        (["data.augment=[],[patch=8]"], "`data.augment` null and 8"),
        (["train.best=loss,bpd"], "`train.best` loss and bpd"),
        (["optim.lr=1e-3,1e-2", "train.best=none"], "needs a validation metric"),
        (["train.steps=10,20"], "follows from `--budget`"),
        ([f"optim.lr={','.join(map(str, range(1, 100_001)))}"], "100,000 settings"),
        (["optim.lr=1e-4..1e-2", "--trials", "100000"], "100,000 settings"),
        (["train.batch_size=8..10", "--trials", "8"], "only 3 different settings"),
        (["optim.lr=1e-4..1e-2", "--budget", "9s"], "gives each of 8 trials"),
        (["train.batch_size=8,99999"], "99999"),
    ):
        typed = [part for word in words for part in (["--set", word] if "=" in word else [word])]
        code = app.run(["sweep", "vae", "--data", "digits", "--cpu", "--budget", "9m", *typed])
        said = " ".join(capsys.readouterr().err.split())
        assert code == 2 and message in said, (words, said)
    assert trained == []


def test_a_short_budget_is_refused_with_one_that_suffices(call):
    words = ("sweep", "vae", "--data", "digits", "--set", "optim.lr=1e-3,3e-3,1e-2,3e-2", "--dry-run")
    code, _, stderr = call(*words, "--budget", "8s")
    assert code == 2 and "hint: use `--budget 24s` or more" in stderr
    assert call(*words, "--budget", "24s")[0] == 0
