"""Tables fit the terminal, runs stand side by side, and verbs end with what comes next."""

from __future__ import annotations

import json
import sys
from functools import partial
from itertools import product

from test_runs import made

from gzcli.cli import bench, jobs, out, train
from gzcli.cli.out import table_lines, wrapped
from gzcli.store import files, runs
from gzcli.store.metrics import curve_of
from gzcli.store.runs import short_name

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


def test_a_column_without_values_leaves_without_a_word():
    table = partial(table_lines, ("a", "none", "b"), [("x" * 10, None, "y" * 10)], ("none", "b"))
    assert table(room=25) == (["a           b", f"{'x' * 10}  {'y' * 10}"], [])
    assert "none" in table(room=80)[0][0]


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
    lists = ("list", "list models", "list data", "list recipes", "runs list", "data list --long")
    for columns, line in product((60, 80), (*lists, "train vae --dry-run --keys")):
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
    found = [made(best=best, alias=f"r{i}") for i, best in enumerate((1.25, 1.5, 1.75))]
    for run, rate in zip(found, (0.1, 0.2, 0.1), strict=True):
        (run.path / "run.yaml").write_text(f"model: {{name: vae, depth: 2}}\noptim: {{lr: {rate}}}\n")
        (run.path / "metrics.jsonl").write_text('{"step": 700, "val_bpd": 1.5}\n')
        run.update(params=12345)
    code, stdout, stderr = call("runs", "compare", "r0", "r1")
    cells = {line.split("  ")[0]: line.split()[-2:] for line in stdout.splitlines()}
    assert code == 0 and cells["optim.lr"] == ["0.1", "0.2"] and "model.depth" not in cells
    assert cells["params"] == ["12.3K", "12.3K"] and "bpd 1.25" in stdout and "last bpd" in stdout
    assert "recipes are the same" in call("runs", "compare", "r0", "r2")[2]
    told = json.loads(call("runs", "compare", "r0", "r1", "r2", "--json")[1])
    assert told["differ"] == {"optim.lr": [0.1, 0.2, 0.1]} and told["runs"][1]["figures"] == {"bpd": 1.5}
    code, _, stderr = call("runs", "compare", "r0", "r0")
    assert code == 2 and "needs two runs or more" in stderr


def test_the_end_of_a_verb(home, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    jobs.end(["12s", None, "3 MB"], [("gz sample vae", "pictures"), ("gz bench vae", "x" * 50)])
    assert capsys.readouterr().err == "done: 12s, 3 MB\nnext: gz sample vae  pictures\n      gz bench vae\n"
    monkeypatch.setenv("COLUMNS", "80")
    first, second = made(best=1.5, params=1000), made(best=1.25, params=1000, alias="mine")
    train.after_training(second)
    told = capsys.readouterr().err
    assert "done: best bpd 1.25 at step 700, 1m30s, 1.00K parameters, 1 kB" in told
    assert "gz sample mine" in told and f"gz runs compare mine {short_name(first.id)}" in told
    out.configure(quiet=True)
    train.after_training(second)
    out.configure(quiet=False, json=True)
    train.after_training(second)
    assert capsys.readouterr().err == ""


def test_the_end_of_bench_names_the_best(home, capsys, tmp_path):
    figures = {"a": {"fd": 3.0, "own": 1.0}, "b": {"fd": 2.0, "own": 1.0}}
    rows = [{"name": name, "run": None, "metrics": metrics} for name, metrics in figures.items()]
    bench.ended({"rows": rows, "floor": {}, "directions": {"fd": "down"}}, tmp_path, "5s")
    assert f"done: best by fd: b, 2, 5s\nnext: gz report {tmp_path}" in capsys.readouterr().err
