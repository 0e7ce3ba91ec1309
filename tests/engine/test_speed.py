"""How fast a run is: peaks, what lines show, what is recorded; batches that are read ahead; DDP's search."""

import json
import re
import threading
import time
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import speed as parts
import timing
import torch
from draws import train_batches
from helpers import fit, lines, recipe
from refused import refused
from zoo import FIRST, Case

from gzcli.core.devices import peak, peak_of
from gzcli.core.errors import UsageError
from gzcli.core.sections import TrainSection
from gzcli.data.packs.batches import Ahead, TrainBatches, reader
from gzcli.data.packs.open import open_pack
from gzcli.engine import forecast
from gzcli.engine import step as steps
from gzcli.engine.cadence import RESERVE_SHARE, TIMED_STEPS, WARM_UP, Pauses, count_steps
from gzcli.engine.log import Log, Speed, TrainBar, in_words, with_room
from gzcli.engine.pictures import training_speed
from gzcli.launch import launcher
from gzcli.models import catalog
from gzcli.models.base import Phase
from gzcli.recipe.recipe import check_strategy
from gzcli.recipe.resolve import resolve
from gzcli.store.runs import Run
from gzcli.testing.contract import started

pytestmark = pytest.mark.usefixtures("undrawn")
CPU = torch.device("cpu")
VAE = Case("vae", {"net": "mlp", "hidden": (16,), "latent": 4}, lr=3e-3, batch=8)
PEAKS = """NVIDIA H100 80GB HBM3: bf16 989; NVIDIA H100 PCIe: bf16 756; NVIDIA H100 NVL: tf32 418
NVIDIA H200: fp16 989; NVIDIA A100-SXM4-80GB: tf32 156; NVIDIA A10: bf16 125; NVIDIA L4: bf16 121
NVIDIA L40S: bf16 362; NVIDIA RTX A6000: fp32 38.7; NVIDIA GeForce RTX 4090: bf16 165.2
Tesla V100-SXM2-16GB: fp16 125; Tesla V100-PCIE-16GB: fp16 112; Tesla T4: fp16 65"""
# other chips under a name that begins alike, a precision without hardware, a share of a device, another maker
NO_PEAKS = """NVIDIA A10G; NVIDIA RTX 6000 Ada Generation; NVIDIA GeForce RTX 4090 Laptop GPU; Tesla T4
NVIDIA A100-SXM4-40GB MIG 1g.5gb; AMD Instinct MI300X"""


