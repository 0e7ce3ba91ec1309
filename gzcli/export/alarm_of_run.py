"""`gz runs export --to alarm`: the map of a run as a local score in one graph, with its held-out scores.

The graph draws no noise: of a model whose map draws some, the draws are constants, equal for every picture.
Held-out images are scored by the graph itself, so p-values hold for whatever it computes.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gzcli.core.errors import UsageError
from gzcli.core.types import ImageNoise
from gzcli.data.packs.batches import quantise
from gzcli.data.packs.open import open_pack
from gzcli.data.packs.pack import check_unchanged
from gzcli.data.sets.names import locate
from gzcli.engine.log import Log
from gzcli.engine.trained import Trained
from gzcli.export import alarm
from gzcli.export.portable import ELSE, DrawnNoise, RecordedNoise
from gzcli.judge.alarm import split_held_out
from gzcli.judge.local import fit_run_local
from gzcli.judge.methods import is_good_test
from gzcli.judge.scores import DRAWS, map_of
from gzcli.metrics.alarms.local import Local
from gzcli.models.base import flat_defaults, group_options

HELD_OUT = 2000  # held-out scores, at most
AT_ONCE = 32  # images that are scored together
TOLERANCE = 1e-3  # by which scores of the graph may differ, relative


class LocalMap(nn.Module):
    """The score [N, 1] and the map [N, H, W] of images uint8 [N, C, H, W]."""

    def __init__(self, trained: Trained, name: str, levels: int):
        super().__init__()
        self.model, self.name, self.levels = trained.model, name, levels
        method = getattr(trained.model, f"map_{name}")
        keys = flat_defaults(method)
        self.options = group_options(method, {k: v for k, v in trained.part.ood.options.items() if k in keys})
        self.draws: list[list[Tensor]] = []
        self.local: Local | None = None
        noise = RecordedNoise(1)
        self.raw(quantise(torch.zeros(1, *trained.images.shape, dtype=torch.uint8), levels), noise)
        if noise.values:
            self.draws = [list(noise.values)]
            for seed in range(1, DRAWS):
                again = RecordedNoise(1, seed)
                self.raw(quantise(torch.zeros(1, *trained.images.shape, dtype=torch.uint8), levels), again)
                self.draws.append(list(again.values))

    def raw(self, x: Tensor, noise: ImageNoise | DrawnNoise) -> Tensor:
        return getattr(self.model, f"map_{self.name}")(x, noise=noise, **self.options)

    def maps(self, x: Tensor) -> Tensor:
        """The maps of the model, [N, h, w], as a mean over the draws."""
        n = x.shape[0]
        if not self.draws:
            return self.raw(x, ImageNoise(0, [0]))
        each = [DrawnNoise([v.expand(n, *v.shape[1:]) for v in values]) for values in self.draws]
        return torch.stack([self.raw(x, noise) for noise in each]).mean(0)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        assert self.local is not None
        cells = localised(self.maps(quantise(image, self.levels)), self.local)[:, None]
        sides = image.shape[2:]
        shown = cells if cells.shape[2:] == sides else nn.functional.interpolate(cells, sides)
        return cells.amax((2, 3)), shown[:, 0]


def localised(maps: Tensor, of: Local) -> Tensor:
    """As `Local`, of tensors."""
    if of.level is not None:
        share = maps / torch.from_numpy(of.level)
        maps = maps / (share.square().mean((1, 2), keepdim=True) + 1e-12).sqrt()
    z, tops = (maps - torch.from_numpy(of.mean)) / torch.from_numpy(of.deviation), []
    for k, shift, unit in zip(of.scales, of.shift, of.unit, strict=True):
        side, signed = abs(k), z if k > 0 else -z
        if side > 1:
            how: dict[str, Any] = {"stride": 1, "padding": side // 2, "count_include_pad": False}
            signed = nn.functional.avg_pool2d(signed[:, None], side, **how)[:, 0]
        tops.append((signed - float(shift)) / float(unit))
    return torch.stack(tops).amax(0)


def write(trained: Trained, folder: Path, log: Log) -> dict[str, Any]:
    """Writes the alarm of a run into a folder. Returns what `gz runs export` says of it."""
    levels = trained.images.levels
    alarm.check(trained.part.data.fit)
    if trained.space is not None or levels in (None, 2):
        why = "binary images, whose pixels are drawn" if levels == 2 else "latents"
        raise UsageError(f"`{trained.name}` scores {why}: its alarm cannot be exported", hint=ELSE)
    assert levels is not None
    home = open_pack(trained.part.data.name, **trained.form, say=log.info)
    check_unchanged(trained.run.owner.path, home.meta)
    held_out, fitted = split_held_out(home, is_good_test(locate(trained.part.data.name), "alarm"))
    held_out = replace(held_out, index=np.sort(held_out.index[:HELD_OUT]))
    name = map_of(trained.model, (), trained.name)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with torch.no_grad():
            net = LocalMap(trained, name, levels).eval()
            usual = fitted.batches(trained, size=AT_ONCE, seed=0)
            net.local = fit_run_local(usual, lambda batch: net.maps(batch.x).numpy()).local
            images = held_out.images()
            write_graph(net, torch.from_numpy(images[:1]), folder / "alarm.onnx")
    except Exception as e:  # maps that search by gradients, and what the exporters of torch raise
        why = str(e).strip().partition("\n")[0][:200]
        message = f"torch cannot write the map of `{trained.name}` as a graph: {why}"
        raise UsageError(message, hint="gz ood pca_local --in ./good --export ./alarm") from e
    scores = scored(folder, images)
    with torch.no_grad():
        expected = net(torch.from_numpy(images[:AT_ONCE]))[0].numpy()[:, 0]
    if not np.allclose(scores[:AT_ONCE], expected, rtol=TOLERANCE, atol=TOLERANCE):
        raise UsageError(f"the graph of `{trained.name}` scores images otherwise than gz", hint=ELSE)
    alarm.table(folder, np.zeros(len(scores)), scores)
    spec = {"shape": list(trained.images.shape), "fit": trained.part.data.fit, "tails": 1}
    files = alarm.script(folder, spec | {"run": trained.run.owner.id, "map": name, "draws": len(net.draws)})
    return {"files": files, "map": name, "held_out": len(scores), "draws": len(net.draws)}


def write_graph(net: LocalMap, image: Tensor, file: Path) -> None:
    """Writes the graph of one image at a time: some models branch on the number of images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters' own code
        program = torch.export.export(net, (image,))
        how: dict[str, Any] = {"dynamo": True, "external_data": False, "verbose": False}
        how |= {"input_names": ["image"], "output_names": ["score", "map"]}
        torch.onnx.export(program, (), file, **how)


def scored(folder: Path, images: np.ndarray) -> np.ndarray:
    """The scores of images by the graph in a folder, [N]."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "alarm.onnx")
    ones = (np.array(images[i : i + 1]) for i in range(len(images)))
    return np.array([session.run(["score"], {"image": x})[0].item() for x in ones])
