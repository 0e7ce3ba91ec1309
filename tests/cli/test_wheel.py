"""The wheel holds everything: installed by itself, away from the checkout, it finds its recipes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*words: object, **options) -> str:
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_works_away_from_the_checkout(tmp_path):
    copy = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", "--depth", "1", f"file://{ROOT}", copy], check=True)
    run("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, copy)
    (wheel,) = tmp_path.glob("gzcli-*.whl")
    run("-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "site", wheel)
    others = [*(ROOT / "gzcli/report/templates").iterdir(), *(ROOT / "gzcli/docs").rglob("*.*")]
    for path in (*(ROOT / "gzcli").rglob("*.py"), *(path for path in others if path.suffix != ".pyc")):
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
