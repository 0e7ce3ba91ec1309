"""Writes lock.txt: every package of the image, pinned, with its checksum, for this Python and machine.

    python .ci/lock.py

Nothing is installed: pip says what it would take for `.[demo]`. Exit code: pip's.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

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
    words = "install --dry-run --ignore-installed --only-binary=:all: --quiet --report -".split()
    # wheels that lie on this machine alone do not belong into it
    env = {key: value for key, value in os.environ.items() if key != "PIP_FIND_LINKS"}
    pip = [sys.executable, "-m", "pip", *words, *wanted()]
    done = subprocess.run(pip, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return done.returncode
    lines = sorted(map(line, json.loads(done.stdout)["install"]))
    made = f"# Python {platform.python_version()}, {platform.system()} {platform.machine()}; `make lock` writes it"
    (HERE / "lock.txt").write_text("\n".join([made, *lines, ""]))
    print(f"{HERE / 'lock.txt'}: {len(lines)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
