"""What a step costs, found on tensors without values, against real steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import recipe, trainer
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from zoo import CASES, Case

from gzcli.core.devices import KINDS
from gzcli.core.jobs import TrialJob
from gzcli.core.parts import Part, part_of
from gzcli.core.sections import TrainSection
from gzcli.engine import cost as cost_module
from gzcli.engine import shapes, trial
from gzcli.engine.cost import MANY, Cost, Seen, cost_of
from gzcli.launch import costs

FIRST = {case.model: case for case in reversed(CASES)}  # one line of each model


def seen(case: Case) -> Seen:
    info = case.pack().info(levels=case.levels, steps=1000)
    train = TrainSection(batch_size=case.batch, precision="fp32", ema=0.9)
    return Seen(Part(case.model, case.settings, train=train), info)


def cost(case: Case) -> Cost:
    stages = {name: seen(stage) for name, stage in case.stages.items()}
    own = seen(case)
    return cost_of(own.part, own.info, stages)


@pytest.mark.parametrize("case", FIRST.values(), ids=str)
def test_every_model_has_a_cost(case, monkeypatch):
    found, model = cost(case), case.fresh()
    params = list(model.parameters())
    assert found.params == sum(p.numel() for p in params)
    trained = {id(p): p.numel() for phase in model.phases() for p in phase.parameters()}
    assert found.average == 4 * found.params and found.moments >= 8 * sum(trained.values())
    helpers = vars(model).get("attached", {}).values()
    held = {id(t): t.nbytes for m in (model, *helpers) for t in (*m.parameters(), *m.buffers())}
    assert found.weights == pytest.approx(sum(held.values()), rel=0.01)
    assert found.flops > 2 * case.batch * max(trained.values()) / len(params) and found.step.each > 0
    assert sum(size for _, size in found.rows()) == found.memory()
    assert found.memory(found.largest(1 << 30)) <= 1 << 30 < found.memory(found.largest(1 << 30) + 2)
    many = max(2 * case.batch, MANY)
    for module in (cost_module, shapes):
        monkeypatch.setattr(module, "PROBE", many)
    real = cost(case)  # of a batch of so many, which is scaled for no other
    assert real.step.at(many) == pytest.approx(found.step.at(many), rel=1e-3)
    assert real.operators == pytest.approx(found.operators, rel=1e-3)


@pytest.mark.parametrize(
    ("model", "sets"),
    [
        ("vae", ()),
        ("aae", ()),
        ("dit", ("train.accumulate=2",)),
        ("glow", ("optim.name=muon",)),
        ("vqvae", ("train.precision=bf16",)),
    ],
)
def test_operations_are_those_of_a_real_step(model, sets, home):
    tree = recipe(FIRST[model], steps=1000)
    for text in sets:
        section, key = text.split("=")[0].split(".")
        tree[section][key] = int(text[-1]) if text[-1].isdigit() and "bf" not in text else text.split("=")[1]
    t = trainer(tree)
    t.begin()
    steps = max(phase.every for phase in t.phases)
    with FlopCounterMode(display=False, custom_mapping=attention()) as real:
        for step in range(steps):
            t.step(step)
    assert cost_of(part_of(tree), t.info).flops == pytest.approx(real.get_total_flops() / steps, rel=1e-6)


def attention():
    """Of the CPU, which FlopCounterMode does not know by itself; it is given shapes in place of tensors."""
    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
            sdpa_backward_flop_count(g, q, k, v)
        ),
    }


# ---- a step that is tried


def test_a_trial_finds_cost_and_time(home, tmp_path):
    """Of a recipe in stages: each part by itself, the second one on the first."""
    case = FIRST["transformer"]
    info = {"shape": [1, 16, 16], "levels": 17, "classes": list("0123456789"), "multilabel": False, "n": 100}
    tokenizer = seen(case.stages["tokenizer"]).part
    parts = [("tokenizer", tokenizer, False), ("prior", seen(case).part, True)]
    rows = [
        {"stage": stage, "tree": part.tree(), "own": True, "asked": True, "timed": timed}
        for stage, part, timed in parts
    ]
    found = trial.run(TrialJob(tuple(rows), info), tmp_path, torch.device("cpu"), None)["parts"]
    assert [row["stage"] for row in found] == ["tokenizer", "prior"] and not any(r["error"] for r in found)
    assert found[0]["seconds"] is None and 0 < found[1]["seconds"] < 60
    cost = costs.cost_from(found[1]["cost"])
    assert cost.params == sum(p.numel() for p in case.fresh().parameters())
    key = costs.key_of(parts[1][1], info, {"tokenizer": tokenizer})
    assert costs.kept(key) is None and costs.kept_seconds(key, "here") is None
    costs.keep(key, cost, "here", 0.25)
    costs.keep(key, cost, "there", None)
    assert costs.kept(key) == cost
    assert costs.kept_seconds(key, "here") == 0.25 and costs.kept_seconds(key, "there") is None
    other = replace(parts[1][1], train=replace(parts[1][1].train, batch_size=5))
    assert costs.key_of(other, info, {"tokenizer": tokenizer}) != key


def test_a_part_that_cannot_be_built_is_told(home, tmp_path):
    part = replace(seen(FIRST["vae"]).part, options={"net": "conv", "hidden": (-1,)})
    row = {"stage": "", "tree": part.tree(), "own": True, "asked": True, "timed": True}
    info = {"shape": [1, 16, 16], "levels": 17, "classes": [], "multilabel": False, "n": 100}
    (found,) = trial.run(TrialJob((row,), info), tmp_path, torch.device("cpu"), None)["parts"]
    assert found["error"] and found["cost"] is None and found["seconds"] is None and "refused" not in found
    part = replace(seen(FIRST["dit"]).part, options={"width": 32, "heads": 7})
    (found,) = trial.run(TrialJob((row | {"tree": part.tree()},), info), tmp_path, torch.device("cpu"), None)[
        "parts"
    ]
    assert found["error"].startswith("`model.width` is 32") and found["refused"] == "set `model.width` to 28"


def test_a_trial_of_a_large_net_has_few_images(monkeypatch):
    """So that it ends in seconds; what depends on the images is scaled to the whole batch."""
    own, tried = seen(FIRST["vae"]), []
    part = replace(own.part, train=replace(own.part.train, batch_size=256))
    cost = cost_of(part, own.info)

    class Counted(trial.Trial):
        def __init__(self, model, part, images, device):
            super().__init__(model, part, images, device)
            tried.append(images)

        def least(self, key):
            return {"loss": 0.5, "update": 0.1}[key[0]] if key[1] else 0.0

    monkeypatch.setattr(trial, "Trial", Counted)
    for flops, images in ((1e6, 256), (8 * KINDS["cpu"].flops, 32), (1e18, 1)):
        large = replace(cost, flops=flops)
        seconds = trial.seconds_of(part, own.info, {}, large, torch.device("cpu"))
        assert tried.pop() == images and seconds == pytest.approx(0.5 * 256 / images + 0.1)


def test_the_operations_of_the_block_that_stands_in_for_a_large_net(monkeypatch):
    block = trial.Block(32)
    with FlopCounterMode(display=False) as counter:
        block.step(torch.zeros(2, 32, trial.SIDE, trial.SIDE))
    assert counter.get_total_flops() == block.operations(2)
    monkeypatch.setattr(trial, "REPEATS", 1)
    assert trial.block_rate(0.0) > 0
