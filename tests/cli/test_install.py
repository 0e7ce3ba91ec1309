"""The ways in: the wheel, the container files, the conda environment, examples for CI; what gz is built of is
pinned, and what it writes has the rights that it says."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from helpers import ROOT
from pretrained import TABLE, WHEEL, file_of

from gzcli import __version__
from gzcli.cli.doctor import folders
from gzcli.core import errors
from gzcli.launch.launcher import Plan, child_environment
from gzcli.store import files, model_files
from gzcli.store.paths import user_dir


def run(*words: object, **options) -> str:
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wanted() -> list[Path]:
    """Files of the checkout that an installed gz needs."""
    # the samples of leagues are for the site, which a clone builds
    docs = [path for path in (ROOT / "gzcli/docs").rglob("*.*") if path.parent.name != "samples"]
    shipped = [
        *(ROOT / "gzcli/report/templates").iterdir(),
        *docs,
        *(ROOT / "gzcli/data/sets").glob("*.*"),
    ]
    return [*(ROOT / "gzcli").rglob("*.py"), *(path for path in shipped if path.suffix != ".pyc")]


def pyproject():
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_hints_install_packages_beside_gz(monkeypatch):
    """The `pip` of a shell is another's if pipx installed gz, and environments of uv have none."""
    here = shlex.quote(sys.executable)
    assert errors.install_line("gzcli[demo]") == f"{here} -m pip install 'gzcli[demo]'"
    monkeypatch.setattr(errors, "find_spec", lambda name: None)
    assert errors.install_line("lpips") == f"uv pip install --python {here} lpips"
    files_of_gz = {path: path.read_text() for path in (ROOT / "gzcli").rglob("*.py")}
    assert [path for path, text in files_of_gz.items() if re.search("[\"'`]pip install", text)] == []
    constant = re.compile(r"^[A-Z_]+ = .*install_line\(", re.M)  # an import would look for pip
    assert [path for path, text in files_of_gz.items() if constant.search(text)] == []


def test_pyproject_lists_all_that_an_installed_gz_needs():
    """The wheel itself is built each night."""
    setup = pyproject()["tool"]["setuptools"]
    folders = {"gzcli._recipes": ROOT / setup["package-dir"]["gzcli._recipes"]}
    folders = {name: ROOT / name.replace(".", "/") for name in setup["packages"]} | folders
    listed = {path for folder in folders.values() for path in folder.glob("*.py")}
    for name, patterns in setup["package-data"].items():
        listed |= {path for pattern in patterns for path in folders[name].glob(pattern)}
    assert [path for path in wanted() if path not in listed] == []
    assert {ROOT / "gzcli/py.typed", *(ROOT / "recipes").rglob("*.yaml")} <= listed
    assert {file_of(name) for name in WHEEL if file_of(name).exists()} <= listed


