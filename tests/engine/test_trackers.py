"""Trackers by name: TensorBoard itself, the others as accelerate calls them, and one that is not there."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
from helpers import recipe, trainer
from refused import refused
from zoo import FIRST

from gzcli.cli import train as options
from gzcli.core.errors import MissingError, install_line
from gzcli.engine import history

pytestmark = pytest.mark.usefixtures("undrawn")


def fit(*names: str):
    """A run of two steps of a VAE with these trackers; returns its folder and the lines of its log."""
    tree = recipe(FIRST["vae"], steps=2, sets=("train.eval_every=2", "train.best=loss"))
    tree["launch"]["track"] = list(names)
    made = trainer(tree)
    made.fit()
    made.history.trackers.close()
    return made.run


def test_tensorboard_has_losses_validations_pictures_and_the_recipe(home):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = fit("tensorboard")
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert {"loss", "val_loss"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    assert events.Tags()["images"] == ["samples"]
    (hparams,) = (run.path / "tensorboard").glob("*/hparams.yml")
    assert "model.name: vae" in hparams.read_text() and "train.steps: 2" in hparams.read_text()


class Service(ModuleType):
    """A stand-in for the packages of wandb and trackio, which keeps what it is told."""

    def __init__(self, name: str):
        super().__init__(name)
        self.told: list = []
        self.__spec__ = SimpleNamespace(name=name)
        self.Image = lambda image: "picture"

    def init(self, **options):
        self.told.append(("init", options))
        return SimpleNamespace(
            log=lambda values, step=None, **more: self.told.append((step, values)),
            finish=lambda: self.told.append("finish"),
        )


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_gets_it_all(home, monkeypatch, name):
    accelerate = pytest.importorskip("accelerate.tracking")
    if name not in accelerate.LOGGER_TYPE_TO_CLASS:
        pytest.skip(f"this version of accelerate does not support {name}")
    service = Service(name)
    monkeypatch.setitem(sys.modules, name, service)
    run = fit(name)
    (_, options), *lines, end = service.told
    assert options["project"] == "gz" and options["name"] == run.id and options["resume"] == "allow"
    assert options["config"]["model"]["name"] == "vae"
    logged = [(step, key) for step, values in lines for key in values]
    assert {(1, "loss"), (2, "loss"), (2, "val_loss"), (2, "samples")} <= set(logged) and end == "finish"


def test_what_is_missing_is_told_first_and_what_fails_stops_nothing(monkeypatch, call):
    assert options.check_trackers([]) is None
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    code, _, stderr = call("train", "vae", "--track", "mlflow", "--dry-run")
    hint = f"hint: {install_line('mlflow')}"
    assert code == 3 and f"`--track mlflow` needs the package `mlflow`\n\n{hint}" in stderr
    code, _, stderr = call("train", "vae", "--wandb")
    assert code == 3 and "`--track wandb` needs the package `wandb`" in stderr
    refused("no tracker is called `tensorbord`", options.check_trackers, ["tensorbord"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingError, match="needs the package `wandb`"):
        history.start_tracker("wandb", SimpleNamespace(id="run", path=None), {}, 0)
    said: list[str] = []
    broken = SimpleNamespace(log=lambda *a, **b: 1 / 0, finish=lambda: said.append("finish"))
    monkeypatch.setattr(history, "start_tracker", lambda *words: broken)
    some = history.Trackers(["mlflow"], None, {}, SimpleNamespace(warn=said.append), start=0)
    some.figures(1, {"loss": 1.0})
    some.figures(2, {"loss": 1.0})
    some.close()
    assert said == ["`mlflow` stopped tracking: division by zero"]
