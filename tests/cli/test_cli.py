"""What a user reads and a script parses: help, lists, errors word for word, JSON, exit codes, colour."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from gzcli import __version__
from gzcli.__main__ import main
from gzcli.cli import app, out
from gzcli.core.errors import DivergedError, GzError, UsageError, canonical
from gzcli.store import runs
from gzcli.store.files import lock, write_json
from gzcli.store.paths import recipe_names, recipes_dir

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _as_gz(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gz"])
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def gz(capsys):
    """gz("list", "data") → (exit code, stdout, stderr)"""

    def call(*argv: str) -> tuple[int, str, str]:
        code = main(list(argv))
        seen = capsys.readouterr()
        return code, seen.out, seen.err

    return call


@pytest.fixture
def gz_json(gz):
    """gz_json("list") → (exit code, the one JSON object on stdout)"""

    def call(*argv: str) -> tuple[int, dict]:
        code, stdout, _ = gz(*argv, "--json")
        (line,) = stdout.splitlines()
        value = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
        assert next(iter(value.items())) == ("schema", 1)
        return code, value

    return call


HELP = "`gz {} --help` shows its arguments and options"
ERRORS = [
    ("tran", 2, "no such command `tran`", "did you mean `train`?"),
    ("fit vea", 2, "there is no model `vea`", "did you mean `vae`?"),
    ("train digits", 2, "there is no model `digits`", "`digits` is a data set: `gz train --data digits`"),
    ("list modles", 2, "no list is called `modles`", "did you mean `models`?"),
    ("list models --family vea", 2, "no family is called `vea`", "did you mean `vae`?"),
    ("list --can smple", 2, "no capability is called `smple`", "did you mean `sample`?"),
    ("list data --can ood", 2, "`--family` and `--can` filter models only", "gz list models"),
    ("list --famly vae", 2, "no such option `--famly`", "did you mean `--family`?"),
    ("list --need ood", 2, "no such option `--need`", "did you mean `--can`?"),
    ("train vae --budget 20s", 2, "no such option `--budget`", "did you mean `--minutes`?"),
    ("train vae --in mnist", 2, "no such option `--in`", "did you mean `--data`?"),
    ("sweep vae --steps 9", 2, "no such option `--steps`", "did you mean `--budget`?"),
    ("ood vae --data digits", 2, "no such option `--data`", "did you mean `--in`?"),
    ("bench vae --score nll", 2, "no such option `--score`", "did you mean `--metrics`?"),
    ("bench vae --out x", 2, "no such option `--out`", HELP.format("bench")),
    ("list --zzz", 2, "no such option `--zzz`", HELP.format("list")),
    (
        "train",
        2,
        "`gz train` needs a model or `--data`",
        "gz train cvae · gz train --data ./photos · gz list",
    ),
    ("train vae --steps many", 2, "invalid value for `--steps`: must be an integer", HELP.format("train")),
    ("runs resume tuned --yes", 2, "no such command `resume`", "gz train tuned --resume"),
    ("resume", 2, "no such command `resume`", "gz train RUN --resume"),
    ("data resume mnist", 2, "no such command `resume`", HELP.format("data")),
    ("runs rename tuned", 2, "no such command `rename`", HELP.format("runs")),
    ("runs prove", 2, "no such command `prove`", HELP.format("runs")),
    ("runs reomve tuned", 2, "no such command `reomve`", "did you mean `remove`?"),
    ("data lst", 2, "no such command `lst`", "did you mean `list`?"),
    ("data path mnits", 2, "there is no data set `mnits`", "did you mean `mnist`?"),
    ("data path mnist", 3, "`mnist` is not in the cache", "`gz data download mnist`"),
    ("data download mnist cifr10", 2, "there is no data set `cifr10`", "did you mean `cifar10`?"),
    ("runs remove nope", 2, "no run is called `nope`", "`gz runs list` shows them"),
    ("runs prune", 2, "`gz runs prune` needs `--keep K` or `--unfinished`", "gz runs prune --keep 1"),
    ("runs path vae", 3, "no finished run of `vae`", "gz train vae"),
    ("runs path zzz", 2, "no model or run is called `zzz`", "gz list models · gz runs list"),
    (
        "train var --set model.conditional=true",
        2,
        "`--set model.conditional=true`: unknown key `model`",
        "did you mean `stages.prior.model.conditional`?",
    ),
    ("recipe show veae", 2, "there is no model `veae`", "did you mean `vae`?"),
]
RUN = "give the folder of a run, its `model.safetensors`, or a name from `gz runs list`"
SIZES = "`data.size` must be 4 to 1024 pixels per side, not 2"
ERRORS += [("data download mnist --size 2", 2, SIZES, "use `--size 64`")]
ERRORS += [("data import a.png b.png", 2, "unexpected argument `b.png`", HELP.format("data import"))]
ERRORS += [("runs --wide path vae", 2, "`--wide` before `path` has no effect", "gz runs --wide")]
ERRORS += [("sample vae --input ./no.png", 3, "`--input`: `./no.png` does not exist", HELP.format("sample"))]
METHOD = "a method that requires no training accepts only `--set data.size=64`"
ERRORS += [("ood --in digits --input . --metrics fd", 2, "no such option `--metrics`", METHOD)]
ERRORS += [("ood pca --in digits --input . --socre nll", 2, "no such option `--socre`", METHOD)]
ERRORS += [("sample vae --temprature 1", 2, "no such option `--temprature`", "did you mean `--temperature`?")]
ERRORS += [("ood ddpm --input . --setps 9", 2, "no such option `--setps`", "did you mean `--steps`?")]
ERRORS += [
    (
        "ood ddpm --steps 9",
        2,
        "`gz ood` needs the images to judge: `--input`, `--out` or `--benchmark`",
        "gz ood ddpm --input ./today",
    )
]
ERRORS += [("sample a/b.pt", 3, "`a/b.pt` does not exist", RUN)]
ERRORS += [("sample ./README.md", 3, "`./README.md` is not a run or a weights file", RUN)]
STRAY = ("unexpected argument `stray`", "name one model; put arguments for `accelerate launch` after `--`")
ERRORS += [(line, 2, *STRAY) for line in ("train vae stray", "train vae stray -- --x")]
BUDGETED = ("sweep vae --set seed=1,2", "which --data digits", "bench --train-missing --data digits")
for budget, message in (
    ("0s", "must be more than 0"),
    (f"{10**400}s", "is not a time"),
    ("-3s", "is not a time"),
):
    hint = "a number with its unit, at least 3s: `--budget 8m`, `--budget 1.5h`"
    ERRORS += [(f"{line} --budget={budget}", 2, f"`--budget {budget}` {message}", hint) for line in BUDGETED]
ERRORS += [
    (
        "train vae --epochs inf",
        2,
        "invalid value for `--epochs`: must be 1000000000 or less",
        HELP.format("train"),
    )
]


def test_error_texts(gz, home):
    for line, code, message, hint in ERRORS:
        assert gz(*line.split()) == (code, "", f"error: {message}\n\nhint: {hint}\n"), line


def _raise(problem):
    def verb(*args, **kwargs):
        raise problem

    return verb


PROBLEMS = [
    (RuntimeError("boom\n  twice"), 1, "internal error: RuntimeError: boom twice"),
    (KeyboardInterrupt(), 130, "error: interrupted"),
    (typer.Abort(), 130, "error: interrupted"),
    (DivergedError("the loss is not finite"), 5, "error: the loss is not finite"),
    (OSError(errno.ENOSPC, "x", "/d/f"), 3, "error: `/d/f`: no space left on device"),
    (OSError(errno.EMFILE, "x", "/d/f"), 3, "error: `/d/f`: too many open files"),
    (PermissionError(errno.EACCES, "x", "/d/f"), 3, "error: `/d/f`: permission denied"),
    (FileExistsError(errno.EEXIST, "x", "/d/f"), 3, "error: `/d/f`: file exists"),
    (FileNotFoundError(errno.ENOENT, "x", "/d"), 1, "internal error: FileNotFoundError: [Errno 2] x: '/d'"),
]


def test_every_exception_has_a_code_and_one_line(gz, monkeypatch):
    for problem, code, first in PROBLEMS:
        monkeypatch.setattr("gzcli.cli.list.list_models", _raise(problem))
        monkeypatch.delenv("GZ_DEBUG", raising=False)
        got, stdout, stderr = gz("list")
        assert (got, stdout, stderr.splitlines()[0]) == (code, "", first)
        assert "Traceback" not in stderr, first
        if code == 1:
            hint = "hint: this is a bug in gz: set `GZ_DEBUG=1` for a traceback, and report it\n"
            assert stderr.endswith(hint)
        monkeypatch.setenv("GZ_DEBUG", "1")
        assert "Traceback" in gz("list")[2], first
    for ending, code in ((typer.Exit(7), 7), (SystemExit(141), 141)):
        monkeypatch.setattr("gzcli.cli.list.list_models", _raise(ending))
        assert gz("list")[0] == code, "exit codes of verbs pass through"


def test_ctrl_c_is_never_a_traceback(gz, monkeypatch):
    def pressed(*words: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "build", pressed)
    assert gz("list") == (130, "", "error: interrupted\n")
    monkeypatch.setattr(out, "error", pressed)  # once more, while the first is told
    assert gz("list")[0] == 130
    monkeypatch.setattr(app, "run", pressed)  # while the program loads
    assert gz("list")[0] == 130


def test_an_event_error_is_a_line_with_its_event(capsys):
    out.configure(json=True)
    problem = UsageError("no", hint="yes")
    problem.event = "error"
    out.error(problem)
    out.configure(json=False)
    error = {"code": 2, "kind": "usage", "message": "no", "hint": "yes"}
    assert json.loads(capsys.readouterr().out) == {"schema": 1, "event": "error", "error": error}


def test_a_closed_pipe_is_quiet():
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "gzcli", "list", "data"]
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_version_and_help(gz, monkeypatch):
    assert gz("--version") == (0, f"gz {__version__}\n", "")
    for words in (("--version", "--json"), ("--json", "-V")):
        assert json.loads(gz(*words)[1]) == {"schema": 1, "version": __version__}
    assert json.loads(gz("--json", "runs", "list")[1]).keys() == {"schema", "runs"}
    code, stdout, stderr = gz("--help")
    assert (code, stderr) == (0, "") and gz()[:2] == (0, stdout) == gz("-h")[:2]
    assert all(f"│ {verb} " in stdout for verb in app.VERBS) and "<bool>" not in stdout
    examples = [line.strip() for line in stdout.splitlines()[-6:] if line.strip()]
    assert examples == ["gz train vae", "gz ood ddpm --in mnist --out fashionmnist"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/gzcli"])  # it calls itself what the user called it
    assert "Usage: gzcli list" in gz("list", "--help")[1]
    assert "`gzcli list --help`" in gz("list", "--zzz")[2]


def _commands(command, path=()):
    for name, part in getattr(command, "commands", {}).items():
        yield from _commands(part, (*path, name))
    if not hasattr(command, "commands"):
        yield " ".join(path), command


def test_every_command_has_json_quiet_and_a_line_of_help():
    for name, command in _commands(app.build()):
        options = {option for param in command.params for option in param.opts}
        assert {"--json", "--quiet", "-q"} <= options, name
        first = command.help.splitlines()[0]
        assert 10 < len(first) <= 100 and first[0].isupper() and first.endswith("."), name
        helps = [param.help for param in command.params if param.help]
        assert all(text.endswith((".", "…")) for text in helps), name
        assert not any(re.search(r"\[[a-z#/@]", text) for text in helps), f"{name}: markup of rich, not shown"
    for verb, command in app.build().commands.items():
        assert command.help.splitlines()[0] == app.VERBS[verb][1], "its line in `gz --help`"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_colour_only_on_a_terminal_that_wants_it(monkeypatch):
    plain, coloured = "error: no\n\nhint: yes\n", "\033[31merror:\033[0m no\n\n\033[36mhint:\033[0m yes\n"
    wanted = {"NO_COLOR=1": plain, "CI=true": plain, "TERM=dumb": plain, "TERM=xterm": coloured}
    for variable, shown in wanted.items():
        for name in ("NO_COLOR", "CI", "TERM"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(*variable.split("="))
        monkeypatch.setattr(sys, "stderr", stream := Terminal())
        out.error(GzError("no", hint="yes"))
        out.error(UsageError("no", hint="yes"))
        assert stream.getvalue().endswith(shown) and ("\033" in stream.getvalue()) == (shown == coloured)


def test_table_aligns_text_left_and_numbers_right(capsys):
    out.configure(json=False, quiet=False)
    rows = [("nll", "0.9", 10000), ("recon (baseline)", "0.95", None), ("", "0.1234", 5)]
    out.table(("name", "auroc", "n"), rows)
    assert capsys.readouterr().out.splitlines() == [
        "name               auroc      n",
        "nll                  0.9  10000",
        "recon (baseline)    0.95      -",
        "-                 0.1234      5",
    ]


def test_json_has_no_nan_and_knows_numpy_torch_and_paths(capsys):
    import numpy as np
    import torch

    out.configure(json=True)
    values = {"a": float("nan"), "b": [np.float32(0.5), torch.tensor(3)]}
    out.data({**values, "c": Path("/x"), "d": {"e": float("inf")}})
    out.table(("a",), [("b",)])
    out.text("not JSON")
    out.configure(json=False)
    assert capsys.readouterr().out == '{"schema": 1, "a": null, "b": [0.5, 3], "c": "/x", "d": {"e": null}}\n'


def test_quiet_leaves_data_and_errors(gz, home):
    code, stdout, stderr = gz("list", "-q")
    assert code == 0 and "vae" in stdout and stderr == ""
    assert gz("list", "-q", "modles")[2].startswith("error: no list is called")
    assert "hint:" in gz("list")[2]  # the switch does not outlive its call


def test_help_of_a_verb_names_what_the_model_adds(gz, home, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    of_cfm = ("Options of cfm", "--sampler", "midpoint", "inpaint", "0 to 9", "10 classes of the training")
    for line, texts in {
        "sample cfm": of_cfm,
        "sample vqvae": ("Options of transformer", "--top-p", "--set model.conditional=true"),
        "ood vae": ("Scores of vae", "complexity  default", "--samples"),
        "train vae": ("model.latent", "'data.augment=[hflip]'"),
    }.items():
        code, stdout, stderr = gz(*line.split(), "--help")
        assert code == 0 and stderr == "" and max(map(len, stdout.splitlines())) <= 80
        assert all(text in stdout for text in texts), line
    plain = gz("sample", "--help")[1]
    assert gz("sample", "no-such-model", "--help")[1] == plain


def test_list_models(gz, gz_json):
    from gzcli.models.catalog import cards

    code, value = gz_json("list", "models")
    assert code == 0 and {canonical(row["name"]) for row in value["models"]} == set(cards())
    assert all(set(row) == {"name", "family", "about", "can", "paper", "recipe"} for row in value["models"])
    assert {row["recipe"] for row in value["models"]} >= set(recipe_names())
    assert gz_json("list")[1] == value
    likely = gz_json("list", "models", "--can", "log-prob")[1]["models"]
    assert likely == [row for row in value["models"] if "log_prob" in row["can"]]
    assert 0 < len(likely) < len(cards())
    vaes = [row["name"] for row in gz_json("list", "--family", "VAE")[1]["models"]]
    assert vaes == [name for name, card in sorted(cards().items()) if card.family == "vae"]
    shown = gz("list", "models", "--wide")[1]
    assert "\033" not in shown and "\t" not in shown
    assert all(row["about"] and f"{row['about']}  " in shown for row in value["models"])
    staged = {row["name"]: row["about"] for row in value["models"] if row["recipe"] is None}
    assert staged["transformer"] == "A stage of vqgan: Transformer over codes"
    for words in (("list",), ("list", "models")):  # a model is what `gz train` takes by its name
        _, shown, said = gz(*words)
        assert f"{len(recipe_names())} models, and 4 without a recipe\n" in said
    assert set(shown.split()) >= set(recipe_names()) and "maskgit" not in gz("list")[1]
    assert "1 model\n" in gz("list", "models", "--can", "translate", "--family", "gan")[2]


def test_what_takes_labels_is_marked(gz):
    code, stdout, stderr = gz("list", "models", "--can", "classify", "--wide")
    rows = {line.split()[0]: line for line in stdout.splitlines()}
    assert code == 0 and "classify°" in rows["fm"] and "classify°" not in rows["cfm"]
    assert "° marks capabilities that need a run trained with `--set model.conditional=true`" in stderr
    assert "°" not in "".join(gz("list", "models", "--can", "prompt")[1:]), "unlike analogies"


def test_a_group_alone_lists_what_there_is(gz, gz_json, home):
    groups = {"runs": "runs list", "data": "data list", "model": "list models", "recipe": "list recipes"}
    for verb, line in groups.items():
        (code, stdout, stderr), (_, listed, messages) = gz(verb), gz(*line.split())
        assert (code, stdout) == (0, listed), verb
        assert stderr == messages + f"hint: `gz {verb} --help` shows its commands\n"
        assert gz_json(verb) == gz_json(*line.split()) and gz(verb, "-q")[2] == "", verb


def test_list_data_is_data_list(gz, gz_json, home):
    assert gz("list", "data") == gz("data", "list")
    value = gz_json("list", "data")[1]
    assert value == gz_json("data", "list")[1]
    rows = {row["name"]: row for row in value["data"]}
    digits = {key: rows["digits"][key] for key in ("classes", "channels", "size", "cached")}
    assert digits == {"classes": 10, "channels": 1, "size": 16, "cached": True}
    assert rows["mnist"]["size"] == 28 and rows["mnist"]["cached"] is False
    long = gz("data", "list", "--long")[1]
    texts = ("Yang et al. 2023", "CC BY 4.0", "also 64, 128, 224", "image-net.org")
    assert all(text in long for text in texts)


def test_data_of_your_own(gz, gz_json, home, tmp_path):
    import numpy as np

    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (40, 8, 8), dtype=np.uint8), rng.integers(0, 2, (40, 1))
    file = tmp_path / "mine.npz"
    np.savez(file, train_images=images, train_labels=labels, test_images=images[:10], test_labels=labels[:10])
    code, value = gz_json("data", "import", str(file))  # named as the file
    assert code == 0 and value["name"] == "mine" and value["path"] == str(file)
    assert "mine" in {row["name"] for row in gz_json("list", "data")[1]["data"]}
    assert value["shape"] == [1, 8, 8] and value["counts"]["test"] == 10 and value["skipped"] == []
    code, pack, _ = gz("data", "path", "MINE")
    assert code == 0 and pack.startswith(str(home / "packs" / "mine"))
    removed = {"schema": 1, "removed": ["mine"]}
    assert gz_json("data", "remove", "mine", "--yes") == (0, removed) and file.exists()
    assert gz("data", "path", "mine")[0] == 2
    assert gz("data", "import", str(tmp_path / "nowhere"), "--name", "x")[0] == 3
    assert gz("data", "import", str(file), "--name", "mnist")[0] == 2


def test_recipes(gz, gz_json, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (recipes_dir() / "vae.yaml").read_text().rstrip() + "\n"
    shown = gz("recipe", "show", "vae")[1]
    assert shown.startswith(text), "the file, and below it each key with its text"
    lines = shown.removeprefix(text).strip().splitlines()
    assert all(line.startswith("#") and (len(line) <= 80 or "# about:" in line) for line in lines)
    assert any(line.startswith("#   batch_size: 64 ") and "# images per step" in line for line in lines)
    shown = gz_json("recipe", "show", "vae", "--data", "mnist", "--set", "train.steps=7")[1]
    assert shown["tree"]["train"]["steps"] == 7 and shown["origin"]["train.steps"] == "--set"
    assert shown["tree"]["data"]["name"] == "mnist"
    assert shown["docs"]["train.steps"] == "number of training steps."
    assert gz("recipe", "copy", "vae")[:2] == (0, "vae.yaml\n")
    assert (tmp_path / "vae.yaml").read_bytes() == (recipes_dir() / "vae.yaml").read_bytes()
    assert gz("recipe", "copy", "vae")[0] == 2 and gz("recipe", "copy", "vae", "--force")[0] == 0
    code, stdout, stderr = gz("recipe", "check", "./vae.yaml")
    assert (code, stdout) == (
        0,
        "1 recipe, no mistakes\n",
    ) and "next: gz train ./vae.yaml --dry-run" in stderr
    assert {row["name"] for row in gz_json("list", "recipes")[1]["recipes"]} == set(recipe_names())


@pytest.fixture
def trained(home):
    """Runs as the trainer leaves them, oldest first: {label: Run}"""
    by_label = {}
    states = dict.fromkeys(("old", "named", "new"), "finished") | {"broken": "failed", "busy": "running"}
    for i, (label, state) in enumerate(states.items()):
        run = runs.create("vae", "digits", alias="keep-me" if label == "named" else None)
        run.update(state=state, created=1000.0 + i, step=100 * i)
        (run.path / "run.yaml").write_text("model: {name: vae}\nseed: 3\n")
        (run.path / "model.safetensors").write_bytes(b"x" * 1000)
        by_label[label] = run
    return by_label


@pytest.fixture
def busy(trained):
    with lock(trained["busy"].lock):
        yield trained["busy"]


def test_runs_list_show_path(gz, gz_json, trained):
    rows = gz_json("runs", "list")[1]["runs"]
    assert [row["run"] for row in rows] == [run.id for run in reversed(trained.values())]
    assert rows[0]["state"] == "killed" and rows[3]["alias"] == "keep-me"
    assert gz_json("list", "runs")[1]["runs"] == rows
    assert gz_json("runs", "list", "--model", "glow")[1]["runs"] == []
    assert gz("runs", "path", "keep-me")[1] == f"{trained['named'].path}\n"
    assert gz("runs", "path", "vae")[1] == f"{trained['new'].path}\n"  # the newest finished one
    assert gz_json("runs", "show", trained["broken"].id)[1]["recipe"] == {"model": {"name": "vae"}, "seed": 3}
    assert "seed: 3" in gz("runs", "show", "keep-me")[1]


def test_runs_prune_keeps_the_newest_the_named_and_the_running(gz, gz_json, trained, busy):
    assert gz_json("runs", "prune", "--keep", "2", "--yes")[1]["removed"] == [trained["old"].id]
    assert gz_json("runs", "prune", "--unfinished", "--yes")[1]["removed"] == [trained["broken"].id]
    assert {run.id for run in runs.all_runs()} == {trained[label].id for label in ("named", "new", "busy")}
    assert gz("runs", "prune", "--keep", "0", "--yes")[0] == 0
    assert {run.id for run in runs.all_runs()} == {trained["named"].id, busy.id}


def test_runs_are_not_removed_unasked(gz, trained, busy, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))  # no terminal
    code, stdout, stderr = gz("runs", "remove", "keep-me")
    assert (code, stdout) == (2, "") and "`--yes`" in stderr and trained["named"].path.exists()
    assert gz("runs", "remove", "vae", "--yes")[0] == 2  # a model is not a run
    assert gz("runs", "remove", busy.id, "--yes")[0] == 2 and busy.path.exists()
    write_json(runs.user_dir("data.json"), {"mine": {"path": ".", "size": None, "channels": None}})
    assert "needs `--yes` if there is no terminal to ask on" in gz("data", "remove", "mine")[2]
    assert gz("data", "remove", "mine", "nope", "--yes")[0] == 2 == gz("data", "remove", "mine")[0]
    answers = Terminal("n\ny\n")
    monkeypatch.setattr(sys, "stdin", answers)
    assert gz("runs", "remove", "keep-me")[0] == 0 and trained["named"].path.exists()
    code, stdout, stderr = gz("runs", "remove", "keep-me")
    assert code == 0 and not trained["named"].path.exists() and "removed 1 run" in stderr


def test_doctor(gz, gz_json, home, monkeypatch, tmp_path):
    code, value = gz_json("doctor")
    checks = {check["name"]: check for check in value["checks"]}
    assert code == 0 and value["ok"] and {check["state"] for check in checks.values()} <= {"ok", "note"}
    names = "python torch accelerate cpu cache runs recipes GZ_HOME inception"
    assert set(names.split()) <= set(checks)
    assert str(home) in checks["cache"]["detail"]
    config = tmp_path / "hf" / "accelerate" / "default_config.yaml"
    config.parent.mkdir(parents=True)
    config.touch()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("GZ_MIRROR", tmp_path.as_uri())
    code, stdout, _ = gz("doctor")
    assert code == 0 and "gz ignores it" in stdout and "reachable" in stdout
    monkeypatch.setenv("GZ_MIRROR", str(tmp_path / "gone"))
    code, stdout, stderr = gz("doctor")
    assert code == 3 and f"there is no folder {tmp_path / 'gone'}" in stdout
    assert stderr.endswith("checks failed: `mirror`\n")
