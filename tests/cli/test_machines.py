"""Where several machines meet, and jobs for SLURM, whose programs are small scripts here."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from gzcli.core.errors import MissingError, UsageError
from gzcli.core.sections import LaunchSection
from gzcli.launch import launcher, slurm
from gzcli.launch import plan as planning
from gzcli.launch.plan import PATIENCE, made_by_machine_0
from gzcli.store import runs

pytestmark = pytest.mark.usefixtures("home")

TWO = LaunchSection(machines=2, machine_rank=0, main_ip="10.0.0.1", cpu=True)


# ---------------------------------------------------------------------------- ports


def port(section: LaunchSection = TWO, job: str = "vae mnist") -> int | None:
    return launcher.plan(section, every_gpu=True, job=job).main_port


def test_the_port_follows_from_the_job(monkeypatch):
    assert port() == port(replace(TWO, machine_rank=1)), "all machines know it"
    others = {port(job=f"vae {i}") for i in range(20)}
    assert len(others) > 15 and all(20_000 <= p < 30_000 for p in others if p)
    assert port(replace(TWO, main_port=1234)) == 1234
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    first = port()
    assert first == port(job="glow"), "what was typed does not matter to SLURM's number"
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    assert port() != first
    assert launcher.plan(LaunchSection(cpu=True, processes=2), every_gpu=True).main_port is None


def test_machines_that_are_not_there():
    for section, text in (
        (LaunchSection(machines=2, machine_rank=2, main_ip="a"), "numbered from 0"),
        (LaunchSection(machine_rank=1, main_ip="a"), "numbered from 0"),
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


# ---------------------------------------------------------------------------- one run


def test_other_machines_wait_for_the_run_of_machine_0(home):
    """One of another job, one of an earlier start and one that has ended are none."""
    lines: list[str] = []
    first, second = (launcher.plan(replace(TWO, machine_rank=r), every_gpu=True, job="vae") for r in (0, 1))
    assert first.job == second.job != launcher.plan(TWO, every_gpu=True, job="wgan").job
    now = time.time()
    for state, job, launched in (
        ("planned", "another", now),
        ("planned", first.job, now - 2 * PATIENCE),
        ("killed", first.job, now),
    ):
        runs.create("vae", "digits").update(state=state, job=job, launched=launched)
    with pytest.raises(MissingError, match="machine 0 has made no run") as caught:
        made_by_machine_0(second, lines.append, patience=0.1)
    assert "`GZ_HOME`" in (caught.value.hint or "") and "waiting for the run" in lines[0]
    run = runs.create("vae", "digits")
    later = threading.Timer(0.2, lambda: run.update(state="planned", job=first.job, launched=time.time()))
    later.start()
    assert made_by_machine_0(second, lines.append, patience=20) == run


def test_the_interface_of_an_address():
    assert launcher.interface_to("127.0.0.1") == "lo"
    assert launcher.interface_to("no.such.host.example") is None


# ---------------------------------------------------------------------------- SLURM


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
    assert code == 3 and "there is no `sbatch`" in stderr
    fake("sbatch", "echo 'invalid partition' >&2; exit 1")
    for more, expected, told in (((), 3, "invalid partition"), (("--gpus", "all"), 2, "wants a number")):
        code, _, stderr = gz(*words, *more)
        assert code == expected and told in stderr
    for wrong in ("Partition", "a b=c", 'comment=a"b', "time=1\n#SBATCH --uid=0"):
        with pytest.raises(UsageError, match="no option of `sbatch`"):
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
    path.write_text(slurm.script(job, {}, program=["gz"], folder=tmp_path))
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
        own = ["--submit", "slurm", "--seed", "7", "--slurm", "time=1:00:00"]
        assert gz(*words.split(), *own)[:2] == (0, "job 42\n")
        script = (tmp_path / "got").read_text()
        line = f"gzcli {words.partition(' --slurm')[0]} --seed {seed} &\n"
        assert line in script and 'srun --kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS' in script
        assert "#SBATCH --time=1:00:00\n" in script and ("#SBATCH --signal=" in script) == goes_on
        assert ("--gres=gpu:2\n" in script) == ("--gpus" in words)
        assert f"#SBATCH --job-name={words.split()[0]}-" in script
    assert not Path("drawn").exists() and not (home / "bench").exists()
    for words, code in (("ood pretrained:vae --out nosuch", 2), ("sample glow", 3), ("bench --budget 9s", 2)):
        assert gz(*words.split(), "--submit", "slurm")[0] == code, "what is wrong is told before"


def test_no_script_holds_what_cannot_be_printed(fake, gz, tmp_path, monkeypatch):
    """The name of a folder could bring lines of its own into a job script, or into that of a league."""
    fake("sbatch", f"touch {tmp_path}/got; echo 42")
    plain = ["train", "vae", "--submit", "slurm"]
    league = ["bench", "--train-missing", "--budget", "9s", "--models", "vae", "--data", "digits", "--cpu"]
    for folder, store, words, told in (
        ("a\n#SBATCH --uid=0\ntouch PWNED", "home", plain, "characters that cannot be printed"),
        ('a"b', "home", plain, "cannot be told"),
        ("a\nb", "home", league, "cannot be printed"),
        ("ok", "home\nb", plain, "cannot be printed"),
        ("ok", "home", [*plain, "--set", "about=a\nb"], "the word 'about=a\\nb' holds"),
        ("a\udcff", "home", plain, "cannot be printed"),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        monkeypatch.setenv("GZ_HOME", str(tmp_path / store))
        code, _, stderr = gz(*words)
        assert code == 2 and told in stderr, words
        assert not list(tmp_path.glob("**/*.sh"))
    assert not (tmp_path / "got").exists()
    monkeypatch.chdir(tmp_path)
    job, folder = slurm.Job(["train"], "a", 0, 0, 2), tmp_path / "it's 100%j"
    text = slurm.script(job, {}, program=["gz"], folder=folder)
    assert f'#SBATCH --output="{tmp_path}/it\'s 100%%j/%x-%j.out"\n' in text


def test_a_start_is_of_a_new_run_or_one_that_goes_on(home):
    """Jobs side by side have runs of one model; each goes on with its own. Machine 0 decides for others."""
    request = planning.ask("vae", None, (), {"launch.cpu": True})
    with pytest.raises(MissingError, match="no unfinished run of `vae` on `digits`"):
        planning.prepare(request, resume=True)
    mine, other = (runs.create("vae", "digits", alias=f"mine-{i}") for i in (1, 2))
    for run in (mine, other):
        run.recipe_file.write_text("model: {name: vae}\nlaunch: {cpu: true, processes: 2}\n")
        run.update(state="interrupted")
    start = planning.prepare(request, resume=True)
    assert (start.run, start.plan.processes) == (other, 2)
    assert planning.prepare(request, requeue=True, alias="mine-1").run == mine
    assert planning.prepare(request, requeue=True, alias="mine-3").run is None
    with pytest.raises(UsageError, match="the name `mine-1` is taken"):
        planning.prepare(request, alias="mine-1")
    several = {"machines": 2, "machine_rank": 1, "main_ip": "10.0.0.1", "cpu": True}
    joined = planning.ask("vae", None, (), {f"launch.{key}": value for key, value in several.items()})
    assert planning.prepare(joined, resume=True).run is None
