"""The trainer, in this process: resume, accumulation, EMA, schedules, checkpoints, divergence."""

import copy
import json
import math
import shutil
import time
import warnings
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from few_steps import EMBEDDED, colour_zip, faults, offline
from helpers import QUICK, figures, fit, lines, recipe, same, trainer
from refused import refused
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import CASES, FIRST, Case, one_a_family

from gzcli.core import devices
from gzcli.core.errors import DivergedError
from gzcli.core.sections import OptimSection
from gzcli.core.types import silent
from gzcli.data.packs.batches import scan
from gzcli.engine import checkpoint as checkpoints
from gzcli.engine import optim
from gzcli.engine import validate as validation
from gzcli.engine.__main__ import train_one
from gzcli.engine.ema import EMA
from gzcli.engine.history import History
from gzcli.engine.log import Log
from gzcli.engine.trained import load_trained
from gzcli.engine.trainer import Trainer
from gzcli.launch.plan import with_data
from gzcli.metrics import networks
from gzcli.metrics.features import lenet
from gzcli.models import catalog
from gzcli.models.base import Phase
from gzcli.models.nn import shared_batch_norm
from gzcli.models.normalizing_flow.realnvp import BatchNorm as FlowNorm
from gzcli.recipe.resolve import resolve
from gzcli.recipe.yaml import dump
from gzcli.store import runs
from gzcli.store.index import survey
from gzcli.store.run_folder import RECORDS

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.mark.parametrize("which", one_a_family(case for case in CASES if not case.stages))
def test_resume_is_the_unbroken_run_bit_for_bit(which):
    """From a checkpoint between two lines. Those that signals leave are tested in test_cadence.py."""
    sets = ("train.ema=0.9", "train.log_every=3", "data.size=16", "train.checkpoint_every=4", "train.keep=2")
    tree = recipe(which, steps=6, sets=(*sets, "train.ema_snapshots=2"))
    whole = fit(tree)
    last, unbroken = whole.run.path / "checkpoints" / "00000006", figures(whole.run)
    wanted = [load_file(last / f"{name}.safetensors") for name in ("model", "ema")]
    snapshots = {path: load_file(path) for path in whole.run.snapshots_folder.iterdir()}
    shutil.rmtree(last)
    resumed = fit(tree, whole.run)
    assert resumed.start == 4 and figures(whole.run) == unbroken
    for name, weights in zip(("model", "ema"), wanted, strict=True):
        assert same(weights, load_file(last / f"{name}.safetensors")), name
    assert [int(path.stem) for path in sorted(snapshots)] == [3, 6]
    assert all(same(values, load_file(path)) for path, values in snapshots.items())


def test_accumulation_changes_nothing_nor_does_a_kill_after_the_last_checkpoint():
    """Four parts of a batch are the batch: one step's gradient is the same to rounding."""
    first = {}
    for parts in (1, 4):
        tree = recipe(FIRST["vae"], steps=3, sets=(f"train.accumulate={parts}",))
        t = fit(tree)
        first[parts] = [x["loss"] for x in lines(t.run.path / "metrics.jsonl")]
    assert first[1] == pytest.approx(first[4], rel=1e-5)
    t = fit(recipe(FIRST["vae"], steps=3))
    weights = t.run.path / "model.safetensors"
    weights.unlink()
    fit(t.part.tree(), t.run)
    assert weights.exists()


def test_a_step_leaves_no_gradient_and_moves_only_the_phase():
    t = trainer(recipe(FIRST["wgan"], steps=10))
    t.begin()
    generator = [p for phase in t.phases if phase.name == "generator" for p in phase.parameters()]
    before = [p.detach().clone() for p in generator]
    t.step(0)  # the generator is due every n_critic steps only
    assert all(torch.equal(a, b) for a, b in zip(before, generator, strict=True))
    assert all(p.grad is None for p in t.model.parameters())
    for step in range(1, 5):
        t.step(step)
    assert not all(torch.equal(a, b) for a, b in zip(before, generator, strict=True))