def test_peaks_and_rates_and_what_of_them_fits_in_a_line(tmp_path, capsys):
    for line in PEAKS.replace("\n", "; ").split("; "):
        name, precision, tera = re.fullmatch(r"(.*): (\w+) ([\d.]+)", line).groups()
        assert peak_of(name, precision) == float(tera) * 1e12, line
    for name in NO_PEAKS.replace("\n", "; ").split("; "):
        assert peak_of(name, "bf16") is None, name
    rates = Speed(128, 1e12, 500e12).rates_at(40.0)
    assert rates == {"images_s": 5120.0, "tflops": 40.0, "mfu": 0.08}
    assert in_words(rates) == ["MFU 8%", "40 TFLOP/s", "5.12e+03 images/s"]
    assert Speed(128).rates_at(2.0) == {"images_s": 256.0}
    assert peak(CPU, "bf16") is None
    assert Speed(8, 2e9, None).rates_at(3.0) == {"images_s": 24.0, "tflops": 0.006}
    rows = [{"step": 1, "it_s": 9.0, "tflops": 0.5}, {"step": 2, "it_s": 1.0}, {"step": 3, "it_s": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert training_speed(tmp_path) == {"it_s": 2.0, "tflops": 0.5}
    assert training_speed(tmp_path / "none") == {}
    assert with_room("a" * 60, ["b" * 30, "c" * 18], 80) == "a" * 60 + "  " + "c" * 18
    bar = TrainBar(Log(), None, 0, 200)
    bar.speed = Speed(128, 1e12, 500e12)
    bar.show(100, {"loss": 0.1234})
    bar.log.validated = "validation bpd 1.005"
    bar.since -= 10  # seconds
    bar.show(199, {"loss": 0.1234, **{f"part{i}": 0.5 for i in range(4)}, "bpd": 0.98})
    first, second = capsys.readouterr().err.splitlines()
    assert len(first) <= 80 and "MFU" in first and "loss 0.1234" in first
    assert len(second) <= 80 and second.startswith("step 199/200  ")
    assert "left  loss 0.1234  validation bpd 1.005" in second, "they need the room of the others"


@pytest.mark.parametrize(("stages", "most"), [(1, 5), (2, 4)])
def test_a_run_without_a_terminal_tells_its_progress_in_a_few_lines(tmp_path, capsys, stages, most):
    """Lines of losses every 10 of 1,000 steps, ten validations: few are printed, `log.txt` has all."""
    log = Log(tmp_path)
    with log.training(0, 1000, stages=stages) as bar:
        for step in range(10, 1001, 10):
            bar.show(step, {"loss": 1.0})
            if step % 100 == 0:
                log.validated = f"validation bpd {step}"
                log.info(f"step {step}  {log.validated}", sparse=step < 1000)
        log.warn("samples have collapsed")
    messages = capsys.readouterr().err.splitlines()
    assert len(messages) <= most and messages[0].startswith("step 10/1000")
    assert "validation bpd" in messages[1]
    assert messages[-2:] == ["step 1000  validation bpd 1000", "warning: samples have collapsed"]
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 111


def test_a_run_records_its_speed(monkeypatch):
    monkeypatch.setattr(forecast, "MAX_SHORT_STEPS", 1)
    t = fit(recipe(VAE, steps=3))
    flops = forecast.work_of(t.part, t.info).flops
    for line in lines(t.run.path / "metrics.jsonl"):
        if "it_s" in line:
            assert line["images_s"] == pytest.approx(8 * line["it_s"], rel=1e-2)
            assert line["tflops"] == pytest.approx(flops * line["it_s"] / 1e12, rel=1e-2)
            assert "mfu" not in line, "a CPU has none"


def test_minutes_wait_for_the_device_at_both_ends():
    """Not between two steps: a run does not either."""
    readings, done, base = [], [], time.monotonic()

    def clock() -> float:
        readings.append(len(done))
        return base + len(done)  # a step takes a second

    pauses = Pauses(TrainSection(), 60_000.0, {})
    count = count_steps(done.append, [Phase("main", [])], pauses, base, clock)
    assert readings == [0, WARM_UP, WARM_UP + TIMED_STEPS, WARM_UP + TIMED_STEPS]
    assert count == int((1 - RESERVE_SHARE) * 60_000 - WARM_UP - TIMED_STEPS)


def batches() -> TrainBatches:
    return train_batches(open_pack("digits"), seed=0, batch_size=4, levels=17, device=CPU)


def test_batches_read_ahead_are_the_same():
    """In any order of steps, by another thread."""
    plain, ahead = batches(), batches()
    threads: list[str] = []
    ahead.reader, real = Ahead(CPU).at, ahead._read
    ahead._read = lambda step: threads.append(threading.current_thread().name) or real(step)
    for step in (0, 0, 1, 2, 3, 7, 8, 2):
        a, b = plain.at(step), ahead.at(step)
        assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and torch.equal(a.index, b.index)
        assert torch.equal(a.noise.randn(4, 2), b.noise.randn(4, 2))
    assert all(name.startswith("ahead") for name in threads) and len(threads) > 8

    def read(step: int) -> str:
        return f"{step} by {threading.current_thread().name}"

    assert reader(CPU, on_device=False, streamed=False)(read, 3) == f"3 by {threading.current_thread().name}"

    def fail(step: int) -> int:
        if step == 1:
            raise UsageError("the image is damaged")
        return step

    reading = Ahead(CPU)
    assert reading.at(fail, 0) == 0
    with pytest.raises(UsageError, match="damaged"):  # when its step is asked for
        reading.at(fail, 1)


def test_where_every_step_gives_every_parameter_a_gradient():
    """What is found without values is what a real step does."""
    for model in ("vae", "ddpm", "dit", "glow", "vqvae", "dcgan", "aae"):
        module, batch = started(FIRST[model])
        complete = model not in ("dcgan", "aae")
        assert steps.trains_all(module, batch) == complete, model
        if complete:
            module.loss(batch, module.phases()[0].name)
            assert all(p.grad is None for p in module.parameters()), "the model itself is not touched"
        module.unused = torch.nn.Linear(2, 2)
        assert not steps.trains_all(module, batch), model


def test_what_can_be_shared_out():
    part = resolve("dit", data="digits", flags={"launch.strategy": "fsdp"}).parts[0]
    for model in ("dit", "rf", "instructpix2pix", "controlnet", "sd_lora"):
        check_strategy(part, catalog.card(model))
    module, _ = started(FIRST["dit"])
    assert list(steps.blocks_of(module)) == list(module.net.blocks)
    module, _ = started(replace(VAE))
    module.attach("frozen", torch.nn.Linear(3, 3))
    twin = steps.twin(module)
    assert twin.frozen is module.frozen
    ids = {id(p) for p in module.parameters()}
    assert ids.isdisjoint({id(p) for p in twin.parameters()})
    for model, sets, says in (
        ("vae", (), "cannot shard the weights of `vae`"),
        ("dit", ("optim.name=muon",), "`optim.name: muon` needs whole matrices"),
        ("dit", ("train.precision=fp16",), "`train.precision: fp16` needs one loss scale"),
        ("dit", ("train.compile=true",), "`train.compile: true` compiles whole weights"),
    ):
        e = refused(says, resolve, model, data="digits", sets=("launch.strategy=fsdp", *sets))
        assert "`dit`" in e.hint or "--set" in e.hint, says


# packages of the extra `peers` that a part compares with
PEERS = {"peers": ("normflows", "nflows", "x_transformers"), "pythae": ("pythae",)}
PEERS |= {"diffusion": ("denoising_diffusion_pytorch",)}


@pytest.mark.slow
@pytest.mark.parametrize("name", parts.PARTS)
def test_each_part_of_the_bench_runs_once(name, call, monkeypatch):
    """A step of either side, small; commands in this process, with no engine."""
    if absent := [package for package in PEERS.get(name, ()) if find_spec(package) is None]:
        pytest.skip(f"`{absent[0]}` is not installed: pip install -e '.[peers]'")

    def command(words: list[str], **how: bool) -> None:
        assert words[1:3] != ["-m", "gzcli"] or call(*words[3:])[0] == 0

    monkeypatch.setattr(parts, "subprocess", SimpleNamespace(run=command))
    monkeypatch.setattr(
        launcher, "run", lambda folder, *_, **__: Run(folder).update(state="finished", step=1)
    )
    monkeypatch.setattr(timing, "MOST", 1)
    monkeypatch.setattr(timing, "ROWS", rows := [])
    monkeypatch.setattr(parts, "SIDE", 4)
    monkeypatch.setattr(parts, "CODES", 2)
    parts.PARTS[name]()
    assert rows and {verdict for *_, verdict in rows} <= {"ok", "MISSED"}
