"""`gz doctor --benchmark`: what is counted, what a step costs by that, and how it ends."""

from __future__ import annotations

import json
import os

import psutil
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gzcli import start
from gzcli.cli import benchmark as shown
from gzcli.cli import out
from gzcli.engine import benchmark
from gzcli.errors import DeviceError

RATES = benchmark.Rates(
    matmul_fp32=2e12, matmul_bf16=4e12, conv=1e12, small_conv=1e11, copy=1e10, call=1e-5, loader=1e5
)


def test_the_operations_of_a_block_are_those_that_torch_counts():
    block = benchmark.Block(32)
    with FlopCounterMode(display=False) as counter:
        block.step(torch.zeros(2, 32, benchmark.SIDE, benchmark.SIDE))
    assert counter.get_total_flops() == block.operations(2)


def test_what_a_step_costs():
    large = benchmark.Net(params=1, batch=1, flops=10**12, calls=1000, width=128)
    small = benchmark.Net(params=1, batch=1, flops=10**9, calls=1000, width=32)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert large.seconds(RATES, gpu) == pytest.approx(1)
    assert small.seconds(RATES, gpu) == pytest.approx(0.01), "the GPU waits for the next operation"
    assert large.seconds(RATES, cpu) == pytest.approx(1.01)
    assert small.seconds(RATES, cpu) == pytest.approx(0.02), "its rate is that of narrow blocks"


def test_every_rate_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "REPEATS", 1)
    rates = benchmark.measure(torch.device("cpu"), 0.0)
    assert all(rate > 0 for rate in vars(rates).values()) and set(vars(rates)) == set(shown.ROWS)
    told = [json.loads(line)["doing"] for line in capsys.readouterr().out.splitlines()]
    assert len(told) == len(shown.ROWS)


@pytest.mark.slow
def test_the_net_of_the_paper():
    net = benchmark.Net.of("paper")
    assert net.params == pytest.approx(35.7e6, rel=0.02) and net.batch == 128
    assert net.flops == pytest.approx(4.78e12, rel=0.01)


@pytest.fixture
def child(tmp_path, monkeypatch):
    """Puts a script in the place of the benchmark."""

    def write(text: str) -> None:
        (tmp_path / "script.py").write_text(text)
        monkeypatch.setattr(start, "SCRIPT", str(tmp_path / "script.py"))

    return write


def test_its_result_is_shown(child, capsys, monkeypatch):
    of = vars(RATES) | {"threads": 2, "steps": {"paper": 2.0}}
    net = {"params": 35_700_000, "batch": 128, "flops": 4.78e12, "calls": 9, "width": 128}
    result = json.dumps({"result": {"devices": {"cpu": of}, "nets": {"paper": net}}})
    child(f"""print('{{"doing": "x"}}'); print({result!r})""")
    monkeypatch.setattr(os, "getloadavg", lambda: (18.0, 1.0, 1.0), raising=False)
    assert shown.show_benchmark()["devices"]["cpu"]["conv"] == 1e12
    told = capsys.readouterr()
    assert "measuring x" in told.err and "load 18.0" in told.err
    for words in ("35.7 M, 4.78 TFLOP a step", "2.0 s a step, 100k steps 55h33m", "10 GB/s", "10 µs"):
        assert words in told.out


def test_a_benchmark_that_fails(child):
    child("raise MemoryError('no memory')")
    with pytest.raises(DeviceError, match="MemoryError: no memory"):
        shown.measured(1.0)


def test_ctrl_c_leaves_no_process(child, monkeypatch):
    child("""print('{"doing": "x"}', flush=True)\nwhile True: pass""")

    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(out, "info", interrupt)
    with pytest.raises(KeyboardInterrupt):
        shown.measured(1.0)
    assert not [
        process for process in psutil.Process().children() if "script.py" in " ".join(process.cmdline())
    ]
