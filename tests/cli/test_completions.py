"""Shell completion: the scripts in the repository are those that gz generates, and answer in every shell."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gzcli.cli import app, completion, options
from gzcli.store import runs

pytestmark = pytest.mark.usefixtures("home")  # no runs of other tests among the words

ROOT = Path(__file__).resolve().parents[2]


def test_the_files_are_the_generated_ones():
    for shell, name in options.SHELLS.items():
        assert (ROOT / "completions" / name).read_text() == completion.script(shell)


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


WORDS = [
    ("gz train v", "vae var vdvae vqgan vqvae"),
    ("gzcli train va", "vae var"),
    ("gz li", "list"),
    ("gz data down", "download"),
    ("gz train vae --data fash", "fashionmnist"),
    ("gz train vae --data = fash", "fashionmnist"),
    ("gz train --seed 3 va", "vae var"),
    ("gz train vae --st", "--steps"),
    ("gz ood vae --in mnist --out digits,fash", "digits,fashionmnist"),
    ("gz ood vae --score nll,comp", "nll,complexity"),
    ("gz sample vae --do recon", "reconstruct"),
    ("gz sample vae --checkpoint b", "best"),
    ("gz list --family v", "vae"),
    ("gz list models --can log-p", "log-prob"),
    ("gz runs comp", "compare"),
    ("gz sample fm --sampler mid", "midpoint"),
    ("gz sample fm --sampler=mid", "--sampler=midpoint"),
    ("gz sample fm --sampler = mid", "midpoint"),
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
    ("gz league --models al", "all"),
    ("gz league --models fm,va", "fm,vae fm,var"),
    ("gz nonsense v", ""),
    ("gz train vae -- --mixed", ""),
    ("gz train 'v", ""),
]


def test_bash(complete):
    for line, words in WORDS:
        assert complete(line).split() == words.split(), line


def test_run_names(complete, home):
    run = runs.create("vae", "digits", alias="my-best")
    assert complete("gz sample my").split() == ["my-best"]
    assert complete("gz runs show vae-digits-").split() == [run.id]
    assert complete("gz sample vae").split() == ["vae", run.id]
    (run.path / "status.json").write_text("{")  # a damaged run does not write into the line being typed
    assert complete("gz sample my") == ""


def of_zsh(answer: str) -> list[str]:
    """The values in an answer for zsh, each with its help, if the answer holds nothing else."""
    word = r"\$'(?:[^\W_]|\\x[0-7][0-9a-f])*'"
    array = re.fullmatch(rf"local -a lines; lines=\(({word}(?: {word})*)\); _describe '' lines\n", answer)
    assert array, answer
    return [re.sub(r"\\x(..)", lambda c: chr(int(c[1], 16)), word[2:-1]) for word in array[1].split(" ")]


def test_zsh_and_fish(complete):
    assert of_zsh(complete("gz train va", "zsh")) == ["vae", "var"]
    assert of_zsh(complete("gz lis", "zsh")) == ["list:List models, data sets, recipes or runs."]
    assert complete("gz train ./v", "zsh") == "_files\n"
    assert of_zsh(complete("gz train vae --data=fash", "zsh")) == ["--data=fashionmnist"]
    assert complete("gz lis", "fish") == "list\tList models, data sets, recipes or runs.\n"
    assert complete("gz lis", "fish", _TYPER_COMPLETE_FISH_ACTION="is-args") == ""
    assert complete("gz train ./v", "fish", _TYPER_COMPLETE_FISH_ACTION="is-args") == "exit 1"


def test_the_protocol_by_hand():
    def answer(**env: str) -> str:
        words = [sys.executable, "-m", "gzcli"]
        done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **env}, cwd=ROOT)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    assert answer(_GZ_COMPLETE="complete_bash", COMP_WORDS="gz train va", COMP_CWORD="2") == "vae\nvar\n"
    source = answer(_GZ_COMPLETE="source_bash").strip()
    assert source and source in completion.script("bash")


@pytest.fixture
def shell_env(tmp_path):
    """What a shell needs to find this gz. Where it is called to run a command and not to complete one, it
    writes its words to the file `called`, one a line."""
    noted = f"open({str(tmp_path / 'called')!r}, 'a').write('\\n'.join([*sys.argv[1:], '']))"
    for name in completion.PROGRAMS:
        program = tmp_path / name
        program.write_text(
            f"#!{sys.executable}\nimport os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
            f"if '_{name.upper()}_COMPLETE' not in os.environ:\n"
            f"    sys.exit({noted} * 0)\n"
            "from gzcli.__main__ import main; sys.exit(main())\n"
        )
        program.chmod(0o755)
    return os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}


def in_shell(shell: str, script: str, env: dict[str, str]) -> str:
    """What a script prints in a shell; skips the test where there is no such shell."""
    if not shutil.which(shell):
        pytest.skip(f"needs {shell}")
    words = [shell, "-c", script]
    done = subprocess.run(words, capture_output=True, text=True, env=env, cwd=ROOT, timeout=60)
    return done.stdout + done.stderr


HOSTILE = [
    "zz1$(touch PWNED)",
    "zz2`touch PWNED`",
    'zz3";touch PWNED;"',
    "zz4';touch PWNED;'",
    "zz5)); touch PWNED; ((",
    "zz6\\\\$(touch PWNED)\\\\",
    "zz7  two:${(e):-$(touch PWNED)} !! * ~ %n é|&",
]
UNSHOWN = ["yy1\x1b]0;title\x07", "yy2\nline", "yy3\tb", "yy4\u202eb", "yy5\udc80"]
HOSTILE_SHELLS = {
    # the other name of gz is completed; what TAB makes of a line is entered, as a user would
    "bash": """source completions/gz.bash; cd "$HOME"
