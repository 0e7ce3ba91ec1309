"""Parts of `make bench`: a step of ours against other packages' on equal nets. They are of `pip install -e
'.[peers]'`."""

from __future__ import annotations

from collections.abc import Callable

from timing import compare, interleaved, row, times

Step = Callable[[], None]
SHAPE, LATENT = (1, 28, 28), 16  # of the images and codes of pythae's nets


def batch_of(n: int, shape: tuple[int, ...], *, binary: bool = False):
    """A batch of n images of noise."""
    import torch

    from gzcli.core.types import Batch, BatchNoise

    x = torch.rand(n, *shape)
    x = 2 * (x.round() if binary else x) - 1
    return Batch(x, None, torch.arange(n), BatchNoise(0, 0, "main", total=n))


def ours() -> dict[str, Step]:
    """Our side of `peers`: a step of each model."""
    from gzcli.core.types import DataInfo
    from gzcli.models import catalog

    def step(name: str, n: int, side: int, **options) -> Step:
        batch = batch_of(n, (1, side, side))
        model = catalog.load(name).of(DataInfo((1, side, side)), **options).train()
        batch.extra |= model.prepare(batch) if hasattr(model, "prepare") else {}
        model.on_start(batch)
        return stepper(model, lambda: model.loss(batch)["loss"])

    couplings = {"scales": 1, "couplings": 7, "hidden": 32, "blocks": 2, "batch_norm": False, "logit": 0.0}
    tokenizer = catalog.load("vqvae").of(DataInfo((1, 32, 32)), hidden=32, down=2, codes=128, dim=16)
    gpt = {"tokenizer": tokenizer, "width": 128, "layers": 4, "heads": 4}
    return {
        "glow": step("glow", 32, 28, logit=1e-6),
        "realnvp": step("realnvp", 32, 28, **couplings),
        "transformer": step("transformer", 64, 32, **gpt),
    }


