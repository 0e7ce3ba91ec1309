"""Processes: two against one, signals, kills, the launcher. Every engine here is a real child process."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import two_ranks
from helpers import figures, lines, recipe, run_at, same, spawn, traps
from refused import refused
from safetensors.torch import load_file
from zoo import FIRST, Case, first_of_families, one_a_family

from gzcli.core import devices
from gzcli.core.errors import DeviceError
from gzcli.core.sections import LaunchSection
from gzcli.docs.text import DOCS_FOLDER as DOCS
from gzcli.launch import launcher
from gzcli.models import catalog
from gzcli.recipe.yaml import dump
from gzcli.store import files, runs
from gzcli.store.paths import recipe_names
from gzcli.store.runs import Run

LONG = ("--set", "train.sample_every=0", "--set", "train.eval_every=0", "--set", "train.best=none", "--cpu")
# of a training: wgan's generator learns at its fifth; one of Stable Diffusion takes .4 seconds in float64
STEPS, DIFFUSERS_STEPS = 6, 2
PATIENCE = 240  # seconds for what takes a few on a machine that does nothing else
ADAPTIVE = {"augment": ("cutout",), "ada": 0.95, "lecam": 0.1}
# what looks at a whole batch: batch norm, also under a penalty on a gradient, means of outputs, a full pool,
# codes that are means of inputs
WHOLE_BATCH = {
    "dcgan": {"norm": "batch", "disc_norm": "batch", "spectral": False, "r1": 1.0, "r1_every": 2} | ADAPTIVE,
    "cyclegan": {"pool": 8},
    "vqvae": {},
}

ALONE = [name for name, case in FIRST.items() if not case.stages]
# of its family the one that is tested each time: what looks at a whole batch in more ways comes first
ALONE.sort(key=lambda name: [*WHOLE_BATCH, name].index(name))


def changed(model: str, **options: Any) -> Case:
    """A model's zoo line with other options."""
    return replace(FIRST[model], options={**FIRST[model].options, **options})


def steps_of(case: Case) -> int:
    return DIFFUSERS_STEPS if catalog.card(case.model).family == "stable_diffusion" else STEPS


FEW = ("data.size=16", "data.n=200", "train.checkpoint_every=0")


def written(case: Case, tree: dict[str, Any]) -> Run:
    """A run of a recipe, to be trained."""
    run = runs.create(case.model, case.data)
    files.write_atomic(run.path / "run.yaml", dump(tree))
    return run


def planned(case: Case) -> dict[str, Any]:
    """With validation but for the GANs, whose figures need a classifier."""
    steps = steps_of(case)
    sets = (f"train.checkpoint_every={steps // 2}", "train.keep=3") if "dropout" in case.options else ()
    if catalog.load(case.model).best != "fd":
        sets += ("train.best=auto", f"train.eval_every={steps // 2}")
    return recipe(case, steps=steps, sets=(*FEW, *sets))


SHARED = "train.ema=0.9 train.clip=0.3 train.eval_every=3 train.checkpoint_every=3 optim.warmup=0"
SHARED += " train.ema_snapshots=2 train.best=loss train.keep=3"
SHARING = {  # with FSDP2, as processes are dear, Muon
    "ddp": ("launch.strategy=ddp",),
    "fsdp": ("launch.strategy=fsdp", "train.accumulate=2"),
    "muon": ("optim.name=muon",),
}


