"""ZigMa: the scan against the recurrence as it is written, Mamba against `transformers`, orders, and cost."""

import sys
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from draws import awake
from torch.nn import functional as F

from gzcli.core.types import DataInfo
from gzcli.models import catalog
from gzcli.models.denoising.samplers import with_divergence
from gzcli.models.nn import zigzag as scans
from gzcli.models.nn.dit import DiTOptions
from gzcli.models.nn.zigzag import Block, Mamba, ZigzagNet, zigzags

selective_scan = scans.selective_scan
SMALL = {"width": 16, "layers": 8, "patch": 2, "state": 4}


def recurrence(x, delta, A, B, C):
    """h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t x_t and y_t = C_t h_t, token by token."""
    h, y = x.new_zeros(len(x), *A.shape), []
    for t in range(x.shape[1]):
        h = (delta[:, t, :, None] * A).exp() * h + (delta[:, t] * x[:, t])[:, :, None] * B[:, t, None]
        y.append((h @ C[:, t, :, None])[..., 0])
    return torch.stack(y, 1)


def inputs(batch: int, tokens: int, channels: int, state: int, dtype=torch.float64) -> list[torch.Tensor]:
    """x, Δ of 10⁻³ … 10, A = −1 … −N about, B and C."""
    g = torch.Generator().manual_seed(tokens)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    delta = 10 ** (torch.rand(batch, tokens, channels, generator=g, dtype=torch.float64) * 4 - 3)
    A = -torch.arange(1, state + 1) * normal(channels, state).mul(0.3).exp()
    values = (normal(batch, tokens, channels), delta, A, *(normal(batch, tokens, state) for _ in "BC"))
    return [value.to(dtype).requires_grad_() for value in values]


@pytest.mark.parametrize("order", range(8))
@torch.no_grad()
def test_a_thousand_tokens_are_the_recurrence_in_each_order(order):
    x, delta, A, B, C = inputs(2, 1024, 6, 4)
    x, delta, B, C = (t[:, zigzags(32, 32)[order]] for t in (x, delta, B, C))
    want = recurrence(x, delta, A, B, C)
    torch.testing.assert_close(selective_scan(x, delta, A, B, C), want, atol=1e-10, rtol=1e-10)
    single = selective_scan(*(t.float() for t in (x, delta, A, B, C)))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tokens", [1, 2, 16, 37, 1024])
@pytest.mark.parametrize("cached", [1, 200, scans.CACHE_ELEMENTS])
def test_gradients_are_those_of_the_recurrence(monkeypatch, tokens, cached):
    """Of whole chunks and of rests, with few images at a time and with all; and in single precision."""
    monkeypatch.setattr(scans, "CACHE_ELEMENTS", cached)
    values = inputs(1 if tokens == 1024 else 5, tokens, 3, 4)
    want = torch.autograd.grad(recurrence(*values).square().sum(), values)
    got = torch.autograd.grad(selective_scan(*values).square().sum(), values)
    single = [value.detach().float().requires_grad_() for value in values]
    half = torch.autograd.grad(selective_scan(*single).square().sum(), single)
    for a, b, c in zip(got, want, half, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
        assert (c.double() - b).norm() <= 1e-4 * b.norm()


def test_the_scan_is_finite_in_full_precision_and_linear_in_tokens():
    """ΔA of 16 a token: products of decays, and their quotients, leave even fp64 within fifty tokens."""
    x, _, _, B, C = inputs(1, 1024, 2, 2, torch.float32)
    A = torch.tensor([[-16.0, -1e-4], [-1e-4, -16.0]], requires_grad=True)
    delta = torch.ones(1, 1024, 2, requires_grad=True)
    values = x, delta, A, B, C
    y = selective_scan(*values)
    torch.testing.assert_close(y.double(), recurrence(*(v.double() for v in values)), atol=1e-3, rtol=1e-4)
    assert all(g.isfinite().all() and g.any() for g in torch.autograd.grad(y.sum(), values))
    values = inputs(2, 16, 8, 4, torch.float32)
    want = selective_scan(*values)
    grads = torch.autograd.grad(want.sum(), values)
    with torch.autocast("cpu", torch.bfloat16):
        got = selective_scan(*values)
        assert got.dtype == torch.float32 and torch.equal(got, want)
        assert all(map(torch.equal, torch.autograd.grad(got.sum(), values), grads))

    def memory(tokens: int) -> int:
        values, sizes = inputs(2, tokens, 64, 16, torch.float32), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            selective_scan(*values).sum().backward()
        return sum(sizes)

    assert 2 * memory(256) < memory(1024) <= 4 * memory(256)


def test_the_kernel_of_mamba_ssm_is_used_where_it_is(monkeypatch):
    """A package that stands in for it, in the shapes that it takes, on a GPU that is not there."""
    calls = []

    def selective_scan_fn(u, delta, A, B, C):
        calls.append(u.dtype)
        assert all(t.is_contiguous() for t in (u, delta, B, C))
        return scans.Scan.apply(u.mT, delta.mT, A, B.mT, C.mT).mT

    package = ModuleType("mamba_ssm.ops.selective_scan_interface")
    package.selective_scan_fn = selective_scan_fn
    scans.fused_scan.cache_clear()
    assert scans.fused_scan(torch.device("cuda")) is None, "it is not installed here"
    scans.fused_scan.cache_clear()
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    assert scans.fused_scan(torch.device("cuda")) is selective_scan_fn
    assert scans.fused_scan(torch.device("cpu")) is None
    scans.fused_scan.cache_clear()

    net = awake(ZigzagNet((1, 8, 8), DiTOptions(**SMALL)), 0.1)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 400.0])
    want = net(x, t)
    gradients = torch.autograd.grad(want.sum(), list(net.parameters()))
    assert not calls
    monkeypatch.setattr(scans, "fused_scan", lambda device: selective_scan_fn)
    got = net(x, t)
    assert calls == [torch.float32] * 8
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    for a, b in zip(torch.autograd.grad(got.sum(), list(net.parameters())), gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    selective_scan(*inputs(1, 4, 3, 2))
    assert len(calls) == 8, "it has no fp64"


def test_mamba_is_that_of_transformers_and_the_paper():
    peer = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    sizes = {"hidden_size": 32, "state_size": 5, "expand": 2, "conv_kernel": 4, "time_step_rank": 2}
    mixer, ours = awake(peer.MambaMixer(peer.MambaConfig(**sizes), 0)).eval(), Mamba(32, 2, 5)
    ours.load_state_dict(mixer.state_dict())  # strict: every parameter has its counterpart, of the same shape
    h = torch.randn(3, 40, 32)
    with torch.no_grad():
        want = mixer(h)
        assert want.std() > 0.01
        torch.testing.assert_close(ours(h), want, atol=1e-5, rtol=1e-4)
    torch.manual_seed(0)
    mamba = Mamba(256, 2, 16)
    delta = F.softplus(mamba.dt_proj.bias.detach()).log10()  # log-uniform
    assert -3 <= delta.min() < -2.95 and -1.05 < delta.max() <= -1
    assert float(delta.mean()) == pytest.approx(-2, abs=0.1)
    torch.testing.assert_close(-mamba.A_log.exp(), -torch.arange(1.0, 17).expand(512, 16))
    assert torch.equal(mamba.D, torch.ones(512))
    with torch.device("meta"):
        net = ZigzagNet((4, 32, 32), DiTOptions(width=768, layers=24, patch=1))
    assert len(net.position) == 1024 and sum(p.numel() for p in net.parameters()) == 134_999_812


@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (3, 5), (8, 8), (7, 4)])
def test_orders_go_by_neighbours(rows, columns):
    orders = [order.tolist() for order in zigzags(rows, columns)]
    assert len({tuple(order) for order in orders}) == 8
    for order in orders:
        assert sorted(order) == list(range(rows * columns)), "each token once"
        places = [divmod(token, columns) for token in order]
        assert all(abs(a - c) + abs(b - d) == 1 for (a, b), (c, d) in pairwise(places))
    corners = {0, columns - 1, (rows - 1) * columns, rows * columns - 1}
    by_rows = {order[0] for order in orders if order[1] in (order[0] + 1, order[0] - 1)}
    by_columns = {order[0] for order in orders if order[1] in (order[0] + columns, order[0] - columns)}
    assert by_rows == by_columns == corners, "from each corner, by rows and by columns"
    assert all({order[0] for order in (orders * 2)[i : i + 4]} == corners for i in range(8)), "any four"


