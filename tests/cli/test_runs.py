"""Which run a model's name means, what is told of runs, which are pruned, how tables fit a terminal."""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest

from gzcli.cli import bench, jobs, out, sample, train
from gzcli.cli.out import table_lines, wrapped
from gzcli.core.errors import MissingError
from gzcli.core.sections import part_of
from gzcli.engine import sheets
from gzcli.launch import launcher
from gzcli.store import files, metrics, runs
from gzcli.store.metrics import curve_of
from gzcli.store.runs import Run, outdated, short_name

CUT = "10 steps instead of the recipe's 700"  # a run of 10 steps has all steps that were asked of it


def made(steps: int = 700, *, of: int | None = 700, size: int = 16, best: float | None = None, **more) -> Run:
    """A finished run on the digits as the trainer leaves it."""
    run = runs.create("vae", more.pop("data", "digits"), alias=more.pop("alias", None))
    runs.note_recipe(run, {"": of}, 16, False, size=size, levels=17)
    run.update(state="finished", step=steps, steps=steps, started=1000.0, ended=1090.0, **more)
    run.recipe_file.write_text("model: {name: vae}\n")
    run.model_file.write_bytes(b"x" * 1000)
    if best is not None:
        files.write_json(run.best_file, {"step": steps, "metric": "bpd", "value": best})
    return run


def test_a_toy_does_not_stand_in_for_the_whole_run(home):
    toy = made(20, seconds=100.0)
    last = made(10)
    assert runs.find("vae") == last and last.shortfalls == [CUT]  # where all are toys
    assert toy.seconds == 190.0  # of all its starts
    toy.update(state="running", ended=None)
    assert toy.seconds == 100.0  # killed: nobody knows
    assert made(size=32).shortfalls == ["images of 32 pixels instead of 16"]
    whole = made()
    made(10)
    made(size=32)
    assert runs.find("vae", data="digits") == whole
    longer = made(900)  # more than the recipe's
    assert runs.find("vae") == longer
    unnoted = made(of=None)  # the recipe gives a time, or the run is of before it was noted
    assert runs.find("vae") == unnoted and unnoted.shortfalls == []


def test_the_time_of_a_run_is_that_of_its_clock(home):
    """A run whose budget is CPU time shows CPU time, in tables, captions and the line at its end."""
    run = made(work=30.0)
    assert (run.clock, run.training_seconds) == ("wall", 90.0)
    assert metrics.in_words(metrics.summary(run))["time"] == "1m30s"
    files.write_atomic(run.recipe_file, "model: {name: vae}\ntrain: {clock: cpu}\n")
    assert run.clock == "cpu", "an older run, of which leagues are judged by that"
    run.update(clock="cpu")
    assert (run.clock, run.training_seconds) == ("cpu", 30.0)
    row = metrics.summary(run)
    assert (row["clock"], row["seconds"]) == ("cpu", 30.0)
    assert metrics.in_words(row)["time"] == "30s CPU time"
    part = SimpleNamespace(data=SimpleNamespace(name="digits"))
    trained = SimpleNamespace(title="vae", part=part, run=run, guidance=None)
    assert sheets.caption_of(trained, None, 0, {}, 20) == "vae · digits · step 20 · 30s of CPU time · seed 0"
    with files.lock(run.lock):  # while it trains, its own process counts on
        run.update(state="running", pid=os.getpid(), work_from=time.process_time() - 2.0)
        assert 32.0 <= run.training_seconds < 40.0
        run.update(pid=os.getpid() + 1)
        assert run.training_seconds == 30.0


def test_stages_are_judged_each(home):
    run = runs.create("vqgan", "digits")
    stages = {name: {"model": {"name": name}} for name in ("tokenizer", "prior")}
    run.recipe_file.write_text(json.dumps({"stages": stages}))
    for name, step in (("tokenizer", 500), ("prior", 8)):
        run.stage(name).path.mkdir(parents=True)
        run.stage(name).update(state="finished", step=step)
    runs.note_recipe(run, {"tokenizer": 500, "prior": 800}, 16, False, size=16)
    run.update(state="finished")
    assert run.shortfalls == ["8 steps of `prior` instead of the recipe's 800"]