@pytest.fixture(scope="module")
def ranks(request, forks):
    """ranks(key, world): of a run its losses, figures of validation, the largest difference between the
    ranks' states, and where it is. The key is the `repr` of a case, or a model and how its weights are shared
    out. The first that asks has all trained that are to be tested: a start costs more than many a training.
    Those with dropout or FSDP lose their last checkpoint and go on."""
    mine = [x for x in request.session.items if x.module is request.module and "ranks" in x.fixturenames]
    cases = [x.callspec.params["case"] for x in mine if "case" in x.callspec.params]
    models = [x.callspec.params["model"] for x in mine if "model" in x.callspec.params]
    results: dict[int, dict[str, dict]] = {}

    def trained(key: str, world: int) -> dict:
        if not results:
            trees = [(case, planned(case)) for case in cases]
            started = {n: {repr(case): written(case, tree) for case, tree in trees} for n in (1, 2)}
            dropout = [repr(case) for case in cases if "dropout" in case.options]
            again = {n: [by_key[key] for key in dropout] for n, by_key in started.items()}
            for model in models:
                for name, sets in SHARING.items():
                    tree = recipe(FIRST[model], steps=6, sets=(*FEW, *SHARED.split(), *sets))
                    started[2][f"{model} {name}"] = written(FIRST[model], tree)
                again[2].append(started[2][f"{model} fsdp"])
            every = {n: [*by_key.values(), *again[n]] for n, by_key in started.items()}
            forks.train(two_ranks.folders_of(every))
            for n, by_key in started.items():
                results[n] = {key: two_ranks.out_of(run) | {"run": run} for key, run in by_key.items()}
        return results[world][key]

    return trained


# What Stable Diffusion has beside the rest, captions and prepared texts, are shared out in `test_batches` and
# `test_stages`; each of its three processes takes as long as all others together.
TWO = one_a_family((changed(name, **WHOLE_BATCH.get(name, {})) for name in ALONE), but=["stable_diffusion"])


@pytest.mark.parametrize("case", TWO)
def test_two_processes_are_one(case, ranks):
    one, two = (ranks(repr(case), world) for world in (1, 2))
    assert two["gap"] == 0
    assert len(one["losses"]) == len(two["losses"]) == steps_of(case)
    for a, b in zip(one["losses"], two["losses"], strict=True):
        assert a == pytest.approx(b, rel=1e-9, abs=1e-9)
    assert two["held_out"] == pytest.approx(one["held_out"], rel=1e-9, abs=1e-9)
    assert len(one["held_out"]) == (0 if catalog.load(case.model).best == "fd" else 2)


@pytest.mark.parametrize(
    "case",
    [changed("ddpm", dropout=0.1), pytest.param(changed("flowpp", dropout=0.2), marks=pytest.mark.slow)],
    ids=str,
)
def test_with_dropout_two_processes_have_the_same_weights_and_resume(case, ranks):
    """Each drops out what it likes, so they are not one; what they drew is drawn again by a resume."""
    one, two = (ranks(repr(case), world) for world in (1, 2))
    assert one["losses"][-1] != pytest.approx(two["losses"][-1], rel=1e-7)
    for row in (one, two):
        assert row["gap"] == 0 and len(row["losses"]) == steps_of(case)
        first, resumed = (load_file(row["run"].path / f"{name}.safetensors") for name in ("first", "model"))
        assert same(first, resumed)


@pytest.mark.parametrize("model", ["dit", pytest.param("instructpix2pix", marks=pytest.mark.slow)])
def test_weights_that_are_shared_out_are_those_of_ddp(model, ranks):
    """FSDP2 beside DDP, with a global norm that is clipped; it resumes, and saves whole weights."""
    ddp, fsdp, muon = (ranks(f"{model} {name}", 2) for name in SHARING)
    assert ddp["gap"] == fsdp["gap"] == muon["gap"] == 0
    assert len(ddp["losses"]) == 6
    for a, b in zip(ddp["losses"], fsdp["losses"], strict=True):
        assert a == pytest.approx(b, rel=1e-9, abs=1e-9)
    assert fsdp["held_out"] == pytest.approx(ddp["held_out"], rel=1e-9, abs=1e-9)
    assert muon["losses"][-1] != pytest.approx(ddp["losses"][-1], rel=1e-4)
    saved = ((ddp, "model"), (fsdp, "first"), (fsdp, "model"))
    whole, first, resumed = (load_file(result["run"].path / f"{name}.safetensors") for result, name in saved)
    assert whole.keys() == first.keys() == resumed.keys()
    for key in whole:
        assert whole[key].shape == first[key].shape
        assert torch.allclose(whole[key], first[key], rtol=1e-7, atol=1e-9), key
        assert torch.equal(first[key], resumed[key]), key
    ours, theirs = (
        load_file(result["run"].snapshots_folder / "00000006.safetensors") for result in (ddp, fsdp)
    )
    for key in ours | theirs:
        assert torch.allclose(ours[key], theirs[key], rtol=1e-7, atol=1e-9), key
    states = [torch.load(result["run"].path / "checkpoints/00000006/train.pt") for result in (ddp, fsdp)]
    a, b = (train["optimizers"]["main"]["state"] for train in states)
    assert all(a[i]["exp_avg"].shape == b[i]["exp_avg"].shape for i in a), "whole moments, for any strategy"


