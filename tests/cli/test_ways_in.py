"""The ways in beside pip: the container files, the conda environment and the examples for CI."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import ROOT


def test_the_workflow_runs_what_is_there():
    flow = yaml.safe_load((ROOT / ".github/workflows/check.yml").read_text())
    steps = [step for job in flow["jobs"].values() for step in job["steps"]]
    assert all("uses" in step or "run" in step for step in steps)
    runs = [step["run"] for step in steps if "run" in step]
    scripts = [ROOT / line for line in runs if line.startswith(".ci/")]
    assert len(scripts) == 2 and all(os.access(script, os.X_OK) for script in scripts)
    (job,) = [step for step in steps if step.get("run", "").endswith("check.sh")]
    text = (ROOT / ".ci/examples/check.sh").read_text()
    assert all(f"{name}=${{{name}:-" in text for name in job["env"])


def test_containers_hold_what_the_wheel_is_made_of():
    """Every path that is copied is there, and all that the package is built from is copied."""
    for name, line in (("Dockerfile", r"^COPY (.*) \S+$"), (".ci/apptainer.def", r"^ {4}(\S+) /opt/gz/$")):
        paths = set(" ".join(re.findall(line, (ROOT / name).read_text(), re.M)).split())
        needed = {"pyproject.toml", "README.md", "LICENSE", "gzcli", "recipes"}
        assert paths - {".ci/lock.txt"} == needed and all((ROOT / path).exists() for path in paths), name


def test_the_image_runs_as_nobody_special_and_keeps_what_is_made():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    stages = [line.split()[-1] for line in lines if line.startswith("FROM")]
    assert stages == ["base", "cpu", "cuda"] and lines.count("USER gz") == 2
    assert 'VOLUME ["/cache", "/data"]' in lines and 'ENTRYPOINT ["gz"]' in lines


def test_the_conda_environment_installs_the_clone():
    found = yaml.safe_load((ROOT / ".ci/environment.yml").read_text())
    (pip,) = [part["pip"] for part in found["dependencies"] if isinstance(part, dict)]
    assert [(ROOT / ".ci" / path).resolve() for path in pip] == [ROOT]


@pytest.mark.slow  # three processes of the engine
def test_the_script_for_ci_passes_and_fails(tmp_path):
    """As it stands, and with a bar that no model clears."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "gz").write_text(f'#!/bin/sh\nexec {sys.executable} -m gzcli "$@"\n')
    (tools / "gz").chmod(0o755)
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "STEPS": "60"}
    for worst, code in (("100000", 0), ("0.1", 1)):
        own = env | {"WORST": worst, "OUT": f"out{code}"}
        words = [ROOT / ".ci/examples/check.sh"]
        done = subprocess.run(words, env=own, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        assert f"at most {worst} is allowed" in done.stdout
    assert (tmp_path / "out0/samples/grid.png").is_file()
    assert json.loads(Path(tmp_path / "out0/bench.json").read_text())["rows"]
