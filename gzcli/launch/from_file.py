"""Runs from a single file: the file becomes a run in the cache, for every verb.

The file is a `model.safetensors` that gz wrote, or the output of `gz runs export`. It is on disk, on the hub
(`hf://OWNER/NAME`) or part of gz (`pretrained:MODEL`). It is data: it contains no code, and nothing outside
of it that it names is fetched.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gzcli.core.errors import GzError, MissingError, UsageError, canonical
from gzcli.core.hints import Hint, Option, advice, gz
from gzcli.core.sections import LaunchSection
from gzcli.core.types import DataInfo
from gzcli.core.units import as_size
from gzcli.data.sets.registry import SPECS
from gzcli.launch import launcher
from gzcli.models import catalog
from gzcli.models.catalog import ModelCard
from gzcli.recipe.recipe import write_recipe
from gzcli.recipe.resolve import card_for
from gzcli.store import bundle, cache_files, files, hub, jobs, pretrained, runs
from gzcli.store.jobs import PublishedJob
from gzcli.store.paths import cache_dir, is_name, spelling
from gzcli.store.run_folder import Run

SUFFIX = ".safetensors"
CONVERSION = 2  # version of the files made from published weights; a cached one of another version is unused


def find_run(ref: str, *, data: str | None = None, typed: str | None = None) -> Run:
    """The run of a file, of `hf://OWNER/NAME` or of `pretrained:MODEL`, otherwise the result of
    `runs.find`."""
    if hub.is_address(ref):
        return run_of(file_on_hub(ref), source=ref)
    if is_published(ref):
        return run_of(published_file(Path(ref).expanduser(), ref))
    if pretrained.is_name(ref):
        return run_of(pretrained.file_of(ref, data), source=ref)
    return run_of(Path(ref).expanduser()) if is_weights(ref) else runs.find(ref, data=data, typed=typed)


def trained_run(
    ref: str, check: Callable[[ModelCard], object], *, data: str | None = None, typed: str | None = None
) -> Run:
    """The run that a name refers to, as in `find_run`. If its model has none, `check` first examines the
    options for the model."""
    try:
        return find_run(ref, data=data, typed=typed)
    except MissingError as error:
        if card := card_for(ref):
            check(card)
        shipped = map(pretrained.parts_of, pretrained.pretrained_names())
        if any(name == spelling(ref) and data in (None, of) for name, of in shipped):
            error.advise(
                advice("{}; {} uses the pretrained model", error.hint or Hint(""), Option("pretrained"))
            )
        raise


def is_shared(ref: str) -> bool:
    """Whether the text refers to a run from a single file."""
    return hub.is_address(ref) or pretrained.is_name(ref) or is_weights(ref) or is_published(ref)


def is_published(ref: str) -> bool:
    """Whether the text is the path of a folder in the layout of diffusers."""
    folder = Path(ref).expanduser()
    return folder.is_dir() and hub.is_published(folder)


def file_on_hub(ref: str) -> Path:
    """The file of gz in a hub repository, or the file made from its weights if others published them."""
    place = hub.fetched(ref)
    return place if place.is_file() else published_file(place, hub.repository_name(ref))


def published_file(folder: Path, name: str) -> Path:
    """The cached file of gz for a folder in the layout of diffusers. The engine converts the weights in a
    separate process, and compares the network with that of diffusers."""
    parts = sorted(path for path in folder.rglob("*") if path.suffix in (".json", SUFFIX) and path.exists())
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in parts]
    source = repr((CONVERSION, str(folder.absolute()), facts))
    stem, key = Path(name).name, hashlib.sha256(source.encode()).hexdigest()
    cache = cache_dir("published")
    out = cache / key[:12] / f"{stem}{SUFFIX}"
    if cache_files.read(out, metadata):
        return out
    data_name = max((data for data in SPECS if data in canonical(stem)), key=len, default=stem.lower())
    job = PublishedJob(str(folder.absolute()), data_name if is_name(data_name) else "published", str(out))
    files.make_folder(cache)
    files.remove_leftovers(cache)
    place = files.part_path(cache / "job")
    place.mkdir()
    try:
        jobs.write(place, job)
        plan = launcher.plan(LaunchSection(cpu=True), every_gpu=False)
        launcher.run(place, plan, launcher=False, mode="quiet")
    except GzError as e:
        if e.kind != GzError.kind or not Run(place).log_file.is_file():
            raise
        log = cache / f"{key[:12]}.log.txt"
        shutil.move(Run(place).log_file, log)
        raise GzError(e.message, hint=f"the traceback is in `{log}`") from e
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return out


def is_weights(ref: str) -> bool:
    """Whether the text is the path of a weights file."""
    return ref.endswith(SUFFIX) and Path(ref).expanduser().is_file()


def is_bundle(file: Path) -> bool:
    """Whether a file contains several models, as that of a run in stages does."""
    try:
        return bool(bundle.parts(files.safetensors_header(file).get("__metadata__", {})))
    except (OSError, ValueError):
        return False


def run_of(file: Path, *, source: str | None = None) -> Run:
    """The run of a weights file: the run whose folder contains it, otherwise a new run in the cache. `source`
    is the origin of the file, as for `find_run`; None means the user's disk."""
    on_hub = source is not None and hub.is_address(source)  # there, all files have the same name
    stem, file = hub.repository_name(str(source)).rpartition("/")[2] if on_hub else file.stem, file.resolve()
    if Run(file.parent).recipe_file.is_file() and Run(file.parent).status_file.is_file():
        return Run(file.parent)
    folder = cache_dir("files", f"{stem}-{files.checksum(file)[:12]}")
    try:
        texts = metadata(file)
    except MissingError:  # an earlier version of gz may have unpacked what this one refuses
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if not is_whole(Run(folder), texts):
        files.remove_leftovers(folder.parent)
        with files.new_dir(folder) as part:
            write(file, part, source=source)
    run, named = Run(folder), source or str(file)
    if run.status().get("file") != named:  # name in errors; equal files are one run
        run.update(file=named)
    return run


