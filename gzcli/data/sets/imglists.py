"""OpenOOD's image lists, which say the images of each set of its benchmarks (Zhang et al. 2023,
arXiv:2306.09301). No heavy import.

Its `data` folder holds `benchmark_imglist/cifar10/test_tin.txt`, whose lines are a picture and a label, and
the pictures below `images_classic`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from gzcli.core.errors import MissingError
from gzcli.data.packs.forms import Form
from gzcli.data.sets.benchmarks import Benchmark
from gzcli.data.sets.names import OwnSet
from gzcli.store import files
from gzcli.store.files import sweep
from gzcli.store.paths import cache_dir

LISTS, PICTURES = "benchmark_imglist", "images_classic"
CALLED = {"tinyimagenet": "tin", "dtd": "texture"}  # sets that OpenOOD names otherwise


def list_of(root: Path, benchmark: Benchmark, name: str) -> Path | None:
    """The list of a set's test images in a benchmark; None where there is none.

    Raises MissingError where the folder is not OpenOOD's.

    root: OpenOOD's `data` folder.
    benchmark: the benchmark.
    name: of the set.
    """
    if not (root / LISTS).is_dir():
        raise MissingError(
            f"`{root}` has no `{LISTS}`",
            hint=f"give OpenOOD's `data` folder, with `{LISTS}` and `{PICTURES}`",
        )
    path = root / LISTS / benchmark.inside / f"test_{CALLED.get(name, name)}.txt"
    return path if path.is_file() else None


def listed_images(root: Path, benchmark: Benchmark, name: str) -> OwnSet:
    """The images of a list, in its order, as a set of the user's own, whose files are links in the cache.

    Raises MissingError where there is no list, or a picture of it is missing.

    root: OpenOOD's `data` folder.
    benchmark: the benchmark.
    name: of the set.
    """
    path = list_of(root, benchmark, name)
    if path is None:
        raise MissingError(f"`{root}` has no list of `{name}` for `{benchmark.name}`")
    lines = [line.strip().rsplit(maxsplit=1)[0] for line in path.read_text().splitlines() if line.strip()]
    sources = [(root / PICTURES / line).absolute() for line in lines]
    if lost := [source for source in sources if not source.is_file()]:
        raise MissingError(
            f"{len(lost):,} of the {len(sources):,} pictures in `{path}` are missing, as `{lost[0]}`",
            hint="OpenOOD's own download script fetches them",
        )
    digest = hashlib.sha256("\n".join(map(str, sources)).encode()).hexdigest()[:16]
    folder = cache_dir("imglists", f"{name}-{digest}")
    with files.lock(folder.with_name(f".{folder.name}.lock")):
        if not folder.exists():
            sweep(folder.parent)
            with files.new_dir(folder) as part:
                for i, source in enumerate(sources):
                    files.link_or_copy(source, part / f"{i:06d}{source.suffix}")
    return OwnSet(folder, form=Form(layout="flat"))
