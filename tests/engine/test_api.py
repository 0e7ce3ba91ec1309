"""gz from Python, a weights file by itself, and a model from outside that is trained, sampled and kept."""

import ast
import gzip
import hashlib
import inspect
import json
import os
import re
import runpy
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, in_process
from PIL import Image
from refused import refused

import gzcli
from gzcli import testing
from gzcli.cli import app
from gzcli.core.errors import MissingError
from gzcli.core.hints import KEYWORDS, SHELL_ONLY
from gzcli.data.packs import stream
from gzcli.data.sets.registry import SPECS, DataFile
from gzcli.docs.page import texts
from gzcli.launch import launcher
from gzcli.league.call import league
from gzcli.models.vae.vae import VAE
from gzcli.store import model_files, runs
from gzcli.store.paths import cache_dir
from gzcli.store.png import FORMATS

TEMPLATE = Path(testing.__file__).parent / "template.py"
SMALL = {"model.net": "mlp", "model.hidden": (16,), "model.latent": 2, "train.best": "none"}


@pytest.fixture(scope="module", autouse=True)
def _home(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("GZ_HOME", str(tmp_path_factory.mktemp("api")))
    patch.setattr(model_files, "_typed", {})
    yield
    patch.undo()


@pytest.fixture(scope="module")
def run(_home) -> gzcli.Run:
    return gzcli.train("vae", data="digits", steps=20, seed=3, name="mine", cpu=True, set=SMALL, quiet=True)


def test_a_run_is_what_was_asked_for(run):
    part = run.trained.part
    assert (part.seed, part.train.steps, part.data.name) == (3, 20, "digits")
    assert part.options["hidden"] == [16] and isinstance(run.model, VAE) and not run.model.training
    assert run.id == runs.by_name("mine").id and run.path.is_dir()
    assert run.info.shape == (1, 16, 16) and "vae, 1×16×16, step 20" in repr(run)
    data = gzcli.open_data("digits")
    assert (data.name, data.shape, len(data.classes)) == ("digits", (1, 16, 16), 10)
    assert np.array_equal(data.images("val"), run.data.images("val")) and len(data.labels("val")) == 144
    assert "digits" in [row["name"] for row in gzcli.datasets()]
    assert gzcli.models()["vae"].family == "vae"
    images = np.array(run.data.images("test")[:2])
    for call, message in (
        (lambda: run.sample(2, stepz=3), "has no option `stepz`"),
        (lambda: run.sample(2, labels=[1]), "labels"),
        (lambda: run.sample(-1), "`n` must be 0 or more, not `-1`"),
        (lambda: run.sample(2, temperature=-1), "`temperature` must be 0 or more, not `-1`"),
        (lambda: run.score(images, "nonsense"), "no score `nonsense`"),
        (lambda: run.score(images, "recon", stepz=3), "has no option `stepz`"),
        (lambda: run.score(images, "iwae", k=0), "`k` must be 1 … 1,000,000, not `0`"),
        (lambda: run.log_prob(images, k=2.5), "`k` must be an integer, not `2.5`"),
        (lambda: run.log_prob(images[:, :, :8]), "images must be uint8"),
        (lambda: run.log_prob(images / 255.0), "images must be uint8"),
        (lambda: run.do("inpaint", images), "does not inpaint"),
        (lambda: run.do("reconstruct", images, mask=images[0, 0]), "takes no mask"),
        (lambda: gzcli.train("vae", steps=3, minutes=1), "cannot be used together"),
        (lambda: gzcli.load("nothing"), "no model or run"),
    ):
        refused(message, call)


def test_images_and_scores_are_those_of_the_command_line_and_the_model(run, forks, tmp_path):
    images = run.sample(6, seed=5, temperature=0.5)
    assert images.shape == (6, 1, 16, 16) and images.dtype == np.uint8
    assert np.array_equal(images[:2], run.sample(2, seed=5, temperature=0.5))
    assert not np.array_equal(images, run.sample(6, seed=6, temperature=0.5))
    words = f"sample mine -n 6 --seed 5 --temperature 0.5 --npz --cpu --json --out {tmp_path / 'out'}"
    made = json.loads(forks.gz(*words.split()).stdout)
    assert np.array_equal(np.load(made["npz"])["samples"], images.transpose(0, 2, 3, 1))
    images = np.array(run.data.images("test")[:150])
    log_probs = run.log_prob(images, seed=1)
    assert log_probs.shape == (150,) and log_probs.dtype == np.float64
    np.testing.assert_allclose(run.log_prob(images[:3], seed=1), log_probs[:3], rtol=1e-6)
    np.testing.assert_allclose(run.score(images, "nll", seed=1), -log_probs, rtol=1e-6)
    assert run.score(images, "recon").shape == (150,)
    assert run.score(images[:20], "typicality").shape == (20,), "which is fitted on validation images first"
    rebuilt = run.do("reconstruct", images[:4])
    assert rebuilt.shape == (4, 1, 16, 16) and rebuilt.dtype == np.uint8


def mnist_in_the_cache(monkeypatch) -> None:
    """A small `mnist` in its publisher's files, as if they had been fetched."""
    files = []
    for stem, n in (("train", 40), ("t10k", 10)):
        for kind, shape in (("images-idx3", (n, 28, 28)), ("labels-idx1", (n,))):
            data = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape) + bytes(int(np.prod(shape)))
            path = cache_dir("raw", "mnist") / f"{stem}-{kind}-ubyte.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(packed := gzip.compress(data))
            files.append(DataFile(path.name, (), len(packed), md5=hashlib.md5(packed).hexdigest()))
    monkeypatch.setitem(SPECS, "mnist", replace(SPECS["mnist"], files=tuple(files)))


