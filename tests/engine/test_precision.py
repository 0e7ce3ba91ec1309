"""The precision of samples and scores, norms under autocast, and the layout of convolutions in memory."""

import copy
import json
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import fit, recipe, trainer
from torch import nn
from zoo import FIRST

from gzcli.core import devices
from gzcli.core.errors import UsageError
from gzcli.core.sections import OptimSection, part_of
from gzcli.core.types import ImageNoise
from gzcli.engine import optim, sampler
from gzcli.engine.checkpoint import restore
from gzcli.engine.log import Log
from gzcli.engine.trained import Trained, load_trained, to_device
from gzcli.models.nn import full_fp32
from gzcli.models.nn.layers import GroupNorm, LayerNorm
from gzcli.models.nn.unet import ResBlock
from gzcli.store import rates
from gzcli.store.runs import Run
from gzcli.testing.contract import loss_of, started

CPU = torch.device("cpu")
FM = FIRST["fm"]
GLOW = FIRST["glow"]


def trained(case: Any, precision: str, request: str | None = None) -> Trained:
    """A model that was trained in a precision, with no output of zeros."""
    model, _ = started(case)
    torch.manual_seed(1)
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.05)
    tree = recipe(case, steps=1)
    tree["train"]["precision"] = precision
    tree["sample"] = dict(case.sample)
    return Trained(None, model.eval(), model.data, part_of(tree), CPU, 1, requested_precision=request)  # type: ignore[arg-type]


def autocast_in(context: Any) -> torch.dtype | None:
    with context:
        return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


BF16 = torch.bfloat16
USED = (  # in the recipe, asked for, whether the CPU has it; what samples and what scores are computed in
    ("fp32", None, True, None, None),
    ("bf16", None, False, BF16, None),  # scores stay in fp32 unless asked otherwise
    ("auto", None, True, BF16, None),
    ("auto", None, False, None, None),
    ("fp16", None, False, None, None),  # trained on a GPU, used on a CPU
    ("bf16", "fp32", True, None, None),
    ("fp32", "bf16", False, BF16, BF16),
    ("fp32", "auto", True, BF16, BF16),
)


RATES = {"fp32": {"convolution": 50.0, "product": 90.0}, "bf16": {"convolution": 90.0, "product": 170.0}}
SLOW = {"fp32": {"convolution": 90.0, "product": 145.0}, "bf16": {"convolution": 70.0, "product": 80.0}}


def test_auto_takes_the_type_that_is_faster_on_both_kinds_of_work():
    assert (rates.faster(RATES), rates.faster(SLOW)) == ("bf16", "fp32")
    assert rates.faster({"fp32": SLOW["fp32"]}) == "fp32", "a CPU without bf16"
    gain = {"fp32": {"convolution": 50.0, "product": 100.0}, "bf16": {"convolution": 100.0, "product": 60.0}}
    assert rates.faster(gain) == "bf16", "the convolution gains more time than the product loses"
    busy = {"fp32": {"convolution": 42.7, "product": 82.6}, "bf16": {"convolution": 57.0, "product": 57.0}}
    assert rates.faster(busy) == "fp32", "a CPU whose fp32 was measured while other programs ran"


def test_rates_are_measured_once_and_kept(tmp_path, monkeypatch):
    """By processes too: all ranks of a run have to choose alike."""
    monkeypatch.setenv("GZ_HOME", str(tmp_path))
    calls = []
    monkeypatch.setattr(rates, "measured_rates", lambda types: calls.append(types) or RATES)
    rates._stored.cache_clear()
    try:
        assert rates.cpu_rates("a CPU") == RATES
        rates._stored.cache_clear()  # as another process
        assert rates.cpu_rates("a CPU") == RATES and len(calls) == 1
        assert rates.cpu_rates("another") == RATES and len(calls) == 2
    finally:
        rates._stored.cache_clear()


def test_measured_rates_are_plausible():
    before = torch.get_num_threads()
    with torch.inference_mode():  # as a sampler asks for them
        speeds = rates.measured_rates(("fp32",))["fp32"]
    assert speeds.keys() == rates.WORK.keys() and all(0.05 < rate < 5_000 for rate in speeds.values())
    assert torch.get_num_threads() == before


def test_which_precision_is_used(monkeypatch):
    with pytest.raises(UsageError, match="needs a GPU"):
        load_trained(Run(None), "cpu", precision="fp16")  # type: ignore[arg-type]
    for ampere, precision in ((True, "bf16"), (False, "fp16")):
        supported = lambda including_emulation=True, ampere=ampere: including_emulation or ampere  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert rates.chosen_precision("auto", "cuda") == precision
    assert rates.chosen_precision("auto", "mps") == "fp32"
    tree = recipe(FM, steps=1)
    for precision, request, fast, sampled, scored in USED:
        monkeypatch.setattr(rates, "cpu_rates", lambda _, fast=fast: RATES if fast else SLOW)
        tree["train"]["precision"] = precision
        model = SimpleNamespace(likelihood=None, conditional=False)
        of = Trained(None, model, None, part_of(tree), CPU, 1, requested_precision=request)  # type: ignore[arg-type]
        dtypes = [autocast_in(context) for context in (of.sampling(), of.applying(), of.scoring())]
        assert dtypes == [sampled, sampled, scored], (precision, request, fast)
        model.likelihood = "exact"
        assert autocast_in(of.applying()) is None, "a flow goes to its latents and back"


