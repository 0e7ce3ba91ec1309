"""What surrounds a training: variables of launchers and schedulers, and the processes of an earlier start."""

from __future__ import annotations

import json

import pytest

from gzcli import launch, planning, variables
from gzcli.cli import out
from gzcli.errors import UsageError
from gzcli.launch import Plan
from gzcli.run_folder import write_run
from gzcli.sections import LaunchSection
from gzcli.store import runs


@pytest.mark.parametrize(
    ("text", "found"), [("3", 3), ("2,1", 2), (" 4 ", 4), ("", None), ("0", None), ("x", None), ("²", None)]
)
def test_threads_are_the_first_number_of_a_list(monkeypatch, text, found):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert variables.threads() == found
    assert launch.plan(LaunchSection(cpu=True, threads=None), every_gpu=True).threads >= 1


@pytest.mark.parametrize("variable", ["SLURM_NNODES", "SLURM_STEP_NUM_NODES", "GZ_MAX_ARCHIVE"])
def test_a_variable_that_is_no_number_is_told(monkeypatch, variable):
    monkeypatch.setenv(variable, "many")
    with pytest.raises(UsageError, match=f"`{variable}` is a number of .*, not `many`"):
        variables.number(variable, "nodes")


def test_ranks_of_an_outer_launcher_are_not_the_engines(monkeypatch):
    for variable in ("PMI_SIZE", "OMPI_COMM_WORLD_RANK", "RANK", "LOCAL_WORLD_SIZE", "ACCELERATE_USE_CPU"):
        monkeypatch.setenv(variable, "4")
    env = launch.environment(Plan(gpus=1), "quiet")
    assert not [key for key in env if key.startswith(("PMI_", "OMPI_", "RANK", "LOCAL_", "ACCELERATE_"))]


def test_a_run_goes_on_with_its_processes(home):
    def asked(**typed):
        return planning.ask("vae", "digits", (), {f"launch.{key}": value for key, value in typed.items()})

    first = asked(processes=2, cpu=True)
    run = runs.create("vae", "digits")
    write_run(run, first.recipe, Plan(processes=2, threads=3))

    def again(**typed):
        section = planning.launched_again(run, asked(**typed).recipe)
        return section.processes, section.gpus, section.cpu, section.threads

    assert again() == (2, None, True, 3)
    assert again(processes=1) == (1, None, True, None), "what is typed counts, and cores are shared out anew"
    assert again(gpus=4) == (None, 4, False, None)
    assert again(threads=5) == (2, None, True, 5)


def test_control_characters_of_names_do_not_reach_the_terminal(capsys):
    name = "a\x1b[2Jb\x07\x9b31m\r\x1b]0;title"
    out.text(name)
    out.info(f"\x1b[31m{name}\x1b[0m\tnext")
    out.configure(json=True)
    out.data({"name": name})
    shown, told = capsys.readouterr()
    assert json.loads(shown.splitlines()[1])["name"] == name
    for text in (shown, told.replace("\x1b[31m", "", 1).replace("\x1b[0m", "", 1)):
        assert not set(text) & {chr(i) for i in (*range(9), *range(11, 32), *range(127, 160))}
    assert told.endswith("\x1b[0m\tnext\n"), "colours and tabs stay"
