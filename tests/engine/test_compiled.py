"""Compiled steps: one graph, the numbers of the eager step, and what is left eager."""

import copy
import shutil
from dataclasses import replace

import pytest
import torch
from helpers import fit, lines, recipe
from safetensors.torch import load_file
from zoo import DDPM, DIT, FIRST, MLP, Case

from gzcli.core.sections import Part, TrainSection
from gzcli.core.types import Batch, BatchNoise
from gzcli.engine import step as steps
from gzcli.engine.log import Log
from gzcli.engine.step import Compiled, GivenNoise, compiles, mode_of
from gzcli.models.base import Model, named_losses
from gzcli.models.denoising.process import stratified
from gzcli.testing.contract import started

pytestmark = pytest.mark.usefixtures("undrawn")
VAE = FIRST["vae"]
DENSE = Case("vae", MLP, lr=3e-3)  # whose graph is soon traced
LONG = 100  # steps of the run


class Graphs:
    """A backend of `torch.compile` that counts the graphs and runs them as they are."""

    count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


class Said(Log):
    """Keeps what is said."""

    def __init__(self):
        super().__init__(rank=1)
        self.lines: list[str] = []
        self.warn = self.lines.append


def micro_batch(batch: Batch, first: int, step: int = 0, n: int = 4) -> Batch:
    noise = BatchNoise(0, step, "main", total=len(batch), start=first)
    return batch.rows(slice(first, first + n), noise)


def gradients(model: Model, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


@pytest.mark.parametrize(
    "case",
    [
        VAE,
        pytest.param(Case("ddpm", DDPM | {"conditional": True}), marks=pytest.mark.slow),
        pytest.param(Case("dit", DIT | {"timesteps": 20, "layers": 1}), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_one_graph_of_the_eager_numbers(case):
    """Of every micro-batch and step, whatever its place in the global batch."""
    model, batch = started(case)
    graphs, said = Graphs(), Said()
    ours = Compiled(model, LONG, said, loud=True, backend=graphs)
    for first, step in ((0, 0), (4, 0), (0, 1)):
        losses = ours(micro_batch(batch, first, step), "main")
        wanted = named_losses(model, micro_batch(batch, first, step))
        assert losses.keys() == wanted.keys()
        for key in wanted:
            torch.testing.assert_close(losses[key], wanted[key], rtol=1e-5, atol=1e-6)
        pairs = zip(gradients(model, losses["loss"]), gradients(model, wanted["loss"]), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert graphs.count == 1 and not said.lines


COMPILER = shutil.which("g++") or shutil.which("clang++")


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="inductor needs a C++ compiler")
def test_a_step_by_inductor_is_the_eager_step():
    case = Case("vae", {"net": "mlp", "hidden": (16,), "latent": 4}, lr=3e-3, batch=8)
    tree = recipe(case, steps=3)
    runs = []
    for choice in (True, False):
        t = fit({**tree, "train": {**tree["train"], "compile": choice}})
        assert (t.wrapped.compiled is not None) == choice
        assert not choice or len(t.wrapped.compiled.tried) == 1, "compiled, and not fallen back"
        runs.append((lines(t.run.path / "metrics.jsonl"), load_file(t.run.path / "model.safetensors")))
    (a, one), (b, two) = runs
    for x, y in zip(a, b, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-4)
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-4)


@pytest.fixture
def quick(monkeypatch):
    """Compiled graphs run as they are: no compiler is started."""
    monkeypatch.setattr(steps, "BACKEND", "aot_eager")


@pytest.mark.slow
def test_a_compiled_run_resumes_bit_for_bit(quick):
    """Of several phases, each of which has its graph."""
    case = Case("aae", MLP, lr=3e-3)
    sets = ("train.ema=0.9", "train.compile=true", "train.checkpoint_every=2", "train.keep=2")
    tree = recipe(case, steps=4, sets=sets)
    whole = fit(tree)
    last = whole.run.path / "checkpoints" / "00000004"
    wanted = [load_file(last / f"{name}.safetensors") for name in ("model", "ema")]
    shutil.rmtree(last)
    resumed = fit(tree, whole.run)
    assert resumed.start == 2 and len(resumed.wrapped.compiled.tried) == len(resumed.phases)
    keys = {key for key in whole.model.state_dict() if not key.endswith("_extra_state")}
    for name, a in zip(("model", "ema"), wanted, strict=True):
        b = load_file(last / f"{name}.safetensors")
        assert a.keys() == b.keys() == keys and all(torch.equal(a[key], b[key]) for key in a)


def test_what_stays_eager_and_when_has_the_same_numbers():
    """It would be compiled anew at every step."""
    model, batch = started(replace(DENSE, options={**DENSE.options, "kl_warmup": 3}))
    before = copy.deepcopy(vars(model)["kl_factor"])
    graphs = Graphs()
    ours, counts = Compiled(model, LONG, Said(), loud=True, backend=graphs), []
    assert vars(model)["kl_factor"] == before, "to look at the end changes nothing"
    for step in range(5):
        ours(micro_batch(batch, 0, step), "main")
        model.on_step(step)
        counts.append(graphs.count)
    assert counts == [0, 0, 0, 1, 1]
    # a loss that branches on a value, and a step that the compiler fails at

    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    def choosy(self, batch: Batch, phase: str = "main"):
        if batch.noise.rand(len(batch)).sum() > 0:
            batch.noise.rand(len(batch))
        return VaeModel.loss(self, batch, phase)

    model, batch = started(DENSE)
    VaeModel = type(model)
    for cls, backend in ((type("Choosy", (VaeModel,), {"loss": choosy}), Graphs()), (VaeModel, broken)):
        model.__class__, said = cls, Said()
        loss = Compiled(model, LONG, said, loud=True, backend=backend)(micro_batch(batch, 0), "main")["loss"]
        assert torch.equal(loss, named_losses(model, micro_batch(batch, 0))["loss"])
        assert len(said.lines) == 1 and said.lines[0].startswith("phase `main` is not compiled: ")


def test_finding_the_draws_changes_nothing():
    """Neither buffers nor generators nor what a model remembers."""
    case = FIRST["vqvae"]  # its codebook moves at every loss
    model, batch = started(case)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    draws = steps.draws_of(model, replace(micro_batch(batch, 0, n=8), extra={}), "main")
    assert isinstance(draws, list)
    assert torch.equal(torch.get_rng_state(), random)
    for key, value in model.state_dict().items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, state[key])
    u = torch.rand(4)
    noise = GivenNoise((), 16, torch.tensor(8))
    assert torch.equal(stratified(u, noise), stratified(u, BatchNoise(0, total=16, start=8)))


def test_where_auto_compiles():
    model, _ = started(VAE)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    long = Part("vae", train=TrainSection(steps=100_000))
    assert compiles(long, model, gpu) and not compiles(long, model, cpu)
    short = replace(long, train=replace(long.train, steps=100))
    forced = replace(short, train=replace(short.train, compile=True))
    assert not compiles(short, model, gpu) and compiles(forced, model, cpu)
    exact = replace(long, train=replace(long.train, deterministic=True))
    assert not compiles(exact, model, gpu)
    assert mode_of(long, model, gpu) == "reduce-overhead"
    assert mode_of(long, model, cpu) is None
    parts = replace(long, train=replace(long.train, accumulate=2))
    assert mode_of(parts, model, gpu) is None, "a CUDA graph cannot add up gradients"
