"""Every test lives in a temporary GZ_HOME, offline, whatever the user's environment says."""

import gc
import importlib
import os
import signal
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from gzcli.cli import app, out

# as `gz` starts its engine; read when torch is first imported
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# an installed gz has byte code, without which each of the many processes would compile a hundred files
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_addoption(parser):
    text = "of the tests of models, and of the mathematics, those of one family alone"
    parser.addoption("--family", metavar="NAME", help=text)


def pytest_sessionstart(session):
    """pytest rewrites the assertions of all tests for five seconds: of two workers the second begins with the
    last file, so that each finds half of them in the byte code of the other."""
    if os.environ.get("PYTEST_XDIST_WORKER") != "gw1":
        return
    folders = [Path(arg) for arg in session.config.args]
    for path in sorted((path for folder in folders for path in folder.rglob("test_*.py")), reverse=True):
        if str(path.parent) not in sys.path:
            sys.path.insert(0, str(path.parent))
        with suppress(Exception, pytest.skip.Exception):  # collection tells what is wrong
            importlib.import_module(path.stem)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """A file is tested by one worker, which makes what its tests share once; those that fork, too."""
    forking = {item.path for item in items if "forks" in item.fixturenames}
    for item in items:
        group = "forks" if item.path in forking else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))
    if not (family := config.getoption("--family")):
        return
    from gzcli.models import catalog

    families = {name: card.family for name, card in catalog.cards().items()}
    if family not in families.values():
        raise pytest.UsageError(f"--family {family}: it is one of {', '.join(sorted({*families.values()}))}")

    def belongs(item) -> bool:
        """Whether a test is of the family: by the model among its parameters, else by what its file imports;
        one that is of no model is of every family."""
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        models = [str(getattr(value, "model", value)) for value in values]
        if chosen := [families[model] for model in models if model in families]:
            return family in chosen
        folder = item.path.parent.name
        if folder == "truth":
            return f"gzcli.models.{family}" in item.path.read_text(encoding="utf-8")
        return folder not in ("contract", "engine")

    chosen = [item for item in items if belongs(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


def pytest_collection_finish():
    """What has been imported and collected is no garbage, and need not be looked through again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)  # of short-lived objects, the tests make many; a search at each 700 costs 3 %


@pytest.fixture(autouse=True, scope="session")
def _home(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    for key in [k for k in os.environ if k.startswith(("GZ_", "WANDB_", "ACCELERATE_", "SLURM_"))]:
        patch.delenv(key)
    patch.delenv("COLUMNS", raising=False)  # xdist gives its workers the terminal's
    patch.setenv("GZ_HOME", str(tmp_path_factory.mktemp("home")))
    patch.setenv("GZ_OFFLINE", "1")
    patch.setenv("GZ_DATA", "digits")  # the smallest set, whatever a recipe shows first
    patch.setenv("GZ_TRIAL", "0")  # no plan of a test starts a process to try a step
    patch.setenv("WANDB_MODE", "offline")
    patch.setenv("HF_HUB_OFFLINE", "1")
    # a millisecond each, and dozens a training; a process that is killed loses nothing without, and no test
    # cuts the power
    patch.setattr(os, "fsync", lambda fd: None)
    yield
    patch.undo()


@pytest.fixture(autouse=True, scope="session")
def _interruptible():
    """A shell's `&` and `nohup` start with Ctrl-C ignored: the tests of signals must hear it."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True, scope="session")
def _commands():
    """The commands of a verb depend on nothing else, so this process builds them once."""
    build, commands = app.build, {}

    def built(words: list[str] | None = None):
        first = next((word for word in words or () if not word.startswith("-")), None)
        key = (words is None, first if first in app.VERBS else None)
        if key not in commands:
            commands[key] = build(words)
        return commands[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "build", built)
        yield


@pytest.fixture(autouse=True)
def _plain_output():
    """A command in this process leaves its `--json` or `-q` behind: the next test starts without."""
    yield
    out.configure(json=False, quiet=False, lenient=False)


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """A process that has loaded gz and forks: `forks.gz` is `helpers.gz`, seconds sooner."""
    from forks import zygote

    with zygote(tmp_path_factory.mktemp("forks")) as one:
        yield one


@pytest.fixture(scope="module")
def undrawn():
    """Trainings in this process leave no loss.png, which takes longer to draw than most of them last."""
    patch = pytest.MonkeyPatch()
    patch.setattr("gzcli.engine.trainer.loss_curve", lambda folder: None)
    yield
    patch.undo()


@pytest.fixture
def fp64():
    """Tensors and modules are made in double precision."""
    import torch

    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A fresh GZ_HOME for a test that counts runs or packs."""
    monkeypatch.setenv("GZ_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def call(home, capsys, monkeypatch, tmp_path):
    """call("runs", "list") → (exit code, stdout, stderr) of `gz` in this process, in a clean home and folder.
    Data sets are not opened: images are 16 pixels wide unless the recipe says otherwise."""

    def with_data(recipe, dataset, run=None, **how):
        return recipe.on(replace(recipe.data, size=recipe.data.size or 16))

    def call(*words: str) -> tuple[int, str, str]:
        code = app.run(list(words))
        return (code, *capsys.readouterr())

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("gzcli.launch.plan.with_data", with_data)
    return call


@pytest.fixture
def shared_data():
    """The folder of real data beside the checkout; the test is skipped where there is none."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared/data, real images that are not part of the project")
    return SHARED
