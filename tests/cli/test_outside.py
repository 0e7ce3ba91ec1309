"""Models from outside: mistakes are told with their place, and a file that keeps the contract is a model."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import py_compile
import re
import sys
from pathlib import Path

import pytest
from helpers import in_process

from gzcli import testing
from gzcli.core.errors import MissingError, UsageError
from gzcli.core.types import DataInfo
from gzcli.docs.page import texts
from gzcli.engine.__main__ import explain
from gzcli.models import catalog
from gzcli.recipe.files import mistakes, read_header
from gzcli.recipe.resolve import resolve
from gzcli.store import model_files
from gzcli.store.run_folder import Run
from gzcli.testing import CHECKS, Case, fault_of

TEMPLATE = (Path(testing.__file__).parent / "template.py").read_text()
LOSS = "return F.mse_loss(self.velocity((1 - time) * x0 + time * x1, t), x1 - x0)"
SMALL = {"hidden": 8, "layers": 1}
UNET = {"channels": 8, "groups": 4, "mult": (1, 2), "attention": ()}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write("maf", old=new) → the template as that file, with changes."""
    monkeypatch.setattr(model_files, "_typed", {})

    def write(name: str = "maf", *changes: tuple[str, str]) -> Path:
        text = TEMPLATE
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        return path

    return write


def fault(path: Path, check: str) -> str | None:
    return fault_of(CHECKS[check], Case(model_files.add(path), SMALL, lr=3e-3))


def test_the_template_keeps_the_contract_and_an_earlier_one_is_a_model(write):
    assert mistakes(path := write()) == []
    assert {check: fault(path, check) for check in CHECKS} == dict.fromkeys(CHECKS)
    path = write("earlier", ("Model, Noise, Progress", "Model\nfrom gzcli.types import Noise, Progress"))
    assert mistakes(path) == [] and fault(path, "each_phase_trains_its_parameters") is None


def test_the_files_of_the_page_on_methods_are_models(tmp_path, monkeypatch):
    """A loss in twelve lines, and a path, over models of gz."""
    monkeypatch.setattr(model_files, "_typed", {})
    blocks = re.findall(r"```python\n(.*?)```", texts()["own-method"], re.DOTALL)
    checks = {"min_snr": [LEARNS], "cosines": ["a_path_matches_its_marginal", "samples_are_images"]}
    for (name, owed), block in zip(checks.items(), blocks, strict=True):
        (file := tmp_path / f"{name}.py").write_text(block)
        assert mistakes(file) == [] and list(read_header(file).tree) == ["train"]
        case = Case(model_files.add(file), UNET, lr=5e-3, batch=8, sample={"steps": 2})
        assert [fault_of(CHECKS[check], case) for check in owed] == [None] * len(owed)
    assert sum(bool(line.strip()) for line in blocks[0].splitlines()) <= 12


DEPENDS = "the_loss_depends_only_on_the_batch"
LEARNS = "each_phase_trains_its_parameters"
LOSSES = {
    "return (self.velocity(x0, t) - x1).square().sum()": ("the_loss_is_a_mean", "a sum over the batch"),
    "return F.mse_loss(self.velocity(torch.randn_like(x1), t), x1)": (DEPENDS, "torch's global generator"),
    "return F.mse_loss(self.velocity(x1, t * 0), x0 * 0)": (DEPENDS, "no effect"),
    "return F.mse_loss(x0, x1)": (LEARNS, "has no gradient"),
    "return self.velocity(x0, t).mean((1, 2, 3))": (LEARNS, "not a scalar"),
    "return 0 * self.velocity(x0, t).mean() + x0.mean()": (LEARNS, "none of its parameters"),
    "return self.speed(x0)": (LEARNS, "AttributeError"),
}
SAMPLES = {
    "return x": "values outside [-1, 1]",
    "return torch.rand_like(x)": "different images from the same noise",
    "return (x * len(x) / 4).clamp(-1, 1)": "how many images are drawn",
    "return x.clamp(-1, 1)[:, :, 1:]": "returns (4, 1, 15, 16), not (4, 1, 16, 16)",
    "return x.clamp(-1, 1) * 0": "the same images from different noise",
}


