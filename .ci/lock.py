"""Writes lock.txt: every package of the image for CPUs, pinned by version and checksum, for this Python and
machine.

    python .ci/lock.py [PIP'S OPTIONS]        as `--extra-index-url URL`, the index of torch's CPU wheels

Nothing is installed: pip says what it would take for `.[demo]`. Exit code: pip's, or 3 where torch would
bring the libraries of CUDA.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import tomllib

HERE = Path(__file__).resolve().parent
EXTRAS = ("demo",)


def wanted() -> list[str]:
    """The requirements of gz and of EXTRAS, as pyproject.toml has them."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *(r for e in EXTRAS for r in project["optional-dependencies"][e])]


def line(item: dict[str, Any]) -> str:
    """A package of pip's report as a line of a requirements file. Raises KeyError without a checksum."""
    name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()
    digest = item["download_info"]["archive_info"]["hashes"]["sha256"]
    return f"{name}=={item['metadata']['version']} --hash=sha256:{digest}"


def main() -> int:
    words = ["install", "--dry-run", "--ignore-installed", "--only-binary=:all:", "--quiet", "--report", "-"]
    pip = [sys.executable, "-m", "pip", *words, *sys.argv[1:], *wanted()]
    done = subprocess.run(pip, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return done.returncode
    lines = sorted(map(line, json.loads(done.stdout)["install"]))
    if any(text.startswith("nvidia-") for text in lines):
        print("error: torch is that of CUDA here; give the index of its CPU wheels", file=sys.stderr)
        return 3
    where = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    (HERE / "lock.txt").write_text("\n".join([f"# {where}; `make lock` writes it", *lines, ""]))
    print(f"{HERE / 'lock.txt'}: {len(lines)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
