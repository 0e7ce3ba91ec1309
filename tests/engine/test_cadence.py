"""How often a run validates, saves and draws: in steps, found from how long that takes."""

import time
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from helpers import figures, fit, recipe, same, trainer
from refused import refused
from safetensors.torch import load_file
from zoo import FIRST

from gzcli.core.errors import Interrupted, MissingError
from gzcli.core.sections import OptimSection, TrainSection
from gzcli.engine import optim, sampler, validate
from gzcli.engine.__main__ import results_of
from gzcli.engine.cadence import PAUSE_KEYS, Cadence, Pauses, Stop, count_steps, in_proportion, in_series
from gzcli.engine.log import Log
from gzcli.engine.trained import load_trained
from gzcli.engine.trainer import Trainer
from gzcli.metrics import collapse
from gzcli.models.base import Phase
from gzcli.store.metrics import summary

pytestmark = pytest.mark.usefixtures("undrawn")
OPEN = TrainSection()  # whose numbers of steps are to be found


class Life:
    """A run of `steps` steps on a clock of its own; `costs` are the seconds of a pause of each kind."""

    def __init__(self, steps: int, each: float, costs: dict, compiling: float = 0.0, **train: int):
        self.now, self.each, self.seen = 0.0, each, []
        cadence = Cadence(TrainSection(**train), steps, agree=list, clock=lambda: self.now)
        for step in range(1, steps + 1):
            self.now += each + (compiling if step == 1 else 0)
            for kind in sorted(cadence.due(step)):
                with cadence.timed(kind):
                    self.now += costs[kind]
                self.seen.append((kind, step, self.now))
        self.intervals, self.cadence = cadence.intervals(), cadence

    def steps(self, kind: str) -> list[int]:
        return [step for pause, step, _ in self.seen if pause == kind]


CHEAP = {"eval": 0.01, "checkpoint": 0.01, "sample": 0.01}


def test_pauses_come_every_tenth_or_as_the_recipe_says():
    life = Life(600, 0.1, CHEAP)
    assert life.intervals == {"eval_every": 60, "checkpoint_every": 60, "sample_every": 120}
    assert life.steps("eval") == [60 * i for i in range(1, 11)]
    assert life.steps("sample") == list(range(120, 601, 120))
    life = Life(100, 1.0, CHEAP, eval_every=7, checkpoint_every=0, sample_every=50)
    assert life.steps("eval") == list(range(7, 101, 7))
    assert life.steps("checkpoint") == []
    assert life.steps("sample") == [50, 100]
    life = Life(27, 2.0, costs := {"eval": 3.0, "checkpoint": 0.5, "sample": 4.0})
    assert len(life.steps("eval")) == 1 and len(life.steps("sample")) == 1
    # the first pause comes after two steps, of which one is timed: each kind takes about its share
    assert all(len(life.steps(kind)) * costs[kind] < 0.08 * 27 * 2.0 for kind in CHEAP)
    assert max(life.intervals.values()) < 100, "an extended run has pauses too"
    life = Life(20_000, 0.5, {"eval": 10.0, "checkpoint": 3.0, "sample": 20.0}, compiling=90.0)
    first = {kind: next(now for pause, _, now in life.seen if pause == kind) for kind in CHEAP}
    assert max(first.values()) < 140  # the compiler's time included
    # 2,000 and 4,000 steps, divided to come near the 1,200 of ten minutes
    assert life.intervals == {"eval_every": 1000, "checkpoint_every": 1000, "sample_every": 800}
    dear = Life(20_000, 0.5, CHEAP | {"sample": 300.0})
    assert dear.intervals["sample_every"] == 2 * 4000  # near the 12,000 of a share of 1/20


