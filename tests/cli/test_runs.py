"""Which run a model's name means, what is told of runs, which of them are pruned, and where jobs may
write."""

from __future__ import annotations

import json
import sys
import time

import pytest

from gzcli import __version__
from gzcli.cli import jobs
from gzcli.core.errors import MissingError
from gzcli.launch import launcher
from gzcli.store import files, runs
from gzcli.store.runs import Run, outdated, short_name


def made(steps: int = 700, *, of: int | None = 700, size: int = 16, best: float | None = None, **more) -> Run:
    """A finished run on the digits as the trainer leaves it."""
    run = runs.create("vae", more.pop("data", "digits"), alias=more.pop("alias", None))
    runs.note_recipe(run, {"": of}, 16, size=size, levels=17)
    run.update(state="finished", step=steps, steps=steps, started=1000.0, ended=1090.0, **more)
    run.recipe_file.write_text("model: {name: vae}\n")
    run.model_file.write_bytes(b"x" * 1000)
    if best is not None:
        files.write_json(run.best_file, {"step": steps, "metric": "bpd", "value": best})
    return run


# --- which run ---


def test_a_toy_does_not_stand_in_for_the_whole_run(home):
    toy = made(20, seconds=100.0)
    last = made(10)
    assert runs.find("vae") == last and last.shortfalls == ["10 of 700 steps"]  # where all are toys
    assert toy.seconds == 190.0  # of all its starts
    toy.update(state="running", ended=None)
    assert toy.seconds == 100.0  # killed: nobody knows
    assert made(size=32).shortfalls == ["images of 32 pixels in place of 16"]
    whole = made()
    made(10)
    made(size=32)
    assert runs.find("vae", data="digits") == whole
    longer = made(900)  # more than the recipe's
    assert runs.find("vae") == longer
    unnoted = made(of=None)  # the recipe gives a time, or the run is of before it was noted
    assert runs.find("vae") == unnoted and unnoted.shortfalls == []


def test_stages_are_judged_each(home):
    run = runs.create("vqgan", "digits")
    stages = {name: {"model": {"name": name}} for name in ("tokenizer", "prior")}
    run.recipe_file.write_text(json.dumps({"stages": stages}))
    for name, step in (("tokenizer", 500), ("prior", 8)):
        run.stage(name).path.mkdir(parents=True)
        run.stage(name).update(state="finished", step=step)
    runs.note_recipe(run, {"tokenizer": 500, "prior": 800}, 16, size=16)
    run.update(state="finished")
    assert run.shortfalls == ["8 of 800 steps of `prior`"]


def test_it_is_said_which_run_was_taken_and_why(home, capsys):
    whole = made()
    toy = made(10)
    jobs.announce(runs.find("vae"), "vae", data="digits")
    passed = f"note: passed over `{toy.id}`, which is newer: 10 of 700 steps"
    assert capsys.readouterr().err == f"run: {whole.id}\n{passed}\n"
    jobs.announce(runs.find(toy.id), toy.id)
    assert capsys.readouterr().err == f"run: {toy.id}\n"
    runs.remove(whole)
    jobs.announce(runs.find("vae"), "vae", data="digits")
    told = "note: no finished run of `vae` on `digits` is whole, the newest is taken: 10 of 700 steps"
    assert capsys.readouterr().err == f"run: {toy.id}\n{told}\n"


def test_a_start_notes_what_the_recipe_calls_done(call, monkeypatch, tmp_path):
    """A recipe of the user's says itself what is done."""

    def train(*words: str, step: int = 10) -> Run:
        done = {"state": "finished", "step": step}
        monkeypatch.setattr(launcher, "run", lambda folder, *args, **options: Run(folder).update(**done))
        before = len(runs.all_runs())
        assert call("train", *words)[0] == 0 and len(runs.all_runs()) == before + 1
        return runs.all_runs()[0]

    for words in ("steps 10", "minutes 1", "set train.steps=10", "set data.size=8"):
        run = train("vae", *f"--{words}".split())
        noted = {"steps": 700, "size": 16, "shipped_loss": "data.size" not in words}
        assert run.status()["recipe"] == noted and "10 of 700 steps" in run.shortfalls
        assert train(run.id).status()["recipe"] == noted, "a repeat of a cut run is cut too"
    for i, (text, steps) in enumerate((("steps: 30", 30), ("minutes: 2", None))):
        (tmp_path / f"{i}.yaml").write_text(f"extends: vae\ntrain: {{{text}}}\n")
        run = train(str(tmp_path / f"{i}.yaml"), step=30)
        assert run.status()["recipe"] == {"steps": steps, "size": 16, "shipped_loss": True}
        assert run.shortfalls == []