def test_samples_in_bf16_and_likelihoods_in_fp32(monkeypatch):
    from gzcli.judge.scores import Scorer

    half = trained(GLOW, "bf16", request="bf16")
    full = Trained(**{**vars(half), "requested_precision": "fp32"})
    batch = GLOW.batches().at(0)
    nll = [Scorer(each, ["nll"])(batch)["nll"] for each in (half, full)]
    assert (nll[0] == nll[1]).all()
    half = trained(FM, "bf16")
    full = Trained(**{**vars(half), "requested_precision": "fp32"})
    whole, reference = sampler.draw(half, 6).astype(int), sampler.draw(full, 6).astype(int)
    monkeypatch.setattr(sampler, "BATCH_SIZE", 2)
    alone = sampler.draw(half, 6).astype(int)
    assert abs(whole - alone).max() <= 1
    assert 0 < abs(whole - reference).mean() < 1.5, "bf16 differs, by about a grey level"


@pytest.mark.parametrize(
    "norm", [GroupNorm(4, 16), LayerNorm([16, 5, 5]), LayerNorm([16, 5, 5], 1e-6, False)]
)
def test_norms_compute_in_fp32_and_keep_16_bits(norm):
    for p in norm.parameters():
        nn.init.normal_(p)
    x = (torch.randn(3, 16, 5, 5) + 3).bfloat16()  # mean and variance of 100 numbers would be off in bf16
    exact = norm(x.float())
    for on in (False, True):
        with torch.autocast("cpu", BF16, enabled=on):
            made = norm(x)
        assert made.dtype == BF16
        torch.testing.assert_close(made.float(), exact, rtol=2**-6, atol=2**-6)
    assert norm(x.float()).dtype == torch.float32
    with torch.autocast("cpu", BF16):
        out = norm(x.float())
    assert out.dtype == (BF16 if isinstance(norm, LayerNorm) else torch.float32)


def test_a_block_keeps_less_under_the_autocast_of_a_gpu():
    """By the device that applies a GPU's rules: norms in fp32 there, not on a CPU."""
    import fake_device

    def memory(block: ResBlock) -> int:
        storages: dict[int, int] = {}

        def note(t: torch.Tensor) -> torch.Tensor:
            storages[id(t)] = t.numel() * t.element_size()
            held.append(t)
            return t

        held: list[torch.Tensor] = []
        x = torch.zeros(2, 16, 8, 8, device=fake_device.DEVICE, dtype=BF16)
        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda t: t)
        with torch.autocast(fake_device.NAME, BF16), hooks:
            block.to(fake_device.DEVICE)(x)
        return sum(storages.values())

    torchs = ResBlock(16, 16, 0, 4, 1e-5, 0.0, False)
    torchs.norm1, torchs.norm2 = nn.GroupNorm(4, 16), nn.GroupNorm(4, 16)  # type: ignore[assignment]
    with fake_device.on_device():
        assert memory(ResBlock(16, 16, 0, 4, 1e-5, 0.0, False)) < 0.75 * memory(torchs)


def test_channels_last_changes_no_result(monkeypatch):
    """As on a GPU; a checkpoint from where convolutions lie otherwise fits."""
    model, batch = started(FM)
    twin = copy.deepcopy(model)
    monkeypatch.setattr(devices, "device_kind", lambda device: devices.DEVICE_KINDS["cuda"])
    to_device(twin, CPU)
    weights = [m.weight for m in twin.modules() if isinstance(m, nn.Conv2d)]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    states = []
    for each in (model, twin):
        conf = OptimSection(name="adamw", lr=1e-3)
        optimizer = optim.build(each.phases()[0], conf)
        if states:
            restore(optimizer, copy.deepcopy(states[0]))
        noise = ImageNoise(0, range(len(batch)))
        loss_of(each, batch.rows(slice(None), noise), each.phases()[0].name).backward()
        if states:
            for p in each.parameters():
                held = [v for v in optimizer.state[p].values() if v.shape == p.shape]
                assert all(v.stride() == p.stride() for v in held)
        else:
            states = [{"state": {}, **{k: v for k, v in optimizer.state_dict().items() if k != "state"}}]
            for i, p in enumerate(each.parameters()):
                zeros = {key: torch.zeros(p.shape) for key in ("exp_avg", "exp_avg_sq")}
                states[0]["state"][i] = {"step": torch.tensor(0.0), **zeros}
        optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_a_resume_in_another_precision_that_auto_chose_is_said(monkeypatch):
    """A checkpoint of before, which does not record it, is resumed without a word."""
    tree, said = recipe(FM, steps=4, sets=("train.checkpoint_every=2",)), []
    tree["train"]["precision"] = "auto"
    monkeypatch.setattr(rates, "cpu_rates", lambda _: RATES)
    run = fit(tree | {"train": tree["train"] | {"steps": 2}}).run
    meta = run.checkpoint(2).meta
    record = json.loads(meta.read_text())
    assert record["precision"] == "bf16"
    monkeypatch.setattr(rates, "cpu_rates", lambda _: SLOW)
    monkeypatch.setattr(Log, "warn", lambda self, text: said.append(text))
    assert trainer(tree, run).resume() == 2
    assert said == ["the resumed run will not be bit-identical: precision bf16 → fp32"]
    del record["precision"]
    meta.write_text(json.dumps(record))
    assert trainer(tree, run).resume() == 2 and len(said) == 1


def test_threads_that_share_a_run_leave_the_precision_of_torch_as_it_was():
    """Four enter and leave in every order: inside it is full, and after the last one as before."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    inside, devices_of = Barrier(4, timeout=60), torch.device("cpu")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True

    def one(i: int) -> None:
        for turn in range(4):
            with full_fp32(devices_of):
                inside.wait()
                assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == (
                    "highest",
                    False,
                )
                if (i + turn) % 4 == 0:
                    with full_fp32(devices_of):  # one within another
                        pass
                inside.wait()
                time.sleep(0.002 * ((i + turn) % 4))

    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(one, range(4)))
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
