"""Start-up: what must not be imported, and budgets of CPU time, which other processes do not change."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "numpy", "accelerate", "diffusers", "PIL", "matplotlib", "sklearn", "scipy"}
PROBE = """
import json, sys
from gzcli.__main__ import main
codes = [main(line.split()) for line in sys.argv[1:]]
print(json.dumps([codes, sorted(sys.modules)]), file=sys.stderr)
"""
COMPLETING = {"_GZ_COMPLETE": "complete_bash", "COMP_WORDS": "gz train v", "COMP_CWORD": "2"}
LIGHT = ("--help", "train --help", "list", "list models", "list data", "list recipes", "list runs")
LIGHT += ("recipe check vae", "show vae", "recipe show vae --resolved")


def modules(*lines: str, env: dict[str, str] | None = None) -> set[str]:
    """What a process has imported after these command lines."""
    words = [sys.executable, "-c", PROBE, *lines]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=os.environ | (env or {}))
    codes, names = json.loads(done.stderr.splitlines()[-1])
    assert not any(codes), done.stderr
    return set(names)


def test_nothing_heavy_is_imported():
    assert modules(*LIGHT) & HEAVY == set()
    assert modules("list models") & {"gzcli.docs.page", "gzcli.recipe.resolve", "jinja2"} == set()
    assert modules("train vae --dry-run") & {"torch", "accelerate", "diffusers"} == set()
    for few in (modules("--version"), modules("", env=COMPLETING)):
        assert few & (HEAVY | {"rich", "pydantic", "yaml"}) == set()


def cpu_ms(args: list[str], env: dict[str, str]) -> float:
    """User + system time of one run."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    child = subprocess.Popen([sys.executable, *args], env=os.environ | env, cwd=ROOT, **quiet)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0
    return (usage.ru_utime + usage.ru_stime) * 1e3


def within(yardstick: list[str], line: str, times: float, env: dict[str, str] | None = None) -> None:
    """Requires that `gz` takes at most `times` the CPU time of another command, by the least of some runs of
    each. They are few where that holds at once: a busy machine, whose caches others empty, makes any run
    dearer, and none cheaper."""
    least = took = math.inf
    for tries in range(1, 13):
        least = min(least, cpu_ms(yardstick, {}))
        took = min(took, cpu_ms(["-m", "gzcli", *line.split()], env or {}))
        if tries > 1 and took <= times * least:
            return
    raise AssertionError(f"{took:.0f} ms of CPU time, {times} × {least:.0f} allowed")


SMALLEST = """
import typer
app = typer.Typer()
@app.command("list")
def list_(json: bool = False): print("a")
@app.command()
def other(n: int = 1): print(n)
app()
"""


@pytest.mark.parametrize(
    ("times", "line", "env"),
    [
        (1.0, "--version", {}),
        (1.0, "", COMPLETING),
        (2.0, "--help", {}),
        (2.5, "list", {}),
        (2.0, "list data", {}),
        (3.0, "list models", {}),
        (2.9, "show cvae", {}),
    ],
    ids=["version", "completion", "help", "list", "list-data", "list-models", "show"],
)
def test_budget(times, line, env):
    """In multiples of what the smallest Typer application takes for its own help, or for a command that
    prints a letter: machines differ, and so do versions of Typer."""
    within(["-c", SMALLEST, "--help" if line == "--help" else "list"], line, times, env)
