"""A single `model.safetensors`: it becomes a run in the cache, which every verb takes."""

from __future__ import annotations

import json
from pathlib import Path

from gzcli.errors import MissingError, UsageError
from gzcli.models import catalog
from gzcli.recipe.write import dump
from gzcli.sizes import as_size
from gzcli.store import files, runs
from gzcli.store.paths import cache_dir
from gzcli.store.run import Run
from gzcli.store.weights import safetensors_header

SUFFIX = ".safetensors"


def find_run(ref: str, *, data: str | None = None) -> Run:
    """The run that a text means, as `runs.find` has it, or the run of the weights file at that path.

    ref: id, alias or path of a run, name of a model, or path of a weights file.
    data: key of the data set of a model's run; None: any.

    Raises UsageError and MissingError.
    """
    return run_of(Path(ref).expanduser()) if is_weights(ref) else runs.find(ref, data=data)


def is_weights(ref: str) -> bool:
    """Whether the text is the path of a weights file."""
    return ref.endswith(SUFFIX) and Path(ref).expanduser().is_file()


def run_of(file: Path) -> Run:
    """The run of a weights file: the one whose folder it lies in, else one of its own in the cache.

    Raises MissingError for a file that is not by gz, or that is built on weights of other files.
    """
    file = file.resolve()
    if (file.parent / "run.yaml").is_file() and (file.parent / "status.json").is_file():
        return Run(file.parent)
    texts = metadata(file)
    tree, info = json.loads(texts["recipe"]), json.loads(texts["data"])
    if stages := json.loads(texts.get("built_on") or "{}") or tree.get("built_on"):
        named = ", ".join(f"`{stage}`" for stage in stages)
        raise MissingError(
            f"`{file}` is built on the weights of {named}, which lie in its run",
            hint="name the run, or its folder",
        )
    try:
        catalog.card(tree["model"]["name"])
    except UsageError as e:
        raise MissingError(
            f"`{file}` is of a model from outside, `{tree['model']['name']}`, whose file is not at hand",
            hint="put the model's file into a folder that `GZ_MODELS` names",
        ) from e
    folder = cache_dir("files", f"{file.stem}-{files.checksum(file)[:12]}")
    if not folder.exists():
        with files.new_dir(folder) as part:
            files.link_or_copy(file, part / "model.safetensors")
            (part / "run.yaml").write_text(dump(tree))
            size = as_size(*info["shape"][-2:])
            facts = {"model": tree["model"]["name"], "data": tree["data"]["name"], "size": size}
            files.write_json(part / "status.json", {"state": "finished", "step": int(texts["step"]), **facts})
    return Run(folder)


def metadata(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file, read without its library. Raises MissingError without a recipe."""
    try:
        texts = safetensors_header(file).get("__metadata__", {})
    except (OSError, ValueError) as e:
        raise MissingError(f"`{file}` is no safetensors file") from e
    if "recipe" not in texts or "data" not in texts:
        raise MissingError(
            f"`{file}` does not say which model it is of",
            hint="gz reads the `model.safetensors` of its own runs",
        )
    return texts
