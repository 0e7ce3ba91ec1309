"""Augmentation of whole batches of bytes on the device, with the batch's own noise. No torch at import."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from gzcli.core.errors import UsageError, did_you_mean
from gzcli.core.types import Noise
from gzcli.core.units import PACKED_SIDES
from gzcli.data.sets.registry import MAP_KEYS

if TYPE_CHECKING:
    from torch import Tensor


def hflip(u8: Tensor, noise: Noise, rate: float) -> Tensor:
    """Mirrors each image [B, C, H, W] left to right with probability `rate`."""
    import torch

    flip = noise.rand(len(u8)) < rate
    return torch.where(flip[:, None, None, None], u8.flip(-1), u8)


def crop(u8: Tensor, noise: Noise, pad: float) -> Tensor:
    """Shifts each image by −pad … pad pixels in both directions. The border is mirrored, so that there is no
    black edge to learn."""
    import torch

    b, _, h, w = u8.shape
    most = int(pad)
    shift = noise.randint(2 * most + 1, b, 2) - most
    y = _mirrored(torch.arange(h, device=u8.device) + shift[:, :1], h)  # [B, H]
    x = _mirrored(torch.arange(w, device=u8.device) + shift[:, 1:], w)  # [B, W]
    return _gathered(u8, y, x)


def patch(u8: Tensor, noise: Noise, side: float) -> Tensor:
    """A square of each image at a random place, uint8 [B, C, side, side]."""
    import torch

    b, _, h, w = u8.shape
    within = torch.arange(int(side), device=u8.device)
    top, left = (noise.randint(n - int(side) + 1, b, 1) for n in (h, w))
    return _gathered(u8, top + within, left + within)


def mutate(u8: Tensor, noise: Noise, rate: float) -> Tensor:
    """Replaces each value with probability `rate` by a uniform one (Ren et al. 2019, arXiv:1906.02845)."""
    import torch

    chosen = noise.rand(*u8.shape) < rate
    return torch.where(chosen, noise.randint(256, *u8.shape).to(torch.uint8), u8)


def jitter(u8: Tensor, noise: Noise, strength: float) -> Tensor:
    """Changes brightness, contrast and saturation of each image, in this order, each by a factor uniform in
    1 − strength … 1 + strength."""
    factors = 1 + strength * (2 * noise.rand(len(u8), 3) - 1)
    brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)  # [B, 1, 1, 1] each
    x = (u8 * brightness).clamp(0, 255)
    # The mean is of bytes, whose sum is exact: a sum of floats would depend on how many images are in the
    # batch.
    mean = _luma(_rounded(x).sum((2, 3), keepdim=True)) / u8[0, 0].numel()
    x = (mean + contrast * (x - mean)).clamp(0, 255)
    grey = _luma(x)
    return _rounded(grey + saturation * (x - grey)) if u8.shape[1] == 3 else _rounded(x)


class Augmentation(NamedTuple):
    """An augmentation that recipes may name."""

    # (images uint8 [B, C, H, W], noise, number) → changed images uint8 [B, C, H, W]
    step: Callable[[Tensor, Noise, float], Tensor]
    default: float  # the number if a recipe omits it
    most: float  # the largest allowed number
    what: str  # meaning of the number, for messages
    whole: bool = False  # whether the number is an integer
    moves: bool = False  # whether it only moves pixels, and so applies to maps (MAP_KEYS) too
    least: float = 0  # the smallest allowed number


AUGMENTS = {
    "hflip": Augmentation(hflip, 0.5, 1, "the probability", moves=True),
    "crop": Augmentation(crop, 4, 64, "the padding in pixels", whole=True, moves=True),
    "mutate": Augmentation(mutate, 0.3, 1, "the probability"),
    "patch": Augmentation(
        patch, 64, PACKED_SIDES[-1], "the side in pixels", whole=True, moves=True, least=PACKED_SIDES[0]
    ),
    "jitter": Augmentation(jitter, 0.2, 1, "the strength"),
}


def parse_augment(names: Iterable[str]) -> tuple[tuple[str, float], ...]:
    """Augmentations with their numbers: `["hflip", "mutate=0.2"]` → (("hflip", .5), ("mutate", .2))."""
    parsed = []
    for text in [names] if isinstance(names, str) else names:
        name, equals, value = str(text).partition("=")
        if name not in AUGMENTS:
            every = ", ".join(f"`{each}`" for each in AUGMENTS)
            hint = did_you_mean(name, AUGMENTS) or f"choose from {every}"
            raise UsageError(f"there is no augmentation `{name}`", hint=hint)
        augmentation = AUGMENTS[name]
        try:
            number = float(value) if equals else augmentation.default
        except ValueError:
            number = float("nan")
        low, high = augmentation.least, augmentation.most
        if not low <= number <= high or (augmentation.whole and number != int(number)):
            hint = f"write, for example, `{name}={augmentation.default}`"
            kind = "a whole number" if augmentation.whole else "a number"
            message = f"`{text}`: {augmentation.what} must be {kind} from {low} to {high}"
            raise UsageError(message, hint=hint)
        parsed.append((name, number))
    return tuple(parsed)


def patch_of(names: Iterable[str]) -> int | None:
    """The side in pixels of the training patches; None: whole images."""
    return next((int(number) for name, number in parse_augment(names) if name == "patch"), None)


def augmenter(names: Sequence[str]) -> Callable[[dict[str, Tensor], Noise], dict[str, Tensor]] | None:
    """The named augmentations in order, as one function; None without any. Its arguments are images and
    further images by kind, uint8 [B, C, H, W] each, and noise. All kinds share the same draws, but the
    colours of maps are not changed."""
    steps = [(AUGMENTS[name], number) for name, number in parse_augment(names)]

    def augment(pictures: dict[str, Tensor], noise: Noise) -> dict[str, Tensor]:
        for augmentation, number in steps:
            draws = ReplayedNoise(noise)
            unchanged = () if augmentation.moves else MAP_KEYS
            pictures = {
                kind: u8 if kind in unchanged else augmentation.step(u8, draws.replay(), number)
                for kind, u8 in pictures.items()
            }
        return pictures

    return augment if steps else None


class ReplayedNoise(Noise):
    """Stores the draws of another noise, and repeats them from the first one after each `replay()`."""

    def __init__(self, noise: Noise):
        self.noise, self.at = noise, 0
        self.draws: list[Tensor] = []

    def replay(self) -> ReplayedNoise:
        """This noise, restarted at its first draw."""
        self.at = 0
        return self

    def _draw(self, method: str, shape: tuple[int, ...], high: int | None = None) -> Tensor:
        if self.at == len(self.draws):
            self.draws.append(self.noise._draw(method, shape, high))
        self.at += 1
        return self.draws[self.at - 1]


def _gathered(u8: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """The rows y [B, H'] and columns x [B, W'] of images [B, C, H, W]: [B, C, H', W']."""
    (b, c, _, w), high, wide = u8.shape, y.shape[1], x.shape[1]
    rows = u8.gather(2, y[:, None, :, None].expand(b, c, high, w))
    return rows.gather(3, x[:, None, None, :].expand(b, c, high, wide))


def _mirrored(i: Tensor, n: int) -> Tensor:
    """Positions beyond 0 … n − 1 reflected at the edges, without repeating them."""
    period = max(2 * (n - 1), 1)
    i = i.remainder(period)
    return i.minimum(period - i) if n > 1 else i.clamp(0, 0)


def _luma(x: Tensor) -> Tensor:
    """The luma of images by ITU-R 601, [B, 3, …] → [B, 1, …]; images of one channel are unchanged."""
    return x if x.shape[1] == 1 else 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def _rounded(x: Tensor) -> Tensor:
    """Values rounded to bytes."""
    import torch

    return x.round().clamp(0, 255).to(torch.uint8)