@pytest.mark.parametrize("model", ["vae", "aae"])
def test_the_gradient_of_a_sum_over_pixels_is_per_dimension(model, monkeypatch):
    """Of the phase whose loss is one, in recipes of format 3; those of format 2 keep that of an image."""
    grads, losses = [], []
    monkeypatch.setattr(
        Trainer, "update", lambda t, *_: grads.append(copies_of_gradients(t)) or torch.zeros(())
    )
    for form in (2, 3):
        t = trainer(recipe(FIRST[model], steps=10) | {"format": form})
        t.begin()
        losses.append(t.step(0))
    n, dims = len(t.phases), math.prod(t.info.shape)
    for i, phase in enumerate(t.phases):
        summed = phase.name in ("main", "autoencoder")
        for then, now in zip(grads[i], grads[n + i], strict=True):
            assert torch.allclose(
                now * (dims if summed else 1), then, rtol=1e-4, atol=1e-6 * float(then.abs().max())
            )
        prefix = "" if n == 1 else f"{phase.name}."
        loss, mean = losses[1][f"{prefix}loss"], losses[1].get(f"{prefix}loss_dim")
        assert loss == losses[0][f"{prefix}loss"] and f"{prefix}loss_dim" not in losses[0]
        assert mean == pytest.approx(float(loss) / dims) if summed else mean is None


def copies_of_gradients(t) -> list[torch.Tensor]:
    """Those of the phase of the last backward pass, which are cleared."""
    grads = [p.grad.clone() for p in t.trainable if p.grad is not None]
    for p in t.trainable:
        p.grad = None
    return grads


def test_ema_follows_the_weights_and_ranks_draw_by_themselves():
    model = torch.nn.Linear(2, 2, bias=False)
    ema, start = EMA(model, 0.999), model.weight.detach().clone()
    model.weight.data += 1
    ema.update()
    torch.testing.assert_close(ema.shadow[0], start + 1 - 2 / 11)  # (1 + 1) / (10 + 1) of the old
    weight = model.weight.detach().clone()
    with ema.swapped():
        torch.testing.assert_close(model.weight.detach(), start + 1 - 2 / 11)
    assert torch.equal(model.weight, weight)
    t = trainer(recipe(FIRST["vae"], steps=1))
    layers = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(3))
    shared_batch_norm.share_batch_norm(layers)
    assert type(layers[0]) is torch.nn.Dropout and type(layers[1]) is shared_batch_norm.SharedBatchNorm

    def drawn(rank: int, step: int) -> tuple[float, ...]:
        t.rank = rank
        t.seed_global(step)
        return tuple(layers[0](torch.ones(20)).tolist())

    keys = [(rank, step) for rank in range(3) for step in range(3)]
    assert len({drawn(*key) for key in keys}) == len(keys)
    assert drawn(1, 2) == drawn(1, 2)


NORMED = Case("dcgan", {"width": 8, "latent": 16, "norm": "batch", "disc_norm": "batch"}, lr=2e-3)
AVERAGED = [NORMED, *(pytest.param(FIRST[name], marks=pytest.mark.slow) for name in ("realnvp", "diffae"))]