def test_the_name_of_a_run_says_what_its_recipe_adds_to_the_method(call):
    plain, clustered, staged, taken = (
        runs.create(name, "digits") for name in ("fm", "fm", "vqvae", "reflow")
    )
    prior, teacher = {"name": "transformer", "clusters": 9}, {"model": {"name": "rf", "clusters": 5}}
    trees = {
        plain: {"model": {"name": "fm", "clusters": 0}},
        clustered: {"model": {"name": "fm", "clusters": 100}},
        staged: {"stages": {"tokenizer": {"model": {"name": "vqvae"}}, "prior": {"model": prior}}},
        taken: {"stages": {"teacher": "another-run", "student": {"model": {"name": "reflow"}}}},
    }
    taken.stage("teacher").path.mkdir(parents=True)
    taken.stage("teacher").recipe_file.write_text(json.dumps(teacher))
    for run, tree in trees.items():
        run.recipe_file.write_text(json.dumps(tree))
    named = {run.id: run.title for run in trees}
    assert list(named.values()) == ["fm", "fm +100 clusters", "vqvae +9 clusters", "reflow +5 clusters"]
    assert part_of({"model": {"name": "aae", "image_weight": 1.0}}).title == "aae +image discriminator"
    rows = json.loads(call("runs", "list", "--json")[1])["runs"]
    assert {row["run"]: row["name"] for row in rows} == named and {row["model"] for row in rows} >= {"fm"}
    assert "+100 clusters" in call("runs", "list")[1]
    assert "fm +100 clusters" in call("runs", "show", clustered.id)[1]
    plan = call("train", "fm", "--data", "glyphs", "--dry-run", "--set", "model.clusters=7")
    assert "fm +7 clusters" in plan[1] + plan[2]


def test_it_is_said_which_run_was_taken_and_why(home, capsys):
    whole = made()
    toy = made(10)
    jobs.announce(runs.find("vae"), "vae", data="digits")
    passed = f"note: skipped the newer run `{toy.id}`: {CUT}"
    assert capsys.readouterr().err == f"run: {whole.id}\n{passed}\n"
    jobs.announce(runs.find(toy.id), toy.id)
    assert capsys.readouterr().err == f"run: {toy.id}\n"
    runs.remove(whole)
    jobs.announce(runs.find("vae"), "vae", data="digits")
    note = f"note: the newest finished run of `vae` on `digits` has {CUT}"
    assert capsys.readouterr().err == f"run: {toy.id}\n{note}\n"


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
        assert run.status()["recipe"] == noted and CUT in run.shortfalls
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
        assert (
            "note: the run is unfinished (running); using its newest checkpoint, at step 200\n"
            in capsys.readouterr().err
        )
    run.update(state="finished")
    assert run.weights == run.model_file
    begun = runs.create("vae", "digits", alias="begun")
    with pytest.raises(MissingError, match=r"has no weights yet \(planned\)"):
        runs.find("begun")
    begun.update(state="running")
    with files.lock(begun.lock), pytest.raises(MissingError) as e:
        runs.find("begun")
    assert e.value.hint == "wait for its first checkpoint"


def test_a_model_in_training_is_named_with_what_there_is_meanwhile(call, monkeypatch):
    run = runs.create("cvae", "glyphs")
    run.update(state="running")
    monkeypatch.setattr(Run, "is_held", True)
    name = runs.short_names([run])[run.id]
    code, _, stderr = call("sample", "cvae")
    assert code == 3 and f"no finished run of `cvae`; `{name}` is being trained" in stderr
    assert "it has no checkpoint yet; `--pretrained` uses the pretrained model" in stderr
    files.write_atomic(run.checkpoint(10).averaged, "x")
    hint = f"hint: to use its newest checkpoint, pass `{name}`; `--pretrained` uses the pretrained model\n"
    assert call("sample", "cvae")[2].endswith(hint)
    assert call("ood", "cvae", "--input", ".")[2].endswith(hint)
    assert "--pretrained" not in call("runs", "path", "cvae")[2]
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
        message = f"`{name}` cannot be trained alone: it is the stage `prior` of `{recipe}`"
        assert code == 2 and message in stderr
        hint = stderr.partition("hint: ")[2].split()
        assert call(*hint[1:], "--dry-run")[0] == 0
        code, _, stderr = call("sample", name)
        assert (
            code == 2 and f"`{name}` has no runs: it is a stage" in stderr and f"gz sample {recipe}" in stderr
        )


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
    assert row["bytes"] > 1000 and row["short"] == CUT
    run.recipe_file.write_text("model: {name: vae}\nparams: null\n")
    shown = call("runs", "show", run.id)[1]
    assert shown.rstrip().endswith("name: vae")  # nothing is said of a size that no paper gives
    for text in (
        "best:    bpd 1.235",
        "time:    1m30s",
        "size:    1 kB",
        "short:   10 steps instead of",
        "+01:00",
    ):
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
    assert code == 0 and "hint: start one with `gz train vae --data mnist`" in stderr


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


