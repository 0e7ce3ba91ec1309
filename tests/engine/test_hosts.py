"""Several machines, and processes that die: two hosts in network namespaces train one run."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from helpers import figures, run_at, same, spawn
from safetensors.torch import load_file

from gzcli.store import runs
from gzcli.store.runs import Run

PATIENCE = 400  # seconds for what takes twenty on a machine that does nothing else
TRAIN = (
    *("train", "vae", "--steps", "60", "--cpu", "--set", "train.sample_every=0"),
    *("--set", "train.eval_every=0", "--set", "train.best=none", "--set", "train.log_every=1"),
    *("--set", "train.checkpoint_every=10"),
)
# Two hosts with a cable between them. They ask no name server, of which there is none.
HOSTS = """
printf '127.0.0.1 localhost\\n10.77.0.1 host0 %s\\n10.77.0.2 host1\\n' "$(hostname)" > "$1/hosts"
echo 'hosts: files' > "$1/nsswitch"
mount --bind "$1/hosts" /etc/hosts && mount --bind "$1/nsswitch" /etc/nsswitch.conf || exit 1
unshare -n sleep 100000 & other=$!
until [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep .05; done
ip link set dev lo up && ip link add name gz0 type veth peer name gz1 && ip link set dev gz1 netns $other &&
ip addr add 10.77.0.1/24 dev gz0 && ip link set dev gz0 up &&
nsenter -t $other -n ip link set dev lo up && nsenter -t $other -n ip addr add 10.77.0.2/24 dev gz1 &&
nsenter -t $other -n ip link set dev gz1 up && echo $$ $other
wait
"""


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[str]]:
    """The process in the namespaces of each host; its files are those of this machine."""
    if not shutil.which("unshare") or not shutil.which("ip"):
        pytest.skip("there is no `unshare` or `ip` here")
    words = ["unshare", "-rnm", "bash", "-c", HOSTS, "hosts", str(tmp_path)]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert child.stdout
    try:
        pids = child.stdout.readline().split() if child.poll() is None else []
        if len(pids) != 2:
            pytest.skip("network namespaces are not allowed here")
        yield pids
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def both(hosts: list[str], *words: str) -> list[subprocess.Popen]:
    """The same command on both hosts, the second first."""
    line = (*TRAIN, *words, "--num-machines", "2", "--main-process-ip", "10.77.0.1")
    enter = ("nsenter", "-U", "-n", "-m", "--preserve-credentials", "-t")
    return [spawn(*line, "--machine-rank", str(r), inside=(*enter, hosts[r])) for r in (1, 0)][::-1]


def ended(children: list[subprocess.Popen], code: int) -> list[str]:
    """Waits for them; their messages."""
    messages = [child.communicate(timeout=PATIENCE)[1] for child in children]
    assert [child.returncode for child in children] == [code] * len(children), "\n".join(messages)
    return messages


def engine_of(child: subprocess.Popen, rank: int) -> psutil.Process:
    """The process of a rank, below the `gz` that was started."""
    processes = psutil.Process(child.pid).children(recursive=True)
    return next(process for process in processes if process.environ().get("RANK") == str(rank))


def assert_equal(a: Run, b: Run) -> None:
    x, y = (load_file(run.path / "model.safetensors") for run in (a, b))
    assert same(x, y) and figures(a) == figures(b) and len(figures(a)) == 60


@pytest.mark.slow
@pytest.mark.launch
def test_two_hosts_train_one_run_through_a_stop_and_a_death(hosts, home):
    """Machine 1 is told to stop, then goes on; in another run its process is killed, and all start again."""
    ended(both(hosts, "--name", "whole"), 0)
    whole = runs.by_name("whole")
    assert {run.id for run in runs.all_runs()} == {whole.id}, "the other host has made none"

    children = both(hosts, "--name", "stopped")
    stopped = run_at(12, "stopped", PATIENCE)
    psutil.Process(children[1].pid).send_signal(signal.SIGTERM)
    messages = ended(children, 128 + signal.SIGTERM)
    assert all("checkpoint saved" in text and "--resume" in text for text in messages)
    assert stopped.state == "interrupted" and stopped.status()["step"] < 60
    ended(both(hosts, "--resume"), 0)
    assert_equal(stopped, whole)

    children = both(hosts, "--name", "killed")
    killed = run_at(12, "killed", PATIENCE)
    engine_of(children[1], 1).kill()
    messages = ended(children, 0)
    assert "restarting all processes (1 of" in messages[0] and "resumed at step" in messages[0]
    assert killed.state == "finished" and killed.status()["error"] is None
    assert_equal(killed, whole)


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_is_started_again(rank, home):
    """With `launch.restarts` the run ends as one that was not broken."""
    words = ("--processes", "2", "--set", "launch.restarts=1")
    ended([spawn(*TRAIN, *words, "--name", "whole")], 0)
    child = spawn(*TRAIN, *words, "--name", "killed")
    killed = run_at(12, "killed", PATIENCE)
    engine_of(child, rank).kill()
    (message,) = ended([child], 0)
    assert "restarting all processes (1 of" in message and "resumed at step" in message
    assert_equal(killed, runs.by_name("whole"))