@pytest.mark.parametrize("minutes", [1, 4, 60])
@pytest.mark.parametrize("took", [{"eval": 0.01, "sample": 0.02}, {"eval": 4.0, "sample": 2.0}])
@pytest.mark.parametrize("typed", [{}, {"eval_every": 200}, {"patience": 5}])
def test_a_run_of_minutes_ends_in_that_time(minutes, took, typed):
    """Its pauses and what follows the last step included. With 8 seconds of preparation, and 6 at the end."""
    now, length = [8.0], 60.0 * minutes
    pauses = Pauses(TrainSection(**typed), length, took, lambda steps: 6.0)
    takes = lambda step: now.__setitem__(0, now[0] + 0.1)  # noqa: E731
    steps = count_steps(takes, [Phase("main", [])], pauses, 0.0, lambda: now[0])
    train = typed | {PAUSE_KEYS[kind]: steps for kind in pauses.last_only}
    costs = took | {"checkpoint": 0.1}
    life = Life(steps, 0.1, costs, **train)
    last = sum(cost for kind, cost in costs.items() if steps not in life.steps(kind))
    assert 0.9 * length < now[0] + life.now + last + 6.0 < 1.1 * length
    short = minutes == 1 and took["eval"] > 1 and "patience" not in typed
    assert pauses.last_only == [kind for kind in took if short and f"{kind}_every" not in typed]


def test_a_machine_that_is_a_little_slower_validates_at_the_same_steps():
    """The best checkpoint is one of these steps. A much slower machine leaves some out."""
    speeds = (0.9, 1.0, 1.01, 1.2)
    for steps, each, took in ((400, 0.05, 0.1), (400, 0.05, 0.4), (20_000, 0.5, 10.0), (3_000, 1.0, 5.0)):
        lives = [Life(steps, each * k, dict.fromkeys(CHEAP, took * k), eval_every=None) for k in speeds]
        assert all(life.steps("eval")[1:] == lives[0].steps("eval")[1:] for life in lives), (steps, each)
    # validations that are timed badly, here between .1 and .13 seconds
    intervals = [
        Life(400, 0.05, CHEAP | {"eval": took}).intervals["eval_every"] for took in (0.1, 0.103, 0.13)
    ]
    assert intervals == [40, 40, 40]
    slow = [Life(20_000, 0.5 * k, CHEAP) for k in (0.3, 1.0, 3.0, 10.0)]
    assert all(step in (10, 20, 50, 100, 200, 500, 1000, 2000) for x in slow for step in x.steps("eval")[:1])
    assert all(2000 % life.intervals["eval_every"] == 0 for life in slow)
    assert [n for n in range(1, 1001) if in_series(n)] == [10, 20, 50, 100, 200, 500, 1000]
    for whole, expected in (
        (40, {41: 40, 56: 40, 57: 80, 126: 80, 127: 200, 400: 400, 4000: 4000}),
        (2000, {1500: 2000, 1200: 1000, 600: 400, 200: 200, 0.1: 1}),
    ):
        assert {wanted: in_proportion(whole, wanted) for wanted in expected} == expected
    cadence = Life(20_000, 0.5, {"eval": 30.0, "checkpoint": 3.0, "sample": 2.0}).cadence
    assert cadence.slow({"eval"}) and cadence.slow({"eval", "sample"}) and not cadence.slow({"sample"})
    assert Cadence(OPEN, 100, agree=list).slow({"sample"})  # nobody knows yet


def test_ranks_go_by_the_clock_of_rank_0():
    """The second process is slow, and agrees."""
    said = {}

    def tell(values):
        said.setdefault(len(said), list(values))
        return values

    first = Cadence(OPEN, 1000, agree=tell, clock=iter(range(0, 10**6, 20)).__next__)
    heard = iter(range(10**6))
    slow = iter(range(0, 10**6, 99)).__next__
    second = Cadence(OPEN, 1000, agree=lambda values: said[next(heard)], clock=slow)
    for step in range(1, 50):
        due = [cadence.due(step) for cadence in (first, second)]
        assert due[0] == due[1]
        for kind in sorted(due[0]):
            for cadence in (first, second):
                with cadence.timed(kind):
                    pass
    assert first.intervals() == second.intervals() and len(first.intervals()) == 3


@pytest.mark.parametrize(("model", "best"), [("vae", "auto"), ("vqvae", "loss")])
def test_validation_and_pictures_change_nothing(model, best):
    """Validation and pictures draw from a noise of their own."""
    weights = []
    for pauses in ((), ("train.eval_every=2", "train.sample_every=2", f"train.best={best}")):
        t = fit(recipe(FIRST[model], steps=4, sets=("train.ema=0.9", *pauses)))
        weights.append(load_file(t.run.path / "model.safetensors"))
    assert same(*weights) and len(list((t.run.path / "samples").glob("*.png"))) == 2


