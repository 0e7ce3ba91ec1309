"""Rectified flow: the loss by hand, pairs in closed form, and fewer steps after reflow than before."""

from dataclasses import replace

import pytest
import torch
from draws import fitted, flat, noise
from refused import refused
from test_fm import Exact, batch

from gzcli.core.types import Batch, BatchNoise, DataInfo, ImageNoise
from gzcli.data.packs.open import open_pack
from gzcli.engine.prepared import TrainImages, with_remembered
from gzcli.models import catalog
from gzcli.models.base import Model
from gzcli.models.denoising.samplers import solve
from gzcli.models.flow_matching.reflow import Reflow
from gzcli.recipe.resolve import resolve
from gzcli.recipe.yaml import dump

INFO = DataInfo((1, 4, 4), 256, tuple("abc"))
RF = catalog.load("rf")
SMALL = {"width": 32, "layers": 2, "heads": 2, "patch": 2}


class Straight(Exact):
    """The velocity of the lines from z to m + s z: each x_t lies on one of them."""

    def forward(self, x, t, y=None, drop=None):
        t = (t / 1000)[:, None, None, None]
        return self.mean + (self.std - 1) * (x - t * self.mean) / (1 - t + t * self.std)


def gaussian(**options) -> Reflow:
    """Of an exact teacher, of data N(m, .3²), whose ODE takes z to m + .3 z."""
    teacher = RF.of(INFO, **SMALL).double().eval()
    mean = 0.2 * torch.randn(INFO.shape, generator=torch.Generator().manual_seed(2)).double()
    teacher.net = Exact(mean, 0.3)
    return Reflow.of(INFO, teacher=teacher, **options)


def with_pairs(model: Reflow, b: Batch) -> Batch:
    return replace(b, extra=model.prepare(b))


def test_the_loss_by_hand():
    model, b = RF.of(INFO, **SMALL), batch()
    torch.nn.init.normal_(model.net.out.weight)
    u = (b.noise.rand(8) + torch.arange(8)) / 8  # a stratum of (0, 1) for each
    t, z = torch.distributions.Normal(0, 1).icdf(u).sigmoid(), b.noise.randn(*b.x.shape)
    s = t.view(-1, 1, 1, 1)
    want = (model.net((1 - s) * z + s * b.x, 1000 * t) - (b.x - z)).square().mean()
    torch.testing.assert_close(model.loss(batch())["loss"], want)


def test_pairs_are_those_of_the_teachers_ode_and_straight_lines_have_no_loss():
    model, b = gaussian(pair_solver="rk4", pair_steps=20), batch(16, double=True)
    pairs = model.prepare(b)
    assert all(value.dtype == torch.float16 and value.shape == b.x.shape for value in pairs.values())
    want = model.teacher.net.mean + 0.3 * pairs["noise"].double()
    torch.testing.assert_close(pairs["image"].double(), want, atol=1e-3, rtol=0)
    again = gaussian(pair_solver="rk4", pair_steps=20).prepare(batch(16, double=True))
    assert all(torch.equal(pairs[key], again[key]) for key in pairs)
    images = TrainImages(open_pack("digits"), 17, torch.device("cpu"), 0, ())
    drawn = next(images.scan(range(4), purpose="prepare", batch_size=4)).noise.randn(4, 8)
    assert not torch.isclose(drawn, ImageNoise(0, range(4)).randn(4, 8)).any()
    model = gaussian(pair_solver="rk4", pair_steps=20)
    b = with_pairs(model, batch(16, double=True))
    curved = model.loss(b)["loss"]
    model.net = Straight(model.teacher.net.mean, 0.3)
    straight = model.loss(b)["loss"]
    assert straight < 1e-6 < 1e-2 < curved
    one, two = (flat(model.sample)(16, noise=noise(16), sampler="euler", steps=steps) for steps in (1, 2))
    torch.testing.assert_close(one, two)


