"""Peers' own MNIST examples beside ours, each for as many CPU-minutes of one core, by one judge.

python tests/tools/equal_time.py [--minutes 8] [-n 2000] [--calls 20] [--out FOLDER] [PEER…]

Nets, optimizers, batches, losses and samplers of the peers are those of their packages' examples and
defaults, but that denoising-diffusion-pytorch draws by `--calls` network calls: 20 are what our `ddpm` takes.
The packages are those of `pip install -e '.[peers]'`. What is done stands in FOLDER, and our runs as
`peer-MODEL-8min` among the runs: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timing import row

ONE_CORE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
GOAL = 2.0  # our distance is to be so many times less than a peer's


class TimeUp(Exception):
    """The CPU time of a training is spent."""


class Clock:
    """A training's CPU time, with that of the processes that load its data.

    seconds: how long it may take.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.start()

    def start(self) -> None:
        """Begins to count here: what was done before is no training."""
        self.steps, self.spent, self.began = 0, 0.0, self.now()

    def now(self) -> float:
        import psutil

        me = psutil.Process()
        times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
        return sum(found.user + found.system for found in times)

    def tick(self) -> None:
        """Counts a step. Raises TimeUp."""
        self.spent = self.now() - self.began
        if self.spent > self.seconds:
            raise TimeUp
        self.steps += 1


@dataclass(frozen=True)
class Peer:
    """A package's example and our model beside it.

    train: (images uint8 [N, 1, 28, 28], labels [N], clock, n, calls, folder) → n samples in [0, 1].
    model: ours.
    words: options of `gz train` beside the common ones.
    """

    train: Callable[..., Any]
    model: str
    words: tuple[str, ...] = ()