@pytest.mark.parametrize("which", AVERAGED, ids=lambda c: c.model)
def test_the_averaged_weights_have_their_own_statistics_and_the_trained_ones_keep_theirs(which):
    """Batch norm's statistics and diffae's moments are found anew for the average."""
    sets = ("train.ema=0.99", "optim.schedule=constant", "optim.warmup=0", "train.checkpoint_every=10")
    t = fit(recipe(which, steps=20, sets=sets))
    model = load_trained(t.run, "cpu").model
    scanned = {"batch_size": 128, "levels": t.info.levels, "device": "cpu", "index": range(1280)}
    batches = list(scan(t.images.pack, "train", **scanned))
    norms, seen = [m for m in model.modules() if isinstance(m, (torch.nn.BatchNorm2d, FlowNorm))], {}
    note = lambda m, x: seen.setdefault(m, []).append(x[0].transpose(0, 1).flatten(1))  # noqa: E731
    for m in norms:
        m.register_forward_pre_hook(note)
    with torch.no_grad():
        for batch in batches if norms else ():
            if which.model == "dcgan":
                model.critic(model.generator(batch.noise.randn(128, 16)))
                model.critic(batch.x)
            else:
                model.log_prob(batch.x, noise=batch.noise)
        if not norms:
            distance = torch.cat([model.score_code(batch.x, noise=batch.noise) for batch in batches])
            assert float(distance.mean() / model.latent) == pytest.approx(1, abs=0.1)
    assert bool(norms) == (which.model != "diffae")
    for m in norms:
        mean, var = (m.mean, m.var) if isinstance(m, FlowNorm) else (m.running_mean, m.running_var)
        true_mean = torch.stack([x.mean(1) for x in seen[m]]).mean(0)
        true_var = torch.stack([x.var(1) for x in seen[m]]).mean(0)
        assert ((mean - true_mean).abs() / true_var.sqrt()).max() < 0.1
        assert ((true_var / var).log().abs()).max() < 0.2
    plain = trainer(recipe(which, steps=20, sets=sets))
    plain.ema.calibrate = None
    plain.fit()
    weights = "checkpoints/00000020/model.safetensors"
    ours, theirs = (load_file(r.run.path / weights) for r in (t, plain))
    assert same(theirs, ours)


def test_rates_and_settings_of_phases():
    conf = OptimSection(warmup=10, schedule="cosine")
    factors = [optim.factor(conf, step, 110) for step in (0, 9, 60, 110)]
    assert factors == pytest.approx([0.1, 1, 0.5, 0])
    assert optim.factor(OptimSection(schedule="linear"), 75, 100) == 0.25
    assert optim.factor(OptimSection(schedule="constant"), 75, 100) == 1
    phases = [Phase("critic", []), Phase("generator", [])]
    common = OptimSection(name="adam", lr=1.0)
    settings = optim.phase_settings(replace(common, phases={"critic": {"lr": 2.0}}), phases)
    assert (settings["critic"].lr, settings["generator"].lr) == (2.0, 1.0)
    refused("has no phase", optim.phase_settings, replace(common, phases={"critc": {"lr": 2.0}}), phases)
    # the recipe of `diffae` sets the rate of a classifier, which it lacks without labels
    possible = catalog.phases(catalog.card("diffae"))
    section = replace(common, phases={"classifier": {"lr": 2.0}})
    assert optim.phase_settings(section, phases[:1], possible).keys() == {"critic"}


def shipped(model: str, *sets: str):
    """A trainer of a recipe as it is shipped, on the digits, for five steps."""
    flags = {"train.steps": 5, "train.precision": "fp32", "launch.cpu": True}
    made = resolve(model, data="digits", sets=(*QUICK, *sets), flags=flags)
    return trainer(with_data(made, made.dataset).tree())


@pytest.mark.parametrize(
    "model",
    [
        "glow",
        "tarflow",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("flow", "flowpp", "realnvp")),
    ],
)
def test_a_flow_as_it_is_shipped_ends_a_run_of_five_steps(model):
    """Its rate of a long run, if reached at once, makes the gradient grow a million-fold."""
    t = shipped(model)
    t.begin()
    losses = [{name: float(value) for name, value in t.step(step).items()} for step in range(5)]
    assert all(abs(losses[-1][name]) < 10 * max(1, abs(value)) for name, value in losses[0].items()), losses


SHORT_RUNS = (1, 2, 5, 10)  # steps


@pytest.mark.slow
@pytest.mark.parametrize("model", offline())
def test_every_recipe_ends_a_run_of_a_few_steps(model, forks, tmp_path):
    """Of each length, and on every set that it trains on: the embedded ones, and a zip in colour. The next
    recipe has the next length on a set, so four recipes have all pairs."""
    sets, first = [*EMBEDDED, str(colour_zip(tmp_path / "colour.zip"))], offline().index(model)
    pairs = [(data, SHORT_RUNS[i % len(SHORT_RUNS)]) for i, data in enumerate(sets, first)]
    ended = {pair: result[0] for pair in pairs if (result := faults(forks, model, *pair))}
    data = next(iter(ended))[0]
    for steps in {*SHORT_RUNS} - {steps for _, steps in ended}:
        ended[data, steps] = faults(forks, model, data, steps)[0]
    assert {pair: fault for pair, fault in ended.items() if fault} == {}


