"""python judge.py FOLDER [--fpr 1%] [--json]: exit code 6 if any is flagged or skipped, else 0; 2: error"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


def read(path: Path, shape: list[int], fit: str) -> np.ndarray:
    image, (channels, height, width) = ImageOps.exif_transpose(Image.open(path)), shape
    if image.mode[0] in "IF":
        raise ValueError("more than 8 bits per pixel")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("L" if image.mode in "1L" else "RGB").convert("L" if channels == 1 else "RGB")
    w, h = image.size
    w, h = (min(w, round(h * width / height)), min(h, round(w * height / width))) if fit == "crop" else (w, h)
    left, top = (image.width - w) // 2, (image.height - h) // 2
    image = image.resize((width, height), Image.Resampling.LANCZOS, (left, top, left + w, top + h))
    return np.array(image).reshape(height, width, channels).transpose(2, 0, 1)[None]


def main(here: Path = Path(__file__).resolve().parent) -> int:
    import onnxruntime

    parser = argparse.ArgumentParser(description="Judges images with an exported alarm.")
    parser.add_argument("pictures", type=Path, help="a folder, or an image")
    parser.add_argument("--fpr", default="1%", help="share of good images that may be flagged")
    parser.add_argument("--json", action="store_true")
    chosen, spec, files, skipped = parser.parse_args(), json.loads((here / "alarm.json").read_text()), [], []
    model, usual = np.loadtxt(here / "held_out.csv", delimiter=",", skiprows=1, ndmin=2).T
    graph, by, n = onnxruntime.InferenceSession(here / "alarm.onnx"), model.astype(int), len(usual)
    number, top, began = chosen.fpr.removesuffix("%"), chosen.pictures, time.perf_counter()
    fpr = float(number) / 100 ** (number != chosen.fpr) if number.replace(".", "", 1).isdecimal() else 1.0
    if not (1 - 1e-9) / (n + 1) <= fpr <= 0.99:
        sys.exit(print(f"{n} held-out scores allow --fpr {100 / (n + 1):.3g}% to 99%", file=sys.stderr) or 2)
    visible = (p for p in top.rglob("*.[pPjJ]*[gG]") if "/." not in f"/{p.relative_to(top).as_posix()}")
    for path in sorted(visible) or [top]:  # png, jpg, jpeg
        try:
            score = graph.run(["score"], {"image": read(path, spec["shape"], spec["fit"])})[0][0][by]
        except (OSError, SyntaxError, ValueError) as e:
            skipped.append(f"skipped: {path}: {'no PNG or JPEG in it' if path.is_dir() else e}\n")
            continue
        near = np.where(np.isfinite(score), 1e-5 * abs(score), 0)  # scores are equal up to rounding
        high, low = 1 + (~(usual < score - near)).sum(), 1 + (usual <= score + near).sum()
        p = float(min(1, (high if spec["tails"] == 1 else min(2 * high - 1, 2 * low)) / (n + 1)))
        files.append({"file": str(path), "p": p, "flagged": (flagged := p <= fpr * (1 + 1e-9))})
        print(*([] if chosen.json else [f"{p:.4f} {' !'[flagged]} {path}\n"]), end="")
    each, count = (time.perf_counter() - began) / max(1, len(files)), len([x for x in files if x["flagged"]])
    print(*skipped, f"{count} of {len(files)} flagged (!), {each:.4f} s per image", sep="", file=sys.stderr)
    print(*([json.dumps({"fpr": fpr, "flagged": count, "files": files})] if chosen.json else []), end="")
    return 2 if not files else 6 if count or skipped else 0


if __name__ == "__main__":
    sys.exit(main())
