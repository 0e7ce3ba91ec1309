"""Records what commands of gz print and write, and compares two such records: before and after a change.

python tests/tools/compare.py record GZ OUT [--only REGEX] [--jobs 2]
python tests/tools/compare.py compare BEFORE AFTER [--verbose]

`record` runs the commands of `commands.txt` with the executable GZ. Of each it keeps the exit code, what was
printed, and a digest of every file that was written: pixels of pictures, arrays, tensors, lines of text. What
differs whenever a command is repeated, such as dates, run ids, seconds and paths, is replaced first. `--only`
takes the groups of `commands.txt` in which REGEX matches a line, as `GROUP: COMMAND`. Nothing of gz is
imported, so any version can be recorded.

`compare` prints a row for each command. It ends with 1 if an exit code differs, if a command stands in one
record alone, or if a figure, a weight or a picture of `gz train`, `sample`, `ood` or `bench` differs.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
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
        host = {key: os.environ[key] for key in ("PATH", "TMPDIR", "LD_LIBRARY_PATH") if key in os.environ}
        same = "GZ_OFFLINE=1 OMP_NUM_THREADS=1 COLUMNS=80 NO_COLOR=1 LANG=C.UTF-8 TZ=UTC"
        self.environment = host | dict(pair.split("=") for pair in same.split())
        self.environment |= {"HOME": str(root.parent / "user"), "GZ_HOME": str(self.home)}
        self.seen = self.stats()

    def stats(self) -> dict[Path, tuple[int, int]]:
        files = [path for top in (self.home, self.work) for path in top.rglob("*") if path.is_file()]
        files = [path for path in files if not path.name.startswith(".index-")]  # caches of what others hold
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in files}

    def words(self, line: str) -> list[str]:
        for short, flags in SHORT.items():
            line = line.replace(short, flags)
        words = shlex.split(line.lstrip("^~ "))
        return [self.newest(word[1:]) if word.startswith("@") else word for word in words]

    def newest(self, pattern: str) -> str:
        paths = self.home.glob(pattern)
        return str(max(paths, key=lambda path: path.stat().st_mtime_ns, default=self.home / pattern))

    def run(self, words: list[str], interrupted: bool) -> tuple[int | str, str, str]:
        """The exit code of a command, or a text if it hung, and what it printed."""
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        how = {"cwd": self.work, "env": self.environment, "start_new_session": True, "encoding": "utf-8"}
        process = subprocess.Popen([str(self.gz), *words], **pipes, **how)
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
        scan = Image.fromarray(coarse).resize((16, 16), Image.Resampling.BICUBIC)
        scan.save(folder / "scans" / f"{i:02}.png")
    mask = np.full((16, 16), 255, np.uint8)
    mask[4:12, 4:12] = 0
    Image.fromarray(mask).save(folder / "mask.png")
    small = "extends: vae\nmodel: {latent: 4}\nfor: {digits: {model: {hidden: [8, 16]}}}\n"
    (folder / "small.yaml").write_text(small)
    (folder / "bad.yaml").write_text("extends: vae\nmodel: {latnt: 4}\ntrain: {steps: many}\n")


COMMANDS = Path(__file__).with_name("commands.txt")
PROMISED = {"train", "sample", "ood", "bench"}  # to the bit
FIGURES = {".json", ".jsonl", ".csv", ".yaml"}  # text that counts as figures, not as messages


def commands(text: str) -> dict[str, list[str]]:
    """The commands of each group, with its braces written out."""
    groups: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("["):
            group = groups.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            parts = [part.split(",") for part in re.split(r"\{(.*?)\}", line)]
            choices = [part if i % 2 else [",".join(part)] for i, part in enumerate(parts)]
            group += ["".join(choice) for choice in itertools.product(*choices)]
    return groups


def record(gz: Path, out: Path, only: str, jobs: int) -> None:
    groups = commands(COMMANDS.read_text())
    chosen = [name for name in groups if any(re.search(only, f"{name}: {line}") for line in groups[name])]
    scratch = Path(tempfile.mkdtemp(prefix="gz-"))  # its name has always the same length: texts wrap alike
    (scratch / "user").mkdir()

    def run(name: str) -> None:
        place = Place(gz, scratch / name)  # so that groups can be recorded alone or side by side
        records = []
        for line in groups[name]:
            records.append(place.record(line))
            print(f"{name}: {line}  {records[-1]['code']}  {records[-1]['seconds']} s", flush=True)
        (out / f"{name}.json").write_text(json.dumps(records, indent=1))
        shutil.rmtree(scratch / name)

    out.mkdir(parents=True, exist_ok=True)
    try:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(run, chosen))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    number = sum(len(groups[name]) for name in chosen)
    print(f"{number} commands, {(used.ru_utime + used.ru_stime) / 60:.1f} CPU-minutes")


def changed(before: Any, after: Any) -> list[str]:
    """The lines in which two texts differ, as a diff without context."""
    lines = list(difflib.unified_diff(before or [], after or [], n=0, lineterm=""))[2:]  # without the names
    return [line for line in lines if not line.startswith("@@")]


def differences(before: dict[str, Any], after: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What of two records of a command differs: the figures, and the messages."""
    messages = [f"{key} {line}" for key in ("stdout", "stderr") for line in changed(before[key], after[key])]
    figures = [f"removed {line}" for line in changed(before["removed"], after["removed"])]
    for name in sorted(before["files"].keys() | after["files"].keys()):
        one, two = before["files"].get(name), after["files"].get(name)
        if one is None or two is None:
            figures.append(f"{name} is written by {'AFTER' if one is None else 'BEFORE'} alone")
            continue
        bits, later = one.get("bits", {}), two.get("bits", {})
        figures += [
            f"{name} {key}" for key in sorted(bits.keys() | later.keys()) if bits.get(key) != later.get(key)
        ]
        kind = figures if Path(name).suffix in FIGURES else messages
        kind += [f"{name} {line}" for line in changed(one.get("text"), two.get("text"))]
    return figures, messages