@pytest.mark.slow
def test_the_wheel_works_away_from_the_checkout(tmp_path):
    copy = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", "--depth", "1", f"file://{ROOT}", copy], check=True)
    run("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, copy)
    (wheel,) = tmp_path.glob("gzcli-*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    assert wheel.stat().st_size <= 12_000_000
    for path in wanted():
        assert (tmp_path / "site" / path.relative_to(ROOT)).exists(), path
    assert (tmp_path / "site" / "gzcli" / "py.typed").exists()
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    where = "import gzcli, gzcli.store.paths as p; print(gzcli.__file__, p.recipes_dir())"
    package, recipes = run("-c", where, env=env, cwd=tmp_path).split()
    assert package.startswith(str(tmp_path)) and recipes.startswith(str(tmp_path))
    shown = run("-m", "gzcli", "list", "recipes", env=env, cwd=tmp_path)
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert path.stem in shown
    assert "model.hidden" in run("-m", "gzcli", "train", "glow", "--dry-run", "--keys", env=env, cwd=tmp_path)
    listed = json.loads(run("-m", "gzcli", "list", "pretrained", "--json", env=env, cwd=tmp_path))
    here, more = {row["name"] for row in listed["pretrained"]}, set(listed["elsewhere"])
    made = {name for name in TABLE if file_of(name).exists()}
    assert here == {f"pretrained:{name}" for name in WHEEL if name in made} and more == made - set(WHEEL)
    assert here and more
    run("-m", "gzcli", "model", "new", "maf", env=env, cwd=tmp_path)
    run("-m", "gzcli", "train", "./maf.py", "--data", "digits", "--steps", "2", env=env, cwd=tmp_path)


def steps_of(flow: str) -> list[dict]:
    tree = yaml.safe_load((ROOT / f".github/workflows/{flow}.yml").read_text())
    return [step for job in tree["jobs"].values() for step in job["steps"]]


def test_the_night_makes_what_the_makefile_has():
    words = " ".join(step.get("run", "") for step in steps_of("nightly"))
    made = re.findall(r"make ([a-z-]+)", words)
    assert made == ["test-slow", "fuzz", "docs", "wheel"]
    assert set(made) <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


def test_the_shards_of_the_night_are_all_slow_cases_and_no_longer_than_they_may_be():
    job = yaml.safe_load((ROOT / ".github/workflows/nightly.yml").read_text())["jobs"]["slow"]
    shards = job["strategy"]["matrix"]["shard"]
    assert shards == list(range(1, len(shards) + 1))
    (made,) = (line for step in job["steps"] if "make" in (line := step.get("run", "")))
    words = made.replace("${{ matrix.shard }}", "3").replace("${{ strategy.job-total }}", str(len(shards)))
    done = subprocess.run([*words.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert f"--group 3 --splits {len(shards)}\n" in done.stdout
    (path,) = re.findall(r"--durations-path (\S+)", done.stdout)
    seconds = json.loads((ROOT / path).read_text())
    assert sum(seconds.values()) / len(shards) <= 90 * 60 and max(seconds.values()) <= 10 * 60
    names = {tuple(case.split("[")[0].split("::")) for case in seconds}
    assert [name for name in names if f"def {name[1]}(" not in (ROOT / name[0]).read_text()] == []


def test_the_workflow_runs_what_is_there():
    steps = steps_of("check")
    assert all("uses" in step or "run" in step for step in steps)
    runs = [step["run"] for step in steps if "run" in step]
    scripts = [ROOT / line for line in runs if line.startswith(".ci/")]
    assert len(scripts) == 2 and all(os.access(script, os.X_OK) for script in scripts)
    (job,) = [step for step in steps if step.get("run", "").endswith("check.sh")]
    text = (ROOT / ".ci/examples/check.sh").read_text()
    assert all(f"{name}=${{{name}:-" in text for name in job["env"])


def test_a_row_of_a_league_must_be_judged_alike():
    """`.ci/row.py`, which the workflow calls."""
    row = runpy.run_path(str(ROOT / ".ci/row.py"))
    facts = {"model": "fm", "title": "fm, guided 2", "params": 9, "n": 2000, "sample": {"steps": 9}}
    again = facts | {"metrics": {"fd": 15.0, "bpd": 1.0}, "excess": {"fd": [5.0, 0.0, 10.0]}}
    again["intervals"] = {"fd": [10.0, 20.0], "bpd": [0.9, 1.1]}
    near = {"metrics": {"fd": 12.0, "bpd": 1.1}, "excess": {"fd": [2.0, -2.0, 6.0]}}
    assert row["differing"](again | near, again) == []
    for claim, line in (
        ({"metrics": {"fd": 9.0, "bpd": 1.0}}, "fd: claimed 9.0, judged 10 to 20"),
        ({"metrics": {"fd": 15.0}}, "metrics: only one judgement has bpd"),
        ({"metrics": {**again["metrics"], "recall": 1.0}}, "metrics: only one judgement has recall"),
        ({"excess": {"fd": [-1.0, -6.0, 4.0]}}, "excess of fd: claimed -1.0 ± 5, judged 0 to 10"),
        ({"excess": {"fd": [5.0, 4.5, 5.5]}}, "excess of fd: claimed 5.0 ± 0.5, judged 0 to 10"),
        ({"excess": {**again["excess"], "bpd": [0.0, 0.0, 0.0]}}, "excess: only one judgement has bpd"),
        ({"title": "fm"}, "title: claimed fm, judged fm, guided 2"),
        ({"sample": {"steps": 1}}, "sample: claimed {'steps': 1}, judged {'steps': 9}"),
        ({"n": 50}, "n: claimed 50, judged 2000"),
    ):
        assert row["differing"](again | claim, again) == [line]
    (step,) = [one for one in steps_of("check") if "row.py" in one.get("run", "")]
    assert "--no-renames" in step["run"] and "-- .github/rows |" in step["run"] and step["shell"] == "bash"
    assert ".github/rows/glyphs/NAME.json" in (ROOT / "gzcli/docs/pages/bench.md").read_text()


def test_actions_are_pinned_and_a_release_is_a_tag_with_its_changes():
    for flow in ("check", "nightly", "release"):
        for action in (step["uses"] for step in steps_of(flow) if "uses" in step):
            assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action), f"{flow}: {action}"
    jobs = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]
    assert jobs["upload"]["if"] == "github.ref_type == 'tag'" and jobs["upload"]["needs"] == "build"
    changes = (ROOT / ".github/CHANGELOG.md").read_text()
    assert f"\n## {__version__} " in changes
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_containers_and_the_conda_environment_install_this_clone():
    """Every path that is copied is there, all that the package is built from is copied, and the image runs as
    nobody special."""
    for name, line in (("Dockerfile", r"^COPY (.*) \S+$"), (".ci/apptainer.def", r"^ {4}(\S+) /opt/gz/$")):
        paths = set(" ".join(re.findall(line, (ROOT / name).read_text(), re.M)).split())
        needed = {"pyproject.toml", "README.md", "LICENSE", "gzcli", "recipes"}
        assert paths - {".ci/lock.txt"} == needed and all((ROOT / path).exists() for path in paths), name
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert [line.split()[-1] for line in lines if line.startswith("FROM")] == ["base", "cpu", "cuda"]
    assert lines.count("USER gz") == 2
    assert 'VOLUME ["/cache", "/data"]' in lines and 'ENTRYPOINT ["gz"]' in lines
    conda = yaml.safe_load((ROOT / ".ci/environment.yml").read_text())
    (pip,) = [part["pip"] for part in conda["dependencies"] if isinstance(part, dict)]
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
        variables = env | {"WORST": worst, "OUT": f"out{code}"}
        words = [ROOT / ".ci/examples/check.sh"]
        done = subprocess.run(words, env=variables, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        assert f"at most {worst} is allowed" in done.stdout
    assert (tmp_path / "out0/samples/grid.png").is_file()
    assert json.loads(Path(tmp_path / "out0/bench.json").read_text())["rows"]


LINE = re.compile(r"([a-z0-9-]+)==\S+ --hash=sha256:[0-9a-f]{64}")


def test_the_lock_pins_all_that_gz_needs_with_checksums():
    lines = (ROOT / ".ci" / "lock.txt").read_text().splitlines()[1:]
    pinned = {match[1] for line in lines if (match := LINE.fullmatch(line))}
    assert len(pinned) == len(lines)
    project = pyproject()["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["demo"]]
    assert {re.split(r"[<>=\[]", name)[0] for name in needed} <= pinned


def test_an_audit_that_nobody_answers_is_none():
    verdict = runpy.run_path(str(ROOT / ".ci" / "audit.py"))["verdict"]
    clean = {"name": "rich", "version": "1", "vulns": []}
    bad = {"name": "pillow", "version": "9", "vulns": [{"id": "CVE-1"}]}
    skipped = {"name": "torch", "skip_reason": "not found"}
    for answer, said, code, message in (
        ("", "trouble\nno route to the host\n", 3, "cannot be asked: no route to the host"),
        ("", "", 3, "no answer"),
        ({"dependencies": [skipped, skipped, clean]}, "", 3, "1 of 3"),
        ({"dependencies": [clean, clean, skipped]}, "", 0, "no fault is known of 2 packages"),
        ({"dependencies": [clean, bad]}, "", 1, "pillow 9: CVE-1"),
    ):
        text, status = verdict(json.dumps(answer) if answer else "", said)
        assert status == code and message in text


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_rights_follow_the_umask_and_what_decides_on_code_is_private(home, tmp_path, umask):
    before = os.umask(umask)
    try:
        files.write_json(home / "a" / "b.json", {})
        with files.new_dir(home / "c") as part:
            (part / "d").write_text("")
        with files.lock(home / "e.lock"):
            pass
        (tmp_path / "maf.py").write_text("")
        model_files.trust(tmp_path / "maf.py")
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in home.rglob("*")}
    assert modes.pop(user_dir(model_files.TRUSTED)) == 0o600
    assert len(modes) > 5
    for path, mode in modes.items():
        full = 0o777 if path.is_dir() else 0o666
        assert mode == full & ~umask or (path.suffix == ".lock" and not mode & umask)


def test_compiled_code_lies_in_gz_s_cache(home, monkeypatch, capsys):
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    env = child_environment(Plan(), "human")
    assert env["TORCHINDUCTOR_CACHE_DIR"] == str(home / "kernels")
    assert env["TRITON_CACHE_DIR"] == str(home / "kernels" / "triton")
    (home / "kernels").mkdir(parents=True)
    (home / "kernels" / "a.so").write_bytes(bytes(5_000_000))
    assert any(c.name == "kernels" and f"{home / 'kernels'}, 5.0 MB" in c.detail for c in folders())
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/my/own")
    assert child_environment(Plan(), "human")["TORCHINDUCTOR_CACHE_DIR"] == "/my/own"
    assert any(c.name == "kernels" and "/my/own, empty" in c.detail for c in folders())
