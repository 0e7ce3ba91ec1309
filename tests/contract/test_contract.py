"""What every model owes: the contract over the whole zoo, on the embedded digits."""

from __future__ import annotations

import copy

import pytest
import torch
from zoo import CASES, Case

from gzcli.data.batches import TrainBatches, quantise, scan
from gzcli.data.open import open_named
from gzcli.models import catalog
from gzcli.models.base import Model, Phase
from gzcli.models.nn import ClassEmbedding
from gzcli.models.options import grouped
from gzcli.types import Batch, BatchNoise, DataInfo, ImageNoise, no_progress

SEED = 0


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return request.param


@pytest.fixture
def pack(case):
    return open_named(case.data)


def build(case: Case, pack) -> Model:
    return case.build(pack.info(levels=case.levels, steps=1000), SEED)


def batches(case: Case, pack) -> TrainBatches:
    info, needs = pack.info(levels=case.levels), catalog.card(case.model).needs
    return TrainBatches(
        pack, seed=SEED, batch_size=case.batch, levels=info.levels, device=torch.device("cpu"), needs=needs
    )


def prepared(model: Model, batch: Batch) -> Batch:
    """With what a later stage makes of the images."""
    if hasattr(model, "prepare"):
        batch.extra |= model.prepare(batch)
    return batch


def fixed_noise(batch: Batch, phase: str, step: int = 0) -> Batch:
    return batch.rows(slice(None), BatchNoise(SEED, step, phase, total=len(batch)))


def loss_of(model: Model, batch: Batch, phase: str) -> torch.Tensor:
    out = model.loss(batch, phase)
    return out["loss"] if isinstance(out, dict) else out


def only(model: Model, phase: Phase) -> list[torch.nn.Parameter]:
    model.requires_grad_(False)
    params = phase.parameters()
    for p in params:
        p.requires_grad_(True)
    return params


def started(case: Case, pack) -> tuple[Model, Batch]:
    model = build(case, pack).train()
    batch = prepared(model, batches(case, pack).at(0))
    with torch.no_grad():
        model.on_start(batch)
    return model, batch


def draw(model: Model, case: Case, seed: int = 0, n: int = 4, labels=None) -> torch.Tensor:
    options = grouped(model.sample, case.sample)
    with torch.inference_mode():
        return model.sample(
            n, labels=labels, noise=ImageNoise(seed, range(n)), progress=no_progress, **options
        )


def test_each_phase_learns_alone(case, pack):
    fresh, batch = started(case, pack)
    for phase in fresh.phases():
        model = copy.deepcopy(fresh)
        alone = next(p for p in model.phases() if p.name == phase.name)
        params = only(model, alone)
        optimizer, losses = torch.optim.Adam(params, lr=case.lr), []
        for _ in range(31):
            loss = loss_of(model, fixed_noise(batch, phase.name), phase.name)
            losses.append(float(loss))
            loss.backward()
            for name, p in model.named_parameters():
                if p.grad is not None:
                    assert p.requires_grad, f"{name} has a gradient in phase {phase.name}"
                    assert torch.isfinite(p.grad).all(), name
            solved = losses[-1] == 0  # a hinge with nothing left to learn of this batch
            assert solved or any(p.grad is not None and p.grad.any() for p in params)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        fall = (losses[0] - losses[-1]) / abs(losses[0])
        assert fall >= 0.10, f"{phase.name}: {losses[0]:.4g} → {losses[-1]:.4g}"


def test_loss_depends_on_the_batch_alone(case, pack):
    model, batch = started(case, pack)
    for phase in model.phases():
        only(model, phase)
        values = []
        for state in (1, 2):
            torch.manual_seed(state)
            values.append(float(loss_of(copy.deepcopy(model), fixed_noise(batch, phase.name), phase.name)))
        assert values[0] == values[1]
        other = float(loss_of(copy.deepcopy(model), fixed_noise(batch, phase.name, step=1), phase.name))
        quiet = case.quiet or (model.likelihood == "exact" and model.data.levels is not None)
        assert other != values[0] or quiet, "the noise has no effect"


def test_samples(case, pack):
    model = started(case, pack)[0]
    for p in model.parameters():  # zero-initialised outputs would hide the inputs
        p.data += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    model.eval()
    x = draw(model, case)
    assert x.shape == (4, *pack.info().shape)
    assert torch.isfinite(x).all()
    assert x.min() >= -1 and x.max() <= 1
    assert torch.equal(x, draw(model, case))
    assert not torch.equal(x, draw(model, case, seed=1))
    assert torch.allclose(x[:2], draw(model, case, n=2), atol=2 / 255), (
        "image i depends on the size of its batch"
    )
    if model.conditional:
        for table in (m.table for m in model.modules() if isinstance(m, ClassEmbedding)):
            torch.nn.init.normal_(table.weight, generator=torch.Generator().manual_seed(2))
        assert not torch.equal(
            draw(model, case, labels=torch.zeros(4).long()), draw(model, case, labels=torch.ones(4).long())
        )


def test_save_and_load(case, pack, tmp_path):
    from safetensors.torch import load_file, save_file

    from gzcli.engine.checkpoint import weights_of

    model = started(case, pack)[0]
    save_file(weights_of(model.state_dict()), tmp_path / "w.safetensors")
    other = case.build(model.data, 99)
    vars(other).update({name: vars(model)[name] for name in case.stages})  # a stage has a file of its own
    missing, unexpected = other.load_state_dict(load_file(tmp_path / "w.safetensors"), strict=False)
    assert not unexpected and all(key.endswith("_extra_state") for key in missing)
    assert torch.equal(draw(model.eval(), case), draw(other.eval(), case))


