"""Each speed as a ratio against a baseline of the same run, interleaved, medians. Needs a quiet machine.

python tests/tools/speed.py [NAME…]  start demo trainer batches pixelcnn samplers prior peers pythae diffusion
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from itertools import count, islice
from pathlib import Path

from peer_steps import diffusion, peers, pythae
from timing import ROWS, interleaved, median, row, timed, times
from uncached import uncached_samples

SIDE, CODES = 28, 8  # sides of the images, and of the grids of codes, that are sampled


def start() -> None:
    """Wall time of whole processes, against an interpreter that does nothing."""
    bare = median(lambda: subprocess.run([sys.executable, "-c", ""]), 7)
    for words, bar in ((["--version"], 0.12), (["--help"], 0.20), (["list"], 0.30), (["list", "data"], 0.30)):
        call = [sys.executable, "-m", "gzcli", *words]
        took = median(lambda c=call: subprocess.run(c, check=True, capture_output=True), 7)
        shown = f"{1e3 * took:.0f} ms (bare python {1e3 * bare:.0f})"
        row(f"gz {' '.join(words)}", shown, f"≤ {1e3 * bar:.0f} ms", took <= bar)


def demo() -> None:
    """`gz train vae` on digits to its final picture, launch included."""
    call = [sys.executable, "-m", "gzcli", "train", "vae", "--data", "digits", "-q"]
    took = timed(lambda: subprocess.run(call, check=True, capture_output=True))
    row("gz train vae", f"{took:.1f} s", "≤ 60 s", took <= 60)


def trainer() -> None:
    """A step of the trainer against a bare loop with the same arithmetic, on the same weights and data."""
    for model, batch, most in (("vae", 64, 100), ("ddpm", 32, 10), ("glow", 32, 10)):
        trainer_of(model, batch, times(most))


def trainer_of(model: str, batch: int, block: int) -> None:
    import torch
    from helpers import recipe
    from helpers import trainer as make
    from zoo import Case

    from gzcli.core.sections import part_of
    from gzcli.core.types import BatchNoise
    from gzcli.engine.trained import build_model

    tree = recipe(Case(model, {}, batch=batch), steps=100_000, sets=("train.ema=0.999", "train.clip=1"))
    t = make(tree)
    t.begin()
    bare = build_model(part_of(tree), t.info).train()
    params = [p for p in bare.parameters() if p.requires_grad]
    shadow = [p.detach().clone() for p in params]
    with torch.no_grad():
        bare.on_start(t.batches.at(0))
    kind = type(t.optimizers["main"])
    fused = "Adam" in kind.__name__ and tree["optim"]["name"] != "adamax"
    optimizer = kind(params, lr=1e-4, **{"fused" if fused else "foreach": True})
    steps, trainer_steps = count(1), count(1)

    def loop() -> None:
        for step in islice(steps, block):
            data = t.batches.at(step)
            out = bare.loss(data.rows(slice(None), BatchNoise(0, step, "main", total=batch)))
            (out["loss"] if isinstance(out, dict) else out).backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch._foreach_lerp_(shadow, [p.detach() for p in params], 0.001)

    a, b, ratio = interleaved(lambda: [t.step(step) for step in islice(trainer_steps, block)], loop, 9)
    ms, extra = 1e3 * b / block, 1e3 * (a - b) / block
    small = ms < 20
    shown, bar = f"{ratio:.3f} × the bare loop, {extra:+.2f} ms", "≤ +0.5 ms" if small else "≤ 1.05 ×"
    row(f"trainer step, {model} ({ms:.1f} ms)", shown, bar, extra <= 0.5 if small else ratio <= 1.05)


def batches() -> None:
    """Batches from the pack against a DataLoader that opens a PNG an image."""
    import numpy as np
    import torch
    from PIL import Image

    from gzcli.data.packs.batches import TrainBatches, TrainImages
    from gzcli.data.packs.open import open_pack

    pack = open_pack("digits")
    images = np.asarray(pack.images("train"))
    folder = Path(tempfile.mkdtemp())
    for i, image in enumerate(images):
        Image.fromarray(image[0]).save(folder / f"{i}.png")

    class Pictures(torch.utils.data.Dataset):
        def __len__(self):
            return len(images)

        def __getitem__(self, i):
            with Image.open(folder / f"{i}.png") as im:
                return torch.from_numpy(np.array(im)).float().div(127.5).sub(1)[None]

    steps = len(images) // 64
    source = TrainBatches(TrainImages(pack, 256, torch.device("cpu"), seed=0), 64)
    a, _, ratio = interleaved(
        lambda: [source.at(i) for i in range(steps)],
        lambda: list(torch.utils.data.DataLoader(Pictures(), 64, drop_last=True)),
        7,
    )
    shown = f"{1 / ratio:.0f} × a PIL DataLoader ({64 * steps / a:,.0f} images/s)"
    row("batches of 64, 16×16", shown, "≥ 20 ×", 1 / ratio >= 20)


def pixelcnn() -> None:
    """Cached sampling against a pass of the whole net for each pixel."""
    import torch

    from gzcli.core.types import DataInfo, ImageNoise
    from gzcli.models import catalog

    for name, bars in (("pixelcnn", {1: 12, 8: 20, 16: 20}), ("pixelcnnpp", {1: 5, 16: 20})):
        model = catalog.load(name)(DataInfo((1, SIDE, SIDE), levels=256)).eval()
        for n, bar in bars.items():
            with torch.inference_mode():

                def draw(n=n, model=model):
                    return model.sample(n, noise=ImageNoise(0, range(n)))

                draw()
                cached = median(draw, 3)
                naive = timed(lambda n=n, model=model: uncached_samples(model, n, ImageNoise(0, range(n))))
            shown = f"cached {cached:.2f} s, naive {naive:.1f} s: {naive / cached:.0f} ×"
            row(f"{name}, {n} images of {SIDE}×{SIDE}", shown, f"≥ {bar} ×", naive / cached >= bar)


def samplers() -> None:
    """Few-step samplers against ancestral sampling with all its steps (timed on 50 of them)."""
    import torch

    from gzcli.core.types import DataInfo, ImageNoise, no_progress
    from gzcli.models import catalog
    from gzcli.models.base import group_options

    model = catalog.load("ddpm")(DataInfo((1, SIDE, SIDE))).eval()
    steps = times(50)
    with torch.inference_mode():

        def draw(sampler: str, steps: int):
            options = group_options(model.sample, {"sampler": sampler, "steps": steps})
            return model.sample(8, noise=ImageNoise(0, range(8)), progress=no_progress, **options)

        full = 1000 / steps * timed(lambda: draw("ancestral", steps))
        few = median(lambda: draw("dpmpp", 20), 3)
    shown = f"{full / few:.0f} × 1,000 ancestral steps"
    row("ddpm, DPM-Solver++ 20 steps", shown, "≈ 50 ×", full / few >= 40)


def prior() -> None:
    """A prior's sampling with kept keys and values against a pass over all codes so far for each code."""
    import torch

    from gzcli.core.types import DataInfo, ImageNoise, no_progress
    from gzcli.models import catalog

    info = DataInfo((1, 4 * CODES, 4 * CODES))
    tokenizer = catalog.load("vqvae").of(info, hidden=32, down=2, codes=128, dim=16)
    model = catalog.load("transformer").of(info, tokenizer=tokenizer, width=128, layers=4, heads=4).eval()
    n = 16

    def again() -> None:
        codes = torch.zeros(n, 1, dtype=torch.long)
        for _ in range(model.length):
            p = model(codes)[:, -1].softmax(-1)
            codes = torch.cat([codes[:, :-1], p.multinomial(1), codes[:, -1:]], 1)
        model.images(codes[:, :-1])

    with torch.inference_mode():
        cached, naive, ratio = interleaved(
            lambda: model.sample(n, noise=ImageNoise(0, range(n)), progress=no_progress), again, 5
        )
    shown = f"kept {cached:.2f} s, anew {naive:.2f} s: {1 / ratio:.1f} ×"
    row(f"transformer, 16 × {CODES**2} codes", shown, "≥ 5 ×", 1 / ratio >= 5)


ALL = (start, demo, trainer, batches, pixelcnn, samplers, prior, peers, pythae, diffusion)
PARTS = {part.__name__: part for part in ALL}

if __name__ == "__main__":
    if "GZ_HOME" not in os.environ:
        os.environ["GZ_HOME"] = tempfile.mkdtemp(prefix="gz-speed-")
    for name in sys.argv[1:] or PARTS:
        PARTS[name]()
    sys.exit(any(r[3] != "ok" for r in ROWS))
