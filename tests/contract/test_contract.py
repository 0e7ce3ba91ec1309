"""What every model owes: the contract of `gzcli.testing` over the zoo; images of any size; footprints."""

import copy

import pytest
import torch
from draws import only, squares, train_batches
from refused import refused
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import CASES, FIRST, Case, first_of_families, one_a_family

from gzcli.core.errors import UsageError
from gzcli.core.types import Batch, BatchNoise, DataInfo, ImageNoise, no_progress
from gzcli.data.packs.open import open_pack
from gzcli.models import catalog
from gzcli.models.autoregressive import tokenizer
from gzcli.models.base import group_options, named_losses
from gzcli.models.flow_matching.fm import couple_noise
from gzcli.models.normalizing_flow.base import top_log_prob
from gzcli.models.normalizing_flow.glow import Glow
from gzcli.testing import CHECKS
from gzcli.testing import contract as tools
from gzcli.testing.contract import draw

# what options of a model can break, which its first case does not show
BROKEN_BY_OPTIONS = (
    "the_loss_depends_only_on_the_batch",
    "samples_are_images",
    "scores_do_not_depend_on_the_batch",
)
# hundreds of steps, and a build for each kind of data
DEAR = ("training_improves_the_model", "every_kind_of_data_set")


def checks():
    """Each check of each case, case by case as a start is shared. Of a model's first case all are quick but
    the dear ones. Those are quick for the first model of each family, as are three of its further cases."""
    families = first_of_families(FIRST)
    for case in CASES:
        of_family = case.model in families
        for name, check in CHECKS.items():
            if case is FIRST[case.model]:
                quick = of_family or name not in DEAR
            else:
                quick = of_family and name in BROKEN_BY_OPTIONS
            marks = () if quick else pytest.mark.slow
            yield pytest.param(check, case, id=f"{case}-{name}", marks=marks)


@pytest.fixture(scope="module", autouse=True)
def _latest_start():
    """The start of the latest case is kept for its next check."""
    start, latest = tools.started, {}

    def started(case: Case):
        if (key := repr(case)) not in latest:
            latest.clear()
            latest[key] = start(case)
        torch.manual_seed(tools.CONTRACT_SEED)
        return copy.deepcopy(latest[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tools, "started", started)
        yield


@pytest.mark.parametrize(("check", "case"), checks())
def test_contract(check, case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_scores_over_all_their_steps_know_nothing_of_their_batch(case, monkeypatch):
    """The check itself takes few."""
    monkeypatch.setattr(tools, "FEW_OPTIONS", {})
    monkeypatch.setattr(tools, "SCORE_STEPS", 8)
    CHECKS["scores_do_not_depend_on_the_batch"](case)


INFO = DataInfo((1, 16, 16), 17, tuple("0123456789"), n=100, steps=100)
ALONE = [case for case in FIRST.values() if not case.stages]
BUILT = [case for case in ALONE if catalog.card(case.model).family != "stable_diffusion"]


@pytest.mark.parametrize("case", one_a_family(BUILT))
def test_any_size_in_bf16(case: Case):
    for shape in ((1, 28, 28), (3, 18, 27)):
        info = DataInfo(shape, case.levels or 256, ("a", "b"), n=64, steps=100)
        try:
            model = case.build(info).train()
        except UsageError as e:
            assert e.hint, shape
            continue
        x, y = squares(4, info), torch.arange(4) % 2
        extra = {"second_domain": x.flip(0)} if "second_domain" in model.needs else {}
        batch = Batch(x, y, torch.arange(4), BatchNoise(0, 0, "main", total=4), extra)
        with torch.no_grad():
            model.on_start(batch)
        for phase in model.phases():
            only(model, phase.name)
            with torch.autocast("cpu", torch.bfloat16):
                loss = named_losses(model, batch, phase.name)["loss"]
            loss.backward()
            assert loss.isfinite() and loss.dtype == torch.float32, (shape, phase.name)
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None), shape
        drawn = draw(model.eval(), case, n=2)
        assert drawn.shape == (2, *shape) and drawn.isfinite().all(), shape


def drawn(model: str, info: DataInfo = INFO, **options) -> torch.Tensor:
    case = FIRST[model]
    built = case.build(info).eval()
    torch.manual_seed(1)
    for p in built.parameters():  # a new network returns zero, whatever its input
        p.data += 0.02 * torch.randn_like(p)
    labels = torch.zeros(2, dtype=torch.long) if case.conditional else None
    keywords = group_options(built.sample, {**case.sample, **options})
    return built.sample(2, labels=labels, noise=ImageNoise(0, range(2)), progress=no_progress, **keywords)


@pytest.mark.parametrize("model", ["ddpm", "fm", "sgm"])
def test_a_u_net_draws_any_size(model):
    wide = drawn(model, size="24x20")
    assert wide.shape == (2, 1, 20, 24) and wide.isfinite().all()
    # the same as a network with these weights that was made for images of this size
    assert torch.equal(wide, drawn(model, DataInfo((1, 20, 24), 17, INFO.classes, n=100, steps=100)))
    assert torch.equal(drawn(model, size=16), drawn(model))


def test_a_network_made_for_one_size_says_so():
    for model in ("rf", "dit", "zigma", "ncsnv2"):
        e = refused("made for one size of images", drawn, model, size="24x20")
        assert "16×16" in e.hint, model
    refused("made for latents", drawn, "fm", DataInfo((4, 8, 8), None, INFO.classes), size=24)


WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select"}  # whose values or sizes the host reads


class Seen(TorchDispatchMode):
    """The largest tensor, the names of all operations, the precisions of products of matrices."""

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
            log_probs = model.class_log_probs(top)
        assert seen.largest < log_probs.numel() * top[0].numel() / 4 and seen.precisions == {"highest"}
        model, top = model.double(), top.double()
        priors = (model.top_prior(torch.full((32,), k), 32) for k in range(50))
        expected = torch.stack([top_log_prob(top, *prior) for prior in priors], 1)
    torch.testing.assert_close(log_probs.double(), expected, rtol=3e-6, atol=3e-3)
    with Seen() as seen:
        couple_noise(torch.randn(8, 3), torch.randn(8, 3), None, torch.nn.Identity())
    assert seen.precisions == {"highest"}


@pytest.mark.parametrize("case", [c for c in CASES if c.model in ("vqvae", "cyclegan")], ids=str)
def test_a_start_and_a_step_wait_for_no_number_of_the_device(case):
    pack = open_pack(case.data)
    info, needs = pack.info(levels=case.levels, steps=10), catalog.card(case.model).needs
    model = case.build(info).train()
    batch = train_batches(pack, seed=0, batch_size=4, levels=info.levels, needs=needs).at(0)
    with Seen() as seen:
        with torch.no_grad():
            model.on_start(batch)
        for phase in model.phases():
            model.loss(batch, phase.name)
        if case.model == "cyclegan":
            model.to_other_domain(batch.x, batch.y == 0)
    assert not seen.names & WAITS