def test_a_start_that_failed_leaves_no_run_and_no_name_taken(call, monkeypatch):
    def failed(error: BaseException) -> tuple[int, str]:
        def run(folder, *args, **options):
            raise error

        monkeypatch.setattr(launcher, "run", run)
        code, _, stderr = call("train", "vae", "--name", "mine")
        return code, stderr

    code, stderr = failed(MissingError("no such weights"))
    assert code == 3 and "nothing was trained: removing `vae-digits-" in stderr and not runs.all_runs()
    assert failed(RuntimeError("boom"))[0] == 1  # a fault of ours: its log is wanted
    (survivor,) = runs.all_runs()
    assert (survivor.state, survivor.alias) == ("failed", None)
    assert call("train", "vae", "--resume")[0] == 3  # and nothing takes it
    assert call("sample", "vae")[0] == 3
    assert failed(KeyboardInterrupt())[0] == 130 and runs.all_runs() == [survivor]

    def lost(folder, *args, **options):  # after a while of training
        (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
        raise MissingError("the disk is gone")

    monkeypatch.setattr(launcher, "run", lost)
    assert call("train", "vae", "--name", "mine")[0] == 3
    assert runs.all_runs()[0].alias == "mine" and runs.all_runs()[0].has_begun


WORDS = "a text of a few words that is longer than what a terminal has in a line"


def test_a_table_wraps_between_words_and_lets_columns_go():
    rows = [("one", WORDS, "extra words"), ("two", "short", None)]
    table = partial(table_lines, ("name", "text", "more"), rows, ("more",), ("text",))
    wide, left = table()
    assert len(wide) == 3 and WORDS in wide[1] and left == []
    lines, left = table(room=60)
    assert max(map(len, lines)) <= 60 and left == [] and len(lines) > 3
    lines, left = table(room=40)
    assert max(map(len, lines)) <= 40 and left == ["more"]
    assert " ".join(line[5:].strip() for line in lines[1:-1]) == WORDS  # whole words, in order
    lines, left = table(room=10)  # as narrow as its longest word, and no narrower
    assert max(map(len, lines)) == len("name  terminal")
    bare = partial(table_lines, ("a", "none", "b"), [("x" * 10, None, "y" * 10)], ("none", "b"))
    narrow = ["a           b", f"{'x' * 10}  {'y' * 10}"]  # without the column of no values
    assert bare(room=25) == (narrow, [])
    assert "none" in bare(room=80)[0][0]


def test_what_fits_is_asked_of_the_stream(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert out.room(sys.stdout) is None  # a pipe: nothing is left out, nothing broken
    out.info(WORDS)
    assert capsys.readouterr().err == f"{WORDS}\n"
    monkeypatch.setenv("COLUMNS", "40")
    assert out.room(sys.stdout) == 40
    path = "/" + "a" * 60
    out.info(WORDS)
    out.info(f"files: {path}")
    assert capsys.readouterr().err.splitlines() == [*wrapped(WORDS, width=40), f"files: {path}"]


def test_every_list_fits(call, monkeypatch):
    made(best=1.0)
    lists = ("list", "list models", "list data", "list recipes", "list pretrained", "runs list")
    for columns, line in product((60, 80), (*lists, "data list --long", "train vae --dry-run --keys")):
        monkeypatch.setenv("COLUMNS", str(columns))
        code, stdout, _ = call(*line.split())
        long = [text for text in stdout.splitlines() if len(text) > columns]
        assert code == 0 and all("/" in text for text in long), "a path or an address is never broken"


def test_runs_have_curves_and_short_names(home):
    run = made()
    assert curve_of(run) is None
    values = [2.0**-i for i in range(40)]
    text = "".join(json.dumps({"step": i, "loss": v}) + "\n" for i, v in enumerate(values))
    (run.path / "metrics.jsonl").write_text(text + '{"step": 40, "lo')
    curve = curve_of(run)
    assert (curve.name, len(curve.values), curve.steps[-1]) == ("loss", 12, 39)
    assert curve.spark[0] == "█" and curve.spark[-1] == "▁" and list(curve.spark) == sorted(curve.spark)[::-1]
    short = short_name(run.id)
    assert runs.short_names([run]) == {run.id: short} and runs.by_name(short) == run
    twin = runs.user_dir("runs") / run.id.replace("-2", "-1", 1)  # the same four digits at another time
    run.path.rename(twin)
    files.write_json(run.path / "status.json", {"model": "vae"})
    assert runs.by_name(short) is None
    assert set(runs.short_names(runs.all_runs()).values()) == {run.id, twin.name}


def test_compare_shows_what_differs(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    trio = [made(best=best, alias=f"r{i}") for i, best in enumerate((1.25, 1.5, 1.75))]
    for run, rate in zip(trio, (0.1, 0.2, 0.1), strict=True):
        (run.path / "run.yaml").write_text(f"model: {{name: vae, depth: 2}}\noptim: {{lr: {rate}}}\n")
        (run.path / "metrics.jsonl").write_text('{"step": 700, "val_bpd": 1.5}\n')
        run.update(params=12345)
    code, stdout, stderr = call("runs", "compare", "r0", "r1")
    cells = {line.split("  ")[0]: line.split()[-2:] for line in stdout.splitlines()}
    assert code == 0 and cells["optim.lr"] == ["0.1", "0.2"] and "model.depth" not in cells
    assert cells["params"] == ["12.3K", "12.3K"] and "bpd 1.25" in stdout and "last bpd" in stdout
    assert "recipes are identical" in call("runs", "compare", "r0", "r2")[2]
    result = json.loads(call("runs", "compare", "r0", "r1", "r2", "--json")[1])
    assert result["differ"] == {"optim.lr": [0.1, 0.2, 0.1]} and result["runs"][1]["figures"] == {"bpd": 1.5}
    code, _, stderr = call("runs", "compare", "r0", "r0")
    assert code == 2 and "needs at least two runs" in stderr


def test_the_end_of_a_verb(home, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "60")
    jobs.end(["12s", None, "3 MB"], [("gz sample vae", "pictures"), ("gz bench vae", "x" * 50)])
    assert capsys.readouterr().err == "done: 12s, 3 MB\nnext: gz sample vae  pictures\n      gz bench vae\n"
    able = ["inpaint", "upscale", "reconstruct", "interpolate", "translate", "edit", "classify"]
    sample.ending("fm-photos-1234", able, "edit", {"n": 4, "seconds": 2.0})
    messages = capsys.readouterr().err
    tasks = "inpaint, upscale, reconstruct, interpolate, translate, classify"
    assert f"applications (`--do`): {tasks}" in " ".join(messages.split()), "all, on however many lines"
    assert "next: gz sample fm-photos-1234 --do inpaint\n" in messages
    assert max(map(len, messages.splitlines())) <= 60
    monkeypatch.setenv("COLUMNS", "80")
    first, second = made(best=1.5, params=1000), made(best=1.25, params=1000, alias="mine")
    train.after_training(second)
    messages = capsys.readouterr().err
    assert "done: best bpd 1.25 at step 700, 1m30s, 1.00K parameters, 1 kB" in messages
    assert "gz sample mine" in messages and f"gz runs compare mine {short_name(first.id)}" in messages
    out.configure(quiet=True)
    train.after_training(second)
    out.configure(quiet=False, json=True)
    train.after_training(second)
    assert capsys.readouterr().err == ""
    out.configure(quiet=False, json=False)
    figures = {"a": {"fd": 3.0, "own": 1.0}, "b": {"fd": 2.0, "own": 1.0}}
    rows = [{"name": name, "run": None, "metrics": metrics} for name, metrics in figures.items()]
    result = {"rows": rows, "metric": "fd", "places": {"a": "2", "b": "1"}, "provenance": {}}
    bench.ended(result, tmp_path, "5s")
    assert f"done: best by fd: b, 5s\nnext: gz report {tmp_path}" in capsys.readouterr().err
    bench.ended(result | {"report": {}}, tmp_path, "5s")
    assert "gz report" not in capsys.readouterr().err, "`--report` has made the page"