@pytest.mark.parametrize(("eps", "part"), [("1e-8", True), ("0.1", False)])
def test_halves_of_a_batch_part_glow_by_steps_along_gradients_of_rounding(eps, part):
    """As two processes do, whose order of sums two halves have. The first batch has normalised what biases
    and scales move, so that their gradient is zero but for rounding, of which Adamax makes a full step."""
    weights = []
    for parts in (1, 2):
        t = shipped("glow", "train.batch_size=8", f"train.accumulate={parts}", f"optim.eps={eps}")
        t.begin()
        t.step(0)
        weights.append({name: p.detach().clone() for name, p in t.model.named_parameters()})
    apart = [name for name, p in weights[0].items() if (p - weights[1][name]).abs().max() > 1e-6]
    assert bool(apart) == part and all(name.endswith((".bias", "log_scale", "log_s")) for name in apart)


def test_a_damaged_checkpoint_is_named_and_some_are_kept(tmp_path):
    t = fit(recipe(FIRST["vae"], steps=4, sets=("train.checkpoint_every=2", "train.keep=3")))
    folder = t.run.path / "checkpoints"
    assert checkpoints.steps_of(folder) == [2, 4]
    file = folder / "00000004" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    said = []
    assert checkpoints.newest(folder, said.append) == folder / "00000002"
    assert len(said) == 1 and "model.safetensors" in said[0] and "00000004" in said[0]
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3, 4, 5):
        (folder / f"{step:08d}").mkdir(parents=True)
    (folder / "best.json").write_text(json.dumps({"step": 2}))
    checkpoints.prune(folder, 2)
    assert checkpoints.steps_of(folder) == [2, 4, 5]


def test_denoisers_are_chosen_by_their_samples(monkeypatch):
    """Where there is a judge and enough validation images; else by the loss, which is validated beside it."""
    judged, sizes = [True], []

    def chosen(model, n, choice="auto", minutes=None, channels=1):
        meta = SimpleNamespace(channels=channels, counts={"train": n})
        pack = SimpleNamespace(images=lambda split: range(n), meta=meta)
        return validation.best_metric(model, choice, pack, minutes)

    monkeypatch.setattr(validation, "has_lenet", lambda pack: judged[0])
    t = trainer(recipe(FIRST["fm"], steps=1))
    fm, vae = t.model, trainer(recipe(FIRST["vae"], steps=1)).model
    assert [chosen(fm, n) for n in (0, 199, 200)] == [None, "loss", "fd"]
    assert chosen(vae, 200) == "bpd" and chosen(fm, 30, "fd") == "fd" and chosen(fm, 200, "loss") == "loss"
    judged[0] = False  # it would take a minute of the run
    assert (chosen(fm, 200), chosen(fm, 200, minutes=9.0), chosen(fm, 200, minutes=10.0)) == (
        "loss",
        "loss",
        "fd",
    )
    monkeypatch.setattr(networks, "is_installed", lambda: True)
    assert chosen(fm, 200, channels=3) == "fd", "few colour images have a published judge"
    draw = validation.sampler.draw
    monkeypatch.setattr(
        validation.sampler, "draw", lambda t, n, **how: (sizes.append(n), draw(t, n, **how))[1]
    )
    monkeypatch.setattr(validation, "SLOW_SAMPLES", 12)
    packs = {"pack": t.pack, "data": t.images.pack, "net": lenet(t.pack), "warn": silent}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = validation.validate(t.trained, "fd", **packs)
    assert sizes == [12] and {"fd", "recall", "loss"} <= values.keys() and 0 <= values["recall"] <= 1
    assert values["loss"] == validation.validate(t.trained, "loss", **packs)["loss"]