@pytest.mark.parametrize(
    "text", [texts()["python"], (ROOT / "README.md").read_text()], ids=["page", "README"]
)
def test_a_snippet_runs_as_a_file(text, run, home, tmp_path, monkeypatch):
    """Without `if __name__ == "__main__"`: workers that pack a set do not run it again."""
    code, *_ = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    alone = f"import os\nassert os.getpid() == {os.getpid()}, 'run again'\n"
    script = tmp_path / "script.py"
    script.write_text(f'{alone}{code}gzcli.open_data("mnist", size=13)\n')
    mnist_in_the_cache(monkeypatch)
    monkeypatch.setattr(stream, "MAX_IMAGES_IN_PROCESS", 10)
    monkeypatch.setattr(stream, "cores", lambda: 2)
    monkeypatch.setattr(gzcli, "train", lambda *words, **options: run)
    main = sys.modules["__main__"]
    namespace = runpy.run_path(str(script), run_name="__main__")
    assert namespace["images"].shape == (16, 1, 16, 16) and sys.modules["__main__"] is main


def test_a_weights_file_samples_by_itself(run, forks, tmp_path):
    file = tmp_path / "w.safetensors"
    shutil.copy(run.path / "model.safetensors", file)
    assert np.array_equal(gzcli.load(file).sample(4), run.sample(4))
    assert gzcli.load(run.path / "model.safetensors").id == run.id, "in its folder it is that run's"
    words = f"sample {file} -n 4 --npz --cpu --json --out {tmp_path / 'out'}"
    made = json.loads(forks.gz(*words.split()).stdout)
    assert np.array_equal(np.load(made["npz"])["samples"].transpose(0, 3, 1, 2), run.sample(4))
    (tmp_path / "other.safetensors").write_bytes(b"12345678{}")
    with pytest.raises(MissingError, match=r"not a safetensors file|does not name its model"):
        gzcli.load(tmp_path / "other.safetensors")


