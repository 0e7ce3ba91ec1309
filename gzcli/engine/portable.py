"""`gz runs export --to onnx|torch`: the network of a model as a graph, and a sampler that needs neither gz
nor torch."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gzcli.core.errors import MissingError, UsageError
from gzcli.engine import sampler
from gzcli.engine.trained import Trained
from gzcli.export import portable_sampler
from gzcli.export.portable_steps import BATCH, Decode, Unportable, step_of
from gzcli.models.options import grouped

CHECKED = 4  # images that the export is tried on
TOLERANCE = 1  # grey levels of 255 by which the exported sampler may differ
ELSE = "`--to file` takes every run; `--to diffusers` what `gz list models --can export` shows"


def write(trained: Trained, to: str, folder: Path) -> dict[str, Any]:
    """Writes the graphs, `model.json` and, for onnx, `sample.py` into a folder. Returns {files, differs}, the
    latter being the largest difference of a pixel from gz's own, in grey levels.

    to: "onnx" or "torch".

    Raises UsageError for a model whose sampler cannot be exported; MissingError without the onnx packages.
    """
    if to == "onnx":
        needs_onnx()
    folder.mkdir(parents=True, exist_ok=True)
    options = grouped(trained.model.sample, trained.part.sample)
    trained.asked = "fp32"
    try:
        spec, step, example = step_of(trained, options)
    except Unportable as e:
        raise UsageError(f"the sampler of `{trained.name}` cannot be exported: {e}", hint=ELSE) from e
    spec |= {
        "model": trained.name,
        "run": trained.run.owner.id,
        "classes": list(trained.info.classes) if trained.model.conditional else [],
        "multilabel": trained.info.multilabel,
        "decode": trained.space is not None,
    }
    graphs = {"step": (step, example)}
    if trained.space is not None:
        graphs["decode"] = (Decode(trained), {"x": torch.zeros(BATCH, *trained.info.shape)})
    try:
        files = [graph(folder, name, net, inputs, to) for name, (net, inputs) in graphs.items()]
    except Exception as e:  # the exporters of torch raise errors of many kinds
        why = str(e).strip().partition("\n")[0][:200]
        raise UsageError(
            f"torch cannot write the network of `{trained.name}` as a graph: {why}", hint=ELSE
        ) from e
    text = json.dumps(spec, indent=1)
    (folder / "model.json").write_text(text + "\n")
    if to == "onnx":
        shutil.copyfile(portable_sampler.__file__, folder / "sample.py")
    differs = check(trained, json.loads(text), folder, to)
    return {"files": [*files, "model.json", *(["sample.py"] if to == "onnx" else [])], "differs": differs}


def graph(folder: Path, name: str, net: nn.Module, inputs: Mapping[str, Any], to: str) -> str:
    """Writes one network for batches of every size. Returns the file's name."""
    n = torch.export.Dim("n", min=1, max=4096)
    fixed = ("alpha", "sigma")  # one number for the whole batch
    shapes = {
        key: [{0: n}] * len(value) if isinstance(value, list) else {} if key in fixed else {0: n}
        for key, value in inputs.items()
    }
    net = net.eval()
    with torch.no_grad(), quiet():
        program = torch.export.export(net, (), dict(inputs), dynamic_shapes=shapes)
    if to == "torch":
        torch.export.save(program, folder / f"{name}.pt2")
        return f"{name}.pt2"
    names = [
        label
        for key, value in inputs.items()
        for label in ([f"{key}_{i}" for i in range(len(value))] if isinstance(value, list) else [key])
    ]
    file = folder / f"{name}.onnx"
    with quiet():
        torch.onnx.export(
            program, (), file, input_names=names, dynamo=True, external_data=False, verbose=False
        )
    return file.name


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps warnings that the exporters raise of their own code from the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check(trained: Trained, spec: Mapping[str, Any], folder: Path, to: str) -> int:
    """How far what was written draws from what gz draws, in grey levels of 255. Raises UsageError where that
    is more than `TOLERANCE`."""
    nets: dict[str, Any] = {}

    def call(name: str, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        if to == "onnx":
            import onnxruntime

            if name not in nets:
                nets[name] = onnxruntime.InferenceSession(folder / f"{name}.onnx")
            wanted = {node.name for node in nets[name].get_inputs()}
            return nets[name].run(None, {key: value for key, value in feeds.items() if key in wanted})
        if name not in nets:
            nets[name] = torch.export.load(folder / f"{name}.pt2").module()
        tensors: dict[str, Any] = {key: torch.from_numpy(np.asarray(value)) for key, value in feeds.items()}
        if several := [tensors.pop(key) for key in list(tensors) if key.startswith("noise_")]:
            tensors = {"noise": several, **tensors}
        with torch.no_grad():
            made = nets[name](**tensors)
        return [value.numpy() for value in (made if isinstance(made, tuple) else (made,))]

    theirs = portable_sampler.draw(spec, call, CHECKED).transpose(0, 3, 1, 2)
    ours = sampler.draw(trained, CHECKED)
    differs = int(np.abs(theirs.astype(int) - ours.astype(int)).max())
    if differs > TOLERANCE:
        raise UsageError(
            f"what was exported draws other images than `{trained.name}`, by up to {differs} of 255",
            hint="a sampler of fixed steps, without correctors: `gz list models`, `gz sample MODEL --help`",
        )
    return differs


def needs_onnx() -> None:
    """Raises MissingError where a package is missing that ONNX files are written with."""
    from importlib.util import find_spec

    if missing := [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]:
        raise MissingError(f"`--to onnx` needs {', '.join(missing)}", hint='pip install "gzcli[onnx]"')
