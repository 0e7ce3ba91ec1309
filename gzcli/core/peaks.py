"""What GPUs compute at most, by the names that their drivers give them. No heavy import."""

from __future__ import annotations

import re
from collections.abc import Mapping

# Dense TFLOP/s (10¹²) of matrix products that are summed in fp32, by words of a device's name. From NVIDIA's
# data sheets, whose figures "with sparsity" are halved; of GeForce from the white papers of GA102 (table 2),
# AD102 and Blackwell RTX (appendix A). What is missing no tensor core computes.
PEAKS: Mapping[str, Mapping[str, float]] = {
    "B200": {"bf16": 2250, "fp16": 2250, "tf32": 1125, "fp32": 75},
    "H200": {"bf16": 989, "fp16": 989, "tf32": 495, "fp32": 67},
    "H100 NVL": {"bf16": 835, "fp16": 835, "tf32": 418, "fp32": 60},
    "H100 PCIe": {"bf16": 756, "fp16": 756, "tf32": 378, "fp32": 51},
    "H100": {"bf16": 989, "fp16": 989, "tf32": 495, "fp32": 67},  # SXM
    "A100": {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5},
    "L40S": {"bf16": 362, "fp16": 362, "tf32": 183, "fp32": 91.6},
    "L4": {"bf16": 121, "fp16": 121, "tf32": 60, "fp32": 30.3},
    "A10": {"bf16": 125, "fp16": 125, "tf32": 62.5, "fp32": 31.2},
    "A6000": {"bf16": 154.8, "fp16": 154.8, "tf32": 77.4, "fp32": 38.7},
    "RTX 3090": {"bf16": 71, "fp16": 71, "tf32": 35.6, "fp32": 35.6},
    "RTX 4090": {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": 82.6},
    "RTX 5090": {"bf16": 209.5, "fp16": 209.5, "tf32": 104.8, "fp32": 104.8},
    "V100 PCIE": {"fp16": 112, "fp32": 14},
    "V100": {"fp16": 125, "fp32": 15.7},  # SXM2
    "T4": {"fp16": 65, "fp32": 8.1},
}
OTHER = ("SUPER", "Ti", "Laptop", "D", "MIG", "Ada")  # words of the names of other devices than the table's


def peak_of(name: str, precision: str) -> float | None:
    """The dense FLOP/s of a device by the name that its driver gives it; None where they are not known.

    precision: "bf16", "fp16", "tf32" or "fp32".
    """
    words = re.split(r"[ \-/]", name)
    if any(word in words for word in OTHER):
        return None
    for known, figures in PEAKS.items():
        if all(word in words for word in known.split()):
            tera = figures.get(precision)
            return None if tera is None else 1e12 * tera
    return None
