"""`gz runs export`: a trained model in the format of another library, or as one self-contained safetensors
file, and its card.

Recipes are exported without the facts of this machine: paths, processes, names of other runs.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gzcli.core.errors import MissingError, UsageError
from gzcli.core.hints import Option, advice, gz, setting
from gzcli.core.sections import LaunchSection, Part
from gzcli.data.sets.registry import SPECS
from gzcli.engine import sampler
from gzcli.engine.checkpoint import metadata_of, read_weights
from gzcli.engine.log import Log
from gzcli.engine.trained import Trained, autoencoder_run, load_model, load_trained, weights_file
from gzcli.export import alarm_of_run
from gzcli.metrics.standings import drawn_by
from gzcli.models import catalog
from gzcli.store import files, jobs
from gzcli.store.bundle import LATENT, MAIN
from gzcli.store.files import remove_leftovers
from gzcli.store.hub import TINY_BASES, is_id
from gzcli.store.jobs import ExportJob
from gzcli.store.metrics import last_figures
from gzcli.store.paths import user_dir
from gzcli.store.png import picture_of
from gzcli.store.run_folder import STAGES
from gzcli.store.runs import Run
from gzcli.version import __version__

EXPORT_FORMAT = "1"
PREVIEW_SAMPLES = 16  # samples of the preview
LINE_GREY = 224  # grey level of the lines between the samples
MAX_PREVIEW_SIDE = 256  # maximum pixels of the preview's side, unless the images are larger
HALVES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run(job: ExportJob, folder: Path, device: torch.device, log: Log) -> dict[str, Any]:
    """Writes the averaged weights of the job's run to `job.out`. Returns the JSON of `gz runs export`."""
    trained = load_trained(Run(Path(job.run)), device, job.checkpoint)
    remove_leftovers(Path(job.out).parent)
    facts = {"run": trained.run.owner.id, "to": job.to, "path": job.out}
    if job.to == "file":
        return facts | {"card": write(trained, job)}
    if job.to == "alarm":
        export = alarm_of_run.write(trained, Path(job.out), log)
        log.info(f"{export['held_out']:,} held-out scores of the map `{export['map']}`")
        return facts | export
    return facts | to_diffusers(trained, job.out, log)


def to_diffusers(trained: Trained, out: str, log: Log) -> dict[str, Any]:
    """Writes a folder that diffusers can load. Returns the class of its pipeline and the next call.

    A model can be exported if it has a method `to_diffusers`. The method returns a pipeline, or any object
    with `save_pretrained`. The object may have two attributes. `loaded_by` is the call that loads it, if that
    is not its class's `from_pretrained`. `usage` is the next call. Both are printed and written into the
    folder's README.md.

    Raises UsageError for a model without the method, and for a model with clusters, because no pipeline draws
    clusters.
    """
    if not hasattr(trained.model, "to_diffusers"):
        message = f"`{trained.name}` has no counterpart in diffusers"
        raise UsageError(message, hint=gz("list", "models", can="export"))
    if getattr(trained.model, "clusters", None) is not None:
        message = f"diffusers has no pipeline that draws clusters, which `{trained.title}` is conditioned on"
        hint = advice("use {}, or train with {}", Option("to", "file"), setting("model.clusters", 0))
        raise UsageError(message, hint=hint)
    pipeline = trained.model.to_diffusers()
    files.make_folder(Path(out))
    pipeline.save_pretrained(out)
    files.readable(Path(out))
    name, usage = type(pipeline).__name__, getattr(pipeline, "usage", None)
    loaded_by = getattr(pipeline, "loaded_by", f"{name}.from_pretrained")
    readme = [f"# {trained.title}, {trained.run.owner.id}"]
    readme += [f"Weights after {trained.step} steps, for diffusers:", f"    pipeline = {loaded_by}(FOLDER)"]
    log.info(f"load it in diffusers with `{loaded_by}({out!r})`")
    if usage:
        log.info(f"then {usage}")
        readme.append(f"then {usage}.")
    files.write_atomic(Path(out) / "README.md", "\n\n".join(readme) + "\n")
    return {"pipeline": name, "usage": usage}


# ---------------------------------------------------------------------------- one file


