"""A model that tests can check by counting: independent pixels with the histogram of its training images."""

import numpy as np
import torch
from torch import nn

from gzcli.core.sections import OodSection, Part
from gzcli.data.packs.open import open_pack
from gzcli.engine.trained import Trained
from gzcli.models.base import Model
from gzcli.models.nn import from_levels, to_levels
from gzcli.store.runs import Run


class Pixelwise(Model):
    """p(x) = Π p_i(x_i). `table` is [pixels, levels], or [classes, pixels, levels] if `conditional`."""

    paper = "none"
    likelihood = "exact"
    costly = ("regret",)

    def __init__(self, data, *, table, conditional=False):
        super().__init__(data)
        self.table, self.conditional, self.broken, self.fitted = table, conditional, False, []
        self.logits = nn.Parameter(table.log())

    def log_prob(self, x, labels=None, *, noise):
        logp = self.logits.log_softmax(-1)
        if self.conditional:
            logp = logp[labels]  # [B, pixels, levels]
        k = to_levels(x, self.data.levels).flatten(1)
        return logp.expand(len(x), -1, -1).gather(2, k[..., None]).sum((1, 2))

    @torch.no_grad()
    def sample(self, n, *, labels=None, noise, progress):
        p = (self.table[labels] if self.conditional else self.table.expand(n, -1, -1)).cumsum(-1)
        k = (noise.rand(n, p.shape[1])[..., None] > p[..., :-1]).sum(-1)
        return from_levels(k, self.data.levels).view(n, *self.data.shape)

    def fit_far(self, batches):
        self.fitted = list(batches)
        self.center = torch.cat([batch.x for batch in batches]).mean(0)

    def score_far(self, x, *, noise, power: float = 1.0):
        score = (x - self.center).square().flatten(1).sum(1) ** power
        return score * float("nan") if self.broken else score

    def score_noisy(self, x, *, noise):
        return x.mean((1, 2, 3)) + noise.randn(len(x))

    def score_regret(self, x, *, noise):
        raise AssertionError("a costly score ran without being named")


def fitted(levels=17, conditional=False, size=None):
    """The maximum-likelihood tables of the digits' training images, one pseudo-count a level."""
    pack = open_pack("digits", size=size)
    k = (np.asarray(pack.images("train")).astype(int) * levels) >> 8
    k, y = k.reshape(len(k), -1), np.asarray(pack.labels("train"))
    groups = [k[y == c] for c in range(10)] if conditional else [k]
    tables = [np.stack([(group == level).sum(0) + 1.0 for level in range(levels)], -1) for group in groups]
    table = torch.from_numpy(np.stack([t / t.sum(-1, keepdims=True) for t in tables])).float()
    table, info = table if conditional else table[0], pack.info(levels=levels)
    return Pixelwise(info, table=table, conditional=conditional)


def nll_of(trained, images):
    """−log p of images uint8 [N, 1, H, W] in nats, [N]: every pixel is looked up in the model's table."""
    k = (np.asarray(images).astype(int) * 17) >> 8
    logp = np.log(trained.model.table.numpy())
    return -np.take_along_axis(logp[None], k.reshape(len(k), -1)[..., None], 2).sum((1, 2))


def fake_run(folder, monkeypatch, module, *, model=None, name="model"):
    """A `Trained` of the model, which `module` (an engine verb) will load for any run of that name."""
    model = (model or fitted()).eval().requires_grad_(False)
    part = Part("pixelwise", ood=OodSection(("nll", "typicality", "complexity", "far")))
    trained = Trained(Run(folder / name), model, model.data, part, torch.device("cpu"), 7)
    by_name = module.__dict__.setdefault("_known_to_tests", {})
    by_name[name] = trained
    monkeypatch.setattr(module, "load_trained", lambda run, *_: by_name[run.id])
    return trained
