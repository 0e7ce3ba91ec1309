"""A recipe or run of unknown origin starts no program; accelerate gets options of the command line alone."""

from __future__ import annotations

import json

from gzcli.launch import launcher
from gzcli.recipe.resolve import resolve
from gzcli.store import runs


def test_a_recipe_starts_no_program(call, tmp_path, monkeypatch):
    recipe = tmp_path / "evil.yaml"
    recipe.write_text("extends: vae\nlaunch:\n  extra: [--no_python, touch, X]\n")
    code, _, stderr = call("train", str(recipe))
    assert code == 2 and f"{recipe}:3:3: `launch.extra` is for the command line alone" in stderr
    assert "after `--`" in stderr
    assert call("train", "vae", "--set", "launch.extra=[--no_python]")[0] == 2
    started = []
    monkeypatch.setattr(launcher, "run", lambda folder, plan, **options: started.append(plan))
    assert call("train", "vae", "--", "--gpu-ids=0", "--debug")[0] == 0
    assert started[0].extra == ("--gpu_ids", "0", "--debug")
    (run,) = runs.all_runs()
    assert "extra" not in run.tree()["launch"]
    text = run.recipe_file.read_text().replace("launch:\n", "launch:\n  extra: [--no_python, touch, X]\n")
    run.recipe_file.write_text(text)
    for words in (("train", run.id), ("train", run.id, "--resume"), ("train", "vae", "--resume")):
        call(*words)
        assert all(plan.extra == () for plan in started[1:])
    # older runs have the key, without a value
    run.recipe_file.write_text(text.replace("[--no_python, touch, X]", "[]"))
    assert resolve(str(run.recipe_file)).card.name == "vae"
    env = {"command": ["gz", "train", "vae", "--", "--debug"]}
    (run.path / "env.json").write_text(json.dumps(env))
    told = "note: it was started with `-- --debug`, which is not taken over"
    assert told in call("train", run.id, "--resume")[2]
    assert started[-1].extra == ()


def test_a_recipe_does_not_say_where_processes_meet(call, tmp_path, monkeypatch):
    """Processes unpickle what they receive at the address where they meet."""
    recipe = tmp_path / "evil.yaml"
    recipe.write_text("extends: vae\nlaunch: {machines: 2, machine_rank: 1, main_ip: evil.example}\n")
    code, _, stderr = call("train", str(recipe))
    keys = ("machines", "machine_rank", "main_ip")
    assert code == 2 and all(f"`launch.{key}` is for" in stderr for key in keys)
    started = []
    monkeypatch.setattr(launcher, "run", lambda folder, plan, **options: started.append(plan))
    typed = ("--num-machines", "2", "--machine-rank", "0", "--main-process-ip", "10.0.0.1")
    assert call("train", "vae", *typed)[0] == 0 and started[0].main_ip == "10.0.0.1"
    (run,) = runs.all_runs()
    assert run.tree()["launch"]["main_ip"] is None
    assert call("train", run.id)[0] == 0 and started[1].main_ip is None and started[1].machines == 1


REFUSED = [
    ("--no_python", "`--no_python` is not passed on", "these are: --debug"),
    ("--no_py", "`--no_py` is not passed on", "--gpu_ids"),  # argparse would complete it
    ("--config_file x.yaml", "`--config_file` is not passed on", "--gpu_ids"),
    ("--use_fsdp", "`--use_fsdp` is not passed on", "`--set launch.strategy=fsdp`"),
    ("--use-deepspeed", "`--use-deepspeed` is not passed on", "`--set launch.strategy=fsdp`"),
    ("-m x", "`-m` is not passed on", "--gpu_ids"),
    ("--debug evil.py", "`evil.py` is no option", "only options and their values"),
    ("--gpu_ids", "`--gpu_ids` needs a value", "accelerate launch --help"),
    ("--gpu_ids --debug", "`--gpu_ids` needs a value", "accelerate launch --help"),
    ("--debug=1", "`--debug` takes no value", "--debug"),
    ("--rdzv_backnd c10d", "`--rdzv_backnd` is not passed on", "--rdzv_backend"),
    ("--mixed_precision bf16", "`--mixed_precision` is not passed on", "--set train.precision=bf16"),
    ("--num-machines 2", "`--num-machines` is not passed on", "`--num-machines N`"),
]


def test_what_may_stand_after_the_dashes(call):
    for words, message, hint in REFUSED:
        code, stdout, stderr = call("train", "vae", "--dry-run", "--", *words.split())
        assert (code, stdout) == (2, "") and message in stderr, words
        assert hint in stderr.partition("hint:")[2], words