SAME = 1e-6  # the largest difference of a weight in double precision
DIFFERENT = re.compile(
    r"After 30 steps of `([^`]+)`(?: with `([^`]+)`)?( in fp32)?, weights differ by at most ([\d.]*\d)"
)


@pytest.mark.slow
@pytest.mark.launch
def test_two_processes_train_recipes_to_the_weights_of_one():
    """A recipe of each family, all stages, as they are shipped but for the length and the batch; the page on
    GPUs names exceptions. `two_ranks.py --all` measures every recipe."""
    page = " ".join((DOCS / "pages" / "gpus.md").read_text().split())
    rows = DIFFERENT.findall(page)
    exceptions = {",".join(filter(None, words)): (bool(fp32), float(most)) for *words, fp32, most in rows}
    assert len(exceptions) == 3
    wide = {name for name, (fp32, _) in exceptions.items() if not fp32}
    families = first_of_families(recipe_names())
    apart = farthest({*families, "dcgan,model.disc_norm=batch", *wide})
    differences = {name: apart.pop(name) for name in wide} | farthest(set(exceptions) - wide, fp32=True)
    assert {name: far for name, far in apart.items() if far > SAME} == {}
    assert len(apart) == len(families) + 1
    for name, far in differences.items():
        assert SAME < far <= exceptions[name][1], (name, far)
    (far,) = farthest({"glow,optim.eps=0.1"}, fp32=True).values()
    assert far <= 1e-4, "the page on GPUs"


def farthest(names: Iterable[str], *, fp32: bool = False) -> dict[str, float]:
    """The largest difference of a weight between one process and two, after 30 steps of each recipe."""
    distances = {}
    for name, pair in two_ranks.pairs(names, steps=30, batch=8, fp32=fp32).items():
        rows = list(two_ranks.apart(*pair))
        assert all(row["gap"] == 0 for row in rows), name
        distances[name] = max(row["weights"] for row in rows)
    return distances


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]


def family(child: subprocess.Popen) -> list[psutil.Process]:
    """gz, the launcher of several processes, the engine's processes."""
    return [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]


@pytest.mark.launch
@pytest.mark.parametrize(
    ("signum", "whom", "more"),
    [
        (signal.SIGINT, slice(0, 1), ()),  # Ctrl-C
        # a scheduler tells all processes
        pytest.param(signal.SIGTERM, slice(None), (), marks=pytest.mark.slow),
        (signal.SIGTERM, slice(1, 2), ("--processes", "2")),  # somebody ends the launcher
    ],
    ids=["gz", "all", "launcher of two"],
)
def test_a_signal_saves_a_checkpoint_and_leaves_no_process(signum, whom, more, home):
    child = spawn("train", "vae", "--steps", "100000", *LONG, "--set", "train.log_every=1", *more)
    run = run_at(5)
    everyone = family(child)
    assert len(everyone) == (4 if more else 2)
    assert run.status()["pid"] in [process.pid for process in everyone]
    for process in everyone[whom]:
        process.send_signal(signum)
    err = child.communicate(timeout=PATIENCE)[1]
    assert child.returncode == 128 + signum, err
    assert "checkpoint saved" in err and "--resume" in err
    assert run.state == "interrupted"
    (saved,) = (run.path / "checkpoints").glob("0*")
    assert files.read_json(saved / "meta.json")["world"] == len(everyone) // 2
    # no step is lost
    assert int(saved.name) == run.status()["step"] == lines(run.path / "metrics.jsonl")[-1]["step"]
    assert not any(alive(process.pid) for process in everyone)


