"""`gz runs ema`: what a run serves after its training."""

import json
import math
import shutil

import pytest
from helpers import fit, in_process, lines, recipe
from refused import refused
from safetensors.torch import load_file, save_file
from zoo import FIRST

from gzcli.cli import app, out
from gzcli.cli.jobs import announce
from gzcli.engine.trained import load_trained
from gzcli.launch import launcher
from gzcli.store import files
from gzcli.store.claims import claimed

pytestmark = pytest.mark.usefixtures("undrawn")


def test_a_run_serves_the_average_that_validates_best_or_one_of_a_length(home, monkeypatch, capsys):
    """A flow with batch norms, whose statistics are found anew for each average."""
    monkeypatch.setattr(launcher, "run", in_process)
    monkeypatch.setattr("gzcli.engine.averages.TRIED_LENGTHS", (0.015, 0.05, 0.1))
    monkeypatch.setattr("gzcli.engine.validate.MAX_VALIDATION_IMAGES", 50)

    def ema(*words: str, code: int = 0) -> dict:
        assert app.run(["runs", "ema", run.id, "--json", *words]) == code
        return json.loads(capsys.readouterr().out)

    sets = ("train.ema=0.9", "train.ema_snapshots=6", "train.best=bpd", "train.eval_every=18", "data.n=200")
    tree = recipe(FIRST["realnvp"], steps=18, sets=sets)
    run = fit(tree).run
    run.update(state="finished")
    usual, (bpd,) = (
        load_file(run.model_file),
        [x["val_bpd"] for x in lines(run.metrics_file) if "val_bpd" in x],
    )
    with claimed(run):
        run.update(state="running")
        assert "the training ends" in ema(code=3)["error"]["hint"], "no second training"
        run.update(state="finished")
    result = ema()
    values = {row["length"]: row["value"] for row in result["rows"]}
    assert values[None] == pytest.approx(bpd, rel=1e-6)
    assert values.keys() == {None, 0.05, 0.1}, "six snapshots do not resolve 0.015"
    assert values[result["length"]] == min(values.values()) and result["length"] is not None
    assert run.status()["ema_length"] == result["length"]

    model, served = load_trained(run, "cpu").model, load_file(run.model_file)
    parameters = {name for name, _ in model.named_parameters()}
    statistics = [name for name in served.keys() - parameters if name.endswith("mean")]
    assert statistics and not any(served[name].equal(usual[name]) for name in statistics)
    assert ema("--length", "0.05")["length"] == 0.05
    out.configure(json=False)
    announce(run, run.id)
    assert "using the average of EMA length 0.05, made by `gz runs ema`" in capsys.readouterr().err
    snapshot, served = load_file(run.snapshots_folder / "00000018.safetensors"), load_file(run.model_file)
    for name in parameters:
        assert served[name].allclose(snapshot[f"0.05/{name}"], rtol=1e-5, atol=1e-7), name
    assert "0.25" in ema("--length", "0.3", code=2)["error"]["message"]
    assert "the error of its profile" in ema("--length", "0.01", code=2)["error"]["message"]
    fit(tree | {"train": tree["train"] | {"steps": 30}}, run)
    assert [int(path.stem) for path in sorted(run.snapshots_folder.iterdir())] == [15, 20, 25, 30]
    assert run.status()["ema_length"] is None


def test_what_has_no_average_or_no_snapshots_is_told(home, capsys):
    sets = ("train.ema=0", "train.ema_snapshots=6")
    refused("needs averaged weights", fit, recipe(FIRST["vae"], steps=2, sets=sets), hint="train.ema=0.999")
    run = fit(recipe(FIRST["vae"], steps=2, sets=("train.ema=0.9",))).run
    assert app.run(["runs", "ema", run.id]) == 3
    run.update(state="finished")
    assert app.run(["runs", "ema", run.id]) == 3
    text = capsys.readouterr().err
    assert "gz train vae --data digits --set train.ema_snapshots=20" in text and "no snapshots" in text


def test_a_damaged_or_foreign_snapshot_leaves_the_others_usable(home, monkeypatch, capsys):
    monkeypatch.setattr(launcher, "run", in_process)
    monkeypatch.setattr("gzcli.engine.validate.MAX_VALIDATION_IMAGES", 20)
    tree = recipe(FIRST["vae"], steps=12, sets=("train.ema=0.9", "train.ema_snapshots=6", "data.n=100"))
    run = fit(tree).run
    run.update(state="finished")
    folder, before = run.snapshots_folder, load_file(run.model_file)
    tensors = load_file(folder / "00000004.safetensors")
    name = next(name for name, value in tensors.items() if value.ndim > 1)
    facts = files.read_tensors(folder / "00000004.safetensors")[1]

    def ema(code: int = 0) -> str:
        assert app.run(["runs", "ema", run.id, "--length", "0.07", "--json"]) == code
        return capsys.readouterr().err

    def served() -> bool:
        return not all(value.equal(before[name]) for name, value in load_file(run.model_file).items())

    assert ema() == "" or "snapshot" not in ema()
    whole, place = load_file(run.model_file), folder / "00000004.safetensors"
    for fault in (
        {name: tensors[name] * math.nan},
        {name: tensors[name] * math.inf},
        {name: tensors[name][:1].clone()},
        {name: tensors[name] + 1e-3},
        {"0.07/more": tensors[name].clone()},
    ):
        save_file(tensors | fault, place, metadata=facts)
        said = ema()
        assert f"`{place}`" in said and "averaging the others" in said
        assert all(value.isfinite().all() for value in load_file(run.model_file).values()) and served()
    for text in (b"", place.read_bytes()[:-5], b"x" * 300):
        place.write_bytes(text)
        assert "averaging the others" in ema()
    shutil.copy(folder / "00000008.safetensors", place)  # of another step
    assert "it belongs to step 8" in ema()
    save_file(tensors, place)  # as they were written before
    ema()
    assert all(v.allclose(whole[name], atol=1e-6) for name, v in load_file(run.model_file).items())
    for strange in ("notes.txt", "best.safetensors", "4.safetensors", "-0000001.safetensors"):
        (folder / strange).write_text("strange")
    (folder / "00000003.safetensors").mkdir()
    assert "strange" not in ema()
    fit(tree | {"train": tree["train"] | {"steps": 18}}, run)  # which trims
    assert (folder / "notes.txt").exists() and (folder / "best.safetensors").exists()
    for path in folder.glob("0000*"):
        path.write_bytes(b"") if path.is_file() else path.rmdir()
    assert app.run(["runs", "ema", run.id, "--length", "0.07"]) == 3
    assert "no intact snapshot" in capsys.readouterr().err
