"""Where processes start: several machines, jobs for SLURM, variables of launchers, GPUs out of reach."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import stat
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gzcli
from gzcli.cli import doctor, out
from gzcli.core import devices, units
from gzcli.core.devices import VISIBLE_DEVICES
from gzcli.core.errors import DeviceError, MissingError, UsageError
from gzcli.core.sections import LaunchSection
from gzcli.engine.__main__ import explain
from gzcli.engine.log import Log
from gzcli.launch import launcher, plan, slurm
from gzcli.launch import plan as planning
from gzcli.launch.launcher import Plan
from gzcli.launch.plan import MEETING_SECONDS, made_by_machine_0, write_run
from gzcli.store import claims, runs

pytestmark = pytest.mark.usefixtures("home")

TWO = LaunchSection(machines=2, machine_rank=0, main_ip="10.0.0.1", cpu=True)


def port(section: LaunchSection = TWO, job: str = "vae mnist") -> int | None:
    return launcher.plan(section, every_gpu=True, job=job).main_port


def test_the_port_follows_from_the_job(monkeypatch):
    assert port() == port(replace(TWO, machine_rank=1)), "all machines know it"
    ports = {port(job=f"vae {i}") for i in range(20)}
    assert len(ports) > 15 and all(20_000 <= p < 30_000 for p in ports if p)
    assert port(replace(TWO, main_port=1234)) == 1234
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    first = port()
    assert first == port(job="glow"), "what was typed does not matter to SLURM's number"
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    assert port() != first
    assert launcher.plan(LaunchSection(cpu=True, processes=2), every_gpu=True).main_port is None
    assert launcher.interface_to("127.0.0.1") == "lo"
    assert launcher.interface_to("no.such.host.example") is None


def test_machines_that_are_not_there():
    for section, text in (
        (LaunchSection(machines=2, machine_rank=2, main_ip="a"), "ranks start at 0"),
        (LaunchSection(machine_rank=1, main_ip="a"), "ranks start at 0"),
        (LaunchSection(machines=2), "need `--main-process-ip`"),
    ):
        with pytest.raises(UsageError, match=text):
            launcher.plan(section, every_gpu=True)


def test_slurm_fills_in_what_is_left_open(monkeypatch, fake):
    fake("scontrol", 'echo "node7\nnode8"')
    values = {"NNODES": "4", "STEP_NUM_NODES": "2", "NODEID": "1", "JOB_NODELIST": "node[7-8]"}
    for key, value in values.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    plan = launcher.plan(LaunchSection(cpu=True), every_gpu=True)
    assert (plan.machines, plan.machine_rank, plan.main_ip, plan.processes) == (2, 1, "node7", 2)
    assert launcher.plan(LaunchSection(cpu=True), every_gpu=False).machines == 1, "samples are drawn on one"
    monkeypatch.setenv("SLURM_LOCALID", "1")
    with pytest.raises(UsageError, match="several tasks on this node"):
        launcher.plan(LaunchSection(cpu=True), every_gpu=True)


def test_other_machines_wait_for_the_run_of_machine_0(home):
    """One of another job, one of an earlier start and one that has ended are none."""
    lines: list[str] = []
    first, second = (launcher.plan(replace(TWO, machine_rank=r), every_gpu=True, job="vae") for r in (0, 1))
    assert first.job == second.job != launcher.plan(TWO, every_gpu=True, job="wgan").job
    now = time.time()
    for state, job, launched in (
        ("planned", "another", now),
        ("planned", first.job, now - 2 * MEETING_SECONDS),
        ("killed", first.job, now),
    ):
        runs.create("vae", "digits").update(state=state, job=job, launched=launched)
    with pytest.raises(MissingError, match="machine 0 did not create the run") as caught:
        made_by_machine_0(second, lines.append, patience=0.1)
    assert "`GZ_HOME`" in (caught.value.hint or "") and "waiting for machine 0" in lines[0]
    run = runs.create("vae", "digits")
    later = threading.Timer(0.2, lambda: run.update(state="planned", job=first.job, launched=time.time()))
    later.start()
    assert made_by_machine_0(second, lines.append, patience=600) == run


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Puts a program of SLURM on the path: fake("sbatch", text of the shell script)."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    def write(name: str, text: str) -> None:
        path = folder / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return write


def test_a_job_is_written_and_submitted(fake, gz, tmp_path):
    fake("sbatch", f'cp "$2" {tmp_path}/got; echo "42;cluster"')
    words = "train vae --num-machines 2 --gpus 4 --seed 7 --submit slurm --name"
    assert gz(*words.split(), "it's")[0] == 2, "no run may be called so"
    options = "mine --slurm partition=gpu --slurm array=0-1 --json -- --debug"
    code, stdout, stderr = gz(*f"{words} {options}".split())
    assert code == 0, stderr
    said, script = json.loads(stdout), (tmp_path / "got").read_text()
    assert said["job"] == "42" and said["script"] == script == Path(said["path"]).read_text()
    for line in ("nodes=2", "ntasks-per-node=1", "gres=gpu:4", "partition=gpu", "array=0-1", "requeue"):
        assert f"#SBATCH --{line}\n" in script
    assert "%A_%a.out" in script and "--seed $((7 + SLURM_ARRAY_TASK_ID)) -- --debug &" in script
    assert "--submit" not in script and "--slurm" not in script and "--json" not in script
    assert not runs.all_runs()


def test_what_a_job_cannot_be(fake, gz):
    words = ("train", "vae", "--submit", "slurm")
    code, _, stderr = gz(*words)
    assert code == 3 and "`sbatch` is not available" in stderr
    fake("sbatch", "echo 'invalid partition' >&2; exit 1")
    for more, expected, message in (((), 3, "invalid partition"), (("--gpus", "all"), 2, "needs a number")):
        code, _, stderr = gz(*words, *more)
        assert code == expected and message in stderr
    for wrong in ("Partition", "a b=c", 'comment=a"b', "time=1\n#SBATCH --uid=0"):
        with pytest.raises(UsageError, match="not an option of `sbatch`"):
            slurm.options([wrong])
    assert slurm.options(["exclusive", "--time=1:00"]) == {"exclusive": None, "time": "1:00"}


def test_a_job_out_of_time_is_stopped_and_queued_again(fake, tmp_path):
    """The script runs under bash: USR1 asks the step to end, and the job goes on under the same name."""
    log = tmp_path / "log"
    fake(
        "srun",
        f'echo "srun $*" >> {log}; trap "exit 143" TERM; echo $$ > {tmp_path}/pid; '
        "while :; do sleep .1; done",
    )
    fake("scancel", f'echo "scancel $*" >> {log}; kill -TERM $(cat {tmp_path}/pid)')
    fake("scontrol", f'echo "scontrol $*" >> {log}')
    job = slurm.Job(["train", "vae"], name="mine", seed=3, gpus=0, cores=2, goes_on="named")
    path = tmp_path / "job.sh"
    path.write_text(slurm.batch_script(job, {}, program=["gz"], folder=tmp_path))
    env = {**os.environ, "SLURM_JOB_ID": "5", "SLURM_ARRAY_JOB_ID": "4", "SLURM_ARRAY_TASK_ID": "1"}

    def ended(signal: str) -> int:
        (tmp_path / "pid").unlink(missing_ok=True)
        child = subprocess.Popen(["bash", str(path)], env=env)
        while not (tmp_path / "pid").exists():
            assert child.poll() is None
        subprocess.run(["bash", "-c", signal.format(script=child.pid, step=(tmp_path / "pid").read_text())])
        return child.wait(20)

    assert ended("kill -USR1 {script}") == 0
    started, *rest = log.read_text().splitlines()
    assert started.endswith("--cpus-per-task=2 gz train vae --requeue --name mine-4-1 --seed 3")
    assert rest == ["scancel --signal=TERM 5", "scontrol requeue 5"]
    log.unlink()
    assert ended("kill -TERM {script} {step}") == 143, "a job that was cancelled is not queued again"
    assert len(log.read_text().splitlines()) == 1


def test_other_verbs_are_submitted_alike(fake, gz, home, tmp_path):
    """Only a league goes on where it was out of time; nothing is made before the job runs."""
    fake("sbatch", f'cp "$2" {tmp_path}/got; echo 42')
    league = "bench --train-missing --budget 9s --models vae --data digits"
    for words, seed, goes_on in (
        ("sample pretrained:vae -n 4 --gpus 2 --out drawn", "7", False),
        ("ood pretrained:vae --out digits", "7", False),
        ("ood pretrained:vae --input .", "7", False),
        ("bench pretrained:vae", "7", False),
        (f"{league} --slurm array=0-1", "$((7 + SLURM_ARRAY_TASK_ID))", True),
    ):
        options = ["--submit", "slurm", "--seed", "7", "--slurm", "time=1:00:00"]
        assert gz(*words.split(), *options)[:2] == (0, "job 42\n")
        script = (tmp_path / "got").read_text()
        line = f"gzcli {words.partition(' --slurm')[0]} --seed {seed} &\n"
        assert line in script and 'srun --kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS' in script
        assert "#SBATCH --time=1:00:00\n" in script and ("#SBATCH --signal=" in script) == goes_on
        assert ("--gres=gpu:2\n" in script) == ("--gpus" in words)
        assert f"#SBATCH --job-name={words.split()[0]}-" in script
    code, _, text = gz(*league.split(), "--seeds", "2", "--jobs", "3", "--submit", "slurm")
    script = (tmp_path / "got").read_text()
    assert (
        code == 0 and "2 tasks" in text and "--array=0-1%3\n" in script and "tasks=(vae:0 vae:1)\n" in script
    )
    assert '--jobs 3 --seed 0 --entry "${tasks[SLURM_ARRAY_TASK_ID]}" &\n' in script
    assert not Path("drawn").exists() and not (home / "bench").exists()
    assert gz(*league.replace("vae", "vaee").split(), "--jobs", "2", "--submit", "slurm")[0] == 2
    for words, code in (("ood pretrained:vae --out nosuch", 2), ("sample glow", 3), ("bench --budget 9s", 2)):
        assert gz(*words.split(), "--submit", "slurm")[0] == code, "what is wrong is told before"


def test_each_process_beside_others_has_a_gpu_or_a_core(monkeypatch):
    monkeypatch.setenv(VISIBLE_DEVICES, "2, 5")
    assert launcher.slots(3, gpus=True) == [{VISIBLE_DEVICES: "2"}, {VISIBLE_DEVICES: "5"}]
    assert launcher.slots(2, gpus=False) == 2 * [{"OMP_NUM_THREADS": "1"}]


def test_no_script_holds_what_cannot_be_printed(fake, gz, tmp_path, monkeypatch):
    """The name of a folder could bring lines of its own into a job script, or into that of a league."""
    fake("sbatch", f"touch {tmp_path}/got; echo 42")
    plain = ["train", "vae", "--submit", "slurm"]
    league = ["bench", "--train-missing", "--budget", "9s", "--models", "vae", "--data", "digits", "--cpu"]
    for folder, store, words, message in (
        ("a\n#SBATCH --uid=0\ntouch PWNED", "home", plain, "unprintable characters"),
        ('a"b', "home", plain, "does not accept the folder name"),
        ("a\nb", "home", league, "unprintable characters"),
        ("ok", "home\nb", plain, "unprintable characters"),
        ("ok", "home", [*plain, "--set", "about=a\nb"], "the word 'about=a\\nb' contains"),
        ("a\udcff", "home", plain, "unprintable characters"),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        monkeypatch.setenv("GZ_HOME", str(tmp_path / store))
        code, _, stderr = gz(*words)
        assert code == 2 and message in stderr, words
        assert not list(tmp_path.glob("**/*.sh"))
    assert not (tmp_path / "got").exists()
    monkeypatch.chdir(tmp_path)
    job, folder = slurm.Job(["train"], "a", 0, 0, 2), tmp_path / "it's 100%j"
    text = slurm.batch_script(job, {}, program=["gz"], folder=folder)
    assert f'#SBATCH --output="{tmp_path}/it\'s 100%%j/%x-%j.out"\n' in text


def test_a_start_is_of_a_new_run_or_one_that_goes_on(home):
    """Jobs side by side have runs of one model; each goes on with its own. Machine 0 decides for others."""
    request = planning.ask("vae", None, (), {"launch.cpu": True})
    with pytest.raises(MissingError, match="no unfinished run of `vae` on `digits`"):
        planning.prepare(request, resume=True)
    mine, second = (runs.create("vae", "digits", alias=f"mine-{i}") for i in (1, 2))
    for run in (mine, second):
        run.recipe_file.write_text("model: {name: vae}\nlaunch: {cpu: true, processes: 2}\n")
        run.update(state="interrupted")
    start = planning.prepare(request, resume=True)
    assert (start.run, start.plan.processes) == (second, 2)
    assert planning.prepare(request, requeue=True, alias="mine-1").run == mine
    assert planning.prepare(request, requeue=True, alias="mine-3").run is None
    with pytest.raises(UsageError, match="the name `mine-1` is already used"):
        planning.prepare(request, alias="mine-1")
    for run in (mine, second):
        run.update(state="finished")
    with claims.claimed(second):
        claims.sign(second)
        busy = f"`{second.id}` is being trained by process {os.getpid()}"
        with pytest.raises(UsageError, match=busy):
            planning.prepare(request, resume=True)
    several = {"machines": 2, "machine_rank": 1, "main_ip": "10.0.0.1", "cpu": True}
    joined = planning.ask("vae", None, (), {f"launch.{key}": value for key, value in several.items()})
    assert planning.prepare(joined, resume=True).run is None


def test_variables_of_launchers_are_read_told_and_not_the_engines(monkeypatch):
    cases = {"3": 3, "2,1": 2, " 4 ": 4, "": None, "0": None, "x": None, "²": None}
    for text, threads in cases.items():  # the first number of a list
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert units.threads_wanted() == threads, text
        assert launcher.plan(LaunchSection(cpu=True, threads=None), every_gpu=True).threads >= 1
    for variable in ("SLURM_NNODES", "SLURM_STEP_NUM_NODES", "GZ_MAX_ARCHIVE"):
        monkeypatch.setenv(variable, "many")
        with pytest.raises(UsageError, match=f"`{variable}` must be a number of .*, not `many`"):
            units.number_in(variable, "nodes")
        monkeypatch.delenv(variable)
    for variable in ("PMI_SIZE", "OMPI_COMM_WORLD_RANK", "RANK", "LOCAL_WORLD_SIZE", "ACCELERATE_USE_CPU"):
        monkeypatch.setenv(variable, "4")
    env = launcher.child_environment(Plan(gpus=1), "quiet")
    assert not [key for key in env if key.startswith(("PMI_", "OMPI_", "RANK", "LOCAL_", "ACCELERATE_"))]


def test_a_run_goes_on_with_its_processes(home):
    def request(**typed):
        return plan.ask("vae", "digits", (), {f"launch.{key}": value for key, value in typed.items()})

    first = request(processes=2, cpu=True)
    run = runs.create("vae", "digits")
    write_run(run, first.recipe, Plan(processes=2, threads=3))

    def again(**typed):
        section = plan.launched_again(run, request(**typed).recipe)
        return section.processes, section.gpus, section.cpu, section.threads

    assert again() == (2, None, True, 3)
    assert again(processes=1) == (1, None, True, None), "what is typed counts, and cores are shared out again"
    assert again(gpus=4) == (None, 4, False, None)
    assert again(threads=5) == (2, None, True, 5)


# moves a cursor, sets a title, conceals, colours, turns the order of letters, is not seen, is half a letter
HOSTILE = "a\x1b[2J\x07\x9b31m\r\x1b]0;title\x1b[8m\x1b[31m\u202efdp\u2066\u200b\ufeff\U000e0041\ufdd0\udc80"
UNSEEN = {chr(i) for i in (*range(9), *range(11, 32), *range(127, 160), 0x200B, *range(0x202A, 0x202F))}
UNSEEN |= {chr(i) for i in (*range(0x2066, 0x206A), 0xFEFF, 0xE0041, 0xFDD0, 0xDC80)}


@pytest.mark.parametrize("coloured", [True, False])
def test_control_characters_of_names_do_not_reach_the_terminal(capsys, monkeypatch, coloured):
    monkeypatch.setattr(out, "colourful", lambda stream: coloured)
    name = HOSTILE.replace("\ufdd0", "") if coloured else HOSTILE
    out.text(name)
    out.configure(json=True)
    out.data({"name": HOSTILE})
    out.configure(json=False)
    out.warn(f"{name}\tnext")
    out.line(out.style(name, "bold"))
    out.error(MissingError(name, hint=name))
    out.table(["name"], [[name]], to_stderr=True)
    monkeypatch.setattr("sys.stdin", io.StringIO("y"))
    assert out.confirmed(f"remove {name}?")
    log = Log(mode="human")
    log.warn(name)
    shown, messages = capsys.readouterr()
    assert json.loads(shown.splitlines()[1])["name"] == HOSTILE
    for code in (1, 31, 33, 36, 0):  # the colours of gz itself stay, and nothing else is one
        assert (f"\x1b[{code}m" in messages) == coloured
        messages = messages.replace(f"\x1b[{code}m", "")
    assert not set(shown + messages) & UNSEEN
    assert "\\u001b[8m\\u001b[31m\\u202efdp" in messages and "\tnext\n" in messages


def test_control_characters_of_names_do_not_reach_bars_and_logs(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    log = Log(tmp_path, mode="human")
    with log.bar(f"sample {HOSTILE} [/red] [bold]") as progress:
        progress(1, 2)
        log.info(HOSTILE)
    with out.progress(f"{HOSTILE} [/red]") as report:
        report(1, 2)
    text = capsys.readouterr().err
    for sequence in (r"\x1b\[\??[0-9;]*[a-zA-Z]", "\r"):  # those by which rich draws its bars
        text = re.sub(sequence, "", text)
    assert "[/red] [bold]" in text and not set(text) & UNSEEN
    assert not set((tmp_path / "log.txt").read_text()) & UNSEEN


def test_control_characters_of_names_do_not_reach_pictures(tmp_path, capsys, recwarn):
    import numpy as np

    from gzcli.engine.pictures import sample_rows
    from gzcli.engine.sheets import Row, sheet

    names = [f"{HOSTILE}\nline", r"$\frac{$ and $x^2$", "\u6f22 \U0001f600"]
    sample_rows(tmp_path / "rows.png", [(name, np.zeros((2, 1, 8, 8), np.uint8)) for name in names])
    images = np.zeros((3, 1, 8, 8), np.uint8)
    assert sheet([[Row(name, images, names)] for name in names], "\n".join(names)).size
    assert not recwarn.list and capsys.readouterr() == ("", "")


def test_places_where_no_folder_can_be_made(gz, home, tmp_path, monkeypatch):
    """A message of its own, and no bug in gz; a dry run needs none."""
    file = tmp_path / "FILE"
    file.write_text("mine")
    cases = [
        (home, f"sample pretrained:vae -n 1 --out {file}/x", "not a directory"),
        (home, f"recipe copy vae {file}/x.yaml", "file exists"),
        (file, "train vae --steps 1", "not a directory"),
        (file / "home", "sample pretrained:vae -n 1", "not a directory"),
        (file, f"data import {tmp_path} --name mine", "file exists"),
        (file, "train vae --submit slurm", "not a directory"),
    ]
    if Path("/proc/self").exists():
        cases.append((Path("/proc/none"), "train vae --steps 1", "the folder `/proc/none"))
    for place, words, message in cases:
        monkeypatch.setenv("GZ_HOME", str(place))
        code, _, stderr = gz(*words.split())
        error = stderr.partition("error: ")[2]
        assert code == 3 and message in error and "hint: " in error and "bug" not in error, words
        if place != home:
            bad = {check.name for check in doctor.folders() if check.state == "bad"}
            assert bad >= {"cache", "runs"} or "proc" in place.parts  # root may write there, the system says
            monkeypatch.setenv("GZ_TRIAL", "1")
            code, stdout, _ = gz("train", "vae", "--dry-run")
            assert code == 0 and re.search("/costs` cannot be (written|created)", " ".join(stdout.split()))
    assert file.read_text() == "mine"
    assert explain(NotADirectoryError(20, "Not a directory", "/a/b")).code == 3


@pytest.fixture
def foreign_gpu(home, tmp_path, monkeypatch):
    """A GPU that the driver lists and this machine's torch cannot use."""
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("there are GPUs here")
    (tmp_path / "bin").mkdir()
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: a card (UUID: GPU-aaa)'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(smi.parent), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_gpu_that_torch_cannot_use_is_refused_by_all(foreign_gpu, gz, monkeypatch):
    """Exit code 4 with the reason where GPUs were asked for; by `gz doctor` with the same words."""
    message = "torch cannot use the GPU on this machine: "
    for words in (
        "train vae --steps 1 --gpus 1",
        "train vae --steps 1 --gpus all",
        "sample pretrained:vae -n 1 --gpus 1",
        "ood pretrained:vae --out digits -n 10 --gpus 1",
        "bench pretrained:vae --gpus all",
        "bench --train-missing --budget 9s --models vae --data digits --gpus 1",
    ):
        code, _, stderr = gz(*words.split())
        assert code == 4 and message in stderr and "hint: install a matching build of torch" in stderr, words
    assert not runs.all_runs()
    with pytest.raises(DeviceError, match=message):
        gzcli.train("vae", steps=1, gpus=1)
    (check,) = [check for check in doctor.devices() if check.name == "gpu"]
    assert check.state == "bad" and check.detail == launcher.usable_gpus().lack
    with pytest.raises(DeviceError, match=message):
        devices.pick_device(LaunchSection(gpus=1))
    monkeypatch.setenv("GZ_GPUS", "1")
    with pytest.raises(DeviceError, match=message):
        devices.check_planned()
    assert explain(RuntimeError("CUDA error: no kernel image is available\nCompile with")).code == 4


