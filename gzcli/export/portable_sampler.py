"""Draws images from an exported model, with numpy and onnxruntime alone.

    pip install numpy onnxruntime pillow
    python sample.py -n 16 --seed 0 --label 3

It is beside `model.json`, which says what is drawn and computed in which order, and the networks as ONNX.
The images are those of `gz sample` in fp32 of the same seed: noise is a function of (seed, image, draw).
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Call = Callable[[str, Mapping[str, np.ndarray]], list[np.ndarray]]  # network, inputs → outputs
WORD = np.uint64(0xFFFFFFFF)


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Four 32-bit words of each counter, uint64 [4, m] both (Salmon et al. 2011)."""
    c0, c1, c2, c3 = counter
    for i in range(10):
        k0, k1 = ((k + i * step) & 0xFFFFFFFF for k, step in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True))
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c2 = (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0), (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1)
        c1, c3 = p1 & WORD, p0 & WORD
    return np.stack([c0, c1, c2, c3])


def noise(kind: str, shape: list[int], n: int, seed: int, call: int) -> np.ndarray:
    """Draw number `call`, float32 [n, *shape]: standard "normal" numbers, or "uniform" ones in [0, 1)."""
    count = int(np.prod(shape))
    blocks = -(-count // 4)
    block, image = np.meshgrid(np.arange(blocks, dtype=np.uint64), np.arange(n, dtype=np.uint64))
    counter = np.stack([block, np.full_like(block, call), image & WORD, image >> np.uint64(32)])
    words = philox(counter.reshape(4, -1), (seed & 0xFFFFFFFF, seed >> 32)).reshape(4, n, blocks)
    u = (words >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24)
    if kind == "normal":  # Box and Muller
        radius, angle = np.sqrt(-2 * np.log(1 - u[0::2])), np.float32(2 * np.pi) * u[1::2]
        u = np.stack([np.cos(angle) * radius, np.sin(angle) * radius], 1).reshape(4, n, blocks)
    return u.transpose(1, 0, 2).reshape(n, -1)[:, :count].reshape(n, *shape).astype(np.float32)


def spread(n: int, seed: int, call: int) -> np.ndarray:
    """Draw number `call`, float32 [n] in [0, 1): multiples of the golden ratio from a random start."""
    turned = (np.arange(n, dtype=np.uint64) * np.uint64(0x9E3779B9) & WORD) >> np.uint64(8)
    start = noise("uniform", [], 1, seed, call)
    return (start + turned.astype(np.float32) * np.float32(2.0**-24)) % np.float32(1)


def combined(terms: list[list[float]], arrays: list[np.ndarray]) -> np.ndarray:
    """Σ factor · arrays[number] of the terms [number, factor], float32."""
    total = sum(np.float64(factor) * arrays[int(number)] for number, factor in terms)
    return np.asarray(total, np.float32)


def draw(spec: Mapping[str, Any], call: Call, n: int, seed: int = 0, labels: Any = None) -> np.ndarray:
    """n images, uint8 [n, H, W, C].

    spec: the content of `model.json`.
    labels: classes that the images take in turn; None: each class in turn.
    """
    condition: dict[str, np.ndarray] = {}
    if spec["classes"]:
        taken = np.asarray(labels if labels else range(len(spec["classes"])), np.int64)
        condition["y"] = taken[np.arange(n) % len(taken)]
        if spec["multilabel"]:
            condition["y"] = np.eye(len(spec["classes"]), dtype=np.float32)[condition["y"]]
    arrays: list[np.ndarray] = []  # noise and outputs of the network, in order
    draws = 0
    for step in spec["program"]:
        if step["do"] == "draw":
            arrays.append(noise(step["kind"], step["shape"], n, seed, draws))
            draws += 1
        elif step["do"] == "cluster":  # within the class, as often as among the training images
            y = condition.get("y", np.zeros(n, np.int64))
            ends = np.cumsum(step["shares"], axis=1, dtype=np.float32)[y]  # a row for each class
            u = spread(n, seed, draws) * ends[:, -1]
            place = (ends <= u[:, None]).sum(1).clip(max=ends.shape[1] - 1)
            condition["y"] = y * ends.shape[1] + place
            draws += 1
        elif step["do"] == "call":  # of a network that makes an image step by step
            x = combined(step["x"], arrays)
            scalars = {key: np.array([step[key]], np.float32) for key in ("alpha", "sigma") if key in step}
            feeds = {"x": x, "t": np.stack([np.float32(step["t"])] * n), **scalars, **condition}
            arrays += call("step", feeds)
        else:  # of one that makes an image of its noise
            arrays = call("step", {f"noise_{i}": value for i, value in enumerate(arrays)} | condition)
    x = combined(spec["result"], arrays)
    x = call("decode", {"x": x})[0] if spec["decode"] else x
    finite = np.isfinite(x).all((1, 2, 3))
    if not finite.any():
        raise FloatingPointError("no image is finite")
    if not finite.all():
        warnings.warn(f"{(~finite).sum()} of {n} images are not finite, and black", stacklevel=2)
    x = np.clip(np.where(finite[:, None, None, None], x, -1), -1, 1)
    return np.rint((x + 1) * np.float32(127.5)).astype(np.uint8).transpose(0, 2, 3, 1)


def networks(folder: Path) -> Call:
    """Calls the networks of a folder."""
    import onnxruntime

    sessions: dict[str, Any] = {}

    def call(name: str, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        if name not in sessions:
            sessions[name] = onnxruntime.InferenceSession(folder / f"{name}.onnx")
        names = {node.name for node in sessions[name].get_inputs()}
        return sessions[name].run(None, {key: value for key, value in feeds.items() if key in names})

    return call


def main() -> None:
    from PIL import Image

    parser = argparse.ArgumentParser(description="Draw images from an exported model.")
    parser.add_argument("-n", type=int, default=16, help="how many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label", type=int, action="append", help="number of a class; may be repeated")
    parser.add_argument("--out", type=Path, default=Path("images"), help="a folder")
    options = parser.parse_args()
    folder = Path(__file__).resolve().parent
    spec = json.loads((folder / "model.json").read_text())
    options.out.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(draw(spec, networks(folder), options.n, options.seed, options.label)):
        Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(options.out / f"{i:06d}.png")
    print(options.out)


if __name__ == "__main__":
    main()
