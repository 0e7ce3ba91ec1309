"""What a computation holds at once, by which precision it multiplies, and whether it waits for the device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import CASES

from gzcli.core.types import DataInfo
from gzcli.data.packs.batches import TrainBatches
from gzcli.data.packs.open import open_pack
from gzcli.models import catalog
from gzcli.models.autoregressive import tokenizer
from gzcli.models.flow_matching.fm import coupled
from gzcli.models.normalizing_flow.base import top_log_prob
from gzcli.models.normalizing_flow.glow import Glow

WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select"}  # whose values or sizes the host reads


class Seen(TorchDispatchMode):
    """The largest tensor that was made, the names of all operations, and the precisions of products of
    matrices."""

    def __init__(self):
        super().__init__()
        self.largest, self.names, self.precisions = 0, set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        self.names.add(name)
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            self.precisions.add(torch.get_float32_matmul_precision())
        made = [t for t in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(t)]
        self.largest = max([self.largest, *(t.numel() for t in made)])
        return out


@pytest.fixture
def tf32():
    """As in training."""
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("tf32")
def test_the_nearest_codes_are_found_part_by_part_in_full_precision(monkeypatch):
    torch.manual_seed(0)
    book, z = tokenizer.Codebook(tokenizer.CodebookOptions(codes=64, dim=4)), torch.randn(8, 4, 5, 3)
    brute = (z.movedim(1, -1)[..., None, :] - book.embedding).square().sum(-1).argmin(-1)
    monkeypatch.setattr(tokenizer, "DISTANCES", 640)
    with Seen() as seen, torch.no_grad():
        assert torch.equal(book.nearest(z)[1], brute)
    assert seen.largest <= 640 and seen.precisions == {"highest"}
    assert torch.get_float32_matmul_precision() == "high", "what comes after is as it was"


@pytest.mark.usefixtures("tf32")
def test_classes_and_coupled_noise_are_products_of_matrices():
    """Against each class's density, also far out and for sharp classes: to the rounding of fp32."""
    torch.manual_seed(0)
    info = DataInfo((1, 16, 16), 256, tuple(map(str, range(50))))
    model = Glow.of(info, depth=1, hidden=4, conditional=True)
    with torch.no_grad():
        model.top.normal_(std=0.5)
        model.classes.table.weight.normal_(std=0.5)
        top = torch.cat([torch.randn(16, *model.shapes[-1]), 30 * torch.randn(16, *model.shapes[-1])])
        with Seen() as seen:
            found = model.class_log_probs(top)
        assert seen.largest < found.numel() * top[0].numel() / 4 and seen.precisions == {"highest"}
        model, top = model.double(), top.double()
        priors = (model.top_prior(torch.full((32,), k), 32) for k in range(50))
        expected = torch.stack([top_log_prob(top, *prior) for prior in priors], 1)
    torch.testing.assert_close(found.double(), expected, rtol=3e-6, atol=3e-3)
    with Seen() as seen:
        coupled(torch.randn(8, 3), torch.randn(8, 3), None, torch.nn.Identity())
    assert seen.precisions == {"highest"}


@pytest.mark.parametrize("case", [c for c in CASES if c.model in ("vqvae", "cyclegan")], ids=str)
def test_a_start_and_a_step_wait_for_no_number_of_the_device(case):
    pack = open_pack(case.data)
    info, needs = pack.info(levels=case.levels, steps=10), catalog.card(case.model).needs
    model = case.build(info).train()
    batch = TrainBatches(pack, seed=0, batch_size=4, levels=info.levels, device="cpu", needs=needs).at(0)
    with Seen() as seen:
        with torch.no_grad():
            model.on_start(batch)
        for phase in model.phases():
            model.loss(batch, phase.name)
        if case.model == "cyclegan":
            model.translated(batch.x, batch.y == 0)
    assert not seen.names & WAITS