def write(trained: Trained, job: ExportJob) -> dict[str, Any]:
    """Writes the file `job.out`. Returns the card."""
    dtype = HALVES[job.dtype]
    owner, parts = trained.run.owner, _parts(trained)
    has_parts = len(parts) > 1
    tensors: dict[str, Tensor] = {}
    texts: dict[str, dict[str, str]] = {}
    for name, run in parts.items():
        serves = run.path == trained.run.path
        saved = read_weights(weights_file(run, job.checkpoint if serves else "finished"))
        model = trained.model if serves else load_model(run, "cpu")[0]
        short = _rounded(model, saved.weights, dtype)
        tensors |= {f"{name}:{key}" if has_parts else key: value for key, value in short.items()}
        texts[name] = metadata_of(replace(saved, part=_shared(saved.part, owner.data, LATENT in parts)))
    with torch.no_grad():  # the preview is drawn with the weights of the file
        for p in (p for p in trained.model.parameters() if p.dtype == torch.float32):
            p.copy_(p.to(dtype).float())
    serving = next(name for name, run in parts.items() if run.path == trained.run.path)
    card = card_of(trained, job)
    metadata = texts[serving] | {"format": EXPORT_FORMAT, "card": json.dumps(card)}
    if has_parts:
        metadata |= {"parts": json.dumps(texts), "recipe": json.dumps(_whole(owner, texts))}
        metadata["built_on"] = "{}"
    if picture := preview(trained):
        metadata["preview"] = base64.b64encode(picture).decode()
    files.write_tensors(Path(job.out), tensors, metadata)
    return card


def _parts(trained: Trained) -> dict[str, Run]:
    """The runs in the file by part name, in the order of training."""
    owner, part = trained.run.owner, trained.part
    parts: dict[str, Run] = {}
    outside = {"model.base": part.options.get("base")}
    if trained.space is not None and (name := part.data.latent):
        bundled = Run(owner.path / LATENT)
        if autoencoder := bundled if bundled.path.is_dir() else autoencoder_run(name):
            parts[LATENT] = autoencoder
        else:
            outside["data.latent"] = name
    for key, name in outside.items():
        if (
            name
            and name not in TINY_BASES
            and (not is_id(str(name)) or Path(str(name)).expanduser().is_dir())
        ):
            hint = advice("train with the name of a hub repository: {}", setting(key, "owner/name"))
            raise UsageError(f"`{key}` is the folder `{name}`, which a file cannot contain", hint=hint)
    stages = {f"{STAGES}/{stage.path.name}": stage for stage in owner.stages}
    return parts | (stages or {MAIN if parts else "": trained.run})


def _shared(part: Part, data: str, with_latent: bool) -> Part:
    """A recipe without the facts of this machine."""
    latent = LATENT if with_latent and part.data.latent else part.data.latent
    section = replace(part.data, name=data, latent=latent)
    train, ood = replace(part.train, init=None), replace(part.ood, background=None)
    return replace(part, data=section, train=train, ood=ood, launch=LaunchSection())