def test_a_model_from_outside_is_a_model_like_any_other(forks, tmp_path, monkeypatch):
    file = tmp_path / "house.py"
    file.write_text(TEMPLATE.read_text().replace("hidden: int = 32", "hidden: int = 4"))
    (tmp_path / "house.yaml").write_text("train: {steps: 15, batch_size: 16, best: none}\n")
    monkeypatch.setattr(launcher, "run", in_process)  # `run` above is trained by a process of its own
    run = gzcli.train(str(file), cpu=True, quiet=True, set=["train.log_every=5"])
    assert (run.trained.part.train.steps, run.trained.part.options["hidden"]) == (15, 4)
    copy = run.path / "models" / "house.py"
    (noted,) = json.loads((run.path / "env.json").read_text())["models"]
    assert copy.read_text() == file.read_text() and noted["name"] == "house" and len(noted["sha256"]) == 64
    images = run.sample(2)
    file.write_text("nothing of it is left")
    monkeypatch.setattr(model_files, "_typed", {})
    again = gzcli.load("house")
    assert np.array_equal(again.sample(2), images), "the run goes by its own copy"
    elsewhere = shutil.copytree(run.path, tmp_path / "elsewhere")
    (elsewhere / "models" / "house.py").write_text(copy.read_text() + "\nraise SystemExit('a stranger')\n")
    for call in (lambda: gzcli.load(elsewhere), lambda: gzcli.train(str(elsewhere), cpu=True)):
        refused("includes a model file", call)
    assert forks.gz("sample", "house", "-n", "2", "--cpu", "-q").stdout.strip().endswith("grid.png")
    shutil.copy(run.path / "model.safetensors", tmp_path / "alone.safetensors")
    refused("`house`", gzcli.load, tmp_path / "alone.safetensors", error=MissingError)
    monkeypatch.setenv("GZ_MODELS", str(copy.parent))
    assert np.array_equal(gzcli.load(tmp_path / "alone.safetensors").sample(2), images)
    assert "house" in forks.gz("list", "models").stdout


def test_importing_gzcli_loads_next_to_nothing():
    code = "import sys, time; t = time.process_time(); import gzcli; took = time.process_time() - t; "
    code += (
        "gzcli.models(); print(took, *sorted({'torch', 'numpy', 'typer', 'yaml', 'rich'} & set(sys.modules)))"
    )
    took, *heavy = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()
    assert heavy == [] and float(took) < 0.03


def test_calls_of_the_page_are_calls_of_the_functions():
    """Of the verbs that compare, which would train for minutes."""
    blocks = re.findall(r"^```python\n(.*?)^```", texts()["python"], re.MULTILINE | re.DOTALL)
    (code,) = [block for block in blocks if "gzcli.league" in block]
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    functions = {
        "compare": gzcli.compare,
        "bench": gzcli.bench,
        "ood": gzcli.ood,
        "alarm": gzcli.alarm,
        "league": league,
        "which": gzcli.which,
        "sweep": gzcli.sweep,
    }
    assert {node.func.attr for node in calls} == {*functions} and callable(gzcli.league)
    for node in calls:
        options = {word.arg: None for word in node.keywords}
        inspect.signature(functions[node.func.attr]).bind(*node.args, **options)


def test_parts_alone_run_as_the_page_says_and_load_nothing_of_the_trainer():
    text = texts()["python"].partition("## Parts alone")[2]
    codes = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(codes) == 3
    ends = "assert tuple(samples.shape) == (8, 1, 28, 28) and loss > 0\n"
    ends += "assert 0 < distance < 2 and auroc > 0.9 and (p < 0.05).mean() > 0.9\n"
    loaded = "import sys\nprint(*{name.split('.')[1] for name in sys.modules if name.startswith('gzcli.')})\n"
    words = [sys.executable, "-c", "\n".join([*codes, ends, loaded])]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=240)
    assert done.returncode == 0, done.stderr
    assert not {"engine", "launch", "recipe", "cli", "judge", "api", "export"} & {*done.stdout.split()}


# verb → the functions that have its options
CALLS = {
    "ood": (gzcli.ood, gzcli.alarm),
    "sample": (gzcli.sample,),
    "bench": (gzcli.bench,),
    "league": (league,),
    "which": (gzcli.which,),
    "sweep": (gzcli.sweep,),
}