def is_whole(run: Run, texts: Mapping[str, str]) -> bool:
    """Whether the cache has the run of a file with this metadata, undamaged."""
    with contextlib.suppress(MissingError, UsageError, ValueError):
        parts = [(run, texts), *((part, metadata(part.model_file)) for part in run.stages or [run])]
        same = all(part.tree() == json.loads(words["recipe"]) for part, words in parts)
        return same and run.state == "finished"
    return False


def write(file: Path, folder: Path, *, source: str | None, **status: Any) -> None:
    """Turns a folder into the run of a file, with additional keys in its `status.json`."""
    file = file.resolve()  # the hub's cache holds links
    texts, run = metadata(file), Run(folder)
    try:
        tree, parts = json.loads(texts["recipe"]), bundle.parts(texts)
        trees = {name: json.loads(part["recipe"]) for name, part in parts.items()} or {bundle.MAIN: tree}
        _check(file, texts, trees)
        card = json.loads(texts.get("card") or "{}")
        clock = {"clock": str(card["clock"])} if "clock" in card else {}
        if parts:
            bundle.unpack(file, parts, folder)
        else:
            files.link_or_copy(file, run.model_file)
        for name, part in trees.items():
            place = Run(bundle.place_of(name, folder))
            write_recipe(place, part)
            step = int(parts.get(name, texts)["step"])
            facts = {"model": part["model"]["name"], "data": part["data"]["name"]}
            files.write_json(place.status_file, {"state": "finished", "step": step, **facts, **clock})
        files.write_json(run.card_file, card)
        if picture := texts.get("preview"):
            run.preview_picture.write_bytes(base64.b64decode(picture))
        write_recipe(run, tree)
        size = as_size(*DataInfo.of(json.loads(texts["data"])).shape[1:])
        model = str(card.get("model") or next(reversed(trees.values()))["model"]["name"])
        data = tree["data"]["name"]  # origin from a stranger: only the last part of a path
        facts = {"data": data if is_name(data) else Path(data).stem or "?", "model": model, "size": size}
        facts |= {"state": "finished", "step": int(texts["step"]), "from": source}
        facts |= {key: float(card[key]) for key in ("seconds", "work") if key in card}
        files.write_json(run.status_file, (files.read_json(run.status_file) or {}) | facts | status)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RecursionError) as e:
        message = f"`{file}` is damaged, or from a later version of gz ({type(e).__name__}: {e})"
        raise MissingError(message, hint="get a new copy, or install a newer gz") from e


def _check(file: Path, texts: Mapping[str, str], trees: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises MissingError for a file that needs something unavailable: other stages of a run, a model's
    program, or weights on the hub. gz does not download these for a file from someone else."""
    if stages := json.loads(texts.get("built_on") or "{}") or json.loads(texts["recipe"]).get("built_on"):
        named = ", ".join(f"`{stage}`" for stage in stages)
        message = f"`{file}` needs the weights of {named}, which are stored in its run"
        hint = advice("pass the run or its folder, or a file from {}", gz("runs export", "RUN"))
        raise MissingError(message, hint=hint)
    for tree in trees.values():
        name = tree["model"]["name"]
        try:
            catalog.card(name)
        except UsageError as e:
            message = f"`{file}` needs the model file of `{name}`, which is not available"
            hint = advice("put the model file into a folder listed in `GZ_MODELS`")
            raise MissingError(message, hint=hint) from e
        weights = {"model.base": tree["model"].get("base")}
        if bundle.LATENT not in trees:
            weights["data.latent"] = tree["data"].get("latent")
        for key, ref in weights.items():
            if ref and hub.is_id(ref) and not hub.is_local(ref) and runs.by_name(ref) is None:
                raise MissingError(
                    f"`{file}` needs the weights of `{ref}` (`{key}`), which gz does not download "
                    "automatically",
                    hint=f"if you trust them: hf download {ref}",
                )


def metadata(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file, read without the safetensors library. Raises MissingError if it has
    no recipe."""
    try:
        texts = files.safetensors_header(file).get("__metadata__", {})
    except (OSError, ValueError) as e:
        raise MissingError(
            f"`{file}` is not a safetensors file, or is damaged: {e}", hint="get a new copy"
        ) from e
    if "recipe" not in texts or "data" not in texts:
        message = f"`{file}` does not name its model"
        hint = advice("pass the `model.safetensors` of a gz run, or a file from {}", gz("runs export"))
        raise MissingError(message, hint=hint)
    return texts
