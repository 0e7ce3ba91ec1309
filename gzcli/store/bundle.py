"""One safetensors file with a whole run: every stage, and the autoencoder of its latents. For a run of one
model, the file is its `model.safetensors` with `card` and `preview` in the metadata. With several models,
each is a part: its tensors' names begin with the part's name and a colon, and its metadata is an entry of
`parts` in the file's metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gzcli.store import files
from gzcli.store.paths import is_name
from gzcli.store.run_folder import STAGES, Run

MAIN = "model"  # the part of a run without stages
LATENT = Run.latent_folder.name  # the part of the autoencoder whose latents are modelled


def parts(texts: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The metadata of each part by name (a stage is `stages/NAME`); {} for a file of one model. Raises
    ValueError for malformed metadata."""
    tree = json.loads(texts.get("parts") or "{}")
    if not isinstance(tree, dict) or not all(isinstance(part, dict) for part in tree.values()):
        raise ValueError("`parts` is not a map of maps")
    return tree


def place_of(part: str, folder: Path) -> Path:
    """The folder of a part, relative to the folder of its run. Raises ValueError for an invalid part name."""
    kind, _, stage = part.partition("/")
    if part == MAIN:
        return folder
    if part != LATENT and not (kind == STAGES and is_name(stage)):
        raise ValueError(f"`{part}` is not a part of a run")
    return folder / part


def extract(
    file: Path, header: Mapping[str, Any], part: str, metadata: Mapping[str, str], target: Path
) -> None:
    """Writes a part of a file as a safetensors file, by copying the bytes of its tensors."""
    specs = [(name, spec) for name, spec in header.items() if name.startswith(f"{part}:")]
    specs.sort(key=lambda item: item[1]["data_offsets"])
    head: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, spec in specs:
        first, last = spec["data_offsets"]
        head[name.removeprefix(f"{part}:")] = spec | {"data_offsets": [position, position + last - first]}
        position += last - first
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    with file.open("rb") as source, target.open("wb") as out:
        begin = 8 + int.from_bytes(source.read(8), "little")
        out.write(len(text).to_bytes(8, "little") + text)
        for _, spec in specs:
            first, last = spec["data_offsets"]
            source.seek(begin + first)
            out.write(source.read(last - first))


def unpack(file: Path, metadata: Mapping[str, Mapping[str, str]], folder: Path) -> None:
    """Writes the weights of each part into its folder below `folder`, in the order of training. A part that
    is built on others gets their new checksums, because all came in one file. Raises ValueError for a damaged
    file."""
    header = files.safetensors_header(file)
    sums: dict[str, str] = {}
    space = ""
    for part, texts in sorted(metadata.items(), key=lambda line: line[0] != LATENT):
        part_texts = dict(texts)
        model = Run(place_of(part, folder)).model_file
        files.make_folder(model.parent)
        built_on = json.loads(part_texts.get("built_on") or "{}")
        part_texts["built_on"] = json.dumps({stage: sums[stage] for stage in built_on})
        if space and (record := json.loads(part_texts.get("space") or "null")):
            part_texts["space"] = json.dumps(record | {"digest": space})
        extract(file, header, part, part_texts, model)
        digest = files.checksum(model)
        sums[part.rpartition("/")[2]] = digest
        space = digest if part == LATENT else space
