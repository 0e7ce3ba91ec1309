"""Judges images by the alarm in the folder of this script: python judge.py FOLDER [--fpr 1%] [--json], and
tests itself: python judge.py --check

Exit code 0: no image is flagged. 6: an image is flagged or cannot be read. 2: wrong arguments, no image, or a
damaged alarm. 130: Ctrl-C. 141: nobody reads the output any longer.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

FAINT = 240  # grey level from which ink is invisible on white
DRIFT_LEVEL, MIN_DRIFT_IMAGES = 0.01, 8  # p-value and number of images from which a drift is printed
SPEC_ENTRIES = {"shape", "fit", "tails", "formats", "suffixes", "held_out", "sha256", "test_scores"}
CHECK_TOLERANCE = 1e-3  # tolerance of the scores of the test image
ROUNDING, TIE = 1e-9, 1e-5  # relative differences of rates and of scores that do not count
Unread = list[tuple[str, str]]  # paths that cannot be read, and the reasons


def fail(message: str) -> NoReturn:
    print(f"error: {shown(message)}", file=sys.stderr)
    sys.exit(2)


def shown(text: str) -> str:
    """A text in which characters that could control a terminal are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def load(folder: Path) -> tuple[dict[str, Any], Any, Any]:
    """The description of the alarm, its graph, and its table: the model and the score of each held-out
    image."""
    import numpy as np
    import onnxruntime

    spec = json.loads((folder / "alarm.json").read_bytes())
    if lacking := {
        "shape",
        "fit",
        "tails",
        "formats",
        "suffixes",
        "held_out",
        "sha256",
        "test_scores",
    }.difference(spec):
        raise ValueError(f"alarm.json lacks {', '.join(sorted(lacking))}")
    content = {name: (folder / name).read_bytes() for name in ("alarm.onnx", "held_out.csv")}
    for name, data in content.items():
        if hashlib.sha256(data).hexdigest() != spec["sha256"][name]:
            raise ValueError(f"{name} is not the file that was exported")
    table = np.loadtxt(io.BytesIO(content["held_out.csv"]), delimiter=",", skiprows=1, ndmin=2)
    if table.shape != (spec["held_out"], 2) or not np.isfinite(table).all():
        raise ValueError(f"held_out.csv does not have {spec['held_out']} finite scores")
    return spec, onnxruntime.InferenceSession(content["alarm.onnx"]), table


def find(top: Path, suffixes: list[str]) -> tuple[list[Path], Unread, Unread]:
    """The images below a folder, the folders that cannot be read, and all other files. Each folder is read
    once, so circles of links end. Hidden files and folders are skipped."""
    if not os.path.isdir(top):
        return [top], [], []
    images, unread, others, seen = [], [], [], set()

    def skip(e: OSError) -> None:
        unread.append((str(e.filename), str(e.strerror)))

    for folder, folders, names in os.walk(top, onerror=skip, followlinks=True):
        place = os.path.realpath(folder)
        folders[:] = [] if place in seen else [name for name in folders if not is_hidden(name)]
        files = [] if place in seen else [Path(folder, name) for name in names if not is_hidden(name)]
        images += [path for path in files if path.suffix.lower() in suffixes]
        unlike = (path for path in files if path.suffix.lower() not in suffixes)
        others += [(str(path), "its name does not end like that of an image") for path in unlike]
        seen.add(place)
    return sorted(images), unread, others


def is_hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX"))


def read(path: Path, spec: dict[str, Any]) -> Any:
    """An image as gz reads it, uint8 [1, C, H, W]."""
    import numpy as np
    from PIL import Image, ImageOps

    if not path.is_file():
        raise ValueError("it is not a file")
    Image.init()
    with Image.open(path, formats=[name for name in spec["formats"] if name in Image.OPEN]) as encoded:
        image = ImageOps.exif_transpose(encoded)
    if image.mode[0] in "IF":
        raise ValueError("it has more than 8 bits per pixel")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = opaque(image.convert("RGBA"))
    channels, height, width = spec["shape"]
    image = image.convert("L" if image.mode in "1L" else "RGB").convert("L" if channels == 1 else "RGB")
    w, h = image.size
    if spec["fit"] == "crop":
        w, h = max(1, min(w, round(h * width / height))), max(1, min(h, round(w * height / width)))
    left, top = (image.width - w) // 2, (image.height - h) // 2
    image = image.resize((width, height), Image.Resampling.LANCZOS, (left, top, left + w, top + h))
    return np.array(image).reshape(height, width, channels).transpose(2, 0, 1)[None]


def opaque(image: Any) -> Any:
    """An RGBA image on white, or on black if nothing would be visible on white."""
    import numpy as np
    from PIL import Image

    over = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    faintest, strongest = image.getchannel("A").getextrema()
    if faintest < 255 and strongest and np.asarray(over).min() >= FAINT:
        return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")
    return over


def p_value(score: Any, usual: Any, tails: int) -> float:
    """The p-value of an image among held-out scores. score: by the model of each held-out score, [n]."""
    if not (abs(score) < math.inf).all():
        raise ValueError("its score is not finite")
    near = TIE * abs(score)
    high, low = 1 + int((usual >= score - near).sum()), 1 + int((usual <= score + near).sum())
    return min(1.0, (high if tails == 1 else min(2 * high - 1, 2 * low)) / (len(usual) + 1))


