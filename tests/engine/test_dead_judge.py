"""A judge that stands at chance shows and chooses nothing: what to install for another one is said."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import fit, lines, recipe
from pixelwise import fake_run, fitted
from zoo import FIRST

from gzcli.core.sections import DataSection, TrainSection
from gzcli.core.types import silent
from gzcli.data.packs.open import open_pack
from gzcli.engine import guidance, validate
from gzcli.engine.log import Log
from gzcli.judge import bench
from gzcli.league import training
from gzcli.metrics import networks, pretrained
from gzcli.metrics.features import lenet
from gzcli.metrics.metric import metrics
from gzcli.metrics.second import second
from gzcli.store.jobs import BenchJob

pytestmark = pytest.mark.usefixtures("undrawn")
CPU = torch.device("cpu")
INSTALL = "gzcli[features]"
DEAD = "did not learn its classes (accuracy 26% on test images, 25% by chance)"


def dying(judge):
    """The judge of a set as it is if it has learned nothing."""
    return lambda pack, **how: replace(judge(pack, **how), accuracy=0.26, chance=0.25)


@pytest.fixture(params=[False, True], ids=["without", "with"])
def extra(request, monkeypatch) -> bool:
    """Whether the extra `features` is there: a small net in its place, as the real one takes minutes."""
    for name, judge in (("lenet", lenet), ("second", second)):
        monkeypatch.setattr(bench, name, dying(judge))
    monkeypatch.setattr(validate, "lenet", dying(lenet))
    monkeypatch.setattr(networks, "is_installed", lambda: request.param)
    net = pretrained.Features(lambda x: x[:, 0, ::4, ::4].flatten(1).float(), "tiny", CPU)
    monkeypatch.setattr(pretrained, "lite", lambda device="cpu": net)
    return request.param


def test_a_dead_judge_of_unlabelled_images_names_its_task():
    net = replace(lenet(open_pack("digits")), rotations=True, accuracy=0.26, chance=0.25)
    assert net.is_dead("lenet") == f"the judge network `lenet` {DEAD}".replace(
        "its classes", "to recognize rotations"
    )


def test_a_bench_leaves_out_what_a_dead_judge_says(extra, tmp_path, monkeypatch):
    fake_run(tmp_path, monkeypatch, bench, model=fitted(), name="plain")
    job = BenchJob(("plain",), "digits", n=60, checkpoint="last")
    result = bench.run(job, tmp_path, CPU, Log())
    (row,) = result["rows"]
    of_dead = {c.name for m in metrics().values() if m.features in ("lenet", "second") for c in m.columns}
    assert not of_dead & set(row["metrics"]) and not of_dead & set(result["floor"])
    assert {"swd", "bpd", "samples_per_s"} <= set(row["metrics"])
    assert result["metric"] == ("kid_lite" if extra else "swd")  # of pixels, which no judge sees
    for name in ("lenet", "second"):
        (note,) = (note for note in result["notes"] if f"the judge network `{name}` {DEAD}" in note)
        assert (INSTALL in note) != extra
    assert not any("below 0" in note and "kid_lenet" in note for note in result["notes"])
    named = bench.run(replace(job, metrics=("fd", "memory", "swd")), tmp_path, CPU, Log())
    assert set(named["rows"][0]["metrics"]) == {"swd"} and named["metric"] == "swd"


def test_a_training_chooses_its_best_without_a_dead_judge(extra, monkeypatch):
    """By the features of the extra, else by the usual metric. The loss of a critic chooses nothing."""
    said: list[str] = []
    monkeypatch.setattr(Log, "warn", lambda self, text: said.append(text))
    sets = ("train.eval_every=2", "train.best=fd", "data.n=100")
    monkeypatch.setattr(validate, "MAX_VALIDATION_IMAGES", 40)
    gan = fit(recipe(FIRST["dcgan"], steps=4, sets=sets))
    vae = fit(recipe(FIRST["vae"], steps=4, sets=sets))
    assert vae.run.best.metric == ("fd_lite" if extra else "bpd")
    assert (gan.run.best is not None) == extra and gan.run.model_file.exists()
    assert sum(DEAD in text for text in said) == 2
    assert all((INSTALL in text) != extra for text in said if DEAD in text)
    if extra:
        assert gan.run.best.metric == "fd_lite"
        assert [line["step"] for line in lines(gan.run.metrics_file) if "val_fd_lite" in line] == [2, 4]
    else:
        assert "val_fd" not in gan.run.metrics_file.read_text() and gan.cadence.every["eval"] == 0


@pytest.mark.parametrize(
    "n,channels,classes", [(240, 3, ()), (240, 3, ("a", "b")), (240, 1, ()), (6000, 3, ("a", "b"))]
)
def test_few_colour_images_train_no_judge(n, channels, classes, extra, monkeypatch):
    """Their judge would learn little, after more time than a race has."""
    trained: list[object] = []
    judge = replace(lenet(open_pack("digits")), accuracy=0.9)
    monkeypatch.setattr(validate, "lenet", lambda pack, **how: trained.append(pack) or judge)
    meta = SimpleNamespace(channels=channels, counts={"train": n})
    pack = SimpleNamespace(classes=classes, meta=meta)
    net, metric = validate.judge_of(fitted(), pack, CPU, Log())
    at_once = extra and (n, channels) == (240, 3)
    assert (metric == "fd_lite", trained == [], net is not judge) == (at_once,) * 3
    # a run that was judged by `fd` so far keeps it
    assert validate.judge_of(fitted(), pack, CPU, Log(), "fd") == (judge, "fd")


def test_a_league_trains_the_judge_that_its_trainings_or_its_metrics_need(extra, monkeypatch):
    trained: list[int] = []
    monkeypatch.setattr("gzcli.metrics.features.lenet", lambda pack, say: trained.append(pack.channels))

    def opened(name, channels, **how):
        meta = SimpleNamespace(channels=channels, counts={"train": 240})
        return SimpleNamespace(channels=channels, meta=meta)

    monkeypatch.setattr(training, "open_pack", opened)

    def part(channels, best="auto"):
        data = DataSection(name="photos", channels=channels)
        return SimpleNamespace(data=data, train=TrainSection(best=best))

    def judges(*parts, **by):
        trained.clear()
        training.train_judges(parts, silent, **by)
        return sorted(trained)

    assert judges(part(3), part(1)) == ([1] if extra else [1, 3])
    assert judges(part(3, "fd"), part(3)) == ([3] if extra else [3, 3]), "as a recipe asks for it"
    assert judges(part(3), by=("kid_lite", "fd_second")) == ([] if extra else [3])
    assert judges(part(3), by=("kid_lite", "fd")) == judges(part(3), by=None) == [3]


@pytest.mark.parametrize("steps,affords", [(400, False), (40_000, True)])
def test_a_short_training_of_few_colour_images_trains_no_judge_for_its_guidance(
    steps, affords, extra, monkeypatch
):
    pack, train = open_pack("emoji"), TrainSection(steps=steps, batch_size=32)
    monkeypatch.setattr(guidance, "has_lenet", lambda pack: False)
    assert guidance.affords_judge(train, pack) == (affords or not extra)
    assert guidance.affords_judge(train, open_pack("digits")), "grey images have no other judge"
    monkeypatch.setattr(guidance, "has_lenet", lambda pack: True)
    assert guidance.affords_judge(train, pack)