@pytest.mark.parametrize("verb", CALLS)
def test_a_call_has_the_options_of_its_verb(verb):
    """Under the same names, but those of the table KEYWORDS; those of SHELL_ONLY are of the shell alone. The
    flags of formats are items of `formats`."""
    params = app.build().commands[verb].params
    options = [param for param in params if param.param_type_name == "option" and not param.hidden]
    flags = [max(param.opts, key=len).lstrip("-").replace("-", "_") for param in options]
    names = {
        name
        for call in CALLS[verb]
        for name, parameter in inspect.signature(call).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    renamed = KEYWORDS | dict.fromkeys(FORMATS if verb == "sample" else (), "formats")
    shared = {renamed.get(flag, flag) for flag in flags if flag not in SHELL_ONLY}
    assert names - {"set", "what"} == shared - {"set"}


def test_samples_in_files_are_those_in_memory_and_are_drawn_again(run, tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "run", in_process)
    drawn = gzcli.sample("mine", n=4, seed=5, temperature=0.5, formats=["npz"], cpu=True, quiet=True)
    expected = run.sample(4, seed=5, temperature=0.5)
    np.testing.assert_array_equal(np.load(drawn.npz)["samples"].transpose(0, 3, 1, 2), expected)
    assert (drawn.run, drawn.n, len(drawn.files)) == (run.id, 4, 4) and drawn.grid.parent == drawn.folder
    again = gzcli.sample(like=drawn.files[2], out=tmp_path / "again", cpu=True, quiet=True)
    assert again.difference.most == 0 and again.folder == tmp_path / "again" and again.n == 4
    pictures = expected.save(tmp_path / "pictures")
    rebuilt = gzcli.sample("mine", do="reconstruct", input=pictures, n=4, cpu=True, quiet=True)
    assert rebuilt.n == 4 and drawn.difference is None
    for words, options, text in (
        ((), {}, "`gzcli.sample` needs a model"),
        (("mine",), {"temprature": 1}, "has no option `temprature`\nhint: did you mean `temperature`?"),
        (("mine",), {"labels": ["3"]}, "was not trained with labels"),
        (("mine",), {"do": "reconstruct", "input": expected}, "are paths\nhint: `run.do(…)` takes arrays"),
        (("mine",), {"formats": ["jpg"]}, "no format is called `jpg`"),
        ((), {"like": drawn.files[2], "n": 3}, "cannot be used together"),
    ):
        with pytest.raises(gzcli.UsageError) as error:
            gzcli.sample(*words, **options)
        assert text in str(error.value)
    for options in ({"prompts": Path("nowhere.txt")}, {"do": "reconstruct", "input": "nowhere"}):
        with pytest.raises(gzcli.MissingError, match=r"`nowhere.* does not exist"):
            gzcli.sample("mine", **options)


def test_the_alarm_of_the_page_flags_a_foreign_image(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launcher, "run", in_process)
    rng = np.random.default_rng(0)
    for name, count in (("good", 70), ("today", 2)):
        Path(name).mkdir()
        for i in range(count):
            Image.fromarray(rng.integers(60, 90, (8, 8), np.uint8)).save(f"{name}/{i}.png")
    Image.fromarray(np.kron(np.eye(2, dtype=np.uint8), np.full((4, 4), 255, np.uint8))).save("today/odd.png")
    (code,) = re.findall(r"^```python\n(.*?)^```", texts()["ood-alarm"], re.MULTILINE | re.DOTALL)
    exec(code, here := {})
    result = here["result"]
    assert result.flagged == ["odd.png"] and (result.method, result.run, result.fpr) == (
        "combined",
        None,
        0.02,
    )
    assert len(result.rows) == 3 and (result.folder / "alarm.csv").is_file()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"n": -1}, "must be 1 or more"),
        ({"seed": -1}, "`seed=-1` must be 0 or more"),
        ({"precision": "fp8"}, "no precision is called `fp8`"),
        ({"checkpoint": "worst"}, "is neither `last`, `best` nor a step"),
        ({"gpus": "two"}, "is neither a number nor `all`"),
        ({"cpu": True, "processes": 0}, "`processes=0` must be 1 or more"),
    ],
)
def test_what_the_shell_refuses_to_read_is_refused_in_python(run, options, text):
    for call in (gzcli.sample, partial(gzcli.ood, out="glyphs"), partial(gzcli.alarm, None, ".")):
        with pytest.raises(gzcli.UsageError) as error:
            call("mine", **options, quiet=True)
        assert text in str(error.value)