def test_what_was_found_is_in_the_recipe():
    keys = "train.eval_every=null train.checkpoint_every=null train.sample_every=null train.best=auto"
    t = fit(recipe(FIRST["vae"], steps=6, sets=tuple(keys.split())))
    section = t.run.tree()["train"]
    assert all(section[key] >= 1 for key in PAUSE_KEYS.values())
    out = results_of(t.run)
    assert out["picture"].endswith("00000006.png") and out["figures"].keys() == {"val_bpd"}
    assert out["best"]["metric"] == "bpd"


def test_a_checkpoint_that_a_validation_would_save_is_timed_as_one(monkeypatch):
    """The first validation is always the best. A slow disk gets fewer checkpoints of 20 quick steps
    than a tenth of them, but not so few that an extended run has none."""
    save = Trainer.save
    monkeypatch.setattr(Trainer, "save", lambda self, step: (time.sleep(0.2), save(self, step)))
    keys = "train.eval_every=null train.checkpoint_every=null train.best=loss train.log_every=20"
    t = fit(recipe(FIRST["vae"], steps=20, sets=tuple(keys.split())))
    assert 2 < t.run.tree()["train"]["checkpoint_every"] <= 2000


def test_a_run_that_is_stopped_between_two_lines_and_at_a_validation(monkeypatch):
    """Lines every 3 steps, validation every 5: stopped after 5, it goes on as an unbroken run."""
    sets = ("train.log_every=3", "train.eval_every=5", "train.sample_every=5", "train.best=auto")
    tree = recipe(FIRST["vae"], steps=10, sets=sets)
    whole, broken = trainer(tree), trainer(tree)
    whole.fit()
    monkeypatch.setattr(Stop, "signal", lambda self, done: 15 if done == 5 else 0)
    refused("", broken.fit, error=Interrupted)
    monkeypatch.setattr(Stop, "signal", lambda self, done: 0)
    with open(broken.run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # as a kill leaves it
    fit(tree, broken.run)
    rows = figures(whole.run)
    assert rows == figures(broken.run) and [x["step"] for x in rows] == [3, 5, 6, 9, 10, 10]
    shown = [{p.name for p in (t.run.path / "samples").iterdir()} for t in (whole, broken)]
    assert shown[0] == shown[1]


def test_a_warm_up_that_a_short_run_cuts_is_as_steep_as_a_whole_one():
    """The full rate after five steps, of which a flow diverges, is not reached: the peak is cut with it."""
    conf = OptimSection(warmup=200, schedule="constant")
    factors = [200 * optim.factor(conf, step, 27) for step in (0, 4, 12, 13, 26)]
    assert factors == pytest.approx([1, 5, 13, 13, 13])
    assert optim.factor(conf, 99, 400) == 0.5 and optim.factor(conf, 200, 400) == 1
    assert optim.factor(conf, 0, 1) == 1 / 200
    for schedule in ("cosine", "linear", "late_linear", "wsd"):
        of_schedule = replace(conf, schedule=schedule)
        factors = [optim.factor(of_schedule, step, 50) for step in range(51)]
        assert max(factors) == 25 / 200 == factors[25] and factors[-1] == pytest.approx(0)


def test_a_longer_run_repeats_the_stable_part_of_a_shorter_one():
    wsd = OptimSection(warmup=10, schedule="wsd")
    short, long = ([optim.factor(wsd, step, steps) for step in range(steps)] for steps in (110, 210))
    assert short[:91] == long[:91] and set(short[10:91]) == {1.0} and short[-1] < 0.03


def test_patience_ends_a_training_that_does_not_improve(monkeypatch):
    """After three validations without a new best; a resumed run counts those before. The end is recorded, a
    resume ends there too, with the same rate of learning, and the best weights are served."""
    losses = iter([3.0, 2.0, 4.0, 2.5, 2.0, 1.0])
    monkeypatch.setattr(validate, "validation_mean", lambda *_: next(losses))
    sets = ("train.eval_every=2", "train.best=loss", "train.patience=3")
    tree = recipe(FIRST["vae"], steps=12, sets=sets)
    first = trainer(tree)
    monkeypatch.setattr(Stop, "signal", lambda self, done: 15 if done == 7 else 0)
    refused("", first.fit, error=Interrupted)
    monkeypatch.setattr(Stop, "signal", lambda self, done: 0)
    picture = Trainer.picture
    monkeypatch.setattr(Trainer, "picture", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):  # killed before its final picture
        fit(tree, first.run)
    monkeypatch.setattr(Trainer, "picture", picture)
    t = fit(tree, first.run)
    run = t.run
    assert (t.end, t.steps, run.best.step, run.saved_steps) == (10, 12, 4, [4, 10])
    assert run.samples_picture(10).exists() and next(losses) == 1.0
    run.update(state="finished", recipe={"steps": 12}, steps=12)
    assert (run.ended_by_patience, run.served, run.shortfalls) == (10, 4, [])
    assert run.model_file.samefile(run.checkpoint(4).averaged)
    assert load_trained(run, "cpu").step == 4 and load_trained(run, "cpu", "10").step == 10
    assert summary(run)["ended_by_patience"] == 10 and summary(run)["served"] == 4
    assert fit(tree, run).done == 10  # as `--resume` and `--requeue` do
    run.update(ended_by_patience=None)  # as more steps that are typed do
    losses = iter([1.0])
    longer = fit(tree, run)
    assert (longer.done, run.ended_by_patience, run.served) == (12, None, None)
    assert run.model_file.samefile(run.checkpoint(12).averaged)
    tree["train"]["best"] = "none"
    refused("needs validation", trainer, tree)


def test_what_was_best_is_served_where_validation_has_risen(monkeypatch):
    """For a fifth of the length, by more than a tenth of the gain; it is said once, when it is seen."""
    sets, said = ("train.eval_every=1", "train.best=loss", "train.checkpoint_every=5"), []
    monkeypatch.setattr(Log, "warn", lambda self, text: said.append(text))
    cases = {
        (9.0, 5.0, 4.0, 4.6, 4.7, 4.8, 4.9, 5.0, 5.1, 5.2): 3,  # overfits
        (9.0, 5.0, 4.0, 4.1, 4.2, 4.1, 4.2, 4.1, 4.2, 4.1): 10,  # is flat
        (9.0, 5.0, 4.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 4.2): 10,  # has come back
        (9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 5.0, 5.0): 10,  # for two validations alone
    }
    for losses, served in cases.items():
        said.clear()
        values = iter(losses)
        monkeypatch.setattr(validate, "validation_mean", lambda *_, values=values: next(values))
        run = fit(recipe(FIRST["vae"], steps=10, sets=sets)).run
        run.update(state="finished")
        assert load_trained(run, "cpu").step == served and run.served == (served if served < 10 else None)
        is_said = losses[2] == 4.0 and losses[3] > 4.5
        assert sum("has worsened since step 3" in text for text in said) == is_said


def test_a_generator_that_has_just_begun_has_not_collapsed(monkeypatch):
    t = trainer(recipe(FIRST["wgan"], steps=4, sets=("train.eval_every=0", "train.best=auto")))
    said = []
    monkeypatch.setattr(t.log, "warn", said.append)
    monkeypatch.setattr(collapse, "warning", lambda distance, classes: "collapsed")
    images = t.pack.images("val")[:20]
    monkeypatch.setattr(sampler, "draw", lambda trained, n, **_: images)
    t.steps, t.net = (100, SimpleNamespace(features=lambda x: x.reshape(len(x), -1)[:, ::16], rotations=True))
    t.net.predict = lambda x: x[:, 0, 0, 0] * 0
    counts = []
    for step in (1, 24, 25, 100):
        t.evaluate(step, "fd")
        counts.append(len(said))
    assert counts == [0, 0, 1, 1]
    monkeypatch.undo()
    text = collapse.warning(1.0, collapse.coverage(np.zeros(9, int), np.arange(9)))
    assert text.endswith("is 0% of that of real images"), "no share is less than nothing"


@pytest.mark.parametrize("error", ["UsageError", "CommError"])
def test_weights_and_biases_without_a_key(monkeypatch, error):
    wandb = pytest.importorskip("wandb")
    tree = recipe(FIRST["vae"], steps=2)
    tree["launch"]["wandb"] = True  # as older recipes have it

    def init(**options):
        raise getattr(wandb.errors, error)("No API key configured. Use `wandb login` to log in.\nmore")

    monkeypatch.setattr(wandb, "init", init)
    e = refused("", trainer(tree).fit, error=MissingError)
    assert e.message == "`--track wandb`: No API key configured. Use `wandb login` to log in"
    assert "WANDB_MODE=offline" in e.hint