def test_what_losses_and_samples_do_wrong_is_said_in_a_sentence(write):
    for loss, (check, message) in LOSSES.items():
        assert message in fault(write("maf", (LOSS, loss)), check), loss
    for result, message in SAMPLES.items():
        assert message in fault(write("maf", ("return x.clamp(-1, 1)", result)), "samples_are_images"), result


SIGNATURE = "hidden: int = 32, layers: int = 3"


SIGNATURES = {
    f"{SIGNATURE}, **more": "takes `**more`",
    "hidden=32, layers: int = 3": "option `hidden` of `__init__` has no type",
    f"{SIGNATURE}, more: dict = None": "has the type `dict`, which a recipe cannot contain",
    f"{SIGNATURE}, name: str = 'x'": "`name` cannot be an option",
    f"{SIGNATURE}, more: int = len('x')": "must be a literal, not an expression",
}


def test_an_option_that_no_recipe_can_hold_is_refused_with_its_line(write):
    for signature, message in SIGNATURES.items():
        path = write("maf", (SIGNATURE, signature))
        (mistake,) = mistakes(path)
        line = path.read_text().split("def __init__")[0].count("\n") + 1
        assert message in mistake and mistake.startswith(f"{path}:{line}:"), signature


def test_what_is_no_model_is_told(write, tmp_path, call):
    (tmp_path / "a.py").write_text("x = (1\n")
    (tmp_path / "b.py").write_text("class Maf: pass\n")
    assert mistakes(tmp_path / "a.py") == [f"{tmp_path / 'a.py'}:1: '(' was never closed"]
    assert "derives from `gzcli.Model`" in mistakes(tmp_path / "b.py")[0]
    variants = write("many", ('    paper = "', '    variants = {"more": {"hidden": 64}}\n    paper = "'))
    line = variants.read_text().split("variants =")[0].count("\n") + 1
    assert mistakes(variants)[0].startswith(f"{variants}:{line}: `variants` works only in models of gz")
    (tmp_path / "more.yaml").write_text("extends: ./maf.py\nmodel: {hidden: 64}\n")
    write()
    assert resolve(str(tmp_path / "more.yaml")).parts[0].options["hidden"] == 64  # as the message advises
    assert "needs a line `paper" in mistakes(write("maf", ('    paper = "Lipman', '    source = "Lipman')))[0]
    with pytest.raises(MissingError, match="there is no model file"):
        model_files.add(tmp_path / "c.py")
    with pytest.raises(UsageError, match="is not a valid name for a model file"):
        model_files.add(write("My-Model"))
    for name in ("None", "true", "model", "f", "tensor"):  # classes that could not be written
        code, _, message = call("model", "new", name)
        assert code == 2 and "is not a valid name for a model" in message and not list(Path().glob("*.py"))


def test_two_files_of_one_name_are_two_models(write, tmp_path):
    first = catalog.load_class(catalog.card_at(write("maf")))
    (tmp_path / "other").mkdir()
    path = tmp_path / "other" / "maf.py"
    path.write_text(TEMPLATE)
    assert catalog.load_class(catalog.card_at(path)) is not first


EVIL = TEMPLATE.replace("import torch\n", "import torch\n\nEVIL = True\n", 1)


def compiled_beside(path: Path) -> None:
    """Puts another program, compiled, where Python looks for the compiled file, which it does not compare."""
    evil = path.with_name("evil.txt")
    evil.write_text(EVIL)
    cached = importlib.util.cache_from_source(str(path))
    unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(str(evil), cfile=cached, dfile=str(path), invalidation_mode=unchecked)


def test_only_what_was_read_is_run(write):
    model_files.add(path := write())
    compiled_beside(path)
    module = sys.modules[catalog.load("maf").__module__]
    assert not hasattr(module, "EVIL") and module.__file__ == str(path)


def test_a_run_s_copy_is_run_as_it_was_when_its_trust_was_tested(write, tmp_path, home):
    run = Run(tmp_path / "run")
    model_files.keep(run.path, write())
    copy = run.programs_folder / "maf.py"
    card = catalog.card_of(run, "maf")
    compiled_beside(copy)
    copy.write_text(EVIL)  # after the test and before the import
    assert not hasattr(sys.modules[catalog.load_class(card).__module__], "EVIL")
    with pytest.raises(UsageError, match="includes a model file"):
        catalog.card_of(run, "maf")


