"""What gz is built of is pinned and can be audited; what it writes has the rights that it says."""

from __future__ import annotations

import json
import os
import re
import runpy
import stat
from pathlib import Path

import pytest

from gzcli.launch.launcher import Plan, environment
from gzcli.store import files, model_files
from gzcli.store.paths import user_dir

ROOT = Path(__file__).resolve().parents[2]
LINE = re.compile(r"([a-z0-9-]+)==\S+ --hash=sha256:[0-9a-f]{64}")


def test_the_lock_pins_all_that_gz_needs_with_checksums():
    lines = (ROOT / ".ci" / "lock.txt").read_text().splitlines()[1:]
    pinned = {found[1] for line in lines if (found := LINE.fullmatch(line))}
    assert len(pinned) == len(lines)
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["demo"]]
    assert {re.split(r"[<>=\[]", name)[0] for name in needed} <= pinned


def test_an_audit_that_nobody_answers_is_none():
    verdict = runpy.run_path(str(ROOT / ".ci" / "audit.py"))["verdict"]
    clean = {"name": "rich", "version": "1", "vulns": []}
    bad = {"name": "pillow", "version": "9", "vulns": [{"id": "CVE-1"}]}
    skipped = {"name": "torch", "skip_reason": "not found"}
    for answer, said, code, told in (
        ("", "trouble\nno route to the host\n", 3, "cannot be asked: no route to the host"),
        ("", "", 3, "no answer"),
        ({"dependencies": [skipped, skipped, clean]}, "", 3, "1 of 3"),
        ({"dependencies": [clean, clean, skipped]}, "", 0, "no fault is known of 2 packages"),
        ({"dependencies": [clean, bad]}, "", 1, "pillow 9: CVE-1"),
    ):
        text, found = verdict(json.dumps(answer) if answer else "", said)
        assert found == code and told in text


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
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in home.rglob("*")}
    assert found.pop(user_dir(model_files.TRUSTED)) == 0o600
    assert len(found) > 5
    for path, mode in found.items():
        full = 0o777 if path.is_dir() else 0o666
        assert mode == full & ~umask or (path.suffix == ".lock" and not mode & umask)


def test_compiled_code_lies_in_gz_s_cache(home, monkeypatch, capsys):
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    env = environment(Plan(), "human")
    assert env["TORCHINDUCTOR_CACHE_DIR"] == str(home / "kernels")
    assert env["TRITON_CACHE_DIR"] == str(home / "kernels" / "triton")
    (home / "kernels").mkdir(parents=True)
    (home / "kernels" / "a.so").write_bytes(bytes(5_000_000))
    from gzcli.cli.doctor import folders

    assert any(c.name == "kernels" and f"{home / 'kernels'}, 5 MB" in c.detail for c in folders())
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/my/own")
    assert environment(Plan(), "human")["TORCHINDUCTOR_CACHE_DIR"] == "/my/own"
    assert any(c.name == "kernels" and "/my/own, empty" in c.detail for c in folders())
