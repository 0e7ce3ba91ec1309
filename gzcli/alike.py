"""Several processes train what one trains: what is alike, and what is not.

The figures are differences of weights after 30 steps by one process and by two, which `tests/two_ranks.py`
measures, a test holds and the page on several GPUs shows.
"""

from __future__ import annotations

from dataclasses import dataclass

ALIKE = 1e-6  # the largest difference of a weight in double precision, of every recipe


@dataclass(frozen=True)
class Difference:
    """Trainings that depend on the number of their processes.

    of: which, as a sentence begins.
    why: the reason.
    example: a recipe, and after commas what is set, that shows it; None: no recipe of gz does.
    fp32: whether the example is trained in fp32, not in double precision.
    most: the largest difference of a weight of the example, rounded up.
    """

    of: str
    why: str
    example: str | None = None
    fp32: bool = False
    most: float = 0.0


DIFFERENCES = (
    Difference(
        of="fp32, bf16 and fp16",
        why="sums are added up in another order, and so rounded otherwise. Deep flows and networks that play"
        " against each other amplify that, and it can decide a near tie between two codes. A parameter whose"
        " gradient is zero but for rounding moves at random by full steps of Adam or Adamax: so two processes"
        " of `glow` part at its first step, in biases and scales of what the first batch has normalised. By"
        " `optim.eps=0.1`, which is above that rounding, they agree to 1e-4",
        example="glow",
        fp32=True,
        most=0.01,
    ),
    Difference(
        of="Dropout",
        why="each process draws for its own images, from a seed of its own, so that none pays for the images"
        " of the others. Parameters are equal on all processes, and a resume repeats what was drawn",
        example="ddpm,model.dropout=0.1",
        most=0.1,
    ),
    Difference(
        of="`train.accumulate` above 1 of a model that looks at a whole batch",
        why="each part of a batch then holds other images. Such are models with batch norm or a codebook,"
        " `cyclegan` with its pool, `cfm` with its pairs, and what is adapted from step to step in `presgan`,"
        " `hvae`, `diffae` and `vqgan`",
        example="vqvae,train.accumulate=2",
        most=5.0,
    ),
    Difference(
        of="A model of your own",
        why="its `nn.BatchNorm` looks at the images of all processes too. Numbers that it draws past"
        " `batch.noise`, and what else it computes of a whole batch, are of each process alone,"
        " but for what it asks of the module `gzcli.core.ranks`",
    ),
    Difference(
        of="Figures of the log that are no means over images, as `active_units`",
        why="each process computes them of its own images, and their mean is shown",
    ),
)
