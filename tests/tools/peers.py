"""Other packages' own examples on MNIST, trained for a few CPU-minutes of one core: rows for `gz bench`.

python tests/tools/peers.py train PEER --out FILE.npz [--set mnist] [--minutes 8] [-n 2000] [--data MIRROR]
gz bench FILE.npz … --data mnist

A peer trains on the images of train and validation (60,000 of mnist) as its own example says. `FILE.json`
holds every setting, what differs from the example, steps and CPU seconds. The packages are those of
`pip install -e '.[peers]'`. `scikit-learn` is no peer but the simplest model, for each set with a league.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ONE_CORE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
SEED = 0


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
        return sum(each.user + each.system for each in times)

    def tick(self) -> None:
        """Counts a step. Raises TimeUp."""
        self.spent = self.now() - self.began
        if self.spent > self.seconds:
            raise TimeUp
        self.steps += 1

    def end(self, steps: int) -> None:
        """Ends a training that does not use the whole time."""
        self.spent, self.steps = self.now() - self.began, steps

    def run(self, train: Callable[[], Any]) -> None:
        """Trains until the time is up."""
        self.start()
        try:
            train()
        except TimeUp:
            return
        raise RuntimeError("the training ended before its time")


Draw = Callable[[Any], Any]  # labels [n], which some peers heed → samples [n, C, H, W] in [0, 1]


@dataclass(frozen=True)
class Peer:
    """A package's example.

    train: (images uint8 [N, C, H, W], labels [N], settings, clock, folder) → how to draw.
    example: where the package shows these settings.
    changed: what is not as there.
    conditional: whether it draws by labels, which are then written beside the samples.
    title: what its row is called, if no model of gz is comparable.
    """

    train: Callable[..., Draw]
    package: str
    example: str
    settings: dict[str, Any]
    changed: str = ""
    conditional: bool = False
    title: str = ""


def denoising_diffusion(images, labels, settings, clock, folder) -> Draw:
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
    model = Timed(Unet(channels=1, **settings["net"]), image_size=32, **settings["diffusion"])
    never = {"train_num_steps": 10**9, "save_and_sample_every": 10**9, "calculate_fid": False}
    trainer = Trainer(model, pictures, results_folder=folder / "results", **never, **settings["trainer"])
    clock.run(trainer.train)
    sampler = trainer.ema.ema_model.eval()

    def draw(labels) -> torch.Tensor:
        drawn = [sampler.sample(batch_size=len(some)) for some in labels.split(50)]
        return torch.cat(drawn)[:, :, 2:-2, 2:-2]

    return draw


def torchcfm(images, labels, settings, clock, folder) -> Draw:
    import torch
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher
    from torchcfm.models.unet import UNetModel
    from torchdiffeq import odeint

    net = UNetModel(dim=(1, 28, 28), num_classes=10, class_cond=True, **settings["net"])
    matcher, optimizer = (
        ConditionalFlowMatcher(sigma=0.0),
        torch.optim.Adam(net.parameters(), **settings["adam"]),
    )

    def train() -> None:
        for x, label in batches(images, labels, settings["batch_size"]):
            clock.tick()
            target = 2 * x - 1
            t, at, velocity = matcher.sample_location_and_conditional_flow(torch.randn_like(target), target)
            optimizer.zero_grad()
            (net(t, at, label) - velocity).square().mean().backward()
            optimizer.step()

    clock.run(train)
    net.eval()

    def draw(labels) -> torch.Tensor:
        drawn, times = [], torch.linspace(0, 1, settings["sampler"]["steps"] + 1)
        for y in labels.split(100):
            start = torch.randn(len(y), 1, 28, 28)
            solver = settings["sampler"]["method"]
            drawn.append(odeint(lambda t, x, y=y: net(t, x, y), start, times, method=solver)[-1])
        return (torch.cat(drawn) + 1) / 2

    return draw


def pythae(images, labels, settings, clock, folder) -> Draw:
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

    config = VAEConfig(input_dim=(1, 28, 28), **settings["model"])
    model = Timed(config, Encoder_Conv_VAE_MNIST(config), Decoder_Conv_AE_MNIST(config))
    how = {"num_epochs": 10**6, "no_cuda": True, "seed": SEED, **settings["trainer"]}
    pipeline = TrainingPipeline(model, BaseTrainerConfig(output_dir=str(folder / "results"), **how))
    clock.run(lambda: pipeline(torch.from_numpy(images) / 255))
    sampler = NormalSampler(model.eval())
    return lambda labels: sampler.sample(num_samples=len(labels))


def normflows(images, labels, settings, clock, folder) -> Draw:
    import torch
    from normflows import MultiscaleFlow, distributions, flows
    from torch.nn.functional import pad

    levels, hidden = settings["net"]["levels"], settings["net"]["hidden"]
    bases, steps, merges = [], [], []
    for i in range(levels):  # from the latents to the data
        channels, side = 2 ** (levels - i), 32 // 2 ** (levels - i)  # of the latent that joins here
        blocks = [flows.GlowBlock(2 * channels, hidden) for _ in range(settings["net"]["steps"])]
        steps.append([*blocks, flows.Squeeze()])
        merges += [flows.Merge()] if i else []
        shape = (channels if i else 2 * channels, side, side)
        bases.append(distributions.ClassCondDiagGaussian(shape, 10))
    model = MultiscaleFlow(bases, steps, merges)
    optimizer = torch.optim.Adamax(model.parameters(), **settings["adamax"])

    def train() -> None:
        for x, label in batches(images, labels, settings["batch_size"]):
            clock.tick()
            x = pad(x, (2, 2, 2, 2)) * 255 / 256
            loss = model.forward_kld(x + torch.rand_like(x) / 256, label)
            optimizer.zero_grad()
            if loss.isfinite():
                loss.backward()
                optimizer.step()

    clock.run(train)

    def draw(labels) -> torch.Tensor:
        drawn = [model.sample(y=y)[0] for y in labels.split(100)]
        return torch.cat(drawn)[:, :, 2:-2, 2:-2]

    return draw


def scikit_learn(images, labels, settings, clock, folder) -> Draw:
    import torch
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    n, *shape = images.shape
    x = images.reshape(n, -1) / 255
    clock.start()
    pca = PCA(min(settings["dimensions"], n // 4), random_state=SEED)
    components = max(1, n // settings["images_per_gaussian"])
    mixture = GaussianMixture(components, max_iter=settings["steps"], random_state=SEED)
    mixture.fit(pca.fit_transform(x))
    clock.end(mixture.n_iter_)

    def draw(labels) -> torch.Tensor:
        codes, _ = mixture.sample(len(labels))
        return torch.from_numpy(pca.inverse_transform(codes).reshape(-1, *shape))[torch.randperm(len(labels))]

    return draw


def batches(images, labels, size: int):
    """Shuffled batches without end: x [size, 1, 28, 28] in [0, 1], y [size]."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    pairs = TensorDataset(torch.from_numpy(images) / 255, torch.from_numpy(labels))
    loader = DataLoader(pairs, size, shuffle=True, drop_last=True)
    while True:
        yield from loader


