"""How fast a training is: images and floating-point operations a second, and the share of the device's peak
that these are (MFU, Chowdhery 2022, arXiv:2204.02311, appendix B)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Speed:
    """What a step does, by which its rate becomes other rates.

    images: images of a step.
    flops: floating-point operations of a step; None: not known.
    peak: FLOP/s of all devices together; None: not known.
    """

    images: int
    flops: float | None = None
    peak: float | None = None

    def at(self, rate: float) -> dict[str, float]:
        """`images_s`, and where they are known `tflops` and `mfu`, a share of 1.

        rate: steps a second.
        """
        found = {"images_s": self.images * rate}
        if self.flops:
            found["tflops"] = self.flops * rate / 1e12
            if self.peak:
                found["mfu"] = self.flops * rate / self.peak
        return {name: float(f"{value:.4g}") for name, value in found.items()}


def in_words(values: Mapping[str, float]) -> list[str]:
    """The figures of `Speed.at` as a line shows them, those first that tell more."""
    shown = {"mfu": "MFU {:.0%}", "tflops": "{:.3g} TFLOP/s", "images_s": "{:.3g} images/s"}
    return [text.format(values[name]) for name, text in shown.items() if name in values]