def drift(scores: list[Any], model: Any, usual: Any) -> float:
    """The p-value that images and held-out ones are exchangeable as a whole, by the ranks of their scores
    (Mann & Whitney 1947). scores: of each image by all models. model: that of each held-out score."""
    m, n = len(scores), len(usual)
    above = sum(float((s[model] > usual).mean() + (s[model] == usual).mean() / 2) for s in scores) / m
    z = (above - 0.5) / math.sqrt((n + m + 1) / (12 * n * m))
    return math.erfc(abs(z) / math.sqrt(2))


def rate(text: str, n: int) -> float:
    """The rate that a text such as `1%` or `0.01` states."""
    try:
        fpr = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        fail(f"--fpr {text} is no rate, such as 1% or 0.01")
    if not (1 - ROUNDING) / (n + 1) <= fpr <= 0.99:
        least = math.ceil(1e4 / (n + 1) - ROUNDING) / 100  # rounded up, so that it can be typed
        fail(f"{n} held-out scores allow --fpr {least:g}% to 99%")
    return fpr


def reason(e: Exception) -> str:
    text = str(e)
    return text if text and isinstance(e, (OSError, ValueError)) else f"{type(e).__name__}: {text}"


def test_image(shape: Sequence[int]) -> Any:
    """A pattern whose scores are those of the export if this machine computes them correctly."""
    import numpy as np

    return (np.arange(math.prod(shape)) * 37 % 251).astype(np.uint8).reshape(1, *shape)


def self_test(spec: dict[str, Any], graph: Any) -> int:
    """Compares the scores of the test image with those of the export. Returns the exit code."""
    import numpy as np

    scores = graph.run(["score"], {"image": test_image(spec["shape"])})[0][0]
    if not np.allclose(scores, spec["test_scores"], rtol=CHECK_TOLERANCE, atol=CHECK_TOLERANCE):
        fail("the scores of the test image differ from those of the export")
    print(f"the alarm works: {len(scores)} scores of the test image are those of the export")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Judges images by an exported alarm.")
    parser.add_argument("pictures", type=Path, nargs="?", help="a folder, or an image")
    parser.add_argument("--check", action="store_true", help="test that this machine computes the scores")
    parser.add_argument("--fpr", default="1%", help="share of good images that may be flagged")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    try:
        spec, graph, table = load(Path(__file__).resolve().parent)
    except ImportError as e:
        fail(f"{e}; install the packages numpy, onnxruntime and pillow")
    except Exception as e:  # JSON, numpy and onnxruntime raise many kinds
        fail(f"the alarm is damaged, export it again: {reason(e)}")
    if chosen.check:
        return self_test(spec, graph)
    if chosen.pictures is None:
        fail("which images? judge.py FOLDER, or judge.py --check")
    model, usual = table[:, 0].astype(int), table[:, 1]
    fpr, began = rate(chosen.fpr, len(usual)), time.perf_counter()
    paths, unread, others = find(chosen.pictures, spec["suffixes"])
    if not (paths or unread) or not os.path.lexists(chosen.pictures):
        fail(f"no images in {chosen.pictures}: files ending in {' '.join(spec['suffixes'])}")
    unread += others
    files: list[dict[str, Any]] = []
    scores: list[Any] = []
    for path in paths:
        try:
            score = graph.run(["score"], {"image": read(path, spec)})[0][0]
            p = p_value(score[model], usual, spec["tails"])
        except Exception as e:  # Pillow and onnxruntime raise many kinds
            unread.append((str(path), reason(e)))
            continue
        scores.append(score)
        flagged = p <= fpr * (1 + ROUNDING)
        files.append({"file": str(path), "p": p, "flagged": flagged})
        if not chosen.json:
            print(f"{p:.4f} {'!' if flagged else ' '} {shown(str(path))}", flush=True)
    count, each = sum(row["flagged"] for row in files), (time.perf_counter() - began) / max(1, len(files))
    if (
        len(scores) >= MIN_DRIFT_IMAGES
        and 2 * count <= len(files)
        and (chance := drift(scores, model, usual)) < DRIFT_LEVEL
    ):
        print(f"today differs as a whole (p {chance:.1g}): light, focus, camera?", file=sys.stderr)
    if chosen.json:
        rows = [{"file": name, "error": why} for name, why in unread]
        print(json.dumps({"fpr": fpr, "flagged": count, "files": files, "unread": rows}), flush=True)
    for name, why in unread:
        print(f"not read: {shown(name)}: {shown(why)}", file=sys.stderr)
    summary = f"{count} of {len(files)} flagged (!), {len(unread)} not read, {each:.4f} s per image"
    print(summary, file=sys.stderr)
    return 6 if count or unread else 0


def run() -> int:
    """The exit code of `main`, also if it is interrupted."""
    warnings.simplefilter("ignore")  # Pillow's, about images that it reads
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for names that the terminal cannot show
    try:
        return main()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        mute()
        return 141
    except OSError as e:  # the disk of stdout is full
        print(f"error: {shown(str(e))}", file=sys.stderr)
        mute()
        return 2


def mute() -> None:
    """Discards what Python would write at its end, which would fail again."""
    number = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(number, stream.fileno())


if __name__ == "__main__":
    sys.exit(run())