def denoising_diffusion(images, labels, clock, n, calls, folder):
    """Its `Trainer` on its U-Net of 64 channels, with its defaults; 32 pixels wide, as the net halves thrice.
    Digits are not flipped."""
    import numpy as np
    import torch
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet
    from PIL import Image

    class Timed(GaussianDiffusion):
        def forward(self, *args, **kwargs):
            clock.tick()
            return super().forward(*args, **kwargs)

    pictures = folder / "pictures"
    pictures.mkdir()
    for i, image in enumerate(np.pad(images[:, 0], ((0, 0), (2, 2), (2, 2)))):
        Image.fromarray(image).save(pictures / f"{i:05d}.png", compress_level=0)
    model = Timed(Unet(dim=64, dim_mults=(1, 2, 4, 8), channels=1), image_size=32, sampling_timesteps=calls)
    trainer = Trainer(
        model,
        pictures,
        augment_horizontal_flip=False,
        train_num_steps=10**9,
        save_and_sample_every=10**9,
        calculate_fid=False,
        results_folder=folder / "results",
    )
    clock.start()
    until_time_is_up(trainer.train)
    sampler = trainer.ema.ema_model.eval()
    sizes = [50] * (n // 50) + [n % 50] * (n % 50 > 0)
    return torch.cat([sampler.sample(batch_size=size) for size in sizes])[:, :, 2:-2, 2:-2]


def torchcfm(images, labels, clock, n, calls, folder):
    """Its notebook of MNIST: a class-conditional U-Net of 32 channels, batches of 128, dopri5."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher
    from torchcfm.models.unet import UNetModel
    from torchdiffeq import odeint

    x, y = torch.from_numpy(images) / 127.5 - 1, torch.from_numpy(labels)
    loader = DataLoader(TensorDataset(x, y), batch_size=128, shuffle=True, drop_last=True)
    net = UNetModel(dim=(1, 28, 28), num_channels=32, num_res_blocks=1, num_classes=10, class_cond=True)
    matcher, optimizer = ConditionalFlowMatcher(sigma=0.0), torch.optim.Adam(net.parameters())
    clock.start()

    def train() -> None:
        while True:
            for target, label in loader:
                clock.tick()
                t, at, velocity = matcher.sample_location_and_conditional_flow(
                    torch.randn_like(target), target
                )
                optimizer.zero_grad()
                (net(t, at, label) - velocity).square().mean().backward()
                optimizer.step()

    until_time_is_up(train)
    net.eval()
    drawn, times = [], torch.linspace(0, 1, 2)
    with torch.no_grad():
        for label in (torch.arange(n) % 10).split(100):
            start = torch.randn(len(label), 1, 28, 28)
            path = odeint(
                lambda t, x, label=label: net(t, x, label),
                start,
                times,
                atol=1e-4,
                rtol=1e-4,
                method="dopri5",
            )
            drawn.append(path[-1])
    return (torch.cat(drawn) + 1) / 2


def pythae(images, labels, clock, n, calls, folder):
    """Its VAE on its convolutional nets for MNIST, trained by its pipeline with the README's settings, and
    its sampler of the prior."""
    import torch
    from pythae.models import VAE, VAEConfig
    from pythae.models.nn.benchmarks.mnist import Decoder_Conv_AE_MNIST, Encoder_Conv_VAE_MNIST
    from pythae.pipelines import TrainingPipeline
    from pythae.samplers import NormalSampler
    from pythae.trainers import BaseTrainerConfig

    class Timed(VAE):
        def forward(self, *args, **kwargs):
            clock.tick()
            return super().forward(*args, **kwargs)

    config = VAEConfig(input_dim=(1, 28, 28), latent_dim=16)
    model = Timed(config, Encoder_Conv_VAE_MNIST(config), Decoder_Conv_AE_MNIST(config))
    how = BaseTrainerConfig(
        output_dir=str(folder / "results"),
        num_epochs=10**6,
        learning_rate=1e-3,
        per_device_train_batch_size=200,
        optimizer_cls="AdamW",
        optimizer_params={"weight_decay": 0.05, "betas": (0.91, 0.995)},
        no_cuda=True,
    )
    pipeline = TrainingPipeline(model, how)
    clock.start()
    until_time_is_up(lambda: pipeline(torch.from_numpy(images) / 255))
    return NormalSampler(model.eval()).sample(num_samples=n)


def until_time_is_up(train: Callable[[], None]) -> None:
    try:
        train()
    except TimeUp:
        return
    raise RuntimeError("the training ended before its time")


PEERS = {
    "denoising-diffusion-pytorch": Peer(denoising_diffusion, "ddpm"),
    "torchcfm": Peer(torchcfm, "cfm"),
    "pythae": Peer(pythae, "vae", ("--set", "data.levels=256")),
}


def train_peer(name: str, minutes: float, n: int, calls: int, out: Path) -> None:
    """Trains a peer in this process; writes its samples and a JSON of what it took."""
    import numpy as np
    import torch

    from gzcli.data.packs.open import open_pack

    torch.set_num_threads(1)
    torch.manual_seed(0)
    pack, clock = open_pack("mnist"), Clock(60 * minutes)
    images, labels = np.array(pack.images("train")), np.array(pack.labels("train"))
    with tempfile.TemporaryDirectory() as folder:
        samples = PEERS[name].train(images, labels, clock, n, calls, Path(folder))
    pixels = (255 * samples.clamp(0, 1)).round().to(torch.uint8)
    np.savez_compressed(out, samples=pixels.permute(0, 2, 3, 1).numpy())
    out.with_suffix(".json").write_text(json.dumps({"steps": clock.steps, "cpu_seconds": clock.spent}))


def run(*words: str) -> str:
    """A program's stdout. Raises CalledProcessError."""
    how: dict[str, Any] = {"check": True, "stdout": subprocess.PIPE, "text": True}
    return subprocess.run([sys.executable, *words], env=os.environ | ONE_CORE, **how).stdout


def compare(names: list[str], minutes: float, n: int, calls: int, out: Path) -> None:
    """Trains ours and theirs and benches each pair in one run; prints a line for each pair and writes all of
    them into `peers.csv`. Every part that is done stands in `out` or among the runs, and the same command
    goes on from there."""
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for name in names:
        kept = out / f"{name}-{minutes:g}min-{n}-row.json"
        if not kept.exists():
            kept.write_text(json.dumps(pair(name, minutes, n, calls, out)))
        found = json.loads(kept.read_text())
        lines.append(found)
        shown = f"{found['our_fd']:.1f}, theirs {found['their_fd']:.1f}: {found['ratio']:.2f} ×"
        title = f"{found['model']} {minutes:g} min: {name}"
        row(title, f"{shown} (floor {found['floor']:.1f})", f"≥ {GOAL:g} ×", found["ratio"] >= GOAL)
        with open(out / "peers.csv", "w", newline="") as f:
            writer = csv.DictWriter(f, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)
    print(f"files: {out}")


def pair(name: str, minutes: float, n: int, calls: int, out: Path) -> dict[str, Any]:
    """The row of a peer: both are trained where they are not yet, and then judged together. The peer has as
    long as ours has taken, where this was more than was asked for."""
    peer, npz = PEERS[name], out / f"{name}-{minutes:g}min-{n}.npz"
    alias, ours = train_ours(peer, minutes)
    if not npz.with_suffix(".json").exists():
        equal = str(max(minutes, ours["cpu_seconds"] / 60))
        words = ("--train", name, "--minutes", equal, "-n", str(n), "--calls", str(calls))
        run(__file__, *words, "--out", str(npz))
    theirs = json.loads(npz.with_suffix(".json").read_text())
    words = ("bench", alias, str(npz), "--data", "mnist", "-n", str(n), "--metrics", "fd,kid_lenet,prc_lenet")
    result = json.loads(run("-m", "gzcli", *words, "--cpu", "--json"))
    npz.with_name(f"{npz.stem}-bench.json").write_text(json.dumps(result, indent=1))
    own, other = (one["metrics"]["fd"] for one in result["rows"])
    known = {"peer": name, "model": peer.model, "minutes": minutes, "n": n, "calls": calls}
    found = {"our_fd": own, "their_fd": other, "floor": result["floor"]["fd"], "ratio": other / own}
    return {
        **known,
        **found,
        **{f"our_{key}": round(value) for key, value in ours.items()},
        **{f"their_{key}": round(value) for key, value in theirs.items()},
    }


def train_ours(peer: Peer, minutes: float) -> tuple[str, dict[str, float]]:
    """The alias of our run and what it took. It is trained, or goes on where it is not finished yet.

    `train.clock: cpu` counts what `Clock` does, the work of cores. Of its minutes a tenth is kept for
    validation and pictures, which the peers do without.
    """
    from gzcli.store.runs import by_name

    alias = f"peer-{peer.model}-{minutes:g}min".replace(".", "_")
    found = by_name(alias)
    if found is None:
        how = ("--minutes", str(minutes), "--set", "train.clock=cpu", "--cpu", "--name", alias)
        run("-m", "gzcli", "train", peer.model, "--data", "mnist", *how, *peer.words, "--quiet")
    elif found.state != "finished":
        run("-m", "gzcli", "train", alias, "--resume", "--quiet")
    known = by_name(alias).status()
    return alias, {"steps": known["steps"], "cpu_seconds": known["work"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("peers", nargs="*", choices=[*PEERS, []], metavar="PEER", help=", ".join(PEERS))
    parser.add_argument("--minutes", type=float, default=8.0, help="CPU-minutes of each training")
    parser.add_argument("-n", type=int, default=2000, help="samples of each")
    parser.add_argument("--calls", type=int, default=20, help="network calls of a sample by diffusion")
    parser.add_argument("--out", type=Path, default=Path("peers"), help="where samples and table go")
    parser.add_argument("--train", choices=PEERS, help=argparse.SUPPRESS)  # one peer, in a process of its own
    given = parser.parse_args()
    if given.train:
        train_peer(given.train, given.minutes, given.n, given.calls, given.out)
    else:
        compare(given.peers or list(PEERS), given.minutes, given.n, given.calls, given.out.resolve())


if __name__ == "__main__":
    main()
