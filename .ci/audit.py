"""What is installed, as an SBOM (CycloneDX, JSON), and the known faults of it.

    python .ci/audit.py PYTHON TOOLS

PYTHON: interpreter of the environment. TOOLS: folder of the programs `cyclonedx-py` and `pip-audit`, of an
environment of their own. Exit codes: 0 no fault is known, 1 some are, 3 nobody can be asked.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATHS = "import json, sys; print(json.dumps([p for p in sys.path if p.endswith('-packages')]))"


def main(python: str, tools: str) -> int:
    """Writes build/sbom.json and build/audit.json; returns the exit code."""
    build = ROOT / "build"
    build.mkdir(exist_ok=True)
    sbom, report = build / "sbom.json", build / "audit.json"
    how = ("--pyproject", str(ROOT / "pyproject.toml"), "--of", "JSON", "--output-reproducible")
    subprocess.run([f"{tools}/cyclonedx-py", "environment", *how, "-o", str(sbom), python], check=True)
    print(f"{sbom}: {len(json.loads(sbom.read_text())['components'])} packages")
    paths = json.loads(subprocess.check_output([python, "-c", PATHS]))
    where = [word for path in paths for word in ("--path", path)]
    report.unlink(missing_ok=True)
    words = [f"{tools}/pip-audit", *where, "--format", "json", "--progress-spinner", "off", "-o", str(report)]
    process = subprocess.run(words, stderr=subprocess.PIPE, text=True)
    text, code = verdict(report.read_text() if report.exists() else "", process.stderr)
    print(text, file=sys.stderr if code else sys.stdout)
    return code


def verdict(answer: str, said: str) -> tuple[str, int]:
    """What pip-audit's answer means, in words, and the exit code.

    answer: its JSON; empty where it could not ask.
    said: what it said on stderr.
    """
    rows = json.loads(answer)["dependencies"] if answer.strip() else []
    listed = [row for row in rows if "skip_reason" not in row]  # it skips what its database does not have
    if not listed or 2 * len(listed) < len(rows):
        last = (said.strip().splitlines() or ["no answer"])[-1]
        why = f"it knows {len(listed)} of {len(rows)} packages" if rows else last
        hint = "try again on a network that reaches it; build/sbom.json can be checked anywhere"
        return f"error: the database of known faults cannot be asked: {why}\n\nhint: {hint}", 3
    bad = {
        f"{row['name']} {row['version']}": [v["id"] for v in row["vulns"]] for row in listed if row["vulns"]
    }
    if not bad:
        return f"no fault is known of {len(listed)} packages", 0
    lines = [f"{name}: {' '.join(ids)}" for name, ids in bad.items()]
    hint = "build/audit.json says which versions mend them; then `make lock`"
    return "\n".join([f"error: {len(bad)} packages have known faults", *lines, "", f"hint: {hint}"]), 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