def _whole(owner: Run, texts: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """The recipe of a run in several parts, with the whole recipe of each stage."""
    trees = {name: json.loads(text["recipe"]) for name, text in texts.items()}
    stages = {name.partition("/")[2]: tree for name, tree in trees.items() if name.startswith(STAGES)}
    last = list(trees.values())[-1]
    if not stages:
        return last
    keys = ("about", "scale", "seed", "data")
    return {key: last[key] for key in keys} | {"about": owner.tree().get("about", ""), STAGES: stages}


def _rounded(model: nn.Module, weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights with fp32 parameters converted to another dtype. Buffers (schedules, statistics, averaged
    codebooks) keep their dtype, because rounding them would change the model's outputs."""
    names = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    return {k: v.to(dtype) if k in names and v.dtype == torch.float32 else v for k, v in weights.items()}


def card_of(trained: Trained, job: ExportJob) -> dict[str, Any]:
    """The facts of a run for its users, with the licence and source of a known data set."""
    owner, name, images = trained.run.owner, trained.part.model, trained.images
    env = owner.environment
    model, noted, parts = catalog.card_of(trained.run, name), env.get("data") or {}, owner.stages or [owner]
    about = {"title": "the author's own images", "licence": "not stated", "citation": "not published"}
    if spec := SPECS.get(owner.data):
        about = {key: getattr(spec, key) for key in about}
    return {
        "run": owner.id,
        "model": trained.name,
        "about": trained.part.about or owner.tree().get("about", ""),
        "paper": model.paper,
        "can": list(model.can),
        "conditional": trained.model.conditional,
        "params": sum(p.numel() for p in trained.model.parameters()),
        "dtype": job.dtype,
        "step": trained.step,
        "seconds": round(sum(part.seconds for part in parts), 1),
        "work": round(sum(part.work for part in parts), 1),  # CPU-seconds
        "clock": owner.clock,
        "command": _command(env.get("command") or []),
        "data": {
            "name": owner.data,
            "shape": list(images.shape),
            "levels": images.levels,
            "classes": list(images.classes),
            "counts": noted.get("counts"),
            "digest": noted.get("digest"),
            **about,
        },
        "figures": figures(trained),
        "versions": {"gzcli": __version__, **(env.get("packages") or {})},
    }


def _command(words: list[str]) -> str:
    """A command line with paths shortened to their last parts and without output options."""
    words = [word for word in words if word not in ("--json", "--quiet", "-q")]
    return " ".join(Path(word).name if "/" in word or "\\" in word else word for word in words)


def figures(trained: Trained) -> list[dict[str, Any]]:
    """The metrics from the run's newest `gz bench` and from the last validation of its training, [{name,
    value, on, n, from}]."""
    owner, step = trained.run.owner, trained.step
    rows: list[dict[str, Any]] = []
    for file in sorted(user_dir("bench").glob("*/result.json"), key=lambda f: f.lstat().st_mtime):
        with suppress(MissingError), files.reading(file):  # a damaged one is skipped
            result = jobs.result_of(file.parent, "bench")
            of_run = [row for row in result["rows"] if (row.get("run"), row.get("step")) == (owner.id, step)]
            rows = [{"on": f"{result['data']} (test)", **row} for row in of_run] or rows
    last = {"metrics": last_figures(trained.run, step), "on": f"{owner.data} (validation)", "n": None}
    return [*(of_row(rows[-1], "gz bench") if rows else ()), *of_row(last, "gz train")]


def of_row(row: Mapping[str, Any], verb: str) -> Iterator[dict[str, Any]]:
    """The metrics of a row, each with the verb that computed it and the guidance of its samples."""
    for name, value in row["metrics"].items():
        if isinstance(value, int | float) and np.isfinite(value):
            by = ", ".join(filter(None, (verb, drawn_by(name, row))))
            yield {"name": name, "value": float(value), "on": row["on"], "n": row["n"], "from": by}


def contact_sheet(images: np.ndarray) -> np.ndarray:
    """Images uint8 [16, C, H, W] as 4 rows of 4, [H', W', C], enlarged by an integer factor to at most
    MAX_PREVIEW_SIDE."""
    images = np.pad(images, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=LINE_GREY)
    _, c, h, w = images.shape
    rows = images.reshape(4, 4, c, h, w).transpose(0, 3, 1, 4, 2).reshape(4 * h, 4 * w, c)
    scale = max(1, MAX_PREVIEW_SIDE // max(rows.shape[:2]))
    return rows.repeat(scale, 0).repeat(scale, 1)


def preview(trained: Trained) -> bytes | None:
    """A PNG of samples. For a model that needs images or texts, it is the last one of its training, or None
    if there is none."""
    from PIL import Image

    card = catalog.card_of(trained.run, trained.part.model)
    if card.inputs or "prompt" in card.can or hasattr(trained.model, "sources"):
        pictures = sorted(trained.run.samples_folder.glob("*.png"))
        if not pictures:
            return None
        image: Image.Image = Image.open(pictures[-1])
        image.thumbnail((MAX_PREVIEW_SIDE, MAX_PREVIEW_SIDE))
    else:
        image = picture_of(contact_sheet(sampler.draw(trained, PREVIEW_SAMPLES)))
    png = io.BytesIO()
    image.save(png, "png", optimize=True)
    return png.getvalue()