def test_every_check_draws_the_same_noise_beside_the_same_pairs():
    model, memory, losses = gaussian(pair_steps=2), {}, []
    for _ in range(3):
        b = replace(batch(16, double=True), noise=ImageNoise(0, range(16)))
        losses.append(model.loss(with_remembered(model, b, memory))["loss"].detach().item())
    assert losses[0] == losses[1] == losses[2] and list(memory) == [(0, 16)]
    fewer = with_remembered(model, batch(4, double=True), memory)
    assert len(fewer.extra["noise"]) == 4, "its own pairs, as of a timed validation of few images"
    pairs = memory[0, 16]["noise"].double()
    assert not torch.isclose(pairs, ImageNoise(0, range(16)).randn(*pairs.shape).double(), atol=1e-3).any()


def two_modes(step: int) -> Batch:
    """Images nearly constant, half of them dark and half light."""
    b = Batch(torch.empty(0), None, torch.arange(64), BatchNoise(0, step, "main", total=64))
    level = 1.6 * b.noise.randint(2, 64, 1, 1, 1) - 0.8
    b.x = level + 0.05 * b.noise.randn(64, *INFO.shape)
    return b


def trained(model: Model, steps: int) -> Model:
    def at(step: int) -> Batch:
        return with_pairs(model, two_modes(step)) if isinstance(model, Reflow) else two_modes(step)

    fitted(model, at, steps, 2e-3)
    return model.eval()


def test_several_pairs_an_image():
    """Each is of noise of its own, and a step takes one of them, another one from step to step."""
    model = Reflow.of(INFO, teacher=RF.of(INFO, width=16, layers=1, heads=2, patch=2), pairs=3, pair_steps=2)
    b = batch()
    made = model.prepare(b)
    assert made["noise"].shape == made["image"].shape == (len(b), 3, *INFO.shape)
    assert not torch.equal(made["noise"][:, 0], made["noise"][:, 1])
    f = model.teacher.velocity(None)
    alone = solve(f, made["noise"][:, 2].float(), model.process.ode_times(2), "midpoint")
    torch.testing.assert_close(made["image"][:, 2].float(), alone, atol=2e-3, rtol=2e-3)
    seen = set()
    for step in range(6):
        again = Batch(b.x, None, b.index, BatchNoise(0, step, total=len(b)), made)
        x0, x1 = model.noise_and_images(again)
        for i in range(len(b)):
            (k,) = [k for k in range(3) if torch.equal(made["noise"][i, k].float(), x0[i])]
            torch.testing.assert_close(x1[i], made["image"][i, k].float())
            seen.add(k)
    assert seen == {0, 1, 2}
    refused(r"model\.pairs", Reflow.of, INFO, teacher=model.teacher, pairs=0)


@pytest.mark.slow
def test_one_step_is_nearer_to_the_ode_after_reflow():
    teacher = trained(RF.of(INFO, **SMALL), 180).requires_grad_(False)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    student = trained(Reflow.of(INFO, teacher=teacher, pair_steps=8), 100)
    z = noise(200).randn(200, *INFO.shape)

    def error(model: Model, steps: int) -> float:
        with torch.no_grad():
            exact = solve(teacher.velocity(None), z, teacher.process.ode_times(30), "midpoint")
            end = solve(model.velocity(None), z, model.process.ode_times(steps), "euler")
            return float((end - exact).square().mean())

    assert error(student, 1) < error(teacher, 1) / 2
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def test_a_student_starts_as_its_teacher_and_learns_alone():
    teacher = RF.of(INFO, **SMALL, conditional=True).eval().requires_grad_(False)
    torch.nn.init.normal_(teacher.net.out.weight)
    student, b = Reflow.of(INFO, teacher=teacher, conditional=True), batch()
    torch.testing.assert_close(student.net(b.x, torch.ones(8), b.y), teacher.net(b.x, torch.ones(8), b.y))
    student.loss(with_pairs(student, b))["loss"].backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(key.startswith("teacher") for key in student.state_dict())
    refused(r"the teacher's `model\.conditional` is true", Reflow.of, INFO, teacher=teacher)


def test_a_run_is_called_after_the_stage_that_has_a_recipe(tmp_path):
    recipe = resolve("reflow", data="mnist")
    (tmp_path / "run.yaml").write_text(dump(recipe.tree()))
    assert recipe.card.name == resolve(str(tmp_path / "run.yaml"), data="mnist").card.name == "reflow"
    assert resolve("vqgan").card.name == "vqgan", "its prior has none"
