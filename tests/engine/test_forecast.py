"""What a step costs, found without values, against real steps; a step that is tried; a batch too large."""

from dataclasses import replace

import pytest
import torch
from helpers import in_process, recipe, trainer
from refused import refused
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from zoo import FIRST, Case, one_a_family

from gzcli.core import devices
from gzcli.core.errors import DeviceError, MissingError
from gzcli.core.sections import Part, TrainSection, part_of
from gzcli.engine import forecast
from gzcli.engine.forecast import PartOnData
from gzcli.engine.trainer import Trainer
from gzcli.launch import launcher, plan
from gzcli.launch.plan import halve
from gzcli.store.jobs import TrialJob

CPU = torch.device("cpu")
INFO = {"shape": [1, 16, 16], "levels": 17, "classes": list("0123456789"), "multilabel": False, "n": 100}
# whose operations are not known, as libraries of their nets read values
NOT_COUNTED = ("sd_lora", "controlnet", "instructpix2pix")


def on_data(case: Case) -> PartOnData:
    info = case.pack().info(levels=case.levels, steps=1000)
    train = TrainSection(batch_size=case.batch, precision="fp32", ema=0.9)
    return PartOnData(Part(case.model, case.settings, train=train), info)


@pytest.mark.parametrize("case", one_a_family(FIRST.values()))
def test_the_size_of_every_model_and_its_operations(case):
    stages = {name: on_data(stage) for name, stage in case.stages.items()}
    setup, model = on_data(case), case.fresh()
    assert forecast.params_of(*setup, stages) == sum(p.numel() for p in model.parameters())
    work = forecast.work_of(*setup, stages)
    assert (work is None) == (case.model in NOT_COUNTED)
    assert work is None or work.kernels > len(list(model.parameters()))
    assert work is None or work.flops > 2 * case.batch * max(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("model", "sets"),
    [("vae", {}), ("aae", {}), ("dit", {"train.accumulate": 2}), ("glow", {"optim.name": "muon"})],
)
def test_operations_are_those_of_a_real_step(model, sets, home, monkeypatch):
    tree = recipe(FIRST[model], steps=1000)
    for name, value in sets.items():
        section, key = name.split(".")
        tree[section][key] = value
    t = trainer(tree)
    t.begin()
    steps = max(phase.every for phase in t.phases)
    aten = torch.ops.aten  # FlopCounterMode does not know the attention of CPUs
    attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
            sdpa_backward_flop_count(g, q, k, v)
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=attention) as real:
        for number in range(steps):
            t.step(number)
    flops, kernels = forecast.work_of(part_of(tree), t.info)
    assert flops == pytest.approx(real.get_total_flops() / steps, rel=1e-6) and kernels > 10
    monkeypatch.setattr(forecast, "MAX_SHORT_STEPS", 1)
    before = {name: value.clone() for name, value in t.model.state_dict().items() if torch.is_tensor(value)}
    speed = forecast.speed_of(t.trained.model, t.batches.at(0), t.part, t.accelerator, t.log)
    assert speed.flops == pytest.approx(flops, rel=1e-6)
    assert all(torch.equal(value, t.model.state_dict()[name]) for name, value in before.items())
    assert all(p.grad is None for p in t.model.parameters())


def test_an_image_and_a_likelihood_of_an_untrained_model_are_timed(home, tmp_path, monkeypatch):
    """Of a prior on its tokenizer, of a bound with classes, of no likelihood that is not asked for."""
    names, draws = ("transformer", "cvae", "fm", "dcgan"), ("samples", "exact", "bound")
    monkeypatch.setattr(forecast, "TIMED_SAMPLES", 6)
    rows = []
    for name in names:
        case = FIRST[name]
        stages = {stage: on_data(of).part.tree() for stage, of in case.stages.items()}
        tree = on_data(case).part.tree()
        rows.append({"stage": "", "tree": tree, "stages": stages, "timed": False, "draws": draws})
    results = forecast.run(TrialJob(tuple(rows), INFO), tmp_path, CPU, None)["parts"]
    assert [one["error"] for one in results] == [None] * 4
    assert all(0 < one["sample_seconds"] < 5 for one in results)
    assert [one["calls"] > 1 for one in results] == [True, False, True, False]
    assert [one["log_prob_seconds"] is not None for one in results] == [False, True, False, False]
    assert [one["classes"] for one in results] == [None, 10, None, None]


