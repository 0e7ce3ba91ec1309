"""Streams that are closed, full or without a reader, and terminals that show little: a light verb says so in
a line, or goes on; nothing is a bug in gz."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from gzcli.cli import app, out
from gzcli.store import runs

ROOT = Path(__file__).resolve().parents[2]
VERBS = (
    *("--version", "--help", "--llm", "list models --json", "list data", "list recipes"),
    *("list pretrained", "runs list", "runs show RUN --json", "runs path RUN", "runs compare RUN RUN"),
    *("runs remove nothing --yes", "show vae", "recipe check vae", "data show digits"),
    *("sample vae --help", "train vae --dry-run", "doctor", "no-verb", "model"),
)
DEAR = ("list recipes", "recipe check vae", "train vae --dry-run")  # each for two ways only
DEARER = ("--llm", "data show digits", "doctor")
BUG = ("Traceback", "internal error", "this is a bug in gz")  # the manual has "a bug in gz" for exit code 1


NOWHERE = os.open(os.devnull, os.O_WRONLY)


class Failing(io.StringIO):
    """A stream whose every write fails."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number

    def fileno(self) -> int:
        return NOWHERE

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))  # 32 becomes a BrokenPipeError, as in Python


class Ascii(io.TextIOWrapper):
    def __init__(self):
        super().__init__(io.BytesIO(), encoding="ascii")

    def getvalue(self) -> str:
        return self.buffer.getvalue().decode()


# what stdout and stderr are → the exit codes beside a verb's own
WAYS: dict[str, tuple[Callable, Callable, set[int]]] = {
    "closed": (lambda: None, lambda: None, set()),
    "stdout full": (lambda: Failing(28), io.StringIO, {3}),
    "all full": (lambda: Failing(28), lambda: Failing(28), {3}),
    "stderr full": (io.StringIO, lambda: Failing(28), set()),
    "no reader": (lambda: Failing(32), lambda: Failing(32), {141}),
    "no terminal any more": (lambda: Failing(5), lambda: Failing(5), {3}),
    "ascii": (Ascii, Ascii, set()),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, in a store of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GZ_HOME", str(tmp_path_factory.mktemp("streams")))
        run = runs.create("vae", "digits")
        run.update(state="finished", step=3, steps=3)
        run.recipe_file.write_text("model: {name: vae}\ndata: {name: digits}\n")
        yield run


@pytest.fixture
def said(run, monkeypatch, tmp_path):
    """said(verb, stdout, stderr) → the exit code, and what reached the two streams."""
    monkeypatch.chdir(tmp_path)

    def said(verb: str, stdout: object, stderr: object) -> tuple[int, str]:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stdout)
            patch.setattr(sys, "stderr", stderr)
            try:
                code = app.run(verb.replace("RUN", run.id).split())
            finally:
                out.configure(json=False, quiet=False, lenient=False)
        return code, "".join(stream.getvalue() for stream in (stdout, stderr) if stream)

    return said


@pytest.mark.parametrize(
    "verb", [pytest.param(v, marks=pytest.mark.slow) if v in DEARER else v for v in VERBS]
)
def test_light_verbs_meet_any_stream(verb, said, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("TERM", "dumb")
    status, text = said(verb, io.StringIO(), io.StringIO())
    assert status in (0, 2, 3) and "internal error" not in text and "\033" not in text
    for name in ("all full", "no reader") if verb in DEAR else WAYS:
        stdout, stderr, codes = WAYS[name]
        code, text = said(verb, stdout(), stderr())
        assert code in {status} | codes, (name, code)
        words = " ".join(text.split())
        assert not any(bug in words for bug in BUG), (name, text)
        if code == 3 != status and name == "stdout full":
            assert "error: no space left on device hint:" in words, text


def test_a_zero_byte_in_a_name_is_told(run, capsys):
    verbs = ("report", "bench", "sample", "train", "show", "runs show", "runs export", "data show")
    for verb in (*verbs, "model new"):
        for word in ("a\0b", "~\0", "a\0/b"):
            assert app.run([*verb.split(), word]) == 2
            assert "contains a null byte" in capsys.readouterr().err, verb
    assert runs.by_name("a\0b") is runs.by_name("~\0") is None


def test_completion_says_nothing_where_it_cannot_answer(said, monkeypatch):
    variable = "_GZCLI_COMPLETE" if Path(sys.argv[0]).name == "gzcli" else "_GZ_COMPLETE"
    monkeypatch.setenv("COMP_WORDS", "gz runs show ")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", "gz runs show ")
    for shell, cursor in product(("bash", "zsh", "fish"), ("3", "-1", "x", "99")):
        monkeypatch.setenv(variable, f"complete_{shell}")
        monkeypatch.setenv("COMP_CWORD", cursor)
        for stdout, stderr, _ in WAYS.values():
            assert said("", stdout(), stderr())[0] == 0, (shell, cursor)
        assert "error" not in said("", io.StringIO(), io.StringIO())[1]


REDIRECTED = {
    "--help >/dev/full": (3, "error: no space left on device"),
    "list models >&- 2>&-": (0, ""),
    "runs list --help | true": (141, ""),
}


def test_as_a_shell_redirects(tmp_path):
    """What Python itself does with its streams at its end, too."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for line, (code, message) in REDIRECTED.items():
        words = ["bash", "-c", f'"$0" -m gzcli {line}; exit ${{PIPESTATUS[0]}}', sys.executable]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=env, cwd=tmp_path)
        text = done.stdout + done.stderr
        assert done.returncode == code and message in text and len(text.splitlines()) <= 3, (line, text)
