"""Runs commands of gz in a folder of their own, and keeps what they print and write."""

from __future__ import annotations

import math
import os
import shlex
import signal
import subprocess
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from digests import Normal, digest
from PIL import Image

# a figure a step; what gz would choose by the time that a step takes is given, too
LOGGED = "--cpu --set train.samples=4 --set train.log_every=1 --set train.sample_every=3"
FEW = f"--steps 6 --set train.eval_every=6 --set train.checkpoint_every=6 {LOGGED}"
SHORT = {
    "<few>": FEW,
    "<digits>": f"--data digits {FEW}",
    "<logged>": LOGGED,
    "<tiny>": "--set model.mult=[1,2] --set model.attention=[]",
}
LIMIT = 300  # seconds that a command may take


class Place:
    """A GZ_HOME and a working folder for one group of commands."""

    def __init__(self, gz: Path, root: Path) -> None:
        self.gz, self.home, self.work = gz, root / "home", root / "work"
        self.home.mkdir(parents=True)
        self.work.mkdir()
        stand_ins(self.work)
        self.normal = Normal({str(self.home): "<home>", str(root): "<scratch>", str(gz.parents[2]): "<gz>"})
        kept = {
            key: value for key, value in os.environ.items() if key in ("PATH", "TMPDIR", "LD_LIBRARY_PATH")
        }
        self.environment = kept | {
            "HOME": str(root.parent / "user"),
            "GZ_HOME": str(self.home),
            "GZ_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "80",
            "NO_COLOR": "1",
            "LANG": "C.UTF-8",
            "TZ": "UTC",
        }
        self.seen = self.stats()

    def stats(self) -> dict[Path, tuple[int, int]]:
        files = [path for top in (self.home, self.work) for path in top.rglob("*") if path.is_file()]
        files = [path for path in files if not path.name.startswith(".index-")]  # caches of what others hold
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in files}

    def words(self, line: str) -> list[str]:
        for short, flags in SHORT.items():
            line = line.replace(short, flags)
        return [
            self.newest(word[1:]) if word.startswith("@") else word
            for word in shlex.split(line.lstrip("^~ "))
        ]

    def newest(self, pattern: str) -> str:
        return str(
            max(
                self.home.glob(pattern), key=lambda path: path.stat().st_mtime_ns, default=self.home / pattern
            )
        )

    def run(self, words: list[str], interrupted: bool) -> tuple[int | str, str, str]:
        """The exit code of a command, or a text if it hung, and what it printed."""
        process = subprocess.Popen(
            [str(self.gz), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self.work,
            env=self.environment,
            start_new_session=True,
            encoding="utf-8",
        )
        try:
            while interrupted and process.poll() is None:
                if list(self.home.glob("runs/*/checkpoints/*/meta.json")):
                    process.send_signal(signal.SIGTERM)  # a shell in the background has SIGINT ignored
                    break
                time.sleep(0.05)
            out, err = process.communicate(timeout=LIMIT)
            return process.returncode, out, err
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return f"hung for {LIMIT} s", *process.communicate()

    def record(self, line: str) -> dict[str, Any]:
        """Runs one command. Returns what is kept of it."""
        started = time.monotonic()
        code, out, err = self.run(self.words(line), line.startswith("^"))
        before, self.seen = self.seen, self.stats()
        new = sorted(path for path, stat in self.seen.items() if before.get(path) != stat)
        for path in new:
            self.normal(str(path))  # so that the short names of new runs are known
        # tensors first, in the order in which they were written: others hold their sums
        new.sort(key=lambda path: self.seen[path][0] if path.suffix == ".safetensors" else math.inf)
        files: dict[str, Any] = {}
        for path in new:
            name = self.normal(str(path))
            files[name if name not in files else f"{name} ({len(files)})"] = digest(path, self.normal)
        return {
            "command": line,
            "code": code,
            "seconds": round(time.monotonic() - started, 1),
            "stdout": self.normal.json_lines(out),
            "stderr": self.normal.messages(err),
            "files": files,
            "removed": sorted(self.normal(str(path)) for path in before.keys() - self.seen.keys()),
        }


def stand_ins(folder: Path) -> None:
    """Pictures and recipes that commands are given, the same each time."""
    rng = np.random.default_rng(0)
    for i in range(60):
        kind, cells = ("cat", 4) if i % 2 else ("dog", 32)
        coarse = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        path = folder / "photos" / kind / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC).save(path)
    with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
        for path in sorted((folder / "photos").rglob("*.png")):
            archive.write(path, str(path.relative_to(folder / "photos")))
    (folder / "scans").mkdir()
    for i in range(60):
        coarse = rng.integers(0, 256, (6, 6), dtype=np.uint8)
        Image.fromarray(coarse).resize((16, 16), Image.Resampling.BICUBIC).save(
            folder / "scans" / f"{i:02}.png"
        )
    mask = np.full((16, 16), 255, np.uint8)
    mask[4:12, 4:12] = 0
    Image.fromarray(mask).save(folder / "mask.png")
    (folder / "small.yaml").write_text(
        "extends: vae\nmodel: {latent: 4}\nfor: {digits: {model: {hidden: [8, 16]}}}\n"
    )
    (folder / "bad.yaml").write_text("extends: vae\nmodel: {latnt: 4}\ntrain: {steps: many}\n")