PEERS = {
    "denoising-diffusion-pytorch": Peer(
        denoising_diffusion,
        "denoising-diffusion-pytorch",
        "README.md, and the defaults of `Trainer`",
        {
            "net": {"dim": 64, "dim_mults": (1, 2, 4, 8)},
            "diffusion": {"timesteps": 1000, "sampling_timesteps": 10},
            "trainer": {
                "train_batch_size": 16,
                "train_lr": 1e-4,
                "ema_decay": 0.995,
                "augment_horizontal_flip": False,
            },
        },
        "batch 16 and lr 1e-4 are the trainer's defaults: its 32 × 2 make no 100 steps in 8 minutes, "
        "10 DDIM steps in the place of 250, digits are not flipped, padded to 32 pixels and cropped back",
    ),
    "torchcfm": Peer(
        torchcfm,
        "torchcfm",
        "examples/images/conditional_mnist.ipynb",
        {
            "net": {"num_channels": 32, "num_res_blocks": 1},
            "batch_size": 128,
            "adam": {"lr": 1e-3},
            "sampler": {"method": "euler", "steps": 20},
        },
        "20 Euler steps in the place of dopri5 at 1e-4, which takes longer than the training",
        conditional=True,
    ),
    "pythae": Peer(
        pythae,
        "pythae",
        "examples/scripts/training.py --dataset mnist --model_name vae, with its configs/mnist",
        {
            "model": {"latent_dim": 16, "reconstruction_loss": "mse"},
            "trainer": {"learning_rate": 1e-3, "per_device_train_batch_size": 100, "optimizer_cls": "Adam"},
            "sampler": {"prior": "normal"},
        },
    ),
    "normflows": Peer(
        normflows,
        "normflows",
        "examples/glow_colab.ipynb",
        {
            "net": {"levels": 3, "steps": 16, "hidden": 256},
            "batch_size": 128,
            "adamax": {"lr": 1e-3, "weight_decay": 1e-5},
            "sampler": {"temperature": 1},
        },
        "one channel in the place of three; padded to 32 pixels and cropped back",
        conditional=True,
    ),
    "scikit-learn": Peer(
        scikit_learn,
        "scikit-learn",
        "PCA and GaussianMixture",
        {"dimensions": 64, "images_per_gaussian": 600, "steps": 20},
        "20 steps in the place of 100, which take longer than a model of ours may train",
        title="PCA and Gaussian mixture",
    ),
}