def verdict(before: dict[str, Any] | None, after: dict[str, Any] | None) -> tuple[str, list[str], bool]:
    """What the row of a command says, the lines in which it differs, and whether a promise is broken."""
    if before is None or after is None:
        return f"only in {'AFTER' if before is None else 'BEFORE'}", [], True
    figures, messages = differences(before, after)
    if before["code"] != after["code"]:
        return f"exit code differs: {before['code']}, {after['code']}", figures + messages, True
    if before["command"].startswith(("^", "~")):
        return "same exit code", figures + messages, False
    if figures:
        promised = before["command"].split()[0] in PROMISED
        return f"figures differ ({len(figures)})", figures + messages, promised
    said = f"same but for messages ({len(messages)} lines)" if messages else "same to the bit"
    return said, messages, False


def compare(before: Path, after: Path, verbose: bool) -> int:
    broken = 0
    details = []
    print("| group | command | result |\n|---|---|---|")
    names = {path.stem: None for folder in (before, after) for path in sorted(folder.glob("*.json"))}
    for name in names:
        sides = []
        for folder in (before, after):
            path = folder / f"{name}.json"
            records = json.loads(path.read_text()) if path.exists() else []
            sides.append({one["command"]: one for one in records})
        for line in dict.fromkeys([*sides[0], *sides[1]]):
            said, lines, breaks = verdict(sides[0].get(line), sides[1].get(line))
            broken += breaks
            print(f"| {name} | `{line}` | {said} |".replace("||", "|"))
            details += [f"\n### {name}: {line}\n", *(f"    {one}" for one in lines)] if lines else []
    print(f"\n{broken} rows break what is promised")
    if verbose:
        print("\n".join(details))
    return 1 if broken else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("record")
    verb.add_argument("gz", type=Path)
    verb.add_argument("out", type=Path)
    verb.add_argument("--only", default="", metavar="REGEX")
    verb.add_argument("--jobs", type=int, default=1)
    verb = verbs.add_parser("compare")
    verb.add_argument("before", type=Path)
    verb.add_argument("after", type=Path)
    verb.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    if args.verb == "compare":
        return compare(args.before, args.after, args.verbose)
    record(args.gz.absolute(), args.out, args.only, args.jobs)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