def test_an_unfinished_run_is_sampled_from_its_newest_checkpoint(home, capsys):
    run = made(alias="mine")
    run.update(state="running")
    with files.lock(run.lock):
        for step in (100, 200):
            files.write_atomic(run.checkpoint(step).averaged, "")
        assert runs.find("mine") == run
        assert run.weights == run.checkpoint(200).averaged
        jobs.announce(run, "mine")
        assert "note: it is running; its newest checkpoint is taken, of step 200\n" in capsys.readouterr().err
    run.update(state="finished")
    assert run.weights == run.model_file
    begun = runs.create("vae", "digits", alias="begun")
    with pytest.raises(MissingError, match="is planned and has no weights yet"):
        runs.find("begun")
    begun.update(state="running")
    with files.lock(begun.lock), pytest.raises(MissingError) as e:
        runs.find("begun")
    assert e.value.hint == "its first checkpoint is still to come"


def test_a_model_in_training_is_named_with_what_there_is_meanwhile(call, monkeypatch):
    run = runs.create("cvae", "glyphs")
    run.update(state="running")
    monkeypatch.setattr(Run, "is_held", True)
    name = runs.short_names([run])[run.id]
    code, _, stderr = call("sample", "cvae")
    assert code == 3 and f"no finished run of `cvae`; `{name}` is being trained" in stderr
    assert "hint: it has no checkpoint yet; `--pretrained` takes the model that comes with gz" in stderr
    files.write_atomic(run.checkpoint(10).averaged, "x")
    assert f"name it, `{name}`, for its newest checkpoint; `--pretrained`" in call("sample", "cvae")[2]
    monkeypatch.setattr(Run, "is_held", False)
    run.update(state="interrupted")
    assert f"`{name}` is interrupted" in call("sample", "cvae")[2]


def test_what_is_built_on_a_run_takes_no_weights_that_change(home, monkeypatch):
    """A tokenizer, an autoencoder of latents: its checksum is that of `model.safetensors`."""
    from gzcli.engine import checkpoint as checkpoints
    from gzcli.engine.trained import load_trained

    def read(path):
        raise MissingError(str(path))

    monkeypatch.setattr(checkpoints, "read_weights", read)
    run = made()
    checkpoint = run.checkpoint(800).averaged  # it goes on beyond its 700 steps
    files.write_atomic(checkpoint, "")
    run.update(state="interrupted")
    for words, taken in (((), run.model_file), (("last",), checkpoint)):
        with pytest.raises(MissingError) as e:
            load_trained(run, "cpu", *words)
        assert e.value.message == str(taken)


def test_a_model_that_is_only_a_stage_is_told_as_one(call):
    recipes = {"maskgit": "vqgan", "transformer": "vqgan", "latent_prior": "diffae", "latent-prior": "diffae"}
    for name, recipe in recipes.items():
        code, _, stderr = call("train", name)
        told = f"`{name}` is no model of its own: it is trained as the stage `prior` of `{recipe}`"
        assert code == 2 and told in stderr
        hint = stderr.partition("hint: ")[2].split()
        assert call(*hint[1:], "--dry-run")[0] == 0
        code, _, stderr = call("sample", name)
        assert code == 2 and f"`{name}` is no model of its own" in stderr and f"gz sample {recipe}" in stderr


# --- what is told of them ---


def test_lists_show_what_a_run_is_worth(call, monkeypatch):
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    run = made(10, best=1.23456, created=1769866501.0)
    line = call("runs", "list")[1].splitlines()[1].split()
    figures = ["finished", "10", "bpd", "1.235", "-", "1m30s", "1", "kB", "-"]
    assert line == [run.id, "-", *figures, "2026-01-31", "14:35"]  # for scripts: nothing is shortened
    monkeypatch.setenv("COLUMNS", "60")
    short = short_name(run.id)
    assert call("runs", "list")[1].splitlines()[1].split() == [short, *figures[:4], *figures[5:8]]
    assert runs.by_name(short) == run
    row = json.loads(call("runs", "list", "--json")[1])["runs"][0]
    assert row["best"] == {"metric": "bpd", "value": 1.23456, "step": 10} and row["seconds"] == 90.0
    assert row["created"] == "2026-01-31T14:35:01+01:00"
    assert row["bytes"] > 1000 and row["short"] == "10 of 700 steps"
    run.recipe_file.write_text("model: {name: vae}\nparams: null\n")
    shown = call("runs", "show", run.id)[1]
    assert shown.rstrip().endswith("name: vae")  # nothing is said of a size that no paper gives
    for text in ("best:    bpd 1.235", "time:    1m30s", "size:    1 kB", "short:   10 of 700", "+01:00"):
        assert text in shown
    monkeypatch.undo()
    time.tzset()