def test_validation_by_samples_needs_a_tenth_of_the_time_at_most(monkeypatch):
    """Else the loss chooses the best, unless the metric was typed."""
    costs = {"fd": 8.0, "loss": 0.5}
    monkeypatch.setattr("gzcli.engine.trainer.validation_seconds", lambda trained, metric, **_: costs[metric])
    monkeypatch.setattr("gzcli.engine.trainer.sample_seconds", lambda *_: 0.1)
    for length, best, chosen in ((60.0, "auto", "loss"), (600.0, "auto", "fd"), (60.0, "fd", "fd")):
        t = trainer(recipe(FIRST["fm"], steps=1, sets=(f"train.best={best}", "train.samples=null")))
        t.metric = "fd"
        pauses = t.pauses(length, time.monotonic)
        assert t.metric == chosen and pauses.took == {"eval": costs[chosen], "sample": pytest.approx(6.4)}


def test_a_mean_over_validation_images_needs_a_tenth_of_the_time_at_most(monkeypatch):
    """Else fewer images are used, whole batches of them, unless the recipe sets their number."""
    monkeypatch.setattr("gzcli.engine.trainer.validation_seconds", lambda *_, **__: 30.0)
    monkeypatch.setattr("gzcli.engine.trainer.sample_seconds", lambda *_: 0.1)
    for n, length, images, seconds in (
        ("null", 600.0, None, 30.0),
        ("null", 60.0, 20, 30 * 20 / 144),
        ("null", 6.0, 10, 30 * 10 / 144),
        ("70", 60.0, 70, 30.0),
    ):
        monkeypatch.setattr("gzcli.engine.trainer.EVAL_BATCH", 10)
        t = trainer(recipe(FIRST["vae"], steps=1, sets=("train.samples=10", f"train.eval_images={n}")))
        t.metric = "bpd"
        took = t.pauses(length, time.monotonic).took
        assert t.train.eval_images == images and took["eval"] == pytest.approx(seconds)
        t.trained.part = replace(t.part, train=t.train)
        assert validation.mean_count(t.trained, 144) == (images or 144)


def test_each_pause_recomputes_the_statistics_of_batch_norm(monkeypatch):
    """For the averaged weights; also a checkpoint does, which takes next to nothing otherwise."""
    monkeypatch.setattr("gzcli.engine.trainer.validation_seconds", lambda *_, **__: 2.0)
    monkeypatch.setattr("gzcli.engine.trainer.sample_seconds", lambda *_: 0.1)
    t, now = trainer(recipe(FIRST["dcgan"], steps=1, sets=("train.samples=10",))), [0.0]
    t.metric, t.ema.calibrate = "fd", lambda batches: now.__setitem__(0, now[0] + 5.0)
    assert t.pauses(600.0, lambda: now[0]).took == {"eval": 7.0, "sample": 6.0, "checkpoint": 5.0}


def test_a_loss_that_rises_is_told_whatever_chooses_the_best(monkeypatch):
    """The weights that are best by their samples are then served."""
    losses = iter([3.0, 1.0, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0])
    distances = iter([90.0, 50.0, 40.0, 30.0, 35.0, 36.0, 37.0, 38.0, 39.0, 40.0])
    said: list[str] = []
    values = lambda *a, **k: {"fd": next(distances), "loss": next(losses)}  # noqa: E731
    monkeypatch.setattr("gzcli.engine.trainer.validate", values)
    monkeypatch.setattr(Trainer, "get_net", lambda self: None)
    monkeypatch.setattr(Log, "warn", lambda self, text: said.append(text))
    run = fit(recipe(FIRST["fm"], steps=10, sets=("train.eval_every=1", "train.best=fd"))).run
    (message,) = [text for text in said if "has worsened" in text]
    assert message.startswith("validation has worsened since step 2") and next(losses, None) is None
    assert run.model_file.samefile(run.checkpoint(4).averaged)