@pytest.mark.slow
@pytest.mark.launch
def test_a_rank_that_does_not_answer_is_named(home):
    """The others end soon after `launch.timeout`, and no process is left, not even the stopped one."""
    more = ("--processes", "2", "--set", "launch.timeout=0.1")
    child = spawn("train", "vae", "--steps", "100000", *LONG, *more)
    run = run_at(5)
    everyone = family(child)
    stalled = next(p for p in everyone if p.environ().get("RANK") == "1")
    stalled.suspend()
    err = child.communicate(timeout=PATIENCE)[1]
    assert child.returncode == 4 and f"rank 1 (process {stalled.pid}) did not respond" in err
    assert run.state == "failed" and run.checkpoints == [] and not any(alive(p.pid) for p in everyone)


@pytest.mark.launch
@pytest.mark.parametrize("model", ["vae", pytest.param("wgan", marks=pytest.mark.slow)])
def test_kill_9_and_resume_is_the_unbroken_run(model, home, forks, tmp_path):
    every = ("--set", "train.log_every=7", "--set", "train.checkpoint_every=20")
    words = ["train", model, "--steps", "160", *LONG, *every, "--set", "launch.threads=1"]
    child = spawn(*words)
    run = run_at(45 // 7)
    os.kill(run.status()["pid"], signal.SIGKILL)
    err = child.communicate(timeout=PATIENCE)[1]
    killed = "was killed (SIGKILL), most likely because memory ran out; the last checkpoint is at"
    assert child.returncode == 4 and killed in err
    assert f"gz train {run.id} --resume" in err and "Traceback" not in err
    assert run.state == "failed"
    forks.gz(*words, "--resume")
    assert run.state == "finished"
    # the unbroken one, whose reader has seen enough after a line
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["head", "-n", "1", str(pipe)], stdout=subprocess.PIPE, text=True)
    where = {"home": os.environ["GZ_HOME"], "here": str(traps()), "said": str(pipe)}
    forks.code_of(words=[*words, "--name", "whole"], env=dict(os.environ), **where)
    assert reader.communicate(timeout=PATIENCE)[0].count("\n") == 1
    whole = runs.by_name("whole")
    a, b = (load_file(r.path / "model.safetensors") for r in (run, whole))
    assert same(a, b) and figures(run) == figures(whole)


def test_two_processes_do_all_that_a_run_does_beside_its_steps(forks):
    """Grids, `fd`, the best checkpoint."""
    words = "train wgan --steps 20 --cpu --processes 2 --set train.log_every=5 --json"
    events = [json.loads(line) for line in forks.gz(*words.split()).stdout.splitlines()]
    assert events[0]["event"] == "start" and events[-1]["event"] == "done"
    assert any("val_fd" in event for event in events)
    run = Run(Path(events[-1]["path"]))
    assert files.read_json(run.path / "env.json")["processes"] == 2
    assert files.read_json(run.checkpoints[-1] / "meta.json")["world"] == 2


def test_gpus_threads_and_machines_of_a_plan(monkeypatch):
    """`CUDA_VISIBLE_DEVICES=0` on a machine without GPUs: a training takes the CPU."""
    cases = (("0", 0, 0), ("0,1", 1, 1), ("GPU-a,GPU-b", 8, 2), ("-1", 8, 0), ("", 8, 0))
    for visible, there, count in cases:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setattr(devices, "installed_gpus", lambda there=there: there)
        monkeypatch.setattr(devices, "OTHER_GPUS", ())
        assert devices.count_gpus() == count
    assert launcher.plan(LaunchSection(), every_gpu=True).gpus == 0
    refused(r"--gpus 2.*no GPU", launcher.plan, LaunchSection(gpus=2), every_gpu=True, error=DeviceError)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert launcher.plan(LaunchSection(), every_gpu=True).threads == 8
    assert launcher.plan(LaunchSection(cpu=True, processes=4), every_gpu=True).threads == 2
    monkeypatch.setattr(launcher, "usable_gpus", lambda: devices.Gpus(2, 2))
    section = LaunchSection(machines=2, machine_rank=1, main_ip="10.0.0.1", main_port=29501)
    text = launcher.config(launcher.plan(section, every_gpu=True)).splitlines()
    expected = {"num_processes: 4", "num_machines: 2", "machine_rank: 1"}
    assert expected | {"main_process_ip: 10.0.0.1", "main_process_port: 29501"} <= set(text)