def peers() -> None:
    """A training step against the peers' packages with equal nets (`pip install 'gzcli[peers]'`)."""
    import torch

    from gzcli.models.normalizing_flow.realnvp import ResNet

    mine, images = ours(), torch.rand(32, 1, 28, 28)

    class Unconditional(torch.nn.Module):
        """A net as nflows calls it: with a context, which is None."""

        def __init__(self, net: torch.nn.Module):
            super().__init__()
            self.net = net

        def forward(self, x, context=None):
            return self.net(x)

    import normflows
    from nflows import flows, transforms
    from nflows.distributions.normal import StandardNormal
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    levels, merges, priors = [], [], []
    for i, (channels, side) in enumerate(((8, 7), (4, 14))):  # from the latents to the data
        blocks = [normflows.flows.GlowBlock(channels, 64, split_mode="channel", scale=True) for _ in range(8)]
        levels.append([*blocks, normflows.flows.Squeeze()])
        merges += [normflows.flows.Merge()] if i else []
        priors.append(
            normflows.distributions.DiagGaussian((channels if i == 0 else channels // 2, side, side))
        )
    glow = normflows.MultiscaleFlow(priors, levels, merges, transform=normflows.transforms.Logit(1e-6))
    theirs = stepper(glow, lambda: -glow.log_prob(images, None).mean())
    compare("glow, 2 × 8 steps, 64 channels: normflows", mine["glow"], theirs)

    couplings = [transforms.SqueezeTransform()]
    for k in range(8):
        mask = torch.tensor([1.0, -1.0, -1.0, 1.0]) * (-1) ** k
        couplings.append(
            transforms.AffineCouplingTransform(mask, lambda i, o: Unconditional(ResNet(i, o, 32, 2)))
        )
    net = flows.Flow(transforms.CompositeTransform(couplings), StandardNormal([4, 14, 14]))
    theirs = stepper(net, lambda: -net.log_prob(images).mean())
    compare("realnvp, 8 couplings: nflows", mine["realnvp"], theirs)

    gpt = AutoregressiveWrapper(
        TransformerWrapper(
            num_tokens=128, max_seq_len=65, attn_layers=Decoder(dim=128, depth=4, heads=4, attn_dim_head=32)
        )
    )
    codes = torch.randint(128, (64, 65))
    theirs = stepper(gpt, lambda: gpt(codes))
    compare("transformer, 64 × 64 codes: x-transformers", mine["transformer"], theirs)


def ours_of_pythae() -> dict[str, Step]:
    """Our side of `pythae`: a step of each model, of all its phases."""
    import torch

    from gzcli.core.types import DataInfo
    from gzcli.models import catalog

    batch = batch_of(128, SHAPE, binary=True)

    def step(name: str, **options) -> Step:
        nets = {"net": "mlp", "hidden": (512, 512), "latent": LATENT}
        model = catalog.load(name).of(DataInfo(SHAPE, 2), **nets, **options)
        phases = [(phase.name, phase.parameters()) for phase in model.phases()]
        optimizers = {name: torch.optim.Adam(params, fused=True) for name, params in phases}

        def step() -> None:
            for name, params in phases:
                for phase, rest in phases:
                    torch.nn.ParameterList(rest).requires_grad_(phase == name)
                model.loss(batch, name)["loss"].backward()
                optimizers[name].step()
                torch._foreach_zero_([p.grad for p in params])

        return step

    return {"vae": step("vae"), "aae": step("aae", posterior="gaussian", code_weight=1.0)}


def pythae() -> None:
    """A step of vae and aae against pythae's on the same networks, each with its own optimizers."""
    import torch
    from pythae.models import VAE, Adversarial_AE, Adversarial_AE_Config, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseDiscriminator, BaseEncoder

    from gzcli.models.vae.base import MLPDecoder, MLPEncoder

    mine, x = ours_of_pythae(), torch.rand(128, *SHAPE).round()

    class Encode(BaseEncoder):
        def __init__(self):
            super().__init__()
            self.net = MLPEncoder(SHAPE, (512, 512), 2 * LATENT)

        def forward(self, x):
            mu, logvar = self.net(x).chunk(2, 1)
            return ModelOutput(embedding=mu, log_covariance=logvar)

    class Decode(BaseDecoder):
        def __init__(self):
            super().__init__()
            self.net = MLPDecoder(SHAPE, (512, 512), LATENT, 1)

        def forward(self, z):
            return ModelOutput(reconstruction=self.net(z).sigmoid())

    class Judge(BaseDiscriminator):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(
                torch.nn.Linear(LATENT, 256),
                torch.nn.GELU(),
                torch.nn.Linear(256, 256),
                torch.nn.GELU(),
                torch.nn.Linear(256, 1),
                torch.nn.Sigmoid(),
            )

        def forward(self, z):
            return ModelOutput(embedding=self.net(z))

    def theirs(model, losses: dict[str, list]) -> Step:
        optimizers = [torch.optim.Adam(params) for params in losses.values()]

        def step() -> None:
            out = model({"data": x})
            for optimizer in optimizers:
                optimizer.zero_grad()
            for name in losses:
                getattr(out, name).backward(retain_graph=len(losses) > 1)
            for optimizer in optimizers:
                optimizer.step()

        return step

    config = {"input_dim": SHAPE, "latent_dim": LATENT, "reconstruction_loss": "bce"}
    model = VAE(VAEConfig(**config), Encode(), Decode())
    compare("vae: pythae", mine["vae"], theirs(model, {"loss": list(model.parameters())}))
    model = Adversarial_AE(Adversarial_AE_Config(**config), Encode(), Decode(), Judge())
    parts = {
        "autoencoder_loss": [*model.encoder.parameters(), *model.decoder.parameters()],
        "discriminator_loss": list(model.discriminator.parameters()),
    }
    compare("aae: pythae", mine["aae"], theirs(model, parts))


def ours_of_diffusion():
    """Our side of `diffusion`: the model, its batch, and a step."""
    import torch

    from gzcli.core.types import DataInfo
    from gzcli.models import catalog

    batch = batch_of(16, SHAPE)
    model = catalog.load("ddpm").of(DataInfo(SHAPE), prediction="eps", schedule="linear")
    for p in model.parameters():  # off the start at zero
        p.data += 0.02 * torch.randn_like(p)
    return model, batch, stepper(model, lambda: model.loss(batch)["loss"])


def diffusion() -> None:
    """A training step of ddpm and its sampling against diffusers' and denoising-diffusion-pytorch's, on the
    same weights."""
    import torch
    from denoising_diffusion_pytorch import GaussianDiffusion
    from diffusers import DDPMPipeline
    from torch.nn import functional as F

    from gzcli.core.types import DataInfo, ImageNoise
    from gzcli.models import catalog
    from gzcli.models.base import group_options

    model, batch, mine = ours_of_diffusion()
    x, n = batch.x, len(batch)
    pipeline: DDPMPipeline = model.to_diffusers()
    pipeline.set_progress_bar_config(disable=True)

    class Net(torch.nn.Module):
        """Our U-Net as denoising-diffusion-pytorch calls it."""

        channels = out_dim = 1
        self_condition = random_or_learned_sinusoidal_cond = False

        def __init__(self):
            super().__init__()
            self.net = catalog.load("ddpm")(DataInfo(SHAPE)).net
            self.net.load_state_dict(model.net.state_dict())

        def forward(self, x, t, x_self_cond=None):
            return self.net(x, t)

    steps = times(20)
    peer = GaussianDiffusion(
        Net(), image_size=28, objective="pred_noise", beta_schedule="linear", sampling_timesteps=steps
    )

    def by_diffusers() -> torch.Tensor:
        noise, t = torch.randn_like(x), torch.randint(1000, (n,))
        return F.mse_loss(pipeline.unet(pipeline.scheduler.add_noise(x, noise, t), t).sample, noise)

    compare("ddpm, a step of 16: diffusers", mine, stepper(pipeline.unet, by_diffusers))
    mine = stepper(model, lambda: model.loss(batch)["loss"])
    compare(
        "ddpm, a step of 16: denoising-diffusion-pytorch", mine, stepper(peer, lambda: peer(0.5 * x + 0.5))
    )
    model.eval(), pipeline.unet.eval(), peer.eval()

    def draw() -> torch.Tensor:
        options = group_options(model.sample, {"sampler": "ddim", "steps": steps, "spacing": "trailing"})
        return model.sample(n, noise=ImageNoise(0, range(n)), **options)

    for name, theirs in (
        ("diffusers", lambda: pipeline(batch_size=n, num_inference_steps=steps, output_type="np")),
        ("denoising-diffusion-pytorch", lambda: peer.sample(batch_size=n)),
    ):
        with torch.inference_mode():
            a, b, ratio = interleaved(draw, theirs, 5)
        row(
            f"16 images, {steps} DDIM steps: {name}",
            f"{a:.2f} s, theirs {b:.2f}: {1 / ratio:.2f} ×",
            "≥ .97 ×",
            1 / ratio >= 0.97,
        )


def stepper(model, loss: Callable) -> Step:
    """A step of AdamW on `loss()`."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