def test_a_finished_run_keeps_what_it_goes_on_from_and_what_is_sampled(monkeypatch):
    """The last checkpoint, whole, and the averaged weights of the best one; no weights lie there twice."""
    values = iter([0, 5, 5, 0, 5])  # the first is the best, and the last is not much worse
    monkeypatch.setattr("gzcli.engine.trainer.validate", lambda *a, **k: {"loss": float(next(values))})
    sets = ("train.checkpoint_every=2", "train.eval_every=2", "train.best=loss", "train.ema=0.9")
    tree = recipe(FIRST["vae"], steps=8, sets=sets)
    t = fit(tree)
    folder = t.run.path / "checkpoints"
    assert checkpoints.steps_of(folder) == [2, 8] and t.run.best.step == 2
    assert {file.name for file in (folder / "00000002").iterdir()} == {"ema.safetensors", "meta.json"}
    assert checkpoints.damage(folder / "00000008") is None
    last = folder / "00000008" / "ema.safetensors"
    assert (t.run.path / "model.safetensors").samefile(last)
    sizes = sum(file.stat().st_size for file in t.run.path.rglob("*") if file.is_file())
    assert survey(t.run.path, RECORDS)[1] == sizes - last.stat().st_size
    assert load_trained(t.run, "cpu", "best").step == 2 and load_trained(t.run, "cpu").step == 8
    longer = fit(tree | {"train": tree["train"] | {"steps": 10}}, t.run)
    assert longer.start == 8 and checkpoints.steps_of(folder) == [2, 10]
    fit(tree | {"train": tree["train"] | {"steps": 10}}, t.run)  # has nothing to do but to finish once more
    assert list(t.run.path.glob("*.part")) + list(t.run.path.glob(".*.part")) == []
    (folder / "00000010" / "train.pt").unlink()
    said = []  # of the best one nothing
    assert checkpoints.newest(folder, said.append) is None and len(said) == 1


def poisoned(monkeypatch, factor: float, steps: range, *sets: str):
    """A trainer of a vae whose loss is multiplied by the factor at these steps."""
    t = trainer(recipe(FIRST["vae"], steps=20, sets=("train.checkpoint_every=4", *sets)))
    loss = t.model.loss

    def changed(batch, phase="main"):
        out = loss(batch, phase)
        return out | {"loss": out["loss"] * factor} if t.poison else out

    t.poison = False
    monkeypatch.setattr(t.model, "loss", changed)
    monkeypatch.setattr(t, "seed_global", lambda step: setattr(t, "poison", step in steps))
    return t


def copies(t) -> list[torch.Tensor]:
    return [p.detach().clone() for p in t.model.parameters()]


def test_bad_steps_and_weights(monkeypatch):
    """One is left out; a loss that is not finite, or explodes, stops the run before its next line."""
    t = poisoned(monkeypatch, math.nan, range(6, 7), "train.clip=1.0")
    t.fit()
    assert all(torch.isfinite(p).all() for p in t.model.parameters()) and t.run.status()["step"] == 20
    t = poisoned(monkeypatch, 1e5, range(19, 20), "train.skip=40", "optim.schedule=constant")
    before: list[torch.Tensor] = []
    monkeypatch.setattr(t.model, "on_step", lambda step: before.extend(copies(t)) if step == 18 else None)
    t.fit()
    assert all(torch.equal(p, q) for p, q in zip(t.model.parameters(), before, strict=True))
    for factor, good in ((math.nan, 8), (1e12, 4)):  # what is not finite has changed no weights
        t = poisoned(monkeypatch, factor, range(6, 20), "train.clip=null")
        refused(rf"at step 11; the last good checkpoint is at step {good}", t.fit, error=DivergedError)
    # a loss may be finite after a step to such weights: it was computed before
    t = trainer(recipe(FIRST["vae"], steps=8, sets=("train.checkpoint_every=4",)))
    name, p = next(iter(t.model.named_parameters()))

    def broken(step):
        if step == 7:
            p.data.view(-1)[0] = math.nan

    monkeypatch.setattr(t.model, "on_step", broken)
    refused(rf"weights `{name}` are not finite .* step 4", t.fit, error=DivergedError)
    assert checkpoints.steps_of(t.run.path / "checkpoints") == [4]


