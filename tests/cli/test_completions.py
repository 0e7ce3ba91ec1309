"""Shell completion: the scripts in the repository are those that gz generates, and answer in every shell."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gzcli.cli import app, completion, own
from gzcli.store import runs

pytestmark = pytest.mark.usefixtures("home")  # no runs of other tests among the words

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("shell", completion.FILES)
def test_the_files_are_the_generated_ones(shell):
    assert (ROOT / "completions" / completion.FILES[shell]).read_text() == completion.script(shell)


@pytest.fixture
def complete(monkeypatch, capsys):
    """complete("gz train v", shell) → the printed answer; the cursor stands at the end of the line."""

    def call(line: str, shell: str = "bash", **env: str) -> str:
        words = line.split(" ")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", line)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", [words[0]])
        monkeypatch.setenv(f"_{words[0].upper()}_COMPLETE", f"complete_{shell}")
        code = app.run([])
        printed = capsys.readouterr()
        assert printed.err == ""
        return printed.out if code == 0 else f"exit {code}"

    return call


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("gz train v", "vae vqgan vqvae"),
        ("gz train va", "vae"),
        ("gzcli train va", "vae"),
        ("gz l", "list"),
        ("gz data down", "download"),
        ("gz data download mnist fash", "fashionmnist"),
        ("gz train vae --data fash", "fashionmnist"),
        ("gz train vae --data = fash", "fashionmnist"),
        ("gz train --seed 3 va", "vae"),
        ("gz train vae --st", "--steps"),
        ("gz ood vae --in mnist --out digits,fash", "digits,fashionmnist"),
        ("gz ood vae --score nll,comp", "nll,complexity"),
        ("gz sample vae --do recon", "reconstruct"),
        ("gz sample vae --checkpoint b", "best"),
        ("gz list re", "recipes"),
        ("gz list --family v", "vae"),
        ("gz list models --can log-p", "log-prob"),
        ("gz recipe show gl", "glow"),
        ("gz runs pru", "prune"),
        ("gz runs comp", "compare"),
        ("gz train vae --track ten", "tensorboard"),
        ("gz sample fm --sampler mid", "midpoint"),
        ("gz sample fm --sampler=mid", "--sampler=midpoint"),
        ("gz sample fm --sampler = mid", "midpoint"),
        ("gz sample vae --temp", "--temperature"),
        ("gz sample fm --set sample.steps", "sample.steps=10"),
        ("gz sample vae --do interpolate --fra", "--frames"),
        ("gz sample cvae --label 1,", "1,0 1,2 1,3 1,4 1,5 1,6 1,7 1,8 1,9"),
        ("gz sample vqvae --top", "--top-k --top-p"),
        ("gz train vae --set model.lat", "model.latent=8"),
        ("gz train vae --set model.net = ", "mlp conv"),
        ("gz train vae --set model.conditional = t", "true"),
        ("gz train vae --set model.latent = 4 --step", "--steps"),
        ("gz ood vae --score nll,wa", "nll,waic"),
        ("gz ood vae --score al", "all"),
        ("gz ood fm --star", "--starts"),
        ("gz bench --metrics fd,mem", "fd,memory"),
        ("gz bench --metrics fd_d", "fd_dinov2"),
        ("gz bench --models al", "all"),
        ("gz bench --models fm,va", "fm,vae"),
        ("gz nonsense v", ""),
        ("gz train vae -- --mixed", ""),
        ("gz train 'v", ""),
    ],
)
def test_bash(complete, line, words):
    assert complete(line).split() == words.split()


def test_every_metric_is_offered():
    from gzcli.engine import bench

    assert set(own.METRICS) == set(bench.METRICS)


def test_run_names(complete, home):
    run = runs.create("vae", "digits", alias="my-best")
    assert complete("gz sample my").split() == ["my-best"]
    assert complete("gz runs show vae-digits-").split() == [run.id]
    assert complete("gz sample vae").split() == ["vae", run.id]
    (run.path / "status.json").write_text("{")  # a damaged run does not write into the line being typed
    assert complete("gz sample my") == ""


def test_zsh_and_fish(complete):
    assert complete("gz train va", "zsh") == "_arguments '*: :((\"vae\"))'\n"
    assert (
        complete("gz lis", "zsh")
        == '_arguments \'*: :(("list":"List models, data sets, recipes or runs."))\'\n'
    )
    assert complete("gz train ./v", "zsh") == "_files\n"
    assert complete("gz train vae --data=fash", "zsh") == "_arguments '*: :((\"--data=fashionmnist\"))'\n"
    assert complete("gz lis", "fish") == "list\tList models, data sets, recipes or runs.\n"
    assert complete("gz lis", "fish", _TYPER_COMPLETE_FISH_ACTION="is-args") == ""
    assert complete("gz train ./v", "fish", _TYPER_COMPLETE_FISH_ACTION="is-args") == "exit 1"


def test_the_protocol_by_hand():
    env = {**os.environ, "_GZ_COMPLETE": "complete_bash", "COMP_WORDS": "gz train va", "COMP_CWORD": "2"}
    done = subprocess.run([sys.executable, "-m", "gzcli"], capture_output=True, text=True, env=env, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "vae\n", "")
    source = env | {"_GZ_COMPLETE": "source_bash"}
    done = subprocess.run(
        [sys.executable, "-m", "gzcli"], capture_output=True, text=True, env=source, cwd=ROOT
    )
    assert done.stdout.strip() and done.stdout.strip() in completion.script("bash")


BASH = """source completions/gz.bash
COMP_WORDS=(gz train vae --data fash); COMP_CWORD=4; _gz_completion gz; echo "${COMPREPLY[@]}"
COMP_WORDS=(gzcli doc); COMP_CWORD=1; _gzcli_completion gzcli; echo "${COMPREPLY[@]}"
"""
FISH = """source completions/gz.fish
complete -C "gz train vae --data fash"
complete -C "gzcli doc" | string split -f1 \\t
"""
ZSH = """zmodload zsh/zpty
zpty shell zsh -f -i
zpty -w shell "PS1='> '; fpath=($PWD/completions \\$fpath)"
zpty -w shell "autoload -Uz compinit; compinit -u -D; print rea''dy"
zpty -r -m shell screen '*ready*'
for line in "gz train vae --data fash" "gzcli doc"; do
  zpty -w -n shell "$line"$'\\t'
  zpty -r -m shell screen '*(ionmnist|tor)*' && print -r -- $screen
  zpty -w -n shell $'\\x15'
done
"""


@pytest.mark.parametrize(("shell", "script"), [("bash", BASH), ("fish", FISH), ("zsh", ZSH)])
def test_in_the_shell_itself(shell, script, tmp_path):
    if not shutil.which(shell):
        pytest.skip(f"needs {shell}")
    for name in completion.PROGRAMS:
        program = tmp_path / name
        call = (
            f"import sys; sys.path.insert(0, {str(ROOT)!r}); from gzcli.__main__ import main; "
            "sys.exit(main())"
        )
        program.write_text(f"#!{sys.executable}\n{call}\n")
        program.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    done = subprocess.run(
        [shell, "-c", script], capture_output=True, text=True, env=env, cwd=ROOT, timeout=30
    )
    # A terminal may show the completed part alone: fash|ionmnist, doc|tor.
    assert "ionmnist" in done.stdout and "tor" in done.stdout, done.stdout + done.stderr