COMP_WORDS=(gzcli doc); COMP_CWORD=1; _gzcli_completion gzcli; echo "${COMPREPLY[@]}"
COMP_WORDS=(gz sample zz); COMP_CWORD=2; _gz_completion gz
for word in "${COMPREPLY[@]}"; do eval "gz sample $word"; done
COMP_WORDS=(gz sample yy); _gz_completion gz; echo "left out: ${#COMPREPLY[@]}"
""",
    "fish": """source completions/gz.fish; cd $HOME
complete -C "gzcli doc" | string split -f1 \\t
for word in (complete -C "gz sample zz" | string split -f1 \\t | string escape)
  eval gz sample $word
end
echo "left out:" (count (complete -C "gz sample yy"))
""",
    "zsh": """zmodload zsh/zpty
zpty shell zsh -f -i
zpty -w shell "PS1='> '; fpath=($PWD/completions \\$fpath); cd $HOME"
zpty -w shell "autoload -Uz compinit; compinit -u -D; print rea''dy"
zpty -r -m shell screen '*ready*'
zpty -w -n shell "gzcli doc"$'\\t'
zpty -r -m shell screen '*tor*' && print -r -- $screen
zpty -w -n shell $'\\x15'
zpty -w -n shell $'gz sample zz\\t\\t\\x15'
for n in 1 6 7; do
  zpty -w -n shell "gz sample zz$n"$'\\t\\n'
  zpty -w shell "print do''ne-$n"
  zpty -r -m shell screen "*done-$n*"
done
zpty -w -n shell $'gz sample yy\\t\\n'
zpty -w shell "print do''ne-all"
zpty -r -m shell screen "*done-all*"
[[ "$(tail -n 1 $HOME/called)" == yy ]] && print "left out: 0"
""",
}


@pytest.mark.parametrize(
    "shell", ["bash", *(pytest.param(shell, marks=pytest.mark.slow) for shell in ("fish", "zsh"))]
)
def test_a_stranger_s_names_are_words_and_no_commands(shell, shell_env, tmp_path, home):
    for name in HOSTILE + UNSHOWN:
        runs.create("vae", "digits").update(alias=name)
    printed = in_shell(shell, HOSTILE_SHELLS[shell], shell_env)
    lines = (tmp_path / "called").read_text().splitlines()
    entered = [HOSTILE[0], *HOSTILE[5:], "yy"] if shell == "zsh" else HOSTILE
    assert lines[::2] == ["sample"] * len(entered) and sorted(lines[1::2]) == sorted(entered), printed
    assert "left out: 0" in printed and "tor" in printed  # a terminal may show the completed part alone
    assert not list(tmp_path.rglob("PWNED")) and not (ROOT / "PWNED").exists()


def test_what_was_typed_and_helps_are_answered_as_words(complete, monkeypatch):
    def candidates(command, words, incomplete):
        return [(f"{incomplete}!", "one\n$(two)\x1b[8m")]

    monkeypatch.setattr(completion, "candidates", candidates)
    line = "gz train vae --set \\$\\(touch\\)"
    bash, zsh, fish = (complete(line, shell) for shell in ("bash", "zsh", "fish"))
    assert bash == "\\$\\(touch\\)\\!\n" and fish == "$(touch)!\tone $(two) [8m\n"
    assert of_zsh(zsh) == ["$(touch)!:one $(two) [8m"]