def test_a_dry_run_reads_the_copy_of_a_run(write, tmp_path, home, monkeypatch):
    from gzcli.launch.forecast import drawer_of_run

    run = Run(tmp_path / "run")
    model_files.keep(run.path, write())
    monkeypatch.setattr(model_files, "_typed", {})
    drawer_of_run(run, None)
    assert catalog.card("maf").path == run.programs_folder / "maf.py"


CONTENTS = {
    "5000 brackets": "class A:\n    paper = " + "(" * 5000,
    "50000 signs": "class A:\n    paper = " + "-" * 50000 + "1",
    "a wide union": TEMPLATE.replace("hidden: int", "hidden: " + "int | " * 2500 + "int"),
    "a long sum": TEMPLATE.replace("= 32", "= 1" + " + 1" * 2500),
    "no Python": "class A:\n    paper = = 1",
    "a zero byte": "class A:\n    paper = '\0'",
    "no text": b"class A:\n    paper = '\xe9'",
}


def test_a_file_that_is_no_model_is_told_and_leaves_others_alone(write, monkeypatch):
    path = write("bad")
    write("maf")
    monkeypatch.setenv("GZ_MODELS", str(path.parent))
    for what, content in CONTENTS.items():
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        model_files._of_folders.cache_clear()
        assert catalog.card("maf").can and len(mistakes(path)) == 1, what
        for read in (lambda: catalog.card("bad"), lambda: read_header(path), lambda: resolve("bad")):
            with contextlib.suppress(UsageError):
                read()


def test_a_fault_in_the_file_has_its_line(write):
    path = write("maf", (LOSS, "return self.speed(x0)"))
    line = path.read_text().split("self.speed")[0].count("\n") + 1
    assert fault(path, LEARNS).startswith(f"{path}:{line}: AttributeError")
    model_files.add(write("maf", ("import torch\n", "import torch\nimport no_such_module\n")))
    with pytest.raises(UsageError, match=r"maf.py:\d+` cannot be imported: ModuleNotFoundError"):
        catalog.load("maf")


def test_an_equation_after_the_recipe_is_none_of_it(write):
    recipe = "    optim: {lr: 1e-3}\n"
    more = "    for:\n      digits: {train: {steps: 5}}\n\n      # few\n      glyphs: {train: {steps: 6}}\n"
    equation = "\n        dx/dt = v(x, t)\n\n    x_1 = x_0 + ∫ v dt\n"
    read = read_header(write("maf", (recipe, recipe + more + equation))).tree
    assert list(read) == ["train", "optim", "for"] and list(read["for"]) == ["digits", "glyphs"]