def test_a_list_of_what_there_is_not_is_refused(call):
    code, _, stderr = call("runs", "list", "--data", "mnits")
    assert code == 2 and "there is no data set `mnits`" in stderr and "did you mean `mnist`?" in stderr
    assert call("runs", "list", "--model", "vea")[0] == 2
    gone = made(data="gone")  # of a set that was removed since
    assert gone.id in call("runs", "list", "--data", "gone")[1]
    code, _, stderr = call("runs", "list", "--data", "mnist", "--model", "vae")
    assert code == 0 and "hint: `gz train vae --data mnist` makes one" in stderr


# --- which are pruned ---


def test_prune_keeps_the_whole_and_the_best(call):
    best, old, new, toy = made(best=1.0), made(best=2.0), made(best=3.0), made(10, best=9.0)
    code, stdout, stderr = call("runs", "prune", "--keep", "1", "--yes", "--json")
    assert json.loads(stdout)["removed"] == [old.id, toy.id] and code == 0
    assert {run.id for run in runs.all_runs()} == {best.id, new.id}
    _, _, stderr = call("runs", "prune", "--keep", "0", "--yes")
    assert not runs.all_runs()
    assert "bpd 1" in stderr and "1m30s" in stderr and "done: removed 2 runs (" in stderr
    assert "next:" not in stderr, "none is left to be listed"
    made(), made(alias="mine")
    assert "gz runs list" in call("runs", "remove", "mine", "--yes")[2]


def test_figures_of_other_images_are_not_compared(home):
    here, there = made(best=1.0), made(size=32, best=0.5)
    newest = made(best=2.0)
    assert outdated(1) == [] and outdated(0) == [newest, here, there]
    made(best=0.9)
    assert outdated(1) == [newest, here]


def test_data_sets_are_not_removed_unasked_either(call, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    mine = {"path": str(tmp_path), "size": None, "channels": None}
    files.write_json(runs.user_dir("data.json"), {"mine": mine})
    code, _, stderr = call("data", "remove", "mine")
    assert code == 2 and "needs `--yes` where nobody can be asked" in stderr
    assert call("data", "remove", "mine", "nope", "--yes")[0] == 2
    assert json.loads(call("data", "remove", "mine", "--yes", "--json")[1])["removed"] == ["mine"]


def test_the_version_for_scripts(call):
    for words in (("--version", "--json"), ("--json", "-V")):
        assert json.loads(call(*words)[1]) == {"schema": 1, "version": __version__}
    assert json.loads(call("--json", "runs", "list")[1]) == {"schema": 1, "runs": []}


# --- failed starts ---


def test_a_start_that_failed_leaves_no_run_and_no_name_taken(call, monkeypatch):
    def failed(error: BaseException) -> tuple[int, str]:
        def run(folder, *args, **options):
            raise error

        monkeypatch.setattr(launcher, "run", run)
        code, _, stderr = call("train", "vae", "--name", "mine")
        return code, stderr

    code, stderr = failed(MissingError("no such weights"))
    assert code == 3 and "nothing was trained: `vae-digits-" in stderr and not runs.all_runs()
    assert failed(RuntimeError("boom"))[0] == 1  # a fault of ours: its log is wanted
    (kept,) = runs.all_runs()
    assert (kept.state, kept.alias) == ("failed", None)
    assert call("train", "vae", "--resume")[0] == 3  # and nothing takes it
    assert call("sample", "vae")[0] == 3
    assert failed(KeyboardInterrupt())[0] == 130 and runs.all_runs() == [kept]


def test_a_run_that_was_trained_a_while_stays(call, monkeypatch):
    def run(folder, *args, **options):
        (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
        raise MissingError("the disk is gone")

    monkeypatch.setattr(launcher, "run", run)
    assert call("train", "vae", "--name", "mine")[0] == 3
    (kept,) = runs.all_runs()
    assert kept.alias == "mine" and kept.has_begun