def test_scores_of_an_untrained_model_are_timed(home, tmp_path, monkeypatch):
    """With their fits and the map of `local`; `ratio` needs a background run, so its cost is unknown."""
    monkeypatch.setattr(forecast, "TIMED_SAMPLES", 12)
    names = {"vae": ("elbo", "typicality", "local"), "fm": ("recon", "path", "local"), "dcgan": ("knn",)}
    names["glow"] = ("ratio",)
    rows = [
        {"stage": "", "tree": on_data(FIRST[name]).part.tree(), "stages": {}, "timed": False, "scores": each}
        for name, each in names.items()
    ]
    results = forecast.run(TrialJob(tuple(rows), INFO), tmp_path, CPU, None)["parts"]
    assert [one["error"] for one in results] == [None] * 4
    fits = [[one[f"{name}_seconds"] > 0 for name in ("fit", "train_fit", "map")] for one in results[:3]]
    assert fits == [[True, False, True]] * 2 + [[False, True, False]], "`knn` is fitted on training images"
    assert all(one["score_seconds"] > 0 for one in results[:3])
    # fm: four round trips of two steps there and back for `recon` and again for `local`, ten for `path`
    assert results[1]["score_calls"] == 42 and results[3]["score_seconds"] is None


def test_a_trial_finds_size_time_and_memory_by_few_images(home, tmp_path, monkeypatch):
    """Of a recipe in stages: each part by itself, the second one on the first."""
    case = FIRST["transformer"]
    tokenizer, prior = on_data(case.stages["tokenizer"]).part.tree(), on_data(case).part.tree()
    rows = (
        {"stage": "tokenizer", "tree": tokenizer, "stages": {}, "timed": False},
        {"stage": "prior", "tree": prior, "stages": {"tokenizer": tokenizer}, "timed": True},
    )
    first, second = forecast.run(TrialJob(rows, INFO), tmp_path, CPU, None)["parts"]
    assert (first["error"], first["seconds"], first["bytes"]) == (None, None, None) and first["params"] > 0
    assert second["error"] is None and 0 < second["seconds"] < 60 and second["bytes"] > 1e8
    assert second["params"] == sum(p.numel() for p in case.fresh().parameters())

    def result(model: str, **options) -> dict:
        tree = replace(on_data(FIRST[model]).part, options=options).tree()
        row = {"stage": "", "tree": tree, "stages": {}, "timed": True}
        return forecast.run(TrialJob((row,), INFO), tmp_path, CPU, None)["parts"][0]

    row = result("vae", net="conv", hidden=(-1,))
    assert row["error"] and row["params"] is None and row["seconds"] is None and "refused" not in row
    row = result("dit", width=32, heads=7)
    assert row["error"].startswith("`model.width` is 32") and row["refused"] == "set `model.width` to 28"
    # so that it ends in seconds; what depends on the images is scaled to the whole batch
    setup, images = on_data(FIRST["vae"]), []
    part = replace(setup.part, train=replace(setup.part.train, batch_size=256))

    class Fixed(forecast.Trial):
        def step(self, read):
            images.append(len(self.batch))
            return 0.5, 0.1

    monkeypatch.setattr(forecast, "Trial", Fixed)
    for flops, few in ((1e6, 256), (8 * devices.DEVICE_KINDS["cpu"].flops, 32), (1e18, 1)):
        result = forecast.try_step(part, setup.info, {}, flops, CPU)
        assert images[-1] == few and result["seconds"] == pytest.approx(0.5 * 256 / few + 0.1)


def test_a_batch_whose_first_step_does_not_fit_is_split(home, monkeypatch):
    """The weights are those of a training with as many parts from the start."""
    monkeypatch.setattr(launcher, "run", in_process)
    backward, most = Trainer.backward, 8

    def small(self, batch, step, phase):
        if len(batch) // self.train.accumulate > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return backward(self, batch, step, phase)

    monkeypatch.setattr(Trainer, "backward", small)
    sets = ("train.batch_size=32", "train.eval_every=0", "train.sample_every=0", "train.best=none")

    def trained(*more: str, say=lambda text: None):
        request = plan.ask("vae", "digits", (*sets, *more), {"train.steps": 2, "launch.cpu": True})
        start = plan.Start(request, launcher.plan(request.recipe.launch, every_gpu=False))
        return start.train(start.recipe(), say=say)

    messages = []
    split, whole = trained(say=messages.append), trained("train.accumulate=4")
    assert messages == [
        "a batch of 32 does not fit on the GPU; splitting it into 2 parts of 16",
        "a batch of 32 does not fit on the GPU; splitting it into 4 parts of 8",
    ]
    assert split.tree()["train"]["accumulate"] == 4 and split.state == "finished"
    weights = [(run.path / "model.safetensors").read_bytes()[-4096:] for run in (split, whole)]
    assert weights[0] == weights[1]
    most = 0
    refused("out of memory", trained, "train.batch_size=2", error=DeviceError)
    assert halve(split, 1) is None, "its first step has been done"


def test_an_absent_package_of_a_step_without_values_is_named(monkeypatch):
    def step(*_, **__):
        raise MissingError("the package `x` is missing")

    monkeypatch.setattr(forecast, "count_work", step)
    with pytest.raises(MissingError, match="package `x`"):
        forecast.work_of(*on_data(FIRST["vae"]))
