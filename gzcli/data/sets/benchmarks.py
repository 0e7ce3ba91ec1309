"""The sets that published out-of-distribution benchmarks compare. No heavy import."""

from __future__ import annotations

from dataclasses import dataclass

from gzcli.core.errors import UsageError, did_you_mean, matching


@dataclass(frozen=True)
class Benchmark:
    """The sets of a published benchmark."""

    name: str  # what `--benchmark` takes
    inside: str  # the in-distribution set
    near: tuple[str, ...]  # foreign sets that resemble it
    far: tuple[str, ...]  # foreign sets that do not
    version: str = "v1.5"  # of OpenOOD, whose evaluator prints another FPR95 in each (`fpr`)

    @property
    def fpr(self) -> str:
        """The metric of `gz ood` that the benchmark's evaluator prints as FPR95. In version 1 the
        in-distribution images are positive (its `fpr_recall`), in version 1.5 the foreign ones are."""
        return "fpr95_id" if self.version == "v1" else "fpr95"

    def group(self, name: str) -> str:
        """Whether a foreign set is "near" or "far"."""
        return "near" if name in self.near else "far"


_FAR = ("mnist", "svhn", "dtd", "places365")
_FAR_OF_MNIST = ("dtd", "cifar10", "tinyimagenet", "places365")
# OpenOOD v1.5 (Zhang et al. 2023, arXiv:2306.09301), table 1; MNIST's is that of v1.
_ALL = (
    Benchmark("openood-mnist", "mnist", ("notmnist", "fashionmnist"), _FAR_OF_MNIST, version="v1"),
    Benchmark("openood-cifar10", "cifar10", ("cifar100", "tinyimagenet"), _FAR),
    Benchmark("openood-cifar100", "cifar100", ("cifar10", "tinyimagenet"), _FAR),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}


def find_benchmark(name: str) -> Benchmark:
    """The benchmark with this name; `-` and `_` are equivalent."""
    if match := matching(name, BENCHMARKS):
        return BENCHMARKS[match]
    hint = did_you_mean(name, BENCHMARKS) or f"choose from {', '.join(BENCHMARKS)}"
    raise UsageError(f"there is no benchmark `{name}`", hint=hint)
