"""Weights of published networks: fetched when they are asked for, as data sets are, into the cache's
folder `weights`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gzcli.core.errors import MissingError
from gzcli.core.types import Report, Say, silent, unreported
from gzcli.core.units import size
from gzcli.data.download.fetch import disk_errors, fetch_file, has_local_mirror, is_url, of_mirror
from gzcli.data.download.http import Refused, held
from gzcli.data.sets.registry import DataFile
from gzcli.store.files import lock, need_space
from gzcli.store.hub import CLIP, DINOV2, INCEPTION, VGG, offline
from gzcli.store.paths import cache_dir

FOLDER = "weights"  # in the cache, and in a mirror


@dataclass(frozen=True)
class Weights:
    """A file of weights."""

    file: DataFile  # the file as its publisher serves it
    title: str  # what it holds, in a line
    licence: str  # the publisher's terms, in a line
    otherwise: str = ""  # what else a user may do, for the hint


_GITHUB, _HUB = "https://github.com", "https://huggingface.co"
_CLIP_REVISION = "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268"
KNOWN = {
    "inception": Weights(
        DataFile(
            INCEPTION,
            (
                f"{_GITHUB}/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION}",
                # the same bytes under another name
                f"{_GITHUB}/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
            ),
            95_628_359,
            sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        ),
        "InceptionV3 of FID, KID and IS, torch-fidelity's port of the TensorFlow network of 2015-12-05",
        "Apache-2.0",
        "or name it with `--weights FILE`",
    ),
    "vgg16": Weights(
        DataFile(
            VGG,
            (f"https://download.pytorch.org/models/{VGG}",),
            553_433_881,
            sha256="397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        ),
        "VGG16 of LPIPS, torchvision's",
        "BSD-3-Clause, trained on ImageNet",
    ),
    "dinov2": Weights(
        DataFile(
            DINOV2,
            (f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/{DINOV2}",),
            1_217_586_395,
            sha256="d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
        ),
        "DINOv2, the ViT-L/14 of its authors",
        "Apache-2.0",
    ),
    "clip": Weights(
        DataFile(
            CLIP,
            (f"{_HUB}/openai/clip-vit-base-patch32/resolve/{_CLIP_REVISION}/pytorch_model.bin",),
            605_247_071,
            sha256="a63082132ba4f97a80bea76823f544493bffa8082296d62d71581a4feff1576f",
        ),
        "CLIP, the ViT-B/32 of OpenAI",
        "MIT",
    ),
}


def fetch_weights(name: str, *, progress: Report = unreported, say: Say = silent) -> Path | None:
    """Fetches a file of weights into the cache unless it is there. Returns its path.

    `GZ_MIRROR`, a folder or base URL that holds weights/FILE, is asked first, then the publisher. Under
    `GZ_OFFLINE=1` only a local mirror is; without one the result is None.
    """
    weights = KNOWN[name]
    file, place = weights.file, cache_dir(FOLDER, weights.file.name)
    if place.is_file():
        return place
    if offline() and not has_local_mirror():
        return None
    every = [*of_mirror(FOLDER, file), *file.urls]
    addresses = [address for address in every if not (offline() and is_url(address))]
    waiting = lock(
        cache_dir(FOLDER, f".{file.name}.lock"),
        on_wait=lambda: say(f"another process is downloading `{file.name}`: waiting"),
    )
    with disk_errors(place.parent), waiting:
        if place.is_file():
            return place
        say(f"fetching {weights.title} ({size(file.size)}, licence: {weights.licence}) from {addresses[0]}")
        need_space(place.parent, file.size - held(place.with_name(f"{file.name}.part")))
        try:
            fetch_file(file, place, addresses, lambda done, total: progress(done, total or file.size), say)
        except Refused as e:
            hint = f"put that file at `{place}` {weights.otherwise}".rstrip()
            raise MissingError(f"`{file.name}` could not be had: {e}", hint=hint) from e
    return place