def test_a_call_of_ood_takes_methods_ensembles_and_benchmarks(run, monkeypatch):
    """The jobs are those of `gz ood`."""
    jobs = []
    monkeypatch.setattr("gzcli.api.compare.do_job", lambda folder, job, **how: jobs.append(job) or 1 / 0)

    def job_of(call, *words, **options):
        with pytest.raises(ZeroDivisionError):
            call(*words, **options, quiet=True)
        return jobs[-1]

    method = job_of(gzcli.ood, "pca", data="digits", out=["glyphs", "patches"], set={"data.size": 8})
    assert (method.method, method.run, method.size, method.outs) == ("pca", "", 8, ("glyphs", "patches"))
    several = job_of(gzcli.ood, "mine", run.path, out="glyphs", scores="elbo,kl", seeds=2, k=3)
    assert several.others == (str(run.path),) and several.scores == ("elbo", "kl")
    assert (several.seeds, several.options) == (2, {"k": 3})
    judged = job_of(gzcli.alarm, None, run.sample(2), "mine", fpr="5%", maps=True, full=True)
    assert (judged.ins, judged.fpr, judged.maps, judged.full) == ("digits", 0.05, True, True)
    assert job_of(gzcli.alarm, "digits", export="there").verb == "portable"
    for call, words, options, text in (
        (gzcli.ood, ("pca",), {"data": "digits", "out": "glyphs", "starts": 3}, "has no option `starts`"),
        (gzcli.ood, ("pca", "mine"), {"data": "digits", "out": "glyphs"}, "makes no ensemble with `mine`"),
        (gzcli.alarm, ("digits",), {"set": {"data.sise": 8}, "input": "."}, "`set` has no key `data.sise`"),
        (gzcli.alarm, (None, "."), {}, '`data=…`\nhint: gzcli.alarm("./good", "./today")'),
        (gzcli.ood, ("mine",), {"benchmark": "openood-mnst"}, "hint: did you mean `openood-mnist`?"),
    ):
        with pytest.raises(gzcli.UsageError) as error:
            call(*words, **options)
        assert text in str(error.value)


def test_bench_and_ood_are_jobs_with_typed_results(run, monkeypatch, tmp_path):
    """The jobs are those of the verbs, whose options have the same names."""
    jobs = []

    def do_job(folder, job, **how):
        jobs.append(job)
        row = {"name": "mine", "run": run.id, "metrics": {"fd": 3.0}, "intervals": {"fd": [2.0, 4.0]}}
        score = dict.fromkeys(("auroc", "aupr_in", "aupr_out", "fpr95"), 0.9) | {"n_in": 5, "n_out": 5}
        scores = [{"score": name, "baseline": name == "size", **score} for name in ("size", "elbo")]
        result = {"data": "digits", "metric": "fd", "places": {"mine": "1"}, "floor": {"fd": 1.0}}
        return result | {"rows": [row], "results": [{"out": "glyphs", **row} for row in scores], "notes": []}

    monkeypatch.setattr("gzcli.api.compare.do_job", do_job)
    made = gzcli.bench("mine", data="digits", metrics=["swd"], n=100, cpu=True, quiet=True)
    assert jobs[0].runs == (str(run.path),) and (jobs[0].metrics, jobs[0].n) == (("swd",), 100)
    assert made.rows[0].metrics == {"fd": 3.0} and made.places == {"mine": "1"} and made.folder.is_dir()
    result = gzcli.ood("mine", out="glyphs", scores=["elbo"], n=5, cpu=True, quiet=True)
    assert (jobs[1].ins, jobs[1].outs, jobs[1].scores) == ("digits", ("glyphs",), ("elbo",))
    assert result.best.score == "elbo" and result.best.auroc == 0.9 and result.run == run.id
    refused("no score of `vae` has the option `strats`", gzcli.ood, "mine", out="glyphs", strats=3)
