"""`gz train --dry-run` and the start of a run: memory, and what a model needs of its data, told before
anything is launched."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from pictures import RED, png, write

from gzcli import launch, models, requirements
from gzcli.cli import app
from gzcli.errors import MissingError, UsageError
from gzcli.models import catalog
from gzcli.parts import Part
from gzcli.recipe.needs import check_data
from gzcli.recipe.resolve import resolve
from gzcli.sections import OptimSection, TrainSection
from gzcli.store import runs
from gzcli.store.paths import recipe_names

PLAN = """
def memory_plan(part):
    each = part.train.batch_size // part.train.accumulate // part.launch.processes
    return [("weights", 3_000_000_000), ("activations", each * 100_000_000)]
"""


@pytest.fixture
def gz(home, capsys):
    """gz("train", "vae") → (exit code, stdout, stderr)"""

    def call(*words: str) -> tuple[int, str, str]:
        code = app.run(list(words))
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """The family of `vae` can tell of its memory: planned(text of its plan.py)."""
    folder = tmp_path / "models" / "heavy"
    folder.mkdir(parents=True)
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(folder.parent)])

    def write(text: str = PLAN) -> None:
        (folder / "plan.py").write_text(text)
        monkeypatch.delitem(__import__("sys").modules, "gzcli.models.heavy.plan", raising=False)
        card, known = replace(catalog.card("vae"), family="heavy"), catalog.card
        monkeypatch.setattr(catalog, "card", lambda name: card if name == "vae" else known(name))
        monkeypatch.setattr(catalog, "ROOT", folder.parent)

    return write


# --- memory ---


def test_memory_is_planned_where_the_family_can_tell(gz, planned, monkeypatch):
    monkeypatch.setattr(requirements, "host_memory", lambda: 8_000_000_000)
    code, stdout, _ = gz("train", "vae", "--dry-run")
    assert code == 0 and "memory" not in [line.split(" ")[0] for line in stdout.splitlines()]
    planned()
    code, stdout, stderr = gz("train", "vae", "--dry-run", "--cpu", "--set", "train.batch_size=32")
    assert (
        code == 0
        and "memory     vae: 6.2 GB a process = weights 3.0 GB + activations 3.2 GB\n" in stdout
        and "fit" not in stderr
    )
    code, stdout, _ = gz("train", "vae", "--dry-run", "--cpu", "--set", "train.batch_size=32", "--json")
    parts = [{"what": "weights", "bytes": 3_000_000_000}, {"what": "activations", "bytes": 3_200_000_000}]
    assert json.loads(stdout)["memory"] == [{"model": "vae", "bytes": 6_200_000_000, "parts": parts}]
    planned('def memory_plan(part): return [("weights", 2_000), ("total", 2_000)]')
    assert "memory     vae: 2 kB a process = weights 2 kB\n" in gz("train", "vae", "--dry-run")[1]


def test_a_hint_where_it_does_not_fit(gz, planned, monkeypatch):
    planned()
    monkeypatch.setattr(requirements, "host_memory", lambda: 8_000_000_000)
    words = ("train", "vae", "--dry-run", "--set", "train.batch_size=64")
    code, _, stderr = gz(*words, "--cpu")
    assert code == 0 and "`vae` may not fit: this machine has 8.0 GB for each process" in stderr
    assert "`--set train.accumulate=2`" in stderr
    assert "fit" not in gz(*words, "--cpu", "--set", "train.accumulate=2")[2]
    assert "4.0 GB for each process" in gz(*words, "--cpu", "--processes", "2")[2]  # they share the machine
    monkeypatch.setattr(requirements, "gpu_memory", lambda: 6_000_000_000)
    assert "the GPU has 6.0 GB for each process" in gz(*words, "--gpus", "1")[2]
    assert "fit" not in gz(*words, "--gpus", "4")[2]  # each has a quarter of the batch
    monkeypatch.setattr(requirements, "gpu_memory", lambda: None)  # planned for absent ones
    assert "fit" not in gz(*words, "--gpus", "1")[2]


def test_ways_to_save_are_those_that_the_model_has():
    options = {"checkpointing": False, "cache": True, "dtype": "fp32"}
    part = Part("sd_lora", options, train=TrainSection(batch_size=9), optim=OptimSection(name="adamw"))
    own = ["`--set model.checkpointing=true`", "`--set model.dtype=bf16`"]
    accumulate = "`--set train.accumulate=3`"
    assert requirements.ways_to_save(part, launch.Plan()) == [*own, accumulate]
    adam = "`--set optim.name=adamw8bit`"
    assert requirements.ways_to_save(part, launch.Plan(gpus=3, processes=3)) == [*own, adam, accumulate]
    train = TrainSection(batch_size=8, accumulate=8)
    part = Part("vae", train=train, optim=OptimSection(name="sgd"))
    assert requirements.ways_to_save(part, launch.Plan(gpus=1)) == []


def test_what_it_would_take_to_tell_is_among_the_needs(gz, planned):
    planned(
        'from gzcli.errors import MissingError\ndef memory_plan(part): raise MissingError("the weights of '
        '`a/b` are not at hand")'
    )
    code, stdout, _ = gz("train", "vae", "--dry-run", "--json")
    found = json.loads(stdout)
    assert code == 0 and found["memory"] == [] and found["needs"] == ["the weights of `a/b` are not at hand"]


def test_it_is_shown_before_a_start_too(gz, planned, monkeypatch):
    planned()
    monkeypatch.setattr(requirements, "host_memory", lambda: 1_000_000_000)
    monkeypatch.setattr(launch, "run", lambda *args, **options: {})
    code, stdout, stderr = gz("train", "vae", "--cpu", "--set", "train.batch_size=32")
    assert (
        (code, stdout) == (0, "")
        and "memory: vae: 6.2 GB a process = " in stderr
        and "hint: `vae` may not fit" in stderr
    )
    assert "memory" not in gz("train", "vae", "--cpu", "-q")[2]


def test_stable_diffusion_plans_for_weights_that_are_absent(gz, tmp_path, monkeypatch):
    if "sd-lora" not in recipe_names():
        pytest.skip("needs the models of Stable Diffusion")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for base in ("stable-diffusion-v1-5/stable-diffusion-v1-5", "nobody/has-such-a-model"):
        words = (
            "train",
            "sd-lora",
            "--data",
            "digits-captioned",
            "--set",
            f"model.base={base}",
            "--dry-run",
            "--json",
        )
        code, stdout, stderr = gz(*words)
        assert code == 0, stdout + stderr
        found = json.loads(stdout)
        assert found["recipe"]["model"]["base"] == base and not runs.all_runs()
        if "v1-5" in base:
            assert found["memory"][0]["bytes"] > 2_000_000_000
        assert f"`hf download {base}`" in found["needs"]
    (tmp_path / "models--nobody--has-such-a-model" / "snapshots" / "0a1b").mkdir(parents=True)
    assert not [need for need in json.loads(gz(*words)[1])["needs"] if "hf download" in need]
    for folder in (str(tmp_path), "./no/folder"):
        assert "hf download" not in gz(*words[:-3], "--set", f"model.base={folder}", "--dry-run")[1]


SMI = """#!/bin/sh
echo "0, GPU-aaa, 81559
1, GPU-bbb, 24576
2, GPU-ccc, [N/A]"
"""


@pytest.mark.parametrize(
    ("visible", "mebibytes"),
    [(None, 24576), ("0", 81559), ("0,1", 24576), ("GPU-aaa", 81559), ("2", None), ("7", None)],
)
def test_the_memory_of_gpus_is_that_of_the_smallest_visible(tmp_path, monkeypatch, visible, mebibytes):
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert requirements.gpu_memory() == (mebibytes and mebibytes << 20)
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert requirements.gpu_memory() is None and requirements.host_memory() > 1 << 28


# --- what a model needs of its data ---


def needing(*needs: str):
    return replace(catalog.card("vae"), name="reader", needs=needs)


PART = Part("reader")


def test_a_set_that_has_it():
    check_data(PART, needing("caption"), (), "photos", ("caption",))
    check_data(PART, needing("caption", "before"), 10, "digits-edited", ("caption", "before"))
    check_data(PART, needing(), (), "photos")


@pytest.mark.parametrize(
    ("needs", "extras", "message", "sets"),
    [
        (
            ("caption",),
            (),
            "`reader` needs captions, and `photos` has none",
            "digits-captioned, digits-edited;",
        ),
        (
            ("caption", "before"),
            (),
            "`reader` needs captions and `before` pictures, and `photos` has none",
            ": digits-edited;",
        ),
        (
            ("caption", "before"),
            ("caption",),
            "`reader` needs `before` pictures, and `photos` has none",
            ": digits-edited;",
        ),
        (
            ("control",),
            ("caption", "before"),
            "`reader` needs `control` pictures, and `photos` has none",
            "none is shipped",
        ),
    ],
)
def test_a_set_that_lacks_it(needs, extras, message, sets):
    with pytest.raises(UsageError) as e:
        check_data(PART, needing(*needs), (), "photos", extras)
    assert e.value.message == message and sets in e.value.hint and "metadata.jsonl" in e.value.hint


@pytest.fixture
def reader(monkeypatch):
    """`vae` needs captions and images before an instruction."""
    card, known = replace(catalog.card("vae"), needs=("caption", "before")), catalog.card
    monkeypatch.setattr(catalog, "card", lambda name: card if name == "vae" else known(name))


def captioned(path: Path, *more: str) -> Path:
    rows = [{"file_name": f"{i}.png", "text": "a", **dict.fromkeys(more, "other.png")} for i in range(12)]
    files = {f"{i}.png": png(RED) for i in range(12)} | ({"other.png": png(RED)} if more else {})
    return write(path, {**files, "metadata.jsonl": "\n".join(map(json.dumps, rows)).encode()})


def test_refused_before_launch(gz, reader, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "run", lambda *args, **options: pytest.fail("launched"))
    for name in ("digits", "digits-captioned", "mnist"):
        for more in ((), ("--dry-run",)):
            code, _, stderr = gz("train", "vae", "--data", name, *more)
            assert (
                code == 2 and f"and `{name}` has none" in stderr and "sets that have: digits-edited" in stderr
            )
    assert gz("train", "vae", "--data", "digits-edited", "--dry-run")[0] == 0
    folder = str(captioned(tmp_path / "photos"))
    assert gz("train", "vae", "--data", folder, "--dry-run")[0] == 0  # it was never opened
    code, _, stderr = gz("train", "vae", "--data", folder)
    assert code == 2 and "`vae` needs `before` pictures, and `photos-" in stderr
    assert gz("train", "vae", "--data", folder, "--dry-run")[0] == 2  # its pack tells
    assert not runs.all_runs()
    whole = str(captioned(tmp_path / "triples", "before"))
    monkeypatch.setattr(launch, "run", lambda *args, **options: {})
    small = ("--set", "train.batch_size=2")
    assert gz("train", "vae", "--data", whole, *small)[0] == 0 and len(runs.all_runs()) == 1


def test_an_import_says_what_was_found(gz, tmp_path):
    folder = captioned(tmp_path / "triples", "before", "control")
    code, stdout, stderr = gz("data", "import", str(folder), "--name", "edits")
    assert (
        code == 0
        and stdout == "edits\n"
        and "; no classes; with captions and `before` pictures and `control` pictures\n" in stderr
    )
    rows = {row["name"]: row["extras"] for row in json.loads(gz("list", "data", "--json")[1])["data"]}
    assert rows["edits"] == ["caption", "before", "control"] and rows["digits-edited"] == [
        "caption",
        "before",
    ]
    assert "with each  captions and `before` pictures\n" in gz("data", "list", "--long")[1]


def test_a_dry_run_of_a_set_that_is_not_there(gz):
    code, stdout, _ = gz("train", "vae", "--data", "./nowhere", "--dry-run", "--json")
    assert code == 0 and json.loads(stdout)["needs"] == ["there is no `./nowhere`"]
    with pytest.raises(MissingError):
        from gzcli.data.open import peek

        peek("./nowhere")


def test_resolved_recipes_are_held_against_known_sets(reader):
    with pytest.raises(UsageError, match="needs captions and `before` pictures, and `digits` has none"):
        resolve("vae")
