"""`gz runs export --to alarm`: the map of a run as a local score in one graph, with its held-out scores.

A map uses the same noise for every image, so the draws are constants of the graph. The graph itself scores
the held-out images, and the p-values are those of the score `local`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gzcli.core.errors import UsageError
from gzcli.core.types import ImageNoise, Noise
from gzcli.data.packs.batches import quantise
from gzcli.data.packs.open import open_pack
from gzcli.data.packs.pack import check_unchanged
from gzcli.data.sets.registry import locate
from gzcli.engine.log import Log
from gzcli.engine.trained import Trained
from gzcli.export import alarm
from gzcli.judge.alarm import split_held_out
from gzcli.judge.local import Maps, fit_run_local
from gzcli.judge.methods import is_good_test
from gzcli.judge.scores import NOISE_DRAWS, map_of
from gzcli.metrics.alarms.local import Local
from gzcli.models.base import flat_defaults, group_options
from gzcli.store import files

HELD_OUT = 2000  # maximum number of held-out scores
AT_ONCE = 32  # images scored together
TOLERANCE = 1e-3  # relative tolerance for scores of the graph
OTHER_FORMATS_HINT = (
    "use `--to file` for any run, or `--to diffusers` for those of `gz list models --can export`"
)


class DrawnNoise(Noise):
    """Noise that returns draws from a list."""

    def __init__(self, values: list[Tensor]):
        self.values, self.device = iter(values), values[0].device

    def _draw(self, method: str, shape: tuple[int, ...], high: int | None = None) -> Tensor:
        return next(self.values)


class RecordedNoise(ImageNoise):
    """Noise for one image that records its draws."""

    def __init__(self, seed: int):
        super().__init__(seed, [0])
        self.values: list[Tensor] = []

    def _draw(self, method: str, shape: tuple[int, ...], high: int | None = None) -> Tensor:
        self.values.append(super()._draw(method, shape, high))
        return self.values[-1]


class LocalMap(nn.Module):
    """The score [N, 1] and the map [N, H, W] of images uint8 [N, C, H, W]."""

    def __init__(self, trained: Trained, name: str, levels: int):
        super().__init__()
        self.model, self.name, self.levels = trained.model, name, levels
        method = getattr(trained.model, f"map_{name}")
        keys = flat_defaults(method)
        self.options = group_options(method, {k: v for k, v in trained.part.ood.options.items() if k in keys})
        self.draws = [values for seed in range(NOISE_DRAWS) if (values := self.recorded(trained, seed))]
        self.locals: list[Local] = []  # one map for each draw of noise; a single one without draws

    def recorded(self, trained: Trained, seed: int) -> list[Tensor]:
        """The noise that the map of an image draws with this seed."""
        noise = RecordedNoise(seed)
        self.raw(quantise(torch.zeros(1, *trained.images.shape, dtype=torch.uint8), self.levels), noise)
        return noise.values

    def raw(self, x: Tensor, noise: ImageNoise | DrawnNoise) -> Tensor:
        return getattr(self.model, f"map_{self.name}")(x, noise=noise, **self.options)

    def maps(self, x: Tensor) -> list[Tensor]:
        """The model's map for each draw of noise, [N, h, w] each."""
        return [self.map(x, i) for i in range(max(1, len(self.draws)))]

    def map(self, x: Tensor, i: int) -> Tensor:
        if not self.draws:
            return self.raw(x, ImageNoise(0, [0]))
        return self.raw(x, DrawnNoise([v.expand(x.shape[0], *v.shape[1:]) for v in self.draws[i]]))

    def draw(self, i: int) -> Maps:
        """The maps of batches with one draw of noise."""
        return lambda batch: self.map(batch.x, i).numpy()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        pairs = list(zip(self.maps(quantise(image, self.levels)), self.locals, strict=True))
        score = torch.stack([of.cells(maps).amax((1, 2)) for maps, of in pairs]).mean(0)
        shown = torch.stack([of.shown(maps) for maps, of in pairs]).mean(0)[:, None]
        sides = image.shape[2:]
        shown = shown if shown.shape[2:] == sides else nn.functional.interpolate(shown, sides)
        return score[:, None], shown[:, 0]


def write(trained: Trained, folder: Path, log: Log) -> dict[str, Any]:
    """Writes the alarm of a run into a folder. Returns its line for `gz runs export`."""
    levels = trained.images.levels
    alarm.check(trained.part.data.fit)
    if trained.space is not None or levels in (None, 2):
        why = "binary images, whose pixels are drawn" if levels == 2 else "latents"
        raise UsageError(
            f"the alarm of `{trained.name}` cannot be exported, because it scores {why}",
            hint=OTHER_FORMATS_HINT,
        )
    assert levels is not None
    home = open_pack(trained.part.data.name, **trained.form, say=log.info)
    check_unchanged(trained.run.owner.path, home.meta)
    held_out, fitted, notes = split_held_out(home, is_good_test(locate(trained.part.data.name), "alarm"))
    for note in notes:
        log.info(note)
    held_out = replace(held_out, index=np.sort(held_out.index[:HELD_OUT]))
    name = map_of(trained.model, (), trained.name)
    files.make_folder(folder)
    try:
        with torch.no_grad():
            net = LocalMap(trained, name, levels).eval()
            usual = fitted.batches(trained, size=AT_ONCE, seed=0)
            net.locals = [fit_run_local(usual, net.draw(i)).local for i in range(max(1, len(net.draws)))]
            images = held_out.images()
            # for one image at a time, because some models branch on the number of images
            graph = alarm.onnx_of(net, torch.from_numpy(images[:1]), None, ["score", "map"])
    except Exception as e:  # maps that search by gradients, and errors of torch's exporters
        why = str(e).strip().partition("\n")[0][:200]
        message = f"torch cannot export the map of `{trained.name}` as a graph: {why}"
        raise UsageError(message, hint="gz ood --in ./good --export ./alarm") from e
    files.write_atomic(folder / alarm.GRAPH, graph)
    scores = scored(folder, images)
    with torch.no_grad():
        expected = net(torch.from_numpy(images[:AT_ONCE]))[0].numpy()[:, 0]
    if not np.allclose(scores[:AT_ONCE], expected, rtol=TOLERANCE, atol=TOLERANCE):
        raise UsageError(
            f"the scores of the exported graph of `{trained.name}` differ from those of gz",
            hint=OTHER_FORMATS_HINT,
        )
    alarm.table(folder, np.zeros(len(scores)), scores)
    spec: dict[str, Any] = {"shape": trained.images.shape, "fit": trained.part.data.fit, "tails": 1}
    spec |= {"run": trained.run.owner.id, "map": name, "draws": len(net.draws)}
    names = alarm.script(folder, spec, len(scores))
    return {"files": names, "map": name, "held_out": len(scores), "draws": len(net.draws)}


def scored(folder: Path, images: np.ndarray) -> np.ndarray:
    """The scores [N] that the graph in a folder gives to images."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / alarm.GRAPH)
    singles = (np.array(images[i : i + 1]) for i in range(len(images)))
    return np.array([session.run(["score"], {"image": x})[0].item() for x in singles])