def test_capabilities_tell_the_truth(case, pack):
    card, model = catalog.card(case.model), build(case, pack)
    assert type(model) is catalog.load(case.model)
    assert card.paper and card.paper == model.paper
    for name in card.do:
        assert callable(getattr(model, name))
    for name in card.scores:
        assert callable(getattr(model, f"score_{name}"))
    assert ("log_prob" in card.can) == hasattr(model, "log_prob") == (model.likelihood is not None)
    assert model.conditional == case.conditional


def test_training_helps(case, pack):
    model, source = started(case, pack)[0], batches(case, pack)
    if not hasattr(model, "log_prob") and not hasattr(model, "reconstruct"):
        pytest.skip("neither a likelihood nor a reconstruction")
    untrained = copy.deepcopy(model).eval()
    optimizers = {phase.name: torch.optim.Adam(phase.parameters(), lr=case.lr) for phase in model.phases()}
    for step in range(200):
        batch = prepared(model, source.at(step))
        for phase in model.phases():
            if phase.due(step):
                only(model, phase)
                loss_of(model, fixed_noise(batch, phase.name, step), phase.name).backward()
                optimizers[phase.name].step()
                model.zero_grad(set_to_none=True)
        model.on_step(step)
    model.eval()
    batch = next(scan(pack, "test", batch_size=32, levels=model.data.levels, device=torch.device("cpu")))
    assert goodness(model, batch) > goodness(untrained, batch)


def goodness(model: Model, batch: Batch) -> float:
    noise = ImageNoise(0, batch.index.tolist())
    with torch.inference_mode():
        if hasattr(model, "prepare"):  # a later stage: its images are an earlier one's
            return -float(loss_of(model, prepared(model, fixed_noise(batch, "main")), "main"))
        if hasattr(model, "log_prob"):
            return float(model.log_prob(batch.x, noise=noise).mean())
        return -float(
            (model.reconstruct(batch.x, noise=noise, progress=no_progress).images - batch.x).square().mean()
        )


def test_scores_know_nothing_of_their_batch(case, pack):
    model = started(case, pack)[0].eval()
    card = catalog.card(case.model)
    device = torch.device("cpu")
    for name in card.fits:
        getattr(model, f"fit_{name}")(
            scan(pack, "val", batch_size=16, levels=model.data.levels, device=device, index=range(32))
        )
    batch = next(scan(pack, "test", batch_size=4, levels=model.data.levels, device=device))
    methods = {name: getattr(model, f"score_{name}") for name in card.scores}
    if hasattr(model, "log_prob"):
        methods["log_prob"] = model.log_prob
    for name, method in methods.items():
        index = batch.index.tolist()
        with torch.no_grad():
            together = method(batch.x, noise=ImageNoise(0, index))
            alone = method(batch.x[2:3], noise=ImageNoise(0, index[2:3]))
        assert together.shape == (4,) and torch.isfinite(together).all(), name
        torch.testing.assert_close(
            alone[0], together[2], rtol=1e-5, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_evaluation_waits_for_no_other_process(case, pack, monkeypatch):
    """Ranks have unequal shares of held-out images: a model that met its partner there would hang, or get its
    rows."""
    model = started(case, pack)[0].eval()
    met = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: met.append("all_reduce"))
    monkeypatch.setattr(torch.distributed, "all_gather", lambda parts, t: met.append("all_gather"))
    device = torch.device("cpu")
    batch = prepared(model, next(scan(pack, "val", batch_size=3, levels=model.data.levels, device=device)))
    with torch.no_grad():
        if hasattr(model, "log_prob"):
            model.log_prob(batch.x, noise=batch.noise)
        if model.best != "fd":  # else `Watch` draws samples
            model.loss(batch, model.phases()[0].name)
    draw(model, case, n=2)
    assert met == []


@pytest.mark.parametrize("kind", ["rgb", "multi-label", "label-free"])
def test_every_kind_of_set(case, kind):
    """RGB, several labels at once, none at all: what a model refuses it refuses before it is built
    (`check_data`)."""
    if kind == "label-free" and case.conditional:
        pytest.skip("a conditional model needs labels")
    classes = () if kind == "label-free" else ("a", "b", "c")
    info = DataInfo(
        (3 if kind == "rgb" else 1, 16, 16),
        case.levels or 256,
        classes,
        kind == "multi-label",
        n=64,
        steps=100,
    )
    model = case.build(info, SEED).train()
    u8 = torch.randint(
        256, (6, *info.shape), generator=torch.Generator().manual_seed(SEED), dtype=torch.uint8
    )
    y = {
        "rgb": torch.arange(6) % 3,
        "multi-label": torch.tensor([[0, 0, 0], [1, 0, 1], [1, 1, 1]] * 2).byte(),
    }.get(kind)
    noise = BatchNoise(SEED, 0, "main", total=6)
    x = quantise(u8, info.levels, noise)
    extra = {"b": x.flip(0), "before": x.flip(0), "caption": ["a handwritten seven"] * 6}
    batch = prepared(
        model, Batch(x, y, torch.arange(6), noise, {key: extra[key] for key in model.needs if key in extra})
    )
    with torch.no_grad():
        model.on_start(batch)
    for phase in model.phases():
        only(model, phase)
        loss = loss_of(model, fixed_noise(batch, phase.name), phase.name)
        loss.backward()
        assert torch.isfinite(loss)
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    model.eval()
    assert draw(model, case, n=3).shape == (3, *info.shape)
    if case.conditional and kind == "multi-label":
        assert draw(model, case, n=3, labels=y[:3].float()).shape == (3, *info.shape)
    if hasattr(model, "log_prob"):
        with torch.no_grad():
            value = model.log_prob(batch.x, y if case.conditional else None, noise=ImageNoise(SEED, range(6)))
        assert value.shape == (6,) and torch.isfinite(value).all()
