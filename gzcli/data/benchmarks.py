"""Which sets the published out-of-distribution benchmarks compare. Metadata only, no heavy import."""

from __future__ import annotations

from dataclasses import dataclass

from gzcli.core.errors import UsageError, did_you_mean, matching


@dataclass(frozen=True)
class Benchmark:
    """The sets of a published benchmark.

    name: what `--benchmark` takes.
    inside: the in-distribution set.
    near: foreign sets that resemble it.
    far: foreign sets that do not.
    absent: foreign sets that gz does not know.
    version: of OpenOOD, whose evaluator prints another FPR95 in each (`fpr`).
    """

    name: str
    inside: str
    near: tuple[str, ...]
    far: tuple[str, ...]
    absent: tuple[str, ...] = ()
    version: str = "v1.5"

    @property
    def fpr(self) -> str:
        """The figure of `gz ood` that the benchmark's evaluator prints as FPR95: version 1 takes
        in-distribution images as positive (its `fpr_recall`), version 1.5 foreign ones."""
        return "fpr95_id" if self.version == "v1" else "fpr95"

    def group(self, name: str) -> str:
        """Whether a foreign set is "near" or "far"."""
        return "near" if name in self.near else "far"


_FAR = ("mnist", "svhn", "dtd", "places365")
# OpenOOD v1.5 (Zhang et al. 2023, arXiv:2306.09301), table 1; MNIST's is that of v1.
BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "openood-mnist",
            "mnist",
            ("notmnist", "fashionmnist"),
            ("dtd", "cifar10", "tinyimagenet", "places365"),
            version="v1",
        ),
        Benchmark("openood-cifar10", "cifar10", ("cifar100", "tinyimagenet"), _FAR),
        Benchmark("openood-cifar100", "cifar100", ("cifar10", "tinyimagenet"), _FAR),
    )
}


def find(name: str) -> Benchmark:
    """The benchmark of this name, `-` and `_` alike. Raises UsageError with the nearest."""
    if known := matching(name, BENCHMARKS):
        return BENCHMARKS[known]
    hint = did_you_mean(name, BENCHMARKS) or f"there are: {', '.join(BENCHMARKS)}"
    raise UsageError(f"there is no benchmark `{name}`", hint=hint)