def test_nobody_asked_for_the_gpu_that_torch_cannot_use(foreign_gpu, gz, monkeypatch):
    """The CPU is used, which is told."""
    monkeypatch.setattr(launcher, "_tried_apart", lambda there: devices.tried())
    words = ("train", "vae", "--dry-run", "--json")
    code, said, messages = gz(*words)
    assert code == 0 and json.loads(said)["scale"] == "tiny" and json.loads(said)["gpus"] == 0
    assert "warning: torch cannot use the GPU on this machine: " in messages and "; using the CPU" in messages
    code, _, messages = gz(*words, "--cpu")
    assert code == 0 and "GPU" not in messages
    code, said, _ = gz(*words, "--gpus", "1")
    assert code == 0 and "1 GPU (torch cannot use" in json.loads(said)["needs"][0]
    with pytest.warns(UserWarning, match="using the CPU"):
        assert devices.pick_device(LaunchSection()).type == "cpu"


def test_a_card_that_is_too_new_is_named(monkeypatch):
    """The first GPUs that can be used are; one without free memory counts as one of them."""
    ones = torch.ones

    def on_a_gpu(*shape, device):
        if device == "cuda:0":
            raise RuntimeError("CUDA error: out of memory")
        if device == "cuda:2":
            raise RuntimeError("CUDA error: no kernel image is available for execution\nCompile with …")
        return ones(*shape)

    monkeypatch.setattr(devices, "count_gpus", lambda: 3)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"card {i}")
    monkeypatch.setattr(torch, "ones", on_a_gpu)
    gpus = devices.tried()
    assert (gpus.there, gpus.usable) == (3, 2)
    fault = "CUDA error: no kernel image is available for execution"
    assert gpus.lack == f"torch can use 2 of the 3 GPUs on this machine: card 2: {fault}"
    monkeypatch.setattr(launcher, "usable_gpus", lambda: gpus)
    assert launcher.plan(LaunchSection(), every_gpu=True).note.endswith("; using 2 GPUs")
    assert launcher.plan(LaunchSection(), every_gpu=False).note is None
    assert launcher.plan(LaunchSection(gpus="all"), every_gpu=True).gpus == 2
    with pytest.raises(DeviceError, match="`--gpus 3`: torch can use 2 of the 3"):
        launcher.plan(LaunchSection(gpus=3), every_gpu=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,5,6")
    assert devices.tried().why == "it sees 1 (`CUDA_VISIBLE_DEVICES=0,5,6`)"


def test_that_gpus_can_be_used_is_remembered(home, tmp_path, monkeypatch):
    """For the driver and the torch that are here; what cannot be used is tried each time."""
    tries, answers = [], [devices.Gpus(2, 0, "no driver"), devices.Gpus(2, 2)]
    monkeypatch.setattr(launcher, "count_gpus", lambda: 2)
    monkeypatch.setattr(launcher, "_tried_apart", lambda there: tries.append(there) or answers.pop(0))
    monkeypatch.setattr(launcher, "DRIVER", tmp_path / "version")
    (tmp_path / "version").write_text("580")
    for usable, times in ((0, 1), (2, 2), (2, 2)):
        launcher._usable.cache_clear()
        assert (launcher.usable_gpus().usable, len(tries)) == (usable, times)
    launcher._usable.cache_clear()


def test_fewer_steps_than_a_resumed_run_was_to_have_are_announced(home):
    """It has none yet; fewer than are done are refused."""
    run, said = runs.create("vae", "digits"), []
    write_run(run, planning.ask("vae", "digits", (), {"train.steps": 100}).recipe, Plan(threads=1))
    for steps in (100, 200, 50):
        request = planning.ask(run.id, None, (), {"train.steps": steps}, resume=True)
        planning.Start(request, Plan(threads=1), run).recipe(say=said.append)
    assert [text for text in said if "steps" in text] == [
        "`train.steps` becomes 50 instead of 100: the run ends earlier"
    ]
    run.update(step=60)
    with pytest.raises(UsageError, match="has done 60, 50 requested"):
        planning.Start(request, Plan(threads=1), run).recipe()


LINES = [  # what is typed, and the planned steps then
    ({}, (), 12),
    ({"train.steps": 12}, (), 12),
    ({}, ("train.steps=12",), 12),
    ({"train.minutes": 0.1}, (), 12),
    ({"train.steps": 9}, (), 9),
    ({"train.steps": 16}, (), 16),
    ({}, ("train.steps=16",), 16),
]


@pytest.mark.parametrize(("flags", "sets", "steps"), LINES)
def test_only_more_steps_extend_a_run_that_patience_ended(flags, sets, steps, home, monkeypatch):
    """A run of 12 steps that ended at step 8, by its own line again and by others."""
    run = runs.create("vae", "digits", alias="mine")
    write_run(run, planning.ask("vae", "digits", (), {"train.steps": 12, "launch.cpu": True}).recipe, Plan())
    run.update(state="finished", step=8, steps=12, ended_by_patience=8)
    monkeypatch.setattr(launcher, "run", lambda *words, **options: {})
    request = planning.ask("vae", "digits", sets, {**flags, "launch.cpu": True})
    if sets or "train.steps" in flags:  # without its name
        assert (
            planning.prepare(request, requeue=True).run == planning.prepare(request, resume=True).run == run
        )
    start = planning.prepare(request, requeue=True, alias="mine")
    start.train(start.recipe())
    assert (start.run, run.tree()["train"]["steps"]) == (run, steps)
    assert run.ended_by_patience == (None if steps > 12 else 8)


def test_a_length_of_a_finished_stage_is_refused(home):
    """A later stage was trained on it as it is."""
    run = runs.create("vqvae", "digits")
    write_run(run, planning.ask("vqvae", "digits", (), {"train.steps": 12}).recipe, Plan())
    run.stage("tokenizer").update(state="finished", step=12)
    for stage, refused in (("prior", False), ("tokenizer", True)):
        request = planning.ask(run.id, None, (f"stages.{stage}.train.steps=16",), {}, resume=True)
        with pytest.raises(UsageError, match="12 in the run, 16") if refused else contextlib.nullcontext():
            recipe = planning.continued(run, request.recipe)
            assert [part.train.steps for part in recipe.parts] == [12, 16]