def test_gradients_that_are_not_finite_are_dropped_counted_and_shown(monkeypatch, capfd):
    """Also without clipping, and in the last step; the count outlives a resume."""
    for sets, steps in ((("train.clip=null",), range(6, 9)), (("train.clip=1.0",), range(19, 20))):
        t = poisoned(monkeypatch, math.nan, steps, "train.log_every=10", *sets)
        t.fit()
        assert all(torch.isfinite(p).all() for p in t.model.parameters())
        assert checkpoints.steps_of(t.run.path / "checkpoints")[-1] == t.run.status()["step"] == 20
        counts = {row["step"]: row["dropped"] for row in lines(t.run.metrics_file) if "dropped" in row}
        assert counts == {10 if steps.start == 6 else 20: len(steps)}
        assert t.run.log_file.read_text().count("steps with non-finite gradients are skipped") == 1
    t = poisoned(monkeypatch, math.nan, range(3), "train.steps=3")
    refused("at step 3; there is no checkpoint", t.fit, error=DivergedError)
    history = History(t.run, t.log, torch.device("cpu"))
    history.gradient(torch.tensor(math.inf))
    history.add({"loss": torch.tensor(1.0)})
    later = History(t.run, t.log, torch.device("cpu"))
    later.resume(3, history.pending(), 50)
    assert int(later.dropped) == 1


class NoSync(TorchDispatchMode):
    """Refuses what waits for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "muon", "adamax", "rmsprop"])
def test_a_gpu_drops_them_without_waiting(name, monkeypatch):
    """By the fused kernels, which leave the moments too; others step by zeros."""
    torch.manual_seed(0)
    model = torch.nn.Linear(40, 40)
    params, conf = list(model.parameters()), OptimSection(name=name, lr=1e-2, weight_decay=0.0)
    gpu = SimpleNamespace(queued=True, fused=True)
    monkeypatch.setattr(optim, "device_kind", lambda device: gpu)
    optimizer = optim.build(Phase("main", params), conf, model)

    def stepped(value: float) -> None:
        for p in params:
            p.grad = torch.full_like(p, value)
        with NoSync() if value != 1.0 else nullcontext():  # adamax of CPUs reads its step
            optim.step(optimizer, params, optim.clip(params, 1.0), None, None)

    stepped(1.0)
    before, state = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())
    for value in (math.nan, math.inf):
        if name not in ("adamax", "rmsprop"):
            stepped(value)
    if name in ("adam", "adamw", "sgd"):
        assert all(map(torch.equal, params, before))
        torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
    stepped(1.0)
    assert all(p.isfinite().all() for p in params) and not torch.equal(params[0], before[0])


@pytest.mark.parametrize(("judge", "left"), [(60.0, 240 * 0.98 - 60 - 5 - 5 - 5.5), (230.0, 120)])
def test_what_a_run_does_before_its_first_step_is_of_its_time(home, monkeypatch, capfd, judge, left):
    """Also the net that judges a GAN, and what follows the trial. Half of the time is left for steps."""
    now = [0.0]

    def takes(seconds: float):
        return lambda *_, **__: now.__setitem__(0, now[0] + seconds)

    monkeypatch.setattr(devices, "clock", lambda *_: now[0])
    for name, seconds in (("begin", 5.0), ("step", 0.1), ("fit", 0.0)):
        monkeypatch.setattr(Trainer, name, takes(seconds))
    net = lambda *_, **__: takes(judge)() or SimpleNamespace(alive=True, features=len)  # noqa: E731
    monkeypatch.setattr("gzcli.engine.validate.lenet", net)
    tree = recipe(FIRST["dcgan"], steps=1)
    tree["train"] |= {"minutes": 4.0, "clock": "cpu", "best": "fd"}
    run = runs.create("dcgan", "digits")
    (run.path / "run.yaml").write_text(dump(tree))
    train_one(run, Log(run.path))
    assert run.tree()["train"]["steps"] == pytest.approx(10 * left, abs=1)
    assert ("preparation took 4m00s of the 4m00s" in capfd.readouterr().err) == (judge > 100)
