"""A counter-based random number generator: Philox 4×32-10 (Salmon et al. 2011, "Parallel random numbers: as
easy as 1, 2, 3"), on any device, in int64 arithmetic only. It is separate from `types`, which must load
without torch.

A number is a function of its key and counter, so there is no state, and the order of draws does not matter.
The counter is (block of the draw, call, image); the key is the seed. A draw of m numbers per image has b = ⌈m
/ 4⌉ blocks, and word w of block j gives number w · b + j.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

PHILOX_ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85
WORD_MASK = 0xFFFFFFFF  # the lower 32 bits
GOLDEN = 0x9E3779B9  # 2³² (√5 − 1) / 2, rounded to an odd number
CACHED_BLOCKS = 32_768  # blocks a thread computes at once on a CPU, whose intermediates stay in its cache
MAX_BLOCKS_AT_ONCE = 2**22  # blocks that a GPU computes at once: 32 MiB for each intermediate

Counter = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counters: Tensor, key: tuple[int, int]) -> Counter:
    """The four 32-bit words, int64 in 0 … 2³² − 1, of each of n counters.

    counters: int64 [6, n], overwritten: four words of the counters, and two rows for intermediates. The
      buffer is reused because it is then already in the CPU's cache.
    key: the two 32-bit words of the key.
    """
    c0, c1, c2, c3, p0, p1 = counters
    for i in range(PHILOX_ROUNDS):
        k0, k1 = ((k + i * step) & WORD_MASK for k, step in zip(key, KEY_STEPS, strict=True))
        # int64 products wrap, so all 64 bits of an unsigned product are right; `>>` copies the sign
        torch.mul(c0, MULTIPLIERS[0], out=p0)
        torch.mul(c2, MULTIPLIERS[1], out=p1)
        torch.bitwise_right_shift(p1, 32, out=c0).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(WORD_MASK)
        torch.bitwise_right_shift(p0, 32, out=c2).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(WORD_MASK)
        c1, c3, p0, p1 = p1, p0, c3, c1
    return c0, c1.bitwise_and_(WORD_MASK), c2, c3.bitwise_and_(WORD_MASK)


def normal(words: Counter) -> Counter:
    """Four standard normal numbers in fp32, by Box and Muller's method."""
    return *_box_muller(words[0], words[1]), *_box_muller(words[2], words[3])


def uniform(words: Counter) -> Counter:
    """Four numbers in [0, 1) in fp32, multiples of 2⁻²⁴."""
    w0, w1, w2, w3 = (_unit(word) for word in words)
    return w0, w1, w2, w3


def below(high: int) -> Callable[[Counter], Counter]:
    """Returns a function that turns four words w into integers in 0 … high − 1, ⌊w · high / 2³²⌋.

    The probabilities of any two integers differ by less than 2⁻³² (Lemire 2019).

    high: 2³¹ at most.
    """

    def integers(words: Counter) -> Counter:
        w0, w1, w2, w3 = ((word * high).bitwise_right_shift_(32) for word in words)
        return w0, w1, w2, w3

    return integers


def draw(
    seed: int,
    call: int,
    images: Tensor,
    count: int,
    numbers: Callable[[Counter], Counter],
    dtype: torch.dtype,
) -> Tensor:
    """[n, count] random numbers on the device of `images`, computed in parts to save memory.

    seed: key of 64 bits.
    call: index of the draw.
    images: indices of the images, int64 [n].
    count: numbers per image.
    numbers: turns the four words of a block into four numbers.
    dtype: dtype of the result.
    """
    key, blocks, device = (seed & WORD_MASK, (seed >> 32) & WORD_MASK), math.ceil(count / 4), images.device
    out = torch.empty(len(images), 4, blocks, dtype=dtype, device=device)
    most = CACHED_BLOCKS * torch.get_num_threads() if device.type == "cpu" else MAX_BLOCKS_AT_ONCE
    width = max(1, min(blocks, most))
    height = min(len(images), most // width)
    memory = torch.empty(6 * height * width, dtype=torch.int64, device=device)
    for top in range(0, len(images), max(1, height)):
        part = images[top : top + height, None]
        for left in range(0, blocks, width):
            right = min(left + width, blocks)
            counters = memory[: 6 * len(part) * (right - left)].view(6, len(part), right - left)
            counters[0] = torch.arange(left, right, device=device)
            counters[1] = call
            counters[2], counters[3] = part & WORD_MASK, part >> 32
            for w, word in enumerate(numbers(philox(counters, key))):
                out[top : top + height, w, left:right] = word
    return out.flatten(1)[:, :count].contiguous()


def spread(seed: int, call: int, images: Tensor) -> Tensor:
    """Numbers in [0, 1), [n], spread evenly over the images.

        u_i = u + i (√5 − 1) / 2  mod 1

    These are multiples of the golden ratio from a random start u (Kronecker's sequence). The number of images
    in an interval deviates from its expectation by O(log n); with independent numbers, by O(√n).

    seed, call, images: as in `draw`.
    """
    start = draw(seed, call, images.new_zeros(1), 1, uniform, torch.get_default_dtype())[0]
    return (start + _unit(images * GOLDEN & WORD_MASK)).remainder(1)


def _box_muller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two standard normal numbers from two words: √(−2 ln(1 − u)) cos 2πv, and the same with the sine."""
    radius = (1 - _unit(first)).log_().mul_(-2).sqrt_()
    angle = _unit(second).mul_(2 * math.pi)
    return angle.cos().mul_(radius), angle.sin_().mul_(radius)


def _unit(word: Tensor) -> Tensor:
    """The upper 24 bits of a word as a fraction in [0, 1), exact in fp32."""
    # a direct conversion from int64 is slower
    return (word >> 8).to(torch.int32).to(torch.float32).mul_(2.0**-24)