@pytest.mark.parametrize("order", range(8))
def test_a_block_reads_in_its_order(order):
    """A token's output depends on those before it in the order of the block, on itself, and on no others."""
    path = zigzags(3, 4)[order]
    block = awake(Block(8, 2, 4, path)).double()
    h, c = torch.randn(1, 12, 8, dtype=torch.float64), torch.randn(1, 8, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda h: block(h, c).sum(2), h)
    jacobian = jacobian[0, :, 0].abs().sum(2)  # [of, by]
    assert torch.equal(jacobian[path][:, path] > 1e-12, torch.ones(12, 12).tril() > 0)


def test_blocks_take_turns_in_the_orders_and_few_images_change_nothing(monkeypatch):
    net = ZigzagNet((1, 8, 8), DiTOptions(**SMALL | {"layers": 10}))
    for i, block in enumerate(net.blocks):
        assert torch.equal(block.order, zigzags(4, 4)[i % 8])
        assert torch.equal(block.order[block.back], torch.arange(16))
    assert not any("order" in key or "back" in key for key in net.state_dict())
    net = awake(ZigzagNet((1, 8, 8), DiTOptions(**SMALL)), 0.1).eval()
    x, t = torch.randn(5, 1, 8, 8), torch.rand(5) * 1000
    with torch.no_grad():
        want = net(x, t)
        monkeypatch.setattr(scans, "CACHE_ELEMENTS", 2 * 4 * 32 * 4)  # two images
        torch.testing.assert_close(net(x, t), want, atol=1e-5, rtol=1e-5)


def test_the_divergence_of_the_likelihood_is_that_of_finite_differences():
    model = catalog.load("zigma").of(DataInfo((1, 4, 4)), **SMALL).double().eval()
    awake(model.net, 0.1).time.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    f, t = model.velocity(None), torch.tensor([0.3], dtype=torch.float64)
    x, v = torch.randn(1, 16, dtype=torch.float64), torch.randint(2, (1, 16)).double() * 2 - 1
    state = torch.cat([x, torch.zeros(1, 1).double()], 1)
    gained = 16 * with_divergence(f, (1, 4, 4), v)(state, t)[0, -1]
    ahead, behind = (f((x + s * v).view(1, 1, 4, 4), t).flatten(1) for s in (1e-5, -1e-5))
    want = -((ahead - behind) / 2e-5 * v).sum()
    assert abs(float(want)) > 1e-3
    torch.testing.assert_close(gained, want, rtol=1e-6, atol=1e-8)