def train(name: str, images, labels, seconds: float, n: int, out: Path) -> None:
    """Trains a peer in this process; writes its samples, and a JSON of what it is and took."""
    import numpy as np
    import torch

    from gzcli.core import devices

    torch.manual_seed(SEED)
    peer, clock = PEERS[name], Clock(seconds)
    with tempfile.TemporaryDirectory() as folder:
        draw = peer.train(images, labels, peer.settings, clock, Path(folder))
    began, classes = clock.now(), torch.arange(n) % 10
    with torch.no_grad():
        samples = draw(classes)
    facts = {
        **{key: value for key, value in asdict(peer).items() if key != "train"},
        "version": version(peer.package),
        "torch": torch.__version__,
        "machine": devices.cpu_name(),
        "images": len(images),
        "n": n,
        "steps": clock.steps,
        "train_cpu_seconds": round(clock.spent, 1),
        "sample_cpu_seconds": round(clock.now() - began, 1),
        "seed": SEED,
    }
    pixels = (255 * samples.clamp(0, 1)).round().to(torch.uint8)
    extras = {"labels": classes.numpy()} if peer.conditional else {}
    np.savez_compressed(out, samples=pixels.permute(0, 2, 3, 1).numpy(), **extras)
    out.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    command = parser.add_subparsers(required=True, metavar="train").add_parser("train")
    command.add_argument("peer", choices=PEERS)
    command.add_argument("--set", default="mnist", help="data set or path; the packages' examples fit mnist")
    command.add_argument("--minutes", type=float, default=8.0, help="CPU-minutes of the training")
    command.add_argument("-n", type=int, default=2000, help="samples")
    command.add_argument("--data", type=Path, help="folder that holds mnist/FILE, in the place of GZ_MIRROR")
    command.add_argument("--out", type=Path, required=True, help="npz of the samples")
    args = parser.parse_args()
    os.environ |= ONE_CORE
    if args.data:
        os.environ["GZ_MIRROR"] = args.data.resolve().as_uri()

    import numpy as np

    from gzcli.data.packs.open import open_pack

    pack = open_pack(args.set)
    # gz keeps 2,000 of the 60,000 official training images for validation
    images = np.concatenate([pack.images(split) for split in ("train", "val")])
    labels = np.concatenate([pack.labels(split) for split in ("train", "val")]) if pack.meta.classes else None
    args.out.parent.mkdir(parents=True, exist_ok=True)
    train(args.peer, images, labels, 60 * args.minutes, args.n, args.out)


if __name__ == "__main__":
    main()