def test_folders_and_packages_add_models(write, tmp_path, monkeypatch):
    folder = write("maf").parent
    (folder / "helper.py").write_text("x = 1\n")
    os.mkfifo(folder / "pipe.py")  # whoever opens it waits for ever
    (folder / "folder.py").mkdir()
    (folder / "gone.py").symlink_to(tmp_path / "nothing")
    monkeypatch.setenv("GZ_MODELS", str(folder))
    model_files._of_folders.cache_clear()
    assert [name for name, path in model_files.model_files().items() if path.parent == folder] == ["maf"]
    assert catalog.cards()["maf"].family == catalog.families()["maf"] == catalog.OUTSIDE
    assert list(catalog.cards()) == list(catalog.families()) and "helper" not in catalog.cards()
    monkeypatch.setenv("GZ_MODELS", str(tmp_path / "nowhere"))
    with pytest.raises(MissingError, match="GZ_MODELS"):
        catalog.cards()
    monkeypatch.delenv("GZ_MODELS")
    package, info = tmp_path / "site" / "shapes", tmp_path / "site" / "shapes-1.dist-info"
    for path, text in (
        (package / "__init__.py", ""),
        (package / "iaf.py", TEMPLATE),
        (info / "METADATA", "Metadata-Version: 2.1\nName: shapes\nVersion: 1\n"),
        (info / "entry_points.txt", "[gzcli.models]\niaf = shapes.iaf:Template\n"),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(sys, "path", [str(package.parent), *sys.path])
    model_files._installed.cache_clear()
    try:
        assert catalog.card("iaf").path == package / "iaf.py"
    finally:
        model_files._installed.cache_clear()


def test_a_file_with_the_name_of_a_model_of_gz_changes_nothing(write, monkeypatch):
    """Neither what the name means, nor the recipe, nor what a run keeps."""
    monkeypatch.setenv("GZ_MODELS", str(write("vae").parent))
    assert catalog.card("vae").family == "vae" and catalog.cards()["vae"].family == "vae"
    assert resolve("vae").source.name == "vae.yaml" and "beta" in resolve("vae").parts[0].options
    assert catalog.keep(Path(), ["vae"]) == []


def test_a_plan_tries_a_step_of_a_file(write, call, monkeypatch):
    """The process of the trial knows only the folder of its job."""
    monkeypatch.setenv("GZ_TRIAL", "1")
    monkeypatch.setattr("gzcli.launch.launcher.run", in_process)
    code, out, err = call("train", str(write()), "--cpu", "--dry-run")
    assert code == 0 and "28.6K parameters" in out, err


def test_an_error_in_a_file_is_told_with_its_line(write, call, tmp_path):
    """It is no bug in gz."""
    model_files.keep(tmp_path, write())
    cls = catalog.load_class(catalog.card_of(Run(tmp_path), "maf"))
    with pytest.raises(AttributeError) as caught:
        cls(DataInfo((1, 8, 8), 256, ())).loss(None)
    error = explain(caught.value)
    assert error.code == 2 and re.match(r"`maf.py:\d+`: AttributeError: ", error.message)
    assert explain(AttributeError("x")).code == 1
    Path("maf.py").write_text(TEMPLATE)
    assert "use `./maf.py`" in call("train", "maf")[2]


OUTDATED = {
    "flow_matching.cfm import CFM": "flow_matching.fm import FM as CFM`, and set",
    "flow_matching.rf import RF": 'flow_matching.fm import FM as RF`, and set `model: {"net": "dit"}`',
    "diffusion.dit import DiT": "diffusion.ddpm import DDPM as DiT`, and",
    "flow_matching.zigma import zigzags": "nn.zigzag import zigzags`",
    "score.sgm import ScoreOptions": "denoising.denoiser import ObjectiveOptions as ScoreOptions`",
}


def test_an_import_that_gz_no_longer_has_is_told_with_its_successor(write, tmp_path):
    """A class based on it, a helper of a model that is read without an import, and the copy in a run."""
    for old, new in OUTDATED.items():
        message = f"write `from gzcli.models.{new}"
        name = old.split()[-1]
        (file := tmp_path / "based.py").write_text(
            f"from gzcli.models.{old}\n\n\nclass Based({name}):\n    paper = 'Lipman'\n"
        )
        assert message in mistakes(file)[0] and mistakes(file)[0].startswith(f"{file}:1: gz has no ")
        with pytest.raises(UsageError, match=re.escape(message)):
            catalog.card_at(file)
        helps = write("helped", ("from gzcli", f"from gzcli.models.{old}\nfrom gzcli"))
        with pytest.raises(UsageError, match=re.escape(message)):
            catalog.load_class(catalog.card_at(helps))
    assert catalog.outdated_imports(Path(testing.__file__)) == []


def test_new_writes_a_file_that_check_passes(call, monkeypatch):
    monkeypatch.setattr(model_files, "_typed", {})
    code, out, _ = call("model", "new", "My_Flow")
    assert (code, out) == (0, "my_flow.py\n") and "class MyFlow(Model)" in Path("my_flow.py").read_text()
    assert call("model", "new", "my_flow")[0] == 2, "it already exists"
    assert call("model", "new", "vae")[0] == 2, "a model of gz"
    text = Path("my_flow.py").read_text().replace("hidden: int = 32", "hidden: int = 8")
    Path("my_flow.py").write_text(text)
    code, out, err = call("model", "check", "./my_flow.py")
    assert code == 0 and out.count("ok ") == len(CHECKS), out + err
    Path("my_flow.py").write_text(text.replace("def velocity", "def pace"))
    code, out, _ = call("model", "check", "./my_flow.py", "--json")
    faults = [row["fault"] for row in json.loads(out.splitlines()[0])["checks"] if row["fault"]]
    assert code == 2 and "AttributeError" in faults[0]
