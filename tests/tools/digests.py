"""What matters of a file that gz wrote, without what differs whenever a command is repeated."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

# keys of JSON, and columns of CSV, whose values are times, processes, memory, or of the machine
TIMES = {
    "created",
    "started",
    "saved_at",
    "ended",
    "seconds",
    "work",
    "work_from",
    "it_s",
    "images_s",
    "samples_per_s",
}
MACHINE = {"pid", "parent", "peak_memory", "versions", "packages", "python", "platform", "git", "gz", "torch"}
VARYING = TIMES | MACHINE | {"bytes", "fingerprint"}  # of files that hold times, of where pictures lie
UNIT = r"(?:ms|s|seconds?|minutes?|hours?|days?|weeks?|years?|it/s|images/s)"
RULES = [
    (r"\b\d{8}-\d{6}-[0-9a-f]{4}\b", "<id>"),
    (r"<id>-[0-9a-f]{8}\b", "<id>-<hash>"),  # of the weights, too
    (r"\b(photos|scans)-[0-9a-f]{6}\b", r"\1-<hash>"),  # of where the pictures lie
    (r"\bcosts/[0-9a-f]{20}\b", "costs/<hash>"),
    (r"\d+ GB free|\b[\d.]+ [kM]B\b", "<size>"),
    (r"^memory(?: +[\d,.]+ [kMG]B)+$", "memory <memory>"),
    (r"`--minutes 60` makes [\d,]+ steps", "`--minutes 60` makes <time>"),
    (r"\b\d{4}-\d\d-\d\d(?:[ T]\d\d:\d\d(?::\d\d)?)?", "<date>"),
    (r"\b\d\d:\d\d:\d\d\b", "<time>"),
    (rf"\b(?:\d+m)?\d[\d,.]*(?:e[+-]\d+)?(?: {UNIT}|s)\b(?! steps)", "<time>"),
]
# lines of stderr that come as time goes by, or of two processes in either order
PASSING = re.compile(r"step \d+/\d+ |\[rank\d\]:\[W|.* \d+/\d+$|(?:loading|building) .* …$")


class Normal:
    """Replaces in texts what differs whenever a command is repeated.

    paths: the names that absolute paths get.
    runs: the last parts of the ids of runs, by which their short names are known.
    sums: what stands for the SHA-256 of a file of tensors, whose metadata are written in any order.
    """

    def __init__(self, paths: dict[str, str]) -> None:
        self.paths = sorted(paths.items(), key=lambda item: -len(item[0]))
        self.runs: set[str] = set()
        self.sums: dict[str, str] = {}

    def __call__(self, text: str) -> str:
        for path, name in self.paths:
            text = text.replace(path, name)
        self.runs |= set(re.findall(r"-\d{8}-\d{6}-([0-9a-f]{4})\b", text))
        text = re.sub(
            r"\b(?:[0-9a-f]{64}|[0-9a-f]{12})\b", lambda match: self.sums.get(match[0], match[0]), text
        )
        for pattern, name in RULES:
            text = re.sub(pattern, name, text)
        return re.sub(rf"-(?:{'|'.join(sorted(self.runs))})\b", "-<id>", text) if self.runs else text

    def lines(self, text: str) -> list[str]:
        """Lines of a text; where something was replaced the width of columns does not count."""
        pairs = ((line, self(line)) for line in text.splitlines())
        return [line if line == new else re.sub(r"  +", "  ", new).rstrip() for line, new in pairs]

    def messages(self, text: str) -> list[str]:
        return [line for line in self.lines(text) if not PASSING.match(line)]

    def json(self, value: Any) -> Any:
        if isinstance(value, dict):
            made: dict[str, Any] = {}
            for key, one in value.items():
                name = self(key)
                while name in made:  # two runs whose ids differ in what was replaced
                    name += "'"
                made[name] = "<varies>" if key in VARYING else self.json(one)
            return made
        if isinstance(value, list):
            return [self.json(one) for one in value]
        return self(value) if isinstance(value, str) else value

    def json_lines(self, text: str) -> list[str]:
        try:
            return json.dumps(self.json(json.loads(text)), indent=1, sort_keys=True).splitlines()
        except ValueError:
            return self.lines(text)

    def table(self, text: str) -> list[str]:
        rows = list(csv.reader(io.StringIO(text)))
        varying = [name in VARYING for name in rows[0]] if rows else []
        return [
            ",".join(
                "<varies>" if varies and row is not rows[0] else self(cell)
                for cell, varies in zip(row, varying, strict=False)
            )
            for row in rows
        ]


def sha(content: bytes, about: str = "") -> str:
    return hashlib.sha256(about.encode() + content).hexdigest()[:16]


def of_array(array: np.ndarray) -> str:
    return sha(np.ascontiguousarray(array).tobytes(), f"{array.dtype}{array.shape}")


def of_picture(picture: Image.Image, captioned: bool = False) -> str:
    """Of all frames. Of captioned sheets without the caption, which tells how long the training took."""
    frames = [np.asarray(frame.convert("RGBA")) for frame in ImageSequence.Iterator(picture)]
    frames = [above_caption(frame) for frame in frames] if captioned else frames
    return sha(b"".join(frame.tobytes() for frame in frames), f"{[frame.shape for frame in frames]}")


def above_caption(frame: np.ndarray) -> np.ndarray:
    """The rows to the last one with a stretch of 24 pixels that are no background: longer than a letter."""
    drawn = (frame != frame[0, 0]).any(2)
    if drawn.shape[1] < 24:
        return frame
    filled = np.flatnonzero(np.lib.stride_tricks.sliding_window_view(drawn, 24, 1).all(2).any(1))
    return frame[: filled[-1] + 1] if filled.size else frame


def digest(path: Path, normal: Normal) -> dict[str, Any]:
    """What matters of a file: `bits`, digests of its parts, or `text`, or both."""
    kind = path.suffix
    if kind in (".png", ".gif", ".jpg"):
        with Image.open(path) as picture:
            about = {key: value for key, value in picture.info.items() if isinstance(value, str)}
            text = [line for key in sorted(about) for line in (f"{key}:", *normal.json_lines(about[key]))]
            captioned = path.name == "grid.png" or path.parent.name == "samples"
            return {"bits": {"pixels": of_picture(picture, captioned)}, "text": text}
    if kind in (".npy", ".npz"):
        loaded = np.load(path, allow_pickle=False)
        arrays = loaded if kind == ".npz" else {"array": loaded}
        return {"bits": {key: of_array(arrays[key]) for key in arrays if key not in VARYING}}
    if kind == ".safetensors":
        content = path.read_bytes()
        record = tensors(content, normal)
        whole = hashlib.sha256(content).hexdigest()
        normal.sums[whole] = normal.sums[whole[:12]] = f"<tensors {sha(json.dumps(record).encode())}>"
        return record
    if kind in (".pt", ".zip", ".pt2"):
        with zipfile.ZipFile(path) as file:
            return {"bits": {name.partition("/")[2]: sha(file.read(name)) for name in file.namelist()}}
    content = path.read_bytes()
    try:
        text = re.sub(r"data:image/png;base64,([\w+/=]+)", embedded, content.decode())
    except UnicodeDecodeError:
        return {"bits": {"bytes": sha(content)}}
    if kind == ".json":
        return {"text": normal.json_lines(text)}
    if kind == ".csv":
        return {"text": normal.table(text)}
    if kind == ".jsonl":
        return {"text": [json.dumps(normal.json(json.loads(line))) for line in text.splitlines()]}
    return {"text": normal.lines(text)}


def embedded(match: re.Match[str]) -> str:
    return "picture " + of_picture(Image.open(io.BytesIO(base64.b64decode(match[1]))))


def tensors(content: bytes, normal: Normal) -> dict[str, Any]:
    """The metadata of a safetensors file, and a digest of each tensor by its bytes: numpy has no bfloat16."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    about = header.pop("__metadata__", {})
    text = [line for key in sorted(about) for line in (f"{key}:", *normal.json_lines(about[key]))]
    bits = {}
    for name, tensor in sorted(header.items()):
        first, last = (start + offset for offset in tensor["data_offsets"])
        bits[name] = sha(content[first:last], f"{tensor['dtype']}{tensor['shape']}")
    return {"bits": bits, "text": text}
