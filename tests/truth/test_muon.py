"""Muon: beside torch's own, its updates beside a singular value decomposition, what it leaves to AdamW."""

import copy

import pytest
import torch
from torch import nn

from gzcli.core.sections import OptimSection
from gzcli.engine import optim
from gzcli.engine.optim import Muon, matrices_of, orthogonalised
from gzcli.models.base import Phase
from gzcli.models.nn import stacked
from gzcli.models.nn.dit import DiTNet, DiTOptions
from gzcli.models.nn.unet import Levels, UNet

CONF = OptimSection(name="muon", lr=3e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)


def descend(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> list:
    """The weights after some steps towards random targets."""
    noise = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x, y = (torch.randn(256, 40, generator=noise) for _ in range(2))
        (net(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in net.parameters()]


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(40, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 8), nn.Linear(8, 40)]
    return nn.Sequential(*layers)


def test_singular_values_become_one_and_their_vectors_stay():
    for shape in ((3, 32, 48), (2, 80, 40)):
        g = torch.randn(shape) * torch.logspace(0, -1, shape[2])
        u, _, vh = torch.linalg.svd(g, full_matrices=False)
        turned = u.mT @ orthogonalised(g) @ vh.mT  # diagonal where the vectors are kept
        values = turned.diagonal(dim1=1, dim2=2)
        assert values.min() > 0.6 and values.max() < 1.3
        assert (turned - torch.diag_embed(values)).abs().max() < 0.05  # bf16


def test_long_matrices_are_iterated_on_their_small_side_to_the_same_result(monkeypatch):
    g = torch.randn(2, 32, 288) * torch.logspace(0, -4, 32)[None, :, None]  # singular values far apart
    monkeypatch.setattr(optim, "LONG_RATIO", 1000)
    exact, whole = orthogonalised(g.double()), orthogonalised(g)
    monkeypatch.undo()
    assert (orthogonalised(g.double()) - exact).abs().max() < 1e-12
    small = orthogonalised(g)
    assert not torch.equal(small, whole)  # found another way
    for result in (small, orthogonalised(g.mT.contiguous()).mT, whole):
        assert (result - exact).abs().max() < 1e-5


def test_it_iterates_in_the_precision_of_the_run():
    """Some CPUs take twenty times as long for a product in bf16."""
    p, g, errors = nn.Parameter(torch.zeros(48, 64)), torch.randn(48, 64), {}
    exact = orthogonalised(g.double()[None])[0]
    for precision in ("bf16", "fp32", "fp16"):
        optimizer = optim.build(Phase("main", [p]), CONF, precision=precision)
        with torch.no_grad():
            p.zero_()
        p.grad = g.clone()
        optimizer.step()
        step = p.detach() / p.detach().norm() * exact.norm()
        errors[precision] = (step + exact).abs().max().item()
    assert errors["fp32"] == errors["fp16"] < 1e-4 < 1e-3 < errors["bf16"]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has none")
def test_the_steps_are_those_of_torchs_muon_and_adamw():
    ours, theirs = net(), net()
    wide = [p for p in theirs.parameters() if p.ndim == 2 and min(p.shape) >= 32]
    rest = [p for p in theirs.parameters() if not any(p is w for w in wide)]
    assert len(wide) == 2
    reference = [
        torch.optim.Muon(wide, lr=3e-3, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1),
    ]
    mine = [optim.build(Phase("main", ours.parameters()), CONF)]
    for optimizers, model in ((mine, ours), (reference, theirs)):
        torch.manual_seed(1)
        for _ in range(5):
            for p in model.parameters():  # of full rank: directions without a gradient get bf16's rounding
                p.grad = torch.randn_like(p)
            for optimizer in optimizers:
                optimizer.step()
    for a, b, start in zip(ours.parameters(), theirs.parameters(), net().parameters(), strict=True):
        assert (a - b).norm() < 0.01 * (b - start).norm()


def test_it_goes_on_from_its_state_and_groups_keep_their_rates():
    whole, parts = net(), net()
    build = lambda m: optim.build(Phase("main", m.parameters()), CONF)  # noqa: E731
    optimizer = build(whole)
    descend(whole, optimizer, 3)
    first = build(parts)
    descend(parts, first, 3)
    second = build(parts)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for a, b in zip(descend(whole, optimizer, 3, seed=1), descend(parts, second, 3, seed=1), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    a, b = nn.Linear(40, 40), nn.Linear(40, 40)
    groups = [{"params": list(a.parameters()), "lr_scale": 0.5}]
    groups += [{"params": list(b.parameters()), "weight_decay": 0.3}]
    optimizer = optim.build(Phase("main", groups), CONF)
    optim.set_lr(optimizer, CONF, 0, 10)
    settings = [(len(g["params"]), g["wide"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    rates = ((1.5e-3, 0.1), (3e-3, 0.3))
    assert settings == [(1, wide, *rate) for rate in rates for wide in (True, False)]


def test_kernels_are_matrices_and_those_that_share_a_parameter_are_stepped_apart():
    """One linear layer of q, k and v, as three layers are, and its state goes on to the bit."""
    kernel = nn.Parameter(torch.randn(32, 16, 3, 3))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    kernel.grad = torch.randn_like(kernel)
    matrix.grad = kernel.grad.flatten(1).clone()
    for p in (kernel, matrix):
        Muon([{"params": [p], "lr": 0.1, "weight_decay": 0.0}], (0.9, 0.99), 1e-8, None).step()
    torch.testing.assert_close(kernel.flatten(1), matrix, rtol=0, atol=0)
    torch.manual_seed(0)
    fused, apart = stacked(nn.Linear(40, 3 * 48), 3), nn.ModuleList(nn.Linear(40, 48) for _ in range(3))
    whole = nn.ParameterList(fused.parameters())
    for i, layer in enumerate(apart):
        layer.load_state_dict({k: v.chunk(3)[i].clone() for k, v in fused.state_dict().items()})
    one = optim.build(Phase("main", fused.parameters()), CONF, fused)
    second = optim.build(Phase("main", apart.parameters()), CONF, apart)
    alone = copy.deepcopy(fused)
    together = optim.build(Phase("main", alone.parameters()), CONF)
    for step in range(4):
        for p, q in zip(whole, alone.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.clone()
            for i, layer in enumerate(apart):
                part = layer.weight if p.ndim == 2 else layer.bias
                part.grad = p.grad.chunk(3)[i].clone()
        for optimizer in (one, second, together):
            optimizer.step()
        if step == 1:  # a resume
            state, one = one.state_dict(), optim.build(Phase("main", fused.parameters()), CONF, fused)
            one.load_state_dict(copy.deepcopy(state))
    rows = torch.cat([layer.weight for layer in apart])
    torch.testing.assert_close(fused.weight, rows, rtol=0, atol=0)
    assert not torch.allclose(alone.weight, rows, atol=1e-3)


def left_to_adamw(model: nn.Module) -> set[str]:
    """The names of weights of two dimensions or more that are not made orthogonal."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = optim.build(Phase("main", model.parameters()), CONF, model).param_groups
    return {names[id(p)] for g in groups for p in g["params"] if not g["wide"] and p.ndim > 1}


def test_first_and_last_layers_and_tables_are_left_to_adamw():
    dit = DiTNet((4, 16, 16), DiTOptions(width=64, layers=1, heads=2, patch=4), classes=40)
    assert left_to_adamw(dit) == {"embed.weight", "out.weight", "label.table.weight"}
    # as reflow copies its teacher's
    net = copy.deepcopy(UNet(4, 4, Levels(channels=(32, 64), attention=(False, True)), classes=40))
    assert left_to_adamw(net) == {"conv_in.weight", "conv_out.weight", "label.table.weight"}
    by_id = matrices_of(dit)
    for name, p in dit.named_parameters():
        if "qkv.weight" in name or "modulation.weight" in name:
            assert by_id[id(p)] == len(p) // 64, name
